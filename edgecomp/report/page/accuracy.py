"""What compression costs: accuracy and agreement beside the plain model, the front of both against time, buckets."""

from __future__ import annotations

from collections.abc import Sequence

from edgecomp.evaluation import Estimate, GraphScore
from edgecomp.report.calibrate import CalibrationReport
from edgecomp.report.evaluate import EvaluationReport
from edgecomp.report.page.groups import machine_label, threads_label
from edgecomp.report.page.numbers import figure, number, word
from edgecomp.report.page.sources import Source
from edgecomp.report.page.values import Bar, BarsPlot, Cell, Column, Point, PointsPlot, Section, Table
from edgecomp.report.page.words import joined, shown, slug

__all__ = ["calibration_sections", "evaluation_sections", "mark_front"]

_NONE = Cell("\u2013")


def evaluation_sections(sources: Sequence[Source], slugs: set[str]) -> tuple[Section, ...]:
    """Return a section for each set of images, machine and runner that evaluations were made with."""
    groups: dict[tuple[object, ...], list[tuple[str, EvaluationReport]]] = {}
    for source in sources:
        if isinstance(source.value, EvaluationReport):
            one = source.value
            machine = (one.machine.cpu, one.machine.cores, one.machine.gpu)
            data = (one.data, one.found, one.evaluation.images, one.seed, one.evaluation.num_classes)
            key = (*data, *machine, one.version, one.threads, one.evaluation.batch, one.flops.get(one.plain, 0))
            groups.setdefault(key, []).append((source.name, one))
    return tuple(_evaluation(reports, slugs) for reports in groups.values())


def _evaluation(reports: Sequence[tuple[str, EvaluationReport]], slugs: set[str]) -> Section:
    _, first = reports[0]
    found, machine = first.evaluation, first.machine
    several = len(reports) > 1
    rows: list[tuple[Cell, ...]] = []
    points: list[Point] = []
    for file, report in reports:
        for score in report.evaluation.scores:
            label = _label(report, score, several=several)
            rows.append((word(label, shown(score.model, longest=48)), word(file), *_figures(report, score)))
            point = _point(report, score, label, over_plain=several)
            if point is not None and not (several and score.model == report.plain and points):
                points.append(point)
    columns = (
        Column("Graph"),
        Column("File"),
        *(
            Column(name, is_number=True)
            for name in ("Kept", "Top-1, %", "Drop, points", "Agreement, %", "ms/image", "Time over plain")
        ),
    )
    foot = (
        "Small figures are 95 % intervals: Wilson's for shares, paired for the drop, order statistics for times.",
        "Time over plain was measured in turns, in one run. Agreement: images to which both give the same class.",
    )
    notes = tuple(dict.fromkeys(f"Note: {shown(note)}" for _, report in reports for note in report.notes))
    failures = tuple(shown(line) for _, report in reports for line in report.failures)
    chosen = f"{found.images:,} of {first.found:,} images of {shown(first.data)}"
    lines = (
        f"On {chosen} ({shown(first.layout)}), {found.num_classes} classes, batch {found.batch}.",
        f"Machine: {machine_label(machine)}; run by {joined(first.version, threads_label(first.threads))}.",
        *(f"Gate failed: {line}." for line in failures),
        *notes,
    )
    plots: tuple[PointsPlot, ...] = ()
    if len(points) > 1:
        plots = (_front(tuple(mark_front(points)), over_plain=several, slugs=slugs),)
    else:
        lines += ("No plain model was evaluated, so agreement is not known: export with --with-plain.",)
    return Section(
        slug=slug("accuracy", slugs),
        title=f"Accuracy and agreement: {shown(first.data)}",
        lines=lines,
        tables=(Table("Each graph on the same images", columns, tuple(rows), foot),),
        plots=plots,
    )


def _front(points: tuple[Point, ...], *, over_plain: bool, slugs: set[str]) -> PointsPlot:
    axis = "time over the plain model's" if over_plain else "ms an image, median"
    front = [point for point in points if point.is_front]
    described = "; ".join(f"{p.label}: {figure(p.x)}, {p.y:.2f} %" for p in front)
    return PointsPlot(
        slug=slug("pareto", slugs),
        title="Pareto front: time against agreement with the plain model",
        alt=f"{len(points)} graphs by {axis} and agreement in percent. On the front, {len(front)}: {described}.",
        points=points,
        x_axis=axis,
        y_axis="agreement with the plain model, %",
    )


def mark_front(points: Sequence[Point]) -> list[Point]:
    """Return the points with those marked that no other beats: none is as fast and as good, and better in one."""
    marked = []
    for one in points:
        beaten = any(other.x <= one.x and other.y >= one.y and (other.x < one.x or other.y > one.y) for other in points)
        marked.append(
            Point(
                one.label,
                one.role,
                one.x,
                one.y,
                one.x_low,
                one.x_high,
                one.y_low,
                one.y_high,
                is_front=not beaten,
                is_estimate=one.is_estimate,
            )
        )
    return marked


def _label(report: EvaluationReport, score: GraphScore, *, several: bool) -> str:
    kept = report.kept.get(score.model)
    if score.model == report.plain:
        words = "plain"
    elif score.model == "routed":
        words = "routed" if kept is None else f"routed, {kept:.1f} kept"
    else:
        words = shown(score.model, longest=48) if kept is None else f"{kept:g} kept"
    return f"{shown(report.bundle, longest=48)}: {words}" if several else words


def _figures(report: EvaluationReport, score: GraphScore) -> tuple[Cell, ...]:
    compared = score.against_plain
    is_plain = score.model == report.plain
    return (
        number(report.kept.get(score.model), 0),
        _estimate(score.top1, 100, 2),
        _NONE if compared is None else _estimate(compared.drop, 100, 2),
        (Cell("100", 100.0) if is_plain else _NONE) if compared is None else _estimate(compared.agreement, 100, 2),
        _estimate(score.ms_per_image, 1, 3),
        (Cell("1", 1.0) if is_plain else _NONE)
        if compared is None
        else _estimate(compared.time_ratio, 1, 2, marks=() if compared.pace != "no difference" else ("no difference",)),
    )


def _estimate(one: Estimate, scale: float, digits: int, marks: tuple[str, ...] = ()) -> Cell:
    low, high = (f"{scale * value:,.{digits}f}" for value in (one.low, one.high))
    return Cell(f"{scale * one.value:,.{digits}f}", scale * one.value, f"{low} to {high}", marks)


def _point(report: EvaluationReport, score: GraphScore, label: str, *, over_plain: bool) -> Point | None:
    if score.model == report.plain:
        x = 1.0 if over_plain else score.ms_per_image.value
        return Point("plain", "plain", x, 100.0)
    compared = score.against_plain
    if compared is None:
        return None
    time, agreement = compared.time_ratio if over_plain else score.ms_per_image, compared.agreement
    return Point(
        label,
        "method",
        time.value,
        100 * agreement.value,
        time.low,
        time.high,
        100 * agreement.low,
        100 * agreement.high,
    )


def calibration_sections(sources: Sequence[Source], slugs: set[str]) -> tuple[Section, ...]:
    """Return a section for each calibration: how many images a router sends to each bucket, before and after."""
    return tuple(
        _calibration(source.name, source.value, slugs)
        for source in sources
        if isinstance(source.value, CalibrationReport)
    )


def _calibration(file: str, report: CalibrationReport, slugs: set[str]) -> Section:
    rows = tuple(
        (
            number(use.tokens),
            number(use.before),
            number(use.after),
            number(use.ms, 3),
            number(100 * use.agreement, 2),
        )
        for use in report.buckets
    )
    columns = tuple(
        Column(name, is_number=True) for name in ("Kept", "Images before", "Images after", "ms", "Agreement, %")
    )
    names = tuple(str(use.tokens) for use in report.buckets)
    before = tuple(Bar(float(use.before)) for use in report.buckets)
    after = tuple(Bar(float(use.after)) for use in report.buckets)
    counted = "; ".join(f"{use.tokens} kept: {use.before} before, {use.after} after" for use in report.buckets)
    made = report.router.calibration
    where = joined(report.runner, threads_label(report.threads), f"batch {report.batch}")
    lines = [f"{shown(report.bundle)}, router {shown(report.router.name)} ({file}); {where}."]
    if made is not None:
        lines.append(
            f"Set for {shown(made.target)} on {made.images:,} images of {shown(made.data)}: "
            f"{made.mean_tokens:.1f} tokens kept on average, {figure(report.mean_ms)} ms a request with the router."
        )
    lines += [f"Note: {shown(note)}" for note in report.notes]
    return Section(
        slug=slug("buckets", slugs),
        title=f"Buckets that the router picks: {shown(report.bundle)}",
        lines=tuple(lines),
        tables=(Table("Images in each bucket", columns, rows),),
        plots=(
            BarsPlot(
                slug=slug("buckets", slugs),
                title="Images that the router sends to each bucket",
                alt=f"Histogram of buckets. {counted}.",
                categories=names,
                series=(("before", "baseline", before), ("after", "method", after)),
                axis="images",
                names="tokens kept",
            ),
        ),
    )
