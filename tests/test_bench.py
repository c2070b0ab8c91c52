"""Benchmarks compare the same functions, count what they say, and take turns. No time is asserted."""

import random
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import nn

from lab import paths, report
from lab.__main__ import main
from lab.bench import branches, data, finetune, masked, runner, stopwatch, train
from lab.claims.ledger import ledger, ledger_hashes
from vitlib.errors import UsageError
from vitlib.model import ViT, vit_config
from vitlib.train.finetune import STRATEGIES
from vitlib.train.masked import block_masks

torch.set_num_threads(1)
SMALL = {"image_size": 16, "in_chans": 1, "num_classes": 10}


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("VITLIB_OUTPUTS", str(tmp_path))
    return tmp_path


# ---- the stopwatch


def test_arms_take_turns_with_a_fresh_input_each_time():
    calls = []

    def arm(name):
        made = iter(range(100))
        return stopwatch.Arm(lambda: next(made), lambda given: calls.append((name, given)))

    timings = stopwatch.take_turns({"a": arm("a"), "b": arm("b")}, seconds=0.0)
    turns = stopwatch.REPEATS[0]  # no time: as few as are allowed
    assert [len(t.seconds) for t in timings.values()] == [turns, turns]
    after = calls[2 * stopwatch.WARM_UP :]
    assert after == [(name, stopwatch.WARM_UP + i) for i in range(turns) for name in "ab"]


def test_counts_of_a_linear_layer_are_those_by_hand():
    layer, x = nn.Linear(30, 7), torch.randn(5, 30)
    with torch.no_grad():
        assert stopwatch.count(lambda: layer(x)) == (5 * 30 * 7, 4 * (5 * 30 + 30 * 7 + 7 + 5 * 7))
        assert stopwatch.count(lambda: x.t().view(30, 5)[:3]) == (0, 0)  # views move nothing
    x.requires_grad_()
    forward_and_backward = stopwatch.count(lambda: layer(x).sum().backward())
    assert forward_and_backward.macs == 3 * 5 * 30 * 7


def test_attention_counts_the_same_on_a_cpu_and_without_values():
    config = vit_config("W64-2x2/4", layer_scale=0.1, **SMALL)
    counts = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            model, images = ViT(config).train(), torch.zeros(3, 1, 16, 16)
        step = lambda m=model, x=images: m(x).square().sum().backward()  # noqa: E731
        counts.append(stopwatch.count(step, on_meta=device == "meta"))
    assert counts[0].macs == counts[1].macs
    assert counts[0].bytes == pytest.approx(counts[1].bytes, rel=0.02)


def test_ceilings_are_what_a_product_and_a_copy_reach():
    top = stopwatch.ceilings("cpu")
    assert 1e9 < top.macs < 1e14 and 1e8 < top.bytes < 1e13


# ---- the arms are the same function


def test_every_arm_of_branches_gives_the_same_logits():
    model = ViT(vit_config("W64-2x3/4", layer_scale=0.3, **SMALL)).eval()
    images = torch.randn(2, 1, 16, 16)
    expected = model(images)
    for name in branches.ARMS:
        torch.testing.assert_close(branches._arm(model, name)(images), expected, rtol=0, atol=1e-5)


def test_skipped_tokens_are_all_that_ours_multiplies_less_than_timm():
    config = vit_config("W64-3x2/4", **SMALL)
    shape = (1, 1, 16, 16)
    ours, timm = (branches._counts(config, name, "eager", shape)[0] for name in ("seq", "timm"))
    width, tokens, pairs = 64, 17, 2  # pairs of the last layer
    unread = pairs * (tokens - 1) * (10 * width**2 + 2 * tokens * width)
    assert timm - ours == unread
    assert (
        branches._counts(config, "par", "eager", shape)[0]
        == branches._counts(config, "fused", "eager", shape)[0]
        == ours
    )


@pytest.mark.parametrize("pos", ["patches", "relative"])
def test_our_gains_leave_the_masked_loss_as_it_is(pos):
    config = vit_config("W32-2x1/4", pool="mean", pos=pos, **SMALL)
    names = masked._arms(config)
    assert ("+ relative" in names) == (pos == "relative")
    torch.manual_seed(0)
    pixels = torch.randn(masked.IMAGES, 1, 16, 16)
    mask = torch.from_numpy(block_masks(0, 0, np.arange(8), 4, 6))
    losses = []
    for gains in names.values():
        targets = masked._Tokens(pixels, 4, 16, "tokens" in gains)
        batch = type("Batch", (), {"images": pixels[:8], "index": np.arange(8), "flipped": torch.zeros(8, dtype=bool)})
        model = masked._Model(config, 16, seed=3)
        model.gains = gains
        with masked.AttentionAs("explicit") if "attention" not in gains else masked.nullcontext():
            losses.append(targets.loss(model(batch.images, mask), targets(batch)[mask]).item())
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)


def test_a_mask_made_image_by_image_has_the_exact_count_and_is_made_of_blocks():
    draw = random.Random(0)
    for grid, count in ((4, 6), (14, 75)):
        masks = [masked.image_mask(draw, grid, count) for _ in range(200)]
        assert {int(m.sum()) for m in masks} == {count}
        together = np.mean([(m[1:] == m[:-1]).mean() for m in masks])
        assert together > 1 - 2 * (count / grid**2) * (1 - count / grid**2)


def test_the_steps_of_a_kind_of_run_train_what_the_run_trains():
    kinds = data._kinds("smoke")
    assert {kind: (spec.protocol, spec.strategy) for kind, spec in kinds.items()} == {
        "supervised": ("supervised", "full"), "fine-tuning": ("finetune", "attn"),
        "masked": ("masked", "full"), "few labels": ("supervised", "full"),
    }  # fmt: skip
    readings = data.measure({"profile": "smoke", "kind": "masked"}, "cpu", torch.float32)
    assert readings["step"].macs > 0 and readings["batch"].macs == 0


def test_the_plain_loop_and_ours_do_the_same_number_of_steps_a_window():
    spec = train._spec("smoke")
    assert train._regrouped(spec, "3x4").model.pairs == spec.model.pairs == 12
    worker = train._Worker(
        {"model": train.asdict(spec.model), "data": spec.data, "batch": 16, "loop": "plain", "steps": 2, "loaders": 0},
        dict(train.os.environ),
    )
    with worker:
        for _ in range(2):
            worker.go()
            worker.done()
    with (
        train._Worker({"loop": "none"}, dict(train.os.environ)) as broken,
        pytest.raises(RuntimeError, match="ended early"),
    ):
        broken.go()
        broken.done()


# ---- the runner


def rows(case="c", ratio=(1.0, 2.0), **more):
    base = {"time_s": 1.0, "gmacs": 1.0, "gbytes": 1.0, "of_matmul": 0.5, "of_copy": 0.5, "device": "d", "threads": 1.0}
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
    assert [line["ratio"] for line in lines] == ["1", "2.5"]
    assert lines[1]["range (n restarts)"] == "2 to 4 (n=3)" and lines[1]["over"] == "a"
    assert "over timm" not in lines[0]
    assert "2.5" in runner.text(lines).splitlines()[3]


def test_a_ratio_is_taken_within_each_turn():
    slow_phase = [1.0, 10.0, 1.0]
    reference, other = runner.Reading(slow_phase, 0, 0), runner.Reading([s / 2 for s in slow_phase], 0, 0)
    assert runner._ratio(reference, other) == 2.0


def test_a_run_keeps_the_rows_of_other_cases_and_drops_cases_that_are_gone(outputs, monkeypatch):
    path = outputs / "smoke" / "bench" / "data.csv"
    names = [case.name for case in data.cases("smoke", "cpu")]
    runner.write(path, [*rows(case=names[0]), *rows(case=names[1]), *rows(case="of an older version")])
    monkeypatch.setattr(runner, "_restart", lambda name, case, device: rows(case=case.name, ratio=(1.0, 3.0)))
    runner.run("data", "smoke", "cpu", restarts=1, only=names[1])
    found = {(row["case"], row["ratio"]) for row in runner.read(path) if row["arm"] == "b"}
    assert found == {(names[0], 2.0), (names[1], 3.0)}


def test_a_restart_is_a_process_that_gives_a_row_an_arm(outputs):
    case = next(case for case in data.cases("smoke", "cpu") if "few labels" in case.name)
    found = runner.run("data", "smoke", "cpu", restarts=1, only=case.name)
    assert [row["arm"] for row in found] == ["batch", "step"] and found[0]["ratio"] == 1
    assert found[1]["time_s"] > 0 and found[1]["gmacs"] > 0 and found[0]["case"] == case.name
    printed = runner.report("data", "smoke", found)
    assert case.name in printed and printed.count("not run: ") == 3


def test_every_case_has_a_name_of_its_own_and_its_reference_among_the_arms():
    for name in runner.BENCHES:
        module = runner.importlib.import_module(f"lab.bench.{name}")
        for device in runner.DEVICES:
            every = module.cases("cpu", device)
            assert len({case.name for case in every}) == len(every)
    grid = {case.name.rsplit(", ", 1)[1] for case in branches.cases("cpu", "cuda")}
    assert grid == {*branches.MODES, "training"}
    assert {c.not_run for c in branches.cases("cpu", "cpu") if "graph" in c.name} == {"CUDA graphs need a GPU"}


def timed(case, arms, restarts=5, seconds=None, **columns):
    """Stored rows as a benchmark writes them."""
    seconds = seconds or {}
    return [
        {"case": case, "arm": arm, "restart": r, "time_s": seconds.get(arm, 1.0) * (1 + r / 1000), "device": "a device",
         "kind": "cpu", **columns}
        for r in range(restarts) for arm in arms
    ]  # fmt: skip


def test_f3_is_judged_only_on_times_of_its_own_run_and_ledger_entry(outputs):
    case = finetune.cases("cpu", "cpu")[0]
    good = {"run": case.task["run"], "part": finetune.PART, "ledger": ledger_hashes()[finetune.PART]}

    def stored(restarts=5, **other):
        runner.write(runner.path_of("finetune", "cpu"), timed(case.name, finetune.STRATEGIES, restarts, **good | other))
        return finetune.stored("cpu")

    assert len(stored()) == 5 * len(finetune.STRATEGIES)
    assert stored(run="another") == stored(ledger="older") == stored(part="") == stored(restarts=4) == []


def test_f3_is_timed_on_as_many_images_as_a_run_has_at_once_and_on_two_of_the_papers_size_without_a_gpu():
    named = {
        (profile, device): [case.name for case in finetune.cases(profile, device) if "only" not in case.task]
        for profile in ("study", "imagenet") for device in ("cpu", "cuda")
    }  # fmt: skip
    b12 = "B12x1/16 at 384 px, batch"
    assert named["imagenet", "cpu"] == [f"{b12} 2"]
    assert named["imagenet", "cuda"] == [f"{b12} 128", f"{b12} 64"]  # 512 in 4 parts
    for device, large in (("cpu", 2), ("cuda", 64)):
        own, other = named["study", device]
        assert own.endswith("at 20 px, batch 64") and other == f"{b12} {large}"
    case = finetune.cases("imagenet", "cpu")[0]
    assert (case.part, case.task["batch"], case.task["model"]["image_size"]) == (finetune.PART, 2, 384)


def test_p7_is_judged_on_a_gpus_rows_alone(outputs):
    case = next(case for case in branches.cases("cpu", "cuda") if case.part == "P7-S2")

    def word(kind, par):
        columns = {"part": case.part, "ledger": ledger_hashes()[case.part], "kind": kind}
        runner.write(
            runner.path_of("branches", "cpu"), timed(case.name, ("seq", "par"), seconds={"par": par}, **columns)
        )
        return next(v for v in report.verdicts("cpu", "36") if v.part.id == case.part).word

    assert case.restarts == 5 and (case.reference, case.part) == ("seq", "P7-S2")
    assert word("cuda", par=0.7) == "same direction" and word("cuda", par=1.4) == "opposite direction"
    assert word("cpu", par=0.7) == "not run"


def test_every_part_that_is_timed_has_a_case_with_its_arms_and_restarts():
    parts = {part.id: part for part in ledger().values() if part.kind == "ratio"}
    every = [*finetune.cases("cpu", "cpu"), *branches.cases("cpu", "cuda")]
    cases = {case.part: case for case in every if case.part}
    assert cases.keys() == parts.keys()
    assert all(cases[name].restarts == part.n == 5 for name, part in parts.items())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["bench", "brunches"], "unknown benchmark 'brunches': allowed are branches, finetune, masked, train, data"),
        (["bench", "data", "--device", "tpu"], "unknown device 'tpu'"),
        (["bench", "data", "--only", "nothing"], "no case of data contains 'nothing'"),
        (["bench", "data", "--restarts", "-1"], "restarts is -1"),
        (["bench", "data", "--profile", "huge"], "unknown profile 'huge'"),
    ],
)
def test_a_wrong_word_is_one_sentence(words, says, capsys, outputs):
    assert main(words) == 2
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_at_once(capsys, outputs):
    assert main(["bench", "branches", "--device", "cuda"]) == 2
    assert "PyTorch finds no GPU here" in capsys.readouterr().err


def test_a_restart_that_fails_says_which_case():
    broken = runner.Case("broken", {"profile": "smoke", "kind": "none"}, "batch", 1, threads=1)
    with pytest.raises(UsageError, match="the process for broken failed: KeyError"):
        runner._restart("data", broken, "cpu")


def test_on_a_gpu_each_strategys_peak_memory_has_a_process_of_its_own():
    alone = [case for case in finetune.cases("smoke", "cuda") if "only" in case.task]
    assert [case.task["only"] for case in alone] == [case.reference for case in alone] == list(finetune.STRATEGIES)
    small = finetune.cases("smoke", "cpu")[0]
    readings = finetune.measure(small.task | {"only": "attn", "batch": 2}, "cpu", torch.float32)
    assert list(readings) == ["attn"] and readings["attn"].more["peak_mb"] == 0  # a CPU tells no peak


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
    modules = ", ".join(f"lab.bench.{name}" for name in ("runner", *runner.BENCHES))
    code = f"import sys\nsys.modules.update(dict.fromkeys({blocked}))\nimport {modules}"
    done = subprocess.run([sys.executable, "-c", code], cwd=paths.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("mode", "dtype", "arms"),
    [
        ("eager", torch.float32, {"seq", "par", "fused", "timm"}),
        ("training", torch.float32, {"seq", "par", "timm"}),
        ("training", torch.bfloat16, {"seq", "par", "timm"}),  # autocast, as on a GPU
    ],
)
def test_a_case_of_branches_times_and_counts_every_arm_that_this_device_has(mode, dtype, arms, monkeypatch):
    monkeypatch.setattr(stopwatch, "REPEATS", (3, 3))
    task = {"model": asdict(vit_config("W32-2x2/4", **SMALL)), "batch": 2, "mode": mode}
    readings = branches.measure(task, "cpu", dtype)
    assert readings.keys() == arms
    assert all(len(r.seconds) == 3 and r.macs > 0 and r.bytes > 0 for r in readings.values())


def test_a_step_of_each_strategy_is_timed_with_the_optimizer_of_its_own_recipe():
    config = vit_config("W32-2x1/4", image_size=16, in_chans=1, num_classes=10)
    task = {"model": asdict(config), "batch": 2, "execution": "seq", "run": ""}
    found = finetune.measure(task, "cpu", torch.float32)
    assert set(found) == set(STRATEGIES)
    assert all(reading.seconds and reading.more["mem_mb"] > 0 for reading in found.values())
