"""Token budgets: how many tokens go in and how many are kept."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from edgecomp.errors import InvalidSpec

__all__ = ["BudgetRule", "TokenBudget", "parse_budget", "read_count"]

Count = Annotated[int, Meta(ge=1)]
_ANY = 1 << 20  # tokens; more than any encoder has


class TokenBudget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One static bucket: `tokens_in` tokens become `tokens_out`.

    Prefix tokens (class, distillation, registers) are counted in neither number.
    """

    tokens_in: Count
    tokens_out: Count
    num_prefix_tokens: Annotated[int, Meta(ge=0)] = 0

    @property
    def keep_ratio(self) -> float:
        """Tokens out over tokens in, M / N."""
        return self.tokens_out / self.tokens_in

    @property
    def compression(self) -> float:
        """Tokens in over tokens out, N / M."""
        return self.tokens_in / self.tokens_out


class BudgetRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which token counts a method can be exported for: `choices`, or `minimum` to `maximum`.

    Attributes:
        told: for `list methods`, where a grid allows some of these only; "": the counts themselves.
    """

    default: tuple[Count, ...]
    choices: tuple[Count, ...] = ()
    minimum: Count = 1
    maximum: Count = _ANY
    told: str = ""

    def __post_init__(self) -> None:
        if not self.default:
            raise ValueError("budgets.default is empty")
        for count in self.default:
            if not self.allows(count):
                raise ValueError(f"budgets.default holds {count}, which is not {self}")

    def allows(self, count: int) -> bool:
        """Say whether `count` tokens can be kept."""
        return count in self.choices if self.choices else self.minimum <= count <= self.maximum

    def narrowed(self, possible: tuple[int, ...]) -> BudgetRule:
        """Return the rule whose choices are those of `possible` that this one allows; where there are none, itself.

        Where none of the defaults is a choice, the next one below is, and not the largest, which may compress nothing.

        Args:
            possible: in ascending order.
        """
        choices = tuple(count for count in possible if self.allows(count))
        if not choices:
            return self
        default = tuple(count for count in self.default if count in choices)
        if not default:
            below = [count for count in choices[:-1] if count < min(self.default)]
            default = (below[-1] if below else choices[0],)
        return BudgetRule(default, choices)

    def __str__(self) -> str:
        if self.choices:
            return "one of " + ", ".join(map(str, self.choices))
        if self.maximum == _ANY:
            return f"at least {self.minimum}"
        return f"from {self.minimum} to {self.maximum}"


def read_count(text: str, *, tokens_in: int) -> int:
    """Read `"49"`, or `"25%"` of `tokens_in`, as a count.

    A percentage is rounded to the nearest count, halves to even as Python's `round` does, and at least 1.
    """
    number = text.strip()
    try:
        if not number.endswith("%"):
            return int(number)
        share = float(number[:-1])
    except ValueError:
        raise InvalidSpec(
            f"budget {text!r} is neither a count nor a percentage; write for example --budget 49 or --budget 25%"
        ) from None
    if not 0 < share <= 100:
        raise InvalidSpec(f"budget {text!r} is not above 0% and at most 100%; give the share of tokens kept")
    return max(1, round(share / 100 * tokens_in))


def parse_budget(text: str, *, tokens_in: int, rule: BudgetRule, method: str, hint: str = "") -> TokenBudget:
    """Read `"49"` (tokens kept) or `"25%"` (share of tokens kept) as a budget that `rule` allows.

    A percentage is read as `read_count` does.

    Args:
        hint: ends the refusal of a count that the rule does not allow.
    """
    count = read_count(text, tokens_in=tokens_in)
    asked = f"{text} of {tokens_in} = {count}" if text.strip().endswith("%") else str(count)
    if count > tokens_in:
        raise InvalidSpec(
            f"budget {asked} is above the {tokens_in} tokens that go into {method}; a budget is what is KEPT"
        )
    if not rule.allows(count):
        raise InvalidSpec(f"budget {asked} is not possible for {method}; it must be {rule}{hint}")
    return TokenBudget(tokens_in=tokens_in, tokens_out=count)
