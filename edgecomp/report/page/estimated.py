"""What was computed for hardware that is not here: the bands, the blocks, and the kernels under the roof."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from edgecomp.estimates.go_no_go import GoNoGo
from edgecomp.estimates.roofline import KernelTime
from edgecomp.report.estimate import EstimateReport, GraphEstimate
from edgecomp.report.foresight import LlmReport, allowance, meaning, shape_words, spread
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

__all__ = ["estimate_sections"]

_ESTIMATED = ("estimated",)
_SERIES = 6


def estimate_sections(sources: Sequence[Source], slugs: set[str]) -> tuple[Section, ...]:
    """Return a section for the graphs of each estimate, its answer before training, and what follows behind it."""
    sections: list[Section] = []
    for source in sources:
        report = source.value
        if not isinstance(report, EstimateReport):
            continue
        if report.graphs:
            sections.append(_estimate(source.name, report, slugs))
        if report.go_no_go is not None:
            sections.append(_go_no_go(source.name, report, report.go_no_go, slugs))
        if report.llm is not None:
            sections.append(_llm(source.name, report, report.llm, slugs))
    return tuple(sections)


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
        *_computed_with(report),
        *(f"Finding: {shown(line, longest=400)}." for line in report.findings),
        *(f"Note: {shown(line, longest=400)}" for line in report.notes),
    )
    roofs = _roofs(report)
    plots: list[Plot] = []
    for graph in report.graphs:
        kernels = graph.estimate.kernels or graph.top
        if roofs and any(kernel.flops for kernel in kernels):
            plots.append(_roofline(graph, kernels, roofs, slugs))
    plots += _blocks(report, slugs)
    return Section(
        slug=slug("estimate", slugs),
        title=f"Estimate: {name} on {shown(report.target)}",
        lines=lines,
        tables=(_graphs(report), *(_kernels(graph) for graph in report.graphs)),
        plots=tuple(plots),
    )


def _computed_with(report: EstimateReport) -> tuple[str, ...]:
    """Return whose efficiency it was, and how far that was from what it had not seen."""
    whose = "9 of 10 published figures left out of the fit were"
    if report.is_own:
        whose = "Your own results, left out of the fit in turn, were"
    return (
        f"Computed with {shown(report.efficiency_from, longest=400)}.",
        f"{whose} within a factor of {1 + report.error:.2f}: the band.",
    )


def _go_no_go(file: str, report: EstimateReport, answer: GoNoGo, slugs: set[str]) -> Section:
    counts = [reach.tokens for reach in answer.asked.reach]
    columns = (
        Column("Precision"),
        *(Column(name, is_number=True) for name in ("Batch", "All tokens, ms")),
        Column("Bound"),
        *(Column(name, is_number=True) for name in ("Shrinks, %", *(f"{count} tokens, times" for count in counts))),
    )
    rows = tuple(
        (
            word(shown(row.precision)),
            number(row.batch),
            Cell(figure(row.us / 1000), row.us / 1000, marks=_ESTIMATED),
            word(row.bound),
            number(100 * row.busy_share, 1, marks=_ESTIMATED),
            *(Cell(f"{reach.faster:.2f}", reach.faster, spread(reach), _ESTIMATED) for reach in row.reach),
        )
        for row in answer.rows
    )
    said = meaning(answer).replace("in brackets", "small")
    foot = (f"{said[0].upper()}{said[1:]}.",)
    left_out = tuple(f"Left out: {shown(text, longest=400)}." for text in answer.skipped)
    return Section(
        slug=slug("go no go", slugs),
        title=f"Would fewer tokens help: {shown(PurePosixPath(report.path).name)} on {shown(report.target)}",
        lines=(
            f"{shown(answer.sentence, longest=800)} Computed, not measured ({file}).",
            allowance(answer),
            *_computed_with(report),
            *left_out,
        ),
        tables=(Table("What keeping fewer tokens would give", columns, rows, foot),),
    )


def _llm(file: str, report: EstimateReport, found: LlmReport, slugs: set[str]) -> Section:
    names = ("Visual tokens", "Prefill FLOPs", "Of all, %", "KV cache", "Encoder, ms", "Prefill, ms", "First token, ms")
    columns = (Column("Tokens"), *(Column(name, is_number=True) for name in names), Column("Memory"))
    rows = []
    for row in found.rows:
        made, held = row.prefill, row.memory
        low, mid, high = (us / 1000 for us in (made.low_us, made.mid_us, made.high_us))
        choosing = f"and {flops(made.overhead_flops)} for choosing" if made.overhead_flops else ""
        rows.append(
            (
                word(shown(row.label, longest=64)),
                number(made.visual_tokens),
                Cell(flops(made.flops), float(made.flops), choosing),
                number(100 * row.of_all, 1),
                Cell(size(made.kv_bytes), float(made.kv_bytes)),
                _milliseconds(row.encoder_us),
                Cell(figure(mid), mid, f"{figure(low)} to {figure(high)}", _ESTIMATED),
                _milliseconds(row.first_token_us),
                word(held.verdict, f"{size(held.needed_bytes)} of {size(held.available_bytes)}"),
            )
        )
    foot = ("The first token is the encoder and the prefill; small figures of the prefill are its band.",)
    return Section(
        slug=slug("language model", slugs),
        title=f"Behind the encoder: {shown(found.name)} on {shown(report.target)}",
        lines=(
            f"{shown(shape_words(found), longest=400)}: computed, not measured ({file}).",
            *_computed_with(report),
        ),
        tables=(Table("The prefill of one sequence", columns, tuple(rows), foot),),
    )


def _milliseconds(us: float) -> Cell:
    return number(us / 1000, 1, marks=_ESTIMATED) if us else Cell("\u2013")


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


def _roofs(report: EstimateReport) -> tuple[Roof, ...]:
    """Return what the target can reach: a roof for each rate that was used, the highest first."""
    peaks = sorted(report.graphs[0].estimate.peaks.items(), key=lambda pair: -pair[1].tera)
    bandwidth = report.bandwidth_gb_s
    return tuple(
        Roof(shown(f"{report.target}: {rate.tera:g} T/s {name} dense, {bandwidth:g} GB/s"), 1000 * rate.tera, bandwidth)
        for name, rate in peaks
    )


def _roofline(
    graph: GraphEstimate, kernels: Sequence[KernelTime], roofs: tuple[Roof, ...], slugs: set[str]
) -> RooflinePlot:
    there = [kernel for kernel in kernels if kernel.flops and kernel.bytes and kernel.us]
    points = tuple(
        Point(_kind(kernel), "method", kernel.flops / kernel.bytes, kernel.flops / kernel.us / 1000, is_estimate=True)
        for kernel in there
    )
    rest = len(kernels) - len(there)
    which = "all kernels" if graph.estimate.kernels else f"the {len(kernels)} longest kernels (--per-op has all)"
    ridges = [roof.peak_gflops / roof.bandwidth_gb_s for roof in roofs]
    bounds = [
        f"{sum(point.x < ridge for point in points)} lie left of {ridge:.0f} FLOP a byte, where memory bounds under "
        f"the roof of {roof.label}"
        for roof, ridge in zip(roofs, ridges, strict=True)
    ]
    return RooflinePlot(
        slug=slug("roofline", slugs),
        title=f"Roofline of {_graph_label(graph)}: {which}, estimated",
        alt=f"{len(points)} kernels by FLOP a byte and computed GFLOP/s under {len(roofs)} "
        f"roof{'s' * (len(roofs) > 1)}, one for each rate. {'; '.join(bounds)}. "
        f"{rest} have no products and are not in the plot.",
        roofs=roofs,
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
