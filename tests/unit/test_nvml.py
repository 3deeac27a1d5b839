"""The driver's answers, from a library in NVML's place: whole, refused, of several GPUs, and of none."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from stand_in import NATIVE, compile_cpp

from edgecomp.engines.gpu import local_gpu_sm
from edgecomp.errors import RunError
from edgecomp.profiles.device import open_nvml, read_state
from edgecomp.profiles.nvml import HARMLESS_REASONS, Nvml, is_gpu_reason, throttle_words


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("nvml") / "libnvidia-ml.so.1"
    return str(compile_cpp(out, "-shared", "-fPIC", NATIVE / "nvml_on_host" / "nvml.cpp"))


@pytest.fixture(scope="module")
def old_library(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("old") / "libnvidia-ml.so.1"
    return str(compile_cpp(out, "-shared", "-fPIC", "-DOLD", NATIVE / "nvml_on_host" / "nvml.cpp"))


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "log"
    path.touch()
    monkeypatch.setenv("FAKE_NVML_LOG", str(path))
    return path


def test_all_that_a_gpu_says(library: str) -> None:
    with Nvml(library=library) as nvml:
        state, refused = nvml.read()
    assert refused == {}
    assert (state.name, state.source, state.index, state.num_gpus) == ("NVIDIA Host A", "nvml", 0, 1)
    assert (state.sm, state.driver) == (90, "580.65.06")
    assert (state.graphics_mhz, state.sm_mhz, state.memory_mhz) == (1755, 1740, 2619)
    assert (state.max_graphics_mhz, state.max_sm_mhz, state.max_memory_mhz) == (1980, 1980, 2619)
    assert (state.temperature_c, state.temperature_limit_c) == (61, 87)
    assert (state.power_mw, state.power_limit_mw) == (312345, 700000)
    assert (state.utilization_percent, state.num_processes, state.is_persistent) == (97, 2, True)
    assert (state.memory_used_mib, state.memory_total_mib) == (3072, 150754820096 / 2**20)
    assert (state.throttle_reasons, state.mig, state.mig_instance) == ((), "off", False)


def test_older_driver_has_the_older_calls(old_library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NVML_REASONS", "0x24")
    monkeypatch.setenv("FAKE_NVML_FAIL", "nvmlDeviceGetTemperatureThreshold=3")
    with Nvml(library=old_library) as nvml:
        state, refused = nvml.read()
        assert nvml.sampler().power_is_averaged
        assert nvml.sampler().sample() == (1740, 2619, 61, 312345, 0x24)
    assert state.throttle_reasons == ("software power cap", "software thermal slowdown")
    assert refused == {"temperature_limit_c": "this driver has no such call"}


def test_newer_driver_has_the_newer_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = NATIVE / "nvml_on_host" / "nvml.cpp"
    library = str(compile_cpp(tmp_path / "libnvidia-ml.so.1", "-shared", "-fPIC", "-DNEXT", source))
    with Nvml(library=library) as nvml:
        assert (nvml.read()[0].temperature_c, nvml.sampler().sample()[2]) == (61, 61)
        monkeypatch.setenv("FAKE_NVML_FAIL", "nvmlDeviceGetTemperatureV=3")
        state, refused = nvml.read()
        assert (state.temperature_c, nvml.sampler().sample()[2]) == (None, None)
        assert refused["temperature_c"] == "Not Supported (3)"


def test_distance_to_the_limit_where_the_limit_is_not_told(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NVML_FAIL", "nvmlDeviceGetTemperatureThreshold=3")
    with Nvml(library=library) as nvml:
        state, refused = nvml.read()
    assert (state.temperature_limit_c, refused) == (61 + 26, {})


@pytest.mark.parametrize(
    ("call", "fields"),
    [
        ("nvmlDeviceGetPowerUsage", {"power_mw"}),
        ("nvmlDeviceGetEnforcedPowerLimit", {"power_limit_mw"}),
        ("nvmlDeviceGetClockInfo", {"graphics_mhz", "sm_mhz", "memory_mhz"}),
        ("nvmlDeviceGetMaxClockInfo", {"max_graphics_mhz", "max_sm_mhz", "max_memory_mhz"}),
        ("nvmlDeviceGetTemperature", {"temperature_c"}),
        ("nvmlDeviceGetMemoryInfo", {"memory_used_mib", "memory_total_mib"}),
        ("nvmlDeviceGetUtilizationRates", {"utilization_percent"}),
        ("nvmlDeviceGetCurrentClocksEventReasons", {"throttle_reasons"}),
        ("nvmlDeviceGetComputeRunningProcesses_v3", {"num_processes"}),
        ("nvmlDeviceGetPersistenceMode", {"is_persistent"}),
        ("nvmlDeviceGetCudaComputeCapability", {"sm"}),
    ],
)
def test_one_call_that_is_not_supported(
    call: str, fields: set[str], library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_NVML_FAIL", f"{call}=3")
    with Nvml(library=library) as nvml:
        state, refused = nvml.read()
    assert refused == dict.fromkeys(fields, "Not Supported (3)")
    assert {field for field in fields if getattr(state, field) is not None} == set()
    assert state.name == "NVIDIA Host A"


def test_gpu_that_is_lost_gives_reasons_and_no_number(
    library: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with Nvml(library=library) as nvml:
        sampler = nvml.sampler()
        monkeypatch.setenv("FAKE_NVML_FAIL", "all=15")
        state = read_state(tmp_path, nvml=nvml)
        assert nvml.energy_mj() is None
        assert sampler.sample() == (None, None, None, None, None)
    assert state.gpu is not None
    assert (state.gpu.name, state.gpu.sm_mhz, state.gpu.mig) == ("NVIDIA Host A", None, "unknown")
    (said,) = (line for line in state.unreadable if line.startswith("gpu "))
    assert "power_mw" in said
    assert "sm_mhz" in said
    assert said.endswith("NVML says 'GPU is lost (15)'")


def test_jetsons_kernel_fills_what_nvml_does_not_support(
    library: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FAKE_NVML_FAIL", "all=3")
    for word, hertz in (("cur", 1_575_000_000), ("max", 1_575_000_000)):
        path = tmp_path / f"sys/class/devfreq/gpu-gpc-0/{word}_freq"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(hertz))
    with Nvml(library=library) as nvml:
        state = read_state(tmp_path, nvml=nvml)
    assert state.gpu is not None
    assert (state.gpu.source, state.gpu.sm_mhz, state.gpu.max_sm_mhz) == ("nvml, devfreq", 1575, 1575)
    assert (state.gpu.power_mw, state.gpu.mig) == (None, "unsupported")
    (said,) = (line for line in state.unreadable if line.startswith("gpu "))
    assert "power_mw" in said
    assert "sm_mhz" not in said


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (0x000, ()),
        (0x001, ("idle",)),
        (0x002, ("application clocks setting",)),
        (0x004, ("software power cap",)),
        (0x008, ("hardware slowdown",)),
        (0x010, ("sync boost",)),
        (0x020, ("software thermal slowdown",)),
        (0x040, ("hardware thermal slowdown",)),
        (0x080, ("hardware power brake",)),
        (0x100, ("display clock setting",)),
        (0x048, ("hardware slowdown", "hardware thermal slowdown")),
        (0x200, ("board limit",)),
        (0x400, ("reliability",)),
        (0x801, ("idle", "reason 0x800")),
        (1 << 63, ("reason 0x8000000000000000",)),
    ],
)
def test_reasons_in_words(bits: int, words: tuple[str, ...], library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert throttle_words(bits) == words
    assert all(is_gpu_reason(word) for word in words)
    monkeypatch.setenv("FAKE_NVML_REASONS", hex(bits))
    with Nvml(library=library) as nvml:
        assert nvml.read()[0].throttle_reasons == words
        assert nvml.sampler().sample()[4] == bits


def test_reasons_that_do_not_count() -> None:
    assert set(throttle_words(0x103)) == HARMLESS_REASONS
    assert not is_gpu_reason("gpu-throttle-alert")


THREE = "NVIDIA Host A;NVIDIA Host A;NVIDIA Host B"


@pytest.mark.parametrize(
    ("visible", "index"),
    [
        (None, 0), ("0", 0), ("2", 2), ("1,0", 1), (" 1 ,0", 1), ("2,9", 2),
        ("GPU-10000000-1111-2222-3333-444444444444", 1), ("GPU-2", 2), ("GPU-0,GPU-1", 0),
        ("MIG-GPU-10000000-1111-2222-3333-444444444444/3/0", 1), ("MIG-aaaa1111-0", 2),
    ],
)  # fmt: skip
def test_gpu_that_cuda_gives_first(
    visible: str | None, index: int, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_NVML_GPUS", THREE)
    with Nvml(library=library, visible=visible) as nvml:
        state, _ = nvml.read()
    assert (state.index, state.num_gpus, state.name) == (index, 3, THREE.split(";")[index])
    assert state.mig_instance == (visible or "").startswith("MIG-")
    assert nvml.notes == ()


@pytest.mark.parametrize("visible", ["", "-1", "3", "NoDevFiles", "GPU-9", "GPU", "MIG-bbbb", "MIG-GPU-9/1/0", "x,0"])
def test_no_gpu_is_visible(visible: str, library: str, monkeypatch: pytest.MonkeyPatch, log: Path) -> None:
    monkeypatch.setenv("FAKE_NVML_GPUS", THREE)
    with pytest.raises(RunError, match=r"shows none of the 3 GPUs that NVML knows") as caught:
        Nvml(library=library, visible=visible)
    assert repr(visible) in str(caught.value)
    assert log.read_text().split() == ["open", "closed"]


@pytest.mark.parametrize(
    ("gpus", "visible", "is_bus_order", "is_sure"),
    [
        (THREE, None, False, False),
        (THREE, "2", False, False),
        (THREE, "2", True, True),
        (THREE, "GPU-2", False, True),
        ("NVIDIA Host A;NVIDIA Host A", "1", False, True),  # of one kind: their order is that of the bus
    ],
)
def test_different_gpus_may_be_numbered_otherwise_by_cuda(
    gpus: str, visible: str | None, is_bus_order: bool, is_sure: bool, library: str, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setenv("FAKE_NVML_GPUS", gpus)
    with Nvml(library=library, visible=visible, is_bus_order=is_bus_order) as nvml:
        said = [line for line in read_state(tmp_path, nvml=nvml).unreadable if line.startswith("gpu")]
    assert (said == []) == is_sure
    assert is_sure or "3 different GPUs" in said[0]
    assert is_sure or "CUDA_DEVICE_ORDER=PCI_BUS_ID" in said[0]


def test_gpu_that_is_cut_into_instances(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NVML_MIG", "1")
    with Nvml(library=library) as nvml:
        state, _ = nvml.read()
    assert (state.mig, state.mig_instance) == ("on", True)


def test_no_library() -> None:
    with pytest.raises(RunError, match=r"no NVIDIA driver: libnvidia-ml-absent\.so cannot be loaded"):
        Nvml(library="libnvidia-ml-absent.so")


@pytest.mark.parametrize(
    ("fail", "gpus", "said"),
    [
        ("nvmlInit_v2=9", "A", "NVML does not start: Driver Not Loaded (9)"),
        ("nvmlInit_v2=18", "A", "NVML does not start: Driver/library version mismatch (18)"),
        ("nvmlDeviceGetCount_v2=999", "A", "NVML finds no GPU (Unknown Error (999))"),
        ("", ";", "NVML finds no GPU (0 devices)"),
    ],
)
def test_nvml_that_does_not_start(
    fail: str, gpus: str, said: str, library: str, monkeypatch: pytest.MonkeyPatch, log: Path
) -> None:
    monkeypatch.setenv("FAKE_NVML_FAIL", fail)
    monkeypatch.setenv("FAKE_NVML_GPUS", gpus)
    with pytest.raises(RunError) as caught:
        Nvml(library=library)
    assert said in str(caught.value)
    assert log.read_text().split() in ([], ["open", "closed"])


def test_library_that_is_none(tmp_path: Path) -> None:
    out = compile_cpp(tmp_path / "libempty.so", "-shared", "-fPIC", "-x", "c++", "/dev/null")
    with pytest.raises(RunError, match="NVML does not start: this driver has no such call"):
        Nvml(library=str(out))


def test_name_with_letters_that_cannot_be_printed(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NVML_GPUS", "Host \x1b[31mGPU\n")
    with Nvml(library=library) as nvml:
        assert nvml.read()[0].name == "Host [31mGPU"


def test_closed_once(library: str, log: Path) -> None:
    nvml = Nvml(library=library)
    nvml.close()
    nvml.close()
    assert log.read_text().split() == ["open", "closed"]


def test_power_of_this_moment_where_the_driver_has_it(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Nvml(library=library) as nvml:
        sampler = nvml.sampler()
        assert (sampler.power_is_averaged, sampler.sample()) == (False, (1740, 2619, 61, 298765, 0))
        first, second = nvml.energy_mj(), nvml.energy_mj()
        assert first is not None
        assert second == first + 1000 > 2**32
        monkeypatch.setenv("FAKE_NVML_FAIL", "instant=3")
        assert nvml.sampler().power_is_averaged
        assert nvml.sampler().sample()[3] == 312345


@pytest.mark.gpu
def test_gpu_of_this_machine() -> None:
    try:
        nvml = open_nvml()
    except RunError as error:
        pytest.skip(f"no GPU that NVML knows: {error}")
    with nvml:
        state, refused = nvml.read()
        sampler = nvml.sampler()
        start = time.perf_counter()
        clock, _, celsius, power, mask = sampler.sample()
        spent = time.perf_counter() - start
    assert state.name != "unknown"
    assert state.sm == local_gpu_sm()
    for word, value in (("sm_mhz", clock), ("temperature_c", celsius), ("power_mw", power), ("throttle_reasons", mask)):
        assert (value is None) == (word in refused), word
    assert spent < 0.05
