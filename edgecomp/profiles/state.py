"""The values of a device's state: what was read at one moment, what was watched meanwhile, and what it says.

They stand in every result, because a latency without the clocks it was taken at is a number of some other device.
What cannot be read is None or "unknown", and `unreadable` says why; nothing here is guessed or filled in.
"""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = [
    "CoreClock",
    "DeviceState",
    "GpuState",
    "JetsonState",
    "Sample",
    "Stability",
    "Verdict",
    "Watch",
    "energy_per_run_mj",
]

Verdict = Literal["stable", "unstable", "unknown"]


class CoreClock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One CPU core's clock in MHz; None where the kernel does not say.

    Attributes:
        core: its number.
        now_mhz: what it runs at.
        min_mhz: the lowest that its governor may choose, as set now.
        max_mhz: the highest that its governor may choose, as set now.
    """

    core: int
    now_mhz: float | None = None
    min_mhz: float | None = None
    max_mhz: float | None = None


class GpuState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The GPU that this process uses: the first that `CUDA_VISIBLE_DEVICES` leaves.

    Attributes:
        name: as the driver calls it, or the chip of a Jetson; no serial number and no UUID.
        source: where it was read: "nvml", "devfreq", or "nvml, devfreq".
        index: NVML's number of it, which nvidia-smi shows too; None on a Jetson without NVML.
        num_gpus: how many the machine has; None when unknown.
        sm: compute capability without the dot.
        driver: its version; "unknown" where nothing says so.
        graphics_mhz: graphics clock now.
        sm_mhz: clock of the multiprocessors now.
        memory_mhz: memory clock now.
        max_graphics_mhz: highest graphics clock; on a Jetson the highest that the power mode allows.
        max_sm_mhz: highest clock of the multiprocessors.
        max_memory_mhz: highest memory clock.
        temperature_c: of the die.
        temperature_limit_c: where the driver begins to slow the clocks down.
        power_mw: drawn now, of the whole board; newer drivers give an average over the last second.
        power_limit_mw: what the driver holds it to.
        utilization_percent: share of the last sampling period in which a kernel ran.
        throttle_reasons: why the clocks are not at their highest, in words; empty when nothing holds them; None when
            unknown.
        memory_used_mib: by all processes.
        memory_total_mib: all of it.
        num_processes: compute processes on it, this one included; None when unknown.
        is_persistent: the driver stays loaded without users; False makes the first call slow.
        mig: "on", "off", "unsupported" or "unknown": whether the GPU is cut into instances.
        mig_instance: whether this process sees an instance and not the whole GPU. Clocks, power and temperature are
            those of the whole GPU even then.
    """

    name: str
    source: str
    index: int | None = None
    num_gpus: int | None = None
    sm: int | None = None
    driver: str = "unknown"
    graphics_mhz: float | None = None
    sm_mhz: float | None = None
    memory_mhz: float | None = None
    max_graphics_mhz: float | None = None
    max_sm_mhz: float | None = None
    max_memory_mhz: float | None = None
    temperature_c: float | None = None
    temperature_limit_c: float | None = None
    power_mw: float | None = None
    power_limit_mw: float | None = None
    utilization_percent: float | None = None
    throttle_reasons: tuple[str, ...] | None = None
    memory_used_mib: float | None = None
    memory_total_mib: float | None = None
    num_processes: int | None = None
    is_persistent: bool | None = None
    mig: Literal["on", "off", "unsupported", "unknown"] = "unknown"
    mig_instance: bool = False


class JetsonState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a Jetson has besides: its power mode, its rails and the clock of its memory.

    Attributes:
        model: the board, as its device tree calls it.
        l4t: version of the board support package, for example "36.4.3".
        jetpack: version of JetPack where its package is installed; "unknown" otherwise.
        power_mode_id: nvpmodel's number of the mode; None when unknown.
        power_mode: nvpmodel's name of the mode.
        jetson_clocks: "on" where the GPU's and every core's lowest clock equals its highest, "off" where not.
        emc_mhz: clock of the external memory; mostly readable by root alone.
        emc_max_mhz: its highest.
        rails_mw: power by rail, as the board names them. They may overlap: see `Watch.total_rails`.
        ram_used_mib: shared by CPU and GPU.
        ram_total_mib: shared by CPU and GPU.
        temperatures_c: by zone, as the board names them.
        over_current_events: how often the board slowed down because a rail drew too much, by counter, since it started.
    """

    model: str = "unknown"
    l4t: str = "unknown"
    jetpack: str = "unknown"
    power_mode_id: int | None = None
    power_mode: str = "unknown"
    jetson_clocks: Literal["on", "off", "unknown"] = "unknown"
    emc_mhz: float | None = None
    emc_max_mhz: float | None = None
    rails_mw: dict[str, float] = {}
    ram_used_mib: float | None = None
    ram_total_mib: float | None = None
    temperatures_c: dict[str, float] = {}
    over_current_events: dict[str, int] = {}


class DeviceState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A device at one moment.

    Attributes:
        time_utc: when it was read, by ISO 8601, for example "2026-11-22T12:00:00.123Z".
        cores: clocks of every core that says one.
        governor: of the CPU's clocks; several when the cores differ, "unknown" where there is none to read.
        load_average: processes that wanted to run, over 1, 5 and 15 minutes; empty where the system keeps none.
        memory_available_mib: what could be taken without swapping.
        temperatures_c: by thermal zone.
        temperature_limits_c: by thermal zone, where the kernel begins to slow down; zones without a limit are absent.
        cooling: what the kernel or the board holds a clock down with now, because of heat: names of its cooling devices
            that are at work; None when unknown.
        cpu_throttle_count: how often heat has slowed the cores down since the start, summed; None when unknown.
        gpu: None where there is no NVIDIA GPU, or nothing answers for it.
        jetson: None where this is no Jetson.
        unreadable: what could not be read, each with its reason.
    """

    time_utc: str
    cores: tuple[CoreClock, ...] = ()
    governor: str = "unknown"
    load_average: tuple[float, ...] = ()
    memory_available_mib: float | None = None
    temperatures_c: dict[str, float] = {}
    temperature_limits_c: dict[str, float] = {}
    cooling: tuple[str, ...] | None = None
    cpu_throttle_count: int | None = None
    gpu: GpuState | None = None
    jetson: JetsonState | None = None
    unreadable: tuple[str, ...] = ()


class Sample(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was read once while a measurement ran; None where that source does not give it.

    Attributes:
        time_s: seconds since the watch began.
        rails_mw: power by rail; the rail of a GPU that NVML reads is "gpu".
        gpu_mhz: clock of the GPU's multiprocessors.
        memory_mhz: clock of the GPU's memory, or of a Jetson's external memory.
        cpu_mhz: clock of the fastest core, which is the one that works.
        temperature_c: of the GPU, or the hottest zone where the GPU has none of its own.
        throttle_reasons: as in `GpuState`.
    """

    time_s: float
    rails_mw: dict[str, float] = {}
    gpu_mhz: float | None = None
    memory_mhz: float | None = None
    cpu_mhz: float | None = None
    temperature_c: float | None = None
    throttle_reasons: tuple[str, ...] | None = None


class Watch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a monitor saw between two moments.

    Attributes:
        before: the device when the watch began.
        after: the device when it ended.
        duration_s: time between the two, on a clock that only grows.
        interval_ms: time between two samples, as asked for.
        sources: what was sampled, for example ("nvml", "cpufreq"); empty where nothing could be.
        samples: in order of time.
        energy_mj: by rail, the trapezoid of power over time, held level from the last sample to the end.
        total_rails: the rails whose sum is the total: rails that feed others are not counted twice.
        total_energy_mj: over `total_rails`; None where no power is known.
        mean_power_mw: `total_energy_mj` by the time it covers; None where no power is known.
        counter_energy_mj: what the GPU's own counter of energy rose by, to hold beside the trapezoid; None without one.
        other_cores: how many cores other processes kept busy, on average; None when unknown.
        stolen_cores: how many cores a hypervisor took away, on average; None when unknown.
        sample_cost_us: CPU time that one sample took of this process, on average; None without samples.
        notes: what a reader of the numbers must know.
    """

    before: DeviceState
    after: DeviceState
    duration_s: float
    interval_ms: float
    sources: tuple[str, ...] = ()
    samples: tuple[Sample, ...] = ()
    energy_mj: dict[str, float] = {}
    total_rails: tuple[str, ...] = ()
    total_energy_mj: float | None = None
    mean_power_mw: float | None = None
    counter_energy_mj: float | None = None
    other_cores: float | None = None
    stolen_cores: float | None = None
    sample_cost_us: float | None = None
    notes: tuple[str, ...] = ()


class Stability(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whether clocks, heat and power left a measurement alone; `edgecomp.profiles.stability` states the rule.

    Attributes:
        verdict: "stable"; "unstable", for a reason given; "unknown", where the clocks cannot be read.
        reasons: why it is not stable; empty when it is.
        notes: what does not decide, and a reader should know: the governor, other load.
    """

    verdict: Verdict
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_stable(self) -> bool:
        """Nothing moved, and that was seen; unknown is not stable."""
        return self.verdict == "stable"


def energy_per_run_mj(watch: Watch, *, runs: int) -> float | None:
    """Return millijoules for each of so many runs; None where no power is known or nothing ran."""
    if watch.total_energy_mj is None or runs < 1:
        return None
    return watch.total_energy_mj / runs
