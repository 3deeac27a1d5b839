"""What a loaded model counts of its requests; cheap enough to stay on."""

from __future__ import annotations

import math
import threading
from collections import Counter, deque
from collections.abc import Sequence

import msgspec

__all__ = ["BucketStats", "Recorder", "Stats"]

_REMEMBERED = 4096  # latencies of each bucket, the newest
_QUANTILES = (0.5, 0.9, 0.99)


class BucketStats(msgspec.Struct, frozen=True):
    """Requests that one bucket served.

    Attributes:
        requests: how many.
        share: of all requests.
        seconds: latency by quantile ("0.5", "0.9", "0.99") over the newest 4096 requests, from the call until the
            bucket had answered, so that a batch's later buckets wait for its earlier ones; empty before the first.
    """

    requests: int
    share: float
    seconds: dict[str, float]


class Stats(msgspec.Struct, frozen=True):
    """What was counted since the model was loaded, or `reset_stats` was called.

    Attributes:
        requests: served in all.
        buckets: by tokens kept, each bucket that there is.
        routed: requests that the router was asked about.
        router_seconds: quantiles of what the router itself took for each, without the stem that its bucket needs too; a
            batch's time is divided by its requests. Empty where none was routed.
        resident: buckets whose graph is loaded now.
        loads: how often a bucket's graph was loaded; above the number of buckets, `resident` is too small.
    """

    requests: int
    buckets: dict[int, BucketStats]
    routed: int
    router_seconds: dict[str, float]
    resident: tuple[int, ...]
    loads: int

    def metrics(self) -> dict[str, float]:
        """Return the same as flat samples, in the names that a metrics exporter takes."""
        found: dict[str, float] = {"edgecomp_loads_total": self.loads, "edgecomp_resident_buckets": len(self.resident)}
        found["edgecomp_routed_total"] = self.routed
        for quantile, seconds in self.router_seconds.items():
            found[f'edgecomp_router_seconds{{quantile="{quantile}"}}'] = seconds
        for tokens, bucket in self.buckets.items():
            found[f'edgecomp_requests_total{{bucket="{tokens}"}}'] = bucket.requests
            for quantile, seconds in bucket.seconds.items():
                found[f'edgecomp_request_seconds{{bucket="{tokens}",quantile="{quantile}"}}'] = seconds
        return found


class Recorder:
    """Counts requests of several threads."""

    def __init__(self, buckets: Sequence[int]) -> None:
        self._lock, self._buckets = threading.Lock(), buckets
        self.reset()

    def reset(self) -> None:
        """Forget what was counted."""
        with self._lock:
            self._requests: Counter[int] = Counter()
            self._seconds: dict[int, deque[float]] = {}
            self._loads = 0
            self._routed = 0
            self._route_seconds: deque[float] = deque(maxlen=_REMEMBERED)

    def count_route(self, requests: int, seconds: float) -> None:
        """Count requests that the router was asked about together, and what that took for each of them."""
        with self._lock:
            self._routed += requests
            self._route_seconds.extend([seconds / requests] * requests)

    def count(self, tokens: int, requests: int, seconds: float) -> None:
        """Count requests that a bucket served together, and what each of them waited."""
        with self._lock:
            self._requests[tokens] += requests
            kept = self._seconds.get(tokens)
            if kept is None:
                kept = self._seconds[tokens] = deque(maxlen=_REMEMBERED)
            kept.extend([seconds] * requests)

    def count_load(self) -> None:
        """Count a graph that was loaded."""
        with self._lock:
            self._loads += 1

    def stats(self, resident: Sequence[int]) -> Stats:
        """Return what was counted."""
        with self._lock:
            requests, seconds = dict(self._requests), {key: sorted(kept) for key, kept in self._seconds.items()}
            loads, routed, route_seconds = self._loads, self._routed, sorted(self._route_seconds)
        total = sum(requests.values())
        buckets = {
            tokens: BucketStats(
                requests.get(tokens, 0), requests.get(tokens, 0) / max(1, total), _quantiles(seconds.get(tokens, []))
            )
            for tokens in self._buckets
        }
        return Stats(total, buckets, routed, _quantiles(route_seconds), tuple(resident), loads)


def _quantiles(ordered: Sequence[float]) -> dict[str, float]:
    """Return quantiles by the nearest rank."""
    if not ordered:
        return {}
    return {str(q): ordered[max(0, math.ceil(q * len(ordered)) - 1)] for q in _QUANTILES}
