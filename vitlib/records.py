"""Frozen records of settings: equal settings are one record, whose JSON is one text and has one hash."""

from __future__ import annotations

import math
from dataclasses import fields

from vitlib.errors import UsageError


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
