"""What a task adds to its trunk: a file with the tensors that differ, and a bank that answers for many tasks with one trunk.

Attention-only fine-tuning leaves the feed-forward networks as they are: a third of the blocks' weights is stored per task
(Paper, section 4: 66 % of the storage is saved), and a batch of several tasks goes through the shared networks at once.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from vitlib.errors import UsageError, unknown
from vitlib.files import read_metadata, read_safetensors, write_safetensors
from vitlib.model import ViT
from vitlib.model.weights import assemble, check_values, read_config, state_of
from vitlib.tasks.trunk import hash_of, read_notes

PAPER_SAVING = 66  # percent; Paper: section 4, of attention-only fine-tuning


def save_delta(model: ViT, trunk: ViT, path: Path | str, notes: Mapping[str, str] | None = None) -> None:
    """The tensors of `model` that are not the trunk's, with the trunk's hash; `notes`, e.g. `trunk.write_notes`, beside.

    In the precision of the two: half the size where both are in bfloat16. Raises UsageError for what is refused by
    `weights.save`.
    """
    base, state = trunk.state_dict(), state_of(model, "saved", hooks=True)
    check_values(state, "this model")
    if absent := [name for name in base if name not in state and not name.startswith("head.")]:
        raise UsageError(f"this model is no task of the trunk: the trunk's {absent[0]} is not in it")
    kept = {n: t for n, t in state.items() if n not in base or not same(t, base[n])}
    about = {"kind": "delta", "vitlib": json.dumps(asdict(model.config)), "trunk": hash_of(base)}
    write_safetensors(path, kept, {"format": "pt", **about, **(notes or {})})


def same(one: Tensor, other: Tensor) -> bool:
    """In values and precision."""
    return not one.is_meta and one.dtype == other.dtype and torch.equal(one, other)


def load_delta(path: Path | str, trunk: ViT) -> ViT:
    """The fine-tuned model, in eval mode; what it did not change are the trunk's own tensors, not copies.

    Raises UsageError for a file that is no delta, or the delta of another trunk.
    """
    delta, about = read_safetensors(path)
    if about.get("kind") != "delta":
        raise UsageError(f"{path} is no delta: allowed is a file that save_delta or finetune wrote")
    base = dict(trunk.named_parameters()) | dict(trunk.named_buffers())
    if (given := hash_of(base)) != about.get("trunk"):
        raise UsageError(f"{path} belongs to another trunk: its hash is {about.get('trunk')}, this one's {given}")
    config = read_config(about, path)
    delta = {name: tensor.to(trunk.cls_token.device) for name, tensor in delta.items()}
    shared = {n: t for n, t in base.items() if config.num_classes or not n.startswith("head.")}
    trained = [p for p in trunk.parameters() if p.requires_grad]
    model = assemble(config, shared | delta, str(path)).eval().requires_grad_(False)
    for parameter in trained:  # of a trunk that trains, which was switched off with what it shares
        parameter.requires_grad = True
    return model


class TaskBank:
    """One trunk, and a task for each delta file: `bank["birds"](images)`, or `bank(images, tasks)` for a mixed batch."""

    def __init__(self, trunk: ViT):
        self.trunk = trunk
        self.models: dict[str, ViT] = {}
        self.classes: dict[str, tuple[str, ...]] = {}

    def add(self, name: str, path: Path | str) -> None:
        """Raises UsageError as `load_delta`."""
        self.models[name] = load_delta(path, self.trunk)
        self.classes[name] = tuple(read_notes(read_metadata(path), path).get("classes", ()))

    def remove(self, name: str) -> None:
        self[name]  # refuses a task that is not there
        del self.models[name], self.classes[name]

    def __getitem__(self, name: str) -> ViT:
        """The task's model. Raises UsageError for a task that is not there."""
        if name not in self.models:
            raise unknown("task", name, self.models)
        return self.models[name]

    @torch.no_grad()
    def __call__(self, images: Tensor, tasks: Sequence[str]) -> list[Tensor]:
        """A task's name for each of B images (B, C, H, W) -> B rows of logits, each as long as its task has classes.

        What no task changed runs once, on the whole batch. Raises UsageError for tasks of other image sizes.
        """
        if len(tasks) != len(images):
            raise UsageError(f"{len(images)} images have {len(tasks)} names of tasks: allowed is one for each")
        # images of one task side by side
        order, names = sorted(range(len(tasks)), key=lambda i: tasks[i]), sorted(set(tasks))
        if not names:
            return []
        models, sizes = [self[name] for name in names], [list(tasks).count(name) for name in names]
        if len({replace(model.config, num_classes=0) for model in models}) > 1 or self.trunk.relative is not None:
            raise UsageError("a batch of several tasks needs one image size, and positions that are not relative")
        each = functools.partial(by_task, models, sizes)
        x = each(lambda model: model.stem, images[order])
        x = each(lambda model: model.tokens, x)
        # eq. (2), each residual function for all tasks
        for i, layer in enumerate(self.trunk.layers):
            for part in ("mhsa", "ffn"):
                x = x + sum(each(lambda m, k=k: getattr(m.layers[i], part)[k], x) for k in range(len(layer.mhsa)))  # noqa: B023
        x = each(lambda model: model.norm, x)
        logits = [row for m, own in zip(models, x.split(sizes), strict=True) for row in m.head(m.pool(own))]
        # in the order that they were asked for
        return [row for _, row in sorted(zip(order, logits, strict=True), key=lambda pair: pair[0])]

    def storage(self) -> str:
        """Megabytes per task, and what is saved of a whole model's, beside the paper's 66 %."""
        lines, shared = [], {id(p) for p in self.trunk.parameters()}
        for name, model in self.models.items():
            mine = [p for p in model.parameters() if id(p) not in shared]
            own, whole = (sum(p.nbytes for p in of) / 1e6 for of in (mine, model.parameters()))
            saved = f"{100 * (1 - own / whole):.1f} % saved (paper: {PAPER_SAVING} %)"
            lines.append(
                f"{name}: {own:.2f} MB of {whole:.2f} MB, {saved}; in bf16 {2e-6 * sum(p.numel() for p in mine):.2f} MB"
            )
        return "\n".join(lines)


def by_task(models: Sequence[ViT], sizes: Sequence[int], part: Callable[[ViT], Callable], x: Tensor) -> Tensor:
    """A part of each model on its images, side by side in `x`; once on all of them where the part's tensors are the same."""
    parts = [part(model) for model in models]
    if isinstance(parts[0], nn.Module) and len({tuple(map(id, (*p.parameters(), *p.buffers()))) for p in parts}) == 1:
        return parts[0](x)
    return torch.cat([f(own) for f, own in zip(parts, x.split(sizes), strict=True)])
