"""Latency is measured by a stated rule, and a percentile says when its samples cannot carry it."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from edgecomp.errors import InvalidSpec
from edgecomp.profiles import machine as machines
from edgecomp.profiles.latency import QUERIES_NEEDED, LatencyProfile, measure_latency, percentile
from edgecomp.profiles.machine import Machine, read_gpu, read_machine


class Clock:
    """A clock that only a run moves."""

    def __init__(self, durations_us: Iterator[float]) -> None:
        self.now_ns = 0
        self.runs = 0
        self.durations_us = durations_us

    def __call__(self) -> int:
        return self.now_ns

    def run(self) -> None:
        self.runs += 1
        self.now_ns += round(next(self.durations_us) * 1000)


def constant(duration_us: float) -> Iterator[float]:
    while True:
        yield duration_us


def measure(clock: Clock, **changes: object) -> LatencyProfile:
    values: dict[str, object] = {"batch": 1, "clock": clock, **changes}
    return measure_latency(clock.run, **values)  # type: ignore[arg-type]


def test_statistics_of_known_samples() -> None:
    clock = Clock(iter([float(number) for number in range(100, 0, -1)]))
    profile = measure(
        clock, batch=4, warmup_runs=0, duration_s=0, min_runs=100, max_runs=100, model="m.onnx", runner="r", threads=2
    )
    assert profile.samples_us == tuple(float(number) for number in range(100, 0, -1))
    assert [profile.percentiles[name].us for name in ("p50", "p90", "p95", "p99", "p99.9")] == [
        50.0,
        90.0,
        95.0,
        99.0,
        100.0,
    ]
    assert (profile.min_us, profile.max_us, profile.mean_us) == (1.0, 100.0, 50.5)
    assert profile.throughput_per_s == pytest.approx(4 / 50.5e-6)
    assert (profile.num_samples, profile.warmup_runs, profile.batch) == (100, 0, 4)
    assert (profile.model, profile.runner, profile.threads) == ("m.onnx", "r", 2)
    assert profile.loop_overhead_us == 0.0


def test_profile_survives_json() -> None:
    profile = measure(Clock(constant(1000)), duration_s=0.05)
    assert msgspec.json.decode(msgspec.json.encode(profile), type=LatencyProfile) == profile


@pytest.mark.parametrize(("count", "percent", "expected"), [(1, 99, 0), (20, 90, 17), (20, 99, 19), (3, 50, 1)])
def test_percentile_is_a_sample_by_nearest_rank(count: int, percent: int, expected: int) -> None:
    assert percentile([float(number) for number in range(count)], percent) == expected


@pytest.mark.parametrize(("samples", "percent"), [([], 50), ([1.0], 0), ([1.0], 101)])
def test_impossible_percentile(samples: list[float], percent: int) -> None:
    with pytest.raises(InvalidSpec, match=f"percentile {percent} of {len(samples)} samples"):
        percentile(samples, percent)


def test_warm_up_ends_when_times_settle() -> None:
    def slow_start() -> Iterator[float]:
        yield from (1000 - 20 * number for number in range(30))
        yield from constant(400)

    clock = Clock(slow_start())
    profile = measure(clock, duration_s=0, min_runs=20)
    # after run 45 the last 10 are all 400 and the 10 before them 500, 480, 460, 440, 420, 5 x 400: medians 400 and 410;
    # after run 44 they are still 400 and 430, which is 7 % apart
    assert (profile.warmup_runs, profile.is_steady) == (45, True)
    assert set(profile.samples_us) == {400.0}
    assert clock.runs == 45 + 20


def test_warm_up_of_steady_times_takes_twenty_runs() -> None:
    profile = measure(Clock(constant(100)), duration_s=0)
    assert (profile.warmup_runs, profile.is_steady) == (20, True)


def growing() -> Iterator[float]:
    duration_us = 100.0
    while True:
        duration_us *= 1.02
        yield duration_us


def test_warm_up_that_never_settles_ends_after_100_runs_and_says_so() -> None:
    profile = measure(Clock(growing()), duration_s=0)
    assert (profile.warmup_runs, profile.is_steady) == (100, False)


def test_warm_up_ends_after_two_seconds_and_says_so() -> None:
    profile = measure(Clock(itertools.cycle([100_000, 200_000])), duration_s=0, min_runs=1)
    # 14 runs end after 2.1 s: the medians of the last 3 and of the 3 before them are 200 and 100 ms
    assert (profile.warmup_runs, profile.is_steady) == (14, False)


@pytest.mark.parametrize(("duration_us", "runs"), [(300_000, 7), (9_000_000, 6)])
def test_long_runs_settle_by_windows_of_three(duration_us: float, runs: int) -> None:
    profile = measure(Clock(constant(duration_us)), duration_s=0, min_runs=1)
    assert (profile.warmup_runs, profile.is_steady) == (runs, True)


@pytest.mark.parametrize("changes", [{"warmup_s": 0}, {"warmup_runs": 0}])
def test_no_warm_up_is_not_steady_and_the_first_sample_is_the_first_run(changes: dict[str, object]) -> None:
    profile = measure(Clock(iter([700.0, *[100.0] * 30])), duration_s=0, **changes)
    assert (profile.warmup_runs, profile.is_steady) == (0, False)
    assert profile.first_us == profile.samples_us[0] == 700.0


def test_first_run_is_that_of_the_warm_up() -> None:
    profile = measure(Clock(iter([900.0, *[100.0] * 60])), duration_s=0)
    assert profile.first_us == 900.0
    assert set(profile.samples_us) == {100.0}


def test_watch_covers_the_samples_and_not_the_warm_up() -> None:
    clock, seen = Clock(constant(100)), []

    @contextlib.contextmanager
    def watch() -> Iterator[None]:
        seen.append(clock.runs)
        yield
        seen.append(clock.runs)

    profile = measure(clock, duration_s=0, watch=watch())
    assert seen == [profile.warmup_runs, profile.warmup_runs + profile.num_samples]
    assert profile.duration_s == pytest.approx(20 * 100e-6)


def test_runs_for_the_duration() -> None:
    assert measure(Clock(constant(1000)), duration_s=3).num_samples == 3000


def test_min_runs_outlast_the_duration() -> None:
    assert measure(Clock(constant(1_000_000)), duration_s=3, min_runs=20).num_samples == 20


def test_max_runs_end_before_the_duration() -> None:
    assert measure(Clock(constant(1)), duration_s=3, max_runs=500).num_samples == 500


@pytest.mark.parametrize(
    ("count", "indicative"),
    [
        (24_575, ["p90", "p95", "p99", "p99.9"]),
        (24_576, ["p95", "p99", "p99.9"]),
        (57_344, ["p99", "p99.9"]),
        (270_335, ["p99", "p99.9"]),
        (270_336, ["p99.9"]),
    ],
)
def test_percentiles_without_enough_samples_are_marked(count: int, indicative: list[str]) -> None:
    profile = measure(Clock(constant(1)), duration_s=0, min_runs=count, max_runs=count)
    assert [name for name, one in profile.percentiles.items() if one.is_indicative] == indicative


def test_queries_needed_follow_from_the_formula() -> None:
    for name, needed in QUERIES_NEEDED.items():
        share = float(name[1:]) / 100
        exact = (2.5758 / ((1 - share) / 20)) ** 2 * share * (1 - share)
        assert needed == math.ceil(exact / 8192) * 8192, name


def test_progress_grows_to_one() -> None:
    told: list[float] = []
    measure(Clock(constant(1000)), duration_s=3, progress=told.append)
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert 25 <= len(told) <= 32


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collector_is_off_meanwhile_and_restored(enabled: bool) -> None:
    was, seen = gc.isenabled(), []
    try:
        (gc.enable if enabled else gc.disable)()
        measure_latency(lambda: seen.append(gc.isenabled()), batch=1, duration_s=0)
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was else gc.disable)()
    assert set(seen) == {False}


def test_garbage_collector_is_restored_after_an_error() -> None:
    def fail() -> None:
        raise KeyError("run failed")

    assert gc.isenabled()
    with pytest.raises(KeyError, match="run failed"):
        measure_latency(fail, batch=1)
    assert gc.isenabled()


def test_real_clock_measures_the_overhead_of_its_loop() -> None:
    profile = measure_latency(lambda: None, batch=1, duration_s=0, min_runs=1000)
    assert 0 < profile.loop_overhead_us <= 20
    assert profile.p50_us < 100


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"percents": (99.9999999,)}, "percentile 99.9999999 is not from 1 to 99.99"),
        ({"batch": 0}, "batch 0 must be at least 1"),
        ({"duration_s": -1.0}, "duration -1.0 s"),
        ({"duration_s": math.nan}, "duration nan s"),
        ({"duration_s": math.inf}, "duration inf s"),
        ({"min_runs": 0}, "min_runs 0 must be at least 1"),
        ({"min_runs": 30, "max_runs": 20}, "min_runs 30 must be at least 1 and at most max_runs 20"),
        ({"warmup_s": -2.0}, "warm-up of -2.0 s and 100 runs"),
        ({"warmup_runs": -3}, "warm-up of 2.0 s and -3 runs"),
    ],
)
def test_impossible_plan(changes: dict[str, object], text: str) -> None:
    with pytest.raises(InvalidSpec, match=re.escape(text)):
        measure(Clock(constant(1)), **changes)


def test_read_machine_of_this_one() -> None:
    machine = read_machine()
    assert machine.cores >= 1
    assert machine.python.endswith(platform.python_version())
    assert "numpy" in machine.versions
    assert msgspec.json.decode(msgspec.json.encode(machine), type=Machine) == machine


def test_read_machine_where_nothing_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows: no /proc, no /sys, no load, no sysconf, no affinity, no nvidia-smi."""
    monkeypatch.setattr(machines, "_read_text", lambda path: "")
    for name in ("getloadavg", "sysconf", "sched_getaffinity"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for name in ("processor", "machine"):
        monkeypatch.setattr(platform, name, lambda: "")
    machine = read_machine()
    assert (machine.cpu, machine.cores, machine.governor, machine.load_average) == ("unknown", 1, "unknown", ())
    assert (machine.memory_gib, machine.memory_available_gib, machine.gpu, machine.gpu_driver) == (0.0, 0.0, "", "")


def test_reads_proc_and_sys(tmp_path: Path) -> None:
    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    write("proc/meminfo", "MemTotal:       32777216 kB\nMemFree: 1 kB\nMemAvailable:   16388608 kB\nodd line\n")
    write("proc/device-tree/model", "NVIDIA Jetson AGX Orin Developer Kit\0")
    write("proc/cpuinfo", "processor\t: 0\nCPU part\t: 0xd42\n")
    write("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "schedutil\n")
    write("sys/devices/system/cpu/cpu1/cpufreq/scaling_governor", "performance\n")
    assert machines._read_memory(tmp_path) == (31.26, 15.63)
    assert machines._read_cpu(tmp_path) == "NVIDIA Jetson AGX Orin Developer Kit"
    assert machines._read_governor(tmp_path) == "performance, schedutil"
    write("proc/cpuinfo", "processor\t: 0\nmodel name\t: A CPU @ 3 GHz\n")
    assert machines._read_cpu(tmp_path) == "A CPU @ 3 GHz"


def answer(stdout: str, returncode: int = 0) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert command[0] == "/bin/nvidia-smi"
        assert options["timeout"] == 5.0
        return subprocess.CompletedProcess(command, returncode, stdout, "")

    return run


@pytest.mark.parametrize(
    ("stdout", "returncode", "expected"),
    [
        ("NVIDIA H200, 580.65.06\n", 0, ("NVIDIA H200", "580.65.06")),
        ("NVIDIA H200, 580.1\nNVIDIA H200, 580.1\nNVIDIA L4, 580.1\n", 0, ("2 x NVIDIA H200, NVIDIA L4", "580.1")),
        ("No devices were found\n", 0, ("", "")),
        ("NVIDIA-SMI has failed, no driver\n", 9, ("", "")),
    ],
)
def test_read_gpu(monkeypatch: pytest.MonkeyPatch, stdout: str, returncode: int, expected: tuple[str, str]) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(subprocess, "run", answer(stdout, returncode))
    assert read_gpu() == expected


def test_read_gpu_when_nvidia_smi_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], **options: object) -> None:
        raise subprocess.TimeoutExpired(command, 5)

    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(subprocess, "run", hang)
    assert read_gpu() == ("", "")
