"""What is trained: one run as a frozen record, whose hash covers everything that changes the numbers."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace

from lab.data.registry import Facts, data_checksum, facts, published
from vitlib.data.augment import Augment
from vitlib.errors import UsageError, unknown
from vitlib.model import ViTConfig
from vitlib.train import PROTOCOLS, finetune, loop, tokenizers
from vitlib.train.dvae import DVAEConfig
from vitlib.train.recipe import Recipe

# Raised whenever training changes its numbers; tests/test_training.py holds twenty steps that notice.
TRAINING_VERSION = 2  # 2: branches at once (`par`), unread tokens skipped


# Seeds from here on are for development and tuning: they evaluate on validation images and are never judged.
FIRST_TUNING_SEED = 1000


ALLOWED = {
    "protocol": tuple(PROTOCOLS),
    "strategy": finetune.STRATEGIES,
    "targets": ("none", *tokenizers.TARGETS),
    "precision": ("float32", "bf16"),
    "execution": ("seq", "par"),
    "device": ("cpu", "cuda", "auto"),  # auto: a GPU where there is one; the result says what it was
}


# Fields that came after the first runs, with the value that means "as before".
LATER = {"tokenizer": None, "accumulate": 1, "compile": False, "checkpointing": False}


LATER_IN_MODEL = {"shrink_deep": False, "head_scale": 1.0, "key_bias": True}


LATER_IN_RECIPE = {"layer_decay": None, "augment": None, "cutmix": 0.0, "smoothing": 0.0, "repeats": 1, "ema": None}


@dataclass(frozen=True)
class RunSpec:
    """One training run. Its hash names it; equal specs are one run, whoever asks."""

    protocol: str  # "supervised" (also from scratch on few labels), "finetune" (from parent), "masked", "tokenizer"
    model: ViTConfig | DVAEConfig  # the second for "tokenizer"
    data: str
    recipe: Recipe
    seed: int = 0
    images: int | None = None  # class-balanced subset of the training images; None = all
    parent: RunSpec | None = None
    strategy: str = "full"
    targets: str = "none"  # of masked pre-training: see train/tokenizers.py
    tokenizer: RunSpec | None = None  # that makes the targets "dvae"
    masked: int = 0  # patches masked in each image
    # Fixed by the profile, the same on every machine.
    precision: str = "float32"
    execution: str = "seq"
    threads: int = 1
    device: str = "cpu"
    accumulate: int = 1  # parts of a batch that go through the model one after the other, or on several GPUs at once
    compile: bool = False
    checkpointing: bool = False  # activations are computed again in the backward pass

    def __post_init__(self) -> None:
        for field, allowed in ALLOWED.items():
            if getattr(self, field) not in allowed:
                raise unknown(field, getattr(self, field), allowed)
        protocol = PROTOCOLS[self.protocol]
        if protocol.needs_parent != (self.parent is not None):
            raise UsageError(f"a {self.protocol} run {'needs a' if protocol.needs_parent else 'has no'} parent")
        if not isinstance(self.model, protocol.config):
            raise UsageError(f"a {self.protocol} run trains no {type(self.model).__name__}")
        if (self.targets == "dvae") != (self.tokenizer is not None):
            raise UsageError(f"targets {self.targets!r} {'need a' if self.targets == 'dvae' else 'have no'} tokenizer")
        if self.tokenizer:
            own, theirs = ((m.grid, m.in_chans) for m in (self.model, self.tokenizer.model))
            seen = (self.recipe.augment and self.recipe.augment.view_size) or self.model.image_size
            if (
                not isinstance(self.tokenizer.model, DVAEConfig)
                or own != theirs
                or seen != self.tokenizer.model.image_size
            ):
                raise UsageError(f"{self.tokenizer.model.name} gives no token to each patch of {self.model.name}")
        if type(self.accumulate) is not int or not 1 <= self.accumulate <= self.recipe.batch_size:
            batch = self.recipe.batch_size
            raise UsageError(f"accumulate is {self.accumulate!r}: allowed are 1 to {batch} parts of a batch of {batch}")

    @functools.cached_property
    def hash(self) -> str:
        """16 hexadecimal digits over all fields, what the data is, the parent's hash and TRAINING_VERSION."""
        return hashlib.sha256(json.dumps(self.record(), sort_keys=True).encode()).hexdigest()[:16]

    def record(self) -> dict:
        """What is hashed, and what spec.json holds."""
        record = {f.name: getattr(self, f.name) for f in fields(self)}
        record |= {"model": asdict(self.model), "recipe": asdict(self.recipe)}
        record |= {name: spec and spec.hash for name, spec in (("parent", self.parent), ("tokenizer", self.tokenizer))}
        # Fields that came later are written only where they are set, so that older runs keep their hashes.
        later = ((record, LATER), (record["model"], LATER_IN_MODEL), (record["recipe"], LATER_IN_RECIPE))
        for part, defaults in later:
            for name, default in defaults.items():
                if name in part and part[name] == default:  # a tokenizer's model has other fields
                    del part[name]
        checksum = data_checksum(self.data, self.from_files)
        return record | {"data_checksum": checksum, "training_version": TRAINING_VERSION}

    @classmethod
    def from_fields(cls, whole: dict) -> RunSpec:
        """A spec from `dataclasses.asdict` of one that went through JSON: how it reaches other processes.

        (`record` holds the hashes of the runs it needs; this holds those runs.)
        """

        def plain(values: dict) -> dict:  # JSON has lists for our tuples
            return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}

        whole, recipe = dict(whole), plain(whole["recipe"])
        recipe["augment"] = recipe["augment"] and Augment(**plain(recipe["augment"]))
        kind = PROTOCOLS[whole["protocol"]].config
        whole |= {"recipe": Recipe(**recipe), "model": kind(**plain(whole["model"]))}
        whole |= {name: whole[name] and cls.from_fields(whole[name]) for name in ("parent", "tokenizer")}
        return cls(**whole)

    def with_seed(self, seed: int) -> RunSpec:
        """The same run, and the same trunk and tokenizer, at another seed."""
        parent, tokenizer = (spec and spec.with_seed(seed) for spec in (self.parent, self.tokenizer))
        return replace(self, seed=seed, parent=parent, tokenizer=tokenizer)

    @property
    def needs(self) -> tuple[RunSpec, ...]:
        """The runs whose weights this one starts with: its tokenizer, its parent."""
        return tuple(spec for spec in (self.tokenizer, self.parent) if spec is not None)

    def family(self) -> Iterator[RunSpec]:
        """What it needs first, then this run."""
        for spec in self.needs:
            yield from spec.family()
        yield self

    @property
    def split(self) -> str:
        """The split that accuracy is measured on."""
        return "test" if self.seed < FIRST_TUNING_SEED else "validation"

    @property
    def from_files(self) -> bool:
        """Images are read from their files as they are needed, and augmented one by one; else they are held in memory."""
        return self.recipe.augment is not None

    @property
    def facts(self) -> Facts:
        return published(self.data) if self.from_files else facts(self.data)

    @property
    def training_images(self) -> int:
        return self.images or self.facts.sizes["train"]

    @property
    def steps(self) -> int:
        return loop.count_steps(self.recipe, self.training_images)

    def describe(self) -> str:
        """A run in a few words, for progress lines and errors."""
        parts = [self.protocol, self.data, self.model.name, f"{self.model.image_size} px"]
        parts += [f"stem {self.model.stem}"] if isinstance(self.model, ViTConfig) else []
        parts += [f"{self.images} images"] if self.images else []
        parts += [self.strategy] if self.parent else []
        return ", ".join([*parts, f"seed {self.seed}"])
