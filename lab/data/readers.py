"""Where the images of a split are and what they show, in the forms in which large data sets are distributed.

A reader gives the labels of all images without decoding one, and `rows` (`rows.py`) that open an image when it is asked for:
paths, or rows of an Arrow file that is mapped into memory. CIFAR alone is distributed as arrays, 150 MB of them, which are
kept.

    class folders   <folder>/<split>/<class>/*.jpg and the like (torchvision's ImageFolder)
    parquet         columns image and label, files or folders named by the split (Hugging Face); through `datasets`
    WebDataset      .tar shards of .jpg/.jpeg/.png + .cls, named by the split; through `datasets`
    Hub             a name with a slash in it; through `datasets`
    its own         iNaturalist's JSON, CIFAR's pickles, Stanford Cars' devkit, Flowers-102's MATLAB files
"""

from __future__ import annotations

import csv
import functools
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from lab.paths import DATA_CARDS, PAPER, ROOT
from vitlib.data.read import Arrays, Files, Found, Table
from vitlib.errors import UsageError

IMAGE_FILES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's list
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "fine_label", "cls")
ON_DISK = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}


# ------------------------------------------------------------------------------------------------- the layouts


@dataclass(frozen=True)
class Query:
    """Which split of a folder, and what a layout must know to read it."""

    name: str
    split: tuple[str, ...]  # what it may be called on disk; the first that is there counts
    also: tuple[str, ...] = ()  # a second split that belongs to it
    numbered: bool = False  # a class folder's name is its label
    cache_dir: str | None = None  # of `datasets`


@dataclass(frozen=True)
class Layout:
    """`where(folder)` is the part of it in this form, or None; `read` gives None for a split that is not there."""

    what: str
    where: Callable[[Path], Path | None]
    read: Callable[[Path, Query], Found | None]


def _inside(*choices: str) -> Callable[[Path], Path | None]:
    """The folder, or a folder in it, that has one of these; "a/b" is b in a folder a, which need not be there."""

    def where(folder: Path) -> Path | None:
        for choice in choices:
            inner, _, wanted = choice.rpartition("/")
            for base in (folder, folder / inner):
                if (base / wanted).exists():
                    return base
        return None

    return where


def _files(folder: Path, paths: Sequence[str], labels: Sequence[int], classes: Sequence[str]) -> Found:
    rows = Files(folder, pa.array([str(path) for path in paths], pa.string()))
    return Found(rows, np.asarray(labels, np.int64), tuple(map(str, classes)))


def _by_number(names: Sequence[str]) -> list[str]:
    """Sorted as numbers where all of them are, as text otherwise."""
    return sorted(names, key=int) if all(name.isdigit() for name in names) else sorted(names)


def _folders_in(folder: Path) -> list[str]:
    return _by_number([e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith(".")])


def read_class_folders(folder: Path, query: Query) -> Found | None:
    """`<folder>/<split>/<class>/.../image`. A class's label is its rank among the folders' names, or the name itself."""
    from torchvision.datasets.folder import make_dataset

    place = next((folder / split for split in query.split if (folder / split).is_dir()), None)
    if place is None:
        return None
    names = _folders_in(place)
    if not names:
        raise UsageError(f"{place} holds no class folders: allowed is a folder a class with its images")
    labels = _folder_labels(place, names, query)
    samples = make_dataset(str(place), dict(zip(names, labels, strict=True)), IMAGE_FILES, allow_empty=True)
    samples.sort(key=lambda sample: sample[1])
    filled = {label for _, label in samples}
    if empty := [name for name, label in zip(names, labels, strict=True) if label not in filled]:
        raise UsageError(
            f"{len(empty)} of {len(names)} class folders in {place} hold no image, the first is {empty[0]}: "
            f"allowed are {', '.join(IMAGE_FILES)}"
        )
    classes = [str(k) for k in range(labels[-1] + 1)] if query.numbered else names
    start = len(str(folder)) + 1
    return _files(folder, [path[start:] for path, _ in samples], [label for _, label in samples], classes)


def _folder_labels(place: Path, names: list[str], query: Query) -> list[int]:
    """Raises UsageError where the rank of a name would mean one class in this split and another in train."""
    if query.numbered:
        if not all(name.isdigit() for name in names):
            other = next(name for name in names if not name.isdigit())
            raise UsageError(f"the class folders of {query.name} are numbers, {place} holds {other!r}")
        return [int(name) for name in names]
    train = place.parent / "train"
    if place != train and train.is_dir() and (differ := sorted(set(names) ^ set(_folders_in(train)))):
        raise UsageError(
            f"the class folders of {place} and {train} differ in {len(differ)} names, the first is {differ[0]}: both must "
            "have the same, for a class is known by its rank"
        )
    return list(range(len(names)))


def _where_class_folders(folder: Path) -> Path | None:
    inner = [e for e in os.scandir(folder) if e.is_dir() and not e.name.startswith(".")]
    numbered = inner and all(e.name.isdigit() for e in inner)
    return folder if numbered or any(any(e.is_dir() for e in os.scandir(i)) for i in inner) else None


def _shards(folder: Path, suffix: str) -> list[Path]:
    """Here or one folder down, not deeper: a tree of class folders is not searched through."""
    return sorted([*folder.glob(f"*{suffix}"), *folder.glob(f"*/*{suffix}")])


def _of_split(shards: list[Path], folder: Path, split: str) -> list[str]:
    """Those whose path has the split's name as a word: data/train-00001.parquet, val/7.tar, x-train-3.tar."""
    words = {path: re.split(r"[^a-z]+", str(path.relative_to(folder)).lower()) for path in shards}
    return [str(path) for path in shards if split in words[path]]


def _of_first(shards: list[Path], folder: Path, splits: tuple[str, ...]) -> list[str]:
    return next((files for split in splits if (files := _of_split(shards, folder, split))), [])


def _read_shards(suffix: str, builder: str, folder: Path, query: Query) -> Found | None:
    from datasets import load_dataset

    shards = _shards(folder, suffix)
    files, more = (_of_first(shards, folder, splits) for splits in (query.split, query.also))
    if not files:
        return None
    try:
        table = load_dataset(builder, data_files={"train": files + more}, split="train", cache_dir=query.cache_dir)
    except Exception as fault:  # `datasets` raises what its many readers raise
        raise UsageError(f"{files[0]} or a file beside it cannot be read as {builder}: {_first_line(fault)}") from fault
    return read_table(table, f"{query.name} {query.split[0]}")


def read_hub(query: Query) -> Found:
    """A data set by its name on the Hugging Face Hub, or in the cache of `datasets`."""
    from datasets import load_dataset

    try:
        splits = load_dataset(query.name, cache_dir=query.cache_dir)
    except Exception as fault:
        raise UsageError(f"{query.name} cannot be read from the Hugging Face Hub: {_first_line(fault)}") from fault
    split = next((split for split in query.split if split in splits), None)
    if split is None:
        raise UsageError(f"{query.name} has no split {query.split[0]!r} on the Hub: there are {', '.join(splits)}")
    return read_table(splits[split], f"{query.name} {split}")


def _first_line(fault: Exception) -> str:
    cause = fault.__cause__ or fault
    return f"{type(cause).__name__}: {next(iter(str(cause).splitlines()), '')}".rstrip(": ")


def read_table(table: object, source: str) -> Found:
    """A `datasets.Dataset`: `datasets` keeps it as an Arrow file in its cache, as large as the images' files."""
    from datasets import Image as ImageColumn

    image = next((c for c in IMAGE_COLUMNS if c in table.column_names), None)
    label = next((c for c in LABEL_COLUMNS if c in table.column_names), None)
    if image is None or label is None:
        raise UsageError(
            f"{source} has the columns {', '.join(table.column_names)}: allowed are one of {', '.join(IMAGE_COLUMNS)} and "
            f"one of {', '.join(LABEL_COLUMNS)}"
        )
    labels = np.asarray(table.with_format("numpy")[label][:])
    if len(labels) == 0 or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise UsageError(f"column {label} of {source} does not hold a label from 0 for each image")
    names = getattr(table.features[label], "names", None) or [str(k) for k in range(labels.max() + 1)]
    rows = table.select_columns([image]).cast_column(image, ImageColumn(decode=False))
    return Found(Table(rows, image, source), labels.astype(np.int64), tuple(names))


def read_inaturalist(folder: Path, query: Query) -> Found | None:
    """`train2018.json`, `val2018.json`, and the images that they name under the folder."""
    files = [file for split in query.split for file in sorted(folder.glob(f"{split}20[0-9][0-9].json"))]
    if not files:
        return None
    try:
        record = json.loads(files[0].read_text(encoding="utf-8"))
        categories = sorted(record["categories"], key=lambda c: c["id"])
        rank = {c["id"]: k for k, c in enumerate(categories)}
        path = {image["id"]: image["file_name"] for image in record["images"]}
        pairs = [(path[a["image_id"]], rank[a["category_id"]]) for a in record["annotations"]]
    except (ValueError, KeyError, TypeError) as fault:
        raise UsageError(f"{files[0]} is not an annotation file of iNaturalist ({type(fault).__name__})") from fault
    return _files(folder, [p for p, _ in pairs], [k for _, k in pairs], [c["name"] for c in categories])


def _matlab(path: Path) -> dict:
    from scipy.io import loadmat

    try:
        return loadmat(path, squeeze_me=True)
    except (OSError, ValueError, TypeError, NotImplementedError) as fault:
        raise UsageError(f"{path} is missing or no MATLAB file ({type(fault).__name__})") from fault


def read_cars(folder: Path, query: Query) -> Found | None:
    """Stanford Cars: `devkit/`, `cars_train/`, `cars_test/`, and the test images' labels in a file of their own."""
    annotations = {
        "train": ("devkit/cars_train_annos.mat",),
        "test": ("cars_test_annos_withlabels.mat", "devkit/cars_test_annos_withlabels.mat"),
    }
    split = next((split for split in query.split if split in annotations), None)
    file = next((folder / f for f in annotations.get(split, ()) if (folder / f).is_file()), None)
    if file is None:
        return None
    listed = np.atleast_1d(_matlab(file)["annotations"])
    paths = [f"cars_{split}/{name}" for name in listed["fname"]]
    names = np.atleast_1d(_matlab(folder / "devkit" / "cars_meta.mat")["class_names"])
    return _files(folder, paths, listed["class"].astype(np.int64) - 1, names)  # MATLAB counts from 1


def read_flowers(folder: Path, query: Query) -> Found | None:
    """Flowers-102: `jpg/`, `imagelabels.mat`, `setid.mat`. Paper: 2,040 training images, so `valid` belongs to them."""
    from torchvision.datasets import Flowers102

    ids = {"train": ("trnid", "valid"), "test": ("tstid",)}
    split = next((split for split in query.split if split in ids), None)
    if split is None:
        return None
    sets, labels = _matlab(folder / "setid.mat"), np.atleast_1d(_matlab(folder / "imagelabels.mat")["labels"])
    chosen = np.concatenate([np.atleast_1d(sets[part]) for part in ids[split]]).astype(np.int64)
    labels = labels[chosen - 1].astype(np.int64) - 1  # image and class numbers count from 1
    return _files(folder, [f"jpg/image_{i:05d}.jpg" for i in chosen], labels, Flowers102.classes)


def read_cifar(folder: Path, query: Query) -> Found | None:
    """CIFAR's pickles. torchvision unpickles them only if they have the published MD5 sums."""
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = CIFAR10 if (folder / CIFAR10.base_folder).is_dir() else CIFAR100
    split = next((split for split in query.split if split in ("train", "test")), None)
    if split is None:
        return None
    try:
        data = kind(folder, train=split == "train", download=False)
    except RuntimeError as fault:
        raise UsageError(
            f"{folder / kind.base_folder} is not complete, or its files do not have the MD5 sums"
        ) from fault
    rows = Arrays(data.data, f"{query.name} {split}")
    return Found(rows, np.asarray(data.targets, np.int64), tuple(data.classes))


LAYOUTS = (
    Layout("CIFAR's folder of pickles", _inside("cifar-10-batches-py", "cifar-100-python"), read_cifar),
    Layout("Stanford Cars' devkit", _inside("stanford_cars/devkit"), read_cars),
    Layout("Flowers-102's setid.mat", _inside("flowers-102/setid.mat"), read_flowers),
    Layout(
        "iNaturalist's train2018.json",
        lambda folder: folder if any(folder.glob("*20[0-9][0-9].json")) else None,
        read_inaturalist,
    ),
    # Before the containers: an archive that was unpacked may still lie beside its folders.
    Layout("class folders, <split>/<class>/*.jpg", _where_class_folders, read_class_folders),
    Layout(
        "parquet files named by their split",
        lambda folder: folder if _shards(folder, ".parquet") else None,
        functools.partial(_read_shards, ".parquet", "parquet"),
    ),
    Layout(
        "WebDataset's .tar shards named by their split",
        lambda folder: folder if _shards(folder, ".tar") else None,
        functools.partial(_read_shards, ".tar", "webdataset"),
    ),
)


# ------------------------------------------------------------------------------------------------- data sets by name


@dataclass(frozen=True)
class Published:
    """A data set of the paper: what its folder calls the images that the paper tests on."""

    test: tuple[str, ...] = ("test",)
    also: tuple[str, ...] = ()  # what else the paper trains on
    numbered: bool = False


V2_FOLDER = "imagenetv2-matched-frequency-format-val"  # what its archive unpacks to
PUBLISHED = {
    "imagenet-1k": Published(test=("val", "validation")),
    "imagenet-v2": Published(test=("test", "val", V2_FOLDER, "."), numbered=True),
    "inaturalist-2018": Published(test=("val", "validation")),
    "inaturalist-2019": Published(test=("val", "validation")),
    "cifar-10": Published(),
    "cifar-100": Published(),
    "stanford-cars": Published(),
    "flowers-102": Published(also=ON_DISK["validation"]),
}


def data_root() -> Path:
    """Where data of one's own lies: $VITLIB_DATA, or `data` in the project's folder."""
    return ROOT / os.environ.get("VITLIB_DATA", "data")


def places(name: str, root: Path | str | None = None) -> list[Path]:
    """Where the folder of a data set may be: under its name, or under the names that its card gives."""
    from lab.data.registry import read_card

    card = next((path for path in DATA_CARDS.glob("*.md") if path.stem == name), None)
    about = read_card(card).get("vitlib", {}) if card else {}
    return [Path(root if root is not None else data_root()) / folder for folder in about.get("folders", [name])]


def locate(name: str, root: Path | str | None = None) -> Path | None:
    """The first of `places` that is there: one folder for every profile."""
    return next((place for place in places(name, root) if place.is_dir()), None)


def find(name: str, split: str, root: Path | str | None = None, cache_dir: Path | str | None = None) -> Found:
    """A split of the data set in its folder under `root`, in whatever layout that is; of the Hub if there is a slash in the
    name and no such folder.

    Raises UsageError for a folder that is not there or in none of the layouts, and for a missing split.
    """
    folder = locate(name, root)
    known = PUBLISHED.get(name)
    if known and split not in ("train", "test"):
        raise UsageError(
            f"{name} has no split {split!r} here: allowed are train and test, as in Table 9; tune on images held out of train"
        )
    words = known.test if known and split == "test" else ON_DISK.get(split, (split,))
    also = known.also if known and split == "train" else ()
    query = Query(name, words, also, bool(known and known.numbered), None if cache_dir is None else str(cache_dir))
    if folder is None:
        if "/" in name and not os.path.isabs(name):
            return read_hub(query)
        raise UsageError(_not_there(name, " or ".join(map(str, places(name, root)))))
    for layout in LAYOUTS:
        if (place := layout.where(folder)) is not None:
            found = layout.read(place, query)
            break
    else:
        allowed = "; ".join(layout.what for layout in LAYOUTS)
        raise UsageError(f"{folder} holds {_contents(folder)}, and no data set in a known form: allowed are {allowed}")
    if found is None:
        raise UsageError(f"{name} has no split {split!r} in {place} ({layout.what}): there are {_contents(place)}")
    return found


def _not_there(name: str, folders: str) -> str:
    card = f"; data_cards/{name}.md says where to get it" if (DATA_CARDS / f"{name}.md").is_file() else ""
    return f"there is no folder {folders} for the data set {name!r}: VITLIB_DATA names the folder that holds it{card}"


def _contents(folder: Path) -> str:
    names = sorted(entry.name for entry in os.scandir(folder))
    return (", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")) or "nothing"


def expected(name: str, split: str) -> tuple[set[int], int] | None:
    """How many images a published split has (any of the set) and how many classes; None for other data. Table 9."""
    if name == "imagenet-v2":  # not in the table; its authors' number
        return ({10_000}, 1000) if split == "test" else None
    with (PAPER / "table9.csv").open(encoding="utf-8") as file:
        rows = {row["dataset"]: row for row in csv.DictReader(file)}
    if name not in rows or split not in ("train", "test"):
        return None
    counts = {int(rows[name][f"{split}_images"])}
    if name == "inaturalist-2019":  # another listing of the same 268,243 images: see its card
        counts.add({"train": 265_213, "test": 3_030}[split])
    return counts, int(rows[name]["classes"])


def check_counts(name: str, split: str, found: Found) -> None:
    """Raises UsageError where a published data set does not have its published size."""
    if (wanted := expected(name, split)) is None:
        return
    counts, classes = wanted
    if len(found.labels) not in counts or len(found.classes) != classes:
        raise UsageError(
            f"{name} {split} has {len(found.labels):,} images of {len(found.classes):,} classes, published are "
            f"{' or '.join(f'{n:,}' for n in sorted(counts))} of {classes:,}: allowed with check_counts=False"
        )
