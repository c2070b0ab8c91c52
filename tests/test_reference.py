"""The committed reference: page and README's table say what claims.csv says, and claims.csv what runs.jsonl says."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from lab import paths
from lab.claims.ledger import ledger
from lab.experiments.catalogue import experiment, notebook
from lab.experiments.profiles import profile as scale
from lab.report import tables
from lab.runs import results, store
from lab.runs.results import Archive, Result
from tools import reference
from vitlib.errors import UsageError

README = (paths.ROOT / "README.md").read_text(encoding="utf-8")


def committed(profile: str) -> pd.DataFrame:
    return reference.table(profile).set_index("part")


def test_the_readmes_claims_table_is_the_committed_one():
    assert reference.studies()
    assert reference.with_block(README, reference.readme_block()) == README, "python -m tools.reference"


def test_the_page_is_written_from_the_committed_tables():
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), "python -m tools.reference"


def test_every_part_of_the_ledger_has_one_place_on_the_page_and_its_own_words():
    for profile in reference.studies():
        rows = reference.table(profile)
        assert set(rows["part"]) == {part.id for part in ledger().values() if part.belongs("study")}
        for row in rows.itertuples():
            sections = [title for title, chosen, _ in reference.SECTIONS if chosen(row)]
            assert len(sections) == 1, row.part
            assert reference.PAGE.read_text(encoding="utf-8").count(f"- **{row.part}** ") == len(reference.studies())


def test_the_page_says_which_arms_were_best_at_an_end_of_the_rates_tried_and_which_parts_were_not_tuned():
    kept = paths.REFERENCE / "pilot"
    tried = pd.read_csv(kept / "tuning.csv").pivot_table(index="arm", columns="lr", values="top1_validation")
    ffn = tried.loc["ffn"].dropna()
    ends = reference._at_an_end("pilot")
    assert ends["ffn"] == ("highest" if ffn.iloc[-1] == ffn.max() else "lowest") and "full" not in ends
    assert len(ffn) == 3 and tried.loc["full"].dropna().argmax() == 1  # three rates, full's in the middle
    text = reference.PAGE.read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| F2-full "))
    assert f"ffn ({ends['ffn']})" in row and "full (" not in row
    # "attn" of Table 5 is not the "W64 digits 100 attn" of Table 6.
    assert "| attn (" not in next(line for line in text.splitlines() if line.startswith("| F5-digits "))
    named = text.partition("untuned: ")[2].partition(".\n")[0].split(", ")
    shown, judged = set(pd.read_csv(kept / "best_rates.csv")["part"]), committed("pilot")
    assert shown.isdisjoint(named)
    assert shown | {*named} == {*judged.index[judged["ours"].notna() & (judged["test"] != "ratio")]}


def test_the_committed_verdicts_are_those_of_the_committed_runs(monkeypatch, tmp_path):
    """The runs are read into an empty store, and every part that was judged on runs is judged again."""
    monkeypatch.setenv("VITLIB_RUNS", str(tmp_path / "runs"))
    for profile in set(reference.studies()) & {"study"}:  # other profiles' data is not here
        store.import_runs(paths.REFERENCE / profile / "runs.jsonl")
        again = {v.part.id: v for v in tables.judged(scale(profile))}
        for id, row in committed(profile).iterrows():
            if ledger()[id].kind != "ratio":
                assert again[id].text == row["verdict"], id
            if isinstance(row["runs"], str) and row["runs"]:
                assert " ".join(again[id].runs) == row["runs"]
                assert again[id].ours == pytest.approx(tuple(row[["ours", "low", "high"]]), abs=1e-9)


def test_the_differences_of_the_claims_table_come_out_by_plain_arithmetic_on_the_runs():
    """Not by the code that judges: the bits are unpacked here, and a superiority's mean is a mean of means."""
    for profile in reference.studies():
        lines = (paths.REFERENCE / profile / "runs.jsonl").read_text(encoding="utf-8").splitlines()
        results = {r["result"]["hash"]: Result.from_record(r["result"]) for r in map(json.loads, lines)}
        for id, row in committed(profile).iterrows():
            part = ledger()[id].at_profile(profile)
            if not (isinstance(row["runs"], str) and row["runs"]) or part.sizes:
                continue
            assert set(row["runs"].split()) <= results.keys(), id
            assert row["low"] < row["ours"] < row["high"]
            assert row["seed_se"] ** 2 * row["n"] == pytest.approx(row["sd"] ** 2)


def made_up() -> pd.DataFrame:
    from lab.claims.judge import judge, verdict_table

    rng = np.random.default_rng(0)
    part = ledger()["A1"]
    arms = {arm: rng.random((5, 400)) < 0.8 for arm in part.contrast_at(12)}
    from lab.claims.ledger import ledger_hashes

    judged = judge(part, arms, "study", 12, 10, hashes=[ledger_hashes()])
    return verdict_table([judged, judge(ledger()["P5"], {}, "study", 12, 10)])


def test_report_copies_what_was_rendered_and_refuses_where_nothing_was(monkeypatch, tmp_path):
    monkeypatch.setenv("VITLIB_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("VITLIB_RUNS", str(tmp_path / "runs"))
    study = scale("study")
    with pytest.raises(UsageError, match="run `python -m lab reproduce --profile study` first"):
        reference.copy(study)
    made = tmp_path / "outputs" / "study"
    (made / "tables").mkdir(parents=True)
    (made / "figures").mkdir()
    made_up().to_csv(made / "claims.csv", index=False)
    (made / "tables" / "31_x.csv").write_text("a,b\n1.50,\n", encoding="utf-8")
    (made / "tables" / "31_x.md").write_text("| a | b |\n|---|---|\n| 1.50 | – |\n", encoding="utf-8")
    (made / "figures" / "31_x.png").write_bytes(b"png")
    (made / "figures" / "31_x.svg").write_bytes(b"svg")
    monkeypatch.setattr(paths, "REFERENCE", tmp_path / "reference")
    monkeypatch.setattr(reference, "PAGE", tmp_path / "reference" / "README.md")
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text(
        f"before\n{reference.MARKS[0]}\nold\n{reference.MARKS[1]}\nafter\n", encoding="utf-8"
    )
    monkeypatch.setattr(reference, "_about", lambda profile: "10 runs")
    with pytest.raises(UsageError, match="no run of profile study is in"):
        reference.copy(study)
    assert not (tmp_path / "reference").exists()
    trunks = experiment(notebook("41"), study).seeds_of("trunk")
    for spec in trunks:
        run = Result(spec.hash, {"top1": 50.0}, np.array([True, False]), {}, dict.fromkeys(results.ABOUT, "x"))
        (tmp_path / "runs" / spec.hash).mkdir(parents=True)
        for name, record in (("spec", spec.record()), ("result", run.record())):
            (tmp_path / "runs" / spec.hash / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")
    monkeypatch.setattr(reference, "NOTEBOOKS", [notebook(number) for number in ("31", "41")])
    assert reference.main(["--profile", "study"]) == 0
    kept = tmp_path / "reference" / "study"
    assert sorted(p.name for p in kept.rglob("*") if p.is_file()) == [
        "31_x.csv", "31_x.md", "31_x.png", "arms.csv", "claims.csv", "claims.toml", "runs.jsonl",
    ]  # fmt: skip
    archive = Archive(kept)  # pages can read it
    assert archive.seeds == study.seeds
    assert [result.hash for result in archive.results("41")["trunk"]] == [spec.hash for spec in trunks]
    assert "|" in (kept / "tables" / "31_x.md").read_text() and "1.50" in (kept / "tables" / "31_x.md").read_text()
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("before\n") and readme.endswith("after\n") and "old" not in readme
    assert "| A1 " in readme and "not run" in readme
    page = reference.PAGE.read_text(encoding="utf-8")
    assert "- **P5** " in page[page.index("### Not run") :] and "- **A1** " in page
