"""Inside a graph: what each layer takes, and what each encoder block takes by graphs that end after it."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from edgecomp.api._measure import Plan
from edgecomp.engines.nodes import cut_after, cut_labels, read_graph
from edgecomp.errors import InvalidSpec
from edgecomp.profiles.interleave import interleave
from edgecomp.profiles.latency import LatencyProfile, Stage
from edgecomp.profiles.result import BlockTime, LayerTime
from edgecomp.profiles.statistics import median_interval
from edgecomp.runners import Array, Runner, open_runner
from edgecomp.runners.layers import Layer, time_layers

__all__ = ["BEHIND", "Part", "ablate_blocks", "layer_times", "with_shares"]

BEHIND = "behind"
_LEAST_ROUNDS = 20
_MOST_ROUNDS = 200


class Part(NamedTuple):
    """A graph, and what it reads.

    Attributes:
        path: the ONNX file.
        name: how results call it.
    """

    path: Path
    name: str
    inputs: Mapping[str, Array]


def layer_times(plan: Plan, part: Part, opened: Callable[[], Runner]) -> tuple[LayerTime, ...]:
    """Return the layers of a graph.

    Args:
        opened: loads its engine; ONNX Runtime gets a session of its own.

    Raises:
        RunError: the runtime's profiler did not say.
    """
    layers: tuple[Layer, ...]
    if plan.runner == "onnxruntime":
        layers = time_layers(part.path, part.inputs, threads=plan.threads)
    else:
        engine: Any = opened()
        with engine:
            layers = engine.time_layers({name: part.inputs[name] for name in engine.input_names}, part.path)
    total = sum(layer.us for layer in layers)
    return tuple(
        LayerTime(
            model=part.name,
            name=layer.name,
            op=layer.op,
            module=layer.module,
            block=layer.block,
            part=layer.part,
            us=layer.us,
            share=layer.us / total if total else 0.0,
        )
        for layer in layers
    )


def with_shares(profile: LatencyProfile, layers: tuple[LayerTime, ...]) -> LatencyProfile:
    """Return the profile with rows for encoder, compressor, selection and merge, of a graph with a compressor.

    A compressor's own modules are the row `compressor` behind or inside a host; without one they are the encoder.
    """
    total = sum(layer.us for layer in layers)
    taken = {part: sum(layer.us for layer in layers if layer.part == part) for part in ("selection", "merge")}
    own = [layer for layer in layers if _stands_in(layer, "compressor")]
    if not total or not (own or any(taken.values())):
        return profile
    has_host = any(_stands_in(layer, "backbone") for layer in layers)
    taken["compressor"] = sum(layer.us for layer in own if not layer.part) if has_host else 0.0
    rows = {"encoder": total - sum(taken.values()), **taken}
    how = "p50 by its share of the layers' sum"
    if not has_host and own:
        how += "; the method has no host"
    more = tuple(Stage(name, profile.p50_us * us / total, how) for name, us in rows.items() if us > 0)
    return msgspec.structs.replace(profile, stages=(*profile.stages, *more))


def _stands_in(layer: LayerTime, part: str) -> bool:
    """Return whether a layer's module is of the exported model's `backbone`, or its `compressor`."""
    return f"{layer.module.removeprefix('model.')}.".startswith(f"{part}.")


def ablate_blocks(plan: Plan, part: Part, *, weights: Path, progress: Callable[[str], None]) -> tuple[BlockTime, ...]:
    """Return what each block takes, by the difference of two graphs that end before and after it.

    The graphs are cut out of the file here, so nothing has to be exported again; their weights are the file's. Two
    neighbours at a time are loaded and timed in turns; a difference is that of one round. A graph that is cut hands
    out what the next block reads, and is not fused across the cut: the sum of all rows is the whole graph, and a
    row differs from what the block takes within it by as much.

    Args:
        weights: folder of the file's external data, or the bundle.

    Raises:
        InvalidSpec: the graph has no blocks.
    """
    graph = read_graph(part.path)
    labels = cut_labels(graph)
    if not labels:
        raise InvalidSpec(
            f"--ablate: {part.name} names no encoder blocks (modules such as `blocks.3`); --per-layer needs none"
        )
    found: list[BlockTime] = []
    with tempfile.TemporaryDirectory(prefix="edgecomp-") as folder:
        ends: list[tuple[str, Path, Path | None]] = []
        for place, label in enumerate(labels):
            path = Path(folder) / f"upto{place}.onnx"
            path.write_bytes(cut_after(graph, label))
            ends.append((label, path, weights))
        ends.append((BEHIND, part.path, None))
        for place, (label, _, _) in enumerate(ends):
            progress(f"timing {part.name}, {label}")
            with ExitStack() as stack:
                runs = {}
                for name, path, where in ends[max(place - 1, 0) : place + 1]:
                    runner = open_runner(plan.runner, path, threads=plan.threads, takes_turns=True, weights=where)
                    runs[name] = _run_of(stack.enter_context(runner), part.inputs)
                found.append(_difference(part.name, label, runs, rounds=max(_LEAST_ROUNDS, plan.runs)))
    return tuple(found)


def _run_of(runner: Runner, inputs: Mapping[str, Array]) -> Callable[[], object]:
    given = {name: inputs[name] for name in runner.input_names}
    return lambda: runner.infer(given)


def _difference(model: str, label: str, runs: dict[str, Callable[[], object]], *, rounds: int) -> BlockTime:
    """Time a graph and the one that ends a block earlier, in turns; the first has none before it."""
    times = interleave(runs, rounds=min(rounds, _MOST_ROUNDS), settle_s=0.0).samples_us
    earlier, *rest = times.values()
    own = rest[0] if rest else earlier
    differences = [b - a for a, b in zip(earlier, own, strict=True)] if rest else list(own)
    middle = median_interval(differences)
    return BlockTime(
        model=model,
        block=label,
        us=middle.value,
        low_us=middle.low,
        high_us=middle.high,
        total_us=statistics.median(own),
    )
