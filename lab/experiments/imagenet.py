"""The runs of profile `imagenet`: the paper's own models, protocols and data, arm by arm under the names of the ledger.

Recipes and their sources are in `train/recipes.py`; the paper's widths are Ti, S, B and L. What a GPU is told to do (bf16,
compiled, one branch after the other, so many images at once) is fixed here, the same for every arm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lab.claims.ledger import transfer_arms
from lab.data.cards import source
from lab.experiments import recipes
from lab.experiments.profiles import LAYER_SCALE, Profile
from lab.experiments.small import STEM_ARMS, stem_pairs
from lab.runs.spec import RunSpec
from vitlib.model import ViTConfig, vit_config
from vitlib.train.dvae import DVAEConfig
from vitlib.train.finetune import at_image_size
from vitlib.train.recipe import Recipe

LETTERS = {192: "Ti", 384: "S", 768: "B", 1024: "L"}
SHORT, LONG = 300, 400  # Paper: epochs without LayerScale, and of the models with it that are tuned further
# Images that go through the model at once, by image size: what fits one GPU of 80 GB for every arm (ViT-L at 384 pixels has
# room for 130), so that in all arms of a comparison a part of a batch, and with it batch norm's statistics, is of as many
# images. Released code: 256 a GPU by procedure A2, 128 by BEiT; SyncBatchNorm takes the statistics of all GPUs together.
AT_ONCE = {112: 512, 224: 256, 384: 128}


def _spec(p: Profile, protocol: str, model: ViTConfig | DVAEConfig, recipe: Recipe, data: str = "", **more) -> RunSpec:
    classifier = protocol != "tokenizer"  # whose loss calls parts of the model, which are not what is compiled
    return RunSpec(
        protocol, model, data or p.data, recipe, execution=p.execution if classifier else "seq", device=p.device,
        precision="bf16", streamed=True, compile=classifier, accumulate=recipe.batch_size // AT_ONCE[model.image_size], **more,
    )  # fmt: skip


def _supervised(
    p: Profile, letter: str, depth: int, branches: int = 1, scale: float | None = None, epochs: int = SHORT
) -> RunSpec:
    """Tables 1 to 3, Figures 1 to 3: procedure A2 with the paper's changes."""
    drop_path = recipes.DROP_PATH[letter]  # Paper: by width; it states none for deeper models
    model = vit_config(f"{letter}{depth}x{branches}", layer_scale=scale, drop_path=drop_path)
    return _spec(p, "supervised", model, recipes.supervised_imagenet(letter, epochs))


def baselines(p: Profile) -> dict[str, RunSpec]:
    """Tables 1 and 8: this recipe and DeiT's, both trained here."""
    arms = {f"{w}12": _supervised(p, w, 12) for w in ("Ti", "S", "B")} | {"L24": _supervised(p, "L", 24)}
    arms |= {f"{w}12+LS": _supervised(p, w, 12, scale=LAYER_SCALE, epochs=LONG) for w in ("Ti", "S", "B")}
    arms["L24+LS"] = _supervised(p, "L", 24, scale=LAYER_SCALE, epochs=LONG)
    for w in ("Ti", "S", "B"):
        model = vit_config(f"{w}12", drop_path=recipes.DEIT_DROP_PATH)
        arms[f"{w}12 DeiT"] = _spec(p, "supervised", model, recipes.DEIT)
    return arms


def branches(p: Profile) -> dict[str, RunSpec]:
    """Figure 1: ViT-B36, and under their own names S36 and S60."""
    arms = {f"{36 // k}x{k}": _supervised(p, "B", 36 // k, k) for k in (1, 2, 3, 4)}
    arms |= {f"{36 // k}x{k}+LS": _supervised(p, "B", 36 // k, k, LAYER_SCALE) for k in (1, 2)}
    return arms | {f"S{n // k}x{k}": _supervised(p, "S", n // k, k) for n in (36, 60) for k in (1, 2, 3, 4)}


def widths(p: Profile) -> dict[str, RunSpec]:
    """Figure 2: 24 pairs; at L with LayerScale, as there."""
    scale = {1024: LAYER_SCALE}
    return {
        f"W{width} {24 // k}x{k}": _supervised(p, letter, 24 // k, k, scale.get(width))
        for width, letter in LETTERS.items() for k in (1, 2)
    }  # fmt: skip


def pairs(p: Profile) -> dict[str, RunSpec]:
    """Figure 3: ViT-B, and under their own names S24 and S48."""
    arms = {f"{n // k}x{k}": _supervised(p, "B", n // k, k) for n in (12, 24, 36) for k in (1, 2)}
    return arms | {f"S{n // k}x{k}": _supervised(p, "S", n // k, k) for n in (24, 48) for k in (1, 2)}


def layer_scale(p: Profile) -> dict[str, RunSpec]:
    """Table 2: 36 pairs, with LayerScale and without, 300 and 400 epochs."""
    return {
        f"{36 // k}x{k}{'+LS' if scale else ''}{word}": _supervised(p, "B", 36 // k, k, scale, epochs)
        for k in (1, 2) for scale in (None, LAYER_SCALE) for word, epochs in (("", SHORT), (" longer", LONG))
    }  # fmt: skip


def depth_or_width(p: Profile) -> dict[str, RunSpec]:
    """Table 3. Of like cost within 5 % are S48 and B12; B36 has 15 % fewer multiply-adds than L24."""
    plain = {"B12x1": ("B", 12, 1), "S48x1": ("S", 48, 1), "S24x2": ("S", 24, 2)}
    scaled = {"L24x1+LS": ("L", 24, 1), "B36x1+LS": ("B", 36, 1), "B18x2+LS": ("B", 18, 2)}
    return {name: _supervised(p, *form) for name, form in plain.items()} | {
        name: _supervised(p, *form, LAYER_SCALE) for name, form in scaled.items()
    }


def _trunk(p: Profile, letter: str) -> RunSpec:
    """Paper: Table 5 starts from the models of 400 epochs with LayerScale. Of Table 6 it says only ImageNet-1k."""
    return _supervised(p, letter, 24 if letter == "L" else 12, scale=LAYER_SCALE, epochs=LONG)


def resolution(p: Profile) -> dict[str, RunSpec]:
    """Table 5: ViT-B with AdamW under the ledger's names; S and L, and SGD, under longer ones."""
    arms = {"trunk": _trunk(p, "B")}
    for letter in ("B", "S", "L"):
        trunk = _trunk(p, letter)
        drop_path = recipes.RESOLUTION_DROP_PATH[letter]
        model = at_image_size(replace(trunk.model, drop_path=drop_path), p.finetune_size)
        for word, recipe in (("", recipes.RESOLUTION_ADAMW), (" SGD", recipes.RESOLUTION_SGD)):
            for strategy in ("full", "attn", "ffn", "head"):
                name = f"{'' if letter == 'B' else f'{letter} '}{strategy}{word}"
                arms[name] = _spec(p, "finetune", model, recipe, parent=trunk, strategy=strategy)
    return arms


def transfer(p: Profile) -> dict[str, RunSpec]:
    """Table 6: six data sets, three widths, all labels."""
    arms = {}
    for name in transfer_arms(p.name):
        width, data, _, strategy = name.split()
        trunk, (recipe, drop_path) = _trunk(p, LETTERS[int(width[1:])]), recipes.transfer_imagenet(data)
        model = replace(trunk.model, num_classes=source(data, streamed=True).facts.num_classes, drop_path=drop_path)
        arms[name] = _spec(p, "finetune", model, recipe, data, parent=trunk, strategy=strategy)
    return arms


def stems(p: Profile) -> dict[str, RunSpec]:
    """Table 7: supervised by the paper's recipe; BeiT's model and protocol, pre-trained and from scratch."""
    tokenizer = _spec(p, "tokenizer", DVAEConfig(in_chans=3, **recipes.TOKENIZER_MODEL), recipes.TOKENIZER_IMAGENET)
    arms = {}
    for name, stem in STEM_ARMS.items():
        size = f"B{stem_pairs(name, p.stem_pairs)}"
        model = vit_config(size, **recipes.BEIT_MODEL, **stem)
        trunk = _spec(
            p,
            "masked",
            model,
            recipes.BEIT_PRETRAINING,
            targets="dvae",
            tokenizer=tokenizer,
            masked=recipes.BEIT_MASKED,
        )
        plain = vit_config(size, drop_path=recipes.DROP_PATH["B"], **stem)
        arms[f"{name} supervised"] = _spec(p, "supervised", plain, recipes.supervised_imagenet("B"))
        # Without layer decay, which would leave random layers nearly as they are.
        arms[f"{name} scratch"] = _spec(p, "supervised", model, replace(recipes.BEIT_FINE_TUNING, layer_decay=None))
        arms[f"{name} pretrained"] = _spec(p, "finetune", model, recipes.BEIT_FINE_TUNING, parent=trunk)
    return arms


ARMS: dict[str, Callable[[Profile], dict[str, RunSpec]]] = {
    "21": baselines, "31": branches, "32": widths, "33": pairs, "34": layer_scale, "35": depth_or_width, "41": resolution,
    "42": transfer, "52": stems,
}  # fmt: skip
