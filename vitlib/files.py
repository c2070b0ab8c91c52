"""Files that are written whole or not at all, whenever the process is killed, and tensors read without running code."""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import errno
import hashlib
import io
import os
import pathlib
import platform
import re
import shutil
import tempfile
import uuid
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

from vitlib.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from safetensors import safe_open
    from torch import Tensor


MACHINE = f"{zlib.crc32(platform.node().encode()):08x}"  # short, so that paths of sockets are


@contextlib.contextmanager
def write_whole(path: Path | str) -> Iterator[Path]:
    """A draft beside `path`, which takes its place when the block ends, and is removed when the block fails.

    `with write_whole(path) as draft: draft.write_text(...)`. Makes the folder; another process sees the old file or the
    new one. The draft's suffix is that of `path`; a link at `path` is followed. `sweep` removes what a kill leaves. Raises
    UsageError where a folder, a device or a pipe is at `path`, which would be lost.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is there and is no file: it is not replaced by one")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{draft_name()}.{path.name}")
    try:
        yield draft
        with draft.open("rb+") as file:  # on the disk before it has its name: a power cut leaves no empty file
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def draft_name() -> str:
    """The beginning of a name that no other thread or machine gives, and that says which process writes there."""
    return f".draft-{MACHINE}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def sweep(folder: Path | str) -> None:
    """Remove the drafts, files and folders, that processes of this machine which are gone have left directly in `folder`."""
    for draft in filter(abandoned, Path(folder).glob(".draft-*")):
        shutil.rmtree(draft, ignore_errors=True) if draft.is_dir() else draft.unlink(missing_ok=True)


def abandoned(draft: Path) -> bool:
    """Whether the process of this machine that made the draft is gone."""
    match = re.match(rf"\.draft-{MACHINE}-(\d+)-[0-9a-f]{{8}}", draft.name)
    return match is not None and not alive(int(match[1]))


@contextlib.contextmanager
def private_folder(longest: int = 4096) -> Iterator[Path]:
    """A folder for temporary files for one `with` block, whose path has at most `longest` characters; `sweep` also sees to it.

    Raises UsageError where there can be none.
    """
    room = longest - len(f"/{draft_name()}")
    for place in filter(os.path.isdir, (tempfile.gettempdir(), "/tmp")):
        sweep(place)
        with contextlib.suppress(OSError):
            if len(place) <= room:
                (folder := Path(place, draft_name())).mkdir(mode=0o700)
                break
    else:
        where = f"can be made in {tempfile.gettempdir()}: set TMPDIR to one, whose path has at most {room} characters"
        raise UsageError(f"no folder for temporary files {where}")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def alive(pid: int) -> bool:
    """Whether a process of this machine is there; on Windows, where signal 0 is Ctrl-C, always True."""
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except OSError as fault:
        return not isinstance(fault, ProcessLookupError)
    return True


@contextlib.contextmanager
def no_room(what: str) -> Iterator[None]:
    """Raises UsageError, `no room on disk` and `what`, where a disk, a quota or a limit on file sizes is full."""
    try:
        yield
    except (OSError, RuntimeError) as fault:  # torch's writer raises the second while it handles the first
        cause = fault if isinstance(fault, OSError) else fault.__context__
        if not isinstance(cause, OSError) or cause.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UsageError(f"no room on disk {what}") from fault


@contextlib.contextmanager
def intact(path: Path | str) -> Iterator[None]:
    """Inside, a file is read: raises UsageError, which names it, where it is not as its writer left it."""
    try:
        yield
    except UsageError:
        raise
    except Exception as fault:  # damaged bytes end in exceptions of every kind
        raise UsageError(f"{path} is damaged and cannot be read ({type(fault).__name__})") from fault


def check_target(path: Path | str, suffixes: Sequence[str] = ()) -> None:
    """Raises UsageError where no file can be written at `path`, or where it has none of these suffixes."""
    path, fault = Path(path), ""
    try:
        above = next(folder for folder in Path(os.path.abspath(path)).parents if folder.exists())
        if path.exists() and not path.is_file():
            fault = "is there and is no file"
        elif not (above.is_dir() and os.access(above, os.W_OK)):
            fault = f"cannot be written in {above}"
    except OSError as error:
        fault = f"cannot be a name ({error.strerror})"
    if fault or (suffixes and path.suffix.lower() not in suffixes):
        allowed = f" that ends in {' or '.join(suffixes)}" if suffixes else ""
        raise UsageError(f"{str(path)[:200]!r} {fault or 'is of another kind'}: allowed is a file{allowed}")


def sha256(path: Path | str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_table(path: Path | str, rows: Iterable[Sequence[object]]) -> None:
    """A CSV file, whole or not at all; the first row has the names of the columns."""
    with write_whole(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def write_figure(path: Path | str, figure: Figure, **options: object) -> None:
    """A picture, whole or not at all, of the kind that the suffix names. Through memory: not every writer says that a disk is full."""
    figure.savefig(picture := io.BytesIO(), format=Path(path).suffix[1:].lower(), **options)
    with write_whole(path) as draft:
        draft.write_bytes(picture.getvalue())


def write_safetensors(path: Path | str, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Tensors by name, and metadata, whole or not at all. Tensors that share memory are written one by one.

    Raises UsageError for tensors without values.
    """
    from safetensors.torch import save

    if absent := [name for name, t in state.items() if t.is_meta]:
        raise UsageError(f"{path} is not written: {absent[0]} is on the meta device and has no values")
    with write_whole(path) as draft:  # as bytes: the library's own writer says in its own words that a disk is full
        # each by itself, for the library refuses tensors that share memory
        alone = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in state.items()}
        draft.write_bytes(save(alone, metadata))


def read_safetensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata. Raises UsageError for a file that is damaged or another one.

    Copies, which lie where the allocator puts them: at a file's own offsets matrix products round otherwise on some CPUs.
    """
    with _safetensors(path) as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}


def read_metadata(path: Path | str) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors. Raises UsageError as `read_safetensors`."""
    with _safetensors(path) as file:
        return file.metadata() or {}


@contextlib.contextmanager
def _safetensors(path: Path | str) -> Iterator[safe_open]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as fault:
        raise UsageError(f"{path} cannot be read as a safetensors file ({first_line(fault)})") from fault


def read_pth(path: Path | str) -> object:
    """What torch.save wrote, on the CPU: tensors, and the values that training programs keep beside them.

    Raises UsageError for a damaged file, and for one that needs code to be run: none is.
    """
    import numpy as np
    import torch

    harmless = [
        argparse.Namespace, collections.defaultdict, dict, list, torch.torch_version.TorchVersion, np.dtype,
        *{type(np.dtype(kind)) for kind in np.typecodes["All"] if kind not in "OV"},
        *((np._core.multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
        *((pathlib.PurePath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
    ]  # fmt: skip
    try:
        if zipfile.is_zipfile(path):  # torch does not look at checksums
            with zipfile.ZipFile(path) as file:
                # torch.save may leave them out: all are 0 then
                if any(part.CRC for part in file.infolist()) and (damaged := file.testzip()):
                    raise zipfile.BadZipFile(damaged)
        with torch.serialization.safe_globals(harmless):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as fault:  # damaged bytes end in exceptions of every kind
        code = re.search(r"GLOBAL (\S+)", str(fault)) if isinstance(fault, UnpicklingError) else None
        if code:
            raise UsageError(
                f"{path} needs pickled code ({code[1]}), which is never run: allowed are tensors"
            ) from fault
        raise UsageError(f"{path} is damaged or was not written by torch.save ({type(fault).__name__})") from fault


def first_line(fault: Exception) -> str:
    """An exception in a line."""
    return (str(fault).strip().splitlines() or [""])[0].rstrip(". ") or type(fault).__name__
