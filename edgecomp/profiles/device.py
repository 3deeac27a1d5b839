"""The state of this device, from wherever it can be read: the kernel's files, NVML, and a Jetson's own."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import msgspec

from edgecomp.errors import RunError
from edgecomp.profiles import sysfs
from edgecomp.profiles.nvml import Nvml
from edgecomp.profiles.state import DeviceState, GpuState
from edgecomp.profiles.tegra import is_jetson, read_integrated_gpu, read_jetson
from edgecomp.resources import gpus_are_in_bus_order, visible_gpus

__all__ = ["open_nvml", "read_state"]

_HERE = Path("/")
_HIDDEN = "under /sys/devices/system/cpu; a virtual machine, a container or the kernel hides it"


def read_state(root: Path = _HERE, *, nvml: Nvml | None = None) -> DeviceState:
    """Read the state of this device now; nothing that cannot be read stops it.

    Args:
        root: of the file system. For another one than "/", no library and no program is asked: they would tell of
            this machine.
        nvml: to be asked, where it is open already, which saves the time to open it.
    """
    cores = sysfs.core_clocks(root)
    governor = sysfs.governor(root)
    temperatures, limits = sysfs.read_thermal(root)
    load = sysfs.load_average(root)
    available, _ = sysfs.memory_mib(root)
    unreadable = [
        reason
        for is_missing, reason in (
            (not any(core.now_mhz for core in cores), f"cpu clocks: no core's scaling_cur_freq {_HIDDEN}"),
            (governor == "unknown", f"governor: no scaling_governor {_HIDDEN}"),
            (not load, "load_average: no /proc/loadavg"),
            (available is None, "memory_available_mib: no MemAvailable in /proc/meminfo"),
            (not temperatures, "temperatures_c: no zone under /sys/class/thermal says one"),
        )
        if is_missing
    ]
    jetson = None
    if is_jetson(root):
        jetson, reasons = read_jetson(root, cores, temperatures)
        unreadable += reasons
    gpu, reasons = _read_gpu(root, nvml)
    return DeviceState(
        time_utc=datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        cores=cores,
        governor=governor,
        load_average=load,
        memory_available_mib=available,
        temperatures_c=temperatures,
        temperature_limits_c=limits,
        cooling=sysfs.working_cooling(root),
        cpu_throttle_count=sysfs.throttle_count(root),
        gpu=gpu,
        jetson=jetson,
        unreadable=(*unreadable, *reasons),
    )


def open_nvml() -> Nvml:
    """Open NVML for the GPU that CUDA gives this process first.

    Raises:
        RunError: there is no NVML, it does not start, or no GPU is visible.
    """
    return Nvml(visible=visible_gpus(), is_bus_order=gpus_are_in_bus_order())


def _read_gpu(root: Path, nvml: Nvml | None) -> tuple[GpuState | None, tuple[str, ...]]:
    """Return what NVML says of the GPU, and what the kernel does where NVML says nothing."""
    integrated = read_integrated_gpu(root)
    try:
        if nvml is not None:
            state, refused = nvml.read()
            notes = nvml.notes
        elif root == _HERE:
            with open_nvml() as opened:
                state, refused = opened.read()
                notes = opened.notes
        else:
            return integrated, () if integrated else (
                "gpu: NVML was not asked, for these files are not of this machine",
            )
    except RunError as error:
        return integrated, (f"gpu: {error}",)
    if integrated is not None:
        state = _filled(state, integrated)
    words: dict[str, list[str]] = {}
    for field, word in refused.items():
        if getattr(state, field) is None:
            words.setdefault(word, []).append(field)
    return state, (*notes, *(f"gpu {', '.join(fields)}: NVML says {word!r}" for word, fields in words.items()))


def _filled(state: GpuState, other: GpuState) -> GpuState:
    """Return a state with what it lacks taken from another of the same GPU."""
    missing = {
        field: getattr(other, field) for field in state.__struct_fields__ if getattr(state, field) in {None, "unknown"}
    }
    known = {field: value for field, value in missing.items() if value not in {None, "unknown"}}
    return msgspec.structs.replace(state, **known, source=f"{state.source}, {other.source}") if known else state
