"""One run of a bundle: the value, and the text that `edgecomp run` prints."""

from __future__ import annotations

import msgspec

from edgecomp.patches import PatchLayers
from edgecomp.report.text import table
from edgecomp.runners import Array
from edgecomp.slices import Layout

__all__ = ["DrawnLayer", "LayoutSummary", "OutputSummary", "RunReport", "describe_run", "drawn_layers"]


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


class LayoutSummary(msgspec.Struct, frozen=True):
    """How the rows of an image or text in parts follow each other for a language model.

    Attributes:
        grid: columns and rows of slices or tiles; none where there are none.
        parts: slices or tiles and the overview; or images of text.
        rows: that a language model reads, newlines and separators among them.
        newlines, separators: their places among these rows.
    """

    grid: tuple[int, int] | None
    parts: int
    rows: int
    newlines: tuple[int, ...]
    separators: tuple[int, ...]

    @classmethod
    def of(cls, layout: Layout) -> LayoutSummary:
        """Return a layout in numbers that JSON holds."""
        newlines, separators = (tuple(map(int, places)) for places in (layout.newlines, layout.separators))
        return cls(layout.grid, layout.parts, len(layout.order), newlines, separators)


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
        layout: of an image or text in parts; none of any other.
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
    layout: LayoutSummary | None = None


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
        *([_describe_layout(report.layout)] if report.layout is not None else []),
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


def _describe_layout(layout: LayoutSummary) -> str:
    kinds = (("newline", layout.newlines), ("separator", layout.separators))
    marks = [f"{len(places)} {noun}{'' if len(places) == 1 else 's'}" for noun, places in kinds if places]
    rows = f"{layout.rows} row{'' if layout.rows == 1 else 's'} in reading order"
    return f"  layout     {rows}" + (f", {' and '.join(marks)} among them" if marks else "")
