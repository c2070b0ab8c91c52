"""The answer that is committed: what a page shows first, and `python -m lab show`. Needs no torch: pandas, scipy, seaborn.

A row is one part of a claim, as `judge.verdict_table` has it and outputs/reference/<study>/claims.csv keeps it.
"""

from __future__ import annotations

import functools
import io
import textwrap
from typing import TYPE_CHECKING

import pandas as pd

from lab import paths
from lab.claims import judge
from lab.claims.ledger import COMMITTED, PILOT, ledger
from vitlib.errors import UsageError, unknown
from vitlib.files import intact

if TYPE_CHECKING:  # only figures need them
    from IPython.display import Image
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE = 100  # columns of a terminal
NAMED = ("part", "claim", "claim_title", "claim_verdict", "title", "notebook", "label")  # what every row has
# kind of row -> its look and name in the legend, in seaborn's colours "colorblind"; what is not run is not drawn
MARKS = {
    "held": {"marker": "o", "color": "#0173b2", "label": "as the paper says"},
    "against": {"marker": "X", "color": "#de8f05", "label": "against the paper"},
    "open": {"marker": "D", "color": "#029e73", "label": "undecided"},
    PILOT: {"marker": "s", "color": "#d55e00", "label": "pilot, decides nothing"},
}


@functools.cache
def claims(study: str = "study") -> pd.DataFrame:
    """The committed verdicts, a row per part. Raises UsageError where there are none."""
    path = paths.REFERENCE / study / "claims.csv"
    if not path.is_file():
        raise UsageError(f"there is no {path.name} of {study} in outputs/reference: allowed are {', '.join(studies())}")
    with intact(path):
        table = pd.read_csv(path, dtype={"notebook": str, "runs": str})[list(judge.COLUMNS)]
        if table.astype(judge.COLUMNS)[list(NAMED)].isna().any(axis=None):
            raise ValueError
    later = path.with_name("afterwards.csv")  # part -> what was looked at after its verdict, and decides nothing
    with intact(later):
        said = pd.read_csv(later, index_col="part")["says"] if later.is_file() else {}
    table["afterwards"] = table["part"].map(said).fillna("")
    return table.fillna(dict.fromkeys(("note", "source", "says", "contains_paper", "contrast", "power", "checks"), ""))


def studies() -> list[str]:
    """The profiles that have a committed table of verdicts."""
    return [name for name in COMMITTED if (paths.REFERENCE / name / "claims.csv").is_file()]


def chosen(name: str, study: str = "study") -> pd.DataFrame:
    """The rows of a claim ("F1"), a part ("F2-full") or a notebook ("41"), or all ("")."""
    table = claims(study)
    if not name:
        return table
    keys = ("claim", "part", "notebook")
    for key in keys:
        if name in set(table[key]):
            return table[table[key] == name]
    raise unknown("claim, part or notebook", name, list(dict.fromkeys(known for key in keys for known in table[key])))


def claim_verdicts(table: pd.DataFrame) -> pd.DataFrame:
    """One row per claim: title, verdict and notebook."""
    return table.drop_duplicates("claim")[["claim", "claim_title", "claim_verdict", "notebook"]].reset_index(drop=True)


def where(study: str) -> str:
    """On what the numbers were measured, as it was written with them."""
    path = paths.REFERENCE / study / "about.txt"
    with intact(path):
        return path.read_text(encoding="utf-8").strip() if path.is_file() else "There is no committed study yet."


# ---------------------------------------------------------------------------------------------------- words


def number(row, value: float) -> str:
    return f"{value:.2f}" if row.test == "ratio" else f"{value:+.2f}"


def estimate(row) -> str:
    """ "-0.11 [-0.27, +0.05]" of a row that was measured."""
    return f"{number(row, row.ours)} [{number(row, row.low)}, {number(row, row.high)}]"


def measured(row) -> str:
    """ "-0.11 [-0.27, +0.05] points, n = 20; the paper: -0.10", or "" where nothing was measured."""
    if pd.isna(row.ours):
        return ""
    text = f"{estimate(row)} {'times' if row.test == 'ratio' else 'points'}, n = {row.n:.0f}"
    return text if pd.isna(row.paper) else f"{text}; the paper: {number(row, row.paper)}"


def label(row) -> str:
    return f"{row.label} (pilot)" if row.source == PILOT else row.label


def details(row) -> str:
    """In brackets: what was measured, and the note of a part without a sentence for its outcome, or which Holm's correction left
    open. Then what came afterwards.
    """
    told = row.source == PILOT or (row.says and row.label != judge.UNDECIDED)
    more = "; ".join(filter(None, [measured(row), "" if told else row.note]))
    later = getattr(row, "afterwards", "")  # of the committed study alone
    return (f" ({more})" if more else "") + (f". {later}" if later else "")


def line(row) -> str:
    """One part in a sentence or two, in Markdown."""
    return f"**{row.part}** {row.says or row.title} *{label(row)}*{details(row)}"


def text(rows: pd.DataFrame) -> str:
    """The verdict in a few lines of Markdown: each claim's word, then its parts, those that were measured first."""
    lines = []
    for claim in claim_verdicts(rows).itertuples():
        lines.append(f"**{claim.claim}: {claim.claim_title}: {claim.claim_verdict}.**\n")
        mine = rows[rows["claim"] == claim.claim]
        absent = mine["label"] == judge.NOT_RUN
        lines += [f"- {line(row)}" for row in mine[~absent].itertuples()]
        lines += [f"- Not run: {', '.join(mine[absent]['part'])}"] if absent.any() else []
        lines.append("")
    return "\n".join(lines).rstrip()


def plain(rows: pd.DataFrame) -> str:
    """For a terminal of 100 columns: every part, with the reason where it was not run."""

    def folded(words: str, indent: int = 0, hang: int = 4) -> list[str]:
        return textwrap.wrap(words, WIDE, initial_indent=" " * indent, subsequent_indent=" " * (indent + hang))

    lines = []
    for claim in claim_verdicts(rows).itertuples():
        lines += [*folded(f"{claim.claim}: {claim.claim_title}"), f"    {claim.claim_verdict.upper()}"]
        for row in rows[rows["claim"] == claim.claim].itertuples():
            lines += folded(f"{row.part}: {label(row)}{details(row)}", 4) + folded(row.says or row.title, 8, 0)
        lines.append("")
    return "\n".join(lines).rstrip()


# ---------------------------------------------------------------------------------------------------- figures


def theme() -> None:
    """How all figures look."""
    import seaborn as sns

    sns.set_theme(context="paper", style="whitegrid", palette="colorblind", font_scale=1.1)


def kind(row) -> str:
    """Which mark of the figure a row has."""
    part = ledger().parts[row.part]
    if row.source == PILOT:
        return PILOT
    if judge.is_predicted(part, row.label):
        return "held"
    return "against" if judge.is_contrary(part, row.label) else "open"


def figure(rows: pd.DataFrame, about: str = "") -> Figure | None:
    """Every measured difference with its 95 % interval, filled; the paper's own, hollow; the margin as a band.

    about: what was measured, in small print. None where nothing was measured.
    """
    import matplotlib.pyplot as plt

    shown = drawable(rows)
    if shown.empty:
        return None
    drawn, axes = plt.subplots(figsize=(8, 0.9 + 0.36 * len(shown)), layout="constrained")
    names = (f"{r.part}: {r.contrast}" if len(r.contrast) < 32 else r.part for r in shown.itertuples())
    draw(axes, shown, [f"{name}, n = {n:.0f}" for name, n in zip(names, shown["n"], strict=True)])
    legend(drawn, shown)
    small_print(drawn, about)
    return drawn


def drawable(rows: pd.DataFrame) -> pd.DataFrame:
    """What has a place on an axis of points."""
    return rows[rows["ours"].notna() & (rows["test"] != "ratio")]


def draw(axes: Axes, rows: pd.DataFrame, names: list[str]) -> None:
    """A row per part, from the top."""
    for y, row in enumerate(rows.itertuples()):
        axes.fill_betweenx([y - 0.4, y + 0.4], -row.margin, row.margin, color="0.5", alpha=0.18, linewidth=0)
        if not pd.isna(row.ours):
            bars, look = [[row.ours - row.low], [row.high - row.ours]], MARKS[kind(row)]
            axes.errorbar(row.ours, y, xerr=bars, fmt=look["marker"], color=look["color"], capsize=3)
        if not pd.isna(row.paper):
            axes.plot(row.paper, y, "o", markerfacecolor="none", markeredgecolor="0.4", markersize=9)
    axes.set_yticks(range(len(rows)), names, fontsize="small")
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel="difference of top-1, percentage points")
    axes.axvline(0, color="0.3", linewidth=0.8)


def small_print(drawn: Figure, about: str) -> None:
    """Data, seeds and device, at the lower right of a figure: they stay with it on a slide."""
    drawn.supxlabel(about, x=0.99, ha="right", fontsize="xx-small", color="0.4")


def legend(drawn: Figure, rows: pd.DataFrame) -> None:
    """The marks of these rows, the paper's and the margin, above the figure."""
    import matplotlib.pyplot as plt

    looks = [MARKS[name] for name in dict.fromkeys(map(kind, drawable(rows).itertuples()))]
    looks.append({"marker": "o", "color": "0.4", "markerfacecolor": "none", "label": "the paper, ImageNet"})
    marks = [plt.Line2D([], [], linestyle="none", **look) for look in looks]
    marks.append(plt.Rectangle((0, 0), 1, 1, color="0.5", alpha=0.18, label="margin"))
    drawn.legend(handles=marks, loc="outside upper center", ncols=min(len(marks), 4), fontsize="small", frameon=False)


def alt(rows: pd.DataFrame) -> str:
    """What the figure shows, in words."""
    said = (f"{row.part}: {measured(row)}, {row.label}." for row in drawable(rows).itertuples())
    return f"Differences with their 95 % intervals. {' '.join(said)}"


# ---------------------------------------------------------------------------------------------------- in a notebook


def picture(drawn: Figure, alt: str, dpi: int, width: int | None = None) -> Image:
    """A figure as a PNG with its text for those who do not see it; the figure is closed."""
    import matplotlib.pyplot as plt
    from IPython.display import Image

    png = io.BytesIO()
    drawn.savefig(png, format="png", dpi=dpi)
    plt.close(drawn)
    return Image(png.getvalue(), format="png", alt=alt, metadata={"alt": alt}, width=width)


def answer(name: str, study: str = "study") -> None:
    """Show the committed answer: the figure and the verdict."""
    from IPython.display import Markdown, display

    theme()
    rows = chosen(name, study)
    if (drawn := figure(rows, where(study))) is not None:
        display(picture(drawn, alt(rows), dpi=120, width=760))
    display(Markdown(f"{text(rows)}\n\n*{where(study)}*"))
