"""Learned queries through decoder layers: they attend to each other, then to the tokens.

The `CompressionModule` of the project's founding notes, repaired: batch first, so that tokens and not samples attend to
each other; pre-norm, with a norm at the end. It is no resampler of Qwen-VL, MiniCPM-V or LLaVA-UHD, which the notes
name as its users: those are `resampler-2d` and `llava-uhd`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgecomp.compressors._attention import MultiHeadAttention
from edgecomp.compressors._base import Compressor, Natural, Params, Positive
from edgecomp.compressors._checkpoint import count_numbered, load_exactly, rename_key
from edgecomp.errors import InvalidSpec, WeightsError
from edgecomp.specs import Output, Site, TensorSpec, TokenBudget

__all__ = ["QueryDecoder"]


class QueryDecoderParams(Params, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of the query decoder.

    Attributes:
        tokens: tokens where no host says how many.
        context_dim: width of the incoming tokens; a host decides it.
        embed_dim: width of the layers; 0: as wide as the tokens. Tokens of another width are projected.
        depth, num_heads, hidden_dim: of the layers; `hidden_dim` is the MLP's, 0: four times the width.
        latents: rows of the query table; a budget takes the first M. 0: the largest budget.
    """

    tokens: Positive = 576
    context_dim: Positive = 1024
    embed_dim: Natural = 0
    depth: Positive = 2
    num_heads: Positive = 16
    hidden_dim: Natural = 0
    latents: Natural = 0

    @property
    def width(self) -> int:
        """Width of the layers."""
        return self.embed_dim or self.context_dim


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention and an MLP, each behind a norm and with its residual sum."""

    def __init__(self, params: QueryDecoderParams) -> None:
        super().__init__()
        width, hidden = params.width, params.hidden_dim or 4 * params.width
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn, self.cross = (MultiHeadAttention(width, params.num_heads) for _ in range(2))
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """Update the queries: (B or 1, M, D), tokens (B, N, D) -> (B, M, D)."""
        x = self.norm1(queries)
        queries = queries + self.attn(x, x, x)
        queries = queries + self.cross(self.norm2(queries), tokens, tokens)
        return queries + self.fc2(F.gelu(self.fc1(self.norm3(queries))))  # type: ignore[no-any-return]


class QueryDecoder(Compressor):
    """Replace N tokens by M learned queries that have read them.

    Shapes: tokens (B, N, C) -> latents (B, M, D).

    Static rewrite: nothing in the original depends on data; queries stay one row of the batch until they read the
    tokens, so that the first self-attention folds to a constant. Level E4: the reference is torch's own
    `TransformerDecoder`, pre-norm and batch first, with these weights.

    Source: the project's founding notes, `CompressionModule`, repaired.
    """

    Params = QueryDecoderParams
    width_param = "context_dim"
    unstored_params = ("num_heads",)

    def __init__(self, params: QueryDecoderParams, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        super().__init__(params, site, budget, output)
        if params.width % params.num_heads:
            raise InvalidSpec(
                f"query-decoder: params.num_heads={params.num_heads} does not divide width {params.width}"
            )
        if budget.tokens_out > params.latents:
            raise InvalidSpec(
                f"query-decoder: budget {budget.tokens_out} is above the {params.latents} queries of the table; lower "
                "the budget, or raise params.latents where no checkpoint fixes it"
            )
        self.queries = nn.Parameter(torch.zeros(params.latents, params.width))
        if params.context_dim != params.width:
            self.project = nn.Linear(params.context_dim, params.width)
        self.layers = nn.ModuleList(DecoderLayer(params) for _ in range(params.depth))
        self.norm = nn.LayerNorm(params.width)

    def input_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `tokens`."""
        shape = (batch, self.site.tokens_in, self.params.context_dim)
        return (TensorSpec("tokens", shape, "float32", "tokens"),)

    def output_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `latents`."""
        shape = (batch, self.budget.tokens_out, self.params.width)
        return (TensorSpec("latents", shape, "float32", "tokens"),)

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Return the queries behind the last layer and norm."""
        if self.params.context_dim != self.params.width:
            tokens = self.project(tokens)
        queries = self.queries[: self.budget.tokens_out].unsqueeze(0)
        for layer in self.layers:
            queries = layer(queries, tokens)
        return (self.norm(queries),)

    def reference(self) -> nn.Module:
        """Return torch's decoder on this module's parameters."""
        return QueryDecoderOriginal(self)

    @classmethod
    def for_budgets(cls, params: QueryDecoderParams, counts: Sequence[int]) -> QueryDecoderParams:
        """Size the query table by the largest budget where nothing else did."""
        return params if params.latents else msgspec.structs.replace(params, latents=max(counts))

    @classmethod
    def layout_of(cls, state: Mapping[str, Tensor]) -> str:
        """Return `torch` for queries beside a `TransformerDecoder`."""
        return "" if "layers.0.attn.to_q.weight" in state else _to_own_keys(state)[0]

    @classmethod
    def infer_params(cls, state: Mapping[str, Tensor], params: QueryDecoderParams) -> dict[str, Any]:  # noqa: ARG003
        """Return sizes and counts of a checkpoint."""
        _, own, _ = _to_own_keys(state)
        latents, width = own["queries"].shape
        context = own["project.weight"].shape[1] if "project.weight" in own else width
        found = {"latents": latents, "embed_dim": width, "context_dim": context}
        found["hidden_dim"] = own["layers.0.fc1.weight"].shape[0]
        return {**found, "depth": count_numbered(own, "layers")}

    def load_original(self, state: Mapping[str, Tensor], *, unread: Sequence[str] = ()) -> str:
        """Load queries and a torch `TransformerDecoder` with its final norm, or edgecomp's own layout."""
        layout, own, file_keys = _to_own_keys(state)
        load_exactly(self, own, layout=layout or "edgecomp", unread=unread, file_keys=file_keys)
        return layout or "edgecomp"


_KEYS = (
    (r"^decoder\.", ""),
    (r"\.self_attn\.out_proj\.", ".attn.to_out."),
    (r"\.multihead_attn\.out_proj\.", ".cross.to_out."),
    (r"\.self_attn\.", ".attn."),
    (r"\.multihead_attn\.", ".cross."),
    (r"\.linear([12])\.", r".fc\1."),
)


def _to_own_keys(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor], dict[str, str] | None]:
    """Rename the keys of torch's decoder to this module's, and split its packed projections."""
    if "layers.0.attn.to_q.weight" in state:
        return "", dict(state), None
    if "queries" not in state or not any(key.endswith("layers.0.multihead_attn.in_proj_weight") for key in state):
        raise WeightsError(
            "weights hold no `queries` beside a torch TransformerDecoder (layers.0.multihead_attn.in_proj_weight); "
            f"first keys: {', '.join(list(state)[:5])}. Give such a checkpoint, or one of edgecomp's own"
        )
    own: dict[str, Tensor] = {}
    file_keys: dict[str, str] = {}
    for key, tensor in state.items():
        name = rename_key(key, _KEYS)
        block, packed, kind = name.rpartition("in_proj_")
        if not packed:
            own[name], file_keys[name] = tensor, key
            continue
        for part, third in zip("qkv", tensor.chunk(3), strict=True):
            own[f"{block}to_{part}.{kind}"], file_keys[f"{block}to_{part}.{kind}"] = third, key
    return "torch", own, file_keys


class QueryDecoderOriginal(nn.Module):
    """Torch's `TransformerDecoderLayer`, pre-norm and batch first, on the parameters of a `QueryDecoder`."""

    def __init__(self, static: QueryDecoder) -> None:
        super().__init__()
        self.static = static

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Return what the static module returns."""
        static, params = self.static, self.static.params
        if params.context_dim != params.width:
            tokens = F.linear(tokens, static.project.weight, static.project.bias)
        x = static.queries[: static.budget.tokens_out].repeat(len(tokens), 1, 1)
        for layer in static.layers:
            names = {"d_model": params.width, "nhead": params.num_heads, "dim_feedforward": layer.fc1.out_features}  # type: ignore[union-attr]
            decoder = nn.TransformerDecoderLayer(
                **names, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, device="meta"
            )
            x = torch.func.functional_call(decoder, _torch_state(layer), (x, tokens))
        return (F.layer_norm(x, (params.width,), static.norm.weight, static.norm.bias),)


def _torch_state(layer: Any) -> dict[str, Tensor]:
    """Return a layer's parameters as torch's layer names them."""
    state: dict[str, Tensor] = {}
    for name, attn in (("self_attn", layer.attn), ("multihead_attn", layer.cross)):
        for kind in ("weight", "bias"):
            state[f"{name}.in_proj_{kind}"] = torch.cat([getattr(p, kind) for p in (attn.to_q, attn.to_k, attn.to_v)])
            state[f"{name}.out_proj.{kind}"] = getattr(attn.to_out, kind)
    for name, module in (("linear1", layer.fc1), ("linear2", layer.fc2), ("norm1", layer.norm1), ("norm2", layer.norm2),
                         ("norm3", layer.norm3)):  # fmt: skip
        state |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
    return state
