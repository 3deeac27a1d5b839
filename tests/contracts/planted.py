"""Faults that are planted into graphs, for the mutation test of parity: in the host as well as in the compressor.

A fault is a function of the model that changes it in place, in all places at once, and says how many those were.
"""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import test_mutants

from edgecomp.export.modules import module_of
from edgecomp.export.passes import add_merge_body

QUICK = ("attention-pruning", "evit", "tome")  # of these one preset is enough, and the others are slow
_CHOOSES = ("TopK", "ArgMax", "ArgMin")
_FLOATS = (ir.DataType.FLOAT, None)  # in a function's body types are not known


def first_k(model):
    """The first k tokens are taken, whatever their score."""
    return _each(_choices(model), _of_constants)


def last_of_equals(model):
    """Of equal scores the last one is taken, not the first."""
    return _each(_choices(model), _from_behind)


def off_by_one(model):
    """The best token is left out, and the one behind the last is taken."""
    return _each([(g, n) for g, n in _choices(model) if n.op_type == "TopK" and _leaves_some(n)], _from_second)


def unweighted_mean(model):
    """Merged tokens are averaged as if each stood for one."""
    nodes = _merges(model)
    for node in nodes:
        node.attributes["mode"] = ir.AttrString("mode", "mean")
    add_merge_body(model)
    return len(nodes)


def sizes_not_carried(model):
    """Each merge takes all tokens for single ones."""
    nodes = [node for node in _merges(model) if node.inputs[2].producer() in _merges(model)]
    for node in nodes:
        node.replace_input_with(2, _constant(model, f"ones_{node.name}", np.ones(node.inputs[2].shape, np.float32)))
    return len(nodes)


def no_proportional_bias(model):
    """The logarithm of the sizes is not added to attention's scores."""
    nodes = [node for node in model.graph if node.op_type == "Log"]
    for node in nodes:
        _replace_after(model.graph, node.outputs[0], "Sub", [node.outputs[0], node.outputs[0]])
    return len(nodes)


def dropped_head(model):
    """The first head of every attention reads nothing."""
    nodes = [node for node in _softmaxes(model) if node.outputs[0].shape[1] > 1]
    for node in nodes:
        mask = np.ones((1, node.outputs[0].shape[1], 1, 1), np.float32)
        mask[:, 0] = 0
        value = node.outputs[0]
        _replace_after(model.graph, value, "Mul", [value, _constant(model, f"heads_{value.name}", mask)])
    return len(nodes)


def wrong_axis(model):
    """Attention's softmax runs over queries."""
    nodes = _softmaxes(model)
    for node in nodes:
        node.attributes["axis"] = ir.AttrInt64("axis", -2)
    return len(nodes)


def half_softmax(model):
    """Attention's softmax reads and gives numbers of eleven bits, as in fp16.

    They are rounded by arithmetic (Veltkamp): ONNX Runtime has no such kernel on the CPU, and takes out the casts.
    """
    nodes = _softmaxes(model)
    if nodes:
        factor = _constant(model, "veltkamp", np.array(2.0**13 + 1, np.float32))
    for node in nodes:
        for value in (node.inputs[0], node.outputs[0]):
            _round_after(model.graph, value, factor)
    return len(nodes)


def _round_after(graph, value, factor):
    uses = tuple(value.uses())
    scaled = ir.node("Mul", [value, factor])
    below = ir.node("Sub", [scaled.outputs[0], value])
    rounded = ir.node("Sub", [scaled.outputs[0], below.outputs[0]])
    for node in (scaled, below, rounded):
        _like(node.outputs[0], value)
    graph.insert_after(value.producer(), [scaled, below, rounded])
    for reader, index in uses:
        reader.replace_input_with(index, rounded.outputs[0])


def swapped_kv(model):
    """Keys and values change places; once in weights that several nodes read, or they would be back in place."""
    found = 0
    weights: set[ir.Value] = set()
    for node in model.graph:
        if node.op_type == "Split" and len(node.outputs) == 2 and node.outputs[0].shape == node.outputs[1].shape:
            _swap(*node.outputs)
            found += 1
        if node.op_type in ("MatMul", "Gemm", "Add") and module_of(node).endswith("attn.qkv"):
            weights.update(value for value in node.inputs if value.const_value is not None)
    return found + sum(map(_swap_thirds, weights))


def transposed_grid(model):
    """Rows and columns of the image, or of the tokens in raster order, change places."""
    first = model.graph.inputs[0]
    shape = [int(size) for size in first.shape]
    if first.name == "image":
        axes = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
        if shape[-1] == 3:  # raw frames
            axes = [*range(len(shape) - 3), len(shape) - 2, len(shape) - 3, len(shape) - 1]
        _replace_input(model, first, ir.node("Transpose", [first], attributes={"perm": axes}))
        return 1
    rows = max(size for size in range(1, int(shape[-2] ** 0.5) + 1) if shape[-2] % size == 0)
    if rows == 1:
        return 0
    order = _constant(model, "order", np.arange(shape[-2]).reshape(rows, -1).T.flatten())
    for value in tuple(model.graph.inputs):
        axis = len(value.shape) - (2 if value is first else 1)
        if value.shape[axis] == shape[-2]:  # the mask goes with its tokens
            _replace_input(model, value, ir.node("Gather", [value, order], attributes={"axis": axis}))
    return 1


def _replace_input(model, value, node):
    _like(node.outputs[0], value)
    for reader, index in tuple(value.uses()):
        if reader is not node:
            reader.replace_input_with(index, node.outputs[0])
    model.graph.insert_before(model.graph[0], [node])


def other_layers_weights(model):
    """Two layers of one shape have each other's weights."""
    kinds: dict[tuple[str, tuple[int, ...]], list[ir.Value]] = {}
    for node in model.graph:
        match = re.match(r"(.*)\b(blocks|layers)\.\d+\.(.*)", module_of(node))
        for value in node.inputs if match and node.op_type in ("MatMul", "Gemm") else ():
            if value.const_value is not None and len(value.shape) == 2:
                found = kinds.setdefault((match.group(3), tuple(value.const_value.shape.numpy())), [])
                if value not in found:  # a graph that runs its layers twice reads the same weights twice
                    found.append(value)
    pairs = [found[:2] for found in kinds.values() if len(found) > 1]
    for one, other in pairs:
        arrays = [value.const_value.numpy().copy() for value in (one, other)]
        one.const_value, other.const_value = (ir.tensor(array) for array in reversed(arrays))
    return len(pairs)


def wrong_rows(model):
    """The matrices of a graph without attention and choice meet their channels one place further on."""
    return _all_at_once(test_mutants.wrong_rows(model, None))


def dropped_activation(model):
    """What goes into an activation comes out of it, in a graph without attention and choice."""
    return _all_at_once(test_mutants.dropped_activation(model, None))


def first_of_bin(model):
    """Pooling takes one token of each bin, not their mean."""
    return _all_at_once(test_mutants.first_of_bin(model, None))


FAULTS = (
    *(first_k, last_of_equals, off_by_one, unweighted_mean, sizes_not_carried, no_proportional_bias, dropped_head),
    *(transposed_grid, swapped_kv, wrong_axis, half_softmax, other_layers_weights),
    *(wrong_rows, dropped_activation, first_of_bin),
)


# -- tools ------------------------------------------------------------------------------------------------------


def _all_at_once(changes):
    for change in changes:
        change()
    return len(changes)


def _each(places, change):
    for graph, node in places:
        change(graph, node)
    return len(places)


def _choices(model):
    """Return the choices by a score, with the graph or the function that each stands in."""
    found = []
    for graph in (model.graph, *model.functions.values()):
        for node in graph:
            if node.op_type not in _CHOOSES or not node.outputs[-1].uses():
                continue
            maker = node.inputs[0].producer()
            by_score = maker is not None and maker.op_type not in ("Cast", "Neg") and node.inputs[0].dtype in _FLOATS
            if by_score:
                found.append((graph, node))
    return found


def _leaves_some(node):
    """Whether not all are taken; in a function's body, without shapes, where the count is not the length."""
    scores, own = node.inputs[0], node.outputs[-1]
    if scores.shape is not None:
        return own.shape[-1] < scores.shape[-1]
    maker = node.inputs[1].producer()
    return maker is None or maker.op_type != "Shape"


def _merges(model):
    return [node for node in model.graph if node.op_type == "TopKMerge"]


def _softmaxes(model):
    return [node for node in model.graph if node.op_type == "Softmax" and len(node.outputs[0].shape) == 4]


def _of_constants(graph, node):
    same = ir.node("Sub", [node.inputs[0], node.inputs[0]])
    if node.inputs[0].shape is not None:
        _like(same.outputs[0], node.inputs[0])
    graph.insert_before(node, [same])
    node.replace_input_with(0, same.outputs[0])


def _from_behind(graph, node):
    """Choose among the scores in reverse, and turn the places back."""
    numbers = [ir.node("Constant", [], attributes={"value_ints": [n]}) for n in (-1, -(2**62))]
    ends = [number.outputs[0] for number in numbers]
    scores = node.inputs[0]
    reverse = ir.node("Slice", [scores, ends[0], ends[1], ends[0], ends[0]])
    length = ir.node("Shape", [scores], attributes={"start": -1})
    last = ir.node("Add", [length.outputs[0], ends[0]])
    if scores.shape is not None:
        _like(reverse.outputs[0], scores)
    graph.insert_before(node, [*numbers, reverse, length, last])
    node.replace_input_with(0, reverse.outputs[0])
    own = node.outputs[-1]
    back = _replace_after(graph, own, "Sub", [last.outputs[0], own])
    back.outputs[0].type = ir.TensorType(ir.DataType.INT64)


def _from_second(graph, node):
    """Take one more where there is one, and leave out the first of them."""
    one, last, end = (ir.node("Constant", [], attributes={"value_ints": [n]}) for n in (1, -1, 2**62))
    length = ir.node("Shape", [node.inputs[0]], attributes={"start": -1})
    more = ir.node("Add", [node.inputs[1], one.outputs[0]])
    count = ir.node("Min", [more.outputs[0], length.outputs[0]])
    first = ir.node("Sub", [count.outputs[0], node.inputs[1]])
    graph.insert_before(node, [one, last, end, length, more, count, first])
    node.replace_input_with(1, count.outputs[0])
    own, scores = node.outputs[-1], node.inputs[0]
    shape = own.shape
    _replace_after(graph, own, "Slice", [own, first.outputs[0], end.outputs[0], last.outputs[0]])
    if shape is not None:
        node.outputs[0].shape = own.shape = ir.Shape([*shape[:-1], min(shape[-1] + 1, scores.shape[-1])])


def _replace_after(graph, value, op, inputs, attributes=None):
    """Give the readers of a value what an op makes of it."""
    node = ir.node(op, inputs, attributes=attributes)
    uses = [use for use in tuple(value.uses()) if use.node is not node]
    if value.shape is not None:
        _like(node.outputs[0], value)
    for reader, index in uses:
        reader.replace_input_with(index, node.outputs[0])
    graph.insert_after(value.producer(), [node])
    return node


def _like(new, old):
    new.shape, new.type = old.shape, old.type


def _swap(one, other):
    uses = tuple(one.uses()), tuple(other.uses())
    for pairs, new in zip(uses, (other, one), strict=True):
        for node, index in pairs:
            node.replace_input_with(index, new)


def _swap_thirds(value):
    array = value.const_value.numpy()
    axis = next((n for n in reversed(range(array.ndim)) if array.shape[n] == 3 * min(array.shape)), array.ndim - 1)
    if array.shape[axis] % 3:
        return False
    query, key, other = np.split(array, 3, axis)
    value.const_value = ir.tensor(np.concatenate([query, other, key], axis))
    return True


def _constant(model, name, array):
    value = ir.Value(name=f"planted_{name}", shape=ir.Shape(array.shape))
    value.const_value = ir.tensor(np.ascontiguousarray(array), name=value.name)
    value.type = ir.TensorType(value.const_value.dtype)
    model.graph.register_initializer(value)
    return value
