"""Print expected.json: what version 0.1.0 reads in the files that make.sh has made in the current folder.

``tensors`` has the SHA-256 of every tensor of each checkpoint, ``configs`` the resolved configurations, ``losses`` the
loss of one fixed batch by each run's method, ``evaluation`` the metrics of the finished run and
``evaluation_of_outputs`` those of its stored logits, ``continued`` the last epoch's metrics of the interrupted runs
after they went on.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from tal_fast import checkpoint
from tal_fast.config import load_config
from tal_fast.evaluate.sources import evaluate_npz, evaluate_run
from tal_fast.trainer import Trainer

SCORES = ("logits", "features")
TIMINGS = ("images_per_s", "seconds", "data_wait")


def fingerprints(value: Any, name: str = "") -> dict[str, str]:
    """Place -> SHA-256 of type, shape and bytes, for every tensor in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        head = f"{value.dtype} {list(value.shape)} ".encode()
        return {name: hashlib.sha256(head + value.contiguous().numpy().tobytes()).hexdigest()}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {k: sha for key, item in items for k, sha in fingerprints(item, f"{name}/{key}".lstrip("/")).items()}


def evaluation() -> dict[str, Any]:
    """Metrics of the finished run in every setting, by every score."""
    report = evaluate_run(
        "run", "evaluation", scores=SCORES, ood={"noise": "gaussian:150"}, shifts={"contrast": "contrast:4"},
        typicalness=False,
    )  # fmt: skip
    return {key: report[key] for key in ("id_accuracy", "counts", "settings", "calibration")}


def evaluation_of_outputs() -> dict[str, Any]:
    """Metrics of stored logits, with intervals: no network's rounding is in them."""
    report = evaluate_npz("outputs.npz", "outputs", scores=["logits"], resamples=50)
    return {key: report[key] for key in ("id_accuracy", "settings", "calibration", "intervals")}


def resumed(run: Path, folder: str) -> Any:
    """A trainer that goes on with a copy of the run."""
    output = Path(folder) / run.name
    shutil.copytree(run, output)
    config = load_config(str(run / "config.yaml"))
    config.output, config.resume, config.method.backend = str(output), "auto", "auto"
    return Trainer(config)


def loss(run: Path) -> float:
    """Loss of a fixed batch by the run's method with its restored state."""
    trainer = resumed(run, "loss")
    trainer.method.start_epoch(trainer.epoch)
    logits, features = 3 * torch.arange(160.0).sin().view(16, 10), torch.arange(256.0).cos().abs().view(16, 16)
    return float(trainer.method(logits, features, torch.arange(16) % 10, torch.arange(16)).loss)


def continued(run: Path) -> dict[str, float]:
    """Metrics of the last epoch, after a copy of the run went on to its end."""
    trainer = resumed(run, "continued")
    trainer.fit()
    return {key: value for key, value in trainer.history[-1].items() if key not in TIMINGS}


torch.set_num_threads(1)
interrupted = sorted(Path("mid-epoch").iterdir())
runs = [Path("run"), *interrupted]
files = [run / "checkpoints" / "last.pt" for run in runs]
content: dict[str, Any] = {
    "tensors": {str(path): fingerprints(checkpoint.load(path)) for path in files},
    "configs": {str(run): load_config(str(run / "config.yaml")).to_dict() for run in runs},
    "losses": {str(run): loss(run) for run in runs},
    "evaluation": evaluation(),
    "evaluation_of_outputs": evaluation_of_outputs(),
    "continued": {str(run): continued(run) for run in interrupted},
}
print(json.dumps(content))
