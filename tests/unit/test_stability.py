"""The rule for "unstable": what counts, what is a note, and what nobody can know."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest

from edgecomp.profiles.nvml import throttle_words
from edgecomp.profiles.stability import FEWEST_SAMPLES, judge_state
from edgecomp.profiles.state import (
    CoreClock,
    DeviceState,
    GpuState,
    JetsonState,
    Sample,
    Stability,
    Watch,
    energy_per_run_mj,
)


def device(mhz: float | None = 1740, **fields: Any) -> DeviceState:
    gpu = GpuState(name="A", source="nvml", sm_mhz=mhz, throttle_reasons=(), temperature_c=60, temperature_limit_c=87)
    cores = () if mhz is None else (CoreClock(0, mhz / 2), CoreClock(1, mhz))
    return DeviceState(
        **{"time_utc": "2026-11-22T12:00:00.000Z", "cores": cores, "gpu": gpu, "governor": "performance"} | fields
    )


def gpu(state: DeviceState, **fields: Any) -> DeviceState:
    return msgspec.structs.replace(state, gpu=msgspec.structs.replace(state.gpu, **fields))


def watched(clocks: list[float | None], **fields: Any) -> Watch:
    samples = tuple(
        Sample(time_s=0.1 * number, gpu_mhz=mhz, cpu_mhz=mhz, throttle_reasons=()) for number, mhz in enumerate(clocks)
    )
    return Watch(
        **{
            "before": device(), "after": device(), "duration_s": 0.1 * len(clocks), "interval_ms": 100,
            "samples": samples,
        } | fields
    )  # fmt: skip


def judge(watch: Watch | None, word: Any = "gpu", **fields: Any) -> Stability:
    before, after = fields.get("before", device()), fields.get("after", device())
    return judge_state(before, after, watch, device=word)


@pytest.mark.parametrize("word", ["gpu", "cpu"])
def test_clocks_that_stand(word: str) -> None:
    said = judge(watched([1740] * 20), word)
    assert (said.verdict, said.is_stable, said.reasons, said.notes) == ("stable", True, (), ())


@pytest.mark.parametrize("word", ["gpu", "cpu"])
def test_clocks_that_drift(word: str) -> None:
    said = judge(watched([1740.0 - 10 * number for number in range(20)]), word)
    assert (said.verdict, said.is_stable) == ("unstable", False)
    assert said.reasons == (f"{word} clock over the measurement: 1715 MHz to 1575 MHz, -8.2 %",)
    assert judge(watched([1740.0 - 4 * number for number in range(20)]), word).is_stable
    said = judge(watched([1500.0] * 10 + [1740.0] * 10), word)
    assert "1500 MHz to 1740 MHz, +16.0 %" in said.reasons[0]


def test_limit_of_drift_is_five_percent() -> None:
    assert judge(watched([2000.0] * 10 + [1900.0] * 10)).is_stable
    assert not judge(watched([2000.0] * 10 + [1899.0] * 10)).is_stable


def test_clocks_that_dip() -> None:
    dips = [1740.0, 1740.0, 1740.0, 1740.0, 900.0] * 6
    said = judge(watched(list(dips)))
    assert said.reasons == ("gpu clock left 1740 MHz by more than 5 % in 6 of 30 samples, from 900 to 1740 MHz",)
    assert judge(watched([900.0] + [1740.0] * 8)).is_stable  # one sample is none, be it a ninth of them
    assert not judge(watched([1740.0, 900.0, 1740.0, 1740.0, 900.0, *[1740.0] * 4])).is_stable


def test_few_samples_compare_before_and_after() -> None:
    few: list[float | None] = [1740.0] * (FEWEST_SAMPLES - 2) + [900.0]
    assert judge(watched(few)).is_stable  # one sample is none
    said = judge(watched(few[1:]), after=device(1600))
    assert said.reasons[0] == "gpu clock before and after: 1740 MHz to 1600 MHz, -8.0 %"
    assert judge(None).is_stable
    assert judge(None, "cpu", after=device(1600)).reasons[0].startswith("cpu clock before and after: 1740")
    assert judge(
        watched([1740.0] * FEWEST_SAMPLES), after=device(1600)
    ).is_stable  # enough samples are better witnesses


@pytest.mark.parametrize(
    "clocks",
    [[1000.0] * 30 + [2000.0] * 40 + [1000.0] * 30, [1000.0, 2000.0, 1000.0] * 30, [1740.0] * 3 + [500.0] * 5],
    ids=["a hill", "every third", "few"],
)
def test_clocks_that_swing(clocks: list[float | None]) -> None:
    assert "clock left" in " ".join(judge(watched(clocks), "cpu").reasons)


def test_a_power_mode_that_changed() -> None:
    before, after = (device(jetson=JetsonState(power_mode=mode)) for mode in ("MAXN", "7W"))
    assert judge(None, before=before, after=after).reasons == ("the power mode changed from MAXN to 7W",)


@pytest.mark.parametrize("word", ["gpu", "cpu"])
def test_clocks_that_cannot_be_read_are_unknown(word: str) -> None:
    reason = f"{word} clocks: hidden by a virtual machine"
    blind = device(None, unreadable=("governor: hidden", reason))
    said = judge(watched([None] * 20), word, before=blind, after=blind)
    assert (said.verdict, said.is_stable, said.reasons) == ("unknown", False, (reason,))
    without = device(None, gpu=None)
    assert judge(None, word, before=without, after=without).reasons == (f"{word} clocks: not readable",)
    assert judge(None, word, before=blind).verdict == "unknown"  # one of two tells nothing


@pytest.mark.parametrize("bit", range(12))
def test_which_throttle_reasons_count(bit: int) -> None:
    words = throttle_words(1 << bit)
    said = judge(watched([1740] * 10), after=gpu(device(), throttle_reasons=words))
    harmless = {0, 1, 8}
    assert said.verdict == ("stable" if bit in harmless else "unstable")
    assert said.reasons == (() if bit in harmless else (f"{words[0]}, in 1 of 11 readings",))
    assert judge(None, "cpu", after=gpu(device(), throttle_reasons=words)).is_stable  # the GPU's, and the CPU worked


def test_throttling_that_was_over_before_the_end() -> None:
    watch = watched([1740] * 10)
    some = Sample(time_s=0.5, gpu_mhz=1740, throttle_reasons=("idle", "software power cap"))
    watch = Watch(before=device(), after=device(), duration_s=1, interval_ms=100, samples=(*watch.samples, some, some))
    assert judge(watch).reasons == ("software power cap, in 2 of 13 readings",)


def test_throttling_seen_without_clocks_is_unstable() -> None:
    blind = gpu(device(None), throttle_reasons=("hardware slowdown",))
    assert judge(None, before=blind, after=blind).verdict == "unstable"


@pytest.mark.parametrize("word", ["gpu", "cpu"])
def test_cooling_of_the_kernel_counts_for_both(word: str) -> None:
    said = judge(None, word, after=device(cooling=("cpu-throttle-alert",)))
    assert said.reasons == ("cpu-throttle-alert, in 1 of 1 readings",)


def test_counters_that_rose() -> None:
    assert judge(None, before=device(cpu_throttle_count=5), after=device(cpu_throttle_count=5)).is_stable
    said = judge(None, before=device(cpu_throttle_count=5), after=device(cpu_throttle_count=8))
    assert said.reasons == ("the cores slowed down for heat 3 times",)
    before, after = (device(jetson=JetsonState(over_current_events={"oc1": 0, "oc3": n})) for n in (37, 41))
    assert judge(None, before=before, after=after).reasons == (
        "the board slowed down for current 4 times (counter oc3)",
    )
    assert judge(None, before=device(), after=after).is_stable  # it may have risen earlier


def test_heat_near_the_limit() -> None:
    hot = Sample(time_s=1, gpu_mhz=1740, temperature_c=84)
    watch = Watch(before=device(), after=device(), duration_s=1, interval_ms=100, samples=(hot,) * 8)
    assert judge(watch).reasons == ("gpu at 84.0 C, and its clocks fall from 87.0 C on",)
    assert judge(watch, "cpu").is_stable  # the heat is that of the GPU
    assert judge(None, after=gpu(device(), temperature_c=83.9)).is_stable
    zones = {"temperatures_c": {"x86_pkg_temp": 97.5}, "temperature_limits_c": {"x86_pkg_temp": 100}}
    assert judge(None, "cpu", after=device(**zones)).reasons == (
        "x86_pkg_temp at 97.5 C, and clocks fall from 100.0 C on",
    )
    assert judge(None, "gpu", after=device(**zones)).is_stable
    assert not judge(None, "gpu", after=device(**zones, jetson=JetsonState())).is_stable
    pmic = {"temperatures_c": {"PMIC-Die": 100}, "temperature_limits_c": {"PMIC-Die": 100}}  # a constant on a Nano
    assert judge(None, "cpu", after=device(**pmic)).is_stable


@pytest.mark.parametrize(
    ("fields", "watch", "note"),
    [
        (
            {"governor": "schedutil"},
            {},
            "governor schedutil: the cores' clocks follow the load; performance holds them",
        ),
        ({"jetson": JetsonState(jetson_clocks="off")}, {}, "jetson_clocks is off"),
        ({}, {"other_cores": 1.25}, "other processes kept 1.2 cores busy"),
        ({}, {"stolen_cores": 0.5}, "a hypervisor took 0.50 cores away"),
    ],
)
def test_notes_do_not_decide(fields: dict[str, Any], watch: dict[str, Any], note: str) -> None:
    said = judge(watched([1740] * 10, **watch), after=device(**fields))
    assert said.is_stable
    assert len(said.notes) == 1
    assert said.notes[0].startswith(note)


def test_notes_of_the_gpu() -> None:
    said = judge(None, after=gpu(device(), num_processes=2, mig_instance=True))
    assert [note.partition(":")[0] for note in said.notes] == [
        "2 compute processes on the GPU, this one among them", "an instance of a GPU",
    ]  # fmt: skip
    assert judge(watched([1740] * 9, other_cores=0.4, stolen_cores=0.01)).notes == ()


def test_energy_of_a_run() -> None:
    watch = watched([1740], total_energy_mj=1200.0)
    assert energy_per_run_mj(watch, runs=400) == 3
    assert energy_per_run_mj(watch, runs=0) is None
    assert energy_per_run_mj(watched([1740]), runs=400) is None


def times(*parts: tuple[int, float]) -> list[float]:
    """Runs of so many, around so many microseconds, with 2 % of scatter."""
    return [us * (1 + 0.02 * math.sin(7.3 * number)) for count, us in parts for number in range(count)]


def judge_times(times_us: list[float]) -> Stability:
    watch = watched([1740] * 20)
    return judge_state(watch.before, watch.after, watch, device="cpu", times_us=times_us)


def test_times_that_move_are_unstable_though_clocks_stand() -> None:
    said = judge_times(times((30, 54_500), (270, 67_000)))
    assert said.verdict == "unstable"
    assert said.reasons == ("the times moved: medians over tenths of the runs from 54.550 to 67.061 ms",)


@pytest.mark.parametrize(
    "times_us",
    [times((300, 54_500)), times((150, 54_500), (150, 55_500)), times((20, 54_500), (60, 67_000)), []],
    ids=["still", "2 % apart", "too few", "none"],
)
def test_times_that_say_nothing(times_us: list[float]) -> None:
    assert judge_times(times_us).verdict == "stable"


def test_scatter_without_a_trend_is_no_move() -> None:
    """Skewed times of one distribution, 400 draws of 300: hardly ever called unstable."""
    generator = np.random.default_rng(0)
    called = sum(judge_times(list(1000 * generator.lognormal(0, 0.2, 300))).verdict == "unstable" for _ in range(400))
    assert called <= 8
