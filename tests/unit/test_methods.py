"""`edgecomp compare --methods`: what is computed of each method, what is left out with its reason, and the texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from made_result import MACHINE

from edgecomp import api
from edgecomp.api import _methods
from edgecomp.api._methods import _export, _names, _reconstructions
from edgecomp.api._overhead import node_shares, share_of
from edgecomp.errors import InvalidSpec, RunError, UnknownName
from edgecomp.evaluation.reconstruction import Reconstruction
from edgecomp.profiles.ratios import paired_ratio
from edgecomp.profiles.statistics import median_interval
from edgecomp.report.methods import METHODS_KIND, MethodRow, MethodsReport, describe_methods_report
from edgecomp.runners.layers import Layer
from edgecomp.specs import TensorSpec, TokenBudget, method_names
from edgecomp.specs.manifest import Bucket

Cli = Callable[..., Any]
RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((16, 8)).astype(np.float32)
CLASS = RANDOM.standard_normal((1, 8)).astype(np.float32)


def bucket(*outputs: tuple[str, str], kept: int = 4) -> Bucket:
    specs = tuple(TensorSpec(name, (1,), "float32", kind) for name, kind in outputs)  # type: ignore[arg-type]
    return Bucket(
        model="m.onnx",
        batch=1,
        inputs=(),
        outputs=specs,
        flops=1,
        ops={},
        budget=TokenBudget(16, kept, num_prefix_tokens=0),
    )


# -- reconstruction by what a method gives ------------------------------------------------------------------------


def test_merges_are_unmerged_without_their_prefix() -> None:
    rows = np.repeat(np.arange(4, dtype=np.int32), 4)
    means = X.reshape(4, 4, 8).mean(1)
    graph = bucket(("merged", "tokens"), ("source_map", "indices"))
    (plain,), note = _reconstructions(graph, {"merged": means[None], "source_map": rows[None]}, X)
    assert (plain.way, note) == ("unmerge", "")
    behind_class = np.concatenate([[0], rows + 1]).astype(np.int32)
    outputs = {"merged": np.vstack([CLASS, means])[None], "source_map": behind_class[None]}
    (found,), _ = _reconstructions(graph, outputs, X)
    assert found == plain


def test_prunes_are_filled_in_both_ways_without_their_prefix_and_padding() -> None:
    places = np.array([1, 6, 9, 14], np.int32)
    graph = bucket(("kept", "tokens"), ("index", "indices"))
    plain, note = _reconstructions(graph, {"kept": X[places][None], "index": places[None]}, X)
    assert ([one.way for one in plain], note) == (["zero fill", "nearest fill"], "")
    assert plain[0].error == pytest.approx(1 - (X[places] ** 2).sum() / (X**2).sum(), rel=1e-6)
    outputs = {"kept": np.vstack([CLASS, X[places]])[None], "index": np.concatenate([[0], places + 1])[None]}
    assert _reconstructions(graph, outputs, X)[0] == plain
    filled = {
        "kept": np.vstack([X[places[:3]], np.full((1, 8), 9, np.float32)])[None],
        "index": np.array([[1, 6, 9, 0]]),
        "count": np.array([3]),
    }
    (zero, _), _ = _reconstructions(graph, filled, X)
    assert zero.error == pytest.approx(1 - (X[places[:3]] ** 2).sum() / (X**2).sum(), rel=1e-6)
    several = {"kept": X[places][None], "index": np.array([[1, 6, 9, -1]])}
    (zero, _), _ = _reconstructions(graph, several, X)
    assert zero.unplaced == 13


def test_groups_that_found_no_room_are_dropped() -> None:
    rows = np.minimum(np.arange(16), 9).astype(np.int32)  # ten groups, and room for four
    graph = bucket(("merged", "tokens"), ("count", "indices"), ("source_map", "indices"))
    outputs = {"merged": X[None, :4], "count": np.array([10]), "source_map": rows[None]}
    (found,), _ = _reconstructions(graph, outputs, X)
    assert found.unplaced == 12
    assert found.error == pytest.approx((X[4:] ** 2).sum() / (X**2).sum(), rel=1e-6)


def test_resamplers_are_read_back_and_what_has_no_error_says_why() -> None:
    graph = bucket(("latents", "tokens"))
    (found,), _ = _reconstructions(graph, {"latents": X[None, :4]}, X)
    assert (found.way, found.error < 1) == ("read-back", True)
    assert _reconstructions(graph, {"latents": X[None, :4, :6]}, X) == (
        (),
        "tokens have width 8 and the compressed ones 6: no error is defined",
    )
    assert (
        "span all 8 dimensions"
        in _reconstructions(bucket(("latents", "tokens"), kept=9), {"latents": X[None, :9]}, X)[1]
    )
    assert (
        _reconstructions(bucket(("logits", "features")), {"logits": X[None, 0]}, X)[1]
        == "it gives no tokens of one image"
    )


# -- the method's own part ----------------------------------------------------------------------------------------


def layer(name: str, us: float) -> Layer:
    return Layer(name, "MatMul", "", "", "", us)


def test_share_of_own_nodes() -> None:
    # the last was made by the runtime: it is not the method's
    layers = [layer("n0", 30.0), layer("n1/Fused/", 10.0), layer("Transpose_token_7", 60.0)]
    names = {"n0": "encoded", "n1": "chosen"}
    assert share_of(layers, names, {"chosen"}) == pytest.approx(0.1)
    assert share_of(layers, names, {"chosen", "encoded"}) == pytest.approx(0.4)
    assert share_of([], names, {"chosen"}) == 0


def test_shares_of_a_graph(tmp_path: Path) -> None:
    """The compressor's product is 64 times the encoder's; its own attention is not the encoder's."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper = onnx.helper
    wide = RANDOM.standard_normal((64, 4096)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "x"], ["s"]),
        helper.make_node("Softmax", ["s"], ["p"]),
        helper.make_node("MatMul", ["p", "a"], ["y"]),
        helper.make_node("Softmax", ["y"], ["q"]),
        helper.make_node("MatMul", ["q", "b"], ["z"]),
    ]
    modules = (*("backbone.blocks.0",) * 3, *("compressor.layer",) * 2)
    for node, module in zip(nodes, modules, strict=True):
        entry = node.metadata_props.add()
        entry.key, entry.value = "edgecomp.module", module
    value = helper.make_tensor_value_info
    made = helper.make_graph(
        nodes,
        "g",
        [value("x", onnx.TensorProto.FLOAT, [1, 64, 64])],
        [value("z", onnx.TensorProto.FLOAT, [1, 64, 4096])],
        [onnx.numpy_helper.from_array(wide[:, :64].copy(), "a"), onnx.numpy_helper.from_array(wide, "b")],
    )
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    shares = node_shares(path, {"x": RANDOM.standard_normal((1, 64, 64)).astype(np.float32)}, threads=1)
    assert 0.5 < shares.own < 1
    assert 0 < shares.attention < 0.5
    assert shares.own + shares.attention < 1, "the encoder's projection is neither"
    with pytest.raises(RunError, match=r"layers of m\.onnx cannot be timed"):
        node_shares(path, {"wrong": np.zeros(1, np.float32)}, threads=1)


# -- names, and what cannot be placed -----------------------------------------------------------------------------


def test_names() -> None:
    assert _names("tome, evit,tome") == ("tome", "evit")
    assert _names("all") == method_names()
    with pytest.raises(UnknownName, match="no method 'tom'; did you mean 'tome'"):
        _names("evit,tom")
    with pytest.raises(InvalidSpec, match="--methods names none"):
        _names(" ,")


def test_methods_that_cannot_be_placed_are_told_each_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def export(name: str, **words: Any) -> Any:
        raise InvalidSpec(f"{name} has no place on {words['backbone']}, budget {words['budget']}")

    monkeypatch.setattr(_methods, "export", export)
    text = "no method can be placed on vit_x with budget 8: tome: tome has no place on vit_x, budget 8; evit: evit has"
    with pytest.raises(InvalidSpec, match=text):
        api.compare_methods("tome,evit", backbone="vit_x", budget=8)


def test_exports_go_where_their_request_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, exported: Path) -> None:
    folders = []

    class Report(msgspec.Struct):
        bundle: Path

    def export(name: str, *, out: Path, force: bool, **words: Any) -> Report:
        assert force
        folders.append(out.relative_to(tmp_path).as_posix())
        return Report(exported)

    monkeypatch.setattr(_methods, "export", export)
    words = {"backbone": "vit/x y", "backbone_weights": "random", "budget": "25%", "batch": 1, "image_size": 0}
    _export("tome", tmp_path, words, with_plain=True)
    _export("tome", tmp_path, words, with_plain=False)
    _export("tome", tmp_path, {**words, "image_size": 64}, with_plain=False)
    assert len(set(folders)) == 3
    assert folders[0] == f"{folders[1]}-plain"
    assert folders[1].startswith("tome-vit_x_y-25_-")
    assert "/" not in folders[1]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("a.onnx", "--methods", "tome"), "a.onnx does not go with --methods, which exports its models itself"),
        (("--methods", "tome", "--base", "x"), "--base x does not go with --methods"),
        (("--methods", "tome", "--force"), "--force does not go with --methods"),
        (("a.onnx", "b.onnx", "--image", "p.jpg"), "--image p.jpg goes with --methods, which is not given"),
        (("--methods", "tome", "--rounds", 0), "rounds 0 is not between"),
        (("--methods", "tome", "--image", "absent.jpg"), "absent.jpg"),
    ],
)
def test_words_that_do_not_go_together(cli: Cli, words: tuple[object, ...], text: str) -> None:
    said = cli("compare", *words)
    assert said.code == 2
    assert text in said.err


# -- the report ---------------------------------------------------------------------------------------------------


def made_row(method: str, us: float, **changes: Any) -> MethodRow:
    samples = tuple(us * (1 + 0.001 * k) for k in range(8))
    base = tuple(1000 * (1 + 0.001 * k) for k in range(8))
    words: dict[str, Any] = {
        "method": method,
        "placement": "inside",
        "preset": "vit",
        "tokens_in": 196,
        "tokens_out": 49,
        "flops": 500_000_000,
        "latency_us": median_interval(samples),
        "samples_us": samples,
        "memory_mib": 88.4,
        "ratio": paired_ratio(samples, base),
    }
    return MethodRow(**{**words, **changes})


def made_report() -> MethodsReport:
    plain = made_row("plain", 1000.0, placement="", tokens_out=196, flops=1_000_000_000, ratio=None, attention_us=120.0)
    error = Reconstruction("unmerge", 0.25, 0.8)
    tome = made_row("tome", 500.0, reconstructions=(error,), overhead_us=50.0, overhead_share=0.1, attention_us=16.0)
    odd = made_row(
        "odd",
        2000.0,
        kept=40,
        memory_mib=None,
        reconstruction_note="no width",
        overhead_note="no profiler",
        notes=("q",),
    )
    return MethodsReport(
        created="2026-11-22T12:00:00Z",
        edgecomp="0.1.0",
        image="p.jpg",
        backbone="vit",
        image_size=224,
        weights="random (seed 0)",
        budget="49",
        batch=1,
        runner="onnxruntime 1.27.0",
        threads=1,
        rounds=8,
        seed=3,
        machine=MACHINE,
        rows=(plain, tome, odd),
        left_out={"evit": "budget 49 cannot be"},
        notes=("weights are random",),
    )


def test_figures_of_a_row() -> None:
    plain, tome, odd = made_report().rows
    assert (tome.keep_ratio, tome.compression, tome.attention_rule) == (0.25, 4.0, 16.0)
    assert tome.speed_up == pytest.approx(2.0)
    assert tome.attention_speed_up(plain) == pytest.approx(7.5)
    assert odd.attention_speed_up(plain) is None
    assert tome.efficiency_score == pytest.approx(3.0)  # the mean of 4 and 2
    assert (plain.speed_up, plain.attention_rule) == (1.0, 1.0)


def test_text_of_a_report() -> None:
    text = describe_methods_report(made_report())
    for part in (
        "2 methods on p.jpg; budget 49, batch 1",
        "vit, 224 pixels, weights random (seed 0)",
        "8 rounds in turn, orders by seed 3",
        "196 -> 49 (40 real)",
        "0.250 unmerge",
        "0.50x",
        "4.00x",
        "16.00x",
        "7.50x",
        "(10.0 %)",
        "0.500x",
        "faster",
        "slower",
        "unknown",
        "odd: no reconstruction error: no width",
        "odd: own part unknown: no profiler",
        "odd: q",
        "evit: left out: budget 49 cannot be",
        "note: weights are random",
        "a mean",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) <= 130


# -- all of it ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_three_methods_and_one_that_has_no_place(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    words = [
        "--methods",
        "tome,attention-pruning,lookupvit,perceiver,fastervlm",
        "--backbone",
        "test_vit",
        "--image-size",
        64,
    ]
    words += ["--budget", 8, "--threads", 1, "--rounds", 6, "--cache", tmp_path / "cache"]
    said = cli("compare", *words, "--json", "--out", tmp_path / "m.json")
    assert said.code == 0, said.err
    found = json.loads(said.out, parse_constant=pytest.fail)
    assert found["kind"] == METHODS_KIND
    rows = {row["method"]: row for row in found["rows"]}
    assert list(rows) == ["plain", "tome", "attention-pruning", "lookupvit", "fastervlm"]
    assert rows["fastervlm"]["notes"] == [
        "it reads the host's layer -2, and its error is to that; the plain model runs to -1"
    ]
    assert "perceiver" in found["left_out"]  # its recipe starts at 16
    assert rows["tome"]["placement"] == "inside"
    assert (
        rows["tome"]["flops"]
        < rows["plain"]["flops"]
        <= rows["attention-pruning"]["flops"]
        < rows["lookupvit"]["flops"]
    )
    ways = {name: [one["way"] for one in row["reconstructions"]] for name, row in rows.items()}
    assert ways == {
        "plain": [],
        "tome": ["unmerge"],
        "attention-pruning": ["zero fill", "nearest fill"],
        "lookupvit": ["read-back"],
        "fastervlm": ["zero fill", "nearest fill"],
    }
    # kept tokens are those of their own layer, unchanged: what is lost is the norm of the others, and nothing else
    assert rows["fastervlm"]["reconstructions"][0]["error"] < 0.9
    assert rows["fastervlm"]["flops"] < rows["plain"]["flops"]
    # the last norm gives every token one length: half of them is half of the norm
    assert rows["attention-pruning"]["reconstructions"][0]["error"] == pytest.approx(0.5, abs=0.02)
    assert 0 < rows["tome"]["reconstructions"][0]["error"] < 1
    for name in ("tome", "attention-pruning", "lookupvit"):
        assert (rows[name]["tokens_in"], rows[name]["tokens_out"]) == (16, 8)
        assert 0 < rows[name]["overhead_share"] < 1
        assert rows[name]["ratio"]["count"] == 6
    assert rows["attention-pruning"]["overhead_share"] < rows["lookupvit"]["overhead_share"]
    assert msgspec.json.decode((tmp_path / "m.json").read_bytes(), type=MethodsReport).rows[1].method == "tome"
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.onnx"))
    assert cli("compare", *words).code == 0  # the exports are taken as they are
    assert sorted(path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.onnx")) == before
