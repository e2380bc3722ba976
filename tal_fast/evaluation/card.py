"""Model card of an exported classifier: README.md in Hugging Face's format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml

from tal_fast.config.schema import OWN_OF_A_RANK, flatten
from tal_fast.evaluation.report import FILE, read_report
from tal_fast.evaluation.tables import METRIC_TITLES, escape, format_table, format_value, mix_with_seed, setting_title
from tal_fast.runs import checkpoint
from tal_fast.utils.io import write_text


def write_card(run: Path, folder: Path, about: Mapping[str, Any], guarantee: str) -> Path:
    """Write the card of an export, its numbers from files of the run and the export alone; a card that is there stays.

    ``about`` is the content of the export's ``threshold.json`` and ``guarantee`` what it promises, in words. Raises
    ValueError if ``report.json`` is of other weights than the export, or cannot be read.
    """
    content = checkpoint.load(run / checkpoint.FOLDER / f"{about['checkpoint']}.pt")
    options = {k: Path(v).name if str(v).startswith("/") else v for k, v in flatten(content["config"]).items()}
    name, source = run.resolve().name, {"name": options["data.root"] or options["data.dataset"], "type": "images"}
    metrics, report, results, rows = ("aurc", "augrc", "auroc", "fpr95"), None, [], []
    if (run / FILE).is_file():
        report = read_report(run)
        if report.get("weights_sha256") != about["weights_sha256"]:
            command = f"python -m tal_fast.evaluate --run {run} --checkpoint {about['checkpoint'].partition('-')[0]}"
            raise ValueError(f"{run / FILE} is of other weights than the export; make it again: {command}")
        for key, count in ((key, count) for key, count in report["samples"].items() if not key.startswith("ood")):
            values, title = report["settings"][key][report["score"]], setting_title(key, report)
            found = [("accuracy", "Accuracy", report["id_accuracy"])] if key == "old_fd" else []
            found += [(metric, f"{METRIC_TITLES[metric]}, {title}", values[metric]) for metric in metrics]
            judged = [{"type": m, "name": full, "value": value} for m, full, value in found if not math.isnan(value)]
            results.append({"task": {"type": "image-classification"}, "dataset": dict(source), "metrics": judged})
            images = f"{count['id']:,}" + (f" + {count['ood']:,}" if count["ood"] else "")
            rows.append([escape(title, "markdown"), images, *(format_value(m, values[m]) for m in metrics)])
    header: dict[str, Any] = {"library_name": "tal-fast", "pipeline_tag": "image-classification"}
    header |= {"model-index": [{"name": name, "results": results}]} if results else {}
    text = jinja2.Template(Path(__file__).with_name("card.md.j2").read_text(), trim_blocks=True).render(
        name=name, about=about, guarantee=guarantee, report=report, options=options, content=content, source=source,
        table=format_table(["setting", "images", *(METRIC_TITLES[m] for m in metrics)], rows, "markdown"),
        header=yaml.safe_dump(header, sort_keys=False), mix=report and mix_with_seed(report),
        classes=escape(", ".join(content["shape"]["class_names"]), "markdown"),
        config=yaml.safe_dump({k: v for k, v in options.items() if k not in OWN_OF_A_RANK}, sort_keys=False),
    )  # fmt: skip
    if not (path := folder / "README.md").exists():
        write_text(path, text)
    return path
