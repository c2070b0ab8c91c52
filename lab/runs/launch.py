"""Train what is missing: several runs side by side (`launch`), or one run by several processes (`distributed`).

Side by side, each run has a single-thread process of its own: on few cores two of them are as fast in total as one with two
threads, and far steadier. Where there are GPUs, the processes take turns in getting one.

One run over the GPUs of several machines, whose store is a folder that all see (a file from `write_order`):

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:PORT -m lab.runs.launch run.json
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.forkserver
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from lab import paths
from lab.cost.plan import cpu_seconds
from lab.runs import execute, store
from lab.runs.execute import cores
from lab.runs.results import Result
from lab.runs.spec import RunSpec
from vitlib.errors import UsageError
from vitlib.train.engine import joined, resolve
from vitlib.train.loop import NonFiniteLoss

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
    """The results of all specs, in their order; missing runs are trained first, `jobs` at a time.

    jobs: 0 = one a core, or one a GPU where a run may use one; with more, several share a GPU. Runs start in the order of
    `specs`, so seeds belong outermost. A run that fails does not stop the others; then RunsFailed names it. Raises
    UsageError if `jobs` is negative.
    """
    specs = list(specs)
    if jobs < 0:
        raise UsageError(f"jobs is {jobs}: allowed are 0 (one a core or GPU) and up")
    todo = store.missing(specs)
    if todo:
        store.sweep()
        paths.runs().mkdir(parents=True, exist_ok=True)
        own = gpus() if any(spec.device != "cpu" for spec in todo) else []
        _train(todo, min(jobs or len(own) or cores(), len(todo)), own)
    return {spec: store.find(spec) for spec in specs}


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named, count = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


def assign(jobs: int, gpus: Sequence[str]) -> list[str | None]:
    """The GPU of each of `jobs` processes, in turn; None where there is none."""
    return [gpus[job % len(gpus)] if gpus else None for job in range(jobs)]


def _train(todo: dict[RunSpec, bool], jobs: int, gpus: Sequence[str]) -> None:
    """A queue over a pool of processes; a run starts when its parent and its tokenizer are done."""
    context = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")
    if sys.platform != "win32":
        context.set_forkserver_preload(["lab.runs.execute"])  # torch and timm are imported once, not once a worker
        with _environment(MEMORY):
            multiprocessing.forkserver.ensure_running()
    steps, own = context.SimpleQueue(), context.SimpleQueue()
    for gpu in assign(jobs, gpus):  # each process takes one when it begins
        own.put(gpu)
    cost = {spec.hash: cpu_seconds(spec) for spec in todo}
    waiting, failed, going = list(todo), {}, {}
    bar = tqdm(
        total=sum(cost.values()), unit="s", disable=os.environ.get("VITLIB_PROGRESS") == "0", smoothing=0.1,
        mininterval=0.5 if sys.stderr.isatty() else 30,
        bar_format="{desc} {percentage:3.0f}% |{bar:24}| {elapsed} gone, {remaining} left", file=sys.stderr,
    )  # fmt: skip
    finished, reached = 0, dict.fromkeys(cost, 0.0)
    pool = ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_begin, initargs=(steps, own, os.environ.copy(), os.getpid())
    )
    try:
        while waiting or going:
            for spec in list(waiting):
                if lost := [need for need in spec.needs if need in failed]:
                    failed[spec] = f"{spec.describe()}: its {lost[0].protocol} run failed"
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


def _begin(steps, own, environment: dict[str, str], parent: int) -> None:
    """In each worker: the caller's environment (the fork server keeps an older one), its GPU, and the way to report."""
    global _steps, _parent
    _steps, _parent = steps, parent
    os.environ.update(environment)
    if (gpu := own.get()) is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu


def _work(spec: RunSpec, need_weights: bool) -> None:
    last = time.monotonic()

    def on_step(step: int, steps: int) -> None:
        nonlocal last
        if time.monotonic() - last > 0.5:
            last = time.monotonic()
            _steps.put((spec.hash, step / steps))
            if not store.alive(_parent):
                os._exit(1)  # the process that asked for this run is gone; sys.exit would only end the task

    execute.execute(spec, need_weights, on_step)


# ---------------------------------------------------------------------------------------------------- one run, shared

LAST_LINES = 30  # of what the processes printed, in the message of a run that failed: a traceback and what stood before
TORCHRUN_SAYS = re.compile(r"[WE]\d{4} .*torch/distributed/elastic/")  # a line of its own log
PATIENCE_S = 10.0  # for processes that are asked to end


def distributed(spec: RunSpec, processes: int, need_weights: bool = False, every_s: float = 300.0) -> Result:
    """The result of one run that `processes` processes of this machine train together, started by torchrun.

    What it needs must be finished, with weights (the command line trains it first). What the processes print goes to <store>/.logs/<hash>.log. Raises
    UsageError for what they refuse, and RunsFailed, with the log's last lines, when one of them fails or is killed; the
    others are ended then, and the same call goes on from the last checkpoint.
    """
    if processes < 1:
        raise UsageError(f"processes is {processes}: allowed are 1 and up")
    if store.find(spec) is None or (need_weights and not store.weights_path(spec).is_file()):
        for need in spec.needs:
            if not store.weights_path(need).is_file():
                raise UsageError(
                    f"the run {spec.hash} ({spec.describe()}) starts from the {need.protocol} run {need.hash} "
                    f"({need.describe()}), whose weights are not in {paths.runs()}: train that one first"
                )
        log = paths.runs() / ".logs" / f"{spec.hash}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="vitlib-") as folder:
            order = write_order(spec, Path(folder, "run.json"), need_weights, every_s)
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            code = _until_it_ends([*command, "-m", "lab.runs.launch", str(order)], log, spec.threads)
            if (said := _said(order)).is_file():
                usage, text = json.loads(said.read_text(encoding="utf-8"))
                raise UsageError(text) if usage else RunsFailed(text)
        if code:
            what = f"{processes} processes that train the run {spec.hash} ({spec.describe()}) ended with code {code}"
            raise RunsFailed(f"the {what}; the last lines of {log}:\n{last_lines(log)}")
    return store.find(spec)


def write_order(spec: RunSpec, path: Path, need_weights: bool = False, every_s: float = 300.0) -> Path:
    """The file that tells the processes of a distributed run what to train."""
    order = {"spec": asdict(spec), "need_weights": need_weights, "every_s": every_s}
    path.write_text(json.dumps(order), encoding="utf-8")
    return path


def _said(order: Path) -> Path:
    """Where a process leaves the one sentence that it ended with."""
    return order.with_suffix(".said")


def last_lines(log: Path) -> str:
    """What the processes printed last, and torchrun's word on the first that failed; its own traceback stands between."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    end = next((i for i, line in enumerate(lines) if TORCHRUN_SAYS.match(line)), len(lines))
    cause = next((i for i, line in enumerate(lines) if line.startswith("Root Cause")), len(lines))
    return "\n".join(lines[max(end - LAST_LINES, 0) : end] + lines[cause:])


def _until_it_ends(command: list[str], log: Path, threads: int) -> int:
    """The exit code of a command whose lines go to `log`. Nothing of it is left, whatever ends this function."""
    path = os.pathsep.join([str(paths.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), "VITLIB_PARENT": str(os.getpid())}
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            env=MEMORY | os.environ | own,
        )  # fmt: skip
        try:
            return process.wait()
        finally:
            with suppress(subprocess.TimeoutExpired):
                process.terminate()  # torchrun ends its processes
                process.wait(PATIENCE_S)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it did not end sees that it is gone: `_watch`


def main(order: Path) -> None:
    """One of the processes that torchrun started: train the run of `order` together with the others."""
    _watch(int(os.environ.get("VITLIB_PARENT", "0")) or os.getppid())
    wanted = json.loads(order.read_text(encoding="utf-8"))
    try:
        spec = RunSpec.from_fields(wanted["spec"])
        with joined(resolve(spec.device)) as shard:
            execute.execute(spec, wanted["need_weights"], _printed(shard.rank == 0), wanted["every_s"])
    except (UsageError, NonFiniteLoss) as fault:
        _said(order).write_text(json.dumps([isinstance(fault, UsageError), str(fault)]), encoding="utf-8")
        sys.exit(str(fault))


def _watch(asker: int) -> None:
    """End this process when torchrun or the process that asked for the run is gone, even while it waits for others."""
    torchrun = os.getppid()

    def watch() -> None:
        while os.getppid() == torchrun and store.alive(asker):
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _printed(first: bool, every_s: float = 10.0) -> Callable[[int, int], None]:
    """Says how far the run is, in the log."""
    last = 0.0

    def on_step(step: int, steps: int) -> None:
        nonlocal last
        if first and time.monotonic() - last > every_s:
            last = time.monotonic()
            print(f"step {step} of {steps}", flush=True)

    return on_step


if __name__ == "__main__":
    main(Path(sys.argv[1]))
