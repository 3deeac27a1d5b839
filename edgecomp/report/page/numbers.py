"""Cells of numbers, with their intervals and with what stands against them."""

from __future__ import annotations

from collections.abc import Sequence

from edgecomp.profiles.latency import LatencyProfile, Percentile
from edgecomp.report.page.groups import Entry
from edgecomp.report.page.values import Cell

__all__ = ["INDICATIVE", "UNKNOWN", "figure", "milliseconds", "number", "percentile_cell", "ratio_cell", "word"]

INDICATIVE = "indicative"
UNKNOWN = Cell("unknown")
_NONE = Cell("\u2013")


def word(text: str, note: str = "") -> Cell:
    """Return a cell of text."""
    return Cell(text, note=note)


def number(value: float | None, digits: int = 0, *, unit: str = "", marks: Sequence[str] = ()) -> Cell:
    """Return a cell of a number; "unknown" where there is none."""
    if value is None:
        return UNKNOWN
    return Cell(f"{value:,.{digits}f}{unit}", float(value), marks=tuple(marks))


def figure(value: float) -> str:
    """Return a number with about four significant digits, never in powers of ten below a million."""
    size = abs(value)
    digits = 3 if size < 10 else 2 if size < 100 else 1 if size < 1000 else 0
    return f"{value:,.{digits}f}" if size < 1e9 else f"{value:.3e}"


def milliseconds(us: float | None, marks: Sequence[str] = ()) -> Cell:
    """Return a cell of a time, from microseconds."""
    return UNKNOWN if us is None else Cell(figure(us / 1000), us / 1000, marks=tuple(marks))


def percentile_cell(entry: Entry, name: str) -> Cell:
    """Return a percentile with its interval and marks."""
    one = entry.profile.percentiles.get(name)
    if one is None:
        return UNKNOWN
    marks = (*((INDICATIVE,) if one.is_indicative else ()), *entry.marks)
    return Cell(figure(one.us / 1000), one.us / 1000, interval_note(one), marks)


def interval_note(one: Percentile) -> str:
    """Return the interval of a percentile in words; an end that the samples do not bound is left open."""
    low, high = (None if us is None else figure(us / 1000) for us in (one.low_us, one.high_us))
    if low is None and high is None:
        return ""
    if low is None:
        return f"to {high}"
    return f"{low} to {high}" if high is not None else f"from {low}"


def ratio_of(profile: LatencyProfile, plain: LatencyProfile) -> tuple[float, float | None, float | None]:
    """Return the median over the plain model's, and the ends of a cautious interval: low over high, high over low."""
    one, other = profile.percentiles["p50"], plain.percentiles["p50"]
    if not other.us:
        return 0.0, None, None
    low = one.low_us / other.high_us if one.low_us is not None and other.high_us else None
    high = one.high_us / other.low_us if one.high_us is not None and other.low_us else None
    return one.us / other.us, low, high


def ratio_cell(entry: Entry) -> Cell:
    """Return the time over the plain model's of the same run; below 1 is faster."""
    if entry.role == "plain":
        return Cell("1", 1.0)
    if entry.plain is None or not entry.plain.p50_us:
        return _NONE
    ratio, low, high = ratio_of(entry.profile, entry.plain)
    marks = entry.marks or (("plain unstable",) if entry.plain.marks else ())
    note = f"{low:.3f} to {high:.3f}" if low is not None and high is not None else ""
    return Cell(f"{ratio:.3f}", ratio, note, marks)
