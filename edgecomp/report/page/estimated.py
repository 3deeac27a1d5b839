"""What was computed for hardware that is not here: the bands, the blocks, and the kernels under the roof."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from edgecomp.estimates.roofline import KernelTime
from edgecomp.report.estimate import EstimateReport, GraphEstimate
from edgecomp.report.page.numbers import figure, number, word
from edgecomp.report.page.sources import Source
from edgecomp.report.page.values import (
    Bar,
    BarsPlot,
    Cell,
    Column,
    Plot,
    Point,
    Role,
    Roof,
    RooflinePlot,
    Section,
    Table,
)
from edgecomp.report.page.words import shown, slug
from edgecomp.report.text import flops, size
from edgecomp.specs.target import load_target, target_names

__all__ = ["estimate_sections"]

_ESTIMATED = ("estimated",)
_SERIES = 6


def estimate_sections(sources: Sequence[Source], slugs: set[str]) -> tuple[Section, ...]:
    """Return a section for each estimate."""
    found = ((source.name, source.value) for source in sources if isinstance(source.value, EstimateReport))
    return tuple(_estimate(file, value, slugs) for file, value in found)


def _estimate(file: str, report: EstimateReport, slugs: set[str]) -> Section:
    first = report.graphs[0].estimate
    rates = ", ".join(
        f"{shown(name)} {rate.tera:g} T/s dense"
        + ("" if rate.confidence == "stated" else f" ({shown(rate.confidence)})")
        for name, rate in first.peaks.items()
    )
    name = shown(PurePosixPath(report.path).name)
    lines = (
        f"{name} on {shown(report.target)} ({shown(report.title)}): computed, not measured ({file}).",
        f"Precision {shown(first.precision)}; batch {first.batch or 'unknown'}; {rates or 'no rate was used'}.",
        f"Computed with {shown(report.efficiency_from)}.",
        f"9 of 10 published figures left out of the fit were within a factor of {1 + report.error:.2f}: the band.",
        *(f"Finding: {shown(line, longest=400)}." for line in report.findings),
        *(f"Note: {shown(line, longest=400)}" for line in report.notes),
    )
    roof, why = _roof(report)
    plots: list[Plot] = []
    for graph in report.graphs:
        kernels = graph.estimate.kernels or graph.top
        if roof is not None and any(kernel.flops for kernel in kernels):
            plots.append(_roofline(graph, kernels, roof, slugs))
    plots += _blocks(report, slugs)
    return Section(
        slug=slug("estimate", slugs),
        title=f"Estimate: {name} on {shown(report.target)}",
        lines=(*lines, *((why,) if why else ())),
        tables=(_graphs(report), *(_kernels(graph) for graph in report.graphs)),
        plots=tuple(plots),
    )


def _graph_label(graph: GraphEstimate) -> str:
    if graph.role == "plain":
        return "plain"
    return f"{graph.kept} kept" if graph.kept else shown(graph.model, longest=48)


def _graphs(report: EstimateReport) -> Table:
    columns = (
        Column("Graph"),
        *(
            Column(name, is_number=True)
            for name in ("Time, ms", "Time over plain", "Launches, %", "Choosing, merging, %")
        ),
        Column("Bound"),
        Column("FLOPs", is_number=True),
        Column("Memory"),
    )
    rows = []
    for graph in report.graphs:
        made = graph.estimate
        low, mid, high = (us / 1000 for us in (made.low_us, made.mid_us, made.high_us))
        own = 100 * (made.selection_us + made.merge_us) / made.mid_us if made.mid_us else 0.0
        ratio = (
            Cell(f"{graph.over_plain:.3f}", graph.over_plain, marks=_ESTIMATED) if graph.over_plain else Cell("\u2013")
        )
        memory = graph.memory
        rows.append(
            (
                word(_graph_label(graph), shown(graph.model, longest=48)),
                Cell(figure(mid), mid, f"{figure(low)} to {figure(high)}", _ESTIMATED),
                ratio,
                number(100 * made.launch_us / made.mid_us if made.mid_us else None, 1, marks=_ESTIMATED),
                number(own, 1, marks=_ESTIMATED),
                word(made.bound),
                Cell(flops(made.flops), float(made.flops)),
                word(memory.verdict, f"{size(memory.needed_bytes)} of {size(memory.available_bytes)}"),
            )
        )
    foot = ("Small figures are the band that the model's own error leaves; nothing here was measured.",)
    return Table("Computed time of one run", columns, tuple(rows), foot)


def _kernels(graph: GraphEstimate) -> Table:
    columns = (
        Column("Kernel"),
        Column("Block"),
        Column("Kind"),
        *(Column(name, is_number=True) for name in ("FLOPs", "Bytes", "Time, us")),
        Column("Bound"),
    )
    rows = tuple(
        (
            word(shown(kernel.name, longest=64)),
            word(shown(kernel.block) or "\u2013"),
            word(_kind(kernel)),
            Cell(flops(kernel.flops) if kernel.flops else "\u2013", float(kernel.flops)),
            Cell(size(kernel.bytes), float(kernel.bytes)),
            number(kernel.us, 1, marks=_ESTIMATED),
            word(kernel.bound),
        )
        for kernel in graph.top
    )
    return Table(f"{_graph_label(graph)}: the kernels that take longest", columns, rows)


def _kind(kernel: KernelTime) -> str:
    return kernel.kind if kernel.role == "model" else f"{kernel.kind} ({kernel.role})"


def _roof(report: EstimateReport) -> tuple[Roof | None, str]:
    """Return what the target can reach at the highest rate that was used, or why that is not known."""
    peaks = report.graphs[0].estimate.peaks
    if report.target not in target_names() or not peaks:
        return None, f"No roofline: {shown(report.target)} is no target of this edgecomp, so its bandwidth is unknown."
    bandwidth = load_target(report.target).bandwidth_gb_s
    name, rate = max(peaks.items(), key=lambda pair: pair[1].tera)
    label = f"{report.target}: {rate.tera:g} T/s {name} dense, {bandwidth.value:g} GB/s"
    return Roof(shown(label), 1000 * rate.tera, bandwidth.value), ""


def _roofline(graph: GraphEstimate, kernels: Sequence[KernelTime], roof: Roof, slugs: set[str]) -> RooflinePlot:
    there = [kernel for kernel in kernels if kernel.flops and kernel.bytes and kernel.us]
    points = tuple(
        Point(_kind(kernel), "method", kernel.flops / kernel.bytes, kernel.flops / kernel.us / 1000, is_estimate=True)
        for kernel in there
    )
    rest = len(kernels) - len(there)
    which = "all kernels" if graph.estimate.kernels else f"the {len(kernels)} longest kernels (--per-op has all)"
    ridge = roof.peak_gflops / roof.bandwidth_gb_s
    left = sum(point.x < ridge for point in points)
    return RooflinePlot(
        slug=slug("roofline", slugs),
        title=f"Roofline of {_graph_label(graph)}: {which}, estimated",
        alt=f"{len(points)} kernels by FLOP a byte and computed GFLOP/s under the roof of {roof.label}. "
        f"{left} lie left of {ridge:.0f} FLOP a byte, where memory bounds, and {len(points) - left} right of it. "
        f"{rest} have no products and are not in the plot.",
        roofs=(roof,),
        points=points,
    )


def _blocks(report: EstimateReport, slugs: set[str]) -> list[BarsPlot]:
    names = tuple(dict.fromkeys(shown(block.block) for graph in report.graphs for block in graph.blocks))
    if len(names) < 2:
        return []
    series = []
    for graph in sorted(report.graphs, key=lambda one: one.role != "plain")[:_SERIES]:
        times = {shown(block.block): block.us / 1000 for block in graph.blocks}
        role: Role = "plain" if graph.role == "plain" else "method"
        bars = tuple(Bar(times[name]) if name in times else None for name in names)
        series.append((_graph_label(graph), role, bars))
    most = "; ".join(f"{label}: {figure(sum(bar.value for bar in bars if bar))} ms in all" for label, _, bars in series)
    return [
        BarsPlot(
            slug=slug("estimated-blocks", slugs),
            title=f"Computed time of each block on {shown(report.target)}",
            alt=f"Bars of the computed time of each block in milliseconds. {most}.",
            categories=tuple(name.removeprefix("blocks.") for name in names),
            series=tuple(series),
            axis="computed, ms",
            names="encoder block",
        )
    ]
