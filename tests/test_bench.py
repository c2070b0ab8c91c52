"""Benchmarks compare the same functions, count what they say, and take turns. No time is asserted."""

import os
import random
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import data, masked, train
from lab import paths
from lab.__main__ import main
from lab.bench import cases, runner
from lab.bench.runner import Arm, Case, Reading
from lab.claims.ledger import ledger
from lab.cost import count
from lab.experiments.profiles import PROFILES
from lab.report import tables
from vitlib.errors import UsageError
from vitlib.model import ViT, vit_config
from vitlib.train.finetune import PAPER_STRATEGIES
from vitlib.train.masked import block_masks

torch.set_num_threads(1)
SMALL = {"image_size": 16, "in_chans": 1, "num_classes": 10}


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("VITLIB_OUTPUTS", str(tmp_path))
    return tmp_path


# ---- times and counts


def test_arms_take_turns_with_a_fresh_input_each_time():
    calls = []

    def arm(name):
        made = iter(range(100))
        return Arm(lambda: next(made), lambda given: calls.append((name, given)))

    seconds = runner.take_turns({"a": arm("a"), "b": arm("b")}, seconds=0.0)
    turns = runner.REPEATS[0]  # no time: as few as are allowed
    assert [len(taken) for taken in seconds.values()] == [turns, turns]
    after = calls[2 * runner.WARM_UP :]
    assert after == [(name, runner.WARM_UP + i) for i in range(turns) for name in "ab"]


def test_counts_of_a_linear_layer_are_those_by_hand():
    layer, x = nn.Linear(30, 7), torch.randn(5, 30)
    with torch.no_grad():
        assert count.counted(lambda: layer(x)) == 5 * 30 * 7
    x.requires_grad_()
    assert count.counted(lambda: layer(x).sum().backward()) == 3 * 5 * 30 * 7


def test_attention_counts_the_same_on_a_cpu_and_without_values():
    config = vit_config("W64-2x2/4", layer_scale=0.1, **SMALL)
    counts = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            model, images = ViT(config).train(), torch.zeros(3, 1, 16, 16)
        with count.AttentionAs("fused") if device == "meta" else nullcontext():
            counts.append(count.counted(lambda m=model, x=images: m(x).square().sum().backward()))
    assert counts[0] == counts[1] > 0


# ---- the arms are the same function


def test_every_arm_of_branches_gives_the_same_logits():
    model = ViT(vit_config("W64-2x3/4", layer_scale=0.3, **SMALL)).eval()
    images = torch.randn(2, 1, 16, 16)
    expected = model(images)
    for name in cases.EXECUTIONS:
        torch.testing.assert_close(cases.arm_of(model, name)(images), expected, rtol=0, atol=1e-5)


def task(name, mode, arms, batch=1, **fields):
    return {"model": vit_config(name, **SMALL | fields), "batch": batch, "mode": mode, "arms": arms}


INFERENCE = {name: (name, "") for name in cases.EXECUTIONS}


def counts(task):
    return {name: reading.macs for name, reading in cases.time_arms(task, "cpu", torch.float32).items()}


def test_skipped_tokens_are_all_that_ours_multiplies_less_than_timm():
    found = counts(task("W64-3x2/4", "eager", INFERENCE))
    width, tokens, pairs = 64, 17, 2  # pairs of the last layer
    unread = pairs * (tokens - 1) * (10 * width**2 + 2 * tokens * width)
    assert found["timm"] - found["seq"] == unread
    assert found["par"] == found["fused"] == found["seq"]


def test_par_multiplies_as_often_as_seq_in_a_training_step():
    arms = {"seq": ("seq", ""), "par": ("par", "")}
    found = counts(task("W64-2x2/4", "training", arms, layer_scale=1e-4))
    assert found["par"] == found["seq"] > 0


@pytest.mark.parametrize(("bench", "number"), [("branches", 58), ("finetune", 2)])
def test_ratios_of_every_case_for_a_gpu_are_to_one_of_its_arms(bench, number):
    every = cases.BENCHES[bench].cases(PROFILES["study"], "cuda")
    assert len(every) == number and all(case.reference in case.task["arms"] for case in every)


@pytest.mark.parametrize("pos", ["patches", "relative"])
def test_our_optimizations_leave_the_masked_loss_as_it_is(pos):
    config = vit_config("W32-2x1/4", pool="mean", pos=pos, **SMALL)
    names = masked._arms(config)
    assert ("+ relative" in names) == (pos == "relative")
    torch.manual_seed(0)
    pixels = torch.randn(masked.IMAGES, 1, 16, 16)
    mask = torch.from_numpy(block_masks(0, 0, np.arange(8), 4, 6))
    losses = []
    for optimizations in names.values():
        targets = masked._Tokens(pixels, 4, 16, "tokens" in optimizations)
        batch = type("Batch", (), {"images": pixels[:8], "index": np.arange(8), "flipped": torch.zeros(8, dtype=bool)})
        model = masked._Model(config, 16, seed=3)
        model.optimizations = optimizations
        with masked.AttentionAs("explicit") if "attention" not in optimizations else masked.nullcontext():
            losses.append(targets.loss(model(batch.images, mask), targets(batch)[mask]).item())
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)


def test_a_mask_made_image_by_image_has_the_exact_count_and_is_made_of_blocks():
    draw = random.Random(0)
    for grid, number in ((4, 6), (14, 75)):
        masks = [masked.image_mask(draw, grid, number) for _ in range(200)]
        assert {int(m.sum()) for m in masks} == {number}
        together = np.mean([(m[1:] == m[:-1]).mean() for m in masks])
        assert together > 1 - 2 * (number / grid**2) * (1 - number / grid**2)


def test_the_steps_of_a_kind_of_run_train_what_the_run_trains():
    kinds = data.kinds(PROFILES["smoke"])
    assert {kind: (spec.protocol, spec.strategy) for kind, spec in kinds.items()} == {
        "supervised": ("supervised", "full"), "fine-tuning": ("finetune", "attn"),
        "masked": ("masked", "full"), "stem": ("supervised", "full"),
    }  # fmt: skip
    readings = data.measure({"spec": kinds["masked"]}, "cpu", torch.float32)
    assert readings["step"].macs > 0 and readings["batch"].macs == 0


def test_the_plain_loop_and_ours_do_the_same_number_of_steps_a_window():
    case = train.cases(PROFILES["smoke"], "cpu")[0]
    spec = case.task["spec"]
    assert train.regrouped(spec, "3x4").model.pairs == spec.model.pairs == 12
    order = {"spec": spec, "loop": "plain", "steps": 2, "loaders": 0}
    worker = train.Worker(order, dict(os.environ))
    with worker:
        for _ in range(2):
            worker.go()
            worker.done()
    with (
        train.Worker({"loop": "none"}, dict(os.environ)) as broken,
        pytest.raises(RuntimeError, match="ended early"),
    ):
        broken.go()
        broken.done()


# ---- the runner


def rows(case="c", ratio=(1.0, 2.0), **more):
    base = {"time_s": 1.0, "gmacs": 1.0, "device": "d", "threads": 1.0}
    base |= {"ledger": "5e12000000000000"}  # a text that looks like a number
    return [
        {"case": case, "arm": arm, "ratio": r, "restart": 0, "precision": "float32", **base, **more}
        for arm, r in zip("ab", ratio, strict=True)
    ]


def test_rows_come_back_from_the_file_as_they_were_written(tmp_path):
    runner.write(tmp_path / "x.csv", rows(more=3.5))
    assert runner.read(tmp_path / "x.csv") == rows(more=3.5) and runner.read(tmp_path / "none.csv") == []


def test_the_table_has_medians_and_ranges_over_restarts():
    lines = runner.summary([*rows(), *rows(ratio=(1.0, 4.0)), *rows(ratio=(1.0, 2.5))])
    assert list(lines["ratio"]) == [1, 2.5] and list(lines["over"]) == ["a", "a"]
    assert tuple(lines.loc[1, ["low", "high", "n"]]) == (2, 4, 3)
    assert "over_timm" not in lines


def test_a_ratio_is_taken_within_each_turn():
    slow_phase = [1.0, 10.0, 1.0]
    reference, other = Reading(slow_phase), Reading([s / 2 for s in slow_phase])
    assert runner.ratio(reference, other) == 2.0


def test_a_run_keeps_the_rows_of_other_cases_and_drops_cases_that_are_gone(outputs, monkeypatch):
    path = outputs / "smoke" / "bench" / "data.csv"
    bench = runner.Bench("data", data.cases)
    names = [case.name for case in data.cases(PROFILES["smoke"], "cpu")]
    runner.write(path, [*rows(case=names[0]), *rows(case=names[1]), *rows(case="of an older version")])
    monkeypatch.setattr(runner, "restarted", lambda case, device, stamp: rows(case=case.name, ratio=(1.0, 3.0)))
    runner.run(bench, PROFILES["smoke"], "cpu", restarts=1, only=names[1])
    found = {(row["case"], row["ratio"]) for row in runner.read(path) if row["arm"] == "b"}
    assert found == {(names[0], 2.0), (names[1], 3.0)}


def test_a_restart_is_a_process_that_gives_a_row_an_arm(outputs):
    bench, smoke = runner.Bench("data", data.cases), PROFILES["smoke"]
    case = next(case for case in data.cases(smoke, "cpu") if case.name.startswith("stem"))
    found = runner.run(bench, smoke, "cpu", restarts=1, only=case.name)
    assert [row["arm"] for row in found] == ["batch", "step"] and found[0]["ratio"] == 1
    assert found[1]["time_s"] > 0 and found[1]["gmacs"] > 0 and found[0]["case"] == case.name
    printed = runner.report(bench, smoke, found)
    assert case.name in printed and printed.count("not run: ") == 3


def test_every_case_has_a_name_of_its_own():
    for cases_of in (data.cases, masked.cases, train.cases, cases.branches, cases.finetune):
        for device in ("cpu", "cuda"):
            every = cases_of(PROFILES["cpu"], device)
            assert len({case.name for case in every}) == len(every)
    grid = {case.name.rsplit(", ", 1)[1] for case in cases.branches(PROFILES["cpu"], "cuda")}
    assert grid == {"eager", *cases.BACKENDS, "training"}
    assert not any("graph" in case.name for case in cases.branches(PROFILES["cpu"], "cpu"))


def timed(case, arms, restarts=5, seconds=None, **columns):
    """Stored rows as a benchmark writes them."""
    seconds = seconds or {}
    return [
        {"case": case, "arm": arm, "restart": r, "time_s": seconds.get(arm, 1.0) * (1 + r / 1000), "device": "a device",
         "kind": "cpu", **columns}
        for r in range(restarts) for arm in arms
    ]  # fmt: skip


def test_f3_is_judged_only_on_times_of_its_own_run_and_ledger_entry(outputs):
    case, part = cases.finetune(PROFILES["cpu"], "cpu")[0], ledger().part(cases.F3)
    good = {"run": case.run, "part": part.id, "ledger": ledger().hash(part, "cpu")}

    def stored(restarts=5, **other):
        runner.write(
            runner.path_of("finetune", PROFILES["cpu"]), timed(case.name, PAPER_STRATEGIES, restarts, **good | other)
        )
        return cases.evidence(PROFILES["cpu"], part, good["ledger"])

    assert len(stored()) == 5 * len(PAPER_STRATEGIES)
    assert stored(run="another") == stored(ledger="older") == stored(part="") == stored(restarts=4) == []


def test_f3_is_timed_on_as_many_images_as_a_run_has_at_once_and_on_two_of_the_papers_size_without_a_gpu():
    named = {
        (profile, device): [case.name for case in cases.finetune(PROFILES[profile], device)]
        for profile in ("study", "imagenet") for device in ("cpu", "cuda")
    }  # fmt: skip
    b12 = "B12x1/16 at 384 px, batch"
    assert named["imagenet", "cpu"] == [f"{b12} 2"]
    assert named["imagenet", "cuda"] == [f"{b12} 128", f"{b12} 64"]  # 512 in 4 parts
    for device, large in (("cpu", 2), ("cuda", 64)):
        own, other = named["study", device]
        assert own.endswith("at 20 px, batch 64") and other == f"{b12} {large}"
    case = cases.finetune(PROFILES["imagenet"], "cpu")[0]
    assert (case.part, case.task["batch"], case.task["model"].image_size) == (cases.F3, 2, 384)


def test_p7_is_judged_on_a_gpus_rows_alone(outputs):
    case = next(case for case in cases.branches(PROFILES["cpu"], "cuda") if case.part == "P7-S2")
    stamp = ledger().hash(ledger().part(case.part), "cpu")

    def word(kind, par):
        columns = {"part": case.part, "ledger": stamp, "kind": kind}
        runner.write(
            runner.path_of("branches", PROFILES["cpu"]),
            timed(case.name, ("seq", "par"), seconds={"par": par}, **columns),
        )
        return next(v for v in tables.judged(PROFILES["cpu"], "36") if v.part.id == case.part)

    assert case.restarts == 5 and (case.reference, case.part) == ("seq", "P7-S2")
    judged = word("cuda", par=0.7)
    assert (judged.profile, judged.estimate.mean > 0) == ("cpu", True) and word("cuda", par=1.4).estimate.mean < 0
    assert word("cpu", par=0.7).label == "not run"


def test_every_part_that_is_timed_has_a_case_with_its_arms_and_restarts():
    parts = {part.id: part for part in ledger().parts.values() if part.kind == "ratio"}
    every = [*cases.finetune(PROFILES["cpu"], "cpu"), *cases.branches(PROFILES["cpu"], "cuda")]
    timed = {case.part: case for case in every if case.part}
    assert timed.keys() == parts.keys()
    assert all(timed[name].restarts == 5 and {*part.n.values()} == {5} for name, part in parts.items())
    assert all(part.contrast.keys() <= timed[name].task["arms"].keys() for name, part in parts.items())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["bench", "brunches"], "unknown benchmark 'brunches': allowed are branches, finetune"),
        (["bench", "finetune", "--device", "tpu"], "unknown device 'tpu'"),
        (["bench", "finetune", "--only", "nothing"], "no case of finetune contains 'nothing'"),
        (["bench", "finetune", "--restarts", "-1"], "--restarts: '-1' given"),
        (["bench", "finetune", "--profile", "huge"], "unknown profile 'huge'"),
    ],
)
def test_a_wrong_word_is_one_sentence(words, says, capsys, outputs):
    assert main(words) == 2
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_at_once(capsys, outputs):
    assert main(["bench", "branches", "--device", "cuda"]) == 2
    assert "device 'cuda' needs a GPU" in capsys.readouterr().err


def test_damaged_rows_are_one_sentence(tmp_path):
    (tmp_path / "branches.csv").write_text("case,time_s\na,fast\n")
    with pytest.raises(UsageError, match=r"branches\.csv is damaged and cannot be read"):
        runner.read(tmp_path / "branches.csv")


def test_a_restart_that_fails_says_which_case():
    broken = Case("broken", "benchmarks.data:measure", {}, "batch", 1, threads=1)
    with pytest.raises(UsageError, match="the process for broken failed: KeyError"):
        runner.restarted(broken, "cpu")


def test_benchmarks_import_where_only_torch_and_timm_are():
    blocked = (
        "pandas",
        "scipy",
        "seaborn",
        "matplotlib",
        "papermill",
        "datasets",
        "statsmodels",
        "IPython",
        "nbformat",
    )
    modules = "lab.bench.runner, lab.bench.cases, benchmarks.train, benchmarks.masked, benchmarks.data"
    code = f"import sys\nsys.modules.update(dict.fromkeys({blocked}))\nimport {modules}"
    done = subprocess.run([sys.executable, "-c", code], cwd=paths.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("mode", "dtype", "arms"),
    [
        ("eager", torch.float32, {"seq", "par", "fused", "timm"}),
        ("graph", torch.float32, {"seq", "par", "fused", "timm"}),  # on a CPU as it is
        ("training", torch.float32, {"seq", "par", "timm"}),
        ("training", torch.bfloat16, {"seq", "par", "timm"}),  # autocast, as on a GPU
    ],
)
def test_a_case_of_branches_times_and_counts_every_arm_that_this_device_has(mode, dtype, arms, monkeypatch):
    monkeypatch.setattr(runner, "REPEATS", (3, 3))
    case = next(c for c in cases.branches(PROFILES["cpu"], "cuda") if c.name.endswith(mode))
    readings = cases.time_arms(task("W32-2x2/4", mode, case.task["arms"], 2), "cpu", dtype)
    assert readings.keys() == arms
    assert all(len(r.seconds) == 3 and r.macs > 0 for r in readings.values())


def test_a_step_of_each_strategy_is_timed_and_its_memory_counted(monkeypatch):
    monkeypatch.setattr(runner, "REPEATS", (3, 3))
    arms = cases.finetune(PROFILES["smoke"], "cpu")[0].task["arms"]
    found = cases.time_arms(task("W32-2x1/4", "training", arms, 2), "cpu", torch.float32)
    assert set(found) == set(PAPER_STRATEGIES)
    assert all(reading.seconds and reading.more["mem_mb"] > 0 for reading in found.values())
