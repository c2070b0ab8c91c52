"""The committed notebooks keep their form, and nbval with conftest.py notices when their results change.

Three parts: what every notebook in notebooks/ must be; that these checks find what they are for; and a tiny notebook run
by a pytest of its own, to prove that a changed number turns it red.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from lab.paths import NOTEBOOKS, ROOT
from tests.test_tools import TABLE
from tools.compare import rule, tables

PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("notebook", PATHS, ids=[path.stem for path in PATHS], indirect=True)

PARAMETER = re.compile(r"[a-z]\w*: \S.* = .+  # \S.*")
UNCOMPARED = re.compile(r"nbval[-_](skip|ignore[-_]output|raises[-_]exception)|raises-exception|validate_ignore", re.I)
PRIVATE = re.compile(rf"Traceback|{re.escape(str(ROOT))}\b|/(home|Users|root)/|[A-Za-z]:\\Users")
# Absolute or upwards; f"{speed} images/s" leaves the constant " images/s", f"{n}/s" leaves "/s", and neither is a path.
FOREIGN_PATH = re.compile(r"^(/\w+/|/(data|home|mnt|tmp)$|~/|[A-Za-z]:[\\/])|(^|[\\/])\.\.([\\/]|$)")
OWN_CODE = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
LOOPS = (ast.For, ast.AsyncFor, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


# ---- What is looked for: each check returns what is wrong, a sentence each.


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def texts(notebook: nbformat.NotebookNode) -> Iterator[str]:
    for output in outputs(notebook):
        yield output.get("text", "")
        yield from (str(data) for kind, data in output.get("data", {}).items() if not kind.startswith("image/"))
        yield from output.get("traceback", [])


def result_tables(notebook: nbformat.NotebookNode) -> list[list[list[str]]]:
    markdown = [output.get("data", {}).get("text/markdown", "") for output in outputs(notebook)]
    return [table for text in markdown for table in tables(text)]


def not_run(notebook: nbformat.NotebookNode) -> list[str]:
    """nbval passes a stripped cell, whatever it prints now."""
    stripped = [f"never run: {cell.source!r}" for cell in code_cells(notebook) if cell.execution_count is None]
    return stripped + [f"error: {output.ename}" for output in outputs(notebook) if output.output_type == "error"]


def not_compared(notebook: nbformat.NotebookNode) -> list[str]:
    """What nbval would leave out."""
    marks = [cell.source + " ".join(cell.metadata.get("tags", [])) for cell in code_cells(notebook)]
    wrong = [f"its output is not compared: {mark!r}" for mark in marks if UNCOMPARED.search(mark)]
    return wrong if any(len(table) > 1 for table in result_tables(notebook)) else [*wrong, "no table of results"]


def rounded_losses(notebook: nbformat.NotebookNode) -> list[str]:
    """2.30 would hide a change of 1e-3: a first loss is compared to 1e-4, which takes five digits."""
    columns = [column for table in result_tables(notebook) for column in zip(*table, strict=False)]
    cells = [cell for header, *column in columns if rule(header).relative == 1e-4 for cell in column]
    numbers = [number for cell in cells for number in re.findall(r"\d+\.\d+", cell)]
    return [f"fewer than five digits: {number}" for number in numbers if len(number.replace(".", "").lstrip("0")) < 5]


def untyped_parameters(notebook: nbformat.NotebookNode) -> list[str]:
    """papermill shows these lines as help text, and the runner checks names and types against them."""
    cells = [cell for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        return [f"{len(cells)} cells are tagged `parameters`, not 1"]
    wrong = [line for line in cells[0].source.split("\n") if not is_typed(line)]
    return [f"not `name: type = value  # comment`: {line!r}" for line in wrong]


def is_typed(line: str) -> bool:
    if not PARAMETER.fullmatch(line):
        return False
    try:
        (statement,) = ast.parse(line).body
        ast.literal_eval(statement.value)
    except (AttributeError, SyntaxError, ValueError):
        return False
    return isinstance(statement, ast.AnnAssign)


def own_code(notebook: nbformat.NotebookNode) -> list[str]:
    """Logic belongs into vitlib, where it is tested, and every path into lab.paths."""
    wrong = []
    for cell in code_cells(notebook):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, OWN_CODE):
                wrong.append(f"{type(node).__name__}: {cell.source!r}")
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and FOREIGN_PATH.search(node.value):
                wrong.append(f"path {node.value!r}: {cell.source!r}")
            if isinstance(node, LOOPS) and is_nested(node):
                wrong.append(f"loop in a loop: {cell.source!r}")
    return wrong


def is_nested(loop: ast.AST) -> bool:
    """What a loop runs over is computed once and may itself be a comprehension; what it repeats may not."""
    parts = [part for part in ast.iter_child_nodes(loop) if not isinstance(part, ast.comprehension)]
    repeated = [node for part in parts if part is not getattr(loop, "iter", None) for node in ast.walk(part)]
    return len(getattr(loop, "generators", [])) > 1 or any(isinstance(node, LOOPS) for node in repeated)


def too_long(notebook: nbformat.NotebookNode) -> list[str]:
    wrong = [f"{len(notebook.cells)} cells"] if len(notebook.cells) > 20 else []
    lengths = [len(cell.source.splitlines()) for cell in code_cells(notebook)]
    return wrong + [f"a code cell of {length} lines" for length in lengths if length > 15]


def without_alt(notebook: nbformat.NotebookNode) -> list[str]:
    kinds = [(output, kind) for output in outputs(notebook) for kind in output.get("data", {})]
    images = [(output, kind) for output, kind in kinds if kind.startswith("image/")]
    return [f"{kind} without alt text" for output, kind in images if not output.metadata.get(kind, {}).get("alt")]


def private_text(notebook: nbformat.NotebookNode) -> list[str]:
    found = [match[0] for text in texts(notebook) for match in PRIVATE.finditer(text)]
    return [f"in an output: {text!r}" for text in found]


# ---- Every committed notebook.


@pytest.fixture
def notebook(request: pytest.FixtureRequest) -> nbformat.NotebookNode:
    return nbformat.read(request.param, as_version=4)


def test_there_are_notebooks():
    assert PATHS


@every_notebook
def test_every_code_cell_was_run_without_an_error(notebook):
    assert not_run(notebook) == []


@every_notebook
def test_a_table_of_results_is_compared(notebook):
    assert not_compared(notebook) == []


@every_notebook
def test_a_first_loss_has_the_digits_to_be_compared_to_1e_4(notebook):
    assert rounded_losses(notebook) == []


@every_notebook
def test_one_cell_holds_typed_parameters_with_a_comment_each(notebook):
    assert untyped_parameters(notebook) == []


@every_notebook
def test_the_kernel_is_python3(notebook):
    assert notebook.metadata.kernelspec.name == "python3"


@every_notebook
def test_it_has_no_function_class_path_or_nested_loop_of_its_own(notebook):
    assert own_code(notebook) == []


@every_notebook
def test_it_is_short(notebook):
    assert too_long(notebook) == []


@every_notebook
def test_every_image_has_alt_text(notebook):
    assert without_alt(notebook) == []


@every_notebook
def test_no_output_shows_a_traceback_or_where_it_was_run(notebook):
    assert private_text(notebook) == []


@pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])
def test_it_is_smaller_than_500_kb(path):
    assert path.stat().st_size < 500_000


# ---- The checks find what they are for.

PARAMETERS = 'profile: str = "smoke"  # scale of the runs\nseeds: list[int] = [1000]  # one run each'
SHOW = f'from IPython.display import Markdown, display\n\ndisplay(Markdown("""{TABLE}"""))'


def shown(text: str) -> nbformat.NotebookNode:
    data = {"text/markdown": text, "text/plain": "<IPython.core.display.Markdown object>"}
    return new_output("display_data", data=data)


def tiny(*cells: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A notebook in good order, with these cells behind its parameters and its table."""
    parameters = new_code_cell(PARAMETERS, execution_count=1, metadata={"tags": ["parameters"]})
    table = new_code_cell(SHOW, execution_count=2, outputs=[shown(TABLE)])
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    return new_notebook(cells=[new_markdown_cell("# Tiny"), parameters, table, *cells], metadata=kernel)


def ran(source: str, *outputs: nbformat.NotebookNode, **metadata: object) -> nbformat.NotebookNode:
    return new_code_cell(source, execution_count=3, outputs=list(outputs), metadata=metadata)


CHECKS = (not_run, not_compared, rounded_losses, untyped_parameters, own_code, too_long, without_alt, private_text)


def test_a_notebook_in_good_order_has_nothing_wrong():
    fine = tiny(ran("for name in sorted(n for n in 'ab'):\n    print(f'{name}/s')", new_output("stream", text="a/b\n")))
    assert [check(fine) for check in CHECKS] == [[]] * len(CHECKS)


@pytest.mark.parametrize(
    ("check", "cell"),
    [
        (not_run, new_code_cell("1 + 1")),
        (not_run, ran("1 / 0", new_output("error", ename="ZeroDivisionError", evalue="", traceback=[]))),
        (not_compared, ran("# NBVAL_IGNORE_OUTPUT\n1 + 1")),
        (not_compared, ran("1 + 1", tags=["nbval-skip"])),
        (rounded_losses, ran("", shown("| first_loss |\n|---|\n| 2.30 |"))),
        (untyped_parameters, ran("seeds: int = 3  # runs per arm", tags=["parameters"])),
        (own_code, ran("def f():\n    pass")),
        (own_code, ran("class A:\n    pass")),
        (own_code, ran("f = lambda x: x")),
        (own_code, ran('open("/etc/hosts")')),
        (own_code, ran('open("../outputs")')),
        (own_code, ran("for i in a:\n    for j in b:\n        pass")),
        (own_code, ran("for i in a:\n    print([j for j in b])")),
        (own_code, ran("[i + j for i in a for j in b]")),
        (too_long, ran("\n".join(["1"] * 16))),
        (without_alt, ran("", new_output("display_data", data={"image/png": "iVBORw0KGgo="}))),
        (private_text, ran("", new_output("stream", text=f"saved to {ROOT}/outputs\n"))),
        (private_text, ran("", new_output("stream", text="/ho" + "me/ada/.cache/x\n"))),
        (private_text, ran("", new_output("stream", text="Traceback (most recent call last):\n"))),
    ],
)
def test_each_check_finds_a_bad_cell(check: Callable, cell: nbformat.NotebookNode):
    assert len(check(tiny(cell))) == 1


def test_a_stripped_notebook_is_found():
    stripped = tiny()
    for cell in code_cells(stripped):
        cell.update(execution_count=None, outputs=[])
    assert len(not_run(stripped)) == 2 and not_compared(stripped) == ["no table of results"]


@pytest.mark.parametrize(
    "line", ["seeds = 3  # runs", "seeds: int = 3", "seeds: int = f()  # runs", "# runs", "", "a: b"]
)
def test_a_parameter_needs_a_type_a_literal_and_a_comment(line):
    assert not is_typed(line)


# ---- nbval with conftest.py: a tiny notebook, run by a pytest of its own.

STORE = 'from os import environ, listdir\n\nprint(len(listdir(environ["VITLIB_RUNS"])), "stored runs")'
KEEP = 'print(environ["VITLIB_RUNS"], file=open("store.txt", "w"))'
CHANGES = {  # what the committed notebook says instead of what its cell shows, and whether that may pass
    "nothing": ("", "", "passed"),
    "top1 by 1.0": ("84.19", "83.19", "passed"),
    "top1 by 3.0": ("84.19", "81.19", "failed"),
    "first_loss by 1e-5": ("2.302585", "2.302608", "passed"),
    "first_loss by 1e-3": ("2.302585", "2.304888", "failed"),
    "loss by 1 %": ("1.874", "1.89", "passed"),
    "loss by 5 %": ("1.874", "1.97", "failed"),
    "a count by 1": ("96", "97", "failed"),
    "seconds": ("1.5", "9.5", "passed"),
    "a name": ("W64-12x1", "W64-12x3", "failed"),
}


def nbval(folder: Path, root: Path = ROOT, **environment: str) -> dict[str, str]:
    """Run the notebooks in a folder as `make test` does: `passed` or `failed` for each `file.ipynb::Cell 0`."""
    path = os.pathsep.join([str(root), environment.pop("PYTHONPATH", os.environ.get("PYTHONPATH", ""))])
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-rA", "--color=no", "-p", "no:cacheprovider", "."]
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    found = re.findall(r"^(PASSED|FAILED|ERROR) (\S+\.ipynb::Cell \d+)", done.stdout, re.M)
    assert done.returncode == int(any(word != "PASSED" for word, _ in found)), done.stdout + done.stderr
    return {cell: word.lower() for word, cell in found}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], Path]:
    folder = tmp_path_factory.mktemp("nbval")
    changed = [ran(SHOW, shown(TABLE.replace(old, new, 1))) for old, new, _ in CHANGES.values()]
    printed = ran('print("4 runs")', new_output("stream", text="3 runs\n"))
    nbformat.write(new_notebook(cells=[*changed, printed]), folder / "changed.ipynb")
    store = ran(STORE, new_output("stream", text="0 stored runs\n"))
    nbformat.write(tiny(store, ran(KEEP)), folder / "unchanged.ipynb")
    (folder / "runs" / "a-stored-run").mkdir(parents=True)
    return nbval(folder, VITLIB_RUNS=str(folder / "runs")), folder


def test_an_unchanged_notebook_passes_with_an_empty_run_store_that_is_removed(results):
    outcomes, folder = results
    assert [outcomes[f"unchanged.ipynb::Cell {number}"] for number in range(4)] == ["passed"] * 4
    store = Path((folder / "store.txt").read_text().strip())
    assert store != folder / "runs" and not store.exists()
    assert (folder / "runs" / "a-stored-run").exists()


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_number_fails_beyond_its_tolerance(results, change):
    outcomes, _ = results
    assert outcomes[f"changed.ipynb::Cell {list(CHANGES).index(change)}"] == CHANGES[change][-1]


def test_a_changed_text_fails(results):
    outcomes, _ = results
    assert outcomes[f"changed.ipynb::Cell {len(CHANGES)}"] == "failed"


# ---- A broken loss turns a notebook red


def test_a_broken_loss_turns_a_notebook_red(tmp_path):
    """A copy of the project whose cross entropy is a thousandth too large, and one committed notebook beside it."""
    copy, name = tmp_path / "project", "33_fig3_pairs.ipynb"
    for room in ("vitlib", "lab", "tools", "outputs/paper", "outputs/reference", "data_cards"):
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "conftest.py", copy)
    losses = copy / "vitlib" / "train" / "supervised.py"
    right = "return F.cross_entropy(model(batch.images, draws), batch.targets, label_smoothing=smoothing)"
    assert right in losses.read_text()
    losses.write_text(losses.read_text().replace(right, f"{right} * 1.001"))
    folder = tmp_path / "notebooks"
    folder.mkdir()
    shutil.copy(ROOT / "notebooks" / name, folder)
    cells = [cell.source for cell in code_cells(nbformat.read(folder / name, 4))]
    outcomes = nbval(folder, root=copy)
    failed = [cells[int(cell.split()[-1])] for cell, word in outcomes.items() if word == "failed"]
    assert any("page.accuracies(" in cell for cell in failed)
    assert not any("counted." in cell or "open_page(" in cell for cell in failed)  # what no loss changes
