"""Every path of the project, in one place, so that a notebook and a test find the same files; and the checkout's commit.

A relative path in an environment variable counts from the project's folder, whatever folder a process is in. An empty
variable is one that is not set.
"""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path

from vitlib.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
DATA_CARDS = ROOT / "data_cards"
EMBEDDED = ROOT / "lab" / "data" / "embedded"
PAPER = ROOT / "outputs" / "paper"
REFERENCE = ROOT / "outputs" / "reference"


def outputs() -> Path:
    """Where this checkout's own results go (git-ignored); `VITLIB_OUTPUTS` moves it."""
    return place("VITLIB_OUTPUTS", "outputs")


def runs() -> Path:
    """The run store, shared by all profiles; `VITLIB_RUNS` moves it."""
    return place("VITLIB_RUNS", outputs() / "runs")


def named(text: str) -> Path:
    """A path that a reader gives to a notebook; a relative one counts from the project's folder, too."""
    return ROOT / Path(text).expanduser()


def place(variable: str, default: Path | str) -> Path:
    """The folder that an environment variable names. Raises UsageError for what can be none."""
    return _folder(variable, os.environ.get(variable) or str(default))


@functools.lru_cache(maxsize=64)
def _folder(variable: str, name: str) -> Path:
    path = ROOT / name
    try:
        first = next(folder for folder in (path, *path.parents) if folder.exists())
        fault = "" if first.is_dir() else f", but {first} is a file"
    except OSError as error:  # too long
        fault = f" ({error.strerror})"
    if not name.isprintable():
        fault = ", which holds a control character"
    if fault:
        raise UsageError(f"{variable} is {name[:200]!r}{fault}: allowed is a folder that is there or can be made")
    return path


@functools.cache
def commit() -> str:
    """The commit of this checkout, with `+` where code or ledger was changed since; "unknown" outside git."""
    own = {
        name: value for name, value in os.environ.items() if not name.startswith("GIT_")
    }  # a hook's name its repository
    options = {"cwd": ROOT, "env": own, "capture_output": True, "text": True, "timeout": 10}
    try:
        if not (ROOT / ".git").exists():  # inside of another repository
            return "unknown"
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **options).stdout.strip()
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=normal", "vitlib", "lab", "outputs/paper"], **options
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return (head or "unknown") + ("+" if head and changes else "")
