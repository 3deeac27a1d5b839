"""What is installed: the value, and the text that `edgecomp doctor` prints."""

from __future__ import annotations

from typing import Literal

import msgspec

from edgecomp.profiles.state import DeviceState, GpuState

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
    """All findings; true unless something conflicts.

    Attributes:
        findings: one for each thing that was looked at.
        state: what can be read of the device while something is measured, and what cannot; None where nobody looked.
    """

    findings: tuple[Finding, ...]
    state: DeviceState | None = None

    def __bool__(self) -> bool:
        return all(finding.status != "conflicting" for finding in self.findings)


def describe_doctor(report: DoctorReport) -> str:
    """Return the text: a line for each finding, below it what mends it, and at the end what a measurement can read."""
    width = max(len(finding.subject) for finding in report.findings)
    lines = []
    for finding in report.findings:
        lines.append(f"{finding.status:<12} {finding.subject:<{width}}  {finding.detail}")
        if finding.remedy:
            lines.append(f"{'':<12} {'':<{width}}  -> {finding.remedy}")
    if report.state is not None:
        lines += ["", "What a result can say of this device while it was measured:"]
        lines += [f"  {subject:<13}{text}" for subject, text in _readable(report.state)]
        lines += [f"  {'unreadable':<13}{reason}" for reason in report.state.unreadable]
    return "\n".join(lines)


def _readable(state: DeviceState) -> list[tuple[str, str]]:
    """Return what can be read, by subject, with its value now."""
    rows = []
    clocks = [core.now_mhz for core in state.cores if core.now_mhz is not None]
    if clocks:
        rows.append(
            (
                "cpu clocks",
                f"{len(clocks)} cores, {min(clocks):.0f} to {max(clocks):.0f} MHz, governor {state.governor}",
            )
        )
    if state.temperatures_c:
        zone = max(state.temperatures_c, key=lambda name: state.temperatures_c[name])
        rows.append(
            ("temperatures", f"{len(state.temperatures_c)}, the highest {zone} {state.temperatures_c[zone]:.1f} C")
        )
    if state.gpu is not None:
        rows.append(("gpu", f"{state.gpu.name}, by {state.gpu.source}: {_words(state.gpu)}"))
    if state.jetson is not None:
        jetson = state.jetson
        rows.append(("power mode", f"{jetson.power_mode}, jetson_clocks {jetson.jetson_clocks}"))
        if jetson.rails_mw:
            rows.append(("rails", ", ".join(f"{name} {power:.0f} mW" for name, power in jetson.rails_mw.items())))
    return rows


def _words(gpu: GpuState) -> str:
    values = (
        ("MHz", gpu.sm_mhz or gpu.graphics_mhz),
        ("C", gpu.temperature_c),
        ("mW", gpu.power_mw),
    )
    said = [f"{value:.0f} {unit}" for unit, value in values if value is not None]
    if gpu.throttle_reasons is not None:
        said.append(f"held by: {', '.join(gpu.throttle_reasons) or 'nothing'}")
    return ", ".join(said) or "nothing else"
