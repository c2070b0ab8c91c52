"""Train what is missing: runs side by side (`launch`), one run by several processes (`distributed`), SLURM jobs (`submit`).

Side by side, each run has a single-thread process: on few cores two of them are as fast in total as one with two threads,
and far steadier. Where there are GPUs, the processes take turns in getting one.
"""

from __future__ import annotations

import importlib.util
import math
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from lab import paths
from lab.data import published
from lab.runs import execute, store
from lab.runs.results import Result
from lab.runs.spec import RunSpec
from vitlib.errors import UsageError
from vitlib.files import private_folder
from vitlib.train.engine import check_shares, joined, resolve

if TYPE_CHECKING:
    from multiprocessing.queues import SimpleQueue

    from submitit import Job
    from submitit.helpers import DelayedSubmission

# How the GNU C library hands out memory to a training process: large pages, and nothing given back between steps, since
# the same tensors come again. Read when a process starts, without effect elsewhere; the numbers stay the same. A step of
# the cpu profile takes about 10 % less time.
MEMORY = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824"
    ":glibc.malloc.trim_threshold=2147483647:glibc.malloc.top_pad=67108864"
}


class RunsFailed(RuntimeError):
    """Some runs could not be trained; the message names them. Finished runs are kept."""


def launch(
    specs: Iterable[RunSpec],
    jobs: int = 0,
    seconds: Callable[[RunSpec], float] = lambda spec: 1.0,
    stamps: Mapping[str, str] = {},
) -> dict[RunSpec, Result]:
    """The results of all specs, in their order; missing runs are trained first, `jobs` at a time.

    jobs: 0 = one per core, or per GPU where a run may use one; with more, several share a GPU. seconds: expected time of a
    run, for the progress bar. stamps: as in `execute`. Runs start in the order of `specs`, so seeds
    belong outermost. A run that fails does not stop the others; then RunsFailed names it.
    """
    specs = list(specs)
    if jobs < 0:
        raise UsageError(f"jobs is {jobs}: allowed are 0 (one per core or GPU) and up")
    if todo := store.missing(specs):
        for spec in todo:  # what every process would refuse, before one is started
            check(spec)
        store.sweep_store()
        paths.runs().mkdir(parents=True, exist_ok=True)
        devices = gpus() if any(spec.device != "cpu" for spec in todo) else []
        jobs = min(jobs or len(devices) or execute.cores(), len(todo))
        _train(todo, jobs, devices, {spec.hash: seconds(spec) for spec in todo}, stamps)
    return {spec: store.find(spec) for spec in specs}


def check(spec: RunSpec) -> None:
    """Raises UsageError where this machine has no device for a run, not its data, or not the weights that it starts from."""
    resolve(spec.device)
    if spec.facts.image_size == 0 and os.sep not in spec.data and published.locate(spec.data) is None:
        raise published.absent(spec.data)
    spec.check_start()


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named, count = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


def _train(
    todo: list[RunSpec], jobs: int, gpus: list[str], cost: Mapping[str, float], stamps: Mapping[str, str]
) -> None:
    """A queue over a pool of processes; a run starts when its parent and its tokenizer are done."""
    context = _context()
    steps, devices = context.SimpleQueue(), context.SimpleQueue()
    for job in range(jobs):  # each process takes one when it begins
        devices.put(gpus[job % len(gpus)] if gpus else None)
    waiting, going, failed = list(todo), {}, {}
    shares = dict.fromkeys(cost, 0.0)  # how much of each run is done
    bar = tqdm(
        total=sum(cost.values()), disable=os.environ.get("VITLIB_PROGRESS") == "0", smoothing=0.1, file=sys.stderr,
        mininterval=0.5 if sys.stderr.isatty() else 30,
        bar_format="{desc} {percentage:3.0f}% |{bar:24}| {elapsed} gone, {remaining} left",
    )  # fmt: skip
    pool = ProcessPoolExecutor(jobs, context, initializer=_begin, initargs=(steps, devices, os.environ.copy()))
    try:
        while waiting or going:
            for spec in list(waiting):
                if lost := [need for need in spec.needs if need in failed]:
                    failed[spec] = f"{spec.describe()}: its {lost[0].protocol} run failed"
                    waiting.remove(spec)
                elif len(going) < jobs and not {*spec.needs} & {*waiting, *going.values()}:
                    going[pool.submit(_work, spec, stamps)] = spec
                    waiting.remove(spec)
            done, _ = wait(going, timeout=0.5, return_when=FIRST_COMPLETED)
            while not steps.empty():
                name, share = steps.get()
                shares[name] = share
            for future in done:
                spec = going.pop(future)
                shares[spec.hash] = 1.0
                try:
                    future.result()
                except BrokenProcessPool:
                    raise RunsFailed("a training process was killed from outside (out of memory?)") from None
                except UsageError:  # damaged data, say: every other run would meet it too
                    raise
                except Exception as fault:
                    failed[spec] = str(fault) if spec.hash in str(fault) else f"{spec}: {type(fault).__name__}: {fault}"
            finished, now = len(todo) - len(waiting) - len(going), f", {len(going)} going" if going else ""
            bar.set_description_str(f"{finished} of {len(todo)} runs{now}", refresh=False)
            bar.n = min(bar.total, sum(cost[name] * share for name, share in shares.items()))
            bar.update(0)
    except BaseException:  # Ctrl-C, or a worker that was killed: do not wait for the runs that are going
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        bar.close()
    if failed:
        raise RunsFailed(f"{len(failed)} of {len(todo)} runs failed, the others are kept: {'; '.join(failed.values())}")


def _context() -> multiprocessing.context.BaseContext:
    """Processes with `MEMORY` that are forked from one which has imported torch and timm, where the system can do that."""
    if sys.platform == "win32":
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lab.runs.forked", "lab.runs.execute"])
    added = {name: value for name, value in MEMORY.items() if name not in os.environ}
    os.environ |= added
    forkserver.ensure_running()
    for name in added:
        del os.environ[name]
    return context


_steps = None


def _begin(steps: SimpleQueue, devices: SimpleQueue, environment: dict[str, str]) -> None:
    """In each worker: the caller's environment (the fork server keeps an older one), its GPU, and the way to report.

    It ends when the process that asked is gone, whatever it does then: a lock may be waited for, or data read.
    """
    global _steps
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    _steps = steps
    os.environ.update(environment)
    if (gpu := devices.get()) is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu


def _work(spec: RunSpec, stamps: Mapping[str, str]) -> None:
    def report(step: int, steps: int) -> None:
        _steps.put((spec.hash, step / steps))

    execute.execute(spec, execute.each_percent(report), stamps=stamps)


LAST_LINES = 80  # of the log, in the message of a run that failed: a traceback and torchrun's summary


def distributed(spec: RunSpec, processes: int, every_s: float = 300.0, stamps: Mapping[str, str] = {}) -> Result:
    """The result of one run that `processes` processes of this machine train together, started by torchrun.

    What it needs must be finished, with weights. What the processes print goes to <store>/.logs/<hash>.log. Raises what they
    refuse, and RunsFailed, with the log's last lines, when one of them fails or is killed; the others are ended then, and
    the same call goes on from the last checkpoint.
    """
    check(spec)
    check_shares(spec.recipe.batch_size, processes)
    log = paths.runs() / ".logs" / f"{spec.hash}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with private_folder() as folder:
        order = folder / "run.order"
        order.write_bytes(pickle.dumps((spec, {"every_s": every_s, "stamps": stamps})))
        forked = ["-m", "lab.runs.forked"]
        torchrun = [*forked, "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        code = _until_it_ends([*torchrun, *forked, "lab.runs.execute", str(order)], log, spec.threads)
        if (fault := order.with_suffix(".fault")).is_file():  # the one sentence that a process ended with
            raise pickle.loads(fault.read_bytes())
    if code:
        what = f"the {processes} processes that train the {spec} ended with code {code}; the last lines of {log}:"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        raise RunsFailed("\n".join([what, *lines[-LAST_LINES:]]))
    return store.find(spec)


def _until_it_ends(words: list[str], log: Path, threads: int) -> int:
    """The exit code of a Python whose lines go to `log`. If this call is ended, what was started ends itself."""
    path = os.pathsep.join([str(paths.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    named = {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), "VITLIB_PARENT": str(os.getpid())}
    with log.open("wb") as file:
        streams = {"stdout": file, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, "start_new_session": True}
        return subprocess.run([sys.executable, *words], env=MEMORY | os.environ | named, **streams).returncode


TIME_LIMITS = 1000  # how often a job is put back into the queue: until it is done


def submit(
    specs: Iterable[RunSpec], folder: str | Path, *, partition: str | None = None, gpus: int = 1, nodes: int = 1,
    hours: float = 24.0, cpus: int = 16, memory_gb: int = 60, stamps: Mapping[str, str] = {},
) -> dict[RunSpec, Job]:  # fmt: skip
    """SLURM jobs, through submitit, for all missing runs: one per run, which waits for the jobs of the runs that it needs.

    folder: where submitit keeps scripts and logs. partition: None = the cluster's default. gpus: of each of `nodes`
    machines, one process each; 0 = one process on CPU. hours, cpus and memory_gb: of a job, of a process (which reads images
    with `execute.LOADERS` more), of a machine. The run store (`VITLIB_RUNS`) must be a folder that all machines see. A job
    that is stopped by its time limit or preempted is put back into the queue and goes on from the run's last checkpoint.
    Raises UsageError where SLURM's command or submitit is not there.
    """
    if not 0 < hours < math.inf:
        raise UsageError(f"hours is {hours}: a job needs hours above 0")
    if shutil.which("sbatch") is None:
        raise UsageError("there is no command sbatch: submit on a machine of a SLURM cluster; elsewhere use launch")
    if importlib.util.find_spec("submitit") is None:
        raise UsageError("submitit is not installed: jobs are submitted through it (pip install submitit)")
    from submitit import AutoExecutor

    # submitit would give a job up after three time limits
    executor = AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=TIME_LIMITS)
    executor.update_parameters(
        name="vitlib", timeout_min=max(1, round(60 * hours)), nodes=nodes, tasks_per_node=max(gpus, 1), gpus_per_node=gpus,
        cpus_per_task=cpus, mem_gb=memory_gb, slurm_partition=partition,
    )  # fmt: skip
    jobs: dict[RunSpec, Job] = {}
    for spec in store.missing(specs):
        spec.check_start()  # machines of a cluster may have no network
        before = [jobs[need].job_id for need in spec.needs if need in jobs]
        waits = {"dependency": f"afterok:{':'.join(before)}"} if before else {}
        executor.update_parameters(slurm_additional_parameters=waits)
        jobs[spec] = executor.submit(Work(), spec, str(paths.runs()), stamps)
    return jobs


class Work:
    """What one process of a job does. The same call goes on where an earlier one was stopped."""

    def __call__(self, spec: RunSpec, store: str, stamps: Mapping[str, str]) -> dict[str, float]:
        from submitit import JobEnvironment
        from submitit.helpers import TorchDistributedEnvironment

        os.environ["VITLIB_RUNS"] = store
        several = JobEnvironment().num_tasks > 1
        if several:  # all GPUs of the machine stay visible; each process takes its own by its local rank
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        with joined(resolve(spec.device)) if several else nullcontext():
            return execute.execute(spec, stamps=stamps).metrics

    def checkpoint(self, *arguments) -> DelayedSubmission:
        """submitit asks for this when the job's time is over."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(Work(), *arguments)
