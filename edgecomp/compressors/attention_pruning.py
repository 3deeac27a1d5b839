"""Attention pruning: the tokens of highest score stay; the score is attention, a norm, what pixels tell, or chance.

The selection of the project's founding notes, with its score sources; with the class token's attention it is what
FasterVLM (arXiv:2412.01818) and HPC-ColPali (arXiv:2506.21601) do. Inside a host it is done in several blocks.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from msgspec import Meta
from torch import Tensor, nn

from edgecomp.compressors._base import HostFeature, Natural
from edgecomp.compressors._inside import BlockState, Trail
from edgecomp.compressors._pruning import (
    Kept,
    PruneParams,
    Schedule,
    TokenPruner,
    papers_blocks,
    residual_token,
    scheduled_counts,
    select,
    with_prefix,
)
from edgecomp.compressors._tokens import take, top_k, unit_rows
from edgecomp.errors import InvalidSpec
from edgecomp.specs import Output, Site, TensorSpec, TokenBudget

__all__ = ["AttentionPruning"]

Score = Literal[
    "cls-attention", "received-attention", "cumulative-attention", "norm", "hybrid", "multimodal", "text-likelihood",
    "random",
]  # fmt: skip

_READS: dict[str, tuple[HostFeature, ...]] = {
    "cls-attention": ("class_attention",),
    "received-attention": ("received_attention",),
    "cumulative-attention": ("cumulative_attention",),
    "hybrid": ("received_attention",),
    "multimodal": ("attention_output",),
    "text-likelihood": ("text_likelihood",),
}
_INSIDE = ("cls-attention", "received-attention", "cumulative-attention", "norm", "hybrid", "multimodal", "random")


class AttentionPruningParams(PruneParams, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of attention pruning, with those of `PruneParams`.

    Attributes:
        score: what decides: attention of the class token (`cls-attention`); attention received of all tokens, in this
            layer or summed over all up to it; `norm` of the token; `hybrid`, 0.6 norm + 0.4 received attention;
            `multimodal`, 0.6 norm of the attention's output + 0.4 norm of the token; `text-likelihood` of the pixels,
            so that text stays; `random`, a fixed draw, for comparison.
        heads: how the heads of an attention become one number.
        dropped: what becomes of the rest: nothing; one `residual` token, their sum weighted by their share of the
            score of all tokens (equal shares where all scores are zero); or each is averaged into the kept token most
            similar to it (`merge`).
        threshold: keep only tokens whose score is above it. How many those are depends on the data, so that there are
            rows for as many as the budget says, and a count; not inside a host.
        quantile: the same with the score's quantile (linear interpolation) as threshold.
        schedule: inside a host, how the tokens removed grow with the block: see `scheduled_counts`.
        blocks: inside a host, where `constant` removes; empty: at a quarter, a half and three quarters of the depth.
        table: inside a host, pairs of a block and the share kept, for `table` and `piecewise`.
        of: inside a host, whether shares are of the original length or of the current one.
        seed: of the `random` score.
    """

    score: Score = "cls-attention"
    heads: Literal["mean", "max"] = "mean"
    dropped: Literal["nothing", "residual", "merge"] = "nothing"
    threshold: float | None = None
    quantile: Annotated[float, Meta(ge=0, lt=1)] | None = None
    schedule: Schedule = "constant"
    blocks: tuple[Natural, ...] = ()
    table: tuple[tuple[Natural, float], ...] = ()
    of: Literal["current", "original"] = "original"
    seed: Annotated[int, Meta(ge=0, le=2**31)] = 0

    @property
    def is_adaptive(self) -> bool:
        """Whether the data decide how many tokens stay."""
        return self.threshold is not None or self.quantile is not None


class AttentionPruning(TokenPruner):
    """Keep the tokens of highest score.

    Shapes: tokens (B, N, D) and what the score reads (attention (B, H, N), ...) -> kept (B, M, D) and index (B, M)
    int32; with a threshold or quantile also count (B,) int64 and mask (B, M). Inside a host: image (B, 3, S, S) ->
    kept (B, P + M, D) and index (B, P + M), or logits. M is the budget, a residual token counted.

    Static rewrite (level E1): TopK of M and Gather; with a threshold (level E2) the rows up to count are the
    original's, in its order, and those behind are zero.

    Source: the project's founding notes (importance metrics, pruning schedulers); FasterVLM, arXiv:2412.01818;
    HPC-ColPali, arXiv:2506.21601, section 3.
    """

    Params = AttentionPruningParams
    params: AttentionPruningParams
    chance: Tensor

    def __init__(self, params: Any, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        super().__init__(params, site, budget, output)
        _require_possible(params, site, budget)
        count = site.num_prefix_tokens + budget.tokens_in
        chance = torch.rand(count, generator=torch.Generator().manual_seed(params.seed), dtype=torch.float64)
        self.register_buffer("chance", chance.to(torch.get_default_dtype()), persistent=False)

    def plan(self) -> tuple[int, ...]:
        """Return how many patch tokens are left behind each block."""
        return _plan(self.params, self.site, self.budget.tokens_out)

    @classmethod
    def default_counts(cls, params: Any, site: Site) -> tuple[int, ...]:
        """Return what a table leaves, or rows for as many tokens as can stay."""
        if site.placement == "inside":
            return (_plan(params, site, 0)[-1],) if params.schedule in ("table", "piecewise") else ()
        if params.quantile is not None:
            return (_most_above(params.quantile, site.tokens_in),)
        return (site.tokens_in,) if params.threshold is not None else ()

    @property
    def host_features(self) -> tuple[HostFeature, ...]:
        """What the score reads."""
        return _READS.get(self.params.score, ()) if self.site.placement != "inside" else ()

    @property
    def reads_attention(self) -> bool:
        """Whether the score is one of attention."""
        return self.params.score in ("cls-attention", "received-attention", "cumulative-attention", "hybrid")

    @property
    def remarks(self) -> tuple[str, ...]:
        """What an export should say of the counts."""
        if not self.params.is_adaptive:
            return super().remarks
        said = f"at most {self.budget.tokens_out} tokens stay; `count` says how many rows are real, others are zero"
        most = _most_above(self.params.quantile, self.budget.tokens_in)
        if self.budget.tokens_out > most:
            said += f". Of scores that differ no more than {most} exceed the quantile: the rows behind are always zero"
        return (said,)

    def output_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `kept` and `index`, where the data decide `count` and `mask`, or `logits`."""
        specs = super().output_specs(batch)
        return (*specs, *self.count_specs(batch)) if self.params.is_adaptive else specs

    def forward(self, tokens: Tensor, *read: Tensor) -> tuple[Tensor, ...]:
        """Prune given tokens (B, N, D) by what was read of the host."""
        score = self.score_given(tokens, *read)
        rows = self.budget.tokens_out
        if not self.params.is_adaptive:
            return tuple(self._keep(tokens, score, rows))
        return self._keep_above(tokens, score, rows)

    def score_given(self, tokens: Tensor, read: Tensor | None = None) -> Tensor:
        """Return the score of given tokens (B, N, D): (B, N)."""
        if self.params.score == "random":
            return self.chance.expand(tokens.shape[:2])
        if read is None:
            return norm_of(tokens)
        if self.params.score == "text-likelihood":
            return read
        if self.params.score == "multimodal":
            return 0.6 * norm_of(read) + 0.4 * norm_of(tokens)
        attention = self.join_heads(read)
        return 0.6 * norm_of(tokens) + 0.4 * attention if self.params.score == "hybrid" else attention

    @property
    def scored_by(self) -> tuple[str, ...]:
        """What was read of the host, and tokens where the score is made of them too; inside a host the running sum."""
        if self.site.placement == "inside":
            return ("score",) if self.sums_score else ()
        alone = self.params.score in ("cls-attention", "received-attention", "cumulative-attention", "text-likelihood")
        return self.host_features if alone else ("tokens", *self.host_features)

    @property
    def kept_by_score(self) -> int:
        """All rows but the residual one."""
        return self.budget.tokens_out - (self.params.dropped == "residual")

    def score_of(self, *read: Tensor) -> Tensor:
        """Return the score of each patch token: (B, N)."""
        if self.site.placement == "inside":
            return read[0][:, self.num_prefix_tokens :]
        if "tokens" in self.scored_by:
            return self.score_given(*read)
        return read[0] if self.params.score == "text-likelihood" else self.join_heads(read[0])

    def join_heads(self, attention: Tensor) -> Tensor:
        """Return one number of all heads: (B, H, N) -> (B, N)."""
        return attention.mean(1) if self.params.heads == "mean" else attention.amax(1)

    @property
    def sums_score(self) -> bool:
        """Whether attention is summed up over blocks."""
        return self.params.score == "cumulative-attention"

    def observe(self, block: int, attention: Tensor, trail: Trail) -> Trail:  # noqa: ARG002 - all blocks count alike
        """Sum up what tokens receive, where the score is the sum."""
        if not self.sums_score:
            return trail
        received = self.join_heads(attention.mean(2))
        return trail._replace(score=received if trail.score is None else trail.score + received)

    def score_inside(self, state: BlockState, trail: Trail) -> Tensor:
        """Return the score of the patch tokens of a block, (B, N)."""
        prefix, score = self.num_prefix_tokens, self.params.score
        patches = state.tokens[:, prefix:]
        if score == "random":
            rows = trail.rows
            chance = self.chance.expand(state.tokens.shape[0], -1)
            if rows is not None:  # a token made of others is drawn last
                chance = torch.where(rows < 0, 0.0, chance.gather(1, rows.to(torch.int64).clamp_min(0)))
            return chance[:, prefix:]
        if score == "cumulative-attention":
            assert trail.score is not None
            return trail.score[:, prefix:]
        if score == "norm":
            return norm_of(patches)
        if score == "multimodal":
            assert state.read is not None
            return 0.6 * norm_of(state.read[:, prefix:]) + 0.4 * norm_of(patches)
        assert state.attention is not None
        seen = state.attention[:, :, 0] if score == "cls-attention" else state.attention.mean(2)
        attention = self.join_heads(seen[:, :, prefix:])
        return 0.6 * norm_of(patches) + 0.4 * attention if score == "hybrid" else attention

    def reduce(self, block: int, state: BlockState, trail: Trail) -> Kept:
        """Keep the prefix and the patches of highest score."""
        prefix = self.num_prefix_tokens
        kept = self._keep(state.tokens[:, prefix:], self.score_inside(state, trail), self.counts[block])
        return with_prefix(state.tokens, kept, prefix)

    def _keep(self, tokens: Tensor, score: Tensor, rows: int) -> Kept:
        """Keep `rows` rows, one of them the residual token where there is one."""
        residual = self.params.dropped == "residual"
        index = select(score, rows - residual, order=self.params.order)
        kept = take(tokens, index)
        if residual:
            total = score.sum(-1, keepdim=True)
            shares = torch.where(total > 0, score / torch.where(total > 0, total, 1.0), 1.0 / score.shape[-1])
            kept = torch.cat([kept, residual_token(tokens, shares, index)], 1)
            index = torch.cat([index, index.new_full((index.shape[0], 1), -1)], 1)
        elif self.params.dropped == "merge":
            kept = _merge_rest(tokens, index)
        return Kept(kept, index.to(torch.int32))

    def _keep_above(self, tokens: Tensor, score: Tensor, rows: int) -> tuple[Tensor, ...]:
        """Keep the tokens whose score is above the threshold, at most `rows`: kept, index, count, mask."""
        bound = _bound(self.params, score)
        ranked = select(score, rows, order="rank")
        real = score.gather(1, ranked) > bound
        if self.params.order == "raster":
            late = torch.where(real, ranked, ranked + score.shape[1])  # those that do not stay go behind
            places = top_k(-late.to(torch.float32), rows)
            ranked, real = ranked.gather(1, places), real.gather(1, places)
        kept = take(tokens, ranked) * real.unsqueeze(-1).to(tokens.dtype)
        index = torch.where(real, ranked, torch.full_like(ranked, -1)).to(torch.int32)
        return kept, index, real.sum(1), real

    def reference(self) -> nn.Module:
        """Return plain sorting, one sample at a time."""
        return AttentionPruningOriginal(self)


def _most_above(quantile: float | None, tokens: int) -> int:
    """Return how many of so many differing scores lie above a quantile; all of them where there is none."""
    return tokens if quantile is None else max(1, tokens - 1 - int(quantile * (tokens - 1)))


def norm_of(x: Tensor) -> Tensor:
    """Return the L2 norm of each row: (..., D) -> (...)."""
    norm: Tensor = x.norm(dim=-1)
    return norm


def _merge_rest(tokens: Tensor, index: Tensor) -> Tensor:
    """Average each token that is not kept into the kept one most similar to it: (B, N, D), (B, k) -> (B, k, D)."""
    unit = unit_rows(tokens)
    nearest = (unit @ take(unit, index).transpose(1, 2)).argmax(-1)  # (B, N)
    places = torch.arange(index.shape[1], device=tokens.device).unsqueeze(-1)
    own = index.unsqueeze(-1) == torch.arange(tokens.shape[1], device=tokens.device)
    is_kept = own.any(1, keepdim=True)
    members = (own | ((nearest.unsqueeze(1) == places) & ~is_kept)).to(tokens.dtype)  # (B, k, N)
    return members @ tokens / members.sum(-1, keepdim=True)


def _bound(params: AttentionPruningParams, score: Tensor) -> Tensor:
    """Return the score that a token must exceed to stay: (B, 1)."""
    if params.threshold is not None:
        return torch.full_like(score[:, :1], params.threshold)
    assert params.quantile is not None
    place = params.quantile * (score.shape[1] - 1)  # counted from the lowest
    low = int(place)
    ranked = score.gather(1, select(score, score.shape[1] - low, order="rank"))  # the lowest that is read comes last
    above = ranked[:, -2:-1] if score.shape[1] - low > 1 else ranked[:, -1:]
    return ranked[:, -1:] + (place - low) * (above - ranked[:, -1:])


def _plan(params: AttentionPruningParams, site: Site, keep: int) -> tuple[int, ...]:
    depth = site.depth
    return scheduled_counts(
        params.schedule,
        tokens=site.tokens_in,
        depth=depth,
        keep=keep,
        blocks=params.blocks or papers_blocks(depth),
        table=params.table,
        of=params.of,
    )


def _require_possible(params: AttentionPruningParams, site: Site, budget: TokenBudget) -> None:
    if params.threshold is not None and params.quantile is not None:
        raise InvalidSpec(
            f"params.threshold={params.threshold} and params.quantile={params.quantile} are given; give one"
        )
    if params.threshold is not None and not math.isfinite(params.threshold):
        raise InvalidSpec(
            f"params.threshold={params.threshold} is no finite number; give the score that must be exceeded"
        )
    if params.is_adaptive and params.dropped != "nothing":
        raise InvalidSpec(
            f"params.dropped={params.dropped} needs a fixed count, and a threshold or quantile leaves it to the data; "
            "drop one of both"
        )
    if params.dropped == "residual" and budget.tokens_out < 2:
        raise InvalidSpec("budget 1 has no row left for a kept token beside the residual one; give at least 2")
    if site.placement != "inside":
        return
    if params.score not in _INSIDE:
        raise InvalidSpec(
            f"params.score={params.score} is not known inside a host; there it is one of {', '.join(_INSIDE)}"
        )
    if params.is_adaptive:
        raise InvalidSpec(
            "params.threshold and params.quantile leave the count of tokens to the data, and the blocks of a host take "
            "a fixed one; use them after a host"
        )
    if params.score == "cls-attention" and not site.has_class_token:
        raise InvalidSpec(
            "params.score=cls-attention reads the class token, and this host has none; choose another score, for "
            "example received-attention"
        )


class AttentionPruningOriginal(nn.Module):
    """The eager original: a stable sort of each sample, boolean masks, plain loops."""

    def __init__(self, static: AttentionPruning) -> None:
        super().__init__()
        self.static = static

    def forward(self, tokens: Tensor, *read: Tensor) -> tuple[Tensor, ...]:
        """Prune given tokens, one sample at a time."""
        samples = []
        for x, *seen in zip(tokens, *read, strict=True):
            score = self._score(x, *seen)
            if self.static.params.is_adaptive:
                samples.append(self._above(x, score))
            else:
                samples.append(self._keep(x, score, self.static.budget.tokens_out))
        return tuple(torch.stack(part) for part in zip(*samples, strict=True))

    def reduce(self, block: int, state: BlockState, trail: Trail) -> Kept:
        """Prune in one block of a host, one sample at a time."""
        prefix = self.static.num_prefix_tokens
        scores = self.static.score_inside(state, trail)
        samples = [
            self._keep(tokens[prefix:], score, self.static.counts[block])
            for tokens, score in zip(state.tokens, scores, strict=True)
        ]
        kept = Kept(*(torch.stack(part) for part in zip(*samples, strict=True)))
        return with_prefix(state.tokens, kept, prefix)

    def _score(self, x: Tensor, read: Tensor | None = None) -> Tensor:
        """Return the score of one sample (N, D)."""
        params = self.static.params
        if read is None:
            return self.static.chance if params.score == "random" else x.square().sum(1).sqrt()
        if params.score == "text-likelihood":
            return read
        if params.score == "multimodal":
            return 0.6 * read.square().sum(1).sqrt() + 0.4 * x.square().sum(1).sqrt()
        attention = read.sum(0) / len(read) if params.heads == "mean" else read.max(0).values
        return 0.6 * x.square().sum(1).sqrt() + 0.4 * attention if params.score == "hybrid" else attention

    def _keep(self, x: Tensor, score: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        params = self.static.params
        count = rows - 1 if params.dropped == "residual" else rows
        index = torch.sort(score, descending=True, stable=True).indices[:count]
        if params.order == "raster":
            index = index.sort().values
        rest = torch.ones(len(x), dtype=torch.bool)
        rest[index] = False
        kept = x[index]
        if params.dropped == "residual":
            weights = score[rest] / score.sum() if score.sum() > 0 else torch.full_like(score[rest], 1 / len(score))
            kept = torch.cat([kept, (weights[:, None] * x[rest]).sum(0, keepdim=True)])
            index = torch.cat([index, torch.tensor([-1])])
        elif params.dropped == "merge":
            groups = [[token] for token in index.tolist()]
            for token in rest.nonzero()[:, 0].tolist():
                likeness = torch.cosine_similarity(x[token][None], x[index])
                groups[int(likeness.argmax())].append(token)
            kept = torch.stack([x[group].mean(0) for group in groups])
        return kept, index.to(torch.int32)

    def _above(self, x: Tensor, score: Tensor) -> tuple[Tensor, ...]:
        params, rows = self.static.params, self.static.budget.tokens_out
        bound = torch.quantile(score, params.quantile) if params.quantile is not None else params.threshold
        assert bound is not None
        index = torch.sort(score, descending=True, stable=True).indices
        index = index[score[index] > bound][:rows]
        if params.order == "raster":
            index = index.sort().values
        kept, places = x.new_zeros(rows, x.shape[1]), torch.full((rows,), -1, dtype=torch.int32)
        kept[: len(index)], places[: len(index)] = x[index], index.to(torch.int32)
        return kept, places, torch.tensor(len(index)), torch.arange(rows) < len(index)
