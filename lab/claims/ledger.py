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
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from lab import paths
from vitlib.errors import UsageError, unknown
from vitlib.files import first_line, intact

PUBLIC = "public"  # the profile of public weights, whose parts stand in no other's tables
# Where trained parts are measured; exact ones are counted everywhere.
PROFILES = ("cpu", "study", "photos", "imagenet", PUBLIC)
COMMITTED = ("study", "photos", "imagenet", PUBLIC)  # whose judged runs come from a commit
CHECKED = ("study", "photos", "imagenet")  # whose parts have checks
PILOT = "pilot"  # the first study, whose estimates stand where the second has none
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
        numbers = range(1, self.subsets + 1)
        return {f"{arm}, subset {k}": c / self.subsets for arm, c in contrast.items() for k in numbers}

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

    def shown(self, profile: str) -> list[Part]:
        """The parts that a profile's tables have."""
        return [part for part in self.parts.values() if profile == PUBLIC or {*part.n} != {PUBLIC}]

    def recipe(self, part: Part, profile: str, arm: str) -> Mapping[str, object]:
        """What was fixed of an arm. Raises UsageError where nothing was."""
        with intact(RECIPES):
            arms = self.recipes.get(profile, {}).get(part.notebook, {})
            if arm in arms:
                return dict(arms[arm])
        raise unknown(f"arm of part {part.id} in {RECIPES} at profile {profile}:", arm, arms)

    def hash(self, part: Part, profile: str) -> str:
        """Of everything that decides a verdict at a profile: arms, recipes, contrast, test, margin, n, checks."""
        if profile not in part.n and part.kind != "exact":
            where = f"the ledger has it at {' and '.join(part.n)}"
            raise UsageError(f"part {part.id} is not measured at profile {profile}: {where}")
        here = part.at_profile(profile)
        values = {key: getattr(here, key) for key in VALUES} | {"n": here.n.get(profile)}
        values["checks"] = [[dict(check.contrast), check.above] for check in here.checks]
        trained = here.kind not in ("exact", "ratio")
        values["recipes"] = {arm: self.recipe(part, profile, arm) for arm in here.arms} if trained else {}
        return _digest(values)

    def prose(self, part: Part) -> str:
        """The second hash, over titles, sentences and the paper's values; a change voids nothing."""
        words = (f.name for f in fields(Part) if f.name not in (*VALUES, "checks", "n", "at"))
        return _digest({name: getattr(part, name) for name in words})

    def stamps(self, profile: str) -> dict[str, str]:
        """Part -> hash, for every part that is measured at a profile: what each run stores when it starts."""
        return {part.id: self.hash(part, profile) for part in self.parts.values() if profile in part.n}


def _digest(values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=dict).encode()).hexdigest()[:16]


def record_hash(records: Sequence[Mapping[str, object]]) -> str:
    """Of what is trained, whatever its seed: the records of a run's family, what it needs first, its own last.

    Of weights by a timm name the name alone counts, so that it is fixed before they are downloaded.
    """
    kept = [{k: v for k, v in r.items() if k not in ("seed", "parent", "tokenizer")} for r in records]
    return _digest([r | {"weights": r["weights"]["name"]} if "name" in r.get("weights", ()) else r for r in kept])


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
    """The ledger of a folder (None: `outputs/paper`). Raises UsageError where its files or an entry cannot be read.

    What the keys of an entry may hold, and be together, `python -m tools.ledger` checks when it writes the recipes.
    """
    files = [(folder or paths.PAPER) / name for name in (LEDGER, RECIPES)]
    try:
        return _parsed(*((path, path.read_bytes()) for path in files))
    except OSError as error:
        raise UsageError(f"the ledger {error.filename} cannot be read: {error.strerror}") from error


@functools.lru_cache(maxsize=4)  # figures and pages ask for each row
def _parsed(*files: tuple[Path, bytes]) -> Ledger:
    tables, recipes = (tables_of(path, content) for path, content in files)
    claims, entries = tables.get("claim", {}), tables.get("part", {})
    if not (isinstance(entries, Mapping) and entries and isinstance(claims, Mapping)):
        raise UsageError(f"the ledger {files[0][0]} has no tables [claim] and [part.<id>]")
    return Ledger({name: _part(name, table) for name, table in entries.items()}, claims, recipes)


def tables_of(path: Path, content: bytes) -> dict:
    """Raises UsageError for what is not TOML."""
    try:
        return tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the ledger {path} is not valid TOML: {first_line(error)}") from error


def _part(name: str, table: Mapping[str, object]) -> Part:
    try:
        at = {key: _values(value) for key, value in table.items() if key in (*PROFILES, PILOT)}
        part = Part(id=name, at=at, **_values({key: value for key, value in table.items() if key not in at}))
        for key in fields(Part):
            value = getattr(part, key.name)
            if not (value is None or _holds(value, key.type.removesuffix(" | None"))):
                raise TypeError(f"{key.name} is {value!r}")
        return part
    except (TypeError, ValueError, AttributeError) as fault:
        said = f"ledger entry {name} cannot be read ({first_line(fault)})"
        raise UsageError(f"{said}: python -m tools.ledger --check says what is allowed") from fault


def _holds(value: object, kind: str) -> bool:
    """Whether a value is of a type of `Part`'s fields; what is in a tuple is not looked at."""
    if kind.startswith("Mapping[str, "):
        inside = kind.removeprefix("Mapping[str, ").removesuffix("]")
        return isinstance(value, Mapping) and all(_holds(one, inside) for one in value.values())
    return isinstance(value, {"str": str, "int": int, "bool": bool, "float": float}.get(kind, object))


def _values(table: Mapping[str, object]) -> dict[str, object]:
    """The values of an entry as a Part holds them."""
    held = {
        "contrast": lambda x: {arm: float(c) for arm, c in x.items()}, "margin": float, "paper": float,
        "checks": lambda x: tuple(Check(**check) for check in x), "out_of_scope": tuple,
    }  # fmt: skip
    return {key: held.get(key, lambda x: x)(value) for key, value in table.items()}
