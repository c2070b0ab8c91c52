"""ImageNet recipes: the paper's stated values, and those of the sources it names, one by one."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch

from lab.experiments import recipes
from vitlib.data.augment import Augment
from vitlib.errors import UsageError
from vitlib.model import ViT, vit_config
from vitlib.train import loop
from vitlib.train.dvae import DVAEConfig
from vitlib.train.recipe import Recipe

torch.set_num_threads(1)
IMAGENET = 1_281_167

# Written down from the paper's section on training, procedure A2 and the released commands; nothing is read from recipes.py.
A2 = {
    "batch_size": 2048, "optimizer": "lamb", "weight_decay": 0.02, "betas": (0.9, 0.999), "min_lr": 1e-6, "clip": None,
    "loss": "bce", "flip": True, "mixup": 0.1, "cutmix": 1.0, "smoothing": 0.0, "repeats": 3, "ema": None,
    "layer_decay": None, "augment.policy": "rand-m7-mstd0.5-inc1", "augment.crop_scale": (0.08, 1.0),
    "augment.color_jitter": 0.0, "augment.erasing": 0.0, "augment.test_crop": 0.95, "augment.interpolation": "bicubic",
    "augment.view_size": None,
}  # fmt: skip
M9 = {
    "loss": "cross_entropy", "flip": True, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1,
    "augment.policy": "rand-m9-mstd0.5-inc1", "augment.interpolation": "bicubic", "augment.crop_scale": (0.08, 1.0),
}  # fmt: skip
STATED = {
    "Ti": (recipes.supervised_imagenet("Ti"), A2 | {"epochs": 300, "lr": 4e-3, "warmup": 5 / 300}),
    "S": (recipes.supervised_imagenet("S"), A2 | {"epochs": 300, "lr": 4e-3, "warmup": 5 / 300}),
    "B": (recipes.supervised_imagenet("B"), A2 | {"epochs": 300, "lr": 3e-3, "warmup": 5 / 300}),
    "L": (recipes.supervised_imagenet("L"), A2 | {"epochs": 300, "lr": 3e-3, "warmup": 5 / 300}),
    "L with LayerScale": (recipes.supervised_imagenet("L", 400), A2 | {"epochs": 400, "lr": 3e-3, "warmup": 5 / 400}),
    "DeiT": (recipes.DEIT, M9 | {
        "epochs": 300, "batch_size": 1024, "lr": 1e-3, "optimizer": "adamw", "weight_decay": 0.05, "warmup": 5 / 300,
        "min_lr": 1e-5, "clip": None, "repeats": 3, "ema": 0.99996, "augment.erasing": 0.25, "augment.test_crop": 0.875,
    }),
    "Table 5, AdamW": (recipes.RESOLUTION_ADAMW, M9 | {
        "epochs": 20, "batch_size": 512, "lr": 1e-5, "optimizer": "adamw", "weight_decay": 0.1, "warmup": 5 / 20,
        "min_lr": 1e-5, "clip": None, "repeats": 1, "ema": None, "augment.erasing": 0.0, "augment.test_crop": 1.0,
    }),
    "Table 5, SGD": (recipes.RESOLUTION_SGD, M9 | {
        "epochs": 20, "batch_size": 512, "lr": 1e-2, "optimizer": "sgd", "weight_decay": 1e-4, "warmup": 5 / 20,
        "clip": None, "repeats": 1, "ema": None, "augment.erasing": 0.0, "augment.test_crop": 1.0,
    }),
    "BEiT pre-training": (recipes.BEIT_PRETRAINING, {
        "epochs": 300, "batch_size": 2048, "lr": 1.5e-3, "optimizer": "adamw", "weight_decay": 0.05,
        "betas": (0.9, 0.98), "min_lr": 1e-5, "warmup": 10 / 300, "clip": 3.0, "mixup": 0.0, "cutmix": 0.0, "flip": True,
        "repeats": 1, "augment.policy": "none", "augment.view_size": 112, "augment.interpolation": "bicubic",
        "augment.erasing": 0.0,
    }),
    "BEiT fine-tuning": (recipes.BEIT_FINE_TUNING, M9 | {
        "epochs": 100, "batch_size": 1024, "lr": 4e-3, "optimizer": "adamw", "weight_decay": 0.05,
        "betas": (0.9, 0.999), "min_lr": 1e-6, "warmup": 20 / 100, "clip": None, "layer_decay": 0.65, "repeats": 1,
        "ema": None, "augment.color_jitter": 0.4, "augment.erasing": 0.25, "augment.test_crop": 224 / 256,
    }),
}  # fmt: skip


def value(recipe: Recipe, path: str) -> object:
    for name in path.split("."):
        recipe = getattr(recipe, name)
    return recipe


@pytest.mark.parametrize("name", STATED)
def test_a_recipe_has_the_stated_values_one_by_one(name):
    recipe, stated = STATED[name]
    assert {path: value(recipe, path) for path in stated} == stated


def test_every_field_of_the_papers_own_recipe_is_compared():
    names = {f.name for f in fields(Recipe)} - {"augment"} | {f"augment.{f.name}" for f in fields(Augment)}
    assert names == set(STATED["B"][1])


def test_stochastic_depth_goes_by_width():
    assert recipes.DROP_PATH == {"Ti": 0.0, "S": 0.05, "B": 0.1, "L": 0.4}
    assert recipes.RESOLUTION_DROP_PATH == {"S": 0.0, "B": 0.15, "L": 0.4}


# (recipe, steps of warm-up, steps): epochs of 626, 1252 and 2503 steps, warm-ups of 5, 10 and 20 epochs
WARMUPS = {
    "5 of 300 epochs": (recipes.supervised_imagenet("B"), 5 * 626, 300 * 626),
    "5 of 400 epochs": (recipes.supervised_imagenet("L", 400), 5 * 626, 400 * 626),
    "DeiT": (recipes.DEIT, 5 * 1252, 300 * 1252),
    "Table 5": (recipes.RESOLUTION_ADAMW, 5 * 2503, 20 * 2503),
    "BEiT pre-training": (recipes.BEIT_PRETRAINING, 10 * 626, 300 * 626),
    "BEiT fine-tuning": (recipes.BEIT_FINE_TUNING, 20 * 1252, 100 * 1252),
}


@pytest.mark.parametrize("name", WARMUPS)
def test_a_warm_up_lasts_whole_epochs_and_ends_at_the_peak(name):
    recipe, warmup, steps = WARMUPS[name]
    assert loop.count_steps(recipe, IMAGENET) == steps == recipe.epochs * math.ceil(IMAGENET / recipe.batch_size)
    plain = replace(recipe, layer_decay=None)
    optimizer, schedule = loop.make_optimizer(torch.nn.Linear(2, 2), plain, steps)
    rates = {}
    for step in (0, 1, warmup - 1, warmup, steps):
        schedule.step_update(step)
        rates[step] = optimizer.param_groups[0]["lr"]
    assert rates[0] == pytest.approx(recipe.lr / (warmup + 1))
    assert rates[0] < rates[1] < rates[warmup - 1] < rates[warmup] == pytest.approx(recipe.lr)
    assert rates[steps] == pytest.approx(recipe.min_lr)


def test_lamb_brings_the_only_clipping_of_procedure_a2():
    recipe = recipes.supervised_imagenet("B")
    optimizer, _ = loop.make_optimizer(torch.nn.Linear(2, 2), recipe, 1000)
    assert type(optimizer).__name__ == "Lamb" and optimizer.defaults["max_grad_norm"] == 1.0 and recipe.clip is None


def test_a_width_that_the_paper_does_not_have_is_refused_in_one_sentence():
    with pytest.raises(UsageError, match="unknown width 'H': allowed are Ti, S, B, L"):
        recipes.supervised_imagenet("H")


def test_sgd_differs_from_adamw_in_the_optimizer_its_rate_and_its_decay_alone():
    same = {"optimizer": "adamw", "lr": 1e-5, "weight_decay": 0.1}
    assert replace(recipes.RESOLUTION_SGD, **same) == recipes.RESOLUTION_ADAMW
    assert recipes.RESOLUTION_SGD.lr in recipes.RESOLUTION_SGD_RATES


SIX = ("inaturalist-2018", "inaturalist-2019", "cifar-10", "cifar-100", "stanford-cars", "flowers-102")


@pytest.mark.parametrize("data", SIX)
def test_each_set_of_table_6_has_the_first_authors_values(data):
    recipe, drop_path = recipes.transfer_imagenet(data)
    large = data.startswith("inaturalist")
    found = (recipe.optimizer, recipe.lr, recipe.weight_decay, recipe.epochs, recipe.augment.erasing, drop_path)
    assert found == (("adamw", 7.5e-5, 0.05, 360, 0.1, 0.1) if large else ("sgd", 1e-2, 1e-4, 1000, 0.0, 0.0))
    assert (recipe.batch_size, recipe.repeats, recipe.warmup * recipe.epochs) == (768, 3, 5)
    assert {path: value(recipe, path) for path in M9} == M9


def test_another_set_than_table_6s_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"unknown data set of Table 6 'cifar10'.*did you mean 'cifar-10'"):
        recipes.transfer_imagenet("cifar10")


def test_beits_model_has_layer_scale_one_relative_bias_and_a_mean_readout():
    assert recipes.BEIT_MODEL == {
        "layer_scale": 0.1, "drop_path": 0.1, "pos": "relative", "pool": "mean",
        "shrink_deep": True, "head_scale": 0.001, "key_bias": False,
    }  # fmt: skip
    with torch.device("meta"):
        model = ViT(vit_config("B12", **recipes.BEIT_MODEL))
        absolute = ViT(vit_config("B12", **recipes.BEIT_MODEL_ABSOLUTE))
    assert model.pos_embed is None and model.relative.table.shape == (27 * 27 + 3, 12)
    assert absolute.relative is None and absolute.pos_embed.shape == (1, 197, 768)


def test_75_of_196_patches_are_masked_and_the_tokenizer_gives_each_patch_a_token():
    beit, tokenizer = vit_config("B12", **recipes.BEIT_MODEL), DVAEConfig(in_chans=3, **recipes.TOKENIZER_MODEL)
    assert (recipes.BEIT_MASKED, beit.grid**2, tokenizer.grid) == (75, 196, beit.grid)
    assert (tokenizer.vocabulary, tokenizer.image_size) == (8192, recipes.BEIT_PRETRAINING.augment.view_size)
    assert loop.count_steps(recipes.TOKENIZER_IMAGENET, IMAGENET) == 480 * 2503 >= 1_200_000


def test_three_augment_is_an_option_that_changes_the_transforms_alone():
    own = recipes.supervised_imagenet("S")
    other = replace(own, augment=recipes.THREE_AUGMENT)
    assert other.augment == Augment(policy="3-augment", color_jitter=0.3, test_crop=1.0)
    assert replace(other, augment=own.augment) == own


REFUSED = {
    "smoothing is 0.1 with loss 'bce': allowed is 0": {"loss": "bce", "smoothing": 0.1},
    "ema is 1.0: allowed are None": {"ema": 1.0},
    "repeats is 0: allowed are whole numbers from 1": {"repeats": 0},
    "cutmix is -1.0: allowed are numbers from 0": {"cutmix": -1.0},
    "epochs is 2.5: allowed are whole numbers from 1": {"epochs": 2.5},
    "batch_size is True: allowed are whole numbers": {"batch_size": True},
    "lr is nan: allowed are numbers above 0": {"lr": math.nan},
    "lr is 0.0: allowed are numbers above 0": {"lr": 0.0},
    "weight_decay is inf: allowed are numbers from 0": {"weight_decay": math.inf},
    "min_lr is -1e-05": {"min_lr": -1e-5},
    r"betas is \(0.9,\): allowed are two numbers": {"betas": (0.9,)},
    r"betas is \(0.9, 1.0\): allowed are two numbers": {"betas": (0.9, 1.0)},
    "clip is 0.0: allowed are None": {"clip": 0.0},
    "warmup is 1.0": {"warmup": 1.0},
    "mixup is nan": {"mixup": math.nan},
    "layer_decay is 0.0": {"layer_decay": 0.0},
    "flip is 1: allowed are True": {"flip": 1},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_a_recipe_that_cannot_be_is_refused_in_one_sentence(sentence):
    with pytest.raises(UsageError, match=sentence):
        Recipe(**{"epochs": 1, "batch_size": 2, "lr": 1e-3} | REFUSED[sentence])


def test_recipes_of_the_embedded_images_have_nothing_of_this():
    named = [r for value in vars(recipes).values() for r in (value.values() if isinstance(value, dict) else [value])]
    small = [r for r in named if isinstance(r, Recipe) and r.augment is None]
    assert len(small) == 8 + 4  # of resolution one for each strategy
    targets = [name.split() for name in recipes.TRANSFER_RATES if not name.startswith("W")]
    small += [recipes.transfer(64, data, int(images), s) for data, images in targets for s in recipes.FINE_TUNING]
    assert len(small) == 12 + 4 * 12  # and of transfer one on each target
    for recipe in small:
        assert (recipe.cutmix, recipe.smoothing, recipe.repeats, recipe.ema) == (0.0, 0.0, 1, None)
