"""Comparison of methods: pages and figures match the committed results."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from bench import methods, small_folder
from tal_fast.experiments.parse import read_experiment
from tal_fast.experiments.results import check_options, read_results
from tal_fast.runs.resume import differences


@pytest.mark.parametrize("page", methods.PAGES, ids=lambda p: p.name)
def test_pages_match_the_committed_results(page: Path) -> None:
    text = page.read_text()
    assert "<!-- methods:" in text
    assert methods.fill_in(text) == text


def test_a_changed_result_changes_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = methods.RESULTS / "fashion-mnist-choice"
    results = json.loads((folder / "results.json").read_text())
    changed = copy.deepcopy(results)
    for run in changed["runs"]:
        for score in run["report"]["settings"]["old_fd"].values():
            score["aurc"] = 0.5
    before = methods.whole("fashion-mnist-choice")
    (tmp_path / "fashion-mnist-choice").mkdir()
    (tmp_path / "fashion-mnist-choice" / "results.json").write_text(json.dumps(changed))
    monkeypatch.setattr(methods, "RESULTS", tmp_path)
    assert "0.50000" in methods.whole("fashion-mnist-choice")
    assert "0.50000" not in before
    assert methods.whole("elsewhere") == methods.MISSING


def test_committed_results_are_complete_and_match_their_experiment_files() -> None:
    for folder in sorted(methods.RESULTS.iterdir()):
        if folder.is_dir():
            results = read_results(folder)
            assert not results["missing"], folder.name
            assert len(results["runs"]) == results["jobs"]
            experiment = read_experiment(methods.EXPERIMENTS / f"{folder.name}.yaml")
            check_options(results, experiment)
            jobs = {job.name: job for job in experiment.jobs}
            assert [
                run["name"] for run in results["runs"] if differences(run["config"], jobs[run["name"]].config)
            ] == []


def test_figures_are_drawn_from_the_committed_results(tmp_path: Path) -> None:
    for name in methods.plot(tmp_path):
        drawn = (methods.FIGURES / name).read_text()
        assert "<svg" in drawn
        assert (tmp_path / name).stat().st_size > 2000


def test_the_table_of_stable_training_is_what_was_measured() -> None:
    settings = json.loads(small_folder.RESULT.read_text())["settings"]
    assert settings.keys() == small_folder.SETTINGS.keys()
    assert small_folder.lines(settings) in (methods.ROOT / "docs" / "methods.md").read_text()
