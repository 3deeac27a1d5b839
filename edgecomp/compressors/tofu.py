"""ToFu: the most similar tokens are pruned in early blocks, and averaged with their norm kept in later ones.

Paper: "Token Fusion: Bridging the Gap between Token Pruning and Token Merging" (arXiv:2312.01026). No code
of its authors is known to us; that of hchautran/PiToMe, which has it for comparison, is under a non-commercial licence:
this is written from the formulas, and held to numbers that that code gave.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgecomp.compressors._base import Natural
from edgecomp.compressors._inside import BlockState
from edgecomp.compressors._merging import KeyMergeParams, Merged, OriginalMerger, TokenMerger
from edgecomp.compressors._tokens import top_k_merge
from edgecomp.errors import InvalidSpec
from edgecomp.specs import Output, Site, TokenBudget

__all__ = ["ToFu"]


class ToFuParams(KeyMergeParams, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of ToFu, with those of `KeyMergeParams`.

    Attributes:
        prune_blocks: how many blocks (or steps), from the first, prune instead of merging: of each matched pair the
            target stays as it is.
    """

    prune_blocks: Natural = 0


class ToFu(TokenMerger):
    """Merge the r best-matched pairs of tokens in each block into means that keep the norm.

    Shapes: image (B, 3, S, S) inside a host, or tokens (B, N, D) -> tokens (B, P + M, D), sizes (B, P + M, 1) and
    source map (B, P + N), or the host's logits. A pruned token counts in the size of its match, and is mapped to it.

    Static rewrite (level E1): r is fixed for each block, so that all counts are; matching and merging are the op
    `edgecomp::TopKMerge` with `mode = tofu`. TensorRT takes all functions of one name for the first of them, so that a
    graph holds one mode: where a block prunes, the rows of the targets, the last ones of the op, are replaced by the
    targets themselves, a slice of what went in.

    Source: arXiv:2312.01026, pruning in early layers and norm-preserving merging (MLERP), in the form of the code named
    in the recipe: the largest norm of the group over that of the target.
    Proportional attention as in arXiv:2210.09461, equation 1.
    """

    Params = ToFuParams
    params: ToFuParams

    def __init__(self, params: ToFuParams, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        super().__init__(params, site, budget, output)
        if params.prune_blocks > len(self.steps):
            raise InvalidSpec(
                f"params.prune_blocks={params.prune_blocks} is above {len(self.steps)}, the blocks or steps there are"
            )

    def reduce(self, block: int, state: BlockState) -> Merged:
        """Merge the tokens between attention and MLP of a block, or drop those that should merge."""
        metric = self.params.metric_of(state)
        tokens, size, rows = top_k_merge(
            metric,
            state.tokens,
            state.size,
            r=self.steps[block],
            num_prefix_tokens=self.num_prefix_tokens,
            mode="tofu",
            order=self.order,
        )
        if block < self.params.prune_blocks:
            targets = state.tokens[:, self.num_prefix_tokens + 1 - self.num_prefix_tokens % 2 :: 2]
            tokens = torch.cat([tokens[:, : -targets.shape[1]], targets], dim=1)
        return Merged(tokens, size, rows)

    def reference(self) -> nn.Module:
        """Return the formulas, one sample and one group at a time."""
        return ToFuOriginal(self)


class ToFuOriginal(OriginalMerger):
    """The eager original: sources join the group of their target in a plain loop."""

    static: ToFu

    def reduce(self, block: int, state: BlockState) -> Merged:
        """Merge the tokens between attention and MLP of a block, or drop those that should merge."""
        static = self.static
        keys = state.keys.transpose(1, 2).mean(2) if static.params.metric == "k" else state.tokens
        samples = [
            _merge_sample(
                *sample,
                r=static.steps[block],
                prefix=static.num_prefix_tokens,
                ascending=static.order == "ascending",
                is_pruned=block < static.params.prune_blocks,
            )
            for sample in zip(keys, state.tokens, state.size, strict=True)
        ]
        return Merged(*(torch.stack(part) for part in zip(*samples, strict=True)))


def _merge_sample(
    keys: Tensor, tokens: Tensor, size: Tensor, *, r: int, prefix: int, ascending: bool, is_pruned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows, sizes and source map of one sample: keys (N, d), tokens (N, D), size (N, 1)."""
    length = keys.square().sum(-1, keepdim=True).sqrt()
    keys = torch.where(length > 0, keys / length, torch.zeros_like(keys))
    even = [i for i in range(prefix, len(tokens)) if i % 2 == 0]
    odd = [i for i in range(prefix, len(tokens)) if i % 2 == 1]
    best, nearest = (keys[even] @ keys[odd].T).max(dim=1)
    ranking = best.argsort(descending=True, stable=True).tolist()
    kept = [even[place] for place in (sorted(ranking[r:]) if ascending else ranking[r:])]
    groups = {target: [target] for target in odd}
    for place in ranking[:r]:
        groups[odd[int(nearest[place])]].append(even[place])
    rows = [[i] for i in (*range(prefix), *kept)] + list(groups.values())
    merged, source_map = [], torch.empty(len(tokens), dtype=torch.int32)
    for row, members in enumerate(rows):
        source_map[members] = row
        target = tokens[members[0]]
        if len(members) == 1 or is_pruned:
            merged.append(target)
            continue
        norms = tokens[members].norm(dim=1)
        mean = tokens[members].mean(dim=0)
        merged.append(mean * (norms.max() / norms[0]) if norms[0] > 0 else mean)
    return torch.stack(merged), torch.stack([size[members].sum(0) for members in rows]), source_map
