"""TAL in a plain PyTorch loop, on scikit-learn's digits: ``python examples/training/plain_loop.py``."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tal_fast import TALLoss, scores
from tal_fast.metrics import failure_metrics
from tal_fast.models import expose_features


def network() -> nn.Module:
    convolutions = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10))


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--checkpoint", help="file to save to, and to go on from if it exists", default="digits.pt")
    options = parser.parse_args(arguments)

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    training = DataLoader(TensorDataset(images[:1400], labels[:1400]), batch_size=64, shuffle=True)

    model = expose_features(network(), images[:2])
    loss_fn = TALLoss(t_min=5, t_max=20, t_wrong=10)  # for few classes
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    start = 0
    try:
        checkpoint = torch.load(options.checkpoint, weights_only=True)
    except FileNotFoundError:
        pass
    else:
        model.load_state_dict(checkpoint["model"])
        loss_fn.load_state_dict(checkpoint["loss"])  # the queue of past samples
        optimizer.load_state_dict(checkpoint["optimizer"])
        start = checkpoint["epoch"]

    for epoch in range(start, options.epochs):
        model.train()
        for batch, targets in training:
            logits, features = model(batch)
            loss = loss_fn(logits, features, targets, warmup=epoch < 1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        state = {"model": model.state_dict(), "loss": loss_fn.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**state, "epoch": epoch + 1}, options.checkpoint)

    model.eval()
    with torch.no_grad():
        logits, _ = model(images[1400:])
    correct = logits.argmax(1) == labels[1400:]
    metrics = {"accuracy": float(correct.float().mean()), **failure_metrics(scores.cosine(logits), correct)}
    print(f"accuracy {metrics['accuracy']:.2%}, AURC {metrics['aurc']:.5f}")
    return metrics


if __name__ == "__main__":
    main()
