"""Frozen records of settings: equal settings are one record, whose JSON is one text and has one hash."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields

from vitlib.errors import UsageError, unknown

Test = Callable[[object], bool]
ABOVE_0 = sys.float_info.min  # no denormal number: runs flush those to 0


def check(record: object, choices: Mapping[str, Iterable], rules: Iterable[tuple[str, Test, str]]) -> None:
    """Raises UsageError for a value that is none of its field's `choices`, or that its rule refuses.

    rules: fields, which values they allow, and the same in words.
    """
    for name, allowed in choices.items():
        if getattr(record, name) not in tuple(allowed):
            raise unknown(name, getattr(record, name), allowed)
    for names, allows, words in rules:
        for name in names.split():
            if not allows(getattr(record, name)):
                raise UsageError(f"{name} is {getattr(record, name)!r}: allowed {words}")


def whole(least: int, most: float = math.inf) -> Test:
    return lambda value: type(value) is int and least <= value <= most


def number(least: float, below: float = sys.float_info.max) -> Test:
    """Neither infinite nor NaN; `floats` has made whole numbers floats."""
    return lambda value: isinstance(value, float) and least <= value < below


def or_none(allows: Test) -> Test:
    return lambda value: value is None or allows(value)


def two(allows: Test) -> Test:
    return lambda value: isinstance(value, tuple) and len(value) == 2 and all(map(allows, value))


def truth(value: object) -> bool:
    return type(value) is bool


def floats(record: object) -> None:
    """For a dataclass's `__post_init__`: whole numbers in fields of type float become floats, for 1 == 1.0."""
    for field in fields(record):
        if "float" in field.type:
            value = getattr(record, field.name)
            plain = tuple(map(_float, value)) if isinstance(value, (tuple, list)) else _float(value)
            object.__setattr__(record, field.name, plain)


def check_types(record: object) -> None:
    """Raises UsageError for a field that is no finite number, text or tuple of numbers, as its type says."""
    for field in fields(record):
        value, words = getattr(record, field.name), field.type.split(" | ")
        parts = value if isinstance(value, tuple) and len(value) == field.type.count("float") else (value,)
        if words[0].startswith("tuple") and parts is value:
            words = ["float"]
        if not all(any(_is(part, word) for word in words) for part in parts):
            raise UsageError(f"{field.name} is {value!r}: allowed is {field.type}")


def _is(value: object, word: str) -> bool:
    """Whether a value is of a type: `None`, `str`, `int` or `float`."""
    plain = type(value).__name__.removesuffix("Type") == word
    return plain and (not isinstance(value, float) or math.isfinite(value))


def _float(value: object) -> object:
    whole = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**1023
    return float(value) if whole else value
