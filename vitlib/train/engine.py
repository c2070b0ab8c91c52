"""What a run is computed with: device, precision, parts of a batch, several processes.

None of it changes what is drawn or which images meet in a batch. What changes is rounding, and the statistics of batch
norm: they are those of what goes through the model at a time, a part of the batch with `accumulate`. Several GPUs use
SyncBatchNorm, whose statistics are of all processes' parts together, so that they are of as many images on any number
of GPUs (`own_parts`). LayerNorm and the linear stem know no such difference.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.parallel import DistributedDataParallel

from vitlib.data import Batch, Shard
from vitlib.data.memory import WHOLE
from vitlib.errors import UsageError, unknown
from vitlib.model import ViT

BACKEND = "inductor"  # of torch.compile


@dataclass(frozen=True)
class Engine:
    """How one process of a run computes."""

    device: str = "cpu"  # or "cuda": the GPU that is this process's current one
    precision: str = "float32"  # "bf16": forward pass and loss under autocast; weights and their gradients stay float32
    accumulate: int = 1  # parts of a batch of all processes
    compile: bool = False
    checkpointing: bool = False  # activations are computed again in the backward pass
    shard: Shard = WHOLE

    def place(self, model: nn.Module, batch_size: int) -> nn.Module:
        """The model as it is trained: on its device, with the switches on; parameters keep their names.

        Raises UsageError for a batch that the processes cannot share equally and for batch norm that would train on
        several CPU processes.
        """
        check_shares(batch_size, world := self.shard.world)
        if world > 1 and self.device == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        elif world > 1 and trains_batch_norm(model):
            raise UsageError(
                "batch norm does not train on several CPU processes, for torch synchronises it on GPUs only: allowed are "
                "stem_norm 'ln' or 'none', one process, or GPUs"
            )
        model = model.to(self.device)
        for vit in (m for m in model.modules() if isinstance(m, ViT)):
            vit.checkpointing = self.checkpointing
        if self.compile:
            model.compile(backend=BACKEND)  # in place, so that names of parameters and copies of the model stay plain
        return model

    def loss_of(self, model: nn.Module, loss_function: Callable[..., Tensor]) -> nn.Module:
        """(batch, draws) -> loss; with several processes the backward pass averages the gradients over them."""
        loss = Loss(model, loss_function)
        # Buffers need no broadcast: they are constant, or equal in all processes (SyncBatchNorm, counters).
        return DistributedDataParallel(loss, forward_sync_buffers=False) if self.shard.world > 1 else loss

    def parts(self, model: nn.Module) -> int:
        """Parts that this process's share of a batch goes through the model in."""
        return own_parts(self.accumulate, self.shard.world, trains_batch_norm(model))

    def move(self, batch: Batch) -> Batch:
        return batch.to(self.device)

    @contextmanager
    def forward(self, loss: nn.Module | None = None, last: bool = True) -> Iterator[None]:
        """Around a forward pass. Gradients are averaged over processes once per step, with its last part.

        bfloat16 has the range of float32, so small gradients do not vanish and the loss needs no scaler.
        """
        quiet = loss.no_sync() if self.shard.world > 1 and not last else nullcontext()
        with quiet, torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
            yield

    def mean(self, value: Tensor) -> float:
        """The mean over processes of a number that each of them has."""
        if self.shard.world > 1:
            dist.all_reduce(value)  # a sum: gloo has no mean
        return (value / self.shard.world).item()

    def gather(self, mine: object) -> list:
        """What every process has, in the order of ranks."""
        everyones = [mine] * self.shard.world
        if self.shard.world > 1:
            dist.all_gather_object(everyones, mine)
        return everyones


CPU = Engine()
HERE = ("auto", "cpu", "cuda")  # the devices that this machine may have


class Loss(nn.Module):
    """Model and loss function as one module: what wraps modules sees one forward pass, whatever the loss asks for."""

    def __init__(self, model: nn.Module, function: Callable[..., Tensor]):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, batch: Batch, draws: Tensor | None) -> Tensor:
        return self.function(self.model, batch, draws)


def own_parts(accumulate: int, processes: int, batch_norm: bool) -> int:
    """Parts of each process's share of a batch, such that none is larger than one of `accumulate` parts of the batch.

    Where batch norm trains, each makes `accumulate` parts: the statistics, of all processes' parts together, are then those
    of batch / accumulate images whatever the number of processes.
    """
    return accumulate if batch_norm else math.ceil(accumulate / processes)


def check_shares(batch_size: int, processes: int) -> None:
    """Raises UsageError for a batch that so many processes cannot share equally."""
    if batch_size % processes:
        raise UsageError(f"a batch of {batch_size} images cannot be shared equally by {processes} processes")


def trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def trains_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, BatchNorm) and trains(module) for module in model.modules())


def resolve(device: str) -> str:
    """What "cpu", "cuda" or "auto", a GPU where there is one, is here. Raises UsageError for another one."""
    if device not in HERE:
        raise unknown("device", device, HERE)
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "device 'cuda' needs a GPU that torch can see, and there is none: allowed are 'cpu' and 'auto'"
        )
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def this_shard() -> Shard:
    """This process's place among those of its run; the only one where none were started together."""
    return Shard(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else WHOLE


@contextmanager
def joined(device: str) -> Iterator[Shard]:
    """Join the processes that torchrun started, as its environment says: NCCL between GPUs, gloo between CPUs."""
    if device == "cuda":
        if (wanted := int(os.environ["LOCAL_WORLD_SIZE"])) > (present := torch.cuda.device_count()):
            raise UsageError(f"{wanted} processes of one run need a GPU each, and this machine has {present}")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    yield this_shard()
    dist.destroy_process_group()  # not after a fault: it could wait for processes that are gone
