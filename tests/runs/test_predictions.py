"""Passes of a model over a split, and the cache of their outputs."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tal_fast.evaluation.report import EvaluationOptions
from tal_fast.evaluation.sources import evaluate_run
from tal_fast.runs import predictions
from tal_fast.runs.load import load_run
from tal_fast.runs.predictions import Inference, PassOptions, cache_path, run_model
from tal_fast.utils.distributed import Ranks
from tests.helpers.evaluation import make_run


class IndexModel(nn.Module):
    """Logits and features that tell which image they come from."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = images.flatten(1)
        return torch.cat((x, -x), 1), 2 * x


def batches(indices: list[list[int]], dtype: torch.dtype = torch.float32) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for batch in indices:
        index = torch.tensor(batch)
        yield index[:, None].to(dtype), index % 2, index


@pytest.mark.parametrize(("dtype", "kept"), [(torch.bfloat16, "float32"), (torch.float64, "float64")])
def test_outputs_narrower_than_float32_are_widened(dtype: torch.dtype, kept: str) -> None:
    ((indices, outputs),) = run_model(IndexModel(), batches([[4, 1]], dtype))
    assert outputs.features is not None
    assert (outputs.logits.dtype, outputs.features.dtype) == (kept, kept)
    np.testing.assert_array_equal(indices, [4, 1])
    np.testing.assert_array_equal(outputs.logits[:, 0], [4, 1])
    np.testing.assert_array_equal(outputs.labels, [0, 1])


def test_a_masked_class_is_named() -> None:
    logits = np.zeros((4, 3))
    logits[:, 1] = -np.inf
    with pytest.raises(ValueError, match="sample 0 of 'val' are not finite; leave class 1 out, which is masked"):
        predictions.check_finite(predictions.Outputs(logits, None, np.zeros(4, int)), "val")


def test_outputs_that_are_not_finite_are_refused() -> None:
    broken = [(torch.tensor([[1.0], [float("nan")]]), torch.zeros(2), torch.tensor([7, 3]))]
    with pytest.raises(ValueError, match="the logits of sample 3 of 'val' are not finite"):
        list(run_model(IndexModel(), broken, name="val"))


def test_every_split_name_has_its_own_cache_folder(tmp_path: Path) -> None:
    names = ["val", "a/b", "a_b", "../val", "a b", "ä"]
    paths = {cache_path(tmp_path, name) for name in names}
    assert len(paths) == len(names)
    assert all(path.parent == tmp_path for path in paths)


def test_precision_of_the_network_is_part_of_the_cache_key(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path / "run"))
    exact, narrow = (
        Inference(run.model, run.data, tmp_path / "cache", PassOptions(amp=amp)).store("val").load()
        for amp in (None, "bfloat16")
    )
    assert exact.logits.dtype == narrow.logits.dtype == np.float32
    difference = np.abs(exact.logits - narrow.logits).max()
    assert 0 < difference < 0.1 * np.abs(exact.logits).max()
    # The network ran under autocast: all its logits are bfloat16 numbers.
    np.testing.assert_array_equal(torch.from_numpy(narrow.logits).bfloat16().float().numpy(), narrow.logits)


def test_an_unreadable_image_loses_nothing_computed_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Any, loader: Any, device: Any, name: str, *rest: Any) -> Any:
        for number, batch in enumerate(run_model(model, loader, device, name, *rest)):
            if number == 3:
                raise ValueError("an image does not decode")
            yield batch

    run = load_run(make_run(tmp_path / "run"))
    inference = Inference(run.model, run.data, tmp_path / "cache", PassOptions(batch_size=20))
    with monkeypatch.context() as patch:
        patch.setattr(predictions, "run_model", broken)
        with pytest.raises(ValueError, match="does not decode"):
            inference.store("val")
    (path,) = (tmp_path / "cache" / "val").glob("*/*.npz")
    assert len(np.load(path)["indices"]) == 60


def test_the_time_to_wait_for_the_loader_is_not_part_of_the_cache_key(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path / "run"))
    key = Inference(run.model, run.data, tmp_path)._model_key()
    assert Inference(run.model, run.data, tmp_path, PassOptions(timeout=5))._model_key() == key
    assert run.data.config.timeout == 5


KILLED = """
import os, signal, sys
import numpy as np
from tal_fast.runs import prediction_store
from tal_fast.runs.predictions import PassOptions
from tal_fast.evaluation.report import EvaluationOptions
from tal_fast.evaluation.sources import evaluate_run

prediction_store.SHARD_BYTES = 1  # a shard per batch
savez, left = np.savez, [4]

def killed(path, **arrays):
    left[0] -= 1
    if not left[0]:
        path.write_bytes(b"PK half a shard")
        os.kill(os.getpid(), signal.SIGKILL)
    savez(path, **arrays)

np.savez = killed
options = EvaluationOptions(scores=["cosine", "mahalanobis"])
evaluate_run(sys.argv[1], passes=PassOptions(batch_size=40), options=options)
"""


def test_a_killed_evaluation_resumes_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes, options = PassOptions(batch_size=40), EvaluationOptions(scores=["cosine", "mahalanobis"])
    run, whole = make_run(tmp_path / "run"), make_run(tmp_path / "whole")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(run)], capture_output=True, text=True, timeout=280)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (run / "report.json").exists()
    (half,) = run.rglob(".*-*.npz")
    computed = []

    def record(model: Any, loader: Any, device: Any, name: str, *rest: Any) -> Any:
        for indices, outputs in run_model(model, loader, device, name, *rest):
            computed.extend((name, int(i)) for i in indices)
            yield indices, outputs

    monkeypatch.setattr(predictions, "run_model", record)
    resumed = evaluate_run(run, passes=passes, options=options)
    assert not half.exists()
    # Three batches of 40 of the validation split had been stored.
    expected = [("val", i) for i in range(3 * 40, 200)] + [("ood-noise", i) for i in range(1000)]
    assert sorted(computed) == sorted(expected + [("train-eval", i) for i in range(400)])
    uninterrupted = evaluate_run(whole, passes=passes, options=options)
    assert resumed is not None
    assert uninterrupted is not None
    for section in ("settings", "calibration"):
        assert resumed.report[section] == uninterrupted.report[section]


def test_ranks_share_a_pass_and_finish_what_others_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "barrier", lambda self: None)
    monkeypatch.setattr(Ranks, "on_main", lambda self, function: function())
    run = load_run(make_run(tmp_path / "run"))
    whole = Inference(run.model, run.data, tmp_path / "whole").store("val").load()

    def rank(number: int, ranks: int) -> Inference:
        options = PassOptions(batch_size=33, ranks=Ranks(number, ranks, torch.device("cpu")))
        return Inference(run.model, run.data, tmp_path / "shared", options)

    # Alone, rank 2 of 3 computes a third of the samples and rank 1 of 2 half of the rest; one process finishes.
    shards = tmp_path / "shared" / "val"
    for number, ranks, stored in ((2, 3, 66), (1, 2, 133)):
        with pytest.raises(ValueError, match="all ranks must share that folder"):
            rank(number, ranks).store("val")
        assert sum(len(np.load(path)["indices"]) for path in shards.glob("*/[0-9]*.npz")) in (stored, stored + 1)
    outputs = rank(0, 1).store("val").load()
    np.testing.assert_array_equal(outputs.labels, whole.labels)
    np.testing.assert_allclose(outputs.logits, whole.logits, rtol=1e-4, atol=1e-5)
    indices = np.concatenate([np.load(path)["indices"] for path in shards.glob("*/[0-9]*.npz")])
    assert sorted(indices) == list(range(200))
