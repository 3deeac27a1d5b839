"""Token grids: baked position tables and resizes as constant matrices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["bilinear_matrix", "sincos_2d"]


def sincos_2d(height: int, width: int, embed_dim: int) -> Tensor:
    """Return the 2-D sine-cosine position table of shape (height * width, embed_dim), row-major, fp32.

    Frequencies are 10000^(-i / (D/4 - 1)); columns are [sin x, cos x, sin y, cos y]. It is computed in fp32
    in every precision, as the original does: its digits belong to the method.
    """
    quarter = embed_dim // 4
    omega = 10000 ** -(torch.arange(quarter, dtype=torch.float32) / (quarter - 1))
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    rows = y.flatten()[:, None] * omega
    columns = x.flatten()[:, None] * omega
    return torch.cat([columns.sin(), columns.cos(), rows.sin(), rows.cos()], dim=1)


def bilinear_matrix(source: int, target: int) -> Tensor:
    """Return the (target^2, source^2) fp64 matrix of a bilinear resize between square grids.

    The same as `interpolate(mode="bilinear", align_corners=False, antialias=False)`, which is separable:
    the Kronecker product of two 1-D resizes, each read off the unit vectors. The product with it is the
    resize, and needs no Resize op.
    """
    unit = torch.eye(source, dtype=torch.float64).unsqueeze(1)  # (source, 1, source)
    line = F.interpolate(unit, size=target, mode="linear", align_corners=False)[:, 0].T  # (target, source)
    return torch.kron(line, line)
