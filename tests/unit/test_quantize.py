"""Q/DQ: what is quantised, with which numbers, and that ONNX Runtime and TensorRT for RTX take it."""

from __future__ import annotations

import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed; pip install 'edgecomp[cpu]' brings it")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; pip install 'edgecomp[cpu]' brings it")

import ml_dtypes
import onnx
import onnx_ir as ir

from edgecomp.bundle import open_bundle
from edgecomp.engines import BuiltEngine, build_engine, installed_flavours
from edgecomp.errors import ExportError, InvalidSpec, TargetMismatch
from edgecomp.export.emulate import emulated
from edgecomp.export.opcheck import require_allowed
from edgecomp.export.passes import WeightsFile, require_static, share_weights
from edgecomp.export.passes.insert_qdq import insert_qdq, quantizable, tensors_to_calibrate
from edgecomp.export.passes.strip_metadata import MODULE_KEY
from edgecomp.export.ranges import Range, collect_ranges, run_graph
from edgecomp.parity.metrics import Difference, compare
from edgecomp.specs import load_oplists
from edgecomp.specs.origin import file_sha256
from edgecomp.specs.target import load_target

Array = npt.NDArray[Any]

rtx = pytest.mark.skipif("rtx" not in installed_flavours(), reason="TensorRT for RTX is not installed")

BLOCK = """<ir_version: 10, opset_import: ["" : 20]>
g (float[1,24,32] x, float[32,48] w1, float[48] b1, float[48,32] w2, float[32] b2, float[32] one, float[32] none)
=> (float[1,24,32] y)
{
  n = LayerNormalization (x, one, none)
  h = MatMul (n, w1)
  hb = Add (h, b1)
  a = Gelu (hb)
  o = MatMul (a, w2)
  ob = Add (b2, o)
  y = Add (x, ob)
}"""


def weight(*shape: int, seed: int = 0, scale: float = 0.1) -> Array:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def with_weights(text: str, **weights: Array) -> ir.Model:
    """Parse a graph, turn some of its inputs into constants, and infer all types."""
    model = ir.from_onnx_text(text)
    for value in list(model.graph.inputs):
        if value.name in weights:
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor(weights[value.name], name=value.name)
            model.graph.initializers[value.name] = value
    model = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model), strict_mode=True))
    for node in model.graph:
        node.name = f"node_{node.outputs[0].name}"
        node.metadata_props[MODULE_KEY] = f"blocks.0.{node.outputs[0].name}"
    return model


def block() -> ir.Model:
    return with_weights(
        BLOCK,
        w1=weight(32, 48),
        b1=weight(48, seed=1),
        w2=weight(48, 32, seed=2),
        b2=weight(32, seed=3),
        one=np.ones(32, np.float32),
        none=np.zeros(32, np.float32),
    )


def inputs(model: ir.Model, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        str(value.name): rng.standard_normal([int(size) for size in value.shape or ()]).astype(np.float32)  # type: ignore[arg-type]
        for value in model.graph.inputs
    }


def calibrated(model: ir.Model, **words: Any) -> dict[str, Range]:
    site = {key: words[key] for key in ("attention", "convs", "keep") if key in words}
    names = tensors_to_calibrate(model, **site)
    return collect_ranges(model, [inputs(model, seed) for seed in range(3)], tensors=names) if names else {}


def quantize(model: ir.Model, **words: Any) -> tuple[Any, ...]:
    return insert_qdq(model, calibrated(model, **words), **words)


def infer(model: ir.Model, folder: Path, feeds: dict[str, Array], **entries: str) -> Array:
    import onnxruntime

    path = folder / "run.onnx"
    path.write_bytes(ir.to_proto(model).SerializeToString())
    onnx.checker.check_model(str(path), full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    for key, value in entries.items():
        options.add_session_config_entry(f"session.{key}", value)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    result: Array = session.run(None, feeds)[0]
    return result


def ops(model: ir.Model) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in model.graph)


def constant(value: ir.Value | None) -> Array:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def fake_quantized(array: Array, scale: Array) -> Array:
    return np.clip(np.rint(array / scale), -127, 127) * scale


# -- the numbers --------------------------------------------------------------------------------------


def test_int8_equals_its_definition(tmp_path: Path) -> None:
    """Each linear layer multiplies round(x/s) by round(w/t), column by column, times s and t."""
    model = with_weights(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[1,5,32] x, float[32,48] w) => (float[1,5,48] y) '
        "{ y = MatMul (x, w) }",
        w=weight(32, 48) * np.geomspace(1e-3, 10, 48, dtype=np.float32),
    )
    w, feeds = constant(model.graph.initializers["w"]).copy(), inputs(model, 5)
    (found,) = quantize(model, kind="int8")
    (name, largest) = found.activations[0]
    assert (found.node, found.op, found.module, found.weight, name) == ("node_y", "MatMul", "blocks.0.y", "w", "x")
    stored, scale = (constant(model.graph.initializers[key]) for key in ("w.int8", "w.int8.scale"))
    assert stored.dtype == np.int8
    np.testing.assert_allclose(scale, np.abs(w).max(0) / 127, rtol=1e-6)
    assert (np.abs(stored).max(0) == 127).all()
    assert np.abs(stored * scale - w).max(0) == pytest.approx(scale / 2, rel=0.2)
    x = feeds["x"].astype(np.float64)
    expected = fake_quantized(x, np.float64(largest / 127)) @ (stored * scale.astype(np.float64))
    for entries in ({"x64quantprecision": "1"}, {"disable_quant_qdq": "1"}):
        np.testing.assert_allclose(infer(model, tmp_path, feeds, **entries), expected, atol=1e-5)


def test_fp8_has_one_scale_and_saturates(tmp_path: Path) -> None:
    model = block()
    w1 = constant(model.graph.initializers["w1"]).copy()
    found = quantize(model, kind="fp8")
    assert [one.node for one in found] == ["node_h", "node_o"]
    stored, scale = (constant(model.graph.initializers[key]) for key in ("w1.fp8", "w1.fp8.scale"))
    assert stored.dtype == ml_dtypes.float8_e4m3fn
    assert scale.shape == ()
    assert scale == pytest.approx(np.abs(w1).max() / 448, rel=1e-6)
    assert np.abs(stored.astype(np.float32)).max() == 448
    np.testing.assert_array_equal(stored, np.clip(w1 / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn))
    assert np.isfinite(infer(model, tmp_path, inputs(model, 9), disable_quant_qdq="1")).all()


@pytest.mark.parametrize(("kind", "limit"), [("int8", 0.02), ("fp8", 0.06)])
def test_a_block_keeps_its_values(kind: str, limit: float, tmp_path: Path) -> None:
    model = block()
    feeds = inputs(model, 7)
    before = infer(model, tmp_path, feeds)
    assert len(quantize(model, kind=kind)) == 2
    after = infer(model, tmp_path, feeds, disable_quant_qdq="1")
    error = np.abs(after - before).max() / np.abs(before).max()
    assert 0 < error < limit


def test_onnx_runtime_computes_in_int8(tmp_path: Path) -> None:
    """Without the bias of full rank it would join MatMul and Add to an fp32 Gemm first."""
    model = block()
    feeds = inputs(model, 7)
    reference = infer(model, tmp_path, feeds)
    quantize(model, kind="int8")
    after = infer(model, tmp_path, feeds, x64quantprecision="1")
    kinds = collections.Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert kinds["MatMulIntegerToFloat"] == 2
    assert not {"MatMul", "Gemm", "DequantizeLinear"} & kinds.keys()
    assert np.abs(after - reference).max() / np.abs(reference).max() < 0.02


def test_biases_get_the_rank_of_what_they_are_added_to() -> None:
    model = block()
    quantize(model, kind="int8")
    assert {key for key in model.graph.initializers if key.startswith("b")} == {"b1.rank3", "b2.rank3"}
    assert constant(model.graph.initializers["b1.rank3"]).shape == (1, 1, 48)


@pytest.mark.parametrize("scale_type", ["fp16", "bf16"])
def test_scales_fit_the_type_that_will_hold_them(scale_type: str) -> None:
    held = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}[scale_type]
    model = block()
    ranges = calibrated(model)
    largest = np.abs(constant(model.graph.initializers["w1"])).max(0)
    (first, _) = insert_qdq(model, ranges, kind="int8", scale_type=scale_type)  # type: ignore[arg-type]
    for key, value in model.graph.initializers.items():
        if key.endswith(".scale"):
            array = constant(value)
            assert array.dtype == np.float32
            np.testing.assert_array_equal(array, array.astype(held).astype(np.float32))
    scale = constant(model.graph.initializers["w1.int8.scale"])
    assert (scale * 127 >= largest).all(), "a scale that is rounded down would cut the largest weight"
    assert (scale <= largest / 127 * (1 + 2.0**-7)).all()
    assert first.activations[0][1] >= ranges["n"].absmax


def test_a_column_of_zeros_stays_zero() -> None:
    w = weight(32, 48)
    w[:, 5] = 0
    model = with_weights(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[2,32] x, float[32,48] w) => (float[2,48] y) '
        "{ y = MatMul (x, w) }",
        w=w,
    )
    quantize(model, kind="int8")
    assert constant(model.graph.initializers["w.int8.scale"])[5] == 1
    assert not constant(model.graph.initializers["w.int8"])[:, 5].any()


# -- which nodes --------------------------------------------------------------------------------------


def test_an_activation_that_several_nodes_read_is_quantised_once() -> None:
    model = with_weights(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[1,8,32] x, float[32,32] q, float[32,32] k) '
        "=> (float[1,8,32] y) { a = MatMul (x, q)  b = MatMul (x, k)  c = MatMul (b, q)  y = Sum (a, b, c) }",
        q=weight(32, 32),
        k=weight(32, 32, seed=1),
    )
    assert len(quantize(model, kind="int8")) == 3
    assert ops(model) == {"QuantizeLinear": 2, "DequantizeLinear": 5, "MatMul": 3, "Sum": 1}
    assert not {"q", "k"} & set(model.graph.initializers)


@pytest.mark.parametrize("trans_b", [0, 1])
def test_gemm_becomes_a_product_and_a_sum(trans_b: int, tmp_path: Path) -> None:
    shape = (48, 32) if trans_b else (32, 48)
    model = with_weights(
        f'<ir_version: 10, opset_import: ["" : 20]> g (float[4,32] x, float[{shape[0]},{shape[1]}] w, float[48] b) '
        f"=> (float[4,48] y) {{ y = Gemm <transB = {trans_b}> (x, w, b) }}",
        w=weight(*shape),
        b=weight(48, seed=1),
    )
    feeds = inputs(model)
    before = infer(model, tmp_path, feeds)
    (found,) = quantize(model, kind="int8")
    assert (found.node, found.op, found.module) == ("node_y", "Gemm", "blocks.0.y")
    assert ops(model) == {"QuantizeLinear": 1, "DequantizeLinear": 2, "MatMul": 1, "Add": 1}
    assert "w" not in model.graph.initializers
    assert [value.name for value in model.graph.outputs] == ["y"]
    after = infer(model, tmp_path, feeds, x64quantprecision="1")
    assert np.abs(after - before).max() / np.abs(before).max() < 0.02


def test_gemms_that_share_a_weight_run_and_store_it_once(tmp_path: Path) -> None:
    model = with_weights(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[4,32] x, float[32,32] w) => (float[4,32] y) '
        "{ h = Gemm <transB = 1> (x, w)  y = Gemm <transB = 1> (h, w) }",
        w=weight(32, 32),
    )
    feeds = inputs(model)
    before = infer(model, tmp_path, feeds)
    assert [one.weight for one in quantize(model, kind="int8")] == ["w", "w"]
    assert ops(model) == {"QuantizeLinear": 2, "DequantizeLinear": 4, "MatMul": 2}
    first, second = (constant(model.graph.initializers[key]) for key in ("w.transposed.int8", "w.transposed.int8.1"))
    np.testing.assert_array_equal(first, second)
    with WeightsFile(tmp_path / "weights.data") as file:
        share_weights(model, file)
    assert file.size == 32 * 32
    model.graph.initializers["w.transposed.int8"].const_value = ir.tensor(first)
    model.graph.initializers["w.transposed.int8.1"].const_value = ir.tensor(second)
    assert not {"w", "w.transposed"} & set(model.graph.initializers)
    after = infer(model, tmp_path, feeds, x64quantprecision="1")
    assert np.abs(after - before).max() / np.abs(before).max() < 0.03


def test_a_gemm_with_factors_is_left() -> None:
    model = with_weights(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[4,32] x, float[32,48] w) => (float[4,48] y) '
        "{ y = Gemm <alpha = 0.5> (x, w) }",
        w=weight(32, 48),
    )
    assert quantizable(model) == ()


SCORES = """<ir_version: 10, opset_import: ["" : 20]>
g (float[1,24,32] x, float[32,32] w, float[32,16] s, float[16,1] t, int64[1] k, int64[1] last, int64[3] wide)
=> (float[1,4,32] y)
{
  v = MatMul (x, w)
  h = MatMul (v, s)
  score = MatMul (h, t)
  flat = Squeeze (score, last)
  top, index = TopK (flat, k)
  column = Unsqueeze (index, last)
  where = Expand (column, wide)
  y = GatherElements <axis = 1> (v, where)
}"""


def test_layers_that_only_decide_keep_their_type() -> None:
    model = with_weights(
        SCORES,
        w=weight(32, 32),
        s=weight(32, 16, seed=1),
        t=weight(16, 1, seed=2),
        k=np.array([4]),
        last=np.array([-1]),
        wide=np.array([1, 4, 32]),
    )
    assert [node.name for node in quantizable(model)] == ["node_v"]
    model.graph.outputs.append(next(node.outputs[0] for node in model.graph if node.op_type == "TopK"))
    assert [node.name for node in quantizable(model)] == ["node_v"], "the score of what stays is a score"
    model.graph.outputs.append(next(node.outputs[0] for node in model.graph if node.name == "node_h"))
    assert [node.name for node in quantizable(model)] == ["node_v", "node_h"]


def test_keep_leaves_nodes_as_they_are() -> None:
    model = block()
    (found,) = quantize(model, kind="int8", keep=lambda node: node.name == "node_h")
    assert found.node == "node_o"
    assert "w1" in model.graph.initializers


ATTENTION = """<ir_version: 10, opset_import: ["" : 20]>
g (float[1,2,24,16] q, float[1,2,16,24] k, float[1,2,24,16] v, float[1,1,1,24] bias)
=> (float[1,2,24,16] y, float[1,2,24,24] m)
{
  s = MatMul (q, k)
  sb = Add (s, bias)
  p = Softmax (sb)
  y = MatMul (p, v)
  m = MatMul (q, k)
}"""


def test_attention_is_quantised_where_it_is_asked_for(tmp_path: Path) -> None:
    model = with_weights(ATTENTION)
    assert quantizable(model) == ()
    assert [node.name for node in quantizable(model, attention=True)] == ["node_s", "node_y"]
    feeds = inputs(model)
    before = infer(model, tmp_path, feeds)
    found = quantize(model, kind="int8", attention=True)
    assert [(one.weight, [name for name, _ in one.activations]) for one in found] == [
        ("", ["q", "k"]),
        ("", ["p", "v"]),
    ]
    after = infer(model, tmp_path, feeds, disable_quant_qdq="1")
    assert 0 < np.abs(after - before).max() / np.abs(before).max() < 0.05


def test_conv_is_quantised_by_output_channel(tmp_path: Path) -> None:
    model = with_weights(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[1,3,32,32] x, float[20,3,8,8] w) => (float[1,20,4,4] y) '
        "{ y = Conv <strides = [8, 8]> (x, w) }",
        w=weight(20, 3, 8, 8) * np.geomspace(0.01, 1, 20, dtype=np.float32).reshape(20, 1, 1, 1),
    )
    assert quantizable(model) == ()
    feeds = inputs(model)
    before = infer(model, tmp_path, feeds)
    quantize(model, kind="int8", convs=True)
    scale = next(constant(value) for key, value in model.graph.initializers.items() if key == "w.int8.scale")
    assert scale.shape == (20,)
    after = infer(model, tmp_path, feeds, disable_quant_qdq="1")
    assert 0 < np.abs(after - before).max() / np.abs(before).max() < 0.02


def test_a_graph_without_linear_layers_is_left(tmp_path: Path) -> None:
    model = with_weights(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[1,8,32] x) => (float[1,8,32] y) { y = Relu (x) }'
    )
    before = ir.to_proto(model).SerializeToString()
    assert quantize(model, kind="int8") == ()
    assert ir.to_proto(model).SerializeToString() == before


# -- a bundle's weights -------------------------------------------------------------------------------


def test_graphs_that_share_weights_share_them_quantised(tmp_path: Path) -> None:
    with WeightsFile(tmp_path / "weights.data") as file:
        for number in range(2):
            model = block()
            names = tensors_to_calibrate(model)
            ranges = collect_ranges(model, [inputs(model, number)], tensors=names)
            insert_qdq(model, ranges, kind="int8")
            share_weights(model, file, user=str(number))
        assert 2 * 32 * 48 <= file.size < 2 * 32 * 48 + 8192


def test_the_bytes_are_the_same_each_time() -> None:
    texts = []
    for _ in range(2):
        model = block()
        quantize(model, kind="int8")
        texts.append(ir.to_proto(model).SerializeToString(deterministic=True))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_the_op_lists_take_it(kind: str) -> None:
    model = block()
    quantize(model, kind=kind, attention=True, convs=True)
    require_allowed(model, load_oplists())
    require_static(model)


# -- whole methods ------------------------------------------------------------------------------------


def golden_case(bundle: Path, case: str) -> tuple[ir.Model, list[dict[str, Array]], dict[str, Array]]:
    """Return a bundle's first graph, what it reads for both golden cases, and what `case` should give."""
    from safetensors.numpy import load_file

    manifest = open_bundle(bundle).manifest
    bucket, tensors = manifest.buckets[0], load_file(bundle / "golden.safetensors")
    feeds = [
        {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
        for start in (f"input.{case}.", "input.photo.")
    ]
    if bucket.stem:
        handed = run_graph(ir.load(bundle / bucket.stem), feeds)
        feeds = [given | made for given, made in zip(feeds, handed, strict=True)]
    start = f"output.{case}.{bucket.golden_part}."
    expected = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
    model = ir.load(bundle / bucket.model)
    names = [str(value.name) for value in model.graph.inputs]
    return model, [{name: feed[name] for name in names} for feed in feeds], expected


def check_method(bundle: Path, kind: str, folder: Path) -> dict[str, Difference]:
    """Quantise a bundle's first graph, calibrated on both cases, and compare each fp32 output with the golden."""
    model, feeds, expected = golden_case(bundle, "seeded")
    ranges = collect_ranges(model, feeds, tensors=tensors_to_calibrate(model))
    found = insert_qdq(model, ranges, kind=kind)  # type: ignore[arg-type]
    assert len(found) >= 10
    assert not any(node.op_type == "QuantizeLinear" for body in model.functions.values() for node in body)
    twin = emulated(model) if kind == "fp8" else model
    folder.mkdir(exist_ok=True)
    outputs = infer_all(twin, folder, feeds[0])
    return {name: compare(got, expected[name]) for name, got in outputs.items() if expected[name].dtype == np.float32}


def infer_all(model: ir.Model, folder: Path, feeds: dict[str, Array]) -> dict[str, Array]:
    import onnxruntime

    ir.save(model, folder / "all.onnx", external_data="all.data")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(str(folder / "all.onnx"), options, providers=["CPUExecutionProvider"])
    return {item.name: array for item, array in zip(session.get_outputs(), session.run(None, feeds), strict=True)}


#: The least cosine of a token and the largest error over the largest value: twice the distances that were measured.
#: The resampler is one of 32 channels with a gate, where two quantised numbers are multiplied with each other.
LIMITS = {
    ("exported", "int8"): (0.997, 0.14),
    ("exported", "fp8"): (0.993, 0.22),
    ("exported_tokens", "int8"): (0.964, 0.33),
    ("exported_tokens", "fp8"): (0.93, 0.35),
}


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("fixture", ["exported", "exported_tokens"])
def test_a_method_keeps_its_values(fixture: str, kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    cosine, error = LIMITS[fixture, kind]
    for name, difference in check_method(request.getfixturevalue(fixture), kind, tmp_path).items():
        assert difference.cosine_min >= cosine, name
        assert 0 < difference.max_rel <= error, name


@pytest.mark.slow
def test_a_method_that_selects_keeps_its_values(tmp_path: Path) -> None:
    """int8 alone: on random weights scores are so near one another that fp8 exchanges tokens, and tome's int8 too."""
    pytest.importorskip("torch")
    from edgecomp import api

    bundle = api.export("attention-pruning", preset="smoke-inside", out=tmp_path / "bundle").bundle
    cosine, error = LIMITS["exported", "int8"]
    for name, difference in check_method(bundle, "int8", tmp_path / "run").items():
        assert difference.cosine_min >= cosine, name
        assert difference.max_rel <= error, name


@rtx
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "target"), [("int8", "a10"), ("int8", "rtx-5090"), ("fp8", "rtx-4090")])
@pytest.mark.parametrize(
    ("method", "preset"),
    [("lookupvit", "smoke"), ("perceiver", "smoke"), ("tome", "smoke"), ("attention-pruning", "smoke-inside")],
)
def test_rtx_builds_a_method(
    method: str, preset: str, kind: str, target: str, build: Callable[..., BuiltEngine], tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    from edgecomp import api

    model, feeds, _ = golden_case(api.export(method, preset=preset, out=tmp_path / "bundle").bundle, "seeded")
    ranges = collect_ranges(model, feeds, tensors=tensors_to_calibrate(model))
    found = insert_qdq(model, ranges, kind=kind)  # type: ignore[arg-type]
    for value in model.graph.initializers.values():
        value.const_value = ir.tensor(constant(value), name=value.name)
    layers = build(model, kind, target).record.layer_types
    assert layers["DEQUANTIZE"] - layers["QUANTIZE"] == len(found)


# -- bad input ----------------------------------------------------------------------------------------


def test_a_range_that_is_missing_is_named() -> None:
    model = block()
    ranges = calibrated(model)
    ranges.pop("a")
    with pytest.raises(ExportError, match="node 'node_o' reads 'a', whose range was not collected"):
        insert_qdq(model, ranges, kind="int8")


def test_an_old_opset_is_refused() -> None:
    model = block()
    ranges = calibrated(model)
    model.opset_imports[""] = 18
    with pytest.raises(
        InvalidSpec, match="int8 needs opset 19 or newer, and the graph is at 18; export with --opset 20"
    ):
        insert_qdq(model, ranges, kind="int8")


def test_unknown_words_list_the_choices() -> None:
    with pytest.raises(InvalidSpec, match="'int4'; choices: int8, fp8"):
        insert_qdq(block(), {}, kind="int4")  # type: ignore[arg-type]
    with pytest.raises(InvalidSpec, match="'fp64'; choices: fp32, fp16, bf16"):
        insert_qdq(block(), {}, kind="int8", scale_type="fp64")  # type: ignore[arg-type]


# -- TensorRT for RTX ---------------------------------------------------------------------------------


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., BuiltEngine]:
    def build(model: ir.Model, precision: str, target: str) -> BuiltEngine:
        path = tmp_path / "model.onnx"
        path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
        return build_engine(
            path,
            tmp_path,
            target=load_target(target),
            runtime="rtx",
            precision=precision,
            onnx_sha256=file_sha256(path),
            plugin="off",
            progress=lambda line: None,
        )

    return build


@rtx
@pytest.mark.parametrize(
    ("kind", "target"), [("int8", "a10"), ("int8", "rtx-5090"), ("fp8", "rtx-4090"), ("fp8", "rtx-5090")]
)
def test_rtx_builds_it(kind: str, target: str, build: Callable[..., BuiltEngine]) -> None:
    model = block()
    quantize(model, kind=kind)
    layers = build(model, kind, target).record.layer_types
    assert (layers["QUANTIZE"], layers["DEQUANTIZE"], layers["MATRIX_MULTIPLY"]) == (2, 4, 2)


@rtx
def test_fp8_is_what_sm86_refuses(build: Callable[..., BuiltEngine]) -> None:
    model = block()
    quantize(model, kind="fp8")
    with pytest.raises(TargetMismatch, match=r"a10 \(SM86\) does not run fp8"):
        build(model, "fp8", "a10")
