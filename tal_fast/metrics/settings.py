"""The three settings of failure detection (Section 2 of the TAL paper) and how many samples of each kind they mix.

=========  ==============================  ==========================
setting    samples                         success
=========  ==============================  ==========================
Old FD     in-distribution (ID)            classified right
OOD        ID and out-of-distribution      ID, classified right or not
New FD     ID and out-of-distribution      ID and classified right
=========  ==============================  ==========================

The ratio of ID to OOD samples decides the numbers of OOD and New FD, so a ``Mix`` names it and every report states it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tal_fast.metrics.failure import Floats, Ints, as_correct, as_scores

MIXES = "balanced-random, all, first-n, or prior=P with P in (0, 1)"


@dataclass(frozen=True)
class Mix:
    """Which ID and OOD samples OOD and New FD are computed on.

    Attributes:
        kind: ``balanced-random``: the same number of each, the larger set thinned at random. ``all``: every sample.
            ``first-n``: the first min(n_ID, n_OOD) of each, as the released test script does. ``prior``: the largest
            random subset in which the given share is OOD.
        prior: the OOD share, for ``prior`` only.
    """

    kind: str = "balanced-random"
    prior: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("balanced-random", "all", "first-n", "prior"):
            raise ValueError(f"unknown mix {self.kind!r}; choose from {MIXES}")
        if (self.kind == "prior") != (self.prior is not None):
            raise ValueError("a prior belongs to the mix 'prior', and only to it")
        if self.prior is not None and not 0 < self.prior < 1:
            raise ValueError(f"the mix's prior is the share of OOD samples and must lie in (0, 1), not {self.prior}")

    @classmethod
    def parse(cls, text: str) -> Mix:
        """A mix from its name: ``balanced-random``, ``all``, ``first-n`` or ``prior=0.2`` (20% OOD).

        Raises:
            ValueError: anything else.
        """
        kind, equals, value = text.partition("=")
        if not equals:
            if kind == "prior":
                raise ValueError("the mix 'prior' needs the share of OOD samples, as in prior=0.2")
            return cls(kind)
        try:
            prior = float(value)
        except ValueError:
            prior = None
        if kind != "prior" or prior is None:
            raise ValueError(f"unknown mix {text!r}; choose from {MIXES}")
        return cls(kind, prior)

    @property
    def random(self) -> bool:
        """Whether a seed decides which samples take part."""
        return self.kind in ("balanced-random", "prior")

    def __str__(self) -> str:
        return self.kind if self.prior is None else f"prior={self.prior:g}"

    def choose(self, n_id: int, n_ood: int, seed: int = 0) -> tuple[Ints, Ints]:
        """Indices of the samples that take part, rising.

        Args:
            n_id, n_ood: how many there are.
            seed: of the random mixes. OOD sets of equal size meet the same ID samples.

        Returns:
            Two int64 arrays, into the ID and into the OOD samples.
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
        return _draw(n_id, take_id, seed), _draw(n_ood, take_ood, seed)


def _draw(n: int, take: int, seed: int) -> Ints:
    return np.sort(np.random.default_rng(seed).permutation(n)[:take]).astype(np.int64)


@dataclass(frozen=True)
class Setting:
    """Which samples take part, ID first, and which of them are successes.

    Attributes:
        id_index: (n_id,) int64, into the ID samples.
        ood_index: (n_ood,) int64, into the OOD samples; empty in Old FD.
        success: (n_id + n_ood,) int64 of 0 and 1.
    """

    id_index: Ints
    ood_index: Ints
    success: Ints

    def confidence(self, id_scores: Any, ood_scores: Any = None) -> Floats:
        """The (n_id + n_ood,) scores of the samples that take part, in the order of ``success``.

        Args:
            id_scores: scores of all ID samples.
            ood_scores: scores of all OOD samples; may be left out in Old FD.
        """
        chosen = as_scores(id_scores, "id_scores")[self.id_index]
        if not self.ood_index.size:
            return chosen
        return np.concatenate((chosen, as_scores(ood_scores, "ood_scores")[self.ood_index]))


def old_fd(right: Any) -> Setting:
    """ID samples only; success = classified right.

    Args:
        right: (n_id,) 0/1 or bool.
    """
    right = as_correct(right, "right")
    return Setting(np.arange(right.size), np.zeros(0, dtype=np.int64), right)


def ood(right: Any, n_ood: int, mix: Mix | None = None, seed: int = 0) -> Setting:
    """ID samples, right or wrong, against OOD samples; success = ID. Arguments as for ``new_fd``."""
    ids, oods = (mix or Mix()).choose(as_correct(right, "right").size, n_ood, seed)
    return Setting(ids, oods, np.repeat(np.array([1, 0]), (ids.size, oods.size)))


def new_fd(right: Any, n_ood: int, mix: Mix | None = None, seed: int = 0) -> Setting:
    """ID and OOD samples together; success = ID and classified right.

    Args:
        right: (n_id,) 0/1 or bool.
        n_ood: number of OOD samples.
        mix: ``balanced-random`` unless given.
        seed: of a random mix.
    """
    right = as_correct(right, "right")
    ids, oods = (mix or Mix()).choose(right.size, n_ood, seed)
    return Setting(ids, oods, np.concatenate((right[ids], np.zeros(oods.size, dtype=np.int64))))


def all_settings(
    right: Any, ood_sizes: Mapping[str, int], mix: Mix | None = None, seed: int = 0
) -> dict[str, tuple[Setting, str | None]]:
    """Old FD, and OOD and New FD for each OOD set.

    Args:
        right: (n_id,) 0/1 or bool.
        ood_sizes: number of samples of each OOD set.
        mix, seed: as for ``new_fd``.

    Returns:
        Setting and OOD set (None in Old FD) by key: ``old_fd``, ``ood``, ``new_fd`` for a single OOD set;
        ``ood/NAME`` and ``new_fd/NAME`` for several.
    """
    found: dict[str, tuple[Setting, str | None]] = {"old_fd": (old_fd(right), None)}
    for name, size in ood_sizes.items():
        suffix = f"/{name}" if len(ood_sizes) > 1 else ""
        found[f"ood{suffix}"] = ood(right, size, mix, seed), name
        found[f"new_fd{suffix}"] = new_fd(right, size, mix, seed), name
    return found


@dataclass(frozen=True)
class Judged:
    """A setting with every score of the samples that take part.

    Attributes:
        setting: who takes part, and what is a success.
        name: of its OOD or shifted set; None in Old FD.
        id_scores: score -> scores of all ID samples; in a shifted set, of all its samples.
        ood_scores: score -> scores of all samples of the OOD set; empty elsewhere.
    """

    setting: Setting
    name: str | None
    id_scores: Mapping[str, Floats]
    ood_scores: Mapping[str, Floats]

    def confidences(self) -> dict[str, Floats]:
        """Score -> (n,) of the samples that take part, in the order of ``setting.success``."""
        return {s: self.setting.confidence(own, self.ood_scores.get(s)) for s, own in self.id_scores.items()}


Shifts = Mapping[str, tuple[Any, Mapping[str, Floats]]]
"""Shifted set -> (m,) 0/1 or bool, which of its samples are classified right; and score -> their (m,) scores."""


def judged_settings(
    right: Any,
    id_scores: Mapping[str, Floats],
    ood_scores: Mapping[str, Mapping[str, Floats]],
    shifts: Shifts | None = None,
    mix: Mix | None = None,
    seed: int = 0,
) -> dict[str, Judged]:
    """Every setting that these scores can be judged in.

    Args:
        right: (n_id,) 0/1 or bool, whether each ID sample is classified right.
        id_scores: score -> (n_id,) scores of the ID samples.
        ood_scores: OOD set -> score -> scores of its samples.
        shifts: shifted sets; each is judged as Old FD is.
        mix, seed: as for ``new_fd``.

    Returns:
        By key: those of ``all_settings``, and ``shift`` for a single shifted set, ``shift/NAME`` for several.
    """
    sizes = {name: len(next(iter(scores.values()))) for name, scores in ood_scores.items()}
    found = {
        key: Judged(setting, name, id_scores, {} if name is None else ood_scores[name])
        for key, (setting, name) in all_settings(right, sizes, mix, seed).items()
    }
    shifts = shifts or {}
    for name, (of_shift, scores) in shifts.items():
        found[f"shift/{name}" if len(shifts) > 1 else "shift"] = Judged(old_fd(of_shift), name, scores, {})
    return found
