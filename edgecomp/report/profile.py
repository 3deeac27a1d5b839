"""Latency of a bundle: the value, and the text that `edgecomp profile` prints."""

from __future__ import annotations

import msgspec

from edgecomp.profiles.latency import LatencyProfile
from edgecomp.report.text import table

__all__ = ["ProfileReport", "describe_profile"]


class ProfileReport(msgspec.Struct, frozen=True):
    """Latency of each bucket that was asked for, in the order of their graphs' names."""

    bundle: str
    profiles: tuple[LatencyProfile, ...]


def describe_profile(report: ProfileReport) -> str:
    """Return the text: percentiles for each graph, and the conditions they were measured under."""
    rows = []
    for p in report.profiles:
        marks = ["~" if name in p.indicative else "" for name in ("p90", "p99")]
        rows.append(
            [
                p.model,
                p.batch,
                f"{p.p50_us / 1000:.3f}",
                f"{p.p90_us / 1000:.3f}{marks[0]}",
                f"{p.p99_us / 1000:.3f}{marks[1]}",
                f"{p.mean_us / 1000:.3f}",
                f"{p.throughput_per_s:.1f}",
                p.num_samples,
                "" if p.is_steady else "warm-up did not settle",
            ]
        )
    first = report.profiles[0]
    machine = first.machine
    where = f"{machine.cpu}, {machine.cores} cores" + (f", {machine.gpu}" if machine.gpu else "")
    load = f"{machine.load_average[0]:.2f}" if machine.load_average else "unknown"
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    return "\n".join(
        [
            f"{report.bundle}: {first.runner}, {first.threads or 'its own choice of'} threads",
            f"on {where}; governor {machine.governor}, load {load}, {machine.os}, Python {machine.python}",
            f"with {versions}",
            "",
            table(["model", "batch", "p50 ms", "p90 ms", "p99 ms", "mean ms", "items/s", "samples", ""], rows),
            "~ indicative: so few samples do not carry this percentile (24,576 for p90, 270,336 for p99)",
            f"the timing loop itself costs {first.loop_overhead_us:.2f} us a run",
        ]
    )
