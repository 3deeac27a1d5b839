"""Accuracy and speed of a bundle: the value, and the text that `edgecomp evaluate` prints."""

from __future__ import annotations

from typing import Literal

import msgspec

from edgecomp.evaluation import Estimate, Evaluation, GraphScore
from edgecomp.profiles.machine import Machine
from edgecomp.report.text import table

__all__ = ["EvaluationReport", "describe_evaluation"]


class EvaluationReport(msgspec.Struct, frozen=True):
    """What a bundle is worth on labelled images; `bool(report)` says whether no bucket loses more than it may.

    Attributes:
        layout: of the data.
        found: images that the data holds; `evaluation.images` of them were run.
        seed: of the choice, where not all were.
        kept: tokens that each graph keeps, by its file name; of the plain model, those that it has; of
            `routed`, which is the bucket that the router picks for each image, the mean.
        flops: of one image, likewise.
        plain: file name of the plain model, or "".
        max_drop: percentage points of top-1 that a bucket may lose; None: any.
        notes: what a reader of the figures must know.
    """

    bundle: str
    data: str
    layout: str
    found: int
    seed: int
    runner: str
    version: str
    threads: int
    machine: Machine
    kept: dict[str, float]
    flops: dict[str, int]
    plain: str
    max_drop: float | None
    notes: tuple[str, ...]
    evaluation: Evaluation
    schema: Literal[1] = 1
    kind: Literal["edgecomp evaluation"] = "edgecomp evaluation"

    def __bool__(self) -> bool:
        return not self.failures

    @property
    def failures(self) -> tuple[str, ...]:
        """Each bucket that loses more than `max_drop`, in words."""
        if self.max_drop is None:
            return ()
        compared = [(row.model, row.against_plain) for row in self.evaluation.scores]
        return tuple(
            f"{model} loses {100 * it.drop.value:.2f} points, above the {self.max_drop:g} allowed"
            for model, it in compared
            if it is not None and 100 * it.drop.value > self.max_drop
        )


def describe_evaluation(report: EvaluationReport) -> str:
    """Return the text: conditions, a row for each graph, which of them do not pay, notes, and the gate."""
    found, machine = report.evaluation, report.machine
    chosen = f"{found.images:,} of {report.found:,} images"
    chosen += f" (chosen with seed {report.seed})" if found.images < report.found else ""
    load = f"{machine.load_average[0]:.2f}" if machine.load_average else "unknown"
    threads = f"{report.threads or 'its own choice of'} threads" if report.threads != 1 else "1 thread"
    header = ["model", "kept", "top-1 %", "", "top-5 %", "drop", "", "agree %", "FLOPs", "ms/image", "time", "", ""]
    lines = [
        f"{report.bundle}: {chosen} of {report.data} ({report.layout}), {found.num_classes} classes",
        f"{report.version}, {threads}, batch {found.batch}, {len(found.scores[0].run_ms)} runs each, in turn",
        f"on {machine.cpu}, {machine.cores} cores{f', {machine.gpu}' if machine.gpu else ''}; load {load}",
        "",
        table(header, [_row(report, row) for row in found.scores]),
        "",
        "in brackets: 95 % intervals (Wilson; drop: paired, in points of top-1; times: order statistics of the runs)",
    ]
    lines += _what_does_not_pay(found)
    lines += [f"note: {note}" for note in report.notes]
    if report.max_drop is not None:
        lines += list(report.failures)
        lines.append(
            f"verdict: {'pass' if report else 'FAIL'} (no bucket may lose more than {report.max_drop:g} points)"
        )
    return "\n".join(lines)


def _row(report: EvaluationReport, row: GraphScore) -> list[object]:
    compared, base = row.against_plain, report.flops.get(report.plain, 0)
    cells: list[object] = [
        row.model,
        f"{report.kept[row.model]:g}" if row.model != "routed" else f"{report.kept[row.model]:.1f}",
        f"{100 * row.top1.value:.2f}",
        _interval(row.top1, 100, 2),
        "-" if row.top5 is None else f"{100 * row.top5.value:.2f}",
    ]
    if compared is None:
        return [*cells, "-", "", "-", "-", f"{row.ms_per_image.value:.3f}", "-", "", ""]
    return [
        *cells,
        f"{100 * compared.drop.value:.2f}",
        _interval(compared.drop, 100, 2),
        f"{100 * compared.agreement.value:.2f}",
        f"{report.flops[row.model] / base:.2f}x",
        f"{row.ms_per_image.value:.3f}",
        f"{compared.time_ratio.value:.2f}x",
        _interval(compared.time_ratio, 1, 2),
        compared.pace,
    ]


def _interval(estimate: Estimate, scale: float, digits: int) -> str:
    return f"({scale * estimate.low:.{digits}f} to {scale * estimate.high:.{digits}f})"


def _what_does_not_pay(found: Evaluation) -> list[str]:
    """Return a line for each bucket that is not faster than the plain model."""
    lines = []
    for row in found.scores:
        compared = row.against_plain
        if compared is None or compared.pace == "faster":
            continue
        ratio = f"{compared.time_ratio.value:.2f}x the plain model's time"
        drop = f"{100 * compared.drop.value:.2f} points of top-1"
        if compared.pace == "slower":
            lines.append(f"{row.model} does not pay here: {ratio}, and {drop} lost")
        else:
            few = ", too few runs to tell" if len(row.run_ms) < 6 else ", which may be noise"
            lines.append(f"{row.model}: no gain was measured: {ratio}{few}; {drop} lost")
    return lines
