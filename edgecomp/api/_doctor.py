"""What is installed here, what is missing, and what gets in each other's way; each with the command that mends it.

Nothing heavy is imported: versions come from the metadata of the distributions. ONNX Runtime alone is imported, for
only that tells which providers it has, and whether two distributions overwrote each other.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from edgecomp.profiles.device import read_state
from edgecomp.profiles.machine import installed_versions, read_gpu
from edgecomp.report.doctor import DoctorReport, Finding

__all__ = ["doctor"]


_ROOT = Path("/")
_PATIENCE_S = 5.0
_OLDEST_PYTHON = (3, 10)
_ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino")
_TENSORRTS = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12",
            "tensorrt-rtx-cu12-bindings"),
}  # fmt: skip
_EXTRAS = {"tensorrt": "gpu", "rtx": "rtx"}
_NVIDIA = "0x10de"  # PCI vendor


def doctor() -> DoctorReport:
    """Look at Python, the packages, TensorRT, the GPU with its driver and compiler, JetPack, and the device's state."""
    driver = _cuda_driver_version()
    gpu, _ = read_gpu()
    is_jetson = _is_jetson(_ROOT)
    has_gpu = bool(gpu) or is_jetson or _has_nvidia_device(_ROOT)
    return DoctorReport(
        (
            _look_at_python(sys.version_info[:3]),
            _look_at_package("torch", needed_for="exporting", extra="export"),
            _look_at_package("onnx", needed_for="exporting", extra="export"),
            _look_at_package("timm", needed_for="backbones from timm", extra="export"),
            _look_at_package("transformers", needed_for="backbones from transformers", extra="export"),
            _look_at_onnxruntime(has_gpu=has_gpu),
            *_look_at_tensorrt(driver, is_jetson=is_jetson),
            _look_at_driver(driver, has_gpu=has_gpu, is_jetson=is_jetson),
            _look_at_gpu(gpu, has_gpu=has_gpu),
            _look_at_compiler(_ROOT, is_jetson=is_jetson),
            _look_at_jetpack(_ROOT, is_jetson=is_jetson),
        ),
        read_state(_ROOT),
    )


def _look_at_python(version: tuple[int, ...]) -> Finding:
    text = ".".join(map(str, version))
    if version >= _OLDEST_PYTHON:
        return Finding("Python", "fine", text)
    return Finding(
        "Python",
        "conflicting",
        f"{text} is older than 3.10, the oldest that edgecomp supports",
        "make an environment with a newer one: python3.12 -m venv .venv && .venv/bin/pip install edgecomp",
    )


def _look_at_package(name: str, *, needed_for: str, extra: str) -> Finding:
    version = installed_versions((name,)).get(name, "")
    if _has_module(name):
        return Finding(name, "fine", version or "importable, version unknown: it has no metadata")
    if version:
        return Finding(
            name,
            "conflicting",
            f"{version} by its metadata, but there is no module {name!r}: the installation is broken",
            f"pip install --force-reinstall --no-deps {name}=={version}",
        )
    return Finding(name, "missing", f"not installed; needed for {needed_for}", f"pip install 'edgecomp[{extra}]'")


def _look_at_onnxruntime(*, has_gpu: bool) -> Finding:
    subject = "onnxruntime"
    found = installed_versions(_ONNXRUNTIMES)
    listed = ", ".join(f"{name} {version}" for name, version in found.items())
    if not found and not _has_module("onnxruntime"):
        return Finding(
            subject, "missing", "not installed; needed for parity without TensorRT", "pip install 'edgecomp[ort]'"
        )
    kept = "onnxruntime-gpu" if has_gpu and "onnxruntime-gpu" in found else next(iter(found), "onnxruntime")
    remedy = f"pip uninstall -y {' '.join(found) or kept} && pip install {kept}"
    if len(found) > 1:
        return Finding(
            subject,
            "conflicting",
            f"{listed} are both installed, and overwrite each other's files in the one folder 'onnxruntime'",
            remedy,
        )
    try:
        module = importlib.import_module("onnxruntime")
        providers: list[str] = list(module.get_available_providers())
        version = str(module.__version__)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:  # a hollow folder imports, without attributes
        return Finding(subject, "conflicting", f"{listed or subject} cannot be imported: {error}", remedy)
    detail = f"{listed or f'{subject} {version}'}, providers: {', '.join(providers)}"
    if "onnxruntime-gpu" in found and "CUDAExecutionProvider" not in providers:
        return Finding(subject, "conflicting", f"{detail}; CUDAExecutionProvider is not among them", remedy)
    return Finding(subject, "fine", detail)


def _look_at_tensorrt(driver: int, *, is_jetson: bool) -> list[Finding]:
    from edgecomp.engines.flavour import installed_flavours

    present = installed_flavours()
    findings = []
    for flavour, title in (("tensorrt", "TensorRT"), ("rtx", "TensorRT for RTX")):
        found = installed_versions(_TENSORRTS[flavour])
        listed = ", ".join(f"{name} {version}" for name, version in found.items()) or "version unknown"
        newest = max((int(cuda) for name in found for cuda in re.findall(r"-cu(\d+)", name)), default=0)
        if flavour not in present:
            findings.append(_missing_tensorrt(flavour, title, is_jetson=is_jetson))
        elif driver and newest > driver // 1000:
            findings.append(
                Finding(
                    title,
                    "conflicting",
                    f"{listed} is made for CUDA {newest}, and the driver supports up to CUDA {_cuda_text(driver)}",
                    f"update the driver, or: pip uninstall -y {' '.join(found)} and install the package for "
                    f"CUDA {driver // 1000}",
                )
            )
        else:
            findings.append(Finding(title, "fine", listed))
    return findings


def _missing_tensorrt(flavour: str, title: str, *, is_jetson: bool) -> Finding:
    if is_jetson and flavour == "tensorrt":
        return Finding(
            title,
            "missing",
            "not found; on a Jetson it comes with JetPack, and a virtual environment sees it only with the "
            "system's packages",
            "sudo apt-get install nvidia-jetpack && python3 -m venv --system-site-packages .venv",
        )
    return Finding(
        title,
        "missing",
        "not installed; one of both is needed for `build`",
        f"pip install 'edgecomp[{_EXTRAS[flavour]}]'",
    )


def _look_at_driver(version: int, *, has_gpu: bool, is_jetson: bool) -> Finding:
    subject = "CUDA driver"
    if version > 0:
        return Finding(subject, "fine", f"supports up to CUDA {_cuda_text(version)}")
    if is_jetson:
        return Finding(subject, "missing", "libcuda.so.1 cannot be loaded", "sudo apt-get install nvidia-jetpack")
    if has_gpu:
        return Finding(
            subject,
            "missing",
            "libcuda.so.1 cannot be loaded, though there is an NVIDIA GPU",
            "sudo ubuntu-drivers install (in a container: start it with --gpus all)",
        )
    return Finding(subject, "missing", "libcuda.so.1 cannot be loaded, and there is no NVIDIA GPU", _go_elsewhere())


def _look_at_gpu(names: str, *, has_gpu: bool) -> Finding:
    from edgecomp.engines.gpu import local_gpu_sm

    if names:
        return Finding("GPU", "fine", names)
    sm = local_gpu_sm()  # Jetsons have no nvidia-smi before JetPack 6
    if sm is not None:
        return Finding("GPU", "fine", f"compute capability SM{sm}, by the driver")
    if has_gpu:
        return Finding(
            "GPU",
            "missing",
            "an NVIDIA device is there, but neither nvidia-smi nor the driver answers",
            "sudo nvidia-smi",
        )
    return Finding("GPU", "missing", "no NVIDIA GPU here: bundles export, but engines cannot run", _go_elsewhere())


def _look_at_compiler(root: Path, *, is_jetson: bool) -> Finding:
    subject = "plugin compiler"
    usual = root / "usr/local/cuda/bin/nvcc"
    program = shutil.which("nvcc") or (str(usual) if usual.is_file() else "")
    if not program:
        package = "nvidia-jetpack" if is_jetson else "nvidia-cuda-toolkit"
        return Finding(
            subject,
            "missing",
            f"no nvcc on PATH, nor {usual}; needed for `plugin build`, and engines work without plugins",
            f"sudo apt-get install {package}",
        )
    release = re.search(r"release ([\d.]+)", _run([program, "--version"]))
    if release is None:
        return Finding(
            subject,
            "conflicting",
            f"{program} is there, but `{program} --version` names no release",
            "reinstall the CUDA toolkit: sudo apt-get install --reinstall nvidia-cuda-toolkit",
        )
    return Finding(subject, "fine", f"nvcc {release[1]} ({program})")


def _look_at_jetpack(root: Path, *, is_jetson: bool) -> Finding:
    if not is_jetson:
        return Finding("JetPack", "fine", "not a Jetson")
    release = re.search(r"R(\d+).*?REVISION:\s*([\d.]+)", _read(root / "etc/nv_tegra_release"))
    linux = f"L4T {release[1]}.{release[2]}" if release else "L4T unknown"
    version = _run(["dpkg-query", "--show", "--showformat=${Version}", "nvidia-jetpack"]).strip()
    if version:
        return Finding("JetPack", "fine", f"{version}, {linux}")
    return Finding(
        "JetPack",
        "missing",
        f"{linux}, but the package nvidia-jetpack is not installed, so CUDA and TensorRT may not be",
        "sudo apt-get update && sudo apt-get install nvidia-jetpack",
    )


def _go_elsewhere() -> str:
    return "none is needed to export, check and build for RTX; to run engines, copy the bundle to a machine with a GPU"


def _has_module(name: str) -> bool:
    """Say whether a module can be found; a folder without code that has its name does not count."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # it is in sys.modules, made by hand
        return True
    return spec is not None and spec.origin is not None


def _cuda_driver_version() -> int:
    """Return the newest CUDA that the driver supports, 13000 for 13.0; 0 without a driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        version = ctypes.c_int(0)
        return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else 0
    except (OSError, AttributeError):
        return 0


def _cuda_text(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _is_jetson(root: Path) -> bool:
    return (root / "etc/nv_tegra_release").is_file() or "Jetson" in _read(root / "proc/device-tree/model")


def _has_nvidia_device(root: Path) -> bool:
    """Say whether a display controller (PCI class 03) of NVIDIA is on the bus, driver or not."""
    devices = (root / "sys/bus/pci/devices").glob("*")
    return any(_read(d / "vendor").strip() == _NVIDIA and _read(d / "class").startswith("0x03") for d in devices)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _run(command: Sequence[str]) -> str:
    """Return what a command writes; "" when it is absent, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return done.stdout if done.returncode == 0 else ""
