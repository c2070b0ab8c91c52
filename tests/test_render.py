"""Notebooks are rendered whatever the caller's surroundings are, and a kernel ends with the process that asked for it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import matplotlib as mpl
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from papermill.translators import PythonTranslator

from lab import paths
from lab.report import render
from lab.report.render import NotebookFailed, kernel_environment
from vitlib import files
from vitlib.errors import UsageError


def written(folder: Path, *cells: str) -> Path:
    """A notebook of these cells."""
    path = folder / "tiny.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell(cell) for cell in cells]), path)
    return path


def rendered(folder: Path, *cells: str) -> str:
    """What the last cell of such a notebook prints."""
    with kernel_environment():
        render._render(written(folder, *cells), folder / "out" / "tiny.ipynb", {}, "key")
    (output,) = nbformat.read(folder / "out" / "tiny.ipynb", 4).cells[-1].outputs
    return output["text"]


def test_a_users_settings_do_not_reach_a_kernel(tmp_path, monkeypatch):
    (tmp_path / "own.rc").write_text("text.usetex: True\nlines.linewidth: 6\n")
    (tmp_path / "startup.py").write_text("raise SystemExit('a user file was run')")
    other = tmp_path / "data" / "kernels" / "python3"
    other.mkdir(parents=True)
    (other / "kernel.json").write_text('{"argv": ["false"], "display_name": "another Python", "language": "python"}')
    long = tmp_path / ("n" * 120)
    long.mkdir()
    surroundings = {
        "MATPLOTLIBRC": tmp_path / "own.rc", "PYTHONSTARTUP": tmp_path / "startup.py", "JUPYTER_PATH": tmp_path / "data",
        "JUPYTER_RUNTIME_DIR": long, "TMPDIR": long, "IPYTHONDIR": long, "PYTHONWARNINGS": "error", "PYTHONOPTIMIZE": "2",
        "MPLBACKEND": "module://a_backend_of_another_notebook",
    }  # fmt: skip
    for name, value in surroundings.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(files.tempfile, "tempdir", None)  # or it would be remembered
    before = dict(os.environ)
    shown = rendered(
        tmp_path,
        "import sys, matplotlib as mpl, lab, matplotlib.pyplot",
        "print(mpl.rcParams, sys.executable, lab.__file__, __debug__, sys.warnoptions)",
    )
    with mpl.rc_context(mpl.rcParamsDefault):
        assert f"lines.linewidth: {mpl.rcParams['lines.linewidth']}" in shown and "text.usetex: False" in shown
    assert sys.executable in shown and str(paths.ROOT) in shown and shown.endswith("True []\n")
    assert dict(os.environ) == before and os.listdir(long) == []


TEXTS = ('"; import os; os._exit(9) #', '"""\nimport os\nos._exit(9)\n"""', "'\\", "$(touch x)", "{x}", "\0")


@pytest.mark.parametrize("text", TEXTS)
def test_a_parameter_of_a_notebook_stays_text(text):
    """papermill writes it into a cell."""
    names: dict[str, object] = {}
    exec(PythonTranslator.codify({"folder": text}), names)
    assert names["folder"] == text


def test_a_notebook_that_is_damaged_is_one_sentence(tmp_path):
    for content in ("", "{", "[]", '{"cells": 5}', "\xff"):
        (tmp_path / "n.ipynb").write_text(content)
        with pytest.raises(UsageError, match=r"n\.ipynb is damaged and cannot be read"):
            render._parameters(tmp_path / "n.ipynb", {}, [])


def test_a_home_that_is_long_and_in_which_nothing_can_be_written_is_no_obstacle(tmp_path, monkeypatch):
    """A file in its place: root may write into every folder."""
    home = tmp_path / ("h" * 60)
    home.touch()
    for name in [name for name in os.environ if name.startswith(("XDG_", "MPL", "IPYTHON", "JUPYTER"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    figure = "import os, matplotlib.pyplot as plt\nplt.figure().savefig(os.devnull, format='png')"
    assert rendered(tmp_path, figure, "print(os.environ['HOME'])") == f"{home}\n"
    assert home.is_file()


def test_a_folder_that_no_socket_fits_in_is_one_sentence(monkeypatch):
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: "/nowhere")
    monkeypatch.setattr(files.os.path, "isdir", lambda place: False)
    with pytest.raises(UsageError, match=r"in /nowhere: set TMPDIR to one, whose path has at most \d\d characters$"):
        with files.private_folder(render.SOCKET):
            pass


@pytest.mark.parametrize("when", ["in a cell", "while it begins"])
def test_a_kernel_that_is_killed_is_one_sentence_that_names_the_notebook(when, tmp_path, monkeypatch):
    if when == "while it begins":
        monkeypatch.setattr(render, "QUIET", ["--no-such-option=1"])
    with kernel_environment(), pytest.raises(NotebookFailed, match=r"^tiny\.ipynb stopped: .*[Kk]ernel died"):
        path = written(tmp_path, "import os\nos.kill(os.getpid(), 9)")
        render._render(path, tmp_path / "out" / "tiny.ipynb", {}, "key")
    assert not (tmp_path / "out" / "tiny.ipynb").exists()


def test_a_kernel_leaves_ctrl_c_to_the_command(tmp_path):
    cell = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.1)\nprint(dir())"
    shown = rendered(tmp_path, cell)
    assert "'signal'" in shown and "'kernel'" not in shown and "end_with" not in shown


def test_a_notebook_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "out").write_text("a file in the folder's place")
    with pytest.raises(NotebookFailed, match=r"^tiny\.ipynb cannot be written: .*\(nothing of it is kept\)"):
        rendered(tmp_path, "print(1)")


@pytest.mark.parametrize("change", ["emptied", "cut", "an output", "a table that is gone", "a table that is another"])
def test_a_notebook_that_was_changed_or_whose_tables_were_is_rendered_again(change, tmp_path):
    target, table = tmp_path / "smoke" / "notebooks" / "tiny.ipynb", tmp_path / "smoke" / "tables" / "tiny_x.csv"
    cell = f"import pathlib; p = pathlib.Path({str(table)!r}); p.parent.mkdir(parents=True, exist_ok=True); p.write_text('1'); print(5)"
    with kernel_environment():
        render._render(written(tmp_path, cell), target, {}, "key")
    assert render._is_current(target, "key") and not render._is_current(target, "another")
    text = target.read_text()
    if "table" in change:
        table.unlink() if "gone" in change else table.write_text("2")
    else:
        target.write_text({"emptied": "", "cut": text[:-9]}.get(change, text.replace('"5\\n"', '"6\\n"')))
    assert not render._is_current(target, "key")


RENDERS = """
import sys
from pathlib import Path
from lab.report import render
with render.kernel_environment():
    render._render(Path(sys.argv[1]), Path(sys.argv[2]), {}, "key")
"""


def test_a_kernel_ends_with_the_process_that_asked_and_nothing_is_left(tmp_path):
    note = tmp_path / "pid"
    cell = f"import os, time\nopen({str(note)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"
    command = [sys.executable, "-c", RENDERS, str(written(tmp_path, cell)), str(tmp_path / "out.ipynb")]
    (tmp_path / "tmp").mkdir()
    environment = os.environ | {"PYTHONPATH": str(paths.ROOT), "TMPDIR": str(tmp_path / "tmp")}
    process = subprocess.Popen(command, env=environment)
    wait_for(lambda: note.is_file() and note.read_text(), 60)
    process.kill()
    process.wait()
    wait_for(lambda: not files.alive(int(note.read_text())), 10)
    assert os.listdir(tmp_path / "tmp") == []


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
