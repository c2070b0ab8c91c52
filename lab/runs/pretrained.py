"""Weights that runs start from and that no run of ours trained: a file, or a timm name (`RunSpec.weights`)."""

from __future__ import annotations

import functools
from dataclasses import fields
from pathlib import Path

import huggingface_hub
from timm.models import get_pretrained_cfg, is_model

from vitlib.errors import UsageError
from vitlib.files import first_line, sha256
from vitlib.model import ViT, ViTConfig
from vitlib.model.weights import names_file
from vitlib.tasks.trunk import read_trunk

# Fields of a model that weights leave open; of depth and branches they fix the pairs, of LayerScale whether there is one.
OPEN = ("image_size", "num_classes", "drop_path", "init_std", "head_scale", "shrink_deep", "depth", "branches")


def identity(source: str) -> dict[str, str | None]:
    """What a run's hash holds of its weights: the SHA-256 of the file, wherever it is; before it the timm name, if it is one.

    None in the place of the SHA-256: timm has still to download them. Raises UsageError for a file that is not there, and
    for what is neither a file nor a timm name.
    """
    named = {} if names_file(source) else {"name": source}
    file = downloaded(source) if named else Path(source)
    if file and not file.is_file():
        raise UsageError(f"the weights {source} are not there: allowed are a file and a timm name")
    return named | {"sha256": file and _sha256(str(file), file.stat().st_size, file.stat().st_mtime_ns)}


def downloaded(name: str) -> Path | None:
    """The file of a timm name's weights in the Hub's cache; None where it is not there. Raises UsageError for another name."""
    if not is_model(name):
        raise UsageError(f"{name} is no file of weights and no model of timm: allowed are such a file and timm's names")
    try:
        known = get_pretrained_cfg(name)
    except RuntimeError as fault:
        raise UsageError(f"timm has no weights {name}: {first_line(fault)}") from fault
    if not (known and known.hf_hub_id):
        return None
    repository, _, revision = known.hf_hub_id.partition("@")
    names = [known.hf_hub_filename] if known.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    cached = functools.partial(huggingface_hub.try_to_load_from_cache, repository, revision=revision or None)
    return next((Path(file) for file in map(cached, names) if isinstance(file, str)), None)


@functools.lru_cache(maxsize=16)
def _sha256(path: str, size: int, modified: int) -> str:
    return sha256(path)


def model_of(source: str) -> ViT:
    """The pretrained model, downloaded where it is not here. Raises UsageError for weights that cannot be had or read."""
    return _read(source, identity(source)["sha256"])


@functools.lru_cache(maxsize=1)
def _read(source: str, checksum: str | None) -> ViT:
    return read_trunk(source).model


def check(source: str, model: ViTConfig) -> None:
    """Raises UsageError where these weights cannot be had, or are of another model, with what differs."""
    theirs, ours = (_fixed(config) for config in (model_of(source).config, model))
    if differ := ", ".join(f"{name} {theirs[name]}, not {ours[name]}" for name in ours if theirs[name] != ours[name]):
        raise UsageError(f"the weights {source} are of another model than {model.name}: {differ}")
    if identity(source)["sha256"] is None:
        raise UsageError(f"timm keeps no file of the weights {source} on the Hub: download one and name it")


def _fixed(config: ViTConfig) -> dict[str, object]:
    """What weights fix of a model."""
    values = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in OPEN}
    return values | {"pairs": config.pairs, "layer_scale": "none" if config.layer_scale is None else "there"}
