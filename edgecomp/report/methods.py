"""All methods on one input: the values, and the text that `edgecomp compare --methods` prints."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from edgecomp.evaluation.reconstruction import Reconstruction
from edgecomp.profiles.machine import Machine
from edgecomp.profiles.ratios import Ratio
from edgecomp.profiles.statistics import Estimate
from edgecomp.report.compare import describe_ratio
from edgecomp.report.text import flops, table

__all__ = ["METHODS_KIND", "MethodRow", "MethodsReport", "describe_methods_report"]

METHODS_KIND: Final = "edgecomp methods"


class MethodRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One method on the input; the plain model is the first row.

    Attributes:
        method: its name, or `plain`.
        placement: where it stands: `inside` the encoder or `after` it; "" of the plain model.
        preset: size of its recipe.
        tokens_in, tokens_out: patch tokens before and after; of the plain model both are what it has.
        kept: rows that hold a token on this very input, of a method whose count depends on the data; none otherwise.
        flops: of one input.
        reconstructions: each way back that the method has; none where `reconstruction_note` says why.
        overhead_us: the method's own part of `latency_us`: `overhead_share` of it. None where `overhead_note` says why.
        overhead_share: see `edgecomp.api._overhead`.
        attention_us: the encoder's attention, without its projections, as a part of `latency_us`; none likewise.
        memory_mib: peak of a process that loads it and serves one request (Pss); none where it cannot be read.
        latency_us: median over rounds, with its 95 % interval.
        samples_us: of each round.
        ratio: time over the plain model's, paired by rounds; none for the plain model.
        notes: what a reader of its numbers must know.
    """

    method: str
    placement: str = ""
    preset: str = ""
    tokens_in: int
    tokens_out: int
    kept: int | None = None
    flops: int
    reconstructions: tuple[Reconstruction, ...] = ()
    reconstruction_note: str = ""
    overhead_us: float | None = None
    overhead_share: float | None = None
    overhead_note: str = ""
    attention_us: float | None = None
    memory_mib: float | None = None
    latency_us: Estimate
    samples_us: tuple[float, ...]
    ratio: Ratio | None = None
    notes: tuple[str, ...] = ()

    @property
    def keep_ratio(self) -> float:
        """M / N."""
        return self.tokens_out / self.tokens_in

    @property
    def compression(self) -> float:
        """N / M."""
        return self.tokens_in / self.tokens_out

    @property
    def attention_rule(self) -> float:
        """(N / M)^2: how much less the score products of an attention over M tokens compute than one over N."""
        return self.compression**2

    def attention_speed_up(self, plain: MethodRow) -> float | None:
        """The time of the plain model's attention over that of this one's, measured; none where that is unknown."""
        if not self.attention_us or not plain.attention_us:
            return None
        return plain.attention_us / self.attention_us

    @property
    def speed_up(self) -> float:
        """The plain model's time over this one's, measured."""
        return 1.0 if self.ratio is None else 1 / self.ratio.value

    @property
    def efficiency_score(self) -> float:
        """The founding notes' score, a mean of two unlike ratios: here of N / M and of the speed-up."""
        return (self.compression + self.speed_up) / 2


class MethodsReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `edgecomp compare --methods` found.

    Attributes:
        image: name of the file, never its path.
        backbone: the host that all of them stand in or behind.
        weights: of the host, in a word.
        budget: what was asked of each.
        rows: the plain model, then the methods that could be placed.
        left_out: the others, each with the reason.
    """

    schema: Literal[1] = 1
    kind: Literal["edgecomp methods"] = METHODS_KIND
    created: str
    edgecomp: str
    image: str
    backbone: str
    image_size: int
    weights: str
    budget: str
    batch: int
    runner: str
    threads: int
    rounds: int
    seed: int
    machine: Machine
    rows: tuple[MethodRow, ...]
    left_out: dict[str, str] = {}
    notes: tuple[str, ...] = ()


def describe_methods_report(report: MethodsReport) -> str:
    """Return two tables, what was compressed and what it costs, then what the columns mean."""
    machine = report.machine
    load = f"{machine.load_average[0]:.2f}" if machine.load_average else "unknown"
    threads = f"{report.threads or 'its own choice of'} threads" if report.threads != 1 else "1 thread"
    plain = report.rows[0]
    left = ["method", "stands", "tokens", "keep", "factor", "FLOPs", "of plain", "reconstruction error", "memory MiB"]
    right = [
        "method",
        "p50 ms",
        "time over plain",
        "95 %",
        "",
        "own part ms",
        "",
        "(N/M)^2",
        "attention",
        "speed-up",
        "score",
    ]
    lines = [
        f"{len(report.rows) - 1} methods on {report.image}; budget {report.budget}, batch {report.batch}",
        f"{report.backbone}, {report.image_size} pixels, weights {report.weights}",
        f"{report.runner}, {threads}; {report.rounds} rounds in turn, orders by seed {report.seed}",
        f"on {machine.cpu}, {machine.cores} cores{f', {machine.gpu}' if machine.gpu else ''}; load {load}",
        "",
        table(left, [_compression(row, plain) for row in report.rows]),
        "",
        table(right, [_cost(row, plain) for row in report.rows]),
        "",
        "keep = M/N, factor = N/M, of patch tokens",
        "reconstruction error: ||X - X'||^2 / ||X||^2 over the plain model's last tokens X; the ways are not one scale",
        "own part: by ONNX Runtime's profiler, the method's own nodes, as a share of p50; a lower bound",
        "(N/M)^2: what the score products of an attention over M tokens save, and nothing else in it; of a method",
        "  after the encoder in what reads its tokens alone. Beside it what was measured: attention, the time of the",
        "  encoder's softmaxes and products of tokens with tokens over that here; and the speed-up of the whole graph",
        "score: the founding notes' efficiency score, (factor + speed-up) / 2, kept for those who look for it: a mean",
        "  of two unlike ratios, by which nothing should be chosen",
    ]
    for row in report.rows:
        lines += [f"{row.method}: {note}" for note in row.notes]
        if row.reconstruction_note:
            lines.append(f"{row.method}: no reconstruction error: {row.reconstruction_note}")
        if row.overhead_note:
            lines.append(f"{row.method}: own part unknown: {row.overhead_note}")
    lines += [f"{method}: left out: {reason}" for method, reason in report.left_out.items()]
    lines += [f"note: {note}" for note in report.notes]
    return "\n".join(lines)


def _compression(row: MethodRow, plain: MethodRow) -> list[object]:
    memory = "unknown" if row.memory_mib is None else f"{row.memory_mib:.0f}"
    if row.ratio is None:
        return ["plain", "-", row.tokens_in, "-", "-", flops(row.flops), "1.00x", "-", memory]
    errors = ", ".join(f"{one.error:.3f} {one.way}" for one in row.reconstructions) or "-"
    kept = "" if row.kept is None else f" ({row.kept} real)"
    return [
        row.method,
        row.placement,
        f"{row.tokens_in} -> {row.tokens_out}{kept}",
        f"{row.keep_ratio:.3f}",
        f"{row.compression:.2f}x",
        flops(row.flops),
        f"{row.flops / plain.flops:.2f}x",
        errors,
        memory,
    ]


def _cost(row: MethodRow, plain: MethodRow) -> list[object]:
    p50 = f"{row.latency_us.value / 1000:.3f}"
    if row.ratio is None:
        return ["plain", p50, "base", "", "", "-", "", "-", "-", "-", "-"]
    own = ["unknown", ""]
    if row.overhead_us is not None and row.overhead_share is not None:
        own = [f"{row.overhead_us / 1000:.3f}", f"({100 * row.overhead_share:.1f} %)"]
    rule, score = f"{row.attention_rule:.2f}x", f"{row.efficiency_score:.2f}"
    measured = row.attention_speed_up(plain)
    attention = "unknown" if measured is None else f"{measured:.2f}x"
    return [row.method, p50, *describe_ratio(row.ratio), *own, rule, attention, f"{row.speed_up:.2f}x", score]
