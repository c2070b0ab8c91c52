"""What can be counted, at every profile and without training: P1, the memory of P6 and F3, F4, H1 and H2."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from lab.claims.ledger import Part
from lab.claims.statistics import prints_as
from lab.cost import count
from lab.data.cards import load
from lab.paper import paper_table
from vitlib.model import ViT, ViTConfig, stems, vit_config


class Size(NamedTuple):
    """Parameters and multiply-adds (as the paper counts, norms included) of one model."""

    params: int
    macs: int


@functools.cache
def size(config: ViTConfig) -> Size:
    """Counted on the meta device."""
    with torch.device("meta"):
        return Size(count.params(ViT(config)), count.macs(config).paper)


def p1_holds() -> bool:
    """Table 3: every regrouped model has its twin's counts, and both print as the paper prints them."""
    sizes, printed = {}, []
    for row in paper_table("table3").to_dict("records"):
        sizes[row["model"]] = params, macs = size(table3_config(row["model"]))
        printed += [prints_as(params / 1e6, row["params_m"]), prints_as(macs / 1e9, row["gflops"])]
    return all(printed) and sizes["S48x1"] == sizes["S24x2"] and sizes["B36x1"] == sizes["B18x2"]


# Table 3: more pairs, and the more width of like cost that they are compared with
MORE_PAIRS = {"S48x1": "B12x1", "S24x2": "B12x1", "B36x1": "L24x1", "B18x2": "L24x1"}


def table3_config(name: str) -> ViTConfig:
    """A model of Table 3, with LayerScale where the table has it."""
    row = paper_table("table3").set_index("model").loc[name]
    return vit_config(name, layer_scale=1e-4 if row["layer_scale"] == "yes" else None)


@functools.cache
def inference_memory(name: str, batch: int, attention: str) -> count.Memory:
    """A forward pass of a model of Table 3 at its peak, float32: bytes by kind."""
    return count.inference_memory(table3_config(name), batch, attention)


def p6_memory_holds() -> bool:
    """Table 3's column: a forward pass of more pairs needs fewer bytes than one of more width, at a batch of 1 and at 256.

    The column prints less than the weights, gradients and optimizer state of a training step of L24 take.
    """
    return all(
        inference_memory(more, batch, "fused").total < inference_memory(wide, batch, "fused").total
        for more, wide in MORE_PAIRS.items() for batch in (1, 256)
    )  # fmt: skip


def f4_holds() -> bool:
    """Figure 4, left: ViT-B's parameters, those of its attention, and the share that is saved, as printed."""
    row = paper_table("figure4").set_index("panel").loc["parameters"]
    with torch.device("meta"):
        roles = count.params_by_role(ViT(vit_config("B12", layer_scale=1e-4)))
    full, attn = sum(roles.values()), roles["mhsa"]
    saved = prints_as(100 * (1 - attn / full), row["saving_percent"])
    return prints_as(full / 1e6, row["full"]) and prints_as(attn / 1e6, row["attn"]) and saved


def h1_holds() -> bool:
    """Table 7: multiply-adds of ViT-B with a linear and with the hMLP stem as printed, less than 1 % apart."""
    printed = paper_table("table7").query("model == 'ViT-B12'").drop_duplicates("stem").set_index("stem")["gflops"]
    linear, hmlp = (size(vit_config("B12", stem=stem)).macs / 1e9 for stem in ("linear", "hmlp"))
    return prints_as(linear, printed["linear"]) and prints_as(hmlp, printed["hmlp"]) and hmlp < 1.01 * linear


@functools.cache
def memory(
    strategy: str, image_size: int = 384, attention: str = "fused", precision: str = "float32", batch: int = 1,
    skip_unread: bool = False,
) -> count.Memory:  # fmt: skip
    """What a training step of ViT-B with LayerScale holds, with AdamW: bytes by kind, counted.

    Paper: every token is computed in every layer, so that `skip_unread` is off unless asked for.
    """
    config = vit_config("B12", image_size=image_size, layer_scale=1e-4)
    return count.memory(config, strategy, attention, batch, precision, skip_unread=skip_unread)


def f3_memory_holds() -> bool:
    """At 384 pixels training everything keeps more bytes than training attention alone, in all and of activations."""
    full, attn = memory("full"), memory("attn")
    return full.total > attn.total and full.activations > attn.activations


# part -> (stem fields, training mode): what H2 looks at
H2 = {
    "H2-ln": ({"stem": "hmlp", "stem_norm": "ln"}, True),
    "H2-bn-eval": ({"stem": "hmlp", "stem_norm": "bn"}, False),
    "H2-bn-train": ({"stem": "hmlp", "stem_norm": "bn"}, True),
    "H2-conv": ({"stem": "conv", "stem_norm": "bn"}, False),
}
LEAK_IMAGES, LEAK_PATCH = 16, 4


def block_mask(grid: int) -> Tensor:
    """One block of 3 by 2 patches a little off the middle: bool (grid * grid,), True = masked."""
    mask = torch.zeros(grid, grid, dtype=torch.bool)
    mask[grid // 2 - 1 : grid // 2 + 2, grid // 2 - 1 : grid // 2 + 1] = True
    return mask.flatten()


def leak_map(stem: dict[str, object], training: bool) -> Tensor:
    """How far each token moves when the masked pixels are replaced: (patches,), relative to the mean token length.

    A fresh stem (seed 0) on real images at their own resolution; the masked patches get the pixels of another image.
    The mean over images of the change's length; 0 means equal to the last bit.
    """
    held = load("fashion-mnist", "validation")
    images = held.normalise(held.images[: 2 * LEAK_IMAGES])
    config = vit_config(f"W64-1/{LEAK_PATCH}", image_size=images.shape[-1], in_chans=1, num_classes=10, **stem)
    layer = ViT(config, seed=0).stem.train(training)
    mask = block_mask(config.grid).view(config.grid, config.grid)
    return stems.leak_map(layer, images[:LEAK_IMAGES], images[LEAK_IMAGES:], mask, LEAK_PATCH)


@functools.cache
def h2_change(part: str) -> float:
    """The largest change of a visible token, over all of them."""
    stem, training = H2[part]
    leak = leak_map(stem, training)
    return leak[~block_mask(round(len(leak) ** 0.5))].max().item()


_COUNTED = {"P1": p1_holds, "P6-memory": p6_memory_holds, "F3-memory": f3_memory_holds, "F4": f4_holds, "H1": h1_holds}


def holds(part: Part) -> bool:
    """Whether an exact part of the ledger is as it says, counted or measured now."""
    return exact_holds(part.expected, h2_change(part.id)) if part.id in H2 else _COUNTED[part.id]()


def exact_holds(expected: str, value: float) -> bool:
    """Whether a change measured for H2 is what the ledger expects: "0" or "not 0", to the last bit."""
    return (value == 0) == (expected == "0") and math.isfinite(value)
