"""The command line: `python -m lab --help`. Heavy imports happen inside the commands, so that help is quick."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vitlib.errors import UsageError, unknown

SLURM_SIZES = ("partition", "gpus", "nodes", "cpus", "memory_gb", "hours")  # options of `run`, for `launch.submit`


def main(words: list[str] | None = None) -> int:
    """Run one command; its exit code. A mistake in what was asked for is one sentence and 2."""
    try:
        arguments = parser().parse_args(words)
        return arguments.command(arguments) or 0
    except UsageError as fault:
        print(f"lab: {fault}", file=sys.stderr)
        return 2
    except RuntimeError as fault:
        if type(fault).__module__.startswith(("vitlib", "lab")):  # a run or a notebook that failed: what and where
            print(f"lab: {fault}", file=sys.stderr)
            return 1
        raise
    except KeyboardInterrupt:
        print("\nlab: stopped; finished runs are kept, and the same command goes on with the rest", file=sys.stderr)
        return 130


class Parser(argparse.ArgumentParser):
    """One sentence for a wrong word, like every other mistake."""

    def error(self, message: str):
        raise UsageError(message)


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="python -m lab", description=__import__("lab").__doc__.splitlines()[0])
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, function, text: str, profile: str | None = None) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=function)
        if profile:
            text = "smoke, cpu, study, gpu or imagenet (default: %(default)s)"
            command.add_argument("--profile", default=profile, help=text)
        return command

    add("check", check, "is the installation whole: torch and torchvision of one family, data undamaged")
    plan = add("plan", plan_, "runs, CPU seconds, memory and disk of a profile, before anything starts", "cpu")
    run = add("run", run_, "train what is missing, without rendering notebooks", "cpu")
    reproduce = add("reproduce", reproduce_, "train what is missing and render the notebooks", "cpu")
    refresh = add("refresh", refresh_, "run the committed notebooks at smoke and keep their outputs")
    for command in (plan, run, reproduce, refresh):
        command.add_argument("--notebook", action="append", help="only this one, e.g. 31; may be repeated")
        command.add_argument("--jobs", type=int, default=0, help="training processes side by side (0: one a core)")
    for command in (plan, run):
        command.add_argument(
            "--part", action="append", default=[], help="only what this part of a claim reads, e.g. H4-linear"
        )
    run.add_argument("--processes", type=int, default=1, help="that share each run, one a GPU, through torchrun")
    run.add_argument("--slurm", metavar="FOLDER", help="submit a job a run to SLURM; its scripts and logs go there")
    run.add_argument("--partition", help="of SLURM (default: the cluster's own)")
    run.add_argument("--gpus", type=int, default=1, help="of each machine of a SLURM job (default: 1)")
    run.add_argument("--nodes", type=int, default=1, help="machines of a SLURM job (default: 1)")
    run.add_argument("--cpus", type=int, default=16, help="CPU cores of each process of a SLURM job (default: 16)")
    run.add_argument("--memory-gb", type=int, default=60, help="of each machine of a SLURM job (default: 60)")
    run.add_argument("--hours", type=float, default=24.0, help="time limit of a SLURM job (default: 24)")
    plan.add_argument(
        "--device", default="", help="GPU-hours on this device instead: v100, a100, h100, h200, l40s, rtx4090"
    )
    plan.add_argument("--gpus", type=int, default=1, help="GPUs that share each run (default: 1)")
    plan.add_argument(
        "--rate", type=float, help="TFLOP/s that training reaches; else measured, else a share of the peak"
    )
    plan.add_argument("--utilisation", type=float, help="that share of the maker's peak (default: 0.35)")
    reproduce.add_argument("--finished", action="store_true", help="train nothing: render what is finished")
    reproduce.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a notebook parameter")
    tune = add("tune", tune_, "three learning rates for every arm on validation images, and which one is best", "study")
    tune.add_argument("--group", action="append", default=[], help="only this one, e.g. supervised; may be repeated")
    tune.add_argument(
        "--part", action="append", default=[], help="the margin of this part of a claim instead; may be repeated"
    )
    tune.add_argument("--jobs", type=int, default=0, help="training processes side by side (0: one a core)")
    bench = add("bench", bench_, "time and count one of the comparisons: ratios, spread, operations, bytes", "cpu")
    bench.add_argument("name", help="branches (Table 4) or finetune (a step of each strategy)")
    bench.add_argument("--device", default="", help="cpu or cuda (default: cuda where there is a GPU)")
    bench.add_argument("--restarts", type=int, default=0, help="fresh processes per case (0: each case's own number)")
    bench.add_argument("--only", default="", metavar="TEXT", help="the cases whose name contains this")
    claims = add("claims", claims_, "the claims table of a profile, from finished runs", "cpu")
    claims.add_argument("--pilot", action="store_true", help="of the committed pilot instead: recomputed and compared")
    for name, function, text in (
        ("export", export_, "write the finished runs to a runs.jsonl (metrics, no weights)"),
        ("import", import_, "merge a runs.jsonl into the run store"),
    ):
        add(name, function, text).add_argument("file", type=Path)
    return top


def check(_) -> None:
    """Raises UsageError with one sentence for a broken pair of torch and torchvision, or for damaged data."""
    from vitlib import __main__ as vitlib

    vitlib.check()
    from lab.data.cards import SPLITS, load, names

    for name in names():
        counts = [f"{split} {len(load(name, split)):,}" for split in SPLITS]
        print(f"data set {name}: {', '.join(counts)} images, as its card says")


def _notebooks(arguments) -> list[str]:
    from lab.experiments.catalogue import NOTEBOOKS, notebook

    return [notebook(name) for name in arguments.notebook] if arguments.notebook else list(NOTEBOOKS)


def _specs(arguments) -> list:
    from lab.claims import evidence
    from lab.claims.ledger import part
    from lab.experiments.catalogue import experiments
    from lab.experiments.profiles import profile

    scale = profile(arguments.profile)
    if arguments.jobs < 0:
        raise UsageError(f"jobs is {arguments.jobs}: allowed are 0 (one a core) and up")
    if getattr(arguments, "part", None):
        return evidence.part_specs([part(name) for name in arguments.part], scale)
    return evidence.queue(experiments(scale, _notebooks(arguments)))


def plan_(arguments) -> None:
    from lab.cost import plan
    from lab.report import tables
    from lab.runs import store

    specs = _specs(arguments)
    if not arguments.device:
        print(tables.plan_text(specs, arguments.jobs))
        return
    todo = store.missing(specs)
    cost = plan.gpu_cost(todo, arguments.device, arguments.utilisation, arguments.rate, arguments.gpus)
    print(plan.gpu_text(cost))


def run_(arguments) -> None:
    from lab.claims.ledger import ledger_hashes
    from lab.cost.plan import cpu_seconds
    from lab.runs import spec, store
    from lab.runs.launch import distributed, launch, submit

    specs = _specs(arguments)
    if arguments.slurm:
        sizes = {name: getattr(arguments, name) for name in SLURM_SIZES}
        jobs = submit(specs, arguments.slurm, **sizes, stamps=ledger_hashes())
        print(f"{len(jobs)} jobs submitted; each goes on from its run's last checkpoint if it is stopped")
    elif arguments.processes > 1:
        for spec, need_weights in store.missing(specs).items():
            print(spec.describe(), flush=True)
            distributed(spec, arguments.processes, need_weights, stamps=ledger_hashes())
    else:
        launch(specs, arguments.jobs, cpu_seconds, ledger_hashes())


def tune_(arguments) -> None:
    from lab.claims import tuning
    from lab.claims.ledger import ledger_hashes
    from lab.cost.plan import cpu_seconds
    from lab.experiments.profiles import profile
    from lab.report import tables
    from lab.runs.launch import launch

    p, chosen = profile(arguments.profile), {}
    if arguments.part:
        specs = tuning.control_specs(p, arguments.part)
    else:
        chosen = tuning.groups(arguments.group)
        specs = tuning.specs(p, chosen.values())
    print(tables.plan_text(specs, arguments.jobs))
    launch(specs, arguments.jobs, cpu_seconds, ledger_hashes())
    print(tables.tuning_text(p, chosen))


def reproduce_(arguments) -> None:
    from lab.experiments.catalogue import available
    from lab.experiments.profiles import profile
    from lab.report import render

    p = profile(arguments.profile)
    notebooks, absent = available(p, _notebooks(arguments))
    for fault in absent:  # the other notebooks still run
        print(f"lab: {fault}", file=sys.stderr)
    arguments.notebook = [one.number for one in notebooks]
    if notebooks:
        specs = _specs(arguments)
        render.reproduce(p, notebooks, specs, arguments.jobs, arguments.set, not arguments.finished)
    if absent:
        raise UsageError(f"{len(absent)} data set(s) of profile {arguments.profile} are not there, see above")


def refresh_(arguments) -> int:
    from tools import refresh

    words = [word for name in arguments.notebook or () for word in ("--notebook", name)]
    return refresh.main([*words, "--jobs", str(arguments.jobs)])


def bench_(arguments) -> None:
    from lab.bench import runner
    from lab.bench.cases import BENCHES
    from lab.claims.ledger import ledger, part_hash
    from lab.experiments.profiles import profile

    if arguments.name not in BENCHES:
        raise unknown("benchmark", arguments.name, BENCHES)
    bench, scale = BENCHES[arguments.name], profile(arguments.profile)
    stamps = {part.id: part_hash(part.entry(scale.name)) for part in ledger().values()}
    rows = runner.run(bench, scale, arguments.device, arguments.restarts, arguments.only, stamps)
    print(runner.report(bench, scale, rows))


def claims_(arguments) -> int | None:
    from lab.experiments.profiles import profile
    from lab.report import judgements, tables

    p = profile(arguments.profile)
    if arguments.pilot:
        from lab.claims import evidence
        from lab.paths import REFERENCE

        said, same = evidence.recomputed_text(evidence.Archived(REFERENCE / "pilot", profile("study")))
        print(said)
        return 0 if same else 1
    print(tables.claims_text(p, judgements.verdicts(p)))


def export_(arguments) -> None:
    from lab.runs.store import export_runs

    print(f"{export_runs(arguments.file)} runs written to {arguments.file}")


def import_(arguments) -> None:
    from lab.runs.store import import_runs

    new, known = import_runs(arguments.file)
    print(f"{new} runs imported, {known} were there already")


if __name__ == "__main__":
    sys.exit(main())
