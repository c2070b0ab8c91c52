"""What is trained: one run as a frozen record, whose hash covers everything that changes the numbers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from lab.data.cards import Facts, source
from lab.runs import pretrained
from lab.runs.results import hash_of
from vitlib.errors import UsageError
from vitlib.model import ViTConfig
from vitlib.records import check, check_types
from vitlib.train import PROTOCOLS, finetune, loop, tokenizers
from vitlib.train.dvae import DVAEConfig
from vitlib.train.recipe import Recipe

TRAINING_VERSION = 3  # raised whenever training changes its numbers; golden steps in tests/test_loop.py notice

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
LEAST = {"seed": 0, "images": 1, "subset": 0, "masked": 0, "threads": 1, "accumulate": 1}


@dataclass(frozen=True)
class RunSpec:
    """One training run. Its hash names it; equal specs are one run, whoever asks."""

    protocol: str  # of `vitlib.train.PROTOCOLS`; "supervised" also from scratch on few labels
    model: ViTConfig | DVAEConfig  # the second for "tokenizer"
    data: str
    recipe: Recipe
    seed: int = 0
    images: int | None = None  # class-balanced subset of the training images; None = all
    subset: int = 0  # which of several such subsets of one seed
    streamed: bool = False  # images are opened one by one as they are needed; else all are held in memory
    parent: RunSpec | None = None
    strategy: str = "full"
    targets: str = "none"  # of masked pre-training: see train/tokenizers.py
    tokenizer: RunSpec | None = None  # that makes the targets "dvae"
    masked: int = 0  # patches masked per image
    blank: bool = False  # masked patches are blanked in the pixels too (H9)
    # Fixed by the profile, the same on every machine.
    precision: str = "float32"
    execution: str = "seq"
    threads: int = 1
    device: str = "cpu"
    accumulate: int = 1  # parts of a batch that go through the model one after the other, or on several GPUs at once
    compile: bool = False
    checkpointing: bool = False  # activations are computed again in the backward pass
    # What it starts from in the place of a parent: a file of weights, or a timm name. Hashed by content, where it is set.
    weights: str | None = None

    def __post_init__(self) -> None:
        """Raises UsageError for what cannot be, and for a run that would train nothing."""
        check_types(self)
        check(self, ALLOWED, ())
        for field, least in LEAST.items():
            if (value := getattr(self, field)) is not None and value < least:
                raise UsageError(f"{field} is {value}: allowed are whole numbers from {least}")
        protocol, batch = PROTOCOLS[self.protocol], self.recipe.batch_size
        if self.accumulate > batch:
            raise UsageError(f"accumulate is {self.accumulate}: allowed are 1 to {batch} parts of a batch of {batch}")
        if [self.parent, self.weights].count(None) != (1 if protocol.needs_parent else 2):
            allowed = "needs a parent or weights, one of them" if protocol.needs_parent else "has no parent, no weights"
            raise UsageError(f"a {self.protocol} run {allowed}")
        if not isinstance(self.model, protocol.config):
            raise UsageError(f"a {self.protocol} run trains no {type(self.model).__name__}")
        if (self.targets == "dvae") != (self.tokenizer is not None):
            raise UsageError(f"targets {self.targets!r} {'need a' if self.targets == 'dvae' else 'have no'} tokenizer")
        if self.tokenizer and not self._tokenizer_fits():
            raise UsageError(f"{self.tokenizer.model.name} gives no token to each patch of {self.model.name}")

    def _tokenizer_fits(self) -> bool:
        """A tokenizer of as many patches and channels, trained at the image size that it sees here."""
        ours, theirs = self.model, self.tokenizer.model
        seen = (self.recipe.augment and self.recipe.augment.view_size) or ours.image_size
        same_patches = (ours.grid, ours.in_chans) == (theirs.grid, theirs.in_chans)
        return isinstance(theirs, DVAEConfig) and same_patches and seen == theirs.image_size

    @functools.cached_property
    def hash(self) -> str:
        """16 hexadecimal digits over all fields, what the data is, the parent's hash and TRAINING_VERSION.

        Raises UsageError where the weights that it starts from are still to be downloaded.
        """
        if not self.ready:
            named = ", ".join(one.weights for one in self.family() if one.weights)
            raise UsageError(f"the weights {named} are not here, so that their runs have no hash: a run downloads them")
        return hash_of(self.record())

    @property
    def ready(self) -> bool:
        """Whether the weights of a timm name that it, or its parent, starts from are here."""
        return all(pretrained.identity(one.weights)["sha256"] for one in self.family() if one.weights)

    def record(self) -> dict:
        """What is hashed, and what spec.json holds: every field, parents and tokenizers by their hashes, weights by content."""
        needs = {"parent": self.parent, "tokenizer": self.tokenizer}
        needs = {name: spec.hash if spec and spec.ready else None for name, spec in needs.items()}
        data = {"data_checksum": source(self.data, self.streamed).checksum, "training_version": TRAINING_VERSION}
        start = {} if self.weights is None else {"weights": pretrained.identity(self.weights)}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "weights"} | needs | data | start | {
            "model": asdict(self.model), "recipe": asdict(self.recipe),
        }  # fmt: skip

    def check_start(self) -> None:
        """Raises UsageError where it cannot start from its weights: they are absent, of another model, or have changed."""
        if self.weights is None:
            return
        pretrained.check(self.weights, self.model)
        if hash_of(self.record()) != self.hash:
            raise UsageError(f"the weights {self.weights} have changed since the {self} was named: name it again")

    def with_seed(self, seed: int) -> RunSpec:
        """The same run, its parent and its tokenizer too, at another seed."""
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
    def facts(self) -> Facts:
        return source(self.data, self.streamed).facts

    @property
    def training_images(self) -> int:
        return self.images or self.facts.sizes["train"]

    @property
    def steps(self) -> int:
        return loop.count_steps(self.recipe, self.training_images)

    def describe(self) -> str:
        """The run on one line, for progress and errors."""
        stem = f"stem {self.model.stem}" if isinstance(self.model, ViTConfig) else None
        images = self.images and f"{self.images} images"
        strategy = self.strategy if self.parent or self.weights else None
        start = self.weights and f"from {Path(self.weights).name}"
        parts = (self.protocol, self.data, self.model.name, f"{self.model.image_size} px", stem, images, strategy)
        return ", ".join([*filter(None, (*parts, start)), f"seed {self.seed}"])

    def __str__(self) -> str:
        return f"run {self.hash} ({self.describe()})"
