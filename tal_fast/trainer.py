"""The training loop, from the first step or from any a checkpoint was made at."""

from __future__ import annotations

import contextlib
import math
import random
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tal_fast import checkpoint as checkpoints
from tal_fast.config import Config
from tal_fast.data import build_data
from tal_fast.methods import build_method
from tal_fast.models import build_model
from tal_fast.optim import build_optimizer, learning_rate
from tal_fast.progress import Progress, epoch_line, shows_bar, write_metrics
from tal_fast.ranks import Ranks

CONFIG_FILE, METRICS_FILE = "config.yaml", "metrics.csv"

MAY_DIFFER = {
    "output",
    "resume",
    "eval_batch_size",
    "device",
    "threads",
    "progress",
    "data.root",
    "data.ood",
    "data.loader",
    "data.workers",
    "model.compile",
    "method.backend",
}
"""Options a resumed run may have otherwise than before: where and how fast it runs, not what it computes."""


class TrainingFailed(ValueError):
    """Training cannot go on; what was saved is still there."""


class Stopped(Exception):
    """A signal ended the run early; it is saved.

    Attributes:
        signal: its number.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.signal = number


class Trainer:
    """Trains one model as its configuration says.

    Args:
        config: the run; paths of data in it become absolute.
        ranks: this process among the others.

    Raises:
        ValueError: anything about the configuration, the data or a checkpoint to go on from that would not work,
            found before the first step.
    """

    def __init__(self, config: Config, ranks: Ranks | None = None) -> None:
        self.config = config.check()
        self.ranks = ranks or Ranks(0, 1, torch.device("cuda" if _wants_gpu(config) else "cpu"))
        device, world = self.ranks.device, self.ranks.world_size
        if config.batch_size % world:
            raise ValueError(
                f"batch_size {config.batch_size} is for all ranks together but does not divide among {world}; "
                f"use {max(1, config.batch_size // world) * world}"
            )
        self.output = Path(config.output)
        self._make_paths_absolute()
        resumed = self._find_checkpoint()

        self.data = build_data(config.data)
        loader_args: dict[str, Any] = {"rank": self.ranks.rank, "world_size": world, "device": device}
        self.train_loader = self.data.loader(
            "train", batch_size=config.batch_size // world, seed=config.seed, **loader_args
        )
        self.val_loader = self.data.loader("val", batch_size=config.eval_batch_size, **loader_args)

        _seed(config.seed)  # the same initial weights on all ranks
        network = build_model(config.model, self.data.num_classes, self.data.channels, self.data.image_size)
        if config.model.channels_last:
            network = network.to(memory_format=torch.channels_last)
        self.network = network.to(device)
        self.optimizer = build_optimizer(config.optim, self.network)
        self.method = build_method(config.method, config.epochs).to(device)
        _seed(config.seed + 1 + self.ranks.rank)  # what is random within a network differs between ranks

        self.epoch, self.step = 0, 0
        self.sums: dict[str, Tensor] = {}
        self.history: list[dict[str, float]] = []
        self.best: dict[str, float] = {"epoch": 0, "val_accuracy": -1.0}
        if resumed is not None:
            self._restore(*resumed)

        if config.model.compile:
            self.network.compile()  # before DDP, and in place: the state's keys stay as they are
        self.model: nn.Module = self.network
        if world > 1:
            self.model = DistributedDataParallel(
                self.network, device_ids=[device.index] if device.type == "cuda" else None
            )
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True

    # ---- Training ---------------------------------------------------------------------------------------------

    def fit(self, until: int | None = None) -> None:
        """Train, validate and save after each epoch.

        Args:
            until: stop after this epoch of the run instead of the last.

        Raises:
            Stopped: SIGTERM or Ctrl-C came; the step was finished and saved.
            TrainingFailed: the loss is not finite.
            UnreadableImage: an image file does not decode.
        """
        config = self.config
        self.ranks.barrier()  # every rank has seen whether the output folder held a run
        if self.ranks.is_main:
            self.output.mkdir(parents=True, exist_ok=True)
            config.save(self.output / CONFIG_FILE)
            if self.history:
                write_metrics(self.output / METRICS_FILE, self.history)
        if self.epoch >= config.epochs:
            self._say(f"{self.output} is trained already: {self.epoch} of {config.epochs} epochs")
            return
        self._say(
            f"{config.method.name} on {self.data.summary()}; {config.model.name}, "
            f"{sum(p.numel() for p in self.network.parameters()):,} parameters; {self.ranks.world_size} x "
            f"{self.ranks.device.type}, loader {self.data.loader_name}"
        )
        with StopRequest() as self._stop:
            for epoch in range(self.epoch, min(config.epochs, until or config.epochs)):
                started = time.perf_counter()
                row = self._train_epoch(epoch)
                row |= self._validate()
                self._finish_epoch(row)
                self._say(epoch_line(row, config.epochs, time.perf_counter() - started))
                if self.ranks.any(self._stop.number is not None):
                    self._end_early()
        if self.epoch == config.epochs:
            best = self.best
            self._say(
                f"done: best val acc {best['val_accuracy']:.2%} in epoch {best['epoch']}; results in {self.output}"
            )

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        config = self.config
        self.model.train()
        self.method.train()
        steps = len(self.train_loader)
        first = self.step
        self.train_loader.set_epoch(epoch, first)
        show = self.ranks.is_main and shows_bar(config.progress)
        progress = Progress(
            f"epoch {epoch + 1}/{config.epochs}", steps * config.batch_size, first * config.batch_size, show
        )
        started = time.perf_counter()
        waited = 0.0
        rate = 0.0
        batches = iter(self.train_loader)
        try:
            while True:
                asked = time.perf_counter()
                batch = next(batches, None)
                waited += time.perf_counter() - asked
                if batch is None:
                    break
                rate = learning_rate(config.optim, config.epochs, epoch + (self.step + 0.5) / steps)
                self._train_step(*batch[:2], epoch, rate)
                self.step += 1
                progress.step(config.batch_size, self._describe)
                if self.step < steps and self.ranks.any(self._stop.number is not None):
                    self._end_early()
        finally:
            progress.close()
        means = self._means()
        seconds = time.perf_counter() - started
        images = (self.step - first) * config.batch_size
        if not math.isfinite(means["train_loss"]):
            raise TrainingFailed(
                f"the training loss of epoch {epoch + 1} is {means['train_loss']}; lower optim.lr (now "
                f"{config.optim.lr:g}) or set optim.clip_norm, and go on with --resume auto or start anew"
            )
        self.epoch, self.step, self.sums = epoch + 1, 0, {}
        return {
            "epoch": epoch + 1,
            "lr": rate,
            **means,
            **self.method.epoch_metrics(),
            "images_per_s": images / seconds,
            "seconds": seconds,
            "data_wait": waited / seconds,
        }

    def _train_step(self, images: Tensor, labels: Tensor, epoch: int, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self._autocast():
            logits, features = self.model(self._arrange(images))
        loss, metrics = self.method(logits, features, labels, epoch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.config.optim.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.config.optim.clip_norm)
        self.optimizer.step()
        with torch.no_grad():  # on the device: nothing here waits for it
            right = (logits.argmax(1) == labels).sum()
            self._add("images", torch.full_like(right, len(labels)))
            self._add("train_accuracy", right)
            for name, mean in {"train_loss": loss, **metrics}.items():
                self._add(name, mean.detach().double() * len(labels))

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        self.ranks.broadcast_buffers(self.network)
        self.network.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.ranks.device)
        self.val_loader.set_epoch(0)
        for images, labels, _ in self.val_loader:
            with self._autocast():
                logits, _ = self.network(self._arrange(images))
            loss = F.cross_entropy(logits.float(), labels, reduction="sum")
            sums += torch.stack([loss.double(), (logits.argmax(1) == labels).sum(), (labels >= 0).sum()])
        loss_sum, right, count = self.ranks.sum(sums).tolist()
        return {"val_loss": loss_sum / count, "val_accuracy": right / count}

    def _autocast(self) -> torch.autocast:
        enabled = self.config.precision == "bfloat16"
        return torch.autocast(self.ranks.device.type, dtype=torch.bfloat16, enabled=enabled)

    def _arrange(self, images: Tensor) -> Tensor:
        if self.config.model.channels_last:
            return images.contiguous(memory_format=torch.channels_last)
        return images

    # ---- Numbers ----------------------------------------------------------------------------------------------

    def _add(self, name: str, value: Tensor) -> None:
        if name in self.sums:
            self.sums[name] += value
        else:
            self.sums[name] = value.double()

    def _means(self) -> dict[str, float]:
        """Means over the images of the epoch so far, of all ranks; waits for the device."""
        names = sorted(self.sums, key=lambda name: (name != "train_loss", name != "train_accuracy"))
        total = self.ranks.sum(torch.stack([self.sums[name] for name in names])).tolist()
        sums = dict(zip(names, total, strict=True))
        images = sums.pop("images")
        return {name: value / images for name, value in sums.items()}

    def _describe(self) -> str:
        images = float(self.sums["images"])
        loss, accuracy = (float(self.sums[name]) / images for name in ("train_loss", "train_accuracy"))
        return f"loss {loss:.4f}, acc {accuracy:.2%}"

    def _say(self, line: str) -> None:
        if self.ranks.is_main and self.config.progress != "none":
            with contextlib.suppress(OSError):  # a terminal that has gone must not end the run
                print(line, flush=True)

    # ---- Saving and resuming ----------------------------------------------------------------------------------

    def _finish_epoch(self, row: dict[str, float]) -> None:
        self.history.append(row)
        better = row["val_accuracy"] > self.best["val_accuracy"]
        if better:
            self.best = {"epoch": row["epoch"], "val_accuracy": row["val_accuracy"]}
        if self.ranks.is_main:
            write_metrics(self.output / METRICS_FILE, self.history)
        self.save(best=better)

    def save(self, best: bool = False) -> None:
        """Write checkpoints/last.pt, and best.pt as well if asked; all ranks must call it."""
        ranks = self.ranks.gather(
            {
                "method": _to_cpu(self.method.state_dict()),
                "rng": checkpoints.rng_state(),
                "sums": _to_cpu(self.sums),
            }
        )
        if not self.ranks.is_main:
            return
        content = {
            "config": self.config.to_dict(),
            "shape": self._shape(),
            "epoch": self.epoch,
            "step": self.step,
            "world_size": self.ranks.world_size,
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ranks": ranks,
            "best": self.best,
            "history": self.history,
        }
        folder = self.output / checkpoints.FOLDER
        if best:
            checkpoints.save(folder / checkpoints.BEST, content)
        checkpoints.save(folder / checkpoints.LAST, content, previous=folder / checkpoints.PREVIOUS)

    def _shape(self) -> dict[str, Any]:
        """What a model is built from besides its configuration."""
        return {
            "class_names": list(self.data.class_names),
            "channels": self.data.channels,
            "image_size": self.data.image_size,
            "train_images": self.train_loader.num_samples,
        }

    def _make_paths_absolute(self) -> None:
        data = self.config.data
        if data.root is not None:
            data.root = str(Path(data.root).absolute())
        data.ood = {name: str(Path(path).absolute()) for name, path in data.ood.items()}

    def _find_checkpoint(self) -> tuple[dict[str, Any], Path] | None:
        """The checkpoint to go on from, if any; refuses to run over another run."""
        folder = self.output / checkpoints.FOLDER
        resume = self.config.resume
        holds_run = checkpoints.exists(folder) or any((self.output / f).exists() for f in (CONFIG_FILE, METRICS_FILE))
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"output {self.output} is a file; name a folder")
        if resume == "never":
            if holds_run:
                raise ValueError(
                    f"{self.output} holds a run already; go on with it with --resume auto, or name another --output"
                )
            return None
        if resume == "auto":
            if not checkpoints.exists(folder):
                return None
            content, path, problems = checkpoints.load_newest(folder)
            for problem in problems:
                self._say(f"warning: {problem}; going on from {path} instead")
        else:
            path = Path(resume)
            if holds_run and path.absolute().parent != folder.absolute():
                raise ValueError(
                    f"{self.output} holds a run already, which resuming from {path} would overwrite; "
                    "name another --output"
                )
            content = checkpoints.load(path)
        self._refuse_other_config(content["config"], path)
        return content, path

    def _refuse_other_config(self, saved: dict[str, Any], path: Path) -> None:
        before, now = _flat(Config.from_dict(saved).to_dict()), _flat(self.config.to_dict())
        differing = [name for name in now if before.get(name) != now[name] and name not in MAY_DIFFER]
        if differing:
            what = ", ".join(f"{name} was {before.get(name)!r} and is {now[name]!r}" for name in differing)
            raise ValueError(
                f"{path} was made by another configuration ({what}); set it back, or start anew in another --output"
            )

    def _restore(self, content: dict[str, Any], path: Path) -> None:
        shape = self._shape()
        for name, what in (("class_names", "the classes"), ("image_size", "the image size")):
            if content["shape"][name] != shape[name]:
                raise ValueError(
                    f"{path} was made with {what} {content['shape'][name]} but the data have {shape[name]}; "
                    "point data.root at the same data, or start anew in another --output"
                )
        self.network.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.epoch, self.step = content["epoch"], content["step"]
        self.history, self.best = content["history"], content["best"]
        ranks = content["ranks"]
        rank, world = self.ranks.rank, self.ranks.world_size
        # With other ranks than before, each takes on a queue of one that was; only the first is as if never stopped.
        own = ranks[rank % len(ranks)]
        self.method.load_state_dict(own["method"])
        if len(ranks) == world:
            checkpoints.set_rng_state(own["rng"])
        if self.step:
            self.sums = {name: value.to(self.ranks.device) for name, value in own["sums"].items()}
        changed = [
            f"{what} {before} -> {now}"
            for what, before, now in (
                ("ranks", len(ranks), world),
                ("training images", content["shape"]["train_images"], shape["train_images"]),
            )
            if before != now
        ]
        if changed:
            self._say(
                f"warning: {', '.join(changed)} since {path}: the run goes on, but not bit for bit as it would have"
            )
            self.step, self.sums = 0, {}  # a step is no longer the same images: begin the epoch anew
        self._say(f"resuming from {path}: {self.epoch} epochs" + (f" and {self.step} steps" if self.step else ""))

    def _end_early(self) -> None:
        """Save and stop; all ranks are at the same step here."""
        if self.step:
            self.save()
        number = self._stop.number or signal.SIGTERM  # another rank may be the one that was told
        raise Stopped(
            number,
            f"stopped by {signal.Signals(number).name} and saved after {self.epoch} epochs and {self.step} steps; "
            "go on with --resume auto",
        )


class StopRequest(contextlib.AbstractContextManager["StopRequest"]):
    """Turns SIGTERM and the first Ctrl-C into a note to stop at the next step; a second Ctrl-C stops at once.

    Attributes:
        number: of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        with contextlib.suppress(ValueError):  # not in the main thread: whoever called it decides
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.number is not None:
            raise KeyboardInterrupt
        self.number = number


def _wants_gpu(config: Config) -> bool:
    return config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the global one, which a user's own model may draw from
    torch.manual_seed(seed)


def _to_cpu(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.detach().cpu().clone() if isinstance(value, Tensor) else value for key, value in state.items()}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key != "ood":
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
