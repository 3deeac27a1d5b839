"""Compress to budget: tokens merge, are pruned, and lose near-duplicates, step by step, until a budget is met.

The schedule of the project's founding notes, repaired: theirs never ends where no pair is similar enough.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import torch
from msgspec import Meta
from torch import Tensor, nn

from edgecomp.compressors._base import Compressor, Params
from edgecomp.compressors._merging import identity_map
from edgecomp.compressors._pruning import select
from edgecomp.compressors._tokens import compose_maps, take, top_k_merge, unit_rows
from edgecomp.specs import Output, Site, TensorSpec, TokenBudget

__all__ = ["CompressToBudget"]

_FAR, _NEAR = 2.0, 1.5  # tokens over the budget: above the first merge, above the second prune
_BEFORE_ALL = -2.0  # below any cosine


class CompressToBudgetParams(Params, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of the schedule.

    Attributes:
        merge_keep: share kept by a merge, at least a half, since a token merges into another once.
        prune_keep: share kept by a pruning.
    """

    merge_keep: Annotated[float, Meta(ge=0.5, lt=1)] = 0.7
    prune_keep: Annotated[float, Meta(gt=0, lt=1)] = 0.8


class Step(NamedTuple):
    """One step of the schedule: what it does, and how many tokens it leaves."""

    kind: Literal["merge", "prune", "drop"]
    keep: int


def schedule(tokens: int, budget: int, params: CompressToBudgetParams) -> tuple[Step, ...]:
    """Return the steps from so many tokens to the budget.

    Above twice the budget tokens merge, above one and a half times they are pruned, and then the most redundant are
    dropped, all that are too many. Counts are rounded down, and none is below the budget.
    """
    steps = []
    while tokens > budget:
        over = tokens / budget
        if over > _FAR:
            step = Step("merge", max(budget, min(tokens - 1, int(tokens * params.merge_keep)), tokens - tokens // 2))
        elif over > _NEAR:
            step = Step("prune", max(budget, min(tokens - 1, int(tokens * params.prune_keep))))
        else:
            step = Step("drop", budget)
        steps.append(step)
        tokens = step.keep
    return tuple(steps)


class CompressToBudget(Compressor):
    """Merge, prune and drop near-duplicates until the budget is met.

    Shapes: tokens (B, N, D) -> merged (B, M, D), size (B, M, 1) in tokens, and source map (B, N) int32, -1 for a token
    that was dropped.

    Static rewrite (level E4): the counts depend on N and the budget alone. A merge is ToMe's bipartite matching on the
    tokens, weighted by size; a pruning keeps the largest norms; a near-duplicate is a token most similar to one before
    it, so that the first of a group of equals stays. Tokens kept by the last two stay in their order.

    Source: the project's founding notes (compress-to-budget schedule).
    """

    Params = CompressToBudgetParams
    params: CompressToBudgetParams

    def __init__(self, params: Any, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        super().__init__(params, site, budget, output)
        self.steps = schedule(budget.tokens_in, budget.tokens_out, params)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What an export should say: the schedule."""
        words = [str(self.budget.tokens_in), *(f"{step.kind} to {step.keep}" for step in self.steps)]
        return (", ".join(words),)

    def input_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `tokens`."""
        return (TensorSpec("tokens", (batch, self.budget.tokens_in, self.site.embed_dim), "float32", "tokens"),)

    def output_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `merged`, `size` and `source_map`."""
        rows = self.budget.tokens_out
        return (
            TensorSpec("merged", (batch, rows, self.site.embed_dim), "float32", "tokens"),
            TensorSpec("size", (batch, rows, 1), "float32", "counts"),
            TensorSpec("source_map", (batch, self.budget.tokens_in), "int32", "indices"),
        )

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Run the schedule."""
        size, rows = tokens.new_ones(*tokens.shape[:2], 1), identity_map(tokens)
        for step in self.steps:
            count = tokens.shape[1]
            if step.kind == "merge":
                tokens, size, found = top_k_merge(tokens, tokens, size, r=count - step.keep)
            else:
                score = tokens.norm(dim=-1) if step.kind == "prune" else -_redundancy(tokens)
                index = select(score, step.keep)
                tokens, size, found = take(tokens, index), take(size, index), _rows_of(index, count)
            rows = compose_maps(rows, found, drops=True)
        return tokens, size, rows

    def reference(self) -> nn.Module:
        """Return plain loops, one sample at a time."""
        return CompressToBudgetOriginal(self)


def _redundancy(tokens: Tensor) -> Tensor:
    """Return how similar each token is to the most similar one before it: (B, N, D) -> (B, N)."""
    unit = unit_rows(tokens)
    count = tokens.shape[1]
    places = torch.arange(count, device=tokens.device)
    before = places < places.unsqueeze(-1)  # (N, N), column before row
    return torch.where(before, unit @ unit.transpose(1, 2), _BEFORE_ALL).amax(-1)


def _rows_of(index: Tensor, tokens: int) -> Tensor:
    """Return the row of each of `tokens` tokens of which index (B, k) are kept: (B, N) int32, -1 where dropped."""
    rows = torch.arange(index.shape[1], device=index.device).expand_as(index)
    return index.new_full((index.shape[0], tokens), -1).scatter(1, index, rows).to(torch.int32)


class CompressToBudgetOriginal(nn.Module):
    """The eager reference: groups of tokens as lists, one sample at a time."""

    def __init__(self, static: CompressToBudget) -> None:
        super().__init__()
        self.static = static

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Return what the static module returns."""
        samples = [self._sample(x) for x in tokens]
        return tuple(torch.stack(part) for part in zip(*samples, strict=True))

    def _sample(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        groups = [[token] for token in range(len(x))]
        rows = list(x)
        for step in self.static.steps:
            if step.kind == "merge":
                rows, groups = self._merge(rows, groups, len(rows) - step.keep)
                continue
            if step.kind == "prune":
                score = [float(row.square().sum().sqrt()) for row in rows]
            else:
                score = [-max((self._cosine(row, other) for other in rows[:place]), default=_BEFORE_ALL)
                         for place, row in enumerate(rows)]  # fmt: skip
            kept = sorted(sorted(range(len(rows)), key=lambda place: (-score[place], place))[: step.keep])
            rows, groups = [rows[place] for place in kept], [groups[place] for place in kept]
        source_map = torch.full((len(x),), -1, dtype=torch.int32)
        for place, group in enumerate(groups):
            source_map[group] = place
        size = torch.tensor([[float(len(group))] for group in groups], dtype=x.dtype)
        return torch.stack(rows), size, source_map

    def _merge(self, rows: list[Tensor], groups: list[list[int]], r: int) -> tuple[list[Tensor], list[list[int]]]:
        """Average the r best-matched pairs of an even and an odd token by size; the others keep their order."""
        odd = range(1, len(rows), 2)
        match = {}
        for source in range(0, len(rows), 2):
            likeness = [self._cosine(rows[source], rows[target]) for target in odd]
            best = max(range(len(likeness)), key=lambda place: (likeness[place], -place))
            match[source] = (likeness[best], odd[best])
        ranking = sorted(match, key=lambda source: (-match[source][0], source))
        merged, left = ranking[:r], sorted(ranking[r:])
        into: dict[int, list[int]] = {target: [target] for target in odd}
        for source in merged:
            into[match[source][1]].append(source)
        new_rows, new_groups = [rows[token] for token in left], [groups[token] for token in left]
        for members in into.values():
            weights = [len(groups[member]) for member in members]
            total = sum(weight * rows[member] for weight, member in zip(weights, members, strict=True))
            new_rows.append(total / sum(weights))  # type: ignore[arg-type]
            new_groups.append([token for member in members for token in groups[member]])
        return new_rows, new_groups

    @staticmethod
    def _cosine(a: Tensor, b: Tensor) -> float:
        length = a.square().sum().sqrt() * b.square().sum().sqrt()
        return float((a * b).sum() / length) if length > 0 else 0.0
