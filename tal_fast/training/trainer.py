"""The training loop, from the first step or from any a checkpoint was made at."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math
import random
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tal_fast.config.schema import Config
from tal_fast.data import build_data
from tal_fast.data.image_folder import UnreadableImage
from tal_fast.data.loader import Images, Loader
from tal_fast.data.ood import ood_set
from tal_fast.methods import Task, build_method, method_class
from tal_fast.metrics.failure import failure_metrics
from tal_fast.models import build_model
from tal_fast.runs import checkpoint as checkpoints
from tal_fast.runs.resume import CONFIG_FILE, METRICS_FILE, changes, find_checkpoint, refuse_other_data
from tal_fast.training.cuda_graph import GraphedStep
from tal_fast.training.loggers import Loggers
from tal_fast.training.optim import build_optimizer, learning_rate, set_learning_rate
from tal_fast.training.profiler import Profiler
from tal_fast.training.progress import Progress, epoch_line, memory_in_use, shows_bar, write_metrics
from tal_fast.training.runtime import Execution
from tal_fast.training.sam import Ascent
from tal_fast.training.train_step import EpochSums, TrainStep
from tal_fast.training.weight_averaging import STATISTICS_IMAGES, MovingAverage, StochasticAverage
from tal_fast.utils.distributed import Ranks
from tal_fast.utils.signals import Stopped, StopRequest

_UNREADABLE = 1 << 10
"""What a rank tells the others instead of a signal's number when its loader has failed."""

_FAILURE_METRICS = ("aurc", "auroc", "fpr95")
"""Of the validation images (setting Old FD), measured after each epoch."""


class TrainingFailed(ValueError):
    """Training cannot go on; what was saved is still there."""


class Trainer:
    """Trains one model as its configuration says.

    Args:
        config: the run; paths of data in it become absolute.
        ranks: this process among the others.
        stop: where a request to stop is noted; one of its own by default.

    Raises:
        ValueError: anything about the configuration, the data or a checkpoint to go on from that would not work,
            found before the first step.
    """

    def __init__(self, config: Config, ranks: Ranks | None = None, stop: StopRequest | None = None) -> None:
        self.config = config.check()
        self.ranks = ranks or Ranks(0, 1, torch.device("cuda" if _wants_gpu(config) else "cpu"))
        device, world = self.ranks.device, self.ranks.world_size
        self.execution = Execution.of(config, device)
        self._check_together()
        self.output = Path(config.output)
        self._make_paths_absolute()
        # One rank looks, for what the others would see may differ: only its folder need be there.
        resumed = self.ranks.on_main(lambda: find_checkpoint(config, self._say))

        self.data = build_data(config.data)
        loader_args: dict[str, Any] = {
            "rank": self.ranks.rank,
            "world_size": world,
            "device": device,
            "skip_unreadable": True,
        }
        self.train_loader = self.data.loader(
            "train", batch_size=config.batch_size // world, seed=config.seed, **loader_args
        )
        self.val_loader = self.data.loader("val", batch_size=config.eval_batch_size, **loader_args)

        _seed(config.seed)  # the same initial weights on all ranks
        outputs = self.data.num_classes + method_class(config.method.name).extra_classes
        network = build_model(config.model, outputs, self.data.channels, self.data.image_size)
        if config.model.sync_batchnorm:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        if self.execution.channels_last:
            network = network.to(memory_format=torch.channels_last)
        self.network = network.to(device)
        self.optimizer = build_optimizer(config.optim, self.network)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.execution.scales_gradients)
        task = Task(config.epochs, self.data.num_classes, len(self.data.split("train")), config.optim.lr)
        self.method = build_method(config.method, task).to(device)
        learned = [name for name, parameter in self.method.named_parameters() if parameter.requires_grad]
        if learned:
            raise ValueError(
                f"the method {config.method.name} has the parameter {learned[0]}, which no optimizer steps; keep state "
                "in get_extra_state, and what is learned in the network"
            )
        self._ascent = None if self.method.radius is None else Ascent(self.network.parameters(), self.method.radius)
        self.average = self._make_average()
        self._outliers = None
        if self.method.outliers is not None:
            outliers = ood_set(self.method.outliers, self.data.image_size, self.data.channels)
            # Of another seed, or pairs of a place in both orders would meet in every epoch.
            try:
                self._outliers = self.data.loader(
                    outliers, batch_size=config.batch_size // world, seed=config.seed + 1, training=True, **loader_args
                )
            except ValueError as problem:
                raise ValueError(f"the outliers {self.method.outliers}: {problem}") from None
        _seed(config.seed + 1 + self.ranks.rank)  # what is random within a network differs between ranks

        self.epoch, self.step = 0, 0
        self.sums = EpochSums(self.method, device)
        self._unreadable: set[str] = set()  # those that were said
        self.history: list[dict[str, float]] = []
        self.best: dict[str, float] = {"epoch": 0, "val_accuracy": -1.0}
        if resumed is not None:
            self._restore(*resumed)

        train_step = TrainStep(self.network, self.method, self.execution)
        self._predict = _predict
        if self.execution.compile:
            train_step.compile()  # before DDP, and in place: the network's state has the keys it has without
            self._predict = torch.compile(_predict)
        self.model: nn.Module = train_step
        if world > 1:
            self.model = DistributedDataParallel(
                train_step, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
            )
        self._graph = GraphedStep(self._update, self._free_gradients) if config.cuda_graphs else None
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high")  # TF32 where the network is not under autocast

        self._writer = checkpoints.Writer(self.output / checkpoints.FOLDER)
        self._stop = stop or StopRequest()
        self._loggers: Loggers | None = None
        trace = self.output / "profile" / f"trace-rank{self.ranks.rank}.json"
        self._profiler = Profiler(*config.profile_window(), trace)

    # ---- Training ---------------------------------------------------------------------------------------------

    def fit(self, until: int | None = None) -> None:
        """Train, validate and save after each epoch.

        Args:
            until: stop after this epoch of the run instead of the last.

        Raises:
            Stopped: SIGTERM, SIGUSR1 or Ctrl-C came; the step was finished and saved.
            TrainingFailed: the loss is not finite, or the last checkpoint could not be written.
            UnreadableImage: an image file does not decode; the steps before it are saved.
        """
        config = self.config
        if self.ranks.is_main:
            self.output.mkdir(parents=True, exist_ok=True)
            checkpoints.clean(self.output)
            config.save(self.output / CONFIG_FILE)
            if self.history:
                write_metrics(self.output / METRICS_FILE, self.history)
        if self.epoch >= config.epochs:
            self._say(f"{self.output} is trained already: {self.epoch} of {config.epochs} epochs")
            return
        self._say(
            f"{config.method.name} on {self.data.summary()}; {config.model.name}, "
            f"{sum(p.numel() for p in self.network.parameters()):,} parameters; {self.ranks.world_size} x "
            f"{self.ranks.device.type}, {self.execution.summary()}, loader {self.data.loader_name}"
        )
        if self.ranks.is_main:
            self._loggers = Loggers(config, self.output, self._steps_done)
            for sentence in self._loggers.missing:
                self._say(f"note: {sentence}")
        problem = None
        with self._stop:
            self._stop.training = True
            try:
                for epoch in range(self.epoch, min(config.epochs, until or config.epochs)):
                    started = time.perf_counter()
                    row = self._train_epoch(epoch)
                    if isinstance(self.average, StochasticAverage):
                        self.average.update(self.network, self.epoch, self._images_for_statistics(epoch))
                        self.ranks.average_buffers(self.average.network)
                    row |= self._validate()
                    self._finish_epoch(row)
                    if self.ranks.is_main:  # which alone has all numbers
                        self._say(epoch_line(row, config.epochs, time.perf_counter() - started))
                    self._end_early_if(self._stop.poll())
            finally:
                self._profiler.close()
                if self._loggers is not None:
                    self._loggers.close()
                problem = self._writer.finish()
                if problem:
                    self._say(f"warning: {problem}")
            self.ranks.barrier()  # a rank that left before all is written would make torchrun end the others
        if problem:
            raise TrainingFailed(f"{problem}; make room and go on with --resume auto")
        if self.epoch == config.epochs:
            best = self.best
            self._say(
                f"done: best val acc {best['val_accuracy']:.2%} in epoch {best['epoch']}; results in {self.output}"
            )

    @property
    def _steps_done(self) -> int:
        """Since the run began."""
        return self.epoch * len(self.train_loader) + self.step

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        config = self.config
        self.model.train()
        self.method.start_epoch(epoch)
        steps = len(self.train_loader)
        first = self.step
        if first == 0:
            self.sums.reset()
        self._logged = self.sums.total.clone()
        show = self.ranks.is_main and shows_bar(config.progress)
        progress = Progress(
            f"epoch {epoch + 1}/{config.epochs}", steps * config.batch_size, first * config.batch_size, show
        )
        started = time.perf_counter()
        waited = 0.0
        rate = 0.0
        batches = self.batches(epoch, first)
        try:
            while True:
                asked = time.perf_counter()
                batch, failure = None, None
                try:
                    batch = next(batches, None)
                except UnreadableImage as error:
                    failure = error
                waited += time.perf_counter() - asked
                if batch is None and failure is None:
                    break  # on all ranks alike: they have equally many steps
                self._report_unreadable()
                self._end_early_if(_UNREADABLE if failure else self._stop.poll(), failure)
                assert batch is not None
                now = epoch + (self.step + 0.5) / steps
                rate = self.method.learning_rate(learning_rate(config.optim, config.epochs, now), now)
                self._profiler.before_step()
                self._train_step(batch, rate)
                self.step += 1
                trace = self._profiler.after_step()
                if trace is not None:
                    self._say(f"profile: {trace} (chrome://tracing or ui.perfetto.dev show it)")
                self._log_step(rate)
                every = config.checkpoint_every_steps
                if every is not None and self.step % every == 0 and self.step < steps:
                    self.save()
                progress.step(config.batch_size, partial(self._describe, waited, started))
        finally:
            progress.close()
        total = self.ranks.sum(self.sums.total.clone())
        means, histograms = self.sums.means(total), self.sums.histograms(total)
        unreadable = int(self.ranks.sum(torch.tensor(len(self._unreadable))))
        seconds = time.perf_counter() - started
        images = (self.step - first) * config.batch_size
        if not math.isfinite(means["train_loss"]):
            raise TrainingFailed(
                f"the training loss of epoch {epoch + 1} is {means['train_loss']}; lower optim.lr (now "
                f"{config.optim.lr:g}) or set optim.clip_norm, and go on with --resume auto or start anew"
            )
        self.method.finish_epoch()
        self.epoch, self.step = epoch + 1, 0
        if self._loggers:
            self._loggers.histograms(histograms, self._steps_done)
        spread = {
            f"{name}_p{share}": histogram.quantile(share / 100)
            for name, histogram in histograms.items()
            for share in (10, 50, 90)
        }
        return {
            "epoch": epoch + 1,
            "lr": rate,
            **means,
            **spread,
            **self.method.epoch_metrics(),
            "images_per_s": images / seconds,
            "seconds": seconds,
            "data_wait": waited / seconds,
            "unreadable": unreadable,
        }

    def batches(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """(images, labels, indices) of this rank's steps of an epoch from ``first`` on, and outliers if the method has
        any, whose order goes on from epoch to epoch.
        """
        size = self.config.image_size_at(epoch)
        self.train_loader.set_epoch(epoch, first, size)
        if self._outliers is None:
            yield from self.train_loader
            return
        others = _endless(self._outliers, epoch * len(self.train_loader) + first, size)
        for batch, (outliers, _, _) in zip(self.train_loader, others, strict=False):
            yield *batch, outliers

    def _train_step(self, batch: tuple[Tensor, ...], rate: float) -> None:
        """One step of the optimizer on a batch of ``batches``; nothing here waits for the device."""
        set_learning_rate(self.optimizer, rate)
        images, labels, indices, *outliers = batch
        batch = (self.execution.arrange(images), labels, indices, *map(self.execution.arrange, outliers))
        if self._graph is None:
            self._update(*batch)
        else:
            self._graph(*batch, key=self.method.phase)

    def _update(self, *batch: Tensor) -> None:
        self._free_gradients()
        if self._ascent is None:
            self.sums.add(self._backward(batch))
        else:
            self.method.ascends = True
            self.sums.add(self._backward(batch))
            self.method.ascends = False
            self._ascent.climb()
            self._free_gradients()
            self._backward(batch)
            self._ascent.back()
        if self.config.optim.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), self.config.optim.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if isinstance(self.average, MovingAverage):
            self.average.update(self.network)

    def _backward(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Add the gradients of a batch to the parameters'; its sums for ``EpochSums``."""
        count = self.config.optim.accumulate
        sums = []
        for number, part in enumerate(zip(*(tensor.chunk(count) for tensor in batch), strict=True)):
            together = number == count - 1 or not isinstance(self.model, DistributedDataParallel)
            with contextlib.nullcontext() if together else self.model.no_sync():  # type: ignore[operator]
                loss, own = self.model(*part)
                self.scaler.scale(loss if count == 1 else loss / count).backward()
            sums.append(own)
        return sums[0] if count == 1 else torch.stack(sums).sum(0)

    def _free_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    # ---- Validation -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Over the validation images of all ranks, each once: cross-entropy, accuracy, failure detection."""
        network = self.network if self._averaged is None else self._averaged
        self.ranks.broadcast_buffers(network)
        network.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.ranks.device)
        confidences, rights = [], []
        self.val_loader.set_epoch(0)
        for images, labels, _ in self.val_loader:
            logits = self._logits(network, images)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            valid = labels >= 0
            right = logits.argmax(1) == labels
            sums += torch.stack([loss.double(), right.sum(), valid.sum()])
            confidences.append(torch.where(valid, self.method.confidence(logits), torch.nan))
            rights.append(right)
        self._report_unreadable()
        loss_sum, right_sum, count = self.ranks.sum(sums).tolist()
        own = [torch.cat(parts).cpu() if parts else torch.zeros(0) for parts in (confidences, rights)]
        every = self.ranks.gather(own)  # on rank 0, which alone writes metrics
        row = {"val_loss": loss_sum / count, "val_accuracy": right_sum / count}
        if self.ranks.is_main:
            confidence, right = (torch.cat([part[i] for part in every]).double() for i in (0, 1))
            kept = confidence.isfinite()  # not so after a step that went wrong; the loss will tell
            row |= _failures(confidence[kept], right[kept])
        return row

    def _logits(self, network: nn.Module, images: Tensor) -> Tensor:
        """(B, C) float32. A short last batch is filled up when compiled, so that it does not compile anew."""
        rows, full = len(images), self.config.eval_batch_size
        if self.execution.compile and rows < full:
            short, images = images, images.new_zeros(full, *images.shape[1:])
            images[:rows] = short
        with self.execution.autocast():
            return self._predict(network, self.execution.arrange(images))[:rows, : self.data.num_classes].float()

    @property
    def _averaged(self) -> nn.Module | None:
        """What is to be used in the network's place, where there is an average to use yet."""
        if self.average is None:
            return None
        begun = not isinstance(self.average, StochasticAverage) or self.average.epochs_averaged(self.epoch) > 0
        return self.average.network if begun else None

    def _make_average(self) -> MovingAverage | StochasticAverage | None:
        decay, share = self.config.optim.ema_decay, self.method.averages_from
        if share is None:
            return None if decay is None else MovingAverage(self.network, decay)
        if decay is not None:
            raise ValueError(
                f"optim.ema_decay is {decay} but {self.method.name} averages the weights itself; set it to null"
            )
        return StochasticAverage(self.network, int(share * self.config.epochs))

    def _images_for_statistics(self, epoch: int) -> Iterator[Tensor]:
        """An epoch's training images, not more than ``STATISTICS_IMAGES``."""
        steps = -(-STATISTICS_IMAGES // self.config.batch_size)
        self.train_loader.set_epoch(epoch, 0, self.config.image_size_at(epoch))
        with self.execution.autocast(), contextlib.closing(self.train_loader.__iter__()) as batches:
            for images, _, _ in itertools.islice(batches, steps):
                yield self.execution.arrange(images)

    # ---- Numbers ----------------------------------------------------------------------------------------------

    def _log_step(self, rate: float) -> None:
        if not self._loggers or self.step % self.config.log_every_steps:
            return
        since = self.sums.means(self.sums.total - self._logged)
        self._logged = self.sums.total.clone()
        values = {f"step/{name.removeprefix('train_')}": value for name, value in since.items()}
        self._loggers.scalars({**values, "step/lr": rate}, self._steps_done)

    def _describe(self, waited: float, started: float) -> str:
        means = self.sums.means(self.sums.total)
        data_wait = waited / (time.perf_counter() - started)
        return (
            f"loss {means['train_loss']:.4f}, acc {means['train_accuracy']:.2%}, data wait {data_wait:.0%}, "
            f"{memory_in_use(self.ranks.device) / 2**30:.1f} GiB"
        )

    def _report_unreadable(self) -> None:
        """Name each file that was passed over, once, on whichever rank met it."""
        found = {**self.train_loader.unreadable, **self.val_loader.unreadable}
        if self._outliers is not None:
            found |= self._outliers.unreadable
        for path in found.keys() - self._unreadable:
            self._unreadable.add(path)
            with contextlib.suppress(OSError):
                sys.stderr.write(f"warning: {found[path]}; training goes on without it\n")

    def _say(self, line: str) -> None:
        if self.ranks.is_main and self.config.progress != "none":
            with contextlib.suppress(OSError):  # a terminal that has gone must not end the run
                print(line, flush=True)

    # ---- Saving and resuming ----------------------------------------------------------------------------------

    def _finish_epoch(self, row: dict[str, float]) -> None:
        self.history.append(row)
        first_averaged = isinstance(self.average, StochasticAverage) and self.average.epochs_averaged(self.epoch) == 1
        # The networks before the first average are none that the method stands for.
        better = first_averaged or row["val_accuracy"] > self.best["val_accuracy"]
        if better:
            self.best = {"epoch": row["epoch"], "val_accuracy": row["val_accuracy"]}
        if self.ranks.is_main:
            try:
                write_metrics(self.output / METRICS_FILE, self.history)
            except OSError as error:  # written again after the next epoch
                self._say(f"warning: {METRICS_FILE} could not be written ({error})")
        if self._loggers:
            self._loggers.scalars({f"epoch/{k}": v for k, v in row.items() if k != "epoch"}, self._steps_done)
        self.save(best=better)

    def save(self, best: bool = False) -> None:
        """Begin to write checkpoints/last.pt, and best.pt as well if asked; all ranks must call it.

        The state is copied before this returns; a thread writes it while training goes on.
        """
        ranks = self.ranks.gather(
            checkpoints.snapshot(
                {"method": self.method.state_dict(), "rng": checkpoints.rng_state(), "sums": self.sums.total}
            )
        )
        if not self.ranks.is_main:
            return
        averaged = self._averaged
        content = checkpoints.snapshot(
            {
                "config": self.config.to_dict(),
                "shape": self._shape(),
                "epoch": self.epoch,
                "step": self.step,
                "world_size": self.ranks.world_size,
                "model": self.network.state_dict(),
                "average": averaged.state_dict() if averaged is not None else None,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "best": self.best,
                "history": list(self.history),
            }
        )
        copies = [checkpoints.BEST] if best else []
        every = self.config.keep_every_epochs
        if every is not None and self.step == 0 and self.epoch % every == 0:
            copies.append(checkpoints.epoch_name(self.epoch))
        problem = self._writer.start({**content, "ranks": ranks}, copies)
        if problem:
            self._say(f"warning: {problem}; trying again now")

    def _shape(self) -> dict[str, Any]:
        """What a model is built from besides its configuration."""
        return {
            "class_names": list(self.data.class_names),
            "channels": self.data.channels,
            "image_size": self.data.image_size,
            "train_images": self.train_loader.num_samples,
        }

    def _restore(self, content: dict[str, Any], path: Path) -> None:
        shape = self._shape()
        refuse_other_data(content["shape"], shape, path)
        self.network.load_state_dict(content["model"])
        if self.average is not None and content["average"] is not None:
            self.average.network.load_state_dict(content["average"])
        self.optimizer.load_state_dict(content["optimizer"])
        for group in self.optimizer.param_groups:  # read onto the CPU with the rest
            group["lr"] = group["lr"].to(self.ranks.device)
        if content["scaler"]:  # empty when gradients were not scaled
            self.scaler.load_state_dict(content["scaler"])
        self.epoch, self.step = content["epoch"], content["step"]
        self.history, self.best = content["history"], content["best"]
        ranks = content["ranks"]
        rank, world = self.ranks.rank, self.ranks.world_size
        if len(ranks) == world:
            self.method.load_state_dict(ranks[rank]["method"])
            checkpoints.set_rng_state(ranks[rank]["rng"])
        else:
            self.method.load_state_dict(self.method.reshard([own["method"] for own in ranks], rank, world))
        changed = changes(content, world, shape["train_images"])
        if changed:
            self._say(
                f"warning: {', '.join(changed)} since {path}: the run goes on, but not bit for bit as it would have"
                + (", from the start of the epoch" if self.step else "")
            )
            self.step = 0  # a step is no longer the same images
        if self.step:
            self.sums.total.copy_(ranks[rank]["sums"])
        self._say(f"resuming from {path}: {self.epoch} epochs" + (f" and {self.step} steps" if self.step else ""))

    def _end_early_if(self, reason: int, failure: UnreadableImage | None = None) -> None:
        """Save and stop if any rank has a reason to; all ranks are between the same two steps here."""
        reason = self.ranks.max(reason)
        if not reason:
            return
        if self.step:
            self.save()
        problem = self._writer.finish()
        self.ranks.barrier()  # see fit
        state = f"saved after {self.epoch} epochs and {self.step} steps" if self._steps_done else "at its beginning"
        if problem:
            raise TrainingFailed(f"{problem}; make room and go on with --resume auto")
        if failure is not None:
            raise UnreadableImage(f"{failure} (the run is {state})") from failure
        if reason == _UNREADABLE:
            raise TrainingFailed(f"another rank met an image that does not decode; the run is {state}")
        raise Stopped(reason, f"stopped by {signal.Signals(reason).name} and {state}; go on with --resume auto")

    # ---- Checks -----------------------------------------------------------------------------------------------

    def _check_together(self) -> None:
        """Raise ValueError for options that do not fit each other or the number of ranks."""
        config, world = self.config, self.ranks.world_size
        if config.batch_size % world:
            raise ValueError(
                f"batch_size {config.batch_size} is for all ranks together but does not divide among {world}; "
                f"use {max(1, config.batch_size // world) * world}"
            )
        own, parts = config.batch_size // world, config.optim.accumulate
        if own % parts:
            raise ValueError(
                f"optim.accumulate is {parts} but a rank's {own} images do not divide into as many parts; "
                f"use a divisor of {own}"
            )
        if config.cuda_graphs and world > 1:
            raise ValueError(f"cuda_graphs is for one GPU but there are {world} ranks; set it to false")
        if config.logger in ("wandb", "all") and importlib.util.find_spec("wandb") is None:
            raise ValueError(
                f"logger is {config.logger!r} but wandb is not installed; pip install wandb, or set it to tensorboard"
            )

    def _make_paths_absolute(self) -> None:
        data = self.config.data
        if data.root is not None:
            data.root = str(Path(data.root).absolute())
        if data.file_list is not None:
            data.file_list = str(Path(data.file_list).absolute())
        data.ood = {name: str(Path(path).absolute()) for name, path in data.ood.items()}


def _endless(loader: Loader, step: int, image_size: int | None) -> Iterator[Images]:
    """A loader's batches from its ``step``-th on, epoch after epoch."""
    while True:
        epoch, first = divmod(step, len(loader))
        loader.set_epoch(epoch, first, image_size)
        yield from loader
        step += len(loader) - first


def _predict(network: nn.Module, images: Tensor) -> Tensor:
    return network(images)[0]


def _failures(confidence: Tensor, right: Tensor) -> dict[str, float]:
    values = failure_metrics(confidence.numpy(), right.numpy().astype(bool))
    return {name: values[name] for name in _FAILURE_METRICS}


def _wants_gpu(config: Config) -> bool:
    return config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the global one, which a user's own model may draw from
    torch.manual_seed(seed)
