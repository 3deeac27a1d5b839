"""Counts what an ONNX graph costs, from its shapes: FLOPs, bytes, and what each op is for. Weights are never read.

Torch-free, and free of onnx_ir, as `check` is: a ViT-L takes half a second. What is computed from constants alone is
folded by every runtime, so it costs nothing here and its result counts as a weight.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx

from edgecomp.errors import RunError
from edgecomp.export.check import infer_shapes, inline_calls
from edgecomp.export.light import LightModel, read_light
from edgecomp.export.roles import roles_of
from edgecomp.export.view import GraphView, NodeView
from edgecomp.specs.costs import RECURRENT, GraphCosts, Kind, OpCost, Role, ValueCost, multiply_adds

__all__ = ["count_costs"]

_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("MatMul", "Gemm", "MatMulInteger", "QLinearMatMul", "Einsum"), "matmul"),
    **dict.fromkeys(("Conv", "ConvTranspose", "ConvInteger", "QLinearConv"), "conv"),
    "Attention": "attention",
    **dict.fromkeys(
        (
            "LayerNormalization",
            "RMSNormalization",
            "InstanceNormalization",
            "GroupNormalization",
            "LpNormalization",
            "MeanVarianceNormalization",
        ),
        "norm",
    ),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), "softmax"),
    **dict.fromkeys(("Transpose", "Slice", "Split", "Concat", "Expand", "Pad", "Tile", "DepthToSpace"), "move"),
    **dict.fromkeys(("SpaceToDepth", "Resize", "ConstantOfShape", "Range", "EyeLike", "Trilu"), "move"),
    **dict.fromkeys(("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Dropout", "DequantizeLinear"), "view"),
    **dict.fromkeys(("Shape", "Size"), "view"),
    **dict.fromkeys(("TopK", "ArgMax", "ArgMin", "NonZero", "Unique"), "sort"),
    **dict.fromkeys(("Gather", "GatherElements", "GatherND", "Compress"), "gather"),
    **dict.fromkeys(("Scatter", "ScatterElements", "ScatterND"), "scatter"),
    **dict.fromkeys(("AveragePool", "MaxPool", "GlobalAveragePool", "GlobalMaxPool", "CumSum", "ArgSort"), "reduce"),
    **dict.fromkeys(("If", "Loop", "Scan"), "other"),
}
_BLOCK = re.compile(r"^(.*?[A-Za-z_]\w*\.\d+)(?:\.|$)")
_IN_NAME = re.compile(r"([A-Za-z_]\w*\.\d+)(?=/)")  # the node names of torch's older exporter
_WRAPPERS = frozenset({"model", "encoder", "backbone", "module", "visual", "vision_model", "vision_tower", "trunk"})
_QUANTIZED = frozenset({"int8", "uint8", "float8e4m3fn", "float8e5m2", "float4e2m1", "int4", "uint4"})
FRONT, BACK = "front", "back"
_PAST_KEY = 4  # of ONNX's Attention: (B, H, keys of the cache, D)
_SMALL = 64  # numbers of a constant that sizes are made of
_ROUNDS = 16  # of putting in what became known


class _Call(NamedTuple):
    """A call of one of edgecomp's functions."""

    name: str
    function: str


def count_costs(path: Path, *, batch: int = 0) -> GraphCosts:
    """Count the costs of one ONNX file.

    Model-local functions are inlined; what comes from a function of edgecomp keeps the name of its node.

    Args:
        path: the file; external data is not opened.
        batch: the size of an open first dimension of the inputs; 0: such a dimension is refused.

    Raises:
        RunError: the file is absent, truncated or no ONNX model; an op without a fixed shape; a Loop.
    """
    light = read_light(path)
    notes = _bind(light, batch)
    own = [
        (next(iter(node.output), ""), _Call(node.name or next(iter(node.output), ""), node.op_type))
        for node in light.proto.graph.node
    ]
    functions = {(f.domain, f.name) for f in light.proto.functions}
    called = [(node.domain, node.op_type) in functions for node in light.proto.graph.node]
    domains = [node.domain for node in light.proto.graph.node]
    ends = [tuple(name for name in node.output if name) for node in light.proto.graph.node]
    model, _ = inline_calls(light)
    view = _with_shapes(light, model)
    _require_static(path, view)
    calls = _calls_of(view, own, called, domains, ends)
    return _Counter(path, view, calls, notes).count()


def _bind(light: LightModel, batch: int) -> list[str]:
    """Give the open first dimension of the inputs a size; return what was done."""
    held = {tensor.name for tensor in light.proto.graph.initializer}
    bound = []
    for value in light.proto.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name in held or not dims or dims[0].HasField("dim_value") or not batch:
            continue
        dims[0].dim_value = batch
        bound.append(value.name)
    if not bound:
        return []
    for value in (*light.proto.graph.output, *light.proto.graph.value_info):
        value.type.tensor_type.ClearField("shape")  # it may hold the open size; inference writes it anew
    return [f"the open first dimension of {', '.join(bound)} is taken as {batch}"]


def _with_shapes(light: LightModel, model: Any) -> GraphView:
    """Return the view of a model whose shapes are known as far as they can be.

    Shape inference follows no arithmetic of sizes that goes through Mod or Slice, as that of a merge does: what is
    computed from constants alone is put in as a constant, until nothing more becomes known.
    """
    view = GraphView(light, infer_shapes(model))
    for _ in range(_ROUNDS):
        if all(_is_known(view, name) for node in view.nodes for name in node.proto.output if name):
            break
        folded = _fold(model, view)
        if not folded:
            break
        view = GraphView(light, infer_shapes(model))
    return view


def _is_known(view: GraphView, name: str) -> bool:
    dims = view.dims.get(name)
    return name in view.known_values or (dims is not None and None not in dims)


def _fold(model: Any, view: GraphView) -> int:
    """Replace the nodes of the main graph whose result is a small known constant; return how many there were."""
    kept, folded = [], 0
    for node in model.graph.node:
        names = [name for name in node.output if name]
        value = view.constant(names[0], largest=_SMALL) if len(names) == 1 and names[0] in view.known_values else None
        if value is None or value.size > _SMALL or node.op_type == "Constant":
            kept.append(node)
            continue
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), names[0]))
        folded += 1
    if folded:
        del model.graph.node[:]
        model.graph.node.extend(kept)
    return folded


def _require_static(path: Path, view: GraphView) -> None:
    for name, text in view.dynamic_inputs.items():
        raise RunError(
            f"{path}: input {name!r} is {text}, and an estimate needs numbers; --batch N fixes an open first "
            "dimension, "
            "others must be fixed when the model is exported"
        )
    for node in view.nodes:
        if not node.is_onnx:
            raise RunError(
                f"{path}: {node.op} node {node.name!r} is of another domain and has no function body, so its "
                "shapes are "
                "unknown; give the op a body, or export without it"
            )
        if node.proto.op_type in ("Loop", "Scan"):
            raise RunError(
                f"{path}: {node.op} node {node.name!r} runs its body a number of times that the file does not fix; "
                "unroll it when exporting"
            )
        for name in node.proto.output:
            dims = view.dims.get(name)
            if name and name not in view.known_values and (dims is None or None in dims or not view.types.get(name)):
                raise RunError(
                    f"{path}: the shape of {name!r}, from {node.op} node {node.name!r}, is not fixed; "
                    "`edgecomp check` names what depends on the data"
                )


def _calls_of(
    view: GraphView,
    own: Sequence[tuple[str, _Call]],
    called: Sequence[bool],
    domains: Sequence[str],
    ends: Sequence[tuple[str, ...]],
) -> dict[int, _Call]:
    """Say which nodes stand in for a call of an edgecomp function, by their place.

    The inliner writes the body where the call stood, and keeps the names of all that is outside.
    """
    kept = {name: place for place, (name, _) in enumerate(own) if not called[place] and name}
    found: dict[int, _Call] = {}
    waiting = 0
    made: set[str] = set()
    for place, node in enumerate(view.nodes):
        first = next(iter(node.proto.output), "")
        if first in kept:
            waiting = kept[first] + 1
            continue
        while waiting + 1 < len(own) and called[waiting + 1] and set(ends[waiting]) <= made:
            waiting += 1
        made |= set(node.proto.output)
        if waiting < len(own) and called[waiting] and domains[waiting] == "edgecomp":
            found[place] = own[waiting][1]
    return found


class _Counter:
    """Counts the nodes of one graph."""

    def __init__(self, path: Path, view: GraphView, calls: dict[int, _Call], notes: list[str]) -> None:
        self.path, self.view, self.calls, self.notes = path, view, calls, notes
        self.values: dict[str, ValueCost] = {}
        self.weights: dict[str, ValueCost] = {}
        self.moving = set(view.inputs)

    def count(self) -> GraphCosts:
        view = self.view
        for name in view.inputs:
            self._value(name)
        nodes = [
            (place, node)
            for place, node in enumerate(view.nodes)
            if not all(name in view.known_values for name in node.proto.output if name)
        ]
        roles = roles_of([node for _, node in nodes], view, [place in self.calls for place, _ in nodes])
        blocks = _blocks([node for _, node in nodes])
        ops = []
        for (place, node), role, block in zip(nodes, roles, blocks, strict=True):
            call = self.calls.get(place)
            ops.append(self._op(node, role, block, call.name if call is not None else ""))
        tokens = _tokens(ops, self.values)
        batch = _batch(view)
        if any(node.op == "If" for _, node in nodes):
            self.notes.append("both branches of each If are counted")
        outputs = tuple(name for name in view.outputs if name in self.values)
        for name in view.outputs:
            if name not in self.values:
                self._weight(name)  # it is constant; the graph behind may read it
        return GraphCosts(
            self.path.name,
            batch,
            tokens,
            view.inputs,
            outputs,
            tuple(ops),
            self.values,
            self.weights,
            tuple(self.notes),
        )

    def _op(self, node: NodeView, role: Role, block: str, call: str) -> OpCost:
        names = [name for name in node.proto.input if name]
        reads = tuple(dict.fromkeys(name for name in names if name not in self.view.known_values))
        constants = tuple(dict.fromkeys(name for name in names if name in self.view.known_values))
        writes = tuple(name for name in node.proto.output if name)
        kind = _kind(node, reads)
        if any(name in self.moving for name in reads):
            self.moving |= set(writes)
        for name in (*reads, *writes):
            self._value(name)
        weights = tuple(name for name in constants if self._weight(name))
        flops, of_weights = self._flops(node), False
        if flops and constants:
            of_weights = any(name in weights for name in node.proto.input[:2]) or kind == "conv"
        return OpCost(
            name=node.name,
            op=node.op,
            module=node.module,
            block=block,
            kind=kind,
            role=role,
            call=call,
            flops=2 * flops,
            reads=reads,
            writes=writes,
            weights=weights if kind != "view" else (),
            dtype=self._dtype(node, flops),
            of_weights=of_weights,
            bytes_read=sum(self.values[name].size for name in reads),
            bytes_written=sum(self.values[name].size for name in writes),
            weight_bytes=sum(self.weights[name].size for name in weights),
        )

    def _flops(self, node: NodeView) -> int:
        kind = _KINDS.get(node.op, "elementwise")
        if kind not in ("matmul", "conv", "attention") and node.op not in RECURRENT:
            return 0
        cache = self._dims(node.input_name(_PAST_KEY)) if kind == "attention" else ()
        shapes = [self._dims(name) for name in node.proto.input if name]
        try:
            return multiply_adds(
                node.op,
                shapes,
                [self._dims(name) for name in node.proto.output if name],
                transposed=bool(node.attribute("transA")),
                equation=node.attribute_text("equation") or "",
                past=cache[-2] if len(cache) > 1 else 0,
            )
        except (ValueError, IndexError) as error:
            raise RunError(
                f"{self.path}: {node.op} node {node.name!r} cannot be counted ({error}); write it as matrix products"
            ) from None

    def _dims(self, name: str) -> tuple[int, ...]:
        dims = self.view.dims.get(name, ())
        return tuple(size if size is not None else 0 for size in dims)

    def _value(self, name: str) -> None:
        if name not in self.values:
            self.values[name] = ValueCost(self._dims(name), self.view.types.get(name, ""), name in self.moving)

    def _weight(self, name: str) -> bool:
        """Note a constant in the type it is stored in; say whether it has a size."""
        if name not in self.weights:
            self.weights[name] = ValueCost(self._dims(name), self._stored_type(name), moves=False)
        return self.weights[name].elements > 0

    def _stored_type(self, name: str) -> str:
        """Return the type of a constant, before the DequantizeLinear that a runtime does as it reads."""
        for _ in range(8):
            maker = self.view.makers.get(name)
            if maker is None or maker.op not in ("DequantizeLinear", "Transpose", "Reshape", "Cast", "Identity"):
                break
            if maker.op == "DequantizeLinear":
                return self.view.types.get(maker.input_name(0), "float32")
            if maker.op == "Cast":
                break
            name = maker.input_name(0)
        return self.view.types.get(name, "") or "float32"

    def _dtype(self, node: NodeView, flops: int) -> str:
        """Return what a product multiplies: the quantised type where both sides come dequantised."""
        if not flops:
            return self.view.types.get(next((n for n in node.proto.output if n), ""), "")
        names = node.proto.input[:2]
        dequantized = [self._dequantized(name) for name in names]
        if all(dequantized):
            return dequantized[0]
        return self.view.types.get(names[0], "")

    def _dequantized(self, name: str) -> str:
        if name in self.view.known_values:
            stored = self._stored_type(name)
            return stored if stored in _QUANTIZED else ""
        for _ in range(8):
            maker = self.view.makers.get(name)
            if maker is None or maker.op not in ("DequantizeLinear", "Transpose", "Reshape", "Squeeze", "Unsqueeze"):
                return ""
            if maker.op == "DequantizeLinear":
                return self.view.types.get(maker.input_name(0), "")
            name = maker.input_name(0)
        return ""


def _kind(node: NodeView, reads: tuple[str, ...]) -> Kind:
    op = node.op
    if op.startswith("Reduce"):
        return "reduce"
    kind = _KINDS.get(op, "elementwise")
    if kind == "gather" and op == "Gather" and node.input_name(1) not in reads:
        return "move"  # of rows that are known when the engine is built
    return kind


def _batch(view: GraphView) -> int:
    """Return the first dimension that all inputs and outputs share, or 0."""
    first = {view.dims[name][0] if view.dims.get(name) else None for name in (*view.inputs, *view.outputs)}
    (size,) = first if len(first) == 1 else (None,)
    return size or 0


def _tokens(ops: Sequence[OpCost], values: dict[str, ValueCost]) -> int:
    """Return on how many tokens most self-attentions work; without any, most norms; 0 where nothing tells."""
    square = Counter(
        dims[-1]
        for op in ops
        if op.kind == "softmax" and len(dims := values[op.writes[0]].dims) >= 3 and dims[-1] == dims[-2]
    )
    norms = Counter(
        dims[-2] for op in ops if op.kind == "norm" and op.reads and len(dims := values[op.reads[0]].dims) == 3
    )
    for found in (square, norms):
        if found:
            return found.most_common(1)[0][0]
    return 0


def _blocks(nodes: Iterable[NodeView]) -> list[str]:
    """Return the block of each node; a node whose module is not known is where the one before it is."""
    found: list[str] = []
    for node in nodes:
        module = node.module
        match = _BLOCK.match(module)
        if match is not None:
            found.append(_short(match[1]))
            continue
        in_name = _IN_NAME.findall(str(node.proto.name)) if not module else []
        if in_name:
            found.append(in_name[0])
        else:
            found.append("" if module.count(".") or not found else found[-1])
    last = max((place for place, block in enumerate(found) if block), default=-1)
    seen = ""
    for place, block in enumerate(found):
        if place > last:
            found[place] = BACK if last >= 0 else FRONT
        elif not block:
            found[place] = seen or FRONT
        seen = found[place] if found[place] != FRONT else seen
    return found


def _short(path: str) -> str:
    """Drop what only wraps: `model.backbone.model.blocks.3` is `blocks.3`."""
    parts = path.split(".")
    while len(parts) > 2 and parts[0] in _WRAPPERS:
        parts = parts[1:]
    return ".".join(parts)
