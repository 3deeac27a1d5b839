"""Is there memory for a build? Asked on boards whose CPU and GPU share it: the kernel ends what takes it all."""

from __future__ import annotations

import re
from pathlib import Path

from edgecomp.engines.settings import BuilderSettings
from edgecomp.errors import BuildError
from edgecomp.specs.target import Target

__all__ = ["available_mib", "needed_mib", "require_memory"]

_MEMINFO = Path("/proc/meminfo")
_AVAILABLE = re.compile(rb"^MemAvailable:\s+(\d+) kB$", re.MULTILINE)
_COPIES = 3  # of the weights: parsed, converted, and in the plan
_BUILDER_MIB = 1024  # libraries, CUDA context, kernels and what the optimiser holds
_WORKSPACE_MIB = 1024  # where no limit is set, what a layer may try
_MIB = 1 << 20


def needed_mib(weight_bytes: int, settings: BuilderSettings) -> int:
    """Return an estimate of the memory that a build takes at its peak. It is coarse: no board was measured."""
    return _COPIES * -(-weight_bytes // _MIB) + _BUILDER_MIB + (settings.workspace_mib or _WORKSPACE_MIB)


def available_mib(meminfo: Path = _MEMINFO) -> int | None:
    """Return the memory that programs can still get, by the kernel's own estimate; `None`: this system does not say."""
    try:
        found = _AVAILABLE.search(meminfo.read_bytes())
    except OSError:
        return None
    return int(found.group(1)) // 1024 if found else None


def require_memory(
    onnx: Path, weight_bytes: int, target: Target, settings: BuilderSettings, *, local_sm: int | None
) -> None:
    """Raise where a build on this board is likely to run out of memory.

    Args:
        onnx: the graph, for the message.
        weight_bytes: of the graph and its external data.
        target: the board; asked where it shares its memory and this machine is one.
        settings: of the builder.
        local_sm: compute capability of the GPU here.
    """
    if not target.shared_memory or local_sm != target.sm:
        return
    available, needed = available_mib(), needed_mib(weight_bytes, settings)
    if available is None or available >= needed:
        return
    raise BuildError(
        f"{onnx.name}: building it takes about {needed} MiB (an estimate: {_COPIES} x {-(-weight_bytes // _MIB)} of "
        f"weights, {_BUILDER_MIB} of the builder, {settings.workspace_mib or _WORKSPACE_MIB} of workspace), and "
        f"{available} MiB are available on this {target.name}, whose CPU and GPU share memory. Close other programs, "
        f"add swap, or give --low-memory or a smaller --workspace; --force-memory builds all the same"
    )
