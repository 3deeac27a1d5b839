"""Engines as a runner: parity, profile, run and verify of plans, behind a driver and a TensorRT that stand in.

The driver is the one of the C++ runner's tests: host memory, strict about addresses, and it ends the process where
memory or a context is left over. TensorRT is made from the stubs of each generation; a plan is a text here, and the
bundle's graph runs in ONNX Runtime on the addresses that the runner set.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from stand_in import GENERATIONS, NATIVE, StandIn, compile_cpp, stand_in

from edgecomp import api, engines
from edgecomp.bundle import WEIGHTS, open_bundle
from edgecomp.engines import Flavour, gpu, installed_flavours
from edgecomp.engines.find import build_form
from edgecomp.engines.nodes import read_graph
from edgecomp.engines.record import EnginePlugin, EngineRecord, EngineTensor
from edgecomp.errors import InvalidSpec, MissingDependency, RunError, TargetMismatch
from edgecomp.runners import open_runner, tensorrt

TYPES = {"float32": "FLOAT", "int64": "INT64", "int32": "INT32", "bool": "BOOL"}


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The driver's stand-in, loaded."""
    library = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    return ctypes.CDLL(str(compile_cpp(library, "-shared", "-fPIC", NATIVE / "tensorrt_on_host" / "cuda.cpp")))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of tome on given tokens."""
    pytest.importorskip("torch")
    out = tmp_path_factory.mktemp("exported") / "bundle"
    return api.export("tome", preset="smoke-given", budget=[12], batch=[2], out=out).bundle


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A copy with a plan for SM86 and its record."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    for file in exported.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    for graph in open_bundle(folder).manifest.graphs:
        write_plan(folder, graph, "tensorrt", "10.3.0")
    return folder


def write_plan(folder: Path, graph: Any, runtime: str, version: str, **changes: Any) -> Path:
    """Write what stands for a plan of a graph, and its record."""
    opened = open_bundle(folder)
    place = folder / "engines" / "a10"
    place.mkdir(parents=True, exist_ok=True)
    plan = place / f"{Path(graph.model).stem}.{runtime}.engine"
    plan.write_bytes(f"plan of {graph.model}".encode())

    def tensors(specs: Any) -> tuple[EngineTensor, ...]:
        return tuple(EngineTensor(spec.name, spec.shape, spec.dtype) for spec in specs)

    fields: dict[str, Any] = {
        "schema": 1, "model": graph.model, "onnx_sha256": opened.file(graph.model).sha256,
        "weights_sha256": opened.file(WEIGHTS).sha256, "target": "a10", "runtime": runtime, "runtime_version": version,
        "sm": (86,), "precision": "fp32", "workspace_mib": 0, "seconds": 0.5, "num_layers": 1,
        "size_bytes": plan.stat().st_size, "sha256": hashlib.sha256(plan.read_bytes()).hexdigest(), "warnings": (),
        "inputs": tensors(graph.inputs), "outputs": tensors(graph.outputs), "edgecomp_version": "0",
    }  # fmt: skip
    plan.with_suffix(".json").write_bytes(msgspec.json.encode(EngineRecord(**fields | changes)))
    return plan


def run_by_graph(module: StandIn, folder: Path) -> None:
    """Let the stand-in run the graph that a plan names, on the addresses that it was given."""
    import onnxruntime

    def engine_of(_: object, plan: bytes) -> Any:
        name = bytes(plan).decode().removeprefix("plan of ")
        graph = next(graph for graph in open_bundle(folder).manifest.graphs if graph.model == name)
        made = module.ICudaEngine()
        specs = {spec.name: (spec, True) for spec in graph.inputs} | {
            spec.name: (spec, False) for spec in graph.outputs
        }
        object.__setattr__(made, "num_io_tensors", len(specs))
        module.behave |= {
            "ICudaEngine.get_tensor_name": lambda _, index: list(specs)[index],
            "ICudaEngine.get_tensor_mode": lambda _, name: module.TensorIOMode["INPUT" if specs[name][1] else "OUTPUT"],
            "ICudaEngine.get_tensor_shape": lambda _, name: specs[name][0].shape,
            "ICudaEngine.get_tensor_dtype": lambda _, name: module.DataType[TYPES[specs[name][0].dtype]],
            "ICudaEngine.create_execution_context": lambda _: module.IExecutionContext(),
        }
        session = onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])
        addresses: dict[str, int] = {}

        def at(spec: Any) -> np.ndarray:
            size = int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize
            raw = (ctypes.c_char * size).from_address(addresses[spec.name])
            return np.frombuffer(raw, spec.dtype).reshape(spec.shape)

        def run(_: object, stream_handle: int) -> bool:
            assert stream_handle
            outputs = session.run(None, {spec.name: at(spec) for spec in graph.inputs})
            for spec, array in zip(graph.outputs, outputs, strict=True):
                at(spec)[...] = array
            return True

        module.behave |= {
            "IExecutionContext.set_tensor_address": lambda _, name, memory: addresses.update({name: memory}) is None,
            "IExecutionContext.execute_async_v3": run,
        }
        return made

    module.behave["Runtime.deserialize_cuda_engine"] = engine_of


@pytest.fixture
def here(driver: Any, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """TensorRT 10.3 and a GPU of SM86 in this process."""
    module = stand_in("tensorrt-10.3", "10.3.0")
    run_by_graph(module, bundle)
    monkeypatch.setattr(gpu, "_driver", lambda: driver)
    monkeypatch.setattr(tensorrt, "load_flavour", lambda name: Flavour(name, "10.3.0", module))
    return module


def test_parity_of_engines(here: StandIn, bundle: Path) -> None:
    report = api.parity(bundle, runner="tensorrt", self_test=True)
    assert report
    assert report.version == "TensorRT 10.3.0"
    assert {row.output for row in report.outputs} >= {"merged", "source_map"}
    assert {test.test for test in report.self_tests} == {"duplicate rows", "repeated run", "threads"}
    names = [name for name, _ in here.calls]
    assert names.count("IExecutionContext.execute_async_v3") >= 3
    assert api.parity(bundle, runner="onnxruntime:1", against="tensorrt")


@pytest.mark.parametrize(("version", "generation"), GENERATIONS.items())
def test_each_generation_has_what_is_called(
    here: StandIn, bundle: Path, version: str, generation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = stand_in(generation, version)
    run_by_graph(module, bundle)
    for graph in open_bundle(bundle).manifest.graphs:
        write_plan(bundle, graph, "tensorrt", version)
    monkeypatch.setattr(tensorrt, "load_flavour", lambda name: Flavour(name, version, module))
    assert api.parity(bundle, runner="tensorrt")


def test_a_wrong_engine_fails_parity(here: StandIn, bundle: Path) -> None:
    """What the engine gives is what is judged: swap two inputs' rows behind the runner's back."""
    run = here.behave["Runtime.deserialize_cuda_engine"]

    def wrong(owner: object, plan: bytes) -> Any:
        made = run(owner, plan)
        inner = here.behave["IExecutionContext.execute_async_v3"]
        addresses: dict[str, int] = {}
        put = here.behave["IExecutionContext.set_tensor_address"]

        def remember(me: object, name: str, memory: int) -> bool:
            addresses[name] = memory
            return bool(put(me, name, memory))

        def off(me: object, stream_handle: int) -> bool:
            inner(me, stream_handle)
            (ctypes.c_float * 1).from_address(addresses["merged"])[0] += 1.0
            return True

        here.behave["IExecutionContext.set_tensor_address"] = remember
        here.behave["IExecutionContext.execute_async_v3"] = off
        return made

    here.behave["Runtime.deserialize_cuda_engine"] = wrong
    report = api.parity(bundle, runner="tensorrt")
    assert not report
    assert [row.output for row in report.outputs if not row] == ["merged", "merged"]


def launched_on_the_stream(here: StandIn, driver: Any) -> list[str]:
    """Let executions go through the driver's stream, which records them where a graph is made; return their log."""
    load, log = here.behave["Runtime.deserialize_cuda_engine"], []
    kept: list[Any] = []
    work_type = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

    def deserialize(owner: object, plan: bytes) -> Any:
        made = load(owner, plan)
        execute = here.behave["IExecutionContext.execute_async_v3"]

        def enqueue(me: object, stream_handle: int) -> bool:
            log.append("enqueued")

            def work(_: Any) -> None:
                log.append("ran")
                execute(me, stream_handle)

            kept.append(work_type(work))
            driver.fakeLaunch(ctypes.c_void_p(stream_handle), kept[-1], None)
            return True

        here.behave["IExecutionContext.execute_async_v3"] = enqueue
        return made

    here.behave["Runtime.deserialize_cuda_engine"] = deserialize
    return log


def test_cuda_graph_is_recorded_once_and_launched_from_then_on(here: StandIn, driver: Any, bundle: Path) -> None:
    log = launched_on_the_stream(here, driver)
    (graph, *_) = open_bundle(bundle).manifest.buckets
    random = np.random.default_rng(0)
    tensors = {spec.name: random.standard_normal(spec.shape).astype(spec.dtype) for spec in graph.inputs}
    with open_runner("tensorrt", bundle / graph.model, threads=0, cuda_graph=True) as runner:
        first = runner.infer(tensors)
        assert log == ["enqueued", "ran", "enqueued"]  # once as it is, once into the record
        second, third = runner.infer(tensors), runner.infer({name: 2 * one for name, one in tensors.items()})
        assert log[3:] == ["ran", "ran"]
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert not np.array_equal(third["merged"], first["merged"])


def test_execution_that_cannot_be_recorded(here: StandIn, driver: Any, bundle: Path) -> None:
    log = launched_on_the_stream(here, driver)
    (graph, *_) = open_bundle(bundle).manifest.buckets
    tensors = {spec.name: np.ones(spec.shape, spec.dtype) for spec in graph.inputs}
    with open_runner("tensorrt", bundle / graph.model, threads=0, cuda_graph=True) as runner:
        enqueue = here.behave["IExecutionContext.execute_async_v3"]
        here.behave["IExecutionContext.execute_async_v3"] = lambda me, handle: not log and enqueue(me, handle)
        with pytest.raises(RunError, match=r"TensorRT 10\.3\.0 did not run model\.m12\.b2\.tensorrt\.engine"):
            runner.infer(tensors)
        here.behave["IExecutionContext.execute_async_v3"] = enqueue
        assert runner.infer(tensors)  # the stream records no longer


def test_profile_of_engines_in_streams_by_graph_and_by_parts(here: StandIn, bundle: Path) -> None:
    (one,) = api.profile(
        bundle, runner="tensorrt", duration_s=0.01, cuda_graph=True, streams=2, mode="multi-stream"
    ).profiles
    assert (one.mode, one.streams, one.cuda_graph) == ("multi-stream", 2, True)
    loads = [name for name, _ in here.calls if name == "Runtime.deserialize_cuda_engine"]
    assert len(loads) == 2  # a context, buffers and a stream of its own for each
    assert {stage.name: stage.p50_us for stage in one.stages} == {
        "host to device": 250.0, "engine": 250.0, "device to host": 250.0,
    }  # fmt: skip
    assert all(stage.how == "by the GPU's events, 50 runs" for stage in one.stages)


def test_layers_of_an_engine_by_its_profiler(here: StandIn, bundle: Path) -> None:
    (graph,) = open_bundle(bundle).manifest.buckets
    (node,) = [node for node in read_graph(bundle / graph.model).nodes if node.domain == "edgecomp"]
    load, runs = here.behave["Runtime.deserialize_cuda_engine"], []

    def deserialize(owner: object, plan: bytes) -> Any:
        made = load(owner, plan)
        execute = here.behave["IExecutionContext.execute_async_v3"]

        def enqueue(me: Any, stream_handle: int) -> bool:
            if "profiler" in vars(me):
                runs.append(me)
                me.profiler.report_layer_time("topk_merge", 0.25 if len(runs) > 3 else 9.0)
                me.profiler.report_layer_time("reformat", 0.75 if len(runs) > 3 else 9.0)
            return bool(execute(me, stream_handle))

        here.behave["IExecutionContext.execute_async_v3"] = enqueue
        return made

    layer = {"Name": "topk_merge", "LayerType": "PluginV3", "Metadata": f"[ONNX Layer: {node.name}]"}
    here.behave |= {
        "Runtime.deserialize_cuda_engine": deserialize,
        "ICudaEngine.create_engine_inspector": lambda _: here.EngineInspector(),
        "EngineInspector.get_engine_information": lambda _, kind: json.dumps({"Layers": [layer]}),
    }
    result = api.profile(bundle, runner="tensorrt", duration_s=0.01, per_layer=True)
    assert [(one.name, one.op, one.part, one.us, one.share) for one in result.layers] == [
        ("topk_merge", "PluginV3", "merge", 250.0, 0.25), ("reformat", "", "", 750.0, 0.75),
    ]  # fmt: skip
    assert len(runs) == 23
    stages = {stage.name: stage.p50_us for stage in result.profiles[0].stages}
    assert stages["merge"] == pytest.approx(result.profiles[0].p50_us / 4)
    assert stages["encoder"] == pytest.approx(result.profiles[0].p50_us * 3 / 4)


def test_profile_and_run_of_engines(here: StandIn, bundle: Path, tmp_path: Path) -> None:
    (one,) = api.profile(bundle, runner="tensorrt", duration_s=0.05).profiles
    assert one.runner == "TensorRT 10.3.0"
    (bucket,) = open_bundle(bundle).manifest.buckets
    tensors = {spec.name: np.ones(spec.shape, spec.dtype) for spec in bucket.inputs}
    np.savez(tmp_path / "in.npz", **tensors)
    here_run, there = (
        api.run(bundle, tmp_path / "in.npz", batch=2, runner=runner) for runner in ("tensorrt", "onnxruntime")
    )
    assert all(np.array_equal(here_run.outputs[name], there.outputs[name]) for name in there.outputs)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"runtime_version": "10.13.2"}, r"built by TensorRT 10\.13\.2, and TensorRT 10\.3\.0 is here"),
        ({"sm": (89,)}, r"built for a10 \(SM89\), and the GPU here is SM86"),
        ({"onnx_sha256": "0" * 64}, r"another graph or other weights"),
        ({"sha256": "0" * 64}, r"plan and record are not of the same build"),
        ({"plugins": (EnginePlugin("topk_merge", "TopKMerge", "1", "libx.so", "a" * 64, (86,), "10.3", "12.2"),)},
         r"needs the library libx\.so \(aaaaaaaaaaaa\), which was not compiled on this machine"),
    ],
)  # fmt: skip
def test_an_engine_that_does_not_run_here_is_named(here: StandIn, bundle: Path, changes: Any, said: str) -> None:
    for graph in open_bundle(bundle).manifest.graphs:
        write_plan(bundle, graph, "tensorrt", "10.3.0", **changes)
    with pytest.raises(TargetMismatch, match=rf"no engine of model.*{said}.*edgecomp build"):
        api.parity(bundle, runner="tensorrt")


def test_without_engines(here: StandIn, bundle: Path) -> None:
    for file in (bundle / "engines" / "a10").iterdir():
        file.unlink()
    with pytest.raises(TargetMismatch, match=r"TensorRT 10\.3\.0, SM86\): there is none\. Build it: edgecomp build"):
        api.parity(bundle, runner="tensorrt")


def test_record_and_plan_that_disagree_about_tensors(here: StandIn, bundle: Path) -> None:
    for graph in open_bundle(bundle).manifest.graphs:
        write_plan(bundle, graph, "tensorrt", "10.3.0", outputs=(EngineTensor("other", (1, 2), "float32"),))
    with pytest.raises(RunError, match=r"has the outputs .*merged float32.*record says other float32 \[1, 2\]"):
        api.parity(bundle, runner="tensorrt")


@pytest.mark.parametrize("call", ["Runtime.deserialize_cuda_engine", "ICudaEngine.create_execution_context"])
def test_tensorrt_refuses(here: StandIn, bundle: Path, call: str) -> None:
    whole = here.behave["Runtime.deserialize_cuda_engine"]

    def refuse(owner: object, plan: bytes) -> Any:
        made = whole(owner, plan)
        here.behave["ICudaEngine.create_execution_context"] = lambda _: None
        return None if call.startswith("Runtime") else made

    here.behave["Runtime.deserialize_cuda_engine"] = refuse
    with pytest.raises(RunError, match=r"TensorRT 10\.3\.0 does not take .*engine: it gives no reason"):
        api.parity(bundle, runner="tensorrt")


@pytest.mark.parametrize(
    ("failing", "said"),
    [
        ("cuMemAlloc_v2 2", r"the GPU has no room for \d+ bytes \(CUDA_ERROR_OUT_OF_MEMORY\)"),
        ("cuStreamSynchronize 999", r"says CUDA_ERROR_UNKNOWN \(999\) to cuStreamSynchronize"),
        ("cuStreamCreate 77", r"says an error without a name \(77\) to cuStreamCreate"),
    ],
)
def test_the_driver_refuses(
    here: StandIn, bundle: Path, failing: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CUDA_FAIL", failing)
    with pytest.raises(RunError, match=said):
        api.parity(bundle, runner="tensorrt")


def test_inputs_are_held_to_the_engine(here: StandIn, bundle: Path) -> None:
    (bucket,) = open_bundle(bundle).manifest.buckets
    given: dict[str, Any] = {spec.name: np.ones(spec.shape, spec.dtype) for spec in bucket.inputs}
    name = bucket.inputs[0].name
    with open_runner("tensorrt", bundle / bucket.model, threads=0) as runner:
        with pytest.raises(RunError, match=rf"takes {name}.*was given nothing"):
            runner.infer({"nothing": given[name]})
        with pytest.raises(RunError, match=rf"takes '{name}' as float32.*was given float64"):
            runner.infer(given | {name: given[name].astype(np.float64)})
        first = runner.infer(given)
        again = runner.infer(given)
    assert all(first[key].tobytes() == again[key].tobytes() for key in first)
    with pytest.raises(RunError, match="is closed"):
        runner.infer(given)


def test_threads_take_turns(here: StandIn, bundle: Path) -> None:
    """There is one set of buffers: what one thread put there, no other may overwrite before it has its answer."""
    (bucket,) = open_bundle(bundle).manifest.buckets
    random = np.random.default_rng(0)
    requests = [
        {spec.name: random.standard_normal(spec.shape).astype(spec.dtype) for spec in bucket.inputs} for _ in range(4)
    ]
    with open_runner("tensorrt", bundle / bucket.model, threads=0) as runner:
        alone = [runner.infer(request) for request in requests]
        inner = here.behave["IExecutionContext.execute_async_v3"]
        here.behave["IExecutionContext.execute_async_v3"] = lambda me, stream_handle: (
            time.sleep(0.005) or inner(me, stream_handle)
        )
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(runner.infer, requests * 3))
    for seen, expected in zip(together, alone * 3, strict=True):
        assert all(np.array_equal(seen[name], expected[name]) for name in expected)


def test_without_a_gpu_or_tensorrt(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_driver", lambda: None)
    monkeypatch.setattr(tensorrt, "load_flavour", lambda name: Flavour(name, "10.3.0", SimpleNamespace()))
    with pytest.raises(RunError, match="no NVIDIA GPU can be used here"):
        api.parity(bundle, runner="tensorrt")
    monkeypatch.undo()
    if "tensorrt" not in installed_flavours():
        with pytest.raises(MissingDependency, match="'tensorrt', which is not installed"):
            api.parity(bundle, runner="tensorrt")
    with pytest.raises(InvalidSpec, match="threads=2 with runner tensorrt"):
        api.parity(bundle, runner="tensorrt", threads=2)


@pytest.mark.skipif("rtx" not in installed_flavours(), reason="TensorRT for RTX is not installed")
def test_another_form_of_a_graph_is_built(bundle: Path) -> None:
    """The forced form, whose weights are the bundle's; TensorRT for RTX builds it with no GPU."""
    flavour = engines.load_flavour("rtx")
    assert api.parity(bundle, selection=True)
    (form,) = (bundle / "parity").glob("*.forced.onnx")
    with pytest.raises(TargetMismatch, match=r"no engine in .* is for SM86"):
        build_form(form, bundle, flavour, sm=86)
    for graph in open_bundle(bundle).manifest.graphs:
        write_plan(bundle, graph, "rtx", flavour.version)
    plan, record = build_form(form, bundle, flavour, sm=86)
    assert plan.is_file()
    assert {tensor.name for tensor in record.inputs} > {
        spec.name for spec in open_bundle(bundle).manifest.graphs[0].inputs
    }
    assert json.loads(plan.with_suffix(".json").read_bytes())["model"] == form.name


def test_verify_takes_the_engines(here: StandIn, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU that runs them, `auto` is their runner."""
    from edgecomp.api import _verify

    monkeypatch.setattr(_verify, "load_flavour", lambda name: Flavour(name, "10.3.0", here))
    monkeypatch.setattr(_verify, "choose_flavour", lambda target, runtime: "tensorrt")
    report = api.verify(bundle, target="a10", build_engines=False, duration_s=0.05, plugin="off", fresh=True)
    assert report, report.stages
    assert report.runner == "tensorrt"
    assert report.notes == ()
    assert "TensorRT 10.3.0" in next(stage.reason for stage in report.stages if stage.name == "parity")
