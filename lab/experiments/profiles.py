"""The scales of all runs, and what an arm of an experiment is. A profile is a scale; the code path is the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from vitlib.errors import unknown

if TYPE_CHECKING:
    from lab.runs.spec import RunSpec


@dataclass(frozen=True)
class Arm:
    """One cell of a table: what is trained (its recipe included, its seed not), and where its number is printed."""

    label: str
    spec: RunSpec
    row: str  # the model, stem, or data set with width and images, as in the paper's table
    column: str  # what is compared within a row: branches, strategy, training


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
    stem_pairs: int  # of the models of Table 7
    images: int | None  # training images of supervised runs; None = all
    finetune_images: int | None
    few_labels: int
    epochs: int
    masked_epochs: int
    few_labels_epochs: int
    every_arm: bool  # False: the primary contrasts only
    # The same on every machine. float32: bfloat16 is 1.4 to 1.7 times as fast where the processor multiplies it and ten
    # times as slow where it does not. par: 4 branches train 1.2 times as fast as one after the other, 2 no slower.
    execution: str = "par"
    targets: str = "tokens"  # of masked pre-training: "dvae" as in the paper, "tokens" (k-means) where it must be quick
    widths: tuple[int, ...] = (32, 64, 96)  # of Figure 2
    wider: tuple[int, int] = (96, 16)  # width and pairs that cost what 36 pairs of `width` cost (Table 3)
    # Of Table 6: data set -> its numbers of labelled images, class-balanced, the last one all that it has
    transfer_widths: tuple[int, ...] = ()
    transfer_images: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)
    trunk_data: str = "fashion-mnist-6"  # of Table 6: classes that no target has
    # Factors on the recipes' batches and rates. Not tuned where they are not 1.
    batch: int = 1
    rate: float = 1.0
    device: str = "cpu"
    paper: bool = False  # the paper's own protocols: `imagenet.py`

    @property
    def judged(self) -> bool:
        """At smoke the code runs and exact claims are judged; trained ones are not."""
        return self.name != "smoke"

    @property
    def only_primary(self) -> bool:
        """Figures 2 and 3 and Tables 2 and 3 have no runs here: they show the paper and the committed reference."""
        return self.judged and not self.every_arm


_EMBEDDED = Profile(
    name="study", data="fashion-mnist", seeds=(10, 11, 12, 13, 14), width=64, pairs=12, image_size=16, finetune_size=20,
    patch_size=4, stem_pairs=6, images=None, finetune_images=6000, few_labels=500, epochs=2, masked_epochs=4,
    few_labels_epochs=24, every_arm=True, targets="dvae", transfer_widths=(32, 64),
    transfer_images={"fashion-mnist-4": (200, 1000, 7200), "digits": (100, 300, 1000), "animal-shapes": (200, 1000, 5000)},
)  # fmt: skip
# smoke: the code runs. cpu: the primary contrasts. study: every arm, other seeds, longer pre-training.
PROFILES = {
    "smoke": replace(
        _EMBEDDED, name="smoke", seeds=(1000,), width=32, images=500, finetune_images=500, few_labels=100, masked_epochs=1,
        few_labels_epochs=8, every_arm=False, targets="tokens", transfer_widths=(32,),
        transfer_images={"fashion-mnist-4": (200,)},
    ),
    "cpu": replace(
        _EMBEDDED, name="cpu", seeds=(0, 1, 2, 3, 4), images=12000, finetune_images=4500, masked_epochs=3, every_arm=False,
        targets="tokens", transfer_widths=(), transfer_images={},
    ),
    "study": _EMBEDDED,
    # float32: a GPU is bound by the number of kernels at this size, and bfloat16 needs more of them.
    "gpu": Profile(
        name="gpu", data="cifar-10", seeds=(20, 21, 22, 23, 24), width=192, pairs=12, image_size=24, finetune_size=32,
        patch_size=4, stem_pairs=12, images=None, finetune_images=None, few_labels=5000, epochs=12, masked_epochs=24,
        few_labels_epochs=24, every_arm=True, targets="dvae", widths=(96, 192, 288), wider=(288, 16),
        transfer_widths=(96, 192), transfer_images={"cifar-10": (500, 5000, 45_000)},
        trunk_data="tiny-imagenet", batch=4, rate=0.5, device="auto",
    ),
    "imagenet": Profile(
        name="imagenet", data="imagenet-1k", seeds=(30, 31, 32, 33, 34), width=768, pairs=36, image_size=224,
        finetune_size=384, patch_size=16, stem_pairs=12, images=None, finetune_images=None, few_labels=0, epochs=300,
        masked_epochs=300, few_labels_epochs=100, every_arm=True, execution="seq", targets="dvae", trunk_data="imagenet-1k",
        transfer_widths=(384, 768, 1024),
        transfer_images={  # Table 9: every label of each
            "inaturalist-2018": (437_513,), "inaturalist-2019": (265_240,), "cifar-10": (50_000,),
            "cifar-100": (50_000,), "stanford-cars": (8144,), "flowers-102": (2040,),
        },
        device="cuda", paper=True,
    ),
}  # fmt: skip


MASKED_SHARE = 75 / 196  # of the patches. BEiT masks 75 of 196 (38 %); here 6 of 16
LAYER_SCALE = 1e-4  # Released code: models_v2.py, init_scale; the paper states no value


def profile(name: str) -> Profile:
    """The look-up at the edge: a command line, a notebook, a test. Raises UsageError for another name."""
    if name not in PROFILES:
        raise unknown("profile", name, PROFILES)
    return PROFILES[name]
