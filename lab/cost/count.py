"""What a model and a run cost, counted and not timed: parameters, multiply-adds, and the bytes that training keeps.

Exact, without data and without an accelerator: the operations run on the meta device, where tensors have shapes and
no values, so that ViT-L is counted as quickly as a toy. `saved_bytes` also runs on real devices.

Paper: "FLOPs" are multiply-adds as fvcore counts them: matrix products, convolutions and norms, but no softmax,
GELU, residual sum or LayerScale. That is the column `gmacs`; `gmacs_matmul` leaves the norms out.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper

from lab.runs.spec import RunSpec
from vitlib.errors import UsageError, unknown
from vitlib.model import ViT, ViTConfig
from vitlib.model.layers import FFN, MHSA, Residual
from vitlib.model.stems import Stem
from vitlib.model.vit import RelativeBias
from vitlib.train.dvae import DVAE, DVAEConfig
from vitlib.train.finetune import freeze
from vitlib.train.tokenizers import VOCABULARY

FLOAT32 = 4  # bytes
ATTENTION, PRECISIONS, OPTIMIZERS = ("fused", "explicit"), ("float32", "amp"), ("adamw", "sgd")


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
    return {name: sum(p.numel() for p, its_role in role.items() if its_role == name) for name in names}


# ---------------------------------------------------------------------------------------------------- multiply-adds


class Macs(NamedTuple):
    """Multiply-adds of one image's forward pass. In tables: 1e-9 of it, rounded."""

    matmul: int  # gmacs_matmul: matrix products and convolutions
    paper: int  # gmacs: and the norms, as fvcore counts them


def macs(model: ViTConfig | nn.Module, image_size: int | None = None) -> Macs:
    """Multiply-adds of one image, counted from the operations that run in eval mode.

    A model is counted as it is, fused or frozen, without being copied or changed. `image_size` (pixels) replaces
    a configuration's own; a model has its size built in, and only one without a `config` (timm's) must be told it.
    """
    if isinstance(model, ViTConfig):
        return _macs_of(model if image_size is None else replace(model, image_size=image_size))
    config = getattr(model, "config", None)
    if (config is None) == (image_size is None):
        raise UsageError("macs wants an image_size with a configuration or with a model that has none")
    channels, side = (3, image_size) if config is None else (config.in_chans, config.image_size)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    training = {module: module.training for module in model.modules()}
    skip = getattr(model, "skip_unread", None)
    try:
        if skip:
            model.skip_unread = False  # Paper: counted with every token in every layer
        # On the meta device attention runs as two batched matrix products, N x N x D each, which are counted; the fused
        # kernel of a CPU would not be.
        with torch.no_grad(), _Counter() as counter:
            functional_call(model.eval(), state, torch.empty(1, channels, side, side, device="meta"))
    finally:
        if skip:
            del model.skip_unread
        for module, mode in training.items():
            module.training = mode
    matmul = sum(counter.macs.values())
    return Macs(matmul, matmul + counter.norms)


@functools.cache
def _macs_of(config: ViTConfig) -> Macs:
    """Every layer of a configuration runs the same operations: a model of one layer, and what the second one adds."""
    first, both = (macs(_on_meta(replace(config, depth=depth))) for depth in (1, 2))
    return Macs(*(a + (config.depth - 1) * (b - a) for a, b in zip(first, both, strict=True)))


KINDS = ("mhsa", "attention", "ffn", "stem", "head", "other")


class Step(NamedTuple):
    """Multiply-adds of one image's training step."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        return sum(self)


@functools.cache
def step_macs(config: ViTConfig, strategy: str) -> dict[str, Step]:
    """Multiply-adds of one image's training step by kind of layer, counted from the operations that run.

    Matrix products and convolutions, as `gmacs_matmul`, with every token in every layer. `mhsa` is qkv and proj,
    `attention` the N x N products, `other` what no such layer does: 0. Raises UsageError for an unknown strategy.
    """
    if config.depth > 3:  # layers between the first and the last do the same
        two, three = (step_macs(replace(config, depth=depth), strategy) for depth in (2, 3))
        more = config.depth - 2
        return {k: Step(*(a + more * (b - a) for a, b in zip(two[k], three[k], strict=True))) for k in KINDS}
    model = _on_meta(config).train()
    images = torch.empty(1, config.in_chans, config.image_size, config.image_size, device="meta")
    model.skip_unread = False
    freeze(model, strategy)
    counter = _Counter()
    for module in model.modules():
        kind = {MHSA: "mhsa", FFN: "ffn"}.get(type(module), "stem" if isinstance(module, Stem) else None)
        if kind or module is model.head:
            module.register_forward_pre_hook(lambda *_, kind=kind or "head": counter.enter(kind))
            module.register_forward_hook(lambda *_: counter.enter("other"))
    with counter:
        model(images).sum().backward()
    return {kind: Step(counter.macs[kind, "forward"], counter.macs[kind, "backward"]) for kind in KINDS}


class _Counter(TorchDispatchMode):
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

    def enter(self, kind: str) -> None:
        self.kind = kind

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out, op = func(*args, **kwargs), func.overloadpacket
        if op in NORMS:
            self.norms += NORMS[op](*args, **kwargs, out_val=out)
        elif op in flop_registry:
            products = flop_registry[op](*args, **kwargs, out_val=out) // 2  # a multiply-add is two FLOPs
            node = torch._C._current_autograd_node()
            if node is not None:
                self.macs[self.kinds[node._sequence_nr()], "backward"] += products
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
NORMS = {
    torch.ops.aten.native_layer_norm: _layer_norm,
    torch.ops.aten.native_batch_norm: _batch_norm,
}


# ---------------------------------------------------------------------------------------------------- bytes


def saved_bytes(model: nn.Module, images: Tensor, loss_fn: Callable[[Tensor], Tensor], attention: str = "fused") -> int:
    """Bytes that autograd keeps from `loss_fn(model(images))` for the backward pass: the activation memory.

    Every distinct storage counts once and whole, also where only a view of it is kept; parameters and buffers, which
    are there anyway, do not count. The images do, if what reads them trains. Runs where `images` and `model` are,
    the meta device included, in the mode (train or eval) that the model is in.

    Two ways of attention keep different things: "fused" (PyTorch's kernels) keeps q, k, v and a number per query;
    "explicit" (the released code's lines) keeps the (B, H, N, N) maps too. A bias on the attention logits that trains
    makes it explicit always.
    """
    if attention not in ATTENTION:
        raise unknown("attention", attention, ATTENTION)
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # holding the storages, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        # `_cdata` is the storage's own address: data_ptr() is 0 for every meta tensor.
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return tensor

    with ExitStack() as stack:
        if attention == "explicit" or images.is_meta:
            stack.enter_context(AttentionAs(attention))
        stack.enter_context(saved_tensors_hooks(pack, lambda tensor: tensor))
        # Held until the count is taken: with the loss goes the graph.
        loss = loss_fn(model(images))
    total = sum(storage.nbytes() for storage in kept.values())
    del loss
    return total


class AttentionAs(TorchFunctionMode):
    """Attention in the released code's lines, or by a fused kernel's meta form: without values no kernel is chosen."""

    def __init__(self, attention: str):
        super().__init__()
        self.attention = attention

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = args
        mask = kwargs.get("attn_mask")
        if self.attention == "fused" and mask is None:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # Released code: models_v2.py, Attention
        return (logits if mask is None else logits + mask).softmax(dim=-1) @ v


class Memory(NamedTuple):
    """Bytes that a training step holds."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # what autograd keeps from the forward for the backward pass

    @property
    def total(self) -> int:
        return sum(self)


def training_state(model: nn.Module, optimizer: str = "adamw") -> Memory:
    """What training holds without activations, float32: all weights, and for the trainable ones their gradients and
    the optimizer's state: AdamW's two moments and one step count per tensor, or one momentum of SGD.
    """
    if optimizer not in OPTIMIZERS:
        raise unknown("optimizer", optimizer, OPTIMIZERS)
    trainable = [p.numel() for p in model.parameters() if p.requires_grad]
    state = 2 * sum(trainable) + len(trainable) if optimizer == "adamw" else sum(trainable)
    return Memory(FLOAT32 * params(model), FLOAT32 * sum(trainable), FLOAT32 * state, 0)


def memory(
    config: ViTConfig, strategy: str, attention: str = "fused", batch: int = 1, precision: str = "float32",
    optimizer: str = "adamw", skip_unread: bool = True,
) -> Memory:  # fmt: skip
    """What a training step on `batch` images holds under a fine-tuning strategy, counted without data or GPU.

    `attention` as in `saved_bytes`; the loss is cross-entropy with class numbers. "amp": weights, gradients and
    optimizer stay float32, and the forward pass casts to half precision what CUDA's autocast casts, by its own lists
    (products half, norms and softmax float32). What is kept of such casts counts as activations: of weights the half
    copies, which do not grow with the batch, and of explicit attention's maps both, 4 + 2 bytes per entry.
    `skip_unread=False`: every token in the last layer, as in the released code (`ViT.skip_unread`).

    From 2 images on, activations are exactly a fixed part and a part per image; explicit attention needs fewer copies
    for a single one. Not counted: temporary tensors, above all the backward pass's own, and what allocator, libraries
    and CUDA add.

    Raises UsageError for an unknown strategy, attention, precision or optimizer.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    model = _on_meta(config)
    freeze(model, strategy)
    activations = _activations(config, strategy, attention, batch, precision, skip_unread)
    return training_state(model, optimizer)._replace(activations=activations)


@functools.cache
def _activations(
    config: ViTConfig, strategy: str, attention: str, batch: int, precision: str, skip_unread: bool
) -> int:
    """Layers between the first and the last keep the same: two layers, and what the third one adds."""
    if config.depth > 3:
        shallow = (replace(config, depth=depth) for depth in (2, 3))
        two, three = (_activations(c, strategy, attention, batch, precision, skip_unread) for c in shallow)
        return two + (config.depth - 2) * (three - two)
    model = _on_meta(config).train()
    model.skip_unread = skip_unread
    freeze(model, strategy)
    images = torch.empty(batch, config.in_chans, config.image_size, config.image_size, device="meta")
    labels = torch.empty(batch, dtype=torch.long, device="meta")
    with _Autocast() if precision == "amp" else nullcontext():
        return saved_bytes(model, images, lambda logits: F.cross_entropy(logits, labels), attention)


class _Autocast(TorchFunctionMode):
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


class Inference(NamedTuple):
    """Bytes that a forward pass without gradients holds at its peak."""

    weights: int
    images: int
    activations: int  # the most that the operations' results hold at one time

    @property
    def total(self) -> int:
        return sum(self)


def inference_memory(config: ViTConfig, batch: int = 1, attention: str = "explicit") -> Inference:
    """What a forward pass on `batch` images holds at its peak in float32, counted without data or GPU.

    Branches run one after the other, every token in every layer. Each tensor counts from the operation that makes it
    until nothing refers to it any more, so that this is the peak of this implementation, in which a layer's input lives
    until the layer is done. `attention` as in `saved_bytes`. Not counted: an operation's own work space, allocator, libraries.
    Raises UsageError for an unknown attention.
    """
    if attention not in ATTENTION:
        raise unknown("attention", attention, ATTENTION)
    model = _on_meta(config).eval()
    images = torch.empty(batch, config.in_chans, config.image_size, config.image_size, device="meta")
    model.skip_unread = False
    with torch.no_grad(), _Live(model) as live, AttentionAs(attention):
        model(images)
    return Inference(FLOAT32 * params(model), images.nbytes, live.peak)


class _Live(TorchDispatchMode):
    """The most bytes that results of operations hold at one time; the model's own tensors do not count."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # Those that nothing refers to go first: their numbers may be given out again.
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        known = self.known | {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, Tensor)}
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, Tensor)):
            if storage._cdata not in known:
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


# ---------------------------------------------------------------------------------------------------- a run


class _Relaxed(nn.Module):
    """A discrete VAE as it trains: soft tokens, so that the product with the codebook is there."""

    def __init__(self, config: DVAEConfig):
        super().__init__()
        self.config, self.dvae = config, DVAE(config)

    def forward(self, images: Tensor) -> Tensor:
        return self.dvae.decode(self.dvae.logits(images).softmax(dim=-1) @ self.dvae.codebook)


def _on_meta(config: ViTConfig | DVAEConfig) -> nn.Module:
    """The model that trains, without its values."""
    with torch.device("meta"):
        return ViT(config) if isinstance(config, ViTConfig) else _Relaxed(config)


@functools.cache
def _forward_macs(config: ViTConfig | DVAEConfig) -> int:
    return macs(config if isinstance(config, ViTConfig) else _on_meta(config)).matmul


@functools.cache
def _encoder_macs(config: DVAEConfig) -> int:
    encoder = _on_meta(config).dvae.encoder
    encoder.config = config  # which tells `macs` the size of an image
    return macs(encoder).matmul


def _predicted(spec: RunSpec) -> int:
    """Outputs per image of masked pre-training, which predicts something of each masked patch; 0 for other runs."""
    if spec.targets == "none":
        return 0
    pixels = spec.model.in_chans * spec.model.patch_size**2
    per_patch = (
        spec.tokenizer.model.vocabulary if spec.tokenizer else pixels if spec.targets == "pixels" else VOCABULARY
    )
    return spec.masked * per_patch


def _plain(config: ViTConfig | DVAEConfig) -> ViTConfig | DVAEConfig:
    """Without what changes no multiply-add, so that equal counts are taken once."""
    return replace(config, layer_scale=None, drop_path=0.0) if isinstance(config, ViTConfig) else config


def forward_macs(spec: RunSpec) -> int:
    """Multiply-adds of one image's forward pass in a run, as `gmacs_matmul`."""
    if outputs := _predicted(spec):
        return _forward_macs(_plain(replace(spec.model, num_classes=0))) + outputs * spec.model.width
    return _forward_macs(_plain(spec.model))


def training_macs(spec: RunSpec) -> int:
    """Multiply-adds of one image's training step in a run: forward, and twice that backward.

    With frozen parts exactly what is left (`step_macs`). Activation checkpointing adds a forward pass, masked
    pre-training that of the tokenizer's encoder.
    """
    forward = forward_macs(spec)
    step = 3 * forward
    if spec.strategy != "full":
        step = sum(kind.total for kind in step_macs(_plain(spec.model), spec.strategy).values())
    return step + spec.checkpointing * forward + (_encoder_macs(spec.tokenizer.model) if spec.tokenizer else 0)


def run_state(spec: RunSpec) -> Memory:
    """What a run holds whatever the batch: no activations. LAMB holds what AdamW does."""
    config, outputs = spec.model, _predicted(spec)
    if outputs:  # the head is in the predictor's place
        config = replace(config, num_classes=outputs // spec.masked)
    return _state(config, spec.strategy, "sgd" if spec.recipe.optimizer == "sgd" else "adamw", outputs > 0)


@functools.cache
def _state(config: ViTConfig | DVAEConfig, strategy: str, optimizer: str, masked: bool) -> Memory:
    model = _on_meta(config)
    if masked:
        model.mask_token = nn.Parameter(torch.empty(config.width, device="meta"))
    freeze(model, strategy)
    return training_state(model, optimizer)


def run_memory(spec: RunSpec, batch: int) -> Memory:
    """What a run holds with `batch` images in the model at once, the average of the weights (EMA) among the weights.

    Under autocast if the run's precision is bf16. In closed form: the logits of masked pre-training (float32, and their
    inputs in half precision). Activations of a tokenizer are counted in float32, those of activation checkpointing as
    without.
    """
    held, config, outputs = run_state(spec), spec.model, _predicted(spec)
    if isinstance(config, DVAEConfig):
        activations = batch * _relaxed_activations(config)
    else:
        config = replace(config, num_classes=1 if outputs else config.num_classes, drop_path=0.0)
        precision = "amp" if spec.precision == "bf16" else "float32"
        activations = _activations(config, spec.strategy, "fused", batch, precision, True)
        activations += batch * (FLOAT32 * outputs + 2 * spec.masked * config.width)
    return held._replace(weights=held.weights * (1 if spec.recipe.ema is None else 2), activations=activations)


@functools.cache
def _relaxed_activations(config: DVAEConfig) -> int:
    model, images = (
        _on_meta(config),
        torch.empty(1, config.in_chans, config.image_size, config.image_size, device="meta"),
    )
    return saved_bytes(model, images, lambda out: (out - images).square().mean())
