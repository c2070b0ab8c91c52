"""Tables of runs and of verdicts: frames of numbers, and the one place that prints them.

A function gives a frame whose columns are numbers (mean, sd, n, low, high, ...) and, in `frame.attrs["layout"]`, how they
are printed: column header -> a format over the frame's columns, or several, of which the first without a gap counts.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lab import paths
from lab.claims import evidence, judge, tuning
from lab.claims.judge import Verdict, verdict_table
from lab.data.cards import title_of
from lab.experiments.catalogue import Runs, notebook
from lab.experiments.profiles import Profile
from lab.report import answer
from lab.runs import store
from lab.runs.results import Result
from lab.runs.spec import RunSpec
from vitlib.files import write_whole
from vitlib.stats import difference, interval
from vitlib.train.finetune import PAPER_STRATEGIES

Layout = dict[str, str | tuple[str, ...]]
NOT_RUN, MISSING = "not run", "–"
COLUMN = re.compile(r"{([^{}:]+)")  # the columns that a format names; widths and digits may be columns too


# ---------------------------------------------------------------------------------------------------- form


def columns(names: str = "", **specs: str) -> Layout:
    """The layout of columns under their own names: as they are, or by a format specification each."""
    plain = {name: f"{{{name}}}" for name in names.split()}
    return plain | {name: f"{{{name}:{spec}}}" for name, spec in specs.items()}


def spread(prefix: str = "", before: str = "") -> tuple[str, str]:
    """The format of what `summary` gives: "84.19 ± 0.47 (n=5)", with one seed "84.19 (n=1)"."""
    mean, n = f"{before}{{{prefix}mean:.2f}}", f"(n={{{prefix}n}})"
    return f"{mean} ± {{{prefix}sd:.2f}} {n}", f"{mean} {n}"


def bounds(prefix: str = "") -> tuple[str, str]:
    """The format of what `gap` gives: "-0.31 [-1.20, +0.58]", with one seed "-0.31"."""
    points, low, high = (f"{{{prefix}{name}:+.2f}}" for name in ("points", "low", "high"))
    return f"{points} [{low}, {high}]", points


def framed(rows: Iterable | pd.DataFrame, layout: Layout, always: Collection[str] | None = None) -> pd.DataFrame:
    """A frame with its layout; headers not in `always` (None: all are) go where no row has anything to print."""
    frame = pd.DataFrame(rows)
    if always is not None:
        texts = printed(frame, layout)
        layout = {h: form for h, form in layout.items() if h in always or (texts[h] != MISSING).any()}
    frame.attrs["layout"] = layout
    return frame


def printed(frame: pd.DataFrame, layout: Layout | None = None) -> pd.DataFrame:
    """The same rows as texts, a column per header of the layout (None: the frame's own); a missing number is a dash."""

    def text(row: dict, formats: str | tuple[str, ...]) -> str:
        for form in (formats,) if isinstance(formats, str) else formats:
            if not any(pd.isna(row.get(column)) for column in COLUMN.findall(form)):
                return form.format_map(row)
        return MISSING

    layout, rows = frame.attrs["layout"] if layout is None else layout, frame.to_dict("records")
    # a count in a column with gaps is a float
    rows = [{c: int(v) if isinstance(v, float) and v.is_integer() else v for c, v in row.items()} for row in rows]
    return pd.DataFrame([{h: text(row, form) for h, form in layout.items()} for row in rows], columns=list(layout))


def markdown(frame: pd.DataFrame) -> str:
    """The printed frame as a Markdown table."""
    return printed(frame).to_markdown(index=False, disable_numparse=True)


def save(frame: pd.DataFrame, path: Path) -> None:
    """The numbers as CSV."""
    with write_whole(path) as draft:
        frame.to_csv(draft, index=False)


# ---------------------------------------------------------------------------------------------------- runs


def summary(results: Sequence[Result], metric: str = "top1", prefix: str = "") -> dict[str, float]:
    """`spread_of` a metric over seeds; empty without results."""
    values = [r.metrics[metric] for r in results if metric in r.metrics]
    return spread_of(values, prefix) if values else {}


def spread_of(values: Sequence[float] | np.ndarray, prefix: str = "") -> dict[str, float]:
    """Mean, sample standard deviation (NaN of one value) and number, as the columns that `spread` prints."""
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else np.nan
    return {f"{prefix}mean": float(np.mean(values)), f"{prefix}sd": sd, f"{prefix}n": len(values)}


def gap(runs: Runs, a: str, b: str, prefix: str = "") -> dict[str, float]:
    """a - b in points, with its 95 % interval over seeds and images where there are two seeds; empty where one was not run."""
    if not {a, b} <= runs.results.keys() or a == b:
        return {}
    n = min(len(runs.results[arm]) for arm in (a, b))  # an arm may have fewer seeds, the first ones
    return gap_of(*(np.stack([r.correct for r in runs.results[arm][:n]]) for arm in (a, b)), prefix)


def gap_of(a: np.ndarray, b: np.ndarray, prefix: str = "") -> dict[str, float]:
    """The same from which images were right: (seeds, images) each."""
    if len(a) < 2:
        return {f"{prefix}points": 100 * float(a.mean() - b.mean())}
    estimate = interval(difference({"a": a, "b": b}, {"a": 1.0, "b": -1.0}))
    return {f"{prefix}points": estimate.mean, f"{prefix}low": estimate.low, f"{prefix}high": estimate.high}


def seeded(runs: Runs, layout: Layout) -> Layout:
    """A layout of differences, which a table has where there are two seeds."""
    return layout if len(runs.experiment.profile.seeds) > 1 else {}


BESIDE = {"top1_v2": "top1, ImageNet-V2", "top1_ema": "top1, averaged weights (EMA)"}  # where a run has them


def accuracies(runs: Runs, committed: Runs, reference: str, paper: Mapping[str, Mapping]) -> pd.DataFrame:
    """One row per arm: the paper | the committed reference | this run, with its difference to the reference arm in points."""
    rows = []
    for arm in runs.experiment.arms or committed.results:
        results = runs.results.get(arm, ())
        row = {"arm": arm, **paper.get(arm, {})} | summary(committed.results.get(arm, ()), prefix="committed ")
        row |= summary(results) | gap(runs, arm, reference)
        for metric in BESIDE:
            row |= summary(results, metric, f"{metric} ")
        for metric in ("first_loss", "train_loss", "trained_params"):
            row[metric] = summary(results, metric).get("mean", np.nan)
        rows.append(row)
    always = columns("arm") | {
        "paper (ImageNet)": "{paper:.{digits}f}{chart}", "committed reference": (*spread("committed "), NOT_RUN),
        f"top1, this run ({runs.experiment.profile.name})": (*spread(), NOT_RUN),
    }  # fmt: skip
    more = seeded(runs, {f"minus {reference}, points": bounds()}) | {BESIDE[m]: spread(f"{m} ") for m in BESIDE}
    return framed(rows, always | more | columns(first_loss=".5f", train_loss=".3f", trained_params=",.0f"), always)


def sequential(runs: Runs, width: int, layer_scale: bool = False) -> str:
    """The first arm of one branch, with LayerScale or without, of this width where there is one; "" without runs."""
    models = {label: runs.record(label)["model"] for label in runs.results}
    ones = [a for a, m in models.items() if m["branches"] == 1 and (m["layer_scale"] is not None) == layer_scale]
    return next((arm for arm in ones if models[arm]["width"] == width), ones[0] if ones else "")


def gaps(runs: Runs, committed: Runs, size: str) -> pd.DataFrame:
    """Two branches minus one in points with its 95 % interval, a row per `size` ("width" or "pairs"), without LayerScale.

    At a profile without runs: the committed reference, or what is not run.
    """
    here = bool(runs.results or not committed.results)
    shown, measured = (runs, f"here ({runs.experiment.profile.name})") if here else (committed, "committed reference")
    models = {label: shown.record(label)["model"] for label in shown.results}
    models = {label: model for label, model in models.items() if model["layer_scale"] is None}
    if size == "pairs":  # of one width
        own = shown.experiment.profile.width
        models = {label: model for label, model in models.items() if model["width"] == own} or models
    labels = {
        (m["depth"] * m["branches"] if size == "pairs" else m["width"], m["branches"]): label
        for label, m in models.items()
    }
    rows = [
        {size: value, "one": one, "two": two, "n": len(shown.results[one]), "measured": measured} | gap(shown, two, one)
        for (value, branches), one in sorted(labels.items())
        if branches == 1 and (two := labels.get((value, 2)))
    ]
    points = {"points": ("{points:+.2f}", NOT_RUN), "low, points": "{low:+.2f}", "high, points": "{high:+.2f}"}
    return framed(rows, columns(size) | {"contrast": "{two} - {one}"} | points | columns("n measured"))


# ---------------------------------------------------------------------------------------------------- Tables 6 and 7


def transfer(runs: Runs, committed: Runs) -> pd.DataFrame:
    """Table 6's form: top-1 of each strategy by data set, images and width; the committed reference first, then this run.

    A seed's accuracy is the mean over its subsets of the labels.
    """
    rows = []
    for measured, these in (("committed reference", committed), (f"this run ({runs.experiment.profile.name})", runs)):
        found: dict[tuple, dict[str, list[np.ndarray]]] = {}
        for label, results in these.results.items():
            r = these.record(label)
            by_strategy = found.setdefault((r["data"], r["images"], r["model"]["width"]), {})
            subsets = by_strategy.setdefault(r["strategy"] if r["parent"] or r.get("weights") else "scratch", [])
            subsets.append(np.stack([result.correct for result in results]).astype(float))
        for (data, images, width), by_strategy in found.items():
            row = {"measured": measured, "data": data, "images": images, "width": width}
            mean = {strategy: np.mean(subsets, axis=0) for strategy, subsets in by_strategy.items()}  # (seeds, images)
            for strategy, correct in mean.items():
                row |= spread_of(100 * correct.mean(axis=1), f"{strategy} ")
            if {"attn", "full"} <= mean.keys() and len(mean["attn"]) > 1:
                row |= gap_of(mean["attn"], mean["full"])
            rows.append(row)
        rows += [] if found else [{"measured": f"{measured}: {NOT_RUN}"}]
    layout = columns("measured") | {"data set": "{data}"} | columns("width", images=",")
    layout |= {f"top1, {s}": spread(f"{s} ") for s in (*PAPER_STRATEGIES, "scratch")}
    return framed(rows, layout | {"attn - full, points": bounds()}, always=("measured",))


TRAININGS = ("supervised", "pretrained")


def table7(runs: Runs, committed: Runs, paper: Mapping[str, Mapping]) -> pd.DataFrame:
    """Table 7's form: a row per stem, accuracies and differences to the linear stem with the same training.

    Where a stem was not run here: the committed reference, so labelled, if there is one.
    """
    arms = committed.experiment.arms | runs.experiment.arms
    labels, layout = {(arm.row, arm.column): label for label, arm in arms.items()}, columns("stem")
    rows = {stem: {"stem": stem} for stem, _ in labels}
    for training in TRAININGS:
        for stem, row in rows.items():
            arm, linear = (labels.get((name, training), "") for name in (stem, "linear"))
            row |= {f"{training} {key}": value for key, value in paper.get(arm, {}).items()}
            row |= summary(runs.results.get(arm, ()), prefix=f"{training} ") | gap(runs, arm, linear, f"{training} ")
            row |= summary(committed.results.get(arm, ()), prefix=f"{training} committed ")
        if any(f"{training} paper" in row for row in rows.values()):
            layout[f"top1 {training}, paper"] = f"{{{training} paper:.{{{training} digits}}f}}"
        layout[f"top1 {training}"] = spread(f"{training} ") + spread(f"{training} committed ", "committed: ")
        layout |= seeded(runs, {f"{training} minus linear, points": bounds(f"{training} ")})
    return framed(rows.values(), layout)


def codebook_use(runs: Mapping[RunSpec, Result]) -> pd.DataFrame:
    """One row per finished tokenizer: how well it reconstructs held-out images, and how much of its codebook is in use."""
    rows, sizes = [], dict.fromkeys(str(size) for size in sorted({spec.model.vocabulary for spec in runs}))
    for spec, result in runs.items():
        m = result.metrics
        more = {"used": m["tokens_used"] * spec.model.vocabulary, "grey": 255 * m["recon_mse"] ** 0.5}
        rows.append({"tokenizer": spec.model.name, "seed": spec.seed, **m, **more})
    layout = columns("tokenizer seed") | {f"tokens used, of {' or '.join(sizes)}": "{used:.0f}"}
    layout |= {"perplexity": "{perplexity:.1f}", "error, of 255 grey levels": "{grey:.1f}"}
    return framed(rows, layout | columns(first_loss=".5f", train_loss=".3f"))


# ---------------------------------------------------------------------------------------------------- verdicts


def judged(p: Profile, number: str = "") -> list[Verdict]:
    """The verdicts on all parts of the ledger, from what is finished; with a notebook's number without the counts of others."""
    return evidence.verdicts(evidence.Stored(p), evidence.reference(), number)


def verdicts(chosen: Sequence[Verdict]) -> pd.DataFrame:
    """The claims table as it is printed in a notebook; columns without a number are left out."""
    table, texts = verdict_table(chosen), ["contrast", "note", "contains_paper", "power"]
    table[texts] = table[texts].replace("", None)
    table["contrast"] = table["contrast"].fillna("counted")
    ratio = table["test"] == "ratio"
    table["sign"] = np.where(ratio, "", "+")
    table.loc[ratio, ["paired_low", "paired_high", "tightest"]] = np.nan
    for p in ("p", "p_holm"):
        table[f"small {p}"] = np.where(table[p] < 0.001, 0.001, np.nan)
    layout = columns("part contrast n") | {
        "ours, points (ratio for F3)": "{ours:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]",
        "paper, at its scale": "{paper:{sign}.2f}", "our interval contains it": "{contains_paper}", "**label**": "{label}",
        "margin": "{margin:.1f}", "tightest margin": "{tightest:.2f}", "p": ("< {small p}", "{p:.3f}"),
        "p (Holm)": ("< {small p_holm}", "{p_holm:.3f}"), **columns("note"),
        "times the paper's": "{times_paper:.1f}", "power for the paper's": "{power}",
        "paired t over seeds": "[{paired_low:+.2f}, {paired_high:+.2f}]", "smallest visible": "{smallest_visible:.2f}",
        "seeds for the paper's difference": "{seeds_needed}",
    }  # fmt: skip
    return framed(table, layout, always=())


def margins(chosen: Sequence[Verdict]) -> pd.DataFrame:
    """Each measured part at several margins, before Holm's correction."""
    table = judge.moved(chosen)
    names = {header: header.replace(".", "_") for header in table.columns[3:]}  # a format's names have no dots
    layout = columns("part", margin="g", tightest=".2f") | {header: f"{{{name}}}" for header, name in names.items()}
    return framed(table.rename(columns=names), layout)


def claims(chosen: Sequence[Verdict]) -> pd.DataFrame:
    """One row per claim: what its parts say together, and what decided it: parts against it, parts that keep it open, or all."""
    decisive = {judge.NOT_HELD: ("against",), judge.OPEN: ("against", "open")}
    decisive |= {judge.AT_IMAGENET[word]: kinds for word, kinds in decisive.items()}
    every, rows = verdict_table(chosen), []
    for claim in answer.claim_verdicts(every).itertuples():
        kinds = decisive.get(claim.claim_verdict)
        decided = [
            f"{row.part}: {answer.label(row)}" + (f", {answer.estimate(row)}" if not pd.isna(row.ours) else "")
            for row in every[every["claim"] == claim.claim].itertuples()
            if kinds is None or answer.kind(row) in kinds
        ]  # fmt: skip
        rows.append({
            "claim": claim.claim, "title": claim.claim_title, "verdict": claim.claim_verdict,
            "decided by": "; ".join(decided), "notebook": notebook(claim.notebook).file,
        })  # fmt: skip
    return framed(rows, columns("claim title verdict") | {"decided by": "{decided by}"} | columns("notebook"))


# ---------------------------------------------------------------------------------------------------- sentences


def legend(p: Profile, kept: str) -> str:
    """The scale of a profile, and what the three kinds of columns are, in a few sentences."""
    images = f", {p.images:,} of the training images" if p.judged and p.images else ""
    return (
        f"**Profile `{p.name}`**: {title_of(p.data)} at {p.image_size} pixels, patches of {p.patch_size}, width "
        f"{p.width}, {p.pairs} pairs unless an arm says otherwise, {p.epochs} epochs{images}, seeds "
        f"{', '.join(map(str, p.seeds))}.\n\n"
        f"Columns: *paper* is ImageNet as printed; *committed reference* is what this project measured ({kept}); *this run* is "
        f"what this page's own runs say."
    )


def span(days: Iterable[str]) -> str:
    """The first and the last of them, once where they are one; empty where there are none."""
    days = sorted(days)
    return " to ".join(dict.fromkeys((days[0], days[-1]))) if days else ""


def data_names(runs: Runs) -> str:
    """The data sets of an experiment's arms."""
    data = dict.fromkeys(arm.spec.data for arm in runs.experiment.arms.values())
    return "; ".join(map(title_of, data))


def about(runs: Runs) -> str:
    """Profile, data, seeds and device of these runs in a few words, for the small print of a figure."""
    results = [result for of_arm in runs.results.values() for result in of_arm]
    n = [f"n = {max(map(len, runs.results.values()))}"] if results else []
    devices = sorted({result.about["device"] for result in results})
    return ", ".join([f"{runs.experiment.profile.name}: {data_names(runs)}", *n, *devices])


def provenance(runs: Runs) -> str:
    """Data, split, seeds, device and CPU time of these runs, in one sentence."""
    p = runs.experiment.profile
    if not runs.results:
        return f"No runs at `{p.name}`: the committed reference is shown, where there is one."
    family = {member for spec in runs.experiment.specs() for member in spec.family()}
    results = [result for spec in family if (result := store.find(spec)) is not None]
    about = f"{data_names(runs)}, {results[0].about['split']} images, seeds {', '.join(map(str, p.seeds))}"
    if not p.judged:
        return f"{about}. Too small to say anything about accuracy: it shows that the code runs."
    devices = ", ".join(sorted({r.about["device"] for r in results}))
    seconds = sum(r.about["cpu_s"] for r in results)
    return f"{about}; n = {len(p.seeds)}; {devices}; {seconds / 60:.0f} CPU minutes in {len(results)} runs."


def claims_text(name: str, every: Sequence[Verdict]) -> str:
    """Every claim's verdict at the profile of this name, for the terminal."""
    return f"claims at profile {name}\n\n{answer.plain(verdict_table(every))}"


def save_claims(name: str, every: Sequence[Verdict]) -> None:
    """Write the verdicts at a profile to outputs/<profile>/claims.csv and margins.csv."""
    save(verdict_table(every), paths.outputs() / name / "claims.csv")
    save(judge.moved(every), paths.outputs() / name / "margins.csv")


def tuning_text(p: Profile, wanted: Mapping[str, tuning.Search]) -> str:
    """What was tried for these rates; that of all of the profile is written to outputs/<profile>/tuning.csv."""
    table = pd.DataFrame(tuning.table(p, tuning.searches(p)))
    save(table, paths.outputs() / p.name / "tuning.csv")
    shown = table[table["rate_of"].isin(list(wanted))] if len(table) else table
    text = shown.to_markdown(index=False, tablefmt="simple", floatfmt=".4g")
    runs = {n: [store.find(spec) for spec in specs] for n, specs in tuning.control(p).items()}
    if not runs or None in [result for results in runs.values() for result in results]:
        return text
    top1 = pd.DataFrame({n: [r.metrics["top1"] for r in results] for n, results in runs.items()})
    rows = pd.DataFrame({"images": top1.columns, "deficit of full": [(top1[max(runs)] - top1[n]).mean() for n in top1]})
    save(rows, paths.outputs() / p.name / "control.csv")
    return f"{text}\n\n{rows.to_markdown(index=False, tablefmt='simple', floatfmt='.4g')}"
