"""The costs of a vision transformer from its numbers, for published latencies whose files nobody has.

The ops are those that edgecomp's own export of a plain timm ViT has, so that both go through the same rules.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from edgecomp.specs.costs import GraphCosts, Kind, OpCost, ValueCost, multiply_adds

__all__ = ["Geometry", "transformer_costs"]

Count = Annotated[int, Meta(ge=1, le=1 << 20)]


class Geometry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A plain vision transformer.

    Attributes:
        tokens: in the sequence, with class token.
        dim, depth, heads, mlp: width, blocks, heads, and width inside the MLP.
        patch: numbers in a patch: 3 channels of 16 by 16 are 768.
    """

    tokens: Count
    dim: Count
    depth: Count
    heads: Count
    mlp: Count
    patch: Count


class _Maker:
    """Collects ops and values."""

    def __init__(self) -> None:
        self.ops: list[OpCost] = []
        self.values: dict[str, ValueCost] = {}
        self.weights: dict[str, ValueCost] = {}
        self.block = "front"

    def add(self, op: str, kind: Kind, reads: tuple[str, ...], dims: tuple[int, ...], *weights: tuple[int, ...]) -> str:
        """Add an op and return the name of what it makes."""
        name = f"{op}_{len(self.ops)}"
        self.values[name] = ValueCost(dims, "float32")
        named = []
        for place, shape in enumerate(weights):
            named.append(f"{name}.{place}")
            self.weights[named[-1]] = ValueCost(shape, "float32", moves=False)
        shapes = [self.values[one].dims for one in reads] + list(weights)
        flops = 2 * multiply_adds(op, shapes, [dims])
        self.ops.append(
            OpCost(
                name=name,
                op=op,
                module="",
                block=self.block,
                kind=kind,
                role="model",
                call="",
                flops=flops,
                reads=reads,
                writes=(name,),
                weights=tuple(named),
                dtype="float32",
                of_weights=bool(flops and weights),
                bytes_read=sum(self.values[one].size for one in reads),
                bytes_written=self.values[name].size,
                weight_bytes=sum(self.weights[one].size for one in named),
            )
        )
        return name

    def linear(self, value: str, dims: tuple[int, ...], out: int) -> str:
        """Add a product with weights and its bias."""
        made = self.add("MatMul", "matmul", (value,), (*dims[:-1], out), (dims[-1], out))
        return self.add("Add", "elementwise", (made,), (*dims[:-1], out), (out,))


def transformer_costs(geometry: Geometry, *, batch: int = 1, name: str = "") -> GraphCosts:
    """Return the costs of a plain pre-norm vision transformer without a head."""
    shape, maker = geometry, _Maker()
    whole = (batch, shape.tokens, shape.dim)
    size = shape.dim // shape.heads
    split = (batch, shape.heads, shape.tokens, size)
    maker.values["patches"] = ValueCost((batch, shape.tokens, shape.patch), "float32")
    x = maker.linear("patches", (batch, shape.tokens, shape.patch), shape.dim)
    x = maker.add("Add", "elementwise", (x,), whole, whole[1:])
    for block in range(shape.depth):
        maker.block = f"blocks.{block}"
        y = maker.add("LayerNormalization", "norm", (x,), whole, (shape.dim,), (shape.dim,))
        y = maker.linear(y, whole, 3 * shape.dim)
        query, key, value = (maker.add("Slice", "move", (y,), split) for _ in range(3))
        key = maker.add("Transpose", "move", (key,), (batch, shape.heads, size, shape.tokens))
        scores = (batch, shape.heads, shape.tokens, shape.tokens)
        y = maker.add("MatMul", "matmul", (query, key), scores)
        y = maker.add("Softmax", "softmax", (y,), scores)
        y = maker.add("MatMul", "matmul", (y, value), split)
        y = maker.add("Transpose", "move", (y,), whole)
        x = maker.add("Add", "elementwise", (x, maker.linear(y, whole, shape.dim)), whole)
        y = maker.add("LayerNormalization", "norm", (x,), whole, (shape.dim,), (shape.dim,))
        wide = (batch, shape.tokens, shape.mlp)
        y = maker.add("Gelu", "elementwise", (maker.linear(y, whole, shape.mlp),), wide)
        x = maker.add("Add", "elementwise", (x, maker.linear(y, wide, shape.dim)), whole)
    maker.block = "back"
    x = maker.add("LayerNormalization", "norm", (x,), whole, (shape.dim,), (shape.dim,))
    return GraphCosts(name, batch, shape.tokens, ("patches",), (x,), tuple(maker.ops), maker.values, maker.weights)
