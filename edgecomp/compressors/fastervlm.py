"""FasterVLM: the tokens that the class token attends to most stay, in their order.

Paper: "[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster"
(arXiv:2412.01818), section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgecomp.compressors._base import HostFeature
from edgecomp.compressors._pruning import PruneParams, TokenPruner, select
from edgecomp.compressors._tokens import take

__all__ = ["FasterVLM"]


class FasterVLM(TokenPruner):
    """Keep the tokens with the highest class attention, averaged over heads.

    Shapes: tokens (B, N, D), class_attention (B, H, N) -> kept (B, M, D), index (B, M) int32.

    Static rewrite (level E1): TopK of M and Gather; the original's boolean mask gives the order of the image.

    Source: arXiv:2412.01818, section 3; the attention is that of the layer the tokens come from (in LLaVA the last but
    one).
    """

    Params = PruneParams
    params: PruneParams

    @property
    def host_features(self) -> tuple[HostFeature, ...]:
        """The class token's attention."""
        return ("class_attention",)

    @property
    def scored_by(self) -> tuple[str, ...]:
        """The class token's attention."""
        return ("class_attention",)

    def score_of(self, *read: Tensor) -> Tensor:
        """Return the class token's attention, averaged over heads."""
        return read[0].mean(1)

    def forward(self, tokens: Tensor, class_attention: Tensor) -> tuple[Tensor, ...]:
        """Return the tokens kept, and their places."""
        index = select(self.score_of(class_attention), self.budget.tokens_out, order=self.params.order)
        return take(tokens, index), index.to(torch.int32)

    def reference(self) -> nn.Module:
        """Return a boolean mask for each sample."""
        return FasterVLMOriginal(self)


class FasterVLMOriginal(nn.Module):
    """The eager original: a mask of the highest, one sample at a time."""

    def __init__(self, static: FasterVLM) -> None:
        super().__init__()
        self.static = static

    def forward(self, tokens: Tensor, class_attention: Tensor) -> tuple[Tensor, ...]:
        """Return what the static module returns."""
        samples = []
        for x, attention in zip(tokens, class_attention, strict=True):
            order = torch.argsort(attention.sum(0) / len(attention), descending=True, stable=True)
            chosen = order[: self.static.budget.tokens_out]
            if self.static.params.order == "raster":
                mask = torch.zeros(len(x), dtype=torch.bool)
                mask[chosen] = True
                chosen = mask.nonzero()[:, 0]
            samples.append((x[chosen], chosen.to(torch.int32)))
        return tuple(torch.stack(part) for part in zip(*samples, strict=True))
