"""Complexity router: more tokens where neighbouring tokens differ.

Source: the project's founding notes, chapter PuMer ("complexity-adaptive merge ratio", "adaptive pattern"): mean local
variance over a 3 x 3 window of the token grid. Its division by the variance of the image is ours.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import torch
import torch.nn.functional as F
from msgspec import Meta
from torch import Tensor

from edgecomp.errors import InvalidSpec
from edgecomp.routers._base import Router, RouterSite, even_thresholds

__all__ = ["ComplexityParams", "ComplexityRouter"]

_WINDOW = 3
_NOTES = (0.3, 0.7)  # of three buckets
_TINY = 1e-30


class ComplexityParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The range that is stretched to [0, 1].

    Attributes:
        low: complexity whose need is 0.
        high: complexity whose need is 1.
    """

    low: Annotated[float, Meta(ge=0, le=100)] = 0.0
    high: Annotated[float, Meta(gt=0, le=100)] = 1.0

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low={self.low} must lie below high={self.high}")


class ComplexityRouter(Router):
    """Send an image to the bucket that its complexity reaches.

    complexity = mean variance inside the 3 x 3 windows that lie in the grid / variance of all tokens, both on average
    of the channels; need = (complexity - low) / (high - low), held to [0, 1].

    The notes leave the scale open ("normalised by a calibration range"), and variances of tokens differ a
    thousandfold between encoders and layers. The division makes it a share: near 0 where the image changes slowly,
    near 1 where neighbours are as unlike as any two tokens, whatever the encoder; so (0, 1) is a range that holds
    before any calibration. Tokens that are all equal have need 0; a plain image need not have them, since a host adds
    positions.

    Shapes: tokens (B, P + N, D), N a square -> need (B, 1), signals (B, 3).

    Static rewrite: E[x^2] - E[x]^2 by average pooling. The first token, then the mean, is taken from all tokens
    before, which changes no variance: equal tokens become exact zeros, and no large mean cancels digits.

    Source: the founding notes. Their pattern goes above 0.7, this one from 0.7 on.
    """

    reads: ClassVar[Literal["image", "stem"]] = "stem"
    signal_names = ("local_variance", "variance", "complexity")
    Params = ComplexityParams
    params: ComplexityParams

    def __init__(self, params: Any, site: RouterSite) -> None:
        super().__init__(params, site)
        tokens, self.width = self.tokens_shape()
        if not site.is_grid:
            raise InvalidSpec(
                f"router {self.label} compares neighbours on the image's grid, and the {tokens} tokens that the first "
                "of two methods hands over lie on none; choose difficulty or detail, which read the image, or policy"
            )
        self.side = math.isqrt(max(tokens, 0))
        if self.side**2 != tokens or self.side < _WINDOW:
            raise InvalidSpec(
                f"router {self.label} needs a square grid of {_WINDOW} x {_WINDOW} tokens or more, and the "
                f"stem hands over {tokens} patch tokens (of {tokens + site.num_prefix_tokens}); choose another "
                "--router, or an --image-size that gives a square"
            )

    @property
    def default_thresholds(self) -> tuple[float, ...]:
        """The notes' with three buckets; equal parts otherwise."""
        buckets = len(self.site.buckets)
        return _NOTES if buckets == len(_NOTES) + 1 else even_thresholds(buckets)

    def judge(self, *seen: Tensor) -> tuple[Tensor, Tensor]:
        """Return the complexity in its range, and both variances."""
        tokens = self.patch_tokens(seen[0])  # (B, N, D)
        tokens = tokens - tokens[:, :1]
        tokens = tokens - tokens.mean(1, keepdim=True)
        variance = tokens.square().mean((1, 2))  # (B,)
        grid = tokens.transpose(1, 2).reshape(-1, self.width, self.side, self.side)
        squares = F.avg_pool2d(grid.square().mean(1, keepdim=True), _WINDOW, stride=1)
        means = F.avg_pool2d(grid, _WINDOW, stride=1).square().mean(1, keepdim=True)
        local = (squares - means).mean((1, 2, 3)).clamp(min=0.0)
        complexity = local / variance.clamp(min=_TINY)
        need = ((complexity - self.params.low) / (self.params.high - self.params.low)).clamp(0.0, 1.0)
        return need[:, None], torch.stack([local, variance, complexity], 1)
