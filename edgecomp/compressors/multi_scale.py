"""Multi-scale: the grid of tokens at several scales, each pooled or resampled to a few, one behind the other.

From the project's founding notes; published relatives are Matryoshka's and LLaVA-OneVision's pooling and LLaVA-UHD v2's
hierarchy. No code of this form is known: the reference is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from msgspec import Meta
from torch import Tensor, nn

from edgecomp.compressors._attention import merge_heads, split_heads
from edgecomp.compressors._base import Compressor, Params, Positive, constant
from edgecomp.compressors._eager import norm_rows
from edgecomp.compressors._grid import adaptive_line, grid_sides, resample_grid
from edgecomp.errors import InvalidSpec
from edgecomp.specs import Output, Site, TensorSpec, TokenBudget

__all__ = ["MultiScale"]

Pair = tuple[Annotated[int, Meta(ge=1, le=256)], Positive]


class MultiScaleParams(Params, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of the multi-scale compressor.

    Attributes:
        tokens: tokens handed over where no host says how many.
        embed_dim: width of the tokens; a host decides it.
        levels: side of the grid of each level, and the tokens that come out of it.
        given: `grid`: one grid of tokens, of which each level's grid is an average (a host gives that); `levels`: the
            grids of all levels, one behind the other, for example of a thumbnail and of an image in tiles.
        resampled: the levels (0 is the first) that learned queries read; the others are averaged.
        num_heads: of the queries' attention.
    """

    tokens: Positive = 2304
    embed_dim: Positive = 1024
    levels: tuple[Pair, ...] = ((12, 144), (48, 144))
    given: Literal["grid", "levels"] = "grid"
    resampled: tuple[Annotated[int, Meta(ge=0, le=64)], ...] = ()
    num_heads: Positive = 8


class Reader(nn.Module):
    """Learned queries that read one level by a cross-attention: (B, N, D) -> (B, M, D)."""

    def __init__(self, queries: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.queries = nn.Parameter(torch.zeros(queries, width))
        self.query_norm, self.token_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q, self.to_k = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.to_v, self.to_out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the queries and what they read."""
        queries, tokens = self.queries.expand(tokens.shape[0], -1, -1), self.token_norm(tokens)
        q = split_heads(self.to_q(self.query_norm(queries)) * self.scale, self.heads)
        weights = (q @ split_heads(self.to_k(tokens), self.heads).transpose(-1, -2)).softmax(-1)
        read = merge_heads(weights @ split_heads(self.to_v(tokens), self.heads))
        return queries + self.to_out(read)  # type: ignore[no-any-return]


class MultiScale(Compressor):
    """Hand on a coarse and a fine view of the grid, each in a few tokens and marked with its level.

    Shapes: tokens (B, N, D), one square grid or those of all levels behind each other -> scales (B, M, D), where M is
    the sum of the levels' outputs, in the order of the levels.

    Static rewrite (level E4: our own eager reference). Averages are constant matrices in two factors; a level that is
    an average of an average is two of them.

    Source: the founding notes ("global light, local heavy", with level embeddings).
    """

    Params = MultiScaleParams
    reads_grid = True
    unstored_params = ("levels", "given", "num_heads")
    owners: Tensor

    def __init__(self, params: MultiScaleParams, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        super().__init__(params, site, budget, output)
        self.side = _require_levels(params, budget.tokens_in)
        total = sum(outputs for _, outputs in params.levels)
        if budget.tokens_out != total:
            raise InvalidSpec(
                f"multi-scale: the levels {_tell(params)} give {total} tokens together, so that budget "
                f"{budget.tokens_out} is not possible; drop it, or --set params.levels=[[GRID, OUTPUTS], ...]"
            )
        for index, (grid, outputs) in enumerate(params.levels):
            lines = {}
            if params.given == "grid" and grid != self.side:
                lines["to_grid"] = adaptive_line(self.side, grid)
            target, _ = _sides_out(index, outputs, params)
            if target and target != grid:
                lines["to_out"] = adaptive_line(grid, target)
            for name, line in lines.items():
                self.register_buffer(f"{name}_{index}", constant(line), persistent=False)
        owners = [index for index, (_, outputs) in enumerate(params.levels) for _ in range(outputs)]
        self.register_buffer("owners", torch.tensor(owners), persistent=False)  # (M,)
        self.marks = nn.Parameter(torch.zeros(len(params.levels), params.embed_dim))
        self.readers = nn.ModuleDict(
            {
                str(index): Reader(params.levels[index][1], params.embed_dim, params.num_heads)
                for index in params.resampled
            }
        )

    def input_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `tokens`."""
        return (TensorSpec("tokens", (batch, self.budget.tokens_in, self.params.embed_dim), "float32", "tokens"),)

    def output_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `scales`."""
        shape = (batch, self.budget.tokens_out, self.params.embed_dim)
        return (TensorSpec("scales", shape, "float32", "tokens"),)

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of all levels."""
        found, start = [], 0
        for index, (grid, _) in enumerate(self.params.levels):
            x = tokens
            if self.params.given == "levels":
                x = tokens[:, start : start + grid * grid]
                start += grid * grid
            for name in (f"to_grid_{index}", f"to_out_{index}"):
                line = getattr(self, name, None)
                x = x if line is None else resample_grid(x, line, line)
            found.append(self.readers[str(index)](x) if index in self.params.resampled else x)
        return (torch.cat(found, dim=1) + self.marks[self.owners],)

    def reference(self) -> nn.Module:
        """Return plain pooling of planes, and attention one head at a time."""
        return MultiScaleOriginal(self)

    @classmethod
    def site_without_host(cls, params: MultiScaleParams, placement: Any, image_size: int) -> Site:
        """Return the site of given tokens: those of all levels where they come so."""
        site = super().site_without_host(params, placement, image_size)
        if params.given == "grid":
            return site
        return Site(placement, tokens_in=sum(grid * grid for grid, _ in params.levels), embed_dim=params.embed_dim)

    @classmethod
    def possible_counts(cls, params: MultiScaleParams, site: Site) -> tuple[int, ...]:
        """Return the one count that the levels add up to."""
        _require_levels(params, site.tokens_in)
        return (sum(outputs for _, outputs in params.levels),)

    @classmethod
    def infer_params(cls, state: Mapping[str, Tensor], params: MultiScaleParams) -> dict[str, Any]:  # noqa: ARG003
        """Return the width and the levels that learned queries read; the grids come from the parameters."""
        if "marks" not in state:
            return {}
        readers = sorted({int(key.split(".")[1]) for key in state if key.startswith("readers.")})
        return {"embed_dim": state["marks"].shape[1], "resampled": tuple(readers)}


def _tell(params: MultiScaleParams) -> str:
    return ", ".join(f"{grid} x {grid} to {outputs}" for grid, outputs in params.levels)


def _require_levels(params: MultiScaleParams, count: int) -> int:
    """Refuse levels that do not fit each other or the tokens; return the side of the one grid, 0 without it."""
    if not params.levels:
        raise InvalidSpec("multi-scale: params.levels is empty; write --set 'params.levels=[[12, 144], [24, 64]]'")
    for index in params.resampled:
        if index >= len(params.levels):
            raise InvalidSpec(
                f"multi-scale: params.resampled holds {index}, and the levels are 0 to {len(params.levels) - 1}"
            )
    if params.resampled and params.embed_dim % params.num_heads:
        raise InvalidSpec(
            f"multi-scale: embed_dim={params.embed_dim} is not a multiple of num_heads={params.num_heads}"
        )
    for index, (grid, outputs) in enumerate(params.levels):
        _sides_out(index, outputs, params)
        if outputs > grid * grid and index not in params.resampled:
            raise InvalidSpec(
                f"multi-scale: level {index} has {grid} x {grid} = {grid * grid} tokens and cannot be averaged to "
                f"{outputs}; lower its outputs, or name it in params.resampled"
            )
    if params.given == "levels":
        total = sum(grid * grid for grid, _ in params.levels)
        if count != total:
            raise InvalidSpec(
                f"multi-scale: {count} tokens go in, and the grids of the levels {_tell(params)} have {total} "
                "together; match params.levels, or --set params.given=grid"
            )
        return 0
    side, _ = grid_sides(count, 0, method="multi-scale", what="tokens in")
    largest = max(grid for grid, _ in params.levels)
    if largest > side:
        raise InvalidSpec(
            f"multi-scale: a level of {largest} x {largest} is above the {side} x {side} grid that is handed over; "
            "lower it in params.levels, or choose a larger image"
        )
    return side


def _sides_out(index: int, outputs: int, params: MultiScaleParams) -> tuple[int, int]:
    """Return the sides of what an averaged level gives, or none where queries read it."""
    if index in params.resampled:
        return 0, 0
    return grid_sides(outputs, 0, method="multi-scale", what=f"outputs of level {index}")


class MultiScaleOriginal(nn.Module):
    """Levels as planes under adaptive pooling, on the parameters of a `MultiScale`; attention one head at a time."""

    def __init__(self, static: MultiScale) -> None:
        super().__init__()
        self.static = static

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Return what the static module returns."""
        static, params = self.static, self.static.params
        sizes = [grid * grid for grid, _ in params.levels]
        parts = torch.split(tokens, sizes, dim=1) if params.given == "levels" else [tokens] * len(sizes)
        found = []
        for index, (part, (grid, outputs)) in enumerate(zip(parts, params.levels, strict=True)):
            side = grid if params.given == "levels" else static.side
            planes = part.transpose(1, 2).reshape(len(part), -1, side, side)
            planes = F.adaptive_avg_pool2d(planes, grid)
            if index in params.resampled:
                level = self._read(static.readers[str(index)], planes.flatten(2).transpose(1, 2))
            else:
                level = F.adaptive_avg_pool2d(planes, round(outputs**0.5)).flatten(2).transpose(1, 2)
            found.append(level + static.marks[index])
        return (torch.cat(found, dim=1),)

    def _read(self, reader: Any, tokens: Tensor) -> Tensor:
        tokens = norm_rows(reader.token_norm, tokens)
        queries = norm_rows(reader.query_norm, reader.queries) @ reader.to_q.weight.T
        keys, values = tokens @ reader.to_k.weight.T, tokens @ reader.to_v.weight.T
        heads = []
        for q, k, v in zip(*(x.chunk(reader.heads, dim=-1) for x in (queries, keys, values)), strict=True):
            weights = torch.einsum("md,bnd->bmn", q, k).div(q.shape[-1] ** 0.5).softmax(dim=-1)
            heads.append(torch.einsum("bmn,bnd->bmd", weights, v))
        return reader.queries + torch.cat(heads, dim=-1) @ reader.to_out.weight.T  # type: ignore[no-any-return]
