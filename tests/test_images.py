"""Images that are read as they are needed: every layout, the views of an image, and the batches of an epoch."""

import io
import json
import pickle
import random
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from scipy.io import savemat

from lab.data import readers
from lab.runs import execute, results, store
from lab.runs.spec import RunSpec
from vitlib import data as both_kinds
from vitlib.data import Shard, subset, views
from vitlib.data import read as rows
from vitlib.data import stream as images
from vitlib.data.augment import Augment
from vitlib.data.stream import epoch_batches, epoch_order, evaluation_batches, mix_pair, open_images
from vitlib.errors import UsageError
from vitlib.model import ViT, vit_config
from vitlib.train import loop, tokenizers
from vitlib.train.dvae import DVAE, DVAEConfig
from vitlib.train.masked import MaskedLoss, MaskedViT
from vitlib.train.recipe import Recipe
from vitlib.train.supervised import loss_of

TRAIN, TEST = [0, 0, 0, 1, 1, 2, 2], [0, 1, 2]  # labels of every stand-in, in the order of the split
WILD = Augment(policy="rand-m7-mstd0.5-inc1", erasing=0.5, view_size=8)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def picture(number: int, side: tuple[int, int] = (24, 20)) -> Image.Image:
    """A picture of its own for every number: 24x20 pixels of noise on a colour."""
    noise = np.random.default_rng(number).integers(0, 120, (side[1], side[0], 3))
    return Image.fromarray((noise + np.array([37, 61, 17]) * number % 120).astype(np.uint8))


def encoded(number: int, form: str = "JPEG") -> bytes:
    file = io.BytesIO()
    picture(number).save(file, form, quality=95)
    return file.getvalue()


def write(path: Path, number: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(number))
    return path


# ------------------------------------------------------------------------------------------------- stand-ins


def class_folders(folder, names=("n01", "n02", "n03"), test="val"):
    for split, labels in (("train", TRAIN), (test, TEST)):
        for number, label in enumerate(labels):
            write(folder / split / names[label] / f"{number:03d}.JPEG", number)


def parquet(folder, image="image", label="label", splits=(("train", TRAIN), ("test", TEST)), shards=2):
    (folder / "data").mkdir(parents=True)
    for split, labels in splits:
        for shard, part in enumerate(np.array_split(np.arange(len(labels)), shards)):
            cells = [{"bytes": encoded(i), "path": f"{i}.jpg"} for i in part]
            table = pa.table({image: cells, label: [labels[i] for i in part]})
            pq.write_table(table, folder / "data" / f"{split}-{shard:05d}-of-00002.parquet")


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


STAND_INS = {  # name: (how it is made, the word for its test split)
    "birds": (class_folders, "val"),
    "imagenet-1k": (class_folders, "test"),
    "parquet": (parquet, "test"),
    "webdataset": (webdataset, "test"),
    "inaturalist-2018": (inaturalist, "test"),
    "inaturalist-2019": (lambda folder: inaturalist(folder, 2019), "test"),
    "cifar-10": (cifar, "test"),
    "cifar-100": (lambda folder: cifar(folder, "cifar-100-python", "fine_labels", "meta", "fine_label_names"), "test"),
    "stanford-cars": (cars, "test"),
    "flowers-102": (flowers, "test"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, (make, _) in STAND_INS.items():
        make(folder / name)
    return folder


@pytest.fixture(autouse=True)
def any_pickle(monkeypatch):
    """torchvision refuses CIFAR files without the published MD5 sums, which a stand-in cannot have."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: Path(path).is_file())


@pytest.fixture
def opened(root, tmp_path_factory):
    cache = root / ".cache"

    def open_(name="birds", split="train", **options):
        return open_images(name, split, 16, root=root, check_counts=False, cache_dir=cache, **options)

    return open_


# ------------------------------------------------------------------------------------------------- every layout


@pytest.mark.parametrize("name", STAND_INS)
def test_an_epoch_of_every_layout_has_each_image_once_with_its_label(name, opened):
    data = opened(name)
    batches = list(epoch_batches(data, np.arange(len(data)), 0, 0, 4, augment=Augment()))
    assert [len(b.index) for b in batches] == [4, 3] and data.labels.tolist() == TRAIN
    index = np.concatenate([b.index for b in batches])
    assert sorted(index) == list(range(7)) and index.tolist() != list(range(7))
    for batch in batches:
        assert batch.images.shape[1:] == (3, 16, 16) and batch.images.dtype == torch.float32
        assert batch.targets.tolist() == [TRAIN[i] for i in batch.index]


@pytest.mark.parametrize("name", STAND_INS)
def test_evaluation_of_every_layout_is_the_splits_pictures_in_order(name, opened):
    data = opened(name, STAND_INS[name][1])
    batches = list(evaluation_batches(data, 2))
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
    recipe = Recipe(epochs=1, batch_size=4, lr=1e-3, augment=WILD, mixup=0.8, cutmix=1.0, repeats=3, loss="bce")
    history = loop.train(model, recipe, data, np.arange(7), 0, loss_of(recipe))
    assert [step.step for step in history] == [1, 2]
    correct, loss = loop.evaluate(model, opened(name, STAND_INS[name][1]), batch_size=2)
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
            assert len(list(evaluation_batches(data, 4))) == 2
        assert len(decoded) == 14


def test_a_hub_name_goes_through_datasets(opened, monkeypatch):
    import datasets

    table = datasets.Dataset.from_dict(
        {"img": [{"bytes": encoded(i), "path": None} for i in range(3)], "fine_label": TEST, "coarse_label": [9, 9, 9]},
        features=datasets.Features(
            img=datasets.Image(),
            fine_label=datasets.ClassLabel(names=["x", "y", "z"]),
            coarse_label=datasets.Value("int64"),
        ),
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda name, cache_dir: {"train": table, "valid": table})
    data = opened("someone/pictures", "validation")
    assert data.classes == ("x", "y", "z") and data.labels.tolist() == TEST
    assert len(next(evaluation_batches(data, 3)).images) == 3
    with pytest.raises(UsageError, match="no split 'test' on the Hub: there are train, valid"):
        opened("someone/pictures", "test")


def test_a_hub_name_without_the_hub_is_one_sentence(opened):
    with pytest.raises(UsageError, match=r"^someone/pictures cannot be read from the Hugging Face Hub: [^\n]*$"):
        opened("someone/pictures")


@pytest.mark.parametrize("inside", ["imagenet-v2", f"imagenet-v2/{readers.V2_FOLDER}", "imagenet-v2/test"])
def test_folder_k_of_imagenet_v2_is_class_k(tmp_path, inside):
    for k in (0, 1, 10, 2, 11, 3, 4, 5, 6, 7, 8, 9):
        write(tmp_path / inside / str(k) / "a.jpeg", k)
    v2 = open_images("imagenet-v2", "test", 16, root=tmp_path, check_counts=False, num_classes=12)
    assert v2.labels.tolist() == list(range(12)) and [Path(v2.rows.name(i)).parent.name for i in (2, 10)] == ["2", "10"]
    assert next(evaluation_batches(v2, 12)).targets.tolist() == list(range(12))


def test_a_missing_folder_of_imagenet_v2_moves_no_other_class(tmp_path):
    for k in (0, 1, 10, 2):
        write(tmp_path / "imagenet-v2" / str(k) / "a.jpeg", k)
    v2 = open_images("imagenet-v2", "test", 16, root=tmp_path, check_counts=False)
    assert v2.labels.tolist() == [0, 1, 2, 10] and len(v2.classes) == 11


def test_numbered_class_folders_of_other_data_count_in_the_order_of_their_numbers(tmp_path):
    class_folders(tmp_path / "numbers", ("1", "2", "10"))
    assert open_images("numbers", "train", 16, root=tmp_path).classes == ("1", "2", "10")


def test_the_paper_trains_on_flowers_train_and_valid(opened):
    data = opened("flowers-102")
    numbers = [Path(data.rows.name(i)).stem for i in range(7)]
    assert numbers == [f"image_{n:05d}" for n in (10, 2, 3, 9, 5, 6, 7)] and len(data.classes) == 102


def test_the_paper_trains_on_both_splits_of_flowers_in_parquet_too(tmp_path):
    parquet(tmp_path / "flowers-102", splits=(("train", [0, 1]), ("validation", [2, 2, 2]), ("test", TEST)))
    options = {"root": tmp_path, "check_counts": False, "cache_dir": tmp_path / "cache"}
    assert open_images("flowers-102", "train", 16, **options).labels.tolist() == [0, 1, 2, 2, 2]
    assert open_images("flowers-102", "test", 16, **options).labels.tolist() == TEST


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
    assert readers.expected(name, "train") == (train, classes) and readers.expected(name, "test") == (test, classes)


def test_counts_that_differ_from_the_published_ones_are_refused(root):
    with pytest.raises(UsageError, match="stanford-cars test has 3 images of 3 classes, published are 8,041 of 196"):
        open_images("stanford-cars", "test", 16, root=root)


# ------------------------------------------------------------------------------------------------- bad input


def refusal(**options) -> str:
    with pytest.raises(UsageError) as refused:
        open_images(options.pop("name", "birds"), options.pop("split", "train"), 16, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_data_set_that_is_not_there_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("VITLIB_DATA", str(tmp_path))
    said = refusal(name="imagenet-1k")
    assert str(tmp_path / "imagenet-1k") in said and "VITLIB_DATA" in said and "data_cards/imagenet-1k.md" in said
    class_folders(tmp_path / "birds")
    assert len(open_images("birds", "train", 16)) == 7


def test_an_image_that_a_list_names_and_that_is_not_there_is_named(tmp_path):
    inaturalist(tmp_path / "inaturalist-2018")
    (tmp_path / "inaturalist-2018" / "train_val2018" / "Aves" / "0" / "train1.jpg").unlink()
    data = open_images("inaturalist-2018", "train", 16, root=tmp_path, check_counts=False)
    with pytest.raises(UsageError, match=r"no file .*train1.jpg"):
        _ = data.checksum
    with pytest.raises(UsageError, match=r"train1.jpg cannot be read \(FileNotFoundError\)"):
        list(evaluation_batches(data, 7))


def test_sizes_of_files_are_asked_for_once_and_only_for_the_checksum(opened, monkeypatch):
    asked, listing = [], rows.Files.listing
    monkeypatch.setattr(rows.Files, "listing", lambda files: (asked.append(len(files)), listing(files))[1])
    data = opened()
    assert len(list(epoch_batches(data, np.arange(7), 0, 0, 4))) == 2 and not asked
    assert data.checksum == data.checksum and asked == [7]
    assert data.take([0, 1]).checksum != data.checksum and asked == [7, 2]


@pytest.mark.parametrize("gpu", [False, True])
def test_batches_wait_in_pinned_memory_where_they_go_to_a_gpu(opened, monkeypatch, gpu):
    """Without a GPU there is no such memory: what is asked for is counted."""
    asked, pinned = [], []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: gpu)
    loader = images.DataLoader
    monkeypatch.setattr(
        images, "DataLoader", lambda *a, pin_memory, **k: (asked.append(pin_memory), loader(*a, **k))[1]
    )
    (batch,) = epoch_batches(opened(), np.arange(7), 0, 0, 7, augment=WILD)
    assert asked == [gpu]
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: (pinned.append(tensor.shape), tensor)[1])
    again = torch.utils.data._utils.pin_memory.pin_memory(batch)  # what the loader does with a batch
    assert set(pinned) == {batch.images.shape, batch.targets.shape, batch.view.shape} and again.index is batch.index


def test_an_archive_beside_its_unpacked_folders_is_not_read(tmp_path):
    class_folders(tmp_path / "birds")
    (tmp_path / "birds" / "birds_train.tar").write_bytes(b"an archive")
    assert len(open_images("birds", "train", 16, root=tmp_path)) == 7


def test_a_missing_split_says_what_is_there(root):
    assert "no split 'test'" in (said := refusal(split="test", root=root)) and "train, val" in said
    assert "no split 'extra'" in refusal(name="parquet", split="extra", root=root)
    assert "no split 'extra'" in refusal(name="webdataset", split="extra", root=root)
    assert "allowed are train and test" in refusal(name="imagenet-1k", split="validation", root=root)


def test_a_folder_in_no_known_layout_says_what_it_holds(tmp_path):
    (tmp_path / "birds").mkdir()
    (tmp_path / "birds" / "notes.txt").write_text("")
    assert "holds notes.txt, and" in (said := refusal(root=tmp_path)) and "class folders" in said
    (tmp_path / "birds" / "train").mkdir()
    assert "no data set in a known form" in refusal(root=tmp_path)


def test_an_empty_class_folder_is_named(tmp_path):
    class_folders(tmp_path / "birds")
    (tmp_path / "birds" / "train" / "n04").mkdir()
    assert "1 of 4 class folders" in (said := refusal(root=tmp_path)) and "n04" in said


def test_splits_with_other_class_folders_are_refused(tmp_path):
    class_folders(tmp_path / "birds")
    write(tmp_path / "birds" / "train" / "n015" / "a.jpg", 0)
    assert "differ in 1 names, the first is n015" in refusal(split="val", root=tmp_path)


def test_another_number_of_classes_than_the_models_is_refused(root):
    assert "birds train has 3 classes, 1000 are expected" in refusal(num_classes=1000, root=root)


def test_a_table_without_an_image_or_with_unlabelled_rows_is_refused(tmp_path):
    parquet(tmp_path / "birds", image="picture")
    assert "has the columns picture, label" in refusal(root=tmp_path, cache_dir=tmp_path)
    folder = tmp_path / "owls"
    folder.mkdir()
    pq.write_table(pa.table({"image": [{"bytes": encoded(0), "path": ""}], "label": [-1]}), folder / "test-0.parquet")
    assert "does not hold a label" in refusal(name="owls", split="test", root=tmp_path, cache_dir=tmp_path)


def test_damaged_containers_are_named(tmp_path):
    (tmp_path / "birds").mkdir()
    (tmp_path / "birds" / "train.parquet").write_bytes(b"PAR1 no")
    assert "train.parquet" in refusal(root=tmp_path, cache_dir=tmp_path / "cache")
    inaturalist(tmp_path / "inaturalist-2018")
    (tmp_path / "inaturalist-2018" / "train2018.json").write_text('{"images": []}')
    assert "train2018.json" in refusal(name="inaturalist-2018", root=tmp_path, check_counts=False)
    cars(tmp_path / "stanford-cars")
    (tmp_path / "stanford-cars" / "stanford_cars" / "devkit" / "cars_meta.mat").unlink()
    assert "cars_meta.mat" in refusal(name="stanford-cars", root=tmp_path, check_counts=False)


def test_cifar_with_other_md5_sums_is_not_unpickled(root, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(pickle, "load", lambda *a, **k: pytest.fail("a file was unpickled"))
    assert "MD5" in refusal(name="cifar-10", root=root, check_counts=False)


@pytest.fixture
def damaged(tmp_path):
    """Two of ten training images: one cut off, one no image at all."""
    class_folders(tmp_path / "birds")
    cut = tmp_path / "birds" / "train" / "n01" / "001.JPEG"
    cut.write_bytes(cut.read_bytes()[:-200])
    (tmp_path / "birds" / "train" / "n03" / "006.JPEG").write_bytes(b"not an image")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_stops_the_epoch_and_is_named(damaged, workers):
    data = open_images("birds", "train", 16, root=damaged)
    with pytest.raises(UsageError, match=r"^\S*n01/001.JPEG cannot be read \(OSError\): [^\n]*$"):
        list(evaluation_batches(data, 4, workers=workers))


def test_unreadable_images_are_left_out_counted_and_named_if_the_caller_says_so(damaged):
    with pytest.warns(UserWarning, match="2 of 7 images of birds train cannot be read .* first is .*001.JPEG"):
        data = open_images("birds", "train", 16, root=damaged, skip_unreadable=True)
    assert len(data) == 5 and [Path(name).name for name in data.skipped] == ["001.JPEG", "006.JPEG"]
    assert data.labels.tolist() == [0, 0, 1, 1, 2] and len(list(evaluation_batches(data, 2))) == 3
    assert data.checksum != open_images("birds", "train", 16, root=damaged).checksum


def test_the_checksum_knows_names_sizes_and_labels_and_not_the_order_of_shards(tmp_path):
    def checksum(name):
        return open_images(name, "train", 16, root=tmp_path, cache_dir=tmp_path / "cache").checksum

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


WRONG = {
    "policy": "rand-7", "interpolation": "cubic", "crop_scale": (0.5, 0.1), "test_crop": 0, "erasing": 2, "color_jitter": -1,
    "view_size": 0,
}  # fmt: skip


@pytest.mark.parametrize("field", WRONG)
def test_an_augmentation_that_does_not_exist_is_refused(field):
    with pytest.raises(UsageError, match=str(field) if field != "policy" else "policy 'rand-7'"):
        Augment(**{field: WRONG[field]})


# ------------------------------------------------------------------------------------------------- views of an image


def viewed(augment, image=None, flipped=False, key=5, size=16):
    zero, one = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return views.TrainView(augment, size, zero, one)(image or picture(3, (60, 50)), flipped, key)


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
    augment = Augment(crop_scale=(1.0, 1.0), view_size=8, color_jitter=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(views, "ASPECT", (1.0, 1.0))
        image, view = viewed(augment, whole)
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
    augment = Augment(policy="3-augment", crop_scale=(1.0, 1.0))
    grey, solar = (np.asarray(op(image)) for op in (lambda i: ImageOps.grayscale(i).convert("RGB"), ImageOps.solarize))
    kinds = {"grey": 0, "solarized": 0, "blurred": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(views, "ASPECT", (1.0, 1.0))
        for key in range(60):
            pixels = (viewed(augment, image, key=key)[0] * 255).round().numpy().transpose(1, 2, 0)
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
    view, none = views.TestView(Augment(test_crop=crop), size, (0.0,) * 3, (1.0,) * 3)(image, False, 0)
    small = image.resize((int(resized * 500 / 400), resized), Image.Resampling.BICUBIC)
    left, top = round((small.width - size) / 2), round((small.height - size) / 2)
    middle = np.asarray(small.crop((left, top, left + size, top + size))).transpose(2, 0, 1)
    assert none is None and (view * 255).round().to(torch.uint8).numpy().tolist() == middle.tolist()


def test_images_are_normalised_with_imagenets_statistics(opened):
    data = opened()
    assert data.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert data.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
    plain = open_images("birds", "train", 16, root=data.rows.folder.parent, mean=(0.0,) * 3, std=(1.0,) * 3)
    ours, theirs = (next(evaluation_batches(d, 7)).images for d in (data, plain))
    assert torch.allclose(ours * data.std + data.mean, theirs, atol=1e-6) and 0 <= theirs.min() < theirs.max() <= 1


# ------------------------------------------------------------------------------------------------- batches


def whole(batches, field="images"):
    return torch.cat([getattr(b, field) for b in batches])


EVERYTHING = {"augment": WILD, "mixup": 0.8, "cutmix": 1.0, "repeats": 3}


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_no_bit(opened, workers):
    data = opened()
    here = list(epoch_batches(data, np.arange(7), 3, 1, 4, **EVERYTHING))
    there = list(epoch_batches(data, np.arange(7), 3, 1, 4, workers=workers, **EVERYTHING))
    for field in ("images", "targets", "view", "flipped"):
        assert torch.equal(whole(here, field), whole(there, field))
    assert [b.index.tolist() for b in here] == [b.index.tolist() for b in there]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("batch_size", [5, 6, 7])
def test_the_parts_of_all_ranks_make_the_global_batch_bit_for_bit(opened, world, batch_size):
    data = opened()
    alone = list(epoch_batches(data, np.arange(7), 3, 1, batch_size, **EVERYTHING))
    ranks = [
        list(epoch_batches(data, np.arange(7), 3, 1, batch_size, shard=Shard(rank, world), **EVERYTHING))
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
    parts = [list(evaluation_batches(data, 2, Shard(rank, 9))) for rank in range(9)]
    index = [b.index for part in parts for b in part]
    assert np.concatenate(index).tolist() == list(range(7))


def test_skipped_batches_are_not_decoded_and_the_rest_is_the_same(opened, monkeypatch):
    data = opened()
    full = list(epoch_batches(data, np.arange(7), 0, 2, 3, **EVERYTHING))
    decoded, decode = [], images.decode
    monkeypatch.setattr(images, "decode", lambda rows, i: (decoded.append(i), decode(rows, i))[1])
    rest = list(epoch_batches(data, np.arange(7), 0, 2, 3, skip=2, **EVERYTHING))
    assert len(rest) == 1 and torch.equal(rest[0].images, full[2].images) and len(decoded) == 1


def test_a_sample_depends_on_seed_epoch_image_and_repeat_and_on_nothing_else(opened):
    data = opened()

    def samples(rows, seed, epoch, batch_size, **options):
        batches = list(epoch_batches(data, np.asarray(rows), seed, epoch, batch_size, augment=Augment(), **options))
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
    list(epoch_batches(data, np.arange(7), 0, 0, 4, **EVERYTHING))
    assert generators() == before


def test_what_is_flipped_is_reported_and_is_half(opened):
    data = opened()
    (batch,) = epoch_batches(data, np.arange(7), 0, 0, 7, flip=False)
    plain = dict(zip(batch.index.tolist(), batch.images, strict=True))
    count = 0
    for epoch in range(12):
        (batch,) = epoch_batches(data, np.arange(7), 0, epoch, 7)
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
    batches = images.Batches(data, np.arange(21).reshape(3, 7).T.reshape(-1), 21, data.view(None))
    numbers = batches.numbers(0)
    assert sorted(numbers) == list(range(21)) and all(a % 7 != b % 7 for a, b in numbers[:20].reshape(-1, 2))
    assert len(order) == 7


def test_pairs_are_mixed_with_each_other_and_an_odd_image_stays_as_it_is(opened):
    data = opened()
    options = {"augment": None, "flip": False}
    (plain,) = epoch_batches(data, np.arange(7), 0, 2, 7, **options)
    assert plain.targets.tolist() == [0, 0, 2, 1, 0, 2, 1]  # pairs of one class and of two
    one_hot = torch.nn.functional.one_hot(plain.targets, 3).float()
    for mixing in ({"mixup": 1.0}, {"cutmix": 1.0}):
        (mixed,) = epoch_batches(data, np.arange(7), 0, 2, 7, **options, **mixing)
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
        with views.own_draws(key):
            mixed, share = mix_pair(pair, 0.8, 1.0)
        is_cut = set(mixed[0].unique().tolist()) <= {0.0, 1.0}
        cut += is_cut
        assert share == pytest.approx(1 - mixed[0].mean().item(), abs=1e-5)
        shares += [] if is_cut else [share]
    assert 120 <= cut <= 180
    assert np.mean(shares) == pytest.approx(0.5, abs=0.08) and np.var(shares) == pytest.approx(0.25 / 2.6, abs=0.02)


def test_both_kinds_of_data_are_served_by_the_same_two_functions(opened):
    data = opened()
    batches = list(both_kinds.epoch_batches(data, np.arange(7), 0, 0, 4, True, 0.0, augment=Augment(view_size=8)))
    assert [b.view.shape for b in batches] == [(4, 3, 8, 8), (3, 3, 8, 8)]
    assert len(list(both_kinds.evaluation_batches(data, 4))) == 2
    assert subset(data, 3, seed=0).tolist() == sorted(subset(data, 3, seed=0)) and len(subset(data, 6, 0)) == 6


def test_images_can_be_held_out_of_a_split(opened):
    for name in STAND_INS:
        data = opened(name)
        (batch,) = evaluation_batches(data.take([5, 0]), 4)
        (all_of_them,) = evaluation_batches(data, 7)
        assert batch.targets.tolist() == [2, 0] and torch.equal(batch.images, all_of_them.images[[5, 0]])


# ------------------------------------------------------------------------------------------------- tokenizers


def test_fresh_tokens_are_those_of_the_view_or_of_the_images_themselves(opened):
    data = opened()
    tokenizer = DVAE(DVAEConfig(image_size=8, patch_size=4, in_chans=3, vocabulary=16, width=8)).eval()
    targets = tokenizers.make_targets("dvae", data, 8, 0, tokenizer)
    (batch,) = epoch_batches(data, np.arange(7), 0, 0, 7, augment=Augment(view_size=8))
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
    recipe = Recipe(epochs=1, batch_size=4, lr=1e-3)
    history = loop.train(model, recipe, data, np.arange(7), 0, MaskedLoss(targets, 0, 6))
    assert len(history) == 2
    with pytest.raises(UsageError, match="'tokens' need images in memory"):
        tokenizers.make_targets("tokens", data, 4, 0)


# ------------------------------------------------------------------------------------------------- runs


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A run on stand-ins that are as large as what was published, and the folder of its data."""
    monkeypatch.setenv("VITLIB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("VITLIB_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(readers, "expected", lambda name, split: ({len(TRAIN if split == "train" else TEST)}, 3))
    model = vit_config("W32-1x1/8", image_size=16, in_chans=3, num_classes=3)
    recipe = Recipe(epochs=1, batch_size=4, lr=1e-3, augment=Augment())
    return RunSpec("supervised", model, "imagenet-1k", recipe, streamed=True), tmp_path / "data" / "imagenet-1k"


def test_a_run_has_its_name_without_the_data_and_says_which_files_it_read(published, tmp_path, monkeypatch):
    spec, folder = published
    name = spec.hash
    class_folders(folder)
    assert replace(spec).hash == name != replace(spec, data="imagenet-v2").hash
    result = execute.execute(spec)
    kept = {split: open_images("imagenet-1k", split, 16).checksum for split in ("train", "test")}
    assert result.hash == name and result.files == store.find(spec).files == kept
    assert "files" not in results.ABOUT  # an older result without it is read too
    store.export_runs(tmp_path / "runs.jsonl")
    monkeypatch.setenv("VITLIB_RUNS", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("VITLIB_DATA", str(tmp_path / "nothing"))
    assert store.import_runs(tmp_path / "runs.jsonl") == (1, 0) and store.find(replace(spec)).files == kept


def test_runs_that_belong_together_and_read_other_files_are_named(published, recwarn):
    spec, folder = published
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
