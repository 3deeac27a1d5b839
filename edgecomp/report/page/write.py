"""Reports written whole or not at all, and never over a file that is something else."""

from __future__ import annotations

from pathlib import Path

from edgecomp.errors import InvalidSpec
from edgecomp.files import write_whole

__all__ = ["require_free", "write_report"]

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


def write_report(path: Path, content: str | bytes) -> Path:
    """Write a file whole, or not at all.

    Raises:
        EdgecompError: it cannot be written.
    """
    return write_whole(path, content.encode() if isinstance(content, str) else content, noun="report")
