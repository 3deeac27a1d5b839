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
    bodies = {"": model.graph} | {f"{function.domain}::{function.name}": function for function in model.functions}
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
        ops=_count_ops(model.graph),
        functions={name: _count_ops(body) for name, body in bodies.items() if name},
        topk=tuple(text for name, body in bodies.items() for text in _topk_sizes(name, body)),
        reducing_scatters=tuple(
            f"{name or 'the graph'}: {node.op_type} {node.name!r}"
            for name, body in bodies.items()
            for node in body.node
            if node.op_type in ("ScatterElements", "ScatterND") and _reduces(node)
        ),
        parameters=sum(_size(tensor.dims) for tensor in model.graph.initializer),
        external_files=tuple(sorted(external)),
    )


def _count_ops(body: Any) -> dict[str, int]:
    """Return how often each op occurs in a graph or function, most frequent first."""
    ops: dict[str, int] = {}
    for node in body.node:
        name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        ops[name] = ops.get(name, 0) + 1
    return dict(sorted(ops.items(), key=lambda item: (-item[1], item[0])))


def _reduces(node: Any) -> bool:
    return any(attribute.name == "reduction" and attribute.s != b"none" for attribute in node.attribute)


def _topk_sizes(name: str, body: Any) -> list[str]:
    """Return how many each TopK of a graph or function takes: a number, or an attribute of the function's node."""
    from onnx import numpy_helper

    makers = {output: node for node in body.node for output in node.output}
    constants = {tensor.name: tensor for tensor in getattr(body, "initializer", ())}
    found = []
    for node in body.node:
        if node.op_type != "TopK":
            continue
        source, text = node.input[1], "a computed number"
        while source in makers and makers[source].op_type in ("Unsqueeze", "Reshape", "Identity"):
            source = makers[source].input[0]
        if source in constants:
            text = ", ".join(map(str, numpy_helper.to_array(constants[source]).ravel().tolist()))
        elif source in makers and makers[source].op_type == "Constant":
            (value,) = makers[source].attribute
            number = numpy_helper.to_array(value.t) if value.HasField("t") else value.ints or value.i
            text = value.ref_attr_name or str(number)
        found.append(f"{text} (in {name})" if name else text)
    return found


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
