"""The pass that writes fp16 and bf16 into a graph, and what stays in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from edgecomp.errors import ExportError
from edgecomp.export.modules import MODULE_KEY
from edgecomp.export.passes import is_named_in, modules_named_in, set_precision

RNG = np.random.default_rng(0)
HALF, SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT


def graph(text: str, modules: Mapping[str, str] | None = None, opset: int = 20, **weights: Any) -> ir.Model:
    """Return a graph of ONNX's text form, nodes named after their first output, with weights and inferred shapes."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> agraph {text}')
    for node in proto.graph.node:
        node.name = f"node_{node.output[0]}"
        if modules and node.output[0] in modules:
            node.metadata_props.add(key=MODULE_KEY, value=modules[node.output[0]])
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True))


def matrix(*shape: int) -> npt.NDArray[np.float32]:
    return RNG.standard_normal(shape, dtype=np.float32)


def types(model: ir.Model) -> dict[str, str]:
    """Return the type that each node but casts computes in, by its name."""
    found = {}
    for node in model.graph:
        if node.op_type != "Cast":
            seen = {value.dtype.name for value in (*node.inputs, *node.outputs) if value is not None and value.dtype}
            found[(node.name or "").removeprefix("node_")] = "/".join(sorted(seen & {"FLOAT", "FLOAT16", "BFLOAT16"}))
    return found


def run(model: ir.Model, **feeds: Any) -> list[npt.NDArray[Any]]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    outputs: list[npt.NDArray[Any]] = session.run(None, feeds)
    return outputs


BLOCK = """(float[1, 6, 8] x) => (float[1, 6, 8] y) {
    normed = LayerNormalization (x, scale, shift)
    q = MatMul (normed, wq)
    k = MatMul (normed, wk)
    kt = Transpose <perm = [0, 2, 1]> (k)
    logits = MatMul (q, kt)
    scaled = Mul (logits, eighth)
    shares = Softmax (scaled)
    mixed = MatMul (shares, normed)
    first = Add (x, mixed)
    normed2 = LayerNormalization (first, scale, shift)
    hidden = MatMul (normed2, wh)
    bent = Gelu (hidden)
    back = MatMul (bent, wb)
    y = Add (first, back)
}"""
WEIGHTS = {
    "scale": matrix(8),
    "shift": matrix(8),
    "wq": matrix(8, 8),
    "wk": matrix(8, 8),
    "wh": matrix(8, 32),
    "wb": matrix(32, 8),
    "eighth": np.float32(0.3),
}


def test_a_block_computes_in_fp16_but_for_norms_and_softmax() -> None:
    model, x = graph(BLOCK, **WEIGHTS), matrix(1, 6, 8)
    (before,) = run(model, x=x)
    islands = set_precision(model, "fp16")
    assert islands == {
        "node_normed": "LayerNormalization",
        "node_scaled": "between islands",  # its product is read by softmax alone
        "node_shares": "Softmax",
        "node_normed2": "LayerNormalization",
    }
    assert types(model) == {name: "FLOAT" if f"node_{name}" in islands else "FLOAT16" for name in types(model)}
    (after,) = run(model, x=x)
    assert after.dtype == np.float32
    assert 1e-5 < np.abs(after - before).max() / np.abs(before).max() < 5e-3  # it does round, and no more than it must


def test_the_residual_stream_is_of_the_reduced_type() -> None:
    model = graph(BLOCK, **WEIGHTS)
    set_precision(model, "fp16")
    assert (types(model)["first"], types(model)["y"]) == ("FLOAT16", "FLOAT16")


def test_one_cast_serves_all_readers() -> None:
    model = graph(BLOCK, **WEIGHTS)
    set_precision(model, "fp16")
    casts = [node for node in model.graph if node.op_type == "Cast"]
    assert len({(node.inputs[0], node.attributes["to"].as_int()) for node in casts}) == len(casts)
    assert len(casts) == 7  # x, both norms (first goes up, too), logits, shares, y


def test_weights_are_stored_in_the_type_they_run_in() -> None:
    model = graph(BLOCK, **WEIGHTS)
    set_precision(model, "fp16")
    stored = {name: value.dtype for name, value in model.graph.initializers.items()}
    assert stored == {name: SINGLE if name in ("scale", "shift", "eighth") else HALF for name in WEIGHTS}
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        assert value.const_value.dtype == value.dtype
        np.testing.assert_array_equal(value.const_value.numpy(), WEIGHTS[name].astype(value.const_value.numpy().dtype))


def test_a_weight_that_both_types_read_is_there_twice() -> None:
    text = """(float[2, 8] x) => (float[2, 8] y, float[2, 8] z) {
        y = MatMul (x, w)
        z = MatMul (x, w)
    }"""
    model = graph(text, w=matrix(8, 8))
    assert set_precision(model, "fp16", fp32=["node_z"]) == {"node_z": "asked: node_z"}
    assert {name: value.dtype for name, value in model.graph.initializers.items()} == {"w": SINGLE, "w.fp16": HALF}
    y, z = run(model, x=matrix(2, 8))
    assert not np.array_equal(y, z)


def test_bf16_needs_the_opset_that_has_it() -> None:
    model = graph(BLOCK, opset=22, **WEIGHTS)
    set_precision(model, "bf16")
    assert types(model)["q"] == "BFLOAT16"
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_inputs_and_outputs_stay_fp32_under_their_names() -> None:
    model = graph(BLOCK, **WEIGHTS)
    set_precision(model, "fp16")
    ends = [*model.graph.inputs, *model.graph.outputs]
    assert [(value.name, value.dtype) for value in ends] == [("x", SINGLE), ("y", SINGLE)]


SCORED = """(float[1, 6, 32] x) => (float[1, 2, 32] y) {
    features = MatMul (x, w)
    norms = ReduceL2 <keepdims = 1> (features, last)
    unit = Div (features, norms)
    turned = Transpose <perm = [0, 2, 1]> (unit)
    alike = MatMul (unit, turned)
    most = ReduceMax <keepdims = 0> (alike, last)
    best, index = TopK (most, two)
    column = Unsqueeze (index, last)
    wide = Expand (column, shape)
    y = GatherElements <axis = 1> (features, wide)
}"""
SCORED_WEIGHTS: dict[str, Any] = {
    "w": matrix(32, 32),
    "last": np.array([-1]),
    "two": np.array([2]),
    "shape": np.array([1, 2, 32]),
}


def test_scores_stay_in_fp32_from_the_last_weight_on() -> None:
    model = graph(SCORED, **SCORED_WEIGHTS)
    islands = set_precision(model, "fp16")
    assert islands == {
        "node_norms": "ReduceL2",
        "node_unit": "scores",
        "node_alike": "scores",
        "node_most": "scores",
        "node_best": "scores",
    }
    assert types(model)["features"] == types(model)["y"] == "FLOAT16"


def test_a_narrow_product_is_a_score() -> None:
    text = """(float[1, 6, 32] x) => (float[1, 2] best, int64[1, 2] index) {
        features = MatMul (x, w)
        score = MatMul (features, head)
        shifted = Add (score, bias)
        flat = Reshape (shifted, shape)
        best, index = TopK (flat, two)
    }"""
    weights = {"w": matrix(32, 32), "head": matrix(32, 1), "bias": matrix(1)}
    model = graph(text, **weights, shape=np.array([1, 6]), two=np.array([2]))
    assert set_precision(model, "fp16") == {
        "node_score": "scores",
        "node_shifted": "scores",
        "node_best": "scores",
    }


def test_tokens_weighted_by_scores_are_tokens() -> None:
    """A merge by matrix product, and what follows it, is none of the flow of a later choice."""
    text = """(float[1, 6, 32] x, float[1, 4, 6] m) => (int64[1, 2] index, float[1, 4, 32] y) {
        total = ReduceSum <keepdims = 1> (m, last)
        share = Div (m, total)
        merged = MatMul (share, x)
        grown = MatMul (merged, w)
        stream = Add (merged, grown)
        norms = ReduceL2 <keepdims = 0> (stream, last)
        best, index = TopK (norms, two)
        y = MatMul (stream, w)
    }"""
    model = graph(text, w=matrix(32, 32), last=np.array([-1]), two=np.array([2]))
    islands = set_precision(model, "fp16")
    assert {"node_total", "node_norms", "node_best"} <= set(islands)
    assert not {"node_merged", "node_grown", "node_stream"} & set(islands)


def test_scores_that_another_graph_chooses_by() -> None:
    text = """(float[1, 6, 6] shares) => (float[1, 6] received) {
        summed = ReduceSum <keepdims = 0> (shares, axis)
        received = Mul (summed, half)
    }"""
    weights = {"axis": np.array([1]), "half": np.float32(0.5)}
    assert "node_received" in set_precision(graph(text, **weights), "fp16", scores=["received"])


@pytest.mark.parametrize(
    ("number", "precision", "kept"),
    [
        (1e-12, "fp16", "holds 1e-12"),
        (1e-12, "bf16", ""),
        (-1e9, "fp16", "holds 1e+09"),
        (-1e9, "bf16", ""),
        (-1e4, "fp16", ""),
        (3.3e38, "fp16", "holds 3.3e+38"),
        (3e-8, "fp16", ""),  # the least that does not become zero, 2^-25, and a tie
        (2.9e-8, "fp16", "holds 2.9e-08"),
    ],
)
def test_a_number_that_the_type_cannot_hold(number: float, precision: Any, kept: str) -> None:
    text = "(float[2, 8] x, float[2, 8] z) => (float[2, 8] y) { a = Add (x, z)\n y = Add (a, c) }"
    model = graph(text, opset=22, c=np.float32(number))
    assert set_precision(model, precision).get("node_y", "") == kept


def test_a_weight_beyond_the_type_is_an_error() -> None:
    weight = matrix(8, 8)
    weight[3, 4] = 7e4
    model = graph("(float[2, 8] x) => (float[2, 8] y) { y = MatMul (x, w) }", {"y": "blocks.3.mlp.fc1"}, w=weight)
    with pytest.raises(ExportError, match=r"w holds 7e\+04, beyond the largest fp16.*--fp32 'blocks\.3\.mlp\.fc1'"):
        set_precision(model, "fp16")


@pytest.mark.parametrize("wrapped", ["", "model.", "model.backbone.model."])
@pytest.mark.parametrize(
    "pattern",
    [
        "blocks.1",
        "blocks.1.mlp",
        "blocks.1*",
        "blocks.1.mlp*",
        "*.fc1",
        "node_y",
        "blocks.1.mlp.fc1",
        "blocks.*.fc1",
        "1.mlp",
        "fc1",
    ],
)
def test_patterns_name_modules_with_all_inside_them_and_nodes(pattern: str, wrapped: str) -> None:
    """What stands around a model (`model.backbone.model.`) is left out by who knows the model alone."""
    text = "(float[2, 8] x) => (float[2, 8] y) { a = MatMul (x, w)\n y = MatMul (a, w) }"
    model = graph(text, {"a": f"{wrapped}blocks.0.mlp.fc2", "y": f"{wrapped}blocks.1.mlp.fc1"}, w=matrix(8, 8))
    assert modules_named_in(model) == [f"{wrapped}blocks.0.mlp.fc2", f"{wrapped}blocks.1.mlp.fc1"]
    assert is_named_in(model, pattern)
    assert set_precision(model, "fp16", fp32=[pattern]) == {"node_y": f"asked: {pattern}"}


@pytest.mark.parametrize(
    "pattern", ["blocks.2", "locks.1", "blocks.1.mlp.fc", "mlp.fc2", "blocks.1.fc1", "1.blocks", "Node_y", "y", "node"]
)
@pytest.mark.parametrize("module", ["blocks.1.mlp.fc1", "model.blocks.1.mlp.fc1", "blocks.12.mlp.fc1", ""])
def test_patterns_that_name_nothing(pattern: str, module: str) -> None:
    """A pattern begins and ends at dots, and leaves out nothing between; a node is named by its whole name."""
    text = "(float[2, 8] x) => (float[2, 8] y) { y = MatMul (x, w) }"
    assert not is_named_in(graph(text, {"y": module}, w=matrix(8, 8)), pattern)


COUNTED = """(float[1, 5, 4] x, float[1, 5, 1] held, bool[1, 3, 5] belongs) => (float[1, 3, 4] y, float[1, 4, 1] size) {
    ones = Cast <to = 1> (belongs)
    sums = MatMul (ones, held)
    size = Concat <axis = 1> (one, sums)
    weighed = Mul (x, held)
    summed = MatMul (ones, weighed)
    y = Div (summed, sums)
}"""


@pytest.mark.parametrize(("precision", "most"), [("fp16", 2048), ("bf16", 256)])
def test_counts_are_exact_beyond_what_the_type_holds(precision: Any, most: int) -> None:
    """A half type holds whole numbers up to 2048 or 256: one more is rounded to even."""
    model = graph(COUNTED, one=np.ones((1, 1, 1), np.float32))
    islands = set_precision(model, precision, counts=["size"])
    assert {name: islands.get(f"node_{name}") for name in ("sums", "size", "weighed", "summed")} == {
        "sums": "counts", "size": "counts", "weighed": None, "summed": None,
    }  # fmt: skip
    without = graph(COUNTED, one=np.ones((1, 1, 1), np.float32))
    assert "node_sums" not in set_precision(without, precision)
    if precision == "bf16":
        return  # ONNX Runtime has no kernels
    held = np.array([most, 1, 3, 5, most + 1], np.float32).reshape(1, 5, 1)
    belongs = np.array([[[1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 1]]], bool)
    _, size = run(model, x=matrix(1, 5, 4), held=held, belongs=belongs)
    assert size.ravel().tolist() == [1, most + 1, 3, most + 1]


def test_moves_keep_the_type_of_what_they_move() -> None:
    text = """(float[4, 2] x) => (float[2, 4] y) {
        a = Transpose (x)
        b = Softmax (a)
        c = Reshape (b, shape)
        y = MatMul (c, w)
    }"""
    model = graph(text, w=matrix(4, 4), shape=np.array([2, 4]))
    set_precision(model, "fp16")
    assert types(model) == {"a": "FLOAT", "b": "FLOAT", "c": "FLOAT", "y": "FLOAT16"}


def test_a_table_that_is_moved_is_stored_as_it_is_read() -> None:
    text = """(float[1, 3, 8] x, int64[3] index) => (float[1, 3, 8] y) {
        rows = Gather (table, index)
        y = Add (x, rows)
    }"""
    model = graph(text, table=matrix(5, 8))
    set_precision(model, "fp16")
    assert model.graph.initializers["table"].dtype == HALF
    assert types(model) == {"rows": "FLOAT16", "y": "FLOAT16"}


def test_a_subgraph_is_refused() -> None:
    inner = onnx.helper.make_graph(
        [onnx.helper.make_node("Neg", ["x"], ["out"])], "inner", [], [onnx.helper.make_tensor_value_info("out", 1, [2])]
    )
    node = onnx.helper.make_node("If", ["c"], ["y"], name="choose", then_branch=inner, else_branch=inner)
    info = onnx.helper.make_tensor_value_info
    outer = onnx.helper.make_graph([node], "g", [info("c", 9, []), info("x", 1, [2])], [info("y", 1, [2])])
    with pytest.raises(ExportError, match="If node 'choose' holds a subgraph"):
        set_precision(ir.from_proto(onnx.helper.make_model(outer)), "fp16")


def test_the_same_graph_gives_the_same_bytes() -> None:
    made = []
    for _ in range(2):
        model = graph(BLOCK, **WEIGHTS)
        set_precision(model, "fp16")
        made.append(ir.to_proto(model).SerializeToString(deterministic=True))
    assert made[0] == made[1]
