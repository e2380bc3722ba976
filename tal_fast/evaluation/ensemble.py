"""Deep ensembles: the outputs of several models as those of one (Lakshminarayanan et al., 2017)."""

from __future__ import annotations

import dataclasses
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
    sets = [{"id": {"val": member.id}, "ood": member.ood, "shifts": member.shifts} for member in members]
    about = [
        (m.identity, [[(n, o.logits.shape, o.labels.tobytes()) for n, o in kind.items()] for kind in by_kind.values()])
        for m, by_kind in zip(members, sets, strict=True)
    ]
    if other := next((i for i, found in enumerate(about, 1) if found != about[0]), 0):
        raise ValueError(f"member {other} of the ensemble has other samples, sets or classes than the first")
    joint = {
        kind: {name: _joint([by_kind[kind][name] for by_kind in sets]) for name in found}
        for kind, found in sets[0].items()
    }
    absent = dict.fromkeys(("cosine", "max_logit", "energy", "cosine_log_gap"), "an ensemble has no logits")
    return dataclasses.replace(
        members[0], id=joint["id"]["val"], ood=joint["ood"], shifts=joint["shifts"], training=None, unavailable=absent
    )


def _joint(parts: Sequence[Outputs]) -> Outputs:
    log_p = (log_softmax(part.logits.astype(np.float64), axis=1) for part in parts)
    mean = functools.reduce(np.logaddexp, log_p) - math.log(len(parts))
    scores = {
        "mutual_information": neg_entropy(mean) - np.mean([neg_entropy(part.logits) for part in parts], axis=0),
        "disagreement": np.mean([part.logits.argmax(1) == mean.argmax(1) for part in parts], axis=0) - 1,
        "mean_cosine": np.mean([cosine(part.logits) for part in parts], axis=0),
    }
    return Outputs(mean, None, parts[0].labels, scores)
