"""The command line: bad input is one sentence and exit code 2, before anything is trained."""

import errno
import os
import re
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from lab import paths
from lab.__main__ import main, parser
from lab.experiments.catalogue import experiment, notebook
from lab.experiments.profiles import profile
from lab.report import render
from lab.runs import launch, store
from vitlib import __main__ as vitlib_main
from vitlib.errors import UsageError


@pytest.fixture(autouse=True)
def untouched(monkeypatch, tmp_path):
    """A store of its own; training anything is an error."""
    monkeypatch.setenv("VITLIB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("VITLIB_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setattr(launch, "_train", lambda *_: pytest.fail("something was trained"))
    return tmp_path


BAD = {
    "a profile": (["reproduce", "--profile", "cpuu"], "unknown profile 'cpuu': allowed are smoke, cpu, study, photos, imagenet, public; did you mean 'cpu'?"),
    "a notebook": (["reproduce", "--notebook", "39"], "unknown notebook '39'"),
    "a notebook's nearest": (["run", "--notebook", "31_fig1_branch"], "did you mean '31_fig1_branches'?"),
    "a parameter": (["reproduce", "--set", "profil=cpu"], "unknown parameter of 00_claims 'profil'"),
    "a parameter that has its own flag": (
        ["reproduce", "--notebook", "31", "--set", "jobs=many"],
        "parameter jobs is set by --jobs, not by --set",
    ),
    "a number": (["run", "--jobs", "many"], "argument --jobs: 'many' given, allowed are whole numbers from 0 to 10,000"),
    "a command": (["reprodce"], "invalid choice: 'reprodce' (choose from"),
    "a number of jobs": (["run", "--jobs", "-2"], "argument --jobs: '-2' given, allowed are whole numbers from 0"),
    "no processes": (["run", "--processes", "0"], "argument --processes: '0' given, allowed are whole numbers from 1"),
    "fewer than no processes": (["run", "--processes", "-2"], "argument --processes: '-2' given"),
    "jobs without end": (["reproduce", "--jobs", "1" + "0" * 30], "allowed are whole numbers from 0 to 10,000"),
    "digits without end": (["reproduce", "--jobs", "1" * 9999], "allowed are whole numbers from 0 to 10,000"),
    "GPUs without SLURM": (["run", "--gpus", "2"], "--gpus says nothing without --slurm: give both or neither"),
    "memory without SLURM": (["run", "--memory-gb", "2"], "--memory-gb says nothing without --slurm"),
    "processes with SLURM": (["run", "--slurm", "jobs", "--processes", "2"], "are of this machine"),
    "GPUs without a device": (["plan", "--gpus", "2"], "--gpus says nothing without --device"),
    "a rate without a device": (["plan", "--rate", "2"], "--rate says nothing without --device"),
    "a digit of another script": (["plan", "--jobs", "\u0663"], "argument --jobs: '\u0663' given, allowed are whole numbers"),
    "two signs": (["plan", "--jobs=--3"], "argument --jobs: '--3' given, allowed are whole numbers"),
    "a search without rates": (["tune", "--profile", "imagenet"], "unknown profile with rates to search: 'imagenet': allowed are"),
    "a parameter that is no number": (["reproduce", "--profile", "smoke", "--notebook", "31", "--set", "lr=nan"], "parameter lr of 31_fig1_branches is of type float, which 'nan' is not"),
    "a parameter without end": (["reproduce", "--profile", "smoke", "--notebook", "31", "--set", "lr=1e400"], "which '1e400' is not"),
    "an export over a notebook": (["export", "notebooks/31_fig1_branches.ipynb"], "allowed is a file that ends in .jsonl"),
    "a number of restarts": (["bench", "branches", "--restarts", "-1"], "allowed are whole numbers from 0"),
    "a file to import": (["import", "nowhere.jsonl"], "there is no file nowhere.jsonl to read"),
    "a profile of claims": (["claims", "--profile", "Study"], "did you mean 'study'?"),
    "a device of a plan": (["plan", "--profile", "smoke", "--device", "h1000"], "unknown device 'h1000'"),
    "a rate of a plan": (["plan", "--profile", "smoke", "--device", "h100", "--rate", "-1"], "rate is -1.0: allowed is"),
    "a machine without SLURM": (["run", "--profile", "smoke", "--slurm", "jobs"], "there is no command sbatch"),
    "cores of a SLURM job": (["run", "--profile", "smoke", "--slurm", "jobs", "--cpus", "0"], "argument --cpus: '0' given, allowed are whole numbers from 1"),
    "memory of a SLURM job": (["run", "--profile", "smoke", "--slurm", "jobs", "--memory-gb", "1.5"], "argument --memory-gb: '1.5' given, allowed are whole"),
    "hours of a SLURM job": (["run", "--profile", "smoke", "--slurm", "jobs", "--hours", "nan"], "hours above 0"),
    "a part of a claim": (["run", "--part", "H99"], "unknown part of a claim 'H99'"),
    "a part without runs": (["run", "--profile", "study", "--part", "P1"], "part P1 has no runs at profile study"),
    "a part of another profile": (["run", "--profile", "study", "--part", "F5-flowers-102"], "part F5-flowers-102 has no runs"),
    "an empty profile": (["plan", "--profile="], "--profile= is empty: give a value, or leave it out"),
    "an empty part": (["claims", ""], "a word is empty: give a value, or leave it out"),
    "a trace of no part": (["claims", "--trace"], "--trace is of one part, --margin of all: name a part"),
    "a margin of one part": (["claims", "F1", "--margin", "1"], "--trace is of one part, --margin of all"),
    "a picture of another kind": (["show", "F1", "--figure", "x.xyz"], "allowed is a file that ends in .png or .svg"),
    "a picture under a file": (["show", "F1", "--figure", f"{__file__}/x.png"], "x.png' cannot be written in "),
    "a study that is none": (["show", "F1", "--study", "../study"], "there is no claims.csv of ../study in outputs/reference"),
    "a setting without a name": (["reproduce", "--notebook", "31", "--set", "=5"], "unknown parameter of 31_fig1_branches ''"),
    "a setting without a value": (["reproduce", "--notebook", "31", "--set", "seeds"], "is of type int, which '' is not"),
    "text that is no study": (["import", __file__], "line 1 of test_commands.py is not a run"),
    "a profile of a plan": (["plan", "--profile", "imagnet"], "unknown profile 'imagnet'"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_mistake_is_one_sentence_and_exit_code_2(what, capsys, untouched):
    words, sentence = BAD[what]
    assert main(words) == 2
    said = capsys.readouterr()
    assert sentence in said.err and said.err.count("\n") == 1
    assert not (untouched / "runs").exists()


@pytest.mark.parametrize(
    ("words", "named"), [([], {}), (["--cpus", "4", "--memory-gb", "200"], {"cpus": 4, "memory_gb": 200})]
)
def test_a_slurm_job_gets_what_was_asked_for(monkeypatch, words, named):
    seen = []
    monkeypatch.setattr(launch, "submit", lambda specs, folder, stamps, **sizes: seen.append((folder, sizes)) or {})
    more = ["--partition", "a100", "--gpus", "8", "--nodes", "2", "--hours", "1.5"]
    assert main(["run", "--profile", "smoke", "--slurm", "jobs", *more, *words]) == 0
    sizes = {"partition": "a100", "gpus": 8, "nodes": 2, "hours": 1.5}
    assert seen == [("jobs", sizes | named)]


def test_make_passes_the_exit_code_on():
    environment = os.environ | {"VENV": os.path.dirname(os.path.dirname(sys.executable))}
    done = subprocess.run(
        ["make", "-s", "-o", f"{environment['VENV']}/ready", f"VENV={environment['VENV']}", "reproduce", "PROFILE=nope"],
        cwd=paths.ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "unknown profile 'nope'" in done.stderr


INJECTED = ("$(shell touch {0})", "$$(touch {0})", "`touch {0}`", '"; touch {0}; "', "'; touch {0}; '", "x\ntouch {0}")


def made(*words: str, **more: str) -> subprocess.CompletedProcess:
    """What `make` says in the checkout, with this environment's Python taken as set up."""
    venv = os.path.dirname(os.path.dirname(sys.executable))
    command = ["make", "-s", "-o", f"{venv}/ready", f"VENV={venv}", *words]
    return subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, env=os.environ | more)


@pytest.mark.parametrize("variable", ["PROFILE", "NB", "JOBS", "ARGS", "PYTHON", "VENV", "TORCH"])
def test_what_make_is_given_is_never_run(variable, tmp_path):
    """The recipes of all targets are printed, and the shell that would run them parses what it gets as one text."""
    echo = tmp_path / "python"  # in the place of .venv/bin/python
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text('#!/bin/bash\nprintf "<%s>" "$@"\necho "ARGS=$ARGS"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    for injected in INJECTED:
        value = injected.format(echo)
        ready = ["-o", f"{tmp_path}/ready", f"VENV={tmp_path}"]
        for target in ("test", "refresh") if variable == "ARGS" else ("reproduce", "refresh"):
            done = made(*ready, f"{variable}={value}", target)
            assert not echo.exists(), (injected, target)
            if variable in ("PYTHON", "VENV", "TORCH"):
                assert done.returncode == 2 and f"{variable} is" in done.stderr and "allowed" in done.stderr
            elif (variable, target) in (("PROFILE", "reproduce"), ("ARGS", "test")) or variable in ("NB", "JOBS"):
                assert value in done.stdout, done


def test_help_needs_no_heavy_import():
    code = "import sys; from lab.__main__ import parser; parser().format_help(); print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "pandas", "timm", "papermill"} & set(loaded)


def test_the_help_of_every_command_is_there(capsys):
    text = parser().format_help()
    for command in ("check", "plan", "run", "reproduce", "tune", "bench", "claims", "export", "import"):
        assert f"\n    {command}" in text
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0


def test_the_plan_says_runs_seconds_memory_and_disk_before_anything_starts(capsys):
    assert main(["plan", "--profile", "cpu", "--jobs", "2"]) == 0
    line = capsys.readouterr().out
    for word in (
        " of them to train",
        "minutes of one CPU core",
        "minutes with 2 workers",
        "MB of memory",
        "MB of disk",
    ):
        assert word in line


def test_the_claims_table_names_every_claim_and_reads_not_run_without_runs(capsys):
    assert main(["claims", "--profile", "cpu"]) == 0
    table = capsys.readouterr().out
    for claim in "P1 P2 P3 P4 P5 P6 P7 B1 A1 F1 F2 F3 F4 F5 F6 H1 H2 H3 H4 H6 H7".split():
        assert f"\n{claim}: " in table
    assert "not run" in table and "reproduced" not in table


def test_a_broken_pair_of_torch_and_torchvision_is_one_sentence(monkeypatch):
    class Broken:
        def find_spec(self, name, *_):
            if name == "torchvision":
                raise RuntimeError("operator torchvision::nms does not exist\nlong story")

    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(
        UsageError, match=r"not builds of one family \(operator torchvision::nms does not exist\).*make setup"
    ):
        vitlib_main.check()


def test_a_run_that_another_version_wrote_is_one_sentence_for_the_whole_command(capsys, untouched):
    spec = experiment(notebook("31"), profile("cpu")).specs()[0]
    (untouched / "runs" / spec.hash).mkdir(parents=True)
    (untouched / "runs" / spec.hash / "result.json").write_text("{}")
    assert main(["reproduce", "--profile", "cpu", "--notebook", "31"]) == 2
    assert "is not in the form of this version" in capsys.readouterr().err
    assert (untouched / "runs" / spec.hash / "result.json").read_text() == "{}"


PLACES = {
    "under a file": ("{0}/file/runs", "but {0}/file is a file"),
    "too long": ("{0}/" + "n" * 300, "File name too long"),
    "with a control character": ("{0}/a\nb", "which holds a control character"),
}


@pytest.mark.parametrize("what", PLACES)
@pytest.mark.parametrize("variable", ["VITLIB_RUNS", "VITLIB_OUTPUTS"])
def test_a_folder_that_cannot_be_is_one_sentence(what, variable, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").touch()
    value, said = (text.format(tmp_path) for text in PLACES[what])
    monkeypatch.setenv(variable, value)
    assert main(["claims" if variable == "VITLIB_OUTPUTS" else "plan", "--profile", "smoke"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"lab: {variable} is {value!r}"[:60]) and said in shown and shown.count("\n") == 1


def test_an_empty_variable_is_one_that_is_not_set(monkeypatch):
    for variable in ("VITLIB_RUNS", "VITLIB_OUTPUTS"):
        monkeypatch.setenv(variable, "")
    assert (paths.outputs(), paths.runs()) == (paths.ROOT / "outputs", paths.ROOT / "outputs" / "runs")


@pytest.mark.parametrize("path", ["{0}", "{0}/file/runs.jsonl", "{0}/pipe.jsonl", "{0}/runs.txt"])
def test_a_file_that_export_cannot_write_is_one_sentence(path, capsys, tmp_path):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert main(["export", path.format(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "allowed is a file that ends in .jsonl" in said and said.count("\n") == 1


def test_a_folder_for_what_is_written_is_made(capsys, tmp_path):
    assert main(["export", str(tmp_path / "new" / "runs.jsonl")]) == 0
    assert main(["show", "F1", "--figure", str(tmp_path / "other" / "F1.png")]) == 0
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["F1.png", "runs.jsonl"]


def test_a_disk_that_cannot_be_written_is_one_sentence(monkeypatch, capsys, tmp_path):
    def full(*_):
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path))

    monkeypatch.setattr(store, "write_whole", full)
    assert main(["export", str(tmp_path / "runs.jsonl")]) == 1
    assert capsys.readouterr().err == f"lab: Read-only file system ({tmp_path}); finished runs are kept\n"


PARAMETERS = """
profile: str = "smoke"  # which
size: int = 8  # side
rate: float = 0.1  # of learning
save: bool = False  # keep
seeds: list = [1, 2]  # which
"""


@pytest.mark.parametrize(
    ("word", "value"),
    [("profile=cpu", "cpu"), ("size=5", 5), ("rate=1", 1.0), ("rate=1e-3", 1e-3), ("size=x", None), ("size=2.5", None),
     ("rate=__import__('os')", None)],
)  # fmt: skip
def test_a_parameter_is_set_as_its_type(word, value, tmp_path):
    cell = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    nbformat.write(
        new_notebook(
            cells=[cell], metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "Python"}}
        ),
        tmp_path / "n.ipynb",
    )
    name = word.partition("=")[0]
    if value is None:
        with pytest.raises(UsageError, match=rf"^parameter {name} of n is of type .*, which .* is not$"):
            render._parameters(tmp_path / "n.ipynb", {}, [word])
    else:
        chosen = render._parameters(tmp_path / "n.ipynb", {}, [word])[name]
        assert chosen == value and type(chosen) is type(value)


@pytest.mark.parametrize("word", ["save=True", "seeds=[3]"])
def test_a_parameter_of_another_type_is_not_set(word, tmp_path):
    cell = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    kernel = {"name": "python3", "language": "python", "display_name": "Python"}
    nbformat.write(new_notebook(cells=[cell], metadata={"kernelspec": kernel}), tmp_path / "n.ipynb")
    with pytest.raises(UsageError, match=r"^parameter \w+ of n is of type .*: --set sets str, int, float alone$"):
        render._parameters(tmp_path / "n.ipynb", {}, [word])


def test_a_commit_is_that_of_this_checkout_or_unknown(monkeypatch, tmp_path):
    commit = paths.commit.__wrapped__
    assert re.fullmatch(r"[0-9a-f]{12}\+?|unknown", commit())
    # an unpacked archive inside of another repository
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "inside").mkdir()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(paths, "ROOT", tmp_path / "inside")
        assert commit() == "unknown"
    here = commit()
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))  # as in a hook of another repository
    assert commit() == here
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert commit() == "unknown"


def test_a_relative_store_is_the_same_folder_for_every_process(monkeypatch):
    monkeypatch.setenv("VITLIB_RUNS", "store")
    assert paths.runs() == paths.ROOT / "store"


def test_runs_are_described_in_words():
    spec = experiment(notebook("41"), profile("cpu")).arms["attn"].spec
    assert spec.describe() == "finetune, fashion-mnist, W64-12x1/4, 20 px, stem linear, 6000 images, attn, seed 0"


def test_vitlib_has_a_command_line_of_its_own(capsys):
    assert vitlib_main.main(["check"]) == 0
    said = capsys.readouterr().out
    assert all(f"{name} " in said for name in ("torch", "torchvision", "timm", *vitlib_main.BESIDE, "vitlib"))
    assert vitlib_main.main(["chek"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit) as stop:
        vitlib_main.main(["--help"])
    assert stop.value.code == 0 and "check" in capsys.readouterr().out
    settings = [settings for _, options in vitlib_main.COMMANDS.values() for _, settings in options]
    assert all("(%(default)s)" in s["help"] for s in settings if s.get("default") is not None)


def test_a_library_that_is_absent_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(vitlib_main, "BESIDE", (*vitlib_main.BESIDE, "no-such-library"))
    assert vitlib_main.main(["check"]) == 2
    assert "no-such-library is not installed: pip install vitlib" in capsys.readouterr().err
