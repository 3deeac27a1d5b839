"""What all token pruners share: how many tokens each block keeps, selection by a score, what becomes of the rest.

A pruner stands `inside` a vision transformer, where it drops tokens in some of its blocks, or `after` an encoder or
alone, where it drops them once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import torch
from msgspec import Meta
from torch import Tensor

from edgecomp.compressors._base import HostFeature, Params
from edgecomp.compressors._inside import BlockState, InsideCompressor, Trail
from edgecomp.compressors._tokens import top_k
from edgecomp.errors import InvalidSpec
from edgecomp.specs import Output, Site, TensorSpec, TokenBudget
from edgecomp.specs.tensor import TensorKind

__all__ = [
    "Kept",
    "PruneParams",
    "Schedule",
    "SelectionOrder",
    "TokenPruner",
    "compose_index",
    "geometric_counts",
    "others",
    "papers_blocks",
    "residual_token",
    "scheduled_counts",
    "select",
    "with_prefix",
]

Schedule = Literal["constant", "linear", "exponential", "step", "cosine", "piecewise", "table"]
SelectionOrder = Literal["rank", "raster"]


class PruneParams(Params, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of all pruners.

    Attributes:
        order: of the tokens kept: `rank`, highest score first, or `raster`, as they came.
        attention_heads: heads of the attention that is handed over where no host does (`--backbone none`).
    """

    order: SelectionOrder = "raster"
    attention_heads: Annotated[int, Meta(ge=1, le=1024)] = 6


class Kept(NamedTuple):
    """What one selection leaves.

    Attributes:
        tokens: (B, M, D).
        places: (B, M) int32, of each among the tokens that went in; -1 for a token made of several.
    """

    tokens: Tensor
    places: Tensor


# -- selection --------------------------------------------------------------------------------------------------


def select(scores: Tensor, k: int, *, order: SelectionOrder = "raster") -> Tensor:
    """Return the places of the k highest scores: (B, N) -> (B, k) int64.

    Ties and NaN are defined: the lower index first, and NaN behind every number.
    """
    ranked = top_k(torch.where(scores.isnan(), -torch.inf, scores), k)
    return ranked if order == "rank" else ranked.sort(-1).values


def others(index: Tensor, tokens: int) -> Tensor:
    """Return which of `tokens` places are not in index (B, k): (B, N) bool."""
    places = torch.arange(tokens, device=index.device)
    return (index.unsqueeze(-1) != places).all(1)


def residual_token(tokens: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    """Return the weighted sum of the tokens that are not kept: (B, N, D), (B, N), (B, k) -> (B, 1, D)."""
    left = torch.where(others(index, tokens.shape[1]), weights, torch.zeros_like(weights))
    return left.unsqueeze(1) @ tokens


def compose_index(first: Tensor | None, second: Tensor) -> Tensor:
    """Return where rows came from after two selections: first (B, N) or none, then second (B, M); -1 stays -1."""
    if first is None:
        return second
    found = first.gather(1, second.to(torch.int64).clamp_min(0))
    return torch.where(second < 0, second, found)


def with_prefix(tokens: Tensor, kept: Kept, prefix: int) -> Kept:
    """Put the prefix tokens of (B, P + N, D) in front of what was kept of the patches."""
    if not prefix:
        return kept
    places = torch.arange(prefix, dtype=torch.int32, device=tokens.device).expand(tokens.shape[0], -1)
    moved = torch.where(kept.places < 0, kept.places, kept.places + prefix)
    return Kept(torch.cat([tokens[:, :prefix], kept.tokens], 1), torch.cat([places, moved], 1))


# -- counts -----------------------------------------------------------------------------------------------------


def scheduled_counts(
    schedule: Schedule,
    *,
    tokens: int,
    depth: int,
    keep: int,
    blocks: Sequence[int] = (),
    table: Sequence[tuple[int, float]] = (),
    of: Literal["current", "original"] = "original",
) -> tuple[int, ...]:
    """Return how many patch tokens are left behind each of `depth` blocks, ending at `keep`.

    Args:
        schedule: how the removed share grows with the block l of L, f being the last one: `constant`, an equal factor
            at each of `blocks`; `linear`, f l/L; `exponential`, f (2^(l/L) - 1); `step`, nothing before L//2, then f;
            `cosine`, f (1 - cos(pi l/L))/2; `piecewise`, straight lines between the shares kept of `table`; `table`,
            these shares from their block on.
        tokens: patch tokens that go in.
        keep: patch tokens at the end; with `piecewise` and `table` 0: whatever they leave.
        blocks: where `constant` removes, counted from 0.
        table: pairs of a block and the share kept.
        of: what a share is of: the tokens that went into the encoder, or those left by the block before, so that
            removed shares compound.

    Raises:
        InvalidSpec: a table or blocks that the host does not have, or that do not end at `keep`.

    Source: the project's founding notes (pruning schedulers); `constant`: EViT, arXiv:2202.07800.
    """
    if schedule in ("piecewise", "table"):
        return _by_table(schedule, table, tokens=tokens, depth=depth, keep=keep, of=of)
    if schedule == "constant":
        return geometric_counts(tuple(blocks), tokens=tokens, depth=depth, keep=keep)
    steps = range(1, depth + 1)
    weights = {
        "linear": [step / depth for step in steps],
        "exponential": [2 ** (step / depth) - 1 for step in steps],
        "step": [float(step > depth // 2) for step in steps],
        "cosine": [(1 - math.cos(math.pi * step / depth)) / 2 for step in steps],
    }[schedule]
    low, high = 0.0, 1.0
    for _ in range(60):  # the smallest removed share f that ends at `keep`
        middle = (low + high) / 2
        low, high = (middle, high) if _counts_of(weights, middle, tokens, of)[-1] > keep else (low, middle)
    counts = [max(count, keep) for count in _counts_of(weights, high, tokens, of)]
    return (*counts[:-1], keep)


def _counts_of(weights: Sequence[float], share: float, tokens: int, of: str) -> list[int]:
    counts, left = [], tokens
    for weight in weights:
        base = tokens if of == "original" else left
        left = max(1, min(left, base - int(base * share * weight)))
        counts.append(left)
    return counts


def geometric_counts(blocks: tuple[int, ...], *, tokens: int, depth: int, keep: int) -> tuple[int, ...]:
    """Return how many tokens are left behind each block where each of `blocks` keeps an equal share, ending at `keep`.

    Args:
        blocks: ascending, counted from 0.
        tokens: patch tokens that go in.
        depth: blocks of the host.
        keep: patch tokens at the end.
    """
    if not blocks or sorted(set(blocks)) != list(blocks) or not 0 <= blocks[0] <= blocks[-1] < depth:
        raise InvalidSpec(
            f"params.blocks={list(blocks)}: name blocks from 0 to {depth - 1}, ascending and each once; the host has "
            f"{depth}"
        )
    factor = (keep / tokens) ** (1 / len(blocks))
    targets = [max(keep, math.ceil(tokens * factor**place - 1e-9)) for place in range(1, len(blocks))] + [keep]
    counts, left = [], tokens
    for block in range(depth):
        if block in blocks:
            left = min(left, targets[blocks.index(block)])
        counts.append(left)
    return tuple(counts)


def papers_blocks(depth: int) -> tuple[int, ...]:
    """Return the blocks at a quarter, a half and three quarters of the depth: 3, 6 and 9 of 12."""
    return tuple(sorted({depth // 4, depth // 2, 3 * depth // 4}))


def _by_table(
    schedule: Schedule, table: Sequence[tuple[int, float]], *, tokens: int, depth: int, keep: int, of: str
) -> tuple[int, ...]:
    points = sorted(table)
    blocks = [block for block, _ in points]
    wrong = [block for block in blocks if not 0 <= block < depth or blocks.count(block) > 1]
    bad = [share for _, share in points if not 0 < share <= 1]
    if not table or wrong or bad:
        what = "is empty" if not table else f"names block {wrong[0]}" if wrong else f"holds {bad[0]}"
        raise InvalidSpec(
            f"params.table {what}; it gives blocks from 0 to {depth - 1}, each once, with the share kept, above 0 "
            "and at most 1, for example params.table=[[3, 0.7], [6, 0.5]]"
        )
    shares = dict(points)
    counts, left = [], tokens
    for block in range(depth):
        share = _on_lines(points, block) if schedule == "piecewise" else shares.get(block)
        if share is not None:
            left = max(1, min(left, math.ceil((tokens if of == "original" else left) * share - 1e-9)))
        counts.append(left)
    if keep not in (0, counts[-1]):
        raise InvalidSpec(
            f"params.table leaves {counts[-1]} of {tokens} tokens and the budget says {keep}; give one of both"
        )
    return tuple(counts)


def _on_lines(points: Sequence[tuple[int, float]], block: int) -> float | None:
    """Return the share at a block on straight lines between points; before the first: nothing is removed."""
    if block < points[0][0]:
        return None
    for (start, high), (end, low) in itertools.pairwise(points):
        if start <= block <= end:
            return high + (low - high) * (block - start) / (end - start)
    return points[-1][1]


# -- the base ---------------------------------------------------------------------------------------------------


class TokenPruner(InsideCompressor):
    """A compressor that keeps the tokens of highest score.

    Inside a host a method gives `counts` and a `reduce`, and so does its original.

    Attributes:
        counts: patch tokens left behind each block; empty where it stands after a host.
    """

    Params = PruneParams
    params: PruneParams

    def __init__(self, params: Any, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        super().__init__(params, site, budget, output)
        self.counts = self.plan() if site.placement == "inside" else ()

    def plan(self) -> tuple[int, ...]:
        """Return how many patch tokens are left behind each block of the host."""
        raise InvalidSpec(f"{type(self).__name__} stands after a host or alone, not inside one; choose another preset")

    @property
    def remarks(self) -> tuple[str, ...]:
        """What an export should say: how many tokens are left behind each block."""
        if not self.counts:
            return ()
        prefix = f" ({self.num_prefix_tokens} of them protected)" if self.num_prefix_tokens else ""
        counts = ", ".join(str(count + self.num_prefix_tokens) for count in self.counts)
        return (f"tokens after each block{prefix}: {counts}",)

    def tokens_before(self, block: int) -> int:
        """Return how many patch tokens a block is handed."""
        return self.counts[block - 1] if block else self.budget.tokens_in

    def acts_in(self, block: int) -> bool:
        """Say whether a block loses tokens."""
        return self.counts[block] < self.tokens_before(block)

    def advance(self, reducer: Any, block: int, state: BlockState, trail: Trail) -> Trail:
        """Prune in one block, and compose where rows came from."""
        kept = reducer.reduce(block, state, trail)
        score = trail.score
        if score is not None:  # a token that was just made has received nothing yet
            score = torch.where(kept.places < 0, 0.0, score.gather(1, kept.places.to(torch.int64).clamp_min(0)))
        return Trail(kept.tokens, None, compose_index(trail.rows, kept.places), score)

    @property
    def scored_by(self) -> tuple[str, ...]:
        """Names of the inputs that `score_of` reads; empty where the score is not made of inputs."""
        return ()

    @property
    def kept_by_score(self) -> int:
        """Patch tokens that stay because their score is among the highest; a token made of others is none of them."""
        return self.budget.tokens_out

    def score_of(self, *read: Tensor) -> Tensor:  # noqa: ARG002 - of those that have one
        """Return the score of each patch token by which it stays, from what `scored_by` names: (B, N)."""
        raise InvalidSpec(f"{type(self).__name__} makes its score inside its host")

    def finish(self, trail: Trail) -> tuple[Tensor, ...]:
        """Return tokens, and where they came from."""
        if trail.rows is not None:
            return trail.tokens, trail.rows
        places = torch.arange(trail.tokens.shape[1], dtype=torch.int32, device=trail.tokens.device)
        return trail.tokens, places.expand(trail.tokens.shape[0], -1)

    def input_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `tokens` and the host's features, or inside a host the `image`."""
        count, width, prefix = self.budget.tokens_in, self.site.embed_dim, self.num_prefix_tokens
        by_head = (self.site.num_heads, count)
        shapes: dict[HostFeature, tuple[tuple[int, ...], TensorKind]] = {
            "class_attention": (by_head, "attention"),
            "received_attention": (by_head, "attention"),
            "cumulative_attention": (by_head, "attention"),
            "attention_output": ((count, width), "tokens"),
            "class_query": ((width,), "features"),
            "keys": ((prefix + count, width), "tokens"),
            "text_likelihood": ((count,), "attention"),
        }
        features = [
            TensorSpec(name, (batch, *shapes[name][0]), "float32", shapes[name][1]) for name in self.host_features
        ]
        return (self.tokens_spec(batch), *features)

    def output_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `kept` (B, P + M, D) and `index` (B, P + M), or `logits`."""
        if self.output == "logits":
            return (self.logits_spec(batch),)
        rows = (self.num_prefix_tokens if self.hands_on_prefix else 0) + self.budget.tokens_out
        return (
            TensorSpec("kept", (batch, rows, self.site.embed_dim), "float32", "tokens"),
            TensorSpec("index", (batch, rows), "int32", "indices"),
        )

    def count_specs(self, batch: int) -> tuple[TensorSpec, ...]:
        """Return `count` and `mask`, for a method whose rows the data decide."""
        rows = self.budget.tokens_out
        return (
            TensorSpec("count", (batch,), "int64", "indices"),
            TensorSpec("mask", (batch, rows), "bool", "mask"),
        )
