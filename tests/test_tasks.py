"""People's own images: what a folder may be, what comes of it, and what is refused in one sentence before time is spent."""

import csv
import io
import json
import math
import os
import re
import runpy
import sys
from dataclasses import asdict, replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from pictures import picture
from PIL import Image
from torch import nn

from vitlib.__main__ import main
from vitlib.errors import UsageError
from vitlib.files import read_safetensors
from vitlib.model import ViT, vit_config
from vitlib.model.layers import FFN, MHSA
from vitlib.model.weights import load, save
from vitlib.tasks import runs
from vitlib.tasks.compare import Comparison, compare, more_seeds, not_worse, right_on_test, step_bytes
from vitlib.tasks.deltas import TaskBank, load_delta, save_delta
from vitlib.tasks.export import export_model
from vitlib.tasks.finetune import finetune
from vitlib.tasks.images import PARTS, View, read_task
from vitlib.tasks.lora import add_adapters, merged
from vitlib.tasks.predict import evaluate, predict
from vitlib.tasks.pretrain import pretrain, probe
from vitlib.tasks.trunk import hash_of, read_trunk, write_notes
from vitlib.train.engine import resolve
from vitlib.train.finetune import freeze, start_from, trainable

torch.set_num_threads(1)
VIEW = View(16, 4, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
GREY = View(16, 4, (0.5,), (0.5,))


def put(path, number, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(number, (18 + number % 5, 22)).save(path, **options)
    return path


def class_folders(folder, classes=("cat", "dog", "owl"), images=8):
    for k, name in enumerate(classes):
        for i in range(images):
            put(folder / name / f"{i}.png", 100 * k + i)
    return folder


def labels_file(path, rows, columns=("path", "label")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


@pytest.fixture
def pets(tmp_path):
    return class_folders(tmp_path / "pets")


@pytest.fixture(scope="session")
def trunk_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("trunk") / "trunk.safetensors"
    save(ViT(vit_config("W32-2x2/4", image_size=16, num_classes=0, layer_scale=0.1)), path)
    return path


# --- the split ---


def test_every_part_has_its_share_of_every_class_and_no_picture_is_in_two(tmp_path):
    (class_folders(tmp_path / "pets", images=20) / "cat" / "clip.gif").write_bytes(b"GIF89a")
    task = read_task(tmp_path / "pets", VIEW)
    assert "files left out: 1, the first is clip.gif" in task.notes[0]
    labels = task.data.labels.numpy()
    counts = {part: np.bincount(labels[task.parts == part], minlength=3).tolist() for part in PARTS}
    assert counts == {"train": [14] * 3, "validation": [3] * 3, "test": [3] * 3}
    assert (len(task.part("test")), task.part("test").classes) == (9, ("cat", "dog", "owl"))


def test_the_content_decides_the_part_not_the_name_and_not_the_form(pets):
    first = read_task(pets, VIEW)
    part_of = dict(zip(first.digests, first.parts, strict=True))
    (pets / "cat" / "0.png").rename(pets / "cat" / "zebra.png")
    with Image.open(pets / "dog" / "1.png") as image:
        image.save(pets / "dog" / "1.bmp")
    (pets / "dog" / "1.png").unlink()
    (pets / "owl" / "again.png").write_bytes((pets / "owl" / "3.png").read_bytes())
    again = read_task(pets, VIEW)
    assert first.checksum != again.checksum  # one picture more
    assert all(part_of[digest] == part for digest, part in zip(again.digests, again.parts, strict=True))


def test_a_split_that_was_written_is_read_again(pets, tmp_path):
    task = read_task(pets, VIEW)
    task.write_split(tmp_path / "split.csv")
    again = read_task(pets, VIEW, labels=tmp_path / "split.csv")
    assert again.checksum == task.checksum and "are used as they are" in again.notes[0]


def test_parts_of_a_folder_are_used_as_they_are_and_that_is_said(tmp_path):
    for part in ("train", "val", "test"):
        for k, name in enumerate(("a", "b")):
            for i in range(3):
                put(tmp_path / part / name / f"{i}.png", {"train": 0, "val": 50, "test": 90}[part] + 10 * k + i)
    task = read_task(tmp_path, VIEW)
    assert [int((task.parts == part).sum()) for part in PARTS] == [6, 6, 6]
    assert task.notes == ("the parts train, validation, test are used as they are",)
    (tmp_path / "test").rename(tmp_path.parent / "gone")
    task = read_task(tmp_path, VIEW)
    assert [int((task.parts == part).sum()) for part in PARTS] == [4, 2, 6]
    assert "validation as the test part; validation images are cut off those of training" in task.notes[0]


def test_a_group_stays_in_one_part(tmp_path):
    rows = [(f"{i}.png", "ab"[i % 2], f"patient {i // 4}") for i in range(32)]
    for i in range(32):
        put(tmp_path / f"{i}.png", i)
    table = labels_file(tmp_path / "labels.csv", rows, ("file", "class", "who"))
    task = read_task(tmp_path, VIEW, labels=table, group="who")
    met = {group: {p for g, p in zip(task.groups, task.parts, strict=True) if g == group} for group in task.groups}
    assert len(met) == 8 and all(len(parts) == 1 for parts in met.values()) and set(task.parts) == set(PARTS)


def test_images_of_every_size_and_mode_are_read_upright(tmp_path):
    for k, name in enumerate("ab"):
        for i, mode in enumerate(("RGB", "L", "RGBA", "P", "CMYK", "1", "I;16")):
            image = picture(10 * k + i, (30 + i, 17 + 3 * k))
            image = image.convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
            path = tmp_path / name / f"{i}.{'tif' if mode in ('CMYK', 'I;16') else 'png'}"
            path.parent.mkdir(exist_ok=True)
            image.save(path)
    turned = Image.new("RGB", (40, 20), "white")
    turned.paste("black", (0, 0, 20, 20))  # the left half; it is the upper one once the tag is followed
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "a" / "turned.jpg", exif=exif, quality=95)
    task = read_task(tmp_path, VIEW)
    i = task.names.index("a/turned.jpg")
    image = task.data.images[i].float().mean(0)
    assert image[0].mean() < 60 and image[-1].mean() > 200  # of 20x40 the middle square: rows 10 to 30


# --- bad input ---


def one_class(folder):
    return class_folders(folder, ("cat",))


def empty_class(folder):
    (class_folders(folder) / "newt").mkdir()


def unreadable(folder):
    (class_folders(folder) / "cat" / "bad.png").write_bytes(b"no picture")


def animated(folder):
    frames = [picture(k) for k in range(3)]
    frames[0].save(class_folders(folder) / "cat" / "film.webp", save_all=True, append_images=frames[1:])


def one_each(folder):
    class_folders(folder, images=1)


def two_spellings(folder):
    class_folders(folder, ("Great tit", "great_tit", "owl"))


def two_labels(folder):
    class_folders(folder)
    (folder / "dog" / "x.png").write_bytes((folder / "cat" / "3.png").read_bytes())


def tiny(folder):
    Image.new("RGB", (30, 3)).save(class_folders(folder) / "cat" / "tiny.png")


BAD = {
    one_class: "has one class, cat: at least two are needed",
    empty_class: "1 of 4 class folders in .* hold no image, the first is newt",
    unreadable: r"bad.png cannot be read \(UnidentifiedImageError\)",
    animated: "film.webp holds 3 images, an animation or pages: allowed is one",
    one_each: "class cat has 1 different images: at least 3 are needed, one for each part",
    two_spellings: "has classes 'Great tit' and 'great_tit', two spellings of one: rename one",
    two_labels: "cat/3.png and dog/x.png are the same picture under two labels, cat and dog",
    tiny: "tiny.png has 30x3 pixels: a patch of this model has 4",
}


@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__)
def test_a_folder_that_is_no_task_is_one_sentence_and_nothing_is_written(make, tmp_path, trunk_file, capsys):
    make(tmp_path / "data")
    with pytest.raises(UsageError, match=BAD[make]):
        read_task(tmp_path / "data", VIEW)
    words = ["finetune", str(tmp_path / "data"), "--from", str(trunk_file), "--out", str(tmp_path / "out")]
    assert main(words) == 2 and capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_classes_that_are_numbers_are_names_in_the_order_of_numbers(tmp_path):
    task = read_task(class_folders(tmp_path / "digits", ("10", "9", "0")), VIEW)
    assert task.data.classes == ("0", "9", "10")
    with pytest.raises(UsageError, match="classes '01' and '1', two spellings"):
        read_task(class_folders(tmp_path / "twice", ("1", "01", "2")), VIEW)


LABELS = {
    "has no label": [("0.png", "a"), ("1.png", " ")],
    "names 9.png, which is not in": [("0.png", "a"), ("9.png", "b")],
    "2 images of .* have no label in .*, the first is 2.png": [("0.png", "a"), ("1.png", "b")],
    "line 2 of .* has a label of 9,999 characters: allowed are 255": [("0.png", "9" * 9999), ("1.png", "1")],
    "names 0.png more than once": [("0.png", "a"), ("0.png", "b")],
    "names 1.png more than once": [("0.png", "a"), ("1.png", "b"), (".//1.png", "b")],
}


@pytest.mark.parametrize("sentence", LABELS)
def test_a_labels_file_that_does_not_fit_is_one_sentence(sentence, tmp_path):
    for i in range(4):
        put(tmp_path / f"{i}.png", i)
    with pytest.raises(UsageError, match=sentence):
        read_task(tmp_path, VIEW, labels=labels_file(tmp_path / "labels.csv", LABELS[sentence]))
    with pytest.raises(UsageError, match="has the columns a, b: wanted are path/file/filename/image and label"):
        read_task(tmp_path, VIEW, labels=labels_file(tmp_path / "other.csv", [("0.png", "x")], ("a", "b")))


def test_a_group_in_two_parts_is_refused(tmp_path):
    rows = [(f"{i}.png", "ab"[i % 2], PARTS[i // 4], f"g{i // 6}") for i in range(12)]
    for i in range(12):
        put(tmp_path / f"{i}.png", i)
    table = labels_file(tmp_path / "labels.csv", rows, ("path", "label", "part", "who"))
    with pytest.raises(UsageError, match="group 'g0' is in more than one part"):
        read_task(tmp_path, VIEW, labels=table, group="who")
    read_task(tmp_path, VIEW, labels=table)


def test_colour_under_grey_weights_is_said(pets, tmp_path):
    assert "images in colour: 24; these weights see grey alone" in read_task(pets, GREY).notes[0]
    for path in pets.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    assert read_task(pets, GREY).notes == ()


# --- fine-tuning ---


def short(pets, out, trunk_file, **options):
    return finetune(pets, out, trunk_file, **{"epochs": 2, "batch_size": 8} | options)


def test_a_run_of_one_step_says_nothing_of_timms_schedule(pets, tmp_path, trunk_file, caplog):
    short(pets, tmp_path / "out", trunk_file, lr=1e-3, epochs=1, batch_size=32)
    assert not caplog.records


def test_fine_tuning_keeps_the_best_and_the_last_with_classes_and_preprocessing(pets, tmp_path, trunk_file, capsys):
    tuned = short(pets, tmp_path / "out", trunk_file, lr=1e-3)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    tables = {"split.csv", "rates.csv", "result.json"}
    assert names == {"best.safetensors", "last.safetensors", "delta.safetensors"} | tables
    best = read_trunk(tmp_path / "out")
    delta = load_delta(tmp_path / "out" / "delta.safetensors", read_trunk(trunk_file).model).state_dict()
    assert all(torch.equal(tensor, delta[name]) for name, tensor in best.model.state_dict().items())
    assert best.classes == ("cat", "dog", "owl") and best.model.config.num_classes == 3
    trunk, last = read_trunk(trunk_file).model.state_dict(), load(tmp_path / "out" / "last.safetensors").state_dict()
    moved = {name for name, tensor in trunk.items() if not torch.equal(tensor, last[name])}
    assert moved == {name for name in trunk if ".mhsa." in name and ".f." in name} | {"pos_embed"}
    assert tuned.lr == 1e-3 and tuned.test_images == 6 and tuned.test_low < tuned.test_top1 < tuned.test_high
    # asked again, it is read
    assert short(pets, tmp_path / "out", trunk_file, lr=1e-3) == tuned
    with pytest.raises(UsageError, match="holds another model: give another place with --out"):
        short(pets, tmp_path / "out", trunk_file, lr=2e-3)


def test_the_search_goes_on_until_the_best_rate_is_inside(monkeypatch, pets, tmp_path, trunk_file):
    """Validation is best at 64 times the first rate."""
    first = runs.Job.first_rate

    def outcome(run, job):
        return runs.Outcome(50 - abs(np.log2(run.lr / (64 * first(job, "attn")))), 1.0, 1, 0.0)

    monkeypatch.setattr(runs, "execute", outcome)
    job = runs.Job(None, read_trunk(trunk_file), VIEW, tmp_path)
    tried = runs.search(job, "attn", 0)
    assert [round(lr / first(job, "attn"), 3) for lr in tried] == [0.5, 1, 2, 4, 8, 16, 32, 64, 128]
    assert runs.best_of(tried) == 64 * first(job, "attn")


@pytest.mark.parametrize("killed", [1, 2, 3])  # of four steps in two epochs
def test_a_run_that_was_killed_ends_where_an_uninterrupted_one_ends(killed, monkeypatch, pets, tmp_path, trunk_file):
    whole = short(pets, tmp_path / "whole", trunk_file, lr=1e-3)
    looked = runs.Watch.after

    def kill(watch, step, steps):
        if step == killed:
            raise KeyboardInterrupt
        looked(watch, step, steps)
        assert watch.model.training  # after a validation too

    monkeypatch.setattr(runs.Watch, "due", lambda watch: True)
    monkeypatch.setattr(runs.Watch, "after", kill)
    words = ["--from", trunk_file, "--out", tmp_path / "out", "--lr", "1e-3", "--epochs", "2", "--batch-size", "8"]
    assert main(["finetune", str(pets), *map(str, words)]) == 130
    monkeypatch.setattr(runs.Watch, "after", looked)
    again = short(pets, tmp_path / "out", trunk_file, lr=1e-3)
    assert (again.test_top1, again.validation_top1) == (whole.test_top1, whole.validation_top1)
    for name in ("best", "last"):
        pair = [load(tmp_path / out / f"{name}.safetensors").state_dict() for out in ("out", "whole")]
        assert all(torch.equal(pair[0][key], pair[1][key]) for key in pair[1])


def test_a_second_process_waits_for_the_first(pets, tmp_path, trunk_file, monkeypatch):
    first, said = FileLock(tmp_path / ".out.lock"), []

    def end(sentence: str) -> None:
        said.append(sentence)
        assert not (tmp_path / "out").exists()
        first.release()

    monkeypatch.setattr(runs, "say", end)
    for command in (finetune, compare, pretrain):
        first.acquire()
        with pytest.raises(UsageError, match="nowhere"):
            command(pets, tmp_path / "out", "nowhere")
    (sentence,) = set(said)
    assert re.fullmatch(r"another process writes to \S*/out: waiting for it \(.*\)", sentence) and len(said) == 3
    monkeypatch.undo()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"nothing can be written to \S*/file/out \(.*\)"):
        finetune(pets, tmp_path / "file" / "out", trunk_file)
    short(pets, tmp_path / "out", trunk_file, lr=1e-3, epochs=1)
    assert not list(tmp_path.glob(".*.lock"))


MISTAKES = {
    "unknown strategy 'atn'": {"strategy": "atn"},
    "lr is -1.0: allowed are numbers above 0": {"lr": -1.0},
    "epochs is 0": {"epochs": 0},
    "seed is -1: allowed are whole numbers from 0": {"seed": -1},
    "seed is 'x': allowed are whole numbers from 0": {"seed": "x"},
    "image_size 18 is not a multiple of patch_size 4": {"image_size": 18},
    "there is no folder": {"folder": "nowhere"},
    "group 'who' is a column of a labels file": {"group": "who"},
    "nowhere.safetensors is not there": {"weights": "nowhere.safetensors"},
}


@pytest.mark.parametrize("sentence", MISTAKES)
def test_a_mistake_is_one_sentence_before_anything_is_written(sentence, monkeypatch, pets, tmp_path, trunk_file):
    monkeypatch.setattr("vitlib.tasks.trunk.SHIPPED", tmp_path / "absent")
    given = {"folder": pets, "out": tmp_path / "out", "weights": trunk_file} | MISTAKES[sentence]
    with pytest.raises(UsageError, match=sentence):
        finetune(**given)
    assert not (tmp_path / "out").exists()


NUMBERS = {
    compare: ({"seeds": "5"}, {"seeds": 2.5}, {"seeds": math.nan}, {"seeds": True}, {"margin": "1"}, {"margin": None}, {"margin": True}),
    pretrain: ({"seed": math.nan}, {"seed": -1}, {"seed": True}, {"seed": np.int64(1)}, {"seed": "x"}),
}  # fmt: skip


@pytest.mark.parametrize("command", NUMBERS, ids=lambda command: command.__name__)
def test_what_is_no_number_of_a_command_is_one_sentence(command, pets, tmp_path, monkeypatch):
    monkeypatch.setattr(runs.loop, "train", lambda *_, **__: pytest.fail("something was trained"))
    for given in NUMBERS[command]:
        with pytest.raises(
            UsageError, match=r"cannot be compared: allowed are|^seed is .*: allowed are whole numbers from 0"
        ):
            command(pets, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


WORDS = {
    "a word is empty: give a value, or leave it out": ["predict", "", "x.png"],
    "--csv= is empty": ["predict", "{0}/model", "{0}/x.png", "--csv="],
    "--seed: '-1' given, allowed are whole numbers from 0 to 2,147,483,647": ["finetune", "{0}", "--out", "{0}/out", "--seed", "-1"],
    "--image-size: '0' given, allowed are whole numbers from 1 to 10,000": ["pretrain", "{0}", "--out", "{0}/out", "--image-size", "0"],
    "--epochs: '\u0663' given": ["plan", "{0}", "--epochs", "\u0663"],
    "--epochs: '--3' given": ["plan", "{0}", "--epochs=--3"],
    "/ is there and holds something else": ["finetune", "{0}/pets", "--out", "/"],
    "allowed is a file that ends in .csv": ["predict", "{0}/model", "{0}/pets", "--csv", "{0}/pets/cat/0.png"],
    "allowed is a file that ends in .onnx": ["export-model", "{0}/model", "--onnx", "{0}/pets/cat/0.png"],
    "--seeds: '1000000000000' given": ["compare", "{0}", "--out", "{0}/out", "--seeds", "1" + "0" * 12],
    "--epochs: '1e3' given": ["plan", "{0}", "--epochs", "1e3"],
    "--lr: 'fast' given, allowed are auto and numbers above 0": ["finetune", "{0}", "--out", "{0}/out", "--lr", "fast"],
    "margin inf cannot be compared": ["compare", "{0}", "--out", "{0}/out", "--margin", "inf"],
    "unknown device 'tpu': allowed are auto, cpu, cuda": ["finetune", "{0}", "--out", "{0}/out", "--device", "tpu"],
    "unknown strategy 'last-9": ["finetune", "{0}", "--out", "{0}/out", "--strategy", "last-" + "9" * 5000],
    "File name too long (nnn": ["predict", "n" * 5000, "{0}/x.png"],
    "/file/out (": ["finetune", "{0}", "--out", "{0}/file/out"],
    "allowed is a file that ends in .png or .svg or .pdf": ["evaluate", "{0}/model", "{0}", "--picture", "{0}/x.xyz"],
    "allowed is a file that ends in .pt2": ["export-model", "{0}/model", "--torch-export", "{0}/x.onnx"],
    "/pets' is there and is no file: allowed is a file": ["export-model", "{0}/model", "--onnx", "{0}/pets"],
    "/said.csv' cannot be written in ": ["predict", "{0}/model", "{0}/x.png", "--csv", "{0}/file/said.csv"],
    "' cannot be a name (File name too long): allowed is a file": ["predict", "{0}/model", "x.png", "--csv", "{0}/" + "n" * 300],
    "8 pixels are one patch of W128-6x1/8: allowed are 2x2 patches and more": ["pretrain", "{0}", "--out", "{0}/out", "--image-size", "8"],
}  # fmt: skip


@pytest.mark.parametrize("sentence", WORDS)
def test_wrong_words_are_one_sentence_before_anything_is_read_or_written(sentence, pets, tmp_path, capsys):
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    assert main([word.replace("{0}", str(tmp_path)) for word in WORDS[sentence]]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_name_of_control_characters_is_one_line(tmp_path, capsys):
    class_folders(tmp_path / "data", ("a\nb\x1b[31m",))
    assert main(["finetune", str(tmp_path / "data"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.endswith("data has one class, a\\nb\\x1b[31m: at least two are needed\n")


NOTES = {
    "no JSON": "{",
    "a list": "[]",
    "nested without end": "[" * 99_999,
    "a mean that is none": {"mean": None},
    "a mean of texts": {"mean": ["a", "b", "c"]},
    "a mean that is not a number": {"mean": [math.nan] * 3},
    "a deviation of 0": {"std": [0.5, 0, 0.5]},
    "a deviation of almost 0": {"std": [1e-300] * 3},
    "a mean without end": {"mean": [1e300] * 3},
    "truths for a mean": {"mean": [True] * 3},
    "a class twice": {"classes": ["cat", "cat", "owl"]},
    "a short deviation": {"std": [0.5]},
    "no classes": {"classes": None},
    "classes that are numbers": {"classes": [0, 1, 2]},
    "a text for classes": {"classes": "abc"},
}


@pytest.mark.parametrize("what", NOTES)
def test_odd_notes_in_a_file_of_weights_are_one_sentence(what, pets, tmp_path, capsys):
    notes, path = write_notes(VIEW, ("cat", "dog", "owl")), tmp_path / "odd.safetensors"
    odd = NOTES[what] if isinstance(NOTES[what], str) else json.dumps(json.loads(notes["task"]) | NOTES[what])
    save(ViT(vit_config("W32-1x1/4", image_size=16, num_classes=3)), path, {"task": odd})
    assert main(["predict", str(path), str(pets)]) == 2
    said = capsys.readouterr().err
    assert f"{path} is damaged and cannot be read" in said and said.count("\n") == 1


class Code:
    """Unpickling an instance would set `ran`."""

    ran = False

    def __reduce__(self):
        return setattr, (Code, "ran", True)


def test_what_a_command_has_written_and_something_has_damaged_is_named(pets, tmp_path, trunk_file):
    out, path = tmp_path / "out", tmp_path / "out" / "result.json"
    whole = asdict(short(pets, out, trunk_file, lr=1e-3, epochs=1))
    for damage in ("", "null", "[]", "{}", "[" * 99_999, json.dumps(whole | {"test_top1": "x"})):
        path.write_text(damage)
        with pytest.raises(UsageError, match=r"result\.json is damaged and cannot be read"):
            short(pets, out, trunk_file, lr=1e-3, epochs=1)
    for damage in (b"", b"a,b\n1,2\n", b"\xff\xfe", b"path,label,part,group,content\nx\n"):
        (out / "split.csv").write_bytes(damage)
        with pytest.raises(UsageError, match=r"split\.csv is damaged and cannot be read"):
            evaluate(out, pets)
    job = SimpleNamespace(data={"test": range(2)})
    run = SimpleNamespace(place=lambda job: tmp_path)
    for array in (np.array([Code(), Code()]), np.zeros(2), np.zeros(3, bool)):
        np.save(tmp_path / "test.npy", array)
        with pytest.raises(UsageError, match=r"test\.npy is damaged and cannot be read"):
            right_on_test(run, job)
    assert not Code.ran


@pytest.mark.parametrize("name", ["result.json", "best.safetensors", "split.csv", "runs"])
def test_a_folder_in_the_place_of_a_file_is_named_before_anything_is_trained(name, pets, tmp_path, trunk_file):
    place = tmp_path / "out" / name
    place.mkdir(parents=True) if name != "runs" else put(tmp_path / "out" / "x.png", 1).rename(place)
    with pytest.raises(UsageError, match="is there and holds something else: give another place"):
        finetune(pets, tmp_path / "out", trunk_file)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


@pytest.mark.parametrize("names", [("C", "C++", "C#"), ("-1", "1", "1.0")])
def test_classes_whose_names_differ_in_signs_are_classes(names, tmp_path):
    assert sorted(read_task(class_folders(tmp_path / "data", names), VIEW).data.classes) == sorted(names)


def test_a_name_that_is_not_utf8_is_printed_and_written(pets, tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    save(ViT(vit_config("W32-1x1/4", image_size=16, num_classes=3)), path, write_notes(VIEW, ("a", "b", "c")))
    (pets / "cat" / "0.png").rename(f"{pets}/cat/caf\udce9.png")
    assert main(["predict", str(path), str(pets / "cat"), "--csv", str(tmp_path / "said.csv")]) == 0
    for said in (capsys.readouterr().out, (tmp_path / "said.csv").read_text(encoding="utf-8")):
        assert f"{pets}/cat/caf\\xe9.png" in said
    with pytest.raises(UsageError, match="there is no image to look at"):
        predict(path, [])


def test_a_class_that_the_terminal_cannot_show_is_printed(pets, tmp_path, monkeypatch):
    path, shown = tmp_path / "model.safetensors", io.BytesIO()
    model = ViT(vit_config("W32-1x1/4", image_size=16, num_classes=3))
    model.head.bias.data[1] = 99
    save(model, path, write_notes(VIEW, ("a", "caf\u00e9", "c")))
    monkeypatch.setenv("MPLBACKEND", "module://a_notebook_around_this")
    monkeypatch.setattr(sys, "argv", ["vitlib", "predict", str(path), str(pets / "cat" / "0.png")])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("vitlib", run_name="__main__")
    sys.stdout.flush()
    assert os.environ["MPLBACKEND"] == "agg" and stop.value.code == 0 and b"\tcaf\\xe9\t" in shown.getvalue()


def test_what_is_not_finite_is_not_predicted(pets, tmp_path):
    model = ViT(vit_config("W32-1x1/4", image_size=16, num_classes=3))
    model.head.weight.data[:] = 3e38
    save(model, tmp_path / "model.safetensors", write_notes(VIEW, ("a", "b", "c")))
    with pytest.raises(UsageError, match=r"says of these images is not finite: its weights cannot be right"):
        predict(tmp_path / "model.safetensors", pets)


def test_a_folder_of_something_else_is_not_written_into(pets, trunk_file):
    with pytest.raises(UsageError, match="is there and holds something else: give another place"):
        finetune(pets, pets, trunk_file)
    with pytest.raises(UsageError, match="is there and holds something else"):
        compare(pets, trunk_file, trunk_file)


def test_no_memory_and_no_room_are_one_sentence(monkeypatch, pets, tmp_path, trunk_file, capsys):
    def no_memory(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(runs.loop, "train", no_memory)
    with pytest.raises(UsageError, match="no memory for batches of 8 images of 16 pixels"):
        short(pets, tmp_path / "out", trunk_file, lr=1e-3)

    def no_room(*_, **__):
        raise OSError(28, "No space left on device", "out/best.safetensors")

    monkeypatch.setattr(runs.loop, "train", no_room)
    assert main(["finetune", str(pets), "--from", str(trunk_file), "--out", str(tmp_path / "o"), "--lr", "1e-3"]) == 2
    assert "vitlib: no room on disk for what this command writes" in capsys.readouterr().err


def test_a_rate_at_which_the_loss_is_not_finite_loses_the_search_and_alone_is_refused(
    monkeypatch, pets, tmp_path, trunk_file
):
    def train(model, recipe, *_, **__):
        raise runs.loop.NonFiniteLoss

    monkeypatch.setattr(runs.loop, "train", train)
    with pytest.raises(UsageError, match="the loss is not finite at the rates 1e-05: give a lower one with --lr"):
        short(pets, tmp_path / "out", trunk_file, lr=1e-5)
    assert runs.best_of({1e-3: runs.Outcome(-1.0, np.inf, 0, 0.0), 1e-4: runs.Outcome(0.0, 9.0, 1, 0.0)}) == 1e-4


def test_a_seed_at_which_the_loss_is_not_finite_is_said(monkeypatch, tmp_path, trunk_file):
    monkeypatch.setattr("vitlib.tasks.compare.execute", lambda run, job: runs.Outcome(-1.0, np.inf, 0, 0.0))
    job = runs.Job(read_task(class_folders(tmp_path / "pets"), VIEW), read_trunk(trunk_file), VIEW, tmp_path)
    with pytest.raises(UsageError, match=r"the loss of norm, rate 0.1, seed 3 is not finite.*: leave norm out"):
        right_on_test(runs.Run("norm", 0.1, 3), job)


def test_images_that_are_too_many_for_memory_are_streamed(monkeypatch, pets, tmp_path, trunk_file):
    for path in pets.rglob("*.png"):  # of squares both ways to the middle square are one
        Image.open(path).resize((20, 20)).save(path)
    monkeypatch.setattr("vitlib.tasks.images.HELD", 0)
    monkeypatch.setattr("vitlib.tasks.images.WORKERS", 0)
    streamed = read_task(pets, VIEW)
    monkeypatch.setattr("vitlib.tasks.images.HELD", 2**30)
    held = read_task(pets, VIEW)
    assert streamed.data.streamed and not held.data.streamed and streamed.checksum == held.checksum
    # what a model sees of a test image is the same, up to how Pillow and torch round
    seen = [next(task.part("test").evaluation_batches(9)).images for task in (streamed, held)]
    assert (seen[0] - seen[1]).abs().max() <= 2 / 127.5 + 1e-6
    monkeypatch.setattr("vitlib.tasks.images.HELD", 0)
    assert short(pets, tmp_path / "out", trunk_file, lr=1e-3, epochs=1).test_images == 6


def test_a_timm_name_brings_its_own_preprocessing(monkeypatch, trunk_file):
    ours = read_trunk(trunk_file).model
    monkeypatch.setattr("vitlib.tasks.trunk.read_checkpoint", lambda name: ours)
    assert read_trunk("vit_tiny_patch16_224").mean == (0.5, 0.5, 0.5)
    assert read_trunk("deit3_small_patch16_224").mean == (0.485, 0.456, 0.406)


# --- predictions ---


@pytest.fixture
def tuned(pets, tmp_path, trunk_file):
    """A model that knows its three classes: pictures of a class have a colour of their own."""
    for k, path in enumerate(sorted(pets.rglob("*.png"))):
        noise = np.random.default_rng(k).integers(0, 60, (20, 24, 3))
        colour = np.eye(3)[["cat", "dog", "owl"].index(path.parent.name)] * 180
        Image.fromarray((noise + colour).astype(np.uint8)).save(path)
    short(pets, tmp_path / "model", trunk_file, strategy="full", lr=1e-2, epochs=12)
    return tmp_path / "model"


def test_a_folder_that_is_not_there_is_not_evaluated(trunk_file, monkeypatch, tmp_path):
    monkeypatch.setattr("vitlib.tasks.predict.classifier", read_trunk)
    with pytest.raises(UsageError, match="there is no folder"):
        evaluate(trunk_file, tmp_path / "nowhere")


def test_a_model_says_the_class_of_images_and_folders(tuned, pets, tmp_path, capsys):
    words = ["predict", tuned, pets / "owl", pets / "cat" / "0.png", "--csv", tmp_path / "said.csv"]
    assert main(list(map(str, words))) == 0
    with (tmp_path / "said.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["owl"] * 8 + ["cat"]
    assert rows[-1]["path"] == str(pets / "cat" / "0.png") and 1 / 3 < float(rows[-1]["share"]) <= 1
    assert capsys.readouterr().out.count("owl\t") == 8
    # a text is one path, not one for each of its characters
    assert predict(tuned, str(pets / "cat" / "0.png")).names == (str(pets / "cat" / "0.png"),)
    assert main(["predict", str(tuned), str(pets / "gone.png")]) == 2
    assert "there is no file or folder" in capsys.readouterr().err


def test_a_model_is_judged_on_images_that_it_was_not_trained_on(tuned, pets, tmp_path):
    result = evaluate(tuned, pets, picture=tmp_path / "confusion.png")
    assert result.confusion.tolist() == [[2, 0, 0], [0, 2, 0], [0, 0, 2]] and result.left_out == 18
    assert "top-1 100.0 % (95 % over 6 images: 61.0 to 100.0)" in str(result)
    assert Image.open(tmp_path / "confusion.png").size[0] > 200
    # of other images, some classes, whose labels here are other numbers
    other = tmp_path / "other"
    for i in range(3):
        Image.new("RGB", (20, 20), (200, 10 * i, 5)).save(put(other / "owl" / f"{i}.png", i))
        Image.new("RGB", (20, 20), (10 * i, 200, 5)).save(put(other / "dog" / f"{i}.png", i))
    result = evaluate(tuned, other)
    assert result.confusion.tolist() == [[0, 0, 0], [0, 3, 0], [3, 0, 0]] and result.top1 == 50
    (other / "owl").rename(other / "eagle")
    with pytest.raises(
        UsageError, match="has 1 classes that the model has not, the first is eagle: it knows cat, dog, owl"
    ):
        evaluate(tuned, other)


def test_weights_without_classes_do_not_predict(pets, trunk_file):
    with pytest.raises(UsageError, match="names no classes"):
        predict(trunk_file, [pets])


# --- deltas ---


@pytest.fixture(params=["W32-2x2/4", "W32-3/4"])
def bank(request, tmp_path):
    """Three tasks of one trunk, in which attention, head and positions were changed, and their whole models."""
    config = vit_config(request.param, image_size=16, num_classes=0, layer_scale=0.5, stem="hmlp")
    bank, whole = TaskBank(ViT(config, seed=1).eval()), {}
    for k, name in enumerate(("birds", "cars", "flowers")):
        model = start_from(bank.trunk.state_dict(), replace(config, num_classes=3 + k), seed=k).eval()
        freeze(model, "attn")
        with torch.no_grad():
            for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
                p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * k + i))
        save_delta(
            model, bank.trunk, tmp_path / f"{name}.safetensors", write_notes(VIEW, tuple(map(str, range(3 + k))))
        )
        bank.add(name, tmp_path / f"{name}.safetensors")
        whole[name] = model.requires_grad_(False)
    return bank, whole


def test_each_task_alone_answers_exactly_as_its_own_model_and_a_mixed_batch_within_rounding(bank):
    bank, whole = bank
    images = torch.randn(11, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    alone = {name: model(images) for name, model in whole.items()}
    assert all(torch.equal(bank[name](images), logits) for name, logits in alone.items())
    calls = []
    for module in (m for model in bank.models.values() for m in model.modules()):
        if isinstance(module, FFN | MHSA):
            module.register_forward_hook(
                lambda module, given, out: calls.append((type(module).__name__, len(given[0])))
            )
    tasks = [("birds", "cars", "flowers")[i % 3] for i in range(11)]
    mixed = bank(images, tasks)
    for i, name in enumerate(tasks):
        torch.testing.assert_close(mixed[i], alone[name][i], atol=1e-5, rtol=0)
    # each task has attention of its own; the shared feed-forward networks saw all images at once
    pairs = bank.trunk.config.pairs
    assert sorted(calls) == [("FFN", 11)] * pairs + [("MHSA", 3)] * pairs + [("MHSA", 4)] * 2 * pairs
    assert len(bank.classes["cars"]) == 4


def test_the_bank_of_the_page_runs_as_it_is_printed(pets, tmp_path, trunk_file, monkeypatch, capsys):
    short(pets, tmp_path / "MODEL", trunk_file, lr=1e-3, epochs=1)
    page = Path(__file__).parents[1].joinpath("docs", "own_images.md").read_text(encoding="utf-8")
    code = re.search(r"^```python\n(.*?)^```$", page, re.M | re.S)[1]
    monkeypatch.chdir(tmp_path)
    exec(code.replace("WEIGHTS", str(trunk_file)), said := {})
    assert [len(row) for row in said["logits"]] == [3, 3] and "('cat', 'dog', 'owl')" in capsys.readouterr().out


def test_a_delta_holds_what_differs_and_no_other_trunk_takes_it(bank, tmp_path):
    bank, whole = bank
    state, about = read_safetensors(tmp_path / "cars.safetensors")
    assert set(state) == set(trainable(whole["cars"], "attn")) and about["trunk"] == hash_of(bank.trunk.state_dict())
    assert bank["cars"].layers[0].ffn[0].f.fc1.weight is bank.trunk.layers[0].ffn[0].f.fc1.weight
    with_head = ViT(replace(bank.trunk.config, num_classes=5), seed=1)
    assert hash_of(with_head.state_dict()) == about["trunk"]  # the head is a task's own
    other = ViT(bank.trunk.config, seed=2)
    with pytest.raises(UsageError, match=r"cars.safetensors belongs to another trunk: its hash is .*, this one's "):
        load_delta(tmp_path / "cars.safetensors", other)
    with pytest.raises(UsageError, match="unknown task 'car': allowed are birds, cars, flowers; did you mean 'cars'"):
        bank["car"]
    bank.remove("cars")
    assert list(bank.models) == ["birds", "flowers"]


def test_no_images_have_no_answers(bank):
    assert bank[0](torch.zeros(0, 3, 16, 16), []) == []


def test_a_trunk_that_trains_still_does_when_its_deltas_are_read(bank, tmp_path):
    trunk = bank[0].trunk.requires_grad_(True)
    task = load_delta(tmp_path / "cars.safetensors", trunk)
    assert all(p.requires_grad for p in trunk.parameters()) and not task.head.weight.requires_grad


def test_tasks_that_differ_in_statistics_alone_are_told_apart_in_a_mixed_batch(bank, tmp_path):
    trunk, images, whole = bank[0].trunk, torch.randn(2, 3, 16, 16), {}
    for name, mean in (("light", 1.0), ("dark", -1.0)):
        whole[name] = start_from(trunk.state_dict(), trunk.config).eval()
        whole[name].stem[1].running_mean += mean
        save_delta(whole[name], trunk, tmp_path / f"{name}.safetensors")
        bank[0].add(name, tmp_path / f"{name}.safetensors")
    for i, (name, row) in enumerate(zip(whole, bank[0](images, list(whole)), strict=True)):
        torch.testing.assert_close(row, whole[name](images)[i], atol=1e-5, rtol=0)


def test_what_load_delta_would_refuse_is_not_saved(bank, tmp_path):
    trunk = bank[0].trunk
    with torch.device("meta"):
        empty = ViT(trunk.config)
    adapted = start_from(trunk.state_dict(), trunk.config)
    adapted.layers[0].mhsa[0].f.qkv = nn.Sequential(adapted.layers[0].mhsa[0].f.qkv, nn.Linear(96, 96))
    nothing = start_from(trunk.state_dict(), trunk.config)
    nothing.norm.weight.data[0] = float("nan")
    for model, said in (
        (ViT(replace(trunk.config, depth=1)), r"no task of the trunk: the trunk's layers\.1\..* is not in it"),
        (empty, "no values"),
        (adapted, r"mhsa\.0\.f\.qkv is an adapter"),
        (nothing, "not finite: norm"),
    ):
        with pytest.raises(UsageError, match=said):
            save_delta(model, trunk, tmp_path / "no.safetensors")
    assert not (tmp_path / "no.safetensors").exists()


def test_a_model_in_half_precision_is_whole_though_its_trunk_is_not(bank, tmp_path):
    bank, whole = bank
    save_delta(whole["cars"].bfloat16(), bank.trunk, tmp_path / "half.safetensors")
    again = load_delta(tmp_path / "half.safetensors", bank.trunk)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}


def test_a_delta_in_half_precision_has_half_the_size(bank, tmp_path):
    bank, whole = bank
    model, trunk = whole["cars"].bfloat16(), bank.trunk.bfloat16()
    save_delta(model, trunk, tmp_path / "half.safetensors")
    half = load_delta(tmp_path / "half.safetensors", trunk).state_dict()
    assert all(torch.equal(tensor, half[name]) for name, tensor in model.state_dict().items())
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("half", "cars")]
    assert sizes[0] < 0.65 * sizes[1]


def test_the_storage_of_a_task_is_said_beside_the_papers(bank):
    bank, whole = bank
    own = sum(p.numel() for p in freeze(whole["birds"], "attn") and whole["birds"].parameters() if p.requires_grad)
    saved = 100 * (1 - own / sum(p.numel() for p in whole["birds"].parameters()))
    assert f"{saved:.1f} % saved (paper: 66 %)" in bank.storage().splitlines()[0]
    assert f"birds: {4e-6 * own:.2f} MB of " in bank.storage() and f"in bf16 {2e-6 * own:.2f} MB" in bank.storage()
    for model in bank.models.values():
        model.bfloat16()
    assert f"birds: {2e-6 * own:.2f} MB of " in bank.storage() and f"in bf16 {2e-6 * own:.2f} MB" in bank.storage()


# --- comparison ---


def made_up(full, attn, margin=1.0):
    return Comparison({"full": np.array(full), "attn": np.array(attn)}, {}, {}, {}, margin)


def coin(seed, share, shape=(5, 400)):
    return np.random.default_rng(seed).random(shape) < share


def test_a_verdict_says_not_worse_worse_by_or_how_many_more_seeds():
    right = coin(0, 0.8)
    assert made_up(right, right).verdict("attn") == "attention alone is not worse by 1 point"
    worse = made_up(right, right & coin(1, 0.9))
    low, high = worse.estimate("attn").low, worse.estimate("attn").high
    assert worse.verdict("attn") == f"attention alone is worse by {-high:.1f} to {-low:.1f} points"
    unclear = made_up(right[:2], coin(2, 0.8)[:2], margin=2.5)
    assert "undecided at 2.5 points, needs about" in unclear.verdict("attn")
    # and it is the least number that decides
    e = unclear.estimate("attn")
    n = e.n + more_seeds(e, 2.5)
    decided = [not_worse(e.with_seeds(k), 2.5) or e.with_seeds(k).high < 0 for k in (n - 1, n)]
    assert decided == [False, True] and e.with_seeds(e.n) == pytest.approx(e)
    assert "one seed gives no interval" in made_up(right[:1], right[:1]).verdict("attn")


def test_memory_of_a_step_is_counted_and_attention_alone_needs_less():
    model = ViT(vit_config("W32-2x1/4", image_size=16, num_classes=3))
    images, need = torch.randn(4, 3, 16, 16), {}
    for strategy in ("full", "attn", "head"):
        freeze(model, strategy)
        need[strategy] = step_bytes(model, images)
    assert need["head"] < need["attn"] < need["full"]
    alone = nn.Linear(3, 5)
    # weights and bias with gradients and two moments, and the input of 2 x 3 numbers
    assert step_bytes(alone, torch.randn(2, 3)) == 16 * (15 + 5) + 4 * 6


def test_strategies_are_compared_on_the_same_seeds_and_more_seeds_cost_only_themselves(
    monkeypatch, pets, tmp_path, trunk_file, capsys
):
    trained, train = [], runs.loop.train
    monkeypatch.setattr(runs, "MOST_RATES", 3)
    monkeypatch.setattr(runs.loop, "train", lambda *a, **k: trained.append(k.get("checkpoints")) or train(*a, **k))
    words = [
        "compare",
        pets,
        "--from",
        trunk_file,
        "--out",
        tmp_path / "out",
        "--epochs",
        1,
        "--strategies",
        "full,attn",
    ]
    assert main([*map(str, words), "--seeds", "1"]) == 0
    said = capsys.readouterr()
    assert said.err.index("cost: about") < said.err.index("full, rate") and "one seed gives no interval" in said.out
    assert len(list(filter(None, trained))) == 2 * (3 + 1)
    result = compare(pets, tmp_path / "out", trunk_file, ("full", "attn"), 2, epochs=1)
    assert len(list(filter(None, trained))) == 2 * (3 + 2)
    assert result.correct["attn"].shape == (2, 6) and result.costs["attn"].stored_mb < result.costs["full"].stored_mb
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"runs", "split.csv", "compare.csv", "compare.png"}
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    monkeypatch.setattr("vitlib.errors.find_spec", lambda package: None)
    with pytest.raises(UsageError, match=r"scipy is not installed: pip install 'vitlib\[own\]'"):
        compare(pets, tmp_path / "other", trunk_file)
    assert not (tmp_path / "other").exists()
    with pytest.raises(UsageError, match=r"1 strategies, 5 seeds and margin 1\.0 cannot be compared"):
        compare(pets, tmp_path / "out", trunk_file, ["full"])


# --- adapters ---


class Adapter(nn.Module):
    """What peft puts in the place of a linear layer."""

    def __init__(self, base_layer, rank):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base_layer.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))

    def merge(self):
        self.base_layer.weight.data += self.lora_B.weight.data @ self.lora_A.weight.data


def inject(options, model):
    for name in [name for name, _ in model.named_modules() if re.fullmatch(options.target_modules, name)]:
        model.set_submodule(name, Adapter(model.get_submodule(name), options.r))
    for name, p in model.named_parameters():
        p.requires_grad = "lora_" in name


@pytest.fixture(params=["stand-in", "peft"])
def peft(request, monkeypatch):
    if request.param == "peft":
        return pytest.importorskip("peft")
    stand_in = SimpleNamespace(
        __spec__=ModuleSpec("peft", None), LoraConfig=SimpleNamespace, inject_adapter_in_model=inject
    )
    monkeypatch.setitem(sys.modules, "peft", stand_in)


def test_adapters_on_every_attention_train_beside_head_and_positions_and_become_plain_matrices(peft):
    config = vit_config("W32-2x2/4", image_size=16, num_classes=3, layer_scale=0.5)
    model, twin, other = (ViT(config).eval() for _ in range(3))
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    before = model(images)
    for adapted, seed in ((model, 0), (twin, 0), (other, 1)):
        add_adapters(adapted, seed)
    torch.testing.assert_close(model(images), before)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adapters = {name: p for name, p in trained.items() if "lora_" in name}
    assert trained.keys() - adapters.keys() == {"head.weight", "head.bias", "pos_embed"}
    assert sum(p.numel() for p in adapters.values()) == 4 * 8 * ((32 + 3 * 32) + (32 + 32))
    assert all(torch.equal(p, twin.get_parameter(name)) for name, p in adapters.items())
    assert not all(torch.equal(p, other.get_parameter(name)) for name, p in adapters.items())
    with torch.no_grad():
        for k, p in enumerate(adapters.values()):
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(k))
    plain = merged(model)
    assert plain.state_dict().keys() == ViT(config).state_dict().keys() and merged(plain) is plain
    torch.testing.assert_close(plain(images), model(images), atol=1e-5, rtol=0)
    assert (plain(images) - before).abs().max() > 0.01


def test_lora_is_compared_where_peft_is_and_nowhere_else(monkeypatch, peft, pets, tmp_path, trunk_file):
    monkeypatch.setattr(runs, "MOST_RATES", 3)
    result = compare(pets, tmp_path / "out", trunk_file, ("attn", "lora"), 1, epochs=1)
    assert (
        result.correct["lora"].shape == (1, 6) and 0 < result.costs["lora"].stored_mb < result.costs["attn"].stored_mb
    )
    with pytest.raises(UsageError, match="unknown strategy 'lora'"):
        finetune(pets, tmp_path / "model", trunk_file, "lora")
    monkeypatch.setattr("vitlib.errors.find_spec", lambda package: None if package == "peft" else package)
    with pytest.raises(UsageError, match=r"peft is not installed: pip install 'vitlib\[lora\]'"):
        compare(pets, tmp_path / "other", trunk_file, ("attn", "lora"))


# --- export and plan ---


@pytest.mark.parametrize("form", ["onnx", "torch-export"])
def test_an_exported_model_answers_as_the_model_on_any_batch(form, pets, tmp_path, trunk_file, capsys):
    short(pets, tmp_path / "model", trunk_file, lr=1e-3, epochs=1)
    if form == "onnx":
        pytest.importorskip("onnxruntime")
    out = tmp_path / f"model.{'onnx' if form == 'onnx' else 'pt2'}"
    assert main(["export-model", str(tmp_path / "model"), f"--{form}", str(out)]) == 0
    assert "logits within" in capsys.readouterr().out
    notes = json.loads(Path(f"{out}.json").read_text())
    assert notes["classes"] == ["cat", "dog", "owl"] and notes["image_size"] == 16 and len(notes["mean"]) == 3
    assert main(["export-model", str(tmp_path / "model")]) == 2
    assert "writes one file: give --onnx FILE or --torch-export FILE" in capsys.readouterr().err


def test_an_export_that_differs_is_not_kept(monkeypatch, pets, tmp_path, trunk_file):
    short(pets, tmp_path / "model", trunk_file, lr=1e-3, epochs=1)
    other = read_trunk(tmp_path / "model").model
    other.head.bias.data += 1
    monkeypatch.setattr("vitlib.tasks.export.fuse", lambda model: other)
    with pytest.raises(UsageError, match=r"logits differ by 1.0e.00 from the model's: nothing was written"):
        export_model(tmp_path / "model", torch_export=tmp_path / "model.pt2")
    assert not list(tmp_path.glob("*.pt2*"))


def test_a_plan_counts_memory_and_time_for_a_gpu_that_is_not_here(pets, trunk_file, capsys):
    assert main(["plan", str(pets), "--from", str(trunk_file), "--device", "rtx4090"]) == 0
    full, attn, head, _ = capsys.readouterr().out.splitlines()
    most = [int(re.search(r"at most ([\d,]+) images", line)[1].replace(",", "")) for line in (full, attn, head)]
    assert most[0] < most[1] < most[2] and "full: 0:00:01 for a run on rtx4090" in full  # not in no time
    assert main(["plan", str(pets), "--from", str(trunk_file), "--device", "rtx409"]) == 2
    assert "unknown device 'rtx409'" in capsys.readouterr().err and not pets.with_name("runs").exists()
    assert main(["plan", str(pets), "--from", str(trunk_file)]) == 0
    assert f"for a run on {resolve('auto')}, " in capsys.readouterr().out


# --- pre-training ---


def test_masked_pre_training_makes_a_trunk_that_fine_tuning_starts_from(monkeypatch, tuned, pets, tmp_path, capsys):
    words = ["pretrain", pets, "--out", tmp_path / "pre", "--model", "W32-2/4", "--image-size", 16, "--epochs", 2]
    assert main([*map(str, words), "--batch-size", "8"]) == 0
    said = capsys.readouterr()
    assert re.search(r"loss [\d.]+ -> [\d.]+, linear probe [\d.]+ % of 3 folders", said.out)
    assert said.err.count("linear probe") == 6  # of 6 steps
    trunk = read_trunk(tmp_path / "pre")
    assert trunk.model.config.stem == "hmlp" and trunk.classes == () and trunk.model.config.num_classes == 0
    short(pets, tmp_path / "from", tmp_path / "pre", lr=1e-3, epochs=1)
    # it is read when it is asked for again, and no other takes its place
    monkeypatch.setattr(runs.loop, "train", lambda *_, **__: pytest.fail("it was trained again"))
    assert main([*map(str, words), "--batch-size", "8"]) == 0 and capsys.readouterr().out == said.out
    assert main([*map(str, words), "--batch-size", "4"]) == 2
    assert "pre holds another trunk: give another place with --out" in capsys.readouterr().err
    for wrong, sentence in ((("--targets", "dvae"), "need a tokenizer"), (("--stem", "hmpl"), "unknown stem 'hmpl'")):
        assert main([*map(str, words), *wrong]) == 2
        assert sentence in capsys.readouterr().err


def test_the_linear_probe_sees_what_can_be_told_apart(tuned, pets):
    model = read_trunk(tuned).model
    data = read_task(pets, VIEW).data
    assert probe(model, data, runs.Engine()) == 100
    data.labels[:] = torch.from_numpy(np.random.default_rng(0).integers(0, 3, len(data)))
    assert probe(model, data, runs.Engine()) < 100
