"""A search: every candidate, the front of latency against agreement, and what decided."""

from __future__ import annotations

from collections.abc import Sequence

from edgecomp.report.page.groups import machine_label, threads_label
from edgecomp.report.page.numbers import INDICATIVE, figure, number, word
from edgecomp.report.page.sources import Source
from edgecomp.report.page.values import Cell, Column, Point, PointsPlot, Role, Section, Table
from edgecomp.report.page.words import joined, shown, slug
from edgecomp.search.result import Agreement, Figure, Row, SearchResult

__all__ = ["search_sections"]

_NONE = Cell("\u2013")
_ROLES: dict[str, Role] = {"candidate": "method", "plain": "plain", "baseline": "baseline"}


def search_sections(sources: Sequence[Source], slugs: set[str]) -> tuple[Section, ...]:
    """Return a section for each search."""
    found = ((source.name, source.value) for source in sources if isinstance(source.value, SearchResult))
    return tuple(_search(file, value, slugs) for file, value in found)


def _search(file: str, found: SearchResult, slugs: set[str]) -> Section:
    what = joined(found.method, found.preset, found.backbone, f"batch {found.batch}")
    limits = found.limits
    asked = [
        f"{name} at most {value:g} {unit}"
        for name, value, unit in (
            ("p50", limits.max_p50_ms, "ms"),
            ("p99", limits.max_p99_ms, "ms"),
            ("energy", limits.max_energy_mj, "mJ"),
        )
        if value is not None
    ]
    asked += [f"agreement at least {limits.min_agreement:g}"] if limits.min_agreement is not None else []
    where = machine_label(found.machine) if found.machine is not None else "no machine: everything was estimated"
    proxy = " (a proxy: no share of images of yours)" if found.is_proxy else ""
    lines = (
        f"{shown(found.verdict, longest=400)}",
        f"Asked for: {'; '.join(asked)}." if asked else "No limit was given.",
        f"Target {shown(found.target)}; {where}; {joined(found.runner, threads_label(found.threads))} ({file}).",
        f"Agreement: {shown(found.agreement_of, longest=300)}{proxy}.",
        *(shown(line, longest=300) for line in found.stopped),
        *(f"Note: {shown(note, longest=300)}" for note in found.notes),
    )
    tables = [_rows(found)]
    if found.precisions:
        columns = (Column("Precision"), Column("Verdict"), Column("Why"))
        rows = tuple(
            (word(shown(p.precision)), word(p.verdict), word(shown(p.why, longest=300))) for p in found.precisions
        )
        tables.append(Table("Every precision, and what became of it", columns, rows))
    return Section(
        slug=slug("search", slugs),
        title=f"Search: {what}",
        lines=lines,
        tables=tuple(tables),
        plots=_plots(found, slugs),
    )


def _rows(found: SearchResult) -> Table:
    columns = (
        Column("Candidate"),
        Column("Kept", is_number=True),
        Column("Precision"),
        Column("State"),
        Column("p50, ms", is_number=True),
        Column("p99, ms", is_number=True),
        Column("Energy, mJ", is_number=True),
        Column("Agreement", is_number=True),
        Column("Meets the limits"),
        Column("Why"),
    )
    rows = []
    for row in found.rows:
        taken = row.measured
        marks = () if taken is None else _marks(taken.source, is_steady=taken.is_steady)
        is_winner = bool(found.winner) and row.name == found.winner
        name = Cell(shown(row.name, longest=64), note=joined(row.schedule), marks=("winner",) if is_winner else ())
        why = [shown(row.why, longest=200), *(shown(miss) for miss in row.misses)]
        why += [f"beaten by {shown(row.by[0])}"] if row.by else []
        why += [shown(taken.note)] if taken is not None and taken.note else []
        rows.append(
            (
                name,
                number(row.tokens_out),
                word(shown(row.precision)),
                word(row.state if row.role == "candidate" else f"{row.state}, {row.role}"),
                _NONE if taken is None else _time(taken.p50_us, marks),
                _NONE if taken is None or taken.p99_us is None else _time(taken.p99_us, marks),
                _NONE if taken is None or taken.energy_mj is None else number(taken.energy_mj, 3, marks=marks),
                _share(row.agreement),
                word("yes" if row.meets else "no"),
                word("; ".join(filter(None, why)) or "\u2013"),
            )
        )
    foot = ["Small figures are 95 % intervals, or the band of an estimate; an end that nothing bounds is left open."]
    if any("estimated" in cell.marks for row_ in rows for cell in row_):
        foot.append("estimated: computed for hardware that is not here, not measured.")
    if any(INDICATIVE in cell.marks for row_ in rows for cell in row_):
        foot.append("~ indicative: so few samples do not carry this percentile.")
    return Table("Every candidate", columns, tuple(rows), tuple(foot))


def _marks(source: str, *, is_steady: bool) -> tuple[str, ...]:
    return (*(("estimated",) if source == "estimated" else ()), *(() if is_steady else ("unstable",)))


def _time(one: Figure, marks: tuple[str, ...]) -> Cell:
    ends = [None if us is None else figure(us / 1000) for us in (one.low, one.high)]
    note = (
        f"{ends[0]} to {ends[1]}" if all(ends) else f"from {ends[0]}" if ends[0] else f"to {ends[1]}" if ends[1] else ""
    )
    told = ((INDICATIVE,) if one.is_indicative else ()) + marks
    return Cell(figure(one.value / 1000), one.value / 1000, note, told)


def _share(one: Agreement | None) -> Cell:
    if one is None:
        return Cell("unknown")
    note = f"{one.low:.4f} to {one.high:.4f}" if one.low is not None and one.high is not None else ""
    return Cell(f"{one.value:.4f}", one.value, note)


def _plots(found: SearchResult, slugs: set[str]) -> tuple[PointsPlot, ...]:
    points = tuple(point for point in (_point(row, found) for row in found.rows) if point is not None)
    if not points:
        return ()
    front = "; ".join(f"{p.label}: {figure(p.x)} ms, {p.y:.4f}" for p in points if p.is_front)
    limits = found.limits
    limit = limits.max_p99_ms if found.latency_of == "p99" else limits.max_p50_ms
    bound = f" The limit is {limit:g} ms." if limit is not None else ""
    return (
        PointsPlot(
            slug=slug("pareto", slugs),
            title=f"Pareto front: {found.latency_of} against agreement",
            alt=f"{len(points)} candidates by {found.latency_of} in milliseconds and agreement.{bound} On the front: "
            f"{front or 'none'}.",
            points=points,
            x_axis=f"{found.latency_of} of a run, ms",
            y_axis="agreement" + (" (proxy)" if found.is_proxy else ""),
            limit=limit,
        ),
    )


def _point(row: Row, found: SearchResult) -> Point | None:
    if row.latency_us is None or row.agreement is None or row.measured is None:
        return None
    taken = row.measured.p99_us if found.latency_of == "p99" and row.measured.p99_us else row.measured.p50_us
    low, high = (None if us is None else us / 1000 for us in (taken.low, taken.high))
    is_estimate = row.measured.source == "estimated"
    return Point(
        label=shown(row.name, longest=64) + ("" if row.measured.is_steady else " (unstable)"),
        role=_ROLES[row.role],
        x=row.latency_us / 1000,
        y=row.agreement.value,
        x_low=low,
        x_high=high,
        y_low=row.agreement.low,
        y_high=row.agreement.high,
        is_front=row.state == "front",
        is_estimate=is_estimate,
    )
