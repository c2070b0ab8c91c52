"""The ledger of claims: what is fixed before any judged run (`outputs/paper/claims.toml`).

One `Part` is one testable sentence: arms, contrast, test, margin, scope, checks. Each run stores `ledger_hashes()` when
it starts, so that an entry edited after the runs were seen is found out. Standard library only: runs are also made on
machines that have nothing but torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from lab import paths
from vitlib.errors import UsageError, unknown

KINDS = ("exact", "superiority", "equivalence", "non-inferiority", "slope", "ratio")
SCOPES = ("any", "trained", "imagenet", "gpu")
PROFILES = ("smoke", "cpu", "study", "gpu", "imagenet")
# What a profile may have otherwise, in a table of its own: [F1.gpu]
OVERRIDES = ("contrast", "sizes", "margin", "images", "control", "paper", "paper_source", "paper_confidence")
CONFIDENCE = ("read", "read-chart", "computed")  # of paper-facts, section 0
EXPECTED = ("printed digits", "0", "not 0", "more than 1", "less than 1")

# check -> the arms that it needs besides those of the contrast and the control: see Part.check_arms
CHECKS = {
    "control learned": (),
    "full beats head": ("full", "head"),
    "pre-training helps": ("linear pretrained", "linear scratch"),
}

_LAYERS = re.compile(r"(\d+)x(\d+)(.*)")  # <depth>x<branches>, then "+LS" or nothing
_WIDTH = re.compile(r"W\d+ ")  # in front of arms whose width, and with it the number of pairs, is fixed


@dataclass(frozen=True)
class Part:
    """One testable sentence of a claim; the keys of a table in claims.toml, which says what they mean."""

    id: str
    claim: str
    title: str
    notebook: str
    kind: str
    metric: str
    scope: str
    contrast: dict[str, float] = field(default_factory=dict)  # of a slope: at its largest size
    sizes: tuple[int, ...] = ()  # of a slope: widths where the arms begin with one, else pairs
    margin: float | None = None  # percentage points
    margin_imagenet: float | None = None
    images: str | int | None = None
    n: int | None = None  # seeds or process restarts
    min_pairs: int = 0
    checks: tuple[str, ...] = ()
    control: str | None = None
    parent: str | None = None  # the low-resolution model that "full" should beat
    paper: float | None = None
    paper_source: str | None = None
    paper_confidence: str | None = None
    expected: str | None = None  # exact parts only
    profiles: tuple[str, ...] = ()  # where the part belongs; () = everywhere
    at: dict[str, dict[str, object]] = field(default_factory=dict)  # profile -> keys that differ there

    def entry(self, profile: str) -> Part:
        """What the ledger fixes for a profile: this entry, with the keys that are otherwise there."""
        return replace(self, at={}, **self.at.get(profile, {}))

    def at_profile(self, profile: str) -> Part:
        """The part as it is judged at a profile. On ImageNet every label is used, as in the paper, and m is 0.3."""
        part = self.entry(profile)
        if profile != "imagenet" or part.margin is None:
            return part
        return replace(part, margin=part.margin_imagenet, images="all")

    def key(self, profile: str) -> str:
        """Under which name a run stores the hash of this part as it is at a profile: "F1", or "F1 at gpu"."""
        return f"{self.id} at {profile}" if profile in self.at else self.id

    def belongs(self, profile: str) -> bool:
        return not self.profiles or profile in self.profiles

    def contrast_at(self, pairs: int) -> dict[str, float]:
        """The contrast in the arms of a model with so many pairs: 18x2 - 36x1 is 6x2 - 12x1 at 12; a slope's as it is."""
        return self.contrast if self.sizes else {arm_at(arm, pairs): c for arm, c in self.contrast.items()}

    def contrasts(self, pairs: int) -> list[dict[str, float]]:
        """The contrast at so many pairs; of a slope one a size."""
        if not self.sizes:
            return [self.contrast_at(pairs)]
        return [{_arm_of_size(arm, size): c for arm, c in self.contrast.items()} for size in self.sizes]

    def controls(self, pairs: int) -> list[str]:
        """The control arm at so many pairs; of a slope one a size."""
        if self.control is None:
            return []
        return [_arm_of_size(self.control, s) for s in self.sizes] or [arm_at(self.control, pairs)]

    def check_arms(self, check: str) -> tuple[str, ...]:
        """The arms of a check: whole labels as they are, strategies in the setting of the control.

        With control "W64 digits 100 full", "head" is "W64 digits 100 head"; with control "full" it is "head".
        """
        setting = (self.control or "").rpartition(" ")[0]
        return tuple(arm if " " in arm else f"{setting} {arm}".strip() for arm in CHECKS[check])

    def arms(self, pairs: int) -> list[str]:
        """Every arm that a verdict on this part reads: those of its contrast, its control and its checks."""
        arms = [arm for contrast in self.contrasts(pairs) for arm in contrast]
        arms += [arm for check in self.checks for arm in self.check_arms(check)]
        return list(dict.fromkeys(arms + self.controls(pairs)))

    @property
    def names_layers(self) -> bool:
        """Whether the arms are <depth>x<branches>, so that the number of pairs belongs to the verdict."""
        return not self.sizes and any(_LAYERS.fullmatch(arm) for arm in self.contrast)


def arm_at(arm: str, pairs: int) -> str:
    """The arm with the same number of branches at so many pairs; arms that name no layers stay as they are."""
    match = _LAYERS.fullmatch(arm)
    if match is None:
        return arm
    branches = int(match[2])
    if pairs % branches:
        raise UsageError(f"{pairs} pairs cannot be split into layers of {branches} branches, as arm {arm!r} needs")
    return f"{pairs // branches}x{branches}{match[3]}"


def _arm_of_size(arm: str, size: int) -> str:
    """ "W96 6x2" of width 32 is "W32 6x2"; an arm without a width is taken at `size` pairs."""
    return _WIDTH.sub(f"W{size} ", arm) if _WIDTH.match(arm) else arm_at(arm, size)


def ledger(path: Path | None = None) -> dict[str, Part]:
    """Every part by its id, in the file's order, checked. Raises UsageError for the first entry that cannot be."""
    path = path or paths.PAPER / "claims.toml"
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"the ledger {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"the ledger {path} is not valid TOML: {error}") from error
    return {name: _part(name, table) for name, table in tables.items()}


def part(name: str) -> Part:
    """One part of the ledger. Raises UsageError for one that does not exist."""
    parts = ledger()
    if name not in parts:
        raise unknown("part of a claim", name, parts)
    return parts[name]


def part_hash(part: Part) -> str:
    """Content hash of one entry: changes with every field, not with the order of keys or with comments."""
    defaults = asdict(Part(*(None,) * 7))
    # Fields left at their default are not written, so that a field added later leaves old hashes as they are.
    written = {key: value for key, value in asdict(part).items() if value != defaults[key]}
    text = json.dumps(written, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def ledger_hashes(path: Path | None = None) -> dict[str, str]:
    """Part -> hash, and part at a profile -> hash where that has keys of its own: what each run stores at its start."""
    hashes = {}
    for part in ledger(path).values():
        hashes[part.id] = part_hash(replace(part, at={}))
        hashes |= {part.key(profile): part_hash(part.entry(profile)) for profile in part.at}
    return hashes


def _part(name: str, table: object) -> Part:
    if not isinstance(table, Mapping):
        raise UsageError(f"ledger entry {name!r} is not a table of keys")
    at = {profile: table[profile] for profile in PROFILES if isinstance(table.get(profile), Mapping)}
    values = _values(name, {key: value for key, value in table.items() if key not in at}, KEYS)
    at = {profile: _values(f"{name}.{profile}", changed, OVERRIDES) for profile, changed in at.items()}
    if absent := [key for key in REQUIRED if key not in values]:
        raise UsageError(f"ledger entry {name} lacks the key {absent[0]!r}")
    part = Part(id=name, at=at, **values)
    for profile in ("", *at):
        _check_whole(part.entry(profile))
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
        for word in (value if isinstance(value, list) else [value]) if key in NAMES else ():
            if word not in NAMES[key]:
                raise unknown(f"{key} in ledger entry {where}:", word, NAMES[key])
        values[key] = convert(value)
    return values


def _number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _whole(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x > 0


def _text(x: object) -> bool:
    return isinstance(x, str) and bool(x.strip())


def _list(x: object) -> bool:
    return isinstance(x, list) and all(map(_text, x))


def _coefficients(x: object) -> bool:
    return isinstance(x, Mapping) and all(map(_number, x.values()))


def _rising(x: object) -> bool:
    return isinstance(x, list) and all(map(_whole, x)) and len(x) > 1 and x == sorted(set(x))


KEYS = tuple(f.name for f in fields(Part) if f.name not in ("id", "at"))
REQUIRED = ("claim", "title", "notebook", "kind", "metric", "scope")
# key -> what is allowed, whether a value is that, and how a Part holds it; every other key is a text
TEXT = ("a text", _text, str)
ABOVE_0 = ("a number above 0", lambda x: _number(x) and x > 0, float)
RULES = {
    "contrast": ("a table of arm = number", _coefficients, lambda x: {arm: float(c) for arm, c in x.items()}),
    "checks": ("a list of names", _list, tuple),
    "sizes": ("a list of two or more whole numbers, rising", _rising, tuple),
    "profiles": ("a list of profiles", lambda x: _list(x) and bool(x), tuple),
    "images": ('a whole number from 1, or "all"', lambda x: x == "all" or _whole(x), lambda x: x),
    "n": ("a whole number from 2", lambda x: _whole(x) and x > 1, int),
    "min_pairs": ("a whole number from 1", _whole, int),
    "margin": ABOVE_0,
    "margin_imagenet": ABOVE_0,
    "paper": ("a number", _number, float),
}
# key -> the names that it may hold
NAMES = {
    "kind": KINDS, "scope": SCOPES, "checks": tuple(CHECKS), "expected": EXPECTED, "paper_confidence": CONFIDENCE,
    "profiles": PROFILES,
}  # fmt: skip
OF_POINTS = ("contrast", "margin", "margin_imagenet", "images", "n", "control")
# kind -> the keys that it needs; the others are measured in points
NEEDED = {"exact": ("expected",), "ratio": ("contrast", "n"), "slope": (*OF_POINTS, "sizes")}


def _check_whole(part: Part) -> None:
    """What the keys of an entry must be together."""
    if abs(sum(part.contrast.values())) > 1e-9:
        raise UsageError(f"ledger entry {part.id} has a contrast whose coefficients do not add up to 0")
    source = () if part.paper is None else ("paper_source", "paper_confidence")
    for key in (*NEEDED.get(part.kind, OF_POINTS), *source):
        if not getattr(part, key):
            raise UsageError(f"ledger entry {part.id} of kind {part.kind!r} lacks the key {key!r}")
    if part.kind == "ratio" and part.paper is not None and part.paper <= 0:
        raise UsageError(f"ledger entry {part.id} has paper = {part.paper}: allowed is a ratio above 0")
    if part.kind not in ("exact", "ratio") and "control learned" not in part.checks:
        raise UsageError(f"ledger entry {part.id} lacks the check 'control learned' that every accuracy part has")
