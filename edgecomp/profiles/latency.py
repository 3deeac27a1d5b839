"""How long one run takes: raw samples, percentiles, and how far the percentiles can be trusted."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence

import msgspec

from edgecomp.errors import InvalidSpec
from edgecomp.profiles.machine import Machine, read_machine

__all__ = ["QUERIES_NEEDED", "LatencyProfile", "measure_latency", "percentile"]

QUERIES_NEEDED = {"p90": 24_576, "p95": 57_344, "p97": 90_112, "p99": 270_336}
"""Samples that carry a percentile at 99 % confidence, by MLPerf Inference's rules.

They are (z / margin)^2 p (1 - p) with z = 2.576 and a margin of a twentieth of 1 - p, rounded up to a multiple of
2^13. A percentile from fewer samples is a figure to go by, not one to promise.
"""

_WINDOW = 10  # runs that a warm-up median covers
_STEADY = 0.05  # relative change between two windows that counts as none
_OVERHEAD_RUNS = 1000
_TELL_EVERY_NS = 100_000_000

Clock = Callable[[], int]


class LatencyProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What measuring one model on one machine gave.

    Attributes:
        samples_us: every timed run in order, in microseconds of wall time.
        p50_us: median; like the other percentiles by nearest rank, so it is a time that was measured.
        p90_us: 90th percentile.
        p99_us: 99th percentile.
        mean_us: arithmetic mean.
        min_us: fastest run.
        max_us: slowest run.
        throughput_per_s: items a second, `batch` over the mean; runs follow each other, they do not overlap.
        num_samples: length of `samples_us`.
        warmup_runs: runs before the first sample.
        is_steady: the warm-up ended because times had settled, not because its limit was reached.
        batch: items a run.
        model: what ran, for example the ONNX file's name.
        runner: what ran it, for example "onnxruntime".
        threads: of the runner; 0 when it chose by itself.
        machine: where, read before the warm-up.
        loop_overhead_us: median time of a callable that does nothing, in the same loop. It is contained in every
            sample and not subtracted.
        indicative: the percentiles that so few samples cannot carry (`QUERIES_NEEDED`).
    """

    samples_us: tuple[float, ...]
    p50_us: float
    p90_us: float
    p99_us: float
    mean_us: float
    min_us: float
    max_us: float
    throughput_per_s: float
    num_samples: int
    warmup_runs: int
    is_steady: bool
    batch: int
    model: str
    runner: str
    threads: int
    machine: Machine
    loop_overhead_us: float
    indicative: tuple[str, ...]


def measure_latency(
    run: Callable[[], object],
    *,
    batch: int,
    model: str = "",
    runner: str = "",
    threads: int = 0,
    machine: Machine | None = None,
    duration_s: float = 3.0,
    min_runs: int = 20,
    max_runs: int = 100_000,
    warmup_s: float = 2.0,
    warmup_runs: int = 100,
    progress: Callable[[float], None] = lambda share: None,
    clock: Clock = time.perf_counter_ns,
) -> LatencyProfile:
    """Time `run` again and again, one call after the other.

    **Warm-up.** `run` is called until the median of the last 10 times lies within 5 % of the median of the 10
    before them, or until `warmup_s` seconds or `warmup_runs` runs are spent, whichever comes first. A run that
    has begun is finished, and the profile says which of the two ended it (`is_steady`).

    **Timing.** Then until `duration_s` has passed and there are `min_runs` samples, or there are `max_runs`.
    Python's garbage collector is emptied before and off meanwhile, and left as it was found. The shortest run of
    the loop around an empty callable is measured too.

    Args:
        run: one inference; it must return when the result is there, not when the work is queued.
        batch: items that one call of `run` works through.
        model: what runs.
        runner: what runs it.
        threads: of the runner; 0 for its own choice.
        machine: where it runs; read here if not given.
        duration_s: least time to measure for.
        min_runs: least number of samples, even if they take longer than `duration_s`.
        max_runs: most samples.
        warmup_s: most time for the warm-up; 0 together with `warmup_runs=0` leaves it out.
        warmup_runs: most runs for the warm-up.
        progress: told the share that is done, from 0 to 1, about ten times a second and between two samples.
        clock: nanoseconds that only grow.
    """
    _require_plan(batch, duration_s=duration_s, min_runs=min_runs, max_runs=max_runs, warmup=(warmup_s, warmup_runs))
    machine = read_machine() if machine is None else machine
    was_enabled = gc.isenabled()
    try:
        gc.collect()
        gc.disable()
        overhead_ns = statistics.median(_time_runs(lambda: None, clock, 0, _OVERHEAD_RUNS, _OVERHEAD_RUNS))
        warmed, is_steady = _warm_up(run, clock, warmup_s, warmup_runs)
        gc.collect()
        samples_ns = _time_runs(run, clock, round(duration_s * 1e9), min_runs, max_runs, progress)
    finally:
        if was_enabled:
            gc.enable()
    progress(1.0)
    samples = [nanoseconds / 1000 for nanoseconds in samples_ns]
    mean = statistics.fmean(samples)
    return LatencyProfile(
        samples_us=tuple(samples),
        p50_us=percentile(samples, 50),
        p90_us=percentile(samples, 90),
        p99_us=percentile(samples, 99),
        mean_us=mean,
        min_us=min(samples),
        max_us=max(samples),
        throughput_per_s=batch * 1e6 / max(mean, 1e-3),  # a clock's tick may be longer than a run
        num_samples=len(samples),
        warmup_runs=warmed,
        is_steady=is_steady,
        batch=batch,
        model=model,
        runner=runner,
        threads=threads,
        machine=machine,
        loop_overhead_us=overhead_ns / 1000,
        indicative=tuple(name for name in ("p90", "p99") if len(samples) < QUERIES_NEEDED[name]),
    )


def percentile(samples: Sequence[float], percent: int) -> float:
    """Return the smallest sample that at least `percent` (1 to 100) of all samples do not exceed: the nearest rank."""
    if not samples or not 1 <= percent <= 100:
        raise InvalidSpec(f"percentile {percent} of {len(samples)} samples; give 1 to 100 of at least one sample")
    return sorted(samples)[math.ceil(percent * len(samples) / 100) - 1]


def _warm_up(run: Callable[[], object], clock: Clock, limit_s: float, limit_runs: int) -> tuple[int, bool]:
    """Call `run` until its times settle or a limit is reached; return the number of calls, and whether they did."""
    times: list[int] = []
    start = clock()
    while len(times) < limit_runs and clock() - start < limit_s * 1e9:
        before = clock()
        run()
        times.append(clock() - before)
        if len(times) >= 2 * _WINDOW:
            earlier = statistics.median(times[-2 * _WINDOW : -_WINDOW])
            if abs(statistics.median(times[-_WINDOW:]) - earlier) <= _STEADY * earlier:
                return len(times), True
    return len(times), False


def _time_runs(
    run: Callable[[], object],
    clock: Clock,
    duration_ns: int,
    min_runs: int,
    max_runs: int,
    progress: Callable[[float], None] = lambda share: None,
) -> list[int]:
    """Return nanoseconds of each run."""
    samples: list[int] = []
    start = told = clock()
    while True:
        before = clock()
        run()
        after = clock()
        samples.append(after - before)
        count, spent = len(samples), after - start
        if count >= max_runs or (count >= min_runs and spent >= duration_ns):
            return samples
        if after - told >= _TELL_EVERY_NS:
            told = after
            progress(max(count / max_runs, min(count / min_runs, spent / duration_ns if duration_ns else 1.0)))


def _require_plan(batch: int, *, duration_s: float, min_runs: int, max_runs: int, warmup: tuple[float, int]) -> None:
    if batch < 1:
        raise InvalidSpec(f"batch {batch} must be at least 1: it is the number of items in a run")
    if not 0 <= duration_s < math.inf:
        raise InvalidSpec(f"duration {duration_s} s must be a number of seconds from 0 upwards")
    if not 1 <= min_runs <= max_runs:
        raise InvalidSpec(f"min_runs {min_runs} must be at least 1 and at most max_runs {max_runs}")
    if not (0 <= warmup[0] < math.inf and warmup[1] >= 0):
        raise InvalidSpec(f"warm-up of {warmup[0]} s and {warmup[1]} runs must not be negative or endless")
