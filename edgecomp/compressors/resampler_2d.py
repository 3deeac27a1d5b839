"""The 2-D resampler: a grid of queries reads an image's tokens in one cross-attention that knows their places.

Papers: "Qwen-VL" (arXiv:2308.12966), section 2.1, and "MiniCPM-V" (arXiv:2408.01800), section 3.1. One module carries
the weight families of Qwen-VL, OmniLMM, MiniCPM-V and LLaVA-UHD (commits in `export/recipes/resampler-2d.toml`).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgecomp.compressors._attention import key_bias
from edgecomp.compressors._base import Positive, constant
from edgecomp.compressors._grid import sincos_grid, sincos_line
from edgecomp.compressors._resampler import EPS, GridParams, GridResampler
from edgecomp.errors import InvalidSpec
from edgecomp.specs import Output, Site, TensorSpec, TokenBudget

__all__ = ["Resampler2d"]


class Resampler2dParams(GridParams, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of the 2-D resampler, with those of `GridParams`; the families differ in three flags.

    Attributes:
        query_places: add positions to the queries (Qwen-VL, OmniLMM, MiniCPM-V 2.0; not LLaVA-UHD, MiniCPM-V 2.5 on).
        key_places: `resized`, the stored table of the query grid, bicubically; or `absolute`, a sine-cosine table of
            the keys' own grid (MiniCPM-V 2.0 on), which no checkpoint stores.
        target_sizes: take rows and columns of each image, whose tokens stand in front in raster order; what is behind
            them is padding (MiniCPM-V 2.5 on). It goes with `absolute`.
        most_side: rows and columns that `target_sizes` may name.
    """

    query_places: bool = True
    key_places: Literal["resized", "absolute"] = "resized"
    target_sizes: bool = False
    most_side: Positive = 70


class Resampler2d(GridResampler):
    """Replace the N tokens of an image by M queries that have read them.

    Shapes: tokens (B, [I,] N, C), optional target_sizes (B, [I,] 2) int32, rows and columns -> latents (B, [I,] M, D).
    I images are an axis where `images` is above 1.

    Static rewrite: with one grid nothing in the original depends on data (level E0): the bicubic resize of the position
    table is a constant matrix, applied when weights are loaded. With target sizes the original cuts a table and pads to
    the longest image of the batch; here each place is worked out from the sizes by whole numbers (row i // columns,
    column i - row * columns), read off a sine-cosine line, and keys from rows * columns on get a bias of -1e30. An
    image of size 0 reads zeros, where the original gives NaN.

    Source: Qwen-VL's and MiniCPM-V's `Resampler`; arXiv:2308.12966, section 2.1.
    """

    Params = Resampler2dParams
    reads_grid = True
    params: Resampler2dParams
    line: Tensor
    own_places: Tensor

    def __init__(self, params: Resampler2dParams, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        super().__init__(params, site, budget, output)
        if params.target_sizes:
            self.register_buffer(
                "line", constant(sincos_line(params.most_side, params.embed_dim // 2)), persistent=False
            )
        elif params.key_places == "absolute":
            table = constant(sincos_grid(*self.grid, params.embed_dim))
            self.register_buffer("own_places", table, persistent=False)

    @property
    def stores_places(self) -> bool:
        """Whether the table of the query grid is part of a checkpoint."""
        return self.params.query_places or self.params.key_places == "resized"

    def _require_consistent(self) -> None:
        super()._require_consistent()
        if self.params.target_sizes and self.params.key_places != "absolute":
            raise InvalidSpec(
                f"resampler-2d: params.target_sizes goes with key_places=absolute, not {self.params.key_places}: a "
                "table resized to each image is no constant. Export one bundle for each grid, with params.rows"
            )

    def input_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `tokens`, and `target_sizes` where the parameters ask for it."""
        specs = super().input_specs(batch)
        if not self.params.target_sizes:
            return specs
        most = min(self.params.most_side, self.site.tokens_in)
        shape = (batch, *self.media_shape, 2)
        return (*specs, TensorSpec("target_sizes", shape, "int32", "sizes", most, self.site.tokens_in))

    def forward(self, tokens: Tensor, target_sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return what the queries read."""
        values = self.project(tokens)
        bias = keep = None
        if target_sizes is None:
            keys = values + (self.own_places if self.params.key_places == "absolute" else self.key_places)
        else:
            places, mask = self._places(target_sizes.reshape(-1, 2))
            keys = values + places
            bias, keep = key_bias(mask, values)
        queries = self.ln_q(self.query)
        if self.params.query_places:
            queries = queries + self.pos_embed
        return (self.finish(self.attn(queries.unsqueeze(0), keys, values, bias, keep)),)

    def _places(self, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the positions of all keys, (B, N, D), and which of them are real, (B, N)."""
        rows, columns = sizes[:, :1], sizes[:, 1:]
        index = torch.arange(self.site.tokens_in, dtype=sizes.dtype, device=sizes.device).unsqueeze(0)  # (1, N)
        row = torch.div(index, columns.clamp(min=1), rounding_mode="trunc")
        column = index - row * columns
        last = self.params.most_side - 1
        places = [F.embedding(place.clamp(min=0, max=last), self.line) for place in (column, row)]
        return torch.cat(places, dim=-1), index < rows * columns

    def reference(self) -> nn.Module:
        """Return the original's forward pass on this module's parameters."""
        return Resampler2dOriginal(self)


class Resampler2dOriginal(nn.Module):
    """The eager original, one image and one head at a time; padding is cut off instead of masked."""

    def __init__(self, static: Resampler2d) -> None:
        super().__init__()
        self.static = static

    def forward(self, tokens: Tensor, target_sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return what the static module returns."""
        static = self.static
        images = tokens.flatten(0, -3)
        if target_sizes is None:
            sizes = [static.grid] * len(images)
        else:
            sizes = [(int(rows), int(columns)) for rows, columns in target_sizes.reshape(-1, 2)]
        read = [
            self._image(image[: rows * columns], rows, columns)
            for image, (rows, columns) in zip(images, sizes, strict=True)
        ]
        return (torch.stack(read).reshape(*tokens.shape[:-2], *read[0].shape),)

    def _image(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        static: Any = self.static
        width, heads = static.params.embed_dim, static.params.heads
        x = tokens if static.params.context_dim == width else tokens @ static.kv_proj.weight.T
        x = F.layer_norm(x, (width,), static.ln_kv.weight, static.ln_kv.bias, EPS)
        q = F.layer_norm(static.query, (width,), static.ln_q.weight, static.ln_q.bias, EPS)
        if static.params.query_places:
            q = q + static.pos_embed
        attn, keys = static.attn, x + self._key_places(rows, columns, x)
        parts = [layer(given).chunk(heads, -1) for layer, given in ((attn.to_q, q), (attn.to_k, keys), (attn.to_v, x))]
        read = []
        for query, key, value in zip(*parts, strict=True):
            weights = torch.softmax(torch.einsum("md,nd->mn", query, key) / math.sqrt(width // heads), dim=1)
            read.append(torch.einsum("mn,nd->md", weights, value))
        out = F.layer_norm(attn.to_out(torch.cat(read, 1)), (width,), static.ln_post.weight, static.ln_post.bias, EPS)
        return out @ static.proj  # type: ignore[no-any-return]

    def _key_places(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Return the positions of one image's keys."""
        static = self.static
        width = static.params.embed_dim
        if static.params.key_places == "resized":
            side = math.isqrt(static.params.queries)
            table = static.pos_embed.to(torch.float64).T.reshape(1, width, side, side)
            resized = F.interpolate(table, size=(rows, columns), mode="bicubic", align_corners=False)
            return resized[0].flatten(1).T.to(like.dtype)
        quarter = width // 4
        omega = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
        places = [(row, column) for row in range(rows) for column in range(columns)]
        table = torch.tensor(places, dtype=torch.float64).reshape(-1, 2)
        x, y = table[:, 1:] * omega, table[:, :1] * omega
        return torch.cat([torch.sin(x), torch.cos(x), torch.sin(y), torch.cos(y)], 1).to(like.dtype)
