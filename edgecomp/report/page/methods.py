"""Every method on one host and one image: what it compresses, what it loses, and its time beside the plain model's."""

from __future__ import annotations

from collections.abc import Sequence

from edgecomp.report.methods import MethodRow, MethodsReport
from edgecomp.report.page.groups import machine_label, threads_label
from edgecomp.report.page.numbers import figure, number, word
from edgecomp.report.page.sources import Source
from edgecomp.report.page.values import Bar, BarsPlot, Cell, Column, Role, Section, Table
from edgecomp.report.page.words import joined, shown, slug
from edgecomp.report.text import flops

__all__ = ["methods_sections"]

_NONE = Cell("\u2013")


def methods_sections(sources: Sequence[Source], slugs: set[str]) -> tuple[Section, ...]:
    """Return a section for each comparison of methods."""
    found = ((source.name, source.value) for source in sources if isinstance(source.value, MethodsReport))
    return tuple(_methods(file, value, slugs) for file, value in found)


def _methods(file: str, report: MethodsReport, slugs: set[str]) -> Section:
    host = joined(report.backbone, f"{report.image_size} pixels", report.weights)
    how = joined(
        report.runner, threads_label(report.threads), f"batch {report.batch}", f"{report.rounds} rounds in turn"
    )
    lines = (
        f"{len(report.rows) - 1} methods on {shown(report.image)}, budget {shown(report.budget)} ({file}).",
        f"{host}; {machine_label(report.machine)}; {how}.",
        *(f"Note: {shown(note, longest=300)}" for note in report.notes),
        *(f"Left out: {shown(name)}: {shown(why, longest=300)}." for name, why in report.left_out.items()),
    )
    return Section(
        slug=slug("methods", slugs),
        title=f"Methods on {shown(report.backbone)}",
        lines=lines,
        tables=(_table(report),),
        plots=(_bars(report, slugs),),
    )


def _table(report: MethodsReport) -> Table:
    names = (
        "Kept",
        "N / M",
        "FLOPs",
        "p50, ms",
        "Time over plain",
        "Own part, ms",
        "(N/M)^2",
        "Attention",
        "Memory, MiB",
    )
    columns = (
        Column("Method"),
        *(Column(name, is_number=True) for name in names),
        Column("Reconstruction error"),
        Column("Notes"),
    )
    foot = (
        "Small figures are 95 % intervals.",
        "(N/M)^2: by how much attention's score products shrink; attention: by how much its measured time did.",
    )
    return Table(
        "Every method beside the plain model", columns, tuple(_row(row, report.rows[0]) for row in report.rows), foot
    )


def _row(row: MethodRow, plain: MethodRow) -> tuple[Cell, ...]:
    p50, ratio = row.latency_us, row.ratio
    over = Cell("1", 1.0)
    if ratio is not None:
        marks = ("no difference",) if ratio.pace == "no difference" else ()
        over = Cell(f"{ratio.value:.3f}", ratio.value, f"{ratio.low:.3f} to {ratio.high:.3f}", marks)
    is_plain = ratio is None
    ways = ", ".join(f"{shown(one.way)} {one.error:.4f}" for one in row.reconstructions)
    notes = "; ".join(
        shown(note, longest=200) for note in (*row.notes, row.overhead_note, row.reconstruction_note) if note
    )
    return (
        word(shown(row.method), joined(row.placement, row.preset)),
        number(row.tokens_out),
        number(row.tokens_in / row.tokens_out if row.tokens_out else None, 2),
        Cell(flops(row.flops), float(row.flops)),
        Cell(figure(p50.value / 1000), p50.value / 1000, f"{figure(p50.low / 1000)} to {figure(p50.high / 1000)}"),
        over,
        _NONE if is_plain else number(None if row.overhead_us is None else row.overhead_us / 1000, 3),
        number(row.attention_rule if row.tokens_out else None, 2),
        _NONE if is_plain else number(row.attention_speed_up(plain), 2),
        number(row.memory_mib, 1),
        word(ways or "\u2013"),
        word(notes or "\u2013"),
    )


def _bars(report: MethodsReport, slugs: set[str]) -> BarsPlot:
    names = tuple(shown(row.method, longest=48) for row in report.rows)
    bars = [
        Bar(1.0) if row.ratio is None else Bar(row.ratio.value, row.ratio.low, row.ratio.high) for row in report.rows
    ]
    plain = tuple(bar if row.ratio is None else None for row, bar in zip(report.rows, bars, strict=True))
    others = tuple(None if row.ratio is None else bar for row, bar in zip(report.rows, bars, strict=True))
    series: list[tuple[str, Role, tuple[Bar | None, ...]]] = [("method", "method", others), ("plain", "plain", plain)]
    said = ", ".join(f"{name} {bar.value:.3f}" for name, bar in zip(names, bars, strict=True))
    return BarsPlot(
        slug=slug("methods", slugs),
        title="Time over the plain model, by method",
        alt=f"Bars of the time over the plain model's, with 95 % intervals; below 1 is faster. {said}.",
        categories=names,
        series=tuple(one for one in series if any(one[2])),
        axis="time over the plain model's",
        is_flat=True,
        is_stacked=True,
    )
