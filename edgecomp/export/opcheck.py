"""Holds every node of a graph to the op allow-lists."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx_ir as ir

from edgecomp.errors import OpNotAllowed
from edgecomp.export.modules import module_of
from edgecomp.specs import OpList

__all__ = ["require_allowed", "violations"]


def require_allowed(model: ir.Model, lists: Iterable[OpList], *, extra: Mapping[str, str] | None = None) -> None:
    """Check each node against each list.

    Args:
        extra: ops allowed beyond the lists, with the reason (a recipe's `extra_ops`).

    Raises:
        OpNotAllowed: it names the first node that is refused, and how many more there are.
    """
    found = violations(model, lists, extra=extra)
    if found:
        more = f" ({len(found) - 1} more)" if len(found) > 1 else ""
        raise OpNotAllowed(f"{found[0]}{more}")


def violations(model: ir.Model, lists: Iterable[OpList], *, extra: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Return one text for each node that a list refuses: node, op, list, reason and the way out."""
    lists = tuple(lists)
    found = []
    opset = model.opset_imports.get("", 0)
    for oplist in lists:
        low, high = oplist.opset
        if not low <= opset <= high:
            found.append(
                f"opset {opset} is outside {low} to {high}, which {oplist.name} takes; export with --opset {high}"
            )
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type in (extra or {}):
            continue
        where = f"{node.op_type} node {node.name!r}" + (f" of {module_of(node)}" if module_of(node) else "")
        for oplist in lists:
            if refusal := _refusal(node, oplist):
                found.append(f"{where} is refused by {oplist.name} ({oplist.versions}): {refusal}")
                break
    return tuple(found)


def _refusal(node: ir.Node, oplist: OpList) -> str:
    """Return why a list refuses a node and the way out, or "" when it takes it."""
    if node.domain not in ("", "ai.onnx"):
        return f"domain {node.domain!r} is not ONNX's own; give the op a function body or a plugin"
    if node.op_type in oplist.refused:
        refused = oplist.refused[node.op_type]
        return f"{refused.reason}; {refused.remedy}"
    rule = oplist.ops.get(node.op_type)
    if rule is None:
        return "the op is not on the list; rewrite it with ops that are, or name it under extra_ops with a reason"
    broken = next(rule.broken(_Facts(node)), None)
    if broken is None:
        return ""
    return "; ".join(part for part in (broken.text, rule.reason, rule.remedy) if part)


class _Facts:
    """What the conditions of an op ask of a node. Known is what is a constant: exports are folded before the check."""

    def __init__(self, node: ir.Node) -> None:
        self._node = node

    def attribute_text(self, name: str) -> str | None:
        attribute = self._node.attributes.get(name)
        return None if attribute is None else _as_text(attribute.value)

    def input_name(self, position: int) -> str:
        value = self._input(position)
        return "" if value is None else value.name or "without a name"

    def is_known(self, position: int) -> bool:
        return self._constant(position) is not None

    def largest(self, position: int) -> int | None:
        tensor = self._constant(position)
        return None if tensor is None else int(tensor.numpy().max())

    def first_rank(self) -> int | None:
        first = self._input(0)
        return None if first is None or first.shape is None else len(first.shape)

    def first_type(self) -> str:
        first = self._input(0)
        return "" if first is None or first.dtype is None else _type_name(first.dtype)

    def _input(self, position: int) -> ir.Value | None:
        return self._node.inputs[position] if position < len(self._node.inputs) else None

    def _constant(self, position: int) -> ir.TensorProtocol | None:
        value = self._input(position)
        return None if value is None else ir.convenience.get_const_tensor(value)


def _as_text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _type_name(dtype: ir.DataType) -> str:
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(dtype.name, dtype.name.lower())
