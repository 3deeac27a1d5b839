"""The document of a search: every candidate with what is known of it, the front, the winner, and what was left out.

One JSON file, documented field by field in `docs/search.md`; `edgecomp report` draws it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from edgecomp.files import encode_document, read_document, write_whole
from edgecomp.profiles.machine import Machine

__all__ = [
    "SCHEMA",
    "Agreement",
    "Figure",
    "Limits",
    "Measured",
    "PrecisionVerdict",
    "Row",
    "SearchResult",
    "read_search",
    "write_search",
]

SCHEMA: Final = 1
_LARGEST = 64 << 20

Positive = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=-1, le=1)]
Count = Annotated[int, Meta(ge=0)]


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the winner must meet; all of those that are given.

    Attributes:
        max_p50_ms, max_p99_ms: milliseconds of a run at the batch that was asked for.
        max_energy_mj: millijoules of a run.
        min_agreement: 0 to 1, of what `SearchResult.agreement_of` names.
    """

    max_p50_ms: Positive | None = None
    max_p99_ms: Positive | None = None
    max_energy_mj: Positive | None = None
    min_agreement: Annotated[float, Meta(gt=0, le=1)] | None = None


class Figure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A number with its 95 % interval, or an estimate with its band; an end that nothing bounds is none."""

    value: float
    low: float | None = None
    high: float | None = None
    is_indicative: bool = False


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a candidate takes.

    Attributes:
        source: `measured`, or `estimated`: computed for hardware that is not here.
        where: `local`, a host's name, or a target's.
        p50_us, p99_us: microseconds of a run; an estimate has no tail, and its band stands in `p50_us`.
        max_us: the largest sample; none of an estimate.
        samples: timed runs; 0 of an estimate.
        energy_mj: of a run; none where power is unknown.
        is_steady: false where a mark stands against the number, which `note` names.
        note: in words, for example "warm-up did not settle" or "estimated, +-30 %".
    """

    source: Literal["measured", "estimated"]
    where: str
    p50_us: Figure
    p99_us: Figure | None = None
    max_us: float | None = None
    samples: Count = 0
    energy_mj: Annotated[float, Meta(ge=0)] | None = None
    is_steady: bool = True
    note: str = ""


class Agreement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far outputs agree with the reference: 1 is the same. With classes a share of images, with its interval."""

    value: Share
    low: Share | None = None
    high: Share | None = None
    inputs: Count = 0


class PrecisionVerdict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What became of a precision, and why."""

    precision: str
    verdict: Literal[
        "chosen", "slower", "fails parity", "cannot be exported", "cannot be run", "not on the target", "not tried"
    ]
    why: str


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A candidate.

    Attributes:
        name: its own, for example `tome m98 fp32`; rows name each other by it.
        role: `candidate`; `plain`, the uncompressed model; `baseline`, for comparison, which never wins.
        method, schedule, precision: of it; `schedule` is "" where the method has one alone.
        tokens_in, tokens_out: before and behind the compressor; equal of the plain model.
        flops: of a run; 0 where unknown.
        state: `front` or `dominated` in latency against agreement; `refused`: it cannot be made or run; `skipped`: a
            rule of the search says that it cannot win.
        why: the reason of `refused` and `skipped`.
        by: those of the front that dominate it.
        latency_us: what the front is made of: p99 where it is limited, else p50.
        meets: all limits.
        misses: the limits that it does not meet, in words.
        excess: the largest of its figures over their limits; above 1 it misses one. None where nothing is known.
    """

    name: str
    role: Literal["candidate", "plain", "baseline"]
    method: str
    precision: str
    tokens_in: Count
    tokens_out: Count
    schedule: str = ""
    flops: Count = 0
    state: Literal["front", "dominated", "refused", "skipped"]
    why: str = ""
    by: tuple[str, ...] = ()
    latency_us: float | None = None
    measured: Measured | None = None
    agreement: Agreement | None = None
    meets: bool = False
    misses: tuple[str, ...] = ()
    excess: float | None = None


class SearchResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A search: the file, and what `--json` prints. It is true where a candidate meets all limits.

    Attributes:
        created: UTC, ISO 8601, to the second.
        command: the words that repeat it.
        method, preset, backbone, batch, runner, threads, duration_s: what was searched, and how it was measured.
        target: `local`, or a target's name.
        machine: where it was measured; none where all was estimated.
        limits: what the winner had to meet.
        latency_of: which latency the front shows, `p50` or `p99`.
        agreement_of: what agreement means here, in words: of what, with what, on which inputs.
        is_proxy: it is no share of images of the user's.
        rows: every candidate.
        winner: a row's name; "" where none meets the limits.
        closest: the row that misses by least, where there is no winner; else "".
        verdict: the first line, in words.
        stopped: which rules ended the search, in words.
        precisions: every one that there is.
        folder: the folder of this document, as it was named.
        recipe: file name of the winner's recipe in that folder; "" where there is none.
        measuring_s, total_s: seconds of measuring, and of all, over all times that the search was resumed.
        notes: what else a reader must know.
    """

    schema: Literal[1] = SCHEMA
    kind: Literal["edgecomp search"] = "edgecomp search"
    created: str
    edgecomp: str
    command: tuple[str, ...]
    method: str
    preset: str
    backbone: str
    batch: int
    target: str
    runner: str
    threads: int
    duration_s: float
    machine: Machine | None
    limits: Limits
    latency_of: Literal["p50", "p99"]
    agreement_of: str
    is_proxy: bool
    rows: tuple[Row, ...]
    winner: str
    closest: str
    verdict: str
    stopped: tuple[str, ...]
    precisions: tuple[PrecisionVerdict, ...]
    folder: str
    recipe: str
    measuring_s: float
    total_s: float
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether a candidate meets all limits."""
        return bool(self.winner)

    def row(self, name: str) -> Row:
        """Return a row by its name."""
        return next(row for row in self.rows if row.name == name)


def read_search(path: Path) -> SearchResult:
    """Read the document of a search.

    Raises:
        RunError: it cannot be read, is truncated, no search, or of a newer schema.
    """
    return read_document(
        path,
        SearchResult,
        noun="search",
        verb="edgecomp search",
        again="run the search again, it resumes",
        largest=_LARGEST,
    )


def write_search(result: SearchResult, path: Path) -> None:
    """Write the document, whole or not at all.

    Raises:
        EdgecompError: it cannot be written.
    """
    write_whole(path, encode_document(result), noun="search")
