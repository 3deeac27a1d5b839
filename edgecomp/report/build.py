"""The engines that were built: the value, and the text that `edgecomp build` prints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from edgecomp.engines import EngineRecord
from edgecomp.report.text import size, table

__all__ = ["BuildReport", "EngineFile", "describe_build"]


class EngineFile(msgspec.Struct, frozen=True):
    """One engine.

    Attributes:
        path: where it lies.
        record: what is known about it.
        reused: it was there already.
        plugins: what runs its merge nodes and why.
        notes: what else happened: why it was built again, a timing cache or a lock that was left out.
        differing_bytes: of a second build from the first; -1: the sizes differ; none: it was built once.
    """

    path: Path
    record: EngineRecord
    reused: bool
    plugins: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    differing_bytes: int | None = None


class BuildReport(msgspec.Struct, frozen=True):
    """The engines of a bundle for one target; false where a second build gave other bytes."""

    bundle: str
    target: str
    sm: int
    runtime: str
    runtime_version: str
    engines: tuple[EngineFile, ...]

    def __bool__(self) -> bool:
        """No engine came out differently the second time."""
        return not any(engine.differing_bytes for engine in self.engines)


def _layer_types(record: EngineRecord) -> str:
    """Return the layers of the parsed network by type, where a plugin could be among them."""
    if not record.merges:
        return ""
    counted = {"PLUGIN_V3": 0, **record.layer_types}
    return "layers before fusion: " + ", ".join(f"{count} {name}" for name, count in counted.items())


def _proof_lines(record: EngineRecord) -> Iterator[str]:
    """Yield what was proven of the precision."""
    proof = record.proof
    if proof is None:
        return
    total = sum(proof.weights.values())
    share = {dtype: f" ({100 * count / total:.1f} % of the weights)" for dtype, count in proof.weights.items() if count}
    parts = [f"{count} in {dtype}{share.get(dtype, '')}" for dtype, count in proof.products.items()]
    seen = "the built engine" if proof.by == "engine" else "the network that TensorRT parsed"
    yield f"precision {record.precision}, seen in {seen}: matrix products {', '.join(parts) or 'none'}"
    if proof.islands:
        yield f"left out on purpose: {_some(proof.islands)}"
    if proof.wider:
        yield f"small products wider than {record.precision}: {_some(proof.wider)}"


def _some(names: tuple[str, ...]) -> str:
    """Return the count and the first names."""
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} ({', '.join(names[:_SHOWN])}{more})"


def _stability(engine: EngineFile) -> str:
    """Return what a second build showed, or ""."""
    if engine.differing_bytes is None:
        return ""
    if not engine.differing_bytes:
        return "stable: a second build gives the same bytes"
    how = "another size" if engine.differing_bytes < 0 else f"{engine.differing_bytes} other bytes"
    cure = "" if engine.record.timing_cache or engine.record.runtime == "rtx" else "; a timing cache may cure it"
    return f"NOT stable: a second build gives {how}{cure}"


_SHOWN = 4
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
    lines += [f"{engine.path.name}: {line}" for engine in report.engines for line in _proof_lines(engine.record)]
    lines += [f"{engine.path.name}: {line}" for engine in report.engines if (line := _stability(engine))]
    lines += [f"{engine.path.name}: {line}" for engine in report.engines for line in engine.notes]
    beside = dict.fromkeys(
        f"{engine.path.parent / plugin.library} (sha256 {plugin.sha256[:12]}) has to be loaded before the plan"
        for engine in report.engines
        for plugin in engine.record.plugins
    )
    lines += beside
    lines += [f"warning    {text}" for text in dict.fromkeys(w for e in report.engines for w in e.record.warnings)]
    return "\n".join(lines)
