"""Write `outputs/paper/recipes.toml`: the full recipe of every arm that a part of the ledger reads, from the code.

    python -m tools.ledger           write it, before the judged runs of a study
    python -m tools.ledger --check   exit code 1 where the code trains another recipe than the ledger has

An entry says in a few words what is trained, and has the hash over the whole record, whatever the seed; `rates` are the
learning rates that tuning chose, each under its name in outputs/reference/<profile>/tuning.csv.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Iterator
from dataclasses import fields, replace

from lab import paths
from lab.claims.ledger import CHECKED, PROFILES, RECIPES, ledger, record_hash
from lab.data.cards import card
from lab.data.published import locate
from lab.experiments.catalogue import experiment, notebook
from lab.experiments.profiles import Arm, Profile, profile
from lab.runs.spec import RunSpec
from vitlib.data.augment import Augment
from vitlib.errors import UsageError
from vitlib.files import write_whole
from vitlib.model import ViTConfig
from vitlib.train.recipe import Recipe

HEAD = "# Written by `python -m tools.ledger`: what is trained under the name of each arm. claims.toml says what for.\n"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.ledger", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(words).check
    path, text = paths.PAPER / RECIPES, recipes()
    if check:
        same = path.is_file() and path.read_text(encoding="utf-8") == text
        print(f"{path.name} is {'' if same else 'not '}what the code trains")
        return 0 if same else 1
    with write_whole(path) as draft:
        draft.write_text(text, encoding="utf-8")
    print(f"written: {path}")
    return 0


def recipes() -> str:
    """The whole file."""
    lines = [HEAD]
    for name in PROFILES:
        p = profile(name)
        # What is measured where it is: a run's hash holds its checksum, so without it the file's entries stay.
        absent = "hub" in card(p.data)["vitlib"] and locate(p.data) is None
        lines += kept(name) if absent else _of_profile(p)
    return "".join(lines)


def _of_profile(p: Profile) -> list[str]:
    return [
        f"\n[{p.name}.{number}.{json.dumps(arm.label)}]\n" + "".join(entry(p, number, arm))
        for number, arms in read_arms(p).items() for arm in arms
    ]  # fmt: skip


def kept(name: str) -> list[str]:
    """The tables of a profile as the file has them."""
    path = paths.PAPER / RECIPES
    tables = path.read_text(encoding="utf-8").split("\n\n") if path.is_file() else []
    return ["\n" + table.rstrip("\n") + "\n" for table in tables if table.startswith(f"[{name}.")]


def read_arms(p: Profile) -> dict[str, list[Arm]]:
    """Notebook -> the arms that parts read at this profile. Raises UsageError for an arm that the notebook does not have."""
    wanted: dict[str, dict[str, None]] = {}
    for part in ledger().parts.values():
        if p.name in part.n and part.kind not in ("exact", "ratio"):
            wanted.setdefault(part.notebook, {}).update(dict.fromkeys(part.at_profile(p.name).arms))
    found = {}
    for number, labels in wanted.items():
        arms = experiment(notebook(number), p).arms
        if absent := [label for label in labels if label not in arms]:
            raise UsageError(
                f"the ledger names arm {absent[0]!r} of notebook {number}, which profile {p.name} does not have"
            )
        found[number] = [arms[label] for label in labels]
    return found


def entry(p: Profile, number: str, arm: Arm) -> Iterator[str]:
    """The lines of one arm."""
    family = list(arm.spec.family())
    values = {
        "n": len(p.seeds[: arm.n]), "classes": arm.spec.model.num_classes, "rates": rates(p, number, arm) if p.name in CHECKED else {},
        "record": record_hash([member.record() for member in family]),
    }  # fmt: skip
    for key, value in values.items():
        yield f"{key} = {toml(value)}\n"
    for member in family:
        yield f"{member.protocol} = {toml(words(member))}\n"


def rates(p: Profile, number: str, arm: Arm) -> dict[str, float]:
    """The tuned rates of an arm and of what it begins with: those whose other values make another run of it."""

    def changed(name: str) -> bool:
        return _with_another_rate(p.name, number, name)[arm.label].spec != arm.spec

    return {name: lr for name, lr in p.rates.items() if changed(name)}


@functools.cache
def _with_another_rate(profile_name: str, number: str, name: str) -> dict[str, Arm]:
    p = profile(profile_name)
    return experiment(notebook(number), replace(p, rates={**p.rates, name: 2 * p.rates[name]})).arms


def words(spec: RunSpec) -> dict[str, object]:
    """What is trained, in the fields that are not their defaults."""
    about: dict[str, object] = {"data": spec.data, "model": spec.model.name, "image_size": spec.model.image_size}
    about |= {"images": spec.images} if spec.images else {}
    for field in ("subset", "strategy", "targets", "masked", "blank", "precision", "execution"):
        if getattr(spec, field) != RunSpec.__dataclass_fields__[field].default:
            about[field] = getattr(spec, field)
    if isinstance(spec.model, ViTConfig):
        for field in ("layer_scale", "drop_path", "stem", "stem_norm", "stem_act", "stem_width", "pool", "pos"):
            if getattr(spec.model, field) != ViTConfig.__dataclass_fields__[field].default:
                about[field] = getattr(spec.model, field)
    for field in fields(Recipe):
        value = getattr(spec.recipe, field.name)
        if value is not None and value != field.default:
            about[field.name] = str(value) if isinstance(value, Augment) else value
    return about


def toml(value: object) -> str:
    if isinstance(value, dict):
        return (
            "{}"
            if not value
            else "{ "
            + ", ".join(f"{json.dumps(k) if ' ' in k or '+' in k else k} = {toml(v)}" for k, v in value.items())
            + " }"
        )
    if isinstance(value, tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    return repr(value) if isinstance(value, float) else json.dumps(value)


if __name__ == "__main__":
    sys.exit(main())
