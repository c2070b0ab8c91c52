"""Notebook 62: `vitlib.compare` on a reader's own images, on the embedded digits unless a folder is named.

It has no runs of the ledger and no claim: what it trains lies in outputs/<profile>/own_images.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

import vitlib
from lab import paths
from lab.data.cards import card
from lab.experiments.catalogue import notebook
from lab.experiments.profiles import profile
from lab.report.figures import pictures
from lab.report.notebook import Page, say
from lab.report.tables import bounds, columns, framed, spread, spread_of
from vitlib.data.read import decode
from vitlib.files import write_whole
from vitlib.tasks.compare import Comparison
from vitlib.tasks.images import in_folders


class Scale(NamedTuple):
    """What is compared unless a reader says otherwise: by default as the command does."""

    strategies: Sequence[str] = ("full", "attn", "ffn", "norm", "bias", "head")
    seeds: int = 5
    epochs: int = 10
    digits: int | None = None  # the first images of each part; None = all


SCALES = {"smoke": Scale(("full", "attn"), 1, 1, digits=320), "cpu": Scale(("full", "attn", "head"), 3, 3)}


@dataclass(frozen=True)
class Question:
    """Which of these strategies are enough on these images?"""

    page: Page
    folder: Path
    weights: Path | str | None  # None: the small trunk that ships
    strategies: Sequence[str]
    seeds: int
    epochs: int

    def images(self, count: int = 8) -> None:
        """Some images, evenly over the folder, with their classes."""
        found, _, _ = in_folders(self.folder)
        rows = np.linspace(0, len(found.labels) - 1, count).round().astype(int).tolist()
        names = [found.classes[found.labels[i]] for i in rows]
        drawn = pictures({"": [np.asarray(decode(found.rows, i)) / 255 for i in rows]}, (8, 1.3))
        for panel, name in zip(drawn.axes, names, strict=True):
            panel.set_title(name, fontsize="x-small")
        self.page.figure(drawn, alt=f"Images of {self.folder.name}: {', '.join(names)}", name="images")

    def compare(self) -> Comparison | None:
        """What `python -m vitlib compare` does; None where nothing may be trained (VITLIB_TRAIN=0)."""
        if os.environ.get("VITLIB_TRAIN") == "0":
            return None
        silent = os.environ.get("VITLIB_PROGRESS") == "0"
        with contextlib.redirect_stderr(io.StringIO()) if silent else contextlib.nullcontext():
            return vitlib.compare(
                self.folder, outputs(self.page.profile.name) / "comparison", self.weights, self.strategies, self.seeds,
                epochs=self.epochs, device=self.page.profile.device,
            )  # fmt: skip

    def answer(self, result: Comparison | None) -> None:
        """The table, the figure, and a sentence for each strategy."""
        self.page.table(table(result) if result else pd.DataFrame(), "comparison")
        if result is None:
            return
        alt = f"Top-1 of {', '.join(result.correct)} per seed, and differences from {result.reference} with intervals"
        self.page.figure(result.figure(), alt=alt, name="comparison")
        said = [f"- {result.verdict(strategy)}" for strategy in result.correct if strategy != result.reference]
        say("\n".join(["**The answer:**\n", *said]))


def ask(profile_name: str, folder: str = "", weights: str = "", strategies: str = "", seeds: int = 0) -> Question:
    """The question of a notebook's parameters; says what will be compared. Raises UsageError for an unknown profile."""
    p = profile(profile_name)
    own = SCALES.get(p.name, Scale())
    chosen, n = strategies.replace(",", " ").split() or own.strategies, seeds or own.seeds
    images = paths.named(folder) if folder else digits(p.name, own.digits)
    named = paths.named(weights) if weights and paths.named(weights).exists() else weights or None  # a timm name
    what = f"**Profile `{p.name}`**: images of `{images.name}`, {Path(weights).name or 'the small trunk that ships'}; "
    say(f"{what}strategies {', '.join(chosen)}; seeds: {n}, epochs: {own.epochs}.")
    return Question(Page(notebook("62"), p), images, named, chosen, n, own.epochs)


def table(result: Comparison) -> pd.DataFrame:
    """A row per strategy: its rate, top-1, difference from the reference, and what it costs."""
    rows = []
    for strategy, correct in result.correct.items():
        row = {"strategy": strategy, "lr": result.rates[strategy], "time_s": result.seconds[strategy]}
        row |= spread_of(100 * correct.mean(axis=1)) | vars(result.costs[strategy])
        if e := result.estimate(strategy):
            row |= {"points": e.mean, "low": e.low, "high": e.high}
        rows.append(row)
    layout = columns("strategy") | {"lr, searched": "{lr:g}", "top1, test images": spread()}
    costs = columns(time_s=".1f", memory_mb=".0f", stored_mb=".2f")
    difference = {f"difference from {result.reference}, points": bounds()}
    return framed(rows, layout | difference | costs, always=[*layout, *costs])


def outputs(profile_name: str) -> Path:
    return paths.outputs() / profile_name / "own_images"


def digits(profile_name: str, images: int | None) -> Path:
    """The first of the embedded digits, or all, as a folder of a reader's own: a parquet file for each part."""
    folder = outputs(profile_name) / "digits"
    for part, file in card("digits")["vitlib"]["files"].items():
        with write_whole(folder / f"{part}.parquet") as draft:
            pq.write_table(pq.read_table(paths.EMBEDDED / file).slice(0, images), draft)
    return folder
