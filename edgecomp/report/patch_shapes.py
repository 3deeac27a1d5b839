"""What is drawn over the patches of an image: which colour a group has, where its border runs, what a legend says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgecomp.patches import PatchLayer, PatchLayers
from edgecomp.report.colours import group_colours

__all__ = [
    "Edge",
    "borders",
    "count_words",
    "describe_layer",
    "group_places",
    "headline",
    "legend_of",
    "panel_columns",
    "rims",
    "score_words",
    "short_name",
    "token_words",
]

Array = npt.NDArray[Any]
_LEGEND = {
    "kept": "kept",
    "merged": "merged: a colour and a border for each group",
    "dropped": "dropped",
    "empty": "has no score in this layer",
}
_LONGEST_NAME = 16


class Edge(NamedTuple):
    """A straight line along the grid, in units of patches.

    Attributes:
        x, y: where it begins.
        length: how many patches.
        is_vertical: it runs down; else to the right.
    """

    x: int
    y: int
    length: int
    is_vertical: bool


def group_places(patches: PatchLayers) -> tuple[Array, ...]:
    """Return, for each layer, the place in `group_colours` of each patch that was merged, and -1: (N,) int64.

    Groups that touch, at a corner too, differ while there are colours enough. A group takes over the colour that most
    of its patches had in the layer before where none beside it has that, so that the eye can follow it.
    """
    before = np.full(patches.patches, -1)
    found = []
    for layer in patches.layers:
        before = _places(layer, patches.rows, patches.columns, before)
        found.append(before)
    return tuple(found)


def _places(layer: PatchLayer, rows: int, columns: int, before: Array) -> Array:
    beside = _neighbours(np.where(layer.merged, layer.rows, -1).reshape(rows, columns), layer.groups)
    had = {group: np.bincount(before[layer.rows == group] + 1, minlength=2)[1:] for group in layer.groups}
    colours: dict[int, int] = {}
    used = np.zeros(len(group_colours()), np.int64)
    for group in sorted(beside, key=lambda g: (-int(had[g].max()), -len(beside[g]), g)):
        taken = {colours[other] for other in beside[group] if other in colours}
        free = [place for place in range(len(used)) if place not in taken] or list(range(len(used)))
        old = int(had[group].argmax())
        is_free = had[group].max() > 0 and old in free
        colours[group] = old if is_free else min(free, key=lambda place: (used[place], place))
        used[colours[group]] += 1
    return np.asarray([colours.get(row, -1) if row >= 0 else -1 for row in layer.rows.tolist()], np.int64)


def _neighbours(held: Array, groups: tuple[int, ...]) -> dict[int, set[int]]:
    """Return which groups touch each: held (rows, columns), -1 where there is none."""
    rows, columns = held.shape
    beside: dict[int, set[int]] = {group: set() for group in groups}
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        one = held[: rows - down, max(0, -right) : columns - max(0, right)]
        other = held[down:, max(0, right) : columns + min(0, right)]
        for a, b in zip(one.ravel().tolist(), other.ravel().tolist(), strict=True):
            if a >= 0 and b >= 0 and a != b:
                beside[a].add(b)
                beside[b].add(a)
    return beside


def borders(layer: PatchLayer, rows: int, columns: int) -> Iterator[Edge]:
    """Yield the lines around groups, each as long as it goes."""
    return _lines(np.where(layer.merged, layer.rows, -1).reshape(rows, columns))


def rims(layer: PatchLayer, rows: int, columns: int) -> Iterator[Edge]:
    """Yield the lines around dropped patches, those that stand together as one."""
    return _lines(np.where(layer.dropped, 0, -1).reshape(rows, columns))


def _lines(state: Array) -> Iterator[Edge]:
    """Yield the lines between what differs, and those at the rim of the image around what is not -1."""
    framed = np.pad(state, 1, constant_values=-1)
    for is_vertical, grid in ((False, framed), (True, framed.T)):
        differs = grid[:-1] != grid[1:]
        for line, marked in enumerate(differs[:, 1:-1]):
            yield from _runs(marked, line, is_vertical=is_vertical)


def _runs(marked: Array, line: int, *, is_vertical: bool) -> Iterator[Edge]:
    begin = -1
    for place, is_marked in enumerate([*marked.tolist(), False]):
        if is_marked and begin < 0:
            begin = place
        elif not is_marked and begin >= 0:
            x, y = (line, begin) if is_vertical else (begin, line)
            yield Edge(x, y, place - begin, is_vertical)
            begin = -1


def count_words(layer: PatchLayer) -> str:
    """Say what became of the patches in a few words, zeros left out."""
    if layer.is_read:
        return "all patches are read"
    kept, merged, dropped = layer.counts
    groups = f"{merged} in {len(layer.groups)} group{'s' * (len(layer.groups) != 1)}"
    return ", ".join([f"{kept} kept", *[groups] * bool(merged), *[f"{dropped} dropped"] * bool(dropped)])


def describe_layer(layer: PatchLayer, patches: PatchLayers) -> str:
    """Say in a sentence what a picture of a layer shows, for those who do not see it."""
    left = f"{token_words(layer.tokens)} {'is' if layer.tokens == 1 else 'are'} left"
    text = f"Behind {layer.name}, {left} of {patches.patches} patches: {count_words(layer)}."
    if layer.is_read:
        text = f"In {layer.name}, {token_words(layer.tokens)} read all {patches.patches} patches."
    span = layer.score_range
    if span is None:
        return text
    return f"{text} Heat map of scores ({layer.scored}): from {span[0]:.3g} to {span[1]:.3g}."


def headline(patches: PatchLayers) -> str:
    """Say in a line what the whole picture shows."""
    prefix = f", beside {patches.prefix} prefix token{'s' * (patches.prefix != 1)}" if patches.prefix else ""
    return (
        f"{patches.patches} patches ({patches.rows} x {patches.columns}) become "
        f"{token_words(patches.layers[-1].tokens if patches.layers else patches.tokens_out)}{prefix}"
    )


def short_name(name: str) -> str:
    """Return the end of a name that is too long for a heading."""
    return name if len(name) <= _LONGEST_NAME else "\u2026" + name[1 - _LONGEST_NAME :]


def legend_of(patches: PatchLayers) -> dict[str, str]:
    """Return what a legend explains, of what there is: `kept`, `merged`, `dropped`, `empty`, each with its words."""
    layers = patches.layers
    there = {
        "kept": any(not layer.is_read for layer in layers),
        "merged": any(layer.merged.any() for layer in layers),
        "dropped": any(layer.dropped.any() for layer in layers),
        "empty": any(layer.score_range is not None and not np.isfinite(layer.scores).all() for layer in layers),
    }
    return {kind: words for kind, words in _LEGEND.items() if there[kind]}


def score_words(patches: PatchLayers) -> tuple[str, ...]:
    """Say what the scores are, once for all layers that have the same."""
    found = dict.fromkeys(layer.scored for layer in patches.layers if layer.score_range is not None)
    return tuple(f"scores: {words}" for words in found)


def panel_columns(tiles: int) -> int:
    """Return how many panels stand in a row, so that the last row is not left nearly empty."""
    return max(2, tiles) if tiles <= 4 else 3 if tiles in (5, 6) else 5 if tiles > 8 else 4


def token_words(tokens: int) -> str:
    """Say how many tokens there are."""
    return f"{tokens} token{'s' * (tokens != 1)}"
