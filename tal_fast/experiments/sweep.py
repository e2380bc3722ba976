"""The same experiment as a sweep of Weights & Biases: a YAML file for ``wandb sweep``.

Its agent calls the trainer once for each combination of parameters, ``--name=value`` each. A method is a set of options
that go together, so it is a file: the parameter ``config`` takes one of those written beside the sweep. Grid values of
all methods are parameters of their own name; those of some methods only are in the files, one for each combination, so
that the sweep has the jobs of the runner and no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tal_fast.experiments.plan import Experiment, Values, label_of, points, resolve
from tal_fast.utils.io import replacing

# Each run has its own folder, which a stopped one goes on in; the agent puts both names in the environment.
_OUTPUT = '--output "runs/$WANDB_SWEEP_ID/$WANDB_RUN_ID" --resume auto "$@"'


def write_sweep(experiment: Experiment, path: Path, nproc: int | None = None) -> list[Path]:
    """Write the sweep, and the methods' configurations to a folder beside it.

    Args:
        experiment: whose jobs the sweep has.
        path: of the sweep's YAML. The agent has to run where this path is valid as it is given.
        nproc: processes of torchrun for each run; None: one process, without torchrun.

    Returns:
        The files written.
    """
    shared = [key for key in experiment.grid if all(key.applies_to(method) for method in experiment.methods)]
    own = [key for key in experiment.grid if key not in shared]
    folder = path.with_name(f"{path.stem}-configs")
    configs: dict[Path, Values] = {}
    for method in experiment.methods:
        for point in points(own, method):
            config = resolve(experiment, method, point)
            values = config.to_dict()
            for name in ("seed", "output", "resume"):  # the command's
                del values[name]
            values["logger"] = "all" if config.logger in ("tensorboard", "all") else "wandb"
            configs[folder / f"{label_of(method, point, config)}.yaml"] = values
    parameters: dict[str, Any] = {"config": {"values": [str(config) for config in configs]}}
    parameters["seed"] = {"values": list(experiment.seeds)}
    for key in shared:
        parameters[key.name] = {"values": [_word(value) for value in key.values]}
    sweep = {
        "program": "tal_fast.train",
        "method": "grid",
        "metric": {"name": "epoch/aurc", "goal": "minimize"},
        "parameters": parameters,
        "command": _command(nproc),
    }
    for file, values in [*configs.items(), (path, sweep)]:
        with replacing(file) as temporary:
            temporary.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return [*configs, path]


def _command(nproc: int | None) -> Sequence[str]:
    if nproc is None:
        return ["${env}", "sh", "-c", f'exec "$0" -m tal_fast.train {_OUTPUT}', "${interpreter}", "${args}"]
    launch = f"exec torchrun --standalone --nproc-per-node={nproc} -m tal_fast.train {_OUTPUT}"
    return ["${env}", "sh", "-c", launch, "torchrun", "${args}"]


def _word(value: Any) -> Any:
    """A value that the agent, which writes Python's ``str``, makes a word of that the trainer reads as YAML."""
    if value is None or isinstance(value, (list, dict)):
        return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()
    return value
