"""How much longer one takes than another, with a 95 % interval: paired by rounds, or of two runs apart from each other.

* **Paired** (`paired_ratio`): both had a turn in every round, so that each round gives a ratio that the machine's drift
  has no part in. The value is the median of these ratios, the interval lies between two order statistics of them
  (binomial, distribution-free).
* **Unpaired** (`unpaired_ratio`): two runs at different times. The value is the ratio of the two percentiles, the
  interval that of its bootstrap with a fixed seed. It knows the scatter inside each run, and nothing of what changed
  between them.

"no difference" is what an interval says that holds 1. Fewer than `LEAST` rounds or samples carry no interval, and then
nothing is said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from edgecomp.errors import InvalidSpec
from edgecomp.profiles.statistics import Estimate, median_interval, percentile_ranks

__all__ = ["LEAST", "Pace", "Ratio", "carries_interval", "mean_ratio", "paired_ratio", "unpaired_ratio"]

LEAST = 6
"""Rounds or samples below which a median has no 95 % interval by order statistics: 2 (1/2)^5 is above 5 %."""

_RESAMPLES = 10_000
_SEED = 0
_Z = 1.959963984540054

Pace = Literal["faster", "slower", "no difference", "too few to tell"]


class Ratio(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Time over the base's time.

    Attributes:
        value: below 1 it is faster than the base.
        low, high: 95 % confidence interval; with too few samples the least and the greatest seen.
        pace: `faster` and `slower` where the interval lies on one side of 1, `no difference` where it holds 1.
        way: `paired` or `unpaired`.
        count: rounds, or samples of the one that has fewer.
    """

    value: float
    low: float
    high: float
    pace: Pace
    way: Literal["paired", "unpaired"]
    count: int


def paired_ratio(own: Sequence[float], base: Sequence[float]) -> Ratio:
    """Return the median over rounds of one time over the other, with the interval of that median."""
    if len(own) != len(base) or not own:
        raise InvalidSpec(f"{len(own)} and {len(base)} rounds cannot be paired; both must have had every round")
    _require_times(own, base)
    found = median_interval([a / b for a, b in zip(own, base, strict=True)])
    return _judge(found, "paired", len(own), enough=len(own) >= LEAST)


def unpaired_ratio(own: Sequence[float], base: Sequence[float], *, percent: float = 50.0) -> Ratio:
    """Return the ratio of two percentiles by nearest rank, with its bootstrap interval.

    A percentile of a resample is an order statistic of uniform numbers, and these are beta-distributed: so no sample is
    drawn, and a million of them cost what ten do.
    """
    if not own or not base:
        raise InvalidSpec(f"{len(own)} and {len(base)} samples: there is nothing to compare; measure again")
    _require_times(own, base)
    a, b = np.sort(np.asarray(own, np.float64)), np.sort(np.asarray(base, np.float64))
    chance = np.random.default_rng(_SEED)
    ratios = _resampled(a, percent, chance) / _resampled(b, percent, chance)
    low, high = np.quantile(ratios, (0.025, 0.975))
    value = float(a[_rank(len(a), percent)] / b[_rank(len(b), percent)])
    enough = carries_interval(len(a), percent) and carries_interval(len(b), percent)
    if not enough:
        low, high = a[0] / b[-1], a[-1] / b[0]
    return _judge(Estimate(value, float(low), float(high)), "unpaired", min(len(a), len(b)), enough=enough)


def mean_ratio(own: Sequence[float], base: Sequence[float], *, value: float) -> Ratio:
    """Return a ratio of mean times, or of throughputs, with the interval of the two means (normal, of its logarithm).

    Args:
        own, base: the times that the means are of.
        value: the ratio itself, which a throughput of several streams gives and their times do not.
    """
    if not own or not base:
        raise InvalidSpec(f"{len(own)} and {len(base)} samples: there is nothing to compare; measure again")
    _require_times(own, base)
    spread = 0.0
    for samples in (np.asarray(own, np.float64), np.asarray(base, np.float64)):
        if len(samples) > 1:
            spread += float(samples.var(ddof=1)) / len(samples) / float(samples.mean()) ** 2
    factor = math.exp(_Z * math.sqrt(spread))
    found = Estimate(value, value / factor, value * factor)
    count = min(len(own), len(base))
    return _judge(found, "unpaired", count, enough=count >= LEAST)


def carries_interval(count: int, percent: float) -> bool:
    """Say whether so many samples bound a percentile on both sides with 95 %."""
    return None not in percentile_ranks(count, percent)


def _judge(found: Estimate, way: Literal["paired", "unpaired"], count: int, *, enough: bool) -> Ratio:
    pace: Pace = "faster" if found.high < 1 else "slower" if found.low > 1 else "no difference"
    return Ratio(found.value, found.low, found.high, pace if enough else "too few to tell", way, count)


def _rank(count: int, percent: float) -> int:
    return math.ceil(percent * count / 100) - 1


def _resampled(
    ordered: npt.NDArray[np.float64], percent: float, chance: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Return the percentile of each of many resamples, with replacement, of sorted samples."""
    count, rank = len(ordered), _rank(len(ordered), percent)
    places = chance.beta(rank + 1, count - rank, _RESAMPLES)
    return ordered[np.minimum((places * count).astype(np.int64), count - 1)]


def _require_times(own: Sequence[float], base: Sequence[float]) -> None:
    wrong = [value for value in (*own, *base) if not (math.isfinite(value) and value > 0)]
    if wrong:
        raise InvalidSpec(f"{len(wrong)} of {len(own) + len(base)} samples are no times: {wrong[0]}; measure again")
