"""When do two runs of one notebook agree? The committed smoke outputs against new ones.

Results are Markdown tables, and the header of a column decides how far its numbers may move: `RULES`, the first match
counts. Whatever has no rule (sizes, counts, names, and all text outside of a table) agrees only to the letter.
Used by conftest.py (nbval, `make test`) and by `make refresh`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True)
class Rule:
    """How far the numbers of a column may move: |new - reference| <= absolute + relative * |reference|."""

    header: str  # searched for in the header: lower case, without ** and `
    says: str
    absolute: float = 0.0
    relative: float = 0.0


RULES = (
    # Before any step there is only the forward pass: what moves is the order of float32 sums.
    Rule(r"^first_loss", "relative 1e-4", relative=1e-4),
    # Training amplifies that, differently on each processor.
    Rule(r"loss", "relative 2 %", relative=0.02),
    Rule(r"^top1|points$", "2 points", absolute=2.0),
    # Of a tokenizer, a result of training that is not an accuracy.
    Rule(r"^tokens used|^perplexity|grey levels$", "relative 10 %", relative=0.1),
    # The best of several that are nearly as good.
    Rule(r"^lr, searched", "any number", absolute=float("inf")),
    # Depends on the machine; it must still be there, and a number.
    Rule(r"seconds|time|_s$", "any number", absolute=float("inf")),
)
EXACT = Rule("", "exactly this text")

# The n of `n=3` is a count, so it stays text; so do the digits of names such as 12x1, and nan.
NUMBER = re.compile(r"\bn ?= ?\d+|(?<![\w.])([-+\u2212]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?)(?!\w)")
DELIMITER = re.compile(r"\|?( *:?-+:? *\|)* *:?-+:? *\|?")  # the line under a header; its length follows the cells


@dataclass(frozen=True)
class Pair:
    """One place in both texts."""

    where: str
    reference: str
    test: str
    rule: Rule = EXACT

    @property
    def agrees(self) -> bool:
        if self.rule is EXACT:
            return self.reference == self.test
        (text, numbers), (new_text, new_numbers) = _read(self.reference), _read(self.test)
        # 1e-12: 86.19 - 84.19 is a little more than 2 in binary.
        return (text, len(numbers)) == (new_text, len(new_numbers)) and all(
            abs(new - old) <= self.rule.absolute + self.rule.relative * abs(old) + 1e-12
            for old, new in zip(numbers, new_numbers, strict=True)
        )

    def __str__(self) -> str:
        return f"{self.where}: {self.reference!r} -> {self.test!r} (allowed: {self.rule.says})"


def agree(reference: str, test: str) -> bool:
    """Whether a new Markdown text says the same as the committed one, within `RULES`."""
    return not differences(reference, test)


def differences(reference: str, test: str) -> list[str]:
    """Every place that does not agree, a line each: column, row, reference value, new value, what is allowed."""
    return [str(pair) for pair in _pairs(reference, test) if not pair.agrees]


def moved(reference: str, test: str) -> list[str]:
    """Every table cell that changed at all (bold apart), within its tolerance or not, a line each."""
    changed = (pair for pair in _pairs(reference, test) if _plain(pair.reference) != _plain(pair.test))
    return [str(pair) for pair in changed if pair.where != "text"]


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a Markdown text: rows of cells, the header first, without the line under it."""
    return [block for block in _blocks(text) if isinstance(block, list)]


def rule(header: str) -> Rule:
    """What a column with this header may do."""
    plain = _plain(header).replace("`", "").lower()
    return next((rule for rule in RULES if re.search(rule.header, plain)), EXACT)


def _pairs(reference: str, test: str) -> Iterator[Pair]:
    old, new = _blocks(reference), _blocks(test)
    if list(map(type, old)) != list(map(type, new)):
        yield Pair("text and tables", _outline(old), _outline(new))
        return
    for before, after in zip(old, new, strict=True):
        if isinstance(before, str):
            yield Pair("text", before, after)
        elif before[0] != after[0]:
            yield Pair("columns", " | ".join(before[0]), " | ".join(after[0]))
        elif [len(row) for row in before] != [len(row) for row in after]:
            yield Pair("rows and cells", str([len(row) for row in before]), str([len(row) for row in after]))
        else:
            for number, (row, new_row) in enumerate(zip(before[1:], after[1:], strict=True), 1):
                for header, cell, new_cell in zip(before[0], row, new_row, strict=False):
                    yield Pair(f"{_plain(header)}, row {number} ({_plain(row[0])})", cell, new_cell, rule(header))


def _blocks(text: str) -> list[str | list[list[str]]]:
    """A text as it alternates between prose (str) and tables (list of rows)."""
    blocks: list[str | list[list[str]]] = []
    for piped, group in groupby(text.split("\n"), key=lambda line: line.strip().startswith("|")):
        lines = list(group)
        if piped and len(lines) > 1 and DELIMITER.fullmatch(lines[1].strip()):
            blocks.append([_cells(line) for line in lines[:1] + lines[2:]])
        else:
            blocks.append("\n".join(lines))
    return blocks


def _cells(line: str) -> list[str]:
    cells = re.split(r"(?<!\\)\|", line.strip()[1:])
    return [" ".join(cell.split()) for cell in (cells[:-1] if not cells[-1].strip() else cells)]


def _outline(blocks: list[str | list[list[str]]]) -> str:
    return ", ".join("text" if isinstance(block, str) else f"table of {len(block) - 1} rows" for block in blocks)


def _plain(cell: str) -> str:
    return cell.replace("**", "").strip()


def _read(cell: str) -> tuple[str, list[float]]:
    """A cell as its text, with # for each number that may move, and those numbers."""
    found = [match[1] for match in NUMBER.finditer(_plain(cell)) if match[1]]
    text = NUMBER.sub(lambda match: "#" if match[1] else match[0], _plain(cell))
    return text, [float(number.replace(",", "").replace("\u2212", "-")) for number in found]
