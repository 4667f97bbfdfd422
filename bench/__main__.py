"""python -m bench: list | run | tune | profile-step | processes | work | scaling | compare | ...; see bench/README.md.

python -m bench run [GROUP ...] --out FILE [--device cuda] [--peers auto] [--quick] [--budget 600] [--resume]
python -m bench tune [KERNEL ...] --out FILE [--budget 240] [--resume]    the kernels' tiles and choices, on this device
python -m bench tune --write FILE ...           the table of them in the code, from such files
python -m bench profile-step --model docsum     every millisecond of a training step, and the engine's own share
python -m bench processes --out FILE          a step by two processes beside one
python -m bench work [--operators]             what a training step does, counted
python -m bench scaling                  what a step of several processes should cost: formulas, nothing measured
python -m bench compare BEFORE.json AFTER.json [--tolerance 0.05]
python -m bench ceilings --out FILE      only what the machine can do
python -m bench table FILE               the tables of a result file, in Markdown
python -m bench targets FILE ...         which targets are met
python -m bench plot FILE                charts beside it
python -m bench collect OUTDIR           what bench/gpu.sh left, into bench/results, README.md and docs/
python -m bench readme [--check]         the figures in README.md and docs/, from bench/results
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.cases import GROUPS, SIZES


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    commands = top.add_subparsers(dest="command", required=True)

    listing = commands.add_parser("list", help="groups, cases and peers, and why a peer is not there")
    run = commands.add_parser("run", help="measure")
    ceilings = commands.add_parser("ceilings", help="measure what the machine can do, and nothing else")
    for command in (listing, run):
        command.add_argument(
            "groups", nargs="*", metavar="GROUP", help=f"default: all of {', '.join(GROUPS)}"
        )
    for command in (listing, run, ceilings):
        add = command.add_argument
        add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
        add("--sizes", choices=SIZES, help="default: by the device; tiny is for tests")
        add("--peers", default="auto", help="comma-separated modules of bench/peers, or auto (all)")
    for command in (run, ceilings):
        add = command.add_argument
        add("--out", required=True, metavar="FILE", help="the result, written after every case")
        add("--resume", action="store_true", help="keep what FILE holds and measure the rest")
        add("--quick", action="store_true", help="the first case of each kind, few rounds")
        add("--cpus", help="cores to bind to, comma-separated; as many threads (default: as it is)")
        add("--threads", type=int, help="torch threads, where that is not the number of cores")
        add(
            "--flush",
            type=int,
            metavar="MIB",
            help="read this much before a call on a CPU (default: its cache)",
        )
        add("--seed", type=int, default=0)
    run.add_argument(
        "--budget", type=float, default=600.0, metavar="SECONDS", help="for a group (default %(default)s)"
    )
    run.add_argument("--only", metavar="TEXT", help="only cases whose id contains this")
    run.add_argument(
        "--backends", default="", help="further variants with these back-ends forced, comma-separated"
    )
    ceilings.set_defaults(groups=[], budget=0.0, only=None, backends="")

    tune = commands.add_parser(
        "tune", help="the kernels' tiles and the choices between kernels: measure, or write the table"
    )
    tune.add_argument("kernels", nargs="*", metavar="KERNEL", help="default: all")
    tune.add_argument("--out", metavar="FILE", help="the result, written after every trial")
    tune.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one; cpu is a rehearsal"
    )
    tune.add_argument("--sizes", choices=("gpu", "tiny"), help="default: by the device")
    tune.add_argument("--budget", type=float, default=240.0, metavar="SECONDS", help="default %(default)s")
    tune.add_argument("--resume", action="store_true", help="keep what FILE holds and measure the rest")
    tune.add_argument("--seed", type=int, default=0)
    tune.add_argument(
        "--write", nargs="+", metavar="FILE", help="make the table of these files' measurements"
    )
    tune.add_argument("--to", metavar="PATH", help="the table to write (default: the one in the code)")

    profile = commands.add_parser(
        "profile-step", help="every millisecond of a training step, and the engine's own share"
    )
    profile.add_argument("--model", default="docsum", help="of the group e2e (default %(default)s)")
    profile.add_argument("--objectives", type=int, choices=(1, 2), default=1)
    profile.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    profile.add_argument(
        "--steps",
        type=int,
        default=5,
        help="under the clock; at most two under the profiler (default %(default)s)",
    )
    profile.add_argument(
        "--cpus", help="cores to bind to, comma-separated; as many threads (default: as it is)"
    )
    profile.add_argument("--threads", type=int, help="torch threads, where that is not the number of cores")
    profile.add_argument("--out", metavar="FILE", help="the profile as JSON")
    profile.add_argument("--trace", metavar="FILE", help="keep the profiler's trace, for Perfetto")

    work = commands.add_parser(
        "work", help="what a step of a small model does, counted: FLOPs, launches, bytes, host reads"
    )
    work.add_argument("--operators", action="store_true", help="the commonest operators too")
    processes = commands.add_parser(
        "processes", help="a step by two processes of a core each, and by one of one core and of two"
    )
    processes.add_argument("--model", default="docsum", help="of the group e2e (default %(default)s)")
    processes.add_argument("--steps", type=int, default=10, help="of a run (default %(default)s)")
    processes.add_argument("--rounds", type=int, default=3, help="runs of each (default %(default)s)")
    processes.add_argument("--out", required=True, metavar="FILE", help="the result as JSON")
    commands.add_parser(
        "scaling", help="what a step of several processes should cost: formulas, nothing measured"
    )
    compare = commands.add_parser("compare", help="ratios of two result files; fails on a regression")
    compare.add_argument("before")
    compare.add_argument("after")
    compare.add_argument(
        "--tolerance", type=float, default=0.05, help="a slow-down that counts (default %(default)s)"
    )
    compare.add_argument("--all", action="store_true", help="judge the peers' variants too")

    table = commands.add_parser("table", help="the tables of a result file")
    table.add_argument("file")
    targets = commands.add_parser("targets", help="which targets the result files meet")
    targets.add_argument("files", nargs="+", metavar="FILE")
    plot = commands.add_parser("plot", help="charts of a result file (needs matplotlib)")
    plot.add_argument("file")
    plot.add_argument("--to", metavar="FOLDER", help="default: beside the file")
    collect = commands.add_parser(
        "collect", help="a GPU round's results into bench/results, and the figures made anew"
    )
    collect.add_argument("outdir", metavar="OUTDIR", help="what bench/gpu.sh wrote, or its all.tgz")
    collect.add_argument(
        "--to", metavar="FOLDER", help="default: bench/results; its README.md and docs/ are ../..'s"
    )
    collect.add_argument("--dirty", action="store_true", help="accept a tree that differed from its commit")
    readme = commands.add_parser(
        "readme", help="bring the figures of README.md and docs/ up to date with bench/results"
    )
    readme.add_argument(
        "--check", action="store_true", help="change nothing; fail where it is not up to date"
    )
    return top


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.command in ("list", "run", "ceilings"):
        for name in options.groups:
            if name not in GROUPS:
                raise SystemExit(f"unknown group {name!r}; known: {', '.join(GROUPS)}")
        if options.command != "ceilings":
            options.groups = options.groups or list(GROUPS)
        from bench import suite

        return suite.show(options) if options.command == "list" else suite.run(options)
    if options.command == "tune":
        if bool(options.out) == bool(options.write):
            raise SystemExit(
                "bench tune: expected --out FILE, to measure, or --write FILE ..., to make the table"
            )
        from bench.tuning import tune

        return tune.run(options)
    if options.command == "profile-step":
        from bench.step import profile

        return profile.main(options)
    if options.command == "processes":
        from bench.step import processes

        return processes.main(options)
    if options.command == "work":
        from bench.step import work

        print(work.report())
        if options.operators:
            print(work.operators("KL"))
        return 0
    if options.command == "scaling":
        from bench.step import scaling

        print(scaling.report())
        return 0
    if options.command == "compare":
        from bench.pages.compare import compare

        return compare(options.before, options.after, options.tolerance, options.all)
    if options.command == "collect":
        from bench.pages.collect import collect

        return collect(options.outdir, Path(options.to).resolve() if options.to else None, options.dirty)
    if options.command == "readme":
        from bench.pages.readme import update

        return update(check=options.check)
    from bench.core import schema
    from bench.pages import report

    if options.command == "plot":
        from bench.pages.plot import plot

        print("\n".join(map(str, plot(options.file, options.to))))
    elif options.command == "table":
        print(report.tables(schema.load(options.file)))
    else:
        cases = [case for file in options.files for case in schema.load(file).cases]
        print("\n".join(report.targets(cases)) or "no case bears on a target")
    return 0


if __name__ == "__main__":
    sys.exit(main())
