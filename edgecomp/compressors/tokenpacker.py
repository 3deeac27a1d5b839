"""TokenPacker: each token of a coarse grid attends to the tokens of several encoder layers in its own square.

Paper: "TokenPacker: Efficient Visual Projector for Multimodal LLM" (arXiv:2407.02392), section 3. The released code is
CircleRadon/TokenPacker, at the commit in `export/recipes/tokenpacker.toml`; it has no licence, and this is written from
the paper's formulas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from msgspec import Meta
from torch import Tensor, nn

from edgecomp.compressors._attention import merge_heads, split_heads
from edgecomp.compressors._base import Compressor, HostFeature, Natural, Params, Positive, constant
from edgecomp.compressors._checkpoint import load_exactly, part_with
from edgecomp.compressors._eager import gelu, norm_rows
from edgecomp.compressors._grid import bilinear_line, gather_groups, grid_sides, resample_grid
from edgecomp.compressors._keys import KeyMap
from edgecomp.errors import InvalidSpec, WeightsError
from edgecomp.specs import Output, Site, TensorSpec, TokenBudget

__all__ = ["TokenPacker"]

_EPS = 1e-6


class TokenPackerParams(Params, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of TokenPacker.

    Attributes:
        tokens: tokens handed over where no host says how many.
        embed_dim: width of the tokens that the coarse grid is made of; a host decides it.
        levels: layers of the host whose tokens are joined along the width, counted from the end.
        level_dim: width of the joined levels; 0: as many times `embed_dim` as there are levels.
        hidden_dim, num_heads: of the attention.
        output_dim: width of what comes out: a language model's.
    """

    tokens: Positive = 576
    embed_dim: Positive = 1024
    levels: Annotated[tuple[Annotated[int, Meta(le=-1)], ...], Meta(min_length=1)] = (-13, -9, -3, -2)
    level_dim: Natural = 0
    hidden_dim: Positive = 1024
    num_heads: Positive = 8
    output_dim: Positive = 4096

    @property
    def joined(self) -> int:
        """Width of the joined levels."""
        return self.level_dim or len(self.levels) * self.embed_dim


class TokenPacker(Compressor):
    """Make a coarse grid by a bilinear resize, and let each of its tokens read the square that it stands for.

    Shapes: tokens (B, N, C) and levels (B, N, K) on a square grid -> packed (B, N / s^2, O) in raster order, for each s
    that divides the grid's side. Weights depend neither on the grid nor on s. With a host, `levels` are its hidden
    states after the blocks that the parameter of that name counts.

    Static rewrite: nothing in the original depends on data (level E0). The resize is a constant matrix, applied in its
    two factors; the tokens of a square come together by one reshape and transpose, after the projections of keys and
    values; squares are rows of the batch of the attention.

    Source: arXiv:2407.02392, section 3.2; CircleRadon/TokenPacker, llava/model/multimodal_projector/builder.py.
    """

    Params = TokenPackerParams
    reads_grid = True
    unstored_params = ("num_heads", "levels")
    resize: Tensor

    def __init__(self, params: TokenPackerParams, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        super().__init__(params, site, budget, output)
        possible = self.possible_counts(params, site)
        if budget.tokens_out not in possible:
            raise InvalidSpec(
                f"tokenpacker: budget {budget.tokens_out} does not cut the grid of {budget.tokens_in} tokens into "
                f"equal squares; budgets that do: {', '.join(map(str, possible))}"
            )
        width = params.hidden_dim
        if width % params.num_heads:
            raise InvalidSpec(f"tokenpacker: hidden_dim={width} is not a multiple of num_heads={params.num_heads}")
        self.side, coarse = math.isqrt(budget.tokens_in), math.isqrt(budget.tokens_out)
        self.factor = self.side // coarse
        self.register_buffer("resize", constant(bilinear_line(self.side, coarse)), persistent=False)  # (q, h)
        self.q_proj = nn.Linear(params.embed_dim, width, bias=False)
        self.k_fc1, self.k_fc2 = nn.Linear(params.joined, width), nn.Linear(width, width)
        self.v_fc1, self.v_fc2 = nn.Linear(params.joined, width), nn.Linear(width, width)
        self.q_norm, self.k_norm, self.v_norm = (nn.LayerNorm(width, eps=_EPS) for _ in range(3))
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, params.output_dim)
        self.fc2 = nn.Linear(params.output_dim, params.output_dim)

    @property
    def host_features(self) -> tuple[HostFeature, ...]:
        """The joined levels."""
        return ("levels",)

    @classmethod
    def levels_of(cls, params: TokenPackerParams) -> tuple[int, ...]:
        """Return the host's layers that are joined."""
        return params.levels

    def input_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `tokens` and `levels`."""
        count = self.budget.tokens_in
        return (
            TensorSpec("tokens", (batch, count, self.params.embed_dim), "float32", "tokens"),
            TensorSpec("levels", (batch, count, self.params.joined), "float32", "tokens"),
        )

    def output_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `packed`."""
        shape = (batch, self.budget.tokens_out, self.params.output_dim)
        return (TensorSpec("packed", shape, "float32", "tokens"),)

    def forward(self, tokens: Tensor, levels: Tensor) -> tuple[Tensor, ...]:
        """Return the packed tokens."""
        batch, count, heads = tokens.shape[0], self.budget.tokens_out, self.params.num_heads
        width = self.params.hidden_dim
        coarse = resample_grid(tokens, self.resize, self.resize)
        q = self.to_q(self.q_norm(self.q_proj(coarse))) * (width // heads) ** -0.5
        k = self.to_k(self.k_norm(self.k_fc2(F.gelu(self.k_fc1(levels)))))
        v = self.to_v(self.v_norm(self.v_fc2(F.gelu(self.v_fc1(levels)))))
        q = split_heads(q.reshape(batch * count, 1, width), heads)  # (B M, H, 1, d)
        weights = (q @ self._squares(k).transpose(-1, -2)).softmax(-1)  # (B M, H, 1, s s)
        read = merge_heads(weights @ self._squares(v)).reshape(batch, count, width)
        return (self.fc2(F.gelu(self.fc1(self.to_out(read)))),)

    def _squares(self, x: Tensor) -> Tensor:
        """Return the tokens of each square as a row of the batch: (B, N, D) -> (B M, H, s s, d)."""
        squares = gather_groups(x, self.side, self.side, self.factor)
        return split_heads(squares.flatten(0, 1), self.params.num_heads)

    def reference(self) -> nn.Module:
        """Return the original's forward pass on this module's parameters."""
        return TokenPackerOriginal(self)

    @classmethod
    def possible_counts(cls, params: TokenPackerParams, site: Site) -> tuple[int, ...]:  # noqa: ARG003
        """Return the token counts of the grids that cut the given one into squares."""
        side, _ = grid_sides(site.tokens_in, 0, method="tokenpacker", what="tokens in")
        return tuple(coarse**2 for coarse in range(1, side + 1) if side % coarse == 0)

    @classmethod
    def layout_of(cls, state: Mapping[str, Tensor]) -> str:
        """Return `tokenpacker` for the released code's keys."""
        return "tokenpacker" if part_with(state, _ANCHOR) else ""

    @classmethod
    def infer_params(cls, state: Mapping[str, Tensor], params: TokenPackerParams) -> dict[str, Any]:
        """Return the widths of a checkpoint; heads and layers come from the parameters."""
        own, _ = _to_own_keys(state)
        width, embed_dim = own["q_proj.weight"].shape
        joined = own["k_fc1.weight"].shape[1]
        found: dict[str, Any] = {"hidden_dim": width, "embed_dim": embed_dim, "output_dim": own["fc2.weight"].shape[0]}
        found["level_dim"] = 0 if joined == len(params.levels) * embed_dim else joined
        return found

    def load_original(self, state: Mapping[str, Tensor], *, unread: Sequence[str] = ()) -> str:
        """Load the projector out of a TokenPacker checkpoint, or edgecomp's own layout."""
        layout = self.layout_of(state) or "edgecomp"
        own, file_keys = _to_own_keys(state)
        load_exactly(self, own, layout=layout, unread=unread, file_keys=file_keys)
        return layout

    @property
    def key_maps(self) -> Mapping[str, KeyMap]:
        """The release's names."""
        return {"tokenpacker": _RELEASE}


_ANCHOR = "k_proj_1.0.weight"
_RELEASE = KeyMap(
    ("q_proj_1.**", "q_proj.**"),
    ("{k,v}_proj_1.{0,2}.**", "{k,v}_{fc1,fc2}.**"),
    ("ln_{q,k,v}_1.**", "{q,k,v}_norm.**"),
    ("clip_attn.in_proj_**", ("to_q.**", "to_k.**", "to_v.**")),
    ("clip_attn.out_proj.**", "to_out.**"),
    ("mlp.{0,2}.**", "{fc1,fc2}.**"),
)


def _to_own_keys(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """Return the tensors under this module's keys, and what the file calls each of these."""
    part = part_with(state, _ANCHOR)
    if not part:
        if "k_fc1.weight" in state:
            return dict(state), None
        raise WeightsError(
            f"weights are in neither layout of tokenpacker, that of its release or edgecomp's; first keys: "
            f"{', '.join(list(state)[:5])}. Give a checkpoint whose keys hold {_ANCHOR}"
        )
    return _RELEASE.read(state, part)


class TokenPackerOriginal(nn.Module):
    """The eager original on the parameters of a `TokenPacker`: one square at a time, torch's own attention."""

    def __init__(self, static: TokenPacker) -> None:
        super().__init__()
        self.static = static

    def forward(self, tokens: Tensor, levels: Tensor) -> tuple[Tensor, ...]:
        """Return what the static module returns."""
        static, batch = self.static, len(tokens)
        side, factor = static.side, static.factor
        coarse = side // factor
        planes = tokens.reshape(batch, side, side, -1).permute(0, 3, 1, 2)
        resized = F.interpolate(planes, size=(coarse, coarse), mode="bilinear")
        queries = norm_rows(static.q_norm, F.linear(resized.flatten(2).transpose(1, 2), static.q_proj.weight))
        keys = norm_rows(static.k_norm, self._mlp(static.k_fc1, static.k_fc2, levels)).reshape(batch, side, side, -1)
        values = norm_rows(static.v_norm, self._mlp(static.v_fc1, static.v_fc2, levels)).reshape(batch, side, side, -1)
        read = []
        for index in range(coarse * coarse):
            top, left = index // coarse * factor, index % coarse * factor
            square = (slice(None), slice(top, top + factor), slice(left, left + factor))
            read.append(self._attend(queries[:, index : index + 1], keys[square], values[square]))
        return (self._mlp(static.fc1, static.fc2, torch.cat(read, dim=1)),)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return (B, 1, D) for one query and the keys and values (B, s, s, D) of its square."""
        static = self.static
        parts = (static.to_q, static.to_k, static.to_v)
        query, key, value = (x.transpose(0, 1) for x in (query, keys.flatten(1, 2), values.flatten(1, 2)))
        read, _ = F.multi_head_attention_forward(
            query=query,
            key=key,
            value=value,
            embed_dim_to_check=static.params.hidden_dim,
            num_heads=static.params.num_heads,
            in_proj_weight=torch.cat([part.weight for part in parts]),
            in_proj_bias=torch.cat([part.bias for part in parts]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=static.to_out.weight,
            out_proj_bias=static.to_out.bias,
            training=False,
            need_weights=False,
        )
        return read.transpose(0, 1)

    def _mlp(self, first: nn.Linear, second: nn.Linear, x: Tensor) -> Tensor:
        hidden = F.linear(x, first.weight, first.bias)
        return F.linear(gelu(hidden), second.weight, second.bias)
