"""Joint metrics of two scores, one against errors and one against OOD samples (SURE+, arXiv 2603.03903).

A sample is kept if s_id ≥ a and s_ood ≥ b. Coverage is kept ID / all ID; risk is 1 − right kept / all kept: OOD
samples are errors. Both functions return fractions, NaN without ID samples:

- ``ds_aurc``: mean over j = 1..n_ID of the least risk among all (a, b) that keep at least j ID samples.
- ``ds_f1``: largest F1 over all (a, b), with precision right kept / all kept and recall right kept / all ID.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tal_fast.metrics.ranking import as_correct, as_scores
from tal_fast.utils.arrays import Floats, Ints

# Thresholds of each score, and bins of coverage, in the authors' convention.
_GRID, _BINS = 1001, 100
_WHOLE = 16  # thresholds a in a strip that is computed whole
_RIGHT, _WRONG, _OOD = range(3)


def joint_metrics(s_id: Any, s_ood: Any, success: Any, n_ood: int = 0) -> dict[str, float]:
    """Exact DS-AURC and DS-F1; 10,000 ID and 10,000 OOD samples take 0.3 s, 50,000 of each 3 s, and at worst 16 s.

    Branch and bound: a strip of thresholds a is left out at a threshold b where even the errors kept by its highest a
    and the right samples kept by its lowest would improve nothing.

    Args:
        s_id, s_ood: (n,) scores, higher = more confident; any real type.
        success: (n,) 0/1 or bool, whether ID and classified correctly.
        n_ood: number of OOD samples, which are the last ones.
    """
    first, second, kind, n_id = _checked(s_id, s_ood, success, n_ood)
    if not n_id:
        return {"ds_aurc": np.nan, "ds_f1": np.nan}
    # Place of the highest threshold that keeps a sample, among the distinct ID scores from the highest.
    row, column = (np.searchsorted(np.unique(-s[:n_id]), -s) for s in (first, second))
    order = np.argsort(row, kind="stable")
    row, column, kind = row[order], column[order], kind[order]
    least, f1 = np.full(n_id + 1, np.inf), 0.0  # least risk of those that keep at least j ID samples

    def counted(low: int, high: int, columns: Ints, rows: int = 1) -> Ints:
        """(3, rows, columns) samples by kind in rows (low, high], up to each column and each row (1: all rows)."""
        part, width = slice(*np.searchsorted(row, (low, high), side="right")), columns.size + 1
        at = (row[part] - low - 1) * (rows > 1) + kind[part] * rows
        at = at * width + np.searchsorted(columns, column[part])
        counts = np.bincount(at, minlength=3 * rows * width).reshape(3, rows, width)[..., :-1]
        return counts.cumsum(axis=2).cumsum(axis=1)

    def improve(counts: Ints) -> None:
        nonlocal least, f1
        right, wrong, ood = counts
        kept, ids = right + wrong + ood, right + wrong
        risk = (wrong + ood) / np.maximum(kept, 1)
        better = (risk < least[ids]) & (kept > 0)
        if better.any():
            np.minimum.at(least, ids[better], risk[better])
            least = np.minimum.accumulate(least[::-1])[::-1]
        f1 = max(f1, float((2 * right / (kept + n_id)).max()))

    def search(low: int, high: int, columns: Ints, fewest: Ints, most: Ints) -> None:
        """Search the rows between two whose counts, (3, columns), are known."""
        right, errors = most[_RIGHT], fewest[_WRONG] + fewest[_OOD]
        open_ = errors / np.maximum(right + errors, 1) < least[right + most[_WRONG]]
        open_ |= 2 * right / (right + errors + n_id) > f1
        if high - low < 2 or not open_.any():
            return
        columns, fewest, most = columns[open_], fewest[:, open_], most[:, open_]
        if high - low <= _WHOLE:
            return improve(fewest[:, None] + counted(low, high - 1, columns, high - 1 - low))
        middle = (low + high) // 2
        counts = fewest + counted(low, middle, columns)[:, 0]
        improve(counts)
        search(low, middle, columns, fewest, counts)
        search(middle, high, columns, counts, most)

    every, last = np.arange(column.max() + 1), int(row[kind != _OOD].max())
    most = counted(-1, last, every)[:, 0]
    improve(most)
    search(-1, last, every, np.zeros_like(most), most)
    return {"ds_aurc": float(least[1:].mean()), "ds_f1": f1}


def binned_joint_metrics(s_id: Any, s_ood: Any, success: Any, n_ood: int = 0) -> dict[str, float]:
    """DS-AURC and DS-F1 in the convention of the authors' code; arguments as for ``joint_metrics``.

    s_ood is scaled to [0, 1]; a and b are 1,001 values from 0 to 1, in float32. Coverage has 100 bins, open above, with
    the least risk in each, an empty one that of the next above or 1; the area is a trapezoid over their centres. Full
    coverage lies in no bin. Raises ValueError if s_id is not in [0, 1], or s_ood is infinite.
    """
    first, second, kind, n_id = _checked(s_id, s_ood, success, n_ood)
    if not n_id:
        return {"ds_aurc": np.nan, "ds_f1": np.nan}
    if not (first.min() >= 0 and first.max() <= 1) or not np.isfinite(second).all():
        raise ValueError(
            f"the authors' convention needs s_id in [0, 1] and finite s_ood, not s_id from {first.min():g} to "
            f"{first.max():g} and s_ood from {second.min():g} to {second.max():g}; choose msp as s_id"
        )
    first, second = first.astype(np.float32), second.astype(np.float32)
    second = (second - second.min()) / np.maximum(second.max() - second.min(), np.float32(1e-12))
    grid = np.linspace(0, 1, _GRID, dtype=np.float32)
    i, j = (np.searchsorted(grid, score, side="right") - 1 for score in (first, second))
    counts = np.bincount((kind * _GRID + i) * _GRID + j, minlength=3 * _GRID**2).reshape(3, _GRID, _GRID)
    right, wrong, ood = counts[:, ::-1, ::-1].cumsum(axis=1).cumsum(axis=2).reshape(3, -1)
    kept = right + wrong + ood
    least = np.full(_BINS + 1, np.inf)
    np.minimum.at(least, _BINS * (right + wrong) // n_id, 1 - right / np.maximum(kept, 1))
    for b in reversed(range(_BINS)):
        if np.isinf(least[b]):
            least[b] = least[b + 1] if b + 1 < _BINS else 1.0
    area = (least[1:_BINS] + least[: _BINS - 1]).sum() / 2 / _BINS
    return {"ds_aurc": float(area), "ds_f1": float((2 * right / (kept + n_id)).max())}


def _checked(s_id: Any, s_ood: Any, success: Any, n_ood: int) -> tuple[Floats, Floats, Ints, int]:
    """Scores, the kind of each sample, and the number of ID samples."""
    first, second, outcomes = as_scores(s_id, "s_id"), as_scores(s_ood, "s_ood"), as_correct(success, "success")
    sizes, n_id = (first.size, second.size, outcomes.size), outcomes.size - n_ood
    if len(set(sizes)) > 1:
        raise ValueError(f"s_id, s_ood and success have {sizes} samples; they must match")
    if not 0 <= n_ood <= outcomes.size or outcomes[n_id:].any():
        raise ValueError(
            f"the last {n_ood} of {outcomes.size} samples must be OOD, which are no successes; put ID first"
        )
    return first, second, np.where(np.arange(outcomes.size) < n_id, 1 - outcomes, _OOD), n_id
