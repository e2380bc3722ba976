"""Settings of failure detection (Section 2 of the TAL paper), and the mix of ID and OOD samples in them.

The ratio of ID to OOD samples decides the numbers of OOD and New FD, so a ``Mix`` names it and every report states it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tal_fast.metrics.ranking import as_correct, as_scores
from tal_fast.utils.arrays import Floats, Ints

MIXES = "balanced-random, all, first-n, or prior=P with P in (0, 1), each also with ,full-spectrum"
GROUPS = ("near", "far")
"""Groups of OOD sets named ``near/NAME`` and ``far/NAME``, each with a mean of its own."""
_FULL = ",full-spectrum"


def means_of(key: str) -> list[str]:
    """Keys of the means over sets that a setting counts in: ``new_fd`` and ``new_fd/near`` for ``new_fd/near/svhn``."""
    kind, _, name = key.partition("/")
    group, slash, _ = name.partition("/")
    return [kind] * bool(name) + [f"{kind}/{group}"] * bool(slash and group in GROUPS)


@dataclass(frozen=True)
class Mix:
    """Rule for which ID and OOD samples take part in the settings OOD and New FD.

    Attributes:
        kind: ``balanced-random``: the same number of each, the larger set thinned at random. ``all``: every sample.
            ``first-n``: the first min(n_ID, n_OOD) of each, as the released test script does. ``prior``: the largest
            random subset in which the given share is OOD.
        prior: share of OOD samples; for ``prior`` only.
        full_spectrum: whether all samples of shifted sets count as ID samples (OpenOOD 1.5's full spectrum).
    """

    kind: str = "balanced-random"
    prior: float | None = None
    full_spectrum: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("balanced-random", "all", "first-n", "prior"):
            raise ValueError(f"unknown mix {self.kind!r}; choose from {MIXES}")
        if (self.kind == "prior") != (self.prior is not None):
            raise ValueError("a prior goes with the mix 'prior', as in prior=0.2, and with no other")
        if self.prior is not None and not 0 < self.prior < 1:
            raise ValueError(f"the mix's prior is the share of OOD samples and must lie in (0, 1), not {self.prior}")

    @classmethod
    def parse(cls, text: str) -> Mix:
        """Parse a mix's name: ``balanced-random``, ``all``, ``first-n`` or ``prior=0.2`` (20% OOD)."""
        full = text.endswith(_FULL)
        kind, equals, value = text.removesuffix(_FULL).partition("=")
        if not equals:
            if kind == "prior":
                raise ValueError("the mix 'prior' needs the share of OOD samples, as in prior=0.2")
            return cls(kind, None, full)
        try:
            prior = float(value)
        except ValueError:
            prior = None
        if kind != "prior" or prior is None:
            raise ValueError(f"unknown mix {text!r}; choose from {MIXES}")
        return cls(kind, prior, full)

    @property
    def random(self) -> bool:
        """Whether the choice of samples depends on a seed."""
        return self.kind in ("balanced-random", "prior")

    def __str__(self) -> str:
        return (self.kind if self.prior is None else f"prior={self.prior:g}") + _FULL * self.full_spectrum

    def choose(self, n_id: int, n_ood: int, seed: int = 0) -> tuple[Ints, Ints]:
        """Choose the samples that take part; OOD sets of equal size get the same ID samples.

        Returns:
            Two ascending int64 arrays of indices, into the ID and into the OOD samples.
        """
        take_id, take_ood = n_id, n_ood
        if self.kind in ("balanced-random", "first-n"):
            take_id = take_ood = min(n_id, n_ood)
        elif self.prior is not None:
            total = min(n_id / (1 - self.prior), n_ood / self.prior)
            take_id = min(n_id, round(total * (1 - self.prior)))
            take_ood = min(n_ood, round(total * self.prior))
        if not self.random:
            return np.arange(take_id), np.arange(take_ood)
        ids, oods = (np.random.default_rng(seed).permutation(n)[:k] for n, k in ((n_id, take_id), (n_ood, take_ood)))
        return np.sort(ids), np.sort(oods)


@dataclass(frozen=True)
class Setting:
    """Samples that take part in a setting, ID first, and which of them are successes."""

    id_index: Ints  # (n_id,) int64, into the ID samples
    ood_index: Ints  # (n_ood,) int64, into the OOD samples; empty in Old FD
    success: Ints  # (n_id + n_ood,) int64 of 0 and 1

    def confidence(self, id_scores: Any, ood_scores: Any = None) -> Floats:
        """Scores of the samples that take part, in the order of ``success``, from those of all ID and OOD samples."""
        chosen = as_scores(id_scores, "id_scores")[self.id_index]
        if not self.ood_index.size:
            return chosen
        return np.concatenate((chosen, as_scores(ood_scores, "ood_scores")[self.ood_index]))


def old_fd(correct: Any) -> Setting:
    """Old FD: ID samples only; success = classified correctly, from (n_id,) 0/1 or bool."""
    outcomes = as_correct(correct)
    return Setting(np.arange(outcomes.size), np.zeros(0, dtype=np.int64), outcomes)


def ood(correct: Any, n_ood: int, mix: Mix | None = None, seed: int = 0) -> Setting:
    """OOD: ID samples, correct or wrong, against OOD samples; success = ID. Arguments as for ``new_fd``."""
    ids, oods = (mix or Mix()).choose(as_correct(correct).size, n_ood, seed)
    return Setting(ids, oods, np.repeat(np.array([1, 0]), (ids.size, oods.size)))


def new_fd(correct: Any, n_ood: int, mix: Mix | None = None, seed: int = 0) -> Setting:
    """New FD: ID and OOD samples together; success = ID and classified correctly. The mix is ``Mix()`` unless given."""
    outcomes = as_correct(correct)
    ids, oods = (mix or Mix()).choose(outcomes.size, n_ood, seed)
    return Setting(ids, oods, np.concatenate((outcomes[ids], np.zeros(oods.size, dtype=np.int64))))


@dataclass(frozen=True)
class ScoredSetting:
    """Setting with all scores of its samples.

    Attributes:
        setting: which samples take part, and which are successes.
        name: name of the OOD or shifted set; None in Old FD.
        id_scores: score -> scores of all ID samples, or of all samples of the shifted set.
        ood_scores: score -> scores of all samples of the OOD set; empty without one.
    """

    setting: Setting
    name: str | None
    id_scores: Mapping[str, Floats]
    ood_scores: Mapping[str, Floats]

    def confidences(self) -> dict[str, Floats]:
        """Score -> (n,) of the samples that take part, in the order of ``setting.success``."""
        return {
            score: self.setting.confidence(values, self.ood_scores.get(score))
            for score, values in self.id_scores.items()
        }


Shifts = Mapping[str, tuple[Any, Mapping[str, Floats]]]
"""Shifted set -> (m,) 0/1 or bool, whether each sample is classified correctly; and score -> (m,) scores."""


def scored_settings(
    correct: Any,
    id_scores: Mapping[str, Floats],
    ood_scores: Mapping[str, Mapping[str, Floats]],
    shifts: Shifts | None = None,
    mix: Mix | None = None,
    seed: int = 0,
) -> dict[str, ScoredSetting]:
    """Build every setting, each with its scores.

    Args:
        correct: (n_id,) 0/1 or bool, whether each ID sample is classified correctly.
        id_scores: score -> (n_id,) scores of the ID samples.
        ood_scores: OOD set -> score -> scores of its samples.
        shifts: shifted sets; each is a setting like Old FD.
        mix, seed: as for ``new_fd``.

    Returns:
        By key: ``old_fd``, ``ood``, ``new_fd`` and ``shift`` for a single OOD or shifted set; ``ood/NAME``,
        ``new_fd/NAME`` and ``shift/NAME`` for several.
    """
    found, shifts = {"old_fd": ScoredSetting(old_fd(correct), None, id_scores, {})}, shifts or {}
    if mix is not None and mix.full_spectrum:
        if not shifts:
            raise ValueError(f"the mix {mix} needs shifted sets, which count as ID samples; name some")
        correct = np.concatenate([as_correct(correct), *(as_correct(part) for part, _ in shifts.values())])
        id_scores = {
            score: np.concatenate([values, *(scores[score] for _, scores in shifts.values())])
            for score, values in id_scores.items()
        }
    for name, scores in ood_scores.items():
        suffix = f"/{name}" if len(ood_scores) > 1 else ""
        for kind, build in (("ood", ood), ("new_fd", new_fd)):
            setting = build(correct, len(next(iter(scores.values()))), mix, seed)
            found[f"{kind}{suffix}"] = ScoredSetting(setting, name, id_scores, scores)
    for name, (shift_correct, scores) in shifts.items():
        found[f"shift/{name}" if len(shifts) > 1 else "shift"] = ScoredSetting(old_fd(shift_correct), name, scores, {})
    return found
