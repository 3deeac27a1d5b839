"""What a search found, in rows and sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from edgecomp.search.board import Board, Known
from edgecomp.search.front import dominators
from edgecomp.search.result import Measured, PrecisionVerdict, Row
from edgecomp.search.space import Subject

__all__ = ["Outcome", "remarks_of", "rows_of", "sentence_of"]

LatencyOf = Literal["p50", "p99"]


class Outcome(msgspec.Struct, frozen=True):
    """What a search found; fields of `SearchResult` by their names, and the winner as it is known."""

    rows: tuple[Row, ...]
    winner: str
    closest: str
    latency_of: LatencyOf
    verdict: str
    stopped: tuple[str, ...]
    precisions: tuple[PrecisionVerdict, ...]
    measuring_s: float
    total_s: float
    notes: tuple[str, ...]
    winner_known: Known | None
    known: tuple[Known, ...] = ()


def rows_of(board: Board, subject: Subject, latency_of: LatencyOf) -> list[Row]:
    """Return a row for each candidate, fastest first, those that were not measured at the end."""
    points = {
        name: (_latency_us(one.measured, latency_of), one.agreement.value)
        for name, one in board.known.items()
        if one.measured is not None and one.agreement is not None
    }
    by, rows = dominators(points), []
    for name, one in board.known.items():
        verdict = board.verdict(one)
        state: Literal["front", "dominated", "refused", "skipped"] = "skipped"
        why = one.skipped
        if name in by:
            state = "dominated" if by[name] else "front"
        elif one.refused:
            state, why = "refused", one.refused
        elif one.measured is not None:
            state, why = "refused", "its agreement cannot be told, so that it stands in no front"
        elif not why:
            continue  # a plain model whose bundle was never made
        rows.append(
            Row(
                name=name,
                role=one.family.role,
                method=one.family.method,
                schedule=one.family.schedule,
                precision=one.family.precision,
                tokens_in=subject.tokens_in,
                tokens_out=subject.tokens_in if one.family.role == "plain" else one.tokens,
                flops=one.flops,
                state=state,
                why=why,
                by=by.get(name, ()),
                latency_us=_latency_us(one.measured, latency_of) if one.measured is not None else None,
                measured=one.measured,
                agreement=one.agreement,
                meets=verdict is not None and not verdict.misses,
                misses=verdict.misses if verdict is not None else (),
                excess=verdict.excess if verdict is not None else None,
            )
        )
    return sorted(rows, key=lambda row: (row.latency_us is None, row.latency_us or 0.0, row.tokens_out))


def sentence_of(board: Board, subject: Subject, winner: str, closest: str) -> str:
    """Return the first line of a search."""
    if not winner and not closest:
        return "nothing could be measured"
    one = board.known[winner or closest]
    if not winner:
        verdict = board.verdict(one)
        return (
            f"no candidate meets the limits; the closest is {closest}: "
            f"{'; '.join(verdict.misses if verdict is not None else ())}"
        )
    unsure = f" ({one.measured.note})" if one.measured is not None and one.measured.note else ""
    if one.family.role == "plain":
        return f"the uncompressed model wins: {winner} meets all limits, so that compression is not needed{unsure}"
    return f"{winner} wins: {one.tokens} of {subject.tokens_in} tokens kept{unsure}"


def remarks_of(rows: Sequence[Row], winner: str, latency_of: LatencyOf) -> list[str]:
    """Return what a reader of the winner must know: what is as good, and a percentile of few samples."""
    row = next((row for row in rows if row.name == winner), None)
    if row is None or row.measured is None:
        return []
    notes = [
        f"the baseline {other.name} is no slower than {winner} and agrees no less: the method gains nothing over it"
        for other in rows
        if other.role == "baseline" and other.name in row.by
    ]
    notes += [_remark_of_plain(other, row) for other in rows if _is_faster_unjudged_plain(other, row)]
    p99 = row.measured.p99_us
    if latency_of == "p99" and p99 is not None and p99.is_indicative:
        notes.append(
            f"p99 of {winner} is indicative: {row.measured.samples:,} samples do not carry it; a longer --duration "
            "makes it surer"
        )
    return notes


def _is_faster_unjudged_plain(other: Row, winner: Row) -> bool:
    """Whether a row is an uncompressed model that cannot win, and would by its latency."""
    if other.role != "plain" or other.agreement is not None or other.latency_us is None:
        return False
    return winner.latency_us is not None and other.latency_us <= winner.latency_us


def _remark_of_plain(other: Row, winner: Row) -> str:
    assert other.latency_us is not None
    assert winner.latency_us is not None
    return (
        f"{other.name}, the uncompressed model, is no slower than {winner.name} ({other.latency_us / 1000:.3f} and "
        f"{winner.latency_us / 1000:.3f} ms) and is left out only because it is another network, whose outputs cannot "
        "be compared: for speed the method is not needed; `edgecomp evaluate` tells which is more accurate"
    )


def _latency_us(measured: Measured, latency_of: LatencyOf) -> float:
    figure = measured.p99_us if latency_of == "p99" and measured.p99_us is not None else measured.p50_us
    return figure.value
