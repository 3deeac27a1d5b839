"""Difficulty router: a weighted sum of what an image holds and of what a question asks.

Source: the project's founding notes, chapter Token Compensator ("difficulty router"). What an edge, a colour's variance
and an object are is ours: `compressors/_saliency.py`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import msgspec
import torch
from torch import Tensor

from edgecomp.compressors._saliency import colour_variance, edge_density, object_proxy
from edgecomp.errors import InvalidSpec
from edgecomp.routers._base import Router, RouterSite, even_thresholds

__all__ = ["DifficultyParams", "DifficultyRouter"]

_NOTES = (0.3, 0.6, 0.85)  # of four buckets: 64, 144, 256 and 400 of 576
_LEVELS = (64, 144, 256, 400)  # tokens kept of 576, the notes' buckets
_SMALLEST = 16  # objects are counted in 16 x 16 cells, each a pixel at least


class DifficultyParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The weights are the notes'; there is nothing to set but thresholds."""


class DifficultyRouter(Router):
    """Send a request to the bucket that its difficulty reaches.

    image = 0.3 edge density + 0.2 colour variance + 0.5 objects / 10;
    query = 0.2 words / 20 + 0.3 negation + 0.3 counting + 0.2 reasoning;
    need = difficulty = 0.6 image + 0.4 query, held to [0, 1].

    Shapes: image, words (B, 5) -> need (B, 1), signals (B, 6). The words' share has no bound of its own: 250 words are
    the highest difficulty.

    Source: the founding notes; objects come divided by 10 and at most 1.
    """

    reads: ClassVar[Literal["image", "stem"]] = "image"
    reads_words: ClassVar[bool] = True
    signal_names = ("edge_density", "colour_variance", "objects", "image", "query", "difficulty")
    Params = DifficultyParams

    def __init__(self, params: Any, site: RouterSite) -> None:
        super().__init__(params, site)
        assert site.preprocess is not None
        if site.preprocess.size < _SMALLEST:
            raise InvalidSpec(
                f"router {self.label} counts objects in {_SMALLEST} x {_SMALLEST} cells, and the image has "
                f"{site.preprocess.size} pixels a side; choose --router detail, or a larger --image-size"
            )

    @property
    def default_thresholds(self) -> tuple[float, ...]:
        """The notes' where the buckets keep the notes' shares, 64, 144, 256 and 400 of 576; equal parts otherwise."""
        buckets, tokens = self.site.buckets, self.site.tokens_in
        levels = tuple(round(level * tokens / 576) for level in _LEVELS)
        return _NOTES if buckets == levels else even_thresholds(len(buckets))

    def judge(self, *seen: Tensor) -> tuple[Tensor, Tensor]:
        """Return the difficulty, and what it was made of."""
        given, words = seen
        pixels = self.pixels(given)
        edges, colours, objects = edge_density(pixels), colour_variance(pixels), object_proxy(pixels)
        image = 0.3 * edges + 0.2 * colours + 0.5 * objects
        count, negation, counting, reasoning, _ = words.unbind(1)
        query = 0.2 * count / 20 + 0.3 * negation + 0.3 * counting + 0.2 * reasoning
        difficulty = (0.6 * image + 0.4 * query).clamp(0.0, 1.0)
        return difficulty[:, None], torch.stack([edges, colours, objects, image, query, difficulty], 1)
