"""LLaVA-UHD's spatially constrained resampler: each query of a grid reads its own region of the image alone.

Paper: "LLaVA-UHD: an LMM Perceiving Any Aspect Ratio and High-Resolution Images" (arXiv:2403.11703), section 3.2; the
released form is that of the first version's code (commit in `export/recipes/llava-uhd.toml`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgecomp.compressors._attention import merge_heads, split_heads
from edgecomp.compressors._base import constant
from edgecomp.compressors._grid import resample_grid, roi_line
from edgecomp.compressors._resampler import EPS, GridParams, GridResampler
from edgecomp.errors import WeightsError
from edgecomp.specs import Output, Site, TokenBudget

__all__ = ["LlavaUhd"]

_POOLS = ((2, 4), (2, 3), (3, 4), (3, 3), (4, 2), (3, 2), (4, 3))  # (rows, columns) of a region; the first of equals


class LlavaUhd(GridResampler):
    """Replace the N tokens of an image by M queries, each of which has read the M-th part of the grid that is its own.

    Shapes: tokens (B, [I,] N, C) -> latents (B, [I,] M, D). I images are an axis where `images` is above 1.

    Static rewrite: which regions there are follows from the grid alone, so that the original's RoIAlign is one constant
    matrix for each grid (level E0); it is applied as its two Kronecker factors, rows and columns, a fraction of the
    work. Its rows sum to one, so it changes places with the projections of keys and values: N tokens are projected
    instead of M * bins pooled ones. Another grid is another bundle.

    Source: LLaVA-UHD's `AdaptSpatialResampler`; arXiv:2403.11703, section 3.2.
    """

    Params = GridParams
    stored_layout = "llava-uhd"
    params: GridParams
    pool_rows: Tensor
    pool_columns: Tensor

    def __init__(self, params: GridParams, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        super().__init__(params, site, budget, output)
        (rows, columns), (down, across), side = self.grid, self.pool, math.isqrt(params.queries)
        self.register_buffer("pool_rows", constant(roi_line(rows, side, down)), persistent=False)
        self.register_buffer("pool_columns", constant(roi_line(columns, side, across)), persistent=False)

    @property
    def pool(self) -> tuple[int, int]:
        """Rows and columns that each region is pooled to: of the seven, those nearest to the grid's aspect."""
        rows, columns = self.grid
        return min(_POOLS, key=lambda pool: abs(math.log(columns / rows) - math.log(pool[1] / pool[0])))

    @classmethod
    def layout_of(cls, state: Mapping[str, Tensor]) -> str:
        """Return `llava-uhd`, or refuse a sibling of other keys; OmniLMM's have the same names and shapes."""
        layout = super().layout_of(state)
        if layout in ("qwen-vl", "minicpm-v"):
            raise WeightsError(
                f"weights are in the layout {layout}, whose queries read the whole image; use resampler-2d"
            )
        return layout

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Return what the queries read."""
        values = self.project(tokens)
        queries = self.attn.to_q(self.ln_q(self.query) + self.pos_embed)
        keys, values = self.attn.to_k(values + self.key_places), self.attn.to_v(values)
        q = split_heads(queries.unsqueeze(0), self.params.heads).unsqueeze(-1)  # (1, H, M, d, 1)
        k, v = self._regions(keys), self._regions(values)  # (B, H, M, bins, d)
        weights = (k @ (q * q.shape[-2] ** -0.5)).squeeze(-1).softmax(-1)  # (B, H, M, bins)
        read = (weights.unsqueeze(-2) @ v).squeeze(-2)
        return (self.finish(self.attn.to_out(merge_heads(read))),)

    def _regions(self, x: Tensor) -> Tensor:
        """Pool each query's region: (B, N, D) -> (B, H, M, bins, d)."""
        (down, across), side, batch = self.pool, math.isqrt(self.params.queries), len(x)
        x = resample_grid(x, self.pool_rows, self.pool_columns)  # (B, side * down * side * across, D)
        x = x.reshape(batch, side, down, side, across, self.params.heads, -1).permute(0, 5, 1, 3, 2, 4, 6)
        return x.reshape(batch, self.params.heads, side * side, down * across, -1)

    def reference(self) -> nn.Module:
        """Return the original's forward pass on this module's parameters."""
        return LlavaUhdOriginal(self)


class LlavaUhdOriginal(nn.Module):
    """The eager original: torchvision's RoIAlign on keys and values, then one small attention for each region."""

    def __init__(self, static: LlavaUhd) -> None:
        super().__init__()
        self.static = static

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Return what the static module returns."""
        read = [self._image(image) for image in tokens.flatten(0, -3)]
        return (torch.stack(read).reshape(*tokens.shape[:-2], *read[0].shape),)

    def _image(self, tokens: Tensor) -> Tensor:
        static: Any = self.static
        width, heads, (rows, columns) = static.params.embed_dim, static.params.heads, static.grid
        x = tokens if static.params.context_dim == width else tokens @ static.kv_proj.weight.T
        x = F.layer_norm(x, (width,), static.ln_kv.weight, static.ln_kv.bias, EPS)
        q = F.layer_norm(static.query, (width,), static.ln_q.weight, static.ln_q.bias, EPS) + static.pos_embed
        side = math.isqrt(len(q))
        table = static.pos_embed.double().T.reshape(1, width, side, side)
        places = F.interpolate(table, size=(rows, columns), mode="bicubic", align_corners=False)[0].to(x.dtype)
        x = x.T.reshape(width, rows, columns)
        keys, values = self._pooled(x + places, side), self._pooled(x, side)
        q, keys, values = static.attn.to_q(q), static.attn.to_k(keys), static.attn.to_v(values)
        read = []
        for query, key, value in zip(q, keys, values, strict=True):  # (D), (bins, D), (bins, D)
            scores = torch.einsum("hd,nhd->hn", query.reshape(heads, -1), key.reshape(len(key), heads, -1))
            weights = torch.softmax(scores / math.sqrt(width // heads), dim=1)
            read.append(torch.einsum("hn,nhd->hd", weights, value.reshape(len(value), heads, -1)).flatten())
        out = static.attn.to_out(torch.stack(read))
        return F.layer_norm(out, (width,), static.ln_post.weight, static.ln_post.bias, EPS) @ static.proj  # type: ignore[no-any-return]

    def _pooled(self, grid: Tensor, side: int) -> Tensor:
        """Return each region of a feature map, pooled: (D, rows, columns) -> (M, bins, D)."""
        from torchvision.ops import roi_align

        rows, columns = grid.shape[1:]
        high, wide = rows / side, columns / side
        corners = [(j * wide, i * high) for i in range(side) for j in range(side)]
        boxes = [[x, y, x + wide, y + high] for x, y in corners]
        pooled = roi_align(grid[None], [torch.tensor(boxes, dtype=grid.dtype)], self.static.pool)
        return pooled.flatten(2).transpose(1, 2)  # type: ignore[no-any-return]
