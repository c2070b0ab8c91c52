"""Masked pre-training: masks, targets, and the discrete VAE that makes tokens."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from training import RECIPE, batch_of, small

from lab.data.cards import load_resized
from vitlib import draws
from vitlib.data import subset
from vitlib.draws import uniform, uniform_on
from vitlib.errors import UsageError
from vitlib.model import ViT, vit_config
from vitlib.train import dvae as dvae_module
from vitlib.train import loop, masked
from vitlib.train.dvae import DVAE, Block, DVAEConfig, DVAELoss, gumbel
from vitlib.train.dvae import evaluate as evaluate_dvae
from vitlib.train.finetune import start_from
from vitlib.train.masked import MaskedLoss, MaskedViT, block_masks
from vitlib.train.recipe import Recipe
from vitlib.train.tokenizers import (
    NormalisedPixels,
    PatchTokens,
    codebook_use,
    kmeans,
    make_targets,
    nearest,
    patchify,
)

torch.set_num_threads(1)


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


def test_blanked_pixels_do_not_reach_the_prediction_through_a_convolutional_stem_either(images):
    config = replace(vit_config("W32-2/4", image_size=16, in_chans=1, num_classes=10), stem="conv")
    seen = images.normalise(images.images[:8])
    mask = torch.from_numpy(masked.block_masks(0, 0, np.arange(8), config.grid, 6))
    hidden = masked.pixels(mask, config.grid, 4)
    assert hidden.shape == (8, 1, 16, 16) and hidden.sum() == 8 * 6 * 16
    assert hidden[3, 0, 4:8, 8:12].all() == mask[3, 1 * 4 + 2]  # row 1, column 2
    other = torch.where(hidden, seen.flip(0), seen)
    for blank in (False, True):
        model = masked.MaskedViT(config, 7, seed=1, blank=blank).eval()
        assert torch.equal(model(seen, mask), model(other, mask)) == blank
    model.blank = False
    assert torch.equal(
        model(seen.masked_fill(hidden, 0.0), mask), masked.MaskedViT(config, 7, 1, True).eval()(seen, mask)
    )


def test_masked_pre_training_learns_and_its_weights_start_a_classifier(images):
    config = small(pool="mean")
    data = images.take(subset(images, 500, 0))
    targets = PatchTokens(data, 4, seed=0, vocabulary=16)
    model = MaskedViT(config, targets.outputs, seed=0)
    loss = MaskedLoss(targets, seed=0, masked=6)
    history = loop.train(model, Recipe(epochs=2, batch_size=20, lr=5e-3), data, np.arange(500), 0, loss)
    assert np.mean([s.loss for s in history[-10:]]) < history[0].loss - 0.5
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
    assert codebook_use(targets.tokens, 32)["tokens_used"] > 0.5


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
    by_numpy = torch.from_numpy((-np.log(-np.log(uniform(*which, n)))).astype(np.float32))
    assert torch.allclose(gumbel(1000, 3, which[-1], n), by_numpy, rtol=1e-6, atol=1e-12)


def test_gumbel_noise_is_finite_at_both_ends_of_the_uniform_numbers(monkeypatch):
    ends = torch.tensor([[0.0, 2.0**-53, 1 - 2.0**-53]], dtype=torch.float64)
    monkeypatch.setattr(draws, "uniform_on", lambda *which: ends.clone())
    noise = gumbel(0, 0, np.arange(1), 3)
    assert noise.isfinite().all() and noise[0, -1].item() == pytest.approx(53 * np.log(2))


def test_noise_is_drawn_where_the_logits_are_a_chunk_of_images_at_a_time(images, monkeypatch):
    """On `meta`, which computes nothing."""
    drawn, n, batch, inner = [], 16 * 16, batch_of(images), draws.uniform_on
    whole = gumbel(3, 1, batch.index, n)
    seen = lambda device, *which: (drawn.append((str(device), len(which[-2]))), inner(device, *which))[1]  # noqa: E731
    monkeypatch.setattr(draws, "uniform_on", seen)
    monkeypatch.setattr(dvae_module, "CHUNK", 7 * n + 5)
    assert torch.equal(gumbel(3, 1, batch.index, n), whole)
    assert drawn == [("cpu", 7), ("cpu", 7), ("cpu", 6)]
    drawn.clear()
    monkeypatch.setattr(DVAELoss, "temperature", lambda *_: 1.0)
    assert DVAELoss(3, steps=10)(dvae().to("meta"), batch.to("meta")).is_meta
    assert drawn == [("meta", 7), ("meta", 7), ("meta", 6)]


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
    recipe, held_out = (
        Recipe(epochs=8, batch_size=64, lr=1e-2),
        load_resized("fashion-mnist", "validation", 16).take(np.arange(1000)),
    )
    before, _ = evaluate_dvae(model.eval(), held_out)
    history = loop.train(model, recipe, data, np.arange(2000), 1000, DVAELoss(1000, loop.count_steps(recipe, 2000)))
    after, _ = evaluate_dvae(model.eval(), held_out)
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


def test_an_empty_batch_of_a_masked_model_predicts_nothing():
    model = MaskedViT(vit_config("W32-1x1/4", image_size=8, num_classes=0), outputs=5)
    assert model(torch.zeros(0, 3, 8, 8), torch.zeros(0, 4, dtype=torch.bool)).shape == (0, 5)
