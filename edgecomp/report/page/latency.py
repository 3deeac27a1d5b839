"""How long a group's graphs take: the tables, and the two plots of each batch size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np

from edgecomp.report.page.groups import Entry, Group
from edgecomp.report.page.numbers import figure, milliseconds, number, percentile_cell, ratio_cell, word
from edgecomp.report.page.values import (
    Bar,
    BarsPlot,
    Column,
    EcdfPlot,
    HistogramPlot,
    Plot,
    Quantile,
    Role,
    Section,
    Series,
    Table,
)
from edgecomp.report.page.words import shown, slug

__all__ = ["findings", "latency_section"]

_MARKED = ("p50", "p90", "p99")
_CURVES = 6  # a plot; more do not tell apart
_MOST_CURVES = 24  # a group; a page of more is long, and its histograms say the same
_CURVE_POINTS = 160
_BINS = 44
_ROWS = 24
_WIDE = 6.0  # from this ratio of longest to shortest median on, time is drawn on a logarithmic axis


def latency_section(group: Group, slugs: set[str]) -> Section:
    """Return the section: percentiles for each graph, then how they are spread."""
    plots: list[Plot] = list(_overview(group, slugs))
    has_curves = len(group.entries) <= _MOST_CURVES
    for entries, where in _figures(group):
        low, high, is_log = _range(entries)
        words = f"{where}: {group.title}" if where else group.title
        plots.append(
            HistogramPlot(
                slug=slug(f"histogram {where}", slugs),
                title=f"How often each time was seen{_tail(where)}",
                alt=f"Histograms of {words}. {_describe(entries)}",
                series=tuple(_histogram(entry, low, high, is_log=is_log) for entry in entries),
                low_ms=low,
                high_ms=high,
                is_log=is_log,
            )
        )
        if not has_curves:
            continue
        plots.append(
            EcdfPlot(
                slug=slug(f"ecdf {where}", slugs),
                title=f"Share of runs that took no longer{_tail(where)}",
                alt=f"Cumulative distributions of {words}. {_describe(entries)}",
                series=tuple(_curve(entry, high) for entry in entries),
                low_ms=low,
                high_ms=high,
                is_log=is_log,
            )
        )
    return Section(
        slug=slug("latency", slugs),
        title="Latency",
        lines=() if has_curves else (f"Cumulative plots are left out: there are more than {_MOST_CURVES} graphs.",),
        tables=(_main(group), _more(group)),
        plots=tuple(plots),
    )


def _main(group: Group) -> Table:
    entries = group.entries
    several = len(group.results) > 1
    columns = [
        Column("Graph"),
        *([Column("File")] if several else []),
        *(Column(f"{name}, ms", is_number=True) for name in _MARKED),
        *(Column(name, is_number=True) for name in ("Time over plain", "Mean, ms", "Items/s", "Samples", "Batch")),
        Column("Precision"),
    ]
    rows = []
    for entry in entries:
        profile = entry.profile
        rows.append(
            (
                word(entry.label, shown(profile.model, longest=48)),
                *([word(entry.file)] if several else []),
                *(percentile_cell(entry, name) for name in _MARKED),
                ratio_cell(entry),
                milliseconds(profile.mean_us, entry.marks),
                number(profile.throughput_per_s, 1, marks=entry.marks),
                number(profile.num_samples),
                number(profile.batch),
                word(shown(profile.precision or entry.result.subject.precision) or "unknown"),
            )
        )
    foot = ["Small figures are 95 % intervals by order statistics; an end that the samples do not bound is left open."]
    if any("indicative" in cell.marks for row in rows for cell in row):
        foot.append(
            "~ indicative: so few samples do not carry this percentile by MLPerf's rules (24,576 for p90, 270,336 for "
            "p99): a figure to go by, not to promise."
        )
    foot += [f"unstable: {entry.label}: {'; '.join(entry.reasons)}." for entry in entries if entry.reasons]
    if any(entry.plain is not None for entry in entries):
        foot.append(
            "Time over plain: the median over the plain model's of the same run and batch, below 1 is faster. The "
            "graphs ran one after another, so the interval is the widest that both allow; `compare` measures in turns."
        )
    elif not any(entry.role == "plain" for entry in entries):
        foot.append("No plain model was measured, so no ratio is formed: export with --with-plain and profile again.")
    return Table("Latency of one run", tuple(columns), tuple(rows), tuple(foot))


def _more(group: Group) -> Table:
    columns = (
        Column("Graph"),
        *(Column(f"{name}, ms", is_number=True) for name in ("p95", "p99.9", "Least", "Most", "Load", "First run")),
        Column("Warm-up runs", is_number=True),
        Column("Loop, us", is_number=True),
    )
    rows = tuple(
        (
            word(entry.label),
            percentile_cell(entry, "p95"),
            percentile_cell(entry, "p99.9"),
            milliseconds(entry.profile.min_us, entry.marks),
            milliseconds(entry.profile.max_us, entry.marks),
            milliseconds(entry.profile.load_us),
            milliseconds(entry.profile.first_us),
            number(entry.profile.warmup_runs, marks=() if entry.profile.is_steady else ("did not settle",)),
            number(entry.profile.loop_overhead_us, 2),
        )
        for entry in group.entries
    )
    foot = ("Loop: what the timing loop itself costs a run; it is contained in every time and not subtracted.",)
    return Table("Tails, start and the cost of measuring", columns, rows, foot)


def findings(group: Group) -> tuple[str, ...]:
    """Return what the numbers say of each batch size, in a sentence."""
    lines = []
    for batch in sorted({entry.profile.batch for entry in group.entries}):
        compared = [
            e for e in group.entries if e.profile.batch == batch and ratio_cell(e).value and e.plain is not None
        ]
        if not compared:
            continue
        best = min(compared, key=lambda e: ratio_cell(e).value or math.inf)
        cell = ratio_cell(best)
        marks = f" ({', '.join(cell.marks)})" if cell.marks else ""
        what = f"{best.label} takes {cell.text} of the plain model's time"
        what += f" (95 %: {cell.note})" if cell.note else " (no interval: too few samples)"
        low, _, high = cell.note.partition(" to ")
        if not high or float(low) <= 1 <= float(high):
            said = f"no difference from the plain model can be told: {what}"
        elif float(high) < 1:
            said = f"the fastest is {best.label}: it{what.removeprefix(best.label)}"
        else:
            said = f"the plain model is the fastest: {what}"
        lines.append(f"Batch {batch}: {said}{marks}.")
    return tuple(lines)


def _figures(group: Group) -> Iterator[tuple[Sequence[Entry], str]]:
    """Yield the entries of each plot and what to call them: by batch, parts of a request apart, and by file if many."""
    batches = sorted({entry.profile.batch for entry in group.entries})
    for batch, is_part in itertools.product(batches, (False, True)):
        chosen = [e for e in group.entries if e.profile.batch == batch and (e.role == "part") == is_part]
        by_file: dict[str, list[Entry]] = {}
        for entry in chosen:
            by_file.setdefault(entry.file if len(chosen) > _CURVES else "", []).append(entry)
        for entries in by_file.values():
            for start in range(0, len(entries), _CURVES):
                words = (
                    "router and stem" if is_part else "",
                    shown(entries[0].result.subject.name, longest=48) if len(by_file) > 1 else "",
                    f"batch {batch}" if len(batches) > 1 else "",
                    f"{start + 1} to {min(start + _CURVES, len(entries))}" if len(entries) > _CURVES else "",
                )
                yield entries[start : start + _CURVES], ", ".join(filter(None, words))


def _overview(group: Group, slugs: set[str]) -> Iterator[BarsPlot]:
    """Yield the medians of all graphs of a batch size side by side."""
    for batch in sorted({entry.profile.batch for entry in group.entries}):
        entries = [entry for entry in group.entries if entry.profile.batch == batch]
        if len(entries) < 2:
            continue
        for start in range(0, len(entries), _ROWS):
            chosen = entries[start : start + _ROWS]
            names = tuple(_marked_label(entry) for entry in chosen)
            series: list[tuple[str, Role, tuple[Bar | None, ...]]] = []
            for name, role in (("compressed", "method"), ("plain model", "plain"), ("part of a request", "part")):
                bars = tuple(_median_bar(entry) if entry.role == role else None for entry in chosen)
                if any(bars):
                    series.append((name, cast("Role", role), bars))
            place = f", {start + 1} to {start + len(chosen)}" if len(entries) > _ROWS else ""
            yield BarsPlot(
                slug=slug("medians", slugs),
                title=f"Median of each graph, batch {batch}{place}",
                alt=f"Bars of the median time of a run in milliseconds, with 95 % intervals. {_describe(chosen)}",
                categories=names,
                series=tuple(series),
                axis="median of a run, ms",
                is_flat=True,
                is_stacked=True,
            )


def _median_bar(entry: Entry) -> Bar:
    one = entry.profile.percentiles["p50"]
    low, high = (None if us is None else us / 1000 for us in (one.low_us, one.high_us))
    return Bar(one.us / 1000, low, high)


def _tail(where: str) -> str:
    return f" ({where})" if where else ""


def _range(entries: Sequence[Entry]) -> tuple[float, float, bool]:
    """Return the ends of the axis in milliseconds: all but the far tails, which are counted in words."""
    low = min(entry.profile.min_us for entry in entries) / 1000
    ends = []
    for entry in entries:
        p99 = entry.profile.percentiles.get("p99") or entry.profile.percentiles["p50"]
        ends.append(min(entry.profile.max_us, 1.15 * max(p99.us, p99.high_us or 0)) / 1000)
    high = max(*ends, low)
    medians = [entry.profile.p50_us for entry in entries]
    is_log = min(medians) > 0 and low > 0 and max(medians) / min(medians) >= _WIDE
    if high <= low:
        low, high = low * 0.95, high * 1.05 or 1.0
    return low, high, is_log


def _quantiles(entry: Entry) -> tuple[Quantile, ...]:
    found = []
    for name in _MARKED:
        one = entry.profile.percentiles.get(name)
        if one is not None:
            low, high = (None if us is None else us / 1000 for us in (one.low_us, one.high_us))
            found.append(Quantile(name, float(name[1:]) / 100, one.us / 1000, low, high, one.is_indicative))
    return tuple(found)


def _curve(entry: Entry, high: float) -> Series:
    """Return the ECDF by so many of its steps that no eye sees the difference; the tail keeps each of its own."""
    samples = np.sort(np.asarray(entry.profile.samples_us, np.float64)) / 1000
    count = len(samples)
    body = np.linspace(0, count - 1, min(count, _CURVE_POINTS)).round().astype(int)
    places = np.unique(np.concatenate([body, np.arange(max(0, count - 24), count)]))
    return Series(
        label=_marked_label(entry),
        role=entry.role,
        xs=tuple(float(f"{ms:.6g}") for ms in samples[places]),
        ys=tuple(float(f"{share:.6g}") for share in (places + 1) / count),
        quantiles=_quantiles(entry),
        beyond=int((samples > high).sum()),
    )


def _histogram(entry: Entry, low: float, high: float, *, is_log: bool) -> Series:
    samples = np.asarray(entry.profile.samples_us, np.float64) / 1000
    edges = np.geomspace(low, high, _BINS + 1) if is_log else np.linspace(low, high, _BINS + 1)
    counts, _ = np.histogram(samples, edges)
    return Series(
        label=_marked_label(entry),
        role=entry.role,
        xs=tuple(float(f"{edge:.6g}") for edge in edges),
        ys=tuple(float(count) for count in counts),
        quantiles=_quantiles(entry),
        beyond=int((samples > high).sum()),
    )


def _marked_label(entry: Entry) -> str:
    return f"{entry.label} (unstable)" if entry.reasons else entry.label


def _describe(entries: Sequence[Entry]) -> str:
    """Return what a reader who does not see the plot has to know of it."""
    sentences = []
    for entry in entries:
        marks = [
            f"{one.name} {figure(one.ms)}{' (indicative)' if one.is_indicative else ''}" for one in _quantiles(entry)
        ]
        sentences.append(f"{_marked_label(entry)}: {', '.join(marks)} ms, {entry.profile.num_samples:,} samples.")
    return " ".join(sentences)
