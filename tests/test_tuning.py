"""Learning rates and margins: chosen on validation images, the same three rates for every arm, committed as chosen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from lab import paths
from lab.claims import tuning
from lab.claims.ledger import ledger
from lab.experiments import small
from lab.experiments.catalogue import arms_of
from lab.experiments.profiles import profile
from lab.runs import store
from lab.runs.results import Result
from vitlib.errors import UsageError

STUDY = profile("study")
REFERENCE = paths.REFERENCE / "pilot"


def pretend(monkeypatch, made):
    """Only the runs of `made` are finished: hash -> top-1."""

    def find(spec):
        return Result(spec.hash, {"top1": made[spec.hash]}, None, {}, {}) if spec.hash in made else None

    monkeypatch.setattr(store, "find", find)


def test_every_arm_of_a_group_tries_the_same_three_rates_on_tuning_seeds_and_differs_in_nothing_else():
    for name, group in tuning.GROUPS.items():
        arms = arms_of(group.table, STUDY)
        found = group.specs(STUDY)
        assert {(arm, lr, spec.seed) for arm, lr, spec in found} == {
            (arm, lr, seed) for arm in group.arms for lr in group.rates for seed in tuning.SEEDS
        }, name
        assert len(group.rates) == 3 and list(group.rates) == sorted(group.rates)
        for arm, lr, spec in found:
            own = arms[arm].spec.with_seed(spec.seed)
            assert spec == replace(own, recipe=replace(own.recipe, lr=lr)) and spec.split == "validation"


def test_the_rate_of_each_group_is_one_of_its_three_and_the_one_that_all_its_arms_are_judged_at():
    for group in tuning.GROUPS.values():
        rates = {arms_of(group.table, STUDY)[arm].spec.recipe.lr for arm in group.arms}
        assert len(rates) == 1 and rates < set(group.rates)


def test_the_committed_rates_are_the_best_of_the_committed_tuning():
    table = pd.read_csv(REFERENCE / "tuning.csv")
    assert set(table["group"]) == set(tuning.GROUPS)
    for name, rows in table.groupby("group"):
        group = tuning.GROUPS[name]
        means = rows.groupby("lr")["top1_validation"].mean()
        assert set(means.index) == set(group.rates) and set(rows["arm"]) == set(group.arms)
        assert rows.loc[rows["chosen"].astype(bool), "lr"].unique() == [means.idxmax()]
        arms = arms_of(group.table, STUDY)
        assert {arms[arm].spec.recipe.lr for arm in group.arms} == {means.idxmax()}, name


def test_the_margins_of_the_study_are_a_tenth_of_the_measured_errors():
    table = pd.read_csv(REFERENCE / "margins.csv").set_index("part")
    for id, row in table.iterrows():
        assert ledger()[id].at_profile("study").margin == row["margin"] == tuning.margin(row["error_validation"]), id
    judged = pd.read_csv(REFERENCE / "claims.csv", dtype={"runs": str}).set_index("part")
    for id in judged.index[judged["runs"].notna()]:
        assert id in table.index or ledger()[id].at_profile("study").margin == 1.5, id


def test_the_best_rate_is_that_of_the_highest_mean_over_arms_and_of_equals_the_lowest():
    found = {("a", 1.0): [80, 82], ("a", 2.0): [85, 85], ("b", 1.0): [70, 70], ("b", 2.0): [60, 60]}
    assert tuning.best(found) == 1.0
    assert tuning.best({("a", 2.0): [80], ("a", 1.0): [80]}) == 1.0


def test_the_table_says_what_was_found_and_chooses_only_when_all_is_there(monkeypatch):
    group = tuning.GROUPS["supervised"]
    accuracy = {(arm, lr): 80 + i for i, (arm, lr) in enumerate((a, r) for r in group.rates for a in group.arms)}
    made = {spec.hash: accuracy[arm, lr] for arm, lr, spec in group.specs(STUDY)}

    pretend(monkeypatch, made)
    rows = pd.DataFrame(tuning.table(STUDY, {"supervised": group}))
    assert len(rows) == 6 and (rows["n"] == 2).all() and set(rows.loc[rows["chosen"], "lr"]) == {group.rates[-1]}
    made.pop(next(spec.hash for _, _, spec in group.specs(STUDY)))
    rows = pd.DataFrame(tuning.table(STUDY, {"supervised": group}))
    assert len(rows) == 5 and rows["chosen"].isna().all()


def test_a_margin_is_read_from_the_control_at_the_tuning_seeds(monkeypatch):
    known = tuning.controls(STUDY)
    assert {arm for arm, _ in known["P5"]} == {"36x1+LS"} and [s.seed for _, s in known["P5"]] == list(tuning.SEEDS)
    assert {arm for arm, _ in known["P4"]} == {"12x1", "24x1", "36x1"}
    monkeypatch.setattr(store, "find", lambda spec: Result(spec.hash, {"top1": 90.0 + spec.seed % 2}, None, {}, {}))
    margins = {row["part"]: (row["error_validation"], row["margin"]) for row in tuning.margins(STUDY)}
    assert margins["F1"] == (9.5, pytest.approx(0.95))
    assert [tuning.margin(error) for error in (2, 9.5, 40)] == [0.5, 0.95, 1.5]
    assert np.isclose(tuning.margin(12.344), 1.23)


def test_groups_are_chosen_by_name_or_by_their_first_word():
    assert list(tuning.groups(["resolution"])) == [f"resolution {s}" for s in ("full", "attn", "ffn", "head")]
    assert list(tuning.groups([])) == list(tuning.GROUPS)
    with pytest.raises(UsageError, match="unknown tuning group 'supervise'"):
        tuning.groups(["supervise"])


def test_a_contrast_is_shown_at_the_common_rate_and_at_the_best_rate_of_each_arm(monkeypatch):
    """6x2+LS - 12x1+LS: 3e-3 is best for both together (79.5), 1.5e-3 for 12x1+LS alone (80)."""
    low, middle, high = tuning.GROUPS["supervised+LS"].rates
    accuracy = {"12x1+LS": {low: 80, middle: 79, high: 70}, "6x2+LS": {low: 70, middle: 80, high: 75}}
    group = tuning.GROUPS["supervised+LS"]
    made = {spec.hash: accuracy[arm][lr] + seed % 2 for arm, lr, spec in group.specs(STUDY) for seed in [spec.seed]}

    pretend(monkeypatch, made)
    (row,) = tuning.contrasts(STUDY, tuning.table(STUDY, tuning.GROUPS))
    assert (row["part"], row["n"], row["at_the_common_rate"], row["at_each_best"]) == ("A1", 2, 1.0, 0.0)
    assert row["best_rates"] == f"6x2+LS: {middle:g}, 12x1+LS: {low:g}"
    made.pop(next(iter(made)))
    assert tuning.contrasts(STUDY, tuning.table(STUDY, tuning.GROUPS)) == []


def test_a_slope_is_shown_as_its_change_from_the_smallest_size_to_the_largest(monkeypatch):
    """F6's: attn - full is -2 at width 32 and +1 at 64, so +3."""
    top1 = {
        "W32 digits 1000 attn": 88,
        "W32 digits 1000 full": 90,
        "W64 digits 1000 attn": 93,
        "W64 digits 1000 full": 92,
    }
    groups = [tuning.GROUPS[f"transfer {arm}"] for arm in top1]
    made = {spec.hash: top1[arm] for group in groups for arm, _, spec in group.specs(STUDY)}

    pretend(monkeypatch, made)
    shown = {
        row["part"]: row["at_the_common_rate"] for row in tuning.contrasts(STUDY, tuning.table(STUDY, tuning.GROUPS))
    }
    assert shown == {"F6-digits": 2.0, "F6-digits-slope": pytest.approx(3.0)}


def test_table_6_is_tuned_on_every_target_at_the_widths_that_are_judged_there():
    arms = {arm for name, group in tuning.GROUPS.items() if name.startswith("transfer") for arm in group.arms}
    judged = {
        arm
        for part in ledger().values()
        if part.claim in ("F5", "F6") and part.belongs("study")
        for arm in part.arms(12)
    }
    assert judged <= arms
    # An arm that is not tuned has the rate of width 64 at the same images, or of its strategy at the middle number of them.
    made = arms_of(small.transfer, STUDY)
    for name in set(made) - arms:
        _, data, images, strategy = name.replace("scratch", "full").split()
        near = f"W64 {data} {images} {strategy}", f"W64 {data} {STUDY.transfer_images[data][1]} {strategy}"
        like = next(arm for arm in near if arm in arms)
        assert made[name].spec.recipe.lr == made[like].spec.recipe.lr, name


def test_the_committed_contrasts_at_the_best_rates_come_out_of_the_committed_tuning():
    tuned = pd.read_csv(REFERENCE / "tuning.csv", dtype={"notebook": str}).astype({"chosen": bool})
    shown = pd.read_csv(REFERENCE / "best_rates.csv").set_index("part")
    for id, row in shown.iterrows():
        part = ledger()[id].at_profile("study")
        mine = tuned[tuned["notebook"] == part.notebook]
        best = mine.groupby("arm")["top1_validation"].max()
        common = mine[mine["chosen"]].set_index("arm")["top1_validation"]
        contrasts = part.contrasts(max(12, part.min_pairs))
        for top1, column in ((common, "at_the_common_rate"), (best, "at_each_best")):
            points = [sum(c * top1[arm] for arm, c in contrast.items()) for contrast in contrasts]
            expected = points[0]
            if part.sizes:
                x = np.log2(part.sizes)
                expected = np.polyfit(x, points, 1)[0] * np.ptp(x)
            assert row[column] == pytest.approx(expected), (id, column)
