"""What a builder tells while it works, and how Ctrl-C ends it."""

from __future__ import annotations

import contextlib
import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

__all__ = ["Watch", "interruptible", "no_collection"]

_SECONDS_BETWEEN = 0.5


class Watch:
    """Turns the builder's steps into lines, at most two a second, and asks it to stop.

    Args:
        label: what is built, at the start of each line.
        progress: receives a line.
        clock: seconds.
    """

    def __init__(
        self, label: str, progress: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.stopped = False
        self._label, self._progress, self._clock = label, progress, clock
        self._next = clock() + _SECONDS_BETWEEN

    def step(self, phase: str, done: int, of: int) -> bool:
        """Take a step of the builder; False asks it to end. Never raises: TensorRT would lose the error."""
        now = self._clock()
        if now >= self._next and not self.stopped:
            self._next = now + _SECONDS_BETWEEN
            with contextlib.suppress(Exception):
                self._progress(f"{self._label}: {phase[:1].lower()}{phase[1:]}, {done} of {of}")
        return not self.stopped

    def stop(self) -> None:
        """Ask the builder to end at its next step."""
        self.stopped = True


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Keep Python's cyclic collector still while TensorRT may call our logger.

    TensorRT holds a lock while it does. An older builder or network that the collector frees in that moment takes the
    same lock, and the process stands still for ever (seen with TensorRT for RTX 1.7.1, after a build that failed).
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextlib.contextmanager
def interruptible(watch: Watch) -> Iterator[None]:
    """Let Ctrl-C end a build at its next step, and raise KeyboardInterrupt when the builder has come back.

    Python's own handler would raise inside the builder's callback, and TensorRT prints and loses what is raised there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - a signal handler's arguments
        watch.stop()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
    if watch.stopped:
        raise KeyboardInterrupt
