"""The committed reference: what was run at a profile, as files, a page and the README's claims table.

    outputs/reference/<profile>/  runs.jsonl  arms.csv  claims.toml  recipes.toml  claims.csv  margins.csv  tuning.csv
                                  accuracies.csv  about.txt  tables/*.csv, *.md  figures/*.png
    outputs/reference/README.md   what held, what did not, what stays open and what it would take; the pilot beside it
    README.md                     the claims table, between two marks

`python -m tools.reference --profile study` copies what the store and `reproduce` have of a profile; without a profile, page and
table are only written again. Both are written from the committed files alone, so that a test can hold them against these.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from lab import paths
from lab.claims import judge
from lab.claims.ledger import LEDGER, PILOT, RECIPES, ledger
from lab.experiments.catalogue import NOTEBOOKS, available, experiment, experiments, meant_for, notebook
from lab.experiments.profiles import Profile, profile
from lab.report import answer, tables
from lab.runs import store
from lab.runs.results import Result
from vitlib.errors import UsageError
from vitlib.files import write_whole

PAGE = paths.REFERENCE / "README.md"
MARKS = ("<!-- claims: written by `python -m tools.reference` -->", "<!-- end of claims -->")
ANSWERS = ("<!-- answers: written by `python -m tools.reference` -->", "<!-- end of answers -->")
THINGS = (  # what the paper says, its primary parts, the notebooks
    ("parallel blocks", "18 layers of 2 branches are as accurate as 36 layers, at the same cost", ("A1",), ("31", "61")),
    ("attention-only tuning", "attention alone adapts a ViT as well as all its weights, and cheaper", ("F1", "F2-full"), ("41", "42")),
    ("hMLP stem", "a stem that keeps patches apart helps masked pre-training", ("H4-linear", "H8-retention"), ("51", "52")),
)  # fmt: skip


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.reference", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", help="copy this profile's results first, e.g. study")
    chosen = parser.parse_args(words).profile
    try:
        written = [*(copy(profile(chosen)) if chosen else ()), *write_pages()]
    except UsageError as fault:
        parser.error(str(fault))
    print("\n".join(f"written: {path}" for path in written))
    return 0


def copy(p: Profile) -> list[Path]:
    """Copy what is finished of a profile into the committed reference. Raises UsageError where its data is not here."""
    made, kept = paths.outputs() / p.name, paths.REFERENCE / p.name
    notebooks, absent = available(p, meant_for(p, NOTEBOOKS))
    if absent:  # the names of its runs depend on the data
        raise absent[0]
    kept.mkdir(parents=True, exist_ok=True)
    settings = experiments(p, notebooks)
    finished: dict[str, Result] = {}
    data: dict[str, None] = {}  # the names, in order
    arms, accuracies = [], []
    for one in settings:
        for label in one.arms:
            specs = one.seeds_of(label)
            results = [store.find(spec) for spec in specs]
            done = results[: results.index(None)] if None in results else results
            for spec, result in zip(specs, done, strict=False):
                arms.append({"notebook": one.notebook.number, "arm": label, "seed": spec.seed, "run": result.hash})
                data[spec.data] = None
                finished |= {r.hash: r for member in spec.family() if (r := store.find(member)) is not None}
            if done and len(done) == len(specs):
                row = {"notebook": one.notebook.number, "arm": label, **tables.summary(done)}
                accuracies.append(row)
    if finished:
        store.export_runs(kept / "runs.jsonl", finished)
        pd.DataFrame(arms).to_csv(kept / "arms.csv", index=False)
    pd.DataFrame(accuracies, columns=["notebook", "arm", "mean", "sd", "n"]).to_csv(
        kept / "accuracies.csv", index=False
    )
    (kept / "about.txt").write_text(about([*finished.values()], data) + "\n", encoding="utf-8")
    for file in (LEDGER, RECIPES):  # as they were when these runs were judged
        shutil.copyfile(paths.PAPER / file, kept / file)
    write_afterwards(p, kept)
    tables.save_claims(p.name, tables.judged(p))
    for file in ("claims.csv", "margins.csv", "tuning.csv", "control.csv"):
        if (made / file).is_file():
            shutil.copyfile(made / file, kept / file)
    if (made / "tuning.csv").is_file():
        rates_figure(pd.read_csv(made / "tuning.csv")).savefig(
            kept / "tuning.png", dpi=150, metadata={"Software": None}
        )
    for folder, kinds in (("tables", (".csv", ".md")), ("figures", (".png",))):
        if (made / folder).is_dir():
            shutil.rmtree(kept / folder, ignore_errors=True)
            (kept / folder).mkdir(parents=True)
            for file in (made / folder).iterdir():
                if file.suffix in kinds:
                    shutil.copyfile(file, kept / folder / file.name)
    return [kept]


# Arms that were added after a verdict: part -> notebook, the arm and what it is compared with, why
AFTERWARDS = {
    "A1": (
        "31", "6x2+LS, rate of 12x1+LS", "12x1+LS",
        "Afterwards, deciding nothing: two rates of two branches were level in tuning, and the rule takes the lower, half that of "
        "one branch. At one rate for both the difference is",
    ),
}  # fmt: skip


def write_afterwards(p: Profile, kept: Path) -> None:
    """What was looked at after a verdict, a sentence per part, where all of its runs are finished."""
    rows = []
    for part, (number, arm, reference, why) in AFTERWARDS.items():
        runs = experiment(notebook(number), p).finished()
        if found := tables.gap(runs, arm, reference):
            n, points = len(runs.results[arm]), "{points:+.2f} [{low:+.2f}, {high:+.2f}] points".format(**found)
            rows.append({"part": part, "says": f"{why} {points}, n = {n}."})
    if rows:
        pd.DataFrame(rows).to_csv(kept / "afterwards.csv", index=False)


def about(results: list[Result], data: Iterable[str]) -> str:
    """What the numbers were measured on: runs, data, hours, devices, dates."""
    if not results:
        return "The second study is under way; until it is complete, the estimates of the first one stand here."
    devices = " and ".join(sorted({r.about["device"] for r in results}))
    kind, spent = ("GPU", "wall_s") if any("gpu_mem_mb" in r.about for r in results) else ("CPU", "cpu_s")
    hours = sum(r.about[spent] for r in results) / 3600
    when = tables.span(r.about["date"] for r in results)
    return f"{len(results)} runs on {' and '.join(data)}, {hours:.1f} {kind} hours, {devices}, {when}; 95 % intervals over seeds and test images."


def write_pages() -> list[Path]:
    """The page and README's table, from what is committed."""
    readme = paths.ROOT / "README.md"
    text = with_block(readme.read_text(encoding="utf-8"), readme_block())
    texts = {PAGE: page(), readme: with_block(text, answers_block(), ANSWERS)}
    for path, text in texts.items():
        with write_whole(path) as draft:
            draft.write_text(text, encoding="utf-8")
    picture = paths.REFERENCE / "three.png"
    three().savefig(picture, dpi=120, metadata={"Software": None})
    return [*texts, picture]


def with_block(text: str, block: str, marks: tuple[str, str] = MARKS) -> str:
    """`text` with `block` between the two marks. Raises UsageError where they are not there."""
    first, last = (text.find(mark) for mark in marks)
    if first < 0 or last < first:
        raise UsageError(f"README.md lacks the marks {marks[0]} and {marks[1]}")
    return f"{text[: first + len(marks[0])]}\n\n{block}\n{text[last:]}"


def answers_block() -> str:
    """One row per thing: what the paper says, what its primary parts measured, whether it holds here."""
    table, lines = answer.claims().set_index("part", drop=False), []
    for thing, says, parts, notebooks in THINGS:
        rows = [row for row in table.loc[[*parts]].itertuples()]
        measured = [
            f"{r.part}: {answer.measured(r).partition(';')[0] or 'not run'}{' (pilot)' * (r.source == PILOT)}"
            for r in rows
        ]
        words = [f"{claim}: {word}" for claim, word in dict((r.claim, r.claim_verdict) for r in rows).items()]
        links = [f"[{number}](notebooks/{notebook(number).file}.ipynb)" for number in notebooks]
        lines.append({"thing": thing, "the paper says": says, "we measured": "<br>".join(measured),
                      "holds here?": "<br>".join(words), "notebooks": " ".join(links)})  # fmt: skip
    later = [f"{row.part}: {row.afterwards}\n" for row in table.itertuples() if row.afterwards]
    return "\n".join([f"{rows_of(lines)}\n", *later])


def rows_of(lines: list[dict[str, str]]) -> str:
    """A Markdown table without padding."""
    header = list(lines[0])
    table = [header, ["---"] * len(header), *([str(line[key]) for key in header] for line in lines)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in table)


def readme_block() -> str:
    """One short row per claim: id, claim, verdict, notebook."""
    lines = []
    for row in answer.claim_verdicts(answer.claims()).itertuples():
        file = notebook(row.notebook).file
        link = f"[{file[:2]}](notebooks/{file}.ipynb)"
        lines.append({"": row.claim, "claim": row.claim_title, "verdict": row.claim_verdict, "notebook": link})
    return f"{answer.where('study')}\n\n{rows_of(lines)}\n"


# ---------------------------------------------------------------------------------------------------- the page

HEAD = """# What was measured, and what it says

Written by `python -m tools.reference` from the committed tables; no sentence here is typed by hand. Every number is a difference
of top-1 in percentage points with its 95 % interval over seeds and test images, or a ratio of times. How a claim is judged:
[docs/judging.md](../../docs/judging.md). A small scale is no reproduction of the paper.
"""
# What is otherwise in the second study, by thing; claims.md of the first study's audit is told in docs/judging.md.
REASONS = {
    "3": "margin 1.5 before; n; each arm has its own learning rate, with a worse one on each side",
    "4": "margin 1.5 before; n; learning rates reach beyond the best of every strategy",
    "5": "another stem before, narrower than the paper's; 32 pixels, 8 epochs and all labels now",
    "2": "not run in either",
}


def page() -> str:
    parts = [HEAD]
    for study in answer.studies():
        rows = answer.claims(study)
        parts.append(f"\n## Profile `{study}`\n\n{answer.where(study)} Files: {_files(study)}.\n")
        for title, chosen in SECTIONS.items():
            mine = rows[[chosen(row) for row in rows.itertuples()]]
            if len(mine):
                body = "\n".join(f"- {answer.line(row)}{_needed(row)}" for row in mine.itertuples())
                parts.append(f"\n### {title} ({len(mine)})\n\n{body}\n")
    parts.append(f"\n## The pilot beside the second study\n\n{PILOT_WORDS}\n\n{beside()}\n")
    return "".join(parts)


PILOT_WORDS = (
    "The first study is the pilot: its numbers are right (each was recomputed by other code; `python -m tools.pilot` does it "
    "again), its rules were not good enough. Its verdicts stand here as they were, with the same estimate under today's "
    "rules, and what is otherwise now. Everything of it is in [pilot](pilot)."
)


def _files(study: str) -> str:
    folder = paths.REFERENCE / study
    names = ("claims.csv", "margins.csv", "runs.jsonl", "tuning.csv", "tuning.png", "tables", "figures")
    return ", ".join(f"[{name}]({study}/{name})" for name in names if (folder / name).exists())


def beside() -> str:
    """Part by part: the pilot's verdict, its estimate, today's label, and why they may differ."""
    pilot = pd.read_csv(paths.REFERENCE / PILOT / "claims.csv", dtype={"notebook": str}).set_index("part")
    now, lines = answer.claims().set_index("part"), []
    for part, row in pilot[pilot["ours"].notna()].iterrows():
        there = now.loc[part] if part in now.index else None
        label = "no part of its own any more" if there is None else there.label
        if there is not None and there.source == PILOT:
            label = f"{label} (the pilot's estimate)"
        lines.append({
            "part": part, "pilot": row.verdict.replace(" m", f" {row.margin:g}") if row.margin == row.margin else row.verdict,
            "its estimate": f"{row.ours:.2f} [{row.low:.2f}, {row.high:.2f}], n = {row.n:.0f}",
            "now": label, "estimate now": "" if there is None or there.source == PILOT else answer.measured(there),
            "what is otherwise": REASONS[row.notebook[0]] if row.test != "ratio" else "timed again",
        })  # fmt: skip
    return rows_of(lines)


def _needed(row) -> str:
    """What an undecided part would take."""
    if row.label != judge.UNDECIDED or pd.isna(row.smallest_visible):
        return ""
    visible = f" The smallest difference that these runs could have seen is {row.smallest_visible:.2f}."
    needed = row.seeds_needed
    if pd.isna(needed):
        return visible
    try:
        return f"{visible} The paper's would take {float(needed):,.0f} seeds."
    except ValueError:
        return f"{visible} The paper's is {needed}."


def _is(test: Callable) -> Callable:
    """A section of measured parts of the second study."""
    return lambda row: not pd.isna(row.ours) and row.source != PILOT and test(ledger().parts[row.part], row.label)


SECTIONS: dict[str, Callable] = {
    "Measured, as the paper says": _is(judge.is_predicted),
    "Measured, against the paper": _is(judge.is_contrary),
    "Measured, undecided": _is(
        lambda part, word: not (judge.is_predicted(part, word) or judge.is_contrary(part, word))
    ),
    "Counted, not measured": lambda row: row.test == "exact",
    "From the pilot, deciding nothing": lambda row: row.source == PILOT,
    "Not run": lambda row: row.label == judge.NOT_RUN,
}


# ---------------------------------------------------------------------------------------------------- pictures

PANELS = {  # the panels of the picture in README, their parts and how these are called there
    "1. parallel blocks": {
        "A1": "two branches - one, 12 pairs", "P5": "two branches - one, 36 pairs", "P2-1": "the same, no LayerScale",
    },
    "2. attention-only fine-tuning": {
        "F1": "attention - everything", "F2-full": "everything - FFNs", "F5-digits": "attention - everything,\nfew images",
    },
    "3. hMLP stem": {
        "H3-linear": "hMLP - linear, supervised", "H4-linear": "hMLP - linear, masked",
        "H8-retention": "hMLP - conv, masked\nminus supervised",
    },
}  # fmt: skip


def three() -> Figure:
    """One panel per thing: the paper's differences, and ours where they are measured."""
    table = answer.claims().set_index("part", drop=False)
    drawn, panels = plt.subplots(1, 3, figsize=(10, 2.6), layout="constrained")
    for panel, (title, parts) in zip(panels, PANELS.items(), strict=True):
        answer.draw(panel, table.loc[[*parts]], names=[*parts.values()])
        panel.set(title=title, xlabel="points of top-1")
    answer.legend(drawn, table.loc[[part for parts in PANELS.values() for part in parts]])
    answer.small_print(drawn, answer.where("study"))
    return drawn


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


if __name__ == "__main__":
    sys.exit(main())
