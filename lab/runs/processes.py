"""Processes that end with the one that asked for them, and the cores that this one may use. The standard library alone."""

from __future__ import annotations

import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from vitlib.files import alive, sweep

PATIENCE = 6  # seconds that a command has to end what it started
CGROUP = Path("/sys/fs/cgroup")
QUOTAS = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))  # of a container: cgroup v2, v1


def end_with(parent: int, asker: int = 0, end: Callable[[], None] = lambda: os._exit(1)) -> None:
    """End this process when `parent`, the one that started it, is gone, or `asker` is; however that one ended.

    A thread looks twice a second, so that it works wherever the process waits. On Windows nothing is watched.
    """

    def watch() -> None:
        while os.getppid() == parent and (not asker or alive(asker)):
            time.sleep(0.5)
        print("the process that asked for this is gone: this one ends", file=sys.stderr, flush=True)
        sweep(tempfile.gettempdir())  # what that one has left
        end()

    if os.name != "nt":
        threading.Thread(target=watch, daemon=True).start()


def end_cleanly() -> None:
    """For a command: SIGTERM stops it as Ctrl-C does, so that it ends what it started. So does the end of `make`."""

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends it at once
        # and so does waiting, e.g. for a process that still imports
        threading.Thread(target=lambda: (time.sleep(PATIENCE), os._exit(130)), daemon=True).start()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    if maker := os.environ.pop("VITLIB_MAKE", ""):
        end_with(os.getppid(), int(maker), end=lambda: os.kill(os.getpid(), signal.SIGTERM))


def cores() -> int:
    """Cores that this process may use: those that it is bound to, or what a container's quota leaves of them."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([bound, *(max(1, math.ceil(share)) for share in map(_quota, QUOTAS) if share)])


def _quota(files: tuple[str, ...]) -> float:
    """Cores of CPU time that these files allow; 0 where they set no limit or are not there."""
    try:
        quota, period = " ".join((CGROUP / file).read_text() for file in files).split()
        return max(int(quota), 0) / int(period)
    except (OSError, ValueError):
        return 0
