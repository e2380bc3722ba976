"""The command line of ``tal_fast.experiment``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from tal_fast.experiments.plan import Experiment, SelectOptions, check_selection, read_experiment
from tal_fast.experiments.scheduler import Scheduler, folders, slots
from tal_fast.utils.process import program_name
from tal_fast.utils.signals import Stopped, StopRequest


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program_name("experiment"),
        description="Train and evaluate methods over grids and seeds, and compare them; see docs/experiments.md.",
    )
    parser.add_argument("file", metavar="FILE", help="YAML of the experiment")
    parser.add_argument("--output", metavar="DIR", help="of runs, results and tables (runs/ and the file's name)")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at the same time (one a GPU, or as cores allow)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="only say what would be run, and what is done already")
    what.add_argument(
        "--table-only", action="store_true", help="run nothing; tables from the runs or from results.json"
    )
    what.add_argument("--export-sweep", metavar="YAML", help="write a sweep of Weights & Biases with the same jobs")
    parser.add_argument(
        "--select", nargs="+", metavar="METRIC", help="choose each method's best grid point by these, such as "
        "old_fd.aurc new_fd.aurc, and write selected.yaml",
    )  # fmt: skip
    parser.add_argument("--nproc", type=int, metavar="N", help="with --export-sweep: processes of each run (torchrun)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code.

    0: all is done; 1: runs are missing; 2: bad input, said in one sentence; 75 and 130: stopped by SIGTERM or Ctrl-C,
    the jobs are saved.
    """
    args = _parser().parse_args(argv)
    try:
        for option in ("jobs", "nproc"):
            value = getattr(args, option)
            if value is not None and value < 1:
                raise ValueError(f"--{option} must be at least 1, not {value}")
        if args.nproc is not None and args.export_sweep is None:
            raise ValueError("--nproc goes with --export-sweep; leave it out")
        experiment = read_experiment(args.file)
        if args.select is not None:
            select = dataclasses.replace(experiment.select or SelectOptions(), metrics=args.select)
            check_selection(select, experiment)
            experiment = dataclasses.replace(experiment, select=select)
        if args.export_sweep is not None:
            return _export(experiment, Path(args.export_sweep), args.nproc)
        output = Path(args.output if args.output is not None else Path("runs") / Path(args.file).stem)
        for folder in folders(experiment, output):
            folder.check()
        if args.dry_run:
            return _list(experiment, output)
        if not args.table_only:
            with StopRequest() as stop:
                stop.training = True  # the first Ctrl-C is a request too
                Scheduler(experiment, output, slots(experiment, args.jobs), _say).run(stop)
            if stop.number:
                return Stopped(stop.number, "").exit_code
        return _report(experiment, output, Path(args.file).stem)
    except (ValueError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _say(line: str) -> None:
    print(line, flush=True)


def _list(experiment: Experiment, output: Path) -> int:
    for folder in folders(experiment, output):
        done = folder.is_done(experiment.evaluate)
        state = "done" if done else "to evaluate" if folder.is_trained() else "to train"
        _say(f"{folder.path}: {state}")
    return 0


def _export(experiment: Experiment, path: Path, nproc: int | None) -> int:
    from tal_fast.experiments.sweep import write_sweep

    for file in write_sweep(experiment, path, nproc):
        _say(str(file))
    return 0


def _report(experiment: Experiment, output: Path, name: str) -> int:
    # Imported when there is something to report: they take seconds.
    from tal_fast.experiments import results as of_runs
    from tal_fast.experiments import select, table

    found = folders(experiment, output)
    if any(folder.path.is_dir() for folder in found):
        results = of_runs.collect(experiment, found, name)
        of_runs.refuse_to_lose(results, output)
        of_runs.write_results(results, output)
    # Read back, so that the table of runs is that of a committed file.
    results = of_runs.read_results(output)
    of_runs.check_options(results, experiment)
    table.write_tables(results, output)
    _say(f"\n{table.format_results(results, 'table')}")
    _say(f"\n{output / of_runs.FILE}, {', '.join(str(output / file) for file in table.FILES.values())}")
    if experiment.select is not None:
        points = select.candidates(experiment, results, experiment.select)
        select.write_selection(points, experiment, experiment.select, output)
        _say(f"\n{select.format_selection(points, experiment, experiment.select)}\n{output / select.FILE}")
    return 1 if results["missing"] else 0
