"""What pixels alone tell, without a network: edges, colours, objects, text. Each is a stated, cheap proxy.

The project's founding notes use these words without a definition; the formulas here are ours. All take RGB pixels
(B, 3, S, S) in [0, 1], use static ops alone, and return numbers in [0, 1].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["colour_variance", "edge_density", "object_proxy", "text_likelihood"]

_EDGE = 0.1  # a step in brightness between neighbours that counts as an edge
_CELLS = 16  # the edge map's side when objects are counted
_MOST_OBJECTS = 10
_TINY = 1e-6
_ROUNDING = 1e-5  # shares of edges that differ lie further apart; the mean of equal ones may be off by less


def brightness(pixels: Tensor) -> Tensor:
    """Return luma by BT.601: (B, 3, S, S) -> (B, S, S)."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=pixels.dtype, device=pixels.device)
    return (pixels * weights[:, None, None]).sum(1)


def edges(pixels: Tensor) -> Tensor:
    """Return 1 where brightness steps by more than a tenth to the right or downwards: (B, S, S)."""
    grey = brightness(pixels)
    right = F.pad((grey[:, :, 1:] - grey[:, :, :-1]).abs(), (0, 1))
    down = F.pad((grey[:, 1:] - grey[:, :-1]).abs(), (0, 0, 0, 1))
    return (torch.maximum(right, down) > _EDGE).to(pixels.dtype)


def edge_density(pixels: Tensor) -> Tensor:
    """Return the share of pixels at an edge: (B,)."""
    return edges(pixels).mean((1, 2))


def colour_variance(pixels: Tensor) -> Tensor:
    """Return the variance over pixels, on average of the channels, over 1/4, the largest there is: (B,)."""
    flat = pixels.flatten(2)
    return 4.0 * (flat - flat.mean(-1, keepdim=True)).square().mean((1, 2))


def object_proxy(pixels: Tensor) -> Tensor:
    """Return the count of local maxima of the edge map, pooled to 16 x 16 cells, over 10 and at most 1: (B,).

    A maximum is a cell that no cell around it exceeds, and that has more edges than the image on average.
    """
    count = pixels.shape[-1] // _CELLS * _CELLS
    side = count // _CELLS
    cells = F.avg_pool2d(edges(pixels)[:, None, :count, :count], side)
    highest = F.max_pool2d(cells, 3, stride=1, padding=1)
    above = cells - cells.mean((2, 3), keepdim=True) > _ROUNDING
    peaks = (cells >= highest) & above
    return (peaks.to(pixels.dtype).sum((1, 2, 3)) / _MOST_OBJECTS).clamp(max=1.0)


def text_likelihood(pixels: Tensor, patch: int) -> Tensor:
    """Return how much each patch looks like text: strong, dense, two-valued gradients. (B, 3, S, S) -> (B, N).

    The product of three shares: of pixels at an edge, doubled and at most 1; of the patch's variance that a split at
    its mean explains, 1 for two-valued patches; and the step between both halves, doubled and at most 1.
    """
    grey = _patches(brightness(pixels), patch)  # (B, N, patch * patch)
    dense = (2.0 * _patches(edges(pixels), patch).mean(-1)).clamp(max=1.0)
    mean = grey.mean(-1, keepdim=True)
    bright = (grey > mean).to(grey.dtype)
    share = bright.mean(-1)
    high = (grey * bright).mean(-1) / share.clamp(min=_TINY)
    low = (grey * (1.0 - bright)).mean(-1) / (1.0 - share).clamp(min=_TINY)
    variance = (grey - mean).square().mean(-1)
    step = torch.where(share > 0, high - low, torch.zeros_like(share))
    two_valued = (share * (1.0 - share) * step.square() / variance.clamp(min=_TINY)).clamp(max=1.0)
    return dense * two_valued * (2.0 * step).clamp(max=1.0)


def _patches(plane: Tensor, patch: int) -> Tensor:
    """Cut a plane (B, S, S) into patches in raster order, without what is left over: (B, N, patch * patch)."""
    side = plane.shape[-1] // patch
    whole = plane[..., : side * patch, : side * patch]
    return whole.reshape(-1, side, patch, side, patch).transpose(2, 3).reshape(-1, side * side, patch * patch)
