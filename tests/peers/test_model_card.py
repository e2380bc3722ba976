"""Model cards as huggingface_hub reads them."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

from tal_fast.evaluation.export_command import main
from tal_fast.evaluation.sources import evaluate_run
from tests.helpers.evaluation import make_run, read_json


def test_the_hub_reads_the_metadata_and_the_results(tmp_path: Path) -> None:
    run, output = make_run(tmp_path / "run"), tmp_path / "out"
    evaluate_run(run, typicalness=False)
    assert main(["--run", str(run), "--output", str(output), "--format", "torch-export", "--card"]) == 0
    card = ModelCard.load(output / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("tal-fast", "image-classification")
    results = {result.metric_name: result for result in card.data.eval_results}
    report = read_json(run)
    assert card.data.model_name == "run"
    assert len(results) == 9
    assert results["Accuracy"].metric_value == report["id_accuracy"]
    aurc = results["AURC, New FD against noise"]
    assert (aurc.metric_type, aurc.dataset_name, aurc.task_type) == ("aurc", "synthetic", "image-classification")
    assert aurc.metric_value == report["settings"]["new_fd"][report["score"]]["aurc"]
    again = ModelCard(card.content)  # the hub writes what it has read
    assert again.data.to_dict() == card.data.to_dict()
    assert "## When it abstains" in card.text
