"""Function bodies of merge nodes: gives each model its body, and inlines it for tools that know no functions."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass, NameFixPass, RemoveUnusedNodesPass

from edgecomp.errors import ExportError
from edgecomp.export.merge_body import merge_body

__all__ = ["add_merge_body", "inline_functions", "merge_nodes"]

_DOMAIN, _OP, _VERSION = "edgecomp", "TopKMerge", 1
_ATTRIBUTES = (
    *("r", "num_prefix_tokens", "mode", "partition", "order", "with_map"),
    *("plugin_version", "plugin_namespace"),
)
_DTYPES = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16"}


def merge_nodes(model: ir.Model) -> list[ir.Node]:
    """Return the merge nodes of a graph.

    Raises:
        ExportError: one of them lacks an attribute that TensorRT needs to find the plugin, or the body to compute.
    """
    nodes = [node for node in model.graph if node.domain == _DOMAIN and node.op_type == _OP]
    for node in nodes:
        missing = [name for name in _ATTRIBUTES if name not in node.attributes]
        if missing:
            raise ExportError(
                f"merge node {node.name!r} has no attribute {', '.join(missing)}; without it TensorRT would leave the "
                "plugin out in silence. Export the model again, or mend the tool that changed the graph"
            )
    return nodes


def add_merge_body(model: ir.Model) -> None:
    """Add the function that all merge nodes of a model share; nothing where there is none.

    Functions of one name that differ in their `overload` would serve several kinds in ONNX Runtime, but TensorRT for
    RTX 1.7 takes the first of them for every node, in silence.

    Raises:
        ExportError: the nodes differ in mode, partition, order or type, which one function cannot serve.
    """
    nodes = merge_nodes(model)
    if not nodes:
        return
    kinds = {
        (*(node.attributes[name].as_string() for name in ("mode", "partition", "order")), str(node.inputs[1].dtype))  # type: ignore[union-attr]
        for node in nodes
    }
    if len(kinds) > 1:
        listed = "; ".join(sorted(" ".join(kind) for kind in kinds))
        raise ExportError(f"merge nodes of one graph share mode, partition, order and type; here they are {listed}")
    ((mode, partition, order, dtype),) = kinds
    for index, node in enumerate(nodes):
        node.name = f"topk_merge_{index}"  # an engine's layers are found by it
    maps = [node.outputs[2] for node in nodes if len(node.outputs) > 2]
    with_map = any(value.uses() or value.is_graph_output() for value in maps)
    for node in nodes:
        node.attributes["with_map"] = ir.AttrInt64("with_map", int(with_map))
        node.resize_outputs(3 if with_map else 2)
    body = merge_body(
        mode=mode,
        partition=partition,
        order=order,
        largest_r=max(node.attributes["r"].as_int() for node in nodes),
        with_map=with_map,
        dtype=_DTYPES[dtype],  # type: ignore[arg-type]
        opset=model.opset_imports[""],
    )
    model.functions[body.identifier()] = body
    model.opset_imports[_DOMAIN] = _VERSION


def inline_functions(model: ir.Model) -> None:
    """Make the bodies of functions part of the graph, all shapes inferred, in place; nothing where there are none.

    Equal initializers stay apart: ONNX Runtime cannot load int8 weights that share their zero points.
    """
    if not model.functions:
        return
    from onnxscript import optimizer

    InlinePass()(model)
    for _ in range(2):  # what one round folds makes shapes known to the next
        optimizer.fold_constants(model, onnx_shape_inference=True)
    RemoveUnusedNodesPass()(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    NameFixPass()(model)
