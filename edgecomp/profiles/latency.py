"""How long one run takes: raw samples, percentiles, and how far the percentiles can be trusted."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta

from edgecomp.errors import InvalidSpec
from edgecomp.profiles.state import Stability, Watch
from edgecomp.profiles.statistics import percentile_ranks
from edgecomp.profiles.streams import Clock, Run, Team, Timed, time_always_busy, time_runs

__all__ = [
    "MODES",
    "MOST_PERCENT",
    "PERCENTILES",
    "QUERIES_NEEDED",
    "LatencyProfile",
    "Mode",
    "Percentile",
    "Stage",
    "contradiction_in",
    "measure_latency",
    "percentile",
    "percentile_name",
    "percentiles_of",
    "queries_needed",
    "require_mode",
    "require_percent",
]

Mode = Literal["single-stream", "multi-stream", "offline"]
MODES: tuple[str, ...] = get_args(Mode)

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
MOST_PERCENT = 99.99  # beyond, a percentile of what one run can take is its longest sample, or next to it
_LONGEST_US = 1e12  # eleven days
QUERIES_NEEDED = {"p90": 24_576, "p95": 57_344, "p97": 90_112, "p99": 270_336, "p99.9": 2_654_208}
"""Samples that carry a percentile at 99 % confidence, by MLPerf Inference's rules.

They are (z / margin)^2 p (1 - p) with z = 2.576 and a margin of a twentieth of 1 - p, rounded up to a multiple of
2^13; p99.9 follows from the same formula. A percentile from fewer samples is a figure to go by, not one to promise.
"""

_WINDOW = 10  # runs that a warm-up median covers
_STEADY = 0.05  # relative change between two windows that counts as none
_FEW, _FEW_WINDOW = 6, 3  # least runs of a warm-up, and the windows where its limit leaves no room for more
_OVERHEAD_RUNS = 1000
_MOST_STREAMS = 256


class Percentile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A percentile by nearest rank, so that it is a time that was measured, and how far it can be trusted.

    Attributes:
        us: microseconds.
        low_us, high_us: its 95 % confidence interval by order statistics; none where so few samples bound it on
            that side by nothing.
        is_indicative: fewer samples than MLPerf's rules ask for (`queries_needed`): a figure to go by, not to promise.
    """

    us: float
    low_us: float | None
    high_us: float | None
    is_indicative: bool


class Stage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of one request, timed by itself; the parts need not add up to the whole.

    Attributes:
        name: `preprocessing`, `router`, `stem`, `behind the stem`, `host to device`, `engine`, `device to host`, and by
            the layers' shares `encoder`, `compressor`, `selection`, `merge`; of a stem and what reads it
            `engine (stem)`, ...
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
        runner: what ran it, with its version, for example "onnxruntime 1.27.0"; "onnxruntime-cuda 1.27.0" on the GPU.
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
        duration_s: wall time from the first sample's beginning to the last one's end; 0 where it was not kept.
        load_us: reading the model until it could run; none where that was not measured.
        first_us: the first inference; likewise.
        warmup_runs: runs before the first sample, the first inference with them.
        is_steady: the warm-up ended because times had settled, not because its limit was reached.
        loop_overhead_us: median time of a callable that does nothing, in the same loop. It is contained in every
            sample and not subtracted.
        stages: empty where they were not told apart.
        watch: the device before, while and after the samples were taken; none where nobody looked.
        stability: whether its clocks, heat and power stood still; likewise.
        energy_mj: of one run, by the power that was drawn while it ran, idle power with it; none where that is unknown.
        host_peak_mib: the most resident memory of this process while it loaded and ran; none where unknown, and of all
            but the first graph of a run, since what that left behind would count.
        device_peak_mib: the most memory of the GPU in use, likewise.
    """

    model: str
    role: str = "model"
    tokens_in: int = 0
    tokens_out: int = 0
    precision: str = ""
    flops: int = 0
    runner: str
    threads: Annotated[int, Meta(ge=0)]
    batch: Annotated[int, Meta(ge=1)]
    mode: Mode = "single-stream"
    streams: Annotated[int, Meta(ge=1)] = 1
    cuda_graph: bool | None = None
    samples_us: tuple[float, ...]
    num_samples: int
    percentiles: dict[str, Percentile]
    mean_us: float
    min_us: float
    max_us: float
    throughput_per_s: Annotated[float, Meta(gt=0)]
    duration_s: float = 0.0
    load_us: float | None = None
    first_us: float | None = None
    warmup_runs: int
    is_steady: bool
    loop_overhead_us: float
    stages: tuple[Stage, ...] = ()
    watch: Watch | None = None
    stability: Stability | None = None
    energy_mj: float | None = None
    host_peak_mib: Annotated[float, Meta(ge=0)] | None = None
    device_peak_mib: Annotated[float, Meta(ge=0)] | None = None

    @property
    def p50_us(self) -> float:
        """The median."""
        return self.percentiles["p50"].us

    @property
    def marks(self) -> tuple[str, ...]:
        """What stands against its numbers, each in a few words; empty where nothing does."""
        moved = self.stability.reasons if self.stability is not None and self.stability.verdict == "unstable" else ()
        return (*(f"unstable: {reason}" for reason in moved), *(() if self.is_steady else ("warm-up did not settle",)))


def measure_latency(
    run: Run,
    *,
    batch: int,
    model: str = "",
    runner: str = "",
    threads: int = 0,
    mode: Mode = "single-stream",
    others: Sequence[Run] = (),
    duration_s: float = 3.0,
    min_runs: int = 20,
    max_runs: int = 100_000,
    warmup_s: float = 2.0,
    warmup_runs: int = 100,
    percents: Sequence[float] = (),
    watch: AbstractContextManager[object] | None = None,
    progress: Callable[[float], None] = lambda share: None,
    clock: Clock = time.perf_counter_ns,
) -> LatencyProfile:
    """Time `run` again and again, in one of MLPerf's modes.

    **Warm-up.** `run` is called until the median of the last 10 times lies within 5 % of the median of the 10
    before them, or until `warmup_s` seconds or `warmup_runs` runs are spent, whichever comes first, but at least 6
    times. A warm-up whose limit left no room for 20 runs has settled if the medians of its last 3 and of the 3 before
    them are as near. The profile says whether times had settled (`is_steady`). With several streams a run here is one
    of each at a time.

    **Timing.** Then until `duration_s` has passed and there are `min_runs` samples, or there are `max_runs`.
    Python's garbage collector is emptied before and off meanwhile, and left as it was found. The median of the same
    loop around callables that do nothing is measured too.

    Args:
        run: one inference; it must return when the result is there, not when the work is queued.
        batch: items that one call of `run` works through.
        model: what runs.
        runner: what runs it.
        threads: of the runner; 0 for its own choice.
        mode: `single-stream`: one call after the other. `multi-stream`: `run` and `others` at a time; a sample ends
            with the last of them. `offline`: each of them begins anew as soon as it has ended; a sample is one run.
        others: what the other streams run; the same callable may stand there again where threads can share it.
        duration_s: least time to measure for.
        min_runs: least number of samples, even if they take longer than `duration_s`.
        max_runs: most samples.
        warmup_s: most time for the warm-up; 0 for it, or for `warmup_runs`, leaves it out.
        warmup_runs: most runs for the warm-up.
        percents: percentiles to give besides `PERCENTILES`.
        watch: entered when the warm-up is over, left after the last sample.
        progress: told the share that is done, from 0 to 1, about ten times a second and between two samples.
        clock: nanoseconds that only grow.

    Raises:
        InvalidSpec: a plan that cannot be. RunError: the clock gave no times.
    """
    _require_plan(batch, duration_s=duration_s, min_runs=min_runs, max_runs=max_runs, warmup=(warmup_s, warmup_runs))
    runs = (run, *others)
    require_mode(mode, len(runs))
    percents = _require_percents(percents)
    limits = {"duration_ns": round(duration_s * 1e9), "min_runs": min_runs, "max_runs": max_runs}
    was_enabled = gc.isenabled()
    try:
        gc.collect()
        gc.disable()
        overhead_us = _measure_overhead(mode, len(runs), clock)
        with Team(runs) as team:
            step = team if others else run
            warmup_ns, is_steady = _warm_up(step, clock, warmup_s, warmup_runs)
            gc.collect()
            with watch or nullcontext():
                if mode == "offline":
                    timed = time_always_busy(runs, clock, progress=progress, **limits)
                else:
                    timed = time_runs(step, clock, progress=progress, **limits)
    finally:
        if was_enabled:
            gc.enable()
    progress(1.0)
    samples = [nanoseconds / 1000 for nanoseconds in timed.samples_ns]
    mean = statistics.fmean(samples)
    return LatencyProfile(
        model=model,
        runner=runner,
        threads=threads,
        batch=batch,
        mode=mode,
        streams=len(runs),
        samples_us=tuple(samples),
        num_samples=len(samples),
        percentiles=percentiles_of(samples, percents),
        mean_us=mean,
        min_us=min(samples),
        max_us=max(samples),
        throughput_per_s=_throughput(mode, timed, batch, len(runs)),
        duration_s=timed.elapsed_ns / 1e9,
        first_us=(warmup_ns or timed.samples_ns)[0] / 1000,
        warmup_runs=len(warmup_ns),
        is_steady=is_steady,
        loop_overhead_us=overhead_us,
    )


def require_mode(mode: str, streams: int) -> None:
    """Refuse a mode that there is not, and a number of streams that is not one of it."""
    if mode not in MODES:
        raise InvalidSpec(f"no mode {mode!r}; there are {', '.join(MODES)}")
    least, most = {"single-stream": (1, 1), "multi-stream": (2, _MOST_STREAMS), "offline": (1, _MOST_STREAMS)}[mode]
    if not least <= streams <= most:
        raise InvalidSpec(
            f"{streams} streams in mode {mode}, which takes {least if least == most else f'{least} to {most}'}; "
            "several streams are measured with --mode multi-stream or --mode offline"
        )


def require_percent(percent: float) -> None:
    """Refuse a percentile that says nothing of a run, or that no run has samples for."""
    if not 1 <= percent <= MOST_PERCENT:
        raise InvalidSpec(f"percentile {percent:.15g} is not from 1 to {MOST_PERCENT}, such as 99 or 99.9")


def queries_needed(percent: float) -> int:
    """Return how many samples carry a percentile by MLPerf's rules; 0 of the median, which always stands.

    The rules' own table is taken as it stands (`QUERIES_NEEDED`), others follow from its formula.
    """
    if percent <= 50:
        return 0
    if (name := percentile_name(percent)) in QUERIES_NEEDED:
        return QUERIES_NEEDED[name]
    share = percent / 100
    return math.ceil((2.5758 / ((1 - share) / 20)) ** 2 * share * (1 - share) / 8192) * 8192


def percentile_name(percent: float) -> str:
    """Return what results call a percentile, for example `p99.9`: with all of its digits, so that none is another."""
    return f"p{percent:.15g}"


def percentiles_of(samples: Sequence[float], percents: Sequence[float] = PERCENTILES) -> dict[str, Percentile]:
    """Return percentiles of samples by their names, `p50`, ..., with intervals and marks."""
    ordered = sorted(samples)
    found = {}
    for percent in percents:
        low, high = percentile_ranks(len(ordered), percent)
        found[percentile_name(percent)] = Percentile(
            us=percentile(ordered, percent),
            low_us=None if low is None else ordered[low],
            high_us=None if high is None else ordered[high],
            is_indicative=len(ordered) < queries_needed(percent),
        )
    return found


def percentile(samples: Sequence[float], percent: float) -> float:
    """Return the smallest sample that at least `percent` (1 to 100) of all samples do not exceed: the nearest rank."""
    if not samples or not 1 <= percent <= 100:
        raise InvalidSpec(f"percentile {percent} of {len(samples)} samples; give 1 to 100 of at least one sample")
    return sorted(samples)[math.ceil(percent * len(samples) / 100) - 1]


def _measure_overhead(mode: Mode, streams: int, clock: Clock) -> float:
    """Return the median microseconds of callables that do nothing, in the loop of a mode."""
    nothing: list[Run] = [lambda: None] * streams
    if mode == "offline" and streams > 1:
        # idle callables would only show how threads fight for Python's lock; each sample has one thread's loop in it
        nothing = nothing[:1]
    with Team(nothing) as team:
        step = team if len(nothing) > 1 else nothing[0]
        timed = time_runs(step, clock, duration_ns=0, min_runs=_OVERHEAD_RUNS, max_runs=_OVERHEAD_RUNS)
    return statistics.median(timed.samples_ns) / 1000


def contradiction_in(profile: LatencyProfile) -> str:
    """Return which figure of a profile does not follow from its samples; "" where all do."""
    samples = profile.samples_us
    if not samples or profile.num_samples != len(samples):
        return f"{profile.num_samples} samples are said, and {len(samples)} are there"
    worst = max(samples, key=lambda us: us if us >= 0 else math.inf)
    if not 0 <= worst <= _LONGEST_US:
        return f"a sample of {worst:g} us"
    lacking = [f"p{percent:g}" for percent in PERCENTILES if f"p{percent:g}" not in profile.percentiles]
    if lacking:
        return f"there is no {', '.join(lacking)}"
    said = {name: found.us for name, found in profile.percentiles.items()}
    try:
        follows = {name: found.us for name, found in percentiles_of(samples, [float(n[1:]) for n in said]).items()}
    except (ValueError, InvalidSpec):
        return f"percentiles {', '.join(said)}"
    mean = statistics.fmean(samples)
    said |= {"mean": profile.mean_us, "min": profile.min_us, "max": profile.max_us}
    follows |= {"mean": mean, "min": min(samples), "max": max(samples)}
    said["throughput"] = follows["throughput"] = profile.throughput_per_s
    if profile.mode != "offline":
        follows["throughput"] = profile.batch * profile.streams * 1e6 / max(mean, 1e-3)
    elif profile.duration_s:
        follows["throughput"] = profile.batch * len(samples) / profile.duration_s
    for name, value in said.items():
        if name not in follows or not math.isclose(value, follows[name], rel_tol=1e-6):
            return f"{name} of {value:g}, where its samples give {follows.get(name, math.nan):g}"
    return ""


def _throughput(mode: Mode, timed: Timed, batch: int, streams: int) -> float:
    """Return items a second."""
    if mode == "offline":
        return batch * len(timed.samples_ns) * 1e9 / max(timed.elapsed_ns, 1)
    # a clock's tick may be longer than a run
    return batch * streams * 1e9 / max(statistics.fmean(timed.samples_ns), 1.0)


def _warm_up(run: Run, clock: Clock, limit_s: float, limit_runs: int) -> tuple[list[int], bool]:
    """Call `run` until its times settle or a limit is reached; return the times, and whether they did."""
    times: list[int] = []
    start = clock()
    if not limit_s or not limit_runs:
        return times, False
    while len(times) < min(_FEW, limit_runs) or (len(times) < limit_runs and clock() - start < limit_s * 1e9):
        before = clock()
        run()
        times.append(clock() - before)
        if len(times) >= 2 * _WINDOW and _has_settled(times, _WINDOW):
            return times, True
    few = 2 * _FEW_WINDOW <= len(times) < 2 * _WINDOW
    return times, few and _has_settled(times, _FEW_WINDOW)


def _has_settled(times: Sequence[int], window: int) -> bool:
    earlier = statistics.median(times[-2 * window : -window])
    return abs(statistics.median(times[-window:]) - earlier) <= _STEADY * earlier


def _require_percents(percents: Sequence[float]) -> tuple[float, ...]:
    for percent in percents:
        require_percent(percent)
    return tuple(sorted({*PERCENTILES, *percents}))


def _require_plan(batch: int, *, duration_s: float, min_runs: int, max_runs: int, warmup: tuple[float, int]) -> None:
    if batch < 1:
        raise InvalidSpec(f"batch {batch} must be at least 1: it is the number of items in a run")
    if not 0 <= duration_s < math.inf:
        raise InvalidSpec(f"duration {duration_s} s must be a number of seconds from 0 upwards")
    if not 1 <= min_runs <= max_runs:
        raise InvalidSpec(f"min_runs {min_runs} must be at least 1 and at most max_runs {max_runs}; no result is empty")
    if not (0 <= warmup[0] < math.inf and warmup[1] >= 0):
        raise InvalidSpec(f"warm-up of {warmup[0]} s and {warmup[1]} runs must not be negative or endless")
