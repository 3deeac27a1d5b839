"""`edgecomp inspect`: what is inside a bundle, an ONNX file or an engine, from files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgecomp.bundle import open_bundle
from edgecomp.engines import read_record
from edgecomp.errors import BuildError, EdgecompError, MissingDependency, RunError
from edgecomp.report.contents import BundleContents, EngineContents, OnnxContents
from edgecomp.specs.origin import file_sha256

__all__ = ["inspect"]


def inspect(path: str | Path) -> BundleContents | OnnxContents | EngineContents:
    """Return what a bundle, an ONNX file or an engine holds; nothing is run.

    Raises:
        BundleError: a bundle that is not whole. RunError: the file is absent, or none of the three.
        MissingDependency: reading ONNX needs the package onnx.
    """
    path = Path(path)
    if path.is_dir():
        opened = open_bundle(path)
        below = tuple(
            str(file.relative_to(path)) for file in sorted(path.rglob("*")) if file.is_file() and file.parent != path
        )
        size = sum(entry.size for entry in opened.manifest.files)
        return BundleContents(str(path), size, opened.manifest, below)
    if not path.is_file():
        raise RunError(f"{path} is not there; give a bundle, an .onnx file or an .engine file")
    if path.suffix == ".onnx":
        return _inspect_onnx(path)
    if path.suffix in (".engine", ".plan", ".trt"):
        return _inspect_engine(path)
    raise RunError(f"{path} ends in {path.suffix!r}; give a bundle, an .onnx file or an .engine file")


def _inspect_engine(path: Path) -> EngineContents:
    record, problem, digest = None, "", file_sha256(path)
    try:
        record = read_record(path)
        if record.sha256 != digest:
            problem = f"the record says sha256 {record.sha256[:12]}; the engine was altered or exchanged"
    except BuildError as error:
        problem = str(error)
    return EngineContents(str(path), path.stat().st_size, digest, record, problem)


def _inspect_onnx(path: Path) -> OnnxContents:
    try:
        import onnx
    except ImportError as error:
        raise MissingDependency("onnx", needed_for="inspecting an ONNX file", extra="export") from error
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise RunError(f"{path} is truncated or no ONNX file ({error}); copy it again") from None
    if not model.HasField("graph"):
        raise EdgecompError(f"{path} holds no graph, so it is no ONNX model; is it the right file?")
    ops: dict[str, int] = {}
    for graph in (model.graph, *model.functions):
        for node in graph.node:
            name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            ops[name] = ops.get(name, 0) + 1
    external = {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    return OnnxContents(
        path=str(path),
        size_bytes=path.stat().st_size,
        sha256=file_sha256(path),
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        ir_version=model.ir_version,
        opsets={opset.domain or "ai.onnx": opset.version for opset in model.opset_import},
        inputs=tuple(_describe(value) for value in model.graph.input),
        outputs=tuple(_describe(value) for value in model.graph.output),
        ops=dict(sorted(ops.items(), key=lambda item: (-item[1], item[0]))),
        functions=tuple(f"{function.domain}::{function.name}" for function in model.functions),
        parameters=sum(_size(tensor.dims) for tensor in model.graph.initializer),
        external_files=tuple(sorted(external)),
    )


def _size(dims: Any) -> int:
    size = 1
    for dim in dims:
        size *= dim
    return size


def _describe(value: Any) -> str:
    import onnx

    kind = value.type.tensor_type
    shape = [dim.dim_param or (dim.dim_value if dim.HasField("dim_value") else "?") for dim in kind.shape.dim]
    return f"{value.name} {onnx.TensorProto.DataType.Name(kind.elem_type).lower()}{shape}".replace("'", "")
