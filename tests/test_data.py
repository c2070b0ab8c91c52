"""Reading a user's own images, the views of an image, and the batches of both kinds of data set."""

import io
import json
import os
import random
import re
import tarfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pictures import TEST, TRAIN, class_folders, encoded, parquet, picture, table, write
from PIL import Image, ImageFilter, ImageOps
from scipy import stats
from torchvision.transforms.functional import pil_to_tensor

from lab import paths
from lab.data.cards import load_resized
from vitlib import draws
from vitlib.data import Augment, Shard, augment, middle, open_folder, read, read_folder, resize, stream, subset
from vitlib.data.stream import epoch_order, mix_pair
from vitlib.errors import UsageError
from vitlib.model import ViT, vit_config
from vitlib.train import loop, tokenizers
from vitlib.train.dvae import DVAE, DVAEConfig
from vitlib.train.masked import MaskedLoss, MaskedViT
from vitlib.train.recipe import Recipe
from vitlib.train.supervised import evaluate, loss_of

WILD = Augment(policy="rand-m7-mstd0.5-inc1", erasing=0.5, view_size=8)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def recipe(batch_size: int, **options) -> Recipe:
    return Recipe(epochs=1, batch_size=batch_size, lr=1e-3, **options)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The same ten pictures in class folders and in parquet files."""
    folder = tmp_path_factory.mktemp("data")
    class_folders(folder / "birds", test="test")
    parquet(folder / "parquet")
    return folder


@pytest.fixture
def opened(root):
    def open_(name="birds", split="train", **options):
        found = read_folder(root / name, split)  # all of them: `open_folder` would hold some out
        data = open_folder(root / name, "test", 16, streamed=True, **options)
        return replace(data, split=split, found=found)

    return open_


@pytest.fixture(scope="module")
def fashion():
    return load_resized("fashion-mnist", "validation", 16)


# ------------------------------------------------------------------------------------------------- images in memory


def test_an_enlarged_image_blends_neighbours_in_quarters():
    image = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    image[0, 0, :, 4:] = 100
    assert resize(image, 16)[0, 0, 5].tolist() == [0] * 7 + [25, 75] + [100] * 7


def test_resize_keeps_constant_images_and_is_antialiased():
    grey = torch.full((2, 1, 28, 28), 93, dtype=torch.uint8)
    assert (resize(grey, 16) == 93).all()
    stripes = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    stripes[..., ::2] = 255  # finer than the new grid: without antialiasing columns would come out black or white
    middle = resize(stripes, 14)[..., 3:-3, 3:-3].float()
    assert middle.min() > 100 and middle.max() < 155
    assert resize(grey, 28) is grey


def test_draws_are_uniform_independent_and_known():
    u = draws.uniform(0, "flip", 0, np.arange(20_000), 4)
    assert stats.kstest(u.ravel(), "uniform").pvalue > 1e-3
    assert np.abs(np.corrcoef(u.T)[np.triu_indices(4, 1)]).max() < 0.03
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.03
    # Changing these numbers changes every run: raise TRAINING_VERSION with them.
    assert draws.uniform(7, "flip", 2, np.array([5]), 2).tolist() == KNOWN


KNOWN = [[0.05499559116685515, 0.9555510132447048]]


def test_subsets_are_balanced_nested_and_the_same_for_every_arm(fashion):
    small, large = subset(fashion, 200, 3), subset(fashion, 500, 3)
    assert set(small) < set(large)
    assert torch.bincount(fashion.labels[torch.from_numpy(large)]).tolist() == [50] * 10
    assert np.array_equal(large, subset(fashion, 500, 3)) and not np.array_equal(large, subset(fashion, 500, 4))
    with pytest.raises(UsageError, match="multiples of 10 from 10 to 2000"):
        subset(fashion, 123, 0)


def test_an_image_is_drawn_alike_whatever_batch_it_is_in(fashion):
    rows = np.arange(100)

    def by_image(batch_size: int, rows: np.ndarray) -> dict:
        batches = fashion.epoch_batches(rows, 5, 1, recipe(batch_size, mixup=0.4))
        return {i: (x, t) for b in batches for i, x, t in zip(b.index, b.images, b.targets, strict=True)}

    whole, split = by_image(100, rows), by_image(7, rows)
    assert all(torch.equal(whole[i][0], split[i][0]) and torch.equal(whole[i][1], split[i][1]) for i in rows)


def test_an_epoch_has_every_image_once_in_an_order_of_its_own(fashion):
    rows = subset(fashion, 200, 0)

    def seen(epoch: int, seed: int = 0) -> np.ndarray:
        return np.concatenate([b.index for b in fashion.epoch_batches(rows, seed, epoch, recipe(32))])

    assert sorted(seen(0)) == sorted(rows) and len(seen(0)) == 200
    assert not np.array_equal(seen(0), seen(1)) and not np.array_equal(seen(0), seen(0, seed=1))


def test_half_of_the_images_are_mirrored_and_targets_stay_shares(fashion):
    flipped = np.concatenate([b.flipped for b in fashion.epoch_batches(np.arange(2000), 0, 0, recipe(100))])
    assert 0.45 < flipped.mean() < 0.55
    plain = next(fashion.epoch_batches(np.arange(50), 0, 0, recipe(50, flip=False)))
    assert not plain.flipped.any()
    mixed = next(fashion.epoch_batches(np.arange(50), 0, 0, recipe(50, mixup=0.4)))
    assert torch.allclose(mixed.targets.sum(1), torch.ones(50)) and (mixed.targets > 0).sum(1).max() == 2


# ------------------------------------------------------------------------------------------------- views of an image


WRONG = {
    "policy": "rand-7", "interpolation": "cubic", "crop_scale": (0.5, 0.1), "test_crop": 0, "erasing": 2, "color_jitter": -1,
    "view_size": 0,
}  # fmt: skip


@pytest.mark.parametrize("field", WRONG)
def test_an_augmentation_that_does_not_exist_is_refused(field):
    with pytest.raises(UsageError, match=str(field) if field != "policy" else "policy 'rand-7'"):
        Augment(**{field: WRONG[field]})


def viewed(chosen, image=None, flipped=False, key=5, size=16):
    zero, one = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return augment.TrainView(chosen, size, zero, one)(image or picture(3, (60, 50)), flipped, key)


def generators() -> list:
    """The state of every global generator on the CPU."""
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]  # noqa: NPY002


def test_a_view_is_a_function_of_its_key_and_leaves_the_generators_alone():
    first, small = viewed(WILD)
    random.seed(1), torch.manual_seed(1), np.random.seed(1)  # noqa: NPY002
    before = generators()
    again, small_again = viewed(WILD)
    assert generators() == before
    assert torch.equal(first, again) and torch.equal(small, small_again)
    assert all(not torch.equal(first, viewed(WILD, key=key)[0]) for key in range(3))


def test_a_flipped_view_is_the_mirror_image_of_the_same_crop():
    plain, flipped = viewed(Augment(view_size=8)), viewed(Augment(view_size=8), flipped=True)
    assert torch.equal(plain[0].flip(-1), flipped[0]) and torch.equal(plain[1].flip(-1), flipped[1])


def test_the_tokenizers_view_is_the_same_crop_in_lanczos():
    """With the whole image as the crop there is nothing random left."""
    whole = picture(3, (48, 48))
    chosen = Augment(crop_scale=(1.0, 1.0), view_size=8, color_jitter=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augment, "ASPECT", (1.0, 1.0))
        image, view = viewed(chosen, whole)
    lanczos = np.asarray(whole.resize((8, 8), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    bicubic = np.asarray(whole.resize((16, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert view.dtype == torch.uint8 and (view.numpy() == lanczos).all()
    assert (image * 255).round().to(torch.uint8).numpy().tolist() == bicubic.tolist()


def test_both_views_get_the_same_colours():
    grey = Image.new("RGB", (40, 40), (90, 120, 150))
    for key in range(5):
        image, view = viewed(Augment(color_jitter=0.4, view_size=8), grey, key=key)
        assert (image * 255).round()[:, 0, 0].tolist() == view[:, 0, 0].tolist() != [90, 120, 150]


def test_crops_cover_the_share_of_the_image_that_is_asked_for():
    ramp = Image.fromarray(np.broadcast_to(np.arange(100, dtype=np.uint8)[:, None, None] * 2, (100, 100, 3)).copy())
    spans = [viewed(Augment(crop_scale=(0.09, 0.09)), ramp, key=key)[0][0] * 255 / 2 for key in range(20)]
    spans = [float(span.max() - span.min()) for span in spans]
    assert 22 < min(spans) and max(spans) < 35  # a side of 30 with an aspect of 3/4 to 4/3, less a pixel at each end
    assert len({round(span) for span in spans}) > 3


def test_three_augment_is_one_of_grey_solarized_and_blurred():
    image = picture(3, (16, 16))
    chosen = Augment(policy="3-augment", crop_scale=(1.0, 1.0))
    grey, solar = (np.asarray(op(image)) for op in (lambda i: ImageOps.grayscale(i).convert("RGB"), ImageOps.solarize))
    kinds = {"grey": 0, "solarized": 0, "blurred": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augment, "ASPECT", (1.0, 1.0))
        for key in range(60):
            pixels = (viewed(chosen, image, key=key)[0] * 255).round().numpy().transpose(1, 2, 0)
            strongest = np.asarray(image.filter(ImageFilter.GaussianBlur(2))).std()
            if np.abs(pixels - grey).max() <= 1:
                kinds["grey"] += 1
            elif (pixels == solar).all():
                kinds["solarized"] += 1
            else:
                kinds["blurred"] += strongest - 1 <= pixels.std() <= np.asarray(image).std() + 1
    assert sum(kinds.values()) == 60 and min(kinds.values()) >= 10


def test_erasing_and_rand_augment_change_about_as_many_views_as_asked():
    grey = Image.new("RGB", (40, 40), (90, 120, 150))
    erased = sum(viewed(Augment(erasing=0.25), grey, key=k)[0][0].unique().numel() > 1 for k in range(200))
    assert 30 <= erased <= 70
    changed = sum(
        viewed(Augment(policy="rand-m7-mstd0.5-inc1"), grey, key=k)[0].unique().numel() != 3 for k in range(50)
    )
    assert changed > 10


@pytest.mark.parametrize(("size", "crop", "resized"), [(224, 0.95, 236), (224, 0.875, 256), (384, 1.0, 384)])
def test_the_test_view_is_the_middle_of_the_resized_image(size, crop, resized):
    image = picture(3, (500, 400))
    view, none = augment.TestView(Augment(test_crop=crop), size, (0.0,) * 3, (1.0,) * 3)(image, False, 0)
    small = image.resize((int(resized * 500 / 400), resized), Image.Resampling.BICUBIC)
    left, top = round((small.width - size) / 2), round((small.height - size) / 2)
    middle = np.asarray(small.crop((left, top, left + size, top + size))).transpose(2, 0, 1)
    assert none is None and (view * 255).round().to(torch.uint8).numpy().tolist() == middle.tolist()


def test_images_are_normalised_with_imagenets_statistics(opened):
    data = opened()
    assert data.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert data.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
    plain = opened(mean=(0.0,) * 3, std=(1.0,) * 3)
    ours, theirs = (next(d.evaluation_batches(7)).images for d in (data, plain))
    assert torch.allclose(ours * data.std + data.mean, theirs, atol=1e-6) and 0 <= theirs.min() < theirs.max() <= 1


# ------------------------------------------------------------------------------------------------- batches of what is streamed


def whole(batches, field="images"):
    return torch.cat([getattr(b, field) for b in batches])


EVERYTHING = {"augment": WILD, "mixup": 0.8, "cutmix": 1.0, "repeats": 3}


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_no_bit(opened, workers):
    data = opened()
    here = list(data.epoch_batches(np.arange(7), 3, 1, recipe(4, **EVERYTHING)))
    elsewhere = replace(data, workers=workers)
    there = list(elsewhere.epoch_batches(np.arange(7), 3, 1, recipe(4, **EVERYTHING)))
    for field in ("images", "targets", "view", "flipped"):
        assert torch.equal(whole(here, field), whole(there, field))
    assert [b.index.tolist() for b in here] == [b.index.tolist() for b in there]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("batch_size", [5, 6, 7])
def test_the_parts_of_all_ranks_make_the_global_batch_bit_for_bit(opened, world, batch_size):
    data = opened()
    alone = list(data.epoch_batches(np.arange(7), 3, 1, recipe(batch_size, **EVERYTHING)))
    ranks = [
        list(data.epoch_batches(np.arange(7), 3, 1, recipe(batch_size, **EVERYTHING), shard=Shard(rank, world)))
        for rank in range(world)
    ]
    for number, batch in enumerate(alone):
        parts = [rank[number] for rank in ranks]
        assert sum(part.weight for part in parts) == pytest.approx(world)
        parts = [part for part in parts if part.weight]  # a rank without an image of its own repeats the first
        for field in ("images", "targets", "view", "flipped"):
            assert torch.equal(whole(parts, field), getattr(batch, field))
        assert np.concatenate([part.index for part in parts]).tolist() == batch.index.tolist()
        mean = sum(part.weight * part.images.double().mean() for part in parts) / world
        assert mean.item() == pytest.approx(batch.images.double().mean().item(), abs=1e-12)


def test_the_ranks_share_an_evaluation_without_repeating_an_image(opened):
    data = opened()
    parts = [list(data.evaluation_batches(2, Shard(rank, 9))) for rank in range(9)]
    index = [b.index for part in parts for b in part]
    assert np.concatenate(index).tolist() == list(range(7))


def test_skipped_batches_are_not_decoded_and_the_rest_is_the_same(opened, monkeypatch):
    data = opened()
    full = list(data.epoch_batches(np.arange(7), 0, 2, recipe(3, **EVERYTHING)))
    decoded, decode = [], stream.decode
    monkeypatch.setattr(stream, "decode", lambda rows, i: (decoded.append(i), decode(rows, i))[1])
    rest = list(data.epoch_batches(np.arange(7), 0, 2, recipe(3, **EVERYTHING), skip=2))
    assert len(rest) == 1 and torch.equal(rest[0].images, full[2].images) and len(decoded) == 1


def test_a_sample_depends_on_seed_epoch_image_and_repeat_and_on_nothing_else(opened):
    data = opened()

    def samples(rows, seed, epoch, batch_size, **options):
        batches = list(
            data.epoch_batches(np.asarray(rows), seed, epoch, recipe(batch_size, augment=Augment(), **options))
        )
        return {int(i): image for b in batches for i, image in zip(b.index, b.images, strict=True)}

    first = samples(range(7), 0, 0, 7)
    for other in (samples(range(7), 0, 0, 2), samples([1, 4, 6], 0, 0, 3)):
        assert all(torch.equal(first[i], other[i]) for i in other)
    for other in (samples(range(7), 1, 0, 7), samples(range(7), 0, 1, 7)):
        assert not any(torch.equal(first[i], other[i]) for i in other)
    repeated = samples(range(7), 0, 0, 7, repeats=3)
    assert len(repeated) == 7 and all(torch.equal(first[i], repeated[i]) for i in repeated if i < 7)
    view = {i % 7: [repeated[j] for j in repeated if j % 7 == i % 7] for i in repeated}
    assert all(not torch.equal(v[0], v[1]) for v in view.values() if len(v) > 1)


def test_loading_leaves_the_global_generators_alone(opened):
    data, before = opened(), generators()
    list(data.epoch_batches(np.arange(7), 0, 0, recipe(4, **EVERYTHING)))
    assert generators() == before


def test_what_is_flipped_is_reported_and_is_half(opened):
    data = opened()
    (batch,) = data.epoch_batches(np.arange(7), 0, 0, recipe(7, flip=False))
    plain = dict(zip(batch.index.tolist(), batch.images, strict=True))
    count = 0
    for epoch in range(12):
        (batch,) = data.epoch_batches(np.arange(7), 0, epoch, recipe(7))
        for i, image, flipped in zip(batch.index, batch.images, batch.flipped, strict=True):
            assert torch.equal(image, plain[int(i)].flip(-1) if flipped else plain[int(i)])
            count += bool(flipped)
    assert 28 <= count <= 56


@pytest.mark.parametrize("images_", [1, 2, 7, 100, 255, 256, 1000])
@pytest.mark.parametrize("repeats", [1, 3])
def test_repeated_augmentation_keeps_as_many_samples_as_there_are_images(images_, repeats):
    rows = np.arange(images_) * 2  # a part of a split of twice the size
    order = epoch_order(2 * images_, rows, seed=0, epoch=0, repeats=repeats)
    image, repeat = order % (2 * images_), order // (2 * images_)
    assert len(order) == len(set(order)) == images_ and set(image) <= set(rows)
    counts = np.unique(image, return_counts=True)[1]
    assert len(counts) == -(-images_ // repeats) and sorted(counts)[1:] == [repeats] * (len(counts) - 1)
    assert set(repeat) <= set(range(repeats))


def test_the_order_depends_on_seed_and_epoch():
    rows = np.arange(300)
    orders = [epoch_order(300, rows, seed, epoch, 3).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4 and orders[0] == epoch_order(300, rows, 0, 0, 3).tolist()


def test_the_views_of_an_image_share_a_batch_and_are_not_mixed_with_each_other(opened):
    data = opened()
    order = epoch_order(7, np.arange(7), 0, 0, 3)
    batches = stream.Batches(data, np.arange(21).reshape(3, 7).T.reshape(-1), 21, data.view(None))
    numbers = batches.numbers(0)
    assert sorted(numbers) == list(range(21)) and all(a % 7 != b % 7 for a, b in numbers[:20].reshape(-1, 2))
    assert len(order) == 7


def test_pairs_are_mixed_with_each_other_and_an_odd_image_stays_as_it_is(opened):
    data = opened()
    options = {"augment": None, "flip": False}
    (plain,) = data.epoch_batches(np.arange(7), 0, 2, recipe(7, **options))
    assert plain.targets.tolist() == [0, 0, 2, 1, 0, 2, 1]  # pairs of one class and of two
    one_hot = torch.nn.functional.one_hot(plain.targets, 3).float()
    for mixing in ({"mixup": 1.0}, {"cutmix": 1.0}):
        (mixed,) = data.epoch_batches(np.arange(7), 0, 2, recipe(7, **options, **mixing))
        assert mixed.targets.shape == (7, 3) and torch.allclose(mixed.targets.sum(1), torch.ones(7))
        assert torch.equal(mixed.images[6], plain.images[6]) and torch.equal(mixed.targets[6], one_hot[6])
        for k in (0, 2, 4):
            (a, b), (x, y) = plain.images[k : k + 2], mixed.images[k : k + 2]
            assert torch.allclose(x + y, a + b, atol=1e-5)  # what one gives the other has
            share = share_of(x, a, b, "mixup" in mixing)
            expected = share * one_hot[k] + (1 - share) * one_hot[k + 1]
            assert torch.allclose(mixed.targets[k], expected, atol=1e-4)
            assert torch.allclose(mixed.targets[k + 1], one_hot[k] + one_hot[k + 1] - expected, atol=1e-4)


def share_of(mixed, own, other, blended: bool) -> float:
    """The weight of `own`, read from the pixels; under cutmix each pixel is one of the two."""
    if blended:
        return float(((mixed - other) * (own - other)).sum() / (own - other).square().sum())
    is_own = (mixed == own).all(0)
    assert (is_own | (mixed == other).all(0)).all()
    return float(is_own.float().mean())


def test_with_both_switched_on_half_of_the_pairs_are_cut_and_weights_are_betas():
    pair = torch.stack([torch.zeros(3, 16, 16), torch.ones(3, 16, 16)])
    cut, shares = 0, []
    for key in range(300):
        with augment.own_draws(key):
            mixed, share = mix_pair(pair, 0.8, 1.0)
        is_cut = set(mixed[0].unique().tolist()) <= {0.0, 1.0}
        cut += is_cut
        assert share == pytest.approx(1 - mixed[0].mean().item(), abs=1e-5)
        shares += [] if is_cut else [share]
    assert 120 <= cut <= 180
    assert np.mean(shares) == pytest.approx(0.5, abs=0.08) and np.var(shares) == pytest.approx(0.25 / 2.6, abs=0.02)


@pytest.mark.parametrize("gpu", [False, True])
def test_batches_wait_in_pinned_memory_where_they_go_to_a_gpu(opened, monkeypatch, gpu):
    """Without a GPU there is no such memory: what is asked for is counted."""
    asked, pinned = [], []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: gpu)
    loader = stream.DataLoader
    monkeypatch.setattr(
        stream, "DataLoader", lambda *a, pin_memory, **k: (asked.append(pin_memory), loader(*a, **k))[1]
    )
    (batch,) = opened().epoch_batches(np.arange(7), 0, 0, recipe(7, augment=WILD))
    assert asked == [gpu]
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: (pinned.append(tensor.shape), tensor)[1])
    again = torch.utils.data._utils.pin_memory.pin_memory(batch)  # what the loader does with a batch
    assert set(pinned) == {batch.images.shape, batch.targets.shape, batch.view.shape} and again.index is batch.index


def test_both_kinds_of_data_have_the_same_methods_and_say_what_only_one_can_do(root, opened):
    data = opened()
    batches = list(data.epoch_batches(np.arange(7), 0, 0, recipe(4, augment=Augment(view_size=8))))
    assert [b.view.shape for b in batches] == [(4, 3, 8, 8), (3, 3, 8, 8)]
    assert len(list(data.evaluation_batches(4))) == 2
    assert subset(data, 3, seed=0).tolist() == sorted(subset(data, 3, seed=0)) and len(subset(data, 6, 0)) == 6
    held = open_folder(root / "birds", "test", 16)
    assert (held.streamed, data.streamed) == (False, True) and held.pixels().shape == (3, 3, 16, 16)
    assert {"channels", "image_size", "classes", "mean", "std", "checksum", "labels"} <= set(dir(held)) & set(dir(data))
    with pytest.raises(UsageError, match="birds is streamed, not held in memory"):
        data.pixels()
    for change in ({"augment": Augment()}, {"cutmix": 1.0}, {"repeats": 3}):
        with pytest.raises(UsageError, match="birds is held in memory"):
            held.epoch_batches(np.arange(3), 0, 0, recipe(3, **change))


@pytest.mark.parametrize("name", ["birds", "parquet"])
def test_images_can_be_held_out_of_a_split(opened, name):
    data = opened(name)
    (batch,) = data.take([5, 0]).evaluation_batches(4)
    (all_of_them,) = data.evaluation_batches(7)
    assert batch.targets.tolist() == [2, 0] and torch.equal(batch.images, all_of_them.images[[5, 0]])


# ------------------------------------------------------------------------------------------------- tokenizers


def test_fresh_tokens_are_those_of_the_view_or_of_the_images_themselves(opened):
    data = opened()
    tokenizer = DVAE(DVAEConfig(image_size=8, patch_size=4, in_chans=3, vocabulary=16, width=8)).eval()
    targets = tokenizers.make_targets("dvae", data, 8, 0, tokenizer)
    (batch,) = data.epoch_batches(np.arange(7), 0, 0, recipe(7, augment=Augment(view_size=8)))
    tokens = targets(batch)
    assert tokens.shape == (7, 4) and torch.equal(tokens, tokenizer.look_up(batch.view, data)) and targets.outputs == 16
    seen = []
    targets.tokenizer = SimpleNamespace(look_up=lambda pixels, data: seen.append(pixels))
    targets(replace(batch, view=None))
    exact = (batch.images * data.std + data.mean) * 255
    assert (
        seen[0].dtype == torch.uint8 and (seen[0] - exact).abs().max() < 0.01
    )  # no pixel is cut down to the one below


@pytest.mark.parametrize("kind", ["dvae", "pixels"])
def test_masked_pre_training_from_files(opened, kind):
    data = opened()
    tokenizer = DVAE(DVAEConfig(image_size=16, patch_size=4, in_chans=3, vocabulary=16, width=8)).eval()
    targets = tokenizers.make_targets(kind, data, 4, 0, tokenizer)
    model = MaskedViT(vit_config("W32-1x1/4", image_size=16, in_chans=3, num_classes=0), targets.outputs)
    history = loop.train(model, recipe(4), data, np.arange(7), 0, MaskedLoss(targets, 0, 6))
    assert len(history) == 2
    with pytest.raises(UsageError, match="'tokens' need images in memory"):
        tokenizers.make_targets("tokens", data, 4, 0)


# ------------------------------------------------------------------------------------------------- folders of one's own


def refusal(folder, split="train", **options) -> str:
    with pytest.raises(UsageError) as refused:
        open_folder(folder, split, 16, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("name", ["birds", "parquet"])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_folder_without_an_entry_anywhere_is_a_data_set(root, name, streamed):
    """Of each class the last tenth, here one image, validates."""
    train, held, test = (open_folder(root / name, s, 16, streamed=streamed) for s in ("train", "validation", "test"))
    assert train.labels.tolist() == [0, 0, 1, 2] and held.labels.tolist() == test.labels.tolist() == [0, 1, 2]
    assert (train.name, train.split, train.channels, train.image_size, len(train.classes)) == (name, "train", 3, 16, 3)
    batch = next(test.evaluation_batches(3))
    assert batch.images.shape == (3, 3, 16, 16) and batch.targets.tolist() == [0, 1, 2]
    model = ViT(vit_config("W32-1x1/8", image_size=16, in_chans=3, num_classes=3))
    history = loop.train(model, recipe(2), train, np.arange(4), 0, loss_of(recipe(2)))
    assert [step.step for step in history] == [1, 2] and np.isfinite(evaluate(model, held)[0]["loss"])


def test_a_small_folder_is_held_in_memory_and_a_large_one_streamed(root, monkeypatch):
    assert not open_folder(root / "birds", "test", 16).streamed
    monkeypatch.setattr("vitlib.data.HELD", 3 * 3 * 16 * 16 - 1)
    assert open_folder(root / "birds", "test", 16).streamed and not open_folder(root / "birds", "test", 15).streamed


def test_a_split_that_a_folder_lacks_is_found_in_another(tmp_path):
    def labels(name, split):
        return read.read_split(tmp_path / name, split).labels.tolist()

    class_folders(tmp_path / "no test", test="val")
    assert labels("no test", "test") == TEST and labels("no test", "validation") == TEST
    assert labels("no test", "train") == [0, 0, 1, 2]  # val is the test split, so that validation is held out
    class_folders(class_folders(tmp_path / "three", test="val"), test="test")
    assert labels("three", "train") == TRAIN and labels("three", "validation") == TEST
    for i, name in enumerate(("cat", "cat", "dog", "dog")):
        write(tmp_path / "flat" / name / f"{i}.jpg", i)
    assert labels("flat", "train") == labels("flat", "validation") == [0, 1]
    assert "has no split 'test'" in refusal(tmp_path / "flat", "test")


def test_a_class_of_one_image_is_not_held_out_as_a_whole(tmp_path):
    for i, name in enumerate(("cat", "cat", "dog")):
        write(tmp_path / "train" / name / f"{i}.jpg", i)
    for split in ("train", "validation"):
        assert "has one training image of class dog" in refusal(tmp_path, split)
    write(tmp_path / "train" / "dog" / "4.jpg", 4)
    assert open_folder(tmp_path, "train", 16).labels.tolist() == [0, 1]


def test_classes_in_another_order_are_refused(tmp_path):
    write(tmp_path / "test" / "cat" / "0.jpg", 0)
    write(tmp_path / "test" / "dog" / "1.jpg", 1)
    named(table(tmp_path / "train.parquet", [0, 1]), ["dog", "cat"])
    assert "the classes of test and train differ in their order" in refusal(tmp_path, "test")
    named(tmp_path / "train.parquet", ["cat", "dog"])
    assert read_folder(tmp_path, "test").classes == ("cat", "dog")


def named(path, names):
    """The names of the classes, as `datasets` writes them into a parquet file."""
    features = {"label": {"names": names, "_type": "ClassLabel"}}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pq.read_table(path).replace_schema_metadata(about), path)


def test_images_of_all_sizes_and_modes_are_held_in_colour_at_one_size(tmp_path):
    place, plain = tmp_path / "train" / "cat", picture(3, (32, 24))
    place.mkdir(parents=True)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        plain.convert(mode).save(place / f"{mode}.png")
    plain.convert("CMYK").save(place / "CMYK.jpg")
    deep = np.asarray(plain.convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(place / "deep.png")
    picture(1, (300, 7)).save(place / "long.png")
    picture(2, (1, 1)).save(place / "tiny.png")
    names = [os.path.basename(name) for name in map(read_folder(tmp_path, "train").rows.name, range(10))]
    pixels = dict(zip(names, read_all(tmp_path), strict=True))
    assert all(image.shape == (3, 16, 16) for image in pixels.values())
    middle = resize(pil_to_tensor(plain)[None, :, :, 4:28], 16)[0]
    assert torch.equal(pixels["RGB.png"], middle) and torch.equal(pixels["RGBA.png"], middle)
    assert torch.equal(pixels["deep.png"], pixels["L.png"]) and torch.equal(pixels["LA.png"], pixels["L.png"])


def read_all(folder):
    """Every training image, held out or not."""
    found = read_folder(folder, "train")
    return torch.stack([middle(pil_to_tensor(read.decode(found.rows, i)), 16) for i in range(len(found.labels))])


def test_a_photograph_that_was_stored_sideways_is_read_upright(tmp_path):
    tag, place = Image.Exif(), tmp_path / "train" / "cat"
    tag[read.ORIENTATION] = 6
    place.mkdir(parents=True)
    picture(1, (64, 32)).save(place / "phone.jpg", exif=tag)
    rows = read_folder(tmp_path, "train").rows
    upright = read.decode(rows, 0)
    assert upright.size == (32, 64)
    assert np.array_equal(upright, np.rot90(np.asarray(Image.open(place / "phone.jpg")), -1))


def test_hidden_files_and_what_disks_and_archives_add_are_no_images(tmp_path):
    place = class_folders(tmp_path) / "train"
    write(place / "n01" / ".ipynb_checkpoints" / "000-checkpoint.JPEG", 0)
    (place / "n02" / "._003.JPEG").write_bytes(b"\x00\x05\x16\x07 Mac OS X")
    for extra in ("@eaDir", "__MACOSX", ".cache"):
        (place / extra).mkdir()
    found = read_folder(tmp_path, "train")
    assert found.labels.tolist() == TRAIN and found.classes == ("n01", "n02", "n03")


def test_linked_folders_are_read_and_what_is_hashed_is_what_is_read(tmp_path):
    class_folders(tmp_path / "elsewhere")
    (tmp_path / "linked").mkdir()
    for split in ("train", "val"):
        (tmp_path / "linked" / split).symlink_to(tmp_path / "elsewhere" / split)
    (tmp_path / "elsewhere" / "train" / "n01" / "again").symlink_to(tmp_path / "elsewhere" / "train" / "n01")
    found = read_folder(tmp_path / "linked", "train")
    before = found.checksum()
    assert found.labels.tolist() == TRAIN and before == read_folder(tmp_path / "elsewhere", "train").checksum()
    write(tmp_path / "elsewhere" / "train" / "n01" / "000.JPEG", 77)
    assert read_folder(tmp_path / "linked", "train").checksum() != before


def test_names_that_are_not_utf8_are_read_and_printed_and_unicode_has_one_form(tmp_path):
    place = class_folders(tmp_path, ("n01", "n02", "caf\u00e9")) / "train"
    os.rename(place / "n01" / "000.JPEG", os.fsencode(place / "n01") + b"/caf\xe9.JPEG")
    os.rename(tmp_path / "val" / "caf\u00e9", tmp_path / "val" / "cafe\u0301")
    found = read_folder(tmp_path, "train")
    names = [found.rows.name(i) for i in range(7)]
    assert len(found.checksum()) == 16 and any(name.endswith("caf\\xe9.JPEG") for name in names)
    assert all(read.decode(found.rows, i).size == (24, 20) for i in range(7))
    assert read_folder(tmp_path, "validation").classes == found.classes == ("caf\u00e9", "n01", "n02")


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    write(write(tmp_path / "train" / "cat" / "0.png", 0).with_name("1.png"), 1)
    monkeypatch.setattr(read, "MAX_PIXELS", 24 * 20 - 1)
    assert "1.png has 480 pixels: allowed are at most 479" in refusal(tmp_path, "validation")


def test_a_thin_image_costs_no_more_than_its_crop(tmp_path):
    """Enlarged as a whole, 1 x 20,000 pixels would be a picture of 236 x 4,720,000."""
    Image.fromarray(np.zeros((1, 20_000, 3), np.uint8)).save(tmp_path / "line.png")
    with pytest.MonkeyPatch.context() as patch:
        sizes, resized = [], augment.F.resize
        patch.setattr(augment.F, "resize", lambda image, *to: sizes.append(image.size) or resized(image, *to))
        view = augment.TestView(Augment(), 224, (0.0,) * 3, (1.0,) * 3)
        assert view(Image.open(tmp_path / "line.png"), False, 0)[0].shape == (3, 224, 224)
    assert sizes == [(augment.THIN, 1)]
    ramp = Image.fromarray(np.linspace(0, 255, 400).astype(np.uint8)[None, :, None].repeat(12, 0).repeat(3, 2))
    with pytest.MonkeyPatch.context() as patch:
        cropped = augment.TestView(Augment(), 16, (0.0,) * 3, (1.0,) * 3)(ramp, False, 0)[0]
        patch.setattr(augment, "THIN", 1000)
        whole = augment.TestView(Augment(), 16, (0.0,) * 3, (1.0,) * 3)(ramp, False, 0)[0]
    assert torch.allclose(cropped, whole, atol=0.01)  # the same middle


LABELS = {
    "a null": ([0, 1, None], "1 empty cells"),
    "an unlabelled row": ([0, 1, -1], "holds -1 to 1"),
    "text": (["cat", "dog", "cat"], "cells of type string"),
    "fractions": ([0.0, 1.5, 1.0], "cells of type double"),
    "counted from 1": ([1, 2, 2], "holds 1 to 2"),
    "nothing": ([], "holds nothing"),
}


@pytest.mark.parametrize("what", LABELS)
def test_labels_that_are_no_numbers_from_0_are_refused_with_what_is_allowed(tmp_path, what):
    labels, said = LABELS[what]
    table(tmp_path / "train.parquet", labels)
    assert said in (sentence := refusal(tmp_path)) and "from 0" in sentence and "column label" in sentence


def test_class_names_are_in_the_table_or_those_of_the_training_images(tmp_path):
    parquet(tmp_path / "a", splits=(("train", [0, 1, 2]), ("test", [0, 1, 1])))
    assert read_folder(tmp_path / "a", "test").classes == ("0", "1", "2")
    named(table(tmp_path / "b" / "train.parquet", [0, 1]), ["cat", "dog", "owl"])
    assert read_folder(tmp_path / "b", "train").classes == ("cat", "dog", "owl")
    table(tmp_path / "b" / "test.parquet", [2, 3])
    assert "holds 2 to 3, with 3 classes" in refusal(tmp_path / "b", "test")


@pytest.mark.parametrize("names", [
    ("default/train-00000-of-00001", "small/train-00000-of-00001"), ("train", "train-00000-of-00001"),
    ("train", "data/train"),
])  # fmt: skip
def test_two_configurations_or_copies_in_one_folder_are_refused(tmp_path, names):
    for name in names:
        table(tmp_path / f"{name}.parquet", [0, 1])
    said = refusal(tmp_path)
    assert "has train more than once" in said and all(f"{name}.parquet" in said for name in names)


def test_a_shard_that_is_missing_is_noticed(tmp_path):
    parquet(tmp_path, shards=3)
    (tmp_path / "data" / "train-00001-of-00003.parquet").unlink()
    assert "2 of the 3 files of train" in refusal(tmp_path)


def test_a_table_that_names_a_file_instead_of_holding_an_image_is_refused(tmp_path):
    (tmp_path / "pets").mkdir()
    write(tmp_path / "secret.png", 0)
    cells = [{"bytes": b"", "path": ""}, {"bytes": None, "path": "../secret.png"}]
    pq.write_table(pa.table({"image": cells, "label": [0, 0]}), tmp_path / "pets" / "train.parquet")
    assert (
        "row 1 of" in (said := refusal(tmp_path / "pets", "validation")) and "names a file and holds no image" in said
    )


@pytest.mark.parametrize("path", ["../secret.png", "cat/../../secret.png", "/etc/secret.png"])
def test_a_list_of_images_does_not_lead_out_of_its_folder(tmp_path, path):
    with pytest.raises(UsageError, match=f"names {path}: allowed are files in"):
        read.files(tmp_path, ["cat/0.png", path], [0, 0], ["cat"])


def test_large_tables_are_mapped_from_a_copy_that_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    parquet(tmp_path / "a")
    held = read_folder(tmp_path / "a", "train")
    pixels = [np.asarray(read.decode(held.rows, i)) for i in range(7)]
    monkeypatch.setattr(read, "IN_MEMORY", 0)
    read._cells.cache_clear()
    mapped = read_folder(tmp_path / "a", "train")
    assert mapped.checksum() == held.checksum()
    assert all(np.array_equal(read.decode(mapped.rows, i), pixels[i]) for i in range(7))
    (copy,) = (tmp_path / "cache" / "vitlib").iterdir()
    before = copy.stat().st_mtime_ns
    read._cells.cache_clear()
    assert read.decode(mapped.rows, 6).size == (24, 20) and copy.stat().st_mtime_ns == before
    read._cells.cache_clear()


def test_numbered_class_folders_count_in_the_order_of_their_numbers(tmp_path):
    class_folders(tmp_path / "numbers", ("1", "2", "10"))
    assert read_folder(tmp_path / "numbers", "train").classes == ("1", "2", "10")


def test_sizes_of_files_are_asked_for_once_and_only_for_the_checksum(opened, monkeypatch):
    asked, listing = [], read.Files.listing
    monkeypatch.setattr(read.Files, "listing", lambda files: (asked.append(len(files)), listing(files))[1])
    data = opened()
    assert len(list(data.epoch_batches(np.arange(7), 0, 0, recipe(4)))) == 2 and not asked
    assert data.checksum == data.checksum and asked == [7]
    assert data.take([0, 1]).checksum != data.checksum and asked == [7, 2]


def test_a_missing_split_or_folder_says_what_is_there(root, tmp_path):
    assert "has no split 'extra'" in (said := refusal(root / "birds", "extra")) and "it holds test, train" in said
    assert "has no split 'extra'" in refusal(root / "parquet", "extra")
    assert f"there is no folder {root / 'owls'}" in refusal(root / "owls")
    (tmp_path / "notes.txt").write_text("")
    assert "it holds notes.txt" in refusal(tmp_path)
    (tmp_path / "train").mkdir()
    assert "class folders" in refusal(tmp_path)


def test_an_empty_class_folder_is_named(tmp_path):
    class_folders(tmp_path / "birds")
    (tmp_path / "birds" / "train" / "n04").mkdir()
    assert "1 of 4 class folders" in (said := refusal(tmp_path / "birds")) and "n04" in said


def test_splits_with_other_class_folders_are_refused(tmp_path):
    class_folders(tmp_path / "birds")
    write(tmp_path / "birds" / "train" / "n015" / "a.jpg", 0)
    assert "differ in 1 names, the first is n015" in refusal(tmp_path / "birds", split="val")


def test_a_damaged_table_and_one_without_images_are_named(tmp_path):
    table(tmp_path / "train.parquet", [0], image="picture")
    assert "has the columns picture, label" in refusal(tmp_path)
    (tmp_path / "train.parquet").write_bytes(b"PAR1 no")
    assert "train.parquet is damaged" in refusal(tmp_path)


@pytest.fixture
def damaged(tmp_path):
    """A folder with its three splits; of seven training images one is cut off and one no image at all."""
    class_folders(class_folders(tmp_path / "birds"), test="test")
    cut = tmp_path / "birds" / "train" / "n01" / "001.JPEG"
    cut.write_bytes(cut.read_bytes()[:-200])
    (tmp_path / "birds" / "train" / "n03" / "006.JPEG").write_bytes(b"not an image")
    return tmp_path / "birds"


def test_where_shared_memory_is_small_images_are_read_in_this_process_and_the_numbers_stay(opened, monkeypatch):
    alone = opened()
    data, rows = replace(alone, workers=2), np.arange(len(alone))
    expected = [batch.images for batch in alone.epoch_batches(rows, 0, 0, recipe(4))]
    monkeypatch.setattr(stream, "SHARED", "/")
    monkeypatch.setattr(stream.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**10))
    with pytest.warns(UserWarning, match="shm-size"):
        seen = [batch.images for batch in data.epoch_batches(rows, 0, 0, recipe(4))]
    assert all(map(torch.equal, seen, expected)) and len(seen) == len(expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_stops_the_epoch_and_is_named(damaged, workers):
    data = open_folder(damaged, "train", 16, streamed=True, workers=workers)
    with pytest.raises(UsageError, match=r"^\S*n01/001.JPEG cannot be read \(OSError\): [^\n]*$"):
        list(data.evaluation_batches(4))
    with pytest.raises(UsageError, match=r"^\S*n01/001.JPEG cannot be read"):
        open_folder(damaged, "train", 16)


def test_the_checksum_knows_names_sizes_and_labels_and_not_the_order_of_shards(tmp_path):
    def checksum(name):
        return read_folder(tmp_path / name, "train").checksum()

    class_folders(tmp_path / "a")
    class_folders(tmp_path / "b")
    assert checksum("a") == checksum("b")
    file = tmp_path / "b" / "train" / "n01" / "000.JPEG"
    file.write_bytes(file.read_bytes() + b"x")
    assert checksum("a") != (longer := checksum("b"))
    (tmp_path / "b" / "train" / "n01" / "001.JPEG").rename(tmp_path / "b" / "train" / "n02" / "001.JPEG")
    assert checksum("b") not in (longer, checksum("a"))
    parquet(tmp_path / "c")
    parquet(tmp_path / "d", shards=3)
    parquet(tmp_path / "e", splits=[("train", [*TRAIN[:-1], 0])])
    assert checksum("c") == checksum("d") != checksum("e")


PHOTOGRAPHS = paths.ROOT.parent / "shared" / "data"


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="the photographs of ../shared/data are not here")
def test_photographs_in_parquet_are_a_data_set_of_ones_own():
    data = open_folder(PHOTOGRAPHS / "cifar10", "test", 24, streamed=True)
    assert (len(data), len(data.classes), data.image_size) == (10_000, 10, 24)
    batch = next(data.take(np.arange(16)).evaluation_batches(16))
    assert batch.images.shape == (16, 3, 24, 24) and batch.images.std() > 0.5


def test_labels_that_are_identities_of_images_are_refused_before_a_class_is_made_for_each_number():
    import pyarrow as pa

    from vitlib.data.read import labelled

    with pytest.raises(UsageError, match="0 to 1099511627776"):
        labelled(pa.chunked_array([pa.array([0, 2**40])]), (), "column label of x")


# ---- files from anywhere


def test_a_pipe_is_not_waited_for(tmp_path):
    folder = class_folders(tmp_path / "birds")
    os.mkfifo(folder / "train" / "n01" / "zz.jpg")
    os.mkfifo(folder / "test.parquet")
    found = read_folder(folder, "train")
    with pytest.raises(UsageError, match=r"zz\.jpg cannot be read"):
        read.decode(found.rows, next(i for i in range(len(found.labels)) if "zz" in found.rows.name(i)))
    with pytest.raises(UsageError, match="has no split 'test'"):
        read_folder(folder, "test")


def test_an_image_of_floating_point_pixels_is_named(tmp_path):
    folder = class_folders(tmp_path / "birds")
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(folder / "train" / "n01" / "a.tif")
    found = read_folder(folder, "train")
    with pytest.raises(UsageError, match=r"a\.tif has floating-point pixels: allowed are whole numbers"):
        [read.decode(found.rows, i) for i in range(len(found.labels))]


CELLS = {
    "texts": pa.array(["a.png"]), "numbers": pa.array([5]), "paths": pa.array([{"path": "../x.png"}]),
    "texts in a record": pa.array([{"bytes": "x", "path": "y"}]), "lists": pa.array([[1, 2]]),
}  # fmt: skip


@pytest.mark.parametrize("what", CELLS)
def test_cells_that_are_no_encoded_images_are_refused(what, tmp_path):
    pq.write_table(pa.table({"image": CELLS[what], "label": [0]}), tmp_path / "train.parquet")
    with pytest.raises(UsageError, match=r"column image of .* holds cells of type .*: allowed are encoded images"):
        read_folder(tmp_path, "train")


def columns(*names, cells=None, classes=None):
    """A table of two images; `classes` are written as `datasets` does."""
    given = {"image": pa.array([encoded(1), encoded(2)]), "label": pa.array([0, 1])} | (cells or {})
    about = {"huggingface": json.dumps({"info": {"features": {"label": {"names": classes}}}})} if classes else None
    return pa.Table.from_arrays([given[name] for name in names], names, metadata=about)


BOTH = ("image", "label")
SHARDS = {
    "images twice": ([columns("image", *BOTH)], "has the columns image, image, label: allowed are one of"),
    "labels twice": ([columns(*BOTH, "label")], "has the columns image, label, label: allowed are one of"),
    "classes in another order": ([columns(*BOTH, classes=names) for names in (["a", "b"], ["b", "a"])], "train-1.parquet has other"),
    "labels of another type": ([columns(*BOTH), columns(*BOTH, cells={"label": pa.array(["a", "b"])})], "train-1.parquet has other"),
    "a shard without labels": ([columns(*BOTH), columns("image")], "train-1.parquet has the columns image: allowed are"),
    "two classes of one name": ([columns(*BOTH, classes=["a", "a"])], "and the like are called 'a': allowed is one name each"),
}  # fmt: skip


@pytest.mark.parametrize("what", SHARDS)
def test_shards_whose_labels_could_mean_something_else_are_refused(what, tmp_path):
    tables, said = SHARDS[what]
    for number, whole in enumerate(tables):
        pq.write_table(whole, tmp_path / f"train-{number}.parquet")
    with pytest.raises(UsageError, match=re.escape(said)) as error:
        read_folder(tmp_path, "train")
    assert "\n" not in str(error.value)


def test_class_folders_of_one_name_in_two_unicode_forms_are_refused(tmp_path):
    for number, name in enumerate(("caf\u00e9", "cafe\u0301")):
        write(tmp_path / "train" / name / "0.jpg", number)
    with pytest.raises(UsageError, match="are called 'caf\u00e9': allowed is one name each"):
        read_folder(tmp_path, "train")


@pytest.mark.parametrize("place", ["n02", "n02/below"])
def test_a_folder_that_cannot_be_read_is_named_and_not_left_out(place, tmp_path, monkeypatch):
    """Root may read every folder."""
    write(class_folders(tmp_path) / "train" / "n02" / "below" / "9.jpg", 9)
    scan = os.scandir

    def refuse(path):
        if str(path).endswith(place):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UsageError, match=rf"^folder \S*/{place} cannot be read \(Permission denied\)$"):
        read_folder(tmp_path, "train")


def test_a_link_that_leads_to_itself_is_no_class(tmp_path):
    (class_folders(tmp_path) / "train" / "loop").symlink_to("loop")
    assert read_folder(tmp_path, "train").classes == ("n01", "n02", "n03")


def as_bytes(image, form, **options):
    image.save(file := io.BytesIO(), form, **options)
    return file.getvalue()


ODD_IMAGES = {
    "a program in PostScript": (lambda: as_bytes(picture(1), "EPS"), r"cannot be read \(UnidentifiedImageError\)"),
    "a TIFF without its size": (lambda: as_bytes(picture(1), "TIFF").replace(b"\x00\x01\x04\x00", b"\xff\x01\x04\x00"), "cannot be read"),
    "values of 32 bits": (lambda: as_bytes(Image.new("I", (9, 9), 70_000), "TIFF"), "has values from 70000 to 70000: allowed are 0 to 65535"),
    "values below 0": (lambda: as_bytes(Image.new("I", (9, 9), -1), "TIFF"), "has values from -1 to -1"),
    "a film": (lambda: as_bytes(picture(1), "PNG", save_all=True, append_images=[picture(2)]), "holds 2 images"),
    "nothing": (lambda: b"", "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("what", ODD_IMAGES)
def test_what_is_called_an_image_and_is_none_that_can_be_read_is_named(what, tmp_path):
    make, said = ODD_IMAGES[what]
    (write(tmp_path / "train" / "a" / "x.jpg", 1)).write_bytes(make())
    with pytest.raises(UsageError, match=rf"x\.jpg {said}"):
        read.decode(read_folder(tmp_path, "train").rows, 0)


@pytest.mark.parametrize("fault", ["no folder", "a damaged copy", "no room"])
def test_a_copy_of_large_tables_that_cannot_be_had_is_named(fault, tmp_path, monkeypatch):
    monkeypatch.setattr(read, "IN_MEMORY", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = read_folder(parquet(tmp_path / "a"), "train").rows
    if fault == "no folder":
        (tmp_path / "cache").touch()
    else:
        read.decode(rows, 0)
        (copy,) = (tmp_path / "cache" / "vitlib").iterdir()
        copy.write_bytes(copy.read_bytes()[:-50])
    if fault == "no room":
        copy.unlink()
        monkeypatch.setattr(
            read.pa.ipc, "new_file", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
    read._cells.cache_clear()
    with pytest.raises(
        UsageError, match=r"\.arrow'? (is damaged|cannot be written in)|^no room on disk for \S*\.arrow$"
    ):
        read.decode(rows, 0)
    read._cells.cache_clear()


METADATA = ("null", "[]", "{", '{"info": 5}', '{"info": {"features": []}}', "[" * 99_999,
            '{"info": {"features": {"label": {"names": 5}}}}', '{"info": {"features": {"label": {"names": [1]}}}}')  # fmt: skip


@pytest.mark.parametrize("text", METADATA)
def test_odd_metadata_of_a_table_are_one_sentence(text, tmp_path):
    table(tmp_path / "train.parquet", [0, 1])
    whole = pq.read_table(tmp_path / "train.parquet")
    pq.write_table(whole.replace_schema_metadata({"huggingface": text}), tmp_path / "train.parquet")
    with pytest.raises(UsageError, match=r"the names of classes in the metadata of .* cannot be read") as error:
        read_folder(tmp_path, "train")
    assert "\n" not in str(error.value)


def archive(path, members):
    """A .tar of these (name, type, bytes)."""
    with tarfile.open(path, "w") as tar:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(content), "/etc/passwd"
            tar.addfile(info, io.BytesIO(content))


MEMBERS = {
    "a link to a file elsewhere": [("a.png", tarfile.SYMTYPE, b""), ("a.cls", tarfile.REGTYPE, b"0")],
    "a label that is a link": [("a.png", tarfile.REGTYPE, b"x"), ("a.cls", tarfile.SYMTYPE, b"")],
    "a label that is a folder": [("a.png", tarfile.REGTYPE, b"x"), ("a.cls", tarfile.DIRTYPE, b"")],
    "a label without end": [("a.png", tarfile.REGTYPE, b"x"), ("a.cls", tarfile.REGTYPE, b"9" * 4000)],
    "a label of 10^12": [("a.png", tarfile.REGTYPE, b"x"), ("a.cls", tarfile.REGTYPE, b"1000000000000")],
    "a label of 10^18": [("a.png", tarfile.REGTYPE, b"x"), ("a.cls", tarfile.REGTYPE, b"9999999999999999999")],
    "two images of one name": [(f"a.{k}", tarfile.REGTYPE, b"0") for k in ("png", "jpg", "cls")],
    "nothing": [],
}  # fmt: skip


@pytest.mark.parametrize("what", MEMBERS)
def test_odd_members_of_an_archive_are_one_sentence(what, tmp_path):
    archive(tmp_path / "train.tar", MEMBERS[what])
    with pytest.raises(UsageError, match=r"train\.tar") as error:
        read_folder(tmp_path, "train")
    assert "\n" not in str(error.value)


def test_a_cut_archive_is_one_sentence(tmp_path):
    picture_bytes = encoded(1, "PNG")
    members = [
        (f"{k}.{kind}", tarfile.REGTYPE, picture_bytes if kind == "png" else b"0")
        for k in range(3)
        for kind in ("png", "cls")
    ]
    archive(tmp_path / "train.tar", members)
    whole = (tmp_path / "train.tar").read_bytes()
    for size in (700, 1500, len(picture_bytes) + 600):
        (tmp_path / "train.tar").write_bytes(whole[:size])
        with pytest.raises(UsageError, match=r"train\.tar"):
            read_folder(tmp_path, "train")
