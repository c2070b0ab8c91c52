"""Every path of the project, in one place, so that a notebook and a test find the same files; and the checkout's commit.

A relative path in an environment variable counts from the project's folder, whatever folder a process is in.
"""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
DATA_CARDS = ROOT / "data_cards"
EMBEDDED = ROOT / "lab" / "data" / "embedded"
PAPER = ROOT / "outputs" / "paper"
REFERENCE = ROOT / "outputs" / "reference"


def outputs() -> Path:
    """Where this checkout's own results go (git-ignored); `VITLIB_OUTPUTS` moves it."""
    return ROOT / os.environ.get("VITLIB_OUTPUTS", "outputs")


def runs() -> Path:
    """The run store, shared by all profiles; `VITLIB_RUNS` moves it."""
    return ROOT / os.environ.get("VITLIB_RUNS", outputs() / "runs")


@functools.cache
def commit() -> str:
    """The commit of this checkout, with `+` where code or ledger was changed since; "unknown" outside git."""
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 10}
    try:
        if not (ROOT / ".git").exists():  # inside of another repository
            return "unknown"
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **options).stdout.strip()
        changes = subprocess.run(
            ["git", "status", "--porcelain", "vitlib", "lab", "outputs/paper"], **options
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return (head or "unknown") + ("+" if head and changes else "")
