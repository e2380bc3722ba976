"""Which scores are wanted, by name or group, and which of them can be computed from what is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tal_fast.evaluation.prediction_store import Outputs
from tal_fast.metrics.failure import Floats
from tal_fast.scores.features import FEATURE_SCORES, PLAIN, SIRC, FeatureScorer, training_needed
from tal_fast.scores.logits import SCORES

DEFAULT_SCORES = ("cosine", "msp")
# Names that stand for several scores.
GROUPS = {"logits": tuple(SCORES), "features": PLAIN, "sirc": tuple(SIRC), "all": (*SCORES, *FEATURE_SCORES)}


def check_scores(names: Sequence[str]) -> list[str]:
    """Score names, each once, hyphens read as underscores, groups (``logits``, ``features``, ``sirc``, ``all``) opened.

    Raises:
        ValueError: an unknown name, or none.
    """
    plain = [name.replace("-", "_") for name in names]
    found = list(dict.fromkeys(score for name in plain for score in GROUPS.get(name, (name,))))
    unknown = [name for name in found if name not in GROUPS["all"]]
    if unknown or not found:
        raise ValueError(
            f"unknown score {', '.join(unknown) or '(none given)'}; choose from {', '.join(GROUPS['all'])}, "
            f"or a group: {', '.join(GROUPS)}"
        )
    return found


def unavailable(
    names: Sequence[str], scorer: FeatureScorer, sets: Mapping[str, Outputs], has_training: bool
) -> dict[str, str]:
    """Scores that cannot be computed from what is there -> why. Fits the others.

    Args:
        names: of scores.
        scorer: of scores over features.
        sets: name, as its arrays are called in an ``.npz`` -> outputs.
        has_training: whether there are training features.
    """
    of_features = [name for name in names if name not in SCORES]
    bare = [f"{name}features" for name, outputs in sets.items() if outputs.features is None]
    if bare:
        return dict.fromkeys(of_features, f"it needs the features of every set, and there are no {', '.join(bare)}")
    if not has_training:
        why = "it needs training features, and there are none"
        return {name: why for name in of_features if training_needed(name)}
    return scorer.undefined(of_features)


def compute_scores(outputs: Outputs, names: Sequence[str], scorer: FeatureScorer) -> dict[str, Floats]:
    """Score name -> (n,) float64, higher = surer.

    Args:
        outputs: of a split.
        names: of scores; those over features need the outputs' features, and training data in the scorer.
        scorer: of scores over features.
    """
    of_features = [name for name in names if name not in SCORES]
    found = scorer.scores(of_features, outputs.logits, outputs.features) if of_features else {}
    return {name: found[name] if name in found else SCORES[name](outputs.logits) for name in names}


def logit_scores(names: Sequence[str]) -> list[str]:
    """Those of the names that need no features.

    Raises:
        ValueError: there are none.
    """
    found = [name for name in names if name in SCORES]
    if not found:
        raise ValueError(f"--fast keeps to scores over logits but {names[0]} is over features; leave --fast out")
    return found
