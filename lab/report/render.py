"""Run notebooks: with papermill for a profile (`reproduce`), in place at smoke (`refresh`).

Training happens before the notebooks, in one queue over all of them; the notebooks then find their runs finished. In
JupyterLab the same cells train what is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import nbformat
import papermill
from jupyter_client import AsyncKernelManager
from jupyter_core.paths import jupyter_runtime_dir
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from papermill.exceptions import PapermillExecutionError

from lab import paths, report
from lab.bench import cases, runner
from lab.claims.ledger import ledger, ledger_hashes, part_hash
from lab.cost.plan import cpu_seconds
from lab.experiments.catalogue import NOTEBOOKS, all_specs, available
from lab.experiments.profiles import profile as scale
from lab.runs import store
from lab.runs.execute import cores
from lab.runs.launch import launch
from lab.runs.spec import RunSpec
from tools.compare import moved
from vitlib.errors import UsageError, unknown

QUIET = ["--IPKernelApp.log_level=50"]  # or a kernel that is ended says so as if it were an error
CELL_TIMEOUT = 24 * 3600  # seconds; a cell may train for hours when a notebook is run on its own


class NotebookFailed(RuntimeError):
    """A notebook raised an error; the message says which, where it lies, and the error."""


def source(number: str) -> Path:
    """The committed notebook."""
    return paths.NOTEBOOKS / f"{NOTEBOOKS[number][0]}.ipynb"


def reproduce(
    profile: str, notebooks: list[str], specs: list[RunSpec], jobs: int, settings: list[str], train: bool = True
) -> None:
    """Train what is missing, render `notebooks` into outputs/<profile>/notebooks, print the claims table.

    train=False: render what is finished; what is not reads `not run`.

    A notebook whose code, parameters and runs have not changed since it was rendered is left as it is. A failed one is
    kept under failed/, the others are rendered all the same, and then NotebookFailed is raised.
    """
    parameters = {n: _parameters(source(n), {"profile": profile, "jobs": jobs}, settings) for n in notebooks}
    print(report.plan_table(specs, jobs))
    if train:
        launch(specs, jobs, cpu_seconds, ledger_hashes())
    os.environ["VITLIB_TRAIN"] = "1" if train else "0"
    if "41" in notebooks and scale(profile).judged:
        part = ledger()[cases.F3]  # timed alone on the machine, before kernels start
        cases.measured_evidence(scale(profile), part, part_hash(part.entry(profile)))
    folder = paths.outputs() / profile / "notebooks"

    def one(number: str) -> str:
        """Render one notebook where it is not current; what went wrong, or nothing."""
        target = folder / source(number).name
        key = _content_key(source(number), parameters[number], _evidence(profile, number, specs))
        if _is_current(target, key):
            print(f"{target.name}: unchanged")
            return ""
        try:
            _render(source(number), target, parameters[number], key)
        except NotebookFailed as fault:
            return str(fault)
        print(f"{target.name}: rendered")
        return ""

    # One kernel a core; 00 collects what the others say, so it comes last.
    with kernel_environment(), ThreadPoolExecutor(cores()) as pool:
        failed = list(pool.map(one, [n for n in notebooks if n != "00"])) + [one(n) for n in notebooks if n == "00"]
    print(f"\n{report.claims_table(profile)}\n\nexecuted notebooks: {folder}")
    if any(failed):
        raise NotebookFailed("; ".join(filter(None, failed)))


def _parameters(notebook: Path, defaults: dict[str, object], settings: list[str]) -> dict[str, object]:
    """The defaults that this notebook has, and `NAME=VALUE` words, checked against its parameters cell.

    papermill only warns about names and checks no type. Raises UsageError for an unknown name or a value of another type.
    """
    known = papermill.inspect_notebook(str(notebook))
    for name in defaults:
        if any(word.partition("=")[0] == name for word in settings):
            raise UsageError(f"parameter {name} is set by --{name}, not by --set")
    types = {"int": int, "float": float, "str": str}
    chosen = {name: value for name, value in defaults.items() if name in known}
    for word in settings:
        name, _, value = word.partition("=")
        if name not in known:
            raise unknown(f"parameter of {notebook.stem}", name, known)
        kind = known[name]["inferred_type_name"]
        try:
            chosen[name] = types[kind](value)
        except ValueError:
            raise UsageError(f"parameter {name} of {notebook.stem} is of type {kind}, which {value!r} is not") from None
    return chosen


def _evidence(profile: str, number: str, specs: list[RunSpec]) -> list:
    """What a notebook reads: the results of its runs and the timings; of all notebooks for 00, which collects them."""
    specs = all_specs(profile, available(profile, list(NOTEBOOKS))[0]) if number == "00" else specs
    found = {spec.hash: store.find(spec) for spec in specs}
    results = sorted([name, result.record()] for name, result in found.items() if result)
    return [results, [runner.read(runner.path_of(name, scale(profile))) for name in cases.BENCHES]]


def _content_key(notebook: Path, parameters: dict[str, object], evidence: list) -> str:
    """What an executed notebook depends on: its code, its parameters, vitlib, the paper's numbers, the reference, the results.

    Contents, no file times.
    """
    cells = [cell.source for cell in nbformat.read(notebook, 4).cells]
    digest = hashlib.sha256(json.dumps([cells, parameters, evidence]).encode())
    shown = [*paths.PAPER.glob("*"), *paths.REFERENCE.rglob("*.csv"), *paths.REFERENCE.rglob("*.jsonl")]
    for path in sorted(paths.ROOT.glob("vitlib/**/*.py")) + sorted(shown):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _is_current(target: Path, key: str) -> bool:
    try:
        return json.loads(target.read_text(encoding="utf-8"))["metadata"]["vitlib"]["content"] == key
    except (OSError, ValueError, KeyError):
        return False


def _render(notebook: Path, target: Path, parameters: dict[str, object], key: str) -> None:
    """Execute into a temporary name, move into place on success, keep a failed one under failed/."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        papermill.execute_notebook(
            str(notebook), str(draft), parameters, kernel_name="python3", progress_bar=False,
            execution_timeout=CELL_TIMEOUT, cwd=str(notebook.parent), coalesce_streams=True, record_timing=False,
            kernel_manager_class=LocalKernel, extra_arguments=QUIET,
        )  # fmt: skip
        content = nbformat.read(draft, 4)
        content.metadata["vitlib"] = {"content": key}
        nbformat.write(content, draft)
        draft.replace(target)
    except PapermillExecutionError as fault:
        kept = target.parent / "failed" / target.name
        kept.parent.mkdir(exist_ok=True)
        draft.replace(kept)
        raise NotebookFailed(
            f"{target.name} stopped in cell {fault.exec_count}: {fault.ename}: {fault.evalue} ({kept})"
        ) from None
    finally:
        draft.unlink(missing_ok=True)


class LocalKernel(AsyncKernelManager):
    """Talks to its kernel over files and not over TCP ports: no race for a port, no warning."""

    def __init__(self, **settings: object):
        # The sockets lie beside the connection file, which needs an absolute path: kernel and client differ in folder.
        folder = Path(jupyter_runtime_dir())
        folder.mkdir(parents=True, exist_ok=True)
        settings["connection_file"] = str(folder / f"kernel-{uuid.uuid4().hex}.json")
        super().__init__(transport="ipc", **settings)


@contextmanager
def kernel_environment():
    """For kernels: no start-up files of the user's, no progress bars in outputs."""
    with tempfile.TemporaryDirectory() as private:
        before = dict(os.environ)
        os.environ |= {"IPYTHONDIR": private, "VITLIB_PROGRESS": "0", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


# ---------------------------------------------------------------------------------------------------- refresh


def refresh(notebooks: list[str], jobs: int) -> None:
    """Run the committed notebooks in place at smoke, from an empty run store, and print which numbers moved."""
    store = Path(tempfile.mkdtemp(prefix="vitlib-"))
    try:
        os.environ |= {"VITLIB_RUNS": str(store / "runs"), "VITLIB_OUTPUTS": str(store / "outputs")}
        launch(all_specs("smoke", notebooks), jobs, cpu_seconds, ledger_hashes())
        for number in notebooks:
            path = source(number)
            changes = refresh_one(path)
            print(f"{path.name}: {'nothing moved' if not changes else f'{len(changes)} numbers moved'}")
            print("".join(f"  {change}\n" for change in changes), end="")
    finally:
        shutil.rmtree(store, ignore_errors=True)


def refresh_one(path: Path) -> list[str]:
    """Execute one notebook in place; the numbers of its tables that moved."""
    notebook = nbformat.read(path, 4)
    before = _tables(notebook)
    client = NotebookClient(
        notebook, timeout=CELL_TIMEOUT, kernel_name="python3", record_timing=False, coalesce_streams=True,
        kernel_manager_class=LocalKernel, extra_arguments=QUIET, resources={"metadata": {"path": str(path.parent)}},
    )  # fmt: skip
    try:
        with kernel_environment():
            client.execute()
    except CellExecutionError as fault:
        raise NotebookFailed(f"{path.name} stopped: {fault.ename}: {fault.evalue}; it is left as it was") from None
    notebook.metadata = nbformat.from_dict({
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    })  # fmt: skip
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    nbformat.write(notebook, draft)
    draft.replace(path)
    return [line for old, new in zip(before, _tables(notebook), strict=False) for line in moved(old, new)]


def _tables(notebook: nbformat.NotebookNode) -> list[str]:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return [output["data"]["text/markdown"] for output in outputs if "text/markdown" in output.get("data", {})]
