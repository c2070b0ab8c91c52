"""JupyterLab on the page of all claims: `make lab`. The environment variable ARGS holds options of JupyterLab."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence

from lab import paths

# No question about news, no look for updates, light or dark as the system is, contents at hand.
SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/apputils-extension:themes": {"adaptive-theme": True},
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "defer"},
}
EXTENSIONS = paths.ROOT / "tools" / "labextension"
TRUST = (sys.executable, "-m", "jupyter", "trust")


def command(words: Sequence[str]) -> list[str]:
    """What starts JupyterLab, with the checkout as its root, so that executed notebooks can be opened too.

    words: options of JupyterLab, which win. It listens on this machine alone and asks for its token, as it does by itself.
    """
    settings = paths.outputs() / "jupyterlab"
    settings.mkdir(parents=True, exist_ok=True)
    (settings / "overrides.json").write_text(json.dumps(SETTINGS), encoding="utf-8")
    own = [
        f"--ServerApp.root_dir={paths.ROOT}", f"--LabApp.app_settings_dir={settings}", "--LabApp.news_url=None",
        f"--LabApp.extra_labextensions_path={EXTENSIONS}", "--LabApp.default_url=/lab/tree/notebooks/00_claims.ipynb",
    ]  # fmt: skip
    given = {word.partition("=")[0] for word in words}  # an option may be there once only
    own = [word for word in own if word.partition("=")[0] not in given]
    root = ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []  # in a container
    return [sys.executable, "-m", "jupyter", "lab", *own, *root, *words]


def start(words: Sequence[str]) -> int:
    """Trust this project's notebooks, so that what they show is shown, and start JupyterLab; its exit code."""
    notebooks = sorted(paths.NOTEBOOKS.glob("*.ipynb"))
    subprocess.run([*TRUST, *notebooks], check=False, stdout=subprocess.DEVNULL)
    return subprocess.run(command(words), check=False).returncode


if __name__ == "__main__":
    sys.exit(start(shlex.split(os.environ.get("ARGS", ""))))
