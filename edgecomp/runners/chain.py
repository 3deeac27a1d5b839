"""A graph that reads a stem's outputs, and the stem, as one model."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from edgecomp.bundle import Bundle
from edgecomp.errors import RunError
from edgecomp.runners import Array, Runner, open_runner
from edgecomp.specs.manifest import Graph

__all__ = ["ChainRunner", "open_graph", "require_kernels"]


class ChainRunner:
    """A stem and what reads its outputs.

    Args:
        stem: takes the first input.
        rest: takes what it asks for by name, of the stem's outputs and of the other inputs.
    """

    def __init__(self, stem: Runner, rest: Runner) -> None:
        self.stem, self.rest = stem, rest
        self.name, self.version = rest.name, rest.version
        self.input_names = tuple(dict.fromkeys((*stem.input_names, *self._own)))

    @property
    def _own(self) -> tuple[str, ...]:
        return tuple(name for name in self.rest.input_names if name not in self.stem.output_names)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in the graph's order."""
        return self.rest.output_names

    def __enter__(self) -> ChainRunner:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Free both."""
        self.stem.__exit__(kind, error, trace)
        self.rest.__exit__(kind, error, trace)

    def infer(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Run both, one after the other."""
        seen = {**inputs, **self.stem.infer({name: inputs[name] for name in self.stem.input_names})}
        return self.rest.infer({name: seen[name] for name in self.rest.input_names})


def open_graph(
    name: str, bundle: Bundle, graph: Graph, *, threads: int, takes_turns: bool = False, model: Path | None = None
) -> Runner:
    """Load a graph of a bundle, with its stem where it has one; see `open_runner`. Stem and rest always take turns.

    Args:
        model: another form of the graph, which may take and give more; its weights are the bundle's.

    Raises:
        RunError: the runner has no kernels for the bundle's precision, or cannot load a graph.
    """
    require_kernels(bundle, name)
    path, weights = (bundle.path / graph.model, None) if model is None else (model, bundle.path)
    if not graph.stem:
        return open_runner(name, path, threads=threads, takes_turns=takes_turns, weights=weights)
    stem = open_runner(name, bundle.path / graph.stem, threads=threads, takes_turns=True)
    return ChainRunner(stem, open_runner(name, path, threads=threads, takes_turns=True, weights=weights))


def require_kernels(bundle: Bundle, runner: str) -> None:
    """Refuse a bundle that a runner cannot run before it finds out, by the name of some node.

    Raises:
        RunError: ONNX Runtime has no kernels on the CPU for the type that the bundle computes in.
    """
    if runner == "onnxruntime" and (word := bundle.manifest.unknown_to_cpu):
        raise RunError(
            f"ONNX Runtime on the CPU has no kernels for {word}, which {bundle.path} computes in; `edgecomp parity` "
            "checks it by twins in fp32, `edgecomp build` makes an engine, and --precision fp16 runs here"
        )
