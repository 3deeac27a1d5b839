"""What lies in a checkpoint, from names and headers alone: one file, or a folder of shards with an index.

No tensor is read here, and no torch is needed: a safetensors file begins with the names, types and shapes of all that
it holds. Checkpoints come from anywhere, so nothing in them is believed: an index names files of its own folder alone.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from edgecomp.errors import WeightsError
from edgecomp.files import JSON_ERRORS
from edgecomp.specs.origin import file_sha256

__all__ = [
    "CONFIG",
    "FLOATS",
    "PICKLES",
    "Entry",
    "Located",
    "Stored",
    "count_tensors",
    "locate",
    "path_digest",
    "read_headers",
]

#: Types that are read as weights.
FLOATS = ("float64", "float32", "bfloat16", "float16")
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
SAFETENSORS = ".safetensors"
CONFIG = "config.json"  # of the model, where its folder has one
_INDEX = ".index.json"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{2,6})-of-(?P<count>\d{2,6})(?P<suffix>\.\w+)")
_LARGEST_HEADER = 100_000_000  # bytes; what safetensors itself takes
_LARGEST_INDEX = 256 << 20
_BITS = re.compile(r"\d+")  # of a type's name: 16 of BF16
_TYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
    "U16": "uint16", "U32": "uint32", "U64": "uint64", "BOOL": "bool", "C64": "complex64",
    "F4": "float4", "F6_E2M3": "float6_e2m3", "F6_E3M2": "float6_e3m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip


class _Place(msgspec.Struct, frozen=True):
    """Of a tensor, as the header of a safetensors file says it."""

    dtype: str
    shape: tuple[Annotated[int, Meta(ge=0, lt=1 << 48)], ...]
    data_offsets: tuple[int, int]


class Entry(msgspec.Struct, frozen=True):
    """A tensor of a checkpoint: where it lies, its shape and its type."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int


class Located(msgspec.Struct, frozen=True):
    """The files of a checkpoint.

    Attributes:
        path: what the user named.
        files: all that are there, in the order of their names.
        index: key -> file name, as the index says; empty where there is no index.
        absent: names of shards that the index names and the folder does not hold.
        note: what a user should know of the choice; "" for nothing.
    """

    path: Path
    files: tuple[Path, ...]
    index: dict[str, str] = {}
    absent: tuple[str, ...] = ()
    note: str = ""

    @property
    def is_sharded(self) -> bool:
        """Whether the tensors lie in several files."""
        return len(self.files) + len(self.absent) > 1

    @property
    def is_pickled(self) -> bool:
        """Whether the files are torch's, which only torch reads."""
        return self.files[0].suffix != SAFETENSORS

    @property
    def config(self) -> Path:
        """Where the model's configuration lies, if its folder has one."""
        return self.files[0].with_name(CONFIG)

    @property
    def num_bytes(self) -> int:
        """Bytes of all files that are there."""
        return sum(file.stat().st_size for file in self.files)


class Stored(msgspec.Struct, frozen=True):
    """What a checkpoint holds.

    Attributes:
        entries: name -> tensor, of all files that are there.
        lost: name -> the absent shard that holds it, as the index says.
        metadata: what a safetensors file says of itself.
    """

    located: Located
    entries: dict[str, Entry]
    lost: dict[str, str] = {}
    metadata: dict[str, str] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """All names, those of absent shards among them."""
        return (*self.entries, *self.lost)

    def require_there(self, names: Iterable[str]) -> None:
        """Refuse half of a sharded checkpoint where the other half is needed."""
        lost = {name: self.lost[name] for name in names if name in self.lost}
        if lost:
            shards = sorted(set(lost.values()))
            raise WeightsError(
                f"checkpoint {self.located.path} is not whole: its index names {', '.join(shards)}, not there, where "
                f"{len(lost)} of the tensors lie that are needed, first {', '.join(list(lost)[:3])}; bring these "
                "shards too"
            )


def count_tensors(count: int) -> str:
    """Return `1 tensor`, `2 tensors`."""
    return f"{count} tensor{'' if count == 1 else 's'}"


def locate(path: Path) -> Located:
    """Find the files of a checkpoint: a file, an index, or a folder that holds one checkpoint.

    Raises:
        WeightsError: nothing is there, or more than one checkpoint; an index that is damaged or names something
            outside its folder; a shard without the others.
    """
    if path.is_dir():
        return _locate_in_folder(path)
    if not path.is_file():
        raise WeightsError(f"weights file {path} is not there; check the path")
    if path.name.endswith(_INDEX):
        return _read_index(path, named=path)
    if path.suffix != SAFETENSORS and path.suffix not in PICKLES:
        raise WeightsError(
            f"weights file {path} ends in {path.suffix!r}; give {SAFETENSORS} or {', '.join(PICKLES)}, "
            "or a folder with one checkpoint"
        )
    shard = _SHARD.fullmatch(path.name)
    if shard is None or int(shard["count"]) == 1:
        return Located(path, (path,))
    index = path.with_name(f"{shard['stem']}{shard['suffix']}{_INDEX}")
    note = f"{path.name} is one shard of {int(shard['count'])}; the whole checkpoint beside it was taken"
    if index.is_file():
        return msgspec.structs.replace(_read_index(index, named=path), note=note)
    return msgspec.structs.replace(_all_shards([path], named=path), note=note)


def _locate_in_folder(folder: Path) -> Located:
    files = sorted(file for file in folder.iterdir() if file.is_file())
    for suffixes in ((SAFETENSORS,), PICKLES):
        indices = [file for file in files if file.name.endswith(tuple(f"{suffix}{_INDEX}" for suffix in suffixes))]
        if len(indices) == 1:
            return _read_index(indices[0], named=folder)
        if len(indices) > 1:
            raise _several(folder, indices)
        of_type = [file for file in files if file.suffix in suffixes]
        shards = [file for file in of_type if (found := _SHARD.fullmatch(file.name)) and int(found["count"]) > 1]
        if shards and len(shards) == len(of_type):
            return _all_shards(shards, named=folder)
        if len(of_type) == 1:
            return Located(folder, tuple(of_type))
        if of_type:
            raise _several(folder, of_type)
    raise WeightsError(
        f"folder {folder} holds no checkpoint: neither a *{_INDEX} nor a file that ends in {SAFETENSORS} or "
        f"{', '.join(PICKLES)}; check the path"
    )


def _several(folder: Path, files: list[Path]) -> WeightsError:
    names = ", ".join(file.name for file in files[:5])
    return WeightsError(f"folder {folder} holds {len(files)} checkpoints: {names}; name one of them")


def _read_index(index: Path, *, named: Path) -> Located:
    folder = index.parent
    if index.stat().st_size > _LARGEST_INDEX:
        raise WeightsError(
            f"index {index} has {index.stat().st_size} bytes, more than any index; is it the right file?"
        )
    try:
        content: Any = msgspec.json.decode(index.read_bytes())
    except JSON_ERRORS as error:
        raise WeightsError(f"index {index} is no JSON ({error}); copy it again") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(n, str) for n in weight_map.values()):
        raise WeightsError(f"index {index} has no weight_map of names and files; copy it again")
    names = sorted(set(weight_map.values()))
    for name in names:
        if name in ("", ".", "..") or re.search(r"[/\\\0]|^[A-Za-z]:", name) or Path(name).is_absolute():
            raise WeightsError(
                f"index {index} points outside its folder: {name!r}; an index names files beside it alone, "
                "so nothing was read"
            )
        if not name.endswith((SAFETENSORS, *PICKLES)):
            raise WeightsError(f"index {index} names {name!r}, which ends in neither {SAFETENSORS} nor {PICKLES[0]}")
    if len({name.endswith(SAFETENSORS) for name in names}) > 1:
        raise WeightsError(f"index {index} names both {SAFETENSORS} files and others; give one kind")
    there = tuple(folder / name for name in names if (folder / name).is_file())
    if not there:
        raise WeightsError(f"index {index} names {len(names)} shards, and none of them is there, first {names[0]}")
    absent = tuple(name for name in names if folder / name not in there)
    return Located(named, there, weight_map, absent)


def _all_shards(shards: list[Path], *, named: Path) -> Located:
    """Take shards without their index, when all are there: only then is it known that no tensor is missing."""
    found = _SHARD.fullmatch(shards[0].name)
    assert found is not None
    count, width, folder = int(found["count"]), len(found["number"]), shards[0].parent
    if count > 10_000:
        raise WeightsError(f"weights file {shards[0]} says that it is one of {count} shards; is it the right file?")
    names = [f"{found['stem']}-{n:0{width}d}-of-{found['count']}{found['suffix']}" for n in range(1, count + 1)]
    others = [file.name for file in shards if file.name not in names]
    if others:
        raise _several(folder, [shards[0], folder / others[0]])
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise WeightsError(
            f"checkpoint {named} is not whole: {len(absent)} of {count} shards are not there, first {absent[0]}, and "
            f"no index says what they hold; bring them, or the {_INDEX} file"
        )
    return Located(named, tuple(folder / name for name in names))


def read_headers(located: Located) -> Stored:
    """Return what the safetensors files of a checkpoint hold.

    Raises:
        WeightsError: a file is truncated or something else, or holds other tensors than the index says.
    """
    found = {file: _read_header(file) for file in located.files}
    metadata = found[located.files[0]][1] if len(found) == 1 else {}
    return stored_of(located, {file: entries for file, (entries, _) in found.items()}, metadata)


def stored_of(
    located: Located, found: Mapping[Path, Mapping[str, Entry]], metadata: Mapping[str, str] | None = None
) -> Stored:
    """Put what each file holds together, and hold it to the index."""
    entries: dict[str, Entry] = {}
    for file, held in found.items():
        for name, entry in held.items():
            if name in entries and located.index.get(name, file.name) == file.name:
                if not located.index:
                    raise WeightsError(
                        f"checkpoint {located.path}: {name!r} is in {entries[name].file.name} and in {file.name}; "
                        "it is not one checkpoint"
                    )
                entries[name] = entry
            entries.setdefault(name, entry)
    lost = {}
    for name, shard in located.index.items():
        if shard in located.absent:
            lost[name] = shard
        elif name not in entries or entries[name].file.name != shard:
            raise WeightsError(
                f"checkpoint {located.path}: its index says that {name!r} is in {shard}, which does not hold it; "
                "the files are not of one checkpoint, copy them again"
            )
    odd = next((name for name in (*entries, *lost) if not name.isprintable()), None)
    if odd is not None:
        raise WeightsError(f"checkpoint {located.path} names a tensor {odd!r}, with control characters; rename it")
    if located.index:
        entries = {name: entry for name, entry in entries.items() if name in located.index}
    if not entries and not lost:
        raise WeightsError(f"weights file {located.path} holds no tensor; is it the right file?")
    return Stored(located, entries, lost, dict(metadata or {}))


def _read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, _LARGEST_HEADER):
                raise _damaged(path, size, "the header is cut off, or is none")
            raw: Any = msgspec.json.decode(file.read(length))
    except OSError as error:
        raise WeightsError(f"weights file {path} cannot be read: {error.strerror}; check the path") from None
    except JSON_ERRORS as error:
        raise _damaged(path, size, f"the header is no JSON, {error}") from None
    if not isinstance(raw, dict):
        raise _damaged(path, size, "the header is no table of tensors")
    metadata = raw.pop("__metadata__", None)
    entries, end = {}, 0
    for name, where in raw.items():
        try:
            place = msgspec.convert(where, _Place)
        except msgspec.ValidationError:
            raise _damaged(path, size, f"the header says nothing of where {name!r} lies") from None
        (begin, stop), dtype = place.data_offsets, _TYPES.get(place.dtype, place.dtype.lower())
        if not 0 <= begin <= stop <= size:
            raise _damaged(path, size, f"the header gives {name!r} a place that cannot be")
        bits = _BITS.search(place.dtype)
        told_bits = math.prod(place.shape) * (8 if bits is None else int(bits[0]))
        if told_bits != 8 * (stop - begin) and (bits is not None or dtype == "bool"):
            shape = " x ".join(map(str, place.shape)) or "1"
            raise _damaged(path, size, f"the header gives {name!r} {stop - begin} bytes for {shape} of {dtype}")
        entries[name] = Entry(path, place.shape, dtype, stop - begin)
        end = max(end, stop)
    if 8 + length + end != size:
        raise _damaged(path, size, f"the header tells of {8 + length + end} bytes")
    told = metadata.items() if isinstance(metadata, dict) else ()
    return entries, {key: value for key, value in told if isinstance(value, str)}


def _damaged(path: Path, size: int, problem: str) -> WeightsError:
    return WeightsError(f"weights file {path} is truncated or not safetensors ({size} bytes): {problem}; copy it again")


def path_digest(path: Path) -> str:
    """Return a digest that tells one checkpoint from another before it is read.

    Of a single file the sha256, with that of a config.json beside it; of shards the index, and names, sizes and times
    of the files, which is no proof of what they hold, but spares reading gigabytes to learn that a request is the one
    of before.
    """
    located = locate(path)
    config = located.config
    if not located.is_sharded:
        digest = file_sha256(located.files[0])
        return hashlib.sha256(f"{digest} {file_sha256(config)}".encode()).hexdigest() if config.is_file() else digest
    told = [f"{file.name} {(seen := file.stat()).st_size} {seen.st_mtime_ns}" for file in located.files]
    told += [file_sha256(config)] if config.is_file() else []
    return hashlib.sha256("\n".join([msgspec.json.encode(located.index).decode(), *told]).encode()).hexdigest()
