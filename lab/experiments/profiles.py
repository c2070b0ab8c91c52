"""The scales of all runs, and what an arm of an experiment is. A profile is a scale; the code path is the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from vitlib.errors import UsageError, unknown

if TYPE_CHECKING:
    from lab.runs.spec import RunSpec


@dataclass(frozen=True)
class Arm:
    """One cell of a table: what is trained (its recipe included, its seed not), and where its number is printed."""

    label: str
    spec: RunSpec
    row: str  # the model, stem, or data set with width and images, as in the paper's table
    column: str  # what is compared within a row: branches, strategy, training
    n: int | None = None  # of the profile's seeds the first n; None = all


@dataclass(frozen=True)
class Stems:
    """The regime of Table 7 below ImageNet's scale."""

    image_size: int
    patch_size: int  # hMLP's kernels are (P / 4, 2, 2)
    hidden: int  # channels inside the hMLP stem. Paper: width / 4, which is 96 to 192; of width 64 it would be 16
    masked_epochs: int
    supervised_epochs: int
    finetune_epochs: int  # on all labels
    few_labels: int = 500
    few_labels_epochs: int = 24
    pairs: int = 6
    n: int | None = None  # seeds, where they are fewer than the profile's


@dataclass(frozen=True)
class Profile:
    """The scale of all runs."""

    name: str
    data: str
    seeds: tuple[int, ...]
    width: int
    pairs: int
    image_size: int  # pixels, after resize
    finetune_size: int  # Table 5's second resolution
    patch_size: int
    images: int | None  # training images of supervised runs; None = all
    finetune_images: int | None
    control_images: int  # of `full, fewer steps`
    epochs: int
    stems: Stems
    controls: bool = False  # the positive controls, without which no equivalence is judged
    exploratory: bool = False  # the arms of parts that are not primary
    targets: str = "tokens"  # of masked pre-training: "dvae" as in the paper, "tokens" (k-means) where it must be quick
    # Of Table 6: data set -> its numbers of labelled images, class-balanced
    transfer_widths: tuple[int, ...] = ()
    transfer_images: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)
    rates: Mapping[str, float] = field(default_factory=dict, hash=False)  # arm -> learning rate: see RATES
    device: str = "cpu"
    paper: bool = False  # the paper's own protocols: `imagenet.py`
    weights: str = ""  # a timm name, whose weights every run starts from: `public.py`

    @property
    def module(self) -> str:
        """That of its arms."""
        return "public" if self.weights else "imagenet" if self.paper else "small"

    @property
    def judged(self) -> bool:
        """At smoke the code runs and exact claims are judged; trained ones are not."""
        return self.name != "smoke"

    def rate(self, arm: str, default: str = "") -> float:
        """The learning rate of an arm; of one that was not tuned that of `default`."""
        return self.rates[arm] if arm in self.rates else self.rates[default or arm]


# Where the search for the learning rate of every arm begins, from the pilot; one that comes after another has the other's
# chosen rate, and these otherwise. "<stem> masked" is the rate of pre-training, "<stem> pretrained" that of the fine-tuning
# after it, "few" the profile's number of few labels.
START = {
    "12x1+LS": 3e-3, "6x2+LS": 3e-3, "36x1+LS": 3e-3, "18x2+LS": 3e-3,
    "12x1": 1e-3, "6x2": 1e-3, "36x1": 5e-4, "18x2": 1e-3,
    "full": 2e-3, "attn": 4e-3, "ffn": 8e-3, "head": 1.6e-2, "fc1": 8e-3, "norm": 1.6e-2, "bias": 1.6e-2,
    "digits 100 full": 3e-3, "digits 100 attn": 6e-3, "digits 100 scratch": 3e-3,
    "linear supervised": 2e-3, "hmlp supervised": 2e-3, "conv supervised": 1e-3,
    "linear masked": 2e-3, "hmlp masked": 2e-3, "conv masked": 2e-3,
    "linear pretrained": 1e-3, "hmlp pretrained": 1e-3, "conv pretrained": 1e-3,
    "linear scratch few": 1e-3, "linear pretrained few": 1e-3,
}  # fmt: skip


def started(few_labels: int) -> dict[str, float]:
    """`START` under the names of the arms of a profile with so many few labels."""
    return {arm.replace("few", str(few_labels)): lr for arm, lr in START.items()}


# The learning rate of every arm: where the search began, and over it what `python -m lab tune` chose, once it is done
# (outputs/reference/<profile>/tuning.csv).
RATES = started(500) | {
    "6x2+LS": 0.0015, "linear masked": 0.004, "linear pretrained": 0.002, "linear supervised": 0.001, "hmlp pretrained": 0.002,
    "conv supervised": 0.002, "ffn": 0.016, "head": 0.032, "fc1": 0.032, "norm": 0.032,
    "bias": 0.032, "36x1+LS": 0.0015, "12x1": 0.002, "36x1": 0.001, "digits 100 full": 0.006,
    "digits 100 attn": 0.012,
}  # fmt: skip
# Tuned are 12x1+LS, full, attn and ffn, of which the first two stay where the search began.
PHOTOS_RATES = started(2000) | {"attn": 0.002, "ffn": 0.002}

_EMBEDDED = Profile(
    name="study", data="fashion-mnist", seeds=tuple(range(40, 60)), width=64, pairs=12, image_size=16, finetune_size=20,
    patch_size=4, images=None, finetune_images=6000, control_images=3000, epochs=2,
    stems=Stems(32, 8, hidden=64, masked_epochs=8, supervised_epochs=8, finetune_epochs=2),
    controls=True, exploratory=True, targets="dvae", transfer_widths=(64,), transfer_images={"digits": (100,)}, rates=RATES,
)  # fmt: skip
_IMAGENET = Profile(
    name="imagenet", data="imagenet-1k", seeds=(30, 31, 32, 33, 34), width=768, pairs=36, image_size=224,
    finetune_size=384, patch_size=16, images=None, finetune_images=None, control_images=640_000, epochs=300,
    stems=Stems(224, 16, hidden=192, masked_epochs=300, supervised_epochs=300, finetune_epochs=100, few_labels=0, pairs=12),
    controls=True, exploratory=True, targets="dvae", transfer_widths=(384, 768, 1024),
    transfer_images={  # Table 9: every label of each
        "inaturalist-2018": (437_513,), "inaturalist-2019": (265_240,), "cifar-10": (50_000,),
        "cifar-100": (50_000,), "stanford-cars": (8144,), "flowers-102": (2040,),
    },
    device="cuda", paper=True,
)  # fmt: skip
_PRIMARY = {"controls": False, "exploratory": False, "targets": "tokens"}
PROFILES = {
    # The code runs: a few steps of every kind, at rates that do not move with the study's.
    "smoke": replace(
        _EMBEDDED, name="smoke", seeds=(1000,), width=32, images=500, finetune_images=500, **_PRIMARY, transfer_widths=(32,),
        stems=Stems(32, 8, hidden=32, masked_epochs=1, supervised_epochs=1, finetune_epochs=1, few_labels=100, few_labels_epochs=8, pairs=2),
        rates=started(500),
    ),
    # A1, F1 and F2 by the study's recipes; Thing 3 at a quarter of the length, shown and not judged.
    "cpu": replace(
        _EMBEDDED, name="cpu", seeds=(0, 1, 2, 3, 4), **_PRIMARY, transfer_widths=(), transfer_images={},
        stems=Stems(32, 8, hidden=64, masked_epochs=2, supervised_epochs=2, finetune_epochs=1, n=2),
    ),
    "study": _EMBEDDED,
    # Photographs in colour, 16 tokens as in `study`. float32: a GPU is bound by the number of kernels at this size.
    "photos": Profile(
        name="photos", data="tiny-imagenet", seeds=(20, 21, 22, 23, 24), width=64, pairs=12, image_size=64, finetune_size=96,
        patch_size=16, images=None, finetune_images=None, control_images=11_200, epochs=4,
        stems=Stems(64, 16, hidden=64, masked_epochs=8, supervised_epochs=8, finetune_epochs=2, few_labels=2000),
        controls=True, targets="dvae", rates=PHOTOS_RATES, device="auto",
    ),
    "imagenet": _IMAGENET,
    # Tables 5 and 6 by fine-tuning alone, from one model that its authors published.
    "public": replace(
        _IMAGENET, name="public", data="stanford-cars", seeds=(35, 36, 37, 38, 39), width=384, pairs=12, epochs=1000,
        controls=False, exploratory=False, transfer_widths=(384,), weights="deit3_small_patch16_224.fb_in1k",
        transfer_images={"cifar-10": (50_000,), "cifar-100": (50_000,), "stanford-cars": (8144,), "flowers-102": (2040,)},
    ),
}  # fmt: skip


MASKED_SHARE = 75 / 196  # of the patches. BEiT masks 75 of 196 (38 %); here 6 of 16
LAYER_SCALE = 1e-4  # Released code: models_v2.py, init_scale; the paper states no value


def changed(p: Profile, seeds: int = 0, epochs: int = 0, pairs: int = 0, lr: float = 0.0, labels: int = 0) -> Profile:
    """A profile with a reader's own numbers in the place of its own; 0 changes nothing. lr: one rate for every arm.

    Raises UsageError for a number below 0, and for a fraction of what is counted.
    """
    for name, value in {"seeds": seeds, "epochs": epochs, "pairs": pairs, "labels": labels, "lr": lr}.items():
        kinds = (int, float) if name == "lr" else (int,)
        if type(value) not in kinds or not 0 <= value < float("inf"):
            what = "" if name == "lr" else "whole "
            raise UsageError(f"{name} is {value!r}: allowed are 0 (as the profile has it) and {what}numbers above it")
    stems = replace(p.stems, masked_epochs=epochs, supervised_epochs=epochs) if epochs else p.stems
    counts = {data: (labels,) for data in p.transfer_images} if labels else p.transfer_images
    return replace(
        p, seeds=tuple(p.seeds[0] + i for i in range(seeds)) or p.seeds, epochs=epochs or p.epochs, pairs=pairs or p.pairs,
        rates=dict.fromkeys(p.rates, lr) if lr else p.rates, stems=replace(stems, n=None) if seeds else stems,
        transfer_images=counts,
    )  # fmt: skip


def profile(name: str) -> Profile:
    """The look-up at the edge: a command line, a notebook, a test. Raises UsageError for another name."""
    if name not in PROFILES:
        raise unknown("profile", name, PROFILES)
    return PROFILES[name]
