"""`edgecomp check`: each rule finds its planted fault and passes a near miss; broken and huge files; `--fix`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from edgecomp import api  # noqa: E402
from edgecomp.engines.flavour import planned_flavour  # noqa: E402
from edgecomp.errors import EdgecompError, ParityError  # noqa: E402
from edgecomp.export import fix as fix_module  # noqa: E402
from edgecomp.export.light import read_light  # noqa: E402
from edgecomp.export.rules import RULES  # noqa: E402
from edgecomp.resources import data_path  # noqa: E402
from edgecomp.specs import load_target  # noqa: E402
from edgecomp.specs.verdict import Rewrite, is_at_most, worst  # noqa: E402

Cli = Callable[..., Any]
FLOAT, HALF, INT64, INT32, BF16 = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.INT64,
    TensorProto.INT32,
    TensorProto.BFLOAT16,
)
ORIN = {"target": "orin-nano", "runtime": "tensorrt"}
RTX = {"target": "a10", "runtime": "rtx"}
TURING = {"target": "t4", "runtime": "rtx"}


class Graph:
    """A graph that is put together node by node."""

    def __init__(self, *shape: Any, dtype: int = FLOAT, opset: int = 20) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.inputs = [helper.make_tensor_value_info("x", dtype, list(shape or (2, 8)))]
        self.outputs: list[Any] = []
        self.opsets = {"": opset}
        self.functions: list[Any] = []

    def add(self, op: str, *inputs: str, name: str = "", out: int = 1, **attributes: Any) -> str:
        name = name or f"{op.lower()}_{len(self.nodes)}"
        outputs = [f"{name}.out"] + [f"{name}.out{index}" for index in range(1, out)]
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, **attributes))
        return outputs[0]

    def const(self, name: str, value: Any, dtype: Any = None) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def give(self, name: str, dtype: int = FLOAT, shape: Any = None) -> Graph:
        self.outputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return self

    def model(self) -> Any:
        graph = helper.make_graph(self.nodes, "planted", self.inputs, self.outputs, self.constants)
        opsets = [helper.make_opsetid(domain, version) for domain, version in self.opsets.items()]
        return helper.make_model(graph, opset_imports=opsets, functions=self.functions, ir_version=10)

    def save(self, path: Path) -> Path:
        onnx.save(self.model(), str(path))
        return path


def topk(k: int) -> Graph:
    graph = Graph(1, 5000)
    values = graph.add("TopK", "x", graph.const("k", [k], np.int64), name="planted", out=2)
    return graph.give(values)


def topk_computed(from_input: bool) -> Graph:
    graph = Graph(1, 50)
    if from_input:
        graph.inputs.append(helper.make_tensor_value_info("k", INT64, [1]))
    else:
        size = graph.add("Gather", graph.add("Shape", "x"), graph.const("one", [1], np.int64))
        graph.add("Min", size, graph.const("most", [20], np.int64), name="k")
    values = graph.add("TopK", "x", "k" if from_input else "k.out", name="planted", out=2)
    return graph.give(values)


def topk_share(length: int) -> Graph:
    """K is the hyperbolic sine of a share of the row: fixed, and by no op that sizes are made with."""
    graph = Graph(1, length)
    size = graph.add("Cast", graph.add("Shape", "x", start=1), to=FLOAT)
    share = graph.add("Mul", size, graph.const("share", [0.0005], np.float32))
    k = graph.add("Cast", graph.add("Sinh", share), to=INT64)
    return graph.give(graph.add("TopK", "x", k, name="planted", out=2))


def scatter(op: str, reduction: str) -> Graph:
    graph = Graph(4, 8)
    index = [[0], [2]] if op == "ScatterND" else np.zeros((2, 8))
    updates = graph.const("updates", np.ones((2, 8)), np.float32)
    attributes = {"reduction": reduction} if reduction else {}
    out = graph.add(op, "x", graph.const("index", index, np.int64), updates, name="planted", **attributes)
    return graph.give(out, shape=[4, 8])


def resize(antialias: int, sizes: tuple[int, ...] = (1, 1, 4, 4)) -> Graph:
    graph = Graph(1, 1, 8, 8)
    given = graph.const("sizes", sizes, np.int64)
    return graph.give(
        graph.add("Resize", "x", "", "", given, name="planted", mode="linear", antialias=antialias), shape=list(sizes)
    )


def one(op: str, *, domain: str = "", dtype: int = FLOAT, **attributes: Any) -> Graph:
    graph = Graph(dtype=dtype)
    if domain:
        graph.opsets[domain] = 1
        attributes["domain"] = domain
    return graph.give(graph.add(op, "x", name="planted", **attributes), dtype)


def sampled(mode: str) -> Graph:
    graph = Graph(1, 1, 4, 4)
    grid = graph.const("grid", np.linspace(-1, 1, 18).reshape(1, 3, 3, 2), np.float32)
    return graph.give(graph.add("GridSample", "x", grid, name="planted", mode=mode), shape=[1, 1, 3, 3])


def opened(size: Any) -> Graph:
    graph = Graph(size, 8)
    return graph.give(graph.add("Relu", "x", name="planted"), shape=[size, 8])


def reshaped(from_input: bool) -> Graph:
    graph = Graph(2, 8)
    if from_input:
        graph.inputs.append(helper.make_tensor_value_info("shape", INT64, [2]))
    else:
        rows = graph.add("Gather", graph.add("Shape", "x"), graph.const("zero", [0], np.int64))
        graph.add("Concat", rows, graph.const("rest", [-1], np.int64), axis=0, name="shape")
    return graph.give(graph.add("Reshape", "x", "shape" if from_input else "shape.out", name="planted"))


def chosen(other: str) -> Graph:
    """One of two branches; their shapes differ where the other one transposes."""
    graph = Graph(2, 8)
    branches = {
        f"{word}_branch": helper.make_graph(
            [helper.make_node(op, ["x"], [f"{word}.out"], name=f"{word}.{op}")],
            word,
            [],
            [helper.make_tensor_value_info(f"{word}.out", FLOAT, None)],
        )
        for word, op in (("then", "Relu"), ("else", other))
    }
    return graph.give(graph.add("If", graph.const("condition", True), name="planted", **branches))


def typed(dtype: int) -> Graph:
    graph = Graph(2, 8)
    narrow = graph.add("Cast", "x", name="planted", to=dtype)
    return graph.give(graph.add("Cast", narrow, to=FLOAT))


def dequantized(dtype: Any, zero: int | None = None) -> Graph:
    graph = Graph(2, 8)
    words = [graph.const("bias", np.arange(-3, 5), dtype), graph.const("scale", 0.037, np.float32)]
    words += [] if zero is None else [graph.const("zero", zero, dtype)]
    return graph.give(graph.add("Add", "x", graph.add("DequantizeLinear", *words, name="planted")), shape=[2, 8])


def masked(value: float, dtype: Any = np.float32) -> Graph:
    graph = Graph(2, 8, dtype=FLOAT if dtype == np.float32 else HALF)
    mask = graph.const("mask", [[0] * 4 + [value] * 4], dtype)
    if dtype == np.float32:
        whole = graph.add("Expand", graph.add("Unsqueeze", mask, graph.const("axis", [0], np.int64)), _shape(graph))
        return graph.give(graph.add("Cast", whole, name="planted", to=HALF), HALF)
    return graph.give(graph.add("Add", "x", mask, name="planted"), HALF)


def _shape(graph: Graph) -> str:
    return graph.const("shape", [1, 1, 8], np.int64)


def product(dtype: int) -> Graph:
    graph = Graph(2, 8, dtype=dtype)
    weight = graph.const("weight", np.eye(8), np.float32 if dtype == FLOAT else np.float16)
    return graph.give(graph.add("MatMul", "x", weight, name="planted"), dtype)


def bf16_conv(opset: int) -> Graph:
    graph = Graph(1, 1, 4, 4, dtype=BF16, opset=opset)
    graph.constants.append(helper.make_tensor("weight", BF16, [1, 1, 1, 1], [1.0]))
    return graph.give(graph.add("Conv", "x", "weight", name="planted"), BF16, [1, 1, 4, 4])


def of_opset(op: str, opset: int, **attributes: Any) -> Graph:
    graph = Graph(opset=opset)
    return graph.give(graph.add(op, "x", name="planted", **attributes))


# rule, verdict, where it is held to, the planted fault, words of the text, and the near miss
PLANTED: dict[str, tuple[str, dict[str, str], Any, tuple[str, ...], Any]] = {
    "EC101": ("blocked", ORIN, lambda: topk(3841), ("3841", "3840"), lambda: topk(3840)),
    "EC102": ("blocked", ORIN, lambda: topk_computed(True), ("'k'",), lambda: topk_computed(False)),
    "EC103": ("blocked", ORIN, lambda: scatter("ScatterND", "none"), ("none",), lambda: scatter("ScatterND", "")),
    "EC104": ("blocked", RTX, lambda: scatter("ScatterND", "add"), ("add",), lambda: scatter("ScatterND", "none")),
    "EC105": ("blocked", RTX, lambda: resize(1), ("antialias", "'1'"), lambda: resize(0)),
    "EC106": ("blocked", RTX, lambda: one("NonZero"), ("depends on the data",), lambda: one("Relu")),
    "EC107": ("unverified", RTX, lambda: one("Celu"), ("Celu", "nobody tried"), lambda: one("Selu")),
    "EC108": ("blocked", ORIN, lambda: sampled("linear"), ("'linear'",), lambda: sampled("nearest")),
    "EC109": ("blocked", RTX, lambda: one("Fused", domain="com.example"), ("com.example",), lambda: one("Tanh")),
    "EC111": ("unverified", RTX, lambda: topk_share(5000), ("3840",), lambda: topk_share(3000)),
    "EC201": ("blocked", RTX, lambda: opened("batch"), ("batch", "profile"), lambda: opened(4)),
    "EC202": ("unverified", RTX, lambda: reshaped(True), ("'shape'",), lambda: reshaped(False)),
    "EC203": ("unverified", RTX, lambda: chosen("Transpose"), ("planted.out",), lambda: chosen("Tanh")),
    "EC301": ("blocked", ORIN, lambda: typed(TensorProto.FLOAT8E4M3FN), ("float8", "int8"), lambda: typed(HALF)),
    "EC302": ("blocked", RTX, lambda: dequantized(np.int32), ("int32",), lambda: dequantized(np.int8)),
    "EC303": ("unverified", RTX, lambda: dequantized(np.uint8), ("uint8",), lambda: dequantized(np.int8, 0)),
    "EC304": ("blocked", RTX, lambda: dequantized(np.int8, 3), ("is 3",), lambda: dequantized(np.int8, 0)),
    "EC305": ("blocked", RTX, lambda: masked(-3.4e38), ("-3.4e+38", "65504"), lambda: masked(-65504.0)),
    "EC306": (
        "unverified",
        RTX,
        lambda: masked(-np.inf, np.float16),
        ("NaN", "mask"),
        lambda: masked(-1e4, np.float16),
    ),
    "EC307": ("blocked", TURING, lambda: product(FLOAT), ("SM75",), lambda: product(HALF)),
    "EC308": ("unverified", RTX, lambda: bf16_conv(20), ("opset 20",), lambda: bf16_conv(22)),
    "EC309": ("blocked", RTX, lambda: one("ReduceMax", dtype=TensorProto.BOOL), ("bool",), lambda: one("ReduceMax")),
    "EC401": (
        "unverified",
        RTX,
        lambda: of_opset("ReduceMean", 17, axes=[1]),
        ("opset 17", "18", "ReduceMean"),
        lambda: of_opset("Relu", 17),
    ),
}


def check(path: Path, **words: Any) -> Any:
    return api.check(path, **{**RTX, **words})


def rules_of(report: Any) -> set[str]:
    return {finding.rule for graph in report.graphs for finding in graph.findings}


@pytest.mark.parametrize("rule", PLANTED)
def test_a_planted_fault_is_found_by_id_and_node(rule: str, tmp_path: Path) -> None:
    verdict, where, plant, words, _ = PLANTED[rule]
    report = check(plant().save(tmp_path / "model.onnx"), **where)
    found = [finding for finding in report.graphs[0].findings if finding.rule == rule]
    assert found, report.graphs[0].findings
    assert [finding.verdict for finding in found] == [verdict] * len(found)
    assert found[0].node == ("" if rule in ("EC201", "EC401") else "planted")
    for word in words:
        assert word in found[0].what
    assert found[0].remedy
    assert found[0].source
    assert report.verdict == verdict
    assert bool(report) is (verdict != "blocked")


@pytest.mark.parametrize("rule", PLANTED)
def test_a_near_miss_is_not_flagged(rule: str, tmp_path: Path) -> None:
    report = check(PLANTED[rule][4]().save(tmp_path / "model.onnx"), **PLANTED[rule][1])
    assert rule not in rules_of(report), report.graphs[0].findings
    assert report


@pytest.mark.parametrize("where", [RTX, ORIN], ids=["rtx", "orin"])
def test_an_opset_that_does_not_exist_is_never_likely(where: dict[str, str], tmp_path: Path) -> None:
    """Not even for an op that no opset has changed: what it will be there, nobody knows."""
    newest = onnx.defs.onnx_opset_version()
    report = check(of_opset("Relu", 99).save(tmp_path / "model.onnx"), **where)
    (finding,) = (one for one in report.graphs[0].findings if one.rule == "EC401")
    assert f"opset 99 is above {newest}" in finding.what
    assert "export at opset 2" in finding.remedy
    assert report.verdict == "unverified"
    assert report.graphs[0].nodes == {"blocked": 0, "unverified": 1, "likely": 0, "verified": 0}


def test_every_rule_has_a_planted_fault_and_a_row_in_the_docs() -> None:
    elsewhere = {"EC110", "EC402", "EC403", "EC404"}  # below: they need files or options
    assert {rule.id for rule in RULES} == set(PLANTED) | elsewhere
    assert len({rule.name for rule in RULES}) == len(RULES)
    text = (data_path("docs") / "check.md").read_text(encoding="utf-8")
    assert [rule.id for rule in RULES if f"| {rule.id} | {rule.name} | {rule.verdict} |" not in text] == []


def all_at_once() -> Graph:
    """A graph of a user with one fault of each kind."""
    graph = Graph("batch", 5000)
    graph.opsets["com.example"] = 1
    graph.add("TopK", "x", graph.const("k", [4000], np.int64), name="bad_topk", out=2)
    bias = [graph.const("bias", np.arange(8), np.int32), graph.const("scale", 0.5, np.float32)]
    graph.add("DequantizeLinear", *bias, name="bad_bias")
    graph.add("Cast", graph.const("mask", [-1e9], np.float32), name="bad_mask", to=HALF)
    graph.add("NonZero", "x", name="bad_nonzero")
    graph.add("Fused", "x", name="bad_domain", domain="com.example")
    image = graph.const("image", np.ones((1, 1, 8, 8)), np.float32)
    sizes = graph.const("sizes", [1, 1, 4, 4], np.int64)
    graph.add("Resize", image, "", "", sizes, name="bad_resize", mode="linear", antialias=1)
    data, index = graph.const("data", np.ones((4, 2)), np.float32), graph.const("index", [[0]], np.int64)
    graph.add("ScatterND", data, index, graph.const("up", [[1, 1]], np.float32), name="bad_scatter", reduction="add")
    graph.add("Cast", "x", name="bad_fp8", to=TensorProto.FLOAT8E4M3FN)
    return graph.give(graph.add("Relu", "x", name="fine"))


def test_all_faults_at_once_are_all_found(tmp_path: Path, cli: Cli) -> None:
    path = all_at_once().save(tmp_path / "user.onnx")
    said = cli("check", path, "--target", "orin-nano", "--json")
    assert said.code == 1
    assert said.err == ""
    document = json.loads(said.out, parse_constant=pytest.fail)
    (graph,) = document["graphs"]
    found = {(finding["rule"], finding["node"]) for finding in graph["findings"] if finding["verdict"] == "blocked"}
    assert found >= {
        ("EC101", "bad_topk"),
        ("EC104", "bad_scatter"),
        ("EC105", "bad_resize"),
        ("EC106", "bad_nonzero"),
        ("EC109", "bad_domain"),
        ("EC201", ""),
        ("EC301", "bad_fp8"),
        ("EC302", "bad_bias"),
        ("EC305", "bad_mask"),
    }
    assert "fine" not in {finding["node"] for finding in graph["findings"]}
    assert document["verdict"] == graph["verdict"] == "blocked"
    assert (document["target"], document["sm"], document["runtime"]) == ("orin-nano", 87, "tensorrt")
    assert sum(graph["nodes"].values()) == 9

    said = cli("check", path, "--target", "orin-nano")
    assert said.code == 1
    assert "EC101 topk-k-limit: input 1 is 4000, above 3840" in said.out
    assert "TopK node 'bad_topk'" in said.out
    assert "verdict: blocked; FAIL (fails on blocked)" in said.out


# -- verdicts and the gate ------------------------------------------------------------------------------------


def test_verdicts_follow_what_was_tried(tmp_path: Path) -> None:
    plain = product(FLOAT).save(tmp_path / "plain.onnx")
    assert check(plain).verdict == "verified"  # a10 is SM86, where all ops were tried
    assert check(plain, target="rtx-5090").verdict == "likely"  # SM120: tried with some ops alone
    assert check(plain, **ORIN).verdict == "likely"  # documents
    assert [held.name for held in check(plain, target="a10", runtime="tensorrt").lists] == [
        "tensorrt-10",
        "tensorrt-11",
    ]
    assert check(typed(BF16).save(tmp_path / "bf16.onnx")).verdict == "likely"
    assert check(typed(TensorProto.DOUBLE).save(tmp_path / "double.onnx")).verdict == "unverified"
    assert check(of_opset("Relu", 17).save(tmp_path / "seventeen.onnx")).verdict == "verified"  # as in opset 18
    early = check(of_opset("Relu", 8).save(tmp_path / "early.onnx"), **ORIN)
    assert [finding.rule for finding in early.graphs[0].findings] == ["EC401"]
    assert early.verdict == "blocked"


def test_the_worst_is_the_worst() -> None:
    assert worst([]) == "verified"
    assert worst(["likely", "unverified", "verified"]) == "unverified"
    assert is_at_most("blocked", "unverified")
    assert not is_at_most("likely", "unverified")


@pytest.mark.parametrize(
    ("plant", "gate", "code"),
    [
        (lambda: product(FLOAT), "likely", 0),
        (lambda: one("Celu"), "blocked", 0),
        (lambda: one("Celu"), "unverified", 1),
        (lambda: typed(BF16), "unverified", 0),
        (lambda: typed(BF16), "likely", 1),
        (lambda: topk(4000), "blocked", 1),
    ],
)
def test_fail_on_decides_the_exit_code(plant: Any, gate: str, code: int, tmp_path: Path, cli: Cli) -> None:
    path = plant().save(tmp_path / "model.onnx")
    said = cli("check", path, "--target", "a10", "--runtime", "rtx", "--fail-on", gate)
    assert said.code == code
    assert said.err == ""


def test_a_plugin_of_the_user_leaves_its_op_unverified(tmp_path: Path) -> None:
    path = one("Fused", domain="com.example").save(tmp_path / "model.onnx")
    report = check(path, plugin=["com.example::Fused"])
    assert rules_of(report) == {"EC110", "EC203"}  # nobody knows what shape it gives
    assert report.verdict == "unverified"


def test_functions_are_inlined_unless_a_plugin_takes_them(tmp_path: Path) -> None:
    graph = one("Pair", domain="local")
    body = [helper.make_node("Relu", ["a"], ["b"]), helper.make_node("NonZero", ["b"], ["c"], name="inside")]
    graph.functions = [helper.make_function("local", "Pair", ["a"], ["c"], body, [helper.make_opsetid("", 20)])]
    path = graph.save(tmp_path / "model.onnx")
    report = check(path)
    assert report.graphs[0].inlined == 1
    assert "EC106" in rules_of(report)
    assert sum(report.graphs[0].nodes.values()) == 2
    assert rules_of(check(path, plugin=["local::Pair"])) == {"EC110", "EC203"}


@pytest.mark.parametrize("kind", ["circle", "doubling"])
def test_functions_without_an_end_are_refused(kind: str, tmp_path: Path, cli: Cli) -> None:
    graph = one("F0", domain="local")
    count = 2 if kind == "circle" else 40
    for index in range(count):
        follower = f"F{(index + 1) % count}" if kind == "circle" or index < count - 1 else "Relu"
        domain = "local" if follower != "Relu" else ""
        body = [
            helper.make_node(follower, ["a"], ["b"], domain=domain),
            helper.make_node(follower, ["b"], ["c"], domain=domain),
        ]
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("local", 1)]
        graph.functions.append(helper.make_function("local", f"F{index}", ["a"], ["c"], body, opsets))
    said = cli("check", graph.save(tmp_path / "model.onnx"), "--target", "a10")
    assert said.code == 2
    assert "local::F0" in said.err if kind == "circle" else "more than 1000000 nodes" in said.err


# -- files ----------------------------------------------------------------------------------------------------


def external(path: Path, location: str, *, length: int = 4096 * 4096 * 4, offset: int = 0) -> Path:
    """A MatMul whose weight of 64 MiB is said to lie elsewhere."""
    model = Graph(1, 4096).give("y").model()
    model.graph.node.append(helper.make_node("MatMul", ["x", "w"], ["y"], name="product"))
    weight = model.graph.initializer.add(name="w", data_type=FLOAT, dims=[4096, 4096])
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        weight.external_data.add(key=key, value=str(value))
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/hostname", "link/secret.bin"])
def test_external_data_outside_the_folder_is_blocked_and_not_read(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(64 << 20))
    (folder / "link").symlink_to(tmp_path)
    report = check(external(folder / "model.onnx", location))
    (finding,) = report.graphs[0].findings
    assert (finding.rule, finding.name, finding.verdict) == ("EC402", "external-data-outside", "blocked")
    assert location in finding.what
    assert "'w'" in finding.what


def test_external_data_that_is_missing_or_short_is_blocked(tmp_path: Path) -> None:
    path = external(tmp_path / "model.onnx", "weights.data")
    (finding,) = check(path).graphs[0].findings
    assert (finding.rule, finding.verdict) == ("EC403", "blocked")
    assert "'weights.data' is not there" in finding.what
    (tmp_path / "weights.data").write_bytes(bytes(1000))
    assert "has 1000 bytes" in check(path).graphs[0].findings[0].what
    assert "needs 67108864" in check(external(path, "weights.data", length=12)).graphs[0].findings[0].what
    assert "negative" in check(external(path, "weights.data", offset=-4)).graphs[0].findings[0].what
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for hostile in ("loop", "a" * 5000, "", "w\0x"):
        assert rules_of(check(external(path, hostile))) == {"EC403"}


def test_external_data_of_gigabytes_is_never_read(tmp_path: Path) -> None:
    path = external(tmp_path / "model.onnx", "weights.data", offset=2 << 30)
    with (tmp_path / "weights.data").open("wb") as file:
        file.truncate((2 << 30) + (64 << 20))  # sparse
    before, started = _read_bytes(), time.perf_counter()
    report = check(path)
    assert report.verdict == "verified"
    assert time.perf_counter() - started < 2
    assert _read_bytes() - before < 8 << 20


def test_a_file_above_2_gib_is_blocked_and_all_else_is_checked(tmp_path: Path) -> None:
    """The weight lies in the file itself, which protobuf could not parse; the file is sparse."""
    from edgecomp.wire import field_bytes

    size = 24576
    weight = TensorProto(name="w", data_type=FLOAT, dims=[size, size]).SerializeToString()
    graph = Graph(1, size).give("y").model().graph
    graph.node.append(helper.make_node("MatMul", ["x", "w"], ["y"], name="product"))
    graph.node.append(helper.make_node("NonZero", ["x"], ["z"], name="planted"))
    raw = size * size * 4

    def key(number: int, length: int) -> bytes:
        return field_bytes(number, b"\0" * 0)[:-1] + _varint(length)

    tensor = weight + key(9, raw)
    body = graph.SerializeToString() + key(5, len(tensor) + raw) + tensor
    head = helper.make_model(Graph().give("y").model().graph, opset_imports=[helper.make_opsetid("", 20)])
    head.ClearField("graph")
    content = head.SerializeToString() + key(7, len(body) + raw) + body
    path = tmp_path / "large.onnx"
    path.write_bytes(content)
    with path.open("r+b") as file:
        file.truncate(len(content) + raw)
    started = time.perf_counter()
    report = check(path)
    assert time.perf_counter() - started < 2
    assert {(finding.rule, finding.node) for finding in report.graphs[0].findings} == {
        ("EC404", ""),
        ("EC106", "planted"),
    }
    assert str(len(content) + raw) in report.graphs[0].findings[0].what
    with pytest.raises(EdgecompError, match="more than protobuf can write"):
        check(path, fix=True)


@pytest.mark.parametrize("is_shaped", [True, False], ids=["all shapes known", "a shape that depends on values"])
def test_a_long_dimension_takes_no_memory(is_shaped: bool, tmp_path: Path) -> None:
    """A hundred bytes declare 2^40 elements; following each of them would take 150 TB."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"], name="sum")],
        "long",
        [helper.make_tensor_value_info("x", FLOAT, [1 << 40])],
        [helper.make_tensor_value_info("y", FLOAT, None)],
    )
    if not is_shaped:
        graph.input.append(helper.make_tensor_value_info("size", TensorProto.INT64, [2]))
        graph.input.append(helper.make_tensor_value_info("z", FLOAT, [4, 6]))
        graph.node.append(helper.make_node("Reshape", ["z", "size"], ["shaped"], name="reshape"))
        graph.output.append(helper.make_tensor_value_info("shaped", FLOAT, None))
    path = tmp_path / "long.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "from edgecomp.cli import main; sys.argv[1:] = ['check', sys.argv[1], '--target', 'a10']; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("EC202" in done.stdout) != is_shaped


@pytest.mark.parametrize("content", [b"", b"\x08\x08" * (1_100_000)], ids=["zeros", "small fields"])
def test_a_large_file_of_nothing_is_refused_at_once(content: bytes, tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "nothing.onnx"
    path.write_bytes(content)
    with path.open("r+b") as file:
        file.truncate(3 << 30)  # sparse
    started = time.perf_counter()
    said = cli("check", path, "--target", "a10")
    assert time.perf_counter() - started < 10
    assert said.code == 2
    assert ("truncated or no ONNX" if not content else "more than 1048576 fields") in said.err


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])


def _read_bytes() -> int:
    """Bytes that this process has asked files for."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def test_large_tensors_stay_in_the_file_and_can_be_asked_for(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    graph = Graph(1, 64)
    graph.add("MatMul", "x", graph.const("w", values))
    graph.constants.append(helper.make_tensor("packed", FLOAT, [64, 64], values.ravel()))
    graph.nodes.append(helper.make_node("Constant", [], ["held"], value=numpy_helper.from_array(values + 1)))
    path = graph.give("matmul_0.out").save(tmp_path / "model.onnx")
    light = read_light(path)
    assert light.proto.ByteSize() < 1500 < 3 * values.nbytes < light.size
    by_name = {tensor.name: tensor for tensor in light.proto.graph.initializer}
    for tensor, wanted in (
        (by_name["w"], values),
        (by_name["packed"], values),
        (light.proto.graph.node[1].attribute[0].t, values + 1),
    ):
        assert not tensor.raw_data
        np.testing.assert_array_equal(light.array(tensor, largest=1 << 20), wanted)
        assert light.array(tensor, largest=100) is None


def _no_graph() -> bytes:
    return bytes(helper.make_model(helper.make_graph([], "empty", [], [])).SerializeToString())


BROKEN = {
    "text": (b"this is no model at all, it is text", "no ONNX file"),
    "empty": (b"", "cannot be read"),
    "zeros": (bytes(100), "no ONNX"),
    "cut": (topk(7).model().SerializeToString()[:-9], "truncated"),
    "no graph": (_no_graph(), "no graph"),
    "length beyond the end": (b"\x3a\xff\xff\xff\xff\x7f", "truncated"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_an_error_that_names_it(kind: str, tmp_path: Path, cli: Cli) -> None:
    content, word = BROKEN[kind]
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    said = cli("check", path, "--target", "a10")
    assert said.code == 2
    assert said.out == ""
    assert str(path) in said.err
    assert word in said.err
    assert "did not expect" not in said.err


@pytest.mark.parametrize("step", range(7))
def test_altered_bytes_never_end_in_a_traceback(step: int, tmp_path: Path, cli: Cli) -> None:
    content = bytearray(all_at_once().model().SerializeToString())
    generator = np.random.default_rng(step)
    for place in generator.integers(0, len(content), 20):
        content[place] = generator.integers(0, 256)
    path = tmp_path / "altered.onnx"
    path.write_bytes(bytes(content))
    said = cli("check", path, "--target", "a10")
    assert said.code in (0, 1, 2)
    assert "did not expect" not in said.err


USAGE = [
    (["nowhere.onnx", "--target", "a10"], "nowhere.onnx is not there"),
    (["{model}", "--target", "a11"], "no target 'a11'"),
    (["{model}", "--target", "a10", "--runtime", "trt"], "no runtime 'trt'"),
    (["{model}", "--target", "orin-nano", "--runtime", "rtx"], "does not build for orin-nano"),
    (["{model}", "--target", "xavier-nx"], "xavier-nx"),
    (["{model}", "--target", "a10", "--fail-on", "verified"], "verified"),
    (["{model}", "--target", "a10", "--out", "there.onnx"], "--out there.onnx is for --fix"),
    (["{model}", "--target", "a10", "--batch", "2"], "--batch 2 is for --fix"),
    (["{model}", "--target", "a10", "--fix", "--batch", "0"], "--batch 0 is not between 1"),
    (["{model}", "--target", "a10", "--plugin", "Fused"], "'Fused' is no op with its domain"),
    (["{model}"], "--target"),
]


@pytest.mark.parametrize(("words", "text"), USAGE, ids=[text for _, text in USAGE])
def test_wrong_words_exit_with_2(words: list[str], text: str, tmp_path: Path, cli: Cli) -> None:
    model = product(FLOAT).save(tmp_path / "model.onnx")
    said = cli("check", *(word.format(model=model) for word in words))
    assert said.code == 2
    assert said.out == ""
    assert text in said.err
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]


# -- bundles --------------------------------------------------------------------------------------------------


def test_every_graph_of_a_bundle_is_checked(exported: Path, cli: Cli) -> None:
    said = cli("check", exported, "--target", "a10", "--runtime", "rtx", "--fail-on", "likely", "--json")
    assert said.code == 0, said.err
    document = json.loads(said.out)
    assert [graph["file"] for graph in document["graphs"]] == ["model.m4.b1.onnx", "model.m9.b1.onnx"]
    assert document["verdict"] == "verified"
    assert [graph["findings"] for graph in document["graphs"]] == [[], []]
    said = cli("check", exported, "--target", "orin-nano")
    assert said.code == 0
    assert "verdict: likely; pass" in said.out


def test_a_bundle_is_never_rewritten_and_an_altered_one_is_refused(bundle: Path, cli: Cli) -> None:
    said = cli("check", bundle, "--target", "a10", "--fix")
    assert said.code == 2
    assert "a bundle is never rewritten" in said.err
    graph = bundle / "model.m4.b1.onnx"
    content = graph.read_bytes()
    graph.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    said = cli("check", bundle, "--target", "a10")
    assert said.code == 2
    assert "model.m4.b1.onnx has sha256" in said.err


def test_merge_nodes_are_checked_by_their_body(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    bundle = api.export("tome", preset="smoke", budget=[3], out=tmp_path / "tome").bundle
    report = api.check(bundle, target="a10", runtime="rtx")
    assert report.verdict == "verified"
    assert max(graph.inlined for graph in report.graphs) > 0
    taken = api.check(bundle, target="a10", runtime="rtx", plugin=["edgecomp::TopKMerge"])
    assert {finding.name for graph in taken.graphs for finding in graph.findings} >= {"plugin-op"}
    assert taken.verdict == "unverified"


def test_nothing_heavy_is_imported(exported: Path) -> None:
    heavy = ("torch", "onnx_ir", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_rtx", "timm", "rich")
    script = (
        "import sys\nfrom edgecomp.cli import main\n"
        f"try: main()\nfinally: print([n for n in {heavy!r} if n in sys.modules], file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", script, "check", str(exported), "--target", "a10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == "[]\n"


def test_the_flavour_is_planned_without_one_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgecomp.engines import flavour

    monkeypatch.setattr(flavour, "_module_name", lambda name: "")
    assert planned_flavour(load_target("a10")) == "tensorrt"
    monkeypatch.setattr(flavour, "_module_name", lambda name: name)
    monkeypatch.setattr(flavour, "local_gpu_sm", lambda: None)
    assert planned_flavour(load_target("a10")) == "rtx"
    monkeypatch.setattr(flavour, "local_gpu_sm", lambda: 86)
    assert planned_flavour(load_target("a10")) == "tensorrt"


# -- fix ------------------------------------------------------------------------------------------------------

FIXES = {
    "EC103": (lambda: scatter("ScatterND", "none"), ORIN, {}, "reduction=none removed"),
    "EC108": (lambda: sampled("linear"), ORIN, {}, "mode=linear removed"),
    "EC302": (lambda: dequantized(np.int32), RTX, {}, "8 values are stored as float32"),
    "EC105": (lambda: resize(1, (1, 1, 16, 12)), RTX, {}, "antialias=1 removed"),
    "EC201": (lambda: opened("batch"), RTX, {"batch": 3}, "the first dimension of x is 3"),
}


@pytest.mark.parametrize("rule", FIXES)
def test_a_fault_with_an_equal_form_is_rewritten_and_proven(rule: str, tmp_path: Path) -> None:
    plant, where, words, done = FIXES[rule]
    path = plant().save(tmp_path / "model.onnx")
    content = path.read_bytes()
    report = check(path, fix=True, **where, **words)
    assert rule in rules_of(report)
    assert report.fixed.path == str(tmp_path / "model.fixed.onnx")
    assert [rewrite.rule for rewrite in report.fixed.rewrites] == [rule]
    assert done in report.fixed.rewrites[0].what
    assert report.fixed.proof.runs == 3
    assert report.fixed.proof.max_rel <= report.fixed.proof.tolerance
    assert report.fixed.graph.findings == ()
    assert report
    assert path.read_bytes() == content
    onnx.checker.check_model(str(tmp_path / "model.fixed.onnx"), full_check=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.fixed.onnx", "model.onnx"]


def test_what_is_not_provably_equal_is_left_alone(tmp_path: Path, cli: Cli) -> None:
    for name, plant in {"shrinks": lambda: resize(1), "reduces": lambda: scatter("ScatterND", "add")}.items():
        path = plant().save(tmp_path / f"{name}.onnx")
        said = cli("check", path, "--target", "a10", "--runtime", "rtx", "--fix")
        assert said.code == 1
        assert "nothing was written" in said.out
        assert not (tmp_path / f"{name}.fixed.onnx").exists()


def test_nothing_is_written_where_the_proof_fails(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(work: Any) -> Any:
        for tensor in work.model.graph.initializer:
            if tensor.name == "scale":
                tensor.CopyFrom(numpy_helper.from_array(np.asarray(0.0371, np.float32), "scale"))
        yield Rewrite("EC302", "planted", "another scale", "it is not", 0.0)

    monkeypatch.setattr(fix_module, "_REWRITES", (wrong,))
    path = dequantized(np.int32).save(tmp_path / "model.onnx")
    said = cli("check", path, "--target", "a10", "--fix")
    assert said.code == 1
    assert said.out == ""
    assert "'add_1.out' differs by" in said.err
    assert "with seed 0" in said.err
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]


def test_nothing_is_written_where_the_proof_cannot_run(tmp_path: Path) -> None:
    graph = dequantized(np.int32)
    graph.opsets["com.example"] = 1
    graph.give(graph.add("Fused", "x", domain="com.example"))
    path = graph.save(tmp_path / "model.onnx")
    with pytest.raises(ParityError, match="does not run the given model"):
        check(path, fix=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]


def test_fix_keeps_external_data_and_never_overwrites(tmp_path: Path) -> None:
    graph = Graph(1, 64)
    product = graph.add("MatMul", "x", graph.const("w", np.eye(64), np.float32))
    words = [graph.const("bias", np.arange(64), np.int32), graph.const("scale", np.linspace(0.1, 1, 64), np.float32)]
    graph.give(graph.add("Add", product, graph.add("DequantizeLinear", *words, axis=0, name="planted")), shape=[1, 64])
    path, data = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    onnx.save(graph.model(), str(path), save_as_external_data=True, location=data.name, size_threshold=0)
    content = data.read_bytes()
    (tmp_path / "other").mkdir()
    with pytest.raises(EdgecompError, match="must lie beside it"):
        check(path, fix=True, out=tmp_path / "other" / "fixed.onnx")
    report = check(path, fix=True, out=tmp_path / "mine.onnx")
    assert report.verdict == "verified"
    assert report.fixed.proof.max_rel == 0
    assert data.read_bytes() == content
    with pytest.raises(EdgecompError, match=r"mine\.onnx is there already"):
        check(path, fix=True, out=tmp_path / "mine.onnx")


def test_fix_says_where_it_cannot_write(tmp_path: Path) -> None:
    graph = Graph(1, 64)
    words = [graph.const("bias", np.arange(64), np.int32), graph.const("scale", np.linspace(0.1, 1, 64), np.float32)]
    graph.give(graph.add("Add", "x", graph.add("DequantizeLinear", *words, axis=0)), shape=[1, 64])
    with pytest.raises(
        EdgecompError, match=r"--out /proc/fixed\.onnx cannot be written: .*; free space there, or name"
    ):
        check(graph.save(tmp_path / "model.onnx"), fix=True, out="/proc/fixed.onnx")


# -- timm -----------------------------------------------------------------------------------------------------

CLEAN = {
    "vit_tiny_patch16_224": {},
    "deit3_small_patch16_224": {},
    "vit_small_patch14_reg4_dinov2": {"img_size": 56},
    "vit_base_patch16_clip_224": {"img_size": 64},
    "vit_base_patch16_siglip_224": {"img_size": 64},
    "eva02_tiny_patch14_224": {"img_size": 56},
    "swin_tiny_patch4_window7_224": {},
    "resnet18": {},
    "convnext_atto": {},
    "mobilenetv3_small_050": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_timm_export_is_never_blocked(name: str, tmp_path: Path) -> None:
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    model = timm.create_model(name, pretrained=False, **CLEAN[name]).eval()
    size = CLEAN[name].get("img_size", 64 if name in ("resnet18", "convnext_atto", "mobilenetv3_small_050") else 224)
    path = tmp_path / "model.onnx"
    example = torch.zeros(1, 3, size, size)
    torch.onnx.export(model, (example,), str(path), dynamo=True, opset_version=20, verbose=False)
    for where in (RTX, ORIN, {**ORIN, "target": "h100"}, {**ORIN, "target": "thor-t5000"}):
        report = check(path, **where)
        assert report, [finding for finding in report.graphs[0].findings if finding.verdict == "blocked"]
        assert report.verdict in ("likely", "verified"), report.graphs[0].findings
