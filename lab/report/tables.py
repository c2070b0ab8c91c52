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
import seaborn as sns

from lab import paths
from lab.claims import tuning
from lab.claims.judge import Verdict, claim_stance, verdict_table
from lab.claims.ledger import ledger
from lab.claims.statistics import difference, interval
from lab.data.cards import card
from lab.experiments.catalogue import Experiment, Runs, notebook
from lab.experiments.profiles import Arm, Profile
from lab.experiments.small import PRIMARY_STEMS
from lab.runs import store
from lab.runs.results import Result
from lab.runs.spec import RunSpec
from vitlib.files import write_whole
from vitlib.train.finetune import STRATEGIES

Layout = Mapping[str, str | tuple[str, ...]]
NOT_RUN, MISSING = "not run", "–"
COLUMN = re.compile(r"{([^{}:]+)")  # the columns that a format names; widths and digits may be columns too


# ---------------------------------------------------------------------------------------------------- form


def framed(
    rows: Iterable[Mapping] | pd.DataFrame, layout: Layout, always: Collection[str] | None = None
) -> pd.DataFrame:
    """A frame with its layout; headers not in `always` (None: all are) go where no row has anything to print."""
    frame = pd.DataFrame(rows)
    frame.attrs["layout"] = dict(layout)
    if always is not None:
        texts = printed(frame)
        frame.attrs["layout"] = {h: f for h, f in layout.items() if h in always or (texts[h] != MISSING).any()}
    return frame


def printed(frame: pd.DataFrame, layout: Layout | None = None) -> pd.DataFrame:
    """The same rows as texts, a column per header of the layout (None: the frame's own); a missing number is a dash."""

    def text(row: dict, formats: str | tuple[str, ...]) -> str:
        for form in (formats,) if isinstance(formats, str) else formats:
            if not any(pd.isna(row.get(column)) for column in COLUMN.findall(form)):
                return form.format_map(row)
        return MISSING

    layout = frame.attrs["layout"] if layout is None else layout
    # a count beside a gap is a float in a frame
    rows = [
        {c: int(v) if isinstance(v, float) and v.is_integer() else v for c, v in r.items()}
        for r in frame.to_dict("records")
    ]
    return pd.DataFrame([{h: text(row, f) for h, f in layout.items()} for row in rows], columns=list(layout))


def markdown(frame: pd.DataFrame) -> str:
    """The printed frame as a Markdown table."""
    return printed(frame).to_markdown(index=False, disable_numparse=True)


def save(frame: pd.DataFrame, path: Path) -> None:
    """The numbers as CSV."""
    with write_whole(path) as draft:
        frame.to_csv(draft, index=False)


def theme() -> None:
    sns.set_theme(context="paper", style="whitegrid", palette="colorblind", font_scale=1.1)


def spread(prefix: str = "") -> tuple[str, str]:
    """The layout of what `summary` gives: "84.19 ± 0.47 (n=5)", with one seed "84.19 (n=1)"."""
    mean, sd, n = (f"{{{prefix}{name}" for name in ("mean", "sd", "n"))
    return f"{mean}:.2f}} ± {sd}:.2f}} (n={n}:.0f}})", f"{mean}:.2f}} (n={n}:.0f}})"


def bounds(prefix: str = "") -> tuple[str, str]:
    """The layout of what `gap` gives: "-0.31 [-1.20, +0.58]", with one seed "-0.31"."""
    points, low, high = (f"{{{prefix}{name}:+.2f}}" for name in ("points", "low", "high"))
    return f"{points} [{low}, {high}]", points


# ---------------------------------------------------------------------------------------------------- runs


def summary(results: Sequence[Result], metric: str = "top1", prefix: str = "") -> dict[str, float]:
    """Mean and sample standard deviation over seeds; empty without results."""
    values = [r.metrics[metric] for r in results if metric in r.metrics]
    if not values:
        return {}
    sd = np.std(values, ddof=1) if len(values) > 1 else np.nan
    return {f"{prefix}mean": float(np.mean(values)), f"{prefix}sd": float(sd), f"{prefix}n": len(values)}


def gap(runs: Runs, a: str, b: str, prefix: str = "") -> dict[str, float]:
    """a - b in points, with its 95 % interval over seeds and images where there are two seeds; empty where one was not run."""
    if not {a, b} <= runs.results.keys() or a == b:
        return {}
    right = {arm: np.stack([r.correct for r in runs.results[arm]]) for arm in (a, b)}
    if len(right[a]) < 2:
        return {f"{prefix}points": 100 * float(right[a].mean() - right[b].mean())}
    estimate = interval(difference(right, {a: 1.0, b: -1.0}))
    return {f"{prefix}points": estimate.mean, f"{prefix}low": estimate.low, f"{prefix}high": estimate.high}


BESIDE = {"top1_v2": "top1, ImageNet-V2", "top1_ema": "top1, averaged weights (EMA)"}  # where a run has them


def accuracies(runs: Runs, committed: Runs, reference: str, paper: Mapping[str, Mapping]) -> pd.DataFrame:
    """One row per arm: the paper | the committed reference | this run, with its difference to the reference arm in points."""
    rows = []
    for arm in runs.experiment.arms or committed.experiment.arms:
        results = runs.results.get(arm, ())
        row = {"arm": arm} | dict(paper.get(arm, {})) | summary(committed.results.get(arm, ()), prefix="committed ")
        row |= summary(results) | gap(runs, arm, reference)
        for metric in BESIDE:
            row |= summary(results, metric, f"{metric} ")
        for metric in ("first_loss", "train_loss", "trained_params"):
            row[metric] = summary(results, metric).get("mean", np.nan)
        rows.append(row)
    here = f"top1, this run ({runs.experiment.profile.name})"
    layout = {
        "arm": "{arm}", "paper (ImageNet)": "{paper:.{digits}f}{chart}",
        "committed reference": (*spread("committed "), NOT_RUN), here: (*spread(), NOT_RUN),
    }  # fmt: skip
    always = list(layout)
    if len(runs.experiment.profile.seeds) > 1:
        layout[f"minus {reference}, points"] = bounds()
    layout |= {header: spread(f"{metric} ") for metric, header in BESIDE.items()}
    layout |= {"first_loss": "{first_loss:.5f}", "train_loss": "{train_loss:.3f}"}
    return framed(rows, layout | {"trained_params": "{trained_params:,.0f}"}, always)


def sequential(arms: Mapping[str, Arm], width: int, layer_scale: bool = False) -> str:
    """The first arm of one branch, with LayerScale or without, of this width where there is one."""
    ones = {
        label: arm.spec.model.width for label, arm in arms.items()
        if arm.spec.model.branches == 1 and (arm.spec.model.layer_scale is not None) == layer_scale
    }  # fmt: skip
    return next((arm for arm, wide in ones.items() if wide == width), next(iter(ones)))


def gaps(runs: Runs, committed: Runs, size: str) -> pd.DataFrame:
    """Two branches minus one in points with its 95 % interval, a row per `size` ("width" or "pairs").

    At a profile without runs: the committed reference, or what is not run.
    """
    here = bool(runs.results or not committed.results)
    shown = runs if here else committed
    p, arms = shown.experiment.profile, shown.experiment.arms or committed.experiment.arms
    models = {label: arm.spec.model for label, arm in arms.items()}
    if size == "pairs":  # of the profile's own width, where there are some
        models = {arm: m for arm, m in models.items() if m.width == p.width} or models
    arms = {(getattr(m, size), m.branches): arm for arm, m in models.items()}
    rows = [
        {size: value, "one": arms[value, 1], "two": arms[value, 2], "n": len(p.seeds)}
        | {"measured": f"here ({p.name})" if here else "committed reference"} | gap(shown, arms[value, 2], arms[value, 1])
        for value in sorted({value for value, _ in arms})
    ]  # fmt: skip
    layout = {size: f"{{{size}}}", "contrast": "{two} - {one}", "points": ("{points:+.2f}", NOT_RUN)}
    layout |= {f"{end}, points": f"{{{end}:+.2f}}" for end in ("low", "high")}
    return framed(rows, layout | {"n": "{n}", "measured": "{measured}"})


def blocked_model(runs: Runs) -> str:
    """One blocked model for the whole table, accuracy ~ arm + seed, in one sentence; shown beside, decides nothing."""
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    seeds = runs.experiment.profile.seeds
    if len(runs.results) < 2 or len(seeds) < 2:
        return ""
    table = pd.DataFrame([
        {"arm": arm, "seed": seed, "top1": result.metrics["top1"]}
        for arm, results in runs.results.items() for seed, result in zip(seeds, results, strict=True)
    ])  # fmt: skip
    fit = ols("top1 ~ C(arm) + C(seed)", table).fit()
    arms = anova_lm(fit).loc["C(arm)"]
    return (
        f"Blocked model, top-1 ~ arm + seed (shown beside, decides nothing): F({arms['df']:.0f}, {fit.df_resid:.0f}) = "
        f"{arms['F']:.1f}, p = {arms['PR(>F)']:.2g} for any difference between arms; residual {fit.mse_resid**0.5:.2f} points."
    )


# ---------------------------------------------------------------------------------------------------- Tables 6 and 7


def transfer(runs: Runs, committed: Runs) -> pd.DataFrame:
    """Table 6's form: top-1 of each strategy by data set, images and model; the committed reference first, then this run.

    All strategies of a row start from the same tensors and images, so that they share their first loss.
    """
    rows = _transfer(committed, "committed reference") + _transfer(runs, f"this run ({runs.experiment.profile.name})")
    layout = {name: f"{{{name}}}" for name in ("measured", "data set")} | {
        "images": "{images:,.0f}",
        "model": "{model}",
    }
    layout |= {f"top1, {s}": spread(f"{s} ") for s in (*STRATEGIES, "scratch")}
    return framed(rows, layout | {"attn - full, points": bounds(), "first_loss": "{first_loss:.5f}"})


def _transfer(runs: Runs, measured: str) -> list[dict]:
    settings: dict[tuple, dict[str, str]] = {}
    for label, arm in runs.experiment.arms.items():
        place = (arm.spec.data, arm.spec.training_images, arm.spec.model.name.partition("/")[0])
        settings.setdefault(place, {})[arm.column] = label
    rows = []
    for place, arms in settings.items():
        results = {strategy: runs.results[arm] for strategy, arm in arms.items() if arm in runs.results}
        if results:
            row = dict(zip(("data set", "images", "model"), place, strict=True)) | {"measured": measured}
            row |= {k: v for s, some in results.items() for k, v in summary(some, prefix=f"{s} ").items()}
            row |= gap(runs, arms["attn"], arms["full"])
            rows.append(row | {"first_loss": next(iter(results.values()))[0].metrics["first_loss"]})
    return rows or [{"measured": f"{measured}: {NOT_RUN}"}]


def places(setting: Experiment) -> dict[tuple[str, str], str]:
    """(row, column) of the paper's table -> the arm that stands there."""
    return {(arm.row, arm.column): label for label, arm in setting.arms.items()}


def table7(runs: Runs, committed: Runs, paper: Mapping[str, Mapping]) -> pd.DataFrame:
    """Table 7's form: a row per stem, accuracies and differences to the linear stem with the same training.

    Where a stem was not run here: the committed reference, so labelled, if there is one.
    """
    arms, trainings = places(committed.experiment) | places(runs.experiment), ("supervised", "scratch", "pretrained")
    rows = []
    for stem in dict.fromkeys(stem for stem, _ in arms):
        row = {"stem": stem}
        for training in trainings:
            arm, linear = (arms.get((name, training), "") for name in (stem, "linear"))
            row |= {f"{training} {key}": value for key, value in paper.get(arm, {}).items()}
            row |= summary(runs.results.get(arm, ()), prefix=f"{training} ") | gap(runs, arm, linear, f"{training} ")
            row |= summary(committed.results.get(arm, ()), prefix=f"{training} committed ")
        rows.append(row)
    layout: dict[str, str | tuple[str, ...]] = {"stem": "{stem}"}
    for training in trainings:
        if any(training == column and arm in paper for (_, column), arm in arms.items()):
            layout[f"top1 {training}, paper"] = f"{{{training} paper:.{{{training} digits}}f}}"
        known = tuple(f"committed: {form}" for form in spread(f"{training} committed "))
        layout[f"top1 {training}"] = spread(f"{training} ") + known
        if len(runs.experiment.profile.seeds) > 1:
            layout[f"{training} minus linear, points"] = bounds(f"{training} ")
    return framed(rows, layout)


TARGETS = {"tokens": "k-means tokens", "dvae": "dVAE tokens", "pixels": "pixels"}


def trainings(runs: Runs) -> pd.DataFrame:
    """The two primary stems under each training: labels, pre-training, its tokens, layer decay."""
    arms, (base, other) = places(runs.experiment), PRIMARY_STEMS
    known, first = [column for row, column in arms if row == base], ("supervised", "scratch")
    rows = []
    for training in [*(t for t in first if t in known), *(t for t in known if t not in first)]:
        here = [arms.get((stem, training), "") for stem in PRIMARY_STEMS]
        if here[0] not in runs.results:
            continue
        parent = runs.experiment.arms[here[0]].spec.parent
        row = {"training": training, "predicts": TARGETS[parent.targets] if parent else None}
        for stem, arm in zip(PRIMARY_STEMS, here, strict=True):
            row |= summary(runs.results.get(arm, ()), prefix=f"{stem} ")
        rows.append(row | gap(runs, here[1], here[0]))
    layout = {"training": "{training}", "predicts": "{predicts}"} | {
        f"top1 {s}": spread(f"{s} ") for s in PRIMARY_STEMS
    }
    more = {f"{other} minus {base}, points": bounds()} if len(runs.experiment.profile.seeds) > 1 else {}
    return framed(rows, layout | more)


def codebook_use(runs: Mapping[RunSpec, Result]) -> pd.DataFrame:
    """One row per finished tokenizer: how well it reconstructs held-out images, and how much of its codebook is in use."""
    rows = [
        {"tokenizer": spec.model.name, "seed": spec.seed, "used": m["tokens_used"] * spec.model.vocabulary, **m}
        | {"grey": 255 * m["recon_mse"] ** 0.5} for spec, m in ((spec, result.metrics) for spec, result in runs.items())
    ]  # fmt: skip
    of = " or ".join(str(V) for V in dict.fromkeys(spec.model.vocabulary for spec in runs))
    layout = {"tokenizer": "{tokenizer}", "seed": "{seed}", f"tokens used, of {of}": "{used:.0f}"}
    layout |= {"perplexity": "{perplexity:.1f}", "error, of 255 grey levels": "{grey:.1f}"}
    return framed(rows, layout | {"first_loss": "{first_loss:.5f}", "train_loss": "{train_loss:.3f}"})


# ---------------------------------------------------------------------------------------------------- verdicts


def verdicts(chosen: Sequence[Verdict], family: Sequence[Verdict]) -> pd.DataFrame:
    """The claims table as it is printed in a notebook; columns without a number are left out."""
    table = verdict_table(chosen, family)
    table["contrast"] = table["contrast"].replace("", "exact")
    table["sign"] = ["" if ledger()[part].kind == "ratio" else "+" for part in table["part"]]
    table["note"] = table["note"].replace("", None)
    for p in ("p", "p_holm"):
        table[f"{p} below"] = table[p].where(table[p] >= 0.001, None).isna() & table[p].notna()
        table[f"{p} below"] = np.where(table[f"{p} below"], 0.001, np.nan)
    table.loc[table["sign"] == "", ["paired_low", "paired_high"]] = np.nan
    layout = {
        "part": "{part}", "contrast": "{contrast}", "n": "{n}",
        "ours, points (ratio for F3)": "{ours:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]",
        "paper, at its scale": "{paper:{sign}.2f}", "margin": "{margin:.1f}",
        "p": ("< {p below:.3f}", "{p:.3f}"), "p (Holm)": ("< {p_holm below:.3f}", "{p_holm:.3f}"),
        "verdict": "{verdict}", "note": "{note}", "paired t over seeds": "[{paired_low:+.2f}, {paired_high:+.2f}]",
        "smallest visible": "{smallest_visible:.2f}", "seeds for the paper's difference": "{seeds_needed}",
    }  # fmt: skip
    return framed(table, layout, always=())


def stances(chosen: Sequence[Verdict]) -> pd.DataFrame:
    """One row per claim: what its parts say together."""
    rows = []
    for claim in dict.fromkeys(v.part.claim for v in chosen):
        mine = [v for v in chosen if v.part.claim == claim]
        words = "; ".join(f"{v.part.id}: {v.text}" if len(mine) > 1 else v.text for v in mine)
        rows.append({"claim": claim, "says": mine[0].part.title, "parts": words, "stance": claim_stance(mine),
                     "notebook": notebook(mine[0].part.notebook).file})  # fmt: skip
    return framed(rows, {name: f"{{{name}}}" for name in ("claim", "says", "parts", "stance", "notebook")})


# ---------------------------------------------------------------------------------------------------- sentences


def legend(p: Profile, kept: str) -> str:
    """The scale of a profile, and what the three kinds of columns are, in a few sentences."""
    seeds = ", ".join(map(str, p.seeds))
    images = f", {p.images:,} of the training images" if p.judged and p.images else ""
    return (
        f"**Profile `{p.name}`**: {card(p.data)['pretty_name']} at {p.image_size} pixels, patches of {p.patch_size}, width "
        f"{p.width}, {p.pairs} pairs unless an arm says otherwise, {p.epochs} epochs{images}, seeds {seeds}.\n\n"
        f"Columns: *paper* is ImageNet as printed; *committed reference* is what this project measured ({kept}); *this run* is "
        f"what this page's own runs say."
    )


def span(days: Iterable[str]) -> str:
    """The first and the last of them, once where they are one; empty where there are none."""
    days = sorted(days)
    return " to ".join(dict.fromkeys((days[0], days[-1]))) if days else ""


def provenance(runs: Runs) -> str:
    """Data, split, seeds, device and CPU time of these runs, in one sentence."""
    p = runs.experiment.profile
    if not runs.results:
        return f"No runs at `{p.name}`: the committed reference is shown, where there is one."
    family = {member for spec in runs.experiment.specs() for member in spec.family()}
    results = [result for spec in family if (result := store.find(spec)) is not None]
    names = "; ".join(
        card(name)["pretty_name"] for name in dict.fromkeys(arm.spec.data for arm in runs.experiment.arms.values())
    )
    about = f"{names}, {results[0].about['split']} images, seeds {', '.join(map(str, p.seeds))}"
    if not p.judged:
        return f"{about}. Too small to say anything about accuracy: it shows that the code runs."
    devices = ", ".join(sorted({r.about["device"] for r in results}))
    seconds = sum(r.about["cpu_s"] for r in results)
    return f"{about}; n = {len(p.seeds)}; {devices}; {seconds / 60:.0f} CPU minutes in {len(results)} runs."


# ---------------------------------------------------------------------------------------------------- for the terminal


def claims_text(p: Profile, every: Sequence[Verdict]) -> str:
    """Every claim's stance at a profile; the verdicts are also written to outputs/<profile>/claims.csv."""
    save(verdict_table(every), paths.outputs() / p.name / "claims.csv")
    shown = printed(stances(every), {name: f"{{{name}}}" for name in ("claim", "stance", "parts")})
    return f"claims at profile {p.name}\n{shown.to_markdown(index=False, disable_numparse=True, tablefmt='simple')}"


def tuning_text(p: Profile, groups: Collection[str]) -> str:
    """Validation accuracy at every rate, margins, contrasts at the best rates; all of it is written as CSV too."""
    rows = tuning.table(p, tuning.GROUPS)
    whole = {"tuning": rows, "margins": tuning.margins(p), "best_rates": tuning.contrasts(p, rows)}
    for name, table in whole.items():
        save(pd.DataFrame(table), paths.outputs() / p.name / f"{name}.csv")
    shown = [[row for row in rows if row["group"] in groups], whole["margins"], whole["best_rates"]]
    return "\n\n".join(
        pd.DataFrame(table).to_markdown(index=False, tablefmt="simple", floatfmt=".4g") for table in shown if table
    )
