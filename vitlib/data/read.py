"""The images of a folder: which there are, what their labels are, and how one is opened.

    class folders   <folder>/<split>/<class>/.../*.jpg and the like; links are followed, hidden files left out
    parquet         <folder>/[<any>/]<split>*.parquet, or in a folder named by the split: columns image and label
    WebDataset      .tar files named in the same way: images, each with a .cls of the same name that holds its label

Labels are read without decoding an image. Memory does not grow with the pixels: a split keeps its paths in one block, or
encoded images in a mapped file.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import tarfile
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from vitlib.data.memory import held_out
from vitlib.errors import UsageError
from vitlib.files import check_target, intact, no_room, write_whole

SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}  # names on disk
IMAGE_FILES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's list
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "fine_label", "cls")
NO_CLASS = ("@eaDir", "__MACOSX")  # what disks and archives add, beside names that begin with a dot
ORIENTATION = 0x0112  # the EXIF tag of a photograph that was stored sideways
IN_MEMORY = 2**30  # bytes of parquet files that are held as they are; larger ones are mapped from a copy
MAX_PIXELS = Image.MAX_IMAGE_PIXELS  # of one image, 89 million: a few bytes can claim to be gigabytes
# The content counts, whatever a file is called. Pillow knows forms besides that are programs (EPS)
FORMS = ("JPEG", "PNG", "PPM", "BMP", "DIB", "TIFF", "WEBP", "GIF")


# ------------------------------------------------------------------------------------------------- images of a split


class Rows(ABC):
    """N images that are opened one at a time; a subclass says where."""

    index: np.ndarray  # (N, ...), the place of each

    def __len__(self) -> int:
        return len(self.index)

    def take(self, index: np.ndarray) -> Rows:
        return replace(self, index=self.index[index])

    @abstractmethod
    def name(self, i: int) -> str:
        """What a message calls image i."""

    @abstractmethod
    def open(self, i: int) -> Image.Image: ...

    @abstractmethod
    def listing(self) -> Iterator[tuple[str, int]]:
        """Name and size in bytes of each image, without decoding one."""


@dataclass(frozen=True, eq=False)
class Files(Rows):
    """One file per image."""

    folder: Path
    paths: pa.Array  # relative, as bytes: names need not be UTF-8. One block: every worker would copy a list of str
    index: np.ndarray  # (N,), of the paths

    def path(self, i: int) -> str:
        return os.fsdecode(self.paths[int(self.index[i])].as_py())

    def name(self, i: int) -> str:
        return text(self.folder / self.path(i))

    def open(self, i: int) -> Image.Image:
        if not (self.folder / self.path(i)).is_file():  # a pipe would be waited for
            raise FileNotFoundError
        return Image.open(self.folder / self.path(i), formats=FORMS)

    def listing(self) -> Iterator[tuple[str, int]]:
        for i in range(len(self)):
            try:
                yield self.path(i), (self.folder / self.path(i)).stat().st_size
            except OSError as fault:
                raise UsageError(f"there is no file {self.name(i)}, but the list of images names it") from fault


@dataclass(frozen=True, eq=False)
class Cells(Rows):
    """Encoded images in a column of tables: bytes, or {"bytes", "path"} as Hugging Face writes them."""

    column: Callable[[], pa.ChunkedArray]  # a cached function, called in each process: columns are too large to be sent
    index: np.ndarray  # (N,), rows of the column
    source: str

    def name(self, i: int) -> str:
        return f"row {self.index[i]} of {self.source}"

    def open(self, i: int) -> Image.Image:
        cell = self.column()[int(self.index[i])].as_py()
        encoded = cell["bytes"] if isinstance(cell, dict) else cell
        if encoded is None:
            raise UsageError(f"{self.name(i)} names a file and holds no image: allowed are images in the table itself")
        return Image.open(io.BytesIO(encoded), formats=FORMS)

    def listing(self) -> Iterator[tuple[str, int]]:
        chunks = (c.field("bytes") if pa.types.is_struct(c.type) else c for c in self.column().chunks)
        sizes = np.concatenate([pc.binary_length(c).fill_null(0).to_numpy(zero_copy_only=False) for c in chunks])
        return ((f"{i:08d}", size) for i, size in enumerate(sizes[self.index].tolist()))


@dataclass(frozen=True, eq=False)
class Members(Rows):
    """Images in .tar files, read from where they begin."""

    shards: list[Path]
    index: np.ndarray  # int64 (N, 3): number of the shard, first byte, bytes

    def name(self, i: int) -> str:
        return f"the image at byte {self.index[i][1]} of {self.shards[self.index[i][0]]}"

    def open(self, i: int) -> Image.Image:
        shard, start, size = self.index[i].tolist()
        with self.shards[shard].open("rb") as file:
            file.seek(start)
            return Image.open(io.BytesIO(file.read(size)), formats=FORMS)

    def listing(self) -> Iterator[tuple[str, int]]:
        return ((f"{i:08d}", size) for i, size in enumerate(self.index[:, 2].tolist()))


@dataclass(frozen=True, eq=False)
class Found:
    """One split: rows, labels int64 (N,), and the names of the classes in the order of their labels.

    Raises UsageError for two classes of one name.
    """

    rows: Rows
    labels: np.ndarray
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if len({*self.classes}) < len(self.classes):
            name = next(name for name in self.classes if self.classes.count(name) > 1)
            raise UsageError(
                f"two classes of {self.rows.name(0)} and the like are called {name!r}: allowed is one name each"
            )

    def take(self, index: np.ndarray) -> Found:
        return replace(self, rows=self.rows.take(index), labels=self.labels[index])

    def checksum(self) -> str:
        """SHA-256, 16 digits, over the sorted list of (name, size in bytes, label).

        Over names and sizes, not over pixels: reading 1.28 million images would take longer than an epoch. In a table the
        row's number is the name, so that shards may be cut differently.
        """
        listed = zip(self.rows.listing(), self.labels.tolist(), strict=True)
        lines = sorted(f"{name}\t{size}\t{label}\n" for (name, size), label in listed)
        return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]


def files(folder: Path, paths: Sequence[str], labels: Sequence[int], classes: Sequence[str]) -> Found:
    """Images by their paths in `folder`.

    Raises UsageError for a list, which may come from anywhere, that is empty or names a path out of the folder or a label
    that is none.
    """
    if not len(paths):
        raise UsageError(f"the list of images in {folder} is empty: allowed are one image and more")
    if outside := [path for path in paths if not _is_inside(path)]:
        raise UsageError(f"a list of images names {repr(str(outside[0])[:200])[1:-1]}: allowed are files in {folder}")
    if odd := [k for k in labels if not 0 <= k < len(classes)]:
        raise UsageError(f"a list of images in {folder} names class {odd[0]}: allowed are 0 to {len(classes) - 1}")
    encoded = pa.array([os.fsencode(path) for path in paths], pa.binary())
    rows = Files(folder, encoded, np.arange(len(paths)))
    return Found(rows, np.asarray(labels, np.int64), tuple(map(printable, classes)))


def _is_inside(path: object) -> bool:
    """Whether this is a path below a folder."""
    with contextlib.suppress(UnicodeEncodeError):
        is_name = isinstance(path, str) and path and b"\0" not in os.fsencode(path)
        return bool(is_name) and not PurePath(path).is_absolute() and ".." not in PurePath(path).parts
    return False


def text(name: object) -> str:
    """A name that can be printed and written: bytes that are not UTF-8 are \\xe9."""
    return os.fsencode(str(name)).decode("utf-8", "backslashreplace")


def printable(name: object) -> str:
    """The same in one Unicode form, so that the names of classes compare."""
    return unicodedata.normalize("NFC", text(name))


def decode(rows: Rows, i: int, mode: str = "RGB") -> Image.Image:
    """Image i in RGB or grey ("L"), upright as its EXIF tag says. Raises UsageError that names it if it cannot be read.

    Grey and palette images and CMYK are converted, 16 bits cut down to 8; transparency is dropped.
    """
    try:
        with rows.open(i) as image:
            if (pixels := image.width * image.height) > MAX_PIXELS:
                raise UsageError(f"{rows.name(i)} has {pixels:,} pixels: allowed are at most {MAX_PIXELS:,}")
            # a photograph with a preview beside it (MPO) is one image
            if getattr(image, "is_animated", False) and image.format != "MPO":
                raise UsageError(f"{rows.name(i)} holds {image.n_frames} images, an animation or pages: allowed is one")
            if image.getexif().get(ORIENTATION, 1) != 1:
                image = ImageOps.exif_transpose(image)
            if image.mode == "F":
                raise UsageError(f"{rows.name(i)} has floating-point pixels: allowed are whole numbers of 8 or 16 bits")
            if image.mode.startswith("I"):
                deep = np.asarray(image)
                if not 0 <= deep.min() <= deep.max() <= 65535:
                    raise UsageError(
                        f"{rows.name(i)} has values from {deep.min()} to {deep.max()}: allowed are 0 to 65535"
                    )
                image = Image.fromarray((deep >> 8).astype(np.uint8))
            return image.convert(mode)
    except UsageError:
        raise
    except Exception as fault:  # damaged bytes end in exceptions of every kind
        raise UsageError(f"{rows.name(i)} cannot be read ({type(fault).__name__}): replace or remove it") from fault


# ------------------------------------------------------------------------------------------------- folders


def read_folder(folder: Path | str, split: str | Sequence[str]) -> Found:
    """A split of a folder, in class folders, parquet or .tar files. split: a key of SPLITS, or names of which the first counts.

    Raises UsageError for a folder or a split that is not there, an empty class folder, labels that are not numbers from
    0, other classes than those of the training images, and two copies of the split.
    """
    folder, names = Path(folder), SPLITS.get(split, (split,)) if isinstance(split, str) else tuple(split)
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}")
    place, train = find_split(folder, names), find_split(folder, SPLITS["train"])
    if place is None:
        there = ", ".join(sorted(map(printable, os.listdir(folder)))[:6]) or "nothing"
        forms = f"as class folders ({names[0]}/<class>/*.jpg and the like), parquet or .tar files named by it"
        raise UsageError(f"{folder} has no split {' or '.join(map(repr, names))}, {forms}: it holds {there}")
    known = () if train in (None, place) else classes_of(train)
    found = read_place(place, known)
    if known and found.classes != tuple(known):
        differ = sorted(set(found.classes) ^ set(known))
        said = f"{len(differ)} names, the first is {differ[0]}" if differ else "their order"
        raise UsageError(f"{folder}: the classes of {names[0]} and train differ in {said}: both must have the same")
    return found


def read_split(folder: Path | str, split: str) -> Found:
    """train, validation or test of a folder that need not have all three.

    Without test images, the validation images are the test split. Without validation images, or where they are the test
    split, of each class the last tenth of the training images is held out. Raises UsageError where that leaves none.
    """
    folder = Path(folder)
    validation, test = (find_split(folder, SPLITS[name]) is not None for name in ("validation", "test"))
    if split == "test":
        return read_folder(folder, "validation" if validation and not test else "test")
    if split not in SPLITS or (validation and test):
        return read_folder(folder, split)
    found = read_folder(folder, "train")
    held = held_out(found.labels)
    if lone := set(found.labels.tolist()) - set(found.labels[~held].tolist()):
        allowed = "two and more, of which one is held out, or validation images"
        raise UsageError(f"{folder} has one training image of class {found.classes[min(lone)]}: allowed are {allowed}")
    return found.take(np.flatnonzero(held if split == "validation" else ~held))


def find_split(folder: Path, names: Sequence[str]) -> Path | list[Path] | None:
    """Where the first of these splits is: the folder that holds its class folders, or its parquet or .tar files."""
    for name in names:
        if (folder / name).is_dir() and _folders_in(folder / name):
            return folder / name
        if shards := shards_of(folder, name, ".parquet"):
            return shards
    # Class folders alone are training images.
    split_folders = any((folder / name).exists() for words in SPLITS.values() for name in words)
    if "train" in names and not split_folders and any(images_in(folder / name) for name in _folders_in(folder)):
        return folder
    # An archive may have been unpacked beside it, so archives come last.
    return next((shards for name in names if (shards := shards_of(folder, name, ".tar"))), None)


def read_place(place: Path | list[Path], known: Sequence[str] = ()) -> Found:
    """A split where `find_split` found it. known: its classes, where its files have no names for them."""
    if isinstance(place, Path):
        return read_class_folders(place)
    return (read_tar if place[0].suffix == ".tar" else read_parquet)(place, known)


def classes_of(place: Path | list[Path]) -> tuple[str, ...]:
    """The classes of a split, in the order of their labels."""
    return read_place(place).classes if isinstance(place, list) else tuple(map(printable, _folders_in(place)))


def read_class_folders(place: Path, numbered: bool = False) -> Found:
    """`place`/<class>/.../image. A class's label is its rank among the folders, or where they are `numbered` its name."""
    names = _folders_in(place)
    if numbered and (other := [name for name in names if not name.isdecimal()]):
        raise UsageError(f"the class folders of {place} are numbers, it holds {other[0]!r}")
    ranks = list(map(int, names)) if numbered else list(range(len(names)))
    images = [images_in(place / name) for name in names]
    if empty := [name for name, paths in zip(names, images, strict=True) if not paths]:
        there = f"{len(empty)} of {len(names)} class folders in {place} hold no image"
        raise UsageError(f"{there}, the first is {printable(empty[0])}: allowed are {', '.join(IMAGE_FILES)}")
    paths = [os.path.join(name, path) for name, paths in zip(names, images, strict=True) for path in paths]
    labels = np.repeat(ranks, [len(paths) for paths in images])
    return files(place, paths, labels, range(ranks[-1] + 1) if numbered else names)


def _folders_in(place: Path) -> list[str]:
    """Class folders, in the order of their numbers where all are numbers. Names count in one Unicode form."""
    names = [name for name in os.listdir(place) if os.path.isdir(place / name) and _visible(name)]
    return sorted(names, key=int if all(name.isdecimal() for name in names) else printable)


def images_in(place: Path) -> list[str]:
    """Every image below a folder, by its path from there, in the order of folders, then names. Links are followed.

    Raises UsageError for a folder that cannot be read.
    """

    def unread(fault: OSError) -> None:
        raise UsageError(f"folder {text(fault.filename)} cannot be read ({fault.strerror})") from fault

    walked, seen = [], set()
    for base, folders, names in os.walk(place, onerror=unread, followlinks=True):
        if (real := os.path.realpath(base)) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = filter(_visible, folders)
        walked.append((base, sorted(n for n in names if _visible(n) and n.lower().endswith(IMAGE_FILES))))
    start = len(str(place)) + 1
    return [os.path.join(base, name)[start:] for base, names in sorted(walked) for name in names]


def _visible(name: str) -> bool:
    return not name.startswith(".") and name not in NO_CLASS


# ------------------------------------------------------------------------------------------------- parquet and .tar


def shards_of(folder: Path, split: str, suffix: str) -> list[Path]:
    """Files here or one folder down whose path has the split's name as a word: train.parquet, data/train-0.parquet, val/7.tar.

    Raises UsageError where they are not one set: two configurations or copies beside each other, or a part of the shards.
    """
    there = (p for form in (f"*{suffix}", f"*/*{suffix}") for p in sorted(folder.glob(form)))
    files = [p for p in there if _visible(p.name) and p.is_file()]  # a pipe would be waited for
    shards = [p for p in files if split in re.split(r"[^a-z]+", str(p.relative_to(folder)).lower())]
    sets = {(p.parent, re.sub(r"\d+", "0", p.stem)): p for p in shards}
    if len(sets) > 1:
        some = " and ".join(str(p.relative_to(folder)) for p in list(sets.values())[:2])
        raise UsageError(f"{folder} has {split} more than once, {some}: allowed is one set of files for each split")
    if shards and (count := re.search(r"-of-(\d+)$", shards[0].stem)) and int(count[1]) != len(shards):
        raise UsageError(
            f"{folder} has {len(shards)} of the {int(count[1])} files of {split}: {shards[0].name} counts them"
        )
    return shards


def read_parquet(shards: Sequence[Path], known: Sequence[str] = ()) -> Found:
    """Images and labels of parquet files. Class names are in the files, as `datasets` writes them, or `known`, or numbers."""
    source = f"{shards[0]}" + (f" and {len(shards) - 1} more" if len(shards) > 1 else "")
    form, *others = map(_form, shards)
    if odd := [path for path, other in zip(shards[1:], others, strict=True) if other != form]:
        raise UsageError(f"{odd[0]} has other columns, types or names of classes than {shards[0]}: allowed is one form")
    image, label, kind, _, names = form
    labels, classes = labelled(_column(shards, label), names or known, f"column {label} of {source}")
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if kind not in (pa.binary(), pa.large_binary()):
        raise UsageError(f"column {image} of {source} holds cells of type {kind}: allowed are encoded images, as bytes")
    rows = Cells(functools.partial(_cells, _stamps(shards), image), np.arange(len(labels)), source)
    return Found(rows, labels, classes)


def _form(path: Path) -> tuple:
    """The columns of images and labels of a parquet file with their types, and the names of the classes."""
    with intact(path):
        schema = pq.read_schema(path)
    image, label = image_and_label(schema.names, str(path))
    return (
        image,
        label,
        schema.field(image).type,
        schema.field(label).type,
        _class_names(schema.metadata, label, str(path)),
    )


def _class_names(metadata: dict[bytes, bytes] | None, label: str, source: str) -> list[str]:
    """The names that `datasets` has written beside a column of labels; none where there are none."""
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        names = features.get(label, {}).get("names") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError
    except (ValueError, AttributeError, TypeError, RecursionError) as fault:
        raise UsageError(f"the names of classes in the metadata of {source} cannot be read") from fault
    return names


def read_tar(shards: Sequence[Path], known: Sequence[str] = ()) -> Found:
    """Images and labels of WebDataset's files. Classes are `known`, or numbers."""
    index, labels = _members(_stamps(shards))
    return Found(Members(list(shards), index), *labelled(labels, known, f".cls in {shards[0]}"))


@functools.lru_cache(maxsize=4)
def _members(stamps: tuple[tuple[str, int, int], ...]) -> tuple[np.ndarray, pa.ChunkedArray]:
    """Where each image of .tar files is, int64 (N, 3), and its label. Of all images only the headers are read."""
    places, labels = {}, {}
    for number, (path, *_) in enumerate(stamps):
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    stem, suffix = os.path.splitext(member.name)
                    if suffix.lower() in IMAGE_FILES and member.isfile():
                        if (number, stem) in places:
                            raise UsageError(f"{path} has two images {text(stem)}: allowed is one beside its .cls")
                        places[number, stem] = (number, member.offset_data, member.size)
                    elif suffix == ".cls" and member.isfile() and member.size < 20:
                        labels[number, stem] = int(tar.extractfile(member).read())
        except UsageError:
            raise
        except (tarfile.TarError, ValueError, OSError, EOFError) as fault:
            raise UsageError(f"{path} is damaged, or not an uncompressed .tar of images and .cls") from fault
    if places.keys() != labels.keys():
        raise UsageError(f"{stamps[0][0]} and those beside it do not hold a .cls with a label for each image")
    column = pa.chunked_array([pa.array([min(labels[key], 2**62) for key in places], pa.int64())])
    return np.array(list(places.values()), np.int64), column


def _stamps(shards: Sequence[Path]) -> tuple[tuple[str, int, int], ...]:
    """Path, size and time of each file: the same for files that have not changed."""
    return tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in shards)


def image_and_label(columns: Sequence[str], source: str) -> tuple[str, str]:
    """The names of the two columns that are read."""
    image, label = (next((c for c in names if c in columns), None) for names in (IMAGE_COLUMNS, LABEL_COLUMNS))
    if image is None or label is None or columns.count(image) + columns.count(label) > 2:
        allowed = " and ".join(f"one of {', '.join(names)}" for names in (IMAGE_COLUMNS, LABEL_COLUMNS))
        raise UsageError(f"{source} has the columns {', '.join(columns)}: allowed are {allowed}")
    return image, label


def labelled(column: pa.ChunkedArray, names: Sequence[str], what: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels int64 (N,), and the names of their classes, or without names their numbers.

    Raises UsageError for a label that is not a whole number from 0 to the number of classes.
    """
    fault = None
    if len(column) == 0:
        fault = "nothing"
    elif column.null_count:
        fault = f"{column.null_count} empty cells"
    elif not pa.types.is_integer(column.type):
        fault = f"cells of type {column.type}"
    else:
        low, high = pc.min_max(column).as_py().values()
        # Numbers that name their classes themselves: not without end, or they are identities of images and no classes.
        if not names and low == 0 and high < max(len(column), 100_000):
            names = [str(k) for k in range(high + 1)]
        if low < 0 or high >= len(names):
            fault = f"{low} to {high}" + (f", with {len(names)} classes" if names else "")
    if fault:
        raise UsageError(f"{what} holds {fault}: allowed are whole numbers from 0, one for each image")
    return column.to_numpy().astype(np.int64), tuple(names)


def _batches(shards: Sequence[Path], name: str) -> Iterator[pa.RecordBatch]:
    """One column of all files. In parts: a row group of images may be more than Arrow can hold in one piece."""
    for path in shards:
        with intact(path):
            yield from pq.ParquetFile(path).iter_batches(1000, columns=[name])


def _column(shards: Sequence[Path], name: str) -> pa.ChunkedArray:
    with intact(shards[0]):
        return pa.chunked_array(
            [batch[name] for batch in _batches(shards, name)], pq.read_schema(shards[0]).field(name).type
        )


@functools.lru_cache(maxsize=4)
def _cells(stamps: tuple[tuple[str, int, int], ...], name: str) -> pa.ChunkedArray:
    """Encoded images of parquet files (path, size, time): in memory, or where they are large from a copy that is mapped.

    Rows of a parquet file cannot be read one at a time; those of an Arrow file can. The copy is as large as the images'
    files, in $XDG_CACHE_HOME/vitlib (~/.cache/vitlib), and may be removed.
    """
    paths = [Path(path) for path, _, _ in stamps]
    if sum(size for _, size, _ in stamps) <= IN_MEMORY:
        return _column(paths, name)
    digest = hashlib.sha256(repr((stamps, name)).encode()).hexdigest()[:16]
    copy = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitlib" / f"{digest}.arrow"
    if not copy.is_file():
        check_target(copy)
        schema = pa.schema([pa.field(name, pq.read_schema(paths[0]).field(name).type)])
        with no_room(f"for {copy}"), write_whole(copy) as draft, pa.ipc.new_file(str(draft), schema) as out:
            for batch in _batches(paths, name):
                out.write_batch(pa.record_batch([batch[name]], schema))
    with intact(copy):
        return pa.ipc.open_file(pa.memory_map(str(copy))).read_all()[name]
