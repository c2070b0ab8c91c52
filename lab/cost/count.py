"""What a model costs, counted and not timed: parameters, multiply-adds, and the bytes that training keeps.

Exact, without data and without an accelerator: the operations run on the meta device, where tensors have shapes and
no values, so that ViT-L is measured as quickly as a toy. `saved_bytes` also runs on real devices. `peak_bytes` alone
asks the device.

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
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from vitlib.errors import UsageError, unknown
from vitlib.model import ViT, ViTConfig
from vitlib.model.layers import FFN, MHSA, Residual
from vitlib.model.parallel import set_execution
from vitlib.model.stems import Stem
from vitlib.model.vit import RelativeBias
from vitlib.train.finetune import freeze

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
        return _macs_of(model if image_size is None else replace(model, image_size=image_size))
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


@functools.cache
def _macs_of(config: ViTConfig) -> Macs:
    """Every layer of a configuration runs the same operations: a model of one layer, and what the second one adds."""
    with torch.device("meta"):
        one, two = (ViT(replace(config, depth=depth)) for depth in (1, 2))
    first, both = macs(one), macs(two)
    return Macs(*(a + (config.depth - 1) * (b - a) for a, b in zip(first, both, strict=True)))


KINDS = ("mhsa", "attention", "ffn", "stem", "head", "other")


class Step(NamedTuple):
    """Multiply-adds of one image's training step."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        return sum(self)


def step_macs(config: ViTConfig, strategy: str, execution: str = "seq") -> dict[str, Step]:
    """Multiply-adds of one image's training step by kind of layer, counted from the operations that run.

    Matrix products and convolutions, as `gmacs_matmul`, with every token in every layer. `mhsa` is qkv and proj,
    `attention` the N x N products, `other` what no such layer does: 0 in seq. A layer that runs as `par` is not made of
    its branches' modules, so that all its products are `other`. (What folds the norms into its matrices is a product of
    a matrix with a vector, which does not grow with the batch and is not counted.)
    Raises UsageError for an unknown strategy or execution.
    """
    with torch.device("meta"):
        model = set_execution(ViT(config).train(), execution)
        images = torch.empty(1, config.in_chans, config.image_size, config.image_size)
    model.skip_unread = False
    freeze(model, strategy)
    counter = _StepCounter()
    for module in model.modules():
        kind = {MHSA: "mhsa", FFN: "ffn"}.get(type(module), "stem" if isinstance(module, Stem) else None)
        if kind in ("mhsa", "ffn") and execution == "par" and config.branches > 1:
            continue  # a layer with hooks inside of it would run as seq
        if kind or module is model.head:
            module.register_forward_pre_hook(lambda *_, kind=kind or "head": counter.enter(kind))
            module.register_forward_hook(lambda *_: counter.enter("other"))
    with counter:
        model(images).sum().backward()
    return {kind: Step(counter.macs[kind, "forward"], counter.macs[kind, "backward"]) for kind in KINDS}


class _StepCounter(TorchDispatchMode):
    """Counts products by kind of layer. A backward operation is of the kind of the forward one that it belongs to:
    autograd numbers the operations that it records, and knows at any time which of them it is at.
    """

    def __init__(self):
        super().__init__()
        self.macs: Counter[tuple[str, str]] = Counter()
        self.kind = "other"  # where the forward pass is
        self.kinds: dict[int, str] = {}  # by autograd's number

    def enter(self, kind: str) -> None:
        self.kind = kind

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            products = count(*args, **kwargs, out_val=out) // 2  # a multiply-add is two FLOPs
            node = torch._C._current_autograd_node()
            if node is not None:
                self.macs[self.kinds[node._sequence_nr()], "backward"] += products
            else:
                maps = self.kind == "mhsa" and func.overloadpacket is torch.ops.aten.bmm
                kind = "attention" if maps else self.kind
                self.macs[kind, "forward"] += products
                # The first operation after a number was given out has it; one without gradients gets none.
                self.kinds.setdefault(torch.autograd._get_sequence_nr() - 1, kind)
        return out


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
    the optimizer's state: AdamW's two moments and one step count a tensor, or one momentum of SGD.
    """
    if optimizer not in OPTIMIZERS:
        raise unknown("optimizer", optimizer, OPTIMIZERS)
    trainable = [p.numel() for p in model.parameters() if p.requires_grad]
    state = 2 * sum(trainable) + len(trainable) if optimizer == "adamw" else sum(trainable)
    return Memory(FLOAT32 * params(model), FLOAT32 * sum(trainable), FLOAT32 * state, 0)


def memory(
    config: ViTConfig,
    strategy: str,
    attention: str = "fused",
    batch: int = 1,
    precision: str = "float32",
    optimizer: str = "adamw",
    skip_unread: bool = True,
) -> Memory:
    """What a training step on `batch` images holds under a fine-tuning strategy, counted without data or GPU.

    `attention` as in `saved_bytes`; the loss is cross-entropy with class numbers. "amp": weights, gradients and
    optimizer stay float32, and the forward pass casts to half precision what CUDA's autocast casts, by its own lists
    (products half, norms and softmax float32). What is kept of such casts counts as activations: of weights the half
    copies, which do not grow with the batch, and of explicit attention's maps both, 4 + 2 bytes an entry.
    `skip_unread=False`: every token in the last layer, as in the released code (`ViT.skip_unread`).

    From 2 images on, activations are exactly a fixed part and a part an image; explicit attention needs fewer copies
    for a single one. Not counted: temporary tensors, above all the backward pass's own, and what allocator, libraries
    and CUDA add.

    Raises UsageError for an unknown strategy, attention, precision or optimizer.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    with torch.device("meta"):
        model = ViT(config).train()
        images = torch.empty(batch, config.in_chans, config.image_size, config.image_size)
        labels = torch.empty(batch, dtype=torch.long)
    model.skip_unread = skip_unread
    freeze(model, strategy)
    with _Autocast() if precision == "amp" else nullcontext():
        saved = saved_bytes(model, images, lambda logits: F.cross_entropy(logits, labels), attention)
    return training_state(model, optimizer)._replace(activations=saved)


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
    with torch.device("meta"):
        model = set_execution(ViT(config).eval(), "seq")
        images = torch.empty(batch, config.in_chans, config.image_size, config.image_size)
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


def peak_bytes(step: Callable[[], object], device: torch.device | str) -> int | None:
    """The most bytes that tensors held on a GPU at any time of `step()`, with what was there before; elsewhere None."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device)
