"""TensorBoard and Weights & Biases loggers, beside metrics.csv, which is always written."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import secrets
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tal_fast.config.schema import Config
from tal_fast.runs.folder import METRICS_FILE
from tal_fast.training.epoch_stats import Histogram

logger = logging.getLogger(__name__)


class TensorBoard:
    """TensorBoard event files; events after ``first_step``, from before the run was resumed, are purged."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def histograms(self, values: Mapping[str, Histogram], step: int) -> None:
        for name, histogram in values.items():
            centres = [(a + b) / 2 for a, b in zip(histogram.edges, histogram.edges[1:], strict=False)]
            total = sum(histogram.counts)
            self._writer.add_histogram_raw(
                name,
                min=histogram.low,
                max=histogram.high,
                num=int(total),
                sum=sum(c * x for c, x in zip(histogram.counts, centres, strict=True)),
                sum_squares=sum(c * x * x for c, x in zip(histogram.counts, centres, strict=True)),
                bucket_limits=histogram.edges[1:],
                bucket_counts=histogram.counts,
                global_step=step,
            )

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Run of Weights & Biases, continued when the training is resumed; ``WANDB_MODE=offline`` needs no account."""

    def __init__(self, output: Path, config: Config) -> None:
        import wandb

        identity = output / "wandb" / "run-id.txt"
        identity.parent.mkdir(parents=True, exist_ok=True)
        if not identity.exists():
            identity.write_text(secrets.token_hex(4))
        self._wandb = wandb
        self._run = wandb.init(
            dir=str(output),
            id=identity.read_text().strip(),
            resume="allow",
            name=output.name,
            config=config.to_dict(),
            settings=wandb.Settings(silent=True),
        )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def histograms(self, values: Mapping[str, Histogram], step: int) -> None:
        histograms = {
            name: self._wandb.Histogram(np_histogram=(np.array(h.counts), np.array(h.edges)))
            for name, h in values.items()
        }
        self._run.log({**histograms, "step": step})

    def close(self) -> None:
        self._run.finish()


class Loggers:
    """All loggers of a run; errors of writing, such as a full disk, do not end it."""

    def __init__(self, config: Config, output: Path, first_step: int) -> None:
        self._loggers: list[TensorBoard | WandB] = []
        if config.logger in ("tensorboard", "all"):
            try:
                self._loggers.append(TensorBoard(output / "tensorboard", first_step))
            except ImportError:
                logger.info(
                    "note: TensorBoard is not installed (pip install tensorboard); logging to %s only", METRICS_FILE
                )
        if config.logger in ("wandb", "all"):
            self._loggers.append(WandB(output, config))

    def __bool__(self) -> bool:
        return bool(self._loggers)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers of one step of the run."""
        for each in self._loggers:
            with contextlib.suppress(OSError):
                each.scalars(values, step)

    def histograms(self, values: Mapping[str, Histogram], step: int) -> None:
        """Log distributions at one step of the run."""
        for each in self._loggers:
            with contextlib.suppress(OSError):
                each.histograms(values, step)

    def close(self) -> None:
        """Flush and close all loggers."""
        for each in self._loggers:
            with contextlib.suppress(OSError):
                each.close()
        self._loggers = []


def check_installed(name: str) -> None:
    """Raise ValueError if ``Config.logger`` asks for a logger that is required but not installed."""
    if name in ("wandb", "all") and importlib.util.find_spec("wandb") is None:
        raise ValueError(f"logger is {name!r} but wandb is not installed; pip install wandb, or set it to tensorboard")
