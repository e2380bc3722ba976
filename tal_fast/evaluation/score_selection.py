"""Which scores an evaluation computes, by name or group."""

from __future__ import annotations

from collections.abc import Sequence

from tal_fast.config.names import LOGIT_SCORES, SCORE_GROUPS

DEFAULT_SCORES = ("cosine", "msp")


def check_scores(names: Sequence[str]) -> list[str]:
    """Resolve score names: groups are expanded, hyphens read as underscores, duplicates dropped.

    Raises:
        ValueError: a name is unknown, or there is none.
    """
    plain = [name.replace("-", "_") for name in names]
    scores = list(dict.fromkeys(score for name in plain for score in SCORE_GROUPS.get(name, (name,))))
    unknown = [score for score in scores if score not in SCORE_GROUPS["all"]]
    if unknown or not scores:
        raise ValueError(
            f"unknown score {', '.join(unknown) or '(none given)'}; choose from {', '.join(SCORE_GROUPS['all'])}, "
            f"or a group: {', '.join(SCORE_GROUPS)}"
        )
    return scores


def without_feature_scores(names: Sequence[str]) -> list[str]:
    """Names of the logit scores among ``names``.

    Raises:
        ValueError: there are none.
    """
    scores = [name for name in names if name in LOGIT_SCORES]
    if not scores:
        raise ValueError(f"--fast computes logit scores only but {names[0]} is a feature score; leave --fast out")
    return scores
