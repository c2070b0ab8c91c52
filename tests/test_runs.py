"""The run store, the launcher, the plan: nothing half-written, nothing trained twice, nothing lost."""

import json
import math
import multiprocessing
import os
import pickle
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lab import paths
from lab.__main__ import main
from lab.cost import plan
from lab.data import cards
from lab.data.cards import card, load_resized
from lab.experiments import small
from lab.experiments.catalogue import arms_of
from lab.experiments.profiles import profile
from lab.runs import execute, launch, processes, results, store
from lab.runs import spec as specs
from lab.runs.results import Result
from lab.runs.spec import RunSpec
from tools import kill
from vitlib import files
from vitlib.data import Augment
from vitlib.errors import UsageError
from vitlib.model import ViT, vit_config
from vitlib.train import loop
from vitlib.train.dvae import DVAEConfig
from vitlib.train.recipe import Recipe

torch.set_num_threads(1)
MODEL = vit_config("W32-1x1/4", image_size=16, in_chans=1, num_classes=10)
TINY = RunSpec("supervised", MODEL, "digits", Recipe(epochs=1, batch_size=10, lr=1e-3), seed=1000, images=50)
TOKENIZER = replace(TINY, protocol="tokenizer", model=DVAEConfig(16, 4, 1, vocabulary=16, width=8))
MASKED = replace(TINY, protocol="masked", targets="dvae", tokenizer=TOKENIZER, masked=6)
TUNED = replace(TINY, protocol="finetune", parent=TINY, strategy="attn", model=replace(MODEL, image_size=20))


@pytest.fixture(autouse=True)
def run_store(monkeypatch, tmp_path):
    monkeypatch.setenv("VITLIB_RUNS", str(tmp_path / "runs"))
    plan._measured.cache_clear()
    return tmp_path / "runs"


def trained(monkeypatch) -> list[str]:
    """Every run that is trained from now on, by its seed and protocol."""
    seen, train = [], loop.train

    def spy(model, recipe, data, rows, seed, *rest):
        seen.append(f"{seed}:{data.images.shape[-1]}")
        return train(model, recipe, data, rows, seed, *rest)

    monkeypatch.setattr(loop, "train", spy)
    return seen


# ---- specs


def test_the_hash_changes_with_every_field_and_with_the_parent():
    changed = {
        "protocol": replace(TINY, protocol="masked"), "model": replace(TINY, model=replace(MODEL, layer_scale=0.1)),
        "recipe": replace(TINY, recipe=replace(TINY.recipe, lr=2e-3)), "seed": replace(TINY, seed=1001),
        "images": replace(TINY, images=100), "parent": TUNED, "strategy": replace(TINY, strategy="ffn"),
        "subset": replace(TINY, subset=1), "blank": replace(TINY, blank=True),
        "targets": replace(TINY, targets="pixels"), "masked": replace(TINY, masked=3),
        "threads": replace(TINY, threads=2), "tokenizer": MASKED, "accumulate": replace(TINY, accumulate=2),
        "compile": replace(TINY, compile=True),
        "checkpointing": replace(TINY, checkpointing=True), "streamed": replace(TINY, data="cifar-10", streamed=True),
    }  # fmt: skip
    others = {"data", "precision", "execution", "device", "weights"}  # the last: test_pretrained.py
    assert set(changed) == {f.name for f in fields(RunSpec)} - others
    assert {"data", "data_checksum", "precision", "execution", "device", "training_version"} < set(TINY.record())
    hashes = {spec.hash for spec in changed.values()} | {TINY.hash}
    assert len(hashes) == len(changed) + 1
    assert replace(TUNED, parent=replace(TINY, images=100)).hash != TUNED.hash
    assert replace(MASKED, tokenizer=replace(TOKENIZER, images=100)).hash != MASKED.hash
    assert replace(TINY, recipe=replace(TINY.recipe, layer_decay=0.8)).hash != TINY.hash


def test_the_record_writes_every_field_of_a_run_its_model_and_its_recipe():
    for spec in (TINY, TOKENIZER, MASKED, TUNED):
        record = spec.record()
        every = {f.name for f in fields(RunSpec)} | {"data_checksum", "training_version"}
        assert set(record) == every - {"weights"}  # left out where it is not set: older runs keep their hashes
        for part in ("model", "recipe"):
            assert set(record[part]) == {f.name for f in fields(getattr(spec, part))}
    assert MASKED.record()["tokenizer"] == TOKENIZER.hash and TUNED.record()["parent"] == TINY.hash


@pytest.mark.parametrize(
    ("change", "equal"),
    [
        (lambda one: {"recipe": replace(TINY.recipe, lr=one, clip=one, warmup=0, betas=(0, 0.9))}, (1, 1.0)),
        (lambda one: {"recipe": replace(TINY.recipe, betas=(0.5 * one, one / 2), mixup=one)}, (1, 1.0)),
        (lambda one: {"model": replace(MODEL, layer_scale=one, head_scale=one, drop_path=one - 1)}, (1, 1.0)),
        (lambda one: {"recipe": replace(TINY.recipe, augment=Augment(crop_scale=(0.5, one), test_crop=one))}, (1, 1.0)),
        (lambda zero: {"recipe": replace(TINY.recipe, weight_decay=zero, mixup=zero)}, (0, 0.0)),
    ],
)
def test_equal_numbers_are_one_run(change, equal):
    first, second = (replace(TINY, **change(number)) for number in equal)
    assert first == second and first.hash == second.hash
    one, other = (replace(TOKENIZER.model, kl_weight=w, temperature=(1, w)) for w in (1, 1.0))
    assert replace(TOKENIZER, model=one).hash == replace(TOKENIZER, model=other).hash


WRONG = {
    "seed": (-1, 1.0, "1", None, True), "subset": (-1, 0.5), "masked": (-1, 2.0), "threads": (0, "1"),
    "streamed": (1, None), "blank": ("yes",), "compile": (0,), "checkpointing": (1.0,), "accumulate": (0, 1.5, 11, "2"),
    "protocol": ("superviced", None, 5), "strategy": ("atn", ["attn"]), "device": ("gpu", 0), "precision": (16,),
    "execution": ("parallel",), "targets": ("pixel", None),
}  # fmt: skip


@pytest.mark.parametrize("field", WRONG)
def test_a_field_of_a_run_that_cannot_be_is_one_sentence(field):
    for value in WRONG[field]:
        with pytest.raises(UsageError, match=rf"{field}.*allowed (are|is)|unknown {field}") as error:
            replace(TINY, **{field: value})
        assert "\n" not in str(error.value)


NO_RECIPE = {
    "epochs": (0, -1, 1.5, "3", True, None, math.nan, 10**400), "batch_size": (0, 2.5), "lr": (0, -1, math.nan, math.inf, "1e-3", 10**400),
    "weight_decay": (-0.1, math.nan, None), "betas": ((0.9,), (0.9, 0.99, 0.999), (0.9, 1), (-1, 0), 0.9, ("a", "b"), (math.nan, 0)),
    "min_lr": (-1,), "warmup": (1, -0.1, math.nan), "clip": (0, -1, math.inf), "mixup": (-1, math.nan), "smoothing": (1, -0.1),
    "layer_decay": (0, 1.1), "repeats": (0, 1.5), "ema": (0, 1, math.nan), "flip": (1, None), "loss": ("bec", None), "optimizer": ("adam",),
}  # fmt: skip


@pytest.mark.parametrize("field", NO_RECIPE)
def test_a_recipe_that_cannot_be_is_one_sentence(field):
    for value in NO_RECIPE[field]:
        with pytest.raises(UsageError, match=rf"^{field} is .*: allowed are|unknown {field} ") as error:
            replace(TINY.recipe, **{field: value})
        assert "\n" not in str(error.value)


NO_AUGMENT = {
    "crop_scale": ((0, 1), (0.5,), 0.5, (1, 0.5), (math.nan, 1), "ab"), "color_jitter": (-1, math.nan, "0"), "erasing": (2, None),
    "test_crop": (0, 1.5, math.inf), "view_size": (0, 1.5), "policy": ("randaug", 5, None), "interpolation": ("cubic", None),
}  # fmt: skip


@pytest.mark.parametrize("field", NO_AUGMENT)
def test_an_augmentation_that_cannot_be_is_one_sentence(field):
    for value in NO_AUGMENT[field]:
        with pytest.raises(UsageError, match=rf"{field}.*allowed"):
            Augment(**{field: value})
    for change in (
        {"vocabulary": 2.5},
        {"temperature": (1, math.nan)},
        {"temperature": 1},
        {"kl_weight": "0"},
        {"width": None},
    ):
        with pytest.raises(UsageError, match=rf"^{next(iter(change))} is .*: allowed (is|are)"):
            replace(TOKENIZER.model, **change)


@pytest.mark.parametrize("images", [0, -5, 2.5, True])
def test_a_run_that_trains_on_nothing_is_refused(images):
    with pytest.raises(UsageError, match=f"images is {images}: allowed"):
        replace(TINY, images=images)
    with pytest.raises(UsageError, match="epochs is 0: allowed are whole numbers from 1"):
        replace(TINY, recipe=replace(TINY.recipe, epochs=0))


@pytest.mark.parametrize(
    ("spec", "change", "said"),
    [
        (MASKED, {"tokenizer": None}, "targets 'dvae' need a tokenizer"),
        (MASKED, {"targets": "pixels"}, "targets 'pixels' have no tokenizer"),
        (
            MASKED,
            {"tokenizer": replace(TOKENIZER, model=replace(TOKENIZER.model, patch_size=8))},
            "gives no token to each",
        ),
        (MASKED, {"tokenizer": TINY}, "gives no token to each"),
        (TOKENIZER, {"model": MODEL}, "a tokenizer run trains no ViTConfig"),
        (TINY, {"model": TOKENIZER.model}, "a supervised run trains no DVAEConfig"),
    ],
)
def test_a_tokenizer_that_cannot_be_is_refused(spec, change, said):
    with pytest.raises(UsageError, match=said):
        replace(spec, **change)


@pytest.mark.parametrize("field", ["precision", "execution", "device"])
def test_what_is_not_built_yet_is_refused_and_not_silently_done_otherwise(field):
    with pytest.raises(UsageError, match=f"unknown {field} 'bfloat16'"):
        replace(TINY, **{field: "bfloat16"})


def test_a_run_of_one_class_or_one_image_says_so(monkeypatch):
    data = load_resized("digits", "train", 16)
    for index in ([0], [0, 0, 0]):
        one = replace(data.take(np.array(index)), labels=torch.zeros(len(index), dtype=torch.int64), classes=("zero",))
        monkeypatch.setattr(execute, "data_of", lambda spec, split, one=one: one)
        said = "trains on one image of one class" if len(index) == 1 else r"trains on one class$"
        with pytest.warns(UserWarning, match=said):
            execute.execute(replace(TINY, images=None, seed=len(index)))


def test_the_hash_holds_the_data_and_the_training_version(monkeypatch):
    before = TINY.hash
    assert replace(TINY).hash == before
    monkeypatch.setattr(specs, "TRAINING_VERSION", specs.TRAINING_VERSION + 1)
    assert replace(TINY).hash != before
    monkeypatch.undo()
    monkeypatch.setattr(specs, "source", lambda *name: SimpleNamespace(checksum="0" * 16))
    assert replace(TINY).hash != before


def test_a_seed_changes_the_trunk_too():
    other = TUNED.with_seed(4)
    assert (other.seed, other.parent.seed) == (4, 4)
    assert [spec.protocol for spec in other.family()] == ["supervised", "finetune"]


def test_a_seed_changes_the_tokenizer_too():
    chain = replace(TINY, protocol="finetune", parent=MASKED).with_seed(4)
    assert [(spec.protocol, spec.seed) for spec in chain.family()] == [("tokenizer", 4), ("masked", 4), ("finetune", 4)]


def test_loaders_share_the_cores_that_a_process_may_use_with_the_others_of_its_run(monkeypatch):
    monkeypatch.setattr(execute.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(processes, "CGROUP", Path("nowhere"))
    for cores, several, expected in ((2, None, 2), (64, None, 8), (16, 4, 4), (4, 8, 1)):
        monkeypatch.setattr(execute.os, "sched_getaffinity", lambda pid, cores=cores: set(range(cores)), raising=False)
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        if several:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(several))
        assert execute.loaders() == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000"}, 2), ({"cpu.max": "max 100000"}, 8), ({"cpu.max": "1000 100000"}, 1), ({}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8), ({"cpu.max": "garbled"}, 8),
    ],
)  # fmt: skip
def test_the_quota_of_a_container_counts(monkeypatch, tmp_path, files, expected):
    monkeypatch.setattr(processes.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(processes, "CGROUP", tmp_path)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert processes.cores() == expected


def test_without_the_module_resource_runs_are_trained_and_their_memory_is_not_measured(monkeypatch):
    for name in ("resource", "fcntl", "termios", "pwd", "grp"):  # Windows has none of them
        monkeypatch.setitem(sys.modules, name, None)
    read = runpy.run_path(execute.__file__)
    assert read["surroundings"]("cpu") == execute.surroundings("cpu") | {"mem_mb": 0}
    runpy.run_path(launch.__file__)


def test_tuning_seeds_see_validation_images_only_and_others_the_test_set():
    assert {TINY.with_seed(s).split for s in (1000, 1001, 5000)} == {"validation"}
    assert {TINY.with_seed(s).split for s in (0, 4, 10, 999)} == {"test"}
    assert len(execute.execute(TINY).correct) == 128 and len(execute.execute(TINY.with_seed(0)).correct) == 640


# ---- the store


def test_a_finished_run_is_read_and_not_trained_again(monkeypatch, run_store):
    seen = trained(monkeypatch)
    first, second = execute.execute(TINY, stamps={"P1": "0123"}), execute.execute(TINY)
    assert seen == ["1000:16"]
    assert first.metrics == second.metrics and np.array_equal(first.correct, second.correct)
    assert sorted(p.name for p in (run_store / TINY.hash).iterdir()) == [
        "history.csv", "result.json", "spec.json", "weights.safetensors",
    ]  # fmt: skip
    record = json.loads((run_store / TINY.hash / "result.json").read_text())
    assert record["ledger"] == {"P1": "0123"} and record["split"] == "validation"
    assert {"wall_s", "cpu_s", "mem_mb", "device", "torch", "python", "commit", "date"} <= set(record)
    assert 100 * first.correct.mean() == pytest.approx(first.metrics["top1"])


def test_a_run_is_written_whole_or_not_at_all(monkeypatch, run_store):
    monkeypatch.setattr(Result, "record", lambda self: (_ for _ in ()).throw(OSError("no room on disk")))
    with pytest.raises(OSError, match="no room"):
        execute.execute(TINY)
    assert [p.name for p in run_store.iterdir() if p.name != ".locks"] == []
    monkeypatch.undo()


def test_a_fine_tuned_run_starts_from_its_trunks_weights():
    execute.execute(TINY)
    tuned = execute.execute(TUNED)
    trunk, after = store.weights(TINY), store.weights(TUNED)
    same = {name for name in trunk if trunk[name].shape == after[name].shape and torch.equal(trunk[name], after[name])}
    assert "layers.0.ffn.0.f.fc1.weight" in same and "layers.0.mhsa.0.f.qkv.weight" not in same
    assert tuned.metrics["trained_params"] < sum(t.numel() for t in after.values())


def test_a_trunk_of_another_data_set_gets_a_fresh_head_though_it_has_as_many_classes():
    execute.execute(TINY)
    trunk = store.weights(TINY)
    for data, kept in (("digits", True), ("fashion-mnist", False)):
        model, _ = execute.prepare(replace(TUNED, model=MODEL, data=data), None)
        assert torch.equal(model.state_dict()["pos_embed"], trunk["pos_embed"])
        assert torch.equal(model.head.weight, trunk["head.weight"]) == kept


def test_a_run_directory_of_another_version_is_named_and_kept(run_store):
    (run_store / TINY.hash).mkdir(parents=True)
    (run_store / TINY.hash / "result.json").write_text('{"accuracy": 3}')
    with pytest.raises(UsageError, match=f"the run {TINY.hash} .* is not in the form of this version"):
        store.find(TINY)
    assert (run_store / TINY.hash / "result.json").read_text() == '{"accuracy": 3}'


def test_a_result_that_contradicts_itself_is_not_read(run_store):
    execute.execute(TINY)
    path = run_store / TINY.hash / "result.json"
    whole = json.loads(path.read_text())
    for change in ({"hash": "0" * 16}, {"correct": {"images": 5000, "bits": "AAAA"}}, {"metrics": {"top1": 99.0}}):
        path.write_text(json.dumps(whole | change))
        with pytest.raises(UsageError, match="is not in the form of this version"):
            store.find(TINY)


def test_a_result_keeps_which_images_of_imagenet_v2_were_right_and_older_results_have_none(run_store):
    result = execute.execute(TINY)
    assert result.correct_v2 is None and "correct_v2" not in result.record()
    right = np.arange(13) % 3 == 0
    both = replace(result, metrics=result.metrics | {"top1_v2": 100 * right.mean()}, correct_v2=right)
    again = results.Result.from_record(json.loads(json.dumps(both.record())))
    assert (again.correct_v2 == right).all() and (again.correct == result.correct).all()
    with pytest.raises(ValueError, match="top1_v2 is not what the bits say"):
        results.Result.from_record(both.record() | {"metrics": result.metrics | {"top1_v2": 1.0}})


def test_export_names_a_run_that_it_cannot_write_and_refuses_a_folder(run_store, tmp_path):
    execute.execute(TINY)
    with pytest.raises(UsageError, match="is there and is no file"):
        store.export_runs(tmp_path)
    (run_store / TINY.hash / "spec.json").write_text("{")
    with pytest.raises(UsageError, match=f"the run {TINY.hash} .* is not in the form of this version"):
        store.export_runs(tmp_path / "runs.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"line 1 of binary\.jsonl is not a run"):
        store.import_runs(tmp_path / "binary.jsonl")


def test_a_last_step_that_leaves_no_finite_weights_is_not_kept():
    bad = replace(TINY, images=10, recipe=replace(TINY.recipe, lr=1e38, clip=None, warmup=0.0))
    with pytest.raises(loop.NonFiniteLoss, match="the last step left weights that are not finite"):
        execute.execute(bad)
    assert store.find(bad) is None


def test_exported_runs_come_back_by_import_with_the_same_numbers(monkeypatch, tmp_path, run_store):
    for spec in (TINY, TUNED):
        execute.execute(spec)
    assert store.export_runs(tmp_path / "runs.jsonl") == 2
    before = store.find(TUNED)
    monkeypatch.setenv("VITLIB_RUNS", str(tmp_path / "other"))
    assert store.import_runs(tmp_path / "runs.jsonl") == (2, 0)
    assert store.import_runs(tmp_path / "runs.jsonl") == (0, 2)
    after = store.find(TUNED)
    assert after.record() == before.record()
    # Metrics without weights are enough to read; a new child needs the trunk trained again, and only that.
    assert store.missing([TINY, TUNED]) == []
    child = replace(TUNED, strategy="ffn")
    assert store.missing([child]) == [TINY, child]


def test_a_changed_line_is_not_imported(tmp_path, run_store):
    execute.execute(TINY)
    store.export_runs(tmp_path / "runs.jsonl")
    text = (tmp_path / "runs.jsonl").read_text()
    (tmp_path / "runs.jsonl").write_text(text.replace('"images": 50', '"images": 500'))
    with pytest.raises(UsageError, match=r"line 1 of runs\.jsonl is not a run \(ValueError: it says"):
        store.import_runs(tmp_path / "runs.jsonl")
    (tmp_path / "runs.jsonl").write_text("not a run\n")
    with pytest.raises(UsageError, match=r"line 1 of runs\.jsonl is not a run"):
        store.import_runs(tmp_path / "runs.jsonl")


POISON = {
    "a spec that is null": lambda spec, result: ("null", results.hash_of(None), result),
    "a spec that is a list": lambda spec, result: ("[]", results.hash_of([]), result),
    "a spec nested without end": lambda spec, result: ("[" * 99_999 + "]" * 99_999, "0" * 16, result),
    "seconds that are a text": lambda spec, result: (spec, TINY.hash, result | {"cpu_s": "1"}),
    "metrics that are a list": lambda spec, result: (spec, TINY.hash, result | {"metrics": []}),
    "bits that are a number": lambda spec, result: (spec, TINY.hash, result | {"correct": 5}),
    "no bits for an image": lambda spec, result: (spec, TINY.hash, result | {"correct": {"images": 8, "bits": ""}}),
    "an accuracy without bits": lambda spec, result: (spec, TINY.hash, result | {"correct": None}),
    "seconds that are no number": lambda spec, result: (spec, TINY.hash, result | {"cpu_s": math.nan}),
    "seconds without end": lambda spec, result: (spec, TINY.hash, result | {"wall_s": 10**400}),
    "a truth for memory": lambda spec, result: (spec, TINY.hash, result | {"mem_mb": True}),
    "an infinite loss": lambda spec, r: (spec, TINY.hash, r | {"metrics": r["metrics"] | {"loss": math.inf}}),
    "checksums in a list": lambda spec, result: (spec, TINY.hash, result | {"sha256": []}),
    "checksums that are numbers": lambda spec, result: (spec, TINY.hash, result | {"files": {"train": 5}}),
}


@pytest.mark.parametrize("what", POISON)
def test_a_poisoned_line_is_not_imported(what, tmp_path, run_store, monkeypatch):
    execute.execute(TINY)
    whole = (json.dumps(TINY.record()), json.loads((run_store / TINY.hash / "result.json").read_text()))
    spec, name, result = POISON[what](*whole)
    line = f'{{"spec": {spec}, "result": {json.dumps(result | {"hash": name})}}}'
    (tmp_path / "runs.jsonl").write_text(line + "\n")
    monkeypatch.setenv("VITLIB_RUNS", str(tmp_path / "other"))
    with pytest.raises(UsageError, match=r"line 1 of runs\.jsonl is not a run"):
        store.import_runs(tmp_path / "runs.jsonl")
    assert not (tmp_path / "other").exists()


def test_a_run_that_is_there_twice_is_not_imported(tmp_path, run_store):
    execute.execute(TINY)
    store.export_runs(tmp_path / "runs.jsonl")
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write((tmp_path / "runs.jsonl").read_text().replace('"wall_s": ', '"wall_s": 1'))
    with pytest.raises(UsageError, match=r"line 2 of runs\.jsonl is not a run \(ValueError: line 1 has the same one\)"):
        store.import_runs(tmp_path / "runs.jsonl")


@pytest.mark.parametrize("name", ["spec", "result"])
def test_a_pipe_in_the_store_is_not_waited_for(name, run_store, tmp_path):
    execute.execute(TINY)
    (run_store / TINY.hash / f"{name}.json").unlink()
    os.mkfifo(run_store / TINY.hash / f"{name}.json")
    with pytest.raises(UsageError, match=rf"the run {TINY.hash} .* is not in the form of this version"):
        store.export_runs(tmp_path / "runs.jsonl")


def test_a_stored_spec_that_is_no_spec_stops_no_plan(run_store):
    execute.execute(TINY)
    for text in ("null", "[" * 99_999, "{"):
        (run_store / TINY.hash / "spec.json").write_text(text)
        plan._measured.cache_clear()
        assert plan.cost([TUNED], jobs=1).missing == 1


def gone() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_kill_between_the_two_renames_of_an_imported_run_loses_nothing(run_store, tmp_path):
    execute.execute(TINY)
    kept = store.find(TINY).record()
    for name in (
        f".draft-{files.MACHINE}-{gone()}-01234567-{TINY.hash}",
        f".draft-{files.MACHINE}-{os.getpid()}-0",
    ):
        (run_store / name).mkdir()
    (run_store / TINY.hash).rename(run_store / f".draft-{files.MACHINE}-{gone()}-01234567-{TINY.hash}-old")
    store.sweep_store()
    assert store.find(TINY).record() == kept
    assert [p.name for p in run_store.glob(".draft-*")] == [f".draft-{files.MACHINE}-{os.getpid()}-0"]


@pytest.mark.parametrize("damage", ["a bit", "cut", "of another run"])
def test_damaged_weights_are_noticed(damage, run_store):
    for spec in (TINY, TINY.with_seed(1001)):
        execute.execute(spec)
    path = store.weights_path(TINY)
    whole = path.read_bytes()
    other = store.weights_path(TINY.with_seed(1001)).read_bytes()
    path.write_bytes({"a bit": whole[:-1] + bytes([whole[-1] ^ 1]), "cut": whole[:-9]}.get(damage, other))
    with pytest.raises(UsageError, match=rf"{path} (is damaged: its SHA-256|cannot be read as a safetensors file)"):
        execute.execute(TUNED)


@contextmanager
def file_size(limit: int):
    """No file may become larger meanwhile: what a full disk does, without one."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [0, 100, 30_000])
@pytest.mark.parametrize("every_s", [0, 300])
def test_without_room_on_disk_a_run_is_one_sentence_and_nothing_half_written_stays(limit, every_s, run_store):
    with pytest.raises(UsageError, match="no room on disk for") as error, file_size(limit):
        execute.execute(TINY, every_s=every_s)
    what = "for the run" if every_s else "for a checkpoint"
    assert what in str(error.value) and "\n" not in str(error.value)
    assert [path.suffix for path in run_store.rglob("*") if path.is_file()] == [".lock"]
    assert execute.execute(TINY).metrics  # with room again


# ---- the launcher


def test_parents_are_trained_first_and_once_and_the_finished_bar_says_so(monkeypatch, capsys):
    monkeypatch.delenv("VITLIB_PROGRESS", raising=False)
    specs = [replace(TUNED, strategy=s) for s in ("full", "attn", "ffn")] + [TINY]
    todo = store.missing(specs)
    assert todo[0] == TINY and len(todo) == 4
    found = launch.launch(specs, jobs=2)
    assert list(found) == specs and all(found.values())
    assert re.search(r"4 of 4 runs 100%.*\s*$", capsys.readouterr().err)


def test_workers_give_the_numbers_that_one_process_gives(monkeypatch, tmp_path):
    specs = [TINY, TUNED, TINY.with_seed(1001)]
    several = launch.launch(specs, jobs=2)
    monkeypatch.setenv("VITLIB_RUNS", str(tmp_path / "alone"))
    for spec in specs:
        assert execute.execute(spec).metrics == several[spec].metrics


def test_a_tokenizer_is_trained_before_the_masked_run_that_it_makes_the_targets_of(run_store):
    tuned = replace(TINY, protocol="finetune", parent=MASKED)
    assert store.missing([tuned, MASKED, TINY]) == [TOKENIZER, MASKED, tuned, TINY]
    assert plan.cost([tuned], jobs=2).runs == 3 and plan.cpu_seconds(TOKENIZER) > 0
    found = launch.launch([tuned, TOKENIZER, MASKED], jobs=2)
    metrics = found[TOKENIZER].metrics
    assert {"first_loss", "train_loss", "recon_mse", "tokens_used", "perplexity", "trained_params"} == set(metrics)
    assert found[TOKENIZER].correct is None and 0 < metrics["tokens_used"] <= 1 <= metrics["perplexity"] <= 16
    assert found[MASKED].metrics["first_loss"] < np.log(16) + 1  # 16 tokens to choose from, not 128
    # Its weights are needed for the masked run only, and no longer once that is there.
    shutil.rmtree(run_store / TOKENIZER.hash)
    assert store.missing([replace(tuned, strategy="attn")]) == [replace(tuned, strategy="attn")]
    assert store.missing([replace(MASKED, masked=3)]) == [TOKENIZER, replace(MASKED, masked=3)]


def test_a_tokenizer_that_fails_takes_the_runs_that_need_it_with_it():
    bad = replace(TOKENIZER, recipe=replace(TINY.recipe, lr=1e30, clip=None, warmup=0.0, optimizer="sgd"))
    masked = replace(MASKED, tokenizer=bad)
    with pytest.raises(launch.RunsFailed, match=r"3 of 3 runs failed.*its tokenizer run failed.*its masked run failed"):
        launch.launch([replace(TINY, protocol="finetune", parent=masked)], jobs=2)


def test_a_run_that_fails_is_named_and_the_others_are_kept():
    bad = replace(TINY, recipe=replace(TINY.recipe, lr=1e30, clip=None, warmup=0.0, optimizer="sgd"))
    child = replace(TUNED, parent=bad)
    with pytest.raises(launch.RunsFailed, match=rf"2 of 3 runs failed.*run {bad.hash}.*the loss is .* at step"):
        launch.launch([bad, child, TINY], jobs=2)
    assert store.find(TINY) and not store.find(bad) and not store.find(child)


COMMAND = """
import pickle, sys
from lab.runs.launch import launch
if __name__ == "__main__":
    launch(pickle.loads(bytes.fromhex(sys.argv[1])), jobs=2)
"""


def test_workers_end_when_the_process_that_asked_is_killed_and_the_same_command_goes_on(run_store, tmp_path):
    short, long = TINY, replace(TINY, recipe=replace(TINY.recipe, epochs=20), images=200)
    specs = [short, short.with_seed(1001), long, long.with_seed(1001)]
    (tmp_path / "study.py").write_text(COMMAND)
    command = [sys.executable, str(tmp_path / "study.py"), pickle.dumps(specs).hex()]
    environment = os.environ | {"PYTHONPATH": str(paths.ROOT), "VITLIB_PROGRESS": "0"}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    wait_for(lambda: process.poll() is not None or len(list(run_store.glob(".locks/*"))) == 4)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)  # only the parent
    process.wait()
    wait_for(lambda: not files.alive(-process.pid), seconds=10)  # nobody of its group is left
    kept = {path.parent.name: path.stat().st_mtime_ns for path in run_store.glob("[0-9a-f]*/result.json")}
    assert {short.hash, short.with_seed(1001).hash} <= kept.keys() and len(kept) < 4
    left = run_store / f".draft-{files.MACHINE}-{process.pid}-01234567-{long.hash}"
    left.mkdir()
    found = launch.launch(specs, jobs=2)
    assert all(found.values()) and not left.exists()  # drafts of the killed process are gone
    assert all((run_store / name / "result.json").stat().st_mtime_ns == when for name, when in kept.items())


@pytest.mark.slow
def test_ten_kills_at_any_moment_change_no_bit_and_leave_nothing(run_store, tmp_path, monkeypatch):
    """The short form of `python -m tools.kill`, which kills commands."""
    spec, fork, draws = (
        replace(TINY, recipe=replace(TINY.recipe, epochs=4)),
        multiprocessing.get_context("fork"),
        random.Random(0),
    )
    monkeypatch.setenv("VITLIB_RUNS", str(tmp_path / "whole"))
    execute.execute(spec)
    expected, seconds = ends_with(tmp_path / "whole"), store.find(spec).about["wall_s"]
    monkeypatch.setenv("VITLIB_RUNS", str(run_store))
    for _ in range(10):
        process = fork.Process(target=execute.execute, args=(spec,), kwargs={"every_s": 0})
        process.start()
        process.join(draws.uniform(0, 1.5 * seconds))
        process.kill()
        process.join()
        store.sweep_store()
        assert list(run_store.rglob(".draft-*")) == []
        if store.find(spec):
            assert ends_with(run_store) == expected
            shutil.rmtree(run_store)
    execute.execute(spec)
    assert ends_with(run_store) == expected and not store.checkpoint_path(spec).exists()


def ends_with(folder: Path) -> dict:
    """What the numbers of a store's runs are in."""
    numbers = {path.name: path.read_bytes() for path in folder.glob("[0-9a-f]*/*") if path.name != "result.json"}
    (result,) = (json.loads(path.read_text()) for path in folder.glob("[0-9a-f]*/result.json"))
    return numbers | {name: result[name] for name in ("metrics", "correct", "ledger", "sha256")}


def test_the_harness_finds_what_a_command_leaves_behind(tmp_path):
    """A command that ends at once, but not what it has started, nor its draft."""
    child = (
        "import os, subprocess, sys; open(os.environ['TMPDIR'] + '/.draft-x', 'w'); subprocess.Popen(['sleep', '60'])"
    )
    place = kill.Place(tmp_path / "a", [sys.executable, "-c", child])
    assert place.start().wait() == 0
    (left,) = place.alive()
    os.kill(left, signal.SIGKILL)
    assert [path.name for path in place.drafts()] == [".draft-x"]
    waits = kill.Place(tmp_path / "b", ["sleep", "60"])
    one = kill.kill(waits, random.Random(0), 0.2)
    assert one.sent in ("SIGKILL", "SIGTERM", "SIGINT") and not one.fault and waits.alive() == []
    assert f"| x | {one.sent} | {one.whom} | 1 | {one.alive_s} | none |" in kill.table("x", [one])


def test_workers_that_wait_for_a_lock_end_with_the_process_that_asked(run_store, tmp_path):
    (tmp_path / "study.py").write_text(COMMAND)
    command = [sys.executable, str(tmp_path / "study.py"), pickle.dumps([TINY]).hex()]
    with store.held(TINY.hash):
        process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(paths.ROOT)}, start_new_session=True)
        wait_for(lambda: b"forkserver" in b"".join(lines_of(process.pid)) and len(lines_of(process.pid)) >= 4)
        process.kill()
        process.wait()
        wait_for(lambda: not files.alive(-process.pid), seconds=10)


def lines_of(group: int) -> list[bytes]:
    """The command lines of a process group."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.getpgid(int(folder.name)) == group:
                found.append((folder / "cmdline").read_bytes())
    return found


def test_what_concerns_all_runs_stops_the_others():
    with pytest.raises(UsageError, match="17 images of digits cannot be class-balanced"):
        launch.launch([replace(TINY, images=17), replace(TINY, recipe=replace(TINY.recipe, epochs=2000))], jobs=1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"device": "cuda"}, "'cuda' needs a GPU"),
        ({"data": "cifar-10", "streamed": True}, "data set 'cifar-10' is not there"),
    ],
)
def test_a_device_or_data_that_are_not_there_are_named_before_any_process_is_started(
    change, said, monkeypatch, tmp_path
):
    monkeypatch.setenv("VITLIB_DATA", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for started in ("_train", "_until_it_ends"):
        monkeypatch.setattr(launch, started, lambda *_: pytest.fail("something was started"))
    with pytest.raises(UsageError, match=said):
        launch.launch([TINY, replace(TINY, **change)])
    with pytest.raises(UsageError, match=said):
        launch.distributed(replace(TINY, **change), 2)


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_negative_jobs_are_refused():
    with pytest.raises(UsageError, match="jobs is -1"):
        launch.launch([TINY], jobs=-1)


TARGETS = profile("study").transfer_images


@pytest.mark.parametrize("data", TARGETS)
@pytest.mark.parametrize("trunk_data", ["fashion-mnist-6", "fashion-mnist"])
def test_a_target_gets_a_fresh_head_though_it_may_have_as_many_classes_as_the_trunk(monkeypatch, data, trunk_data):
    arms = arms_of(small.transfer, profile("study"))
    spec = next(arm.spec for name, arm in arms.items() if name.startswith(f"{data} ") and " attn" in name).with_seed(10)
    classes = card(trunk_data)["vitlib"]["num_classes"]
    parent = replace(spec.parent, data=trunk_data, model=replace(spec.parent.model, num_classes=classes))
    trunk = {name: torch.full_like(w, 0.5) for name, w in ViT(parent.model).state_dict().items()}
    monkeypatch.setattr(execute, "weights", lambda _: trunk)
    model, _ = execute.prepare(replace(spec, parent=parent), None)
    fresh = ViT(spec.model, 10).state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, fresh[name] if name.startswith("head.") else trunk[name])


# ---- the plan


def test_the_plan_counts_runs_once_and_prefers_what_was_measured():
    specs = [replace(TUNED, strategy=s) for s in ("full", "attn")]
    before = plan.cost(specs, jobs=2)
    assert (before.runs, before.missing) == (3, 3) and before.cpu_s > 0 and before.wall_s >= before.cpu_s / 2
    launch.launch(specs, jobs=1)
    plan._measured.cache_clear()
    after = plan.cost(specs, jobs=2)
    assert (after.runs, after.missing, after.cpu_s) == (3, 0, 0)
    assert plan.cpu_seconds(TINY.with_seed(7)) == pytest.approx(store.find(TINY).about["cpu_s"])


def test_costs_grow_linearly_with_images_and_epochs():
    def seconds(images, epochs):
        spec = replace(TINY, images=images, recipe=replace(TINY.recipe, epochs=epochs))
        return plan.formula_seconds(spec) - plan.SECONDS_PER_RUN

    assert seconds(2000, 3) == pytest.approx(2 * seconds(1000, 3)) == pytest.approx(6 * seconds(1000, 1))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_damaged_data_stop_everything_in_one_sentence_before_any_training(monkeypatch, tmp_path, capsys, split):
    for file in paths.EMBEDDED.glob("*.parquet"):
        (tmp_path / file.name).symlink_to(file)
    damaged = tmp_path / f"fashion-mnist-{split}.parquet"
    whole = damaged.read_bytes()
    damaged.unlink()
    damaged.write_bytes(whole[:-1000])
    monkeypatch.setattr(cards, "EMBEDDED", tmp_path)
    monkeypatch.setattr(loop, "train", lambda *_: pytest.fail("something was trained"))
    monkeypatch.setattr(launch, "_train", lambda todo, *_: [execute.execute(spec) for spec in todo])
    assert main(["run", "--profile", "smoke", "--notebook", "31"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{damaged.name} is damaged" in said


# ---- results and archives


def archived(folder, specs, arm="linear", notebook="52") -> Path:
    """The runs of a store with their table of arms: each spec one seed of `arm`."""
    store.export_runs(folder / "runs.jsonl")
    rows = [f"{notebook},{arm},{spec.seed},{spec.hash}" for spec in specs]
    (folder / "arms.csv").write_text("\n".join(["notebook,arm,seed,run", *rows, ""]))
    return folder


def test_an_archive_gives_the_results_by_arm_and_seed_and_the_runs_that_each_began_with(tmp_path):
    tuned = replace(TINY, protocol="finetune", parent=replace(MASKED, masked=3))
    seeds = [tuned.with_seed(1001), tuned]
    for member in (member for spec in seeds for member in spec.family()):
        execute.execute(member)
    archive = results.Archive(archived(tmp_path, seeds))
    assert archive.seeds == (1000, 1001) and archive.notebooks == ["52"] and archive.results("31") == {}
    read = archive.results("52")["linear"]
    assert [result.record() for result in read] == [store.find(spec).record() for spec in seeds[::-1]]
    assert [result.hash for result in archive.family(tuned.hash)] == [spec.hash for spec in tuned.family()]
    assert archive.record(tuned.hash) == json.loads(json.dumps(tuned.record()))


def test_an_archive_without_a_run_or_a_seed_of_an_arm_is_refused(tmp_path):
    execute.execute(TINY)
    columns, table = "notebook,arm,seed,run\n", archived(tmp_path, [TINY, TINY.with_seed(1001)]) / "arms.csv"
    for content, said in (
        (table.read_text(), "has no run of arm 'linear' of notebook 52 at seed 1001"),
        ("arm,run\nlinear,0123\n", "is no table of arms"),
        (f"{columns}52,linear\n", "is no table of arms"),
        (f"{columns}52,{'x' * 200_000},1000,{TINY.hash}\n", r"is no table of arms \(Error: field larger"),
        (f"{columns}52,linear,1000,{TINY.hash}\n52,linear,1000,0123\n", "arm 'linear' has two runs of seed 1000"),
        (columns, "names no arm: it is written with the 1 runs beside it"),
        ("", "names no arm"),
    ):
        table.write_text(content)
        with pytest.raises(UsageError, match=said):
            results.Archive(tmp_path)
    with pytest.raises(UsageError, match="there is no file"):
        results.Archive(tmp_path / "nowhere")


def test_an_archive_is_read_without_torch(tmp_path):
    execute.execute(TINY)
    archived(tmp_path, [TINY])
    code = "import sys; sys.modules['torch'] = None; from lab.runs.results import Archive; print(Archive(sys.argv[1]).seeds)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=paths.ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "(1000,)\n"
