"""Latency of a bundle or a model: the text that `edgecomp profile` prints."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from edgecomp.profiles.latency import LatencyProfile, Percentile
from edgecomp.profiles.result import BlockTime, LayerTime, MemoryUse, Result, RoutedTime
from edgecomp.report.text import table

__all__ = ["describe_profile"]

_PARTS = ("selection", "merge")
_LONGEST = 10
_WIDTH = 120
_ALWAYS = ("p50", "p90", "p99")


def describe_profile(report: Result) -> str:
    """Return the text: percentiles for each graph, and the conditions they were measured under."""
    first, machine = report.profiles[0], report.machine
    where = f"{machine.cpu}, {machine.cores} cores" + (f", {machine.gpu}" if machine.gpu else "")
    load = f"{machine.load_average[0]:.2f}" if machine.load_average else "unknown"
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    overhead = max(profile.loop_overhead_us for profile in report.profiles)
    return "\n".join(
        [
            f"{report.subject.name}: {first.runner}, {first.threads or 'its own choice of'} threads, {_mode(first)}",
            f"on {where}; governor {machine.governor}, load {load}, {machine.os}, Python {machine.python}",
            f"with {versions}",
            "",
            *_describe_times(report),
            "[ ]: 95 % interval; ~ indicative: too few samples for this percentile (24,576 for p90, 270,336 for p99)",
            f"the timing loop itself costs {overhead:.2f} us a run{_of_one_thread(first)}",
            *_describe_state(report.profiles),
            "",
            *_describe_beginnings(report.profiles),
            *_describe_stages(report.profiles),
            *_describe_blocks(report.blocks),
            *_describe_layers(report.layers),
            *_describe_routing(report.routing),
            *_describe_memory(report.memory),
            *(
                f"{model}: {report.subject.precision} in the file; ONNX Runtime runs its matrix products in "
                + ", ".join(f"{dtype} ({count})" for dtype, count in products.items())
                for model, products in report.types.items()
            ),
            *(f"note: {note}" for note in report.notes),
        ]
    )


def _of_one_thread(profile: LatencyProfile) -> str:
    """Return what the loop's cost leaves out where several threads run it at a time."""
    if profile.mode != "offline" or profile.streams == 1:
        return ""
    return f", by one thread alone; how {profile.streams} wait for Python's lock is in the samples, and in no figure"


def _mode(profile: LatencyProfile) -> str:
    graph = ", one CUDA graph" if profile.cuda_graph else ""
    return f"{profile.mode}{f' of {profile.streams}' if profile.mode != 'single-stream' else ''}{graph}"


def _describe_times(report: Result) -> list[str]:
    first = report.profiles[0]
    asked = {word.partition("=")[2] for word in report.command if word.startswith("--percentile=")}
    names = sorted({*_ALWAYS, *(f"p{one.removesuffix('.0')}" for one in asked)} & set(first.percentiles), key=_percent)
    rows = []
    for p in report.profiles:
        middle, *tail = (p.percentiles[name] for name in names)
        low, high = (f"{end / 1000:.3f}" if end is not None else "?" for end in (middle.low_us, middle.high_us))
        rows.append(
            [
                p.model,
                p.batch,
                f"{middle.us / 1000:.3f}",
                f"[{low}, {high}]",
                *(_percentile(one) for one in tail),
                f"{p.throughput_per_s:.1f}",
                p.num_samples,
                "; ".join(p.marks),
            ]
        )
    header = ["model", "batch", "p50 ms", "", *(f"{name} ms" for name in names[1:]), "items/s", "samples", ""]
    return [table(header, rows)]


def _percent(name: str) -> float:
    return float(name[1:])


def _percentile(one: Percentile) -> str:
    return f"{one.us / 1000:.3f}{'~' if one.is_indicative else ''}"


def _describe_beginnings(profiles: Sequence[LatencyProfile]) -> list[str]:
    """Return what was before the first sample: loading, the first inference, warming up; and the memory of it."""
    rows = [
        [
            p.model,
            _ms(p.load_us),
            _ms(p.first_us),
            p.warmup_runs,
            *(f"{mib:.0f}" if mib is not None else "unknown" for mib in (p.host_peak_mib, p.device_peak_mib)),
        ]
        for p in profiles
    ]
    header = ["model", "load ms", "first run ms", "warm-up runs", "peak host MiB", "peak GPU MiB"]
    if all(p.device_peak_mib is None for p in profiles):
        header, rows = header[:-1], [row[:-1] for row in rows]
    lines = [table(header, rows)]
    if any(p.host_peak_mib is not None for p in profiles) and any(p.host_peak_mib is None for p in profiles):
        lines.append(
            "peak host MiB: only of the first graph, whose leavings would count in all others; --budget takes one alone"
        )
    return lines


def _describe_state(profiles: Sequence[LatencyProfile]) -> list[str]:
    """Return the line on clocks, heat and power, and what one run drew where that is known."""
    lines = []
    verdicts = {one.stability.verdict: one.stability for one in profiles if one.stability is not None}
    for verdict in ("unstable", "unknown", "stable"):
        if (found := verdicts.get(verdict)) is not None:
            first = (*found.reasons, *found.notes) if verdict == "unstable" else (*found.notes, *found.reasons)
            said = "; ".join(first) or "clocks, heat and power stood still"
            lines.append(textwrap.shorten(f"device state {verdict}: {said}", _WIDTH, placeholder=" ..."))
            break
    lines += [f"{one.model}: {one.energy_mj:.3g} mJ a run" for one in profiles if one.energy_mj is not None]
    return lines


def _ms(us: float | None) -> str:
    return "unknown" if us is None else f"{us / 1000:.3f}"


def _describe_stages(profiles: Sequence[LatencyProfile]) -> list[str]:
    """Return the table of stages; one that several graphs share stands there once."""
    seen: dict[tuple[str, float], list[object]] = {}
    for profile in profiles:
        for stage in profile.stages:
            row = seen.setdefault(
                (stage.name, stage.p50_us), [stage.name, profile.model, f"{stage.p50_us / 1000:.3f}", stage.how]
            )
            if row[1] != profile.model:
                row[1] = "each"
    return ["", table(["stage", "of", "p50 ms", "how"], list(seen.values()))] if seen else []


def _describe_blocks(blocks: Sequence[BlockTime]) -> list[str]:
    """Return the table of `--ablate`."""
    rows = [
        [
            one.model,
            one.block,
            f"{one.us / 1000:.3f}",
            f"[{one.low_us / 1000:.3f}, {one.high_us / 1000:.3f}]",
            f"{one.total_us / 1000:.3f}",
        ]
        for one in blocks
    ]
    return ["", table(["graph", "block", "ms", "95 % interval", "up to here ms"], rows)] if rows else []


def _describe_layers(layers: Sequence[LayerTime]) -> list[str]:
    """Return for each graph its blocks and its longest layers, and how much no name tells the origin of."""
    lines: list[str] = []
    for model in dict.fromkeys(layer.model for layer in layers):
        own = [layer for layer in layers if layer.model == model]
        groups: dict[str, list[LayerTime]] = {}
        for layer in own:
            groups.setdefault(layer.block or "outside of blocks", []).append(layer)
        rows = [
            [block, len(held), *_sums(held), *(_sums([one for one in held if one.part == p])[1] for p in _PARTS)]
            for block, held in groups.items()
        ]
        lines += ["", table([model, "layers", "ms", "share %", *(f"{part} %" for part in _PARTS)], rows)]
        longest = sorted(own, key=lambda layer: layer.us, reverse=True)[:_LONGEST]
        shown = [[_short(one.name), one.op, _short(one.module), *_sums([one])] for one in longest]
        lines += ["", table(["longest layers", "op", "module", "ms", "share %"], shown)]
        unmapped = 100 * sum(layer.share for layer in own if not layer.module)
        lines.append(f"{model}: {unmapped:.1f} % of the layers' time is of no one module by its name")
    return lines


def _sums(layers: Sequence[LayerTime]) -> list[str]:
    return [f"{sum(one.us for one in layers) / 1000:.3f}", f"{100 * sum(one.share for one in layers):.1f}"]


def _short(name: str, most: int = 40) -> str:
    return name if len(name) <= most else f"...{name[3 - most :]}"


def _describe_routing(routing: Sequence[RoutedTime]) -> list[str]:
    """Return a line for the router, and one for each bucket to which it does not pay to route."""
    lines = []
    for first in (one for place, one in enumerate(routing) if one.batch not in {o.batch for o in routing[:place]}):
        lines.append(
            f"router, batch {first.batch}: {first.router_ms:.3f} ms, "
            f"{100 * first.router_ms / first.smallest_ms:.1f} % of stem and smallest bucket"
        )
    lines += [
        f"routed to {one.model}: {one.routed_ms:.3f} ms, and the largest bucket alone takes {one.largest_ms:.3f} ms: "
        "the router does not pay for it here"
        for one in routing
        if one.routed_ms >= one.largest_ms and one.smallest_ms != one.largest_ms
    ]
    return lines


def _describe_memory(memory: Sequence[MemoryUse]) -> list[str]:
    """Return a line for each process that was measured."""
    lines = []
    for use in memory:
        what = f"{len(use.buckets)} buckets" if len(use.buckets) > 1 else f"bucket {use.buckets[0]} alone"
        what += " with share_weights" if use.share_weights else ""
        lines.append(f"memory of a process that serves {what}: {use.held_mib:.0f} MiB held, {use.peak_mib:.0f} at most")
    return lines
