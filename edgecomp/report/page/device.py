"""The device's state while each graph was measured: clocks, heat, power, and what moved."""

from __future__ import annotations

from collections.abc import Sequence

from edgecomp.profiles.latency import LatencyProfile
from edgecomp.profiles.result import Result
from edgecomp.profiles.state import DeviceState, Watch
from edgecomp.report.page.groups import graph_label
from edgecomp.report.page.numbers import number, word
from edgecomp.report.page.sources import Source
from edgecomp.report.page.values import Cell, Column, Table
from edgecomp.report.page.words import shown

__all__ = ["device_table"]

_UNKNOWN = "unknown"


def device_table(sources: Sequence[Source]) -> Table | None:
    """Return a row for each graph whose device was watched; None where none was."""
    rows = [
        (word(source.name), word(f"{graph_label(one)}, batch {one.batch}"), *_cells(one, one.watch))
        for source in sources
        if isinstance(source.value, Result)
        for one in source.value.profiles
        if one.watch is not None
    ]
    if not rows:
        return None
    columns = (
        Column("File"),
        Column("Graph"),
        Column("Stability"),
        *(Column(name) for name in ("GPU clock, MHz", "CPU clock, MHz", "Temperature, C", "Held down by", "Mode")),
        *(Column(name, is_number=True) for name in ("Power, W", "Energy of a run, mJ", "Other cores busy")),
    )
    foot = (
        "Clocks and temperatures are before and after; power is the mean while it was measured, idle power with it.",
    )
    return Table("The device while each graph was measured", columns, tuple(rows), foot)


def _cells(profile: LatencyProfile, watch: Watch) -> tuple[Cell, ...]:
    before, after = watch.before, watch.after
    held = [*(shown(one) for one in after.cooling or ())]
    held += [shown(one) for one in (after.gpu.throttle_reasons or () if after.gpu is not None else ())]
    known = after.cooling is not None or (after.gpu is not None and after.gpu.throttle_reasons is not None)
    power = watch.mean_power_mw
    return (
        _stability(profile),
        word(_span(_gpu_mhz(before), _gpu_mhz(after))),
        word(_span(_cpu_mhz(before), _cpu_mhz(after)), f"governor {shown(after.governor)}"),
        word(_span(_celsius(before), _celsius(after))),
        word(", ".join(held) or ("nothing" if known else _UNKNOWN)),
        word(_mode(after)),
        number(None if power is None else power / 1000, 2),
        number(profile.energy_mj, 3, marks=("unstable",) if profile.marks else ()),
        number(watch.other_cores, 2),
    )


def _stability(profile: LatencyProfile) -> Cell:
    if profile.stability is None:
        return Cell(_UNKNOWN)
    told = "; ".join(shown(line) for line in (*profile.stability.reasons, *profile.stability.notes))
    verdict = profile.stability.verdict
    return Cell(
        verdict if verdict != "unstable" else "", note=told, marks=("unstable",) if verdict == "unstable" else ()
    )


def _span(before: float | None, after: float | None) -> str:
    if before is None and after is None:
        return _UNKNOWN
    first, last = (_UNKNOWN if value is None else f"{value:,.0f}" for value in (before, after))
    return first if first == last else f"{first} to {last}"


def _gpu_mhz(state: DeviceState) -> float | None:
    if state.gpu is None:
        return None
    return state.gpu.sm_mhz if state.gpu.sm_mhz is not None else state.gpu.graphics_mhz


def _cpu_mhz(state: DeviceState) -> float | None:
    return max((core.now_mhz for core in state.cores if core.now_mhz is not None), default=None)


def _celsius(state: DeviceState) -> float | None:
    if state.gpu is not None and state.gpu.temperature_c is not None:
        return state.gpu.temperature_c
    return max(state.temperatures_c.values(), default=None)


def _mode(state: DeviceState) -> str:
    if state.jetson is not None:
        return f"{shown(state.jetson.power_mode)}, jetson_clocks {state.jetson.jetson_clocks}"
    if state.gpu is not None:
        persistent = {None: _UNKNOWN, True: "on", False: "off"}[state.gpu.is_persistent]
        return f"persistence {persistent}, MIG {state.gpu.mig}"
    return "\u2013"
