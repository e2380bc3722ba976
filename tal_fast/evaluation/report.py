"""The failure-detection report: made from outputs, written as JSON, read back, printed as a table.

Every value is in natural units (a fraction) in the file; NaN becomes null there, and ``undefined`` says why.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import tal_fast
from tal_fast.metrics.bootstrap import LEVEL, bootstrap, interval, paired_differences
from tal_fast.metrics.calibration import BINS, CALIBRATION
from tal_fast.metrics.failure import (
    METRICS,
    Floats,
    Ints,
    as_correct,
    aurc_floor,
    aurc_random,
    failure_metrics,
    tied_share,
    undefined_reasons,
)
from tal_fast.metrics.settings import Judged, Mix, Shifts, judged_settings
from tal_fast.utils.io import replacing

FORMAT = 1
Report = dict[str, Any]

TITLES = {
    "aurc": "AURC", "eaurc": "E-AURC", "eaurc_exact": "E-AURC exact", "augrc": "AUGRC", "auroc": "AUROC",
    "fpr95": "FPR95", "tnr95": "TNR95", "aupr_success": "AUPR-success", "aupr_error": "AUPR-error",
}  # fmt: skip
SETTING_TITLES = {"old_fd": "Old FD", "ood": "OOD", "new_fd": "New FD", "shift": "Old FD under shift"}
SHOWN = ("aurc", "eaurc", "augrc", "auroc", "fpr95", "tnr95", "aupr_success", "aupr_error")
# What the papers multiply a metric by when they print it.
PAPER_SCALE = {key: 1000.0 if "aurc" in key or key == "augrc" else 100.0 for key in METRICS}
UNITS = ("natural", "paper")


def setting_title(key: str) -> str:
    """``new_fd/svhn`` -> ``New FD against svhn``; ``shift/fog`` -> ``Old FD under shift fog``."""
    kind, _, name = key.partition("/")
    against = "" if kind == "shift" else "against "
    return SETTING_TITLES[kind] + (f" {against}{name}" if name else "")


def make_report(
    right: Any,
    id_scores: Mapping[str, Floats],
    ood_scores: Mapping[str, Mapping[str, Floats]],
    *,
    shifts: Shifts | None = None,
    mix: Mix | None = None,
    seed: int = 0,
    convention: str = "tal_fast",
    resamples: int = 0,
    baseline: str | None = None,
    progress: bool = False,
) -> Report:
    """All metrics of all scores in all settings.

    Args:
        right: (n,) 0/1 or bool, whether each ID sample is classified right.
        id_scores: score name -> (n,) scores of the ID samples.
        ood_scores: OOD set -> score name -> scores of its samples.
        shifts: shifted set -> which of its samples are classified right, and score name -> their scores.
        mix, seed: which ID and OOD samples meet, see ``tal_fast.metrics.settings``.
        convention: of the metrics, see ``tal_fast.metrics``.
        resamples: of the bootstrap (``tal_fast.metrics.bootstrap``), drawn from ``seed``; 0: no intervals.
        baseline: the score that paired differences are taken to; the first unless given.
        progress: draw a bar while resampling.

    Returns:
        ``settings[key][score][metric]`` for the keys ``old_fd``, ``ood``, ``new_fd``. With several OOD sets there are
        ``ood/NAME`` and ``new_fd/NAME`` for each, and ``ood`` and ``new_fd`` are the plain mean over the sets. Old FD
        of a shifted set is ``shift``; of several ``shift/NAME`` for each, and ``shift`` is their plain mean.
        Beside it, by setting: ``samples``, ``aurc_floor``, ``aurc_random``, ``undefined`` (metric -> reason) and
        ``tied_share`` (score -> share). And ``id_accuracy``, ``counts`` (of all samples, before the mix), ``mix``,
        ``seed``, ``convention``, ``ood_names``, ``shift_names``, ``versions``. With resamples,
        ``intervals[key][score][metric]`` = [low, high], ``differences[key][score][metric]`` = [score − baseline, low,
        high] and ``bootstrap``: how.
    """
    right = as_correct(right, "right")
    mix, shifts = mix or Mix(), shifts or {}
    judged = judged_settings(right, id_scores, ood_scores, shifts, mix, seed)
    sizes = {
        "ood": {name: len(next(iter(scores.values()))) for name, scores in ood_scores.items()},
        "shift": {name: len(of_shift) for name, (of_shift, _) in shifts.items()},
    }
    report: Report = {
        "format": FORMAT,
        "id_accuracy": float(right.mean()) if right.size else math.nan,
        "convention": convention,
        "mix": str(mix),
        "seed": seed,
        "ood_names": list(ood_scores),
        "shift_names": list(shifts),
        "counts": {"id": int(right.size), "id_right": int(right.sum()), **sizes},
        "samples": {},
        "settings": {},
        "aurc_floor": {},
        "aurc_random": {},
        "undefined": {},
        "tied_share": {},
        "versions": {"tal_fast": tal_fast.__version__, "numpy": np.__version__},
    }
    for key, one in judged.items():
        _add_setting(report, key, one)
    for kind, names in (("ood", ood_scores), ("new_fd", ood_scores), ("shift", shifts)):
        if len(names) > 1:
            _add_mean(report, kind, [f"{kind}/{name}" for name in names])
    if resamples:
        baseline = baseline or next(iter(id_scores))
        report["bootstrap"] = {
            "resamples": resamples, "level": LEVEL, "seed": seed, "baseline": baseline,
            "method": "percentile; ID and OOD samples resampled separately; differences on the same resamples",
            "undefined_share": {},
        }  # fmt: skip
        report["intervals"], report["differences"] = {}, {}
        found = resample_settings(
            right, id_scores, ood_scores, shifts, mix=mix, seed=seed, convention=convention, resamples=resamples,
            progress=progress,
        )  # fmt: skip
        for key, values in found:
            _add_interval(report, key, values, baseline)
    return report


def resample_settings(
    right: Any,
    id_scores: Mapping[str, Floats],
    ood_scores: Mapping[str, Mapping[str, Floats]],
    shifts: Shifts | None = None,
    *,
    mix: Mix,
    seed: int,
    convention: str,
    resamples: int,
    progress: bool = False,
) -> Iterator[tuple[str, dict[str, Floats]]]:
    """Every metric of every score on the resamples of each setting; the same seed and sizes give the same resamples.

    Args: as ``make_report``.

    Yields:
        A setting's key and score -> (resamples, len(METRICS)) float64, as ``tal_fast.metrics.bootstrap.bootstrap`` gives them.
        With several OOD sets, at the end, ``ood`` and ``new_fd``: the mean over the sets of each resample, in which
        they share the ID draws; with several shifted sets ``shift`` likewise. Sets of as many samples share their
        draws: shifted sets are mostly the same images, changed.
    """
    from tqdm import tqdm

    judged = judged_settings(right, id_scores, ood_scores, shifts, mix, seed)
    streams: dict[str | None, int] = {name: i for i, name in enumerate(ood_scores)}
    parts: dict[str, int] = {}
    sums: dict[str, dict[str, Floats]] = {}
    with tqdm(
        total=resamples * len(judged), desc="bootstrap", unit=" resamples", disable=None if progress else True,
        leave=False, dynamic_ncols=True,
    ) as bar:  # fmt: skip
        for key, one in judged.items():
            values = bootstrap(
                one.confidences(),
                one.setting.success,
                one.setting.ood_index.size,
                resamples=resamples,
                seed=seed,
                stream=streams.get(one.name, 0),
                convention=convention,
                progress=bar.update,
            )
            yield key, values
            kind, _, of_several = key.partition("/")
            if of_several:
                parts[kind] = parts.get(kind, 0) + 1
                total = sums.setdefault(kind, {score: np.zeros_like(own) for score, own in values.items()})
                for score, own in values.items():
                    total[score] += own
    for kind, total in sums.items():
        yield kind, {score: own / parts[kind] for score, own in total.items()}


def _add_interval(report: Report, key: str, values: Mapping[str, Floats], baseline: str) -> None:
    """Intervals of one setting from its values on the resamples, (resamples, len(METRICS)) for each score."""
    point = report["settings"][key]
    found = {s: [interval(own[:, j]) for j in range(len(METRICS))] for s, own in values.items()}
    report["intervals"][key] = {
        s: {m: [i.low, i.high] for m, i in zip(METRICS, of, strict=True)} for s, of in found.items()
    }
    report["differences"][key] = {
        s: {m: [point[s][m] - point[baseline][m], i.low, i.high] for m, i in by_metric.items()}
        for s, by_metric in paired_differences(values, baseline)
    }
    # Whether a metric is defined depends on the outcomes alone, so it is the same for all scores.
    report["bootstrap"]["undefined_share"][key] = {
        m: i.undefined for m, i in zip(METRICS, found[baseline], strict=True) if i.undefined
    }


def _add_setting(report: Report, key: str, judged: Judged) -> None:
    setting, scores = judged.setting, judged.confidences()
    success: Ints = setting.success
    n, errors = success.size, int(success.size - success.sum())
    convention = report["convention"]
    report["settings"][key] = {s: failure_metrics(values, success, convention) for s, values in scores.items()}
    report["samples"][key] = {
        "n": n, "id": setting.id_index.size, "ood": setting.ood_index.size, "errors": errors,
    }  # fmt: skip
    report["aurc_floor"][key] = aurc_floor(n, errors)
    report["aurc_random"][key] = aurc_random(n, errors)
    report["undefined"][key] = undefined_reasons(success, convention)
    report["tied_share"][key] = {s: tied_share(values) for s, values in scores.items()}


def _add_mean(report: Report, kind: str, keys: Sequence[str]) -> None:
    """The plain mean over OOD or shifted sets: a large set counts no more than a small one."""
    scores = report["settings"][keys[0]]
    for section in ("aurc_floor", "aurc_random"):
        report[section][kind] = float(np.mean([report[section][key] for key in keys]))
    report["settings"][kind] = {
        score: {m: float(np.mean([report["settings"][key][score][m] for key in keys])) for m in METRICS}
        for score in scores
    }
    report["tied_share"][kind] = {
        score: float(np.mean([report["tied_share"][key][score] for key in keys])) for score in scores
    }
    report["undefined"][kind] = {
        metric: f"{setting_title(key)}: {why}" for key in keys for metric, why in report["undefined"][key].items()
    }


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def write_report(report: Report, path: str | Path) -> None:
    """Write a report as JSON that any parser reads: NaN as null. The file is whole or not there."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(_without_nan(report), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_report(path: str | Path) -> Report:
    """Read a report; a folder stands for the ``report.json`` in it. Null metrics come back as NaN.

    Raises:
        ValueError: not there, not JSON, or not a report that this version reads.
    """
    path = Path(path)
    path = path / "report.json" if path.is_dir() else path
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"there is no {path}; make one with: python -m tal_fast.evaluate --run {path.parent}"
        ) from None
    except (OSError, ValueError) as problem:
        raise ValueError(f"{path} cannot be read as JSON ({problem}); evaluate the run again") from None
    if not isinstance(report, dict) or report.get("format") != FORMAT or "settings" not in report:
        raise ValueError(f"{path} is not a report of format {FORMAT}; evaluate the run again")
    for by_score in report["settings"].values():
        for values in by_score.values():
            values.update({metric: math.nan for metric, value in values.items() if value is None})
    return report


def format_value(metric: str, value: float, units: str = "natural") -> str:
    """A metric for people: AURC and its kin with five decimals as fractions or two of a thousand, '-' for NaN."""
    if math.isnan(value):
        return "-"
    if units == "paper":
        return f"{value * PAPER_SCALE[metric]:.2f}"
    return f"{value:.5f}" if PAPER_SCALE[metric] == 1000 else f"{value:.4f}"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be: the first to the left, the others to the right.

    Cells of the header may have several lines, as many in each.
    """
    lines = [*zip(*(cell.split("\n") for cell in header), strict=True), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in lines
    )


def mix_and_seed(report: Report) -> str:
    """The mix, with its seed where that matters."""
    return f"{report['mix']}, seed {report['seed']}" if Mix.parse(report["mix"]).random else str(report["mix"])


def format_report(report: Report, units: str = "natural") -> str:
    """The report as tables, one a setting, with the floor of AURC and what a random score has."""
    scale = "natural units" if units == "natural" else "AURC, E-AURC and AUGRC times 1000, the rest in percent"
    counts = report["counts"]
    accuracy = f"{report['id_accuracy']:.2%}" if counts["id"] else "undefined"
    blocks = [
        f"ID accuracy {accuracy} ({counts['id_right']} of {counts['id']}); convention {report['convention']}; "
        f"ID:OOD mix {mix_and_seed(report)}; {scale}"
    ]
    if "bootstrap" in report:
        how = report["bootstrap"]
        blocks[0] += (
            f"\nintervals: {how['level']:.0%}, percentile bootstrap, {how['resamples']} resamples, seed {how['seed']}; "
            f"differences are paired"
        )
    if "calibration" in report:
        ece, nll, brier = (_or_nan(report["calibration"][key]) for key in CALIBRATION)
        blocks[0] += f"\nsoftmax on ID: ECE {ece:.4f} ({BINS} bins), NLL {nll:.4f} nats, Brier {brier:.4f}"
    if "temperature" in report:
        scaling = report["temperature"]
        blocks[0] += (
            f"\nlogits divided by T = {scaling['value']:.4f}, fitted on {scaling['held_out']} held-out samples "
            f"(ECE before {_or_nan(scaling['calibration_before']['ece']):.4f})"
        )
    for score, why in report.get("left_out", {}).items():
        blocks[0] += f"\nleft out: {score}: {why}"
    for key, by_score in report["settings"].items():
        blocks.append(_format_setting(report, key, by_score, units))
    return "\n\n".join(blocks)


def _format_setting(report: Report, key: str, by_score: Mapping[str, Mapping[str, float]], units: str) -> str:
    n = report["samples"].get(key)
    title = setting_title(key)
    of_shift = key.partition("/")[0] == "shift"
    sets = report.get("shift_names", []) if of_shift else report["ood_names"]
    if key in ("ood", "new_fd", "shift") and len(sets) == 1:
        title = setting_title(f"{key}/{sets[0]}")
    if n is None:
        head = f"{title}: mean over {len(sets)} {'shifted' if of_shift else 'OOD'} sets"
    else:
        head = f"{title}: {n['id']} ID" + (f" + {n['ood']} OOD" if n["ood"] else "") + f", {n['errors']} errors"
    floor, chance = (_or_nan(report[name][key]) for name in ("aurc_floor", "aurc_random"))
    rows = []
    for score, values in by_score.items():
        rows.append(
            [score, *(format_value(m, values[m], units) for m in SHOWN), _percent(report["tied_share"][key][score])]
        )
        if "intervals" in report:
            rows += _ends(report, report["intervals"][key][score], units)
    if "differences" in report:
        baseline = report["bootstrap"]["baseline"]
        for score, values in report["differences"][key].items():
            differences = {m: _or_nan(values[m][0]) for m in SHOWN}
            rows.append([f"{score} - {baseline}", *(format_value(m, differences[m], units) for m in SHOWN), ""])
            rows += _ends(report, {m: values[m][1:] for m in SHOWN}, units)
    lines = [
        f"{head}; AURC floor {format_value('aurc', floor, units)}, random {format_value('aurc', chance, units)}",
        format_table(["score", *(TITLES[m] for m in SHOWN), "tied"], rows),
    ]
    reasons = report["undefined"][key]
    for why in sorted(set(reasons.values())):
        lines.append(f"- undefined ({', '.join(TITLES[m] for m in SHOWN if reasons.get(m) == why)}): {why}")
    return "\n".join(lines)


def _ends(report: Report, intervals: Mapping[str, Sequence[float | None]], units: str) -> list[list[str]]:
    """The rows of the lower and the upper ends of intervals."""
    level = report["bootstrap"]["level"]
    return [
        [f"  {p:.3g}%", *(format_value(m, _or_nan(intervals[m][end]), units) for m in SHOWN), ""]
        for end, p in enumerate((50 * (1 - level), 50 * (1 + level)))
    ]


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _percent(share: float | None) -> str:
    return "-" if share is None or math.isnan(share) else f"{share:.1%}"
