"""The forced form of a bundle's graphs, in its folder `parity/`: made once, found again by its hashes."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import msgspec

from edgecomp import __version__
from edgecomp.api._emulate import Runnable
from edgecomp.api._progress import Progress, silent
from edgecomp.bundle import Bundle
from edgecomp.errors import BundleError, MissingDependency
from edgecomp.parity import NO_LIMITS, Limits, SelectionParity, check_selection
from edgecomp.parity.check import label_of
from edgecomp.runners import Array, Runner
from edgecomp.specs import Tolerance
from edgecomp.specs.choice import ForcedGraph
from edgecomp.specs.manifest import Bucket, Graph, PartGraph
from edgecomp.specs.origin import file_sha256

__all__ = ["check_choices", "check_forced", "forced_graph"]

_FOLDER = "parity"
_LARGEST_SIDECAR = 4 << 20


class Opener(Protocol):
    """Loads a graph of a bundle, or another form of it."""

    def __call__(self, bundle: Bundle, graph: Graph, *, model: Path | None = None) -> Runner:
        """Return a runner of it."""


def check_forced(
    ready: Runnable,
    bucket: Bucket | PartGraph,
    goldens: Mapping[str, Array],
    tolerance: Tolerance,
    *,
    open_one: Opener,
    open_other: Opener | None = None,
    limits: Limits = NO_LIMITS,
) -> SelectionParity:
    """Run the forced form of a bucket's graph, where it chooses anything.

    Args:
        open_one: loads the graph that is judged.
        open_other: loads what it is compared with; none: the goldens of the original.
    """
    path, forced = forced_graph(ready.source, bucket)
    if not forced.choices:
        return SelectionParity(label_of(bucket), (), ())
    path = ready.form(path)
    with ExitStack() as stack:
        loaded = stack.enter_context(open_one(ready.bundle, bucket, model=path))
        expected = stack.enter_context(open_other(ready.bundle, bucket, model=path)) if open_other is not None else None
        return check_selection(
            loaded, ready.source.path, bucket, forced.choices, goldens, tolerance, limits=limits, against=expected
        )


def check_choices(
    ready: Runnable,
    graphs: Sequence[Bucket | PartGraph],
    goldens: Mapping[str, Array],
    tolerance: Tolerance,
    *,
    open_one: Opener,
    open_other: Opener | None = None,
    limits: Limits = NO_LIMITS,
    progress: Progress = silent,
) -> tuple[SelectionParity, ...]:
    """Run the forced forms of graphs; of two methods in a row each by itself: the whole has the choices of both."""
    found: dict[str, SelectionParity] = {}
    for graph in graphs:
        parts = ready.source.manifest.parts_of(graph) if isinstance(graph, Bucket) else ()
        for one in parts or (graph,):
            if label_of(one) in found:
                continue
            progress(label_of(one))
            found[label_of(one)] = check_forced(
                ready, one, goldens, tolerance, limits=limits, open_one=open_one, open_other=open_other
            )
        if parts:
            choices = (choice for part in parts for choice in found[part.label].choices)
            ours = tuple(msgspec.structs.replace(choice, model=graph.model) for choice in choices)
            found[graph.model] = SelectionParity(graph.model, (), ours)
    return tuple(found.values())


def forced_graph(
    bundle: Bundle,
    bucket: Bucket | PartGraph,
    *,
    spare: Path | None = None,
    needed_for: str = "`edgecomp parity --selection`",
    drop: str = "--selection",
) -> tuple[Path, ForcedGraph]:
    """Return the forced form of a bucket's graph and what is said of it, making it where it is not there.

    Its weights are the bundle's: a runner reads them from there (`open_graph`), since a copy would double the bundle,
    and ONNX refuses a file with two hard links as an attack.

    Args:
        spare: a folder to make it in, for a verb that writes nothing into a bundle; none: its folder `parity/`.
        needed_for: the verb, for the message where it cannot be made.
        drop: the option that asks for it, likewise.

    Raises:
        MissingDependency: it is not there, and onnx_ir is not installed. BundleError: the folder cannot be written.
    """
    folder = bundle.path / _FOLDER
    if folder.is_symlink():
        raise BundleError(f"bundle {bundle.path}: {_FOLDER} is a link, which may lead anywhere; remove it")
    stem = bucket.model.removesuffix(".onnx")
    graph, sidecar = folder / f"{stem}.forced.onnx", folder / f"{stem}.forced.json"
    source = bundle.file(bucket.model).sha256
    try:
        found = _read(sidecar)
        if found is None or found.source_sha256 != source or file_sha256(graph) != found.sha256:
            folder = folder if spare is None else spare
            graph, sidecar = folder / graph.name, folder / sidecar.name
            folder.mkdir(exist_ok=True)
            found = _make(bundle, bucket, graph, needed_for)
            _replace(sidecar, msgspec.json.encode(found))
    except OSError as error:
        raise BundleError(
            f"bundle {bundle.path}: the forced graph cannot be written to {folder} ({error.strerror or error}); copy "
            f"the bundle to a place that can be written, or drop {drop}"
        ) from None
    return graph, found


def _read(sidecar: Path) -> ForcedGraph | None:
    """Read what is said of a forced graph; none where it is not there, or is another version's."""
    graph = sidecar.with_suffix(".onnx")
    if any(one.is_symlink() or not one.is_file() for one in (sidecar, graph)):
        return None
    if sidecar.stat().st_size > _LARGEST_SIDECAR:
        return None
    try:
        found = msgspec.json.decode(sidecar.read_bytes(), type=ForcedGraph)
    except msgspec.DecodeError:
        return None
    return found if found.edgecomp == __version__ else None


def _make(bundle: Bundle, bucket: Bucket | PartGraph, target: Path, needed_for: str) -> ForcedGraph:
    try:
        from edgecomp.export.forced import write_forced
    except ImportError as error:
        raise MissingDependency(error.name or str(error), needed_for=needed_for, extra="export") from error
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        is_part = bool(bucket.stem) or isinstance(bucket, PartGraph)
        choices = write_forced(bundle.path / bucket.model, temporary, prefix="model." if is_part else "")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return ForcedGraph(bucket.model, bundle.file(bucket.model).sha256, file_sha256(target), __version__, choices)


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
