"""One builder for TensorRT 10.3, 11 and RTX: what it calls, held to hand-written stubs of each generation.

What 11 removed, or 10.3 has not yet, cannot be called: see `stand_in`.
"""

from __future__ import annotations

import ast
import enum
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from stand_in import GENERATIONS, STUBS, StandIn, stand_in

from edgecomp.engines import (
    BuilderSettings,
    adapter,
    build,
    build_engine,
    choose_flavour,
    flavour,
    installed_flavours,
    load_flavour,
    load_preset,
)
from edgecomp.engines.network import collecting_logger
from edgecomp.errors import BuildError, InvalidSpec, TargetMismatch
from edgecomp.specs.target import load_target

rtx = pytest.mark.skipif("rtx" not in installed_flavours(), reason="TensorRT for RTX is not installed")

ROOT = Path(__file__).resolve().parents[2]
ORIN = msgspec.structs.replace(load_target("agx-orin-64"), name="orin", runtimes={"tensorrt": ">=10.3,<12"})


def network_of(module: StandIn, dtype: str) -> Any:
    """Return a network of one product, x @ w; sizes as `write_onnx` below."""

    def filled(kind: str, **fields: Any) -> Any:
        made = getattr(module, kind)()
        for name, value in fields.items():
            setattr(made, name, value)
        return made

    kind = module.DataType[dtype]
    x, w, y = (filled("ITensor", name=n, shape=s, dtype=kind) for n, s in (("x", (2, 8)), ("w", (8, 8)), ("y", (2, 8))))
    layers = [
        (filled("ILayer", name="w", type=module.LayerType.CONSTANT, metadata="", num_inputs=0, num_outputs=1), [], w),
        (
            filled(
                "ILayer",
                name="mm",
                type=module.LayerType.MATRIX_MULTIPLY,
                metadata="[ONNX Layer: mm]",
                num_inputs=2,
                num_outputs=1,
            ),
            [x, w],
            y,
        ),
    ]
    inputs = {id(layer): operands for layer, operands, _ in layers}
    outputs = {id(layer): made for layer, _, made in layers}
    module.behave |= {
        "ILayer.get_input": lambda self, index: inputs[id(self)][index],
        "ILayer.get_output": lambda self, index: outputs[id(self)],
        "INetworkDefinition.get_layer": lambda self, index: layers[index][0],
        "INetworkDefinition.get_input": lambda self, index: x,
        "INetworkDefinition.get_output": lambda self, index: y,
        "INetworkDefinition.get_flag": lambda self, flag: bool(self._flags >> int(flag) & 1),
    }
    return filled("INetworkDefinition", num_layers=2, num_inputs=1, num_outputs=1)


def scripted(module: StandIn, *, dtype: str = "FLOAT", steps: int = 2) -> None:
    """Let a stand-in build: one product, two warnings, a timing cache that grows."""

    def create_network(self: Any, flags: int = 0) -> Any:
        network = network_of(module, dtype)
        network._flags = flags
        return network

    def start(self: Any, logger: Any) -> None:
        self._logger = logger

    def parser(self: Any, network: Any, logger: Any) -> None:
        self.num_errors = 0

    def run(self: Any, network: Any, config: Any) -> bytes | None:
        monitor = config.progress_monitor
        monitor.phase_start("Timing tactics", None, steps)
        for index in range(steps):
            if not monitor.step_complete("Timing tactics", index):
                return None
        monitor.phase_finish("Timing tactics")
        for _ in range(2):
            self._logger.log(module.ILogger.Severity.WARNING, "a warning of the stand-in")
        return b"plan of TensorRT " + str(module.__version__).encode()

    def create_cache(self: Any, content: bytes) -> Any:
        made = module.ITimingCache()
        made._content = content
        return made

    def set_cache(self: Any, cache: Any, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        self._cache = cache
        return True

    module.behave |= {
        "Builder.__init__": start,
        "Builder.create_network": create_network,
        "Builder.create_builder_config": lambda self: module.IBuilderConfig(),
        "Builder.build_serialized_network": run,
        "OnnxParser.__init__": parser,
        "OnnxParser.parse_from_file": lambda self, model: True,
        "IBuilderConfig.create_timing_cache": create_cache,
        "IBuilderConfig.set_timing_cache": set_cache,
        "IBuilderConfig.get_timing_cache": lambda self: self._cache,
        "ITimingCache.serialize": lambda self: self._content + b"+",
    }


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., StandIn]:
    """Install a stand-in for full TensorRT beside a GPU of a compute capability; no real GPU is asked."""
    monkeypatch.setenv("EDGECOMP_CACHE_DIR", str(tmp_path / "cache"))

    def do(version: str, local_sm: int | None = 87, **script: Any) -> StandIn:
        module = stand_in("tensorrt-11" if version.startswith("11") else "tensorrt-10.3", version)
        scripted(module, **script)
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        monkeypatch.setattr(flavour, "_module_name", lambda name: "tensorrt" if name == "tensorrt" else _rtx_module)
        monkeypatch.setattr(flavour, "local_gpu_sm", lambda: local_sm)
        monkeypatch.setattr(build, "local_gpu_sm", lambda: None)
        return module

    return do


_rtx_module = "tensorrt_rtx_bindings" if "rtx" in installed_flavours() else ""


def write_onnx(path: Path, dtype: str = "FLOAT") -> Path:
    """Write `y = x @ w`."""
    onnx = pytest.importorskip("onnx")
    helper, kind = onnx.helper, getattr(onnx.TensorProto, dtype)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="mm")],
        "graph",
        [helper.make_tensor_value_info("x", kind, [2, 8])],
        [helper.make_tensor_value_info("y", kind, [2, 8])],
        [helper.make_tensor("w", kind, [8, 8], [0.5] * 64)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


def make(onnx: Path, **changes: Any) -> Any:
    options: dict[str, Any] = {"target": ORIN, "runtime": "auto", "precision": "fp32", "onnx_sha256": "a" * 64}
    return build_engine(onnx, onnx.parent / "out", **{"progress": lambda line: None} | options | changes)


SETTERS = (
    "IBuilderConfig.",
    "Builder.create_network",
    "OnnxParser.parse",
    "Runtime.",
    "ICudaEngine.",
)


def told(module: StandIn) -> dict[str, Any]:
    """Return what the builder was told, by name; the last call counts."""
    found = {}
    for name, words in module.calls:
        if name.startswith(SETTERS) and not name.endswith(("._cache=", "progress_monitor=", "__init__")):
            found[name] = words
    return found


@pytest.mark.parametrize("version", GENERATIONS)
def test_full_tensorrt_is_told_nothing_that_11_removed(
    version: str, install: Callable[..., StandIn], tmp_path: Path
) -> None:
    module = install(version)
    onnx = write_onnx(tmp_path / "model.onnx")
    built = make(onnx)
    assert built.path.name == "model.tensorrt.engine"
    assert built.path.read_bytes() == f"plan of TensorRT {version}".encode()
    record = built.record
    assert (record.runtime, record.runtime_version, record.sm) == ("tensorrt", version, (87,))
    assert record.warnings == ("a warning of the stand-in",)
    assert record.proof is not None
    assert (record.proof.by, record.proof.products, record.proof.matched) == ("network", {"float32": 1}, 1)
    strongly = 1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert told(module) == {
        "Builder.create_network": (strongly,),
        "OnnxParser.parse_from_file": (str(onnx),),
        "IBuilderConfig.profiling_verbosity=": (module.ProfilingVerbosity.DETAILED,),
        "IBuilderConfig.clear_flag": (module.BuilderFlag.TF32,),
        "IBuilderConfig.create_timing_cache": (b"",),
        "IBuilderConfig.set_timing_cache": (told(module)["IBuilderConfig.set_timing_cache"][0], False),
        "IBuilderConfig.get_timing_cache": (),
    }
    assert make(onnx).reused


@pytest.mark.parametrize("version", GENERATIONS)
def test_settings_reach_each_generation(version: str, install: Callable[..., StandIn], tmp_path: Path) -> None:
    module = install(version)
    onnx = write_onnx(tmp_path / "model.onnx")
    preset = load_preset("low-memory")
    settings = msgspec.structs.replace(preset, workspace_mib=512, opt_level=4)
    record = make(onnx, settings=settings, precision="tf32", timing_cache="off").record
    seen = told(module)
    assert seen["IBuilderConfig.set_flag"] == (module.BuilderFlag.TF32,)
    assert seen["IBuilderConfig.set_memory_pool_limit"] == (module.MemoryPoolType.WORKSPACE, 512 << 20)
    assert seen["IBuilderConfig.builder_optimization_level="] == (4,)
    assert seen["IBuilderConfig.max_aux_streams="] == (0,)
    assert seen["IBuilderConfig.set_tactic_sources"] == (1 << int(module.TacticSource.JIT_CONVOLUTIONS),)
    assert "IBuilderConfig.create_timing_cache" not in seen
    assert (record.workspace_mib, record.opt_level, record.max_aux_streams) == (512, 4, 0)
    assert (record.tactic_sources, record.timing_cache) == (("JIT_CONVOLUTIONS",), "")


def test_tactic_source_of_another_generation_is_named(install: Callable[..., StandIn], tmp_path: Path) -> None:
    onnx = write_onnx(tmp_path / "model.onnx")
    settings = BuilderSettings(tactic_sources=("CUDNN",))
    install("10.3.0")
    make(onnx, settings=settings)
    install("11.4.1")
    with pytest.raises(InvalidSpec, match=r"TensorRT 11\.4\.1 has no tactic source 'CUDNN'; it has EDGE_MASK_CONV"):
        make(onnx, settings=settings)


@pytest.mark.parametrize(
    ("version", "owner", "name"),
    [
        ("11.4.1", "BuilderFlag", "FP16"),
        ("11.4.1", "BuilderFlag", "INT8"),
        ("11.4.1", "NetworkDefinitionCreationFlag", "EXPLICIT_BATCH"),
        ("11.4.1", "IBuilderConfig", "int8_calibrator"),
        ("11.4.1", "Builder", "platform_has_fast_fp16"),
        ("11.4.1", "ILayer", "precision"),
        ("10.3.0", "IBuilderConfig", "max_num_tactics"),
        ("10.3.0", "IBuilderConfig", "set_compute_capability"),
        ("10.3.0", "DataType", "FP4"),
    ],
)
def test_the_stand_in_refuses_what_is_not_there(version: str, owner: str, name: str) -> None:
    """The tests above could not see a forbidden call if the stand-in let it pass."""
    kind = getattr(stand_in(GENERATIONS[version], version), owner)
    assert not hasattr(kind, name)
    if not issubclass(kind, enum.Enum):
        one = kind.__new__(kind)
        with pytest.raises(AttributeError, match=rf"{owner}\.{name} is not in this TensorRT"):
            setattr(one, name, 1)
        with pytest.raises(AttributeError, match=name):
            getattr(one, name)


def test_the_stand_in_checks_arguments() -> None:
    config = stand_in("tensorrt-11", "11.4.1").IBuilderConfig()
    with pytest.raises(TypeError, match="ignore_mismatch"):
        config.set_timing_cache(object())
    with pytest.raises(TypeError, match="force"):
        config.set_timing_cache(object(), ignore_mismatch=False, force=True)


@rtx
def test_the_stub_of_rtx_tells_the_truth() -> None:
    """Every name of it is in the real module: the one generation that can be asked."""
    module, stub = load_flavour("rtx").module, stand_in("rtx-1", "1.7")
    names = [name for name in vars(stub) if isinstance(getattr(stub, name), type)]
    assert {"Builder", "IBuilderConfig", "ComputeCapability", "ITimingCache"} <= set(names)
    tree = ast.parse((STUBS / "rtx-1" / "tensorrt_rtx.pyi").read_text(encoding="utf-8"))
    missing = []
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or node.name == "_Enum":
            continue
        for item in node.body:
            name = getattr(item, "name", None) or getattr(getattr(item, "target", None), "id", "")
            if name and not hasattr(getattr(module, node.name), name):
                missing.append(f"{node.name}.{name}")
    # The buffer protocol of pybind11 shows no method before Python 3.12.
    assert [name for name in missing if name != "IHostMemory.__buffer__"] == []


def test_every_name_of_the_builder_is_in_each_stub() -> None:
    """Cheap, and for all files of the room: `trt.A.B` in the code is a name of each generation, and of RTX."""
    used = set()
    for path in sorted((ROOT / "edgecomp" / "engines").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and "(" not in ast.unparse(node):
                chain = ast.unparse(node).split(".")
                if chain[0] == "trt" or chain[:2] == ["flavour", "module"]:
                    used.add(tuple(chain[1:] if chain[0] == "trt" else chain[2:])[:2])
    used = {chain for chain in used if chain and not chain[-1].startswith("__")}
    assert ("BuilderFlag", "TF32") in used
    assert ("LayerType", "PLUGIN_V3") in used
    for generation in ("tensorrt-10.3", "tensorrt-11", "rtx-1"):
        module = stand_in(generation, "0")
        for chain in used:
            owner: Any = module
            for name in chain:
                assert hasattr(owner, name), f"{generation} has no {'.'.join(chain)}"
                owner = getattr(owner, name)


def test_versions_are_looked_at_in_one_file() -> None:
    """No version test, and no question which flavour it is, but in the adapter and where flavours are chosen."""
    marks = ("Version(", "flavour.name ==", "flavour.name !=", "runtime ==", 'in ("tensorrt", "rtx")')
    found = {
        path.name
        for path in (ROOT / "edgecomp" / "engines").glob("*.py")
        if any(mark in path.read_text(encoding="utf-8") for mark in marks)
    }
    assert found <= {"adapter.py", "flavour.py"}


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS.values())
def test_calls_type_check_against_each_stub(generation: str, tmp_path: Path) -> None:
    """Mypy, strict; and it finds a call of something removed, planted in a copy."""
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed; pip install -e '.[dev]' brings it")
    planted = tmp_path / "planted.py"
    text = (ROOT / "edgecomp" / "engines" / "adapter.py").read_text(encoding="utf-8")
    planted.write_text(
        text.replace("BuilderFlag.TF32", "BuilderFlag.FP128").replace("max_aux_streams =", "dla_cores =")
    )
    words = [
        "--config-file=", "--strict", "--python-version=3.10", "--no-warn-unused-ignores", "--follow-imports=silent",
        f"--cache-dir={tmp_path / 'cache'}",
    ]  # fmt: skip
    places = [str(STUBS / generation), str(STUBS / "rtx-1"), str(ROOT)]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            *words,
            "edgecomp/engines/adapter.py",
            "edgecomp/runners/tensorrt.py",
            str(planted),
        ],
        cwd=ROOT,
        env={"MYPYPATH": ":".join(places[:2]), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    lines = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert [line for line in lines if "planted" not in line] == []
    assert any('"type[BuilderFlag]" has no attribute "FP128"' in line for line in lines), done.stdout + done.stderr
    assert any('"IBuilderConfig" has no attribute "dla_cores"' in line for line in lines), done.stdout


# -- choosing among what is installed ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("local_sm", "message"), [(89, r"has SM89 here; orin has SM87"), (None, r"no GPU here; orin has SM87")]
)
def test_full_tensorrt_builds_for_the_local_gpu_only(
    local_sm: int | None, message: str, install: Callable[..., StandIn]
) -> None:
    install("10.3.0", local_sm)
    for runtime in ("auto", "tensorrt"):
        with pytest.raises(TargetMismatch, match=rf"{message}; Build on the AGX Orin itself"):
            choose_flavour(ORIN, runtime)


@pytest.mark.parametrize(("version", "fits"), [("10.2.0", False), ("10.3.0", True), ("12.0.1", False)])
def test_full_tensorrt_version_is_held_to_the_range(version: str, fits: bool, install: Callable[..., StandIn]) -> None:
    install(version)
    if fits:
        assert choose_flavour(ORIN) == "tensorrt"
        return
    with pytest.raises(TargetMismatch, match=rf"TensorRT {version} is installed, and orin needs >=10\.3,<12"):
        choose_flavour(ORIN)


@rtx
@pytest.mark.parametrize(("local_sm", "chosen"), [(89, "tensorrt"), (86, "rtx")])
def test_auto_prefers_full_tensorrt_where_it_fits(local_sm: int, chosen: str, install: Callable[..., StandIn]) -> None:
    install("11.1.0", local_sm)
    assert choose_flavour(load_target("rtx-4090")) == chosen


# -- what differs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "version", "bodies", "headers"),
    [("tensorrt", "10.3.0", True, 0), ("tensorrt", "10.7.0", False, 0), ("tensorrt", "11.0.0", False, 11),
     ("rtx", "1.7.1", False, 0)],
)  # fmt: skip
def test_rules_by_version(name: Any, version: str, bodies: bool, headers: int) -> None:
    one = adapter.Flavour(name, version, None)
    assert adapter.prefers_function_bodies(one) is bodies
    assert adapter.other_headers(one, 10) == headers
    assert adapter.other_headers(one, 8) == int("10" if name == "rtx" else version[:2])
    assert adapter.has_timing_cache(one) is (name == "tensorrt")


# -- the timing cache -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", GENERATIONS)
def test_timing_cache_is_read_written_and_recorded(
    version: str, install: Callable[..., StandIn], tmp_path: Path
) -> None:
    module = install(version)
    onnx = write_onnx(tmp_path / "model.onnx")
    file = tmp_path / "cache" / "timing" / f"orin.tensorrt-{version}.sm87.cache"
    assert make(onnx).record.timing_cache == "empty"
    assert file.read_bytes().endswith(b"\n+")
    again = make(onnx, force=True)
    assert told(module)["IBuilderConfig.create_timing_cache"] == (b"+",)
    assert file.read_bytes().endswith(b"\n++")
    assert len(again.record.timing_cache) == 64
    assert again.notes == ()
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda whole: whole[:-1], "it is damaged"),
        (lambda whole: whole[:-1] + b"?", "it is damaged"),
        (lambda whole: whole[:40], "it is damaged"),
        (lambda whole: b"\x00" * 100, "it is damaged"),
        (lambda whole: whole.replace(b"10.3.0", b"10.9.0"), r"by tensorrt 10\.9\.0 for SM87, .* 10\.3\.0 for SM87"),
        (lambda whole: whole.replace(b'"sm":87', b'"sm":89'), r"by tensorrt 10\.3\.0 for SM89, and this build .* SM87"),
        (lambda whole: whole.replace(b'"tensorrt"', b'"rtx"'), r"by rtx 10\.3\.0"),
    ],
)  # fmt: skip
def test_bad_timing_cache_is_left_out_with_a_word(
    damage: Callable[[bytes], bytes], message: str, install: Callable[..., StandIn], tmp_path: Path
) -> None:
    module = install("10.3.0")
    onnx = write_onnx(tmp_path / "model.onnx")
    make(onnx)
    file = next((tmp_path / "cache" / "timing").iterdir())
    file.write_bytes(damage(file.read_bytes()))
    said: list[str] = []
    built = make(onnx, force=True, progress=said.append)
    assert len(built.notes) == 1
    assert built.notes[0] in said
    assert re.search(message, built.notes[0])
    assert str(file) in built.notes[0]
    assert built.record.timing_cache == "empty"
    assert told(module)["IBuilderConfig.create_timing_cache"] == (b"",)
    assert file.read_bytes().endswith(b"\n+")


@pytest.mark.parametrize("how", ["refused", "complained"])
def test_timing_cache_that_tensorrt_refuses(how: str, install: Callable[..., StandIn], tmp_path: Path) -> None:
    """Another GPU of the same kind, or a damage that TensorRT alone sees: its words are no warnings of the engine."""
    module = install("11.4.1")
    onnx = write_onnx(tmp_path / "model.onnx")
    make(onnx)
    create, put = module.behave["IBuilderConfig.create_timing_cache"], module.behave["IBuilderConfig.set_timing_cache"]
    loggers = []
    start = module.behave["Builder.__init__"]
    module.behave["Builder.__init__"] = lambda self, logger: (loggers.append(logger), start(self, logger))[1]

    def complain(self: Any, content: bytes) -> Any:
        if content:
            loggers[-1].log(module.ILogger.Severity.ERROR, "Failed to deserialize timing cache")
            loggers[-1].log(module.ILogger.Severity.WARNING, "Returning an empty timing cache")
        return create(self, content)

    def refuse(self: Any, cache: Any, ignore_mismatch: bool) -> bool:
        return not cache._content and put(self, cache, ignore_mismatch)

    if how == "refused":
        module.behave["IBuilderConfig.set_timing_cache"] = refuse
    else:
        module.behave["IBuilderConfig.create_timing_cache"] = complain
    built = make(onnx, force=True)
    assert "TensorRT 11.4.1 refuses it on this GPU" in built.notes[0]
    assert ("Failed to deserialize" in built.notes[0]) == (how == "complained")
    assert built.record.timing_cache == "empty"
    assert built.record.warnings == ("a warning of the stand-in",)


def test_timing_cache_by_file_and_off(install: Callable[..., StandIn], tmp_path: Path) -> None:
    install("10.3.0")
    onnx = write_onnx(tmp_path / "model.onnx")
    mine, foreign = tmp_path / "mine.cache", tmp_path / "foreign.cache"
    assert make(onnx, timing_cache=str(mine)).record.timing_cache == "empty"
    assert mine.read_bytes().startswith(b"edgecomp timing cache {")
    foreign.write_bytes(b"ptrt of trtexec")
    with pytest.raises(BuildError, match=r"foreign\.cache is no timing cache of edgecomp.*replace it; name another"):
        make(onnx, timing_cache=str(foreign), force=True)
    assert foreign.read_bytes() == b"ptrt of trtexec"
    assert make(onnx, timing_cache="off", force=True).record.timing_cache == ""
    assert not (tmp_path / "cache").exists()


def test_timing_cache_on_a_full_disk_costs_a_line(
    install: Callable[..., StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("10.3.0")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "timing").write_bytes(b"a file where the folder should be")
    built = make(write_onnx(tmp_path / "model.onnx"))
    assert any("could not be written" in note and "times its tactics again" in note for note in built.notes)
    assert built.path.is_file()


@rtx
def test_rtx_has_no_timing_cache(tmp_path: Path) -> None:
    """Its builder times nothing; a file that is asked for all the same is refused, not ignored."""
    onnx = write_onnx(tmp_path / "model.onnx")
    target = load_target("rtx-4090")
    assert make(onnx, target=target, runtime="rtx").record.timing_cache == ""
    with pytest.raises(BuildError, match=r"--timing-cache t\.cache: TensorRT for RTX .* times nothing when it builds"):
        make(onnx, target=target, runtime="rtx", timing_cache="t.cache")


# -- the built engine -----------------------------------------------------------------------------------------------


def layers_json(dtype: str, *, io: str, name: str = "mm") -> str:
    """Return layer information as 10.x (`Bindings`) or 11.x (`I/O Tensors`) writes it."""
    tensor = {"Name": "x", "Location": "Device", "Dimensions": [2, 8], "Format/Datatype": dtype}
    layer = {
        "Name": "__myl_Fc_myl0_0", "LayerType": "gemm", "Inputs": [tensor], "Outputs": [{**tensor, "Name": "y"}],
        "TacticName": "sm80_xmma_gemm", "StreamId": 0, "Metadata": f"[ONNX Layer: other]\x1e[ONNX Layer: {name}]",
    }  # fmt: skip
    both = {
        "Bindings": ["x", "y"],
        "I/O Tensors": [{"Name": n, "IOMode": m, "DataType": "Half"} for n, m in (("x", "Input"), ("y", "Output"))],
    }
    return json.dumps({"Layers": [layer], io: both[io]})


@pytest.mark.parametrize(("version", "io"), [("10.3.0", "Bindings"), ("11.4.1", "I/O Tensors")])
@pytest.mark.parametrize("words", ["Half", "Row major linear FP16 format"])
def test_built_engine_confirms_the_proof(
    version: str, io: str, words: str, install: Callable[..., StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = install(version, dtype="HALF")
    monkeypatch.setattr(build, "local_gpu_sm", lambda: 87)
    onnx = write_onnx(tmp_path / "model.onnx", "FLOAT16")
    module.behave["Runtime.deserialize_cuda_engine"] = lambda self, plan: module.ICudaEngine()
    module.behave["ICudaEngine.create_engine_inspector"] = lambda self: module.EngineInspector()
    answer = [layers_json(words, io=io)]
    module.behave["EngineInspector.get_engine_information"] = lambda self, wanted: answer[0]
    options = {"precision": "fp16", "force": True, "force_memory": True}
    proof = make(onnx, **options).record.proof
    assert (proof.by, proof.in_engine, proof.products) == ("engine", 1, {"float16": 1})
    assert ("EngineInspector.get_engine_information", (module.LayerInformationFormat.JSON,)) in module.calls
    answer[0] = layers_json("Float", io=io)
    with pytest.raises(BuildError, match=r"'mm' is float16 in the network, and the built engine runs it in float32"):
        make(onnx, **options)
    answer[0] = layers_json(words, io=io, name="another")
    proof = make(onnx, **options).record.proof
    assert (proof.by, proof.in_engine) == ("network", 0)
    answer[0] = layers_json(words, io=io).replace('"y"', '"z"')
    with pytest.raises(BuildError, match=r"has no output 'y'; it has x, z"):
        make(onnx, **options)
    module.behave["Runtime.deserialize_cuda_engine"] = lambda self, plan: None
    assert make(onnx, **options).record.proof.by == "network"


# -- progress and Ctrl-C --------------------------------------------------------------------------------------------


def test_logger_of_each_generation_collects(install: Callable[..., StandIn]) -> None:
    for version in GENERATIONS:
        module = install(version)
        logger = collecting_logger(adapter.Flavour("tensorrt", version, module))
        logger.log(module.ILogger.Severity.ERROR, "bad")
        logger.log(module.ILogger.Severity.INFO, "chatter")
        assert (logger.errors, logger.warnings) == (["bad"], [])


def test_cancelled_build_leaves_nothing(
    install: Callable[..., StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The builder is asked to end at its next step, comes back, and only then Ctrl-C is raised."""
    module = install("10.3.0", steps=5)
    onnx = write_onnx(tmp_path / "model.onnx")
    steps = []
    step = build.Watch.step

    def interrupted(self: Any, phase: str, done: int, of: int) -> bool:
        steps.append((phase, done, of))
        if done == 2:
            self.stop()
        return step(self, phase, done, of)

    monkeypatch.setattr(build.Watch, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(onnx)
    assert steps == [("Timing tactics", 1, 5), ("Timing tactics", 2, 5)]
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "cache").exists()
    assert ("IBuilderConfig.get_timing_cache", ()) not in module.calls
