"""Timing loops: runs one after the other, several at a time and awaited together, or several always under way.

Streams are threads of this process: ONNX Runtime, CUDA's driver and torch's kernels give up Python's lock while they
work. What starting and awaiting the threads costs is measured by the same loop around callables that do nothing.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NamedTuple

from edgecomp.errors import RunError

__all__ = ["Clock", "Run", "Team", "Timed", "time_always_busy", "time_runs"]

Clock = Callable[[], int]
Run = Callable[[], object]

_TELL_EVERY_NS = 100_000_000


class Timed(NamedTuple):
    """Nanoseconds of each run, in the order in which they ended, and of the whole loop."""

    samples_ns: list[int]
    elapsed_ns: int


class Team:
    """Several runs at a time: a call starts all of them and returns when the last has ended.

    The first runs in the thread that calls; each other has a thread of its own, which waits between two calls.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self._own, *others = runs
        self._errors: list[BaseException] = []
        self._is_over = False
        self._starts = [threading.Lock() for _ in others]
        self._ends = [threading.Lock() for _ in others]
        self._threads = [
            threading.Thread(target=self._serve, args=(run, start, end), daemon=True)
            for run, start, end in zip(others, self._starts, self._ends, strict=True)
        ]

    def __enter__(self) -> Team:
        """Start the threads."""
        for lock in (*self._starts, *self._ends):
            lock.acquire()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the threads, each when its run has ended."""
        self._is_over = True
        for lock in self._starts:
            if lock.locked():
                lock.release()
        for thread in self._threads:
            thread.join()

    def __call__(self) -> None:
        """Run all of them; raise what the first that failed raised."""
        for lock in self._starts:
            lock.release()
        try:
            self._own()
        finally:
            for lock in self._ends:
                lock.acquire()
        if self._errors:
            raise self._errors[0]

    def _serve(self, run: Run, start: threading.Lock, end: threading.Lock) -> None:
        while True:
            start.acquire()
            if self._is_over:
                return
            try:
                run()
            except BaseException as error:  # noqa: BLE001 - raised again in the thread that called
                self._errors.append(error)
            end.release()


def time_runs(
    run: Run,
    clock: Clock,
    *,
    duration_ns: int,
    min_runs: int,
    max_runs: int,
    progress: Callable[[float], None] = lambda share: None,
) -> Timed:
    """Call `run` again and again, each call timed by itself.

    It ends when `duration_ns` has passed and there are `min_runs` samples, or there are `max_runs`.
    """
    samples: list[int] = []
    start = told = clock()
    while True:
        before = clock()
        run()
        after = clock()
        samples.append(after - before)
        count, spent = len(samples), after - start
        if count >= max_runs or (count >= min_runs and spent >= duration_ns):
            return _checked(samples, spent)
        if after - told >= _TELL_EVERY_NS:
            told = after
            progress(_share(count, spent, duration_ns, min_runs, max_runs))


def time_always_busy(
    runs: Sequence[Run],
    clock: Clock,
    *,
    duration_ns: int,
    min_runs: int,
    max_runs: int,
    progress: Callable[[float], None] = lambda share: None,
) -> Timed:
    """Keep all runs under way, each in a thread that begins anew as soon as it has ended; ends as `time_runs` does.

    Runs that are under way at the end are finished and counted, so that no long one is left out.
    """
    samples: list[int] = []
    errors: list[BaseException] = []
    over = threading.Event()

    def serve(run: Run) -> None:
        try:
            while not over.is_set():
                before = clock()
                run()
                samples.append(clock() - before)
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that called
            errors.append(error)
            over.set()

    own, *others = runs
    threads = [threading.Thread(target=serve, args=(run,), daemon=True) for run in others]
    start = told = clock()
    try:
        for thread in threads:
            thread.start()
        while not over.is_set():
            before = clock()
            own()
            after = clock()
            samples.append(after - before)
            count, spent = len(samples), after - start
            if count >= max_runs or (count >= min_runs and spent >= duration_ns):
                break
            if after - told >= _TELL_EVERY_NS:
                told = after
                progress(_share(count, spent, duration_ns, min_runs, max_runs))
    finally:
        over.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return _checked(samples, clock() - start)


def _share(count: int, spent: int, duration_ns: int, min_runs: int, max_runs: int) -> float:
    return min(1.0, max(count / max_runs, min(count / min_runs, spent / duration_ns if duration_ns else 1.0)))


def _checked(samples: list[int], elapsed: int) -> Timed:
    """Refuse times that no clock which only grows can give."""
    wrong = next((place for place, one in enumerate(samples) if not 0 <= one < math.inf), None)
    if wrong is not None:
        raise RunError(
            f"run {wrong + 1} of {len(samples)} took {samples[wrong]} ns by the clock that was given, which must only "
            "grow; nothing was measured"
        )
    return Timed(samples, elapsed)
