"""`python -m vitlib finetune`: a folder of images and pretrained weights become a classifier."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vitlib.errors import UsageError
from vitlib.files import write_table, write_whole
from vitlib.model import ViT
from vitlib.stats import wilson
from vitlib.tasks.deltas import save_delta
from vitlib.tasks.images import read_task
from vitlib.tasks.runs import Job, Run, alone, best_of, check_place, execute, read_record, say, search
from vitlib.tasks.trunk import read_trunk, write_notes
from vitlib.train import supervised
from vitlib.train.engine import resolve
from vitlib.train.finetune import trainable

WRITTEN = ("runs", "split.csv", "rates.csv", "best.safetensors", "last.safetensors", "delta.safetensors", "result.json")


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned model, as its folder's `result.json` says."""

    out: str
    strategy: str
    lr: float
    validation_top1: float
    test_top1: float
    test_low: float  # 95 % over images
    test_high: float
    test_images: int
    job: str  # hash of all that it depends on

    def __str__(self) -> str:
        interval = f"95 % over {self.test_images} images: {self.test_low:.1f} to {self.test_high:.1f}"
        how = f"{self.strategy} at rate {self.lr:g}"
        return f"{self.out}: {self.test_top1:.1f} % of the test images ({interval}), {how}"


@alone
def finetune(
    folder: Path | str, out: Path | str, weights: Path | str | None = None, strategy: str = "attn", *,
    lr: float | None = None, epochs: int = 10, batch_size: int = 32, image_size: int | None = None, seed: int = 0,
    labels: Path | str | None = None, group: str | None = None, device: str = "auto",
) -> Tuned:  # fmt: skip
    """Fine-tune `weights` on the images of `folder`; `out` is a folder with what comes of it.

    best.safetensors, last.safetensors   the model at its best epoch on the validation part, and at its last
    delta.safetensors                    of the best, what is not the trunk's: for a `TaskBank`
    split.csv                            the part that each image is in
    rates.csv                            the learning rates that were tried (lr None: searched on the validation part)
    result.json                          what `Tuned` says. The test part is read once, by the best model

    Goes on where it was interrupted; reads what is finished. Raises UsageError as `read_trunk` and `read_task`, and where
    `out` holds something else. Waits for another process that writes there.
    """
    out, finished = Path(out), Path(out) / "result.json"
    if not finished.is_file():
        check_place(out, WRITTEN)
    run = Run(strategy, lr or 0.0, seed)  # 0: searched
    job = prepare(folder, out / "runs", weights, [strategy], epochs, batch_size, image_size, labels, group, device, lr)
    name = run.place(job).name
    if finished.is_file():
        kept = read_record(Tuned, finished)
        if kept.job != name:
            raise UsageError(f"{out} holds another model: give another place with --out")
        return replace(kept, out=str(out))
    job.task.write_split(out / "split.csv")
    # the rate, chosen on the validation part
    tried = search(job, strategy, seed) if lr is None else {lr: execute(Run(strategy, lr, seed), job)}
    chosen = Run(strategy, best_of(tried), seed)
    rates = [(lr, o.top1, o.loss, o.epoch, round(o.seconds, 1)) for lr, o in tried.items()]
    write_table(out / "rates.csv", [("lr", "validation_top1", "validation_loss", "best_epoch", "seconds"), *rates])
    # its models, and what they add to the trunk
    for which in ("best", "last"):
        with write_whole(out / f"{which}.safetensors") as draft:
            shutil.copyfile(chosen.place(job) / f"{which}.safetensors", draft)
    model = read_trunk(out).model
    save_delta(model, job.trunk.model, out / "delta.safetensors", write_notes(job.view, job.task.data.classes))
    # the test part
    _, correct = supervised.evaluate(model.to(job.engine.device), job.data["test"], job.engine)
    low, high = wilson(int(correct.sum()), len(correct))
    top1 = 100 * float(correct.mean())
    tuned = Tuned(str(out), strategy, chosen.lr, tried[chosen.lr].top1, top1, low, high, len(correct), name)
    with write_whole(finished) as draft:
        draft.write_text(json.dumps(vars(tuned), indent=1))
    shutil.rmtree(out / "runs")
    return tuned


def prepare(
    folder: Path | str, runs: Path, weights: Path | str | None, strategies: Sequence[str], epochs: int, batch_size: int,
    image_size: int | None, labels: Path | str | None, group: str | None, device: str, lr: float | None = None,
) -> Job:  # fmt: skip
    """Everything that can be wrong is found here, before time is spent."""
    resolve(device)
    trunk = read_trunk(weights)
    view = trunk.view(image_size)
    with torch.device("meta"):
        model = ViT(trunk.config(view.image_size, 2))
    for strategy in strategies:
        trainable(model, strategy)
    task = read_task(folder, view, labels, group)
    job = Job(task, trunk, view, runs, epochs, batch_size, device)
    job.recipe(lr if lr is not None else job.first_rate("full"))  # refuses what cannot be
    say(f"{task.describe()}; {trunk.model.config.name} of {trunk.source} at {view.image_size} pixels")
    for note in task.notes:
        say(f"note: {note}")
    return job
