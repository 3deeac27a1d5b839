"""`edgecomp estimate`: what it prints, what it imports, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("onnx", reason="onnx is not installed; pip install 'edgecomp[cpu]' brings it")

import onnx
import onnx.parser
from onnx import helper as make

from edgecomp import api
from edgecomp.errors import InvalidSpec, RunError
from edgecomp.estimates.chain import in_a_row
from edgecomp.estimates.geometry import Geometry, transformer_costs
from edgecomp.export.costs import count_costs

Cli = Callable[..., Any]
TOKENS, DIM, HEADS, DEPTH = 49, 64, 2, 4


def transformer(path: Path, *, batch: Any = 1) -> Path:
    """Write a plain transformer as a file of torch's exporter has it, with weights that are nowhere."""
    nodes, weights = [], []

    def node(op: str, inputs: list[str], module: str, **attributes: Any) -> str:
        name = f"{op}_{len(nodes)}"
        made = make.make_node(op, inputs, [name], name=name, **attributes)
        made.metadata_props.add(key="edgecomp.module", value=module)
        nodes.append(made)
        return name

    def weight(*dims: int) -> str:
        tensor = onnx.TensorProto(name=f"w{len(weights)}", dims=dims, data_type=1, data_location=1)
        for key, value in (("location", "nowhere.data"), ("length", str(4 * onnx.numpy_helper.np.prod(dims)))):
            tensor.external_data.add(key=key, value=value)
        weights.append(tensor)
        return str(tensor.name)

    def constant(*values: int) -> str:
        name = f"c{len(weights)}"
        weights.append(make.make_tensor(name, onnx.TensorProto.INT64, [len(values)], values))
        return name

    def linear(x: str, inner: int, outer: int, module: str) -> str:
        return node("Add", [node("MatMul", [x, weight(inner, outer)], module), weight(outer)], module)

    x = linear("patches", 48, DIM, "patch_embed.proj")
    split = constant(0, TOKENS, HEADS, DIM // HEADS)
    whole = constant(0, TOKENS, DIM)
    for block in range(DEPTH):
        at = f"blocks.{block}"
        y = node("LayerNormalization", [x, weight(DIM), weight(DIM)], f"{at}.norm1")
        heads = []
        for order in ((0, 2, 1, 3), (0, 2, 3, 1), (0, 2, 1, 3)):
            z = node("Reshape", [linear(y, DIM, DIM, f"{at}.attn"), split], f"{at}.attn")
            heads.append(node("Transpose", [z], f"{at}.attn", perm=list(order)))
        y = node("Softmax", [node("MatMul", heads[:2], f"{at}.attn")], f"{at}.attn", axis=-1)
        y = node("Transpose", [node("MatMul", [y, heads[2]], f"{at}.attn")], f"{at}.attn", perm=[0, 2, 1, 3])
        x = node("Add", [x, linear(node("Reshape", [y, whole], f"{at}.attn"), DIM, DIM, f"{at}.attn.proj")], at)
        y = node("LayerNormalization", [x, weight(DIM), weight(DIM)], f"{at}.norm2")
        y = node("Gelu", [linear(y, DIM, 4 * DIM, f"{at}.mlp.fc1")], f"{at}.mlp.act")
        x = node("Add", [x, linear(y, 4 * DIM, DIM, f"{at}.mlp.fc2")], at)
    last = make.make_node("LayerNormalization", [x, weight(DIM), weight(DIM)], ["tokens"], name="last")
    last.metadata_props.add(key="edgecomp.module", value="encoder.norm")
    nodes.append(last)
    graph = make.make_graph(
        nodes,
        "vit",
        [make.make_tensor_value_info("patches", 1, [batch, TOKENS, 48])],
        [make.make_tensor_value_info("tokens", 1, [batch, TOKENS, DIM])],
        weights,
    )
    path.write_bytes(
        make.make_model(graph, opset_imports=[make.make_opsetid("", 20)], ir_version=10).SerializeToString()
    )
    return path


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return transformer(tmp_path_factory.mktemp("vit") / "vit.onnx")


@pytest.fixture(autouse=True)
def _own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGECOMP_CONFIG_DIR", str(tmp_path / "config"))


def test_a_graph_counts_as_its_geometry_does(vit: Path) -> None:
    costs = count_costs(vit)
    made = transformer_costs(Geometry(TOKENS, DIM, DEPTH, HEADS, 4 * DIM, 48))
    assert (costs.flops, costs.tokens, costs.batch) == (made.flops, TOKENS, 1)
    assert {op.block for op in costs.ops} == {"front", "back", *(f"blocks.{number}" for number in range(DEPTH))}


def test_what_it_prints(cli: Cli, vit: Path) -> None:
    said = cli("estimate", vit, "--target", "t4", "--precision", "fp16", "--batch", "4")
    assert (said.code, said.err) == (0, "")
    report = api.estimate(vit, target="t4", precision="fp16", batch=4)
    made = report.graphs[0].estimate
    for text in (
        "vit.onnx on t4 (Tesla T4 16GB): computed, not measured",
        "precision  fp16; batch 4; fp16 65 TFLOP/s dense",
        "each left out in turn; 9 of 10 were within a factor of 1.38",
        f"{made.mid_us / 1e3:.2f}",
        "blocks.0 to blocks.3, each",
        "fits",
        "taken as if it were exported in fp16",
        "the file is for batch 1; FLOPs and activations are scaled by 4",
    ):
        assert text in said.out
    assert "derived" in cli("estimate", vit, "--target", "agx-orin-64", "--precision", "fp16").out


def test_json_holds_what_the_text_says(cli: Cli, vit: Path) -> None:
    document = json.loads(cli("estimate", vit, "--target", "t4", "--precision", "fp16", "--json").out)
    (graph,) = document["graphs"]
    assert graph["estimate"]["kernels"] == []
    assert graph["estimate"]["low_us"] < graph["estimate"]["mid_us"] < graph["estimate"]["high_us"]
    assert sum(block["share"] for block in graph["blocks"]) == pytest.approx(1)
    assert graph["estimate"]["peaks"]["fp16"]["confidence"] == "stated"
    per_op = json.loads(cli("estimate", vit, "--target", "t4", "--per-op", "--json").out)["graphs"][0]["estimate"]
    assert sum(kernel["us"] for kernel in per_op["kernels"]) == pytest.approx(per_op["mid_us"])


def test_per_op_lists_every_kernel(cli: Cli, vit: Path) -> None:
    lines = cli("estimate", vit, "--target", "t4", "--per-op").out.splitlines()
    assert sum("attention" in line for line in lines) == DEPTH
    assert sum("norm" in line for line in lines) >= 2 * DEPTH + 1


def test_torch_is_never_imported(vit: Path) -> None:
    heavy = ("torch", "onnx_ir", "onnxscript", "timm", "transformers", "onnxruntime", "tensorrt")
    script = (
        "import sys\n"
        "from edgecomp.cli import main\n"
        "try: main()\n"
        f"finally: print([n for n in {heavy!r} if n in sys.modules], file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", script, "estimate", str(vit), "--target", "t4", "--go-no-go"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr == "[]\n"
    assert "on t4 at batch 1" in done.stdout


def test_go_no_go(cli: Cli, vit: Path) -> None:
    said = cli("estimate", vit, "--target", "t4", "--go-no-go")
    assert said.code == 0
    assert "No: on t4 at batch 1 in fp16, keeping 24 of 49 tokens behind block 1" in said.out
    answer = json.loads(cli("estimate", vit, "--target", "t4", "--go-no-go", "--json").out)["go_no_go"]
    assert (answer["verdict"], answer["tokens"], answer["blocks"]) == ("no", TOKENS, DEPTH)


def test_a_language_model_behind_it(cli: Cli, vit: Path) -> None:
    words = ("--visual-tokens", 6272, "--kept", 1568, "--text-tokens", 100, "--schedule", "aim")
    said = cli("estimate", "--target", "thor-t5000", "--llm", "qwen2-7b", *words)
    assert said.code == 0
    assert "14 x 1668, 1472, 1276, 1080, 884, 688, 492, 296, 7 x 100" in said.out
    assert "14.8 %" in said.out
    report = api.estimate(vit, target="t4", llm="qwen3-0.6b", visual_tokens=49, kept=20, text_tokens=9)
    assert report.llm is not None
    assert [(row.label, row.prefill.visual_tokens) for row in report.llm.rows] == [("all", 49), ("vit.onnx", 20)]
    last = report.llm.rows[-1]
    assert last.first_token_us == pytest.approx(report.graphs[0].estimate.mid_us + last.prefill.mid_us)
    first = report.llm.rows[0]
    assert first.encoder_us == last.encoder_us == report.graphs[0].estimate.mid_us  # the file makes all tokens too
    assert first.first_token_us > last.first_token_us
    shape, made = report.llm.shape, report.graphs[0].estimate
    assert first.memory.weight_bytes == 2 * shape.parameters + made.weight_bytes
    assert first.memory.activation_bytes > first.prefill.kv_bytes + 2 * 58 * 2 * shape.mlp
    assert report.llm.encoder_precision == "fp32, as written"
    text = cli("estimate", vit, "--target", "t4", "--llm", "qwen3-0.6b", "--visual-tokens", 49).out
    assert "fp16, 0 text tokens, one sequence; the encoder in fp32, as written" in text
    assert "vit.onnx  " not in text.partition("prefill ms")[2]  # without --kept it would be \"all\" again


def test_a_language_model_is_given_one_image(cli: Cli, vit: Path) -> None:
    words = ("--target", "t4", "--llm", "qwen3-0.6b", "--visual-tokens", 49)
    said = cli("estimate", vit, *words, "--batch", 8)
    assert said.code == 2
    assert "is given one sequence, and vit.onnx would encode 8 images at once; leave --batch out" in said.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--target", "t5"), "no target 't5'; did you mean 't4'"),
        (("--target", "t4", "--precision", "fp8"), r"t4 \(SM75\) does not run fp8; it runs fp32, fp16, int8"),
        (("--target", "t4", "--precision", "half"), "no precision 'half'"),
        (("--target", "t4", "--batch", "0"), "--batch 0 is not between 1 and 65536"),
        (("--target", "orin-nano-super", "--power-mode", "7W"), "clock of power mode 7W is not known"),
        (("--target", "t4", "--power-mode", "9W"), "no power mode of t4 '9W'"),
        (("--target", "t4", "--budget", "4"), "--budget 4 is of a bundle"),
        (("--target", "t4", "--llm", "qwen2-7b"), "needs --visual-tokens"),
        (("--target", "t4", "--kept", "4"), "of --llm, which was not given"),
        (("--target", "t4", "--llm", "qwen2-7b", "--visual-tokens", "4", "--kept", "5"), "--kept 5 is more than the 4"),
        (("--target", "t4", "--llm", "qwen2-7b", "--visual-tokens", "4", "--schedule", "9:1:1"), "'9:1:1' is no LAYER"),
    ],
)
def test_bad_words_are_named(cli: Cli, vit: Path, words: tuple[str, ...], told: str) -> None:
    said = cli("estimate", vit, *words)
    assert (said.code, said.out) == (2, "")
    assert re.search(told, said.err)


def test_no_model_at_all(cli: Cli) -> None:
    said = cli("estimate", "--target", "t4")
    assert said.code == 2
    assert "no model was given: name a bundle or an .onnx file, or a language model with --llm" in said.err


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"gone\.onnx is not there"):
        api.estimate(tmp_path / "gone.onnx", target="t4")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"\x08\x0a\x12")
    with pytest.raises(RunError, match=r"broken\.onnx is truncated or no ONNX file \(3 bytes\)"):
        api.estimate(broken, target="t4")


def test_an_open_batch_is_given_by_batch(tmp_path: Path) -> None:
    path = transformer(tmp_path / "open.onnx", batch="n")
    with pytest.raises(RunError, match=r"input 'patches' is \['n', 49, 48\]"):
        api.estimate(path, target="t4")
    report = api.estimate(path, target="t4", batch=4)
    assert report.graphs[0].estimate.batch == 4
    assert any("first dimension of patches is taken as 4" in note for note in report.notes)


def test_a_target_without_the_peak_that_is_needed(vit: Path, tmp_path: Path) -> None:
    from edgecomp.resources import data_path

    text = data_path("profiles", "targets", "t4.toml").read_text(encoding="utf-8")
    head, _, tail = text.partition("[peaks.int8]")
    path = tmp_path / "mine.toml"
    path.write_text(head + tail[tail.index("[[power_modes]]") :], encoding="utf-8")
    with pytest.raises(InvalidSpec, match=r"(?s)states no peak for it; write \[peaks\.int8\].*--target FILE\.toml"):
        api.estimate(vit, target=str(path), precision="int8")


# -- bundles --------------------------------------------------------------------------------------------------


def graph_file(path: Path, body: str, inputs: str, outputs: str) -> None:
    text = f'<ir_version: 10, opset_import: ["" : 20]> g ({inputs}) => ({outputs}) {{ {body} }}'
    onnx.save(onnx.parser.parse_model(text), path)


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stem, a bucket behind it, and a plain model, as the manifest of a bundle names them."""
    graph_file(tmp_path / "stem.onnx", "t = MatMul (x, x)\n h = Relu (t)", "float[1,8,8] x", "float[1,8,8] h")
    graph_file(tmp_path / "m.onnx", "t = Neg (h)\n y = MatMul (t, h)", "float[1,8,8] h", "float[1,8,8] y")
    graph_file(tmp_path / "plain.onnx", "y = MatMul (x, x)", "float[1,8,8] x", "float[1,8,8] y")
    bucket = SimpleNamespace(model="m.onnx", stem="stem.onnx", batch=1, inputs=(), budget=SimpleNamespace(tokens_out=4))
    manifest = SimpleNamespace(buckets=(bucket,), plain=(SimpleNamespace(model="plain.onnx", stem="", batch=1),))
    opened = SimpleNamespace(manifest=manifest, select=lambda **_: (bucket,))
    monkeypatch.setattr("edgecomp.api._estimate.open_bundle", lambda path, **_: opened)
    return tmp_path


def test_a_bucket_is_its_stem_and_the_rest(parts: Path) -> None:
    report = api.estimate(parts, target="t4")
    bucket, plain = report.graphs
    assert (bucket.role, bucket.kept, plain.role) == ("bucket", 4, "plain")
    assert bucket.estimate.flops == 2 * plain.estimate.flops == 2 * 2 * 8 * 8 * 8
    assert bucket.over_plain == pytest.approx(bucket.estimate.mid_us / plain.estimate.mid_us)
    assert bucket.over_plain > 1
    costs = in_a_row(count_costs(parts / "stem.onnx"), count_costs(parts / "m.onnx"))
    assert [op.reads for op in costs.ops] == [("x",), ("t",), ("h",), ("2/t", "h")]
    assert (costs.inputs, costs.outputs) == (("x",), ("y",))


def test_a_method_that_does_not_pay_is_a_finding(cli: Cli, parts: Path) -> None:
    said = cli("estimate", parts, "--target", "t4")
    assert "finding: m.onnx does not pay on t4 at batch 1, as written: " in said.out
    assert "slower than the plain model's" in said.out
    swapped = cli("estimate", parts, "--target", "t4", "--llm", "qwen3-0.6b", "--visual-tokens", "8", "--json")
    rows = json.loads(swapped.out)["llm"]["rows"]
    assert [(row["label"], row["prefill"]["visual_tokens"]) for row in rows] == [("all", 8), ("m.onnx", 4)]
    assert rows[0]["encoder_us"] < rows[1]["encoder_us"]


def test_without_a_plain_model_the_first_tokens_are_not_compared(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import edgecomp.api._estimate as module

    opened = module.open_bundle(parts)
    opened.manifest.plain = ()
    monkeypatch.setattr(module, "open_bundle", lambda path, **_: opened)
    report = api.estimate(parts, target="t4", llm="qwen3-0.6b", visual_tokens=8)
    assert report.llm is not None
    assert [row.first_token_us > 0 for row in report.llm.rows] == [False, True]


def test_graphs_that_do_not_fit_together_are_named(parts: Path) -> None:
    stem, rest = count_costs(parts / "stem.onnx"), count_costs(parts / "m.onnx")
    with pytest.raises(InvalidSpec, match=r"plain\.onnx reads x, which m\.onnx does not make"):
        in_a_row(rest, count_costs(parts / "plain.onnx"))
    assert in_a_row(stem, rest).flops == stem.flops + rest.flops


def test_a_constant_that_a_stem_hands_on_is_a_weight(tmp_path: Path) -> None:
    """The stem of attention-pruning hands on scores that are all zero where its blocks choose nothing."""
    score = "n = Constant <value_ints: ints = [1, 8, 8]> () score = ConstantOfShape (n)"
    shape = "float[1,8,8]"
    graph_file(tmp_path / "stem.onnx", f"h = Relu (x) {score}", f"{shape} x", f"{shape} h, {shape} score")
    graph_file(tmp_path / "m.onnx", "t = Neg (score) y = MatMul (h, t)", f"{shape} h, {shape} score", f"{shape} y")
    costs = in_a_row(count_costs(tmp_path / "stem.onnx"), count_costs(tmp_path / "m.onnx"))
    assert (costs.inputs, costs.outputs) == (("x",), ("y",))
    negated = costs.ops[1]
    assert (negated.reads, negated.weights, negated.bytes_read, negated.weight_bytes) == ((), ("score",), 0, 256)
    assert "score" not in costs.values


def test_a_bundle_without_its_plain_model_cannot_answer(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import edgecomp.api._estimate as module

    opened = module.open_bundle(parts)
    opened.manifest.plain = ()
    monkeypatch.setattr(module, "open_bundle", lambda path, **_: opened)
    with pytest.raises(InvalidSpec, match="the bundle holds none; export it with --with-plain"):
        api.estimate(parts, target="t4", go_no_go=True)
    assert any("--with-plain" in note for note in api.estimate(parts, target="t4").notes)
