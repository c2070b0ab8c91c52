"""How the branches of one model are processed: one after the other, at once, or fused for good.

seq      eq. (2) as written: one branch after the other (`parallel.py`); what the released code and timm do
par      at once: the branches' own tensors are laid side by side as the layer runs, so that K branches are one wide
         MHSA and one wide FFN. The same function with the same gradients up to rounding: a training path. Without
         gradients the wide matrices are kept until a weight changes
streams  each branch on a CUDA stream of its own; on a CPU the same as seq
auto     the fastest of these for device, batch and size, by a short measurement at the first call. For users; runs and
         benchmarks name their execution
fused    `fuse(model)`: laid side by side once, for inference and export

Why it is exact. All branches read the same x, so they share LayerNorm's normalisation, and its affine part belongs to
the matrix behind it; LayerScale belongs to the matrix in front of it; and a sum of matrix products is one product of
concatenated matrices. So 18x2 is an 18-layer ViT with twice the heads and a twice wider FFN. (Paper, section 3: the
sum of two branches; it does not say that they are one wide layer.)

K branches, B batch, N tokens, D width, F = 4D, H heads.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlib.errors import unknown
from vitlib.model.layers import EPS, Residual, Rows, attention, take

if TYPE_CHECKING:
    from vitlib.model.parallel import ParallelLayer
    from vitlib.model.vit import ViT

EXECUTIONS = ("seq", "par", "streams", "auto")


def set_execution(model: ViT, execution: str) -> ViT:
    """Choose how the branches of `model` are processed from now on, one of EXECUTIONS; the model itself.

    Raises UsageError for an unknown execution.
    """
    if execution not in EXECUTIONS:
        raise unknown("execution", execution, EXECUTIONS)
    for layer in model.layers:
        layer.execution = execution
    return model


# ---------------------------------------------------------------------------------------------------- par


class Wide(NamedTuple):
    """The matrices of one layer's branches side by side; the biases behind the sum stay apart, (K, D)."""

    qkv: Tensor  # (3 K D, D): q of every branch, then k, then v
    qkv_bias: Tensor
    proj: Tensor  # (D, K D)
    proj_bias: Tensor
    fc1: Tensor  # (K F, D)
    fc1_bias: Tensor
    fc2: Tensor  # (D, K F)
    fc2_bias: Tensor


def side_by_side(layer: ParallelLayer) -> Wide:
    """Made anew from the branches' own tensors, which get the gradients."""
    return Wide(
        *_first(layer.mhsa, "qkv"), *_last(layer.mhsa, "proj"), *_first(layer.ffn, "fc1"), *_last(layer.ffn, "fc2")
    )


def _first(branches: nn.ModuleList, name: str) -> tuple[Tensor, Tensor]:
    """First matrices with the norms' affine parts folded in: (K F, D) and (K F,); q, k, v stay outermost for qkv."""
    parts = 3 if name == "qkv" else 1
    weights, biases = [], []
    for branch in branches:
        own = getattr(branch.f, name)
        bias = branch.f.qkv_bias if name == "qkv" else own.bias
        weights.append((own.weight * branch.norm.weight).unflatten(0, (parts, -1)))
        biases.append(torch.addmv(bias, own.weight, branch.norm.bias).unflatten(0, (parts, -1)))
    return torch.cat(weights, dim=1).flatten(0, 1), torch.cat(biases, dim=1).flatten()


def _last(branches: nn.ModuleList, name: str) -> tuple[Tensor, Tensor]:
    """Last matrices with LayerScale folded in: (D, K F), and the biases apart, (K, D)."""
    weights, biases = [], []
    for branch in branches:
        own, gamma = getattr(branch.f, name), branch.gamma
        weights.append(own.weight if gamma is None else own.weight * gamma[:, None])
        biases.append(own.bias if gamma is None else own.bias * gamma)
    return torch.cat(weights, dim=1), torch.stack(biases)


def par_layer(layer: ParallelLayer, x: Tensor, draws: Tensor | None, relative: Tensor | None, rows: Rows) -> Tensor:
    """Eq. (2), all branches at once: (B, N, D) -> (B, M, D). Arguments as in `ParallelLayer.forward`."""
    K, heads = len(layer.mhsa), layer.mhsa[0].f.heads
    wide = _wide(layer)
    relative = None if relative is None else relative.repeat(K, 1, 1)
    heard = attention(_normalised(x), wide.qkv, wide.qkv_bias, K * heads, relative, rows)
    x = take(x, rows) + _sum(heard, wide.proj, wide.proj_bias, _keep(layer.mhsa[0], draws, 0, x))
    hidden = F.gelu(F.linear(_normalised(x), wide.fc1, wide.fc1_bias))
    return x + _sum(hidden, wide.fc2, wide.fc2_bias, _keep(layer.ffn[0], draws, 1, x))


def _normalised(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def _sum(hidden: Tensor, weight: Tensor, bias: Tensor, keep: Tensor | None) -> Tensor:
    """The sum over branches behind the last matrix: (B, M, K F) -> (B, M, D)."""
    if keep is None:
        return F.linear(hidden, weight, bias.sum(0))
    # Stochastic depth: each branch and sample is kept or dropped on its own, bias included.
    hidden = hidden.unflatten(-1, (len(bias), -1)) * keep[:, None, :, None]
    return F.linear(hidden.flatten(-2), weight) + (keep @ bias)[:, None]


def _keep(branch: Residual, draws: Tensor | None, part: int, x: Tensor) -> Tensor | None:
    """0 or 1 / (1 - rate) for each sample and branch, (B, K); None where nothing is dropped."""
    if draws is None or not branch.training or branch.drop_path == 0:
        return None
    return ((draws[:, part] >= branch.drop_path).to(x.dtype) / (1 - branch.drop_path)).T


def _wide(layer: ParallelLayer) -> Wide:
    """The wide matrices; without gradients those kept from the last call, unless a weight has changed since.

    A change is seen by what PyTorch counts: every in-place operation on a parameter, a new parameter, a new module.
    (Writing through `.data` is not counted.)
    """
    if torch.is_grad_enabled():
        layer.__dict__.pop("kept", None)
        return side_by_side(layer)
    return _kept(layer)


@torch.compiler.disable  # compiled code cannot look for changes, so it asks
def _kept(layer: ParallelLayer) -> Wide:
    kept = layer.__dict__.get("kept")
    if kept is None or not all(
        owner.get(name) is part and (version is None or part._version == version) and pointer == _pointer(part)
        for owner, name, part, version, pointer in kept[1]
    ):
        layer.__dict__["kept"] = kept = (side_by_side(layer), _parts(layer))
    return kept[0]


def _parts(layer: nn.Module) -> list[tuple[dict, str, object, int | None, int | None]]:
    """Every module and parameter below `layer`: the dictionary that holds it, its name, itself, its state."""
    found = []
    for module in layer.modules():
        found += [(module._modules, name, child, None, None) for name, child in module._modules.items()]
        for name, p in module._parameters.items():
            found.append(
                (module._parameters, name, p, None if p is None or p.is_inference() else p._version, _pointer(p))
            )
    return found


def _pointer(part: object) -> int | None:
    """Where a parameter's values lie: `model.to(...)` moves them under the same parameter."""
    return part.data_ptr() if isinstance(part, Tensor) else None


# ---------------------------------------------------------------------------------------------------- streams


def streams_layer(layer: ParallelLayer, x: Tensor, draws: Tensor | None, relative: Tensor | None, rows: Rows) -> Tensor:
    """Eq. (2), each branch on a stream of its own: (B, N, D) -> (B, M, D)."""

    def part(branches: nn.ModuleList, number: int, x: Tensor, **reads: object) -> Tensor:
        draw = (lambda k: None) if draws is None else (lambda k: draws[k, number])
        return sum(_on_streams([functools.partial(b, x, draw(k), **reads) for k, b in enumerate(branches)], x))

    x = take(x, rows) + part(layer.mhsa, 0, x, relative=relative, rows=rows)
    return x + part(layer.ffn, 1, x)


def _on_streams(work: list[Callable[[], Tensor]], x: Tensor) -> list[Tensor]:
    """The results of `work`, each made on a stream that begins after x is there; the caller's stream waits for all."""
    device = torch.get_device_module(x.device)
    here, results = device.current_stream(), []
    for stream, make in zip(_streams(x.device, len(work)), work, strict=True):
        stream.wait_stream(here)
        with device.stream(stream):
            results.append(make())
        if x.is_cuda:  # the allocator must not hand out this memory while the other stream uses it
            x.record_stream(stream)
            results[-1].record_stream(here)
    for stream in _streams(x.device, len(work)):
        here.wait_stream(stream)
    return results


@functools.cache
def _streams(device: torch.device, count: int) -> tuple:
    return tuple(torch.get_device_module(device).Stream() for _ in range(count))


# ---------------------------------------------------------------------------------------------------- auto

EXECUTE = {"seq": lambda layer, *reads: layer.equation_2(*reads), "par": par_layer, "streams": streams_layer}
WARM_UP, TIMED = 2, 5
_fastest: dict[tuple, str] = {}  # measured once a process for each device, size and mode


def fastest(layer: ParallelLayer, x: Tensor, relative: Tensor | None, rows: Rows) -> str:
    """The execution of `auto`: measured on one layer with this x at its first call, remembered after."""
    if torch.compiler.is_compiling():
        return "par"
    sizes = (len(layer.mhsa), layer.mhsa[0].f.heads, relative is None, None if rows is None else len(take(x, rows)[0]))
    modes = (torch.is_grad_enabled(), layer.training, torch.get_num_threads(), torch.is_autocast_enabled(x.device.type))
    key = (x.device, x.dtype, tuple(x.shape), sizes, modes)
    if key not in _fastest:
        names = [name for name in EXECUTE if x.is_cuda or name != "streams"]
        _fastest[key] = min(names, key=lambda name: _seconds(EXECUTE[name], layer, x, relative, rows))
    return _fastest[key]


def _seconds(execute: Callable, layer: ParallelLayer, x: Tensor, relative: Tensor | None, rows: Rows) -> float:
    """Median time of this layer alone, with its backward pass where gradients are on. Leaves gradients as they are."""
    weights = [p for p in layer.parameters() if p.requires_grad]
    x = x.detach().requires_grad_(torch.is_grad_enabled())
    draws = torch.ones(len(layer.mhsa), 2, len(x), device=x.device)  # all kept; no random number is used up

    def once() -> float:
        _wait(x)
        began = time.perf_counter()
        y = execute(layer, x, draws, None if relative is None else relative.detach(), rows)
        if y.requires_grad:
            torch.autograd.grad(y.sum(), [x, *weights])
        _wait(x)
        return time.perf_counter() - began

    return statistics.median([once() for _ in range(WARM_UP + TIMED)][WARM_UP:])


def _wait(x: Tensor) -> None:
    torch.get_device_module(x.device).synchronize()


# ---------------------------------------------------------------------------------------------------- fused


@torch.no_grad()
def fuse(model: ViT) -> ViT:
    """A plain ViT, one branch a layer, with the same logits up to rounding: the branches of a layer made one, for good.

    An 18x2 model becomes an 18-layer ViT with twice the heads and a twice wider FFN; its norms keep no affine part (they
    are 1 and 0) and there is no LayerScale. In eval mode and frozen; `model` stays as it is. To train, use `par`: a
    fused model's matrices are other tensors, and per-tensor optimizers would take other steps.
    """
    from vitlib.model.vit import ViT

    K, config = model.config.branches, model.config
    wide = replace(
        config, branches=1, heads=K * config.heads, inner=K * (config.inner or config.width),
        ffn_width=K * (config.ffn_width or 4 * config.width), layer_scale=None, drop_path=0.0,
        key_bias=True,  # the norm's own
    )  # fmt: skip
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.startswith("layers.")}
    if "relative.table" in state:
        state["relative.table"] = state["relative.table"].repeat(1, K)
    for i, layer in enumerate(model.layers):
        w = side_by_side(layer)
        for part, first, last in (("mhsa", "qkv", "proj"), ("ffn", "fc1", "fc2")):
            at = f"layers.{i}.{part}.0"
            state[f"{at}.norm.weight"] = torch.ones_like(layer.mhsa[0].norm.weight)
            state[f"{at}.norm.bias"] = torch.zeros_like(layer.mhsa[0].norm.bias)
            state |= {f"{at}.f.{n}.weight": getattr(w, n) for n in (first, last)}
            state |= {f"{at}.f.{first}.bias": getattr(w, f"{first}_bias")}
            state |= {f"{at}.f.{last}.bias": getattr(w, f"{last}_bias").sum(0)}
    with torch.device("meta"):  # no time is spent on an initialisation that is overwritten
        fused = ViT(wide)
    if fused.relative is not None:
        fused.relative.index = model.relative.index
    fused.load_state_dict(state, assign=True)
    return fused.eval().requires_grad_(False)
