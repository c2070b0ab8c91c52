"""The committed answer: read without torch, in words and as a figure."""

import json
import re
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from lab import paths
from lab.__main__ import main
from lab.claims import evidence, judge
from lab.experiments.profiles import profile
from lab.report import answer
from tools import reference
from vitlib.errors import UsageError
from vitlib.stats import Estimate


@pytest.fixture
def study(monkeypatch, tmp_path):
    """A committed study in which A1 is level, F1 worse and F2-full as the paper says."""
    planted = {"A1": (0.1, 0.05), "F1": (-1.0, 0.1), "F2-full": (0.9, 0.1)}

    def verdict(source, part):
        found = real(source, part)
        if part.id not in planted:
            return found
        mean, se = planted[part.id]
        here = part.at_profile("study")
        estimate = Estimate(mean, (se**2 * 20 * 5000, 1.0, 1.0), 20, 5000)
        p = judge.statistics.p_value(part.kind, estimate, part.margin)
        return judge.Verdict(here, "study", judge.label(here, estimate), estimate, p)

    real = evidence.verdict
    monkeypatch.setattr(evidence, "verdict", verdict)
    monkeypatch.setattr(evidence.Stored, "holds", lambda self, part: True)
    monkeypatch.setenv("VITLIB_RUNS", str(tmp_path / "runs"))
    table = judge.verdict_table(evidence.verdicts(evidence.Stored(profile("study"))))
    monkeypatch.setattr(paths, "REFERENCE", tmp_path)
    (tmp_path / "study").mkdir()
    table.to_csv(tmp_path / "study" / "claims.csv", index=False)
    (tmp_path / "study" / "about.txt").write_text("two runs on a made-up device\n")
    answer.claims.cache_clear()
    yield table
    answer.claims.cache_clear()
    plt.close("all")


def test_the_words_are_those_of_the_label_with_number_interval_n_and_the_paper(study):
    said = answer.text(answer.chosen("A1"))
    assert said.startswith("**A1: Residual layers can be processed side by side at no cost in accuracy: held here.**")
    assert "Two branches are as accurate as one, to within the margin" in said and "*level within 0.5*" in said
    assert re.search(r"\+0\.10 \[-0\.0\d, \+0\.2\d\] points, n = 20; the paper: -0\.10", said)
    assert "did not hold here" in answer.text(answer.chosen("F1")) and "worse 0." not in answer.text(
        answer.chosen("F1")
    )
    lines = answer.plain(answer.chosen("")).split("\n")
    assert max(map(len, lines)) <= 100 and not any("*" in line for line in lines)


def test_what_was_looked_at_after_a_verdict_stands_beside_it_and_changes_no_label(study, tmp_path):
    before = list(answer.chosen("")["label"])
    (tmp_path / "study" / "afterwards.csv").write_text("part,says\nA1,Afterwards.\n")
    answer.claims.cache_clear()
    assert list(answer.chosen("")["label"]) == before
    for words in (answer.text, answer.plain):
        assert "Afterwards." in words(answer.chosen("A1")) and "Afterwards." not in words(answer.chosen("F1"))
    assert reference.answers_block().rstrip().endswith("\nA1: Afterwards.")


def test_what_holms_correction_left_open_says_what_it_was_without(study):
    rows = answer.chosen("A1").assign(says="It is open.", note="level within 0.5 without Holm's correction")
    assert "without Holm" not in answer.text(rows)
    assert "; level within 0.5 without Holm's correction)" in answer.text(rows.assign(label="undecided"))


@pytest.mark.parametrize("name, parts", [("F2-full", ["F2-full"]), ("F2", ["F2-full", "F2-attn"]), ("51", ["H1", "H2-ln", "H2-bn-eval", "H2-bn-train", "H2-conv"])])  # fmt: skip
def test_a_claim_a_part_or_a_notebook_is_chosen_by_its_name(study, name, parts):
    assert list(answer.chosen(name)["part"]) == parts


def test_another_name_or_study_is_refused_with_what_there_is(study):
    with pytest.raises(UsageError, match=r"unknown claim, part or notebook 'F9'"):
        answer.chosen("F9")
    with pytest.raises(UsageError, match=r"there is no claims.csv of photos in outputs/reference: allowed are study"):
        answer.chosen("F1", "photos")


def test_the_figure_has_our_estimate_with_its_interval_filled_and_the_papers_hollow(study):
    rows = answer.chosen("F1")
    axes = answer.figure(rows).axes[0]
    (ours,) = axes.containers
    assert ours.lines[0].get_xdata() == pytest.approx([-1.0])
    low, high = ours.lines[2][0].get_segments()[0][:, 0]
    assert (low, high) == pytest.approx((rows["low"].iloc[0], rows["high"].iloc[0]))
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "none"]
    assert [line.get_xdata()[0] for line in hollow] == [0.0]
    assert answer.kind(next(rows.itertuples())) == "against" and "F1: -1.00" in answer.alt(rows)
    assert answer.figure(answer.chosen("H1")) is None
    assert [panel.get_title() for panel in reference.three().axes] == list(reference.PANELS)


def test_a_notebook_shows_figure_and_verdict_with_text_for_those_who_do_not_see_it(study, monkeypatch):
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", shown.append)
    answer.answer("41")
    picture, words = shown
    assert picture.metadata["alt"] == picture.alt == answer.alt(answer.chosen("41")) and len(picture.data) > 5000
    assert words.data.endswith("*two runs on a made-up device*")


BLOCKED = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name.partition(".")[0] in {"torch", "torchvision", "timm", "pyarrow", "datasets", "safetensors"}:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
from lab.__main__ import main
sys.exit(main(["show", "F4"]))
"""


WHOLE = (paths.REFERENCE / "study" / "claims.csv").read_bytes()


@pytest.mark.parametrize(
    "content",
    [b"", b"part,label\nF1,open\n", b'"part', b"\xff\xfe\x00", WHOLE[: WHOLE.index(b"\nF2-full,") + 12], WHOLE.replace(b",counted,", b",,"), WHOLE.replace(b",20,", b",x,")],
    ids=["empty", "two columns", "a quote", "no text", "cut", "without verdicts", "a text for a number"],
)  # fmt: skip
def test_a_damaged_table_of_verdicts_is_one_sentence(content, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(paths, "REFERENCE", tmp_path)
    monkeypatch.setattr(answer, "claims", answer.claims.__wrapped__)
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "claims.csv").write_bytes(content)
    assert main(["show", "F1"]) == 2
    said = capsys.readouterr().err
    assert "claims.csv is damaged and cannot be read" in said and said.count("\n") == 1


def test_show_needs_no_torch():
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, cwd=paths.ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("F4: Attention holds a third of the weights") and "exact" in done.stdout


def test_what_show_needs_is_what_its_requirements_say():
    names = {
        line.split(">=")[0]
        for line in (paths.ROOT / "requirements-read.txt").read_text().splitlines()
        if line[0] != "#"
    }
    assert {"pandas", "scipy", "seaborn", "statsmodels"} <= names and not names & {"torch", "timm", "torchvision"}


def test_every_column_of_the_committed_table_is_in_its_schema():
    from tools.schema import schema

    made = schema()
    assert (paths.REFERENCE / "claims.schema.json").read_text() == json.dumps(made, indent=1) + "\n"
    table = pd.read_csv(paths.REFERENCE / "study" / "claims.csv")
    assert list(table) == made["required"] and np.isin(table["claim_verdict"].unique(), [
        judge.HELD, judge.NOT_HELD, judge.OPEN, judge.EXPLORATORY, judge.COUNTED,
    ]).all()  # fmt: skip
