"""Small files written whole or not at all, and edgecomp's own JSON documents read whole or refused by name."""

from __future__ import annotations

import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from edgecomp.errors import EdgecompError, RunError

__all__ = ["JSON_ERRORS", "encode_document", "read_content", "read_document", "require_folder", "write_whole"]

#: What decoding bytes that anybody may have written can raise.
JSON_ERRORS: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

T = TypeVar("T", bound=msgspec.Struct)


class _Head(msgspec.Struct, frozen=True):
    """The fields that tell whether a document is of a kind and a schema that are known."""

    kind: str = ""
    schema: int = 0


def read_content(path: Path, *, noun: str, largest: int) -> bytes:
    """Return the bytes of a file.

    Args:
        noun: what the file is, for example "result".
        largest: the most bytes that one can have.

    Raises:
        RunError: it cannot be read, or is larger.
    """
    try:
        size = path.stat().st_size
        if size > largest:
            raise RunError(f"{path} has {size} bytes, more than any {noun}; is it the right file?")
        return path.read_bytes()
    except OSError as error:
        raise RunError(f"{noun} {path} cannot be read: {error.strerror}; check the path") from None


def read_document(path: Path, of: type[T], *, noun: str, verb: str, again: str, largest: int) -> T:
    """Read a JSON document that states its `kind` and `schema`, as `of` gives them by default.

    Args:
        noun: what it is, for example "result".
        verb: the command that writes it, for example "edgecomp profile".
        again: how to get another, for example "measure again".
        largest: the most bytes that one can have.

    Raises:
        RunError: it cannot be read, is truncated, of another kind or schema, or a field is not as it must be.
    """
    content = read_content(path, noun=noun, largest=largest)
    expected: dict[str, Any] = {field.name: field.default for field in msgspec.structs.fields(of)}
    try:
        head = msgspec.json.decode(content, type=_Head)
    except msgspec.ValidationError:  # another type of value, so another kind of document
        head = _Head()
    except JSON_ERRORS as error:
        raise RunError(f"{noun} {path} is truncated or no JSON ({error}); {again}, or copy it again") from None
    if head.kind != expected["kind"]:
        raise RunError(f"{path} is JSON, and no {noun} of `{verb}`: its kind is {head.kind or 'missing'!r}")
    if head.schema != expected["schema"]:
        raise RunError(
            f"{noun} {path} is of schema {head.schema}, and this edgecomp reads {expected['schema']}; install the "
            f"edgecomp that wrote it, or {again}"
        )
    try:
        return msgspec.json.decode(content, type=of)
    except msgspec.ValidationError as error:
        raise RunError(f"{noun} {path} is damaged or was edited: {error}; {again}") from None


def encode_document(document: msgspec.Struct) -> bytes:
    """Return a document as JSON that people can read, too."""
    return msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n"


def require_folder(folder: Path, *, noun: str) -> None:
    """Refuse a folder where no file could be written, before the work for one is done; nothing is left there.

    Of a folder that is still to be made, the nearest above it is asked.

    Raises:
        EdgecompError: with the folder.
    """
    try:
        there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise EdgecompError(
            f"{noun} cannot be written to {folder}: {error.strerror or error}; name another place"
        ) from None


def write_whole(path: Path, content: bytes, *, noun: str) -> Path:
    """Write a file beside its place and move it there, with its folder where that is missing; return the path.

    Args:
        noun: what it is, for example "result".

    Raises:
        EdgecompError: it cannot be written; what was there is as it was.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise EdgecompError(f"{noun} {path} cannot be written: {error.strerror or error}; name another place") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path
