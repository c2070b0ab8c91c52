"""Kill a command at random moments, start it again, and compare what it ends with to an uninterrupted one's, bit for bit.

    python -m tools.kill [--what smoke|checkpoints|torchrun] [--kills 100] [--seed 0] [--notebook 31]

smoke        `python -m lab reproduce --profile smoke`: training, drafts, notebooks, claims
checkpoints  one run that writes a checkpoint every tenth of a second
torchrun     the same by two processes

Each time a signal (SIGKILL, SIGTERM, Ctrl-C) reaches the command, one of the processes that it started, or all of them. Then
nobody may be left after ten seconds. Prints a table in Markdown; the exit code is 1 where anything was not as it should be.
Reads /proc: for Linux.
"""

from __future__ import annotations

import argparse
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from lab import paths
from tools.same import numbers

SECONDS = 10  # after which nobody may be left
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
WHOM = ("the command", "one that it started", "all")
WORK = """
import pickle, sys
from lab.runs.execute import execute
from lab.runs.launch import distributed
if __name__ == "__main__":
    spec = pickle.loads(bytes.fromhex(sys.argv[1]))
    execute(spec, every_s=0.1) if sys.argv[2] == "1" else distributed(spec, 2, every_s=0.1)
"""


class Kill(NamedTuple):
    """One kill: what was sent to whom after how many seconds, how long others lived, and what was wrong."""

    sent: str
    whom: str
    after_s: float
    alive_s: float
    fault: str


def command(what: str, notebook: str = "31", epochs: int = 4) -> list[str]:
    """What is killed."""
    if what == "smoke":
        return [sys.executable, "-m", "lab", "reproduce", "--profile", "smoke", "--notebook", notebook]
    from lab.runs.spec import RunSpec
    from vitlib.model import vit_config
    from vitlib.train.recipe import Recipe

    model = vit_config("W32-2x2/4", image_size=16, in_chans=1, num_classes=10)
    spec = RunSpec("supervised", model, "digits", Recipe(epochs, batch_size=20, lr=1e-3), seed=1000, images=500)
    return [sys.executable, "-c", WORK, pickle.dumps(spec).hex(), "2" if what == "torchrun" else "1"]


class Place:
    """A folder with a store, outputs and temporary files of its own, in which a command runs."""

    def __init__(self, folder: Path, words: list[str]):
        self.folder, self.words, self.mark = folder, words, uuid.uuid4().hex
        (folder / "tmp").mkdir(parents=True)

    def start(self) -> subprocess.Popen:
        named = {"VITLIB_RUNS": "runs", "VITLIB_OUTPUTS": "outputs", "TMPDIR": "tmp"}
        environment = os.environ | {name: str(self.folder / value) for name, value in named.items()}
        environment |= {"VITLIB_PROGRESS": "0", "PYTHONPATH": str(paths.ROOT), "VITLIB_KILL": self.mark}
        with (self.folder / "log").open("ab") as log:
            streams = {"stdout": log, "stderr": log, "stdin": subprocess.DEVNULL}
            return subprocess.Popen(self.words, cwd=paths.ROOT, env=environment, start_new_session=True, **streams)

    def alive(self) -> list[int]:
        """All processes that the command has started, and itself."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if f"VITLIB_KILL={self.mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return sorted(found)

    def drafts(self) -> list[Path]:
        """What was left half-written or of temporary files."""
        left = [path for path in self.folder.rglob("*") if path.name.startswith(".draft") or ".partial" in path.name]
        return left + list((self.folder / "tmp").glob("vitlib-*"))

    def ends_with(self) -> dict[str, str]:
        """Weights, history, metrics and bits of every run, by file."""
        return numbers(self.folder / "runs")


def kill(place: Place, draws: random.Random, seconds: float) -> Kill | None:
    """Start the command and kill it in its first so many seconds; None where it had ended before."""
    process, after = place.start(), draws.uniform(0, seconds)
    with suppress(subprocess.TimeoutExpired):
        process.wait(after)
        return None if process.returncode == 0 else Kill("nothing", "", after, 0, f"it ended with {process.returncode}")
    sent, whom = draws.choice(SIGNALS), draws.choice(WHOM)
    others = [pid for pid in place.alive() if pid != process.pid]
    chosen = {WHOM[0]: [process.pid], WHOM[1]: [draws.choice(others or [process.pid])], WHOM[2]: [process.pid, *others]}
    for pid in chosen[whom]:
        with suppress(ProcessLookupError):
            os.kill(pid, sent)
    with suppress(subprocess.TimeoutExpired):  # a command whose worker was killed may go on with the others
        process.wait(SECONDS if process.pid in chosen[whom] else 4 * seconds + 60)
    began, fault = time.monotonic(), ""
    while (left := place.alive()) and time.monotonic() - began < SECONDS:
        time.sleep(0.1)
    alive_s = time.monotonic() - began
    if left:
        fault = f"{len(left)} processes were left"
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    return Kill(sent.name, whom, round(after, 1), round(alive_s, 1), fault)


def harness(what: str, kills: int, seed: int, folder: Path, notebook: str = "31", epochs: int = 4) -> list[Kill]:
    """So many kills of one command, and after each one that completed the comparison; faults are in the last entry too."""
    draws, words, done = random.Random(seed), command(what, notebook, epochs), []
    whole = Place(folder / "whole", words)
    began = time.monotonic()
    if code := whole.start().wait():
        return [Kill("nothing", "", 0, 0, f"the uninterrupted command ended with {code}: {whole.folder / 'log'}")]
    seconds, rounds, place = time.monotonic() - began, 0, None
    while len(done) < kills or place is not None:
        if place is None:
            place, rounds = Place(folder / f"killed-{rounds}", words), rounds + 1
        if len(done) < kills and (one := kill(place, draws, 1.1 * seconds)) is not None:
            done.append(one)
            continue
        if len(done) == kills and (code := place.start().wait()):  # goes on, in peace
            done.append(Kill("nothing", "", 0, 0, f"it did not go on and ended with {code}"))
        if place.ends_with() != whole.ends_with():
            done.append(Kill("nothing", "", 0, 0, "bits differ from the uninterrupted command's"))
        if left := place.drafts():
            done.append(Kill("nothing", "", 0, 0, f"drafts were left: {', '.join(path.name for path in left[:3])}"))
        if len(done) > kills:
            break
        place = None
    return done


def table(what: str, done: Iterable[Kill]) -> str:
    """A row for each signal and target."""
    groups: dict[tuple[str, str], list[Kill]] = {}
    for one in done:
        groups.setdefault((one.sent, one.whom), []).append(one)
    rows = ["| command | sent | to | times | at most, s | faults |", "|---|---|---|---|---|---|"]
    for (sent, whom), ones in sorted(groups.items()):
        faults = Counter(one.fault for one in ones if one.fault)
        said = "; ".join(f"{n} x {fault}" for fault, n in faults.items()) or "none"
        rows.append(f"| {what} | {sent} | {whom} | {len(ones)} | {max(one.alive_s for one in ones)} | {said} |")
    return "\n".join(rows)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.kill", description=__doc__.splitlines()[0])
    parser.add_argument("--what", choices=("smoke", "checkpoints", "torchrun"), default="smoke")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--notebook", default="31", help="of smoke (default: %(default)s)")
    chosen = parser.parse_args(words)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        done = harness(chosen.what, chosen.kills, chosen.seed, Path(folder), chosen.notebook)
    print(table(chosen.what, done))
    return int(any(one.fault for one in done))


if __name__ == "__main__":
    sys.exit(main())
