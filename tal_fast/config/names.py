"""Names that options choose from, importable without torch so that ``--help`` is quick."""

METRICS = (
    "aurc", "eaurc", "eaurc_exact", "augrc", "auroc", "fpr95", "tnr95", "aupr_success", "aupr_error",
)  # fmt: skip
"""Failure-detection metrics, see ``tal_fast.metrics.failure``."""

CONVENTIONS = ("tal_fast", "tal", "tal-test", "fd-shifts", "openood", "torch-uncertainty")
"""Conventions that the metrics are computed in, see ``tal_fast.metrics.failure``."""

LOGIT_SCORES = ("cosine", "msp", "max_logit", "energy", "neg_entropy", "doctor")
"""Confidence scores of logits, see ``tal_fast.scores.logits``."""

FEATURE_SCORES = ("feature_norm", "gradnorm", "mahalanobis", "residual", "vim", "knn")
"""Confidence scores of features, see ``tal_fast.scores.features``."""

SIRC_SCORES = tuple(
    f"sirc_{first}_{second}"
    for first in ("msp", "doctor", "cosine", "neg_entropy")
    for second in ("feature_norm", "residual", "knn")
)
"""SIRC's combinations of a logit score with a feature score, see ``tal_fast.scores.features``."""

SCORE_GROUPS = {
    "logits": LOGIT_SCORES,
    "features": FEATURE_SCORES,
    "sirc": SIRC_SCORES,
    "all": (*LOGIT_SCORES, *FEATURE_SCORES, *SIRC_SCORES),
}
"""Group name -> the scores it stands for."""

INTERPOLATIONS = ("bilinear", "bicubic")
"""Antialiased filters that images are resized with, as in Pillow."""

CORRUPTIONS = ("gaussian-noise", "blur", "contrast", "brightness", "jpeg", "pixelate")
"""Built-in corruptions for shifted sets, see ``tal_fast.data.corruptions``."""
