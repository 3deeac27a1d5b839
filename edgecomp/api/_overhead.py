"""What a method costs by itself: the share of a graph's time that its own nodes take, by ONNX Runtime's profiler.

A node is the method's own if it came from the compressor's module, or if it serves the choice or the merge of tokens
(`edgecomp.export.roles`). A fused node is whose it is named after. Nodes that ONNX Runtime made itself (reorderings,
fused norms) are counted to the encoder, so that the share is rather a lower bound. The profiler slows small nodes down
more than large ones, in both parts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgecomp.errors import MissingDependency
from edgecomp.runners import Array
from edgecomp.runners.layers import Layer, time_layers

__all__ = ["own_share"]

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
        from onnx import inliner, load

        from edgecomp.export.costs import count_costs
    except ImportError as error:
        raise MissingDependency(error.name or "onnx", needed_for="the overhead of a method", extra="cpu") from error
    own = {
        value
        for op in count_costs(model).ops
        if op.role != "model" or op.module.partition(".")[0] == _COMPRESSOR
        for value in op.writes
    }
    # without functions, whose nodes have no names of their own
    flat: Any = inliner.inline_local_functions(load(str(model), load_external_data=False))
    names = {}
    for place, node in enumerate(flat.graph.node):
        node.name = f"n{place}"
        names[node.name] = next((name for name in node.output if name), "")
    with tempfile.TemporaryDirectory(prefix="edgecomp-") as folder:
        path = Path(folder) / model.name
        path.write_bytes(flat.SerializeToString())
        layers = time_layers(path, inputs, threads=threads, weights=model.parent)
    return share_of(layers, names, own)


def share_of(layers: Sequence[Layer], names: Mapping[str, str], own: Collection[str]) -> float:
    """Return the share of own nodes.

    Args:
        layers: as they ran; one that was fused bears the name of a node in front of a slash.
        names: the output of each node of the graph, by the node's name.
        own: outputs of the method's own nodes.
    """
    total = sum(layer.us for layer in layers)
    mine = sum(layer.us for layer in layers if names.get(layer.name.partition("/")[0], "") in own)
    return mine / total if total else 0.0
