"""Which runs each notebook is made of, at each profile.

An experiment is a table of arms, each a run without its seed, and the seeds; `specs()` lists all runs with the seeds
outermost, so that a stop leaves complete pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lab.claims.ledger import Part, ledger
from lab.cost import plan
from lab.data.published import DataAbsent
from lab.experiments.profiles import Profile, profile
from lab.experiments.small import (
    baselines,
    branches,
    depth_or_width,
    layer_scale,
    pairs,
    resolution,
    stems,
    transfer,
    widths,
)
from lab.runs.launch import launch
from lab.runs.results import Result
from lab.runs.spec import RunSpec
from vitlib.errors import UsageError, unknown


@dataclass(frozen=True)
class Experiment:
    """The arms of one notebook at one profile."""

    notebook: str
    profile: Profile
    arms: dict[str, RunSpec]

    def specs(self) -> list[RunSpec]:
        """Every run, seeds outermost."""
        return [spec.with_seed(seed) for seed in self.profile.seeds for spec in self.arms.values()]

    def run(
        self, jobs: int = 0, seconds: Callable[[RunSpec], float] | None = None, stamps: Mapping[str, str] | None = None
    ) -> Runs:
        """Train what is missing, as `launch` does, and read all results."""
        return self.collect(launch(self.specs(), jobs, seconds, stamps))

    def collect(self, found: dict[RunSpec, Result]) -> Runs:
        """The results by arm, one a seed."""
        seeds = self.profile.seeds
        return Runs(self, {arm: [found[spec.with_seed(s)] for s in seeds] for arm, spec in self.arms.items()})


@dataclass(frozen=True)
class Runs:
    """The results of an experiment: for each arm one result a seed."""

    experiment: Experiment
    results: dict[str, list[Result]]


# notebook number -> (file name, arms); notebooks without runs have none
NOTEBOOKS: dict[str, tuple[str, Callable[[Profile], dict[str, RunSpec]] | None]] = {
    "00": ("00_claims", None),
    "21": ("21_tab1_baselines", baselines),
    "31": ("31_fig1_branches", branches),
    "32": ("32_fig2_width", widths),
    "33": ("33_fig3_pairs", pairs),
    "34": ("34_tab2_layerscale", layer_scale),
    "35": ("35_tab3_depth_or_width", depth_or_width),
    "36": ("36_tab4_throughput", None),
    "41": ("41_tab5_resolution", resolution),
    "42": ("42_tab6_transfer", transfer),
    "51": ("51_fig5_stem_and_masking", None),
    "52": ("52_tab7_masked_pretraining", stems),
}


def notebook_number(name: str) -> str:
    """ "31", "31_fig1_branches" and "31_fig1_branches.ipynb" are one notebook. Raises UsageError for another."""
    for number, (file, _) in NOTEBOOKS.items():
        if name in (number, file, f"{file}.ipynb", f"notebooks/{file}.ipynb"):
            return number
    raise unknown("notebook", name, [file for file, _ in NOTEBOOKS.values()])


def experiment(notebook: str, profile_name: str) -> Experiment:
    """The experiment behind a notebook. Raises UsageError for names that do not exist."""
    number, scale = notebook_number(notebook), profile(profile_name)
    arms = NOTEBOOKS[number][1]
    if arms is None:
        raise UsageError(f"notebook {NOTEBOOKS[number][0]} has no runs of its own")
    if scale.paper:
        from lab.experiments import imagenet

        arms = imagenet.ARMS[number]
    return Experiment(number, scale, arms(scale))


def available(profile_name: str, notebooks: list[str]) -> tuple[list[str], list[DataAbsent]]:
    """Of these notebooks those whose data is there, and what is said of the others' data, each data set once."""
    there, absent = [], {}
    for number in notebooks:
        try:
            if NOTEBOOKS[number][1]:
                experiment(number, profile_name)
            there.append(number)
        except DataAbsent as fault:
            absent[str(fault)] = fault
    return there, list(absent.values())


def all_specs(profile_name: str, notebooks: list[str]) -> list[RunSpec]:
    """The runs of several notebooks in one queue, each once, seeds outermost.

    Where every arm is run, which takes hours: what each part of a claim reads, the cheapest part first, then the rest,
    so that a stop leaves whole verdicts.
    """
    p = profile(profile_name)
    chosen = [experiment(n, p.name) for n in notebooks if NOTEBOOKS[n][1]]
    blocks = [[spec for e in chosen for spec in e.arms.values()]]
    if p.every_arm:
        blocks = sorted((arms for e in chosen for arms in _read_by_parts(e)), key=_cost) + blocks
    return list(dict.fromkeys(spec.with_seed(seed) for block in blocks for seed in p.seeds for spec in block))


def part_specs(profile_name: str, parts: list[str]) -> list[RunSpec]:
    """The runs that the verdicts on these parts of claims are read from, part by part, seeds outermost.

    Raises UsageError for a part that does not exist or has no runs at this profile.
    """
    p, queue = profile(profile_name), []
    for id in parts:
        if id not in ledger():
            raise unknown("part of a claim", id, ledger())
        part = ledger()[id]
        arms = NOTEBOOKS[part.notebook][1] and experiment(part.notebook, p.name).arms
        read = _read(part, p, arms) if arms and part.belongs(p.name) else []
        if not read:
            raise UsageError(f"part {id} has no runs at profile {p.name}")
        queue += [spec.with_seed(seed) for seed in p.seeds for spec in read]
    return list(dict.fromkeys(queue))


def _read_by_parts(setting: Experiment) -> list[list[RunSpec]]:
    """For each part of a claim in this notebook the runs that its verdict is read from."""
    parts = [part for part in ledger().values() if part.notebook == setting.notebook]
    return [_read(part, setting.profile, setting.arms) for part in parts if part.belongs(setting.profile.name)]


def _read(part: Part, p: Profile, arms: dict[str, RunSpec]) -> list[RunSpec]:
    there = part.at_profile(p.name)
    names = [*there.arms(max(p.pairs, there.min_pairs)), there.parent]
    return [arms[name] for name in dict.fromkeys(names) if name in arms]


def _cost(arms: list[RunSpec]) -> float:
    return sum(plan.formula_seconds(spec) for spec in {member for arm in arms for member in arm.family()})
