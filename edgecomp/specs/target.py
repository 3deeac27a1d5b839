"""Targets: the hardware a bundle will run on. One TOML file each, in `profiles/targets/`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edgecomp.errors import UnknownName
from edgecomp.resources import data_path
from edgecomp.specs._toml import read_toml

__all__ = ["Peak", "PowerMode", "Target", "load_target", "target_names"]

Positive = Annotated[float, Meta(gt=0)]
Confidence = Literal["stated", "derived", "unverified"]
Precision = Literal["fp32", "tf32", "fp16", "bf16", "int8", "fp8", "fp4"]


class Peak(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A peak rate with where it comes from.

    Attributes:
        value: TFLOP/s (floating types), TOP/s (int8) or GB/s (memory).
        source: the document it was read in.
        confidence: `stated` in the source, `derived` by arithmetic, `unverified` (general knowledge).
        sparsity: always `dense`. A 2:4 sparse figure cannot be written here: halve it, and say so in `source`.
    """

    value: Positive
    source: Annotated[str, Meta(min_length=3)]
    confidence: Confidence
    sparsity: Literal["dense"]


class PowerMode(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A power mode of the device: its name, limit in watts, and GPU clock in MHz where it is known (else 0)."""

    name: str
    watts: Positive
    gpu_mhz: Annotated[float, Meta(ge=0)] = 0.0


class Target(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A device: what it can compute, what can build for it, and at which peak rates.

    Attributes:
        name: equal to the file's stem.
        sm: compute capability without the dot, for example 87 for Orin.
        runtimes: TensorRT flavours that build for this SM, with their version range,
            for example `{tensorrt = ">=10.3,<12"}`. Empty: no supported TensorRT builds for it,
            and the target serves estimates alone.
        build_on: where engines for it are built, told to users whose machine cannot.
        precisions: the types its tensor cores (or CUDA cores) run.
        memory_gib: device memory; shared with the CPU where `shared_memory`.
        peaks: dense peak rate by precision.
        bandwidth_gb_s: peak memory bandwidth.
    """

    schema: Literal[1]
    name: str
    title: str
    family: Literal["jetson", "server", "workstation"]
    sm: Annotated[int, Meta(ge=50, le=200)]
    runtimes: dict[Literal["tensorrt", "rtx"], str]
    build_on: Annotated[str, Meta(min_length=10)]
    precisions: tuple[Precision, ...]
    memory_gib: Positive
    shared_memory: bool
    l2_mib: Annotated[float, Meta(ge=0)]
    multiprocessors: Annotated[int, Meta(ge=0)]
    peaks: dict[Precision, Peak]
    bandwidth_gb_s: Peak
    power_modes: tuple[PowerMode, ...]
    notes: tuple[str, ...] = ()

    @property
    def is_estimate_only(self) -> bool:
        """No supported TensorRT builds for this device."""
        return not self.runtimes

    def __post_init__(self) -> None:
        unknown = set(self.peaks) - set(self.precisions)
        if unknown:
            raise ValueError(f"peaks of {sorted(unknown)} which the list `precisions` does not hold")


def target_names() -> tuple[str, ...]:
    """Return the names of all shipped targets."""
    return tuple(sorted(path.stem for path in data_path("profiles", "targets").glob("*.toml")))


def load_target(name: str) -> Target:
    """Read a shipped target by name, or any target by the path of its TOML file."""
    if name.endswith(".toml"):
        return read_toml(Path(name), Target, what="target")
    if name not in target_names():
        raise UnknownName("target", name, target_names(), hint="A path that ends in .toml names a file of your own.")
    return read_toml(data_path("profiles", "targets", f"{name}.toml"), Target, what="target")
