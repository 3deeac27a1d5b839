"""What is known about an engine: the JSON file beside it.

The engine itself is a raw plan, so that any TensorRT tool can load it; nothing of ours stands inside.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from edgecomp.errors import BuildError

__all__ = ["EngineMerge", "EnginePlugin", "EngineRecord", "EngineTensor", "read_record", "sidecar_path"]

_SCHEMA = 1
_LARGEST_SIDECAR = 1 << 24  # bytes


class EngineTensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An input or output of an engine, with the type that TensorRT gave it."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class EnginePlugin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A plugin library that an engine needs before it can be read; it lies beside the engine.

    Attributes:
        name: the plugin's.
        op: the ONNX op that it runs.
        version: of the op.
        library: file name of the copy beside the engine.
        sha256: its hash.
        sm: compute capabilities that it holds code for.
        tensorrt: version of the headers that it was compiled with.
        cuda: release of the compiler.
    """

    name: str
    op: str
    version: str
    library: str
    sha256: str
    sm: tuple[int, ...]
    tensorrt: str
    cuda: str


class EngineMerge(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A node that a plugin could run, and what runs it in this engine; seen in the parsed network."""

    node: str
    by: Literal["plugin", "function"]


class EngineRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where an engine comes from, and what it is.

    Attributes:
        model: file name of the ONNX graph.
        onnx_sha256: its hash.
        weights_sha256: hash of the external data, or "" where there is none.
        target: the target's name.
        runtime: "tensorrt" or "rtx".
        sm: the compute capabilities that the plan holds code for.
        precision: the word that the graph was exported with.
        workspace_mib: the limit that the builder was given; 0 is its own.
        seconds: how long parsing and building took.
        num_layers: layers of the parsed network, before TensorRT fuses them.
        layer_types: how many of each type those are, by TensorRT's names.
        size_bytes: size of the plan.
        sha256: hash of the plan.
        warnings: what the parser and the builder warned of, each once.
        plugins: libraries that have to be loaded before the engine is.
        merges: every node that a plugin could run, and what runs it.
    """

    schema: Literal[1]
    model: str
    onnx_sha256: str
    weights_sha256: str
    target: str
    runtime: Literal["tensorrt", "rtx"]
    runtime_version: str
    sm: tuple[int, ...]
    precision: str
    workspace_mib: int
    seconds: float
    num_layers: int
    size_bytes: int
    sha256: str
    warnings: tuple[str, ...]
    inputs: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    edgecomp_version: str
    plugins: tuple[EnginePlugin, ...] = ()
    merges: tuple[EngineMerge, ...] = ()
    layer_types: dict[str, int] = {}


class _Versioned(msgspec.Struct, frozen=True):
    schema: int


def sidecar_path(engine: Path) -> Path:
    """Return where the record of an engine lies: the engine's name with `.json` for `.engine`."""
    return engine.with_suffix(".json")


def read_record(engine_path: Path) -> EngineRecord:
    """Read the record beside an engine; does not read the engine."""
    path = sidecar_path(engine_path)
    try:
        if path.stat().st_size > _LARGEST_SIDECAR:
            raise BuildError(f"{path} is larger than {_LARGEST_SIDECAR} bytes and no record of an engine; build again")
        content = path.read_bytes()
    except OSError as error:
        raise BuildError(
            f"the record {path} of engine {engine_path.name} cannot be read: {error.strerror}; build the engine again"
        ) from None
    try:
        schema = msgspec.json.decode(content, type=_Versioned).schema
        if schema > _SCHEMA:
            raise BuildError(
                f"{path} has schema {schema}, and this edgecomp reads up to {_SCHEMA}; "
                f"upgrade edgecomp, or build the engine again"
            )
        return msgspec.json.decode(content, type=EngineRecord)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BuildError(f"{path} is no record of an engine: {error}; build the engine again") from None
