"""Export of an experiment to a Weights & Biases sweep.

The sweep has the same jobs as the scheduler. The agent calls the trainer with ``--name=value`` for each parameter. A
method is a set of options that belong together, so the parameter ``config`` names a file for each method and each
combination of the grid values that only some methods have. Grid values of all methods are parameters of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tal_fast.experiments.plan import Experiment, Values, grid_points, job_label, resolve
from tal_fast.utils.io import write_text

# Each run has a folder of its own to resume in; the agent sets both variables.
_OUTPUT = '--output "runs/$WANDB_SWEEP_ID/$WANDB_RUN_ID" --resume auto "$@"'


def write_sweep(experiment: Experiment, path: Path, nproc: int | None = None) -> list[Path]:
    """Write the sweep file, and the methods' configurations to a folder next to it; returns the written files.

    The agent has to run where ``path`` is valid as given. ``nproc`` is the number of processes of each run, started by
    torchrun; None for one process without torchrun.
    """
    shared = [key for key in experiment.grid if all(key.applies_to(method) for method in experiment.methods)]
    partial = [key for key in experiment.grid if key not in shared]
    folder = path.with_name(f"{path.stem}-configs")
    configs: dict[Path, Values] = {}
    for method in experiment.methods:
        for point in grid_points(partial, method):
            config = resolve(experiment, method, point)
            values = config.to_dict()
            for name in ("seed", "output", "resume"):  # set on the command line
                del values[name]
            values["logger"] = "all" if config.logger in ("tensorboard", "all") else "wandb"
            configs[folder / f"{job_label(method, point, config)}.yaml"] = values
    parameters: dict[str, Any] = {"config": {"values": [str(config) for config in configs]}}
    parameters["seed"] = {"values": list(experiment.seeds)}
    for key in shared:
        parameters[key.name] = {"values": [_parameter(value) for value in key.values]}
    sweep = {
        "program": "tal_fast.train",
        "method": "grid",
        "metric": {"name": "epoch/aurc", "goal": "minimize"},
        "parameters": parameters,
        "command": _command(nproc),
    }
    for file, values in [*configs.items(), (path, sweep)]:
        write_text(file, yaml.safe_dump(values, sort_keys=False))
    return [*configs, path]


def _command(nproc: int | None) -> Sequence[str]:
    if nproc is None:
        return ["${env}", "sh", "-c", f'exec "$0" -m tal_fast.train {_OUTPUT}', "${interpreter}", "${args}"]
    launch = f"exec torchrun --standalone --nproc-per-node={nproc} -m tal_fast.train {_OUTPUT}"
    return ["${env}", "sh", "-c", launch, "torchrun", "${args}"]


def _parameter(value: Any) -> Any:
    """Value that the agent, which writes Python's ``str``, turns into a word that the trainer reads as YAML."""
    if value is None or isinstance(value, (list, dict)):
        return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()
    return value
