"""How a step is timed and counted: arms in turns, fresh inputs, ceilings of the device, operations and bytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from lab.cost import count as measure

SECONDS_AN_ARM = 4.0  # timed steps of one arm in one process, about
REPEATS = (3, 30)  # at least, at most
WARM_UP = 2


@dataclass(frozen=True)
class Arm:
    """One way to do a step. `fresh()` makes an input, untimed; `step(input)` is timed."""

    fresh: Callable[[], object]
    step: Callable[[object], object]


class Timing(NamedTuple):
    """Seconds of each repetition, arms in the same order of repetitions."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def take_turns(arms: dict[str, Arm], device: str = "cpu", seconds: float = SECONDS_AN_ARM) -> dict[str, Timing]:
    """Time every arm, one step each in turn, after a warm-up; as many turns as `seconds` for the slowest arm allow."""
    wait = torch.get_device_module(device).synchronize

    def once(arm: Arm) -> float:
        given = arm.fresh()
        wait()
        began = time.perf_counter()
        arm.step(given)
        wait()
        return time.perf_counter() - began

    slowest = max(min(once(arm) for _ in range(WARM_UP)) for arm in arms.values())
    turns = min(max(round(seconds / slowest), REPEATS[0]), REPEATS[1])
    taken = [{name: once(arm) for name, arm in arms.items()} for _ in range(turns)]
    return {name: Timing([turn[name] for turn in taken]) for name in arms}


class Ceilings(NamedTuple):
    """What this device reaches: multiply-adds and bytes a second."""

    macs: float
    bytes: float


def ceilings(device: str, dtype: torch.dtype = torch.float32) -> Ceilings:
    """A large square matrix product and a large copy (read and written), best of ten."""
    side, count = (8192, 2**28) if device == "cuda" else (1536, 2**25)
    a = torch.randn(side, side, device=device, dtype=dtype)
    b = torch.randn(count, device=device)
    c = torch.empty_like(b)
    wait = torch.get_device_module(device).synchronize

    def best(work: Callable[[], object]) -> float:
        times = []
        for _ in range(11):
            wait()
            began = time.perf_counter()
            work()
            wait()
            times.append(time.perf_counter() - began)
        return min(times[1:])

    return Ceilings(side**3 / best(lambda: a @ a), 2 * b.nbytes / best(lambda: c.copy_(b)))


class Counts(NamedTuple):
    """Of one step: multiply-adds of matrix products, convolutions and attention; bytes read and written."""

    macs: int
    bytes: int


def count(step: Callable[[], object], on_meta: bool = False) -> Counts:
    """Run `step` once and count what reaches the device, forward and backward; on the meta device without computing.

    Bytes: each operation reads its inputs and writes its outputs, views are free. An upper bound of the traffic:
    caches keep some of it away from memory.
    """
    # Not FlopCounterMode, whose hooks on all modules would have `par` run as `seq`.
    traffic = _Traffic()
    with measure.AttentionAs("fused") if on_meta else nullcontext(), traffic:
        step()
    return Counts(traffic.flops // 2, traffic.bytes)


class _Traffic(TorchDispatchMode):
    flops = bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if products := _PRODUCTS.get(func.overloadpacket):
            self.flops += products(*args, **(kwargs or {}), out_val=out)
        aliases = [r.alias_info for r in func._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in aliases):  # not a view
            for leaf in tree_leaves((args, kwargs, out)):
                if isinstance(leaf, Tensor):
                    self.bytes += min(leaf.numel() * leaf.itemsize, leaf.untyped_storage().nbytes())
        return out


def _forward(q, k, v, *_, out_shape=None, **__) -> int:
    return sdpa_flop_count(q, k, v)


def _backward(grad, q, k, v, *_, out_shape=None, **__) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


# PyTorch counts its GPU kernels for attention; these are the CPU's.
_PRODUCTS = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(_forward),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(_backward),
}
