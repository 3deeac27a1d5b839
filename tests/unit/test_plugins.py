"""Plugins: compiled into the cache, refused where they do not fit, and proven to run the nodes they were taken for."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgecomp import api
from edgecomp.engines import (
    BuiltEngine,
    Flavour,
    PluginLibrary,
    build_engine,
    build_library,
    cached_libraries,
    choose_flavour,
    find_plugin_nodes,
    installed_flavours,
    load_flavour,
    local_gpu_sm,
    plugins,
    read_library,
    read_record,
)
from edgecomp.engines._onnx import custom_nodes, without_functions
from edgecomp.engines.network import collecting_logger, parse_onnx
from edgecomp.engines.plugin_use import graph_for_plugins
from edgecomp.engines.plugins import find_headers, find_nvcc, loaded_library, why_unfit
from edgecomp.errors import BuildError, InvalidSpec, MissingDependency, PluginMissing, TargetMismatch, UnknownName
from edgecomp.specs import Plugin, Target, load_plugin, load_target, plugin_names
from edgecomp.specs.origin import file_sha256

SM = 86
PLUGIN = load_plugin("topk_merge")
CREATOR = (PLUGIN.op, PLUGIN.version, PLUGIN.domain)

rtx = pytest.mark.skipif("rtx" not in installed_flavours(), reason="TensorRT for RTX is not installed")

#: What plugin.cpp and plugin.h use of TensorRT; the API reference of 10.3 has each (IPluginV3 came with 10.0).
TENSORRT_10_3 = {
    "AsciiChar", "DataType", "DimensionOperation", "Dims", "DimsExprs", "DynamicPluginTensorDesc", "IDimensionExpr",
    "IExprBuilder", "ILogger", "ILoggerFinder", "IPluginCapability", "IPluginCreatorInterface", "IPluginCreatorV3One",
    "IPluginResourceContext", "IPluginV3", "IPluginV3OneBuild", "IPluginV3OneCore", "IPluginV3OneRuntime",
    "PluginCapabilityType", "PluginField", "PluginFieldCollection", "PluginFieldType", "PluginTensorDesc",
    "TensorFormat", "TensorRTPhase",
    "DataType::kBF16", "DataType::kFLOAT", "DataType::kHALF", "DataType::kINT32", "DimensionOperation::kSUB",
    "PluginCapabilityType::kBUILD", "PluginCapabilityType::kCORE", "PluginCapabilityType::kRUNTIME",
    "PluginFieldType::kCHAR", "PluginFieldType::kINT32", "Severity::kERROR", "TensorFormat::kLINEAR",
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own for each test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("EDGECOMP_CACHE_DIR", str(folder))
    return folder


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the library for SM86; not to be written to."""
    if shutil.which("nvcc") is None and not Path(plugins._USUAL_NVCC).is_file():
        pytest.skip("there is no nvcc here, so no library can be compiled")
    try:
        find_headers()
    except PluginMissing as error:
        pytest.skip(f"no headers of TensorRT: {error}")
    folder = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGECOMP_CACHE_DIR", str(folder))
        library, reused = build_library(PLUGIN, sm=[SM], progress=lambda line: None)
    assert not reused
    assert library.path.is_relative_to(folder)
    return folder


@pytest.fixture
def filled(compiled: Path, cache: Path) -> PluginLibrary:
    """The library, in the test's own cache."""
    shutil.copytree(compiled, cache)
    (library,) = cached_libraries(PLUGIN)
    return library


def rewrite(library: PluginLibrary, out: Path, **changes: Any) -> Path:
    """Write a copy of a library that says something else of itself; the line keeps its length."""
    content = library.path.read_bytes()
    old = msgspec.json.encode(library.description)
    new = msgspec.json.encode(msgspec.structs.replace(library.description, **changes))
    assert content.count(old) == 1
    assert len(new) <= len(old)
    out.write_bytes(content.replace(old, new + b" " * (len(old) - len(new))))
    return out


def in_cache(library: PluginLibrary, **changes: Any) -> None:
    """Change what the library of the cache says of itself."""
    rewrite(library, library.path, **changes)
    library.path.with_suffix(".sha256").write_text(file_sha256(library.path))


def fake_headers(folder: Path) -> Path:
    """Write headers that tell a version and nothing else."""
    headers = folder / "headers"
    headers.mkdir()
    (headers / "NvInferRuntimePlugin.h").write_text("")
    lines = "".join(f"#define NV_TENSORRT_{part} 10\n" for part in ("MAJOR", "MINOR", "PATCH"))
    (headers / "NvInferVersion.h").write_text(lines)
    return headers


def fake_nvcc(folder: Path, body: str) -> Path:
    path = folder / "nvcc"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def write_merge(path: Path, **changes: Any) -> Path:
    """Write a graph of one or more TopKMerge nodes, with a function body of the right shapes and other values."""
    onnx = pytest.importorskip("onnx")
    np = pytest.importorskip("numpy")
    options: dict[str, Any] = {"tokens": 16, "r": 4, "width": 8, "nodes": 1, "by_score": False, "dtype": "FLOAT"}
    attributes = {key: value for key, value in changes.items() if key not in options}
    options |= {key: value for key, value in changes.items() if key in options}
    tokens, r, width, by_score = (options[key] for key in ("tokens", "r", "width", "by_score"))
    helper, kind, single = onnx.helper, getattr(onnx.TensorProto, options["dtype"]), onnx.TensorProto.FLOAT
    words: dict[str, Any] = {"r": r, "num_prefix_tokens": 1, "mode": "wavg", "order": "ascending"}
    words["partition"] = "by_score" if by_score else "alternate"
    words |= {"with_map": 1, "plugin_version": "1", "plugin_namespace": "edgecomp"} | attributes
    words = {key: value for key, value in words.items() if value is not None}

    def constant(name: str, value: list[int]) -> Any:
        return helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(np.array(value), name))

    with_map = words.get("with_map", 1) == 1
    formal = ["m", "x", "s", *(["c"] if by_score else [])]
    body = [
        *(constant("begin", [0]), constant("rows", [-r]), constant("axis", [1]), constant("last", [2])),
        helper.make_node("Slice", ["x", "begin", "rows", "axis"], ["y"]),
        helper.make_node("Slice", ["s", "begin", "rows", "axis"], ["z"]),
        helper.make_node("ReduceMax", ["s", "last"], ["q"], keepdims=0),
        helper.make_node("Cast", ["q"], ["i"], to=onnx.TensorProto.INT32),
    ]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("edgecomp", 1)]
    function = helper.make_function(
        "edgecomp",
        "TopKMerge",
        formal,
        ["y", "z", *(["i"] if with_map else [])],
        body,
        opsets[:1],
        attributes=list(words),
    )
    nodes, inputs, outputs = [], [], []
    for number in range(options["nodes"]):
        into = {"m": (kind, [2, tokens, 4]), "x": (kind, [2, tokens, width]), "s": (single, [2, tokens, 1])}
        into |= {"c": (single, [2, tokens])} if by_score else {}
        out = {"y": (kind, [2, tokens - r, width]), "z": (single, [2, tokens - r, 1])}
        out |= {"i": (onnx.TensorProto.INT32, [2, tokens])} if with_map else {}
        nodes.append(
            helper.make_node(
                "TopKMerge",
                [f"{name}{number}" for name in into],
                [f"{name}{number}" for name in out],
                name=f"/blocks.{number}/merge",
                domain="edgecomp",
                **words,
            )
        )
        for given, values in ((into, inputs), (out, outputs)):
            for name, (type_, shape) in given.items():
                values.append(helper.make_tensor_value_info(f"{name}{number}", type_, shape))
    graph = helper.make_graph(nodes, "graph", inputs, outputs)
    model = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def make(onnx: Path, out: Path, **changes: Any) -> BuiltEngine:
    """Build with RTX for SM86 in fp32, silently."""
    options: dict[str, Any] = {"target": sm_target(SM), "runtime": "rtx", "precision": "fp32", "onnx_sha256": "a" * 64}
    return build_engine(onnx, out, **{"progress": lambda line: None} | options | changes)


def sm_target(sm: int) -> Target:
    """Return a shipped target of a compute capability that RTX builds for."""
    for row in api.list_targets():
        target = load_target(row.name)
        if target.sm == sm and "rtx" in target.runtimes:
            return target
    pytest.fail(f"no shipped target has SM{sm}")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_merge(tmp_path / "model.m12.b2.onnx", nodes=2)


# -- the description ------------------------------------------------------------------------------------------


def test_description_says_what_the_sources_do() -> None:
    """Limits, words and types of plugin.toml stand in kernel.h and plugin.cpp too, and in the README."""
    header, source = (PLUGIN.folder / name for name in ("kernel.h", "plugin.cpp"))
    limits = dict(re.findall(r"EDGECOMP_LARGEST_(\w+) = (\d+)", header.read_text()))
    assert {"B": int(limits["BATCH"]), "N": int(limits["TOKENS"])} == {k: PLUGIN.limits[k] for k in "BN"}
    assert int(limits["WIDTH"]) == PLUGIN.limits["D"] == PLUGIN.limits["Dm"]
    text, readme = source.read_text(), (PLUGIN.folder / "README.md").read_text()
    for attribute in PLUGIN.attributes:
        assert f'"{attribute.name}"' in text
        assert f"`{attribute.name}`" in readme
        for value in attribute.values:
            assert f'"{value}"' in text
            assert f"`{value}`" in readme
    assert f'kVERSION = "{PLUGIN.version}"' in text
    assert f'kNAMESPACE = "{PLUGIN.domain}"' in text
    assert {path.name for path in PLUGIN.folder.iterdir()} == {
        *PLUGIN.sources, *PLUGIN.headers, "plugin.toml", "README.md", "CMakeLists.txt"
    }  # fmt: skip


def test_unknown_plugin_and_broken_description(tmp_path: Path) -> None:
    assert plugin_names() == ("topk_merge",)
    with pytest.raises(UnknownName, match=r"no plugin 'topk_merg'; did you mean 'topk_merge'"):
        load_plugin("topk_merg")
    raw = msgspec.toml.decode((PLUGIN.folder / "plugin.toml").read_bytes())
    with pytest.raises(msgspec.ValidationError, match=r"tolerance is given for \['float32'\]"):
        msgspec.convert(raw | {"tolerance": {"float32": 1.0}}, Plugin)
    with pytest.raises(msgspec.ValidationError, match="sources"):
        msgspec.convert(raw | {"sources": ["../kernel.cu"]}, Plugin)


def test_only_what_tensorrt_10_3_has_is_used() -> None:
    """JetPack 6 has 10.3; whoever uses more of TensorRT looks it up there first, and adds it to the list."""
    text = "".join((PLUGIN.folder / name).read_text() for name in ("plugin.h", "plugin.cpp"))
    text = re.sub(r'//[^\n]*|"[^"\n]*"', "", text)
    names = r"I[A-Z][a-z]\w+|Plugin[A-Z]\w+|Dims\w*|Data[A-Z]\w+|Dimension\w+|Tensor[A-Z]\w+|Dynamic\w+|AsciiChar"
    used = set(re.findall(rf"\b(?:{names})\b", text)) | set(re.findall(r"\b\w+::k[A-Z0-9_]+\b", text))
    assert used == TENSORRT_10_3
    assert "getPluginRegistry" not in text, "the registry's layout differs between major versions"
    assert "REGISTER_TENSORRT_PLUGIN" not in text, "nothing registers itself"
    assert not re.search(r"Nv\w+\.h", (PLUGIN.folder / "kernel.cu").read_text())


# -- compiler and headers -------------------------------------------------------------------------------------


def test_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PluginMissing, match=r"absent is not there; install the CUDA toolkit, or name it with --nvcc"):
        find_nvcc(tmp_path / "absent")
    with pytest.raises(PluginMissing, match=r"nvcc --version` names no release"):
        find_nvcc(fake_nvcc(tmp_path, "echo hello"))
    (tmp_path / "text").write_text("no program")
    with pytest.raises(PluginMissing, match=r"text cannot be run: Permission denied"):
        find_nvcc(tmp_path / "text")
    monkeypatch.setattr(plugins, "_USUAL_NVCC", str(tmp_path / "usual"))
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(PluginMissing, match=r"no nvcc on PATH, nor .*usual; install the CUDA toolkit"):
        find_nvcc()


def test_missing_headers_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PluginMissing, match=r"--tensorrt-include .* holds no NvInferRuntimePlugin\.h"):
        find_headers(tmp_path)
    monkeypatch.setattr(plugins, "_SYSTEM_HEADERS", (str(tmp_path),))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PluginMissing, match=r"install libnvinfer-dev .*kernel-lens.*--tensorrt-include DIR"):
        find_headers()
    (tmp_path / "NvInferRuntimePlugin.h").write_text("")
    with pytest.raises(PluginMissing, match=r"NvInferVersion\.h cannot be read: No such file"):
        find_headers()
    (tmp_path / "NvInferVersion.h").write_text("#define NV_TENSORRT_MAJOR 10 //!< major\n#define NV_TENSORRT_MINOR 3\n")
    with pytest.raises(PluginMissing, match="does not state NV_TENSORRT_PATCH"):
        find_headers()
    with (tmp_path / "NvInferVersion.h").open("a") as file:
        file.write("#define TRT_PATCH_ENTERPRISE 7\n#define NV_TENSORRT_PATCH TRT_PATCH_ENTERPRISE //!< patch\n")
    assert find_headers().version == "10.3.7"
    assert find_headers(tmp_path).folder == tmp_path.resolve()


def test_compute_capability_is_checked_before_compiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidSpec, match=r"not compiled for SM72; it is for 75, 80"):
        build_library(PLUGIN, sm=[86, 72], progress=lambda line: None)
    monkeypatch.setattr(plugins, "local_gpu_sm", lambda: None)
    with pytest.raises(InvalidSpec, match=r"no NVIDIA GPU on this machine; name .* --sm 87"):
        build_library(PLUGIN, progress=lambda line: None)
    headers = fake_headers(tmp_path)
    nvcc = fake_nvcc(tmp_path, 'case "$1" in --version) echo "release 11.4, V11";; *) echo sm_75; echo sm_86;; esac')
    with pytest.raises(PluginMissing, match=r"nvcc 11\.4 \(.*\) does not compile for SM120; it does for 75, 86"):
        build_library(PLUGIN, sm=[86, 120], nvcc=nvcc, tensorrt_include=headers, progress=lambda line: None)


def test_compiler_that_fails_is_quoted_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    headers = fake_headers(tmp_path)
    cases = 'case "$1" in --version) echo "release 12.6, V12";; --list-gpu-code) echo sm_86;;'
    nvcc = fake_nvcc(tmp_path, f'{cases} *) echo "plugin.cpp(3): error: no such thing" >&2; exit 2;; esac')
    with pytest.raises(BuildError, match=r"(?s)topk_merge does not compile .*exit 2.*no such thing"):
        build_library(PLUGIN, sm=[86], nvcc=nvcc, tensorrt_include=headers, progress=lambda line: None)
    assert [path for path in cache.rglob("*") if path.is_file()] == []
    assert cached_libraries(PLUGIN) == ()


def test_compiler_that_writes_nothing_or_junk(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that is named by a path from here, which is not one on PATH."""
    headers = fake_headers(tmp_path)
    cases = 'case "$1" in --version) echo "release 12.6, V12";; --list-gpu-code) echo sm_86;;'
    monkeypatch.chdir(tmp_path)
    for work in ("exit 0", 'for word in "$@"; do case "$word" in -o=*) echo junk > "${word#-o=}";; esac; done'):
        nvcc = fake_nvcc(tmp_path, f"{cases} *) {work};; esac")
        with pytest.raises(BuildError, match="ended well and wrote no shared library"):
            build_library(PLUGIN, sm=[86], nvcc=Path(nvcc.name), tensorrt_include=headers, progress=lambda line: None)
    assert [path for path in cache.rglob("*") if path.is_file()] == []
    with pytest.raises(PluginMissing, match="headers is a folder"):
        build_library(PLUGIN, sm=[86], nvcc=headers, tensorrt_include=headers, progress=lambda line: None)


# -- libraries ------------------------------------------------------------------------------------------------


def test_library_is_kept_until_something_changes(filled: PluginLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call compiles nothing; other bytes in the cache are not taken for the library."""
    monkeypatch.setattr(plugins, "_compile", lambda *words: pytest.fail("compiled again"))
    said: list[str] = []
    assert build_library(PLUGIN, sm=[SM], progress=said.append) == (filled, True)
    assert "kept, nothing changed" in said[0]
    with filled.path.open("ab") as file:
        file.write(b"\0")
    assert cached_libraries(PLUGIN) == ()
    with pytest.raises(pytest.fail.Exception, match="compiled again"):
        build_library(PLUGIN, sm=[SM], progress=said.append)


def test_library_holds_code_for_its_gpu_alone(filled: PluginLibrary) -> None:
    """What the file says of itself is what the compiler put in."""
    assert filled.description.sm == (SM,)
    assert filled.description.sources_sha256 == PLUGIN.source_digest()
    program = shutil.which("cuobjdump")
    if program is None:
        pytest.skip("there is no cuobjdump here")
    listed = subprocess.run([program, "--list-elf", filled.path], capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"sm_(\d+)", listed)) == {str(SM)}


@pytest.mark.parametrize(
    ("changes", "runtime", "message"),
    [
        ({"sm": (89,)}, "rtx 1.7.1", "it was compiled for SM89, and SM86 is needed: edgecomp plugin build topk_merge"),
        ({"version": "0"}, "rtx 1.7.1", r"it runs version 0 of edgecomp::TopKMerge, and version 1 is needed"),
        (
            {},
            "tensorrt 11.1.0",
            r"headers of TensorRT 10\.\d+\.\d+, and TensorRT 11\.1\.0 is here: .*headers of TensorRT 11",
        ),
        (
            {"tensorrt": "9.3.0"},
            "rtx 1.7.1",
            r"headers of TensorRT 9\.3\.0, and TensorRT for RTX 1\.7\.1 .*of TensorRT 10",
        ),
        ({"sources_sha256": "0" * 64}, "rtx 1.7.1", "compiled from other sources than those of this edgecomp"),
        ({"plugin": "other"}, "rtx 1.7.1", "it holds the plugin 'other', and 'topk_merge' is needed"),
        ({}, "rtx 1.7.1", ""),
        ({}, "tensorrt 10.3.0", ""),
        ({"tensorrt": "11.1.0"}, "tensorrt 11.4.1", ""),
    ],
)
def test_library_that_does_not_fit_is_refused(
    changes: dict[str, Any], runtime: str, message: str, filled: PluginLibrary
) -> None:
    """Op version, compute capability, TensorRT's major version, sources."""
    library = msgspec.structs.replace(filled, description=msgspec.structs.replace(filled.description, **changes))
    name, version = runtime.split()
    found = why_unfit(library, PLUGIN, SM, Flavour(name, version, None))  # type: ignore[arg-type]
    assert re.search(message, found) if message else found == ""


def test_file_that_is_no_library(tmp_path: Path, filled: PluginLibrary) -> None:
    path = tmp_path / "lib.so"
    with pytest.raises(PluginMissing, match=r"lib\.so cannot be read: No such file"):
        read_library(path)
    path.write_text("text")
    with pytest.raises(PluginMissing, match=r"lib\.so is no shared library"):
        read_library(path)
    path.write_bytes(b"\x7fELF nothing")
    with pytest.raises(PluginMissing, match=r"lib\.so is truncated: it has 12 bytes and its tables reach to 64"):
        read_library(path)
    whole = filled.path.read_bytes()
    for size in (len(whole) // 2, len(whole) - 64):
        path.write_bytes(whole[:size])
        with pytest.raises(PluginMissing, match=rf"truncated: it has {size} bytes"):
            read_library(path)
    header = b"\x7fELF".ljust(64, b"\0")
    path.write_bytes(header)
    with pytest.raises(PluginMissing, match="does not say for which op"):
        read_library(path)
    path.write_bytes(header + b"edgecomp-plugin-info {}\0")
    with pytest.raises(PluginMissing, match="not understood"):
        read_library(path)
    assert read_library(rewrite(filled, path, cuda="9")).description.cuda == "9"


# -- reading ONNX ---------------------------------------------------------------------------------------------


def test_onnx_is_read_as_the_package_reads_it(model: Path) -> None:
    onnx = pytest.importorskip("onnx")
    expected = onnx.load(model)
    found = custom_nodes(model, "edgecomp")
    assert [node.name for node in found] == [node.name for node in expected.graph.node]
    assert found[0].texts["plugin_version"] == "1"
    assert found[0].texts["mode"] == "wavg"
    assert custom_nodes(model, "other") == ()
    bare = onnx.load_from_string(without_functions(model, "edgecomp", "TopKMerge"))
    assert len(bare.functions) == 0
    del expected.functions[:]
    assert bare == expected
    assert without_functions(model, "edgecomp", "Other") == model.read_bytes()


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_onnx_is_an_error(share: float, model: Path) -> None:
    content = model.read_bytes()
    model.write_bytes(content[: int(len(content) * share)])
    try:
        assert custom_nodes(model, "edgecomp") == ()  # cut off before the word itself
    except BuildError as error:
        assert "model.m12.b2.onnx is truncated or no ONNX file" in str(error)  # noqa: PT017


# -- engines --------------------------------------------------------------------------------------------------


@rtx
def test_both_kinds_of_plan_stay(model: Path, tmp_path: Path, filled: PluginLibrary) -> None:
    """`require` and `off` in one process: the layer type tells which ran, and each plan has its own name."""
    out, said = tmp_path / "out", []  # type: Path, list[str]
    built = make(model, out, plugin="require", progress=said.append)
    assert built.path.name == "model.m12.b2.rtx.plugin.engine"
    (line,) = built.plugins
    assert f"2 edgecomp::TopKMerge nodes by the plugin {filled.path}: compiled for SM86" in line
    assert f"{model.name}: {line}" in said
    record = read_record(built.path)
    assert record == built.record
    assert [(merge.node, merge.by) for merge in record.merges] == [
        ("/blocks.0/merge", "plugin"),
        ("/blocks.1/merge", "plugin"),
    ]
    (used,) = record.plugins
    assert (used.name, used.op, used.version, used.sm) == ("topk_merge", "edgecomp::TopKMerge", "1", (86,))
    assert used.sha256 == filled.sha256 == file_sha256(out / used.library)
    assert record.num_layers == 2

    plain = make(model, out, plugin="off")
    assert plain.path.name == "model.m12.b2.rtx.engine"
    assert [merge.by for merge in plain.record.merges] == ["function", "function"]
    assert plain.record.plugins == ()
    assert plain.record.num_layers > 2
    assert built.path.is_file()
    assert "by their function body: --plugin off" in plain.plugins[0]

    (out / used.library).unlink()
    again = make(model, out, plugin="require")
    assert again.reused
    assert file_sha256(out / used.library) == filled.sha256
    assert make(model, out, plugin="off").reused
    assert make(model, out).path == built.path


@rtx
def test_auto_without_a_library_says_so(model: Path, tmp_path: Path) -> None:
    """Nothing is compiled by itself, and one line tells how."""
    said: list[str] = []
    built = make(model, tmp_path, progress=said.append)
    assert built.path.name == "model.m12.b2.rtx.engine"
    expected = "no fitting library for SM86 is compiled (edgecomp plugin build topk_merge --sm 86)"
    assert expected in said[0]
    assert expected in built.plugins[0]
    assert cached_libraries(PLUGIN) == ()


@rtx
def test_require_compiles_into_the_cache(
    model: Path, tmp_path: Path, compiled: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty cache is filled; the compiler itself is replaced by what it gave before."""

    def copy(plugin: Plugin, compiler: Path, headers: Any, description: Any, path: Path) -> None:
        shutil.copytree(compiled, cache, dirs_exist_ok=True)

    monkeypatch.setattr(plugins, "_compile", copy)
    built = make(model, tmp_path, plugin="require")
    assert "compiled for SM86 just now" in built.plugins[0]
    assert built.record.merges[0].by == "plugin"


@rtx
@pytest.mark.parametrize("missing", ["compiler", "headers"])
def test_require_names_what_is_missing(
    missing: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = fake_nvcc(tmp_path, 'echo "release 13.0"')
    monkeypatch.setattr(plugins, "_SYSTEM_HEADERS", ())
    monkeypatch.setattr(plugins, "_PACKAGE_OF_HEADERS", ("edgecomp_no_such_package", ""))
    if missing == "compiler":
        monkeypatch.setattr(plugins, "_USUAL_NVCC", str(tmp_path / "usual"))
        monkeypatch.setenv("PATH", "")
        expected = "no nvcc on PATH"
    else:
        monkeypatch.setenv("PATH", str(nvcc.parent))
        expected = "compiled with TensorRT's headers"
    with pytest.raises(PluginMissing, match=expected):
        make(model, tmp_path / "out", plugin="require")
    assert not (tmp_path / "out").exists()
    assert make(model, tmp_path / "out").record.merges[0].by == "function"


@rtx
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sm": (89,)}, "it was compiled for SM89, and SM86 is needed"),
        ({"version": "0"}, "it runs version 0 of edgecomp::TopKMerge"),
        ({"tensorrt": "9.1.0"}, r"it was compiled with the headers of TensorRT 9\.1\.0, and TensorRT for RTX 1"),
    ],
)
def test_named_library_that_does_not_fit(
    changes: dict[str, Any], message: str, model: Path, tmp_path: Path, filled: PluginLibrary
) -> None:
    """A library that is named is taken or refused, never passed over; one of the cache is passed over with a word."""
    other = rewrite(filled, tmp_path / "other.so", **changes)
    with pytest.raises(PluginMissing, match=rf"--plugin .*other\.so: {message}"):
        make(model, tmp_path / "out", plugin=str(other))
    in_cache(filled, **changes)
    assert make(model, tmp_path / "out").plugins[0].endswith("(edgecomp plugin build topk_merge --sm 86)")


@rtx
def test_named_library_that_fits(model: Path, tmp_path: Path, filled: PluginLibrary) -> None:
    named = shutil.copyfile(filled.path, tmp_path / "named.so")
    built = make(model, tmp_path / "out", plugin=str(named))
    assert built.record.plugins[0].library == f"named.{filled.sha256[:12]}.so"
    with pytest.raises(PluginMissing, match=r"absent\.so cannot be read"):
        make(model, tmp_path / "out", plugin=str(tmp_path / "absent.so"))
    with pytest.raises(UnknownName, match=r"no --plugin 'requir'; did you mean 'require'"):
        make(model, tmp_path / "out", plugin="requir")


@rtx
def test_size_above_the_kernels_limit(tmp_path: Path, filled: PluginLibrary) -> None:
    """`require` names the node and the limit; `auto` takes the function body, and says why."""
    large = write_merge(tmp_path / "large.onnx", tokens=4100, width=1)
    message = r"large\.onnx: node '/blocks\.0/merge' is too large.*\[2, 4100, 4\], and N goes to 4096.*--plugin off"
    with pytest.raises(BuildError, match=message):
        make(large, tmp_path / "out", plugin="require")
    built = make(large, tmp_path / "out")
    assert built.path.name == "large.rtx.engine"
    assert "N goes to 4096" in built.plugins[0]


@rtx
@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        (
            {"plugin_namespace": None},
            r"plugin_namespace=None and plugin_version='1'.*in silence; export the model again",
        ),
        ({"plugin_version": None}, r"plugin_version=None"),
        ({"plugin_version": "7"}, r"asks for version 7 of edgecomp::TopKMerge, and this edgecomp has version 1"),
    ],
)
def test_node_that_tensorrt_would_pass_over(
    attributes: dict[str, Any], message: str, tmp_path: Path, filled: PluginLibrary
) -> None:
    onnx = write_merge(tmp_path / "model.onnx", **attributes)
    with pytest.raises(PluginMissing, match=message):
        make(onnx, tmp_path / "out", plugin="require")
    built = make(onnx, tmp_path / "out")
    assert re.search(message, built.plugins[0])
    assert built.record.merges[0].by == "function"


@rtx
@pytest.mark.parametrize("word", ["off", "auto", "require"])
@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"order": None}, r"node '/blocks.0/merge' \(edgecomp::TopKMerge\) has no attribute 'order'; export .* again"),
        ({"mode": None}, r"has no attribute 'mode'"),
        ({"mode": "avg"}, r"has mode='avg', which is none of wavg, mean, sum, prune, tofu"),
    ],
)
def test_node_that_lost_an_attribute(
    attributes: dict[str, Any], message: str, word: str, tmp_path: Path, filled: PluginLibrary
) -> None:
    """Whatever runs the node: its function body would read the attribute, or worse, would not."""
    onnx = write_merge(tmp_path / "model.onnx", **attributes)
    with pytest.raises(BuildError, match=message):
        make(onnx, tmp_path / "out", plugin=word)


@rtx
def test_graph_without_merge_nodes(tmp_path: Path, filled: PluginLibrary) -> None:
    """`require` is an error; the others build what they built before."""
    onnx = pytest.importorskip("onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    values = [helper.make_tensor_value_info(name, kind, [2, 4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"], name="relu")], "g", values[:1], values[1:])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    assert find_plugin_nodes(path) == ()
    with pytest.raises(BuildError, match=r"model\.onnx: --plugin require was asked for, and the graph has no node"):
        make(path, tmp_path / "out", plugin="require")
    for word in ("auto", "off"):
        built = make(path, tmp_path / "out", plugin=word)
        assert (built.path.name, built.plugins, built.record.merges) == ("model.rtx.engine", (), ())


@rtx
@pytest.mark.parametrize("dtype", ["FLOAT", "FLOAT16", "BFLOAT16"])
@pytest.mark.parametrize("by_score", [False, True])
def test_all_types_and_inputs_build(dtype: str, by_score: bool, tmp_path: Path, filled: PluginLibrary) -> None:
    onnx = write_merge(tmp_path / "model.onnx", dtype=dtype, by_score=by_score)
    precision = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16"}[dtype]
    record = make(onnx, tmp_path / "out", plugin="require", precision=precision).record
    assert [merge.by for merge in record.merges] == ["plugin"]
    assert [tensor.shape for tensor in record.outputs] == [(2, 12, 8), (2, 12, 1), (2, 16)]
    assert [tensor.dtype for tensor in record.outputs[1:]] == ["float32", "int32"]


@rtx
@pytest.mark.parametrize("by_score", [False, True])
def test_a_map_that_nobody_reads_is_no_output(by_score: bool, tmp_path: Path, filled: PluginLibrary) -> None:
    onnx = write_merge(tmp_path / "model.onnx", with_map=0, by_score=by_score)
    for plugin, by in (("require", "plugin"), ("off", "function")):
        record = make(onnx, tmp_path / "out", plugin=plugin).record
        assert [merge.by for merge in record.merges] == [by]
        assert [tensor.shape for tensor in record.outputs] == [(2, 12, 8), (2, 12, 1)]


@rtx
@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"mode": "avg"}, r"mode = 'avg' is unknown; known: wavg, mean, sum, prune, tofu"),
        ({"order": None}, r"the node has no attribute 'order'; every attribute has to be written"),
        ({"mode": 3}, r"attribute 'mode' is not text"),
        ({"num_prefix_tokens": 15}, r"num_prefix_tokens is not between 0 and tokens - 2 \(x \[2, 16, 8\]"),
    ],
)
def test_plugin_refuses_what_the_op_has_not(
    attributes: dict[str, Any],
    message: str,
    tmp_path: Path,
    filled: PluginLibrary,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The plugin's own words, for products that parse a graph without edgecomp, go to TensorRT's logger or stderr."""
    monkeypatch.setattr("edgecomp.engines.plugin_use._require_attributes", lambda *words: None)
    onnx = write_merge(tmp_path / "model.onnx", **attributes)
    with pytest.raises(BuildError, match=r"model\.onnx"):
        make(onnx, tmp_path / "out", plugin="require")
    assert re.search(message, capfd.readouterr().err)


@rtx
def test_parser_that_prefers_functions_gets_a_graph_without_them(model: Path, filled: PluginLibrary) -> None:
    """TensorRT 10.3 (JetPack 6): the copy has no function, and RTX parses it with the plugin."""
    flavour = load_flavour("rtx")
    old, new = (Flavour("tensorrt", version, flavour.module) for version in ("10.3.0", "10.7.0"))
    (found,) = find_plugin_nodes(model)
    from edgecomp.engines.plugin_use import PluginChoice

    choices = (PluginChoice(PLUGIN, found.nodes, filled, ""),)
    content = graph_for_plugins(old, model, choices)
    assert content is not None
    assert graph_for_plugins(new, model, choices) is None
    assert graph_for_plugins(old, model, (PluginChoice(PLUGIN, found.nodes, None, ""),)) is None
    trt, logger = flavour.module, collecting_logger(flavour)
    builder = trt.Builder(logger)
    with loaded_library(builder.get_plugin_registry(), filled.path, [CREATOR]):
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = parse_onnx(flavour, network, logger, model, content=content)
        assert {network.get_layer(i).type for i in range(network.num_layers)} == {trt.LayerType.PLUGIN_V3}
        del parser, network


@rtx
def test_library_in_the_process_already_is_noticed(model: Path, tmp_path: Path, filled: PluginLibrary) -> None:
    """Somebody else's registration makes `off` an error rather than a plan of the other kind.

    Ours goes into the registry of one builder, and is gone with it.
    """
    with loaded_library(load_flavour("rtx").module.get_plugin_registry(), filled.path, [CREATOR]):
        with pytest.raises(BuildError, match=r"became a plugin layer, and no plugin was wanted"):
            make(model, tmp_path / "out", plugin="off")
        assert make(model, tmp_path / "out", plugin="require").record.merges[0].by == "plugin"
    assert make(model, tmp_path / "out", plugin="off").record.merges[0].by == "function"


# -- the command line -----------------------------------------------------------------------------------------

Cli = Callable[..., Any]


def test_plugin_build_on_the_command_line(cli: Cli, filled: PluginLibrary, tmp_path: Path) -> None:
    said = cli("plugin", "build", "topk_merge", "--sm", SM, "--out", tmp_path / "copies")
    assert said.code == 0
    assert "topk_merge version 1 for SM86: kept, nothing changed" in said.out
    copy = tmp_path / "copies" / "libedgecomp_topk_merge.so"
    assert str(copy) in said.out
    assert file_sha256(copy) == filled.sha256
    (tmp_path / "file").write_text("")
    said = cli("plugin", "build", "topk_merge", "--sm", SM, "--out", tmp_path / "file")
    assert said.code == 2
    assert "file/libedgecomp_topk_merge.so cannot be written" in said.err
    document = json.loads(cli("plugin", "build", "topk_merge", "--sm", SM, "--json").out)
    assert document["library"]["description"]["sm"] == [SM]
    assert document["reused"] is True


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["topk_merg"], "did you mean 'topk_merge'"),
        (["topk_merge", "--sm", "50"], "not compiled for SM50"),
        (["topk_merge", "--sm", "86", "--nvcc", "/absent"], "/absent is not there"),
        (["topk_merge", "--sm", "86", "--tensorrt-include", "/absent"], "--tensorrt-include /absent holds no"),
    ],
)
def test_plugin_build_that_cannot_be_is_exit_2(words: list[str], message: str, cli: Cli, tmp_path: Path) -> None:
    nvcc = fake_nvcc(tmp_path, 'echo "release 13.0"')
    said = cli("plugin", "build", *words, *([] if "--nvcc" in words else ["--nvcc", nvcc]))
    assert (said.code, said.out) == (2, "")
    assert message in said.err


def test_plugin_list(cli: Cli, filled: PluginLibrary) -> None:
    said = cli("plugin", "list")
    assert said.code == 0
    assert re.search(r"topk_merge +edgecomp::TopKMerge +1 +float32, float16, bfloat16", said.out)
    assert re.search(rf"topk_merge +SM86 .* current +{re.escape(str(filled.path))}", said.out)
    (row,) = json.loads(cli("plugin", "list", "--json").out)
    assert row["limits"]["N"] == 4096
    in_cache(filled, sources_sha256="0" * 64)
    assert "stale: of other sources" in cli("plugin", "list").out


def test_plugin_list_of_an_empty_cache(cli: Cli) -> None:
    said = cli("plugin", "list")
    assert said.code == 0
    assert "none is compiled; edgecomp plugin build NAME --sm N compiles one" in said.out


@rtx
def test_plugin_check(cli: Cli, filled: PluginLibrary, tmp_path: Path) -> None:
    said = cli("plugin", "check", filled.path)
    assert said.code == 0
    assert "edgecomp::TopKMerge version 1" in said.out
    assert "compiled for SM86 with CUDA" in said.out
    (creator,) = json.loads(cli("plugin", "check", filled.path, "--json").out)["creators"]
    assert creator == {"namespace": "edgecomp", "name": "TopKMerge", "version": "1"}
    silent = compile_c(tmp_path / "silent.so", "int nothing(void) { return 0; }")
    said = cli("plugin", "check", silent)
    assert said.code == 2
    assert "silent.so loads and registers no plugin; it has to export getCreators" in said.err
    empty = "void* const* getCreators(int* n) { *n = 0; return 0; }"
    assert "registers no plugin" in cli("plugin", "check", compile_c(tmp_path / "empty.so", empty)).err
    lost = compile_c(tmp_path / "lost.so", "int gone(void); int (*use)(void) = gone;")
    said = cli("plugin", "check", lost)
    assert said.code == 2
    assert re.search(r"lost\.so does not load: .*gone", said.err)
    (tmp_path / "text.so").write_text("text")
    assert "text.so is no shared library" in cli("plugin", "check", tmp_path / "text.so").err


def compile_c(out: Path, text: str) -> Path:
    program = shutil.which("cc") or shutil.which("gcc")
    if program is None:
        pytest.skip("there is no C compiler here")
    out.with_suffix(".c").write_text(text)
    subprocess.run([program, "-shared", "-fPIC", out.with_suffix(".c"), "-o", out], check=True)
    return out


@rtx
def test_build_of_a_bundle(cli: Cli, bundle: Path, filled: PluginLibrary) -> None:
    """A method that merges nothing has no use for the plugin; `auto` says nothing of it."""
    said = cli("build", bundle, "--target", "rtx-4090", "--plugin", "require")
    assert said.code == 2
    assert "--plugin require was asked for, and the graph has no node" in said.err
    said = cli("build", bundle, "--target", "rtx-4090")
    assert said.code == 0
    assert "plugin" not in said.out


@rtx
def test_build_of_a_bundle_in_which_one_bucket_merges(
    cli: Cli, bundle: Path, filled: PluginLibrary, edit_manifest: Callable[..., None]
) -> None:
    """`require` is about the graphs that merge; the text says what ran each node, and what to load before the plan."""
    onnx = write_merge(bundle / "model.m9.b1.onnx")

    def reseal(raw: dict[str, Any]) -> None:
        (entry,) = (one for one in raw["files"] if one["name"] == onnx.name)
        entry |= {"sha256": file_sha256(onnx), "size": onnx.stat().st_size}

    edit_manifest(bundle, reseal)
    target = sm_target(SM).name
    said = cli("build", bundle, "--target", target, "--plugin", "require")
    assert said.code == 0, said.err
    folder = bundle / "engines" / target
    names = {path.name for path in folder.iterdir()}
    library = f"libedgecomp_topk_merge.{filled.sha256[:12]}.so"
    assert {"model.m4.b1.rtx.engine", "model.m9.b1.rtx.plugin.engine", "model.m9.b1.rtx.plugin.json", library} <= names
    assert f"model.m9.b1.rtx.plugin.engine: 1 edgecomp::TopKMerge node by the plugin {filled.path}" in said.out
    assert f"{folder / library} (sha256 {filled.sha256[:12]}) has to be loaded before the plan" in said.out
    shown = cli("inspect", folder / "model.m9.b1.rtx.plugin.engine").out
    assert f"plugin     topk_merge 1 for edgecomp::TopKMerge: load {library} beside it first" in shown
    assert "merge      /blocks.0/merge by the plugin" in shown
    document = json.loads(cli("build", bundle, "--target", target, "--json").out)
    merging = [engine for engine in document["engines"] if engine["record"]["merges"]]
    assert [engine["record"]["plugins"][0]["library"] for engine in merging] == [library]
    assert all(engine["reused"] for engine in document["engines"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["FLOAT", "FLOAT16", "BFLOAT16"])
@pytest.mark.parametrize("by_score", [False, True])
def test_engine_gives_the_bits_of_the_kernel(dtype: str, by_score: bool, tmp_path: Path) -> None:
    """Inside an engine as through the C interface; `test_plugin_index` holds the latter against the definition."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    sm = local_gpu_sm()
    assert sm is not None
    targets = [target for row in api.list_targets() if (target := load_target(row.name)).sm == sm and target.runtimes]
    if not targets:
        pytest.skip(f"no shipped target has SM{sm}")
    try:
        runtime = choose_flavour(targets[0])
    except (TargetMismatch, MissingDependency) as error:
        pytest.skip(f"no TensorRT builds for this GPU: {error}")
    onnx = write_merge(tmp_path / "model.onnx", dtype=dtype, by_score=by_score, tokens=197, r=16, width=192)
    precision = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16"}[dtype]
    built = make(onnx, tmp_path / "out", target=targets[0], runtime=runtime, precision=precision, plugin="require")

    flavour = load_flavour(runtime)
    trt, logger = flavour.module, collecting_logger(flavour)
    library = built.path.parent / built.record.plugins[0].library
    engine_runtime = trt.Runtime(logger)
    handle = engine_runtime.get_plugin_registry().load_library(str(library))
    assert handle is not None
    engine = engine_runtime.deserialize_cuda_engine(built.path.read_bytes())
    context = engine.create_execution_context()
    kinds = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "int32")}
    tensors = {}
    for tensor in (*built.record.inputs, *built.record.outputs):
        value = torch.randn(tensor.shape, device="cuda").abs() + 0.1
        tensors[tensor.name] = value.to(kinds[tensor.dtype])
        context.set_tensor_address(tensor.name, tensors[tensor.name].data_ptr())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    assert context.execute_async_v3(stream.cuda_stream)
    torch.cuda.synchronize()

    kernel = ctypes.CDLL(str(library))
    kernel.edgecomp_topk_merge_workspace.restype = ctypes.c_size_t
    kinds_of_kernel = ("FLOAT", "FLOAT16", "BFLOAT16")
    params = (ctypes.c_int32 * 10)(2, 197, 4, 192, 16, 1, 0, int(by_score), 0, kinds_of_kernel.index(dtype))
    needed = kernel.edgecomp_topk_merge_workspace(ctypes.byref(params))
    space = torch.empty(needed, dtype=torch.uint8, device="cuda")
    again = {name: torch.zeros_like(tensors[name]) for name in ("y0", "z0", "i0")}
    given = [tensors.get(name) for name in ("m0", "x0", "s0", "c0")] + list(again.values()) + [space]
    pointers = [ctypes.c_void_p(value.data_ptr() if value is not None else None) for value in given]
    code = kernel.edgecomp_topk_merge(None, ctypes.byref(params), *pointers, ctypes.c_size_t(needed))
    torch.cuda.synchronize()
    assert code == 0
    for name, value in again.items():
        assert torch.equal(tensors[name], value), name


@pytest.mark.slow
def test_compiles_for_every_compute_capability(compiled: Path) -> None:
    """One library with code for all; in CI, where nvcc is."""
    every = tuple(sm for sm in PLUGIN.sm if sm != 121)
    library, _ = build_library(PLUGIN, sm=every, progress=lambda line: None)
    assert library.description.sm == every
