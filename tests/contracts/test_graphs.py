"""Contracts 6 and 7: graphs have integer dimensions, declared names and only ops that every TensorRT takes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgecomp.errors import DynamicShape, OpNotAllowed
from edgecomp.export.opcheck import require_allowed, violations
from edgecomp.export.passes import inline_functions, require_static
from edgecomp.specs import load_oplists

_TYPES = {
    "float32": TensorProto.FLOAT,
    "uint8": TensorProto.UINT8,
    "int32": TensorProto.INT32,
    "bool": TensorProto.BOOL,
    "int64": TensorProto.INT64,
}
_UNWANTED = ("Scatter", "NonZero", "Resize", "Loop", "If", "Scan")
_SCATTERS = ("ScatterElements", "ScatterND")


def test_dimensions_are_integers_and_names_are_the_declared_ones(smoke, bundle_of):
    bundle = bundle_of(smoke)
    buckets = bundle.manifest.buckets
    assert sorted((b.budget.tokens_out, b.batch) for b in buckets) == sorted(
        (budget, batch) for budget in smoke.budgets for batch in smoke.batches
    )
    assert sorted(path.name for path in bundle.path.glob("*.onnx")) == sorted(bucket.model for bucket in buckets)
    for bucket in buckets:
        proto = onnx.load(bundle.path / bucket.model, load_external_data=False)
        graph = proto.graph
        for values, specs in ((graph.input, bucket.inputs), (graph.output, bucket.outputs)):
            found = [(value.name, _dims(value), value.type.tensor_type.elem_type) for value in values]
            assert found == [(spec.name, spec.shape, _TYPES[spec.dtype]) for spec in specs]
        known = {value.name for value in (*graph.value_info, *graph.output)}
        made = {name for node in graph.node for name in node.output if name}
        assert made <= known
        for value in graph.value_info:
            assert all(size > 0 for size in _dims(value)), value.name
        require_static(ir.from_proto(proto))
        merges = [node.name for node in graph.node if node.op_type == "TopKMerge"]
        assert [(f.domain, f.name) for f in proto.functions] == ([("edgecomp", "TopKMerge")] if merges else [])


def test_inputs_are_those_of_the_module(smoke, bundle_of, assembled):
    models = {model.compressor.budget.tokens_out: model for model in assembled(smoke).models}
    for bucket in bundle_of(smoke).manifest.buckets:
        model = models[bucket.budget.tokens_out]
        assert bucket.inputs == model.input_specs(bucket.batch)
        assert bucket.outputs == model.output_specs(bucket.batch)


def test_ops_are_on_every_list(smoke, bundle_of):
    bundle = bundle_of(smoke)
    for bucket in bundle.manifest.buckets:
        model = ir.load(bundle.path / bucket.model)
        nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
        assert {node.op_type for node in nodes} == set(bucket.ops)
        assert {(node.domain, node.op_type) for node in nodes if node.domain} <= {("edgecomp", "TopKMerge")}
        inline_functions(model)
        assert violations(model, load_oplists(), extra=smoke.recipe.extra_ops) == ()
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            assert node.op_type not in _UNWANTED
            reduction = node.attributes.get("reduction") if node.op_type in _SCATTERS else None
            assert reduction is None or reduction.as_string() == "none"


def test_all_graphs_point_into_the_one_weights_file(smoke, bundle_of):
    """A further bucket or batch adds no second copy of the weights."""
    bundle = bundle_of(smoke)
    places = []
    for bucket in bundle.manifest.buckets:
        proto = onnx.load(bundle.path / bucket.model, load_external_data=False)
        external = [tensor for tensor in proto.graph.initializer if tensor.external_data]
        facts = [{entry.key: entry.value for entry in tensor.external_data} for tensor in external]
        locations = {fact["location"] for fact in facts}
        assert locations == {"weights.data"} or (not locations and not bundle.manifest.parameters)
        inside = sum(len(t.raw_data) for t in proto.graph.initializer if not t.external_data)
        assert inside < 64 * len(proto.graph.initializer) + 8192
        places.append({(fact["offset"], fact["length"]) for fact in facts})
    first = places[0]
    for other in places[1:]:
        assert len(first & other) >= 0.6 * len(first) or not bundle.manifest.parameters


def test_extra_ops_are_used(smokes, bundle_of):
    """A recipe states no extra op that its graphs do not hold."""
    held = {op for smoke in smokes for bucket in bundle_of(smoke).manifest.buckets for op in bucket.ops}
    assert set(smokes[0].recipe.extra_ops) <= held


# -- the check itself: planted graphs ---------------------------------------------------------------------------


def _topk():
    k = numpy_helper.from_array(np.array([4000], np.int64), "k")
    node = helper.make_node("TopK", ["x", "k"], ["v", "i"], name="planted_topk")
    return node, [k], [1, 5000], {"v": ([1, 4000], TensorProto.FLOAT), "i": ([1, 4000], TensorProto.INT64)}


def _scatter():
    constants = [
        numpy_helper.from_array(np.zeros((1, 1), np.int64), "where"),
        numpy_helper.from_array(np.ones((1, 4), np.float32), "what"),
    ]
    node = helper.make_node("ScatterND", ["x", "where", "what"], ["y"], name="planted_scatter", reduction="add")
    return node, constants, [3, 4], {"y": ([3, 4], TensorProto.FLOAT)}


def _nonzero():
    node = helper.make_node("NonZero", ["x"], ["y"], name="planted_nonzero")
    return node, [], [3, 4], {"y": ([2, 12], TensorProto.INT64)}


def _antialias():
    scales = numpy_helper.from_array(np.array([1, 1, 0.5, 0.5], np.float32), "scales")
    node = helper.make_node("Resize", ["x", "", "scales"], ["y"], name="planted_resize", mode="linear", antialias=1)
    return node, [scales], [1, 3, 8, 8], {"y": ([1, 3, 4, 4], TensorProto.FLOAT)}


def _unknown_op():
    node = helper.make_node("Frobnicate", ["x"], ["y"], name="planted_unknown")
    return node, [], [3, 4], {"y": ([3, 4], TensorProto.FLOAT)}


def _foreign_domain():
    node = helper.make_node("Softmax", ["x"], ["y"], name="planted_foreign", domain="com.example")
    return node, [], [3, 4], {"y": ([3, 4], TensorProto.FLOAT)}


def _graph(node, constants, shape, outputs, extra=()):
    graph = helper.make_graph(
        [helper.make_node("Identity", ["given"], ["x"], name="before"), node, *extra],
        "planted",
        [helper.make_tensor_value_info("given", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, dtype, dims) for name, (dims, dtype) in outputs.items()],
        constants,
        value_info=[helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
    )
    opsets = [helper.make_opsetid("", 20)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets))


@pytest.mark.parametrize(
    ("planted", "words"),
    [
        (_topk, ("TopK", "planted_topk", "4000", "3840")),
        (_scatter, ("ScatterND", "planted_scatter", "add", "MatMul")),
        (_nonzero, ("NonZero", "planted_nonzero", "TopK")),
        (_antialias, ("Resize", "planted_resize", "antialias")),
        (_unknown_op, ("Frobnicate", "planted_unknown", "not on the list")),
        (_foreign_domain, ("Softmax", "planted_foreign", "com.example")),
    ],
    ids=lambda item: getattr(item, "__name__", "").strip("_") or None,
)
def test_a_planted_op_is_refused_by_name(planted, words):
    with pytest.raises(OpNotAllowed) as caught:
        require_allowed(_graph(*planted()), load_oplists())
    for word in words:
        assert word in str(caught.value)


def test_every_list_refuses_what_no_tensorrt_takes():
    for planted in (_topk, _scatter, _nonzero, _antialias, _unknown_op):
        model = _graph(*planted())
        for oplist in load_oplists():
            (text,) = violations(model, [oplist])
            assert oplist.name in text


def test_the_number_of_further_refusals_is_told():
    node, constants, shape, outputs = _nonzero()
    more = helper.make_node("NonZero", ["x"], ["z"], name="second")
    with pytest.raises(OpNotAllowed, match=r"\(1 more\)"):
        require_allowed(_graph(node, constants, shape, outputs, extra=[more]), load_oplists())


def test_an_extra_op_is_taken_where_the_recipe_states_it():
    require_allowed(_graph(*_unknown_op()), load_oplists(), extra={"Frobnicate": "for this test"})


@pytest.mark.parametrize("size", ["N", 0], ids=["symbolic", "zero"])
def test_a_planted_dimension_is_refused_by_name(size):
    node = helper.make_node("Relu", ["x"], ["y"], name="planted_relu")
    whole = _graph(node, [], [2, 4], {"y": ([2, 4], TensorProto.FLOAT)})
    require_static(whole)
    for model in (_graph(node, [], [2, 4], {"y": ([2, size], TensorProto.FLOAT)}),):
        with pytest.raises(DynamicShape) as caught:
            require_static(model)
        assert "planted_relu" in str(caught.value)
        assert f"'{size}'" in str(caught.value)


def test_a_planted_dimension_of_an_input_is_refused():
    node = helper.make_node("Relu", ["x"], ["y"], name="planted_relu")
    with pytest.raises(DynamicShape, match="graph input: the shape of 'given'"):
        require_static(_graph(node, [], ["B", 4], {"y": ([2, 4], TensorProto.FLOAT)}))


def _dims(value):
    shape = value.type.tensor_type.shape
    assert all(dim.HasField("dim_value") and not dim.dim_param for dim in shape.dim), value.name
    return tuple(dim.dim_value for dim in shape.dim)
