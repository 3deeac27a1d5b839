"""What is installed: the value, and the text that `edgecomp doctor` prints."""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = ["DoctorReport", "Finding", "Status", "describe_doctor"]

Status = Literal["fine", "missing", "conflicting"]


class Finding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One thing that was looked at.

    Attributes:
        subject: what, for example "onnxruntime".
        status: `fine`; `missing`, which some verbs can do without; `conflicting`, which breaks something.
        detail: what was found, with versions.
        remedy: what to do, with the command; "" when fine.
    """

    subject: str
    status: Status
    detail: str
    remedy: str = ""


class DoctorReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All findings; true unless something conflicts."""

    findings: tuple[Finding, ...]

    def __bool__(self) -> bool:
        return all(finding.status != "conflicting" for finding in self.findings)


def describe_doctor(report: DoctorReport) -> str:
    """Return the text: a line for each finding, and below it what mends it."""
    width = max(len(finding.subject) for finding in report.findings)
    lines = []
    for finding in report.findings:
        lines.append(f"{finding.status:<12} {finding.subject:<{width}}  {finding.detail}")
        if finding.remedy:
            lines.append(f"{'':<12} {'':<{width}}  -> {finding.remedy}")
    return "\n".join(lines)
