"""What a user meets when something is wrong: one sentence, exit code 2."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from importlib.util import find_spec


class UsageError(ValueError):
    """A mistake in what was asked for. The command line prints it as one sentence and exits with 2."""

    def __str__(self) -> str:
        """In one line, whatever is in the names of files and classes: control characters are written as \\n."""
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__())


def unknown(what: str, given: object, allowed: Iterable[object]) -> UsageError:
    """The one sentence for a name that does not exist: what was given, what is allowed, the nearest match."""
    names = [str(name) for name in allowed]
    near = get_close_matches(str(given), names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UsageError(f"unknown {what} {str(given)!r}: allowed are {', '.join(names)}{hint}")


def need(package: str, extra: str) -> None:
    """Raises UsageError where a package of one of vitlib's extras is not installed."""
    if find_spec(package) is None:
        raise UsageError(f"{package} is not installed: pip install 'vitlib[{extra}]' brings what this needs")
