"""What a method costs by itself: the share of a graph's time that its own nodes take, by ONNX Runtime's profiler.

A node is the method's own if it came from the compressor's module, or if it serves the choice or the merge of tokens
(`edgecomp.export.roles`). A fused node is whose it is named after. Nodes that ONNX Runtime made itself (reorderings,
fused norms) are counted to the encoder, so that the share is rather a lower bound. The profiler slows small nodes down
more than large ones, in both parts.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from edgecomp.errors import MissingDependency, RunError
from edgecomp.runners import Array

__all__ = ["own_share"]

_RUNS = 15
_WARM_RUNS = 3
_SUFFIX = "_kernel_time"
_COMPRESSOR = "compressor"


def own_share(model: Path, inputs: Mapping[str, Array], *, threads: int) -> float:
    """Return the share, 0 to 1, of the node times of a graph that the method's own nodes take.

    Args:
        model: a bundle's graph that is whole (it has no stem), its weights beside it.
        inputs: by name.
        threads: for the CPU; 0: the runtime's choice.

    Raises:
        RunError: the graph cannot be read or run.
    """
    try:
        import onnxruntime
        from onnx import inliner, load
    except ImportError as error:
        raise MissingDependency(error.name or "onnx", needed_for="the overhead of a method", extra="cpu") from error
    from edgecomp.export.costs import count_costs

    own = {
        value
        for op in count_costs(model).ops
        if op.role != "model" or op.module.partition(".")[0] == _COMPRESSOR
        for value in op.writes
    }
    flat: Any = inliner.inline_local_functions(load(str(model), load_external_data=False))
    names = {}
    for place, node in enumerate(flat.graph.node):  # fused nodes keep the name in front of a slash
        node.name = f"n{place}"
        names[node.name] = next((name for name in node.output if name), "")
    with tempfile.TemporaryDirectory(prefix="edgecomp-") as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(model.parent))
        try:
            session = onnxruntime.InferenceSession(
                flat.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            for _ in range(_WARM_RUNS + _RUNS):
                session.run(None, dict(inputs))
            events = msgspec.json.decode(Path(session.end_profiling()).read_bytes())
        except Exception as error:  # noqa: BLE001 - ONNX Runtime's errors share no public base class
            first = str(error).strip().splitlines()[0]
            raise RunError(f"ONNX Runtime cannot profile {model}: {first}; `edgecomp run` shows more") from None
    return share_of(events, names, own)


def share_of(events: list[dict[str, Any]], names: Mapping[str, str], own: set[str]) -> float:
    """Return the share of own nodes in a profile.

    Args:
        events: as the profiler writes them.
        names: the output of each node of the graph, by the node's name.
        own: outputs of the method's own nodes.
    """
    times: dict[str, list[float]] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith(_SUFFIX):
            times.setdefault(name.removesuffix(_SUFFIX), []).append(float(event["dur"]))
    medians = {name: statistics.median(values[_WARM_RUNS:] or values) for name, values in times.items()}
    total = sum(medians.values())
    mine = sum(us for name, us in medians.items() if names.get(name.partition("/")[0], "") in own)
    return mine / total if total else 0.0
