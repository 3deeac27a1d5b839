"""A graph as if fewer tokens reached the later blocks: what a compressor inside the encoder could save at best."""

from __future__ import annotations

from msgspec.structs import replace

from edgecomp.errors import InvalidSpec
from edgecomp.specs.costs import GraphCosts, OpCost, ValueCost

__all__ = ["blocks_of", "with_fewer_tokens"]

_FEWEST_BLOCKS = 2


def blocks_of(costs: GraphCosts) -> tuple[str, ...]:
    """Return the repeated parts of a graph, in order: those that hold a product and a norm or softmax.

    Raises:
        InvalidSpec: there are fewer than two, or nothing says on how many tokens the graph works.
    """
    blocks = dict.fromkeys(op.block for op in costs.ops if op.flops and op.block not in ("front", "back"))
    if len(blocks) < _FEWEST_BLOCKS or not costs.tokens:
        raise InvalidSpec(
            f"{costs.file}: {len(blocks)} blocks and {costs.tokens or 'no'} tokens were found, and --go-no-go needs a "
            "transformer whose blocks and attention the file shows; give the plain vision transformer's ONNX file"
        )
    return tuple(blocks)


def with_fewer_tokens(costs: GraphCosts, *, tokens: int, behind: int) -> GraphCosts:
    """Return the costs of a graph whose blocks from number `behind` on work on so many tokens.

    Sizes equal to the graph's number of tokens shrink, at the place where a token axis stands; choosing and moving
    tokens costs nothing here, so this is what a method can reach at best.

    Raises:
        InvalidSpec: `tokens` is none, or more than the graph has; no such block.
    """
    blocks = blocks_of(costs)
    if not 1 <= tokens <= costs.tokens:
        raise InvalidSpec(f"{tokens} tokens are not between 1 and the {costs.tokens} of {costs.file}")
    if not 0 <= behind < len(blocks):
        raise InvalidSpec(f"block {behind} is not one of the {len(blocks)} blocks of {costs.file}")
    late = {*blocks[behind:], "back"}
    ratio = tokens / costs.tokens
    values = dict(costs.values)
    scores = _scores(costs)
    ops = []
    for op in costs.ops:
        if op.block not in late:
            ops.append(op)
            continue
        power = _power(op, scores)
        for name in op.writes:
            values[name] = _shrunk(costs.values[name], costs.tokens, tokens, both=name in scores)
        ops.append(replace(op, flops=round(op.flops * ratio**power)))
    return replace(costs, ops=tuple(ops), values=values)


def _scores(costs: GraphCosts) -> set[str]:
    """Return the values whose last two axes are both tokens: from the product of queries and keys to that with values.

    Their sizes do not tell them: where the heads are as wide as there are tokens, queries and values are square too.
    """

    def is_square(name: str) -> bool:
        dims = costs.values[name].dims
        return len(dims) >= 3 and dims[-1] == dims[-2] == costs.tokens

    found: set[str] = set()
    for op in costs.ops:
        reads_scores = any(name in found for name in op.reads)
        if reads_scores == (op.kind == "matmul") or op.of_weights:
            continue  # the product with values, or nothing of attention
        if op.kind == "matmul" or reads_scores:
            found.update(name for name in (*op.writes, *(op.reads if reads_scores else ())) if is_square(name))
    return found


def _power(op: OpCost, scores: set[str]) -> int:
    """Return how often the number of tokens is a factor of an op's FLOPs: twice inside attention, else once."""
    if not op.flops:
        return 0
    if op.of_weights:
        return 1
    return 2 if op.kind == "attention" or any(name in scores for name in (*op.reads, *op.writes)) else 1


def _shrunk(value: ValueCost, old: int, new: int, *, both: bool) -> ValueCost:
    """Shrink the token axis: the one before the last, with the last where `both` are; else the first that fits."""
    dims = list(value.dims)
    if len(dims) >= 2 and dims[-2] == old:
        dims[-2] = new
        if both:
            dims[-1] = new
    elif len(dims) >= 4 and dims[-1] == old:
        dims[-1] = new  # keys, transposed
    else:
        place = next((place for place in range(1, len(dims)) if dims[place] == old), None)
        if place is not None:
            dims[place] = new
    return replace(value, dims=tuple(dims))
