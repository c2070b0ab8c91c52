"""A folder of labelled images as one task: what is trained on, what chooses, what is tested, split by content.

    class folders   <folder>/<class>/*.jpg; under train/, val/ and test/, those parts are used as they are; parquet too
    a labels file   a CSV with the columns path and label, and if wanted part (train, validation, test) and a group

Images with the same pixels, or of the same group, are in the same part. The split that was made is written as such a CSV,
so that `--labels split.csv` makes it again. Every image is decoded once before anything is trained.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from vitlib import draws
from vitlib.data import HELD, Augment, DataSet, Found, InMemory, Streamed, middle, per_channel, read_folder
from vitlib.data.read import IMAGE_FILES, SPLITS, Rows, decode, files, find_split, images_in
from vitlib.errors import UsageError
from vitlib.files import write_table

PARTS = tuple(SPLITS)  # train, validation, test
HELD_OUT = 0.15  # of each class: for validation, and again for test
COLUMNS = {"path": ("path", "file", "filename", "image"), "label": ("label", "class", "category")}
LONGEST = 255  # characters of a label, as of a folder's name
# What is too large for memory is cropped anew in every epoch; its test view is the middle square, as in memory.
WORKERS = min(4, os.cpu_count() or 1)  # that decode it
STREAMED = Augment(crop_scale=(0.35, 1.0), test_crop=1.0, interpolation="bilinear")


class View(NamedTuple):
    """What a model sees of an image: the middle square, resized to `image_size`, normalised."""

    image_size: int
    patch_size: int
    mean: tuple[float, ...]  # of pixels / 255; one number for a model of grey images
    std: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Task:
    """All images with the part that each is in."""

    data: DataSet
    names: tuple[str, ...]  # relative to the folder where they are files
    digests: tuple[str, ...]  # of the decoded pixels
    parts: np.ndarray  # of PARTS, (N,)
    groups: tuple[str, ...]  # "" without
    notes: tuple[str, ...]  # sentences: what was found and done

    def part(self, name: str) -> DataSet:
        return self.data.take(np.flatnonzero(self.parts == name))

    @property
    def checksum(self) -> str:
        """Over pixels, labels and parts."""
        lines = sorted(map("\t".join, zip(self.digests, map(str, self.data.labels.tolist()), self.parts, strict=True)))
        return hashlib.sha256("\n".join([*self.data.classes, *lines]).encode()).hexdigest()[:16]

    def write_split(self, path: Path) -> None:
        labels = [self.data.classes[k] for k in self.data.labels.tolist()]
        lines = zip(self.names, labels, self.parts, self.groups, self.digests, strict=True)
        write_table(path, [("path", "label", "part", "group", "content"), *lines])

    def describe(self) -> str:
        sizes = ", ".join(f"{(self.parts == part).sum()} {part}" for part in PARTS)
        return f"{self.data.name}: {len(self.parts)} images of {len(self.data.classes)} classes ({sizes})"


def read_task(folder: Path | str, view: View, labels: Path | str | None = None, group: str | None = None) -> Task:
    """Read, check and split a folder. Parts that are there are used; what is missing is cut off the training images.

    Without test images, the validation images are the test part. Raises UsageError for what cannot be a task: one class,
    an empty one, two spellings of one, too few images to split, the same picture under two labels, a group in two parts,
    an image that is unreadable, animated or smaller than a patch, a labels file that does not fit the folder.
    """
    folder = Path(folder)
    found, given, groups = find_images(folder, labels, group)
    check_classes(found.classes, labels or folder)
    data, digests, notes = read_images(found, view, folder.resolve().name)
    known = (*IMAGE_FILES, ".parquet", ".csv")
    if others := [p.name for p in folder.rglob("[!.]*") if p.is_file() and p.suffix.lower() not in known]:
        notes.append(f"files left out: {len(others)}, the first is {others[0]}; read are {', '.join(IMAGE_FILES)}")
    names = [found.rows.name(i).removeprefix(f"{folder}/") for i in range(len(digests))]
    check_content(digests, found, names)
    parts = split(given, [g or d for g, d in zip(groups, digests, strict=True)], found, bool(group), notes)
    if twice := [d for d, where in together(digests, parts).items() if len(where) > 1]:
        notes.append(f"{len(twice)} pictures are in more than one part, the first is {names[digests.index(twice[0])]}")
    return Task(data, tuple(names), tuple(digests), parts, tuple(groups), tuple(notes))


def read_test(folder: Path | str, view: View, labels: Path | str | None) -> tuple[DataSet, list[str]]:
    """Every image of a folder with its digest; of a folder with parts, those of its test part alone."""
    found, given, _ = find_images(folder := Path(folder), labels, None)
    tested = next((part for part in ("test", "validation") if part in given), given[0])
    found = found.take(np.flatnonzero(np.array(given) == tested))
    data, digests, _ = read_images(found, view, folder.resolve().name)
    return data, digests


# ------------------------------------------------------------------------------------------------- what there is


@dataclass(frozen=True, eq=False)
class Joined(Rows):
    """The images of several splits, one after the other."""

    several: tuple[Rows, ...]
    index: np.ndarray  # int64 (N, 2): which of them, and the image in it

    def name(self, i: int) -> str:
        return self.several[self.index[i][0]].name(int(self.index[i][1]))

    def open(self, i: int) -> Image.Image:
        return self.several[self.index[i][0]].open(int(self.index[i][1]))

    def listing(self) -> Iterator[tuple[str, int]]:
        every = [list(rows.listing()) for rows in self.several]
        return ((f"{k}/{every[k][i][0]}", every[k][i][1]) for k, i in self.index.tolist())


def find_images(folder: Path, labels: Path | str | None, group: str | None) -> tuple[Found, list[str], list[str]]:
    """Images, the part that each is given ("" where none is) and its group ("" without)."""
    if labels is not None:
        return listed(folder, Path(labels), group)
    if group is not None:
        raise UsageError(f"group {group!r} is a column of a labels file: give one with --labels")
    return in_folders(folder)


def in_folders(folder: Path) -> tuple[Found, list[str], list[str]]:
    """`find_images` of a folder without a labels file."""
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}")
    there = {part: read_folder(folder, part) for part, names in SPLITS.items() if find_split(folder, names) is not None}
    if "train" not in there:
        raise UsageError(f"{folder} holds no class folders: allowed are images in {folder}/<class>/*.jpg and the like")
    sizes = [len(found.labels) for found in there.values()]
    index = np.concatenate([np.stack([np.full(n, k), np.arange(n)], axis=1) for k, n in enumerate(sizes)])
    rows = Joined(tuple(found.rows for found in there.values()), index)
    labels = np.concatenate([found.labels for found in there.values()])
    parts = np.repeat(list(there) if len(there) > 1 else [""], sizes).tolist()
    return Found(rows, labels, there["train"].classes), parts, [""] * len(labels)


def listed(folder: Path, path: Path, group: str | None) -> tuple[Found, list[str], list[str]]:
    """Images, parts and groups as a CSV names them."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            columns, lines = [name for name in table.fieldnames or () if name], list(table)
    except (OSError, UnicodeDecodeError, csv.Error) as fault:
        raise UsageError(f"{path} cannot be read as a CSV ({fault})") from fault
    image, label = (next((n for n in COLUMNS[c] if n in columns), None) for c in ("path", "label"))
    twice = [name for name in ("part", image, label, group) if columns.count(name) > 1]
    if image is None or label is None or (group and group not in columns) or twice:
        wanted = " and ".join("/".join(names) for names in COLUMNS.values()) + (f" and {group}" if group else "")
        raise UsageError(f"{path} has the columns {', '.join(columns) or 'of none'}: wanted are {wanted}, once each")
    read = [image, label, *(name for name in ("part", group) if name in columns)]
    for number, line in enumerate(lines, start=2):
        at = f"line {number} of {path}"
        if empty := [column for column in read if not (line[column] or "").strip()]:
            raise UsageError(f"{at} has no {empty[0]}")
        if not (folder / line[image]).is_file():
            raise UsageError(f"{at} names {line[image]}, which is not in {folder}")
        if len(line[label]) > LONGEST:
            raise UsageError(f"{at} has a label of {len(line[label]):,} characters: allowed are {LONGEST}")
        if line.get("part", "train") not in PARTS:
            raise UsageError(f"{at} has part {line['part']!r}: allowed are {', '.join(PARTS)}")
    paths, labels = [str(Path(line[image])) for line in lines], [line[label].strip() for line in lines]
    if again := [name for name, n in Counter(paths).items() if n > 1]:
        raise UsageError(f"{path} names {again[0]} more than once: allowed is one label for each image")
    if absent := sorted({*images_in(folder)} - {*paths}):
        raise UsageError(f"{len(absent)} images of {folder} have no label in {path}, the first is {absent[0]}")
    classes = sorted(set(labels), key=int if all(name.isdecimal() for name in labels) else None)
    found = files(folder, paths, [classes.index(name) for name in labels], classes)
    return found, [line.get("part", "") for line in lines], [line[group] if group else "" for line in lines]


# ------------------------------------------------------------------------------------------------- what is wrong with it


def check_classes(classes: Sequence[str], where: object) -> None:
    """Two classes or more, each spelt once."""
    if len(classes) < 2:
        raise UsageError(f"{where} has one class, {classes[0]}: at least two are needed")
    spelt: dict[str, str] = {}
    for name in classes:
        plain = re.sub(r"(?<=\w)[\s_-]+(?=\w)", "", name.casefold())  # not the sign of -1, nor what C++ ends in
        plain = str(int(plain)) if plain.isdecimal() else plain
        if plain in spelt:
            raise UsageError(f"{where} has classes {spelt[plain]!r} and {name!r}, two spellings of one: rename one")
        spelt[plain] = name


def check_content(digests: Sequence[str], found: Found, names: Sequence[str]) -> None:
    """No picture has two labels."""
    seen: dict[str, int] = {}
    for i, digest in enumerate(digests):
        first = seen.setdefault(digest, i)
        if found.labels[first] != found.labels[i]:
            labels = " and ".join(found.classes[found.labels[k]] for k in (first, i))
            raise UsageError(f"{names[first]} and {names[i]} are the same picture under two labels, {labels}")


def read_images(found: Found, view: View, name: str) -> tuple[DataSet, list[str], list[str]]:
    """Decode every image once: data in memory, or to be streamed where it is too large; digests of pixels; notes."""
    count, channels, size = len(found.labels), len(view.mean), view.image_size
    grey = channels == 1  # always held: what is streamed is in colour
    held = grey or count * channels * size**2 <= HELD
    images = torch.empty(count if held else 0, channels, size, size, dtype=torch.uint8)
    digests, colour = [], 0
    for i in tqdm(range(count), desc=f"reading {name}", unit="image", leave=False, disable=None):
        image = decode(found.rows, i)
        if min(image.size) < view.patch_size:
            what = f"{found.rows.name(i)} has {image.width}x{image.height} pixels"
            raise UsageError(f"{what}: a patch of this model has {view.patch_size}")
        digests.append(hashlib.blake2b(repr(image.size).encode() + image.tobytes(), digest_size=12).hexdigest())
        if grey:
            colour += bool(np.ptp(np.asarray(image.resize((8, 8))), axis=2).max() > 16)
        if held:
            images[i] = middle(pil_to_tensor(image.convert("L") if grey else image), size)
    statistics = map(per_channel, (view.mean, view.std))
    if not held:
        return Streamed(name, "all", found, size, STREAMED, WORKERS, *statistics), digests, []
    notes = []
    if colour:
        notes.append(f"images in colour: {colour}; these weights see grey alone: give others to finetune, with --from")
    labels = torch.from_numpy(found.labels)
    return InMemory(name, "all", images, labels, found.classes, *statistics, ""), digests, notes


# ------------------------------------------------------------------------------------------------- the split


def together(keys: Sequence[str], values: Sequence[str]) -> dict[str, set[str]]:
    """key -> the values that it occurs with."""
    met: dict[str, set[str]] = {}
    for key, value in zip(keys, values, strict=True):
        met.setdefault(key, set()).add(value)
    return met


def split(given: list[str], units: list[str], found: Found, grouped: bool, notes: list[str]) -> np.ndarray:
    """The part of each image, (N,). `units`: what must stay together, a group or equal pixels."""
    parts, there = np.array(given, dtype="U10"), set(given) - {""}
    if grouped and (spans := [unit for unit, p in together(units, given).items() if len(p) > 1]):
        raise UsageError(f"group {spans[0]!r} is in more than one part: a group must be in one")
    if there and "train" not in there:
        raise UsageError("there are no training images among the parts that are given")
    as_test = ""
    if "validation" in there and "test" not in there:
        parts[parts == "validation"], as_test = "test", ", validation as the test part"
    wanted = [part for part in ("test", "validation") if part not in parts]
    if there:
        cut = f"; {' and '.join(wanted)} images are cut off those of training" if wanted else ""
        notes.append(f"the parts {', '.join(p for p in PARTS if p in there)} are used as they are{as_test}{cut}")
    if wanted:
        rows = np.flatnonzero(np.isin(parts, ("train", "")))
        parts[rows] = cut_off([units[i] for i in rows], found.labels[rows], found.classes, wanted, grouped)
    for part in PARTS:
        if lacking := set(range(len(found.classes))) - set(found.labels[parts == part].tolist()):
            said = f"no {part} image is of class {found.classes[min(lacking)]}"
            if part == "train":
                raise UsageError(said)
            notes.append(said)
    return parts


def cut_off(
    units: Sequence[str], labels: np.ndarray, classes: Sequence[str], wanted: Sequence[str], grouped: bool
) -> list[str]:
    """Of each class about HELD_OUT of its images for each wanted part, at least one unit, the rest for training.

    A unit's content or name decides, so that neither a renamed file nor the order of a list changes the split. A group of
    several classes goes where all of them still have room.
    """
    met: dict[str, Counter] = {}
    for unit, label in zip(units, labels.tolist(), strict=True):
        met.setdefault(unit, Counter())[label] += 1
    images, left = Counter(labels.tolist()), Counter(label for counts in met.values() for label in counts)
    if few := [label for label in range(len(classes)) if left[label] <= len(wanted)]:
        what = "groups" if grouped else "different images"
        least = f"at least {len(wanted) + 1} are needed, one for each part"
        raise UsageError(f"class {classes[few[0]]} has {left[few[0]]} {what}: {least}")
    part_of = dict.fromkeys(met, "train")
    for k, part in enumerate(wanted):
        taken: Counter = Counter()
        for unit in sorted((u for u in met if part_of[u] == "train"), key=lambda u: draws.key("split", u)):
            if all(taken[c] < HELD_OUT * images[c] and left[c] > len(wanted) - k for c in met[unit]):
                part_of[unit] = part
                taken += met[unit]
                left -= Counter(met[unit].keys())
    return [part_of[unit] for unit in units]
