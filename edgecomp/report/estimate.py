"""What `edgecomp estimate` computed: the values, and the text that it prints."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edgecomp.estimates.efficiency import Efficiency
from edgecomp.estimates.go_no_go import GoNoGo
from edgecomp.estimates.memory import MemoryVerdict
from edgecomp.estimates.roofline import Bound, Estimate, KernelTime
from edgecomp.report.foresight import LlmReport, describe_go_no_go, describe_llm
from edgecomp.report.text import flops, size, table
from edgecomp.specs.costs import LARGEST, Amount, Us, Whole

__all__ = ["BlockTime", "EstimateReport", "GraphEstimate", "describe_estimate", "findings_of", "graph_estimate"]

_HEADER = ("model", "ms", "from", "to", "bound", "launches", "choosing and merging", "FLOPs", "memory", "of plain")
_TOP = 8
_PAYS = 0.95  # of the plain model; above, the method does not


class BlockTime(msgspec.Struct, frozen=True):
    """A block of a graph: its kernels together.

    Attributes:
        share: of the graph's time.
        bound: what takes most of its time.
    """

    block: str
    kernels: int
    flops: Whole
    us: Us
    share: Annotated[float, Meta(ge=0, le=1 + 1e-6)]
    bound: Bound


class GraphEstimate(msgspec.Struct, frozen=True):
    """A graph on the target.

    Attributes:
        role: `plain` is a bundle's host without the compressor; `file` is any ONNX file.
        kept: tokens that a bucket keeps; 0 of others.
        over_plain: its time over that of the bundle's plain model; 0 where there is none.
        estimate: with its kernels where each op was asked for, else without.
        blocks, top: in the order of the graph, and the kernels that take longest.
    """

    model: str
    role: Literal["bucket", "plain", "file"]
    kept: int
    over_plain: Amount
    estimate: Estimate
    memory: MemoryVerdict
    blocks: tuple[BlockTime, ...]
    top: tuple[KernelTime, ...]


class EstimateReport(msgspec.Struct, frozen=True):
    """Graphs on hardware that is not here.

    Attributes:
        graphs: of a bundle its buckets and its plain model; of a file, itself.
        efficiency, efficiency_from: what the times were computed with.
        error: the 90th percentile of the model's error on published rows that were left out of its fit; where `is_own`,
            the largest of the user's own results, each left out in turn.
        findings: what a user should know before anything else.
        bandwidth_gb_s: peak of the target's memory.
        go_no_go, llm: where they were asked for.
    """

    path: str
    target: str
    title: str
    graphs: tuple[GraphEstimate, ...]
    efficiency: Efficiency
    efficiency_from: str
    error: Amount
    findings: tuple[str, ...]
    notes: tuple[str, ...]
    bandwidth_gb_s: Annotated[float, Meta(gt=0, le=LARGEST)]
    is_own: bool = False
    go_no_go: GoNoGo | None = None
    llm: LlmReport | None = None
    schema: Literal[1] = 1
    kind: Literal["edgecomp estimate"] = "edgecomp estimate"

    def __bool__(self) -> bool:
        return True


def graph_estimate(
    estimate: Estimate,
    memory: MemoryVerdict,
    *,
    model: str,
    role: Literal["bucket", "plain", "file"] = "file",
    kept: int = 0,
    plain: Estimate | None = None,
    per_op: bool = False,
) -> GraphEstimate:
    """Return what is shown of an estimate."""
    return GraphEstimate(
        model=model,
        role=role,
        kept=kept,
        over_plain=estimate.mid_us / plain.mid_us if plain is not None and plain.mid_us else 0.0,
        estimate=estimate if per_op else msgspec.structs.replace(estimate, kernels=()),
        memory=memory,
        blocks=_blocks(estimate),
        top=tuple(sorted(estimate.kernels, key=lambda kernel: -kernel.us)[:_TOP]),
    )


def _blocks(estimate: Estimate) -> tuple[BlockTime, ...]:
    groups: dict[str, list[KernelTime]] = {}
    for kernel in estimate.kernels:
        groups.setdefault(kernel.block, []).append(kernel)
    found = []
    for block, kernels in groups.items():
        by_bound: dict[Bound, float] = {}
        for kernel in kernels:
            by_bound[kernel.bound] = by_bound.get(kernel.bound, 0.0) + kernel.us
        us = sum(kernel.us for kernel in kernels)
        found.append(
            BlockTime(
                block,
                len(kernels),
                sum(kernel.flops for kernel in kernels),
                us,
                us / estimate.mid_us if estimate.mid_us else 0.0,
                max(by_bound, key=lambda bound: by_bound[bound]),
            )
        )
    return tuple(found)


def findings_of(graphs: Iterable[GraphEstimate], target: str) -> tuple[str, ...]:
    """Return what is worth a sentence: a method that does not pay, a graph that does not fit."""
    graphs = tuple(graphs)
    plain = next((graph for graph in graphs if graph.role == "plain"), None)
    found = []
    for graph in graphs:
        made = graph.estimate
        if graph.role == "bucket" and plain is not None and graph.over_plain >= _PAYS:
            own = made.selection_us + made.merge_us
            slower = "slower than" if graph.over_plain > 1 else "no faster than"
            found.append(
                f"{graph.model} does not pay on {target} at batch {made.batch}, {made.precision}: "
                f"{_ms(made.mid_us)} ms, {slower} the plain model's {_ms(plain.estimate.mid_us)} ms; choosing and "
                f"merging take {_ms(own)} ms of it, and launches {_share(made.launch_us, made.mid_us)}"
            )
        if graph.memory.verdict == "does not fit":
            found.append(
                f"{graph.model} needs {size(graph.memory.needed_bytes)} and {target} has "
                f"{size(graph.memory.available_bytes)} for it: it does not fit"
            )
    return tuple(found)


def describe_estimate(report: EstimateReport, *, per_op: bool = False) -> str:
    """Return the text: a line a graph, then what takes the time."""
    what = report.path or (report.llm.name if report.llm is not None else "")
    lines = [f"{what} on {report.target} ({report.title}): computed, not measured"]
    lines += _words(report.graphs[0].estimate) if report.graphs and report.go_no_go is None else []
    which = "left out in turn, they were" if report.is_own else "9 of 10 were"
    lines.append(f"  model      {report.efficiency_from}; {which} within a factor of {1 + report.error:.2f}")
    if report.go_no_go is not None:
        lines += describe_go_no_go(report.go_no_go)
    elif report.graphs:
        lines += ["", table(_HEADER, [_row(graph) for graph in report.graphs])]
    if report.llm is not None:
        lines += describe_llm(report.llm)
    lines += ["", *(f"finding: {one}" for one in report.findings)] if report.findings else []
    for graph in report.graphs if report.go_no_go is None and report.llm is None else ():
        if graph.role != "plain" or len(report.graphs) == 1:
            lines += _describe_graph(graph, per_op=per_op)
    lines += ["", *(f"note: {note}" for note in report.notes)] if report.notes else []
    return "\n".join(lines)


def _words(made: Estimate) -> list[str]:
    peaks = ", ".join(
        f"{word} {rate.tera:g} T{'FLOP' if word.startswith(('fp', 'bf', 'tf')) else 'OP'}/s dense"
        + ("" if rate.confidence == "stated" else f" ({rate.confidence})")
        for word, rate in made.peaks.items()
    )
    return [f"  precision  {made.precision}; batch {made.batch or 'unknown'}" + (f"; {peaks}" if peaks else "")]


def _row(graph: GraphEstimate) -> list[object]:
    made = graph.estimate
    return [
        graph.model,
        _ms(made.mid_us),
        _ms(made.low_us),
        _ms(made.high_us),
        made.bound,
        _share(made.launch_us, made.mid_us),
        _share(made.selection_us + made.merge_us, made.mid_us),
        flops(made.flops),
        graph.memory.verdict,
        f"{graph.over_plain:.2f}x" if graph.over_plain else "-",
    ]


def _describe_graph(graph: GraphEstimate, *, per_op: bool) -> list[str]:
    made, memory = graph.estimate, graph.memory
    lines = [
        "",
        (
            f"{graph.model}: compute {_ms(made.compute_us)} ms (of it {_ms(made.idle_us)} for products too small "
            "to fill the "
            f"chip), memory {_ms(made.memory_us)} ms, launches {_ms(made.launch_us)} ms"
        ),
        (
            f"  memory     {size(memory.needed_bytes)} of {size(memory.available_bytes)}: {memory.verdict} (weights "
            f"{size(memory.weight_bytes)}, activations {size(memory.activation_bytes)}; {memory.assumed})"
        ),
        "",
    ]
    if per_op:
        lines.append(_kernels(made.kernels))
        return lines
    rows: list[list[object]] = [
        [block.block, block.kernels, flops(block.flops), f"{block.us:.1f}", f"{100 * block.share:.1f} %", block.bound]
        for block in _fold(graph.blocks)
    ]
    lines += [table(["block", "kernels", "FLOPs", "us", "share", "bound"], rows), "", _kernels(graph.top)]
    return lines


def _fold(blocks: tuple[BlockTime, ...]) -> list[BlockTime]:
    """Put neighbours that are alike into one line: `blocks.3 to blocks.11, each`."""
    found: list[BlockTime] = []
    runs: list[list[BlockTime]] = []
    for block in blocks:
        last = runs[-1][-1] if runs else None
        alike = last is not None and (last.kernels, last.flops, last.bound, round(last.us, 1)) == (
            block.kernels,
            block.flops,
            block.bound,
            round(block.us, 1),
        )
        if alike:
            runs[-1].append(block)
        else:
            runs.append([block])
    for run in runs:
        name = run[0].block if len(run) == 1 else f"{run[0].block} to {run[-1].block}, each"
        found.append(msgspec.structs.replace(run[0], block=name))
    return found


def _kernels(kernels: Iterable[KernelTime]) -> str:
    rows: list[list[object]] = [
        [
            kernel.name,
            kernel.block,
            kernel.kind if kernel.role == "model" else f"{kernel.kind} ({kernel.role})",
            kernel.ops,
            flops(kernel.flops) if kernel.flops else "-",
            size(kernel.bytes),
            f"{100 * kernel.fill:.0f} %" if kernel.flops else "-",
            f"{kernel.us:.1f}",
            kernel.bound,
        ]
        for kernel in kernels
    ]
    return table(["kernel", "block", "kind", "ops", "FLOPs", "bytes", "fills", "us", "bound"], rows)


def _ms(us: float) -> str:
    return f"{us / 1e3:.2f}" if us >= 100 else f"{us / 1e3:.3f}"


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "0 %"
