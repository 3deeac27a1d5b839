"""Plots drawn with matplotlib: one figure at a time, without its global state, in the light colours.

Text stays text in the SVG, so that it can be searched and takes the page's font. A label from a file is never read as
mathematics.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from edgecomp.errors import MissingDependency
from edgecomp.report.page.colours import LIGHT, SERIES
from edgecomp.report.page.frame import Frame, Key, Room, Scale, cut, key_rows, nice_ticks, open_frame, text_width
from edgecomp.report.page.numbers import figure
from edgecomp.report.page.values import (
    Bar,
    BarsPlot,
    EcdfPlot,
    HistogramPlot,
    Plot,
    Point,
    PointsPlot,
    Quantile,
    RooflinePlot,
    Series,
)

__all__ = ["MARKER", "Pen", "open_pen", "require_matplotlib"]

MARKER = "edgecomp report"  # by which a picture of ours is known again

_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (2, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (1, 1)), (0, (8, 2)))
_NAME = 28  # letters of a lying bar's name
_SHORT = 6  # letters of a standing bar's name that need not be turned
_LEGEND = 54  # letters of a name in a legend
_FADED = 0.55
_LIMIT: dict[str, Any] = {"color": LIGHT["warn"], "linewidth": 1.2, "linestyle": (0, (4, 2))}
_INTERVAL: dict[str, Any] = {"linewidth": 3.2, "alpha": 0.45, "solid_capstyle": "butt"}
_SHAPES = {"p50": "o", "p90": "s", "p99": "D"}
_POINTS = ("o", "s", "D", "^", "v", "P")
_KINDS = {"method": ("blue", "o"), "plain": ("plain", "s"), "baseline": ("orange", "^"), "part": ("teal", "v")}
_KIND_NAMES = {"method": "compressed", "plain": "plain model", "baseline": "baseline", "part": "part"}
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "edgecomp",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "text.color": LIGHT["ink"],
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}


def require_matplotlib(needed_for: str) -> None:
    """Refuse early where there is no matplotlib.

    Raises:
        MissingDependency: naming the extra that brings it.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingDependency("matplotlib", needed_for=needed_for, extra="report") from error


class Pen:
    """Draws one figure after another; `open_pen` gives one."""

    def svg(self, plot: Plot) -> str:
        """Return a plot as matplotlib's SVG, in the light colours; the same plot gives the same text."""
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        out, nothing = io.StringIO(), dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(_drawn(plot).figure).print_svg(out, metadata=nothing)
        return out.getvalue()

    def png(self, plot: Plot) -> bytes:
        """Return a plot as PNG on white."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        drawn = _drawn(plot).figure
        drawn.set_facecolor(LIGHT["paper"])
        drawn.set_dpi(160)
        out = io.BytesIO()
        FigureCanvasAgg(drawn).print_png(out, metadata={"Software": MARKER})
        return out.getvalue()


@contextmanager
def open_pen(needed_for: str) -> Iterator[Pen]:
    """Give a pen; matplotlib's settings are ours meanwhile, whatever the user's are, and as they were afterwards."""
    require_matplotlib(needed_for)
    import matplotlib as mpl

    settings = {**mpl.rcParamsDefault, **_SETTINGS, "backend": mpl.rcParams["backend"]}
    with mpl.rc_context(settings), warnings.catch_warnings():
        # a letter that matplotlib's font lacks is measured as a box; the reader's own fonts show it
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield Pen()


def _drawn(plot: Plot) -> Frame:
    if isinstance(plot, EcdfPlot):
        return _draw_ecdf(plot)
    if isinstance(plot, HistogramPlot):
        return _draw_histogram(plot)
    if isinstance(plot, BarsPlot):
        return _draw_lying_bars(plot) if plot.is_flat else _draw_standing_bars(plot)
    return _draw_points(plot) if isinstance(plot, PointsPlot) else _draw_roofline(plot)


def _colours(roles: Sequence[str]) -> list[str]:
    """Return a colour for each role in order: grey for the plain model, the others in turn."""
    found, place = [], 0
    for role in roles:
        found.append(LIGHT["plain"] if role == "plain" else LIGHT[SERIES[place % len(SERIES)]])
        place += role != "plain"
    return found


# -- distributions --------------------------------------------------------------------------------------------


def _time_scale(plot: EcdfPlot | HistogramPlot) -> Scale:
    low, high = plot.low_ms, plot.high_ms
    room = (high / low) ** 0.03 if plot.is_log else (high - low) * 0.03
    ends = (low / room, high * room) if plot.is_log else (low - room, high + room)
    label = "time of a run, ms" + (" (logarithmic)" if plot.is_log else "")
    return Scale(*ends, nice_ticks(*ends, is_log=plot.is_log), label, is_log=plot.is_log)


def _mark_keys() -> list[Key]:
    quiet = {"color": LIGHT["quiet"], "linestyle": "", "markersize": 4.6}
    keys = [Key({**quiet, "marker": shape}, name) for name, shape in _SHAPES.items()]
    keys.append(Key({**quiet, "marker": "o", "markerfacecolor": LIGHT["paper"]}, "hollow: indicative"))
    return [*keys, Key({"color": LIGHT["quiet"], **_INTERVAL}, "95 % interval")]


def _mark(frame: Frame, quantiles: Sequence[Quantile], ys: Sequence[float], colour: str) -> None:
    """Draw percentiles: hollow where they are indicative, with their intervals as bars."""
    bars = [
        (one.ms if one.low_ms is None else one.low_ms, one.ms if one.high_ms is None else one.high_ms, math.nan)
        for one in quantiles
    ]
    frame.line([x for bar in bars for x in bar], [one for y in ys for one in (y, y, y)], color=colour, **_INTERVAL)
    for one, y in zip(quantiles, ys, strict=True):
        fill = LIGHT["paper"] if one.is_indicative else colour
        look = {"marker": _SHAPES[one.name], "markersize": 4.6, "markerfacecolor": fill, "linestyle": ""}
        frame.line([one.ms], [y], color=colour, **look)


def _draw_ecdf(plot: EcdfPlot) -> Frame:
    colours = _colours([series.role for series in plot.series])
    looks = [
        {"color": colour, "linewidth": 1.5, "linestyle": _DASHES[place % len(_DASHES)]}
        for place, colour in enumerate(colours)
    ]
    keys = [(Key(look, cut(series.label, _LEGEND)),) for look, series in zip(looks, plot.series, strict=True)]
    room = Room(left=0.7, height=2.1, legend=(*keys, *key_rows(_mark_keys())))
    ticks = ((0.0, "0"), (0.5, "50 %"), (0.9, "90 %"), (1.0, "100 %"))
    frame = open_frame(room, _time_scale(plot), Scale(-0.02, 1.03, ticks))
    for series, colour, look in zip(plot.series, colours, looks, strict=True):
        frame.line(*_stairs(series, plot.low_ms, plot.high_ms), **look)
        there = [one for one in series.quantiles if one.ms <= plot.high_ms]
        _mark(frame, there, [one.share for one in there], colour)
    return frame


def _stairs(series: Series, low: float, high: float) -> tuple[list[float], list[float]]:
    """Return the corners of an ECDF within the plot."""
    xs, ys, before = [low], [0.0], 0.0
    for x, y in zip(series.xs, series.ys, strict=True):
        if x > high:
            break
        xs += [x, x]
        ys += [before, y]
        before = y
    return [*xs, high], [*ys, before]


def _draw_histogram(plot: HistogramPlot) -> Frame:
    colours = _colours([series.role for series in plot.series])
    count = len(plot.series)
    room = Room(left=0.16, height=0.66 * count + 0.05, above=0.05, legend=key_rows(_mark_keys()))
    frame = open_frame(room, _time_scale(plot), Scale(-0.28, count - 0.05, ()), has_left=False)
    for place, (series, colour) in enumerate(zip(plot.series, colours, strict=True)):
        base = float(count - 1 - place)
        outline, most = [(series.xs[0], base)], max(series.ys) or 1.0
        for left, right, value in zip(series.xs, series.xs[1:], series.ys, strict=False):
            outline += [(left, base + 0.58 * value / most), (right, base + 0.58 * value / most)]
        outline.append((series.xs[-1], base))
        frame.areas([outline], facecolor=colour, alpha=0.38, linewidth=0)
        frame.line(*zip(*outline, strict=True), color=colour, linewidth=1.0)
        there = [one for one in series.quantiles if one.ms <= plot.high_ms]
        _mark(frame, there, [base - 0.1] * len(there), colour)
        beyond = f"  ({series.beyond:,} beyond)" if series.beyond else ""
        frame.write(plot.low_ms, base + 0.62, cut(series.label, _LEGEND) + beyond, right=-4, va="bottom")
    return frame


# -- bars -----------------------------------------------------------------------------------------------------


def _bar_looks(plot: BarsPlot) -> list[dict[str, Any]]:
    colours = _colours([role for _, role, _ in plot.series])
    return [
        {"facecolor": colour, "linewidth": 0, "alpha": _FADED if role == "plain" else 1}
        for (_, role, _), colour in zip(plot.series, colours, strict=True)
    ]


def _bar_legend(plot: BarsPlot) -> tuple[tuple[Key, ...], ...]:
    square = {"marker": "s", "markersize": 6, "linestyle": ""}
    keys = [
        Key({**square, "color": look["facecolor"], "alpha": look["alpha"]}, cut(label, _LEGEND))
        for look, (label, _, _) in zip(_bar_looks(plot), plot.series, strict=True)
    ]
    return key_rows(keys) if len(keys) > 1 else ()


def _bar_ends(plot: BarsPlot, room: float) -> tuple[float, float]:
    """Return the ends of the axis: 0, and all bars with their intervals."""
    values = [0.0]
    for _, _, bars in plot.series:
        for bar in bars:
            values += [] if bar is None else [bar.value, *(end for end in (bar.low, bar.high) if end is not None)]
    low, high = min(values), max(values)
    return low * (1 + room), high * (1 + room) if high > low else 1.0


def _placed(plot: BarsPlot, place: int) -> tuple[list[tuple[float, Bar]], float]:
    """Return the bars of a series with the middle of each, and half of a bar's width."""
    wide = 0.8 / (1 if plot.is_stacked else len(plot.series))
    shift = 0.0 if plot.is_stacked else (place - (len(plot.series) - 1) / 2) * wide
    return [(at + shift, bar) for at, bar in enumerate(plot.series[place][2]) if bar is not None], 0.46 * wide


def _intervals(there: Sequence[tuple[float, Bar]]) -> tuple[list[float], list[float]]:
    """Return the intervals as places and values, with gaps between."""
    at, values = [], []
    for place, bar in there:
        if bar.low is not None and bar.high is not None:
            at += [place, place, math.nan]
            values += [bar.low, bar.high, math.nan]
    return at, values


def _draw_lying_bars(plot: BarsPlot) -> Frame:
    names = [_squeezed(name) for name in plot.categories]
    count, low_high = len(names), _bar_ends(plot, 0.16)
    left = 0.16 + max((text_width(name, 9) for name in names), default=0)
    thick = 0.11 + 0.2 * (1 if plot.is_stacked else len(plot.series))
    room = Room(left=left, height=0.15 + thick * count, legend=_bar_legend(plot))
    most = 7 if left < 2 else 4
    x = Scale(*low_high, nice_ticks(*low_high, most=most), plot.axis)
    ticks = tuple((float(count - 1 - place), name) for place, name in enumerate(names))
    frame = open_frame(room, x, Scale(-0.6, count - 0.4, ticks, has_grid=False))
    for place, look in enumerate(_bar_looks(plot)):
        there, half = _placed(plot, place)
        there = [(count - 1 - at, bar) for at, bar in there]
        frame.boxes([(min(0.0, bar.value), max(0.0, bar.value), at - half, at + half) for at, bar in there], **look)
        at, values = _intervals(there)
        if at:
            frame.line(values, at, color=LIGHT["ink"], linewidth=0.9)
        for up, bar in there:
            frame.write(max(bar.value, bar.high or 0, 0), up, figure(bar.value), right=3, fontsize=8.5)
    return frame


def _draw_standing_bars(plot: BarsPlot) -> Frame:
    count, low_high = len(plot.categories), _bar_ends(plot, 0.05)
    thin = max(1, math.ceil(count / 26))
    ticks = tuple((float(at), cut(name, 12)) for at, name in enumerate(plot.categories) if at % thin == 0)
    turned = max((len(name) for _, name in ticks), default=0) > _SHORT
    room = Room(left=0.74, height=1.9, below=0.5 + (0.35 if turned else 0), legend=_bar_legend(plot))
    x = Scale(-0.6, count - 0.4, ticks, plot.names, has_grid=False)
    frame = open_frame(room, x, Scale(*low_high, nice_ticks(*low_high, most=5), plot.axis), turned=turned)
    for place, look in enumerate(_bar_looks(plot)):
        there, half = _placed(plot, place)
        frame.boxes([(at - half, at + half, min(0.0, bar.value), max(0.0, bar.value)) for at, bar in there], **look)
        at, values = _intervals(there)
        if at:
            frame.line(at, values, color=LIGHT["ink"], linewidth=0.9)
    return frame


def _squeezed(text: str) -> str:
    """Return a text without its middle where it is long: both ends tell graphs apart."""
    return text if len(text) <= _NAME else f"{text[: _NAME // 2 - 1]}\u2026{text[-_NAME // 2 :]}"


# -- points ---------------------------------------------------------------------------------------------------


def _point_look(one: Point) -> dict[str, Any]:
    name, shape = _KINDS[one.role]
    fill = LIGHT["paper"] if one.is_estimate else LIGHT[name]
    return {"marker": shape, "markersize": 6, "linestyle": "", "color": LIGHT[name], "markerfacecolor": fill}


def _ends(values: Sequence[float | None], room: float) -> tuple[float, float]:
    there = [value for value in values if value is not None]
    low, high = min(there), max(there)
    spare = (high - low) * room or abs(high) * room or 1.0
    return low - spare, high + spare


def _draw_points(plot: PointsPlot) -> Frame:
    looks = {_KIND_NAMES[p.role] + (", estimated" if p.is_estimate else ""): _point_look(p) for p in plot.points}
    keys = [Key(look, name) for name, look in looks.items()]
    front = sorted(((one.x, one.y) for one in plot.points if one.is_front), key=lambda xy: (xy[0], -xy[1]))
    line: dict[str, Any] = {"color": LIGHT["green"], "linewidth": 1.4}
    keys += [Key(line, "front")] if len(front) > 1 else []
    keys += [Key(_LIMIT, f"limit {plot.limit:g}")] if plot.limit is not None else []
    x_ends = _ends([v for p in plot.points for v in (p.x, p.x_low, p.x_high)] + [plot.limit], 0.1)
    y_ends = _ends([v for p in plot.points for v in (p.y, p.y_low, p.y_high)], 0.1)
    ticks = nice_ticks(*y_ends, most=6)
    room = Room(left=0.34 + max(text_width(words, 9) for _, words in ticks), height=2.9, legend=key_rows(keys))
    x, y = Scale(*x_ends, nice_ticks(*x_ends), plot.x_axis), Scale(*y_ends, ticks, plot.y_axis)
    frame = open_frame(room, x, y)
    if len(front) > 1:
        corners = [front[0]]
        for x_at, y_at in front[1:]:
            corners += [(x_at, corners[-1][1]), (x_at, y_at)]
        frame.line(*zip(*corners, strict=True), **line)
    for one in plot.points:
        faint: dict[str, Any] = {"color": LIGHT[_KINDS[one.role][0]], "linewidth": 1, "alpha": 0.6}
        if one.x_low is not None and one.x_high is not None:
            frame.line([one.x_low, one.x_high], [one.y, one.y], **faint)
        if one.y_low is not None and one.y_high is not None:
            frame.line([one.x, one.x], [one.y_low, one.y_high], **faint)
        frame.line([one.x], [one.y], zorder=3, **_point_look(one))
    if plot.limit is not None:
        frame.line([plot.limit, plot.limit], y_ends, **_LIMIT)
    _name_points(frame, [one for one in plot.points if one.is_front or one.role != "method"], x, y)
    return frame


def _name_points(frame: Frame, points: Sequence[Point], x: Scale, y: Scale) -> None:
    """Write names beside points, those of the front first, and leave out those that would lie upon another.

    The front comes to a point from below and leaves it to the right, so that its name stands to the left where there
    is room.
    """
    taken: list[tuple[float, float]] = []
    for one in sorted(points, key=lambda point: (not point.is_front, point.x)):
        at = (x.part(one.x), y.part(one.y))
        if any(abs(at[0] - other[0]) < 0.3 and abs(at[1] - other[1]) < 0.06 for other in taken):
            continue
        taken.append(at)
        is_right = at[0] > (text_width(one.label, 8.5) / frame.wide if one.is_front else 0.55)
        frame.write(
            one.x,
            one.y,
            cut(one.label, 34),
            right=-6 if is_right else 6,
            up=4,
            ha="right" if is_right else "left",
            va="bottom",
            fontsize=8.5,
        )


def _draw_roofline(plot: RooflinePlot) -> Frame:
    kinds = list(dict.fromkeys(point.label for point in plot.points))
    there = [point for point in plot.points if point.x > 0 and point.y > 0]
    ridges = [roof.peak_gflops / roof.bandwidth_gb_s for roof in plot.roofs]
    xs = [*(point.x for point in there), *ridges]
    x_ends = (min(xs) / 2, max(xs) * 2)
    walls = [min(roof.peak_gflops, x_ends[0] * roof.bandwidth_gb_s) for roof in plot.roofs]
    ys = [*(roof.peak_gflops for roof in plot.roofs), *(point.y for point in there), *walls]
    y_ends = (min(ys) / 1.6, max(ys) * 1.6)
    looks: dict[str, dict[str, Any]] = {}
    for place, kind in enumerate(kinds):
        colour = LIGHT[SERIES[place % len(SERIES)]]
        fill = LIGHT["paper"] if all(point.is_estimate for point in plot.points if point.label == kind) else colour
        shape = {"marker": _POINTS[place % len(_POINTS)], "markersize": 4.5, "linestyle": ""}
        looks[kind] = {**shape, "color": colour, "markerfacecolor": fill}
    lines: list[dict[str, Any]] = [
        {"color": LIGHT["ink"], "linewidth": 1.4, "linestyle": _DASHES[place % len(_DASHES)]}
        for place in range(len(plot.roofs))
    ]
    roofs = [(Key(line, cut(roof.label, _LEGEND)),) for line, roof in zip(lines, plot.roofs, strict=True)]
    rows = key_rows([Key(look, cut(kind, 40)) for kind, look in looks.items()])
    ticks = nice_ticks(*y_ends, is_log=True)
    x = Scale(*x_ends, nice_ticks(*x_ends, is_log=True), "FLOP a byte moved (logarithmic)", is_log=True)
    y = Scale(*y_ends, ticks, "GFLOP/s (logarithmic)", is_log=True)
    left = 0.34 + max((text_width(words, 9) for _, words in ticks), default=0.3)
    frame = open_frame(Room(left=left, height=3.0, legend=(*roofs, *rows)), x, y)
    for roof, ridge, wall, line in zip(plot.roofs, ridges, walls, lines, strict=True):
        frame.line([x_ends[0], ridge, x_ends[1]], [wall, roof.peak_gflops, roof.peak_gflops], **line)
    for kind, look in looks.items():
        chosen = [point for point in there if point.label == kind]
        frame.line([point.x for point in chosen], [point.y for point in chosen], **look)
    return frame
