"""Do two run stores hold the same numbers? Weights, histories, metrics and bits of every run that both have, byte by byte.

    python -m tools.same STORE STORE

Prints how many runs agree, the files that differ, and by how much metrics do; the exit code is 1 where a file differs, or
where no run is in both. On one machine nothing may, whatever the clone, the number of workers and the kills; between machines
`tools.compare` says by how much numbers may.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pandas as pd


def numbers(store: Path) -> dict[str, str]:
    """A checksum of each file of each finished run; of a result its metrics and bits alone, not its times."""
    found = {}
    for path in sorted(store.glob("[0-9a-f]*/*")):
        content = path.read_bytes()
        if path.name == "result.json":
            result = json.loads(content)
            content = json.dumps([result["metrics"], result["correct"]]).encode()
        found[f"{path.parent.name}/{path.name}"] = hashlib.sha256(content).hexdigest()
    return found


def metrics(store: Path) -> pd.Series:
    """(run, metric) -> value, of every finished run."""
    read = {path.parent.name: json.loads(path.read_bytes())["metrics"] for path in store.glob("[0-9a-f]*/result.json")}
    return pd.DataFrame(read).T.stack()


def apart(one: pd.Series, other: pd.Series) -> pd.DataFrame:
    """Per metric: the runs in both, those that differ, and the largest difference, itself and relative to its value."""
    both = pd.DataFrame({"one": one, "other": other}).dropna()
    difference = (both["other"] - both["one"]).abs()
    rows = both.assign(
        largest=difference, relative=difference / both["one"].abs().clip(lower=1e-12), differ=difference > 0
    )
    grouped = rows.groupby(level=1)
    return grouped.agg(
        runs=("one", "size"), differ=("differ", "sum"), largest=("largest", "max"), relative=("relative", "max")
    )


def main(words: list[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    if len(words) != 2 or not all(Path(word).is_dir() for word in words):
        print("usage: python -m tools.same STORE STORE, two folders of finished runs", file=sys.stderr)
        return 2
    one, other = (numbers(Path(word)) for word in words)
    both = {name.split("/")[0] for name in one} & {name.split("/")[0] for name in other}
    files = sorted(name for name in one.keys() | other.keys() if name.split("/")[0] in both)
    differ = [name for name in files if one.get(name) != other.get(name)]
    print(f"{len(both)} runs in both, {len({name.split('/')[0] for name in differ})} of them differ", *differ, sep="\n")
    if differ:
        print(apart(*(metrics(Path(word)) for word in words)).to_markdown(floatfmt=".2g"))
    return int(bool(differ) or not both)


if __name__ == "__main__":
    sys.exit(main())
