"""The C++ runner of `engines/runtime`: it compiles, believes no file, and refuses what does not belong together.

The way through is run on this machine too: behind the real interfaces of TensorRT's headers stands a stand-in that
works on the host (`tests/native/tensorrt_on_host`), as does its driver of CUDA. A real engine runs with marker `gpu`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import random
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load, load_file, save, save_file
from stand_in import NATIVE, compile_cpp

from edgecomp import api
from edgecomp.engines import build_engine, choose_flavour, installed_flavours, local_gpu_sm, read_record
from edgecomp.engines.plugins import Headers, find_headers
from edgecomp.engines.record import EnginePlugin, EngineRecord
from edgecomp.errors import MissingDependency, PluginMissing, TargetMismatch
from edgecomp.specs import load_target

ROOT = Path(__file__).resolve().parents[2]
RUNTIME = ROOT / "engines" / "runtime"
PLAN = "input x float32 2,3\ninput m bool 2\noutput y float32 2,2\n"
TENSORS = {
    "inputs": [{"name": "x", "shape": [2, 3], "dtype": "float32"}, {"name": "m", "shape": [2], "dtype": "bool"}],
    "outputs": [{"name": "y", "shape": [2, 2], "dtype": "float32"}],
}
X = np.arange(6, dtype=np.float32).reshape(2, 3)
GIVEN = {"x": X, "m": np.array([True, False])}
WARNINGS = ["-O0", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror"]
MIXED = {
    "x": X, "scalar": np.array(3.0), "empty": np.zeros((0, 4), np.int8), "half": X.astype(np.float16),
    'q"\\\u00e9\x01': np.array([1, 2], np.int64), "flags": np.array([True]),
}  # fmt: skip
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

#: What edgecomp_runtime.cpp calls of TensorRT; the headers of 10.0, 10.3, 10.16, 11.0 and 11.1 have each, and within a
#: major version at the same place.
TENSORRT_10_0 = {
    "createExecutionContext", "deserializeCudaEngine", "deregisterLibrary", "enqueueV3", "getCreator",
    "getNbIOTensors", "getPluginRegistry", "getTensorDataType", "getTensorFormat",
    "getTensorIOMode", "getTensorLocation", "getTensorShape", "loadLibrary", "setTensorAddress",
}  # fmt: skip

rtx = pytest.mark.skipif("rtx" not in installed_flavours(), reason="TensorRT for RTX is not installed")


@dataclasses.dataclass(frozen=True)
class Said:
    """What a program answered."""

    code: int
    out: str
    err: str


Run = Callable[..., Said]


def call(words: list[Any], environment: dict[str, str], *, timeout: int = 120) -> Said:
    environment = {**os.environ, **environment}
    done = subprocess.run(
        list(map(str, words)), env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode in (0, 2), done.stdout[-2000:] + done.stderr[-4000:]
    return Said(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def headers() -> Headers:
    try:
        return find_headers()
    except PluginMissing as error:
        pytest.skip(f"no headers of TensorRT: {error}")


@pytest.fixture(scope="session")
def cuda_include() -> Path:
    """A folder of CUDA's headers; TensorRT's include them for the name of a stream."""
    folders = [Path("/usr/local/cuda/include")]
    for package, inside in (
        ("triton", "backends/nvidia/include"),
        ("nvidia", "cu13/include"),
        ("nvidia", "cu12/include"),
    ):
        found = importlib.util.find_spec(package)
        folders += (
            [Path(place) / inside for place in (found.submodule_search_locations or []) if found] if found else []
        )
    for folder in folders:
        if (folder / "cuda_runtime_api.h").is_file() and (folder / "crt" / "host_defines.h").is_file():
            return folder
    pytest.skip(f"no cuda_runtime_api.h in any of {', '.join(map(str, folders))}")


@pytest.fixture(scope="session")
def include(headers: Headers, cuda_include: Path) -> list[str]:
    return ["-isystem", str(headers.folder), "-isystem", str(cuda_include)]


@pytest.fixture(scope="session")
def program(include: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """edgecomp-run with the sanitizers of addresses and undefined behaviour, and two ways in for the tests of files."""
    out = tmp_path_factory.mktemp("program") / "edgecomp-run"
    return compile_cpp(out, *WARNINGS, *SANITIZERS, *include, f"-I{RUNTIME}", NATIVE / "runtime_on_host.cpp")


@pytest.fixture(scope="session")
def released(include: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """edgecomp-run as it is shipped: the sanitizers and a real driver do not go together."""
    sources = [RUNTIME / "edgecomp_runtime.cpp", RUNTIME / "edgecomp_run.cpp"]
    return compile_cpp(tmp_path_factory.mktemp("released") / "edgecomp-run", "-O2", *include, *sources)


def write_stubs(out: Path, headers: Path) -> None:
    """Write classes that end the program in every function that TensorRT's headers leave open."""
    lines = ["#pragma once", "#include <cstdlib>", "namespace nvinfer1 { namespace stubs {"]
    for file, name, base in (
        ("NvInferImpl.h", "VRuntime", "apiv::VRuntime"),
        ("NvInferImpl.h", "VCudaEngine", "apiv::VCudaEngine"),
        ("NvInferImpl.h", "VExecutionContext", "apiv::VExecutionContext"),
        ("NvInferRuntimeCommon.h", "IPluginRegistry", "nvinfer1::IPluginRegistry"),
    ):
        text = re.sub(r"//[^\n]*", "", (headers / file).read_text())
        text = re.sub(r"#if ENABLE_FEATURE.*?#endif", "", text, flags=re.DOTALL)
        body = re.search(rf"class {name}\b[^;{{]*\{{(.*?)^\}};", text, re.DOTALL | re.MULTILINE)
        assert body is not None, name
        open_functions = re.findall(r"\bvirtual ([^;~]*?) = 0;", body[1], re.DOTALL)
        assert len(open_functions) > 10
        lines += [f"class {name} : public {base} {{ public:"]
        lines += [f"{function} override {{ std::abort(); }}" for function in open_functions] + ["};"]
    out.write_text("\n".join([*lines, "}}", ""]))


@pytest.fixture(scope="session")
def fakes(headers: Headers, include: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with stand-ins of TensorRT, TensorRT for RTX and the driver of CUDA."""
    folder = tmp_path_factory.mktemp("fakes")
    write_stubs(folder / "stubs.h", headers.folder)
    library = folder / f"libnvinfer.so.{headers.version.partition('.')[0]}"
    words = ["-shared", "-fPIC", "-w", *include, f"-I{folder}"]
    compile_cpp(library, *words, NATIVE / "tensorrt_on_host" / "tensorrt.cpp")
    (folder / "libtensorrt_rtx.so.1").symlink_to(library)
    compile_cpp(folder / "libcuda.so.1", "-shared", "-fPIC", NATIVE / "tensorrt_on_host" / "cuda.cpp")
    for creator in ("edgecomp::TopKMerge 1", "edgecomp::Other 1"):
        source = folder / "plugin.cpp"
        source.write_text(f'extern "C" char const fake_creator[] = "{creator}";\n')
        compile_cpp(folder / f"lib{creator[10:-2]}.so", "-shared", "-fPIC", source)
    return folder


@pytest.fixture
def plan(headers: Headers, tmp_path: Path) -> Path:
    """A plan of the stand-in, its record, and inputs that fit it."""
    path = tmp_path / "model.m2.b1.engine"
    path.write_text(PLAN)
    write_record(path, runtime_version=f"{headers.version}.48")
    save_file(GIVEN, tmp_path / "in.safetensors")
    return path


def write_record(plan: Path, **changes: Any) -> Path:
    """Write a record that fits the plan, with some fields changed; a field that is None is left out."""
    path = plan.with_suffix(".json")
    if path.is_file():
        fields = json.loads(path.read_bytes())
    else:
        content = plan.read_bytes()
        fields = msgspec.to_builtins(
            EngineRecord(
                schema=1, model="model.m2.b1.onnx", onnx_sha256="a" * 64, weights_sha256="", target="a10",
                runtime="tensorrt", runtime_version="", sm=(86,), precision="fp32", workspace_mib=0, seconds=0.5,
                num_layers=1, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest(), warnings=(),
                inputs=(), outputs=(), edgecomp_version="0",
            )
        ) | TENSORS  # fmt: skip
    fields |= changes
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
    return path


@pytest.fixture
def run(program: Path, fakes: Path, headers: Headers, plan: Path, tmp_path: Path) -> Run:
    """Run the program on the plan, with the stand-ins, and keep what they were called for in `log`."""

    def answer(*words: object, inputs: str = "in.safetensors", **settings: str) -> Said:
        environment = {
            "LD_LIBRARY_PATH": str(fakes), "FAKE_TENSORRT": f"{headers.version}.48", "FAKE_LOG": str(tmp_path / "log"),
        } | settings  # fmt: skip
        files = ["--inputs", tmp_path / inputs, "--outputs", tmp_path / "out.safetensors"]
        return call([program, plan, *files, *words], environment)

    return answer


def log_of(plan: Path) -> list[str]:
    """What the stand-ins noted, the runtime's own steps without the work."""
    path = plan.with_name("log")
    return path.read_text().splitlines() if path.is_file() else []


# -- the way through ---------------------------------------------------------------------------------------------


def test_runs_by_name(run: Run, plan: Path, headers: Headers) -> None:
    """Outputs come from the inputs by name, the file is one that others read, and everything is given back."""
    said = run()
    assert (said.code, said.out) == (0, "output  y  float32 [2, 2]\n"), said.err
    assert f"TensorRT {headers.version}.48 on Host \\x1B[31mGPU (SM86)" in said.err
    assert "TensorRT: a warning of the stub" in said.err
    (name, value), *others = load_file(plan.with_name("out.safetensors")).items()
    assert (name, value.dtype, others) == ("y", np.float32, [])
    np.testing.assert_array_equal(value, [[1, 3], [5, 7]])
    assert log_of(plan) == ["runtime", "deserialised", "enqueued", "worked", "released"]
    assert sorted(path.name for path in plan.parent.glob("*safetensors*")) == ["in.safetensors", "out.safetensors"]


def test_graph_is_recorded_once_and_replayed_with_the_inputs(run: Run, plan: Path) -> None:
    said = run("--cuda-graph", "--runs", 2)
    assert said.code == 0, said.err
    assert "time    p50 250.0 us, p90 250.0 us, p99 250.0 us  2 runs after 10 of warm-up, replayed" in said.out
    np.testing.assert_array_equal(load_file(plan.with_name("out.safetensors"))["y"], [[1, 3], [5, 7]])
    replays = ["replayed", "worked"] * 13  # one for the outputs, 10 to warm up, 2 that are measured
    assert log_of(plan) == [
        "runtime",
        "deserialised",
        "enqueued",
        "worked",
        "enqueued",
        "recorded",
        *replays,
        "released",
    ]


def test_prefix_reads_the_golden_file_of_a_bundle(run: Run, plan: Path) -> None:
    tensors = {f"input.photo.{name}": value for name, value in GIVEN.items()}
    save_file({**tensors, "output.photo.m2.y": X}, plan.with_name("golden.safetensors"))
    assert run("--prefix", "input.photo.", inputs="golden.safetensors").code == 0
    said = run("--prefix", "input.fhoto.", inputs="golden.safetensors")
    assert said.code == 2
    assert re.search(r"no tensor's name begins with 'input\.fhoto\.'", said.err)


def test_steps_for_a_product_that_keeps_its_tensors(
    program: Path, fakes: Path, headers: Headers, plan: Path, tmp_path: Path
) -> None:
    """Every step says how it ended; an engine that was moved goes on; nothing runs before all inputs are there."""
    environment = {"LD_LIBRARY_PATH": str(fakes), "FAKE_TENSORRT": f"{headers.version}.48"}
    environment["FAKE_LOG"] = str(tmp_path / "log")
    said = call([program, "--steps", plan], environment)
    assert (said.code, said.err) == (0, "")
    good = ["x: ok", "run: ok", "wait: ok", "y: ok"]
    assert said.out.splitlines() == [
        "early: input 'x' was not given; the engine takes 'x', 'm'",
        "short: input 'x' has 20 bytes, and the engine takes float32 [2, 3], 24 bytes; give it in that type and shape",
        "unknown: there is no input 'y'; the engine has 'x', 'm'; rename the tensor, or take another engine",
        "x: ok",
        "no m: input 'm' was not given; the engine takes 'x', 'm'",
        "addresses: 0 1",
        *good,
        "1 3 5 7",
        *good,
        "19 17 15 13",
        "x is no output: there is no output 'x'; the engine has 'y'; rename the tensor, or take another engine",
        "small: output 'y' is float32 [2, 2], 16 bytes, and there is room for 12; give as many bytes as it has",
    ]
    assert log_of(plan)[-1] == "released"


def test_plugin_is_loaded_when_it_is_named_and_the_recorded_one(
    run: Run, plan: Path, fakes: Path, headers: Headers
) -> None:
    good, other = fakes / "libTopKMerge.so", fakes / "libOther.so"

    def record(library: Path, **changes: Any) -> None:
        digest = hashlib.sha256(library.read_bytes()).hexdigest()
        entry = EnginePlugin(
            "topk_merge", "edgecomp::TopKMerge", "1", library.name, digest, (86,), headers.version, "13.0"
        )
        write_record(plan, plugins=[msgspec.to_builtins(entry) | changes])

    record(good)
    said = run("--plugin", good)
    assert said.code == 0, said.err
    assert log_of(plan) == [
        "runtime",
        "loaded a plugin",
        "deserialised",
        "enqueued",
        "worked",
        "took a plugin out",
        "released",
    ]
    plan.with_name("log").unlink()

    cases: list[tuple[str, list[object]]] = [
        (r"needs the plugin 'topk_merge' for edgecomp::TopKMerge; name its library 'libTopKMerge\.so', .*--plugin", []),
        (r"libOther\.so: has the sha256 \w{12}, and the engine needs topk_merge with \w{12};", ["--plugin", other]),
        (r"libAbsent\.so: cannot be read: No such file", ["--plugin", fakes / "libAbsent.so"]),
    ]
    for words, given in cases:
        said = run(*given)
        assert (said.code, bool(re.search(words, said.err))) == (2, True), said.err
    assert log_of(plan) == []
    record(good, sm=[75, 80])
    assert re.search("'topk_merge' was compiled for SM75, SM80, and Host .* has SM86", run("--plugin", good).err)
    record(good, tensorrt="9.1.0")
    assert re.search(
        r"'topk_merge' was compiled with the headers of TensorRT 9\.1\.0, and .*48", run("--plugin", good).err
    )
    assert log_of(plan) == []
    record(other)
    assert re.search(r"libOther\.so: registers no edgecomp::TopKMerge version 1", run("--plugin", other).err)
    record(good)
    assert re.search(r"refused by TensorRT: \[stub\] no luck", run("--plugin", good, FAKE_TENSORRT_FAIL="plugin").err)
    (plan.parent / "broken.so").write_bytes(b"\x7fELF and no more")
    record(plan.parent / "broken.so")
    assert re.search(r"broken\.so: does not load: .*file too short", run("--plugin", plan.parent / "broken.so").err)
    write_record(plan, plugins=[])
    assert re.search(r"libTopKMerge\.so: .* the engine needs no plugin", run("--plugin", good).err)
    assert "deserialised" not in log_of(plan)


# -- refused before TensorRT is asked ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema": 2}, r"no record of an engine: it has schema 2, and this runner reads 1; build the engine again"),
        ({"schema": None}, "it has no schema"),
        ({"sha256": "0" * 64}, r"model\.m2\.b1\.engine: has the sha256 \w{12}, and its record says 000000000000;"),
        ({"sha256": "F" * 64}, "sha256 is no sha256"),
        ({"size_bytes": 64}, r"has 56 bytes, and its record says 64; it is truncated or another plan"),
        ({"size_bytes": "56"}, "size_bytes is no whole number"),
        ({"size_bytes": -1}, "size_bytes is no whole number"),
        ({"runtime": "trt"}, "runtime is 'trt'; known: tensorrt, rtx"),
        ({"runtime_version": None}, "it has no runtime_version"),
        ({"runtime_version": "new"}, "runtime_version 'new' is no version"),
        ({"runtime_version": "10.14"}, r"runtime_version '10\.14' is no version"),
        ({"sm": [8.6]}, "sm is no list of whole numbers"),
        ({"inputs": {}}, "inputs is no list"),
        ({"inputs": [1]}, r"inputs\[0\]\. is no object"),
        ({"inputs": [TENSORS["inputs"][0] | {"dtype": "int4"}]}, r"inputs\[0\]\.dtype is a type that this runner does"),
        ({"inputs": [TENSORS["inputs"][0] | {"shape": [2, -1]}]}, r"inputs\[0\]\.shape is no list of whole numbers"),
        ({"inputs": [TENSORS["inputs"][0] | {"shape": [1 << 40] * 4}]}, r"inputs\[0\]\.shape is too large"),
        ({"inputs": TENSORS["inputs"][:1] * 2}, r"inputs\[1\]\.name is there twice"),
        ({"inputs": TENSORS["outputs"]}, "'y' is an input and an output"),
        ({"plugins": [{"name": "topk_merge"}]}, r"it has no plugins\[0\]\.op"),
        ({"target": "a\x1b[2J\n10", "sm": [75]}, r"built for SM75 \(a\\x1B\[2J\\x0A10\), and Host .* has SM86"),
    ],
)  # fmt: skip
def test_record_that_disagrees(changes: dict[str, Any], words: str, run: Run, plan: Path) -> None:
    write_record(plan, **changes)
    said = run()
    assert (said.code, said.out) == (2, "")
    assert re.search(words, said.err), said.err
    assert said.err.count("\n") == 1
    assert log_of(plan) == []
    assert not plan.with_name("out.safetensors").exists()


def test_files_that_are_missing_or_no_files(run: Run, plan: Path) -> None:
    record = plan.with_suffix(".json")
    content = record.read_text()
    record.write_text(content[:-1])
    assert re.search(r"model\.m2\.b1\.json: is no record of an engine: an object is not closed at byte \d+", run().err)
    record.unlink()
    assert re.search(r"model\.m2\.b1\.json: cannot be read: No such file.*; copy the JSON file that lies", run().err)
    record.mkdir()
    assert re.search(r"model\.m2\.b1\.json: is no plain file", run().err)
    record.rmdir()
    os.mkfifo(record)
    assert re.search(r"model\.m2\.b1\.json: is no plain file", run().err)
    record.unlink()
    with record.open("w") as file:
        file.truncate((1 << 24) + 1)
    assert re.search(r"json: has 16777217 bytes; at most 16777216 are read", run().err)
    record.write_text(content)
    plan.write_text(PLAN[:-9])
    assert re.search(r"model\.m2\.b1\.engine: has 47 bytes, and its record says 56", run().err)
    plan.write_text(PLAN.replace("y", "z"))
    assert re.search(r"engine: has the sha256 \w+, and its record says \w+; it was altered", run().err)
    plan.unlink()
    assert re.search(r"model\.m2\.b1\.engine: cannot be read: No such file", run().err)
    assert re.search(r"absent\.safetensors: cannot be read: No such file", run(inputs="absent.safetensors").err)
    assert log_of(plan) == []


def test_tensorrt_that_did_not_build_the_plan(
    run: Run, plan: Path, headers: Headers, fakes: Path, tmp_path: Path
) -> None:
    """Both are named; and what has another layout than the headers is not called at all."""
    mine, major = f"{headers.version}.48", headers.version.partition(".")[0]
    for other in ("10.3.0.30", f"{headers.version}.49", "12.0.0.1"):
        said = run(FAKE_TENSORRT=other)
        assert re.search(rf"built by TensorRT {re.escape(mine)}, and .*libnvinfer\S+ is TensorRT {other};", said.err)
    said = run("--tensorrt", fakes / "libtensorrt_rtx.so.1", FAKE_TENSORRT="1.7.1.116")
    assert re.search(r"built by TensorRT 1\S+, and .* is TensorRT for RTX 1\.7\.1\.116;", said.err)
    assert re.search(r"is no TensorRT: it has no createInferRuntime", run("--tensorrt", fakes / "libcuda.so.1").err)
    assert re.search(r"TensorRT cannot be loaded: .*absent\.so.*--tensorrt FILE", run("--tensorrt", "absent.so").err)
    write_record(plan, runtime_version="9.3.0.1")
    said = run("--tensorrt", fakes / f"libnvinfer.so.{major}", FAKE_TENSORRT="9.3.0.1")
    assert re.search(
        rf"compiled with the headers of TensorRT {re.escape(headers.version)}, and the .* 9\.3\.0\.1", said.err
    )
    write_record(plan, runtime="rtx", runtime_version="1.7.1.116")
    said = run(FAKE_TENSORRT="1.7.1.116")
    assert re.search(r"compile edgecomp_runtime\.cpp with the headers of TensorRT for RTX 1\.7\n", said.err)
    assert [line for line in log_of(plan) if line != "released"] == []


def test_version_without_a_build_number_fits(run: Run, plan: Path, headers: Headers) -> None:
    """JetPack's Python module says 10.3.0 where the library says 10.3.0.30."""
    write_record(plan, runtime_version=headers.version)
    assert run().code == 0
    write_record(plan, runtime_version=f"{headers.version}.post1")
    assert run().code == 0


def test_gpu_that_is_not_there(run: Run, plan: Path, fakes: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "libcuda.so.1").write_text("no driver")
    said = run(LD_LIBRARY_PATH=f"{broken}:{fakes}")
    assert said.code == 2
    assert re.match(r"error: there is no NVIDIA driver on this machine \(.*libcuda\.so\.1.*\); run it where", said.err)
    (broken / "libcuda.so.1").unlink()
    compile_cpp(broken / "libcuda.so.1", "-shared", "-fPIC", "-x", "c++", "/dev/null")
    assert re.search(r"the NVIDIA driver has no cuInit; install", run(LD_LIBRARY_PATH=f"{broken}:{fakes}").err)
    assert re.search(r"the NVIDIA driver is there, and no GPU that this process may use", run(FAKE_GPUS="0").err)
    assert re.search(r"there is no GPU number 2; there are 2, from 0", run("--device", 2, FAKE_GPUS="2").err)
    assert re.search(r"built for SM86 \(a10\), and Host \S+GPU has SM87; build the engine", run(FAKE_SM="87").err)
    assert log_of(plan) == []
    assert run("--device", 1, FAKE_GPUS="2").code == 0


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("runtime", r"makes no runtime: \[stub\] no luck"),
        ("deserialise", r"engine: is refused by TensorRT: \[stub\] no luck; build the engine again"),
        ("context", r"gives no execution context, often for lack of memory: \[stub\] no luck"),
        ("address", r"TensorRT takes no address for 'x': \[stub\] no luck"),
        ("enqueue", r"TensorRT does not run: \[stub\] no luck"),
        ("cuInit 999", r"starting CUDA \(cuInit\) failed with CUDA_ERROR_UNKNOWN \(999\)"),
        ("cuDeviceGetName 7", r"asking for the GPU's name failed with an unknown error \(7\)"),
        ("cuDevicePrimaryCtxRetain 2", r"opening the GPU failed with CUDA_ERROR_OUT_OF_MEMORY \(2\)"),
        ("cuStreamCreate 999", "making a stream failed"),
        ("cuMemAlloc_v2 2", r"allocating a tensor .* CUDA_ERROR_OUT_OF_MEMORY \(2\); free memory of the GPU"),
        ("cuMemcpyHtoDAsync_v2 999", "copying an input failed"),
        ("cuMemcpyDtoHAsync_v2 999", "copying an output failed"),
        ("cuStreamEndCapture 999", r"recording a CUDA graph failed .*; this engine cannot be recorded; run it without"),
        ("cuGraphInstantiateWithFlags 999", "making a CUDA graph failed"),
        ("cuGraphLaunch 999", "replaying the CUDA graph failed"),
    ],
)
def test_step_that_fails_is_named_and_leaves_nothing(step: str, words: str, run: Run, plan: Path) -> None:
    """The stand-in of the driver ends the program when memory or a context is left over."""
    is_cuda = step.startswith("cu")
    said = run("--cuda-graph", **{"FAKE_CUDA_FAIL" if is_cuda else "FAKE_TENSORRT_FAIL": step})
    assert (said.code, said.out) == (2, "")
    assert re.search(words, said.err), said.err
    assert not plan.with_name("out.safetensors").exists()
    started = step.split(maxsplit=1)[0] not in ("cuInit", "cuDeviceGetName", "cuDevicePrimaryCtxRetain")
    assert log_of(plan)[-1:] == (["released"] if started else [])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            PLAN.replace("x float32 2,3", "x float32 2,4"),
            r"has 'x' as float32 \[2, 4\], and the record says float32 \[2, 3\]",
        ),
        (PLAN.replace("x float32", "x float16"), "has 'x' as float16"),
        (PLAN.replace("x float32", "x int4"), "has 'x' as a type that this runner does not bind"),
        (PLAN.replace("input m", "output m"), "has no input 'm'"),
        (PLAN + "output z float32 1\n", "has 4 inputs and outputs, and its record 3"),
        (PLAN.replace("x float32 2,3", "x float32 2,3 host"), "wants 'x' on the host or in a layout"),
        (PLAN.replace("y float32 2,2", "y float32 2,2 chw32"), "wants 'y' on the host or in a layout"),
    ],
)
def test_engine_that_is_not_as_recorded(content: str, words: str, run: Run, plan: Path) -> None:
    plan.write_text(content)
    write_record(plan, size_bytes=len(content), sha256=hashlib.sha256(content.encode()).hexdigest())
    said = run()
    assert said.code == 2
    assert re.search(words, said.err), said.err
    assert "enqueued" not in log_of(plan)


# -- inputs and outputs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"x": X}, r"input 'm' \(bool \[2\]\) is missing; given: 'x'"),
        (GIVEN | {"extra": X}, "there is no input 'extra'; the engine has 'x', 'm'"),
        (GIVEN | {"y": X}, "there is no input 'y'"),
        (GIVEN | {"x": X.astype(np.float16)}, r"'x' is float16 \[2, 3\], and the engine takes float32 \[2, 3\]"),
        (GIVEN | {"x": X.T.copy()}, r"'x' is float32 \[3, 2\], and the engine takes float32 \[2, 3\]"),
        ({}, r"input 'x' \(float32 \[2, 3\]\) is missing"),
    ],
)
def test_inputs_that_do_not_fit(tensors: dict[str, Any], words: str, run: Run, plan: Path) -> None:
    save_file(tensors, plan.with_name("bad.safetensors"))
    said = run(inputs="bad.safetensors")
    assert said.code == 2
    assert re.search(words, said.err), said.err
    assert "enqueued" not in log_of(plan)


def test_outputs_that_cannot_be_written(run: Run, plan: Path, tmp_path: Path) -> None:
    same = run("--outputs", plan.with_name("in.safetensors"))
    assert (same.code, "--outputs names the file of --inputs" in same.err) == (2, True)
    said = run("--outputs", tmp_path / "nowhere" / "out.safetensors")
    assert re.search(r"nowhere/out\.safetensors: cannot be written: No such file", said.err)
    (tmp_path / "folder").mkdir()
    said = run("--outputs", tmp_path / "folder")
    assert re.search(r"folder: cannot be written: Is a directory", said.err)
    assert [path for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ([], "no plan is named"),
        (["a.engine"], "--inputs FILE is missing"),
        (["a.engine", "--inputs", "x"], "--outputs FILE is missing"),
        (["a.engine", "b.engine"], "a second plan: 'b.engine'"),
        (["a.engine", "--frobnicate"], "unknown option '--frobnicate'"),
        (["a.engine", "--inputs"], "--inputs needs a value"),
        (["a.engine", "--runs", "many"], "--runs 'many' is no number from 0 to 1000000"),
        (["a.engine", "--runs", "1000001"], "--runs '1000001' is no number"),
        (["a.engine", "--device", "-1"], "--device '-1' is no number from 0 to 1024"),
    ],
)
def test_words_that_are_wrong(words: list[str], answer: str, program: Path) -> None:
    said = call([program, *words], {})
    assert (said.code, said.out) == (2, "")
    assert answer in said.err


def test_help_names_every_option(program: Path) -> None:
    said = call([program, "--help"], {})
    assert (said.code, said.err) == (0, "")
    options = set(re.findall(r'"(--[a-z-]+)"', (RUNTIME / "edgecomp_run.cpp").read_text())) - {"--help"}
    assert len(options) == 9
    for option in options:
        assert option in said.out
        assert option in (RUNTIME / "README.md").read_text()


def test_program_of_the_readme_compiles(tmp_path: Path) -> None:
    (source,) = re.findall(r"```cpp\n(.*?)```", (RUNTIME / "README.md").read_text(), re.DOTALL)
    (tmp_path / "program.cpp").write_text(source)
    compile_cpp(tmp_path / "none", "-fsyntax-only", *WARNINGS[:-1], f"-I{RUNTIME}", tmp_path / "program.cpp")


# -- files that nobody should trust ------------------------------------------------------------------------------


def raw(header: object, data: bytes = b"", *, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def entry(begin: int, end: int, *, dtype: str = "F32", shape: object = (1,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BROKEN = {
    "empty": (b"", "has 0 bytes, too few"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(20), "is a PNG picture, not safetensors"),
    "JPEG": (b"\xff\xd8\xff\xe0\0\x10JFIF\0" + bytes(20), "is a JPEG picture, not safetensors"),
    "no header": (raw(b"", size=9), "says that its header has 9 bytes, and the file has 8"),
    "huge header": (raw({}, size=1 << 62), r"says that its header has 4611686018427387904 bytes; at most 16777216"),
    "largest header": (raw({}, size=(1 << 64) - 1), "its header has 18446744073709551615 bytes"),
    "no JSON": (raw(b"{'x'}"), "its header is no JSON: a key is no text at byte 1"),
    "list": (raw([]), "its header is no JSON object"),
    "behind the end": (raw(b"{} {}"), "something stands behind the end at byte 3"),
    "twice": (raw(b'{"a":1,"a":2}'), "a key stands there twice"),
    "deep": (raw(b'{"a":' + b"[" * 99 + b"]" * 99 + b"}"), "nested too deep"),
    "many": (raw(b'{"a":[' + b"0," * 300000 + b"0]}"), "too many values"),
    "latin": (raw(b'{"\xe9":1}'), "no UTF-8"),
    "surrogate": (raw(b'{"\\ud800":1}'), "half a surrogate pair"),
    "nul": (raw(b'{"\\u0000":1}'), "NUL in a text"),
    "no object": (raw({"x": 1}), "tensor 'x' is not described by dtype, shape and data_offsets"),
    "dtype": (raw({"x": entry(0, 4, dtype="F31")}, b"1234"), "tensor 'x' has the dtype 'F31'; known: F64, F32"),
    "shape": (raw({"x": entry(0, 4, shape=[-1])}, b"1234"), "tensor 'x' has a shape that is no list"),
    "shape is a word": (raw({"x": entry(0, 4, shape="1")}, b"1234"), "has a shape that is no list"),
    "rank": (raw({"x": entry(0, 4, shape=[1] * 9)}, b"1234"), "no list of at most 8 sizes"),
    "overflow": (raw({"x": entry(0, 4, shape=[1 << 32, 1 << 32])}, b"1234"), r"is float32 \[4294967296, 4294967296\]"),
    "size": (raw({"x": entry(0, 4, shape=[2])}, b"1234"), r"tensor 'x' is float32 \[2\] and has 4 bytes"),
    "truncated": (raw({"x": entry(0, 4)}, b"123"), "tensor 'x' lies at 0 to 4 of 3 bytes of data"),
    "backwards": (raw({"x": entry(4, 0)}, b"1234"), "tensor 'x' lies at 4 to 0 of 4"),
    "negative": (raw({"x": entry(-4, 0)}, b"1234"), "data_offsets that are not two whole numbers"),
    "overlap": (raw({"x": entry(0, 4), "y": entry(2, 6)}, b"123456"), "tensor 'y' begins at 2, within the data"),
    "same place": (raw({"x": entry(0, 4), "y": entry(0, 4)}, b"1234"), "begins at 0, within the data"),
    "gap": (raw({"x": entry(0, 4), "y": entry(6, 10)}, b"1234567890"), "tensor 'y' begins at 6, with a gap behind"),
    "rest": (raw({"x": entry(0, 4)}, b"12345"), "its tensors end at 4 of 5 bytes"),
    "colours": (raw({"\x1b[31m": 1}), r"tensor '\\x1B\[31m' is not described"),
}  # fmt: skip


def test_broken_safetensors(program: Path, run: Run, plan: Path) -> None:
    """Each is refused for its own reason, as a file by itself and on the way to an engine."""
    paths = []
    for name, (content, _) in BROKEN.items():
        paths.append(plan.with_name(f"{name}.safetensors"))
        paths[-1].write_bytes(content)
    lines = call([program, "--files", *paths], {}).out.splitlines()
    for path, (_, words) in zip(paths, BROKEN.values(), strict=True):
        line = lines[lines.index(str(path)) + 1]
        assert line.startswith(f"tensors: {path}: "), line
        assert re.search(words, line), line
    said = run(inputs="overlap.safetensors")
    assert (said.code, "within the data of another" in said.err) == (2, True)
    assert log_of(plan) == []


def test_what_is_written_is_read_by_others(program: Path, tmp_path: Path) -> None:
    """Names of any kind, scalars and empty tensors; each tensor lies at a multiple of its type's size."""
    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(MIXED, source)
    assert call([program, "--copy", source, out], {}).code == 0
    copied = load_file(out)
    assert {name: (value.dtype, value.shape, value.tobytes()) for name, value in copied.items()} == {
        name: (value.dtype, value.shape, value.tobytes()) for name, value in MIXED.items()
    }
    (size,) = struct.unpack_from("<Q", out.read_bytes())
    assert size % 8 == 0
    for name, described in json.loads(out.read_bytes()[8 : 8 + size]).items():
        assert described["data_offsets"][0] % MIXED[name].itemsize == 0, name


def test_mutated_files_are_refused_or_read_as_others_read_them(program: Path, tmp_path: Path) -> None:
    """Some hundred damaged files: no crash, an error in words, and what is accepted is what `safetensors` reads."""
    rng = random.Random(7)
    whole = save(MIXED, metadata={"format": "np"})
    contents = {"whole": whole}
    for number in range(400):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            if number % 8 == 0:  # in the data alone: another value, and no fault of form
                content[-rng.randint(1, 40)] ^= 1 << rng.randrange(8)
                continue
            at = rng.randrange(len(content))
            kind = rng.randrange(5)
            if kind == 0:
                content[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                content[at] = rng.choice(b'0123456789{}[]",:\\u-.eE \x00\xff')
            elif kind == 2:
                del content[at : at + rng.randint(1, 9)]
            elif kind == 3:
                content[at:at] = bytes(content[at : at + rng.randint(1, 30)])
            else:
                content = content[:at] or bytearray(b"\x00")
        if number % 2 and len(content) > 8:  # and with a header size that is right again, so that more is read
            close = content.rfind(b"}", 8)
            content[:8] = struct.pack("<Q", max(close - 7, 0))
        contents[f"{number:03}"] = bytes(content)
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_bytes(content)
    said = call([program, "--files", *(tmp_path / f"{name}.json" for name in contents)], {}).out
    answers = dict(
        zip(contents, re.split(rf"^{re.escape(str(tmp_path))}/\w+\.json\n", said, flags=re.MULTILINE)[1:], strict=True)
    )
    accepted, stricter = 0, []
    for name, answer in answers.items():
        first, *tensors, record = answer.splitlines()
        assert re.fullmatch(r"record: .*/\w+\.json: is no record of an engine: .+; build the engine again", record), (
            record
        )
        try:
            theirs = load(contents[name])
        except (SafetensorError, UnicodeDecodeError, KeyError, ValueError, OverflowError, AttributeError):
            theirs = None
        if first == "tensors ok":
            accepted += 1
            assert theirs is not None, name
            mine = dict(re.fullmatch(r'(".*") (\w+ \[.*\] \w{64})', line).groups() for line in tensors)
            assert {json.loads(key) for key in mine} == set(theirs)
            for key, value in mine.items():
                array = theirs[json.loads(key)]
                digest = hashlib.sha256(array.tobytes()).hexdigest()
                assert value == f"{array.dtype} {list(array.shape)} {digest}"
            continue
        assert re.fullmatch(r"tensors: .*/\w+\.json: .+; .+", first), first
        if theirs is not None:
            stricter.append(first)
    assert 50 <= accepted <= 100
    allowed = r"twice|not described by|has the dtype|NUL in a text|half a surrogate|\d bytes; at most|too few|no JSON"
    assert [line for line in stricter if not re.search(allowed, line)] == []


def test_json_is_read_as_python_reads_it(program: Path, tmp_path: Path) -> None:
    """What is JSON is no error of form; what is not is one. Seen through the record, which then lacks its fields."""
    good = [
        "{}",
        ' {"a" : [1, -0.5e+3, true, false, null, "\\u00e9\\ud83d\\ude00\\n"] }\n',
        '{"":{"":[[]]}}',
        "0",
        '"x"',
    ]
    bad = [
        "", "{", "}", '{"a"}', '{"a":}', '{"a":1,}', "[1,]", "[1 2]", "01", "-", "1.", "1e", "+1", ".5", "tru", "nul",
        "NaN", "Infinity", "'a'", '"a', '"\\x"', '"\\u12g4"', '"\\ud83d"', '"\\ude00"', '"\n"', "[", "{}{}",
        "\ufeff{}", "/**/{}", "\x00",
    ]  # fmt: skip
    for number, text in enumerate(good + bad):
        (tmp_path / f"{number}.json").write_bytes(text.encode())
    lines = call([program, "--files", *(tmp_path / f"{n}.json" for n in range(len(good + bad)))], {}).out.splitlines()
    records = [line for line in lines if line.startswith("record")]
    of_form = [bool(re.search(r" at byte \d+; ", line)) for line in records]
    assert of_form == [False] * len(good) + [True] * len(bad), records
    assert all(re.search("it has no schema|it is no object", line) for line in records[: len(good)])


def test_sha256_of_every_length(program: Path, tmp_path: Path) -> None:
    content = random.Random(3).randbytes(200)
    (tmp_path / "content").write_bytes(content)
    digests = call([program, "--sha256", tmp_path / "content"], {}).out.split()
    assert digests == [hashlib.sha256(content[:size]).hexdigest() for size in range(201)]


# -- a real plan, and the real library of TensorRT for RTX -------------------------------------------------------


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan that TensorRT for RTX built for SM86; not to be written to."""
    onnx = pytest.importorskip("onnx")
    folder = tmp_path_factory.mktemp("real")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        "graph",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 3])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 3])],
    )
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9), folder / "m.onnx"
    )
    built = build_engine(
        folder / "m.onnx", folder / "out", target=load_target("a10"), runtime="rtx", precision="fp32",
        onnx_sha256="a" * 64, progress=lambda line: None,
    )  # fmt: skip
    save_file({"x": X}, built.path.with_name("in.safetensors"))
    return built.path


def rtx_library() -> Path:
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    places = list(spec.submodule_search_locations or []) if spec else []
    for place in places:
        if (Path(place) / "libtensorrt_rtx.so.1").is_file():
            return Path(place) / "libtensorrt_rtx.so.1"
    pytest.skip("the package tensorrt_rtx_libs holds no libtensorrt_rtx.so.1")


@rtx
def test_real_plan_is_checked_without_a_gpu(program: Path, real: Path) -> None:
    record = read_record(real)
    said = call([program, real, "--check"], {})
    assert (said.code, said.err) == (0, "")
    assert f"plan    m.onnx  {record.size_bytes} bytes, sha256 {record.sha256[:12]}: as its record says" in said.out
    assert f"needs   TensorRT for RTX {record.runtime_version}, SM86 (a10), precision fp32" in said.out
    assert "input   x  float32 [2, 3]\noutput  y  float32 [2, 3]\n" in said.out


@rtx
def test_real_library_is_asked_for_its_version_and_nothing_else(
    program: Path, real: Path, fakes: Path, headers: Headers, tmp_path: Path
) -> None:
    """Another version, no driver, another GPU, headers of another flavour: in this order, each by name."""
    version = read_record(real).runtime_version
    plan = Path(shutil.copy(real, tmp_path))
    record = Path(shutil.copy(real.with_suffix(".json"), tmp_path))
    files = ["--inputs", real.with_name("in.safetensors"), "--outputs", tmp_path / "out.safetensors"]
    words = [program, plan, *files, "--tensorrt", rtx_library()]
    (tmp_path / "libcuda.so.1").write_text("no driver")
    said = call(words, {"LD_LIBRARY_PATH": str(tmp_path)})
    assert (said.code, "there is no NVIDIA driver on this machine" in said.err) == (2, True), said.err
    gpu = tmp_path / "gpu"
    gpu.mkdir()
    (gpu / "libcuda.so.1").symlink_to(fakes / "libcuda.so.1")
    said = call(words, {"LD_LIBRARY_PATH": str(gpu), "FAKE_SM": "120"})
    assert "the plan was built for SM86 (a10), and Host" in said.err
    said = call(words, {"LD_LIBRARY_PATH": str(gpu)})
    expected = f"compiled with the headers of TensorRT {headers.version}, and the library is TensorRT for RTX {version}"
    assert expected in said.err
    record.write_text(record.read_text().replace(version, "1.2.0.54"))
    said = call(words, {"LD_LIBRARY_PATH": str(gpu)})
    assert re.search(
        rf"built by TensorRT for RTX 1\.2\.0\.54, and \S+ is TensorRT for RTX {re.escape(version)};", said.err
    )
    record.write_text(record.read_text().replace('"rtx"', '"tensorrt"').replace("1.2.0.54", "10.3.0"))
    said = call(words, {"LD_LIBRARY_PATH": str(gpu)})
    assert re.search(rf"built by TensorRT 10\.3\.0, and \S+ is TensorRT for RTX {re.escape(version)};", said.err)
    assert not (tmp_path / "out.safetensors").exists()


def test_calls_what_tensorrt_10_0_has() -> None:
    """Whoever calls more looks it up in NVIDIA's headers of 10.0 and 11 first, and adds it to the list."""
    text = re.sub(r'//[^\n]*|"[^"\n]*"', "", (RUNTIME / "edgecomp_runtime.cpp").read_text())
    called = set(re.findall(r"\b(?:engine|execution|runtime|registry|library)(?:->|\.|\(\)\.)(\w+)\(", text))
    called |= set(re.findall(r"getPluginRegistry\(\)\.(\w+)\(", text))
    ours = {"reset", "check", "error", "text", "create"}
    assert called - ours == TENSORRT_10_0


@pytest.mark.slow
def test_cmake_builds_it(headers: Headers, cuda_include: Path, plan: Path, tmp_path: Path) -> None:
    """As the README says, with every warning an error."""
    if shutil.which("cmake") is None:
        pytest.skip("there is no cmake here")
    configure = [
        "cmake", "-S", RUNTIME, "-B", tmp_path / "build", f"-DTENSORRT_INCLUDE={headers.folder}",
        f"-DCUDA_INCLUDE={cuda_include}", f"-DCMAKE_CXX_FLAGS={' '.join(WARNINGS[1:])}",
    ]  # fmt: skip
    for words in (configure, ["cmake", "--build", tmp_path / "build"]):
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    said = call([tmp_path / "build" / "edgecomp-run", plan, "--check"], {})
    assert (said.code, said.err) == (0, "")
    assert "output  y  float32 [2, 2]\n" in said.out


@pytest.mark.slow
def test_compiles_without_exceptions_and_for_rtx(headers: Headers, cuda_include: Path, tmp_path: Path) -> None:
    """As firmware does; and with headers that say that they are of TensorRT for RTX."""
    for file in headers.folder.glob("*.h"):
        text = file.read_text()
        if file.name == "NvInferVersion.h":
            text += "\n#define TRT_MAJOR_RTX 1\n#undef NV_TENSORRT_MAJOR\n#define NV_TENSORRT_MAJOR TRT_MAJOR_RTX\n"
        (tmp_path / file.name).write_text(text)
    words = ["-fno-exceptions", "-fno-rtti", "-fsyntax-only", *WARNINGS]
    folders = ["-isystem", tmp_path, "-isystem", cuda_include]
    compile_cpp(tmp_path / "none", *words, *folders, RUNTIME / "edgecomp_runtime.cpp")


@pytest.mark.gpu
@pytest.mark.parametrize("words", [[], ["--cuda-graph"]])
def test_engine_equals_onnxruntime(
    words: list[str], released: Path, exported: Path, headers: Headers, tmp_path: Path
) -> None:
    """A bundle built for the GPU here, run from C++ on its goldens, against ONNX Runtime on the same."""
    onnxruntime = pytest.importorskip("onnxruntime")
    sm = local_gpu_sm()
    targets = [target for row in api.list_targets() if (target := load_target(row.name)).sm == sm and target.runtimes]
    if not targets:
        pytest.skip(f"no shipped target has SM{sm}")
    try:
        runtime = choose_flavour(targets[0])
    except (TargetMismatch, MissingDependency) as error:
        pytest.skip(f"no TensorRT builds for this GPU: {error}")
    bundle = Path(shutil.copytree(exported, tmp_path / "bundle"))
    report = api.build(bundle, target=targets[0].name, runtime=runtime, plugin="off")
    version = report.engines[0].record.runtime_version
    if runtime == "rtx" or version.partition(".")[0] != headers.version.partition(".")[0]:
        pytest.skip(f"the headers are of TensorRT {headers.version}, and {runtime} {version} is here")
    packages = [importlib.util.find_spec(name) for name in ("tensorrt_libs", "tensorrt")]
    folders = [place for found in packages if found for place in found.submodule_search_locations or []]
    tensors = load_file(bundle / "golden.safetensors")
    whole = [e for e in report.engines if all(f"input.photo.{i.name}" in tensors for i in e.record.inputs)]
    assert whole, "every graph reads what a stem gives"
    for engine in whole:
        out = tmp_path / "out.safetensors"
        golden = ["--inputs", bundle / "golden.safetensors", "--prefix", "input.photo.", "--outputs", out]
        environment = {"LD_LIBRARY_PATH": ":".join([*folders, os.environ.get("LD_LIBRARY_PATH", "")])}
        said = call([released, engine.path, *golden, *words], environment)
        assert said.code == 0, said.err
        session = onnxruntime.InferenceSession(bundle / engine.record.model, providers=["CPUExecutionProvider"])
        feed = {tensor.name: tensors[f"input.photo.{tensor.name}"] for tensor in engine.record.inputs}
        for name, value in zip([o.name for o in session.get_outputs()], session.run(None, feed), strict=True):
            np.testing.assert_allclose(load_file(out)[name], value, atol=2e-4, rtol=0)
