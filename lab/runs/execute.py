"""Train one run: from its spec to its result."""

from __future__ import annotations

import functools
import os
import pickle
import platform
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from timm.utils import ModelEmaV3

from lab import paths
from lab.data.cards import source
from lab.data.published import locate
from lab.runs import pretrained
from lab.runs.processes import cores, end_with
from lab.runs.results import Result
from lab.runs.spec import RunSpec
from lab.runs.store import checkpoint_path, find, held, keep, warn_of_other_files, weights, weights_path
from vitlib.data import DataSet, held_out, subset
from vitlib.errors import UsageError
from vitlib.model import ViT
from vitlib.model.regroup import regrouped
from vitlib.model.weights import assemble
from vitlib.train import PROTOCOLS, loop
from vitlib.train.checkpoint import Checkpoints
from vitlib.train.dvae import DVAE
from vitlib.train.engine import Engine, joined, resolve, this_shard
from vitlib.train.protocol import LossFunction

try:
    import resource
except ImportError:  # Windows: the peak of memory is not measured
    resource = None

LOADERS = 8  # at most so many processes read and decode images which are not in memory


def execute(
    spec: RunSpec, on_step: Callable[[int, int], None] = lambda step, steps: None, every_s: float = 300.0,
    stamps: Mapping[str, str] = {},
) -> Result:  # fmt: skip
    """Train a run, or read it where it is finished, with its weights. What it needs must be finished.

    A checkpoint is written every `every_s` seconds; a run that was killed goes on from it. `stamps` (the hashes of the
    ledger's entries) are kept with the result as they were at the run's first start. Raises NonFiniteLoss with the run's
    name; the run is not kept then, the last good checkpoint is. All processes of a distributed run call this; the first
    one writes.
    """
    switches = {name: getattr(spec, name) for name in ("precision", "accumulate", "compile", "checkpointing")}
    engine, protocol = Engine(resolve(spec.device), **switches, shard=this_shard()), PROTOCOLS[spec.protocol]
    spec.check_start()
    first = engine.shard.rank == 0
    with held(spec.hash, wait=engine.shard.world == 1) if first else nullcontext():
        engine.gather(None)  # the others look when the first one holds the lock
        if weights_path(spec).is_file() and (result := find(spec)):
            return result
        torch.set_num_threads(spec.threads)
        torch.set_flush_denormal(True)  # small LayerScale values make denormal gradients, which are slow on CPU
        notes = dict(stamps) | {"began": now(), "commit": paths.commit()}
        checkpoints = Checkpoints(checkpoint_path(spec), every_s, notes, first, spec.hash)
        # all data, now, so that a fault costs no time
        data, tested, other = data_of(spec, "train"), data_of(spec, spec.split), second_test(spec)
        read = {"train": data, spec.split: tested, "v2": other} if first and spec.streamed else {}
        if files := {split: images.checksum for split, images in read.items() if images is not None}:
            warn_of_other_files({m: r.files for m in spec.needs if (r := find(m))} | {spec: files})
        rows = subset(data, spec.images, spec.seed, spec.subset)
        if few := [f"one {what}" for what, n in (("image", len(rows)), ("class", len(data.classes))) if n == 1]:
            warnings.warn(f"the {spec} trains on {' of '.join(few)}", stacklevel=2)
        # train
        model, loss_function = prepare(spec, data)
        ema = None if spec.recipe.ema is None else ModelEmaV3(model, spec.recipe.ema)
        if engine.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            inputs = (model, spec.recipe, data, rows, spec.seed, loss_function)
            history = loop.train(*inputs, on_step, engine, ema, checkpoints)
        except loop.NonFiniteLoss as fault:
            raise loop.NonFiniteLoss(f"{spec}: {fault}") from None
        # evaluate
        metrics = {"first_loss": history[0].loss, "train_loss": float(np.mean([s.loss for s in history[-20:]]))}
        correct_v2 = None
        reached, correct = protocol.evaluate(model, tested, engine)
        metrics |= reached
        if other is not None:
            reached, correct_v2 = protocol.evaluate(model, other, engine)
            metrics["top1_v2"] = reached["top1"]
        if ema is not None and protocol.classifies:
            reached, _ = protocol.evaluate(ema.module, tested, engine)
            metrics |= {f"{name}_ema": value for name, value in reached.items()}
        if not all(torch.isfinite(p).all() for p in model.parameters()):
            raise loop.NonFiniteLoss(f"{spec}: the last step left weights that are not finite; {checkpoints}")
        metrics["trained_params"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        # keep
        about = {"split": spec.split, "wall_s": checkpoints.wall_s, "cpu_s": checkpoints.cpu_s}
        about |= surroundings(engine.device) | {"world": engine.shard.world} | ({"files": files} if files else {})
        fixed = dict(checkpoints.notes)  # as it was at the run's first start
        about |= {name: fixed.pop(name, "unknown") for name in ("began", "commit")}
        result = Result(spec.hash, metrics, correct, fixed, about, correct_v2)
        if first:
            keep(spec, result, history, model, ema and ema.module)
            checkpoints.remove()
        engine.gather(None)  # nobody leaves before it is written
        return result


def data_of(spec: RunSpec, split: str) -> DataSet:
    """A split at the size that the model reads: held in memory, or read as it is needed.

    Where data has no validation images (the published sets), a tuning run holds out the last fiftieth of each class of its
    training images. A judged run trains on all of them.
    """
    if "test" in (split, spec.split) or "validation" in spec.facts.sizes:
        return _open(spec, spec.data, split)
    data = _open(spec, spec.data, "train")
    held = held_out(data.labels.numpy(), share=50)
    return data.take(np.flatnonzero(held if split == "validation" else ~held))


def _open(spec: RunSpec, name: str, split: str) -> DataSet:
    classes = spec.model.num_classes if PROTOCOLS[spec.protocol].classifies else None
    return source(name, spec.streamed).open(split, spec.model.image_size, spec.recipe.augment, loaders(), classes)


def second_test(spec: RunSpec) -> DataSet | None:
    """Test images collected anew, where the data set has them (ImageNet-V2) and they are here."""
    second = source(spec.data, spec.streamed).second_test
    judged = PROTOCOLS[spec.protocol].classifies and spec.split == "test"
    return _open(spec, second, "test") if judged and second and locate(second) else None


def prepare(spec: RunSpec, data: DataSet) -> tuple[torch.nn.Module, LossFunction]:
    """The model at its start and the loss function of its protocol."""
    state, config = None, None
    if spec.weights:
        trunk = pretrained.model_of(spec.weights)
        state, config = trunk.state_dict(), trunk.config
    elif spec.parent:
        state, config = weights(spec.parent), spec.parent.model
    if config and config.branches != spec.model.branches:  # its pairs in the branches that this spec names
        state = regrouped(state, spec.model.branches)
    tokenizer = spec.tokenizer and trained_tokenizer(spec.tokenizer).to(resolve(spec.device))
    return PROTOCOLS[spec.protocol].start(spec, data, state, tokenizer)


def trained_model(spec: RunSpec) -> ViT:
    """The classifier of a finished run, or what pre-training kept, in eval mode."""
    return assemble(spec.model, weights(spec), f"what is kept of the {spec}").eval()


def trained_tokenizer(spec: RunSpec) -> DVAE:
    """The discrete VAE of a finished run, in eval mode."""
    model = DVAE(spec.model, spec.seed)
    model.load_state_dict(weights(spec))
    return model.eval()


# ---------------------------------------------------------------------------------------------------- this machine


def loaders() -> int:
    """Processes that decode for this one: its share of the cores, where several processes of a run are on this machine."""
    return min(LOADERS, max(cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1))


def surroundings(device: str) -> dict:
    """Where and with what a run was done."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else 0  # KiB; bytes on macOS
    gpu = {"gpu_mem_mb": round(torch.cuda.max_memory_allocated() / 2**20)} if device == "cuda" else {}
    return gpu | {
        "mem_mb": round(peak / (2**20 if sys.platform == "darwin" else 2**10)), "device": device_name(device),
        "torch": torch.__version__, "python": platform.python_version(), "date": now()[:10],
    }  # fmt: skip


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@functools.cache
def device_name(device: str) -> str:
    """The name of what a run used: the GPU's for "cuda", else the processor's and the number of its cores."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.+?)\s*$", info.read_text(), re.M) if info.is_file() else None
    return f"{named[1] if named else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def each_percent(act: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """For `on_step`: `act(step, steps)` where another hundredth of the run is done."""
    return lambda step, steps: act(step, steps) if 100 * step // steps > 100 * (step - 1) // steps else None


def main(order: Path) -> None:
    """One of the processes that `launch.distributed` started through torchrun: train the run with the others."""
    end_with(os.getppid(), int(os.environ.get("VITLIB_PARENT", 0)))
    # a pickle, as between all processes of Python, in a private folder: whoever writes there can change this code as well
    spec, options = pickle.loads(order.read_bytes())
    tell = each_percent(lambda step, steps: print(f"step {step} of {steps}", flush=True))
    try:
        with joined(resolve(spec.device)) as shard:
            execute(spec, on_step=(lambda *_: None) if shard.rank else tell, **options)
    except (UsageError, loop.NonFiniteLoss) as fault:
        order.with_suffix(".fault").write_bytes(pickle.dumps(fault))
        sys.exit(str(fault))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
