"""The paper's experiments below ImageNet's scale: for each a function of the profile that gives its arms, and their recipes.

Each docstring is the record of the pilot: command, CPU minutes of one core (runs that experiments share are counted in each),
and top-1, mean and standard deviation over n = 5 seeds (outputs/reference). The recipes belong to the embedded images (16x16
pixels, width 32 or 64, hundreds of steps) and are not the paper's. Their values come from a scouting study of about 60 runs on
Fashion-MNIST, done before this project on images that it does not use (test images 0-4,999): only a mirror flip, no shift
(runs this short underfit); batch 64, or 32 for few labels; AdamW, cosine to 1e-5 after a warm-up of 10 % of the steps, gradient
norm clipped at 1. Rates are the best of three on validation images (outputs/reference/pilot/tuning.csv); where the best is
the largest tried, a larger one may be better still.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lab.cost import count
from lab.data.cards import source
from lab.experiments.profiles import LAYER_SCALE, MASKED_SHARE, Arm, Profile
from lab.runs.spec import RunSpec
from vitlib.errors import UsageError, unknown
from vitlib.model import ViTConfig, vit_config
from vitlib.train.dvae import DVAEConfig
from vitlib.train.finetune import STRATEGIES, at_image_size
from vitlib.train.recipe import Recipe

# Supervised training on all images. The best of 5e-4, 1e-3 and 2e-3, with LayerScale of 1.5e-3, 3e-3 and 6e-3, for 12x1 and
# 6x2 together. No verdict compares a model with LayerScale to one without.
SUPERVISED = Recipe(epochs=2, batch_size=64, lr=1e-3)
SUPERVISED_LAYER_SCALE = Recipe(epochs=2, batch_size=64, lr=3e-3)


def _model(p: Profile, depth: int, branches: int = 1, width: int | None = None, **fields: object) -> ViTConfig:
    known = source(p.data).facts
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
    recipe = recipe or (SUPERVISED if model.layer_scale is None else SUPERVISED_LAYER_SCALE)
    return _spec(p, "supervised", model, replace(recipe, epochs=p.epochs), images=p.images)


def _form(p: Profile, pairs: int, k: int, width: int | None = None, scale: float | None = None) -> RunSpec:
    """Supervised training of `pairs` pairs in layers of k branches. Equal models of two experiments are one run."""
    return _supervised(p, _model(p, pairs // k, k, width, layer_scale=scale))


def baselines(p: Profile) -> list[Arm]:
    """Table 1: no runs, because a recipe for 300 epochs of ImageNet-1k cannot be tried at another scale."""
    return []


def branches(p: Profile) -> list[Arm]:
    """Figure 1: the same pairs in 1, 2, 3 or 4 branches. "+LS" = with LayerScale.

    `python -m lab run --profile study --notebook 31`, 149 minutes. 12x1+LS 83.68 ± 0.14, 6x2+LS 83.58 ± 0.28; without
    12x1 81.15 ± 0.18, 6x2 81.36 ± 0.48; 36x1 80.68 ± 0.46, 18x2 80.56 ± 0.75, 12x3 81.00 ± 0.48, 9x4 81.28 ± 0.28.
    """
    groupings = (1, 2, 3, 4) if p.every_arm or not p.judged else (1, 2)
    scales = (LAYER_SCALE, None) if p.every_arm else (LAYER_SCALE,)
    forms = [(p.pairs, k, scale) for k in groupings for scale in scales]
    if p.every_arm:  # Paper: Figure 1 without LayerScale; with it 36x1 and 18x2 alone (Tables 2 and 3)
        forms += [(36, k, None) for k in (1, 2, 3, 4)] + [(36, k, LAYER_SCALE) for k in (1, 2)]
    return [
        Arm(f"{n // k}x{k}{'+LS' if scale else ''}", _form(p, n, k, scale=scale), f"{n} pairs", f"{k}{'+LS' if scale else ''}")
        for n, k, scale in forms
    ]  # fmt: skip


def widths(p: Profile) -> list[Arm]:
    """Figure 2: one branch against two over the width, at the profile's own pairs, without LayerScale.

    `--notebook 32`, 44 minutes. W32 79.76 ± 0.54 and 79.70 ± 0.67, W64 81.15 ± 0.18 and 81.36 ± 0.48, W96 82.05 ± 0.52 and
    82.32 ± 0.33, one branch and two.
    """
    sizes = () if p.only_primary else p.widths if p.every_arm else (32, 64)
    return [
        Arm(f"W{width} {p.pairs // k}x{k}", _form(p, p.pairs, k, width), f"W{width}", str(k))
        for width in sizes for k in (1, 2)
    ]  # fmt: skip


def pairs(p: Profile) -> list[Arm]:
    """Figure 3: one branch against two over the pairs, without LayerScale.

    `--notebook 33`, 72 minutes. 12 pairs 81.15 ± 0.18 and 81.36 ± 0.48, 24 pairs 80.85 ± 0.26 and 81.16 ± 0.79, 36 pairs
    80.68 ± 0.46 and 80.56 ± 0.75, one branch and two.
    """
    sizes = () if p.only_primary else (12, 24, 36) if p.every_arm else (4, 8)
    return [Arm(f"{n // k}x{k}", _form(p, n, k), f"{n} pairs", str(k)) for n in sizes for k in (1, 2)]


def layer_scale(p: Profile) -> list[Arm]:
    """Table 2: one branch and two, with LayerScale and without, for the profile's epochs and for a third more.

    `--notebook 34`, 52 minutes. Without 12x1 81.15 ± 0.18, longer 83.10 ± 0.37; with it 83.68 ± 0.14, longer 85.02 ± 0.23.
    """
    longer = replace(p, epochs=-(-4 * p.epochs // 3))  # Paper: 300 and 400
    lengths = {} if p.only_primary else {"": p, " longer": longer}
    forms = [(k, scale, long) for k in (1, 2) for scale in (None, LAYER_SCALE) for long in lengths]
    return [
        Arm(f"{row}{long}", _form(lengths[long], p.pairs, k, scale=scale), row, long.strip())
        for k, scale, long in forms for row in [f"{p.pairs // k}x{k}{'+LS' if scale else ''}"]
    ]  # fmt: skip


def depth_or_width(p: Profile) -> list[Arm]:
    """Table 3: more pairs, in one branch and in two, against more width at like multiply-adds, with LayerScale.

    `--notebook 35`, 45 minutes. W64 36x1 84.50 ± 0.22, W64 18x2 84.68 ± 0.20, W96 16x1 84.16 ± 0.19.
    Raises UsageError where the multiply-adds differ by more than 5 %.
    """
    if p.only_primary:
        return []
    narrow, wide = ((p.width, 36), p.wider) if p.every_arm else ((32, 8), (64, 2))
    forms = [(*narrow, 1), (*narrow, 2), (*wide, 1)]
    arms = [
        Arm(f"W{width} {n // k}x{k}+LS", _form(p, n, k, width, LAYER_SCALE), f"W{width}", f"{n // k}x{k}")
        for width, n, k in forms
    ]
    cost = [count.macs(arm.spec.model).paper for arm in arms]
    if max(cost) > 1.05 * min(cost):
        labels = ", ".join(arm.label for arm in arms)
        raise UsageError(f"{labels} are not of like cost: {cost} multiply-adds")
    return arms


# Table 5, change of resolution: each strategy its own rate, the best of 1e-3, 2e-3 and 4e-3 (tuning seeds 1000 and 1001).
FINE_TUNING = {
    strategy: Recipe(epochs=1, batch_size=64, lr=lr)
    for strategy, lr in {"full": 2e-3, "attn": 4e-3, "ffn": 4e-3, "head": 4e-3}.items()
}


def resolution(p: Profile) -> list[Arm]:
    """Table 5: a trunk (a trained parent model), then all of it, attention, FFNs or the head tuned at the larger size.

    `python -m lab run --profile study --notebook 41`, 13 minutes. trunk 83.68 ± 0.14; full 78.69 ± 0.38, attn 79.10 ± 0.49,
    ffn 76.07 ± 0.39, head 72.94 ± 1.00.
    """
    trunk = _form(p, p.pairs, 1, scale=LAYER_SCALE)
    larger = at_image_size(trunk.model, p.finetune_size)

    def tuned(strategy: str) -> RunSpec:
        recipe = FINE_TUNING[strategy]
        return _spec(p, "finetune", larger, recipe, images=p.finetune_images, parent=trunk, strategy=strategy)

    return [Arm("trunk", trunk, "", "trunk"), *(Arm(s, tuned(s), "", s) for s in STRATEGIES)]


# Table 6, transfer to other data, of which the paper states no hyper-parameter: each arm its own rate, the best of 1e-3, 3e-3
# and 1e-2, since that depends on the number of images and on the width. Arms that no verdict reads take that of width 64, or
# of their strategy at the middle number of images.
TRANSFER_RATES = {  # target -> the rates of the four strategies at width 64, and at others that are not named
    "fashion-mnist-4 200": (3e-3, 1e-2, 1e-2, 1e-2),
    "fashion-mnist-4 1000": (3e-3, 3e-3, 1e-2, 1e-2),
    "fashion-mnist-4 7200": (3e-3, 3e-3, 1e-2, 1e-2),
    "W32 fashion-mnist-4 7200": (3e-3, 3e-3, 1e-2, 1e-2),
    "digits 100": (3e-3, 1e-2, 1e-2, 1e-2),
    "digits 300": (1e-2, 1e-2, 1e-2, 1e-2),
    "digits 1000": (1e-2, 3e-3, 1e-2, 1e-2),
    "W32 digits 1000": (1e-2, 1e-2, 1e-2, 1e-2),
    "animal-shapes 200": (3e-3, 1e-2, 1e-2, 1e-2),
    "animal-shapes 1000": (3e-3, 3e-3, 1e-2, 1e-2),
    "animal-shapes 5000": (3e-3, 3e-3, 1e-2, 1e-2),
    "W32 animal-shapes 5000": (1e-2, 1e-2, 1e-2, 1e-2),
    # Proxy, tuned for none: the fewest, middle and most images of CIFAR-10 take the rates of Fashion-MNIST's.
    "cifar-10 500": (3e-3, 1e-2, 1e-2, 1e-2),
    "cifar-10 5000": (3e-3, 3e-3, 1e-2, 1e-2),
    "cifar-10 45000": (3e-3, 3e-3, 1e-2, 1e-2),
}
# Up to this number of images: epochs. The scouting study: 30 steps are too few for 200 images (hence 20 epochs), some 300 are
# enough for 2,000.
TRANSFER_EPOCHS = {250: 20, 500: 10, 1000: 6, 5000: 3, 50_000: 2}


def transfer_recipe(width: int, data: str, images: int, strategy: str) -> Recipe:
    """How a model of this width is tuned on this number of images of a data set.

    Raises UsageError for a target or a strategy without a rate.
    """
    target = f"{data} {images}"
    if target not in TRANSFER_RATES:
        raise unknown("target of Table 6", target, [name for name in TRANSFER_RATES if name[0] != "W"])
    if strategy not in STRATEGIES:
        raise unknown("strategy of Table 6", strategy, STRATEGIES)
    rates = TRANSFER_RATES.get(f"W{width} {target}", TRANSFER_RATES[target])
    epochs = next(epochs for most, epochs in TRANSFER_EPOCHS.items() if images <= most)
    return Recipe(epochs=epochs, batch_size=32, lr=rates[STRATEGIES.index(strategy)])


def transfer(p: Profile) -> list[Arm]:
    """Table 6: other data than the trunk's, by width and number of labelled images; from scratch at the fewest images only.

    `--notebook 42`, 60 minutes. Tuning everything and attention alone at width 64, fewest images: Fashion-MNIST-4
    64.67 ± 1.70 and 63.52 ± 1.37, digits 80.31 ± 2.77 and 81.28 ± 2.57, animal shapes 61.91 ± 0.53 and 62.00 ± 1.35.
    """
    arms = []
    for width, data, images, strategy in transfer_settings(p):
        row = f"W{width} {data} {images}"
        arms.append(Arm(f"{row} {strategy}", _transferred(p, width, data, images, strategy), row, strategy))
    return arms


def transfer_settings(p: Profile) -> list[tuple[int, str, int, str]]:
    """(width, data set, labelled images, what is trained) of each arm of Table 6."""
    strategies = STRATEGIES if p.judged else ("full", "attn", "ffn")
    return [
        (width, data, images, strategy)
        for width in p.transfer_widths for data, counts in p.transfer_images.items() for images in counts
        for strategy in (*strategies, *(("scratch",) if images == counts[0] < counts[-1] else ()))
    ]  # fmt: skip


def _transferred(p: Profile, width: int, data: str, images: int, strategy: str) -> RunSpec:
    """One arm of Table 6; `scratch` has the labels and steps of `full`, and no trunk."""
    # The trunk's classes share the profile's number of images equally.
    classes = source(p.trunk_data).facts.num_classes
    pretraining = replace(p, data=p.trunk_data, width=width, images=p.images and p.images // classes * classes)
    target = replace(pretraining, data=data)
    model = _model(target, p.pairs, layer_scale=LAYER_SCALE)
    recipe = transfer_recipe(width, data, images, "full" if strategy == "scratch" else strategy)
    # A mirrored digit is another sign or none.
    recipe = replace(recipe, epochs=min(recipe.epochs, p.few_labels_epochs), flip=data != "digits")
    if strategy == "scratch":
        return _spec(target, "supervised", model, recipe, images=images)
    trunk = _form(pretraining, p.pairs, 1, scale=LAYER_SCALE)
    return _spec(target, "finetune", model, recipe, images=images, parent=trunk, strategy=strategy)


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

SUPERVISED_STEMS = Recipe(epochs=2, batch_size=64, lr=2e-3)  # the best of 5e-4, 1e-3, 2e-3 for linear, hMLP and conv
# Masked pre-training: betas of the BEiT recipe (microsoft/unilm, beit/README.md), its clip 3.0.
MASKED = Recipe(epochs=4, batch_size=64, lr=2e-3, betas=(0.9, 0.98), clip=3.0)
# The tokenizer (`dvae.py`). On validation images, 4 epochs: 1e-2 reconstructs better than 5e-3, and 1e-3 leaves nine
# of ten tokens unused.
TOKENIZER = Recipe(epochs=4, batch_size=64, lr=1e-2)
# Few labels: pre-trained and from scratch, same labels, same steps. The best of 5e-4, 1e-3, 2e-3 for linear, hMLP and conv.
FEW_LABELS = Recipe(epochs=24, batch_size=32, lr=1e-3)
# The same with layer decay, as BEiT fine-tunes. Released code: 0.65 at 4e-3, for 100 epochs of ImageNet. Tried here on one
# tuning seed (validation images): 0.65 hurts (69.2 against 75.4 without), 0.8 at 2e-3 is about equal (76.6). What is
# judged has none.
FEW_LABELS_BEIT = Recipe(epochs=24, batch_size=32, lr=2e-3, layer_decay=0.8)


def stem_pairs(name: str, pairs: int) -> int:
    """The pairs of a row of Table 7 where the other rows have `pairs`."""
    return pairs + (name == "linear+1")


def stem_model(p: Profile, name: str) -> ViTConfig:
    """A row of Table 7 at the profile's size. It reads the mean of the patch tokens, as BEiT does."""
    return _model(p, stem_pairs(name, p.stem_pairs), pool="mean", **STEM_ARMS[name])


def tokenizer(p: Profile) -> RunSpec:
    """The paper's kind of tokenizer at this scale, for `RunSpec(..., targets="dvae", tokenizer=...)`."""
    model = DVAEConfig(p.image_size, p.patch_size, source(p.data).facts.channels)
    # At smoke a few small steps, or another processor's rounding would become other tokens.
    recipe = TOKENIZER if p.judged else replace(TOKENIZER, epochs=1, lr=3e-4)
    return _spec(p, "tokenizer", model, recipe, images=p.images)


def _masked(p: Profile, model: ViTConfig, targets: str) -> RunSpec:
    return _spec(
        p, "masked", model, replace(MASKED, epochs=p.masked_epochs), images=p.images, targets=targets,
        tokenizer=tokenizer(p) if targets == "dvae" else None, masked=round(MASKED_SHARE * model.grid**2),
    )  # fmt: skip


def _few_labels(p: Profile, model: ViTConfig, parent: RunSpec | None, recipe: Recipe = FEW_LABELS) -> RunSpec:
    recipe = replace(recipe, epochs=p.few_labels_epochs)
    return _spec(p, "finetune" if parent else "supervised", model, recipe, images=p.few_labels, parent=parent)


def stems(p: Profile) -> list[Arm]:
    """Table 7, arms "<stem> <training>": from scratch and after masked pre-training, on few labels.

    `study` has every stem, and all labels too; the tokens of one discrete VAE per seed, which all stems predict; and, for the
    two primary stems, what the lighter tokens and layer decay would change. `smoke` has one arm with those tokens.

    `--notebook 52`, 138 minutes. scratch, pretrained, supervised: linear 72.40 ± 0.89, 76.00 ± 1.06, 81.33 ± 0.28; conv
    76.26 ± 0.57, 77.58 ± 0.97, 82.94 ± 0.29; hmlp 71.35 ± 0.83, 75.24 ± 1.10, 80.78 ± 0.52, with kernels (2, 2, 1), a
    narrower stem than today's.
    """
    arms: list[Arm] = []
    for name in STEM_ARMS if p.every_arm else PRIMARY_STEMS:
        model = stem_model(p, name)
        trunk = _masked(p, model, p.targets)
        specs = {"scratch": _few_labels(p, model, None), "pretrained": _few_labels(p, model, trunk)}
        if p.every_arm:
            specs["supervised"] = _supervised(p, model, SUPERVISED_STEMS)
        if p.every_arm and name in PRIMARY_STEMS:
            specs["pretrained k-means"] = _few_labels(p, model, _masked(p, model, "tokens"))
            # Paper: BEiT's fine-tuning, with layer decay. What is judged has none: see FEW_LABELS_BEIT
            specs["pretrained decay"] = _few_labels(p, model, trunk, FEW_LABELS_BEIT)
        arms += _row(name, specs.items())
    if not p.judged:
        model = stem_model(p, "linear")
        arms += _row("linear", [("pretrained dvae", _few_labels(p, model, _masked(p, model, "dvae")))])
    return arms


def _row(name: str, specs: Sequence[tuple[str, RunSpec]]) -> list[Arm]:
    return [Arm(f"{name} {training}", spec, name, training) for training, spec in specs]
