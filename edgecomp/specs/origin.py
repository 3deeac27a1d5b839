"""Where weights come from, as the manifest states it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import msgspec

from edgecomp.errors import WeightsError

__all__ = ["WeightsOrigin", "file_origin", "file_sha256"]


class WeightsOrigin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where weights come from.

    Attributes:
        kind: `random` (untrained), `file`, `pretrained` (downloaded on request), `module` (handed over in Python).
        name: the file's name, or what was downloaded; never a path.
        sha256: of the file, or of the tensors where there is no file.
        layout: the checkpoint layout that its keys told.
        seed: of random weights.
    """

    kind: Literal["random", "file", "pretrained", "module"]
    name: str = ""
    sha256: str = ""
    layout: str = ""
    seed: int = 0

    def __str__(self) -> str:
        if self.kind == "random":
            return f"random (seed {self.seed}), untrained"
        layout = f", {self.layout} layout" if self.layout else ""
        return f"{self.kind} {self.name}{layout}, sha256 {self.sha256[:12]}"


def file_origin(path: Path, *, layout: str = "") -> WeightsOrigin:
    """Return the origin of a weights file."""
    return WeightsOrigin(kind="file", name=path.name, sha256=file_sha256(path), layout=layout)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise WeightsError(f"file {path} cannot be read: {error.strerror}; check the path") from None
    return digest.hexdigest()
