"""Files and names with random damage: the right answer or one sentence, never another exception. Seeded, so that it repeats."""

import json
import random
import string
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from lab.data import published
from lab.experiments.catalogue import notebook
from lab.experiments.profiles import profile
from lab.paths import DATA_CARDS
from lab.runs import store
from lab.runs.results import Result, hash_of, read_runs
from vitlib.errors import UsageError
from vitlib.model import ViT, vit_config
from vitlib.model.weights import load, read_checkpoint

TIMES = 200
ABOUT = {
    "split": "test",
    "wall_s": 1.0,
    "cpu_s": 1.0,
    "mem_mb": 5,
    "device": "a",
    "torch": "2",
    "python": "3",
    "commit": "c",
    "date": "d",
}
SPEC = {"protocol": "supervised", "seed": 0}
RESULT = Result(hash_of(SPEC), {"top1": 50.0}, np.array([True, False]), {"P1": "0"}, ABOUT)
WORDS = (
    "null",
    "[]",
    "{}",
    '""',
    "-1",
    "1e999",
    "NaN",
    "9" * 400,
    "true",
    "[" * 5000,
    '"\\ud800"',
    "\0",
    "../..",
    "\n",
)


def damaged(whole: bytes, draws: random.Random) -> bytes:
    """Some bytes changed, cut out or put in, or a value of JSON in the place of another."""
    start = draws.randrange(len(whole))
    end = start + draws.choice((0, 1, 1, 4, 30))
    new = draws.choice((b"", draws.randbytes(2), draws.choice(WORDS).encode()))
    return whole[: draws.choice((start, start, 0))] + new + whole[end:] if draws.random() < 0.9 else whole[:start]


def changed(value: object, draws: random.Random) -> object:
    """A value of JSON in which one part is another one."""
    if isinstance(value, dict) and value and draws.random() < 0.9:
        name = draws.choice(sorted(value))
        return value | {name: changed(value[name], draws)}
    return draws.choice((None, [], {}, "", "x", -1, 0, 1.5, 10**400, float("nan"), True, [value], {"x": value}))


def one_sentence(call, *arguments) -> bool:
    """Whether a call was refused; then in one sentence."""
    try:
        call(*arguments)
    except UsageError as fault:
        assert str(fault) and "\n" not in str(fault)
        return True
    return False


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_weights_file_is_one_sentence(seed, tmp_path):
    draws, path = random.Random(seed), tmp_path / "x.safetensors"
    vit = ViT(vit_config("W32-1x1/8", image_size=8, num_classes=2))
    about = asdict(vit.config)
    save_file(vit.state_dict(), path, {"vitlib": json.dumps(about)})
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for _ in range(TIMES):
        path.write_bytes(damaged(whole[:header], draws) + whole[header:])
        refused += one_sentence(load, path)
        one_sentence(read_checkpoint, path)
        save_file(vit.state_dict(), path, {"vitlib": json.dumps(changed(about, draws))})
        refused += one_sentence(load, path)
    assert refused > TIMES


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_result_or_archive_is_one_sentence(seed, tmp_path, monkeypatch):
    draws, path = random.Random(seed), tmp_path / "runs.jsonl"
    monkeypatch.setenv("VITLIB_RUNS", str(tmp_path / "runs"))
    run = {"spec": SPEC, "result": RESULT.record()}
    whole = json.dumps(run).encode()
    path.write_bytes(whole)
    assert not one_sentence(lambda: list(read_runs(path)))
    refused = 0
    for _ in range(TIMES):
        path.write_bytes(damaged(whole, draws))
        refused += one_sentence(store.import_runs, path)
        path.write_text(json.dumps(changed(run, draws)) + "\n")
        refused += one_sentence(store.import_runs, path)
    assert refused > TIMES


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_card_is_one_sentence(seed, tmp_path):
    draws = random.Random(seed)
    whole = (DATA_CARDS / "digits.md").read_bytes()
    for k in range(TIMES // 4):
        path = Path(tmp_path, f"{k}.md")
        path.write_bytes(damaged(whole, draws))
        one_sentence(published.read_card, path)


def test_a_name_of_any_characters_is_one_sentence():
    draws = random.Random(0)
    for _ in range(TIMES):
        name = "".join(draws.choices(string.printable + "äß\0ἀ𝔅x/-", k=draws.randrange(12)))
        for look_up in (vit_config, profile, notebook):
            one_sentence(look_up, name)
    for name in (
        "B" + "9" * 5000,
        "W" + "9" * 400 + "-2",
        "B12/" + "9" * 400,
        "B12x0",
        "B0",
        "B12/0",
        "W0-1",
        "B\u0661",
    ):
        assert one_sentence(vit_config, name), name
