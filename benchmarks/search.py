"""What a search costs over its measuring, and what it spares against measuring every budget.

    python benchmarks/search.py [--method tome] [--backbone vit_small_patch16_224] [--duration 30] [--json FILE]

Whole calls of `api.search`, as users wait for them: torch is imported, models are exported, compared and measured.
The limit is three quarters of the uncompressed model's median, so that a budget in the middle wins.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from common import parse, publish

from edgecomp import api
from edgecomp.search.result import SearchResult

_ENOUGH_MS = 1e6  # a limit that the uncompressed model meets, so that nothing else is measured


def main() -> None:
    """Search twice, and print."""
    options = parse(
        __doc__ or "",
        method=(str, "tome", "the method"),
        backbone=(str, "vit_small_patch16_224", "the host"),
        preset=(str, "", "a named size"),
        duration=(float, 30.0, "seconds for each candidate"),
        threads=(int, 1, "of the runtime"),
    )
    given: dict[str, Any] = {"backbone": options.backbone, "preset": options.preset, "threads": options.threads}
    duration_s = options.duration
    if options.quick:
        given |= {"backbone": "", "preset": "smoke", "step": 4}
        duration_s = 0.3
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as folder:
        first = _search(options.method, Path(folder) / "plain", given, _ENOUGH_MS, min(3.0, duration_s), False)[0]
        plain = next(row for row in first.rows if row.role == "plain")
        assert plain.measured is not None
        limit = 0.75 * plain.measured.p50_us.value / 1000
        for name, exhaustive in (("coarse to fine", False), ("every budget", True)):
            found, seconds = _search(options.method, Path(folder) / name, given, limit, duration_s, exhaustive)
            measured = [row for row in found.rows if row.measured is not None]
            budgets = sum(row.role == "candidate" for row in found.rows)
            rows.append(
                [
                    name, budgets, len(measured), f"{found.measuring_s:.0f}", f"{seconds:.0f}",
                    f"{seconds / found.measuring_s:.2f}", found.winner or found.closest,
                ]
            )  # fmt: skip
    title = f"search of {options.method}, p50 at most {limit:.1f} ms, {duration_s:g} s a candidate"
    header = ["way", "budgets", "measured", "measuring s", "all s", "over measuring", "winner"]
    publish(title, header, rows, options.json)


def _search(
    method: str, out: Path, given: dict[str, Any], limit_ms: float, duration_s: float, exhaustive: bool
) -> tuple[SearchResult, float]:
    started = time.perf_counter()
    found = api.search(
        method, **given, max_p50_ms=limit_ms, duration_s=duration_s, exhaustive=exhaustive, out=out, progress=print
    )
    assert isinstance(found, SearchResult)
    return found, time.perf_counter() - started


if __name__ == "__main__":
    main()
