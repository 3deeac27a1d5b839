"""Gives folded weights (`val_20`) the name of the module that reads them (`blocks.0.gather.to_q.weight`)."""

from __future__ import annotations

import itertools

import onnx_ir as ir

from edgecomp.export.modules import module_of

__all__ = ["name_weights"]

_ROLES = {"MatMul": "weight_t", "Gemm": "weight", "LayerNormalization": "scale", "Conv": "weight", "Add": "term"}
_SMALLEST = 64  # values; shapes and scalars keep their short names


def name_weights(model: ir.Model) -> None:
    """Rename initializers that constant folding left anonymous, by the torch module of their first reader.

    Transposed, packed or shifted weights lose their parameter's name when the exporter folds them. The new
    name is the module's with the role that the op gives it, and a number where a module has several.
    """
    taken = {value.name for node in model.graph for value in (*node.inputs, *node.outputs) if value is not None}
    taken |= set(model.graph.initializers)
    for old, value in list(model.graph.initializers.items()):
        users = value.uses()
        if "." in old or not users or value.const_value is None or value.const_value.size < _SMALLEST:
            continue
        reader = next(iter(users)).node
        if not (module := module_of(reader)):
            continue
        role = _ROLES.get(reader.op_type, "constant")
        choices = (f"{module}.{role}" + (f".{number}" if number else "") for number in itertools.count())
        name = next(choice for choice in choices if choice not in taken)
        taken.add(name)
        model.graph.initializers.pop(old)
        value.name = name
        value.const_value.name = name
        model.graph.initializers[name] = value
