"""Detail router: more tokens where a question asks for details, or an image holds many edges or text.

Source: the project's founding notes, chapter FastVLM ("detail gate": 49 tokens, or 89 where details are needed). What
an edge and text are is ours: `compressors/_saliency.py`. So is the graded need.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import msgspec
import torch
from torch import Tensor

from edgecomp.compressors._saliency import edge_density, text_likelihood
from edgecomp.routers._base import Router, even_thresholds, next_above

__all__ = ["DetailParams", "DetailRouter"]

_PATCH = 16  # where no host says how large its patches are


class DetailParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The bounds are the notes'; there is nothing to set but thresholds."""


class DetailRouter(Router):
    """Send a request higher where one of four signs says that details are needed.

    The notes' gate: more than 15 words, or a word for a detail (small, text, corner, background), or an edge density
    above 0.3, or a text likelihood above 0.5. need = the largest of words / 30, detail word, edge density / 0.6 and
    text likelihood, held to [0, 1]: each term passes 0.5 where its sign does, so that a need above 0.5 is the gate.

    Text likelihood is the highest of all patches: a plate or a label fills a few of them and is what details are asked
    of, while the mean passes 0.5 only on a page of text. The price is that a single strongly textured patch opens the
    gate; `edgecomp calibrate` moves the threshold where that is too often.

    Shapes: image, words (B, 5) -> need (B, 1), signals (B, 4). Pixels to the right of the last whole patch, and below,
    are not searched for text.

    Source: the founding notes.
    """

    reads: ClassVar[Literal["image", "stem"]] = "image"
    reads_words: ClassVar[bool] = True
    signal_names = ("words", "detail", "edge_density", "text_likelihood")
    Params = DetailParams

    @property
    def default_thresholds(self) -> tuple[float, ...]:
        """With two buckets the next float32 above 0.5, since the gate is strict; equal parts otherwise."""
        buckets = len(self.site.buckets)
        return (next_above(0.5),) if buckets == 2 else even_thresholds(buckets)

    def judge(self, *seen: Tensor) -> tuple[Tensor, Tensor]:
        """Return how much details are needed, and the four signs."""
        given, words = seen
        assert self.site.preprocess is not None
        side = self.site.preprocess.size
        patch = min(self.site.patch_size or _PATCH, side)
        whole = side // patch * patch
        pixels = self.pixels(given)
        edges = edge_density(pixels)
        text = text_likelihood(pixels[:, :, :whole, :whole], patch).amax(1)
        count, *_, detail = words.unbind(1)
        signs = torch.stack([count / 30, detail, edges / 0.6, text], 1)
        return signs.amax(1, keepdim=True).clamp(0.0, 1.0), torch.stack([count, detail, edges, text], 1)
