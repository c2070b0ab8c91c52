"""Time and memory of a fine-tuning step by strategy: five process restarts, strategies interleaved step by step.

Time is measured and belongs to the device it names. Memory is counted, not measured: weights, gradients, AdamW's state
and the activations that autograd keeps, in MB, the same on every machine.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict

from vitlib import paths
from vitlib.errors import UsageError
from vitlib.lab.ledger import ledger_hashes
from vitlib.model import ViTConfig

RESTARTS = 5  # claims.md: the restart is the unit
STRATEGIES = ("full", "attn", "ffn")
WARM_UP, STEPS = 3, 15
PARTS = {"time_s": "F3-time"}


def _path(profile: str):
    return paths.outputs() / profile / "bench" / "finetune.csv"


def stored(profile: str):
    """The measured table as a pandas frame, or None: one row a restart and strategy."""
    import pandas as pd

    path = _path(profile)
    return pd.read_csv(path) if path.is_file() else None


def finetune_steps(profile: str, spec):
    """The stored table, measured first where it is missing or of another model, recipe or ledger."""
    import pandas as pd

    hashes = ledger_hashes()
    key = {f"ledger_{column}": hashes[part] for column, part in PARTS.items()} | {"run": spec.hash}
    table = stored(profile)
    current = table is not None and len(table) == RESTARTS * len(STRATEGIES)
    if current and all(name in table and set(table[name]) == {value} for name, value in key.items()):
        return table
    rows = [row for restart in range(RESTARTS) for row in _restart(spec, restart)]
    table = pd.DataFrame([row | key for row in rows])
    _path(profile).parent.mkdir(parents=True, exist_ok=True)
    draft = _path(profile).with_suffix(f".{os.getpid()}")
    table.to_csv(draft, index=False)
    draft.replace(_path(profile))
    return table


def _restart(spec, restart: int) -> list[dict]:
    """One fresh process; its measurements."""
    task = {"model": asdict(spec.model), "batch_size": spec.recipe.batch_size, "threads": spec.threads}
    done = subprocess.run(
        [sys.executable, "-m", "vitlib.lab.timing"], input=json.dumps(task), capture_output=True, text=True
    )
    if done.returncode:
        raise UsageError(f"the timing process failed: {done.stderr.strip().splitlines()[-1]}")
    return [row | {"restart": restart} for row in json.loads(done.stdout)]


def measure_here(task: dict) -> list[dict]:
    """Steps of each strategy in this process, taking turns; median seconds, and bytes counted once."""
    import torch
    import torch.nn.functional as F

    from vitlib.lab import measure
    from vitlib.lab.runs import device_name
    from vitlib.model import ViT
    from vitlib.train.finetune import freeze
    from vitlib.train.loop import make_optimizer, set_train_mode
    from vitlib.train.recipes import FINE_TUNING

    torch.set_num_threads(task["threads"])
    torch.set_flush_denormal(True)
    config, batch = ViTConfig(**task["model"]), task["batch_size"]
    labels = torch.arange(batch) % config.num_classes

    def fresh() -> torch.Tensor:
        return torch.randn(batch, config.in_chans, config.image_size, config.image_size)

    arms, rows = {}, []
    for strategy in STRATEGIES:
        model = ViT(config)
        freeze(model, strategy)
        set_train_mode(model)
        optimizer, _ = make_optimizer(model, FINE_TUNING, WARM_UP + STEPS)
        arms[strategy] = (model, optimizer, [])
    for _ in range(WARM_UP + STEPS):
        for model, optimizer, seconds in arms.values():
            images, began = fresh(), time.perf_counter()
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seconds.append(time.perf_counter() - began)
    for strategy, (model, _, seconds) in arms.items():
        saved = measure.saved_bytes(model, fresh(), lambda logits: F.cross_entropy(logits, labels))
        state = measure.training_state(model).total
        rows.append({
            "strategy": strategy, "time_s": statistics.median(seconds[WARM_UP:]), "mem_mb": (saved + state) / 2**20,
            "saved_mb": saved / 2**20, "device": device_name("cpu"),
            "size": f"{config.name} at {config.image_size} px, batch {batch}",
        })  # fmt: skip
    return rows


if __name__ == "__main__":
    print(json.dumps(measure_here(json.load(sys.stdin))))
