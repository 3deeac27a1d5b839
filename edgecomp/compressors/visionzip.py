"""VisionZip: the tokens that the class token attends to most stay, the rest is gathered into contextual tokens.

Paper: "VisionZip: Longer is Better but Not Necessary in Vision Language Models" (arXiv:2412.04467), section 3.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from msgspec import Meta
from torch import Tensor, nn

from edgecomp.compressors._base import HostFeature, Natural
from edgecomp.compressors._pruning import PruneParams, TokenPruner, others, select
from edgecomp.compressors._tokens import take, top_k, unit_rows
from edgecomp.errors import InvalidSpec
from edgecomp.specs import Output, Site, TokenBudget

__all__ = ["VisionZip"]

_SHARE = 5 / 32  # of the budget that is contextual: the paper's 54 + 10, 108 + 20 and 162 + 30


class VisionZipParams(PruneParams, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of VisionZip, with those of `PruneParams`.

    Attributes:
        contextual: tokens of the budget that are contextual; 0: five of 32, as in the paper.
        prefix_tokens: class and register tokens in front of given tokens; a host says it itself.
    """

    contextual: Natural = 0
    prefix_tokens: Annotated[int, Meta(ge=0, le=64)] = 1


class VisionZip(TokenPruner):
    """Keep dominant tokens, and gather the others into contextual ones.

    Shapes: tokens (B, P + N, D) with the class token first, class_attention (B, H, N), keys (B, P + N, H d) -> kept
    (B, P + M, D): prefix tokens, dominant tokens in the order of the image, contextual tokens; index (B, P + M) int32,
    -1 for a contextual token. M is the budget, contextual tokens counted.

    Static rewrite (level E1): of the tokens that are not dominant, in their order, every s-th is a target; each other
    is assigned to the target of most similar key (mean over heads), and a target adds the mean of those assigned.

    Source: arXiv:2412.04467, sections 3.2 and 3.3.
    """

    Params = VisionZipParams
    params: VisionZipParams
    keeps_prefix = True

    def __init__(self, params: Any, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        super().__init__(params, site, budget, output)
        self.contextual = params.contextual or max(1, round(budget.tokens_out * _SHARE))
        self.dominant = budget.tokens_out - self.contextual
        rest = budget.tokens_in - self.dominant
        if self.dominant < 1:
            raise InvalidSpec(
                f"budget {budget.tokens_out} with {self.contextual} contextual tokens leaves {self.dominant} dominant "
                "ones; choose a larger budget or fewer params.contextual"
            )
        self.step = max(1, rest // self.contextual)

    @property
    def host_features(self) -> tuple[HostFeature, ...]:
        """The class token's attention, and the keys."""
        return ("class_attention", "keys")

    @property
    def remarks(self) -> tuple[str, ...]:
        """What an export should say: how the budget is shared."""
        return (f"{self.dominant} dominant and {self.contextual} contextual tokens",)

    @property
    def scored_by(self) -> tuple[str, ...]:
        """The class token's attention."""
        return ("class_attention",)

    @property
    def kept_by_score(self) -> int:
        """The dominant tokens."""
        return self.dominant

    def score_of(self, *read: Tensor) -> Tensor:
        """Return the class token's attention, summed over heads."""
        return read[0].sum(1)

    def metric(self, keys: Tensor) -> Tensor:
        """Return the mean over heads of the patches' keys: (B, P + N, H d) -> (B, N, d)."""
        patches = keys[:, self.num_prefix_tokens :]
        return patches.reshape(*patches.shape[:2], self.site.num_heads, -1).mean(2)

    def forward(self, tokens: Tensor, class_attention: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
        """Return prefix, dominant and contextual tokens, and where they came from."""
        prefix = self.num_prefix_tokens
        patches, unit = tokens[:, prefix:], unit_rows(self.metric(keys))
        count = patches.shape[1]
        dominant = select(self.score_of(class_attention), self.dominant, order=self.params.order)
        places = torch.arange(count, dtype=tokens.dtype, device=tokens.device)
        late = torch.where(others(dominant, count), places, places + count)
        rest = top_k(-late, count - self.dominant)  # ascending
        targets, merged = self._split(rest)
        contextual = take(patches, targets)
        if merged.shape[1]:
            nearest = (take(unit, merged) @ take(unit, targets).transpose(1, 2)).argmax(-1)  # (B, rest)
            slots = torch.arange(self.contextual, device=tokens.device).unsqueeze(-1)
            members = (nearest.unsqueeze(1) == slots).to(tokens.dtype)
            contextual = contextual + members @ take(patches, merged) / members.sum(-1, keepdim=True).clamp(min=1.0)
        front = torch.arange(prefix, device=tokens.device).expand(tokens.shape[0], -1)
        index = torch.cat([front, dominant + prefix, torch.full_like(targets, -1)], 1)
        return torch.cat([tokens[:, :prefix], take(patches, dominant), contextual], 1), index.to(torch.int32)

    def _split(self, rest: Tensor) -> tuple[Tensor, Tensor]:
        """Return every s-th of the rest, and all others: (B, R) -> (B, contextual), (B, R - contextual)."""
        chosen = list(range(0, self.step * self.contextual, self.step))
        left = [place for place in range(rest.shape[1]) if place not in set(chosen)]
        pick = torch.tensor(chosen, device=rest.device), torch.tensor(left, dtype=torch.int64, device=rest.device)
        return rest[:, pick[0]], rest[:, pick[1]]

    def reference(self) -> nn.Module:
        """Return plain loops over samples."""
        return VisionZipOriginal(self)


class VisionZipOriginal(nn.Module):
    """The eager original: masks and loops, one sample at a time."""

    def __init__(self, static: VisionZip) -> None:
        super().__init__()
        self.static = static

    def forward(self, tokens: Tensor, class_attention: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
        """Return what the static module returns."""
        prefix = self.static.num_prefix_tokens
        samples = []
        for x, attention, key in zip(tokens, class_attention, keys, strict=True):
            kept, index = self._sample(x[prefix:], attention.sum(0), key[prefix:])
            index = torch.where(index < 0, index, index + prefix)
            samples.append((torch.cat([x[:prefix], kept]), torch.cat([torch.arange(prefix), index]).to(torch.int32)))
        return tuple(torch.stack(part) for part in zip(*samples, strict=True))

    def _sample(self, x: Tensor, score: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        static = self.static
        dominant = torch.argsort(score, descending=True, stable=True)[: static.dominant]
        if static.params.order == "raster":
            dominant = dominant.sort().values
        mask = torch.ones(len(x), dtype=torch.bool)
        mask[dominant] = False
        rest = mask.nonzero()[:, 0].tolist()
        targets = rest[:: static.step][: static.contextual]
        metric = torch.stack(key.chunk(static.site.num_heads, dim=-1)).sum(0) / static.site.num_heads
        groups: dict[int, list[int]] = {target: [] for target in targets}
        for token in rest:
            if token not in groups:
                likeness = [self._cosine(metric[token], metric[target]) for target in targets]
                groups[targets[int(torch.stack(likeness).argmax())]].append(token)
        contextual = [x[t] + x[group].mean(0) if group else x[t] for t, group in groups.items()]
        index = torch.cat([dominant, torch.full((len(targets),), -1)])
        return torch.cat([x[dominant], torch.stack(contextual)]), index

    @staticmethod
    def _cosine(a: Tensor, b: Tensor) -> Tensor:
        length = a.norm() * b.norm()
        return (a @ b) / length if length > 0 else torch.zeros_like(length)
