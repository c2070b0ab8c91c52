"""The checkpoint of one run: everything that the next step depends on, so that a run that was killed goes on.

On one machine's CPU it then ends bit for bit where an uninterrupted run ends. No generator's state is part of it: every
draw is a function of names (`vitlib.draws`). Written whole or not at all, and read as plain tensors and numbers only
(`weights_only=True`).
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from vitlib.files import no_room, read_pth, write_whole
from vitlib.model.weights import differences


@dataclass(frozen=True)
class Step:
    """One line of a run's history."""

    step: int  # from 1
    epoch: int  # from 0
    lr: float  # of the recipe; layer decay scales it down for what is not the head
    loss: float


class Checkpoints:
    """Writes the run's state to `path` every `every_s` seconds of wall time, and reads it back.

    run: the run's identity, e.g. a hash of its settings; another run's checkpoint is not read. notes: what else was fixed
    at the run's first start; those of the checkpoint take their place. writes: in one process of a run only. The clocks
    begin here.
    """

    def __init__(
        self, path: Path, every_s: float = 300.0, notes: dict[str, str] | None = None, writes: bool = True, run: str = ""
    ):  # fmt: skip
        self.path, self.every_s, self.notes, self.writes, self.run = path, every_s, notes or {}, writes, run
        self.step = 0  # that the file on disk belongs to; 0 = there is none
        self.written = time.monotonic()
        self.began, self.cpu_began = time.monotonic(), time.process_time()  # earlier by what earlier processes took

    @property
    def wall_s(self) -> float:
        return time.monotonic() - self.began

    @property
    def cpu_s(self) -> float:
        return time.process_time() - self.cpu_began

    def due(self) -> bool:
        return self.writes and time.monotonic() - self.written >= self.every_s

    def write(self, parts: Mapping[str, Any], history: list[Step]) -> None:
        """Replace the older file once this one is whole. Weights that are not finite are not kept.

        parts: the model, the optimizer, the schedule, the moving average. Raises UsageError where there is no room on the
        disk; the older file stays.
        """
        self.written = time.monotonic()
        if not all(t.isfinite().all() for t in parts["model"].state_dict().values()):
            return
        state = {name: part.state_dict() for name, part in parts.items()}
        # The history says where the loader is: a step is a batch, and the order of an epoch's batches is fixed.
        state |= {"history": torch.tensor([astuple(s) for s in history], dtype=torch.float64), "notes": self.notes}
        state |= {"run": self.run, "wall_s": self.wall_s, "cpu_s": self.cpu_s}
        kept = f"the one of step {self.step} stays and the run goes on from there" if self.step else "none is kept"
        # Through a file of ours: torch's writer says nothing of a full disk.
        with (
            no_room(f"for a checkpoint in {self.path.parent}: {kept}"),
            write_whole(self.path) as draft,
            draft.open("wb") as file,
        ):
            torch.save(state, file)
        self.step = len(history)

    def read(self, parts: Mapping[str, Any]) -> list[Step]:
        """Bring `parts` to where the run was; its history so far, empty where there is no checkpoint.

        A file that is damaged, of another run or of another form is set aside with a warning.
        """
        state = self._load(parts)
        if state is None:
            return []
        for name, part in parts.items():
            part.load_state_dict(state[name])
        self.notes = state["notes"]
        self.began, self.cpu_began = self.began - state["wall_s"], self.cpu_began - state["cpu_s"]
        history = [Step(int(step), int(epoch), lr, loss) for step, epoch, lr, loss in state["history"].tolist()]
        self.step = len(history)
        return history

    def _load(self, parts: Mapping[str, Any]) -> dict | None:
        if not self.path.is_file():
            return None
        try:
            state = read_pth(self.path)
            if lost := {*parts, "run", "history", "notes", "wall_s", "cpu_s"} - set(state):
                raise ValueError(f"{', '.join(sorted(lost))} is missing")
            if state["run"] != self.run:
                raise ValueError(f"it belongs to the run {state['run']}")
            if differences(parts["model"].state_dict(), state["model"]):
                raise ValueError("its model is another one")
            return state
        except (ValueError, TypeError, AttributeError) as fault:  # UsageError is a ValueError
            if self.writes:
                os.replace(self.path, self.path.with_suffix(".damaged"))
            warnings.warn(
                f"the checkpoint {self.path} is damaged ({fault}): it is set aside as {self.path.stem}.damaged and the run "
                "starts anew",
                stacklevel=4,
            )
            return None

    def remove(self) -> None:
        """The run is finished: its checkpoint goes, and drafts of processes that were killed while they wrote one."""
        if self.writes:
            for left in (self.path, *self.path.parent.glob(f".draft-*.{self.path.name}")):
                left.unlink(missing_ok=True)

    def __str__(self) -> str:
        """For the message of a run that cannot go on."""
        kept = f"the last good checkpoint, of step {self.step}, is {self.path}"
        return kept if self.step else "no checkpoint is kept"
