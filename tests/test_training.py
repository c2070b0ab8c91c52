"""The loop, fine-tuning strategies, masked pre-training: what moves, what stays, and that seeds mean something."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from scipy import ndimage
from torch import nn

from lab.data.cards import load_resized
from lab.runs.spec import TRAINING_VERSION
from vitlib import draws
from vitlib.data import Batch, subset
from vitlib.draws import uniform, uniform_on
from vitlib.errors import UsageError
from vitlib.model import ViT, vit_config
from vitlib.train import dvae as dvae_module
from vitlib.train import loop
from vitlib.train.dvae import DVAE, Block, DVAEConfig, DVAELoss, gumbel
from vitlib.train.dvae import evaluate as evaluate_dvae
from vitlib.train.finetune import STRATEGIES, at_image_size, freeze, start_from, trainable
from vitlib.train.masked import MaskedLoss, MaskedViT, block_masks
from vitlib.train.recipe import Recipe
from vitlib.train.supervised import bce, cross_entropy
from vitlib.train.tokenizers import (
    NormalisedPixels,
    PatchTokens,
    codebook_use,
    kmeans,
    make_targets,
    nearest,
    patchify,
    usage,
)

torch.set_num_threads(1)
RECIPE = Recipe(epochs=1, batch_size=10, lr=1e-3)


@pytest.fixture(scope="module")
def images():
    return load_resized("fashion-mnist", "train", 16)


def small(**fields):
    return vit_config("W32-3x2/4", image_size=16, in_chans=1, num_classes=10, **fields)


def train(config, images, recipe=RECIPE, seed=1000, rows=200, model=None, loss=cross_entropy):
    model = model or ViT(config, seed)
    return model, loop.train(model, recipe, images, subset(images, rows, seed), seed, loss)


def batch_of(images, count=20, seed=0, epoch=0) -> Batch:
    return next(images.epoch_batches(np.arange(count), seed, epoch, replace(RECIPE, batch_size=count)))


# ---- the loop

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
    for name, lr in (("adamw", 3e-3), ("lamb", 3e-2), ("sgd", 5e-2)):
        _, history = train(small(), images, Recipe(epochs=3, batch_size=10, lr=lr, optimizer=name))
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

    correct, loss = loop.evaluate(Says(), images, batch_size=777)
    assert np.array_equal(correct, (images.labels == 3).numpy())
    right = np.log(np.e + 9) - 1
    assert loss == pytest.approx(0.1 * right + 0.9 * (right + 1), rel=1e-5)


def test_binary_cross_entropy_counts_every_mixed_class_as_positive():
    model = lambda images, draws: torch.zeros(2, 4)  # noqa: E731
    mixed = Batch(None, torch.tensor([[0.9, 0.1, 0, 0], [1.0, 0, 0, 0]]), None, None, 0)
    plain = Batch(None, torch.tensor([0, 2]), None, None, 0)
    assert bce(model, mixed).item() == bce(model, plain).item() == pytest.approx(np.log(2))
    logits = torch.tensor([[9.0, 9.0, -9.0, -9.0], [9.0, -9.0, -9.0, -9.0]])
    assert bce(lambda images, draws: logits, mixed).item() < 1e-3


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


# ---- fine-tuning


def test_each_strategy_trains_exactly_its_roles_in_every_branch():
    model = ViT(small(layer_scale=0.1, stem="local"))  # whose own attention is the stem's
    shared = {"pos_embed", "head.weight", "head.bias"}

    def of(kind, parts):
        places = [f"layers.{i}.{kind}.{k}.f.{part}" for i in range(3) for k in range(2) for part in parts]
        return {f"{place}.{tensor}" for place in places for tensor in ("weight", "bias")}

    assert set(trainable(model, "attn")) == of("mhsa", ("qkv", "proj")) | shared
    assert set(trainable(model, "ffn")) == of("ffn", ("fc1", "fc2")) | shared
    assert set(trainable(model, "head")) == shared
    assert trainable(model, "full") == [name for name, _ in model.named_parameters()]
    with pytest.raises(UsageError, match="did you mean 'attn'"):
        trainable(model, "attention")


def test_attention_only_of_vit_b_at_384_trains_what_the_released_code_trains():
    counts = {"attn": 29_559_784, "ffn": 57_880_552, "full": 86_877_160}
    for strategy, count in counts.items():
        with torch.device("meta"):
            model = ViT(vit_config("B12", image_size=384, layer_scale=1e-4))
        freeze(model, strategy)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_the_strategies_work_on_timm_models_and_train_both_parallel_branches():
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_18x2_224")
    names = freeze(model, "attn")
    attention = sum(p.numel() for n, p in model.named_parameters() if ".attn." in n)
    assert attention == 36 * (4 * 384**2 + 4 * 384)
    assert {n for n in names if ".attns." in n} == {n for n, _ in model.named_parameters() if ".attn." in n}
    assert {n for n in names if ".attns." not in n} == {"pos_embed", "head.weight", "head.bias"}


@pytest.mark.parametrize(("name", "fresh"), [
    ("vit_tiny_patch16_224", {"head", "pos_embed"}),
    ("deit_tiny_distilled_patch16_224", {"head", "head_dist", "pos_embed"}),
    ("pit_ti_distilled_224", {"head", "head_dist", "pos_embed"}),
    ("naflexvit_base_patch16_gap", {"head", "embeds.pos_embed"}),
    ("mobilevit_xxs", {"head.fc"}),
])  # fmt: skip
def test_every_head_position_and_attention_of_timms_models_is_trained(name, fresh):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=5)
    attention = {n for n, _ in model.named_parameters() if ".attn." in n}
    names = set(freeze(model, "attn"))
    assert attention and names - attention == {n for n, _ in model.named_parameters() if n.startswith(tuple(fresh))}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == names == attention | names


@pytest.mark.parametrize(("name", "said"), [
    ("crossvit_tiny_240", r"CrossVit's blocks.0.fusion.0 \(CrossAttentionBlock\) would stay frozen"),
    ("vit_base_patch16_siglip_224", r"attn_pool \(AttentionPoolLatent\) would stay frozen"),
    ("csatv2", r"stages.0.0.attn \(SpatialAttention\) would stay frozen"),
    ("swin_tiny_patch4_window7_224", "has no attn layers that can be told apart: known are vitlib's MHSA and timm's"),
    ("resnet18", "ResNet has no attn layers"),
])  # fmt: skip
def test_a_model_whose_attention_is_not_known_is_refused(name, said):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UsageError, match=said) as error:
        freeze(model, "attn")
    assert "\n" not in str(error.value) and all(p.requires_grad for p in model.parameters())


def test_a_head_is_found_by_what_timm_says_and_a_model_without_one_is_refused():
    with torch.device("meta"):
        assert freeze(timm.create_model("resnet18"), "head") == ["fc.weight", "fc.bias"]
        assert freeze(timm.create_model("densenet121"), "head") == ["classifier.weight", "classifier.bias"]
    for model in (nn.Sequential(nn.Linear(2, 2)), ViT(replace(small(), num_classes=0)), MaskedViT(small(), 4)):
        with pytest.raises(UsageError, match=f"{type(model).__name__} has no head that could be trained"):
            freeze(model, "head")


def test_a_wrapped_model_trains_the_same_parameters_and_one_in_ddp_is_refused(monkeypatch):
    model = ViT(small(pos="relative", stem="local"))
    names = {strategy: trainable(model, strategy) for strategy in STRATEGIES}
    wrappers = {"_orig_mod.": torch.compile, "module.": nn.DataParallel}
    wrappers["_orig_mod.module."] = lambda model: torch.compile(nn.DataParallel(model))
    for strategy in STRATEGIES:
        for prefix, wrap in wrappers.items():
            assert freeze(wrap(model), strategy) == [prefix + name for name in names[strategy]]
            assert [n for n, p in model.named_parameters() if p.requires_grad] == names[strategy]
    inside = ViT(small())
    inside.layers[1] = torch.compile(inside.layers[1])
    assert len(freeze(inside, "attn")) == len(trainable(ViT(small()), "attn"))
    monkeypatch.setattr(nn.parallel.DistributedDataParallel, "__init__", lambda self: nn.Module.__init__(self))
    with pytest.raises(UsageError, match="before DistributedDataParallel"):
        freeze(nn.parallel.DistributedDataParallel(), "attn")


def test_frozen_tensors_stay_and_trained_ones_move(images):
    config = small(layer_scale=0.1, stem="hmlp")
    trunk, _ = train(config, images, rows=100)
    before = {k: v.clone() for k, v in trunk.state_dict().items()}
    for strategy in ("attn", "ffn", "head"):
        model = start_from(before, config, 1000)
        kept = set(freeze(model, strategy))
        train(config, images, rows=100, model=model)
        moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        assert moved == kept  # also: frozen batch norm keeps its running statistics


def test_a_trunk_starts_at_a_new_resolution_with_resized_positions(images):
    trunk = ViT(small(), seed=3)
    larger = at_image_size(trunk.config, 20)
    model = start_from(trunk.state_dict(), larger, seed=4)
    assert model.pos_embed.shape == (1, 25, 32)
    assert torch.equal(model.layers[2].ffn[1].f.fc2.weight, trunk.layers[2].ffn[1].f.fc2.weight)
    assert torch.equal(model.head.weight, trunk.head.weight)
    other = start_from(trunk.state_dict(), replace(larger, num_classes=4), seed=4)
    assert torch.equal(other.head.weight, ViT(replace(larger, num_classes=4), 4).head.weight)
    fresh = start_from(trunk.state_dict(), larger, seed=4, new_head=True)
    assert torch.equal(fresh.head.weight, ViT(larger, 4).head.weight)
    assert torch.equal(fresh.head.bias, ViT(larger, 4).head.bias)
    assert not torch.equal(fresh.head.weight, trunk.head.weight)
    assert torch.equal(fresh.pos_embed, model.pos_embed)
    with pytest.raises(UsageError, match="nearest allowed are 20 and 24"):
        at_image_size(trunk.config, 22)


def test_a_trunk_of_another_shape_is_refused_with_the_keys_that_differ():
    trunk = ViT(small()).state_dict()
    with pytest.raises(ValueError, match=r"layers\.0\.ffn\.1\.f\.fc1\.bias.*nothing was loaded"):
        start_from(trunk, vit_config("W32-6x1/4", image_size=16, in_chans=1, num_classes=10), 0)


# ---- masked pre-training


@pytest.mark.parametrize(("grid", "masked"), [(7, 19), (14, 75), (2, 1), *((4, n) for n in range(1, 16))])
def test_every_mask_has_exactly_the_count(grid, masked):
    masks = block_masks(0, 0, np.arange(500), grid, masked)
    assert masks.shape == (500, grid * grid) and set(masks.sum(1)) == {masked}
    assert len({m.tobytes() for m in masks}) > min(3, grid)


def test_masks_are_block_wise_and_belong_to_the_image():
    masks = block_masks(3, 1, np.arange(2000), 14, 75)
    assert np.array_equal(masks[40:50], block_masks(3, 1, np.arange(40, 50), 14, 75))
    assert not np.array_equal(masks[40:50], block_masks(3, 2, np.arange(40, 50), 14, 75))
    maps = masks.reshape(-1, 14, 14)
    together = (maps[:, 1:] == maps[:, :-1]).mean()
    scattered = 1 - 2 * (75 / 196) * (121 / 196)
    assert together > 0.8 > scattered  # neighbours mostly share their fate


def mask_of_one_image(draw: random.Random, grid: int, masked: int) -> tuple[np.ndarray, int]:
    """BEiT's second version, block by block: bool (grid, grid), and how many patches were masked singly at the end."""
    mask, failures = np.zeros((grid, grid), dtype=bool), 0
    while (missing := masked - int(mask.sum())) > 0 and failures < 10:
        area = draw.uniform(max(2.0, 16 / 196 * grid * grid), missing)
        aspect = math.exp(draw.uniform(math.log(0.3), math.log(1 / 0.3)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        failures += 1
        if height < grid and width < grid:
            top, left = draw.randint(0, grid - height), draw.randint(0, grid - width)
            block = mask[top : top + height, left : left + width]
            if 0 < np.sum(~block) <= missing:
                block[:], failures = True, 0
    if missing:
        mask.flat[draw.sample(np.flatnonzero(~mask).tolist(), missing)] = True
    return mask, missing


def components(masks: np.ndarray) -> float:
    """Mean number of connected components, patches that share a side, of bool (N, grid, grid)."""
    return np.mean([ndimage.label(mask)[1] for mask in masks])


@pytest.mark.parametrize(("grid", "masked"), [(14, 75), (4, 6)])
def test_masks_have_the_connected_components_of_beits(grid, masked):
    """At 75 of 196: 1.80; with areas of a fixed range and blocks cut at the border, they were 3.94."""
    draw = random.Random(0)
    reference = components([mask_of_one_image(draw, grid, masked)[0] for _ in range(2000)])
    masks = block_masks(0, 0, np.arange(2000), grid, masked).reshape(-1, grid, grid)
    assert components(masks) == pytest.approx(reference, abs=0.08)
    if grid == 14:
        assert reference == pytest.approx(1.80, abs=0.05)


def test_hardly_a_patch_is_masked_singly(monkeypatch):
    """At 75 of 196 BEiT masks 0.5 patches an image singly. What the blocks leave is what the draws for patches decide."""
    draw = random.Random(0)
    reference = np.mean([mask_of_one_image(draw, 14, 75)[1] for _ in range(2000)])
    uniform = draws.uniform

    def mirrored(*which):  # the same blocks, the last patches in the opposite order
        u = uniform(*which)
        u[:, -196:] = 1 - u[:, -196:]
        return u

    masks = block_masks(0, 0, np.arange(2000), 14, 75)
    monkeypatch.setattr(draws, "uniform", mirrored)
    singles = (masks & ~block_masks(0, 0, np.arange(2000), 14, 75)).sum(1).mean()
    assert reference == pytest.approx(0.5, abs=0.1) and singles == pytest.approx(reference, abs=0.15)


@pytest.mark.parametrize("masked", [0, 16, -3])
def test_an_impossible_count_of_masked_patches_is_refused(masked):
    with pytest.raises(UsageError, match="allowed are 1 to 15"):
        block_masks(0, 0, np.arange(2), 4, masked)


def test_the_loss_counts_masked_patches_only(images):
    batch, config = batch_of(images), small(stem="hmlp", stem_norm="ln")
    targets = PatchTokens(images.take(np.arange(300)), 4, seed=0, vocabulary=16)
    loss = MaskedLoss(targets, seed=0, masked=6)
    model = MaskedViT(config, targets.outputs).eval()
    mask = loss.mask(4, batch)
    before = loss(model, batch)
    saved = targets.tokens.clone()
    rows = torch.from_numpy(batch.index)
    visible = torch.where(mask, saved[batch.flipped.long(), rows], 0)
    targets.tokens[batch.flipped.long(), rows] = visible
    assert torch.equal(loss(model, batch), before)  # targets of visible patches do not matter
    targets.tokens[batch.flipped.long(), rows] = torch.where(mask, (saved[batch.flipped.long(), rows] + 1) % 16, 0)
    assert not torch.equal(loss(model, batch), before)


def test_masked_pixels_do_not_reach_the_prediction_but_through_a_convolutional_stem(images):
    batch = batch_of(images)
    mask = torch.from_numpy(block_masks(0, 0, batch.index, 4, 6))
    pixels = mask.view(-1, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = torch.where(pixels, batch.images.flip(0), batch.images)
    for stem, norm, reaches in (
        ("linear", "none", False),
        ("hmlp", "ln", False),
        ("hmlp", "bn", False),
        ("linear", "bn", False),
        ("local", "none", False),
        ("conv", "bn", True),
    ):
        model = MaskedViT(small(stem=stem, stem_norm=norm), 16).eval()
        assert torch.equal(model(batch.images, mask), model(other, mask)) != reaches, stem


def test_masked_pre_training_learns_and_its_weights_start_a_classifier(images):
    config = small(pool="mean")
    targets = PatchTokens(images.take(subset(images, 500, 0)), 4, seed=0, vocabulary=16)
    data = images.take(subset(images, 500, 0))
    model = MaskedViT(config, targets.outputs, seed=0)
    loss = MaskedLoss(targets, seed=0, masked=6)
    history = loop.train(model, Recipe(epochs=4, batch_size=20, lr=3e-3), data, np.arange(500), 0, loss)
    assert np.mean([s.loss for s in history[-20:]]) < history[0].loss - 0.5
    classifier = start_from(model.vit.state_dict(), config, seed=9)
    assert torch.equal(classifier.layers[0].mhsa[0].f.qkv.weight, model.vit.layers[0].mhsa[0].f.qkv.weight)
    assert torch.equal(classifier.head.weight, ViT(config, 9).head.weight)


def test_k_means_is_lloyds_algorithm():
    from scipy.cluster.vq import kmeans2

    points = torch.from_numpy(np.random.default_rng(0).normal(size=(800, 6)))
    start = kmeans(points, 12, iterations=0, seed=3)
    assert len({tuple(p) for p in start.tolist()}) == 12  # twelve distinct points
    ours = kmeans(points, 12, iterations=15, seed=3)
    theirs, label = kmeans2(points.numpy(), start.numpy(), iter=15, minit="matrix")
    assert np.allclose(ours, theirs, atol=1e-9)
    assert np.array_equal(nearest(points, kmeans(points, 12, 14, seed=3)), label)


def test_tokens_follow_the_image_when_it_is_mirrored(images):
    data = images.take(np.arange(200))
    targets = PatchTokens(data, 4, seed=0, vocabulary=32)
    batch = batch_of(data)
    assert batch.flipped.any() and not batch.flipped.all()
    seen = data.images[torch.from_numpy(batch.index)]
    seen = torch.where(batch.flipped[:, None, None, None], seen.flip(-1), seen)
    assert torch.equal(
        targets(batch), nearest(patchify(seen, 4).reshape(-1, 16) / 255, targets.prototypes).view(20, 16)
    )
    assert usage(targets.tokens, 32).sum() == pytest.approx(1) and (usage(targets.tokens, 32) > 0).sum() > 16


TABLE_7 = [
    {"stem": "linear", "stem_norm": norm, "stem_act": act} for norm in ("none", "bn") for act in ("none", "gelu")
]
TABLE_7 += [{"stem": stem, "stem_norm": norm} for stem in ("conv", "hmlp") for norm in ("bn", "ln")] + [
    {"stem": "local"}
]


@pytest.mark.parametrize("fields", TABLE_7, ids=lambda fields: "-".join(fields.values()))
def test_every_stem_of_table_7_trains_itself(images, fields):
    model = ViT(vit_config("W64-2x1/4", image_size=16, in_chans=1, num_classes=10, **fields), 1000)
    before = {name: p.clone() for name, p in model.stem.named_parameters()}
    _, history = train(None, images, model=model, recipe=replace(RECIPE, epochs=4, lr=2e-3))
    assert np.mean([s.loss for s in history[-20:]]) < np.mean([s.loss for s in history[:20]]) - 0.2
    assert not any(torch.equal(p, before[name]) for name, p in model.stem.named_parameters())


# ---- the discrete VAE


def dvae(seed=0, **fields):
    return DVAE(DVAEConfig(**{"image_size": 16, "patch_size": 4, "in_chans": 1, "vocabulary": 16, **fields}), seed)


def test_ten_steps_of_a_discrete_vae_have_the_numbers_of_this_training_version(images):
    """Raise TRAINING_VERSION when these move."""
    model = dvae(seed=1000, width=32)
    history = loop.train(model, replace(RECIPE, lr=1e-2), images, np.arange(100), 1000, DVAELoss(1000, 10))
    assert [history[0].loss, history[9].loss] == pytest.approx(GOLDEN_DVAE, rel=1e-3)
    assert int(model.step) == 10


GOLDEN_DVAE = [1.9653898477554321, 0.7299562096595764]


def test_its_loss_is_squared_error_of_a_relaxed_sample_and_divergence_from_uniform(images):
    batch, model = batch_of(images), dvae(kl_weight=0.3, temperature=(0.7, 0.7))
    with torch.no_grad():
        logits = model.logits(batch.images)
        u = torch.from_numpy(uniform(5, "gumbel", batch.epoch, batch.index, 16 * 16)).view(20, 16, 16)
        weights = torch.exp((logits - torch.log(-torch.log(u))) / 0.7)
        decoded = model.decode((weights / weights.sum(-1, keepdim=True)).float() @ model.codebook)
        q = torch.distributions.Categorical(logits=logits)
        even = torch.distributions.Categorical(logits=torch.zeros_like(logits))
        kl = torch.distributions.kl_divergence(q, even).mean()
        expected = (decoded - batch.images).square().mean() + 0.3 * kl
        assert DVAELoss(5, steps=10)(model, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_gumbel_noise_belongs_to_the_image_and_has_gumbels_mean_and_variance():
    noise = gumbel(3, 1, np.arange(500), 256)
    assert torch.equal(noise[40:43], gumbel(3, 1, np.arange(40, 43), 256))
    assert not any(torch.equal(noise, gumbel(*other, np.arange(500), 256)) for other in ((3, 2), (4, 1)))
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02) and noise.var().item() == pytest.approx(
        np.pi**2 / 6, rel=0.02
    )


def test_a_device_draws_the_bits_of_the_host_and_gumbel_noise_that_rounds_to_the_same():
    which, n = (1000, "gumbel", 3, np.array([0, 7, 1_281_166, 2**40])), 50_000
    assert torch.equal(uniform_on("cpu", *which, n), torch.from_numpy(uniform(*which, n)))
    there, here = (draw(torch.device("cpu"), *which, n).float() for draw in GUMBEL)
    assert torch.equal(here, torch.from_numpy((-np.log(-np.log(uniform(*which, n)))).astype(np.float32)))
    assert torch.allclose(there, here, rtol=1e-6, atol=1e-12) and torch.equal(here, gumbel(1000, 3, which[-1], n))


GUMBEL = (dvae_module._gumbel_on_device, dvae_module._gumbel_on_host)


def test_gumbel_noise_is_finite_at_both_ends_of_the_uniform_numbers(monkeypatch):
    ends = torch.tensor([[0.0, 2.0**-53, 1 - 2.0**-53]], dtype=torch.float64)
    monkeypatch.setattr(dvae_module.draws, "uniform", lambda *which: ends.numpy().copy())
    monkeypatch.setattr(dvae_module.draws, "uniform_on", lambda *which: ends.clone())
    there, here = (draw(torch.device("cpu")) for draw in GUMBEL)
    assert torch.allclose(there, here) and there.isfinite().all()
    assert there[0, -1].item() == pytest.approx(53 * np.log(2))


def test_noise_is_drawn_where_the_logits_are_a_chunk_of_images_at_a_time(images, monkeypatch):
    """On `meta`, which computes nothing."""
    drawn, n, batch = [], 16 * 16, batch_of(images)
    whole = gumbel(3, 1, batch.index, n)
    for name in ("uniform", "uniform_on"):
        inner = getattr(dvae_module.draws, name)
        seen = lambda *which, name=name, inner=inner: (drawn.append((name, len(which[-2]))), inner(*which))[1]  # noqa: E731
        monkeypatch.setattr(dvae_module.draws, name, seen)
    monkeypatch.setattr(dvae_module, "CHUNK", 7 * n + 5)
    assert torch.equal(gumbel(3, 1, batch.index, n), whole)
    assert drawn == [("uniform", 7), ("uniform", 7), ("uniform", 6)]
    drawn.clear()
    monkeypatch.setattr(DVAELoss, "temperature", lambda *_: 1.0)
    assert DVAELoss(3, steps=10)(dvae().to("meta"), batch.to("meta")).is_meta
    assert drawn == [("uniform_on", 7), ("uniform_on", 7), ("uniform_on", 6)]


def test_the_temperature_falls_from_first_to_last_on_a_cosine(images):
    model, loss, batch = dvae(temperature=(1.0, 1 / 16)), DVAELoss(0, steps=9), batch_of(images)
    seen = []
    for _ in range(9):
        seen.append(loss.temperature(model))
        loss(model, batch)
    assert seen[0] == 1.0 and seen[4] == pytest.approx((1 + 1 / 16) / 2) and seen[8] == pytest.approx(1 / 16)
    assert seen == sorted(seen, reverse=True)


def test_a_reconstruction_is_decoded_from_the_codebook_vectors_of_its_tokens_alone(images):
    model, seen = dvae().eval(), batch_of(images).images
    tokens = model.tokens(seen)
    assert torch.equal(tokens, model.logits(seen).argmax(-1)) and tokens.shape == (20, 16)
    assert torch.equal(model(seen), model.decode(model.codebook[tokens])) and model(seen).shape == seen.shape
    assert dvae(image_size=32, patch_size=16, in_chans=3)(torch.zeros(2, 3, 32, 32)).shape == (2, 3, 32, 32)


@torch.no_grad()
def test_tokens_and_pixels_are_in_row_major_order(images):
    model = dvae().eval()
    for module in model.modules():
        if isinstance(module, Block):  # without its neighbours a patch has its own token and its own pixels only
            module.proj.weight.zero_()
    seen = batch_of(images).images
    other = seen.clone()
    other[:, :, 12:, 4:8] += 3  # the last row's second patch
    moved = (model.logits(other) != model.logits(seen)).any(-1)
    assert moved.any(0).nonzero().tolist() == [[13]]
    codes = torch.zeros(1, 16, 64)
    changed = codes.clone()
    changed[:, 13] += 1
    different = (model.decode(changed) != model.decode(codes))[0, 0]
    assert (
        different[12:, 4:8].any()
        and not different[:12].any()
        and not different[12:, :4].any()
        and not different[12:, 8:].any()
    )


def test_a_discrete_vae_learns_to_reconstruct_and_uses_its_codebook(images):
    data = images.take(subset(images, 2000, 1000))
    model = dvae(seed=1000, vocabulary=32, width=32, kl_weight=0.03)
    recipe, held_out = Recipe(epochs=8, batch_size=64, lr=1e-2), load_resized("fashion-mnist", "validation", 16)
    before = evaluate_dvae(model.eval(), held_out)
    history = loop.train(model, recipe, data, np.arange(2000), 1000, DVAELoss(1000, loop.count_steps(recipe, 2000)))
    after = evaluate_dvae(model.eval(), held_out)
    assert history[-1].loss < history[0].loss / 4 and after["recon_mse"] < before["recon_mse"] / 5
    assert after["tokens_used"] > 0.6 and after["perplexity"] > 8
    assert after["recon_mse"] < 0.2 * held_out.images.div(255).var().item()


def test_use_of_a_codebook_counts_tokens_and_their_perplexity():
    assert codebook_use(torch.tensor([3, 5, 3, 5]), 8) == pytest.approx({"tokens_used": 0.25, "perplexity": 2.0})
    assert codebook_use(torch.arange(8), 8) == pytest.approx({"tokens_used": 1.0, "perplexity": 8.0})
    assert codebook_use(torch.zeros(9, dtype=torch.int64), 8) == pytest.approx(
        {"tokens_used": 1 / 8, "perplexity": 1.0}
    )


def test_learned_tokens_are_looked_up_in_both_orientations_and_need_a_tokenizer(images):
    data, model = images.take(np.arange(700)), dvae(vocabulary=64).eval()
    targets = make_targets("dvae", data, 4, 0, model)
    batch = batch_of(data)
    assert batch.flipped.any() and not batch.flipped.all() and targets.outputs == 64
    assert torch.equal(targets(batch), model.tokens(batch.images))
    assert targets.tokens.shape == (2, 700, 16) and not torch.equal(*targets.tokens)
    with pytest.raises(UsageError, match="'dvae' need a tokenizer"):
        make_targets("dvae", data, 4, 0)


def test_normalised_pixels_have_mean_zero_and_unit_variance(images):
    batch = batch_of(images)
    busy = NormalisedPixels(images, 4)(batch)[patchify(batch.images, 4).std(-1) > 0.1]  # not plain background
    assert len(busy) > 100
    assert torch.allclose(busy.mean(-1), torch.zeros(len(busy)), atol=1e-5)
    assert torch.allclose(busy.var(-1), torch.ones(len(busy)), atol=1e-3)
