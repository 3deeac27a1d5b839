"""Norms of the field, written so that they export to one ONNX op each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ChannelLayerNorm", "GammaLayerNorm", "RMSNorm"]


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of feature maps; shape (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the axis behind the batch."""
        normed: Tensor = super().forward(x.movedim(1, -1))
        return normed.movedim(-1, 1)


class GammaLayerNorm(nn.Module):
    """LayerNorm without bias whose scale is stored as its distance from one: `LN(x) * (gamma + 1)`."""

    def __init__(self, embed_dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(embed_dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis; shape (..., D) -> (..., D)."""
        return F.layer_norm(x, self.gamma.shape, weight=self.gamma + 1.0, eps=self.eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a scale and no bias, spelled out: ONNX has the op only from opset 23."""

    def __init__(self, embed_dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(embed_dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis; shape (..., D) -> (..., D)."""
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight
