"""The committed reference: what was run at a profile, as files, a page and the README's claims table.

    outputs/reference/<profile>/  runs.jsonl  arms.csv  claims.toml  claims.csv  tuning.csv  tables/*.csv, *.md  figures/*.png
    outputs/reference/README.md   what held, what did not, what stays open and what it would take
    README.md                     the claims table, between two marks

`python -m tools.reference --profile study` copies what `reproduce` made of a profile; without a profile, page and table
are only written again. Both are written from the committed files alone, so that a test can hold them against these.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from lab import paths
from lab.claims import judge
from lab.claims.ledger import ledger
from lab.experiments.catalogue import NOTEBOOKS, available, experiments, notebook
from lab.experiments.profiles import Profile, profile
from lab.report.tables import span
from lab.runs import store
from vitlib.errors import UsageError
from vitlib.files import write_whole

PAGE = paths.REFERENCE / "README.md"
MARKS = ("<!-- claims: written by `python -m tools.reference` -->", "<!-- end of claims -->")


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
    """Copy what `reproduce` made of a profile into the committed reference. Raises UsageError where nothing was rendered."""
    made, kept = paths.outputs() / p.name, paths.REFERENCE / p.name
    if not (made / "claims.csv").is_file():
        raise UsageError(f"there is no {made / 'claims.csv'}: run `python -m lab reproduce --profile {p.name}` first")
    notebooks, absent = available(p, NOTEBOOKS)
    if absent:  # the names of its runs depend on the data
        raise absent[0]
    settings = experiments(p, notebooks)
    names = {member.hash for one in settings for spec in one.specs() for member in spec.family()}
    if not any((paths.runs() / name / "result.json").is_file() for name in names):
        raise UsageError(f"no run of profile {p.name} is in {paths.runs()}: nothing was written")
    store.export_runs(kept / "runs.jsonl", names)
    arms = [
        {"notebook": one.notebook.number, "arm": arm, "seed": seed, "run": result.hash}
        for one in settings for arm, results in one.finished().results.items()
        for seed, result in zip(p.seeds, results, strict=True)
    ]  # fmt: skip
    pd.DataFrame(arms, columns=["notebook", "arm", "seed", "run"]).to_csv(kept / "arms.csv", index=False)
    shutil.copyfile(paths.PAPER / "claims.toml", kept / "claims.toml")  # as it was when these runs were judged
    for file in ("claims.csv", "tuning.csv"):
        if (made / file).is_file():
            shutil.copyfile(made / file, kept / file)
    for folder, kinds in (("tables", (".csv", ".md")), ("figures", (".png",))):
        shutil.rmtree(kept / folder, ignore_errors=True)
        (kept / folder).mkdir(parents=True)
        for file in (made / folder).iterdir():
            if file.suffix in kinds:
                shutil.copyfile(file, kept / folder / file.name)
    return [kept]


def write_pages() -> list[Path]:
    """The page and README's table, from what is committed."""
    readme = paths.ROOT / "README.md"
    texts = {PAGE: page(), readme: with_block(readme.read_text(encoding="utf-8"), readme_block())}
    for path, text in texts.items():
        with write_whole(path) as draft:
            draft.write_text(text, encoding="utf-8")
    return list(texts)


def studies() -> list[str]:
    """The profiles that have a committed claims table, largest first."""
    return [name for name in ("imagenet", "gpu", "study", "pilot") if (paths.REFERENCE / name / "claims.csv").is_file()]


def table(study: str) -> pd.DataFrame:
    """The claims table of a profile, or of the pilot."""
    return pd.read_csv(paths.REFERENCE / study / "claims.csv", dtype={"notebook": str}, keep_default_na=True)


def with_block(text: str, block: str) -> str:
    """`text` with `block` between the two marks. Raises UsageError where they are not there."""
    first, last = (text.find(mark) for mark in MARKS)
    if first < 0 or last < first:
        raise UsageError(f"README.md lacks the marks {MARKS[0]} and {MARKS[1]}")
    return f"{text[: first + len(MARKS[0])]}\n\n{block}\n{text[last:]}"


# ---------------------------------------------------------------------------------------------------- the README's table


def readme_block() -> str:
    """One row a claim: what the paper says, what each part measured, and the stance of the claim."""
    parts = []
    for study in studies():
        rows = table(study)
        lines = [_claim_row(claim, rows[rows["claim"] == claim], study) for claim in dict.fromkeys(rows["claim"])]
        frame = pd.DataFrame(lines)
        parts.append(
            f"{_capital(_named(study))}, {_about(study)}.\n\n{frame.to_markdown(index=False, disable_numparse=True)}\n"
        )
    return "\n".join(parts)


def _claim_row(claim: str, rows: pd.DataFrame, study: str) -> dict[str, str]:
    stance = judge.stance_of(dict(zip(rows["part"], rows["stance"], strict=True))).partition(" (")[0]
    words = "; ".join(
        dict.fromkeys(f"{row.part}: {said(row)}" if len(rows) > 1 else said(row) for row in rows.itertuples())
    )
    file = notebook(rows["notebook"].iloc[0]).file
    first = rows["title"].iloc[0].rstrip(".")
    return {"claim": claim, "the paper says": first, "measured": words, "the claim": stance,
            "notebook": f"[{file[:2]}](notebooks/{file}.ipynb)"}  # fmt: skip


def said(row) -> str:
    """A part in a few words: the verdict, and the difference with its interval where one was measured."""
    if pd.isna(row.ours):
        return str(row.verdict)
    verdict = f"{row.verdict.removesuffix(' m')} {row.margin:g}" if row.verdict.endswith(" m") else row.verdict
    ratio = ledger()[row.part].kind == "ratio"
    sign, unit = ("", "") if ratio else ("+", " points")
    return f"{verdict}, {row.ours:{sign}.2f} [{row.low:{sign}.2f}, {row.high:{sign}.2f}]{unit}"


def _named(study: str) -> str:
    return "the pilot (the first study, profile `study`)" if study == "pilot" else f"profile `{study}`"


def _about(study: str) -> str:
    """What the numbers were measured on: n, devices, dates, number of runs, from runs.jsonl."""
    path = paths.REFERENCE / study / "runs.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    records, seeds = [line["result"] for line in lines], len({line["spec"]["seed"] for line in lines})
    devices = " and ".join(sorted({r["device"] for r in records}))
    kind, spent = ("GPU", "wall_s") if any("gpu_mem_mb" in r for r in records) else ("CPU", "cpu_s")
    hours = sum(r[spent] for r in records) / 3600
    when = span(r["date"] for r in records)
    return f"{len(records)} runs, {hours:.1f} {kind} hours, n = {seeds} seeds a verdict, {devices}, {when}"


# ---------------------------------------------------------------------------------------------------- the page

HEAD = """# What was measured, and what it says

Written by `python -m tools.reference` from the claims table of each profile; no sentence here is typed by hand. Every number is a
difference of top-1 in points with its 95 % interval over seeds and test images (a slope's over seeds), or a ratio; the words are those of
"How to read a verdict" in the project's README. A small scale is no reproduction of the paper.
"""


def page() -> str:
    parts = [HEAD]
    for study in studies():
        rows = table(study)
        count = rows["verdict"].nunique()
        parts.append(
            f"\n## {_capital(_named(study))}\n\n{_capital(_about(study))}. {len(rows)} parts of claims, "
            f"{count} different verdicts. Files: [claims]({study}/claims.csv), [runs]({study}/runs.jsonl), "
            f"[tables]({study}/tables), [figures]({study}/figures).\n"
        )
        for title, chosen, line in SECTIONS:
            mine = rows[[chosen(row) for row in rows.itertuples()]]
            body = "\n".join(line(row) for row in mine.itertuples()) or "Nothing."
            parts.append(f"\n### {title} ({len(mine)})\n\n{body}\n")
        parts.append(_best_rates(study))
    return "".join(parts)


def _best_rates(study: str) -> str:
    """The contrasts of the tuning runs at the verdicts' rates and at each arm's best, where a profile was tuned."""
    file = paths.REFERENCE / study / "best_rates.csv"
    if not file.is_file():
        return ""
    rows, edge = pd.read_csv(file), _at_an_end(study)
    tuned = [[entry.rpartition(": ")[0] for entry in best.split(", ")] for best in rows["best_rates"]]
    rows["at an end of the rates tried"] = [
        ", ".join(f"{arm} ({edge[arm]})" for arm in arms if arm in edge) for arms in tuned
    ]
    points = {"at_the_common_rate": "at the verdict's rates", "at_each_best": "each arm at its best"}
    shown = rows.assign(**{key: rows[key].map("{:+.2f}".format) for key in points})
    shown = shown.rename(columns=points | {"best_rates": "best rates"}).drop(columns="n")
    judged = table(study)
    estimated = judged[judged["ours"].notna() & (judged["test"] != "ratio")]["part"]
    untuned = [part for part in estimated if part not in set(rows["part"])]
    return (
        f"\n### Whether it is the learning rate's ({len(rows)} of {len(estimated)})\n\nVerdicts compare arms at the rate that is "
        f"best for their group; in Tables 5 and 6 each strategy has its own. The same contrasts on validation images, at "
        f"those rates and with every arm at its own best of three, in points (mean of {rows['n'].iloc[0]} tuning seeds, no "
        f"interval; [all rates]({study}/tuning.csv)). Where an arm was best at the lowest or highest rate tried, a rate "
        f"beyond may be better still, and the contrast another. Not here, because an arm took its group's rate untuned: "
        f"{', '.join(untuned) or 'none'}.\n\n"
        f"{shown.to_markdown(index=False, disable_numparse=True)}\n"
    )


def _at_an_end(study: str) -> dict[str, str]:
    """Arm -> "lowest" or "highest", where the best of the rates that it was tried at is the first or the last of them."""
    tried = pd.read_csv(paths.REFERENCE / study / "tuning.csv").sort_values("lr")
    ends = {}
    for arm, rows in tried.groupby("arm", sort=False):
        best = rows.loc[rows["top1_validation"].idxmax(), "lr"]  # of equals the lowest, as in tuning
        if best in (rows["lr"].min(), rows["lr"].max()):
            ends[arm] = "lowest" if best == rows["lr"].min() else "highest"
    return ends


def _line(row) -> str:
    of = f" The paper: {row.paper:+.2f}." if not pd.isna(row.paper) and row.test != "ratio" else ""
    note = f" ({row.note})" if isinstance(row.note, str) and row.note else ""
    n = "" if pd.isna(row.n) else f", n = {row.n:.0f}"
    return f"- **{row.part}** {row.title} {_capital(said(row))}{n}{note}.{of}"


def _open_line(row) -> str:
    needed = row.seeds_needed
    takes = "" if pd.isna(needed) else f" To see the paper's difference: {_seeds(needed)}."
    visible = (
        ""
        if pd.isna(row.smallest_visible)
        else f" The smallest difference that this run could have seen: {row.smallest_visible:.2f}."
    )
    return f"{_line(row)}{visible}{takes}"


def _seeds(needed: object) -> str:
    try:
        return f"{float(needed):,.0f} seeds"
    except ValueError:
        return str(needed)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _not_run(row) -> bool:
    return row.verdict == judge.NOT_RUN


SECTIONS: tuple[tuple[str, Callable, Callable], ...] = (
    ("What held", lambda row: row.stance == "supports", _line),
    ("What did not", lambda row: row.stance == "contradicts", _line),
    (
        "What stays open, and what it would take",
        lambda row: row.stance == "open" and not _not_run(row),
        _open_line,
    ),
    ("Not run", _not_run, lambda row: f"- **{row.part}** {row.title}{_why(row)}"),
)


def _why(row) -> str:
    note = row.note if isinstance(row.note, str) and row.note else ""
    scope = ledger()[row.part].scope if row.part in ledger() else ""
    needs = {"gpu": "needs a GPU", "imagenet": "needs ImageNet"}.get(scope, "")
    return f" ({needs or note})" if needs or note else ""


if __name__ == "__main__":
    sys.exit(main())
