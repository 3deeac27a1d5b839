"""Token Compensator: a model trained at one degree of merging runs at another, with queries and values corrected.

Paper: "Token Compensator: Altering Inference Cost of Vision Transformer without Re-Tuning" (ECCV 2024,
arXiv:2408.06798). The original, JieShibo/ToCom, has no licence: this is written from the formulas, and held to numbers
that the original gave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from msgspec import Meta
from torch import Tensor, nn

from edgecomp.compressors._checkpoint import load_exactly, rename_key
from edgecomp.compressors._inside import LowRank, Shift
from edgecomp.compressors.tome import ToMe, ToMeParams
from edgecomp.errors import InvalidSpec
from edgecomp.specs import Output, Site, TokenBudget

__all__ = ["ToCom"]

_DEGREES = 16  # of merging, r = 0 to 16, that an adapter's width is shared out to
_OWN = "_tocom."
_KEYS = ((r"^blocks\.(\d+)\.attn\.([qv])_tocom\.adapter_(down|up)\.", r"\2.\1.\3."),)


class ToComParams(ToMeParams, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of ToCom, with those of ToMe.

    Attributes:
        r_source: tokens that each block removed when the model was trained; 0: it was trained without merging.
        scale: of the correction; the original searches 0.05 to 0.15.
        adapter_dim: width of the adapters, a multiple of 16; a checkpoint decides it.
    """

    r_source: Annotated[int, Meta(ge=0, le=_DEGREES)] = 0
    scale: float = 0.1
    adapter_dim: Annotated[int, Meta(ge=_DEGREES, le=4096, multiple_of=_DEGREES)] = 32


class Adapter(nn.Module):
    """One matrix of low rank, without bias or activation: D -> D."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(inner, width, bias=False)


class ToCom(ToMe):
    """Merge as ToMe, at another r than the model was trained with, with low-rank corrections of queries and values.

    Shapes: as ToMe inside a host.

    Static rewrite (level E1): source and target r are fixed, so that each correction is a constant matrix; it is added
    to the weights of queries and values when exporting, and costs nothing at run time.

    Source: arXiv:2408.06798, sections 3.2 and 3.3; its target r is the largest that a block removes here.
    """

    Params = ToComParams
    params: ToComParams

    def __init__(self, params: ToComParams, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        super().__init__(params, site, budget, output)
        self.r_target = max(self.steps)
        if self.r_target > _DEGREES:
            raise InvalidSpec(
                f"r={self.r_target} is needed for budget {budget.tokens_out}, and the corrections know r up to "
                f"{_DEGREES}; keep more tokens"
            )
        width, inner = site.embed_dim, params.adapter_dim
        self.q = nn.ModuleList(Adapter(width, inner) for _ in range(site.depth))
        self.v = nn.ModuleList(Adapter(width, inner) for _ in range(site.depth))

    @property
    def remarks(self) -> tuple[str, ...]:
        """What an export should say: the schedule, and the degrees."""
        return (*super().remarks, f"corrected from r={self.params.r_source} to r={self.r_target}")

    def slots(self) -> Tensor:
        """Return what each slot of the adapters weighs: the last (d / 16) r belong to r, less those of the source."""
        inner = self.params.adapter_dim
        places = torch.arange(inner)
        source, target = (inner - inner // _DEGREES * r for r in (self.params.r_source, self.r_target))
        weights = (places >= target).to(torch.float64) - (places >= source).to(torch.float64)
        return weights.to(next(self.parameters()).dtype)

    def shift(self, block: int) -> Shift | None:
        """Return the corrections of a block's queries and values."""
        weights = self.params.scale * self.slots()
        parts = [adapters[block] for adapters in (self.q, self.v)]
        query, value = (LowRank(part.down.weight, weights, part.up.weight) for part in parts)  # type: ignore[arg-type, union-attr]
        return Shift(query, value)

    @classmethod
    def layout_of(cls, state: Mapping[str, Tensor]) -> str:
        """Return `tocom` for the original's keys."""
        return "tocom" if any(_OWN in key for key in state) else ""

    @classmethod
    def split_checkpoint(cls, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the adapters, and the host's tensors, whose keys are timm's."""
        if not cls.layout_of(state):
            return dict(state), {}
        own = {key: value for key, value in state.items() if _OWN in key}
        return own, {key: value for key, value in state.items() if key not in own}

    @classmethod
    def infer_params(cls, state: Mapping[str, Tensor], params: ToComParams) -> dict[str, Any]:  # noqa: ARG003 - the signature of all
        """Return the widths of the adapters."""
        for key, value in state.items():
            if rename_key(key, _KEYS) == "q.0.down.weight":
                adapter_dim, embed_dim = value.shape
                return {"adapter_dim": adapter_dim, "embed_dim": embed_dim}
        return {}

    def load_original(self, state: Mapping[str, Tensor], *, unread: Sequence[str] = ()) -> str:
        """Load the adapters of a checkpoint in the original's layout, which may hold the host too, or in our own."""
        layout = self.layout_of(state) or "edgecomp"
        own, _ = self.split_checkpoint(state)
        file_keys = {rename_key(key, _KEYS): key for key in own}
        load_exactly(
            self, {name: own[key] for name, key in file_keys.items()}, layout=layout, unread=unread, file_keys=file_keys
        )
        return layout
