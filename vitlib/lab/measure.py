"""What a model costs, counted and not timed: parameters, multiply-adds, and the bytes that training keeps.

Exact, without data and without an accelerator: the operations run on the meta device, where tensors have shapes and
no values, so that ViT-L is measured as quickly as a toy. `saved_bytes` also runs on real devices.

Paper: "FLOPs" are multiply-adds as fvcore counts them: matrix products, convolutions and norms, but no softmax,
GELU, residual sum or LayerScale. That is the column `gmacs`; `gmacs_matmul` leaves the norms out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from vitlib.errors import UsageError, unknown
from vitlib.model import ViT, ViTConfig
from vitlib.model.config import check
from vitlib.model.layers import FFN, MHSA, Residual
from vitlib.model.stems import Stem
from vitlib.model.vit import RelativeBias

FLOAT32 = 4  # bytes


def params(model: nn.Module) -> int:
    """Parameters, trainable or not; a tensor that two modules share counts once."""
    return sum(p.numel() for p in model.parameters())


def params_by_role(model: ViT) -> dict[str, int]:
    """Parameters of each role; together they are `params(model)`.

    `mhsa` is qkv and proj and `ffn` is fc1 and fc2, as fine-tuning selects them; the norms in front of them and the
    last one are `norm`. The stem's own norms belong to `stem`, BEiT's table of relative positions to `pos_embed`.
    """
    role: dict[nn.Parameter, str] = {}

    def claim(name: str, parameters: Iterable[nn.Parameter | None]) -> None:
        for p in parameters:
            if p is not None:
                role.setdefault(p, name)  # the first claim holds: a norm inside the stem is stem

    kinds = {"mhsa": MHSA, "ffn": FFN, "stem": Stem, "pos_embed": RelativeBias, "norm": nn.LayerNorm}
    for name, kind in kinds.items():
        claim(name, (p for module in model.modules() if isinstance(module, kind) for p in module.parameters()))
    claim("layer_scale", (module.gamma for module in model.modules() if isinstance(module, Residual)))
    claim("pos_embed", [model.pos_embed])
    claim("cls_token", [model.cls_token])
    claim("head", model.head.parameters())
    claim("other", model.parameters())
    names = ("mhsa", "ffn", "norm", "layer_scale", "stem", "pos_embed", "cls_token", "head", "other")
    return {name: sum(p.numel() for p, own in role.items() if own == name) for name in names}


class Macs(NamedTuple):
    """Multiply-adds of one image's forward pass. In tables: 1e-9 of it, rounded."""

    matmul: int  # gmacs_matmul: matrix products and convolutions
    paper: int  # gmacs: and the norms, as fvcore counts them


def macs(model: ViTConfig | nn.Module, image_size: int | None = None) -> Macs:
    """Multiply-adds of one image, counted from the operations that run in eval mode.

    A model is counted as it stands, fused or frozen, without being copied or changed. `image_size` (pixels) replaces
    a configuration's own; a model has its size built in, and only one without a `config` (timm's) must be told it.
    """
    if isinstance(model, ViTConfig):
        config = model if image_size is None else check(replace(model, image_size=image_size))
        with torch.device("meta"):
            model = ViT(config)
    else:
        config = getattr(model, "config", None)
        if (config is None) == (image_size is None):
            raise UsageError("macs wants an image_size with a configuration or with a model that has none")
    channels, side = (3, image_size) if config is None else (config.in_chans, config.image_size)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    training = {module: module.training for module in model.modules()}
    # On the meta device attention runs as two batched matrix products, N x N x D each, which are counted; the fused
    # kernel of a CPU would not be.
    counter = FlopCounterMode(display=False, custom_mapping=NORMS)
    skip = getattr(model, "skip_unread", None)
    try:
        if skip:
            model.skip_unread = False  # Paper: counted with every token in every layer
        with torch.no_grad(), counter:
            functional_call(model.eval(), state, torch.empty(1, channels, side, side, device="meta"))
    finally:
        if skip:
            del model.skip_unread
        for module, mode in training.items():
            module.training = mode
    counts = counter.get_flop_counts()["Global"]
    norms = sum(n for op, n in counts.items() if op in NORMS)
    matmul = (counter.get_total_flops() - norms) // 2  # a multiply-add is two FLOPs
    return Macs(matmul, matmul + norms)


def _layer_norm(x: torch.Size, shape: torch.Size, weight: torch.Size | None = None, *_, **__) -> int:
    """fvcore, norm_flop_counter: 4 per element, and one for the affine part. Called with shapes."""
    return (4 if weight is None else 5) * x.numel()


def _batch_norm(x: torch.Size, weight: torch.Size | None = None, *_, **__) -> int:
    """fvcore, batchnorm_flop_jit in eval mode: one per element, and one for the affine part."""
    return (1 if weight is None else 2) * x.numel()


# The operations that nn.LayerNorm, and nn.BatchNorm2d in eval mode, come down to.
NORMS = {
    torch.ops.aten.native_layer_norm: _layer_norm,
    torch.ops.aten._native_batch_norm_legit_no_training: _batch_norm,
}


def saved_bytes(model: nn.Module, images: Tensor, loss_fn: Callable[[Tensor], Tensor], attention: str = "fused") -> int:
    """Bytes that autograd keeps from `loss_fn(model(images))` for the backward pass: the activation memory.

    Every distinct storage counts once and whole, also where only a view of it is kept; parameters and buffers, which
    are there anyway, do not count. The images do, if what reads them trains. Runs where `images` and `model` are,
    the meta device included, in the mode (train or eval) that the model is in.

    Two ways of attention keep different things: "fused" (PyTorch's kernels) keeps q, k, v and a number per query;
    "explicit" keeps the (B, H, N, N) maps too. A bias on the attention logits that trains makes it explicit always.
    """
    if attention not in ("fused", "explicit"):
        raise unknown("attention", attention, ("fused", "explicit"))
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # holding the storages, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        # `_cdata` is the storage's own address: data_ptr() is 0 for every meta tensor.
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return tensor

    with ExitStack() as stack:
        if attention == "explicit":
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        elif images.is_meta:
            stack.enter_context(_FusedOnMeta())
        stack.enter_context(saved_tensors_hooks(pack, lambda tensor: tensor))
        # Held until the count is taken: with the loss goes the graph.
        loss = loss_fn(model(images))
    total = sum(storage.nbytes() for storage in kept.values())
    del loss
    return total


class _FusedOnMeta(TorchFunctionMode):
    """Attention by the fused CPU kernel's meta form, so that a meta model keeps what a real one keeps."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and kwargs.get("attn_mask") is None:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args[:3])[0]
        return func(*args, **kwargs)


def training_state(model: nn.Module) -> dict[str, int]:
    """Bytes that training holds besides activations, float32: all weights, and for the trainable ones their
    gradients and AdamW's state (two moments, and one step count a tensor).
    """
    trainable = [p.numel() for p in model.parameters() if p.requires_grad]
    return {
        "weights": FLOAT32 * params(model),
        "gradients": FLOAT32 * sum(trainable),
        "adamw": FLOAT32 * (2 * sum(trainable) + len(trainable)),
    }
