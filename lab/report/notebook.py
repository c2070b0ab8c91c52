"""What a notebook calls: `page = open_page("31", profile)`, then runs, tables, figures, verdicts.

Tables are shown as Markdown and figures as PNG, since a fresh clone's notebooks are untrusted in JupyterLab; a copy of
each goes to outputs/<profile>/tables (CSV) and outputs/<profile>/figures (SVG, PNG).
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Image, Markdown, display
from matplotlib.figure import Figure

from lab import paths, report
from lab.claims.ledger import ledger_hashes
from lab.cost.plan import cpu_seconds
from lab.experiments.catalogue import NOTEBOOKS, Experiment, Runs, experiment, notebook_number
from lab.experiments.profiles import profile
from lab.runs.store import weights_path


@dataclass(frozen=True)
class Page:
    """One notebook at one profile."""

    number: str
    profile: str

    @property
    def experiment(self) -> Experiment:
        return experiment(self.number, self.profile)

    def run(self, jobs: int = 0) -> Runs:
        """Train what is missing, read all results, and say where they come from. VITLIB_TRAIN=0: read what is finished."""
        setting = self.experiment
        train = os.environ.get("VITLIB_TRAIN") != "0"
        found = setting.run(jobs, cpu_seconds, ledger_hashes()) if train else Runs(setting, report.finished(setting))
        said = report.provenance(found) if found.results else f"No runs at `{self.profile}`: {report.WITHOUT_RUNS}"
        display(Markdown(said))
        return found

    def table(self, table: pd.DataFrame, name: str = "") -> None:
        """Show a table; with a name its CSV is `<notebook>_<name>.csv`."""
        if not len(table):
            display(Markdown("None of these runs is finished."))
            return
        report.save_table(table, self.profile, self._file(name))
        display(Markdown(report.markdown(table)))

    def accuracies(self, runs: Runs, reference: str, paper: dict[str, str]) -> None:
        """The paper | the committed reference | this run, and one blocked model for the whole table; nothing without arms."""
        if not runs.results and not self.experiment.arms and self.number == "21":
            return
        self.table(report.accuracies(runs, reference, paper))
        if note := report.blocked_model(runs):
            display(Markdown(note))

    def figure(self, figure: Figure, alt: str, name: str = "") -> None:
        """Show a figure with alternative text; SVG and PNG go beside."""
        folder = paths.outputs() / self.profile / "figures"
        folder.mkdir(parents=True, exist_ok=True)
        plt.close(figure)
        # A fixed salt and no date: the same figure is the same file.
        with mpl.rc_context({"svg.hashsalt": "vitlib"}):
            figure.savefig(folder / f"{self._file(name)}.svg", metadata={"Date": None})
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=100)
        (folder / f"{self._file(name)}.png").write_bytes(png.getvalue())
        display(Image(png.getvalue(), format="png", alt=alt, metadata={"alt": alt}))

    def tokenizers(self, runs: Runs) -> None:
        """What the discrete VAEs of these runs give back, and how much of their codebooks is in use."""
        specs = report.tokenizers_of(runs)
        if not specs:
            display(Markdown("No discrete VAE at this profile: the targets are k-means tokens."))
            return
        self.table(report.codebook_use(specs), "tokenizers")
        if kept := [
            spec for spec in specs if weights_path(spec).is_file() and not spec.streamed
        ]:  # imported runs have metrics only
            figure, caption = report.reconstruction_figure(kept[0])
            self.figure(figure, alt="Images of each class, and what their tokens give back", name="tokenizer")
            display(Markdown(f"*{caption}*"))

    def verdicts(self) -> None:
        """The verdict on each part of a claim that this notebook carries."""
        mine = report.verdicts(self.profile, self.number)
        display(Markdown("\n".join(f"- **{v.part.id}** {v.part.title} → **{v.text}**" for v in mine)))
        self.table(report.verdict_rows(mine, report.tested_elsewhere(self.profile, self.number)), "verdicts")

    def _file(self, name: str) -> str:
        return f"{NOTEBOOKS[self.number][0]}{'_' if name else ''}{name}"


def open_page(number: str, profile_name: str) -> Page:
    """A notebook's page; says its scale and what its columns are.

    Raises UsageError for a notebook or a profile that does not exist, before anything is trained.
    """
    report.theme()
    page = Page(notebook_number(number), profile(profile_name).name)
    display(Markdown(report.legend(page.profile)))
    return page
