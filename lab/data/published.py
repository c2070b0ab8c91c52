"""Data sets that are not embedded: where they are, as their cards say, and the forms in which they are distributed.

general     class folders, parquet, WebDataset: read by `vitlib.data.read`
Hub         a name on the Hugging Face Hub, through `datasets`
their own   iNaturalist's JSON, CIFAR's pickles, Stanford Cars' devkit, Flowers-102's MATLAB files
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import yaml
from torchvision import datasets

from lab.data import DataAbsent
from lab.paths import DATA_CARDS, place
from vitlib.data import read
from vitlib.data.read import Cells, Found, find_split, read_class_folders, read_folder, read_place
from vitlib.errors import UsageError
from vitlib.files import first_line, intact


def places(name: str) -> list[Path]:
    """Where the folder of a data set may be: in $VITLIB_DATA, or `data` here, under its name or those that its card gives."""
    with intact(card := DATA_CARDS / f"{name}.md"):
        return [place("VITLIB_DATA", "data") / folder for folder in read_card(card)["vitlib"].get("folders", [name])]


def locate(name: str) -> Path | None:
    """The first of `places` that is there: one folder for every profile."""
    return next((place for place in places(name) if place.is_dir()), None)


def absent(name: str, hub: str = "") -> DataAbsent:
    looked = f"looked for {' or '.join(map(str, places(name)))} (VITLIB_DATA names the folder above)"
    return DataAbsent(f"data set {name!r} is not there: {looked}{hub}; data_cards/{name}.md says how to get it")


def read_card(path: Path) -> dict:
    """The YAML between the first two lines of dashes. Not to be changed: it is read once."""
    return _parsed(path, path.stat().st_mtime_ns)


class _Plain(yaml.SafeLoader):
    """Without aliases, which grow without end, and without a key twice, of which the last would count."""

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        if len(found := super().construct_mapping(node, deep)) < len(node.value):
            raise yaml.YAMLError(f"it has a key twice among {', '.join(map(str, found))}")
        return found


@functools.lru_cache(maxsize=64)
def _parsed(path: Path, modified: int) -> dict:
    try:
        card = _Plain(path.read_text(encoding="utf-8").split("---\n")[1]).get_single_data()
        if not isinstance(card["vitlib"], dict):
            raise TypeError("vitlib is no mapping")
        return card
    except (OSError, ValueError, TypeError, KeyError, IndexError, RecursionError, yaml.YAMLError) as fault:
        raise UsageError(f"{path} is no data card ({first_line(fault)}): CONTRIBUTING.md says what one has") from fault


def read_published(name: str, about: dict, split: str) -> Found:
    """train or test of a data set of the paper, whose card says `about` it, in whatever form its folder has.

    Raises DataAbsent where it is not here, and UsageError for a split that is missing, damaged or of another size.
    """
    if split not in about["splits"]:
        allowed = " and ".join(about["splits"])
        raise UsageError(
            f"{name} has no split {split!r} here: allowed are {allowed}, as in Table 9; tune on images held out of train"
        )
    names, folder = about["splits"][split], locate(name)
    if folder is None:
        raise absent(name)
    if about.get("numbered") and isinstance(place := find_split(folder, names), Path):
        found = read_class_folders(place, numbered=True)
    else:
        found = read_any(folder, names, also=about.get("also", ()) if split == "train" else ())
    check_counts(name, about, split, found)
    return found


def read_any(folder: Path, names: Sequence[str], also: Sequence[str] = ()) -> Found:
    """A split, under the first of its names that is there, and the files of `also`, a second split that belongs to it."""
    for reader in (read_torchvision, read_inaturalist):
        if (found := reader(folder, names)) is not None:
            return found
    shards, more = (find_split(folder, words) for words in (names, also))
    return read_place([*shards, *more]) if isinstance(shards, list) and more else read_folder(folder, names)


def check_counts(name: str, about: dict, split: str, found: Found) -> None:
    """Raises UsageError where a published data set does not have its published size."""
    images, classes = len(found.labels), len(found.classes)
    if images not in about["sizes"][split] or classes != about["num_classes"]:
        published = " or ".join(f"{n:,}" for n in sorted(about["sizes"][split]))
        raise UsageError(
            f"{name} {split} has {images:,} images of {classes:,} classes, published are {published} of {about['num_classes']:,}"
        )


# ------------------------------------------------------------------------------------------------- forms


def read_inaturalist(folder: Path, names: Sequence[str]) -> Found | None:
    """`train2018.json`, `val2018.json`, and the images that they name under the folder."""
    lists = [file for name in names for file in sorted(folder.glob(f"{name}20[0-9][0-9].json"))]
    if not lists:
        return None
    try:
        record = json.loads(lists[0].read_text(encoding="utf-8"))
        categories = sorted(record["categories"], key=lambda c: c["id"])
        rank = {c["id"]: k for k, c in enumerate(categories)}
        path = {image["id"]: image["file_name"] for image in record["images"]}
        pairs = [(path[a["image_id"]], rank[a["category_id"]]) for a in record["annotations"]]
        names = [c["name"] for c in categories]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as fault:
        raise UsageError(f"{lists[0]} is not an annotation file of iNaturalist ({type(fault).__name__})") from fault
    return read.files(folder, [p for p, _ in pairs], [k for _, k in pairs], names)


def read_torchvision(folder: Path, names: Sequence[str]) -> Found | None:
    """What torchvision reads, in the folders that it unpacks: `cifar-10-batches-py`, `cifar-100-python`, `stanford_cars`,
    `flowers-102`. It unpickles CIFAR's files, and reads those of Flowers, only if they have the published MD5 sums.
    """
    kinds = ("cifar-10-batches-py", "cifar-100-python", "stanford_cars", "flowers-102")
    there = [k for k in kinds if (folder / k).is_dir() or (folder.name == k and (folder / "jpg").is_dir())]
    if not there or names[0] not in ("train", "test"):
        return None
    kind = there[0]
    root = folder if (folder / kind).is_dir() else folder.parent
    try:
        if kind.startswith("cifar"):
            data, column = _cifar(root, kind, names[0]), functools.partial(_as_ppm, root, kind, names[0])
            rows = Cells(column, np.arange(len(data.data)), f"{folder} {names[0]}")
            return Found(rows, np.asarray(data.targets, np.int64), tuple(data.classes))
        if kind == "stanford_cars":
            cars = datasets.StanfordCars(root, names[0])
            samples, classes = cars._samples, cars.classes
        else:  # Paper: 2,040 training images, so `val` belongs to them
            parts = [datasets.Flowers102(root, s) for s in (("train", "val") if names[0] == "train" else ("test",))]
            samples = [pair for part in parts for pair in zip(part._image_files, part._labels, strict=True)]
            classes = datasets.Flowers102.classes
    except Exception as fault:  # scipy, which reads .mat files, raises what its many readers raise
        what = read.printable(first_line(fault))
        raise UsageError(f"{root / kind} is not complete, or a file does not have its MD5 sum ({what})") from fault
    paths = [os.path.relpath(path, root) for path, _ in samples]
    return read.files(root, paths, [label for _, label in samples], classes)


@functools.lru_cache(maxsize=2)
def _cifar(root: Path, kind: str, split: str) -> object:
    return (datasets.CIFAR10 if kind == "cifar-10-batches-py" else datasets.CIFAR100)(root, train=split == "train")


def _as_ppm(root: Path, kind: str, split: str) -> pa.ChunkedArray:
    """Arrays as the simplest image files, a header before the pixels, so that they are read as all other tables."""
    pixels = _cifar(root, kind, split).data
    header = f"P6 {pixels.shape[2]} {pixels.shape[1]} 255\n".encode()
    return pa.chunked_array([pa.array([header + image.tobytes() for image in pixels], pa.binary())])


@functools.lru_cache(maxsize=2)
def _hub(name: str) -> dict:
    from datasets import load_dataset

    try:
        return load_dataset(name)
    except Exception as fault:  # `datasets` raises what its many readers raise
        cause = fault.__cause__ or fault
        said = f"{type(cause).__name__}: {next(iter(str(cause).splitlines()), '')}".rstrip(": ")
        raise UsageError(f"{name} cannot be read from the Hugging Face Hub: {said}") from fault


def _hub_column(name: str, split: str, column: str) -> pa.ChunkedArray:
    return _hub(name)[split].data.column(column)


def read_hub(name: str, names: Sequence[str]) -> Found:
    """A split of a data set by its name on the Hugging Face Hub, or in the cache of `datasets`."""
    split = next((split for split in names if split in _hub(name)), None)
    if split is None:
        raise UsageError(f"{name} has no split {names[0]!r} on the Hub: there are {', '.join(_hub(name))}")
    table, source = _hub(name)[split], f"{name} {split}"
    image, label = read.image_and_label(table.column_names, source)
    names = getattr(table.features[label], "names", None) or ()
    labels, classes = read.labelled(_hub_column(name, split, label), names, f"column {label} of {source}")
    column = functools.partial(_hub_column, name, split, image)
    return Found(Cells(column, np.arange(len(labels)), source), labels, classes)
