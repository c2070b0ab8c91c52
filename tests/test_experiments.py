"""Experiments: which runs each notebook has at each profile, and the recipes of their arms, value by value."""

from __future__ import annotations

import functools
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from lab.claims import evidence, exact
from lab.claims.ledger import ledger
from lab.cost import count
from lab.cost.count import macs
from lab.data.cards import card, load
from lab.experiments import catalogue, imagenet, profiles, small
from lab.experiments.catalogue import Notebook, notebook
from lab.experiments.profiles import profile
from lab.runs.spec import TRAINING_VERSION, RunSpec
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


def test_a_width_that_the_paper_does_not_have_is_refused_in_one_sentence():
    with pytest.raises(UsageError, match="unknown width 'H': allowed are Ti, S, B, L"):
        imagenet.supervised_recipe("H")


def test_sgd_differs_from_adamw_in_the_optimizer_its_rate_and_its_decay_alone():
    same = {"optimizer": "adamw", "lr": 1e-5, "weight_decay": 0.1}
    assert replace(imagenet.RESOLUTION_SGD, **same) == imagenet.RESOLUTION_ADAMW
    assert imagenet.RESOLUTION_SGD.lr in imagenet.RESOLUTION_SGD_RATES


SIX = ("inaturalist-2018", "inaturalist-2019", "cifar-10", "cifar-100", "stanford-cars", "flowers-102")


@pytest.mark.parametrize("data", SIX)
def test_each_set_of_table_6_has_the_first_authors_values(data):
    recipe, drop_path = imagenet.transfer_recipe(data)
    large = data.startswith("inaturalist")
    found = (recipe.optimizer, recipe.lr, recipe.weight_decay, recipe.epochs, recipe.augment.erasing, drop_path)
    assert found == (("adamw", 7.5e-5, 0.05, 360, 0.1, 0.1) if large else ("sgd", 1e-2, 1e-4, 1000, 0.0, 0.0))
    assert (recipe.batch_size, recipe.repeats, recipe.warmup * recipe.epochs) == (768, 3, 5)
    assert {path: value(recipe, path) for path in M9} == M9


def test_another_set_than_table_6s_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"unknown data set of Table 6 'cifar10'.*did you mean 'cifar-10'"):
        imagenet.transfer_recipe("cifar10")


def test_beits_model_has_layer_scale_one_relative_bias_and_a_mean_readout():
    assert imagenet.BEIT_MODEL == {
        "layer_scale": 0.1, "drop_path": 0.1, "pos": "relative", "pool": "mean",
        "shrink_deep": True, "head_scale": 0.001, "key_bias": False,
    }  # fmt: skip
    with torch.device("meta"):
        model = ViT(vit_config("B12", **imagenet.BEIT_MODEL))
        absolute = ViT(vit_config("B12", **imagenet.BEIT_MODEL_ABSOLUTE))
    assert model.pos_embed is None and model.relative.table.shape == (27 * 27 + 3, 12)
    assert absolute.relative is None and absolute.pos_embed.shape == (1, 197, 768)


def test_75_of_196_patches_are_masked_and_the_tokenizer_gives_each_patch_a_token():
    beit, tokenizer = vit_config("B12", **imagenet.BEIT_MODEL), DVAEConfig(in_chans=3, **imagenet.TOKENIZER_MODEL)
    assert (imagenet.BEIT_MASKED, beit.grid**2, tokenizer.grid) == (75, 196, beit.grid)
    assert (tokenizer.vocabulary, tokenizer.image_size) == (8192, imagenet.BEIT_PRETRAINING.augment.view_size)
    assert loop.count_steps(imagenet.TOKENIZER, IMAGENET) == 480 * 2503 >= 1_200_000


def test_three_augment_is_an_option_that_changes_the_transforms_alone():
    own = imagenet.supervised_recipe("S")
    other = replace(own, augment=imagenet.THREE_AUGMENT)
    assert other.augment == Augment(policy="3-augment", color_jitter=0.3, test_crop=1.0)
    assert replace(other, augment=own.augment) == own


def test_recipes_of_the_embedded_images_have_nothing_that_is_for_images_read_from_files():
    named = [r for value in vars(small).values() for r in (value.values() if isinstance(value, dict) else [value])]
    recipes = [r for r in named if isinstance(r, Recipe)]
    assert len(recipes) == 7 + 4  # of resolution one for each strategy
    targets = [name.split() for name in small.TRANSFER_RATES if not name.startswith("W")]
    recipes += [small.transfer_recipe(64, data, int(n), s) for data, n in targets for s in small.FINE_TUNING]
    assert len(recipes) == 11 + 4 * 12  # and of transfer one on each target
    plain = Recipe(epochs=1, batch_size=1, lr=1.0)
    for recipe in recipes:
        for name in ("augment", "cutmix", "smoothing", "repeats", "ema"):
            assert getattr(recipe, name) == getattr(plain, name)


# ---- arms of the notebooks


EMBEDDED = [name for name, p in profiles.PROFILES.items() if "sha256" in card(p.data)["vitlib"]]


@pytest.mark.parametrize("name", EMBEDDED)
def test_every_profile_lists_its_runs_and_shares_trunks(name):
    p = profiles.profile(name)
    specs = evidence.queue(catalogue.experiments(p, catalogue.NOTEBOOKS))
    seeds = [spec.seed for spec in specs]
    assert set(seeds) == set(p.seeds) and len(set(specs)) == len(specs)
    assert p.every_arm or seeds == sorted(seeds)  # so that a stop leaves whole pairs
    arms = {n: specs_of(n, name) for n in ("31", "41", "52")}
    assert arms["41"]["trunk"] == arms["31"][f"{p.pairs}x1+LS"] == arms["41"]["attn"].parent
    family = {member.hash for spec in specs for member in spec.family()}
    assert len(family) < sum(1 for spec in specs for _ in spec.family())
    assert (name == "smoke") == all(spec.split == "validation" for spec in specs)


def test_the_study_makes_whole_verdicts_first_the_cheapest_part_before_the_others():
    queue = evidence.queue(catalogue.experiments(profile("study"), catalogue.NOTEBOOKS))
    p, place = profiles.profile("study"), {spec: i for i, spec in enumerate(queue)}

    def last(part) -> int:
        arms = specs_of(part.notebook, "study")
        read = [arms[arm] for arm in part.arms(max(p.pairs, part.min_pairs)) if arm in arms]
        return max(place[spec.with_seed(seed)] for spec in read for seed in p.seeds)

    parts = [part for part in ledger().values() if part.belongs("study") and part.control and part.notebook != "21"]
    rest = specs_of("31", "study")["4x3+LS"].with_seed(p.seeds[0])  # no claim reads it
    assert all(last(part) < place[rest] for part in parts)
    assert last(ledger()["A1"]) < last(ledger()["P5"]) < last(ledger()["P2-3"])
    first = specs_of("52", "study")["hmlp supervised"]
    assert [place[first.with_seed(seed)] for seed in p.seeds] == sorted(
        place[first.with_seed(seed)] for seed in p.seeds
    )


def test_the_primary_contrasts_have_their_arms_at_cpu():
    assert set(specs_of("31", "cpu")) == {"12x1+LS", "6x2+LS"}
    assert set(specs_of("41", "cpu")) == {"trunk", "full", "attn", "ffn", "head"}
    assert set(specs_of("52", "cpu")) == {
        f"{stem} {column}" for stem in ("linear", "hmlp") for column in ("scratch", "pretrained")
    }


@pytest.mark.parametrize("name", [*EMBEDDED, "imagenet"])
def test_every_arm_that_the_ledger_names_is_an_arm_of_its_notebook(name):
    p = profile(name)
    for part in (entry for entry in ledger().values() if entry.belongs(name) and entry.kind not in ("exact", "ratio")):
        setting = catalogue.experiment(notebook(part.notebook), p)
        evidence.known_arms(part, setting)
        known, labels = set(setting.arms), part.at_profile(name).arms(max(p.pairs, part.min_pairs))
        if (p.every_arm and part.notebook != "21") or p.paper:
            assert set(labels) <= known, part.id


@pytest.mark.parametrize("profile", ["cpu", "study"])
def test_every_part_fixes_the_number_of_images_that_its_arms_are_trained_on(profile):
    """Or the part would read "not run" after its runs were made."""
    pairs = profiles.profile(profile).pairs
    read = set()
    for part in (entry.at_profile(profile) for entry in ledger().values() if entry.belongs(profile)):
        arms = specs_of(part.notebook, profile) if part.images and part.notebook != "21" else {}
        at_sizes = [at for n in (pairs, max(pairs, part.min_pairs)) for at in part.contrasts(n)]
        contrasted = {arm for at in at_sizes for arm in at} & {*arms}
        for arm in contrasted:
            assert arms[arm].images == (None if part.images == "all" else part.images), (part.id, arm)
            read.add(part.id)
    assert {"A1", "F1", "F2-full", "F2-attn", "H4-linear", "H4i"} <= read


FORMS = ("32", "33", "34", "35")


def test_the_forms_have_no_runs_at_cpu_few_at_smoke_and_share_those_of_figure_1():
    arms = {(n, name): specs_of(n, name) for n in ("31", *FORMS) for name in EMBEDDED}
    assert not any(arms[n, "cpu"] for n in FORMS)
    assert [len(arms[n, "smoke"]) for n in FORMS] == [4, 4, 8, 3]
    for name, new in (("smoke", (4, 4, 4, 3)), ("study", (4, 2, 4, 1))):
        seen = set(arms["31", name].values())
        for n, more in zip(FORMS, new, strict=True):
            assert len(set(arms[n, name].values()) - seen) == more, (name, n)
            seen |= set(arms[n, name].values())
    study = {n: arms[n, "study"] for n in ("31", *FORMS)}
    assert study["32"]["W64 6x2"] == study["33"]["6x2"] == study["34"]["6x2"] == study["31"]["6x2"]
    assert study["35"]["W64 18x2+LS"] == study["31"]["18x2+LS"]
    assert study["34"]["6x2 longer"].recipe.epochs == 3 and study["34"]["6x2"].recipe.epochs == 2


@pytest.mark.parametrize("name", ["smoke", "study"])
def test_more_pairs_and_more_width_cost_within_5_percent(name, monkeypatch):
    counts = [macs(spec.model).paper for spec in specs_of("35", name).values()]
    assert max(counts) < 1.05 * min(counts)
    monkeypatch.setattr(count, "macs", lambda config: count.Macs(config.pairs, config.pairs))
    with pytest.raises(UsageError, match="not of like cost"):
        small.depth_or_width(profile(name))


@pytest.mark.parametrize("notebook", FORMS)
def test_one_branch_and_two_of_one_form_start_from_identical_tensors_and_differ_in_nothing_else(notebook):
    arms = specs_of(notebook, "smoke")
    twins = {}
    for spec in arms.values():
        form = replace(spec, model=replace(spec.model, depth=spec.model.pairs, branches=1))
        twins.setdefault(form, []).append(spec)
    pairs = [forms for forms in twins.values() if len(forms) == 2]
    assert len(pairs) == len(arms) // 2
    for forms in pairs:
        own = []
        for spec in forms:
            model = ViT(spec.model, seed=1000)
            branches = [(m, f) for layer in model.layers for m, f in zip(layer.mhsa, layer.ffn, strict=True)]
            tensors = [t for m, f in branches for t in (*m.state_dict().values(), *f.state_dict().values())]
            rest = [t for n, t in model.state_dict().items() if not n.startswith("layers.")]
            own.append(tensors + rest)
        assert all(torch.equal(a, b) for a, b in zip(*own, strict=True))


def test_arms_of_one_table_differ_only_in_what_is_compared():
    stems = specs_of("52", "study")
    for column in ("scratch", "pretrained", "supervised"):
        records = [replace(stems[f"{s} {column}"], model=stems["linear scratch"].model, parent=None, protocol="supervised")
                   for s in small.STEM_ARMS]  # fmt: skip
        assert len(set(records)) == 1
    assert stems["hmlp scratch"].recipe == stems["hmlp pretrained"].recipe
    for stem in small.PRIMARY_STEMS:
        own, light, decay = (stems[f"{stem} pretrained{word}"] for word in ("", " k-means", " decay"))
        assert own.parent.targets == "dvae" and light.recipe == own.recipe
        assert light.parent == replace(own.parent, targets="tokens", tokenizer=None)
        assert decay == replace(own, recipe=replace(small.FEW_LABELS_BEIT, epochs=own.recipe.epochs))


def test_the_hash_of_a_run_of_each_protocol_is_what_this_training_version_gives():
    """A field, a default or a recipe that changes would make runs that are stored under these names untraceable."""
    assert TRAINING_VERSION == 3, "new numbers, new names: write them down here"
    resolution, stems = specs_of("41", "study"), specs_of("52", "study")
    masked = stems["linear pretrained"].parent
    specs = (resolution["trunk"], resolution["attn"], masked, masked.tokenizer)
    assert {spec.protocol: spec.with_seed(10).hash for spec in specs} == {
        "supervised": "4cebad5220799d9d", "finetune": "d78940c74aab3908", "masked": "a71e01f4b9e60459",
        "tokenizer": "6fb9b680ff80d790",
    }  # fmt: skip


def test_all_stems_predict_the_tokens_of_one_tokenizer_a_seed():
    study = experiment("52", "study")
    for seed in study.profile.seeds:
        trunks = {spec.with_seed(seed).parent for spec in (arm.spec for arm in study.arms.values()) if spec.parent}
        learned = [trunk for trunk in trunks if trunk.targets == "dvae"]
        assert {trunk.tokenizer for trunk in learned} == {small.tokenizer(study.profile).with_seed(seed)}
        assert len(learned) == len({trunk.model for trunk in learned}) == len(small.STEM_ARMS)
    for name, number in (("smoke", 1), ("cpu", 0), ("study", 5)):
        family = {m for spec in experiment("52", name).specs() for m in spec.family()}
        assert sum(m.protocol == "tokenizer" for m in family) == number


def test_the_extra_pair_costs_one_pair_and_the_rest_of_table_7_has_as_many_pairs_as_the_linear_stem():
    p = profiles.PROFILES["study"]
    models = {name: small.stem_model(p, name) for name in small.STEM_ARMS}
    assert {name: m.pairs - p.stem_pairs for name, m in models.items() if m.pairs != p.stem_pairs} == {"linear+1": 1}
    N, D = models["linear"].tokens, p.width
    pair = 12 * N * D**2 + 2 * N**2 * D + 2 * 5 * N * D  # qkv, proj, fc1, fc2; the two products of attention; two norms
    assert exact.size(models["linear+1"]).macs - exact.size(models["linear"]).macs == pair
    assert {m.pool for m in models.values()} == {"mean"}


def test_the_arms_of_transfer_are_what_their_names_say_and_start_from_the_trunk_of_their_width():
    arms = specs_of("42", "study")
    for name, spec in arms.items():
        width, data, images, strategy = name.split()
        assert (f"W{spec.model.width}", spec.data, str(spec.images)) == (width, data, images)
        assert spec.model.num_classes == card(data)["vitlib"]["num_classes"] and spec.model.image_size == 16
        assert spec.recipe.flip == (data != "digits")
        if strategy == "scratch":
            assert (spec.protocol, spec.parent) == ("supervised", None)
            continue
        assert (spec.protocol, spec.strategy) == ("finetune", strategy)
        trunk = spec.parent
        assert (trunk.model.width, trunk.data, trunk.model.num_classes) == (spec.model.width, "fashion-mnist-6", 6)
        assert trunk.with_seed(11) == spec.with_seed(11).parent and trunk.parent is None
        like_full = replace(
            spec, strategy="full", recipe=replace(spec.recipe, lr=arms[f"{width} {data} {images} full"].recipe.lr)
        )
        assert like_full == arms[f"{width} {data} {images} full"]
    assert len({spec.parent for spec in arms.values()} - {None}) == 2
    for name, spec in arms.items():
        width, data, images, strategy = name.split()
        expected = small.transfer_recipe(
            int(width[1:]), data, int(images), "full" if strategy == "scratch" else strategy
        )
        assert spec.recipe == replace(expected, flip=data != "digits"), name


def test_a_target_of_transfer_that_has_no_rate_is_named():
    with pytest.raises(UsageError, match=r"unknown target of Table 6 'digits 101': allowed are .*; did you mean"):
        small.transfer_recipe(64, "digits", 101, "attn")
    with pytest.raises(UsageError, match=r"unknown strategy of Table 6 'atn': .* did you mean 'attn'"):
        small.transfer_recipe(64, "digits", 100, "atn")


def test_the_runs_of_transfer_at_the_smaller_profiles():
    assert experiment("42", "cpu").specs() == []
    smoke = experiment("42", "smoke")
    assert list(smoke.arms) == [f"W32 fashion-mnist-4 200 {s}" for s in ("full", "attn", "ffn")]
    assert all(sum(m.steps for m in spec.family()) < 100 for spec in smoke.specs())


@pytest.mark.parametrize("name", ["study", "smoke"])
def test_the_images_of_transfer_are_class_balanced_nested_and_there(name):
    family = {(m.data, m.images) for spec in experiment("42", name).specs() for m in spec.family()}
    for data, images in family:
        whole = load(data, "train")
        rows = subset(whole, images, 10)
        counts = np.bincount(whole.labels.numpy()[rows], minlength=len(whole.classes))
        assert len(set(counts)) == 1 and counts.sum() == (images or len(whole))
    for data, counts in profile("study").transfer_images.items():
        assert list(counts) == sorted(counts) and counts[-1] == len(load(data, "train"))


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
    assert mine not in there and len(there) == len(catalogue.NOTEBOOKS) - 1 and says in str(absent[0])
    assert catalogue.all_specs(p, catalogue.NOTEBOOKS) == catalogue.all_specs(p, catalogue.NOTEBOOKS[:-1])


def test_an_arm_says_its_row_and_column_and_no_two_share_a_label(monkeypatch):
    for name in (*EMBEDDED, "imagenet"):
        for one in catalogue.NOTEBOOKS:
            if one.small:
                arms = catalogue.experiment(one, profile(name)).arms.values()
                assert len({(arm.row, arm.column) for arm in arms}) == len(arms), (one.file, name)
    twice = Notebook("37", "37_mine", lambda p: small.resolution(p) * 2)
    with pytest.raises(UsageError, match="two arms of one label"):
        catalogue.experiment(twice, profile("smoke"))


def test_both_files_have_a_function_for_each_experiment_with_a_docstring():
    for one in catalogue.NOTEBOOKS:
        if one.small:
            assert one.small.__name__ == one.imagenet.__name__ and one.small.__doc__ and one.imagenet.__doc__
