"""What a Jetson prints and keeps in files: lines as they were recorded on boards, whole, cut off and garbled."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecomp.profiles import sysfs, tegra
from edgecomp.profiles.device import read_state
from edgecomp.profiles.state import JetsonState
from edgecomp.profiles.tegra import Tegrastats, parse_jetson_clocks, parse_l4t, parse_power_mode, parse_tegrastats

#: Lines that people recorded and published, by board and JetPack.
TX1 = (
    "RAM 1179/3983MB (lfb 120x4MB) IRAM 0/252kB(lfb 252kB) CPU [1%@102,4%@102,0%@102,0%@102] EMC_FREQ 7%@408 "
    "GR3D_FREQ 0%@76 APE 25 AO@42.5C CPU@37.5C GPU@39C PLL@37C Tdiode@42.75C PMIC@100C Tboard@42C thermal@38.5C "
    "VDD_IN 2532/2698 VDD_CPU 76/178 VDD_GPU 19/19"
)
TX2 = (
    "RAM 2344/7852MB (lfb 1154x4MB) SWAP 0/3926MB (cached 0MB) CPU [1%@345,off,off,1%@345,0%@345,2%@345] "
    "EMC_FREQ 4%@1600 GR3D_FREQ 0%@624 APE 150 PLL@37.5C MCPU@37.5C PMIC@100C Tboard@32C GPU@35C BCPU@37.5C "
    "thermal@36.5C Tdiode@34.25C VDD_SYS_GPU 152/152 VDD_SYS_SOC 687/687 VDD_4V0_WIFI 0/0 VDD_IN 3056/3056 "
    "VDD_SYS_CPU 152/152 VDD_SYS_DDR 883/883"
)
NANO_JP4 = (
    "RAM 1923/3964MB (lfb 2x2MB) SWAP 191/1982MB (cached 6MB) IRAM 0/252kB(lfb 252kB) "
    "CPU [5%@1224,4%@1224,3%@1224,6%@1224] EMC_FREQ 0%@1600 GR3D_FREQ 0%@76 APE 25 PLL@37C CPU@40C PMIC@50C GPU@40C "
    "AO@45C thermal@40C POM_5V_IN 1750/1628 POM_5V_GPU 0/0 POM_5V_CPU 366/406"
)
NANO_NO_ROOT = (
    "RAM 1766/3964MB (lfb 197x4MB) SWAP 0/2048MB (cached 0MB) CPU [24%@1224,15%@1224,13%@1224,10%@1224] EMC_FREQ 0% "
    "GR3D_FREQ 0% PLL@21C CPU@25C PMIC@100C GPU@23.5C AO@33.5C thermal@24.5C POM_5V_IN 2545/2547 POM_5V_GPU 0/0 "
    "POM_5V_CPU 549/529"
)
AGX_XAVIER_JP4 = (
    "RAM 721/31927MB (lfb 7291x4MB) SWAP 0/15963MB (cached 0MB) "
    "CPU [2%@1190,0%@1190,0%@1190,0%@1190,off,off,off,off] EMC_FREQ 0%@665 GR3D_FREQ 0%@318 APE 150 MTS fg 0% bg 0% "
    "AO@37.5C GPU@37.5C Tdiode@40C PMIC@100C AUX@36C CPU@37.5C thermal@36.9C Tboard@37C "
    "GPU 0/0 CPU 311/311 SOC 932/932 CV 0/0 VDDRQ 621/621 SYS5V 1482/1482"
)
XAVIER_NX_JP5 = (
    "07-09-2024 13:31:31 RAM 3168/6851MB (lfb 2x4MB) SWAP 161/3426MB (cached 0MB) "
    "CPU [23%@1397,17%@1192,16%@1190,13%@1190,23%@1190,10%@1190] EMC_FREQ 2%@204 GR3D_FREQ 0%@[114] VIC_FREQ 115 "
    "APE 150 AUX@45C CPU@46.5C thermal@45.6C AO@45C GPU@45.5C PMIC@50C "
    "VDD_IN 2763mW/2846mW VDD_CPU_GPU_CV 650mW/670mW VDD_SOC 650mW/711mW"
)
AGX_ORIN_JP5 = (
    "04-11-2025 10:36:27 RAM 4321/62801MB (lfb 1759x4MB) SWAP 19/31400MB (cached 0MB) CPU [0%@729,0%@729,off,0%@729] "
    "EMC_FREQ 0%@2133 GR3D_FREQ 0%@[0,0] VIC_FREQ 729 APE 174 CV0@-256C CPU@44.562C Tboard@32C SOC2@40.093C "
    "Tdiode@33C SOC0@41.093C CV1@-256C GPU@-256C tj@44.343C SOC1@41.25C CV2@-256C VDD_GPU_SOC 2340mW/2340mW "
    "VDD_CPU_CV 390mW/390mW VIN_SYS_5V0 4025mW/4025mW NC 0mW/0mW VDDQ_VDD2_1V8AO 301mW/301mW NC 0mW/0mW"
)
AGX_ORIN_JP6 = (
    "RAM 29114/30697MB (lfb 3x4MB)    SWAP 4915/15348MB (cached 1MB) CPU [3%@729,4%@729,0%@2201,100%@2201] "
    "EMC_FREQ 1%@2133 GR3D_FREQ 0%@[305,305] NVENC      off  NVDEC    off NVJPG off PVA0_FREQ off "
    "APE           174        cpu@53.062C soc2@48.25C soc0@48.843C  gpu@47.812C tj@53.062C soc1@48.968C    "
    "VDD_GPU_SOC 3205mW/3205mW VDD_CPU_CV 4405mW/4405mW VIN_SYS_5V0 4767mW/4767mW"
)
ORIN_NANO_JP6 = (
    "10-08-2026 04:35:02 RAM 6712/7620MB (lfb 12x4MB) SWAP 369/3810MB (cached 8MB) "
    "CPU [38%@1497,2%@729,1%@729,0%@729,1%@729,0%@729] EMC_FREQ 61%@2133 GR3D_FREQ 99%@[612] NVDEC off NVJPG off "
    "VIC off OFA off APE 200 cpu@57.125C soc2@55.093C soc0@56.625C gpu@58.625C tj@58.312C soc1@55.937C "
    "VDD_IN 16321mW/11204mW VDD_CPU_GPU_CV 7104mW/4944mW VDD_SOC 3120mW/3659mW"
)
THOR_JP70 = (
    "05-14-2026 21:36:35 RAM 26063/125772MB (lfb 35x4MB) CPU [2%@972,off] VDD_GPU -392mW/-392mW "
    "VDD_CPU_SOC_MSS 3924mW/3835mW VIN_SYS_5V0 5064mW/5055mW VIN 15004mW/15096mW"
)
THOR_JP72 = (
    "08-08-2026 21:00:39 RAM 8353/125749MB (lfb 31x4MB) CPU [90%@2601,75%@2601,off,7%@2601] EMC_FREQ 34%@4266 "
    "GR3D_FREQ 87%@[1574,1574,1574] NVENC0_FREQ @1691 VIC off cpu@58.25C/61.75C tj@66.625C/66.625C "
    "gpu@56.937C/66.625C soc012@55.375C/58.781C soc345@55.812C/60.031C VDD_GPU 37939mW/8660mW/37939mW "
    "VDD_CPU_SOC_MSS 30059mW/12281mW/30059mW VIN_SYS_5V0 15486mW/7424mW/15486mW VIN 124486mW/36487mW/124486mW"
)
THOR_JP72_IDLE = (
    "08-08-2026 20:58:23 RAM 3429/125749MB (lfb 120x4MB) CPU [0%,5%,off]@2601 EMC_FREQ @4266 "
    "GR3D_FREQ @[1574,1574,1574] cpu@49.75C/49.75C tj@51.218C/51.218C gpu@51.218C/51.218C "
    "VDD_GPU 6330mW/6330mW/6330mW VIN 28906mW/14453mW/28906mW"
)
LINES = [
    TX1, TX2, NANO_JP4, NANO_NO_ROOT, AGX_XAVIER_JP4, XAVIER_NX_JP5, AGX_ORIN_JP5, AGX_ORIN_JP6, ORIN_NANO_JP6,
    THOR_JP70, THOR_JP72, THOR_JP72_IDLE,
]  # fmt: skip


def parse(line: str) -> Tegrastats:
    said = parse_tegrastats(line)
    assert said is not None, line
    return said


def facts(said: Tegrastats | None) -> set[tuple[object, ...]]:
    """Return everything that was read, one by one."""
    if said is None:
        return set()
    found: set[tuple[object, ...]] = {("core", core, mhz) for core, mhz in enumerate(said.cpu_mhz) if mhz is not None}
    found |= {("rail", *pair) for pair in said.rails_mw.items()}
    found |= {("zone", *pair) for pair in said.temperatures_c.items()}
    for name in ("ram_used_mib", "ram_total_mib", "gpu_percent", "gpu_mhz", "emc_percent", "emc_mhz"):
        if getattr(said, name) is not None:
            found.add((name, getattr(said, name)))
    return found


def test_nano_of_jetpack_4() -> None:
    assert parse(NANO_JP4) == Tegrastats(
        ram_used_mib=1923, ram_total_mib=3964, cpu_mhz=(1224, 1224, 1224, 1224), gpu_percent=0, gpu_mhz=76,
        emc_percent=0, emc_mhz=1600,
        temperatures_c={"PLL": 37, "CPU": 40, "PMIC": 50, "GPU": 40, "AO": 45, "thermal": 40},
        rails_mw={"POM_5V_IN": 1750, "POM_5V_GPU": 0, "POM_5V_CPU": 366},
    )  # fmt: skip


def test_thor_of_jetpack_7_2() -> None:
    assert parse(THOR_JP72) == Tegrastats(
        ram_used_mib=8353, ram_total_mib=125749, cpu_mhz=(2601, 2601, None, 2601), gpu_percent=87, gpu_mhz=1574,
        emc_percent=34, emc_mhz=4266,
        temperatures_c={"cpu": 58.25, "tj": 66.625, "gpu": 56.937, "soc012": 55.375, "soc345": 55.812},
        rails_mw={"VDD_GPU": 37939, "VDD_CPU_SOC_MSS": 30059, "VIN_SYS_5V0": 15486, "VIN": 124486},
    )  # fmt: skip
    idle = parse(THOR_JP72_IDLE)
    assert (idle.cpu_mhz, idle.gpu_percent, idle.gpu_mhz, idle.emc_mhz) == ((2601, 2601, None), None, 1574, 4266)


@pytest.mark.parametrize(
    ("line", "gpu_mhz", "emc_mhz", "rails", "total"),
    [
        (TX1, 76, 408, {"VDD_IN": 2532, "VDD_CPU": 76, "VDD_GPU": 19}, ("VDD_IN",)),
        (NANO_NO_ROOT, None, None, {"POM_5V_IN": 2545, "POM_5V_GPU": 0, "POM_5V_CPU": 549}, ("POM_5V_IN",)),
        (
            TX2, 624, 1600,
            {"VDD_SYS_GPU": 152, "VDD_SYS_SOC": 687, "VDD_4V0_WIFI": 0, "VDD_IN": 3056, "VDD_SYS_CPU": 152,
             "VDD_SYS_DDR": 883},
            ("VDD_IN",),
        ),
        (
            AGX_XAVIER_JP4, 318, 665,
            {"GPU": 0, "CPU": 311, "SOC": 932, "CV": 0, "VDDRQ": 621, "SYS5V": 1482},
            ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),
        ),
        (XAVIER_NX_JP5, 114, 204, {"VDD_IN": 2763, "VDD_CPU_GPU_CV": 650, "VDD_SOC": 650}, ("VDD_IN",)),
        (
            AGX_ORIN_JP5, None, 2133,  # its GPU sleeps
            {"VDD_GPU_SOC": 2340, "VDD_CPU_CV": 390, "VIN_SYS_5V0": 4025, "VDDQ_VDD2_1V8AO": 301},
            ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
        ),
        (
            AGX_ORIN_JP6, 305, 2133, {"VDD_GPU_SOC": 3205, "VDD_CPU_CV": 4405, "VIN_SYS_5V0": 4767},
            ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
        ),
        (ORIN_NANO_JP6, 612, 2133, {"VDD_IN": 16321, "VDD_CPU_GPU_CV": 7104, "VDD_SOC": 3120}, ("VDD_IN",)),
        (
            THOR_JP70, None, None,
            {"VDD_GPU": -392, "VDD_CPU_SOC_MSS": 3924, "VIN_SYS_5V0": 5064, "VIN": 15004}, ("VIN",),
        ),
    ],
)  # fmt: skip
def test_clocks_and_rails_of_each_board(
    line: str, gpu_mhz: float, emc_mhz: float, rails: dict[str, float], total: tuple[str, ...]
) -> None:
    said = parse(line)
    assert (said.gpu_mhz, said.emc_mhz, said.rails_mw) == (gpu_mhz, emc_mhz, rails)
    assert sysfs.total_rails(tuple(said.rails_mw)) == total


def test_sensors_that_are_off_say_nothing() -> None:
    zones = parse(AGX_ORIN_JP5).temperatures_c
    assert zones == {
        "CPU": 44.562,
        "Tboard": 32,
        "SOC2": 40.093,
        "Tdiode": 33,
        "SOC0": 41.093,
        "tj": 44.343,
        "SOC1": 41.25,
    }
    assert parse(TX2).cpu_mhz == (345, None, None, 345, 345, 345)


@pytest.mark.parametrize("line", LINES)
def test_every_beginning_of_a_line_says_less_and_nothing_else(line: str) -> None:
    whole = facts(parse(line))
    assert len(whole) >= 7
    for length in range(len(line)):
        assert facts(parse_tegrastats(line[:length])) <= whole, line[:length]


@pytest.mark.parametrize("line", LINES)
def test_every_end_of_a_line_says_less_and_nothing_else(line: str) -> None:
    whole = facts(parse(line))
    for start in range(len(line)):
        assert facts(parse_tegrastats(line[start:])) <= whole, line[start:]


@given(st.binary(max_size=400), st.sampled_from(LINES), st.integers(0, 600))
def test_any_bytes_are_taken(noise: bytes, line: str, place: int) -> None:
    parse_tegrastats(noise.decode(errors="replace"))
    text = line[:place] + noise.decode("latin-1") + line[place:]
    said = parse_tegrastats(text)
    assert said is None or all(f"{name} {power:.0f}" in text for name, power in said.rails_mw.items())


@given(st.sampled_from(LINES), st.sampled_from(LINES), st.integers(1, 600))
def test_two_lines_that_ran_into_each_other_are_none(first: str, second: str, length: int) -> None:
    cut = first[:length]
    if "RAM " in cut and "MB" in cut.partition("RAM ")[2]:
        assert parse_tegrastats(f"{cut} {second}") is None


def test_decimal_commas_are_points() -> None:
    said = parse(ORIN_NANO_JP6.replace("gpu@58.625C", "gpu@58,625C").replace("cpu@57.125C", "cpu@57,1C"))
    assert (said.temperatures_c["gpu"], said.temperatures_c["cpu"]) == (58.625, 57.1)
    assert said.cpu_mhz == (1497, 729, 729, 729, 729, 729)


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("RAM 1/2MB VDD_IN \u0664\u0669\u0667mW/4970mW", "VDD_IN"),  # digits of another script
        ("RAM 1/2MB VDD_IN 4970mW/x VDD_SOC 1mW/1mW", "VDD_IN"),
        ("RAM 1/2MB VDD_IN 4970mW/4970mW VDD_IN 1mW/1mW VDD_SOC 1mW/1mW", "VDD_IN"),  # twice, and not the same
        ("RAM 1/2MB VDD_IN 49 70mW/4970mW", "VDD_IN"),
        ("RAM 1/2MB VDD_IN 123456789mW/1mW", "VDD_IN"),
        ("RAM 1/2MB SWAP 5/19", "SWAP"),
        ("RAM 1/2MB xVDD_IN 4970mW/4970mW", "VDD_IN"),
    ],
)
def test_what_is_not_whole_is_no_rail(line: str, wrong: str) -> None:
    assert wrong not in parse(line).rails_mw


@pytest.mark.parametrize("line", ["", "\n", "tegrastats: command not found", "RAM 12/", "XRAM 1/2MB", "RAM 1/2GB"])
def test_other_lines_are_none(line: str) -> None:
    assert parse_tegrastats(line) is None


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("NV Power Mode: MAXN\n0\n", (0, "MAXN")),
        ("NV Fan Mode:quiet\nNV Power Mode: MODE_15W_6CORE\n2\n", (2, "MODE_15W_6CORE")),
        ("NVPM WARN: fan mode is not set!\r\nNV Power Mode: 15W\r\n0\r\n", (0, "15W")),
        (
            "NVPM VERB: parsing done\nNVPM VERB: Current mode: NV Power Mode: 25W\n1\nNVPM VERB: REAL_VAL: 1\n",
            (1, "25W"),
        ),
        ("NV Power Mode: MAXN\n", (None, "MAXN")),
        ("NV Power Mode:", (None, "unknown")),
        ("NVPM ERROR: Error opening /var/lib/nvpmodel/status: 13\n7\n", (None, "unknown")),
        ("", (None, "unknown")),
    ],
)
def test_power_mode_of_nvpmodel(text: str, mode: tuple[int | None, str]) -> None:
    assert parse_power_mode(text) == mode


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("# R32 (release), REVISION: 7.1, GCID: 29818004, BOARD: t210ref, EABI: aarch64", "32.7.1"),
        ("# R36 (release), REVISION: 4.4, GCID: 41062509, BOARD: generic, EABI: aarch64", "36.4.4"),
        ("# R36 (release), REVISION: 4.", "unknown"),
        ("# R36 (release), REVISION: 4", "unknown"),  # cut off
        ("R36", "unknown"),
        ("", "unknown"),
    ],
)
def test_version_of_the_board_support_package(text: str, version: str) -> None:
    assert parse_l4t(text) == version


SHOWN = """\
SOC family:tegra234  Machine:NVIDIA Jetson Orin Nano Developer Kit
Online CPUs: 0-5
cpu0:  Online=1 Governor=schedutil MinFreq=729600 MaxFreq=1510400 CurrentFreq=960000 IdleStates: WFI=1 c7=1
cpu1:  Online=0 Governor=schedutil MinFreq=729600 MaxFreq=729600 CurrentFreq=729600 IdleStates: WFI=1 c7=1
GPU MinFreq=306000000 MaxFreq=624750000 CurrentFreq=306000000
Active GPU TPCs: 4
EMC MinFreq=204000000 MaxFreq=2133000000 CurrentFreq=2133000000 FreqOverride=0
FAN Dynamic Speed Control=nvfancontrol hwmon0_pwm1=0
NV Power Mode: 15W
"""


def test_what_jetson_clocks_shows() -> None:
    said = parse_jetson_clocks(SHOWN)
    assert [(core.core, core.min_mhz, core.max_mhz, core.now_mhz) for core in said.cores] == [(0, 729.6, 1510.4, 960)]
    assert said.gpu is not None
    assert (said.gpu.min_mhz, said.gpu.max_mhz, said.gpu.now_mhz) == (306, 624.75, 306)
    assert said.emc is not None
    assert said.emc.now_mhz == 2133
    assert said.state == "off"
    held = SHOWN.replace("MinFreq=729600 MaxFreq=1510400", "MinFreq=1510400 MaxFreq=1510400")
    assert parse_jetson_clocks(held).state == "off"
    assert parse_jetson_clocks(held.replace("GPU MinFreq=306000000", "GPU MinFreq=624750000")).state == "on"


@pytest.mark.parametrize(
    "text", ["", "Error: Run this script(/usr/bin/jetson_clocks) as a root user\n", "cpu0: MinFreq=1"]
)
def test_jetson_clocks_without_root_says_nothing(text: str) -> None:
    said = parse_jetson_clocks(text)
    assert (said.cores, said.gpu, said.emc, said.state) == ((), None, None, "unknown")


def write(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n", encoding="utf-8")


ORIN_NANO = {
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.4, GCID: 41062509, BOARD: generic, EABI: aarch64",
    "etc/nvpmodel.conf": "# < POWER_MODEL ID=1 NAME=X >\n< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=25W >",
    "var/lib/nvpmodel/status": "pmode:0001",
    "var/lib/dpkg/status": "Package: a\nStatus: install ok installed\nVersion: 1\n\nPackage: nvidia-jetpack\n"
    "Status: install ok installed\nVersion: 6.2.1+b38\n\nPackage: z\nVersion: 9\n",
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0",
    "proc/loadavg": "0.12 0.13 0.09 1/234 5678",
    "proc/meminfo": "MemTotal:        7802880 kB\nMemFree:          123456 kB\nMemAvailable:    3901440 kB",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1190400",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_min_freq": "729600",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq": "1344000",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil",
    "sys/devices/system/cpu/cpu1/online": "0",
    "sys/class/devfreq/17000000.gpu/cur_freq": "612000000",
    "sys/class/devfreq/17000000.gpu/min_freq": "306000000",
    "sys/class/devfreq/17000000.gpu/max_freq": "918000000",
    "sys/class/devfreq/17000000.gpu/device/load": "873",
    "sys/class/devfreq/15340000.vic/cur_freq": "115000000",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
    "sys/class/thermal/thermal_zone0/temp": "57125",
    "sys/class/thermal/thermal_zone0/trip_point_0_type": "critical",
    "sys/class/thermal/thermal_zone0/trip_point_0_temp": "104500",
    "sys/class/thermal/thermal_zone0/trip_point_1_type": "passive",
    "sys/class/thermal/thermal_zone0/trip_point_1_temp": "99000",
    "sys/class/thermal/thermal_zone0/trip_point_2_type": "active",
    "sys/class/thermal/thermal_zone0/trip_point_2_temp": "51000",
    "sys/class/thermal/thermal_zone1/type": "gpu-thermal",
    "sys/class/thermal/thermal_zone1/temp": "58625",
    "sys/class/thermal/thermal_zone2/type": "cv0-thermal",
    "sys/class/thermal/thermal_zone2/temp": "-256000",
    "sys/class/thermal/cooling_device0/type": "pwm-fan",
    "sys/class/thermal/cooling_device0/cur_state": "2",
    "sys/class/thermal/cooling_device1/type": "gpu-throttle-alert",
    "sys/class/thermal/cooling_device1/cur_state": "0",
    "sys/class/hwmon/hwmon1/name": "ina3221",
    "sys/class/hwmon/hwmon1/in1_label": "VDD_IN",
    "sys/class/hwmon/hwmon1/in1_input": "4984",
    "sys/class/hwmon/hwmon1/curr1_input": "1856",
    "sys/class/hwmon/hwmon1/in2_label": "VDD_CPU_GPU_CV",
    "sys/class/hwmon/hwmon1/in2_input": "4976",
    "sys/class/hwmon/hwmon1/curr2_input": "120",
    "sys/class/hwmon/hwmon1/in3_label": "NC",
    "sys/class/hwmon/hwmon1/in3_input": "0",
    "sys/class/hwmon/hwmon1/curr3_input": "0",
    "sys/class/hwmon/hwmon1/in7_label": "sum of shunt voltages",
    "sys/class/hwmon/hwmon1/in7_input": "8080",
    "sys/class/hwmon/hwmon1/curr7_input": "8080",
    "sys/class/hwmon/hwmon3/name": "soctherm_oc",
    "sys/class/hwmon/hwmon3/oc1_event_cnt": "0",
    "sys/class/hwmon/hwmon3/oc3_event_cnt": "37",
}


def test_state_of_an_orin_nano_from_its_files(tmp_path: Path) -> None:
    write(tmp_path, ORIN_NANO)
    state = read_state(tmp_path)
    assert state.jetson == JetsonState(
        model="NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
        l4t="36.4.4",
        jetpack="6.2.1+b38",
        power_mode_id=1,
        power_mode="25W",
        jetson_clocks="off",
        rails_mw={"VDD_IN": 4984 * 1856 / 1000, "VDD_CPU_GPU_CV": 4976 * 120 / 1000},
        ram_used_mib=3810,
        ram_total_mib=7620,
        temperatures_c={"cpu-thermal": 57.125, "gpu-thermal": 58.625},
        over_current_events={"oc1": 0, "oc3": 37},
    )
    assert state.gpu is not None
    assert (state.gpu.name, state.gpu.sm, state.gpu.source) == ("tegra234 GPU", 87, "devfreq")
    assert (state.gpu.sm_mhz, state.gpu.max_sm_mhz, state.gpu.temperature_c) == (612, 918, 58.625)
    assert state.gpu.utilization_percent == pytest.approx(87.3)
    assert (state.gpu.throttle_reasons, state.cooling) == ((), ())
    assert state.gpu.power_mw is None
    assert (state.governor, state.load_average, state.memory_available_mib) == ("schedutil", (0.12, 0.13, 0.09), 3810)
    assert [(core.core, core.now_mhz, core.min_mhz, core.max_mhz) for core in state.cores] == [(0, 1190.4, 729.6, 1344)]
    assert state.temperature_limits_c == {"cpu-thermal": 99}
    assert [reason.partition(":")[0] for reason in state.unreadable] == ["emc_mhz"]


def test_jetson_clocks_by_the_limits_of_the_clocks(tmp_path: Path) -> None:
    held = {
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_min_freq": "1344000",
        "sys/class/devfreq/17000000.gpu/min_freq": "918000000",
    }
    write(tmp_path, ORIN_NANO | held)
    state = read_state(tmp_path)
    assert state.jetson is not None
    assert state.jetson.jetson_clocks == "on"
    (tmp_path / "sys/class/devfreq/17000000.gpu/min_freq").write_text("")
    state = read_state(tmp_path)
    assert state.jetson is not None
    assert state.jetson.jetson_clocks == "unknown"
    assert any(reason.startswith("jetson_clocks: the GPU's clock limits") for reason in state.unreadable)


def test_cooling_that_holds_the_gpu_is_a_throttle_reason(tmp_path: Path) -> None:
    write(tmp_path, ORIN_NANO | {"sys/class/thermal/cooling_device1/cur_state": "1"})
    state = read_state(tmp_path)
    assert state.gpu is not None
    assert (state.gpu.throttle_reasons, state.cooling) == (("gpu-throttle-alert",), ("gpu-throttle-alert",))


def test_rails_of_jetpack_4_are_in_milliwatts_already(tmp_path: Path) -> None:
    folder = "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0"
    write(
        tmp_path,
        {
            f"{folder}/rail_name_0": "POM_5V_IN", f"{folder}/in_power0_input": "1750",
            f"{folder}/rail_name_1": "POM_5V_GPU", f"{folder}/in_power1_input": "0",
            f"{folder}/rail_name_2": "POM_5V_CPU",
        },
    )  # fmt: skip
    rails = sysfs.find_rails(tmp_path)
    assert [(rail.name, rail.power_mw((1750.0,))) for rail in rails] == [("POM_5V_IN", 1750), ("POM_5V_GPU", 1750)]


def test_monitor_that_gives_power_in_microwatts(tmp_path: Path) -> None:
    folder = "sys/class/hwmon/hwmon2"
    write(tmp_path, {f"{folder}/name": "ina238", f"{folder}/label": "VIN", f"{folder}/power1_input": "15004000"})
    (rail,) = sysfs.find_rails(tmp_path)
    assert (rail.name, rail.power_mw((sysfs.read_number(rail.files[0]),))) == ("VIN", 15004)
    assert rail.power_mw((None,)) is None


def test_clock_of_the_memory_on_thor(tmp_path: Path) -> None:
    clocks = {
        "sys/class/devfreq/bwmgr/cur_freq": "4266000000",
        "sys/class/devfreq/bwmgr/max_freq": "4266000000",
        "sys/class/devfreq/gpu-gpc-0/cur_freq": "1575000000",
        "sys/class/devfreq/gpu-nvd-0/cur_freq": "1692000000",
    }
    write(tmp_path, clocks | {"etc/nv_tegra_release": "# R38 (release), REVISION: 2.0, GCID: 1"})
    state = read_state(tmp_path)
    assert state.jetson is not None
    assert (state.jetson.emc_mhz, state.jetson.emc_max_mhz, state.jetson.l4t) == (4266, 4266, "38.2.0")
    assert state.gpu is not None
    assert (state.gpu.sm_mhz, state.gpu.name, state.gpu.sm) == (1575, "unknown", None)


def test_empty_machine_has_a_reason_for_everything(tmp_path: Path) -> None:
    state = read_state(tmp_path)
    assert (state.cores, state.governor, state.gpu, state.jetson) == ((), "unknown", None, None)
    assert [reason.partition(":")[0] for reason in state.unreadable] == [
        "cpu clocks", "governor", "load_average", "memory_available_mib", "temperatures_c", "gpu",
    ]  # fmt: skip


@given(st.binary(max_size=60))
def test_garbage_in_the_files_is_no_number(noise: bytes) -> None:
    text = noise.decode(errors="replace")
    assert sysfs.number_of(text) is None or text.lstrip("-").isascii()
    assert parse_l4t(text) == "unknown"


def test_every_file_of_the_board_may_be_garbage(tmp_path: Path) -> None:
    write(tmp_path, dict.fromkeys(ORIN_NANO, "\x00ü\nNaN inf 1e9 -"))
    state = read_state(tmp_path)
    assert (state.load_average, state.memory_available_mib, state.temperatures_c) == ((), None, {})
    assert state.jetson is not None
    assert (state.jetson.rails_mw, state.jetson.power_mode, state.jetson.jetpack) == ({}, "unknown", "unknown")


def test_nothing_of_this_machine_is_asked_for_another_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tegra.shutil, "which", lambda name: pytest.fail(f"{name} was looked for"))
    write(tmp_path, {"etc/nv_tegra_release": ""})
    state = read_state(tmp_path)
    assert state.jetson is not None
    assert "neither /var/lib/nvpmodel/status nor `nvpmodel -q`" in " ".join(state.unreadable)


def test_state_is_read_within_50_ms(tmp_path: Path) -> None:
    write(tmp_path, ORIN_NANO)
    spent = []
    for _ in range(5):
        start = time.perf_counter()
        read_state(tmp_path)
        spent.append(time.perf_counter() - start)
    assert min(spent) < 0.05  # 4 ms on a quiet machine
