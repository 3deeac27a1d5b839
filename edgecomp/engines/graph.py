"""The matrix products of an ONNX file, and the type that each computes in, without the package onnx.

Types follow the nodes from inputs and weights on, through the bodies of functions: a graph need not state them. What
stands in the branches of If and Loop is not looked at. Field numbers are those of onnx.proto, which never change.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from edgecomp.errors import BuildError
from edgecomp.wire import fields, varint

__all__ = ["PRODUCT_OPS", "Product", "read_products"]

# ONNX's own, then those that ONNX Runtime makes of them.
PRODUCT_OPS = frozenset({
    "MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv",
    "FusedMatMul", "TransposeMatMul", "FusedGemm", "FusedConv", "NhwcFusedConv", "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul", "QGemm",
})  # fmt: skip

_TYPES = {
    1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64",
    16: "bfloat16", 17: "float8_e4m3fn", 19: "float8_e5m2", 21: "uint4", 22: "int4", 23: "float4_e2m1fn",
}  # fmt: skip
_QUANTISED = frozenset({"int8", "uint8", "float8_e4m3fn", "float8_e5m2", "int4", "uint4", "float4_e2m1fn"})
_WIDTH = {"float64": 64, "float32": 32, "bfloat16": 16, "float16": 16}

_MODEL_GRAPH, _MODEL_FUNCTIONS = 7, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_VALUE = 1, 5, 11, 13
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OP, _NODE_ATTRIBUTE, _NODE_DOMAIN = 1, 2, 3, 4, 5, 7
_ATTRIBUTE_NAME, _ATTRIBUTE_INT, _ATTRIBUTE_TENSOR = 1, 3, 5
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME = 1, 2, 8
_VALUE_NAME, _VALUE_TYPE, _TYPE_TENSOR, _TENSOR_ELEM = 1, 2, 1, 1
_FUNCTION_NAME, _FUNCTION_INPUT, _FUNCTION_OUTPUT, _FUNCTION_NODE, _FUNCTION_DOMAIN = 1, 4, 5, 7, 10
_DEEPEST = 16  # functions that call functions

# Ops whose output is not of the first input's type: a type, or the number of the input that has it.
_OUTPUTS: dict[str, str | int] = {
    "Shape": "int64", "Size": "int64", "NonZero": "int64", "ArgMax": "int64", "ArgMin": "int64",
    "Equal": "bool", "Less": "bool", "LessOrEqual": "bool", "Greater": "bool", "GreaterOrEqual": "bool",
    "IsNaN": "bool", "IsInf": "bool", "Not": "bool", "And": "bool", "Or": "bool", "Xor": "bool",
    "Where": 1, "OneHot": 2, "CastLike": 1, "DequantizeLinear": 1, "MatMulInteger": "int32", "ConvInteger": "int32",
    "MatMulIntegerToFloat": 2, "DynamicQuantizeMatMul": 0, "DynamicQuantizeLinear": "uint8",
}  # fmt: skip
_SAME = frozenset({"Reshape", "Transpose", "Identity", "Squeeze", "Unsqueeze", "Flatten", "Cast", "Expand"})

_Content = bytes | mmap.mmap


class Product(NamedTuple):
    """A matrix product or convolution.

    Attributes:
        path: its name, then those of the functions that it stands in, the innermost first.
        op: what it is.
        dtype: the type that its operands have; behind Q/DQ the quantised one; "" where nothing tells.
        weights: elements of its constant operand; 0 where both are computed.
    """

    path: tuple[str, ...]
    op: str
    dtype: str
    weights: int

    @property
    def name(self) -> str:
        """How a message names it."""
        return " in ".join(self.path)


class _Node(NamedTuple):
    name: str
    op: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    to: int
    constant: tuple[str, int]


class _Value(NamedTuple):
    dtype: str
    behind: str = ""  # the quantised type that a DequantizeLinear read
    weights: int = 0


class _Function(NamedTuple):
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[_Node, ...]


_UNKNOWN = _Value("")
_Functions = Mapping[tuple[str, str], _Function]


def read_products(path: Path) -> tuple[Product, ...]:
    """Return the matrix products of a model in its order; weights are not read.

    Raises:
        BuildError: the file cannot be read, or is no ONNX file.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            values: dict[str, _Value] = {}
            nodes: list[_Node] = []
            functions = {}
            for number, _, begin, end in fields(content, 0, len(content)):
                if number == _MODEL_GRAPH:
                    _read_graph(content, begin, end, values, nodes)
                elif number == _MODEL_FUNCTIONS:
                    key, function = _read_function(content, begin, end)
                    functions[key] = function
            return tuple(_walk(nodes, values, functions, ()))
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise BuildError(f"{path} cannot be read: {error}; export the model again") from None
    except IndexError:
        raise BuildError(f"{path} is truncated or no ONNX file; export the model again") from None


def _walk(
    nodes: list[_Node] | tuple[_Node, ...], values: dict[str, _Value], functions: _Functions, inside: tuple[str, ...]
) -> Iterator[Product]:
    """Yield the products among nodes, and give each output its type."""
    for node in nodes:
        known = [values.get(name, _UNKNOWN) for name in node.inputs]
        name = node.name or f"node_of_{node.outputs[0] if node.outputs else ''}"  # as TensorRT's parser calls it
        function = functions.get((node.domain, node.op))
        if function is not None and len(inside) < _DEEPEST:
            inner = dict(zip(function.inputs, known, strict=False))
            yield from _walk(function.nodes, inner, functions, (name, *inside))
            for ours, theirs in zip(node.outputs, function.outputs, strict=False):
                values[ours] = _Value(inner.get(theirs, _UNKNOWN).dtype)
            continue
        if node.op in PRODUCT_OPS and (node.op != "Einsum" or len(known) > 1):
            yield Product((name, *inside), node.op, _computed(known), max((one.weights for one in known), default=0))
        for index, output in enumerate(node.outputs):
            stated = values.get(output, _UNKNOWN).dtype
            values[output] = _output(node, index, known, stated)


def _computed(known: list[_Value]) -> str:
    """Return the type in which a product computes: the quantised one where both operands are, else the wider."""
    seen = [one.behind or (one.dtype if one.dtype in _QUANTISED else "") for one in known if one is not _UNKNOWN]
    quantised = [one for one in seen if one]
    if len(quantised) >= 2:
        return "int8" if set(quantised) <= {"int8", "uint8"} else quantised[-1]
    types = [one.dtype for one in known[:2] if one.dtype]
    return max(types, key=lambda dtype: _WIDTH.get(dtype, 0), default="")


def _output(node: _Node, index: int, known: list[_Value], stated: str) -> _Value:
    """Return what is known of one output of a node."""
    first = known[0] if known else _UNKNOWN
    if node.op == "Constant":
        return _Value(node.constant[0], "", node.constant[1])
    if node.op == "Cast":
        return _Value(_TYPES.get(node.to, ""), "", first.weights)
    if node.op == "QuantizeLinear":
        zero = known[2].dtype if len(known) > 2 else ""
        return _Value(zero or _TYPES.get(node.to, "uint8"), "", first.weights)
    if node.op == "DequantizeLinear":
        return _Value(known[1].dtype if len(known) > 1 else "", first.dtype, first.weights)
    rule = _OUTPUTS.get(node.op, 0)
    if node.op == "TopK" and index == 1:
        rule = "int64"
    dtype = rule if isinstance(rule, str) else (known[rule].dtype if rule < len(known) else "")
    if node.op in _SAME:
        return _Value(dtype or stated, first.behind, first.weights)
    return _Value(stated or dtype)


def _read_graph(content: _Content, begin: int, end: int, values: dict[str, _Value], nodes: list[_Node]) -> None:
    for number, _, at, to in fields(content, begin, end):
        if number == _GRAPH_NODE:
            nodes.append(_read_node(content, at, to))
        elif number == _GRAPH_INITIALIZER:
            name, dtype, count = _read_tensor(content, at, to)
            values[name] = _Value(dtype, "", count)
        elif number in (_GRAPH_INPUT, _GRAPH_VALUE):
            name, dtype = _read_value(content, at, to)
            if values.get(name, _UNKNOWN).weights == 0:  # an initializer may be listed among the inputs too
                values[name] = _Value(dtype)


def _read_function(content: _Content, begin: int, end: int) -> tuple[tuple[str, str], _Function]:
    name = domain = ""
    inputs, outputs, nodes = [], [], []
    for number, _, at, to in fields(content, begin, end):
        if number == _FUNCTION_NODE:
            nodes.append(_read_node(content, at, to))
        elif number == _FUNCTION_NAME:
            name = _text(content, at, to)
        elif number == _FUNCTION_DOMAIN:
            domain = _text(content, at, to)
        elif number == _FUNCTION_INPUT:
            inputs.append(_text(content, at, to))
        elif number == _FUNCTION_OUTPUT:
            outputs.append(_text(content, at, to))
    return (domain, name), _Function(tuple(inputs), tuple(outputs), tuple(nodes))


def _read_node(content: _Content, begin: int, end: int) -> _Node:
    name = op = domain = ""
    kind, constant = 0, ("", 0)
    inputs, outputs, attributes = [], [], []
    for number, _, at, to in fields(content, begin, end):
        if number == _NODE_INPUT:
            inputs.append(_text(content, at, to))
        elif number == _NODE_OUTPUT:
            outputs.append(_text(content, at, to))
        elif number == _NODE_NAME:
            name = _text(content, at, to)
        elif number == _NODE_OP:
            op = _text(content, at, to)
        elif number == _NODE_DOMAIN:
            domain = _text(content, at, to)
        elif number == _NODE_ATTRIBUTE:
            attributes.append((at, to))
    if op in ("Constant", "Cast", "QuantizeLinear"):
        for at, to in attributes:
            kind, constant = _read_attribute(content, at, to, kind, constant)
    return _Node(name, op, domain, tuple(inputs), tuple(outputs), kind, constant)


def _read_attribute(
    content: _Content, begin: int, end: int, kind: int, constant: tuple[str, int]
) -> tuple[int, tuple[str, int]]:
    """Return the type that an attribute `to` or `output_dtype` names, and the type and size of a tensor `value`."""
    name, number_is = "", 0
    for number, start, at, to in fields(content, begin, end):
        if number == _ATTRIBUTE_NAME:
            name = _text(content, at, to)
        elif number == _ATTRIBUTE_INT:
            number_is = _integer(content, start)
        elif number == _ATTRIBUTE_TENSOR:
            constant = _read_tensor(content, at, to)[1:]
    return (number_is if name in ("to", "output_dtype") else kind), constant


def _read_tensor(content: _Content, begin: int, end: int) -> tuple[str, str, int]:
    """Return name, type and number of elements."""
    name, kind, count = "", 0, 1
    for number, start, at, to in fields(content, begin, end):
        if number == _TENSOR_NAME:
            name = _text(content, at, to)
        elif number == _TENSOR_TYPE:
            kind = _integer(content, start)
        elif number == _TENSOR_DIMS and at < to:  # packed
            while at < to:
                size, at = varint(content, at)
                count *= size
        elif number == _TENSOR_DIMS:
            count *= _integer(content, start)
    return name, _TYPES.get(kind, ""), count


def _read_value(content: _Content, begin: int, end: int) -> tuple[str, str]:
    name, kind = "", 0
    for number, _, at, to in fields(content, begin, end):
        if number == _VALUE_NAME:
            name = _text(content, at, to)
        elif number == _VALUE_TYPE:
            for inner, _, inner_at, inner_to in fields(content, at, to):
                if inner == _TYPE_TENSOR:
                    for field, start, _, _ in fields(content, inner_at, inner_to):
                        kind = _integer(content, start) if field == _TENSOR_ELEM else kind
    return name, _TYPES.get(kind, "")


def _text(content: _Content, begin: int, end: int) -> str:
    return content[begin:end].decode(errors="replace")


def _integer(content: _Content, start: int) -> int:
    """Return the value of a varint field that starts here."""
    return varint(content, varint(content, start)[1])[0]
