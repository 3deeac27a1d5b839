"""PiToMe: tokens in large similar groups merge, isolated ones are protected, without training.

Paper: "Accelerating Transformers with Spectrum-Preserving Token Merging" (arXiv:2405.16148). The original,
hchautran/PiToMe, is under a non-commercial licence: this is written from the formulas, and held to numbers that the
original gave.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from msgspec import Meta
from torch import Tensor, nn

from edgecomp.compressors._inside import BlockState
from edgecomp.compressors._merging import KeyMergeParams, Merged, OriginalMerger, TokenMerger
from edgecomp.compressors._tokens import take, top_k, top_k_merge, unit_rows

__all__ = ["PiToMe"]


class PiToMeParams(KeyMergeParams, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of PiToMe, with those of `KeyMergeParams`.

    Attributes:
        variant: `score`: the 2r tokens of highest energy merge, and all others are protected; `bsm`: all tokens, in
            the order of their energy, are in turn source and target, and the r best-matched sources merge.
        margin: similarity above which two tokens count as alike, in all blocks; None: the paper's, 0.9 in the first
            block and falling linearly with depth.
        order: of unmerged tokens: `original` is `rank` here; of `bsm`, `ascending` is the order of their energy.
    """

    variant: Literal["score", "bsm"] = "score"
    margin: Annotated[float, Meta(ge=-1, le=1)] | None = None


class PiToMe(TokenMerger):
    """Merge the r pairs among the 2r tokens of highest energy in each block.

    The energy of token i is the mean over all tokens j of elu(cos(i, j) - margin): high in large groups of alike ones.

    Shapes: image (B, 3, S, S) inside a host, or tokens (B, N, D) -> tokens (B, P + M, D), sizes (B, P + M, 1) and
    source map (B, P + N), or the host's logits.

    Static rewrite (level E1): r is fixed for each block, so that all counts are. Energies are plain ops in float32;
    ranking, matching and merging are the op `edgecomp::TopKMerge` with `partition = by_score`. `bsm` sorts the tokens
    by energy and hands them to the op with `partition = alternate`, without the prefix, whose length would decide
    whether the first is a source.

    Source: arXiv:2405.16148, energy score and margin over depth (blocks counted from 0 here). Proportional
    attention as in arXiv:2210.09461, equation 1.
    """

    Params = PiToMeParams
    params: PiToMeParams

    @property
    def order(self) -> Literal["ascending", "rank"]:
        """The order of unmerged tokens."""
        return "rank" if self.params.order == "original" else self.params.order

    def margin(self, block: int) -> float:
        """Return the margin of a block: fixed, or 0.9 - 0.9 block / blocks."""
        return 0.9 - 0.9 * block / len(self.steps) if self.params.margin is None else self.params.margin

    def reduce(self, block: int, state: BlockState) -> Merged:
        """Merge the tokens between attention and MLP of a block."""
        metric = self.params.metric_of(state)
        energy = energies(metric[:, self.num_prefix_tokens :], self.margin(block))
        if self.params.variant == "bsm":
            return self._merge_sorted(block, metric, energy, state)
        scores = F.pad(energy, (self.num_prefix_tokens, 0))  # the op reads none of the prefix
        merged = top_k_merge(
            metric,
            state.tokens,
            state.size,
            scores.to(torch.promote_types(scores.dtype, torch.float32)),
            r=self.steps[block],
            num_prefix_tokens=self.num_prefix_tokens,
            partition="by_score",
            order=self.order,
        )
        return Merged(*merged)

    def _merge_sorted(self, block: int, metric: Tensor, energy: Tensor, state: BlockState) -> Merged:
        """Merge the tokens, sorted by energy, by their best matches; the prefix goes round the op."""
        prefix = self.num_prefix_tokens
        ranking = top_k(energy, energy.shape[1])
        place = top_k(-ranking.to(energy.dtype), energy.shape[1])  # of each token in the ranking
        metric, tokens, size = (take(x[:, prefix:], ranking) for x in (metric, state.tokens, state.size))
        merged, merged_size, rows = top_k_merge(metric, tokens, size, r=self.steps[block], order=self.order)
        rows = rows.gather(1, place)
        if not prefix:
            return Merged(merged, merged_size, rows)
        kept = torch.arange(prefix, dtype=torch.int32, device=rows.device).expand(len(rows), -1)
        return Merged(
            torch.cat([state.tokens[:, :prefix], merged], dim=1),
            torch.cat([state.size[:, :prefix], merged_size], dim=1),
            torch.cat([kept, rows + prefix], dim=1),
        )

    def reference(self) -> nn.Module:
        """Return the paper's form: a full ranking, and sums scattered into the targets."""
        return PiToMeOriginal(self)


def energies(metric: Tensor, margin: float) -> Tensor:
    """Return the energy of each token, its own similarity of 1 included: (B, N, d) -> (B, N)."""
    unit = unit_rows(metric.to(torch.promote_types(metric.dtype, torch.float32)))
    return F.elu(unit @ unit.transpose(1, 2) - margin).mean(-1)


class PiToMeOriginal(OriginalMerger):
    """The eager original: the paper's algorithm, op by op."""

    static: PiToMe

    def reduce(self, block: int, state: BlockState) -> Merged:
        """Merge the tokens between attention and MLP of a block."""
        static = self.static
        keys = state.keys.transpose(1, 2).mean(2) if static.params.metric == "k" else state.tokens
        return merge_by_energy(
            keys,
            state.tokens,
            state.size,
            r=static.steps[block],
            prefix=static.num_prefix_tokens,
            margin=static.margin(block),
            variant=static.params.variant,
            ascending=static.order == "ascending",
        )


def merge_by_energy(
    keys: Tensor, tokens: Tensor, size: Tensor, *, r: int, prefix: int, margin: float, variant: str, ascending: bool
) -> Merged:
    """Return what the paper's ranking, matching and size-weighted mean give, with the prefix tokens in front."""
    length = keys.square().sum(-1, keepdim=True).sqrt()
    keys = torch.where(length > 0, keys / length, torch.zeros_like(keys))[:, prefix:]
    alike = torch.einsum("bid,bjd->bij", keys, keys)
    excess = alike - margin
    energy = torch.where(excess >= 0, excess, excess.exp() - 1).mean(dim=2)
    ranking = energy.argsort(dim=1, descending=True, stable=True)
    mergeable = ranking if variant == "bsm" else ranking[:, : 2 * r]
    sources, targets = mergeable[:, ::2], mergeable[:, 1::2]
    every = torch.arange(len(tokens), device=tokens.device)[:, None]
    match = alike[every[..., None], sources[..., None], targets[:, None]]
    best, nearest = match.max(dim=2)
    if variant == "bsm":
        order = best.argsort(dim=1, descending=True, stable=True)
        merging, staying = order[:, :r], order[:, r:]
        if ascending:
            staying = staying.sort(dim=1).values
        rest, sources, nearest = sources[every, staying], sources[every, merging], nearest[every, merging]
    else:
        rest = ranking[:, 2 * r :].sort(dim=1).values if ascending else ranking[:, 2 * r :]

    def merge(values: Tensor) -> Tensor:
        front, values = values[:, :prefix], values[:, prefix:]
        index = nearest[..., None].expand(-1, -1, values.shape[-1])
        joined = values[every, targets].scatter_add(1, index, values[every, sources])
        return torch.cat([front, values[every, rest], joined], dim=1)

    merged_size = merge(size)
    everyone = torch.eye(tokens.shape[1], dtype=tokens.dtype, device=tokens.device).expand(len(tokens), -1, -1)
    return Merged(merge(tokens * size) / merged_size, merged_size, merge(everyone).argmax(dim=1).to(torch.int32))
