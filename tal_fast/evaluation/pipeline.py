"""Evaluation of a model's outputs: temperature, scores, metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tal_fast.evaluation.evaluation import Evaluation, evaluate_samples
from tal_fast.evaluation.report import EvaluationOptions
from tal_fast.evaluation.sample_scores import Predictions, Samples, identity_of
from tal_fast.metrics.calibration import calibration_metrics
from tal_fast.runs.prediction_store import Outputs
from tal_fast.scores.features import FeatureScorer, Training, training_needed
from tal_fast.scores.logits import SCORES, logit_scores
from tal_fast.scores.temperature import fit_temperature, held_out
from tal_fast.utils.arrays import Floats, Ints


@dataclass
class EvaluationInputs:
    """Outputs of a model on everything it is evaluated on."""

    id: Outputs  # outputs on the validation split
    ood: dict[str, Outputs] = field(default_factory=dict)  # OOD set -> outputs
    shifts: dict[str, Outputs] = field(default_factory=dict)  # shifted set -> outputs, with labels
    training: Training | None = None  # training features that feature scores are fitted on
    # Split -> hash of its samples, see ``tal_fast.evaluation.sample_scores``; default a hash of the labels.
    identity: Mapping[str, str] | None = None
    # Shifted sets that are corrupted versions of the validation images, sample by sample.
    corrupted: Collection[str] = ()


def check_set_names(ood: Collection[str]) -> None:
    """Raise a ValueError if an OOD set is called ``val``, the name of the ID samples."""
    if "val" in ood:
        raise ValueError("an OOD set cannot be called 'val', which are the ID samples; give it another name")


def evaluate_outputs(
    inputs: EvaluationInputs, options: EvaluationOptions | None = None, provenance: Mapping[str, Any] | None = None
) -> Evaluation:
    """Evaluate a model's outputs.

    The report has the entries of ``make_report`` and, in addition, ``calibration`` of the softmax on the ID samples,
    ``left_out`` (score -> why it cannot be computed), ``fitted`` (numbers of training features) and, where one was
    fitted, ``temperature``.

    Args:
        inputs, options: what is evaluated, and how.
        provenance: first entries of the report, such as the run. Paired differences are taken to its ``score``, else to
            the first score.
    """
    options, provenance = options or EvaluationOptions(), provenance or {}
    check_set_names(inputs.ood)
    index, temperature = None, None
    if options.temperature is not None:
        inputs, index, temperature = _scale(inputs, options.temperature, options.seed)
    identity = dict(inputs.identity or _label_hashes(inputs))
    if temperature is not None:
        # The held-out samples depend on the seed and the share.
        identity["val"] += f" without {temperature['held_out']}, seed {options.seed}"
    scorer = FeatureScorer(inputs.training, options.knn_samples, options.seed)
    left_out = _unavailable_scores(options.scores, scorer, inputs)
    names = [name for name in options.scores if name not in left_out]
    if not names:
        score, reason = next(iter(left_out.items()))
        raise ValueError(f"none of the scores can be computed; {score}: {reason}")
    predictions = {"val": Predictions.from_outputs(inputs.id, index)}
    predictions |= {name: Predictions.from_outputs(outputs) for name, outputs in inputs.ood.items()}
    samples = Samples(
        correct=inputs.id.correct,
        id_scores=_compute_scores(inputs.id, names, scorer),
        ood_scores={name: _compute_scores(outputs, names, scorer) for name, outputs in inputs.ood.items()},
        identity=identity,
        predictions=predictions,
        shifts={
            name: (outputs.correct, _compute_scores(outputs, names, scorer)) for name, outputs in inputs.shifts.items()
        },
    )
    evaluation = evaluate_samples(samples, options, provenance.get("score"))
    report = {**provenance, **evaluation.report}
    report["calibration"] = calibration_metrics(inputs.id.logits, inputs.id.labels)
    if temperature is not None:
        report["temperature"] = temperature
    report["left_out"] = left_out
    if any(name not in SCORES for name in names):
        report["fitted"] = scorer.about()
    report["versions"]["torch"] = torch.__version__
    return dataclasses.replace(evaluation, report=report)


def _label_hashes(inputs: EvaluationInputs) -> dict[str, str]:
    return {
        "val": identity_of(inputs.id.labels),
        **{name: identity_of(outputs.labels) for name, outputs in inputs.ood.items()},
        **{f"shift/{name}": identity_of(outputs.labels) for name, outputs in inputs.shifts.items()},
    }


def _scale(inputs: EvaluationInputs, share: float, seed: int) -> tuple[EvaluationInputs, Ints, dict[str, Any]]:
    """Fit a temperature on a share of the ID samples and divide the logits of all others by it.

    Returns the scaled outputs without the held-out samples, the positions of the other ID samples, and the report's
    entry.
    """
    fit, rest = held_out(len(inputs.id.labels), share, seed)
    temperature = fit_temperature(inputs.id.logits[fit], inputs.id.labels[fit])

    def scaled(outputs: Outputs) -> Outputs:
        return dataclasses.replace(outputs, logits=np.divide(outputs.logits, temperature, dtype=np.float64))

    entry = {
        "value": temperature,
        "held_out": len(fit),
        "evaluated": len(rest),
        "seed": seed,
        "calibration_before": calibration_metrics(inputs.id.logits[rest], inputs.id.labels[rest]),
    }
    scaled_inputs = dataclasses.replace(
        inputs,
        id=scaled(inputs.id.subset(rest)),
        ood={name: scaled(outputs) for name, outputs in inputs.ood.items()},
        shifts={
            name: scaled(outputs.subset(rest) if name in inputs.corrupted else outputs)
            for name, outputs in inputs.shifts.items()
        },
        training=None if inputs.training is None else inputs.training.scaled(temperature),
    )
    return scaled_inputs, rest, entry


def _unavailable_scores(names: Sequence[str], scorer: FeatureScorer, inputs: EvaluationInputs) -> dict[str, str]:
    """Scores that cannot be computed -> reason. Fits the others."""
    feature_scores = [name for name in names if name not in SCORES]
    sets = {"features": inputs.id}
    sets |= {f"ood_{name}_features": outputs for name, outputs in inputs.ood.items()}
    sets |= {f"shift_{name}_features": outputs for name, outputs in inputs.shifts.items()}
    missing = [name for name, outputs in sets.items() if outputs.features is None]
    if missing:
        reason = f"it needs the features of every set, and there are no {', '.join(missing)}"
        return dict.fromkeys(feature_scores, reason)
    if inputs.training is None:
        reason = "it needs training features, and there are none"
        return {name: reason for name in feature_scores if training_needed(name)}
    return scorer.undefined(feature_scores)


def _compute_scores(outputs: Outputs, names: Sequence[str], scorer: FeatureScorer) -> dict[str, Floats]:
    """Score -> (n,) float64, higher = more confident."""
    feature_scores = [name for name in names if name not in SCORES]
    scores = scorer.scores(feature_scores, outputs.logits, outputs.features) if feature_scores else {}
    scores |= logit_scores(outputs.logits, [name for name in names if name in SCORES])
    return {name: scores[name] for name in names}
