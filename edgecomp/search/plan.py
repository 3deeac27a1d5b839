"""Which budgets to look at next: a few first, then between the two that bracket the limit, until nothing else can win.

The winner is the budget of highest agreement among those that meet the limits; of equal ones the fastest.
`next_budgets` is a function of what has been seen so far and nothing else, so that a search that was killed goes on as
if it had not been.

**The rules.** They rest on two things: more tokens are no faster, and more tokens agree no less. With `noise` e, a load
(a figure over its limit) that was measured lies within a factor 1 - e to 1 + e of one that grows with the budget. Then:

1. a budget above one whose load is above (1 + e) / (1 - e) cannot be measured at or below 1;
2. a budget below one that meets the limits cannot agree more;
3. a budget below one that agrees less than `min_agreement` cannot agree enough.

All others are looked at. With `ties`, of equal agreement the fewest tokens are sought, by halving: a share of images is
often the same for several budgets, a cosine never.

**What that promises.** Where both hold, what an exhaustive search would choose: the same agreement, and where several
budgets share it, a latency within (1 + e) / (1 - e) of the least. Where agreement goes up and down by d, an agreement
within 2 d of that (and no budget is overlooked that reaches `min_agreement` + 2 d). Where latency is not monotone
beyond the noise, no more than this: the winner was measured and meets the limits; `is_monotone` says that it is so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

__all__ = ["Seen", "Step", "best", "coarse", "is_monotone", "next_budgets"]


class Seen(msgspec.Struct, frozen=True):
    """What is known of a budget: load (at most 1: it meets latency and energy), agreement (none: unknown), latency."""

    load: float
    agreement: float | None
    latency_us: float


class Step(msgspec.Struct, frozen=True):
    """What to look at next, and why each of the others is left out.

    Attributes:
        budgets: to be measured now; empty at the end.
        skipped: of each that is left out, the rule and the budget that it rests on.
    """

    budgets: tuple[int, ...]
    skipped: dict[int, str]


def coarse(counts: Sequence[int]) -> tuple[int, ...]:
    """Return the few budgets to begin with: the ends and what lies between them, at most four."""
    if len(counts) <= 3:
        return tuple(counts)
    places: tuple[int, ...] = (0, len(counts) // 2, len(counts) - 1)
    if len(counts) >= 8:
        places = (0, len(counts) // 3, 2 * len(counts) // 3, len(counts) - 1)
    return tuple(counts[place] for place in places)


def next_budgets(
    counts: Sequence[int],
    seen: Mapping[int, Seen],
    *,
    refused: Sequence[int] = (),
    min_agreement: float = 0.0,
    noise: float = 0.05,
    width: int = 2,
    ties: bool = True,
    exhaustive: bool = False,
) -> Step:
    """Return what to look at next.

    Args:
        counts: the budgets, ascending.
        seen: of those that were measured.
        refused: those that cannot be exported or run.
        min_agreement: what the winner has to reach; 0: anything.
        noise: e above.
        width: budgets a step, since several in one export cost less, and several hosts share them.
        ties: seek the fewest tokens of equal agreement.
        exhaustive: look at all.
    """
    open_ = [count for count in counts if count not in seen and count not in refused]
    if exhaustive:
        return Step(tuple(open_[: max(width, 4)]), {})
    if not seen:
        first = [count for count in coarse([c for c in counts if c not in refused]) if count in open_]
        return Step(tuple(first), {})
    skipped = _skipped(open_, seen, min_agreement, noise)
    alive = [count for count in open_ if count not in skipped]
    if alive:
        return Step(_spread(alive, width), skipped)
    tied = _tied(open_, seen) if ties else []
    if tied:
        return Step((tied[len(tied) // 2],), {count: why for count, why in skipped.items() if count not in tied})
    return Step((), skipped)


def best(seen: Mapping[int, Seen], *, min_agreement: float = 0.0) -> int | None:
    """Return the budget that wins of those seen, or None where none meets the limits."""
    known = {count: -2.0 if one.agreement is None else one.agreement for count, one in seen.items()}
    met = [
        (-known[count], one.latency_us, count)
        for count, one in seen.items()
        if one.load <= 1 and (not min_agreement or known[count] >= min_agreement)
    ]
    return min(met)[2] if met else None


def is_monotone(seen: Mapping[int, Seen], *, noise: float = 0.05) -> bool:
    """Say whether the latencies seen can be those of one that grows with the budget, measured with such noise."""
    factor, most = (1 + noise) / (1 - noise), 0.0
    for count in sorted(seen):
        if seen[count].latency_us * factor < most:
            return False
        most = max(most, seen[count].latency_us)
    return True


def _skipped(open_: Sequence[int], seen: Mapping[int, Seen], min_agreement: float, noise: float) -> dict[int, str]:
    """Return the budgets that cannot win, with the rule."""
    factor = (1 + noise) / (1 - noise)
    met = max((count for count, one in seen.items() if one.load <= 1), default=None)
    # one above the limit below one that meets it proves rule 1 wrong there, so that nothing is left out by it
    slow = (count for count, one in seen.items() if one.load > factor and (met is None or count > met))
    above = min(slow, default=None)
    poor = max(
        (count for count, one in seen.items() if one.agreement is not None and one.agreement < min_agreement),
        default=None,
    )
    found = {}
    for count in open_:
        if above is not None and count > above:
            found[count] = f"m{above} is above the limit by more than noise, and more tokens are no faster"
        elif met is not None and count < met:
            found[count] = f"m{met} meets the limit, and fewer tokens agree no more"
        elif poor is not None and count < poor:
            found[count] = f"m{poor} agrees too little already, and fewer tokens agree no more"
    return found


def _tied(open_: Sequence[int], seen: Mapping[int, Seen]) -> list[int]:
    """Return the budgets that may agree as much as the best that meets the limits, with fewer tokens."""
    met = {count: one.agreement for count, one in seen.items() if one.load <= 1 and one.agreement is not None}
    if not met:
        return []
    top = max(met.values())
    fewest = min(count for count, agreement in met.items() if agreement == top)
    less = [
        count for count, one in seen.items() if count < fewest and one.agreement is not None and one.agreement < top
    ]
    return [count for count in open_ if max(less, default=0) < count < fewest]


def _spread(counts: Sequence[int], width: int) -> tuple[int, ...]:
    """Return `width` of them, evenly spread, so that what lies between is cut as small as it can be."""
    if len(counts) <= width:
        return tuple(counts)
    return tuple(dict.fromkeys(counts[(place + 1) * len(counts) // (width + 1)] for place in range(width)))
