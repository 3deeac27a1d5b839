"""Runners: named arrays in, named arrays out, whatever runs the model."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgecomp.errors import UnknownName

__all__ = ["Array", "Runner", "open_runner", "runner_names"]

Array = npt.NDArray[np.generic]


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
    """Return the runners that there are."""
    return ("onnxruntime", "onnxruntime-cuda")


def open_runner(name: str, model: Path, *, threads: int, takes_turns: bool = False) -> Runner:
    """Load an ONNX model.

    Args:
        name: `onnxruntime` (CPU) or `onnxruntime-cuda`; a provider that does not come up is an error.
        threads: for the CPU; 0: as many as the runtime chooses.
        takes_turns: several models are open and run in turn, so that none may hold on to cores between its runs.

    Raises:
        UnknownName: no such runner. MissingDependency: its package is not installed.
    """
    from edgecomp.runners.onnxruntime import OnnxRuntimeRunner

    providers = {"onnxruntime": "CPUExecutionProvider", "onnxruntime-cuda": "CUDAExecutionProvider"}
    if name not in providers:
        raise UnknownName("runner", name, runner_names())
    return OnnxRuntimeRunner(model, name=name, provider=providers[name], threads=threads, takes_turns=takes_turns)
