"""Whether a measurement's conditions stood still: the rule, and nothing but the rule.

**Unstable** is a result during which any of these was seen.

1. *Drift*: the clock of the device that worked (the GPU's multiprocessors, or the fastest core) has medians over the
   first and the last third of the samples that differ by more than 5 % of the higher one.
2. *Swings*: more than a tenth of the samples, and more than one, lie over 5 % away from the median of all.
3. *Throttling*: NVML gave a reason other than that the GPU was idle, that a user set application clocks, or that a
   display limits them; or one of the kernel's cooling devices that hold clocks was at work; or a count of thermal
   throttling (x86) or of over-current (Jetson) rose.
4. *Heat*: it came within 3 degrees of where the clocks begin to fall. Or the board's power mode changed.
5. *Times*: of the medians over tenths of the timed runs, the highest and the lowest have 95 % intervals that lie more
   than 5 % apart. It is what shows where no clock can be read: a guest of a hypervisor, for example. Fewer than 90
   runs do not say.

With fewer than nine samples that hold a clock, one of them could move a median; then the clocks before and after are
compared by the same 5 % instead, and take part in rule 2.

**Unknown** is a result whose clocks could not be read, if nothing of the above was seen either: nobody knows that it is
stable. **Stable** is the rest. Governor, power mode, other processes and a hypervisor are notes: they explain, and do
not decide.
"""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from edgecomp.profiles.nvml import HARMLESS_REASONS, is_gpu_reason
from edgecomp.profiles.state import DeviceState, Stability, Watch
from edgecomp.profiles.statistics import median_interval

__all__ = ["DRIFT_PERCENT", "FEWEST_SAMPLES", "NEAR_LIMIT_C", "SWING_SHARE", "judge_state"]

DRIFT_PERCENT = 5.0
"""How far clocks may differ, in percent of the higher one."""
SWING_SHARE = 0.1
"""Share of samples that may lie further from the median than that."""
NEAR_LIMIT_C = 3.0
"""Degrees below the limit from which on heat counts."""
FEWEST_SAMPLES = 9
"""Samples with a clock below which before and after are compared instead."""

_TENTHS = 10
_FEWEST_TIMES = 90
_BUSY_CORES = 0.5
_STOLEN_CORES = 0.05

Device = Literal["gpu", "cpu"]


def judge_state(
    before: DeviceState,
    after: DeviceState,
    watch: Watch | None = None,
    *,
    device: Device,
    times_us: Sequence[float] = (),
) -> Stability:
    """Say whether the conditions of a measurement stood still; the module states the rule.

    Args:
        before: the device after the warm-up and before the first sample.
        after: the device after the last one.
        watch: what was seen between them, where something watched.
        device: what the model ran on, whose clocks decide.
        times_us: microseconds of the timed runs, in the order in which they ran.
    """
    clocks = _clocks(watch, device)
    if len(clocks) >= FEWEST_SAMPLES:
        moved = _moves(clocks, device)
    else:
        ends = [clock for clock in (_clock(before, device), _clock(after, device)) if clock]
        moved = []
        if len(ends) == 2:
            clocks = [ends[0], *clocks, ends[1]]
            moved = [_drift(ends[0], ends[1], f"{device} clock before and after") or _swing(clocks, device)]
        elif len(clocks) > 1:
            moved = [_swing(clocks, device)]
        else:
            clocks = []
    seen = (
        *moved,
        _mode(before, after),
        *_throttling(before, after, watch, device),
        *_heat(after, watch, device),
        _step(times_us),
    )
    reasons = tuple(reason for reason in seen if reason)
    notes = _notes(after, watch)
    if reasons:
        return Stability("unstable", reasons, notes)
    if not clocks:
        said = next((line for line in after.unreadable if line.startswith(device)), f"{device} clocks: not readable")
        return Stability("unknown", (said,), notes)
    return Stability("stable", (), notes)


def _clock(state: DeviceState, device: Device) -> float | None:
    if device == "gpu":
        return None if state.gpu is None else state.gpu.sm_mhz or state.gpu.graphics_mhz
    return max((core.now_mhz for core in state.cores if core.now_mhz), default=None)


def _clocks(watch: Watch | None, device: Device) -> list[float]:
    samples = () if watch is None else watch.samples
    return [clock for clock in (s.gpu_mhz if device == "gpu" else s.cpu_mhz for s in samples) if clock]


def _moves(clocks: Sequence[float], device: Device) -> list[str]:
    third = len(clocks) // 3
    first, last = statistics.median(clocks[:third]), statistics.median(clocks[-third:])
    return [_drift(first, last, f"{device} clock over the measurement") or _swing(clocks, device)]


def _swing(clocks: Sequence[float], device: Device) -> str:
    """Return the reason where too many clocks lie away from their median, "" where not."""
    middle = statistics.median(clocks)
    away = [clock for clock in clocks if abs(clock - middle) > middle * DRIFT_PERCENT / 100]
    if len(away) <= max(SWING_SHARE * len(clocks), 1):
        return ""
    return (
        f"{device} clock left {middle:.0f} MHz by more than {DRIFT_PERCENT:g} % in {len(away)} of {len(clocks)} "
        f"samples, from {min(clocks):.0f} to {max(clocks):.0f} MHz"
    )


def _drift(first: float, last: float, where: str) -> str:
    """Return the reason where two clocks differ by too much, "" where not."""
    if abs(first - last) <= DRIFT_PERCENT / 100 * max(first, last):
        return ""
    return f"{where}: {first:.0f} MHz to {last:.0f} MHz, {100 * (last - first) / first:+.1f} %"


def _step(times_us: Sequence[float]) -> str:
    """Return the reason where parts of the run took other times than others, "" where not."""
    if len(times_us) < _FEWEST_TIMES:
        return ""
    cuts = [len(times_us) * part // _TENTHS for part in range(_TENTHS + 1)]
    parts = [median_interval(times_us[begin:end]) for begin, end in itertools.pairwise(cuts)]
    least, most = min(parts, key=lambda part: part.value), max(parts, key=lambda part: part.value)
    if most.low <= least.high * (1 + DRIFT_PERCENT / 100):
        return ""
    return (
        f"the times moved: medians over tenths of the runs from {least.value / 1000:.3f} to {most.value / 1000:.3f} ms"
    )


def _mode(before: DeviceState, after: DeviceState) -> str:
    """Return the reason where the board's power mode changed, "" where not."""
    modes = [state.jetson.power_mode if state.jetson is not None else "unknown" for state in (before, after)]
    return f"the power mode changed from {modes[0]} to {modes[1]}" if modes[0] != modes[1] else ""


def _throttling(before: DeviceState, after: DeviceState, watch: Watch | None, device: Device) -> list[str]:
    """Return a reason for each word that says that clocks were held, and for each counter that rose."""
    samples = () if watch is None else watch.samples
    gpu = (after.gpu.throttle_reasons if after.gpu else None) or ()
    readings = [*(sample.throttle_reasons or () for sample in samples), (*gpu, *(after.cooling or ()))]
    seen = Counter(word for words in readings for word in set(words))
    found = [
        f"{word}, in {count} of {len(readings)} readings"
        for word, count in sorted(seen.items())
        if word not in HARMLESS_REASONS and (device == "gpu" or not is_gpu_reason(word))
    ]
    heat = _rise(before.cpu_throttle_count, after.cpu_throttle_count)
    if heat:
        found.append(f"the cores slowed down for heat {heat} times")
    old, new = (state.jetson.over_current_events if state.jetson else {} for state in (before, after))
    for name in sorted(new):
        current = _rise(old.get(name), new[name])
        if current:
            found.append(f"the board slowed down for current {current} times (counter {name})")
    return found


def _rise(before: int | None, after: int | None) -> int:
    return after - before if before is not None and after is not None and after > before else 0


def _heat(after: DeviceState, watch: Watch | None, device: Device) -> list[str]:
    found = []
    limit = after.gpu.temperature_limit_c if after.gpu else None
    if device == "gpu" and limit is not None:
        samples = () if watch is None else watch.samples
        read = [sample.temperature_c for sample in samples] + [after.gpu.temperature_c if after.gpu else None]
        highest = max((celsius for celsius in read if celsius is not None), default=None)
        if highest is not None and highest >= limit - NEAR_LIMIT_C:
            found.append(f"gpu at {highest:.1f} C, and its clocks fall from {limit:.1f} C on")
    if device == "cpu" or after.jetson is not None:  # a Jetson's zones share a die
        for zone, celsius in after.temperatures_c.items():
            limit = after.temperature_limits_c.get(zone)
            if limit is not None and celsius >= limit - NEAR_LIMIT_C and not zone.startswith("PMIC"):
                found.append(f"{zone} at {celsius:.1f} C, and clocks fall from {limit:.1f} C on")
    return found


def _notes(after: DeviceState, watch: Watch | None) -> tuple[str, ...]:
    notes = []
    if after.governor not in {"performance", "unknown"}:
        notes.append(f"governor {after.governor}: the cores' clocks follow the load; performance holds them")
    if after.jetson is not None and after.jetson.jetson_clocks == "off":
        notes.append("jetson_clocks is off: the clocks follow the load; `sudo jetson_clocks` holds them")
    busy = (after.gpu.num_processes if after.gpu else None) or 0
    if busy > 1:
        notes.append(f"{busy} compute processes on the GPU, this one among them")
    if after.gpu is not None and after.gpu.mig_instance:
        notes.append("an instance of a GPU: clocks, heat and power are those of the whole GPU")
    if watch is not None and watch.other_cores is not None and watch.other_cores > _BUSY_CORES:
        notes.append(f"other processes kept {watch.other_cores:.1f} cores busy")
    if watch is not None and watch.stolen_cores is not None and watch.stolen_cores > _STOLEN_CORES:
        notes.append(f"a hypervisor took {watch.stolen_cores:.2f} cores away")
    return tuple(notes)
