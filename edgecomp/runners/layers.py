"""What each layer of a graph takes, by the runtime's own profiler, with the torch module and the block of each.

A runtime rewrites the graph and names what it makes of it after the nodes that went in, as far as it does. A layer
whose origin no name tells has no module; its block is that of the results it reads.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from edgecomp.engines.nodes import GraphNode, place_nodes, read_graph
from edgecomp.errors import InvalidSpec, MissingDependency, RunError
from edgecomp.runners import Array

__all__ = ["Layer", "layers_of_engine", "parse_profile", "part_of", "require_profiler", "time_layers"]

_WARM_RUNS = 3
_SUFFIX = "_kernel_time"
_TOKEN = re.compile(r"_token_\d+$")  # what ONNX Runtime puts behind a name that it has given before
_INLINED = re.compile(r"^_inlfunc_(?P<function>[A-Za-z0-9]+)_")
_CHOOSING = frozenset({
    "TopK", "ArgMax", "ArgMin", "Gather", "GatherElements", "GatherND", "Scatter", "ScatterElements", "ScatterND",
    "CumSum", "OneHot", "NonZero",
})  # fmt: skip


class Layer(NamedTuple):
    """A layer as it ran.

    Attributes:
        name, op: as the runtime calls it.
        module: the torch module it came from; "" where nothing tells.
        block: the encoder block; "" outside of blocks, or where nothing tells.
        part: `merge` (of a function of edgecomp's), `selection` (it picks or places rows by index), else "".
        us: median microseconds of a run.
    """

    name: str
    op: str
    module: str
    block: str
    part: str
    us: float


def part_of(op: str, *, is_function: bool) -> str:
    """Return `merge`, `selection` or ""; see `Layer`."""
    return "merge" if is_function else "selection" if op in _CHOOSING else ""


def time_layers(
    model: Path, inputs: Mapping[str, Array], *, threads: int, runs: int = 20, weights: Path | None = None
) -> tuple[Layer, ...]:
    """Run a graph under ONNX Runtime's profiler, on the CPU, in a session of its own.

    The graph that it made of the file, with its weights, is written to a temporary folder to see what came of which
    node; it is read and removed before the first run.

    Raises:
        MissingDependency: onnxruntime is not there. RunError: the graph cannot be run, or the profile not be read.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependency("onnxruntime", needed_for="the time of each layer", extra="ort") from error
    source = read_graph(model)
    with tempfile.TemporaryDirectory(prefix="edgecomp-") as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.x64quantprecision", "1")
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        optimised = Path(folder) / "optimised.onnx"
        options.optimized_model_filepath = str(optimised)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimised.data")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        if weights is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
        try:
            session = onnxruntime.InferenceSession(
                str(model) if weights is None else model.read_bytes(), options, providers=["CPUExecutionProvider"]
            )
            rewritten = read_graph(optimised).nodes
            optimised.with_suffix(".data").unlink(missing_ok=True)
            given = {item.name: inputs[item.name] for item in session.get_inputs()}
            for _ in range(_WARM_RUNS + runs):
                session.run(None, given)
            written = Path(session.end_profiling())
        except Exception as error:  # noqa: BLE001 - ONNX Runtime's errors share no public base class
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RunError(
                f"the layers of {model.name} cannot be timed: {first}; measure without --per-layer"
            ) from None
        return parse_profile(written.read_text(encoding="utf-8"), source.nodes, rewritten, model=model.name)


def parse_profile(
    text: str, source: Sequence[GraphNode], rewritten: Sequence[GraphNode], *, model: str, warm: int = _WARM_RUNS
) -> tuple[Layer, ...]:
    """Return the layers of ONNX Runtime's profile.

    Args:
        text: its JSON.
        source: nodes of the file.
        rewritten: of the graph that it made of the file, in the order in which they ran.
        model: for messages.
        warm: runs at the beginning that do not count.

    Raises:
        RunError: it is no such profile, or holds fewer runs.
    """
    try:
        events = [event for event in json.loads(text) if event.get("cat") == "Node"]
        taken: dict[tuple[str, str, str], list[float]] = defaultdict(list)
        for event in events:
            if str(event["name"]).endswith(_SUFFIX):
                words = event["args"]
                key = str(event["name"]).removesuffix(_SUFFIX), str(words["op_name"]), str(words.get("node_index", ""))
                taken[key].append(float(event["dur"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RunError(f"ONNX Runtime's profile of {model} is truncated or not as it was; report its version") from None
    counts = [len(times) for times in taken.values()]
    if not counts or min(counts) <= warm:
        raise RunError(
            f"ONNX Runtime's profile of {model} holds {min(counts, default=0)} runs; give it more than {warm}"
        )
    known = _origins([(name, op) for name, op, _ in taken], source, rewritten)
    return tuple(
        Layer(name, op, *where, us=statistics.median(times[warm:]))
        for ((name, op, _), times), where in zip(taken.items(), known, strict=True)
    )


def layers_of_engine(times: Mapping[str, Sequence[float]], information: str, model: Path) -> tuple[Layer, ...]:
    """Return the layers of an engine.

    Args:
        times: microseconds of each run by the engine's names for its layers.
        information: the JSON of the engine's inspector, which names the nodes that went into a layer.
        model: the ONNX file.
    """
    from edgecomp.engines.inspector import engine_layers

    nodes = read_graph(model).nodes
    blocks = dict(zip((node.name for node in nodes), place_nodes(nodes), strict=True))
    by_name = {node.name: node for node in nodes}
    origins = {name: (kind, names) for name, kind, names in engine_layers(information)}
    found = []
    for name, taken in times.items():
        kind, names = origins.get(name, ("", frozenset()))
        known = [by_name[one] for one in sorted(names) if one in by_name]
        places = {blocks[node.name] for node in known}
        modules = sorted({node.module for node in known if node.module})
        is_function = any(node.domain not in ("", "ai.onnx") for node in known)
        choosing = next((node.op for node in known if node.op in _CHOOSING), "") if len(known) == 1 else ""
        found.append(
            Layer(
                name,
                kind or (known[0].op if len(known) == 1 else ""),
                modules[0] if len(modules) == 1 else "",
                places.pop() if len(places) == 1 else "",
                part_of(choosing, is_function=is_function and len(known) == 1),
                us=statistics.median(taken),
            )
        )
    return tuple(found)


def _origins(
    layers: Sequence[tuple[str, str]], source: Sequence[GraphNode], rewritten: Sequence[GraphNode]
) -> list[tuple[str, str, str]]:
    """Return module, block and part of each layer, given by its name and op."""
    by_name = {node.name: node for node in source if node.name}
    by_output = {name: node for node in source for name in node.outputs}

    def origin(name: str, outputs: Sequence[str]) -> GraphNode | None:
        told = _TOKEN.sub("", name).split("/")[0]
        made = (*outputs, told.removesuffix("_nchwc"))  # a convolution in blocks of channels has its output's name
        return by_name.get(told) or next((by_output[one] for one in made if one in by_output), None)

    aligned = [op for _, op in layers] == [node.op for node in rewritten]
    if not aligned:  # nothing but names to go by
        blocks = dict(zip((node.name for node in source), place_nodes(source), strict=True))
        found = []
        for name, op in layers:
            node = origin(name, ())
            is_function = node is not None and node.domain == "edgecomp"
            where = (node.module, blocks[node.name]) if node is not None else ("", "")
            found.append((*where, part_of(op, is_function=is_function)))
        return found
    known: list[GraphNode] = []
    parts: list[str] = []
    for (name, op), node in zip(layers, rewritten, strict=True):
        maker = origin(node.name or name, node.outputs)
        is_function = any(map(_INLINED.match, node.outputs)) or (maker is not None and maker.domain == "edgecomp")
        known.append(node._replace(module=maker.module if maker is not None else ""))
        parts.append(part_of(op, is_function=is_function))
    return [(node.module, block, part) for node, block, part in zip(known, place_nodes(known), parts, strict=True)]


def require_profiler(runner: str) -> None:
    """Refuse a runner whose profiler does not say what layers take.

    Raises:
        InvalidSpec: naming it.
    """
    if runner not in ("onnxruntime", "tensorrt", "rtx"):
        why = (
            "ONNX Runtime's profiler sees launches there, not what the GPU takes"
            if runner == "onnxruntime-cuda"
            else "eager torch has no layers of a graph"
        )
        raise InvalidSpec(f"--per-layer with runner {runner}: {why}; use onnxruntime, tensorrt or rtx")
