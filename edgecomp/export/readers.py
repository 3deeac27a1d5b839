"""A graph that also shows how much its output tokens read of each patch, where nothing is chosen: resamplers, lookups.

Every softmax whose rows are the output tokens and whose columns are the patches is an attention of the ones over the
others. Its mean over heads and tokens is handed out beside what the graph gives. Nothing here needs torch.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir

from edgecomp.export.modules import module_of

__all__ = ["Reading", "write_readers"]

_HEADS, _TOKENS = 1, 2  # axes of (B, H, M, N)


class Reading(msgspec.Struct, frozen=True):
    """One attention of output tokens over patches.

    Attributes:
        output: of the graph that was written: (B, N) float32, each row sums to the share that patches get of it.
        where: the torch module.
    """

    output: str
    where: str


def write_readers(
    source: Path, target: Path, *, batch: int, patches: int, tokens: int, prefix: str = ""
) -> tuple[Reading, ...]:
    """Write a graph with such outputs added, and return them; its weights stay where the source has them.

    Args:
        batch: B; an attention that runs over several images of a request at once is left out.
        patches: N, columns of an attention; behind them may stand the M tokens themselves, as a Perceiver has them.
        tokens: M, its rows.
        prefix: what the graph's names of modules begin with, and the model's do not.
    """
    model = ir.load(source)
    found: list[Reading] = []
    for node in tuple(model.graph):
        shape = node.outputs[0].shape
        sizes = () if shape is None else tuple(shape)
        if node.op_type != "Softmax" or len(sizes) != 4:
            continue
        if sizes[0] != batch or sizes[_TOKENS] != tokens or sizes[-1] not in (patches, patches + tokens):
            continue
        reading = Reading(f"reading.{len(found):03}", module_of(node).removeprefix(prefix))
        _show(model.graph, node.outputs[0], patches, reading.output)
        found.append(reading)
    target.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
    return tuple(found)


def _show(graph: ir.Graph, attention: ir.Value, patches: int, name: str) -> None:
    """Hand out the mean over heads and tokens, of the columns that are patches, in fp32."""

    def constant(part: str, value: list[int]) -> ir.Value:
        made = ir.Value(name=f"{name}.{part}", const_value=ir.tensor(np.asarray(value, np.int64)))
        graph.register_initializer(made)
        return made

    wide = ir.node("Cast", [attention], attributes={"to": ir.DataType.FLOAT})
    mean = ir.node("ReduceMean", [wide.outputs[0], constant("axes", [_HEADS, _TOKENS])], attributes={"keepdims": 0})
    part = ir.node(
        "Slice", [mean.outputs[0], constant("start", [0]), constant("end", [patches]), constant("axis", [1])]
    )
    shown = part.outputs[0]
    shown.name, shown.type = name, ir.TensorType(ir.DataType.FLOAT)
    shown.shape = ir.Shape([attention.shape[0], patches])  # type: ignore[index]
    for node in (wide, mean, part):
        graph.append(node)
    graph.outputs.append(shown)
