"""`edgecomp doctor`."""

from __future__ import annotations

from edgecomp import api
from edgecomp.cli.talk import JSON, emit, finish, progress

__all__ = ["command"]


def command(json: JSON = False) -> None:
    """Say what is installed here, what is missing, and what conflicts; exit 1 when something conflicts."""
    with progress("doctor"):
        report = api.doctor()

    def text() -> str:
        from edgecomp.report.doctor import describe_doctor

        return describe_doctor(report)

    emit(report, as_json=json, text=text)
    finish(report)
