"""Spatial frequency of tokens on their grid, and selections in which the tokens of highest frequency are safe.

Formulas: the project's founding notes. High frequency means that a token differs from its neighbours: text, edges.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edgecomp.compressors._base import HostFeature
from edgecomp.compressors._pruning import SelectionOrder, select
from edgecomp.errors import InvalidSpec

__all__ = ["READS", "count_protected", "find_grid", "protect_and_fill", "require_room", "spatial_frequency"]

#: What a host hands over for a score by attention.
READS: dict[str, tuple[HostFeature, ...]] = {
    "class-attention": ("class_attention",),
    "received-attention": ("received_attention",),
}


def find_grid(tokens: int, height: int, *, method: str) -> tuple[int, int]:
    """Return rows and columns of the token grid; height 0: it is square."""
    rows = height or math.isqrt(tokens)
    if tokens % rows or (not height and rows * rows != tokens) or min(rows, tokens // rows) < 2:
        what = f"no {rows} equal rows on a grid of at least 2 x 2" if height else "no square grid"
        heights = [str(count) for count in range(2, tokens // 2 + 1) if tokens % count == 0]
        rule = f"set params.grid_height to {' or '.join(heights)}" if heights else "no number of rows fits; give others"
        raise InvalidSpec(
            f"{method} compares tokens with their neighbours on a grid, and {tokens} tokens are {what}; {rule}"
        )
    return rows, tokens // rows


def spatial_frequency(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return how much each token differs from the one to its right and the one below: (B, N, D) -> (B, N).

    The mean of both differences, each the mean over channels of |a - b|; the last column and the last row, which have
    no such neighbour, take the difference that there is, to the left and upwards.
    """
    grid = tokens.reshape(tokens.shape[0], height, width, -1)
    right = (grid[:, :, 1:] - grid[:, :, :-1]).abs().mean(-1)  # (B, h, w - 1)
    down = (grid[:, 1:] - grid[:, :-1]).abs().mean(-1)  # (B, h - 1, w)
    right = torch.cat([right, right[:, :, -1:]], 2)
    down = torch.cat([down, down[:, -1:]], 1)
    return (0.5 * (right + down)).flatten(1)


def count_protected(tokens: int, quantile: float) -> int:
    """Return how many of so many differing scores lie above a quantile (linear interpolation)."""
    return tokens - 1 - math.floor(quantile * (tokens - 1))


def require_room(protected: int, keep: int, *, quantile: float, tokens: int) -> None:
    """Refuse a budget that the protected tokens alone exceed."""
    if keep < protected:
        raise InvalidSpec(
            f"budget {keep} is below the {protected} of {tokens} tokens that params.quantile={quantile} protects; keep "
            f"at least {protected}, or raise the quantile"
        )


def protect_and_fill(
    frequency: Tensor, score: Tensor, *, protected: int, keep: int, order: SelectionOrder = "rank"
) -> Tensor:
    """Return the places kept: the protected ones ascending, then the best of the others, in an order of their own.

    Shapes: frequency (B, N), score (B, N) -> (B, keep) int64. Of frequencies NaN comes behind every number.
    """
    safe = select(frequency, protected)
    if keep == protected:
        return safe
    places = torch.arange(score.shape[1], device=score.device)
    is_safe = (safe.unsqueeze(-1) == places).any(1)
    least = torch.where(score.isnan(), 0.0, score).amin(-1, keepdim=True)
    others = torch.where(is_safe, least - least.abs() - 1.0, score)  # below each of them, in any float type
    return torch.cat([safe, select(others, keep - protected, order=order)], 1)
