"""Whether a candidate meets the limits: always by the end of an interval that is against it."""

from __future__ import annotations

import math

import msgspec

from edgecomp.errors import InvalidSpec
from edgecomp.search.result import Agreement, Limits, Measured

__all__ = ["Verdict", "judge", "require_limits"]


class Verdict(msgspec.Struct, frozen=True):
    """What the limits say of a candidate.

    Attributes:
        load: the largest of latencies and energy over their limits; the candidate meets these where it is at most 1.
        excess: the same with the agreement's limit.
        misses: in words; empty where all are met.
    """

    load: float
    excess: float
    misses: tuple[str, ...]


def require_limits(
    *, max_p50_ms: float | None, max_p99_ms: float | None, max_energy_mj: float | None, min_agreement: float | None
) -> Limits:
    """Return the limits of a request.

    Raises:
        InvalidSpec: there is none of time or energy, or one is out of range.
    """
    given = {"--max-p50": max_p50_ms, "--max-p99": max_p99_ms, "--max-energy": max_energy_mj}
    for option, value in given.items():
        if value is not None and not 0 < value < math.inf:
            raise InvalidSpec(f"{option} {value:g} is not above 0; give milliseconds, or millijoules")
    if min_agreement is not None and not 0 < min_agreement <= 1:
        raise InvalidSpec(f"--min-agreement {min_agreement:g} is not above 0 and at most 1; 0.98 allows 2 % to differ")
    if all(value is None for value in given.values()):
        raise InvalidSpec("no limit was given; give --max-p50 MS, --max-p99 MS or --max-energy MJ, or several of them")
    return Limits(
        max_p50_ms=max_p50_ms, max_p99_ms=max_p99_ms, max_energy_mj=max_energy_mj, min_agreement=min_agreement
    )


def judge(measured: Measured, agreement: Agreement | None, limits: Limits) -> Verdict:
    """Hold a candidate to the limits.

    **A latency meets its limit when the upper end of its 95 % interval does.** Where so few samples bound a percentile
    by nothing, the largest sample stands for that end. An estimate is held to the upper end of its band, for p50 and
    p99 alike, since it knows of no tail. Energy has no interval and is held to its value; agreement likewise, since it
    is counted on all of the inputs and not drawn.
    """
    loads, misses = [], []
    for name, limit in (("p50", limits.max_p50_ms), ("p99", limits.max_p99_ms)):
        if limit is None:
            continue
        value_us, end_us, what = _end(measured, name)
        loads.append(end_us / 1000 / limit)
        if loads[-1] > 1:
            text = f"{name} {value_us / 1000:.3f} ms is above {limit:g}"
            if value_us / 1000 <= limit:
                text = f"{name} {value_us / 1000:.3f} ms is at most {limit:g}, {what} {end_us / 1000:.3f} is not"
            misses.append(text)
    if limits.max_energy_mj is not None and measured.energy_mj is not None:
        loads.append(measured.energy_mj / limits.max_energy_mj)
        if loads[-1] > 1:
            misses.append(f"energy {measured.energy_mj:.3f} mJ is above {limits.max_energy_mj:g}")
    excess = max(loads)
    least = limits.min_agreement
    if least is not None and (agreement is None or agreement.value < least):
        known = f"agreement {agreement.value:.4f}" if agreement is not None else "agreement that is unknown"
        misses.append(f"{known} is below {least:g}")
        excess = max(excess, least / max(agreement.value, 1e-6) if agreement is not None else 1e6)
    return Verdict(max(loads), excess, tuple(misses))


def _end(measured: Measured, name: str) -> tuple[float, float, str]:
    """Return a percentile, what is held to the limit, and what that is."""
    if measured.source == "estimated":
        figure = measured.p50_us
        return figure.value, figure.high if figure.high is not None else figure.value, "the upper end of the estimate"
    figure = measured.p50_us if name == "p50" or measured.p99_us is None else measured.p99_us
    if figure.high is not None:
        return figure.value, figure.high, "the upper end of its interval"
    return figure.value, measured.max_us or figure.value, "the largest of so few samples"
