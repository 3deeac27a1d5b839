"""What each layer and block of a graph takes, and which module it came from."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_result import made_profile

from edgecomp import api
from edgecomp.api._profile_layers import with_shares
from edgecomp.engines.nodes import FRONT, GraphNode, block_labels, cut_after, cut_labels, place_nodes, read_graph
from edgecomp.errors import BuildError, EdgecompError, InvalidSpec, RunError
from edgecomp.profiles.result import LayerTime
from edgecomp.report.profile import describe_profile
from edgecomp.runners.layers import layers_of_engine, parse_profile, time_layers

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

WIDTH = 16


def made_model(path: Path, *, blocks: int = 2, rows: Any = 4, kind: int = 1, module: str = "model.blocks") -> Path:
    """Write blocks of a product and a residual sum, a product in front and one behind."""
    from onnx import helper, numpy_helper

    random = np.random.default_rng(0)
    nodes, weights = [], []

    def product(read: str, write: str, module: str) -> None:
        weights.append(numpy_helper.from_array(random.random((WIDTH, WIDTH), np.float32), f"w_{write}"))
        nodes.append(helper.make_node("MatMul", [read, f"w_{write}"], [write], name=f"n_{write}"))
        nodes[-1].metadata_props.add(key="edgecomp.module", value=module)

    product("x", "embedded", "model.patch_embed")
    last = "embedded"
    for place in range(blocks):
        product(last, f"p{place}", f"{module}.{place}.mlp")
        nodes.append(helper.make_node("Relu", [f"p{place}"], [f"r{place}"], name=f"n_r{place}"))
        nodes.append(helper.make_node("Add", [last, f"r{place}"], [f"a{place}"], name=f"n_a{place}"))
        last = f"a{place}"
    product(last, "y", "model.head")
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [info("x", kind, [rows, WIDTH])], [info("y", 1, [rows, WIDTH])], initializer=weights
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return made_model(tmp_path / "model.onnx")


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def node(name: str, reads: str, module: str = "", op: str = "Add", domain: str = "") -> GraphNode:
    return GraphNode(name, op, domain, tuple(reads.split()), (f"{name}.out",), module, (0, 0))


def test_nodes_without_a_module_belong_to_the_block_whose_results_they_read() -> None:
    nodes = [
        node("constant", "w"),
        node("embed", "x", "model.patch_embed"),
        node("q0", "embed.out constant.out", "model.blocks.0.attn"),
        node("scores0", "q0.out"),
        node("residual0", "embed.out scores0.out"),
        node("between", "residual0.out", "model"),  # of no block, and the next one needs it
        node("q1", "between.out", "model.blocks.1.attn"),
        node("residual1", "between.out q1.out"),
        node("norm", "residual1.out", "model.norm"),
        node("out", "norm.out"),
        node("sizes", "scores0.out"),
    ]
    assert place_nodes(nodes) == [
        "blocks.0", "", "blocks.0", "blocks.0", "blocks.0", "blocks.0", "blocks.1", "blocks.1", "", "", "blocks.0",
    ]  # fmt: skip


def test_a_weight_only_node_belongs_to_its_earliest_reader() -> None:
    nodes = [
        node("c", "w"),
        node("d", "c.out"),
        node("q0", "x", "blocks.0"),
        node("s0", "q0.out d.out"),
        node("q1", "s0.out d.out", "blocks.1"),
    ]
    assert place_nodes(nodes) == ["blocks.0", "blocks.0", "blocks.0", "blocks.0", "blocks.1"]


def test_labels_of_one_row_of_blocks_and_of_several() -> None:
    assert block_labels(["a.blocks.10.x", "a.blocks.9", "norm", "subblocks.1"]) == {
        "a.blocks.10.x": (1, "blocks.10"), "a.blocks.9": (0, "blocks.9"),
    }  # fmt: skip
    assert block_labels(["sam.blocks.0.a", "clip.blocks.0.a", "lm.layers.3"]) == {
        "sam.blocks.0.a": (0, "sam.blocks.0"), "clip.blocks.0.a": (1, "clip.blocks.0"), "lm.layers.3": (2, "layers.3"),
    }  # fmt: skip


def test_modules_are_those_of_edgecomp_or_of_torchs_exporter(tmp_path: Path, model: Path) -> None:
    loaded = onnx.load(model)
    loaded.graph.node[1].metadata_props[0].key = "pkg.torch.onnx.name_scopes"
    loaded.graph.node[1].metadata_props[0].value = "['', 'encoder', 'encoder.layer.4', 'matmul']"
    onnx.save(loaded, tmp_path / "torch.onnx")
    assert read_graph(tmp_path / "torch.onnx").nodes[1].module == "encoder.layer.4"
    assert [one.module for one in read_graph(model).nodes][:3] == ["model.patch_embed", "model.blocks.0.mlp", ""]


def test_graph_cut_after_each_block_gives_what_the_whole_has_there(tmp_path: Path, model: Path) -> None:
    graph = read_graph(model)
    assert cut_labels(graph) == [FRONT, "blocks.0", "blocks.1"]
    x = np.random.default_rng(1).random((4, WIDTH), np.float32)
    loaded = onnx.load(model)
    for name in ("embedded", "a0", "a1"):
        loaded.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, [4, WIDTH]))
    whole = ort.InferenceSession(loaded.SerializeToString())
    values = dict(zip(("y", "embedded", "a0", "a1"), whole.run(None, {"x": x}), strict=True))
    for label, name in (("in front", "embedded"), ("blocks.0", "a0"), ("blocks.1", "a1")):
        cut = onnx.load_from_string(cut_after(graph, label))
        (tmp_path / "cut.onnx").write_bytes(cut.SerializeToString())
        session = ort.InferenceSession(str(tmp_path / "cut.onnx"))
        assert [one.name for one in session.get_outputs()] == [name]
        assert np.allclose(session.run(None, {"x": x})[0], values[name])
        assert len(cut.graph.initializer) == {"in front": 1, "blocks.0": 2, "blocks.1": 3}[label]
    with pytest.raises(BuildError, match=r"no block 'blocks\.7' in this graph; it has in front, blocks\.0, blocks\.1"):
        cut_after(graph, "blocks.7")


def test_files_that_are_no_graph(tmp_path: Path, model: Path) -> None:
    with pytest.raises(BuildError, match=r"none\.onnx cannot be read: No such file"):
        read_graph(tmp_path / "none.onnx")
    (tmp_path / "half.onnx").write_bytes(model.read_bytes()[:900])
    with pytest.raises(BuildError, match=r"half\.onnx is truncated or no ONNX file"):
        read_graph(tmp_path / "half.onnx")


def test_layers_of_a_real_profile(model: Path, temporary: Path) -> None:
    x = np.ones((4, WIDTH), np.float32)
    layers = time_layers(model, {"x": x}, threads=1, runs=5)
    told = {layer.name.split("/")[0]: (layer.module, layer.block) for layer in layers}
    assert told["n_p1"] == ("model.blocks.1.mlp", "blocks.1")
    assert told["n_a0"] == ("", "blocks.0")
    assert told["n_y"] == ("model.head", "")
    assert list(temporary.iterdir()) == []
    with pytest.raises(
        RunError, match=r"the layers of model\.onnx cannot be timed: .*x.*; measure without --per-layer"
    ):
        time_layers(model, {}, threads=1)
    assert list(temporary.iterdir()) == []


def event(name: str, op: str, us: float, index: int = 0) -> dict[str, Any]:
    words = {"op_name": op, "node_index": str(index)}
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": us, "args": words}


SOURCE = [
    node("n_q", "x", "model.blocks.0.attn", "MatMul"),
    GraphNode("n_merge", "TopKMerge", "edgecomp", ("n_q.out",), ("merged", "sizes"), "", (0, 0)),
    node("n_g", "merged", "model.blocks.1.mlp", "MatMul"),
]
REWRITTEN = [
    GraphNode("n_q/MatMulAddFusion", "Gemm", "", ("x",), ("n_q.out",), "", (0, 0)),
    GraphNode("", "TopK", "", ("n_q.out",), ("_inlfunc_TopKMerge_t",), "", (0, 0)),
    GraphNode("", "TopK", "", ("n_q.out",), ("other",), "", (0, 0)),
    GraphNode("n_g_token_12", "MatMul", "", ("_inlfunc_TopKMerge_t", "other"), ("n_g.out",), "", (0, 0)),
]
RAN = [("n_q/MatMulAddFusion", "Gemm", 8), ("TopK_7", "TopK", 3), ("TopK_9", "TopK", 2), ("n_g_token_12", "MatMul", 5)]


def profile_of(*runs: int) -> str:
    session = {"cat": "Session", "name": "model_run", "dur": 1, "args": {}}
    return json.dumps([session, *(event(n, op, us + more) for more in runs for n, op, us in RAN)])


def test_fused_and_inlined_layers_are_told_by_name_output_and_order() -> None:
    layers = parse_profile(profile_of(900, 0, 2, 1), SOURCE, REWRITTEN, model="m", warm=1)
    assert [(one.module, one.block, one.part, one.us) for one in layers] == [
        ("model.blocks.0.attn", "blocks.0", "", 9.0),
        ("", "blocks.0", "merge", 4.0),
        ("", "blocks.0", "selection", 3.0),
        ("model.blocks.1.mlp", "blocks.1", "", 6.0),
    ]


def test_layers_of_another_order_are_told_by_their_names_alone() -> None:
    layers = parse_profile(profile_of(0, 0), SOURCE, REWRITTEN[::-1], model="m", warm=1)
    assert [(one.module, one.block, one.part) for one in layers] == [
        ("model.blocks.0.attn", "blocks.0", ""), ("", "", "selection"), ("", "", "selection"),
        ("model.blocks.1.mlp", "blocks.1", ""),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (profile_of(0, 0)[:-9], "profile of m is truncated or not as it was"),
        (json.dumps([{"cat": "Node", "name": "n_kernel_time"}]), "profile of m is truncated or not as it was"),
        ("[]", "profile of m holds 0 runs; give it more than 3"),
        (profile_of(0, 0), "profile of m holds 2 runs; give it more than 3"),
    ],
)
def test_profiles_that_cannot_be_read(text: str, said: str) -> None:
    with pytest.raises(RunError, match=said):
        parse_profile(text, SOURCE, REWRITTEN, model="m")


def test_layers_of_an_engine_by_its_inspector(model: Path) -> None:
    layer = {"LayerType": "gemm", "Metadata": "[ONNX Layer: n_p0]\x1e[ONNX Layer: n_r0]\x1e[ONNX Layer: n_a0]"}
    whole = {"Name": "ForeignNode", "LayerType": "Myelin", "Metadata": "[ONNX Layer: n_p1]\x1e[ONNX Layer: n_y]"}
    information = json.dumps({"Layers": [{"Name": "fused", **layer}, whole]})
    times = {"fused": [3.0, 5.0, 4.0], "ForeignNode": [9.0], "reformat": [1.0]}
    found = {one.name: one for one in layers_of_engine(times, information, model)}
    assert (found["fused"].module, found["fused"].block, found["fused"].us) == ("model.blocks.0.mlp", "blocks.0", 4.0)
    assert (found["ForeignNode"].module, found["ForeignNode"].block) == (
        "",
        "",
    )  # of two modules, in and out of a block
    assert (found["reformat"].op, found["reformat"].block) == ("", "")


def test_profile_of_a_file_with_layers_and_blocks(model: Path, temporary: Path) -> None:
    result = api.profile(model, duration_s=0.01, threads=1, per_layer=True, ablate=True)
    assert result.subject.name == "model"
    assert result.command == (
        "edgecomp",
        "profile",
        "model.onnx",
        "--threads=1",
        "--duration=0.01",
        "--per-layer",
        "--ablate",
    )
    (one,) = result.profiles
    assert (one.role, one.batch, one.load_us is not None, one.first_us is not None) == ("model", 4, True, True)
    assert sum(layer.share for layer in result.layers) == pytest.approx(1.0)
    assert [block.block for block in result.blocks] == ["in front", "blocks.0", "blocks.1", "behind"]
    for block in result.blocks:
        assert block.low_us <= block.us <= block.high_us
    assert list(temporary.iterdir()) == []
    text = describe_profile(result)
    assert re.search(r"^model\.onnx +blocks\.1 +-?\d+\.\d{3} +\[-?\d", text, re.MULTILINE)
    assert re.search(r"^blocks\.1 +\d+ +\d+\.\d{3} +\d+\.\d", text, re.MULTILINE)
    assert "% of the layers' time is of no one module by its name" in text
    assert max(map(len, text.partition("\n\n")[2].splitlines())) <= 400


@pytest.mark.parametrize(
    ("layers", "rows"),
    [
        (  # behind a host
            [("backbone.model.blocks.0", "", 6.0), ("", "", 1.0), ("compressor.attn", "", 2.0), ("", "selection", 1.0)],
            {"encoder": 700.0, "compressor": 200.0, "selection": 100.0},
        ),
        (  # of a graph with a stem
            [("model.backbone.blocks.0", "", 6.0), ("model.compressor.q", "", 3.0), ("model.compressor", "merge", 1.0)],
            {"encoder": 600.0, "compressor": 300.0, "merge": 100.0},
        ),
        ([("compressor.blocks.0.q", "", 9.0), ("", "", 1.0)], {"encoder": 1000.0}),  # the method is the encoder
        ([("encoder.model.blocks.0", "", 9.0), ("", "", 1.0)], {}),  # the plain model
    ],
)
def test_rows_of_encoder_and_compressor(layers: list[tuple[str, str, float]], rows: dict[str, float]) -> None:
    total = sum(us for *_, us in layers)
    times = tuple(
        LayerTime(model="m", name="n", op="o", module=module, block="", part=part, us=us, share=us / total)
        for module, part, us in layers
    )
    profile = with_shares(made_profile([1000.0] * 20), times)
    assert {stage.name: stage.p50_us for stage in profile.stages} == pytest.approx(rows)


def test_blocks_of_a_graph_that_names_none(tmp_path: Path) -> None:
    model = made_model(tmp_path / "plain.onnx", module="model.steps")
    with pytest.raises(InvalidSpec, match=r"--ablate: plain\.onnx names no encoder blocks"):
        api.profile(model, duration_s=0.01, ablate=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": 4}, r"--budget with model\.onnx: an ONNX file is measured as it is"),
        ({"batch": 1}, r"--batch with model\.onnx"),
        ({"runner": "torch"}, r"--runner torch with model\.onnx: engines and torch models are made of bundles"),
        ({"original": True}, r"--original with model\.onnx"),
        ({"runs": 0}, "0 runs are not from 1 to 10,000,000"),
        ({"warmup_s": -1}, "warm-up -1 s is not from 0"),
        ({"percentile": 100}, r"percentile 100 is not from 1 to 99\.99"),
        ({"percentile": 99.99999}, r"percentile 99\.99999 is not from 1 to 99\.99"),
        ({"streams": 3}, "3 streams in mode single-stream, which takes 1"),
        ({"mode": "server"}, "no mode 'server'; there are single-stream"),
        ({"cuda_graph": True}, "--cuda-graph with runner onnxruntime: .*nothing is launched on one there"),
        ({"cuda_graph": True, "runner": "onnxruntime-cuda"}, "runner onnxruntime-cuda: .*it has its own"),
        ({"per_layer": True, "runner": "onnxruntime-cuda"}, "--per-layer with runner onnxruntime-cuda: .*launches"),
        ({"per_layer": True, "runner": "torch"}, "--per-layer with runner torch: eager torch has no layers"),
        ({"ablate": True, "runner": "torch"}, "--ablate with runner torch: it cuts graphs"),
    ],
)
def test_what_cannot_be_measured(model: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidSpec, match=said):
        api.profile(model, **changes)


def test_inputs_that_have_no_one_shape_or_no_numbers(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match=r"loose\.onnx: input 'x' has the dimension 'batch' in \['batch', 16\]"):
        api.profile(made_model(tmp_path / "loose.onnx", rows="batch"))
    with pytest.raises(InvalidSpec, match=r"empty\.onnx: input 'x' has the dimension 0 in \[0, 16\]"):
        api.profile(made_model(tmp_path / "empty.onnx", rows=0))
    with pytest.raises(RunError, match=r"none\.onnx cannot be read: there is no such file"):
        api.profile(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("no graph")
    with pytest.raises(RunError, match=r"ONNX Runtime cannot load .*text\.onnx"):
        api.profile(tmp_path / "text.onnx")


def test_percentile_that_the_samples_do_not_carry_is_said_loudly(model: Path) -> None:
    said: list[str] = []
    result = api.profile(model, duration_s=0.01, percentile=99, progress=said.append)
    short = [note for note in result.notes if note.startswith("p99 of model.onnx is indicative")]
    assert re.search(
        r"\d+ samples do not carry it; .* ask for 270,336, about \d+\.\d min here: --runs 270336", short[0]
    )
    assert f"note: {short[0]}" in said
    assert f"note: {short[0]}" in describe_profile(result)
    assert not [note for note in api.profile(model, duration_s=0.01, percentile=50).notes if "indicative" in note]
    far = api.profile(model, duration_s=0.01, percentile=99.99)
    assert "p99.99" in far.profiles[0].percentiles
    assert "ask for 26,542,080, more than the 10,000,000 that one result can hold" in far.notes[-1]


def test_outputs_that_are_no_numbers_are_said(tmp_path: Path) -> None:
    from onnx import helper

    info = helper.make_tensor_value_info
    node = helper.make_node("Log", ["x"], ["y"])  # of noise, half of which is negative
    graph = helper.make_graph([node], "g", [info("x", 1, [1, 64])], [info("y", 1, [1, 64])])
    path = tmp_path / "log.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    said: list[str] = []
    result = api.profile(path, duration_s=0.01, progress=said.append)
    note = "log.onnx gives NaN or Inf in y on these inputs; its time may be another on good ones"
    assert note in result.notes
    assert f"note: {note}" in said


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.json").mkdir()
    said: list[str] = []
    for out, error, text in (
        (tmp_path / "file", EdgecompError, "result cannot be written to .*file: Not a directory"),
        (tmp_path / "file" / "deep" / "r.json", EdgecompError, "result cannot be written to .*deep: Not a directory"),
        (tmp_path / "folder.json", InvalidSpec, r"folder\.json is a folder"),
        (model.rename(tmp_path / "model.json"), InvalidSpec, r"model\.json is there and would be lost"),
    ):
        with pytest.raises(error, match=text):
            api.profile(tmp_path / "absent.onnx", out=out, progress=said.append)
    assert said == []
    with pytest.raises(EdgecompError, match=r"--out cannot be written to .*file: Not a directory"):
        api.compare([tmp_path / "absent"], out=tmp_path / "file" / "c.json")
    with pytest.raises(EdgecompError, match=r"--out cannot be written to .*file: Not a directory"):
        api.compare_methods(["tome"], out=tmp_path / "file" / "c.json")


def test_packages_are_loaded_before_the_first_model_is() -> None:
    """Else its time to load is that of `import onnxruntime`."""
    code = """
import contextlib, sys
from edgecomp.api._measure import Plan, measure_opened
class Null(contextlib.nullcontext):
    name = version = "null"
    input_names = ()
    def __enter__(self): return self
    def infer(self, inputs): return {}
def opened():
    assert "onnxruntime" in sys.modules
    return Null()
assert "onnxruntime" not in sys.modules
measure_opened(Plan(duration_s=0.01, runs=1, stages=False), opened, {}, model="null", batch=1, say=print)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_killed_in_the_middle_leaves_nothing(model: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "temporary", tmp_path / "out" / "r.json"
    folder.mkdir()
    words = ["profile", str(model), "--duration", "0.01", "--ablate", "--runs", "200", "--out", str(out)]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-m", "edgecomp", *words],
        env={**os.environ, "TMPDIR": str(folder), "PYTHONPATH": paths},
        stderr=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 60
        while not list(folder.glob("edgecomp-*/*.onnx")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.terminate()
        assert process.wait(timeout=30) not in (0, 1)
    finally:
        process.kill()
        process.communicate()
    assert list(folder.glob("edgecomp*")) == []
    assert not out.parent.exists()


def test_a_file_is_not_copied_to_another_machine(model: Path, cli: Any) -> None:
    said = cli("profile", model, "--on", "ssh://me@nano/srv")
    assert (said.code, said.out) == (2, "")
    assert f"--on with {model}: bundles alone are copied" in said.err


def test_a_place_here_is_looked_at_before_anything_is_done_there(tmp_path: Path, cli: Any) -> None:
    (tmp_path / "file").write_text("mine")
    said = cli("profile", tmp_path, "--on", "ssh://me@nano.invalid/srv", "--out", tmp_path / "file" / "r.json")
    assert (said.code, said.out) == (2, "")
    assert f"result cannot be written to {tmp_path / 'file'}: Not a directory" in said.err
