"""A comparison: each model beside the base, and the front of time against how alike the outputs are."""

from __future__ import annotations

from collections.abc import Sequence

from edgecomp.profiles.comparison import Comparison, Contestant
from edgecomp.report.page.accuracy import mark_front
from edgecomp.report.page.groups import machine_label, threads_label
from edgecomp.report.page.numbers import figure, number, word
from edgecomp.report.page.sources import Source
from edgecomp.report.page.values import Bar, BarsPlot, Cell, Column, Plot, Point, PointsPlot, Role, Section, Table
from edgecomp.report.page.words import joined, shown, slug
from edgecomp.report.text import flops, size

__all__ = ["comparison_sections"]

_NONE = Cell("\u2013")
_ROWS = 24


def comparison_sections(sources: Sequence[Source], slugs: set[str]) -> tuple[Section, ...]:
    """Return a section for each comparison."""
    found = ((source.name, source.value) for source in sources if isinstance(source.value, Comparison))
    return tuple(_comparison(file, value, slugs) for file, value in found)


def _comparison(file: str, found: Comparison, slugs: set[str]) -> Section:
    first, base = found.contestants[0], shown(found.base)
    how = f"{found.rounds} rounds, the models in turn" if found.rounds else "of result files, not measured in turns"
    where = machine_label(found.machine) if found.machine is not None else "machines as in the result files"
    lines = (
        f"Time over {base}: {how} ({file}).",
        f"{where}; {joined(first.runner, threads_label(first.threads), f'batch {first.batch}')}.",
        *(f"Forced: {shown(line, longest=300)}." for line in found.forced),
        *(f"Note: {shown(line, longest=300)}" for line in found.notes),
    )
    plots: list[Plot] = [_bars(found, start, slugs) for start in range(0, len(found.contestants), _ROWS)]
    points = [point for point in (_point(one, found) for one in found.contestants) if point is not None]
    if len(points) > 1:
        plots.append(_front(tuple(mark_front(points)), found, slugs))
    return Section(
        slug=slug("comparison", slugs),
        title=f"Comparison: over {base}",
        lines=lines,
        tables=(_table(found),),
        plots=tuple(plots),
    )


def _table(found: Comparison) -> Table:
    columns = (
        Column("Model"),
        Column("Kept", is_number=True),
        Column("Precision"),
        *(
            Column(name, is_number=True)
            for name in ("p50, ms", "Time over base", "FLOPs", "Size", "Cosine", "Same class, %")
        ),
        Column("Parity"),
        Column("Notes"),
    )
    rows = []
    for one in found.contestants:
        p50, ratio, agreement = one.latency_us, one.ratio, one.agreement
        interval = f"{figure(p50.low / 1000)} to {figure(p50.high / 1000)}"
        over = Cell("1", 1.0, note="base")
        if ratio is not None:
            marks: tuple[str, ...] = ("no difference",) if ratio.pace == "no difference" else ()
            marks += ("not in turns",) if ratio.way == "unpaired" else ()
            over = Cell(f"{ratio.value:.3f}", ratio.value, f"{ratio.low:.3f} to {ratio.high:.3f}", marks)
        top1 = None if agreement is None else agreement.top1
        rows.append(
            (
                word(shown(one.name, longest=64), shown(one.model, longest=48)),
                number(one.tokens_out) if one.tokens_out else _NONE,
                word(shown(one.precision) or "unknown"),
                Cell(figure(p50.value / 1000), p50.value / 1000, interval),
                over,
                Cell("unknown") if one.flops is None else Cell(flops(one.flops), float(one.flops)),
                _NONE if one.size_bytes is None else Cell(size(one.size_bytes), float(one.size_bytes)),
                _NONE if agreement is None else Cell(f"{agreement.cosine:.4f}", agreement.cosine),
                _NONE if top1 is None else Cell(f"{100 * top1:.1f}", 100 * top1),
                _parity(one.parity),
                word(
                    "; ".join(shown(note, longest=200) for note in (*one.notes, one.agreement_note) if note) or "\u2013"
                ),
            )
        )
    foot = (
        "Small figures are 95 % intervals; where one holds 1, no difference was told.",
        "Cosine and class are of the outputs, beside the base's on the same inputs.",
    )
    return Table("Each model beside the base", columns, tuple(rows), foot)


def _parity(text: str) -> Cell:
    if text.startswith("FAIL"):
        return Cell(shown(text, longest=200), marks=("fails",))
    return word(shown(text.partition(" (")[0], longest=120) or "\u2013")


def _bars(found: Comparison, start: int, slugs: set[str]) -> BarsPlot:
    chosen = found.contestants[start : start + _ROWS]
    bars = tuple(
        Bar(1.0) if one.ratio is None else Bar(one.ratio.value, one.ratio.low, one.ratio.high) for one in chosen
    )
    names = tuple(shown(one.name, longest=64) for one in chosen)
    series: list[tuple[str, Role, tuple[Bar | None, ...]]] = [
        (
            "compared",
            "method",
            tuple(None if one.ratio is None else bar for one, bar in zip(chosen, bars, strict=True)),
        ),
        ("base", "plain", tuple(bar if one.ratio is None else None for one, bar in zip(chosen, bars, strict=True))),
    ]
    said = ", ".join(f"{name} {bar.value:.3f}" for name, bar in zip(names, bars, strict=True))
    return BarsPlot(
        slug=slug("ratios", slugs),
        title=f"Time over {shown(found.base)}",
        alt=f"Bars of the time over the base's, with 95 % intervals; below 1 is faster. {said}.",
        categories=names,
        series=tuple(one for one in series if any(one[2])),
        axis="time over the base's",
        is_flat=True,
        is_stacked=True,
    )


def _point(one: Contestant, found: Comparison) -> Point | None:
    name = shown(one.name, longest=64)
    if one.ratio is None:
        return Point(f"{name} (base)", "plain", 1.0, 1.0) if one.name == found.base else None
    if one.agreement is None:
        return None
    ratio = one.ratio
    return Point(name, "method", ratio.value, one.agreement.cosine, ratio.low, ratio.high)


def _front(points: tuple[Point, ...], found: Comparison, slugs: set[str]) -> PointsPlot:
    front = "; ".join(f"{p.label}: {p.x:.3f}, {p.y:.4f}" for p in points if p.is_front)
    return PointsPlot(
        slug=slug("pareto", slugs),
        title="Pareto front: time against likeness of the outputs",
        alt=f"{len(points)} models by time over {shown(found.base)} and cosine of outputs. On the front: {front}.",
        points=points,
        x_axis="time over the base's",
        y_axis="cosine with the base's output (a proxy)",
    )
