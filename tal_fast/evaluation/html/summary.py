"""Texts of the page about the evaluation as a whole: title, headline numbers, conventions."""

from __future__ import annotations

from pathlib import Path

from tal_fast.evaluation.report import Report, mix_with_seed
from tal_fast.evaluation.tables import SETTING_TITLES, format_percent, format_value, nan_if_none, printable


def page_title(report: Report) -> str:
    """Name of the run or file that was evaluated."""
    if "run" in report:
        return printable(Path(report["run"]).resolve().name)
    return printable(Path(str(report.get("npz") or report.get("weights") or "evaluation")).name)


def model_description(report: Report) -> str:
    """Sentence that says what was evaluated."""
    if "method" not in report:
        return f"The model {printable(str(report['model']))}." if "model" in report else "The outputs of a model."
    return f"A model trained by {report['method'].upper()}, {report['checkpoint']} checkpoint, epoch {report['epoch']}."


def headline_numbers(report: Report, score: str) -> list[tuple[str, str, str]]:
    """(name, value, detail) of the numbers at the top of the page."""
    counts = report["counts"]
    accuracy = format_percent(nan_if_none(report["id_accuracy"]))
    numbers = [("ID accuracy", accuracy, f"{counts['id_right']:,} of {counts['id']:,}")]
    for key in ("old_fd", "ood", "new_fd"):
        if key in report["settings"]:
            values = report["settings"][key][score]
            aurc, auroc = (format_value(metric, nan_if_none(values[metric])) for metric in ("aurc", "auroc"))
            bounds = (format_value("aurc", nan_if_none(report[b].get(key))) for b in ("aurc_floor", "aurc_random"))
            detail = f"floor to random: {' to '.join(bounds)}; AUROC {auroc}"
            numbers.append((f"{SETTING_TITLES[key]} AURC", aurc, detail))
    calibration = report.get("calibration")
    if calibration:
        ece, nll, brier = (nan_if_none(calibration.get(key)) for key in ("ece", "nll", "brier"))
        numbers.append(("ECE of the softmax", f"{ece:.4f}", f"NLL {nll:.4f} nats, Brier {brier:.4f}"))
    return numbers


def conventions(report: Report) -> list[tuple[str, str]]:
    """(name, description) of everything that decides the numbers."""
    counts = report["counts"]
    sets = ", ".join(f"{printable(name)} ({n:,})" for name, n in counts["ood"].items()) or "none"
    entries = [
        ("convention of the metrics", report["convention"]),
        ("ID : OOD mix", mix_with_seed(report)),
        ("samples", f"{counts['id']:,} ID; OOD sets: {sets}"),
        ("units", "natural (fractions); papers print AURC, E-AURC and AUGRC times 1000, the rest in percent"),
        ("ties", "the column “tied” is the share of samples whose score equals another’s"),
    ]
    if "images" in report:
        how = report["images"]
        part = f"the central {how['crop_fraction']:.4g} of the shorter side" if "crop_fraction" in how else "all of it"
        mean, std = ("(" + ", ".join(f"{v:.4g}" for v in how[name]) + ")" for name in ("mean", "std"))
        size = f"{how['image_size']} × {how['image_size']} pixels"
        text = f"{part}, resized to {size} ({how['interpolation']}); normalised by mean {mean} and std {std}"
        entries.append(("images", text))
    if "temperature" in report:
        scaling = report["temperature"]
        text = f"{scaling['value']:.4g}, fitted on {scaling['held_out']:,} ID samples, which take part in nothing else"
        entries.append(("temperature", text))
    if report.get("left_out"):
        text = "; ".join(f"{score}: {printable(reason)}" for score, reason in report["left_out"].items())
        entries.append(("scores left out", text))
    if "bootstrap" in report:
        how = report["bootstrap"]
        text = f"{how['level']:.0%}, bootstrap of {how['resamples']:,} resamples: {printable(how['method'])}"
        entries.append(("intervals", text))
    versions = ", ".join(f"{printable(name)} {version}" for name, version in report.get("versions", {}).items())
    return [*entries, ("versions", versions)]
