"""The paper's own numbers, as printed: outputs/paper/*.csv, one file per table or figure, with source and confidence."""

from __future__ import annotations

import numpy as np
import pandas as pd

from lab import paths
from vitlib.errors import unknown
from vitlib.files import intact


def paper_table(name: str) -> pd.DataFrame:
    """A table of the paper, cells as text so that digits stay as printed; empty = not in the paper.

    `source`: A (the arXiv text with supplement, 2203.09795), B (the released code and its pictures).
    `confidence`: read (typeset), read-chart (estimated from a chart, about 0.1 off), computed (from read numbers).
    `remark`: what is doubtful about a number. "disagreements" lists where the paper has two numbers for one quantity.
    Raises UsageError for a name that is not there.
    """
    files = {path.stem: path for path in paths.PAPER.glob("*.csv")}
    if name not in files:
        raise unknown("table of the paper", name, sorted(files))
    with intact(files[name]):
        return pd.read_csv(files[name], dtype=str, keep_default_na=False)


def paper_numbers(name: str) -> pd.DataFrame:
    """The same table with its columns of numbers as numbers; NaN = not in the paper."""
    table = paper_table(name).replace("", np.nan)
    numbers = table.apply(pd.to_numeric, errors="coerce")
    whole = (numbers.notna() == table.notna()).all()  # columns in which every text is a number
    return pd.DataFrame({column: (numbers if whole[column] else table)[column] for column in table})
