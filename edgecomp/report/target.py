"""What `edgecomp target calibrate` fitted: the value, and the text that it prints."""

from __future__ import annotations

import math

import msgspec

from edgecomp.estimates.efficiency import Efficiency
from edgecomp.report.text import table

__all__ = ["CalibratedRow", "TargetReport", "describe_target"]


class CalibratedRow(msgspec.Struct, frozen=True):
    """A measured median beside what the published fit and the new one compute, in microseconds."""

    label: str
    measured_us: float
    before_us: float
    after_us: float


class TargetReport(msgspec.Struct, frozen=True):
    """The calibration of a target.

    Attributes:
        path: where it is kept; "" where it was removed.
        before, after: the published fit, and the new one; none where it was removed.
        error: as a logarithm; `error_of` says whether results were left out for it, or it is the published one.
        forced: results of another device, or of a runner that uses no GPU, were let in.
        cleared: there was a calibration, and it was removed.
    """

    target: str
    path: str
    rows: tuple[CalibratedRow, ...] = ()
    before: Efficiency | None = None
    after: Efficiency | None = None
    error: float = 0.0
    error_of: str = ""
    forced: bool = False
    cleared: bool = False
    notes: tuple[str, ...] = ()


def describe_target(report: TargetReport) -> str:
    """Return the text."""
    if report.before is None or report.after is None:
        was = "its calibration was removed" if report.cleared else "it had no calibration"
        return f"{report.target}: {was}; estimates compute with the published rows"
    rows: list[list[object]] = [
        [row.label, f"{row.measured_us / 1e3:.3f}", f"{row.before_us / 1e3:.3f}", f"{row.after_us / 1e3:.3f}"]
        for row in report.rows
    ]
    before, after = (msgspec.structs.asdict(one) for one in (report.before, report.after))
    numbers: list[list[object]] = [[name, f"{before[name]:.4g}", f"{after[name]:.4g}"] for name in after]
    factor = math.exp(report.error)
    error = (
        f"left out in turn, by graph and batch, the results were within a factor of {factor:.2f}"
        if report.error_of == "left out"
        else "fewer than three different graphs or batches: the error stays that of the published rows, a factor of "
        f"{factor:.2f}"
    )
    forced = "; results of another device, or of no GPU, are in it" if report.forced else ""
    return "\n".join(
        [
            f"{report.target}: fitted to {len(report.rows)} of your own measurements{forced}",
            "",
            table(["measured", "ms", "by published rows", "by this fit"], rows),
            "",
            table(["", "published rows", "this fit"], numbers),
            "",
            error,
            f"kept in {report.path}; estimates of {report.target} compute with it",
            *(f"note: {note}" for note in report.notes),
        ]
    )
