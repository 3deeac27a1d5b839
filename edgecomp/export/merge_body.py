"""The function body of `edgecomp::TopKMerge`: plain ONNX ops that every runtime takes.

The op's definition, in five steps, is `engines/plugins/topk_merge/README.md`. One body serves all nodes of a model: `r`
and the number of prefix tokens are read from each node's attributes, sizes from its shapes, and both fold to constants
when a runtime loads the graph. No scatter here has a reduction, and where two updates meet they carry equal values, so
that the result does not depend on the number of threads.

How groups are summed: rows that go to one target are found by comparing targets with each other, and the comparison,
weighted, is multiplied with the rows. Up to `_AT_ONCE` pairs that is one product. Above, sources are sorted by target
and compared in chunks, and the groups that pass the end of a chunk are completed from the chunks behind it: time grows
with r, not with r squared. `benchmarks/README.md` has the figures, and those of the bodies that lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import onnx_ir as ir
from onnx_ir.tape import Tape

__all__ = ["merge_body"]

_AT_ONCE = 64  # pairs
_CHUNK = 16  # sources in a chunk
_TINY = 1e-30  # below it a norm counts as zero
_END = 2**63 - 1
_FLOAT, _INT32, _INT64 = ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.INT64
_ATTRIBUTES = {"r": "INT", "num_prefix_tokens": "INT", "mode": "STRING", "partition": "STRING", "order": "STRING"}
_ATTRIBUTES |= {"with_map": "INT", "plugin_version": "STRING", "plugin_namespace": "STRING"}


def merge_body(
    *,
    mode: str,
    partition: str,
    order: str,
    largest_r: int,
    with_map: bool = True,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    opset: int,
) -> ir.Function:
    """Return the body for the merge nodes of one model, which share mode, partition and order.

    Args:
        mode, partition, order: the nodes' attributes.
        largest_r: of all nodes; it decides whether groups are summed at once or in chunks.
        with_map: the nodes' attribute. ONNX Runtime computes what a function holds, whether it is read or not.
        dtype: of metric and x; similarity, sums and divisions are computed in float32 whatever it is.
        opset: of the model.
    """
    op = _Ops()
    names = ["metric", "x", "size"] + (["scores"] if partition == "by_score" else [])
    inputs = {name: ir.Value(name=name) for name in names}
    body = _Body(op, inputs, ir.DataType[{"float32": "FLOAT"}.get(dtype, dtype.upper())])
    pairs = body.pair_by_score(order) if partition == "by_score" else body.pair_alternate(order)
    join = body.join_in_chunks if largest_r > _AT_ONCE else body.join_at_once
    y, sizes = join(pairs, mode)
    outputs = {"y": y, "merged_size": sizes} | ({"src_map": body.source_map(pairs)} if with_map else {})
    for name, value in outputs.items():
        value.name = name
    for node in op.tape.nodes:
        node.name = ""  # each inlining would repeat it
    graph = ir.Graph(
        list(inputs.values()), list(outputs.values()), nodes=op.tape.nodes, opset_imports={"": opset}, name="TopKMerge"
    )
    attributes = [ir.Attr(name, ir.AttributeType[kind], None) for name, kind in _ATTRIBUTES.items()]
    return ir.Function("edgecomp", "TopKMerge", graph=graph, attributes=attributes)


class _Ops:
    """Appends nodes; a list among the inputs is a constant vector, a number a constant scalar, each made once."""

    def __init__(self) -> None:
        self.tape = Tape()
        self._constants: dict[str, ir.Value] = {}

    def __call__(self, kind: str, *inputs: Any, **attributes: Any) -> ir.Value:
        return self.tape.op(kind, [self._value(item) for item in inputs], attributes)

    def two(self, kind: str, *inputs: Any, **attributes: Any) -> tuple[ir.Value, ir.Value]:
        """Append a node with two outputs."""
        first, second = self.tape.op_multi_out(kind, [self._value(item) for item in inputs], attributes, num_outputs=2)
        return first, second

    def attribute(self, name: str) -> ir.Value:
        """Return an integer attribute of the node as a scalar."""
        return self.tape.op("Constant", [], {"value_int": ir.RefAttr("value_int", name, ir.AttributeType.INT)})

    def filled(self, shape: ir.Value, value: float) -> ir.Value:
        """Return one number everywhere: int64, or float32 where it is a float."""
        dtype = _FLOAT if isinstance(value, float) else _INT64
        return self("ConstantOfShape", shape, value=ir.tensor([value], dtype=dtype))

    def span(self, first: Any, end: Any) -> ir.Value:
        """Return first, first + 1, ..., end - 1."""
        return self("Range", first, end, 1)

    def column(self, x: ir.Value) -> ir.Value:
        """Add a last axis of size 1."""
        return self("Unsqueeze", x, [-1])

    def take(self, x: ir.Value, index: ir.Value, batch_dims: int = 1) -> ir.Value:
        """Take rows of each sample: x (B, N, D), index (B, ..., 1)."""
        return self("GatherND", x, index, batch_dims=batch_dims)

    def put(self, into: ir.Value, index: ir.Value, values: ir.Value) -> ir.Value:
        """Replace values along axis 1."""
        return self("ScatterElements", into, index, values, axis=1)

    def _value(self, item: Any) -> ir.Value:
        if isinstance(item, ir.Value):
            return item
        if repr(item) not in self._constants:
            many = isinstance(item, list)
            kind = "float" if isinstance(item[0] if many else item, float) else "int"
            name = f"value_{kind}s" if many else f"value_{kind}"
            self._constants[repr(item)] = self.tape.op("Constant", [], {name: item})
        return self._constants[repr(item)]


@dataclass(frozen=True)
class _Pairs:
    """Who merges into whom. A place is a position in `layout`, which lists all tokens, targets last.

    Attributes:
        layout: (N,) the token at each place; none where a token's place is its index.
        source_at, target_at: (B, r) places of the sources, and of the target of each.
        target_row: (B, r) output row of the target of each source.
        row_of: (B, N) output row of each place; sources have the rows from M on.
    """

    layout: ir.Value | None
    source_at: ir.Value
    target_at: ir.Value
    target_row: ir.Value
    row_of: ir.Value


class _Body:
    """The steps of the definition on the inputs of one function."""

    def __init__(self, op: _Ops, inputs: dict[str, ir.Value], dtype: ir.DataType) -> None:
        self.op, self.dtype = op, dtype
        self.metric, self.x, self.size = inputs["metric"], inputs["x"], inputs["size"]
        self.scores = inputs.get("scores")
        self.r, self.p = op.attribute("r"), op.attribute("num_prefix_tokens")
        self.r1, self.p1 = op("Unsqueeze", self.r, [0]), op("Unsqueeze", self.p, [0])
        self.batch = op("Shape", self.x, start=0, end=1)
        self.n1 = op("Shape", self.x, start=1, end=2)
        self.n = op("Squeeze", self.n1, [0])
        self.m1 = op("Sub", self.n1, self.r1)
        self.m = op("Squeeze", self.m1, [0])
        self.by_n = op("Concat", self.batch, self.n1, axis=0)
        self.by_r = op("Concat", self.batch, self.r1, axis=0)
        self.tokens = op.span(0, self.n)  # (N,)
        self.gone_rows = op("Expand", op.span(self.m, self.n), self.by_r)  # (B, r) rows from M on, for the sources

    # -- steps 1 to 3 and 5: pairs, and the order of rows ----------------------------------------------

    def unit(self) -> ir.Value:
        """Return the rows of metric with norm 1, in float32."""
        op = self.op
        metric = self.metric if self.dtype == _FLOAT else op("Cast", self.metric, to=_FLOAT)
        norm = op("ReduceL2", metric, [-1])
        return op("Div", metric, op("Max", norm, _TINY))

    def pair_alternate(self, order: str) -> _Pairs:
        """Even tokens are sources, odd ones targets; the r sources with the best match merge."""
        op, p = self.op, self.p1
        odd_prefix = op("Mod", p, [2])
        first_even, first_odd = op("Add", p, odd_prefix), op("Add", p, op("Sub", [1], odd_prefix))
        unit = self.unit()
        evens = op("Slice", unit, first_even, [_END], [1], [2])
        odds = op("Slice", unit, first_odd, [_END], [1], [2])
        similarity = op("MatMul", evens, op("Transpose", odds, perm=[0, 2, 1]))
        best = op("ReduceMax", similarity, [-1], keepdims=0)
        nearest = op("ArgMax", similarity, axis=-1, keepdims=0)
        count = op("Shape", evens, start=1, end=2)
        first_target = op("Add", p, count)
        # place -> token: the prefix, the even tokens, the odd tokens
        of_even = op("Add", op("Mul", op("Sub", self.tokens, p), [2]), first_even)
        of_odd = op("Add", op("Mul", op("Sub", self.tokens, first_target), [2]), first_odd)
        free = op("Where", op("GreaterOrEqual", self.tokens, first_target), of_odd, of_even)
        is_prefix = op("Less", self.tokens, p)
        layout = op("Where", is_prefix, self.tokens, free)
        if order == "rank":
            _, ranked = op.two("TopK", best, count)
            chosen = op("Slice", ranked, [0], self.r1, [1])
        else:
            _, chosen = op.two("TopK", best, self.r1)
        source_at = op("Add", chosen, p)
        target_at = op("Add", op("GatherElements", nearest, chosen, axis=1), first_target)
        if order == "rank":
            ranks = op.span(0, op("Squeeze", count, [0]))
            kept_row = op("Add", op("Sub", ranks, self.r1), p)
            row = op("Where", op("Less", ranks, self.r1), op("Add", ranks, self.m1), kept_row)
            others = op("Where", is_prefix, self.tokens, op("Sub", self.tokens, self.r1))
            row_by_source = op("Expand", row, op("Shape", ranked))
            row_of = op.put(op("Expand", others, self.by_n), op("Add", ranked, p), row_by_source)
        else:
            row_of = op.put(self._close_ranks(source_at), source_at, self.gone_rows)
        return _Pairs(layout, source_at, target_at, op("Sub", target_at, self.r1), row_of)

    def pair_by_score(self, order: str) -> _Pairs:
        """The 2r tokens with the highest score are in turn source and target."""
        op, p = self.op, self.p1
        free_scores = op("Slice", self.scores, p, [_END], [1])
        r_twice = op("Mul", self.r1, [2])
        count = op("Sub", self.n1, p) if order == "rank" else r_twice
        _, ranked_free = op.two("TopK", free_scores, count)
        ranked = op("Add", ranked_free, p)
        source_at = op("Slice", ranked, [0], r_twice, [1], [2])
        receiver_at = op("Slice", ranked, [1], r_twice, [1], [2])
        unit = self.unit()
        sources, receivers = op.take(unit, op.column(source_at)), op.take(unit, op.column(receiver_at))
        similarity = op("MatMul", sources, op("Transpose", receivers, perm=[0, 2, 1]))
        match = op("ArgMax", similarity, axis=-1, keepdims=0)
        first_row = op("Sub", self.m1, self.r1)
        target_at = op("GatherElements", receiver_at, match, axis=1)
        if order == "rank":
            ranks = op.span(0, op("Squeeze", count, [0]))
            half = op("Div", ranks, [2])
            is_source = op("Equal", op("Mod", ranks, [2]), [0])
            pair_row = op("Where", is_source, op("Add", half, self.m1), op("Add", half, first_row))
            kept_row = op("Add", op("Sub", ranks, r_twice), p)
            row = op("Where", op("Less", ranks, r_twice), pair_row, kept_row)
            row_of = op.put(op("Expand", self.tokens, self.by_n), ranked, op("Expand", row, op("Shape", ranked)))
        else:
            receiver_row = op("Expand", op("Add", op.span(0, self.r), first_row), self.by_r)
            stays = op.put(self._close_ranks(source_at, receiver_at), source_at, self.gone_rows)
            row_of = op.put(stays, receiver_at, receiver_row)
        return _Pairs(None, source_at, target_at, op("Add", match, first_row), row_of)

    def _close_ranks(self, *left: ir.Value) -> ir.Value:
        """Return each place less the number of places before it that were left: (B, N)."""
        op = self.op
        gone = op.filled(self.by_n, 0.0)  # TensorRT documents CumSum for floating types alone
        for places in left:
            gone = op.put(gone, places, op.filled(self.by_r, 1.0))
        return op("Sub", self.tokens, op("Cast", op("CumSum", gone, 1), to=_INT64))

    # -- step 4: groups -------------------------------------------------------------------------------

    def untouched(self, pairs: _Pairs) -> tuple[ir.Value, ir.Value]:
        """Return the M output rows and sizes before anything is merged into them."""
        op = self.op
        layout = op("Expand", self.tokens if pairs.layout is None else pairs.layout, self.by_n)
        token_of = op.put(op.filled(self.by_n, 0), pairs.row_of, layout)
        index = op.column(op("Slice", token_of, [0], self.m1, [1]))
        return op.take(self.x, index), op.take(self.size, index)

    def rows(self, pairs: _Pairs, places: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return rows of x, in float32, and sizes: places (B, ..., K) -> (B, ..., K, D) and (B, ..., K, 1)."""
        op = self.op
        index = op.column(places if pairs.layout is None else op("Gather", pairs.layout, places))
        x = op.take(self.x, index)
        return (x if self.dtype == _FLOAT else op("Cast", x, to=_FLOAT)), op.take(self.size, index)

    def replace(self, into: ir.Value, rows: ir.Value, values: ir.Value) -> ir.Value:
        """Replace output rows: into (B, M, D), rows (B, K), values (B, K, D)."""
        op = self.op
        sample = op.column(op.span(0, op("Squeeze", self.batch, [0])))
        index = op.column(op("Expand", sample, op("Shape", rows)))
        return op("ScatterND", into, op("Concat", index, op.column(rows), axis=-1), values)

    def narrow(self, values: ir.Value) -> ir.Value:
        """Round float32 rows to the type of x."""
        return values if self.dtype == _FLOAT else self.op("Cast", values, to=self.dtype)

    def join_at_once(self, pairs: _Pairs, mode: str) -> tuple[ir.Value, ir.Value]:
        """Compute the group of each source's target in one product, and put it in the target's row."""
        op = self.op
        y, sizes = self.untouched(pairs)
        x, size = self.rows(pairs, op("Concat", pairs.source_at, pairs.target_at, axis=1))
        same = op("Cast", op("Equal", op.column(pairs.target_at), op("Unsqueeze", pairs.target_at, [1])), to=_FLOAT)
        eye = self.eye(self.r, op("Concat", self.batch, self.r1, self.r1, axis=0))
        members = op("Concat", same, eye, axis=2)  # (B, r, 2r): sources, then the target itself
        first = op("ArgMax", same, axis=-1)  # equal rows are taken from one place: (B, r, 1)
        size_of = op("Mul", members, op("Transpose", size, perm=[0, 2, 1]))
        group_size = op("ReduceSum", size_of, [-1])
        sizes = self.replace(sizes, pairs.target_row, op.take(group_size, first))
        if mode == "prune":
            return y, sizes
        weights = size_of if mode == "wavg" else members
        if mode != "sum":
            weights = op("Div", weights, group_size if mode == "wavg" else op("ReduceSum", members, [-1]))
        merged = op("MatMul", weights, x)
        if mode == "tofu":
            norms = op("ReduceL2", x, [-1])  # (B, 2r, 1)
            largest = op("ReduceMax", op("Mul", members, op("Transpose", norms, perm=[0, 2, 1])), [-1])
            merged = self._rescale(merged, largest, op("Slice", norms, self.r1, [_END], [1]))
        return self.replace(y, pairs.target_row, self.narrow(op.take(merged, first))), sizes

    def join_in_chunks(self, pairs: _Pairs, mode: str) -> tuple[ir.Value, ir.Value]:
        """Sort the sources by target, compute groups within chunks, and complete those that span several."""
        op, c = self.op, _CHUNK
        y, sizes = self.untouched(pairs)
        chunks = _Chunks(self, pairs)
        members = chunks.members
        size_of = op("Mul", members, op("Transpose", chunks.size, perm=[0, 1, 3, 2]))
        group_size, long_size = op("ReduceSum", size_of, [-1]), chunks.complete(size_of)
        sizes = chunks.put_groups(sizes, group_size, long_size)
        if mode == "prune":
            return y, sizes
        weights = size_of if mode == "wavg" else members
        rows = weights
        if mode != "sum":
            rows = op("Div", weights, group_size if mode == "wavg" else op("ReduceSum", members, [-1]))
        rows = op("Concat", rows, chunks.ends(weights), chunks.starts(weights), axis=2)
        product = op("MatMul", rows, chunks.x)  # (B, C, c + 2, D)
        merged = op("Slice", product, [0], [c], [2])
        own = op("Squeeze", op("Slice", product, [c], [c + 1], [2]), [2])
        start = op("Squeeze", op("Slice", product, [c + 1], [c + 2], [2]), [2])
        long = op("Add", own, op("MatMul", chunks.goes_on, start))  # (B, C, D)
        if mode != "sum":
            long = op("Div", long, long_size if mode == "wavg" else chunks.complete(members))
        if mode == "tofu":
            norms = op("ReduceL2", chunks.x, [-1])  # (B, C, 2c, 1)
            norm_of = op("Mul", members, op("Transpose", norms, perm=[0, 1, 3, 2]))
            own_norm = op("Slice", norms, [c], [2 * c], [2])
            merged = self._rescale(merged, op("ReduceMax", norm_of, [-1]), own_norm)
            first_norm = op("Squeeze", op("ReduceMax", chunks.starts(norm_of), [-1]), [2])  # (B, C, 1)
            later = op("ReduceMax", op("Mul", chunks.goes_on, op("Transpose", first_norm, perm=[0, 2, 1])), [-1])
            largest = op("Max", op("Squeeze", op("ReduceMax", chunks.ends(norm_of), [-1]), [2]), later)
            long = self._rescale(long, largest, op("Squeeze", chunks.ends(own_norm), [2]))
        return chunks.put_groups(y, self.narrow(merged), self.narrow(long)), sizes

    def eye(self, size: Any, shape: ir.Value) -> ir.Value:
        """Return ones on the diagonal of the last two axes."""
        op = self.op
        places = op.span(0, size)
        return op("Expand", op("Cast", op("Equal", op.column(places), places), to=_FLOAT), shape)

    def _rescale(self, merged: ir.Value, largest: ir.Value, own: ir.Value) -> ir.Value:
        """Multiply rows by the largest norm of their group over the target's; by 1 where that is zero."""
        op = self.op
        ratio = op("Div", largest, op("Max", own, _TINY))
        return op("Mul", merged, op("Where", op("Greater", own, 0.0), ratio, 1.0))

    # -- the map --------------------------------------------------------------------------------------

    def source_map(self, pairs: _Pairs) -> ir.Value:
        """Return the output row of each input token: (B, N) int32."""
        op = self.op
        by_place = op.put(pairs.row_of, pairs.source_at, pairs.target_row)
        if pairs.layout is not None:
            by_place = op.put(op.filled(self.by_n, 0), op("Expand", pairs.layout, self.by_n), by_place)
        return op("Cast", by_place, to=_INT32)


class _Chunks:
    """The sources, sorted by target, in C chunks of c; the last source fills the last chunk, with weight zero.

    A group that passes the end of its chunk is complete only with what the chunks behind hold of it. In each of those
    it comes first, since targets are sorted.

    Attributes:
        x, size: (B, C, 2c, D) and (B, C, 2c, 1) of the sources, then of the target of each.
        members: (B, C, c, 2c) which of them belong to the group of each source's target, within the chunk.
        goes_on: (B, C, C) whether the group at the end of one chunk goes on in another behind it.
    """

    def __init__(self, body: _Body, pairs: _Pairs) -> None:
        self.body, self.op = body, body.op
        op, c, batch = body.op, _CHUNK, body.batch
        chunks = op("Div", op("Add", body.r, c - 1), c)
        chunks1 = op("Unsqueeze", chunks, [0])
        self.padded = op("Mul", chunks, c)
        by_chunk = op("Concat", batch, chunks1, [c], axis=0)
        slots = op.span(0, self.padded)
        filled = op("Min", slots, op("Sub", body.r, 1))
        is_real = op("Cast", op("Equal", filled, slots), to=_FLOAT)
        is_real = op("Reshape", is_real, op("Concat", chunks1, [1, c], axis=0))  # (C, 1, c)
        _, order = op.two("TopK", op("Neg", pairs.target_at), body.r1)
        order = op("Gather", order, filled, axis=1)

        def sort(values: ir.Value) -> ir.Value:
            return op("Reshape", op("GatherElements", values, order, axis=1), by_chunk)

        target_at, self.target_row = sort(pairs.target_at), sort(pairs.target_row)
        both = op("Concat", sort(pairs.source_at), target_at, axis=2)
        self.x, self.size = body.rows(pairs, both)
        same = op("Cast", op("Equal", op.column(target_at), op("Unsqueeze", target_at, [-2])), to=_FLOAT)
        eye = body.eye(c, op("Concat", by_chunk, [c], axis=0))
        self.members = op("Concat", op("Mul", same, is_real), eye, axis=3)
        self._first = op.column(op("ArgMax", same, axis=-1, keepdims=0))  # equal rows are taken from one place
        starts, ends = op("Slice", target_at, [0], [1], [2]), self.ends(target_at)
        places = op.span(0, chunks)
        goes_on = op(
            "And", op("Equal", ends, op("Transpose", starts, perm=[0, 2, 1])), op("Less", op.column(places), places)
        )
        self.goes_on = op("Cast", goes_on, to=_FLOAT)
        same_end = op("Cast", op("Equal", ends, op("Transpose", ends, perm=[0, 2, 1])), to=_FLOAT)
        self._begins = op("ArgMax", same_end, axis=-1)  # (B, C, 1) the chunk in which the group at the end begins

    def ends(self, values: ir.Value) -> ir.Value:
        """Return the last row of each chunk."""
        return self.op("Slice", values, [_CHUNK - 1], [_CHUNK], [2])

    def starts(self, values: ir.Value) -> ir.Value:
        """Return the first row of each chunk, without what the target itself adds."""
        return self.op("Mul", self.op("Slice", values, [0], [1], [2]), [1.0] * _CHUNK + [0.0] * _CHUNK)

    def complete(self, part: ir.Value) -> ir.Value:
        """Return the totals of the groups at the ends: part (B, C, c, 2c) -> (B, C, 1)."""
        op = self.op
        own = op("Squeeze", op("ReduceSum", self.ends(part), [-1]), [2])
        behind = op("Squeeze", op("ReduceSum", self.starts(part), [-1]), [2])
        return op("Add", own, op("MatMul", self.goes_on, behind))

    def put_groups(self, into: ir.Value, rows: ir.Value, long: ir.Value) -> ir.Value:
        """Put each row's group within its chunk, then the whole of those that pass a chunk's end.

        Shapes: into (B, M, D), rows (B, C, c, D), long (B, C, D).
        """
        op, batch = self.op, self.body.batch
        chosen = op.take(rows, self._first, batch_dims=2)
        chosen = op("Reshape", chosen, op("Concat", batch, op("Unsqueeze", self.padded, [0]), [-1], axis=0))
        within = self.body.replace(into, op("Reshape", self.target_row, op("Concat", batch, [-1], axis=0)), chosen)
        return self.body.replace(within, op("Squeeze", self.ends(self.target_row), [2]), op.take(long, self._begins))
