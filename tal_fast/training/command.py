"""``python -m tal_fast.train --config digits-tal --output runs/digits``; under torchrun, on many processes.

With ``--bench``, measures the configuration instead and prints JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from tal_fast.config.schema import Config, find_config, parse_yaml, preset_names
from tal_fast.utils.signals import Stopped, StopRequest


def parse(argv: Sequence[str]) -> Config:
    """The configuration a command line asks for: defaults, then each ``--config``, then the other options.

    Raises:
        ValueError: an unknown preset, option or value.
        SystemExit: after ``--help``.
    """
    from jsonargparse import ArgumentError, ArgumentParser  # here, so that all else works without it

    parser = ArgumentParser(
        prog="python -m tal_fast.train",
        description=f"Train a classifier. Presets: {', '.join(preset_names())}.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="a preset's name or a YAML file; may be given more than once")
    parser.add_class_arguments(Config)
    parser.add_argument(
        "--bench", action="store_true", help="measure this configuration's throughput instead of training"
    )
    configs, others = _split_configs(argv)
    try:
        values = parser.parse_args([*configs, *others])
    except ArgumentError as error:
        raise ValueError(_first_sentence(str(error))) from None
    plain: dict[str, Any] = values.as_dict()
    plain.pop("config", None)
    plain.pop("bench")  # main's
    return Config.from_dict(plain).check()


def _split_configs(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(``--config`` options, their contents checked and in place; the other options)."""
    configs, others = [], []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name != "--config":
            if name.startswith("--") and not name.startswith("--data.ood."):  # whose names are the user's own
                name = "--" + name[2:].replace("-", "_")  # --batch-size is --batch_size
                name = {"--data_dir": "--data.root", "--log": "--logger"}.get(name, name)
            others.append(name + equals + value)
            continue
        if not equals:
            if not rest:
                raise ValueError(f"--config needs a preset or a file; the presets are {', '.join(preset_names())}")
            value = rest.pop(0)
        text = find_config(value)
        Config.from_dict(parse_yaml(text, value))  # clearer about a wrong name or value than the parser is
        configs.append(f"--config={text}")
    return configs, others


def _first_sentence(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(lines[:2])


def main(argv: Sequence[str] | None = None) -> None:
    """Train.

    Exits with 2 after a mistake of the user's; when it was told to stop and is saved, with 75 (run me again) after
    SIGTERM and SIGUSR1 and with 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if argv is None else argv
    try:
        config = parse(arguments)
    except ValueError as error:
        _refuse(error, 0)
    with StopRequest() as stop:  # as early as can be: loading PyTorch and finding a million images take a while
        _train(config, stop, bench="--bench" in arguments)


def _train(config: Config, stop: StopRequest, bench: bool) -> None:
    # Imported when the options are known to be right: torch takes seconds.
    import torch

    from tal_fast.data.image_folder import UnreadableImage
    from tal_fast.runs.checkpoint import Damaged
    from tal_fast.training.trainer import Trainer, TrainingFailed
    from tal_fast.utils.distributed import Ranks

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        ranks = Ranks.start(config.device)
    except ValueError as error:
        _refuse(error, 0)
    try:
        if bench:
            from tal_fast.training.throughput import measure

            result = measure(config, ranks)
            if ranks.is_main:
                print(json.dumps(result, indent=1))
            return
        trainer = Trainer(config, ranks, stop)
    except ValueError as error:
        _refuse(error, ranks.rank)
    try:
        trainer.fit()
    except (TrainingFailed, UnreadableImage, Damaged) as error:
        _refuse(error, ranks.rank)
    except Stopped as stopped:
        if ranks.is_main:
            print(stopped, file=sys.stderr)
        raise SystemExit(stopped.exit_code) from None
    ranks.stop()


def _refuse(error: Exception, rank: int) -> Any:
    where = f" (rank {rank})" if rank else ""
    sys.stderr.write(f"error{where}: {error}\n")  # in one piece, for ranks write at the same time
    raise SystemExit(2) from None
