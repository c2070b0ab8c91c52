"""Write `outputs/reference/claims.schema.json`: the columns of claims.csv, for other tools.

python -m tools.schema
"""

from __future__ import annotations

import json
import sys

from lab import paths
from lab.claims.judge import COLUMNS
from vitlib.files import write_whole

WORDS = {
    "part": "id of the part of a claim", "claim": "id of the claim", "claim_title": "the claim in a sentence",
    "claim_verdict": "what all parts of the claim say together", "title": "the part in a sentence", "notebook": "its number",
    "primary": "whether Holm's correction counts it", "contrast": "the difference, in arms", "test": "kind of test",
    "n": "seeds, or process restarts of a ratio", "test_images": "images of the test split",
    "ours": "mean difference in percentage points, or a ratio", "sd": "standard deviation over seeds",
    "low": "lower end of the 95 % interval", "high": "upper end of the 95 % interval",
    "seed_se": "standard error that more seeds shrink", "image_se": "standard error that only more images shrink",
    "paired_low": "lower end, test images fixed", "paired_high": "upper end, test images fixed", "paper": "the paper's value",
    "paper_source": "where it stands in the paper", "paper_confidence": "read, read-chart or computed",
    "contains_paper": "whether the interval contains it: yes, no, too wide to say", "times_paper": "ours over the paper's",
    "margin": "m in points", "tightest": "the smallest margin at which two one-sided tests pass", "p": "of the predicted label",
    "p_holm": "corrected over the primary parts", "checks": "each check, passed or failed", "label": "the label of the part",
    "says": "the ledger's sentence for this outcome", "smallest_visible": "smallest difference seen with a power of 80 %",
    "seeds_needed": "seeds that would show the paper's difference", "power": "expected for the paper's difference",
    "note": "what else must be said", "source": "pilot where the estimate is the first study's", "runs": "hashes of the runs",
}  # fmt: skip


def schema() -> dict:
    """JSON schema of one row; numbers that are absent are empty cells."""
    kinds = {object: ["string", "null"], float: ["number", "null"], "Int64": ["integer", "null"]}
    columns = {name: {"type": kinds[kind], "description": WORDS[name]} for name, kind in COLUMNS.items()}
    columns["primary"]["type"] = ["boolean"]
    columns["seeds_needed"]["type"] = ["string", "number", "null"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema", "title": "a row of claims.csv", "type": "object",
        "properties": columns, "required": list(COLUMNS), "additionalProperties": False,
    }  # fmt: skip


if __name__ == "__main__":
    with write_whole(paths.REFERENCE / "claims.schema.json") as draft:
        draft.write_text(json.dumps(schema(), indent=1) + "\n", encoding="utf-8")
    sys.exit(0)
