"""Spatial-frequency protection: tokens that differ most from their neighbours stay, and a second score fills the rest.

The form of the project's founding notes on VIST (arXiv:2502.00791), which takes "frequency" to be spatial. It is not
what VIST does, whose probability-informed encoding masks frequent words in training; see method `vist`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from msgspec import Meta
from torch import Tensor, nn

from edgecomp.compressors._base import HostFeature, Natural
from edgecomp.compressors._protection import (
    READS,
    count_protected,
    find_grid,
    protect_and_fill,
    require_room,
    spatial_frequency,
)
from edgecomp.compressors._pruning import PruneParams, SelectionOrder, TokenPruner
from edgecomp.compressors._tokens import take
from edgecomp.specs import Output, Site, TensorSpec, TokenBudget

__all__ = ["SpatialFrequencyProtect"]


class SpatialFrequencyProtectParams(PruneParams, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of spatial-frequency protection, with those of `PruneParams`.

    Attributes:
        quantile: tokens whose frequency is above this quantile are protected: N - 1 - floor(quantile (N - 1)) of them.
        keep_ratio: share of the tokens kept where no budget says how many, rounded down.
        score: what the others are ranked by: their `norm`; the attention of the class token, or of all tokens, that
            they receive; or `given`, an input.
        grid_height: rows of the token grid; 0: the grid is square.
        order: of the tokens that are not protected: `rank`, highest score first, or `raster`.
    """

    quantile: Annotated[float, Meta(ge=0, lt=1)] = 0.7
    keep_ratio: Annotated[float, Meta(gt=0, le=1)] = 0.7
    score: Literal["norm", "class-attention", "received-attention", "given"] = "norm"
    grid_height: Natural = 0
    order: SelectionOrder = "rank"


class SpatialFrequencyProtect(TokenPruner):
    """Keep the tokens of highest spatial frequency, and of the others those of highest score.

    Shapes: tokens (B, N, D), and what the score reads (attention (B, H, N), or scores (B, N)) -> kept (B, M, D), index
    (B, M) int32. N tokens are a grid in raster order. The protected tokens come first, in raster order; the others
    follow, highest score first where `order` says nothing else.

    Static rewrite (level E4): a strict threshold at a quantile leaves a count that N alone decides, where scores
    differ; it is a TopK of that count, with the lower place first among equals. The others are a second TopK, in which
    the protected ones come last.

    Source: the project's founding notes (VIST, spatial-frequency protection).
    """

    Params = SpatialFrequencyProtectParams
    reads_grid = True
    params: SpatialFrequencyProtectParams

    def __init__(self, params: Any, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        super().__init__(params, site, budget, output)
        self.grid = find_grid(budget.tokens_in, params.grid_height, method="spatial-frequency-protect")
        self.protected = count_protected(budget.tokens_in, params.quantile)
        require_room(self.protected, budget.tokens_out, quantile=params.quantile, tokens=budget.tokens_in)

    @classmethod
    def default_counts(cls, params: Any, site: Site) -> tuple[int, ...]:
        """Return the share of `keep_ratio`."""
        return (max(1, int(params.keep_ratio * site.tokens_in)),)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What an export should say: how many are protected."""
        return (f"{self.protected} of {self.budget.tokens_in} tokens are protected by their spatial frequency",)

    @property
    def host_features(self) -> tuple[HostFeature, ...]:
        """What the second score reads."""
        return READS.get(self.params.score, ())

    def input_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `tokens`, and what the score reads."""
        specs = super().input_specs(batch)
        if self.params.score != "given":
            return specs
        return (*specs, TensorSpec("scores", (batch, self.budget.tokens_in), "float32", "attention"))

    def forward(self, tokens: Tensor, read: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the tokens kept, and their places."""
        index = protect_and_fill(
            spatial_frequency(tokens, *self.grid),
            self.second_score(tokens, read),
            protected=self.protected,
            keep=self.budget.tokens_out,
            order=self.params.order,
        )
        return take(tokens, index), index.to(torch.int32)

    def second_score(self, tokens: Tensor, read: Tensor | None) -> Tensor:
        """Return what the tokens that are not protected are ranked by: (B, N)."""
        if read is None:
            return tokens.norm(dim=-1)  # type: ignore[no-any-return]
        return read if self.params.score == "given" else read.mean(1)

    def reference(self) -> nn.Module:
        """Return the notes' form: a quantile and a mask, one sample at a time."""
        return SpatialFrequencyProtectOriginal(self)


class SpatialFrequencyProtectOriginal(nn.Module):
    """The eager original: neighbours one by one, a mask above the quantile, a stable sort of the rest."""

    def __init__(self, static: SpatialFrequencyProtect) -> None:
        super().__init__()
        self.static = static

    def forward(self, tokens: Tensor, read: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return what the static module returns."""
        given: list[Tensor | None] = [None] * len(tokens) if read is None else list(read)
        samples = [self._sample(x, r) for x, r in zip(tokens, given, strict=True)]
        return tuple(torch.stack(part) for part in zip(*samples, strict=True))

    def _sample(self, x: Tensor, read: Tensor | None) -> tuple[Tensor, Tensor]:
        static = self.static
        safe = protected_places(frequency_by_loops(x, *static.grid), static.params.quantile)
        if read is None:
            score = x.square().sum(1).sqrt()
        else:
            score = read if static.params.score == "given" else read.sum(0) / len(read)
        ranking = torch.sort(score, descending=True, stable=True).indices.tolist()
        others = [place for place in ranking if place not in safe][: static.budget.tokens_out - len(safe)]
        chosen = torch.tensor([*safe, *(sorted(others) if static.params.order == "raster" else others)])
        return x[chosen], chosen.to(torch.int32)


def frequency_by_loops(x: Tensor, height: int, width: int) -> Tensor:
    """Return the spatial frequency of each token of one sample (N, D), neighbour by neighbour."""
    found = []
    for row in range(height):
        for column in range(width):
            here = x[row * width + column]
            beside = x[row * width + (column + 1 if column + 1 < width else column - 1)]
            below = x[(row + 1 if row + 1 < height else row - 1) * width + column]
            found.append(((here - beside).abs().mean() + (here - below).abs().mean()) / 2)
    return torch.stack(found)


def protected_places(frequency: Tensor, quantile: float) -> list[int]:
    """Return the places above the quantile, ascending; of equals at the cut the first ones, as many as there may be."""
    count = len(frequency)
    most = count - 1 - math.floor(quantile * (count - 1))
    above = (frequency > torch.quantile(frequency, quantile)).nonzero()[:, 0].tolist()
    if len(above) == most:
        return [int(place) for place in above]
    ranking = torch.sort(frequency, descending=True, stable=True).indices[:most].tolist()
    return sorted(int(place) for place in ranking)
