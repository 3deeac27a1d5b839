"""Named tensors in files: what `edgecomp run` reads as inputs and writes as outputs."""

from __future__ import annotations

import os
import uuid
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from edgecomp.errors import RunError
from edgecomp.specs.tensor import TensorSpec

__all__ = ["Array", "read_tensors", "require_inputs", "write_tensors"]

Array: TypeAlias = npt.NDArray[Any]

_SUFFIXES = (".safetensors", ".npz")
_SAFETENSORS_TYPES = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F16", "F32", "F64")
_KINDS = "biuf"  # numpy's: bool, signed, unsigned, floating
_NO_BFLOAT16 = "bfloat16, which numpy does not support"


def read_tensors(path: str | Path) -> dict[str, Array]:
    """Read every tensor of a `.safetensors` or `.npz` file; nothing in it is ever unpickled.

    The arrays are contiguous, in the machine's byte order, and independent of the file.

    Raises:
        RunError: the file is missing, empty, of another suffix, truncated, or holds something other than plain
            numbers: objects, text, bfloat16, float8.
    """
    path = Path(path)
    suffix = _require_suffix(path)
    try:
        if path.stat().st_size == 0:
            raise RunError(f"tensor file {path} is empty (0 bytes); write it again")
        tensors = _read_npz(path) if suffix == ".npz" else _read_safetensors(path)
    except FileNotFoundError:
        raise RunError(f"tensor file {path} does not exist; check the path") from None
    except OSError as error:
        raise RunError(f"tensor file {path} cannot be read: {error.strerror or error}") from None
    if not tensors:
        raise RunError(f"tensor file {path} holds no tensors; write at least one named array into it")
    return tensors


def write_tensors(path: str | Path, tensors: Mapping[str, Array]) -> None:
    """Write named tensors as `.safetensors` or `.npz`, by the suffix of `path`.

    The file appears whole or not at all: it is written beside its place, synchronised and moved there. Equal tensors
    give equal bytes.
    """
    path = Path(path)
    suffix = _require_suffix(path)
    if not tensors:
        raise RunError(f"no tensors were given to write to {path}; give at least one")
    plain = {name: _plain(name, np.asarray(tensor), f"cannot write {path}") for name, tensor in tensors.items()}
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        try:
            with beside.open("xb") as file:
                if suffix == ".npz":
                    _write_npz(file, plain)
                else:
                    _write_safetensors(file, plain)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(
            f"tensor file {path} cannot be written: {error.strerror or error}; "
            "give a path in a folder that exists and that you may write to"
        ) from None


def require_inputs(tensors: Mapping[str, Array], specs: Sequence[TensorSpec], where: str) -> None:
    """Check that `tensors` are exactly the inputs that `specs` declare, with finite values.

    Args:
        tensors: what was given.
        specs: what the graph takes.
        where: what they came from, for example the file's path; begins the message.

    Raises:
        RunError: the first of: names, type, shape, NaN or infinity, sizes and ids out of range.
    """
    wanted, given = [spec.name for spec in specs], list(tensors)
    missing = [name for name in wanted if name not in tensors]
    unexpected = [name for name in given if name not in wanted]
    if missing or unexpected:
        raise RunError(
            f"{where}: inputs missing: {', '.join(missing) or 'none'}; unexpected: {', '.join(unexpected) or 'none'}. "
            f"Give exactly: {', '.join(map(str, specs))}"
        )
    for spec in specs:
        _require_input(tensors[spec.name], spec, where)
        if spec.kind == "sizes":
            _require_sizes(tensors[spec.name], spec, where)
        elif spec.kind == "ids":
            _require_ids(tensors[spec.name], spec, where)


def _require_input(tensor: Array, spec: TensorSpec, where: str) -> None:
    if spec.dtype == "bfloat16":
        raise RunError(f"{where}: input {spec} is {_NO_BFLOAT16}; export a graph whose inputs are float32 or float16")
    if tensor.dtype != np.dtype(spec.dtype):
        raise RunError(
            f"{where}: input {spec.name!r} is {tensor.dtype}, expected {spec.dtype}; "
            f"convert it with numpy's astype({spec.dtype!r})"
        )
    if tensor.shape != spec.shape:
        raise RunError(
            f"{where}: input {spec.name!r} has shape {list(tensor.shape)}, expected {list(spec.shape)}; "
            "shapes are fixed at export, so reshape it or export another batch or size"
        )
    if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
        nan, infinite = int(np.isnan(tensor).sum()), int(np.isinf(tensor).sum())
        raise RunError(
            f"{where}: input {spec.name!r} holds {nan} NaN and {infinite} infinite of {tensor.size} values; "
            "replace them, for every output would depend on them"
        )


def _require_sizes(tensor: Array, spec: TensorSpec, where: str) -> None:
    """Refuse sizes that no grid has: a graph would clamp the places and give finite numbers all the same."""
    tokens = spec.tokens
    most = spec.limit or tokens or np.iinfo(tensor.dtype).max
    for sizes in tensor.reshape(-1, 2).tolist():
        rows, columns = sizes
        is_grid = 1 <= rows <= most and 1 <= columns <= most and (not tokens or rows * columns <= tokens)
        if not is_grid and sizes != [0, 0]:
            of = f", {tokens} tokens at most" if tokens else ""
            raise RunError(
                f"{where}: input {spec.name!r} holds {rows} x {columns}, which is no grid of 1 to {most} rows and "
                f"columns{of}; give rows and columns of the real tokens, or 0 and 0 for a row that only fills the batch"
            )


def _require_ids(tensor: Array, spec: TensorSpec, where: str) -> None:
    entries = spec.limit or np.iinfo(tensor.dtype).max
    wrong = tensor[(tensor < 0) | (tensor >= entries)]
    if wrong.size:
        raise RunError(
            f"{where}: input {spec.name!r} holds {wrong[0]}, and the table has the entries 0 to {entries - 1}; "
            "tokenize the text for this model"
        )


def _require_suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise RunError(f"tensor file {path} ends in {suffix!r}; name a file that ends in .safetensors or .npz")
    return suffix


def _plain(name: str, tensor: Array, where: str) -> Array:
    """Return `tensor` contiguous and in native byte order, or refuse what is not plain numbers."""
    kind = tensor.dtype
    if kind.name == "bfloat16":
        raise RunError(f"{where}: tensor {name!r} is {_NO_BFLOAT16}; store it as float32")
    if kind.hasobject:
        raise RunError(f"{where}: tensor {name!r} holds Python objects, which only pickle stores; make it numbers")
    if kind.kind not in _KINDS or kind.itemsize > 8:
        raise RunError(f"{where}: tensor {name!r} is of type {kind}; use bool, integers or floats of up to 64 bits")
    return np.asarray(tensor, dtype=kind.newbyteorder("="), order="C")


def _read_safetensors(path: Path) -> dict[str, Array]:
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Array] = {}
    try:
        with safe_open(path, framework="np") as file:
            names: list[str] = file.keys()
            for name in names:
                kind = file.get_slice(name).get_dtype()
                if kind == "BF16":
                    raise RunError(f"tensor file {path}: tensor {name!r} is {_NO_BFLOAT16}; store it as float32")
                if kind not in _SAFETENSORS_TYPES:
                    raise RunError(
                        f"tensor file {path}: tensor {name!r} is of type {kind}, which numpy does not support; "
                        f"use one of {', '.join(_SAFETENSORS_TYPES)}"
                    )
                tensors[name] = _plain(name, file.get_tensor(name), f"tensor file {path}")
    except SafetensorError as error:
        raise _damaged(path, "safetensors", error) from None
    return tensors


def _read_npz(path: Path) -> dict[str, Array]:
    """Read the arrays one by one: `numpy.load` would pass members that are not arrays, and unpickle on request."""
    tensors: dict[str, Array] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                if name == member.filename:
                    raise RunError(f"tensor file {path}: member {name!r} is not an array; write it with numpy.savez")
                with archive.open(member) as file:
                    tensors[name] = _plain(name, _read_npy(path, name, file), f"tensor file {path}")
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise _damaged(path, "npz", error) from None
    return tensors


def _read_npy(path: Path, name: str, file: Any) -> Array:
    try:
        array: Array = np.lib.format.read_array(file, allow_pickle=False)
        if array.dtype.kind == "V" and array.dtype.itemsize == 2 and array.dtype.names is None:
            raise RunError(
                f"tensor file {path}: tensor {name!r} is {array.dtype}, probably {_NO_BFLOAT16}; store it as float32"
            )
        return array
    except MemoryError:
        raise RunError(f"tensor file {path}: tensor {name!r} does not fit into memory; is its header right?") from None
    except (ValueError, OverflowError) as error:
        if "Object arrays" in str(error):
            raise RunError(
                f"tensor file {path}: tensor {name!r} holds Python objects in a pickle, which could run code and is "
                "never loaded; store it as numbers"
            ) from None
        raise _damaged(path, "npz", f"tensor {name!r}: {error}") from None


def _write_safetensors(file: BinaryIO, tensors: Mapping[str, Array]) -> None:
    from safetensors.numpy import save

    file.write(save(dict(tensors)))


def _write_npz(file: BinaryIO, tensors: Mapping[str, Array]) -> None:
    """Write as `numpy.savez` does, but with any name (savez cannot take "file") and without the time of day."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, tensor in tensors.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, tensor, allow_pickle=False)


def _damaged(path: Path, kind: str, problem: object) -> RunError:
    return RunError(
        f"tensor file {path} is not a whole {kind} file ({path.stat().st_size} bytes): {problem}; write it again"
    )
