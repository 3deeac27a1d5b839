"""VisPruner: half of the tokens stay for the class token's attention, half for being unlike each other.

Paper: "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs" (arXiv:2412.01818v2,
ICCV 2025), section 3.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from msgspec import Meta
from torch import Tensor, nn

from edgecomp.compressors._base import HostFeature
from edgecomp.compressors._pruning import PruneParams, TokenPruner, select
from edgecomp.compressors._tokens import take, unit_rows
from edgecomp.specs import Output, Site, TokenBudget

__all__ = ["VisPruner"]

_ROUND = 8  # duplicates that a round removes at most


class VisPrunerParams(PruneParams, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of VisPruner, with those of `PruneParams`.

    Attributes:
        important_ratio: share of the budget that is kept for its attention, rounded down.
    """

    important_ratio: Annotated[float, Meta(ge=0, le=1)] = 0.5


class VisPruner(TokenPruner):
    """Keep important tokens, and of the others the most diverse.

    Shapes: tokens (B, N, D), class_attention (B, H, N) -> kept (B, M, D), index (B, M) int32.

    Static rewrite (level E1): N and M fix how many rounds there are, and what each removes. A round pairs tokens of
    even and odd rank, and drops the (at most 8) of even rank that have the most similar partner. The original fails
    where a round meets an odd count; here the last token is then one of even rank.

    Source: arXiv:2412.01818v2, section 3.3.
    """

    Params = VisPrunerParams
    params: VisPrunerParams

    def __init__(self, params: Any, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        super().__init__(params, site, budget, output)
        self.important = int(budget.tokens_out * params.important_ratio)
        self.diverse = budget.tokens_out - self.important

    @property
    def host_features(self) -> tuple[HostFeature, ...]:
        """The class token's attention."""
        return ("class_attention",)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What an export should say: how the budget is shared."""
        return (f"{self.important} important and {self.diverse} diverse tokens",)

    @property
    def scored_by(self) -> tuple[str, ...]:
        """The class token's attention."""
        return ("class_attention",)

    @property
    def kept_by_score(self) -> int:
        """The important tokens; diverse ones stay for another reason."""
        return self.important

    def score_of(self, *read: Tensor) -> Tensor:
        """Return the class token's attention, averaged over heads."""
        return read[0].mean(1)

    def rounds(self) -> tuple[int, ...]:
        """Return how many tokens each round removes."""
        left, removed = self.budget.tokens_in - self.important, []
        while self.diverse and left > self.diverse:
            removed.append(min(_ROUND, left - self.diverse, (left + 1) // 2))
            left -= removed[-1]
        return tuple(removed)

    def forward(self, tokens: Tensor, class_attention: Tensor) -> tuple[Tensor, ...]:
        """Return the tokens kept, and their places."""
        ranked = select(self.score_of(class_attention), tokens.shape[1], order="rank")
        unit = unit_rows(tokens)
        important, left = ranked[:, : self.important], ranked[:, self.important :]
        for removed in self.rounds():
            even, odd = left[:, ::2], left[:, 1::2]
            if removed == even.shape[1]:
                left = odd
                continue
            alike = (take(unit, even) @ take(unit, odd).transpose(1, 2)).amax(-1)
            distinct = select(alike, even.shape[1], order="rank")[:, removed:]
            left = torch.cat([even.gather(1, distinct), odd], 1)
        index = torch.cat([important, left], 1) if self.diverse else important
        if self.params.order == "raster":
            index = index.sort(-1).values
        return take(tokens, index), index.to(torch.int32)

    def reference(self) -> nn.Module:
        """Return plain lists, one sample at a time."""
        return VisPrunerOriginal(self)


class VisPrunerOriginal(nn.Module):
    """The eager original, as lists of places, one sample at a time."""

    def __init__(self, static: VisPruner) -> None:
        super().__init__()
        self.static = static

    def forward(self, tokens: Tensor, class_attention: Tensor) -> tuple[Tensor, ...]:
        """Return what the static module returns."""
        samples = [self._sample(x, a) for x, a in zip(tokens, class_attention, strict=True)]
        return tuple(torch.stack(part) for part in zip(*samples, strict=True))

    def _sample(self, x: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        static = self.static
        ranked = torch.argsort(attention.sum(0) / len(attention), descending=True, stable=True).tolist()
        important, left = ranked[: static.important], ranked[static.important :]
        length = x.square().sum(1, keepdim=True).sqrt()
        unit = torch.where(length > 0, x / length, torch.zeros_like(x))
        while static.diverse and len(left) > static.diverse:
            even, odd = left[::2], left[1::2]
            removed = min(_ROUND, len(left) - static.diverse, len(even))
            alike = (unit[even] @ unit[odd].T).max(1).values
            order = torch.argsort(alike, descending=True, stable=True).tolist()
            left = [even[place] for place in order[removed:]] + odd
        chosen = important + (left if static.diverse else [])
        index = torch.tensor(sorted(chosen) if static.params.order == "raster" else chosen)
        return x[index], index.to(torch.int32)
