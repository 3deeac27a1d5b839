"""The text that `edgecomp parity` prints."""

from __future__ import annotations

from edgecomp.parity import ParityReport
from edgecomp.report.text import table

__all__ = ["describe_parity"]


def describe_parity(report: ParityReport) -> str:
    """Return the text: each output's metrics, the thresholds, the verdict, and each miss with its element."""
    rows = [
        [
            row.model,
            row.case,
            row.output,
            f"{row.difference.max_abs:.2e}",
            f"{row.difference.max_rel:.2e}",
            f"{row.difference.cosine_mean:.9f}",
            f"{row.difference.cosine_min:.9f}",
            f"{row.difference.psnr:.1f}",
            "pass" if row else "FAIL",
        ]
        for row in report.outputs
    ]
    header = ["model", "case", "output", "max abs", "max rel", "cosine mean", "cosine min", "PSNR dB", ""]
    threads = report.threads or "its own choice of"
    word = report.precision + (" emulated in fp32" if report.emulated else "")
    lines = [
        f"{report.bundle}: {report.version}, {threads} threads, {word}, against the PyTorch original",
        "",
        table(header, rows),
        "",
        f"thresholds: max rel {report.tolerance.max_rel:g}, cosine min {report.tolerance.min_cosine}",
    ]
    for row in report.outputs:
        lines += [f"{row.model}, {row.case}, {row.output}: {failure}" for failure in row.failures]
    lines.append(f"verdict: {'pass' if report else 'FAIL'}")
    return "\n".join(lines)
