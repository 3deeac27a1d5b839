"""What can be searched: budgets in steps that hardware likes, schedules, precisions, and baselines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from edgecomp.errors import InvalidSpec
from edgecomp.specs import BudgetRule
from edgecomp.specs.precision import PRECISIONS

__all__ = ["STEPS", "Family", "Subject", "budgets_of", "name_of", "precisions_of", "schedules_of"]

STEPS = (32, 16, 8, 4, 2, 1)
_ENOUGH = 8  # budgets that a step should leave
_TILE = {"fp32": 1, "fp16": 8, "bf16": 8, "int8": 16, "fp8": 16}  # rows that a tensor core's product takes at once
Role = Literal["candidate", "plain", "baseline"]


class Subject(msgspec.Struct, frozen=True):
    """What is searched, as far as it is known before anything is exported.

    Attributes:
        method, preset, placement, backbone: as an export would take them.
        image_size, feature_layer: likewise; 0 where there is no host.
        tokens_in: patch tokens in front of the compressor.
        rule: which counts the method can keep.
        schedules: that the method knows; its own default first; empty where it has none to choose.
        has_plain: whether there is an uncompressed model.
    """

    method: str
    preset: str
    placement: str
    backbone: str
    tokens_in: int
    rule: BudgetRule
    schedules: tuple[str, ...] = ()
    has_plain: bool = True
    image_size: int = 0
    feature_layer: int = 0


class Family(msgspec.Struct, frozen=True):
    """Candidates that differ in the budget alone: along them latency and agreement grow."""

    role: Role
    method: str
    precision: str
    schedule: str = ""

    @property
    def key(self) -> str:
        """A name for files and records."""
        return "-".join(part for part in (self.role, self.method, self.schedule, self.precision) if part)


def name_of(family: Family, count: int) -> str:
    """Return a candidate's name."""
    if family.role == "plain":
        return f"plain {family.precision}"
    return " ".join(part for part in (family.method, family.schedule, f"m{count}", family.precision) if part)


def budgets_of(
    subject: Subject, precisions: Sequence[str], *, asked: Sequence[int] = (), step: int = 0
) -> tuple[int, ...]:
    """Return the budgets to search, ascending; the uncompressed count is not one of them.

    Args:
        precisions: of the search; budgets are multiples of the rows that a tensor core takes in each of them (8 in fp16
            and bf16, 16 in int8 and fp8) where that leaves two or more.
        asked: these and no others.
        step: their distance, 8, 16 or 32; 0: the largest of 32, 16, 8, 4, 2, 1 that leaves eight or more.

    Raises:
        InvalidSpec: a budget is not possible, or none is left.
    """
    if asked:
        wrong = [count for count in asked if not subject.rule.allows(count) or not 1 <= count <= subject.tokens_in]
        if wrong:
            raise InvalidSpec(
                f"budget {wrong[0]} is not possible for {subject.method}: it must be {subject.rule}, and at most "
                f"{subject.tokens_in}"
            )
        return tuple(sorted(set(asked)))
    if subject.rule.choices:
        found = tuple(sorted(count for count in subject.rule.choices if count <= subject.tokens_in))
    else:
        tile = max(_TILE[word] for word in precisions)
        steps = (step,) if step else tuple(one for one in STEPS if one >= tile and len(_multiples(subject, one)) > 1)
        ways = [_multiples(subject, one) for one in steps or STEPS]
        found = next((way for way in ways if len(way) >= _ENOUGH), ways[-1])
    if not found:
        raise InvalidSpec(
            f"{subject.method} keeps {subject.rule}, of {subject.tokens_in} tokens, and no multiple of {step or 1} is "
            "among them; give another --step, or budgets with --budget"
        )
    return found


def precisions_of(asked: Sequence[str], default: str) -> tuple[str, ...]:
    """Return the precisions to try, the widest first; `all` stands for all of them."""
    words = set(asked) or {default}
    if "all" in words:
        return PRECISIONS
    wrong = sorted(words - set(PRECISIONS))
    if wrong:
        raise InvalidSpec(f"precision {wrong[0]!r} is none of {', '.join(PRECISIONS)}, all")
    return tuple(word for word in PRECISIONS if word in words)


def schedules_of(asked: Sequence[str], subject: Subject) -> tuple[str, ...]:
    """Return the schedules to search: those asked for, or the method's own; one empty word where it has none."""
    if not subject.schedules:
        if asked:
            raise InvalidSpec(f"--schedule {asked[0]}: {subject.method} has no schedules to choose from here; drop it")
        return ("",)
    if "all" in asked:
        return subject.schedules
    wrong = [word for word in asked if word not in subject.schedules]
    if wrong:
        raise InvalidSpec(f"schedule {wrong[0]!r} is none of {', '.join(subject.schedules)}, all")
    return tuple(dict.fromkeys(asked)) or subject.schedules[:1]


def _multiples(subject: Subject, step: int) -> tuple[int, ...]:
    return tuple(count for count in range(step, subject.tokens_in, step) if subject.rule.allows(count))
