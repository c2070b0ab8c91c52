"""One test session: an empty run store of its own, no network, and notebooks compared as `tools.compare` says.

Plain `python -m pytest` also runs notebooks/*.ipynb with nbval; `python -m pytest -k 31_fig1` runs one of them. nbval is
switched on here and not in pyproject.toml, so that without this file a notebook is an error ("not found") and never a
pass against the runs that a developer has stored.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from tools.compare import agree, differences

CELL_SECONDS = 600  # all notebooks together take less; a kernel that died is noticed only after this


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module is imported and any kernel starts; undone when the session ends."""
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    scratch = tempfile.TemporaryDirectory(prefix="vitlib-tests-", ignore_cleanup_errors=True)
    config.add_cleanup(scratch.cleanup)
    # A private IPYTHONDIR and no PYTHONSTARTUP: a user's start-up files must not change results.
    for variable in ("VITLIB_RUNS", "VITLIB_OUTPUTS", "IPYTHONDIR"):
        folder = Path(scratch.name, variable.lower())
        folder.mkdir()
        patch.setenv(variable, str(folder))
    patch.delenv("PYTHONSTARTUP", raising=False)
    patch.setenv("VITLIB_PROGRESS", "0")
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("HF_DATASETS_OFFLINE", "1")

    if config.pluginmanager.hasplugin("nbval"):  # a bare GPU machine runs the other tests without it
        from nbval.plugin import IPyNbCell

        config.option.nbval = config.option.nbval_current_env = True
        config.option.nbval_cell_timeout = min(config.option.nbval_cell_timeout, CELL_SECONDS)
        patch.setattr(IPyNbCell, "compare_outputs", tolerant(IPyNbCell.compare_outputs))


def tolerant(compare_outputs: Callable) -> Callable:
    """nbval's comparison, after each new text that agrees with the committed one has been replaced by that one."""

    @functools.wraps(compare_outputs)
    def compare(cell, test: list, ref: list, skip_compare: tuple[str, ...] | None = None) -> bool:
        test, notes = copy.deepcopy(test), []  # nbdime shows the outputs as they were
        for (holder, key), reference in zip_texts(test, ref):
            notes += differences(reference, holder[key])
            if agree(reference, holder[key]):
                holder[key] = reference
        same = compare_outputs(cell, test, ref, skip_compare)
        if not same:  # first what moved, in a line each, then nbval's own report
            cell.comparison_traceback[:0] = [f" {note}" for note in notes]
        return same

    return compare


def zip_texts(test: list, ref: list) -> list[tuple[tuple[dict, str], str]]:
    """Where each new text is held, with the committed text of the same kind and rank: how nbval pairs them."""
    new, old = texts(test), texts(ref)
    return [(place, holder[key]) for kind in new for place, (holder, key) in zip(new[kind], old[kind], strict=False)]


def texts(outputs: list) -> dict[str, list[tuple[dict, str]]]:
    """The places of all Markdown and printed texts, by kind."""
    places = defaultdict(list)
    for output in outputs:
        if output["output_type"] == "stream":
            places[output["name"]].append((output, "text"))
        elif "text/markdown" in output.get("data", {}):
            places["text/markdown"].append((output["data"], "text/markdown"))
    return places
