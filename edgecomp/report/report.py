"""`edgecomp report`: the value, and the text that is printed where nothing is written, or what was."""

from __future__ import annotations

import msgspec

from edgecomp.report.page.plain import render_text
from edgecomp.report.page.values import Page

__all__ = ["ReportOutcome", "describe_report"]


class ReportOutcome(msgspec.Struct, frozen=True):
    """A report.

    Attributes:
        files: names of the results that it is made of.
        left_out: JSON files of folders that are no results.
        page: what it says.
        written: the files, in the order of the options; plots by their names.
    """

    files: tuple[str, ...]
    left_out: tuple[str, ...]
    page: Page
    written: tuple[str, ...]


def describe_report(outcome: ReportOutcome) -> str:
    """Return the whole report where no file was asked for, else a line for each that was written."""
    if not outcome.written:
        return render_text(outcome.page)
    return "\n".join([*outcome.page.lead, *(f"written to {path}" for path in outcome.written)])
