"""Two methods in one graph, cut where they meet: each half is what the graph computes there, node by node.

Nothing here needs torch.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from edgecomp.errors import ExportError
from edgecomp.specs.manifest import PartGraph

__all__ = ["hide_outputs", "write_half"]


def hide_outputs(model: ir.Model, count: int) -> tuple[ir.Value, ...]:
    """Take the last outputs away, in place, with what served them alone, and return the values that they showed."""
    graph = model.graph
    values = [graph.outputs.pop() for _ in range(count)][::-1]
    for place, value in enumerate(values):
        while (node := value.producer()) is not None and node.op_type == "Identity" and node.inputs[0] is not None:
            value = node.inputs[0]
        values[place] = value
    for node in reversed(list(graph)) if count else ():
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    return tuple(values)


def write_half(source: Path, target: Path, part: PartGraph) -> None:
    """Write one half of a graph of two methods; its weights stay where the source has them.

    Values of a reduced precision go in and out in fp32, as they do between a stem and what reads it.

    Raises:
        ExportError: the graph is not cut by what the manifest says: a value is not in it, or a half reads more.
    """
    assert part.joint is not None
    model = ir.load(source)
    whole, hands = model.graph, part.joint.hands
    ours = {spec.name: spec.name for spec in (*part.inputs, *part.outputs)} | {
        one.spec.name: one.value for one in hands
    }
    try:
        half = ir.convenience.extract(
            whole, [ours[spec.name] for spec in part.inputs], [ours[spec.name] for spec in part.outputs]
        )
    except ValueError as error:
        raise ExportError(
            f"{part.label}: {source.name} is not cut by {', '.join(one.value for one in hands)} ({error}); export the "
            "bundle again"
        ) from None
    if part.half == "first":
        for place, one in enumerate(hands):
            half.outputs[place] = _shown(half, half.outputs[place], one.spec.name)
    else:
        for place, one in enumerate(hands):
            half.inputs[place] = _taken(half, half.inputs[place], one.spec.name)
    used = {node.op_identifier() for node in half}
    functions = [function for key, function in model.functions.items() if key in used]
    made = ir.Model(half, ir_version=model.ir_version, functions=functions)
    made.producer_name, made.producer_version = model.producer_name, model.producer_version
    target.write_bytes(ir.to_proto(made).SerializeToString(deterministic=True))


def _shown(graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
    """Return a value under a name, numbers of a reduced type in fp32."""
    if value.name == name:
        value.name = f"inner.{name}"
    output = ir.Value(name=name, shape=value.shape, type=ir.TensorType(_wide(value)))
    graph.append(_cast(value, output))
    return output


def _taken(graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
    """Return an input that stands for a value, which it gives in the type that the graph has there."""
    if value.name == name:
        value.name = f"inner.{name}"
    given = ir.Value(name=name, shape=value.shape, type=ir.TensorType(_wide(value)))
    inner = ir.Value(name=value.name, shape=value.shape, type=value.type)
    value.replace_all_uses_with(inner, replace_graph_outputs=True)
    graph.insert_before(graph[0], _cast(given, inner))
    return given


def _cast(value: ir.Value, output: ir.Value) -> ir.Node:
    if value.dtype == output.dtype:
        return ir.Node("", "Identity", [value], outputs=[output], name=f"{output.name}.same")
    assert output.dtype is not None
    attributes = [ir.AttrInt64("to", int(output.dtype))]
    return ir.Node("", "Cast", [value], attributes, outputs=[output], name=f"{output.name}.cast")


def _wide(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None
    return ir.DataType.FLOAT if value.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) else value.dtype
