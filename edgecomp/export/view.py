"""What rules ask of an ONNX graph: types, shapes, small constants, and what is known when an engine is built.

A TensorRT folds shapes by itself, so a Reshape to `Concat(Shape(x), ...)` is as static as one to a constant. One pass
over the nodes tells it without folding: a value's *shape* is known where the shapes of all inputs are, and the values
of those that decide the shape; a *value* is known where all inputs are, and where it is the Shape of a known shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from edgecomp.export.light import LightModel
from edgecomp.export.modules import MODULE_KEY, SCOPES_KEY, deepest_module

__all__ = ["GraphView", "NodeView", "type_name"]

_SMALL = 64 << 10  # bytes; a constant that is read to be computed with
_DEEPEST = 64  # nodes from a constant to where its value is asked
# Inputs whose values decide the shape of the output.
_SHAPED_BY: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("Reshape", "Expand", "Tile", "TopK", "OneHot", "Squeeze", "Unsqueeze", "Split"), (1,)),
    "Slice": (1, 2, 3, 4),
    "Pad": (1, 3),
    "ConstantOfShape": (0,),
    "Range": (0, 1, 2),
    "Resize": (2, 3),
    "Upsample": (1,),
    "CenterCropPad": (1,),
    "AffineGrid": (1,),
}
_SHAPED_BY |= {
    f"Reduce{kind}": (1,)
    for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
}
# Ops whose outputs have shapes that depend on the data, or that are random.
_BY_DATA = frozenset({"NonZero", "Unique", "Compress", "NonMaxSuppression", "If", "Loop", "Scan", "StringSplit"})
_RANDOM = ("Random", "Bernoulli", "Multinomial", "Dropout")


def type_name(number: int) -> str:
    """Return the name of an element type as the op lists write it: `float32`, `float8e4m3fn`; "" where unknown."""
    if number not in onnx.TensorProto.DataType.values() or number == 0:
        return ""
    name = str(onnx.TensorProto.DataType.Name(number)).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


@dataclasses.dataclass(frozen=True)
class NodeView:
    """A node in its graph; answers what the conditions of an op ask (`NodeFacts`)."""

    proto: Any
    graph: GraphView

    @property
    def op(self) -> str:
        """The op, with its domain where that is not ONNX's own."""
        return str(self.proto.op_type) if self.is_onnx else f"{self.proto.domain}::{self.proto.op_type}"

    @property
    def is_onnx(self) -> bool:
        """The op is of ONNX's own domain."""
        return self.proto.domain in ("", "ai.onnx")

    @property
    def name(self) -> str:
        """The node's name; its first output's where it has none."""
        return str(self.proto.name or next(iter(self.proto.output), ""))

    @property
    def module(self) -> str:
        """The torch module that the node came from, or ""."""
        notes = {entry.key: entry.value for entry in self.proto.metadata_props}
        return str(notes.get(MODULE_KEY, "")) or deepest_module(notes.get(SCOPES_KEY, ""))

    def attribute(self, name: str) -> Any:
        """Return an attribute's value, or None where it is absent."""
        found = next((item for item in self.proto.attribute if item.name == name), None)
        return None if found is None else onnx.helper.get_attribute_value(found)

    def attribute_text(self, name: str) -> str | None:
        """Return an attribute as text, or None where it is absent."""
        value = self.attribute(name)
        return value.decode(errors="replace") if isinstance(value, bytes) else None if value is None else str(value)

    def input_name(self, position: int) -> str:
        """Return the name of an input, or "" where it is absent."""
        return str(self.proto.input[position]) if position < len(self.proto.input) else ""

    def is_known(self, position: int) -> bool:
        """Say whether an input is known when the engine is built."""
        return self.input_name(position) in self.graph.known_values

    def largest(self, position: int) -> int | None:
        """Return the largest value of an input, or None where its values are not known."""
        value = self.graph.constant(self.input_name(position))
        return None if value is None or value.size == 0 else int(value.max())

    def first_rank(self) -> int | None:
        """Return the rank of the first input, or None where it is not known."""
        dims = self.graph.dims.get(self.input_name(0))
        return None if dims is None else len(dims)

    def first_type(self) -> str:
        """Return the element type of the first input, or "" where it is not known."""
        return self.graph.types.get(self.input_name(0), "")

    def types(self) -> frozenset[str]:
        """Return the element types of inputs and outputs, as far as they are known."""
        names = (*self.proto.input, *self.proto.output)
        return frozenset(dtype for name in names if name and (dtype := self.graph.types.get(name, "")))


class GraphView:
    """A model whose functions are inlined and whose shapes are inferred, ready to be asked.

    Attributes:
        nodes: all of them, those of subgraphs behind the node that holds them.
        types, dims: element type, and dimensions (None: not an integer), by value; absent where unknown.
        known_shapes, known_values: values whose shape, or whose content, is known when an engine is built.
        dynamic_inputs: graph inputs with dimensions that are no positive integers, as text.
    """

    def __init__(self, light: LightModel, model: Any) -> None:
        self.light = light
        self.opsets = {entry.domain or "": entry.version for entry in model.opset_import}
        self.opset = self.opsets.get("", self.opsets.get("ai.onnx", 0))
        self.nodes: list[NodeView] = []
        self.types: dict[str, str] = {}
        self.dims: dict[str, tuple[int | None, ...]] = {}
        self.known_shapes: set[str] = {""}
        self.known_values: set[str] = {""}
        self.tensors: dict[str, Any] = {}
        self.makers: dict[str, NodeView] = {}
        self.readers: dict[str, list[NodeView]] = {}
        self.inputs: tuple[str, ...] = ()
        self.outputs = tuple(value.name for value in model.graph.output)
        self._constants: dict[str, npt.NDArray[Any] | None] = {}
        self._enter(model.graph)
        held = {tensor.name for tensor in model.graph.initializer}
        self.inputs = tuple(value.name for value in model.graph.input if value.name not in held)
        self.dynamic_inputs = {
            value.name: _shape_text(value)
            for value in model.graph.input
            if value.name in self.inputs and not self._is_static(value.name)
        }
        self.known_shapes |= set(self.inputs)  # a dynamic one is found by itself, not again in each node behind it
        for node in model.graph.node:
            self._add(node)

    def constant(self, name: str, *, largest: int = _SMALL) -> npt.NDArray[Any] | None:
        """Return the values of a constant, or of what small integer ops make of constants and shapes; else None."""
        if name in self.tensors:
            return self.light.array(self.tensors[name], largest=largest)
        return self._computed(name, 0)

    def _is_static(self, name: str) -> bool:
        dims = self.dims.get(name)
        return dims is not None and all(size is not None and size >= 0 for size in dims)

    def _enter(self, graph: Any) -> None:
        """Note types, shapes and initializers of a graph."""
        for value in (*graph.input, *graph.value_info, *graph.output):
            kind = value.type.tensor_type
            if dtype := type_name(kind.elem_type):
                self.types[value.name] = dtype
            if kind.HasField("shape"):
                self.dims[value.name] = tuple(
                    int(dim.dim_value) if dim.HasField("dim_value") and dim.dim_value >= 0 else None
                    for dim in kind.shape.dim
                )
        for tensor in graph.initializer:
            self._hold(tensor.name, tensor)

    def _hold(self, name: str, tensor: Any) -> None:
        self.tensors[name] = tensor
        self.types[name] = type_name(tensor.data_type)
        self.dims[name] = tuple(tensor.dims)
        self.known_shapes.add(name)
        self.known_values.add(name)

    def _add(self, proto: Any) -> None:
        """Note a node, its subgraphs, and what is known of its outputs."""
        node = NodeView(proto, self)
        self.nodes.append(node)
        for name in proto.input:
            self.readers.setdefault(name, []).append(node)
        for name in proto.output:
            self.makers[name] = node
        for graph in _subgraphs(proto):
            self._enter(graph)
            for value in graph.input:  # what a loop hands in may change from turn to turn
                if self._is_static(value.name):
                    self.known_shapes.add(value.name)
            for inner in graph.node:
                self._add(inner)
        if proto.op_type == "Constant" and node.is_onnx:
            self._add_constant(proto)
            return
        op = proto.op_type if node.is_onnx else ""
        of_known_shape = all(name in self.known_shapes for name in proto.input)
        decides = all(node.is_known(position) for position in _SHAPED_BY.get(op, ()))
        shaped = bool(op) and op not in _BY_DATA and of_known_shape and decides
        values = shaped and not op.startswith(_RANDOM) and all(name in self.known_values for name in proto.input)
        if op in ("Shape", "Size"):
            values = shaped
        for name in proto.output:
            if shaped or self._is_static(name):
                self.known_shapes.add(name)
            if values:
                self.known_values.add(name)

    def _add_constant(self, proto: Any) -> None:
        name = proto.output[0]
        self.known_shapes.add(name)
        self.known_values.add(name)
        value = next((item for item in proto.attribute if item.name.startswith(("value", "sparse_value"))), None)
        if value is None:
            return
        if value.HasField("t"):
            self._hold(name, value.t)
        elif value.name in ("value_int", "value_ints", "value_float", "value_floats"):
            array = np.asarray(onnx.helper.get_attribute_value(value))
            kind = np.int64 if "int" in value.name else np.float32
            self._hold(name, onnx.numpy_helper.from_array(array.astype(kind), name))

    def _computed(self, name: str, depth: int) -> npt.NDArray[Any] | None:
        if name in self.tensors:
            return self.light.array(self.tensors[name], largest=_SMALL)
        if name not in self._constants:
            maker = self.makers.get(name)
            self._constants[name] = (
                None if maker is None or depth > _DEEPEST or name not in self.known_values else self._run(maker, depth)
            )
        return self._constants[name]

    def _run(self, node: NodeView, depth: int) -> npt.NDArray[Any] | None:
        """Compute a node that makes sizes out of sizes; None where it is another op, or its inputs are not known."""
        op = node.proto.op_type
        if op in ("Shape", "Size"):
            dims = self.dims.get(node.input_name(0))
            if dims is None or None in dims:
                return None
            whole = np.asarray(dims, np.int64)
            return (
                whole[slice(node.attribute("start"), node.attribute("end"))] if op == "Shape" else np.prod(whole)  # type: ignore[return-value]
            )
        inputs = [self._computed(name, depth + 1) for name in node.proto.input]
        if any(value is None for value in inputs):
            return None
        try:
            return _COMPUTE[op](node, *inputs) if op in _COMPUTE else None
        except (ValueError, IndexError, TypeError, ZeroDivisionError):
            return None


def _subgraphs(proto: Any) -> Iterator[Any]:
    for attribute in proto.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _shape_text(value: Any) -> str:
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return "of no stated shape"
    return str([dim.dim_param or (dim.dim_value if dim.HasField("dim_value") else "?") for dim in kind.shape.dim])


def _axes(node: NodeView, *rest: Any) -> tuple[int, ...]:
    given = rest[0] if rest else node.attribute("axes")
    return () if given is None else tuple(int(axis) for axis in np.atleast_1d(given))


def _divide(a: Any, b: Any) -> Any:
    return np.trunc(a / b).astype(np.asarray(a).dtype) if np.issubdtype(np.asarray(a).dtype, np.integer) else a / b


def _unsqueeze(node: NodeView, x: Any, *rest: Any) -> Any:
    for axis in sorted(_axes(node, *rest)):
        x = np.expand_dims(x, axis)
    return x


# The ops that sizes are made with, for instance K of a TopK as Min(k, Gather(Shape(x), 1)).
_COMPUTE: dict[str, Any] = {
    "Identity": lambda node, x: x,
    "Cast": lambda node, x: x.astype(onnx.helper.tensor_dtype_to_np_dtype(node.attribute("to"))),
    "Squeeze": lambda node, x, *rest: np.squeeze(x, axis=_axes(node, *rest) or None),
    "Unsqueeze": _unsqueeze,
    "Reshape": lambda node, x, shape: np.reshape(x, tuple(int(size) for size in shape)),
    "Concat": lambda node, *xs: np.concatenate(xs, axis=node.attribute("axis")),
    "Gather": lambda node, x, index: np.take(x, index, axis=node.attribute("axis") or 0),
    "Add": lambda node, a, b: a + b,
    "Sub": lambda node, a, b: a - b,
    "Mul": lambda node, a, b: a * b,
    "Div": lambda node, a, b: _divide(a, b),
    "Mod": lambda node, a, b: np.mod(a, b),
    "Neg": lambda node, x: -x,
    "Min": lambda node, *xs: np.minimum.reduce(xs),
    "Max": lambda node, *xs: np.maximum.reduce(xs),
}
