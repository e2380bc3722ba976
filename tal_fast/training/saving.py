"""Saving a run, and ending it early: after a signal, a loss that is not finite, or an error of any rank."""

from __future__ import annotations

import io
import logging
import signal
import socket
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from tal_fast.config.schema import Config
from tal_fast.data.headers import UnreadableImage
from tal_fast.runs import checkpoint
from tal_fast.training.state import TrainingState, not_finite
from tal_fast.utils.distributed import Ranks
from tal_fast.utils.signals import Stopped, StopRequest

logger = logging.getLogger(__name__)

T = TypeVar("T")

_FAILED, _DIVERGED, _TAKEN = 1 << 10, 1 << 11, 1 << 12
"""Reasons to stop that are not signals' numbers: an error of a rank's loader; a loss that is not finite; another
process that has the run's folder."""

_STORE_LIMIT = 8 * 2**20 - 1024
"""Largest value in bytes of torch's TCPStore, which closes the connection over a larger one."""

_SAVED = "an error ended the run, which is %s; go on with --resume auto"


class TrainingFailed(ValueError):
    """Error that ends training; what was saved before is complete."""


class Saver:
    """Saver of a run's checkpoints, which also ends a run before its last epoch.

    ``shape`` is ``tal_fast.training.state.data_shape`` of the data.
    """

    def __init__(
        self, config: Config, state: TrainingState, shape: dict[str, Any], ranks: Ranks, stop: StopRequest
    ) -> None:
        self._config, self._state, self._shape, self._ranks, self._stop = config, state, shape, ranks, stop
        self.writer = checkpoint.Writer(Path(config.output) / checkpoint.FOLDER)
        self.waited = 0.0  # seconds that ``guard`` has waited for batches
        infinite = not_finite({**state.rank_state(), **state.shared_state()})  # masks of -inf, say
        self._infinite = infinite | {name.replace("model.", "average.", 1) for name in infinite}
        self._resumed = bool(state.epoch or state.step)  # and nothing is saved since
        self._ended = False  # whether all ranks have ended the run together, so that there is nothing to rescue

    def save(self, best: bool = False) -> None:
        """Start saving a checkpoint, with ``best`` as best.pt too; all ranks must call it.

        The state is copied before this returns; a thread writes it while training goes on. If a tensor of the state
        holds NaN or infinity, this raises TrainingFailed and replaces no checkpoint.
        """
        own = checkpoint.snapshot(self._state.rank_state())
        shared = checkpoint.snapshot(self._state.shared_state()) if self._ranks.is_main else {}
        infinite = not_finite({**own, **shared}) - self._infinite
        if self._ranks.max(bool(infinite)):
            self.fail_diverged(f"{min(infinite, default='the state of another rank')} holds NaN or infinity")
        everyone = self._ranks.gather(own)
        self._resumed = False
        if self._ranks.is_main:
            self._write(shared, everyone, best)

    def guard(self, batches: Generator[T, None, None], steps: int) -> Generator[T, None, None]:
        """Batches, before each of which all ranks agree to go on; an error of one ends the run on all ranks.

        ``batches`` are those of this rank, and ``steps`` is the largest number that a rank has.
        """
        with closing(batches):
            for _ in range(steps):
                batch, failure = None, None
                started = time.perf_counter()
                try:
                    batch = next(batches, None)
                except Exception as error:
                    failure = error
                self.waited += time.perf_counter() - started
                self.go_on(failure)
                if batch is not None:
                    yield batch
            next(batches, None)  # so that it ends by itself

    def go_on(self, failure: Exception | None = None) -> None:
        """Return if no rank has a reason to stop, else save and raise; every rank calls this between the same steps.

        ``failure`` is an error of this rank, which is raised when the run is saved.
        """
        reason = _FAILED if failure else 0 if self._state.sums.finite() else _DIVERGED
        reason = _TAKEN if self.writer.taken else reason
        reason = self._ranks.max(reason or self._stop.poll())
        if not reason:
            return
        if reason == _DIVERGED:
            self.fail_diverged("the training loss is not finite")
        if self._state.step and reason != _TAKEN:  # else the last checkpoint has all
            self.save()
        problem = self.writer.finish()
        self._ranks.barrier()  # torchrun would end the others if a rank left before all is written
        self._ended = True
        if reason == _TAKEN or self.writer.taken:
            raise TrainingFailed(self.writer.taken or "another run has the folder, see rank 0's message") from failure
        if problem:
            raise TrainingFailed(f"{problem}; go on with --resume auto") from failure
        if isinstance(failure, UnreadableImage):
            raise type(failure)(f"{failure} (the run is {self._saved})") from failure
        if failure is not None:
            logger.warning(_SAVED, self._saved)
            raise failure
        if reason == _FAILED:
            raise TrainingFailed(f"another rank failed, see its message; the run is {self._saved}")
        raise Stopped(reason, f"stopped by {signal.Signals(reason).name} and {self._saved}; go on with --resume auto")

    def fail_diverged(self, what: str) -> NoReturn:
        """Raise TrainingFailed for a state that is not finite and must not be saved; all ranks call it together."""
        state, optim = self._state, self._config.optim
        problem = self.writer.finish()
        self._ranks.barrier()
        rate = float(state.optimizer.param_groups[0]["lr"])
        remedy = (
            "Go on from the checkpoint before with --resume auto --allow optim.lr,optim.clip_norm and a lower "
            f"--optim.lr (now {optim.lr:g}) or --optim.clip_norm (now {optim.clip_norm or 'none'})"
        )
        if self._resumed:
            remedy += (
                "; if they are lower already, that checkpoint had diverged before it was saved: go on from an older "
                f"one, such as --resume {Path(self._config.output, checkpoint.FOLDER, checkpoint.BEST)}, or start anew"
            )
        raise TrainingFailed(
            f"training diverged: {what} after step {state.step} of epoch {state.epoch + 1}, with a learning rate of "
            f"{rate:g}; this was not saved. {remedy}" + (f"; {problem}" if problem else "")
        )

    def rescue(self, own: dict[str, Any] | None) -> None:
        """Save the last whole step after an error that this rank did not share with the others.

        The ranks can no longer communicate, because they are within different collectives: each leaves its state in the
        store, and the last one writes. A rank that was killed leaves none; the last checkpoint then stays as it is.
        ``own`` is ``rank_state`` as of the last whole step, or None if the error came while the weights changed.
        """
        if self._ended or not self._state.step:
            return
        try:
            if own is None:
                raise TrainingFailed("the weights were half updated")
            own, shared = checkpoint.snapshot([own, self._state.shared_state()])
            infinite = not_finite({**own, **shared}) - self._infinite
            if infinite:
                raise TrainingFailed(f"{min(infinite)} holds NaN or infinity")
            everyone = [own] if self._ranks.world_size == 1 else self._exchange(own, shared)
            if everyone:
                self._write(shared, everyone)
                if (problem := self.writer.finish()) is not None:
                    raise TrainingFailed(problem)
                logger.warning(_SAVED, self._saved)
        except Exception as error:  # the one that ended the run matters more
            logger.warning("the run ends with its last checkpoint, because the last step cannot be saved: %s", error)

    def _exchange(self, own: dict[str, Any], shared: dict[str, Any]) -> list[dict[str, Any]]:
        """The ranks' own states through the store, on the last rank to come; none elsewhere.

        None there either if it is not on rank 0's host, whose folder may be another one. Buffers are rank 0's in a
        checkpoint, so they go the same way, into ``shared``.
        """
        state, rank, world_size = self._state, self._ranks.rank, self._ranks.world_size
        names = {name for name, _ in state.network.named_buffers()}
        networks = [shared[key] or {} for key in ("model", "average")]
        file = io.BytesIO()
        buffers = [{name: network[name] for name in names & network.keys()} for network in networks]
        torch.save([own, buffers, socket.gethostname()], file)
        if file.tell() > _STORE_LIMIT:
            raise TrainingFailed(f"the state of rank {rank} is {file.tell() / 2**20:.0f} MiB, too large for the store")
        # The same step of all ranks, or the last one would not come.
        store: Any = dist.distributed_c10d._get_default_store()
        store = dist.PrefixStore(f"rescue/{state.epoch}/{state.step}", store)
        store.set(str(rank), file.getvalue())
        if store.add("ranks", 1) < world_size:
            return []
        left = [torch.load(io.BytesIO(store.get(str(r))), weights_only=True) for r in range(world_size)]
        for network, saved in zip(networks, left[0][1], strict=True):
            network.update(saved)
        return [rank_state for rank_state, _, _ in left] if left[0][2] == socket.gethostname() else []

    @property
    def _saved(self) -> str:
        epoch, step = self._state.epoch, self._state.step
        return f"saved after {epoch} epochs and {step} steps" if epoch or step else "at its beginning"

    def _write(self, shared: dict[str, Any], ranks: list[dict[str, Any]], best: bool = False) -> None:
        content = {
            "config": self._config.to_dict(),
            "shape": self._shape,
            "world_size": self._ranks.world_size,
            **shared,
            "ranks": ranks,
        }
        epoch, every = self._state.epoch, self._config.keep_every_epochs
        copies = [checkpoint.BEST] if best else []
        if every is not None and self._state.step == 0 and epoch % every == 0:
            copies.append(checkpoint.epoch_name(epoch))
        problem = self.writer.start(content, copies)
        if problem and not self.writer.taken:
            logger.warning("%s; trying again now", problem)
