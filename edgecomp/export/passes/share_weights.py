"""Moves weights into one external file that all graphs of a bundle point into, each tensor once."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import onnx_ir as ir

__all__ = ["WeightsFile", "share_weights"]

_INLINE_BELOW = 1024  # bytes; small tensors stay in the graph, where shape inference can read them
_PAGE = 4096  # bytes; large tensors begin on a page, so that a runtime can map them


class WeightsFile:
    """An external data file that is written piece by piece and holds equal tensors once.

    Args:
        path: where to write; its name becomes the `location` in the graphs beside it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._places: dict[bytes, tuple[int, int]] = {}
        self._users: dict[bytes, set[str]] = {}
        self._file: BinaryIO | None = None

    def __enter__(self) -> WeightsFile:
        self._file = self.path.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def place(self, data: memoryview, *, user: str) -> tuple[int, int]:
        """Write `data` unless the same bytes are there; return offset and length."""
        key = hashlib.sha256(data).digest()
        if key not in self._places:
            if self._file is None:
                raise ValueError("the weights file is not open")
            padding = -self.size % (_PAGE if data.nbytes >= _PAGE else 64)
            self._file.write(b"\0" * padding)
            self._file.write(data)
            self._places[key] = (self.size + padding, data.nbytes)
            self.size += padding + data.nbytes
        self._users.setdefault(key, set()).add(user)
        return self._places[key]

    def own_bytes(self, user: str) -> int:
        """Return the bytes that this user alone reads."""
        return sum(self._places[key][1] for key, users in self._users.items() if users == {user})


def share_weights(model: ir.Model, weights: WeightsFile, *, user: str = "") -> None:
    """Replace each large initializer by a reference into `weights`, where `user` is counted as one that reads it."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.nbytes < _INLINE_BELOW:
            continue
        offset, length = weights.place(memoryview(tensor.tobytes()), user=user)
        value.const_value = ir.ExternalTensor(
            weights.path.name,
            offset,
            length,
            tensor.dtype,
            shape=ir.Shape([int(size) for size in tensor.shape.numpy()]),
            name=value.name or "",
            base_dir=weights.path.parent,
        )
