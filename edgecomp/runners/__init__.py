"""Runners: named arrays in, named arrays out, whatever runs the model."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgecomp.errors import InvalidSpec, UnknownName

__all__ = ["Array", "Part", "Runner", "open_runner", "require_sharing", "require_threads", "runner_names"]

Array = npt.NDArray[np.generic]
Part = tuple[str, float, str]
"""A part of one run: its name, its median in microseconds, and how it was told apart."""

_PROVIDERS = {"onnxruntime": "CPUExecutionProvider", "onnxruntime-cuda": "CUDAExecutionProvider"}
_ENGINES = ("tensorrt", "rtx")


class Runner(Protocol):
    """A loaded model; a context manager that frees it."""

    name: str
    version: str

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in the graph's order."""
        ...

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in the graph's order."""
        ...

    def __enter__(self) -> Runner:
        """Return itself."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Free the model."""
        ...

    def infer(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Run the model once."""
        ...


def runner_names() -> tuple[str, ...]:
    """Return the runners of graphs and engines that there are."""
    return (*_PROVIDERS, *_ENGINES)


def require_threads(threads: int) -> None:
    """Refuse what is no number of threads, and one that would only bring this machine down."""
    most = max(64, 2 * (os.cpu_count() or 1))
    if not isinstance(threads, int) or isinstance(threads, bool) or not 0 <= threads <= most:
        raise InvalidSpec(f"threads={threads!r} is not between 0 (the runtime's choice) and {most} on this machine")


def require_sharing(runner: str, *, share_weights: bool) -> None:
    """Refuse to share weights where the runner copies them for each model."""
    if share_weights and runner != "onnxruntime":
        raise InvalidSpec(
            f"share_weights with runner {runner}: it copies the weights of each model to the GPU; bound the models in "
            "memory with resident, or use the runner onnxruntime"
        )


def open_runner(
    name: str,
    model: Path,
    *,
    threads: int,
    takes_turns: bool = False,
    share_weights: bool = False,
    weights: Path | None = None,
    cuda_graph: bool = False,
) -> Runner:
    """Load an ONNX model, or the engine that was built from it.

    Args:
        name: `onnxruntime` (CPU) or `onnxruntime-cuda`; a provider that does not come up is an error. `tensorrt` or
            `rtx`: the engine in `engines/<target>/` beside the model that this TensorRT and this GPU can run.
        threads: for the CPU; 0: as many as the runtime chooses.
        takes_turns: several models are open and run in turn, so that none may hold on to cores between its runs.
        share_weights: read the weights where the system maps their file, once for all models that are open, instead of
            in a copy that is packed for speed; on the CPU alone.
        weights: folder of the external data; none: it lies beside the model.
        cuda_graph: record an engine's execution once, and launch the record; for engines alone.

    Raises:
        UnknownName: no such runner. MissingDependency: its package is not installed. InvalidSpec: it cannot share.
        RunError, TargetMismatch: there is no GPU, or no engine that runs here.
    """
    if name not in runner_names():
        raise UnknownName("runner", name, runner_names())
    require_sharing(name, share_weights=share_weights)
    if name in _ENGINES:
        if threads:
            raise InvalidSpec(f"threads={threads} with runner {name}: an engine runs on the GPU; leave them out")
        from edgecomp.runners.tensorrt import TensorRTRunner

        return TensorRTRunner(model, name=name, weights=weights, cuda_graph=cuda_graph)
    if cuda_graph:
        raise InvalidSpec(f"a CUDA graph with runner {name}: it records engines of TensorRT alone; leave it out")
    from edgecomp.runners.onnxruntime import OnnxRuntimeRunner

    return OnnxRuntimeRunner(
        model,
        name=name,
        provider=_PROVIDERS[name],
        threads=threads,
        takes_turns=takes_turns,
        share_weights=share_weights,
        weights=weights,
    )
