"""What `edgecomp compare` is given, as graphs that run here or as results that were measured before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import msgspec
import numpy as np

from edgecomp.bundle import MANIFEST, Bundle, golden_key, open_bundle
from edgecomp.errors import InvalidSpec, MissingDependency, RunError
from edgecomp.parity import read_goldens, rows_of
from edgecomp.profiles.latency import LatencyProfile
from edgecomp.profiles.result import Result, read_result
from edgecomp.runners import Array, Runner, open_runner
from edgecomp.runners.chain import open_graph
from edgecomp.specs import DType, TensorSpec
from edgecomp.specs.manifest import Bucket, Graph, PlainGraph
from edgecomp.specs.origin import file_sha256

__all__ = [
    "CASES",
    "Entry",
    "Inputs",
    "Read",
    "digest_of_file",
    "flops_of",
    "open_entry",
    "read_entries",
    "size_of",
    "spec_of",
    "subject_word",
]

CASES = ("seeded", "photo")
_LARGEST_INPUT = 1 << 30  # bytes; of one input of a plain ONNX file


class Entry(NamedTuple):
    """A graph that is measured here.

    Attributes:
        word: what the user gave.
        name: by which it is called; made unique by `read_entries`.
        path: of the ONNX file.
        bundle, graph: of a bundle's graph; none of a plain ONNX file.
        inputs: what it takes.
    """

    word: str
    name: str
    path: Path
    bundle: Bundle | None
    graph: Bucket | PlainGraph | None
    inputs: tuple[TensorSpec, ...]

    @property
    def batch(self) -> int:
        """The first dimension of its first input."""
        return self.inputs[0].shape[0]


class Read(NamedTuple):
    """A profile out of a result file."""

    word: str
    name: str
    result: Result
    profile: LatencyProfile


def read_entries(
    words: Sequence[str], *, budget: str | int | None, batch: int | None
) -> tuple[tuple[Entry | Read, ...], tuple[str, ...]]:
    """Return what the words name, in their order, under names of its own, and notes on what is left out.

    Raises:
        InvalidSpec: a word is no bundle, ONNX file or result; a bundle has no such budget or batch; fewer than two.
    """
    found: list[Entry | Read] = []
    notes: list[str] = []
    for word in words:
        path = Path(word)
        if path.is_dir():
            members, said = _of_bundle(word, path, budget, batch)
            notes += said
        elif path.suffix == ".json":
            members = _of_result(word, path, budget, batch)
        elif path.suffix == ".onnx":
            members = [_of_onnx(word, path)]
        else:
            raise InvalidSpec(f"{word} is no folder, .onnx file or .json result; give bundles, ONNX files or results")
        found += members
    if len(found) < 2:
        raise InvalidSpec(f"{', '.join(words) or 'nothing'} names {len(found)} models; give two at least to compare")
    batches = sorted({one.batch for one in found if isinstance(one, Entry)})
    if len(batches) > 1 or (batches and batch not in (None, batches[0])):
        given = ", ".join(f"{one.name} {one.batch}" for one in found if isinstance(one, Entry))
        raise InvalidSpec(f"the models take batches of different sizes ({given}); name one that all have with --batch")
    return tuple(_named(found)), tuple(notes)


def _of_bundle(
    word: str, path: Path, budget: str | int | None, batch: int | None
) -> tuple[list[Entry | Read], list[str]]:
    opened = open_bundle(path)
    buckets = opened.select(budget=budget, batch=batch)
    size = min(bucket.batch for bucket in buckets)
    chosen = [bucket for bucket in buckets if bucket.batch == size]
    name, notes = path.resolve().name, []
    if opened.manifest.router is not None:
        notes.append(f"{name}: its buckets are compared; `edgecomp profile` measures what its router adds")
    parts = [f".m{bucket.budget.tokens_out}" if len(chosen) > 1 else "" for bucket in chosen]
    entries = [_entry(word, f"{name}{part}", opened, graph) for part, graph in zip(parts, chosen, strict=True)]
    return list(entries), notes


def _entry(word: str, name: str, bundle: Bundle, graph: Bucket | PlainGraph) -> Entry:
    return Entry(word, name, bundle.path / graph.model, bundle, graph, graph.inputs)


def _of_onnx(word: str, path: Path) -> Entry:
    """Return an ONNX file; in a bundle's folder it is a graph of that bundle, with its goldens."""
    if not path.is_file():
        raise InvalidSpec(f"{path} is not there; give a bundle, an .onnx file or a result")
    if (path.parent / MANIFEST).is_file():
        opened = open_bundle(path.parent)
        graphs: tuple[Graph, ...] = (*opened.manifest.buckets, *opened.manifest.plain)
        graph = next((graph for graph in graphs if graph.model == path.name), None)
        if not isinstance(graph, Bucket | PlainGraph):
            raise InvalidSpec(f"{path} is a part of a bundle, and serves no request by itself; compare the bundle")
        return _entry(word, f"{path.parent.resolve().name}/{path.stem}", opened, graph)
    return Entry(word, path.stem, path, None, None, _read_inputs(path))


def _of_result(word: str, path: Path, budget: str | int | None, batch: int | None) -> list[Entry | Read]:
    from edgecomp.profiles.comparison import profiles_of

    result = read_result(path)
    if budget is not None and not str(budget).isdigit():
        raise InvalidSpec(f"--budget {budget}: {path} holds counts, not shares; give the number of tokens kept")
    kept = None if budget is None else int(budget)
    profiles = list(profiles_of(result, budget=kept, batch=batch))
    if not profiles:
        there = ", ".join(f"{p.model} (batch {p.batch})" for p in result.profiles)
        raise InvalidSpec(f"result {path} holds no model with budget {budget} and batch {batch}; it holds {there}")
    many = len(profiles) > 1
    return [Read(word, path.stem + (f":{p.model.removesuffix('.onnx')}" if many else ""), result, p) for p in profiles]


def _named(found: Sequence[Entry | Read]) -> list[Entry | Read]:
    """Make names unique: by the words that were given, and by numbers where these are one."""
    names = [one.name for one in found]
    shown = [one.word if names.count(one.name) > 1 else one.name for one in found]
    numbers = [f"#{shown[:place].count(name) + 1}" if shown.count(name) > 1 else "" for place, name in enumerate(shown)]
    unique = [name + number for name, number in zip(shown, numbers, strict=True)]
    return [one._replace(name=name) for one, name in zip(found, unique, strict=True)]


def open_entry(entry: Entry, *, runner: str, threads: int) -> Runner:
    """Load what runs here."""
    if entry.bundle is not None and entry.graph is not None:
        return open_graph(runner, entry.bundle, entry.graph, threads=threads)
    return open_runner(runner, entry.path, threads=threads)


class Inputs:
    """The inputs of all graphs: those with one name, shape and type are the same numbers for all.

    They are the goldens of the first bundle that has them, and seeded numbers where none has.

    Args:
        entries: what runs here; the base first.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._seen: dict[tuple[str, str], Array] = {}
        for entry in entries:
            goldens = read_goldens(entry.bundle.path) if entry.bundle is not None else {}
            for spec in entry.inputs:
                for case in CASES:
                    self._seen.setdefault((case, str(spec)), _input(spec, case, goldens))

    def of(self, entry: Entry, case: str) -> dict[str, Array]:
        """Return a graph's inputs by name, in one case."""
        return {spec.name: self._seen[case, str(spec)] for spec in entry.inputs}


def _input(spec: TensorSpec, case: str, goldens: Mapping[str, Array]) -> Array:
    for one in (case, "seeded"):
        if (array := goldens.get(golden_key("input", one, spec.name))) is not None:
            rows = rows_of({"": array}, "", spec.shape[0])
            if rows.shape == spec.shape and str(rows.dtype) == spec.dtype:
                return np.ascontiguousarray(rows)
    chance = np.random.default_rng(CASES.index(case))
    if spec.dtype == "uint8":
        return chance.integers(0, 256, spec.shape, np.uint8)
    if spec.dtype == "bool":
        return np.ones(spec.shape, np.bool_)
    if spec.dtype in ("int32", "int64"):
        return np.zeros(spec.shape, spec.dtype)
    return chance.standard_normal(spec.shape).astype(spec.dtype)


def size_of(entry: Entry) -> int:
    """Return bytes of the graph, of its stem, and of the weights in other files that they read, each counted once."""
    paths = [entry.path]
    if entry.bundle is not None and entry.graph is not None and entry.graph.stem:
        paths.append(entry.bundle.path / entry.graph.stem)
    lights = [_read_light(path) for path in paths]
    parts = {(tensor.location, tensor.offset, tensor.length) for light in lights for tensor in light.externals}
    return sum(int(light.size) for light in lights) + sum(int(length) for _, _, length in parts)


def flops_of(entry: Entry) -> int | None:
    """Return the FLOPs of a plain ONNX file, by its shapes; none where they cannot be counted."""
    from edgecomp.export.costs import count_costs

    try:
        return sum(op.flops for op in count_costs(entry.path).ops)
    except RunError:  # a Loop, or an op whose shape depends on data: it runs, and nobody can count it
        return None


def digest_of_file(entry: Entry) -> str:
    """Return what a result's subject says of it."""
    return entry.bundle.manifest.digest if entry.bundle is not None else file_sha256(entry.path)


def _read_inputs(path: Path) -> tuple[TensorSpec, ...]:
    from edgecomp.export.view import type_name

    graph = _read_light(path).proto.graph
    weights = {tensor.name for tensor in graph.initializer}
    specs = []
    for value in graph.input:
        if value.name in weights:
            continue
        kind = value.type.tensor_type
        shape = tuple(int(dim.dim_value) for dim in kind.shape.dim)
        dtype = type_name(kind.elem_type)
        if not shape or min(shape) < 1:
            raise InvalidSpec(f"{path}: input {value.name} has an open shape {list(shape)}; export it with fixed sizes")
        if dtype not in get_args(DType) or math.prod(shape) * 8 > _LARGEST_INPUT:
            what = f"{dtype or 'no tensor'}{list(shape)}"
            raise RunError(f"{path}: input {value.name} is {what}, for which no numbers can be made up")
        specs.append(TensorSpec(value.name, shape, cast("DType", dtype), "features"))
    if not specs:
        raise InvalidSpec(f"{path} takes no inputs, so there is nothing to run; is it the right file?")
    return tuple(specs)


def _read_light(path: Path) -> Any:
    try:
        from edgecomp.export.light import read_light
    except ImportError as error:
        raise MissingDependency(error.name or "onnx", needed_for="reading an ONNX file", extra="export") from error
    return read_light(path)


def spec_of(entry: Entry, name: str) -> TensorSpec | None:
    """Return what a bundle says of an output; none of a plain ONNX file."""
    graph = entry.graph
    return None if graph is None else next((spec for spec in graph.outputs if spec.name == name), None)


def subject_word(entry: Entry) -> Mapping[str, Any]:
    """Return what a result's subject would say of what runs here."""
    words: dict[str, Any] = {"name": entry.path.name, "digest": digest_of_file(entry)}
    if entry.bundle is not None:
        manifest = entry.bundle.manifest
        names = ("method", "preset", "backbone", "precision", "rest", "image_size")
        words |= {name: getattr(manifest, name) for name in names} | {"name": entry.bundle.path.resolve().name}
        words["weights"] = str(manifest.weights)
    return msgspec.to_builtins(words)  # type: ignore[no-any-return]
