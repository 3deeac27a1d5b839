"""Several models side by side: the value that `edgecomp compare` makes, and the rules by which result files take part.

A result file says for itself what it measured and where. Two of them are compared without a word where they are of one
model and one machine; anything else is refused, or with `force` said in the comparison.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple

import msgspec

from edgecomp.errors import InvalidSpec
from edgecomp.files import JSON_ERRORS, encode_document, require_folder, write_whole
from edgecomp.profiles.latency import LatencyProfile
from edgecomp.profiles.machine import Machine
from edgecomp.profiles.ratios import Ratio
from edgecomp.profiles.result import Result, Subject
from edgecomp.profiles.state import DeviceState
from edgecomp.profiles.statistics import Estimate

__all__ = [
    "COMPARISON_KIND",
    "NOT_INTERLEAVED",
    "Agreement",
    "Comparison",
    "Conditions",
    "Contestant",
    "condition_differences",
    "machine_differences",
    "profiles_of",
    "require_out",
    "setting_differences",
    "subject_differences",
    "version_differences",
    "write_comparison",
]

COMPARISON_KIND: Final = "edgecomp comparison"
NOT_INTERLEAVED = "not interleaved: other machine state possible"

_SUBJECT = ("method", "preset", "backbone", "precision", "rest", "image_size")
_MACHINE = ("cpu", "cores", "gpu", "memory_gib")


class Agreement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How alike an output is to the base's, on the same inputs.

    Attributes:
        output: its name in the base.
        inputs: how many.
        cosine: of each row (last axis) with the base's, the mean.
        cosine_min: the least.
        top1: share of inputs whose highest logit is the same; none where the output is no logits.
        not_finite: values of either that are NaN or Inf; the cosines are -1 then.
    """

    output: str
    inputs: int
    cosine: float
    cosine_min: float
    top1: float | None = None
    not_finite: int = 0


class Contestant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One of the models.

    Attributes:
        name: by which it is called here, and by `--base`.
        source: `bundle` or `onnx`, measured in this run, or `result`, read from a file.
        model: file of the graph.
        digest: of the bundle or file, as in a result's subject.
        runner: with its version.
        tokens_in, tokens_out: 0 where there is no compressor.
        precision: "" where it is not known.
        flops: of one run; none where they were not counted.
        size_bytes: the graph, its stem and the weights that they read; none for a result.
        latency_us: median over rounds, or of a result's samples, with its 95 % interval.
        samples_us: of each round, or a result's own.
        repeats: calls that a sample is the median of.
        ratio: time over the base's; none for the base.
        parity: `pass`, `FAIL: ...`, or why it was not checked.
        agreement: none for the base, for a result, and where `agreement_note` says why.
        notes: what a reader of its numbers must know.
    """

    name: str
    source: Literal["bundle", "onnx", "result"]
    model: str
    digest: str = ""
    runner: str
    threads: int
    batch: int
    tokens_in: int = 0
    tokens_out: int = 0
    precision: str = ""
    flops: int | None = None
    size_bytes: int | None = None
    latency_us: Estimate
    samples_us: tuple[float, ...]
    repeats: int = 1
    ratio: Ratio | None = None
    parity: str = ""
    agreement: Agreement | None = None
    agreement_note: str = ""
    notes: tuple[str, ...] = ()


class Comparison(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `edgecomp compare` found; `bool(comparison)` is false where a parity failed.

    Attributes:
        base: name of the contestant that ratios are to.
        rounds: of taking turns; 0 where all are result files.
        seed: of the orders of these rounds.
        settle_s: pause before each turn.
        machine: where it was measured; none where all are result files.
        forced: differences that `force` let pass, in words.
    """

    schema: Literal[1] = 1
    kind: Literal["edgecomp comparison"] = COMPARISON_KIND
    created: str
    edgecomp: str
    command: tuple[str, ...]
    base: str
    rounds: int
    seed: int
    settle_s: float
    machine: Machine | None
    contestants: tuple[Contestant, ...]
    forced: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not any(one.parity.startswith("FAIL") for one in self.contestants)


def profiles_of(result: Result, *, budget: int | None = None, batch: int | None = None) -> Iterator[LatencyProfile]:
    """Yield the profiles of whole models: a router or a stem alone serves no request.

    Args:
        budget: only the bucket that keeps so many tokens, and what has no budget.
        batch: only this batch.
    """
    for profile in result.profiles:
        if profile.role in ("stem", "router"):
            continue
        if batch not in (None, profile.batch) or (budget is not None and profile.tokens_out not in (0, budget)):
            continue
        yield profile


def subject_differences(one: Subject, other: Subject) -> tuple[str, ...]:
    """Return in which words two subjects are not one model; a bundle that was exported again is the same model."""
    found = [
        f"{name} {getattr(one, name) or 'none'} and {getattr(other, name) or 'none'}"
        for name in _SUBJECT
        if getattr(one, name) != getattr(other, name)
    ]
    if not found and not one.method and (one.name, one.digest) != (other.name, other.digest):
        found = [f"file {one.name} ({one.digest[:12]}) and {other.name} ({other.digest[:12]})"]
    return tuple(found)


class Conditions(NamedTuple):
    """What is timed at a time."""

    mode: str
    streams: int
    batch: int


def condition_differences(one: Conditions, other: Conditions) -> tuple[str, ...]:
    """Return in which words two measurements do not time the same."""
    pairs = zip(Conditions._fields, one, other, strict=True)
    return tuple(f"{name} {mine} and {theirs}" for name, mine, theirs in pairs if mine != theirs)


def setting_differences(one: DeviceState | None, other: DeviceState | None) -> tuple[str, ...]:
    """Return in which words a device was set otherwise; what is not known of either says nothing."""
    mine, theirs = _settings(one), _settings(other)
    return tuple(
        f"{name} {value} and {theirs[name]}"
        for name, value in mine.items()
        if "unknown" not in (value, theirs[name]) and value != theirs[name]
    )


def _settings(state: DeviceState | None) -> dict[str, str]:
    jetson = state.jetson if state is not None else None
    return {
        "governor": state.governor if state is not None else "unknown",
        "power mode": jetson.power_mode if jetson is not None else "unknown",
        "jetson_clocks": jetson.jetson_clocks if jetson is not None else "unknown",
    }


def machine_differences(one: Machine, other: Machine) -> tuple[str, ...]:
    """Return in which words two machines are not one."""
    return tuple(
        f"{name} {getattr(one, name) or 'none'} and {getattr(other, name) or 'none'}"
        for name in _MACHINE
        if getattr(one, name) != getattr(other, name)
    )


def version_differences(one: Machine, other: Machine) -> tuple[str, ...]:
    """Return which versions of what decides a latency differ."""
    names: Sequence[str] = sorted({*one.versions, *other.versions})
    pairs = ((name, one.versions.get(name, "none"), other.versions.get(name, "none")) for name in names)
    found = [f"{name} {mine} and {theirs}" for name, mine, theirs in pairs if mine != theirs]
    others = (
        ("os", one.os, other.os),
        ("Python", one.python, other.python),
        ("driver", one.gpu_driver, other.gpu_driver),
    )
    return (
        *found,
        *(f"{name} {mine or 'none'} and {theirs or 'none'}" for name, mine, theirs in others if mine != theirs),
    )


def require_out(path: Path, *, kind: str) -> None:
    """Refuse a place where `write_comparison` could not write, before anything is measured for it; as there."""
    if path.suffix != ".json":
        raise InvalidSpec(f"--out {path} must end in .json")
    if path.exists() and not _is_of(path, kind):
        raise InvalidSpec(f"--out {path} is there and is no {kind}; name another file")
    require_folder(path.parent, noun="--out")


def write_comparison(document: msgspec.Struct, path: Path, *, kind: str) -> None:
    """Write a comparison as JSON, whole or not at all; what is there and is none stays.

    Raises:
        InvalidSpec: the path is no .json file, or another file is there. EdgecompError: it cannot be written.
    """
    require_out(path, kind=kind)
    write_whole(path, encode_document(document), noun="--out")


class _Kind(msgspec.Struct, frozen=True):
    kind: str = ""


def _is_of(path: Path, kind: str) -> bool:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Kind).kind == kind
    except (OSError, *JSON_ERRORS):
        return False
