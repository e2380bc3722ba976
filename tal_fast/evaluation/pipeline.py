"""From a model's outputs to the report and its files."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tal_fast.evaluation import plots
from tal_fast.evaluation import sample_scores as samples
from tal_fast.evaluation.prediction_store import Outputs
from tal_fast.evaluation.report import Report, make_report, write_report
from tal_fast.evaluation.sample_scores import Predictions, Samples, identity_of, write_samples
from tal_fast.evaluation.score_selection import DEFAULT_SCORES, check_scores, compute_scores, unavailable
from tal_fast.metrics.calibration import calibration_metrics
from tal_fast.metrics.failure import Ints
from tal_fast.metrics.settings import Mix, judged_settings
from tal_fast.scores.features import FEATURE_SCORES, KNN_SAMPLES, FeatureScorer, Training
from tal_fast.scores.temperature import fit_temperature, held_out


def check_names(ood: Collection[str]) -> None:
    """Refuse the name of an OOD set that means another split.

    Raises:
        ValueError: names it.
    """
    if "val" in ood:
        raise ValueError("an OOD set cannot be called 'val', which are the ID samples; give it another name")


def evaluate_outputs(
    id_outputs: Outputs,
    ood_outputs: Mapping[str, Outputs],
    output: str | Path,
    *,
    shift_outputs: Mapping[str, Outputs] | None = None,
    scores: Sequence[str] = DEFAULT_SCORES,
    mix: Mix | None = None,
    seed: int = 0,
    convention: str = "tal_fast",
    training: Training | None = None,
    knn_samples: int | None = KNN_SAMPLES,
    temperature: float | None = None,
    about: Mapping[str, Any] | None = None,
    title: str = "",
    resamples: int = 0,
    identity: Mapping[str, str] | None = None,
    corrupted: Collection[str] = (),
) -> Report:
    """Report on outputs: make it, write ``report.json``, ``samples.npz`` and both pictures to ``output``, return it.

    It is ``make_report``'s with ``calibration`` of the softmax on the ID samples, ``left_out`` (score -> why it could
    not be computed), ``fitted`` (on how many training features) and, with a temperature, ``temperature``.

    Args:
        id_outputs: of the validation split.
        ood_outputs: OOD set -> its outputs.
        output: folder; made if need be.
        shift_outputs: shifted set -> its outputs, with labels.
        scores: names from ``tal_fast.scores.SCORES`` and ``tal_fast.scores.features.FEATURE_SCORES``. Those that lack
            their inputs are left out.
        mix, seed, convention: see ``tal_fast.evaluation.report.make_report``.
        training: what scores over features are fitted on; needed for these only.
        knn_samples: see ``FeatureScorer``.
        temperature: share of the ID samples that a temperature is fitted on. They take part in nothing else; all other
            logits are divided by it.
        about: entries to put before the report's own, such as the run.
        title: of the pictures.
        resamples: of the bootstrap; 0: no intervals. Differences are to the run's own score, else to the first.
        identity: split -> hash of its samples, see ``tal_fast.evaluation.sample_scores``; of labels and sizes unless given.
        corrupted: the shifted sets that are the ID samples, corrupted: what is held out leaves these too.

    Raises:
        ValueError: an unknown score or convention, an OOD set called ``val``, no score that can be computed, or no
            temperature that fits.
    """
    names = check_scores(scores)
    check_names(ood_outputs)
    shift_outputs = shift_outputs or {}
    scaling: dict[str, Any] | None = None
    if temperature is not None:
        fit, rest = held_out(len(id_outputs.labels), temperature, seed)
        scaling = _scaling(id_outputs, fit, rest, seed)
        t = scaling["value"]
        id_outputs = _divided(id_outputs.subset(rest), t)
        ood_outputs = {name: _divided(outputs, t) for name, outputs in ood_outputs.items()}
        shift_outputs = {
            name: _divided(outputs.subset(rest) if name in corrupted else outputs, t)
            for name, outputs in shift_outputs.items()
        }
        training = None if training is None else training.scaled(t)
    scorer = FeatureScorer(training, knn_samples, seed)
    sets = {"": id_outputs, **{f"ood_{name}_": o for name, o in ood_outputs.items()}}
    sets |= {f"shift_{name}_": o for name, o in shift_outputs.items()}
    left_out = unavailable(names, scorer, sets, training is not None)
    names = [name for name in names if name not in left_out]
    if not names:
        score, why = next(iter(left_out.items()))
        raise ValueError(f"none of the scores can be computed from what is there; {score}: {why}")
    id_scores = compute_scores(id_outputs, names, scorer)
    ood_scores = {name: compute_scores(outputs, names, scorer) for name, outputs in ood_outputs.items()}
    shift_scores = {name: (o.right, compute_scores(o, names, scorer)) for name, o in shift_outputs.items()}
    report = {
        **(about or {}),
        **make_report(
            id_outputs.right, id_scores, ood_scores, shifts=shift_scores, mix=mix, seed=seed, convention=convention,
            resamples=resamples, baseline=(about or {}).get("score"), progress=True,
        ),
    }  # fmt: skip
    report["calibration"] = calibration_metrics(id_outputs.logits, id_outputs.labels)
    if scaling is not None:
        report["temperature"] = scaling
    report["left_out"] = left_out
    if any(name in FEATURE_SCORES for name in names):
        report["fitted"] = scorer.about()
    report["versions"]["torch"] = torch.__version__
    output = Path(output)
    # The numbers first: they stay if a picture fails.
    write_report(report, output / "report.json")
    identity = identity or {
        "val": identity_of(id_outputs.labels),
        **{name: identity_of(outputs.labels) for name, outputs in ood_outputs.items()},
        **{f"shift/{name}": identity_of(outputs.labels) for name, outputs in shift_outputs.items()},
    }
    if scaling is not None:
        # Another seed or share leaves other samples.
        identity = {**identity, "val": f"{identity['val']} without {scaling['held_out']}, seed {seed}"}
    predictions = {name: Predictions.of(outputs) for name, outputs in {"val": id_outputs, **ood_outputs}.items()}
    write_samples(
        Samples(id_outputs.right, id_scores, ood_scores, identity, predictions, shift_scores), output / samples.FILE
    )
    judged = judged_settings(id_outputs.right, id_scores, ood_scores, shift_scores, mix, seed)
    plots.risk_coverage(output / "risk_coverage.png", judged, title)
    plots.confidence_histogram(output / "confidence_histogram.png", id_outputs.right, id_scores, ood_scores, title)
    return report


def _divided(outputs: Outputs, temperature: float) -> Outputs:
    return dataclasses.replace(outputs, logits=outputs.logits / temperature)


def _scaling(outputs: Outputs, fit: Ints, rest: Ints, seed: int) -> dict[str, Any]:
    """The temperature of the samples to fit on, and an account of it."""
    value = fit_temperature(outputs.logits[fit], outputs.labels[fit])
    before = calibration_metrics(outputs.logits[rest], outputs.labels[rest])
    return {"value": value, "held_out": len(fit), "evaluated": len(rest), "seed": seed, "calibration_before": before}
