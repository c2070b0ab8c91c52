"""Files that are written whole or not at all, whenever the process is killed."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


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
