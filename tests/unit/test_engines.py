"""Engines: which TensorRT builds for which target, what is built, and when it is kept."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgecomp.engines import (
    BuilderSettings,
    BuiltEngine,
    EngineRecord,
    build,
    build_engine,
    choose_flavour,
    flavour,
    installed_flavours,
    load_flavour,
    local_gpu_sm,
    read_record,
    sidecar_path,
)
from edgecomp.errors import BuildError, InvalidSpec, MissingDependency, TargetMismatch, UnknownName
from edgecomp.specs.origin import file_sha256
from edgecomp.specs.target import Target

rtx = pytest.mark.skipif("rtx" not in installed_flavours(), reason="TensorRT for RTX is not installed")

RTX_ONLY = {"rtx": ">=1.2,<2"}
BOTH = {"tensorrt": ">=10.3,<12", "rtx": ">=1.2,<2"}
TENSORRT_ONLY = {"tensorrt": ">=10.3,<12"}


def make_target(**changes: Any) -> Target:
    """Return an RTX 4090 with some fields changed."""
    peak = {"value": 1.0, "source": "test", "confidence": "unverified", "sparsity": "dense"}
    fields: dict[str, Any] = {
        "schema": 1,
        "name": "rtx-4090",
        "title": "GeForce RTX 4090",
        "family": "workstation",
        "sm": 89,
        "runtimes": BOTH,
        "build_on": "any x86-64 machine with TensorRT for RTX",
        "precisions": ["fp32", "tf32", "fp16", "bf16", "int8", "fp8"],
        "memory_gib": 24.0,
        "shared_memory": False,
        "l2_mib": 72.0,
        "multiprocessors": 128,
        "peaks": {},
        "bandwidth_gb_s": peak,
        "power_modes": [],
    }
    return msgspec.convert(fields | changes, Target)


ORIN = make_target(name="orin-nano", sm=87, runtimes=TENSORRT_ONLY, build_on="build on the Orin Nano itself, JetPack 6")


@pytest.fixture
def without_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide every TensorRT."""
    monkeypatch.setattr(flavour, "_module_name", lambda name: "")


def write_onnx(path: Path, *, dtype: str = "FLOAT", external: bool = False, nodes: Any = None, batch: Any = 2) -> Path:
    """Write `y = x @ w`, or other nodes, at opset 20."""
    onnx = pytest.importorskip("onnx")
    np = pytest.importorskip("numpy")
    helper, kind = onnx.helper, getattr(onnx.TensorProto, dtype)
    weight = np.linspace(-1, 1, 64 * 32).reshape(64, 32)
    w = onnx.numpy_helper.from_array(weight.astype(helper.tensor_dtype_to_np_dtype(kind)), "w")
    graph = helper.make_graph(
        nodes or [helper.make_node("MatMul", ["x", "w"], ["y"], name="mm")],
        "graph",
        [helper.make_tensor_value_info("x", kind, [batch, 64])],
        [helper.make_tensor_value_info("y", kind, [batch, 32])],
        [w],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("edgecomp", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    if external:
        onnx.save(model, path, save_as_external_data=True, location="weights.data", size_threshold=0)
    else:
        onnx.save(model, path)
    return path


def make(onnx: Path, out: Path, **changes: Any) -> BuiltEngine:
    """Build with RTX in fp32, silently."""
    options: dict[str, Any] = {"target": make_target(), "runtime": "rtx", "precision": "fp32", "onnx_sha256": "a" * 64}
    if "workspace_mib" in changes:
        changes["settings"] = BuilderSettings(workspace_mib=changes.pop("workspace_mib"))
    return build_engine(onnx, out, **{"progress": lambda line: None} | options | changes)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An ONNX file whose stem holds dots, as those of a bundle do."""
    return write_onnx(tmp_path / "model.m64.b1.onnx")


@rtx
@pytest.mark.parametrize("sm", [86, 89, 120])
def test_rtx_builds_for_a_gpu_that_is_not_here(sm: int, model: Path, tmp_path: Path) -> None:
    """The plan and its record tell the same, and a forced rebuild gives the same bytes."""
    target = make_target(name="some-gpu", sm=sm, runtimes=RTX_ONLY)
    said: list[str] = []
    built = make(model, tmp_path / "out", target=target, runtime="auto", workspace_mib=256, progress=said.append)
    assert built.path == tmp_path / "out" / "model.m64.b1.rtx.engine"
    assert not built.reused
    assert f"SM{sm}" in said[0]
    record = read_record(built.path)
    assert record == built.record
    assert (record.model, record.target, record.sm) == ("model.m64.b1.onnx", "some-gpu", (sm,))
    assert (record.runtime, record.runtime_version) == ("rtx", load_flavour("rtx").version)
    assert (record.workspace_mib, record.precision, record.onnx_sha256) == (256, "fp32", "a" * 64)
    assert record.size_bytes == built.path.stat().st_size > 0
    assert record.sha256 == file_sha256(built.path)
    assert record.num_layers >= 1
    assert [(tensor.name, tensor.shape, tensor.dtype) for tensor in record.inputs] == [("x", (2, 64), "float32")]
    assert [(tensor.name, tensor.shape, tensor.dtype) for tensor in record.outputs] == [("y", (2, 32), "float32")]
    again = make(model, tmp_path / "out", target=target, workspace_mib=256, force=True)
    assert (again.reused, again.record.sha256) == (False, record.sha256)


@rtx
def test_external_data_is_found_beside_the_model(tmp_path: Path) -> None:
    """The weights come from the model's folder, and their absence is an error that names the file."""
    onnx = write_onnx(tmp_path / "model.onnx", external=True)
    assert (tmp_path / "weights.data").is_file()
    assert make(onnx, tmp_path / "out", weights_sha256="b" * 64).record.weights_sha256 == "b" * 64
    (tmp_path / "weights.data").unlink()
    with pytest.raises(BuildError, match=r"weights\.data"):
        make(onnx, tmp_path / "out")


@rtx
def test_unchanged_engine_is_kept(model: Path, tmp_path: Path) -> None:
    """The second build keeps the file and says so."""
    first = make(model, tmp_path)
    stamp = first.path.stat().st_mtime_ns
    said: list[str] = []
    second = make(model, tmp_path, progress=said.append)
    assert second.reused
    assert second.record == first.record
    assert second.path.stat().st_mtime_ns == stamp
    assert said == ["model.m64.b1.rtx.engine: kept, nothing changed since it was built"]


@rtx
@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("onnx_sha256", {"onnx_sha256": "c" * 64}),
        ("weights_sha256", {"weights_sha256": "c" * 64}),
        ("precision", {"precision": "tf32"}),
        ("workspace_mib", {"workspace_mib": 64}),
        ("opt_level", {"settings": BuilderSettings(opt_level=1)}),
        ("max_aux_streams", {"settings": BuilderSettings(max_aux_streams=0)}),
        ("tactic_sources", {"settings": BuilderSettings(tactic_sources=("JIT_CONVOLUTIONS",))}),
        ("fp32_nodes_sha256", {"fp32_nodes": ["mm"]}),
        ("sm", {"target": make_target(sm=86, precisions=["fp32", "tf32", "fp16", "bf16", "int8"])}),
        ("target", {"target": make_target(name="l4")}),
    ],
)
def test_changed_input_rebuilds(field: str, changes: dict[str, Any], model: Path, tmp_path: Path) -> None:
    """Each input by itself makes the engine stale, and the reason names it."""
    assert make(model, tmp_path).notes == ()
    said: list[str] = []
    built = make(model, tmp_path, progress=said.append, **changes)
    assert not built.reused
    assert any(note.startswith(f"built again: changed: {field}") for note in built.notes)  # in the report too
    assert re.search(rf"\(changed: {field}( \S+ -> \S+)?\)", said[0])
    assert make(model, tmp_path, **changes).reused


@rtx
def test_other_tensorrt_version_rebuilds(model: Path, tmp_path: Path) -> None:
    """A plan is tied to the version that built it."""
    first = make(model, tmp_path)
    write_record(first.path, runtime_version="1.2.0")
    assert not make(model, tmp_path).reused
    assert read_record(first.path) == msgspec.structs.replace(first.record, seconds=read_record(first.path).seconds)


@rtx
def test_altered_plan_rebuilds(model: Path, tmp_path: Path) -> None:
    """One other byte, and the plan is built again."""
    first = make(model, tmp_path)
    content = bytearray(first.path.read_bytes())
    content[-1] ^= 1
    first.path.write_bytes(content)
    said: list[str] = []
    assert not make(model, tmp_path, progress=said.append).reused
    assert "not the one that its record describes" in said[0]
    assert file_sha256(first.path) == first.record.sha256


@rtx
def test_plan_without_a_record_is_replaced(model: Path, tmp_path: Path) -> None:
    """A leftover plan is no engine."""
    first = make(model, tmp_path)
    sidecar_path(first.path).unlink()
    assert not make(model, tmp_path).reused
    assert read_record(first.path).sha256 == first.record.sha256


@rtx
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("after", [0, 1])
def test_interrupted_write_leaves_nothing(
    error: BaseException, after: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped half-way through the plan or the record: no file is left, and an engine from before is whole."""
    write, calls = build._write, []

    def interrupted(path: Path, content: Any) -> None:
        calls.append(path)
        write(path, bytes(content)[:10] if len(calls) > after else content)
        if len(calls) > after:
            raise error

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(build, "_write", interrupted)
        with pytest.raises((KeyboardInterrupt, BuildError), match=r"^$|No space left on device"):
            make(model, out)
    assert not out.exists()
    first = make(model, out)
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(build, "_write", interrupted)
        with pytest.raises((KeyboardInterrupt, BuildError)):
            make(model, out, force=True)
    assert sorted(out.iterdir()) == [first.path, sidecar_path(first.path)]
    assert make(model, out).reused


@rtx
def test_interruption_between_the_two_files_is_no_engine(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new plan never stands beside the record of an old one."""
    first = make(model, tmp_path)
    replace, calls = os.replace, []

    def interrupted(source: Path, destination: Path) -> None:
        calls.append(destination)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(model, tmp_path, force=True)
    assert sorted(tmp_path.iterdir()) == [model, first.path]
    with pytest.raises(BuildError, match=r"model\.m64\.b1\.rtx\.engine"):
        read_record(first.path)
    assert not make(model, tmp_path).reused


@rtx
def test_op_that_does_not_parse_is_named(tmp_path: Path) -> None:
    """Node, op and the parser's own words stand in the error."""
    helper = pytest.importorskip("onnx").helper
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="mm"),
        helper.make_node("Frobnicate", ["h"], ["y"], name="the_culprit", domain="edgecomp"),
    ]
    onnx = write_onnx(tmp_path / "model.onnx", nodes=nodes)
    with pytest.raises(BuildError, match=r"model\.onnx.*'the_culprit' \(Frobnicate\).*[Pp]lugin") as caught:
        make(onnx, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "None" not in str(caught.value)


@rtx
def test_op_that_does_not_build_carries_the_reason(tmp_path: Path) -> None:
    """A parsed graph that TensorRT cannot build: the builder's last error is in the text."""
    onnx = pytest.importorskip("onnx")
    helper, kinds = onnx.helper, onnx.TensorProto
    graph = helper.make_graph(
        [helper.make_node("TopK", ["x", "k"], ["v", "i"], name="too_many")],
        "graph",
        [helper.make_tensor_value_info("x", kinds.FLOAT, [1, 6000])],
        [
            helper.make_tensor_value_info("v", kinds.FLOAT, [1, 5000]),
            helper.make_tensor_value_info("i", kinds.INT64, [1, 5000]),
        ],
        [helper.make_tensor("k", kinds.INT64, [1], [5000])],
    )
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "topk.onnx")
    with pytest.raises(BuildError, match=r"topk\.onnx.*too_many.*3840"):
        make(tmp_path / "topk.onnx", tmp_path / "out")


@rtx
def test_dynamic_dimension_is_refused(tmp_path: Path) -> None:
    """A symbolic batch has no engine."""
    onnx = write_onnx(tmp_path / "model.onnx", batch="batch")
    with pytest.raises(BuildError, match=r"input 'x' has the shape \[-1, 64\]"):
        make(onnx, tmp_path / "out")


@rtx
def test_precision_is_that_of_the_graph(tmp_path: Path) -> None:
    """A word that the graph does not keep is refused, in both directions."""
    half = write_onnx(tmp_path / "half.onnx", dtype="FLOAT16")
    single = write_onnx(tmp_path / "single.onnx")
    assert make(half, tmp_path, precision="fp16").record.inputs[0].dtype == "float16"
    with pytest.raises(BuildError, match=r"precision fp32 .* none of the 2 layers gives float32; they give float16"):
        make(half, tmp_path, precision="fp32")
    with pytest.raises(BuildError, match=r"precision fp16 .* gives float16; they give float32"):
        make(single, tmp_path, precision="fp16")
    with pytest.raises(TargetMismatch, match=r"rtx-4090 \(SM89\) does not run fp4; it runs fp32, tf32"):
        make(single, tmp_path, precision="fp4")


@rtx
def test_reduced_layer_in_fp32_is_named(tmp_path: Path) -> None:
    """One fp16 island in an fp32 graph is not fp32."""
    helper = pytest.importorskip("onnx").helper
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="mm"),
        helper.make_node("Cast", ["h"], ["half"], name="to_half", to=10),
        helper.make_node("Relu", ["half"], ["r"], name="in_half"),
        helper.make_node("Cast", ["r"], ["y"], name="to_single", to=1),
    ]
    onnx = write_onnx(tmp_path / "island.onnx", nodes=nodes)
    with pytest.raises(BuildError, match=r"precision fp32 was asked for, and layer 'to_half' gives float16"):
        make(onnx, tmp_path)
    proof = make(onnx, tmp_path, precision="fp16", fp32_nodes=["mm"]).record.proof
    assert proof is not None
    assert (proof.products, proof.islands) == ({"float32": 1}, ("mm",))


@rtx
def test_turing_has_no_fp32_product_in_rtx(model: Path, tmp_path: Path) -> None:
    """RTX 1.7 refuses fp32 matrix products on SM75 late in the build; we refuse them before it. fp16 builds."""
    turing = make_target(name="t4", sm=75, runtimes=RTX_ONLY, precisions=["fp32", "fp16", "int8"])
    half = write_onnx(tmp_path / "half.onnx", dtype="FLOAT16")
    assert make(half, tmp_path, precision="fp16", target=turing).record.sm == (75,)
    with pytest.raises(BuildError, match=r"no fp32 matrix product for t4 \(SM75"):
        make(model, tmp_path, target=turing)
    with pytest.raises(TargetMismatch, match=r"t4 \(SM75\) does not run bf16"):
        make(half, tmp_path, precision="bf16", target=turing)


@rtx
def test_garbage_is_no_model(tmp_path: Path) -> None:
    """A file that is no ONNX has no node to name."""
    (tmp_path / "model.onnx").write_bytes(b"garbage")
    with pytest.raises(BuildError, match=r"Failed to parse the ONNX model.*Export the model again"):
        make(tmp_path / "model.onnx", tmp_path)


@rtx
def test_missing_model_is_named(tmp_path: Path) -> None:
    """The path stands in the error."""
    with pytest.raises(BuildError, match=r"there is no file .*absent\.onnx"):
        make(tmp_path / "absent.onnx", tmp_path)


@rtx
def test_rtx_without_the_compute_capability(model: Path, tmp_path: Path) -> None:
    """A target file that promises too much meets the list of what the installed RTX has."""
    with pytest.raises(TargetMismatch, match=r"no compute capability SM87; it has SM75, SM80"):
        make(model, tmp_path, target=make_target(sm=87, runtimes=RTX_ONLY))


@pytest.mark.parametrize(("name", "sm"), [("orin-nano", 87), ("h100", 90), ("thor", 110)])
def test_rtx_is_refused_where_it_has_no_such_gpu(name: str, sm: int, tmp_path: Path) -> None:
    """The error tells which machine can build."""
    target = make_target(name=name, sm=sm, runtimes=TENSORRT_ONLY, build_on=f"build on the {name} itself")
    message = rf"TensorRT for RTX does not build for {name} \(SM{sm}\), TensorRT does; build on the {name} itself"
    with pytest.raises(TargetMismatch, match=message):
        choose_flavour(target, "rtx")
    with pytest.raises(TargetMismatch, match=message):
        make(tmp_path / "never.read", tmp_path, target=target)


@pytest.mark.parametrize("runtime", ["auto", "rtx", "tensorrt"])
def test_estimate_only_target_is_refused(runtime: str) -> None:
    """No TensorRT of today builds for Xavier."""
    xavier = make_target(name="agx-xavier", sm=72, runtimes={}, build_on="nowhere: TensorRT 8.5 was the last for SM72")
    with pytest.raises(TargetMismatch, match=r"agx-xavier \(SM72\).*estimates only.*8\.5"):
        choose_flavour(xavier, runtime)


def test_unknown_runtime_lists_the_known() -> None:
    """A misspelt runtime is neither ignored nor guessed."""
    with pytest.raises(UnknownName, match=r"'tensorrt'\? Known: auto, tensorrt, rtx"):
        choose_flavour(make_target(), "tensorr")
    with pytest.raises(UnknownName, match="'auto'"):
        load_flavour("auto")


@pytest.mark.usefixtures("without_tensorrt")
@pytest.mark.parametrize(
    ("target", "runtime", "extra"),
    [(ORIN, "auto", "gpu"), (make_target(), "auto", "rtx"), (make_target(), "tensorrt", "gpu")],
)
def test_no_tensorrt_names_the_extra(target: Target, runtime: str, extra: str) -> None:
    """What to install, and for a board also where to build."""
    with pytest.raises(MissingDependency, match=rf"for {target.name} \(SM.*{target.build_on}.*edgecomp\[{extra}\]"):
        choose_flavour(target, runtime)
    with pytest.raises(MissingDependency, match=r"edgecomp\[rtx\]"):
        load_flavour("rtx")
    assert installed_flavours() == ()


@rtx
def test_rtx_outside_the_range_is_refused() -> None:
    """The range of the target file holds, and a range that is none is named."""
    version = load_flavour("rtx").version
    with pytest.raises(TargetMismatch, match=rf"TensorRT for RTX {version} is installed, and rtx-4090 needs <1\.2"):
        choose_flavour(make_target(runtimes={"rtx": "<1.2"}))
    with pytest.raises(InvalidSpec, match=r"runtimes\.rtx = 'newest'"):
        choose_flavour(make_target(runtimes={"rtx": "newest"}))


def test_broken_installation_is_no_missing_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module whose library does not load: the loader's words are kept."""
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt" / "__init__.py").write_text("raise ImportError('libnvinfer.so.10: cannot open')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(BuildError, match=r"'tensorrt' is installed but cannot be imported: libnvinfer\.so\.10"):
        load_flavour("tensorrt")


def test_folder_of_that_name_is_no_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder `tensorrt` in the working directory is importable, and no TensorRT."""
    before = installed_flavours()
    (tmp_path / "tensorrt").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    assert installed_flavours() == before


def write_record(engine: Path, **changes: Any) -> None:
    """Change fields of the record beside an engine."""
    path = sidecar_path(engine)
    path.write_bytes(msgspec.json.encode(msgspec.json.decode(path.read_bytes()) | changes))


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """An engine of no content with a record that can be read."""
    path = tmp_path / "model.rtx.engine"
    path.write_bytes(b"plan")
    record = EngineRecord(
        schema=1, model="model.onnx", onnx_sha256="a" * 64, weights_sha256="", target="rtx-4090", runtime="rtx",
        runtime_version="1.7.1", sm=(89,), precision="fp16", workspace_mib=0, seconds=1.5, num_layers=3, size_bytes=4,
        sha256="b" * 64, warnings=("beware",), inputs=(), outputs=(), edgecomp_version="0.1.0",
    )  # fmt: skip
    sidecar_path(path).write_bytes(msgspec.json.encode(record))
    assert read_record(path) == record
    return path


def test_newer_record_is_refused_by_number(engine: Path) -> None:
    """Also when it has fields that are not known here."""
    write_record(engine, schema=7, colour="green")
    with pytest.raises(BuildError, match=r"has schema 7, and this edgecomp reads up to 1"):
        read_record(engine)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "no record of an engine"), (b"[]", "no record"), (b'{"schema": 1}', "`model`"), (b"\xff", "no record")],
)
def test_broken_record_is_refused(content: bytes, message: str, engine: Path) -> None:
    """Truncated, of another kind, incomplete, or no text at all."""
    sidecar_path(engine).write_bytes(content)
    with pytest.raises(BuildError, match=message):
        read_record(engine)


def test_unknown_field_and_missing_record_are_refused(engine: Path) -> None:
    """A field that nobody knows, and no file."""
    write_record(engine, colour="green")
    with pytest.raises(BuildError, match="`colour`"):
        read_record(engine)
    sidecar_path(engine).unlink()
    with pytest.raises(BuildError, match=r"model\.rtx\.json .*No such file"):
        read_record(engine)


def test_a_folder_that_cannot_be_written_is_refused_before_the_build(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgecomp.engines import build as module

    monkeypatch.setattr(module, "_build_plan", lambda job, label: pytest.fail("minutes were spent"))
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match=r"file/engines cannot be written: Not a directory; copy the bundle to"):
        make(model, tmp_path / "file" / "engines")


def test_local_gpu_is_a_number_or_none() -> None:
    """No driver is no error."""
    sm = local_gpu_sm()
    assert sm is None or 50 <= sm <= 200


def test_importing_the_room_loads_nothing_heavy() -> None:
    """Neither a TensorRT nor torch nor onnx comes with the import, nor with asking what is installed."""
    code = (
        "import sys, edgecomp.engines as e; e.installed_flavours();"
        "print(sorted({name.split('.')[0] for name in sys.modules} & "
        "{'torch', 'onnx', 'numpy', 'polygraphy', 'tensorrt', 'tensorrt_rtx', 'tensorrt_rtx_bindings'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
