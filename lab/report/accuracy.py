"""Accuracies of arms, their differences with intervals, and the figures of both."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from lab.claims.statistics import Estimate, difference, interval
from lab.data.registry import card
from lab.experiments.catalogue import NOTEBOOKS, Experiment, Runs, experiment
from lab.report.tables import NOT_RUN, reference_table
from lab.runs import results, store
from lab.runs.spec import RunSpec
from vitlib.model import ViTConfig


def correct(arm_runs: Runs) -> dict[str, np.ndarray]:
    """Arm -> which images were right, bool (seeds, images)."""
    return {arm: np.stack([r.correct for r in results]) for arm, results in arm_runs.results.items()}


def top1(results: Sequence[results.Result], metric: str = "top1") -> str:
    """ "84.19 ± 0.47 (n=5)": mean and sample deviation over seeds."""
    values = [r.metrics[metric] for r in results]
    spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread} (n={len(values)})"


def contrast(arm_runs: Runs, a: str, b: str) -> Estimate | None:
    """a - b in points with its interval over seeds and images; None with fewer than two seeds."""
    seen = correct(arm_runs)
    return interval(difference(seen, {a: 1.0, b: -1.0})) if len(seen[a]) > 1 else None


def points(estimate: Estimate | None) -> str:
    """ "-0.31 [-1.20, 0.58]": mean and 95 % interval."""
    return "–" if estimate is None else f"{estimate.mean:+.2f} [{estimate.low:+.2f}, {estimate.high:+.2f}]"


def arms_of(setting: Experiment) -> dict[str, RunSpec]:
    """The arms to show: this profile's, or where it has none, those of `study`."""
    return setting.arms or experiment(setting.notebook, "study").arms


def sequential(setting: Experiment, layer_scale: bool = False) -> str:
    """The first arm of one branch, with LayerScale or without, of the profile's own width where it has one."""
    known = models_of(setting)
    ones = [a for a, m in known.items() if m.branches == 1 and (m.layer_scale is not None) == layer_scale]
    return next((a for a in ones if known[a].width == setting.profile.width), ones[0])


def models_of(setting: Experiment) -> dict[str, ViTConfig]:
    return {arm: spec.model for arm, spec in arms_of(setting).items()}


BESIDE = {"top1_v2": "top1, ImageNet-V2", "top1_ema": "top1, averaged weights (EMA)"}  # where a run has them


def accuracies(arm_runs: Runs, reference: str, paper: Mapping[str, str]) -> pd.DataFrame:
    """One row an arm: the paper | the committed reference | this run, with its difference to the reference arm."""
    p, seen = arm_runs.experiment.profile, arm_runs.results
    committed, rows = committed_values(arm_runs.experiment.notebook), []
    for arm in arms_of(arm_runs.experiment):
        row = {"arm": arm, "paper (ImageNet)": paper.get(arm, "–"), "committed reference": committed.get(arm, NOT_RUN)}
        if not seen:
            rows.append(row | {f"this run ({p.name})": NOT_RUN})
            continue
        row[f"top1, this run ({p.name})"] = top1(seen[arm]) if arm in seen else NOT_RUN
        if len(p.seeds) > 1:
            apart = arm != reference and {arm, reference} <= seen.keys()
            row[f"minus {reference}, points"] = points(contrast(arm_runs, arm, reference) if apart else None)
        if arm in seen:
            there = [metric for metric in BESIDE if all(metric in r.metrics for r in seen[arm])]
            row |= {BESIDE[metric]: top1(seen[arm], metric) for metric in there}
            metrics = pd.DataFrame([r.metrics for r in seen[arm]]).mean()
            row |= {"first_loss": f"{metrics['first_loss']:.5f}", "train_loss": f"{metrics['train_loss']:.3f}"}
            row["trained_params"] = f"{int(metrics['trained_params']):,}"
        rows.append(row)
    return pd.DataFrame(rows).fillna("–")


def blocked_model(arm_runs: Runs) -> str:
    """One blocked model for the whole table, accuracy ~ arm + seed, in one sentence; shown beside, decides nothing."""
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    if len(arm_runs.results) < 2:
        return ""
    table = pd.DataFrame([
        {"arm": arm, "seed": seed, "top1": result.metrics["top1"]}
        for arm, results in arm_runs.results.items()
        for seed, result in zip(arm_runs.experiment.profile.seeds, results, strict=True)
    ])  # fmt: skip
    if table["seed"].nunique() < 2 or table["arm"].nunique() < 2:
        return ""
    fit = ols("top1 ~ C(arm) + C(seed)", table).fit()
    arms = anova_lm(fit).loc["C(arm)"]
    return (
        f"Blocked model, top-1 ~ arm + seed (shown beside, decides nothing): F({arms['df']:.0f}, {fit.df_resid:.0f}) = "
        f"{arms['F']:.1f}, p = {arms['PR(>F)']:.2g} for any difference between arms; residual {fit.mse_resid**0.5:.2f} points."
    )


def provenance(arm_runs: Runs) -> str:
    """Data, split, seeds, device and CPU time of these runs, in one sentence."""
    p = arm_runs.experiment.profile
    if not arm_runs.results:
        return f"No runs of its own at profile {p.name}."
    family = {member for spec in arm_runs.experiment.specs() for member in spec.family()}
    results = [result for spec in family if (result := store.find(spec)) is not None]
    data = dict.fromkeys(spec.data for spec in arm_runs.experiment.arms.values())
    names = "; ".join(card(name)["pretty_name"] for name in data)
    about = f"{names}, {results[0].about['split']} images, seeds {', '.join(map(str, p.seeds))}"
    if not p.judged:
        return f"{about}. Too small to say anything about accuracy: it shows that the code runs."
    devices = ", ".join(sorted({r.about["device"] for r in results}))
    seconds = sum(r.about["cpu_s"] for r in results)
    return f"{about}; n = {len(p.seeds)}; {devices}; {seconds / 60:.0f} CPU minutes in {len(results)} runs."


def committed_values(notebook: str) -> dict[str, str]:
    """Arm -> the committed reference's value, from outputs/reference/pilot/tables; empty until there is one."""
    table = reference_table(NOTEBOOKS[notebook][0])
    if table is None:
        return {}
    value = next((column for column in table if column.startswith("top1")), None)
    return dict(zip(table["arm"], table[value], strict=True)) if value else {}  # no arm of it was finished


def gaps(arm_runs: Runs, size: str) -> pd.DataFrame:
    """Two branches minus one in points, a row for each `size` ("width" or "pairs"), with its 95 % interval.

    At a profile without runs: the committed reference, or what is not run.
    """
    setting = arm_runs.experiment
    own = {
        arm: s.model for arm, s in arms_of(setting).items() if size == "width" or s.model.width == setting.profile.width
    }
    arms = {(getattr(model, size), model.branches): arm for arm, model in (own or models_of(setting)).items()}
    rows = []
    for value in sorted({value for value, _ in arms}):
        one, two = arms[value, 1], arms[value, 2]
        row = {size: str(value), "contrast": f"{two} - {one}", "points": NOT_RUN}
        row |= {"low, points": "–", "high, points": "–"}
        if {one, two} <= arm_runs.results.keys():
            e = contrast(arm_runs, two, one)
            seen = correct(arm_runs)
            row["points"] = f"{100 * (seen[two].mean() - seen[one].mean()):+.2f}"
            row |= {"low, points": f"{e.low:+.2f}", "high, points": f"{e.high:+.2f}"} if e else {}
        rows.append(row | {"n": str(len(setting.profile.seeds)), "measured": f"here ({setting.profile.name})"})
    committed = reference_table(f"{NOTEBOOKS[setting.notebook][0]}_gaps")
    if not arm_runs.results and committed is not None:
        return committed.assign(measured="committed reference (study)")
    return pd.DataFrame(rows)


def gap_figure(table: pd.DataFrame, paper: pd.DataFrame, size: str) -> Figure:
    """Two branches minus one over `size`: `gaps` with intervals, and `paper_gaps` beside, both in points."""
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    y, low, high = (pd.to_numeric(table[c], errors="coerce") for c in ("points", "low, points", "high, points"))
    error = None if low.isna().any() else np.stack([y - low, high - y])
    label = f"{table['measured'].iloc[0]}, {'not run' if y.isna().all() else 'n = ' + table['n'].iloc[0]}"
    axes.errorbar(table[size].astype(int), y, error, fmt="D-", capsize=4, label=label)
    for i, (family, group) in enumerate([("", paper)] if size == "width" else paper.groupby("model_family")):
        name = f"paper{', ' * bool(family)}{family}, ImageNet, chart ± 0.1"
        color = sns.color_palette()[i + 1]
        axes.plot(group[size], group["x2 - x1"].astype(float), marker="o", linestyle="--", color=color, label=name)
    axes.axhline(0, color="0.2", linewidth=1)
    axes.set_xscale("log", base=2)
    ticks = sorted({*table[size].astype(int), *paper[size]})
    axes.set_xticks(ticks, ticks)
    axes.minorticks_off()
    axes.set(xlabel=size, ylabel="two branches minus one, points")
    axes.legend(fontsize="small")
    return figure


def difference_figure(arm_runs: Runs, reference: str, xlabel: str) -> Figure:
    """Points above the reference arm: one dot a seed, the mean with its 95 % interval over seeds and images.

    Without these runs: only that sentence.
    """
    if reference not in arm_runs.results or len(arm_runs.results) < 2:
        figure = plt.figure(figsize=(6, 0.6))
        figure.text(0.5, 0.5, f"no runs at {arm_runs.experiment.profile.name}", ha="center", va="center")
        return figure
    seen, arms = correct(arm_runs), [arm for arm in arm_runs.results if arm != reference]
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    by_seed = pd.DataFrame([
        {"arm": arm, "points": 100 * (a.mean() - b.mean())}
        for arm in arms for a, b in zip(seen[arm], seen[reference], strict=True)
    ])  # fmt: skip
    sns.stripplot(by_seed, x="arm", y="points", order=arms, ax=axes, color="0.55", size=5, jitter=False)
    for x, arm in enumerate(arms):
        estimate = contrast(arm_runs, arm, reference)
        if estimate is not None:
            error = [[estimate.mean - estimate.low], [estimate.high - estimate.mean]]
            axes.errorbar(x, estimate.mean, yerr=error, fmt="D", capsize=4, color=sns.color_palette()[0])
    axes.axhline(0, color="0.2", linewidth=1)
    axes.set(xlabel=xlabel, ylabel=f"top-1 minus {reference}, points")
    if len(arms) > 6:
        axes.tick_params(axis="x", labelrotation=30)
    return figure


def finished(setting: Experiment, chosen: Collection[str] | None = None) -> dict[str, list[results.Result]]:
    """Arm -> results at exactly the profile's seeds, of all arms or the chosen ones; one with a seed missing is left out."""
    found = {}
    for arm, spec in setting.arms.items():
        if chosen is not None and arm not in chosen:
            continue
        results = [store.find(spec.with_seed(seed)) for seed in setting.profile.seeds]
        if all(results):
            found[arm] = results
    return found
