"""Which runs each notebook is made of, at each profile.

A profile is a scale; the code path is the same. An experiment is a table of arms, each a run without its seed, and the
seeds; `specs()` lists all runs with the seeds outermost, so that a stop leaves complete pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from vitlib.data.external import DataAbsent
from vitlib.data.registry import facts
from vitlib.errors import UsageError, unknown
from vitlib.lab import measure, plan
from vitlib.lab.launch import launch
from vitlib.lab.ledger import Part, ledger, transfer_arms
from vitlib.lab.runs import Result, RunSpec
from vitlib.model import ViTConfig, vit_config
from vitlib.train import recipes
from vitlib.train.dvae import DVAEConfig
from vitlib.train.finetune import at_image_size
from vitlib.train.recipes import Recipe


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
    trunk_data: str = "fashion-mnist-6"  # of transfer: classes that no target has
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
        """The forms below have no runs here: their notebooks show sizes, the paper and the committed reference."""
        return self.judged and not self.every_arm


# smoke: the code runs. cpu: the primary contrasts. study: every arm, other seeds, longer pre-training.
PROFILES = {
    "smoke": Profile(
        name="smoke", data="fashion-mnist", seeds=(1000,), width=32, pairs=12, image_size=16, finetune_size=20,
        patch_size=4, stem_pairs=6, images=500, finetune_images=500, few_labels=100, epochs=2, masked_epochs=1,
        few_labels_epochs=8, every_arm=False,
    ),
    "cpu": Profile(
        name="cpu", data="fashion-mnist", seeds=(0, 1, 2, 3, 4), width=64, pairs=12, image_size=16, finetune_size=20,
        patch_size=4, stem_pairs=6, images=12000, finetune_images=4500, few_labels=500, epochs=2, masked_epochs=3,
        few_labels_epochs=24, every_arm=False,
    ),
    "study": Profile(
        name="study", data="fashion-mnist", seeds=(10, 11, 12, 13, 14), width=64, pairs=12, image_size=16,
        finetune_size=20, patch_size=4, stem_pairs=6, images=None, finetune_images=6000, few_labels=500, epochs=2,
        masked_epochs=4, few_labels_epochs=24, every_arm=True, targets="dvae",
    ),
    # float32: a GPU is bound by the number of kernels at this size, and bfloat16 needs more of them.
    "gpu": Profile(
        name="gpu", data="cifar-10", seeds=(20, 21, 22, 23, 24), width=192, pairs=12, image_size=24, finetune_size=32,
        patch_size=4, stem_pairs=12, images=None, finetune_images=None, few_labels=5000, epochs=12, masked_epochs=24,
        few_labels_epochs=24, every_arm=True, targets="dvae", widths=(96, 192, 288), wider=(288, 16),
        trunk_data="tiny-imagenet", batch=4, rate=0.5, device="auto",
    ),
    "imagenet": Profile(
        name="imagenet", data="imagenet-1k", seeds=(30, 31, 32, 33, 34), width=768, pairs=36, image_size=224,
        finetune_size=384, patch_size=16, stem_pairs=12, images=None, finetune_images=None, few_labels=0, epochs=300,
        masked_epochs=300, few_labels_epochs=100, every_arm=True, execution="seq", targets="dvae", trunk_data="imagenet-1k",
        device="cuda", paper=True,
    ),
}  # fmt: skip

MASKED_SHARE = 75 / 196  # of the patches. BEiT masks 75 of 196 (38 %); here 6 of 16
LAYER_SCALE = 1e-4  # Released code: models_v2.py, init_scale; the paper states no value


def profile(name: str) -> Profile:
    """Raises UsageError for a profile that does not exist."""
    if name not in PROFILES:
        raise unknown("profile", name, PROFILES)
    return PROFILES[name]


@dataclass(frozen=True)
class Experiment:
    """The arms of one notebook at one profile."""

    notebook: str
    profile: Profile
    arms: dict[str, RunSpec]

    def specs(self) -> list[RunSpec]:
        """Every run, seeds outermost."""
        return [spec.with_seed(seed) for seed in self.profile.seeds for spec in self.arms.values()]

    def run(self, jobs: int = 0) -> Runs:
        """Train what is missing (`jobs` at a time, 0 = one a core) and read all results."""
        return self.collect(launch(self.specs(), jobs))

    def collect(self, found: dict[RunSpec, Result]) -> Runs:
        """The results by arm, one a seed."""
        seeds = self.profile.seeds
        return Runs(self, {arm: [found[spec.with_seed(s)] for s in seeds] for arm, spec in self.arms.items()})


@dataclass(frozen=True)
class Runs:
    """The results of an experiment: for each arm one result a seed."""

    experiment: Experiment
    results: dict[str, list[Result]]


def _model(p: Profile, depth: int, branches: int = 1, width: int | None = None, **fields: object) -> ViTConfig:
    known = facts(p.data)
    return vit_config(
        f"W{width or p.width}-{depth}x{branches}/{p.patch_size}", image_size=p.image_size, in_chans=known.channels,
        num_classes=known.num_classes, **fields,
    )  # fmt: skip


def _spec(p: Profile, protocol: str, model: ViTConfig | DVAEConfig, recipe: Recipe, **fields: object) -> RunSpec:
    """A run on the profile's data and device, with its factors on batch and rate."""
    recipe = replace(recipe, batch_size=recipe.batch_size * p.batch, lr=recipe.lr * p.rate)
    execution = "seq" if protocol == "tokenizer" else p.execution
    return RunSpec(protocol, model, p.data, recipe, execution=execution, device=p.device, **fields)


def _supervised(p: Profile, model: ViTConfig, recipe: Recipe | None = None) -> RunSpec:
    recipe = recipe or (recipes.SUPERVISED if model.layer_scale is None else recipes.SUPERVISED_LAYER_SCALE)
    return _spec(p, "supervised", model, replace(recipe, epochs=p.epochs), images=p.images)


def tokenizer(p: Profile) -> RunSpec:
    """The paper's kind of tokenizer at this scale, for `RunSpec(..., targets="dvae", tokenizer=...)`."""
    model = DVAEConfig(p.image_size, p.patch_size, facts(p.data).channels)
    # At smoke a few small steps, or another processor's rounding would become other tokens.
    recipe = recipes.TOKENIZER if p.judged else replace(recipes.TOKENIZER, epochs=1, lr=3e-4)
    return _spec(p, "tokenizer", model, recipe, images=p.images)


def branches(p: Profile) -> dict[str, RunSpec]:
    """Figure 1: the same pairs in 1, 2, 3 or 4 branches. "+LS" = with LayerScale."""

    def arm(pairs: int, k: int, scale: float | None) -> RunSpec:
        return _supervised(p, _model(p, pairs // k, k, layer_scale=scale))

    own = [(p.pairs, k) for k in ((1, 2, 3, 4) if p.every_arm or not p.judged else (1, 2))]
    forms = [(n, k, scale) for n, k in own for scale in ((LAYER_SCALE, None) if p.every_arm else (LAYER_SCALE,))]
    if p.every_arm:  # Paper: Figure 1 without LayerScale; with it 36x1 and 18x2 alone (Tables 2 and 3)
        forms += [(36, k, None) for k in (1, 2, 3, 4)] + [(36, k, LAYER_SCALE) for k in (1, 2)]
    return {f"{n // k}x{k}{'+LS' if scale else ''}": arm(n, k, scale) for n, k, scale in forms}


def _form(p: Profile, pairs: int, k: int, width: int | None = None, scale: float | None = None) -> RunSpec:
    """So many pairs in layers of k branches, trained as everywhere; runs equal to Figure 1's are the same runs."""
    return _supervised(p, _model(p, pairs // k, k, width, layer_scale=scale))


def widths(p: Profile) -> dict[str, RunSpec]:
    """Figure 2: one branch against two over the width, at the profile's own pairs, without LayerScale."""
    sizes = () if p.only_primary else p.widths if p.every_arm else (32, 64)
    return {f"W{width} {p.pairs // k}x{k}": _form(p, p.pairs, k, width) for width in sizes for k in (1, 2)}


def pairs(p: Profile) -> dict[str, RunSpec]:
    """Figure 3: one branch against two over the pairs, without LayerScale."""
    sizes = () if p.only_primary else (12, 24, 36) if p.every_arm else (4, 8)
    return {f"{n // k}x{k}": _form(p, n, k) for n in sizes for k in (1, 2)}


def layer_scale(p: Profile) -> dict[str, RunSpec]:
    """Table 2: one branch and two, with LayerScale and without, for the profile's epochs and for a third more."""
    longer = replace(p, epochs=-(-4 * p.epochs // 3))  # Paper: 300 and 400
    lengths = {} if p.only_primary else {"": p, " longer": longer}
    return {
        f"{p.pairs // k}x{k}{'+LS' if scale else ''}{long}": _form(q, p.pairs, k, scale=scale)
        for k in (1, 2) for scale in (None, LAYER_SCALE) for long, q in lengths.items()
    }  # fmt: skip


def depth_or_width(p: Profile) -> dict[str, RunSpec]:
    """Table 3: more pairs, in one branch and in two, against more width at like multiply-adds, with LayerScale."""
    if p.only_primary:
        return {}
    narrow, wide = ((p.width, 36), p.wider) if p.every_arm else ((32, 8), (64, 2))
    forms = [(*narrow, 1), (*narrow, 2), (*wide, 1)]
    arms = {f"W{width} {n // k}x{k}+LS": _form(p, n, k, width, LAYER_SCALE) for width, n, k in forms}
    cost = [measure.macs(spec.model).paper for spec in arms.values()]
    if max(cost) > 1.05 * min(cost):
        raise UsageError(f"{', '.join(arms)} are not of like cost: {cost} multiply-adds")
    return arms


def resolution(p: Profile) -> dict[str, RunSpec]:
    """Table 5: a trunk, then everything, attention, feed-forward or head only at the larger size."""
    trunk = _supervised(p, _model(p, p.pairs, layer_scale=LAYER_SCALE))
    larger = at_image_size(trunk.model, p.finetune_size)

    def arm(strategy: str) -> RunSpec:
        recipe = recipes.FINE_TUNING[strategy]
        return _spec(p, "finetune", larger, recipe, images=p.finetune_images, parent=trunk, strategy=strategy)

    return {"trunk": trunk} | {strategy: arm(strategy) for strategy in ("full", "attn", "ffn", "head")}


TRANSFER_SMOKE = tuple(f"W32 fashion-mnist-4 200 {strategy}" for strategy in ("full", "attn", "ffn"))


def transfer(p: Profile) -> dict[str, RunSpec]:
    """Table 6: other data than the trunk's, by width and number of labelled images; no runs of its own at cpu."""
    names = transfer_arms(p.name) if p.every_arm else () if p.judged else TRANSFER_SMOKE
    return {name: _transferred(p, *name.split()) for name in names}


def _transferred(p: Profile, width: str, data: str, images: str, strategy: str) -> RunSpec:
    """The arm "W64 digits 100 attn"; `scratch` has the labels and steps of `full`, and no trunk."""
    # The trunk's classes share the profile's number of images equally.
    classes = facts(p.trunk_data).num_classes
    own = replace(p, data=p.trunk_data, width=int(width[1:]), images=p.images and p.images // classes * classes)
    trunk = _supervised(own, _model(own, p.pairs, layer_scale=LAYER_SCALE))
    there = replace(own, data=data)
    model = _model(there, p.pairs, layer_scale=LAYER_SCALE)
    recipe = recipes.transfer(own.width, data, int(images), "full" if strategy == "scratch" else strategy)
    # A mirrored digit is another sign or none.
    recipe = replace(recipe, epochs=min(recipe.epochs, p.few_labels_epochs), flip=data != "digits")
    if strategy == "scratch":
        return _spec(there, "supervised", model, recipe, images=int(images))
    return _spec(there, "finetune", model, recipe, images=int(images), parent=trunk, strategy=strategy)


# The rows of Table 7: what each stem is. "linear+1" is the linear stem with one pair more, in the role of ViT-B13.
STEM_ARMS: dict[str, dict[str, str]] = {
    "linear": {"stem": "linear"},
    "linear-bn": {"stem": "linear", "stem_norm": "bn"},
    "linear-gelu": {"stem": "linear", "stem_act": "gelu"},
    "linear-bn-gelu": {"stem": "linear", "stem_norm": "bn", "stem_act": "gelu"},
    "linear+1": {"stem": "linear"},
    "conv": {"stem": "conv"},
    "conv-ln": {"stem": "conv", "stem_norm": "ln"},
    "local": {"stem": "local"},
    "hmlp": {"stem": "hmlp"},
    "hmlp-ln": {"stem": "hmlp", "stem_norm": "ln"},
}
PRIMARY_STEMS = ("linear", "hmlp")


def stem_pairs(name: str, pairs: int) -> int:
    """The pairs of a row of Table 7 whose other rows have so many."""
    return pairs + (name == "linear+1")


def stem_model(p: Profile, name: str) -> ViTConfig:
    """A row of Table 7 at the profile's size. It reads the mean of the patch tokens, as BEiT does."""
    if p.paper:
        from vitlib.lab import imagenet

        return imagenet.ARMS["52"](p)[f"{name} supervised"].model
    return _model(p, stem_pairs(name, p.stem_pairs), pool="mean", **STEM_ARMS[name])


def _masked(p: Profile, model: ViTConfig, targets: str) -> RunSpec:
    return _spec(
        p, "masked", model, replace(recipes.MASKED, epochs=p.masked_epochs), images=p.images, targets=targets,
        tokenizer=tokenizer(p) if targets == "dvae" else None, masked=round(MASKED_SHARE * model.grid**2),
    )  # fmt: skip


def _few_labels(p: Profile, model: ViTConfig, parent: RunSpec | None, recipe: Recipe = recipes.FEW_LABELS) -> RunSpec:
    recipe = replace(recipe, epochs=p.few_labels_epochs)
    return _spec(p, "finetune" if parent else "supervised", model, recipe, images=p.few_labels, parent=parent)


def stems(p: Profile) -> dict[str, RunSpec]:
    """Table 7, arms "<stem> <training>": from scratch and after masked pre-training, on few labels.

    `study` has every stem, and all labels too; the tokens of one discrete VAE a seed, which all stems predict; and, for the
    two primary stems, what the lighter tokens and layer decay would change. `smoke` has one arm with those tokens.
    """
    arms: dict[str, RunSpec] = {}
    for name in STEM_ARMS if p.every_arm else PRIMARY_STEMS:
        model = stem_model(p, name)
        trunk = _masked(p, model, p.targets)
        arms[f"{name} scratch"] = _few_labels(p, model, None)
        arms[f"{name} pretrained"] = _few_labels(p, model, trunk)
        if p.every_arm:
            arms[f"{name} supervised"] = _supervised(p, model, recipes.SUPERVISED_STEMS)
        if p.every_arm and name in PRIMARY_STEMS:
            arms[f"{name} pretrained k-means"] = _few_labels(p, model, _masked(p, model, "tokens"))
            # Paper: BEiT's fine-tuning, with layer decay. What is judged has none: see FEW_LABELS_BEIT
            arms[f"{name} pretrained decay"] = _few_labels(p, model, trunk, recipes.FEW_LABELS_BEIT)
    if not p.judged:
        model = stem_model(p, "linear")
        arms["linear pretrained dvae"] = _few_labels(p, model, _masked(p, model, "dvae"))
    return arms


def baselines(p: Profile) -> dict[str, RunSpec]:
    """Table 1: a recipe for 300 epochs of ImageNet-1k cannot be tried at another scale."""
    return {}


# notebook number -> (file name, arms); notebooks without runs have none
NOTEBOOKS: dict[str, tuple[str, Callable[[Profile], dict[str, RunSpec]] | None]] = {
    "00": ("00_claims", None),
    "21": ("21_tab1_baselines", baselines),
    "31": ("31_fig1_branches", branches),
    "32": ("32_fig2_width", widths),
    "33": ("33_fig3_pairs", pairs),
    "34": ("34_tab2_layerscale", layer_scale),
    "35": ("35_tab3_depth_or_width", depth_or_width),
    "36": ("36_tab4_throughput", None),
    "41": ("41_tab5_resolution", resolution),
    "42": ("42_tab6_transfer", transfer),
    "51": ("51_fig5_stem_and_masking", None),
    "52": ("52_tab7_masked_pretraining", stems),
}


def notebook_number(name: str) -> str:
    """ "31", "31_fig1_branches" and "31_fig1_branches.ipynb" are one notebook. Raises UsageError for another."""
    for number, (file, _) in NOTEBOOKS.items():
        if name in (number, file, f"{file}.ipynb", f"notebooks/{file}.ipynb"):
            return number
    raise unknown("notebook", name, [file for file, _ in NOTEBOOKS.values()])


def experiment(notebook: str, profile_name: str) -> Experiment:
    """The experiment behind a notebook. Raises UsageError for names that do not exist."""
    number, scale = notebook_number(notebook), profile(profile_name)
    arms = NOTEBOOKS[number][1]
    if arms is None:
        raise UsageError(f"notebook {NOTEBOOKS[number][0]} has no runs of its own")
    if scale.paper:
        from vitlib.lab import imagenet

        arms = imagenet.ARMS[number]
    return Experiment(number, scale, arms(scale))


def available(profile_name: str, notebooks: list[str]) -> tuple[list[str], list[DataAbsent]]:
    """Of these notebooks those whose data is there, and what is said of the others' data, each data set once."""
    there, absent = [], {}
    for number in notebooks:
        try:
            if NOTEBOOKS[number][1]:
                experiment(number, profile_name)
            there.append(number)
        except DataAbsent as fault:
            absent[str(fault)] = fault
    return there, list(absent.values())


def all_specs(profile_name: str, notebooks: list[str]) -> list[RunSpec]:
    """The runs of several notebooks in one queue, each once, seeds outermost.

    Where every arm is run, which takes hours: what each part of a claim reads, the cheapest part first, then the rest,
    so that a stop leaves whole verdicts.
    """
    p = profile(profile_name)
    chosen = [experiment(n, p.name) for n in notebooks if NOTEBOOKS[n][1]]
    blocks = [[spec for e in chosen for spec in e.arms.values()]]
    if p.every_arm:
        blocks = sorted((arms for e in chosen for arms in _read_by_parts(e)), key=_cost) + blocks
    return list(dict.fromkeys(spec.with_seed(seed) for block in blocks for seed in p.seeds for spec in block))


def part_specs(profile_name: str, parts: list[str]) -> list[RunSpec]:
    """The runs that the verdicts on these parts of claims are read from, part by part, seeds outermost.

    Raises UsageError for a part that does not exist or has no runs at this profile.
    """
    p, queue = profile(profile_name), []
    for id in parts:
        if id not in ledger():
            raise unknown("part of a claim", id, ledger())
        part = ledger()[id]
        arms = NOTEBOOKS[part.notebook][1] and experiment(part.notebook, p.name).arms
        read = _read(part, p, arms) if arms and part.belongs(p.name) else []
        if not read:
            raise UsageError(f"part {id} has no runs at profile {p.name}")
        queue += [spec.with_seed(seed) for seed in p.seeds for spec in read]
    return list(dict.fromkeys(queue))


def _read_by_parts(setting: Experiment) -> list[list[RunSpec]]:
    """For each part of a claim in this notebook the runs that its verdict is read from."""
    parts = [part for part in ledger().values() if part.notebook == setting.notebook]
    return [_read(part, setting.profile, setting.arms) for part in parts if part.belongs(setting.profile.name)]


def _read(part: Part, p: Profile, arms: dict[str, RunSpec]) -> list[RunSpec]:
    there = part.at_profile(p.name)
    names = [*there.arms(max(p.pairs, there.min_pairs)), there.parent]
    return [arms[name] for name in dict.fromkeys(names) if name in arms]


def _cost(arms: list[RunSpec]) -> float:
    return sum(plan.formula_seconds(spec) for spec in {member for arm in arms for member in arm.family()})
