"""D-Abstractor: queries sample the token grid at learned points by deformable attention, in several layers.

Paper: "Honeybee: Locality-enhanced Projector for Multimodal LLM" (arXiv:2312.06742), section 4.2, with the attention of
"Deformable DETR" (arXiv:2010.04159), equation 2. The released code is khanrc/honeybee, honeybee/projectors/dabs.py, on
the decoder layers of transformers' Deformable DETR.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgecomp.compressors._attention import merge_heads, split_heads
from edgecomp.compressors._base import Compressor, Natural, Params, Positive, constant
from edgecomp.compressors._checkpoint import count_numbered, load_exactly, part_with
from edgecomp.compressors._eager import norm_rows
from edgecomp.compressors._grid import adaptive_line, grid_sides, resample_grid, squares_up_to
from edgecomp.compressors._keys import COLUMNS, KeyMap, leading_axis
from edgecomp.errors import InvalidSpec, WeightsError
from edgecomp.specs import Output, Site, TensorSpec, TokenBudget

__all__ = ["DAbstractor"]


class DAbstractorParams(Params, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of D-Abstractor.

    Attributes:
        tokens: tokens handed over where no host says how many.
        embed_dim: width of the tokens; a host decides it.
        hidden_dim: width of the decoder.
        output_dim: width of what comes out: a language model's.
        depth, num_heads, mlp_dim: of the decoder.
        points: samples that each head takes for a query.
        queries: rows of the tables of queries and of reference points, a square; 0: the largest budget. A smaller
            budget pools both tables.
        start: what the decoder begins with: `query` = the learned queries, placed by the pooled tokens (the published
            form); `tokens` = the pooled tokens, placed by the learned queries; `tables` = both learned.
        eos_tokens: learned tokens behind the others, of the decoder's width; a budget counts them.
        positions: a learned table over the tokens, added to them.
    """

    tokens: Positive = 576
    embed_dim: Positive = 1024
    hidden_dim: Positive = 1024
    output_dim: Positive = 4096
    depth: Positive = 6
    num_heads: Positive = 8
    mlp_dim: Positive = 1024
    points: Positive = 4
    queries: Natural = 0
    start: Literal["query", "tokens", "tables"] = "query"
    eos_tokens: Natural = 0
    positions: bool = True


class DeformableAttention(nn.Module):
    """Each query reads `points` places of the grid in each head: (B, M, D), (B, N, D) -> (B, M, D)."""

    def __init__(self, width: int, heads: int, points: int) -> None:
        super().__init__()
        self.heads, self.points = heads, points
        self.offsets, self.shares = nn.Linear(width, heads * points * 2), nn.Linear(width, heads * points)
        self.to_v, self.to_out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, queries: Tensor, tokens: Tensor, corners: tuple[Tensor, Tensor]) -> Tensor:
        """Return what the queries read.

        Args:
            queries: (B, M, D), with their positions.
            tokens: (B, N, D) in raster order.
            corners: from a reference point to each column and each row: (M, w), (M, h), in cells.
        """
        batch, count, _ = queries.shape
        shape = (batch, count, self.heads, self.points)
        offsets = self.offsets(queries).reshape(*shape, 2).transpose(1, 2)  # (B, H, M, P, 2), in cells: x, y
        shares = self.shares(queries).reshape(shape).transpose(1, 2).softmax(-1)  # (B, H, M, P)
        across, down = (
            F.relu(1.0 - (offsets[..., axis : axis + 1] - apart[:, None]).abs()) for axis, apart in enumerate(corners)
        )  # (B, H, M, P, w), (B, H, M, P, h): bilinear weights, zero for what lies outside
        weights = (down * shares.unsqueeze(-1)).transpose(-1, -2) @ across  # (B, H, M, h, w)
        read = weights.flatten(-2) @ split_heads(self.to_v(tokens), self.heads)
        return self.to_out(merge_heads(read))  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    """Attention among the queries; their positions are added to queries and keys. (B, M, D) -> (B, M, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """Return the update of x."""
        placed = x + places
        q = split_heads(self.to_q(placed) * self.scale, self.heads)
        weights = (q @ split_heads(self.to_k(placed), self.heads).transpose(-1, -2)).softmax(-1)
        return self.to_out(merge_heads(weights @ split_heads(self.to_v(x), self.heads)))  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """Self-attention, deformable attention and an MLP, each with the norm behind its sum."""

    def __init__(self, params: DAbstractorParams) -> None:
        super().__init__()
        width = params.hidden_dim
        self.self_attn, self.self_norm = SelfAttention(width, params.num_heads), nn.LayerNorm(width)
        self.cross_attn = DeformableAttention(width, params.num_heads, params.points)
        self.cross_norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, params.mlp_dim), nn.Linear(params.mlp_dim, width)
        self.mlp_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, places: Tensor, tokens: Tensor, corners: tuple[Tensor, Tensor]) -> Tensor:
        """Update the queries x (B, M, D)."""
        x = self.self_norm(x + self.self_attn(x, places))
        x = self.cross_norm(x + self.cross_attn(x + places, tokens, corners))
        return self.mlp_norm(x + self.fc2(F.relu(self.fc1(x))))  # type: ignore[no-any-return]


class DAbstractor(Compressor):
    """Let a grid of queries sample the token grid at points that they choose around learned references.

    Shapes: tokens (B, N, C) on a square grid -> abstracted (B, M, O), M a square, and `eos_tokens` behind.

    Static rewrite (level E4: our own eager reference, since the original runs on a transformers of 2023; the layers
    equal those of today's). Sampling at a computed point is a product with a computed row of bilinear weights: over
    columns and rows at constant places, max(0, 1 - distance), zero outside, and the points of a head add up in one
    product of (h, P) with (P, w). It needs neither GridSample, which TensorRT 10.3 misreads in opset 20, nor gathers by
    computed indices. Distances are taken from each reference point, so that they are small where they count.

    Source: arXiv:2312.06742, section 4.2; khanrc/honeybee, honeybee/projectors/dabs.py.
    """

    Params = DAbstractorParams
    reads_grid = True
    budget_hint = ", a square and the eos_tokens behind it"
    unstored_params = ("num_heads", "start")
    pool: Tensor
    shrink: Tensor
    cells: Tensor

    def __init__(self, params: DAbstractorParams, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        super().__init__(params, site, budget, output)
        width, queries = params.hidden_dim, params.queries
        if width % params.num_heads:
            raise InvalidSpec(f"d-abstractor: hidden_dim={width} is not a multiple of num_heads={params.num_heads}")
        self.side, _ = grid_sides(budget.tokens_in, 0, method="d-abstractor", what="tokens in")
        self.count = budget.tokens_out - params.eos_tokens
        target, rows = math.isqrt(max(0, self.count)), math.isqrt(queries)
        if target < 1 or target**2 != self.count or rows**2 != queries or target > rows:
            possible = [square + params.eos_tokens for square in squares_up_to(queries or self.count)]
            raise InvalidSpec(
                f"d-abstractor: budget {budget.tokens_out} cannot be had from a table of {queries} queries on a square "
                f"grid, with {params.eos_tokens} eos_tokens; budgets that can: "
                f"{', '.join(map(str, possible)) or 'none'}"
            )
        buffers = {"pool": adaptive_line(self.side, target), "shrink": adaptive_line(rows, target)}
        buffers["cells"] = torch.arange(self.side, dtype=torch.float64) + 0.5
        for name, values in buffers.items():
            self.register_buffer(name, constant(values), persistent=False)
        if params.embed_dim != width:
            self.input_proj = nn.Linear(params.embed_dim, width)
        if params.positions:
            self.positions = nn.Parameter(torch.zeros(budget.tokens_in, width))
        self.query_table = nn.Parameter(torch.zeros(queries, width))
        if params.start == "tables":
            self.place_table = nn.Parameter(torch.zeros(queries, width))
        self.references = nn.Parameter(_even_references(rows, self.side))
        self.layers = nn.ModuleList(DecoderLayer(params) for _ in range(params.depth))
        if params.eos_tokens:
            self.eos = nn.Parameter(torch.zeros(params.eos_tokens, width))
        if params.output_dim != width:
            self.output_proj = nn.Linear(width, params.output_dim)

    def input_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `tokens`."""
        return (TensorSpec("tokens", (batch, self.budget.tokens_in, self.params.embed_dim), "float32", "tokens"),)

    def output_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `abstracted`."""
        shape = (batch, self.budget.tokens_out, self.params.output_dim)
        return (TensorSpec("abstracted", shape, "float32", "tokens"),)

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Return the queries after the last layer, mapped, and the tokens of the end behind them."""
        batch, params = tokens.shape[0], self.params
        tokens = self.input_proj(tokens) if hasattr(self, "input_proj") else tokens
        if params.positions:
            tokens = tokens + self.positions
        table = self._shrunk(self.query_table).expand(batch, -1, -1)
        pooled = resample_grid(tokens, self.pool, self.pool)
        x, places = (pooled, table) if params.start == "tokens" else (table, pooled)
        if params.start == "tables":
            places = self._shrunk(self.place_table).expand(batch, -1, -1)
        references = self._shrunk(self.references)[0] * self.side  # (M, 2), in cells
        apart = self.cells - references.unsqueeze(-1)  # (M, 2, w): from the reference point to each column, each row
        corners = (apart[:, 0], apart[:, 1])
        for layer in self.layers:
            x = layer(x, places, tokens, corners)
        if params.eos_tokens:
            x = torch.cat([x, self.eos.expand(batch, -1, -1)], dim=1)
        return (self.output_proj(x) if hasattr(self, "output_proj") else x,)

    def _shrunk(self, table: Tensor) -> Tensor:
        """Return a table (Q, D) for this budget's queries, (1, M, D): pooled where they are fewer."""
        if self.count == self.params.queries:
            return table.unsqueeze(0)
        return resample_grid(table.unsqueeze(0), self.shrink, self.shrink)

    def reference(self) -> nn.Module:
        """Return the original's forward pass on this module's parameters."""
        return DAbstractorOriginal(self)

    @classmethod
    def possible_counts(cls, params: DAbstractorParams, site: Site) -> tuple[int, ...]:
        """Return the sizes of square grids of queries, with the tokens behind them."""
        most = max(0, site.tokens_in - params.eos_tokens)
        most = min(most, params.queries) if params.queries else most
        return tuple(count + params.eos_tokens for count in squares_up_to(most))

    @classmethod
    def default_counts(cls, params: DAbstractorParams, site: Site) -> tuple[int, ...]:  # noqa: ARG003
        """Return all queries of the table where there is one."""
        return (params.queries + params.eos_tokens,) if params.queries else ()

    @classmethod
    def for_budgets(cls, params: DAbstractorParams, counts: Sequence[int]) -> DAbstractorParams:
        """Size the tables by the largest budget where nothing else did."""
        if params.queries:
            return params
        return msgspec.structs.replace(params, queries=max(1, max(counts) - params.eos_tokens))

    @property
    def remarks(self) -> tuple[str, ...]:
        """Say where tables are pooled."""
        if self.count == self.params.queries:
            return ()
        return (f"the tables of {self.params.queries} queries and reference points are pooled to {self.count}",)

    @classmethod
    def layout_of(cls, state: Mapping[str, Tensor]) -> str:
        """Return `honeybee-d` for the released code's keys."""
        return "honeybee-d" if part_with(state, _ANCHOR) else ""

    @classmethod
    def infer_params(cls, state: Mapping[str, Tensor], params: DAbstractorParams) -> dict[str, Any]:
        """Return widths, depths and tables of a checkpoint; heads come from the parameters."""
        own, _ = _to_own_keys(state)
        sizes = {name: tuple(tensor.shape) for name, tensor in own.items()}
        queries, width = sizes["query_table"]
        found: dict[str, Any] = {"queries": queries, "hidden_dim": width, "positions": "positions" in sizes}
        found["depth"] = count_numbered(sizes, "layers")
        found["mlp_dim"] = sizes["layers.0.fc1.weight"][0]
        rows = sizes["layers.0.cross_attn.shares.weight"][0]
        if rows % params.num_heads:
            raise WeightsError(
                f"layers.0.encoder_attn.attention_weights has {rows} outputs, not a multiple of "
                f"{params.num_heads} heads; a checkpoint does not store how many, give --set params.num_heads=N"
            )
        found["points"] = rows // params.num_heads
        found["embed_dim"] = sizes.get("input_proj.weight", (0, width))[1]
        found["output_dim"] = sizes.get("output_proj.weight", (width,))[0]
        found["eos_tokens"] = sizes.get("eos", (0,))[0]
        if "positions" in sizes:
            found["tokens"] = sizes["positions"][0]
        if "place_table" in sizes:
            found["start"] = "tables"
        return found

    def load_original(self, state: Mapping[str, Tensor], *, unread: Sequence[str] = ()) -> str:
        """Load a checkpoint of Honeybee, whole model or abstractor alone, or edgecomp's own."""
        layout = self.layout_of(state) or "edgecomp"
        own, file_keys = _to_own_keys(state)
        load_exactly(self, own, layout=layout, unread=unread, file_keys=file_keys)
        return layout

    @property
    def key_maps(self) -> Mapping[str, KeyMap]:
        """Honeybee's names; two tables of queries are one in the file."""
        return {"honeybee-d": _HONEYBEE_TABLES if self.params.start == "tables" else _HONEYBEE}


def _even_references(rows: int, side: int) -> Tensor:
    """Return the start of the reference points, (rows^2, 2) as (x, y) in [0, 1]: from the first cell to the last."""
    line = torch.linspace(0.5, side - 0.5, rows, dtype=torch.float64) / side
    y, x = torch.meshgrid(line, line, indexing="ij")
    return constant(torch.stack([x.flatten(), y.flatten()], dim=-1))


_ANCHOR = "layers.0.encoder_attn.sampling_offsets.weight"
_VALUES = "layers.0.encoder_attn.value_proj.weight"
_QUERIES = "query_position_embeddings.weight"
_COMMON = KeyMap(
    ("v_pos_emb", "positions", leading_axis(3)),
    ("eos_tokens", "eos", leading_axis(3)),
    ("reference_points", "references", leading_axis(3)),
    ("input_proj.0.**", "input_proj.**"),
    ("output_proj.**", "output_proj.**"),
    ("layers.*.self_attn.{q,k,v}_proj.**", "layers.*.self_attn.to_{q,k,v}.**"),
    ("layers.*.self_attn.out_proj.**", "layers.*.self_attn.to_out.**"),
    ("layers.*.self_attn.o_proj.**", "layers.*.self_attn.to_out.**"),  # of newer transformers
    ("layers.*.self_attn_layer_norm.**", "layers.*.self_norm.**"),
    ("layers.*.encoder_attn.sampling_offsets.**", "layers.*.cross_attn.offsets.**"),
    ("layers.*.encoder_attn.attention_weights.**", "layers.*.cross_attn.shares.**"),
    ("layers.*.encoder_attn.value_proj.**", "layers.*.cross_attn.to_v.**"),
    ("layers.*.encoder_attn.output_proj.**", "layers.*.cross_attn.to_out.**"),
    ("layers.*.encoder_attn_layer_norm.**", "layers.*.cross_norm.**"),
    ("layers.*.{fc1,fc2}.**", "layers.*.{fc1,fc2}.**"),
    ("layers.*.mlp.{fc1,fc2}.**", "layers.*.{fc1,fc2}.**"),  # of newer transformers
    ("layers.*.final_layer_norm.**", "layers.*.mlp_norm.**"),
)
_HONEYBEE = KeyMap(_COMMON, (_QUERIES, "query_table"))
_HONEYBEE_TABLES = KeyMap(_COMMON, (_QUERIES, ("place_table", "query_table"), COLUMNS))


def _to_own_keys(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """Return the tensors under this module's keys, and what the file calls each of these."""
    part = part_with(state, _ANCHOR)
    if not part:
        if "query_table" in state:
            return dict(state), None
        raise WeightsError(
            f"weights are in neither layout of d-abstractor, honeybee-d or edgecomp; first keys: "
            f"{', '.join(list(state)[:5])}. Give a checkpoint whose keys hold {_ANCHOR}"
        )
    table, values = (state[part[key]] if key in part else None for key in (_QUERIES, _VALUES))
    has_places = table is not None and values is not None and table.shape[1:] == (2 * len(values),)
    return (_HONEYBEE_TABLES if has_places else _HONEYBEE).read(state, part)


class DAbstractorOriginal(nn.Module):
    """The eager original on the parameters of a `DAbstractor`: `grid_sample` on each head's plane of values."""

    def __init__(self, static: DAbstractor) -> None:
        super().__init__()
        self.static = static

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Return what the static module returns."""
        static, params, batch = self.static, self.static.params, len(tokens)
        if params.embed_dim != params.hidden_dim:
            tokens = F.linear(tokens, static.input_proj.weight, static.input_proj.bias)
        if params.positions:
            tokens = tokens + static.positions
        target = (math.isqrt(static.count),) * 2
        planes = tokens.transpose(1, 2).reshape(batch, -1, static.side, static.side)
        pooled = F.adaptive_avg_pool2d(planes, target).flatten(2).transpose(1, 2)
        table = torch.stack([self._table(static.query_table)] * batch)
        x, places = (pooled, table) if params.start == "tokens" else (table, pooled)
        if params.start == "tables":
            places = torch.stack([self._table(static.place_table)] * batch)
        references = self._table(static.references)
        for layer in static.layers:
            x = self._layer(layer, x, places, tokens, references)
        if params.eos_tokens:
            x = torch.cat([x, torch.stack([static.eos] * batch)], dim=1)
        if params.output_dim != params.hidden_dim:
            x = F.linear(x, static.output_proj.weight, static.output_proj.bias)
        return (x,)

    def _table(self, table: Tensor) -> Tensor:
        side, target = math.isqrt(len(table)), math.isqrt(self.static.count)
        planes = table.T.reshape(1, -1, side, side)
        return F.adaptive_avg_pool2d(planes, (target, target)).flatten(2)[0].T

    def _layer(self, layer: Any, x: Tensor, places: Tensor, tokens: Tensor, references: Tensor) -> Tensor:
        attention, heads = layer.self_attn, self.static.params.num_heads
        q, k, v = (
            F.linear(source, part.weight, part.bias).unflatten(-1, (heads, -1)).transpose(1, 2)  # type: ignore[no-untyped-call]
            for source, part in ((x + places, attention.to_q), (x + places, attention.to_k), (x, attention.to_v))
        )
        read = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = norm_rows(layer.self_norm, x + F.linear(read, attention.to_out.weight, attention.to_out.bias))
        x = norm_rows(layer.cross_norm, x + self._sample(layer.cross_attn, x + places, tokens, references))
        hidden = F.linear(x, layer.fc1.weight, layer.fc1.bias).clamp(min=0)
        return norm_rows(layer.mlp_norm, x + F.linear(hidden, layer.fc2.weight, layer.fc2.bias))

    def _sample(self, attention: Any, queries: Tensor, tokens: Tensor, references: Tensor) -> Tensor:
        side, heads, points = self.static.side, attention.heads, attention.points
        batch, count, width = queries.shape
        values = F.linear(tokens, attention.to_v.weight, attention.to_v.bias)
        planes = values.transpose(1, 2).reshape(batch * heads, width // heads, side, side)
        offsets = F.linear(queries, attention.offsets.weight, attention.offsets.bias)
        offsets = offsets.reshape(batch, count, heads, points, 2)
        places = references[None, :, None, None] + offsets / side  # (B, M, H, P, 2) in [0, 1]
        grid = (2 * places - 1).transpose(1, 2).flatten(0, 1)
        seen = F.grid_sample(planes, grid, mode="bilinear", padding_mode="zeros", align_corners=False)  # (B H, d, M, P)
        shares = F.linear(queries, attention.shares.weight, attention.shares.bias)
        shares = shares.reshape(batch, count, heads, points).softmax(dim=-1).transpose(1, 2).flatten(0, 1)
        read = (seen * shares.unsqueeze(1)).sum(-1).reshape(batch, width, count).transpose(1, 2)
        return F.linear(read, attention.to_out.weight, attention.to_out.bias)
