"""Every path of the project, in one place, so that a notebook and a test find the same files.

A relative path in an environment variable counts from the project's folder, whatever folder a process is in.
"""

from __future__ import annotations

import os
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
