"""Twins of bf16 and fp8 graphs: they round as those types do, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed; pip install 'edgecomp[cpu]' brings it")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; pip install 'edgecomp[cpu]' brings it")

import ml_dtypes
import onnx
import onnx_ir as ir

from edgecomp.errors import ExportError
from edgecomp.export.emulate import emulated, types_without_kernels
from edgecomp.export.passes.insert_qdq import insert_qdq, tensors_to_calibrate
from edgecomp.export.ranges import collect_ranges

Array = npt.NDArray[Any]
BF16, FP8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn


def parse(text: str, *, opset: int = 22, ir_version: int = 10, **weights: Array) -> ir.Model:
    """Parse a graph, turn some of its inputs into constants, and infer all types."""
    model = ir.from_onnx_text(f'<ir_version: {ir_version}, opset_import: ["" : {opset}]> {text}')
    for value in list(model.graph.inputs):
        if value.name in weights:
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor(weights[value.name], name=value.name)
            model.graph.initializers[value.name] = value
    model = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model), strict_mode=True))
    for node in model.graph:
        node.name = f"node_{node.outputs[0].name}"
    return model


def session(model: ir.Model) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    content = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def infer(model: ir.Model, **feeds: Array) -> Array:
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    result: Array = session(model).run(None, feeds)[0]
    return result


def bf16(array: Array) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(BF16).astype(np.float32)


def every_bf16_and_what_lies_between() -> Array:
    """Return each bf16 number, the halfway point to the next, both neighbours of that, and any bits at all."""
    bits = np.arange(2**16, dtype=np.uint32) << 16
    drawn = np.random.default_rng(0).integers(0, 2**32, 2**18, dtype=np.uint64).astype(np.uint32)
    return np.concatenate([bits + extra for extra in (0, 0x7FFF, 0x8000, 0x8001)] + [drawn]).view(np.float32)


def same_bits(got: Array, expected: Array) -> None:
    """Compare bit for bit; a NaN is a NaN, whatever its payload."""
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(got), nan)
    np.testing.assert_array_equal(got.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


# -- bf16 ---------------------------------------------------------------------------------------------


def test_bf16_is_rounded_bit_for_bit() -> None:
    """Against ml_dtypes and torch: every number, every tie, numbers below the normal ones, infinities, NaN."""
    torch = pytest.importorskip("torch", reason="torch is not installed; pip install 'edgecomp[cpu]' brings it")
    x = every_bf16_and_what_lies_between()
    model = parse(f"g (float[{x.size}] x) => (float[{x.size}] y) {{ b = Cast <to = 16> (x)  y = Cast <to = 1> (b) }}")
    got = infer(emulated(model), x=x)
    same_bits(got, bf16(x))
    same_bits(got, torch.from_numpy(x).to(torch.bfloat16).float().numpy())


def test_each_op_is_rounded_once() -> None:
    """(x + y) * w in bf16: the sum is rounded before it is multiplied, and the product after."""
    rng = np.random.default_rng(1)
    x, y = (rng.standard_normal(4096).astype(np.float32) for _ in range(2))
    w = rng.standard_normal(4096).astype(BF16)
    model = parse(
        "g (float[4096] x, float[4096] y, bfloat16[4096] w) => (float[4096] z) "
        "{ a = Cast <to = 16> (x)  b = Cast <to = 16> (y)  s = Add (a, b)  p = Mul (s, w)  z = Cast <to = 1> (p) }",
        w=w,
    )
    assert types_without_kernels(model) == ("bf16",)
    with pytest.raises(Exception, match="Could not find an implementation"):
        session(model)
    got = infer(emulated(model), x=x, y=y)
    expected = ((x.astype(BF16) + y.astype(BF16)) * w).astype(np.float32)
    same_bits(got, expected)
    once = bf16(bf16(x + y) * w.astype(np.float32))
    assert (got != once).any(), "the inputs are rounded too"


def test_a_matrix_product_is_summed_in_fp32() -> None:
    """Whole numbers, whose sums fp32 holds exactly and bf16 does not."""
    rng = np.random.default_rng(2)
    x = rng.integers(-100, 100, (8, 64)).astype(np.float32)
    w = rng.integers(-100, 100, (64, 16)).astype(BF16)
    model = parse(
        "g (float[8,64] x, bfloat16[64,16] w) => (float[8,16] y) "
        "{ a = Cast <to = 16> (x)  p = MatMul (a, w)  y = Cast <to = 1> (p) }",
        w=w,
    )
    exact = x @ w.astype(np.float32)
    same_bits(infer(emulated(model), x=x), bf16(exact))
    assert (bf16(exact) != exact).any()


def test_inputs_and_outputs_in_bf16_become_fp32() -> None:
    model = parse("g (bfloat16[64] x) => (bfloat16[64] y, bfloat16[64] h) { h = Sqrt (x)  y = Add (h, x) }")
    twin = emulated(model)
    assert [value.dtype for value in (*twin.graph.inputs, *twin.graph.outputs)] == [ir.DataType.FLOAT] * 3
    assert [value.name for value in twin.graph.outputs] == ["y", "h"]
    x = np.random.default_rng(3).uniform(0, 9, 64).astype(np.float32)
    root = np.sqrt(bf16(x)).astype(BF16)
    same_bits(infer(twin, x=x), (root + x.astype(BF16)).astype(np.float32))
    same_bits(session(twin).run(["h"], {"x": x})[0], root.astype(np.float32))


def test_moving_values_is_not_rounded_again() -> None:
    model = parse(
        "g (bfloat16[4,16] x) => (bfloat16[16,4] y) { r = Relu (x)  y = Transpose <perm = [1, 0]> (r) }",
    )
    casts = [node for node in emulated(model).graph if node.op_type == "Cast"]
    assert len(casts) == 2, "the input alone is rounded"


def test_constants_inside_nodes_are_converted() -> None:
    model = parse(
        "g (bfloat16[4] x) => (bfloat16[4] y) { c = Constant <value = bfloat16[1] {16448}> ()  y = Mul (x, c) }"
    )
    x = np.array([1.0, -2.0, 0.3, 1e30], np.float32)
    same_bits(infer(emulated(model), x=x), bf16(bf16(x) * np.float32(3)))


def test_islands_in_fp32_stay_exact() -> None:
    model = parse(
        "g (float[64] x) => (float[64] y) "
        "{ a = Cast <to = 16> (x)  w = Cast <to = 1> (a)  e = Exp (w)  l = Log (e)  y = Mul (l, l) }",
    )
    x = np.random.default_rng(4).standard_normal(64).astype(np.float32)
    got = infer(emulated(model), x=x)
    assert (bf16(got) != got).any()
    np.testing.assert_allclose(got, bf16(x) ** 2, rtol=1e-5, atol=1e-6)


def test_functions_are_inlined() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 22, "own" : 1]>
        g (bfloat16[64] x) => (bfloat16[64] y) { y = own.twice (x) }
        <domain: "own", opset_import: ["" : 22]> twice (v) => (w) { s = Add (v, v)  w = Mul (s, v) }
    """
    model = ir.from_onnx_text(text)
    twin = emulated(model)
    assert not twin.functions
    x = np.random.default_rng(5).standard_normal(64).astype(np.float32)
    b = x.astype(BF16)
    same_bits(infer(twin, x=x), ((b + b) * b).astype(np.float32))
    assert model.functions, "the given graph is left as it was"


def test_a_value_without_a_type_is_refused() -> None:
    model = parse("g (bfloat16[4] x) => (bfloat16[4] y) { h = Neg (x)  y = Neg (h) }")
    next(iter(model.graph)).outputs[0].type = None
    with pytest.raises(ExportError, match=r"the type of what node 'node_h' \(Neg\) gives is not known"):
        emulated(model)


# -- fp8 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.037, 3e-5])
@pytest.mark.parametrize("rest", ["float", "float16", "bfloat16"])
def test_fp8_is_rounded_bit_for_bit(scale: float, rest: str) -> None:
    """The quotient is rounded once and saturates at 448; the way back is one product in the rest's type."""
    dtype = {"float": np.float32, "float16": np.float16, "bfloat16": BF16}[rest]
    rng = np.random.default_rng(6)
    halfway = np.arange(256, dtype=np.uint8).view(FP8).astype(np.float32)
    halfway = np.concatenate([halfway, (halfway[1:] + halfway[:-1]) / 2])
    wide = np.concatenate(
        [rng.standard_normal(4000) * 10.0 ** rng.integers(-4, 4, 4000), halfway[np.isfinite(halfway)]]
    )
    with np.errstate(over="ignore"):
        x = (wide * scale).astype(dtype)
    x = x[np.isfinite(x.astype(np.float32))]
    step = np.asarray(scale, dtype)
    n, number = x.size, {"float": 1, "float16": 10, "bfloat16": 16}[rest]
    model = parse(
        f"g (float[{n}] x, {rest} s, float8e4m3fn z) => (float[{n}] y) {{ h = Cast <to = {number}> (x) "
        "q = QuantizeLinear (h, s, z)  d = DequantizeLinear (q, s, z)  y = Cast <to = 1> (d) }",
        ir_version=10,
        s=step,
        z=np.zeros((), FP8),
    )
    assert "fp8" in types_without_kernels(model)
    got = infer(emulated(model), x=x.astype(np.float32))
    quotient = x.astype(np.float32) / step.astype(np.float32)
    levels = np.clip(quotient, -448, 448).astype(FP8).astype(np.float32)
    assert np.abs(levels).max() == 448
    same_bits(got, (levels * step.astype(np.float32)).astype(dtype).astype(np.float32))


def test_a_quantised_layer_runs_and_equals_its_definition() -> None:
    model = parse(
        "g (float[4,32] x, float[32,16] w) => (float[4,16] y) { y = MatMul (x, w) }",
        opset=20,
        w=np.random.default_rng(7).standard_normal((32, 16)).astype(np.float32),
    )
    x = np.random.default_rng(8).standard_normal((4, 32)).astype(np.float32)
    ranges = collect_ranges(model, [{"x": x}], tensors=tensors_to_calibrate(model))
    insert_qdq(model, ranges, kind="fp8")
    scale, step = (np.float32(model.graph.initializers[k].const_value.numpy()) for k in ("x.scale", "w.fp8.scale"))  # type: ignore[union-attr]
    w = model.graph.initializers["w.fp8"].const_value.numpy().astype(np.float32) * step  # type: ignore[union-attr]
    levels = np.clip(x / scale, -448, 448).astype(FP8).astype(np.float32) * scale
    twin = emulated(model)
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in twin.graph}
    np.testing.assert_allclose(infer(twin, x=x), levels @ w, rtol=1e-5, atol=1e-5)


def test_scales_per_channel_have_no_twin() -> None:
    model = parse(
        "g (float8e4m3fn[4,2] q, float[2] s) => (float[4,2] y) { y = DequantizeLinear <axis = 1> (q, s) }", opset=20
    )
    with pytest.raises(ExportError, match=r"node 'node_y' \(DequantizeLinear\) has fp8 scales per channel"):
        emulated(model)


# -- graphs that need none ----------------------------------------------------------------------------


def test_a_graph_without_those_types_needs_no_twin() -> None:
    model = parse("g (float16[4] x) => (float16[4] y) { y = Neg (x) }", opset=20)
    assert types_without_kernels(model) == ()
    twin = emulated(model)
    assert twin is not model
    assert ir.to_proto(twin).SerializeToString() == ir.to_proto(model).SerializeToString()
