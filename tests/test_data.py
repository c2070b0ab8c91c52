"""Embedded data, their card, and the draws that batches are made of."""

import gzip
import importlib.util
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy import stats

from lab import paths
from lab.data import registry
from lab.data.registry import load, load_resized
from vitlib import draws
from vitlib.data import epoch_batches, resize, subset
from vitlib.errors import UsageError

NAME = "fashion-mnist"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
SIZES = {  # images of train, validation, test; image side; classes
    "animal-shapes": (5_000, 1_000, 2_000, 28, 10),
    "digits": (1_000, 128, 640, 8, 10),
    "fashion-mnist": (18_000, 2_000, 5_000, 28, 10),
    "fashion-mnist-4": (7_200, 800, 1_969, 28, 4),
    "fashion-mnist-6": (10_800, 1_200, 3_031, 28, 6),
}
VIEWS = {"fashion-mnist-4": (0, 2, 4, 6), "fashion-mnist-6": (1, 3, 5, 7, 8, 9)}
# Where the wheels are that tools/embed.py reads: folder $VITLIB_DATA, as for data that is not embedded.
WHEELS = paths.ROOT / os.environ.get("VITLIB_DATA", "data")
SOURCES = {
    "fashion-mnist": DEBIAN,
    "digits": next(WHEELS.glob("scikit_learn-*.whl"), WHEELS / "scikit_learn"),
    "animal-shapes": WHEELS / "animal_mnist-0.4-py3-none-any.whl",
}


@pytest.fixture
def embed():
    """tools/embed.py as a module."""
    spec = importlib.util.spec_from_file_location("embed", paths.ROOT / "tools" / "embed.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.mark.parametrize("name", SIZES)
def test_the_splits_have_the_sizes_and_the_balance_that_their_card_says(name):
    *sizes, side, classes = SIZES[name]
    card = registry.card(name)
    assert [split["num_examples"] for split in card["dataset_info"]["splits"]] == sizes
    facts = card["vitlib"]
    assert (facts["channels"], facts["image_size"], facts["num_classes"]) == (1, side, classes)
    for split, size in zip(registry.SPLITS, sizes, strict=True):
        data = load(name, split)
        assert data.images.shape == (size, 1, side, side) and data.images.dtype == torch.uint8
        assert len(data.classes) == classes and data.labels.dtype == torch.int64
        assert set(data.labels.tolist()) == set(range(classes))
    assert torch.bincount(load(name, "train").labels).tolist() == [sizes[0] // classes] * classes
    if name != "digits":  # its validation split is one sheet of handwriting
        assert torch.bincount(load(name, "validation").labels).tolist() == [sizes[1] // classes] * classes


@pytest.mark.parametrize("name", SIZES)
def test_the_card_has_the_pixel_statistics_of_the_training_images(name):
    data, pixels = load(name, "train"), load(name, "train").images.double() / 255
    assert pixels.mean().item() == pytest.approx(data.mean, abs=5e-6)
    assert pixels.std().item() == pytest.approx(data.std, abs=5e-6)


@pytest.mark.parametrize("name", SIZES)
def test_no_image_occurs_twice_in_a_split_or_in_two(name):
    images = [image.tobytes() for split in registry.SPLITS for image in load(name, split).images.numpy()]
    assert len(set(images)) == len(images)


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_exactly_its_parents_images_of_its_classes(name):
    parent_classes = load(NAME, "test").classes
    assert load(name, "test").classes == tuple(parent_classes[c] for c in VIEWS[name])
    for split in registry.SPLITS:
        parent, view = load(NAME, split), load(name, split)
        rows = [row for row, label in enumerate(parent.labels.tolist()) if label in VIEWS[name]]
        assert torch.equal(view.images, parent.images[rows])
        assert [VIEWS[name][label] for label in view.labels.tolist()] == parent.labels[rows].tolist()


def test_every_data_set_has_a_checksum_of_its_own_and_the_views_share_nothing():
    assert len({registry.data_checksum(name) for name in SIZES}) == len(SIZES)
    assert sorted(VIEWS["fashion-mnist-4"] + VIEWS["fashion-mnist-6"]) == list(range(10))


def test_the_digits_are_cut_between_sheets_of_handwriting():
    """Every sheet begins with 0 to 9 three times: the splits begin with a sheet."""
    for split, digits in (("validation", 30), ("test", 30)):
        assert load("digits", split).labels[:digits].tolist() == list(range(10)) * 3
    assert (load("digits", "train").images.unique().diff() >= 15).all()  # 17 levels of ink


@pytest.mark.parametrize("name", ["digits", "animal-shapes", "fashion-mnist-4"])
def test_a_small_data_set_can_be_resized_and_cut_for_a_run(name):
    data = load_resized(name, "train", 16)
    assert data.images.shape[-2:] == (16, 16) and data.images.dtype == torch.uint8
    # Neither too bright nor too dark: a resize keeps the mean but for rounding.
    assert abs(data.images.double().mean() - load(name, "train").images.double().mean()) < 0.5
    classes = len(data.classes)
    rows = subset(data, 20 * classes, 0)
    assert torch.bincount(data.labels[torch.from_numpy(rows)]).tolist() == [20] * classes


def test_an_enlarged_image_blends_neighbours_in_quarters():
    image = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    image[0, 0, :, 4:] = 100
    assert resize(image, 16)[0, 0, 5].tolist() == [0] * 7 + [25, 75] + [100] * 7


def test_every_card_is_in_hugging_face_form_and_has_the_headings():
    from datasets import DatasetInfo
    from huggingface_hub import DatasetCard

    for path in paths.DATA_CARDS.glob("*.md"):
        card = DatasetCard.load(path)
        assert card.data.license and card.data.pretty_name and card.data.task_categories
        info = card.data.to_dict()["dataset_info"]
        splits = set(DatasetInfo._from_yaml_dict(info).splits)
        assert splits == set(registry.SPLITS) if path.stem in registry.names() else splits <= set(registry.SPLITS)
        for heading in ("## Source", "## Licence", "## Splits", "## Form", "## Limits"):
            assert heading in card.text
        assert path.stem in registry.names() or ("## Where to get it" in card.text and "## Use here" in card.text)


def test_a_data_set_that_no_run_can_name_is_answered_with_its_card():
    """`names` (what `python -m lab check` loads) has the embedded ones only; the others raise one sentence."""
    assert registry.names() == sorted(SIZES)
    others = {path.stem for path in paths.DATA_CARDS.glob("*.md")} - set(SIZES)
    assert others == set(
        "imagenet-1k imagenet-v2 inaturalist-2018 inaturalist-2019 cifar-10 cifar-100 stanford-cars flowers-102 "
        "tiny-imagenet".split()
    )
    for name in others - {"cifar-10", "tiny-imagenet"}:
        for ask in (registry.facts, registry.data_checksum, lambda name: load(name, "train")):
            with pytest.raises(UsageError) as said:
                ask(name)
            assert str(said.value) == (
                f"data set '{name}' is read from its files as they are needed: no run holds it in memory"
            )


def test_the_papers_data_sets_have_the_sizes_of_table_9_and_can_be_planned_without_being_here(monkeypatch, tmp_path):
    monkeypatch.setenv("VITLIB_DATA", str(tmp_path))
    known = registry.published("imagenet-1k")
    assert (known.channels, known.num_classes, known.sizes) == (3, 1000, {"train": 1_281_167, "test": 50_000})
    assert registry.published("flowers-102").sizes == {"train": 2040, "test": 6149}
    identities = {name: registry.data_checksum(name, from_files=True) for name in ("imagenet-1k", "inaturalist-2018")}
    assert len({registry.data_checksum(NAME), *identities.values()}) == 3
    (tmp_path / "imagenet-1k" / "train" / "n01").mkdir(parents=True)
    assert (
        registry.data_checksum("imagenet-1k", from_files=True) == identities["imagenet-1k"]
    )  # what is here is not asked
    with pytest.raises(UsageError, match="unknown data set of the paper 'digits'"):
        registry.published("digits")


def test_a_card_that_is_no_data_card_cannot_be_named():
    for name in ("../README", "Fashion-MNIST", ""):
        with pytest.raises(UsageError, match="unknown data set"):
            registry.card(name)


def test_the_files_with_their_licence_are_under_fifteen_megabytes():
    files = list(paths.EMBEDDED.glob("*"))
    assert sum(f.stat().st_size for f in files) < 15e6
    for name, owner in (("fashion-mnist", "Zalando"), ("digits", "scikit-learn"), ("animal-shapes", "SinaSR-6")):
        notice = (paths.EMBEDDED / f"LICENSE.{name}").read_text(encoding="utf-8")
        assert owner in notice and f"{name}-*.parquet" in notice


def test_the_datasets_library_reads_the_embedded_files(monkeypatch, tmp_path):
    from datasets import load_dataset

    file = str(paths.EMBEDDED / "fashion-mnist-validation.parquet")
    rows = load_dataset("parquet", data_files={"validation": file}, cache_dir=str(tmp_path))["validation"]
    data = load(NAME, "validation")
    assert rows.features["label"].names == list(data.classes)
    assert np.array_equal(np.asarray(rows[7]["image"]), data.images[7, 0].numpy())


@pytest.mark.parametrize("name", SOURCES)
def test_the_script_makes_the_same_pixels_and_labels_again(name, embed, tmp_path, monkeypatch):
    if not SOURCES[name].exists():
        pytest.skip(f"the source of {name} is not at hand: tools/embed.py says where to get it")
    monkeypatch.setattr(embed, "EMBEDDED", tmp_path)
    embed.MAKERS[name](SOURCES[name])
    for split, sha256 in registry.card(name)["vitlib"]["sha256"].items():
        assert registry.checksum(*registry.read_parquet(tmp_path / f"{name}-{split}.parquet")) == sha256


class Calls:
    """Unpickled carelessly, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_pickles_are_read_as_arrays_or_refused_and_nothing_in_them_is_called(embed, tmp_path):
    for array in (np.arange(24, dtype=np.uint8).reshape(2, 3, 4), np.array([3, -1, 2**40])):
        again = embed.read_array(pickle.dumps(array, protocol=4))
        assert np.array_equal(again, array) and again.dtype == array.dtype
    trap = tmp_path / "called"
    held = np.array([Calls(trap)], dtype=object)
    for thing in (Calls(trap), held, {"a": np.arange(3)}, b"bytes", np.arange(3.0), np.dtype("u1"), np.ndarray, len):
        with pytest.raises(ValueError, match="refused"):
            embed.read_array(pickle.dumps(thing, protocol=4))
    assert not trap.exists()
    pickle.loads(pickle.dumps(Calls(trap)))
    assert trap.exists()  # the trap works


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_the_embedded_images_are_those_of_the_original_files():
    raw = gzip.decompress((DEBIAN / "t10k-images-idx3-ubyte.gz").read_bytes())
    original = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 1, 28, 28)
    assert np.array_equal(original[5_000:], load(NAME, "test").images.numpy())
    raw = gzip.decompress((DEBIAN / "train-labels-idx1-ubyte.gz").read_bytes())
    labels = np.frombuffer(raw, np.uint8, offset=8)
    kept = np.sort(np.concatenate([np.flatnonzero(labels == c)[:1800] for c in range(10)]))
    assert np.array_equal(labels[kept], load(NAME, "train").labels.numpy())
    raw = gzip.decompress((DEBIAN / "train-images-idx3-ubyte.gz").read_bytes())
    assert np.array_equal(
        np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 1, 28, 28)[kept], load(NAME, "train").images
    )


@pytest.fixture
def copied(monkeypatch, tmp_path):
    """The embedded files and the card in a folder that a test may damage."""
    for name, folder in (("EMBEDDED", paths.EMBEDDED), ("DATA_CARDS", paths.DATA_CARDS)):
        shutil.copytree(folder, tmp_path / name)
        monkeypatch.setattr(registry, name, tmp_path / name)
    load.cache_clear()
    yield tmp_path
    load.cache_clear()


def test_a_damaged_file_is_refused_in_one_sentence(copied):
    file = copied / "EMBEDDED" / "fashion-mnist-test.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"fashion-mnist-test\.parquet is damaged"):
        load(NAME, "test")
    file.unlink()
    with pytest.raises(UsageError, match=r"there is no file fashion-mnist-test\.parquet"):
        load(NAME, "test")


def test_a_view_of_a_damaged_file_is_refused_and_so_is_a_view_of_other_classes(copied):
    card = copied / "DATA_CARDS" / "fashion-mnist-4.md"
    card.write_text(card.read_text().replace("[0, 2, 4, 6]", "[0, 2, 4, 8]"))
    with pytest.raises(UsageError, match=r"^fashion-mnist does not hold the test images of fashion-mnist-4"):
        load("fashion-mnist-4", "test")
    (copied / "EMBEDDED" / "fashion-mnist-test.parquet").write_bytes(b"PAR1")
    load.cache_clear()
    with pytest.raises(UsageError, match=r"fashion-mnist-test\.parquet is damaged"):
        load("fashion-mnist-6", "test")


@pytest.mark.parametrize("name", ["digits", "animal-shapes"])
def test_a_damaged_file_of_the_smaller_sets_is_refused_too(copied, name):
    file = copied / "EMBEDDED" / f"{name}-train.parquet"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UsageError, match=rf"{name}-train\.parquet is damaged"):
        load(name, "train")


def test_one_changed_pixel_is_refused(copied):
    card = copied / "DATA_CARDS" / "fashion-mnist.md"
    images, labels = load(NAME, "test").images.numpy().copy(), load(NAME, "test").labels.numpy()
    assert registry.checksum(images, labels) == registry.card(NAME)["vitlib"]["sha256"]["test"]
    images[17, 0, 3, 4] ^= 1
    other = registry.checksum(images, labels)
    card.write_text(card.read_text().replace(registry.card(NAME)["vitlib"]["sha256"]["test"], other))
    load.cache_clear()
    with pytest.raises(UsageError, match="does not hold the test images"):
        load(NAME, "test")


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'fashion-mnist'"):
        load("fashion_mnist", "train")
    with pytest.raises(UsageError, match="did you mean 'validation'"):
        load(NAME, "valid")


def test_resize_keeps_constant_images_and_is_antialiased():
    grey = torch.full((2, 1, 28, 28), 93, dtype=torch.uint8)
    assert (resize(grey, 16) == 93).all()
    stripes = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    stripes[..., ::2] = 255  # finer than the new grid: without antialiasing columns would come out black or white
    middle = resize(stripes, 14)[..., 3:-3, 3:-3].float()
    assert middle.min() > 100 and middle.max() < 155
    assert resize(grey, 28) is grey


@pytest.mark.parametrize(("size", "sha256"), [(16, "327e830f456d1a62"), (20, "b257ba2deb08827c")])
def test_the_resized_pixels_are_the_same_on_every_machine(size, sha256):
    data = load_resized(NAME, "train", size)
    assert registry.checksum(data.images.numpy(), data.labels.numpy())[:16] == sha256


def test_subsets_are_balanced_nested_and_the_same_for_every_arm():
    data = load(NAME, "train")
    small, large = subset(data, 200, 3), subset(data, 500, 3)
    assert set(small) < set(large)
    assert torch.bincount(data.labels[torch.from_numpy(large)]).tolist() == [50] * 10
    assert np.array_equal(large, subset(data, 500, 3)) and not np.array_equal(large, subset(data, 500, 4))
    with pytest.raises(UsageError, match="multiples of 10 from 10 to 18000"):
        subset(data, 123, 0)


def test_draws_are_uniform_independent_and_known():
    u = draws.uniform(0, "flip", 0, np.arange(20_000), 4)
    assert stats.kstest(u.ravel(), "uniform").pvalue > 1e-3
    assert np.abs(np.corrcoef(u.T)[np.triu_indices(4, 1)]).max() < 0.03
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.03
    # Changing these numbers changes every run: raise TRAINING_VERSION with them.
    assert draws.uniform(7, "flip", 2, np.array([5]), 2).tolist() == KNOWN


KNOWN = [[0.05499559116685515, 0.9555510132447048]]


def test_an_image_is_drawn_alike_whatever_batch_it_is_in():
    data = load_resized(NAME, "validation", 16)
    rows = np.arange(100)

    def by_image(batch_size: int, rows: np.ndarray) -> dict:
        batches = epoch_batches(data, rows, 5, 1, batch_size, flip=True, mixup=0.4)
        return {i: (x, t) for b in batches for i, x, t in zip(b.index, b.images, b.targets, strict=True)}

    whole, split = by_image(100, rows), by_image(7, rows)
    assert all(torch.equal(whole[i][0], split[i][0]) and torch.equal(whole[i][1], split[i][1]) for i in rows)


def test_an_epoch_has_every_image_once_in_an_order_of_its_own():
    data = load_resized(NAME, "validation", 16)
    rows = subset(data, 200, 0)

    def seen(epoch: int, seed: int = 0) -> np.ndarray:
        return np.concatenate([b.index for b in epoch_batches(data, rows, seed, epoch, 32, flip=True, mixup=0.0)])

    assert sorted(seen(0)) == sorted(rows) and len(seen(0)) == 200
    assert not np.array_equal(seen(0), seen(1)) and not np.array_equal(seen(0), seen(0, seed=1))


def test_half_of_the_images_are_mirrored_and_targets_stay_shares():
    data = load_resized(NAME, "validation", 16)
    flipped = np.concatenate([b.flipped for b in epoch_batches(data, np.arange(2000), 0, 0, 100, flip=True, mixup=0)])
    assert 0.45 < flipped.mean() < 0.55
    plain = next(epoch_batches(data, np.arange(50), 0, 0, 50, flip=False, mixup=0))
    assert not plain.flipped.any()
    mixed = next(epoch_batches(data, np.arange(50), 0, 0, 50, flip=True, mixup=0.4))
    assert torch.allclose(mixed.targets.sum(1), torch.ones(50)) and (mixed.targets > 0).sum(1).max() == 2


def test_cards_are_plain_yaml_with_vitlib_facts():
    text = (paths.DATA_CARDS / f"{NAME}.md").read_text(encoding="utf-8")
    assert yaml.safe_load(text.split("---\n")[1])["vitlib"]["embedded"] is True
