"""Evaluation of a model's outputs: temperature, scores, metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tal_fast.config.names import ENSEMBLE_SCORES, FITTED_SCORES
from tal_fast.evaluation.evaluation import Evaluation, evaluate_samples
from tal_fast.evaluation.fitted_scores import fit_score
from tal_fast.evaluation.own_scores import own_scores, report_names
from tal_fast.evaluation.report import EvaluationOptions
from tal_fast.evaluation.sample_scores import Predictions, Samples, identity_of
from tal_fast.metrics.calibration import calibration_metrics
from tal_fast.metrics.settings import GROUPS
from tal_fast.runs.prediction_store import Outputs
from tal_fast.scores.features import FeatureScorer, Training
from tal_fast.scores.logits import SCORES, logit_scores
from tal_fast.scores.temperature import HELD_OUT, fit_temperature, held_out
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
    unavailable: Mapping[str, str] = field(default_factory=dict)  # score -> why these outputs do not have it


def check_set_names(ood: Collection[str]) -> None:
    """Raise a ValueError if an OOD set is called ``val``, the name of the ID samples, or like a group of sets."""
    taken = {"val", *(group for group in GROUPS if any(name.startswith(f"{group}/") for name in ood))}
    for name in taken & set(ood):
        raise ValueError(f"an OOD set cannot be called {name!r}, which are the ID samples or a group; rename it")


def evaluate_outputs(
    inputs: EvaluationInputs, options: EvaluationOptions | None = None, provenance: Mapping[str, Any] | None = None
) -> Evaluation:
    """Evaluate a model's outputs.

    The report has the entries of ``make_report`` and, in addition, ``calibration`` of the softmax on the ID samples,
    ``left_out`` (score -> why it cannot be computed), ``fitted`` (numbers of training features) and, where they
    were fitted on held-out samples, ``fitted_scores`` and ``temperature``.

    Args:
        inputs, options: what is evaluated, and how.
        provenance: first entries of the report, such as the run. Paired differences are taken to its ``score``, else to
            the first score.
    """
    options, provenance = options or EvaluationOptions(), provenance or {}
    check_set_names(inputs.ood)
    functions: dict[str, Any] = {}
    wanted, own = report_names(options.scores, inputs.id.scores)
    absent = {**dict.fromkeys(ENSEMBLE_SCORES, "it needs several models: --ensemble"), **inputs.unavailable}
    left_out = {name: absent[name] for name in wanted if name in absent and name not in inputs.id.scores}
    fitted = [name for name in FITTED_SCORES if name in wanted and name not in left_out]
    entries: dict[str, Any] = {}
    identity, index = dict(inputs.identity or _label_hashes(inputs)), None
    if options.temperature is not None or fitted:
        held, inputs, index, entries = _hold_out(inputs, options)
        # The held-out samples depend on the seed and the share.
        identity["val"] += f" without {len(held.labels)}, seed {options.seed}"
    if fitted:
        entry = entries["fitted_scores"] = {"held_out": len(held.labels), "choose_by": options.choose_by}
        choose_by, _, ood_set = options.choose_by.partition("=")
        if ood_set and ood_set not in inputs.ood:
            raise ValueError(f"pnorm cannot be chosen by {ood_set!r}: OOD sets are {', '.join(inputs.ood) or 'none'}")
        outliers = inputs.ood.pop(ood_set).logits if ood_set else None
        identity.pop(ood_set, None)
        for name in fitted:
            try:
                functions[name], entry[name] = fit_score(name, held, choose_by, outliers, options.seed)
            except ValueError as problem:
                left_out[name] = str(problem)
    for name in inputs.id.scores:
        without = [key for key, outputs in {**inputs.ood, **inputs.shifts}.items() if name not in outputs.scores]
        if without:
            left_out[name] = f"there are no values of it for {', '.join(without)}"
    scorer = FeatureScorer(inputs.training, options.knn_samples, options.seed)
    over_features = [n for n in wanted if n not in (*SCORES, *own, *functions, *inputs.id.scores, *left_out)]
    left_out |= _unavailable_scores(over_features, scorer, inputs)
    names = [name for name in wanted if name not in left_out]
    if not names:
        score, reason = next(iter(left_out.items()))
        raise ValueError(f"none of the scores can be computed; {score}: {reason}")
    predictions = {"val": Predictions.from_outputs(inputs.id, index)}
    predictions |= {name: Predictions.from_outputs(outputs) for name, outputs in inputs.ood.items()}

    def compute(outputs: Outputs) -> dict[str, Floats]:
        """Score -> (n,) float64, higher = more confident."""
        chosen = [name for name in names if name in over_features]
        found = scorer.scores(chosen, outputs.logits, outputs.features) if chosen else {}
        found |= logit_scores(outputs.logits, [name for name in names if name in SCORES and name not in outputs.scores])
        found |= {name: np.asarray(values, np.float64) for name, values in outputs.scores.items()}
        found |= own_scores(outputs, own)
        return {name: found[name] if name in found else functions[name](outputs.logits) for name in names}

    samples = Samples(
        correct=inputs.id.correct,
        id_scores=compute(inputs.id),
        ood_scores={name: compute(outputs) for name, outputs in inputs.ood.items()},
        identity=identity,
        predictions=predictions,
        shifts={name: (outputs.correct, compute(outputs)) for name, outputs in inputs.shifts.items()},
    )
    evaluation = evaluate_samples(samples, options, provenance.get("score"))
    report = {**provenance, **evaluation.report, **entries}
    report["calibration"] = calibration_metrics(inputs.id.logits, inputs.id.labels)
    report["left_out"] = left_out
    if any(name in over_features for name in names):
        report["fitted"] = scorer.about()
    report["versions"]["torch"] = torch.__version__
    return dataclasses.replace(evaluation, report=report)


def _label_hashes(inputs: EvaluationInputs) -> dict[str, str]:
    return {
        "val": identity_of(inputs.id.labels),
        **{name: identity_of(outputs.labels) for name, outputs in inputs.ood.items()},
        **{f"shift/{name}": identity_of(outputs.labels) for name, outputs in inputs.shifts.items()},
    }


def _hold_out(
    inputs: EvaluationInputs, options: EvaluationOptions
) -> tuple[Outputs, EvaluationInputs, Ints, dict[str, Any]]:
    """Take a share of the ID samples out, and fit a temperature on them if one is wanted.

    Returns the held-out outputs, the others, the positions of the other ID samples, and the report's entries. All
    logits are divided by the temperature.
    """
    fit, rest = held_out(len(inputs.id.labels), options.temperature or HELD_OUT, options.seed)
    held, entries, temperature = inputs.id.subset(fit), {}, 1.0
    if options.temperature is not None:
        temperature = fit_temperature(held.logits, held.labels)
        entries["temperature"] = {
            "value": temperature, "held_out": len(fit), "evaluated": len(rest), "seed": options.seed,
            "calibration_before": calibration_metrics(inputs.id.logits[rest], inputs.id.labels[rest]),
        }  # fmt: skip

    def scaled(outputs: Outputs) -> Outputs:
        # In float64: float16 logits would lose digits.
        return dataclasses.replace(outputs, logits=np.divide(outputs.logits, temperature, dtype=np.float64))

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
    return scaled(held), scaled_inputs, rest, entries


def _unavailable_scores(names: Sequence[str], scorer: FeatureScorer, inputs: EvaluationInputs) -> dict[str, str]:
    """Feature scores that cannot be computed -> reason. Fits the others."""
    sets = {"features": inputs.id}
    sets |= {f"ood_{name}_features": outputs for name, outputs in inputs.ood.items()}
    sets |= {f"shift_{name}_features": outputs for name, outputs in inputs.shifts.items()}
    missing = [name for name, outputs in sets.items() if outputs.features is None]
    if missing:
        reason = f"it needs the features of every set, and there are no {', '.join(missing)}"
        return dict.fromkeys(names, reason)
    return scorer.undefined(names)
