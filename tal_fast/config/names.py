"""Names that options choose from, importable without torch so that ``--help`` is quick."""

from __future__ import annotations

from collections.abc import Sequence

from tal_fast.utils import own_code
from tal_fast.utils.own_code import SCORES, in_file, installed

METRICS = (
    "aurc", "eaurc", "eaurc_exact", "augrc", "auroc", "fpr95", "tnr95", "aupr_success", "aupr_error",
)  # fmt: skip
"""Failure-detection metrics, see ``tal_fast.metrics.failure``."""

FURTHER_METRICS = (
    "naurc", "aurc_achievable", "eaugrc", "balanced_aurc", "balanced_augrc", "cost_aurc", "cost_augrc",
)  # fmt: skip
"""Metrics on request, see ``tal_fast.metrics.further``."""

CONVENTIONS = (
    "tal_fast", "tal", "tal-test", "fd-shifts", "openood", "torch-uncertainty", "torch-uncertainty-0.12",
)  # fmt: skip
"""Conventions that the metrics are computed in, see ``tal_fast.metrics.failure``."""

LOGIT_SCORES = ("cosine", "msp", "max_logit", "energy", "neg_entropy", "doctor", "margin", "log_gap", "gen")
"""Confidence scores of logits, see ``tal_fast.scores.logits``."""

FEATURE_SCORES = ("feature_norm", "gradnorm", "mahalanobis", "residual", "vim", "knn", "ctm")
"""Confidence scores of features, see ``tal_fast.scores.features``."""

SIRC_SCORES = {
    f"sirc_{first}_{second}": (first, second)
    for first in ("msp", "doctor", "cosine", "neg_entropy")
    for second in ("feature_norm", "residual", "knn")
}
"""SIRC score -> the logit score and the feature score it combines, see ``tal_fast.scores.features``."""

FITTED_SCORES = ("pnorm", "cosine_log_gap")
"""Confidence scores of logits fitted on held-out samples, see ``tal_fast.evaluation.fitted_scores``."""

ENSEMBLE_SCORES = ("mutual_information", "disagreement", "mean_cosine")
"""Confidence scores of several models' outputs, see ``tal_fast.evaluation.ensemble``."""

SCORE_GROUPS = {
    "logits": LOGIT_SCORES,
    "features": FEATURE_SCORES,
    "sirc": tuple(SIRC_SCORES),
    "fitted": FITTED_SCORES,
    "all": (*LOGIT_SCORES, *FEATURE_SCORES, *SIRC_SCORES),
}
"""Group name -> the scores it stands for."""

KNOWN_SCORES = (*SCORE_GROUPS["all"], *FITTED_SCORES, *ENSEMBLE_SCORES)
"""All scores of this package."""

DEFAULT_SCORES = ("cosine", "msp")

INTERPOLATIONS = ("bilinear", "bicubic")
"""Antialiased filters that images are resized with, as in Pillow."""

CORRUPTIONS = ("gaussian-noise", "blur", "contrast", "brightness", "jpeg", "pixelate")
"""Built-in corruptions for shifted sets, see ``tal_fast.data.corruptions``."""

UNITS = ("natural", "paper")
"""Units of printed metrics: fractions, or as papers print them."""


def is_own_score(name: str) -> bool:
    """Whether a score is the user's own: ``FILE.py:FUNCTION``, or an entry point of a package."""
    return in_file(name) or (name in installed(SCORES) and name not in KNOWN_SCORES)


def is_own_metric(name: str) -> bool:
    """Whether a metric is the user's own, likewise."""
    return in_file(name) or (name in installed(own_code.METRICS) and name not in (*METRICS, *FURTHER_METRICS))


def check_scores(names: Sequence[str]) -> list[str]:
    """Resolve score names: groups are expanded, hyphens read as underscores, duplicates dropped."""
    plain = [name if in_file(name) else name.replace("-", "_") for name in names]
    scores = list(dict.fromkeys(score for name in plain for score in SCORE_GROUPS.get(name, (name,))))
    own = [score for score in scores if is_own_score(score) or score.startswith("ood:")]
    unknown = [score for score in scores if score not in (*KNOWN_SCORES, *own)]
    if unknown or not scores:
        raise ValueError(
            f"unknown score {', '.join(unknown) or '(none given)'}; choose from {', '.join(KNOWN_SCORES)}, "
            f"ood:DETECTOR, FILE.py:FUNCTION, or a group: {', '.join(SCORE_GROUPS)}"
        )
    return scores
