"""TensorRT plugins: what was compiled, what there is, what a library brings; the values, and the text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from edgecomp.engines import PluginLibrary
from edgecomp.report.text import size, table

__all__ = [
    "CreatorRow",
    "PluginBuild",
    "PluginCheck",
    "PluginFile",
    "PluginRow",
    "describe_plugin_build",
    "describe_plugin_check",
    "describe_plugins",
]


class PluginBuild(msgspec.Struct, frozen=True):
    """A compiled library: what it is, whether it was there already, and where a copy was put ("" for none)."""

    plugin: str
    library: PluginLibrary
    size_bytes: int
    seconds: float
    reused: bool
    copied_to: str = ""


class PluginFile(msgspec.Struct, frozen=True):
    """A library of the cache, and whether it is of this edgecomp's sources."""

    library: PluginLibrary
    size_bytes: int
    is_current: bool


class PluginRow(msgspec.Struct, frozen=True):
    """A plugin that edgecomp ships, and its compiled libraries."""

    name: str
    op: str
    version: str
    types: tuple[str, ...]
    limits: dict[str, int]
    sm: tuple[int, ...]
    summary: str
    libraries: tuple[PluginFile, ...]


class CreatorRow(msgspec.Struct, frozen=True):
    """What a library registers in TensorRT."""

    namespace: str
    name: str
    version: str


class PluginCheck(msgspec.Struct, frozen=True):
    """A library that was loaded into TensorRT; `library` is empty where it does not say what it is."""

    path: Path
    runtime: str
    runtime_version: str
    creators: tuple[CreatorRow, ...]
    library: tuple[PluginLibrary, ...]


def describe_plugin_build(report: PluginBuild) -> str:
    """Return the text: what was compiled for what, and where it lies."""
    found = report.library.description
    done = "kept, nothing changed" if report.reused else f"compiled in {report.seconds:.1f} s"
    lines = [
        f"{report.plugin} version {found.version} for {_names(found.sm)}: {done}",
        f"headers    TensorRT {found.tensorrt}",
        f"compiler   CUDA {found.cuda}",
        f"library    {report.library.path}, {size(report.size_bytes)}, sha256 {report.library.sha256[:12]}",
    ]
    if report.copied_to:
        lines.append(f"copy       {report.copied_to}")
    return "\n".join(lines)


def describe_plugins(rows: Sequence[PluginRow]) -> str:
    """Return the plugins, and below them the libraries of the cache."""
    lines = [
        table(
            ["plugin", "op", "version", "types", "largest", "summary"],
            [
                [
                    row.name,
                    row.op,
                    row.version,
                    ", ".join(row.types),
                    ", ".join(f"{letter} {limit}" for letter, limit in row.limits.items()),
                    row.summary,
                ]
                for row in rows
            ],
        ),
        "",
    ]
    cells = [
        [
            row.name,
            _names(file.library.description.sm),
            file.library.description.tensorrt,
            file.library.description.cuda,
            size(file.size_bytes),
            "current" if file.is_current else "stale: of other sources",
            str(file.library.path),
        ]
        for row in rows
        for file in row.libraries
    ]
    if cells:
        lines.append(table(["compiled", "for", "TensorRT", "CUDA", "size", "", "library"], cells))
    else:
        lines.append("none is compiled; edgecomp plugin build NAME --sm N compiles one")
    return "\n".join(lines)


def describe_plugin_check(report: PluginCheck) -> str:
    """Return the text: the creators, and what the library says of itself."""
    lines = [f"{report.path} loads into {report.runtime} {report.runtime_version} and registers:"]
    lines += [f"  {row.namespace}::{row.name} version {row.version}" for row in report.creators]
    for library in report.library:
        found = library.description
        lines.append(
            f"compiled for {_names(found.sm)} with CUDA {found.cuda} and the headers of TensorRT {found.tensorrt}"
        )
    if not report.library:
        lines.append("it does not say what it was compiled for, so `edgecomp build` does not take it")
    return "\n".join(lines)


def _names(sm: Sequence[int]) -> str:
    return ", ".join(f"SM{number}" for number in sm)
