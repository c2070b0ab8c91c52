"""Models as files, and as timm's models.

`save` and `load` keep a model and its configuration in one safetensors file. `to_timm` builds timm's VisionTransformer
with the same weights and the same logits: a plain ViT for one branch, timm's parallel blocks for several. A fused
18x2 model (`execution.fuse`) therefore leaves as an 18-layer ViT with twice the heads, each of the old size, and a
twice wider FFN, which any library with free head size and FFN width can hold.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from vitlib.errors import UsageError
from vitlib.model.config import ViTConfig
from vitlib.model.vit import ViT

if TYPE_CHECKING:
    from timm.models import VisionTransformer


def save(model: ViT, path: str | Path) -> None:
    """Weights and configuration in one safetensors file."""
    from safetensors.torch import save_file

    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, path, metadata={"format": "pt", "vitlib": json.dumps(asdict(model.config))})


def load(path: str | Path) -> ViT:
    """The model that `save` wrote. Raises UsageError for a file that is none, ValueError for weights that do not fit."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            config = (file.metadata() or {}).get("vitlib")
            state = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as fault:
        raise UsageError(f"{path} cannot be read as a safetensors file ({fault})") from fault
    if config is None:
        raise UsageError(f"{path} was not written by vitlib.model.weights.save: it names no configuration")
    model = ViT(ViTConfig(**json.loads(config)))
    if differ := sorted(model.state_dict().keys() ^ state.keys()):
        raise ValueError(f"{path} does not fit its configuration: {', '.join(differ)}")
    model.load_state_dict(state)
    return model


# ours -> timm's, for one branch and for several
_ONE = {"mhsa.0.norm": "norm1", "mhsa.0.f": "attn", "mhsa.0.gamma": "ls1.gamma",
        "ffn.0.norm": "norm2", "ffn.0.f": "mlp", "ffn.0.gamma": "ls2.gamma"}  # fmt: skip
_SEVERAL = {"mhsa.{}.norm": "attns.{}.norm", "mhsa.{}.f": "attns.{}.attn", "mhsa.{}.gamma": "attns.{}.ls.gamma",
            "ffn.{}.norm": "ffns.{}.norm", "ffn.{}.f": "ffns.{}.mlp", "ffn.{}.gamma": "ffns.{}.ls.gamma"}  # fmt: skip
_LAYER = re.compile(r"layers\.(\d+)\.(mhsa|ffn)\.(\d+)\.(norm|f|gamma)(.*)")


def timm_name(name: str, branches: int) -> str:
    """The name of one of our tensors in timm's model, e.g. layers.3.mhsa.1.f.qkv.weight -> blocks.3.attns.1.attn.qkv.weight."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return name.replace("stem.0.", "patch_embed.proj.")
    layer, kind, k, part, rest = match.groups()
    own = _ONE[f"{kind}.0.{part}"] if branches == 1 else _SEVERAL[f"{kind}.{{}}.{part}"].format(k)
    return f"blocks.{layer}.{own}{rest}"


def to_timm(model: ViT) -> VisionTransformer:
    """timm's VisionTransformer with copies of the weights of `model`, on its device, in its mode: the same logits.

    Stochastic depth is left off: timm's rate grows over the layers. Raises UsageError for what timm's class has not:
    other stems than the linear one, and relative positions.
    """
    from timm.layers import Attention
    from timm.models.vision_transformer import Block, ParallelThingsBlock, VisionTransformer

    c = model.config
    if c.stem != "linear" or (c.stem_norm, c.stem_act) != ("none", "none") or c.pos == "relative":
        raise UsageError(
            f"timm has no such model: stem {c.stem}, pos {c.pos}; allowed are the linear stem, patches or all"
        )

    class Wide(Attention):
        """timm makes heads of size width / heads; a fused model's keep the size that they had."""

        def __init__(self, *sizes, **options):
            super().__init__(*sizes, attn_head_dim=(c.inner or c.width) // c.heads, **options)

    twin = VisionTransformer(
        img_size=c.image_size, patch_size=c.patch_size, in_chans=c.in_chans, num_classes=c.num_classes,
        embed_dim=c.width, depth=c.depth, num_heads=c.heads, mlp_ratio=(c.ffn_width or 4 * c.width) / c.width,
        init_values=c.layer_scale, global_pool="token" if c.pool == "cls" else "avg", fc_norm=False,
        no_embed_class=c.pos == "patches", weight_init="skip",
        block_fn=Block if c.branches == 1 else functools.partial(ParallelThingsBlock, num_parallel=c.branches),
        attn_layer=Attention if c.inner is None else Wide,
    )  # fmt: skip
    state: dict[str, Tensor] = {timm_name(name, c.branches): t.clone() for name, t in model.state_dict().items()}
    twin.to(model.cls_token).load_state_dict(state)
    return twin.train(model.training)
