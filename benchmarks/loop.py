"""What the timing loop of `edgecomp profile` costs an iteration, in each mode, around a runner that does nothing.

    python benchmarks/loop.py [--rounds 5] [--json FILE]

"in the loop" is what a profile states as its own overhead: the median sample of a callable that does nothing. "around
it" is all else of an iteration, from one run's end to the next one's beginning: wall time of the loop less the sum of
its samples. A watch over the device's state runs meanwhile, as in a profile. Reach: both together 20 us in the mode
single-stream.
"""

from __future__ import annotations

import statistics

from common import parse, publish

from edgecomp.profiles.latency import Mode, measure_latency
from edgecomp.profiles.monitor import Monitor

_RUNS = 20_000


def main() -> None:
    """Measure and print."""
    options = parse(__doc__ or "", rounds=(int, 5, "rounds"))
    runs = 2_000 if options.quick else _RUNS
    modes: list[tuple[Mode, int]] = [("single-stream", 1), ("multi-stream", 2), ("multi-stream", 4), ("offline", 1)]
    rows: list[list[object]] = []
    for mode, streams in modes:
        inside, around, tail = [], [], []
        for _ in range(options.rounds):
            one = measure_latency(
                _nothing,
                others=[_nothing] * (streams - 1),
                batch=1,
                mode=mode,
                duration_s=0,
                min_runs=runs,
                max_runs=runs,
                watch=Monitor(),
            )
            inside.append(one.p50_us)
            around.append((one.duration_s * 1e6 - sum(one.samples_us)) / one.num_samples)
            tail.append(one.percentiles["p99"].us)
        columns = (statistics.median(values) for values in (inside, around, tail))
        rows.append([mode, streams, *(f"{value:.2f}" for value in columns)])
    header = ["mode", "streams", "in the loop us", "around it us", "p99 in the loop us"]
    publish("The timing loop, around a runner that does nothing", header, rows, options.json)


def _nothing() -> None:
    """Do nothing."""


if __name__ == "__main__":
    main()
