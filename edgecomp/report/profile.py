"""Latency of a bundle: the value, and the text that `edgecomp profile` prints."""

from __future__ import annotations

from collections.abc import Sequence

from edgecomp.profiles.latency import Percentile
from edgecomp.profiles.result import MemoryUse, Result, RoutedTime
from edgecomp.report.text import table

__all__ = ["describe_profile"]


def describe_profile(result: Result) -> str:
    """Return the text: percentiles for each graph, and the conditions they were measured under."""
    rows = []
    for p in result.profiles:
        p90, p99 = (p.percentiles[name] for name in ("p90", "p99"))
        rows.append(
            [
                p.model,
                p.batch,
                f"{p.p50_us / 1000:.3f}",
                _percentile(p90),
                _percentile(p99),
                f"{p.mean_us / 1000:.3f}",
                f"{p.throughput_per_s:.1f}",
                p.num_samples,
                "" if p.is_steady else "warm-up did not settle",
            ]
        )
    first = result.profiles[0]
    machine = result.machine
    where = f"{machine.cpu}, {machine.cores} cores" + (f", {machine.gpu}" if machine.gpu else "")
    load = f"{machine.load_average[0]:.2f}" if machine.load_average else "unknown"
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    return "\n".join(
        [
            f"{result.subject.name}: {first.runner}, {first.threads or 'its own choice of'} threads",
            f"on {where}; governor {machine.governor}, load {load}, {machine.os}, Python {machine.python}",
            f"with {versions}",
            "",
            table(["model", "batch", "p50 ms", "p90 ms", "p99 ms", "mean ms", "items/s", "samples", ""], rows),
            "~ indicative: so few samples do not carry this percentile (24,576 for p90, 270,336 for p99)",
            f"the timing loop itself costs {first.loop_overhead_us:.2f} us a run",
            *_describe_routing(result.routing),
            *_describe_memory(result.memory),
            *(
                f"{model}: {result.subject.precision} in the file; ONNX Runtime runs its matrix products in "
                + ", ".join(f"{dtype} ({count})" for dtype, count in products.items())
                for model, products in result.types.items()
            ),
        ]
    )


def _percentile(one: Percentile) -> str:
    return f"{one.us / 1000:.3f}{'~' if one.is_indicative else ''}"


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
