"""Where the graphs of a bundle say that their weights lie, read without the package onnx.

ONNX Runtime and TensorRT refuse a location that leaves the folder; this says so before either sees the file, and holds
every offset to the weights that are there.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from edgecomp.bundle import WEIGHTS, Bundle
from edgecomp.errors import BundleError
from edgecomp.wire import fields

__all__ = ["require_contained"]

# Field numbers of onnx.proto, which never change: which fields of a message may hold tensors, and the message there.
_INSIDE: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_TENSOR_EXTERNAL = 13
_KEY, _VALUE = 1, 2
_LONGEST = 4096


def require_contained(bundle: Bundle) -> int:
    """Raise unless every tensor outside a graph lies in the bundle's own weights; return how many do.

    Raises:
        BundleError: a location that is not the weights' file, a place outside of it, or a file that is no ONNX model.
    """
    held, count = bundle.file(WEIGHTS).size, 0
    for graph in bundle.manifest.graphs:
        path = bundle.path / graph.model
        for entries in _externals(path):
            location, offset, length = entries.get("location", ""), entries.get("offset"), entries.get("length")
            if location != WEIGHTS:
                raise BundleError(
                    f"bundle {bundle.path}: {graph.model} reads weights from {location!r}, and a bundle's graphs read "
                    f"{WEIGHTS} alone; take the bundle from a source that you trust"
                )
            numbers = [text or "0" for text in (offset, length)]
            if not all(text.isascii() and text.isdigit() and len(text) < 20 for text in numbers) or (
                sum(map(int, numbers)) > held
            ):
                raise BundleError(
                    f"bundle {bundle.path}: {graph.model} reads {length} bytes at {offset} of {WEIGHTS}, which has "
                    f"{held}; it was altered, copy or export the bundle again"
                )
            count += 1
    return count


def _externals(path: Path) -> list[dict[str, str]]:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return list(_of("model", content, 0, len(content)))
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise BundleError(f"{path} cannot be read: {error}; export the bundle again") from None
    except (IndexError, RecursionError):
        raise BundleError(f"{path} is truncated or no ONNX file; export the bundle again") from None


def _of(kind: str, content: mmap.mmap, begin: int, end: int) -> Iterator[dict[str, str]]:
    """Yield the external data of each tensor of a message, as it says it."""
    inside = _INSIDE.get(kind, {})
    entries: dict[str, str] = {}
    for number, _, at, to in fields(content, begin, end):
        if number in inside:
            yield from _of(inside[number], content, at, to)
        elif kind == "tensor" and number == _TENSOR_EXTERNAL:
            pair = {key: content[a : min(b, a + _LONGEST)] for key, _, a, b in fields(content, at, to)}
            key, value = (pair.get(which, b"").decode(errors="replace") for which in (_KEY, _VALUE))
            entries[key] = value
    if entries:
        yield entries
