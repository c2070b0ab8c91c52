"""The pretrained weights that a task starts from: a file, a timm name, or the small trunk that ships."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from vitlib.errors import UsageError
from vitlib.files import intact, read_metadata
from vitlib.model import ViT, ViTConfig
from vitlib.model.weights import load, read_checkpoint
from vitlib.tasks.images import View

SHIPPED = Path(__file__).with_name("trunk.safetensors")  # small, of 16-pixel grey images
LARGEST = 224  # pixels, unless told otherwise: DINOv2's 518 would take 30 times as long


@dataclass(frozen=True, eq=False)
class Trunk:
    """A pretrained backbone. In eval mode; nothing here changes it."""

    model: ViT
    source: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] = ()  # of the file, if it names them

    @functools.cached_property
    def hash(self) -> str:
        return hash_of(self.model.state_dict())

    def config(self, image_size: int | None, num_classes: int) -> ViTConfig:
        """Of a model that starts from it. image_size None: the trunk's own, at most 224."""
        c = self.model.config
        size = min(c.image_size, LARGEST // c.patch_size * c.patch_size) if image_size is None else image_size
        return replace(c, image_size=size, num_classes=num_classes)

    def view(self, image_size: int | None) -> View:
        c = self.config(image_size, 0)
        return View(c.image_size, c.patch_size, self.mean, self.std)

    @property
    def seen(self) -> View:
        """Of a fine-tuned model: what it was trained on."""
        return self.view(self.model.config.image_size)


def read_trunk(source: str | Path | None = None) -> Trunk:
    """Weights of a file, ours or one that `model.weights.read_checkpoint` reads, of a folder that `finetune` or `pretrain`
    wrote, or of a timm name; None is the trunk that ships. Raises UsageError for what cannot be read.
    """
    path = Path(source or SHIPPED)
    if path.is_dir():
        path = next((p for name in ("best", "trunk") if (p := path / f"{name}.safetensors").is_file()), path)
    mean, std, notes = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, {}
    if path.suffix == ".safetensors" and path.is_file() and "vitlib" in (metadata := read_metadata(path)):
        model, notes = load(path), read_notes(metadata, path)
        if not isinstance(model, ViT):
            raise UsageError(f"{path} holds a {type(model).__name__}: allowed is a ViT")
        if model.config.in_chans == 1:
            mean = std = (0.5,)
        mean, std = notes.get("mean", mean), notes.get("std", std)
    elif path.is_dir():
        raise UsageError(f"folder {path} was not written by finetune or pretrain: name a file of weights")
    else:
        model = read_checkpoint(str(source))
        if not path.is_file():
            from timm.models import get_pretrained_cfg

            mean, std = get_pretrained_cfg(str(source)).mean, get_pretrained_cfg(str(source)).std
    if len(mean) != model.config.in_chans:
        raise UsageError(f"{source} reads {model.config.in_chans} channels: allowed are 3, and 1 for grey")
    model = model.float().eval().requires_grad_(False)
    return Trunk(model, str(source or SHIPPED), tuple(mean), tuple(std), tuple(notes.get("classes", ())))


def read_notes(metadata: Mapping[str, str], path: Path | str) -> dict[str, object]:
    """What `finetune` notes in a file: class names and preprocessing, besides. Raises UsageError for what cannot be."""
    with intact(path):
        notes = json.loads(metadata.get("task", "{}"))
        classes, mean, std = (notes.get(name, []) for name in ("classes", "mean", "std"))
        shares = all(type(value) in (int, float) and 0 <= value <= 1 for value in [*mean, *std])  # of 255
        if not shares or min(std, default=1) < 0.001 or len(mean) != len(std):
            raise ValueError
        if isinstance(classes, str) or len({*classes}) < len(classes) or not all(isinstance(c, str) for c in classes):
            raise ValueError
    return notes


def write_notes(view: View, classes: tuple[str, ...], **besides: object) -> dict[str, str]:
    notes = {"classes": classes, "image_size": view.image_size, "mean": view.mean, "std": view.std}
    notes["resize"] = "shorter side to image_size, bilinear, antialiased; middle square"
    return {"task": json.dumps(notes | besides)}


def hash_of(state: Mapping[str, Tensor]) -> str:
    """SHA-256, 16 digits, over names, shapes and values of a trunk's tensors, head apart."""
    digest = hashlib.sha256()
    for name in sorted(name for name in state if not name.startswith("head.")):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
