"""TAL in the Hugging Face Trainer, on scikit-learn's digits: ``python examples/training/hf_trainer.py``."""

import argparse

import torch
from sklearn.datasets import load_digits
from transformers import ConvNextConfig, ConvNextForImageClassification, EvalPrediction, Trainer, TrainingArguments

from tal_fast import TALLoss, scores
from tal_fast.metrics import failure_metrics
from tal_fast.models import expose_features


def metrics(prediction: EvalPrediction) -> dict[str, float]:
    (logits, _features), labels = prediction
    correct = logits.argmax(1) == labels
    return {"accuracy": correct.mean(), **failure_metrics(scores.cosine(logits), correct)}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--output", default="hf-run")
    parser.add_argument("--resume", help="checkpoint folder to go on from")
    options = parser.parse_args(arguments)

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    data = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, digits.target, strict=True)]

    config = ConvNextConfig(
        num_channels=1, image_size=8, patch_size=2, num_stages=2, depths=[1, 1], hidden_sizes=[32, 64], num_labels=10
    )
    # Or AutoModelForImageClassification.from_pretrained.
    model = expose_features(ConvNextForImageClassification(config))
    # A part of the model: its checkpoints hold the queue, and evaluation, in eval mode, does not push to it.
    model.tal = TALLoss(t_min=5, t_max=20, t_wrong=10, reduction="sum")

    def loss(outputs, labels, num_items_in_batch=None):
        logits, features = outputs.logits
        total = model.tal(logits, features, labels, warmup=trainer.state.epoch < 1)
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)  # of all accumulated parts

    trainer = Trainer(
        model,
        TrainingArguments(
            options.output, num_train_epochs=options.epochs, per_device_train_batch_size=32,
            gradient_accumulation_steps=2, learning_rate=2e-3, max_grad_norm=1.0, save_strategy="epoch",
            report_to=[],
        ),
        train_dataset=data[:1400], eval_dataset=data[1400:], compute_loss_func=loss, compute_metrics=metrics,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=options.resume)
    result = trainer.evaluate()
    print(f"accuracy {result['eval_accuracy']:.2%}, AURC {result['eval_aurc']:.5f}")
    return result


if __name__ == "__main__":
    main()
