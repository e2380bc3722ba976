"""TAL in a LightningModule, on scikit-learn's digits: ``python examples/training/lightning_module.py``."""

import argparse

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tal_fast import TALLoss, scores
from tal_fast.metrics.torchmetrics import FailureMetric
from tal_fast.models import expose_features


class Classifier(lightning.LightningModule):
    def __init__(self, num_classes: int, warmup_epochs: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        convolutions = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()]
        network = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, num_classes))
        self.network = expose_features(network, torch.zeros(2, 1, 8, 8))
        self.loss_fn = TALLoss(t_min=5, t_max=20, t_wrong=10)  # for few classes; checkpoints hold its queue
        self.warmup_epochs = warmup_epochs
        self.aurc = FailureMetric("aurc")  # over all ranks

    def training_step(self, batch, batch_idx):
        images, labels = batch
        logits, features = self.network(images)
        loss = self.loss_fn(logits, features, labels, warmup=self.current_epoch < self.warmup_epochs)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        logits, _ = self.network(images)
        correct = logits.argmax(1) == labels
        self.log("accuracy", correct.float().mean(), prog_bar=True)
        self.aurc(scores.cosine(logits), correct)
        self.log("aurc", self.aurc, prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--output", default="lightning-run")
    parser.add_argument("--resume", help="checkpoint to go on from")
    options = parser.parse_args(arguments)

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    training = DataLoader(TensorDataset(images[:1400], labels[:1400]), batch_size=64, shuffle=True)
    validation = DataLoader(TensorDataset(images[1400:], labels[1400:]), batch_size=256)

    trainer = lightning.Trainer(
        max_epochs=options.epochs, gradient_clip_val=1.0, default_root_dir=options.output, log_every_n_steps=10
    )
    trainer.fit(Classifier(num_classes=10), training, validation, ckpt_path=options.resume)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    print(f"accuracy {metrics['accuracy']:.2%}, AURC {metrics['aurc']:.5f}")
    return metrics


if __name__ == "__main__":
    main()
