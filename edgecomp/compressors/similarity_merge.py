"""Greedy similarity merge: every token above a threshold of similarity joins the first token that is free.

The founding notes' merging, which cites ToMe and is another algorithm: by a threshold, over all pairs, with a plain
mean, so that the number of groups depends on the data. No published code has it; the reference is the notes' loop.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from msgspec import Meta
from torch import Tensor, nn

from edgecomp.compressors._base import Compressor, Natural, Params, Positive
from edgecomp.compressors._tokens import top_k, unit_rows
from edgecomp.errors import InvalidSpec
from edgecomp.specs import Output, Site, TensorSpec, TokenBudget

__all__ = ["SimilarityMerge"]


class SimilarityMergeParams(Params, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of the greedy similarity merge.

    Attributes:
        threshold: cosine similarity above which a token joins a group.
        scope: which tokens may join: `all`; `adjacent`: the eight neighbours on the token grid; `chunk`: those of the
            same run of `chunk` tokens, an approximation.
        chunk: tokens in a chunk.
        grid_height: rows of the token grid, for `adjacent`; 0: the square root of the number of tokens.
    """

    threshold: Annotated[float, Meta(ge=-1, le=1)] = 0.9
    scope: Literal["all", "adjacent", "chunk"] = "all"
    chunk: Positive = 256
    grid_height: Natural = 0


class SimilarityMerge(Compressor):
    """Group each token, in order, with all later free ones more similar to it than a threshold, and average the groups.

    Shapes: tokens (B, N, D) -> merged (B, M, D), count (B,) int64, mask (B, M), source map (B, N) int32. M is the
    budget; the first min(count, M) rows are groups, in the order of their first tokens, and those behind are zero.
    A count above M says that groups were left out; their tokens have a row of M or more in the map.

    Static rewrite (level E2, against the notes' loop): a token leads a group exactly when no earlier leader is similar
    to it. From all tokens as leaders, repeating that rule settles at least one more token each time, so that as many
    products of the (N, N) similarity mask with the leaders as a chain can have tokens give the loop's leaders; they are
    unrolled. Each other token belongs to the first leader similar to it, which is one ArgMax; groups are summed by a
    product with their one-hot rows, and leaders come first by a TopK of their places.

    Source: the project's founding notes, "greedy similarity merge".
    """

    Params = SimilarityMergeParams
    params: SimilarityMergeParams
    allowed: Tensor

    def __init__(
        self, params: SimilarityMergeParams, site: Site, budget: TokenBudget, output: Output = "tokens"
    ) -> None:
        super().__init__(params, site, budget, output)
        earlier = allowed_pairs(params, budget.tokens_in)
        self.register_buffer("allowed", earlier.to(torch.get_default_dtype()), persistent=False)

    @classmethod
    def default_counts(cls, params: SimilarityMergeParams, site: Site) -> tuple[int, ...]:  # noqa: ARG003 - the signature of all
        """Return rows for all tokens, since none may be alike."""
        return (site.tokens_in,)

    @property
    def rounds(self) -> int:
        """How many products settle every leader: the longest chain of tokens that can wait for each other, less one."""
        tokens = self.budget.tokens_in
        return min(tokens, self.params.chunk if self.params.scope == "chunk" else tokens) - 1

    @property
    def remarks(self) -> tuple[str, ...]:
        """Say how the loop became static."""
        tokens = self.budget.tokens_in
        flops = 2 * self.rounds * tokens**2 / 1e6
        similarity = 2 * tokens**2 * self.site.embed_dim / 1e6
        text = (
            f"the loop over tokens is unrolled into {self.rounds} products, one after the other: {flops:.1f} MFLOP "
            f"beside {similarity:.1f} for the similarity; rows beyond the count are zero"
        )
        return (text,)

    def input_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `tokens`."""
        return (TensorSpec("tokens", (batch, self.budget.tokens_in, self.site.embed_dim), "float32", "tokens"),)

    def output_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `merged`, `count`, `mask` and `source_map`."""
        rows = self.budget.tokens_out
        return (
            TensorSpec("merged", (batch, rows, self.site.embed_dim), "float32", "tokens"),
            TensorSpec("count", (batch,), "int64", "indices"),
            TensorSpec("mask", (batch, rows), "bool", "mask"),
            TensorSpec("source_map", (batch, self.budget.tokens_in), "int32", "indices"),
        )

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Merge, and say how many groups there are."""
        count, rows = tokens.shape[1], self.budget.tokens_out
        unit = unit_rows(tokens)
        similar = (unit @ unit.transpose(1, 2) > self.params.threshold).to(tokens.dtype) * self.allowed  # (B, N, N)
        leaders = torch.ones_like(tokens[..., :1])
        for _ in range(self.rounds):
            leaders = 1.0 - (similar @ leaders).clamp(max=1.0)
        places = torch.arange(count, dtype=tokens.dtype, device=tokens.device)
        itself = torch.eye(count, dtype=tokens.dtype, device=tokens.device)
        owner = ((similar + itself) * leaders.transpose(1, 2) * (count - places)).argmax(-1)  # first leader of each
        order = top_k(leaders.squeeze(-1) * count - places, rows)  # leaders first, ascending: (B, M)
        members = (owner.unsqueeze(1) == order.unsqueeze(-1)).to(tokens.dtype)  # (B, M, N)
        sizes = members.sum(-1, keepdim=True)
        merged = members @ tokens / sizes.clamp(min=1.0)
        total = leaders.sum(1)  # (B, 1)
        before = (places.unsqueeze(-1) < owner.unsqueeze(1)).to(tokens.dtype)  # (B, N, N)
        source_map = (leaders * before).sum(1)
        return (
            merged,
            total.squeeze(-1).to(torch.int64),
            places[:rows] < total,
            source_map.to(torch.int32),
        )

    def reference(self) -> nn.Module:
        """Return the notes' loop."""
        return SimilarityMergeOriginal(self)


def allowed_pairs(params: SimilarityMergeParams, tokens: int) -> Tensor:
    """Return which earlier tokens j a token i may join, (N, N) bool."""
    places = torch.arange(tokens)
    row, column = places.unsqueeze(-1), places
    allowed = column < row
    if params.scope == "chunk":
        allowed = allowed & (column // params.chunk == row // params.chunk)
    elif params.scope == "adjacent":
        width = tokens // _grid_height(params, tokens)
        allowed = allowed & ((row // width - column // width).abs() <= 1) & ((row % width - column % width).abs() <= 1)
    return allowed


def _grid_height(params: SimilarityMergeParams, tokens: int) -> int:
    height = params.grid_height or math.isqrt(tokens)
    if tokens % height or (not params.grid_height and height * height != tokens):
        raise InvalidSpec(
            f"scope=adjacent needs a grid, and {tokens} tokens are no "
            + (f"{height} equal rows" if params.grid_height else "square")
            + "; set params.grid_height to the number of rows"
        )
    return height


class SimilarityMergeOriginal(nn.Module):
    """The notes' loop, one sample after the other."""

    def __init__(self, static: SimilarityMerge) -> None:
        super().__init__()
        self.static = static

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Return what the static module returns."""
        samples = [self._sample(x) for x in tokens]
        return tuple(torch.stack(part) for part in zip(*samples, strict=True))

    def _sample(self, x: Tensor) -> tuple[Tensor, ...]:
        rows = self.static.budget.tokens_out
        groups: list[list[int]] = []
        consumed: set[int] = set()
        for i in range(len(x)):
            if i in consumed:
                continue
            free = [j for j in range(len(x)) if j != i and j not in consumed and self._may_join(i, j)]
            group = [i, *(j for j in free if _cosine(x[i], x[j]) > self.static.params.threshold)]
            groups.append(group)
            consumed.update(group)
        merged = x.new_zeros(rows, x.shape[1])
        source_map = torch.empty(len(x), dtype=torch.int32)
        for row, group in enumerate(groups):
            source_map[group] = row
            if row < rows:
                merged[row] = x[group].mean(0)
        return merged, torch.tensor(len(groups)), torch.arange(rows) < len(groups), source_map

    def _may_join(self, i: int, j: int) -> bool:
        params, tokens = self.static.params, self.static.budget.tokens_in
        if params.scope == "chunk":
            return i // params.chunk == j // params.chunk
        if params.scope == "adjacent":
            width = tokens // _grid_height(params, tokens)
            return max(abs(i // width - j // width), abs(i % width - j % width)) <= 1
        return True


def _cosine(a: Tensor, b: Tensor) -> float:
    length = a.norm() * b.norm()
    return float((a * b).sum() / length) if length > 0 else 0.0
