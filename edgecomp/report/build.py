"""The engines that were built: the value, and the text that `edgecomp build` prints."""

from __future__ import annotations

from pathlib import Path

import msgspec

from edgecomp.engines import EngineRecord
from edgecomp.report.text import size, table

__all__ = ["BuildReport", "EngineFile", "describe_build"]


class EngineFile(msgspec.Struct, frozen=True):
    """One engine: where it lies, its record, whether it was there already, and what runs its merge nodes and why."""

    path: Path
    record: EngineRecord
    reused: bool
    plugins: tuple[str, ...] = ()


class BuildReport(msgspec.Struct, frozen=True):
    """The engines of a bundle for one target."""

    bundle: str
    target: str
    sm: int
    runtime: str
    runtime_version: str
    engines: tuple[EngineFile, ...]


def _layer_types(record: EngineRecord) -> str:
    """Return the layers of the parsed network by type, where a plugin could be among them."""
    if not record.merges:
        return ""
    counted = {"PLUGIN_V3": 0, **record.layer_types}
    return "layers before fusion: " + ", ".join(f"{count} {name}" for name, count in counted.items())


_RUNTIMES = {"rtx": "TensorRT for RTX", "tensorrt": "TensorRT"}
_OTHER = {"rtx": "tensorrt", "tensorrt": "rtx"}


def describe_build(report: BuildReport) -> str:
    """Return the text: which TensorRT built what, for what."""
    rows = [
        [
            str(engine.path),
            "kept" if engine.reused else "built",
            engine.record.num_layers,
            size(engine.record.size_bytes),
            f"{engine.record.seconds:.1f}",
            len(engine.record.warnings),
        ]
        for engine in report.engines
    ]
    runtime, other = _RUNTIMES[report.runtime], _RUNTIMES[_OTHER[report.runtime]]
    lines = [
        f"built by {runtime} {report.runtime_version} for {report.target} (SM{report.sm}), strongly typed",
        f"these plans run in {runtime} alone, not in {other}",
        "",
        table(["engine", "", "layers", "size", "seconds", "warnings"], rows),
    ]
    lines += [f"{engine.path.name}: {line}" for engine in report.engines for line in engine.plugins]
    lines += [f"{engine.path.name}: {types}" for engine in report.engines if (types := _layer_types(engine.record))]
    beside = dict.fromkeys(
        f"{engine.path.parent / plugin.library} (sha256 {plugin.sha256[:12]}) has to be loaded before the plan"
        for engine in report.engines
        for plugin in engine.record.plugins
    )
    lines += beside
    lines += [f"warning    {text}" for text in dict.fromkeys(w for e in report.engines for w in e.record.warnings)]
    return "\n".join(lines)
