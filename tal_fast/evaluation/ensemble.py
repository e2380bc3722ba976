"""Deep ensembles: the outputs of several models as those of one (Lakshminarayanan et al., 2017)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from scipy.special import log_softmax

from tal_fast.evaluation.pipeline import EvaluationInputs
from tal_fast.runs.prediction_store import Outputs
from tal_fast.scores import cosine, neg_entropy


def combine(members: Sequence[EvaluationInputs]) -> EvaluationInputs:
    """Outputs of an ensemble: the logits are the logarithm of the members' mean softmax.

    The scores of each set are ``mutual_information``, mean H(p) − H(mean p), in nats; ``disagreement``, −(share of the
    members that predict another class than the ensemble); and ``mean_cosine``, the mean of the members' cosines.

    Raises:
        ValueError: members with other samples, sets or classes than the first.
    """
    first, sets = members[0], [_sets(member) for member in members]
    for number, (member, other) in enumerate(zip(members, sets, strict=True), 1):
        differing = other.keys() ^ sets[0].keys() or {
            name for name in other if _key(other[name]) != _key(sets[0][name])
        }
        if differing or member.identity != first.identity:
            raise ValueError(
                f"member {number} of the ensemble differs from the first in {', '.join(sorted(differing)) or 'its images'}; "
                "evaluate all on the same samples, sets and classes"
            )
    joint = {name: _joint([other[name] for other in sets]) for name in sets[0]}
    return EvaluationInputs(
        joint["val"],
        {name: joint[f"OOD set {name}"] for name in first.ood},
        {name: joint[f"shifted set {name}"] for name in first.shifts},
        identity=first.identity,
        corrupted=first.corrupted,
        unavailable=dict.fromkeys(
            ("cosine", "max_logit", "energy", "cosine_log_gap"), "an ensemble has a mean softmax and no logits"
        ),
    )


def _sets(inputs: EvaluationInputs) -> dict[str, Outputs]:
    ood = {f"OOD set {name}": outputs for name, outputs in inputs.ood.items()}
    return {"val": inputs.id, **ood, **{f"shifted set {name}": outputs for name, outputs in inputs.shifts.items()}}


def _key(outputs: Outputs) -> tuple[object, ...]:
    return outputs.logits.shape, outputs.labels.tobytes()


def _joint(parts: Sequence[Outputs]) -> Outputs:
    log_p = (log_softmax(part.logits.astype(np.float64), axis=1) for part in parts)
    mean = functools.reduce(np.logaddexp, log_p) - math.log(len(parts))
    predicted = mean.argmax(1)
    scores = {
        "mutual_information": neg_entropy(mean) - np.mean([neg_entropy(part.logits) for part in parts], axis=0),
        "disagreement": np.mean([part.logits.argmax(1) == predicted for part in parts], axis=0) - 1,
        "mean_cosine": np.mean([cosine(part.logits) for part in parts], axis=0),
    }
    return Outputs(mean, None, parts[0].labels, scores)
