"""What `edgecomp verify` found: the value, and the text that it prints."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from edgecomp.report.text import table

__all__ = ["Stage", "StageVerdict", "VerifyReport", "describe_verify"]

StageVerdict = Literal["pass", "fail", "not applicable", "not reached"]


class Stage(msgspec.Struct, frozen=True):
    """One stage.

    Attributes:
        reason: what was seen, or why it failed or does not apply; never empty.
        seconds: what it took, when it ran.
        resumed: it passed earlier with the same bundle, versions, machine and options, and was not repeated.
        result: the report of the verb behind it, as `--json` of that verb gives it; null where there is none.
    """

    name: str
    verdict: StageVerdict
    reason: str
    seconds: float
    resumed: bool = False
    result: Any = None


class VerifyReport(msgspec.Struct, frozen=True):
    """All stages; false where one failed.

    Attributes:
        digest: of the bundle; "" where it could not be opened.
        target: the target's name; "" where none applies.
        seconds: of this run, from its start to its end.
        notes: what a reader of the verdict must know.
    """

    schema: int
    bundle: str
    digest: str
    target: str
    runner: str
    verdict: Literal["pass", "fail"]
    stages: tuple[Stage, ...]
    seconds: float
    machine: str
    notes: tuple[str, ...]

    def __bool__(self) -> bool:
        return self.verdict == "pass"


def describe_verify(report: VerifyReport) -> str:
    """Return the text: each stage with its verdict, where the time went, and why."""
    spent = sum(stage.seconds for stage in report.stages if not stage.resumed)
    rows = [
        [
            stage.name,
            stage.verdict.upper() if stage.verdict == "fail" else stage.verdict,
            "earlier" if stage.resumed else f"{stage.seconds:.2f}",
            "" if stage.resumed or spent == 0 else f"{100 * stage.seconds / spent:.0f} %",
        ]
        for stage in report.stages
    ]
    return "\n".join(
        [
            (
                f"{report.bundle}: digest {report.digest[:12] or 'unknown'}, target {report.target or 'none'}, runner "
                f"{report.runner}"
            ),
            f"on {report.machine}",
            "",
            table(["stage", "verdict", "seconds", "share"], rows),
            "",
            *(f"{stage.name}: {stage.reason}" for stage in report.stages),
            *(f"note: {note}" for note in report.notes),
            f"verdict: {'pass' if report else 'FAIL'} ({report.seconds:.2f} s)",
        ]
    )
