"""Experiments: which runs each notebook has at each profile, and the recipes of their arms, value by value."""

from __future__ import annotations

import functools
import math
import shutil
import tomllib
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lab import paths
from lab.claims import evidence, exact, tuning
from lab.claims.ledger import ledger, record_hash
from lab.cost.count import macs
from lab.data import cards
from lab.data.cards import Facts, card, load
from lab.experiments import catalogue, imagenet, profiles, small
from lab.experiments.catalogue import Notebook, notebook
from lab.experiments.profiles import profile
from lab.runs import spec as specs
from lab.runs.spec import TRAINING_VERSION, RunSpec
from tools import ledger as ledger_file
from vitlib.data import subset
from vitlib.data.augment import Augment
from vitlib.errors import UsageError
from vitlib.model import ViT, vit_config
from vitlib.train import loop
from vitlib.train.dvae import DVAEConfig
from vitlib.train.recipe import Recipe

torch.set_num_threads(1)
IMAGENET = 1_281_167


@functools.cache
def experiment(number: str, name: str) -> catalogue.Experiment:
    return catalogue.experiment(notebook(number), profile(name))


def specs_of(number: str, name: str) -> dict[str, RunSpec]:
    """The runs of a notebook by label, without seeds."""
    return {label: arm.spec for label, arm in experiment(number, name).arms.items()}


# Written down from the paper's section on training, procedure A2 and the released commands; nothing is read from imagenet.py.
A2 = {
    "batch_size": 2048, "optimizer": "lamb", "weight_decay": 0.02, "betas": (0.9, 0.999), "min_lr": 1e-6, "clip": None,
    "loss": "bce", "flip": True, "mixup": 0.1, "cutmix": 1.0, "smoothing": 0.0, "repeats": 3, "ema": None,
    "layer_decay": None, "augment.policy": "rand-m7-mstd0.5-inc1", "augment.crop_scale": (0.08, 1.0),
    "augment.color_jitter": 0.0, "augment.erasing": 0.0, "augment.test_crop": 0.95, "augment.interpolation": "bicubic",
    "augment.view_size": None,
}  # fmt: skip
M9 = {
    "loss": "cross_entropy", "flip": True, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1,
    "augment.policy": "rand-m9-mstd0.5-inc1", "augment.interpolation": "bicubic", "augment.crop_scale": (0.08, 1.0),
}  # fmt: skip
STATED = {
    "Ti": (imagenet.supervised_recipe("Ti"), A2 | {"epochs": 300, "lr": 4e-3, "warmup": 5 / 300}),
    "S": (imagenet.supervised_recipe("S"), A2 | {"epochs": 300, "lr": 4e-3, "warmup": 5 / 300}),
    "B": (imagenet.supervised_recipe("B"), A2 | {"epochs": 300, "lr": 3e-3, "warmup": 5 / 300}),
    "L": (imagenet.supervised_recipe("L"), A2 | {"epochs": 300, "lr": 3e-3, "warmup": 5 / 300}),
    "L with LayerScale": (imagenet.supervised_recipe("L", 400), A2 | {"epochs": 400, "lr": 3e-3, "warmup": 5 / 400}),
    "DeiT": (imagenet.DEIT, M9 | {
        "epochs": 300, "batch_size": 1024, "lr": 1e-3, "optimizer": "adamw", "weight_decay": 0.05, "warmup": 5 / 300,
        "min_lr": 1e-5, "clip": None, "repeats": 3, "ema": 0.99996, "augment.erasing": 0.25, "augment.test_crop": 0.875,
    }),
    "Table 5, AdamW": (imagenet.RESOLUTION_ADAMW, M9 | {
        "epochs": 20, "batch_size": 512, "lr": 1e-5, "optimizer": "adamw", "weight_decay": 0.1, "warmup": 5 / 20,
        "min_lr": 1e-5, "clip": None, "repeats": 1, "ema": None, "augment.erasing": 0.0, "augment.test_crop": 1.0,
    }),
    "Table 5, SGD": (imagenet.RESOLUTION_SGD, M9 | {
        "epochs": 20, "batch_size": 512, "lr": 1e-2, "optimizer": "sgd", "weight_decay": 1e-4, "warmup": 5 / 20,
        "clip": None, "repeats": 1, "ema": None, "augment.erasing": 0.0, "augment.test_crop": 1.0,
    }),
    "BEiT pre-training": (imagenet.BEIT_PRETRAINING, {
        "epochs": 300, "batch_size": 2048, "lr": 1.5e-3, "optimizer": "adamw", "weight_decay": 0.05,
        "betas": (0.9, 0.98), "min_lr": 1e-5, "warmup": 10 / 300, "clip": 3.0, "mixup": 0.0, "cutmix": 0.0, "flip": True,
        "repeats": 1, "augment.policy": "none", "augment.view_size": 112, "augment.interpolation": "bicubic",
        "augment.erasing": 0.0,
    }),
    "BEiT fine-tuning": (imagenet.BEIT_FINE_TUNING, M9 | {
        "epochs": 100, "batch_size": 1024, "lr": 4e-3, "optimizer": "adamw", "weight_decay": 0.05,
        "betas": (0.9, 0.999), "min_lr": 1e-6, "warmup": 20 / 100, "clip": None, "layer_decay": 0.65, "repeats": 1,
        "ema": None, "augment.color_jitter": 0.4, "augment.erasing": 0.25, "augment.test_crop": 224 / 256,
    }),
}  # fmt: skip


def value(recipe: Recipe, path: str) -> object:
    for name in path.split("."):
        recipe = getattr(recipe, name)
    return recipe


@pytest.mark.parametrize("name", STATED)
def test_a_recipe_has_the_stated_values_one_by_one(name):
    recipe, stated = STATED[name]
    assert {path: value(recipe, path) for path in stated} == stated


def test_every_field_of_the_papers_own_recipe_is_compared():
    names = {f.name for f in fields(Recipe)} - {"augment"} | {f"augment.{f.name}" for f in fields(Augment)}
    assert names == set(STATED["B"][1])


def test_stochastic_depth_goes_by_width():
    assert imagenet.DROP_PATH == {"Ti": 0.0, "S": 0.05, "B": 0.1, "L": 0.4}
    assert imagenet.RESOLUTION_DROP_PATH == {"S": 0.0, "B": 0.15, "L": 0.4}


# (recipe, steps of warm-up, steps): epochs of 626, 1252 and 2503 steps, warm-ups of 5, 10 and 20 epochs
WARMUPS = {
    "5 of 300 epochs": (imagenet.supervised_recipe("B"), 5 * 626, 300 * 626),
    "5 of 400 epochs": (imagenet.supervised_recipe("L", 400), 5 * 626, 400 * 626),
    "DeiT": (imagenet.DEIT, 5 * 1252, 300 * 1252),
    "Table 5": (imagenet.RESOLUTION_ADAMW, 5 * 2503, 20 * 2503),
    "BEiT pre-training": (imagenet.BEIT_PRETRAINING, 10 * 626, 300 * 626),
    "BEiT fine-tuning": (imagenet.BEIT_FINE_TUNING, 20 * 1252, 100 * 1252),
}


@pytest.mark.parametrize("name", WARMUPS)
def test_a_warm_up_lasts_whole_epochs_and_ends_at_the_peak(name):
    recipe, warmup, steps = WARMUPS[name]
    assert loop.count_steps(recipe, IMAGENET) == steps == recipe.epochs * math.ceil(IMAGENET / recipe.batch_size)
    plain = replace(recipe, layer_decay=None)
    optimizer, schedule = loop.make_optimizer(torch.nn.Linear(2, 2), plain, steps)
    rates = {}
    for step in (0, 1, warmup - 1, warmup, steps):
        schedule.step_update(step)
        rates[step] = optimizer.param_groups[0]["lr"]
    assert rates[0] == pytest.approx(recipe.lr / (warmup + 1))
    assert rates[0] < rates[1] < rates[warmup - 1] < rates[warmup] == pytest.approx(recipe.lr)
    assert rates[steps] == pytest.approx(recipe.min_lr)


def test_lamb_brings_the_only_clipping_of_procedure_a2():
    recipe = imagenet.supervised_recipe("B")
    optimizer, _ = loop.make_optimizer(torch.nn.Linear(2, 2), recipe, 1000)
    assert type(optimizer).__name__ == "Lamb" and optimizer.defaults["max_grad_norm"] == 1.0 and recipe.clip is None


def test_sgd_differs_from_adamw_in_the_optimizer_its_rate_and_its_decay_alone():
    same = {"optimizer": "adamw", "lr": 1e-5, "weight_decay": 0.1}
    assert replace(imagenet.RESOLUTION_SGD, **same) == imagenet.RESOLUTION_ADAMW


SIX = ("inaturalist-2018", "inaturalist-2019", "cifar-10", "cifar-100", "stanford-cars", "flowers-102")


@pytest.mark.parametrize("data", SIX)
def test_each_set_of_table_6_has_the_first_authors_values(data):
    recipe, drop_path = imagenet.TRANSFER[data]
    large = data.startswith("inaturalist")
    found = (recipe.optimizer, recipe.lr, recipe.weight_decay, recipe.epochs, recipe.augment.erasing, drop_path)
    assert found == (("adamw", 7.5e-5, 0.05, 360, 0.1, 0.1) if large else ("sgd", 1e-2, 1e-4, 1000, 0.0, 0.0))
    assert (recipe.batch_size, recipe.repeats, recipe.warmup * recipe.epochs) == (768, 3, 5)
    assert {path: value(recipe, path) for path in M9} == M9


def test_beits_model_has_layer_scale_one_relative_bias_and_a_mean_readout():
    assert imagenet.BEIT_MODEL == {
        "layer_scale": 0.1, "drop_path": 0.1, "pos": "relative", "pool": "mean",
        "shrink_deep": True, "head_scale": 0.001, "key_bias": False,
    }  # fmt: skip
    with torch.device("meta"):
        model = ViT(vit_config("B12", **imagenet.BEIT_MODEL))
    assert model.pos_embed is None and model.relative.table.shape == (27 * 27 + 3, 12)


def test_75_of_196_patches_are_masked_and_the_tokenizer_gives_each_patch_a_token():
    beit, tokenizer = vit_config("B12", **imagenet.BEIT_MODEL), DVAEConfig(in_chans=3, **imagenet.TOKENIZER_MODEL)
    assert (imagenet.BEIT_MASKED, beit.grid**2, tokenizer.grid) == (75, 196, beit.grid)
    assert (tokenizer.vocabulary, tokenizer.image_size) == (8192, imagenet.BEIT_PRETRAINING.augment.view_size)
    assert loop.count_steps(imagenet.TOKENIZER, IMAGENET) == 480 * 2503 >= 1_200_000


def test_recipes_of_small_images_have_nothing_that_is_for_images_read_from_files():
    plain = Recipe(epochs=1, batch_size=1, lr=1.0)
    recipes = {m.recipe for p in (profile("study"), profile("smoke")) for s in all_specs(p) for m in s.family()}
    assert len(recipes) > 15
    for recipe in recipes:
        for name in ("augment", "cutmix", "smoothing", "repeats", "ema", "mixup", "layer_decay"):
            assert getattr(recipe, name) == getattr(plain, name)


# ---- arms of the notebooks


EMBEDDED = [name for name, p in profiles.PROFILES.items() if "sha256" in card(p.data)["vitlib"]]
TINY_IMAGENET = Facts(3, 100, 64, (0.48, 0.45, 0.4), (0.28, 0.27, 0.28), {"train": 22_400, "test": 2500})


@pytest.fixture
def photos(monkeypatch) -> profiles.Profile:
    """The profile of photographs, as it is where they are."""
    real = cards.source

    def source(name: str, streamed: bool = False) -> cards.Source:
        known = real("fashion-mnist")
        return replace(known, name=name, facts=TINY_IMAGENET) if name == "tiny-imagenet" else real(name, streamed)

    for module in (small, specs, tuning):
        monkeypatch.setattr(module, "source", source)
    return profile("photos")


def all_specs(p: profiles.Profile) -> list[RunSpec]:
    return catalogue.all_specs(p, catalogue.NOTEBOOKS)


def test_the_arms_of_every_profile():
    """By notebook: the labels, and how many seeds where they are fewer than the profile's."""
    deep = {"36x1+LS": 10, "18x2+LS": 10, "12x1": 10, "6x2": 10, "36x1": 10, "18x2": 10}
    strategies = dict.fromkeys(("trunk", "full", "attn", "ffn"))
    both = {f"{stem} {t}": None for t in ("supervised", "pretrained") for stem in ("linear", "hmlp", "conv")}
    expected = {
        ("cpu", "31"): {"12x1+LS": None, "6x2+LS": None}, ("study", "31"): {"12x1+LS": None, "6x2+LS": None, "6x2+LS, rate of 12x1+LS": None} | deep,
        ("cpu", "33"): {}, ("study", "33"): {k: 10 for k in ("12x1", "6x2", "36x1", "18x2")},
        ("cpu", "32"): {}, ("study", "32"): {}, ("cpu", "35"): {}, ("study", "35"): {}, ("cpu", "34"): {}, ("cpu", "42"): {},
        ("study", "34"): {"12x1+LS": None, "6x2+LS": None} | deep,
        ("cpu", "41"): strategies,
        ("study", "41"): strategies | dict.fromkeys(("head", "fc1", "norm", "bias", "full, fewer steps")),
        ("study", "42"): {f"digits 100 {s}, subset {k}": None for s in ("full", "attn", "scratch") for k in (1, 2, 3)},
        ("cpu", "52"): dict.fromkeys(both, 2),
        ("study", "52"): both | {"linear scratch 500": None, "linear pretrained 500": None, "conv blanked pretrained": 10},
    }  # fmt: skip
    for (name, number), arms in expected.items():
        setting = experiment(number, name)
        assert {label: arm.n for label, arm in setting.arms.items()} == arms, (name, number)
        for label, arm in setting.arms.items():
            made = setting.seeds_of(label)
            assert [spec.seed for spec in made] == list(setting.profile.seeds[: arm.n])
            assert len(made) == (arm.n or len(setting.profile.seeds))


def test_photographs_have_the_arms_of_the_primary_parts_h9_and_their_controls(photos):
    labels = {number: set(catalogue.experiment(notebook(number), photos).arms) for number in ("31", "41", "52")}
    assert labels["31"] == {"12x1+LS", "6x2+LS", "36x1+LS"}
    assert labels["41"] == {"trunk", "full", "attn", "ffn", "full, fewer steps"}
    stems = {f"{stem} {t}" for stem in ("linear", "hmlp", "conv") for t in ("supervised", "pretrained")}
    assert labels["52"] == stems | {"linear scratch 2000", "linear pretrained 2000", "conv blanked pretrained"}
    runs = all_specs(photos)
    assert {spec.seed for spec in runs} == {20, 21, 22, 23, 24} and {spec.split for spec in runs} == {"test"}
    assert {(spec.model.in_chans, spec.model.num_classes) for spec in runs} == {(3, 100)}
    assert {spec.model.grid**2 for spec in runs if spec.model.image_size == 64} == {16} and {
        s.device for s in runs
    } == {"auto"}


@pytest.mark.parametrize("name", EMBEDDED)
def test_every_profile_lists_its_runs_and_shares_trunks(name):
    p = profiles.profile(name)
    queue = evidence.queue(p, catalogue.NOTEBOOKS)
    seeds = [spec.seed for spec in queue]
    assert set(seeds) == set(p.seeds) and len(set(queue)) == len(queue) and set(queue) == set(all_specs(p))
    arms = {n: specs_of(n, name) for n in ("31", "41", "52")}
    assert arms["41"]["trunk"] == arms["31"][f"{p.pairs}x1+LS"] == arms["41"]["attn"].parent
    family = {member.hash for spec in queue for member in spec.family()}
    assert len(family) < sum(1 for spec in queue for _ in spec.family())
    assert (name == "smoke") == all(spec.split == "validation" for spec in queue)


def test_the_queue_makes_whole_verdicts_primary_ones_first_and_seeds_outermost():
    p = profile("study")
    place = {spec: i for i, spec in enumerate(evidence.queue(p, catalogue.NOTEBOOKS))}

    def last(part) -> int:
        return max(place[spec] for spec in evidence.read_by(part, p))

    parts = [part for part in ledger().parts.values() if part.kind not in ("exact", "ratio") and "study" in part.n]
    primary = [part for part in parts if part.primary]
    assert [part.id for part in primary] == ["A1", "F1", "F2-full", "H4-linear", "H8-retention"]
    assert max(map(last, primary)) < min(last(part) for part in parts if part.id in ("P2-1", "P5", "F5-digits", "H9"))
    assert [last(part) for part in primary] == sorted(last(part) for part in primary)
    rest = specs_of("41", "study")["bias"].with_seed(p.seeds[0])  # no claim reads it
    assert all(last(part) < place[rest] for part in parts)
    first = specs_of("31", "study")["12x1+LS"]
    assert [place[first.with_seed(seed)] for seed in p.seeds] == sorted(
        place[first.with_seed(seed)] for seed in p.seeds
    )
    control = evidence.read_by(ledger().part("A1"), p)
    assert [spec.seed for spec in control if spec.model.pairs == 36] == list(range(40, 50))  # ten seeds of the control
    assert [spec.seed for spec in control if spec.model.branches == 2] == list(range(40, 60))
    with pytest.raises(UsageError, match="part P2-1 has no runs at profile cpu"):
        evidence.part_specs([ledger().part("P2-1")], profile("cpu"))
    named = evidence.part_specs([ledger().part("F1"), ledger().part("F2-full")], p)
    assert len(named) == len(set(named)) == 4 * 20


@pytest.mark.parametrize("name", [*EMBEDDED, "imagenet", "photos", "public"])
def test_every_arm_that_the_ledger_names_is_an_arm_of_its_notebook(name, photos):
    p, read = profile(name), 0
    for part in ledger().parts.values():
        if name in part.n and part.kind not in ("exact", "ratio"):
            arms = catalogue.experiment(notebook(part.notebook), p).arms
            assert set(part.at_profile(name).arms) <= set(arms), part.id
            for label in part.at_profile(name).contrast:
                assert len(p.seeds[: arms[label].n]) >= part.n[name], (part.id, label)
            read += 1
    assert read == {"smoke": 0, "cpu": 4, "study": 17, "photos": 13, "imagenet": 33, "public": 6}[name]
    labels = {label for arms in ledger_file.read_arms(p).values() for label in (arm.label for arm in arms)}
    assert bool(labels) == (read > 0)


def test_recipes_toml_is_what_the_code_trains(tmp_path, monkeypatch, capsys):
    assert ledger_file.recipes() == (paths.PAPER / "recipes.toml").read_text(encoding="utf-8")
    assert ledger_file.main(["--check"]) == 0
    rates = {**profile("study").rates, "attn": 1e-2}
    monkeypatch.setitem(profiles.PROFILES, "study", replace(profile("study"), rates=rates))
    ledger_file._with_another_rate.cache_clear()
    assert ledger_file.main(["--check"]) == 1 and "recipes.toml is not what the code trains" in capsys.readouterr().out
    changed = tomllib.loads(ledger_file.recipes())["study"]
    fixed = ledger().recipes["study"]
    moved = {(n, arm) for n, arms in changed.items() for arm in arms if arms[arm] != fixed[n][arm]}
    assert moved == {("41", "attn")} and changed["41"]["attn"]["rates"] == fixed["41"]["attn"]["rates"] | {"attn": 1e-2}
    monkeypatch.undo()
    ledger_file._with_another_rate.cache_clear()


def test_recipes_toml_is_written_whole_and_keeps_the_entries_of_data_that_is_not_here(tmp_path, monkeypatch, photos):
    monkeypatch.setattr(paths, "PAPER", tmp_path)
    for name in ("claims.toml", "recipes.toml"):
        shutil.copy(Path(paths.ROOT, "outputs", "paper", name), tmp_path)
    monkeypatch.setattr(ledger_file, "locate", lambda name: tmp_path)  # the photographs are here
    text = ledger_file.recipes()
    written = tomllib.loads(text)["photos"]
    arms = written["52"]
    assert set(written) == {"31", "41", "52"} and arms["hmlp pretrained"]["n"] == 5
    assert arms["linear scratch 2000"]["rates"] == {"linear scratch 2000": photos.rates["linear scratch 2000"]}
    (tmp_path / "recipes.toml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(ledger_file, "locate", lambda name: None)  # and now they are not
    assert ledger_file.recipes() == text and ledger_file.main([]) == 0
    assert (tmp_path / "recipes.toml").read_text(encoding="utf-8") == text
    assert set(ledger(tmp_path).stamps("photos")) == {
        part.id for part in ledger(tmp_path).parts.values() if "photos" in part.n
    }


def test_an_arm_that_the_ledger_names_and_no_notebook_has_is_refused_in_one_sentence(monkeypatch):
    some = ledger()
    part = replace(some.part("A1"), contrast={"6x2+LS": 1.0, "12x1+SL": -1.0})
    monkeypatch.setattr(ledger_file, "ledger", lambda: replace(some, parts={"A1": part}))
    with pytest.raises(UsageError, match=r"names arm '12x1\+SL' of notebook 31, which profile study does not have"):
        ledger_file.read_arms(profile("study"))


def test_the_rates_of_an_arm_are_those_that_make_another_run_of_it_and_of_what_it_begins_with():
    fixed = ledger().recipes["study"]
    rates = {(n, arm): set(recipe["rates"]) for n, arms in fixed.items() for arm, recipe in arms.items()}
    assert rates["31", "6x2+LS"] == {"6x2+LS"} and rates["41", "attn"] == {"12x1+LS", "attn"}
    assert rates["41", "full, fewer steps"] == {"12x1+LS", "full"} == rates["41", "full"]
    assert rates["42", "digits 100 attn, subset 2"] == {"12x1+LS", "digits 100 attn"}
    assert rates["42", "digits 100 scratch, subset 2"] == {"digits 100 scratch"}
    assert rates["52", "hmlp pretrained"] == {"hmlp masked", "hmlp pretrained"}
    assert (
        rates["52", "conv blanked pretrained"] == {"conv masked", "conv pretrained"} == rates["52", "conv pretrained"]
    )
    assert rates["52", "linear pretrained 500"] == {"linear masked", "linear pretrained 500"}
    assert all(not recipe["rates"] for arms in ledger().recipes["cpu"].values() for recipe in arms.values())


def record_of(label: str, number: str = "52", name: str = "study") -> str:
    return ledger().recipes[name][number][label]["record"]


def test_the_hash_of_a_recipe_does_not_depend_on_the_seed_and_changes_with_what_a_run_begins_with():
    spec = specs_of("52", "study")["hmlp pretrained"]

    def of(spec: RunSpec) -> str:
        return record_hash([member.record() for member in spec.family()])

    assert of(spec) == of(spec.with_seed(1000)) == record_of("hmlp pretrained")
    masked = spec.parent
    others = [
        replace(spec, parent=replace(masked, blank=True)), replace(spec, parent=replace(masked, masked=5)),
        replace(spec, images=100), replace(spec, recipe=replace(spec.recipe, lr=1.0)),
        replace(spec, parent=replace(masked, tokenizer=replace(masked.tokenizer, recipe=replace(masked.tokenizer.recipe, lr=1.0)))),
    ]  # fmt: skip
    assert len({of(spec), *map(of, others)}) == 6


FORMS = ("32", "33", "34", "35")


def test_the_forms_have_few_runs_at_smoke_and_share_those_of_figure_1():
    assert [len(specs_of(n, "smoke")) for n in FORMS] == [4, 4, 4, 3]
    shared = [set(specs_of(n, "study").items()) for n in ("33", "34")]
    assert all(arms <= set(specs_of("31", "study").items()) for arms in shared)
    costs = [macs(spec.model).paper for spec in specs_of("35", "smoke").values()]
    assert max(costs) < 1.05 * min(costs)  # more pairs and more width, at like cost


@pytest.mark.parametrize(("number", "name"), [("31", "study"), ("32", "smoke"), ("33", "smoke"), ("34", "study")])
def test_one_branch_and_two_of_one_form_start_from_identical_tensors_and_differ_in_their_rate_alone(number, name):
    twins = {}
    for label, spec in specs_of(number, name).items():
        if "rate of" in label:  # an arm that was added after a verdict
            continue
        model = replace(spec.model, depth=spec.model.pairs, branches=1)
        twins.setdefault(replace(spec, model=model, recipe=replace(spec.recipe, lr=1.0)), []).append(spec)
    found = [forms for forms in twins.values() if len(forms) == 2]
    assert len(found) == len(twins) if number != "31" else len(found) >= 4
    for forms in found[:2]:
        own = []
        for spec in forms:
            model = ViT(spec.model, seed=1000)
            branches = [(m, f) for layer in model.layers for m, f in zip(layer.mhsa, layer.ffn, strict=True)]
            tensors = [t for m, f in branches for t in (*m.state_dict().values(), *f.state_dict().values())]
            rest = [t for n, t in model.state_dict().items() if not n.startswith("layers.")]
            own.append(tensors + rest)
        assert len(own[0]) == len(own[1]) and all(torch.equal(a, b) for a, b in zip(*own, strict=True))


@pytest.mark.parametrize("name", ["study", "cpu"])
def test_strategies_differ_in_what_they_train_and_its_rate_alone(name):
    arms, p = specs_of("41", name), profile(name)
    full = arms["full"]
    for label, spec in arms.items():
        if label in ("trunk", "full, fewer steps"):
            continue
        assert (spec.strategy, spec.recipe.lr) == (label, p.rate(label))
        assert replace(spec, strategy="full", recipe=full.recipe) == full
    assert (full.parent, full.images, full.model.image_size, full.recipe.epochs) == (arms["trunk"], 6000, 20, 1)


def test_the_control_of_thing_2_sees_half_of_the_images_once_each_and_so_has_half_of_the_steps():
    arms = specs_of("41", "study")
    full, fewer = arms["full"], arms["full, fewer steps"]
    assert replace(fewer, images=full.images) == full
    assert (fewer.images, fewer.recipe.epochs, fewer.steps, full.steps) == (3000, 1, 47, 94)
    held = load("fashion-mnist", "train")
    half, whole = (set(subset(held, n, 40)) for n in (3000, 6000))
    assert half < whole  # no image that `full` does not see


@pytest.mark.parametrize("name", ["study", "cpu", "smoke"])
def test_thing_3_has_algorithm_1_at_patch_8_and_16_tokens(name):
    p, arms = profile(name), specs_of("52", name)
    for label, spec in arms.items():
        m = spec.model
        assert (m.image_size, m.patch_size, m.grid**2, m.pool, m.pairs) == (32, 8, 16, "mean", p.stems.pairs), label
        assert m.stem == label.split()[0] and m.stem_width == (p.stems.hidden if m.stem == "hmlp" else None)
    assert p.stems.hidden == p.width  # 64 channels inside the stem, where width / 4 would be 16
    model = ViT(arms["hmlp supervised"].model)
    convs = [m for m in model.stem.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [(c.kernel_size[0], c.stride[0], c.out_channels) for c in convs] == [
        (2, 2, p.width),
        (2, 2, p.width),
        (2, 2, p.width),
    ]


def test_photographs_have_algorithm_1_unchanged(photos):
    arms = catalogue.arms_of(small.stems, photos)
    model = ViT(arms["hmlp supervised"].spec.model)
    convs = [m for m in model.stem.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [(c.kernel_size[0], c.in_channels, c.out_channels) for c in convs] == [(4, 3, 64), (2, 64, 64), (2, 64, 64)]
    few = arms["linear pretrained 2000"].spec
    assert (few.images, few.parent) == (2000, arms["linear pretrained"].spec.parent)


def test_arms_of_table_7_differ_only_in_what_is_compared():
    arms, p = specs_of("52", "study"), profile("study")
    epochs = {"supervised": 8, "pretrained": 2}
    for training in epochs:
        linear = arms[f"linear {training}"]
        assert linear.recipe.epochs == epochs[training] and linear.images is None  # all labels
        for stem in ("hmlp", "conv"):
            spec = arms[f"{stem} {training}"]
            assert spec.recipe == replace(linear.recipe, lr=p.rate(f"{stem} {training}"))
            assert replace(spec, model=linear.model, recipe=linear.recipe, parent=linear.parent) == linear
            if training == "pretrained":
                trunk = spec.parent
                recipe = replace(linear.parent.recipe, lr=p.rate(f"{stem} masked"))
                assert trunk == replace(linear.parent, model=spec.model, recipe=recipe)
    trunk = arms["linear pretrained"].parent
    assert (trunk.recipe.epochs, trunk.masked, trunk.targets, trunk.blank, trunk.images) == (8, 6, "dvae", False, None)
    few, scratch = arms["linear pretrained 500"], arms["linear scratch 500"]
    assert (few.images, few.recipe.epochs, few.parent) == (500, 24, trunk)
    assert scratch == replace(few, protocol="supervised", parent=None, recipe=scratch.recipe)
    assert scratch.recipe == replace(few.recipe, lr=p.rate("linear scratch 500"))


def test_h9_differs_in_the_blanked_pixels_of_pre_training_alone():
    arms = specs_of("52", "study")
    blanked, conv = arms["conv blanked pretrained"], arms["conv pretrained"]
    assert blanked == replace(conv, parent=replace(conv.parent, blank=True)) and not conv.parent.blank
    assert not any(m.blank for label, spec in arms.items() if "blanked" not in label for m in spec.family())


def test_the_hash_of_a_run_of_each_protocol_is_what_this_training_version_gives():
    """A field, a default or a recipe that changes would make runs that are stored under these names untraceable."""
    assert TRAINING_VERSION == 3, "new numbers, new names: write them down here"
    p = profile("study")
    p = replace(p, rates=dict.fromkeys(p.rates, 1e-3))  # whatever tuning chose
    resolution, stems = (catalogue.arms_of(table, p) for table in (small.resolution, small.stems))
    masked = stems["linear pretrained"].spec.parent
    some = (resolution["trunk"].spec, resolution["attn"].spec, masked, masked.tokenizer)
    assert {spec.protocol: spec.with_seed(40).hash for spec in some} == {
        "supervised": "814d445e03a4c67a", "finetune": "114da20d28ce0975", "masked": "02e6e8aae0836eef",
        "tokenizer": "ab423da23ae216e2",
    }  # fmt: skip


def test_all_stems_predict_the_tokens_of_one_tokenizer_a_seed():
    study = experiment("52", "study")
    for seed in study.profile.seeds:
        trunks = {spec.with_seed(seed).parent for spec in (arm.spec for arm in study.arms.values()) if spec.parent}
        assert {trunk.tokenizer for trunk in trunks} == {small.tokenizer(study.profile).with_seed(seed)}
        assert len(trunks) == 4 and len({trunk.model for trunk in trunks}) == 3  # blanked: the convolutional one again
    for name, number in (("smoke", 1), ("cpu", 0), ("study", 20)):
        family = {m for spec in experiment("52", name).specs() for m in spec.family()}
        assert sum(m.protocol == "tokenizer" for m in family) == number


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_further_stem_is_one_row_trained_everywhere_at_the_linear_stems_rates_and_changes_no_other_arm(
    name, monkeypatch
):
    def specs() -> dict[str, RunSpec]:
        return {label: arm.spec for label, arm in catalogue.arms_of(small.stems, profile(name)).items()}

    before, row = specs(), {"stem": "hmlp", "stem_act": "none"}
    for table in (small.STEM_ARMS, small.EXTRA_STEMS):
        monkeypatch.setitem(table, "hmlp-plain", row)
    after = specs()
    plain = {label: after.pop(label) for label in (f"hmlp-plain {t}" for t in ("supervised", "pretrained"))}
    assert after == before
    for label, spec in plain.items():
        linear, hmlp = (before[f"{stem} {label.split()[1]}"] for stem in ("linear", "hmlp"))
        assert spec.recipe == linear.recipe and spec.model == replace(hmlp.model, stem_act="none")
        assert (spec.parent and spec.parent.recipe) == (linear.parent and linear.parent.recipe)


def test_the_extra_pair_costs_one_pair_and_the_rest_of_table_7_has_as_many_pairs_as_the_linear_stem():
    p = profiles.PROFILES["study"]
    models = {name: small.stem_model(p, name) for name in small.STEM_ARMS}
    assert {name: m.pairs - p.stems.pairs for name, m in models.items() if m.pairs != p.stems.pairs} == {"linear+1": 1}
    N, D = models["linear"].tokens, p.width
    pair = 12 * N * D**2 + 2 * N**2 * D + 2 * 5 * N * D  # qkv, proj, fc1, fc2; the two products of attention; two norms
    assert exact.size(models["linear+1"]).macs - exact.size(models["linear"]).macs == pair
    assert {m.pool for m in models.values()} == {"mean"}


@pytest.mark.parametrize("name", ["study", "smoke"])
def test_the_arms_of_transfer_are_what_their_names_say_and_start_from_the_trunk_of_their_width(name):
    arms, p = specs_of("42", name), profile(name)
    trunk = arms["digits 100 full, subset 1"].parent
    assert (trunk.model.width, trunk.data, trunk.model.num_classes, trunk.parent) == (
        p.width,
        "fashion-mnist-6",
        6,
        None,
    )
    for label, spec in arms.items():
        setting, _, k = label.partition(", subset ")
        data, images, strategy = setting.split()
        assert (spec.data, spec.images, spec.subset) == (data, int(images), int(k))
        assert (spec.model.width, spec.model.num_classes, spec.model.image_size) == (p.width, 10, 16)
        assert spec.recipe.lr == p.rate(setting) and not spec.recipe.flip
        if strategy == "scratch":
            assert (spec.protocol, spec.parent) == ("supervised", None)
        else:
            assert (spec.protocol, spec.strategy, spec.parent) == ("finetune", strategy, trunk)
        full = arms[f"digits 100 full, subset {k}"]
        assert replace(spec, recipe=full.recipe, strategy="full", protocol="finetune", parent=trunk) == full
        assert replace(spec.recipe, lr=1.0) == replace(full.recipe, lr=1.0)  # labels and steps of `full`
    assert len(arms) == (9 if name == "study" else 3) and "scratch" in "".join(arms)


def test_the_subsets_of_one_seed_are_class_balanced_and_others():
    whole = load("digits", "train")
    rows = {(seed, k): subset(whole, 100, seed, k) for seed in (40, 41) for k in (1, 2, 3)}
    for chosen in rows.values():
        assert set(np.bincount(whole.labels.numpy()[chosen], minlength=10)) == {10} and len(set(chosen)) == 100
    assert len({tuple(sorted(chosen)) for chosen in rows.values()}) == 6
    shared = [len({*rows[40, a]} & {*rows[40, b]}) for a, b in ((1, 2), (1, 3), (2, 3))]
    assert max(shared) < 40  # of 1,000 images


def test_smoke_takes_seconds_and_has_every_kind_of_run():
    runs = [spec for one in catalogue.experiments(profile("smoke"), catalogue.NOTEBOOKS) for spec in one.specs()]
    family = {m for spec in runs for m in spec.family()}
    assert {m.protocol for m in family} == {"supervised", "finetune", "masked", "tokenizer"}
    assert {m.seed for m in family} == {1000} and all(m.steps < 150 for m in family)


# ---- a notebook of one's own


def test_a_notebook_of_ones_own_works_or_says_why_not_at_every_profile(monkeypatch, capsys):
    mine = Notebook("37", "37_mine", small.branches)
    monkeypatch.setattr(catalogue, "NOTEBOOKS", (*catalogue.NOTEBOOKS, mine))
    assert notebook("37") is notebook("notebooks/37_mine.ipynb") is mine
    for name in EMBEDDED:
        assert catalogue.experiment(mine, profile(name)).arms == experiment("31", name).arms
        assert catalogue.available(profile(name), [mine]) == ([mine], [])
    says = (
        "notebook 37_mine has no runs at profile imagenet: its record in lab/experiments/catalogue.py names no function"
    )
    p = profile("imagenet")
    with pytest.raises(UsageError, match=says):
        catalogue.experiment(mine, p)
    with pytest.raises(UsageError, match=says):
        catalogue.all_specs(p, [mine])
    there, absent = catalogue.available(p, catalogue.NOTEBOOKS)
    without = [one for one in catalogue.NOTEBOOKS if one.small and not one.imagenet]
    assert mine in without and not {*without} & {*there} and len(there) == len(catalogue.NOTEBOOKS) - len(without)
    assert any(says in str(fault) for fault in absent) and len(absent) == len(without)
    assert catalogue.all_specs(p, catalogue.NOTEBOOKS) == catalogue.all_specs(p, catalogue.NOTEBOOKS[:-1])


def test_an_arm_says_its_row_and_column_and_no_two_share_a_label(monkeypatch):
    for name in (*EMBEDDED, "imagenet", "public"):
        for one in (one for one in catalogue.NOTEBOOKS if one.arms_at(profile(name))):
            arms = catalogue.experiment(one, profile(name)).arms
            assert {label: arm.label for label, arm in arms.items()} == {label: label for label in arms}
            cells = {(arm.row, arm.column, arm.spec.subset) for arm in arms.values()}
            assert len(cells) == len(arms), (one.file, name)
            assert len({arm.spec for arm in arms.values()}) == len(arms), (one.file, name)
    twice = Notebook("37", "37_mine", lambda p: small.resolution(p) * 2)
    with pytest.raises(UsageError, match="two arms of one label"):
        catalogue.experiment(twice, profile("smoke"))


def test_both_files_have_a_function_for_each_experiment_with_a_docstring():
    for one in catalogue.NOTEBOOKS:
        for made in filter(None, (one.small, one.imagenet, one.public)):
            assert made.__doc__ and made.__name__ == one.small.__name__
        assert one.imagenet or one.number in ("00", "36", "51", "61", "62")  # the last two are beyond the paper
