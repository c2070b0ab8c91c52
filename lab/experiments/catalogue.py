"""Which experiment each notebook shows, and its runs at each profile.

An experiment is a table of arms, each a run without its seed; runs are listed with the seeds outermost, so that a stop leaves
complete pairs. A new notebook is one more record in `NOTEBOOKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lab.data import DataAbsent
from lab.experiments import imagenet, public, small
from lab.experiments.profiles import Arm, Profile
from lab.runs import store
from lab.runs.results import Result
from lab.runs.spec import RunSpec
from vitlib.errors import UsageError, unknown
from vitlib.model import ViTConfig

Arms = Callable[[Profile], list[Arm]]


@dataclass(frozen=True)
class Notebook:
    """A notebook and the functions that make its arms: below ImageNet's scale, at the paper's, from public weights; or None."""

    number: str
    file: str  # in notebooks/, without .ipynb
    small: Arms | None = None
    imagenet: Arms | None = None
    public: Arms | None = None

    @property
    def has_runs(self) -> bool:
        return bool(self.small or self.imagenet or self.public)

    def arms_at(self, profile: Profile) -> Arms | None:
        return getattr(self, profile.module)


NOTEBOOKS: tuple[Notebook, ...] = (
    Notebook("00", "00_claims"),
    Notebook("21", "21_tab1_baselines", small.baselines, imagenet.baselines),
    Notebook("31", "31_fig1_branches", small.branches, imagenet.branches),
    Notebook("32", "32_fig2_width", small.widths, imagenet.widths),
    Notebook("33", "33_fig3_pairs", small.pairs, imagenet.pairs),
    Notebook("34", "34_tab2_layerscale", small.layer_scale, imagenet.layer_scale),
    Notebook("35", "35_tab3_depth_or_width", small.depth_or_width, imagenet.depth_or_width),
    Notebook("36", "36_tab4_throughput"),
    Notebook("41", "41_tab5_resolution", small.resolution, imagenet.resolution, public.resolution),
    Notebook("42", "42_tab6_transfer", small.transfer, imagenet.transfer, public.transfer),
    Notebook("51", "51_fig5_stem_and_masking"),
    Notebook("52", "52_tab7_masked_pretraining", small.stems, imagenet.stems),
    Notebook("61", "61_regrouping", small.regrouping),
    Notebook("62", "62_own_images"),
)


def notebook(name: str) -> Notebook:
    """The look-up at the edge: "31", "31_fig1_branches" and "31_fig1_branches.ipynb" are one notebook.

    Raises UsageError for another name.
    """
    for one in NOTEBOOKS:
        if name in (one.number, one.file, f"{one.file}.ipynb", f"notebooks/{one.file}.ipynb"):
            return one
    raise unknown("notebook", name, [one.file for one in NOTEBOOKS])


@dataclass(frozen=True)
class Experiment:
    """The arms of one notebook at one profile."""

    notebook: Notebook
    profile: Profile
    arms: dict[str, Arm]  # by label

    def specs(self) -> list[RunSpec]:
        """Every run, seeds outermost."""
        return in_order([*self.arms.values()], self.profile.seeds)

    def finished(self) -> Runs:
        """What is finished; an arm with a seed missing is left out."""
        results = {label: [store.find(spec) for spec in self.seeds_of(label)] for label in self.arms}
        return Runs(self, {label: of_arm for label, of_arm in results.items() if all(of_arm)})

    def seeds_of(self, label: str) -> list[RunSpec]:
        """The runs of one arm, in the order of the profile's seeds."""
        arm = self.arms[label]
        return [arm.spec.with_seed(seed) for seed in self.profile.seeds[: arm.n]]


@dataclass(frozen=True)
class Runs:
    """The results of an experiment: for each arm one result per seed."""

    experiment: Experiment
    results: dict[str, list[Result]]
    # Of an archive: arm -> what was trained, as `RunSpec.record`.
    records: Mapping[str, dict] = field(default_factory=dict)

    def record(self, label: str) -> dict:
        """What was trained under a label."""
        return self.records[label] if self.records else self.experiment.arms[label].spec.record()


def experiment(notebook: Notebook, profile: Profile) -> Experiment:
    """The experiment of a notebook. Raises UsageError where the notebook has no runs at this profile."""
    arms = notebook.arms_at(profile)
    if arms is None:
        where = f"its record in lab/experiments/catalogue.py names no function of {profile.module}.py"
        raise UsageError(f"notebook {notebook.file} has no runs at profile {profile.name}: {where}")
    made = arms(profile)
    by_label = {arm.label: arm for arm in made}
    if len(by_label) < len(made):
        raise UsageError(f"notebook {notebook.file} has two arms of one label at profile {profile.name}")
    return Experiment(notebook, profile, by_label)


def available(profile: Profile, notebooks: Iterable[Notebook]) -> tuple[list[Notebook], list[UsageError]]:
    """The notebooks that can run at this profile, and why others cannot, each reason once: data or arms that are not there."""
    there, absent = [], {}
    for one in notebooks:
        try:
            if one.has_runs:
                experiment(one, profile)
            there.append(one)
        except UsageError as fault:
            if one.arms_at(profile) and not isinstance(fault, DataAbsent):
                raise
            absent[str(fault)] = fault
    return there, list(absent.values())


def meant_for(profile: Profile, notebooks: Iterable[Notebook]) -> list[Notebook]:
    """Those that have runs at this profile, or at none."""
    return [one for one in notebooks if one.arms_at(profile) or not one.has_runs]


def experiments(profile: Profile, notebooks: Iterable[Notebook]) -> list[Experiment]:
    """The experiments of those notebooks that have runs.

    Raises UsageError where none has at this profile, and one has at others.
    """
    having = [one for one in notebooks if one.has_runs]
    here = [one for one in having if one.arms_at(profile)]
    return [experiment(one, profile) for one in here or having]


def all_specs(profile: Profile, notebooks: Iterable[Notebook]) -> list[RunSpec]:
    """The runs of several notebooks in one queue, each once, seeds outermost."""
    arms = [arm for one in experiments(profile, notebooks) for arm in one.arms.values()]
    return in_order(arms, profile.seeds)


def in_order(arms: Sequence[Arm], seeds: Sequence[int]) -> list[RunSpec]:
    """Each run once, seeds outermost; an arm has so many of the seeds as it says."""
    runs = (arm.spec.with_seed(seed) for i, seed in enumerate(seeds) for arm in arms if arm.n is None or i < arm.n)
    return list(dict.fromkeys(runs))


def arms_of(table: Arms, profile: Profile) -> dict[str, Arm]:
    """The arms of an experiment by label, e.g. `arms_of(small.resolution, profile)`, from the module of the profile."""
    module = {"imagenet": imagenet, "public": public, "small": small}[profile.module]
    return {arm.label: arm for arm in getattr(module, table.__name__)(profile)}


def stem_model(profile: Profile, name: str) -> ViTConfig:
    """The model of a row of Table 7 at a profile's scale."""
    return (imagenet if profile.paper else small).stem_model(profile, name)
