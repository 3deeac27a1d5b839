"""The text that `edgecomp compare` prints."""

from __future__ import annotations

from edgecomp.profiles.comparison import NOT_INTERLEAVED, Comparison, Contestant
from edgecomp.profiles.ratios import Ratio
from edgecomp.report.text import flops, size, table

__all__ = ["describe_comparison", "describe_interval", "describe_ratio"]

_HEADER = ["model", "kept", "p50 ms", "95 %", "time over base", "95 %", "", "FLOPs", "size", "outputs", "parity"]


def describe_comparison(comparison: Comparison) -> str:
    """Return the text: how it was measured, a row for each model, and what a reader must know of them."""
    first, machine = comparison.contestants[0], comparison.machine
    threads = f"{first.threads or 'its own choice of'} threads" if first.threads != 1 else "1 thread"
    lines = [f"{first.runner}, {threads}, batch {first.batch}; ratios to {comparison.base}"]
    if machine is not None:
        load = f"{machine.load_average[0]:.2f}" if machine.load_average else "unknown"
        gpu = f", {machine.gpu}" if machine.gpu else ""
        lines.append(f"on {machine.cpu}, {machine.cores} cores{gpu}; governor {machine.governor}, load {load}")
    if comparison.rounds:
        lines.append(
            f"{comparison.rounds} rounds in turn, each in an order of its own (seed {comparison.seed}), "
            f"{1000 * comparison.settle_s:.0f} ms of rest before each turn"
        )
    lines += ["", table(_HEADER, [_row(one, comparison) for one in comparison.contestants]), ""]
    ways = {one.ratio.way for one in comparison.contestants if one.ratio is not None}
    if "paired" in ways:
        lines.append(
            "ratios in turn: the median of the rounds' own ratios, between two order statistics of them (95 %)"
        )
    if "unpaired" in ways:
        lines.append(f"ratios marked *: of two medians, bootstrapped (95 %); {NOT_INTERLEAVED}")
    lines += [f"FORCED: {text}" for text in comparison.forced]
    for one in comparison.contestants:
        lines += [f"{one.name}: {note}" for note in one.notes if note != NOT_INTERLEAVED]
        if one.agreement_note:
            lines.append(f"{one.name}: outputs not compared: {one.agreement_note}")
        if one.agreement is not None and one.agreement.not_finite:
            lines.append(f"{one.name}: {one.agreement.not_finite} values of its or the base's outputs are NaN or Inf")
        if one.parity.startswith(("FAIL", "not checked")):
            lines.append(f"{one.name}: parity {one.parity}")
    lines += [f"note: {note}" for note in comparison.notes]
    return "\n".join(lines)


def _row(one: Contestant, comparison: Comparison) -> list[object]:
    base = comparison.contestants[0].flops
    share = f" ({one.flops / base:.2f}x)" if one.flops and base and one.ratio is not None else ""
    p50 = one.latency_us
    return [
        one.name,
        one.tokens_out or "-",
        f"{p50.value / 1000:.3f}",
        f"({p50.low / 1000:.3f} to {p50.high / 1000:.3f})",
        *describe_ratio(one.ratio),
        "unknown" if one.flops is None else flops(one.flops) + share,
        "-" if one.size_bytes is None else size(one.size_bytes),
        _agreement(one, comparison),
        one.parity.partition(" (")[0].partition(":")[0] or "-",
    ]


def describe_ratio(ratio: Ratio | None) -> list[str]:
    """Return a ratio, its interval and what it says, as three cells."""
    if ratio is None:
        return ["base", "", ""]
    mark = "*" if ratio.way == "unpaired" else ""
    return [f"{ratio.value:.3f}x{mark}", describe_interval(ratio), ratio.pace]


def describe_interval(ratio: Ratio) -> str:
    """Return the interval; that there is none, where so few carry none."""
    return "no interval" if ratio.pace == "too few to tell" else f"({ratio.low:.3f} to {ratio.high:.3f})"


def _agreement(one: Contestant, comparison: Comparison) -> str:
    found = one.agreement
    if one.name == comparison.base:
        return "base"
    if found is None:
        return "-"
    top1 = "" if found.top1 is None else f", top-1 {100 * found.top1:.0f} % of {found.inputs}"
    return f"cosine {found.cosine:.4f}{top1}"
