"""Runs, their launch and cost, experiments, claims, reports, notebooks. Heavy libraries load where they are used."""

import warnings

# tqdm.auto, which other packages import, asks for ipywidgets in every notebook; our bars are plain text.
warnings.filterwarnings("ignore", message="IProgress not found")
