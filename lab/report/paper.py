"""The paper's numbers in the form in which ours stand beside them: frames, and cells by the arms that they belong to."""

from __future__ import annotations

import pandas as pd

from lab.experiments.small import STEM_ARMS, stem_pairs
from lab.paper import paper_numbers, paper_table
from lab.report.tables import columns, framed
from vitlib.model import ViTConfig, vit_config

Cell = dict[str, object]  # a printed number: paper (its value), digits (after the point), chart (a mark, or "")


def cell(text: str, confidence: str = "read") -> Cell:
    """A number with the digits that it is printed with; empty where the paper has none."""
    chart = " (chart)" if confidence == "read-chart" else ""
    return {"paper": float(text), "digits": len(text.partition(".")[2]), "chart": chart} if text else {}


# ---------------------------------------------------------------------------------------------------- by arm


def recipes() -> dict[str, Cell]:
    """Tables 1 and 8: this recipe by width, with LayerScale ("+LS") and without, and DeiT's."""
    cells = {f"{row.model}{'+LS' if row.layer_scale == 'yes' else ''}": cell(row.top1) for row in rows("table1")}
    deit = paper_table("table8").query("procedure == 'DeiT'").itertuples()
    return cells | {f"{row.model.removeprefix('ViT-')}12 DeiT": cell(row.top1) for row in deit}


def branches() -> dict[str, Cell]:
    """ViT-B at 36 pairs: Figure 1 without LayerScale, Table 3 with it ("+LS"). The paper has nothing like 12 pairs + LS."""
    table3 = {f"{row.model.removeprefix('B')}+LS": cell(row.top1) for row in rows("table3", model=["B36x1", "B18x2"])}
    return pairs("figure1", "ViT-B36") | table3


def pairs(name: str = "figure3", family: str = "ViT-B") -> dict[str, Cell]:
    """Figure 3, or another of its form: ViT-B by layers and branches."""
    return {row.model.removeprefix("B"): cell(row.top1, row.confidence) for row in rows(name, model_family=[family])}


def resolution() -> dict[str, Cell]:
    """Table 5 on ImageNet-val, by strategy."""
    (row,) = rows("table5", model=["ViT-B"], optimizer=["AdamW"], dataset=["val"])
    return {strategy: cell(getattr(row, strategy)) for strategy in ("full", "attn", "ffn")}


def stems() -> dict[str, Cell]:
    """Table 7: supervised, and after masked pre-training and fine-tuning; a stem that the table does not have is absent."""
    printed = {stem: row for stem in STEM_ARMS if (row := stem_row(stem)) is not None}
    trainings = ("supervised", "pretrained")
    return {f"{stem} {name}": cell(row[f"{name}_top1"]) for stem, row in printed.items() for name in trainings}


def stem_config(name: str) -> ViTConfig:
    """A row of Table 7 as the paper has it: ViT-B12 with that stem, and ViT-B13, the linear baseline of like cost."""
    return vit_config(f"B{stem_pairs(name, 12)}", **STEM_ARMS[name])


def stem_row(name: str) -> pd.Series | None:
    """The row of Table 7 that a stem of ours stands for, or None."""
    config, table = stem_config(name), paper_table("table7").set_index(["stem", "norm", "act", "model"])
    place = (config.stem, config.norm, config.act, f"ViT-B{config.depth}")
    return table.loc[place] if place in table.index else None


def rows(name: str, **where: list[str]) -> list:
    """The rows of a table of the paper whose columns have one of these values, cells as text."""
    table = paper_table(name)
    for column, values in where.items():
        table = table[table[column].isin(values)]
    return list(table.itertuples())


# ---------------------------------------------------------------------------------------------------- frames

ACCURACIES = columns(top1=".1f", top1_v2=".1f")


def baselines() -> pd.DataFrame:
    """Table 1: accuracies and throughput of the baselines."""
    layout = {"model": "{printed_name}"} | columns("epochs") | {"LayerScale": "{layer_scale}"} | ACCURACIES
    return framed(paper_numbers("table1"), layout | columns("images_per_s"))


def forms() -> pd.DataFrame:
    """Table 3: accuracy and memory of more pairs and of more width."""
    layout = columns("model") | {"LayerScale": "{layer_scale}"} | columns(params_m=".1f", gflops=".1f", peak_mem_mb="")
    return framed(paper_numbers("table3"), layout | ACCURACIES)


def procedures() -> pd.DataFrame:
    """Table 8: top-1 of the same models by five training procedures, epochs in brackets."""
    table, layout = paper_numbers("table8"), columns("procedure")
    wide = table.pivot(index="procedure", columns="model", values=["top1", "top1_sd", "epochs"])
    wide.columns = [f"{model} {quantity}" for quantity, model in wide.columns]
    for model in table["model"].unique():
        top1, epochs = f"{{{model} top1:.1f}}", f"({{{model} epochs}} ep)"
        layout[model] = (f"{top1} ± {{{model} top1_sd:.2f}} {epochs}", f"{top1} {epochs}")
    return framed(wide.loc[table["procedure"].unique()].reset_index(), layout)


def layer_scale() -> pd.DataFrame:
    """Table 2: 36 pairs of ViT-B, and what two branches gain over one in each row, in points."""
    table = paper_numbers("table2").pivot(index=["epochs", "layer_scale"], columns="model", values=["top1", "top1_v2"])
    table.columns = [f"{model}, {column}" for column, model in table.columns]
    layout = columns("epochs") | {"LayerScale": "{layer_scale}"} | columns(**dict.fromkeys(table, ".1f"))
    for column in ("top1", "top1_v2"):
        table[f"x2 - x1, {column}"] = table[f"B18x2, {column}"] - table[f"B36x1, {column}"]
        layout |= columns(**{f"x2 - x1, {column}": "+.1f"})
    return framed(table.reset_index(), layout)


def figure1() -> pd.DataFrame:
    """Figure 1 as the paper has it, read off the chart: top-1 on ImageNet by number of branches."""
    table = paper_numbers("figure1").pivot(index="branches", columns="model_family", values="top1")
    layout = columns("branches") | {f"{family}, chart ± 0.1": f"{{{family}:.1f}}" for family in table}
    return framed(table.reset_index(), layout)


def gaps(name: str, size: str) -> pd.DataFrame:
    """Figure 2 ("figure2", "width") or 3 ("figure3", "pairs"), read off the chart: top-1, and two branches minus one in points."""
    table = paper_numbers(name)
    table = table.assign(layer_scale=table.get("layer_scale", "no"))
    wide = table.pivot(index=["model_family", size, "layer_scale"], columns="branches", values="top1").reset_index()
    wide = wide.sort_values(["model_family", size] if size == "pairs" else size)
    wide = wide.rename(columns={1: "one", 2: "two"}).assign(points=wide[2] - wide[1])
    layout = columns(f"model_family {size}") | {"LayerScale": "{layer_scale}"}
    return framed(wide, layout | {"x1, chart": "{one:.1f}", "x2, chart": "{two:.1f}", "x2 - x1": "{points:+.1f}"})


def transfer() -> pd.DataFrame:
    """Table 6, a row per data set and model, data sets by their training images (Table 9)."""
    table, images = paper_numbers("table6"), paper_numbers("table9").set_index("dataset")["train_images"]
    table = table.assign(images=table["dataset"].map(images), points=table["attn"] - table["full"])
    layout = {"data set": "{dataset}"} | columns(images=",") | columns("model", full=".1f", attn=".1f", ffn=".1f")
    table = table.sort_values(["images", "dataset"], kind="stable")
    return framed(table, layout | {"attn - full": "{points:+.1f}"})


def throughput() -> pd.DataFrame:
    """Table 4: images per second on one V100, and the same as a ratio."""
    table = paper_numbers("table4")
    table["ratio"] = table["par_images_per_s"] / table["seq_images_per_s"]
    return framed(table, columns("model batch seq_images_per_s par_images_per_s") | {"par over seq": "{ratio:.2f}"})


# ---------------------------------------------------------------------------------------------------- others


def elsewhere(*claims: str) -> pd.DataFrame:
    """What others measured of these claims, with its source and what must be said of it."""
    table = paper_numbers("elsewhere")
    mine = table[[bool({*claims} & {*names.split()}) for names in table["claims"]]]
    layout = columns("model") | {"trained": "{trained}", "data": "{data}", "top1": "{top1:.2f}"}
    return framed(mine, layout | columns("source caveat"))
