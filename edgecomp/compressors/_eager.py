"""What the eager originals share: norms, an activation and a distance spelled out, apart from the static form's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["cosine", "gelu", "norm_channels", "norm_rows"]


def norm_rows(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Return a LayerNorm over the last axis: (..., D) -> (..., D)."""
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(dim=-1, keepdim=True) + norm.eps) * norm.weight + norm.bias


def norm_channels(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Return a LayerNorm over the channels of planes: (B, C, h, w) -> (B, C, h, w)."""
    centred = x - x.mean(dim=1, keepdim=True)
    scaled = centred / torch.sqrt(centred.square().mean(dim=1, keepdim=True) + norm.eps)
    return scaled * norm.weight[:, None, None] + norm.bias[:, None, None]


def gelu(x: Tensor) -> Tensor:
    """Return the exact GELU."""
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine of two tokens (D,), zero where one of them is zero."""
    length = a.norm() * b.norm()
    return (a * b).sum() / length if length > 0 else torch.zeros_like(length)
