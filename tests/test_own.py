"""Notebook 62: the comparison of strategies on a reader's own images, and what makes it render anew."""

import os

import numpy as np
import pytest

import vitlib
from lab import paths
from lab.report import notebook, own, render, tables
from vitlib.errors import UsageError
from vitlib.tasks.compare import Comparison, Cost
from vitlib.tasks.images import View, read_task


@pytest.fixture
def shown(monkeypatch, tmp_path) -> list[str]:
    """What a page displays."""
    texts = []
    monkeypatch.setattr(notebook, "display", lambda one: texts.append(one.data))
    monkeypatch.setenv("VITLIB_OUTPUTS", str(tmp_path / "outputs"))
    return texts


def compared(seeds: int) -> Comparison:
    right = {"full": np.ones((seeds, 40), bool), "attn": np.ones((seeds, 40), bool)}
    right["attn"][:, :2] = False  # 95 %
    cost = Cost(step_s=0.1, memory_mb=27.4, stored_mb=0.805)
    return Comparison(right, {"full": 2e-4, "attn": 8e-4}, {"full": 1.26, "attn": 1.0}, dict.fromkeys(right, cost), 1.0)


def test_the_question_has_a_scale_by_profile_and_takes_what_a_reader_names(shown, tmp_path):
    smoke, cpu, study = (own.ask(name) for name in ("smoke", "cpu", "study"))
    assert (smoke.strategies, smoke.seeds, smoke.epochs) == (("full", "attn"), 1, 1)
    assert (cpu.seeds, study.seeds, len(study.strategies)) == (3, 5, 6)
    assert shown[0] == (
        "**Profile `smoke`**: images of `digits`, the small trunk that ships; strategies full, attn; seeds: 1, epochs: 1."
    )
    named = own.ask("smoke", str(tmp_path / "birds"), "vit_tiny_patch16_224", "attn, head", 2)
    assert (named.folder, named.weights) == (tmp_path / "birds", "vit_tiny_patch16_224")
    assert (list(named.strategies), named.seeds) == (["attn", "head"], 2)
    assert own.ask("smoke", "photos").folder == paths.ROOT / "photos"
    with pytest.raises(UsageError, match="unknown profile"):
        own.ask("tiny")


@pytest.mark.parametrize(("name", "sizes"), [
    ("smoke", "768 images of 10 classes (320 train, 128 validation, 320 test)"),
    ("study", "1768 images of 10 classes (1000 train, 128 validation, 640 test)"),
])  # fmt: skip
def test_the_digits_are_a_folder_with_three_parts(name, sizes, shown):
    task = read_task(own.ask(name).folder, View(16, 4, (0.5,), (0.5,)))
    assert task.describe() == f"digits: {sizes}" and len(task.notes) == 1


def test_it_calls_the_librarys_compare_below_the_profiles_outputs_and_nothing_where_nothing_may_train(
    shown, monkeypatch, tmp_path
):
    calls = []
    monkeypatch.setattr(vitlib, "compare", lambda *words, **more: calls.append((words, more)), raising=False)
    question = own.ask("smoke", seeds=2)
    question.compare()
    place = tmp_path / "outputs" / "smoke" / "own_images"
    assert calls == [
        ((place / "digits", place / "comparison", None, ("full", "attn"), 2), {"epochs": 1, "device": "cpu"})
    ]
    monkeypatch.setenv("VITLIB_TRAIN", "0")
    assert question.compare() is None and len(calls) == 1
    question.answer(None)
    assert shown[-1] == "None of these runs is finished."


def test_the_table_has_differences_where_there_are_two_seeds(shown, tmp_path):
    one, two = (tables.printed(own.table(compared(seeds))) for seeds in (1, 2))
    costs = ["time_s", "memory_mb", "stored_mb"]
    assert list(one) == ["strategy", "lr, searched", "top1, test images", *costs]
    assert list(two) == ["strategy", "lr, searched", "top1, test images", "difference from full, points", *costs]
    assert one.loc[1].tolist() == ["attn", "0.0008", "95.00 (n=1)", "1.0", "27", "0.81"]
    assert two.loc[1].tolist()[2] == "95.00 ± 0.00 (n=2)"
    assert two.loc[0].tolist()[3] == "–" and two.loc[1].tolist()[3].startswith("-5.00 [")
    own.ask("smoke").answer(compared(2))
    assert shown[-1].startswith("**The answer:**\n\n- attention alone")
    written = {
        path.relative_to(tmp_path / "outputs" / "smoke").as_posix() for path in (tmp_path / "outputs").rglob("62*")
    }
    assert written == {f"tables/62_own_images_comparison.{kind}" for kind in ("csv", "md")} | {
        f"figures/62_own_images_comparison.{kind}" for kind in ("svg", "png")
    }


def test_an_image_that_changes_under_its_name_renders_the_notebook_anew(tmp_path):
    (tmp_path / "cat").mkdir()
    image, parameters = tmp_path / "cat" / "1.jpg", {"folder": str(tmp_path), "weights": "", "seeds": 1}
    image.write_bytes(b"1")
    first = render._own_files(parameters)
    assert render._own_files(parameters) == first and [name for name, *_ in first] == [str(image)]
    os.utime(image, ns=(1, 1))
    assert render._own_files(parameters) != first
    assert render._own_files({"profile": "smoke"}) == render._own_files({"folder": ""}) == []
