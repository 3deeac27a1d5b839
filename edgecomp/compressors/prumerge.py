"""PruMerge: outliers of the class token's attention stay, and each takes in the tokens whose keys are nearest.

Paper: "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models" (arXiv:2403.15388), section 3.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from msgspec import Meta
from torch import Tensor, nn

from edgecomp.compressors._base import HostFeature
from edgecomp.compressors._pruning import PruneParams, TokenPruner, select
from edgecomp.compressors._tokens import take, top_k, unit_rows
from edgecomp.errors import InvalidSpec
from edgecomp.specs import Output, Site, TensorSpec, TokenBudget

__all__ = ["PruMerge"]

_APART = -2.0  # below any cosine


class PruMergeParams(PruneParams, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of PruMerge, with those of `PruneParams`.

    Attributes:
        adaptive: keep as many tokens as the attention has outliers (above the upper quartile by 1.5 times the distance
            of the quartiles), at most as many as the budget has rows for; else as many as the budget says.
        neighbours: tokens that each kept one takes in; fewer where there are fewer.
        prefix_tokens: class and register tokens in front of given tokens and keys; a host says it itself.
    """

    adaptive: bool = True
    neighbours: Annotated[int, Meta(ge=1, le=4096)] = 32
    prefix_tokens: Annotated[int, Meta(ge=1, le=64)] = 1


class PruMerge(TokenPruner):
    """Keep the outliers of attention, add to each its neighbours, and to all one token of the rest.

    Shapes: tokens (B, P + N, D) with the class token first, class_query (B, C), keys (B, P + N, C) -> kept (B, M, D)
    and index (B, M) int32; adaptive also count (B,) int64 and mask (B, M). Rows up to count are the kept tokens,
    highest attention first, and behind them the token of the rest, index -1; rows behind count are zero. M is the
    budget, that token counted.

    Static rewrite (level E2, with a fixed count E1): neighbours are found for M - 1 rows whatever the count.

    Source: arXiv:2403.15388, sections 3.2 (outliers) and 3.3 (merging by key similarity). The published code takes
    queries and keys of the encoder's last layer and tokens of the last but one; behind a host both are of one layer.
    """

    Params = PruMergeParams
    params: PruMergeParams
    keeps_prefix = True
    hands_on_prefix = False
    kept_counts: Tensor

    def __init__(self, params: Any, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        super().__init__(params, site, budget, output)
        if budget.tokens_out < 2:
            raise InvalidSpec("budget 1 has no row left for a kept token beside that of the rest; give at least 2")
        tokens = budget.tokens_in
        # the original counts outliers as a share of N and takes int(N * share), which can be one less
        counts = [int(tokens * (count / tokens)) for count in range(tokens + 1)]
        self.register_buffer("kept_counts", torch.tensor(counts), persistent=False)

    @property
    def host_features(self) -> tuple[HostFeature, ...]:
        """The class token's query, and the keys."""
        return ("class_query", "keys")

    @property
    def remarks(self) -> tuple[str, ...]:
        """What an export should say of the counts."""
        if not self.params.adaptive:
            return ()
        return (f"at most {self.budget.tokens_out} rows are real; `count` says how many, others are zero",)

    def output_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `kept` and `index`, and adaptive `count` and `mask`."""
        specs = super().output_specs(batch)
        return (*specs, *self.count_specs(batch)) if self.params.adaptive else specs

    @property
    def scored_by(self) -> tuple[str, ...]:
        """The class token's query, and the keys."""
        return ("class_query", "keys")

    @property
    def kept_by_score(self) -> int:
        """All rows but the token of the rest."""
        return self.budget.tokens_out - 1

    def score_of(self, *read: Tensor) -> Tensor:
        """Return what the class token reads of each patch, all heads as one: (B, N)."""
        class_query, keys = read
        # no product of matrices: equal keys have to score equal, or rounding alone makes outliers
        scores = (keys * class_query.unsqueeze(1)).sum(-1) * keys.shape[-1] ** -0.5
        weights: Tensor = scores.softmax(-1)
        return weights[:, self.num_prefix_tokens :]

    def forward(self, tokens: Tensor, class_query: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
        """Return the kept tokens with their neighbours, and the rest."""
        prefix, rows = self.num_prefix_tokens, self.budget.tokens_out - 1
        patches, unit = tokens[:, prefix:], unit_rows(keys[:, prefix:])
        attention = self.score_of(class_query, keys)
        count = patches.shape[1]
        ranked = select(attention, count, order="rank")
        index = ranked[:, :rows]
        # neighbours of each kept token, itself left out
        own = index.unsqueeze(-1) == torch.arange(count, device=tokens.device)
        alike = torch.where(own, _APART, take(unit, index) @ unit.transpose(1, 2))  # (B, rows, N)
        near = top_k(alike, min(self.params.neighbours, count - 1))
        weights = attention.gather(1, near.flatten(1)).reshape(near.shape)
        spread = torch.zeros_like(alike).scatter(
            2, near, weights.to(alike.dtype)
        )  # one product with N columns beats M gathers of D
        merged = take(patches, index) + spread @ patches
        kept = self._count(attention, ranked).clamp(max=rows).unsqueeze(1)  # (B, 1)
        places = torch.arange(rows + 1, device=tokens.device)
        ranks = torch.arange(count, device=tokens.device)
        left = torch.where(ranks >= kept, attention.gather(1, ranked), torch.zeros_like(attention))
        rest = left.unsqueeze(1) @ take(patches, ranked)  # (B, 1, D)
        if not self.params.adaptive:
            index = torch.cat([index, torch.full_like(index[:, :1], -1)], 1)
            return torch.cat([merged, rest], 1), index.to(torch.int32)
        real, is_rest = (places < kept).unsqueeze(-1), (places == kept).unsqueeze(-1)
        padded, padded_index = F.pad(merged, (0, 0, 0, 1)), F.pad(index, (0, 1), value=-1)
        found = torch.where(real, padded, torch.where(is_rest, rest, torch.zeros_like(rest)))
        chosen = torch.where(real.squeeze(-1), padded_index, torch.full_like(padded_index, -1))
        return found, chosen.to(torch.int32), (kept + 1).squeeze(1), places <= kept

    def _count(self, attention: Tensor, ranked: Tensor) -> Tensor:
        """Return how many patches stay: (B,) int64."""
        if not self.params.adaptive:
            return torch.full_like(ranked[:, 0], self.budget.tokens_out - 1)
        ordered = attention.gather(1, ranked)  # descending
        low, high = _quantile(ordered, 0.25), _quantile(ordered, 0.75)
        outliers = (attention > high + 1.5 * (high - low)).sum(1)
        return self.kept_counts[outliers]

    def reference(self) -> nn.Module:
        """Return the published code's loops, one sample and one token at a time."""
        return PruMergeOriginal(self)


def _quantile(ordered: Tensor, q: float) -> Tensor:
    """Return a quantile of descending rows by linear interpolation: (B, N) -> (B, 1)."""
    last = ordered.shape[1] - 1
    place = q * last
    low = int(place)
    below, above = ordered[:, last - low, None], ordered[:, max(0, last - low - 1), None]
    return below + (place - low) * (above - below)


class PruMergeOriginal(nn.Module):
    """The eager original, in plain loops."""

    def __init__(self, static: PruMerge) -> None:
        super().__init__()
        self.static = static

    def forward(self, tokens: Tensor, class_query: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
        """Return what the static module returns."""
        samples = [self._sample(x, q, k) for x, q, k in zip(tokens, class_query, keys, strict=True)]
        parts = tuple(torch.stack(part) for part in zip(*samples, strict=True))
        return parts if self.static.params.adaptive else parts[:2]

    def _sample(self, x: Tensor, query: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
        static, prefix, rows = self.static, self.static.num_prefix_tokens, self.static.budget.tokens_out
        attention = torch.softmax((keys * query).sum(1) / keys.shape[1] ** 0.5, dim=0)[prefix:]
        x, keys = x[prefix:], F.normalize(keys[prefix:], dim=-1)
        count = rows - 1
        if static.params.adaptive:
            q1, q3 = torch.quantile(attention, 0.25), torch.quantile(attention, 0.75)
            share = int((attention > q3 + 1.5 * (q3 - q1)).sum()) / len(x)
            count = min(int(len(x) * share), rows - 1)
        order = torch.argsort(attention, descending=True, stable=True)
        chosen, rest = order[:count], order[count:]
        merged = []
        for token in chosen.tolist():
            others = torch.tensor([place for place in range(len(x)) if place != token])
            alike = torch.argsort((keys[others] * keys[token]).sum(1), descending=True, stable=True)
            near = others[alike[: static.params.neighbours]]
            merged.append(x[token] + (x[near] * attention[near, None]).sum(0))
        merged.append((x[rest] * attention[rest, None]).sum(0))
        kept, index = x.new_zeros(rows, x.shape[1]), torch.full((rows,), -1, dtype=torch.int32)
        kept[: count + 1], index[:count] = torch.stack(merged), chosen.to(torch.int32)
        return kept, index, torch.tensor(count + 1), torch.arange(rows) <= count
