"""Whether a result is worse than another of the same model: the rule that `edgecomp results check` decides by.

Everything is written as worse over better, so that 1.05 is five per cent lost whatever the metric: times and memory
as they are, throughput upside down. With the limit L = 1 + the regression that is allowed:

* the interval's lower end above L: a regression, beyond noise;
* the value above L and the lower end not: within noise, which passes and is said;
* so few samples that the metric has no interval, or memory, which is one number: the value alone decides, and this is
  said. A gate that cannot tell fails rather than passes.
"""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

from edgecomp.errors import InvalidSpec
from edgecomp.profiles.latency import LatencyProfile
from edgecomp.profiles.ratios import Ratio, mean_ratio, unpaired_ratio
from edgecomp.profiles.result import Result

__all__ = ["METRICS", "Metric", "Pair", "Regression", "judge_pair", "matched", "read_share"]

Metric = Literal["p50", "p90", "p99", "throughput", "memory"]
METRICS: tuple[Metric, ...] = get_args(Metric)

_KEY = ("model", "role", "batch", "mode", "streams", "threads", "cuda_graph")


class Pair(msgspec.Struct, frozen=True):
    """A graph in two results: the baseline's profile, and the newer one."""

    old: LatencyProfile
    new: LatencyProfile


class Regression(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one graph's metric says.

    Attributes:
        model, mode, batch: which graph, and how it ran.
        old, new: the metric's values: milliseconds, items a second, or MiB.
        ratio: worse over better; below 1 it has become better. None for memory, which has no interval.
        change: `ratio.value`, or that of memory.
        verdict: `regression` fails; all others pass.
        why: how it was decided, in words.
    """

    model: str
    mode: str
    batch: int
    old: float
    new: float
    change: float
    ratio: Ratio | None
    verdict: Literal["regression", "within noise", "pass", "better"]
    why: str

    def __bool__(self) -> bool:
        return self.verdict != "regression"


def read_share(text: str) -> float:
    """Read a share such as `5%`.

    Raises:
        InvalidSpec: no percent sign, or no number from 0 to 1000.
    """
    number, sign, rest = text.strip().partition("%")
    try:
        share = float(number) / 100
    except ValueError:
        share = -1.0
    if not sign or rest or not 0 <= share <= 10:
        raise InvalidSpec(f"--max-regression {text}: give a share between 0% and 1000%, for example 5%")
    return share


def matched(old: Result, new: Result) -> tuple[tuple[Pair, ...], tuple[str, ...], tuple[str, ...]]:
    """Return graphs that both results timed in the same way, then what the old has alone, and what the new has."""
    mine, theirs = ({_key(profile): profile for profile in result.profiles} for result in (old, new))
    pairs = tuple(Pair(profile, theirs[key]) for key, profile in mine.items() if key in theirs)
    gone = tuple(_name(profile) for key, profile in mine.items() if key not in theirs)
    added = tuple(_name(profile) for key, profile in theirs.items() if key not in mine)
    return pairs, gone, added


def judge_pair(pair: Pair, metric: Metric, *, allowed: float) -> Regression:
    """Judge one graph by a metric.

    Args:
        allowed: the share that may be lost, from 0.

    Raises:
        InvalidSpec: a result does not hold the metric, or holds samples that are no times.
    """
    limit = 1 + allowed
    old, new, ratio, change = _values(pair, metric)
    if ratio is None or ratio.pace == "too few to tell":
        why = "one number without an interval" if ratio is None else _too_few(pair, metric)
        worse = change > limit
        return _row(pair, old, new, change, ratio, "regression" if worse else "pass", f"{why}: the value alone decides")
    if ratio.low > limit:
        return _row(pair, old, new, change, ratio, "regression", f"the interval lies above {limit:.3f}")
    if change > limit:
        return _row(pair, old, new, change, ratio, "within noise", f"above {limit:.3f}, the interval reaches below")
    return _row(pair, old, new, change, ratio, "better" if ratio.high < 1 else "pass", f"at most {limit:.3f}")


def _values(pair: Pair, metric: Metric) -> tuple[float, float, Ratio | None, float]:
    old, new = pair.old, pair.new
    if metric == "memory":
        sizes = [
            profile.device_peak_mib if profile.device_peak_mib is not None else profile.host_peak_mib
            for profile in (old, new)
        ]
        if sizes[0] is None or sizes[1] is None or sizes[0] <= 0:
            raise InvalidSpec(
                f"{_name(old)}: peak memory is {sizes[0] or 'unknown'} in the baseline and {sizes[1] or 'unknown'} in "
                "the result; measure both by `profile --budget N` (on Linux, of a run's first graph alone), or choose "
                "another --metric"
            )
        return sizes[0], sizes[1], None, sizes[1] / sizes[0]
    if metric == "throughput":
        rates = old.throughput_per_s, new.throughput_per_s
        if min(rates) <= 0:
            raise InvalidSpec(f"{_name(old)}: a throughput of {min(rates)} items a second is none; measure again")
        ratio = mean_ratio(new.samples_us, old.samples_us, value=rates[0] / rates[1])
        return *rates, ratio, ratio.value
    percent = float(metric.removeprefix("p"))
    ratio = unpaired_ratio(new.samples_us, old.samples_us, percent=percent)
    return old.percentiles[metric].us / 1000, new.percentiles[metric].us / 1000, ratio, ratio.value


def _too_few(pair: Pair, metric: Metric) -> str:
    return f"{min(pair.old.num_samples, pair.new.num_samples)} samples are too few for an interval of {metric}"


def _row(
    pair: Pair,
    old: float,
    new: float,
    change: float,
    ratio: Ratio | None,
    verdict: Literal["regression", "within noise", "pass", "better"],
    why: str,
) -> Regression:
    return Regression(pair.new.model, pair.new.mode, pair.new.batch, old, new, change, ratio, verdict, why)


def _key(profile: LatencyProfile) -> tuple[object, ...]:
    return (*(getattr(profile, name) for name in _KEY), profile.runner.partition(" ")[0])


def _name(profile: LatencyProfile) -> str:
    runner = profile.runner.partition(" ")[0]
    return f"{profile.model} (batch {profile.batch}, {profile.mode}, {runner}, {profile.threads or 'any'} threads)"
