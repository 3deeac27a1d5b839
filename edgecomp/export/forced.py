"""From a graph that chooses tokens, one that is told which: its choices become inputs, its own are shown beside.

One run then says two things. What a graph makes of the original's choices is a value like any other. And what it would
have chosen itself is seen in every layer on the rows that the original had there, since no earlier choice of its own
stands between: a choice that went the other way in one layer does not spoil the comparison of all that follow.
Nothing here needs torch.
"""

from __future__ import annotations

import re
from pathlib import Path

import onnx_ir as ir

from edgecomp.errors import ExportError
from edgecomp.export.modules import MODULE_KEY
from edgecomp.export.passes.merge_bodies import inline_functions
from edgecomp.specs.choice import ChoiceNode

__all__ = ["choice_nodes", "force_choices", "write_forced"]

_BLOCK = re.compile(r"(?:.*\.)?(?:blocks|layers)\.\d+")
_MERGE_KEY, _MERGE_OP = "edgecomp.merge", "TopKMerge"
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
_BESTS = {"ArgMax": True, "ArgMin": False}


def write_forced(source: Path, target: Path, *, prefix: str = "") -> tuple[ChoiceNode, ...]:
    """Write the forced form of a graph, and return its choices; its weights stay where the source has them.

    Args:
        prefix: what the graph's names of modules begin with, and the model's do not.

    Raises:
        ExportError: the graph chooses in a way that cannot be taken over.
    """
    model = ir.load(source)
    nodes = force_choices(model, prefix=prefix)
    target.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
    return nodes


def force_choices(model: ir.Model, *, prefix: str = "") -> tuple[ChoiceNode, ...]:
    """Turn the choices of a graph into inputs, in place; the bodies of its merges become part of the graph."""
    merges = [
        (n.attributes["partition"].as_string(), n.attributes["r"].as_int(), n.attributes["num_prefix_tokens"].as_int())
        for n in model.graph
        if n.op_type == _MERGE_OP
    ]
    for function in model.functions.values():
        for node in function:
            node.metadata_props[_MERGE_KEY] = node.op_type
    inline_functions(model)
    found = choice_nodes(model, merges, prefix=prefix)
    for node, choice in found:
        _force(model.graph, node, choice)
    return tuple(choice for _, choice in found)


def choice_nodes(
    model: ir.Model, merges: list[tuple[str, int, int]], *, prefix: str = ""
) -> list[tuple[ir.Node, ChoiceNode]]:
    """Return the nodes of a flat graph that choose among tokens by a floating-point score, in its order.

    Args:
        merges: partition, r and number of prefix tokens of each merge that was inlined.
    """
    found: list[tuple[ir.Node, ChoiceNode]] = []
    in_merges = 0
    for node in model.graph:
        if not _chooses(node):
            continue
        scores, indices = node.inputs[0], node.outputs[-1]
        if scores is None or scores.shape is None or indices.shape is None:
            raise ExportError(f"{node.op_type} node {node.name!r} has no shape; export the model again")
        merge = -1
        if _MERGE_KEY in node.metadata_props:  # of a merge's two choices, ranking and match
            merge, in_merges = in_merges // 2, in_merges + 1
        rank = len(scores.shape)
        axis = node.attributes.get_int("axis", -1 if node.op_type == "TopK" else 0)
        axis = axis - rank if axis >= 0 else axis
        is_top_k = node.op_type == "TopK"
        if axis != -1:
            raise ExportError(f"{node.op_type} node {node.name!r} chooses along axis {axis}, not along the last one")
        choice = ChoiceNode(
            number=len(found),
            op="TopK" if is_top_k else "ArgMax",
            where=_where(node).removeprefix(prefix),
            indices=tuple(int(size) for size in indices.shape),  # type: ignore[arg-type]
            axis=axis,
            k=int(indices.shape[-1]) if is_top_k else 1,  # type: ignore[arg-type]
            largest=bool(node.attributes.get_int("largest", 1)) if is_top_k else _BESTS[node.op_type],
            ordered=is_top_k and any(use.node.op_type != "TopK" for use in indices.uses()),
            merge=merge,
            partition=merges[merge][0] if merge >= 0 else "",
            r=merges[merge][1] if merge >= 0 else 0,
            prefix=merges[merge][2] if merge >= 0 else 0,
        )
        found.append((node, choice))
    return found


def _chooses(node: ir.Node) -> bool:
    """Whether a node chooses by a score: not one that sorts places, nor one that looks for the first true one."""
    if node.op_type not in ("TopK", *_BESTS) or not node.outputs[-1].uses():
        return False
    scores = node.inputs[0]
    if scores is None or scores.dtype not in _FLOATS:
        return False
    maker = scores.producer()
    return not (
        maker is not None
        and maker.op_type == "Cast"
        and maker.inputs[0] is not None
        and maker.inputs[0].dtype == ir.DataType.BOOL
    )


def _where(node: ir.Node) -> str:
    """Return the module nearest above a node; of one inside a block, the block."""
    level, seen = [node], set()
    while level:
        names = [name for one in level if (name := one.metadata_props.get(MODULE_KEY, ""))]
        if names:
            block = _BLOCK.match(names[0])
            return block.group() if block is not None else names[0]
        seen.update(level)
        above = [value.producer() for one in level for value in one.inputs if value is not None]
        level = list(dict.fromkeys(one for one in above if one is not None and one not in seen))
    return ""


def _force(graph: ir.Graph, node: ir.Node, choice: ChoiceNode) -> None:
    """Give the readers of a choice an input instead, and show the scores and what the node itself chose."""
    scores, own = node.inputs[0], node.outputs[-1]
    given = ir.Value(name=choice.name, shape=own.shape, type=ir.TensorType(ir.DataType.INT64))
    for reader, index in tuple(own.uses()):
        reader.replace_input_with(index, given)
    if choice.op == "TopK" and node.outputs[0].uses():
        values = ir.node("GatherElements", [scores, given], attributes={"axis": choice.axis})
        values.outputs[0].shape, values.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
        for reader, index in tuple(node.outputs[0].uses()):
            reader.replace_input_with(index, values.outputs[0])
        graph.insert_after(node, [values])
    graph.inputs.append(given)
    for name, value in ((f"{choice.name}.scores", scores), (f"{choice.name}.indices", own)):
        shown = ir.node("Identity", [value])
        shown.outputs[0].name = name
        shown.outputs[0].shape, shown.outputs[0].type = value.shape, value.type  # type: ignore[union-attr]
        graph.append(shown)
        graph.outputs.append(shown.outputs[0])
