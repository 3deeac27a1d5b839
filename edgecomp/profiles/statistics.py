"""Confidence intervals of 95 %: of a share, of the difference of two paired shares, of a median or a percentile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

__all__ = ["Estimate", "median_interval", "paired_drop", "percentile_ranks", "wilson"]

_Z = 1.959963984540054  # two-sided 95 % of the normal distribution
_TAIL = 0.025
_Figure = Annotated[float, Meta(ge=-1e15, le=1e15)]  # what a document that was edited cannot exceed


class Estimate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A figure with its 95 % confidence interval, `low` to `high`."""

    value: _Figure
    low: _Figure
    high: _Figure


def wilson(count: int, total: int) -> Estimate:
    """Return the share `count` / `total` with Wilson's score interval, which stays within 0 and 1.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    """
    if not 0 <= count <= total or not total:
        raise ValueError(f"{count} of {total} is no share")
    share, z2 = count / total, _Z * _Z
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    # the ends are exact where nothing, or everything, was counted; rounding would miss them by 1e-17
    return Estimate(share, 0.0 if count == 0 else centre - half, 1.0 if count == total else centre + half)


def paired_drop(lost: int, gained: int, total: int) -> Estimate:
    """Return how much lower the second of two accuracies on the same images is, with a paired interval.

    The value is (lost - gained) / total. Images that both get right, or both wrong, say nothing of the difference,
    so the interval is that of the paired differences: Bonett and Price's adjusted Wald interval, the normal
    approximation with one image added to each of the two discordant cells. It is centred a little nearer to 0 than
    the value, and has a width even where no image changed.

    Source: Bonett and Price, "Adjusted Wald confidence interval for a difference of binomial proportions based on
    paired data", J. Educational and Behavioral Statistics 37 (2012).

    Args:
        lost: images that the first gets right and the second wrong.
        gained: the other way round.
        total: all images.
    """
    if min(lost, gained) < 0 or lost + gained > total or not total:
        raise ValueError(f"{lost} lost and {gained} gained of {total} is no comparison")
    first, second = (lost + 1) / (total + 2), (gained + 1) / (total + 2)
    centre = first - second
    half = _Z * math.sqrt((first + second - centre * centre) / (total + 2))
    return Estimate((lost - gained) / total, max(-1.0, centre - half), min(1.0, centre + half))


def median_interval(samples: Sequence[float]) -> Estimate:
    """Return the median with the interval between two order statistics that covers it with at least 95 %.

    Nothing is assumed of the samples' distribution but that they are independent: the number of them below the
    median is binomial(n, 1/2). Fewer than 6 samples carry no such interval; least and greatest are given then.
    """
    if not samples:
        raise ValueError("no samples, so no median")
    ordered, n = sorted(samples), len(samples)
    middle = ordered[n // 2] if n % 2 else (ordered[n // 2 - 1] + ordered[n // 2]) / 2
    rank = _order_rank(n)
    return Estimate(middle, ordered[rank], ordered[n - 1 - rank])


def _order_rank(n: int) -> int:
    """Return the greatest k (from 0) for which at most k of n fair coins fall heads with a chance of 2.5 % or less."""
    below, k = 0.0, 0
    while k < n // 2:
        below += math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))
        if below > _TAIL:
            break
        k += 1
    return max(0, k - 1)


def percentile_ranks(count: int, percent: float) -> tuple[int | None, int | None]:
    """Return the ranks, from 0, of the two order statistics between which a percentile lies with at least 95 %.

    As for the median: the number of independent samples below the percentile is binomial(count, percent / 100). None
    where even the least, or the greatest, sample does not bound it on that side.
    """
    share = percent / 100
    spread = 12 * math.sqrt(count * share * (1 - share)) + 12
    first, last = max(0, math.floor(count * share - spread)), min(count, math.ceil(count * share + spread))
    whole, logs = math.lgamma(count + 1), (math.log(share), math.log1p(-share))
    below, low, high = 0.0, None, None
    for k in range(first, last + 1):
        # `below` is the chance that fewer than k samples lie below the percentile
        if below <= _TAIL and k:
            low = k - 1
        if below >= 1 - _TAIL and high is None and k:
            high = k - 1
        log = whole - math.lgamma(k + 1) - math.lgamma(count - k + 1) + k * logs[0] + (count - k) * logs[1]
        below += math.exp(log)
    return low, high
