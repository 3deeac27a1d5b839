"""Reports: the files they take, what their tables say, hostile names that stay text, and files that are kept."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest
from made_result import MACHINE, made_profile, made_result
from report_cases import calibration, comparison, estimate, evaluation, inside_result, many_kinds, samples, search

from edgecomp import api
from edgecomp.errors import EdgecompError, InvalidSpec, MissingDependency, RunError
from edgecomp.estimates.geometry import Geometry, transformer_costs
from edgecomp.estimates.go_no_go import go_no_go
from edgecomp.estimates.peaks import Rate
from edgecomp.evaluation.reconstruction import Reconstruction
from edgecomp.profiles.ratios import Ratio
from edgecomp.profiles.result import BlockTime, Result, Subject, write_result
from edgecomp.profiles.state import DeviceState, GpuState, Stability, Watch
from edgecomp.profiles.statistics import Estimate
from edgecomp.report.methods import MethodRow, MethodsReport
from edgecomp.report.page.accuracy import mark_front
from edgecomp.report.page.colours import DARK, LIGHT, contrast
from edgecomp.report.page.frame import nice_ticks
from edgecomp.report.page.groups import group_results
from edgecomp.report.page.numbers import figure
from edgecomp.report.page.sources import Source
from edgecomp.report.page.values import Cell, Page, Point, Section, Table
from edgecomp.report.page.words import csv_cell, markdown, shown
from edgecomp.specs import load_target

Cli = Callable[..., Any]
HOSTILE = "<script>alert(1)</script>\"'|`=1+1\n\u202egnp.exe](http://x.example)"


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every kind of document; not to be written to."""
    return many_kinds(tmp_path_factory.mktemp("kinds") / "r")


def written(folder: Path, *results: Result) -> Path:
    folder.mkdir(exist_ok=True)
    for place, result in enumerate(results):
        write_result(result, folder / f"r{place}.json")
    return folder


def section(page: Page, title: str) -> Section:
    parts = [*page.sections, *(part for one in page.sections for part in one.parts)]
    (found,) = (one for one in parts if one.title.startswith(title))
    return found


def rows(table: Table) -> dict[str, dict[str, Cell]]:
    names = [column.name for column in table.columns]
    return {row[0].text: dict(zip(names, row, strict=True)) for row in table.rows}


# -- what is read ---------------------------------------------------------------------------------------------


def test_a_folder_stands_for_the_results_below_it_and_says_what_it_leaves_out(tmp_path: Path, cli: Cli) -> None:
    folder = many_kinds(tmp_path / "r")
    (folder / "sub").mkdir()
    write_result(made_result(), folder / "sub" / "deep.json")
    (folder / "record.json").write_text('{"sha256": "0"}')
    (folder / ".hidden.json").write_text("{")
    outcome = api.report([folder, folder / "tome.json"])
    assert outcome.files.count("tome.json") == 1
    assert "sub/deep.json" in outcome.files
    assert outcome.left_out == ("record.json",)
    assert "Left out, being no results: record.json." in outcome.page.lead
    said = cli("report", folder)
    assert said.code == 0
    assert said.err == "note: record.json is no result and was left out\n"
    assert "tome.json" in said.out


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    first, plain = inside_result(), inside_result().layers
    slower = [msgspec.structs.replace(layer, us=3 * layer.us) for layer in plain]
    for name, layers in (("a", plain), ("b", slower)):
        write_result(inside_result(layers=tuple(layers)), tmp_path / name / "x" / "r.json")
    paths = [tmp_path / name / "x" / "r.json" for name in ("a", "b")]
    outcome = api.report(paths)
    assert outcome.files == ("a/x/r.json", "b/x/r.json")
    assert str(tmp_path) not in repr(outcome.page)
    assert "Made of 2 files: a/x/r.json, b/x/r.json." in outcome.page.lead
    blocks = section(outcome.page, "Encoder blocks").tables
    assert [table.caption for table in blocks] == [
        f"Time of each encoder block ({name}/x/r.json, batch 1)" for name in ("a", "b")
    ]
    one, other = ([cell.value for cell in table.rows[0][1:]] for table in blocks)
    assert other == pytest.approx([3 * (value or 0) for value in one])
    held = section(outcome.page, "Memory").tables[-1]
    assert {row[1].text for row in held.rows} == {"a/x/r.json", "b/x/r.json"}
    assert len(held.rows) == 2 * len(first.memory)
    assert api.report([paths[0], tmp_path / "b"]).files == ("r.json", "x/r.json")  # as short as tells them apart


BAD = {
    "truncated": ('{"kind": "edgecomp result", "sch', "is truncated or no JSON"),
    "empty": ("", "is truncated or no JSON"),
    "newer": ('{"kind": "edgecomp result", "schema": 99}', "is of schema 99"),
    "newer search": ('{"kind": "edgecomp search", "schema": 77}', "is of schema 77"),
    "another kind": ('{"kind": "edgecomp riddle", "schema": 1}', "edgecomp riddle"),
    "not ours": ('{"title": "x"}', "nothing that a report is made of"),
    "a list": ("[1, 2]", "nothing that a report is made of"),
    "NaN": ('{"kind": NaN}', "is truncated or no JSON"),
    "no candidate": (msgspec.json.encode(search(rows=(), winner="")).decode(), "holds no candidate"),
    "evaluation cut": ('{"kind": "edgecomp evaluation", "schema": 1}', "evaluation"),
    "newer estimate": ('{"kind": "edgecomp estimate", "schema": 2}', "is of schema 2, and this edgecomp reads 1"),
    "newer evaluation": ('{"kind": "edgecomp evaluation", "schema": 2}', "is of schema 2, and this edgecomp reads 1"),
    "newer calibration": ('{"kind": "edgecomp calibration", "schema": 2}', "is of schema 2, and this edgecomp reads 1"),
    "deep": ("[" * 100_000, "nothing that a report is made of"),
    "deeper": ('{"x": ' * 100_000, "is truncated or no JSON"),
    "no text": (b"\xff\xfe\x00\x01", "is truncated or no JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_one_bad_file_among_many_stops_the_report_and_is_named(name: str, tmp_path: Path, cli: Cli) -> None:
    good = written(tmp_path / "good", made_result()) / "r0.json"
    content, reason = BAD[name]
    bad = tmp_path / "bad file.json"
    bad.write_bytes(content if isinstance(content, bytes) else content.encode())
    said = cli("report", good, bad, "--csv", tmp_path / "out.csv")
    assert said.code == 2
    assert str(bad) in said.err
    assert reason in said.err
    assert not (tmp_path / "out.csv").exists()


def edited(tmp_path: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    file = written(tmp_path / "e", made_result()) / "r0.json"
    raw = json.loads(file.read_text())
    edit(raw)
    file.write_text(json.dumps(raw))
    return file


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda raw: raw["profiles"][0].update(samples_us=[], num_samples=0), "0 samples are said, and 0 are there"),
        (lambda raw: raw["profiles"][0]["samples_us"].pop(), "20 samples are said, and 19 are there"),
        (
            lambda raw: raw["profiles"][0]["percentiles"].pop("p50"),
            "model.m4.b1.onnx contradicts itself: there is no p50",
        ),
        (lambda raw: raw["profiles"][0]["samples_us"].__setitem__(3, -1.5), "a sample of -1.5 us"),
        (lambda raw: raw["profiles"][0]["samples_us"].__setitem__(3, 1e300), "a sample of 1e+300 us"),
    ],
)
def test_figures_that_cannot_be_are_refused(
    edit: Callable[[dict[str, Any]], object], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=re.escape(reason)):
        api.report([edited(tmp_path, edit)])


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no result was named"):
        api.report([])
    with pytest.raises(RunError, match=r"holds 0 JSON files and no result"):
        api.report([tmp_path])
    with pytest.raises(RunError, match=r"absent\.json cannot be read: No such file"):
        api.report([tmp_path / "absent.json"])


# -- groups and ratios ----------------------------------------------------------------------------------------


def test_what_differs_in_machine_model_or_mode_stands_in_groups_of_its_own() -> None:
    other = msgspec.structs.replace(MACHINE, cpu="other")
    streams = made_profile(mode="multi-stream", streams=4)
    subject = Subject("b", "d" * 64, "tome", "inside", "vit_base", "fp32", "", 224)
    results = [
        made_result(),
        made_result(made_profile(), streams),
        made_result(machine=other),
        made_result(subject=subject),
    ]
    groups = group_results(Source(f"{place}.json", one) for place, one in enumerate(results))
    assert sorted(len(group.entries) for group in groups) == [1, 1, 1, 2]
    assert [group.title for group in groups] == sorted(group.title for group in groups)
    assert any("multi-stream with 4 streams" in group.title for group in groups)


@pytest.mark.parametrize("change", ["threads", "runner", "governor", "cuda_graph"])
def test_each_of_these_parts_groups(change: str) -> None:
    one = made_result()
    other = made_result(machine=msgspec.structs.replace(MACHINE, governor="powersave"))
    if change != "governor":
        value = {"threads": 2, "runner": "tensorrt 10.9", "cuda_graph": True}[change]
        other = made_result(msgspec.structs.replace(made_profile(), **{change: value}))
    assert len(group_results([Source("a", one), Source("b", other)])) == 2


def test_ratio_is_of_one_run_and_batch_alone(tmp_path: Path) -> None:
    plain = made_profile([1000.0] * 20, model="plain.b1.onnx", role="plain", is_steady=True)
    half = made_profile([500.0] * 20, model="model.m4.b1.onnx", is_steady=True)
    batch = made_profile([500.0] * 20, model="model.m4.b8.onnx", is_steady=True)
    batch = msgspec.structs.replace(batch, batch=8, throughput_per_s=16_000.0)
    alone = made_profile([100.0] * 20, is_steady=True)
    folder = written(tmp_path / "r", made_result(plain, half, batch), made_result(alone))
    page = api.report([folder]).page
    table = section(page, "Latency").tables[0]
    over = [(row[0].text, row[1].text, row[5].text) for row in table.rows]
    assert over == [
        ("plain, batch 1", "r0.json", "1"),
        ("4 of 16 kept, batch 1 (r0.json)", "r0.json", "0.500"),
        ("4 of 16 kept, batch 1 (r1.json)", "r1.json", "\u2013"),
        ("4 of 16 kept, batch 8", "r0.json", "\u2013"),
    ]
    assert any("takes 0.500 of the plain model's time" in line for line in page.lead)


def test_no_difference_and_a_plain_model_that_wins_are_said(tmp_path: Path) -> None:
    plain = made_profile(samples(1000, seed=1), role="plain", model="plain.onnx", is_steady=True)
    same = made_profile(samples(1000, seed=2), is_steady=True)
    slow = made_profile(samples(1500, seed=3), is_steady=True)
    for bucket, words in (
        (same, "no difference from the plain model can be told"),
        (slow, "the plain model is the fastest"),
    ):
        page = api.report([written(tmp_path / words[:2], made_result(plain, bucket))]).page
        assert any(words in line for line in page.lead), page.lead


def test_marks_stand_in_the_cell(tmp_path: Path) -> None:
    result = inside_result(shaky="model.m98.b1.onnx")
    table = rows(section(api.report([written(tmp_path / "r", result)]).page, "Latency").tables[0])
    shaky, steady = table["98 of 196 kept"], table["49 of 196 kept"]
    assert shaky["p99, ms"].marks == ("indicative", "unstable")
    assert steady["p99, ms"].marks == ("indicative",)
    assert steady["p50, ms"].marks == ()
    for name in ("p50, ms", "Mean, ms", "Items/s", "Time over plain"):
        assert shaky[name].marks == ("unstable",), name
    unstable_plain = inside_result(shaky="plain.b1.onnx")
    table = rows(section(api.report([written(tmp_path / "s", unstable_plain)]).page, "Latency").tables[0])
    assert table["49 of 196 kept"]["Time over plain"].marks == ("plain unstable",)


def test_labels_tell_all_graphs_apart() -> None:
    twin = made_result()
    (group,) = group_results([Source("a.json", twin), Source("b.json", twin), Source("b.json", twin)])
    labels = [entry.label for entry in group.entries]
    assert len(set(labels)) == 3


# -- sections -------------------------------------------------------------------------------------------------


def test_every_kind_of_data_has_its_section(kinds: Path) -> None:
    page = api.report([kinds]).page
    assert page.absent == ()
    kinds = {type(plot).__name__ for plot in page.plots}
    assert kinds == {"EcdfPlot", "HistogramPlot", "BarsPlot", "PointsPlot", "RooflinePlot"}
    assert len({plot.slug for plot in page.plots}) == len(page.plots)
    assert all(plot.alt and plot.title for plot in page.plots)
    first = page.sections[0]
    assert [part.title for part in first.parts] == [
        "Latency",
        "Stages",
        "Encoder blocks",
        "Layers",
        "Routing",
        "Memory",
    ]
    titles = [one.title.partition(":")[0] for one in page.sections[2:]]
    kinds_of = [
        "Comparison",
        "Search",
        "Accuracy and agreement",
        "Buckets that the router picks",
        "Estimate",
        "Conditions",
    ]
    assert titles == kinds_of


def test_what_is_absent_is_said_with_the_way_to_get_it(tmp_path: Path) -> None:
    page = api.report([written(tmp_path / "r", made_result())]).page
    assert [part.title for part in page.sections[0].parts] == ["Latency"]
    said = "\n".join(page.absent)
    for words in ("No stages", "No time by block", "No memory", "No Pareto front", "No histogram of buckets"):
        assert words in said
    assert "edgecomp evaluate BUNDLE" in said
    only = tmp_path / "only.json"
    only.write_bytes(msgspec.json.encode(evaluation()))
    assert any(line.startswith("No latency") for line in api.report([only]).page.absent)


def test_blocks_stand_beside_the_plain_models(tmp_path: Path) -> None:
    page = api.report([written(tmp_path / "r", inside_result())]).page
    blocks = section(page, "Encoder blocks")
    assert blocks.lines == ()
    assert [column.name for column in blocks.tables[0].columns] == [
        "Block",
        "plain, ms",
        "98 of 196 kept, ms",
        "49 of 196 kept, ms",
    ]
    assert [row[0].text for row in blocks.tables[0].rows] == [f"blocks.{place}" for place in range(12)]
    assert any("the fastest is 49 of 196 kept: it takes 0.499 of" in line for line in page.lead)
    without = [layer for layer in inside_result().layers if not layer.model.startswith("plain")]
    page = api.report([written(tmp_path / "s", inside_result(layers=tuple(without)))]).page
    assert "export with --with-plain" in section(page, "Encoder blocks").lines[0]


def test_front_holds_what_nothing_beats() -> None:
    given = [(1.0, 0.9), (2.0, 0.95), (2.0, 0.9), (3.0, 0.94), (3.0, 0.99), (1.0, 0.9)]
    marked = mark_front([Point(str(place), "method", x, y) for place, (x, y) in enumerate(given)])
    assert [point.is_front for point in marked] == [True, True, False, False, True, True]


def test_evaluations_of_several_bundles_are_held_to_their_own_plain_model(tmp_path: Path) -> None:
    for place, name in enumerate(("tome-vit", "evit-vit")):
        (tmp_path / f"{place}.json").write_bytes(msgspec.json.encode(evaluation(name)))
    (one,) = (s for s in api.report([tmp_path]).page.sections if s.title.startswith("Accuracy"))
    (plot,) = one.plots
    assert plot.x_axis == "time over the plain model's"
    assert sorted((p.label, p.x) for p in plot.points) == [
        ("evit-vit: 25 kept", 1.0),
        ("evit-vit: 9 kept", 0.6),
        ("plain", 1.0),
        ("tome-vit: 25 kept", 1.0),
        ("tome-vit: 9 kept", 0.6),
    ]
    cells = rows(one.tables[0])["tome-vit: 25 kept"]
    assert cells["Time over plain"].marks == ("no difference",)
    assert cells["Agreement, %"].text == "99.00"


def test_evaluations_on_other_images_are_not_mixed(tmp_path: Path) -> None:
    for place, data in enumerate(("one", "another")):
        (tmp_path / f"{place}.json").write_bytes(msgspec.json.encode(evaluation(data=data)))
    titles = [s.title for s in api.report([tmp_path]).page.sections]
    assert titles[:2] == ["Accuracy and agreement: one", "Accuracy and agreement: another"]


def test_search_shows_winner_limit_and_why(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_bytes(msgspec.json.encode(search()))
    one = section(api.report([tmp_path]).page, "Search")
    assert "Asked for: p50 at most 35 ms." in one.lines
    table = rows(one.tables[0])
    assert table["tome m49 fp32"]["Candidate"].marks == ("winner",)
    assert table["tome m24 fp32"]["Why"].text == "fewer tokens than m49, which misses"
    assert table["random m98 fp32"]["Why"].text == "beaten by tome m98 fp32"
    (plot,) = one.plots
    assert plot.limit == 35.0
    assert [p.label for p in plot.points if p.is_front] == ["plain fp32", "tome m98 fp32", "tome m49 fp32"]


def test_bucket_histogram(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_bytes(msgspec.json.encode(calibration()))
    one = section(api.report([tmp_path]).page, "Buckets")
    (plot,) = one.plots
    assert plot.categories == ("49", "98")
    assert [bar.value for bar in plot.series[1][2] if bar] == [160.0, 96.0]


# -- forms ----------------------------------------------------------------------------------------------------


def test_text_markdown_and_csv_need_no_package(tmp_path: Path, kinds: Path) -> None:
    folder = kinds
    script = (
        "import sys\n"
        "for name in ('matplotlib', 'jinja2', 'torch', 'onnx'): sys.modules[name] = None\n"
        "from edgecomp.cli import main\nmain()"
    )
    run = [sys.executable, "-c", script, "report", str(folder)]
    plain = [*run, "--markdown", str(tmp_path / "o.md"), "--csv", str(tmp_path / "o.csv")]
    done = subprocess.run(plain, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "o.md").stat().st_size > 1000
    done = subprocess.run([*run, "--html", str(tmp_path / "x")], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "an HTML report needs the package 'matplotlib'" in done.stderr
    assert "pip install 'edgecomp[report]'" in done.stderr
    assert not (tmp_path / "x").exists()


def test_matplotlib_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = written(tmp_path / "r", made_result())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependency, match=r"--plot needs the package 'matplotlib'.*edgecomp\[report\]"):
        api.report([folder], plot=tmp_path / "x")


def test_jinja2_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; pip install -e '.[dev]' brings it")
    folder = written(tmp_path / "r", made_result())
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingDependency, match=r"an HTML report needs the package 'jinja2'.*edgecomp\[report\]"):
        api.report([folder], html=tmp_path / "x.html")


def test_text_says_everything_the_tables_hold(tmp_path: Path, cli: Cli) -> None:
    said = cli("report", written(tmp_path / "r", inside_result(shaky="model.m98.b1.onnx")))
    assert said.code == 0
    assert re.search(r"98 of 196 kept \(model\.m98\.b1\.onnx\) +42\.\d+ unstable \(4\d\.\d+ to 4\d\.\d+\)", said.out)
    assert re.search(r"~ unstable \(from ", said.out)
    assert "warm-up did not settle" in said.out
    assert "governor performance" in said.out


def test_csv_has_a_row_for_each_graph(tmp_path: Path, kinds: Path) -> None:
    api.report([kinds], csv=tmp_path / "o.csv")
    read = list(csv.DictReader(io.StringIO((tmp_path / "o.csv").read_text())))
    assert [row["edgecomp_row"] for row in read] == ["profile"] * 12 + ["evaluate"] * 3
    shaky = next(row for row in read if row["file"] == "evit.json" and row["tokens_kept"] == "98")
    assert shaky["stability"] == "unstable: warm-up did not settle"
    assert shaky["p99_mark"] == "indicative; unstable"
    assert float(shaky["p50_low_ms"]) < float(shaky["p50_ms"]) < float(shaky["p50_high_ms"])
    assert 0.6 < float(shaky["time_over_plain"]) < 0.8
    assert read[-1]["agreement_percent"] == "93"
    assert {row["group"] for row in read[:12]} == {"1", "2"}


def test_markdown_is_tables_that_every_reader_takes(tmp_path: Path, kinds: Path) -> None:
    api.report([kinds], markdown=tmp_path / "o.md")
    lines = (tmp_path / "o.md").read_text().splitlines()
    assert lines[:2] == ["<!-- edgecomp report -->", "# edgecomp report"]
    for place, line in enumerate(lines):
        if re.fullmatch(r"\|(-+:?\|)+", line):
            width = len(re.findall(r"(?<!\\)\|", line))
            after = place + 1
            while after < len(lines) and lines[after].startswith("|"):
                assert len(re.findall(r"(?<!\\)\|", lines[after])) == width, lines[after]
                after += 1
            assert after > place + 1


def test_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; pip install -e '.[dev]' brings it")
    folder = written(tmp_path / "r", made_result(), made_result(made_profile(samples(900))))
    (folder / "s.json").write_bytes(msgspec.json.encode(search()))
    pages = []
    for place in range(2):
        here = tmp_path / str(place)
        api.report([folder], html=here / "p.html", markdown=here / "p.md", csv=here / "p.csv")
        pages.append([(here / name).read_bytes() for name in ("p.html", "p.md", "p.csv")])
    assert pages[0] == pages[1]


# -- hostile names --------------------------------------------------------------------------------------------


def test_words_made_safe() -> None:
    assert shown("a\nb\t c") == "a b c"
    assert shown("x\u202ey\u0000\u200b") == "x\\u202ey\\u0000\\u200b"
    assert shown("\ud800") == "\\ud800"
    assert shown("a" * 500) == "a" * 159 + "\u2026"
    assert markdown("a|b<i>`*_[x](y)") == r"a\|b\<i\>\`\*\_\[x\](y)"
    assert markdown("# x") == r"\# x"
    assert markdown("1. x") == r"1\. x"
    assert markdown("see https://x.example www.x.example") == r"see https\://x.example www\.x.example"
    for start in "=+-@\uff1d":
        assert csv_cell(f"{start}cmd()") == f"'{start}cmd()"
    assert csv_cell("\t=cmd()") == "'=cmd()"
    assert csv_cell("plain") == "plain"


def hostile_folder(folder: Path) -> Path:
    profile = made_profile(model=f"{HOSTILE}.onnx", runner=HOSTILE, precision=HOSTILE, is_steady=False)
    machine = msgspec.structs.replace(MACHINE, cpu=HOSTILE, governor=HOSTILE, os=HOSTILE, versions={HOSTILE: HOSTILE})
    subject = Subject(HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE, 1, HOSTILE)
    hostile = inside_result(machine=machine, subject=subject, notes=(HOSTILE,), command=(HOSTILE,))
    layers = tuple(msgspec.structs.replace(one, name=HOSTILE, op=HOSTILE, block=HOSTILE) for one in hostile.layers)
    results = (made_result(profile, machine=machine, subject=subject), msgspec.structs.replace(hostile, layers=layers))
    written(folder, *results)
    (folder / "e.json").write_bytes(msgspec.json.encode(evaluation(HOSTILE, data=HOSTILE, notes=(HOSTILE,))))
    raw = search(method=HOSTILE, verdict=HOSTILE, target=HOSTILE, notes=(HOSTILE,), agreement_of=HOSTILE)
    (folder / "s.json").write_bytes(msgspec.json.encode(raw))
    return folder


class Seen(HTMLParser):
    """What a page holds: elements, their attributes, and the text outside of scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside not in ("script", "style"):
            self.text.append(data)


def test_hostile_names_stay_text_in_every_form(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; pip install -e '.[dev]' brings it")
    out = {form: tmp_path / f"o.{form}" for form in ("html", "md", "csv")}
    api.report([hostile_folder(tmp_path / "r")], html=out["html"], markdown=out["md"], csv=out["csv"])
    read = {form: path.read_text(encoding="utf-8") for form, path in out.items()}
    for form, text in read.items():
        assert "\u202e" not in text, form
        assert "u202e" in text, form
    page = Seen()
    page.feed(read["html"])
    assert page.tags.count("script") == 1
    assert "alert(1)" in "".join(page.text)
    assert not [value for _, _, value in page.attributes if value.startswith("javascript:")]
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name == "style"]
    linked = {value for tag, name, value in page.attributes if name in ("href", "src", "action", "xlink:href")}
    assert all(value.startswith("#") or value == "data:," for value in linked), linked
    assert "<script>" not in read["md"]
    assert not re.search(r"(?<!\\)\]\(http", read["md"])
    for row in csv.reader(io.StringIO(read["csv"])):
        assert not [cell for cell in row if cell.startswith(("=", "+", "@", "\t"))]
        assert len(row) == len(next(csv.reader(io.StringIO(read["csv"]))))


def test_page_asks_for_nothing_and_its_policy_names_what_it_runs(tmp_path: Path, kinds: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; pip install -e '.[dev]' brings it")
    import base64
    import hashlib

    api.report([kinds], html=tmp_path / "p.html")
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', text)
    policy = policy.replace("&#39;", "'")
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        contents = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert len(contents) == 1
        digest = base64.b64encode(hashlib.sha256(contents[0].encode()).digest()).decode()
        assert f"{rule} 'sha256-{digest}'" in policy
    assert not re.search(r"""(?:src|href)=["']?(?!["']|#|data:,)""", text)
    assert not re.search(r"@import|url\((?!#)", text)
    assert '<html lang="en">' in text
    assert text.count('role="img"') == len(re.findall(r"<figure", text)) == text.count("<desc ")
    assert re.search(r"<desc [^>]*>[^<]{20,}", text)


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_have_contrast(scheme: dict[str, str]) -> None:
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
    texts = ("ink", "quiet", "link", "warn")
    assert {name: contrast(scheme[name], scheme[on]) for name in texts for on in ("paper", "panel")} == {
        name: pytest.approx(13, abs=8.5) for name in texts
    }
    series = set(scheme) - {"paper", "panel", "line", "grid", *texts}
    assert all(contrast(scheme[name], scheme["paper"]) >= 4.5 for name in series)
    assert len(set(scheme.values())) == len(scheme)
    assert set(LIGHT) == set(DARK)


# -- what is written ------------------------------------------------------------------------------------------


def test_a_file_that_is_no_report_is_kept(tmp_path: Path, cli: Cli) -> None:
    folder = written(tmp_path / "r", made_result())
    for option, name in (("--markdown", "README.md"), ("--csv", "figures.csv"), ("--html", "index.html")):
        mine = tmp_path / name
        mine.write_text("mine")
        said = cli("report", folder, option, mine)
        assert said.code == 2
        assert f"{mine} is there and no report of edgecomp" in said.err
        assert mine.read_text() == "mine"
    mine = tmp_path / "README.md"
    assert cli("report", folder, "--markdown", mine, "--force").code == 0
    assert cli("report", folder, "--markdown", mine).code == 0, "a report of ours is written again"
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def test_places_that_cannot_be(tmp_path: Path) -> None:
    folder = written(tmp_path / "r", made_result())
    with pytest.raises(InvalidSpec, match="is a folder; name a file"):
        api.report([folder], csv=tmp_path)
    with pytest.raises(InvalidSpec, match="--markdown and --csv both name"):
        api.report([folder], csv=tmp_path / "same", markdown=tmp_path / "same")
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgecompError, match=r"cannot be written: (Not a directory|File exists)"):
        api.report([folder], csv=tmp_path / "file" / "o.csv")
    with pytest.raises(InvalidSpec, match="is a file; name a folder"):
        api.report([folder], plot=tmp_path / "file")


def test_json_is_the_whole_page(tmp_path: Path, cli: Cli) -> None:
    said = cli("report", written(tmp_path / "r", inside_result()), "--json")
    document = json.loads(said.out)
    assert document["files"] == ["r0.json"]
    assert document["page"]["sections"][0]["parts"][0]["title"] == "Latency"


def test_numbers_as_people_write_them() -> None:
    assert [figure(value) for value in (0.1234, 12.345, 123.45, 1234.5, 0.0)] == [
        "0.123",
        "12.35",
        "123.5",
        "1,234",
        "0.000",
    ]


# -- documents of other verbs -----------------------------------------------------------------------------------


def test_comparison_marks_what_is_no_difference_and_what_was_not_in_turns(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_bytes(msgspec.json.encode(comparison()))
    one = section(api.report([tmp_path]).page, "Comparison")
    table = rows(one.tables[0])
    assert table["tome"]["Time over base"].marks == ()
    assert table["evit"]["Time over base"].marks == ("no difference",)
    assert table["old"]["Time over base"].marks == ("not in turns",)
    assert table["evit"]["Parity"].marks == ("fails",)
    bars, front = one.plots
    assert bars.categories == ("plain", "tome", "evit", "old")
    assert [(p.label, p.is_front) for p in front.points] == [("plain (base)", True), ("tome", True), ("evit", False)]


def test_estimate_says_in_each_cell_that_it_is_computed(tmp_path: Path) -> None:
    (tmp_path / "e.json").write_bytes(msgspec.json.encode(estimate()))
    one = section(api.report([tmp_path]).page, "Estimate: tome-vit on orin-nano-super")
    assert "somewhere" not in repr(one), "a path is no matter of a page"
    table = rows(one.tables[0])
    assert table["49 kept"]["Time over plain"].text == "0.500"
    assert table["49 kept"]["Time over plain"].marks == ("estimated",)
    assert table["plain"]["Time, ms"].note == "0.150 to 0.216"
    roofline, less, blocks = one.plots
    assert (roofline.roofs[0].peak_gflops, roofline.roofs[0].bandwidth_gb_s) == (17_000.0, 102.0)
    assert len(roofline.points) == 6
    assert roofline.points[0].x == 100.0
    assert roofline.points[0].y == pytest.approx(3333.3, rel=1e-4)
    assert "3 have no products" in roofline.alt
    assert "the 8 longest kernels" in less.title
    assert blocks.series[0][:2] == ("plain", "plain")


def test_a_roof_for_each_rate_at_the_bandwidth_that_was_computed_with(tmp_path: Path) -> None:
    first = estimate().graphs[0]
    peaks = {"fp16": Rate(17.0, "stated", "a page"), "int8": Rate(33.0, "stated", "a page")}
    graph = msgspec.structs.replace(first, estimate=msgspec.structs.replace(first.estimate, peaks=peaks))
    mine = estimate(target="orin-nano-super", bandwidth_gb_s=51.0, graphs=(graph,))
    (tmp_path / "e.json").write_bytes(msgspec.json.encode(mine))
    roofline = section(api.report([tmp_path]).page, "Estimate").plots[0]
    assert [(roof.peak_gflops, roof.bandwidth_gb_s) for roof in roofline.roofs] == [(33_000, 51), (17_000, 51)]
    assert "under 2 roofs, one for each rate. 6 lie left of 647 FLOP a byte" in roofline.alt
    assert (
        "6 lie left of 333 FLOP a byte, where memory bounds under the roof of orin-nano-super: 17 T/s" in roofline.alt
    )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("graphs", 0, "estimate", "peaks", "fp16", "tera"), 0.0),
        (("graphs", 0, "estimate", "kernels", 0, "us"), 1e-300),
        (("graphs", 0, "estimate", "mid_us"), -1e308),
        (("graphs", 0, "top", 0, "flops"), 10**300),
        (("graphs", 0, "blocks", 0, "us"), -1.0),
        (("graphs", 0, "memory", "available_bytes"), 10**400),
        (("go_no_go", "tokens"), 10**400),
        (("go_no_go", "asked", "reach", 0, "us"), -1e308),
        (("llm", "rows", 0, "prefill", "flops"), 10**400),
        (("llm", "rows", 0, "prefill", "mid_us"), -1.0),
        (("bandwidth_gb_s",), 0),
        (("error",), -2.0),
    ],
)
def test_an_estimate_that_was_edited_is_refused(tmp_path: Path, path: tuple[Any, ...], value: float) -> None:
    answer = go_no_go(transformer_costs(Geometry(197, 768, 12, 12, 3072, 768)), load_target("t4"))
    behind = api.estimate(target="t4", llm="qwen3-0.6b", visual_tokens=49)
    raw = json.loads(msgspec.json.encode(estimate(go_no_go=answer, llm=behind.llm)))
    place = raw
    for step in path[:-1]:
        place = place[step]
    assert path[-1] in place
    place[path[-1]] = value
    (tmp_path / "e.json").write_text(json.dumps(raw))
    with pytest.raises(RunError, match=r"estimate .*e\.json is damaged or was edited"):
        api.report([tmp_path / "e.json"])


@pytest.mark.parametrize(
    ("made", "path", "value"),
    [
        (evaluation, ("evaluation", "scores", 1, "against_plain", "agreement", "value"), -1e308),
        (calibration, ("buckets", 0, "tokens"), 10**400),
        (calibration, ("buckets", 0, "ms"), -1.0),
    ],
)
def test_other_documents_that_were_edited_are_refused(
    tmp_path: Path, made: Callable[[], msgspec.Struct], path: tuple[Any, ...], value: float
) -> None:
    raw = json.loads(msgspec.json.encode(made()))
    place = raw
    for step in path[:-1]:
        place = place[step]
    assert path[-1] in place
    place[path[-1]] = value
    (tmp_path / "e.json").write_text(json.dumps(raw))
    with pytest.raises(RunError, match=r"e\.json is damaged or was edited"):
        api.report([tmp_path / "e.json"])


def test_the_answer_before_training_and_the_language_model_have_sections(tmp_path: Path) -> None:
    answer = go_no_go(transformer_costs(Geometry(197, 768, 12, 12, 3072, 768)), load_target("t4"))
    (tmp_path / "go.json").write_bytes(msgspec.json.encode(estimate(target="t4", go_no_go=answer)))
    behind = api.estimate(target="t4", llm="qwen3-0.6b", visual_tokens=49, kept=20, text_tokens=9)
    (tmp_path / "llm.json").write_bytes(msgspec.json.encode(behind))
    page = api.report([tmp_path]).page
    assert len([one for one in page.sections if one.title.startswith("Estimate: ")]) == 1  # of the one with graphs
    before = section(page, "Would fewer tokens help: tome-vit on t4")
    assert before.lines[0] == f"{answer.sentence} Computed, not measured (go.json)."
    assert before.lines[1].startswith("A method may take 0.27 ms for choosing")
    assert [column.name for column in before.tables[0].columns][-3:] == [
        "144 tokens, times",
        "96 tokens, times",
        "48 tokens, times",
    ]
    assert before.tables[0].rows[0][6].note == "1.08 to 1.19"
    after = section(page, "Behind the encoder: qwen3-0.6b on t4")
    assert after.lines[0].startswith("qwen3-0.6b: 28 layers, width 1024, 16 heads on 8 key heads")
    assert [(row[0].text, row[1].text) for row in after.tables[0].rows] == [("all", "49"), ("20 kept", "20")]
    assert behind.llm is not None
    assert after.tables[0].rows[1][6].value == pytest.approx(behind.llm.rows[1].prefill.mid_us / 1000)


def test_a_band_of_ones_own_results_is_said_to_be_theirs(tmp_path: Path) -> None:
    (tmp_path / "e.json").write_bytes(msgspec.json.encode(estimate(is_own=True)))
    lines = section(api.report([tmp_path]).page, "Estimate").lines
    assert "Your own results, left out of the fit in turn, were within a factor of 1.20: the band." in lines
    assert not any("published" in line for line in lines)


def test_state_of_the_device_stands_beside_each_graph(tmp_path: Path) -> None:
    gpu = GpuState("a GPU", "nvml", sm_mhz=1980.0, temperature_c=40.0, throttle_reasons=(), is_persistent=True)
    before = DeviceState("2026-11-22T12:00:00.000Z", gpu=gpu)
    hot = msgspec.structs.replace(gpu, sm_mhz=1200.0, temperature_c=80.0, throttle_reasons=("heat (hardware)",))
    watch = Watch(before, DeviceState("2026-11-22T12:00:09.000Z", gpu=hot), 9.0, 100.0, mean_power_mw=250_000.0)
    moved = Stability("unstable", ("the GPU's clock fell by 39 %",))
    shaky = made_profile(is_steady=True, watch=watch, stability=moved, energy_mj=12.5)
    unknown = made_profile(is_steady=True, stability=Stability("unknown"), model="other.onnx")
    page = api.report([written(tmp_path / "r", made_result(shaky, unknown))]).page
    conditions = section(page, "Conditions")
    (table,) = (one for one in conditions.tables if one.caption.startswith("The device"))
    ((file, graph, stability, clock, cpu, heat, held, mode, power, energy, others),) = table.rows
    assert (file.text, graph.text) == ("r0.json", "4 of 16 kept, batch 1")
    assert (stability.marks, stability.note) == (("unstable",), "the GPU's clock fell by 39 %")
    assert [clock.text, cpu.text, heat.text, held.text] == ["1,980 to 1,200", "unknown", "40 to 80", "heat (hardware)"]
    assert [mode.text, power.text, energy.text, others.text] == [
        "persistence on, MIG unknown",
        "250.00",
        "12.500",
        "unknown",
    ]
    assert energy.marks == ("unstable",)
    latency = section(page, "Latency").tables[0]
    assert latency.rows[0][1].marks == ("unstable",)
    assert latency.rows[1][1].marks == (), "that clocks cannot be read is no mark against a number"
    assert any("the GPU's clock fell by 39 %" in line for line in latency.foot)


def test_an_image_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match=r"--image a\.png is drawn on in a bundle; name one with --bundle"):
        api.report([written(tmp_path / "r", made_result())], image="a.png")


def test_methods_stand_beside_the_plain_model(tmp_path: Path) -> None:
    base = {"flops": 10**9, "latency_us": Estimate(1000.0, 990.0, 1010.0), "samples_us": (1000.0,), "tokens_in": 196}
    lost = Reconstruction("unmerge", 0.25, 0.9)
    faster = Ratio(0.6, 0.58, 0.62, "faster", "paired", 30)
    report = MethodsReport(
        created="2026-11-22T12:00:00Z",
        edgecomp="0.1.0",
        image="photograph.jpg",
        backbone="vit",
        image_size=224,
        weights="random",
        budget="0.25",
        batch=1,
        runner="onnxruntime 1.27.0",
        threads=1,
        rounds=30,
        seed=0,
        machine=MACHINE,
        rows=(
            MethodRow(method="plain", tokens_out=196, **base),
            MethodRow(method="tome", tokens_out=49, ratio=faster, reconstructions=(lost,), **base),
        ),
        left_out={"perceiver": "stands alone"},
    )
    (tmp_path / "m.json").write_bytes(msgspec.json.encode(report))
    one = section(api.report([tmp_path]).page, "Methods on vit")
    cells = rows(one.tables[0])["tome"]
    assert (cells["N / M"].text, cells["(N/M)^2"].text) == ("4.00", "16.00")
    assert (cells["Time over plain"].text, cells["Reconstruction error"].text) == ("0.600", "unmerge 0.2500")
    assert "Left out: perceiver: stands alone." in one.lines
    assert one.plots[0].categories == ("plain", "tome")


EXTREMES = {
    "one sample": [made_profile([1000.0])],
    "all equal": [made_profile([1000.0] * 5), made_profile([1000.0] * 5, role="plain", model="p")],
    "all zero": [made_profile([0.0] * 3), made_profile([0.0] * 3, role="plain", model="p")],
    "far apart": [made_profile([1.0] * 30), made_profile([1e11] * 30, role="plain", model="p")],
    "letters that the font lacks": [made_profile(model="\u6a21\u578b" * 40, role="model", tokens_out=0)],
    "no memory": [made_profile(host_peak_mib=0.0)],
}


@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_are_drawn(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; pip install -e '.[dev]' brings it")
    blocks = (BlockTime("model.m4.b1.onnx", "blocks.\u00b2", -5.0, -9.0, 1.0, 10.0),)
    folder = written(tmp_path / "r", made_result(*EXTREMES[name], blocks=blocks))
    outcome = api.report([folder], html=tmp_path / "p.html")
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert text.count('role="img"') == len(outcome.page.plots) >= 2
    assert not re.search(r"\b(nan|inf)\b", "".join(re.findall(r" d=\"[^\"]*\"", text)))


@pytest.mark.parametrize(
    ("low", "high", "is_log", "words"),
    [
        (0.0, 100.0, False, ["0", "20", "40", "60", "80", "100"]),
        (0.12, 0.31, False, ["0.15", "0.20", "0.25", "0.30"]),
        (0.9, 120.0, True, ["1", "2", "5", "10", "20", "50", "100"]),
        (1.0, 1e6, True, ["1", "10", "100", "1,000", "10,000", "100,000", "1,000,000"]),
    ],
)
def test_ticks_are_round(low: float, high: float, is_log: bool, words: list[str]) -> None:
    assert [word for _, word in nice_ticks(low, high, is_log=is_log)] == words
