"""Choices against the original's: which tokens, how close the call was, and whether rounding explains a difference.

Every layer is judged on the rows that the original had there, its choices being forced upon the graph, so that a
difference in one layer is not counted again in the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from edgecomp.parity.metrics import jaccard
from edgecomp.specs.choice import ChoiceNode

__all__ = ["NOISE_FACTOR", "ChoiceParity", "Flip", "judge_choices"]

Array = npt.NDArray[Any]
Kind = Literal["set", "match", "merge"]
NOISE_FACTOR = 6.0  # times the upper quartile of the errors of scores: about seven standard deviations of normal ones
_QUARTILE = 0.75
_ULPS = 4.0  # least noise, in units of the last place of the largest score
_EPS = float(np.finfo(np.float32).eps)  # of the original's scores, and of most runners'


class Flip(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a runner chose other than the original.

    Attributes:
        row: of the batch.
        token: the place of the token that this is about, among those that went into the choice.
        original, got: the place that the original chose in its stead, or for it, and the one that the runner chose.
        scores: the original's, of these two.
        scores_got: the runner's, of the same two.
        margin: the distance between the two scores, on the side where it is larger.
        noise: how far rounding may move that distance.
        what: in words.
    """

    row: int
    token: int
    original: int
    got: int
    scores: tuple[float, float]
    scores_got: tuple[float, float]
    margin: float
    noise: float
    what: str

    def __str__(self) -> str:
        return (
            f"row {self.row}: {self.what}; the original's scores {self.scores[0]:.8g} and {self.scores[1]:.8g}, the "
            f"runner's {self.scores_got[0]:.8g} and {self.scores_got[1]:.8g}, margin {self.margin:.3g}, noise "
            f"{self.noise:.3g}"
        )


class ChoiceParity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One choice of a graph on one golden case, over all rows of the batch.

    Attributes:
        number: of the choice, in the order of the graph.
        where: the torch module it belongs to.
        kind: `set`, tokens kept or dropped; `match`, the one that each is given to; `merge`, both, as a partition.
        agreement: least Jaccard index of a row: of the sets, or of the pairs (source, target).
        agreement_mean: its mean over rows.
        flips: how many tokens went another way.
        margin: the original's smallest distance at the cut, or between the best two; none where nothing is left out.
        noise: how far rounding may move the difference of two scores: NOISE_FACTOR times the upper quartile of the
            measured errors of the scores, at least some units in their last place, and at most the share of the
            largest score that the precision's tolerance allows.
        score_error: largest error of a score.
        score_limit: what the precision's tolerance allows; where an error is larger, and no token went another way, it
            is said and does not fail.
        worst: the flip with the largest margin over its noise; none where there is none.
        failures: in words, what rounding does not explain; empty when it passed.
    """

    model: str
    case: str
    number: int
    where: str
    kind: Kind
    agreement: float
    agreement_mean: float
    flips: int
    margin: float | None
    noise: float
    score_error: float
    score_limit: float
    worst: Flip | None
    failures: tuple[str, ...]

    def __bool__(self) -> bool:
        return not self.failures

    @property
    def is_close(self) -> bool:
        """Whether the call was so close that rounding may decide it, in this run or the next."""
        return self.flips > 0 or (self.margin is not None and self.margin <= self.noise)

    @property
    def verdict(self) -> str:
        """In a word or three."""
        if self.failures:
            return "FAIL"
        word = "tie within noise" if self.flips else "agree"
        return word if self.score_error <= self.score_limit else f"{word}, scores off"


class _Seen(NamedTuple):
    """A choice of both sides; higher scores are better.

    Attributes:
        scores: (rows, N) the original's; of `ArgMax` (rows, 2) its best two.
        chosen: (rows, k) what the original chose; of `ArgMax` (rows, 2) its best two.
        got_scores: (rows, N) the runner's.
        got: (rows, k) what the runner chose; of `ArgMax` (rows, 1).
        noise, error, limit: as in `ChoiceParity`.
        wrong: how the runner's choice does not follow from its own scores.
    """

    node: ChoiceNode
    scores: Array
    chosen: Array
    got_scores: Array
    got: Array
    noise: float
    error: float
    limit: float
    wrong: tuple[str, ...]


def judge_choices(
    model: str,
    case: str,
    nodes: tuple[ChoiceNode, ...],
    original: Mapping[int, tuple[Array, Array]],
    outputs: Mapping[str, Array],
    *,
    max_rel: float,
) -> tuple[ChoiceParity, ...]:
    """Hold each choice of a forced run to the original's.

    Args:
        original: scores and indices of each choice by its number, as the golden file has them.
        outputs: of the forced graph: scores, and what it would have chosen.
        max_rel: tolerance of the precision; noise is never taken to be more than that share of the largest score.
    """
    seen = {
        n.number: _see(
            n, *original[n.number], outputs[f"{n.name}.scores"], outputs[f"{n.name}.indices"], max_rel=max_rel
        )
        for n in nodes
    }
    rows = []
    for one in seen.values():
        if one.node.merge < 0:
            rows.append(_judge_set(model, case, one) if one.node.op == "TopK" else _judge_match(model, case, one))
        elif one.node.op == "TopK":
            match = next(s for s in seen.values() if s.node.merge == one.node.merge and s.node.op == "ArgMax")
            rows.append(_judge_merge(model, case, one, match))
    return tuple(rows)


def _see(node: ChoiceNode, scores: Array, index: Array, got_scores: Array, got: Array, *, max_rel: float) -> _Seen:
    """Bring both sides to one form, and measure how far the scores are apart."""
    sign = 1.0 if node.largest else -1.0
    eps = float(np.finfo(got_scores.dtype).eps) if got_scores.dtype.kind == "f" else _EPS
    want, have = (sign * array.reshape(-1, array.shape[-1]).astype(np.float64) for array in (scores, got_scores))
    places = index.reshape(-1, index.shape[-1]).astype(np.int64)
    chosen = got.reshape(-1, node.k).astype(np.int64)
    beside = have if node.op == "TopK" else np.take_along_axis(have, places, 1)
    real = np.isfinite(want) & np.isfinite(beside)
    errors = np.abs(beside[real] - want[real])
    scale = float(np.abs(want[np.isfinite(want)]).max(initial=0.0))
    measured = NOISE_FACTOR * float(np.quantile(errors, _QUARTILE)) if errors.size else 0.0
    least, limit = _ULPS * max(eps, _EPS) * scale, max_rel * scale
    noise = max(least, min(measured, limit))
    wrong = []
    if unreal := int(np.isnan(have).sum()):
        wrong.append(f"{unreal} of {have.size} scores are NaN")
    else:
        wrong += _broken_rule(node, have, chosen)
    error = float(errors.max(initial=0.0))
    taken = places[:, : node.k if node.op == "TopK" else 2]
    return _Seen(node, want, taken, have, chosen, noise, error, max(limit, least), tuple(wrong))


def _broken_rule(node: ChoiceNode, have: Array, chosen: Array) -> list[str]:
    """Say where a choice does not take the highest scores, or of equal ones not the lower place first."""
    due = np.argsort(-have, axis=1, kind="stable")[:, : node.k]
    row, place = np.nonzero(due != chosen)
    if not len(row):
        return []
    b, token, instead = int(row[0]), int(due[row[0], place[0]]), int(chosen[row[0], place[0]])
    same = have[b, token] == have[b, instead] if 0 <= instead < have.shape[1] else False
    why = "ties go to the lower place" if same else "it does not take the highest of its own scores"
    return [f"row {b}: {instead} is chosen where {token} is due ({why}); {len(row)} such places"]


# -- tokens kept or dropped -------------------------------------------------------------------------------------


def _judge_set(model: str, case: str, seen: _Seen) -> ChoiceParity:
    cut = seen.node.k
    flips = [*_set_flips(seen, cut, int), *(_order_flips(seen, int) if seen.node.ordered else ())]
    agreement = [jaccard(set(a.tolist()), set(b.tolist())) for a, b in zip(seen.chosen, seen.got, strict=True)]
    gaps = _gaps(seen, cut, is_ordered=seen.node.ordered)
    return _verdict(model, case, (seen,), "set", agreement, flips, gaps)


def _set_flips(seen: _Seen, cut: int, name: Callable[[int], int]) -> Iterator[Flip]:
    """Yield the tokens that only one side has among its best, each against the last, or first, on the other side."""
    per_row = len(seen.scores) // seen.node.indices[0]
    for row, (ours, theirs) in enumerate(zip(seen.chosen[:, :cut], seen.got[:, :cut], strict=True)):
        lost, won = (sorted(set(a.tolist()) - set(b.tolist())) for a, b in ((ours, theirs), (theirs, ours)))
        want, have = seen.scores[row], seen.got_scores[row]
        lost, won = sorted(lost, key=lambda t: -want[t]), sorted(won, key=lambda t: want[t])
        for token, instead in zip(lost, won, strict=True):
            what = f"token {name(token)} is dropped and {name(instead)} kept in its place"
            yield _flip(seen, row // per_row, (token, instead), want, have, what, name)


def _order_flips(seen: _Seen, name: Callable[[int], int], *, first: int = 0) -> Iterator[Flip]:
    """Yield the tokens that both sides chose, in another order, from a rank on."""
    per_row = len(seen.scores) // seen.node.indices[0]
    for row, (ours, theirs) in enumerate(zip(seen.chosen, seen.got, strict=True)):
        ranked = ours[first:].tolist(), theirs[first:].tolist()
        common = set(ranked[0]) & set(ranked[1])
        lists = ([t for t in side if t in common] for side in ranked)
        for token, instead in zip(*lists, strict=True):
            if token != instead:
                what = f"token {name(instead)} is ranked where {name(token)} was"
                want, have = seen.scores[row], seen.got_scores[row]
                yield _flip(seen, row // per_row, (token, instead), want, have, what, name)


def _flip(
    seen: _Seen, row: int, pair: tuple[int, int], want: Array, have: Array, what: str, name: Callable[[int], int]
) -> Flip:
    scores, got = (tuple(float(side[place]) for place in pair) for side in (want, have))
    margin = max(abs(a[0] - a[1]) for a in (scores, got))
    places = name(pair[0]), name(pair[1])
    return Flip(row, places[0], places[0], places[1], scores, got, margin, seen.noise, what)  # type: ignore[arg-type]


def _gaps(seen: _Seen, cut: int, *, is_ordered: bool, first: int = 0) -> Array:
    """Return the original's distances between neighbours that rounding could exchange; exact ties of both are none."""
    order = np.argsort(-seen.scores, axis=1, kind="stable")
    want, have = (
        np.take_along_axis(np.nan_to_num(side, neginf=-1e300), order, 1) for side in (seen.scores, seen.got_scores)
    )
    gaps, got = want[:, :-1] - want[:, 1:], have[:, :-1] - have[:, 1:]
    matters = np.zeros(gaps.shape[1], bool)
    matters[max(0, cut - 1) : cut] = True
    if is_ordered:
        matters[first : seen.node.k] = True
    kept: Array = gaps[:, matters][((gaps != 0) | (got != 0))[:, matters]]
    return kept


# -- the one that each is given to ------------------------------------------------------------------------------


def _judge_match(model: str, case: str, seen: _Seen) -> ChoiceParity:
    per_row = len(seen.scores) // seen.node.indices[0]
    everyone = np.arange(len(seen.scores))
    flips = list(_match_flips(seen, everyone, lambda b, s: s, lambda b, t: t))
    same = (seen.chosen[:, 0] == seen.got[:, 0]).reshape(-1, per_row)
    agreement = [float(n / (2 * per_row - n)) for n in same.sum(1)]  # of the pairs
    return _verdict(model, case, (seen,), "match", agreement, flips, _match_gaps(seen, everyone))


def _match_flips(
    seen: _Seen, rows: Array, source: Callable[[int, int], int], target: Callable[[int, int], int]
) -> Iterator[Flip]:
    """Yield what is given to another than by the original; the names of source and target are those in the batch."""
    per_row = len(seen.scores) // seen.node.indices[0]
    for row in rows.tolist():
        ours, theirs = int(seen.chosen[row, 0]), int(seen.got[row, 0])
        if ours == theirs:
            continue
        b, s = divmod(row, per_row)
        have = seen.got_scores[row]
        best, second = float(seen.scores[row, 0]), float(seen.scores[row, 1])  # of a third: at most the second
        got = float(have[ours]), float(have[theirs])
        margin = max(best - second, abs(got[1] - got[0]))
        token, places = source(b, s), (target(b, ours), target(b, theirs))
        what = f"token {token} goes to {places[1]} and not to {places[0]}"
        yield Flip(b, token, *places, (best, second), got, margin, seen.noise, what)


def _match_gaps(seen: _Seen, rows: Array) -> Array:
    if seen.scores.shape[1] < 2:
        return np.zeros(0)
    got = np.take_along_axis(seen.got_scores, seen.chosen, 1)
    gaps, other = seen.scores[:, 0] - seen.scores[:, 1], got[:, 0] - got[:, 1]
    kept: Array = gaps[rows][((gaps != 0) | (other != 0))[rows]]
    return kept


# -- both, as a partition ---------------------------------------------------------------------------------------


def _judge_merge(model: str, case: str, rank: _Seen, match: _Seen) -> ChoiceParity:
    """Compare which sources go to which targets; where a token goes that does not merge means nothing."""
    node, batch = rank.node, rank.node.indices[0]
    per_row = len(match.scores) // batch
    by_score = node.partition == "by_score"
    first_source, first_target = (node.prefix + node.prefix % 2, node.prefix + 1 - node.prefix % 2)

    def ranked(place: int) -> int:
        return node.prefix + place if by_score else first_source + 2 * place

    def source(b: int, s: int) -> int:
        return node.prefix + int(rank.chosen[b, 2 * s]) if by_score else first_source + 2 * s

    def target(b: int, t: int) -> int:
        return node.prefix + int(rank.chosen[b, 2 * t + 1]) if by_score else first_target + 2 * t

    cut = 2 * node.r if by_score else node.r
    is_ordered = by_score or node.k > cut
    first = 0 if by_score else cut  # of sources that merge the order means nothing, where it does not pair them
    places = [range(node.r) if by_score else rank.chosen[b, : node.r].tolist() for b in range(batch)]
    merging = np.asarray([b * per_row + s for b in range(batch) for s in places[b]])
    flips = [
        *_set_flips(rank, cut, ranked),
        *(_order_flips(rank, ranked, first=first) if is_ordered else ()),
        *_match_flips(match, merging, source, target),
    ]
    agreement = []
    for b in range(batch):
        goes = [
            {source(b, s): target(b, int(side[b * per_row + s, 0])) for s in range(per_row)}
            for side in (match.chosen, match.got)
        ]
        ours, theirs = (
            {ranked(int(t)) for t in (side[b, :cut:2] if by_score else side[b, :cut])}
            for side in (rank.chosen, rank.got)
        )
        pairs = [{(s, to[s]) for s in chosen if s in to} for chosen, to in ((ours, goes[0]), (theirs, goes[1]))]
        agreement.append(jaccard(*pairs))
    gaps = np.concatenate([_gaps(rank, cut, is_ordered=is_ordered, first=first), _match_gaps(match, merging)])
    return _verdict(model, case, (rank, match), "merge", agreement, flips, gaps)


def _verdict(
    model: str, case: str, seen: tuple[_Seen, ...], kind: Kind, agreement: list[float], flips: list[Flip], gaps: Array
) -> ChoiceParity:
    """Put the row together: a flip beyond the noise fails, and so does a choice that breaks its own rule."""
    worst = max(flips, key=lambda flip: flip.margin / max(flip.noise, _EPS), default=None)
    beyond = [flip for flip in flips if flip.margin > flip.noise]
    failures = [broken for one in seen for broken in one.wrong]
    if beyond:
        more = f"; {len(beyond)} such flips" if len(beyond) > 1 else ""
        failures.append(f"{max(beyond, key=lambda flip: flip.margin / max(flip.noise, _EPS))}: no rounding{more}")
    closest = float(gaps.min()) if gaps.size else None
    loudest = max(seen, key=lambda one: one.noise)
    return ChoiceParity(
        model=model,
        case=case,
        number=seen[0].node.number,
        where=seen[0].node.where,
        kind=kind,
        agreement=min(agreement),
        agreement_mean=float(np.mean(agreement)),
        flips=len(flips),
        margin=closest,
        noise=loudest.noise,
        score_error=max(one.error for one in seen),
        score_limit=max(one.limit for one in seen),
        worst=worst,
        failures=tuple(failures),
    )
