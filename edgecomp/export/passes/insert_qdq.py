"""Puts QuantizeLinear and DequantizeLinear around linear layers, so that they run in int8 or fp8.

Symmetric throughout: no zero points other than 0, no quantised biases. TensorRT takes nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import ml_dtypes
import msgspec
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgecomp.errors import ExportError, InvalidSpec
from edgecomp.export.modules import MODULE_KEY, module_of
from edgecomp.export.ranges import Range, Threshold

__all__ = ["QuantizedNode", "ScaleType", "insert_qdq", "quantizable", "tensors_to_calibrate"]

Kind = Literal["int8", "fp8"]
ScaleType = Literal["fp32", "fp16", "bf16"]
_Float = npt.NDArray[np.float32]

_LEVELS = {"int8": 127.0, "fp8": 448.0}
_DTYPES = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}
_SCALE_TYPES: dict[str, Any] = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}

# What these read as input 0 decides which tokens stay, and no value of it reaches an output.
_SELECTS = frozenset({"TopK", "ArgMax", "ArgMin", "TopKMerge", "Greater", "Less", "Equal", "NonZero"})
_SELECTS |= frozenset({"GreaterOrEqual", "LessOrEqual"})


class QuantizedNode(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One node that computes on quantised numbers.

    Attributes:
        node: its name.
        op: MatMul, Gemm or Conv, as it was.
        module: the torch module that it came from, or "".
        weight: its constant, or "" where both factors are activations.
        activations: what else it reads, with the largest magnitude that each can hold.
    """

    node: str
    op: str
    module: str
    weight: str
    activations: tuple[tuple[str, float], ...]


class _Site(msgspec.Struct, frozen=True):
    """A node to quantise: which input is a weight, the weight's channel axis, and which inputs are activations."""

    node: ir.Node
    weight: int  # -1: none
    axis: int
    activations: tuple[int, ...]


def tensors_to_calibrate(
    model: ir.Model, *, attention: bool = False, convs: bool = False, keep: Callable[[ir.Node], bool] | None = None
) -> tuple[str, ...]:
    """Return the activations whose ranges `insert_qdq` needs with the same words."""
    sites = _sites(model, attention=attention, convs=convs, keep=keep)
    return tuple(dict.fromkeys(str(site.node.inputs[index].name) for site in sites for index in site.activations))  # type: ignore[union-attr]


def quantizable(model: ir.Model, *, attention: bool = False, convs: bool = False) -> tuple[ir.Node, ...]:
    """Return the nodes that would be quantised, in the graph's order."""
    return tuple(site.node for site in _sites(model, attention=attention, convs=convs, keep=None))


def insert_qdq(
    model: ir.Model,
    ranges: Mapping[str, Range],
    *,
    kind: Kind,
    threshold: Threshold = "absmax",
    scale_type: ScaleType = "fp32",
    attention: bool = False,
    convs: bool = False,
    keep: Callable[[ir.Node], bool] | None = None,
) -> tuple[QuantizedNode, ...]:
    """Quantise the linear layers of an fp32 graph in place, weights per output channel, activations per tensor.

    A weight is stored quantised, with DequantizeLinear alone; its scales come from the weight alone, so that graphs
    that share a weight share its quantised form too. An activation that several nodes read is quantised once. fp8 is
    E4M3, with one scale for a whole weight. Gemm becomes MatMul and Add, because ONNX Runtime has an int8 kernel for
    a Gemm only where its bias is quantised, which TensorRT refuses.

    A bias behind a product of rank 3 or more gets that rank. The sum is the same, but ONNX Runtime would join product
    and bias of rank 1 to a Gemm before it looks for quantised products, and would then compute in fp32.

    Layers whose result only decides which tokens stay keep their type: an error there exchanges whole tokens.

    Args:
        model: the graph, opset 19 or newer.
        ranges: of the activations that `tensors_to_calibrate` lists.
        kind: int8 or fp8.
        threshold: how a range becomes a scale; fp8 takes absmax whatever is given here, as it has its own exponent.
        scale_type: scales are rounded up to numbers that this type holds, and stored in fp32, so that a pass which
            stores them in that type later changes no result.
        attention: quantise the two products of attention as well.
        convs: quantise Conv as well.
        keep: nodes for which it is true keep their type.

    Returns:
        what was quantised, in the graph's order; empty where the graph has no linear layer.

    Raises:
        InvalidSpec: the kind or scale type is not one of those above, or the opset is too old.
        ExportError: a range is missing.
    """
    if kind not in _LEVELS:
        raise InvalidSpec(f"no quantised type {kind!r}; choices: {', '.join(_LEVELS)}")
    if scale_type not in _SCALE_TYPES:
        raise InvalidSpec(f"no scale type {scale_type!r}; choices: {', '.join(_SCALE_TYPES)}")
    if (opset := model.opset_imports.get("", 0)) < 19:  # fp8, and scales in fp16
        raise InvalidSpec(f"{kind} needs opset 19 or newer, and the graph is at {opset}; export with --opset 20")
    sites = _sites(model, attention=attention, convs=convs, keep=keep)
    writer = _Writer(model, ranges, kind, threshold, scale_type)
    found = []
    for site in sites:
        op, weight = site.node.op_type, ""
        if site.weight >= 0:
            weight = str(site.node.inputs[site.weight].name)  # type: ignore[union-attr]
        if op == "Gemm":
            site = writer.as_matmul(site)
        if site.weight >= 0:
            writer.quantize_weight(site)
        writer.widen_bias(site.node)
        read = tuple(writer.quantize_activation(site.node, index) for index in site.activations)
        found.append(QuantizedNode(site.node.name or "", op, module_of(site.node), weight, read))
    writer.drop_unread()
    return tuple(found)


class _Writer:
    """Adds the nodes and constants of one graph, each tensor once."""

    def __init__(
        self, model: ir.Model, ranges: Mapping[str, Range], kind: Kind, threshold: Threshold, scale_type: ScaleType
    ) -> None:
        self._graph = model.graph
        self._ranges = ranges
        self._kind = kind
        self._threshold: Threshold = threshold if kind == "int8" else "absmax"
        self._scale_type = scale_type
        self._activations: dict[ir.Value, tuple[ir.Value, float]] = {}
        self._replaced: list[ir.Value] = []

    def as_matmul(self, site: _Site) -> _Site:
        """Replace a Gemm by MatMul and Add under its name."""
        node = site.node
        first, weight, *bias = node.inputs
        if weight is not None and site.axis == 0:  # transB: (N, K)
            self._replaced.append(weight)
            name = f"{weight.name}.transposed"
            weight = self._graph.initializers.get(name) or self._constant(name, _array(weight).T)
        product = ir.node("MatMul", [first, weight], name=node.name)
        out = node.outputs[0]
        after = [product]
        if bias and bias[0] is not None:
            after.append(ir.node("Add", [product.outputs[0], bias[0]], name=f"{node.name}.bias"))
            _describe(product.outputs[0], f"{out.name}.product", out.shape, out.dtype)
        for new in after:
            new.metadata_props.update(node.metadata_props)
        last = after[-1].outputs[0]
        _describe(last, str(out.name), out.shape, out.dtype)
        ir.convenience.replace_nodes_and_values(self._graph, node, [node], after, [out], [last])
        return _Site(product, 1, 1, (0,))

    def quantize_activation(self, node: ir.Node, index: int) -> tuple[str, float]:
        """Put the pair before input `index` of a node, or use the one that is there; return name and largest value."""
        value = node.inputs[index]
        assert value is not None
        if value not in self._activations:
            self._activations[value] = self._add_pair(node, value)
        pair, largest = self._activations[value]
        node.replace_input_with(index, pair)
        return str(value.name), largest

    def quantize_weight(self, site: _Site) -> None:
        """Exchange a node's weight for its quantised form and the node that gives it back.

        Each node gets constants of its own, equal where the weight is one: a weights file holds them once, and ONNX
        Runtime, where it rewrites weights for CPUs without VNNI, fails if two nodes share them.
        """
        node = site.node
        value = node.inputs[site.weight]
        assert value is not None
        node.replace_input_with(site.weight, self._add_weight(node, value, site.axis))
        self._replaced.append(value)

    def widen_bias(self, node: ir.Node) -> None:
        """Give a bias that is added to a node's result the rank of the result."""
        result = node.outputs[0]
        uses = result.uses()
        if node.op_type != "MatMul" or len(uses) != 1 or result.shape is None or len(result.shape) < 3:
            return
        add = next(iter(uses)).node
        if add.op_type != "Add":
            return
        index = 1 if add.inputs[0] is result else 0
        bias = add.inputs[index]
        if bias is None or not bias.is_initializer() or bias.shape is None or len(bias.shape) != 1:
            return
        wide = (1,) * (len(result.shape) - 1) + (-1,)
        name = f"{bias.name}.rank{len(wide)}"
        known = self._graph.initializers.get(name)
        add.replace_input_with(index, known or self._constant(name, _array(bias).reshape(wide)))
        self._replaced.append(bias)

    def drop_unread(self) -> None:
        """Remove the constants that nothing reads any more."""
        for value in dict.fromkeys(self._replaced):
            if not value.uses() and not value.is_graph_output():
                self._graph.initializers.pop(str(value.name), None)

    def _add_pair(self, node: ir.Node, value: ir.Value) -> tuple[ir.Value, float]:
        name = str(value.name)
        if name not in self._ranges:
            raise ExportError(
                f"node {node.name!r} reads {name!r}, whose range was not collected; calibrate the values that "
                "tensors_to_calibrate lists with the same words"
            )
        largest = self._ranges[name].threshold(self._threshold)
        scale = self._scale(np.float32(largest), f"{name}.scale")
        zero = self._zeros(f"zero.{self._kind}", ())
        quantize = ir.node("QuantizeLinear", [value, scale, zero], name=f"{name}.quantize")
        dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero], name=f"{name}.dequantize")
        for new, suffix, dtype in ((quantize, self._kind, _DTYPES[self._kind]), (dequantize, "float", value.dtype)):
            _describe(new.outputs[0], f"{name}.{suffix}", value.shape, dtype)
            self._insert(node, new)
        return dequantize.outputs[0], float(_array(scale)) * _LEVELS[self._kind]

    def _add_weight(self, node: ir.Node, value: ir.Value, axis: int) -> ir.Value:
        weight = _array(value)
        name = f"{value.name}.{self._kind}"
        name += next(tail for tail in _tails() if f"{name}{tail}" not in self._graph.initializers)
        others = tuple(other for other in range(weight.ndim) if other != axis)
        per_channel = self._kind == "int8"
        largest = np.abs(weight).max(axis=others) if per_channel else np.abs(weight).max()
        scale = self._scale(np.asarray(largest, dtype=np.float32), f"{name}.scale")
        steps = np.expand_dims(_array(scale), others) if per_channel else _array(scale)
        limit = _LEVELS[self._kind]
        levels = np.clip(weight / steps, -limit, limit)
        stored = self._constant(name, (np.rint(levels) if per_channel else levels).astype(_DTYPES[self._kind].numpy()))
        attributes = {"axis": axis} if per_channel else {}
        zero = self._zeros(f"{name}.zero", _array(scale).shape)
        dequantize = ir.node("DequantizeLinear", [stored, scale, zero], attributes, name=f"{name}.dequantize")
        _describe(dequantize.outputs[0], f"{name}.float", value.shape, value.dtype)
        self._insert(node, dequantize)
        return dequantize.outputs[0]

    def _scale(self, largest: _Float | np.float32, name: str) -> ir.Value:
        """Return a scale: `largest` over the levels, rounded up in the type that will hold it; 1 where all is 0."""
        exact = np.asarray(largest, dtype=np.float64) / _LEVELS[self._kind]
        dtype = _SCALE_TYPES[self._scale_type]
        rounded = np.asarray(exact.astype(dtype))
        rounded = np.where(rounded.astype(np.float64) < exact, np.nextafter(rounded, dtype(np.inf)), rounded)
        scale = np.where(exact == 0, 1.0, rounded.astype(np.float64)).astype(np.float32)
        return self._constant(name, scale)

    def _zeros(self, name: str, shape: tuple[int, ...]) -> ir.Value:
        """Return zero points: ONNX Runtime wants them to be there, and of the scale's shape."""
        known = self._graph.initializers.get(name)
        return known or self._constant(name, np.zeros(shape, dtype=_DTYPES[self._kind].numpy()))

    def _constant(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        array = np.ascontiguousarray(array).reshape(array.shape)
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        _describe(value, name, ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype))
        self._graph.initializers[name] = value
        return value

    def _insert(self, node: ir.Node, new: ir.Node) -> None:
        if module := module_of(node):
            new.metadata_props[MODULE_KEY] = module
        self._graph.insert_before(node, new)


def _tails() -> Iterator[str]:
    """Yield what tells equal constants apart: nothing, .1, .2, ..."""
    yield ""
    yield from (f".{number}" for number in itertools.count(1))


_SMALLEST_SIDE = 16  # of a weight; below it no hardware gains, and what is that small is a score or a head


def _sites(
    model: ir.Model, *, attention: bool, convs: bool, keep: Callable[[ir.Node], bool] | None
) -> tuple[_Site, ...]:
    """Return what to quantise, in the graph's order."""
    valued = _nodes_with_value(model.graph) & _nodes_of_inputs(model.graph)
    found = (_site(node, attention=attention, convs=convs) for node in model.graph if node in valued)
    return tuple(site for site in found if site is not None and not (keep is not None and keep(site.node)))


def _site(node: ir.Node, *, attention: bool, convs: bool) -> _Site | None:
    if node.domain not in ("", "ai.onnx") or len(node.inputs) < 2 or node.inputs[0] is None or node.inputs[1] is None:
        return None
    first, second = node.inputs[0], node.inputs[1]
    if first.dtype != ir.DataType.FLOAT or _is_constant(first):
        return None
    weight = second.const_value is not None and second.is_initializer()
    sides = tuple(int(size) for size in second.shape or () if isinstance(size, int))
    large = weight and len(sides) >= 2 and min(sides[:2]) >= _SMALLEST_SIDE
    if node.op_type == "MatMul" and large and len(sides) == 2:
        return _Site(node, 1, 1, (0,))
    if node.op_type == "Gemm" and large and _is_plain(node):
        return _Site(node, 1, 0 if _int(node, "transB") else 1, (0,))
    if node.op_type == "Conv" and convs and weight:
        return _Site(node, 1, 0, (0,))
    if node.op_type == "MatMul" and attention and not _is_constant(second) and _is_attention(node):
        return _Site(node, -1, -1, (0, 1))
    return None


def _nodes_with_value(graph: ir.Graph) -> set[ir.Node]:
    """Return the nodes whose result reaches an output as a value, not only by deciding which tokens stay."""
    found: set[ir.Node] = set()
    waiting = [value.producer() for value in graph.outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in found:
            continue
        found.add(node)
        skipped = 1 if node.op_type in _SELECTS else 0
        if node.op_type in ("Greater", "Less", "Equal", "GreaterOrEqual", "LessOrEqual"):
            skipped = len(node.inputs)
        waiting += [value.producer() for value in node.inputs[skipped:] if value is not None]
    return found


def _nodes_of_inputs(graph: ir.Graph) -> set[ir.Node]:
    """Return the nodes whose result depends on an input: all others fold to constants, which gain nothing by int8.

    ONNX Runtime 1.32 fails on three quantised layers that read one such constant ("replace the existing tensor").
    """
    fed = set(graph.inputs)
    found: set[ir.Node] = set()
    for node in graph:
        if any(value in fed for value in node.inputs if value is not None):
            found.add(node)
            fed.update(node.outputs)
    return found


def _is_attention(node: ir.Node) -> bool:
    """Tell whether a product of two activations makes the scores of a softmax, or weighs values by one."""
    first = node.inputs[0]
    maker = first.producer() if first is not None else None
    if maker is not None and maker.op_type == "Softmax":
        return True
    value = node.outputs[0]
    while True:
        readers = [use.node for use in value.uses()]
        if any(reader.op_type == "Softmax" for reader in readers):
            return True
        following = [reader for reader in readers if reader.op_type in ("Add", "Mul", "Div", "Where")]
        if len(following) != 1:
            return False
        value = following[0].outputs[0]


def _describe(value: ir.Value, name: str, shape: ir.Shape | None, dtype: ir.DataType | None) -> None:
    value.name, value.shape = name, shape
    if dtype is not None:
        value.dtype = dtype


def _is_plain(node: ir.Node) -> bool:
    """Tell whether a Gemm is a linear layer: no factors, no transposed input."""
    factors = (_float(node, "alpha"), _float(node, "beta"))
    return factors == (1.0, 1.0) and not _int(node, "transA")


def _is_constant(value: ir.Value) -> bool:
    return value.const_value is not None


def _int(node: ir.Node, name: str) -> int:
    return node.attributes[name].as_int() if name in node.attributes else 0


def _float(node: ir.Node, name: str) -> float:
    return node.attributes[name].as_float() if name in node.attributes else 1.0


def _array(value: ir.Value) -> npt.NDArray[Any]:
    if value.const_value is None:
        raise ExportError(f"the weight {value.name!r} has no value; keep initializers in the graph while quantising")
    return value.const_value.numpy()
