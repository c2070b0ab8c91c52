"""Run notebooks with papermill for a profile (`reproduce`).

Training happens before the notebooks, in one queue over all of them; the notebooks then find their runs finished. In
JupyterLab the same cells train what is missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
import uuid
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import nbformat
import papermill
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_core.paths import jupyter_runtime_dir
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from lab import paths
from lab.bench import cases, runner
from lab.claims.ledger import ledger, stamps
from lab.cost import plan
from lab.experiments.catalogue import NOTEBOOKS, Notebook, all_specs, available
from lab.experiments.profiles import Profile
from lab.report import tables
from lab.runs import store
from lab.runs.execute import now
from lab.runs.launch import launch
from lab.runs.processes import cores
from lab.runs.spec import RunSpec
from vitlib.errors import UsageError, unknown
from vitlib.files import first_line, intact, private_folder, sweep, write_whole

logging.getLogger("papermill").setLevel(logging.CRITICAL)  # what is wrong is said by NotebookFailed
QUIET = ["--IPKernelApp.log_level=50"]  # or a kernel that is ended says so as if it were an error
SOCKET = 107 - len("/01234567-ipc-99")  # characters of a folder whose sockets have paths that the system allows
CELL_TIMEOUT = 24 * 3600  # seconds; a cell may train for hours when a notebook is run on its own


class NotebookFailed(RuntimeError):
    """A notebook raised an error or its kernel died; the message says which notebook, where it lies, and the error."""


def source(notebook: Notebook) -> Path:
    """The committed notebook."""
    return paths.NOTEBOOKS / f"{notebook.file}.ipynb"


def reproduce(
    p: Profile, notebooks: Sequence[Notebook], specs: Sequence[RunSpec], jobs: int, settings: Sequence[str], train: bool = True
) -> None:  # fmt: skip
    """Train what is missing, render `notebooks` into outputs/<profile>/notebooks, print the claims table.

    train=False: render what is finished; what is not reads `not run`.

    A notebook whose code, parameters and runs have not changed since it was rendered is left as it is. A failed one is
    kept under failed/, the others are rendered all the same, and then NotebookFailed is raised.
    """
    with private_folder(SOCKET):  # said now where there can be none
        pass
    for left in (paths.outputs() / p.name).rglob(".draft-*"):  # by a command that was killed
        sweep(left.parent)
    parameters = {n: _parameters(source(n), {"profile": p.name, "jobs": jobs}, settings) for n in notebooks}
    print(plan.cpu_text(specs, jobs))
    if train:
        launch(specs, jobs, plan.cpu_seconds, stamps(p.name))
    part = ledger().part(cases.F3)
    if p.name in part.n and part.notebook in {n.number for n in notebooks}:
        # timed alone on the machine, before kernels start
        cases.measured_evidence(p, part, ledger().hash(part, p.name))
    folder, evidence = paths.outputs() / p.name / "notebooks", _evidence(p)

    def one(notebook: Notebook) -> str:
        """Render one notebook where it is not current; what went wrong, or nothing."""
        target, given = folder / source(notebook).name, parameters[notebook]
        key = _content_key(source(notebook), given | {"files": _own_files(given)}, evidence)
        if _is_current(target, key):
            print(f"{target.name}: unchanged")
            return ""
        try:
            _render(source(notebook), target, given, key)
        except NotebookFailed as fault:
            return str(fault)
        print(f"{target.name}: rendered")
        return ""

    # One kernel per core.
    with kernel_environment(VITLIB_TRAIN=str(int(train))), ThreadPoolExecutor(cores()) as pool:
        try:
            failed = list(filter(None, pool.map(one, reversed(notebooks))))  # the last ones take longest
        except BaseException:  # Ctrl-C: kernels are in sessions of their own
            pool.shutdown(wait=False, cancel_futures=True)
            LocalKernel.end_all(pool)
            raise
    every = tables.judged(p)
    tables.save_claims(p.name, every)
    print(f"\n{tables.claims_text(p.name, every)}\n\nexecuted notebooks: {folder}")
    if failed:
        raise NotebookFailed("; ".join(failed))


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError
    return value


READ = {"str": str, "int": int, "float": _finite}  # the types of parameters, and what reads a text as one


def _parameters(notebook: Path, defaults: dict[str, object], settings: Sequence[str]) -> dict[str, object]:
    """The defaults that this notebook has, and `NAME=VALUE` words, checked against its parameters cell.

    papermill only warns about names and checks no type. Raises UsageError for an unknown name or a value of another type.
    """
    with intact(notebook):
        known = {name: one["inferred_type_name"] for name, one in papermill.inspect_notebook(str(notebook)).items()}
    chosen = {name: value for name, value in defaults.items() if name in known}
    for name, _, value in (word.partition("=") for word in settings):
        if name in defaults:
            raise UsageError(f"parameter {name} is set by --{name}, not by --set")
        if name not in known:
            raise unknown(f"parameter of {notebook.stem}", name, known)
        if (kind := known[name]) not in READ:
            raise UsageError(
                f"parameter {name} of {notebook.stem} is of type {kind}: --set sets {', '.join(READ)} alone"
            )
        try:
            chosen[name] = READ[kind](value)
        except ValueError:
            raise UsageError(f"parameter {name} of {notebook.stem} is of type {kind}, which {value!r} is not") from None
    return chosen


def _evidence(p: Profile) -> str:
    """A hash of what notebooks read: the results of a profile's runs, and the timings."""
    specs = all_specs(p, available(p, NOTEBOOKS)[0])
    results = sorted([spec.hash, result.record()] for spec in specs if (result := store.find(spec)) is not None)
    timings = [runner.read(runner.path_of(name, p)) for name in cases.BENCHES]
    return hashlib.sha256(json.dumps([results, timings]).encode()).hexdigest()


def _own_files(parameters: dict[str, object]) -> list:
    """Sizes and times of the files that a reader has named: images and weights that may change under the same name."""
    named = [paths.named(str(parameters[name])) for name in ("folder", "weights") if parameters.get(name)]
    files = sorted(file for path in named for file in (path, *path.rglob("*")) if file.is_file())
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _content_key(notebook: Path, parameters: dict[str, object], evidence: str) -> str:
    """A hash of contents: the notebook's cells, its parameters, code, the paper's numbers, the reference, the results."""
    cells = [cell.source for cell in nbformat.read(notebook, 4).cells]
    digest = hashlib.sha256(json.dumps([cells, parameters, evidence]).encode())
    code = [path for room in ("vitlib", "lab", "tools") for path in paths.ROOT.glob(f"{room}/**/*.py")]
    shown = [*paths.PAPER.glob("*"), *paths.REFERENCE.rglob("*.csv"), *paths.REFERENCE.rglob("*.jsonl")]
    for path in sorted(code) + sorted(shown):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _is_current(target: Path, key: str) -> bool:
    """Whether the notebook was rendered from the same contents, and it and its tables and figures are as they were."""
    try:
        content = nbformat.read(target, 4)
        kept = content.metadata["vitlib"]
        return (kept["content"], kept["shown"]) == (key, _shown(content, target))
    except Exception:  # not there, or damaged in any way
        return False


def _shown(content: nbformat.NotebookNode, target: Path) -> str:
    """A hash of an executed notebook's cells and of the files that it has written beside its folder."""
    digest = hashlib.sha256(json.dumps(content.cells, sort_keys=True).encode())
    for path in sorted(target.parents[1].glob(f"[tf]*/{target.stem}*")):  # tables/, figures/
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _render(notebook: Path, target: Path, parameters: dict[str, object], key: str) -> None:
    """Execute into a draft that takes its place on success; a failed one is kept under failed/.

    Raises NotebookFailed, whatever went wrong: the other notebooks go on.
    """
    kept, fault, began = target.parent / "failed" / target.name, "", time.monotonic()
    about = {"profile": parameters.get("profile", ""), "date": now()[:10], "commit": paths.commit()}
    with private_folder() as folder:
        executed = folder / target.name
        try:
            papermill.execute_notebook(
                str(notebook), str(executed), parameters, kernel_name="python3", progress_bar=False,
                execution_timeout=CELL_TIMEOUT, cwd=str(notebook.parent), coalesce_streams=True, record_timing=False,
                kernel_manager_class=LocalKernel, extra_arguments=QUIET,
            )  # fmt: skip
        except PapermillExecutionError as error:
            fault = f"stopped in cell {error.exec_count}: {error.ename}: {error.evalue}"
        except DeadKernelError:
            fault = "stopped: its kernel died, perhaps for lack of memory"
        except Exception as error:  # a kernel that died while it began, a full disk
            fault = f"stopped: {type(error).__name__}: {first_line(error)}"
        try:
            content = nbformat.read(executed, 4)
            about |= {"content": "" if fault else key, "shown": _shown(content, target)}
            content.metadata["vitlib"] = about | {"seconds": round(time.monotonic() - began)}
            with write_whole(kept if fault else target) as draft:
                nbformat.write(content, draft)
        except Exception as error:
            fault, kept = fault or f"cannot be written: {first_line(error)}", "nothing of it is kept"
    if fault:
        raise NotebookFailed(f"{target.name} {fault} ({kept})")


class LocalKernel(AsyncKernelManager):
    """A kernel of this Python, reached over files and not over TCP ports: no race for a port, no warning."""

    going: ClassVar[weakref.WeakSet] = weakref.WeakSet()

    def __init__(self, **settings: object):
        # The sockets lie beside the connection file, which needs an absolute path: kernel and client differ in folder.
        settings["connection_file"] = f"{jupyter_runtime_dir()}/{uuid.uuid4().hex[:8]}.json"
        # A user's own kernel of the name python3 may be another Python.
        super().__init__(transport="ipc", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]), **settings)
        self.going.add(self)

    @classmethod
    def end_all(cls, pool: ThreadPoolExecutor) -> None:
        """Kill the kernels until the pool's threads, which wait for them, have ended."""
        while any(thread.is_alive() for thread in pool._threads):
            for process in [getattr(kernel.provisioner, "process", None) for kernel in cls.going]:
                if process is not None and process.poll() is None:
                    process.kill()
            time.sleep(0.1)


# What a kernel begins with. It ends with its parent; an interrupt between two cells would lose the answer that is waited for.
START = """
from lab.runs.processes import end_with
end_with({})
kernel = get_ipython().kernel
kernel.pre_handler_hook = kernel.post_handler_hook = lambda: None  # they turn Ctrl-C on
del end_with, kernel
"""


@contextmanager
def kernel_environment(**more: str):
    """For kernels: nothing of the user's start-up files, settings and paths, no progress bars in outputs.

    A kernel ends with this process, however that one ends, and heeds no Ctrl-C of its own.
    """
    with private_folder(SOCKET) as private:
        before = dict(os.environ)
        start = private / "profile_default" / "startup"
        start.mkdir(parents=True)
        (start / "begin.py").write_text(START.format(os.getpid()), encoding="utf-8")
        (private / "matplotlibrc").touch()
        os.environ |= {
            "IPYTHONDIR": str(private), "JUPYTER_RUNTIME_DIR": str(private), "MATPLOTLIBRC": str(private / "matplotlibrc"),
            "PYTHONPATH": os.pathsep.join([str(paths.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "VITLIB_PROGRESS": "0", "PYDEVD_DISABLE_FILE_VALIDATION": "1", **more,
        }  # fmt: skip
        for name in ("PYTHONSTARTUP", "PYTHONWARNINGS", "PYTHONOPTIMIZE", "PYTHONINSPECT", "MPLBACKEND"):
            os.environ.pop(name, None)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)
