"""What every table and figure shares: its form, its file, the columns of the committed reference."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable

import pandas as pd
import seaborn as sns

from lab import paths
from lab.data.registry import card
from lab.experiments.profiles import profile

NOT_RUN = "not run"
SHOWN = "pilot"  # the folder of outputs/reference that pages show: the first study, until there is a second
WITHOUT_RUNS = "the committed reference of `study` is shown, where there is one."


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table; texts as they are, missing cells as a dash."""
    return table.fillna("–").to_markdown(index=False, disable_numparse=True)


def legend(profile_name: str) -> str:
    """The scale of a profile, and what the three kinds of columns are, in a few sentences."""
    p = profile(profile_name)
    seeds = ", ".join(map(str, p.seeds))
    images = f", {p.images:,} of the training images" if p.judged and p.images else ""
    dates = reference_dates(SHOWN)
    kept = f"the pilot: profile `study`, n = {len(profile('study').seeds)}, made {dates}" if dates else "none yet"
    return (
        f"**Profile `{p.name}`**: {card(p.data)['pretty_name']} at {p.image_size} pixels, patches of {p.patch_size}, width "
        f"{p.width}, {p.pairs} pairs unless an arm says otherwise, {p.epochs} epochs{images}, seeds {seeds}.\n\n"
        f"Columns: *paper* is ImageNet as printed; *committed reference* is what this project measured ({kept}); *this run* is "
        f"what this page's own runs say."
    )


@functools.cache
def reference_dates(profile_name: str) -> str:
    """The first and the last day of the committed runs of a profile; empty where there are none."""
    path = paths.REFERENCE / profile_name / "runs.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return span(json.loads(line)["result"]["date"] for line in lines)


def span(days: Iterable[str]) -> str:
    """The first and the last of them, once where they are one; empty where there are none."""
    days = sorted(days)
    return " to ".join(dict.fromkeys((days[0], days[-1]))) if days else ""


def reference_table(name: str) -> pd.DataFrame | None:
    path = paths.REFERENCE / SHOWN / "tables" / f"{name}.csv"
    return pd.read_csv(path, dtype=str) if path.is_file() else None


def theme() -> None:
    sns.set_theme(context="paper", style="whitegrid", palette="colorblind", font_scale=1.1)


def save_table(table: pd.DataFrame, profile_name: str, name: str, folder: str = "tables") -> None:
    path = paths.outputs() / profile_name / folder / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)
