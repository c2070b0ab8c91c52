"""Tuning: each arm's own learning rate, by one rule, on validation images of seeds from 1000, before any judged run.

Rates are a factor 2 apart. Every tried rate has two seeds, the best three of a primary arm two more. The curve is flat where
a rate's paired deficit to the best lies within its standard error; the grid grows until the flat part has a tried rate on
each side, and its middle is chosen (of two, the lower). Exploratory arms have two seeds throughout. What a search found goes
into `RATES` of profiles.py by hand; what it was chosen from is committed (outputs/reference/<profile>/tuning.csv).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lab.claims.statistics import flat_part, middle
from lab.data.cards import source
from lab.experiments import small
from lab.experiments.catalogue import Arms
from lab.experiments.profiles import PROFILES, Profile, started
from lab.runs import store
from lab.runs.spec import FIRST_TUNING_SEED, RunSpec
from vitlib.errors import unknown

SEEDS = tuple(FIRST_TUNING_SEED + i for i in range(4))
FIRST = 2  # seeds that every rate has
MOST = 9  # rates of one search: then its best is at an end, and its parts fail the check "rate bracketed"
TOP1 = dict[float, dict[int, float]]  # rate -> seed -> validation top-1


@dataclass(frozen=True)
class Search:
    """The search for one rate of `Profile.rates`."""

    rate: str
    table: Arms  # of `small.py`
    arms: tuple[str, ...]  # whose mean accuracy decides
    primary: bool = False
    after: str = ""  # the search whose chosen rate this one's runs need

    def specs(self, p: Profile, lr: float, seed: int) -> list[RunSpec]:
        arms = {arm.label: arm.spec for arm in self.table(replace(p, rates={**p.rates, self.rate: lr}))}
        return [arms[arm].with_seed(seed) for arm in self.arms]


def _searches(few: int) -> Iterator[Search]:
    for form in ("12x1+LS", "6x2+LS"):
        yield Search(form, small.branches, (form,), primary=True)
    for stem in small.PRIMARY_STEMS:
        yield Search(f"{stem} masked", small.stems, (f"{stem} pretrained",), primary=True)
        yield Search(f"{stem} pretrained", small.stems, (f"{stem} pretrained",), primary=True, after=f"{stem} masked")
        yield Search(f"{stem} supervised", small.stems, (f"{stem} supervised",), primary=True)
    for strategy in small.STRATEGIES:
        yield Search(strategy, small.resolution, (strategy,), strategy in ("full", "attn", "ffn"), after="12x1+LS")
    for form in ("36x1+LS", "12x1", "6x2", "36x1", "18x2", "18x2+LS"):
        yield Search(form, small.branches, (form,))
    for strategy in ("full", "attn", "scratch"):
        arms = tuple(f"digits 100 {strategy}, subset {k}" for k in range(1, small.SUBSETS + 1))
        yield Search(f"digits 100 {strategy}", small.transfer, arms, after="12x1+LS")
    for training in ("scratch", "pretrained"):
        arm = f"linear {training} {few}"
        yield Search(arm, small.stems, (arm,), after="linear masked")


def searches(p: Profile, names: Sequence[str] = ()) -> dict[str, Search]:
    """The searches whose arms a profile has, or those of these names and the ones they come after."""
    if not p.rates:
        raise unknown("profile with rates to search:", p.name, [name for name, one in PROFILES.items() if one.rates])
    every = _searches(p.stems.few_labels)
    found = {one.rate: one for one in every if {*one.arms} <= {arm.label for arm in one.table(p)}}
    for name in names:
        if name not in found:
            raise unknown(f"rate of profile {p.name}", name, found)
    wanted = {*(names or found)} | {found[name].after for name in names}
    return {name: one for name, one in found.items() if name in wanted}


@dataclass(frozen=True)
class Curve:
    """What a search has tried, and what follows: rates that are missing (rate, seed), or the chosen one."""

    top1: TOP1
    missing: tuple[tuple[float, int], ...] = ()
    flat: tuple[float, ...] = ()
    chosen: float | None = None
    bracketed: bool = False


def curve(start: float, primary: bool, look: Callable[[float, int], float | None]) -> Curve:
    """The search by its rule; `look` gives the validation top-1 of (rate, seed), or None where it is not run yet."""
    rates = [start / 2, start, 2 * start]
    while True:
        top1: TOP1 = {lr: {seed: look(lr, seed) for seed in SEEDS[:FIRST]} for lr in rates}
        if missing := _absent(top1):
            return Curve(top1, missing)
        if primary:
            best = sorted(rates, key=lambda lr: -np.mean([*top1[lr].values()]))[:3]
            for lr in best:
                top1[lr] = {seed: look(lr, seed) for seed in SEEDS}
            if missing := _absent(top1):
                return Curve(top1, missing)
        flat = flat_part(top1)
        low, high = flat[0] == rates[0], flat[-1] == rates[-1]
        if not (low or high) or len(rates) >= MOST:
            return Curve(top1, (), flat, middle(flat), not (low or high))
        rates = [*([rates[0] / 2] if low else []), *rates, *([2 * rates[-1]] if high else [])]


def _absent(top1: TOP1) -> tuple[tuple[float, int], ...]:
    return tuple((lr, seed) for lr, of_lr in top1.items() for seed, value in of_lr.items() if value is None)


def curves(p: Profile, wanted: Mapping[str, Search]) -> dict[str, tuple[Search, Profile, Curve]]:
    """Every search that can go on: those which it comes after are decided, and their rates are in its profile."""
    found: dict[str, tuple[Search, Profile, Curve]] = {}
    p = replace(p, rates=started(p.stems.few_labels))
    for name, one in wanted.items():
        before = found.get(one.after)
        if one.after and (before is None or before[2].chosen is None):
            continue
        there = replace(p, rates={**p.rates, one.after: before[2].chosen}) if before else p

        def look(lr: float, seed: int, one: Search = one, there: Profile = there) -> float | None:
            results = [store.find(spec) for spec in one.specs(there, lr, seed)]
            return None if None in results else float(np.mean([r.metrics["top1"] for r in results]))

        found[name] = one, there, curve(p.rates[name], one.primary, look)
    return found


def missing(p: Profile, wanted: Mapping[str, Search]) -> list[RunSpec]:
    """The runs that the searches ask for next, seeds outermost; none when all are decided."""
    asked = [
        (seed, spec) for one, there, state in curves(p, wanted).values()
        for lr, seed in state.missing for spec in one.specs(there, lr, seed)
    ]  # fmt: skip
    return list(dict.fromkeys(spec for _, spec in sorted(asked, key=lambda pair: pair[0])))


def table(p: Profile, wanted: Mapping[str, Search]) -> list[dict]:
    """One row per tried rate: its accuracy on each seed, whether it is in the flat part, chosen, bracketed."""
    return [
        {"rate_of": name, "primary": one.primary, "lr": lr, "n": len(of_lr), "top1_validation": float(np.mean([*of_lr.values()])),
         **{f"seed_{seed}": of_lr.get(seed) for seed in SEEDS},
         "flat": lr in state.flat, "chosen": lr == state.chosen, "bracketed": state.bracketed}
        for name, (one, _, state) in curves(p, wanted).items()
        for lr, of_lr in sorted(state.top1.items()) if None not in of_lr.values()
    ]  # fmt: skip


SHARES = (2, 4)  # of the images of `full` in the control of Thing 2: the one whose deficit is nearest to 2 m is taken


def control(p: Profile) -> dict[int, list[RunSpec]]:
    """Images -> the runs of `full` on all and on fewer of them on the tuning seeds; none before its rate is chosen."""
    there = curves(p, searches(p, ["full"]))
    if "full" not in there or (lr := there["full"][2].chosen) is None:
        return {}
    facts, chosen = source(p.data).facts, there["full"][1]
    whole = p.finetune_images or facts.sizes["train"]
    chosen = replace(chosen, rates={**chosen.rates, "full": lr})
    found = {}
    for n in (whole // share // facts.num_classes * facts.num_classes for share in SHARES):
        arms = {arm.label: arm.spec for arm in small.resolution(replace(chosen, control_images=n))}
        found |= {whole: arms["full"], n: arms["full, fewer steps"]}
    return {n: [spec.with_seed(seed) for seed in SEEDS] for n, spec in found.items()}
