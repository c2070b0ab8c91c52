"""What a notebook calls: `page = open_page("31", profile)`, then runs, tables, figures, verdicts.

Tables are shown as Markdown and figures as PNG, since a fresh clone's notebooks are untrusted in JupyterLab; a copy of
each goes to outputs/<profile>/tables (numbers as CSV, as printed in Markdown) and outputs/<profile>/figures (SVG, PNG).
"""

from __future__ import annotations

import functools
import inspect
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from IPython.display import Markdown, display
from matplotlib.figure import Figure

from lab import paths
from lab.claims import evidence
from lab.claims.evidence import Archived
from lab.claims.judge import Verdict
from lab.claims.ledger import PILOT, stamps
from lab.cost.plan import cpu_seconds
from lab.data.cards import source
from lab.experiments import small
from lab.experiments.catalogue import Experiment, Notebook, Runs, experiment, notebook
from lab.experiments.profiles import Profile, changed, profile
from lab.report import answer, figures, tables
from lab.runs import store
from lab.runs.launch import launch
from vitlib.errors import UsageError, unknown
from vitlib.files import write_figure, write_whole


def say(text: str) -> None:
    display(Markdown(text))


@dataclass(frozen=True)
class Page:
    """One notebook at one profile."""

    notebook: Notebook
    profile: Profile
    experiment: Experiment | None = None  # None: this notebook trains nothing
    committed: Runs | None = None  # what the committed reference has of it
    changed: str = ""  # which of the profile's numbers a reader has changed

    @functools.cached_property
    def about(self) -> str:
        """The small print of this page's figures: read once, when the first is drawn after the runs."""
        return tables.about(self.experiment.finished())

    def sequential(self, runs: Runs, layer_scale: bool = False) -> str:
        """The arm of one branch, with LayerScale or without, of the profile's own width where there is one."""
        return tables.sequential(runs if runs.results else self.committed, self.profile.width, layer_scale)

    def run(self, jobs: int = 0) -> Runs:
        """Train what is missing, read all results, and say where they come from. VITLIB_TRAIN=0: read what is finished."""
        if os.environ.get("VITLIB_TRAIN") != "0":
            launch(self.experiment.specs(), jobs, cpu_seconds, stamps(self.profile.name))
        runs = self.experiment.finished()
        say(tables.provenance(runs))
        return runs

    def table(self, frame: pd.DataFrame, name: str = "") -> None:
        """Show a table; with a name its files are `<notebook>_<name>`."""
        if not len(frame):
            say("None of these runs is finished.")
            return
        text, path = tables.markdown(frame), self._path("tables", name)
        tables.save(frame, path.with_suffix(".csv"))
        with write_whole(path.with_suffix(".md")) as draft:
            draft.write_text(f"{text}\n", encoding="utf-8")
        say(text)

    def accuracies(self, runs: Runs, reference: str, paper: Mapping[str, Mapping]) -> None:
        """The paper | the committed reference | this run; nothing where neither has arms."""
        if runs.experiment.arms or self.committed.results:
            self.table(tables.accuracies(runs, self.committed, reference, paper))

    def figure(self, figure: Figure, alt: str, name: str = "", caption: str = "") -> None:
        """Show a figure with alternative text and a caption; SVG and PNG go beside."""
        path = self._path("figures", name)
        if self.experiment and not caption:  # which says it otherwise
            answer.small_print(figure, self.about)
        # A fixed salt and no date: the same figure is the same file.
        with mpl.rc_context({"svg.hashsalt": "vitlib"}):
            write_figure(path.with_suffix(".svg"), figure, metadata={"Date": None})
        write_figure(path.with_suffix(".png"), figure, dpi=200, metadata={"Software": None})
        display(answer.picture(figure, alt, dpi=100))
        if caption:
            say(f"*{caption}*")

    def look(self, draw: Callable[[Runs], tuple[Figure, str]], runs: Runs) -> None:
        """A figure of `lab.report.looks` with its caption, or why it is not drawn."""
        try:
            drawn, caption = draw(runs)
        except UsageError as fault:
            say(f"Not drawn: {fault}.")
        else:
            self.figure(drawn, caption, draw.__name__, caption)

    def tokenizers(self, runs: Runs) -> None:
        """What the discrete VAEs of these runs give back, and how much of their codebooks is in use."""
        family = dict.fromkeys(member for spec in runs.experiment.specs() for member in spec.family())
        trained = {m: result for m in family if m.protocol == "tokenizer" and (result := store.find(m)) is not None}
        if not trained:
            say("No discrete VAE at this profile: the targets are k-means tokens.")
            return
        self.table(tables.codebook_use(trained), "tokenizers")
        kept = [spec for spec in trained if store.weights_path(spec).is_file() and not spec.streamed]
        if kept:  # imported runs have metrics only
            drawn, caption = figures.reconstruction_figure(kept[0])
            self.figure(drawn, "Images of each class, and what their tokens give back", "tokenizer", caption)

    def judged(self, number: str = "") -> list[Verdict]:
        """The verdicts at this profile, from what is finished; at smoke, which judges nothing else, on what is counted.

        number: of a notebook, whose parts alone are wanted.
        """
        every = tables.judged(self.profile, number)  # all that Holm's correction is over
        wanted = [v for v in every if number in ("", v.part.notebook)]
        if self.profile.judged:
            return wanted
        say("These runs only show that the code runs; the answer on top is the reference's. What is counted:")
        return [v for v in wanted if v.part.kind == "exact"]

    def verdicts(self) -> None:
        """The verdict on each part of a claim that this notebook carries, from this page's own runs."""
        if self.changed:
            say(f"**Not judged: changed** ({self.changed}). The ledger fixed other values before the runs.")
            return
        mine = self.judged(self.notebook.number)
        say("\n".join(f"- **{v.part.id}** {v.part.title} → **{v.label}** {v.sentence}" for v in mine))
        if mine:
            self.table(tables.verdicts(mine), "verdicts")

    def margins(self, every: Sequence[Verdict]) -> None:
        """How each measured part's label moves with the margin."""
        self.table(tables.margins(every), "margins")

    def images(self, count: int = 8) -> None:
        """The first test images of the profile's data, with their labels, where it is held in memory."""
        if source(self.profile.data).facts.image_size:
            drawn, caption = figures.images_figure(self.profile, count)
            self.figure(drawn, caption, "data", caption)

    def curves(self, runs: Runs) -> None:
        """The loss of every run over its steps, a line each."""
        self.figure(figures.loss_figure(runs), "Training loss of every run over the steps", "loss")

    def _path(self, folder: str, name: str) -> Path:
        return paths.outputs() / self.profile.name / folder / f"{self.notebook.file}{'_' if name else ''}{name}"


def study_of(shown: Notebook) -> Archived:
    """The committed study that a page shows beside its runs: the second one where it has runs of the notebook, else the pilot."""
    second = evidence.reference()
    if second and (second.archive.results(shown.number) or not shown.has_runs):
        return second
    return evidence.committed(PILOT)


def reference_text(shown: Notebook) -> str:
    """What the committed reference of a page is, in a few words."""
    study = study_of(shown)
    days = {r.about["date"] for results in study.archive.results(shown.number).values() for r in results}
    made = f", made {tables.span(days)}" if days else ""
    return f"{study.name}, {len(study.archive.seeds)} seeds at most{made}"


def committed(shown: Notebook) -> Runs:
    """What the reference has of a notebook; nothing of the pilot's stems, which were others."""
    p, study = profile("study"), study_of(shown)
    setting = experiment(shown, p) if shown.arms_at(p) else Experiment(shown, p, {})
    results = {} if study.name == PILOT and shown.small is small.stems else study.archive.results(shown.number)
    return Runs(setting, results, {label: study.archive.record(of_arm[0].hash) for label, of_arm in results.items()})


def open_page(name: str, profile_name: str, only: str = "", **knobs: float) -> Page:
    """A notebook's page; says its scale and what its columns are.

    only: words of the arms to run, e.g. "full attn"; all by default. knobs: a reader's own numbers, see `profiles.changed`.
    Raises UsageError for a notebook, a profile, an arm or a number that does not exist, before anything is trained.
    """
    answer.theme()
    shown, p = notebook(name), changed(profile(profile_name), **knobs)
    said = [f"{key} = {value:g}" for key, value in knobs.items() if value] + ([f"only {only}"] if only else [])
    say(tables.legend(p, reference_text(shown)))
    if not shown.has_runs:
        return Page(shown, p)
    setting = experiment(shown, p)
    if only:
        arms = {label: arm for label, arm in setting.arms.items() if {*only.split()} & {arm.row, arm.column, label}}
        if not arms:
            raise unknown(f"arm of notebook {shown.file}", only, setting.arms)
        setting = replace(setting, arms=arms)
    return Page(shown, p, setting, committed(shown), ", ".join(said))


def show_source(*objects: object) -> None:
    """The code itself, as it is in the library, so that page and library never differ."""
    for one in map(inspect.unwrap, objects):
        path = Path(inspect.getsourcefile(one)).relative_to(paths.ROOT).as_posix()
        say(f"`{path}`\n```python\n{textwrap.dedent(inspect.getsource(one)).rstrip()}\n```")
