"""The arms of each notebook below ImageNet's scale."""

from __future__ import annotations

from dataclasses import replace

from lab.claims.ledger import transfer_arms
from lab.cost import count
from lab.data.cards import source
from lab.experiments import recipes
from lab.experiments.profiles import LAYER_SCALE, MASKED_SHARE, Profile
from lab.runs.spec import RunSpec
from vitlib.errors import UsageError
from vitlib.model import ViTConfig, vit_config
from vitlib.train.dvae import DVAEConfig
from vitlib.train.finetune import at_image_size
from vitlib.train.recipe import Recipe


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
    recipe = recipe or (recipes.SUPERVISED if model.layer_scale is None else recipes.SUPERVISED_LAYER_SCALE)
    return _spec(p, "supervised", model, replace(recipe, epochs=p.epochs), images=p.images)


def tokenizer(p: Profile) -> RunSpec:
    """The paper's kind of tokenizer at this scale, for `RunSpec(..., targets="dvae", tokenizer=...)`."""
    model = DVAEConfig(p.image_size, p.patch_size, source(p.data).facts.channels)
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
    cost = [count.macs(spec.model).paper for spec in arms.values()]
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
    classes = source(p.trunk_data).facts.num_classes
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
        from lab.experiments import imagenet

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
