"""Data sets by name: the embedded ones and their cards, folders of the paper's data in every layout, runs on them."""

import gzip
import importlib.util
import io
import json
import os
import pickle
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from pictures import TEST, TRAIN, class_folders, encoded, parquet, picture, write
from PIL import Image
from scipy.io import savemat

from lab import paths
from lab.__main__ import main
from lab.claims.ledger import ledger
from lab.data import cards, published
from lab.data.cards import load, load_resized, source
from lab.experiments import catalogue, profiles, small
from lab.report import render, tables
from lab.runs import execute, results, store
from lab.runs.spec import RunSpec
from vitlib.data import Augment, Streamed, open_folder, subset
from vitlib.data.read import decode, read_parquet
from vitlib.errors import UsageError
from vitlib.model import ViT, vit_config
from vitlib.train import loop
from vitlib.train.recipe import Recipe
from vitlib.train.supervised import evaluate, loss_of

NAME = "fashion-mnist"
WILD = Augment(policy="rand-m7-mstd0.5-inc1", erasing=0.5, view_size=8)


def recipe(batch_size: int, **options) -> Recipe:
    return Recipe(epochs=1, batch_size=batch_size, lr=1e-3, **options)


# ------------------------------------------------------------------------------------------------- embedded


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
    card = cards.card(name)
    assert [split["num_examples"] for split in card["dataset_info"]["splits"]] == sizes
    facts = card["vitlib"]
    assert (facts["channels"], facts["image_size"], facts["num_classes"]) == (1, side, classes)
    for split, size in zip(cards.SPLITS, sizes, strict=True):
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
    images = [image.tobytes() for split in cards.SPLITS for image in load(name, split).images.numpy()]
    assert len(set(images)) == len(images)


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_exactly_its_parents_images_of_its_classes(name):
    parent_classes = load(NAME, "test").classes
    assert load(name, "test").classes == tuple(parent_classes[c] for c in VIEWS[name])
    for split in cards.SPLITS:
        parent, view = load(NAME, split), load(name, split)
        rows = [row for row, label in enumerate(parent.labels.tolist()) if label in VIEWS[name]]
        assert torch.equal(view.images, parent.images[rows])
        assert [VIEWS[name][label] for label in view.labels.tolist()] == parent.labels[rows].tolist()


def test_every_data_set_has_a_checksum_of_its_own_and_the_views_share_nothing():
    assert len({source(name).checksum for name in SIZES}) == len(SIZES)
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


@pytest.mark.parametrize(("size", "sha256"), [(16, "327e830f456d1a62"), (20, "b257ba2deb08827c")])
def test_the_resized_pixels_are_the_same_on_every_machine(size, sha256):
    data = load_resized(NAME, "train", size)
    assert cards.checksum(data.images.numpy(), data.labels.numpy())[:16] == sha256


def test_every_card_is_in_hugging_face_form_and_has_the_headings():
    from datasets import DatasetInfo
    from huggingface_hub import DatasetCard

    for path in paths.DATA_CARDS.glob("*.md"):
        card = DatasetCard.load(path)
        assert card.data.license and card.data.pretty_name and card.data.task_categories
        info = card.data.to_dict()["dataset_info"]
        splits = set(DatasetInfo._from_yaml_dict(info).splits)
        assert splits == set(cards.SPLITS) if path.stem in cards.names() else splits <= set(cards.SPLITS)
        for heading in ("## Source", "## Licence", "## Splits", "## Form", "## Limits"):
            assert heading in card.text
        assert path.stem in cards.names() or ("## Where to get it" in card.text and "## Use here" in card.text)


def test_a_data_set_that_no_run_can_name_is_answered_with_its_card():
    """`names` (what `python -m lab check` loads) has the embedded ones only; the others raise one sentence."""
    assert cards.names() == sorted(SIZES)
    others = {path.stem for path in paths.DATA_CARDS.glob("*.md")} - set(SIZES)
    assert others >= set(
        "imagenet-1k imagenet-v2 inaturalist-2018 inaturalist-2019 cifar-10 cifar-100 stanford-cars flowers-102 "
        "tiny-imagenet".split()
    )
    for name in filter(lambda name: cards.card(name)["vitlib"].get("streamed"), others):
        for ask in (cards.facts, lambda name: load(name, "train")):
            with pytest.raises(UsageError) as said:
                ask(name)
            assert str(said.value) == (
                f"data set '{name}' is read from its files as they are needed: no run holds it in memory"
            )


def test_the_papers_data_sets_have_the_sizes_of_table_9_and_can_be_planned_without_being_here(monkeypatch, tmp_path):
    monkeypatch.setenv("VITLIB_DATA", str(tmp_path))
    known = source("imagenet-1k").facts
    assert (known.channels, known.num_classes, known.sizes) == (3, 1000, {"train": 1_281_167, "test": 50_000})
    assert source("flowers-102").facts.sizes == {"train": 2040, "test": 6149}
    identities = {name: source(name).checksum for name in ("imagenet-1k", "inaturalist-2018")}
    assert len({source(NAME).checksum, *identities.values()}) == 3
    (tmp_path / "imagenet-1k" / "train" / "n01").mkdir(parents=True)
    assert source("imagenet-1k").checksum == identities["imagenet-1k"]  # what is here is not asked
    assert source("cifar-10", streamed=True).facts.sizes == {"train": 50_000, "test": 10_000}
    with pytest.raises(UsageError, match="unknown data set of the paper 'digits'"):
        source("digits", streamed=True)


def test_a_card_that_is_no_data_card_cannot_be_named():
    for name in ("../README", "Fashion-MNIST", ""):
        with pytest.raises(UsageError, match="unknown data set"):
            cards.card(name)


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
    for split, sha256 in cards.card(name)["vitlib"]["sha256"].items():
        assert cards.checksum(*embedded_arrays(tmp_path / f"{name}-{split}.parquet")) == sha256


def embedded_arrays(path):
    found = read_parquet([path])
    return cards._stack(found, path.name, channels=1), found.labels


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
        monkeypatch.setattr(cards, name, tmp_path / name)
    return tmp_path


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
    with pytest.raises(UsageError, match=r"fashion-mnist-test\.parquet is damaged"):
        load("fashion-mnist-6", "test")


@pytest.mark.parametrize("name", ["digits", "animal-shapes"])
def test_a_damaged_file_of_the_smaller_sets_is_refused_too(copied, name):
    file = copied / "EMBEDDED" / f"{name}-train.parquet"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UsageError, match=rf"{name}-train\.parquet is damaged"):
        load(name, "train")


BROKEN = {
    "channels that are a word": ("digits", "channels: 1", "channels: x"),
    "no mean": ("digits", "  mean: 0.30725\n", ""),
    "a mean that is a list": ("digits", "mean: 0.30725", "mean: [1]"),
    "no checksums of a split": ("digits", "    validation: 56bb", "    other: 56bb"),
    "no names of classes": ("digits", "class_label:", "classes:"),
    "classes that are a word": ("imagenet-1k", "num_classes: 1000", "num_classes: many"),
    "a size that is no list": ("imagenet-1k", "train: [1281167]", "train: 1281167"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_card_with_a_broken_value_is_named(what, copied):
    name, old, new = BROKEN[what]
    card = copied / "DATA_CARDS" / f"{name}.md"
    assert old in card.read_text()
    card.write_text(card.read_text().replace(old, new))
    with pytest.raises(UsageError, match=rf"{name}\.md is damaged and cannot be read"):
        cards.source(name).open("validation", 8)


def test_one_changed_pixel_is_refused(copied):
    card = copied / "DATA_CARDS" / "fashion-mnist.md"
    images, labels = load(NAME, "test").images.numpy().copy(), load(NAME, "test").labels.numpy()
    assert cards.checksum(images, labels) == cards.card(NAME)["vitlib"]["sha256"]["test"]
    images[17, 0, 3, 4] ^= 1
    other = cards.checksum(images, labels)
    card.write_text(card.read_text().replace(cards.card(NAME)["vitlib"]["sha256"]["test"], other))
    with pytest.raises(UsageError, match="does not hold the test images"):
        load(NAME, "test")


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'fashion-mnist'"):
        load("fashion_mnist", "train")
    with pytest.raises(UsageError, match="did you mean 'validation'"):
        load(NAME, "valid")


def test_cards_are_plain_yaml_with_vitlib_facts():
    text = (paths.DATA_CARDS / f"{NAME}.md").read_text(encoding="utf-8")
    assert yaml.safe_load(text.split("---\n")[1])["vitlib"]["embedded"] is True


# ------------------------------------------------------------------------------------------------- every layout


def webdataset(folder):
    folder.mkdir(parents=True)
    for split, labels in (("train", TRAIN), ("test", TEST)):
        with tarfile.open(folder / f"birds-{split}-0000.tar", "w") as tar:
            for i, label in enumerate(labels):
                for suffix, content in ((".png", encoded(i, "PNG")), (".cls", str(label).encode())):
                    info = tarfile.TarInfo(f"{i:06d}{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def inaturalist(folder, year=2018):
    for split, labels in (("train", TRAIN), ("val", TEST)):
        paths = [f"train_val{year}/Aves/{label}/{split}{i}.jpg" for i, label in enumerate(labels)]
        for i, path in enumerate(paths):
            write(folder / path, i)
        record = {
            "images": [{"id": 100 + i, "file_name": path} for i, path in enumerate(paths)],
            "annotations": [{"image_id": 100 + i, "category_id": 7 * k + 3} for i, k in enumerate(labels)],
            "categories": [{"id": 7 * k + 3, "name": f"species {k}"} for k in (2, 0, 1)],
        }
        (folder / f"{split}{year}.json").write_text(json.dumps(record))


def cifar(folder, kind="cifar-10-batches-py", key="labels", meta="batches.meta", names="label_names"):
    """CIFAR-10 has five training files; CIFAR-100 one, and another key for its labels."""
    base = folder / kind
    base.mkdir(parents=True)
    train = [f"data_batch_{n}" for n in range(1, 6)] if key == "labels" else ["train"]
    parts = {file: part for file, part in zip(train, np.array_split(np.arange(len(TRAIN)), len(train)), strict=True)}
    parts["test_batch" if key == "labels" else "test"] = np.arange(len(TEST))
    for file, part in parts.items():
        pixels = [np.asarray(picture(int(i), (32, 32))).transpose(2, 0, 1).reshape(-1) for i in part]
        labels = [(TEST if file.startswith("test") else TRAIN)[i] for i in part]
        (base / file).write_bytes(pickle.dumps({"data": np.stack(pixels), key: labels}))
    (base / meta).write_bytes(pickle.dumps({names: ["a", "b", "c"]}))


def cars(folder):
    base = folder / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    for split, labels, file in (
        ("train", TRAIN, "devkit/cars_train_annos.mat"),
        ("test", TEST, "cars_test_annos_withlabels.mat"),
    ):
        names = [f"{i + 1:05d}.jpg" for i in range(len(labels))]
        for i, name in enumerate(names):
            write(base / f"cars_{split}" / name, i)
        rows = [(label + 1, name) for label, name in zip(labels, names, strict=True)]
        savemat(base / file, {"annotations": np.array(rows, dtype=[("class", object), ("fname", object)])})
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array(["a", "b", "c"], dtype=object)})


def flowers(folder):
    """Ten images, shuffled: image 10 is the first of the training split, and the last two of its seven are `valid`."""
    order = [10, 2, 3, 9, 5, 6, 7, 8, 4, 1]
    labels = np.zeros(10, int)
    for i, (number, label) in enumerate(zip(order, TRAIN + TEST, strict=True)):
        labels[number - 1] = label + 1
        write(folder / "jpg" / f"image_{number:05d}.jpg", i % 7)
    savemat(folder / "setid.mat", {"trnid": order[:5], "valid": order[5:7], "tstid": order[7:]})
    savemat(folder / "imagelabels.mat", {"labels": labels})


STAND_INS = {
    "birds": lambda folder: class_folders(folder, test="test"),
    "imagenet-1k": class_folders,
    "parquet": parquet,
    "webdataset": webdataset,
    "inaturalist-2018": inaturalist,
    "inaturalist-2019": lambda folder: inaturalist(folder, 2019),
    "cifar-10": cifar,
    "cifar-100": lambda folder: cifar(folder, "cifar-100-python", "fine_labels", "meta", "fine_label_names"),
    "stanford-cars": cars,
    "flowers-102": flowers,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, make in STAND_INS.items():
        make(folder / name)
    return folder


@pytest.fixture(autouse=True)
def any_pickle(monkeypatch):
    """torchvision refuses files without the published MD5 sums, which a stand-in cannot have."""
    for module in ("cifar", "flowers102"):
        monkeypatch.setattr(
            f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: Path(path).is_file()
        )
    published._cifar.cache_clear()


def about(name: str) -> dict:
    """What the card of a data set says of its files; of a stand-in for other data the plainest."""
    path = paths.DATA_CARDS / f"{name}.md"
    return published.read_card(path)["vitlib"] if path.is_file() else {"splits": {"train": ["train"], "test": ["test"]}}


@pytest.fixture
def opened(root, monkeypatch):
    """A split of a stand-in, opened as the data set of the paper that it stands for, whatever its size."""
    monkeypatch.setattr(published, "locate", lambda name: root / name)
    monkeypatch.setattr(published, "check_counts", lambda *of: None)

    def open_(name, split="train"):
        return Streamed(name, split, published.read_published(name, about(name), split), 16, Augment())

    return open_


@pytest.mark.parametrize("name", STAND_INS)
def test_an_epoch_of_every_layout_has_each_image_once_with_its_label(name, opened):
    data = opened(name)
    batches = list(data.epoch_batches(np.arange(len(data)), 0, 0, recipe(4, augment=Augment())))
    assert [len(b.index) for b in batches] == [4, 3] and data.labels.tolist() == TRAIN
    index = np.concatenate([b.index for b in batches])
    assert sorted(index) == list(range(7)) and index.tolist() != list(range(7))
    for batch in batches:
        assert batch.images.shape[1:] == (3, 16, 16) and batch.images.dtype == torch.float32
        assert batch.targets.tolist() == [TRAIN[i] for i in batch.index]


@pytest.mark.parametrize("name", STAND_INS)
def test_evaluation_of_every_layout_is_the_splits_pictures_in_order(name, opened):
    data = opened(name, "test")
    batches = list(data.evaluation_batches(2))
    assert np.concatenate([b.index for b in batches]).tolist() == [0, 1, 2]
    assert torch.cat([b.targets for b in batches]).tolist() == data.labels.tolist() == TEST
    look = torch.cat([b.images for b in batches]).mean((2, 3))
    side = (32, 32) if name.startswith("cifar") else (24, 20)
    expected = torch.stack([data.view(None)(picture(i, side), False, 0)[0].mean((1, 2)) for i in range(3)])
    assert torch.allclose(look, expected, atol=0.05)  # JPEG; two pictures differ by 0.1 and more
    assert (torch.cdist(look, look) + torch.eye(3)).min() > 0.1


@pytest.mark.parametrize("name", STAND_INS)
def test_an_epoch_of_training_from_every_layout(name, opened):
    data = opened(name)
    model = ViT(vit_config("W32-1x1/8", image_size=16, in_chans=3, num_classes=len(data.classes)))
    wild = recipe(4, augment=WILD, mixup=0.8, cutmix=1.0, repeats=3, loss="bce")
    history = loop.train(model, wild, data, np.arange(7), 0, loss_of(wild))
    assert [step.step for step in history] == [1, 2]
    reached, correct = evaluate(model, opened(name, "test"), batch_size=2)
    assert correct.shape == (3,) and np.isfinite(reached["loss"])


def test_labels_and_checksum_are_read_without_decoding_and_no_image_is_kept(opened, monkeypatch):
    decoded = []
    load = Image.Image.convert
    monkeypatch.setattr(Image.Image, "convert", lambda image, *a, **k: (decoded.append(1), load(image, *a, **k))[1])
    opener = Image.open
    for name in STAND_INS:
        monkeypatch.setattr(Image, "open", lambda *a: pytest.fail("an image was opened"))
        data = opened(name)
        assert (len(data.labels), len(data.checksum)) == (7, 16)
        monkeypatch.setattr(Image, "open", opener)
        decoded.clear()
        for _ in range(2):  # what was read once is read again
            assert len(list(data.evaluation_batches(4))) == 2
        assert len(decoded) == 14


def test_a_hub_name_goes_through_datasets(monkeypatch):
    import datasets

    table = datasets.Dataset.from_dict(
        {"img": [{"bytes": encoded(i), "path": None} for i in range(3)], "fine_label": TEST, "coarse_label": [9, 9, 9]},
        features=datasets.Features(
            img=datasets.Image(),
            fine_label=datasets.ClassLabel(names=["x", "y", "z"]),
            coarse_label=datasets.Value("int64"),
        ),
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"train": table, "valid": table})
    published._hub.cache_clear()
    found = published.read_hub("someone/pictures", ("validation", "valid"))
    assert found.classes == ("x", "y", "z") and found.labels.tolist() == TEST and len(found.checksum()) == 16
    assert [decode(found.rows, i).size for i in range(3)] == [(24, 20)] * 3
    with pytest.raises(UsageError, match="no split 'test' on the Hub: there are train, valid"):
        published.read_hub("someone/pictures", ("test",))
    published._hub.cache_clear()


def test_a_hub_name_without_the_hub_is_one_sentence():
    with pytest.raises(UsageError, match=r"^someone/pictures cannot be read from the Hugging Face Hub: [^\n]*$"):
        published.read_hub("someone/pictures", ("train",))


@pytest.fixture
def place(monkeypatch, tmp_path):
    """An empty $VITLIB_DATA, and outputs of its own."""
    monkeypatch.setenv("VITLIB_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("VITLIB_OUTPUTS", str(tmp_path / "outputs"))
    return tmp_path / "data"


def read(name, split="train", check=False):
    with pytest.MonkeyPatch.context() as patch:
        if not check:
            patch.setattr(published, "check_counts", lambda *of: None)
        return published.read_published(name, about(name), split)


@pytest.mark.parametrize(
    "inside", ["imagenet-v2", "imagenet-v2/imagenetv2-matched-frequency-format-val", "imagenet-v2/test"]
)
def test_folder_k_of_imagenet_v2_is_class_k(place, inside):
    for k in (0, 1, 10, 2, 11, 3, 4, 5, 6, 7, 8, 9):
        write(place / inside / str(k) / "a.jpeg", k)
    v2 = read("imagenet-v2", "test")
    assert v2.labels.tolist() == list(range(12)) and [Path(v2.rows.name(i)).parent.name for i in (2, 10)] == ["2", "10"]
    assert len(v2.classes) == 12


def test_a_missing_folder_of_imagenet_v2_moves_no_other_class(place):
    for k in (0, 1, 10, 2):
        write(place / "imagenet-v2" / str(k) / "a.jpeg", k)
    v2 = read("imagenet-v2", "test")
    assert v2.labels.tolist() == [0, 1, 2, 10] and len(v2.classes) == 11


def test_the_paper_trains_on_flowers_train_and_valid(opened):
    data = opened("flowers-102")
    numbers = [Path(data.found.rows.name(i)).stem for i in range(7)]
    assert numbers == [f"image_{n:05d}" for n in (10, 2, 3, 9, 5, 6, 7)] and len(data.classes) == 102


def test_the_paper_trains_on_both_splits_of_flowers_in_parquet_too(place):
    parquet(place / "flowers-102", splits=(("train", [0, 1]), ("validation", [2, 2, 2]), ("test", [0, 1])))
    assert read("flowers-102").labels.tolist() == [0, 1, 2, 2, 2]
    assert read("flowers-102", "test").labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("name", "train", "test", "classes"),
    [
        ("imagenet-1k", {1_281_167}, {50_000}, 1000),
        ("inaturalist-2018", {437_513}, {24_426}, 8142),
        ("inaturalist-2019", {265_240, 265_213}, {3_003, 3_030}, 1010),
        ("flowers-102", {2_040}, {6_149}, 102),
        ("stanford-cars", {8_144}, {8_041}, 196),
        ("cifar-100", {50_000}, {10_000}, 100),
        ("cifar-10", {50_000}, {10_000}, 10),
    ],
)
def test_published_counts_are_those_of_table_9(name, train, test, classes):
    own = about(name)
    assert ({*own["sizes"]["train"]}, {*own["sizes"]["test"]}, own["num_classes"]) == (train, test, classes)


def test_counts_that_differ_from_the_published_ones_are_refused(root, monkeypatch):
    monkeypatch.setenv("VITLIB_DATA", str(root))
    with pytest.raises(UsageError, match="stanford-cars test has 3 images of 3 classes, published are 8,041 of 196"):
        read("stanford-cars", "test", check=True)


def refusal(name, split="train", check=False) -> str:
    with pytest.raises(UsageError) as refused:
        read(name, split, check)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_data_set_that_is_not_there_says_where_it_was_looked_for(place):
    said = refusal("imagenet-1k")
    assert str(place / "imagenet-1k") in said and "VITLIB_DATA" in said and "data_cards/imagenet-1k.md" in said
    class_folders(place / "imagenet-1k")
    assert len(read("imagenet-1k").labels) == 7
    assert "allowed are train and test" in refusal("imagenet-1k", "validation")
    assert "has no split 'test'" in refusal("cifar-100", "test") if (place / "cifar-100").mkdir() is None else None


def test_an_image_that_a_list_names_and_that_is_not_there_is_named(place):
    inaturalist(place / "inaturalist-2018")
    (place / "inaturalist-2018" / "train_val2018" / "Aves" / "0" / "train1.jpg").unlink()
    found = read("inaturalist-2018")
    with pytest.raises(UsageError, match=r"no file .*train1.jpg"):
        found.checksum()
    with pytest.raises(UsageError, match=r"train1.jpg cannot be read \(FileNotFoundError\)"):
        decode(found.rows, 1)


def test_an_annotation_that_leads_out_of_the_folder_is_refused(place):
    inaturalist(place / "inaturalist-2018")
    file = place / "inaturalist-2018" / "train2018.json"
    file.write_text(file.read_text().replace("train_val2018/Aves/0/train0.jpg", "../../x.png"))
    assert "names ../../x.png: allowed are files in" in refusal("inaturalist-2018")


def test_an_archive_beside_its_unpacked_folders_is_not_read(place):
    class_folders(place / "imagenet-1k")
    (place / "imagenet-1k" / "imagenet_train.tar").write_bytes(b"an archive")
    assert len(read("imagenet-1k").labels) == 7


def shard(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_webdataset_shards_have_images_of_any_kind_capitals_and_dots_in_their_names(place):
    kinds = {"a.JPEG": "JPEG", "b.png": "PNG", "c.v2.jpg": "JPEG", "d.Webp": "WEBP"}
    members = [(name, encoded(i, form)) for i, (name, form) in enumerate(kinds.items())]
    labels = [(f"{name.rpartition('.')[0]}.cls", str(i % 2).encode()) for i, name in enumerate(kinds)]
    shard(place / "imagenet-1k" / "imagenet-train-0.tar", [*members, *labels])
    found = read("imagenet-1k")
    assert found.labels.tolist() == [0, 1, 0, 1] and [decode(found.rows, i).size for i in range(4)] == [(24, 20)] * 4
    shard(place / "imagenet-1k" / "imagenet-train-0.tar", [*members, *labels[:3]])
    assert "do not hold a .cls with a label" in refusal("imagenet-1k")


def test_a_folder_of_webdataset_shards_is_opened_as_any_folder_of_ones_own(tmp_path):
    webdataset(tmp_path / "birds")
    shard(tmp_path / "birds" / "birds-test-0000.tar", [("0.png", encoded(0, "PNG")), ("0.cls", b"0")])
    train, test = (open_folder(tmp_path / "birds", split, 16) for split in ("train", "test"))
    assert [len(train), len(test)] == [4, 1]  # of each class one image is held out
    assert test.classes == train.classes == ("0", "1", "2")  # those of the training images


def test_damaged_containers_are_named(place):
    inaturalist(place / "inaturalist-2018")
    (place / "inaturalist-2018" / "train2018.json").write_text('{"images": []}')
    assert "train2018.json" in refusal("inaturalist-2018")
    cars(place / "stanford-cars")
    (place / "stanford-cars" / "stanford_cars" / "devkit" / "cars_meta.mat").unlink()
    assert "cars_meta.mat" in refusal("stanford-cars")
    (place / "cifar-100").mkdir()
    (place / "cifar-100" / "train.tar").write_bytes(b"no archive")
    assert "train.tar is damaged" in refusal("cifar-100")


def test_cifar_with_other_md5_sums_is_not_unpickled(root, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("VITLIB_DATA", str(root))
    monkeypatch.setattr(pickle, "load", lambda *a, **k: pytest.fail("a file was unpickled"))
    published._cifar.cache_clear()
    assert "MD5" in refusal("cifar-10")


# ------------------------------------------------------------------------------------------------- held and measured


CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def numbered(label: int, number: int, side: int = 32) -> bytes:
    """One of ten brightnesses, of the class, and a bright pixel that numbers the picture."""
    pixels, file = np.full((side, side, 3), 20 * label, np.uint8), io.BytesIO()
    pixels[number // side, number % side] = 255
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def one_table(path: Path, a_class: int, image: str = "image") -> None:
    images = [{"bytes": numbered(label, number), "path": None} for number in range(a_class) for label in range(10)]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({image: images, "label": list(range(10)) * a_class}), path)


def ten_folders(path: Path, a_class: int) -> None:
    for label, name in enumerate(CLASSES):
        (path / name).mkdir(parents=True)
        for number in range(a_class):
            (path / name / f"{number:03}.png").write_bytes(numbered(label, number))


def test_parquet_files_shards_and_class_folders_give_the_same_images(place, monkeypatch, tmp_path):
    one_table(place / "cifar-10" / "train.parquet", 20)
    one_table(place / "cifar-10" / "test.parquet", 2)
    one = {split: load("cifar-10", split) for split in cards.SPLITS}
    assert [len(one[s]) for s in cards.SPLITS] == [180, 20, 20]  # one in ten of each class is held out
    for split, a_class in (("train", 18), ("validation", 2), ("test", 2)):
        assert np.bincount(one[split].labels).tolist() == [a_class] * 10
    last = one["validation"].images[one["validation"].labels == 3]
    assert sorted(int(image[0].flatten().argmax()) for image in last) == [18, 19]  # the last ones of the class
    for form in ("shards", "folders"):
        monkeypatch.setenv("VITLIB_DATA", str(tmp_path / form))
        folder = tmp_path / form / "cifar10"
        if form == "shards":
            one_table(folder / "data" / "train-00000-of-00001.parquet", 20, image="img")
            one_table(folder / "data" / "test-00000-of-00001.parquet", 2, image="img")
        else:
            ten_folders(folder / "train", 20)
            ten_folders(folder / "test", 2)
        other = load("cifar-10", "train")
        assert sorted(map(bytes, other.images.numpy())) == sorted(map(bytes, one["train"].images.numpy()))
        assert other.classes == (CLASSES if form == "folders" else tuple("0123456789"))


@pytest.mark.parametrize("name", ["cifar-10", "cifar10"])
def test_images_in_memory_and_images_read_from_files_are_those_of_one_folder(place, name):
    """Profiles photos and imagenet; the card has both names."""
    with pytest.raises(published.DataAbsent, match=f"looked for {place / 'cifar-10'} or {place / 'cifar10'} "):
        read("cifar-10")
    for split, a_class in (("train", 20), ("test", 2)):
        ten_folders(place / name / split, a_class)
    held, found = load("cifar-10", "test"), read("cifar-10", "test")
    assert (found.classes, found.labels.tolist()) == (held.classes, held.labels.tolist())
    assert all(np.array_equal(decode(found.rows, i), held.images[i].permute(1, 2, 0)) for i in range(20))
    assert source("cifar-10", streamed=True).checksum != source("cifar-10").checksum


def test_what_is_measured_is_what_the_pixels_say_and_is_kept(place, tmp_path):
    one_table(place / "cifar-10" / "train.parquet", 20)
    one_table(place / "cifar-10" / "test.parquet", 2)
    known, pixels = source("cifar-10").facts, load("cifar-10", "train").images.double() / 255
    assert (known.channels, known.num_classes, known.image_size) == (3, 10, 32)
    assert known.sizes == {"train": 180, "validation": 20, "test": 20}
    assert known.mean == pytest.approx((pixels.mean().item(),) * 3, abs=1e-5)
    assert known.std == pytest.approx((pixels.std(unbiased=False).item(),) * 3, abs=1e-5)
    (kept,) = (tmp_path / "outputs" / "data").glob("*.json")
    cards._measured.cache_clear()
    cards._arrays.cache_clear()
    kept.write_text(kept.read_text().replace('"num_classes": 10', '"num_classes": 11'))
    assert source("cifar-10").facts.num_classes == 11  # read, not measured again
    before = source("cifar-10").checksum
    one_table(place / "cifar-10" / "test.parquet", 3)
    assert source("cifar-10").facts.sizes["test"] == 30 and source("cifar-10").checksum != before


def test_a_card_without_a_place_on_the_hub_is_measured_in_its_folder_and_anew_when_a_file_changes(
    place, monkeypatch, tmp_path
):
    for module in (cards, published):
        monkeypatch.setattr(module, "DATA_CARDS", tmp_path)
    card = "---\npretty_name: Marks\nvitlib:\n  channels: 3\n  splits: {train: [train], test: [test]}\n---\n"
    (tmp_path / "marks.md").write_text(card)
    with pytest.raises(published.DataAbsent, match=f"data set 'marks' is not there: looked for {place / 'marks'} "):
        source("marks")
    answers = []
    for a_class in (2, 3):
        for split in ("train", "test"):
            one_table(place / "marks" / f"{split}.parquet", a_class)
        answers.append(source("marks"))
    assert [one.facts.sizes["test"] for one in answers] == [20, 30] and answers[0].checksum != answers[1].checksum
    assert cards.title_of("marks") == "Marks"


@pytest.mark.parametrize("linked", [False, True])
def test_other_images_under_the_same_folders_are_other_data_linked_or_not(place, tmp_path, linked):
    folder = tmp_path / "elsewhere" if linked else place / "cifar-10"
    (place / "cifar-10").mkdir(parents=True)
    answers = []
    for side in (8, 12):
        for split in ("train", "test"):
            for k in range(20):
                file = folder / split / "cat dog".split()[k % 2] / f"{k}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(numbered(k % 2, k, side))
            if linked and not (place / "cifar-10" / split).exists():
                (place / "cifar-10" / split).symlink_to(folder / split)
        answers.append((source("cifar-10").checksum, source("cifar-10").facts.image_size))
    assert answers[0][0] != answers[1][0] and [size for _, size in answers] == [8, 12]


@pytest.mark.parametrize("what, says", {
    "nowhere": "data set 'cifar-10' is not there: looked for",
    "no test split": "has no split 'test'",
    "two sizes": "have 2 sizes (32x32, 40x40, ...): allowed is one size throughout",
    "broken image": "cat/000.png cannot be read",
    "empty class": "1 of 10 class folders in",
    "other classes": "differ in 1 names, the first is cat",
    "torn file": "train.parquet is damaged",
}.items())  # fmt: skip
def test_bad_data_is_one_sentence_that_names_it(place, what, says):
    folder = place / "cifar-10"
    if what == "torn file":
        one_table(folder / "train.parquet", 2)
        (folder / "train.parquet").write_bytes((folder / "train.parquet").read_bytes()[:-50])
    elif what != "nowhere":
        ten_folders(folder / "train", 2)
    if what not in ("nowhere", "no test split"):
        ten_folders(folder / "test", 1)
    image = folder / "test" / "cat" / "000.png"
    if what == "two sizes":
        image.with_name("x.png").write_bytes(numbered(0, 0, 40))
    if what == "broken image":
        image.write_bytes(b"no image")
    if what in ("empty class", "other classes"):
        image.unlink()
    if what == "other classes":
        image.parent.rmdir()
    with pytest.raises(UsageError) as said:
        source("cifar-10")
    assert says in str(said.value) and "\n" not in str(said.value)
    assert isinstance(said.value, published.DataAbsent) == (what == "nowhere")


def test_a_folder_of_ones_own_is_a_source_without_a_card(tmp_path):
    class_folders(tmp_path / "pets", test="test")
    pets = source(tmp_path / "pets")
    assert pets.facts.sizes == {"train": 4, "validation": 3, "test": 3} and pets.facts.num_classes == 3
    assert source(str(tmp_path / "pets")).checksum == pets.checksum
    held, streamed = pets.open("train", 16), source(tmp_path / "pets", streamed=True).open("train", 16, Augment())
    assert (held.streamed, streamed.streamed, len(held), len(streamed)) == (False, True, 4, 4)
    with pytest.raises(UsageError, match="has 3 classes, 10 are expected"):
        pets.open("test", 16, num_classes=10)
    write(tmp_path / "pets" / "train" / "n01" / "000.JPEG", 77)
    assert source(tmp_path / "pets").checksum != pets.checksum


def test_a_folder_of_ones_own_is_the_data_of_a_profile_and_its_page(tmp_path, monkeypatch):
    from lab.report import notebook

    class_folders(tmp_path / "pets", test="test")
    shown = []
    monkeypatch.setattr(notebook, "display", lambda what: shown.append(what.data))
    p = replace(profiles.PROFILES["smoke"], data=str(tmp_path / "pets"), images=None)
    monkeypatch.setitem(profiles.PROFILES, "smoke", p)
    page = notebook.open_page("31", "smoke")
    assert {arm.spec.model.num_classes for arm in page.experiment.arms.values()} == {3}
    assert "`smoke`**: pets at 16 pixels" in shown[0] and tables.data_names(page.experiment.finished()) == "pets"


# ------------------------------------------------------------------------------------------------- runs


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A run on stand-ins that are as large as what was published, and the folder of its data."""
    monkeypatch.setenv("VITLIB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("VITLIB_DATA", str(tmp_path / "data"))
    own = about("imagenet-1k") | {"sizes": {"train": [len(TRAIN)], "test": [len(TEST)]}, "num_classes": 3}
    real = cards.card
    monkeypatch.setattr(cards, "card", lambda name: {"vitlib": own} if name == "imagenet-1k" else real(name))
    model = vit_config("W32-1x1/8", image_size=16, in_chans=3, num_classes=3)
    return RunSpec(
        "supervised", model, "imagenet-1k", recipe(4, augment=Augment()), streamed=True
    ), tmp_path / "data" / "imagenet-1k"


def test_a_run_has_its_name_without_the_data_and_says_which_files_it_read(stand_in, tmp_path, monkeypatch):
    spec, folder = stand_in
    name = spec.hash
    class_folders(folder)
    assert replace(spec).hash == name != replace(spec, data="imagenet-v2").hash
    result = execute.execute(spec)
    kept = {split: read("imagenet-1k", split).checksum() for split in ("train", "test")}
    assert result.hash == name and result.files == store.find(spec).files == kept
    assert "files" not in results.ABOUT  # an older result without it is read too
    store.export_runs(tmp_path / "runs.jsonl")
    monkeypatch.setenv("VITLIB_RUNS", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("VITLIB_DATA", str(tmp_path / "nothing"))
    assert store.import_runs(tmp_path / "runs.jsonl") == (1, 0) and store.find(replace(spec)).files == kept


def test_runs_that_belong_together_and_read_other_files_are_named(stand_in, recwarn):
    spec, folder = stand_in
    class_folders(folder)
    execute.execute(spec)
    tuned = replace(spec, protocol="finetune", parent=spec)
    execute.execute(tuned)
    assert not [w for w in recwarn if "different files" in str(w.message)]
    file = folder / "train" / "n01" / "000.JPEG"
    file.write_bytes(file.read_bytes() + b"x")
    other = replace(tuned, seed=1, parent=spec)
    names = ", ".join(sorted((spec.hash, other.hash)))
    with pytest.warns(UserWarning, match=f"the runs {names} read different files of imagenet-1k, split train"):
        execute.execute(other)
    assert store.find(other).files["test"] == store.find(spec).files["test"]


def test_absent_data_leave_the_other_notebooks_running_and_their_parts_not_run(place):
    p = profiles.profile("photos")
    there, absent = catalogue.available(p, catalogue.NOTEBOOKS)
    assert {one.number for one in there} >= {"00", "21", "36", "51"} and "41" not in {one.number for one in there}
    (said,) = [str(fault) for fault in absent if isinstance(fault, published.DataAbsent)]
    assert str(place / "tiny-imagenet") in said and "data_cards/tiny-imagenet.md" in said
    mine = [catalogue.notebook("31"), catalogue.notebook("42")]
    assert catalogue.available(profiles.profile("cpu"), mine) == (mine, [])


def test_reproduce_names_absent_data_before_any_run_and_still_renders_the_others(place, monkeypatch, capsys):
    rendered = []
    monkeypatch.setattr(
        render, "reproduce", lambda profile, notebooks, specs, *rest: rendered.append((list(notebooks), list(specs)))
    )
    code = main(["reproduce", "--profile", "photos", "--notebook", "31", "--notebook", "21"])
    said = capsys.readouterr().err.splitlines()
    assert (
        code == 2
        and "data set 'tiny-imagenet' is not there" in said[0]
        and "a part of profile photos could not be run" in said[1]
    )
    assert [specs for _, specs in rendered] == [[]] and len(rendered[0][0]) == 1


def test_every_arm_of_photos_runs_where_there_is_a_gpu_and_the_ledgers_arms_are_there(place):
    one_table(place / "tiny-imagenet" / "train.parquet", 20)
    one_table(place / "tiny-imagenet" / "valid.parquet", 2)
    p = replace(profiles.profile("photos"), control_images=20)
    for number in ("31", "41", "52"):
        arms = catalogue.experiment(catalogue.notebook(number), p).arms
        assert arms and {member.device for arm in arms.values() for member in arm.spec.family()} == {"auto"}
        for part in (part.at_profile("photos") for part in ledger().parts.values() if part.notebook == number):
            if "photos" in part.n and part.kind != "ratio":
                assert {*part.arms} <= {*arms}, part.id


PHOTOGRAPHS = paths.ROOT.parent / "shared" / "data"


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="the photographs of ../shared/data are not here")
def test_a_short_run_of_profile_photos_on_photographs(place, monkeypatch, tmp_path):
    """On the first of them, which decode in a second or two."""
    for name, splits in (("tiny-imagenet-100", ("train", "validation")),):
        (place / name).mkdir(parents=True)
        for split in splits:
            first = pq.read_table(PHOTOGRAPHS / name / f"{split}.parquet").slice(0, 3000)
            pq.write_table(first, place / name / f"{split}.parquet")
    monkeypatch.setenv("VITLIB_RUNS", str(tmp_path / "runs"))
    p = replace(profiles.profile("photos"), seeds=(1000,), images=500, epochs=1, width=32, pairs=2)
    (spec,) = (arm.spec for arm in small.resolution(p) if arm.column == "attn")
    spec = replace(spec, images=200).with_seed(1000)
    for member in spec.family():
        result = execute.execute(member)
    assert len(result.correct) == source("tiny-imagenet").facts.sizes["validation"]
    assert result.about["split"] == "validation"
    assert result.metrics["trained_params"] < sum(t.numel() for t in store.weights(spec).values()) / 2


# ---- files from anywhere


def annotated(folder, **changes):
    """A folder of iNaturalist with one image of two classes, and what its annotation file says differently."""
    write(folder / "images" / "1.png", 1)
    record = {
        "images": [{"id": 1, "file_name": "images/1.png"}],
        "annotations": [{"image_id": 1, "category_id": 7}],
        "categories": [{"id": 7, "name": "oak"}, {"id": 9, "name": "elm"}],
    }  # fmt: skip
    (folder / "train2018.json").write_text(json.dumps(record | changes))


ANNOTATIONS = {
    "a number for a path": ({"images": [{"id": 1, "file_name": 5}]}, "names 5: allowed are files in"),
    "no path": ({"images": [{"id": 1, "file_name": ""}]}, "allowed are files in"),
    "a path with a zero": ({"images": [{"id": 1, "file_name": "a\0b"}]}, "allowed are files in"),
    "a path of half a character": ({"images": [{"id": 1, "file_name": "\ud800"}]}, "allowed are files in"),
    "a folder's name for all": ({"images": 5}, "is not an annotation file"),
    "classes that have no order": ({"categories": [{"id": 1, "name": "a"}, {"id": "b", "name": "b"}]}, "is not an annotation file"),
    "a class without a name": ({"categories": [{"id": 7}]}, "is not an annotation file"),
    "no annotation": ({"annotations": []}, "is empty: allowed are one image and more"),
    "an image that is not listed": ({"annotations": [{"image_id": 2, "category_id": 7}]}, "is not an annotation file"),
}  # fmt: skip


@pytest.mark.parametrize("what", ANNOTATIONS)
def test_an_odd_annotation_file_is_one_sentence(what, tmp_path):
    annotated(tmp_path)
    assert len(published.read_inaturalist(tmp_path, ("train",)).labels) == 1
    changes, said = ANNOTATIONS[what]
    annotated(tmp_path, **changes)
    with pytest.raises(UsageError, match=said) as error:
        published.read_inaturalist(tmp_path, ("train",))
    assert "\n" not in str(error.value) and "\0" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "5", "null", "{}", "[" * 99_999])
def test_a_file_that_is_no_annotation_file_is_one_sentence(text, tmp_path):
    (tmp_path / "train2018.json").write_text(text)
    with pytest.raises(UsageError, match=r"train2018\.json is not an annotation file of iNaturalist"):
        published.read_inaturalist(tmp_path, ("train",))


@pytest.mark.parametrize("content", ["nothing", "garbage", "no key", "short", "a class of none", "out of the folder"])
def test_an_odd_devkit_of_stanford_cars_is_one_sentence(content, tmp_path):
    cars = tmp_path / "stanford_cars"
    (cars / "cars_train").mkdir(parents=True)
    (cars / "devkit").mkdir()
    table = cars / "devkit" / "cars_train_annos.mat"
    savemat(cars / "devkit" / "cars_meta.mat", {"class_names": np.array(["a", "b"], object)})
    rows = {"fname": "1.jpg", "class": 9 if content == "a class of none" else 1}
    if content == "out of the folder":
        rows["fname"] = "../../../secret.jpg"
    if content in ("a class of none", "out of the folder"):
        savemat(table, {"annotations": np.array([tuple(rows.values())] * 2, [(name, object) for name in rows])})
    elif content in ("no key", "short"):
        savemat(table, {"annotations" if content == "short" else "x": np.zeros(3)})
    else:
        table.write_bytes(b"" if content == "nothing" else b"MATLAB 5.0 MAT-file" * 99)
    with pytest.raises(
        UsageError, match=r"is not complete, or|names class 8: allowed are 0 to 1|allowed are files in"
    ) as error:
        published.read_torchvision(tmp_path, ("train",))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no dashes",
        "---\n- a list\n---\n",
        "---\na: [\n---\n",
        "---\na: 1\n---\n",
        "---\n!!python/object/apply:os.getcwd []\n---\n",
        "---\n\tvitlib: {}\n---\n",
        "---\nvitlib: {mean: 1, mean: 2}\n---\n",
        "---\na: &a [1, 1]\nvitlib: {b: [*a, *a]}\n---\n",
    ],
)
def test_a_broken_card_is_one_sentence(text, tmp_path):
    (tmp_path / "odd.md").write_text(text)
    with pytest.raises(UsageError, match=r"odd\.md is no data card") as error:
        published.read_card(tmp_path / "odd.md")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [16, 28])
def test_a_batch_of_grey_images_is_not_taken_for_channels_last(size):
    """With one channel its strides alone decide, and kernels for channels-last round in another way."""
    images = cards.source("fashion-mnist").open("train", size)
    batch = next(images.epoch_batches(np.arange(8), 0, 0, recipe(8)))
    assert batch.images.stride() == torch.empty(batch.images.shape).stride()
