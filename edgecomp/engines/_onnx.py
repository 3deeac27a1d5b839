"""Reads the few fields of an ONNX file that plugins need, without the package onnx, which a board does not have.

Field numbers are those of onnx.proto, which never change.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import msgspec

from edgecomp.errors import BuildError
from edgecomp.wire import fields

__all__ = ["OnnxNode", "custom_nodes", "without_functions"]

_MODEL_GRAPH, _MODEL_FUNCTIONS = 7, 25
_GRAPH_NODE = 1
_NODE_NAME, _NODE_OP, _NODE_ATTRIBUTE, _NODE_DOMAIN = 3, 4, 5, 7
_ATTRIBUTE_NAME, _ATTRIBUTE_TEXT = 1, 4
_FUNCTION_NAME, _FUNCTION_DOMAIN = 1, 10


class OnnxNode(msgspec.Struct, frozen=True):
    """A node of the main graph: its name, op, domain, the names of its attributes, and those that are text."""

    name: str
    op: str
    domain: str
    texts: dict[str, str]
    attributes: tuple[str, ...] = ()


def custom_nodes(path: Path, domain: str) -> tuple[OnnxNode, ...]:
    """Return the nodes of a domain in a model's main graph, in their order."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(domain.encode()) < 0:
                return ()
            return tuple(_nodes_of(content, domain))
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise BuildError(f"{path} cannot be read: {error}; export the model again") from None
    except (IndexError, UnicodeDecodeError):
        raise BuildError(f"{path} is truncated or no ONNX file; export the model again") from None


def without_functions(path: Path, domain: str, op: str) -> bytes:
    """Return the model's bytes without the body of one function, so that only a plugin can run its nodes."""
    content = path.read_bytes()
    kept = []
    for number, start, begin, end in fields(content, 0, len(content)):
        if number == _MODEL_FUNCTIONS:
            texts = _texts(content, begin, end)
            if texts.get(_FUNCTION_NAME) == op and texts.get(_FUNCTION_DOMAIN, "") == domain:
                continue
        kept.append(content[start:end])
    return b"".join(kept)


def _nodes_of(content: mmap.mmap, domain: str) -> Iterator[OnnxNode]:
    for number, _, begin, end in fields(content, 0, len(content)):
        if number != _MODEL_GRAPH:
            continue
        for kind, _, node_begin, node_end in fields(content, begin, end):
            if kind != _GRAPH_NODE:
                continue
            words = _texts(content, node_begin, node_end)
            if words.get(_NODE_DOMAIN) != domain:
                continue
            texts, attributes = {}, []
            for field, _, at, to in fields(content, node_begin, node_end):
                if field == _NODE_ATTRIBUTE:
                    attribute = _texts(content, at, to)
                    attributes.append(attribute.get(_ATTRIBUTE_NAME, ""))
                    if _ATTRIBUTE_TEXT in attribute:
                        texts[attribute.get(_ATTRIBUTE_NAME, "")] = attribute[_ATTRIBUTE_TEXT]
            yield OnnxNode(words.get(_NODE_NAME, ""), words.get(_NODE_OP, ""), domain, texts, tuple(attributes))


def _texts(content: bytes | mmap.mmap, begin: int, end: int) -> dict[int, str]:
    """Return the short text fields of a message by their number."""
    longest = 4096
    found = {}
    for number, _, at, to in fields(content, begin, end):
        if 0 < to - at <= longest and number not in (_NODE_ATTRIBUTE, _MODEL_FUNCTIONS):
            found[number] = content[at:to].decode(errors="replace")
    return found
