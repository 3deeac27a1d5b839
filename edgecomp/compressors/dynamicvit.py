"""DynamicViT: in front of some blocks a small predictor scores the patches, and the best stay.

Paper: "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification" (arXiv:2106.02034), section 3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from msgspec import Meta
from torch import Tensor, nn

from edgecomp.compressors._base import Natural
from edgecomp.compressors._checkpoint import load_exactly
from edgecomp.compressors._inside import BlockState, Trail
from edgecomp.compressors._pruning import (
    Kept,
    PruneParams,
    TokenPruner,
    geometric_counts,
    papers_blocks,
    select,
    with_prefix,
)
from edgecomp.compressors._tokens import take
from edgecomp.errors import InvalidSpec
from edgecomp.specs import Output, Site, TokenBudget

__all__ = ["DynamicViT"]

_OWN = "score_predictor."


class DynamicViTParams(PruneParams, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of DynamicViT, with those of `PruneParams`.

    Attributes:
        ratios: share of the patches that went into the encoder that stay in front of each of `blocks`, where no budget
            is given, rounded down; empty: 0.7, 0.7 squared, and so on.
        blocks: those that a predictor stands in front of, counted from 0; empty: at a quarter, a half and three
            quarters of the depth.
        order: of the patches kept: the original's is `rank`.
    """

    ratios: tuple[Annotated[float, Meta(gt=0, le=1)], ...] = ()
    blocks: tuple[Natural, ...] = ()
    order: Literal["rank", "raster"] = "rank"


class Predictor(nn.Module):
    """Scores of patches from a local half and the mean of a global half of their features.

    Shapes: patches (B, N, D) -> log-probabilities of keeping and of dropping (B, N, 2).

    Source: arXiv:2106.02034, section 3.2, equations 2 to 5.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width // 4),
            nn.GELU(),
            nn.Linear(width // 4, 2),
            nn.LogSoftmax(dim=-1),
        )

    def forward(self, patches: Tensor) -> Tensor:
        """Return the log-probabilities."""
        x = self.in_conv(patches)
        half = x.shape[-1] // 2
        whole = x[..., half:].mean(1, keepdim=True)
        return self.out_conv(torch.cat([x[..., :half], whole.expand(-1, x.shape[1], -1)], -1))  # type: ignore[no-any-return]


class DynamicViT(TokenPruner):
    """Keep the patches that a predictor scores highest, in front of some blocks.

    Shapes: image (B, 3, S, S) inside a host -> kept (B, P + M, D) and index (B, P + M) int32, or logits.

    Static rewrite (level E1): at inference the original keeps a fixed count of patches, by a full ranking; here TopK of
    that count. Its mask of earlier decisions is one for every patch that is left.

    Source: arXiv:2106.02034, sections 3.2 and 3.3 (inference).
    """

    Params = DynamicViTParams
    params: DynamicViTParams
    acts = "before block"
    ranking_params = ("score_predictor.*",)

    def __init__(self, params: Any, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        super().__init__(params, site, budget, output)
        if site.embed_dim % 4:
            raise InvalidSpec(f"the predictors halve their width twice, and the host's is {site.embed_dim}")
        self.score_predictor = nn.ModuleList(Predictor(site.embed_dim) for _ in self.blocks)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks that a predictor stands in front of."""
        return self.params.blocks or papers_blocks(self.site.depth)

    @classmethod
    def default_counts(cls, params: Any, site: Site) -> tuple[int, ...]:
        """Return what the ratios leave."""
        return (cls._by_ratios(params, site)[-1],)

    @classmethod
    def _by_ratios(cls, params: DynamicViTParams, site: Site) -> tuple[int, ...]:
        blocks = params.blocks or papers_blocks(site.depth)
        ratios = params.ratios or tuple(0.7 ** (place + 1) for place in range(len(blocks)))
        if len(ratios) != len(blocks):
            raise InvalidSpec(f"params.ratios has {len(ratios)} entries for {len(blocks)} blocks; give one for each")
        left, counts = site.tokens_in, []
        for block in range(site.depth):
            if block in blocks:
                left = max(1, min(left, int(site.tokens_in * ratios[blocks.index(block)])))
            counts.append(left)
        return tuple(counts)

    def plan(self) -> tuple[int, ...]:
        """Return how many patches each block runs on: by the ratios where those end at the budget."""
        counts, keep = self._by_ratios(self.params, self.site), self.budget.tokens_out
        if counts[-1] == keep:
            return counts
        return geometric_counts(self.blocks, tokens=self.budget.tokens_in, depth=self.site.depth, keep=keep)

    def reduce(self, block: int, state: BlockState, trail: Trail) -> Kept:  # noqa: ARG002 - the signature of all
        """Keep the prefix and the patches of highest score."""
        prefix = self.num_prefix_tokens
        patches = state.tokens[:, prefix:]
        score = self.predictor_of(block)(patches)[..., 0]
        index = select(score, self.counts[block], order=self.params.order)
        return with_prefix(state.tokens, Kept(take(patches, index), index.to(torch.int32)), prefix)

    def predictor_of(self, block: int) -> Any:
        """Return the predictor in front of a block."""
        return self.score_predictor[self.blocks.index(block)]

    def reference(self) -> nn.Module:
        """Return a full ranking, with the mask of earlier decisions."""
        return DynamicViTOriginal(self)

    @classmethod
    def layout_of(cls, state: Mapping[str, Tensor]) -> str:
        """Return `dynamicvit` for a checkpoint that holds predictors and host."""
        return "dynamicvit" if any(re.match(r"blocks\.\d+\.", key) for key in state) and _has_own(state) else ""

    @classmethod
    def split_checkpoint(cls, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the predictors, and the host's tensors, whose keys are timm's."""
        own = {key: value for key, value in state.items() if key.startswith(_OWN)}
        return own, {key: value for key, value in state.items() if key not in own}

    def load_original(self, state: Mapping[str, Tensor], *, unread: Sequence[str] = ()) -> str:
        """Load the predictors of a checkpoint in the original's layout, whose keys are ours too."""
        layout = self.layout_of(state) or "edgecomp"
        own, _ = self.split_checkpoint(state)
        load_exactly(self, own, layout=layout, unread=unread)
        return layout


def _has_own(state: Mapping[str, Tensor]) -> bool:
    return any(key.startswith(_OWN) for key in state)


class DynamicViTOriginal(nn.Module):
    """The eager original of the inference path."""

    def __init__(self, static: DynamicViT) -> None:
        super().__init__()
        self.static = static

    def reduce(self, block: int, state: BlockState, trail: Trail) -> Kept:  # noqa: ARG002 - the signature of all
        """Rank all patches by their score and keep the first."""
        static, prefix = self.static, self.static.num_prefix_tokens
        patches = state.tokens[:, prefix:]
        policy = torch.ones_like(patches[..., :1])
        predictor = static.predictor_of(block)
        norm, first = predictor.in_conv[0], predictor.in_conv[1]
        x = F.gelu(first(F.layer_norm(patches, norm.normalized_shape, norm.weight, norm.bias, norm.eps)))
        local, whole = x.chunk(2, dim=-1)
        whole = (whole * policy).sum(1, keepdim=True) / policy.sum(1, keepdim=True)
        x = torch.cat([local, whole.expand_as(local)], -1)
        for layer in predictor.out_conv:
            x = layer(x)
        order = torch.argsort(x[..., 0], dim=1, descending=True, stable=True)[:, : static.counts[block]]
        if static.params.order == "raster":
            order = order.sort(-1).values
        rows = torch.arange(len(patches)).unsqueeze(1)
        kept = torch.cat([state.tokens[:, :prefix], patches[rows, order]], 1)
        front = torch.arange(prefix).expand(len(patches), -1)
        return Kept(kept, torch.cat([front, order + prefix], 1).to(torch.int32))
