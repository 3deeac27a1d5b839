"""Where the time goes: stages, encoder blocks beside the plain model's, layers, routing, memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from edgecomp.profiles.result import LayerTime, Result
from edgecomp.report.page.groups import Entry, Group
from edgecomp.report.page.numbers import figure, milliseconds, number, word
from edgecomp.report.page.values import Bar, BarsPlot, Cell, Column, Role, Section, Table
from edgecomp.report.page.words import shown, slug

__all__ = ["blocks_section", "layers_section", "memory_section", "routing_section", "stages_section"]

_MOST_LAYERS = 15

Bars = tuple[str, Role, tuple[Bar | None, ...]]
_NUMBER = re.compile(r"\d+")


def stages_section(group: Group, slugs: set[str]) -> Section | None:
    """Return the stages of a request as rows of their own; None where none were told apart."""
    entries = [entry for entry in group.entries if entry.profile.stages]
    if not entries:
        return None
    rows = tuple(
        (
            word(entry.label),
            word(shown(stage.name)),
            milliseconds(stage.p50_us, entry.marks),
            number(100 * stage.p50_us / entry.profile.p50_us if entry.profile.p50_us else None, 1),
            word(shown(stage.how)),
        )
        for entry in entries
        for stage in entry.profile.stages
    )
    columns = (
        Column("Graph"),
        Column("Stage"),
        Column("p50, ms", is_number=True),
        Column("% of the run", is_number=True),
        Column("How it was told apart"),
    )
    plots = []
    for file, _ in group.results:
        here = [entry for entry in entries if entry.file == file]
        for start in range(0, len(here), 6):
            plots.append(_stages_plot(here[start : start + 6], file if len(group.results) > 1 else "", slugs))
    foot = ("Stages are timed by themselves and need not add up to the whole run.",)
    return Section(
        slug=slug("stages", slugs),
        title="Stages",
        tables=(Table("Median time of each stage", columns, rows, foot),),
        plots=tuple(plots),
        plots_first=True,
    )


def _stages_plot(entries: Sequence[Entry], where: str, slugs: set[str]) -> BarsPlot:
    names = tuple(dict.fromkeys(shown(stage.name) for entry in entries for stage in entry.profile.stages))
    series: list[Bars] = []
    for entry in entries:
        times = {shown(stage.name): stage.p50_us / 1000 for stage in entry.profile.stages}
        series.append((entry.label, entry.role, tuple(_bar(times.get(name)) for name in names)))
    return BarsPlot(
        slug=slug("stages", slugs),
        title="Stages of a request" + (f" ({where})" if where else ""),
        alt="Bars of the median time of each stage. " + _list_bars(tuple(series), names),
        categories=names,
        series=tuple(series),
        axis="median, ms",
        is_flat=True,
    )


def blocks_section(group: Group, slugs: set[str]) -> Section | None:
    """Return the time of each encoder block, beside the plain model's; None where blocks were not measured."""
    parts = [
        section for file, result in group.results for section in [_blocks_of(group, file, result, slugs)] if section
    ]
    if not parts:
        return None
    if len(parts) == 1:
        return parts[0]
    return Section(
        slug=slug("blocks", slugs),
        title="Encoder blocks",
        tables=tuple(table for part in parts for table in part.tables),
        plots=tuple(plot for part in parts for plot in part.plots),
        lines=tuple(dict.fromkeys(line for part in parts for line in part.lines)),
        plots_first=True,
    )


def _blocks_of(group: Group, file: str, result: Result, slugs: set[str]) -> Section | None:
    times: dict[str, dict[str, Bar]] = {}
    for one in result.blocks:
        times.setdefault(one.model, {})[shown(one.block)] = Bar(one.us / 1000, one.low_us / 1000, one.high_us / 1000)
    how = "By `--ablate`: differences between truncated graphs, measured in turns; bars carry 95 % intervals."
    if not times:
        how = "Sums of the layers that the runtime's profiler names to a block; profiling slows a run down a little."
        for model, blocks in _sum_layers(result.layers).items():
            times[model] = {block: Bar(us / 1000) for block, us in blocks.items()}
    entries = [e for e in group.entries if e.file == file and e.profile.model in times]
    if not entries:
        return None
    entries.sort(key=lambda entry: entry.role != "plain")
    names = tuple(sorted({block for entry in entries for block in times[entry.profile.model]}, key=_in_order))
    tables, plots = [], []
    for batch in sorted({entry.profile.batch for entry in entries}):
        chosen = [entry for entry in entries if entry.profile.batch == batch]
        series = tuple((e.label, e.role, tuple(times[e.profile.model].get(name) for name in names)) for e in chosen)
        rows = []
        for place, name in enumerate(names):
            cells = [word(name)]
            for entry, (_, _, bars) in zip(chosen, series, strict=True):
                bar = bars[place]
                note = (
                    f"{figure(bar.low)} to {figure(bar.high)}"
                    if bar and bar.low is not None and bar.high is not None
                    else ""
                )
                cells.append(Cell("\u2013") if bar is None else Cell(figure(bar.value), bar.value, note, entry.marks))
            rows.append(tuple(cells))
        columns = (Column("Block"), *(Column(f"{label}, ms", is_number=True) for label, _, _ in series))
        where = f"{file}, batch {batch}"
        tables.append(Table(f"Time of each encoder block ({where})", columns, tuple(rows), (how,)))
        for start in range(0, len(series), 6):
            shown_series = series[start : start + 6]
            plots.append(
                BarsPlot(
                    slug=slug("blocks", slugs),
                    title=f"Time of each encoder block ({where})",
                    alt="Bars of the median time of each encoder block. " + _list_bars(shown_series, names),
                    categories=tuple(_short(name) for name in names),
                    series=shown_series,
                    axis="median, ms",
                    names="encoder block",
                )
            )
    lines = (
        ()
        if any(e.role == "plain" for e in entries)
        else ("The plain model was not measured with it: export with --with-plain to see what each block gained.",)
    )
    return Section(
        slug=slug("blocks", slugs),
        title="Encoder blocks",
        lines=lines,
        tables=tuple(tables),
        plots=tuple(plots),
        plots_first=True,
    )


def _sum_layers(layers: tuple[LayerTime, ...]) -> dict[str, dict[str, float]]:
    sums: dict[str, dict[str, float]] = {}
    for layer in layers:
        if layer.block:
            blocks = sums.setdefault(layer.model, {})
            blocks[shown(layer.block)] = blocks.get(shown(layer.block), 0.0) + layer.us
    return sums


def layers_section(group: Group, slugs: set[str]) -> Section | None:
    """Return the layers that take most of each graph's time; None where layers were not measured."""
    tables: list[Table] = []
    for file, result in group.results:
        for entry in (e for e in group.entries if e.file == file):
            layers = [layer for layer in result.layers if layer.model == entry.profile.model]
            if not layers or any(table.caption.startswith(f"{entry.label}: ") for table in tables):
                continue
            most = sorted(layers, key=lambda layer: (-layer.us, layer.name))[:_MOST_LAYERS]
            rows = tuple(
                (
                    word(shown(layer.name, longest=64)),
                    word(shown(layer.op)),
                    word(shown(layer.module) or "\u2013"),
                    word(shown(layer.block) or "\u2013"),
                    milliseconds(layer.us, entry.marks),
                    number(100 * layer.share, 1),
                )
                for layer in most
            )
            rest = len(layers) - len(most)
            foot = (
                (f"{rest:,} more layers take {100 * (1 - sum(layer.share for layer in most)):.1f} % together.",)
                if rest
                else ()
            )
            columns = (
                Column("Layer"),
                Column("Op"),
                Column("Module"),
                Column("Block"),
                Column("Median, ms", is_number=True),
                Column("% of all layers", is_number=True),
            )
            tables.append(Table(f"{entry.label}: the layers that take most", columns, rows, foot))
    if not tables:
        return None
    line = "By the runtime's own profiler, which slows a run down a little: shares mean more than times."
    return Section(slug=slug("layers", slugs), title="Layers", lines=(line,), tables=tuple(tables))


def routing_section(group: Group, slugs: set[str]) -> Section | None:
    """Return what a routed request takes in each bucket; None without a router."""
    rows = []
    for file, result in group.results:
        labels = {entry.profile.model: entry for entry in group.entries if entry.file == file}
        for one in result.routing:
            entry = labels.get(one.model)
            if entry is None:
                continue
            pays = one.routed_ms < one.largest_ms or one.smallest_ms == one.largest_ms
            rows.append(
                (
                    word(entry.label),
                    number(one.batch),
                    Cell(figure(one.router_ms), one.router_ms, marks=entry.marks),
                    Cell(figure(one.routed_ms), one.routed_ms, marks=entry.marks),
                    Cell(figure(one.largest_ms), one.largest_ms, marks=entry.marks),
                    word("yes" if pays else "no"),
                )
            )
    if not rows:
        return None
    columns = (
        Column("Bucket"),
        *(Column(name, is_number=True) for name in ("Batch", "Router, ms", "Routed, ms", "Largest alone, ms")),
        Column("Routing pays"),
    )
    foot = ("Made of the parts' own medians: router, stem and bucket in a row, beside the largest bucket alone.",)
    return Section(
        slug=slug("routing", slugs),
        title="Routing",
        tables=(Table("A request that the router sends to a bucket", columns, tuple(rows), foot),),
    )


def memory_section(group: Group, slugs: set[str]) -> Section | None:
    """Return peak memory of each graph and of processes that serve buckets; None where none was read."""
    tables, bars = [], []
    peaks = [e for e in group.entries if e.profile.host_peak_mib is not None or e.profile.device_peak_mib is not None]
    if peaks:
        rows = tuple(
            (
                word(entry.label),
                number(entry.profile.batch),
                number(entry.profile.host_peak_mib, 1),
                number(entry.profile.device_peak_mib, 1),
            )
            for entry in peaks
        )
        columns = (
            Column("Graph"),
            *(Column(n, is_number=True) for n in ("Batch", "Host peak, MiB", "Device peak, MiB")),
        )
        tables.append(Table("Peak memory while a graph loaded and ran", columns, rows))
        bars += [(e.label, e.profile.host_peak_mib, e.profile.device_peak_mib) for e in peaks]
    served = tuple(_served(group))
    if served:
        rows = tuple((word(label), word(file), number(held, 1), number(peak, 1)) for label, file, held, peak in served)
        columns = (Column("Process"), Column("File"), *(Column(n, is_number=True) for n in ("Held, MiB", "Peak, MiB")))
        foot = ("Proportional set size (Pss): a page of weights that several sessions map counts once.",)
        tables.append(Table("Memory of a process that serves buckets", columns, rows, foot))
    if not tables:
        return None
    plots = []
    if bars:
        names = tuple(label for label, _, _ in bars)
        series: list[Bars] = [("host", "method", tuple(_bar(h) for _, h, _ in bars))]
        if any(device is not None for _, _, device in bars):
            series.append(("device", "baseline", tuple(_bar(device) for _, _, device in bars)))
        plots.append(_memory_plot("Peak memory while a graph loaded and ran", names, tuple(series), slugs))
    if served:
        several = len({file for _, file, _, _ in served}) > 1
        names = tuple(f"{label} ({file})" if several else label for label, file, _, _ in served)
        held: Bars = ("held", "method", tuple(_bar(mib) for _, _, mib, _ in served))
        peak: Bars = ("peak", "baseline", tuple(_bar(mib) for _, _, _, mib in served))
        plots.append(_memory_plot("Memory of a process that serves buckets", names, (held, peak), slugs))
    return Section(slug("memory", slugs), "Memory", tables=tuple(tables), plots=tuple(plots), plots_first=True)


def _memory_plot(
    title: str,
    names: tuple[str, ...],
    series: tuple[Bars, ...],
    slugs: set[str],
) -> BarsPlot:
    return BarsPlot(
        slug=slug("memory", slugs),
        title=title,
        alt=f"Bars of memory in MiB. {_list_bars(series, names)}",
        categories=names,
        series=series,
        axis="MiB",
        is_flat=True,
    )


def _served(group: Group) -> Iterator[tuple[str, str, float, float]]:
    for file, result in group.results:
        for use in result.memory:
            what = f"{len(use.buckets)} buckets" if len(use.buckets) != 1 else f"bucket {use.buckets[0]} alone"
            yield what + (", weights shared" if use.share_weights else ""), file, use.held_mib, use.peak_mib


def _bar(value: float | None) -> Bar | None:
    return None if value is None else Bar(value)


def _list_bars(series: tuple[Bars, ...], names: tuple[str, ...]) -> str:
    """Return what the bars say, in words: each series with its largest bar and its sum, or every bar of a few."""
    sentences = []
    for label, _, bars in series:
        there = [(name, bar.value) for name, bar in zip(names, bars, strict=True) if bar is not None]
        if not there:
            continue
        told = there if len(there) <= 12 else [max(there, key=lambda pair: pair[1])]
        words = ", ".join(f"{name} {figure(value)}" for name, value in told)
        sentences.append(f"{label}: {words}." if told is there else f"{label}: the largest is {words}.")
    return " ".join(sentences)


def _in_order(block: str) -> tuple[object, ...]:
    """Return a key that puts `blocks.2` before `blocks.10`."""
    return tuple(int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", block)))


def _short(block: str) -> str:
    found: Mapping[int, str] = dict(enumerate(_NUMBER.findall(block)))
    return found[0] if len(found) == 1 else block
