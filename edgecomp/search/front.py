"""The Pareto front of latency against agreement."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["dominators", "front"]


def front(points: Mapping[str, tuple[float, float]]) -> tuple[str, ...]:
    """Return the names that no other dominates, fastest first.

    Args:
        points: latency and agreement by name. One dominates another where it is no slower and agrees no less, and is
            better in one of both; equal points stand beside each other.
    """
    kept: list[str] = []
    best, best_at = -float("inf"), float("inf")
    for name in sorted(points, key=lambda one: (points[one][0], -points[one][1])):
        latency, agreement = points[name]
        if agreement > best or (agreement == best and latency == best_at):
            kept.append(name)
            best, best_at = agreement, latency
    return tuple(kept)


def dominators(points: Mapping[str, tuple[float, float]]) -> dict[str, tuple[str, ...]]:
    """Return for each name those of the front that dominate it, fastest first; none for the front itself."""
    members = front(points)
    found = {}
    for name, (latency, agreement) in points.items():
        found[name] = tuple(
            other
            for other in members
            if points[other][0] <= latency and points[other][1] >= agreement and points[other] != (latency, agreement)
        )
    return found
