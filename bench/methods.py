"""Tables and figures of the comparison of methods: ``python -m bench.methods``.

Reads bench/results/methods/NAME/results.json, which ``python -m tal_fast.experiment examples/experiments/NAME.yaml
--output bench/results/methods/NAME`` writes, and fills in the pages between their markers, and
docs/figures/methods-*.svg. The same results always give the same text; ``--check`` writes nothing and exits with 1
where a page is not what the results say. ``--typicalness RUN`` measures how near to its queue a TAL run finds its
validation images and OOD images, for its figure. ``--curves OUTPUT`` reads the risk-coverage curves of a folder
that ``python -m tal_fast.experiment`` has written, for README's figure.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.harness import environment, write_json
from bench.report.figures import FIGURES
from bench.report.pages import update_pages
from bench.report.results import ROOT
from bench.report.text import table
from tal_fast.config.methods import option_path
from tal_fast.evaluation.compare import Group
from tal_fast.experiments import select
from tal_fast.experiments.parse import read_experiment
from tal_fast.experiments.results import STAGES, Results, groups_of, read_results, training_seconds
from tal_fast.experiments.table import format_results, machines
from tal_fast.metrics.ranking import risk_coverage_curve
from tal_fast.metrics.settings import Mix, scored_settings
from tal_fast.runs.folder import METRICS_FILE

RESULTS = ROOT / "bench" / "results" / "methods"
EXPERIMENTS = ROOT / "examples" / "experiments"
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("getting-started", "results", "results-tables", "results-gpu")),
)
TYPICALNESS = RESULTS / "typicalness.json"
BINS = 40
CURVES = RESULTS / "curves.json"
CURVE_METHODS = {
    "ce": "cross-entropy, MSP",
    "tal-paper": "TAL (paper), cosine",
    "tal-released": "TAL (released), cosine",
    "fmfp": "FMFP, MSP",
}
OVERVIEW = (
    ("Fitted", "fashion-mnist-fitted", ("old_fd", "new_fd/mnist", "new_fd/patches")),
    ("Fitted", "fashion-mnist-fitted-unseen", ("new_fd/unseen",)),
    ("Short", "fashion-mnist", ("old_fd", "new_fd/mnist", "new_fd/patches")),
)
"""Columns of the overview: kind of training, experiment and settings."""

POINTS = 50
"""Points of a risk-coverage curve, at coverage 1/50, 2/50, ..., 1."""

MISSING = "Not measured yet.\n"


def read(name: str) -> Results | None:
    """The committed results of an experiment, if there are any."""
    folder = RESULTS / name
    return read_results(folder) if (folder / "results.json").exists() else None


def whole(name: str) -> str:
    """All tables of an experiment."""
    results = read(name)
    if results is None:
        return MISSING
    spent = sum(sum(run["seconds"].values()) for run in results["runs"])
    return (
        f"{format_results(results, 'markdown')}\n\n"
        f"`python -m tal_fast.experiment examples/experiments/{name}.yaml`: {len(results['runs'])} runs, "
        f"{spent / 3600:.1f} hours of one core, training and evaluation together.\n"
    )


def title_of(setting: str) -> str:
    """Short title of Old FD, or of New FD against a set."""
    return setting.replace("old_fd", "Old FD").replace("new_fd/", "New FD, ")


def gpu(name: str) -> str:
    """Hardware, hours, command and tables of an experiment for GPUs; its command while it has not been run."""
    command = f"python -m tal_fast.experiment examples/experiments/{name}.yaml --output bench/results/methods/{name}"
    results = read(name)
    if results is None:
        return f"Not run yet:\n\n```sh\n{command}\n```\n"
    per_stage = {stage: sum(run["seconds"][stage] for run in results["runs"]) / 3600 for stage in STAGES}
    hours = ", ".join(f"{row} {seconds / 3600:.1f}" for row, seconds in training_seconds(results).items())
    return (
        f"{len(results['runs'])} of {results['jobs']} runs; {per_stage['train']:.1f} hours of training and "
        f"{per_stage['evaluate']:.1f} of evaluation, of one device each. Hours of a run's training: {hours}.\n\n"
        f"```sh\n{command}\n```\n\n{format_results(results, 'markdown')}\n"
    )


def choice(name: str) -> str:
    """Table of the candidates and the chosen hyper-parameters."""
    results = read(name)
    if results is None:
        return MISSING
    experiment = read_experiment(str(EXPERIMENTS / f"{name}.yaml"))
    assert experiment.select is not None
    points = select.candidates(experiment, results, experiment.select)
    return f"```\n{select.format_selection(points, experiment, experiment.select)}\n```\n"


def summary(name: str) -> str:
    """Summary table of an experiment, and a sentence that compares each method with the baseline."""
    results = read(name)
    return MISSING if results is None else f"```\n{format_results(results, 'summary')}\n```\n"


def main_rows(name: str) -> str:
    """README's table: what matters of each method, beside its difference to cross-entropy."""
    results = read(name)
    if results is None:
        return MISSING
    groups = groups_of(results)
    sets = groups[0].reports[0]["ood_names"]
    columns = [("old_fd", "aurc"), *((f"new_fd/{one}", "aurc") for one in sets)]
    head = ["method, score", "accuracy", "Old FD AURC"]
    for one in sets:
        head += [f"New FD AURC, {one}"]

    def cell(group: Group, column: tuple[str, str]) -> str:
        values = [1e3 * v for v in group.values(column)]
        mean, spread = statistics.mean(values), statistics.stdev(values)
        text = f"{mean:.1f} ± {spread:.1f}"
        if column in group.best:
            text = f"**{text}**"
        if column in group.differences:
            found = group.differences[column]
            text += f" ({1e3 * found.value:+.1f} [{1e3 * found.low:+.1f}, {1e3 * found.high:+.1f}])"
        return text

    rows = []
    for group in groups:
        accuracy = f"{100 * group.accuracy.mean:.2f}% ± {100 * group.accuracy.std:.2f}"
        cells = [cell(group, column) for column in columns]
        rows.append([f"{group.name}, {group.score}", accuracy, *cells])
    return "\n".join([table(head, rows), "", *machines(results["environments"]), ""])


def scores(name: str) -> str:
    """Each method's own score beside the best of those evaluated, DS-AURC, and cost in trainings of the first row."""
    results = read(name)
    if results is None:
        return MISSING
    groups = groups_of(results)
    settings = ["old_fd", *(f"new_fd/{one}" for one in groups[0].reports[0]["ood_names"])]
    head = ["method", "cost", "accuracy"]
    for setting in settings:
        head += [f"{title_of(setting)}: own", "best", *(["DS"] if setting != "old_fd" else [])]

    def least(values: dict[str, list[float]]) -> str:
        means = {score: statistics.mean(of_runs) for score, of_runs in values.items()}
        score = min(means, key=lambda score: means[score])
        return f"{1e3 * means[score]:.1f} {score}"

    seconds = training_seconds(results)
    rows = []
    for group in groups:
        row = [group.name, f"{seconds[group.name] / seconds[groups[0].name]:.1f}", f"{100 * group.accuracy.mean:.2f}%"]
        for setting in settings:
            values: dict[str, list[float]] = {}
            joint: dict[str, list[float]] = {}
            for report in group.reports:
                for score, found in report["settings"][setting].items():
                    values.setdefault(score, []).append(found["aurc"])
                for pair, found in report.get("further", {}).get(setting, {}).items():
                    if "ds_aurc" in found:
                        joint.setdefault(pair, []).append(found["ds_aurc"])
            row += [f"{1e3 * statistics.mean(values[group.score]):.1f} {group.score}", least(values)]
            if setting != "old_fd":
                row.append(least(joint) if joint else "–")
        rows.append(row)
    return table(head, rows) + "\n"


def overview(_: str) -> str:
    """Difference in AURC to cross-entropy, in percent, by method; bold: better, italic: worse, beyond chance."""
    head, rows = ["method, score"], dict[str, list[str]]()
    for training, name, settings in OVERVIEW:
        results = read(name)
        if results is None:
            return MISSING
        groups = groups_of(results)
        for setting in settings:
            mean = statistics.mean(groups[0].values((setting, "aurc")))
            head.append(f"{training}: {title_of(setting)}")
            for group in groups[1:]:
                row = rows.setdefault(f"{group.name}, {group.score}", ["–"] * (len(head) - 2))
                value, low, high = (100 * v / mean for v in group.differences[setting, "aurc"][:3])
                mark = "**" if high < 0 else "*" if low > 0 else ""
                row.append(f"{mark}{value:+.0f}% [{low:+.0f}, {high:+.0f}]{mark}")
        for row in rows.values():
            row += ["–"] * (len(head) - 1 - len(row))
    return table(head, [[name, *cells] for name, cells in rows.items()]) + "\n"


BLOCKS: dict[str, Callable[[str], str]] = {
    "whole": whole, "gpu": gpu, "choice": choice, "summary": summary, "main": main_rows, "scores": scores,
    "overview": overview,
}  # fmt: skip


def fill_in(text: str) -> str:
    """A page with what stands between ``<!-- methods:KIND NAME -->`` and ``<!-- /methods -->`` made anew."""

    def block(match: re.Match[str]) -> str:
        kind, name = match[1], match[2]
        return f"<!-- methods:{kind} {name} -->\n\n{BLOCKS[kind](name)}\n<!-- /methods -->"

    return re.sub(r"<!-- methods:(\w+) ([\w-]+) -->.*?<!-- /methods -->", block, text, flags=re.DOTALL)


def of_method(results: Results, metric: tuple[str, str]) -> dict[str, list[float]]:
    """Row -> a value a run."""
    return {group.name: group.values(metric) for group in groups_of(results)}


def draw_ablation(plt: Any) -> Any:
    """Old FD and New FD of TAL's parts and of queues of other lengths."""
    results = read("fashion-mnist-ablation")
    if results is None:
        return None
    ood = groups_of(results)[0].reports[0]["ood_names"]
    metrics = [("old_fd", "aurc"), *((f"new_fd/{one}", "aurc") for one in ood)]
    figure, axes = plt.subplots(1, len(metrics), figsize=(3.2 * len(metrics), 3.2), sharey=True)
    for ax, metric in zip(axes, metrics, strict=True):
        values = of_method(results, metric)
        for row, (_, runs) in enumerate(values.items()):
            ax.plot([1e3 * v for v in runs], [row] * len(runs), "o", ms=4, color="tab:blue", alpha=0.6)
            ax.plot([1e3 * statistics.mean(runs)], [row], "|", ms=16, color="black")
        ax.set_yticks(range(len(values)), list(values))
        ax.set_xlabel(f"AURC x 1000, {title_of(metric[0])}")
    axes[0].invert_yaxis()
    figure.suptitle("Parts of TAL and the queue's length; bars are means over seeds")
    return figure


def draw_temperatures(plt: Any) -> Any:
    """AURC over T_min and T_max."""
    results = read("fashion-mnist-temperatures")
    if results is None:
        return None
    grids = {run["label"]: {option_path(key): v for key, v in run["grid"].items()} for run in results["runs"]}
    points = {label: (grid["method.options.t_min"], grid["method.options.t_max"]) for label, grid in grids.items()}
    low, high = (sorted({point[i] for point in points.values()}) for i in (0, 1))
    ood = groups_of(results)[0].reports[0]["ood_names"]
    metrics = [("old_fd", "aurc"), *((f"new_fd/{one}", "aurc") for one in ood)]
    figure, axes = plt.subplots(1, len(metrics), figsize=(3.2 * len(metrics), 3.0))
    for ax, metric in zip(axes, metrics, strict=True):
        grid = [[math.nan] * len(high) for _ in low]
        for label, values in of_method(results, metric).items():
            at = points[label]
            grid[low.index(at[0])][high.index(at[1])] = 1e3 * values[0]
        ax.imshow(grid, cmap="viridis_r", aspect="auto")
        middle = (min(map(min, grid)) + max(map(max, grid))) / 2
        for i, row in enumerate(grid):
            for j, value in enumerate(row):
                color = "black" if value < middle else "white"  # low values are yellow
                ax.text(j, i, f"{value:.1f}", ha="center", va="center", color=color, fontsize=9)
        ax.set_xticks(range(len(high)), [f"{v:g}" for v in high])
        ax.set_yticks(range(len(low)), [f"{v:g}" for v in low])
        ax.set(xlabel="T_max", ylabel="T_min")
        ax.set_title(title_of(metric[0]), fontsize=10)
    figure.suptitle("AURC x 1000 over the range of temperatures, one seed each")
    return figure


def draw_typicalness(plt: Any) -> Any:
    """How typical a run finds images of its classes and others."""
    if not TYPICALNESS.exists():
        return None
    content = json.loads(TYPICALNESS.read_text())
    figure, ax = plt.subplots(figsize=(5.5, 3.2))
    for name, shares in content["shares"].items():
        ax.stairs(shares, content["edges"], label=name, lw=1.5)
    ax.set(xlabel="distance to the queue, in logarithms to base 10", ylabel="share of the images")
    ax.set_title("Images by their distance to the queue: the nearer, the more typical", fontsize=10)
    ax.legend(fontsize=8)
    return figure


def draw_curves(plt: Any) -> Any:
    """Risk against coverage of cross-entropy and TAL: mean and standard deviation over seeds."""
    if not CURVES.exists():
        return None
    import numpy as np

    content = json.loads(CURVES.read_text())
    settings = content["settings"]
    figure, axes = plt.subplots(1, len(settings), figsize=(3.6 * len(settings), 3.3))
    coverage = 100 * np.arange(1, POINTS + 1) / POINTS
    for ax, (setting, runs_of) in zip(axes, settings.items(), strict=True):
        for (method, label), style in zip(CURVE_METHODS.items(), ("-", "--", "-.", ":"), strict=True):
            risks = 100 * np.array([run["risk"] for run in runs_of[method]])
            mean, spread = risks.mean(0), risks.std(0, ddof=1)
            area = 1e3 * statistics.mean(run["aurc"] for run in runs_of[method])
            (line,) = ax.plot(coverage, mean, style, lw=1.6, label=f"{label}\nAURC x 1000: {area:.1f}")
            ax.fill_between(coverage, mean - spread, mean + spread, color=line.get_color(), alpha=0.15, lw=0)
        title = setting.replace("old_fd", "Old FD").replace("new_fd/", "New FD, OOD: ")
        ax.set(title=title, xlabel="coverage (%)", xlim=(0, 100))
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    axes[0].set_ylabel("risk: errors among accepted (%)")
    return figure


DRAWINGS = {
    "ablation": draw_ablation,
    "curves": draw_curves,
    "temperatures": draw_temperatures,
    "typicalness": draw_typicalness,
}


def plot(folder: Path) -> list[str]:
    """Draw what there are results of; the files' names."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "tal-fast", "svg.fonttype": "none"})  # the same picture, the same file
    drawn = []
    for name, draw in DRAWINGS.items():
        figure = draw(plt)
        if figure is not None:
            figure.tight_layout()
            figure.savefig(folder / f"methods-{name}.svg", metadata={"Date": None})
            plt.close(figure)
            drawn.append(f"methods-{name}.svg")
    return drawn


def measure_typicalness(run_dir: str) -> dict[str, Any]:
    """Distances to the queue of a run's last checkpoint: validation images, right and wrong, and OOD images.

    Args:
        run_dir: of a run by ``tal`` or ``fmfp-tal``.
    """
    import numpy as np
    import torch

    from tal_fast.data.ood import ood_set
    from tal_fast.evaluation.train_typicalness import queue_of
    from tal_fast.loss.reference import feature_statistics
    from tal_fast.runs import checkpoint
    from tal_fast.runs.load import load_run

    run = load_run(run_dir, "last")
    queue = queue_of(checkpoint.load(run.checkpoint))
    sets: dict[str, Any] = {"val": "val", **{name: name for name in run.data.ood_names}}
    sets["patches"] = ood_set("patches", run.data.image_size, run.data.channels)
    found: dict[str, list[float]] = {}
    with torch.inference_mode():
        for name, split in sets.items():
            for images, labels, _ in run.data.loader(split, batch_size=256):
                logits, features = run.model(images)
                mean, std = feature_statistics(features, queue.dtype)
                right = (logits.argmax(1) == labels).tolist()
                for distance, hit in zip(queue.nearest(mean, std).tolist(), right, strict=True):
                    found.setdefault(("right" if hit else "wrong") if name == "val" else name, []).append(distance)
    logs = {name: np.log10(np.maximum(values, 1e-9)) for name, values in found.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(logs.values())), BINS)
    return {
        "what": "distance to the queue",
        "environment": environment(),
        "configuration": run.config.to_dict() | {"output": "", "resume": ""},
        "queue": len(queue),
        "images": {name: len(values) for name, values in found.items()},
        "median": {name: float(np.median(values)) for name, values in found.items()},
        "edges": edges.tolist(),
        "shares": {name: (np.histogram(v, edges)[0] / len(v)).tolist() for name, v in logs.items()},
    }


def measure_curves(folder: Path) -> dict[str, Any]:
    """Risk-coverage curves of the runs by ``CURVE_METHODS`` in an experiment, and the training accuracy of all runs.

    Args:
        folder: output folder of ``python -m tal_fast.experiment``, with its runs.
    """
    import numpy as np

    results = read_results(folder)
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    fitted: dict[str, list[float]] = {}
    for run in results["runs"]:
        with (folder / "runs" / run["name"] / METRICS_FILE).open(newline="") as file:
            fitted.setdefault(run["method"], []).append(float([*csv.DictReader(file)][-1]["train_accuracy"]))
        if run["method"] not in CURVE_METHODS:
            continue
        report, score = run["report"], run["report"]["score"]
        with np.load(folder / "runs" / run["name"] / "samples.npz") as samples:
            id_scores = {score: samples[f"id/{score}"]}
            ood_scores = {name: {score: samples[f"ood/{name}/{score}"]} for name in report["ood_names"]}
            correct = samples["right"]
        judged = scored_settings(correct, id_scores, ood_scores, mix=Mix.parse(report["mix"]), seed=report["seed"])
        for setting, one in judged.items():
            if setting == "old_fd" or setting.startswith("new_fd"):
                curve = risk_coverage_curve(one.confidences()[score], one.setting.success)
                n = curve.risk.size
                risk = [round(float(curve.risk[-(-i * n // POINTS) - 1]), 5) for i in range(1, POINTS + 1)]
                entry = {"seed": run["seed"], "aurc": float(curve.risk.mean()), "risk": risk}
                found.setdefault(setting, {}).setdefault(run["method"], []).append(entry)
    return {
        "what": "risk at coverage 1/50, 2/50, ..., 1",
        "experiment": results["experiment"],
        "environments": results["environments"],
        "train_accuracy": fitted,
        "settings": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page is out of step")
    parser.add_argument("--typicalness", metavar="RUN", help=f"measure, and write {TYPICALNESS.relative_to(ROOT)}")
    parser.add_argument("--curves", metavar="OUTPUT", type=Path, help=f"read, and write {CURVES.relative_to(ROOT)}")
    args = parser.parse_args()
    if args.curves:
        write_json(CURVES, measure_curves(args.curves))
    if args.typicalness:
        write_json(TYPICALNESS, measure_typicalness(args.typicalness))
    stale = update_pages(PAGES, fill_in, check=args.check, command="python -m bench.methods")
    if args.check:
        return
    print(f"wrote {', '.join(stale) or 'no page anew'}; {', '.join(plot(FIGURES)) or 'no figure'}")


if __name__ == "__main__":
    main()
