"""Is the committed pilot what its runs say, under the rules that it was judged by: claims.csv, and the tables with a row per arm.

    python -m tools.pilot

Every estimate of claims.csv is computed again from `runs.jsonl`, and its verdict by the pilot's rules, which are here and
nowhere else; top-1 with its standard deviation, and differences with their intervals, are computed again for the tables. The
exit code is 1 where a cell is not as committed.
"""

from __future__ import annotations

import math
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from lab import paths
from lab.claims.statistics import holm, p_value, smallest_visible
from lab.runs.results import Archive, Result
from vitlib.stats import Estimate, difference, interval, over_seeds

FOLDER = paths.REFERENCE / "pilot"


def main() -> int:
    archive = Archive(FOLDER)
    parts, wrong = claims(archive)
    cells, otherwise = printed_cells(archive)
    print("\n".join([*wrong, *otherwise]), end="\n" if wrong or otherwise else "")
    print(f"{parts} parts recomputed from their runs: {len(wrong)} cells of claims.csv differ")
    print(f"{cells} cells of the tables recomputed: {len(otherwise)} differ")
    return 1 if wrong or otherwise else 0


def claims(archive: Archive) -> tuple[int, list[str]]:
    """How many parts were measured again, and each cell of the claims table that is not as committed (numbers to 1e-9).

    Holm's family is all parts with a p, that of the time of F3 among them, whose timings are not kept.
    """
    table = pd.read_csv(FOLDER / "claims.csv", index_col="part")
    ledger = tomllib.loads((FOLDER / "claims.toml").read_text(encoding="utf-8"))
    made: dict[str, dict[str, object]] = {}
    for part, entry in ledger.items():
        entry |= entry.get("study", {})
        results = archive.results(entry["notebook"])
        correct = {arm: np.stack([r.correct for r in rs]) for arm, rs in results.items()}
        if entry["kind"] in ("exact", "ratio") or not {*arms_of(entry)} <= {*correct}:
            continue
        e, m = estimate(entry, correct), entry["margin"]
        said, tested = verdict(entry, e, m, correct), entry["scope"] != "imagenet"
        made[part] = {
            "ours": e.mean, "sd": e.sd, "low": e.low, "high": e.high, "paired_low": e.paired[0], "paired_high": e.paired[1],
            "seed_se": math.sqrt(e.seed_term), "image_se": math.sqrt(e.image_term), "n": e.n,
            "test_images": e.images if e.images > 1 else math.nan, "margin": m, "paper": entry.get("paper", math.nan),
            "p": p_value("superiority" if entry["kind"] == "slope" else entry["kind"], e, m) if tested else math.nan,
            "smallest_visible": smallest_visible(e) if tested else math.nan,
            "verdict": said, "stance": stance(entry, said, m),
            "runs": {r.hash for arm in arms_of(entry) for r in results[arm]},
        }  # fmt: skip
    p = {part: cells["p"] for part, cells in made.items()} | table.loc[table["test"] == "ratio", "p"].to_dict()
    p = {part: value for part, value in p.items() if not math.isnan(value)}
    adjusted, wrong = dict(zip(p, holm([*p.values()]), strict=True)), []
    for part, cells in made.items():
        if part not in table.index:
            wrong.append(f"{part}: the row is absent")
            continue
        if lost := cells.pop("runs") - {*str(table.loc[part, "runs"]).split()}:  # it has those of checks too
            wrong.append(f"{part}, runs: {' '.join(sorted(lost))}, committed without")
        for column, new in (cells | {"p_holm": float(adjusted.get(part, math.nan))}).items():
            if not _equal(new, old := table.loc[part, column]):
                wrong.append(f"{part}, {column}: {new}, committed {old}")
    return len(made), wrong


def arms_of(entry: Mapping) -> list[str]:
    """The arms of the contrast; of a slope at every size."""
    return [of_size(arm, size) if size else arm for size in entry.get("sizes", [0]) for arm in entry["contrast"]]


def estimate(entry: Mapping, correct: Mapping[str, np.ndarray]) -> Estimate:
    """The contrast with its interval; of a slope the change over the sizes, by a line on log2 for each seed, over seeds."""
    if entry["kind"] != "slope":
        return interval(difference(correct, entry["contrast"]))
    x = np.log2(np.asarray(entry["sizes"], float))
    x -= x.mean()
    at_size = [{of_size(arm, n): c for arm, c in entry["contrast"].items()} for n in entry["sizes"]]
    values = np.stack([100 * difference(correct, contrast).mean(axis=1) for contrast in at_size], axis=1)
    return over_seeds(values @ x / (x**2).sum() * np.ptp(x))


def of_size(arm: str, size: int) -> str:
    """ "W96 6x2" of width 32 is "W32 6x2"; "18x2" at 12 pairs is "6x2"."""
    if arm.startswith("W"):
        return re.sub(r"^W\d+", f"W{size}", arm)
    branches = int(arm.partition("x")[2])
    return f"{size // branches}x{branches}"


def verdict(entry: Mapping, e: Estimate, m: float, correct: Mapping[str, np.ndarray]) -> str:
    """The words of the pilot."""
    failed = [name for name in entry["checks"] if not passed(name, entry, m, correct)]
    if entry["scope"] == "imagenet":
        return "out of scope at this scale"
    if failed:
        return f"inconclusive (check failed: {', '.join(failed)})"
    (low, high), (low90, high90) = e.bounds(0.95), e.bounds(0.90)
    inside = -m < low90 and high90 < m
    if entry["kind"] == "equivalence":
        return (
            "equivalent within m" if inside else "different by more than m" if low > m or high < -m else "inconclusive"
        )
    if entry["kind"] == "non-inferiority":
        return "not inferior by m" if low90 > -m else "inferior by more than m" if high < -m else "inconclusive"
    if low > 0 or high < 0:
        return "same direction" if low > 0 else "opposite direction"
    return "equivalent within m" if inside else "inconclusive"


def stance(entry: Mapping, said: str, m: float) -> str:
    """What the pilot called a part of this verdict."""
    if said in ("same direction", "not inferior by m") or (
        said == "equivalent within m" and entry["kind"] == "equivalence"
    ):
        return "supports"
    level = said == "equivalent within m" and abs(entry.get("paper", 0)) > m
    contrary = ("opposite direction", "different by more than m", "inferior by more than m")
    return "contradicts" if level or said in contrary else "open"


def passed(name: str, entry: Mapping, m: float, correct: Mapping[str, np.ndarray]) -> bool:
    """The checks of the pilot."""
    control, sizes = entry["control"], entry.get("sizes", ())
    if name == "control learned":  # at least twice chance, an error of at least 5 %
        classes = 4 if "fashion-mnist-4" in control else 10
        arms = [of_size(control, size) for size in sizes] or [control]
        return all(2 / classes <= correct[arm].mean() <= 0.95 for arm in arms)
    setting = control.rpartition(" ")[0]
    a, b = {"full beats head": ("full", "head"), "pre-training helps": ("linear pretrained", "linear scratch")}[name]
    a, b = (arm if " " in arm else f"{setting} {arm}".strip() for arm in (a, b))
    return interval(difference(correct, {a: 1.0, b: -1.0})).low > (m if name == "full beats head" else 0.0)


def _equal(new: object, old: object) -> bool:
    if isinstance(old, float) and isinstance(new, float | int):
        return math.isclose(new, old, rel_tol=1e-9, abs_tol=1e-9) or (math.isnan(new) and math.isnan(old))
    return new == old


def printed_cells(archive: Archive) -> tuple[int, list[str]]:
    """How many cells of the committed tables were computed again, and those that read otherwise."""
    count, wrong = 0, []
    for path in sorted((FOLDER / "tables").glob("*.csv")):
        table = pd.read_csv(path, dtype=str)
        results = archive.results(path.stem.partition("_")[0])
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
