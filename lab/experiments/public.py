"""Tables 5 and 6 by fine-tuning alone, from one public ViT-S/16 in the place of the paper's, which were never published.

By default DeiT III's ViT-S (timm's name is in the profile), the nearest to the paper's: LayerScale, positions on patches alone,
trained on ImageNet-1k at 224 pixels. `VITLIB_WEIGHTS` names another: a file, or a timm name; its runs are others than the
ledger's and are shown, not judged. One trunk has no variance over trunks: intervals are over fine-tuning seeds and test images.

Recipes are those of `imagenet.py`, the neighbours' whose source is there. No rate was tuned, for these weights or for a strategy.
"""

from __future__ import annotations

import os
from dataclasses import replace

from lab import paths
from lab.data.cards import source
from lab.experiments.imagenet import RESOLUTION_ADAMW, RESOLUTION_DROP_PATH, TRANSFER, run_of
from lab.experiments.profiles import LAYER_SCALE, Arm, Profile
from lab.runs import pretrained
from lab.runs.spec import RunSpec
from vitlib.model import ViTConfig, vit_config
from vitlib.train.finetune import PAPER_STRATEGIES, at_image_size

STRATEGIES = PAPER_STRATEGIES[:3]  # full, attn, ffn


def trunk(p: Profile) -> tuple[str, ViTConfig]:
    """The weights that all runs start from, and what model they are. Raises UsageError for a file that cannot be read."""
    given = os.environ.get("VITLIB_WEIGHTS")
    if not given:
        return p.weights, vit_config("S12", layer_scale=LAYER_SCALE)
    weights = str(file) if (file := paths.named(given)).is_file() else given
    return weights, pretrained.model_of(weights).config


def _tuned(p: Profile, data: str, strategy: str) -> RunSpec:
    """One cell of Table 6."""
    (weights, config), (recipe, drop_path) = trunk(p), TRANSFER[data]
    classes = source(data, streamed=True).facts.num_classes
    model = replace(at_image_size(config, p.image_size), num_classes=classes, drop_path=drop_path)
    return run_of(p, "finetune", model, recipe, data, weights=weights, strategy=strategy)


def resolution(p: Profile) -> list[Arm]:
    """Table 5 on the profile's data set: tuned whole at 224 pixels ("trunk"), then whole or in part at 384.

    Paper, ViT-S on ImageNet with AdamW: full 82.7, attn 82.5, ffn 82.2.
    """
    trunk = _tuned(p, p.data, "full")
    model = at_image_size(replace(trunk.model, drop_path=RESOLUTION_DROP_PATH["S"]), p.finetune_size)
    tuned = (run_of(p, "finetune", model, RESOLUTION_ADAMW, parent=trunk, strategy=s) for s in STRATEGIES)
    return [Arm("trunk", trunk, "", "trunk"), *(Arm(spec.strategy, spec, "", spec.strategy) for spec in tuned)]


def transfer(p: Profile) -> list[Arm]:
    """Table 6: four data sets, all labels. Paper, ViT-S on Cars: full 89.7, attn 89.8, ffn 88.3."""
    width = trunk(p)[1].width
    cells = [(f"W{width} {data} {n}", data, s) for data, (n,) in p.transfer_images.items() for s in STRATEGIES]
    return [Arm(f"{row} {strategy}", _tuned(p, data, strategy), row, strategy) for row, data, strategy in cells]
