"""What `estimate --go-no-go` and `estimate --llm` say: before anybody trains, and what follows behind the encoder."""

from __future__ import annotations

import itertools
from typing import Annotated

import msgspec
from msgspec import Meta

from edgecomp.estimates.go_no_go import GoNoGo, Reach
from edgecomp.estimates.llm import LlmShape, Prefill
from edgecomp.estimates.memory import MemoryVerdict
from edgecomp.report.text import flops, size, table
from edgecomp.specs.costs import Amount

__all__ = [
    "LlmReport",
    "LlmRow",
    "allowance",
    "describe_go_no_go",
    "describe_llm",
    "meaning",
    "shape_words",
    "spread",
]


class LlmRow(msgspec.Struct, frozen=True):
    """A count of visual tokens that the language model is given.

    Attributes:
        label: what makes this count.
        encoder_us: of the graph that makes it; 0 where none was given.
        of_all: prefill FLOPs over those of all visual tokens, with the schedule's own.
        first_token_us: encoder and prefill, the middle of the band; 0 where other rows have an encoder and this has
            none, so that it is compared with none of them.
        memory: weights of both models, the cache, and the activations of the model that has more.
    """

    label: str
    encoder_us: Amount
    prefill: Prefill
    of_all: Amount
    first_token_us: Amount
    memory: MemoryVerdict


class LlmReport(msgspec.Struct, frozen=True):
    """A language model behind the encoder.

    Attributes:
        precision: of the language model.
        rows: all visual tokens first; without a schedule unless the label names one.
        encoder_precision: "" where no encoder was given.
    """

    name: str
    shape: LlmShape
    precision: str
    visual_tokens: int
    text_tokens: int
    schedule: str
    rows: Annotated[tuple[LlmRow, ...], Meta(min_length=1)]
    encoder_precision: str = ""


def allowance(answer: GoNoGo) -> str:
    """Return what a method may cost, in a sentence."""
    half = min(answer.asked.reach, key=lambda reach: abs(reach.tokens - answer.tokens / 2))
    return (
        f"A method may take {answer.overhead_us / 1e3:.2f} ms for choosing and moving tokens before it is slower than "
        f"the plain model, at {half.tokens} of {answer.tokens} tokens."
    )


def meaning(answer: GoNoGo) -> str:
    """Return what the figures of the table are."""
    text = (
        f"times faster at best: blocks from number {answer.behind} on of {answer.blocks} work on the kept tokens, and "
        "choosing and moving them costs nothing"
    )
    others = any(spread(reach) for row in answer.rows for reach in row.reach)
    return text + "; in brackets what other fits of the same published rows say" * others


def spread(reach: Reach) -> str:
    """Return what other fits say; "" where there are none, under a calibration of one's own."""
    return f"{reach.low:.2f} to {reach.high:.2f}" if reach.low != reach.high else ""


def describe_go_no_go(answer: GoNoGo) -> list[str]:
    """Return the sentence, what a method may cost, and the table."""
    asked = answer.asked
    lines = [
        "",
        answer.sentence,
        allowance(answer),
        "",
    ]
    counts = [reach.tokens for reach in asked.reach]
    header = ["precision", "batch", "ms", "bound", "shrinks", *(f"{count} tokens" for count in counts)]
    rows: list[list[object]] = [
        [
            row.precision,
            row.batch,
            f"{row.us / 1e3:.2f}",
            row.bound,
            f"{100 * row.busy_share:.0f} %",
            *(f"{reach.faster:.2f}x" + (f" ({spread(reach)})" if spread(reach) else "") for reach in row.reach),
        ]
        for row in answer.rows
    ]
    lines.append(table(header, rows))
    lines += ["", meaning(answer)]
    return lines + [f"left out: {text}" for text in answer.skipped]


def shape_words(report: LlmReport) -> str:
    """Return what the language model is and what it is given, in a line."""
    shape = report.shape
    return (
        f"{report.name}: {shape.layers} layers, width {shape.dim}, {shape.heads} heads on {shape.kv_heads} key heads, "
        f"MLP {shape.mlp}; {report.precision}, {report.text_tokens} text tokens, one sequence"
        + (f"; the encoder in {report.encoder_precision}" if report.encoder_precision else "")
    )


def describe_llm(report: LlmReport) -> list[str]:
    """Return a line for each count, and the layers of the last one."""
    rows: list[list[object]] = [
        [
            row.label,
            row.prefill.visual_tokens,
            flops(row.prefill.flops),
            flops(row.prefill.overhead_flops) if row.prefill.overhead_flops else "-",
            f"{100 * row.of_all:.1f} %",
            size(row.prefill.kv_bytes),
            f"{row.encoder_us / 1e3:.1f}" if row.encoder_us else "-",
            f"{row.prefill.mid_us / 1e3:.1f} ({row.prefill.low_us / 1e3:.1f} to {row.prefill.high_us / 1e3:.1f})",
            f"{row.first_token_us / 1e3:.1f}" if row.first_token_us else "-",
            row.memory.verdict,
        ]
        for row in report.rows
    ]
    header = [
        "",
        "visual",
        "prefill",
        "choosing",
        "of all",
        "KV cache",
        "encoder ms",
        "prefill ms",
        "first token ms",
        "memory",
    ]
    last = report.rows[-1].prefill
    return [
        "",
        shape_words(report),
        "",
        table(header, rows),
        "",
        f"tokens by layer, {report.rows[-1].label}: {_runs(last.tokens)}",
        f"FLOPs by layer: {_runs(tuple(flops(count) for count in last.flops_by_layer))}",
    ]


def _runs(values: tuple[object, ...]) -> str:
    """Write equal neighbours once: `14 x 1668, 1472, 1276`."""
    found = []
    for value, same in itertools.groupby(values):
        count = len(list(same))
        found.append(f"{count} x {value}" if count > 1 else str(value))
    return ", ".join(found)
