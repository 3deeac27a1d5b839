"""One run of a bundle: the value, and the text that `edgecomp run` prints."""

from __future__ import annotations

import msgspec

from edgecomp.patches import PatchLayers
from edgecomp.report.text import table
from edgecomp.runners import Array

__all__ = ["DrawnLayer", "OutputSummary", "RunReport", "describe_run", "drawn_layers"]


class OutputSummary(msgspec.Struct, frozen=True):
    """One output, in a few numbers."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    mean: float
    std: float
    minimum: float
    maximum: float
    not_finite: int


class DrawnLayer(msgspec.Struct, frozen=True):
    """What a layer of a picture shows, in counts of patches.

    Attributes:
        tokens: patch tokens behind the layer.
        groups: tokens that are made of several patches.
    """

    name: str
    tokens: int
    kept: int
    merged: int
    groups: int
    dropped: int


class RunReport(msgspec.Struct, frozen=True):
    """What came out.

    Attributes:
        reason: why this bucket.
        signals: what the router looked at, by name; empty where none was asked.
        out: where the outputs were written, or "".
        outputs: the arrays by name.
        drawn: the picture that was written, or "".
        layers: what it shows.
        notes: what it says beside that.
    """

    bundle: str
    model: str
    runner: str
    tokens_in: int
    tokens_out: int
    reason: str
    signals: dict[str, float]
    summaries: tuple[OutputSummary, ...]
    out: str
    outputs: dict[str, Array]
    drawn: str = ""
    layers: tuple[DrawnLayer, ...] = ()
    notes: tuple[str, ...] = ()


def drawn_layers(patches: PatchLayers) -> tuple[DrawnLayer, ...]:
    """Return the counts of each layer."""
    found = []
    for layer in patches.layers:
        kept, merged, dropped = layer.counts
        found.append(DrawnLayer(layer.name, layer.tokens, kept, merged, len(layer.groups), dropped))
    return tuple(found)


def describe_run(report: RunReport) -> str:
    """Return the text: which bucket ran, and each output in a few numbers."""
    rows = [
        [
            s.name,
            s.dtype,
            list(s.shape),
            f"{s.mean:.4f}",
            f"{s.std:.4f}",
            f"{s.minimum:.4f}",
            f"{s.maximum:.4f}",
            s.not_finite,
        ]
        for s in report.summaries
    ]
    kept = f"{report.tokens_out} kept"
    if "count" in report.outputs:  # the data decide, or rows are filled up
        kept = f"at most {kept}, count {', '.join(map(str, report.outputs['count'].tolist()))}"
    lines = [
        f"{report.bundle}: {report.model} in {report.runner}, {report.tokens_in} tokens in, {kept}",
        f"  chosen     {report.reason}",
        *([f"  signals    {', '.join(f'{k} {v:.3f}' for k, v in report.signals.items())}"] if report.signals else []),
        "",
        table(["output", "type", "shape", "mean", "std", "min", "max", "NaN/Inf"], rows),
    ]
    if report.out:
        lines.append(f"written to {report.out}")
    if report.drawn:
        cells = [[one.name, one.tokens, one.kept, one.merged, one.groups, one.dropped] for one in report.layers]
        header = ["patches behind", "tokens", "kept", "merged", "groups", "dropped"]
        lines += ["", table(header, cells)] if cells else [""]
        lines += [*(f"note: {note}" for note in report.notes), f"drawn to {report.drawn}"]
    return "\n".join(lines)
