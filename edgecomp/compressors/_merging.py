"""What all token mergers share: how many tokens each block loses, what goes in and out, and the walk through steps.

A merger stands `inside` a vision transformer, between attention and MLP of each block, or `after` an encoder or alone,
where it merges given tokens in as few steps as halving allows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

from msgspec import Meta
from torch import Tensor, nn

from edgecomp.compressors._base import Natural, Params
from edgecomp.compressors._inside import BlockState, InsideCompressor, Trail
from edgecomp.compressors._tokens import compose_maps, largest_r, top_k_merge
from edgecomp.errors import InvalidSpec
from edgecomp.specs import Output, Site, TensorSpec, TokenBudget

__all__ = ["KeyMergeParams", "MergeParams", "Merged", "TokenMerger", "merge_steps", "parse_r"]

_COUNTS = ("r", "schedule", "keep_ratio")  # each of these parameters says how many tokens are removed


class Merged(NamedTuple):
    """Tokens (B, M, D), their sizes (B, M, 1), and the output row of each token that went in (B, N) int32."""

    tokens: Tensor
    size: Tensor
    rows: Tensor


class MergeParams(Params, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of all mergers.

    Attributes:
        r: tokens that each block (or step) removes; 0: as many as the budget asks.
        inflect: how r changes from the first block to the last, -1 (2r to 0) over 0 (constant) to 1 (0 to 2r).
        schedule: r for each block, instead of `r` and `inflect`.
        keep_ratio: share of its tokens that each block (or step) keeps, instead of `r`; 0: not used.
        prefix_tokens: class, distillation and register tokens in front of given tokens, which take no part; a host
            says it itself.
        prop_attn: add log(size) to the attention's scores, so that a merged token weighs as much as its parts.
        order: of unmerged tokens: `ascending`; `rank`; or `original`: as the published code has it, ascending where
            there are prefix tokens and rank where there are none.
    """

    r: Natural = 0
    inflect: Annotated[float, Meta(ge=-1, le=1)] = 0.0
    schedule: tuple[Natural, ...] = ()
    keep_ratio: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    prefix_tokens: Annotated[int, Meta(ge=0, le=64)] = 0
    prop_attn: bool = True
    order: Literal["original", "ascending", "rank"] = "original"

    @property
    def decides_counts(self) -> bool:
        """Whether the parameters say how many tokens each block removes."""
        return bool(self.r or self.schedule or self.keep_ratio)

    def metric_of(self, state: BlockState) -> Tensor:
        """Return what similarity is measured on where a method has nothing of its own, (B, N, d)."""
        return state.keys.mean(1)


class KeyMergeParams(MergeParams, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of mergers without weights, with those of `MergeParams`.

    Attributes:
        metric: what similarity is measured on inside a host: `k`, the mean over heads of the keys; `x`, the tokens.
    """

    metric: Literal["k", "x"] = "k"

    def metric_of(self, state: BlockState) -> Tensor:
        """Return what similarity is measured on, (B, N, d)."""
        return state.keys.mean(1) if self.metric == "k" else state.tokens


def parse_r(depth: int, r: int, inflect: float) -> tuple[int, ...]:
    """Return r for each block: constant, or linear from r (1 - inflect) to r (1 + inflect), each rounded down.

    Source: arXiv:2210.09461, section 4.1 (constant and decreasing schedules).
    """
    first = int(r * (1 - inflect))
    slope = (2 * r - 2 * first) / (depth - 1) if depth > 1 else 0.0
    return tuple(int(first + slope * block) for block in range(depth))


def merge_steps(params: MergeParams, *, tokens: int, num_prefix_tokens: int, depth: int, keep: int) -> tuple[int, ...]:
    """Return how many tokens each of `depth` blocks removes.

    Args:
        tokens: patch tokens that go in; prefix tokens not counted.
        keep: patch tokens that stay; 0: whatever the parameters leave.

    Raises:
        InvalidSpec: a schedule of another length, an r that no block can remove, or parameters and budget that differ.
    """
    given = [f"params.{name}={getattr(params, name)}" for name in _COUNTS if getattr(params, name)]
    if len(given) > 1:
        raise InvalidSpec(f"{' and '.join(given)} are given; give one")
    if params.schedule and len(params.schedule) != depth:
        raise InvalidSpec(
            f"params.schedule has {len(params.schedule)} entries and the host {depth} blocks; give one r for each block"
        )
    if not params.decides_counts:
        return _steps_to(keep, tokens=tokens, depth=depth)
    if params.keep_ratio:
        asked = _shares(tokens, depth, params.keep_ratio)
    else:
        asked = params.schedule or parse_r(depth, params.r, params.inflect)
    most = largest_r(tokens + num_prefix_tokens, num_prefix_tokens)
    if max(asked) > most:
        raise InvalidSpec(
            f"r={max(asked)} is above {most}, the most that one merge of {tokens} tokens can remove (half of them, "
            f"the {num_prefix_tokens} protected not counted)"
        )
    steps = _clipped(asked, tokens)
    left = tokens - sum(steps)
    if keep not in (0, left):
        raise InvalidSpec(
            f"the r that was set leaves {left} of {tokens} tokens and the budget says {keep}; give one of both"
        )
    return steps


def _shares(tokens: int, depth: int, keep_ratio: float) -> tuple[int, ...]:
    """Return r for each block where each keeps a share of its tokens: n less n times that share, rounded down."""
    steps = []
    for _ in range(depth):
        steps.append(int(tokens - tokens * keep_ratio))
        tokens -= steps[-1]
    return tuple(steps)


def _clipped(asked: Sequence[int], tokens: int) -> tuple[int, ...]:
    steps = []
    for r in asked:
        steps.append(min(r, tokens // 2))
        tokens -= steps[-1]
    return tuple(steps)


def _steps_to(keep: int, *, tokens: int, depth: int) -> tuple[int, ...]:
    """Return the smallest constant r that reaches `keep`; the last blocks remove less, to meet it exactly."""
    most = _clipped([tokens] * depth, tokens)
    if tokens - sum(most) > keep:
        raise InvalidSpec(
            f"budget {keep} is below {tokens - sum(most)}, the fewest that {depth} merges leave of {tokens} tokens; "
            "each removes at most half"
        )
    r = next(r for r in range(tokens) if sum(_clipped([r] * depth, tokens)) >= tokens - keep)
    steps = list(_clipped([r] * depth, tokens))
    spare = sum(steps) - (tokens - keep)
    for block in reversed(range(depth)):
        steps[block], spare = max(0, steps[block] - spare), max(0, spare - steps[block])
    return tuple(steps)


class TokenMerger(InsideCompressor):
    """A compressor that merges tokens; a method extends it by `merge`, and by an original with the same `reduce`."""

    Params = MergeParams
    params: MergeParams

    def __init__(self, params: Any, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        super().__init__(params, site, budget, output)
        self.steps = self.plan()

    def plan(self) -> tuple[int, ...]:
        """Return how many tokens each merge removes."""
        return merge_steps(
            self.params,
            tokens=self.budget.tokens_in,
            num_prefix_tokens=self.num_prefix_tokens,
            depth=self.depth_of(self.params, self.site, self.budget.tokens_out),
            keep=self.budget.tokens_out,
        )

    @classmethod
    def depth_of(cls, params: Any, site: Site, keep: int) -> int:
        """Return the number of merges: the host's blocks, or as few as reach `keep`."""
        if site.placement == "inside":
            return site.depth
        if params.schedule:
            return len(params.schedule)
        return 1 if params.decides_counts or not keep else max(1, math.ceil(math.log2(site.tokens_in / keep)))

    @classmethod
    def default_counts(cls, params: Any, site: Site) -> tuple[int, ...]:
        """Return what the parameters leave, where they say how much each block removes."""
        if not params.decides_counts:
            return ()
        steps = merge_steps(
            params,
            tokens=site.tokens_in,
            num_prefix_tokens=site.num_prefix_tokens,
            depth=cls.depth_of(params, site, 0),
            keep=0,
        )
        return (site.tokens_in - sum(steps),)

    @property
    def drops_tokens(self) -> bool:
        """Whether a merge leaves out tokens, which then have no row."""
        return False

    @property
    def order(self) -> Literal["ascending", "rank"]:
        """The order of unmerged tokens."""
        if self.params.order == "original":
            return "ascending" if self.num_prefix_tokens else "rank"
        return self.params.order

    @property
    def remarks(self) -> tuple[str, ...]:
        """What an export should say: how many tokens are left after each merge."""
        left, counts = self.budget.tokens_in + self.num_prefix_tokens, []
        for step in self.steps:
            left -= step
            counts.append(left)
        where = "block" if self.site.placement == "inside" else "step"
        prefix = f" ({self.num_prefix_tokens} of them protected)" if self.num_prefix_tokens else ""
        return (f"tokens after each {where}{prefix}: {', '.join(map(str, counts))}",)

    def input_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `tokens`, or inside a host the `image`."""
        if self.site.placement == "inside":
            side = self.site.image_size
            return (TensorSpec("image", (batch, 3, side, side), "float32", "image"),)
        return (
            TensorSpec(
                "tokens",
                (batch, self.num_prefix_tokens + self.budget.tokens_in, self.site.embed_dim),
                "float32",
                "tokens",
            ),
        )

    def output_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `merged` (B, P + M, D), `size` (B, P + M, 1) and `source_map` (B, P + N), or `logits`."""
        if self.output == "logits":
            return (self.logits_spec(batch),)
        rows = self.num_prefix_tokens + self.budget.tokens_out
        return (
            TensorSpec("merged", (batch, rows, self.site.embed_dim), "float32", "tokens"),
            TensorSpec("size", (batch, rows, 1), "float32", "counts"),
            TensorSpec("source_map", (batch, self.num_prefix_tokens + self.budget.tokens_in), "int32", "indices"),
        )

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Merge given tokens, step by step."""
        return merge_given(self, self.steps, tokens)

    def acts_in(self, block: int) -> bool:
        """Say whether a block loses tokens."""
        return bool(self.steps[block])

    def attention_bias(self, trail: Trail) -> Tensor | None:
        """Return the sizes, for proportional attention."""
        return trail.size if self.params.prop_attn else None

    def advance(self, reducer: Any, block: int, state: BlockState, trail: Trail) -> Trail:
        """Merge in one block, and compose the source map."""
        merged = reducer.reduce(block, state)
        rows = merged.rows
        if trail.rows is not None:
            rows = compose_maps(trail.rows, rows, drops=self.drops_tokens)
        return Trail(merged.tokens, merged.size, rows)

    def finish(self, trail: Trail) -> tuple[Tensor, ...]:
        """Return tokens, sizes and source map."""
        size = trail.tokens.new_ones(*trail.tokens.shape[:2], 1) if trail.size is None else trail.size
        return trail.tokens, size, identity_map(trail.tokens) if trail.rows is None else trail.rows

    def metric(self, block: int, state: BlockState) -> Tensor:  # noqa: ARG002 - a method with weights has some for each block
        """Return what similarity is measured on in a block, (B, N, d)."""
        return self.params.metric_of(state)

    def reduce(self, block: int, state: BlockState) -> Merged:
        """Merge the tokens between attention and MLP of a block: the r best-matched pairs, averaged by size."""
        merged = top_k_merge(
            self.metric(block, state),
            state.tokens,
            state.size,
            r=self.steps[block],
            num_prefix_tokens=self.num_prefix_tokens,
            order=self.order,
        )
        return Merged(*merged)


def merge_given(reducer: Any, steps: Sequence[int], tokens: Tensor) -> tuple[Tensor, ...]:
    """Merge tokens (B, N, D) where no attention offers keys: similarity is that of the tokens themselves."""
    size = tokens.new_ones(*tokens.shape[:2], 1)
    rows: Tensor | None = None
    for step, r in enumerate(steps):
        if r:
            merged = reducer.reduce(step, BlockState(tokens, tokens, tokens.unsqueeze(1), size))
            tokens, size = merged.tokens, merged.size
            rows = merged.rows if rows is None else compose_maps(rows, merged.rows)
    if rows is None:
        rows = identity_map(tokens)
    return tokens, size, rows


def identity_map(tokens: Tensor) -> Tensor:
    """Return the map of tokens (B, N, D) that stay where they are: (B, N) int32."""
    import torch

    places = torch.arange(tokens.shape[1], dtype=torch.int32, device=tokens.device)
    return places.expand(tokens.shape[0], -1)


class OriginalMerger(nn.Module):
    """Base of a merger's eager original, which shares its parameters."""

    def __init__(self, static: TokenMerger) -> None:
        super().__init__()
        self.static = static

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Merge given tokens, step by step."""
        return merge_given(self, self.static.steps, tokens)
