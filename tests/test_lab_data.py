"""Data sets by name: the embedded ones and their cards, folders of the paper's data in every layout, runs on them."""

import gzip
import importlib.util
import io
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pictures import TEST, TRAIN, class_folders, encoded, parquet, picture, write
from PIL import Image
from scipy.io import savemat

from lab import paths
from lab.data import cards, published
from lab.data.cards import load, load_resized, source
from vitlib.data import Augment, subset
from vitlib.data.read import read_parquet
from vitlib.errors import UsageError
from vitlib.model import ViT, vit_config
from vitlib.train import loop
from vitlib.train.recipe import Recipe
from vitlib.train.supervised import loss_of

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
    assert others == set(
        "imagenet-1k imagenet-v2 inaturalist-2018 inaturalist-2019 cifar-10 cifar-100 stanford-cars flowers-102 "
        "tiny-imagenet".split()
    )
    for name in others - {"cifar-10", "tiny-imagenet"}:
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
    """torchvision refuses CIFAR files without the published MD5 sums, which a stand-in cannot have."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: Path(path).is_file())
    published._cifar.cache_clear()


@pytest.fixture
def opened(root, monkeypatch):
    """A split of a stand-in, opened as the data set of the paper that it stands for, whatever its size."""
    monkeypatch.setenv("VITLIB_DATA", str(root))
    monkeypatch.setattr(published, "check_counts", lambda *of: None)

    def open_(name, split="train", **options):
        monkeypatch.setitem(published.PUBLISHED, name, published.PUBLISHED.get(name, published.Published()))
        known = cards.Facts(3, 3, 0, **cards.COLOUR, sizes={})
        return cards._open_published(name, known, split, 16, options.get("augment"), 0)

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
    correct, loss = loop.evaluate(model, opened(name, "test"), batch_size=2)
    assert correct.shape == (3,) and np.isfinite(loss)


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
