"""The ledger of claims: what is fixed before any judged run (`outputs/paper/claims.toml` and `recipes.toml`).

One `Part` is one testable sentence: arms, contrast, test, margin, seeds, checks. `recipes.toml` has the full recipe of every
arm that a part reads; `python -m tools.ledger` writes it from the code, before the runs. Each run stores `stamps` when it
starts, so that an entry or a recipe which is edited afterwards is found out. Standard library only: runs are also made on
machines that have nothing but torch, and verdicts are read on machines without torch.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from lab import paths
from vitlib.errors import UsageError, unknown

KINDS = ("exact", "superiority", "equivalence", "non-inferiority", "ratio")
PROFILES = ("cpu", "study", "photos", "imagenet")  # where trained parts are measured; exact ones are counted everywhere
COMMITTED = ("study", "photos", "imagenet")  # whose judged runs come from a commit
CHECKED = ("study", "photos")  # whose parts have checks, and arms whose rates were tuned
PILOT = "pilot"  # the first study, whose estimates stand where the second has none
CONFIDENCE = ("read", "read-chart", "computed")  # of paper-facts, section 0
EXPECTED = ("printed digits", "0", "not 0", "more than 1", "less than 1")
OUTCOMES = ("predicted", "contrary", "level", "undecided")
# Fixed by the hash, which a change of them voids; the others are prose, with a hash of their own that voids nothing.
VALUES = ("kind", "metric", "contrast", "margin", "primary", "contrary", "expected", "device", "out_of_scope")


@dataclass(frozen=True)
class Check:
    """What must hold before a part is judged: the contrast is above `above` (0: its 95 % interval; else one-sided at 5 %)."""

    name: str
    contrast: Mapping[str, float]
    above: float = 0.0


@dataclass(frozen=True)
class Part:
    """One testable sentence of a claim; the keys of a table in claims.toml, which says what they mean."""

    id: str
    claim: str
    title: str
    notebook: str
    kind: str
    metric: str = "top1"
    contrast: Mapping[str, float] = field(default_factory=dict)
    margin: float | None = None  # percentage points
    n: Mapping[str, int] = field(default_factory=dict)  # profile -> seeds, or process restarts; () of an exact part
    subsets: int = 0  # of the labels: each arm is the mean of so many
    primary: bool = False
    contrary: str = "both"  # "worse": of an equivalence only a value below 0 is against the claim
    checks: tuple[Check, ...] = ()
    device: str = "any"  # "cuda": measured on a GPU alone
    out_of_scope: tuple[str, ...] = ()  # profiles at which the part is shown and not judged
    expected: str | None = None  # of exact parts
    paper: float | None = None
    paper_source: str | None = None
    paper_confidence: str | None = None
    power: str = ""  # expected for the paper's own difference
    says: Mapping[str, str] = field(default_factory=dict)  # outcome -> sentence
    at: Mapping[str, Mapping[str, object]] = field(default_factory=dict)  # profile -> keys that differ there

    def at_profile(self, profile: str) -> Part:
        """The part as it is measured at a profile: its own keys there, and arms by subset of the labels."""
        part = replace(self, at={}, **self.at.get(profile, {}))
        checks = part.checks if profile in CHECKED else ()
        checks = tuple(replace(check, contrast=part._by_subset(check.contrast)) for check in checks)
        return replace(part, contrast=part._by_subset(part.contrast), checks=checks)

    def _by_subset(self, contrast: Mapping[str, float]) -> Mapping[str, float]:
        if not self.subsets:
            return contrast
        return {
            f"{arm}, subset {k}": c / self.subsets for arm, c in contrast.items() for k in range(1, self.subsets + 1)
        }

    @property
    def arms(self) -> tuple[str, ...]:
        """Every arm that a verdict reads: those of the contrast and of the checks."""
        named = [*self.contrast, *(arm for check in self.checks for arm in check.contrast)]
        return tuple(dict.fromkeys(named))


@dataclass(frozen=True)
class Ledger:
    """The parts by id, the titles of the claims, and the recipes: profile -> notebook -> arm -> what was fixed of it."""

    parts: Mapping[str, Part]
    claims: Mapping[str, str]
    recipes: Mapping[str, Mapping[str, Mapping[str, Mapping[str, object]]]]

    def part(self, name: str) -> Part:
        if name not in self.parts:
            raise unknown("part of a claim", name, self.parts)
        return self.parts[name]

    def recipe(self, part: Part, profile: str, arm: str) -> Mapping[str, object]:
        """What was fixed of an arm. Raises UsageError where nothing was."""
        arms = self.recipes.get(profile, {}).get(part.notebook, {})
        if arm not in arms:
            raise unknown(f"arm of part {part.id} in {RECIPES} at profile {profile}:", arm, arms)
        return arms[arm]

    def hash(self, part: Part, profile: str) -> str:
        """Of everything that decides a verdict at a profile: arms, recipes, contrast, test, margin, n, checks."""
        if profile not in part.n and part.kind != "exact":
            where = " and ".join(part.n)
            raise UsageError(f"part {part.id} is not measured at profile {profile}: the ledger has it at {where}")
        here = part.at_profile(profile)
        values = {key: getattr(here, key) for key in VALUES} | {"n": here.n.get(profile)}
        values["checks"] = [[dict(check.contrast), check.above] for check in here.checks]
        trained = here.kind not in ("exact", "ratio")
        values["recipes"] = {arm: self.recipe(part, profile, arm) for arm in here.arms} if trained else {}
        return _digest(values)

    def prose(self, part: Part) -> str:
        """The second hash, over titles, sentences and the paper's values; a change voids nothing."""
        return _digest(
            {f.name: getattr(part, f.name) for f in fields(Part) if f.name not in (*VALUES, "checks", "n", "at")}
        )

    def stamps(self, profile: str) -> dict[str, str]:
        """Part -> hash, for every part that is measured at a profile: what each run stores when it starts."""
        return {part.id: self.hash(part, profile) for part in self.parts.values() if profile in part.n}


def _digest(values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=dict).encode()).hexdigest()[:16]


def record_hash(records: Sequence[Mapping[str, object]]) -> str:
    """Of what is trained, whatever its seed: the records of a run's family, what it needs first, its own last."""
    return _digest([{k: v for k, v in r.items() if k not in ("seed", "parent", "tokenizer")} for r in records])


def stamps(profile: str) -> dict[str, str]:
    """`Ledger.stamps` for runs that start now.

    Raises UsageError at a profile whose runs are judged where vitlib/, lab/ or outputs/paper/ have uncommitted changes; a
    checkout without git trains all the same.
    """
    if profile in COMMITTED and paths.commit().endswith("+"):
        raise UsageError(
            f"runs of profile {profile} are judged, and vitlib/, lab/ or outputs/paper/ have uncommitted changes: commit "
            "them first (git status shows them), or train at profile cpu"
        )
    return ledger().stamps(profile)


# ---------------------------------------------------------------------------------------------------- the files

LEDGER, RECIPES = "claims.toml", "recipes.toml"


def ledger(folder: Path | None = None) -> Ledger:
    """The ledger of a folder (None: `outputs/paper`), checked. Raises UsageError for the first entry that cannot be."""
    folder = folder or paths.PAPER
    return _parsed(folder, *(_read(folder / name) for name in (LEDGER, RECIPES)))


@functools.lru_cache(maxsize=4)  # figures and pages ask for each row
def _parsed(folder: Path, *texts: str) -> Ledger:
    tables, recipes = (_tables(folder / name, text) for name, text in zip((LEDGER, RECIPES), texts, strict=True))
    claims, entries = tables.get("claim", {}), tables.get("part", {})
    if not (isinstance(entries, Mapping) and entries and isinstance(claims, Mapping)):
        raise UsageError(f"the ledger {folder / LEDGER} has no tables [claim] and [part.<id>]")
    parts = {name: _part(name, table) for name, table in entries.items()}
    for part in parts.values():
        if part.claim not in claims:
            raise unknown(f"claim of ledger entry {part.id}:", part.claim, claims)
    return Ledger(parts, claims, recipes)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"the ledger {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"the ledger {path} is not valid TOML: {error}") from error


def _tables(path: Path, text: str) -> dict:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"the ledger {path} is not valid TOML: {error}") from error


def _part(name: str, table: object) -> Part:
    if not isinstance(table, Mapping):
        raise UsageError(f"ledger entry {name!r} is not a table of keys")
    places = (*PROFILES, PILOT)
    at = {profile: table[profile] for profile in places if isinstance(table.get(profile), Mapping)}
    values = _values(name, {key: value for key, value in table.items() if key not in at}, KEYS)
    at = {profile: _values(f"{name}.{profile}", changed, OVERRIDES) for profile, changed in at.items()}
    if absent := [key for key in REQUIRED if key not in values]:
        raise UsageError(f"ledger entry {name} lacks the key {absent[0]!r}")
    part = Part(id=name, at=at, **values)
    for there in (part, *map(part.at_profile, at)):
        _check_whole(there)
    return part


def _values(where: str, table: Mapping[str, object], allowed: Sequence[str]) -> dict[str, object]:
    """The values as a Part holds them. Raises UsageError for another key, kind of thing, or name."""
    values = {}
    for key, value in table.items():
        if key not in allowed:
            raise unknown(f"key in ledger entry {where}:", key, allowed)
        wanted, holds, convert = RULES.get(key, TEXT)
        if not holds(value):
            raise UsageError(f"ledger entry {where} has {key} = {value!r}: allowed is {wanted}")
        for word in (value if isinstance(value, list | Mapping) else [value]) if key in NAMES else ():
            if word not in NAMES[key]:
                raise unknown(f"{key} in ledger entry {where}:", word, NAMES[key])
        values[key] = convert(value)
    return values


def _number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _text(x: object) -> bool:
    return isinstance(x, str) and bool(x.strip())


def _coefficients(x: object) -> bool:
    return isinstance(x, Mapping) and bool(x) and all(map(_number, x.values()))


def _counts(x: object) -> bool:
    return isinstance(x, Mapping) and all(isinstance(n, int) and not isinstance(n, bool) and n > 1 for n in x.values())


def _checks(x: object) -> bool:
    return isinstance(x, list) and all(
        isinstance(c, Mapping) and {"name", "contrast"} <= {*c} <= {"name", "contrast", "above"} and _text(c["name"])
        and _coefficients(c["contrast"]) and _number(c.get("above", 0.0)) for c in x
    )  # fmt: skip


def _texts(x: object) -> bool:
    return isinstance(x, Mapping) and all(map(_text, x.values()))


KEYS = tuple(f.name for f in fields(Part) if f.name not in ("id", "at"))
OVERRIDES = ("contrast", "margin", "checks", "paper", "paper_source", "paper_confidence", "subsets")
REQUIRED = ("claim", "title", "notebook", "kind")
# key -> what is allowed, whether a value is that, and how a Part holds it; every other key is a text
TEXT = ("a text", _text, str)
RULES = {
    "contrast": ("a table of arm = number", _coefficients, lambda x: {arm: float(c) for arm, c in x.items()}),
    "checks": ("a list of { name, contrast, above }", _checks, lambda x: tuple(Check(**check) for check in x)),
    "n": ("a table of profile = whole number from 2", _counts, dict),
    "says": ("a table of outcome = sentence", _texts, dict),
    "primary": ("true or false", lambda x: isinstance(x, bool), bool),
    "subsets": ("a whole number", lambda x: isinstance(x, int) and x >= 0, int),
    "margin": ("a number above 0", lambda x: _number(x) and x > 0, float),
    "paper": ("a number", _number, float),
    "out_of_scope": ("a list of profiles", lambda x: isinstance(x, list), tuple),
}
# key -> the names that it may hold
NAMES = {
    "kind": KINDS, "expected": EXPECTED, "paper_confidence": CONFIDENCE, "contrary": ("both", "worse"),
    "device": ("any", "cuda"), "n": (*PROFILES, PILOT), "says": OUTCOMES, "out_of_scope": (*PROFILES, PILOT),
}  # fmt: skip
# kind -> the keys that it needs; the others are measured in points
NEEDED = {"exact": ("expected",), "ratio": ("contrast", "n")}
OF_POINTS = ("contrast", "margin", "n")


def _check_whole(part: Part) -> None:
    """What the keys of an entry must be together."""
    for contrast in (part.contrast, *(check.contrast for check in part.checks)):
        if abs(sum(contrast.values())) > 1e-3:
            raise UsageError(f"ledger entry {part.id} has a contrast whose coefficients do not add up to 0")
    source = () if part.paper is None else ("paper_source", "paper_confidence")
    for key in (*NEEDED.get(part.kind, OF_POINTS), *source):
        if not getattr(part, key):
            raise UsageError(f"ledger entry {part.id} of kind {part.kind!r} lacks the key {key!r}")
    if part.kind == "ratio" and part.paper is not None and part.paper <= 0:
        raise UsageError(f"ledger entry {part.id} has paper = {part.paper}: allowed is a ratio above 0")
