"""Reading a TOML file into a frozen struct, with errors that name file, key and remedy."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from edgecomp.errors import InvalidSpec

__all__ = ["read_toml"]

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
