"""Whether a graph fits into a target's memory."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edgecomp.estimates.roofline import Estimate
from edgecomp.specs.costs import Whole
from edgecomp.specs.target import Target

__all__ = ["MemoryVerdict", "judge_bytes", "judge_memory"]

_GIB = 1 << 30
_RUNTIME_GIB = 0.5  # the CUDA context and TensorRT's own libraries and kernels
_SYSTEM_GIB = 2.0  # of a board whose memory the CPU shares: operating system, desktop, camera
_TIGHT = 0.7


class MemoryVerdict(msgspec.Struct, frozen=True):
    """Peak memory against what a target has.

    Attributes:
        needed_bytes: weights, the activations that live at once where most do, and the runtime.
        available_bytes: the target's memory, less what a board's system takes.
        verdict: `fits` up to 70 % of what is available, `tight` up to all of it, else `does not fit`.
        assumed: what was taken for granted, in a sentence.
    """

    verdict: Literal["fits", "tight", "does not fit"]
    weight_bytes: Whole
    activation_bytes: Whole
    runtime_bytes: Whole
    needed_bytes: Whole
    available_bytes: Annotated[int, Meta(ge=-(1 << 62), le=1 << 62)]
    total_bytes: Whole
    assumed: str


def judge_memory(estimate: Estimate, target: Target) -> MemoryVerdict:
    """Judge an estimate's memory."""
    return judge_bytes(target, weight_bytes=estimate.weight_bytes, activation_bytes=estimate.activation_bytes)


def judge_bytes(target: Target, *, weight_bytes: int, activation_bytes: int) -> MemoryVerdict:
    """Judge weights, and what lives beside them: activations, or the KV cache of a language model."""
    runtime = int(_RUNTIME_GIB * _GIB)
    total = int(target.memory_gib * _GIB)
    available = total - (int(_SYSTEM_GIB * _GIB) if target.shared_memory else 0)
    needed = weight_bytes + activation_bytes + runtime
    shared = f"; {_SYSTEM_GIB:g} GiB for the system that shares the memory" if target.shared_memory else ""
    return MemoryVerdict(
        verdict="fits" if needed <= _TIGHT * available else "tight" if needed <= available else "does not fit",
        weight_bytes=weight_bytes,
        activation_bytes=activation_bytes,
        runtime_bytes=runtime,
        needed_bytes=needed,
        available_bytes=available,
        total_bytes=total,
        assumed=f"assumed: {_RUNTIME_GIB:g} GiB for CUDA and the runtime{shared}; workspaces are not counted",
    )
