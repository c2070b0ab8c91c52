"""What a model and a run cost, counted and not timed: parameters, multiply-adds, and the bytes that training keeps.

Exact, without data and without an accelerator: the operations run on the meta device, where tensors have shapes and
no values, so that ViT-L is counted as quickly as a toy. `saved_bytes` and `counted` also run on real devices.

Paper: "FLOPs" are multiply-adds as fvcore counts them: matrix products, convolutions and norms, but no softmax,
GELU, residual sum or LayerScale. That is the column `gmacs`; `gmacs_matmul` leaves the norms out.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from lab.runs.spec import RunSpec
from vitlib.errors import unknown
from vitlib.model import ViT, ViTConfig
from vitlib.model.layers import FFN, MHSA
from vitlib.model.stems import Stem
from vitlib.model.vit import RelativeBias
from vitlib.train.dvae import DVAE, DVAEConfig
from vitlib.train.finetune import freeze
from vitlib.train.tokenizers import VOCABULARY

FLOAT32 = 4  # bytes
ATTENTION, PRECISIONS = ("fused", "explicit"), ("float32", "amp")
# Layers by role; the first that holds a parameter counts: the stem's own norms are stem, the others `norm`.
LAYERS = {"mhsa": MHSA, "ffn": FFN, "stem": Stem, "pos_embed": RelativeBias, "norm": nn.LayerNorm}


def params(model: nn.Module) -> int:
    """Parameters, trainable or not; a tensor that two modules share counts once."""
    return sum(p.numel() for p in model.parameters())


def params_by_role(model: ViT) -> Counter[str]:
    """Parameters of each role; together they are `params(model)`. `mhsa` and `ffn` are what fine-tuning selects."""
    within: dict[nn.Parameter, str] = {}
    for role, kind in LAYERS.items():
        for layer in (module for module in model.modules() if isinstance(module, kind)):
            within = dict.fromkeys(layer.parameters(), role) | within
    sizes = Counter()
    for name, p in model.named_parameters():
        sizes[within.get(p, "layer_scale" if name.endswith(".gamma") else name.partition(".")[0])] += p.numel()
    return sizes


def _on_meta(config: ViTConfig | DVAEConfig, strategy: str = "full") -> nn.Module:
    """The model that trains, without its values, in training mode."""
    with torch.device("meta"):
        model = ViT(config) if isinstance(config, ViTConfig) else _Relaxed(config)
    freeze(model, strategy)
    return model


def _images(config: ViTConfig | DVAEConfig, batch: int = 1) -> Tensor:
    return torch.empty(batch, config.in_chans, config.image_size, config.image_size, device="meta")


def by_depth(count: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """`count(config, ...)`: layers between the first and the last count the same, so two layers, and what a third adds."""

    @functools.cache
    def counted(config: ViTConfig | DVAEConfig, *settings: object) -> np.ndarray:
        if getattr(config, "depth", 0) <= 3:
            return np.array(count(config, *settings))
        two, three = (counted(replace(config, depth=depth), *settings) for depth in (2, 3))
        return two + (config.depth - 2) * (three - two)

    return counted


# ---------------------------------------------------------------------------------------------------- multiply-adds


class Macs(NamedTuple):
    """Multiply-adds of one image's forward pass. In tables: 1e-9 of it, rounded."""

    matmul: int  # gmacs_matmul: matrix products and convolutions
    paper: int  # gmacs: and the norms, as fvcore counts them


def macs(model: ViTConfig | DVAEConfig | nn.Module, shape: tuple[int, int, int] | None = None) -> Macs:
    """Multiply-adds of one image, counted from the operations that run in eval mode.

    A model is counted as it is, fused or frozen, and stays so; one without a `config` needs the `shape` (C, H, W) of an image.
    """
    if isinstance(model, ViTConfig | DVAEConfig):
        return Macs(*_macs_of(model).tolist())
    images = _images(model.config) if shape is None else torch.empty(1, *shape, device="meta")
    model = copy.deepcopy(model).to("meta").eval()
    model.skip_unread = False  # Paper: counted with every token in every layer
    # On the meta device attention runs as two batched matrix products, N x N x D each, which are counted.
    with torch.no_grad(), Products() as products:
        model(images)
    return Macs(products.total, products.total + products.norms)


@by_depth
def _macs_of(config: ViTConfig | DVAEConfig) -> Macs:
    return macs(_on_meta(config))


KINDS = ("mhsa", "attention", "ffn", "stem", "head", "other")


class Step(NamedTuple):
    """Multiply-adds of one image's training step."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        return sum(self)


def step_macs(config: ViTConfig, strategy: str) -> dict[str, Step]:
    """Multiply-adds of one image's training step by kind of layer, counted from the operations that run.

    Matrix products and convolutions, as `gmacs_matmul`, with every token in every layer. `mhsa` is qkv and proj,
    `attention` the N x N products, `other` what no such layer does: 0. Raises UsageError for an unknown strategy.
    """
    return {kind: Step(*counts) for kind, counts in zip(KINDS, _step_macs(config, strategy).tolist(), strict=True)}


@by_depth
def _step_macs(config: ViTConfig, strategy: str) -> list[list[int]]:
    """(kinds, 2), forward and backward."""
    model, products = _on_meta(config, strategy), Products()
    model.skip_unread = False
    for module in model.modules():
        kind = next((name for name in ("mhsa", "ffn", "stem") if isinstance(module, LAYERS[name])), None)
        if kind or module is model.head:
            module.register_forward_pre_hook(lambda *_, kind=kind or "head": setattr(products, "kind", kind))
            module.register_forward_hook(lambda *_: setattr(products, "kind", "other"))
    with products:
        model(_images(config)).sum().backward()
    return [[products.macs[kind, way] for way in Step._fields] for kind in KINDS]


def counted(step: Callable[[], object]) -> int:
    """Multiply-adds of the products and the attention that reach the device in one step, forward and backward."""
    with Products() as products:
        step()
    return products.total


class Products(TorchDispatchMode):
    """Counts products by kind of layer, and what norms do. A backward operation is of the kind of the forward one that
    it belongs to: autograd numbers the operations that it records, and knows at any time which of them it is at.

    (PyTorch's FlopCounterMode has hooks on all modules, with which branches run one after the other.)
    """

    def __init__(self):
        super().__init__()
        self.macs: Counter[tuple[str, str]] = Counter()
        self.norms = 0
        self.kind = "other"  # where the forward pass is
        self.kinds: dict[int, str] = {}  # by autograd's number

    @property
    def total(self) -> int:
        return sum(self.macs.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out, op = func(*args, **kwargs), func.overloadpacket
        if op in NORMS:
            self.norms += NORMS[op](*args, **kwargs, out_val=out)
        elif op in PRODUCTS:
            products = PRODUCTS[op](*args, **kwargs, out_val=out) // 2  # a multiply-add is two FLOPs
            node = torch._C._current_autograd_node()
            if node is not None:
                self.macs[self.kinds.get(node._sequence_nr(), "other"), "backward"] += products
            else:
                kind = "attention" if self.kind == "mhsa" and op is torch.ops.aten.bmm else self.kind
                self.macs[kind, "forward"] += products
                # The first operation after a number was given out has it; one without gradients gets none.
                self.kinds.setdefault(torch.autograd._get_sequence_nr() - 1, kind)
        return out


@shape_wrapper
def _layer_norm(x: torch.Size, shape: torch.Size, weight: torch.Size | None = None, *_, **__) -> int:
    """fvcore, norm_flop_counter: 4 per element, and one for the affine part."""
    return (4 if weight is None else 5) * x.numel()


@shape_wrapper
def _batch_norm(x: torch.Size, weight: torch.Size | None = None, *_, **__) -> int:
    """fvcore, batchnorm_flop_jit in eval mode: one per element, and one for the affine part."""
    return (1 if weight is None else 2) * x.numel()


# The operations that nn.LayerNorm, and nn.BatchNorm2d in eval mode, come down to.
NORMS = {torch.ops.aten.native_layer_norm: _layer_norm, torch.ops.aten.native_batch_norm: _batch_norm}
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# PyTorch counts its GPU kernels for attention; these two are the CPU's.
PRODUCTS = flop_registry | {
    _flash: shape_wrapper(lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)),
    _flash_backward: shape_wrapper(lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)),
}


# ---------------------------------------------------------------------------------------------------- bytes


def saved_bytes(model: nn.Module, images: Tensor, loss_fn: Callable[[Tensor], Tensor], attention: str = "fused") -> int:
    """Bytes that autograd keeps from `loss_fn(model(images))` for the backward pass: the activation memory.

    Every distinct storage counts once and whole, also where only a view of it is kept; parameters and buffers do not
    count, the images do, if what reads them trains. The model runs as it is, where it is, the meta device included.
    `attention`: "fused" (PyTorch's kernels) keeps q, k, v and a number per query, "explicit" (the released code's lines)
    the (B, H, N, N) maps too. A bias on the attention logits that trains makes it explicit always.
    """
    known = _storages((*model.parameters(), *model.buffers())).keys()
    kept: dict[int, torch.UntypedStorage] = {}  # holding the storages, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        kept.update(_storages([tensor]))
        return tensor

    with ExitStack() as stack:
        if attention != "fused" or images.is_meta:
            stack.enter_context(AttentionAs(attention))
        stack.enter_context(saved_tensors_hooks(pack, lambda tensor: tensor))
        loss = loss_fn(model(images))  # named, because with the loss goes the graph
    total = sum(storage.nbytes() for key, storage in kept.items() if key not in known)
    del loss
    return total


def _storages(values: object) -> dict[int, torch.UntypedStorage]:
    """Storages of all tensors in `values` by their own address: data_ptr() is 0 for every meta tensor."""
    storages = (value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor))
    return {storage._cdata: storage for storage in storages}


class AttentionAs(TorchFunctionMode):
    """Attention in the released code's lines, or by a fused kernel's meta form: without values no kernel is chosen."""

    def __init__(self, attention: str):
        if attention not in ATTENTION:
            raise unknown("attention", attention, ATTENTION)
        super().__init__()
        self.attention = attention

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = args
        mask = kwargs.get("attn_mask")
        if self.attention == "fused" and mask is None:
            return _flash(q, k, v)[0]
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # Released code: models_v2.py, Attention
        return (logits if mask is None else logits + mask).softmax(dim=-1) @ v


class Memory(NamedTuple):
    """Bytes that a training step holds, or a forward pass at its peak."""

    weights: int
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0  # of a step: what autograd keeps; of a forward pass: the most that results hold at one time
    images: int = 0  # of a forward pass; those that a step keeps are among its activations

    @property
    def total(self) -> int:
        return sum(self)


def training_state(model: nn.Module, optimizer: str = "adamw") -> Memory:
    """All weights, and for the trainable ones their gradients and the optimizer's state, float32: the one momentum of
    "sgd", or the two moments and one step count per tensor of others.
    """
    trainable = [p.numel() for p in model.parameters() if p.requires_grad]
    state = sum(trainable) if optimizer == "sgd" else 2 * sum(trainable) + len(trainable)
    return Memory(FLOAT32 * params(model), FLOAT32 * sum(trainable), FLOAT32 * state)


def memory(
    config: ViTConfig, strategy: str, attention: str = "fused", batch: int = 1, precision: str = "float32", skip_unread: bool = True
) -> Memory:  # fmt: skip
    """What a training step with AdamW on `batch` images holds under a fine-tuning strategy, counted without data or GPU.

    `attention` as in `saved_bytes`; the loss is cross-entropy with class numbers. "amp": weights, gradients and
    optimizer stay float32, and the forward pass casts to half precision what CUDA's autocast casts. What is kept of
    such casts counts as activations: of weights the half copies, which do not grow with the batch, and of explicit
    attention's maps both, 4 + 2 bytes per entry. `skip_unread` as `ViT.skip_unread`; off in the released code.

    From 2 images on, activations are exactly a fixed part and a part per image; explicit attention needs fewer copies
    for a single one. Not counted: temporary tensors, above all the backward pass's own, and what allocator, libraries
    and CUDA add. Raises UsageError for an unknown strategy, attention or precision.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    activations = _activations(config, strategy, attention, batch, precision, skip_unread)
    return training_state(_on_meta(config, strategy))._replace(activations=int(activations))


@by_depth
def _activations(
    config: ViTConfig, strategy: str, attention: str, batch: int, precision: str, skip_unread: bool
) -> int:
    model = _on_meta(config, strategy)
    model.skip_unread = skip_unread
    labels = torch.empty(batch, dtype=torch.long, device="meta")
    with Autocast() if precision == "amp" else nullcontext():
        return saved_bytes(model, _images(config, batch), lambda logits: F.cross_entropy(logits, labels), attention)


class Autocast(TorchFunctionMode):
    """What CUDA's autocast to float16 does to the functions that a ViT calls, for meta tensors, which know no autocast.

    torch.autocast itself wants CUDA tensors, and the CPU's own lists are others: its norms and softmax stay half.
    """

    half = (F.linear, F.conv2d, Tensor.matmul, Tensor.__matmul__)
    float32 = (F.layer_norm, Tensor.softmax)

    def __init__(self):
        super().__init__()
        self.copies: dict[Tensor, Tensor] = {}  # a parameter that trains is cast once

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.half:
            args = [self.to_half(value) for value in args]
        elif func in self.float32:
            args = [value.float() if isinstance(value, Tensor) else value for value in args]
        elif func is F.cross_entropy:  # a half softmax, a float32 loss
            return F.nll_loss(F.log_softmax(args[0], dim=1).float(), *args[1:])
        return func(*args, **(kwargs or {}))

    def to_half(self, value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.half()
        return self.copies.setdefault(value, value.half())


def inference_memory(config: ViTConfig, batch: int = 1, attention: str = "explicit") -> Memory:
    """What a forward pass on `batch` images holds at its peak in float32, counted without data or GPU.

    Branches run one after the other, every token in every layer. Each tensor counts from the operation that makes it
    until nothing refers to it any more; a layer's input lives until the layer is done. `attention` as in `saved_bytes`.
    Not counted: an operation's own work space, allocator, libraries. Raises UsageError for an unknown attention.
    """
    model, images = _on_meta(config).eval(), _images(config, batch)
    model.skip_unread = False
    with torch.no_grad(), _Live(model) as live, AttentionAs(attention):
        model(images)
    return Memory(FLOAT32 * params(model), activations=live.peak, images=images.nbytes)


class _Live(TorchDispatchMode):
    """The most bytes that results of operations hold at one time; the model's own tensors do not count."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.known = _storages((*model.parameters(), *model.buffers())).keys()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # Those that nothing refers to go first: their numbers may be given out again.
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        results = _storages(out)
        for key in results.keys() - self.known - _storages(args).keys():
            self.alive[key] = (StorageWeakRef(results[key]), results[key].nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


# ---------------------------------------------------------------------------------------------------- a run


class _Relaxed(DVAE):
    """A discrete VAE as it trains: soft tokens, so that the product with the codebook is there."""

    def forward(self, images: Tensor) -> Tensor:
        return self.decode(self.logits(images).softmax(dim=-1) @ self.codebook)


@functools.cache
def _encoder_macs(config: DVAEConfig) -> int:
    return macs(_on_meta(config).encoder, _images(config).shape[1:]).matmul


def _per_patch(spec: RunSpec) -> int:
    """Outputs per masked patch of masked pre-training; 0 for other runs."""
    pixels = spec.model.in_chans * spec.model.patch_size**2
    tokens = spec.tokenizer.model.vocabulary if spec.tokenizer else VOCABULARY
    return {"none": 0, "pixels": pixels}.get(spec.targets, tokens)


def forward_macs(spec: RunSpec) -> int:
    """Multiply-adds of one image's forward pass in a run, as `gmacs_matmul`."""
    if per_patch := _per_patch(spec):  # masked pre-training predicts something of each masked patch, without a head
        return macs(replace(spec.model, num_classes=0)).matmul + spec.masked * per_patch * spec.model.width
    return macs(spec.model).matmul


def training_macs(spec: RunSpec) -> int:
    """Multiply-adds of one image's training step in a run: forward, and twice that backward.

    With frozen parts exactly what is left (`step_macs`). Activation checkpointing adds a forward pass, masked
    pre-training that of the tokenizer's encoder.
    """
    forward = forward_macs(spec)
    frozen = spec.strategy != "full"
    step = int(_step_macs(replace(spec.model, drop_path=0.0), spec.strategy).sum()) if frozen else 3 * forward
    return step + spec.checkpointing * forward + (_encoder_macs(spec.tokenizer.model) if spec.tokenizer else 0)


def run_state(spec: RunSpec) -> Memory:
    """What a run holds whatever the batch: no activations. LAMB holds what AdamW does."""
    return _state(spec.model, spec.strategy, spec.recipe.optimizer, _per_patch(spec))


@functools.cache
def _state(config: ViTConfig | DVAEConfig, strategy: str, optimizer: str, per_patch: int) -> Memory:
    model = _on_meta(replace(config, num_classes=per_patch) if per_patch else config, strategy)
    if per_patch:  # the head is in the predictor's place
        model.mask_token = nn.Parameter(torch.empty(config.width, device="meta"))
    return training_state(model, optimizer)


def run_memory(spec: RunSpec, batch: int) -> Memory:
    """What a run holds with `batch` images in the model at once, the average of the weights (EMA) among the weights.

    In closed form: the logits of masked pre-training (float32, and their inputs in half precision). Activations of a
    tokenizer are counted in float32, those of activation checkpointing as without.
    """
    held, config, per_patch = run_state(spec), spec.model, _per_patch(spec)
    if isinstance(config, DVAEConfig):
        activations = batch * _relaxed_activations(config)
    else:
        config = replace(config, num_classes=1 if per_patch else config.num_classes, drop_path=0.0)
        precision = "amp" if spec.precision == "bf16" else "float32"
        activations = int(_activations(config, spec.strategy, "fused", batch, precision, True))
        activations += batch * spec.masked * (FLOAT32 * per_patch + 2 * config.width)
    return held._replace(weights=held.weights * (1 if spec.recipe.ema is None else 2), activations=activations)


@functools.cache
def _relaxed_activations(config: DVAEConfig) -> int:
    images = _images(config)
    return saved_bytes(_on_meta(config), images, lambda out: (out - images).square().mean())
