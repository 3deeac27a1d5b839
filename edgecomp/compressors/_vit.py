"""Pre-norm blocks of a ViT, in windows and with relative positions where they are asked for, as in ViTDet and SAM.

Source: arXiv:2203.16527 (ViTDet), whose relative positions are those of arXiv:2112.01526 (MViTv2).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgecomp.compressors._attention import merge_heads, split_heads

__all__ = ["Block"]


class Attention(nn.Module):
    """Self-attention; with tables of relative positions along rows and columns where `table` is above 0.

    Args:
        width, heads: of the tokens.
        table: side of the grid that the tables are stored for.
    """

    def __init__(self, width: int, heads: int, table: int = 0) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        if table:
            self.rel_rows = nn.Parameter(torch.zeros(2 * table - 1, width // heads))
            self.rel_columns = nn.Parameter(torch.zeros(2 * table - 1, width // heads))

    def forward(self, x: Tensor, side: int = 0, resize: Tensor | None = None) -> Tensor:
        """Attend among all tokens of a row.

        Shapes: x (B, N, D); with relative positions N = side * side, and resize (2 side - 1, rows of the tables) or
        none -> (B, N, D).
        """
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        scores = (q * self.scale) @ k.transpose(-1, -2)  # (B, H, N, N)
        if side:
            scores = self._add_positions(scores, q, side, resize)
        return self.proj(merge_heads(scores.softmax(-1) @ v))  # type: ignore[no-any-return]

    def _add_positions(self, scores: Tensor, q: Tensor, side: int, resize: Tensor | None) -> Tensor:
        """Add q . row table + q . column table; each is a product of its own, spread over the other axis."""
        batch, heads, tokens, width = q.shape
        offsets = torch.arange(side, device=q.device)
        offsets = offsets[:, None] - offsets + side - 1  # of query and key: (side, side)
        rows, columns = (
            (table if resize is None else resize @ table)[offsets].transpose(1, 2)  # (side, d, side)
            for table in (self.rel_rows, self.rel_columns)
        )
        grid = q.reshape(batch, heads, side, side, width)
        by_row = grid @ rows  # (B, H, y, x, key's y)
        by_column = (grid.transpose(2, 3) @ columns).transpose(2, 3)  # (B, H, y, x, key's x)
        spread = scores.reshape(batch, heads, tokens, side, side)
        spread = spread + by_row.reshape(batch, heads, tokens, side, 1)
        spread = spread + by_column.reshape(batch, heads, tokens, 1, side)
        return spread.reshape(batch, heads, tokens, tokens)


class Block(nn.Module):
    """Pre-norm attention and MLP, of both ViTs.

    Args:
        table: see `Attention`.
        hidden: width of the MLP.
        act: between its layers.
        eps: of the norms.
    """

    def __init__(
        self, width: int, heads: int, hidden: int, *, table: int = 0, act: Callable[[Tensor], Tensor], eps: float
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads, table)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.act = act

    def forward(self, x: Tensor, side: int = 0, window: int = 0, resize: Tensor | None = None) -> Tensor:
        """Update tokens (B, N, D); with a window, in windows of a side * side grid that zeros fill up."""
        normed = self.norm1(x)
        if window:
            update = _join_windows(self.attn(_split_windows(normed, side, window), window), len(x), side, window)
        else:
            update = self.attn(normed, side, resize)
        x = x + update
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))  # type: ignore[no-any-return]


def _split_windows(x: Tensor, side: int, window: int) -> Tensor:
    """(B, side * side, D) -> (B * windows, window * window, D); windows in raster order, filled up with zeros."""
    batch, _, width = x.shape
    count = -(-side // window)
    grid = x.reshape(batch, side, side, width)
    if count * window > side:
        grid = F.pad(grid, (0, 0, 0, count * window - side, 0, count * window - side))
    grid = grid.reshape(batch, count, window, count, window, width).transpose(2, 3)
    return grid.reshape(batch * count * count, window * window, width)


def _join_windows(x: Tensor, batch: int, side: int, window: int) -> Tensor:
    """Undo `_split_windows`."""
    count, width = -(-side // window), x.shape[-1]
    grid = x.reshape(batch, count, count, window, window, width).transpose(2, 3)
    grid = grid.reshape(batch, count * window, count * window, width)
    return grid[:, :side, :side].reshape(batch, side * side, width)
