"""What a method costs by itself, and what is left of attention: shares of a graph's time, by ONNX Runtime's profiler.

A node is attention if it serves the encoder and is a softmax, or a product of two computed matrices: the part that
grows with the square of the tokens. A node is the method's own if it came from the compressor's module, or if it serves
the choice or the merge of tokens (`edgecomp.export.roles`). A fused node is whose it is named after. Nodes that ONNX
Runtime made itself (reorderings, fused norms) are counted to the encoder, so that the method's share is rather a lower
bound. The profiler slows small nodes down more than large ones, in all parts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from edgecomp.errors import MissingDependency
from edgecomp.runners import Array
from edgecomp.runners.layers import Layer, time_layers

__all__ = ["NodeShares", "node_shares"]

_COMPRESSOR = "compressor"


class NodeShares(NamedTuple):
    """Shares of the node times of a graph, 0 to 1: of the method's own nodes, and of attention in the encoder."""

    own: float
    attention: float


def node_shares(model: Path, inputs: Mapping[str, Array], *, threads: int) -> NodeShares:
    """Return the shares of the node times of a graph that the method's own nodes take, and that attention takes.

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
    own: set[str] = set()
    attention: set[str] = set()
    for op in count_costs(model).ops:
        if op.role != "model" or op.module.partition(".")[0] == _COMPRESSOR:
            own.update(op.writes)
        elif op.kind in ("softmax", "attention") or (op.kind == "matmul" and not op.of_weights):
            attention.update(op.writes)
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
    return NodeShares(share_of(layers, names, own), share_of(layers, names, attention))


def share_of(layers: Sequence[Layer], names: Mapping[str, str], chosen: Collection[str]) -> float:
    """Return the share of some nodes.

    Args:
        layers: as they ran; one that was fused bears the name of a node in front of a slash.
        names: the output of each node of the graph, by the node's name.
        chosen: outputs of those nodes.
    """
    total = sum(layer.us for layer in layers)
    taken = sum(layer.us for layer in layers if names.get(layer.name.partition("/")[0], "") in chosen)
    return taken / total if total else 0.0
