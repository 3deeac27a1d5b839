"""The doctor names what is missing or conflicting, with the command that mends it, and imports nothing heavy."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import time
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import msgspec
import pytest

from edgecomp.api import _doctor as api_doctor
from edgecomp.api._doctor import doctor
from edgecomp.profiles.state import CoreClock, DeviceState, GpuState, JetsonState
from edgecomp.report.doctor import DoctorReport, Finding, describe_doctor

SUBJECTS = [
    "Python",
    "torch",
    "onnx",
    "timm",
    "transformers",
    "onnxruntime",
    "TensorRT",
    "TensorRT for RTX",
    "CUDA driver",
    "GPU",
    "plugin compiler",
    "JetPack",
]


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with nothing on it; returns its root folder."""
    monkeypatch.setattr(api_doctor, "_ROOT", tmp_path)
    monkeypatch.setattr(api_doctor, "_cuda_driver_version", lambda: 0)
    monkeypatch.setattr(api_doctor, "read_gpu", lambda: ("", ""))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(api_doctor, "_has_module", lambda name: False)
    monkeypatch.setattr("edgecomp.engines.flavour.installed_flavours", lambda: ())
    monkeypatch.setattr("edgecomp.engines.gpu.local_gpu_sm", lambda: None)
    install(monkeypatch)
    return tmp_path


ELSEWHERE = "none is needed to export, check and build for RTX; to run engines, copy the bundle to a machine with a GPU"


def install(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Let the metadata name these distributions and no other; an underscore stands for a hyphen."""
    known = {name.replace("_", "-"): version for name, version in versions.items()}

    def version_of(name: str) -> str:
        if name not in known:
            raise importlib.metadata.PackageNotFoundError(name)
        return known[name]

    monkeypatch.setattr(importlib.metadata, "version", version_of)
    monkeypatch.setattr(api_doctor, "_has_module", lambda name: name in known)


def provide_onnxruntime(monkeypatch: pytest.MonkeyPatch, *providers: str) -> None:
    module = types.ModuleType("onnxruntime")
    module.__version__ = "1.27.0"  # type: ignore[attr-defined]
    module.get_available_providers = lambda: list(providers)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "onnxruntime", module)


def finding(subject: str) -> Finding:
    return next(found for found in doctor().findings if found.subject == subject)


def test_this_machine(capfd: pytest.CaptureFixture[str]) -> None:
    start = time.perf_counter()
    report = doctor()
    assert time.perf_counter() - start < 5  # 2 s on a quiet machine
    assert [found.subject for found in report.findings] == SUBJECTS
    for found in report.findings:
        assert (found.remedy == "") == (found.status == "fine"), found
        assert found.detail
    assert capfd.readouterr() == ("", "")
    assert msgspec.json.decode(msgspec.json.encode(report), type=DoctorReport) == report


def test_imports_neither_torch_nor_onnx() -> None:
    program = (
        "import sys; from edgecomp.api._doctor import doctor; doctor(); "
        "print([m for m in ('torch', 'onnx', 'timm', 'tensorrt', 'tensorrt_rtx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_report_is_true_unless_something_conflicts() -> None:
    fine, missing = Finding("a", "fine", "1"), Finding("b", "missing", "none", "pip install b")
    assert DoctorReport((fine, missing))
    assert not DoctorReport((fine, missing, Finding("c", "conflicting", "two", "pip uninstall c")))


def test_everything_missing_carries_its_command(bare: Path) -> None:
    report = doctor()
    assert report
    remedies = {found.subject: found.remedy for found in report.findings if found.status == "missing"}
    assert remedies == {
        "torch": "pip install 'edgecomp[export]'",
        "onnx": "pip install 'edgecomp[export]'",
        "timm": "pip install 'edgecomp[export]'",
        "transformers": "pip install 'edgecomp[export]'",
        "onnxruntime": "pip install 'edgecomp[ort]'",
        "TensorRT": "pip install 'edgecomp[gpu]'",
        "TensorRT for RTX": "pip install 'edgecomp[rtx]'",
        "CUDA driver": ELSEWHERE,
        "GPU": ELSEWHERE,
        "plugin compiler": "sudo apt-get install nvidia-cuda-toolkit",
    }
    assert finding("JetPack") == Finding("JetPack", "fine", "not a Jetson")


def test_what_can_be_read_of_the_device_stands_at_the_end(bare: Path) -> None:
    report = doctor()
    assert report.state is not None
    text = describe_doctor(report)
    assert "What a result can say of this device while it was measured:" in text
    assert "  unreadable   cpu clocks: no core's scaling_cur_freq under /sys/devices/system/cpu" in text
    gpu = GpuState(name="A", source="nvml", sm_mhz=1740, temperature_c=61, power_mw=298765.4, throttle_reasons=())
    jetson = JetsonState(power_mode="25W", jetson_clocks="off", rails_mw={"VDD_IN": 9250.3})
    state = DeviceState(
        time_utc="", cores=(CoreClock(0, 1190.4), CoreClock(1, 729.6)), governor="schedutil", gpu=gpu, jetson=jetson,
        temperatures_c={"a": 50.0, "b": 58.625},
    )  # fmt: skip
    assert describe_doctor(DoctorReport(report.findings, state)).splitlines()[-5:] == [
        "  cpu clocks   2 cores, 730 to 1190 MHz, governor schedutil",
        "  temperatures 2, the highest b 58.6 C",
        "  gpu          A, by nvml: 1740 MHz, 61 C, 298765 mW, held by: nothing",
        "  power mode   25W, jetson_clocks off",
        "  rails        VDD_IN 9250 mW",
    ]


def test_old_python(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 18, "final", 0))
    found = finding("Python")
    assert found.status == "conflicting"
    assert found.detail.startswith("3.9.18 is older than 3.10")
    assert "python3.12 -m venv" in found.remedy


def test_both_onnxruntimes_conflict(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, onnxruntime="1.31.1", onnxruntime_gpu="1.27.0")
    monkeypatch.setattr(api_doctor, "read_gpu", lambda: ("NVIDIA L4", "580"))
    report = doctor()
    found = next(found for found in report.findings if found.subject == "onnxruntime")
    assert not report
    assert found.status == "conflicting"
    assert found.detail.startswith("onnxruntime 1.31.1, onnxruntime-gpu 1.27.0 are both installed, and overwrite")
    assert found.remedy == "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"


def test_both_onnxruntimes_without_a_gpu_keep_the_cpu_one(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, onnxruntime="1.31.1", onnxruntime_gpu="1.27.0")
    assert finding("onnxruntime").remedy == ("pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime")


def test_onnxruntime_lists_its_providers(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, onnxruntime="1.27.0")
    provide_onnxruntime(monkeypatch, "CPUExecutionProvider")
    assert finding("onnxruntime") == Finding(
        "onnxruntime", "fine", "onnxruntime 1.27.0, providers: CPUExecutionProvider"
    )


def test_onnxruntime_gpu_without_its_provider(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, onnxruntime_gpu="1.27.0")
    provide_onnxruntime(monkeypatch, "CPUExecutionProvider")
    found = finding("onnxruntime")
    assert found.status == "conflicting"
    assert found.detail.endswith("CUDAExecutionProvider is not among them")
    assert found.remedy == "pip uninstall -y onnxruntime-gpu && pip install onnxruntime-gpu"


def test_broken_onnxruntime(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, onnxruntime="1.27.0")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # the import fails
    found = finding("onnxruntime")
    assert found.status == "conflicting"
    assert "onnxruntime 1.27.0 cannot be imported: " in found.detail


def test_hollow_onnxruntime(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stays after one of both was uninstalled: a folder without code."""
    install(monkeypatch, onnxruntime="1.27.0")
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    found = finding("onnxruntime")
    assert found.status == "conflicting"
    assert "get_available_providers" in found.detail
    assert found.remedy == "pip uninstall -y onnxruntime && pip install onnxruntime"


def test_metadata_without_a_module(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, torch="2.9.0")
    monkeypatch.setattr(api_doctor, "_has_module", lambda name: False)
    assert finding("torch") == Finding(
        "torch",
        "conflicting",
        "2.9.0 by its metadata, but there is no module 'torch': the installation is broken",
        "pip install --force-reinstall --no-deps torch==2.9.0",
    )


def test_tensorrt_for_a_newer_cuda_than_the_driver(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, tensorrt_rtx_cu13_bindings="1.7.1")
    monkeypatch.setattr("edgecomp.engines.flavour.installed_flavours", lambda: ("rtx",))
    monkeypatch.setattr(api_doctor, "_cuda_driver_version", lambda: 12080)
    found = finding("TensorRT for RTX")
    assert found.status == "conflicting"
    assert found.detail == (
        "tensorrt-rtx-cu13-bindings 1.7.1 is made for CUDA 13, and the driver supports up to CUDA 12.8"
    )
    assert "pip uninstall -y tensorrt-rtx-cu13-bindings" in found.remedy
    monkeypatch.setattr(api_doctor, "_cuda_driver_version", lambda: 13000)
    assert finding("TensorRT for RTX") == Finding("TensorRT for RTX", "fine", "tensorrt-rtx-cu13-bindings 1.7.1")


def test_gpu_with_its_driver(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_doctor, "_cuda_driver_version", lambda: 13020)
    monkeypatch.setattr(api_doctor, "read_gpu", lambda: ("NVIDIA H200", "580.65"))
    assert finding("CUDA driver") == Finding("CUDA driver", "fine", "supports up to CUDA 13.2")
    assert finding("GPU") == Finding("GPU", "fine", "NVIDIA H200")


def test_gpu_on_the_bus_without_a_driver(bare: Path) -> None:
    device = bare / "sys/bus/pci/devices/0000:01:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x10de\n")
    (device / "class").write_text("0x030200\n")
    assert finding("CUDA driver").remedy.startswith("sudo ubuntu-drivers install")
    assert finding("GPU").detail == "an NVIDIA device is there, but neither nvidia-smi nor the driver answers"


def test_jetson(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bare / "etc").mkdir()
    (bare / "etc/nv_tegra_release").write_text("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n")
    monkeypatch.setattr("edgecomp.engines.gpu.local_gpu_sm", lambda: 87)
    assert finding("GPU") == Finding("GPU", "fine", "compute capability SM87, by the driver")
    assert finding("TensorRT").remedy == (
        "sudo apt-get install nvidia-jetpack && python3 -m venv --system-site-packages .venv"
    )
    assert finding("plugin compiler").remedy == "sudo apt-get install nvidia-jetpack"
    found = finding("JetPack")
    assert (found.status, found.remedy) == ("missing", "sudo apt-get update && sudo apt-get install nvidia-jetpack")
    assert found.detail.startswith("L4T 36.4.3, but the package nvidia-jetpack is not installed")
    monkeypatch.setattr(api_doctor, "_run", lambda command: "6.2+b77" if command[0] == "dpkg-query" else "")
    assert finding("JetPack") == Finding("JetPack", "fine", "6.2+b77, L4T 36.4.3")


def test_compiler_beside_the_path(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = bare / "usr/local/cuda/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("")
    found = finding("plugin compiler")
    assert (found.status, found.detail) == (
        "conflicting",
        f"{nvcc} is there, but `{nvcc} --version` names no release",
    )
    monkeypatch.setattr(api_doctor, "_run", lambda command: "Cuda compilation tools, release 13.0, V13.0.88")
    assert finding("plugin compiler") == Finding("plugin compiler", "fine", f"nvcc 13.0 ({nvcc})")


def test_folder_named_like_a_module_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: ModuleSpec(name, None, is_package=True))
    assert not api_doctor._has_module("timm")
