"""Finds the nodes that compute what a graph chooses by."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir

__all__ = ["is_weight_product", "score_flow"]

_HEAD = 16  # columns; a product with a weight of so few gives scores, not tokens
_SOFT = frozenset({"Softmax", "LogSoftmax"})
_MIXED = frozenset({"Add", "Mul", "MatMul", "Einsum"})


def score_flow(roots: Sequence[ir.Value], *, sources: Collection[str], products: Collection[str]) -> set[ir.Node]:
    """Return the nodes between what begins a score and the values that are chosen by.

    Walking back from the choice, the flow ends at products with weights, which make features, and at softmax. Of what
    was passed, scores begin at sums and norms (`sources`), at a product of two activations (a similarity), and at a
    product with a weight of at most 16 columns (a head that gives scores). A sum or product of which one side alone
    is a score makes tokens again, weighted ones: the residual stream is none of the flow.

    Args:
        roots: values that are chosen by.
        sources: ops that begin a score.
        products: ops of matrix products.
    """
    passed: dict[ir.Node, None] = {}
    waiting = [node for value in roots if (node := value.producer()) is not None]
    while waiting:
        node = waiting.pop()
        if node in passed or (is_weight_product(node, products) and not _is_head(node)):
            continue
        passed[node] = None
        if node.op_type not in _SOFT and not _is_head(node):
            waiting += [maker for value in node.inputs if value is not None and (maker := value.producer()) is not None]
    graph = next(iter(passed)).graph if passed else None
    kept: set[ir.Node] = set()
    for node in graph or ():
        if node not in passed:
            continue
        sides = [value.producer() in kept for value in node.inputs if value is not None and _is_activation(value)]
        begins = node.op_type in sources or (node.op_type in products and (_is_head(node) or not any(sides)))
        if begins or (any(sides) and (all(sides) or node.op_type not in _MIXED)):
            kept.add(node)
    return kept


def is_weight_product(node: ir.Node, products: Collection[str]) -> bool:
    """Return whether a node multiplies activations with a constant matrix."""
    return node.op_type in products and any(_is_weight(value) for value in node.inputs)


def _is_weight(value: ir.Value | None) -> bool:
    """Return whether a value is a constant, or one that is stored quantised."""
    maker = value.producer() if value is not None else None
    if maker is not None and maker.op_type == "DequantizeLinear":
        value = maker.inputs[0]
    return value is not None and value.const_value is not None


def _is_head(node: ir.Node) -> bool:
    if node.op_type not in ("MatMul", "Gemm") or node.inputs[1] is None or node.inputs[1].const_value is None:
        return False
    shape = node.outputs[0].shape
    last = shape[-1] if shape is not None and len(shape) else None
    return isinstance(last, int) and last <= _HEAD


def _is_activation(value: ir.Value) -> bool:
    return value.const_value is None and value.dtype == ir.DataType.FLOAT
