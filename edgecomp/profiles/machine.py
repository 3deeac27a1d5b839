"""The machine a measurement was taken on, as far as it can be read without root.

Read beside every latency, because the same graph on the same processor differs by its governor, by what else ran,
and by the version of the runtime. What cannot be read is "unknown", "" or 0, never a guess.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import msgspec

__all__ = ["Machine", "installed_versions", "read_gpu", "read_machine"]

_DISTRIBUTIONS = (
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "tensorrt",
    "tensorrt-cu12",
    "tensorrt-cu13",
    "tensorrt-rtx",
    "tensorrt-rtx-cu12",
    "tensorrt-rtx-cu13",
    "tensorrt-rtx-cu12-bindings",
    "tensorrt-rtx-cu13-bindings",
    "polygraphy",
)
_GIB = 1 << 30
_PATIENCE_S = 5.0  # nvidia-smi hangs where a driver is broken


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A machine and its state at one moment.

    Attributes:
        cpu: the processor's name; on a board without one, the board's.
        cores: logical cores that this process may use, which an affinity mask can make fewer than there are.
        governor: the frequency governor; several when the cores differ, "unknown" where there is none to read.
        load_average: over 1, 5 and 15 minutes; empty where the system keeps none.
        memory_gib: all of it; 0 when unknown.
        memory_available_gib: what could be taken without swapping; 0 when unknown.
        os: system, release and architecture.
        python: implementation and version.
        gpu: names by nvidia-smi, with a count before a name that occurs several times; "" without one.
        gpu_driver: its version; "" without one.
        versions: of installed distributions that decide a latency, by their names on PyPI.
    """

    cpu: str
    cores: int
    governor: str
    load_average: tuple[float, ...]
    memory_gib: float
    memory_available_gib: float
    os: str
    python: str
    gpu: str
    gpu_driver: str
    versions: dict[str, str]


def read_machine() -> Machine:
    """Read this machine; takes some milliseconds, and up to 5 s more where nvidia-smi hangs."""
    total, available = _read_memory()
    gpu, driver = read_gpu()
    return Machine(
        cpu=_read_cpu(),
        cores=_count_cores(),
        governor=_read_governor(),
        load_average=_read_load(),
        memory_gib=total,
        memory_available_gib=available,
        os=f"{platform.system()} {platform.release()} {platform.machine()}".strip() or "unknown",
        python=f"{platform.python_implementation()} {platform.python_version()}",
        gpu=gpu,
        gpu_driver=driver,
        versions=installed_versions(_DISTRIBUTIONS),
    )


def installed_versions(distributions: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of those distributions that are installed, from their metadata; imports none of them."""
    found: dict[str, str] = {}
    for name in distributions:
        try:
            version: str | None = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found[name] = version or "unknown"  # None where the metadata is damaged
    return found


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _read_cpu(root: Path = Path("/")) -> str:
    for line in _read_text(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() == "model name" and value.strip():
            return value.strip()
    board = _read_text(root / "proc/device-tree/model").strip("\0 \n")  # ARM names no model in cpuinfo
    return board or platform.processor() or platform.machine() or "unknown"


def _count_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _read_governor(root: Path = Path("/")) -> str:
    files = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor"))
    governors = sorted({text.strip() for text in map(_read_text, files) if text.strip()})
    return ", ".join(governors) or "unknown"


def _read_load() -> tuple[float, ...]:
    try:
        return tuple(round(load, 2) for load in os.getloadavg())
    except (AttributeError, OSError):  # Windows has none
        return ()


def _read_memory(root: Path = Path("/")) -> tuple[float, float]:
    """Return total and available memory in GiB; 0 for what cannot be read."""
    kib: dict[str, int] = {}
    for line in _read_text(root / "proc/meminfo").splitlines():
        key, _, value = line.partition(":")
        number = value.split()[:1]
        if number and number[0].isdigit():
            kib[key.strip()] = int(number[0])
    if "MemTotal" in kib:
        return _in_gib(kib["MemTotal"] * 1024, kib.get("MemAvailable", 0) * 1024)
    try:
        return _in_gib(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), 0)  # macOS
    except (AttributeError, ValueError, OSError):
        return 0.0, 0.0


def _in_gib(total: int, available: int) -> tuple[float, float]:
    return round(total / _GIB, 2), round(available / _GIB, 2)


def read_gpu() -> tuple[str, str]:
    """Return names and driver version by nvidia-smi, or two empty texts."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "", ""
    query = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return "", ""
    if answer.returncode != 0:
        return "", ""
    rows = [row.rpartition(",") for row in answer.stdout.splitlines() if "," in row]
    names = Counter(name.strip() for name, _, _ in rows)
    gpus = ", ".join(name if count == 1 else f"{count} x {name}" for name, count in names.items())
    return gpus, rows[0][2].strip() if rows else ""
