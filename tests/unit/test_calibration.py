"""`edgecomp target calibrate`: the fit to one's own results, where it is kept, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx", reason="onnx is not installed; pip install 'edgecomp[cpu]' brings it")

import onnx
import onnx.parser
from made_result import made_profile, made_result

from edgecomp import api
from edgecomp.errors import InvalidSpec, RunError
from edgecomp.estimates.applied import applied_for, calibration_path, shipped_for
from edgecomp.estimates.efficiency import Efficiency, modelled_us
from edgecomp.estimates.roofline import load_of, prepare
from edgecomp.export.costs import count_costs
from edgecomp.profiles.result import Subject, write_result
from edgecomp.specs import load_target
from edgecomp.specs.origin import file_sha256

Cli = Callable[..., Any]
TRUE = Efficiency(compute=0.6, compute8=0.3215, bandwidth=0.5, launch_us=4.0, tile=8192.0)
GPU = "TensorRT 10.9.0"
SIZES = (64, 256, 1024, 2048, 4096)


@pytest.fixture(autouse=True)
def _own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGECOMP_CONFIG_DIR", str(tmp_path / "config"))


def model(folder: Path, size: int) -> Path:
    path = folder / f"m{size}.onnx"
    shape = f"float16[1,{size},{size}]"
    body = "t = MatMul (x, x) y = Softmax (t)"
    text = f'<ir_version: 10, opset_import: ["" : 20]> g ({shape} x) => ({shape} y) {{ {body} }}'
    onnx.save(onnx.parser.parse_model(text), path)
    return path


def measured(path: Path, us: float, *, target: str = "t4", **profile: Any) -> Path:
    """Write the result of a model that took so long."""
    described = {"model": path.name, "role": "model", "tokens_in": 0, "tokens_out": 0, "runner": GPU, **profile}
    subject = Subject(name=path.name, digest=file_sha256(path))
    result = made_result(made_profile([us] * 20, **described), target=target, subject=subject)
    return write_result(result, path.with_suffix(".json"))


@pytest.fixture
def truth(tmp_path: Path) -> tuple[list[Path], list[Path]]:
    """Models, and results as a chip with the numbers of `TRUE` would give them."""
    models = [model(tmp_path, size) for size in SIZES]
    results = []
    for path in models:
        target = load_target("t4")
        work = prepare(count_costs(path), precision="", batch=0, plugin=True, target=target)
        results.append(measured(path, float(modelled_us(load_of(work, target)[0], TRUE).sum())))
    return models, results


def test_the_fit_moves_to_what_was_measured(truth: tuple[list[Path], list[Path]]) -> None:
    models, results = truth
    report = api.target_calibrate("t4", results=results, models=models)
    assert report.after is not None
    for row in report.rows:
        assert row.after_us == pytest.approx(row.measured_us, rel=0.1)
        assert abs(row.after_us / row.measured_us - 1) <= abs(row.before_us / row.measured_us - 1) + 1e-6
    assert report.after.launch_us == pytest.approx(TRUE.launch_us, rel=0.2)
    assert report.after.compute8 == pytest.approx(shipped_for("t4").efficiency.compute8, rel=1e-3)  # nothing told of it
    assert (report.error_of, report.forced) == ("left out", False)
    kept = json.loads(calibration_path("t4").read_text(encoding="utf-8"))
    assert kept["target"] == "t4"
    assert str(models[0].parent) not in json.dumps(kept)


def test_later_estimates_compute_with_it_and_say_so(cli: Cli, truth: tuple[list[Path], list[Path]]) -> None:
    models, results = truth
    before = api.estimate(models[0], target="t4")
    words = [word for one in results for word in ("--from", one)] + [
        word for one in models for word in ("--model", one)
    ]
    said = cli("target", "calibrate", "t4", *words)
    assert (said.code, said.err) == (0, "")
    assert "t4: fitted to 5 of your own measurements" in said.out
    assert f"kept in {calibration_path('t4')}" in said.out
    text = cli("estimate", models[0], "--target", "t4").out
    assert "your own calibration of t4 (5 results); left out in turn, they were within a factor of" in text
    after = api.estimate(models[0], target="t4")
    assert after.graphs[0].estimate.mid_us < before.graphs[0].estimate.mid_us
    assert applied_for("a100") == shipped_for("a100")  # of another target
    cleared = cli("target", "calibrate", "t4", "--clear")
    assert cleared.out == "t4: its calibration was removed; estimates compute with the published rows\n"
    assert api.estimate(models[0], target="t4") == before
    assert "it had no calibration" in cli("target", "calibrate", "t4", "--clear").out


def test_one_result_moves_little_else(truth: tuple[list[Path], list[Path]]) -> None:
    models, results = truth
    report = api.target_calibrate("t4", results=results[:1], models=models[:1])
    assert report.error_of == "published"
    assert report.error == shipped_for("t4").error
    assert report.before is not None
    assert report.after is not None
    assert report.after.bandwidth == pytest.approx(report.before.bandwidth, rel=0.01)  # few bytes
    assert report.after.launch_us < 0.6 * report.before.launch_us
    (row,) = report.rows
    assert row.after_us == pytest.approx(row.measured_us, rel=0.1)


def test_results_of_another_device_are_refused_unless_forced(tmp_path: Path) -> None:
    path = model(tmp_path, 64)
    result = measured(path, 500.0, target="cpu")
    with pytest.raises(InvalidSpec, match=r"m64\.json was measured on cpu, and this is t4; .*--force"):
        api.target_calibrate("t4", results=[result], models=[path])
    report = api.target_calibrate("t4", results=[result], models=[path], force=True)
    assert report.forced
    assert "some of another device" in applied_for("t4").source


@pytest.mark.parametrize("runner", ["onnxruntime 1.23.0", "torch 2.9.0"])
def test_a_time_that_is_not_the_gpus_is_refused_unless_forced(tmp_path: Path, runner: str) -> None:
    path = model(tmp_path, 64)
    result = measured(path, 500.0, runner=runner)
    with pytest.raises(InvalidSpec, match=rf"m64\.json: m64\.onnx was run by {runner}, and t4 is .*rtx.*--force"):
        api.target_calibrate("t4", results=[result], models=[path])
    assert not calibration_path("t4").exists()
    assert api.target_calibrate("t4", results=[result], models=[path], force=True).forced
    assert "of no GPU" in applied_for("t4").source
    on_gpu = measured(path, 500.0, runner="onnxruntime-cuda 1.23.0")
    assert not api.target_calibrate("t4", results=[on_gpu], models=[path]).forced


def test_a_runner_says_in_its_version_what_it_ran_on(tmp_path: Path) -> None:
    """By it a calibration tells a time of the GPU from one of the CPU."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; pip install 'edgecomp[cpu]' brings it")
    from edgecomp.runners.onnxruntime import OnnxRuntimeRunner

    path = model(tmp_path, 64)
    for name in ("onnxruntime", "onnxruntime-cuda"):
        words: dict[str, Any] = {"threads": 1, "takes_turns": False, "share_weights": False}
        with OnnxRuntimeRunner(path, name=name, provider="CPUExecutionProvider", **words) as runner:
            assert runner.version.partition(" ")[0] == name


def test_a_measurement_counts_once_and_its_repetitions_tell_no_error(
    cli: Cli, truth: tuple[list[Path], list[Path]]
) -> None:
    models, results = truth
    copies = []
    for number in range(3):  # as a copied file, whose name alone differs
        copies.append(results[0].with_name(f"copy{number}.json"))
        copies[-1].write_bytes(results[0].read_bytes())
    report = api.target_calibrate("t4", results=copies, models=models)
    assert (len(report.rows), report.error_of) == (1, "published")
    assert "copy2.json: m64.onnx is the same measurement as one before it: counted once" in report.notes
    said = cli("estimate", models[0], "--target", "t4").out
    assert "(1 result), too few to tell its error; the band is that of the fit of 49 published rows" in said
    again = [measured(models[0], us).rename(results[0].with_name(f"{us}.json")) for us in (50.0, 50.5, 51.0)]
    report = api.target_calibrate("t4", results=again, models=models)
    assert (len(report.rows), report.error_of) == (3, "published")


def test_no_band_is_narrower_than_a_measurement_is_believed(tmp_path: Path) -> None:
    target, start = load_target("t4"), shipped_for("t4").efficiency
    models = [model(tmp_path, size) for size in SIZES]
    loads = [
        load_of(prepare(count_costs(p), precision="", batch=0, plugin=True, target=target), target)[0] for p in models
    ]
    results = [measured(p, float(modelled_us(load, start).sum())) for p, load in zip(models, loads, strict=True)]
    report = api.target_calibrate("t4", results=results, models=models)  # just as the published fit has them
    assert (report.error_of, report.error) == ("left out", pytest.approx(math.log(1.1)))


def test_the_model_must_be_the_one_that_was_measured(tmp_path: Path) -> None:
    path, other = model(tmp_path, 64), model(tmp_path, 256)
    result = measured(path, 500.0)
    with pytest.raises(InvalidSpec, match=r"(?s)measured m64\.onnx \(digest .*\(given: .*m256\.onnx\)"):
        api.target_calibrate("t4", results=[result], models=[other])
    with pytest.raises(InvalidSpec, match=r"\(given: none\)"):
        api.target_calibrate("t4", results=[result])
    with pytest.raises(RunError, match=r"gone\.onnx is not there"):
        api.target_calibrate("t4", results=[result], models=[tmp_path / "gone.onnx"])


def test_other_modes_and_parts_are_left_out_and_told(tmp_path: Path) -> None:
    path = model(tmp_path, 64)
    result = measured(path, 500.0, role="router")
    with pytest.raises(InvalidSpec, match=r"hold no single-stream latency .* so t4 cannot be fitted"):
        api.target_calibrate("t4", results=[result], models=[path])
    subject = Subject(name=path.name, digest=file_sha256(path))
    profiles = [
        made_profile([us] * 20, model=path.name, role="model", mode=mode, runner=GPU)
        for us, mode in ((500.0, "single-stream"), (9.0, "offline"))
    ]
    both = write_result(made_result(*profiles, target="t4", subject=subject), tmp_path / "both.json")
    report = api.target_calibrate("t4", results=[both], models=[path])
    assert len(report.rows) == 1
    assert "both.json: m64.onnx as model, offline, is left out" in report.notes
    assert "both.json: m64.onnx: warm-up did not settle" in report.notes


def test_a_truncated_result_is_named(tmp_path: Path) -> None:
    path = model(tmp_path, 64)
    result = measured(path, 500.0)
    result.write_bytes(result.read_bytes()[:200])
    with pytest.raises(RunError, match=r"m64\.json is truncated"):
        api.target_calibrate("t4", results=[result], models=[path])
    assert not calibration_path("t4").exists()


def test_words_that_do_not_go_together() -> None:
    with pytest.raises(InvalidSpec, match=r"nothing to fit t4 to; .*--from"):
        api.target_calibrate("t4")
    with pytest.raises(InvalidSpec, match="--clear removes the calibration"):
        api.target_calibrate("t4", results=["a.json"], clear_it=True)


def test_a_damaged_calibration_is_named_with_its_remedy() -> None:
    path = calibration_path("t4")
    path.parent.mkdir(parents=True)
    path.write_text('{"schema": 1, "target": "t4"}', encoding="utf-8")
    with pytest.raises(InvalidSpec, match=r"(?s)t4\.json cannot be read .*edgecomp target calibrate t4 --clear"):
        applied_for("t4")


def test_a_name_that_is_no_file_name() -> None:
    with pytest.raises(InvalidSpec, match=r"target name '\.\./t4' has characters"):
        calibration_path("../t4")
