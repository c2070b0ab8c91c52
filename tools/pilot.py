"""Is the committed pilot what its runs say: every cell of claims.csv, and of the tables that have a row per arm.

    python -m tools.pilot

Verdicts are judged again from `runs.jsonl` under the pilot's ledger; top-1 with its standard deviation, and differences with
their intervals, are computed again for the tables. The exit code is 1 where a cell is not as committed.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from lab import paths
from lab.claims.evidence import Archived, verdicts
from lab.claims.judge import verdict_table
from lab.claims.statistics import difference, interval
from lab.experiments.profiles import profile
from lab.runs.results import Result


def main() -> int:
    pilot = Archived(paths.REFERENCE / "pilot", profile("study"))
    parts, wrong = claims(pilot)
    cells, otherwise = printed_cells(pilot)
    print("\n".join([*wrong, *otherwise]), end="\n" if wrong or otherwise else "")
    print(f"{parts} parts recomputed from their runs: {len(wrong)} cells of claims.csv differ")
    print(f"{cells} cells of the tables recomputed: {len(otherwise)} differ")
    return 1 if wrong or otherwise else 0


def claims(archived: Archived) -> tuple[int, list[str]]:
    """How many parts were judged again, and each cell of the claims table that is not as committed (numbers to 1e-9)."""
    made = verdict_table(verdicts(archived, archived.parts()))
    made = pd.read_csv(io.StringIO(made.to_csv(index=False)), dtype={"notebook": str, "runs": str}, index_col="part")
    kept, wrong = archived.claims, []
    if list(made.index) != list(kept.index) or list(made.columns) != list(kept.columns):
        return len(made), [f"the rows or columns differ: {len(made)} parts, committed {len(kept)}"]
    for part in kept.index:
        for column in kept.columns:
            new, old = made.loc[part, column], kept.loc[part, column]
            if not (_equal(new, old) or (pd.isna(new) and pd.isna(old))):
                wrong.append(f"{part}, {column}: {new}, committed {old}")
    return len(made), wrong


def _equal(new: object, old: object) -> bool:
    if isinstance(old, float) and isinstance(new, float | int):
        return math.isclose(new, old, rel_tol=1e-9, abs_tol=1e-9)
    return new == old


def printed_cells(archived: Archived) -> tuple[int, list[str]]:
    """How many cells of the committed tables were computed again, and those that read otherwise."""
    count, wrong = 0, []
    for path in sorted((archived.folder / "tables").glob("*.csv")):
        table = pd.read_csv(path, dtype=str)
        results = archived.archive.results(path.stem.partition("_")[0])
        if "arm" not in table or not results:
            continue
        for row in table.to_dict("records"):
            for column, text in row.items():
                new = _cell(results, row["arm"], column)
                if new and text != "–":
                    count += 1
                    wrong += [] if new == text else [f"{path.stem}, {row['arm']}, {column}: {new}, committed {text}"]
    return count, wrong


def _cell(results: Mapping[str, Sequence[Result]], arm: str, column: str) -> str:
    """What a cell says by the runs; "" for a column of something else."""
    if column == "committed reference" or column.startswith("top1, this run"):
        top1 = [result.metrics["top1"] for result in results[arm]]
        return f"{np.mean(top1):.2f} ± {np.std(top1, ddof=1):.2f} (n={len(top1)})"
    if column.startswith("minus ") and column.endswith(", points"):
        other = column.removeprefix("minus ").removesuffix(", points")
        correct = {label: np.stack([r.correct for r in results[label]]) for label in (arm, other)}
        e = interval(difference(correct, {arm: 1.0, other: -1.0}))
        return f"{e.mean:+.2f} [{e.low:+.2f}, {e.high:+.2f}]"
    return ""


if __name__ == "__main__":
    sys.exit(main())
