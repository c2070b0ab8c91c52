"""The engine of the loop: parts and processes give the whole batch's step, switches change no mathematics, and a run that was
killed ends where an uninterrupted one ends.
"""

import copy
import errno
import json
import math
import multiprocessing
import os
import random
import signal
import threading
import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from timm.utils import ModelEmaV3

from lab.data.cards import load_resized
from lab.runs import execute, launch, store
from lab.runs.spec import RunSpec
from vitlib.data import Augment, Batch, InMemory, Shard, subset
from vitlib.errors import UsageError
from vitlib.model import ViT, vit_config
from vitlib.train import engine as engines
from vitlib.train import loop
from vitlib.train.checkpoint import Checkpoints, Step
from vitlib.train.dvae import DVAEConfig
from vitlib.train.engine import Engine
from vitlib.train.finetune import freeze
from vitlib.train.recipe import Recipe
from vitlib.train.supervised import cross_entropy, evaluate, loss_of

torch.set_num_threads(1)
RECIPE = Recipe(epochs=2, batch_size=16, lr=1e-3)
MODEL = vit_config("W32-2x1/4", image_size=16, in_chans=1, num_classes=10, drop_path=0.2, layer_scale=0.1)
TINY = RunSpec("supervised", MODEL, "digits", RECIPE, seed=1000, images=60)  # 4 steps an epoch, the last one short
TUNED = replace(TINY, protocol="finetune", parent=TINY, strategy="attn", model=replace(MODEL, image_size=20))
TOKENIZER = replace(TINY, protocol="tokenizer", model=DVAEConfig(16, 4, 1, vocabulary=16, width=8))
MASKED = replace(TINY, protocol="masked", targets="pixels", masked=6)
AVERAGED = replace(TINY, recipe=replace(RECIPE, ema=0.8, mixup=0.2, optimizer="lamb"), accumulate=3)
RUNS = {
    "supervised": TINY, "fine-tuned": TUNED, "masked": MASKED, "tokenizer": replace(TOKENIZER, accumulate=2),
    "averaged, in parts": AVERAGED,
}  # fmt: skip


@pytest.fixture(autouse=True)
def run_store(monkeypatch, tmp_path):
    monkeypatch.setenv("VITLIB_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture(scope="module")
def images():
    return load_resized("digits", "train", 16)


def model(strategy="full", **fields) -> ViT:
    vit = ViT(replace(MODEL, **fields), 3)
    freeze(vit, strategy)
    return vit


def in_double(model, batch, draws):
    return cross_entropy(model, replace(batch, images=batch.images.double()), draws)


def gradients(vit: ViT, batch: Batch, engine: Engine = engines.CPU) -> dict[str, torch.Tensor]:
    """Of one step of the loop, in float64."""
    vit = engine.place(copy.deepcopy(vit).double(), len(batch.index)).train()
    for part in engine.move(batch).parts(engine.accumulate):
        (in_double(vit, part, loop.drop_path_draws(vit, 5, part)) * part.weight).backward()
    return {name: p.grad for name, p in vit.named_parameters() if p.grad is not None}


def assert_close(found: dict, expected: dict, tolerance: float = 1e-12) -> None:
    assert found.keys() == expected.keys() and expected
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


# ---- parts of a batch


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("images", [1, 2, 12, 13])
def test_the_parts_of_all_processes_make_the_batch_and_their_weighted_means_its_mean(world, images):
    index = np.arange(100, 100 + images)
    parts = [Shard(rank, world).part(index) for rank in range(world)]
    assert np.array_equal(np.concatenate([own for own, weight in parts if weight]), index)
    assert np.mean([weight * own.mean() for own, weight in parts]) == pytest.approx(index.mean(), rel=1e-12)
    assert max(len(own) for own, _ in parts) - min(len(own) for own, _ in parts) <= 1
    assert all(np.array_equal(own, index[:1]) for own, weight in parts if not weight)


def test_skipped_batches_are_left_out_and_not_computed(images, monkeypatch):
    rows, made = subset(images, 60, 1), []
    flipped = InMemory._flipped
    monkeypatch.setattr(InMemory, "_flipped", lambda data, index, *rest: made.append(1) or flipped(data, index, *rest))
    for skip in (0, 1, 3, 4):
        made.clear()
        rest = list(images.epoch_batches(rows, 1, 2, RECIPE, skip=skip))
        assert len(made) == len(rest) == 4 - skip
    whole = list(images.epoch_batches(rows, 1, 2, RECIPE))
    (last,) = images.epoch_batches(rows, 1, 2, RECIPE, skip=3)
    assert torch.equal(last.images, whole[3].images) and np.array_equal(last.index, whole[3].index)


def test_processes_see_the_parts_of_the_same_batches_also_mixed(images):
    rows = subset(images, 60, 1)
    mixed = replace(RECIPE, mixup=0.3)
    whole = list(images.epoch_batches(rows, 1, 0, mixed))
    parts = [list(images.epoch_batches(rows, 1, 0, mixed, Shard(rank, 3))) for rank in range(3)]
    for step, batch in enumerate(whole):
        for field in ("images", "targets", "flipped"):
            assert torch.equal(torch.cat([getattr(own[step], field) for own in parts]), getattr(batch, field))


def test_evaluation_covers_the_split_once_in_its_order_whatever_the_processes(images):
    data = images.take(np.arange(23))
    for world in (1, 3, 40):
        batches = [b for rank in range(world) for b in data.evaluation_batches(5, Shard(rank, world))]
        assert np.concatenate([b.index for b in batches]).tolist() == list(range(23))
        assert torch.equal(torch.cat([b.targets for b in batches]), data.labels)
        assert torch.equal(torch.cat([b.images for b in batches]), data.normalise(data.images))


def test_images_in_memory_are_not_cropped_or_cut_silently(images):
    for change in ({"augment": Augment()}, {"cutmix": 1.0}, {"repeats": 3}):
        with pytest.raises(UsageError, match="digits is held in memory"):
            images.epoch_batches(np.arange(9), 0, 0, replace(RECIPE, **change))


# ---- switches


@pytest.mark.parametrize("parts", [2, 3, 16, 50])
def test_gradients_of_a_batch_in_parts_are_those_of_the_whole(images, parts):
    batch = next(images.epoch_batches(np.arange(16), 0, 0, replace(RECIPE, mixup=0.2)))
    assert_close(gradients(model(), batch, Engine(accumulate=parts)), gradients(model(), batch))


@pytest.mark.parametrize(
    ("name", "strategy"),
    [("checkpointing", "full"), ("checkpointing", "attn")],
)
def test_a_switch_leaves_the_gradients_as_they_are(images, name, strategy):
    batch = next(images.epoch_batches(np.arange(16), 0, 0, RECIPE))
    vit = model(strategy, stem="hmlp", stem_norm="ln", stem_act="gelu")
    assert_close(gradients(vit, batch, Engine(**{name: True})), gradients(vit, batch))


def test_activations_are_computed_again_also_when_stem_and_positions_are_frozen(images):
    batch = next(images.epoch_batches(np.arange(16), 0, 0, RECIPE))
    vit = model("attn")
    vit.pos_embed.requires_grad = False
    passes = []
    vit.layers[0].register_forward_pre_hook(lambda *_: passes.append(1))
    plain = gradients(vit, batch)
    assert passes == [1]
    assert_close(gradients(vit, batch, Engine(checkpointing=True)), plain)
    assert len(passes) == 3


def test_a_compiled_model_has_its_names_and_gradients_and_is_really_compiled(images, monkeypatch):
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    monkeypatch.setattr(engines, "BACKEND", backend)
    batch = next(images.epoch_batches(np.arange(16), 0, 0, RECIPE))
    assert_close(gradients(model("attn"), batch, Engine(compile=True)), gradients(model("attn"), batch))
    assert seen
    vit, names = Engine(compile=True).place(model(), 16), list(model().state_dict())
    assert list(vit.state_dict()) == names == list(copy.deepcopy(vit).state_dict())


def test_all_switches_together_train_a_masked_model_and_change_only_the_rounding(monkeypatch):
    monkeypatch.setattr(engines, "BACKEND", "eager")
    switches = {"accumulate": 2, "compile": True, "checkpointing": True, "precision": "bf16"}
    small = replace(MASKED, images=20, model=replace(MODEL, depth=1))  # torch.compile traces each shape of a part
    plain, found = (execute.execute(replace(small, **more)).metrics for more in ({}, switches))
    assert found != plain and found == pytest.approx(plain, rel=0.02)


def test_bf16_computes_in_bfloat16_and_keeps_weights_and_gradients_in_float32(images):
    vit, seen = model(), []
    vit.layers[0].ffn[0].f.fc1.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    rows, history = subset(images, 60, 1), {}
    for precision in ("float32", "bf16"):
        own = copy.deepcopy(vit)
        history[precision] = loop.train(own, RECIPE, images, rows, 1, cross_entropy, engine=Engine(precision=precision))
        assert {p.dtype for p in own.parameters()} == {p.grad.dtype for p in own.parameters()} == {torch.float32}
    assert set(seen[:8]) == {torch.float32} and set(seen[8:]) == {torch.bfloat16}
    losses = [[s.loss for s in h] for h in history.values()]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)
    seen.clear()
    evaluate(own, images.take(np.arange(20)), Engine(precision="bf16"))
    assert seen == [torch.bfloat16]


def test_the_average_follows_the_weights_and_is_evaluated_beside_them(images, run_store):
    weights = []
    vit = model()
    ema = ModelEmaV3(vit, 0.8)
    expected = vit.head.weight.detach().clone()
    watch = lambda step, steps: weights.append(vit.head.weight.detach().clone())  # noqa: E731
    loop.train(vit, RECIPE, images, subset(images, 60, 1), 1, cross_entropy, watch, ema=ema)
    for after in weights:
        expected = 0.8 * expected + 0.2 * after
    torch.testing.assert_close(ema.module.head.weight, expected)
    raw, averaged = (execute.execute(replace(TINY, recipe=replace(RECIPE, ema=ema))) for ema in (None, 0.8))
    both = averaged.metrics
    assert {k: both[k] for k in raw.metrics} == raw.metrics and set(both) - set(raw.metrics) == {"top1_ema", "loss_ema"}
    assert both["loss_ema"] != both["loss"] and np.array_equal(raw.correct, averaged.correct)


def test_the_average_of_the_weights_is_kept_beside_them(run_store):
    spec = replace(TINY, recipe=replace(RECIPE, ema=0.8))
    metrics = execute.execute(spec).metrics
    last, averaged = store.weights(spec), average_of(spec)
    assert last.keys() == averaged.keys() and not torch.equal(last["head.weight"], averaged["head.weight"])
    vit = ViT(spec.model)
    vit.load_state_dict(averaged)
    reached, _ = evaluate(vit, execute.data_of(spec, spec.split))
    assert (reached["top1"], reached["loss"]) == pytest.approx((metrics["top1_ema"], metrics["loss_ema"]))
    trunk = replace(MASKED, recipe=replace(MASKED.recipe, ema=0.8))
    execute.execute(trunk)
    assert average_of(trunk).keys() == store.weights(trunk).keys()


def average_of(spec: RunSpec) -> dict[str, torch.Tensor]:
    return load_file(store.weights_path(spec).with_name("ema.safetensors"))


def test_a_run_whose_average_cannot_be_written_is_not_kept(run_store, monkeypatch):
    def full(path, state):
        if path.name.endswith("ema.safetensors"):
            raise OSError(errno.ENOSPC, "no space")
        write(path, state)

    write = store.write_safetensors
    monkeypatch.setattr(store, "write_safetensors", full)
    with pytest.raises(UsageError, match=r"no room on disk for the run .*: free some, and the same command goes on"):
        execute.execute(replace(TINY, recipe=replace(RECIPE, ema=0.8)))
    assert not [path for path in run_store.iterdir() if not path.name.startswith((".checkpoints", ".locks"))]


def test_smoothing_spreads_a_share_evenly_and_is_refused_where_every_class_would_be_positive():
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    batch = Batch(None, torch.tensor([1, 2, 3, 4]), None, None, 0)
    shares = torch.nn.functional.one_hot(batch.targets, 10).float()
    loss = loss_of(replace(RECIPE, smoothing=0.1))
    by_hand = -((0.9 * shares + 0.01) * logits.log_softmax(1)).sum(1).mean()
    for targets in (batch.targets, shares):
        found = loss(lambda images, draws: logits, replace(batch, targets=targets))
        assert found.item() == pytest.approx(by_hand.item(), rel=1e-6)
    with pytest.raises(UsageError, match=r"smoothing is 0\.1 with loss 'bce'"):
        replace(TINY, recipe=replace(RECIPE, smoothing=0.1, loss="bce"))


def test_a_device_that_is_not_there_is_refused_and_auto_is_what_there_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert engines.resolve("auto") == engines.resolve("cpu") == "cpu"
    with pytest.raises(UsageError, match="'cuda' needs a GPU"):
        execute.execute(replace(TINY, device="cuda"))
    found = execute.execute(replace(TINY, device="auto")).about
    assert found["device"].endswith("cores") and found["world"] == 1 and "gpu_mem_mb" not in found
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert engines.resolve("auto") == "cuda"


@pytest.mark.parametrize("parts", [0, 17, 1.5])
def test_parts_that_a_batch_does_not_have_are_refused(parts):
    with pytest.raises(
        UsageError, match=rf"accumulate is {parts}: allowed (is int|are whole numbers from 1|are 1 to 16 parts)"
    ):
        replace(TINY, accumulate=parts)


# ---- going on


class Killed(BaseException):
    pass


STAMPS = {"P1": "of the first start"}


def killed_at(step: int, spec: RunSpec, every_s: float = 0.0) -> None:
    def on_step(now: int, steps: int) -> None:
        if now == step:
            raise Killed

    with pytest.raises(Killed):
        execute.execute(spec, on_step=on_step, every_s=every_s, stamps=STAMPS)


def kept(run_store, spec: RunSpec):
    """Everything that a run's numbers are in."""
    folder = run_store / spec.hash
    result = json.loads((folder / "result.json").read_text())
    weights = {name: w.numpy().tobytes() for name, w in load_file(folder / "weights.safetensors").items()}
    return weights, (folder / "history.csv").read_text(), result["metrics"], result["correct"], result["ledger"]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_killed_ends_bit_for_bit_like_an_uninterrupted_one(run_store, monkeypatch, tmp_path, name):
    spec = RUNS[name]
    if spec.parent:
        execute.execute(spec.parent)
    execute.execute(spec, stamps=STAMPS)
    expected = kept(run_store, spec)
    steps = [*random.Random(name).sample(range(1, spec.steps), 2), spec.steps]
    for step in sorted(steps):  # killed three times, the last time when nothing but the evaluation was left
        monkeypatch.setenv("VITLIB_RUNS", str(tmp_path / "again"))
        if spec.parent and not store.find(spec.parent):
            execute.execute(spec.parent)
        killed_at(step, spec)
    seen = []
    execute.execute(spec, on_step=lambda step, steps: seen.append(step))
    assert seen == [] and kept(tmp_path / "again", spec) == expected
    assert list((tmp_path / "again" / ".checkpoints").iterdir()) == []


def test_what_a_run_took_before_it_was_killed_counts_and_its_ledger_is_that_of_its_first_start(run_store, monkeypatch):
    killed_at(2, TINY)
    path = store.checkpoint_path(TINY)
    state = torch.load(path, weights_only=True)
    assert state["notes"].items() > STAMPS.items() and {*state["notes"]} - {*STAMPS} == {"began", "commit"}
    assert state["wall_s"] > 0 and state["cpu_s"] > 0
    torch.save(state | {"wall_s": 5000.0, "cpu_s": 4000.0}, path)
    seen = []
    result = execute.execute(TINY, on_step=lambda step, steps: seen.append(step), stamps={"P1": "another"})
    assert seen == list(range(3, 9))
    assert result.ledger == STAMPS
    assert result.about["wall_s"] > 5000 and 4000 < result.about["cpu_s"] < 4100


def states_of_generators() -> tuple:
    return torch.get_rng_state().numpy().tobytes(), str(np.random.get_state()), random.getstate()  # noqa: NPY002


def test_a_checkpoint_is_written_when_it_is_due_and_by_one_process_only(run_store, tmp_path):
    killed_at(4, TINY, every_s=1000)
    assert not (run_store / ".checkpoints").exists()
    assert not Checkpoints(tmp_path / "a.pt", every_s=0, writes=False).due() and Checkpoints(tmp_path / "a.pt", 0).due()


@pytest.mark.parametrize("damage", ["cut", "flipped", "other", "empty", "another model", "another run"])
def test_a_damaged_checkpoint_is_named_and_set_aside_and_the_run_starts_anew(run_store, damage):
    execute.execute(TINY, stamps=STAMPS)
    expected = kept(run_store, TINY)
    (run_store / TINY.hash / "result.json").unlink()
    killed_at(5, TINY)
    path = store.checkpoint_path(TINY)
    whole = path.read_bytes()
    half = len(whole) // 2
    bad = {"cut": whole[:half], "flipped": whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :], "empty": b""}
    if damage in bad:
        path.write_bytes(bad[damage])
    elif damage == "other":
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        state = torch.load(path, weights_only=True)
        torch.save(state | ({"run": "another"} if damage == "another run" else {"model": {"w": torch.zeros(3)}}), path)
    left, seen = path.read_bytes(), []
    with pytest.warns(UserWarning, match=f"the checkpoint .*{TINY.hash}.pt is damaged") as warned:
        execute.execute(TINY, on_step=lambda step, steps: seen.append(step), stamps=STAMPS)
    assert "\n" not in str(warned[0].message) and seen[0] == 1
    assert path.with_suffix(".damaged").read_bytes() == left and kept(run_store, TINY) == expected


def test_a_checkpoint_runs_no_code_when_it_is_read(run_store, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run by pickle"),)

    killed_at(2, TINY)
    torch.save({"model": Evil()}, store.checkpoint_path(TINY))
    with pytest.warns(UserWarning, match="is damaged"):
        execute.execute(TINY)
    assert not (tmp_path / "run by pickle").exists()


def test_without_room_on_disk_the_older_checkpoint_stays_and_one_sentence_says_so(run_store, monkeypatch):
    killed_at(3, TINY)
    path = store.checkpoint_path(TINY)
    before = path.read_bytes()

    def full(state, file):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UsageError, match=r"no room on disk .* the one of step 3 stays") as error:
        execute.execute(TINY, every_s=0)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint_and_says_where(run_store):
    bad = replace(TINY, recipe=replace(RECIPE, lr=1e38, clip=None, warmup=0.5))  # finite for some steps
    with pytest.raises(loop.NonFiniteLoss, match=r"last good checkpoint, of step \d, is .*\.pt$") as error:
        execute.execute(bad, every_s=0)
    assert str(store.checkpoint_path(bad)) in str(error.value)
    state = torch.load(store.checkpoint_path(bad), weights_only=True)
    assert all(t.isfinite().all() for t in state["model"].values())
    with pytest.raises(loop.NonFiniteLoss, match="no checkpoint is kept"):
        execute.execute(bad.with_seed(1001))
    vit, checkpoints = model(), Checkpoints(store.checkpoint_path(TINY))
    checkpoints.write({"model": vit}, [Step(1, 0, 0.1, 2.0)])
    torch.nn.init.constant_(vit.head.bias, float("inf"))  # found out by the next loss only
    checkpoints.write({"model": vit}, [Step(1, 0, 0.1, 2.0), Step(2, 0, 0.1, 2.0)])
    assert checkpoints.step == len(Checkpoints(checkpoints.path).read({"model": model()})) == 1


def test_the_temperature_of_a_tokenizer_falls_once_a_step_however_many_parts_a_batch_has():
    spec = RUNS["tokenizer"]
    execute.execute(spec)
    assert spec.accumulate == 2 and int(store.weights(spec)["step"]) == spec.steps == 8


def test_a_process_that_was_really_killed_is_gone_on_from(run_store, tmp_path, monkeypatch):
    spec = replace(TINY, recipe=replace(RECIPE, epochs=25))
    process = multiprocessing.get_context("fork").Process(target=execute.execute, args=(spec,), kwargs={"every_s": 0})
    process.start()
    deadline = time.monotonic() + 60
    while not store.checkpoint_path(spec).is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)  # somewhere in the middle of a step or of the writing
    process.kill()
    process.join()
    assert store.checkpoint_path(spec).is_file() and not store.find(spec)
    seen = []
    execute.execute(spec, on_step=lambda step, steps: seen.append(step))
    assert 1 < seen[0] and seen[-1] == 100
    expected = kept(run_store, spec)
    monkeypatch.setenv("VITLIB_RUNS", str(tmp_path / "again"))
    execute.execute(spec)
    assert kept(tmp_path / "again", spec) == expected


# ---- several processes


def started(world: int, work, folder, *arguments) -> list:
    """What `work(shard, *arguments)` gives in each of `world` processes that are joined by gloo."""

    def one(rank: int) -> None:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
        torch.save(work(Shard(rank, world), *arguments), folder / f"{rank}.pt")
        dist.destroy_process_group()

    (folder / "meet").unlink(missing_ok=True)  # where processes that were killed had met
    processes = [multiprocessing.get_context("fork").Process(target=one, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * world
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def five_steps(shard: Shard, stem: str, images, accumulate: int = 1) -> dict:
    """In float64: losses, gradients of the first step, weights after the fifth. The fourth batch is a single image."""
    vit = ViT(replace(MODEL, stem=stem, stem_norm="ln" if stem == "hmlp" else "none"), 3).double()
    seen, passes = {}, []
    vit.register_forward_hook(lambda *_: passes.append(None))

    def on_step(step: int, steps: int) -> None:
        if step == 1:
            seen["passes"] = len(passes)
            seen["gradients"] = {name: p.grad.clone() for name, p in vit.named_parameters()}
        if step == 5:
            seen["weights"] = {name: p.detach().clone() for name, p in vit.named_parameters()}

    engine, recipe = Engine(shard=shard, accumulate=accumulate), replace(RECIPE, mixup=0.2)
    history = loop.train(vit, recipe, images, np.arange(49), 5, in_double, on_step, engine)
    reached, correct = evaluate(vit.float(), images.take(np.arange(101)), engine, 10)
    return seen | {"losses": [s.loss for s in history], "correct": correct, "loss": reached["loss"]}


@pytest.mark.parametrize(("stem", "accumulate"), [("linear", 3), ("hmlp", 1)])
def test_two_processes_take_the_steps_of_one_with_the_same_global_batch(images, tmp_path, stem, accumulate):
    alone = five_steps(Shard(), stem, images)
    for found in started(2, five_steps, tmp_path, stem, images, accumulate):
        assert found["passes"] == math.ceil(accumulate / 2)  # of a process's share, so that no part is larger
        assert_close(found["gradients"], alone["gradients"])
        assert_close(found["weights"], alone["weights"], 1e-9)
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-9)
        assert np.array_equal(found["correct"], alone["correct"]) and found["loss"] == pytest.approx(alone["loss"])


def test_parts_are_of_the_global_batch_and_with_batch_norm_of_all_processes_together():
    frozen = model("attn", stem="hmlp", stem_norm="bn", stem_act="gelu")
    norms = model(stem="hmlp", stem_norm="bn", stem_act="gelu")
    for vit, found in ((model(), [8, 4, 3, 1, 1]), (norms, [8] * 5), (frozen, [8, 4, 3, 1, 1])):
        assert [Engine(accumulate=8, shard=Shard(0, world)).parts(vit) for world in (1, 2, 3, 8, 16)] == found


def test_the_first_process_writes_and_all_know_the_result_and_go_on_in_one(run_store, tmp_path):
    def interrupted(shard: Shard):
        killed_at(3, TINY)

    def whole(shard: Shard):
        result = execute.execute(TINY)
        return result.metrics, result.about["world"]

    started(2, interrupted, tmp_path)
    assert torch.load(store.checkpoint_path(TINY), weights_only=True)["history"].shape == (3, 4)
    one, two = started(2, whole, tmp_path)
    assert one == two and one[1] == 2 == store.find(TINY).about["world"]
    assert one[0] == store.find(TINY).metrics and list((run_store / ".checkpoints").iterdir()) == []


def test_processes_that_read_different_checkpoints_are_refused(images, tmp_path):
    killed_at(3, TINY)

    def work(shard: Shard):
        path = store.checkpoint_path(TINY) if shard.rank else tmp_path / "none.pt"
        with pytest.raises(UsageError, match="read different checkpoints"):
            rows = subset(images, 60, 1000)
            loop.train(ViT(MODEL, 1000), RECIPE, images, rows, 1000, cross_entropy, engine=Engine(shard=shard),
                       checkpoints=Checkpoints(path, run=TINY.hash))  # fmt: skip

    started(2, work, tmp_path)


def test_what_several_processes_cannot_do_is_refused_before_training():
    with pytest.raises(UsageError, match="a batch of 16 images cannot be shared equally by 3 processes"):
        Engine(shard=Shard(0, 3)).place(model(), 16)
    with pytest.raises(UsageError, match=f"a batch of {RECIPE.batch_size} images .* by 9999 processes"):
        launch.distributed(TINY, 9999)  # before one is started
    two = Engine(shard=Shard(0, 2))
    with pytest.raises(UsageError, match="batch norm does not train on several CPU processes"):
        two.place(model(stem="hmlp", stem_norm="bn"), 16)
    frozen = two.place(model("attn", stem="hmlp", stem_norm="bn"), 16)  # its statistics stay those of the trunk
    for vit in (frozen, torch.nn.SyncBatchNorm.convert_sync_batchnorm(frozen)):
        loop.set_train_mode(vit)
        assert not any(m.training for m in vit.stem if isinstance(m, engines.BatchNorm)) and vit.training


@pytest.mark.slow
def test_a_killed_process_ends_the_run_with_its_last_lines_and_the_run_goes_on(run_store):
    spec = replace(TINY, recipe=replace(RECIPE, epochs=2000))
    killed = []

    def kill() -> None:
        while not store.checkpoint_path(spec).is_file():
            time.sleep(0.05)
        killed.append(workers()[-1])
        os.kill(killed[0], signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(launch.RunsFailed, match=rf"2 processes that train the run {spec.hash} .* last lines") as error:
        launch.distributed(spec, 2, every_s=0, stamps=STAMPS)
    said = str(error.value)
    assert f"Signal 9 (SIGKILL) received by PID {killed[0]}" in said
    assert workers() == [] and not store.find(spec)
    assert torch.load(store.checkpoint_path(spec), weights_only=True)["notes"].items() > STAMPS.items()


def workers() -> list[int]:
    """The processes of a distributed run that this process asked for."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            own = f"VITLIB_PARENT={os.getpid()}".encode() in (folder / "environ").read_bytes().split(b"\0")
            if own and b"lab.runs.execute" in (words := (folder / "cmdline").read_bytes()) and b"torch" not in words:
                found.append(int(folder.name))
    return sorted(found)


def test_what_the_processes_refuse_reaches_the_one_who_asked(run_store, monkeypatch):
    """Without starting them: torchrun's place is taken by a process that is one of them."""
    monkeypatch.setattr(execute, "joined", lambda device: nullcontext(Shard()))

    def one(words, log, threads):
        log.touch()
        with pytest.raises(SystemExit):
            execute.main(Path(words[-1]))
        return 1

    monkeypatch.setattr(launch, "_until_it_ends", one)
    monkeypatch.setattr(execute, "end_with", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="'cuda' needs a GPU"):
        launch.distributed(replace(TINY, device="cuda"), 2)
    bad = replace(TINY, recipe=replace(RECIPE, lr=1e38, clip=None, warmup=0.0))
    with pytest.raises(loop.NonFiniteLoss, match=r"the loss is .* no checkpoint is kept"):
        launch.distributed(bad, 2)


def test_a_run_that_another_process_holds_is_not_waited_for_by_several(run_store):
    with store.held(TINY.hash), pytest.raises(UsageError, match="is held by another process"):
        store.held(TINY.hash, wait=False)


# ---- side by side, and on a cluster


def test_gpus_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for named, found in ((None, ["0", "1"]), ("4,6", ["4", "6"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named) if named else monkeypatch.delenv(
            "CUDA_VISIBLE_DEVICES", False
        )
        assert launch.gpus() == found
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert launch.gpus() == []


@pytest.mark.parametrize(("device", "jobs", "expected"), [
    ("auto", 0, (2, ["0", "1"])), ("auto", 5, (3, ["0", "1"])), ("cpu", 2, (2, [])),
])  # fmt: skip
def test_there_is_a_process_for_each_gpu_unless_more_are_asked_for(monkeypatch, device, jobs, expected):
    seen = []
    monkeypatch.setattr(launch, "gpus", lambda: ["0", "1"])
    monkeypatch.setattr(launch, "_train", lambda todo, jobs, gpus, *_: seen.append((jobs, gpus)))
    launch.launch([replace(TINY, device=device).with_seed(s) for s in (1000, 1001, 1002)], jobs)
    assert seen == [expected]


def test_a_cluster_that_is_not_there_is_said_in_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="there is no command sbatch") as error:
        launch.submit([TINY], tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="hours above 0"):
        launch.submit([TINY], tmp_path, hours=0)


@pytest.mark.slow
def test_a_job_trains_its_run_and_gives_its_metrics(run_store, monkeypatch, tmp_path):
    """On this machine instead of a cluster."""
    submitit = pytest.importorskip("submitit")
    here = partial(submitit.AutoExecutor, cluster="local")
    monkeypatch.setattr(submitit, "AutoExecutor", lambda folder, **_: here(folder))
    monkeypatch.setattr(launch.shutil, "which", lambda _: "sbatch")
    jobs = launch.submit([TINY], tmp_path / "jobs", gpus=0, hours=0.1)
    assert {spec: job.results() for spec, job in jobs.items()} == {TINY: [store.find(TINY).metrics]}
    assert launch.submit([TINY], tmp_path / "jobs", gpus=0) == {}


def test_slurm_gets_what_was_asked_for_and_a_job_waits_for_the_runs_that_it_needs(run_store, monkeypatch, tmp_path):
    pytest.importorskip("submitit")
    # A queue that keeps what it is given and starts nothing.
    for name in ("sbatch", "srun", "scontrol"):
        (tmp_path / name).write_text(FAKE_SLURM.format(folder=tmp_path))
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    other = TINY.with_seed(1001)
    jobs = launch.submit(
        [TUNED, other], tmp_path / "jobs", partition="a100", gpus=4, nodes=2, hours=1.5, cpus=6, memory_gb=90
    )
    assert [(spec, job.job_id) for spec, job in jobs.items()] == [(TINY, "1"), (TUNED, "2"), (other, "3")]
    scripts = [(tmp_path / f"job-{number}").read_text() for number in (1, 2, 3)]
    for script in scripts:
        for line in (
            "--partition=a100",
            "--nodes=2",
            "--gpus-per-node=4",
            "--ntasks-per-node=4",
            "--time=90",
            "--cpus-per-task=6",
            "--mem=90GB",
        ):
            assert f"#SBATCH {line}\n" in script
    assert ["#SBATCH --dependency=afterok:1\n" in script for script in scripts] == [False, True, False]
    from submitit.core.utils import DelayedSubmission

    submitted = [DelayedSubmission.load(path) for path in (tmp_path / "jobs").glob("*_submitted.pkl")]
    assert len(submitted) == 3  # a run of 150 hours is put back into the queue every 90 minutes
    assert all(work._timeout_countdown * work._timeout_min > 60 * 150 for work in submitted)


FAKE_SLURM = """#!/bin/sh
number=$(($(ls {folder}/job-* 2>/dev/null | wc -l) + 1))
cp "$1" {folder}/job-$number
echo "Submitted batch job $number"
"""
