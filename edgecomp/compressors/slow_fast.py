"""Slow-fast: text and image tokens are thinned out side by side, the image's by spatial frequency first.

The form of the project's founding notes on VIST (arXiv:2502.00791). In VIST itself the paths are the other way round:
rendered text is skimmed by the vision encoder (fast), near text is read by the language model (slow).
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from msgspec import Meta
from torch import Tensor, nn

from edgecomp.compressors._base import HostFeature, Natural, Positive
from edgecomp.compressors._protection import (
    READS,
    count_protected,
    find_grid,
    protect_and_fill,
    require_room,
    spatial_frequency,
)
from edgecomp.compressors._pruning import PruneParams, TokenPruner, select
from edgecomp.compressors._tokens import take
from edgecomp.errors import InvalidSpec
from edgecomp.specs import Output, Site, TensorSpec, TokenBudget

__all__ = ["SlowFast"]


class SlowFastParams(PruneParams, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of slow-fast, with those of `PruneParams`: `order` is of text, and of what is not protected.

    Attributes:
        protection: `spatial-frequency`: tokens above its quantile are kept first; `none`: importance alone decides.
        quantile: of the spatial frequency, for protection.
        keep_ratio: share of the image's tokens kept where no budget says how many, rounded down.
        importance: of the image's tokens: their `norm`, or the attention that they receive, of the class token or of
            all tokens.
        grid_height: rows of the token grid, for protection; 0: the grid is square.
        words: tokens of the text.
        text_dim: their width; 0: that of the image's tokens.
        text_keep_ratio: share of the text's tokens kept, rounded down.
        text_importance: their `norm`, or `given`, an input.
    """

    protection: Literal["spatial-frequency", "none"] = "spatial-frequency"
    quantile: Annotated[float, Meta(ge=0, lt=1)] = 0.7
    keep_ratio: Annotated[float, Meta(gt=0, le=1)] = 0.7
    importance: Literal["norm", "class-attention", "received-attention"] = "norm"
    grid_height: Natural = 0
    words: Positive = 512
    text_dim: Natural = 0
    text_keep_ratio: Annotated[float, Meta(gt=0, le=1)] = 0.3
    text_importance: Literal["norm", "given"] = "norm"

    @property
    def words_kept(self) -> int:
        """Tokens of the text that stay."""
        return int(self.text_keep_ratio * self.words)


class SlowFast(TokenPruner):
    """Keep the most important tokens of an image and of a text.

    Shapes: tokens (B, N, D), attention (B, H, N) where importance reads it, text (B, T, E), text_scores (B, T) where
    they are given -> kept (B, M, D), index (B, M), text_kept (B, K, E), text_index (B, K); M is the budget, K =
    int(text_keep_ratio T). With protection the protected tokens come first, in raster order, then the others,
    both in raster order where `order` says nothing else.

    Static rewrite (level E4): a TopK for each of text, protection and what fills up; all counts follow from N and T.

    Source: the project's founding notes (VIST, slow-fast compression).
    """

    Params = SlowFastParams
    params: SlowFastParams

    def __init__(self, params: Any, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        super().__init__(params, site, budget, output)
        if not params.words_kept:
            raise InvalidSpec(
                f"params.text_keep_ratio={params.text_keep_ratio} keeps none of {params.words} text tokens; raise it "
                "or params.words"
            )
        self.protected, self.grid = 0, (1, budget.tokens_in)
        if params.protection != "none":
            self.grid = find_grid(budget.tokens_in, params.grid_height, method="slow-fast")
            self.protected = count_protected(budget.tokens_in, params.quantile)
            require_room(self.protected, budget.tokens_out, quantile=params.quantile, tokens=budget.tokens_in)

    @classmethod
    def default_counts(cls, params: Any, site: Site) -> tuple[int, ...]:
        """Return the share of `keep_ratio`."""
        return (max(1, int(params.keep_ratio * site.tokens_in)),)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What an export should say: what is protected, and what stays of the text."""
        kept = f"{self.params.words_kept} of {self.params.words} text tokens stay"
        if not self.protected:
            return (kept,)
        return (f"{kept}; {self.protected} of {self.budget.tokens_in} image tokens are protected",)

    @property
    def host_features(self) -> tuple[HostFeature, ...]:
        """What the importance of image tokens reads."""
        return READS.get(self.params.importance, ())

    def input_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `tokens`, what importance reads, `text`, and `text_scores` where they are given."""
        words = self.params.words
        text = TensorSpec("text", (batch, words, self.params.text_dim or self.site.embed_dim), "float32", "tokens")
        scores = TensorSpec("text_scores", (batch, words), "float32", "attention")
        own = (text, scores) if self.params.text_importance == "given" else (text,)
        return (*super().input_specs(batch), *own)

    def output_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `kept`, `index`, `text_kept` and `text_index`."""
        kept = self.params.words_kept
        return (
            *super().output_specs(batch),
            TensorSpec("text_kept", (batch, kept, self.params.text_dim or self.site.embed_dim), "float32", "features"),
            TensorSpec("text_index", (batch, kept), "int32", "indices"),
        )

    def forward(self, tokens: Tensor, *read: Tensor) -> tuple[Tensor, ...]:
        """Return what is kept of both, and where it was."""
        attention, text, text_scores = self.sort_inputs(read)
        score = tokens.norm(dim=-1) if attention is None else attention.mean(1)
        if self.protected:
            frequency = spatial_frequency(tokens, *self.grid)
            index = protect_and_fill(
                frequency, score, protected=self.protected, keep=self.budget.tokens_out, order=self.params.order
            )
        else:
            index = select(score, self.budget.tokens_out, order=self.params.order)
        word_score = text.norm(dim=-1) if text_scores is None else text_scores
        words = select(word_score, self.params.words_kept, order=self.params.order)
        return take(tokens, index), index.to(torch.int32), take(text, words), words.to(torch.int32)

    def sort_inputs(self, read: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Return attention, text and its scores of what follows the tokens."""
        attention, own = (read[0], read[1:]) if self.host_features else (None, read)
        return attention, own[0], own[1] if len(own) > 1 else None

    def reference(self) -> nn.Module:
        """Return plain sorting, one sample at a time."""
        return SlowFastOriginal(self)


class SlowFastOriginal(nn.Module):
    """The eager original: rankings as lists, one sample at a time."""

    def __init__(self, static: SlowFast) -> None:
        super().__init__()
        self.static = static

    def forward(self, tokens: Tensor, *read: Tensor) -> tuple[Tensor, ...]:
        """Return what the static module returns."""
        attention, text, text_scores = self.static.sort_inputs(read)
        samples = []
        for place, (x, words) in enumerate(zip(tokens, text, strict=True)):
            heads = None if attention is None else attention[place]
            score = x.square().sum(1).sqrt() if heads is None else heads.sum(0) / len(heads)
            word_score = words.square().sum(1).sqrt() if text_scores is None else text_scores[place]
            chosen = torch.tensor(self._choose(x, score))
            read_on = torch.tensor(self._highest(word_score, self.static.params.words_kept))
            samples.append((x[chosen], chosen.to(torch.int32), words[read_on], read_on.to(torch.int32)))
        return tuple(torch.stack(part) for part in zip(*samples, strict=True))

    def _highest(self, score: Tensor, count: int) -> list[int]:
        ranking = torch.sort(score, descending=True, stable=True).indices[:count].tolist()
        return sorted(ranking) if self.static.params.order == "raster" else ranking

    def _choose(self, x: Tensor, score: Tensor) -> list[int]:
        static = self.static
        if static.params.protection == "none":
            return self._highest(score, static.budget.tokens_out)
        height, width = static.grid
        planes = x.reshape(height, width, -1)
        beside = torch.cat([planes.diff(dim=1), planes[:, -1:] - planes[:, -2:-1]], 1).abs().mean(-1)
        below = torch.cat([planes.diff(dim=0), planes[-1:] - planes[-2:-1]], 0).abs().mean(-1)
        frequency = ((beside + below) / 2).flatten()
        count = len(x) - 1 - math.floor(static.params.quantile * (len(x) - 1))
        safe = sorted(torch.sort(frequency, descending=True, stable=True).indices[:count].tolist())
        ranking = torch.sort(score, descending=True, stable=True).indices.tolist()
        others = [place for place in ranking if place not in safe][: static.budget.tokens_out - len(safe)]
        return [*safe, *(sorted(others) if static.params.order == "raster" else others)]
