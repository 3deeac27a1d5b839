"""Matryoshka (M3): the token grid averaged to coarser and coarser grids, each nested in the next.

Paper: "Matryoshka Multimodal Models" (arXiv:2405.17430), section 3. The released code is mu-cai/matryoshka-mm, at the
commit in `export/recipes/matryoshka.toml`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from edgecomp.compressors._base import Compressor, Natural, Params, Positive, constant
from edgecomp.compressors._checkpoint import load_exactly, part_with
from edgecomp.compressors._eager import gelu
from edgecomp.compressors._grid import adaptive_line, grid_sides, resample_grid
from edgecomp.compressors._keys import KeyMap
from edgecomp.errors import InvalidSpec, WeightsError
from edgecomp.specs import Output, Site, TensorSpec, TokenBudget

__all__ = ["Matryoshka"]

_NESTED = (
    1,
    2,
    4,
    8,
)  # sides of the squares that are averaged, beside the whole grid: 576, 144, 36, 9 and 1 of 24 x 24


class MatryoshkaParams(Params, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of Matryoshka pooling.

    Attributes:
        tokens: tokens handed over where no host says how many.
        embed_dim: width of the tokens; a host decides it.
        output_dim: width of LLaVA's projector (Linear, GELU, Linear), which stands before the pooling; 0: none.
    """

    tokens: Positive = 576
    embed_dim: Positive = 1024
    output_dim: Natural = 0


class Matryoshka(Compressor):
    """Average each p x p square of a grid of tokens; the buckets 576, 144, 36, 9 and 1 share all weights.

    Shapes: tokens (B, N, C), N a square -> pooled (B, N / p^2, C or O) in raster order; p divides the side.

    Static rewrite: nothing in the original depends on data (level E0). Averaging is a constant matrix, applied in its
    two factors. The projector's second layer is linear, so that it maps the averages instead of all tokens: equal but
    for the order of sums.

    Source: arXiv:2405.17430; mu-cai/matryoshka-mm, llava/model/llava_arch.py, matryoshka_vis_token_process.
    """

    Params = MatryoshkaParams
    reads_grid = True
    pool: Tensor

    def __init__(self, params: MatryoshkaParams, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        super().__init__(params, site, budget, output)
        possible = self.possible_counts(params, site)
        if budget.tokens_out not in possible:
            raise InvalidSpec(
                f"matryoshka: budget {budget.tokens_out} is no average over squares that fill the grid of "
                f"{budget.tokens_in} tokens; budgets that are: {', '.join(map(str, possible))}"
            )
        line = adaptive_line(math.isqrt(budget.tokens_in), math.isqrt(budget.tokens_out))
        self.register_buffer("pool", constant(line), persistent=False)  # (q, h)
        if params.output_dim:
            self.fc1 = nn.Linear(params.embed_dim, params.output_dim)
            self.fc2 = nn.Linear(params.output_dim, params.output_dim)

    def input_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `tokens`."""
        return (TensorSpec("tokens", (batch, self.budget.tokens_in, self.params.embed_dim), "float32", "tokens"),)

    def output_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `pooled`."""
        shape = (batch, self.budget.tokens_out, self.params.output_dim or self.params.embed_dim)
        return (TensorSpec("pooled", shape, "float32", "tokens"),)

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Return the averages."""
        x = F.gelu(self.fc1(tokens)) if self.params.output_dim else tokens
        if self.budget.tokens_out < self.budget.tokens_in:
            x = resample_grid(x, self.pool, self.pool)
        return (self.fc2(x) if self.params.output_dim else x,)

    def reference(self) -> nn.Module:
        """Return the original's forward pass on this module's parameters."""
        return MatryoshkaOriginal(self)

    @classmethod
    def possible_counts(cls, params: MatryoshkaParams, site: Site) -> tuple[int, ...]:  # noqa: ARG003
        """Return the token counts of all grids that nest in the given one."""
        side, _ = grid_sides(site.tokens_in, 0, method="matryoshka", what="tokens in")
        return tuple(target**2 for target in range(1, side + 1) if side % target == 0)

    @classmethod
    def default_counts(cls, params: MatryoshkaParams, site: Site) -> tuple[int, ...]:  # noqa: ARG003
        """Return the published nesting: squares of 1, 2, 4 and 8, and the whole grid."""
        side = math.isqrt(site.tokens_in)
        return tuple(sorted({(side // square) ** 2 for square in (*_NESTED, side) if side % square == 0}))

    @classmethod
    def layout_of(cls, state: Mapping[str, Tensor]) -> str:
        """Return `llava`, or `llava-hf` as transformers names the same projector; "" for edgecomp's own."""
        return "" if "fc2.weight" in state else _part(state)[0]

    @classmethod
    def infer_params(cls, state: Mapping[str, Tensor], params: MatryoshkaParams) -> dict[str, Any]:  # noqa: ARG003
        """Return the projector's widths."""
        own, _ = _to_own_keys(state)
        width, channels = own["fc1.weight"].shape
        return {"output_dim": width, "embed_dim": channels}

    def load_original(self, state: Mapping[str, Tensor], *, unread: Sequence[str] = ()) -> str:
        """Load LLaVA's projector out of an M3 checkpoint, or edgecomp's own layout."""
        layout = self.layout_of(state) or "edgecomp"
        own, file_keys = _to_own_keys(state)
        load_exactly(self, own, layout=layout, unread=unread, file_keys=file_keys)
        return layout

    @property
    def key_maps(self) -> Mapping[str, KeyMap]:
        """LLaVA's names, its own and transformers'."""
        return _MAPS


#: LLaVA's own release, and transformers' classes.
_MAPS = {
    "llava": KeyMap(("mm_projector.{0,2}.**", "{fc1,fc2}.**")),
    "llava-hf": KeyMap(("multi_modal_projector.linear_{1,2}.**", "{fc1,fc2}.**")),
}
_ANCHORS = {"llava": "mm_projector.2.weight", "llava-hf": "multi_modal_projector.linear_2.weight"}


def _part(state: Mapping[str, Tensor]) -> tuple[str, dict[str, str]]:
    """Return the layout, and name without a whole model's prefix -> name in the file, of the projector's tensors."""
    for layout, anchor in _ANCHORS.items():
        projector = anchor.partition(".")[0]
        part = {short: key for short, key in part_with(state, anchor).items() if short.startswith(f"{projector}.")}
        if part:
            return layout, part
    return "", {}


def _to_own_keys(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """Return the tensors under this module's keys, and what the file calls each of these."""
    if "fc2.weight" in state:
        return dict(state), None
    layout, part = _part(state)
    own, file_keys = _MAPS[layout].read(state, part) if layout else ({}, {})
    if "fc1.weight" not in own:
        raise WeightsError(
            "matryoshka pools and has weights only in LLaVA's projector, mm_projector.0 and mm_projector.2, or "
            "multi_modal_projector.linear_1 and linear_2; first keys "
            f"here: {', '.join(list(state)[:5])}. Give a checkpoint that holds them, or none"
        )
    return own, file_keys


class MatryoshkaOriginal(nn.Module):
    """The eager original on the parameters of a `Matryoshka`: all tokens are projected, then averaged as planes."""

    def __init__(self, static: Matryoshka) -> None:
        super().__init__()
        self.static = static

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Return what the static module returns."""
        static, budget = self.static, self.static.budget
        x = tokens
        if static.params.output_dim:
            x = F.linear(x, static.fc1.weight, static.fc1.bias)
            x = gelu(x)
            x = F.linear(x, static.fc2.weight, static.fc2.bias)
        side = math.isqrt(budget.tokens_in)
        planes = x.reshape(len(x), side, side, -1).permute(0, 3, 1, 2)
        square = int((budget.tokens_in / budget.tokens_out) ** 0.5)
        planes = F.avg_pool2d(planes, kernel_size=square, stride=square)
        return (planes.permute(0, 2, 3, 1).reshape(len(x), budget.tokens_out, -1),)
