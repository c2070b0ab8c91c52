"""Models as files, fused, as timm's models, and from the checkpoints of DeiT, DeiT III and timm.

`save` and `load` keep a model and its configuration in one safetensors file. `fuse` makes the branches of a parallel
model one. `to_timm` builds timm's VisionTransformer with the same weights and the same logits (a fused 18x2 model is an
18-layer ViT with twice the heads and a twice wider FFN), `from_timm` is the way back.

The paper's checkpoints were never released. The nearest are DeiT III's, vanilla ViTs with LayerScale. Attention-only
fine-tuning at 384 starts from one with

    trunk = read_checkpoint("deit_3_small_224_1k.pth")  # or timm's name, deit3_small_patch16_224.fb_in1k
    model = start_from(trunk.state_dict(), at_image_size(trunk.config, 384), seed=0)
    names = freeze(model, "attn")  # attention of every branch, head, positions; the three are in vitlib.train.finetune
"""

from __future__ import annotations

import functools
import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from vitlib.errors import UsageError
from vitlib.files import first_line, read_pth, read_safetensors, write_safetensors
from vitlib.model.config import WIDTHS, ViTConfig
from vitlib.model.layers import EPS, MHSA, is_plain
from vitlib.model.parallel import side_by_side
from vitlib.model.vit import ViT

State = Mapping[str, Tensor]
Names = dict[str, str]  # our name inside of a layer -> theirs inside of a block


def save(model: ViT, path: str | Path, notes: Mapping[str, str] = {}) -> None:
    """Weights and configuration in one safetensors file, with `notes` in its metadata.

    Hooks are not part of it. Raises UsageError for what `load` would not give back: another class, parts that are not what the
    configuration makes, and values that are absent or not finite.
    """
    state = state_of(model, "saved", hooks=True)
    check_values(state, "this model")
    about = {"format": "pt", "kind": "vit", "vitlib": json.dumps(asdict(model.config))}
    write_safetensors(path, state, about | notes)


def load(path: str | Path) -> ViT:
    """The model that `save` wrote, in its precision.

    Raises UsageError for a file that is none, and for weights that do not fit, with the keys that differ, or are not
    finite. Before memory is taken: what a file asks for is compared with what it holds.
    """
    state, metadata = read_safetensors(path)
    if "vitlib" not in metadata:
        raise UsageError(f"{path} was not written by vitlib.model.weights.save: it names no configuration")
    if (kind := metadata.get("kind", "vit")) != "vit":
        raise UsageError(f"{path} holds a model of kind {kind!r}: allowed is 'vit'")
    config = read_config(metadata, path)
    if config.pairs > len(state):
        raise UsageError(f"{path} asks for {config.pairs:,} pairs of functions and holds {len(state)} tensors")
    try:
        return assemble(config, state, str(path))
    except (RuntimeError, OverflowError, TypeError) as fault:  # sizes that no tensor has
        raise UsageError(f"{path} asks for a model that cannot be ({first_line(fault)})") from fault


def read_config(metadata: Mapping[str, str], path: str | Path) -> ViTConfig:
    """The configuration in a file's metadata."""
    try:
        return ViTConfig(**json.loads(metadata["vitlib"]))
    except (TypeError, ValueError, RecursionError) as fault:  # UsageError is a ValueError
        raise UsageError(f"{path} names a configuration that cannot be read ({first_line(fault)})") from fault


def assemble(config: ViTConfig, state: State, what: str, names: Names | None = None) -> ViT:
    """A ViT whose tensors are those of `state`, shared with whoever has them; under our names, or under theirs by `names`.

    Raises UsageError, with the keys, for tensors that differ from the configuration's or are not finite.
    """
    model = _empty(config)
    ours = model.state_dict()
    theirs = {name: their_name(name, names) if names else name for name in ours}
    if differ := differences({theirs[name]: tensor for name, tensor in ours.items()}, state):
        raise UsageError(f"{what} does not fit {config.name}: {differ}; nothing was loaded")
    check_values(state, what)
    model.load_state_dict({name: state[other] for name, other in theirs.items()}, assign=True)
    return model


def differences(wanted: State, given: State) -> str:
    """The keys that differ, with shapes; empty where none do."""
    a, b = ({name: _shape(tensor) for name, tensor in state.items()} for state in (given, wanted))
    names = [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
    return ", ".join(f"{name} ({a.get(name, 'missing')}, not {b.get(name, 'known')})" for name in names)


def _shape(tensor: Tensor) -> str:
    """Shape, and the type if it is no floating-point one, whose precision may differ: 64x3x4x4."""
    shape = "x".join(map(str, tensor.shape)) or "one number"
    return shape if tensor.is_floating_point() else f"{shape} of {str(tensor.dtype).removeprefix('torch.')}"


def check_values(state: State, what: str) -> None:
    odd = [name for name, tensor in state.items() if not (tensor.is_meta or tensor.float().isfinite().all())]
    if odd:
        raise UsageError(f"{what} has values that are not finite: {', '.join(odd[:8])}{', ...' * (len(odd) > 8)}")


def _empty(config: ViTConfig) -> ViT:
    """Without values: no time is spent on an initialisation that is overwritten."""
    with torch.device("meta"):
        return ViT(config)


def state_of(model: ViT, done: str, hooks: bool = False) -> dict[str, Tensor]:
    """The tensors of a model that is to be `done`, e.g. "fused", if they and its configuration say all that it computes.

    Raises UsageError for what is no ViT, and for parts of another class, form or setting, e.g. an adapter, a quantized layer, or
    another eps. hooks: they, and another `forward` of a part, do not matter.
    """
    if not isinstance(model, ViT):
        raise UsageError(f"{type(model).__name__} cannot be {done}: allowed is a ViT")
    twin, there = _empty(model.config), dict(model.named_modules())
    pairs = [(name, there.get(name, made), made) for name, made in twin.named_modules()]
    for name, module, made in pairs:
        # a subclass of ViT may be; batch norm becomes another class on several GPUs
        kinds = (type(module),) if module is model else (type(made), nn.SyncBatchNorm)
        if not (type(module) in kinds if hooks else is_plain(module, *kinds)):
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            what = f"{name or 'it'} is an adapter, a quantized layer, one with hooks or of another class ({kind})"
            raise UsageError(f"this model cannot be {done}: {what}")
    if differ := differences(twin.state_dict(), state := model.state_dict()):
        raise UsageError(f"this model does not fit its configuration {model.config.name}: {differ}; nothing was {done}")
    for name, module, made in pairs:
        one, other = ((m.extra_repr(), getattr(m, "heads", None)) for m in (module, made))
        if one != other:
            raise UsageError(
                f"this model cannot be {done}: the settings of {name} are not those of {model.config.name}"
            )
    return state


@torch.no_grad()
def fuse(model: ViT) -> ViT:
    """A plain ViT, one branch per layer, with the same logits up to rounding: the branches of a layer made one, for good.

    An 18x2 model becomes an 18-layer ViT with twice the heads and a twice wider FFN; its norms keep no affine part (they
    are 1 and 0) and there is no LayerScale. In eval mode and frozen; `model` stays as it is. To train, use `par`: a
    fused model's matrices are other tensors, and per-tensor optimizers would take other steps.

    Raises UsageError as `state_of`, e.g. for an adapter that is not merged.
    """
    whole = state_of(model, "fused")
    K, config = model.config.branches, model.config
    wide = replace(
        config, branches=1, heads=K * config.heads, inner=K * (config.inner or config.width),
        ffn_width=K * (config.ffn_width or 4 * config.width), layer_scale=None, drop_path=0.0,
        key_bias=True,  # the norm's
    )  # fmt: skip
    state = {name: tensor.clone() for name, tensor in whole.items() if not name.startswith("layers.")}
    if "relative.table" in state:
        state["relative.table"] = state["relative.table"].repeat(1, K)
    for i, layer in enumerate(model.layers):
        for name, (weight, bias) in side_by_side(layer).items():
            at = f"layers.{i}.{'mhsa' if name in ('qkv', 'proj') else 'ffn'}.0"
            state |= {f"{at}.f.{name}.weight": weight, f"{at}.f.{name}.bias": bias.sum(0) if bias.ndim > 1 else bias}
            norm = layer.mhsa[0].norm
            state |= {f"{at}.norm.weight": torch.ones_like(norm.weight), f"{at}.norm.bias": torch.zeros_like(norm.bias)}
    return assemble(wide, state, "this model").eval().requires_grad_(False)


def _layout(*branches: str) -> Names:
    """From their names in each branch: norm, attention and LayerScale, then norm, FFN and LayerScale."""
    ours = [f"{f}.{k}.{part}" for k in range(len(branches)) for f in ("mhsa", "ffn") for part in ("norm", "f", "gamma")]
    return dict(zip(ours, " ".join(branches).split(), strict=True))


_ONE = _layout("norm1 attn ls1.gamma norm2 mlp ls2.gamma")  # timm, one branch; DeiT without LayerScale
# Released code: models_v2.py, Layer_scale_init_Block, Block_paralx2 and Layer_scale_init_Block_paralx2
_DEIT = _layout("norm1 attn gamma_1 norm2 mlp gamma_2", "norm11 attn1 gamma_1_1 norm21 mlp1 gamma_2_1")
_SEVERAL = "attns.{0}.norm attns.{0}.attn attns.{0}.ls.gamma ffns.{0}.norm ffns.{0}.mlp ffns.{0}.ls.gamma"
_LAYER = re.compile(r"layers\.(\d+)\.((?:mhsa|ffn)\.\d+\.(?:norm|f|gamma))(.*)")


def timm_names(branches: int) -> Names:
    """timm's names: those of a plain block for one branch, of its parallel block for several."""
    return _ONE if branches == 1 else _several(branches)


def _several(branches: int) -> Names:
    return _layout(*(_SEVERAL.format(k) for k in range(branches)))


def their_name(name: str, names: Names) -> str:
    """What one of our tensors is called, e.g. layers.3.mhsa.1.f.qkv.weight -> blocks.3.attns.1.attn.qkv.weight."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return name.replace("stem.0.", "patch_embed.proj.")
    layer, part, rest = match.groups()
    return f"blocks.{layer}.{names[part]}{rest}"


def find_names(state: State) -> tuple[Names, int]:
    """The layout of a checkpoint, and its branches: timm's for several, else DeiT's if a gamma or an attn1 says so."""
    parts = {".".join(name.split(".")[2:4]) for name in state if name.startswith("blocks.0.")}
    if several := sum(part.startswith("attns.") for part in parts):
        return _several(several), several
    two = any(part.startswith("attn1.") for part in parts)
    return (_DEIT if two or "gamma_1" in parts else _ONE), (2 if two else 1)


def to_timm(model: ViT) -> nn.Module:
    """timm's VisionTransformer with copies of the weights of `model`, on its device, in its mode: the same logits.

    Stochastic depth is left off: timm's rate grows over the layers. Raises UsageError for what timm's class has not:
    other stems than the linear one, and relative positions.
    """
    from timm.layers import Attention
    from timm.models.vision_transformer import Block, ParallelThingsBlock, VisionTransformer

    state, c = timm_state(model), model.config

    class Wide(Attention):  # timm's heads have size width / heads; a fused model's keep the size that they had
        __init__ = functools.partialmethod(Attention.__init__, attn_head_dim=(c.inner or c.width) // c.heads)

    twin = VisionTransformer(
        img_size=c.image_size, patch_size=c.patch_size, in_chans=c.in_chans, num_classes=c.num_classes,
        embed_dim=c.width, depth=c.depth, num_heads=c.heads, mlp_ratio=((c.ffn_width or 4 * c.width) + 0.5) / c.width,  # timm cuts the half off
        init_values=c.layer_scale, global_pool="token" if c.pool == "cls" else "avg", fc_norm=False,
        no_embed_class=c.pos == "patches", weight_init="skip",
        block_fn=Block if c.branches == 1 else functools.partial(ParallelThingsBlock, num_parallel=c.branches),
        attn_layer=Attention if c.inner is None else Wide,
    )  # fmt: skip
    twin.to(model.cls_token).load_state_dict(state)
    return twin.train(model.training)


def timm_state(model: ViT) -> dict[str, Tensor]:
    """Copies of the weights of `model` under timm's names. Raises UsageError as `to_timm`."""
    state, c = state_of(model, "written as timm's"), model.config
    if (c.stem, c.norm, c.act) != ("linear", "none", "none") or c.pos == "relative":
        raise UsageError(f"timm has no such model: stem {c.stem}, pos {c.pos}; allowed are linear, patches or all")
    names = timm_names(c.branches)
    if not c.key_bias:  # timm's has one: zero there
        for prefix, module in model.named_modules():
            if isinstance(module, MHSA):
                state[f"{prefix}.qkv.bias"] = module.qkv_bias.detach()
                del state[f"{prefix}.q_bias"], state[f"{prefix}.v_bias"]
    return {their_name(name, names): tensor.clone() for name, tensor in state.items()}


def from_timm(model: nn.Module) -> ViT:
    """Our ViT with copies of the weights of timm's `model`, on its device, in its mode: the same logits.

    Plain and parallel blocks, with or without LayerScale and a position for the class token, read by class token or
    mean. Dropout and stochastic depth are left off. Raises UsageError for everything that our ViT has not.
    """
    from timm.layers import Attention, LayerScale, PatchEmbed
    from timm.models.vision_transformer import VisionTransformer

    what = f"timm's {type(model).__name__}"
    if not isinstance(model, VisionTransformer) or not isinstance(model.patch_embed, PatchEmbed):
        raise UsageError(f"{what} cannot be read: allowed is timm's VisionTransformer with its linear stem")
    # Parts that ours has not and that names and shapes of tensors do not show
    attention = [module for name, module in model.named_modules() if name.endswith(".attn")]
    side = model.patch_embed.grid_size[0] * model.patch_embed.patch_size[0]
    # After the class token's selection a norm is the last norm; after a mean it is another function than before it.
    pooling = model.global_pool if isinstance(model.fc_norm, nn.Identity) else f"{model.global_pool}, then fc_norm"
    # fmt: off
    for part, theirs, ours in (
        ("blocks", {type(block).__name__ for block in model.blocks}, {"Block", "ParallelThingsBlock"}),
        ("attention", {"Attention" if isinstance(m, Attention) else type(m).__name__ for m in attention}, {"Attention"}),
        ("activation", {str(m.act) for m in model.modules() if hasattr(m, "act")}, {"GELU(approximate='none')"}),
        ("LayerNorm eps", {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)}, {EPS}),
        ("image size", {tuple(model.patch_embed.img_size)}, {(side, side)}),
        ("pooling", {pooling}, {"token", "avg", "token, then fc_norm"}),
        ("pool_include_prefix", {model.pool_include_prefix}, {False}),
    ):
        if others := theirs - ours:
            other = " and ".join(sorted(str(one) or "none" for one in others))
            allowed = " or ".join(sorted(map(str, ours)))
            raise UsageError(f"{what} cannot be read: its {part} is {other}, allowed is {allowed}")
    # fmt: on
    state = {re.sub(r"^fc_norm\.", "norm.", name): tensor.clone() for name, tensor in model.state_dict().items()}
    scales = (m.init_values for m in model.modules() if isinstance(m, LayerScale))
    pool = "mean" if model.global_pool == "avg" else "cls"
    ours = _ours(state, what, next((m.num_heads for m in attention), None), pool, next(scales, None))
    return ours.train(model.training)


_ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".pth.tar", ".ckpt")


def names_file(source: str | Path) -> bool:
    """Whether this names a file of weights, which may be absent; else it is taken for a timm name."""
    path = Path(source)
    return path.is_file() or path.name.lower().endswith(_ENDINGS)


def read_checkpoint(source: str | Path, heads: int | None = None, pool: str = "cls", key: str = "model") -> ViT:
    """Our ViT with the weights of a checkpoint file in DeiT's, DeiT III's or timm's layout, or of a timm model by name.

    source  a file of tensors (.safetensors or .pth, .pt, .bin, .ckpt); else a timm name, which is downloaded
    and for a file, what its tensors do not show:
    heads   None: the paper's head size, 64, at the paper's widths; to be given at any other width
    pool    what the head reads, "cls" or "mean": DeiT's class token unless told otherwise
    key     which of a .pth file's states is read, e.g. "model_ema"; a file may also be a bare state

    In float32. LayerNorm's eps 1e-6 and GELU are DeiT's and timm's. Stochastic depth is off; fine-tuning sets it with
    `dataclasses.replace(config, drop_path=...)`. Raises UsageError for a file that is damaged, holds code, or is of
    another model, with the keys that differ; nothing is loaded then.
    """
    path = Path(source)
    if not names_file(path):
        return from_timm(_download(str(source)))
    state = {}
    for name, tensor in _tensors(path, key).items():
        # what DistributedDataParallel and torch.compile put before a name goes
        plain = re.sub(r"^((module|_orig_mod|model)\.)+", "", name)
        if plain in state:
            raise UsageError(f"{source} has {plain} twice, once as {name}: allowed is one model")
        # half precision is for storage
        state[plain] = tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor
    return _ours(plain_names(state), str(source), heads, pool)


# -> DeiT's and timm's names
_RENAMED = [
    # Hugging Face's ViT and DINOv2; query, key and value are joined besides
    (r"^(vit|deit|dinov2)\.", ""), (r"^classifier\.", "head."), (r"^layernorm\.", "norm."),
    (r"^embeddings\.(cls_token|mask_token)", r"\1"), (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."), (r"^encoder\.layer\.", "blocks."),
    (r"attention\.output\.dense\.", "attn.proj."), (r"layernorm_before\.", "norm1."),
    (r"layernorm_after\.", "norm2."), (r"intermediate\.dense\.", "mlp.fc1."), (r"(\d)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
    # birder's parallel ViT
    (r"^conv_proj\.", "patch_embed.proj."), (r"^class_token$", "cls_token"), (r"^pos_embedding$", "pos_embed"),
    (r"^encoder\.block\.", "blocks."), (r"\.attn_blocks\.(\d+)\.0\.", r".attns.\1.norm."),
    (r"\.attn_blocks\.(\d+)\.1\.", r".attns.\1.attn."), (r"\.mlp_blocks\.(\d+)\.0\.", r".ffns.\1.norm."),
    (r"\.mlp_blocks\.(\d+)\.1\.0\.", r".ffns.\1.mlp.fc1."), (r"\.mlp_blocks\.(\d+)\.1\.3\.", r".ffns.\1.mlp.fc2."),
    (r"\.attn_blocks\.(\d+)\.2\.", r".attns.\1.ls."), (r"\.mlp_blocks\.(\d+)\.2\.", r".ffns.\1.ls."),
]  # fmt: skip
_UNUSED = re.compile(r"mask_token|pooler\.")  # of pre-training, and a layer that no classifier reads


def plain_names(state: State) -> dict[str, Tensor]:
    """A state under DeiT's or timm's names where it has others; what a classifier does not read is left out."""
    renamed = {}
    for name, tensor in state.items():
        for theirs, ours in _RENAMED:
            name = re.sub(theirs, ours, name)
        renamed[name] = tensor
    q, k, v = (f"attention.attention.{part}." for part in ("query", "key", "value"))
    for name in [name for name in renamed if q in name]:
        three = [name.replace(q, part) for part in (q, k, v)]
        # what does not fit together stays as it is, and is named where the state is read
        if {*three} <= renamed.keys() and len({renamed[one].shape for one in three}) == 1:
            renamed[name.replace(q, "attn.qkv.")] = torch.cat([renamed.pop(one) for one in three])
    return {name: tensor for name, tensor in renamed.items() if not _UNUSED.match(name)}


# words in a key -> what our ViT has not
_FOREIGN = {
    r"reg(ister)?_tokens?\b": "register tokens",
    r"rope|rotary": "rotary positions",
    r"\bw12\b|fc1_g": "a gated FFN",
}


def _download(name: str) -> nn.Module:
    """timm's model with its pre-trained weights, from timm's cache or the network."""
    import timm

    if not timm.is_model(name):
        allowed = "allowed are such a file and timm's names, for example deit3_small_patch16_224.fb_in1k"
        raise UsageError(f"{name} is no file in .safetensors, .pth, .pt or .bin and no model of timm: {allowed}")
    # without a network it says of each retry that there is none
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError, ValueError) as fault:  # no network, an unknown tag, no such weights
        raise UsageError(f"timm cannot get the weights of {name} ({first_line(fault)}): give a file") from fault


def _tensors(path: Path, key: str) -> State:
    """The state that lies under `key` in a file, or the file's content if it is a bare one."""
    if not path.is_file():
        raise UsageError(f"{path} is not there: give a .safetensors, .pth, .pt or .bin file")
    content = read_safetensors(path)[0] if path.suffix.lower() == ".safetensors" else read_pth(path)
    if not isinstance(content, Mapping):
        raise UsageError(f"{path} holds a {type(content).__name__}: allowed is a dictionary of tensors by name")
    state = content.get(key, content if key == "model" else None)
    if not isinstance(state, Mapping) or not all(_is_plain(name, tensor) for name, tensor in state.items()):
        states = [str(name) for name, value in content.items() if isinstance(value, Mapping)]
        raise UsageError(f"{path} has no tensors under key {key!r}: allowed are {', '.join(states) or 'bare states'}")
    return state


def _is_plain(name: object, tensor: object) -> bool:
    """Whether this is a tensor by its name: no sparse or quantized one, none without values."""
    dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_meta
    return isinstance(name, str) and dense and not tensor.is_quantized


def _ours(state: State, what: str, heads: int | None, pool: str, layer_scale: float | None = 1e-4) -> ViT:
    """Our ViT with the tensors of a checkpoint; its configuration is what their shapes say, and the three values.

    layer_scale: the initial value, which a file with LayerScale does not show. Released code: 1e-4.

    Raises UsageError for another kind of model, with `what` it is, and where heads are not given at a width that is not
    the paper's.
    """
    if distilled := sorted({"dist_token", "head_dist.weight"} & state.keys()):
        allowed = "allowed are those with one class token and head"
        raise UsageError(f"{what} is a distilled model ({distilled[0]}): {allowed}")
    for word, part in _FOREIGN.items():
        if key := next((name for name in state if re.search(word, name)), None):
            raise UsageError(f"{what} has {part} ({key}), which this ViT has not: give a checkpoint without them")
    names, branches = find_names(state)
    read = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4,
            f"blocks.0.{names['mhsa.0.f']}.qkv.weight": 2, f"blocks.0.{names['ffn.0.f']}.fc1.weight": 2}  # fmt: skip
    if strange := [name for name, axes in read.items() if name not in state or state[name].ndim != axes]:
        missing = ", ".join(strange)
        raise UsageError(f"{what} is no ViT in DeiT's or timm's layout: {missing} is missing or of another shape")
    token, positions, patch, qkv, fc1 = (tuple(state[name].shape) for name in read)
    width, inner, grid, side = token[-1], qkv[0] // 3, math.isqrt(positions[1]), patch[-1]
    if positions[1] - grid * grid not in (0, 1) or patch[2] != side:
        allowed = "square images of square patches, with or without a position for the class token"
        raise UsageError(f"{what} has {positions[1]} positions and patches of {patch[2]}x{side}: allowed are {allowed}")
    known = dict(WIDTHS.values())  # Paper: Table 1; a fused model's attention is wider
    if heads is None and (width not in known or inner != width):
        widths = ", ".join(map(str, known))
        raise UsageError(f"{what} has width {width}, attention {inner}: heads are known at {widths} alone, give heads")
    config = ViTConfig(
        width=width, depth=len({name.split(".")[1] for name in state if name.startswith("blocks.")}), branches=branches,
        heads=heads or known[width], patch_size=side, image_size=grid * side, in_chans=patch[1],
        num_classes=state["head.bias"].numel() if "head.bias" in state else 0, pool=pool,
        layer_scale=layer_scale if f"blocks.0.{names['mhsa.0.gamma']}" in state else None,
        pos="all" if positions[1] > grid * grid else "patches",
        inner=inner if inner != width else None, ffn_width=fc1[0] if fc1[0] != 4 * width else None,
    )  # fmt: skip
    return assemble(config, state, what, names)
