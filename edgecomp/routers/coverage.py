"""Coverage router: the smallest bucket whose tokens hold a share of all attention.

Source: ours. Top-p sampling, said of tokens kept: an image whose attention stands on few tokens needs few.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from edgecomp.errors import InvalidSpec
from edgecomp.routers._base import Router, RouterSite, next_above
from edgecomp.specs import TensorSpec

__all__ = ["CoverageParams", "CoverageRouter"]

#: Scores and their ranks: attention (B, H, N), and what an inside method has summed up, (B, P + N).
_RANKS = {"class_attention": 3, "received_attention": 3, "cumulative_attention": 3, "score": 2}
_TINY = 1e-30


class CoverageParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The share that a bucket must hold.

    Attributes:
        p: share of the sum of all scores.
    """

    p: Annotated[float, Meta(gt=0, lt=1)] = 0.9


class CoverageRouter(Router):
    """Send an image to the smallest bucket whose highest scores hold the share p of their sum.

    need[k] = 1 - the share that the bucket's M highest scores hold, which is the share that it loses; a request goes
    above bucket k where that exceeds 1 - p, as far as float32 sums tell. Scores below zero count as zero, and where all
    are zero nothing is lost.

    Shapes: scores (B, H, N) of attention, or (B, P + N) -> need (B, K - 1), signals (B, 2).

    Static rewrite: TopK of all N sorts; one MatMul with a constant of zeros and ones sums what each bucket drops (a
    running sum would do it too, with more steps and worse digits in the tail).
    """

    reads: ClassVar[Literal["image", "stem"]] = "stem"
    signal_names = ("mass", "highest")
    Params = CoverageParams
    params: CoverageParams
    dropped: Tensor

    def __init__(self, params: Any, site: RouterSite) -> None:
        super().__init__(params, site)
        spec = self._scores()
        self.tokens = spec.shape[-1] - (site.num_prefix_tokens if len(spec.shape) == 2 else 0)
        places = torch.arange(self.tokens)[:, None]
        dropped = (places >= torch.tensor(site.buckets[:-1])).to(torch.get_default_dtype())  # (N, K - 1)
        self.register_buffer("dropped", dropped, persistent=False)

    def _scores(self) -> TensorSpec:
        """Return the first of the stem's outputs that is a score."""
        for spec in self.site.stem:
            if _RANKS.get(spec.name) == len(spec.shape):
                return spec
        raise InvalidSpec(
            f"router {self.label} reads one of {', '.join(_RANKS)}, and the stem hands over "
            f"{', '.join(map(str, self.site.stem))}; choose another --router, or a method that reads attention"
        )

    @property
    def stem_inputs(self) -> tuple[str, ...]:
        """The one output that is a score."""
        return (self._scores().name,)

    @property
    def default_thresholds(self) -> tuple[float, ...]:
        """The next float32 above 1 - p for all, since a bucket that holds p exactly holds enough."""
        return (next_above(1.0 - self.params.p),) * (len(self.site.buckets) - 1)

    def judge(self, *seen: Tensor) -> tuple[Tensor, Tensor]:
        """Return the share that each bucket loses; the sum of scores, and the highest one's share."""
        (given,) = seen
        scores = given.mean(1) if given.ndim == 3 else self.patch_tokens(given)  # (B, N)
        ordered = scores.clamp(min=0.0).topk(self.tokens).values
        mass = ordered.sum(1, keepdim=True)
        floor = mass.clamp(min=_TINY)
        need = (ordered @ self.dropped / floor).clamp(0.0, 1.0)
        return need, torch.cat([mass, ordered[:, :1] / floor], 1)
