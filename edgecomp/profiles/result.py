"""Result files: what `edgecomp profile` measured, with all that a reader needs to believe or repeat it.

One JSON document a run, documented field by field in `docs/results.md`. A file of a newer schema, a truncated one, or
one whose figures contradict each other is refused with its name, never read in part.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from edgecomp.errors import EdgecompError, InvalidSpec, RunError
from edgecomp.files import encode_document, read_document, require_folder, write_whole
from edgecomp.profiles.latency import LatencyProfile, contradiction_in
from edgecomp.profiles.machine import Machine

__all__ = [
    "SCHEMA",
    "BlockTime",
    "LayerTime",
    "MemoryUse",
    "Result",
    "RoutedTime",
    "Subject",
    "read_result",
    "require_out",
    "write_result",
]

SCHEMA: Final = 1
_LARGEST = 256 << 20  # bytes; raw samples of an hour of short runs fit
_UNFIT = re.compile(r"[^A-Za-z0-9._-]+")

Time = Annotated[float, Meta(ge=0)]


class Subject(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was measured, as far as a latency depends on it; results of one subject can be compared without a word.

    Attributes:
        name: of the bundle's folder, or of the ONNX file; never its path.
        digest: of the bundle (its manifest's own), or the file's sha256.
        method, preset, backbone, precision, rest, image_size: of the bundle; "" or 0 of a plain ONNX file.
        weights: where they come from in a word, for example `random (seed 0)`.
    """

    name: str
    digest: str
    method: str = ""
    preset: str = ""
    backbone: str = ""
    precision: str = ""
    rest: str = ""
    image_size: int = 0
    weights: str = ""


class LayerTime(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One node or fused layer of a graph, by the runtime's own profiler, which slows the run down a little.

    Attributes:
        model: file of the graph.
        name, op: as the runtime calls it.
        module: the PyTorch module it came from; "" where the runtime's name does not tell.
        block: the encoder block that holds the module, for example `blocks.3`; "" outside of blocks.
        part: `merge` (of a function of edgecomp's), `selection` (it picks or places rows by index), else "".
        us: median over the runs.
        share: of the sum over all layers of the graph, 0 to 1.
    """

    model: str
    name: str
    op: str
    module: str
    block: str
    us: Time
    share: Annotated[float, Meta(ge=0, le=1)]
    part: str = ""


class BlockTime(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An encoder block, by the difference between two truncated graphs (`--ablate`), measured in turns.

    Attributes:
        model: file of the graph.
        block: for example `blocks.3`; `in front` is what stands before the first, `behind` what stands after the last.
        us: median of the differences; negative where noise is larger than the block.
        low_us, high_us: 95 % confidence interval of that median.
        total_us: median of the graph up to the end of this block.
    """

    model: str
    block: str
    us: float
    low_us: float
    high_us: float
    total_us: Time


class MemoryUse(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a process holds that has served one request from each of some buckets.

    Memory is Linux' proportional set size (Pss): a page of the weights file that several sessions map counts once.

    Attributes:
        buckets: tokens kept by each.
        share_weights: the graphs read one mapping of the weights.
        held_mib: afterwards, when all of them are in memory.
        peak_mib: the most seen while it loaded and ran, looking every 10 ms.
    """

    buckets: tuple[int, ...]
    share_weights: bool
    held_mib: Time
    peak_mib: Time


class RoutedTime(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Medians of a request that the router sends to a bucket, its stem run once; made of the parts' own medians.

    Attributes:
        model: the bucket's.
        router_ms: the router alone, without the stem.
        routed_ms: router, stem and bucket.
        smallest_ms, largest_ms: stem and bucket of the smallest and largest budget, without a router.
    """

    model: str
    batch: int
    router_ms: Time
    routed_ms: Time
    smallest_ms: Time
    largest_ms: Time


class Result(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One run of `edgecomp profile`: the file, and what `--json` prints.

    Attributes:
        kind: always "edgecomp result", so that no other JSON is taken for one.
        created: UTC, ISO 8601, to the second.
        edgecomp: the version that measured.
        command: the words that repeat it; a bundle by its folder's name.
        target: a target's name where the machine is known to be one, else `cpu` or the GPU's name in small letters.
        subject: what was measured.
        machine: where.
        profiles: one for each graph and mode, a bucket's with its stem.
        layers, blocks: per layer and `--ablate`; empty where they were not asked for.
        routing: empty without a router.
        memory: of processes that serve the buckets; empty where the system does not tell.
        types: in which types a runtime really ran a graph's matrix products, and how many in each, by graph.
        notes: what else a reader must know.
    """

    schema: Literal[1] = SCHEMA
    kind: Literal["edgecomp result"] = "edgecomp result"
    created: Annotated[str, Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
    edgecomp: str
    command: tuple[str, ...]
    target: str
    subject: Subject
    machine: Machine
    profiles: Annotated[tuple[LatencyProfile, ...], Meta(min_length=1)]
    layers: tuple[LayerTime, ...] = ()
    blocks: tuple[BlockTime, ...] = ()
    routing: tuple[RoutedTime, ...] = ()
    memory: tuple[MemoryUse, ...] = ()
    types: dict[str, dict[str, int]] = {}
    notes: tuple[str, ...] = ()

    @property
    def state(self) -> Literal["stable", "unstable", "unknown"]:
        """Whether conditions stood still for all graphs: `unstable` where a mark stands against one's number."""
        if any(profile.marks for profile in self.profiles):
            return "unstable"
        verdicts = {"unknown" if one.stability is None else one.stability.verdict for one in self.profiles}
        return "unknown" if "unknown" in verdicts else "stable"


def read_result(path: Path) -> Result:
    """Read a result file.

    Raises:
        RunError: it cannot be read, is truncated or no result, is of a newer schema, or contradicts itself.
    """
    result = read_document(
        path, Result, noun="result", verb="edgecomp profile", again="measure again", largest=_LARGEST
    )
    for profile in result.profiles:
        if wrong := contradiction_in(profile):
            raise RunError(f"result {path}: {profile.model} contradicts itself: {wrong}; measure again")
    twice = [key for key, count in Counter(_key(profile) for profile in result.profiles).items() if count > 1]
    if twice:
        raise RunError(f"result {path}: {twice[0][0]} stands twice, measured in the same way; measure again")
    return result


def require_out(out: Path) -> None:
    """Refuse a place where `write_result` could not write, before an hour is measured for it.

    Raises:
        EdgecompError: it cannot be written. InvalidSpec: the file is there and is no result.
    """
    is_file = out.suffix == ".json"
    if is_file:
        _require_result(out)
    require_folder(out.parent if is_file else out, noun="result")


def _require_result(path: Path) -> None:
    """Refuse to write over what is no result."""
    if path.is_dir():
        raise InvalidSpec(f"{path} is a folder; name a file, or a folder without .json")
    if path.is_file():
        try:
            read_result(path)
        except RunError as error:
            raise InvalidSpec(f"{path} is there and would be lost ({error}); name another file") from None


def write_result(result: Result, out: Path) -> Path:
    """Write a result, whole or not at all, and return where.

    Args:
        out: a file that ends in `.json`, or a folder of results, which gets `<target>/<subject>-<runner>-<time>.json`.

    Raises:
        EdgecompError: it cannot be written. InvalidSpec: the file is there and is no result.
    """
    if out.suffix != ".json":
        return _write_beside(result, out / result.target)
    _require_result(out)
    return write_whole(out, encode_document(result), noun="result")


def _write_beside(result: Result, folder: Path) -> Path:
    """Write a result under a name that no other has, also if several end in one second."""
    content = encode_document(result)
    for number in itertools.count(1):
        path = folder / f"{_stem(result)}{f'-{number}' if number > 1 else ''}.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.open("xb").close()  # the name is ours from here on
        except FileExistsError:
            if not folder.is_dir():
                raise EdgecompError(f"result {path} cannot be written: {folder} is no folder; name another") from None
            continue
        except OSError as error:
            raise EdgecompError(f"result {path} cannot be written: {error.strerror}; name another place") from None
        try:
            return write_whole(path, content, noun="result")
        except EdgecompError:
            path.unlink(missing_ok=True)
            raise
    raise AssertionError


def _key(profile: LatencyProfile) -> tuple[object, ...]:
    names = ("model", "role", "runner", "batch", "mode", "streams", "threads", "cuda_graph")
    return tuple(getattr(profile, name) for name in names)


def _stem(result: Result) -> str:
    words = (result.subject.name, result.profiles[0].runner.partition(" ")[0], re.sub(r"[-:]", "", result.created))
    return "-".join(_UNFIT.sub("-", word) for word in words)
