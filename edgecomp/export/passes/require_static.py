"""Refuses a graph in which any dimension is not a positive integer."""

from __future__ import annotations

import onnx_ir as ir

from edgecomp.errors import DynamicShape

__all__ = ["require_static"]


def require_static(model: ir.Model) -> None:
    """Check that each value has a shape of positive integers.

    Raises:
        DynamicShape: it names the value, its shape, and the node that makes it.
    """
    for value in model.graph.inputs:
        _require(value, "graph input")
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for value in node.outputs:
            _require(value, f"{node.op_type} node {node.name!r}")


def _require(value: ir.Value, where: str) -> None:
    shape = value.shape
    if shape is None or any(not isinstance(size, int) or size < 1 for size in shape):
        seen = "unknown" if shape is None else str([str(size) for size in shape])
        raise DynamicShape(
            f"{where}: the shape of {value.name!r} is {seen}; every dimension must be a positive integer. "
            "Take sizes from the budget, not from data"
        )
