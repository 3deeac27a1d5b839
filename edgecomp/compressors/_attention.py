"""Attention in the static form: fixed heads, no fused op, the same ops on every backend."""

from __future__ import annotations

from torch import Tensor

__all__ = ["merge_heads", "split_heads"]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Give each head its own axis: (B, N, H * d) -> (B, H, N, d)."""
    batch, tokens, width = x.shape
    return x.reshape(batch, tokens, heads, width // heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Lay the heads side by side again: (B, H, N, d) -> (B, N, H * d)."""
    batch, heads, tokens, width = x.shape
    return x.transpose(1, 2).reshape(batch, tokens, heads * width)
