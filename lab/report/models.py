"""Sizes: parameters and multiply-adds of the paper's models and of ours, counted."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import torch

from lab.claims import exact
from lab.claims.statistics import prints_as
from lab.cost import count
from lab.experiments.catalogue import Experiment
from lab.paper import paper_table
from lab.report.accuracy import arms_of
from vitlib.model import ViT, ViTConfig, fuse, vit_config


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
    for arm, spec in arms_of(setting).items():
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
                "FFN width": one.config.ffn_width or 4 * one.config.width, "params": f"{count.params(one):,}",
                "gmacs_matmul": f"{count.macs(one).matmul / 1e9:.3f}",
            })  # fmt: skip
    return pd.DataFrame(rows).astype(str)
