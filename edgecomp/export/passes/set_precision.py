"""Writes a precision into the types of a graph: every node computes in fp16 or bf16, but for islands in fp32."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir

from edgecomp.errors import ExportError
from edgecomp.export.modules import module_of
from edgecomp.export.passes.score_flow import is_weight_product, score_flow
from edgecomp.specs.precision import pattern_of

__all__ = ["is_named_in", "modules_named_in", "set_precision"]

_FLOAT = ir.DataType.FLOAT
_TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_NUMPY = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum"})
# What squares, sums, divides by what it has summed, or raises to a power.
_ISLANDS = frozenset(
    [
        "BatchNormalization",
        "CumSum",
        "Exp",
        "GridSample",
        "GroupNormalization",
        "InstanceNormalization",
        "LayerNormalization",
        "Log",
        "LogSoftmax",
        "LpNormalization",
        "Pow",
        "RMSNormalization",
        "Reciprocal",
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSum",
        "ReduceLogSumExp",
        "ReduceMean",
        "ReduceProd",
        "ReduceSum",
        "ReduceSumSquare",
        "Resize",
        "Softmax",
        "Softplus",
        "Sqrt",
    ]
)
_NORMS = frozenset(op for op in _ISLANDS if op.endswith("Normalization"))
# What turns numbers into a choice; indices and truth values that they give have no type to set.
_CHOICES = frozenset(
    [
        "ArgMax",
        "ArgMin",
        "Ceil",
        "Equal",
        "Floor",
        "Greater",
        "GreaterOrEqual",
        "Hardmax",
        "IsInf",
        "IsNaN",
        "Less",
        "LessOrEqual",
        "NonZero",
        "Round",
        "Sign",
        "TopK",
    ]
)
# What moves numbers and computes none: they keep the type of their first input.
_MOVES = frozenset(
    [
        "Expand",
        "Flatten",
        "Gather",
        "GatherElements",
        "GatherND",
        "Identity",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Trilu",
        "Unsqueeze",
    ]
)
_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_TYPED = frozenset({"Cast", "CastLike", "Constant", "ConstantOfShape", "EyeLike"})  # they state their own type
_MERGE, _MERGE_IN_FP32 = ("edgecomp", "TopKMerge"), (2, 3)  # its inputs `size` and `scores`


def set_precision(
    model: ir.Model,
    precision: Literal["fp16", "bf16"],
    *,
    fp32: Sequence[str] = (),
    scores: Collection[str] = (),
    counts: Collection[str] = (),
) -> dict[str, str]:
    """Change the types of a graph in place; its inputs and outputs stay fp32.

    In fp32 stay norms, softmax, sums, powers and roots; whatever leads to a choice, from the last product with a
    weight on (`score_flow`); elementwise nodes among them; nodes with a constant that the type cannot hold; and
    what the user names. The merge op takes sizes and scores in fp32, and computes similarities in fp32 by itself.
    Casts stand where the type changes; a QuantizeLinear takes what comes. Weights and scales are stored in the type
    that their reader runs in.

    Args:
        model: in fp32, without the bodies of merge nodes: these are made for the type that stands here.
        precision: of all nodes but the islands.
        fp32: shell patterns of modules (`blocks.3.mlp*`, from any dot of their path on and with all inside them) or
            node names that stay in fp32.
        scores: outputs of the graph that another graph chooses by.
        counts: outputs of the graph that are whole numbers; a half type holds those up to 256 or 2048 alone.

    Returns:
        the name of each node that computes in fp32, and why; sorted by place in the graph.

    Raises:
        ExportError: the graph holds a subgraph, or weights beyond the type's range.
    """
    for node in model.graph:
        if any(attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attr in node.attributes.values()):
            raise ExportError(
                f"{node.op_type} node {node.name!r} holds a subgraph, whose types are not set; export with fp32"
            )
    islands = _islands(model, precision, fp32, scores, counts)
    _Rewriter(model, precision, islands).run()
    return {node.name or "": islands[node] for node in model.graph if node in islands and node.op_type not in _TYPED}


def is_named_in(model: ir.Model, pattern: str) -> bool:
    """Return whether a pattern of `set_precision` fits a node of the graph that computes."""
    return any(_named(node, (pattern,)) for node in model.graph if _computes(node))


def modules_named_in(model: ir.Model) -> list[str]:
    """Return the modules that a pattern may name: those of nodes that compute, in the graph's order."""
    return list(dict.fromkeys(name for node in model.graph if _computes(node) and (name := module_of(node))))


def _islands(
    model: ir.Model, precision: str, patterns: Sequence[str], scores: Collection[str], counts: Collection[str]
) -> dict[ir.Node, str]:
    """Return the nodes that stay in fp32, with the reason of each."""
    nodes = [node for node in model.graph if _computes(node)]
    found: dict[ir.Node, str] = {}
    for node in nodes:
        if asked := _named(node, patterns):
            found[node] = f"asked: {asked}"
        elif node.op_type in _ISLANDS:
            found[node] = node.op_type
        elif node.op_type in _CHOICES:
            found[node] = "scores"
        elif node.op_type in _TYPED:
            found[node] = "typed"
        elif number := _number_out_of_range(node, precision):
            found[node] = f"holds {number}"
    for node in _count_flow([value for value in model.graph.outputs if value.name in counts]):
        if node.op_type not in _MOVES:
            found.setdefault(node, "counts")
    roots = [value for node in nodes for value in _read_by_choice(node)]
    roots += [value for value in model.graph.outputs if value.name in scores]
    for node in score_flow(roots, sources=_ISLANDS, products=_PRODUCTS):
        if node not in found and _computes(node) and node.op_type not in _MOVES and not _is_merge(node):
            found[node] = "scores"
    _spread(nodes, found)
    return found


def _count_flow(roots: Sequence[ir.Value]) -> list[ir.Node]:
    """Return the nodes that make counts: sums of others, and products with ones and zeros, up to a merge or a cast."""
    found: dict[ir.Node, None] = {}
    waiting = [node for value in roots if (node := value.producer()) is not None]
    while waiting:
        node = waiting.pop()
        if node not in found and not _is_merge(node) and not is_weight_product(node, _PRODUCTS):
            found[node] = None
            waiting += [maker for value in _floats(node.inputs) if (maker := value.producer()) is not None]
    return list(found)


def _spread(nodes: Sequence[ir.Node], found: dict[ir.Node, str]) -> None:
    """Add elementwise nodes all of whose numbers come from islands, or all of whose readers are islands.

    Norms do not count as such readers: else the residual stream, which nothing but norms and its own sums read, would
    follow them.
    """
    fixed = _PRODUCTS | {_QUANTIZE, _DEQUANTIZE}
    free = [node for node in nodes if node not in found and node.op_type not in fixed and not _is_merge(node)]
    for node in free:
        if node.op_type in _MOVES:
            continue
        makers = [_maker(value) for value in _floats(node.inputs) if value.const_value is None]
        if makers and all(maker in found for maker in makers):
            found[node] = "between islands"
    absorbing = {node for node in found if node.op_type not in _NORMS}
    for node in reversed(free):
        if node in found or node.op_type in _MOVES:
            continue
        readers = list(_readers(node))
        if readers and all(reader is not None and reader in absorbing for reader in readers):
            found[node] = "between islands"
            absorbing.add(node)


class _Rewriter:
    """Sets the types of a graph's values, from its inputs on."""

    def __init__(self, model: ir.Model, precision: Literal["fp16", "bf16"], islands: dict[ir.Node, str]) -> None:
        self.graph, self.precision, self.islands = model.graph, precision, islands
        self.type = _TYPES[precision]
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._taken = {value.name for node in self.graph for value in node.outputs}

    def run(self) -> None:
        for node in list(self.graph):
            if not _computes(node):
                continue
            if node.op_type not in _TYPED:
                self._set_inputs(node)
            self._set_outputs(node)
        for place, value in enumerate(self.graph.outputs):
            if value.dtype == self.type:
                self._restore_output(place, value)
        self._store_weights()

    def _set_inputs(self, node: ir.Node) -> None:
        for place, value in enumerate(node.inputs):
            if value is None or value.dtype not in (_FLOAT, self.type):
                continue
            if node.op_type == _QUANTIZE:  # takes its number as it comes, and a scale of that type
                if place == 0:
                    continue
                first = node.inputs[0]
                wanted = _FLOAT if first is not None and first.dtype == _FLOAT else self.type
            elif node.op_type in _MOVES and place == 0:
                if value.const_value is None:
                    continue  # as it comes
                wanted = _FLOAT if all(reader in self.islands for reader in _readers(node)) else self.type
            else:
                in_fp32 = node in self.islands or (_is_merge(node) and place in _MERGE_IN_FP32)
                wanted = _FLOAT if in_fp32 else self.type
            if value.const_value is None and value.dtype != wanted:
                node.replace_input_with(place, self._cast(value, wanted))
            elif value.const_value is not None and wanted == self.type:
                node.replace_input_with(place, self._constant(value))

    def _set_outputs(self, node: ir.Node) -> None:
        if node.op_type in _TYPED:
            return
        dtype = _FLOAT if node in self.islands else self.type
        if node.op_type in _MOVES and (first := node.inputs[0]) is not None and first.dtype is not None:
            dtype = first.dtype
        for place, value in enumerate(node.outputs):
            if value.dtype == _FLOAT and not (_is_merge(node) and place == 1):  # sizes stay in fp32
                value.dtype = dtype

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return the value in another type; one cast serves all readers."""
        if (value, dtype) not in self._casts:
            maker = value.producer()
            output = ir.Value(name=self._name(value, dtype), shape=value.shape, type=ir.TensorType(dtype))
            node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(dtype))], outputs=[output], name=output.name)
            if maker is None:
                self.graph.insert_before(self.graph[0], node)
            else:
                node.metadata_props.update(maker.metadata_props)
                self.graph.insert_after(maker, node)
            self._casts[value, dtype] = output
        return self._casts[value, dtype]

    def _constant(self, value: ir.Value) -> ir.Value:
        """Return an initializer of the reduced type beside the one in fp32, which goes when nobody reads it."""
        if (value, self.type) not in self._casts:
            assert value.const_value is not None
            numbers = value.const_value.numpy()
            with np.errstate(over="ignore"):
                rounded = numbers.astype(_NUMPY[self.precision])
            if not np.isfinite(rounded.astype(np.float32)).all() and np.isfinite(numbers).all():
                raise ExportError(
                    f"{value.name} holds {np.abs(numbers).max():.4g}, beyond the largest {self.precision}; "
                    f"keep what reads it in fp32: --fp32 '{_reader_name(value)}'"
                )
            name = self._name(value, self.type)
            copy = ir.Value(
                name=name,
                shape=value.shape,
                type=ir.TensorType(self.type),
                const_value=ir.tensor(rounded, dtype=self.type, name=name),
            )
            self.graph.initializers[name] = copy
            self._casts[value, self.type] = copy
        return self._casts[value, self.type]

    def _store_weights(self) -> None:
        """Drop what is read in the reduced type alone, and give its name to the copy."""
        for (value, dtype), copy in self._casts.items():
            if value.const_value is None or value.uses() or dtype != self.type or value.is_graph_output():
                continue
            name = value.name or ""
            self.graph.initializers.pop(name)
            self.graph.initializers.pop(copy.name or "")
            copy.name = name
            if copy.const_value is not None:
                copy.const_value.name = name
            self.graph.initializers[name] = copy

    def _restore_output(self, place: int, value: ir.Value) -> None:
        """Give the output back in fp32, under its name."""
        name = value.name or ""
        value.name = self._name(value, self.type)
        output = self._cast(value, _FLOAT)
        output.name = name
        self.graph.outputs[place] = output

    def _name(self, value: ir.Value, dtype: ir.DataType) -> str:
        base = f"{value.name}.{'fp32' if dtype == _FLOAT else self.precision}"
        names = (base, *(f"{base}.{number}" for number in range(2, len(self._taken) + 3)))
        name = next(one for one in names if one not in self._taken and one not in self.graph.initializers)
        self._taken.add(name)
        return name


def _computes(node: ir.Node) -> bool:
    """Return whether a node reads or gives fp32 numbers."""
    return any(value is not None and value.dtype == _FLOAT for value in (*node.inputs, *node.outputs))


def _is_merge(node: ir.Node) -> bool:
    return (node.domain, node.op_type) == _MERGE


def _floats(values: Sequence[ir.Value | None]) -> list[ir.Value]:
    return [value for value in values if value is not None and value.dtype == _FLOAT]


def _read_by_choice(node: ir.Node) -> list[ir.Value]:
    """Return the numbers by which a node chooses."""
    if _is_merge(node):
        return _floats([node.inputs[place] for place in _MERGE_IN_FP32 if place < len(node.inputs)])
    to_whole = node.op_type == "Cast" and node.outputs[0].dtype != _FLOAT
    return _floats(node.inputs) if node.op_type in _CHOICES or to_whole else []


def _maker(value: ir.Value) -> ir.Node | None:
    """Return the node that computed a value, behind all that only moved it."""
    node = value.producer()
    while node is not None and node.op_type in _MOVES:
        first = node.inputs[0]
        node = first.producer() if first is not None else None
    return node


def _readers(node: ir.Node) -> Iterator[ir.Node | None]:
    """Yield the nodes that compute with what this one gives, behind all that only moves it; None: it is an output."""
    for value in node.outputs:
        if value.is_graph_output():
            yield None
        for use in value.uses():
            if use.node.op_type in _MOVES and use.idx == 0:
                yield from _readers(use.node)
            else:
                yield use.node


def _number_out_of_range(node: ir.Node, precision: str) -> str:
    """Return a number among a node's small constants that the type makes infinite or zero, or ""."""
    if is_weight_product(node, _PRODUCTS) or _is_merge(node) or node.op_type in (_QUANTIZE, _DEQUANTIZE):
        return ""
    limits = np.finfo(np.float16) if precision == "fp16" else ml_dtypes.finfo(ml_dtypes.bfloat16)  # type: ignore[no-untyped-call]
    largest, least = float(limits.max), float(limits.smallest_subnormal) / 2
    for value in _floats(node.inputs):
        if value.const_value is None:
            continue
        sizes = np.abs(value.const_value.numpy())
        sizes = sizes[(sizes > 0) & np.isfinite(sizes)]
        if sizes.size and (sizes.max() > largest or (value.const_value.size == 1 and sizes.min() <= least)):
            extreme = sizes.max() if sizes.max() > largest else sizes.min()
            return f"{float(extreme):.3g}" if math.isfinite(extreme) else ""
    return ""


def _named(node: ir.Node, patterns: Sequence[str]) -> str:
    return pattern_of(tuple(patterns), node=node.name or "", module=module_of(node))


def _reader_name(value: ir.Value) -> str:
    reader = next(iter(value.uses())).node
    return module_of(reader) or reader.name or ""
