"""From what a graph chose, layer by layer, to where each patch is: the maps of all layers, one after the other.

The choices are those that `parity --selection` judges. What a merge makes of them is the definition of
`edgecomp::TopKMerge` (`engines/plugins/topk_merge/README.md`); a choice of the k highest scores hands on these tokens,
in their order or ranked. Whoever has the graph's own map holds the last layer to it (`join_layers`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgecomp.patches.layers import PatchLayer, layer_title
from edgecomp.specs.choice import ChoiceNode

__all__ = ["Composed", "compose_layers"]

Array = npt.NDArray[Any]
Chosen = Mapping[int, tuple[Array, Array]]


class Composed(NamedTuple):
    """Layers, or why the choices do not say where patches are.

    Attributes:
        layers: one for each choice that merges or drops tokens.
        problem: in words; "" where there is none.
    """

    layers: tuple[PatchLayer, ...]
    problem: str = ""


class _Step(NamedTuple):
    """One layer, on the patch tokens that went into it.

    Attributes:
        to: (n,) the token that each goes to, -1 for none.
        left: how many tokens of these there are behind it; others may have been made beside them.
        scores: (n,) float32, NaN where a token had none.
    """

    node: ChoiceNode
    to: Array
    left: int
    scores: Array
    scored: str


class _OddChoiceError(Exception):
    """A choice that is not understood."""


def compose_layers(
    nodes: Sequence[ChoiceNode], chosen: Chosen, *, patches: int, tokens_out: int, row: int = 0
) -> Composed:
    """Return where the patches of one image are behind each layer.

    Args:
        nodes: the choices of a graph, in its order.
        chosen: scores and indices of each by its number.
        patches: tokens of the image that go in, prefix tokens not counted.
        tokens_out: those that come out; what is above the last choice's are tokens made of others.
        row: of the batch.
    """
    try:
        steps = [_step(group, chosen, row) for group in _groups(nodes)]
        return Composed(_walk(steps, patches=patches, tokens_out=tokens_out))
    except _OddChoiceError as error:
        return Composed((), str(error))


def _groups(nodes: Sequence[ChoiceNode]) -> list[list[ChoiceNode]]:
    """Put together the two choices of a merge, and those of one module otherwise."""
    grouped = itertools.groupby(nodes, key=lambda node: (node.merge, node.where if node.merge < 0 else ""))
    return [list(group) for _, group in grouped]


def _step(group: list[ChoiceNode], chosen: Chosen, row: int) -> _Step:
    ranks = [node for node in group if node.op == "TopK"]
    if len(ranks) != 1:
        raise _OddChoiceError(f"{group[0].where or 'the graph'} makes {len(ranks)} choices by rank, and not one")
    (rank,) = ranks
    if len(rank.indices) != 2:
        raise _OddChoiceError(f"{rank.where or rank.op} makes choices of shape {list(rank.indices)}, and not one a row")
    scores, indices = (array[row] for array in chosen[rank.number])
    places = indices[: rank.k].astype(np.int64)
    if rank.merge < 0:
        return _keep(rank, scores, places)
    match = next(node for node in group if node.op == "ArgMax")
    similarity, targets = (array[row] for array in chosen[match.number])
    if rank.partition == "by_score":
        return _merge_by_score(rank, scores, places, targets.reshape(-1).astype(np.int64))
    return _merge_alternate(rank, scores, places, targets.reshape(-1).astype(np.int64), similarity.shape[-1])


def _keep(node: ChoiceNode, scores: Array, places: Array) -> _Step:
    """The k tokens of highest score stay."""
    if node.k >= len(scores):
        raise _OddChoiceError(f"{node.where or node.op} ranks all {node.k} tokens, and what for is not in its choices")
    to = np.full(len(scores), -1)
    to[places if node.ordered else np.sort(places)] = np.arange(node.k)
    best = "highest" if node.largest else "lowest"
    return _Step(node, to, node.k, scores.astype(np.float32), f"those of tokens; the {best} stay")


def _merge_alternate(node: ChoiceNode, best: Array, ranked: Array, match: Array, targets: int) -> _Step:
    """Even tokens are sources, odd ones targets; the r sources with the best match merge."""
    first, count = node.prefix % 2, len(best) + targets  # places without the prefix
    even, odd = first + 2 * np.arange(len(best)), 1 - first + 2 * np.arange(targets)
    gone = ranked[: node.r]
    others = np.setdiff1d(np.arange(len(best)), gone)
    rest = ranked[node.r :] if node.k > node.r else others
    to = np.full(count, -1)
    to[even[rest]] = np.arange(len(rest))
    to[odd] = len(rest) + np.arange(targets)
    to[even[gone]] = len(rest) + match[gone]
    scores = np.full(count, np.nan, np.float32)
    scores[even] = best
    scored = "similarity of every other token to its best match; the most similar merge into theirs"
    return _Step(node, to, count - node.r, scores, scored)


def _merge_by_score(node: ChoiceNode, scores: Array, ranked: Array, match: Array) -> _Step:
    """The 2r tokens of highest score are in turn source and target."""
    count, pairs = len(scores), 2 * node.r
    sources, targets = ranked[0:pairs:2], ranked[1:pairs:2]
    rest = ranked[pairs:] if node.k > pairs else np.setdiff1d(np.arange(count), ranked[:pairs])
    to = np.full(count, -1)
    to[rest] = np.arange(len(rest))
    to[targets] = len(rest) + np.arange(len(targets))
    to[sources] = len(rest) + match
    scored = "those of tokens; the highest merge, in turn as what is merged and as what it is merged into"
    return _Step(node, to, count - node.r, scores.astype(np.float32), scored)


def _walk(steps: list[_Step], *, patches: int, tokens_out: int) -> tuple[PatchLayer, ...]:
    """Follow each patch through the steps."""
    rows, layers = np.arange(patches), []
    names = [layer_title(step.node.where) for step in steps]
    for number, step in enumerate(steps):
        if not number and len(step.to) != patches:
            raise _OddChoiceError(f"the first choice is among {len(step.to)} tokens, and there are {patches} patches")
        behind = len(steps[number + 1].to) if number + 1 < len(steps) else tokens_out
        if behind < step.left or (step.node.merge >= 0 and behind > step.left):
            raise _OddChoiceError(
                f"{step.node.where or step.node.op} leaves {step.left} tokens, and there are {behind} behind it"
            )
        alive = rows >= 0
        scores = np.where(alive, step.scores[np.maximum(rows, 0)], np.float32(np.nan))
        rows = np.where(alive, step.to[np.maximum(rows, 0)], -1)
        name = names[number]
        if names.count(name) > 1:
            name = f"{name}, step {names[:number].count(name) + 1}"
        layers.append(PatchLayer(name, step.node.where, behind, rows.astype(np.int32), scores, step.scored))
    return tuple(layers)
