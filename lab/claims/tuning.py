"""Tuning: the same three learning rates for every arm, on validation images, before any judged run.

A group of arms shares one rate, the best on the mean over its arms; in Table 5 each strategy is a group, in Table 6 each arm,
because there the best rate depends on the number of images and on the width. The chosen rates are beside the arms, in
`lab/experiments/small.py`; what they were chosen from is committed (tuning.csv). Other arms of the same notebooks (more
branches, pairs, widths, images, other stems) take the rate of their group.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lab.experiments import small
from lab.experiments.catalogue import NOTEBOOKS, Arms, arms_of
from lab.experiments.profiles import Arm, Profile, profile
from lab.runs import store
from lab.runs.spec import FIRST_TUNING_SEED, RunSpec
from vitlib.errors import UsageError, unknown
from vitlib.train.finetune import STRATEGIES

SEEDS = (FIRST_TUNING_SEED, FIRST_TUNING_SEED + 1)


@dataclass(frozen=True)
class Group:
    """Arms that share a rate."""

    table: Arms  # of `small.py`
    arms: tuple[str, ...]
    rates: tuple[float, float, float]  # lowest first

    @property
    def notebook(self) -> str:
        return next(one.number for one in NOTEBOOKS if one.small is self.table)

    def specs(self, profile: Profile) -> list[tuple[str, float, RunSpec]]:
        """(arm, rate, run) of every arm, rate and seed. Trunks keep the rate of their recipe."""
        arms = _arms(self.table, profile)
        if missing := [arm for arm in self.arms if arm not in arms]:
            raise UsageError(
                f"profile {profile.name} has no arm {missing[0]!r} to tune: the groups are those of profile study"
            )
        return [
            (arm, lr, replace(spec, recipe=replace(spec.recipe, lr=lr)).with_seed(seed))
            for seed in SEEDS for arm in self.arms for spec in [arms[arm].spec] for lr in self.rates
        ]  # fmt: skip


@functools.lru_cache(maxsize=4)
def _arms(table: Arms, profile: Profile) -> dict[str, Arm]:
    """Once per table, not once per group."""
    return arms_of(table, profile)


def _transfer() -> dict[str, Group]:
    """Table 6: each arm that F5 and F6 read is a group, and so is each strategy at the middle number of images."""
    arms = []
    for data, (fewest, middle, most) in profile("study").transfer_images.items():
        arms += [f"W64 {data} {fewest} {s}" for s in ("full", "attn", "head")]
        arms += [f"W64 {data} {middle} {s}" for s in STRATEGIES]
        arms += [f"W{width} {data} {most} {s}" for width in (32, 64) for s in ("full", "attn")]
    return {f"transfer {arm}": Group(small.transfer, (arm,), (1e-3, 3e-3, 1e-2)) for arm in arms}


# In the order in which they run: trunks first.
GROUPS = {
    "supervised+LS": Group(small.branches, ("12x1+LS", "6x2+LS"), (1.5e-3, 3e-3, 6e-3)),
    "supervised": Group(small.branches, ("12x1", "6x2"), (5e-4, 1e-3, 2e-3)),
    **{f"resolution {s}": Group(small.resolution, (s,), (1e-3, 2e-3, 4e-3)) for s in STRATEGIES},
    "stems": Group(small.stems, ("linear supervised", "hmlp supervised", "conv supervised"), (5e-4, 1e-3, 2e-3)),
    "few labels": Group(
        small.stems, tuple(f"{s} {t}" for s in ("linear", "hmlp", "conv") for t in ("scratch", "pretrained")),
        (5e-4, 1e-3, 2e-3),
    ),
    **_transfer(),
}  # fmt: skip


def groups(names: Sequence[str]) -> dict[str, Group]:
    """The groups of these names, all by default; "resolution" names all strategies of it. UsageError for another."""
    words = {name.split()[0] for name in GROUPS}
    for name in names:
        if name not in GROUPS and name not in words:
            raise unknown("tuning group", name, GROUPS)
    return {name: group for name, group in GROUPS.items() if not names or {name, name.split()[0]} & {*names}}


def specs(profile: Profile, chosen: Iterable[Group]) -> list[RunSpec]:
    """Every tuning run of these groups, each once."""
    return list(dict.fromkeys(spec for group in chosen for _, _, spec in group.specs(profile)))


def table(profile: Profile, chosen: dict[str, Group]) -> list[dict]:
    """One row for each arm and rate that is finished at every seed: validation top-1, and whether its group takes the rate."""
    rows = []
    for name, group in chosen.items():
        top1: dict[tuple[str, float], list[float]] = {}
        for arm, lr, spec in group.specs(profile):
            if result := store.find(spec):
                top1.setdefault((arm, lr), []).append(result.metrics["top1"])
        whole = {key: values for key, values in top1.items() if len(values) == len(SEEDS)}
        taken = best(whole) if len(whole) == len(group.arms) * len(group.rates) else None
        rows += [
            {"group": name, "notebook": group.notebook, "arm": arm, "lr": lr, "n": len(values),
             "top1_validation": float(np.mean(values)), "sd": float(np.std(values, ddof=1)),
             "chosen": lr == taken if taken else None}
            for (arm, lr), values in whole.items()
        ]  # fmt: skip
    return rows


def best(found: dict[tuple[str, float], Sequence[float]]) -> float:
    """The rate whose mean over all arms is highest; of equals the lowest."""
    rates = sorted({lr for _, lr in found})
    return max(rates, key=lambda lr: (np.mean([v for (_, other), v in found.items() if other == lr]), -lr))
