"""`edgecomp results`: files are listed as what they are, told apart field by field, and held to a baseline."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from made_result import MACHINE, made_profile, made_result

from edgecomp import api
from edgecomp.errors import InvalidSpec, RunError, UnknownName
from edgecomp.profiles.latency import LatencyProfile
from edgecomp.profiles.regression import read_share
from edgecomp.profiles.result import Subject, write_result
from edgecomp.profiles.state import CoreClock, DeviceState, GpuState, Watch
from edgecomp.report.results import describe_check, describe_diff, describe_list

Cli = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]


def timed(mean_us: float, *, samples: int = 200, seed: int = 0, spread: float = 0.02, **changes: Any) -> LatencyProfile:
    chance = random.Random(seed)
    return made_profile([mean_us * (1 + spread * chance.expovariate(1)) for _ in range(samples)], **changes)


@pytest.fixture
def pair(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Write a baseline and a newer result."""

    def write(old: LatencyProfile, new: LatencyProfile, **changes: Any) -> tuple[Path, Path]:
        return (
            write_result(made_result(old), tmp_path / "old.json"),
            write_result(made_result(new, **{"created": "2026-11-23T12:00:00Z", **changes}), tmp_path / "new.json"),
        )

    return write


# -- list and show ----------------------------------------------------------------------------------------------


def test_files_are_listed_as_what_they_are(tmp_path: Path) -> None:
    path = write_result(made_result(timed(1000.0, is_steady=False)), tmp_path)
    api.compare([path, path], out=tmp_path / "cpu" / "side.json")
    (tmp_path / "broken.json").write_bytes(path.read_bytes()[:400])
    (tmp_path / "newer.json").write_text(path.read_text().replace('"schema": 1', '"schema": 7'))
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "table.json").write_text(json.dumps({"title": "merge", "machine": {}, "rows": [{}, {}]}))
    (tmp_path / "read.me").write_text("no JSON")
    rows = {row.path: row for row in api.results_list(tmp_path)}
    found = rows[f"cpu/{path.name}"]
    assert (found.kind, found.what, found.target, found.graphs) == (
        "result",
        "small fp32 in onnxruntime 1.27.0",
        "cpu",
        1,
    )
    assert found.p50_ms == pytest.approx(1.01, rel=0.01)
    assert found.state == "unstable"
    kinds = {name: row.kind for name, row in rows.items()}
    assert kinds == {
        f"cpu/{path.name}": "result",
        "cpu/side.json": "comparison",
        "broken.json": "damaged",
        "newer.json": "damaged",
        "list.json": "other",
        "table.json": "benchmark",
    }
    assert "truncated" in rows["broken.json"].what
    assert "schema 7" in rows["newer.json"].what
    text = describe_list(tuple(rows.values()), str(tmp_path))
    for part in ("merge, 2 rows", "unstable", "damaged", f"base cpu/{path.name}"[:5]):
        assert part in text


def test_what_is_in_the_repository_is_listed_without_an_error(cli: Cli) -> None:
    said = cli("results", "list", ROOT / "profiles" / "results")
    assert said.code == 0
    assert "cpu/tome.json" in said.out
    assert "benchmark" in said.out
    assert "damaged" not in said.out


def test_empty_and_absent_folders(cli: Cli, tmp_path: Path) -> None:
    assert "no JSON files" in cli("results", "list", tmp_path).out
    said = cli("results", "list", tmp_path / "absent")
    assert said.code == 2
    assert "absent is no folder; name the one that" in said.err


def test_show(cli: Cli, tmp_path: Path) -> None:
    path = write_result(made_result(), tmp_path / "r.json")
    said = cli("results", "show", path)
    assert said.code == 0
    assert "model.m4.b1.onnx" in said.out
    assert json.loads(cli("results", "show", path, "--json").out)["kind"] == "edgecomp result"
    path.write_text("{")
    said = cli("results", "show", path)
    assert (said.code, "truncated or no JSON" in said.err) == (2, True)


# -- diff -------------------------------------------------------------------------------------------------------


def test_diff_tells_fields_and_numbers(pair: Callable[..., tuple[Path, Path]]) -> None:
    machine = msgspec.structs.replace(MACHINE, governor="powersave", versions={"numpy": "2.1", "onnx": "1.2"})
    new = timed(1200.0, seed=1, threads=1, precision="fp16", host_peak_mib=110.0)
    report = api.results_diff(*pair(timed(1000.0, host_peak_mib=100.0), new, machine=machine, edgecomp="0.2.0"))
    fields = {one.field: (one.old, one.new) for one in report.fields}
    assert fields == {
        "edgecomp": ("0.1.0", "0.2.0"),
        "machine.governor": ("performance", "powersave"),
        "machine.versions.numpy": ("2.0", "2.1"),
        "machine.versions.onnx": ("none", "1.2"),
        "profiles[model.m4.b1.onnx].precision": ("fp32", "fp16"),
    }
    numbers = {one.metric: one for one in report.numbers}
    assert list(numbers) == ["p50", "p90", "p99", "throughput", "memory"]
    assert numbers["p50"].change == pytest.approx(1.2, rel=0.02)
    assert numbers["throughput"].change == pytest.approx(1.2, rel=0.02)
    assert (numbers["memory"].change, numbers["memory"].ratio) == (pytest.approx(1.1), None)
    ratio = numbers["p50"].ratio
    assert ratio is not None
    assert 1.15 < ratio.low < ratio.value < ratio.high < 1.25
    text = describe_diff(report)
    for part in ("machine.governor", "powersave", "worse", "no interval", "not interleaved"):
        assert part in text


def test_diff_of_equals_and_of_other_graphs(pair: Callable[..., tuple[Path, Path]]) -> None:
    report = api.results_diff(*pair(timed(1000.0), timed(1000.0)))
    assert report.fields == ()
    assert "versions and conditions are the same" in describe_diff(report)
    report = api.results_diff(*pair(timed(1000.0), timed(1000.0, model="model.m9.b1.onnx")))
    assert (report.gone, report.added, report.numbers) == (
        ("model.m4.b1.onnx (batch 1, single-stream, onnxruntime, 1 threads)",),
        ("model.m9.b1.onnx (batch 1, single-stream, onnxruntime, 1 threads)",),
        (),
    )


# -- check ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "spread", "verdict"),
    [
        (1.00, 0.02, "pass"),
        (1.04, 0.02, "pass"),  # slower, and less than is allowed
        (1.20, 0.02, "regression"),
        (0.80, 0.02, "better"),
        (1.15, 2.00, "within noise"),
    ],
)
@pytest.mark.parametrize("metric", ["p50", "throughput"])
def test_verdicts(
    pair: Callable[..., tuple[Path, Path]], factor: float, spread: float, verdict: str, metric: str
) -> None:
    old, new = pair(timed(1000.0, spread=spread), timed(1000.0 * factor, spread=spread, seed=11))
    report = api.results_check(new, baseline=old, metric=metric)
    (row,) = report.rows
    assert row.ratio is not None
    assert (row.change > 1.05) == (verdict in ("regression", "within noise"))
    assert row.verdict == verdict, row
    assert bool(report) is (verdict != "regression")
    assert row.verdict in describe_check(report)


def test_the_limit_is_the_users(pair: Callable[..., tuple[Path, Path]]) -> None:
    old, new = pair(timed(1000.0), timed(1200.0, seed=1))
    assert not api.results_check(new, baseline=old, max_regression="15%")
    assert api.results_check(new, baseline=old, max_regression="25%")
    assert not api.results_check(new, baseline=old, max_regression="0%")


def test_too_few_samples_are_decided_by_the_value(pair: Callable[..., tuple[Path, Path]]) -> None:
    old, new = pair(timed(1000.0, samples=4), timed(1200.0, samples=4))
    report = api.results_check(new, baseline=old)
    assert not report
    assert report.rows[0].why == "4 samples are too few for an interval of p50: the value alone decides"
    assert api.results_check(new, baseline=old, max_regression="30%")
    old, new = pair(timed(1000.0), timed(1200.0))  # 200 samples carry p50, and not p99
    assert (
        "200 samples are too few for an interval of p99"
        in api.results_check(new, baseline=old, metric="p99").rows[0].why
    )
    assert not api.results_check(new, baseline=old, metric="p99")


def test_memory(pair: Callable[..., tuple[Path, Path]]) -> None:
    old, new = pair(timed(1000.0, host_peak_mib=100.0), timed(1000.0, host_peak_mib=104.0))
    assert api.results_check(new, baseline=old, metric="memory")
    report = api.results_check(new, baseline=old, metric="memory", max_regression="3%")
    assert not report
    assert "one number without an interval: the value alone decides" in describe_check(report)
    old, new = pair(timed(1000.0, host_peak_mib=100.0), timed(1000.0))
    with pytest.raises(InvalidSpec, match=r"peak memory is 100\.0 in the baseline and unknown in the result"):
        api.results_check(new, baseline=old, metric="memory")


OTHER = Subject(name="tome", digest="e" * 64, method="tome")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"subject": OTHER}, "different models: method lookupvit and tome"),
        ({"machine": msgspec.structs.replace(MACHINE, cores=2)}, "different machines: cores 4 and 2"),
    ],
)
def test_what_is_not_the_same_is_refused(
    pair: Callable[..., tuple[Path, Path]], changes: dict[str, Any], text: str
) -> None:
    old, new = pair(timed(1000.0), timed(1000.0), **changes)
    with pytest.raises(InvalidSpec, match=f"{text}.*--force checks what is common"):
        api.results_check(new, baseline=old)
    report = api.results_check(new, baseline=old, force=True)
    assert f"note: FORCED: {text}" in describe_check(report)


def test_a_graph_that_is_gone_is_not_passed_in_silence(tmp_path: Path) -> None:
    graphs = [timed(1000.0), timed(500.0, model="plain.onnx", role="plain")]
    old = write_result(made_result(*graphs), tmp_path / "old.json")
    new = write_result(made_result(graphs[0]), tmp_path / "new.json")
    with pytest.raises(InvalidSpec, match=r"plain\.onnx \(batch 1.*\) is in the baseline alone, and was not checked"):
        api.results_check(new, baseline=old)
    assert "plain.onnx (batch 1" in describe_check(api.results_check(new, baseline=old, force=True))
    assert "is new" in describe_check(api.results_check(old, baseline=new))
    elsewhere = write_result(made_result(timed(1.0, threads=2)), tmp_path / "threads.json")
    with pytest.raises(InvalidSpec, match=r"no graph in common: model\.m4\.b1\.onnx .*1 threads.* and .*2 threads"):
        api.results_check(elsewhere, baseline=new)


def test_the_newest_of_the_model_and_machine_is_taken(tmp_path: Path) -> None:
    def put(name: str, created: str, us: float, **changes: Any) -> Path:
        return write_result(made_result(timed(us), created=created, **changes), tmp_path / "all" / name)

    base = put("base.json", "2026-11-25T00:00:00Z", 1000.0)
    with pytest.raises(
        InvalidSpec, match="holds no newer result of small on this machine, measured in the same way, besides"
    ):
        api.results_check(baseline=base, folder=tmp_path / "all")
    put("older.json", "2026-11-23T00:00:00Z", 5000.0)
    with pytest.raises(InvalidSpec, match="holds no newer result"):
        api.results_check(baseline=base, folder=tmp_path / "all")
    put("newer.json", "2026-11-26T00:00:00Z", 5000.0)
    newest = put("newest.json", "2026-11-27T00:00:00Z", 1010.0)
    put("another.json", "2026-11-28T00:00:00Z", 5000.0, subject=OTHER)
    write_result(
        made_result(timed(5000.0, threads=2), created="2026-11-29T00:00:00Z"), tmp_path / "all" / "threads.json"
    )
    (tmp_path / "all" / "broken.json").write_text("{")
    report = api.results_check(baseline=base, folder=tmp_path / "all")
    assert (report.result, bool(report)) == (str(newest), True)


def test_notes_of_a_check(pair: Callable[..., tuple[Path, Path]]) -> None:
    again = Subject(name="small", digest="e" * 64, method="lookupvit", preset="smoke", precision="fp32")
    machine = msgspec.structs.replace(MACHINE, versions={"numpy": "3.0"})
    old, new = pair(timed(1000.0), timed(1000.0, is_steady=False), subject=again, machine=machine)
    text = describe_check(api.results_check(new, baseline=old))
    for part in (
        "versions differ: numpy 2.0 and 3.0",
        "exported again: dddddddddddd and eeeeeeeeeeee",
        "is marked: warm-up",
    ):
        assert part in text


@pytest.mark.parametrize(("text", "share"), [("5%", 0.05), (" 0% ", 0.0), ("2.5%", 0.025)])
def test_shares(text: str, share: float) -> None:
    assert read_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["5", "0.05", "-1%", "x%", "nan%", "%", "5%%", "2000%"])
def test_no_shares(text: str) -> None:
    with pytest.raises(InvalidSpec, match=f"--max-regression {text}: give a share"):
        read_share(text)


def test_check_through_the_command_line(cli: Cli, pair: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    old, new = pair(timed(1000.0), timed(1300.0, seed=1))
    said = cli("results", "check", new, "--baseline", old)
    assert said.code == 1
    assert "verdict: FAIL: 1 of 1 worse (at most 5 % may be lost)" in said.out
    assert cli("results", "check", new, "--baseline", old, "--max-regression", "40%").code == 0
    report = json.loads(cli("results", "check", new, "--baseline", old, "--json").out, parse_constant=pytest.fail)
    assert report["rows"][0]["verdict"] == "regression"
    for words, text in (
        ((new,), "Missing option '--baseline'"),
        ((new, "--baseline", tmp_path / "absent.json"), "cannot be read"),
        ((new, "--baseline", old, "--metric", "p42"), "no metric 'p42'. Known: p50"),
        ((new, "--baseline", old, "--max-regression", "5"), "--max-regression 5: give a share"),
    ):
        said = cli("results", "check", *words)
        assert said.code == 2
        assert text in said.err


def test_bad_files(pair: Callable[..., tuple[Path, Path]]) -> None:
    old, new = pair(timed(1000.0), timed(1000.0))
    new.write_bytes(new.read_bytes()[:999])
    with pytest.raises(RunError, match=r"new\.json is truncated"):
        api.results_check(new, baseline=old)
    with pytest.raises(UnknownName, match="'p95'"):
        api.results_check(new, baseline=old, metric="p95")


def test_clocks_are_told_and_what_is_of_the_moment_is_not(pair: Callable[..., tuple[Path, Path]]) -> None:
    def watched(sm_mhz: float, now_mhz: float) -> LatencyProfile:
        gpu = GpuState(name="gpu", source="nvml", sm_mhz=sm_mhz, temperature_c=now_mhz / 50)
        state = DeviceState("2026-11-22T12:00:00Z", cores=(CoreClock(0, now_mhz, 800, 3000),), gpu=gpu)
        return timed(1000.0, watch=Watch(state, state, 1.0, 100.0))

    report = api.results_diff(*pair(watched(1980, 2400), watched(1410, 2500)))
    path = "profiles[model.m4.b1.onnx].watch"
    assert {one.field: (one.old, one.new) for one in report.fields} == {
        f"{path}.{moment}.gpu.sm_mhz": ("1980.0", "1410.0") for moment in ("before", "after")
    }
