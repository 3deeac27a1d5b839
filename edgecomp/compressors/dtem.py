"""DTEM: tokens merge as in ToMe, and a small learned head in each block says how alike they are.

Paper: "Learning to Merge Tokens via Decoupled Embedding for Efficient Vision Transformers" (NeurIPS 2024,
arXiv:2412.10569), its evaluation path. The original, movinghoon/DTEM, has no licence: this is written from the
formulas, and held to numbers that the original gave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from edgecomp.compressors._base import Positive
from edgecomp.compressors._checkpoint import load_exactly, rename_key
from edgecomp.compressors._inside import BlockState
from edgecomp.compressors._merging import Merged, MergeParams, OriginalMerger, TokenMerger
from edgecomp.compressors.tome import bipartite_soft_matching
from edgecomp.specs import Output, Site, TokenBudget

__all__ = ["DTEM"]

_HEAD = ".attn.qkv.metric_layer."
_JOINT = (".attn.qkv.weight", ".attn.qkv.bias")
_HEAD_KEYS = ((r"^blocks\.(\d+)\.attn\.qkv\.metric_layer\.", r"heads.\1."),)
_HOST_KEYS = ((r"\.attn\.qkv\.qkv_layer\.", ".attn.qkv."),)


class DTEMParams(MergeParams, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of DTEM, with those of `MergeParams`.

    Attributes:
        metric_dim: width of the learned metric; a checkpoint decides it.
    """

    metric_dim: Positive = 64


class DTEM(TokenMerger):
    """Merge the r pairs of tokens in each block that a learned head finds most alike.

    Shapes: image (B, 3, S, S) inside a host -> tokens (B, P + M, D), sizes (B, P + M, 1) and source map (B, P + N), or
    the host's logits.

    Static rewrite (level E1): ToMe's, with the metric of a linear head on what the attention reads. The soft matching
    of training is not here: in evaluation the original matches as ToMe does.

    Source: arXiv:2412.10569, decoupled embedding; matching and proportional attention as in
    arXiv:2210.09461.
    """

    Params = DTEMParams
    params: DTEMParams
    ranking_params: ClassVar[tuple[str, ...]] = ("heads.*",)

    def __init__(self, params: DTEMParams, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        super().__init__(params, site, budget, output)
        self.heads = nn.ModuleList(nn.Linear(site.embed_dim, params.metric_dim) for _ in range(site.depth))

    def metric(self, block: int, state: BlockState) -> Tensor:
        """Return what the head of a block makes of the tokens that the attention reads."""
        return self.heads[block](state.normed)  # type: ignore[no-any-return]

    def reference(self) -> nn.Module:
        """Return ToMe's full ranking and scattered sums, with the head's metric."""
        return DTEMOriginal(self)

    @classmethod
    def layout_of(cls, state: Mapping[str, Tensor]) -> str:
        """Return `dtem` for the original's keys."""
        return "dtem" if any(_HEAD in key for key in state) else ""

    @classmethod
    def split_checkpoint(cls, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the heads, with the joint matrices that repeat them, and the host's tensors under timm's keys."""
        if not cls.layout_of(state):
            return dict(state), {}
        own = {key: value for key, value in state.items() if _HEAD in key or key.endswith(_JOINT)}
        return own, {rename_key(key, _HOST_KEYS): value for key, value in state.items() if key not in own}

    @classmethod
    def infer_params(cls, state: Mapping[str, Tensor], params: DTEMParams) -> dict[str, Any]:  # noqa: ARG003 - the signature of all
        """Return the widths of the heads."""
        for key, value in state.items():
            if rename_key(key, _HEAD_KEYS) == "heads.0.weight":
                metric_dim, embed_dim = value.shape
                return {"metric_dim": metric_dim, "embed_dim": embed_dim}
        return {}

    def load_original(self, state: Mapping[str, Tensor], *, unread: Sequence[str] = ()) -> str:
        """Load the heads of a checkpoint in the original's layout, which holds the host too, or in edgecomp's own."""
        layout = self.layout_of(state) or "edgecomp"
        own, _ = self.split_checkpoint(state)
        file_keys = {rename_key(key, _HEAD_KEYS): key for key in own}
        heads = {name: own[key] for name, key in file_keys.items()}
        load_exactly(self, heads, layout=layout, unread=unread, file_keys=file_keys)
        return layout


class DTEMOriginal(OriginalMerger):
    """The eager original of the evaluation path."""

    static: DTEM

    def reduce(self, block: int, state: BlockState) -> Merged:
        """Merge the tokens between attention and MLP of a block."""
        static: Any = self.static
        metric = F.linear(state.normed, static.heads[block].weight, static.heads[block].bias)
        r, prefix = static.steps[block], static.num_prefix_tokens
        return bipartite_soft_matching(metric, state.tokens, state.size, r, prefix, static.order == "ascending")
