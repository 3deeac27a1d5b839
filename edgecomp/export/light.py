"""Reads an ONNX file without its weights: large tensors stay on disk, in the file itself or beside it.

A model of 2 GB, or of more than protobuf can parse, is read in the time its nodes take. The file is mapped; every
tensor of `_LARGE` bytes or more is replaced by a note of where its bytes lie.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError

from edgecomp.errors import RunError
from edgecomp.wire import field_bytes, fields

__all__ = ["LARGEST_PROTOBUF", "External", "LightModel", "Stored", "read_light"]

LARGEST_PROTOBUF = (2 << 30) - 1  # bytes; what protobuf parses, and with it every ONNX parser
_LARGE = 4096  # bytes; from here on a tensor stays on disk
_SMALL = 1024  # bytes; up to here external data is read
_LARGEST_GRAPH = 256 << 20  # bytes of nodes and names, without the weights
_MOST_FIELDS = 1 << 20  # of one message: a node of a graph is one
_STORED = "edgecomp.stored"

# Field numbers of onnx.proto, which never change: which fields of a message may hold tensors, and the message there.
_INSIDE: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
}
_TENSOR_FLOATS, _TENSOR_RAW, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 4, 9, 13, 14


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where the bytes of a tensor lie: a file, the offset in it and their number."""

    path: Path
    offset: int
    length: int

    def read(self) -> bytes:
        """Read the bytes."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.length)


@dataclasses.dataclass(frozen=True)
class External:
    """A tensor whose data lies in another file, as the model says it, and what is wrong with that."""

    name: str
    location: str
    offset: int
    length: int
    problem: str = ""
    leaves: bool = False


@dataclasses.dataclass(frozen=True)
class LightModel:
    """An ONNX model without large weights.

    Attributes:
        path: the file.
        size: its bytes.
        proto: the model; large tensors have shape and type, and no data.
        stored: where the data of tensors in `proto` without data lies; their external data names the index here.
        externals: the tensors with external data.
    """

    path: Path
    size: int
    proto: Any
    stored: tuple[Stored | None, ...]
    externals: tuple[External, ...]

    def array(self, tensor: Any, *, largest: int) -> npt.NDArray[Any] | None:
        """Return a tensor's values, or None where they are larger than so many bytes, or not to be read."""
        size = math.prod(tensor.dims) * _item_bytes(tensor.data_type)
        if size > largest:
            return None
        whole = onnx.TensorProto()
        whole.CopyFrom(tensor)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = self.stored[int(tensor.external_data[0].value)]
            if place is None or place.length != math.ceil(size):
                return None
            _fill(whole, place)
        try:
            return np.asarray(onnx.numpy_helper.to_array(whole))
        except (ValueError, TypeError):
            return None


def read_light(path: Path) -> LightModel:
    """Read a model without its large tensors.

    Raises:
        RunError: the file is absent, empty, truncated or no ONNX model.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            notes: list[tuple[int, int]] = []
            slim = b"".join(_slim("model", content, 0, size, notes))
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"{path} cannot be read: {reason}; give an .onnx file") from None
    except (IndexError, RecursionError):
        raise RunError(f"{path} is truncated or no ONNX file ({size} bytes); copy or export it again") from None
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(slim)
    except DecodeError:
        raise RunError(f"{path} is truncated or no ONNX file ({size} bytes); copy or export it again") from None
    if not proto.HasField("graph") or not proto.graph.node:
        raise RunError(f"{path} holds no graph with nodes, so it is no ONNX model; is it the right file?")
    stored: list[Stored | None] = [Stored(path, offset, length) for offset, length in notes]
    externals = []
    for tensor in _tensors(proto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries.get(_STORED, "").isdigit() and int(entries[_STORED]) < len(notes):
            continue
        external = _external(path, tensor, entries)
        externals.append(external)
        place = None if external.problem else Stored(path.parent / external.location, external.offset, external.length)
        if place is not None and place.length <= _SMALL:
            _fill(tensor, place)  # a shape, maybe: inference wants it
            continue
        del tensor.external_data[:]
        tensor.external_data.add(key=_STORED, value=str(len(stored)))
        stored.append(place)
    return LightModel(path, size, proto, tuple(stored), tuple(externals))


def _fill(tensor: Any, place: Stored) -> None:
    """Put the data into a tensor."""
    tensor.raw_data = place.read()
    tensor.data_location = onnx.TensorProto.DEFAULT
    del tensor.external_data[:]


def _slim(kind: str, content: mmap.mmap, begin: int, end: int, notes: list[tuple[int, int]]) -> Iterator[bytes]:
    """Yield the bytes of a message without its large tensors; their places go to `notes`."""
    copied = 0
    for count, (number, start, at, to) in enumerate(fields(content, begin, end)):
        if count == _MOST_FIELDS:
            raise ValueError(f"a part of it has more than {_MOST_FIELDS} fields, as no graph has")
        inner = _INSIDE.get(kind, {}).get(number, "")
        if to - at < _LARGE or (kind != "tensor" and not inner):
            copied += to - start
            if copied > _LARGEST_GRAPH:
                raise ValueError(f"more than {_LARGEST_GRAPH >> 20} MiB of it are no weights")
            yield content[start:to]
        elif kind != "tensor":
            yield field_bytes(number, b"".join(_slim(inner, content, at, to, notes)))
        elif number in (_TENSOR_RAW, _TENSOR_FLOATS):  # packed floats lie as raw data does, little-endian
            entry = field_bytes(1, _STORED.encode()) + field_bytes(2, str(len(notes)).encode())
            yield field_bytes(_TENSOR_EXTERNAL, entry) + bytes([_TENSOR_LOCATION << 3, onnx.TensorProto.EXTERNAL])
            notes.append((at, to - at))
        else:
            yield content[start:to]


def _tensors(proto: Any) -> Iterator[Any]:
    """Yield every tensor of a model: initializers, and those in attributes."""
    yield from _tensors_of(proto.graph)
    for function in proto.functions:
        yield from _tensors_of(function)


def _tensors_of(body: Any) -> Iterator[Any]:
    yield from getattr(body, "initializer", ())
    for node in body.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for graph in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from _tensors_of(graph)


def _external(model: Path, tensor: Any, entries: dict[str, str]) -> External:
    """Say where external data lies, and what is wrong with it; nothing is read."""
    location = entries.get("location", "")
    needed = math.ceil(math.prod(tensor.dims) * _item_bytes(tensor.data_type))
    try:
        offset, length = int(entries.get("offset") or 0), int(entries.get("length") or needed)
    except ValueError:
        return External(tensor.name, location, 0, 0, "its offset or length is no number")
    found = External(tensor.name, location, offset, length)
    if not location or "\0" in location:
        return dataclasses.replace(found, problem=f"the location {location!r} names no file")
    folder = model.parent.resolve()
    try:
        path = (folder / location).resolve()
        held = path.stat().st_size if path.is_file() else -1
    except (OSError, RuntimeError):  # too long a name, a loop of links
        return dataclasses.replace(found, problem=f"the location {location[:100]!r} cannot be looked at")
    if folder not in path.parents or ".." in Path(location).parts or Path(location).is_absolute():
        return dataclasses.replace(found, problem=f"{location!r} leaves the model's folder", leaves=True)
    if held < 0:
        return dataclasses.replace(found, problem=f"{location!r} is not there")
    if offset < 0 or length < 0:
        return dataclasses.replace(found, problem=f"the offset {offset} or length {length} is negative")
    if length != needed:
        return dataclasses.replace(found, problem=f"it has {length} bytes in {location!r} and needs {needed}")
    if held < offset + length:
        return dataclasses.replace(found, problem=f"{location!r} has {held} bytes and it ends at {offset + length}")
    return found


def _item_bytes(data_type: int) -> float:
    """Return the bytes of an element; half a byte for those of four bits."""
    name = onnx.TensorProto.DataType.Name(data_type) if data_type in onnx.TensorProto.DataType.values() else ""
    if name in ("INT4", "UINT4", "FLOAT4E2M1"):
        return 0.5
    if name in ("INT2", "UINT2"):
        return 0.25
    if name in ("", "UNDEFINED", "STRING"):
        return 0
    return float(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize)
