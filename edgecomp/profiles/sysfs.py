"""What Linux says of a machine's clocks, heat, load and power in `/proc` and `/sys`, without root and without a child.

Every function takes the root folder, so that a copied tree can be read; a file that is missing, empty or garbled gives
None, never a number.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import msgspec

from edgecomp.profiles.state import CoreClock

__all__ = [
    "Rail",
    "busy_jiffies",
    "cooling_files",
    "core_clocks",
    "core_numbers",
    "devfreq_gpu",
    "find_rails",
    "governor",
    "is_temperature",
    "load_average",
    "memory_mib",
    "number_of",
    "over_current_events",
    "read_number",
    "read_text",
    "read_thermal",
    "throttle_count",
    "total_rails",
    "working_cooling",
]

_CPUS = "sys/devices/system/cpu"
_GPU = re.compile(r"\.gpu|\.g[a-z]\d\d[a-z]|gpu-gpc-0")  # 57000000.gpu, 17000000.gv11b, 17000000.gpu, gpu-gpc-0
_HOLDS_CLOCKS = re.compile(r".*throttle-alert|(?:cpufreq|devfreq)-.*|.*-balanced")
_SLOWS_DOWN = ("passive", "hot", "critical")  # in this order: the first of these trip points is the limit
_LARGEST = 4096  # bytes; what these files hold is shorter

_INPUTS = ("VDD_IN", "POM_5V_IN", "VIN")
_SUMS = (
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),  # AGX Orin; VDDQ_VDD2_1V8AO hangs on VIN_SYS_5V0
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),  # AGX Xavier
)


class Rail(msgspec.Struct, frozen=True):
    """One supply of a board, and the files that give its power.

    Attributes:
        name: as the board names it.
        files: one file that gives power, or two whose product is power: voltage and current.
        to_mw: what the number, or the product, is multiplied with to give milliwatts.
    """

    name: str
    files: tuple[Path, ...]
    to_mw: float

    def power_mw(self, numbers: tuple[float | None, ...]) -> float | None:
        """Return the power of what the files hold; None unless all of them hold a number."""
        known = [number for number in numbers if number is not None]
        return math.prod(known) * self.to_mw if known and len(known) == len(self.files) else None


def read_text(path: Path) -> str:
    """Return the beginning of a file without blanks around it; "" where it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY)  # a third of the time of `path.open`, and there are many
    except OSError:
        return ""
    try:
        return os.read(descriptor, _LARGEST).decode(errors="replace").strip("\0 \t\r\n")
    except OSError:
        return ""
    finally:
        os.close(descriptor)


def read_number(path: Path, scale: float = 1.0) -> float | None:
    """Return the number that a file holds, times `scale`; None where it holds none."""
    return number_of(read_text(path), scale)


def number_of(text: str, scale: float = 1.0) -> float | None:
    """Return the whole number that a text is, times `scale`; None where it is something else."""
    return int(text) * scale if re.fullmatch(r"-?[0-9]{1,18}", text) else None


def core_numbers(root: Path) -> tuple[int, ...]:
    """Return the numbers of all cores that are there, in order."""
    found = (re.fullmatch(r"cpu(\d+)", path.name) for path in (root / _CPUS).glob("cpu[0-9]*"))
    return tuple(sorted(int(match[1]) for match in found if match))


def core_clocks(root: Path) -> tuple[CoreClock, ...]:
    """Return the clocks of every core that says one; a core that is switched off has none."""
    clocks = []
    for core in core_numbers(root):
        folder = root / _CPUS / f"cpu{core}/cpufreq"
        now, low, high = (read_number(folder / f"scaling_{word}_freq", 1e-3) for word in ("cur", "min", "max"))
        if now is not None or high is not None:
            clocks.append(CoreClock(core=core, now_mhz=now, min_mhz=low, max_mhz=high))
    return tuple(clocks)


def governor(root: Path) -> str:
    """Return the governor of the CPU's clocks; several with commas between, "unknown" without one."""
    files = (root / _CPUS).glob("cpu[0-9]*/cpufreq/scaling_governor")
    return ", ".join(sorted({text for text in map(read_text, files) if text})) or "unknown"


def throttle_count(root: Path) -> int | None:
    """Return how often heat has slowed the cores of an x86 down since the start; None where nothing counts it."""
    files = (root / _CPUS).glob("cpu[0-9]*/thermal_throttle/core_throttle_count")
    counts = [count for count in map(read_number, files) if count is not None]
    return int(sum(counts)) if counts else None


def load_average(root: Path) -> tuple[float, ...]:
    """Return the load over 1, 5 and 15 minutes; empty where the system keeps none."""
    match = re.match(r"(\d+\.\d+) (\d+\.\d+) (\d+\.\d+) ", read_text(root / "proc/loadavg") + " ", re.ASCII)
    return tuple(float(word) for word in match.groups()) if match else ()


def busy_jiffies(root: Path) -> tuple[int, int] | None:
    """Return ticks since the start in which a core worked, and in which a hypervisor took it away."""
    match = re.match(r"cpu +((?:\d+ ){7,9}\d+)\n", read_text(root / "proc/stat") + "\n", re.ASCII)
    if match is None:
        return None
    user, nice, system, _, _, irq, softirq, stolen = map(int, match[1].split()[:8])
    return user + nice + system + irq + softirq, stolen


def memory_mib(root: Path) -> tuple[float | None, float | None]:
    """Return memory that could be taken without swapping, and all of it."""
    text = read_text(root / "proc/meminfo")
    found = (re.search(rf"^{word}: +([0-9]{{1,15}}) kB$", text, re.MULTILINE) for word in ("MemAvailable", "MemTotal"))
    available, total = (int(match[1]) / 1024 if match else None for match in found)
    return available, total


def read_thermal(root: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Return temperatures by zone, and by zone where the kernel begins to slow down; both in degrees.

    A zone that is switched off refuses to be read, or says -256; it is left out. Where several zones have one name,
    the later ones get their number behind it.
    """
    temperatures: dict[str, float] = {}
    limits: dict[str, float] = {}
    for folder in _numbered(root / "sys/class/thermal", "thermal_zone"):
        celsius = read_number(folder / "temp", 1e-3)
        if celsius is None or not is_temperature(celsius):
            continue
        name = read_text(folder / "type") or folder.name
        name = f"{name} {folder.name.removeprefix('thermal_zone')}" if name in temperatures else name
        temperatures[name] = celsius
        limit = _limit(folder)
        if limit is not None:
            limits[name] = limit
    return temperatures, limits


def is_temperature(celsius: float) -> bool:
    """Say whether a sensor can mean this: one that is off says -256, and one that is broken some huge number."""
    return -100 < celsius < 250


def cooling_files(root: Path) -> dict[str, Path]:
    """Return the files that say how far each cooling device that holds a clock is engaged, by the device's name."""
    files: dict[str, Path] = {}
    for folder in _numbered(root / "sys/class/thermal", "cooling_device"):
        name = read_text(folder / "type")
        if _HOLDS_CLOCKS.fullmatch(name) and read_number(folder / "cur_state") is not None:
            files.setdefault(name, folder / "cur_state")
    return files


def working_cooling(root: Path) -> tuple[str, ...] | None:
    """Return the names of cooling devices that hold a clock down now; None where there are none that could."""
    files = cooling_files(root)
    return tuple(name for name, file in files.items() if (read_number(file) or 0) > 0) if files else None


def devfreq_gpu(root: Path) -> Path | None:
    """Return the folder of a Jetson's GPU among the devices that scale their clocks."""
    folders = sorted((root / "sys/class/devfreq").glob("*"))
    return next((folder for folder in folders if _GPU.search(folder.name)), None)


def over_current_events(root: Path) -> dict[str, int]:
    """Return how often a Jetson slowed down because a rail drew too much, by counter."""
    files = sorted((root / "sys/class/hwmon").glob("hwmon*/oc*_event_cnt"))
    counts = {file.name.removesuffix("_event_cnt"): read_number(file) for file in files}
    return {name: int(count) for name, count in counts.items() if count is not None}


def find_rails(root: Path) -> tuple[Rail, ...]:
    """Return the supplies that the power monitors of TI on a Jetson measure (INA3221, INA238).

    JetPack 5 and newer list them under hwmon, JetPack 4 under iio, already in milliwatts. Inputs that are named "NC"
    are not connected, and one without a current is a sum of voltages.
    """
    rails: dict[str, Rail] = {}
    for folder in _numbered(root / "sys/class/hwmon", "hwmon"):
        if read_text(folder / "name").startswith("ina"):
            for rail in _hwmon_rails(folder):
                rails.setdefault(rail.name, rail)
    for label in sorted((root / "sys/bus/i2c/drivers/ina3221x").glob("*/iio*device*/rail_name_[0-9]")):
        name, power = read_text(label), label.with_name(f"in_power{label.name[-1]}_input")
        if _is_rail(name) and read_number(power) is not None:
            rails.setdefault(name, Rail(name, (power,), 1.0))
    return tuple(rails.values())


def total_rails(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the rails whose sum is what the module takes; empty where these names do not tell.

    A rail at the input has everything behind it: so NVIDIA's forum says of VDD_IN (topic 200883), POM_5V_IN (73608) and
    VIN (366461, with the carrier board in it). AGX Xavier has none, and all of its rails are to be added up (81016); on
    AGX Orin those that are measured at the module's inputs.
    """
    for name in _INPUTS:
        if name in names:
            return (name,)
    return next((words for words in _SUMS if set(words) <= set(names)), ())


def _hwmon_rails(folder: Path) -> list[Rail]:
    labels = [(read_text(label), label.name[2:-6]) for label in sorted(folder.glob("in[0-9]*_label"))]
    rails = []
    for name, number in labels or [(read_text(folder / "label") or read_text(folder / "name"), "1")]:
        power, volt, current = (folder / f"{word}{number}_input" for word in ("power", "in", "curr"))
        if not _is_rail(name):
            continue
        if read_number(power) is not None:
            rails.append(Rail(name, (power,), 1e-3))  # microwatts
        elif read_number(volt) is not None and read_number(current) is not None:
            rails.append(Rail(name, (volt, current), 1e-3))  # millivolts times milliamperes
    return rails


def _is_rail(name: str) -> bool:
    return bool(name) and name != "NC" and "shunt" not in name


def _limit(folder: Path) -> float | None:
    found: dict[str, float] = {}
    for file in folder.glob("trip_point_[0-9]*_type"):
        kind = read_text(file)
        celsius = read_number(file.with_name(file.name.replace("_type", "_temp")), 1e-3)
        if celsius is not None and 0 < celsius < 250:
            found[kind] = min(celsius, found.get(kind, celsius))
    return next((found[kind] for kind in _SLOWS_DOWN if kind in found), None)


def _numbered(folder: Path, word: str) -> list[Path]:
    """Return the folders that are called by a word and a number, in the order of the numbers."""
    found = ((re.fullmatch(rf"{word}(\d+)", path.name), path) for path in folder.glob(f"{word}[0-9]*"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]
