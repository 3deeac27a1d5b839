"""Which target a machine is, and the mark of the most memory."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from edgecomp.profiles.peak import begin_peak, read_peak_mib
from edgecomp.profiles.recognise import target_of
from edgecomp.specs.target import target_names

CARDS = {
    "NVIDIA H200": "h200",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "nvidia-h100-pcie",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100-SXM4-40GB": "nvidia-a100-sxm4-40gb",
    "NVIDIA A10": "a10",
    "NVIDIA A10G": "nvidia-a10g",
    "Tesla T4": "t4",
    "NVIDIA L4": "l4",
    "NVIDIA L40S": "nvidia-l40s",
    "NVIDIA GeForce RTX 4090": "rtx-4090",
    "NVIDIA GeForce RTX 4090 D": "nvidia-geforce-rtx-4090-d",
    "NVIDIA GeForce RTX 5090": "rtx-5090",
    "NVIDIA GB10": "dgx-spark",
    "NVIDIA H200 MIG": "nvidia-h200-mig",
    "": "cpu",
}
BOARDS = {
    ("NVIDIA Jetson Orin Nano Developer Kit", 7.4, "15W"): "orin-nano",
    ("NVIDIA Jetson Orin Nano Developer Kit", 7.4, "MAXN_SUPER"): "orin-nano-super",
    ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", 7.4, "15W"): "orin-nano-super",
    ("NVIDIA Jetson Orin Nano Developer Kit", 3.4, "10W"): "nvidia-jetson-orin-nano-developer-kit",
    ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", 15.3, "25W"): "orin-nx-16",
    ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", 15.3, "MAXN_SUPER"): "orin-nx-16-super",
    ("NVIDIA Jetson AGX Orin Developer Kit", 61.4, "MAXN"): "agx-orin-64",
    ("NVIDIA Jetson AGX Orin Developer Kit", 29.9, "MAXN"): "agx-orin-32",
    ("Jetson-AGX", 31.2, "MAXN"): "jetson-agx",
    ("NVIDIA Jetson AGX Xavier Developer Kit", 31.2, "MAXN"): "agx-xavier",
    ("NVIDIA Jetson Xavier NX Developer Kit", 6.7, "10W"): "xavier-nx",
    ("NVIDIA Jetson AGX Thor Developer Kit", 122.8, "120W"): "thor-t5000",
}


@pytest.mark.parametrize(("gpu", "name"), CARDS.items())
def test_cards(gpu: str, name: str) -> None:
    assert target_of(gpu=gpu, on_gpu=True) == name
    assert target_of(gpu=gpu, on_gpu=False) == "cpu"  # a model that ran beside the card


@pytest.mark.parametrize(("board", "name"), BOARDS.items())
def test_boards_are_targets_whatever_ran_the_model(board: tuple[str, float, str], name: str) -> None:
    for on_gpu in (True, False):
        found = target_of(gpu="Orin", board=board[0], memory_gib=board[1], power_mode=board[2], on_gpu=on_gpu)
        assert found == name


def test_every_target_is_one_that_a_machine_can_be() -> None:
    assert {*CARDS.values(), *BOARDS.values()} & set(target_names()) == set(target_names()) - {"thor-t4000"}
    assert target_of(gpu="", board="NVIDIA Jetson Thor T4000", memory_gib=61.0, on_gpu=True) == "thor-t4000"


def test_peak_of_this_process_follows_what_it_holds() -> None:
    if not begin_peak():
        pytest.skip("this system does not let a process reset its mark (/proc/self/clear_refs)")
    before = read_peak_mib()
    with mmap.mmap(-1, 64 << 20) as block:  # never of what the process holds and does not use
        for page in range(0, len(block), 1 << 12):
            block[page] = 1
    after = read_peak_mib()
    assert before is not None
    assert after is not None
    assert 56 <= after - before <= 80
    assert begin_peak()
    again = read_peak_mib()
    assert again is not None
    assert again < after - 50


def test_peak_where_the_system_does_not_tell(tmp_path: Path) -> None:
    assert not begin_peak(tmp_path / "none")
    assert read_peak_mib(tmp_path / "none") is None
    (tmp_path / "status").write_text("VmRSS:\t  12 kB\n")
    assert read_peak_mib(tmp_path) is None
    (tmp_path / "status").write_text("VmHWM:\t  2048 kB\n")
    assert read_peak_mib(tmp_path) == 2.0
