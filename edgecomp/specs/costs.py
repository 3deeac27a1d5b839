"""What a static graph costs, counted from its shapes alone: the noun that estimates are made of.

Made by `export/costs.py` from an ONNX file, and by `estimates/geometry.py` from the numbers of a vision transformer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edgecomp.specs.target import Precision

__all__ = [
    "ELEMENT_BYTES",
    "FLOATS",
    "LARGEST",
    "PRECISION_OF",
    "RECURRENT",
    "Amount",
    "GraphCosts",
    "Kind",
    "OpCost",
    "Role",
    "Us",
    "ValueCost",
    "Whole",
    "multiply_adds",
]

Kind = Literal[
    "matmul",  # a matrix product or one with constants; Gemm, Einsum of two operands
    "conv",
    "attention",  # an op that is a whole attention
    "norm",
    "softmax",
    "elementwise",
    "reduce",
    "move",  # bytes that change their place: Transpose, Slice, Concat, Expand
    "view",  # a new shape of the same bytes: Reshape, Squeeze; and DequantizeLinear, which its reader does
    "sort",  # TopK, ArgMax
    "gather",
    "scatter",
    "other",
]
Role = Literal["model", "selection", "merge"]

ELEMENT_BYTES: dict[str, float] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8e4m3fn": 1,
    "float8e5m2": 1,
    "float4e2m1": 0.5,
    "int64": 8,
    "uint64": 8,
    "int32": 4,
    "uint32": 4,
    "int16": 2,
    "uint16": 2,
    "int8": 1,
    "uint8": 1,
    "int4": 0.5,
    "uint4": 0.5,
    "bool": 1,
}
#: The precision that a product of a type runs in.
PRECISION_OF: dict[str, Precision] = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "int8": "int8",
    "uint8": "int8",
    "float8e4m3fn": "fp8",
    "float8e5m2": "fp8",
    "float4e2m1": "fp4",
}
RECURRENT = ("LSTM", "GRU", "RNN")
FLOATS = frozenset({"float64", "float32", "float16", "bfloat16", "float8e4m3fn", "float8e5m2", "float4e2m1"})


LARGEST = 1e15
#: What a document of figures can hold: one that was edited beyond it is refused, before anything is computed of it.
Whole = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Amount = Annotated[float, Meta(ge=0, le=LARGEST)]
Us = Annotated[float, Meta(ge=1e-6, le=LARGEST)]  # of a kernel, which takes at least its launch


class ValueCost(msgspec.Struct, frozen=True, gc=False):
    """A value between two ops.

    Attributes:
        dims: its dimensions.
        dtype: as the op lists write it, `float32`.
        moves: it is computed from the inputs of the graph, so that a larger batch makes it larger.
    """

    dims: tuple[int, ...]
    dtype: str
    moves: bool = True

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.dims)

    @property
    def size(self) -> float:
        """Bytes."""
        return self.elements * ELEMENT_BYTES.get(self.dtype, 4)


class OpCost(msgspec.Struct, frozen=True, gc=False):
    """One op.

    Attributes:
        name, op: of the node; the op of the file, also inside an inlined function.
        module: the torch module that it came from; "" where the file does not say.
        block: the repeated part of the model it is in, `blocks.3`; `front` and `back` for what lies around these.
        kind: what a runtime does for it.
        role: whom it serves: `merge` for what moves tokens together, `selection` for what decides which.
        call: name of the node of an edgecomp function that it was inlined from; "" for all others.
        flops: 2 for each multiply-add of matrix products and convolutions, and 0 for everything else.
        reads, writes: values that the model computes, in `GraphCosts.values`.
        weights: weights and constants it reads, in `GraphCosts.weights`.
        dtype: what it computes in; of a product, the type of what it multiplies.
        of_weights: one side of the product is constant.
        bytes_read, bytes_written, weight_bytes: in the types of the file, each value once; `bytes_read` without
            weights.
    """

    name: str
    op: str
    module: str
    block: str
    kind: Kind
    role: Role
    call: str
    flops: int
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    weights: tuple[str, ...]
    dtype: str
    of_weights: bool = False
    bytes_read: float = 0
    bytes_written: float = 0
    weight_bytes: float = 0


class GraphCosts(msgspec.Struct, frozen=True):
    """A graph as estimates see it: its ops in an order they can run in, and the values between them.

    Attributes:
        file: name of the file, or of what was counted.
        batch: the first dimension that all inputs share; 0 where they share none.
        tokens: how many tokens the ops work on, by the norms of the graph; 0 where nothing tells.
        inputs, outputs: names in `values`.
        values: what is computed, and the inputs.
        weights: what is constant; in the type it is stored in.
        notes: what was taken for granted.
    """

    file: str
    batch: int
    tokens: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ops: tuple[OpCost, ...]
    values: dict[str, ValueCost]
    weights: dict[str, ValueCost]
    notes: tuple[str, ...] = ()

    @property
    def flops(self) -> int:
        """Of one run."""
        return sum(op.flops for op in self.ops)

    @property
    def weight_bytes(self) -> float:
        """Of all weights and constants, each once."""
        return sum(weight.size for weight in self.weights.values())

    @property
    def precision(self) -> str:
        """What most multiply-adds are computed in: `fp32`, `fp16`, `bf16`, `int8` or `fp8`."""
        by_type: dict[str, int] = {}
        for op in self.ops:
            by_type[op.dtype] = by_type.get(op.dtype, 0) + op.flops
        most = max(by_type, key=lambda dtype: by_type[dtype], default="float32")
        return PRECISION_OF.get(most, "fp32")


def multiply_adds(
    op: str,
    inputs: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int]],
    *,
    transposed: bool = False,
    equation: str = "",
    past: int = 0,
) -> int:
    """Return the multiply-adds of one op from its shapes; 0 for ops that are no matrix product or convolution.

    This is the one place that says how FLOPs are counted: 2 for each of these, as torch's own counter does.

    Args:
        op: of ONNX's own domain.
        inputs, outputs: shapes.
        transposed: Gemm's transA.
        equation: Einsum's.
        past: keys of an Attention's cache, beside those of its input.

    Raises:
        ValueError: an Einsum of more than two operands, which a runtime may order as it likes; a recurrent op, whose
            steps wait for each other, so that its products tell no time.
    """
    if op in ("MatMul", "MatMulInteger"):
        return math.prod(outputs[0]) * inputs[0][-1]
    if op == "QLinearMatMul":
        return math.prod(outputs[0]) * inputs[0][-1]
    if op == "Gemm":
        return math.prod(outputs[0]) * inputs[0][0 if transposed else 1]
    if op in ("Conv", "ConvInteger"):  # weight (out, in / groups, k...)
        return math.prod(outputs[0]) * math.prod(inputs[1][1:])
    if op == "QLinearConv":
        return math.prod(outputs[0]) * math.prod(inputs[3][1:])
    if op == "ConvTranspose":  # weight (in, out / groups, k...)
        return math.prod(inputs[0]) * math.prod(inputs[1][1:])
    if op == "Einsum":
        return _einsum(equation, inputs)
    if op == "Attention":
        return _attention(inputs, past)
    if op in RECURRENT:
        raise ValueError(f"{op} is recurrent: its steps run one after another, which is not modelled")
    return 0


def _einsum(equation: str, inputs: Sequence[Sequence[int]]) -> int:
    """Every label once: the size of the loop nest that a product of two operands is."""
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    if len(terms) == 1:
        return 0
    if len(terms) > 2:
        raise ValueError(f"the Einsum {equation!r} has {len(terms)} operands")
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, inputs, strict=False):
        before, dots, after = term.partition("...")
        middle = len(shape) - len(before) - len(after) if dots else 0
        labels = [*before, *(f".{place - middle}" for place in range(middle)), *after]
        for label, size in zip(labels, shape, strict=True):
            sizes[label] = max(sizes.get(label, 1), size)
    return math.prod(sizes.values())


def _attention(inputs: Sequence[Sequence[int]], past: int) -> int:
    """Query with keys, those of the cache too, then with values; (B, H, N, D), or (B, N, H * D)."""
    query, key, value = inputs[:3]
    heads = query[1] if len(query) == 4 else 1
    of_values = value[-1] * (heads if len(query) == 4 else query[-1] // key[-1])
    return query[0] * query[-2] * (past + key[-2]) * (heads * query[-1] + of_values)
