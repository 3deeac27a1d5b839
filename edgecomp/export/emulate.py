"""Twins of graphs whose types the CPU has no kernels for: they compute in fp32 and round as those types would.

ONNX Runtime runs fp16 and int8 on the CPU. For bf16 it has Cast and little else, and for fp8 it joins quantised
products to an int8 kernel that refuses the type. A report that rests on a twin says "emulated".
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgecomp.errors import ExportError
from edgecomp.export.passes.merge_bodies import inline_functions

__all__ = ["emulated", "types_without_kernels"]

_BF16, _FP8, _FP32 = ir.DataType.BFLOAT16, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT
_WORDS = {_BF16: "bf16", _FP8: "fp8"}
_MOVES = frozenset({
    *("Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Gather", "GatherElements", "GatherND", "Concat"),
    *("Split", "Expand", "Flatten", "Identity", "Tile", "Where", "Relu", "Neg", "Abs", "Max", "Min", "ReduceMax"),
    *("ReduceMin", "TopK", "ScatterElements", "ScatterND", "Pad", "DepthToSpace", "SpaceToDepth", "Trilu"),
})  # fmt: skip


def types_without_kernels(model: ir.Model) -> tuple[str, ...]:
    """Return which of "bf16" and "fp8" a graph holds; none means that ONNX Runtime runs the graph itself."""
    holders = (model.graph, *model.functions.values())
    values = [value for holder in holders for node in holder for value in (*node.inputs, *node.outputs)]
    found = {value.dtype for value in (*values, *model.graph.inputs) if value is not None}
    casts = {node.attributes["to"].as_int() for holder in holders for node in holder if node.op_type == "Cast"}
    return tuple(word for dtype, word in _WORDS.items() if dtype in found or int(dtype) in casts)


def emulated(model: ir.Model) -> ir.Model:
    """Return a twin of a graph, fp32 wherever the graph is bf16 or fp8, with every result rounded as there.

    A bf16 value becomes an fp32 value that is rounded to bf16 where a node computes it, to nearest with ties to even;
    a node that only moves values needs no rounding again. Weights keep their bf16 values exactly. A quantisation to
    fp8 becomes division, rounding that saturates at 448, and multiplication. Functions are inlined, inputs and
    outputs in bf16 become fp32. A product of bf16 numbers is summed in fp32, as the tensor cores do.

    The given graph is not changed; one that holds neither type comes back as an equal copy.

    Raises:
        ExportError: fp8 scales per channel or block, or a value whose type is not known.
    """
    twin = model.clone()
    inline_functions(twin)
    graph = twin.graph
    if untyped := [node for node in graph if any(value.dtype is None and value.uses() for value in node.outputs)]:
        raise ExportError(
            f"the type of what node {untyped[0].name!r} ({untyped[0].op_type}) gives is not known, so that it cannot "
            "be emulated; infer the graph's types first"
        )
    for node in list(graph):
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and _holds(node, _FP8):
            _spell_out(graph, node)
    for value in list(graph.initializers.values()):
        if value.dtype == _BF16 and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.dtype = _FP32
    for value in graph.inputs:
        if value.dtype == _BF16:
            value.dtype = _FP32
            _round_after(graph, value, next(iter(graph)))
    for node in list(graph):
        _retype(graph, node)
    return twin


def _retype(graph: ir.Graph, node: ir.Node) -> None:
    """Let a node compute in fp32, and round what was bf16."""
    if node.metadata_props.pop(_MADE, ""):
        return
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == _BF16:
            array = attribute.as_tensor().numpy().astype(np.float32)
            node.attributes[name] = ir.AttrTensor(name, ir.tensor(array))
    if node.op_type == "Cast" and node.attributes["to"].as_int() == int(_BF16):
        node.attributes["to"] = ir.AttrInt64("to", int(_FP32))
    for value in node.outputs:
        if value.dtype != _BF16:
            continue
        value.dtype = _FP32
        if node.op_type not in _MOVES:
            _round_after(graph, value, node)


_MADE = "edgecomp.emulated"  # marks nodes that rounding is made of, until the twin is whole


def _round_after(graph: ir.Graph, value: ir.Value, anchor: ir.Node) -> None:
    """Round a value to bf16 for all that read it; Cast is the one bf16 kernel that ONNX Runtime's CPU has."""
    uses = list(value.uses())
    down = ir.node("Cast", [value], {"to": int(_BF16)}, name=f"{value.name}.round")
    up = ir.node("Cast", [down.outputs[0]], {"to": int(_FP32)}, name=f"{value.name}.rounded")
    _describe(down.outputs[0], f"{value.name}.bf16", value, _BF16)
    _describe(up.outputs[0], f"{value.name}.rounded", value, _FP32)
    for new in (down, up):
        new.metadata_props[_MADE] = "1"
    if value.producer() is None:
        graph.insert_before(anchor, [down, up])
    else:
        graph.insert_after(anchor, [down, up])
    for use in uses:
        use.node.replace_input_with(use.idx, up.outputs[0])
    if value.is_graph_output():
        name = value.name
        index = next(i for i, output in enumerate(graph.outputs) if output is value)
        value.name, up.outputs[0].name = f"{name}.exact", name
        graph.outputs[index] = up.outputs[0]


def _spell_out(graph: ir.Graph, node: ir.Node) -> None:
    """Replace a quantisation to fp8, or the way back, by nodes that ONNX Runtime takes for nothing else."""
    first, scale = node.inputs[0], node.inputs[1]
    if first is None or scale is None or node.attributes.get("block_size") is not None:
        raise ExportError(f"node {node.name!r} ({node.op_type}) quantises by blocks, which has no twin here")
    if scale.shape is not None and len(scale.shape):
        raise ExportError(f"node {node.name!r} ({node.op_type}) has fp8 scales per channel, which have no twin here")
    old = node.outputs[0]
    if node.op_type == "QuantizeLinear":
        above, below = _widen(node, first), _widen(node, scale)
        ratio = ir.node("Div", [_last(above, first), _last(below, scale)], name=f"{node.name}.div")
        made = [*above, *below, ratio]
        last = ir.node("Cast", [ratio.outputs[0]], {"to": int(_FP8), "saturate": 1}, name=node.name)
    else:
        levels = ir.node("Cast", [first], {"to": int(_FP32)}, name=f"{node.name}.levels")
        below = _widen(node, scale)
        product = ir.node("Mul", [levels.outputs[0], _last(below, scale)], name=f"{node.name}.mul")
        made = [levels, *below, product]
        last = ir.node("Cast", [product.outputs[0]], {"to": int(old.dtype or _FP32)}, name=node.name)
    for number, new in enumerate(made):
        like = scale if new in below else old
        _describe(new.outputs[0], f"{old.name}.exact{number}", like, _FP32)
    _describe(last.outputs[0], str(old.name), old, old.dtype or _FP32)
    ir.convenience.replace_nodes_and_values(graph, node, [node], [*made, last], [old], [last.outputs[0]])


def _widen(node: ir.Node, value: ir.Value) -> list[ir.Node]:
    """Return the Cast that makes fp32 of a value, or nothing where it is fp32: it is rounded once, at the end."""
    if value.dtype == _FP32:
        return []
    return [ir.node("Cast", [value], {"to": int(_FP32)}, name=f"{node.name}.{value.name}")]


def _last(nodes: list[ir.Node], value: ir.Value) -> ir.Value:
    return nodes[-1].outputs[0] if nodes else value


def _holds(node: ir.Node, dtype: ir.DataType) -> bool:
    return any(value is not None and value.dtype == dtype for value in (*node.inputs, *node.outputs))


def _describe(value: ir.Value, name: str, like: ir.Value, dtype: ir.DataType) -> None:
    value.name, value.shape, value.dtype = name, like.shape, dtype
