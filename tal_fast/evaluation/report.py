"""The failure-detection report: metrics of all scores in all settings, as written to ``report.json``.

All values are in natural units (fractions). In the file NaN is null, and ``undefined`` gives the reason.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import tal_fast
from tal_fast.config.names import DEFAULT_SCORES, FURTHER_METRICS, check_scores, is_own_metric
from tal_fast.evaluation.own_scores import add_own_metrics
from tal_fast.evaluation.sample_scores import Predictions, Samples
from tal_fast.evaluation.tables import setting_title
from tal_fast.metrics.failure import METRICS, aurc_floor, aurc_random, failure_metrics, undefined_reasons
from tal_fast.metrics.further import further_metrics, operating_point
from tal_fast.metrics.intervals import FEW, LEVEL, Evidence, evidence, interval
from tal_fast.metrics.joint import binned_joint_metrics, joint_metrics
from tal_fast.metrics.ranking import tied_share
from tal_fast.metrics.settings import Mix, ScoredSetting, means_of
from tal_fast.scores.features import KNN_SAMPLES
from tal_fast.utils.io import write_text

FILE = "report.json"
FORMAT = 1
_OTHER = r"(coverage@risk|risk@coverage)=(0?\.\d+|1)|ds=\w+\+\w+"
Report = dict[str, Any]


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of an evaluation."""

    scores: Sequence[str] = DEFAULT_SCORES  # names or groups of scores
    mix: Mix = field(default_factory=Mix)  # ratio of ID to OOD samples, see ``tal_fast.metrics.settings``
    seed: int = 0  # seed of a random mix, of held-out samples and of ``knn``'s training samples
    convention: str = "tal_fast"  # convention of the metrics, see ``tal_fast.metrics.failure``
    knn_samples: int | None = KNN_SAMPLES  # training features that ``knn`` compares with; None: all
    # Share of the validation samples that a temperature is fitted on. They take part in nothing else, and all other
    # logits are divided by the temperature. None: no temperature, and a share of 0.2 for the scores that need one.
    temperature: float | None = None
    choose_by: str = "new-fd"  # AURC that ``pnorm`` is chosen by: ``old-fd``, ``new-fd`` or ``new-fd=OOD-SET``
    metrics: Sequence[str] = ()  # further metrics, see ``docs/metrics.md#further-metrics``
    costs: Any = None  # (C, C) cost of each label (row) and prediction, for ``cost_aurc`` and ``cost_augrc``
    intervals: bool = False  # whether metrics and differences have confidence intervals

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", check_scores(self.scores))
        for metric in self.metrics:
            if not is_own_metric(metric) and not re.fullmatch(rf"{'|'.join(FURTHER_METRICS)}|{_OTHER}", metric):
                known = f"{', '.join(FURTHER_METRICS)}, coverage@risk=0.05, risk@coverage=0.8, ds=msp+energy"
                raise ValueError(f"unknown metric {metric!r}; use {known}, with shares in (0, 1], or FILE.py:FUNCTION")
        if self.costs is None and any(metric.startswith("cost_") for metric in self.metrics):
            raise ValueError("cost_aurc and cost_augrc need a matrix of costs; name its file with --costs")
        if self.choose_by != "old-fd" and self.choose_by.partition("=")[0] != "new-fd":
            raise ValueError(f"pnorm is chosen by old-fd, new-fd or new-fd=OOD-SET, not by {self.choose_by!r}")
        if self.choose_by != "new-fd" and "pnorm" not in self.scores:
            raise ValueError(
                f"choosing by {self.choose_by} is for pnorm, which is not among the scores; add it to them"
            )


def make_report(
    samples: Samples, settings: Mapping[str, ScoredSetting], options: EvaluationOptions, baseline: str | None = None
) -> Report:
    """Compute all metrics of all scores in all settings.

    Args:
        samples: scores of every sample.
        settings: settings of these samples, from ``Samples.settings`` with the same options.
        options: mix, seed, convention and intervals; the other options have no influence.
        baseline: score that paired differences are taken to; default the first.

    Returns:
        ``settings[key][score][metric]`` with the keys ``old_fd``, ``ood``, ``new_fd`` and ``shift``. With several OOD
        sets there are ``ood/NAME`` and ``new_fd/NAME`` for each, and ``ood`` and ``new_fd`` are their plain mean;
        likewise ``shift/NAME`` and ``shift`` with several shifted sets. Also, by setting: ``samples``, ``aurc_floor``,
        ``aurc_random``, ``undefined`` (metric -> reason) and ``tied_share`` (score -> share). ``counts`` are of all
        samples, before the mix. With intervals, ``intervals[key][score][metric]`` = [low, high] and
        ``differences[key][score][metric]`` = [score − baseline, low, high];
        ``bootstrap`` says how, and under ``few`` where errors or successes are too few to rely on them.
    """
    correct = samples.correct
    ood_sizes = {name: len(next(iter(scores.values()))) for name, scores in samples.ood_scores.items()}
    shift_sizes = {name: len(shift_correct) for name, (shift_correct, _) in samples.shifts.items()}
    report: Report = {
        "format": FORMAT,
        "id_accuracy": float(np.mean(correct)) if len(correct) else math.nan,
        "convention": options.convention,
        "mix": str(options.mix),
        "seed": options.seed,
        "ood_names": list(ood_sizes),
        "shift_names": list(shift_sizes),
        "counts": {"id": len(correct), "id_right": int(np.sum(correct)), "ood": ood_sizes, "shift": shift_sizes},
        "samples": {},
        "settings": {},
        "aurc_floor": {},
        "aurc_random": {},
        "undefined": {},
        "tied_share": {},
        "versions": {"tal_fast": tal_fast.__version__, "numpy": np.__version__},
    }
    for key, judged in settings.items():
        _add_setting(report, key, judged)
    for mean in dict.fromkeys(mean for key in settings for mean in means_of(key)):
        _add_mean(report, mean, [key for key in settings if mean in means_of(key)])
    if options.metrics:
        # Not of ``ood``, in which wrong predictions are successes.
        known = samples.predictions.get("val")  # labels of OOD samples are unknown
        report["further"] = {
            key: _further(judged, options, known if key == "old_fd" else None)
            for key, judged in settings.items()
            if not key.startswith("ood")
        }
        add_own_metrics(report, settings, options.metrics)
    if options.intervals:
        baseline = baseline or next(iter(samples.id_scores))
        report["bootstrap"] = {
            "level": LEVEL, "baseline": baseline, "few": {},
            "method": "Student's t from the influence of each sample, without resampling; differences paired",
        }  # fmt: skip
        report["intervals"], report["differences"] = {}, {}
        origin = evidence(settings, baseline, options.convention)
        for score in samples.id_scores:
            found = origin if score == baseline else evidence(settings, score, options.convention)
            _add_intervals(report, score, found, origin)
    return report


def _add_setting(report: Report, key: str, judged: ScoredSetting) -> None:
    setting, scores, convention = judged.setting, judged.confidences(), report["convention"]
    n, errors = setting.success.size, int(setting.success.size - setting.success.sum())
    report["settings"][key] = {s: failure_metrics(values, setting.success, convention) for s, values in scores.items()}
    report["samples"][key] = {"n": n, "id": setting.id_index.size, "ood": setting.ood_index.size, "errors": errors}
    report["aurc_floor"][key] = aurc_floor(n, errors)
    report["aurc_random"][key] = aurc_random(n, errors)
    report["undefined"][key] = undefined_reasons(setting.success, convention)
    report["tied_share"][key] = {score: tied_share(values) for score, values in scores.items()}


def _further(judged: ScoredSetting, options: EvaluationOptions, known: Predictions | None) -> dict[str, Any]:
    """Further metrics of a setting, by score, or with OOD samples by two scores as ``S_ID+S_OOD``.

    ``known`` are the labels and predictions of its samples, without which nothing is balanced or has a cost.
    """
    metrics, labels, loss = options.metrics, None, None
    if known is not None:
        labels, costs = known.label, options.costs
        if costs is not None:
            classes = int(max(labels.max(initial=-1), known.prediction.max(initial=-1))) + 1
            if np.ndim(costs) != 2 or min(costs.shape) < classes:
                raise ValueError(f"the costs have shape {np.shape(costs)} but must be a matrix for {classes} classes")
            loss = costs[labels, known.prediction]
    success, scores, n_ood = judged.setting.success, judged.confidences(), judged.setting.ood_index.size
    found: dict[str, Any] = {}
    for score, confidence in scores.items():
        values: dict[str, Any] = further_metrics(confidence, success, loss, labels)
        for kind, _, limit in (metric.partition("=") for metric in metrics if "@" in metric):
            values[f"{kind}={limit}"] = operating_point(confidence, success, kind, float(limit))
        found[score] = {metric: values[metric] for metric in metrics if metric in values}
    for pair in (metric[3:] for metric in metrics if metric.startswith("ds=") and n_ood):
        if not scores.keys() >= {*pair.split("+")}:
            raise ValueError(f"ds={pair} needs both scores; there are {', '.join(scores)}; add it to the scores")
        parts: Any = *(scores[score] for score in pair.split("+")), success, n_ood
        found[pair] = joint_metrics(*parts)
        with contextlib.suppress(ValueError):  # scores that the authors' convention is not made for
            found[pair] |= {f"{metric}_binned": value for metric, value in binned_joint_metrics(*parts).items()}
    return found


def _add_mean(report: Report, kind: str, keys: Sequence[str]) -> None:
    """Add the plain mean over OOD or shifted sets; large sets do not weigh more than small ones."""
    scores = report["settings"][keys[0]]
    for section in ("aurc_floor", "aurc_random"):
        report[section][kind] = float(np.mean([report[section][key] for key in keys]))
    report["settings"][kind] = {
        score: {m: float(np.mean([report["settings"][key][score][m] for key in keys])) for m in METRICS}
        for score in scores
    }
    report["tied_share"][kind] = {
        score: float(np.mean([report["tied_share"][key][score] for key in keys])) for score in scores
    }
    report["undefined"][kind] = {
        metric: f"{setting_title(key, report)}: {reason}"
        for key in keys
        for metric, reason in report["undefined"][key].items()
    }


def _add_intervals(report: Report, score: str, found: Mapping[str, Evidence], origin: Mapping[str, Evidence]) -> None:
    """Add a score's intervals in all settings, and those of its paired differences to the baseline."""
    baseline = report["bootstrap"]["baseline"]
    for key, (n, errors, rows) in found.items():
        of_score, of_baseline = (report["settings"][key][name] for name in (score, baseline))
        report["intervals"].setdefault(key, {})[score] = {
            m: list(interval(m, of_score[m], rows[:, j], n, errors)) for j, m in enumerate(METRICS)
        }
        differences = report["differences"].setdefault(key, {})
        if score != baseline:
            between, gaps = rows - origin[key].influence, {m: of_score[m] - of_baseline[m] for m in METRICS}
            differences[score] = {
                m: [gaps[m], *interval(m, gaps[m], between[:, j], n, errors, difference=True)]
                for j, m in enumerate(METRICS)
            }
        elif min(errors, n - errors) < FEW:
            report["bootstrap"]["few"][key] = {"errors": errors, "successes": n - errors}


def write_report(report: Report, path: str | Path) -> None:
    """Write a report as JSON atomically, with NaN as null and its own hash as ``sha256``."""
    plain = json.loads(json.dumps(_nan_to_none(report), allow_nan=False))
    write_text(path, json.dumps({**plain, "sha256": _digest(plain)}, indent=2) + "\n")


def _nan_to_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nan_to_none(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_nan_to_none(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def read_report(path: str | Path) -> Report:
    """Read a report from the file or the folder that holds ``report.json``; null metrics become NaN."""
    path = Path(path)
    run = path.parent if path.suffix == ".json" else path
    path = path / FILE if path.is_dir() else path
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no {path}; make one with: python -m tal_fast.evaluate --run {run}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}); evaluate the run again") from None
    if not isinstance(report, dict) or report.get("format") != FORMAT or "settings" not in report:
        raise ValueError(f"{path} is not a report of format {FORMAT}; evaluate the run again")
    # Version 0.2.0 wrote neither hash.
    if report.get("sha256") != _digest(report) and ("sha256" in report or "samples_sha256" in report):
        raise ValueError(f"{path} is damaged or was changed by hand; evaluate the run again")
    none_to_nan(report["settings"])
    return report


def _digest(report: Report) -> str:
    entries = {key: value for key, value in report.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def none_to_nan(settings: Mapping[str, Mapping[str, dict[str, Any]]]) -> None:
    """Replace null metrics of ``settings[key][score][metric]`` by NaN, in place."""
    for by_score in settings.values():
        for values in by_score.values():
            values.update({metric: math.nan for metric, value in values.items() if value is None})
