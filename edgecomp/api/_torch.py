"""The torch model that a bundle was made of, as a runner beside those of graphs and engines."""

from __future__ import annotations

import importlib.metadata
from types import TracebackType
from typing import Any

from edgecomp.bundle import Bundle
from edgecomp.errors import InvalidSpec, MissingDependency
from edgecomp.runners import Array, Runner
from edgecomp.specs.manifest import Bucket, Graph, PlainGraph

__all__ = ["TORCH", "open_torch"]

TORCH = "torch"


class _TorchRunner:
    """A model in eager torch on the CPU: fp32, and on one thread where its bytes shall be the same everywhere.

    Args:
        threads: while it is open; 0: torch's own choice.
    """

    name = TORCH

    def __init__(self, model: Any, graph: Graph, *, threads: int) -> None:
        self.version = f"torch {importlib.metadata.version('torch')}"
        self.input_names = tuple(spec.name for spec in graph.inputs)
        self.output_names = tuple(spec.name for spec in graph.outputs)
        self._model, self._threads = model, threads

    def __enter__(self) -> _TorchRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._model = None

    def infer(self, inputs: dict[str, Array]) -> dict[str, Array]:
        from edgecomp.export.golden import run_module

        outputs = run_module(self._model, [inputs[name] for name in self.input_names], threads=self._threads)
        return dict(zip(self.output_names, outputs, strict=False))


def open_torch(
    bundle: Bundle,
    graph: Graph,
    *,
    weights: str,
    backbone_weights: str,
    then_weights: str = "random",
    threads: int = 1,
    original: bool = False,
) -> Runner:
    """Make the model of a bucket, or the plain model, again.

    Args:
        weights, backbone_weights, then_weights: files, where the bundle's came from files; else `random`.
        threads: of torch; 0: its own choice.
        original: the method as its authors wrote it, with the same weights, in place of its static form.

    Raises:
        MissingDependency: torch is not there. InvalidSpec: other weights than the bundle's, or a router.
    """
    try:
        from edgecomp.export.retrace import reassemble
    except ImportError as error:
        raise MissingDependency(error.name or str(error), needed_for="the runner 'torch'", extra="export") from error
    bucket = graph if isinstance(graph, Bucket) else bundle.manifest.buckets[0]
    made = reassemble(
        bundle.manifest, bucket, weights=weights, backbone_weights=backbone_weights, then_weights=then_weights
    )
    model: Any = made.plain if isinstance(graph, PlainGraph) else made.models[-1]
    if model is None or not isinstance(graph, (Bucket, PlainGraph)):
        raise InvalidSpec(f"the runner 'torch' runs buckets and the plain model, and {graph.model} is neither")
    model = model.reference() if original else model
    return _TorchRunner(model.eval(), graph, threads=threads)
