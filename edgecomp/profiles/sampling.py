"""What a monitor reads again and again: files that stay open, and tegrastats as a child process."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from edgecomp.profiles import sysfs

__all__ = ["Files", "Known", "TegrastatsChild"]

_MOST_CLOCKS = 64
_NUMBER = 64  # bytes; the files hold a number each
_LINE = 1 << 13
_PATIENCE_S = 2.0


@dataclass
class Known:
    """What a moment's files say; None where they do not."""

    rails_mw: dict[str, float] = field(default_factory=dict)
    gpu_mhz: float | None = None
    memory_mhz: float | None = None
    cpu_mhz: float | None = None
    celsius: float | None = None
    cooling: tuple[str, ...] | None = None


class Files:
    """The kernel's files of clocks, power and heat, open, so that a sample costs one call each.

    Attributes:
        rails: the supplies whose power they give.
        names: what kinds of files they are.
        descriptors: of the open files.
    """

    def __init__(self, root: Path) -> None:
        self.rails = sysfs.find_rails(root)
        self.descriptors: list[int] = []
        self._plan: list[tuple[str, str]] = []
        cooling = sysfs.cooling_files(root)
        wanted: list[tuple[str, str, Path]] = [("cpufreq", "", file) for file in _clock_files(root)]
        wanted += [("ina", rail.name, file) for rail in self.rails for file in rail.files]
        gpu = sysfs.devfreq_gpu(root)
        wanted += [("devfreq", "", gpu / "cur_freq")] if gpu is not None else []
        wanted += [("bwmgr", "", root / "sys/class/devfreq/bwmgr/cur_freq")]
        heat = _heat_file(root)
        wanted += [("thermal", "", heat)] if heat is not None else []
        wanted += [("cooling", name, file) for name, file in cooling.items()]
        for kind, name, file in wanted:
            with suppress(OSError):
                self.descriptors.append(os.open(file, os.O_RDONLY))
                self._plan.append((kind, name))
        self.names = sorted({kind for kind, _ in self._plan})

    def sample(self) -> tuple[bytes, ...]:
        """Return what the files hold now, as it is; empty for one that refuses, as a sensor does that is off."""
        return tuple(map(_read, self.descriptors))

    def understand(self, contents: tuple[bytes, ...]) -> Known:
        """Return what a sample says."""
        known = Known()
        rails: dict[str, list[float | None]] = {}
        clocks: list[float] = []
        cooling: list[str] = []
        for (kind, name), content in zip(self._plan, contents, strict=True):
            number = sysfs.number_of(content.decode(errors="replace").strip("\0 \t\r\n"))
            if kind == "ina":
                rails.setdefault(name, []).append(number)
            elif number is None:
                continue
            elif kind == "cpufreq":
                clocks.append(number * 1e-3)
            elif kind == "devfreq":
                known.gpu_mhz = number * 1e-6 or None
            elif kind == "bwmgr":
                known.memory_mhz = number * 1e-6 or None
            elif kind == "thermal":
                known.celsius = number * 1e-3 if sysfs.is_temperature(number * 1e-3) else None
            elif number > 0:
                cooling.append(name)
        known.cpu_mhz = max(clocks, default=None)
        known.cooling = tuple(cooling) if "cooling" in self.names else None
        powers = {rail.name: rail.power_mw(tuple(rails.get(rail.name, ()))) for rail in self.rails}
        known.rails_mw = {name: power for name, power in powers.items() if power is not None}
        return known

    def close(self) -> None:
        """Close the files; a second call does nothing."""
        while self.descriptors:
            os.close(self.descriptors.pop())


class TegrastatsChild:
    """tegrastats, running, with its lines kept as they come.

    It runs in a session of its own, so that it ends whole; and should this process be killed, it ends at its next line,
    which nobody reads.

    Attributes:
        fault: why there are no lines; "" while there is no reason.
    """

    def __init__(self, program: str, interval_ms: float) -> None:
        self.fault = ""
        self._lines: list[tuple[int, bytes]] = []
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        words = ["env", "LC_ALL=C", program, "--interval", str(round(interval_ms))]  # a point in decimals, not a comma
        try:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            self.fault = f"tegrastats cannot be started: {error}"
            return
        self._thread = threading.Thread(target=self._keep, name="edgecomp-tegrastats", daemon=True)
        self._thread.start()

    def stop(self) -> list[tuple[int, bytes]]:
        """End it, and return its lines with the moments at which they came; a second call ends nothing."""
        process, self._process = self._process, None
        if process is None:
            return self._lines
        code = process.poll()
        with suppress(OSError):  # its group is gone already
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
        self._thread.join(_PATIENCE_S)
        if process.stdout is not None and not self._thread.is_alive():
            process.stdout.close()
        if not self._lines:
            ended = "printed nothing" if code is None else f"ended by itself with status {code}"
            self.fault = f"tegrastats gives no line: {self._program} {ended}"
        return self._lines

    def _keep(self) -> None:
        stream = self._process.stdout if self._process is not None else None
        while stream is not None:
            line = stream.readline(_LINE)
            if not line:
                return
            self._lines.append((time.perf_counter_ns(), line))


def _read(descriptor: int) -> bytes:
    try:
        return os.pread(descriptor, _NUMBER, 0)
    except OSError:
        return b""


def _clock_files(root: Path) -> list[Path]:
    """Return one file for each group of cores that share a clock; of very many groups, some."""
    cpus = root / "sys/devices/system/cpu"
    files = sorted(cpus.glob("cpufreq/policy[0-9]*/scaling_cur_freq"))
    files = files or sorted(cpus.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
    return files[:: -(-len(files) // _MOST_CLOCKS)] if files else []


def _heat_file(root: Path) -> Path | None:
    """Return the temperature of the GPU's zone, or else of the zone that is the hottest now."""
    folders = sorted((root / "sys/class/thermal").glob("thermal_zone[0-9]*"))
    heat = {folder: sysfs.read_number(folder / "temp", 1e-3) for folder in folders}
    names = {folder: sysfs.read_text(folder / "type").lower() for folder in folders}
    for folder in folders:
        if names[folder].startswith("gpu"):
            return folder / "temp"
    known = {
        folder: celsius
        for folder, celsius in heat.items()
        if celsius is not None and sysfs.is_temperature(celsius) and not names[folder].startswith("pmic")
    }
    return max(known, key=lambda folder: known[folder]) / "temp" if known else None
