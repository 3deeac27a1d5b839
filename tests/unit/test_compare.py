"""`edgecomp compare`: models side by side, in turns; result files by their raw samples, and what is refused."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from made_result import MACHINE, made_profile, made_result

from edgecomp import api
from edgecomp.errors import EdgecompError, InvalidSpec, RunError, UnknownName
from edgecomp.profiles.comparison import NOT_INTERLEAVED, Comparison
from edgecomp.profiles.result import Subject, write_result
from edgecomp.profiles.state import DeviceState, JetsonState, Watch
from edgecomp.report.compare import describe_comparison

Cli = Callable[..., Any]


@pytest.fixture
def graph(tmp_path: Path) -> Callable[..., Path]:
    """Write an ONNX file: so many products with one matrix behind another, then a shift of its output."""
    onnx = pytest.importorskip("onnx")

    def write(
        name: str, *, products: int = 1, shift: float = 0.0, width: int = 32, batch: object = 1, out: str = "logits"
    ) -> Path:
        helper, numpy_helper = onnx.helper, onnx.numpy_helper
        matrix = np.random.default_rng(0).standard_normal((width, width)).astype(np.float32) / width**0.5
        add = np.linspace(0, shift, width).astype(np.float32)
        nodes = [helper.make_node("MatMul", [f"x{k}", "w"], [f"x{k + 1}"]) for k in range(products)]
        nodes.append(helper.make_node("Add", [f"x{products}", "b"], [out]))
        shape = [batch, width]
        made = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x0", onnx.TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(out, onnx.TensorProto.FLOAT, shape)],
            [numpy_helper.from_array(matrix, "w"), numpy_helper.from_array(add, "b")],
        )
        model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        path = tmp_path / name
        onnx.save(model, path)
        return path

    return write


@pytest.fixture
def result(tmp_path: Path) -> Callable[..., Path]:
    """Write a result whose samples are about so long."""

    def write(name: str, mean_us: float, *, samples: int = 60, seed: int = 0, **changes: Any) -> Path:
        chance = random.Random(seed)
        times = [mean_us * (1 + chance.expovariate(20)) for _ in range(samples)]
        return write_result(made_result(made_profile(times), **changes), tmp_path / name)

    return write


def quick(*models: Path, **words: Any) -> Comparison:
    return api.compare(models, **{"threads": 1, "rounds": 2, **words})


# -- measured here ----------------------------------------------------------------------------------------------


def test_models_are_measured_in_turns(graph: Callable[..., Path]) -> None:
    small, large, same = graph("small.onnx"), graph("large.onnx", products=40, width=256), graph("same.onnx", shift=1.0)
    found = quick(small, same, large, rounds=8)
    first, second, third = found.contestants
    assert [one.name for one in found.contestants] == ["small", "same", "large"]
    assert (found.base, found.rounds, first.ratio, found.settle_s) == ("small", 8, None, 0.0)
    assert third.ratio is not None
    assert (third.ratio.pace, third.ratio.way, third.ratio.count) == ("slower", "paired", 8)
    assert third.ratio.value == pytest.approx(np.median(np.divide(third.samples_us, first.samples_us)))
    assert second.agreement is not None
    assert (second.agreement.output, second.agreement.inputs, second.agreement.not_finite) == ("logits", 2, 0)
    assert second.agreement.top1 is not None
    assert 0 < second.agreement.cosine < 1
    assert third.agreement is None
    assert "it takes other inputs: x0 float32[1, 256]" in third.agreement_note
    assert first.size_bytes == small.stat().st_size
    assert found  # no parity failed
    text = describe_comparison(found)
    for part in (
        "ratios to small",
        "8 rounds in turn",
        "(seed 0)",
        "slower",
        "unknown",
        "a plain ONNX file holds no gold",
    ):
        assert part in text


def test_a_model_beside_itself_agrees(graph: Callable[..., Path]) -> None:
    one = graph("one.onnx")
    found = quick(one, one)
    assert [c.name for c in found.contestants] == [f"{one}#1", f"{one}#2"]
    other = found.contestants[1]
    assert other.agreement is not None
    assert (other.agreement.cosine, other.agreement.top1) == (pytest.approx(1), 1.0)


def test_outputs_that_are_not_finite_are_told(graph: Callable[..., Path]) -> None:
    found = quick(graph("one.onnx"), graph("broken.onnx", shift=np.nan))
    agreement = found.contestants[1].agreement
    assert agreement is not None
    assert (agreement.not_finite, agreement.cosine) == (64, -1)
    assert "64 values of its or the base's outputs are NaN or Inf" in describe_comparison(found)


def test_outputs_of_one_shape_and_other_names_are_compared(graph: Callable[..., Path]) -> None:
    found = quick(graph("one.onnx"), graph("other.onnx", out="classes"))
    assert found.contestants[1].agreement is not None
    assert found.contestants[1].agreement.output == "logits"


def test_base_by_name_and_few_rounds(graph: Callable[..., Path]) -> None:
    one, other = graph("one.onnx"), graph("other.onnx")
    found = quick(one, other, base="other", rounds=3)
    assert [c.name for c in found.contestants] == ["other", "one"]
    assert found.contestants[1].ratio is not None
    assert found.contestants[1].ratio.pace == "too few to tell"
    text = describe_comparison(found)
    assert "3 rounds carry no interval; give --rounds 6 or more" in text
    assert re.search(r"no interval +too few to tell", text)
    with pytest.raises(UnknownName, match=r"'two'.*Known: one, other"):
        quick(one, other, base="two")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda graph: [graph("a.onnx")], r"a\.onnx names 1 models"),
        (lambda graph: [], "nothing names 0 models"),
        (lambda graph: [graph("a.onnx"), "b.pt"], r"b\.pt is no folder, \.onnx file or \.json result"),
        (lambda graph: [graph("a.onnx"), "b.onnx"], r"b\.onnx is not there"),
        (lambda graph: [graph("a.onnx"), graph("b.onnx", batch=4)], r"different sizes \(a 1, b 4\)"),
        (lambda graph: [graph("a.onnx"), graph("b.onnx", batch="n")], r"b\.onnx: input x0 has an open shape \[0, 32\]"),
    ],
)
def test_models_that_cannot_be_compared(graph: Callable[..., Path], make: Callable[..., list[Path]], text: str) -> None:
    with pytest.raises(InvalidSpec, match=text):
        quick(*make(graph))


def test_truncated_onnx(graph: Callable[..., Path]) -> None:
    one, other = graph("one.onnx"), graph("other.onnx")
    other.write_bytes(other.read_bytes()[:900])
    with pytest.raises(RunError, match=r"other\.onnx"):
        quick(one, other)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"rounds": 0}, "rounds 0 is not between 1"),
        ({"duration_s": -1.0}, "duration -1.0 s"),
        ({"duration_s": float("nan")}, "duration nan s"),
        ({"batch": 4}, "a 1, b 1"),
    ],
)
def test_plans_that_cannot_be(graph: Callable[..., Path], words: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidSpec, match=text):
        quick(graph("a.onnx"), graph("b.onnx"), **words)


# -- result files -----------------------------------------------------------------------------------------------


def test_results_of_one_model_are_compared_by_their_samples(result: Callable[..., Path]) -> None:
    found = api.compare([result("old.json", 1000.0), result("new.json", 800.0, seed=1)])
    new = found.contestants[1]
    assert (found.rounds, found.machine, found.forced) == (0, None, ())
    assert new.ratio is not None
    assert (new.ratio.way, new.ratio.pace) == ("unpaired", "faster")
    assert new.ratio.value == pytest.approx(0.8, rel=0.05)
    assert NOT_INTERLEAVED in new.notes
    text = describe_comparison(found)
    assert "faster" in text
    assert f"bootstrapped (95 %); {NOT_INTERLEAVED}" in text
    assert "a result file holds times alone" in text


def test_results_that_are_alike_show_no_difference(result: Callable[..., Path]) -> None:
    found = api.compare([result("a.json", 1000.0), result("b.json", 1000.0, seed=1)])
    assert found.contestants[1].ratio is not None
    assert found.contestants[1].ratio.pace == "no difference"


OTHER_MODEL = Subject(name="tome", digest="e" * 64, method="tome", preset="smoke", precision="fp32")
SAME_AGAIN = Subject(name="again", digest="f" * 64, method="lookupvit", preset="smoke", precision="fp32")
OTHER_MACHINE = msgspec.structs.replace(MACHINE, cpu="another cpu", cores=8)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"subject": OTHER_MODEL}, "a and b: different models: method lookupvit and tome"),
        ({"machine": OTHER_MACHINE}, "a and b: different machines: cpu cpu and another cpu, cores 4 and 8"),
    ],
)
def test_what_differs_is_refused_and_with_force_said(
    result: Callable[..., Path], changes: dict[str, Any], text: str
) -> None:
    paths = [result("a.json", 1000.0), result("b.json", 900.0, **changes)]
    with pytest.raises(InvalidSpec, match=f"{text}.*--force compares them and says so"):
        api.compare(paths)
    found = api.compare(paths, force=True)
    assert found.forced == (text,)
    assert f"FORCED: {text}" in describe_comparison(found)


def test_a_bundle_that_was_exported_again_is_the_same_model(result: Callable[..., Path]) -> None:
    assert api.compare([result("a.json", 1000.0), result("b.json", 900.0, subject=SAME_AGAIN)]).forced == ()


def test_other_conditions_are_refused(tmp_path: Path, result: Callable[..., Path]) -> None:
    offline = made_profile([900.0] * 20, mode="offline", streams=4)
    path = write_result(made_result(offline), tmp_path / "b.json")
    text = "different conditions: mode single-stream and offline, streams 1 and 4"
    with pytest.raises(InvalidSpec, match=text):
        api.compare([result("a.json", 1000.0), path])


def test_versions_that_differ_and_unstable_results_are_told(tmp_path: Path, result: Callable[..., Path]) -> None:
    shaky = made_profile([900.0] * 20, is_steady=False)
    machine = msgspec.structs.replace(MACHINE, versions={"numpy": "2.1"})
    path = write_result(made_result(shaky, machine=machine), tmp_path / "b.json")
    text = describe_comparison(api.compare([result("a.json", 1000.0), path]))
    assert "b: versions differ: numpy 2.0 and 2.1" in text
    assert "b: its own file marks it: warm-up did not settle" in text


def test_several_models_of_one_result(tmp_path: Path) -> None:
    profiles = [
        made_profile([us] * 20, model=f"model.m{kept}.b1.onnx", tokens_out=kept)
        for kept, us in ((4, 500.0), (9, 900.0))
    ]
    profiles.append(made_profile([50.0] * 20, model="router.onnx", role="router"))
    path = write_result(made_result(*profiles), tmp_path / "r.json")
    found = api.compare([path])
    assert [one.name for one in found.contestants] == ["r:model.m4.b1", "r:model.m9.b1"]
    with pytest.raises(InvalidSpec, match=r"holds no model with budget 5 and batch None; it holds model\.m4\.b1\.onnx"):
        api.compare([path], budget=5)
    with pytest.raises(InvalidSpec, match=r"--budget 25%: .*r\.json holds counts"):
        api.compare([path], budget="25%")


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda text: text[:300], "is truncated or no JSON"),
        (lambda text: text.replace('"schema": 1', '"schema": 9'), "is of schema 9, and this edgecomp reads 1"),
        (lambda text: text.replace("edgecomp result", "else"), "its kind is 'else'"),
        (lambda text: text.replace('"mean_us": ', '"mean_us": NaN, "x": '), "truncated or no JSON"),
    ],
)
def test_bad_results(result: Callable[..., Path], edit: Callable[[str], str], text: str) -> None:
    good, bad = result("a.json", 1000.0), result("b.json", 1000.0)
    bad.write_text(edit(bad.read_text()))
    with pytest.raises(RunError, match=text):
        api.compare([good, bad])


def test_samples_that_are_no_times(tmp_path: Path, result: Callable[..., Path]) -> None:
    path = write_result(made_result(made_profile([0.0] * 20)), tmp_path / "zero.json")
    with pytest.raises(InvalidSpec, match=r"20 of 80 samples are no times: 0\.0"):
        api.compare([result("a.json", 1000.0), path])


def test_a_result_beside_what_runs_here(graph: Callable[..., Path], result: Callable[..., Path]) -> None:
    words = [result("a.json", 1000.0), graph("small.onnx")]
    with pytest.raises(InvalidSpec, match=r"different models: method lookupvit and none.*different machines"):
        quick(*words)
    found = quick(*words, force=True)
    assert len(found.forced) == 2
    assert found.contestants[1].ratio is not None
    assert found.contestants[1].ratio.way == "unpaired"
    assert NOT_INTERLEAVED in found.contestants[1].notes


# -- the file that is written -----------------------------------------------------------------------------------


def test_comparison_is_written_and_never_over_something_else(tmp_path: Path, result: Callable[..., Path]) -> None:
    words = [result("a.json", 1000.0), result("b.json", 900.0)]
    out = tmp_path / "c.json"
    found = api.compare(words, out=out)
    assert msgspec.json.decode(out.read_bytes(), type=Comparison) == found
    api.compare(words, out=out)  # its own kind may be replaced
    with pytest.raises(InvalidSpec, match=r"a\.json is there and is no edgecomp comparison"):
        api.compare(words, out=words[0])
    with pytest.raises(InvalidSpec, match=r"--out c must end in \.json"):
        api.compare(words, out="c")
    with pytest.raises(EdgecompError, match="cannot be written"):
        api.compare(words, out=out / "c.json")  # below a file
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json", "c.json"]


# -- the command line, and a bundle -----------------------------------------------------------------------------


@pytest.fixture
def failing(bundle: Path) -> Path:
    """A bundle whose golden is not what its graph gives."""
    from safetensors.numpy import load_file, save_file

    from edgecomp.bundle import GOLDEN, open_bundle, seal

    manifest = open_bundle(bundle).manifest
    goldens = load_file(bundle / GOLDEN)
    goldens["output.photo.m9.compressed"][0, 4, 17] += 0.5
    save_file(goldens, bundle / GOLDEN)
    seal(bundle, manifest, {entry.name: entry.role for entry in manifest.files})
    return bundle


def test_bundles_through_the_command_line(cli: Cli, exported: Path, tmp_path: Path) -> None:
    said = cli("compare", exported, "--rounds", 6, "--threads", 1, "--json", "--out", tmp_path / "c.json")
    assert (said.code, said.err) == (0, "")
    found = json.loads(said.out, parse_constant=pytest.fail)
    small, large = found["contestants"]
    assert [small["name"], large["name"]] == ["bundle.m4", "bundle.m9"]
    assert small["parity"].startswith("pass (max rel")
    assert found["command"] == ["edgecomp", "compare", "bundle", "--threads=1", "--rounds=6"]
    assert (small["tokens_in"], small["tokens_out"], large["tokens_out"]) == (16, 4, 9)
    assert 0 < small["flops"] < large["flops"]
    assert large["ratio"]["way"] == "paired"
    assert "different shapes: compressed[1, 4, 32] and compressed[1, 9, 32]" in large["agreement_note"]
    # the graph alone, and the weights that it reads: the shared file holds no more than these
    model, weights = exported / "model.m4.b1.onnx", exported / "weights.data"
    assert model.stat().st_size < small["size_bytes"] <= model.stat().st_size + weights.stat().st_size
    assert msgspec.json.decode((tmp_path / "c.json").read_bytes(), type=Comparison).base == "bundle.m4"


def test_a_graph_in_a_bundle_is_that_bundles(cli: Cli, exported: Path) -> None:
    graph = exported / "model.m9.b1.onnx"
    said = cli("compare", graph, exported, "--budget", 9, "--rounds", 6, "--threads", 1)
    assert said.code == 0, said.err
    assert "bundle/model.m9.b1" in said.out
    assert "cosine 1.0000" in said.out
    assert said.out.count(" pass") == 2


def test_a_result_of_another_batch_is_refused_beside_what_runs_here(exported: Path, tmp_path: Path) -> None:
    result = api.profile(exported, budget=9, batch=1, threads=1, duration_s=0.05, stages=False)
    (profile,) = result.profiles
    alike = write_result(result, tmp_path / "alike.json")
    found = quick(exported, alike, budget=9)
    assert found.forced == ()
    two = msgspec.structs.replace(profile, batch=2, throughput_per_s=2 * profile.throughput_per_s)
    other = write_result(msgspec.structs.replace(result, profiles=(two,)), tmp_path / "two.json")
    with pytest.raises(InvalidSpec, match="different conditions: batch 1 and 2"):
        quick(exported, other, budget=9)


def test_another_number_of_threads_is_said(result: Callable[..., Path], tmp_path: Path) -> None:
    one = result("one.json", 1000.0)
    raw = json.loads(one.read_text())
    raw["profiles"][0].update(threads=4, runner="tensorrt 10.3")
    (tmp_path / "four.json").write_text(json.dumps(raw))
    other = api.compare([one, tmp_path / "four.json"]).contestants[1]
    assert "it ran in tensorrt 10.3, 4 threads, and one in onnxruntime 1.27.0, 1 thread" in other.notes


def test_another_power_mode_is_refused(result: Callable[..., Path], tmp_path: Path) -> None:
    paths = []
    for mode, clocks in (("MAXN_SUPER", "on"), ("7W", "off")):
        state = DeviceState(
            time_utc="2026-11-22T12:00:00.000Z", jetson=JetsonState(power_mode=mode, jetson_clocks=clocks)
        )
        watch = Watch(before=state, after=state, duration_s=1.0, interval_ms=100)
        profile = msgspec.structs.replace(made_profile([1000.0] * 30), watch=watch)
        paths.append(write_result(made_result(profile), tmp_path / f"{mode}.json"))
    text = "different settings of the device: power mode MAXN_SUPER and 7W, jetson_clocks on and off"
    with pytest.raises(InvalidSpec, match=text):
        api.compare(paths)
    with pytest.raises(InvalidSpec, match="different settings of the device: power mode MAXN_SUPER and 7W"):
        api.results_check(paths[1], baseline=paths[0])
    assert text in api.compare(paths, force=True).forced[0]


def test_parity_that_fails_is_exit_1(cli: Cli, failing: Path) -> None:
    said = cli("compare", failing, "--rounds", 1, "--threads", 1)
    assert said.code == 1
    assert "bundle.m9: parity FAIL: photo, compressed: max rel error" in said.out


def test_no_models_is_exit_2(cli: Cli) -> None:
    said = cli("compare")
    assert said.code == 2
    assert "nothing names 0 models; give two at least" in said.err
