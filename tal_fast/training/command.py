"""Command line of training: ``python -m tal_fast.train --config digits-tal --output runs/digits``."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Collection, Iterator, Sequence

from tal_fast.config.parse import parse_training
from tal_fast.config.schema import Config
from tal_fast.utils.logs import console_logging
from tal_fast.utils.process import program_name, report_mistake
from tal_fast.utils.signals import Stopped, StopRequest

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, or with ``--bench`` measure the configuration's throughput and print it as JSON.

    Exits with code 2 after a mistake in the input; after a stop by signal, when the run is saved, with 75 (run the same
    command again) for SIGTERM and SIGUSR1 and with 130 for Ctrl-C.
    """
    with _exiting(ValueError):
        config, bench, given = parse_training(sys.argv[1:] if argv is None else argv, program_name("train"))
    level = logging.WARNING if config.progress == "none" else logging.INFO
    # Early, because loading PyTorch and finding a million images take a while.
    with console_logging(level), StopRequest() as stop:
        _train(config, stop, bench, given)


def _train(config: Config, stop: StopRequest, bench: bool, given: Collection[str] | None) -> None:
    # Imported after the options are checked, because importing torch takes seconds.
    import torch

    from tal_fast.data.headers import UnreadableImage
    from tal_fast.runs.checkpoint import Damaged
    from tal_fast.training.fit import fit, with_options
    from tal_fast.training.trainer import Trainer, TrainingFailed
    from tal_fast.utils.distributed import Ranks

    with _exiting(ValueError):
        if config.threads is not None:
            most = 16 * (os.cpu_count() or 1)  # beyond what the system starts, PyTorch crashes
            if config.threads > most:
                raise ValueError(f"threads is {config.threads}; use at most {most} here")
            torch.set_num_threads(config.threads)
        ranks = Ranks.start(config.device)
        if given is not None:
            values, text = ranks.on_main(lambda: fit(config, given, ranks.device))
            config = with_options(config, values)
            if ranks.is_main:
                logger.info("%s", text)
        if bench:
            from tal_fast.training.throughput import measure

            result = measure(config, ranks)
            if ranks.is_main:
                print(json.dumps(result, indent=1))
            return
        trainer = Trainer(config, ranks, stop)
    with _exiting(TrainingFailed, UnreadableImage, Damaged):
        trainer.fit()
    ranks.stop()


@contextlib.contextmanager
def _exiting(*mistakes: type[Exception]) -> Iterator[None]:
    """Context in which errors of these types, named in one sentence, and stops end the process with their codes."""
    try:
        yield
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(stopped, file=sys.stderr)
        raise SystemExit(stopped.exit_code) from None
    except mistakes as error:
        raise SystemExit(report_mistake(error)) from None
