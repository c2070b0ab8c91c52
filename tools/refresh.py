"""Run the committed notebooks in place at smoke, from an empty run store, and print which numbers moved.

python -m tools.refresh [--notebook 31] [--jobs 2]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from lab.cost.plan import cpu_seconds
from lab.experiments.catalogue import NOTEBOOKS, all_specs, notebook
from lab.experiments.profiles import profile
from lab.report.render import CELL_TIMEOUT, QUIET, LocalKernel, NotebookFailed, kernel_environment, source
from lab.runs.launch import launch
from tools.compare import moved
from vitlib.errors import UsageError
from vitlib.files import write_whole


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.refresh", description=__doc__.splitlines()[0])
    parser.add_argument("--notebook", action="append", help="only this one, e.g. 31; may be repeated")
    parser.add_argument("--jobs", type=int, default=0, help="training processes side by side (0: one per core)")
    chosen, failed = parser.parse_args(words), []
    try:
        notebooks = [notebook(name) for name in chosen.notebook] if chosen.notebook else NOTEBOOKS
    except UsageError as fault:
        parser.error(str(fault))
    with tempfile.TemporaryDirectory(prefix="vitlib-", ignore_cleanup_errors=True) as folder:
        os.environ |= {"VITLIB_RUNS": f"{folder}/runs", "VITLIB_OUTPUTS": f"{folder}/outputs"}
        launch(all_specs(profile("smoke"), notebooks), chosen.jobs, cpu_seconds)
        for path in map(source, notebooks):
            try:
                changes = refresh(path)
            except NotebookFailed as fault:
                failed.append(str(fault))
                continue
            print(f"{path.name}: {f'{len(changes)} numbers moved' if changes else 'nothing moved'}")
            print("".join(f"  {change}\n" for change in changes), end="")
    print("".join(f"{sentence}\n" for sentence in failed), end="", file=sys.stderr)
    return int(bool(failed))


def refresh(path: Path) -> list[str]:
    """Execute one notebook in place; the numbers of its tables that moved."""
    notebook = nbformat.read(path, 4)
    before = tables(notebook)
    client = NotebookClient(
        notebook, timeout=CELL_TIMEOUT, kernel_name="python3", record_timing=False, coalesce_streams=True,
        kernel_manager_class=LocalKernel, extra_arguments=QUIET, resources={"metadata": {"path": str(path.parent)}},
    )  # fmt: skip
    try:
        with kernel_environment():
            client.execute()
    except CellExecutionError as fault:
        raise NotebookFailed(f"{path.name} stopped: {fault.ename}: {fault.evalue}; it is left as it was") from None
    except DeadKernelError:
        raise NotebookFailed(f"{path.name} stopped: its kernel died; it is left as it was") from None
    notebook.metadata = nbformat.from_dict({
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    })  # fmt: skip
    with write_whole(path) as draft:
        nbformat.write(notebook, draft)
    return [line for old, new in zip(before, tables(notebook), strict=False) for line in moved(old, new)]


def tables(notebook: nbformat.NotebookNode) -> list[str]:
    """The Markdown that its cells show."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return [output["data"]["text/markdown"] for output in outputs if "text/markdown" in output.get("data", {})]


if __name__ == "__main__":
    sys.exit(main())
