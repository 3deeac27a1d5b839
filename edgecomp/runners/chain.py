"""A graph that reads a stem's outputs, and the stem, as one model."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from types import TracebackType

from edgecomp.bundle import Bundle
from edgecomp.errors import RunError
from edgecomp.runners import Array, Part, Runner, open_runner
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

    def time_parts(self, inputs: dict[str, Array], *, runs: int = 21) -> tuple[Part, ...]:
        """Return medians in microseconds of stem and rest, and of what either can tell apart."""
        times = []
        for _ in range(runs):
            begin = time.perf_counter_ns()
            given = self.stem.infer({name: inputs[name] for name in self.stem.input_names})
            middle = time.perf_counter_ns()
            behind = {name: {**inputs, **given}[name] for name in self.rest.input_names}
            self.rest.infer(behind)
            times.append((middle - begin, time.perf_counter_ns() - middle))
        found = [
            (name, statistics.median(column) / 1000, f"within the chain, {runs} runs")
            for name, column in zip(("stem", "behind the stem"), zip(*times, strict=True), strict=True)
        ]
        front = {name: inputs[name] for name in self.stem.input_names}
        for word, runner, words in (("stem", self.stem, front), ("behind", self.rest, behind)):
            parts = getattr(runner, "time_parts", None)
            if parts is not None:
                found += [(f"{name} ({word})", us, how) for name, us, how in parts(words)]
        return tuple(found)


def open_graph(
    name: str,
    bundle: Bundle,
    graph: Graph,
    *,
    threads: int,
    takes_turns: bool = False,
    model: Path | None = None,
    cuda_graph: bool = False,
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
        return open_runner(name, path, threads=threads, takes_turns=takes_turns, weights=weights, cuda_graph=cuda_graph)
    stem = open_runner(name, bundle.path / graph.stem, threads=threads, takes_turns=True, cuda_graph=cuda_graph)
    rest = open_runner(name, path, threads=threads, takes_turns=True, weights=weights, cuda_graph=cuda_graph)
    return ChainRunner(stem, rest)


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
