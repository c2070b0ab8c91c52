"""Models as files, as timm's models, and from the checkpoints of DeiT, DeiT III and timm.

`save` and `load` keep a model and its configuration in one safetensors file. `to_timm` builds timm's VisionTransformer
with the same weights and the same logits: a plain ViT for one branch, timm's parallel blocks for several. A fused
18x2 model (`execution.fuse`) therefore leaves as an 18-layer ViT with twice the heads, each of the old size, and a
twice wider FFN, which any library with free head size and FFN width can hold. `from_timm` is the way back, `save_timm`
writes timm's names for `timm.create_model(..., checkpoint_path=path)`.

The paper's own checkpoints were never released. The nearest are DeiT III's, vanilla ViTs with LayerScale.
Attention-only fine-tuning at 384 starts from one with

    trunk = read_checkpoint("deit_3_small_224_1k.pth")  # or timm's name, deit3_small_patch16_224.fb_in1k
    model = start_from(trunk.state_dict(), at_image_size(trunk.config, 384), seed=0)
    names = freeze(model, "attn")  # attention of every branch, head, positions; the three are in vitlib.train.finetune
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vitlib.errors import UsageError
from vitlib.model.config import WIDTHS, ViTConfig, check
from vitlib.model.layers import EPS, MHSA
from vitlib.model.vit import ViT

if TYPE_CHECKING:
    from timm.models import VisionTransformer

State = Mapping[str, Tensor]
Names = dict[str, str]  # our name inside of a layer -> theirs inside of a block


# ---------------------------------------------------------------------------------------------------- our files


def save(model: ViT, path: str | Path) -> None:
    """Weights and configuration in one safetensors file."""
    _write(model.state_dict(), path, vitlib=json.dumps(asdict(model.config)))


def load(path: str | Path) -> ViT:
    """The model that `save` wrote, in its precision.

    Raises UsageError for a file that is none, and for weights that do not fit, with the keys that differ.
    """
    state, metadata = _safetensors(Path(path))
    if "vitlib" not in metadata:
        raise UsageError(f"{path} was not written by vitlib.model.weights.save: it names no configuration")
    try:
        config = check(ViTConfig(**json.loads(metadata["vitlib"])))
    except (TypeError, json.JSONDecodeError) as fault:
        raise UsageError(f"{path} names a configuration that cannot be read ({fault})") from fault
    return _fill(ViT(config), state, {}, str(path))


def _write(state: State, path: str | Path, **metadata: str) -> None:
    from safetensors.torch import save_file

    save_file({name: t.contiguous() for name, t in state.items()}, path, metadata={"format": "pt"} | metadata)


# ---------------------------------------------------------------------------------------------------- names

# One table per layout, our name of a part of a layer -> theirs in a block. timm, one branch; DeiT without LayerScale.
_ONE = {"mhsa.0.norm": "norm1", "mhsa.0.f": "attn", "mhsa.0.gamma": "ls1.gamma",
        "ffn.0.norm": "norm2", "ffn.0.f": "mlp", "ffn.0.gamma": "ls2.gamma"}  # fmt: skip
# timm, several branches
_SEVERAL = {"mhsa.{}.norm": "attns.{}.norm", "mhsa.{}.f": "attns.{}.attn", "mhsa.{}.gamma": "attns.{}.ls.gamma",
            "ffn.{}.norm": "ffns.{}.norm", "ffn.{}.f": "ffns.{}.mlp", "ffn.{}.gamma": "ffns.{}.ls.gamma"}  # fmt: skip
# Released code: models_v2.py, Layer_scale_init_Block, Block_paralx2 and Layer_scale_init_Block_paralx2
_DEIT = _ONE | {"mhsa.0.gamma": "gamma_1", "ffn.0.gamma": "gamma_2",
                "mhsa.1.norm": "norm11", "mhsa.1.f": "attn1", "mhsa.1.gamma": "gamma_1_1",
                "ffn.1.norm": "norm21", "ffn.1.f": "mlp1", "ffn.1.gamma": "gamma_2_1"}  # fmt: skip
_LAYER = re.compile(r"layers\.(\d+)\.((?:mhsa|ffn)\.\d+\.(?:norm|f|gamma))(.*)")


def timm_names(branches: int) -> Names:
    """timm's names: those of a plain block for one branch, of its parallel block for several."""
    if branches == 1:
        return _ONE
    return {ours.format(k): theirs.format(k) for ours, theirs in _SEVERAL.items() for k in range(branches)}


def their_name(name: str, names: Names) -> str:
    """What one of our tensors is called, e.g. layers.3.mhsa.1.f.qkv.weight -> blocks.3.attns.1.attn.qkv.weight."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return name.replace("stem.0.", "patch_embed.proj.")
    layer, part, rest = match.groups()
    return f"blocks.{layer}.{names[part]}{rest}"


def find_names(state: State) -> tuple[Names, int]:
    """The layout of a checkpoint, and its branches: timm's for several, else DeiT's if a gamma or an attn1 says so."""
    several = {match[1] for name in state if (match := re.match(r"blocks\.0\.attns\.(\d+)\.", name))}
    if several:
        return timm_names(len(several)), len(several)
    two = any(name.startswith("blocks.0.attn1.") for name in state)
    deit = two or any(name.startswith("blocks.0.gamma_") for name in state)
    return (_DEIT if deit else _ONE), (2 if two else 1)


# ---------------------------------------------------------------------------------------------------- to timm


def to_timm(model: ViT) -> VisionTransformer:
    """timm's VisionTransformer with copies of the weights of `model`, on its device, in its mode: the same logits.

    Stochastic depth is left off: timm's rate grows over the layers. Raises UsageError for what timm's class has not:
    other stems than the linear one, and relative positions.
    """
    from timm.layers import Attention
    from timm.models.vision_transformer import Block, ParallelThingsBlock, VisionTransformer

    c = model.config
    state = timm_state(model)

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
    twin.to(model.cls_token).load_state_dict(state)
    return twin.train(model.training)


def timm_state(model: ViT) -> dict[str, Tensor]:
    """Copies of the weights of `model` under timm's names. Raises UsageError as `to_timm`."""
    c = model.config
    if c.stem != "linear" or (c.stem_norm, c.stem_act) != ("none", "none") or c.pos == "relative":
        raise UsageError(
            f"timm has no such model: stem {c.stem}, pos {c.pos}; allowed are the linear stem, patches or all"
        )
    names, state = timm_names(c.branches), model.state_dict()
    if not c.key_bias:  # timm's has one: zero there
        for prefix, module in model.named_modules():
            if isinstance(module, MHSA):
                state[f"{prefix}.qkv.bias"] = module.qkv_bias.detach()
                del state[f"{prefix}.q_bias"], state[f"{prefix}.v_bias"]
    return {their_name(name, names): tensor.clone() for name, tensor in state.items()}


def save_timm(model: ViT, path: str | Path) -> None:
    """The weights alone, under timm's names, in one safetensors file. Raises UsageError as `to_timm`."""
    _write(timm_state(model), path)


# ---------------------------------------------------------------------------------------------------- from timm


def from_timm(model: VisionTransformer) -> ViT:
    """Our ViT with copies of the weights of timm's `model`, on its device, in its mode: the same logits.

    Plain and parallel blocks, with or without LayerScale and a position for the class token, read by class token or
    mean. Dropout and stochastic depth are left off. Raises UsageError for everything that our ViT has not.
    """
    from timm.layers import Attention, LayerScale, PatchEmbed
    from timm.models.vision_transformer import VisionTransformer

    what = f"timm's {type(model).__name__}"
    if not isinstance(model, VisionTransformer) or not isinstance(model.patch_embed, PatchEmbed):
        raise UsageError(f"{what} cannot be read: allowed is timm's VisionTransformer with its linear stem")
    _check_parts(model, what)
    state = {re.sub(r"^fc_norm\.", "norm.", name): tensor.clone() for name, tensor in model.state_dict().items()}
    names, branches = find_names(state)
    config = infer_config(
        state, names, branches, what,
        heads=next((m.num_heads for m in model.modules() if isinstance(m, Attention)), None),
        pool="mean" if model.global_pool == "avg" else "cls",
        layer_scale=next((m.init_values for m in model.modules() if isinstance(m, LayerScale)), None),
    )  # fmt: skip
    return _fill(_empty(config), state, names, what).train(model.training)


def _check_parts(model: VisionTransformer, what: str) -> None:
    """Raises UsageError for a part that ours has not and that the tensors' names and shapes do not show."""
    from timm.layers import Attention

    attention = [module for name, module in model.named_modules() if name.endswith(".attn")]
    attention = {"Attention" if isinstance(m, Attention) else type(m).__name__ for m in attention}
    side = model.patch_embed.grid_size[0] * model.patch_embed.patch_size[0]
    # Behind the class token's selection a norm is the last norm; behind a mean it is another function than before it.
    pooling = model.global_pool if isinstance(model.fc_norm, nn.Identity) else f"{model.global_pool}, then fc_norm"
    # fmt: off
    rows = [  # part, what the model has, what ours has
        ("blocks", {type(block).__name__ for block in model.blocks}, {"Block", "ParallelThingsBlock"}),
        ("attention", attention, {"Attention"}),
        ("activation", {str(m.act) for m in model.modules() if hasattr(m, "act")}, {"GELU(approximate='none')"}),
        ("LayerNorm eps", {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)}, {EPS}),
        ("image size", {tuple(model.patch_embed.img_size)}, {(side, side)}),
        ("pooling", {pooling}, {"token", "avg", "token, then fc_norm"}),
        ("pool_include_prefix", {model.pool_include_prefix}, {False}),
    ]
    # fmt: on
    for part, found, ours in rows:
        if other := " and ".join(sorted(map(str, found - ours))):
            allowed = " or ".join(sorted(map(str, ours)))
            raise UsageError(f"{what} cannot be read: its {part} is {other}, allowed is {allowed}")


# ---------------------------------------------------------------------------------------------------- checkpoints


def read_checkpoint(
    source: str | Path, heads: int | None = None, pool: str = "cls", layer_scale: float = 1e-4, key: str = "model"
) -> ViT:
    """Our ViT with the weights of a checkpoint file in DeiT's, DeiT III's or timm's layout, or of a timm model by name.

    source       .safetensors, or .pth, .pt, .bin of tensors without pickled code; else a timm name, which is downloaded
    and for a file, what its tensors do not show:
    heads        None: the paper's 64 values a head at the paper's widths; to be given at any other width
    pool         what the head reads, "cls" or "mean": DeiT's class token unless told otherwise
    layer_scale  the initial value that the configuration names where the file has LayerScale. Released code: 1e-4
    key          which of a .pth file's states is read, e.g. "model_ema"; a file may also be a bare state

    LayerNorm's eps 1e-6 and GELU are DeiT's and timm's. Stochastic depth is off; fine-tuning sets it with
    `dataclasses.replace(config, drop_path=...)`. Raises UsageError for a file that is damaged, holds code, or is of
    another model, with the keys that differ; nothing is loaded then.
    """
    if Path(source).suffix not in (".safetensors", ".pth", ".pt", ".bin"):
        return from_timm(_download(str(source)))
    state = _tensors(Path(source), key)
    names, branches = find_names(state)
    config = infer_config(state, names, branches, str(source), heads, pool, layer_scale)
    return _fill(_empty(config), state, names, str(source))


def _download(name: str) -> nn.Module:
    """timm's model with its pre-trained weights, from timm's cache or the network."""
    import timm

    if not timm.is_model(name):
        raise UsageError(
            f"{name} is no file in .safetensors, .pth, .pt or .bin and no model of timm: "
            "allowed are such a file and timm's names, for example deit3_small_patch16_224.fb_in1k"
        )
    try:
        return timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError, ValueError) as fault:  # no network, an unknown tag, no such weights
        raise UsageError(f"timm cannot get the weights of {name} ({_first(fault)}): give a file") from fault


def _tensors(path: Path, key: str) -> dict[str, Tensor]:
    """The state that lies under `key` in a file, or the file's own if it is a bare one."""
    if not path.is_file():
        raise UsageError(f"{path} is not there: give a .safetensors, .pth, .pt or .bin file")
    content = _safetensors(path)[0] if path.suffix == ".safetensors" else _pth(path)
    if not isinstance(content, Mapping):
        raise UsageError(f"{path} holds a {type(content).__name__}: allowed is a dictionary of tensors by name")
    state = content.get(key, content if key == "model" else None)
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        states = [str(name) for name, value in content.items() if isinstance(value, Mapping)]
        raise UsageError(f"{path} has no tensors under key {key!r}: allowed are {', '.join(states) or 'bare states'}")
    return dict(state)


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (OSError, SafetensorError) as fault:
        raise UsageError(f"{path} cannot be read as a safetensors file ({_first(fault)})") from fault


def _pth(path: Path) -> object:
    """What torch.save wrote, read without running code.

    DeiT's main.py stores its arguments beside the weights: an argparse.Namespace holds values and no code, so it may
    stand in the file.
    """
    try:
        if zipfile.is_zipfile(path) and (bad := zipfile.ZipFile(path).testzip()):  # torch does not look at checksums
            raise zipfile.BadZipFile(bad)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as fault:  # damaged bytes end in exceptions of every kind
        code = re.search(r"GLOBAL (\S+)", str(fault)) if isinstance(fault, UnpicklingError) else None
        if code:
            raise UsageError(
                f"{path} needs pickled code ({code[1]}), which is never run: allowed are tensors"
            ) from fault
        raise UsageError(f"{path} is damaged or was not written by torch.save ({type(fault).__name__})") from fault


def _first(fault: Exception) -> str:
    """An exception in a line."""
    return (str(fault).strip().splitlines() or [""])[0].rstrip(". ") or type(fault).__name__


# ---------------------------------------------------------------------------------------------------- configuration


def infer_config(
    state: State, names: Names, branches: int, what: str, heads: int | None, pool: str, layer_scale: float | None
) -> ViTConfig:
    """The configuration that the tensors' shapes say; `heads`, `pool` and `layer_scale` are not among them.

    Raises UsageError for another kind of model, with `what` it is, and where heads are not given at a width that is not
    the paper's.
    """
    if distilled := sorted({"dist_token", "head_dist.weight"} & state.keys()):
        raise UsageError(
            f"{what} is a distilled model ({distilled[0]}): allowed are models with one class token and head"
        )
    read = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4,
            f"blocks.0.{names['mhsa.0.f']}.qkv.weight": 2, f"blocks.0.{names['ffn.0.f']}.fc1.weight": 2}  # fmt: skip
    if strange := [name for name, axes in read.items() if name not in state or state[name].ndim != axes]:
        raise UsageError(
            f"{what} is no ViT in DeiT's or timm's layout: {', '.join(strange)} is missing or of another shape"
        )
    token, positions, patch, qkv, fc1 = (tuple(state[name].shape) for name in read)
    width, inner, grid, side = token[-1], qkv[0] // 3, math.isqrt(positions[1]), patch[-1]
    if positions[1] - grid * grid not in (0, 1) or patch[2] != side:
        raise UsageError(
            f"{what} has {positions[1]} positions and patches of {patch[2]}x{side}: allowed are square images of "
            "square patches, with or without a position for the class token"
        )
    config = ViTConfig(
        width=width, depth=_depth(state), branches=branches, in_chans=patch[1], patch_size=side, image_size=grid * side,
        heads=_heads(width, inner, what) if heads is None else heads, num_classes=_classes(state),
        layer_scale=layer_scale if f"blocks.0.{names['mhsa.0.gamma']}" in state else None, pool=pool,
        pos="all" if positions[1] > grid * grid else "patches",
        inner=inner if inner != width else None, ffn_width=fc1[0] if fc1[0] != 4 * width else None,
    )  # fmt: skip
    return check(config)


def _depth(state: State) -> int:
    return len({match[1] for name in state if (match := re.match(r"blocks\.(\d+)\.", name))})


def _classes(state: State) -> int:
    """0: no head."""
    return state["head.bias"].numel() if "head.bias" in state else 0


def _heads(width: int, inner: int, what: str) -> int:
    """Paper: Table 1. Not known for widths that are not there, nor for a fused model, whose attention is wider."""
    heads = dict(WIDTHS.values())
    if width not in heads or inner != width:
        widths = ", ".join(map(str, heads))
        raise UsageError(f"{what} has width {width}, attention {inner}: heads are known at {widths} alone, give heads")
    return heads[width]


# ---------------------------------------------------------------------------------------------------- filling


def _empty(config: ViTConfig) -> ViT:
    """A model without values: no time is spent on an initialisation that is overwritten."""
    with torch.device("meta"):
        return ViT(config)


def _fill(model: ViT, state: State, names: Names, what: str) -> ViT:
    """The model with the tensors of `state` for its own, not copied; without `names` they are ours.

    Raises UsageError with the keys that differ.
    """
    own = model.state_dict()
    theirs = {name: their_name(name, names) if names else name for name in own}
    wanted = {theirs[name]: _kind(tensor) for name, tensor in own.items()}
    found = {name: _kind(tensor) for name, tensor in state.items()}
    differ = [
        f"{name} ({found.get(name, 'missing')}, not {wanted.get(name, 'known')})"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if differ:
        raise UsageError(f"{what} does not fit {model.config.name}: {', '.join(differ)}; nothing was loaded")
    model.load_state_dict({name: state[other] for name, other in theirs.items()}, assign=True)
    return model


def _kind(tensor: Tensor) -> str:
    """Shape, and the type if it is no floating-point one, whose precision may differ: 64x3x4x4."""
    kind = "x".join(map(str, tensor.shape)) or "one number"
    return kind if tensor.is_floating_point() else f"{kind} of {str(tensor.dtype).removeprefix('torch.')}"
