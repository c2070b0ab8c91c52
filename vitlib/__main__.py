"""The command line: `python -m lab --help`."""

from __future__ import annotations

import argparse
import sys

from vitlib.errors import UsageError


def main(words: list[str] | None = None) -> int:
    """Run one command; its exit code. A mistake in what was asked for is one sentence and 2."""
    top = argparse.ArgumentParser(prog="python -m vitlib", description=__import__("vitlib").__doc__.splitlines()[0])
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    text = "is the installation whole: torch, torchvision and timm of one family"
    commands.add_parser("check", help=text, description=text).set_defaults(command=check)
    arguments = top.parse_args(words)
    try:
        arguments.command()
    except UsageError as fault:
        print(f"vitlib: {fault}", file=sys.stderr)
        return 2
    return 0


def check() -> None:
    """Raises UsageError with one sentence for a broken pair of torch and torchvision."""
    from vitlib.installation import check_pair

    print(f"installation: {check_pair()}")


if __name__ == "__main__":
    sys.exit(main())
