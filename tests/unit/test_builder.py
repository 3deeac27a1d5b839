"""The builder around TensorRT: lock, settings, memory, progress, Ctrl-C, stability, and what a plan is refused for."""

from __future__ import annotations

import gc
import importlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from edgecomp import api
from edgecomp.cli.app import app
from edgecomp.engines import (
    OWN,
    BuilderSettings,
    BuiltEngine,
    EngineProof,
    EngineRecord,
    build,
    build_engine,
    installed_flavours,
    load_flavour,
    load_preset,
    memory,
    preset_names,
    read_record,
    require_engine,
    require_target_runs,
    settings_of,
    sidecar_path,
)
from edgecomp.engines.memory import available_mib, needed_mib, require_memory
from edgecomp.engines.watching import Watch, interruptible
from edgecomp.errors import BuildError, BundleBusy, InvalidSpec, TargetMismatch, UnknownName
from edgecomp.lock import bundle_lock
from edgecomp.report.build import BuildReport, EngineFile, describe_build
from edgecomp.specs.origin import file_sha256
from edgecomp.specs.target import load_target

rtx = pytest.mark.skipif("rtx" not in installed_flavours(), reason="TensorRT for RTX is not installed")

TARGET = load_target("rtx-4090")
NANO = load_target("orin-nano")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An ONNX file of two products."""
    onnx = pytest.importorskip("onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"], name="/a"),
            helper.make_node("MatMul", ["h", "v"], ["y"], name="/b"),
        ],
        "graph",
        [helper.make_tensor_value_info("x", kind, [4, 32])],
        [helper.make_tensor_value_info("y", kind, [4, 32])],
        [helper.make_tensor(name, kind, [32, 32], [0.01] * 1024) for name in ("w", "v")],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


def make(onnx: Path, **changes: Any) -> BuiltEngine:
    options: dict[str, Any] = {"target": TARGET, "runtime": "rtx", "precision": "fp32", "onnx_sha256": "a" * 64}
    return build_engine(onnx, onnx.parent / "out", **{"progress": lambda line: None} | options | changes)


# -- the lock -------------------------------------------------------------------------------------------------------


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Let another thread hold the lock of a folder."""
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        with bundle_lock(folder, "build"):
            taken.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait(60)
    try:
        yield
    finally:
        done.set()
        thread.join()


@rtx
def test_build_waits_for_nobody_and_keeps_what_another_just_built(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process built the same between the first look and the lock: it is kept, not built twice."""
    first = make(model)
    with held(model.parent / "out"):
        assert make(model).reused  # nothing to build, so that no lock is needed
        with pytest.raises(BundleBusy, match=rf"out is in use by `edgecomp build`, process {os.getpid()} on "):
            make(model, force=True)
    looked = []
    why = build._why_rebuild

    def late(engine: Path, inputs: dict[str, Any]) -> str:
        looked.append(engine)
        return "there is none yet" if len(looked) == 1 else why(engine, inputs)

    monkeypatch.setattr(build, "_why_rebuild", late)
    again = make(model)
    assert (again.reused, len(looked), again.record) == (True, 2, first.record)


@rtx
def test_leftovers_of_a_killed_build_are_removed(model: Path) -> None:
    out = model.parent / "out"
    out.mkdir()
    (out / ".model.rtx.engine.1-abcd.tmp").write_bytes(b"half a plan")
    (out / ".another.engine.1-abcd.tmp").write_bytes(b"not ours to touch")
    make(model)
    assert sorted(path.name for path in out.iterdir()) == [
        ".another.engine.1-abcd.tmp", "model.rtx.engine", "model.rtx.json",
    ]  # fmt: skip


# -- settings and presets -------------------------------------------------------------------------------------------


def test_settings_over_a_preset() -> None:
    assert preset_names() == ("low-memory",)
    low = load_preset("low-memory")
    assert (low.workspace_mib, low.opt_level, low.max_aux_streams) == (256, 2, 0)
    assert low.tactic_sources == ("JIT_CONVOLUTIONS",)
    assert settings_of() == BuilderSettings()
    assert settings_of(preset="low-memory") == low
    mixed = settings_of(preset="low-memory", workspace_mib=64, opt_level=0)
    assert (mixed.workspace_mib, mixed.opt_level, mixed.max_aux_streams) == (64, 0, 0)
    with pytest.raises(UnknownName, match=r"no preset 'low'.*Known: low-memory"):
        load_preset("low")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workspace_mib": -1}, r"workspace -1 MiB is not between 0 .* and 1048576"),
        ({"workspace_mib": 1 << 21}, "workspace 2097152 MiB"),
        ({"opt_level": 6}, r"opt-level 6 is not between 0 \(quick\) and 5"),
        ({"opt_level": -2}, "opt-level -2"),
    ],
)
def test_settings_out_of_range(options: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidSpec, match=message):
        settings_of(**options)


@rtx
def test_rtx_takes_every_setting(model: Path) -> None:
    record = make(model, settings=settings_of(preset="low-memory")).record
    assert (record.workspace_mib, record.opt_level, record.max_aux_streams) == (256, 2, 0)
    with pytest.raises(InvalidSpec, match=r"TensorRT for RTX .* has no tactic source 'CUDNN'; it has EDGE_MASK"):
        make(model, settings=BuilderSettings(tactic_sources=("CUDNN",)))


# -- memory ---------------------------------------------------------------------------------------------------------


def test_memory_is_asked_on_the_board_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, weights = tmp_path / "model.onnx", 300 << 20
    own, low = BuilderSettings(), load_preset("low-memory")
    assert needed_mib(weights, own) == 3 * 300 + 1024 + 1024
    assert needed_mib(weights, low) == 3 * 300 + 1024 + 256
    monkeypatch.setattr(memory, "available_mib", lambda: 2500)
    with pytest.raises(
        BuildError,
        match=r"model\.onnx: building it takes about 2948 MiB \(an estimate: 3 x 300 of weights, 1024 of the builder, "
        r"1024 of workspace\), and 2500 MiB are available on this orin-nano.*--low-memory.*--force-memory",
    ):
        require_memory(model, weights, NANO, own, local_sm=87)
    require_memory(model, weights, NANO, low, local_sm=87)
    require_memory(model, weights, NANO, own, local_sm=None)  # another machine's memory says nothing of the board
    require_memory(model, weights, TARGET, own, local_sm=89)  # a card has its own
    monkeypatch.setattr(memory, "available_mib", lambda: None)
    require_memory(model, weights, NANO, own, local_sm=87)


def test_available_memory_is_the_kernels_word(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:        7802000 kB\nMemFree:          200000 kB\nMemAvailable:    1536000 kB\n")
    assert available_mib(meminfo) == 1500
    assert available_mib(tmp_path / "absent") is None
    meminfo.write_text("MemTotal: 1 kB\n")
    assert available_mib(meminfo) is None


@rtx
def test_memory_stops_a_build_unless_forced(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = msgspec.structs.replace(TARGET, name="shared", shared_memory=True)
    monkeypatch.setattr(build, "require_memory", lambda onnx, size, *rest, local_sm: refuse(size))

    def refuse(size: int) -> None:
        raise BuildError(f"{size} bytes of weights")

    size = model.stat().st_size + 1000
    with pytest.raises(BuildError, match=f"^{size} bytes of weights"):
        make(model, target=shared, weight_bytes=1000)
    assert not (model.parent / "out").exists()
    make(model, target=shared, weight_bytes=1000, force_memory=True)
    assert make(model, target=shared).reused


# -- progress and Ctrl-C --------------------------------------------------------------------------------------------


def test_steps_become_lines_twice_a_second() -> None:
    now = [100.0]
    said: list[str] = []
    watch = Watch("model.engine", said.append, clock=lambda: now[0])
    for index in range(1, 1001):
        now[0] += 0.01
        assert watch.step("Timing graph nodes", index, 1000)
    assert len(said) == 20
    assert said[0] == "model.engine: timing graph nodes, 50 of 1000"
    watch.stop()
    now[0] += 10
    assert watch.step("Timing graph nodes", 1, 1) is False
    assert len(said) == 20


def test_progress_that_fails_does_not_end_in_the_builder() -> None:
    def broken(line: str) -> None:
        raise OSError(line)

    now = [0.0]
    watch = Watch("m", broken, clock=lambda: now[0])
    now[0] = 5.0
    assert watch.step("Phase", 1, 2) is True


def test_interrupt_is_raised_when_the_builder_is_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    watch = Watch("m", lambda line: None)
    with pytest.raises(KeyboardInterrupt), interruptible(watch):  # noqa: PT012 - what happens inside is the test
        os.kill(os.getpid(), signal.SIGINT)
        assert watch.step("Phase", 1, 2) is False
        assert watch.stopped
    assert signal.getsignal(signal.SIGINT) is before


@rtx
def test_interrupt_ends_a_real_build_and_leaves_nothing(model: Path) -> None:
    """Ctrl-C while TensorRT works: the process ends in time, with nothing half in the folder."""
    code = f"""
import os, signal
from pathlib import Path
from edgecomp.engines import build, build_engine
from edgecomp.specs.target import load_target
step = build.Watch.step
def interrupted(self, phase, done, of):
    if phase == "Optimizing graph" and done == 3:
        os.kill(os.getpid(), signal.SIGINT)
    return step(self, phase, done, of)
build.Watch.step = interrupted
build_engine(Path({str(model)!r}), Path({str(model.parent / "out")!r}), target=load_target("rtx-4090"),
             runtime="rtx", precision="fp32", onnx_sha256="a" * 64, progress=lambda line: None)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode in (-signal.SIGINT, 130), done.stderr
    assert "KeyboardInterrupt" in done.stderr
    assert [path.name for path in model.parent.iterdir()] == ["model.onnx"]


@rtx
def test_real_builder_tells_its_phases(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, int]] = []
    monkeypatch.setattr(build.Watch, "step", lambda self, *words: seen.append(words) or True)
    make(model)
    phases = {phase for phase, _, _ in seen}
    assert "Optimizing graph" in phases
    assert all(0 < done <= of for _, done, of in seen)


@rtx
def test_collector_rests_while_tensorrt_works(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Freeing an older builder inside a call of the logger would stop the process for ever."""
    seen = []
    monkeypatch.setattr(build.Watch, "step", lambda self, *words: seen.append(gc.isenabled()) or True)
    parse = build.parse_onnx
    monkeypatch.setattr(
        build, "parse_onnx", lambda *words, **named: (seen.append(gc.isenabled()), parse(*words, **named))[1]
    )
    make(model)
    assert set(seen) == {False}
    assert gc.isenabled()
    with pytest.raises(BuildError, match="none of the"):
        make(model, precision="fp16")
    assert gc.isenabled()


# -- stability ------------------------------------------------------------------------------------------------------


@rtx
def test_second_build_is_compared(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = make(model, check_stable=True)
    assert (fresh.reused, fresh.differing_bytes) == (False, 0)
    kept = make(model, check_stable=True)
    assert (kept.reused, kept.differing_bytes) == (True, 0)
    assert make(model).differing_bytes is None
    plan_of = build._build_plan

    def unstable(job: Any, label: str) -> Any:
        plan, known = plan_of(job, label)
        content = bytearray(plan)
        content[10] ^= 1
        content[-1] ^= 1
        return memoryview(content), known

    monkeypatch.setattr(build, "_build_plan", unstable)
    assert make(model, check_stable=True).differing_bytes == 2
    assert file_sha256(kept.path) == kept.record.sha256
    monkeypatch.setattr(build, "_build_plan", lambda job, label: (memoryview(b"short"), {}))
    assert make(model, check_stable=True).differing_bytes == -1


def report_of(**changes: Any) -> BuildReport:
    """Return a report of one engine that nobody built."""
    proof = EngineProof(
        by="network", products={"float16": 49, "float32": 24}, weights={"float16": 990, "float32": 10}, matched=73,
        islands=("/a", "/b", "/c", "/d", "/e"), wider=("/small",),
    )  # fmt: skip
    record = EngineRecord(
        schema=1, model="model.onnx", onnx_sha256="a" * 64, weights_sha256="", target="rtx-4090", runtime="rtx",
        runtime_version="1.7.1", sm=(89,), precision="fp16", workspace_mib=0, seconds=1.5, num_layers=3, size_bytes=4,
        sha256="b" * 64, warnings=(), inputs=(), outputs=(), edgecomp_version="0.1.0", proof=proof,
    )  # fmt: skip
    engine = msgspec.structs.replace(EngineFile(Path("model.rtx.engine"), record, False), **changes)
    return BuildReport("bundle", "rtx-4090", 89, "rtx", "1.7.1", (engine,))


def test_report_shows_the_proof() -> None:
    text = describe_build(report_of(notes=("timing cache c is left out: it is damaged",)))
    assert (
        "model.rtx.engine: precision fp16, seen in the network that TensorRT parsed: matrix products "
        "49 in float16 (99.0 % of the weights), 24 in float32 (1.0 % of the weights)"
    ) in text
    assert "left out on purpose: 5 (/a, /b, /c, /d, and 1 more)" in text
    assert "small products wider than fp16: 1 (/small)" in text
    assert "model.rtx.engine: timing cache c is left out: it is damaged" in text
    assert "stable" not in text


@pytest.mark.parametrize(
    ("differing", "verdict", "words"),
    [(None, True, ""), (0, True, "stable: a second build gives the same bytes"),
     (7, False, "NOT stable: a second build gives 7 other bytes"), (-1, False, "NOT stable: .* another size")],
)  # fmt: skip
def test_report_of_stability(differing: int | None, verdict: bool, words: str) -> None:
    report = report_of(differing_bytes=differing)
    assert bool(report) is verdict
    text = describe_build(report)
    assert not words or re.search(words, text)
    assert "timing cache" not in text  # TensorRT for RTX has none


def test_report_of_stability_with_full_tensorrt() -> None:
    """It times tactics, so that a cache of the timings is the first thing to try, where none was used."""
    record = msgspec.structs.replace(report_of().engines[0].record, runtime="tensorrt")
    assert "a timing cache may cure it" in describe_build(report_of(differing_bytes=7, record=record))
    cached = msgspec.structs.replace(record, timing_cache="empty")
    assert "a timing cache may cure it" not in describe_build(report_of(differing_bytes=7, record=cached))


# -- what a plan is refused for -------------------------------------------------------------------------------------


@rtx
def test_plan_that_does_not_belong_here(model: Path) -> None:
    engine, version = make(model).path, load_flavour("rtx").version
    here: dict[str, Any] = {"runtime": "rtx", "version": version, "sm": 89}
    assert require_engine(engine, **here) == read_record(engine)
    for changes, message in (
        ({"version": "1.2.0"}, rf"was built by TensorRT for RTX {version}, and TensorRT for RTX 1\.2\.0 is here"),
        (
            {"runtime": "tensorrt", "version": "10.3.0"},
            rf"built by TensorRT for RTX {version}, and TensorRT 10\.3\.0 is",
        ),
        ({"sm": 86}, r"was built for rtx-4090 \(SM89\), and the GPU here is SM86; build again"),
    ):
        with pytest.raises(TargetMismatch, match=message):
            require_engine(engine, **here | changes)
    content = engine.read_bytes()
    engine.write_bytes(content[:-1])
    with pytest.raises(BuildError, match=rf"has {len(content) - 1} bytes, and its record says {len(content)}"):
        require_engine(engine, **here)
    engine.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BuildError, match=r"has sha256 [0-9a-f]{12}, and its record says [0-9a-f]{12}; plan and record"):
        require_engine(engine, **here)
    engine.unlink()
    with pytest.raises(BuildError, match="a record and no plan"):
        require_engine(engine, **here)


@rtx
def test_record_without_a_proof_is_built_again(model: Path) -> None:
    """Engines of an edgecomp that proved nothing are not taken on trust."""
    made = make(model)
    place = sidecar_path(made.path)
    record = msgspec.json.decode(place.read_bytes())
    place.write_bytes(msgspec.json.encode(record | {"proof": None}))
    said: list[str] = []
    assert not make(model, progress=said.append).reused
    assert "(its record holds no proof of precision)" in said[0]


@pytest.mark.parametrize(
    ("target", "precision", "message"),
    [
        (
            "orin-nano",
            "fp8",
            r"orin-nano \(SM87\) does not run fp8; it runs fp32, tf32, fp16, bf16, int8; fp8 begins with",
        ),
        ("a10", "fp8", r"a10 \(SM86\) does not run fp8; it runs fp32, tf32, fp16, bf16, int8; fp8 begins with SM89"),
        ("t4", "bf16", r"t4 \(SM75\) does not run bf16; it runs fp32, fp16, int8; bf16 begins with SM80"),
        ("rtx-4090", "fp4", r"rtx-4090 \(SM89\) does not run fp4"),
    ],
)
def test_precision_that_the_hardware_lacks(target: str, precision: str, message: str) -> None:
    with pytest.raises(TargetMismatch, match=message):
        require_target_runs(precision, load_target(target))


def test_target_file_that_promises_too_much() -> None:
    """SM86 has no fp8, whatever a user's target file says: TensorRT would tell so late in the build."""
    promised = msgspec.structs.replace(load_target("a10"), precisions=("fp32", "fp16", "int8", "fp8"))
    with pytest.raises(
        TargetMismatch, match=r"a10 \(SM86\) does not run fp8; it runs fp32, fp16, int8; fp8 begins with SM89"
    ):
        require_target_runs("fp8", promised)


def test_precision_is_refused_before_any_file_is_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle of a precision that the target lacks: no hash is computed, no TensorRT is looked for."""
    module = importlib.import_module("edgecomp.api._build")
    opened: list[bool] = []

    class Opened:
        manifest = type("Manifest", (), {"precision": "fp8"})

    def open_it(path: Path, *, verify: bool = True) -> Any:
        opened.append(verify)
        return Opened

    monkeypatch.setattr(module, "open_bundle", open_it)
    with pytest.raises(TargetMismatch, match=r"orin-nano \(SM87\) does not run fp8"):
        api.build(tmp_path, target="orin-nano")
    assert opened == [False]


@pytest.mark.parametrize(("differing", "code"), [(None, 0), (3, 1)])
def test_options_of_the_command_line(differing: int | None, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each option reaches the verb, and a build that is not stable exits with 1."""
    given: dict[str, Any] = {}

    def instead(bundle: str, **named: Any) -> BuildReport:
        given.update(named, bundle=bundle)
        return report_of(differing_bytes=differing)

    monkeypatch.setattr(api, "build", instead)
    words = "build some --target a10 --opt-level 1 --low-memory --timing-cache off --force-memory --check-stable"
    done = CliRunner().invoke(app, words.split())
    assert done.exit_code == code, done.output
    assert "model.rtx.engine: precision fp16" in done.stdout
    del given["progress"]
    assert given == {
        "bundle": "some", "target": "a10", "runtime": "auto", "budget": None, "batch": None, "workspace_mib": 0,
        "opt_level": 1, "low_memory": True, "timing_cache": "off", "plugin": "auto", "allow_plugin": (), "force": False,
        "force_memory": True, "check_stable": True,
    }  # fmt: skip


def test_json_of_a_report_holds_the_proof() -> None:
    found = msgspec.json.decode(msgspec.json.encode(msgspec.to_builtins(report_of().engines[0].record)))
    assert found["proof"]["products"] == {"float16": 49, "float32": 24}
    assert found["proof"]["by"] == "network"


def test_defaults_of_the_verb_are_the_builders_own() -> None:
    assert OWN == -1
    assert settings_of(workspace_mib=0, opt_level=OWN) == BuilderSettings()
