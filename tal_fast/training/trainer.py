"""Trainer: builds a run from its configuration, trains it epoch by epoch, saves it and resumes it."""

from __future__ import annotations

import gc
import logging
import math
import time
import weakref
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tal_fast.config.schema import OWN_OF_A_RANK, Config, DataConfig
from tal_fast.data.build import build_data
from tal_fast.data.sources import absolute_place
from tal_fast.methods import build_method
from tal_fast.models import head_path
from tal_fast.models.pretrained import PRETRAINED, Weights, read_weights
from tal_fast.runs import checkpoint
from tal_fast.runs.folder import METRICS_FILE, epoch_row, write_config, write_metrics
from tal_fast.runs.resume import (
    changes,
    find_checkpoint,
    following,
    leaves_epoch,
    refuse_existing_run,
    refuse_other_data,
)
from tal_fast.training import loggers
from tal_fast.training.batches import TrainingBatches
from tal_fast.training.epoch_stats import Histogram, percentile_columns
from tal_fast.training.feature_cache import FeatureBundle
from tal_fast.training.mixing import check_images
from tal_fast.training.optim import learning_rate
from tal_fast.training.profiler import Profiler
from tal_fast.training.progress import Progress, epoch_line, memory_in_use
from tal_fast.training.runtime import Runtime
from tal_fast.training.saving import Saver, TrainingFailed
from tal_fast.training.state import build_state, conditions, data_shape
from tal_fast.training.train_step import TrainStep, Update, check_parts
from tal_fast.training.validation import NOT_VALIDATED, Validator
from tal_fast.training.weight_averaging import STATISTICS_IMAGES
from tal_fast.utils.distributed import Ranks
from tal_fast.utils.environment import code_digest, commit
from tal_fast.utils.io import remove_leftovers
from tal_fast.utils.locks import FolderLock
from tal_fast.utils.logs import duration
from tal_fast.utils.rng import seed_all
from tal_fast.utils.signals import Stopped, StopRequest

__all__ = ["Trainer", "TrainingFailed"]

logger = logging.getLogger(__name__)

ESTIMATE_SECONDS = 15.0
"""Seconds of training after which the time of the whole run is estimated; the line of an epoch has it too."""


class Trainer:
    """Trainer of one model.

    Args:
        config: configuration of the run; paths of data in it become absolute.
        ranks: this process among the others; by default those that torchrun started, or this process alone.
        stop: records requests to stop; a new one by default.

    Attributes:
        data: images of the run.
        network: the network, not wrapped by DDP; if its features are cached, its head.
        state: state of the run, as a checkpoint holds it.
        batches: training batches of this rank.
        model: network and method as one module, with DDP around it on several ranks.
        train_step: updates the weights by a batch, with a learning rate.
        validator: validation pass of all ranks.

    Raises:
        ValueError: the configuration, the data or the checkpoint to resume from do not work.
    """

    def __init__(self, config: Config, ranks: Ranks | None = None, stop: StopRequest | None = None) -> None:
        self.config = config.check()
        self.ranks = ranks or Ranks.start(config.device)
        shared = {name: value for name, value in config.flat().items() if name not in OWN_OF_A_RANK}
        self.ranks.check_same({**shared, "torch": torch.__version__, "the code of tal_fast": code_digest()})
        device = self.ranks.device
        self.runtime = Runtime.resolve(config, device, self.ranks.world_size)
        loggers.check_installed(config.logger)
        self.output = Path(config.output)
        _make_paths_absolute(config.data)
        self._lock = FolderLock(self.output)
        weakref.finalize(self, self._lock.release)
        # Only rank 0's output folder need exist.
        resumed = self.ranks.on_main(lambda: find_checkpoint(config, self._lock))
        self._claimed = self._lock.held

        weights = None
        if resumed is not None:
            config.data = following(Config.from_dict(resumed[0]["config"]), config).data
        elif config.model.weights is not None:
            weights = self.ranks.on_main(lambda: _read_weights(config))  # only rank 0 needs the file or the network
            config.data.follow(weights.preprocessing)
            config.check()
        self.data = build_data(config.data)
        place = {"rank": self.ranks.rank, "world_size": self.ranks.world_size, "device": device}
        options: dict[str, Any] = {**place, "skip_unreadable": True}
        seed_all(config.seed)  # the same initial weights on all ranks
        self.state = build_state(config, self.data, self.runtime, weights)
        self.network, self.method = self.state.network, self.state.method
        check_images(config, self.method)
        batch_size = config.batch_size // self.ranks.world_size
        check_parts(self.network, batch_size // config.optim.accumulate)
        images = FeatureBundle(self.data, self.method) if config.model.cache_features else self.data
        self.batches = TrainingBatches(config, images, self.method.outliers, batch_size, options)
        shape = data_shape(self.data, self.batches.num_images)
        self.ranks.check_same({**shape, "data.loader": self.data.loader_name})
        self._shape = {**shape, "conditions": conditions(config, self.data, self.runtime), "commit": commit()}
        val_loader = images.loader("val", batch_size=config.eval_batch_size, **options)
        self.validator = Validator(
            val_loader, config.eval_batch_size, self.data.num_classes, self.method, self.runtime, self.ranks
        )
        self.state.unreadable = {**self.batches.unreadable, "val": val_loader.unreadable}
        seed_all(config.seed + 1 + self.ranks.rank)  # dropout and the like differ between ranks
        if resumed is not None:
            self._restore(*resumed)
        self._stop = stop or StopRequest()
        if isinstance(images, FeatureBundle):
            images.compute(self.state.whole or self.network, config, self.runtime, self.ranks, self._stop)

        self._step = TrainStep(self.network, self.method, self.runtime, config.mix)
        if self.runtime.compile:
            self._step.compile()  # in place and before DDP: the keys of the network's state stay the same
        self.model: nn.Module
        self.train_step: Update
        self._build_update(self.state.epoch)
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high")  # TF32 where the network is not under autocast
        self._estimated = False
        self._reported = self._unreadable()  # files named so far, also by the run before
        self._saver = Saver(config, self.state, self._shape, self.ranks, self._stop)
        self._writer = self._saver.writer
        self._loggers: loggers.Loggers | None = None
        trace = self.output / "profile" / f"trace-rank{self.ranks.rank}.json"
        self._profiler = Profiler(*config.profile_window(), trace)

    def _build_update(self, epoch: int) -> None:
        """Make ``model`` and ``train_step`` for the parameters that train in an epoch and those after it."""
        self._head_only = epoch < self.config.optim.head_epochs
        head = set(self.network.get_submodule(head_path(self.network)).parameters())
        for group in self.state.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.requires_grad_(not self._head_only or parameter in head)
        self.model = self._step
        if self.ranks.world_size > 1:
            self.train_step = None  # type: ignore[assignment]
            gc.collect()  # DDP before this one has hooks on the parameters
            device = self.ranks.device
            device_ids = [device.index] if device.type == "cuda" else None
            self.model = DistributedDataParallel(self._step, device_ids=device_ids, gradient_as_bucket_view=True)
        self.train_step = Update(self.model, self.state, self.config.optim, self.runtime, self.config.cuda_graphs)

    @property
    def history(self) -> list[dict[str, float]]:
        """Rows of metrics.csv, one for each finished epoch."""
        return self.state.history

    def fit(self, until: int | None = None) -> None:
        """Train, validate and save after each epoch.

        Args:
            until: stop after this epoch of the run instead of the last.

        Raises:
            Stopped: after SIGTERM, SIGUSR1 or Ctrl-C; the step was finished and saved.
            TrainingFailed: the loss is not finite, or the last checkpoint could not be written.
            UnreadableImage: an image file does not decode; the steps before it are saved.
            Exception: any other error of a rank; the steps before it are saved unless the weights were half updated.
        """
        try:
            self._fit(until)
        finally:
            self._lock.release()

    def _fit(self, until: int | None) -> None:
        config, state = self.config, self.state
        self.ranks.on_main(self._prepare_folder)
        if state.epoch >= config.epochs:
            more = "--epochs and --extend give it more"
            self._say(f"{self.output} is trained already: {state.epoch} of {config.epochs} epochs; {more}")
            return
        size = sum(p.numel() for p in self.network.parameters())
        trained = sum(p.numel() for group in state.optimizer.param_groups for p in group["params"])
        first = f", only the head in the first {config.optim.head_epochs} epochs" if config.optim.head_epochs else ""
        self._say(
            f"{config.method.name} on {self.data.summary()}; {config.model.name}, {size:,} parameters"
            f"{f' of which {trained:,} train' if trained < size else ''}{first}"
            f"{'' if state.whole is None else ' in the head'}; {self.ranks.world_size} x "
            f"{self.ranks.device.type}, {self.runtime.summary()}, loader {self.data.loader_name}"
        )
        if config.mix.on:
            self._say(config.mix.summary(config.batch_size))
        decay, steps = config.optim.ema_decay, config.epochs * len(self.batches)
        if decay is not None and (initial := decay**steps) > 0.01:
            self._say(
                f"with optim.ema_decay {decay:g} and {steps:,} steps, {initial:.0%} of the average are the initial "
                f"weights; at most {math.floor(1e4 * 0.01 ** (1 / steps)) / 1e4:.4f} leaves 1%", logging.WARNING,
            )  # fmt: skip
        if self.ranks.is_main:
            self._loggers = loggers.Loggers(config, self.output, self._steps_done)
        problem = None
        with self._stop:
            self._stop.training = True
            try:
                for epoch in range(state.epoch, min(config.epochs, until or config.epochs)):
                    started = time.perf_counter()
                    training, histograms = self._train_epoch(epoch)
                    self._update_average(epoch)
                    validation = NOT_VALIDATED
                    if state.epoch % config.validate_every == 0 or state.epoch == config.epochs:
                        validation = self.validator.validate(state.averaged or self.network, self._saver.guard)
                    self._report_unreadable()
                    row = epoch_row(state.epoch, training, validation)
                    self._finish_epoch(row, histograms)
                    self._say(epoch_line(row, config.epochs, time.perf_counter() - started))
                    self._saver.go_on()
            except (Stopped, TrainingFailed):
                raise
            except Exception:
                self._saver.rescue(self.train_step.last_whole_step())
                raise
            finally:
                self.batches.close()
                self.validator.loader.close()
                self._profiler.close()
                if self._loggers is not None:
                    self._loggers.close()
                problem = self._writer.finish()
                if problem:
                    self._say(problem, logging.WARNING)
            self.ranks.barrier()  # torchrun would end the others if a rank left before all is written
        if problem:
            raise TrainingFailed(self._writer.taken or f"{problem}; go on with --resume auto")
        if state.epoch == config.epochs:
            accuracy, best_epoch = state.best["val_accuracy"], state.best["epoch"]
            self._say(f"done: best val acc {accuracy:.2%} in epoch {best_epoch}; results in {self.output}")

    def _train_epoch(self, epoch: int) -> tuple[dict[str, float], dict[str, Histogram]]:
        """Train for one epoch, or what is left of it; returns its columns of metrics.csv and its histograms."""
        config, state = self.config, self.state
        if self._head_only and epoch >= config.optim.head_epochs:
            self._build_update(epoch)
        self.model.train()
        self.method.start_epoch(epoch)
        steps, first = len(self.batches), state.step
        if first == 0:
            state.sums.total.zero_()
        self._logged = state.sums.total.clone()
        show = self.ranks.is_main and config.progress == "auto"
        title = f"epoch {epoch + 1}/{config.epochs}"
        progress = Progress(title, steps * config.batch_size, first * config.batch_size, show)
        started = time.perf_counter()
        self._saver.waited = 0.0
        try:
            with closing(self._saver.guard(self.batches.epoch(epoch, first), steps - first)) as batches:
                for batch in batches:
                    self._report_unreadable()
                    rate = self._learning_rate(epoch, state.step)
                    self._profiler.before_step()
                    self.train_step(batch, rate)
                    state.step += 1
                    if state.step == first + 1:  # compiled by now
                        self.ranks.limit_waiting(config.rank_timeout)
                    trace = self._profiler.after_step()
                    if trace is not None:
                        self._say(f"profile: {trace} (chrome://tracing or ui.perfetto.dev show it)")
                    self._log_step(rate)
                    self._estimate(time.perf_counter() - started, first, steps)
                    every = config.checkpoint_every_steps
                    if every is not None and state.step % every == 0 and state.step < steps:
                        self.save()
                    progress.advance(config.batch_size, partial(self._describe, started))
        finally:
            progress.close()
        total = self.ranks.sum(state.sums.total.clone())
        means, histograms = state.sums.means(total), state.sums.histograms(total)
        everyone = self.ranks.gather(self._unreadable())
        unreadable = self.ranks.on_main(lambda: len(set().union(*everyone)))
        seconds = time.perf_counter() - started
        if not math.isfinite(means["train_loss"]):
            self._saver.fail_diverged(f"the training loss is {means['train_loss']}")
        if first < steps:
            if state.average is not None and not state.average.takes_statistics:
                self.ranks.average_buffers(state.average.network)  # before saving, as a checkpoint has one rank's
            self.save()  # trained, not yet validated: a run resumed from here begins by finishing the epoch
        images = (state.step - first) * config.batch_size
        state.epoch, state.step = epoch + 1, 0
        self.method.finish_epoch()
        columns = {
            "lr": self._learning_rate(epoch, steps - 1),
            **means,
            **percentile_columns(histograms),
            **self.method.epoch_metrics(),
            "images_per_s": images / seconds,
            "seconds": seconds,
            "data_wait": self._saver.waited / seconds,
            "unreadable": unreadable,
        }
        if warning := self.method.warning(columns):
            self._say(warning, logging.WARNING)
        return columns, histograms

    def _estimate(self, seconds: float, first: int, steps: int) -> None:
        """Tell, once ``ESTIMATE_SECONDS`` have passed within the first epoch, how long training will take."""
        done = self.state.step - first
        if seconds < ESTIMATE_SECONDS or done < 2 or self._estimated:
            return
        self._estimated = True
        left = (self.config.epochs - self.state.epoch) * steps - self.state.step
        self._say(f"about {duration(seconds / done * left)} for {left:,} steps more, without validation")

    def _learning_rate(self, epoch: int, step: int) -> float:
        now = epoch + (step + 0.5) / len(self.batches)
        return self.method.learning_rate(learning_rate(self.config.optim, self.config.epochs, now), now)

    def _update_average(self, epoch: int) -> None:
        average = self.state.average
        if average is not None and average.takes_statistics:
            steps = min(len(self.batches), -(-STATISTICS_IMAGES // self.config.batch_size))
            batches = self._saver.guard(self.batches.images(epoch, steps), steps)
            images = map(self.runtime.arrange, batches)
            with self.runtime.autocast():
                average.update_after_epoch(self.network, self.state.epoch, images)
            if average.epochs:
                self.ranks.average_buffers(average.network)

    def _finish_epoch(self, row: dict[str, float], histograms: dict[str, Histogram]) -> None:
        """Record an epoch's row everywhere and save a checkpoint."""
        best = self.state.finish_epoch(row)
        if self.ranks.is_main:
            try:
                self._lock.ensure()
                write_metrics(self.output, self.history)
            except (OSError, ValueError) as error:  # written again after the next epoch
                logger.warning("%s could not be written (%s)", METRICS_FILE, error)
        if self._loggers:
            self._loggers.histograms(histograms, self._steps_done)
            measured = {f"epoch/{k}": v for k, v in row.items() if k != "epoch" and not math.isnan(v)}
            self._loggers.scalars(measured, self._steps_done)
        self.save(best)

    @property
    def _steps_done(self) -> int:
        """Number of finished steps since the run began."""
        return self.state.epoch * len(self.batches) + self.state.step

    def _log_step(self, rate: float) -> None:
        if not self._loggers or self.state.step % self.config.log_every_steps:
            return
        sums = self.state.sums
        means = sums.means(sums.total - self._logged)
        self._logged = sums.total.clone()
        values = {f"step/{name.removeprefix('train_')}": value for name, value in means.items()}
        self._loggers.scalars({**values, "step/lr": rate}, self._steps_done)

    def _describe(self, started: float) -> str:
        """Text of the progress bar."""
        means = self.state.sums.means(self.state.sums.total)
        data_wait = self._saver.waited / (time.perf_counter() - started)
        return (
            f"loss {means['train_loss']:.4f}, acc {means['train_accuracy']:.2%}, data wait {data_wait:.0%}, "
            f"{memory_in_use(self.ranks.device) / 2**30:.1f} GiB"
        )

    def _unreadable(self) -> set[str]:
        """Paths of the files that did not decode so far on this rank."""
        return set().union(*self.state.unreadable.values())

    def _report_unreadable(self) -> None:
        """Name each file that was left out, once, on the rank that met it."""
        for files in self.state.unreadable.values():
            for path in files.keys() - self._reported:
                self._reported.add(path)
                logger.warning("%s; training goes on without it", files[path])

    def _say(self, message: str, level: int = logging.INFO) -> None:
        if self.ranks.is_main:
            logger.log(level, "%s", message)

    def _prepare_folder(self) -> None:
        try:
            self._lock.acquire()
            if not self._claimed:  # the folder did not exist when this trainer was made
                refuse_existing_run(self.output)
        except ValueError as error:
            raise TrainingFailed(str(error)) from None
        self._claimed = True
        remove_leftovers(self.output / checkpoint.FOLDER)
        write_config(self.output, self.config)
        if self.history:
            write_metrics(self.output, self.history)

    def save(self, best: bool = False) -> None:
        """Start saving a checkpoint, with ``best`` as best.pt too; all ranks must call it."""
        self._saver.save(best)

    def _restore(self, content: dict[str, Any], path: Path) -> None:
        config, state = self.config, self.state
        refuse_other_data(content, self._shape, config, path)
        changed = changes(content, self._shape, config, self.ranks.world_size)
        before, step = Config.from_dict(content["config"]), content["step"]
        if leaves_epoch(changed):  # its steps no longer hold the same images, but if all are done, none is needed
            done = step == content["shape"]["train_images"] // before.batch_size and "ranks" not in changed
            step = len(self.batches) if done else 0
        # Before the random generators are restored, which a method of your own may draw from when it is built.
        earlier, epochs = self.method, content["epoch"]
        if (before.method, before.optim, before.epochs) != (config.method, config.optim, config.epochs):
            task = replace(earlier.task, epochs=before.epochs, learning_rate=before.optim.lr)
            earlier = build_method(before.method, task)
        runs = ((earlier, before), (self.method, config))
        was, now = (m.learning_rate(learning_rate(c.optim, c.epochs, epochs), epochs) for m, c in runs)
        with checkpoint.restoring(path):
            same_images = "training images" not in changed
            state.restore(content, self.ranks.rank, self.ranks.world_size, step, same_images)
        if changed:
            where = ", from the start of the epoch" if content["step"] and not state.step else ""
            goes_on = f"the run goes on, but not bit for bit as it would have{where}"
            self._say(f"{', '.join(changed.values())} since {path}: {goes_on}", logging.WARNING)
        steps = f" and {state.step} steps" if state.step else ""
        self._say(f"resuming from {path}: {state.epoch} epochs{steps}")
        if was != now:
            self._say(f"the schedule goes on with a learning rate of {now:.4g}, which was {was:.4g} before")


def _read_weights(config: Config) -> Weights:
    """Weights that a run starts from."""
    model = config.model
    name = model.weights or PRETRAINED
    if name != PRETRAINED and Path(name).is_dir():
        name = str(Path(name) / checkpoint.FOLDER / checkpoint.BEST)
    return read_weights(name, model.name, model.weights_key, "--model.weights-key", config.data.channels)


def _make_paths_absolute(data: DataConfig) -> None:
    if data.root is not None:
        data.root = absolute_place(data.root, data.dataset)
    if data.file_list is not None:
        data.file_list = str(Path(data.file_list).expanduser().absolute())
    data.ood = {name: absolute_place(spec) for name, spec in data.ood.items()}
