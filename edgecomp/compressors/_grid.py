"""Token grids: their sides, baked position tables, and pooling and resizes as constant matrices."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from edgecomp.errors import InvalidSpec

__all__ = [
    "adaptive_line",
    "bilinear_line",
    "bilinear_matrix",
    "gather_groups",
    "grid_sides",
    "resample_grid",
    "sincos_2d",
    "squares_up_to",
]


def grid_sides(count: int, rows: int, *, method: str, what: str, param: str) -> tuple[int, int]:
    """Return rows and columns of a grid of `count` tokens.

    Args:
        count: rows times columns.
        rows: 0: the grid is square.
        method, what, param: for the refusal: who asks, of which tokens, and the parameter that holds `rows`.
    """
    if rows and count % rows == 0:
        return rows, count // rows
    if rows:
        fitting = ", ".join(str(side) for side in range(1, count + 1) if count % side == 0)
        raise InvalidSpec(
            f"{method}: {count} {what} do not fill {rows} rows (params.{param}={rows}); rows that fit: {fitting}"
        )
    side = math.isqrt(count)
    if side * side != count:
        near = f"{side * side} = {side} x {side} and {(side + 1) ** 2} = {side + 1} x {side + 1}"
        raise InvalidSpec(
            f"{method}: {count} {what} are no square grid; {near} are, or say how many rows there are with "
            f"--set params.{param}=ROWS"
        )
    return side, side


def squares_up_to(count: int) -> tuple[int, ...]:
    """Return 1, 4, 9, ... up to `count`."""
    return tuple(side * side for side in range(1, math.isqrt(count) + 1))


def resample_grid(tokens: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pool or resize a grid of tokens by a constant matrix in its two factors: rows first, then columns.

    The product with their Kronecker product of shape (q p, h w) gives the same for h w multiplications a value; this
    way they are h + w, and no axis moves.

    Shapes: tokens (B, h w, D), rows (q, h), columns (p, w) -> (B, q p, D).
    """
    batch, _, width = tokens.shape
    (target, source), (across, along) = rows.shape, columns.shape
    pooled = rows @ tokens.reshape(batch, source, along * width)  # (B, q, w D)
    pooled = columns @ pooled.reshape(batch * target, along, width)  # (B q, p, D)
    return pooled.reshape(batch, target * across, width)


def gather_groups(tokens: Tensor, rows: int, columns: int, factor: int) -> Tensor:
    """Bring the tokens of each factor x factor square together, in the order (row, column).

    Shapes: tokens (B, h w, D) -> (B, h/s w/s, s s, D).
    """
    batch, _, width = tokens.shape
    down, across = rows // factor, columns // factor
    grouped = tokens.reshape(batch * down, factor, across, factor * width).transpose(1, 2)
    return grouped.reshape(batch, down * across, factor * factor, width)


def adaptive_line(source: int, target: int) -> Tensor:
    """Return the (target, source) fp64 matrix of adaptive average pooling on a line.

    Bin i is the mean of [floor(i n / m), ceil((i + 1) n / m)): the bins of `adaptive_avg_pool1d`, which overlap where
    the target does not divide the source.
    """
    line = torch.zeros(target, source, dtype=torch.float64)
    for index in range(target):
        first, last = index * source // target, -(-(index + 1) * source // target)
        line[index, first:last] = 1.0 / (last - first)
    return line


def bilinear_line(source: int, target: int) -> Tensor:
    """Return the (target, source) fp64 matrix of a linear resize on a line, corners not aligned, no antialias."""
    unit = torch.eye(source, dtype=torch.float64).unsqueeze(1)  # (source, 1, source)
    return F.interpolate(unit, size=target, mode="linear", align_corners=False)[:, 0].T


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
    line = bilinear_line(source, target)
    return torch.kron(line, line)
