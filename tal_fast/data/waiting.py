"""Calls that may hang, with a limit of the time to wait for them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from tal_fast.data.headers import UnreadableImage

Result = TypeVar("Result")


class LoaderFailed(UnreadableImage):
    """Error for a loader whose processes or threads end or do not deliver."""


class CallingThread:
    """Thread that makes calls which may hang, while the caller waits for a limited time.

    A call costs 6 us more than without the thread. The time is counted in slices of a second, because a job that is
    suspended for an hour is not late when it goes on.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._calls: SimpleQueue[Any] = SimpleQueue()
        threading.Thread(target=_make_calls, args=(self._calls,), daemon=True).start()
        weakref.finalize(self, self._calls.put, None)

    def call(self, function: Callable[[], Result]) -> Result:
        """Result of a function that may hang.

        Raises LoaderFailed if it does not return in time; the thread cannot be used any more if it never does.
        """
        results: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        self._calls.put((function, results))
        waited = 0.0
        while waited < self._seconds:
            slice_ = min(1.0, self._seconds - waited)
            try:
                result, error = results.get(timeout=slice_)
            except Empty:
                waited += slice_
                continue
            if error is not None:
                raise error
            return result
        raise LoaderFailed(
            f"the loader did not deliver for {self._seconds:g} s; a file system may hang or a process be stopped; "
            "raise data.timeout (evaluation: --timeout) if it is only slow"
        )


def _make_calls(calls: SimpleQueue[Any]) -> None:
    while (request := calls.get()) is not None:
        function, results = request
        try:
            results.put((function(), None))
        except BaseException as error:
            results.put((None, error))
        del request, function, results  # an iterator in them would live until the next call
