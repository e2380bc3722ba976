"""Command line of ``python -m tal_fast.experiment``; torch is imported after the options are parsed."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tal_fast.config.typed import one_line
from tal_fast.experiments.launch import CLUSTERS, launch
from tal_fast.utils.arguments import ArgumentParser, at_least
from tal_fast.utils.io import write_text
from tal_fast.utils.logs import console_logging, duration
from tal_fast.utils.process import program_name, report_mistake
from tal_fast.utils.signals import Stopped, StopRequest

if TYPE_CHECKING:
    from tal_fast.experiments.folder import Folder
    from tal_fast.experiments.plan import Experiment


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns 0 if every job is done, 1 if runs are missing, 2 for bad input, named in one sentence, and 75 or 130 if
    SIGTERM or Ctrl-C stopped it after the jobs were saved.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.nproc is not None and args.export_sweep is None:
        parser.error("--nproc goes with --export-sweep; leave it out")
    if args.resources and args.launcher == "local":
        parser.error("--resources go with --launcher slurm or submitit-local; leave them out")
    if args.select is not None and args.only is not None:
        parser.error("--only writes no tables to --select from; leave one of them out")
    try:
        return _run(args)
    except (ValueError, OSError) as error:
        return report_mistake(error)
    except KeyboardInterrupt:
        return 130


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=program_name("experiment"),
        description="Train and evaluate methods over grids and seeds, and compare them; see docs/experiments.md.",
    )
    parser.add_argument("file", metavar="FILE", help="YAML file of the experiment.")
    jobs = parser.add_argument_group("jobs")
    jobs.add_argument(
        "--output", metavar="DIR", help="Folder of the runs, results and tables. Default: runs/ and the file's name.",
    )  # fmt: skip
    jobs.add_argument(
        "--jobs", type=at_least(1), metavar="N",
        help="Jobs that run at the same time. Default: one for each GPU; on the CPU, as many as the cores allow.",
    )  # fmt: skip
    jobs.add_argument(
        "--launcher", choices=["local", *CLUSTERS], default="local",
        help="Where the jobs run: on this machine, or as a job array of a Slurm cluster, through submitit; "
        "submitit-local does the latter on this machine. Default: local.",
    )  # fmt: skip
    jobs.add_argument(
        "--resources", nargs="+", default=[], metavar="NAME=VALUE",
        help="Parameters of submitit for each job, such as timeout_min=600 gpus_per_node=1 slurm_partition=gpu.",
    )  # fmt: skip
    which = jobs.add_mutually_exclusive_group()
    which.add_argument("--only", nargs="+", metavar="JOB", help="Run only these jobs, by name or hash; no tables.")
    which.add_argument("--failed", action="store_true", help="Run only the jobs that failed.")
    results = parser.add_argument_group("results")
    results.add_argument(
        "--select", nargs="+", metavar="METRIC",
        help="Choose each method's best grid point by these metrics, such as old_fd.aurc new_fd.aurc, and write "
        "selected.yaml.",
    )  # fmt: skip
    instead_group = parser.add_argument_group("instead of running the jobs (one of these)")
    instead = instead_group.add_mutually_exclusive_group()
    instead.add_argument(
        "--status", "--dry-run", action="store_true", dest="status",
        help="List the jobs with their hashes, what is left to do for each, and the time spent so far.",
    )  # fmt: skip
    instead.add_argument(
        "--table-only", action="store_true", help="Write the tables from the runs that are there, or from results.json."
    )
    instead.add_argument(
        "--bench", action="store_true",
        help="Measure a few steps of each method on this machine and print the expected hours. Data that are missing "
        "are replaced by synthetic images of their size.",
    )  # fmt: skip
    instead.add_argument("--export-sweep", metavar="YAML", help="Write a Weights & Biases sweep of the same jobs.")
    instead_group.add_argument(
        "--nproc", type=at_least(1), metavar="N",
        help="With --export-sweep: processes of each run, started by torchrun. Default: one, without torchrun.",
    )  # fmt: skip
    return parser


def _run(args: argparse.Namespace) -> int:
    from tal_fast.experiments.parse import check_selection, read_experiment
    from tal_fast.experiments.plan import SelectOptions
    from tal_fast.experiments.scheduler import Scheduler, chosen, job_folders, slots

    experiment = read_experiment(args.file)
    if args.select is not None:
        select = dataclasses.replace(experiment.select or SelectOptions(), metrics=args.select)
        check_selection(select)
        experiment = dataclasses.replace(experiment, select=select)
    if args.export_sweep is not None:
        from tal_fast.experiments.sweep import write_sweep

        for file in write_sweep(experiment, Path(args.export_sweep), args.nproc):
            print(file)
        return 0
    if args.bench:
        from tal_fast.experiments.bench import print_expected_hours

        return print_expected_hours(experiment, len(slots(experiment, args.jobs)))
    output = Path(args.output if args.output is not None else Path("runs") / Path(args.file).stem)
    folders = job_folders(experiment, output)
    folders = chosen(folders, args.only, args.failed)
    for folder in folders:
        folder.check()
    left = [] if args.table_only else [folder for folder in folders if not folder.is_done(experiment.evaluate)]
    if args.status:
        _print_status(experiment, folders)
    _check_inputs(experiment, left)
    if args.status:
        return 0
    if args.launcher != "local":
        words = [str(Path(args.file).resolve()), "--output", str(output.resolve()), "--jobs", "1"]
        with console_logging():
            # Slurm's array has a limit of its own; see ``_resources``.
            at_once = None if args.launcher == "slurm" else len(slots(experiment, args.jobs))
            launch(left, words, output, args.launcher, _resources(args), at_once)
    elif not args.table_only:
        with console_logging(), StopRequest() as stop:
            stop.training = True  # the first Ctrl-C asks the jobs to save, too
            Scheduler(experiment, folders, slots(experiment, args.jobs)).run(stop)
        if stop.number:
            return Stopped(stop.number, "").exit_code
    if args.only is not None:
        return 0 if all(folder.is_done(experiment.evaluate) for folder in folders) else 1
    return _report(experiment, output, Path(args.file).stem)


def _check_inputs(experiment: Experiment, folders: Sequence[Folder]) -> None:
    """Raise ValueError if a job's data, a set that it is evaluated on, or your own code for it cannot be read."""
    from tal_fast.evaluation.command import options_of
    from tal_fast.evaluation.own_scores import load_own
    from tal_fast.evaluation.sources import check_sets
    from tal_fast.experiments.parse import check_settings

    if folders:
        options = options_of(experiment.evaluation)
        load_own(options.scores, options.metrics)
    for data in {repr(folder.job.config.data): folder.job.config.data for folder in folders}.values():
        sets = check_sets(data, experiment.evaluation.ood, experiment.evaluation.shift)
        if experiment.select is not None:
            check_settings(experiment.select, *sets)


def _resources(args: argparse.Namespace) -> dict[str, Any]:
    """Parameters of submitit's executor from ``--resources`` and ``--jobs``; raises ValueError for other words."""
    resources: dict[str, Any] = {}
    for word in args.resources:
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"--resources {word}: must be NAME=VALUE, such as timeout_min=600")
        try:
            resources[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--resources {word}: {one_line(error)}") from None
    if args.jobs is not None and args.launcher == "slurm":
        resources.setdefault("slurm_array_parallelism", args.jobs)
    return resources


def _print_status(experiment: Experiment, folders: Sequence[Folder]) -> None:
    """Print a line for each job, and how many are done at which cost."""
    states = [folder.status(experiment.evaluate) for folder in folders]
    width = max((len(str(folder.path)) for folder in folders), default=0)
    for folder, (state, seconds) in zip(folders, states, strict=True):
        attempts = len(folder.record()["attempts"])
        spent = f" ({duration(seconds)}, {attempts} stages started)" if attempts else ""
        print(f"{folder.job.id}  {folder.path!s:{width}}  {state}{spent}")
    done = sum(state == "done" for state, _ in states)
    print(f"{done} of {len(folders)} done; {duration(sum(seconds for _, seconds in states))} so far")


def _report(experiment: Experiment, output: Path, name: str) -> int:
    """Write and print results and tables; returns 1 if runs are missing."""
    from tal_fast.evaluation.report import write_report
    from tal_fast.experiments import results, select, table
    from tal_fast.experiments.scheduler import job_folders

    folders = job_folders(experiment, output)
    if any(folder.path.is_dir() for folder in folders):
        collected = results.collect(experiment, folders, name)
        results.check_complete(collected, output)
        write_report(collected, output / results.FILE)
    # Read back, so that tables from runs and from a committed file are the same.
    found = results.read_results(output)
    results.check_options(found, experiment)
    for style, file in table.FILES.items():
        write_text(output / file, table.format_results(found, style) + "\n")
    print(f"\n{table.format_results(found, 'summary')}")
    files = [results.FILE, *table.FILES.values(), "runs/*/report.html"]
    print("\n" + "\n".join(str(output / file) for file in files))
    if experiment.select is not None:
        points = select.candidates(experiment, found, experiment.select)
        print(f"\n{select.format_selection(points, experiment, experiment.select)}")
        if select.write_selection(points, experiment, experiment.select, output):
            print(output / select.FILE)
    return 1 if found["missing"] else 0
