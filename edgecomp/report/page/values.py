"""What a report says, before it has a form: sections with tables and plots, all numbers already chosen.

Text, Markdown and HTML are made of the same `Page`, so that no form says more than another. Texts in it come from files
and are not trusted: `words.shown` has made every character visible, and each form escapes for itself.
"""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = [
    "Bar",
    "BarsPlot",
    "Cell",
    "Column",
    "EcdfPlot",
    "HistogramPlot",
    "Page",
    "Picture",
    "Plot",
    "Point",
    "PointsPlot",
    "Quantile",
    "Roof",
    "RooflinePlot",
    "Section",
    "Series",
    "Table",
]

Role = Literal["method", "plain", "baseline", "part"]


class Cell(msgspec.Struct, frozen=True):
    """One cell of a table.

    Attributes:
        text: what it shows.
        value: what it is sorted by, where that is a number.
        note: a smaller second line, for example an interval.
        marks: words against the number, for example "indicative" or "unstable"; they stand in the cell itself.
    """

    text: str
    value: float | None = None
    note: str = ""
    marks: tuple[str, ...] = ()


class Column(msgspec.Struct, frozen=True):
    """A column's head; numbers stand to the right."""

    name: str
    is_number: bool = False


class Table(msgspec.Struct, frozen=True):
    """A table with a caption that says what its rows are, and lines below it that say how to read it."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    foot: tuple[str, ...] = ()


class Quantile(msgspec.Struct, frozen=True):
    """A percentile as it is drawn: `share` from 0 to 1, milliseconds, the ends of its interval where it has them."""

    name: str
    share: float
    ms: float
    low_ms: float | None
    high_ms: float | None
    is_indicative: bool


class Series(msgspec.Struct, frozen=True):
    """The latency of one graph as it is drawn.

    Attributes:
        label: its name in the legend.
        role: decides the colour: the plain model is grey in every plot.
        xs, ys: the curve: milliseconds and shares of an ECDF, or the edges of bins and their counts.
        quantiles: marks upon it.
        beyond: samples right of the plot.
    """

    label: str
    role: Role
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    quantiles: tuple[Quantile, ...]
    beyond: int = 0


class EcdfPlot(msgspec.Struct, frozen=True, tag=True):
    """Which share of the runs took no longer than a time."""

    slug: str
    title: str
    alt: str
    series: tuple[Series, ...]
    low_ms: float
    high_ms: float
    is_log: bool


class HistogramPlot(msgspec.Struct, frozen=True, tag=True):
    """How often each time was seen, a graph a row."""

    slug: str
    title: str
    alt: str
    series: tuple[Series, ...]
    low_ms: float
    high_ms: float
    is_log: bool


class Bar(msgspec.Struct, frozen=True):
    """One bar: its height, the ends of its interval where it has one, and whether a mark stands against it."""

    value: float
    low: float | None = None
    high: float | None = None


class BarsPlot(msgspec.Struct, frozen=True, tag=True):
    """Bars by category, a series a colour.

    Attributes:
        categories: along the axis.
        series: label, role, and a bar (or none) for each category.
        axis: what the length of a bar is, with its unit.
        is_flat: bars lie, a category a row, for long names.
        is_stacked: each category has a bar of one series alone, so that all stand on one line.
        names: what the categories are.
    """

    slug: str
    title: str
    alt: str
    categories: tuple[str, ...]
    series: tuple[tuple[str, Role, tuple[Bar | None, ...]], ...]
    axis: str
    is_flat: bool = False
    is_stacked: bool = False
    names: str = ""


class Point(msgspec.Struct, frozen=True):
    """One point with the ends of its intervals where it has them.

    Attributes:
        label: written beside it, where it stands on the front or is a baseline.
        is_front: nothing is better in both ways.
        is_estimate: computed, not measured: drawn hollow.
    """

    label: str
    role: Role
    x: float
    y: float
    x_low: float | None = None
    x_high: float | None = None
    y_low: float | None = None
    y_high: float | None = None
    is_front: bool = False
    is_estimate: bool = False


class PointsPlot(msgspec.Struct, frozen=True, tag=True):
    """Points and the front of those that nothing beats in both ways: left and up is better.

    Attributes:
        limit: a bound on `x` that was asked for.
    """

    slug: str
    title: str
    alt: str
    points: tuple[Point, ...]
    x_axis: str
    y_axis: str
    limit: float | None = None


class Roof(msgspec.Struct, frozen=True):
    """What a device can reach: its peak in GFLOP/s and its bandwidth in GB/s."""

    label: str
    peak_gflops: float
    bandwidth_gb_s: float


class RooflinePlot(msgspec.Struct, frozen=True, tag=True):
    """Layers under the roof of a device; `x` is FLOP a byte, `y` GFLOP/s."""

    slug: str
    title: str
    alt: str
    roofs: tuple[Roof, ...]
    points: tuple[Point, ...]


Plot = EcdfPlot | HistogramPlot | BarsPlot | PointsPlot | RooflinePlot


class Picture(msgspec.Struct, frozen=True):
    """A picture that another room drew: an SVG document, and what it shows in words."""

    slug: str
    title: str
    alt: str
    svg: str


class Section(msgspec.Struct, frozen=True):
    """A heading with what stands below it; `parts` are one level deeper.

    Plots stand behind the first table, or before it where `plots_first`: where the table is long and says no more.
    """

    slug: str
    title: str
    lines: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    pictures: tuple[Picture, ...] = ()
    parts: tuple[Section, ...] = ()
    plots_first: bool = False


class Page(msgspec.Struct, frozen=True):
    """The whole report; `absent` says in a line each what the results do not hold and how to get it."""

    title: str
    lead: tuple[str, ...]
    sections: tuple[Section, ...]
    absent: tuple[str, ...] = ()

    @property
    def plots(self) -> tuple[Plot, ...]:
        """All plots in order."""
        return tuple(plot for section in self.sections for plot in _plots(section))


def _plots(section: Section) -> list[Plot]:
    return [*section.plots, *(plot for part in section.parts for plot in _plots(part))]
