"""Tables and figures of the notebooks, and the claims table. Everything printed comes from runs or from counting.

Tables are pandas frames with texts ready to print; figures are matplotlib figures drawn with seaborn. Below
`imagenet` a figure plots differences to the reference arm, since accuracies of different data share no axis.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure

from vitlib import paths
from vitlib.data import load_resized, normalise
from vitlib.data.external import DataAbsent
from vitlib.data.registry import card, facts
from vitlib.errors import UsageError
from vitlib.lab import exact, measure, plan, runs, tuning
from vitlib.lab.bench import finetune as finetune_bench
from vitlib.lab.bench import runner
from vitlib.lab.claims import (
    Estimate,
    Verdict,
    claim_stance,
    difference,
    interval,
    judge,
    prints_as,
    verdict_table,
)
from vitlib.lab.experiments import (
    NOTEBOOKS,
    STEM_ARMS,
    Experiment,
    Runs,
    experiment,
    profile,
    stem_model,
    stem_pairs,
)
from vitlib.lab.ledger import Part, arm_at, ledger
from vitlib.lab.paper import as_printed, paper_table
from vitlib.lab.runs import RunSpec, cores
from vitlib.model import ViT, ViTConfig, fuse, vit_config
from vitlib.train import masked, tokenizers
from vitlib.train.finetune import STRATEGIES

NOT_RUN = "not run"
WITHOUT_RUNS = "the committed reference of `study` is shown, where there is one."


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table; texts as they are, missing cells as a dash."""
    return table.fillna("–").to_markdown(index=False, disable_numparse=True)


# ---------------------------------------------------------------------------------------------------- sizes


def sizes(models: Mapping[str, ViTConfig]) -> pd.DataFrame:
    """Parameters and multiply-adds of each model, counted; the paper's printed values beside, where it has them."""
    printed = paper_table("table3").set_index("model")
    rows = []
    for name, config in models.items():
        size = exact.size(config)
        paper = printed.loc[name] if name in printed.index else None
        rows.append({
            "model": name, "width": config.width, "layers": config.depth, "branches": config.branches,
            "pairs": config.pairs, "params": f"{size.params:,}", "params_m": f"{size.params / 1e6:.1f}",
            "gmacs": f"{size.macs / 1e9:.2f}",
            "paper": f"{paper['params_m']} M, {paper['gflops']} G" if paper is not None else "–",
        })  # fmt: skip
    return pd.DataFrame(rows).astype(str)


def table1_sizes() -> pd.DataFrame:
    """The models of Table 1 with LayerScale and without: counted, and whether that prints as the paper prints it."""
    rows = []
    for row in paper_table("table1").to_dict("records"):
        size = exact.size(vit_config(row["model"], layer_scale=1e-4 if row["layer_scale"] == "yes" else None))
        params, gmacs = size.params / 1e6, size.macs / 1e9
        same = prints_as(params, row["params_m"]) and prints_as(gmacs, row["gflops"])
        rows.append({
            "model": row["printed_name"], "LayerScale": row["layer_scale"], "params": f"{size.params:,}",
            "params_m": f"{params:.1f}", "gmacs": f"{gmacs:.2f}", "paper": f"{row['params_m']} M, {row['gflops']} G",
            "to the printed digit": "yes" if same else "no",
        })  # fmt: skip
    return pd.DataFrame(rows)


def figure_models(name: str) -> dict[str, ViTConfig]:
    """The models of Figure 2 or 3, at the paper's sizes."""
    rows = paper_table(name).to_dict("records")
    scale = {row["model"]: 1e-4 if row.get("layer_scale") == "yes" else None for row in rows}
    return {model: vit_config(model, layer_scale=value) for model, value in scale.items()}


def arm_sizes(setting: Experiment) -> pd.DataFrame:
    """The models that this notebook trains, counted; at a profile without runs, those of `study`."""
    rows = []
    for arm, spec in _arms(setting).items():
        m, size = spec.model, exact.size(spec.model)
        rows.append({
            "arm": arm, "width": m.width, "layers": m.depth, "branches": m.branches, "pairs": m.pairs,
            "params": f"{size.params:,}", "multiply-adds": f"{size.macs:,}",
        })  # fmt: skip
    return pd.DataFrame(rows).astype(str)


def table3_models(*more: str) -> dict[str, ViTConfig]:
    """The models of Table 3, with and without LayerScale as there, and others (with it) by name."""
    rows = paper_table("table3").to_dict("records")
    scale = {row["model"]: 1e-4 if row["layer_scale"] == "yes" else None for row in rows} | dict.fromkeys(more, 1e-4)
    return {name: vit_config(name, layer_scale=value) for name, value in scale.items()}


def paper_stem(name: str) -> ViTConfig:
    """A row of Table 7 as the paper has it: ViT-B12 with that stem, and ViT-B13, the linear baseline of like cost."""
    return vit_config(f"B{stem_pairs(name, 12)}", **STEM_ARMS[name])


def _printed_stem(name: str) -> pd.Series:
    """The paper's own row."""
    config, table = paper_stem(name), paper_table("table7").set_index(["stem", "norm", "act", "model"])
    return table.loc[(config.stem, config.stem_norm, config.stem_act, f"ViT-B{config.depth}")]


def stem_sizes(profile_name: str | None = None) -> pd.DataFrame:
    """The rows of Table 7 at ViT-B's size, counted, and as printed; with a profile, the share at its size too."""
    rows = []
    for name in STEM_ARMS:
        config, printed = paper_stem(name), _printed_stem(name)["gflops"]
        size = exact.size(config)
        apart = size.macs / 1e9 / float(printed) - 1
        row = {
            "stem": name, "model": f"B{config.depth}", "norm": config.stem_norm, "act": config.stem_act,
            "params": f"{size.params:,}", "gmacs": f"{size.macs / 1e9:.3f}", "paper, GFLOPs": printed,
            "ours minus paper": "as printed" if prints_as(size.macs / 1e9, printed) else f"{100 * apart:+.2f} %",
            "more than linear": _more(config, paper_stem("linear")),
        }  # fmt: skip
        if profile_name is not None:
            small, base = (stem_model(profile(profile_name), stem) for stem in (name, "linear"))
            row[f"more than linear, {base.name}"] = _more(small, base)
        rows.append(row)
    return pd.DataFrame(rows)


def _more(config: ViTConfig, base: ViTConfig) -> str:
    return f"{100 * (exact.size(config).macs / exact.size(base).macs - 1):+.2f} %"


# ---------------------------------------------------------------------------------------------------- what is what


def legend(profile_name: str) -> str:
    """The scale of a profile, and what the three kinds of columns are, in a few sentences."""
    p = profile(profile_name)
    seeds = ", ".join(map(str, p.seeds))
    dates = reference_dates("study")
    kept = f"profile `study`, n = 5, made {dates}" if dates else "none yet"
    return (
        f"**Profile `{p.name}`**: {card(p.data)['pretty_name']} at {p.image_size} pixels, patches of {p.patch_size}, width "
        f"{p.width}, {p.pairs} pairs unless an arm says otherwise, {p.epochs} epochs, seeds {seeds}.\n\n"
        f"Columns: *paper* is ImageNet as printed; *committed reference* is what this project measured ({kept}); *this run* is "
        f"what this page's own runs say."
    )


@functools.cache
def reference_dates(profile_name: str) -> str:
    """The first and the last day of the committed runs of a profile; empty where there are none."""
    path = paths.REFERENCE / profile_name / "runs.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    days = sorted({json.loads(line)["result"]["date"] for line in lines})
    return " to ".join(dict.fromkeys((days[0], days[-1]))) if days else ""


# ---------------------------------------------------------------------------------------------------- accuracies


def correct(arm_runs: Runs) -> dict[str, np.ndarray]:
    """Arm -> which images were right, bool (seeds, images)."""
    return {arm: np.stack([r.correct for r in results]) for arm, results in arm_runs.results.items()}


def top1(results: Sequence[runs.Result]) -> str:
    """ "84.19 ± 0.47 (n=5)": mean and sample deviation over seeds."""
    values = [r.metrics["top1"] for r in results]
    spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread} (n={len(values)})"


def contrast(arm_runs: Runs, a: str, b: str) -> Estimate | None:
    """a - b in points with its interval over seeds and images; None with fewer than two seeds."""
    seen = correct(arm_runs)
    return interval(difference(seen, {a: 1.0, b: -1.0})) if len(seen[a]) > 1 else None


def points(estimate: Estimate | None) -> str:
    """ "-0.31 [-1.20, 0.58]": mean and 95 % interval."""
    return "–" if estimate is None else f"{estimate.mean:+.2f} [{estimate.low:+.2f}, {estimate.high:+.2f}]"


def _arms(setting: Experiment) -> dict[str, RunSpec]:
    """The arms to show: this profile's, or where it has none, those of `study`."""
    return setting.arms or experiment(setting.notebook, "study").arms


def _models(setting: Experiment) -> dict[str, ViTConfig]:
    return {arm: spec.model for arm, spec in _arms(setting).items()}


def accuracies(arm_runs: Runs, reference: str, paper: Mapping[str, str]) -> pd.DataFrame:
    """One row an arm: the paper | the committed reference | this run, with its difference to the reference arm."""
    p, seen = arm_runs.experiment.profile, arm_runs.results
    committed, rows = _committed(arm_runs.experiment.notebook), []
    for arm in _arms(arm_runs.experiment):
        row = {"arm": arm, "paper (ImageNet)": paper.get(arm, "–"), "committed reference": committed.get(arm, NOT_RUN)}
        if not seen:
            rows.append(row | {f"this run ({p.name})": NOT_RUN})
            continue
        row[f"top1, this run ({p.name})"] = top1(seen[arm]) if arm in seen else NOT_RUN
        if len(p.seeds) > 1:
            apart = arm != reference and {arm, reference} <= seen.keys()
            row[f"minus {reference}, points"] = points(contrast(arm_runs, arm, reference) if apart else None)
        if arm in seen:
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
    results = [result for spec in family if (result := runs.find(spec)) is not None]
    data = dict.fromkeys(spec.data for spec in arm_runs.experiment.arms.values())
    names = "; ".join(card(name)["pretty_name"] for name in data)
    about = f"{names}, {results[0].about['split']} images, seeds {', '.join(map(str, p.seeds))}"
    if not p.judged:
        return f"{about}. Too small to say anything about accuracy: it shows that the code runs."
    devices = ", ".join(sorted({r.about["device"] for r in results}))
    seconds = sum(r.about["cpu_s"] for r in results)
    return f"{about}; n = {len(p.seeds)}; {devices}; {seconds / 60:.0f} CPU minutes in {len(results)} runs."


def _committed(notebook: str) -> dict[str, str]:
    """Arm -> the committed reference's value, from outputs/reference/study/tables; empty until there is one."""
    table = _reference_table(NOTEBOOKS[notebook][0])
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
        arm: s.model for arm, s in _arms(setting).items() if size == "width" or s.model.width == setting.profile.width
    }
    arms = {(getattr(model, size), model.branches): arm for arm, model in (own or _models(setting)).items()}
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
    committed = _reference_table(f"{NOTEBOOKS[setting.notebook][0]}_gaps")
    if not arm_runs.results and committed is not None:
        return committed.assign(measured="committed reference (study)")
    return pd.DataFrame(rows)


def _reference_table(name: str) -> pd.DataFrame | None:
    path = paths.REFERENCE / "study" / "tables" / f"{name}.csv"
    return pd.read_csv(path, dtype=str) if path.is_file() else None


# ---------------------------------------------------------------------------------------------------- paper columns


def paper_gaps(name: str, size: str) -> pd.DataFrame:
    """Figure 2 or 3: top-1 of one branch and of two, and their difference in points, as read off the chart."""
    table = paper_table(name).astype({size: int})
    scaled = table.get("layer_scale", pd.Series("no", table.index))
    wide = table.assign(LayerScale=scaled).pivot(
        index=["model_family", size, "LayerScale"], columns="branches", values="top1"
    )
    wide = wide.reset_index().sort_values(["model_family", size] if size == "pairs" else size)
    gap = wide["2"].astype(float) - wide["1"].astype(float)
    return wide.rename(columns={"1": "x1, chart", "2": "x2, chart"}).assign(**{"x2 - x1": gap.map("{:+.1f}".format)})


def paper_pairs() -> dict[str, str]:
    """Figure 3: ViT-B by layers and branches."""
    rows = paper_table("figure3").query("model_family == 'ViT-B'").itertuples()
    return {row.model.removeprefix("B"): as_printed(row.top1, row.confidence) for row in rows}


def paper_layer_scale() -> pd.DataFrame:
    """Table 2: 36 pairs of ViT-B, and what two branches gain over one in each row."""
    table = paper_table("table2").pivot(index=["epochs", "layer_scale"], columns="model", values=["top1", "top1_v2"])
    table.columns = [f"{model}, {column}" for column, model in table.columns]
    values = table.apply(pd.to_numeric)
    for column in ("top1", "top1_v2"):
        gap = values[f"B18x2, {column}"] - values[f"B36x1, {column}"]
        table[f"x2 - x1, {column}"] = gap.map("{:+.1f}".format).where(gap.notna(), "–")
    return table.replace("", "–").reset_index().rename(columns={"layer_scale": "LayerScale"})


def paper_forms() -> pd.DataFrame:
    """Table 3: accuracy and memory of more pairs and of more width."""
    columns = ["model", "layer_scale", "params_m", "gflops", "peak_mem_mb", "top1", "top1_v2"]
    return paper_table("table3")[columns].rename(columns={"layer_scale": "LayerScale"})


def paper_procedures() -> pd.DataFrame:
    """Table 8: top-1 of the same models by five training procedures, epochs in brackets."""
    table = paper_table("table8")
    spread = table["top1_sd"].where(table["top1_sd"] == "", " ± " + table["top1_sd"])
    cell = (table["top1"] + spread + " (" + table["epochs"] + " ep)").where(table["top1"] != "", "–")
    return table.assign(cell=cell).pivot(index="procedure", columns="model", values="cell").loc[
        table["procedure"].unique(), table["model"].unique()
    ].reset_index()  # fmt: skip


def paper_baselines() -> pd.DataFrame:
    """Table 1: accuracies and throughput of the baselines."""
    columns = ["printed_name", "epochs", "layer_scale", "top1", "top1_v2", "images_per_s"]
    return paper_table("table1")[columns].rename(columns={"printed_name": "model", "layer_scale": "LayerScale"})


def paper_recipes() -> dict[str, str]:
    """Tables 1 and 8 by the arms of notebook 21."""
    rows = paper_table("table1").itertuples()
    values = {f"{row.model.partition('x')[0]}{'+LS' if row.layer_scale == 'yes' else ''}": row.top1 for row in rows}
    deit = paper_table("table8").query("procedure == 'DeiT'").itertuples()
    return values | {f"{row.model.removeprefix('ViT-')}12 DeiT": row.top1 for row in deit if row.top1}


def paper_branches() -> dict[str, str]:
    """ViT-B at 36 pairs: Figure 1 without LayerScale, Table 3 with it ("+LS"). The paper has nothing like 12 pairs + LS."""
    figure = paper_table("figure1").query("model_family == 'ViT-B36'")
    values = {row.model.removeprefix("B"): as_printed(row.top1, row.confidence) for row in figure.itertuples()}
    table = paper_table("table3").set_index("model")["top1"]
    return values | {f"{name}+LS": table[f"B{name}"] for name in ("36x1", "18x2")}


def figure1() -> pd.DataFrame:
    """Figure 1 as the paper has it, read off the chart: top-1 on ImageNet by number of branches."""
    table = paper_table("figure1").pivot(index="branches", columns="model_family", values="top1").reset_index()
    return table.rename(columns=lambda name: f"{name}, chart ± 0.1" if name.startswith("ViT") else name)


def paper_resolution(model: str = "ViT-B", optimizer: str = "AdamW") -> dict[str, str]:
    """Table 5 on ImageNet-val, by strategy."""
    row = paper_table("table5").query("model == @model and optimizer == @optimizer and dataset == 'val'").iloc[0]
    return {strategy: as_printed(row[strategy], row["confidence"]) for strategy in ("full", "attn", "ffn")}


def paper_stems() -> dict[str, str]:
    """Table 7: supervised, and after masked pre-training and fine-tuning, by our arms."""
    columns = {"supervised": "supervised_top1", "pretrained": "pretrained_top1"}
    return {f"{stem} {c}": _printed_stem(stem)[column] for stem in STEM_ARMS for c, column in columns.items()}


def table7(arm_runs: Runs) -> pd.DataFrame:
    """In Table 7's form: a row a stem, accuracies and differences to the linear stem with the same training.

    Where a stem was not run here stands the committed reference, labelled "study", if there is one.
    """
    paper, committed, rows = paper_stems(), _committed(arm_runs.experiment.notebook), []
    for stem in STEM_ARMS:
        row = {"stem": stem}
        for training in ("supervised", "scratch", "pretrained"):
            arm, linear = f"{stem} {training}", f"linear {training}"
            here, known = arm in arm_runs.results, f"study: {committed.get(arm, NOT_RUN)}"
            if arm in paper:
                row[f"top1 {training}, paper"] = paper[arm]
            row[f"top1 {training}"] = top1(arm_runs.results[arm]) if here else known if arm in committed else "–"
            if len(arm_runs.experiment.profile.seeds) > 1:
                apart = here and stem != "linear"
                row[f"{training} minus linear, points"] = points(contrast(arm_runs, arm, linear) if apart else None)
        rows.append(row)
    return pd.DataFrame(rows)


def trainings(arm_runs: Runs) -> pd.DataFrame:
    """The two primary stems under each training: labels, pre-training, its tokens, layer decay."""
    seen, rows = arm_runs.results, []
    names = ["supervised", "scratch", "pretrained", "pretrained k-means", "pretrained dvae", "pretrained decay"]
    for training in names:
        linear, hmlp = f"linear {training}", f"hmlp {training}"
        if linear not in seen:
            continue
        parent = arm_runs.experiment.arms[linear].parent
        row = {"training": training, "predicts": TARGETS[parent.targets] if parent else "–"}
        row |= {f"top1 {arm.split()[0]}": top1(seen[arm]) if arm in seen else "–" for arm in (linear, hmlp)}
        if len(arm_runs.experiment.profile.seeds) > 1:
            row["hmlp minus linear, points"] = points(contrast(arm_runs, hmlp, linear) if hmlp in seen else None)
        rows.append(row)
    return pd.DataFrame(rows)


TARGETS = {"tokens": "k-means tokens", "dvae": "dVAE tokens", "dalle": "DALL-E's tokens", "pixels": "pixels"}


# ---------------------------------------------------------------------------------------------------- transfer


def splits() -> pd.DataFrame:
    """Table 9, the paper's data sets, and below them the embedded ones, as their cards say."""
    rows = [
        {"data set": row.dataset, "in": "the paper", "train": int(row.train_images), "test": int(row.test_images),
         "classes": int(row.classes)}
        for row in paper_table("table9").itertuples()
    ]  # fmt: skip
    for name in dict.fromkeys(m.data for s in experiment("42", "study").arms.values() for m in s.family()):
        known = facts(name)
        rows.append({"data set": name, "in": "this notebook", **known.sizes, "classes": known.num_classes})
    table = pd.DataFrame(rows)[["data set", "in", "train", "validation", "test", "classes"]]
    return table.map(lambda n: "–" if pd.isna(n) else f"{n:,.0f}" if isinstance(n, int | float) else n)


def paper_transfer() -> pd.DataFrame:
    """Table 6, a row for each data set and model, data sets by their training images (Table 9)."""
    images = paper_table("table9").set_index("dataset")["train_images"].astype(int)
    rows = [
        {"data set": row.dataset, "images": images[row.dataset], "model": row.model, "full": row.full, "attn": row.attn,
         "ffn": row.ffn, "attn - full": f"{float(row.attn) - float(row.full):+.1f}"}
        for row in paper_table("table6").itertuples()
    ]  # fmt: skip
    table = pd.DataFrame(rows).sort_values(["images", "data set"], kind="stable")
    return table.assign(images=table["images"].map("{:,}".format))


def transfer_table(arm_runs: Runs) -> pd.DataFrame:
    """Our rows in the form of `paper_transfer`: top-1 of each strategy by data set, images and model.

    The committed reference comes first, then this run; what is missing says so. All strategies of a row start from the
    same tensors and images, so that they share their first loss.
    """
    own = f"this run ({arm_runs.experiment.profile.name})"
    rows = []
    for setting in dict.fromkeys(arm.rpartition(" ")[0] for arm in arm_runs.results):
        _, data, images = setting.split()
        found = {s: arm_runs.results.get(f"{setting} {s}") for s in (*STRATEGIES, "scratch")}
        model = next(spec.model for arm, spec in arm_runs.experiment.arms.items() if arm.startswith(f"{setting} "))
        row = {"measured": own, "data set": data, "images": f"{int(images):,}", "model": model.name.partition("/")[0]}
        row |= {f"top1, {s}": top1(results) if results else "–" for s, results in found.items()}
        whole = found["attn"] and found["full"]
        row["attn - full, points"] = _transfer_gap(arm_runs, setting) if whole else "–"
        first = next(results for results in found.values() if results)[0]
        rows.append(row | {"first_loss": f"{first.metrics['first_loss']:.5f}"})
    committed = _committed_rows("42") or [{"measured": f"committed reference: {NOT_RUN}"}]
    return pd.DataFrame(committed + (rows or [{"measured": f"{own}: {NOT_RUN}"}])).fillna("–")


def _transfer_gap(arm_runs: Runs, setting: str) -> str:
    """attn - full in points, with its interval where there are two seeds."""
    attn, full = f"{setting} attn", f"{setting} full"
    if estimate := contrast(arm_runs, attn, full):
        return points(estimate)
    attn, full = (arm_runs.results[arm][0].metrics["top1"] for arm in (attn, full))
    return f"{attn - full:+.2f}"


def _committed_rows(notebook: str) -> list[dict]:
    """The rows of the committed reference's own run, so labelled; none until there is one."""
    path = paths.REFERENCE / "study" / "tables" / f"{NOTEBOOKS[notebook][0]}.csv"
    table = pd.read_csv(path, dtype=str) if path.is_file() else pd.DataFrame({"measured": []})
    table = table[table["measured"] == "this run (study)"]
    return table.assign(measured="committed reference").to_dict("records")


def transfer_figure(table: pd.DataFrame) -> Figure:
    """attn - full over the number of images: the paper's in one panel, then one for each data set of `transfer_table`.

    A line a width; bars are 95 % intervals. Solid: this run; dashed: the committed reference.
    """
    table = table.reindex(columns=["measured", "data set", "images", "model", "attn - full, points"])
    table = table[table["attn - full, points"].fillna("–") != "–"]
    data = list(dict.fromkeys(table["data set"]))
    figure, panels = plt.subplots(
        1, 1 + len(data), figsize=(3.4 + 2.7 * len(data), 3.2), layout="constrained", squeeze=False
    )
    for i, (model, rows) in enumerate(paper_transfer().groupby("model", sort=False)):
        x, y = (rows[name].str.replace(",", "").astype(float) for name in ("images", "attn - full"))
        panels[0][0].plot(x, y, "Dos"[i], color=sns.color_palette()[7 + i], label=model)
    for panel, name in zip(panels[0][1:], data, strict=True):
        for i, (model, found) in enumerate(table[table["data set"] == name].groupby("model")):
            for measured, rows in found.groupby("measured"):
                x = rows["images"].str.replace(",", "").astype(float)
                y = rows["attn - full, points"].str.extract(r"^(\S+)(?: \[(\S+), (\S+)\])?$").astype(float)
                error = None if y[1].isna().any() else [y[0] - y[1], y[2] - y[0]]
                style = "--" if measured.startswith("committed") else "-"
                label = f"{model.split('-')[0]}, {measured}"
                panel.errorbar(
                    x, y[0], error, fmt="os"[i % 2] + style, capsize=4, color=sns.color_palette()[i], label=label
                )
    for panel, name in zip(panels[0], ["the paper's six data sets", *data], strict=True):
        panel.axhline(0, color="0.2", linewidth=1)
        panel.set_xscale("log")
        panel.set(title=name, xlabel="training images")
        if name in data:
            ticks = sorted({int(n.replace(",", "")) for n in table[table["data set"] == name]["images"]})
            panel.set_xticks(ticks, [f"{n:,}" for n in ticks])
            panel.minorticks_off()
    panels[0][0].set_ylabel("top-1 of attn minus full, points")
    panels[0][0].legend(fontsize="small")
    if data:
        figure.legend(*panels[0][-1].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    return figure


# ---------------------------------------------------------------------------------------------------- costs


def trained_shares() -> pd.DataFrame:
    """Figure 4 and section 4: what each strategy trains of ViT-B at 384, and the memory that it keeps, counted."""
    rows = []
    for strategy in ("full", "attn", "ffn", "head"):
        kept = exact.memory(strategy)
        count, every = kept.gradients // 4, kept.weights // 4
        rows.append({
            "strategy": strategy, "trained_params": f"{count:,}", "share of all": f"{100 * count / every:.1f} %",
            "weights, MB": kept.weights, "gradients + AdamW state, MB": kept.gradients + kept.optimizer,
            "saved activations, MB an image": kept.activations, "all, batch of 1, MB": kept.total,
        })  # fmt: skip
    table = pd.DataFrame(rows)
    for column in table.columns[3:]:
        table[column] = [_megabytes(value, table[column].iloc[0]) for value in table[column]]
    return table


def _megabytes(value: float, full: float | None = None, digits: int = 1) -> str:
    """Bytes as "226.9 (38.8 % less)" than `full`."""
    less = f" ({100 * (1 - value / full):.1f} % less)" if full and value != full else ""
    return f"{value / 2**20:,.{digits}f}{less}"


# ViT-B's memory is looked at for these: image size, attention, precision
SETTINGS = list(itertools.product((224, 384), ("explicit", "fused"), ("float32", "amp")))


def memory_savings(batch: int = 32) -> pd.DataFrame:
    """What attention-only saves of a step's memory, in all and of activations, by resolution, kernel and precision.

    Every token is computed in every layer, as in the released code; the last rows are a stack of today.
    """
    rows = []
    for size, attention, precision, skip in [(*s, False) for s in SETTINGS] + [
        (s, "fused", "amp", True) for s in (224, 384)
    ]:
        full, attn = (exact.memory(s, size, attention, precision, batch, skip) for s in ("full", "attn"))
        rows.append({
            "image_size": size, "attention": attention, "precision": precision,
            "last layer": "what is read" if skip else "all tokens",
            f"full, batch of {batch}, MB": _megabytes(full.total, digits=0),
            "attn, MB": _megabytes(attn.total, full.total, 0),
            "activations, full, MB": _megabytes(full.activations, digits=0),
            "activations, attn, MB": _megabytes(attn.activations, full.activations, 0),
        })  # fmt: skip
    return pd.DataFrame(rows).astype(str)


def figure4_memory() -> pd.DataFrame:
    """Figure 4's two peaks against what is counted, by resolution, kernel and precision.

    First the batch at which `full` alone explains its peak, and what attention-only would then need. Then the batch
    that explains the difference of both peaks, from which everything drops out that both need alike, counted or not:
    what is left of full's peak is then not counted. Last the saving that no batch falls below.
    """
    paper = paper_table("figure4").set_index("panel").loc["peak memory"]
    peak, peak_attn = (float(paper[s]) for s in ("full", "attn"))
    rows = []
    for setting in SETTINGS:
        (fixed, each), (fixed_attn, each_attn) = (_memory_line(s, *setting) for s in ("full", "attn"))
        batch = (peak - fixed) / each
        attn = fixed_attn + batch * each_attn
        apart = (peak - peak_attn - fixed + fixed_attn) / (each - each_attn)
        rows.append(dict(zip(("image_size", "attention", "precision"), setting, strict=True)) | {
            f"full = {peak:,.0f} MB at batch": f"{batch:.1f}",
            f"attn there, MB (paper: {peak_attn:,.0f})": f"{attn:,.0f} ({100 * (1 - attn / peak):.1f} % less)",
            f"full - attn = {peak - peak_attn:,.0f} MB at batch": f"{apart:.1f}",
            "full counted there, MB": f"{fixed + apart * each:,.0f}",
            "not counted, MB": f"{peak - fixed - apart * each:,.0f}",
            "never less than": f"{100 * (1 - each_attn / each):.1f} %",
        })  # fmt: skip
    return pd.DataFrame(rows).astype(str)


def _memory_line(strategy: str, image_size: int, attention: str, precision: str) -> tuple[float, float]:
    """A step's memory, all tokens computed, in MB: the fixed part and the part an image (exactly a line from 2 on)."""
    some, more = (exact.memory(strategy, image_size, attention, precision, n, False).total / 2**20 for n in (32, 33))
    return some - 32 * (more - some), more - some


def step_multiply_adds() -> pd.DataFrame:
    """Multiply-adds of a training step of ViT-B by kind of layer, forward and backward, full and attention-only."""
    rows = []
    for size in (224, 384):
        full, attn = (pd.DataFrame(exact.step_macs(s, size), index=measure.Step._fields) for s in ("full", "attn"))
        full["all"], attn["all"] = full.sum(axis=1), attn.sum(axis=1)
        for kind in full:
            before, after = full[kind].sum(), attn[kind].sum()
            rows.append({
                "image_size": size, "kind": kind, "forward, gmacs_matmul": full.loc["forward", kind] / 1e9,
                "backward, full": full.loc["backward", kind] / 1e9, "backward, attn": attn.loc["backward", kind] / 1e9,
                "step, full": before / 1e9, "step, attn": after / 1e9, "spared, % of the step": 100 * (before - after) / full["all"].sum(),
            })  # fmt: skip
    table = pd.DataFrame(rows).query("kind != 'other'")
    return table.map(lambda value: f"{value:.3f}" if isinstance(value, float) else str(value))


def step_costs(profile_name: str) -> pd.DataFrame:
    """A training step at the profile's own size: time from five process restarts, memory counted; nothing at smoke."""
    p = profile(profile_name)
    if not p.judged:
        return pd.DataFrame({"strategy": ["full", "attn", "ffn", "head"], "step": ["no timing at smoke"] * 4})
    table = pd.DataFrame(finetune_bench.at_profile(p.name))
    full, rows = table[table["arm"] == "full"], []
    for strategy, group in table.groupby("arm", sort=False):
        ratio = full["time_s"].to_numpy() / group["time_s"].to_numpy()
        rows.append({
            "strategy": strategy, "time_s": f"{group['time_s'].median():.4f}",
            "full over this, time_s": f"{ratio.mean():.3f} ± {ratio.std(ddof=1):.3f} (n={len(ratio)})",
            "mem_mb, counted": f"{group['mem_mb'].iloc[0]:.1f}",
            "full over this, mem_mb": f"{full['mem_mb'].iloc[0] / group['mem_mb'].iloc[0]:.3f}",
        })  # fmt: skip
    return pd.DataFrame(rows)


def form_memory() -> pd.DataFrame:
    """Table 3's memory: more pairs over the width of like cost, a training step and a forward pass, counted."""
    printed = paper_table("table3").set_index("model")["peak_mem_mb"].astype(float)
    rows = []
    for more, wide in exact.MORE_PAIRS.items():
        row = {"more pairs / more width": f"{more} / {wide}"}
        row["paper, MB"] = f"{printed[more]:.0f} / {printed[wide]:.0f}"
        row["paper, ratio"] = f"{printed[more] / printed[wide]:.2f}"
        for batch in (1, 32):
            ours = [exact.training_memory(name, batch).total for name in (more, wide)]
            row[f"training step, batch of {batch}, MB"] = " / ".join(f"{v / 2**20:,.0f}" for v in ours)
            row[f"ratio at {batch}"] = f"{ours[0] / ours[1]:.2f}"
        rows.append(row)
    return pd.DataFrame(rows)


def inference_memory(batch: int = 256) -> pd.DataFrame:
    """Table 3's models, a forward pass at its peak in float32, counted: by way of attention, the paper's MB beside."""
    rows = []
    for row in paper_table("table3").itertuples():
        counts = {a: exact.inference_memory(row.model, batch, a) for a in ("explicit", "fused")}
        rows.append({
            "model": row.model, "paper, MB": row.peak_mem_mb, "weights, MB": _megabytes(counts["fused"].weights, digits=0),
            f"{batch} images, MB": _megabytes(counts["fused"].images, digits=0),
            **{f"all, {a} attention, MB": _megabytes(count.total, digits=0) for a, count in counts.items()},
        })  # fmt: skip
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------------------------------------- benchmarks


def fused_sizes() -> pd.DataFrame:
    """What `fuse` makes of the models of Table 4: the same multiply-adds in half the layers."""
    rows = []
    for name in ("S18x2", "B18x2"):
        config = vit_config(name, layer_scale=1e-4)
        with torch.device("meta"):
            model = ViT(config).eval()
            models = {config.name: model, fuse(model).config.name: fuse(model)}
        for label, one in models.items():
            rows.append({
                "model": label, "layers": one.config.depth, "branches": one.config.branches, "heads": one.config.heads,
                "FFN width": one.config.ffn_width or 4 * one.config.width, "params": f"{measure.params(one):,}",
                "gmacs_matmul": f"{measure.macs(one).matmul / 1e9:.3f}",
            })  # fmt: skip
    return pd.DataFrame(rows).astype(str)


def paper_throughput() -> pd.DataFrame:
    """Table 4: images a second on one V100, and the same as a ratio."""
    table = paper_table("table4")
    ratio = table["par_images_per_s"].astype(float) / table["seq_images_per_s"].astype(float)
    columns = ["model", "batch", "seq_images_per_s", "par_images_per_s"]
    return table[columns].assign(**{"par over seq": ratio.map("{:.2f}".format)})


def benchmark(name: str, profile_name: str) -> pd.DataFrame:
    """A benchmark's table: this machine's where it was run here, else the committed one; which of them is a column."""
    for source, path in _bench_paths(name, profile_name):
        if lines := runner.summary(runner.read(path)):
            return pd.DataFrame([{"measured": source} | line for line in lines])
    return pd.DataFrame([{"benchmark": name, "measured": f"{NOT_RUN}: python -m vitlib bench {name}"}])


def _bench_paths(name: str, profile_name: str) -> list[tuple[str, Path]]:
    return [
        (f"here ({profile_name})", runner.path_of(name, profile_name)),
        ("committed reference", paths.REFERENCE / "cpu" / "bench" / f"{name}.csv"),
    ]


def throughput_figure(profile_name: str) -> Figure:
    """How many times as fast at once as one after the other, over the batch: the paper's V100 and what was measured."""
    figure, axes = plt.subplots(figsize=(8.5, 3.2), layout="constrained")
    table = paper_throughput()
    for i, (model, group) in enumerate(table.groupby("model", sort=False)):
        x, y = group["batch"].astype(int), group["par over seq"].astype(float)
        axes.plot(x, y, color=sns.color_palette()[i], marker="o", label=f"{model}, paper, V100")
    measured: dict[str, list[tuple[int, float]]] = {}
    for source, path in _bench_paths("branches", profile_name):
        for row in runner.read(path):
            if row["arm"] == "par" and row["case"].endswith("eager"):
                batch = int(row["case"].split("batch ")[1].split(",")[0])
                measured.setdefault(f"{row['case'].split('/')[0]}, {source}, {row['device']}", []).append(
                    (batch, row["ratio"])
                )
    for i, (label, found) in enumerate(measured.items()):
        middle = pd.DataFrame(found, columns=["batch", "ratio"]).groupby("batch")["ratio"].median()
        axes.plot(middle.index, middle, color=sns.color_palette()[2 + i], marker="D", linestyle="--", label=label)
    axes.axhline(1, color="0.2", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="batch", ylabel="par over seq, images a second")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


# ---------------------------------------------------------------------------------------------------- figures


def theme() -> None:
    sns.set_theme(context="paper", style="whitegrid", palette="colorblind", font_scale=1.1)


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


def stem_figure(arm_runs: Runs) -> Figure:
    """Figure 6's form, in points above the linear stem: across with labels alone, up after masked pre-training.

    One point a stem, with its 95 % intervals over seeds and images. First the paper's own Table 7, on axes of its own;
    then all labels; then the few labels that fine-tuning has. Above the diagonal a stem gains more by pre-training.
    """
    seen = correct(arm_runs)
    stems = [stem for stem in STEM_ARMS if stem != "linear"]
    across = [c for c in ("supervised", "scratch") if {f"linear {c}", "linear pretrained"} <= seen.keys()]
    size = (3 * (1 + len(across)) + 1.4, 3.4)
    figure, (axes,) = plt.subplots(1, 1 + len(across), figsize=size, layout="constrained", squeeze=False)
    paper = {arm: float(value) for arm, value in paper_stems().items()}
    for colour, marker, stem in zip(sns.color_palette("colorblind", len(stems)), "os^vDP*Xp", stems, strict=True):
        look = {"color": colour, "marker": marker, "linestyle": "none"}
        x, y = (paper[f"{stem} {c}"] - paper[f"linear {c}"] for c in ("supervised", "pretrained"))
        axes[0].plot(x, y, label=stem, **look)
        for cell, training in zip(axes[1:], across, strict=True):
            if {f"{stem} {training}", f"{stem} pretrained"} <= seen.keys():
                (x, left, right), (y, down, up) = (_gap(arm_runs, stem, c) for c in (training, "pretrained"))
                cell.errorbar(x, y, xerr=[[left], [right]], yerr=[[down], [up]], elinewidth=0.8, **look)
    titles = {"supervised": "all labels", "scratch": "the same few labels"}
    for cell, name in zip(axes, ("supervised", *across), strict=True):
        cell.axhline(0, color="0.2", linewidth=0.8)
        cell.axvline(0, color="0.2", linewidth=0.8)
        cell.axline((0, 0), slope=1, color="0.6", linewidth=0.8, linestyle=":")
        ours = f"{arm_runs.experiment.profile.name}, {titles[name]}"
        cell.set(title="paper, ImageNet" if cell is axes[0] else ours)
        cell.set(xlabel=f"{name}, minus linear, points", ylabel="pretrained, minus linear, points")
    figure.legend(loc="outside right center", title="stem", fontsize="small")
    return figure


def _gap(arm_runs: Runs, stem: str, training: str) -> tuple[float, float, float]:
    """A stem minus the linear one, points, and how far its interval reaches down and up (0 with one seed)."""
    a, b = (arm_runs.results[f"{name} {training}"] for name in (stem, "linear"))
    mean = float(np.mean([x.metrics["top1"] - y.metrics["top1"] for x, y in zip(a, b, strict=True)]))
    estimate = contrast(arm_runs, f"{stem} {training}", f"linear {training}")
    return (mean, 0.0, 0.0) if estimate is None else (mean, mean - estimate.low, estimate.high - mean)


LEAK_ROWS = {
    "linear": {"stem": "linear"},
    "hMLP, LayerNorm": {"stem": "hmlp", "stem_norm": "ln"},
    "hMLP, BatchNorm": {"stem": "hmlp", "stem_norm": "bn"},
    "convolutional": {"stem": "conv", "stem_norm": "bn"},
}


@functools.cache
def leak_maps() -> dict[tuple[str, str], np.ndarray]:
    """(stem, mode) -> how far each token moves when masked pixels change, (grid, grid)."""
    maps = {}
    for name, stem in LEAK_ROWS.items():
        for mode in ("train", "eval"):
            leak = exact.leak_map(stem, training=mode == "train").numpy()
            maps[name, mode] = leak.reshape(2 * (round(len(leak) ** 0.5),))
    return maps


def leak_table() -> pd.DataFrame:
    """Change of tokens when masked pixels change: the nearest visible tokens, all visible ones, the masked ones."""
    rows = []
    for (stem, mode), leak in leak_maps().items():
        mask = exact.block_mask(len(leak)).numpy().reshape(leak.shape)
        visible = leak[~mask]
        rows.append({
            "stem": stem, "mode": mode, "visible tokens that move": f"{(visible > 0).sum()} of {visible.size}",
            "largest change of a visible token": "0" if visible.max() == 0 else f"{100 * visible.max():.1f} %",
            "mean change of a masked token": f"{100 * leak[mask].mean():.0f} %",
        })  # fmt: skip
    return pd.DataFrame(rows)


def leak_figure() -> Figure:
    """The leak map: rows train and eval, a column a stem; masked tokens outlined."""
    maps, stems = leak_maps(), list(LEAK_ROWS)
    figure, axes = plt.subplots(2, len(stems), figsize=(8.4, 4.4), layout="constrained")
    for (row, mode), (column, stem) in ((a, b) for a in enumerate(("train", "eval")) for b in enumerate(stems)):
        leak, cell = maps[stem, mode], axes[row][column]
        mask = exact.block_mask(len(leak)).numpy().reshape(leak.shape)
        visible = np.where(mask, np.nan, 100 * leak)
        notes = np.where(mask | (leak == 0), "", [[f"{value:.0f}" for value in line] for line in 100 * leak])
        sns.heatmap(
            visible, ax=cell, vmin=0, vmax=60, cmap="rocket_r", annot=notes, fmt="", cbar=False, square=True,
            xticklabels=False, yticklabels=False, linewidths=0.5, linecolor="0.9", annot_kws={"size": 7},
        )  # fmt: skip
        cell.set_facecolor("0.55")
        cell.set_title(stem if row == 0 else "")
        cell.set_ylabel(mode if column == 0 else "")
    figure.colorbar(axes[0][0].collections[0], ax=axes, label="change, % of a token's length", shrink=0.8, extend="max")
    return figure


def masking_figure(profile_name: str, count: int = 4) -> Figure:
    """Images, their block-wise masks, and the k-means prototypes of their patches; of `cpu` where none are in memory."""
    p = profile(profile_name)
    p = profile("cpu") if p.paper else p
    spec = experiment("52", p.name).arms["linear pretrained"].parent.with_seed(p.seeds[0])
    data = load_resized(p.data, "train", p.image_size)
    tokens = tokenizers.make_targets("tokens", data, p.patch_size, spec.seed)
    grid, side, channels = spec.model.grid, p.patch_size, spec.model.in_chans
    masks = masked.block_masks(spec.seed, 0, np.arange(count), grid, spec.masked)
    figure, axes = plt.subplots(3, count, figsize=(1.5 * count, 4.6), layout="constrained")
    for i in range(count):
        image = data.images[i].permute(1, 2, 0).numpy() / 255
        mask = np.kron(masks[i].reshape(grid, grid), np.ones((side, side), dtype=bool))[..., None]
        pieces = tokens.prototypes[tokens.tokens[0, i]].reshape(grid, grid, channels, side, side)
        predicted = pieces.permute(0, 3, 1, 4, 2).reshape(grid * side, grid * side, channels).numpy()
        for row, picture in enumerate((image, np.where(mask, GREY, image), predicted)):
            axes[row][i].imshow(picture, cmap="gray", vmin=0, vmax=1)
            axes[row][i].set(xticks=[], yticks=[])
            axes[row][i].grid(False)
    for row, name in enumerate(("image", f"{spec.masked} of {grid**2} masked", "prototypes")):
        axes[row][0].set_ylabel(name)
    return figure


GREY = 0.55  # of what is masked


def tokenizers_of(arm_runs: Runs) -> list[RunSpec]:
    """The tokenizers that these runs had trained, one a seed; none where they predict k-means tokens or pixels."""
    family = (member for spec in arm_runs.experiment.specs() for member in spec.family())
    return [m for m in dict.fromkeys(family) if m.protocol == "tokenizer" and runs.find(m) is not None]


def codebook_use(specs: Sequence[RunSpec]) -> pd.DataFrame:
    """One row a finished tokenizer: how well it reconstructs held-out images, and how much of its codebook is in use."""
    rows = []
    for spec in specs:
        use, V = runs.find(spec).metrics, spec.model.vocabulary
        rows.append({
            "tokenizer": spec.model.name, "seed": spec.seed, f"tokens used, of {V}": f"{use['tokens_used'] * V:.0f}",
            "perplexity": f"{use['perplexity']:.1f}", "error, of 255 grey levels": f"{255 * use['recon_mse'] ** 0.5:.1f}",
            "first_loss": f"{use['first_loss']:.5f}", "train_loss": f"{use['train_loss']:.3f}",
        })  # fmt: skip
    return pd.DataFrame(rows).astype(str)


def reconstruction_figure(spec: RunSpec) -> tuple[Figure, str]:
    """A finished tokenizer: held-out images, one of each class, above what their tokens give back; and a caption.

    Raises UsageError for a run that is not finished or has no weights here.
    """
    if spec.from_files:
        raise UsageError(f"{spec.data} is read from its files: reconstructions are shown of images in memory")
    data = load_resized(spec.data, spec.split, spec.model.image_size)
    images = normalise(data.images[np.unique(data.labels.numpy(), return_index=True)[1]], data)
    model = runs.trained_tokenizer(spec)
    with torch.no_grad():
        rows = {"image": images, "decoded": model(images)}
    figure, axes = plt.subplots(2, len(images), figsize=(0.8 * len(images), 1.8), layout="constrained")
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        pixels = (pictures * data.std + data.mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        for cell, picture in zip(line, pixels, strict=True):
            cell.imshow(picture, cmap="gray", vmin=0, vmax=1)
            cell.set(xticks=[], yticks=[])
            cell.grid(False)
        line[0].set_ylabel(name)
    caption = (
        f"{card(spec.data)['pretty_name']}, {spec.split} images, one of each class, at {spec.model.image_size} pixels, and "
        f"what the discrete VAE of seed {spec.seed} gives back from {spec.model.grid**2} tokens an image, of "
        f"{spec.model.vocabulary} that there are. The table has all {len(data):,} images."
    )
    return figure, caption


# ---------------------------------------------------------------------------------------------------- verdicts


def verdicts(profile_name: str, notebook: str | None = None) -> list[Verdict]:
    """The verdict on every part of the ledger, or of one notebook, from finished runs; nothing is trained."""
    parts = [part for part in ledger().values() if notebook in (None, part.notebook) and part.belongs(profile_name)]
    return [_verdict(part, profile_name) for part in parts]


def _verdict(entry: Part, profile_name: str) -> Verdict:
    if entry.kind == "exact":
        return judge(entry, {}, profile_name, 0, 0, holds=exact.exact_outcomes()[entry.id])
    try:
        return _trained_verdict(entry, profile_name)
    except DataAbsent as fault:
        return replace(judge(entry, {}, profile_name, profile(profile_name).pairs, 0), note=str(fault))


def _trained_verdict(entry: Part, profile_name: str) -> Verdict:
    p = profile(profile_name)
    part = entry.at_profile(p.name)
    classes = _classes(part, p.name)
    if part.kind == "ratio":
        rows = _timed(part, p.name)
        if not rows:
            return judge(entry, {}, p.name, p.pairs, classes)
        arms = {arm: np.array([row[part.metric] for row in rows if row["arm"] == arm]) for arm in part.contrast}
        hashes = [{entry.key(p.name): rows[0]["ledger"]}]
        device = f"{rows[0]['device']}, {rows[0]['case']}"
        return judge(entry, arms, p.name, p.pairs, classes, hashes=hashes, device=device)
    if NOTEBOOKS[part.notebook][1] is None:  # no run of this kind exists
        return judge(entry, {}, p.name, p.pairs, classes)
    setting = experiment(part.notebook, p.name)
    sizes = (p.pairs, part.min_pairs or p.pairs)
    found = finished(setting, {arm for pairs in sizes for arm in (*part.arms(pairs), part.parent)})
    pairs = _pairs(part, p.pairs, found)
    arms = [arm for arm in part.arms(pairs) if arm in found]
    family = {m for arm in arms for seed in p.seeds for m in setting.arms[arm].with_seed(seed).family()}
    there = {spec: result for spec in family if (result := runs.find(spec)) is not None}
    runs.warn_of_other_files({spec: result.files for spec, result in there.items()})
    hashes = [result.ledger for result in there.values()]
    images = None if part.images == "all" else part.images
    contrasted = {arm for at_size in part.contrasts(pairs) for arm in at_size if arm in found}
    if any(setting.arms[arm].images != images for arm in contrasted):
        hashes = []  # not the number of images that the entry fixes
    seen = correct(Runs(setting, found))
    verdict = judge(entry, seen, p.name, pairs, classes, hashes=hashes)
    names = sorted(r.hash for arm in arms for r in found[arm]) if verdict.estimate else []
    return replace(verdict, runs=tuple(names))


def _classes(part: Part, profile_name: str) -> int:
    """The number of classes of the data that a part's control was trained on; of the profile's where it has no run."""
    p = profile(profile_name)
    arms = experiment(part.notebook, p.name).arms if part.control and NOTEBOOKS[part.notebook][1] else {}
    control = arms.get(arm_at(part.control, p.pairs)) if arms else None
    return control.model.num_classes if control else 0


def _timed(part: Part, profile_name: str) -> list[dict]:
    """The benchmark rows that a ratio is judged on."""
    if part.notebook == "41":
        return finetune_bench.stored(profile_name)
    return runner.evidence("branches", profile_name, part)


def _pairs(part: Part, own: int, found: Mapping[str, object]) -> int:
    """The number of pairs at which a part is looked at: what it asks for where that was run, else the profile's own."""
    wanted = part.min_pairs or own
    return wanted if all(arm in found for arm in part.contrast_at(wanted)) else own


def finished(setting: Experiment, chosen: Collection[str] | None = None) -> dict[str, list[runs.Result]]:
    """Arm -> results at exactly the profile's seeds, of all arms or the chosen ones; one with a seed missing is left out."""
    found = {}
    for arm, spec in setting.arms.items():
        if chosen is not None and arm not in chosen:
            continue
        results = [runs.find(spec.with_seed(seed)) for seed in setting.profile.seeds]
        if all(results):
            found[arm] = results
    return found


def verdict_rows(chosen: Sequence[Verdict], family: Sequence[Verdict]) -> pd.DataFrame:
    """Verdicts as a table to print."""
    table = verdict_table(chosen, family)
    by_part = {v.part.id: v for v in chosen}

    def number(value: object, digits: int = 2, sign: str = "+") -> str:
        return "–" if pd.isna(value) else f"{value:{sign}.{digits}f}"

    def p(value: object) -> str:
        return "–" if pd.isna(value) else f"{value:.3f}" if value >= 0.001 else "< 0.001"

    def paired(estimate: Estimate | None, ratio: bool) -> str:
        return "–" if estimate is None or ratio else "[{:+.2f}, {:+.2f}]".format(*estimate.paired)

    rows = []
    for row in table.itertuples():
        ratio = ledger()[row.part].kind == "ratio"
        sign = "" if ratio else "+"
        ours = "–" if pd.isna(row.ours) else f"{row.ours:{sign}.2f} [{row.low:{sign}.2f}, {row.high:{sign}.2f}]"
        rows.append({
            "part": row.part, "contrast": row.contrast or "exact", "n": "–" if pd.isna(row.n) else str(row.n),
            "ours, points (ratio for F3)": ours, "paper, at its scale": number(row.paper, 2, sign), "margin": number(row.margin, 1, ""),
            "p": p(row.p), "p (Holm)": p(row.p_holm), "verdict": row.verdict,
            "note": by_part[row.part].note or "–", "paired t over seeds": paired(by_part[row.part].estimate, ratio),
            "smallest visible": number(row.smallest_visible, 2, ""),
            "seeds for the paper's difference": "–" if row.seeds_needed is None or pd.isna(row.seeds_needed) else str(row.seeds_needed),
        })  # fmt: skip
    table = pd.DataFrame(rows)
    return table.loc[:, (table != "–").any()]  # at smoke, and where all is exact, most columns would be empty


def stances(chosen: Sequence[Verdict]) -> pd.DataFrame:
    """One row a claim: what its parts say together."""
    rows = []
    for claim in dict.fromkeys(v.part.claim for v in chosen):
        mine = [v for v in chosen if v.part.claim == claim]
        words = "; ".join(f"{v.part.id}: {v.text}" if len(mine) > 1 else v.text for v in mine)
        rows.append({"claim": claim, "says": " ".join(v.part.title for v in mine[:1]), "parts": words,
                     "stance": claim_stance(mine), "notebook": NOTEBOOKS[mine[0].part.notebook][0]})  # fmt: skip
    return pd.DataFrame(rows)


def claims_table(profile_name: str) -> str:
    """Every part's verdict at a profile, for the terminal; also written to outputs/<profile>/claims.csv."""
    every = verdicts(profile_name)
    save_table(verdict_table(every), profile_name, "claims", "")
    table = stances(every)[["claim", "stance", "parts"]]
    return f"claims at profile {profile_name}\n{table.to_markdown(index=False, tablefmt='simple')}"


def tuning_table(profile_name: str, chosen: Mapping[str, tuning.Group]) -> str:
    """Validation accuracy of every arm at every rate, and the margins, for the terminal; also written as CSV, all of them."""
    margins = pd.DataFrame(tuning.margins(profile_name))
    save_table(pd.DataFrame(tuning.table(profile_name, tuning.GROUPS)), profile_name, "tuning", "")
    save_table(margins, profile_name, "margins", "")
    rates = pd.DataFrame(tuning.table(profile_name, chosen))
    parts = [
        table.to_markdown(index=False, tablefmt="simple", floatfmt=".4g") for table in (rates, margins) if len(table)
    ]
    return "\n\n".join(parts)


def save_table(table: pd.DataFrame, profile_name: str, name: str, folder: str = "tables") -> None:
    path = paths.outputs() / profile_name / folder / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)


# ---------------------------------------------------------------------------------------------------- plan


def plan_table(specs: Sequence[RunSpec], jobs: int) -> str:
    """What these runs cost, in one paragraph for the terminal."""
    workers = jobs or cores()
    c = plan.cost(specs, workers)
    return (
        f"{c.runs} runs, {c.missing} of them to train: about {c.cpu_s:,.0f} CPU seconds, "
        f"{c.wall_s / 60:.0f} minutes with {workers} workers, {c.mem_mb:,} MB of memory, {c.disk_mb:.0f} MB of disk"
    )
