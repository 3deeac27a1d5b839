"""What a search knows of its candidates, and which of them wins."""

from __future__ import annotations

import msgspec

from edgecomp.search.limits import Verdict, judge
from edgecomp.search.plan import Seen
from edgecomp.search.result import Agreement, Limits, Measured
from edgecomp.search.space import Family, name_of

__all__ = ["Board", "Known"]


class Known(msgspec.Struct):
    """What is known of one candidate.

    Attributes:
        family, tokens: what it is.
        measured, agreement: none while unknown; `is_judged` tells an agreement that cannot be told from one unknown.
        flops: of a run.
        bundle: name of the bundle's folder; "" while it is not exported.
        refused, skipped: why it cannot be, and the rule that leaves it out.
    """

    family: Family
    tokens: int
    measured: Measured | None = None
    agreement: Agreement | None = None
    is_judged: bool = False
    flops: int = 0
    bundle: str = ""
    refused: str = ""
    skipped: str = ""

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to find out."""
        return bool(self.refused) or (self.measured is not None and self.is_judged)

    @property
    def is_another_network(self) -> bool:
        """Whether it is a plain model that has nothing to do with the method's weights, there for its latency alone."""
        return self.family.role == "plain" and self.is_judged and self.agreement is None


class Board:
    """All candidates by name, held to the limits."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.known: dict[str, Known] = {}

    def of(self, family: Family, count: int) -> Known:
        """Return a candidate, which is new where nothing was known of it."""
        return self.known.setdefault(name_of(family, count), Known(family, count))

    def verdict(self, one: Known) -> Verdict | None:
        """Return what the limits say of it; none while it is not measured."""
        return judge(one.measured, one.agreement, self.limits) if one.measured is not None else None

    def seen(self, family: Family) -> dict[int, Seen]:
        """Return a family as the plan sees it."""
        found = {}
        for one in self.known.values():
            verdict = self.verdict(one)
            if one.family == family and verdict is not None and one.measured is not None and not one.refused:
                agreement = one.agreement.value if one.agreement is not None else None
                found[one.tokens] = Seen(verdict.load, agreement, one.measured.p50_us.value)
        return found

    def refused(self, family: Family) -> tuple[int, ...]:
        """Return the budgets of a family that cannot be."""
        return tuple(one.tokens for one in self.known.values() if one.family == family and one.refused)

    def wins_outright(self, one: Known) -> bool:
        """Whether a plain model meets all limits and agrees with the reference as that does with itself."""
        verdict = self.verdict(one)
        agrees = one.agreement is not None and one.agreement.value >= 1
        return one.family.role == "plain" and not one.refused and verdict is not None and not verdict.misses and agrees

    def winner(self) -> str:
        """Return the one that meets all limits and agrees most; of equal ones the plain model, then the fastest."""
        met = []
        for name, one in self._eligible():
            verdict = self.verdict(one)
            if verdict is not None and not verdict.misses and one.measured is not None:
                agreement = one.agreement.value if one.agreement is not None else -2.0
                met.append((-agreement, one.family.role != "plain", one.measured.p50_us.value, name))
        return min(met)[3] if met else ""

    def closest(self) -> str:
        """Return the one that misses the limits by least; "" where nothing was measured."""
        found = [(verdict.excess, name) for name, one in self._eligible() if (verdict := self.verdict(one)) is not None]
        return min(found)[1] if found else ""

    def tokens_of_interest(self) -> int:
        """Return the budget at which baselines are compared: the winner's or the closest's; 0 where there is none."""
        one = self.known.get(self.winner() or self.closest())
        if one is not None and one.family.role != "plain":
            return one.tokens
        return max(
            (one.tokens for _, one in self._eligible() if one.family.role != "plain" and one.measured), default=0
        )

    def _eligible(self) -> list[tuple[str, Known]]:
        return [
            (name, one)
            for name, one in self.known.items()
            if one.family.role != "baseline" and not one.is_another_network and not one.refused
        ]
