"""Pixel shuffle: each square of tokens becomes one token of their joined channels, and an MLP maps it.

The connectors of InternVL (arXiv:2404.16821), Idefics3 and SmolVLM (arXiv:2408.12637), and the patch mergers of
Qwen2-VL (arXiv:2409.12191) and Qwen2.5-VL (arXiv:2502.13923), as transformers has them; its release stands in
`export/recipes/pixel-shuffle.toml`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgecomp.compressors._base import Compressor, Natural, Params, Positive
from edgecomp.compressors._checkpoint import load_exactly, part_with
from edgecomp.compressors._eager import gelu
from edgecomp.compressors._grid import gather_groups, grid_sides
from edgecomp.compressors._keys import KeyMap
from edgecomp.compressors._norms import RMSNorm
from edgecomp.errors import InvalidSpec, WeightsError
from edgecomp.specs import Output, Site, TensorSpec, TokenBudget

__all__ = ["PixelShuffle"]

Family = Literal["internvl", "idefics3", "qwen2-vl", "qwen2.5-vl"]

_QWEN = ("qwen2-vl", "qwen2.5-vl")
_INTERNVL_EPS, _QWEN_EPS = 1e-5, 1e-6


class PixelShuffleParams(Params, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of the space-to-depth connectors.

    Attributes:
        family: `internvl`: norm of the joined channels, then an MLP of the output's width; `idefics3`: one matrix
            without bias; `qwen2-vl`: LayerNorm of each token, then an MLP of the joined width; `qwen2.5-vl`: the same
            with RMSNorm.
        tokens: tokens handed over where no host says how many.
        embed_dim: width of the tokens; a host decides it.
        output_dim: width of what comes out: a language model's.
        factor: side of the square of tokens that becomes one.
        order: `raster`, as a vision transformer gives tokens; `grouped`: the tokens of one square follow each other, as
            Qwen's own preprocessing lays its patches.
        grid_rows: rows of the grid of tokens in raster order; 0: it is square.
    """

    family: Family = "internvl"
    tokens: Positive = 1024
    embed_dim: Positive = 1024
    output_dim: Positive = 4096
    factor: Positive = 2
    order: Literal["raster", "grouped"] = "raster"
    grid_rows: Natural = 0

    @property
    def joined(self) -> int:
        """Width of one token of joined channels."""
        return self.embed_dim * self.factor**2


class PixelShuffle(Compressor):
    """Join the channels of each factor x factor square of tokens, and map them to another width.

    Shapes: tokens (B, N, C) -> merged (B, N / s^2, O), in raster order of the squares. The factor s decides M; it is
    part of the weights' shapes, so that a bundle holds one budget.

    Static rewrite: nothing in the original depends on data (level E0). The two reshapes with a transpose after each are
    one, which leaves channels in the same order, (row, column, channel); grouped tokens need none.

    Source: transformers, InternVLModel.pixel_shuffle, Idefics3Connector, Qwen2-VL's PatchMerger, Qwen2_5_VLPatchMerger.
    """

    Params = PixelShuffleParams
    reads_grid = True
    unstored_params = ("factor", "order", "grid_rows")
    zero_means: ClassVar[Mapping[str, str]] = {"grid_rows": "a square grid"}

    def __init__(self, params: PixelShuffleParams, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        super().__init__(params, site, budget, output)
        self.grid = _grid(params, budget.tokens_in)
        expected = budget.tokens_in // params.factor**2
        if budget.tokens_out != expected:
            raise InvalidSpec(
                f"pixel-shuffle: factor {params.factor} makes {expected} of {budget.tokens_in} tokens, so that budget "
                f"{budget.tokens_out} is not possible; drop it, or --set params.factor"
            )
        if params.family == "internvl":
            self.norm: nn.Module = nn.LayerNorm(params.joined, eps=_INTERNVL_EPS)
        elif params.family == "qwen2-vl":
            self.norm = nn.LayerNorm(params.embed_dim, eps=_QWEN_EPS)
        elif params.family == "qwen2.5-vl":
            self.norm = RMSNorm(params.embed_dim, eps=_QWEN_EPS)
        if params.family == "idefics3":
            self.fc2 = nn.Linear(params.joined, params.output_dim, bias=False)
        else:
            hidden = params.output_dim if params.family == "internvl" else params.joined
            self.fc1 = nn.Linear(params.joined, hidden)
            self.fc2 = nn.Linear(hidden, params.output_dim)

    def input_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `tokens`."""
        return (TensorSpec("tokens", (batch, self.budget.tokens_in, self.params.embed_dim), "float32", "tokens"),)

    def output_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `merged`."""
        shape = (batch, self.budget.tokens_out, self.params.output_dim)
        return (TensorSpec("merged", shape, "float32", "tokens"),)

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Return the mapped squares."""
        params = self.params
        x = self.norm(tokens) if params.family in _QWEN else tokens
        if params.order == "raster":
            x = gather_groups(x, *self.grid, params.factor)
        x = x.reshape(tokens.shape[0], self.budget.tokens_out, params.joined)
        if params.family == "idefics3":
            return (self.fc2(x),)
        if params.family == "internvl":
            x = self.norm(x)
        return (self.fc2(F.gelu(self.fc1(x))),)

    def reference(self) -> nn.Module:
        """Return the original's forward pass on this module's parameters."""
        return PixelShuffleOriginal(self)

    @classmethod
    def possible_counts(cls, params: PixelShuffleParams, site: Site) -> tuple[int, ...]:
        """Return the one count that the factor makes."""
        _grid(params, site.tokens_in)
        return (site.tokens_in // params.factor**2,)

    @classmethod
    def layout_of(cls, state: Mapping[str, Tensor]) -> str:
        """Return the family that the keys tell; InternVL's own release has another layout than transformers."""
        return _tell(state)[0]

    @classmethod
    def infer_params(cls, state: Mapping[str, Tensor], params: PixelShuffleParams) -> dict[str, Any]:
        """Return the family and the widths of a checkpoint."""
        family, _, own, _ = _read(state, params.family)
        output, hidden = own["fc2.weight"].shape
        joined = own["fc1.weight"].shape[1] if "fc1.weight" in own else hidden
        found: dict[str, Any] = {"family": family, "output_dim": output}
        if family in _QWEN and "norm.weight" in own:
            found["embed_dim"] = own["norm.weight"].shape[0]
            found["factor"] = round((joined / found["embed_dim"]) ** 0.5)
        else:  # the factor is not stored: a preset or --set tells it
            found["embed_dim"] = joined // params.factor**2
        return found

    def load_original(self, state: Mapping[str, Tensor], *, unread: Sequence[str] = ()) -> str:
        """Load the connector of any of the families, from a whole model or alone, or edgecomp's own layout."""
        _, layout, own, file_keys = _read(state, self.params.family)
        layout = layout or "edgecomp"
        load_exactly(self, own, layout=layout, unread=unread, file_keys=file_keys)
        return layout

    @property
    def key_maps(self) -> Mapping[str, KeyMap]:
        """The names of this family."""
        return {layout: keys for layout, (family, _, keys) in _LAYOUTS.items() if family == self.params.family}


def _grid(params: PixelShuffleParams, count: int) -> tuple[int, int]:
    """Return the grid's sides; of grouped tokens their number alone counts."""
    factor = params.factor
    if params.order == "grouped":
        if count % factor**2:
            raise InvalidSpec(
                f"pixel-shuffle: {count} grouped tokens are no multiple of {factor} x {factor} = {factor**2}; give an "
                "image whose sides are multiples of it"
            )
        return count // factor, factor
    rows, columns = grid_sides(count, params.grid_rows, method="pixel-shuffle", what="tokens in", param="grid_rows")
    if rows % factor or columns % factor:
        fitting = [str(side) for side in range(1, min(rows, columns) + 1) if rows % side == 0 == columns % side]
        raise InvalidSpec(
            f"pixel-shuffle: a grid of {rows} x {columns} tokens does not fall into squares of {factor} x {factor}; "
            f"factors that fit it: {', '.join(fitting)}; or choose an image size whose grid is a multiple of {factor}"
        )
    return rows, columns


_QWEN_MAP = KeyMap(("ln_q.**", "norm.**"), ("mlp.{0,2}.**", "fc{1,2}.**"))
# layout -> family, the keys that tell it, and the names side by side
_LAYOUTS: dict[str, tuple[Family, tuple[str, ...], KeyMap]] = {
    "internvl": (
        "internvl",
        ("linear_2.weight", "layer_norm.weight"),
        KeyMap(("layer_norm.**", "norm.**"), ("linear_{1,2}.**", "fc{1,2}.**")),
    ),
    "internvl-mlp1": (
        "internvl",
        ("mlp1.3.weight",),
        KeyMap(("mlp1.{0,1,3}.**", "{norm,fc1,fc2}.**")),
    ),
    "idefics3": (
        "idefics3",
        ("modality_projection.proj.weight",),
        KeyMap(("modality_projection.proj.**", "fc2.**")),
    ),
    "qwen2-vl": ("qwen2-vl", ("ln_q.bias", "mlp.2.weight"), _QWEN_MAP),
    "qwen2.5-vl": ("qwen2.5-vl", ("ln_q.weight", "mlp.2.weight"), _QWEN_MAP),
}


def _tell(state: Mapping[str, Tensor]) -> tuple[str, dict[str, str]]:
    """Return the layout, and name without a whole model's prefix -> name in the file; none where it is in none."""
    if "fc2.weight" in state:
        return "", {}
    for layout, (_, (anchor, *others), keys) in _LAYOUTS.items():
        part = part_with(state, anchor) if any(key.endswith(anchor) for key in state) else {}
        if part and all(other in part for other in others):
            return layout, {short: key for short, key in part.items() if keys.knows(short)}
    return "", {}


def _read(state: Mapping[str, Tensor], family: Family) -> tuple[Family, str, dict[str, Tensor], dict[str, str] | None]:
    """Return family, layout, the tensors under this module's keys, and what the file calls each."""
    layout, part = _tell(state)
    if not layout and "fc2.weight" in state:
        return family, "", dict(state), None
    if not layout:
        raise WeightsError(
            f"weights are in none of the layouts {', '.join(_LAYOUTS)} or edgecomp; first keys: "
            f"{', '.join(list(state)[:5])}. Give a checkpoint of one of these connectors"
        )
    told, _, keys = _LAYOUTS[layout]
    return told, layout, *keys.read(state, part)


class PixelShuffleOriginal(nn.Module):
    """The eager originals on the parameters of a `PixelShuffle`: rows and columns are folded one after the other."""

    def __init__(self, static: PixelShuffle) -> None:
        super().__init__()
        self.static = static

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Return what the static module returns."""
        static, family = self.static, self.static.params.family
        joined = self._join_normed(tokens) if family in _QWEN else self._shuffle(tokens)
        if family == "idefics3":
            return (torch.einsum("bmj,oj->bmo", joined, static.fc2.weight),)
        if family == "internvl":
            joined = self._norm(joined)
        hidden = joined @ static.fc1.weight.T + static.fc1.bias
        return (gelu(hidden) @ static.fc2.weight.T + static.fc2.bias,)

    def _shuffle(self, tokens: Tensor) -> Tensor:
        """Fold columns into channels, then rows: (B, N, C) -> (B, M, s s C)."""
        params, (rows, columns) = self.static.params, self.static.grid
        factor, batch = params.factor, len(tokens)
        if params.order == "grouped":
            return tokens.reshape(batch, -1, params.joined)
        x = tokens.reshape(batch, rows, columns // factor, params.embed_dim * factor)
        x = x.permute(0, 2, 1, 3).reshape(batch, columns // factor, rows // factor, params.joined)
        return x.permute(0, 2, 1, 3).reshape(batch, -1, params.joined)

    def _join_normed(self, tokens: Tensor) -> Tensor:
        """Put the tokens of a square behind each other, as Qwen's preprocessing does, norm them, and join them."""
        params, (rows, columns) = self.static.params, self.static.grid
        samples = []
        for sample in tokens:
            grouped = sample
            if params.order == "raster":
                squares = sample.reshape(rows, columns, -1).split(params.factor, dim=0)
                cells = [cell for band in squares for cell in band.split(params.factor, dim=1)]
                grouped = torch.cat([cell.flatten(0, 1) for cell in cells])
            samples.append(self._norm(grouped).reshape(-1, params.joined))
        return torch.stack(samples)

    def _norm(self, x: Tensor) -> Tensor:
        norm: Any = self.static.norm
        if isinstance(norm, RMSNorm):
            return norm.weight * (x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps))
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
