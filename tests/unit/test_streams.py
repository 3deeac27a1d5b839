"""Several runs at a time: MLPerf's multi-stream and offline, by threads, and what a broken clock or run leads to."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from edgecomp.errors import InvalidSpec, RunError
from edgecomp.profiles.latency import LatencyProfile, measure_latency, queries_needed
from edgecomp.profiles.streams import Team, time_always_busy, time_runs


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def meet(parties: int) -> Any:
    """Return a run that ends when so many of it are under way, and fails where they never are."""
    barrier = threading.Barrier(parties, timeout=20)
    return barrier.wait


def measured(run: Any, *others: Any, **changes: Any) -> LatencyProfile:
    given = {"batch": 2, "duration_s": 0, "min_runs": 12, "warmup_runs": 0, **changes}
    return measure_latency(run, others=others, **given)


def test_multi_stream_runs_all_at_a_time_and_a_sample_ends_with_the_last() -> None:
    together = meet(3)

    def slow() -> None:
        together()
        time.sleep(0.01)

    one = measured(together, together, slow, mode="multi-stream")
    assert (one.mode, one.streams, one.num_samples) == ("multi-stream", 3, 12)
    assert one.min_us >= 10_000
    assert one.throughput_per_s == pytest.approx(2 * 3 * 1e6 / one.mean_us)


def test_offline_keeps_all_streams_busy() -> None:
    seen: dict[int, int] = {}

    def run() -> None:
        seen[threading.get_ident()] = seen.get(threading.get_ident(), 0) + 1
        time.sleep(0.005)

    one = measured(run, run, run, mode="offline", min_runs=60)
    assert (one.mode, one.streams) == ("offline", 3)
    assert one.num_samples == sum(seen.values()) >= 60
    assert len(seen) == 3
    assert min(seen.values()) >= 3
    assert one.throughput_per_s == pytest.approx(2 * one.num_samples / one.duration_s)
    assert one.throughput_per_s > 2 * 1.5 * 1e6 / one.mean_us  # of one stream it would be batch by mean


def test_offline_of_one_stream_is_exact_by_its_clock() -> None:
    ticks = itertools.count(0, 1000)
    timed = time_always_busy([lambda: None], lambda: next(ticks), duration_ns=0, min_runs=5, max_runs=9)
    assert timed.samples_ns == [1000] * 5


@pytest.mark.parametrize("mode", ["multi-stream", "offline"])
@pytest.mark.parametrize("place", [0, 1])
def test_error_of_any_stream_ends_all(mode: str, place: int) -> None:
    def fail() -> None:
        raise KeyError("stream 7 broke")

    runs = [lambda: time.sleep(0.001)] * 2
    runs[place] = fail
    with pytest.raises(KeyError, match="stream 7 broke"):
        measured(*runs, mode=mode)


def test_team_that_is_interrupted_waits_for_its_threads() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    ended = threading.Event()

    def slow() -> None:
        time.sleep(0.02)
        ended.set()

    with pytest.raises(KeyboardInterrupt), Team([interrupted, slow]) as team:
        team()
    assert ended.is_set()


@pytest.mark.parametrize("broken", [float("nan"), -5.0, float("inf")])
def test_clock_that_gives_no_time(broken: float) -> None:
    ticks: Any = iter([0, 0, 10, 10, 10 + broken, 20, 30])
    with pytest.raises(RunError, match=r"run 2 of 2 took (nan|-5\.0|inf) ns"):
        time_runs(lambda: None, lambda: next(ticks), duration_ns=0, min_runs=2, max_runs=2)


@pytest.mark.parametrize(
    ("mode", "streams", "said"),
    [
        ("single-stream", 2, "2 streams in mode single-stream, which takes 1;"),
        ("multi-stream", 1, "1 streams in mode multi-stream, which takes 2 to 256"),
        ("offline", 257, "257 streams in mode offline, which takes 1 to 256"),
        ("server", 1, "no mode 'server'; there are single-stream, multi-stream, offline"),
    ],
)
def test_modes_and_streams_that_there_are_not(mode: Any, streams: int, said: str) -> None:
    run: Any = lambda: None  # noqa: E731
    with pytest.raises(InvalidSpec, match=said):
        measured(*[run] * streams, mode=mode)


def test_other_percentiles_are_given_beside_the_usual() -> None:
    one = measured(lambda: None, percents=(97.0, 99.99))
    assert list(one.percentiles) == ["p50", "p90", "p95", "p97", "p99", "p99.9", "p99.99"]
    assert one.percentiles["p99.99"].is_indicative
    assert [queries_needed(p) for p in (10, 50, 90, 97, 98)] == [0, 0, 24_576, 90_112, 131_072]


@pytest.mark.parametrize("percent", [0.5, 100.0, float("nan")])
def test_percentile_that_there_is_not(percent: float) -> None:
    with pytest.raises(InvalidSpec, match=f"percentile {percent:g} is not from 1 to 99.99"):
        measured(lambda: None, percents=(percent,))
