"""Before anybody trains: would fewer tokens help on this device at this batch, and by how much at which count?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from edgecomp.errors import InvalidSpec
from edgecomp.estimates.applied import Applied, applied_for
from edgecomp.estimates.efficiency import modelled_us, shipped_fit
from edgecomp.estimates.project import blocks_of, with_fewer_tokens
from edgecomp.estimates.roofline import Estimate, estimate_graph, load_of, prepare
from edgecomp.specs.costs import LARGEST, Amount, GraphCosts, Whole
from edgecomp.specs.target import Precision, Target

__all__ = ["GoNoGo", "GoRow", "Reach", "go_no_go"]

_SHARES = (0.75, 0.5, 0.25)
_BATCHES = (1, 8, 32)
_WORDS: tuple[Precision, ...] = ("fp16", "int8", "fp8")
_STEP = 8  # kept counts are multiples of it
_HELPS, _LITTLE = 1.2, 1.05


class Reach(msgspec.Struct, frozen=True):
    """A count of kept tokens.

    Attributes:
        us: of a run.
        faster: over all tokens, at best: choosing and moving them costs nothing here.
        low, high: the least and the most that other fits of the same published rows say of `faster`.
    """

    tokens: Whole
    us: Amount
    faster: Amount
    low: Amount
    high: Amount


class GoRow(msgspec.Struct, frozen=True):
    """A precision and a batch.

    Attributes:
        us: with all tokens; `busy_share` of it is work that fewer tokens can shorten: neither launches, nor weights
            that are read anyway, nor products too small to fill the chip.
        bound: of the plain model.
    """

    precision: str
    batch: Whole
    us: Amount
    bound: str
    busy_share: Amount
    reach: Annotated[tuple[Reach, ...], Meta(min_length=1)]


class GoNoGo(msgspec.Struct, frozen=True):
    """The answer.

    Attributes:
        verdict: of the precision and batch that were asked for, at half of the tokens: `go` from 1.2 times faster on,
            `little` from 1.05 on, else `no`.
        sentence: the answer and its reason.
        tokens, behind, blocks: the sequence, and behind how many of its blocks the cut stands.
        overhead_us: what a method may take at most, at half of the tokens, before it is slower than the plain model.
        skipped: precisions left out, and why.
    """

    verdict: Literal["go", "little", "no"]
    sentence: str
    target: str
    tokens: Whole
    behind: Whole
    blocks: Whole
    overhead_us: Annotated[float, Meta(ge=-LARGEST, le=LARGEST)]
    asked: GoRow
    rows: tuple[GoRow, ...]
    skipped: tuple[str, ...]


def go_no_go(
    costs: GraphCosts,
    target: Target,
    *,
    precision: str = "",
    batch: int = 0,
    plugin: bool = True,
) -> GoNoGo:
    """Answer for a plain transformer on a target.

    The cut stands behind a quarter of the blocks, as EViT and DynamicViT have their first, and everything from there on
    works on the kept tokens.

    Args:
        precision: of the sentence; "": fp16 where the target runs it.
        batch: of the sentence; 0: that of the file.

    Raises:
        InvalidSpec: no transformer that can be projected; a precision without a peak; a batch that nothing scales to.
    """
    blocks = blocks_of(costs)
    behind = max(1, len(blocks) // 4)
    asked_precision = precision or ("fp16" if "fp16" in target.precisions else "")
    asked_batch = batch or costs.batch or 1
    words = list(dict.fromkeys([asked_precision, *(word for word in _WORDS if word in target.precisions)]))
    batches = sorted({asked_batch, *(_BATCHES if costs.batch else ())})
    counts = _counts(costs.tokens)
    projected = {count: with_fewer_tokens(costs, tokens=count, behind=behind) for count in counts}
    rows, skipped = [], []
    for word in words:
        try:
            rows += [_row(costs, projected, target, precision=word, batch=one, plugin=plugin) for one in batches]
        except InvalidSpec as error:
            if word == asked_precision:
                raise
            skipped.append(f"{word}: {error}")
    asked = next(row for row in rows if (row.precision, row.batch) == (asked_precision or "as written", asked_batch))
    half = min(asked.reach, key=lambda reach: abs(reach.tokens - costs.tokens / 2))
    verdict: Literal["go", "little", "no"] = (
        "go" if half.faster >= _HELPS else "little" if half.faster >= _LITTLE else "no"
    )
    return GoNoGo(
        verdict=verdict,
        sentence=_sentence(asked, half, rows, target, costs.tokens, behind, verdict),
        target=target.name,
        tokens=costs.tokens,
        behind=behind,
        blocks=len(blocks),
        overhead_us=asked.us - half.us,
        asked=asked,
        rows=tuple(rows),
        skipped=tuple(skipped),
    )


def _counts(tokens: int) -> tuple[int, ...]:
    """Return the counts to look at: shares of the tokens, down to a multiple of 8 where there are enough."""
    found = (int(tokens * share) for share in _SHARES)
    rounded = (count - count % _STEP if count > 2 * _STEP else count for count in found)
    return tuple(dict.fromkeys(max(1, count) for count in rounded))


def _row(
    costs: GraphCosts,
    projected: dict[int, GraphCosts],
    target: Target,
    *,
    precision: str,
    batch: int,
    plugin: bool,
) -> GoRow:
    applied = applied_for(target.name)
    efficiencies = (applied.efficiency, *(one.efficiency for one in _others(applied)))
    asked = batch if costs.batch else 0
    plain = estimate_graph(costs, target, precision=precision, batch=asked, plugin=plugin, applied=applied)

    def times(graph: GraphCosts) -> list[float]:
        work = prepare(graph, precision=precision, batch=asked, plugin=plugin, target=target)
        load, _ = load_of(work, target)
        return [float(modelled_us(load, one).sum()) for one in efficiencies]

    whole = times(costs)
    reach = []
    for count, graph in projected.items():
        cut = times(graph)
        ratios = [one / other for one, other in zip(whole, cut, strict=True)]
        reach.append(Reach(count, cut[0], ratios[0], min(ratios), max(ratios)))
    shrinks = plain.compute_us - plain.idle_us + plain.memory_us * _activation_share(plain)
    return GoRow(
        precision or "as written", batch, plain.mid_us, plain.bound, shrinks / plain.mid_us if plain.mid_us else 0.0,
        tuple(reach),
    )  # fmt: skip


def _activation_share(estimate: Estimate) -> float:
    """Return the share of the bytes that are not weights."""
    return max(0.0, 1 - estimate.weight_bytes / estimate.bytes) if estimate.bytes else 0.0


def _others(applied: Applied) -> Sequence[Applied]:
    """Return what else explains the published rows; a user's own calibration stands alone."""
    if applied.efficiency != shipped_fit().efficiency:
        return ()
    return [replace(applied, efficiency=one) for one in shipped_fit().others]


def _sentence(
    asked: GoRow, half: Reach, rows: Sequence[GoRow], target: Target, tokens: int, behind: int, verdict: str
) -> str:
    word = {"go": "Yes", "little": "Little", "no": "No"}[verdict]
    spread = f" ({half.low:.2f} to {half.high:.2f} by other fits)" if half.low != half.high else ""
    numbers = (
        f"keeping {half.tokens} of {tokens} tokens behind block {behind} would take {asked.us / 1e3:.2f} ms to "
        f"{half.us / 1e3:.2f} ms, {half.faster:.2f} times faster at best{spread}"
    )
    where = f"on {target.name} at batch {asked.batch} in {asked.precision}"
    percent = f"{100 * asked.busy_share:.0f} %"
    if verdict == "go":
        reason = f"{percent} of its time is work that shrinks with the tokens"
    else:
        reason = (
            f"only {percent} of its time is work that shrinks with the tokens; the rest is launches, weights that are "
            "read anyway, and products too small to fill the chip"
        )
        better = next(
            (
                row
                for row in rows
                if row.precision == asked.precision and row.batch > asked.batch and _at_half(row, half) >= _HELPS
            ),
            None,
        )
        if better is not None:
            reason += f"; at batch {better.batch} it would be {_at_half(better, half):.2f} times"
    return f"{word}: {where}, {numbers}, for {reason}."


def _at_half(row: GoRow, half: Reach) -> float:
    return next(reach.faster for reach in row.reach if reach.tokens == half.tokens)
