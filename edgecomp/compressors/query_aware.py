"""Query-aware selection: the tokens that a question is about stay.

Relevance to a query is that of the project's founding notes (repaired); beside it a learned form, latents that the
query guides.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import torch
from msgspec import Meta
from torch import Tensor, nn

from edgecomp.compressors._base import Natural
from edgecomp.compressors._pruning import PruneParams, TokenPruner, residual_token, select
from edgecomp.compressors._tokens import take, unit_rows
from edgecomp.errors import InvalidSpec
from edgecomp.specs import Output, Site, TensorSpec, TokenBudget

__all__ = ["QueryAware"]

_MASKED = -1e30


class QueryAwareParams(PruneParams, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of query-aware selection, with those of `PruneParams`.

    Attributes:
        query: `vector`, one for each sample, or `text`, features of several words with a mask.
        words: of `text`; shorter texts are masked.
        relevance: of a token to a word: `dot` product, `cosine`, or `attention`, the softmax over tokens of the dot
            product over the root of the width.
        join: how the words' relevances become one.
        residual: one more token, the sum of the others weighted by the softmax of their relevance.
        form: `select` keeps tokens; `latents` is learned: as many latents as the budget, each plus a projection of the
            query, read the tokens with the log of their relevance's softmax added to the scores.
        num_heads: of the latents' attention.
    """

    query: Literal["vector", "text"] = "vector"
    words: Annotated[int, Meta(ge=1, le=4096)] = 32
    relevance: Literal["dot", "cosine", "attention"] = "dot"
    join: Literal["max", "mean"] = "max"
    residual: bool = False
    form: Literal["select", "latents"] = "select"
    num_heads: Annotated[int, Meta(ge=1, le=256)] = 8
    latents: Natural = 0


class QueryAware(TokenPruner):
    """Keep the tokens most relevant to a query, or read them by latents that the query guides.

    Shapes: tokens (B, N, D) and query (B, D), or text (B, T, D) with text_mask (B, T), true where a word is -> kept
    (B, M, D) and index (B, M) int32; `latents`: compressed (B, M, D). M is the budget, a residual token counted.

    A text without any word: all tokens are equally relevant, so that the first M stay.

    Source: the project's founding notes (query-aware selection; the compression network they leave undefined is ours).
    """

    Params = QueryAwareParams
    params: QueryAwareParams

    def __init__(self, params: Any, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        super().__init__(params, site, budget, output)
        if params.residual and (params.form == "latents" or budget.tokens_out < 2):
            raise InvalidSpec(
                "params.residual adds a token to those selected: it needs form=select and a budget of at least 2"
            )
        if params.form != "latents":
            return
        width = site.embed_dim
        if width % params.num_heads:
            raise InvalidSpec(f"params.num_heads={params.num_heads} does not divide the width {width}")
        self.latents = nn.Parameter(torch.zeros(max(params.latents, budget.tokens_out), width))
        self.norm_latents, self.norm_tokens = nn.LayerNorm(width), nn.LayerNorm(width)
        self.guide = nn.Linear(width, width)
        self.to_q, self.to_kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    @classmethod
    def for_budgets(cls, params: Any, counts: Any) -> Any:
        """Return the parameters with as many latents as the largest budget; smaller ones take the first."""
        return msgspec.structs.replace(params, latents=max(counts)) if params.form == "latents" else params

    def input_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `tokens`, and `query` or `text` with `text_mask`."""
        width = self.site.embed_dim
        tokens = TensorSpec("tokens", (batch, self.budget.tokens_in, width), "float32", "tokens")
        if self.params.query == "vector":
            return tokens, TensorSpec("query", (batch, width), "float32", "features")
        text = TensorSpec("text", (batch, self.params.words, width), "float32", "features")
        return tokens, text, TensorSpec("text_mask", (batch, self.params.words), "bool", "mask")

    def output_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `kept` and `index`, or `compressed`."""
        if self.params.form == "select":
            return super().output_specs(batch)
        shape = (batch, self.budget.tokens_out, self.site.embed_dim)
        return (TensorSpec("compressed", shape, "float32", "tokens"),)

    def forward(self, tokens: Tensor, query: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the tokens kept and their places, or the latents."""
        relevance = self.relevance(tokens, query, mask)
        if self.params.form == "latents":
            return (self._read(tokens, self.mean_query(query, mask), relevance),)
        index = select(relevance, self.budget.tokens_out - self.params.residual, order=self.params.order)
        kept = take(tokens, index)
        if self.params.residual:
            kept = torch.cat([kept, residual_token(tokens, relevance.softmax(-1), index)], 1)
            index = torch.cat([index, torch.full_like(index[:, :1], -1)], 1)
        return kept, index.to(torch.int32)

    def relevance(self, tokens: Tensor, query: Tensor, mask: Tensor | None) -> Tensor:
        """Return the relevance of each token: (B, N)."""
        words = query.unsqueeze(1) if mask is None else query  # (B, T, D)
        if self.params.relevance == "cosine":
            tokens, words = unit_rows(tokens), unit_rows(words)
        scores = words @ tokens.transpose(1, 2)  # (B, T, N)
        if self.params.relevance == "attention":
            scores = (scores * tokens.shape[-1] ** -0.5).softmax(-1)
        if mask is None:
            return scores[:, 0]
        given = mask.unsqueeze(-1)
        some = given.any(1)
        if self.params.join == "max":
            return torch.where(some, torch.where(given, scores, _MASKED).amax(1), 0.0)
        return torch.where(given, scores, 0.0).sum(1) / given.sum(1).clamp(min=1)

    def mean_query(self, query: Tensor, mask: Tensor | None) -> Tensor:
        """Return one vector of the query: (B, D); of a text, the mean of its words."""
        if mask is None:
            return query
        given = mask.unsqueeze(-1)
        return torch.where(given, query, 0.0).sum(1) / given.sum(1).clamp(min=1)

    def _read(self, tokens: Tensor, query: Tensor, relevance: Tensor) -> Tensor:
        latents = self.latents[: self.budget.tokens_out] + self.guide(query).unsqueeze(1)  # (B, M, D)
        heads, context = self.params.num_heads, self.norm_tokens(tokens)

        def split(x: Tensor) -> Tensor:
            return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)

        queries = split(self.to_q(self.norm_latents(latents)))
        keys, values = (split(part) for part in self.to_kv(context).chunk(2, dim=-1))
        scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
        scores = scores + relevance.log_softmax(-1)[:, None, None, :]
        read = scores.softmax(-1) @ values
        out: Tensor = self.norm(latents + self.proj(read.transpose(1, 2).flatten(2)))
        return out

    def reference(self) -> nn.Module:
        """Return plain loops over samples, words and heads."""
        return QueryAwareOriginal(self)


class QueryAwareOriginal(nn.Module):
    """The eager reference, one sample at a time."""

    def __init__(self, static: QueryAware) -> None:
        super().__init__()
        self.static = static

    def forward(self, tokens: Tensor, query: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return what the static module returns."""
        samples = []
        for place, x in enumerate(tokens):
            words = query[place][None] if mask is None else query[place][mask[place]]
            samples.append(self._sample(x, words))
        return tuple(torch.stack(part) for part in zip(*samples, strict=True))

    def _sample(self, x: Tensor, words: Tensor) -> tuple[Tensor, ...]:
        static, params = self.static, self.static.params
        relevance = self._relevance(x, words)
        if params.form == "latents":
            query = words.mean(0) if len(words) else x.new_zeros(x.shape[1])
            return (self._read(x, query, relevance),)
        count = static.budget.tokens_out - (1 if params.residual else 0)
        index = torch.argsort(relevance, descending=True, stable=True)[:count]
        if params.order == "raster":
            index = index.sort().values
        kept = x[index]
        if params.residual:
            shares = torch.exp(relevance - relevance.max())
            shares = shares / shares.sum()
            shares[index] = 0.0
            kept, index = torch.cat([kept, (shares @ x)[None]]), torch.cat([index, torch.tensor([-1])])
        return kept, index.to(torch.int32)

    def _relevance(self, x: Tensor, words: Tensor) -> Tensor:
        rows = []
        for word in words:
            row = x @ word
            if self.static.params.relevance == "cosine":
                length = x.norm(dim=1) * word.norm()
                row = torch.where(length > 0, row / length, torch.zeros_like(row))
            elif self.static.params.relevance == "attention":
                row = torch.softmax(row / x.shape[1] ** 0.5, dim=0)
            rows.append(row)
        if not rows:
            return x.new_zeros(len(x))
        stacked = torch.stack(rows)
        return stacked.max(0).values if self.static.params.join == "max" else stacked.mean(0)

    def _read(self, x: Tensor, query: Tensor, relevance: Tensor) -> Tensor:
        static: Any = self.static
        latents = static.latents[: static.budget.tokens_out] + static.guide(query)
        queries = static.to_q(static.norm_latents(latents)).chunk(static.params.num_heads, dim=1)
        keys, values = static.to_kv(static.norm_tokens(x)).chunk(2, dim=1)
        read = []
        for q, k, v in zip(queries, keys.chunk(len(queries), dim=1), values.chunk(len(queries), dim=1), strict=True):
            scores = q @ k.T / q.shape[1] ** 0.5 + torch.log(torch.softmax(relevance, dim=0))
            read.append(torch.softmax(scores, dim=1) @ v)
        return static.norm(latents + static.proj(torch.cat(read, dim=1)))  # type: ignore[no-any-return]
