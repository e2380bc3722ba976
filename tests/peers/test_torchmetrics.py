"""Failure metrics in torchmetrics' collections and Lightning's loops, on one process and on several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAUROC

from tal_fast.metrics import CONVENTIONS, HIGHER_IS_BETTER, METRICS, failure_metrics
from tal_fast.metrics.torchmetrics import FailureMetric


def case(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(n)
    scores = np.round(rng.random(n), 2)
    return torch.from_numpy(scores), torch.from_numpy(rng.random(n) < 0.3 + 0.6 * scores)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_collection_over_batches_has_the_values_of_everything_at_once(convention: str) -> None:
    scores, correct = case(257)
    metrics = MetricCollection({name: FailureMetric(name, convention) for name in METRICS} | {"roc": BinaryAUROC()})
    for part in torch.arange(257).split(60):
        metrics.update(scores[part], correct[part].long())
    values = metrics.compute()
    assert values.pop("roc").item() == pytest.approx(values["auroc"].item(), abs=1e-6)
    assert {name: value.item() for name, value in values.items()} == failure_metrics(scores, correct, convention)
    assert {name: metrics[name].higher_is_better for name in METRICS} == HIGHER_IS_BETTER
    metrics.reset()
    assert metrics["aurc"].compute().isnan()


def test_state_is_saved_and_types_are_kept(tmp_path: Path) -> None:
    scores, correct = case(50)
    metric = FailureMetric("auroc")
    metric.persistent(True)
    metric.update(scores.bfloat16().requires_grad_(), correct.tolist())
    torch.save(metric.state_dict(), tmp_path / "metric.pt")
    other = FailureMetric("auroc")
    other.load_state_dict(torch.load(tmp_path / "metric.pt", weights_only=True))
    assert other.compute().item() == failure_metrics(scores.bfloat16(), correct)["auroc"]
    assert (metric.compute().dtype, metric.compute().requires_grad) == (torch.float64, False)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown metric 'AURC'; choose from aurc, eaurc"):
        FailureMetric("AURC")
    with pytest.raises(ValueError, match="must be vectors"):
        FailureMetric("aurc").update(torch.rand(3, 1), torch.ones(3, 1))


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)
        self.aurc = FailureMetric("aurc")

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        logits = self.layer(batch[0])
        self.aurc(logits.amax(1), logits.argmax(1) == batch[1])
        self.log("aurc", self.aurc)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_lightning_logs_the_metric_of_each_epoch(tmp_path: Path) -> None:
    images, labels = torch.randn(37, 4), torch.randint(3, (37,))
    data = DataLoader(TensorDataset(images, labels), batch_size=10)
    trainer = lightning.Trainer(
        max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, default_root_dir=tmp_path,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    module = Module()
    trainer.fit(module, data, data)
    with torch.no_grad():
        logits = module.layer(images)
    want = failure_metrics(logits.amax(1), logits.argmax(1) == labels)["aurc"]
    assert trainer.callback_metrics["aurc"].item() == pytest.approx(want, abs=1e-6)


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    scores, correct = case(100)
    shared, alone = FailureMetric("aurc"), FailureMetric("augrc")
    part = slice(0, 61) if rank == 0 else slice(61, 100)
    shared.update(scores[part], correct[part])
    if rank == 0:
        alone.update(scores, correct)
    want = failure_metrics(scores, correct)
    assert (shared.compute().item(), alone.compute().item()) == (want["aurc"], want["augrc"])
    Path(folder, f"done-{rank}").touch()
    dist.destroy_process_group()


def test_ranks_with_unequal_counts_and_without_samples(tmp_path: Path) -> None:
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    assert sorted(path.name for path in tmp_path.glob("done-*")) == ["done-0", "done-1"]
