"""Fixtures for the tests of the evaluator."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tal_fast.evaluation import sources
from tal_fast.evaluation.report import EvaluationOptions
from tests.helpers.evaluation import make_run


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread, which is fastest for networks this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations in tests write no plots, which take most of their time; ``evaluated_run`` has them."""
    monkeypatch.setattr(sources, "write_plots", lambda evaluation, folder: None)


@pytest.fixture(scope="session")
def evaluated_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a TAL run on images in memory, evaluated with all logit scores and a shifted set. Read only."""
    run = make_run(tmp_path_factory.mktemp("runs") / "synthetic-tal")
    sources.evaluate_run(run, shifts={"noisy": "gaussian-noise"}, options=EvaluationOptions(scores=["logits"]))
    return run
