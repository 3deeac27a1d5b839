"""What a graph costs, counted from its shapes: FLOPs, bytes, kinds, roles, blocks; and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx", reason="onnx is not installed; pip install 'edgecomp[cpu]' brings it")

import onnx
from onnx import parser

from edgecomp.errors import RunError
from edgecomp.export.costs import count_costs
from edgecomp.specs.costs import GraphCosts, OpCost, multiply_adds

MERGE = """
< domain: "edgecomp", opset_import: ["" : 20] >
TopKMerge (metric, x, size) => (y, count, origin) {
    k = Constant <value_ints: ints = [3]> ()
    last = Constant <value_ints: ints = [-1]> ()
    score = ReduceSum (metric, last)
    flat = Squeeze (score, last)
    top, index = TopK (flat, k)
    wide = Unsqueeze (index, last)
    y = GatherND <batch_dims = 1> (x, wide)
    count = GatherND <batch_dims = 1> (size, wide)
    origin = Identity (index)
}
"""


def write(folder: Path, body: str, inputs: str, outputs: str, *, functions: str = "", name: str = "model") -> Path:
    own = ', "edgecomp" : 1' if functions else ""
    text = f'<ir_version: 10, opset_import: ["" : 20{own}]> g ({inputs}) => ({outputs}) {{ {body} }} {functions}'
    path = folder / f"{name}.onnx"
    onnx.save(parser.parse_model(text), path)
    return path


def count(folder: Path, body: str, inputs: str, outputs: str, **more: Any) -> GraphCosts:
    functions, batch = more.get("functions", ""), more.get("batch", 0)
    return count_costs(write(folder, body, inputs, outputs, functions=functions), batch=batch)


def the(costs: GraphCosts, op: str) -> OpCost:
    (found,) = [one for one in costs.ops if one.op == op]
    return found


def test_a_product_with_weights_counts_each_byte_once(tmp_path: Path) -> None:
    w = "w = Constant <value = float[8,4] {" + ", ".join(["1"] * 32) + "}> ()"
    costs = count(tmp_path, f"{w}\n t = MatMul (x, w)\n y = Add (t, t)", "float[2,5,8] x", "float[2,5,4] y")
    product, add = the(costs, "MatMul"), the(costs, "Add")
    assert (product.flops, product.kind, product.of_weights) == (2 * 2 * 5 * 8 * 4, "matmul", True)
    assert (product.bytes_read, product.weight_bytes, product.bytes_written) == (320, 128, 160)
    assert (add.flops, add.bytes_read, add.kind) == (0, 160, "elementwise")
    assert (costs.weight_bytes, costs.batch, costs.precision) == (128, 2, "fp32")


@pytest.mark.parametrize(
    ("op", "inputs", "outputs", "more", "expected"),
    [
        ("Gemm", [(7, 24), (24, 40)], [(7, 40)], {}, 7 * 24 * 40),
        ("Gemm", [(24, 7), (24, 40)], [(7, 40)], {"transposed": True}, 7 * 24 * 40),
        ("Conv", [(1, 4, 8, 8), (8, 2, 3, 3)], [(1, 8, 6, 6)], {}, 8 * 36 * 18),
        ("ConvTranspose", [(1, 4, 8, 8), (4, 6, 2, 2)], [(1, 6, 16, 16)], {}, 4 * 64 * 24),
        ("Einsum", [(2, 3, 5, 8), (2, 3, 7, 8)], [(2, 3, 5, 7)], {"equation": "bhid,bhjd->bhij"}, 2 * 3 * 5 * 7 * 8),
        ("Einsum", [(2, 3, 5), (5, 4)], [(2, 3, 4)], {"equation": "...i, ij -> ...j"}, 2 * 3 * 5 * 4),
        ("Einsum", [(2, 3)], [(3, 2)], {"equation": "ij->ji"}, 0),
        ("Attention", [(2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)], [(2, 3, 5, 4)], {}, 2 * 3 * 5 * 7 * 12),
        ("Attention", [(2, 5, 24), (2, 7, 24), (2, 7, 12)], [(2, 5, 12)], {}, 2 * 5 * 7 * 36),
        ("Attention", [(2, 3, 1, 8), (2, 3, 1, 8), (2, 3, 1, 8)], [(2, 3, 1, 8)], {"past": 99}, 2 * 3 * 100 * 16),
        ("Softmax", [(2, 3)], [(2, 3)], {}, 0),
    ],
)
def test_multiply_adds(op: str, inputs: list[Any], outputs: list[Any], more: dict[str, Any], expected: int) -> None:
    assert multiply_adds(op, inputs, outputs, **more) == expected


def test_what_constants_alone_decide_costs_nothing(tmp_path: Path) -> None:
    body = (
        "a = Constant <value = float[4,4] {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}> ()\n b = Transpose (a)\n y = MatMul (x, b)"
    )
    costs = count(tmp_path, body, "float[2,4] x", "float[2,4] y")
    assert [op.op for op in costs.ops] == ["MatMul"]
    assert costs.weight_bytes == 64


def test_blocks_by_module_by_node_name_and_by_neighbour(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "a = Relu (x)\n b = Neg (a)\n c = Abs (b)\n d = Exp (c)\n y = Log (d)",
        "float[1,4] x",
        "float[1,4] y",
    )
    model = onnx.load(path)
    modules = (
        "encoder.patch_embed.proj",
        "encoder.model.blocks.0.mlp",
        "",
        "encoder.model.blocks.1.attn",
        "encoder.norm",
    )
    for node, module in zip(model.graph.node, modules, strict=True):
        node.metadata_props.add(key="edgecomp.module", value=module)
    onnx.save(model, path)
    assert [op.block for op in count_costs(path).ops] == ["front", "blocks.0", "blocks.0", "blocks.1", "back"]
    for node, name in zip(
        model.graph.node, ("/stem/Relu", "/layers.0/Neg", "/layers.0/Abs", "/layers.1/Exp", "/Log"), strict=True
    ):
        del node.metadata_props[:]
        node.name = name
    onnx.save(model, path)
    assert [op.block for op in count_costs(path).ops][1:4] == ["layers.0", "layers.0", "layers.1"]


def test_a_function_is_inlined_and_keeps_its_node(tmp_path: Path) -> None:
    body = """
        m = Relu (k)
        y1, c1, map1 = edgecomp.TopKMerge (m, x, s)
        l = Log (c1)
        o = Add (y1, l)
    """
    path = write(tmp_path, body, "float[2,5,8] k, float[2,5,8] x, float[2,5,1] s", "float[2,3,8] o", functions=MERGE)
    model = onnx.load(path)
    next(node for node in model.graph.node if node.op_type == "TopKMerge").name = "merge_0"
    onnx.save(model, path)
    costs = count_costs(path)
    inside = [op for op in costs.ops if op.call == "merge_0"]
    assert {"TopK", "GatherND", "ReduceSum"} <= {op.op for op in inside}
    assert {op.role for op in inside} == {"merge"}
    assert (the(costs, "Relu").role, the(costs, "Relu").call) == ("selection", "")  # it is read as the metric alone
    assert the(costs, "Log").role == "selection"  # of the counts
    assert (the(costs, "Add").role, the(costs, "Add").call) == ("model", "")


def test_the_tokens_that_a_function_moves_are_not_its_selection(tmp_path: Path) -> None:
    body = "h = Exp (x)\n y1, c1, map1 = edgecomp.TopKMerge (k, h, s)\n o = Neg (y1)"
    costs = count(tmp_path, body, "float[2,5,8] k, float[2,5,8] x, float[2,5,1] s", "float[2,3,8] o", functions=MERGE)
    assert (the(costs, "Exp").role, the(costs, "Neg").role) == ("model", "model")


def test_two_calls_in_a_row_are_told_apart(tmp_path: Path) -> None:
    body = """
        a, b, c = edgecomp.TopKMerge (k, x, s)
        d, e, f = edgecomp.TopKMerge (k, x, s)
        o = Add (a, d)
    """
    costs = count(tmp_path, body, "float[2,5,8] k, float[2,5,8] x, float[2,5,1] s", "float[2,3,8] o", functions=MERGE)
    sizes = [sum(op.call == name for op in costs.ops) for name in ("a", "d")]
    assert sizes[0] == sizes[1] > 4


def test_a_selection_is_what_only_serves_it(tmp_path: Path) -> None:
    body = """
        k = Constant <value_ints: ints = [2]> ()
        axis = Constant <value_ints: ints = [-1]> ()
        h = Gelu (x)
        n = Abs (h)
        score = ReduceSum <keepdims = 0> (n, axis)
        top, index = TopK (score, k)
        wide = Unsqueeze (index, axis)
        y = GatherND <batch_dims = 1> (h, wide)
    """
    costs = count(tmp_path, body, "float[2,5,8] x", "float[2,2,8] y")
    roles = {op.op: op.role for op in costs.ops}
    assert roles["Gelu"] == "model"
    assert {roles[op] for op in ("Abs", "ReduceSum", "TopK", "Unsqueeze", "GatherND")} == {"selection"}


def test_a_product_with_a_matrix_of_indices_is_a_merge(tmp_path: Path) -> None:
    body = """
        five = Constant <value_ints: ints = [5]> ()
        values = Constant <value = float[2] {0, 1}> ()
        index = ArgMax <axis = -1, keepdims = 0> (s)
        hot = OneHot <axis = 1> (index, five, values)
        y = MatMul (hot, x)
        z = MatMul (s, x)
    """
    costs = count(tmp_path, body, "float[2,5,5] s, float[2,5,8] x", "float[2,5,8] y, float[2,5,8] z")
    assert [op.role for op in costs.ops if op.op == "MatMul"] == ["merge", "model"]


def test_quantised_products_multiply_int8_and_read_their_weights_so(tmp_path: Path) -> None:
    body = """
        s = Constant <value_float: float = 0.1> ()
        z = Constant <value = int8 {0}> ()
        w = Constant <value = int8[4,4] {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}> ()
        q = QuantizeLinear (x, s, z)
        d = DequantizeLinear (q, s, z)
        f = DequantizeLinear (w, s, z)
        y = MatMul (d, f)
    """
    costs = count(tmp_path, body, "float[2,4] x", "float[2,4] y")
    product = the(costs, "MatMul")
    assert (product.dtype, product.weight_bytes, costs.precision) == ("int8", 16, "int8")
    assert the(costs, "DequantizeLinear").kind == "view"


def test_an_open_batch_is_bound_or_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "y = Relu (x)", "float[n,4] x", "float[n,4] y")
    with pytest.raises(RunError, match=r"(?s)input 'x' is \['n', 4\].*--batch N"):
        count_costs(path)
    costs = count_costs(path, batch=3)
    assert costs.values["y"].dims == (3, 4)
    assert "first dimension of x is taken as 3" in costs.notes[0]


@pytest.mark.parametrize(
    ("body", "inputs", "outputs", "told"),
    [
        ("y = NonZero (x)", "float[2,4] x", "int64[2,n] y", "'y', from NonZero node 'y', is not fixed"),
        (
            'y = Einsum <equation = "ij,jk,kl->il"> (x, x, x)',
            "float[4,4] x",
            "float[4,4] y",
            "ij,jk,kl->il.*3 operands",
        ),
    ],
    ids=["shape", "einsum"],
)
def test_what_cannot_be_counted_is_named(tmp_path: Path, body: str, inputs: str, outputs: str, told: str) -> None:
    with pytest.raises(RunError, match=told):
        count(tmp_path, body, inputs, outputs)


def test_attention_reads_the_keys_of_its_cache(tmp_path: Path) -> None:
    new, past = "float[1,2,1,8]", "float[1,2,99,8]"
    whole = "float[1,2,100,8]"
    body = "y, pk, pv = Attention (q, k, v, , a, b)"
    inputs = f"{new} q, {new} k, {new} v, {past} a, {past} b"
    text = f'<ir_version: 11, opset_import: ["" : 23]> g ({inputs}) => ({new} y, {whole} pk, {whole} pv) {{ {body} }}'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "a.onnx")
    assert count_costs(tmp_path / "a.onnx").flops == 2 * 2 * 100 * 16


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_recurrent_ops_are_refused(tmp_path: Path, op: str, gates: int) -> None:
    body = f"y = {op} <hidden_size = 8> (x, w, r)"
    inputs = f"float[5,2,4] x, float[1,{8 * gates},4] w, float[1,{8 * gates},8] r"
    with pytest.raises(RunError, match=rf"{op} node .* cannot be counted \({op} is recurrent: its steps run one after"):
        count(tmp_path, body, inputs, "float[5,1,2,8] y")


def test_an_op_of_another_domain_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "y = Relu (x)", "float[2,4] x", "float[2,4] y")
    model = onnx.load(path)
    model.graph.node[0].domain = "com.vendor"
    model.opset_import.add(domain="com.vendor", version=1)
    onnx.save(model, path)
    with pytest.raises(RunError, match=r"com\.vendor::Relu node 'y' is of another domain"):
        count_costs(path)


def test_a_loop_is_refused(tmp_path: Path) -> None:
    body = """
        n = Constant <value_int: int = 3> ()
        c = Constant <value = bool {1}> ()
        y = Loop (n, c, x) <body = b (int64 i, bool go, float[2,4] v) => (bool go2, float[2,4] w) {
            go2 = Identity (go)
            w = Neg (v)
        }>
    """
    with pytest.raises(RunError, match="Loop node 'y' runs its body a number of times"):
        count(tmp_path, body, "float[2,4] x", "float[2,4] y")


def test_weights_are_not_read(tmp_path: Path) -> None:
    weight = onnx.TensorProto(name="w", dims=[1024, 4096], data_type=1, data_location=1)
    for key, value in (("location", "gone.data"), ("length", str(1024 * 4096 * 4))):
        weight.external_data.add(key=key, value=value)
    path = write(tmp_path, "y = MatMul (x, w)", "float[1,1024] x, float[1024,4096] w", "float[1,4096] y")
    model = onnx.load(path)
    model.graph.initializer.append(weight)
    del model.graph.input[1]
    path.write_bytes(model.SerializeToString())
    costs = count_costs(path)
    assert (costs.flops, costs.weight_bytes) == (2 * 1024 * 4096, 4 * 1024 * 4096)


def test_torch_is_not_imported() -> None:
    heavy = ("torch", "onnx_ir", "onnxscript", "timm", "transformers")
    script = f"import sys, edgecomp.export.costs; print([n for n in {heavy!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.slow
def test_ten_models_within_one_percent_of_torch(tmp_path: Path) -> None:
    """The benchmark's own table: seven of timm and three of edgecomp, at full size."""
    root = Path(__file__).resolve().parents[2]
    words = [sys.executable, str(root / "benchmarks" / "estimate.py"), "--flops", "--json", str(tmp_path / "f.json")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 10
    for row in rows:
        assert float(row["GFLOP"]) == pytest.approx(float(row["GFLOP by torch"]), rel=0.01), row["model"]
