"""Where the thresholds of a router lie, so that a target holds on given images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["assign", "candidates", "choose", "one_for_all"]

Needs = npt.NDArray[np.float32]
Places = npt.NDArray[np.int64]
_MOST_STEPS = 2000
_ABOVE_ONE = float(np.nextafter(np.float32(1.0), np.float32(2.0)))


def assign(needs: Needs, thresholds: Sequence[float]) -> Places:
    """Return the bucket of each image, as a router does: the count of k with need[k] >= thresholds[k].

    Args:
        needs: (images, K - 1).
    """
    places: Places = (needs >= np.asarray(thresholds, np.float32)).sum(1)
    return places


def candidates(needs: Needs) -> list[tuple[float, ...]]:
    """Return thresholds from those that send every image to the smallest bucket to those for the largest.

    One number moves them all: bucket k of K begins at the quantile k / K of the images' needs, and all quantiles shift
    together. A step sends at most a few images higher, and none lower.
    """
    images, cuts = needs.shape
    edges = _edges(needs)
    found = []
    steps = min(2 * images, _MOST_STEPS)
    for step in range(steps + 1):
        shares = (np.arange(cuts) + 1) / (cuts + 1) + 1 - 2 * step / steps
        below = np.floor(np.clip(shares, 0, 1) * images + 0.5).astype(int)  # so many images stay below each threshold
        found.append(tuple(float(np.float32(edges[below[k], k])) for k in range(cuts)))
    return list(dict.fromkeys(found))


def one_for_all(needs: Needs) -> list[tuple[float, ...]]:
    """Return for each bucket the thresholds that send every image to it."""
    images, cuts = needs.shape
    edges = _edges(needs)
    return [
        tuple(float(np.float32(edges[0 if k < place else images, k])) for k in range(cuts)) for place in range(cuts + 1)
    ]


def _edges(needs: Needs) -> npt.NDArray[np.float64]:
    """Return what lies below all needs (half the least), between each two, and above all (half-way to 1)."""
    ordered = np.sort(needs.astype(np.float64), axis=0)
    low, high = ordered[:1] / 2, (ordered[-1:] + 1) / 2
    above = np.where(high > ordered[-1:], high, _ABOVE_ONE)
    return np.concatenate([low, (ordered[:-1] + ordered[1:]) / 2, above])


def choose(needs: Needs, holds: Callable[[Places], bool], *, most: bool) -> tuple[float, ...] | None:
    """Return the candidate with the most (or fewest) tokens for which `holds` says yes; none where there is none.

    One bucket for all is what is left when no split between buckets holds: with a latency, which need not grow with
    the tokens.
    """
    splits, single = candidates(needs), one_for_all(needs)
    for thresholds in (*reversed(splits), *reversed(single)) if most else (*splits, *single):
        if holds(assign(needs, thresholds)):
            return thresholds
    return None
