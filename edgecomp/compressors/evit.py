"""EViT: in some blocks the patches that the class token attends to most stay, the others become one token.

Paper: "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations"
(arXiv:2202.07800), section 3.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from msgspec import Meta
from torch import nn

from edgecomp.compressors._base import Natural
from edgecomp.compressors._inside import BlockState, Trail
from edgecomp.compressors._pruning import (
    Kept,
    PruneParams,
    TokenPruner,
    geometric_counts,
    papers_blocks,
    residual_token,
    select,
    with_prefix,
)
from edgecomp.compressors._tokens import take
from edgecomp.errors import InvalidSpec
from edgecomp.specs import Output, Site, TokenBudget

__all__ = ["EViT"]


class EViTParams(PruneParams, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of EViT, with those of `PruneParams`.

    Attributes:
        keep_rate: share of the patches that each of `blocks` keeps, where no budget is given; rounded up.
        blocks: those that drop patches, counted from 0; empty: at a quarter, a half and three quarters of the depth.
        fuse: make one token of the patches that a block drops, weighted by their attention; later blocks treat it as
            a patch, and it counts as one.
        order: of the patches kept: the original's is `rank`.
    """

    keep_rate: Annotated[float, Meta(gt=0, le=1)] = 0.7
    blocks: tuple[Natural, ...] = ()
    fuse: bool = True
    order: Literal["rank", "raster"] = "rank"


class EViT(TokenPruner):
    """Keep the most attended patches between attention and MLP of some blocks, and fuse the others.

    Shapes: image (B, 3, S, S) inside a host -> kept (B, P + M, D) and index (B, P + M) int32, -1 for a fused token; or
    logits. M is the budget, the fused token counted.

    Static rewrite (level E1): TopK of a fixed count, Gather, and one product for the fused token.

    Source: arXiv:2202.07800, sections 3.2 (attentive token identification) and 3.3 (inattentive token fusion).
    """

    Params = EViTParams
    params: EViTParams
    reads_attention = True

    def __init__(self, params: Any, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        super().__init__(params, site, budget, output)
        if not site.has_class_token:
            raise InvalidSpec("EViT ranks patches by the class token's attention, and this host has no class token")

    @classmethod
    def default_counts(cls, params: Any, site: Site) -> tuple[int, ...]:
        """Return what the keep rate leaves."""
        return (cls._by_rate(params, site)[-1],)

    @classmethod
    def _by_rate(cls, params: EViTParams, site: Site) -> tuple[int, ...]:
        left, counts = site.tokens_in, []
        blocks = params.blocks or papers_blocks(site.depth)
        for block in range(site.depth):
            count = math.ceil(params.keep_rate * left) if block in blocks else left
            left = count + params.fuse if count < left else left
            counts.append(left)
        return tuple(counts)

    def plan(self) -> tuple[int, ...]:
        """Return how many patches are left behind each block: by the keep rate where that ends at the budget."""
        counts, keep = self._by_rate(self.params, self.site), self.budget.tokens_out
        if counts[-1] == keep:
            return counts
        if self.params.fuse and keep < 2:
            raise InvalidSpec("budget 1 leaves no patch beside the fused token; give at least 2, or params.fuse=false")
        blocks = self.params.blocks or papers_blocks(self.site.depth)
        return geometric_counts(blocks, tokens=self.budget.tokens_in, depth=self.site.depth, keep=keep)

    def acts_in(self, block: int) -> bool:
        """Say whether a block drops patches; where one goes and the fused token comes, the count stays."""
        before = self.tokens_before(block)
        if self.counts[block] < before or not self.params.fuse or self.counts != self._by_rate(self.params, self.site):
            return self.counts[block] < before
        blocks = self.params.blocks or papers_blocks(self.site.depth)
        return block in blocks and math.ceil(self.params.keep_rate * before) < before

    def reduce(self, block: int, state: BlockState, trail: Trail) -> Kept:  # noqa: ARG002 - the signature of all
        """Keep the prefix, the most attended patches, and what the others make together."""
        assert state.attention is not None
        prefix = self.num_prefix_tokens
        attention, patches = state.attention[:, :, 0, prefix:].mean(1), state.tokens[:, prefix:]
        index = select(attention, self.counts[block] - self.params.fuse, order=self.params.order)
        kept, places = take(patches, index), index
        if self.params.fuse:
            kept = torch.cat([kept, residual_token(patches, attention, index)], 1)
            places = torch.cat([index, torch.full_like(index[:, :1], -1)], 1)
        return with_prefix(state.tokens, Kept(kept, places.to(torch.int32)), prefix)

    def reference(self) -> nn.Module:
        """Return sorting and complements, one sample at a time."""
        return EViTOriginal(self)


class EViTOriginal(nn.Module):
    """The eager original: the paper's reorganisation, one sample at a time."""

    def __init__(self, static: EViT) -> None:
        super().__init__()
        self.static = static

    def reduce(self, block: int, state: BlockState, trail: Trail) -> Kept:  # noqa: ARG002 - the signature of all
        """Reorganise the tokens of a block."""
        static, prefix = self.static, self.static.num_prefix_tokens
        assert state.attention is not None
        count = static.counts[block] - 1 if static.params.fuse else static.counts[block]
        rows, places = [], []
        for x, attention in zip(state.tokens, state.attention, strict=True):
            seen, patches = attention[:, 0].sum(0)[prefix:] / len(attention), x[prefix:]
            order = torch.argsort(seen, descending=True, stable=True)
            chosen, rest = order[:count], order[count:]
            if static.params.order == "raster":
                chosen = chosen.sort().values
            kept, place = [x[:prefix], patches[chosen]], [torch.arange(prefix), chosen + prefix]
            if static.params.fuse:
                kept.append((patches[rest] * seen[rest, None]).sum(0, keepdim=True))
                place.append(torch.tensor([-1]))
            rows.append(torch.cat(kept))
            places.append(torch.cat(place).to(torch.int32))
        return Kept(torch.stack(rows), torch.stack(places))
