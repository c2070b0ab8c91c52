"""Benchmarks of this code itself, none of which a claim of the paper needs: `python -m benchmarks.{train,masked,data}`.

They are run, written and printed as those of `lab.bench`, by `lab.bench.runner`.
"""

from __future__ import annotations

import argparse
import sys

from lab.__main__ import whole
from lab.bench import runner
from lab.experiments.profiles import profile
from vitlib.errors import UsageError


def main(bench: runner.Bench, text: str) -> None:
    """The command line of one benchmark."""
    command = argparse.ArgumentParser(prog=f"python -m benchmarks.{bench.name}", description=text)
    command.add_argument(
        "--profile", default="cpu", help="smoke, cpu, study, photos, imagenet or public (default: %(default)s)"
    )
    command.add_argument("--device", default="", help="cpu or cuda (default: cuda where there is a GPU)")
    command.add_argument(
        "--restarts", type=whole(0), default=0, help="fresh processes per case (0: each case's own number)"
    )
    command.add_argument("--only", default="", metavar="TEXT", help="the cases whose name contains this")
    arguments = command.parse_args()
    try:
        scale = profile(arguments.profile)
        rows = runner.run(bench, scale, arguments.device, arguments.restarts, arguments.only)
    except UsageError as fault:
        sys.exit(f"{bench.name}: {fault}")
    print(runner.report(bench, scale, rows))
