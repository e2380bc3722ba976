"""The result of an evaluation, from which every file and table is written."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tal_fast.data.datasets import Split
from tal_fast.evaluation.report import FILE as REPORT_FILE
from tal_fast.evaluation.report import EvaluationOptions, Report, make_report, read_report, write_report
from tal_fast.evaluation.sample_scores import FILE as SAMPLES_FILE
from tal_fast.evaluation.sample_scores import Samples, read_samples, write_samples
from tal_fast.evaluation.train_typicalness import TrainTypicalness
from tal_fast.metrics.curves import OperatingPoints
from tal_fast.metrics.settings import Mix, ScoredSetting
from tal_fast.utils.arrays import Ints

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gallery:
    """Images chosen for display."""

    kind: str  # ``mistakes``, ``correct``, ``ood``, ``least_typical`` or ``most_typical``
    split: str  # split the images are from: ``val``, an OOD set or ``train-eval``
    chosen: Ints  # (k,) int64, places in the split's predictions (of training images: in the split), in display order


@dataclass(frozen=True)
class GalleryImages:
    """Data set that the pixels of gallery images are read from."""

    splits: Mapping[str, Split]  # images by split: ``val``, OOD sets and ``train-eval``
    class_names: Sequence[str]  # a name for each label
    channels: int  # 1 or 3, as the model reads image files


@dataclass(frozen=True)
class Evaluation:
    """Results of an evaluation, from which reports and pages are rendered without further computation."""

    report: Report  # metrics, intervals, differences and provenance, as in ``report.json``
    samples: Samples  # scores and predictions of every sample, as in ``samples.npz``
    settings: Mapping[str, ScoredSetting]  # setting -> which samples take part and their scores
    galleries: tuple[Gallery, ...] = ()  # chosen images
    # Data set that the pixels of the chosen images are read from; None if it is not available.
    images: GalleryImages | None = None
    typicalness: TrainTypicalness | None = None  # typicalness of the training images; None if it was not measured
    notes: tuple[str, ...] = ()  # why galleries are missing, one sentence each

    @cached_property
    def operating_points(self) -> dict[str, dict[str, OperatingPoints]]:
        """Setting -> score -> its risk-coverage curve and operating points."""
        return {
            key: {
                score: OperatingPoints(values, judged.setting.success) for score, values in judged.confidences().items()
            }
            for key, judged in self.settings.items()
        }

    @property
    def primary_score(self) -> str:
        """Score that the model is judged by: its method's own, else the first."""
        scores = list(self.samples.id_scores)
        score = self.report.get("score")
        return score if score in scores else scores[0]


def evaluate_samples(
    samples: Samples, options: EvaluationOptions | None = None, baseline: str | None = None
) -> Evaluation:
    """Evaluate the scores of samples; arguments as for ``tal_fast.evaluation.report.make_report``."""
    options = options or EvaluationOptions()
    settings = samples.settings(options.mix, options.seed)
    return Evaluation(make_report(samples, settings, options, baseline), samples, settings)


def write_evaluation(evaluation: Evaluation, folder: str | Path) -> None:
    """Write ``samples.npz`` and ``report.json``, which names its hash; the folder is created if needed."""
    digest = write_samples(evaluation.samples, Path(folder) / SAMPLES_FILE)
    write_report({**evaluation.report, "samples_sha256": digest}, Path(folder) / REPORT_FILE)


def read_evaluation(folder: str | Path) -> Evaluation:
    """Read an evaluation, without galleries, from the ``report.json`` and ``samples.npz`` in a folder."""
    folder = Path(folder)
    report, samples = read_report(folder), read_samples(folder)
    if samples is None:
        raise ValueError(f"there is no {folder / SAMPLES_FILE}; evaluate again to have it")
    if not same_evaluation(report, samples):
        raise ValueError(f"{REPORT_FILE} and {SAMPLES_FILE} in {folder} are of different evaluations; evaluate again")
    return Evaluation(report, samples, samples.settings(Mix.parse(report["mix"]), report["seed"]))


def samples_of(path: str | Path, report: Report) -> Samples | None:
    """Samples beside a report at ``path``; None if there are none or, with a warning, if they are another's."""
    samples = read_samples(path)
    if samples is None or same_evaluation(report, samples):
        return samples
    logger.warning(
        "%s beside the report of %s is of another evaluation and is not used; evaluate again", SAMPLES_FILE, path
    )
    return None


def same_evaluation(report: Report, samples: Samples) -> bool:
    """Whether a report and the samples that were read from the file beside it are of one evaluation."""
    if "samples_sha256" in report:
        return bool(report["samples_sha256"] == samples.digest)
    counts = report["counts"]  # reports of version 0.2.0 do not name their samples
    predictions = {name: len(split) for name, split in samples.predictions.items()}
    return (
        (counts["id"], counts["id_right"]) == (len(samples.correct), int(samples.correct.sum()))
        and predictions == {"val": counts["id"], **counts["ood"]}
        and list(samples.ood_scores) == report["ood_names"]
        and {name: len(correct) for name, (correct, _) in samples.shifts.items()} == counts.get("shift", {})
        and list(report["settings"]["old_fd"]) == list(samples.id_scores)
    )
