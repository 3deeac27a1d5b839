"""What is known about an engine: the JSON file beside it.

The engine itself is a raw plan, so that any TensorRT tool can load it; nothing of ours stands inside.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from edgecomp.errors import BuildError, TargetMismatch
from edgecomp.specs.origin import file_sha256

__all__ = [
    "EngineMerge",
    "EnginePlugin",
    "EngineProof",
    "EngineRecord",
    "EngineTensor",
    "read_record",
    "require_engine",
    "sidecar_path",
]

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


class EngineProof(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """In which types the matrix products run, and where that was seen.

    Attributes:
        by: `network`: the typed network after parsing, which TensorRT keeps to; `engine`: in the built engine's own
            layer information too.
        products: matrix products and convolutions by the type of their operands; behind Q/DQ the quantised one.
        weights: elements of their weights, likewise.
        matched: how many were found in the ONNX file too, with the same type.
        in_engine: how many the built engine names, with no wider type.
        islands: those that the manifest keeps wider on purpose.
        wider: other small ones that run wider than the precision says.
    """

    by: Literal["network", "engine"]
    products: dict[str, int]
    weights: dict[str, int]
    matched: int
    in_engine: int = 0
    islands: tuple[str, ...] = ()
    wider: tuple[str, ...] = ()


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
        opt_level: what the builder was given; -1 is its own.
        max_aux_streams: likewise.
        tactic_sources: likewise; none: its own.
        fp32_nodes_sha256: hash of the names of the islands that the manifest lists, "" where there are none.
        timing_cache: hash of the cache that the builder started from; `empty`, or "" where it had none.
        proof: in which types the matrix products run; none in records from before there was one.
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
    opt_level: int = -1
    max_aux_streams: int = -1
    tactic_sources: tuple[str, ...] | None = None
    fp32_nodes_sha256: str = ""
    timing_cache: str = ""
    proof: EngineProof | None = None


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


def require_engine(engine: Path, *, runtime: str, version: str, sm: int) -> EngineRecord:
    """Return the record of an engine that this TensorRT and this GPU can run, or say why they cannot.

    A plan holds native code of one TensorRT version for its GPUs: loaded elsewhere, it fails late or not at all.

    Args:
        engine: the plan.
        runtime: "tensorrt" or "rtx".
        version: of that TensorRT.
        sm: compute capability of the GPU.

    Raises:
        TargetMismatch: it was built by another TensorRT, or for another GPU; both are named.
        BuildError: plan and record disagree, or one of them is missing.
    """
    record = read_record(engine)
    titles = {"rtx": "TensorRT for RTX", "tensorrt": "TensorRT"}
    if (record.runtime, record.runtime_version) != (runtime, version):
        raise TargetMismatch(
            f"{engine} was built by {titles[record.runtime]} {record.runtime_version}, and "
            f"{titles.get(runtime, runtime)} {version} is here; a plan runs in the version that built it: build again"
            " here"
        )
    if sm not in record.sm:
        built = ", ".join(f"SM{number}" for number in record.sm)
        raise TargetMismatch(
            f"{engine} was built for {record.target} ({built}), and the GPU here is SM{sm}; build again here"
        )
    if not engine.is_file():
        raise BuildError(f"there is a record and no plan {engine}; build the engine again")
    size = engine.stat().st_size
    if size != record.size_bytes:
        raise BuildError(
            f"{engine} has {size} bytes, and its record says {record.size_bytes}; it is truncated or of another build: "
            f"copy plan and record together, or build the engine again"
        )
    seen = file_sha256(engine)
    if seen != record.sha256:
        raise BuildError(
            f"{engine} has sha256 {seen[:12]}, and its record says {record.sha256[:12]}; plan and record are not of "
            f"the same build: copy both together, or build the engine again"
        )
    return record
