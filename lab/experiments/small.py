"""The paper's experiments below ImageNet's scale: for each a function of the profile that gives its arms, and their recipes.

The recipes belong to small images (16 tokens, width 32 or 64, hundreds of steps) and are not the paper's. What they have in
common comes from a scouting study of about 60 runs on Fashion-MNIST, done before this project on images that it does not use
(test images 0-4,999): only a mirror flip, no shift (runs this short underfit); batch 64, or 32 for few labels; AdamW, cosine
to 1e-5 after a warm-up of 10 % of the steps, gradient norm clipped at 1. Each arm has its own learning rate, in `RATES` of
profiles.py. The pilot's arms, which were more, are in outputs/reference/pilot.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from lab.data.cards import source
from lab.experiments.profiles import LAYER_SCALE, MASKED_SHARE, Arm, Profile
from lab.runs.spec import RunSpec
from vitlib.model import ViTConfig, vit_config
from vitlib.model.stems import STEMS
from vitlib.train.dvae import DVAEConfig
from vitlib.train.finetune import PAPER_STRATEGIES, STRATEGIES, at_image_size
from vitlib.train.recipe import Recipe

DEEP = 36  # pairs of the paper's deepest models
DEEP_SEEDS = 10  # their arms have so many


def _model(p: Profile, depth: int, branches: int = 1, width: int | None = None, **fields: object) -> ViTConfig:
    known = source(p.data).facts
    return vit_config(
        f"W{width or p.width}-{depth}x{branches}/{p.patch_size}", image_size=p.image_size, in_chans=known.channels,
        num_classes=known.num_classes, **fields,
    )  # fmt: skip


def _spec(p: Profile, protocol: str, model: ViTConfig | DVAEConfig, recipe: Recipe, **fields: object) -> RunSpec:
    """A run on the profile's data and device.

    float32 on every machine: bfloat16 is 1.4 to 1.7 times as fast where the processor multiplies it and ten times as slow
    where it does not. par: 4 branches train 1.2 times as fast as one after the other, 2 no slower.
    """
    execution = "seq" if protocol == "tokenizer" else "par"
    return RunSpec(protocol, model, p.data, recipe, execution=execution, device=p.device, **fields)


# ---------------------------------------------------------------------------------------------------- thing 1


def _name(pairs: int, k: int, scale: float | None) -> str:
    return f"{pairs // k}x{k}{'+LS' if scale else ''}"


def _form(p: Profile, pairs: int, k: int, scale: float | None = None, width: int | None = None) -> RunSpec:
    """Supervised training of `pairs` pairs in layers of k branches. Equal models of two experiments are one run."""
    rate = p.rate(_name(pairs, k, scale), "12x1+LS" if scale else "12x1")
    model = _model(p, pairs // k, k, width, layer_scale=scale)
    return _spec(p, "supervised", model, Recipe(epochs=p.epochs, batch_size=64, lr=rate), images=p.images)


def _forms(p: Profile, forms: Iterable[tuple[int, int, float | None]]) -> list[Arm]:
    """(pairs, branches, LayerScale) of each arm. Primary are 12 pairs with LayerScale; the others have fewer seeds."""
    return [
        Arm(
            _name(n, k, scale), _form(p, n, k, scale), f"{n} pairs", f"{k}{'+LS' if scale else ''}",
            None if n == p.pairs and scale else min(DEEP_SEEDS, len(p.seeds)),
        )
        for n, k, scale in forms
    ]  # fmt: skip


def baselines(p: Profile) -> list[Arm]:
    """Table 1: no runs, because a recipe for 300 epochs of ImageNet-1k cannot be tried at another scale."""
    return []


def branches(p: Profile) -> list[Arm]:
    """Figure 1: the same pairs in one branch and in two. "+LS" = with LayerScale."""
    forms = [(p.pairs, k, LAYER_SCALE) for k in ((1, 2) if p.judged else (1, 2, 3, 4))]
    if p.controls:
        forms += [(DEEP, 1, LAYER_SCALE)]
    if p.exploratory:  # Paper: Figure 1 without LayerScale; with it 36x1 and 18x2 alone (Tables 2 and 3)
        forms += [(DEEP, 2, LAYER_SCALE), *((n, k, None) for n in (p.pairs, DEEP) for k in (1, 2))]
    return _forms(p, forms) + ([_at_one_rate(p)] if p.exploratory else [])


def _at_one_rate(p: Profile) -> Arm:
    """Two branches at the rate of one branch. Added after A1 was judged, and decides nothing.

    Both rates of two branches were level in tuning, and the rule takes the lower one, half the rate of one branch.
    """
    spec, one = _form(p, p.pairs, 2, LAYER_SCALE), _name(p.pairs, 1, LAYER_SCALE)
    spec = replace(spec, recipe=replace(spec.recipe, lr=p.rate(one)))
    return Arm(f"{_name(p.pairs, 2, LAYER_SCALE)}, rate of {one}", spec, f"{p.pairs} pairs", "2+LS, one rate")


def widths(p: Profile) -> list[Arm]:
    """Figure 2: one branch against two over the width, without LayerScale. The pilot alone has judged runs."""
    return [
        Arm(f"W{width} {p.pairs // k}x{k}", _form(p, p.pairs, k, width=width), f"W{width}", str(k))
        for width in (() if p.judged else (32, 64)) for k in (1, 2)
    ]  # fmt: skip


def pairs(p: Profile) -> list[Arm]:
    """Figure 3: one branch against two over the pairs, without LayerScale."""
    sizes = (p.pairs, DEEP) if p.exploratory else () if p.judged else (4, 8)
    return _forms(p, [(n, k, None) for n in sizes for k in (1, 2)])


def layer_scale(p: Profile) -> list[Arm]:
    """Table 2: one branch and two, with LayerScale and without."""
    sizes = (p.pairs, DEEP) if p.exploratory else () if p.judged else (4,)
    return _forms(p, [(n, k, scale) for n in sizes for k in (1, 2) for scale in (None, LAYER_SCALE)])


def depth_or_width(p: Profile) -> list[Arm]:
    """Table 3: more pairs, in one branch and in two, against more width at like multiply-adds. Judged in the pilot alone."""
    forms = [] if p.judged else [(32, 8, 1), (32, 8, 2), (64, 2, 1)]
    return [Arm(f"W{w} {n // k}x{k}+LS", _form(p, n, k, LAYER_SCALE, w), f"W{w}", f"{n // k}x{k}") for w, n, k in forms]


REGROUPED_SEEDS = 5


def regrouping(p: Profile) -> list[Arm]:
    """Beyond the paper: trained sequential models put into branches, and tuned for a short while at the same image size.

    "12x1+LS" is the trunk; "6x2+LS attn" is its weights in 6 layers of 2 branches, then attention alone trained on the images of
    Table 5's fine-tuning, at its rates.
    """
    arms = []
    for scale in (LAYER_SCALE, None):
        trunk = _form(p, p.pairs, 1, scale)
        n = REGROUPED_SEEDS if p.exploratory else 2
        arms.append(Arm(_name(p.pairs, 1, scale), trunk, _name(p.pairs, 1, scale), "trained", n))
        for k in (2, 3, 4, 6, 12) if p.exploratory else () if p.judged else (2,):
            model = replace(trunk.model, depth=p.pairs // k, branches=k)
            for strategy in ("full", "attn"):
                recipe = Recipe(epochs=1, batch_size=64, lr=p.rate(strategy))
                spec = _spec(p, "finetune", model, recipe, images=p.finetune_images, parent=trunk, strategy=strategy)
                row = _name(p.pairs, k, scale)
                arms.append(Arm(f"{row} {strategy}", spec, row, strategy, REGROUPED_SEEDS))
    return arms


# ---------------------------------------------------------------------------------------------------- thing 2


def resolution(p: Profile) -> list[Arm]:
    """Table 5: a trunk (a trained parent model), then all of it or a part tuned at the larger size.

    The control is `full` with half the images, each seen once, and so half the steps.
    """
    trunk = _form(p, p.pairs, 1, LAYER_SCALE)
    larger = at_image_size(trunk.model, p.finetune_size)

    def tuned(strategy: str, images: int | None = p.finetune_images) -> RunSpec:
        recipe = Recipe(epochs=1, batch_size=64, lr=p.rate(strategy))
        return _spec(p, "finetune", larger, recipe, images=images, parent=trunk, strategy=strategy)

    strategies = STRATEGIES if p.exploratory else PAPER_STRATEGIES[:3] if p.judged else PAPER_STRATEGIES
    arms = [Arm("trunk", trunk, "", "trunk"), *(Arm(s, tuned(s), "", s) for s in strategies)]
    fewer = Arm("full, fewer steps", tuned("full", p.control_images), "", "full, fewer steps")
    return [*arms, fewer] if p.controls else arms


# Table 6, transfer to other data, of which the paper states no hyper-parameter. Up to this number of images: epochs. The
# scouting study: 30 steps are too few for 200 images (hence 20 epochs), some 300 are enough for 2,000.
TRANSFER_EPOCHS = {250: 20, 500: 10, 1000: 6, 5000: 3, 50_000: 2}
TRUNK_DATA = "fashion-mnist-6"  # classes that no target has
SUBSETS = 3  # of the labelled images; their mean is a seed's accuracy


def transfer(p: Profile) -> list[Arm]:
    """Table 6: other data than the trunk's, by width and number of labelled images, three subsets of them each."""
    return [
        Arm(f"{data} {images} {strategy}, subset {k}", _transferred(p, width, data, images, strategy, k), f"W{width} {data} {images}", strategy)
        for width in p.transfer_widths for data, counts in p.transfer_images.items() for images in counts
        for strategy in ("full", "attn", "scratch") for k in range(1, (SUBSETS if p.judged else 1) + 1)
    ]  # fmt: skip


def _transferred(p: Profile, width: int, data: str, images: int, strategy: str, subset: int) -> RunSpec:
    """One arm of Table 6; `scratch` has the labels and steps of `full`, and no trunk."""
    # The trunk's classes share the profile's number of images equally.
    classes = source(TRUNK_DATA).facts.num_classes
    pretraining = replace(p, data=TRUNK_DATA, width=width, images=p.images and p.images // classes * classes)
    target = replace(pretraining, data=data)
    model = _model(target, p.pairs, layer_scale=LAYER_SCALE)
    epochs = next(epochs for most, epochs in TRANSFER_EPOCHS.items() if images <= most) if p.judged else 8
    # A mirrored digit is another sign or none.
    recipe = Recipe(epochs=epochs, batch_size=32, lr=p.rate(f"{data} {images} {strategy}"), flip=data != "digits")
    if strategy == "scratch":
        return _spec(target, "supervised", model, recipe, images=images, subset=subset)
    trunk = _form(pretraining, p.pairs, 1, LAYER_SCALE)
    return _spec(target, "finetune", model, recipe, images=images, subset=subset, parent=trunk, strategy=strategy)


# ---------------------------------------------------------------------------------------------------- thing 3

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
# Further rows, e.g. "mean": {"stem": "mean"}, which are trained at every profile and judged by no claim; at the linear stem's
# rates, unless `RATES` has "mean supervised", "mean masked" and "mean pretrained".
EXTRA_STEMS: dict[str, dict[str, str]] = {}
STEM_ARMS |= EXTRA_STEMS
PRIMARY_STEMS = ("linear", "hmlp", "conv")
BLANKED = "conv blanked"  # H9: the convolutional stem that sees masked patches blanked in the pixels

# Masked pre-training: betas of the BEiT recipe (microsoft/unilm, beit/README.md), its clip 3.0.
MASKED = Recipe(epochs=8, batch_size=64, lr=2e-3, betas=(0.9, 0.98), clip=3.0)
# The tokenizer (`dvae.py`). On validation images, 4 epochs: 1e-2 reconstructs better than 5e-3, and 1e-3 leaves nine
# of ten tokens unused.
TOKENIZER = Recipe(epochs=4, batch_size=64, lr=1e-2)


def stem_pairs(name: str, pairs: int) -> int:
    """The pairs of a row of Table 7 where the other rows have `pairs`."""
    return pairs + (name == "linear+1")


def stem_model(p: Profile, name: str) -> ViTConfig:
    """A row of Table 7 at the profile's size. It reads the mean of the patch tokens, as BEiT does."""
    s = p.stems
    hidden = {"stem_width": s.hidden} if STEMS[STEM_ARMS[name]["stem"]].hidden else {}
    scale = replace(p, image_size=s.image_size, patch_size=s.patch_size)
    return _model(scale, stem_pairs(name, s.pairs), pool="mean", **STEM_ARMS[name], **hidden)


def tokenizer(p: Profile) -> RunSpec:
    """The paper's kind of tokenizer at this scale, for `RunSpec(..., targets="dvae", tokenizer=...)`."""
    model = DVAEConfig(p.stems.image_size, p.stems.patch_size, source(p.data).facts.channels)
    # At smoke a few small steps, or another processor's rounding would become other tokens.
    recipe = TOKENIZER if p.judged else replace(TOKENIZER, epochs=1, lr=3e-4)
    return _spec(p, "tokenizer", model, recipe, images=p.images)


def _masked(p: Profile, name: str, targets: str, blank: bool = False) -> RunSpec:
    rate = p.rate(f"{name} masked", "linear masked")
    model, recipe = stem_model(p, name), replace(MASKED, epochs=p.stems.masked_epochs, lr=rate)
    return _spec(
        p, "masked", model, recipe, images=p.images, targets=targets, blank=blank,
        tokenizer=tokenizer(p) if targets == "dvae" else None, masked=round(MASKED_SHARE * model.grid**2),
    )  # fmt: skip


def _stem_run(p: Profile, name: str, training: str, trunk: RunSpec | None = None) -> RunSpec:
    """One cell of Table 7: trained with labels from the start, or after pre-training; on all labels, or on few."""
    s, few = p.stems, training.endswith(str(p.stems.few_labels))
    epochs = s.few_labels_epochs if few else s.finetune_epochs if trunk else s.supervised_epochs
    rate = p.rate(f"{name} {training}", f"linear {training}")
    recipe = Recipe(epochs=epochs, batch_size=32 if few else 64, lr=rate)
    images = s.few_labels if few else p.images
    return _spec(p, "finetune" if trunk else "supervised", stem_model(p, name), recipe, images=images, parent=trunk)


def stems(p: Profile) -> list[Arm]:
    """Table 7, arms "<stem> <training>": supervised, and pre-trained and then fine-tuned, both on all labels.

    All stems of a seed predict the tokens of one discrete VAE. The control is the linear stem on few labels, pre-trained and
    from scratch. `BLANKED` takes the rates of the convolutional stem. `smoke` has one arm with those tokens.
    """
    names = (*(PRIMARY_STEMS if p.judged else ("linear", "hmlp")), *EXTRA_STEMS)
    few, trunks = p.stems.few_labels, {name: _masked(p, name, p.targets) for name in names}
    cells = [(name, "supervised", None) for name in names]
    cells += [(name, "pretrained", trunk) for name, trunk in trunks.items()]
    if p.controls:
        cells += [("linear", f"scratch {few}", None), ("linear", f"pretrained {few}", trunks["linear"])]
    arms = [Arm(f"{name} {t}", _stem_run(p, name, t, trunk), name, t, p.stems.n) for name, t, trunk in cells]
    if p.controls:
        spec = _stem_run(p, "conv", "pretrained", _masked(p, "conv", p.targets, blank=True))
        arms.append(Arm(f"{BLANKED} pretrained", spec, BLANKED, "pretrained", min(DEEP_SEEDS, len(p.seeds))))
    if not p.judged:
        spec = _stem_run(p, "linear", "pretrained", _masked(p, "linear", "dvae"))
        arms.append(Arm("linear pretrained dvae", spec, "linear", "pretrained dvae"))
    return arms
