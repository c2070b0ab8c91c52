"""The command line: `python -m lab --help`. Heavy imports happen inside the commands, so that help is quick.

Names that a user gives (a profile, notebooks, parts of claims) become objects here, once; everything else receives those.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import lab
from vitlib.__main__ import Parser, shield, whole
from vitlib.errors import UsageError, unknown
from vitlib.files import check_target, write_figure


def main(words: list[str] | None = None) -> int:
    """Run one command; its exit code. A mistake in what was asked for is one sentence and 2."""
    try:
        arguments = parser().parse_args(words)
        look_up(arguments)
        arguments.command(arguments)
        return 0
    except KeyboardInterrupt:  # Ctrl-C, or SIGTERM
        print(file=sys.stderr)
        code, said = 130, "stopped; finished runs are kept, and the same command goes on with the rest"
    except UsageError as fault:
        code, said = 2, fault
    except OSError as fault:  # a folder that cannot be written, a full disk
        named = f" ({fault.filename})" if fault.filename else ""
        code, said = 1, f"{fault.strerror or fault}{named}; finished runs are kept"
    except RuntimeError as fault:  # a run or a notebook that failed: what and where
        if not type(fault).__module__.startswith(("vitlib", "lab")):
            raise
        code, said = 1, fault
    print(f"lab: {said}", file=sys.stderr)
    return code


SLURM = ("partition", "gpus", "nodes", "cpus", "memory_gb", "hours")  # what is said of its jobs


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="python -m lab", description=(lab.__doc__ or "lab").splitlines()[0])
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, function, text: str, profile: str | None = None) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=function)
        if profile:
            scales = "smoke, cpu, study, photos, imagenet or public (default: %(default)s)"
            command.add_argument("--profile", default=profile, help=scales)
        return command

    add("check", check, "is the installation whole: torch and torchvision of one family, data undamaged")
    plan = add("plan", plan_, "runs, time, memory and disk of a profile, before anything starts", "cpu")
    run = add("run", run_, "train what is missing, without rendering notebooks", "cpu")
    reproduce = add("reproduce", reproduce_, "train what is missing and render the notebooks", "cpu")
    tune = add("tune", tune_, "search every arm's learning rate on validation images", "study")
    bench = add("bench", bench_, "time and count one of the comparisons: ratios, spread, operations", "cpu")
    claims = add("claims", claims_, "the claims table of a profile, from finished runs", "cpu")
    show = add("show", show_, "the committed answer to a claim, a part or a notebook; needs no torch")
    export = add("export", export_, "write the finished runs to a runs.jsonl (metrics, no weights)")
    merge = add("import", import_, "merge a runs.jsonl into the run store")
    repeated = {"action": "append", "default": []}
    for command in (plan, run, reproduce):
        command.add_argument("--notebook", **repeated, help="only this one, e.g. 31; may be repeated")
    for command in (plan, run, reproduce, tune):
        command.add_argument("--jobs", type=whole(0), default=0, help="training processes at once (0: one per core)")
    for command in (plan, run):
        command.add_argument("--part", **repeated, help="only what this part of a claim reads, e.g. H4-linear")
    devices = "a100, h100, h200, l4, l40s, rtx3090, rtx4090, t4, v100"
    plan.add_argument("--device", default="", help=f"GPU-hours on this device instead: {devices}")
    plan.add_argument("--gpus", type=whole(1), help="GPUs that share each run (default: 1)")
    plan.add_argument("--rate", type=float, help="TFLOP/s of training; else measured, else 35 %% of the maker's peak")
    run.add_argument("--processes", type=whole(1), default=1, help="that share each run, one per GPU, through torchrun")
    run.add_argument("--slurm", metavar="FOLDER", help="submit one job per run to SLURM; its scripts and logs go there")
    run.add_argument("--partition", help="of SLURM (default: the cluster's own)")
    run.add_argument("--gpus", type=whole(0), help="of each machine of a SLURM job (default: 1)")
    run.add_argument("--nodes", type=whole(1), help="machines of a SLURM job (default: 1)")
    run.add_argument("--cpus", type=whole(1), help="CPU cores of each process of a SLURM job (default: 16)")
    run.add_argument("--memory-gb", type=whole(1), help="of each machine of a SLURM job (default: 60)")
    run.add_argument("--hours", type=float, help="time limit of a SLURM job (default: 24)")
    reproduce.add_argument("--finished", action="store_true", help="train nothing: render what there is")
    reproduce.add_argument("--set", **repeated, metavar="NAME=VALUE", help="a notebook parameter")
    tune.add_argument("--rate", **repeated, metavar="ARM", help="only the rate of this arm; may be repeated")
    bench.add_argument("name", help="branches (Table 4) or finetune (a step of each strategy)")
    bench.add_argument("--device", default="", help="cpu or cuda (default: cuda where there is a GPU)")
    bench.add_argument("--restarts", type=whole(0), default=0, help="processes per case (0: each case's own number)")
    bench.add_argument("--only", default="", metavar="TEXT", help="the cases whose name contains this")
    claims.add_argument("part", nargs="?", help="only this part, e.g. F1")
    claims.add_argument("--committed", action="store_true", help="of the committed study, not of the runs in the store")
    claims.add_argument("--margin", type=float, help="every label at this margin too, in points")
    claims.add_argument("--trace", action="store_true", help="from the part's verdict to its runs")
    show.add_argument("name", nargs="?", default="", help="e.g. F1, F2-full or 41 (default: everything)")
    show.add_argument("--study", default="study", help="study, photos, imagenet or public (default: %(default)s)")
    show.add_argument("--figure", type=Path, metavar="FILE", help="draw it too, as .png or .svg")
    for command in (export, merge):
        command.add_argument("file", type=Path)
    return top


def look_up(arguments: argparse.Namespace) -> None:
    """Put the profile and the notebooks in the place of their names, the cheapest look-up first."""
    for needed, words in (("slurm", SLURM), ("device", ("gpus", "rate"))):  # options of run, of plan
        given = [word for word in words if getattr(arguments, word, None) is not None]
        if given and getattr(arguments, needed, "-") in (None, ""):
            raise UsageError(f"--{given[0].replace('_', '-')} says nothing without --{needed}: give both or neither")
    if arguments.command is run_ and arguments.slurm and (arguments.processes, arguments.jobs) != (1, 0):
        raise UsageError("--processes and --jobs are of this machine: SLURM jobs have --gpus and --nodes")
    if arguments.command is claims_ and (arguments.margin is not None if arguments.part else arguments.trace):
        raise UsageError("--trace is of one part, --margin of all: name a part for the first, none for the second")
    if "profile" in arguments:
        from lab.experiments.profiles import profile

        arguments.profile = profile(arguments.profile)
    if "notebook" in arguments:
        from lab.experiments.catalogue import NOTEBOOKS, notebook

        arguments.notebook = [notebook(name) for name in arguments.notebook] or list(NOTEBOOKS)


def check(_) -> None:
    """Raises UsageError with one sentence for a broken pair of torch and torchvision, or for damaged data."""
    from vitlib.__main__ import check

    check()
    from lab.data.cards import SPLITS, load, names

    for name in names():
        counts = [f"{split} {len(load(name, split)):,}" for split in SPLITS]
        print(f"data set {name}: {', '.join(counts)} images, as its card says")


def _specs(arguments) -> list:
    from lab.claims.evidence import part_specs, queue
    from lab.claims.ledger import ledger

    if parts := [ledger().part(name) for name in getattr(arguments, "part", ())]:
        return part_specs(parts, arguments.profile)
    return queue(arguments.profile, arguments.notebook)


def plan_(arguments) -> None:
    from lab.cost import plan
    from lab.runs import store

    specs, a = _specs(arguments), arguments
    if a.device:
        print(plan.gpu_text(store.missing(specs), a.device, a.rate, a.gpus or 1))
    else:
        print(plan.cpu_text(specs, a.jobs))


def run_(arguments) -> None:
    from lab.claims.ledger import stamps as stamps_of
    from lab.cost.plan import cpu_seconds
    from lab.runs import store
    from lab.runs.launch import distributed, launch, submit

    specs, stamps = _specs(arguments), stamps_of(arguments.profile.name)
    if arguments.slurm:
        sizes = {word: value for word in SLURM if (value := getattr(arguments, word)) is not None}
        jobs = submit(specs, arguments.slurm, **sizes, stamps=stamps)
        print(f"{len(jobs)} jobs submitted; each goes on from its run's last checkpoint if it is stopped")
    elif arguments.processes > 1:
        for spec in store.missing(specs):
            print(spec.describe(), flush=True)
            distributed(spec, arguments.processes, stamps=stamps)
    else:
        launch(specs, arguments.jobs, cpu_seconds, stamps)


def tune_(arguments) -> None:
    from lab.claims import tuning
    from lab.cost import plan
    from lab.report import tables
    from lab.runs.launch import launch

    p = arguments.profile
    wanted = tuning.searches(p, arguments.rate)
    while specs := tuning.missing(p, wanted):
        print(plan.cpu_text(specs, arguments.jobs), flush=True)
        launch(specs, arguments.jobs, plan.cpu_seconds)
    if not arguments.rate or "full" in arguments.rate:  # how many steps the control of Thing 2 leaves out
        launch([spec for specs in tuning.control(p).values() for spec in specs], arguments.jobs, plan.cpu_seconds)
    print(tables.tuning_text(p, wanted))


def reproduce_(arguments) -> None:
    from lab.experiments.catalogue import available, meant_for
    from lab.report import render

    p, asked = arguments.profile, arguments.notebook
    mine = meant_for(p, asked) or asked
    if others := [one.number for one in asked if one not in mine]:
        print(f"lab: notebooks without runs at profile {p.name}: {', '.join(others)}", file=sys.stderr)
    arguments.notebook, absent = available(p, mine)
    for fault in absent:  # the other notebooks still run
        print(f"lab: {fault}", file=sys.stderr)
    if arguments.notebook:
        specs = _specs(arguments)
        render.reproduce(p, arguments.notebook, specs, arguments.jobs, arguments.set, not arguments.finished)
    if absent:
        raise UsageError(f"a part of profile {p.name} could not be run, see above")


def bench_(arguments) -> None:
    from lab.bench import runner
    from lab.bench.cases import BENCHES
    from lab.claims.ledger import ledger

    if arguments.name not in BENCHES:
        raise unknown("benchmark", arguments.name, BENCHES)
    bench, p = BENCHES[arguments.name], arguments.profile
    stamps = ledger().stamps(p.name)
    rows = runner.run(bench, p, arguments.device, arguments.restarts, arguments.only, stamps)
    print(runner.report(bench, p, rows))


def claims_(arguments) -> None:
    from lab.claims import evidence, judge
    from lab.paths import REFERENCE
    from lab.report import answer, tables

    p = arguments.profile
    if arguments.committed and not (REFERENCE / p.name / "runs.jsonl").is_file():
        raise UsageError(f"there is no committed study of profile {p.name}")
    source = evidence.committed(p.name) if arguments.committed else evidence.Stored(p)
    part = source.ledger.part(arguments.part) if arguments.part else None
    every = evidence.verdicts(source, evidence.reference())
    if part:
        row = next(row for row in judge.verdict_table(every).itertuples() if row.part == part.id)
        print(f"{part.title}\n{row.part}: {answer.label(row)}{answer.details(row)}\n{row.says or row.note}")
        if arguments.trace:
            there = p.name in part.n or part.kind == "exact"
            fixed = source.ledger.hash(part, p.name) if there else f"none at profile {p.name}"
            print(f"\nmargin {row.margin}, checks: {row.checks}\nledger entry {fixed}\n")
            print(evidence.trace(source, part).to_markdown(index=False, tablefmt="simple", disable_numparse=True))
    elif arguments.margin is not None:
        moved = judge.moved(every, (arguments.margin, *judge.MARGINS))
        print(moved.to_markdown(index=False, tablefmt="simple", floatfmt=".2f"))
    else:
        if not arguments.committed:
            tables.save_claims(p.name, every)
        print(tables.claims_text(p.name, every))


def show_(arguments) -> None:
    from lab.report import answer

    if arguments.figure:
        check_target(arguments.figure, (".png", ".svg"))
    rows = answer.chosen(arguments.name, arguments.study)
    print(f"{answer.plain(rows)}\n\n{answer.where(arguments.study)}")
    if arguments.figure and (drawn := answer.figure(rows, answer.where(arguments.study))) is not None:
        write_figure(arguments.figure, drawn, dpi=200)
        print(f"figure: {arguments.figure}")


def export_(arguments) -> None:
    from lab.runs import store

    print(f"{store.export_runs(arguments.file)} runs written to {arguments.file}")


def import_(arguments) -> None:
    from lab.runs import store

    print("{} runs imported, {} were there already".format(*store.import_runs(arguments.file)))


if __name__ == "__main__":
    from lab.runs.processes import end_cleanly

    end_cleanly()
    shield()
    sys.exit(main())
