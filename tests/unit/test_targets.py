"""Targets load, hold dense rates only, and say which TensorRT builds for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from edgecomp.errors import InvalidSpec, UnknownName
from edgecomp.resources import data_path
from edgecomp.specs.target import load_target, target_names

NAMES = (
    "a10",
    "a100",
    "agx-orin-32",
    "agx-orin-64",
    "agx-xavier",
    "dgx-spark",
    "h100",
    "h200",
    "l4",
    "orin-nano",
    "orin-nano-super",
    "orin-nx-16",
    "orin-nx-16-super",
    "rtx-4090",
    "rtx-5090",
    "t4",
    "thor-t4000",
    "thor-t5000",
    "xavier-nx",
)
RTX_SMS = {75, 80, 86, 89, 120, 121}

Edited = Callable[[str, str], str]


@pytest.fixture
def edited(tmp_path: Path) -> Edited:
    """Return a function that writes a copy of the t4 target with one passage replaced, and returns its path."""
    text = data_path("profiles", "targets", "t4.toml").read_text(encoding="utf-8")

    def write(old: str, new: str) -> str:
        assert old in text
        path = tmp_path / "mine.toml"
        path.write_text(text.replace(old, new), encoding="utf-8")
        return str(path)

    return write


def test_all_targets_are_there() -> None:
    assert target_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_loads_under_its_own_name(name: str) -> None:
    target = load_target(name)
    assert target.name == name
    assert target.build_on.endswith(".")
    assert target.power_modes
    for versions in target.runtimes.values():
        SpecifierSet(versions)


@pytest.mark.parametrize("name", NAMES)
def test_precisions_and_runtimes_fit_the_compute_capability(name: str) -> None:
    target = load_target(name)
    precisions = set(target.precisions)
    assert ("fp8" in precisions) == (target.sm >= 89)
    assert ("fp4" in precisions) == (target.sm >= 100)
    assert ("bf16" in precisions) == ("tf32" in precisions) == (target.sm >= 80)
    assert ("rtx" in target.runtimes) == (target.sm in RTX_SMS)
    assert target.is_estimate_only == (target.sm == 72)


@pytest.mark.parametrize("name", [name for name in NAMES if "orin" in name])
def test_orin_has_no_fp8_and_builds_on_the_board(name: str) -> None:
    target = load_target(name)
    assert target.sm == 87
    assert "fp8" not in target.precisions
    assert "10.3" in SpecifierSet(target.runtimes["tensorrt"])
    assert ("11.4.1" in SpecifierSet(target.runtimes["tensorrt"])) == name.startswith("agx")
    assert "itself" in target.build_on


@pytest.mark.parametrize("name", ["agx-xavier", "xavier-nx"])
def test_xavier_serves_estimates_alone(name: str) -> None:
    target = load_target(name)
    assert target.is_estimate_only
    assert "TensorRT 10 dropped" in target.build_on
    assert any("TensorRT 10 dropped" in note for note in target.notes)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('sparsity = "dense"', 'sparsity = "sparse"', "sparse"),
        ('sparsity = "dense"\n', "", "sparsity"),
        ("sm = 75", 'sm = 75\ncolour = "red"', "colour"),
        ("sm = 75", 'sm = "75"', r"\$\.sm"),
        ("sm = 75", "sm = 75\nsm = 75", "line 6"),  # the TOML reader names the line, not the key
        ("[peaks.int8]", "[peaks.fp8]", "fp8"),
        ("[peaks.int8]", "[peaks.int9]", "int9"),
    ],
    ids=["sparse", "no-sparsity", "unknown-key", "wrong-type", "duplicate-key", "peak-without-precision", "precision"],
)
def test_mistakes_name_file_and_key(edited: Edited, old: str, new: str, told: str) -> None:
    with pytest.raises(InvalidSpec, match=rf"(?s)mine\.toml.*{told}"):
        load_target(edited(old, new))


def test_text_that_is_not_utf8_is_told(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b'schema = 1\nname = "\xff"\n')
    with pytest.raises(InvalidSpec, match=r"mine\.toml.*UTF-8"):
        load_target(str(path))


def test_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UnknownName, match="no target 'orin-nanu'; did you mean 'orin-nano'"):
        load_target("orin-nanu")
