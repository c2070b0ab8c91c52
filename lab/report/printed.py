"""The paper's own numbers, in the form in which ours stand beside them."""

from __future__ import annotations

import pandas as pd

from lab.experiments.small import STEM_ARMS, stem_pairs
from lab.paper import as_printed, paper_table
from vitlib.model import ViTConfig, vit_config


def paper_stem(name: str) -> ViTConfig:
    """A row of Table 7 as the paper has it: ViT-B12 with that stem, and ViT-B13, the linear baseline of like cost."""
    return vit_config(f"B{stem_pairs(name, 12)}", **STEM_ARMS[name])


def printed_stem(name: str) -> pd.Series:
    """The paper's own row."""
    config, table = paper_stem(name), paper_table("table7").set_index(["stem", "norm", "act", "model"])
    return table.loc[(config.stem, config.norm, config.act, f"ViT-B{config.depth}")]


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
    return {f"{stem} {c}": printed_stem(stem)[column] for stem in STEM_ARMS for c, column in columns.items()}


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


def paper_throughput() -> pd.DataFrame:
    """Table 4: images a second on one V100, and the same as a ratio."""
    table = paper_table("table4")
    ratio = table["par_images_per_s"].astype(float) / table["seq_images_per_s"].astype(float)
    columns = ["model", "batch", "seq_images_per_s", "par_images_per_s"]
    return table[columns].assign(**{"par over seq": ratio.map("{:.2f}".format)})
