"""The paper that plots are drawn on: scales, ticks, grid and legend, as few of matplotlib's artists as do.

matplotlib's own axes lay out and draw every tick as an object, which takes three quarters of a plot's time. A report of
twenty results has a hundred plots, so a plot here is placed by its own numbers: lines, boxes and text in parts of the
figure, and nothing else.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from edgecomp.report.page.colours import LIGHT

__all__ = ["Frame", "Key", "Room", "Scale", "cut", "key_rows", "nice_ticks", "open_frame", "text_width"]

Look = dict[str, Any]

_WIDTH = 5.2  # inches of 72 units: a page on paper or a phone shows it whole, with text that can be read
_LINE = 0.19  # inches of a legend's row
_LEGEND, _TICK, _LABEL = 9.0, 9.0, 9.5  # sizes of letters


class Key(NamedTuple):
    """An entry of the legend: what it looks like, and its name."""

    look: Look
    name: str


class Room(NamedTuple):
    """Inches: around the frame, and its height; and the rows of the legend below."""

    left: float
    height: float
    above: float = 0.12
    below: float = 0.46
    right: float = 0.16
    legend: tuple[tuple[Key, ...], ...] = ()


class Scale(NamedTuple):
    """An axis: what lies at its ends, its marks with their words, and what it is."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    label: str = ""
    is_log: bool = False
    has_grid: bool = True

    def part(self, value: float) -> float:
        """Return where a value lies, 0 to 1; what lies outside stands at the end."""
        low, high, at = self.low, self.high, min(max(value, self.low), self.high)
        if self.is_log:
            low, high, at = (math.log10(one) for one in (low, high, at))
        return (at - low) / (high - low)


class Frame:
    """A figure with a frame in it; everything is given in the values of the two scales."""

    def __init__(self, room: Room, x: Scale, y: Scale) -> None:
        from matplotlib.figure import Figure

        below = room.below + _LINE * len(room.legend) + (0.06 if room.legend else 0)
        self._height = room.above + room.height + below
        self.figure: Any = Figure(figsize=(_WIDTH, self._height))  # its own types name every setting
        self._x, self._y = x, y
        self._left, self._wide = room.left / _WIDTH, (_WIDTH - room.left - room.right) / _WIDTH
        self._foot, self._high = below / self._height, room.height / self._height

    @property
    def wide(self) -> float:
        """Inches from its left to its right."""
        return self._wide * _WIDTH

    def line(self, xs: Iterable[float], ys: Iterable[float], **look: Any) -> None:
        """Draw a line through points, or marks at them; NaN ends a line and begins another."""
        self._line([self._across(x) for x in xs], [self._up(y) for y in ys], **look)

    def boxes(self, boxes: Iterable[tuple[float, float, float, float]], **look: Any) -> None:
        """Draw boxes, each from left to right and from bottom to top, as one shape."""
        corners = [((a, c), (b, c), (b, d), (a, d)) for a, b, c, d in boxes]
        self.areas(corners, **look)

    def areas(self, outlines: Iterable[Sequence[tuple[float, float]]], **look: Any) -> None:
        """Fill outlines as one shape."""
        from matplotlib.patches import PathPatch
        from matplotlib.path import Path

        points: list[tuple[float, float]] = []
        codes: list[Any] = []
        for outline in outlines:
            points += [(self._across(x), self._up(y)) for x, y in outline] + [(0.0, 0.0)]
            codes += [Path.MOVETO, *[Path.LINETO] * (len(outline) - 1), Path.CLOSEPOLY]
        if points:
            self.figure.add_artist(PathPatch(Path(points, codes), **look))

    def write(self, x: float, y: float, words: str, *, right: float = 0.0, up: float = 0.0, **look: Any) -> None:
        """Write words beside a point, so many units of 1/72 inch right of it and above."""
        at = (self._across(x) + right / 72 / _WIDTH, self._up(y) + up / 72 / self._height)
        self.figure.text(*at, words, **({"fontsize": _TICK, "va": "center"} | look))

    def draw_scales(self, *, turned: bool = False, has_left: bool = True) -> None:
        """Draw both scales: grid, ticks, words and what they are."""
        grid: Look = {"color": LIGHT["grid"], "linewidth": 0.8, "zorder": 0}
        edge: Look = {"color": LIGHT["line"], "linewidth": 0.8}
        quiet: Look = {"color": LIGHT["quiet"], "fontsize": _TICK}
        right, top = self._left + self._wide, self._foot + self._high
        for scale, is_x in ((self._x, True), (self._y, False)):
            places = [self._across(at) if is_x else self._up(at) for at, _ in scale.ticks]
            ends = (self._foot, top) if is_x else (self._left, right)
            gap = math.nan
            along = [one for place in places for one in (place, place, gap)]
            over = [one for _ in places for one in (*ends, gap)]
            if scale.has_grid and along:
                self._line(*((along, over) if is_x else (over, along)), **grid)
            for place, (_, words) in zip(places, scale.ticks, strict=True):
                if is_x:
                    y, look = self._foot - 5 / 72 / self._height, {"ha": "right" if turned else "center", "va": "top"}
                    self.figure.text(place, y, words, rotation=35 if turned else 0, **look, **quiet)
                else:
                    x = self._left - 5 / 72 / _WIDTH
                    self.figure.text(x, place, words, ha="right", va="center", **quiet)
        self._line([self._left, right], [self._foot, self._foot], **edge)
        if has_left:
            self._line([self._left, self._left], [self._foot, top], **edge)
        if self._x.label:
            y = self._foot - (0.4 + (0.35 if turned else 0)) / self._height
            self.figure.text(self._left + self._wide / 2, y, self._x.label, ha="center", va="center", fontsize=_LABEL)
        if self._y.label:
            y = self._foot + self._high / 2
            self.figure.text(0.1 / _WIDTH, y, self._y.label, rotation=90, ha="center", va="center", fontsize=_LABEL)

    def draw_legend(self, rows: Sequence[Sequence[Key]]) -> None:
        """Write the legend's rows at the foot of the figure."""
        for place, row in enumerate(rows):
            x, y = 0.08, (_LINE * (len(rows) - 1 - place) + 0.11) / self._height
            for key in row:
                ends = [x, x + 0.24] if "marker" not in key.look else [x + 0.12]
                self._line([end / _WIDTH for end in ends], [y] * len(ends), **key.look)
                self.figure.text((x + 0.32) / _WIDTH, y, key.name, fontsize=_LEGEND, va="center_baseline")
                x += 0.46 + text_width(key.name, _LEGEND)

    def _line(self, xs: Sequence[float], ys: Sequence[float], **look: Any) -> None:
        from matplotlib.lines import Line2D

        self.figure.add_artist(Line2D(xs, ys, **look))

    def _across(self, x: float) -> float:
        return self._left + self._wide * self._x.part(x) if not math.isnan(x) else x

    def _up(self, y: float) -> float:
        return self._foot + self._high * self._y.part(y) if not math.isnan(y) else y


def open_frame(room: Room, x: Scale, y: Scale, *, turned: bool = False, has_left: bool = True) -> Frame:
    """Return a frame with its scales and its legend drawn."""
    frame = Frame(room, x, y)
    frame.draw_scales(turned=turned, has_left=has_left)
    frame.draw_legend(room.legend)
    return frame


def nice_ticks(low: float, high: float, *, most: int = 7, is_log: bool = False) -> tuple[tuple[float, str], ...]:
    """Return round values within the ends, as people write them."""
    if is_log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = (1, 2, 5) if high / low < 300 else (1,)
        found = [step * 10.0**decade for decade in decades for step in steps]
        found = [tick for tick in found if low <= tick <= high]
        return tuple((tick, f"{tick:,.10g}") for tick in found[:: max(1, math.ceil(len(found) / most))])
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(one * power for one in (1, 2, 2.5, 5, 10) if one * power >= rough * (1 - 1e-9))
    digits = max(0, -math.floor(math.log10(step)) + (1 if f"{step / power:g}" == "2.5" else 0))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple((place * step, f"{place * step:,.{digits}f}") for place in range(first, last + 1))


def key_rows(keys: Sequence[Key]) -> tuple[tuple[Key, ...], ...]:
    """Return keys in rows that fit."""
    rows: list[list[Key]] = []
    x = _WIDTH
    for key in keys:
        wide = 0.46 + text_width(key.name, _LEGEND)
        if x + wide > _WIDTH:
            rows.append([])
            x = 0.08
        rows[-1].append(key)
        x += wide
    return tuple(map(tuple, rows))


def text_width(text: str, size: float) -> float:
    """Return about how many inches a text takes; wide letters count twice."""
    wide = sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
    return 0.6 * size * wide / 72


def cut(text: str, longest: int) -> str:
    """Return a text that is no longer than so many letters."""
    return text if len(text) <= longest else f"{text[: longest - 1]}\u2026"
