"""Policy router: a small network on the mean token says which share of the tokens to remove.

Source: the project's founding notes, chapter ACT-IN-LLM ("policy network"). The paper they cite (ICLR 2025 submission)
has no such network; none is published, and edgecomp ships none that is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar, Literal

import msgspec
import torch
from torch import Tensor, nn

from edgecomp.compressors._checkpoint import load_exactly
from edgecomp.routers._base import Router, RouterSite

__all__ = ["PolicyParams", "PolicyRouter"]

_HIDDEN = (512, 256)


class PolicyParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The widths are the notes'; what there is to set are weights and thresholds."""


class PolicyRouter(Router):
    """Send an image to the bucket nearest to the share of tokens that a network says to keep.

    ratio = sigmoid(fc3(relu(fc2(relu(fc1(mean of the patch tokens)))))), the share removed at layer 0;
    removed = min(1, ratio (1 + l / L)) at block l of L; need = 1 - removed.

    The notes join mean text features to the mean token, and their first layer reads 2 D numbers. A router stands
    before any text encoder and has none, so that `fc1` is D -> 512, and a checkpoint of the notes' width does not fit.
    A method inside a host removes tokens in several blocks, while a bucket is named for what is left at the end: l is
    the block of its last cut, counted from 0. Elsewhere l is 0. A need n stands for n N of N tokens; of a table with
    nested buckets for entries between the smallest and the largest, as the notes' int(32 + 96 n) has it.

    Shapes: tokens (B, P + N, D) -> need (B, 1), signals (B, 2). Weights: fc1 (512, D), fc2 (256, 512), fc3 (1, 256),
    with biases.

    Source: the founding notes. Midway between two buckets the larger one is chosen.
    """

    reads: ClassVar[Literal["image", "stem"]] = "stem"
    signal_names = ("ratio", "removed")
    Params = PolicyParams

    def __init__(self, params: Any, site: RouterSite) -> None:
        super().__init__(params, site)
        _, width = self.tokens_shape()
        self.fc1 = nn.Linear(width, _HIDDEN[0])
        self.fc2 = nn.Linear(*_HIDDEN)
        self.fc3 = nn.Linear(_HIDDEN[1], 1)
        self.depth_factor = 1.0 + site.cuts[-1] / site.depth if site.cuts else 1.0
        self.is_trained = False

    @property
    def default_thresholds(self) -> tuple[float, ...]:
        """The middle between two neighbouring buckets, as a need."""
        least, most = self.site.span
        return tuple(((low + high) / 2 - least) / (most - least) for low, high in pairwise(self.site.buckets))

    @property
    def remarks(self) -> tuple[str, ...]:
        """What an export should say: that it knows nothing, where it was given no weights."""
        return () if self.is_trained else ("the policy router is untrained: its weights are random",)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Load all three layers; names and shapes must fit.

        Raises:
            WeightsError: it names every key that is missing, not known or of another shape.
        """
        load_exactly(self, state, layout="policy router's")
        self.is_trained = True

    def judge(self, *seen: Tensor) -> tuple[Tensor, Tensor]:
        """Return the share to keep; the shares removed at layer 0 and at the last cut."""
        mean = self.patch_tokens(seen[0]).mean(1)  # (B, D)
        ratio = self.fc3(self.fc2(self.fc1(mean).relu()).relu()).sigmoid()  # (B, 1)
        removed = (ratio * self.depth_factor).clamp(max=1.0)
        return 1.0 - removed, torch.cat([ratio, removed], 1)
