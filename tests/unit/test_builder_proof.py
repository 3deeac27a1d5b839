"""Proof of precision: graphs with planted faults, parsed by TensorRT for RTX, and the types that ONNX Runtime runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgecomp.engines import build_engine, installed_flavours
from edgecomp.engines.adapter import Flavour, create_network
from edgecomp.engines.flavour import load_flavour
from edgecomp.engines.graph import read_products
from edgecomp.engines.inspector import engine_tensors
from edgecomp.engines.network import collecting_logger, parse_onnx
from edgecomp.engines.proof import find_products, prove
from edgecomp.engines.record import EngineProof
from edgecomp.errors import BuildError, RunError
from edgecomp.specs.target import load_target

onnx = pytest.importorskip("onnx")
np = pytest.importorskip("numpy")

rtx = pytest.mark.skipif("rtx" not in installed_flavours(), reason="TensorRT for RTX is not installed")

H, T = onnx.helper, onnx.TensorProto
KINDS = {"float32": T.FLOAT, "float16": T.FLOAT16, "bfloat16": T.BFLOAT16}


class Graph:
    """A chain of layers, each in a type of its own; casts stand between them."""

    def __init__(self, dtype: str) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.dtype, self.last, self.input_dtype = dtype, "x", dtype

    def weight(self, name: str, dims: list[int], dtype: str) -> str:
        count = int(np.prod(dims))
        self.weights.append(H.make_tensor(name, KINDS[dtype], dims, np.linspace(-0.1, 0.1, count).tolist()))
        return name

    def cast(self, dtype: str) -> None:
        if dtype != self.dtype:
            name = f"{self.last}_{dtype}"
            self.nodes.append(H.make_node("Cast", [self.last], [name], name=f"to_{name}", to=KINDS[dtype]))
            self.last, self.dtype = name, dtype

    def product(self, name: str, width: int, dtype: str, *, op: str = "MatMul", rows: int = 64) -> Graph:
        """Append a product; `rows` x `width` weights."""
        self.cast(dtype)
        weight = self.weight(f"{name}.weight", [rows, width], dtype)
        self.nodes.append(H.make_node(op, [self.last, weight], [f"{name}_out"], name=name))
        self.last = f"{name}_out"
        return self

    def add(self, op: str, name: str, **attributes: Any) -> Graph:
        self.nodes.append(H.make_node(op, [self.last], [f"{name}_out"], name=name, **attributes))
        self.last = f"{name}_out"
        return self

    def save(self, path: Path, *, width: int, opset: int = 22, functions: Any = ()) -> Path:
        graph = H.make_graph(
            self.nodes,
            "graph",
            [H.make_tensor_value_info("x", KINDS[self.input_dtype], [4, 64])],
            [H.make_tensor_value_info(self.last, KINDS[self.dtype], [4, width])],
            self.weights,
        )
        opsets = [H.make_opsetid("", opset), H.make_opsetid("edgecomp", 1)]
        onnx.save(H.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=10), path)
        return path


@pytest.fixture(scope="module")
def flavour() -> Flavour:
    return load_flavour("rtx")


def parsed(flavour: Flavour, path: Path) -> tuple[Any, ...]:
    """Return a network, and what has to live as long as it does."""
    logger = collecting_logger(flavour)
    builder = flavour.module.Builder(logger)
    network = create_network(flavour, builder)
    return network, parse_onnx(flavour, network, logger, path), builder, logger


def proof_of(flavour: Flavour, path: Path, precision: str, *fp32_nodes: str) -> EngineProof:
    network, *kept = parsed(flavour, path)
    proof, _ = prove(flavour, network, path, precision, fp32_nodes)
    del kept
    return proof


def quantised(path: Path, kind: int, *, plain: bool = False, rest: str = "float16") -> Path:
    """Write x @ w behind Q/DQ, then a large product that is not, where `plain`."""
    zero = [0] if kind == T.INT8 else [0.0]
    weight = np.arange(64 * 64) % 5
    weights = [
        H.make_tensor("sx", KINDS[rest], [], [0.02]),
        H.make_tensor("sw", KINDS[rest], [64], [0.01] * 64),
        H.make_tensor("zx", kind, [], zero),
        H.make_tensor("zw", kind, [64], zero * 64),
        H.make_tensor("wq", kind, [64, 64], weight.tolist() if kind == T.INT8 else weight.astype(float).tolist()),
        H.make_tensor("w2", KINDS[rest], [64, 64], [0.01] * 64 * 64),
    ]
    nodes = [
        H.make_node("QuantizeLinear", ["x", "sx", "zx"], ["xq"], name="q"),
        H.make_node("DequantizeLinear", ["xq", "sx", "zx"], ["xd"], name="dq"),
        H.make_node("DequantizeLinear", ["wq", "sw", "zw"], ["wd"], name="wdq", axis=1),
        H.make_node("MatMul", ["xd", "wd"], ["h"], name="/q/MatMul"),
    ]
    last = "h"
    if plain:
        nodes.append(H.make_node("MatMul", ["h", "w2"], ["y"], name="/plain/MatMul"))
        last = "y"
    graph = H.make_graph(
        nodes,
        "graph",
        [H.make_tensor_value_info("x", KINDS[rest], [4, 64])],
        [H.make_tensor_value_info(last, KINDS[rest], [4, 64])],
        weights,
    )
    onnx.save(H.make_model(graph, opset_imports=[H.make_opsetid("", 20)], ir_version=9), path)
    return path


# -- in the network of TensorRT for RTX -----------------------------------------------------------------------------


@rtx
@pytest.mark.parametrize(("precision", "dtype"), [("fp16", "float16"), ("bf16", "bfloat16"), ("fp32", "float32")])
def test_graph_of_one_type(precision: str, dtype: str, flavour: Flavour, tmp_path: Path) -> None:
    graph = Graph(dtype).product("/a/MatMul", 64, dtype).product("/b/Gemm", 32, dtype, op="Gemm")
    proof = proof_of(flavour, graph.save(tmp_path / "model.onnx", width=32), precision)
    assert (proof.by, proof.products, proof.weights) == ("network", {dtype: 2}, {dtype: 64 * 64 + 64 * 32})
    assert (proof.matched, proof.islands, proof.wider) == (2, (), ())


@rtx
@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
@pytest.mark.parametrize(("precision", "dtype"), [("fp16", "float16"), ("bf16", "bfloat16")])
def test_planted_fp32_product_fails_by_name(
    op: str, precision: str, dtype: str, flavour: Flavour, tmp_path: Path
) -> None:
    """One product that stayed in fp32: its name, size and share, and what to do."""
    graph = Graph(dtype).product("/a/fc", 64, dtype).product("/b/culprit", 64, "float32", op=op)
    graph.product("/c/fc", 64, dtype)
    path = graph.save(tmp_path / "model.onnx", width=64)
    with pytest.raises(
        BuildError,
        match=rf"precision {precision} was asked for, and {op} '/b/culprit' \(4096 weights, 33\.3 % of all\) "
        rf"runs in float32\. Export it again with --precision {precision}, or .*--fp32 '/b/culprit'",
    ):
        proof_of(flavour, path, precision)
    proof = proof_of(flavour, path, precision, "/b/culprit", "/of/another/graph")
    assert (proof.products, proof.islands) == ({dtype: 2, "float32": 1}, ("/b/culprit",))


@rtx
def test_several_planted_products_are_counted(flavour: Flavour, tmp_path: Path) -> None:
    graph = Graph("float16").product("/ok", 64, "float16")
    for index in range(6):
        graph.product(f"/wide{index}", 64, "float32")
    path = graph.save(tmp_path / "model.onnx", width=64)
    with pytest.raises(BuildError, match=r"'/wide0'.*; so do 5 more \('/wide1', '/wide2', '/wide3', \.\.\.\)\. Export"):
        proof_of(flavour, path, "fp16")


@rtx
def test_small_product_that_runs_wider_is_recorded(flavour: Flavour, tmp_path: Path) -> None:
    """1 % of all weights is the line; below it a wider product is told, and does not fail."""
    graph = Graph("float16").product("/large", 64, "float16").product("/small", 1, "float32")
    graph.product("/scores", 1, "float32", rows=1)
    graph.product("/also", 64, "float16", rows=1)
    for index in range(2):
        graph.product(f"/more{index}", 64, "float16")
    proof = proof_of(flavour, graph.save(tmp_path / "model.onnx", width=64), "fp16")
    assert proof.wider == ("/small", "/scores")
    assert proof.weights == {"float16": 3 * 4096 + 64, "float32": 65}


@rtx
def test_island_that_is_none(flavour: Flavour, tmp_path: Path) -> None:
    """The manifest says fp32 and the graph computes it in fp16: one of them is wrong."""
    path = Graph("float16").product("/a/fc", 64, "float16").save(tmp_path / "model.onnx", width=64)
    with pytest.raises(BuildError, match=r"the manifest keeps '/a/fc' in fp32, and it runs in float16"):
        proof_of(flavour, path, "fp16", "/a/fc")


@rtx
def test_another_half_type_is_not_the_one_asked_for(flavour: Flavour, tmp_path: Path) -> None:
    graph = Graph("float16").product("/a", 64, "float16").product("/b", 1, "bfloat16")
    path = graph.save(tmp_path / "model.onnx", width=1)
    with pytest.raises(BuildError, match=r"MatMul '/b' \(64 weights, 1\.5 % of all\) runs in bfloat16"):
        proof_of(flavour, path, "fp16")


@rtx
@pytest.mark.parametrize(("kind", "dtype", "precision"), [
    (T.INT8, "int8", "int8"), (T.FLOAT8E4M3FN, "float8_e4m3fn", "fp8"),
])  # fmt: skip
def test_products_behind_qdq(kind: int, dtype: str, precision: str, flavour: Flavour, tmp_path: Path) -> None:
    path = quantised(tmp_path / "model.onnx", kind)
    proof = proof_of(flavour, path, precision)
    assert (proof.products, proof.matched) == ({dtype: 1}, 1)
    assert read_products(path)[0].weights == 64 * 64
    plain = quantised(tmp_path / "plain.onnx", kind, plain=True)
    with pytest.raises(BuildError, match=rf"precision {precision} .* '/plain/MatMul' \(4096 .* runs in float16"):
        proof_of(flavour, plain, precision)
    proof = proof_of(flavour, plain, precision, "/plain/MatMul")
    assert (proof.products, proof.islands) == ({dtype: 1, "float16": 1}, ("/plain/MatMul",))
    with pytest.raises(BuildError, match=rf"keeps '/q/MatMul' in fp32, and it runs in {dtype}"):
        proof_of(flavour, plain, precision, "/plain/MatMul", "/q/MatMul")


@rtx
def test_convolution_and_einsum_are_products(flavour: Flavour, tmp_path: Path) -> None:
    kinds = T.FLOAT16
    nodes = [
        H.make_node("Conv", ["x", "k"], ["h"], name="/patch/Conv", kernel_shape=[2, 2], strides=[2, 2]),
        H.make_node("Flatten", ["h"], ["f"], name="flat", axis=2),
        H.make_node("Einsum", ["f", "e"], ["y"], name="/ein", equation="abc,cd->abd"),
    ]
    weights = [H.make_tensor("k", kinds, [8, 3, 2, 2], [0.1] * 96), H.make_tensor("e", kinds, [4, 5], [0.1] * 20)]
    nodes[1] = H.make_node("Reshape", ["h", "shape"], ["f"], name="flat")
    weights.append(H.make_tensor("shape", T.INT64, [3], [1, 8, 4]))
    graph = H.make_graph(
        nodes,
        "graph",
        [H.make_tensor_value_info("x", kinds, [1, 3, 4, 4])],
        [H.make_tensor_value_info("y", kinds, [1, 8, 5])],
        weights,
    )
    path = tmp_path / "model.onnx"
    onnx.save(H.make_model(graph, opset_imports=[H.make_opsetid("", 20)], ir_version=9), path)
    proof = proof_of(flavour, path, "fp16")
    assert (proof.products, proof.weights, proof.matched) == ({"float16": 2}, {"float16": 116}, 2)


@rtx
def test_products_inside_functions_have_the_names_around_them(flavour: Flavour, tmp_path: Path) -> None:
    """TensorRT inlines a body for each call; island names reach the inner nodes, and the call."""
    body = H.make_function(
        "edgecomp", "Head", ["a", "b"], ["c"], [H.make_node("MatMul", ["a", "b"], ["c"], name="inner")],
        [H.make_opsetid("", 20)],
    )  # fmt: skip
    graph = Graph("float16")
    graph.nodes.append(
        H.make_node("Head", ["x", graph.weight("w", [64, 64], "float16")], ["h"], name="/h0", domain="edgecomp")
    )
    graph.last = "h"
    graph.cast("float32")
    graph.nodes.append(
        H.make_node("Head", [graph.last, graph.weight("v", [64, 64], "float32")], ["y"], name="/h1", domain="edgecomp")
    )
    graph.last = "y"
    path = graph.save(tmp_path / "model.onnx", width=64, opset=20, functions=[body])
    assert [product.path for product in read_products(path)] == [("inner", "/h0"), ("inner", "/h1")]
    assert [product.dtype for product in read_products(path)] == ["float16", "float32"]
    network, *kept = parsed(flavour, path)
    assert [product.path for product in find_products(network)] == [("inner", "/h0"), ("inner", "/h1")]
    del network, kept
    with pytest.raises(BuildError, match=r"'inner in /h1' .* runs in float32"):
        proof_of(flavour, path, "fp16")
    assert proof_of(flavour, path, "fp16", "/h1").islands == ("inner in /h1",)


@rtx
def test_network_that_differs_from_the_file_is_refused(flavour: Flavour, tmp_path: Path) -> None:
    """A parser that changes a type is not believed: here another file stands in for the one that was parsed."""
    half = Graph("float16").product("/a", 64, "float16").save(tmp_path / "half.onnx", width=64)
    single = Graph("float32").product("/a", 64, "float32").save(tmp_path / "single.onnx", width=64)
    network, *kept = parsed(flavour, half)
    with pytest.raises(BuildError, match=r"single\.onnx: MatMul '/a' computes in float32 in the file and in float16"):
        prove(flavour, network, single, "fp16", ())
    del kept


@rtx
def test_planted_product_stops_the_build_before_it_begins(tmp_path: Path) -> None:
    """Nothing is written, and the islands are an argument of the build."""
    path = Graph("float16").product("/a", 64, "float16").product("/b", 64, "float32").save(
        tmp_path / "model.onnx", width=64
    )  # fmt: skip
    options: dict[str, Any] = {
        "target": load_target("rtx-4090"), "runtime": "rtx", "precision": "fp16", "onnx_sha256": "a" * 64,
        "progress": lambda line: None,
    }  # fmt: skip
    with pytest.raises(BuildError, match=r"'/b' \(4096 weights"):
        build_engine(path, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    proof = build_engine(path, tmp_path / "out", fp32_nodes=["/b"], **options).record.proof
    assert proof is not None
    assert proof.islands == ("/b",)


# -- in the file, without TensorRT ----------------------------------------------------------------------------------


def test_types_follow_the_nodes(tmp_path: Path) -> None:
    """No type is stated between input and output: casts, constants, comparisons and top-k tell it."""
    nodes = [
        H.make_node("Constant", [], ["c"], value=H.make_tensor("c", T.FLOAT16, [64, 8], [0.5] * 512)),
        H.make_node("Cast", ["x"], ["half"], to=T.FLOAT16),
        H.make_node("MatMul", ["half", "c"], ["s"]),
        H.make_node("TopK", ["s", "k"], ["v", "i"]),
        H.make_node("Equal", ["i", "i"], ["same"]),
        H.make_node("Where", ["same", "v", "v"], ["w"]),
        H.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        H.make_node("MatMul", ["w", "t"], ["y"], name="named"),
    ]
    graph = H.make_graph(
        nodes,
        "graph",
        [H.make_tensor_value_info("x", T.FLOAT, [4, 64])],
        [H.make_tensor_value_info("y", T.FLOAT16, [4, 4])],
        [H.make_tensor("k", T.INT64, [1], [2])],
    )
    path = tmp_path / "model.onnx"
    onnx.save(H.make_model(graph, opset_imports=[H.make_opsetid("", 20)], ir_version=9), path)
    first, second = read_products(path)
    assert (first.path, first.dtype, first.weights) == (("node_of_s",), "float16", 512)
    assert (second.path, second.dtype, second.weights) == (("named",), "float16", 0)


@pytest.mark.parametrize(("content", "message"), [(b"", "cannot be read"), (b"garbage of no kind", "no ONNX file")])
def test_file_that_is_none(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(BuildError, match=rf"model\.onnx .*{message}"):
        read_products(tmp_path / "model.onnx")


def test_layer_information_that_is_no_json() -> None:
    with pytest.raises(BuildError, match="no JSON"):
        engine_tensors("Layers: {")
    assert engine_tensors('{"Layers": ["mm"], "Bindings": ["x"]}') == ("x",)


# -- in ONNX Runtime ------------------------------------------------------------------------------------------------


def test_optimised_graph_of_onnxruntime_tells_its_types(tmp_path: Path) -> None:
    """Fp32 and int8 run as they are; fp16 is cast up on the CPU, which has no such kernels, and the types say so."""
    pytest.importorskip("onnxruntime")
    from edgecomp.runners.onnxruntime_types import runtime_products

    single = Graph("float32").product("/a", 64, "float32").add("Relu", "r").product("/b", 32, "float32")
    found = runtime_products(single.save(tmp_path / "single.onnx", width=32, opset=20))
    assert [product.dtype for product in found] == ["float32", "float32"]
    half = Graph("float16").product("/a", 64, "float16").save(tmp_path / "half.onnx", width=64, opset=20)
    assert [product.dtype for product in runtime_products(half)] == ["float32"]
    int8 = quantised(tmp_path / "int8.onnx", T.INT8, rest="float32")
    assert [product.dtype for product in runtime_products(int8)] == ["int8"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half.onnx", "int8.onnx", "single.onnx"]
    (tmp_path / "single.onnx").write_bytes(b"garbage")
    with pytest.raises(RunError, match=r"single\.onnx"):
        runtime_products(tmp_path / "single.onnx")
