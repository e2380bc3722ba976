"""TensorBoard and Weights & Biases, beside metrics.csv, which is always written."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from tal_fast.config.schema import Config
from tal_fast.training.train_step import Histogram


class Logger(Protocol):
    """Somewhere numbers go."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of a step of the run."""
        ...

    def histograms(self, values: Mapping[str, Histogram], step: int) -> None:
        """Distributions at a step of the run."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


class TensorBoard:
    """Event files in ``folder``, for ``tensorboard --logdir``.

    Args:
        folder: of the event files.
        first_step: steps done; what an earlier part of the run logged of later ones is void.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See ``Logger``."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def histograms(self, values: Mapping[str, Histogram], step: int) -> None:
        """See ``Logger``."""
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
        """See ``Logger``."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases, gone on with when the training is; ``WANDB_MODE=offline`` needs no account.

    Args:
        output: the run's folder, where its identity is kept too.
        config: of the run.
    """

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
        """See ``Logger``."""
        self._run.log({**values, "step": step})

    def histograms(self, values: Mapping[str, Histogram], step: int) -> None:
        """See ``Logger``."""
        made = {
            name: self._wandb.Histogram(np_histogram=(np.array(h.counts), np.array(h.edges)))
            for name, h in values.items()
        }
        self._run.log({**made, "step": step})

    def close(self) -> None:
        """See ``Logger``."""
        self._run.finish()


class Loggers:
    """Those that a configuration asks for.

    Args:
        config: of the run.
        output: its folder.
        first_step: of the run, that this process begins with.

    Attributes:
        missing: a sentence for each that was asked for but is not installed.
    """

    def __init__(self, config: Config, output: Path, first_step: int) -> None:
        self.missing: list[str] = []
        self._loggers: list[Logger] = []
        if config.logger in ("tensorboard", "all"):
            try:
                self._loggers.append(TensorBoard(output / "tensorboard", first_step))
            except ImportError:
                self.missing.append(
                    "TensorBoard is not installed (pip install tensorboard); logging to metrics.csv only"
                )
        if config.logger in ("wandb", "all"):
            self._loggers.append(WandB(output, config))

    def __bool__(self) -> bool:
        return bool(self._loggers)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """To all of them."""
        for logger in self._loggers:
            with contextlib.suppress(OSError):  # a full disk must not end the run for a curve's sake
                logger.scalars(values, step)

    def histograms(self, values: Mapping[str, Histogram], step: int) -> None:
        """To all of them."""
        for logger in self._loggers:
            with contextlib.suppress(OSError):
                logger.histograms(values, step)

    def close(self) -> None:
        """Write what is left."""
        for logger in self._loggers:
            with contextlib.suppress(OSError):
                logger.close()
        self._loggers = []
