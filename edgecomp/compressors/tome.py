"""ToMe: the most similar tokens are averaged, a few in each block, without training.

Sections: "Token Merging: Your ViT But Faster" (arXiv:2210.09461). The original, facebookresearch/ToMe, is under a
non-commercial licence: this is written from the paper, and held to numbers that the original gave.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgecomp.compressors._merging import BlockState, Merged, MergeParams, OriginalMerger, TokenMerger
from edgecomp.compressors._tokens import top_k, top_k_merge

__all__ = ["ToMe"]


class ToMeParams(MergeParams, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of ToMe; see `MergeParams`."""


class ToMe(TokenMerger):
    """Merge the r best-matched pairs of tokens in each block (section 3).

    Shapes: image (B, 3, S, S) inside a host, or tokens (B, N, D) -> tokens (B, P + M, D), sizes (B, P + M, 1) and
    source map (B, P + N), or the host's logits.

    Static rewrite (level E1): r is fixed for each block, so that all counts are; the pairs are found by TopK of r and
    summed by a product with their one-hot rows, in the op `edgecomp::TopKMerge`.

    Source: arXiv:2210.09461, section 3 (bipartite soft matching), equation 1 (proportional attention), appendix D.
    """

    Params = ToMeParams

    def reduce(self, block: int, state: BlockState) -> Merged:
        """Merge the tokens between attention and MLP of a block."""
        metric = state.keys.mean(1) if self.params.metric == "k" else state.tokens
        merged = top_k_merge(
            metric,
            state.tokens,
            state.size,
            r=self.steps[block],
            num_prefix_tokens=self.num_prefix_tokens,
            order=self.order,
        )
        return Merged(*merged)

    def reference(self) -> nn.Module:
        """Return the paper's form: a full ranking, and sums scattered into the targets."""
        return ToMeOriginal(self)


class ToMeOriginal(OriginalMerger):
    """The eager original: appendix D of the paper, op by op."""

    def reduce(self, block: int, state: BlockState) -> Merged:
        """Merge the tokens between attention and MLP of a block."""
        keys = state.keys.transpose(1, 2).mean(2) if self.static.params.metric == "k" else state.tokens
        r, prefix = self.static.steps[block], self.static.num_prefix_tokens
        return bipartite_soft_matching(keys, state.tokens, state.size, r, prefix, self.static.order == "ascending")


def bipartite_soft_matching(keys: Tensor, tokens: Tensor, size: Tensor, r: int, prefix: int, ascending: bool) -> Merged:
    """Return what the paper's matching and size-weighted mean give, with the prefix tokens in front."""
    length = keys.square().sum(-1, keepdim=True).sqrt()
    keys = torch.where(length > 0, keys / length, torch.zeros_like(keys))
    scores = keys[:, ::2] @ keys[:, 1::2].mT  # even tokens to odd ones
    even_prefix, odd_prefix = (prefix + 1) // 2, prefix // 2
    scores[:, :even_prefix] = -torch.inf  # prefix tokens do not merge,
    scores[:, :, :odd_prefix] = -torch.inf  # and nothing merges into them
    best, nearest = scores.max(dim=-1)
    ranking = top_k(best, best.shape[1])
    sources, unmerged = ranking[:, :r], ranking[:, r:]
    if ascending:
        unmerged = unmerged.sort(dim=-1).values
    elif even_prefix:  # ranked last, at minus infinity
        unmerged = torch.cat([unmerged[:, -even_prefix:].sort(dim=-1).values, unmerged[:, :-even_prefix]], dim=1)
    targets = nearest.gather(1, sources)

    def merge(values: Tensor) -> Tensor:
        even, odd = values[:, ::2], values[:, 1::2]
        width = values.shape[-1]
        moved = even.gather(1, sources[..., None].expand(-1, -1, width))
        odd = odd.scatter_add(1, targets[..., None].expand(-1, -1, width), moved)
        kept = even.gather(1, unmerged[..., None].expand(-1, -1, width))
        front = [(kept if place % 2 == 0 else odd)[:, place // 2, None] for place in range(prefix)]
        return torch.cat([*front, kept[:, even_prefix:], odd[:, odd_prefix:]], dim=1)

    merged_size = merge(size)
    everyone = torch.eye(tokens.shape[1], dtype=tokens.dtype, device=tokens.device).expand(len(tokens), -1, -1)
    return Merged(merge(tokens * size) / merged_size, merged_size, merge(everyone).argmax(dim=1).to(torch.int32))
