from vitlib.errors import UsageError


class DataAbsent(UsageError):
    """A data set that is nowhere to be found: where it was looked for, and how to get it."""
