"""ToMe: the most similar tokens are averaged, a few in each block, without training.

Sections: "Token Merging: Your ViT But Faster" (arXiv:2210.09461). The original, facebookresearch/ToMe, is under a
non-commercial licence: this is written from the paper, and held to numbers that the original gave.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from msgspec import Meta
from torch import Tensor, nn

from edgecomp.compressors._base import Natural
from edgecomp.compressors._inside import BlockState
from edgecomp.compressors._merging import KeyMergeParams, Merged, OriginalMerger, TokenMerger, merge_steps
from edgecomp.compressors._tokens import (
    kth_pairing,
    largest_r,
    merge_pairs,
    source_map,
    top_k,
    unit_rows,
)
from edgecomp.errors import InvalidSpec
from edgecomp.specs import Site, TensorSpec

__all__ = ["ToMe"]


class ToMeParams(KeyMergeParams, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of ToMe, with those of `KeyMergeParams`.

    Attributes:
        threshold: merge only pairs whose similarity is above it, and at most r of them (where r is not set: as many as
            can merge). How many merge depends on the data, so that there are rows for all tokens, and a count; on
            given tokens alone. None: all r pairs merge.
        matching: `bipartite`: even tokens are sources, odd ones targets; `kth`: every k-th token is a target and all
            others merge into their most similar target, so that n tokens become n / k. What fills no group of k is
            dropped, as in the published code.
        k: of `kth`.
        kth_blocks: the blocks in which `kth` merges, counted from 0.
    """

    threshold: Annotated[float, Meta(ge=-1, le=1)] | None = None
    matching: Literal["bipartite", "kth"] = "bipartite"
    k: Annotated[int, Meta(ge=2, le=65536)] = 2
    kth_blocks: tuple[Natural, ...] = (0,)

    @property
    def decides_counts(self) -> bool:
        """Whether the parameters say how many tokens each block removes."""
        return self.matching == "kth" or super().decides_counts


class ToMe(TokenMerger):
    """Merge the r best-matched pairs of tokens in each block (section 3).

    Shapes: image (B, 3, S, S) inside a host, or tokens (B, N, D) -> tokens (B, P + M, D), sizes (B, P + M, 1) and
    source map (B, P + N), or the host's logits.

    With a threshold there are also the count (B,) int64 of real rows and a mask (B, N); rows behind the count are zero.

    Static rewrite (level E1): r is fixed for each block, so that all counts are; the pairs are found by TopK of r and
    summed by a product with their one-hot rows, in the op `edgecomp::TopKMerge`. With a threshold (level E2, plain
    ops): the pairs above it are the first of the ranking, so that their number alone moves the rows of other tokens.

    Source: arXiv:2210.09461, section 3 (bipartite soft matching), equation 1 (proportional attention), appendix D; the
    threshold: the project's founding notes.
    """

    Params = ToMeParams
    params: ToMeParams

    def plan(self) -> tuple[int, ...]:
        """Return how many tokens each merge removes; with a threshold, the most that its one merge may."""
        if self.params.matching == "kth":
            steps = _kth_steps(self.params, self.site)
            if self.budget.tokens_out != self.budget.tokens_in - sum(steps):
                raise InvalidSpec(
                    f"params.matching=kth leaves {self.budget.tokens_in - sum(steps)} tokens, and the budget is "
                    f"{self.budget.tokens_out}; give params.k and params.kth_blocks, or the budget"
                )
            return steps
        if self.params.threshold is None:
            return super().plan()
        rows, tokens = self.budget.tokens_out, self.budget.tokens_in
        if self.site.placement == "inside":
            raise InvalidSpec(
                f"params.threshold={self.params.threshold} leaves the count of tokens to the data, and the blocks of a "
                "host take a fixed one; use it on given tokens or after a host"
            )
        if self.num_prefix_tokens:
            raise InvalidSpec(
                f"params.threshold merges among all tokens, and params.prefix_tokens={self.num_prefix_tokens} protects "
                "some; give one of both"
            )
        if rows != tokens:
            raise InvalidSpec(
                f"with params.threshold={self.params.threshold} nothing may merge, so that rows for all {tokens} "
                f"tokens are needed, and the budget is {rows}; leave the budget out, and limit the merging by params.r"
            )
        depth = self.depth_of(self.params, self.site, 0)
        if depth > 1:
            raise InvalidSpec(f"params.threshold merges once, and params.schedule has {depth} steps; give params.r")
        if not self.params.decides_counts:
            return (largest_r(tokens, 0),)
        return merge_steps(self.params, tokens=tokens, num_prefix_tokens=0, depth=1, keep=0)

    @property
    def drops_tokens(self) -> bool:
        """Whether tokens are left out: those that fill no group of k."""
        return self.params.matching == "kth"

    @classmethod
    def default_counts(cls, params: Any, site: Site) -> tuple[int, ...]:
        """Return what the parameters leave; with a threshold, rows for all tokens."""
        if params.matching == "kth":
            return (site.tokens_in - sum(_kth_steps(params, site)),)
        return super().default_counts(params, site) if params.threshold is None else (site.tokens_in,)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What an export should say of the counts."""
        if self.params.threshold is None:
            return super().remarks
        return (f"at most {self.steps[0]} pairs merge; `count` says how many rows are real, the others are zero",)

    def output_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `merged`, `size` and `source_map`, with a threshold `count` and `mask`, or `logits`."""
        specs = super().output_specs(batch)
        if self.params.threshold is None:
            return specs
        rows = self.budget.tokens_out
        return (
            *specs,
            TensorSpec("count", (batch,), "int64", "indices"),
            TensorSpec("mask", (batch, rows), "bool", "mask"),
        )

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Merge given tokens."""
        if self.params.threshold is None:
            return super().forward(tokens)
        return merge_above(tokens, self.params.threshold, r=self.steps[0], ascending=self.order == "ascending")

    def reduce(self, block: int, state: BlockState) -> Merged:
        """Merge the tokens between attention and MLP of a block."""
        if self.params.matching != "kth":
            return super().reduce(block, state)
        pairing = kth_pairing(self.metric(block, state), k=self.params.k, num_prefix_tokens=self.num_prefix_tokens)
        tokens, size = merge_pairs(pairing, state.tokens, state.size)
        return Merged(tokens, size, source_map(pairing, state.tokens.shape[1]))

    def reference(self) -> nn.Module:
        """Return the paper's form: a full ranking, and sums scattered into the targets."""
        return ToMeOriginal(self)


def _kth_steps(params: ToMeParams, site: Site) -> tuple[int, ...]:
    """Return how many tokens each block removes where every k-th stays."""
    others = [f"params.{name}" for name in ("r", "schedule", "keep_ratio") if getattr(params, name)]
    others += ["params.threshold"] if params.threshold is not None else []
    if others:
        raise InvalidSpec(f"params.matching=kth and {', '.join(others)} are given; params.k says what kth leaves")
    depth = site.depth if site.placement == "inside" else 1
    steps, left = [0] * depth, site.tokens_in
    for block in sorted(set(params.kth_blocks)):
        if block >= depth or left < params.k:
            raise InvalidSpec(
                f"params.kth_blocks={list(params.kth_blocks)}: block {block} of {depth} cannot merge {left} tokens to "
                f"every {params.k}-th; name blocks from 0 to {depth - 1}, and fewer of them or a smaller params.k"
            )
        steps[block] = left - left // params.k
        left -= steps[block]
    return tuple(steps)


def merge_above(tokens: Tensor, threshold: float, *, r: int, ascending: bool) -> tuple[Tensor, ...]:
    """Average the pairs of tokens (B, N, D) that are more similar than a threshold, at most r of them.

    Returns:
        rows (B, N, D), sizes (B, N, 1), source map (B, N), count (B,), mask (B, N).
    """
    count = tokens.shape[1]
    unit = unit_rows(tokens)
    similarity = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)  # (B, S, Q)
    best, nearest = similarity.amax(-1), similarity.argmax(-1)
    sources, targets = similarity.shape[1:]
    ranking = top_k(best, sources)
    places = torch.arange(sources, device=tokens.device)
    merges = (places < r) & (best.gather(1, ranking) > threshold)  # in the order of the ranking
    merged = merges.sum(1, keepdim=True)  # (B, 1)
    rank = top_k(-ranking.to(tokens.dtype), sources)  # of each source
    stays = (rank >= merged).to(tokens.dtype)
    row = (stays @ (places.unsqueeze(-1) < places).to(tokens.dtype)).to(rank.dtype) if ascending else rank - merged
    row = torch.where(rank >= merged, row, nearest + sources - merged)
    of_target = torch.arange(targets, device=tokens.device) + sources - merged
    source_map = torch.stack([row, F.pad(of_target, (0, sources - targets))], dim=-1).flatten(1)[:, :count]
    rows = torch.arange(count, device=tokens.device)
    members = (source_map.unsqueeze(1) == rows.unsqueeze(-1)).to(tokens.dtype)  # (B, N, N)
    size = members.sum(-1, keepdim=True)
    real = count - merged
    averaged = members @ tokens / size.clamp(min=1.0)
    return averaged, size, source_map.to(torch.int32), real.squeeze(1), rows < real


class ToMeOriginal(OriginalMerger):
    """The eager original: appendix D of the paper, op by op."""

    static: ToMe

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Merge given tokens; with a threshold, as many pairs of each sample as there are above it."""
        threshold = self.static.params.threshold
        if threshold is None:
            return super().forward(tokens)
        samples = [_pad_sample(x, threshold, self.static) for x in tokens]
        return tuple(torch.stack(part) for part in zip(*samples, strict=True))

    def reduce(self, block: int, state: BlockState) -> Merged:
        """Merge the tokens between attention and MLP of a block."""
        keys = state.keys.transpose(1, 2).mean(2) if self.static.params.metric == "k" else state.tokens
        r, prefix = self.static.steps[block], self.static.num_prefix_tokens
        if self.static.params.matching == "kth":
            return kth_soft_matching(keys, state.tokens, state.size, self.static.params.k, prefix)
        return bipartite_soft_matching(keys, state.tokens, state.size, r, prefix, self.static.order == "ascending")


def _pad_sample(x: Tensor, threshold: float, static: ToMe) -> tuple[Tensor, ...]:
    """Merge one sample (N, D) with the r that its similarities allow, and pad what comes out."""
    length = x.square().sum(-1, keepdim=True).sqrt()
    unit = torch.where(length > 0, x / length, torch.zeros_like(x))
    above = int(((unit[::2] @ unit[1::2].T).amax(1) > threshold).sum())
    size = x.new_ones(1, len(x), 1)
    r = min(above, static.steps[0])
    merged = bipartite_soft_matching(x[None], x[None], size, r, 0, static.order == "ascending")
    real = len(x) - r
    tokens, sizes = (F.pad(values[0], (0, 0, 0, r)) for values in merged[:2])
    return tokens, sizes, merged.rows[0], torch.tensor(real), torch.arange(len(x)) < real


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


def kth_soft_matching(keys: Tensor, tokens: Tensor, size: Tensor, k: int, prefix: int) -> Merged:
    """Return each k-th token joined with those before it that are most similar to it, the prefix in front."""
    length = keys.square().sum(-1, keepdim=True).sqrt()
    keys = torch.where(length > 0, keys / length, torch.zeros_like(keys))
    groups = (tokens.shape[1] - prefix) // k
    source_map = torch.full(tokens.shape[:2], -1, dtype=torch.int32)
    source_map[:, :prefix] = torch.arange(prefix)
    ends = [prefix + k * group + k - 1 for group in range(groups)]
    for sample, unit in enumerate(keys):
        for token in range(prefix, prefix + groups * k):
            likeness = torch.stack([unit[token] @ unit[end] for end in ends])
            row = ends.index(token) if token in ends else int(likeness.argmax())
            source_map[sample, token] = prefix + row
    belongs = source_map.unsqueeze(1) == torch.arange(prefix + groups).unsqueeze(-1)
    merged_size = belongs.to(size.dtype) @ size
    return Merged(belongs.to(tokens.dtype) @ (tokens * size) / merged_size, merged_size, source_map)
