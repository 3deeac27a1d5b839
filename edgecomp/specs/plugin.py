"""A TensorRT plugin: which op it runs, what it takes, what it is compiled from. One folder each: `engines/plugins/`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edgecomp.errors import UnknownName
from edgecomp.resources import data_path
from edgecomp.specs._toml import read_toml

__all__ = ["Plugin", "PluginAttribute", "PluginTensor", "load_plugin", "plugin_names"]

_DESCRIPTION = "plugin.toml"
FileName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_]+\.(cu|cpp|h|so)$")]


class PluginTensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An input or output: sizes as letters, `T` for one of the plugin's types, and when it is there."""

    name: str
    shape: tuple[str, ...]
    type: str
    only: str = ""


class PluginAttribute(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An attribute of the node, with its words or its range."""

    name: str
    type: Literal["int", "string"]
    values: tuple[str, ...] = ()
    range: str = ""


class Plugin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `plugin.toml` says.

    Attributes:
        name: equal to the folder's name.
        op, domain: the ONNX node that the plugin runs.
        version: of the op; a node and a library with another one do not fit.
        library: file name of what is compiled.
        sources, headers: files of the folder that it is compiled from.
        tensorrt: range of full TensorRT whose headers it compiles against.
        sm: compute capabilities that it is compiled for and checked with.
        types: what `T` may be.
        limits: the largest sizes, by their letter.
        tolerance: largest error against float64, by type, as a share of the largest value.
    """

    schema: Literal[1]
    name: str
    summary: str
    op: str
    domain: str
    version: str
    library: FileName
    sources: tuple[FileName, ...]
    headers: tuple[FileName, ...]
    tensorrt: str
    sm: tuple[int, ...]
    types: tuple[str, ...]
    inputs: tuple[PluginTensor, ...]
    outputs: tuple[PluginTensor, ...]
    attributes: tuple[PluginAttribute, ...]
    limits: dict[str, int]
    tolerance: dict[str, float]

    def __post_init__(self) -> None:
        if set(self.tolerance) != set(self.types):
            raise ValueError(f"tolerance is given for {sorted(self.tolerance)}, and types are {sorted(self.types)}")

    @property
    def folder(self) -> Path:
        """Where the sources lie."""
        return data_path("engines", "plugins", self.name)

    @property
    def title(self) -> str:
        """The op as ONNX tools write it."""
        return f"{self.domain}::{self.op}"

    def source_digest(self) -> str:
        """Return the sha256 over everything that is compiled."""
        digest = hashlib.sha256()
        for name in sorted((*self.sources, *self.headers)):
            digest.update(name.encode() + b"\0" + (self.folder / name).read_bytes() + b"\0")
        return digest.hexdigest()

    def why_too_large(self, shapes: Sequence[Sequence[int]]) -> str:
        """Return which size of a node's inputs is above the kernel's limit, or ""."""
        for tensor, shape in zip(self.inputs, shapes, strict=False):
            for letter, size in zip(tensor.shape, shape, strict=False):
                if size > self.limits.get(letter, size):
                    return f"{tensor.name} has the shape {list(shape)}, and {letter} goes to {self.limits[letter]}"
        return ""


def plugin_names() -> tuple[str, ...]:
    """Return the names of all shipped plugins."""
    return tuple(sorted(path.parent.name for path in data_path("engines", "plugins").glob(f"*/{_DESCRIPTION}")))


def load_plugin(name: str) -> Plugin:
    """Read a shipped plugin's description by its name."""
    if name not in plugin_names():
        raise UnknownName("plugin", name, plugin_names())
    return read_toml(data_path("engines", "plugins", name, _DESCRIPTION), Plugin, what="plugin")
