"""Reading a TOML file into a frozen struct, with errors that name file, key and remedy."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edgecomp.errors import InvalidSpec

__all__ = ["read_toml", "to_toml"]

Spec = TypeVar("Spec", bound=msgspec.Struct)

_LARGEST_FILE = 1 << 20  # bytes; a recipe or target is a few KiB


def read_toml(path: Path, kind: type[Spec], *, what: str) -> Spec:
    """Read `path` into a `kind`; unknown keys, wrong types and duplicate keys are errors.

    Args:
        path: the TOML file.
        kind: the struct to fill; it forbids unknown fields.
        what: how to call the file in an error, for example "recipe".
    """
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise InvalidSpec(f"{what} {path} is larger than {_LARGEST_FILE} bytes; is it a TOML file?")
        content = path.read_bytes()
    except OSError as error:
        raise InvalidSpec(f"{what} {path} cannot be read: {error.strerror}; check the path") from None
    try:
        return msgspec.toml.decode(content, type=kind)
    except UnicodeDecodeError as error:
        raise InvalidSpec(f"{what} {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise InvalidSpec(f"{what} {path}: {error}; compare it with the ones that edgecomp ships") from None


def to_toml(spec: msgspec.Struct) -> str:
    """Return a struct as TOML that `read_toml` reads back; a field that is None is left out.

    Plain values come first in each table, tables behind them, since TOML has it so.
    """
    return "\n".join(_lines(msgspec.to_builtins(spec), ())).strip() + "\n"


_BARE = re.compile(r"[A-Za-z0-9_-]+")


def _lines(fields: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    values = {key: value for key, value in fields.items() if value is not None and not isinstance(value, Mapping)}
    tables = {key: value for key, value in fields.items() if isinstance(value, Mapping)}
    lines = [f"[{'.'.join(map(_key, path))}]"] if path and (values or not tables) else []
    lines += [f"{_key(key)} = {_value(value)}" for key, value in values.items()]
    lines += [""] if lines else []
    for key, value in tables.items():
        lines += _lines(value, (*path, key))
    return lines


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, str):  # TOML's basic strings take JSON's escapes
        return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(key)} = {_value(one)}" for key, one in value.items() if one is not None) + " }"
    return "[" + ", ".join(map(_value, value)) + "]"
