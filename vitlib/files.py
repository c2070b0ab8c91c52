"""Files that are written whole or not at all, whenever the process is killed, and tensors read without running code."""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import pathlib
import re
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

from vitlib.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


@contextlib.contextmanager
def write_whole(path: Path | str) -> Iterator[Path]:
    """A draft beside `path`, which takes its place when the block ends, and is removed when the block fails.

    `with write_whole(path) as draft: draft.write_text(...)`. Makes the folder; another process sees the old file or the
    new one. The draft's suffix is that of `path`; a link at `path` is followed.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{uuid.uuid4().hex[:12]}.{path.name}")  # unlike any other thread's or machine's
    try:
        yield draft
        with draft.open("rb+") as file:  # on the disk before it has its name: a power cut leaves no empty file
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def read_safetensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata. Raises UsageError for a file that is damaged or another one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
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
