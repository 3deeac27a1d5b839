"""Plots drawn with matplotlib: one figure at a time, without its global state, in the light colours.

Text stays text in the SVG, so that it can be searched and takes the page's font. A label from a file is never read as
mathematics.
"""

from __future__ import annotations

import io
import math
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from edgecomp.errors import MissingDependency
from edgecomp.report.page.colours import LIGHT, SERIES
from edgecomp.report.page.values import (
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

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["MARKER", "Pen", "open_pen", "require_matplotlib"]

MARKER = "edgecomp report"  # by which a picture of ours is known again

_WIDTH = 5.6  # inches of 72 units: a page on paper or a phone shows it whole, with text that can be read
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (2, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (1, 1)), (0, (8, 2)))
_LINE = 0.17  # inches of a legend's row
_NAME = 30  # letters of a lying bar's name
_SHORT = 6  # letters of a standing bar's name that need not be turned
_FADED = 0.55
_LIMIT: Any = {"color": LIGHT["warn"], "linewidth": 1.2, "linestyle": (0, (4, 2))}
_SHAPES = {"p50": "o", "p90": "s", "p99": "D"}
_POINTS = ("o", "s", "D", "^", "v", "P")
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "edgecomp",
    "text.parse_math": False,
    "axes.unicode_minus": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 8.5,
    "axes.edgecolor": LIGHT["line"],
    "axes.labelcolor": LIGHT["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": LIGHT["line"],
    "ytick.color": LIGHT["line"],
    "xtick.labelcolor": LIGHT["quiet"],
    "ytick.labelcolor": LIGHT["quiet"],
    "text.color": LIGHT["ink"],
    "figure.facecolor": "none",
    "axes.facecolor": "none",
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

        out = io.StringIO()
        FigureCanvasSVG(_figure(plot)).print_svg(out, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        return out.getvalue()

    def png(self, plot: Plot) -> bytes:
        """Return a plot as PNG on white."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        figure = _figure(plot)
        figure.set_facecolor(LIGHT["paper"])
        figure.set_dpi(160)
        out = io.BytesIO()
        FigureCanvasAgg(figure).print_png(out, metadata={"Software": MARKER})
        return out.getvalue()


@contextmanager
def open_pen(needed_for: str) -> Iterator[Pen]:
    """Give a pen; matplotlib's settings are ours meanwhile, whatever the user's are, and as they were afterwards."""
    require_matplotlib(needed_for)
    import matplotlib as mpl

    settings = {**mpl.rcParamsDefault, **_SETTINGS, "backend": mpl.rcParams["backend"]}
    with mpl.rc_context(settings), warnings.catch_warnings():
        # a letter that matplotlib's font lacks is measured as a box; the reader's own fonts show it
        warnings.simplefilter("ignore")
        yield Pen()


class _Room(NamedTuple):
    """Inches around the axes, their height, and the lines of the legend below."""

    left: float
    height: float
    above: float = 0.12
    below: float = 0.42
    right: float = 0.12
    legend: tuple[tuple[_Key, ...], ...] = ()


class _Key(NamedTuple):
    """An entry of the legend: what it looks like, and its name."""

    look: dict[str, Any]
    name: str


def _figure(plot: Plot) -> Figure:
    """Lay a plot out by its own numbers, which costs a third of what matplotlib's layout does, and draw it."""
    from matplotlib.figure import Figure

    ways: dict[type, tuple[Callable[[Any], _Room], Callable[[Axes, Any], None]]] = {
        EcdfPlot: (_ecdf_room, _draw_ecdf),
        HistogramPlot: (_histogram_room, _draw_histogram),
        BarsPlot: (_bars_room, _draw_bars),
        PointsPlot: (_points_room, _draw_points),
        RooflinePlot: (_roofline_room, _draw_roofline),
    }
    measure, draw = ways[type(plot)]
    room = measure(plot)
    below = room.below + _LINE * len(room.legend) + (0.06 if room.legend else 0)
    height = room.above + room.height + below
    figure = Figure(figsize=(_WIDTH, height))
    wide = _WIDTH - room.left - room.right
    axes = figure.add_axes((room.left / _WIDTH, below / height, wide / _WIDTH, room.height / height))
    draw(axes, plot)
    _draw_legend(figure, room.legend, height)
    return figure


def _draw_legend(figure: Figure, rows: Sequence[Sequence[_Key]], height: float) -> None:
    """Write the legend's rows at the foot of the figure."""
    from matplotlib.lines import Line2D

    for place, row in enumerate(rows):
        x, y = 0.08, (_LINE * (len(rows) - 1 - place) + 0.11) / height
        for key in row:
            ends = [x, x + 0.24] if "marker" not in key.look else [x + 0.12]
            figure.add_artist(Line2D([end / _WIDTH for end in ends], [y] * len(ends), **key.look))
            figure.text((x + 0.32) / _WIDTH, y, key.name, fontsize=8, va="center_baseline")
            x += 0.5 + _text_width(key.name, 8)


def _rows(keys: Sequence[_Key]) -> tuple[tuple[_Key, ...], ...]:
    """Return keys in rows that fit."""
    rows: list[list[_Key]] = []
    x = _WIDTH
    for key in keys:
        wide = 0.5 + _text_width(key.name, 8)
        if x + wide > _WIDTH:
            rows.append([])
            x = 0.08
        rows[-1].append(key)
        x += wide
    return tuple(map(tuple, rows))


def _text_width(text: str, size: float) -> float:
    """Return about how many inches a text takes; wide letters count twice."""
    wide = sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
    return 0.6 * size * wide / 72


def _mark_keys() -> list[_Key]:
    quiet = {"color": LIGHT["quiet"], "linestyle": "", "markersize": 4.6}
    keys = [_Key({**quiet, "marker": shape}, name) for name, shape in _SHAPES.items()]
    keys.append(_Key({**quiet, "marker": "o", "markerfacecolor": LIGHT["paper"]}, "hollow: indicative"))
    return [*keys, _Key({"color": LIGHT["quiet"], "linewidth": 3.2, "alpha": 0.45}, "95 % interval")]


def _colour(place: int, role: str) -> str:
    return LIGHT["plain"] if role == "plain" else LIGHT[SERIES[place % len(SERIES)]]


def _colours(roles: Sequence[str]) -> list[str]:
    """Return a colour for each role in order: grey for the plain model, the others in turn."""
    found, place = [], 0
    for role in roles:
        found.append(_colour(place, role))
        place += role != "plain"
    return found


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}\u2026"


def _time_axis(axes: Axes, low: float, high: float, *, is_log: bool) -> None:
    room = (high / low) ** 0.03 if is_log else (high - low) * 0.03
    if is_log:
        axes.set_xscale("log")
        axes.set_xlim(low / room, high * room)
        _plain_ticks(axes.xaxis, low, high)
    else:
        axes.set_xlim(low - room, high + room)
    axes.set_xlabel("time of a run, ms" + (" (logarithmic)" if is_log else ""))


def _plain_ticks(axis: Any, low: float, high: float) -> None:
    """Put numbers as people write them on a logarithmic axis."""
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < 300 else (1,)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    ticks = [tick for tick in ticks if low * 0.9 <= tick <= high * 1.1]
    thin = max(1, math.ceil(len(ticks) / 8))
    axis.set_major_locator(FixedLocator(ticks[::thin]))
    axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _ecdf_room(plot: EcdfPlot) -> _Room:
    colours = _colours([series.role for series in plot.series])
    keys = [
        _Key({"color": colour, "linewidth": 1.5, "linestyle": _DASHES[place % 6]}, _cut(series.label, 60))
        for place, (series, colour) in enumerate(zip(plot.series, colours, strict=True))
    ]
    return _Room(left=0.62, height=2.1, legend=(*((key,) for key in keys), *_rows(_mark_keys())))


def _draw_ecdf(axes: Axes, plot: EcdfPlot) -> None:
    colours = _colours([series.role for series in plot.series])
    for place, (series, colour) in enumerate(zip(plot.series, colours, strict=True)):
        xs, ys = _stairs(series, plot.low_ms, plot.high_ms)
        axes.plot(xs, ys, color=colour, linewidth=1.5, linestyle=_DASHES[place % len(_DASHES)])
        for one in series.quantiles:
            _mark(axes, one, one.share, colour)
    axes.set_ylim(-0.02, 1.03)
    axes.set_yticks([0, 0.5, 0.9, 1.0], ["0", "50 %", "90 %", "100 %"])
    _time_axis(axes, plot.low_ms, plot.high_ms, is_log=plot.is_log)


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


def _mark(axes: Axes, one: Quantile, y: float, colour: str) -> None:
    """Draw a percentile: hollow where it is indicative, with its interval as a bar."""
    low, high = (one.ms if end is None else end for end in (one.low_ms, one.high_ms))
    axes.plot([low, high], [y, y], color=colour, linewidth=3.2, alpha=0.45, solid_capstyle="butt")
    fill = LIGHT["paper"] if one.is_indicative else colour
    axes.plot([one.ms], [y], marker=_SHAPES[one.name], markersize=4.6, color=colour, markerfacecolor=fill, linestyle="")


def _histogram_room(plot: HistogramPlot) -> _Room:
    return _Room(left=0.12, height=0.62 * len(plot.series) + 0.12, above=0.05, legend=_rows(_mark_keys()))


def _draw_histogram(axes: Axes, plot: HistogramPlot) -> None:
    colours = _colours([series.role for series in plot.series])
    count = len(plot.series)
    for place, (series, colour) in enumerate(zip(plot.series, colours, strict=True)):
        base = float(count - 1 - place)
        most = max(series.ys) or 1.0
        heights = [base + 0.58 * value / most for value in series.ys]
        axes.stairs(heights, series.xs, baseline=base, fill=True, color=colour, alpha=0.38, linewidth=0)
        axes.stairs(heights, series.xs, baseline=base, color=colour, linewidth=1.0)
        for one in series.quantiles:
            if one.ms <= plot.high_ms:
                _mark(axes, one, base - 0.1, colour)
        beyond = f"  ({series.beyond:,} beyond)" if series.beyond else ""
        axes.annotate(
            _cut(series.label, 60) + beyond,
            (0, base + 0.62),
            xycoords=("axes fraction", "data"),
            fontsize=8,
            va="bottom",
        )
    axes.set_ylim(-0.28, count - 0.08)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    _time_axis(axes, plot.low_ms, plot.high_ms, is_log=plot.is_log)


def _bars_room(plot: BarsPlot) -> _Room:
    colours = _colours([role for _, role, _ in plot.series])
    looks = [
        {"color": colour, "marker": "s", "markersize": 6, "linestyle": "", "alpha": _FADED if role == "plain" else 1}
        for (_, role, _), colour in zip(plot.series, colours, strict=True)
    ]
    keys = [_Key(look, _cut(label, 60)) for look, (label, _, _) in zip(looks, plot.series, strict=True)]
    legend = _rows(keys) if len(keys) > 1 else ()
    if plot.is_flat:
        longest = max((_text_width(_cut(name, _NAME), 8.5) for name in plot.categories), default=0)
        thick = 0.1 + 0.19 * (1 if plot.is_stacked else len(plot.series))
        return _Room(left=0.12 + longest, height=0.15 + thick * len(plot.categories), legend=legend)
    turned = 0.35 if max((len(name) for name in plot.categories), default=0) > _SHORT else 0
    return _Room(left=0.7, height=1.9, below=0.45 + turned, legend=legend)


def _draw_bars(axes: Axes, plot: BarsPlot) -> None:
    colours = _colours([role for _, role, _ in plot.series])
    count, wide = len(plot.categories), 0.8 / (1 if plot.is_stacked else max(1, len(plot.series)))
    for place, ((_, role, bars), colour) in enumerate(zip(plot.series, colours, strict=True)):
        shift = 0.0 if plot.is_stacked else (place - (len(plot.series) - 1) / 2) * wide
        there = [(at + shift, bar) for at, bar in enumerate(bars) if bar is not None]
        where, values = [at for at, _ in there], [bar.value for _, bar in there]
        look: dict[str, Any] = {"color": colour, "linewidth": 0}
        look |= {"alpha": _FADED} if role == "plain" else {}
        if plot.is_flat:
            axes.barh(where, values, wide * 0.92, **look)
            for at, bar in there:
                axes.annotate(
                    f"{bar.value:,.4g}",
                    (max(bar.value, bar.high or 0, 0), at),
                    (3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7.5,
                )
        else:
            axes.bar(where, values, wide * 0.92, **look)
        for at, bar in there:
            if bar.low is not None and bar.high is not None:
                xs, ys = ([bar.low, bar.high], [at, at]) if plot.is_flat else ([at, at], [bar.low, bar.high])
                axes.plot(xs, ys, color=LIGHT["ink"], linewidth=0.9)
    if plot.is_flat:
        axes.set_yticks(range(count), [_cut(name, _NAME) for name in plot.categories])
        axes.set_ylim(count - 0.4, -0.6)
        axes.margins(x=0.12)
        axes.set_xlabel(plot.axis)
        axes.grid(visible=False, axis="y")
    else:
        thin = max(1, math.ceil(count / 26))
        names = [_cut(name, 12) if place % thin == 0 else "" for place, name in enumerate(plot.categories)]
        axes.set_xticks(range(count), names, rotation=45 if max(map(len, names), default=0) > _SHORT else 0)
        axes.set_ylabel(plot.axis)
        axes.set_xlabel(plot.names)
        axes.grid(visible=False, axis="x")


_KINDS = {"method": ("blue", "o"), "plain": ("plain", "s"), "baseline": ("orange", "^"), "part": ("teal", "v")}
_KIND_NAMES = {"method": "compressed", "plain": "plain model", "baseline": "baseline", "part": "part"}


def _point_look(one: Point) -> dict[str, Any]:
    name, shape = _KINDS[one.role]
    fill = LIGHT["paper"] if one.is_estimate else LIGHT[name]
    return {"marker": shape, "markersize": 6, "linestyle": "", "color": LIGHT[name], "markerfacecolor": fill}


def _points_room(plot: PointsPlot) -> _Room:
    looks = {_KIND_NAMES[p.role] + (", estimated" if p.is_estimate else ""): _point_look(p) for p in plot.points}
    keys = [_Key(look, name) for name, look in looks.items()]
    if sum(point.is_front for point in plot.points) > 1:
        keys.append(_Key({"color": LIGHT["green"], "linewidth": 1.4}, "front"))
    if plot.limit is not None:
        keys.append(_Key(_LIMIT, f"limit {plot.limit:g}"))
    return _Room(left=0.7, height=2.9, legend=_rows(keys))


def _draw_points(axes: Axes, plot: PointsPlot) -> None:
    front = sorted(((one.x, one.y) for one in plot.points if one.is_front), key=lambda xy: (xy[0], -xy[1]))
    if len(front) > 1:
        axes.step(*zip(*front, strict=True), where="post", color=LIGHT["green"], linewidth=1.4)
    for one in plot.points:
        _spread(axes, one, LIGHT[_KINDS[one.role][0]])
        axes.plot([one.x], [one.y], zorder=3, **_point_look(one))
    if plot.limit is not None:
        axes.axvline(plot.limit, **_LIMIT)
    axes.margins(x=0.14, y=0.12)
    axes.set_xlabel(plot.x_axis)
    axes.set_ylabel(plot.y_axis)
    _name_points(axes, [one for one in plot.points if one.is_front or one.role != "method"])


def _spread(axes: Axes, one: Point, colour: str) -> None:
    if one.x_low is not None and one.x_high is not None:
        axes.plot([one.x_low, one.x_high], [one.y, one.y], color=colour, linewidth=1, alpha=0.6)
    if one.y_low is not None and one.y_high is not None:
        axes.plot([one.x, one.x], [one.y_low, one.y_high], color=colour, linewidth=1, alpha=0.6)


def _name_points(axes: Axes, points: Sequence[Point]) -> None:
    """Write names beside points, most important first, and leave out those that would lie upon another."""
    width, height = 0.46, 0.05
    xs, ys = axes.get_xlim(), axes.get_ylim()
    taken: list[tuple[float, float]] = []
    for one in sorted(points, key=lambda point: (not point.is_front, point.x)):
        x = (one.x - xs[0]) / ((xs[1] - xs[0]) or 1)
        y = (one.y - ys[0]) / ((ys[1] - ys[0]) or 1)
        if any(abs(x - other[0]) < width * 0.5 and abs(y - other[1]) < height for other in taken):
            continue
        taken.append((x, y))
        left = x > 0.62
        axes.annotate(
            _cut(one.label, 34),
            (one.x, one.y),
            (-6 if left else 6, 3),
            textcoords="offset points",
            fontsize=7.5,
            ha="right" if left else "left",
            va="bottom",
        )


def _roofline_looks(plot: RooflinePlot) -> dict[str, dict[str, Any]]:
    kinds = list(dict.fromkeys(point.label for point in plot.points))
    looks: dict[str, dict[str, Any]] = {}
    for place, kind in enumerate(kinds):
        colour = LIGHT[SERIES[place % len(SERIES)]]
        fill = LIGHT["paper"] if all(point.is_estimate for point in plot.points if point.label == kind) else colour
        shape = _POINTS[place % len(_POINTS)]
        looks[kind] = {"marker": shape, "markersize": 4.5, "linestyle": "", "color": colour, "markerfacecolor": fill}
    return looks


def _roofline_room(plot: RooflinePlot) -> _Room:
    roofs = [
        _Key({"color": LIGHT["ink"], "linewidth": 1.4, "linestyle": _DASHES[place % 6]}, _cut(roof.label, 60))
        for place, roof in enumerate(plot.roofs)
    ]
    keys = [_Key(look, _cut(kind, 40)) for kind, look in _roofline_looks(plot).items()]
    return _Room(left=0.85, height=3.0, legend=(*((roof,) for roof in roofs), *_rows(keys)))


def _draw_roofline(axes: Axes, plot: RooflinePlot) -> None:
    ridges = [roof.peak_gflops / roof.bandwidth_gb_s for roof in plot.roofs]
    there = [point for point in plot.points if point.x > 0 and point.y > 0]
    xs = [*(point.x for point in there), *ridges]
    low, high = min(xs) / 2, max(xs) * 2
    heights = [roof.peak_gflops for roof in plot.roofs] + [point.y for point in there]
    for place, (roof, ridge) in enumerate(zip(plot.roofs, ridges, strict=True)):
        path = [low, ridge, high]
        ys = [min(roof.peak_gflops, x * roof.bandwidth_gb_s) for x in path]
        axes.plot(path, ys, color=LIGHT["ink"], linewidth=1.4, linestyle=_DASHES[place % 6])
        heights.append(ys[0])
    for kind, look in _roofline_looks(plot).items():
        chosen = [point for point in there if point.label == kind]
        axes.plot([point.x for point in chosen], [point.y for point in chosen], **look)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(min(heights) / 1.6, max(heights) * 1.6)
    _plain_ticks(axes.xaxis, low, high)
    _plain_ticks(axes.yaxis, *axes.get_ylim())
    axes.set_xlabel("FLOP a byte moved")
    axes.set_ylabel("GFLOP/s")
