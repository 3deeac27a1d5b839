"""Reports written whole or not at all, and never over a file that is something else."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from edgecomp.errors import EdgecompError, InvalidSpec

__all__ = ["require_free", "write_whole"]

_HEAD = 8192  # bytes in which a marker stands


def require_free(path: Path, marker: str, *, force: bool) -> None:
    """Refuse to write where a folder is, or a file that does not hold the marker of its kind.

    Raises:
        InvalidSpec: naming the file.
    """
    if path.is_dir():
        raise InvalidSpec(f"{path} is a folder; name a file")
    if not path.exists() or force:
        return
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise InvalidSpec(f"{path} is there and cannot be read ({error.strerror}); name another file") from None
    if marker.encode() not in head:
        raise InvalidSpec(f"{path} is there and no report of edgecomp; name another file, or --force to lose it")


def write_whole(path: Path, content: str | bytes) -> Path:
    """Write a file beside its place and move it there.

    Raises:
        EdgecompError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError as error:
        raise EdgecompError(f"report {path} cannot be written: {error.strerror}; name another place") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path
