"""Forms of a bundle's graphs in its folder `parity/`, choices forced or halves of two methods: made once."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
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
from edgecomp.specs.choice import ChoiceNode, ForcedGraph
from edgecomp.specs.manifest import Bucket, Graph, PartGraph
from edgecomp.specs.origin import file_sha256

__all__ = ["check_choices", "check_forced", "forced_graph", "half_graph", "half_of"]

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
    """Run the forced forms of graphs.

    Of a stem and a rest with a method each, each by itself: the whole has the choices of both.
    """
    found: dict[str, SelectionParity] = {}
    for graph in graphs:
        parts = ready.source.manifest.parts_of(graph) if isinstance(graph, Bucket) and graph.stem else ()
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
    source, name = bundle.path / bucket.model, bucket.model.removesuffix(".onnx")
    if isinstance(bucket, PartGraph) and bucket.half:
        source, name = half_graph(bundle, bucket, spare=spare), f"{name}.{bucket.half}"
    is_part = bool(bucket.stem) or (isinstance(bucket, PartGraph) and not bucket.half)

    def make(target: Path) -> tuple[ChoiceNode, ...]:
        try:
            from edgecomp.export.forced import write_forced
        except ImportError as error:
            raise MissingDependency(error.name or str(error), needed_for=needed_for, extra="export") from error
        return write_forced(source, target, prefix="model." if is_part else "")

    return _kept(bundle, source, f"{name}.forced", make, spare=spare, remedy=f", or drop {drop}")


def half_graph(bundle: Bundle, part: PartGraph, *, spare: Path | None = None) -> Path:
    """Return the half of a graph of two methods, cutting it out where it is not there; `export` leaves it there.

    Args:
        spare: as for `forced_graph`.

    Raises:
        MissingDependency: it is not there, and onnx_ir is not installed. BundleError: the folder cannot be written.
    """
    source = bundle.path / part.model

    def make(target: Path) -> tuple[ChoiceNode, ...]:
        try:
            from edgecomp.export.cut import write_half
        except ImportError as error:
            needed_for = f"the parity of {part.label}, whose graph is cut out of {part.model}"
            raise MissingDependency(error.name or str(error), needed_for=needed_for, extra="export") from error
        write_half(source, target, part)
        return ()

    return _kept(bundle, source, f"{part.model.removesuffix('.onnx')}.{part.half}", make, spare=spare)[0]


def half_of(ready: Runnable, graph: Graph) -> Path | None:
    """Return the form in which a graph is run that is no file of the bundle; none where it is one."""
    is_half = isinstance(graph, PartGraph) and bool(graph.half)
    return ready.form(half_graph(ready.source, graph)) if is_half else None  # type: ignore[arg-type]


def _kept(
    bundle: Bundle,
    source: Path,
    name: str,
    make: Callable[[Path], tuple[ChoiceNode, ...]],
    *,
    spare: Path | None,
    remedy: str = "",
) -> tuple[Path, ForcedGraph]:
    """Return a form of a graph from the folder `parity/`, with what is said of it, making it where it is not there."""
    folder = bundle.path / _FOLDER
    if folder.is_symlink():
        raise BundleError(f"bundle {bundle.path}: {_FOLDER} is a link, which may lead anywhere; remove it")
    graph, sidecar = folder / f"{name}.onnx", folder / f"{name}.json"
    try:
        digest = file_sha256(source)
        found = _read(sidecar)
        if found is None or found.source_sha256 != digest or file_sha256(graph) != found.sha256:
            folder = folder if spare is None else spare
            graph, sidecar = folder / graph.name, folder / sidecar.name
            folder.mkdir(exist_ok=True)
            temporary = graph.with_name(f".{graph.name}.{secrets.token_hex(4)}")
            try:
                choices = make(temporary)
                os.replace(temporary, graph)
            finally:
                temporary.unlink(missing_ok=True)
            found = ForcedGraph(source.name, digest, file_sha256(graph), __version__, choices)
            _replace(sidecar, msgspec.json.encode(found))
    except OSError as error:
        raise BundleError(
            f"bundle {bundle.path}: the graph {graph.name} cannot be written to {folder} "
            f"({error.strerror or error}); copy the bundle to a place that can be written{remedy}"
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


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
