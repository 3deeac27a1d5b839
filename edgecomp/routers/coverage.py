"""Coverage router: the smallest bucket whose tokens hold a share of all scores.

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

__all__ = ["CoverageParams", "CoverageRouter"]

_TINY = 1e-30


class CoverageParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The share that a bucket must hold.

    Attributes:
        p: share of the sum of all scores.
    """

    p: Annotated[float, Meta(gt=0, lt=1)] = 0.9


class CoverageRouter(Router):
    """Send an image to the smallest bucket whose highest scores hold the share p of their sum.

    need[k] = 1 - the share of the scores that stays in bucket k, which is the share that it loses; a request goes above
    bucket k where that exceeds 1 - p, as far as float32 sums tell. The scores are those by which the method itself
    keeps tokens, and the count is of tokens that stay by them: contextual, diverse and residual tokens hold nothing.
    Inside a host the sum of attention up to the stem's end stands for all of it. Scores below zero count as zero, and
    where all are zero nothing is lost.

    It fits methods whose score is made of what the stem hands over: attention-pruning (inside a host by
    cumulative-attention alone), fastervlm, visionzip, vispruner and prumerge.

    Shapes: what the score is made of -> need (B, K - 1), signals (B, 2).

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
        if site.score is None:
            raise InvalidSpec(
                f"router {self.label} reads the score by which tokens stay, and the stem hands over "
                f"{', '.join(map(str, site.stem))}, of which this method makes none: it has no score, or makes it "
                "behind the stem; choose another --router, or a method such as attention-pruning or visionzip"
            )
        self.score = site.score
        places = torch.arange(site.tokens_in)[:, None]
        dropped = (places >= torch.tensor(self.score.kept[:-1])).to(torch.get_default_dtype())  # (N, K - 1)
        self.register_buffer("dropped", dropped, persistent=False)

    @property
    def stem_inputs(self) -> tuple[str, ...]:
        """What the score is made of."""
        return self.score.reads

    @property
    def default_thresholds(self) -> tuple[float, ...]:
        """The next float32 above 1 - p for all, since a bucket that holds p exactly holds enough."""
        return (next_above(1.0 - self.params.p),) * (len(self.site.buckets) - 1)

    def judge(self, *seen: Tensor) -> tuple[Tensor, Tensor]:
        """Return the share that each bucket loses; the sum of scores, and the highest one's share."""
        ordered = self.score.make(*seen).clamp(min=0.0).topk(self.site.tokens_in).values  # (B, N)
        mass = ordered.sum(1, keepdim=True)
        floor = mass.clamp(min=_TINY)
        need = (ordered @ self.dropped / floor).clamp(0.0, 1.0)
        return need, torch.cat([mass, ordered[:, :1] / floor], 1)
