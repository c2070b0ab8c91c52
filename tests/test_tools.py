"""The maintainers' tools: how far two texts of a notebook may differ, and notebooks refreshed in place."""

from __future__ import annotations

import json

import nbformat
import pytest

from lab import paths
from lab.report import render
from tools import refresh, same
from tools.compare import agree, differences, moved, rule

TABLE = """\
| model    |   images |   first_loss |   loss | top1                |   train_s |
|:---------|---------:|-------------:|-------:|:--------------------|----------:|
| W64-12x1 |       96 |     2.302585 |  1.874 | 84.19 ± 0.47 (n=3)  |       1.5 |
| W64-6x2  |       96 |     2.302971 |  1.912 | **85.02 ± 0.5 (n=3)** |     2.5 |"""


# ---- The comparison of texts.


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("96 |     2.302585", "96 |     2.302608", True),  # first loss, 1e-5
        ("96 |     2.302585", "96 |     2.304888", False),  # first loss, 1e-3
        ("1.874", "1.89", True),  # loss, 1 %
        ("1.874", "1.93", False),  # loss, 3 %
        ("84.19 ±", "86.19 ±", True),  # 2 points
        ("84.19 ±", "86.2 ±", False),
        ("± 0.47", "± 2.4", True),
        ("± 0.47", "± 2.5", False),
        ("0.47 (n=3)", "0.47 (n=2)", False),  # a count, though in a column of accuracies
        ("84.19 ± 0.47 (n=3)", "**84.19 ± 0.47 (n=3)**", True),  # the best row is another one
        ("84.19 ± 0.47 (n=3)", "84.19", False),
        ("84.19", "nan", False),
        ("1.5 |", "73.25 |", True),  # seconds
        ("1.5 |", "- |", False),
        ("96", "97", False),
        ("W64-12x1", "W64-12x2", False),
        ("W64-12x1", "**W64-12x1**", False),
        ("first_loss", "last_loss", False),  # another column
        ("|:---------|-", "|:-----|-", True),  # only as wide as the cells
    ],
)
def test_the_header_of_a_column_decides_how_far_its_numbers_may_move(old, new, same):
    assert TABLE.count(old) >= 1
    reference = f"Results.\n\n{TABLE}\n\nThe end."
    changed = reference.replace(old, new, 1)
    assert agree(reference, changed) is same
    assert agree(reference, reference)


@pytest.mark.parametrize(
    ("header", "allowed"),
    [
        ("first_loss", "relative 1e-4"),
        ("`first_loss` (step 0)", "relative 1e-4"),
        ("**Loss**", "relative 2 %"),
        ("masked_loss", "relative 2 %"),
        ("top1_v2", "2 points"),
        ("attn - full, points", "2 points"),
        ("tokens used, of 128", "relative 10 %"),
        ("error, of 255 grey levels", "relative 10 %"),
        ("seconds per step", "any number"),
        ("train_s", "any number"),
        ("images_per_s", "any number"),
        ("params_m", "exactly this text"),
        ("gmacs", "exactly this text"),
        ("n", "exactly this text"),
    ],
)
def test_a_header_has_one_rule(header, allowed):
    assert rule(header).says == allowed


def test_a_cell_may_hold_an_interval_and_a_minus_sign():
    reference = "| a - b, points |\n|---|\n| -0.31 [-1.2, 0.6] |"
    assert agree(reference, reference.replace("-0.31", "+0.5").replace("-1.2", "\u22120.4"))
    assert not agree(reference, reference.replace("0.6", "2.7"))
    assert not agree(reference, reference.replace("[-1.2, 0.6]", ""))


@pytest.mark.parametrize("new", ["Two tests.", "One test.\n", "| a |\n|---|\n| 1 |", ""])
def test_text_outside_of_a_table_agrees_only_to_the_letter(new):
    assert agree("One test.", "One test.") and not agree("One test.", new)


def test_a_lost_row_cell_column_or_table_is_a_difference():
    lines = TABLE.split("\n")
    for changed in ("\n".join(lines[:-1]), "\n".join([*lines, lines[-1]]), TABLE + " 3 |", "", f"{TABLE}\n\n{TABLE}"):
        assert len(differences(TABLE, changed)) == 1


def test_a_difference_names_column_row_both_values_and_what_is_allowed():
    changed = TABLE.replace("84.19", "80.19").replace("1.874", "1.875")
    change = "'84.19 ± 0.47 (n=3)' -> '80.19 ± 0.47 (n=3)' (allowed: 2 points)"
    assert differences(TABLE, changed) == [f"top1, row 1 (W64-12x1): {change}"]


def test_moved_lists_every_changed_cell_within_its_tolerance_or_not():
    changed = TABLE.replace("84.19", "84.2").replace("2.302585", "2.302586").replace("**", "")
    assert [line.split(":")[0] for line in moved(TABLE, changed)] == [
        "first_loss, row 1 (W64-12x1)",
        "top1, row 1 (W64-12x1)",
    ]
    assert moved(TABLE, TABLE) == moved("One.", "Two.") == []


# ---- The comparison of stores


@pytest.mark.parametrize(
    "change", ["none", "a time", "a metric", "a bit", "weights", "a file that is gone", "another run"]
)
def test_two_stores_are_the_same_where_their_numbers_are(change, tmp_path, capsys):
    for store in ("one", "other"):
        folder = tmp_path / store / ("beef" if (change, store) == ("another run", "other") else "cafe")
        folder.mkdir(parents=True)
        result = {"metrics": {"top1": 50.0}, "correct": {"images": 2, "bits": "gA=="}, "wall_s": 1.0}
        if store == "other":
            result |= {
                "a time": {"wall_s": 2.0},
                "a metric": {"metrics": {"top1": 50.5}},
                "a bit": {"correct": None},
            }.get(change, {})
        (folder / "result.json").write_text(json.dumps(result))
        (folder / "weights.safetensors").write_text(store if change == "weights" else "whole")
    if change == "a file that is gone":
        (folder / "weights.safetensors").unlink()
    code, said = same.main([str(tmp_path / "one"), str(tmp_path / "other")]), capsys.readouterr().out
    assert code == int(change not in ("none", "a time"))
    assert said.startswith(
        f"{int(change != 'another run')} runs in both, {int(code and change != 'another run')} of them differ"
    )
    assert ("| top1 | 1 | 1 | 0.5 | 0.01 |" in " ".join(said.split())) == (change == "a metric")
    assert same.main([str(tmp_path / "one")]) == same.main([str(tmp_path / "one"), str(tmp_path / "nowhere")]) == 2


# ---- Refresh


def committed(path, *cells: str) -> nbformat.NotebookNode:
    """A notebook whose first output says 1.5 points."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    text = "| points |\n|---|\n| 1.5 |"
    notebook.cells[0].outputs = [nbformat.v4.new_output("display_data", {"text/markdown": text})]
    nbformat.write(notebook, path)
    return notebook


def test_a_refreshed_notebook_keeps_its_new_outputs_and_says_which_numbers_moved(tmp_path):
    path = tmp_path / "n.ipynb"
    cell = 'from IPython.display import Markdown, display\ndisplay(Markdown("| points |\\n|---|\\n| 1.75 |"))'
    committed(path, cell)
    assert refresh.refresh(path) == ["points, row 1 (1.5): '1.5' -> '1.75' (allowed: 2 points)"]
    after = nbformat.read(path, 4)
    assert after.cells[0].execution_count == 1 and "1.75" in after.cells[0].outputs[0].data["text/markdown"]
    assert after.metadata.kernelspec.name == "python3" and list(tmp_path.iterdir()) == [path]


def test_a_notebook_whose_kernel_is_killed_is_named_left_as_it_was_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    bad, good = tmp_path / "bad.ipynb", tmp_path / "good.ipynb"
    committed(bad, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    committed(good, "1 + 1")
    before = bad.read_text(encoding="utf-8")
    monkeypatch.setattr(refresh, "launch", lambda *_: None)
    monkeypatch.setattr(refresh, "all_specs", lambda *_: [])
    monkeypatch.setattr(refresh, "source", lambda notebook: {"31": bad, "32": good}[notebook.number])
    assert refresh.main(["--notebook", "31", "--notebook", "32"]) == 1
    said = capsys.readouterr()
    assert said.err == "bad.ipynb stopped: its kernel died; it is left as it was\n" and "good.ipynb: " in said.out
    assert bad.read_text(encoding="utf-8") == before
    stopped = pytest.raises(render.NotebookFailed, match=r"n\.ipynb stopped: its kernel died")
    with render.kernel_environment(), stopped:
        render._render(bad, tmp_path / "out" / "n.ipynb", {}, "key")
    assert [p.name for p in (tmp_path / "out").rglob("*.ipynb")] == ["n.ipynb"]
    assert (tmp_path / "out" / "failed" / "n.ipynb").is_file()


def test_the_template_of_a_notebook_runs_as_it_is(monkeypatch, tmp_path, capsys):
    """Its cells, with a notebook's number filled in, on an empty run store: nothing is trained, every call is there."""
    monkeypatch.setenv("VITLIB_TRAIN", "0")
    monkeypatch.setenv("VITLIB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("VITLIB_OUTPUTS", str(tmp_path / "outputs"))
    cells = nbformat.read(paths.ROOT / "tools" / "template.ipynb", 4).cells
    assert [cell.metadata.get("tags") for cell in cells].count(["parameters"]) == 1
    names: dict[str, object] = {}
    for cell in cells:
        if cell.cell_type == "code":
            exec(cell.source.replace("NUMBER", "31"), names)
    assert names["page"].notebook.number == "31" and names["reference"] in names["page"].experiment.arms
