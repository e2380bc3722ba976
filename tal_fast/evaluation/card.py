"""Model card of an exported classifier: README.md in Hugging Face's format."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import jinja2
import yaml

from tal_fast.config.schema import OWN_OF_A_RANK, flatten
from tal_fast.evaluation.report import FILE, Report, read_report
from tal_fast.evaluation.tables import METRIC_TITLES, escape, format_table, format_value, mix_with_seed, setting_title
from tal_fast.runs import checkpoint
from tal_fast.runs.load import load_run
from tal_fast.runs.predictions import weights_hash
from tal_fast.utils.io import write_text


def check_report(run: Path, name: Literal["best", "last"], weights: str | None = None) -> Report | None:
    """Report of a run, None if there is none.

    Raises ValueError if it cannot be read, or is of other weights than those of the hash ``weights``; default those of
    the checkpoint ``name``.
    """
    if not (run / FILE).is_file():
        return None
    report = read_report(run)
    if report.get("weights_sha256") != (weights or weights_hash(load_run(run, name).model)):
        command = f"python -m tal_fast.evaluate --run {run} --checkpoint {name}"
        raise ValueError(f"{run / FILE} is of other weights than the export; make it again: {command}")
    return report


def write_card(run: Path, folder: Path, about: Mapping[str, Any], guarantee: str) -> Path | None:
    """Write the card of an export from files of the run and the export alone; None if there is one, which is kept.

    ``about`` is the content of the export's ``threshold.json`` and ``guarantee`` what it promises, in words. Raises
    ValueError as ``check_report``. The numbers are of the exported score if the report has it, else of the report's.
    """
    if (path := folder / "README.md").exists():
        return None
    content = checkpoint.load(run / checkpoint.FOLDER / f"{about['checkpoint']}.pt")
    options = {k: Path(v).name if str(v).startswith("/") else v for k, v in flatten(content["config"]).items()}
    name, source = run.resolve().name, {"name": options["data.root"] or options["data.dataset"], "type": "images"}
    metrics, results, rows, score = ("aurc", "augrc", "auroc", "fpr95"), [], [], about["score"]
    report = check_report(run, "best" if about["checkpoint"] == "best" else "last", about["weights_sha256"])
    if report:
        score = score if score in report["settings"]["old_fd"] else report["score"]
        scaled = f" on logits / {report['temperature']['value']:.4g}" if "temperature" in report else ""
        of = f" of {score}{scaled}" if scaled or score != about["score"] else ""
        for key, count in ((key, count) for key, count in report["samples"].items() if not key.startswith("ood")):
            values, title = report["settings"][key][score], setting_title(key, report)
            found = [("accuracy", "Accuracy", report["id_accuracy"])] if key == "old_fd" else []
            found += [(metric, f"{METRIC_TITLES[metric]}{of}, {title}", values[metric]) for metric in metrics]
            judged = [{"type": m, "name": full, "value": value} for m, full, value in found if not math.isnan(value)]
            results.append({"task": {"type": "image-classification"}, "dataset": dict(source), "metrics": judged})
            images = f"{count['id']:,}" + (f" + {count['ood']:,}" if count["ood"] else "")
            rows.append([escape(title, "markdown"), images, *(format_value(m, values[m]) for m in metrics)])
    header: dict[str, Any] = {"library_name": "tal-fast", "pipeline_tag": "image-classification"}
    header |= {"model-index": [{"name": name, "results": results}]} if results else {}
    text = jinja2.Template(Path(__file__).with_name("card.md.j2").read_text(), trim_blocks=True).render(
        name=name, about=about, guarantee=guarantee, report=report, score=score, options=options, content=content,
        source=source,
        table=format_table(["setting", "images", *(METRIC_TITLES[m] for m in metrics)], rows, "markdown"),
        header=yaml.safe_dump(header, sort_keys=False), mix=report and mix_with_seed(report),
        classes=_listed(content["shape"]["class_names"]), ood=_listed(report["ood_names"] if report else ()),
        shifts=_listed(report["shift_names"] if report else ()),
        config=yaml.safe_dump({k: v for k, v in options.items() if k not in OWN_OF_A_RANK}, sort_keys=False),
    )  # fmt: skip
    write_text(path, text)
    return path


def _listed(names: Iterable[str]) -> str:
    """Names as Markdown, those with a comma or quote in quotes."""
    quoted = (json.dumps(name, ensure_ascii=False) if {*name} & {",", '"'} else name for name in names)
    return escape(", ".join(quoted), "markdown")
