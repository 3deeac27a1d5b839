"""Adaptive LookupViT: one table of entries that look tokens up; a smaller budget takes the first of them.

The adaptive table of the project's founding notes, repaired: theirs draws a new random table at each call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from edgecomp.compressors.perceiver import Family, Perceiver, PerceiverParams
from edgecomp.errors import InvalidSpec
from edgecomp.specs import Output, Site, TokenBudget

__all__ = ["AdaptiveLookupViT"]

_NESTED = (32, 64, 96, 128)


class AdaptiveLookupViTParams(PerceiverParams, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of the adaptive table: those of the Perceiver's `cross-only` family, with a table of 128 entries."""

    family: Family = "cross-only"
    latents: int = 128


class AdaptiveLookupViT(Perceiver):
    """Look tokens up by the first M entries of one table, M of 32, 64, 96 and 128.

    Shapes: tokens (B, N, D), optional context_mask (B, N) -> latents (B, M, D).

    Static rewrite (level E4): entries attend to the tokens alone, never to each other, so that the first n rows of a
    larger graph are those of the graph for n: a product can cut a larger output, and a router can choose a graph.

    Source: the project's founding notes (adaptive LookupViT); LookupViT: arXiv:2407.12753.
    """

    Params = AdaptiveLookupViTParams
    params: AdaptiveLookupViTParams

    def __init__(self, params: Any, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        if params.family != "cross-only":
            raise InvalidSpec(
                f"params.family={params.family}: entries that read each other have no nested budgets; use the method "
                "perceiver for it"
            )
        super().__init__(params, site, budget, output)

    @classmethod
    def layout_of(cls, state: Mapping[str, Tensor]) -> str:  # noqa: ARG003 - the signature of all
        """Return "": there is no original whose checkpoints it could read."""
        return ""

    @classmethod
    def default_counts(cls, params: Any, site: Site) -> tuple[int, ...]:  # noqa: ARG003 - the signature of all
        """Return the nested budgets that the table holds."""
        return tuple(count for count in _NESTED if count <= params.latents)
