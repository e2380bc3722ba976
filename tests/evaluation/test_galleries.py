"""Which images are chosen for display."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from tal_fast.evaluation.evaluation import read_evaluation
from tal_fast.evaluation.galleries import GALLERY_SIZE, confidence_galleries, find_galleries, largest
from tal_fast.evaluation.sample_scores import Predictions, Samples
from tal_fast.runs.predictions import CACHE
from tests.helpers.evaluation import make_run, queue_state, record_passes


def test_the_largest_are_finite_ordered_and_few() -> None:
    values = np.array([1.0, np.inf, 3.0, np.nan, 3.0, 2.0])
    assert largest(values, np.array([1, 1, 1, 1, 1, 0], dtype=bool)).tolist() == [2, 4, 0]
    assert len(largest(np.arange(100.0), np.ones(100, dtype=bool))) == GALLERY_SIZE


def test_galleries_show_extremes_of_confidence() -> None:
    label, prediction = np.zeros(6, int), np.array([0, 1, 0, 1, 0, 1])
    predictions = {"val": Predictions(label, prediction, np.ones(6), np.arange(6))}
    scores = np.array([0.9, 0.2, 0.1, 0.8, 0.5, 0.6])
    ood = {"far": {"msp": np.array([0.3, 0.7])}}
    samples = Samples(predictions["val"].correct, {"msp": scores}, ood, {}, predictions)
    galleries = confidence_galleries(samples, "msp")
    assert [(gallery.kind, gallery.split, gallery.chosen.tolist()) for gallery in galleries] == [
        ("mistakes", "val", [3, 5, 1]), ("correct", "val", [2, 4, 0]), ("ood", "far", [1, 0]),
    ]  # fmt: skip


def test_galleries_of_a_saved_evaluation_run_no_network(evaluated_run: Path, monkeypatch: object) -> None:
    passes = record_passes(monkeypatch)
    evaluation = find_galleries(read_evaluation(evaluated_run), evaluated_run)
    assert passes == []
    assert [gallery.kind for gallery in evaluation.galleries] == [
        "mistakes", "correct", "ood", "least_typical", "most_typical",
    ]  # fmt: skip
    assert evaluation.typicalness is not None
    distance = evaluation.typicalness.distance
    least, most = (gallery.chosen for gallery in evaluation.galleries[-2:])
    assert distance[least].tolist() == sorted(distance, reverse=True)[:GALLERY_SIZE]
    assert distance[most].tolist() == sorted(distance)[:GALLERY_SIZE]
    assert evaluation.notes == ()
    without = find_galleries(read_evaluation(evaluated_run), evaluated_run, typicalness=False)
    assert without.notes == ("No typicalness: the pass over the training images was left out.",)
    assert len(without.galleries) == 3


def test_reasons_for_missing_galleries_are_noted(evaluated_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(evaluated_run, folder, ignore=shutil.ignore_patterns("checkpoints", CACHE))
    evaluation = read_evaluation(folder)
    evaluation.report["run"] = str(tmp_path / "gone")
    (note,) = find_galleries(evaluation, folder).notes
    assert note.startswith(f"No images: {tmp_path / 'gone'} holds no run of tal_fast.train; ")
    evaluation.report["run"] = str(make_run(tmp_path / "run", "ce"))
    assert find_galleries(evaluation, folder).notes == (
        "No typicalness: only runs trained with TAL keep the queue that it is measured by.",
    )
    both = make_run(tmp_path / "both", "fmfp-tal", ranks=[queue_state(40)])  # has a queue, too
    found = find_galleries(evaluation, both)
    assert (found.typicalness is not None, found.notes) == (True, ())
    evaluation.report["temperature"] = {"held_out": 7}
    assert find_galleries(evaluation, folder).notes == ("No images: val has 200 images now and had 207.",)
    del evaluation.report["run"]
    assert find_galleries(evaluation, folder).notes == ("No images: they are known for training runs only.",)
