"""The page that results make: which sections there are, in which order, and what is not there."""

from __future__ import annotations

from edgecomp.profiles.comparison import Comparison
from edgecomp.profiles.result import Result
from edgecomp.report.methods import MethodsReport
from edgecomp.report.page.accuracy import calibration_sections, evaluation_sections
from edgecomp.report.page.compared import comparison_sections
from edgecomp.report.page.conditions import conditions_section
from edgecomp.report.page.estimated import estimate_sections
from edgecomp.report.page.groups import Group, group_results
from edgecomp.report.page.inside import (
    blocks_section,
    layers_section,
    memory_section,
    routing_section,
    stages_section,
)
from edgecomp.report.page.latency import findings, latency_section
from edgecomp.report.page.methods import methods_sections
from edgecomp.report.page.searches import search_sections
from edgecomp.report.page.sources import Sources
from edgecomp.report.page.values import Page, Picture, PointsPlot, RooflinePlot, Section
from edgecomp.report.page.words import shown, slug
from edgecomp.search.result import SearchResult

__all__ = ["compose_page"]

_INSIDE = {
    "Stages": stages_section,
    "Blocks": blocks_section,
    "Layers": layers_section,
    "Routing": routing_section,
    "Memory": memory_section,
}


def compose_page(sources: Sources, *, pictures: tuple[Picture, ...] = ()) -> Page:
    """Return the page.

    Args:
        sources: what was read.
        pictures: of patches, drawn from a bundle and an image.
    """
    slugs: set[str] = {"top", "main", *(picture.slug for picture in pictures)}
    groups = group_results(sources.files)
    sections = [_group_section(group, place, slugs, several=len(groups) > 1) for place, group in enumerate(groups, 1)]
    accuracy = evaluation_sections(sources.files, slugs)
    buckets = calibration_sections(sources.files, slugs)
    searches = search_sections(sources.files, slugs)
    comparisons = comparison_sections(sources.files, slugs)
    estimates = estimate_sections(sources.files, slugs)
    sections += [*comparisons, *methods_sections(sources.files, slugs), *searches, *accuracy, *buckets, *estimates]
    if pictures:
        sections.append(Section(slug("patches", slugs), "Patches", pictures=pictures))
    plots = [plot for one in (*comparisons, *searches, *accuracy, *estimates) for plot in one.plots]
    conditions = conditions_section(sources.files, slugs)
    if conditions is not None:
        sections.append(conditions)
    return Page(
        title="edgecomp report",
        lead=_lead(sources, groups),
        sections=tuple(sections),
        absent=_absent(
            sections,
            has_front=any(isinstance(plot, PointsPlot) for plot in plots),
            has_roofline=any(isinstance(plot, RooflinePlot) for plot in plots),
            has_buckets=bool(buckets),
        ),
    )


def _group_section(group: Group, place: int, slugs: set[str], *, several: bool) -> Section:
    name = slug(f"group {place}", slugs)
    parts = [latency_section(group, slugs)]
    for make in _INSIDE.values():
        part = make(group, slugs)
        if part is not None:
            parts.append(part)
    title = f"Group {place}: {group.title}" if several else group.title
    return Section(name, title, lines=group.lines, parts=tuple(parts))


def _lead(sources: Sources, groups: tuple[Group, ...]) -> tuple[str, ...]:
    results = [
        source.value
        for source in sources.files
        if isinstance(source.value, Result | SearchResult | Comparison | MethodsReport)
    ]
    count = len(sources.files)
    lines = [f"Made of {count} file{'s' if count != 1 else ''}: {_named([source.name for source in sources.files])}."]
    if results:
        times = sorted(result.created for result in results)
        lines.append(
            f"Measured {shown(times[0])}."
            if times[0] == times[-1]
            else f"Measured {shown(times[0])} to {shown(times[-1])}."
        )
    if len(groups) > 1:
        lines.append(
            f"Models, machines, runners or modes differ: {len(groups)} groups, each by itself; nothing is compared "
            "between them."
        )
    shaky = sum(bool(entry.reasons) for group in groups for entry in group.entries)
    if shaky:
        lines.append(f"{shaky} of {sum(len(group.entries) for group in groups)} measurements are unstable, and marked.")
    for place, group in enumerate(groups, 1):
        name = f"Group {place}, " if len(groups) > 1 else ""
        lines += [f"{name}{line[0].lower() if name else line[0]}{line[1:]}" for line in findings(group)]
    if sources.left_out:
        lines.append(f"Left out, being no results: {_named(sources.left_out)}.")
    return tuple(lines)


def _named(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _absent(sections: list[Section], *, has_front: bool, has_roofline: bool, has_buckets: bool) -> tuple[str, ...]:
    """Return a line for each kind of data that the results do not hold, with the way to get it."""
    there = {part.title for section in sections for part in section.parts}
    ways = {
        "Latency": "No latency: `edgecomp profile BUNDLE --out FILE.json`.",
        "Stages": "No stages: `edgecomp profile BUNDLE --stages --out FILE.json`.",
        "Encoder blocks": "No time by block: `edgecomp profile BUNDLE --per-layer --out FILE.json`, or --ablate.",
        "Memory": "No memory: profile a bundle of several budgets with `edgecomp profile BUNDLE --out FILE.json`.",
    }
    lines = [line for title, line in ways.items() if title not in there]
    if not has_front:
        lines.append(
            "No Pareto front of latency against agreement: a search's document, a comparison's, or `edgecomp evaluate "
            "BUNDLE --data DIR --json > FILE.json` of a bundle with its plain model."
        )
    if not has_roofline:
        lines.append("No roofline: `edgecomp estimate BUNDLE --target NAME --per-op --json > FILE.json`.")
    if not has_buckets:
        lines.append(
            "No histogram of buckets: `edgecomp calibrate BUNDLE --data DIR --json > FILE.json` of a bundle with a "
            "router."
        )
    return tuple(lines)
