"""Learned merger: a small network scores tokens, the best stay, and another network merges the others into them.

The project's founding notes call it the learned compressor of their chapter on FastVLM; no such part is in FastVLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgecomp.compressors._base import Compressor, Natural, Params, Positive
from edgecomp.compressors._eager import cosine
from edgecomp.compressors._pruning import select
from edgecomp.compressors._tokens import take, unit_rows
from edgecomp.errors import InvalidSpec
from edgecomp.specs import Output, Site, TensorSpec, TokenBudget

__all__ = ["LearnedMerger"]

_MOST_STEPS = 64  # of the sequential form: each is a part of the graph


class LearnedMergerParams(Params, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of the learned merger.

    Attributes:
        form: `parallel`: each discarded token goes to the kept token that it is most like, and the mean of what a kept
            token gets is merged into it, once; `sequential`, the notes' loop: discarded tokens are merged one after the
            other, in their order, each into what is then most like it.
        score_dim: hidden width of the network that scores.
        merge_dim: hidden width of the network that merges two tokens; 0: that of the tokens.
    """

    form: Literal["parallel", "sequential"] = "parallel"
    score_dim: Positive = 256
    merge_dim: Natural = 0


class LearnedMerger(Compressor):
    """Keep the K tokens of highest score, and merge every other token into one of them.

    score = sigmoid(MLP(token)); a merge is MLP([kept; other]), from 2 D to D; both have one hidden layer with GELU.

    Shapes: tokens (B, N, D) -> merged (B, K, D), highest score first, and source_map (B, N) int32, the row that each
    token ends in.

    Static rewrite (level E1 of the sequential form, which the notes describe): K and N are fixed, so that N - K merges
    follow each other, unrolled; what is merged into is taken out and put back by a one-hot row. Up to 64 of them. The
    parallel form is ours, and another function: all N - K are assigned at once, against kept tokens that nothing has
    changed yet, and their means are one product with a one-hot matrix.

    The score decides which tokens stay and nothing else, as in the notes: no gradient reaches the network that makes
    it, and its last layer has no bias, which would change no order.

    Source: the project's founding notes, chapter FastVLM.
    """

    Params = LearnedMergerParams
    params: LearnedMergerParams
    ranking_params = ("score_fc1.*", "score_fc2.*")

    def __init__(self, params: LearnedMergerParams, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        super().__init__(params, site, budget, output)
        width = site.embed_dim
        self.steps = budget.tokens_in - budget.tokens_out
        if params.form == "sequential" and self.steps > _MOST_STEPS:
            raise InvalidSpec(
                f"learned-merger: the sequential form unrolls {self.steps} merges for {budget.tokens_in} -> "
                f"{budget.tokens_out} tokens, and {_MOST_STEPS} is the most; keep at least "
                f"{budget.tokens_in - _MOST_STEPS}, or set params.form=parallel"
            )
        self.score_fc1 = nn.Linear(width, params.score_dim)
        self.score_fc2 = nn.Linear(params.score_dim, 1, bias=False)
        hidden = params.merge_dim or width
        self.merge_fc1, self.merge_fc2 = nn.Linear(2 * width, hidden), nn.Linear(hidden, width)

    def input_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `tokens`."""
        return (TensorSpec("tokens", (batch, self.budget.tokens_in, self.site.embed_dim), "float32", "tokens"),)

    def output_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `merged` and `source_map`."""
        return (
            TensorSpec("merged", (batch, self.budget.tokens_out, self.site.embed_dim), "float32", "tokens"),
            TensorSpec("source_map", (batch, self.budget.tokens_in), "int32", "indices"),
        )

    @property
    def remarks(self) -> tuple[str, ...]:
        """What an export should say of the steps."""
        return (f"{self.steps} merges, one after the other",) if self.params.form == "sequential" else ()

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Return the kept tokens after all merges, and where each token went."""
        count, kept_count = self.budget.tokens_in, self.budget.tokens_out
        scores = self.score_fc2(F.gelu(self.score_fc1(tokens))).squeeze(-1).sigmoid()  # (B, N)
        ranked = select(scores, count, order="rank")
        index, rest = ranked[:, :kept_count], ranked[:, kept_count:]
        if self.params.form == "sequential":
            rest = rest.sort(-1).values
        kept, others = take(tokens, index), take(tokens, rest)
        places = torch.arange(kept_count, device=tokens.device)
        if not self.steps:
            merged, match = kept, rest
        elif self.params.form == "parallel":
            merged, match = self._merge_all(kept, others, places)
        else:
            merged, match = self._merge_each(kept, others, places)
        rows = torch.zeros_like(ranked).scatter(1, index, places.expand_as(index))
        return merged, rows.scatter(1, rest, match).to(torch.int32)

    def _merge_all(self, kept: Tensor, others: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Merge the mean of what each kept token gets: kept (B, K, D), others (B, R, D) -> (B, K, D), (B, R)."""
        match = (unit_rows(others) @ unit_rows(kept).transpose(1, 2)).argmax(-1)  # (B, R)
        members = (match.unsqueeze(1) == places.unsqueeze(-1)).to(kept.dtype)  # (B, K, R)
        sizes = members.sum(-1, keepdim=True)
        means = members @ others / sizes.clamp(min=1.0)
        return torch.where(sizes > 0, self.merge(kept, means), kept), match

    def _merge_each(self, kept: Tensor, others: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Merge one token after the other."""
        matches = []
        for step in range(self.steps):
            other = others[:, step : step + 1]  # (B, 1, D)
            match = (unit_rows(other) @ unit_rows(kept).transpose(1, 2)).argmax(-1)  # (B, 1)
            chosen = match.unsqueeze(-1) == places  # (B, 1, K)
            target = chosen.to(kept.dtype) @ kept  # (B, 1, D)
            kept = torch.where(chosen.transpose(1, 2), self.merge(target, other), kept)
            matches.append(match)
        return kept, torch.cat(matches, 1)

    def merge(self, kept: Tensor, other: Tensor) -> Tensor:
        """Return one token for two: (B, M, D) and (B, M, D) -> (B, M, D)."""
        return self.merge_fc2(F.gelu(self.merge_fc1(torch.cat([kept, other], -1))))  # type: ignore[no-any-return]

    def reference(self) -> nn.Module:
        """Return the notes' loop, or the same for the parallel form."""
        return LearnedMergerOriginal(self)

    @classmethod
    def infer_params(cls, state: Mapping[str, Tensor], params: LearnedMergerParams) -> dict[str, Any]:  # noqa: ARG003 - the signature of all
        """Return the widths that a checkpoint has."""
        found: dict[str, Any] = {}
        if "score_fc1.weight" in state:
            found["score_dim"], found["embed_dim"] = state["score_fc1.weight"].shape
        if "merge_fc1.weight" in state:
            found["merge_dim"] = len(state["merge_fc1.weight"])
        return found


class LearnedMergerOriginal(nn.Module):
    """The eager original: lists of tokens, one sample after the other."""

    def __init__(self, static: LearnedMerger) -> None:
        super().__init__()
        self.static: Any = static

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Return what the static module returns."""
        samples = [self._sample(x) for x in tokens]
        return tuple(torch.stack(part) for part in zip(*samples, strict=True))

    def _sample(self, x: Tensor) -> tuple[Tensor, Tensor]:
        static = self.static
        hidden = F.gelu(F.linear(x, static.score_fc1.weight, static.score_fc1.bias))
        scores = torch.sigmoid(hidden @ static.score_fc2.weight[0])
        scores = torch.where(scores.isnan(), -torch.inf, scores)
        order = torch.argsort(scores, descending=True, stable=True).tolist()
        index = order[: static.budget.tokens_out]
        kept = [x[place] for place in index]
        rows = {place: row for row, place in enumerate(index)}
        waiting: dict[int, list[int]] = {}
        for place in range(len(x)):
            if place in index:
                continue
            alike = torch.stack([cosine(x[place], token) for token in kept])
            row = rows[place] = int(alike.argmax())
            if static.params.form == "sequential":
                kept[row] = self._merge(kept[row], x[place])
            else:
                waiting.setdefault(row, []).append(place)
        for row, places in waiting.items():
            kept[row] = self._merge(kept[row], sum(x[place] for place in places) / len(places))  # type: ignore[arg-type]
        return torch.stack(kept), torch.tensor([rows[place] for place in range(len(x))], dtype=torch.int32)

    def _merge(self, kept: Tensor, other: Tensor) -> Tensor:
        static = self.static
        hidden = F.gelu(F.linear(torch.cat([kept, other]), static.merge_fc1.weight, static.merge_fc1.bias))
        return F.linear(hidden, static.merge_fc2.weight, static.merge_fc2.bias)
