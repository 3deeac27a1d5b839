"""Watching while something runs: files, NVML and tegrastats, their energy, and that nothing stays behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from stand_in import NATIVE, compile_cpp

from edgecomp.errors import InvalidSpec, RunError
from edgecomp.profiles import monitor as module
from edgecomp.profiles.monitor import Monitor, energy_mj
from edgecomp.profiles.nvml import Nvml
from edgecomp.profiles.stability import judge_state
from edgecomp.profiles.state import Sample, Watch

LINE = (
    "10-08-2026 04:35:02 RAM 6712/7620MB (lfb 12x4MB) CPU [38%@1497,2%@729,off] EMC_FREQ 61%@2133 GR3D_FREQ 99%@[612] "
    "cpu@57.125C gpu@58.625C tj@58C PMIC@100C VDD_IN 16000mW/11204mW VDD_CPU_GPU_CV 7000mW/4944mW VDD_SOC 3000mW/9mW"
)
BOARD = {
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.4, GCID: 1",
    "sys/class/hwmon/hwmon1/name": "ina3221",
    "sys/class/hwmon/hwmon1/in1_label": "VDD_IN",
    "sys/class/hwmon/hwmon1/in1_input": "5000",
    "sys/class/hwmon/hwmon1/curr1_input": "2000",
    "sys/class/hwmon/hwmon1/in2_label": "VDD_SOC",
    "sys/class/hwmon/hwmon1/in2_input": "5000",
    "sys/class/hwmon/hwmon1/curr2_input": "200",
    "sys/class/devfreq/17000000.gpu/cur_freq": "612000000",
    "sys/class/devfreq/bwmgr/cur_freq": "2133000000",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1190400",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "729600",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
    "sys/class/thermal/thermal_zone0/temp": "70000",
    "sys/class/thermal/thermal_zone1/type": "gpu-thermal",
    "sys/class/thermal/thermal_zone1/temp": "58625",
    "sys/class/thermal/cooling_device0/type": "gpu-throttle-alert",
    "sys/class/thermal/cooling_device0/cur_state": "0",
}


def write(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n", encoding="utf-8")


def wait_for(happened: Callable[[], object], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("edgecomp-")]


def program(path: Path, body: str) -> str:
    path.write_text(f"#!{sys.executable}\n" + textwrap.dedent(body), encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def samples(*points: tuple[float, float], rail: str = "VDD_IN") -> list[Sample]:
    return [Sample(time_s=time_s, rails_mw={rail: power}) for time_s, power in points]


def test_energy_is_the_trapezoid() -> None:
    assert energy_mj(samples((0, 1000), (1, 3000), (2, 3000)), 2.0) == {"VDD_IN": 2000 + 3000}
    assert energy_mj(samples((0, 1000), (0.5, 2000), (2, 1000)), 2.0) == {"VDD_IN": 750 + 2250}  # uneven steps
    assert energy_mj(samples((0.5, 1000), (1.5, 1000)), 2.0) == {"VDD_IN": 2000}  # level before and behind
    assert energy_mj(samples((0.7, 1000)), 2.0) == {"VDD_IN": 2000}
    assert energy_mj(samples((0, -392), (1, -392)), 1.0) == {"VDD_IN": -392}
    assert energy_mj([Sample(time_s=1)], 2.0) == {}
    both = [*samples((0, 10), (1, 10)), *samples((0, 20), (1, 20), rail="VDD_SOC")]
    assert energy_mj(both, 1.0) == {"VDD_IN": 10, "VDD_SOC": 20}


def test_board_is_watched_by_its_files(tmp_path: Path) -> None:
    write(tmp_path, BOARD)
    with Monitor(interval_ms=10, root=tmp_path) as monitor:
        wait_for(lambda: len(monitor._raw) >= 3)
        write(tmp_path, {"sys/class/devfreq/17000000.gpu/cur_freq": "306000000"})
        write(tmp_path, {"sys/class/thermal/cooling_device0/cur_state": "1"})
        seen = len(monitor._raw)
        wait_for(lambda: len(monitor._raw) >= seen + 3)
    watch = monitor.watch
    assert threads() == []
    assert watch.sources == ("bwmgr", "cooling", "cpufreq", "devfreq", "ina", "thermal")
    first, last = watch.samples[0], watch.samples[-1]
    assert first == Sample(
        time_s=first.time_s, rails_mw={"VDD_IN": 10000, "VDD_SOC": 1000}, gpu_mhz=612, memory_mhz=2133, cpu_mhz=1190.4,
        temperature_c=58.625, throttle_reasons=(),
    )  # fmt: skip
    assert (last.gpu_mhz, last.throttle_reasons) == (306, ("gpu-throttle-alert",))
    assert watch.total_rails == ("VDD_IN",)
    assert watch.total_energy_mj == pytest.approx(10000 * watch.duration_s)
    assert watch.energy_mj["VDD_SOC"] == pytest.approx(1000 * watch.duration_s)
    assert watch.mean_power_mw == pytest.approx(10000)
    assert (watch.before.gpu and watch.before.gpu.sm_mhz, watch.after.gpu and watch.after.gpu.sm_mhz) == (612, 306)
    assert [sample.time_s for sample in watch.samples] == sorted(sample.time_s for sample in watch.samples)
    assert watch.samples[-1].time_s <= watch.duration_s
    assert watch.notes == ()
    said = judge_state(watch.before, watch.after, watch, device="gpu")
    assert said.verdict == "unstable"
    assert any(reason.startswith("gpu-throttle-alert, in ") for reason in said.reasons)
    assert msgspec.json.decode(msgspec.json.encode(watch), type=Watch) == watch


def test_shortest_watch_has_two_samples(tmp_path: Path) -> None:
    write(tmp_path, BOARD)
    with Monitor(interval_ms=60_000, root=tmp_path) as monitor:
        pass
    assert len(monitor.watch.samples) == 2
    assert monitor.watch.mean_power_mw == pytest.approx(10000)


def test_sensor_that_stops_and_one_that_goes(tmp_path: Path) -> None:
    write(tmp_path, BOARD)
    with Monitor(interval_ms=10, root=tmp_path) as monitor:
        wait_for(lambda: len(monitor._raw) >= 2)
        (tmp_path / "sys/class/hwmon/hwmon1/curr1_input").write_text("")
        (tmp_path / "sys/class/devfreq/17000000.gpu/cur_freq").write_text("nan")
        seen = len(monitor._raw)
        wait_for(lambda: len(monitor._raw) >= seen + 3)
    last = monitor.watch.samples[-1]
    assert (last.rails_mw, last.gpu_mhz, last.cpu_mhz) == ({"VDD_SOC": 1000}, None, 1190.4)


def test_power_that_was_not_read_for_long_is_told(tmp_path: Path) -> None:
    write(tmp_path, BOARD)
    with Monitor(interval_ms=10, root=tmp_path) as monitor:
        monitor._stop.set()
        time.sleep(0.12)
    assert any("no power was read for 0.1" in note for note in monitor.watch.notes)


def test_nothing_to_watch_starts_nothing(tmp_path: Path) -> None:
    with Monitor(root=tmp_path) as monitor:
        assert threads() == []
    watch = monitor.watch
    assert (watch.sources, watch.samples, watch.energy_mj, watch.total_energy_mj) == ((), (), {}, None)
    assert (watch.mean_power_mw, watch.counter_energy_mj, watch.sample_cost_us) == (None, None, None)
    assert watch.notes[0].startswith("nothing to watch")
    assert judge_state(watch.before, watch.after, watch, device="cpu").verdict == "unknown"


def test_rails_that_do_not_tell_the_total(tmp_path: Path) -> None:
    write(tmp_path, {name.replace("hwmon1", "hwmon7"): text.replace("VDD_IN", "VDD_X") for name, text in BOARD.items()})
    with Monitor(root=tmp_path) as monitor:
        pass
    assert (monitor.watch.total_rails, monitor.watch.total_energy_mj, monitor.watch.mean_power_mw) == ((), None, None)
    assert "which of the rails VDD_X, VDD_SOC add up" in monitor.watch.notes[0]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("nvml") / "libnvidia-ml.so.1"
    return str(compile_cpp(out, "-shared", "-fPIC", NATIVE / "nvml_on_host" / "nvml.cpp"))


def test_gpu_is_watched_by_nvml(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NVML_REASONS", "0x4")
    with Nvml(library=library) as nvml:
        with Monitor(interval_ms=10, root=tmp_path, nvml=nvml) as monitor:
            wait_for(lambda: len(monitor._raw) >= 3)
        assert nvml.energy_mj() is not None  # it was left open
    watch = monitor.watch
    assert watch.samples[0] == Sample(
        time_s=watch.samples[0].time_s, rails_mw={"gpu": 298765}, gpu_mhz=1740, memory_mhz=2619, temperature_c=61,
        throttle_reasons=("software power cap",),
    )  # fmt: skip
    assert (watch.sources, watch.total_rails, watch.counter_energy_mj) == (("nvml",), ("gpu",), 1000)
    assert watch.mean_power_mw == pytest.approx(298765)
    assert watch.notes == ("power is that of the GPU's board alone, without the CPU and its memory",)
    assert watch.before.gpu is not None
    assert watch.before.gpu.name == "NVIDIA Host A"
    assert judge_state(watch.before, watch.after, watch, device="gpu").verdict == "unstable"


def test_averaged_power_of_a_short_watch_is_told(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NVML_FAIL", "instant=3")
    with Nvml(library=library) as nvml, Monitor(root=tmp_path, nvml=nvml) as monitor:
        pass
    assert "power is an average over about the last second, and the watch took 0.0" in monitor.watch.notes[1]
    assert monitor.watch.mean_power_mw == pytest.approx(312345)


def test_nvml_that_supports_nothing_is_not_asked_again(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_NVML_FAIL", "all=3;instant=3")
    with Nvml(library=library) as nvml, Monitor(root=tmp_path, nvml=nvml) as monitor:
        assert threads() == []
    assert (monitor.watch.sources, monitor.watch.samples, monitor.watch.counter_energy_mj) == ((), (), None)


def test_own_nvml_is_opened_and_closed(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("FAKE_NVML_LOG", str(log))
    monkeypatch.setattr(module, "open_nvml", lambda: Nvml(library=library))
    with Monitor(interval_ms=1000) as monitor:
        assert log.read_text().split() == ["open"]
    assert log.read_text().split() == ["open", "closed"]
    assert "nvml" in monitor.watch.sources
    with contextlib.suppress(KeyError), Monitor(interval_ms=1000):
        raise KeyError
    assert log.read_text().split() == ["open", "closed"] * 2


STEADY = f"""
import time
while True:
    print({LINE!r}, flush=True)
    time.sleep(0.01)
"""


def test_tegrastats_is_read_where_rails_are_no_files(tmp_path: Path) -> None:
    tegrastats = program(tmp_path / "tegrastats", STEADY)
    with Monitor(interval_ms=20, root=tmp_path, tegrastats=tegrastats) as monitor:
        assert monitor._child is not None
        assert monitor._child._process is not None
        child = monitor._child._process.pid
        wait_for(lambda: monitor._child is not None and len(monitor._child._lines) >= 3)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert threads() == []
    watch = monitor.watch
    assert watch.sources == ("tegrastats",)
    assert watch.samples[0] == Sample(
        time_s=watch.samples[0].time_s, gpu_mhz=612, memory_mhz=2133, cpu_mhz=1497, temperature_c=58.625,
        rails_mw={"VDD_IN": 16000, "VDD_CPU_GPU_CV": 7000, "VDD_SOC": 3000},
    )  # fmt: skip
    assert (watch.total_rails, watch.mean_power_mw) == (("VDD_IN",), pytest.approx(16000))


def test_tegrastats_gets_the_interval_and_a_plain_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    said = tmp_path / "said"
    body = f"import os, sys; open({str(said)!r}, 'w').write(' '.join([*sys.argv[1:], os.environ['LC_ALL']]))"
    with Monitor(interval_ms=250, root=tmp_path, tegrastats=program(tmp_path / "tegrastats", body)):
        wait_for(lambda: said.exists() and said.read_text())
    assert said.read_text() == "--interval 250 C"


def test_files_are_preferred_to_tegrastats(tmp_path: Path) -> None:
    write(tmp_path, BOARD)
    with Monitor(root=tmp_path, tegrastats=str(tmp_path / "absent")) as monitor:
        pass
    assert "tegrastats" not in monitor.watch.sources
    assert monitor.watch.notes == ()


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("import sys; sys.exit(7)", "ended by itself with status 7"),
        ("import time; time.sleep(60)", "printed nothing"),
    ],
)
def test_tegrastats_that_says_nothing(body: str, fault: str, tmp_path: Path) -> None:
    tegrastats = program(tmp_path / "tegrastats", body)
    with Monitor(interval_ms=10, root=tmp_path, tegrastats=tegrastats) as monitor:
        process = monitor._child._process if monitor._child is not None else None
        assert process is not None
        if "exit" in body:
            process.wait(10)
    assert process.returncode is not None
    assert any(fault in note for note in monitor.watch.notes)
    assert (monitor.watch.sources, monitor.watch.samples) == ((), ())


def test_tegrastats_that_is_not_there(tmp_path: Path) -> None:
    with Monitor(root=tmp_path, tegrastats=str(tmp_path / "absent")) as monitor:
        child = monitor._child
        assert child is not None
        wait_for(lambda: child._process is None or child._process.poll() is not None)
    assert any("absent ended by itself with status 127" in note for note in monitor.watch.notes)


def test_broken_and_partial_lines_are_left_out(tmp_path: Path) -> None:
    body = f"""
    import sys, time
    line = {LINE!r}.encode()
    sys.stdout.buffer.write(line + b"\\n" + line[:80] + line + b"\\n" + b"\\xff\\xfe\\x00 garbage\\n\\n" + line[:-18])
    sys.stdout.flush()
    time.sleep(60)
    """
    with Monitor(interval_ms=20, root=tmp_path, tegrastats=program(tmp_path / "tegrastats", body)) as monitor:
        child = monitor._child
        assert child is not None
        wait_for(lambda: len(child._lines) >= 4)
    rails = [sorted(sample.rails_mw) for sample in monitor.watch.samples]
    assert rails == [["VDD_CPU_GPU_CV", "VDD_IN", "VDD_SOC"], ["VDD_CPU_GPU_CV", "VDD_IN"]]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_no_child_survives_an_error(error: type[BaseException], tmp_path: Path) -> None:
    tegrastats = program(tmp_path / "tegrastats", STEADY)
    monitor = Monitor(interval_ms=20, root=tmp_path, tegrastats=tegrastats)
    processes = []

    def fail() -> None:
        with monitor:
            processes.append(monitor._child._process if monitor._child is not None else None)
            raise error

    with pytest.raises(error):
        fail()
    (process,) = processes
    assert process is not None
    assert process.returncode == -signal.SIGKILL
    assert threads() == []
    with pytest.raises(RunError, match="the watch is not over"):
        _ = monitor.watch


def test_no_child_survives_an_error_while_it_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {name: text for name, text in BOARD.items() if "hwmon" not in name})
    monitor = Monitor(interval_ms=20, root=tmp_path, tegrastats=program(tmp_path / "tegrastats", STEADY))

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(monitor, "_take", interrupt)
    with pytest.raises(KeyboardInterrupt):
        monitor.__enter__()
    assert monitor._child is not None
    assert monitor._child._process is None  # it was ended and waited for
    assert monitor._files is not None
    assert monitor._files.descriptors == []


def test_children_of_the_child_end_with_it(tmp_path: Path) -> None:
    inner = program(tmp_path / "inner", STEADY)
    outer = tmp_path / "tegrastats"
    outer.write_text(f"#!/bin/sh\n{inner} &\necho $! >{tmp_path}/pid\nwait\n")
    outer.chmod(0o755)
    with Monitor(interval_ms=20, root=tmp_path, tegrastats=str(outer)) as monitor:
        wait_for(lambda: monitor._child is not None and monitor._child._lines)
    pid = int((tmp_path / "pid").read_text())
    wait_for(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2])


def test_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    tegrastats = program(
        tmp_path / "tegrastats", f"import os; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))" + STEADY
    )
    code = (
        "import time; from pathlib import Path; from edgecomp.profiles.monitor import Monitor\n"
        f"with Monitor(interval_ms=20, root=Path({str(tmp_path)!r}), tegrastats={tegrastats!r}): time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        pid = tmp_path / "pid"
        wait_for(lambda: pid.exists() and pid.read_text(), 30)
    finally:
        parent.kill()
        parent.wait()
    stat = Path(f"/proc/{pid.read_text()}/stat")
    wait_for(lambda: not stat.exists() or stat.read_text().split()[2] == "Z")


@pytest.mark.parametrize("interval", [0, 9.9, 60_001, float("nan")])
def test_interval_out_of_range(interval: float) -> None:
    with pytest.raises(InvalidSpec, match=f"interval of {interval} ms must be from 10 to 60000"):
        Monitor(interval_ms=interval)


def test_cost_of_a_sample_is_small_and_told(tmp_path: Path) -> None:
    write(tmp_path, BOARD)
    with Monitor(interval_ms=10, root=tmp_path) as monitor:
        wait_for(lambda: len(monitor._raw) >= 20)
    cost = monitor.watch.sample_cost_us
    assert cost is not None
    assert 1 < cost < 1000  # at 100 ms that is below 1 % of a core; some tens of microseconds on a quiet machine


def test_other_processes_are_seen(tmp_path: Path) -> None:
    tick = os.sysconf("SC_CLK_TCK")
    write(tmp_path, {"proc/stat": "cpu  100 0 0 900 0 0 0 0 0 0"})
    with Monitor(root=tmp_path) as monitor:
        start, own_s = time.process_time(), 0.0
        while own_s < 0.25:
            own_s = time.process_time() - start
        write(tmp_path, {"proc/stat": f"cpu  {100 + tick} 0 0 999 0 0 0 {tick // 10} 0 0"})
    watch = monitor.watch
    assert watch.other_cores == pytest.approx((1 - own_s) / watch.duration_s, rel=0.1)
    assert watch.stolen_cores == pytest.approx(0.1 / watch.duration_s, rel=0.01)


def test_too_short_to_tell_who_worked(tmp_path: Path) -> None:
    write(tmp_path, {"proc/stat": "cpu  100 0 0 900 0 0 0 0 0 0"})
    with Monitor(root=tmp_path) as monitor:
        pass
    assert (monitor.watch.other_cores, monitor.watch.stolen_cores) == (None, None)


def test_very_many_samples_are_thinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_SAMPLES", 3)
    write(tmp_path, BOARD)
    with Monitor(interval_ms=10, root=tmp_path) as monitor:
        wait_for(lambda: len(monitor._raw) >= 8)
    watch = monitor.watch
    assert 2 <= len(watch.samples) <= 3
    assert f"samples {len(watch.samples)} are kept; the energy is of all" in watch.notes[-1]
    assert watch.total_energy_mj == pytest.approx(10000 * watch.duration_s)
