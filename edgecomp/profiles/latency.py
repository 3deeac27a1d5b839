"""How long one run takes: raw samples, percentiles, and how far the percentiles can be trusted."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from edgecomp.errors import InvalidSpec
from edgecomp.profiles.statistics import percentile_ranks

__all__ = [
    "PERCENTILES",
    "QUERIES_NEEDED",
    "LatencyProfile",
    "Percentile",
    "Stage",
    "measure_latency",
    "percentile",
    "percentiles_of",
]

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
QUERIES_NEEDED = {"p90": 24_576, "p95": 57_344, "p97": 90_112, "p99": 270_336, "p99.9": 2_654_208}
"""Samples that carry a percentile at 99 % confidence, by MLPerf Inference's rules.

They are (z / margin)^2 p (1 - p) with z = 2.576 and a margin of a twentieth of 1 - p, rounded up to a multiple of
2^13; p99.9 follows from the same formula. A percentile from fewer samples is a figure to go by, not one to promise.
"""

_WINDOW = 10  # runs that a warm-up median covers
_STEADY = 0.05  # relative change between two windows that counts as none
_OVERHEAD_RUNS = 1000
_TELL_EVERY_NS = 100_000_000

Clock = Callable[[], int]


class Percentile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A percentile by nearest rank, so that it is a time that was measured, and how far it can be trusted.

    Attributes:
        us: microseconds.
        low_us, high_us: its 95 % confidence interval by order statistics; none where so few samples bound it on
            that side by nothing.
        is_indicative: fewer samples than MLPerf's rules ask for (`QUERIES_NEEDED`): a figure to go by, not to promise.
    """

    us: float
    low_us: float | None
    high_us: float | None
    is_indicative: bool


class Stage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of one request, timed by itself; the parts need not add up to the whole.

    Attributes:
        name: `preprocessing`, `host to device`, `router`, `stem`, `encoder`, `selection`, `merge`, `device to host`.
        p50_us: median in microseconds.
        how: how it was told apart, in a few words.
    """

    name: str
    p50_us: float
    how: str


class LatencyProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What measuring one graph on one machine, in one mode, gave.

    Attributes:
        model: what ran, for example the ONNX file's name.
        role: what the graph is for: `bucket`, `stem`, `router`, `plain`, or `model` of a plain ONNX file.
        tokens_in, tokens_out: before and behind the compressor; 0 where there is none.
        precision: what the graph computes in; "" where it is not known.
        flops: of one run at this batch; 0 where they were not counted.
        runner: what ran it, with its version, for example "onnxruntime 1.27.0".
        threads: of the runner; 0 when it chose by itself.
        batch: items a run.
        mode: MLPerf's scenario in its wording. `single-stream`: one run after the other. `multi-stream`: `streams` runs
            at a time, a sample is over when the last of them is. `offline`: `streams` runs at any time, each
            beginning when another ends; latency is that of a run, throughput that of all.
        streams: runs at a time.
        cuda_graph: whether runs were launched as one CUDA graph; none where there is no GPU.
        samples_us: every timed run in order, in microseconds of wall time.
        num_samples: length of `samples_us`.
        percentiles: by name: p50, p90, p95, p99, p99.9.
        mean_us, min_us, max_us: of the samples.
        throughput_per_s: items a second.
        load_us: reading the model until it could run; none where that was not measured.
        first_us: the first inference; likewise.
        warmup_runs: runs before the first sample, the first inference with them.
        is_steady: the warm-up ended because times had settled, not because its limit was reached.
        loop_overhead_us: median time of a callable that does nothing, in the same loop. It is contained in every
            sample and not subtracted.
        stages: empty where they were not told apart.
        host_peak_mib: the most resident memory of this process while it loaded and ran; none where unknown.
        device_peak_mib: the most memory of the GPU in use, likewise.
    """

    model: str
    role: str = "model"
    tokens_in: int = 0
    tokens_out: int = 0
    precision: str = ""
    flops: int = 0
    runner: str
    threads: int
    batch: int
    mode: Literal["single-stream", "multi-stream", "offline"] = "single-stream"
    streams: int = 1
    cuda_graph: bool | None = None
    samples_us: tuple[float, ...]
    num_samples: int
    percentiles: dict[str, Percentile]
    mean_us: float
    min_us: float
    max_us: float
    throughput_per_s: float
    load_us: float | None = None
    first_us: float | None = None
    warmup_runs: int
    is_steady: bool
    loop_overhead_us: float
    stages: tuple[Stage, ...] = ()
    host_peak_mib: float | None = None
    device_peak_mib: float | None = None

    @property
    def p50_us(self) -> float:
        """The median."""
        return self.percentiles["p50"].us


def measure_latency(
    run: Callable[[], object],
    *,
    batch: int,
    model: str = "",
    runner: str = "",
    threads: int = 0,
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
        duration_s: least time to measure for.
        min_runs: least number of samples, even if they take longer than `duration_s`.
        max_runs: most samples.
        warmup_s: most time for the warm-up; 0 together with `warmup_runs=0` leaves it out.
        warmup_runs: most runs for the warm-up.
        progress: told the share that is done, from 0 to 1, about ten times a second and between two samples.
        clock: nanoseconds that only grow.
    """
    _require_plan(batch, duration_s=duration_s, min_runs=min_runs, max_runs=max_runs, warmup=(warmup_s, warmup_runs))
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
        model=model,
        runner=runner,
        threads=threads,
        batch=batch,
        samples_us=tuple(samples),
        num_samples=len(samples),
        percentiles=percentiles_of(samples),
        mean_us=mean,
        min_us=min(samples),
        max_us=max(samples),
        throughput_per_s=batch * 1e6 / max(mean, 1e-3),  # a clock's tick may be longer than a run
        warmup_runs=warmed,
        is_steady=is_steady,
        loop_overhead_us=overhead_ns / 1000,
    )


def percentiles_of(samples: Sequence[float]) -> dict[str, Percentile]:
    """Return p50, p90, p95, p99 and p99.9 of samples, with intervals and marks."""
    ordered = sorted(samples)
    found = {}
    for percent in PERCENTILES:
        low, high = percentile_ranks(len(ordered), percent)
        name = f"p{percent:g}"
        found[name] = Percentile(
            us=percentile(ordered, percent),
            low_us=None if low is None else ordered[low],
            high_us=None if high is None else ordered[high],
            is_indicative=len(ordered) < QUERIES_NEEDED.get(name, 0),
        )
    return found


def percentile(samples: Sequence[float], percent: float) -> float:
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
