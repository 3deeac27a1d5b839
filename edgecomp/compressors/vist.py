"""VIST's fast path: text rendered to strips is read by a frozen vision encoder, and a resampler replaces its tokens.

Paper: "Vision-centric Token Compression in Large Language Model" (arXiv:2502.00791). Rendering is preprocessing
(`edgecomp/strips.py`); the slow path is the language model; the masking of frequent words belongs to training alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from torch import Tensor, nn

from edgecomp.compressors._base import Compressor, Natural, Params, Positive
from edgecomp.compressors.perceiver import Perceiver, PerceiverParams
from edgecomp.errors import InvalidSpec
from edgecomp.specs import Output, Site, TensorSpec, TokenBudget

__all__ = ["Vist"]

_INSIDE = "resampler."


class VistParams(Params, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of VIST's fast path.

    Attributes:
        tokens: patches of one image of strips, where no host says how many.
        context_dim: width of the encoder's tokens, and of the latents; a host decides it.
        depth, num_heads, head_dim: of the resampler's layers.
        ff_mult: hidden width of their MLP over `context_dim`.
        table_rows: rows of the latent table, the summary token's among them; 0: one above the largest budget.
    """

    tokens: Positive = 256
    context_dim: Positive = 1024
    depth: Positive = 6
    num_heads: Positive = 8
    head_dim: Positive = 64
    ff_mult: Annotated[float, Meta(gt=0, le=64)] = 4.0
    table_rows: Natural = 0


class Vist(Compressor):
    """Replace the tokens of each image of strips by latents that have read the patches with ink.

    Shapes: tokens (B, N, C), patch_mask (B, N) bool, true where a patch holds ink -> latents (B, M, C). The images of
    one text are the batch: its buckets are 7, 14 and 28, and a text takes the smallest that holds it.

    Static rewrite (level E4): blank patches are masked by a finite bias; the first latent, which training compares with
    the text, takes part in all layers and is left out at the end. An image without any ink, behind the end of a text,
    has latents that read themselves: its rows are to be dropped.

    Source: arXiv:2502.00791, section 3 (fast path: strips, frozen encoder, resampler).
    """

    Params = VistParams
    params: VistParams
    width_param = "context_dim"
    unstored_params = ("head_dim",)

    def __init__(self, params: VistParams, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        super().__init__(params, site, budget, output)
        rows = budget.tokens_out + 1
        if rows > params.table_rows:
            raise InvalidSpec(
                f"vist: budget {budget.tokens_out} and the summary token take {rows} latents, and the table has "
                f"{params.table_rows}; lower the budget, or raise params.table_rows where no checkpoint fixes it"
            )
        inner = PerceiverParams(
            family="flamingo",
            tokens=site.tokens_in,
            context_dim=params.context_dim,
            depth=params.depth,
            num_heads=params.num_heads,
            head_dim=params.head_dim,
            ff_mult=params.ff_mult,
            latents=params.table_rows,
            mask=True,
        )
        self.resampler = Perceiver(inner, site, TokenBudget(budget.tokens_in, rows))

    @property
    def remarks(self) -> tuple[str, ...]:
        """What an export should say: one more latent is computed than comes out."""
        return (f"a batch is the images of a text; of {self.budget.tokens_out + 1} latents the first is left out",)

    def input_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `tokens` and `patch_mask`."""
        tokens, mask = self.resampler.input_specs(batch)
        return tokens, msgspec.structs.replace(mask, name="patch_mask")

    def output_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `latents`."""
        shape = (batch, self.budget.tokens_out, self.params.context_dim)
        return (TensorSpec("latents", shape, "float32", "tokens"),)

    def forward(self, tokens: Tensor, patch_mask: Tensor) -> tuple[Tensor, ...]:
        """Return the latents but the first."""
        return (self.resampler(tokens, patch_mask)[0][:, 1:],)

    def reference(self) -> nn.Module:
        """Return the eager resampler, one image at a time."""
        return VistOriginal(self)

    @classmethod
    def for_budgets(cls, params: VistParams, counts: Sequence[int]) -> VistParams:
        """Size the latent table by the largest budget where nothing else did."""
        return params if params.table_rows else msgspec.structs.replace(params, table_rows=max(counts) + 1)

    @classmethod
    def default_counts(cls, params: VistParams, site: Site) -> tuple[int, ...]:  # noqa: ARG003 - the table alone
        """Return all latents of a checkpoint but the summary token."""
        return (params.table_rows - 1,) if params.table_rows else ()

    @classmethod
    def infer_params(cls, state: Mapping[str, Tensor], params: VistParams) -> dict[str, Any]:
        """Return sizes and counts of a checkpoint; the head width comes from the parameters."""
        own = {key.removeprefix(_INSIDE): value for key, value in state.items() if key.startswith(_INSIDE)}
        found = Perceiver.infer_params(own, PerceiverParams(head_dim=params.head_dim))
        names = VistParams.__struct_fields__
        return {name: found[name] for name in names if name in found} | {"table_rows": found["latents"]}


class VistOriginal(nn.Module):
    """The resampler's eager original, and its latents without the summary token."""

    def __init__(self, static: Vist) -> None:
        super().__init__()
        self.resampler = static.resampler.reference()

    def forward(self, tokens: Tensor, patch_mask: Tensor) -> tuple[Tensor, ...]:
        """Return what the static module returns."""
        (latents,) = self.resampler(tokens, patch_mask)
        return (latents[:, 1:],)
