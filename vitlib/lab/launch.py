"""Train what is missing, several runs side by side, each in a single-thread process of its own.

On few cores two single-thread processes are as fast in total as one with two threads, and far steadier.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from tqdm import tqdm

from vitlib import paths
from vitlib.errors import UsageError
from vitlib.lab import runs
from vitlib.lab.plan import cpu_seconds
from vitlib.lab.runs import Result, RunSpec

# How the GNU C library hands out memory to a training process: large pages, and nothing given back between steps, since
# the same tensors come again. Read when a process starts, without effect elsewhere; the numbers stay the same. A step of
# the cpu profile takes about 10 % less time.
MEMORY = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824"
    ":glibc.malloc.trim_threshold=2147483647:glibc.malloc.top_pad=67108864"
}


class RunsFailed(RuntimeError):
    """Some runs could not be trained; the message names them. Finished runs are kept."""


def launch(specs: Iterable[RunSpec], jobs: int = 0) -> dict[RunSpec, Result]:
    """The results of all specs, in their order; missing runs are trained first, `jobs` at a time (0 = one a core).

    Runs start in the order of `specs`, so seeds belong outermost. A run that fails does not stop the others; then
    RunsFailed names it. Raises UsageError if `jobs` is negative.
    """
    specs = list(specs)
    if jobs < 0:
        raise UsageError(f"jobs is {jobs}: allowed are 0 (one a core) and up")
    todo = runs.missing(specs)
    if todo:
        runs.sweep()
        paths.runs().mkdir(parents=True, exist_ok=True)
        _train(todo, min(jobs or cores(), len(todo)))
    return {spec: runs.find(spec) for spec in specs}


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _train(todo: dict[RunSpec, bool], jobs: int) -> None:
    """A queue over a pool of processes; a run starts when its parent and its tokenizer are done."""
    context = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")
    if sys.platform != "win32":
        context.set_forkserver_preload(["vitlib.lab.runs"])  # torch and timm are imported once, not once a worker
        with _environment(MEMORY):
            multiprocessing.forkserver.ensure_running()
    steps = context.SimpleQueue()
    cost = {spec.hash: cpu_seconds(spec) for spec in todo}
    waiting, failed, going = list(todo), {}, {}
    bar = tqdm(
        total=sum(cost.values()), unit="s", disable=os.environ.get("VITLIB_PROGRESS") == "0", smoothing=0.1,
        mininterval=0.5 if sys.stderr.isatty() else 30,
        bar_format="{desc} {percentage:3.0f}% |{bar:24}| {elapsed} gone, {remaining} left", file=sys.stderr,
    )  # fmt: skip
    finished, reached = 0, dict.fromkeys(cost, 0.0)
    pool = ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_begin, initargs=(steps, os.environ.copy(), os.getpid())
    )
    try:
        while waiting or going:
            for spec in list(waiting):
                if lost := [need for need in spec.needs if need in failed]:
                    failed[spec] = f"{runs.describe(spec)}: its {lost[0].protocol} run failed"
                    waiting.remove(spec)
                elif len(going) < jobs and not {*spec.needs} & {*waiting, *going.values()}:
                    going[pool.submit(_work, spec, todo[spec])] = spec
                    waiting.remove(spec)
            bar.set_description_str(f"{finished} of {len(todo)} runs, {len(going)} going", refresh=False)
            done, _ = wait(going, timeout=0.5, return_when=FIRST_COMPLETED)
            while not steps.empty():
                name, share = steps.get()
                reached[name] = max(reached[name], share)
            for future in done:
                spec = going.pop(future)
                finished += 1
                reached[spec.hash] = 1.0
                if (fault := _fault(future)) is not None:
                    failed[spec] = fault
            bar.n = min(bar.total, sum(cost[name] * share for name, share in reached.items()))
            bar.update(0)
    except BaseException:  # Ctrl-C, or a worker that was killed: do not wait for the runs that are going
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        bar.close()
    if failed:
        raise RunsFailed(
            f"{len(failed)} of {len(todo)} runs failed, the others are kept: " + "; ".join(failed.values())
        )


@contextmanager
def _environment(more: dict[str, str]) -> Iterator[None]:
    """The variables `more` for the processes that start here; those that are set already stay as they are."""
    added = {name: value for name, value in more.items() if name not in os.environ}
    os.environ |= added
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _fault(future: Future) -> str | None:
    """What went wrong in a run, or None. Raises what concerns all runs: UsageError, and a process that was killed."""
    try:
        future.result()
    except BrokenProcessPool:
        raise RunsFailed(
            "a training process was killed from outside (out of memory?); finished runs are kept"
        ) from None
    except UsageError:  # damaged data, say: every other run would meet it too
        raise
    except Exception as fault:
        return f"{fault}"
    return None


_steps = None
_parent = 0


def _begin(steps, environment: dict[str, str], parent: int) -> None:
    """In each worker: the caller's environment (the fork server keeps an older one), and the way to report."""
    global _steps, _parent
    _steps, _parent = steps, parent
    os.environ.update(environment)


def _work(spec: RunSpec, need_weights: bool) -> None:
    last = time.monotonic()

    def on_step(step: int, steps: int) -> None:
        nonlocal last
        if time.monotonic() - last > 0.5:
            last = time.monotonic()
            _steps.put((spec.hash, step / steps))
            if not runs.alive(_parent):
                os._exit(1)  # the process that asked for this run is gone; sys.exit would only end the task

    runs.execute(spec, need_weights, on_step)
