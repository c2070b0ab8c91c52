"""Data that is not embedded: a folder of parquet files or class folders, what is measured of it, and profile gpu on it."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lab import paths
from lab.__main__ import main
from lab.data import external, readers, registry
from lab.data.registry import load
from lab.experiments import catalogue, profiles, small
from lab.report import judgements, render
from lab.runs import execute, store
from vitlib.errors import UsageError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def picture(label: int, number: int, side: int = 32) -> Image.Image:
    """Ten brightnesses of the class, and a bright pixel that numbers the picture."""
    pixels = np.full((side, side, 3), 20 * label, np.uint8)
    pixels[number // side, number % side] = 255
    return Image.fromarray(pixels)


def parquet(path: Path, a_class: int, side: int = 32, **columns: str) -> None:
    names = {"image": "image", "label": "label"} | columns
    cells = []
    for number in range(a_class):
        for label in range(len(CLASSES)):
            file = io.BytesIO()
            picture(label, number, side).save(file, "png")
            cells.append(({"bytes": file.getvalue(), "path": None}, label))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({names["image"]: [c for c, _ in cells], names["label"]: [n for _, n in cells]}), path)


def folders(path: Path, a_class: int) -> None:
    for label, name in enumerate(CLASSES):
        (path / name).mkdir(parents=True)
        for number in range(a_class):
            picture(label, number).save(path / name / f"{number:03}.png")


@pytest.fixture
def data(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("VITLIB_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("VITLIB_OUTPUTS", str(tmp_path / "outputs"))
    for cache in (registry.load, external.arrays, registry._measured):
        cache.cache_clear()
    return tmp_path / "data"


def test_parquet_files_shards_and_class_folders_give_the_same_images(data, monkeypatch, tmp_path):
    parquet(data / "cifar-10" / "train.parquet", 20)
    parquet(data / "cifar-10" / "test.parquet", 2)
    one = {split: load("cifar-10", split) for split in registry.SPLITS}
    assert [len(one[s]) for s in registry.SPLITS] == [180, 20, 20]  # one in ten of each class is held out
    for split, a_class in (("train", 18), ("validation", 2), ("test", 2)):
        assert np.bincount(one[split].labels).tolist() == [a_class] * 10
    last = one["validation"].images[one["validation"].labels == 3]
    assert sorted(int(image[0].flatten().argmax()) for image in last) == [18, 19]  # the last ones of the class

    for form in ("shards", "folders"):
        monkeypatch.setenv("VITLIB_DATA", str(tmp_path / form))
        place = tmp_path / form / "cifar10"
        if form == "shards":
            parquet(place / "data" / "train-00000-of-00001.parquet", 20, image="img")
            parquet(place / "data" / "test-00000-of-00001.parquet", 2, image="img")
        else:
            folders(place / "train", 20)
            folders(place / "test", 2)
        other = load("cifar-10", "train") if registry.load.cache_clear() is None else None
        assert sorted(map(bytes, other.images.numpy())) == sorted(map(bytes, one["train"].images.numpy()))
        assert other.classes == (CLASSES if form == "folders" else tuple("0123456789"))


@pytest.mark.parametrize("name", ["cifar-10", "cifar10"])
def test_images_in_memory_and_images_read_from_files_are_those_of_one_folder(data, name):
    """Profiles gpu and imagenet; the card has both names."""
    with pytest.raises(UsageError, match=f"no folder {data / 'cifar-10'} or {data / 'cifar10'} for"):
        readers.find("cifar-10", "train")
    for split, a_class in (("train", 20), ("test", 2)):
        folders(data / name / split, a_class)
    images, labels, classes = external.read("cifar-10", registry.card("cifar-10"))["test"]
    found = readers.find("cifar-10", "test")
    assert found.rows.folder == readers.locate("cifar-10") == data / name
    assert (found.classes, found.labels.tolist()) == (tuple(classes), labels.tolist())
    assert all(np.array_equal(found.rows.open(i), images[i].transpose(1, 2, 0)) for i in range(20))


def test_what_is_measured_is_what_the_pixels_say_and_is_kept(data, tmp_path):
    parquet(data / "cifar-10" / "train.parquet", 20)
    parquet(data / "cifar-10" / "test.parquet", 2)
    known, pixels = registry.facts("cifar-10"), load("cifar-10", "train").images.double() / 255
    assert (known.channels, known.num_classes, known.image_size) == (3, 10, 32)
    assert known.sizes == {"train": 180, "validation": 20, "test": 20}
    assert known.mean == pytest.approx(pixels.mean().item(), abs=1e-5)
    assert known.std == pytest.approx(pixels.std(unbiased=False).item(), abs=1e-5)
    (kept,) = (tmp_path / "outputs" / "data").glob("*.json")
    registry._measured.cache_clear()
    external.arrays.cache_clear()
    kept.write_text(kept.read_text().replace('"num_classes": 10', '"num_classes": 11'))
    assert registry.facts("cifar-10").num_classes == 11  # read, not measured again
    before = registry.data_checksum("cifar-10")
    parquet(data / "cifar-10" / "test.parquet", 3)
    registry._measured.cache_clear()
    assert registry.facts("cifar-10").sizes["test"] == 30 and registry.data_checksum("cifar-10") != before


@pytest.mark.parametrize("what, says", {
    "nowhere": "data set 'cifar-10' is not there: looked for",
    "no test split": "has no split test (parquet files or class folders); it holds train.parquet",
    "two sizes": "have 2 sizes (32x32, 40x40, ...): allowed is one size throughout",
    "no label": "has no column label or fine_label or cls: it has image, kind",
    "broken image": "cat/000.png cannot be read",
    "empty class": "1 of 10 class folders in",
    "other classes": "the training images have 10 classes and the test images 9",
    "torn file": "train.parquet is damaged",
}.items())  # fmt: skip
def test_bad_data_is_one_sentence_that_names_it(data, what, says):
    place = data / "cifar-10"
    if what != "nowhere":
        parquet(place / "train.parquet", 20, **({"label": "kind"} if what == "no label" else {}))
    if what not in ("nowhere", "no test split"):
        folders(place / "test", 1)
    if what == "two sizes":
        picture(0, 0, 40).save(place / "test" / "cat" / "x.png")
    if what == "broken image":
        (place / "test" / "cat" / "000.png").write_bytes(b"no image")
    if what == "empty class":
        (place / "test" / "cat" / "000.png").unlink()
    if what == "other classes":
        (place / "test" / "cat" / "000.png").unlink()
        (place / "test" / "cat").rmdir()
    if what == "torn file":
        (place / "train.parquet").write_bytes((place / "train.parquet").read_bytes()[:-50])
    with pytest.raises(UsageError) as said:
        registry.facts("cifar-10")
    assert says in str(said.value) and "\n" not in str(said.value)
    assert isinstance(said.value, external.DataAbsent) == (what == "nowhere")


def test_absent_data_leave_the_other_notebooks_running_and_their_parts_not_run(data):
    there, absent = catalogue.available("gpu", list(catalogue.NOTEBOOKS))
    assert there == ["00", "21", "36", "51"] and len(absent) == 2
    assert str(data / "cifar-10") in str(absent[0]) and "data_cards/cifar-10.md" in str(absent[0])
    every = {verdict.part.id: verdict for verdict in judgements.verdicts("gpu")}
    assert every["A1"].word == "not run" and "cifar-10" in every["A1"].note and every["P1"].word == "exact"
    assert "tiny-imagenet" in str(absent[1]) and catalogue.available("cpu", ["31", "42"]) == (["31", "42"], [])


def test_reproduce_names_absent_data_before_any_run_and_still_renders_the_others(data, monkeypatch, capsys):
    rendered = []
    monkeypatch.setattr(
        render, "reproduce", lambda profile, notebooks, specs, *rest: rendered.append((notebooks, specs))
    )
    code = main(["reproduce", "--profile", "gpu", "--notebook", "31", "--notebook", "21"])
    said = capsys.readouterr().err.splitlines()
    assert code == 2 and "data set 'cifar-10' is not there" in said[0] and "1 data set(s) of profile gpu" in said[1]
    assert rendered == [(["21"], [])]


def test_every_arm_of_gpu_runs_where_there_is_a_gpu_and_the_ledgers_arms_are_there(data):
    for name in ("cifar-10", "tiny-imagenet"):
        parquet(data / name / "train.parquet", 20)
        parquet(data / name / f"{'test' if name == 'cifar-10' else 'valid'}.parquet", 2)
    for part in (p.at_profile("gpu") for p in trained_parts()):
        arms = catalogue.experiment(part.notebook, "gpu").arms
        assert set(part.arms(max(12, part.min_pairs))) <= set(arms), part.id
        assert {arms[arm].device for arm in part.contrast_at(max(12, part.min_pairs)) if arm in arms} <= {"auto"}
    transfer = catalogue.experiment("42", "gpu").arms["W192 cifar-10 500 attn"]
    assert (transfer.data, transfer.parent.data) == ("cifar-10", "tiny-imagenet")


def trained_parts():
    from lab.claims.ledger import ledger

    return [
        p for p in ledger().values() if p.belongs("gpu") and p.control and p.notebook != "21" and p.scope != "imagenet"
    ]


PHOTOGRAPHS = paths.ROOT.parent / "shared" / "data"


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="the photographs of ../shared/data are not here")
def test_a_short_run_of_profile_gpu_on_photographs(data, monkeypatch, tmp_path):
    monkeypatch.setenv("VITLIB_DATA", str(PHOTOGRAPHS))
    monkeypatch.setenv("VITLIB_RUNS", str(tmp_path / "runs"))
    p = replace(profiles.profile("gpu"), seeds=(1000,), images=500, epochs=1, width=32, pairs=2)
    spec = small.resolution(p)["attn"]
    spec = replace(spec, images=200, model=replace(spec.model)).with_seed(1000)
    for member in spec.family():
        result = execute.execute(member)
    assert len(result.correct) == 5000 and result.about["split"] == "validation"
    assert result.metrics["trained_params"] < sum(t.numel() for t in store.weights(spec).values()) / 2
