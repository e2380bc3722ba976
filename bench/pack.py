"""Finished runs of an experiment, without weights, as an archive a seed: ``python -m bench.pack NAME OUTPUT``.

NAME is an experiment of examples/experiments, OUTPUT the folder that ``python -m tal_fast.experiment`` wrote. The
archives go to bench/results/methods/NAME. Unpacked there, their runs count as done on any machine, so that rows and
seeds are added without training the others again::

    for archive in bench/results/methods/NAME/seed*.tar.xz; do tar -xJf $archive -C bench/results/methods/NAME; done
    python -m tal_fast.experiment examples/experiments/NAME.yaml --output bench/results/methods/NAME

A run keeps its configuration, its record, its metrics by epoch, its report, and of every sample whether it is
classified correctly and its rank among all by the score it is judged by, which is all that ranking metrics need.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tarfile
import tempfile
from pathlib import Path

import numpy as np

from bench.methods import EXPERIMENTS, RESULTS, ROOT
from tal_fast.config.parse import read_yaml
from tal_fast.config.schema import Config
from tal_fast.evaluation.report import read_report, write_report
from tal_fast.evaluation.sample_scores import FILE as SAMPLES
from tal_fast.evaluation.sample_scores import Samples, read_samples, write_samples
from tal_fast.experiments.folder import RECORD, REPORT, REQUESTED, Folder
from tal_fast.experiments.parse import read_experiment
from tal_fast.experiments.plan import from_here
from tal_fast.experiments.scheduler import job_folders
from tal_fast.runs.folder import CONFIG_FILE, METRICS_FILE


def copy_run(source: Folder, target: Path, options: tuple[str, ...], score: str | None = None) -> None:
    """Copy what an archive keeps of a finished run.

    Args:
        source: the run, done with the evaluation options ``options``.
        target: folder of the copy; the output that the files name becomes its path in the repository.
        options: see ``source``.
        score: that the experiment judges runs by; None: the method's own.
    """
    target.mkdir(parents=True)
    there = str(RESULTS.relative_to(ROOT) / target.parent.parent.name / "runs" / target.name)
    before = Config.from_dict(read_yaml(source.path / CONFIG_FILE)).flat()  # perhaps in another checkout
    now = from_here(source.job.config.flat()) | {"output": there}
    files = ("output", "method.name", "model.weights", "data.dataset")  # the last three may be files
    moved = {before[key]: now[key] for key in files if now[key] is not None}

    def here(text: str) -> str:
        for old, new in moved.items():
            text = text.replace(old, new)
        return text

    for name in (REQUESTED, RECORD, METRICS_FILE):
        (target / name).write_text(here((source.path / name).read_text()))
    report = json.loads(here(json.dumps(read_report(source.path))))
    samples = read_samples(source.path)
    assert samples is not None
    if samples.shifts:
        raise ValueError(f"{source.path} has shifted sets, whose scores an archive does not keep")
    digest = write_samples(by_rank(samples, score or report["score"]), target / SAMPLES)
    write_report({**report, "samples_sha256": digest}, target / REPORT)
    Folder(source.job, target).set_evaluated(options)


def by_rank(samples: Samples, score: str) -> Samples:
    """Samples with ranks in place of one score's values, equal for equal values, and without the rest."""
    parts = [samples.id_scores[score], *(scores[score] for scores in samples.ood_scores.values())]
    ranks = np.unique(np.concatenate(parts), return_inverse=True)[1].astype(np.uint32)
    id_ranks, *ood_ranks = np.split(ranks, np.cumsum([len(part) for part in parts])[:-1])
    ood_scores = {name: {score: values} for name, values in zip(samples.ood_scores, ood_ranks, strict=True)}
    return dataclasses.replace(samples, id_scores={score: id_ranks}, ood_scores=ood_scores, predictions={})


def pack(name: str, output: Path, results: Path = RESULTS) -> list[Path]:
    """Write the archives ``seedN.tar.xz`` of the finished runs of an experiment; returns their paths."""
    experiment = read_experiment(str(EXPERIMENTS / f"{name}.yaml"))
    done = [folder for folder in job_folders(experiment, output) if folder.is_done(experiment.evaluate)]
    archives = []
    with tempfile.TemporaryDirectory() as scratch:
        for folder in done:
            copy = Path(scratch) / name / "runs" / folder.job.name
            copy_run(folder, copy, experiment.evaluate, experiment.compare.score)
        for seed in sorted({folder.job.seed for folder in done}):
            archive = results / name / f"seed{seed}.tar.xz"
            archive.parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(archive, "w:xz", preset=9) as tar:
                for folder in done:
                    if folder.job.seed == seed:
                        run = f"runs/{folder.job.name}"
                        tar.add(Path(scratch) / name / run, run, filter=_plain)
            archives.append(archive)
    return archives


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without times and owners, which differ between machines."""
    member.mtime = member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("output", metavar="OUTPUT", type=Path)
    args = parser.parse_args()
    for archive in pack(args.name, args.output):
        print(archive.relative_to(ROOT), archive.stat().st_size)


if __name__ == "__main__":
    main()
