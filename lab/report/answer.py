"""The answer that is committed: what a page shows first, and `python -m lab show`. Needs no torch: pandas, scipy, seaborn.

Everything is read from outputs/reference/study: claims.csv (a row per part) and about.txt.
"""

from __future__ import annotations

import functools
import io
import textwrap
from collections.abc import Iterable

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab import paths
from lab.claims import judge
from lab.claims.ledger import PILOT, ledger
from vitlib.errors import UsageError, unknown

WIDE = 100  # columns of a terminal
# label -> marker and its name in the legend; what is not run is not drawn
MARKS = {"held": ("o", "as the paper says"), "against": ("X", "against the paper"), "open": ("D", "undecided"),
         PILOT: ("s", "pilot, decides nothing")}  # fmt: skip


@functools.cache
def claims(study: str = "study") -> pd.DataFrame:
    """The committed verdicts, a row per part. Raises UsageError where there are none."""
    path = paths.REFERENCE / study / "claims.csv"
    if not path.is_file():
        raise UsageError(f"there is no {path.name} of {study} in outputs/reference: allowed are {', '.join(studies())}")
    table = pd.read_csv(path, dtype={"notebook": str, "runs": str})
    return table.fillna(dict.fromkeys(("note", "source", "says", "contains_paper", "contrast", "power", "checks"), ""))


def studies() -> list[str]:
    """The profiles that have a committed table of verdicts."""
    return [name for name in ("study", "photos", "imagenet") if (paths.REFERENCE / name / "claims.csv").is_file()]


def claim_verdicts(table: pd.DataFrame) -> pd.DataFrame:
    """One row per claim: title, verdict, notebook, and the parts that decided it."""
    return table.drop_duplicates("claim")[["claim", "claim_title", "claim_verdict", "notebook"]].reset_index(drop=True)


# ---------------------------------------------------------------------------------------------------- words


def number(row, value: float) -> str:
    return f"{value:.2f}" if row.test == "ratio" else f"{value:+.2f}"


def measured(row) -> str:
    """ "-0.11 [-0.27, +0.05] points, n = 20; the paper: -0.10", or "" where nothing was measured."""
    if pd.isna(row.ours):
        return ""
    unit = "times" if row.test == "ratio" else "points"
    n = f", n = {row.n:.0f}"
    text = f"{number(row, row.ours)} [{number(row, row.low)}, {number(row, row.high)}] {unit}{n}"
    return text if pd.isna(row.paper) else f"{text}; the paper: {number(row, row.paper)}"


def line(row) -> str:
    """One part in a sentence or two."""
    marked = f"{row.label} (pilot)" if row.source == PILOT else row.label
    more = "; ".join(filter(None, [measured(row), row.note if row.label == judge.NOT_RUN else ""]))
    return f"**{row.part}** {row.says or row.title} *{marked}*{f' ({more})' if more else ''}"


def text(rows: pd.DataFrame) -> str:
    """The verdict in a few lines of Markdown: each claim's word, then its parts, those that were measured first."""
    lines = []
    for claim in claim_verdicts(rows).itertuples():
        lines.append(f"**{claim.claim}: {claim.claim_title}: {claim.claim_verdict}.**\n")
        mine = rows[rows["claim"] == claim.claim]
        run = mine[mine["label"] != judge.NOT_RUN]
        lines += [f"- {line(row)}" for row in run.itertuples()]
        if absent := list(mine[mine["label"] == judge.NOT_RUN]["part"]):
            lines.append(f"- Not run: {', '.join(absent)}")
        lines.append("")
    return "\n".join(lines).rstrip()


def plain(rows: pd.DataFrame) -> str:
    """The same for a terminal of 100 columns."""
    folded = [
        textwrap.wrap(one.replace("*", ""), WIDE, subsequent_indent="  ") or [""] for one in text(rows).split("\n")
    ]
    return "\n".join(word for lines in folded for word in lines)


# ---------------------------------------------------------------------------------------------------- the figure


def kind(row) -> str:
    """Which mark of the figure a row has."""
    if row.source == PILOT:
        return PILOT
    part = ledger().parts[row.part]
    return (
        "held" if judge.is_predicted(part, row.label) else "against" if judge.is_contrary(part, row.label) else "open"
    )


def figure(rows: pd.DataFrame) -> Figure | None:
    """Every measured difference with its 95 % interval, filled; the paper's own, hollow; the margin as a band.

    None where nothing was measured.
    """
    shown = rows[rows["ours"].notna() & (rows["test"] != "ratio")]
    if shown.empty:
        return None
    drawn, axes = plt.subplots(figsize=(8, 0.9 + 0.36 * len(shown)), layout="constrained")
    draw(axes, shown, names=[f"{r.part}: {r.contrast}" if len(r.contrast) < 32 else r.part for r in shown.itertuples()])
    legend(drawn, dict.fromkeys(map(kind, shown.itertuples())))
    return drawn


THINGS = {  # the parts of the picture in README
    "1. parallel blocks": ("A1", "P5", "P2-1"), "2. attention-only fine-tuning": ("F1", "F2-full", "F5-digits"),
    "3. hMLP stem": ("H3-linear", "H4-linear", "H8-retention"),
}  # fmt: skip
SHORT = {
    "A1": "two branches - one, 12 pairs", "P5": "two branches - one, 36 pairs", "P2-1": "the same, no LayerScale",
    "F1": "attention - everything", "F2-full": "everything - FFNs", "F5-digits": "attention - everything,\nfew images",
    "H3-linear": "hMLP - linear, supervised", "H4-linear": "hMLP - linear, masked", "H8-retention": "hMLP - conv, masked\nminus supervised",
}  # fmt: skip


def three() -> Figure:
    """One panel per thing: the paper's differences, and ours where they are measured."""
    table = claims().set_index("part", drop=False)
    drawn, panels = plt.subplots(1, 3, figsize=(10, 2.6), layout="constrained")
    for panel, (title, parts) in zip(panels, THINGS.items(), strict=True):
        rows = table.loc[[*parts]]
        draw(panel, rows, names=[SHORT[part] for part in parts])
        panel.set(title=title, xlabel="points of top-1")
    legend(
        drawn,
        dict.fromkeys(
            kind(r) for parts in THINGS.values() for r in table.loc[[*parts]].itertuples() if not pd.isna(r.ours)
        ),
    )
    return drawn


def draw(axes: Axes, rows: pd.DataFrame, names: list[str]) -> None:
    """A row per part, from the top."""
    for y, row in enumerate(rows.itertuples()):
        axes.fill_betweenx([y - 0.4, y + 0.4], -row.margin, row.margin, color="0.5", alpha=0.18, linewidth=0)
        if not pd.isna(row.ours):
            mark, colour = MARKS[kind(row)][0], colours()[kind(row)]
            bars = [[row.ours - row.low], [row.high - row.ours]]
            axes.errorbar(row.ours, y, xerr=bars, fmt=mark, color=colour, capsize=3)
        if not pd.isna(row.paper):
            axes.plot(row.paper, y, "o", markerfacecolor="none", markeredgecolor="0.4", markersize=9)
    axes.set_yticks(range(len(rows)), names, fontsize="small")
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel="difference of top-1, percentage points")
    axes.axvline(0, color="0.3", linewidth=0.8)


def colours() -> dict[str, tuple]:
    return dict(zip(MARKS, sns.color_palette("colorblind"), strict=False))


def legend(drawn: Figure, used: Iterable[str]) -> None:
    marks = [
        plt.Line2D([], [], marker=MARKS[k][0], color=colours()[k], linestyle="none", label=MARKS[k][1]) for k in used
    ]
    marks.append(
        plt.Line2D(
            [], [], marker="o", color="0.4", markerfacecolor="none", linestyle="none", label="the paper, ImageNet"
        )
    )
    marks.append(plt.Rectangle((0, 0), 1, 1, color="0.5", alpha=0.18, label="margin"))
    drawn.legend(handles=marks, loc="outside lower center", ncols=len(marks), fontsize="small", frameon=False)


def rates_figure(tuning: pd.DataFrame) -> Figure:
    """A panel per learning rate that was searched: validation accuracy of each seed and their mean; the chosen one is marked.

    tuning: the committed tuning.csv. The flat part of a curve is shaded.
    """
    names, across = list(dict.fromkeys(tuning["rate_of"])), 5
    down = -(-len(names) // across)
    drawn, panels = plt.subplots(down, across, figsize=(8, 1.5 * down), layout="constrained", squeeze=False)
    for panel in panels.flat[len(names) :]:
        panel.set_axis_off()
    for panel, name in zip(panels.flat, names, strict=False):
        rows = tuning[tuning["rate_of"] == name].sort_values("lr")
        flat, chosen = rows[rows["flat"]], rows[rows["chosen"]]
        if len(flat):
            panel.axvspan(flat["lr"].min() / 1.2, flat["lr"].max() * 1.2, color="0.5", alpha=0.18, linewidth=0)
        for seed in (column for column in rows if column.startswith("seed_")):
            panel.plot(rows["lr"], rows[seed], ".", color="0.5", markersize=3)
        panel.plot(rows["lr"], rows["top1_validation"], "-", linewidth=1)
        panel.plot(chosen["lr"], chosen["top1_validation"], "D", color="C3", markersize=5)
        panel.set_xscale("log", base=2)
        panel.set_xticks(rows["lr"], [f"{lr:g}" for lr in rows["lr"]], rotation=60, fontsize=5)
        panel.tick_params(axis="y", labelsize=5)
        panel.minorticks_off()
        panel.set_title(name, fontsize=7)
    drawn.supxlabel("learning rate", fontsize="small")
    drawn.supylabel("validation top-1, %", fontsize="small")
    return drawn


def alt(rows: pd.DataFrame) -> str:
    """What the figure shows, in words."""
    shown = rows[rows["ours"].notna() & (rows["test"] != "ratio")]
    return "Differences with their 95 % intervals. " + " ".join(
        f"{row.part}: {measured(row)}, {row.label}." for row in shown.itertuples()
    )


def chosen(name: str, study: str = "study") -> pd.DataFrame:
    """The rows of a claim ("F1"), a part ("F2-full") or a notebook ("41"), or all ("")."""
    table = claims(study)
    for column in ("claim", "part", "notebook"):
        if name in set(table[column]):
            return table[table[column] == name]
    if name:
        raise unknown(
            "claim, part or notebook", name, [*table["claim"].unique(), *table["part"], *table["notebook"].unique()]
        )
    return table


def answer(name: str, study: str = "study") -> None:
    """Show the committed answer in a notebook: the figure, with its text for those who do not see it, and the verdict."""
    from IPython.display import Image, Markdown, display

    rows = chosen(name, study)
    sns.set_theme(context="paper", style="whitegrid", palette="colorblind", font_scale=1.1)
    if (drawn := figure(rows)) is not None:
        png = io.BytesIO()
        drawn.savefig(png, format="png", dpi=120)
        plt.close(drawn)
        display(Image(png.getvalue(), format="png", alt=alt(rows), metadata={"alt": alt(rows)}, width=760))
    display(Markdown(f"{text(rows)}\n\n*{where(study)}*"))


def where(study: str) -> str:
    """On what the numbers were measured, as it was written with them."""
    path = paths.REFERENCE / study / "about.txt"
    return path.read_text(encoding="utf-8").strip() if path.is_file() else "There is no committed study yet."
