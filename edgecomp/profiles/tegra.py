"""What a Jetson says of itself: tegrastats' lines, the power mode, jetson_clocks, the versions, the memory's clock.

The parsers take text and return what stands in it. JetPack 4 to 7 print the same facts in four forms; a line that is
cut off, glued to another or garbled gives fewer facts, never other ones.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Literal

import msgspec

from edgecomp.profiles.state import CoreClock, GpuState, JetsonState
from edgecomp.profiles.sysfs import (
    devfreq_gpu,
    find_rails,
    is_temperature,
    memory_mib,
    over_current_events,
    read_number,
    read_text,
    read_thermal,
    working_cooling,
)

__all__ = [
    "JetsonClocks",
    "Tegrastats",
    "is_jetson",
    "parse_jetson_clocks",
    "parse_l4t",
    "parse_power_mode",
    "parse_tegrastats",
    "read_integrated_gpu",
    "read_jetson",
]

_PATIENCE_S = 2.0
_CHIPS = {"tegra210": 53, "tegra186": 62, "tegra194": 72, "tegra234": 87, "tegra264": 110}  # their SM
_EMC = (
    ("sys/class/devfreq/bwmgr/cur_freq", "sys/class/devfreq/bwmgr/max_freq"),  # JetPack 7
    ("sys/kernel/debug/bpmp/debug/clk/emc/rate", "sys/kernel/debug/bpmp/debug/clk/emc/max_rate"),  # root alone
    ("sys/kernel/debug/clk/emc/clk_rate", "sys/kernel/debug/clk/emc/clk_max_rate"),  # Nano and TX1; root alone
)

# A line begins with the memory; what stands before it is the time, or the end of another line.
_RAM = re.compile(r"(?:^|(?<=\s))RAM ([0-9]{1,8})/([0-9]{1,8})MB(?=\s|$)")
_CPU = re.compile(r"\sCPU \[([^][]*)\](?:@([0-9]{1,5})(?=\s))?")
_CORE = re.compile(r"([0-9]{1,3})%(?:@([0-9]{1,5}))?")
# A number that nothing closes counts only when a blank follows: the line may have been cut within it.
_GPU = re.compile(r"\sGR3D_FREQ (?:([0-9]{1,3})%)?(?:@(?:\[([0-9,]{1,40})\]|([0-9]{1,5})(?=\s)))?")
_EMC_FREQ = re.compile(r"\sEMC_FREQ (?:([0-9]{1,3})%)?(?:@([0-9]{1,5})(?=\s))?")
_TEMPERATURE = re.compile(r"(?<=\s)([A-Za-z][A-Za-z0-9_-]{0,31})@(-?[0-9]{1,4}(?:[.,][0-9]{1,4})?)C(?=[\s/]|$)")
_POWER = re.compile(r"(?<=\s)([A-Z][A-Z0-9_]{0,31}) (-?[0-9]{1,7})(?:mW(?=[\s/]|$)|(?=/))(?:/-?[0-9]*(?:mW)?)*(?=\s|$)")
_NO_RAILS = ("NC", "RAM", "SWAP", "IRAM")


class Tegrastats(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What stands in one line of tegrastats; None or absent where the line does not say it.

    Attributes:
        ram_used_mib: of the memory that CPU and GPU share.
        ram_total_mib: of the memory that CPU and GPU share.
        cpu_mhz: by core; None where it is off, or its clock is not printed.
        gpu_percent: how busy the GPU was.
        gpu_mhz: of its fastest cluster; None also where all are asleep, which is printed as 0.
        emc_percent: how busy the external memory was.
        emc_mhz: its clock; printed to root alone on most boards.
        temperatures_c: by zone; a sensor that is off prints -256 and is left out.
        rails_mw: power now, by rail; the average behind it is since tegrastats began, and not kept.
    """

    ram_used_mib: float
    ram_total_mib: float
    cpu_mhz: tuple[float | None, ...] = ()
    gpu_percent: float | None = None
    gpu_mhz: float | None = None
    emc_percent: float | None = None
    emc_mhz: float | None = None
    temperatures_c: dict[str, float] = {}
    rails_mw: dict[str, float] = {}


class JetsonClocks(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `jetson_clocks --show` prints, in MHz.

    Attributes:
        cores: of the cores that are online.
        gpu: as a core; its number is 0.
        emc: as a core; its number is 0.
    """

    cores: tuple[CoreClock, ...] = ()
    gpu: CoreClock | None = None
    emc: CoreClock | None = None

    @property
    def state(self) -> Literal["on", "off", "unknown"]:
        """Whether clocks are held at their highest: the lowest that is allowed equals the highest everywhere."""
        return _held([*self.cores, *([self.gpu] if self.gpu is not None else [])], is_whole=self.gpu is not None)


def parse_tegrastats(line: str) -> Tegrastats | None:
    """Return what a line of tegrastats says; None where it is no such line, or two that ran into each other."""
    found = list(_RAM.finditer(line))
    if len(found) != 1:
        return None
    rest = line[found[0].start() :]
    gpu, emc = _GPU.search(rest), _EMC_FREQ.search(rest)
    clusters = (gpu[2] or gpu[3] or "").split(",") if gpu else []
    temperatures = [(name, float(word.replace(",", "."))) for name, word in _TEMPERATURE.findall(rest)]
    powers = [(name, float(word)) for name, word in _POWER.findall(rest) if name not in _NO_RAILS]
    return Tegrastats(
        ram_used_mib=float(found[0][1]),
        ram_total_mib=float(found[0][2]),
        cpu_mhz=_core_clocks(rest),
        gpu_percent=_percent(gpu),
        gpu_mhz=max((float(word) for word in clusters if word), default=0.0) or None,
        emc_percent=_percent(emc),
        emc_mhz=float(emc[2]) if emc and emc[2] else None,
        temperatures_c=_unambiguous([(name, celsius) for name, celsius in temperatures if is_temperature(celsius)]),
        rails_mw=_unambiguous(powers),
    )


def parse_power_mode(text: str) -> tuple[int | None, str]:
    """Return number and name of the power mode from what `nvpmodel -q` prints; None and "unknown" for what is missing.

    Beside them it prints warnings, the fan's mode and, if asked to, every setting, on lines of their own.
    """
    name = re.search(r"NV Power Mode:[ \t]*([^\s:][^\r\n]*?)[ \t]*\r?$", text, re.MULTILINE)
    number = re.search(r"^[ \t]*([0-9]{1,4})[ \t]*\r?$", text[name.end() :], re.MULTILINE) if name else None
    return int(number[1]) if number else None, name[1] if name else "unknown"


def parse_l4t(text: str) -> str:
    """Return the version of the board support package from `/etc/nv_tegra_release`, as "36.4.3"."""
    match = re.match(r"# R([0-9]{1,3}) \(release\), REVISION: ([0-9]{1,3}(?:\.[0-9]{1,3}){0,2})(?=[,\s])", text)
    return f"{match[1]}.{match[2]}" if match else "unknown"


def parse_jetson_clocks(text: str) -> JetsonClocks:
    """Return what `jetson_clocks --show` prints; without root it prints an error, which gives nothing."""
    cores = []
    devices: dict[str, CoreClock] = {}
    for line in text.splitlines():
        match = re.match(r"(?:cpu([0-9]{1,3}): |(GPU|EMC) )(.*)$", line)
        values = dict(re.findall(r"\b(\w+)=([0-9]{1,12})(?=\s|$)", match[3])) if match else {}
        if match is None or not {"MinFreq", "MaxFreq", "CurrentFreq"} <= set(values) or values.get("Online") == "0":
            continue
        scale = 1e-3 if match[1] else 1e-6  # kHz for cores, Hz for the others
        low, high, now = (int(values[word]) * scale for word in ("MinFreq", "MaxFreq", "CurrentFreq"))
        clock = CoreClock(core=int(match[1] or 0), now_mhz=now, min_mhz=low, max_mhz=high)
        if match[1]:
            cores.append(clock)
        else:
            devices[match[2]] = clock
    return JetsonClocks(cores=tuple(cores), gpu=devices.get("GPU"), emc=devices.get("EMC"))


def is_jetson(root: Path) -> bool:
    """Say whether this is a Jetson: it has NVIDIA's release file, or its device tree says so."""
    return (root / "etc/nv_tegra_release").is_file() or "Jetson" in read_text(root / "proc/device-tree/model")


def read_jetson(
    root: Path, cores: tuple[CoreClock, ...], thermal: dict[str, float] | None = None
) -> tuple[JetsonState, tuple[str, ...]]:
    """Return what a Jetson has besides, and what could not be read.

    Programs are asked only where the files do not tell, and only of the machine that this runs on, for at most 2 s.

    Args:
        root: of the file system.
        cores: their clocks, which tell whether jetson_clocks holds them.
        thermal: temperatures by zone, where they were read already.
    """
    unreadable = []
    number, name = _power_mode(root)
    if name == "unknown":
        unreadable.append("power mode: neither /var/lib/nvpmodel/status nor `nvpmodel -q` tells it")
    clocks = _jetson_clocks(root, cores)
    if clocks == "unknown":
        unreadable.append("jetson_clocks: the GPU's clock limits are not readable, and `--show` needs root")
    emc, emc_max = next(
        (
            pair
            for pair in ((read_number(root / now, 1e-6), read_number(root / high, 1e-6)) for now, high in _EMC)
            if pair[0]
        ),
        (None, None),
    )
    if emc is None:
        unreadable.append("emc_mhz: no bwmgr in /sys/class/devfreq, and the kernel's debug files are for root")
    rails = find_rails(root)
    powers = {rail.name: rail.power_mw(tuple(map(read_number, rail.files))) for rail in rails}
    if not rails:
        unreadable.append("rails_mw: no power monitor (INA3221, INA238) under /sys/class/hwmon or its iio device")
    available, total = memory_mib(root)
    state = JetsonState(
        model=read_text(root / "proc/device-tree/model") or "unknown",
        l4t=parse_l4t(read_text(root / "etc/nv_tegra_release")),
        jetpack=_jetpack(root),
        power_mode_id=number,
        power_mode=name,
        jetson_clocks=clocks,
        emc_mhz=emc,
        emc_max_mhz=emc_max,
        rails_mw={name: power for name, power in powers.items() if power is not None},
        ram_used_mib=None if available is None or total is None else total - available,
        ram_total_mib=total,
        temperatures_c=read_thermal(root)[0] if thermal is None else thermal,
        over_current_events=over_current_events(root),
    )
    return state, tuple(unreadable)


def read_integrated_gpu(root: Path) -> GpuState | None:
    """Return what the kernel says of a Jetson's own GPU; None where it has no such device."""
    folder = devfreq_gpu(root)
    if folder is None:
        return None
    now, high = (read_number(folder / f"{word}_freq", 1e-6) for word in ("cur", "max"))
    temperatures, limits = read_thermal(root)
    zone = next((name for name in temperatures if name.lower().startswith("gpu")), "")
    cooling = working_cooling(root)
    load = read_number(folder / "device/load", 0.1)  # per mille
    chip, sm = _chip(root)
    return GpuState(
        name=chip,
        source="devfreq",
        sm=sm,
        graphics_mhz=now,
        sm_mhz=now,  # they are one clock domain
        max_graphics_mhz=high,
        max_sm_mhz=high,
        temperature_c=temperatures.get(zone),
        temperature_limit_c=limits.get(zone),
        utilization_percent=load,
        throttle_reasons=None if cooling is None else tuple(name for name in cooling if "gpu" in name.lower()),
    )


def _percent(match: re.Match[str] | None) -> float | None:
    return float(match[1]) if match and match[1] else None


def _core_clocks(line: str) -> tuple[float | None, ...]:
    """Return the clocks of the list of cores; JetPack 7.2 prints one for all of them, where they are equal."""
    found = _CPU.search(line)
    if found is None:
        return ()
    cores = [_CORE.fullmatch(word.strip()) for word in found[1].split(",")]
    clocks = [(core[2] or found[2]) if core else None for core in cores]
    return tuple(float(clock) if clock else None for clock in clocks)


def _unambiguous(pairs: list[tuple[str, float]]) -> dict[str, float]:
    """Return what has one value: a name that stands twice with two values says nothing."""
    found: dict[str, set[float]] = {}
    for name, value in pairs:
        found.setdefault(name, set()).add(value)
    return {name: next(iter(values)) for name, values in found.items() if len(values) == 1}


def _power_mode(root: Path) -> tuple[int | None, str]:
    """Return the power mode from nvpmodel's own files, or else from the program."""
    status = re.search(r"pmode:([0-9]{1,4})\b", read_text(root / "var/lib/nvpmodel/status"))
    modes = _config(root / "etc/nvpmodel.conf")
    if status and int(status[1]) in modes:
        return int(status[1]), modes[int(status[1])]
    return parse_power_mode(_ask(root, "nvpmodel", "-q"))


def _config(path: Path) -> dict[int, str]:
    """Return names of power modes by number from nvpmodel's configuration; a comment gives none."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    found = re.findall(r"^[ \t]*<[ \t]*POWER_MODEL[ \t]+ID=([0-9]{1,4})[ \t]+NAME=([^\s>]+)", text, re.MULTILINE)
    return {int(number): name for number, name in found}


def _jetson_clocks(root: Path, cores: tuple[CoreClock, ...]) -> Literal["on", "off", "unknown"]:
    folder = devfreq_gpu(root)
    if folder is not None:
        low, high = (read_number(folder / f"{word}_freq", 1e-6) for word in ("min", "max"))
        gpu = CoreClock(core=0, min_mhz=low, max_mhz=high)
        state = _held([*cores, gpu], is_whole=bool(cores))
        if state != "unknown":
            return state
    return parse_jetson_clocks(_ask(root, "jetson_clocks", "--show")).state


def _held(clocks: list[CoreClock], *, is_whole: bool) -> Literal["on", "off", "unknown"]:
    known = [clock for clock in clocks if clock.min_mhz is not None and clock.max_mhz is not None]
    if any(clock.min_mhz != clock.max_mhz for clock in known):
        return "off"
    return "on" if is_whole and known and len(known) == len(clocks) else "unknown"


def _jetpack(root: Path) -> str:
    """Return the version of the package that JetPack is, from dpkg's list."""
    try:
        text = (root / "var/lib/dpkg/status").read_bytes()
    except OSError:
        return "unknown"
    start = text.find(b"\nPackage: nvidia-jetpack\n")
    entry = text[start + 1 :].partition(b"\n\n")[0] if start >= 0 else b""
    version = re.search(rb"^Version: ([\w.+~:-]{1,40})$", entry, re.MULTILINE)
    is_installed = re.search(rb"^Status: .* installed$", entry, re.MULTILINE)
    return version[1].decode() if version and is_installed else "unknown"


def _chip(root: Path) -> tuple[str, int | None]:
    """Return the chip's name by the device tree, and its compute capability without the dot."""
    names = re.findall(r"nvidia,(tegra[0-9]{3})\b", read_text(root / "proc/device-tree/compatible").replace("\0", " "))
    return (f"{names[-1]} GPU", _CHIPS.get(names[-1])) if names else ("unknown", None)


def _ask(root: Path, program: str, word: str) -> str:
    """Return what a program of this machine prints; "" where it is absent, fails or hangs, or for another root."""
    path = shutil.which(program) if root == Path("/") else None
    if path is None:
        return ""
    try:
        done = subprocess.run(
            [path, word], stdin=subprocess.DEVNULL, capture_output=True, timeout=_PATIENCE_S, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode(errors="replace") if done.returncode == 0 else ""
