"""The committed reference: page and README's tables say what claims.csv says, and claims.csv what the runs say."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from lab import paths
from lab.claims import evidence
from lab.claims.ledger import PILOT, ledger
from lab.experiments.catalogue import experiment, notebook
from lab.experiments.profiles import profile as scale
from lab.report import answer, tables
from lab.runs import results, store
from lab.runs.results import Archive, Result
from tools import reference
from vitlib.errors import UsageError

README = (paths.ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readmes_tables_are_the_committed_ones():
    text = reference.with_block(README, reference.readme_block())
    assert reference.with_block(text, reference.answers_block(), reference.ANSWERS) == README, (
        "python -m tools.reference"
    )
    assert max(map(len, reference.readme_block().splitlines())) <= 200


def test_the_page_is_written_from_the_committed_tables():
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), "python -m tools.reference"


def test_every_part_of_the_ledger_has_one_place_on_the_page_and_its_own_words():
    page = reference.PAGE.read_text(encoding="utf-8")
    for study in answer.studies():
        rows = answer.claims(study)
        assert set(rows["part"]) == {part.id for part in ledger().shown(study)}
        for row in rows.itertuples():
            assert sum(bool(chosen(row)) for chosen in reference.SECTIONS.values()) == 1, row.part
            assert page.count(f"- **{row.part}** ") == len(answer.studies())


def test_the_pilot_stands_beside_the_second_study_part_by_part_with_the_reason():
    pilot = pd.read_csv(paths.REFERENCE / PILOT / "claims.csv", index_col="part")
    lines = [line.split(" | ") for line in reference.beside().splitlines()[2:]]
    assert [line[0].removeprefix("| ") for line in lines] == list(pilot.index[pilot["ours"].notna()])
    assert all(len(line) == 6 and line[3] and line[5].strip(" |") for line in lines)
    assert next(line for line in lines if line[0] == "| P4")[1] == "equivalent within 1.5"


def test_the_committed_verdicts_are_those_of_the_committed_files(monkeypatch, tmp_path):
    """Runs are read into an empty store, and every part is judged again."""
    monkeypatch.setenv("VITLIB_RUNS", str(tmp_path / "runs"))
    if (paths.REFERENCE / "study" / "runs.jsonl").is_file():
        store.import_runs(paths.REFERENCE / "study" / "runs.jsonl")
    again = {v.part.id: v for v in evidence.verdicts(evidence.Stored(scale("study")))}
    for row in answer.claims().itertuples():
        if row.test != "ratio":
            assert again[row.part].label == row.label, row.part
        if not pd.isna(row.ours) and row.test != "ratio":
            assert again[row.part].ours == pytest.approx((row.ours, row.low, row.high), abs=1e-9)
            assert row.low < row.ours < row.high and row.seed_se**2 * row.n == pytest.approx(row.sd**2)


@pytest.mark.parametrize("study", answer.studies())
def test_the_committed_verdicts_are_those_of_the_archive_which_needs_no_data(study):
    again = {v.part.id: v for v in evidence.verdicts(evidence.committed(study))}
    for row in answer.claims(study).itertuples():
        if row.test != "ratio":
            assert again[row.part].label == row.label, row.part
            if not pd.isna(row.ours) and row.source == study:
                assert again[row.part].ours == pytest.approx((row.ours, row.low, row.high), abs=1e-9)


ABOUT = dict.fromkeys(results.ABOUT, "x") | dict.fromkeys(("cpu_s", "wall_s", "mem_mb"), 3600.0)


def finished(place, spec) -> None:
    run = Result(spec.hash, {"top1": 50.0}, np.array([True, False]), {}, ABOUT)
    (place / "runs" / spec.hash).mkdir(parents=True)
    for name, record in (("spec", spec.record()), ("result", run.record())):
        (place / "runs" / spec.hash / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")


def test_what_is_finished_of_a_study_is_copied_and_arms_that_are_not_whole_have_no_accuracy(monkeypatch, tmp_path):
    monkeypatch.setenv("VITLIB_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("VITLIB_RUNS", str(tmp_path / "runs"))
    study, kept = scale("study"), tmp_path / "reference" / "study"
    monkeypatch.setattr(paths, "REFERENCE", tmp_path / "reference")
    monkeypatch.setattr(reference, "PAGE", tmp_path / "reference" / "README.md")
    monkeypatch.setattr(reference, "beside", lambda: "the pilot")
    monkeypatch.setattr(evidence, "pilot", lambda part: evidence.Verdict(part.at_profile("study"), "study", "not run"))
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    marks = [*reference.ANSWERS, *reference.MARKS]
    (tmp_path / "README.md").write_text(
        "before\n{}\nold\n{}\nbetween\n{}\nold\n{}\nafter\n".format(*marks), encoding="utf-8"
    )
    monkeypatch.setattr(reference, "NOTEBOOKS", [notebook(number) for number in ("31", "41")])
    made = tmp_path / "outputs" / "study" / "tables"
    made.mkdir(parents=True)
    (made / "31_x.md").write_text("| a |\n", encoding="utf-8")
    (made / "31_x.txt").write_text("not copied", encoding="utf-8")
    setting = experiment(notebook("41"), study)
    trunks = setting.seeds_of("trunk")
    arm, (number, later, *_) = "12x1+LS", reference.AFTERWARDS["A1"]
    for spec in [*trunks, *setting.seeds_of("full")[:3], *experiment(notebook(number), study).seeds_of(later)]:
        finished(tmp_path, spec)
    answer.claims.cache_clear()
    assert reference.main(["--profile", "study"]) == 0
    answer.claims.cache_clear()
    assert sorted(p.name for p in kept.rglob("*") if p.is_file()) == [
        "31_x.md", "about.txt", "accuracies.csv", "afterwards.csv", "arms.csv", "claims.csv", "claims.toml", "margins.csv", "recipes.toml",
        "runs.jsonl",
    ]  # fmt: skip
    archive = Archive(kept)  # pages can read it
    assert [r.hash for r in archive.results("41")["trunk"]] == [spec.hash for spec in trunks]
    assert len(archive.results("41")["full"]) == 3 and archive.seeds == study.seeds
    whole = pd.read_csv(kept / "accuracies.csv", dtype={"notebook": str})
    assert whole[["notebook", "arm", "n"]].values.tolist() == [
        ["31", arm, 20],
        ["31", later, 20],
        ["41", "trunk", 20],
    ]  # one run, two names
    assert (kept / "about.txt").read_text().startswith("43 runs on fashion-mnist, 43.0 CPU hours")
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "\nold\n" not in readme and "| A1 | Residual layers" in readme and "A1: not run" in readme
    assert "difference is +0.00 [+0.00, +0.00] points, n = 20." in readme
    page = reference.PAGE.read_text(encoding="utf-8")
    assert "- **A1** " in page[page.index("### Not run") :]


def test_a_readme_without_marks_and_an_unknown_profile_are_refused():
    with pytest.raises(UsageError, match=r"README\.md lacks the marks"):
        reference.with_block("text", "block")
    with pytest.raises(SystemExit):
        reference.main(["--profile", "studdy"])


def test_a_table_of_ours_has_no_padding():
    assert reference.rows_of([{"a": "x", "b": "long text"}, {"a": "y", "b": "z"}]).splitlines() == [
        "| a | b |", "| --- | --- |", "| x | long text |", "| y | z |",
    ]  # fmt: skip
    assert tables.printed(pd.DataFrame(), {}).empty
