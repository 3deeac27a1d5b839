"""Holds every node of a graph to the op allow-lists."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx_ir as ir

from edgecomp.errors import OpNotAllowed
from edgecomp.export.passes.strip_metadata import module_of
from edgecomp.specs import OpList, OpRule

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
    broken = _broken_condition(node, rule)
    if not broken:
        return ""
    return "; ".join(part for part in (broken, rule.reason, rule.remedy) if part)


def _broken_condition(node: ir.Node, rule: OpRule) -> str:
    for name, values in rule.attributes.items():
        attribute = node.attributes.get(name)
        if attribute is not None and (text := _as_text(attribute.value)) not in values:
            return f"attribute {name}={text!r} " + (f"is not among {', '.join(values)}" if values else "must be absent")
    for position in rule.constant_inputs:
        value = node.inputs[position] if position < len(node.inputs) else None
        if value is not None and ir.convenience.get_const_tensor(value) is None:
            return f"input {position} ({value.name!r}) is not a constant"
    for place, largest in rule.largest_constant.items():
        value = node.inputs[int(place)] if int(place) < len(node.inputs) else None
        tensor = ir.convenience.get_const_tensor(value) if value is not None else None
        if tensor is not None and (top := int(tensor.numpy().max())) > largest:
            return f"input {place} is {top}, above {largest}"
    first = node.inputs[0] if node.inputs else None
    if first is not None and rule.max_rank and first.shape is not None and len(first.shape) > rule.max_rank:
        return f"rank {len(first.shape)} is above {rule.max_rank}"
    if first is not None and rule.types and first.dtype is not None and _type_name(first.dtype) not in rule.types:
        return f"type {_type_name(first.dtype)} is not among {', '.join(rule.types)}"
    return ""


def _as_text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _type_name(dtype: ir.DataType) -> str:
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(dtype.name, dtype.name.lower())
