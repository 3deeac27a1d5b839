"""`edgecomp inspect`: what is inside a bundle, an ONNX file, an engine or a checkpoint, from files alone."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgecomp.bundle import open_bundle
from edgecomp.engines import read_record
from edgecomp.errors import BuildError, EdgecompError, InvalidSpec, MissingDependency, RunError
from edgecomp.report.contents import (
    BundleContents,
    CheckpointFile,
    EngineContents,
    OnnxContents,
    WeightsContents,
    WeightsFit,
)
from edgecomp.specs import load_recipe, method_names
from edgecomp.specs.layout import best_match, name_groups
from edgecomp.specs.origin import file_sha256

if TYPE_CHECKING:
    from edgecomp.backbones.weights import Candidate
    from edgecomp.checkpoint import Stored

__all__ = ["inspect"]


def inspect(
    path: str | Path = "", *, weights: str | Path = "", params: Mapping[str, Any] | None = None
) -> BundleContents | OnnxContents | EngineContents | WeightsContents:
    """Return what a bundle, an ONNX file, an engine or a checkpoint holds; nothing is run.

    Args:
        path: a bundle, an .onnx file or an .engine file.
        weights: instead of it, a checkpoint: a file, or a folder of shards.
        params: of a method, where a checkpoint does not store them.

    Raises:
        BundleError: a bundle that is not whole. RunError: the file is absent, or none of the three.
        WeightsError: what is no checkpoint. MissingDependency: ONNX needs the package onnx, weights torch.
    """
    if bool(str(path)) == bool(str(weights)):
        raise InvalidSpec("give either a bundle, an .onnx file or an .engine file, or --weights FILE|FOLDER")
    if params and not str(weights):
        raise InvalidSpec(f"parameters are for a checkpoint: drop {', '.join(params)}, or give --weights")
    if str(weights):
        return _inspect_weights(Path(weights), params or {})
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


def _inspect_weights(path: Path, params: Mapping[str, Any]) -> WeightsContents:
    try:
        from edgecomp.backbones.weights import candidates
    except ImportError as error:
        raise MissingDependency(error.name or str(error), needed_for="`inspect --weights`", extra="export") from error
    checkpoint, found = candidates(path, params)
    stored = checkpoint.stored
    return WeightsContents(
        path=str(path),
        files=tuple(CheckpointFile(file.name, file.stat().st_size) for file in stored.located.files),
        absent=stored.located.absent,
        note=stored.located.note,
        saved_by=stored.metadata.get("edgecomp.method", ""),
        types=dict(Counter(entry.dtype for entry in stored.entries.values()).most_common()),
        tensors=len(stored.names),
        first_keys=stored.names[:8],
        groups=name_groups(stored.names, count=8),
        fits=tuple(_fit(candidate, stored, params) for candidate in found),
        nearest="" if found else _nearest(stored.names),
    )


def _fit(candidate: Candidate, stored: Stored, params: Mapping[str, Any]) -> WeightsFit:
    match, names = candidate.match, candidate.match.names
    held = [stored.entries[key] for key in names.values() if key in stored.entries]
    return WeightsFit(
        method=candidate.method,
        layout=match.layout.name,
        prefix=match.prefix,
        tensors=len(names),
        size_bytes=sum(entry.num_bytes for entry in held),
        foreign=len(match.foreign),
        foreign_groups=name_groups(match.foreign),
        unknown=match.unknown,
        preset=candidate.preset,
        placement=candidate.placement,
        params=candidate.params,
        decided=candidate.decided,
        width=candidate.width,
        tokens_in=candidate.tokens_in,
        kept=candidate.default,
        may_keep=str(candidate.rule) if candidate.rule is not None else "",
        notes=candidate.notes,
        problem=candidate.problem,
        command="" if candidate.problem else _command(candidate, stored.located.path, params),
    )


def _command(candidate: Candidate, path: Path, params: Mapping[str, Any]) -> str:
    host = {"encoder": "", "after": " --backbone none", "inside": " --backbone HOST", "llm": ""}[candidate.placement]
    sets = "".join(f" --set params.{name}={value}" for name, value in params.items())
    return f"edgecomp export --method {candidate.method} --weights {shlex.quote(str(path))}{host}{sets}"


def _nearest(names: tuple[str, ...]) -> str:
    """Return which layout of which method a checkpoint that fits none is nearest to, and what differs."""
    found = [(best_match(names, load_recipe(method).layouts), method) for method in method_names()]
    near = [(match.share, match, method) for match, method in found if match is not None and match.share > 0]
    if not near:
        return ""
    _, match, method = max(near, key=lambda item: item[0])
    below = f" below {match.prefix!r}" if match.prefix else ""
    return f"{match.layout.name} of {method}{below}, with {match.differences()}"


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
