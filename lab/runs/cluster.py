"""Runs on a SLURM cluster, through submitit: one job a run, which waits for the jobs of the runs that it needs.

    jobs = submit(specs, "/shared/jobs", partition="gpu", gpus=8, hours=24)
    results = [job.results() for job in jobs.values()]

The run store (`VITLIB_RUNS`) must be a folder that all machines see. A job that is stopped by its time limit or preempted
is put back into the queue and goes on from the run's last checkpoint. cluster="local" runs the jobs on this machine.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lab import paths
from lab.runs import execute, store
from lab.runs.spec import RunSpec
from vitlib.errors import UsageError, unknown
from vitlib.train.engine import joined, resolve

if TYPE_CHECKING:
    from submitit import Job
    from submitit.helpers import DelayedSubmission

CLUSTERS = ("slurm", "local")


def submit(
    specs: Iterable[RunSpec],
    folder: str | Path,
    *,
    partition: str | None = None,
    gpus: int = 1,
    nodes: int = 1,
    hours: float = 24.0,
    cpus: int = 16,
    memory_gb: int = 60,
    cluster: str = "slurm",
) -> dict[RunSpec, Job]:
    """The jobs of all runs that are missing, those that others need first.

    folder: where submitit keeps scripts and logs. partition: None = the cluster's default. gpus: of each of `nodes`
    machines, each with a process of its own; 0 = one process on CPU. hours, cpus and memory_gb: of a job, of a process
    (which reads images with `execute.LOADERS` more), of a machine. Raises UsageError where SLURM's command or submitit is not
    there.
    """
    if cluster not in CLUSTERS:
        raise unknown("cluster", cluster, CLUSTERS)
    if min(gpus, nodes - 1, cpus - 1, memory_gb - 1) < 0 or not 0 < hours < math.inf:
        raise UsageError("a job needs nodes, cpus and memory_gb from 1, gpus from 0 and hours above 0")
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise UsageError(
            "there is no command sbatch: jobs are submitted on a machine of a SLURM cluster; elsewhere use launch"
        )
    if importlib.util.find_spec("submitit") is None:
        raise UsageError("submitit is not installed: jobs are submitted through it (pip install submitit)")
    from submitit import AutoExecutor

    executor = AutoExecutor(folder, cluster=cluster)
    executor.update_parameters(
        name="vitlib", timeout_min=max(1, round(60 * hours)), nodes=nodes, tasks_per_node=max(gpus, 1), gpus_per_node=gpus,
        cpus_per_task=cpus, mem_gb=memory_gb, slurm_partition=partition,
    )  # fmt: skip
    jobs: dict[RunSpec, Job] = {}
    for spec, need_weights in store.missing(specs).items():
        before = [jobs[need].job_id for need in spec.needs if need in jobs]
        waits = {"dependency": f"afterok:{':'.join(before)}"} if before else {}
        executor.update_parameters(slurm_additional_parameters=waits)
        wait_for = [jobs[need] for need in spec.needs if need in jobs] if cluster == "local" else []
        for job in wait_for:
            job.wait()  # a machine without a queue
        jobs[spec] = executor.submit(Work(), spec, need_weights, str(paths.runs()))
    return jobs


class Work:
    """What one process of a job does. The same call goes on where an earlier one was stopped."""

    def __call__(self, spec: RunSpec, need_weights: bool, store: str) -> dict[str, float]:
        from submitit import JobEnvironment
        from submitit.helpers import TorchDistributedEnvironment

        os.environ["VITLIB_RUNS"] = store
        if JobEnvironment().num_tasks == 1:
            return execute.execute(spec, need_weights).metrics
        # Without one visible GPU a process: each takes its own by its local rank.
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        with joined(resolve(spec.device)):
            return execute.execute(spec, need_weights).metrics

    def checkpoint(self, spec: RunSpec, need_weights: bool, store: str) -> DelayedSubmission:
        """submitit asks for this when the job's time is over."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(Work(), spec, need_weights, store)
