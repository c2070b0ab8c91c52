"""Write `vitlib/tasks/trunk.safetensors`, the small pretrained backbone that ships: a finished 12x1+LS run of a profile.

    python -m tools.ship --profile study --seed 40

Its card is beside it. Raises UsageError where the run or its weights are not in the store.
"""

from __future__ import annotations

import argparse
import sys

from lab.data.cards import source
from lab.experiments.catalogue import arms_of
from lab.experiments.profiles import profile
from lab.experiments.small import resolution
from lab.runs import store
from lab.runs.execute import trained_model
from vitlib.errors import UsageError
from vitlib.model.weights import save
from vitlib.tasks.images import View
from vitlib.tasks.trunk import SHIPPED, write_notes


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.ship", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="study")
    parser.add_argument("--seed", type=int, default=40)
    chosen = parser.parse_args(words)
    try:
        p = profile(chosen.profile)
        spec = arms_of(resolution, p)["trunk"].spec.with_seed(chosen.seed)
        result, facts = store.find(spec), source(p.data).facts
        model = trained_model(spec)
    except UsageError as fault:
        parser.error(str(fault))
    view = View(spec.model.image_size, spec.model.patch_size, facts.mean, facts.std)
    save(model, SHIPPED, write_notes(view, ()))
    print(f"{SHIPPED}: {spec}, top-1 {result.metrics['top1']:.2f} % of the {spec.split} images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
