"""Token Pooling: tokens are clustered, and each cluster is handed on as its centre.

"Token Pooling in Vision Transformers" (Marin et al., arXiv:2110.03860). No code of it is known: the reference is ours.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from msgspec import Meta
from torch import Tensor, nn

from edgecomp.compressors._base import Compressor, HostFeature, Params
from edgecomp.compressors._tokens import take, top_k
from edgecomp.specs import TensorSpec

__all__ = ["TokenPooling"]


class TokenPoolingParams(Params, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of Token Pooling.

    Attributes:
        clustering: `k-means`: centres are weighted means; `k-medoids`: they are tokens.
        iterations: rounds of assignment and update.
        significance: weight of a token: `attention`, what it received of all tokens in the layer that it comes from, a
            host's or given; or its `norm`, which is nearly the same for all tokens behind a LayerNorm.
        attention_heads: heads of the attention that is given where no host does (`--backbone none`).
    """

    clustering: Literal["k-means", "k-medoids"] = "k-means"
    iterations: Annotated[int, Meta(ge=1, le=256)] = 5
    significance: Literal["attention", "norm"] = "attention"
    attention_heads: Annotated[int, Meta(ge=1, le=1024)] = 6


class TokenPooling(Compressor):
    """Cluster the tokens around K centres, weighted by significance, and hand on the centres.

    Shapes: tokens (B, N, D), for `attention` received_attention (B, H, N) -> merged (B, K, D), size (B, K, 1) in
    tokens, source map (B, N) int32. K is the budget; centres start at the K most significant tokens, in their order.

    Static rewrite (level E4): K and the iterations are fixed. A token is assigned by an ArgMax of 2 x c - |c|^2, and
    clusters are summed by a product with their one-hot rows; one without weight keeps its centre.

    Source: arXiv:2110.03860, weighted K-means and K-medoids; both on the squared distance here.
    """

    Params = TokenPoolingParams
    params: TokenPoolingParams

    def input_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `tokens`, and `received_attention` where that weighs them."""
        count = self.budget.tokens_in
        tokens = TensorSpec("tokens", (batch, count, self.site.embed_dim), "float32", "tokens")
        if self.params.significance == "norm":
            return (tokens,)
        shape = (batch, self.params.attention_heads, count)
        return tokens, TensorSpec("received_attention", shape, "float32", "attention")

    @property
    def host_features(self) -> tuple[HostFeature, ...]:
        """The attention received, where that weighs the tokens."""
        return ("received_attention",) if self.params.significance == "attention" else ()

    def output_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `merged`, `size` and `source_map`."""
        clusters = self.budget.tokens_out
        return (
            TensorSpec("merged", (batch, clusters, self.site.embed_dim), "float32", "tokens"),
            TensorSpec("size", (batch, clusters, 1), "float32", "counts"),
            TensorSpec("source_map", (batch, self.budget.tokens_in), "int32", "indices"),
        )

    def forward(self, tokens: Tensor, received_attention: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return centres, sizes, and the cluster of each token; a weight below zero counts as zero."""
        weights = tokens.norm(dim=-1) if received_attention is None else received_attention.mean(1).clamp(min=0.0)
        centres = take(tokens, top_k(weights, self.budget.tokens_out))  # (B, K, D)
        clusters = torch.arange(self.budget.tokens_out, device=tokens.device).unsqueeze(-1)
        distances = _distances(tokens) if self.params.clustering == "k-medoids" else None
        for _ in range(self.params.iterations):
            members = (_nearest(tokens, centres).unsqueeze(1) == clusters).to(tokens.dtype)  # (B, K, N)
            weighted = members * weights.unsqueeze(1)
            mass = weighted.sum(-1, keepdim=True)
            if distances is None:
                updated = weighted @ tokens / torch.where(mass > 0, mass, torch.ones_like(mass))
            else:
                cost = weighted @ distances  # of each token as the medoid of each cluster: (B, K, N)
                outside = (1.0 - members) * (1.0 + cost.amax(-1, keepdim=True))
                updated = take(tokens, (cost * members + outside).argmin(-1))
            centres = torch.where(mass > 0, updated, centres)
        owner = _nearest(tokens, centres)
        members = (owner.unsqueeze(1) == clusters).to(tokens.dtype)
        return centres, members.sum(-1, keepdim=True), owner.to(torch.int32)

    def reference(self) -> nn.Module:
        """Return plain loops over samples and clusters."""
        return TokenPoolingOriginal(self)


def _nearest(tokens: Tensor, centres: Tensor) -> Tensor:
    """Return the centre nearest to each token: (B, N, D), (B, K, D) -> (B, N)."""
    square = centres.square().sum(-1).unsqueeze(1)
    return (2.0 * tokens @ centres.transpose(1, 2) - square).argmax(-1)


def _distances(tokens: Tensor) -> Tensor:
    """Return squared distances between tokens, (B, N, N)."""
    square = tokens.square().sum(-1, keepdim=True)
    return square + square.transpose(1, 2) - 2.0 * tokens @ tokens.transpose(1, 2)


class TokenPoolingOriginal(nn.Module):
    """Weighted K-means and K-medoids in plain loops, one sample and one cluster at a time."""

    def __init__(self, static: TokenPooling) -> None:
        super().__init__()
        self.static = static

    def forward(self, tokens: Tensor, received_attention: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return what the static module returns."""
        given: list[Tensor | None] = [None] * len(tokens)
        if received_attention is not None:
            given = [heads.sum(0) / len(heads) for heads in received_attention]
        samples = [self._sample(x, w) for x, w in zip(tokens, given, strict=True)]
        return tuple(torch.stack(part) for part in zip(*samples, strict=True))

    def _sample(self, x: Tensor, significance: Tensor | None) -> tuple[Tensor, ...]:
        params, clusters = self.static.params, self.static.budget.tokens_out
        weights = x.square().sum(1).sqrt() if significance is None else torch.relu(significance)
        centres = x[weights.argsort(descending=True, stable=True)[:clusters]].clone()
        for _ in range(params.iterations):
            owner = self._assign(x, centres)
            for k in range(clusters):
                members = (owner == k).nonzero()[:, 0]
                if weights[members].sum() <= 0:
                    continue
                if params.clustering == "k-means":
                    centres[k] = (weights[members, None] * x[members]).sum(0) / weights[members].sum()
                else:
                    apart = torch.cdist(x[members], x[members], compute_mode="donot_use_mm_for_euclid_dist").square()
                    centres[k] = x[members[(weights[members, None] * apart).sum(0).argmin()]]
        owner = self._assign(x, centres)
        size = torch.stack([(owner == k).sum() for k in range(clusters)]).to(x.dtype)
        return centres, size[:, None], owner.to(torch.int32)

    def _assign(self, x: Tensor, centres: Tensor) -> Tensor:
        return torch.stack([(token - centres).square().sum(1).argmin() for token in x])
