"""The patches of an image behind each layer that merges or drops some of them."""

from __future__ import annotations

import math
import re
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

__all__ = ["PatchLayer", "PatchLayers", "Picture", "grid_of", "layer_title"]

Array = npt.NDArray[Any]
_BLOCK = re.compile(r"(?:.*\.)?(?:blocks|layers?)\.(\d+)")


class PatchLayer(msgspec.Struct, frozen=True, eq=False):
    """Where each patch is behind one layer.

    Attributes:
        name: for a title, for example `block 3`.
        where: the torch module that chose; "" where it is not known.
        tokens: patch tokens there are behind it, those that are of no patch alone counted; prefix tokens are not.
        rows: (N,) int32, the token that each patch is in; -1: it is in none.
        scores: (N,) float32, what the layer chose by; NaN where a patch had no score, or was gone before.
        scored: what these scores are; "" where there are none.
        is_read: no patch is in a token, since each token reads all of them; `rows` says nothing then.
    """

    name: str
    where: str
    tokens: int
    rows: Array
    scores: Array
    scored: str = ""
    is_read: bool = False

    @property
    def made(self) -> int:
        """How many tokens no patch is in by the map: made of several that it does not name, or of none."""
        return self.tokens - len(np.unique(self.rows[self.rows >= 0]))

    @property
    def dropped(self) -> Array:
        """Which patches are in no token: (N,) bool."""
        found: Array = self.rows < 0
        return found

    @property
    def group_sizes(self) -> Array:
        """How many patches share the token of each; 0 for those that are in none: (N,) int."""
        alive = self.rows[self.rows >= 0]
        counts = np.bincount(alive, minlength=max(self.tokens, 1))
        found: Array = np.where(self.rows >= 0, counts[np.maximum(self.rows, 0)], 0)
        return found

    @property
    def merged(self) -> Array:
        """Which patches share their token with others: (N,) bool."""
        found: Array = self.group_sizes > 1
        return found

    @property
    def groups(self) -> tuple[int, ...]:
        """The tokens that are made of several patches, ascending."""
        return tuple(np.unique(self.rows[self.merged]).tolist())

    @property
    def counts(self) -> tuple[int, int, int]:
        """How many patches are kept alone, merged, and dropped; none of the three where all are read."""
        if self.is_read:
            return 0, 0, 0
        merged, dropped = int(self.merged.sum()), int(self.dropped.sum())
        return len(self.rows) - merged - dropped, merged, dropped

    @property
    def score_range(self) -> tuple[float, float] | None:
        """The least and the largest score; none where there is no finite one."""
        real = self.scores[np.isfinite(self.scores)]
        return (float(real.min()), float(real.max())) if real.size else None


class PatchLayers(msgspec.Struct, frozen=True, eq=False):
    """All layers of one graph on one image.

    Attributes:
        method: the compressor.
        model: file name of the graph.
        rows, columns: of the grid of patches.
        prefix: class, distillation and register tokens, which are of no patch.
        tokens_out: patch tokens at the end, as the budget says.
        layers: that merge or drop patches; empty where the graph has no map from patches to tokens.
        notes: what a reader has to know; also why there is no map.
    """

    method: str
    model: str
    rows: int
    columns: int
    prefix: int
    tokens_out: int
    layers: tuple[PatchLayer, ...]
    notes: tuple[str, ...] = ()

    @property
    def patches(self) -> int:
        """How many there are."""
        return self.rows * self.columns


class Picture(msgspec.Struct, frozen=True, eq=False):
    """An image as a model saw it, and what became of its patches.

    Attributes:
        image: name of the image's file.
        bundle: name of the bundle's folder.
        pixels: (S, S, 3) uint8.
        patches: layer by layer.
    """

    image: str
    bundle: str
    pixels: Array
    patches: PatchLayers


def grid_of(patches: int) -> tuple[int, int] | None:
    """Return rows and columns of the grid that a square image is cut into; none where so many make no square."""
    side = math.isqrt(patches)
    return (side, side) if side * side == patches else None


def layer_title(where: str) -> str:
    """Return a short name of a torch module: `block 3` of a host's block, else the module's own."""
    found = _BLOCK.fullmatch(where)
    return f"block {found[1]}" if found else where or "compressor"
