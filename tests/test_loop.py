"""The loop, its optimizer and losses: what moves, what stays, and that seeds mean something."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from training import RECIPE, batch_of, small, train

from lab.data.cards import load_resized
from lab.runs.spec import TRAINING_VERSION
from vitlib.data import Batch, subset
from vitlib.errors import UsageError
from vitlib.model import ViT, vit_config
from vitlib.train import loop
from vitlib.train.finetune import at_image_size, freeze, start_from
from vitlib.train.masked import MaskedLoss, MaskedViT
from vitlib.train.recipe import Recipe
from vitlib.train.supervised import bce, cross_entropy, evaluate
from vitlib.train.tokenizers import (
    PatchTokens,
)

torch.set_num_threads(1)


GOLDEN = {
    "linear": [2.4241669178009033, 2.493590831756592, 2.4798684120178223],
    "hmlp": [2.4277029037475586, 2.4732096195220947, 2.4797396659851074],
}


@pytest.mark.parametrize("stem", GOLDEN)
def test_twenty_steps_have_the_numbers_of_this_training_version(images, stem):
    """Raise TRAINING_VERSION when these move: stored runs are then trained anew."""
    _, history = train(small(layer_scale=1e-2, drop_path=0.1, stem=stem), images)
    assert len(history) == 20 and TRAINING_VERSION == 3
    assert [history[i].loss for i in (0, 9, 19)] == pytest.approx(GOLDEN[stem], rel=1e-3)


def test_ten_masked_and_ten_fine_tuned_steps_have_the_numbers_of_this_training_version(images):
    """Raise TRAINING_VERSION when these move: masks, tokens, position resize, frozen layers."""
    data = images.take(np.arange(200))
    targets = PatchTokens(data, 4, seed=0, vocabulary=16)
    model = MaskedViT(small(), targets.outputs, seed=1000)
    history = loop.train(
        model, replace(RECIPE, batch_size=20), data, np.arange(200), 1000, MaskedLoss(targets, 1000, 6)
    )
    assert [history[0].loss, history[9].loss] == pytest.approx(GOLDEN_MASKED, rel=1e-3)
    model = start_from(ViT(small(), 1000).state_dict(), at_image_size(small(), 20), 1000)
    freeze(model, "attn")
    larger = load_resized("fashion-mnist", "train", 20)
    history = loop.train(model, replace(RECIPE, mixup=0.4), larger, np.arange(100), 1000, bce)
    assert [history[0].loss, history[9].loss] == pytest.approx(GOLDEN_FINE_TUNED, rel=1e-3)


GOLDEN_MASKED = [2.657463312149048, 2.6358885765075684]
GOLDEN_FINE_TUNED = [0.6856335997581482, 0.5210239887237549]


def test_a_seed_gives_the_same_weights_bit_for_bit_and_another_seed_others(images):
    config = small(drop_path=0.2, layer_scale=0.1)
    (a, first), (b, second), (c, _) = (train(config, images, seed=s) for s in (1000, 1000, 1001))
    assert first == second
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.head.weight, c.head.weight)


def test_training_lowers_the_loss_of_every_optimizer(images):
    for name, lr, epochs in (("adamw", 5e-3, 2), ("lamb", 5e-2, 3), ("sgd", 1e-1, 2)):
        _, history = train(small(), images, Recipe(epochs=epochs, batch_size=10, lr=lr, optimizer=name))
        assert np.mean([s.loss for s in history[-10:]]) < history[0].loss - 0.2, name


def test_the_rate_warms_up_to_its_peak_and_ends_near_the_minimum(images):
    _, history = train(small(), images, replace(RECIPE, epochs=2))
    rates = [s.lr for s in history]
    assert np.argmax(rates) == 4 and rates[4] == pytest.approx(RECIPE.lr)  # 10 % of 40 steps
    assert rates[:5] == sorted(rates[:5]) and rates[4:] == sorted(rates[4:], reverse=True)
    assert RECIPE.min_lr <= rates[-1] < 0.02 * RECIPE.lr


def test_weight_decay_spares_biases_norms_gammas_class_token_and_positions():
    model = ViT(small(layer_scale=0.1, stem="hmlp"))
    optimizer, _ = loop.make_optimizer(model, RECIPE, 10)
    spared = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in spared}
    assert names == {n for n, p in model.named_parameters() if p.ndim == 1 or n in ("cls_token", "pos_embed")}


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(images):
    model = ViT(small())

    def loss(model, batch, draws):
        value = cross_entropy(model, batch, draws)
        return value * (float("nan") if batch.index.sum() == poisoned else 1.0)

    rows = subset(images, 200, 1000)
    poisoned = list(images.epoch_batches(rows, 1000, 0, RECIPE))[6].index.sum()
    with pytest.raises(loop.NonFiniteLoss, match=r"the loss is nan at step 7 of 20 \(epoch 1, seed 1000\)"):
        loop.train(model, RECIPE, images, rows, 1000, loss)


def test_drop_path_draws_belong_to_the_image(images):
    model = ViT(small(drop_path=0.5))
    batch = batch_of(images)
    draws = loop.drop_path_draws(model, 7, batch)
    part = Batch(batch.images[5:9], batch.targets[5:9], batch.index[5:9], batch.flipped[5:9], 0)
    assert draws.shape == (6, 2, 20) and torch.equal(draws[:, :, 5:9], loop.drop_path_draws(model, 7, part))
    assert loop.drop_path_draws(ViT(small()), 7, batch) is None


def test_evaluation_counts_what_the_model_says(images):
    class Says(nn.Module):
        def forward(self, x):
            return nn.functional.one_hot(torch.full((len(x),), 3), 10).float()

    reached, correct = evaluate(Says(), images, batch_size=777)
    assert np.array_equal(correct, (images.labels == 3).numpy())
    right = np.log(np.e + 9) - 1
    assert reached["loss"] == pytest.approx(0.1 * right + 0.9 * (right + 1), rel=1e-5)


def test_binary_cross_entropy_counts_every_mixed_class_as_positive():
    model = lambda images, draws: torch.zeros(2, 4)  # noqa: E731
    mixed = Batch(None, torch.tensor([[0.9, 0.1, 0, 0], [1.0, 0, 0, 0]]), None, None, 0)
    plain = Batch(None, torch.tensor([0, 2]), None, None, 0)
    assert bce(model, mixed).item() == bce(model, plain).item() == pytest.approx(np.log(2))
    logits = torch.tensor([[9.0, 9.0, -9.0, -9.0], [9.0, -9.0, -9.0, -9.0]])
    assert bce(lambda images, draws: logits, mixed).item() < 1e-3


TABLE_7 = [
    {"stem": "linear", "stem_norm": norm, "stem_act": act} for norm in ("none", "bn") for act in ("none", "gelu")
]
TABLE_7 += [{"stem": stem, "stem_norm": norm} for stem in ("conv", "hmlp") for norm in ("bn", "ln")] + [
    {"stem": "local"}
]


@pytest.mark.parametrize("fields", TABLE_7, ids=lambda fields: "-".join(fields.values()))
def test_every_stem_of_table_7_trains_itself(images, fields):
    model = ViT(vit_config("W32-1x1/4", image_size=16, in_chans=1, num_classes=10, **fields), 1000)
    before = {name: p.clone() for name, p in model.stem.named_parameters()}
    _, history = train(None, images, model=model, recipe=replace(RECIPE, epochs=2, lr=4e-3))
    assert np.mean([s.loss for s in history[-10:]]) < np.mean([s.loss for s in history[:10]]) - 0.2
    assert not any(torch.equal(p, before[name]) for name, p in model.stem.named_parameters())


# ---- layer decay


def scales(model, factor=0.65) -> dict[str, float]:
    """How much of the head's rate each parameter learns at."""
    optimizer, _ = loop.make_optimizer(model, replace(RECIPE, layer_decay=factor), 10)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    return {name: scale[id(p)] for name, p in model.named_parameters()}


def test_layer_decay_of_12_layers_is_beits_with_last_norm_and_head_at_1():
    model = ViT(vit_config("W32-12x1/4", image_size=16, pos="relative", stem="hmlp", layer_scale=0.1))
    for name, scale in scales(model).items():
        place, *rest = name.split(".")
        power = {"stem": 13, "cls_token": 13, "relative": 13, "norm": 0, "head": 0}.get(place)
        power = 12 - int(rest[0]) if place == "layers" else power
        assert scale == pytest.approx(0.65**power, rel=1e-12), name


def test_layer_decay_gives_every_depth_the_same_rate_at_the_stem_and_equal_factors_above():
    for name, depth in (("W32-6x2/4", 6), ("W32-13x1/4", 13), ("W32-1x3/4", 1)):
        found = scales(ViT(vit_config(name, image_size=16, stem="local")))
        assert {found[n] for n in found if n.startswith(("stem", "cls", "pos"))} == {found["cls_token"]}
        assert found["cls_token"] == pytest.approx(0.65**13, rel=1e-9)
        steps = [found["cls_token"], *(found[f"layers.{i}.mhsa.0.norm.weight"] for i in range(depth)), 1.0]
        assert np.diff(np.log(steps)) == pytest.approx(np.full(depth + 1, -13 * np.log(0.65) / (depth + 1)))


def test_layer_decay_scales_the_schedule_spares_the_same_parameters_and_is_for_classifiers(images):
    recipe = replace(RECIPE, layer_decay=0.8)
    model = ViT(small(layer_scale=0.1, stem="local"))
    plain, _ = loop.make_optimizer(model, RECIPE, 10)
    decayed, schedule = loop.make_optimizer(model, recipe, 10)
    of = lambda optimizer: {id(p) for g in optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]}  # noqa: E731
    assert of(plain) == of(decayed)
    schedule.step_update(4)
    assert len({g["lr"] / g["lr_scale"] for g in decayed.param_groups}) <= 3  # one rate, up to rounding
    _, history = train(small(), images, recipe)
    assert [s.lr for s in history] == pytest.approx([s.lr for s in train(small(), images)[1]])  # the recipe's
    with pytest.raises(UsageError, match="a MaskedViT has no layers"):
        loop.make_optimizer(MaskedViT(small(), 4), recipe, 10)
    with pytest.raises(UsageError, match=r"layer_decay is 1\.5"):
        replace(RECIPE, layer_decay=1.5)


# ---- recipes


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
