"""Runs from weights that no run of ours trained, and the profile that is made of them."""

import base64
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from lab import paths
from lab.__main__ import main
from lab.claims import evidence, judge
from lab.claims.ledger import ledger
from lab.cost import plan
from lab.data.cards import source
from lab.experiments import catalogue, imagenet, public
from lab.experiments.profiles import profile
from lab.report import counted, tables
from lab.runs import execute, launch, pretrained, store
from lab.runs.results import hash_of, read_runs
from lab.runs.spec import RunSpec
from vitlib.errors import UsageError
from vitlib.files import sha256
from vitlib.model import ViT, vit_config
from vitlib.model.weights import save
from vitlib.train.recipe import Recipe

torch.set_num_threads(1)
MODEL = vit_config("W32-2x1/4", image_size=16, in_chans=1, num_classes=10)
P = profile("public")


@pytest.fixture(autouse=True)
def places(monkeypatch, tmp_path):
    monkeypatch.setenv("VITLIB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("VITLIB_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("VITLIB_WEIGHTS", raising=False)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)


@pytest.fixture
def file(tmp_path):
    save(ViT(replace(MODEL, num_classes=6), seed=3), tmp_path / "trunk.safetensors")
    return tmp_path / "trunk.safetensors"


def tuned(weights, **fields) -> RunSpec:
    recipe = Recipe(epochs=1, batch_size=10, lr=1e-3)
    spec = RunSpec("finetune", MODEL, "digits", recipe, seed=1000, images=50, strategy="attn", weights=str(weights))
    return replace(spec, **fields)


# ---- one run


def test_a_run_starts_from_a_file_and_is_kept_read_and_described_like_any_other(file, tmp_path):
    spec, trunk = (
        tuned(file, model=replace(MODEL, image_size=20)),
        ViT(replace(MODEL, num_classes=6), seed=3).state_dict(),
    )
    result = execute.execute(spec)
    after = store.weights(spec)
    same = {n for n in trunk if trunk[n].shape == after[n].shape and torch.equal(trunk[n], after[n])}
    assert "layers.0.ffn.0.f.fc1.weight" in same and "layers.0.mhsa.0.f.qkv.weight" not in same
    record, again = store.read(tmp_path / "runs" / spec.hash)
    assert record["weights"] == {"sha256": sha256(file)} and again.metrics == result.metrics
    assert launch.launch([spec])[spec].metrics == result.metrics
    assert "finetune" in spec.describe() and "attn, from trunk.safetensors, seed 1000" in spec.describe()
    kinds = plan.gpu_plan([spec], plan.Rate(1.0, "given", "a test"))["kind"]
    assert list(kinds) == ["finetune attn"]


def test_the_hash_is_that_of_the_files_content_wherever_it_is(file, tmp_path):
    copy = tmp_path / "elsewhere.safetensors"
    copy.write_bytes(file.read_bytes())
    assert tuned(copy).hash == tuned(file).hash != tuned(file, seed=1001).hash
    before = tuned(file)
    assert before.hash == tuned(file).hash
    save(ViT(replace(MODEL, num_classes=6), seed=4), file)
    assert tuned(file).hash != before.hash == tuned(copy).hash
    with pytest.raises(UsageError, match=r"the weights .* have changed since the run .* was named"):
        execute.execute(before)
    assert not store.folders()


def test_a_chain_ends_at_the_file_too(file):
    first = tuned(file)
    second = replace(first, parent=first, weights=None, model=replace(MODEL, image_size=20))
    assert [member.hash for member in second.family()] == [first.hash, second.hash]
    assert second.record()["parent"] == first.hash and "weights" not in second.record()
    save(ViT(replace(MODEL, num_classes=6), seed=4), file)
    assert replace(second, parent=replace(first)).hash != second.hash
    assert store.missing([second]) == [first, second]


def test_pairs_of_one_branch_go_into_the_branches_that_a_run_names(file):
    model, _ = execute.prepare(tuned(file, model=replace(MODEL, depth=1, branches=2)), None)
    trunk = ViT(replace(MODEL, num_classes=6), seed=3).state_dict()
    assert torch.equal(model.state_dict()["layers.0.mhsa.1.norm.weight"], trunk["layers.1.mhsa.0.norm.weight"])
    assert torch.equal(model.layers[0].ffn[1].f.fc1.weight, trunk["layers.1.ffn.0.f.fc1.weight"])


def test_the_head_is_fresh_though_it_has_as_many_classes(tmp_path):
    save(trunk := ViT(MODEL, seed=3), tmp_path / "a.safetensors")
    model, _ = execute.prepare(tuned(tmp_path / "a.safetensors", seed=7), None)
    assert not torch.equal(model.head.weight, trunk.head.weight)
    assert torch.equal(model.pos_embed, trunk.pos_embed)


# ---- what is refused


@pytest.mark.parametrize(("change", "said"), [
    ({"image_size": 20, "heads": 2}, "heads 1, not 2"), ({"layer_scale": 1e-4}, "layer_scale none, not there"),
    ({"depth": 3}, "pairs 2, not 3"), ({"width": 64}, "width 32, not 64"), ({"stem": "hmlp"}, "stem linear, not hmlp"),
])  # fmt: skip
def test_weights_of_another_model_are_refused_before_data_is_read(file, monkeypatch, change, said):
    monkeypatch.setattr(execute, "data_of", lambda *_: pytest.fail("data was read"))
    spec = tuned(file, model=replace(MODEL, **change))
    for start in (execute.execute, launch.check):
        with pytest.raises(UsageError, match=rf"trunk.safetensors are of another model than {spec.model.name}: .*{said}") as error:  # fmt: skip
            start(spec)
        assert "\n" not in str(error.value)
    assert not store.folders()


def test_absent_and_unknown_weights_are_one_sentence(tmp_path):
    with pytest.raises(UsageError, match=r"the weights .*gone\.safetensors are not there"):
        execute.execute(tuned(tmp_path / "gone.safetensors"))
    with pytest.raises(UsageError, match="deit9_small is no file of weights and no model of timm"):
        execute.execute(tuned("deit9_small"))
    with pytest.raises(UsageError, match=r"timm has no weights deit_small_patch16_224\.fb"):
        execute.execute(tuned("deit_small_patch16_224.fb"))


def test_a_run_has_a_parent_or_weights_and_only_fine_tuning_has_one(file):
    for change in ({"weights": None}, {"parent": replace(tuned(file))}):
        with pytest.raises(UsageError, match="a finetune run needs a parent or weights, one of them"):
            replace(tuned(file), **change)
    with pytest.raises(UsageError, match="a supervised run has no parent, no weights"):
        replace(tuned(file), protocol="supervised")


# ---- a timm name


def test_a_timm_name_has_a_hash_once_its_file_is_here(monkeypatch, tmp_path):
    name, wanted = "deit3_small_patch16_224.fb_in1k", []
    spec = tuned(name)
    assert spec.record()["weights"] == {"name": name, "sha256": None} and not spec.ready and store.find(spec) is None
    with pytest.raises(UsageError, match=f"the weights {name} are not here, so that their runs have no hash") as error:
        _ = spec.hash
    assert "\n" not in str(error.value) and store.missing([spec]) == [spec]
    child = replace(spec, weights=None, parent=spec)
    assert not child.ready and child.record()["parent"] is None and store.missing([child]) == [spec, child]
    (tmp_path / "model.safetensors").write_bytes(b"weights")

    def cached(repository, file, revision):
        wanted.append((repository, file))
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    assert pretrained.downloaded(name) == tmp_path / "model.safetensors"
    assert wanted == [(f"timm/{name}", "model.safetensors")]
    record = spec.record()
    assert record["weights"] == {"name": name, "sha256": sha256(tmp_path / "model.safetensors")}
    assert spec.hash == hash_of(record) and child.record()["parent"] == spec.hash
    assert tuned("deit_small_patch16_224.fb_in1k").hash != spec.hash  # the name counts


# ---- what was there before


def test_runs_without_weights_keep_their_hashes_and_old_records_are_read():
    """The committed runs of tuning, whose records were written before a run could start from weights."""
    runs = {result.hash: record for record, result in read_runs(paths.REFERENCE / "study" / "tuning-runs.jsonl")}
    assert len(runs) > 100 and not any("weights" in record for record in runs.values())
    spec = catalogue.arms_of(catalogue.small.resolution, profile("study"))["trunk"].spec
    kept = {"b": 1} | spec.record()
    assert "weights" not in kept and {**next(iter(runs.values()))}.keys() == spec.record().keys()


# ---- the profile


def test_the_profile_fine_tunes_alone_and_begins_at_one_public_model():
    specs = catalogue.all_specs(P, catalogue.NOTEBOOKS)
    family = {member for spec in specs for member in spec.family()}
    assert {spec.seed for spec in specs} == {35, 36, 37, 38, 39} and len(family) == 5 * (4 * 3 + 3)
    assert {spec.protocol for spec in family} == {"finetune"}
    assert {spec.weights for spec in family if spec.parent is None} == {"deit3_small_patch16_224.fb_in1k"}
    assert {(s.data, s.model.image_size) for s in family} == {
        *((data, 224) for data in ("cifar-10", "cifar-100", "stanford-cars", "flowers-102")), ("stanford-cars", 384),
    }  # fmt: skip
    for spec in family:
        assert spec.model.num_classes == source(spec.data, streamed=True).facts.num_classes and spec.streamed
        recipe = imagenet.RESOLUTION_ADAMW if spec.parent else imagenet.TRANSFER[spec.data][0]
        assert spec.recipe == recipe and spec.model.drop_path == 0
        assert spec.parent is None or (spec.parent.strategy, spec.parent.data) == ("full", spec.data)


def test_its_own_parts_stand_in_no_other_profiles_tables_and_say_their_scope():
    mine = [part for part in ledger().parts.values() if "public" in part.n]
    assert [part.id for part in mine if part.claim == "F7"] == ["F7-attn", "F7-ffn"] and len(mine) == 6
    for part in mine:
        assert {*part.n} == {"public"} and not part.primary and "fine-tuning seeds and test images alone" in part.title
        assert all("fine-tuning seeds and test images alone" in text for text in part.says.values())
        read = evidence.read_by(part, P)
        assert {spec.seed for spec in read} == {*P.seeds}
        found = evidence.verdict(evidence.Stored(P), part)
        assert (found.label, found.note) == ("not run", f"0 of 5 seeds of {next(iter(part.contrast))}")
    for name in ("cpu", "study", "photos", "imagenet"):
        assert not {part.id for part in mine} & {part.id for part in ledger().shown(name)}
    assert {part.id for part in ledger().shown("public")} == {*ledger().parts}
    assert {*ledger().stamps("public")} == {part.id for part in mine}


def test_a_large_model_that_is_nearly_always_right_is_judged_all_the_same():
    right = np.random.default_rng(0).random((5, 6000)) < 0.98
    part = ledger().part("F8-flowers-102")
    worse = right & (np.arange(6000) % 2000 > 0)
    found = judge.judge(part, "public", dict(zip(part.contrast, (worse, right), strict=True)), 102, {})
    assert found.label == "not worse by 0.3" and "fine-tuning seeds" in found.sentence


def test_its_table_of_splits_needs_no_data():
    splits = counted.splits(catalogue.arms_of(catalogue.small.transfer, P))
    assert list(splits[splits["in"] == "this notebook"]["train"]) == [50_000, 50_000, 8144, 2040]


def test_its_plan_needs_neither_weights_nor_data(capsys):
    assert main(["plan", "--profile", "public", "--device", "h100"]) == 0
    said = capsys.readouterr().out
    assert "75 runs: " in said and "finetune attn" in said and "GPU-hours" in said
    assert main(["plan", "--profile", "public", "--notebook", "31"]) == 2
    said = capsys.readouterr().err
    assert (
        "notebook 31_fig1_branches has no runs at profile public" in said
        and "public.py" in said
        and said.count("\n") == 1
    )


def test_a_run_says_in_one_sentence_what_is_absent(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(paths, "commit", lambda: "unknown")
    monkeypatch.setattr(launch, "resolve", lambda device: device)
    for command in ("run", "reproduce"):
        assert main([command, "--profile", "public", "--notebook", "42"]) == 2
        assert "data set 'flowers-102' is not there" in (said := capsys.readouterr().err) and said.count("\n") == 1
    for name in ("cifar-10", "cifar-100", "stanford-cars", "flowers-102"):
        (tmp_path / "data" / name).mkdir(parents=True)
    monkeypatch.setattr("timm.create_model", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    assert main(["run", "--profile", "public", "--notebook", "42"]) == 2
    said = capsys.readouterr().err
    assert "timm cannot get the weights of deit3_small_patch16_224.fb_in1k (no network): give a file" in said


def test_a_file_takes_the_place_of_the_profiles_weights(monkeypatch, tmp_path):
    config = vit_config("W64-2/16", image_size=32, layer_scale=1e-4, num_classes=7, pos="all")
    save(ViT(config), tmp_path / "mine.safetensors")
    monkeypatch.setenv("VITLIB_WEIGHTS", str(tmp_path / "mine.safetensors"))
    arms = catalogue.arms_of(catalogue.small.transfer, P)
    spec = arms["W64 flowers-102 2040 attn"].spec
    assert spec.weights == str(tmp_path / "mine.safetensors") and len(arms) == 12
    assert spec.model == replace(config, image_size=224, num_classes=102)
    spec.check_start()
    monkeypatch.setenv("VITLIB_WEIGHTS", "gone.pth")
    with pytest.raises(UsageError, match=r"the weights gone\.pth are not there"):
        public.transfer(P)


def test_reproduce_names_the_notebooks_without_runs_once_and_renders_the_others(monkeypatch, capsys):
    rendered = []
    monkeypatch.setattr(
        "lab.report.render.reproduce", lambda p, notebooks, *rest: rendered.append([n.number for n in notebooks])
    )
    assert main(["reproduce", "--profile", "public", "--finished"]) == 0
    said = capsys.readouterr().err
    assert said == "lab: notebooks without runs at profile public: 21, 31, 32, 33, 34, 35, 52, 61\n"
    assert rendered == [["00", "36", "41", "42", "51", "62"]]


def test_a_finished_run_of_the_profile_has_its_row_in_table_6(monkeypatch, tmp_path):
    config = vit_config("W32-1/16", image_size=32, num_classes=7)
    save(ViT(config), tmp_path / "mine.safetensors")
    monkeypatch.setenv("VITLIB_WEIGHTS", str(tmp_path / "mine.safetensors"))
    setting = catalogue.experiment(catalogue.notebook("42"), P)
    about = {"split": "test", "wall_s": 1.0, "cpu_s": 1.0, "mem_mb": 1.0} | dict.fromkeys(
        ("device", "torch", "python", "commit", "date"), "x"
    )
    for i, strategy in enumerate(("full", "attn")):
        for spec in setting.seeds_of(f"W32 flowers-102 2040 {strategy}"):
            right = np.arange(40) < 20 + i
            result = {"hash": spec.hash, "metrics": {"top1": 100 * right.mean()}, "ledger": {}, **about}
            folder = tmp_path / "runs" / spec.hash
            folder.mkdir(parents=True)
            packed = {"images": 40, "bits": base64.b64encode(np.packbits(right).tobytes()).decode()}
            (folder / "spec.json").write_text(json.dumps(spec.record()))
            (folder / "result.json").write_text(json.dumps(result | {"correct": packed}))
    runs = setting.finished()
    shown = tables.printed(tables.transfer(runs, replace(runs, results={})))
    assert len(runs.results) == 2 and any("50.00" in cell for cell in map(str, shown.to_numpy().ravel()))
    assert any("+2.50" in cell for cell in map(str, shown.to_numpy().ravel())) and "top1, scratch" not in shown
