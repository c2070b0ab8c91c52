"""Check `outputs/paper/claims.toml`, and write `recipes.toml` beside it: the full recipe of every arm that a part reads.

    python -m tools.ledger           write it from the code, before the judged runs of a study
    python -m tools.ledger --check   exit code 1 where the code trains another recipe than the ledger has

An entry says in a few words what is trained, and has the hash over the whole record, whatever the seed; `rates` are the
learning rates that tuning chose, each under its name in outputs/reference/<profile>/tuning.csv.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

from lab import paths
from lab.claims.ledger import CHECKED, LEDGER, PILOT, PROFILES, RECIPES, Part, ledger, record_hash, tables_of
from lab.data.cards import card
from lab.data.published import locate
from lab.experiments.catalogue import experiment, notebook
from lab.experiments.profiles import Arm, Profile, profile
from lab.runs.spec import RunSpec
from vitlib.data.augment import Augment
from vitlib.errors import UsageError, unknown
from vitlib.files import write_whole
from vitlib.model import ViTConfig
from vitlib.train.recipe import Recipe

HEAD = "# Written by `python -m tools.ledger`: what is trained under the name of each arm. claims.toml says what for.\n"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.ledger", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check, path = parser.parse_args(words).check, paths.PAPER / RECIPES
    try:
        check_entries(paths.PAPER / LEDGER)
        text = recipes()
    except UsageError as fault:
        parser.error(str(fault))
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
    for i, member in enumerate(family):  # fine-tuned twice: the first time it is the trunk of the second
        again = any(member.protocol == later.protocol for later in family[i + 1 :])
        yield f"{'trunk' if again else member.protocol} = {toml(words(member))}\n"


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
    for field in ("weights", "subset", "strategy", "targets", "masked", "blank", "precision", "execution"):
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
        pairs = (f"{json.dumps(k) if ' ' in k or '+' in k else k} = {toml(v)}" for k, v in value.items())
        return f"{{ {', '.join(pairs)} }}" if value else "{}"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    return repr(value) if isinstance(value, float) else json.dumps(value)


# ---------------------------------------------------------------------------------------------------- the entries


def check_entries(path: Path) -> None:
    """Raises UsageError for the first entry of a claims.toml that is not as the head of that file says."""
    tables = tables_of(path, path.read_bytes() if path.is_file() else b"")
    claims, entries = (tables.get(key, {}) for key in ("claim", "part"))
    for name, table in entries.items() if isinstance(entries, Mapping) else ():
        if not isinstance(table, Mapping):
            raise UsageError(f"ledger entry {name!r} is not a table of keys")
        at = {place: table[place] for place in PLACES if isinstance(table.get(place), Mapping)}
        _check_values(name, {key: value for key, value in table.items() if key not in at}, KEYS)
        for place, changed in at.items():
            _check_values(f"{name}.{place}", changed, OVERRIDES)
        if absent := [key for key in ("claim", "title", "notebook", "kind") if key not in table]:
            raise UsageError(f"ledger entry {name} lacks the key {absent[0]!r}")
        if table["claim"] not in claims:
            raise unknown(f"claim of ledger entry {name}:", table["claim"], claims)
    for part in ledger(path.parent).parts.values():
        for there in (part, *map(part.at_profile, part.at)):
            _check_whole(there)


def _check_values(where: str, table: Mapping[str, object], allowed: Sequence[str]) -> None:
    """Raises UsageError for another key, kind of thing, or name."""
    for key, value in table.items():
        if key not in allowed:
            raise unknown(f"key in ledger entry {where}:", key, allowed)
        wanted, holds = RULES.get(key, ("a text", _text))
        if not holds(value):
            raise UsageError(f"ledger entry {where} has {key} = {value!r}: allowed is {wanted}")
        for word in (value if isinstance(value, list | Mapping) else [value]) if key in NAMES else ():
            if word not in NAMES[key]:
                raise unknown(f"{key} in ledger entry {where}:", word, NAMES[key])


def _number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _text(x: object) -> bool:
    return isinstance(x, str) and bool(x.strip())


def _table_of(holds: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda x: isinstance(x, Mapping) and all(map(holds, x.values()))


def _checks(x: object) -> bool:
    return isinstance(x, list) and all(
        isinstance(c, Mapping) and {"name", "contrast"} <= {*c} <= {"name", "contrast", "above"}
        and _table_of(_number)(c["contrast"]) and _number(c.get("above", 0)) for c in x
    )  # fmt: skip


KEYS = tuple(f.name for f in fields(Part) if f.name not in ("id", "at"))
OVERRIDES = ("contrast", "margin", "checks", "paper", "paper_source", "paper_confidence", "subsets")
# key -> what is allowed, and whether a value is that; every other key is a text
RULES = {
    "contrast": ("a table of arm = number", _table_of(_number)),
    "checks": ("a list of { name, contrast, above }", _checks),
    "n": ("a table of profile = whole number from 2", _table_of(lambda n: type(n) is int and n > 1)),
    "says": ("a table of outcome = sentence", _table_of(_text)),
    "primary": ("true or false", lambda x: isinstance(x, bool)),
    "subsets": ("a whole number", lambda x: isinstance(x, int) and x >= 0),
    "margin": ("a number above 0", lambda x: _number(x) and x > 0),
    "paper": ("a number", _number),
    "out_of_scope": ("a list of profiles", lambda x: isinstance(x, list)),
}
PLACES = (*PROFILES, PILOT)
# key -> the names that it may hold
NAMES = {
    "kind": ("exact", "superiority", "equivalence", "non-inferiority", "ratio"), "contrary": ("both", "worse"),
    "expected": ("printed digits", "0", "not 0", "more than 1", "less than 1"), "device": ("any", "cuda"),
    "paper_confidence": ("read", "read-chart", "computed"), "says": ("predicted", "contrary", "level", "undecided"),
    "n": PLACES, "out_of_scope": PLACES,
}  # fmt: skip


def _check_whole(part: Part) -> None:
    """What the keys of an entry must be together."""
    for contrast in (part.contrast, *(check.contrast for check in part.checks)):
        if abs(sum(contrast.values())) > 1e-3:
            raise UsageError(f"ledger entry {part.id} has a contrast whose coefficients do not add up to 0")
    needed = {"exact": ["expected"], "ratio": ["contrast", "n"]}.get(part.kind, ["contrast", "margin", "n"])
    for key in needed + (["paper_source", "paper_confidence"] if part.paper is not None else []):
        if not getattr(part, key):
            raise UsageError(f"ledger entry {part.id} of kind {part.kind!r} lacks the key {key!r}")
    if part.kind == "ratio" and part.paper is not None and part.paper <= 0:
        raise UsageError(f"ledger entry {part.id} has paper = {part.paper}: allowed is a ratio above 0")


if __name__ == "__main__":
    sys.exit(main())
