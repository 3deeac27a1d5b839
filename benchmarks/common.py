"""What the benchmarks share: where results go, the machine's description, interleaved medians."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from edgecomp.profiles.machine import read_machine
from edgecomp.report.text import table

__all__ = ["interleave", "parse", "publish"]


def parse(description: str, **flags: tuple[type, Any, str]) -> argparse.Namespace:
    """Read `--json FILE`, `--quick` and a benchmark's own flags."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, default=None, help="write the figures here too")
    parser.add_argument("--quick", action="store_true", help="few rounds: to see that it works, not to quote")
    for name, (kind, default, text) in flags.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=text)
    return parser.parse_args()


def interleave(runs: Mapping[str, Callable[[], object]], *, rounds: int, repeats: int = 1) -> dict[str, list[float]]:
    """Time each callable in turn, A B C A B C, so that the machine's drift meets all alike; each turn warms up first.

    Args:
        runs: callables by name; each is called twice before the first round.
        rounds: how many times round.
        repeats: calls in each turn; their mean is one sample.

    Returns:
        milliseconds of each round, by name.
    """
    for run in runs.values():
        run()
        run()
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            time.sleep(0.2)  # threads of the run before spin for a while, and would take a core from this one
            run()
            started = time.perf_counter_ns()
            for _ in range(repeats):
                run()
            samples[name].append((time.perf_counter_ns() - started) / repeats / 1e6)
    return samples


def ratio(samples: Mapping[str, list[float]], name: str, base: str) -> float:
    """Return the median over rounds of one time over another, pair by pair."""
    return statistics.median(a / b for a, b in zip(samples[name], samples[base], strict=True))


def publish(title: str, header: list[str], rows: list[list[object]], path: Path | None) -> None:
    """Print a table, and write it with the machine's description where a path is given."""
    print(f"{title}\n\n{table(header, rows)}\n")
    if path is not None:
        machine = msgspec.to_builtins(read_machine())
        document = {"title": title, "machine": machine, "rows": [dict(zip(header, row, strict=True)) for row in rows]}
        path.write_text(json.dumps(document, indent=1) + "\n")
        print(f"written to {path}")
