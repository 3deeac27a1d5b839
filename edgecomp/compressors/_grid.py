"""Token grids: their sides, baked position tables, and pooling and resizes as constant matrices."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgecomp.errors import InvalidSpec

__all__ = [
    "adaptive_line",
    "antialiased_line",
    "bicubic_line",
    "bilinear_line",
    "bilinear_matrix",
    "gather_groups",
    "grid_sides",
    "require_multiple",
    "resample_grid",
    "roi_line",
    "sincos_2d",
    "sincos_grid",
    "sincos_line",
    "squares_up_to",
]


def grid_sides(count: int, rows: int, *, method: str, what: str, param: str = "") -> tuple[int, int]:
    """Return rows and columns of a grid of `count` tokens.

    Args:
        count: rows times columns.
        rows: 0: the grid is square.
        method, what, param: for the refusal: who asks, of which tokens, and the parameter that holds `rows`; "": none
            does.
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
        hint = f", or say how many rows there are with --set params.{param}=ROWS" if param else ""
        raise InvalidSpec(f"{method}: {count} {what} are no square grid; {near} are{hint}")
    return side, side


def require_multiple(name: str, size: int, step: int, *, method: str) -> None:
    """Refuse an image that whole tokens do not fill.

    Args:
        name: of the size, for the refusal.
        size: side of the image in pixels.
        step: side of one token in pixels.
    """
    if size < step or size % step:
        nearest = max(1, round(size / step)) * step
        raise InvalidSpec(
            f"{method}: {name} {size} is not a multiple of {step}, the pixels of one token; the nearest is {nearest}"
        )


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


def antialiased_line(source: int, target: int) -> Tensor:
    """Return the (target, source) fp64 matrix of a bicubic resize on a line, corners not aligned, with antialias."""
    unit = torch.eye(source, dtype=torch.float64)[:, None, None]  # (source, 1, 1, source)
    line = F.interpolate(unit, size=(1, target), mode="bicubic", align_corners=False, antialias=True)
    return line[:, 0, 0].T


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


def sincos_line(places: int, width: int) -> Tensor:
    """Return sine and cosine of the places of a line: (places, width), fp64.

    Frequencies are 10000^(-2 i / width); columns are [sin, cos].
    """
    omega = 10000 ** (-torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angles = torch.arange(places, dtype=torch.float64)[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_grid(rows: int, columns: int, embed_dim: int) -> Tensor:
    """Return the position table of the resamplers: (rows * columns, embed_dim), row-major, fp64.

    Half of the width tells the column, the other half the row; see `sincos_line`.
    """
    line = sincos_line(max(rows, columns), embed_dim // 2)
    across = line[:columns].expand(rows, -1, -1)
    down = line[:rows, None].expand(-1, columns, -1)
    return torch.cat([across, down], dim=-1).flatten(0, 1)


def bicubic_line(source: int, target: int) -> Tensor:
    """Return the (target, source) fp64 matrix of a bicubic resize along one axis.

    The same as `interpolate(mode="bicubic", align_corners=False, antialias=False)`, read off the unit vectors; a resize
    of a grid is the Kronecker product of two.
    """
    unit = torch.eye(source, dtype=torch.float64).reshape(source, 1, source, 1)
    return F.interpolate(unit, size=(target, 1), mode="bicubic", align_corners=False)[:, 0, :, 0].T


def roi_line(source: int, cells: int, bins: int) -> Tensor:
    """Return the (cells * bins, source) fp64 matrix of RoIAlign along one axis that is cut into equal cells.

    The same as torchvision's `roi_align` with its own defaults (sampling_ratio -1, aligned False): a cell is at least
    one pixel long, each of its bins is the mean of as many samples as it has pixels, rounded up, each sample is
    interpolated between two pixels, and pixels stand at whole numbers. Pooling of a grid is the Kronecker product of
    two. Places are worked out in the default type and in torchvision's order: their digits belong to the method.
    """
    real = np.float64 if torch.get_default_dtype() == torch.float64 else np.float32
    matrix = torch.zeros(cells * bins, source, dtype=torch.float64)
    for cell in range(cells):
        start, end = real(cell * (source / cells)), real(cell * (source / cells) + source / cells)
        length = max(end - start, real(1))
        size, samples = length / real(bins), math.ceil(length / real(bins))
        for index in range(bins):
            for sample in range(samples):
                at = start + real(index) * size + (real(sample) + real(0.5)) * size / real(samples)
                if at > source:
                    continue
                low = min(int(at), source - 1)
                high, share = min(low + 1, source - 1), float(at - real(low)) if low < source - 1 else 0.0
                matrix[cell * bins + index, low] += (1 - share) / samples
                matrix[cell * bins + index, high] += share / samples
    return matrix
