"""The command line: `python -m vitlib --help`. Heavy imports happen inside the commands, so that help is quick."""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import PackageNotFoundError, version

import vitlib
from vitlib.errors import UsageError

BESIDE = ("numpy", "pillow", "pyarrow", "safetensors", "pyyaml", "filelock", "tqdm")


class Parser(argparse.ArgumentParser):
    """One sentence for a wrong word, like every other mistake."""

    def error(self, message: str):
        raise UsageError(message)


def main(words: list[str] | None = None) -> int:
    """Run one command; its exit code. A mistake in what was asked for is one sentence and 2."""
    top = Parser(prog="python -m vitlib", description=vitlib.__doc__.splitlines()[0])
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    text = "the installed versions; is the installation whole?"
    commands.add_parser("check", help=text, description=text).set_defaults(command=check)
    try:
        top.parse_args(words).command()
    except UsageError as fault:
        print(f"vitlib: {fault}", file=sys.stderr)
        return 2
    return 0


def check() -> None:
    """Print the versions. Raises UsageError for a library that is absent, and where torch and torchvision are no pair."""
    try:
        others = ", ".join(f"{name} {version(name)}" for name in BESIDE)
        print(f"installation: {pair()}, {others}; vitlib {vitlib.__version__}")
    except (PackageNotFoundError, ModuleNotFoundError) as fault:
        raise UsageError(f"{fault.name} is not installed: pip install vitlib brings all that it needs") from fault


def pair() -> str:
    """The versions of torch, torchvision and timm. Raises UsageError where torch and torchvision are no pair.

    Beside another build of torch (a CPU-only one, say) torchvision cannot be imported: "operator torchvision::nms does
    not exist". timm imports torchvision.
    """
    import torch

    try:
        import torchvision
    except (RuntimeError, ImportError, OSError) as fault:
        what = f"torch {torch.__version__} and the installed torchvision are not builds of one family"
        cure = "remove .venv and run `make setup`, which takes the matching pair"
        raise UsageError(f"{what} ({str(fault).splitlines()[0]}): {cure}") from fault
    import timm

    return f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"


if __name__ == "__main__":
    sys.exit(main())
