"""Result files: whole or refused, and percentiles that say how far they can be trusted."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import msgspec.inspect
import pytest
from made_result import made_profile, made_result

from edgecomp.errors import EdgecompError, InvalidSpec, RunError
from edgecomp.profiles.latency import percentile, percentiles_of
from edgecomp.profiles.result import Result, read_result, write_result
from edgecomp.profiles.state import Stability
from edgecomp.profiles.statistics import percentile_ranks
from edgecomp.report.profile import describe_profile

Edit = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("count", "percent", "ranks"),
    [
        (1, 50, (None, None)),
        (6, 50, (0, 5)),
        (20, 50, (5, 14)),  # the textbook's sixth and fifteenth of twenty
        (100, 99, (96, None)),
        (1000, 90, (880, 918)),
    ],
)
def test_percentile_ranks(count: int, percent: float, ranks: tuple[int | None, int | None]) -> None:
    assert percentile_ranks(count, percent) == ranks


def test_interval_covers_the_percentile_as_often_as_it_says() -> None:
    chance = random.Random(0)
    true_p90 = -math.log(0.1)
    covered = 0
    for _ in range(400):
        one = percentiles_of([chance.expovariate(1.0) for _ in range(200)])["p90"]
        assert one.low_us is not None
        assert one.high_us is not None
        covered += one.low_us <= true_p90 <= one.high_us
    assert 0.93 <= covered / 400 <= 0.99


def test_percentiles_carry_interval_and_mark() -> None:
    profile = made_profile([float(number) for number in range(1000, 0, -1)])
    p90 = profile.percentiles["p90"]
    assert (p90.us, p90.low_us, p90.high_us, p90.is_indicative) == (900.0, 881.0, 919.0, True)
    assert list(profile.percentiles) == ["p50", "p90", "p95", "p99", "p99.9"]
    assert not profile.percentiles["p50"].is_indicative
    assert profile.p50_us == percentile(profile.samples_us, 50)


def test_result_comes_back_as_it_was_written(tmp_path: Path) -> None:
    result = made_result()
    path = write_result(result, tmp_path / "results")
    assert path.relative_to(tmp_path).as_posix() == "results/cpu/small-onnxruntime-20261122T120000Z.json"
    assert read_result(path) == result
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert write_result(result, tmp_path / "one.json") == tmp_path / "one.json"


def edited(path: Path, edit: Edit) -> Path:
    raw = json.loads(path.read_text())
    edit(raw)
    path.write_text(json.dumps(raw))
    return path


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda raw: raw.update(schema=2), "is of schema 2, and this edgecomp reads 1"),
        (lambda raw: raw.update(kind="other"), "no result of `edgecomp profile`: its kind is 'other'"),
        (lambda raw: raw.pop("kind"), "its kind is 'missing'"),
        (lambda raw: raw.update(profiles=[]), "damaged or was edited: Expected `array` of length >= 1"),
        (lambda raw: raw.update(more=1), "damaged or was edited: Object contains unknown field `more`"),
        (lambda raw: raw["profiles"][0].update(samples_us=[]), "20 samples are said, and 0 are there"),
        (lambda raw: raw["profiles"][0].update(num_samples=21), "21 samples are said, and 20 are there"),
        (lambda raw: raw["profiles"][0].update(mean_us=math.nan), "truncated or no JSON"),
        (lambda raw: raw["profiles"][0].update(mean_us=1.0), "contradicts itself: mean of 1, where its samples give"),
        (lambda raw: raw["profiles"][0]["percentiles"]["p50"].update(us=1.0), "contradicts itself: p50 of 1, where"),
        (lambda raw: raw["profiles"][0]["percentiles"].pop("p99"), "contradicts itself: there is no p99"),
        (lambda raw: raw["profiles"][0].update(throughput_per_s=1e9), "contradicts itself: throughput of 1e+09, where"),
        (lambda raw: raw["profiles"][0].update(batch=0), "damaged or was edited: Expected `int` >= 1"),
        (lambda raw: raw["profiles"][0].update(host_peak_mib=-5.0), "damaged or was edited: Expected `float` >= 0"),
        (lambda raw: raw.update(created="yesterday"), "damaged or was edited: Expected `str` matching regex"),
        (lambda raw: raw["profiles"].append(raw["profiles"][0]), "stands twice, measured in the same way"),
    ],
)
def test_damaged_results_are_refused(tmp_path: Path, edit: Edit, text: str) -> None:
    path = edited(write_result(made_result(), tmp_path / "r.json"), edit)
    with pytest.raises(RunError, match=r"r\.json") as caught:
        read_result(path)
    assert text in str(caught.value)


@pytest.mark.parametrize("size", [0, 1, 100, 2000])
def test_truncated_result(tmp_path: Path, size: int) -> None:
    path = write_result(made_result(), tmp_path / "r.json")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(RunError, match=r"r\.json is truncated or no JSON"):
        read_result(path)


def test_what_is_no_result_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "package.json"
    path.write_text("{}")
    with pytest.raises(InvalidSpec, match=r"package\.json is there and would be lost"):
        write_result(made_result(), path)
    assert path.read_text() == "{}"


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgecompError, match=r"cannot be written: (Not a directory|File exists)"):
        write_result(made_result(), tmp_path / "file" / "r.json")


def test_absent_result(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"absent\.json cannot be read: No such file"):
        read_result(tmp_path / "absent.json")


def test_the_document_of_results_names_every_field() -> None:
    text = (Path(__file__).parents[2] / "docs" / "results.md").read_text(encoding="utf-8")
    pending, seen = [Result], set()
    while pending:
        kind = pending.pop()
        seen.add(kind.__name__)
        missing = [name for name in kind.__struct_fields__ if f"`{name}`" not in text]
        assert missing == [], kind.__name__
        for field in msgspec.inspect.type_info(kind).fields:
            pending += [one for one in structs_in(field.type) if one.__name__ not in seen]
    assert {"Percentile", "LayerTime", "Watch", "JetsonState", "Machine"} <= seen


def structs_in(kind: Any) -> list[Any]:
    if isinstance(kind, msgspec.inspect.StructType):
        return [kind.cls]
    inner = [getattr(kind, name, None) for name in ("item_type", "value_type")]
    return [one for part in (*inner, *getattr(kind, "types", ())) if part is not None for one in structs_in(part)]


def test_a_result_without_a_median_is_refused(tmp_path: Path) -> None:
    raw = msgspec.to_builtins(made_result())
    del raw["profiles"][0]["percentiles"]["p50"]
    (tmp_path / "r.json").write_bytes(msgspec.json.encode(raw))
    with pytest.raises(RunError, match=r"r\.json: model\.m4\.b1\.onnx contradicts itself: there is no p50"):
        read_result(tmp_path / "r.json")


def test_an_unstable_number_carries_its_reason_in_its_own_line() -> None:
    moved = Stability("unstable", ("gpu clock fell from 1980 to 1200 MHz",))
    one = made_profile(stability=moved, is_steady=True)
    steady = made_profile(model="model.m8.b1.onnx", stability=Stability("stable"), is_steady=True)
    result = made_result(one, steady)
    assert result.state == "unstable"
    text = describe_profile(result)
    assert re.search(r"^model\.m4\.b1\.onnx .* unstable: gpu clock fell from 1980 to 1200 MHz$", text, re.MULTILINE)
    assert re.search(r"^model\.m8\.b1\.onnx .* +20$", text, re.MULTILINE)
    assert "device state unstable: gpu clock fell" in text
    assert made_result(steady).state == "stable"
    assert made_result(made_profile(is_steady=True, stability=None)).state == "unknown"


def test_the_loop_of_several_streams_is_told_as_what_it_is() -> None:
    one = made_profile([1000.0] * 20)
    assert re.search(r"costs \d\.\d\d us a run$", describe_profile(made_result(one)), re.MULTILINE)
    many = msgspec.structs.replace(one, mode="offline", streams=3)
    assert "us a run, by one thread alone; how 3 wait for Python's lock" in describe_profile(made_result(many))


def test_memory_of_the_first_graph_alone_is_known() -> None:
    profiles = [made_profile([1000.0] * 20, host_peak_mib=mib) for mib in (90.0, None)]
    text = describe_profile(made_result(*profiles))
    assert "peak host MiB: only of the first graph" in text
    assert "peak host MiB: only" not in describe_profile(made_result(profiles[0]))


def test_energy_of_a_run_is_printed_where_it_is_known() -> None:
    assert "model.m4.b1.onnx: 12.3 mJ a run" in describe_profile(made_result(made_profile(energy_mj=12.345)))
    assert "mJ a run" not in describe_profile(made_result())


def test_results_that_end_in_one_second_stand_beside_each_other(tmp_path: Path) -> None:
    paths = [write_result(made_result(), tmp_path) for _ in range(3)]
    assert len(set(paths)) == 3
    assert [path.stem.removeprefix(paths[0].stem) for path in paths] == ["", "-2", "-3"]
