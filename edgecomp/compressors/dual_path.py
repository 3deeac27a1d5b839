"""Dual path: a light tower sees the image coarsely, a ViT sees it finely, and only what is new to the first is added.

The project's founding notes describe it in their chapter on FastVLM; no such encoder is in FastVLM. The notes leave the
light tower and the fusion open: both are ours.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from msgspec import Meta
from torch import Tensor, nn

from edgecomp.compressors._attention import attend_packed
from edgecomp.compressors._base import Compressor, Params, Positive
from edgecomp.compressors._eager import cosine, norm_rows
from edgecomp.compressors._norms import ChannelLayerNorm
from edgecomp.compressors._pruning import select
from edgecomp.compressors._tokens import take, unit_rows
from edgecomp.errors import InvalidSpec
from edgecomp.specs import Output, Site, TensorSpec, TokenBudget

__all__ = ["DualPath"]

_LIGHT_STRIDE = 32  # pixels of a global token in the reduced image
_EPS = 1e-6


class DualPathParams(Params, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of the dual encoder.

    Attributes:
        embed_dim, depth, num_heads: of the ViT; its width is that of what comes out.
        mlp_ratio: hidden width of all MLPs over their own.
        patch_size: side of the ViT's patches in pixels.
        light_depths, light_widths: blocks and channels of the light tower's four stages; the last attends.
        light_heads: of that stage.
        reduction: the light tower sees the image averaged over squares of so many pixels.
        detail_tokens: of the ViT, added in the larger bucket.
    """

    embed_dim: Positive = 384
    depth: Positive = 12
    num_heads: Positive = 6
    mlp_ratio: Annotated[float, Meta(gt=0, le=64)] = 4.0
    patch_size: Positive = 16
    light_depths: tuple[Positive, Positive, Positive, Positive] = (2, 2, 6, 2)
    light_widths: tuple[Positive, Positive, Positive, Positive] = (48, 96, 192, 384)
    light_heads: Positive = 6
    reduction: Positive = 3
    detail_tokens: Positive = 40


class Block(nn.Module):
    """Pre-norm attention and MLP. (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=_EPS), nn.LayerNorm(width, eps=_EPS)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Update the tokens."""
        x = x + attend_packed(self.norm1(x), self.qkv, self.proj, self.heads)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))  # type: ignore[no-any-return]


class LightBlock(nn.Module):
    """Inverted residual: wider, mixed by a small depthwise kernel, narrow again. (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = ChannelLayerNorm(width, eps=_EPS)
        self.widen, self.narrow = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 1)
        self.mix = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Update the channels."""
        hidden = F.gelu(self.mix(F.gelu(self.widen(self.norm(x)))))
        return x + self.narrow(hidden)  # type: ignore[no-any-return]


class DualPath(Compressor):
    """Encode an image as coarse tokens of the whole, and on demand as many fine ones as are new to them.

    Shapes: image (B, 3, S, S), S a multiple of 96 and of the patch -> fused (B, M, D). At 672 pixels M = 49: the light
    tower's tokens at 224 pixels, 7 x 7 in raster order; or M = 89: behind them the 40 patches of the ViT at 672 pixels
    whose cosine to the nearest of the 49 is least, the newest first, and index (B, M) int32, the place of each among
    the 42 x 42 patches, -1 for the 49.

    Static rewrite (level E1): both counts are fixed, and each bucket is a graph; the smaller one has no ViT in it.
    Which is asked for, the router `detail` says. The reduction is a mean over squares. Novelty is one product with all
    global tokens, and its largest forty a TopK.

    Source: the project's founding notes, chapter FastVLM. Its words for the light tower (MobileViT) are taken as
    inverted residuals, arXiv:1801.04381, with attention in the last stage; fusion is one block among all rows.
    """

    Params = DualPathParams
    params: DualPathParams

    def __init__(self, params: DualPathParams, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        super().__init__(params, site, budget, output)
        self.coarse = _count_global(params, site)
        _require_consistent(params, site, budget, self.coarse)
        self.sees_details = budget.tokens_out > self.coarse
        width, hidden = params.embed_dim, int(params.embed_dim * params.mlp_ratio)
        before = (3, *params.light_widths[:-1])
        self.light_down = nn.ModuleList(
            nn.Conv2d(source, target, 2 if index else 4, stride=2 if index else 4)
            for index, (source, target) in enumerate(zip(before, params.light_widths, strict=True))
        )
        self.light_stages = nn.ModuleList(
            nn.ModuleList(LightBlock(dim, int(dim * params.mlp_ratio)) for _ in range(depth))
            for dim, depth in zip(params.light_widths[:-1], params.light_depths[:-1], strict=True)
        )
        last = params.light_widths[-1]
        self.light_blocks = nn.ModuleList(
            Block(last, params.light_heads, int(last * params.mlp_ratio)) for _ in range(params.light_depths[-1])
        )
        self.light_positions = nn.Parameter(torch.zeros(self.coarse, last))
        self.light_proj = nn.Linear(last, width)
        self.patch_embed = nn.Conv2d(3, width, params.patch_size, stride=params.patch_size)
        self.positions = nn.Parameter(torch.zeros(budget.tokens_in, width))
        self.blocks = nn.ModuleList(Block(width, params.num_heads, hidden) for _ in range(params.depth))
        self.detail_norm, self.detail_proj = nn.LayerNorm(width, eps=_EPS), nn.Linear(width, width)
        self.fusion = Block(width, params.num_heads, hidden)
        self.norm = nn.LayerNorm(width, eps=_EPS)

    def input_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `image`."""
        side = self.site.image_size
        return (TensorSpec("image", (batch, 3, side, side), "float32", "image"),)

    def output_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `fused`, and with details `index`."""
        rows = self.budget.tokens_out
        fused = TensorSpec("fused", (batch, rows, self.params.embed_dim), "float32", "tokens")
        return (fused, TensorSpec("index", (batch, rows), "int32", "indices")) if self.sees_details else (fused,)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What an export should say of the rows."""
        details = self.budget.tokens_out - self.coarse
        return (f"{self.coarse} global tokens" + (f" and {details} details" if details else ", and no ViT"),)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the fused rows."""
        rows = self.look_coarsely(image)
        if not self.sees_details:
            return (self.norm(self.fusion(rows)),)
        fine = self.look_finely(image)
        nearest = (unit_rows(fine) @ unit_rows(rows).transpose(1, 2)).amax(-1)  # (B, N)
        index = select(1.0 - nearest, self.params.detail_tokens, order="rank")
        fused = self.norm(self.fusion(torch.cat([rows, take(fine, index)], 1)))
        places = torch.cat([torch.full_like(index[:, :1], -1).expand(-1, self.coarse), index], 1)
        return fused, places.to(torch.int32)

    def look_coarsely(self, image: Tensor) -> Tensor:
        """Return the light tower's tokens: (B, G, D)."""
        x = F.avg_pool2d(image, self.params.reduction)
        for index, down in enumerate(self.light_down):
            x = down(x)
            if index < len(self.light_stages):
                x = self._mix(self.light_stages[index], x)
        tokens = x.flatten(2).transpose(1, 2) + self.light_positions
        for block in self.light_blocks:
            tokens = block(tokens)
        return self.light_proj(tokens)  # type: ignore[no-any-return]

    def _mix(self, stage: Any, x: Tensor) -> Tensor:
        for block in stage:
            x = block(x)
        return x

    def look_finely(self, image: Tensor) -> Tensor:
        """Return the ViT's tokens: (B, N, D)."""
        tokens = self.patch_embed(image).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        return self.detail_proj(self.detail_norm(tokens))  # type: ignore[no-any-return]

    def reference(self) -> nn.Module:
        """Return the same in plain steps, one sample at a time, on this module's parameters."""
        return DualPathOriginal(self)

    @classmethod
    def count_tokens(cls, params: DualPathParams, site: Site) -> int:
        """Return the ViT's patches."""
        _count_global(params, site)
        return int((site.image_size // params.patch_size) ** 2)

    @classmethod
    def plain_vit(cls, params: DualPathParams) -> dict[str, Any]:
        """Return the ViT of the fine path alone."""
        return {
            "patch_size": params.patch_size,
            "embed_dim": params.embed_dim,
            "depth": params.depth,
            "num_heads": params.num_heads,
            "mlp_ratio": params.mlp_ratio,
        }


def _count_global(params: DualPathParams, site: Site) -> int:
    """Return how many tokens the light tower makes, of sizes that both paths divide."""
    if site.placement != "encoder":
        raise InvalidSpec("dual-path is an encoder itself; drop the host")
    size, step = site.image_size, math.lcm(_LIGHT_STRIDE * params.reduction, params.patch_size)
    if size < step or size % step:
        raise InvalidSpec(
            f"dual-path: image size {size} is not a multiple of {step}, which both paths need; the nearest is "
            f"{max(1, round(size / step)) * step}"
        )
    return (size // params.reduction // _LIGHT_STRIDE) ** 2


def _require_consistent(params: DualPathParams, site: Site, budget: TokenBudget, coarse: int) -> None:
    both = (coarse, coarse + params.detail_tokens)
    if budget.tokens_out not in both:
        raise InvalidSpec(
            f"dual-path: {site.image_size} pixels give {both[0]} tokens, or {both[1]} with details, not a budget of "
            f"{budget.tokens_out}"
        )
    if params.detail_tokens > budget.tokens_in:
        raise InvalidSpec(
            f"dual-path: params.detail_tokens={params.detail_tokens} is above the {budget.tokens_in} patches of the ViT"
        )
    for name, width, heads in (
        ("embed_dim", params.embed_dim, params.num_heads),
        ("light_widths[3]", params.light_widths[-1], params.light_heads),
    ):
        if width % heads:
            raise InvalidSpec(f"dual-path: params.{name}={width} is not a multiple of its {heads} heads")


class DualPathOriginal(nn.Module):
    """The eager original: torch's own attention, means of unfolded squares, a search of one patch after the other."""

    def __init__(self, static: DualPath) -> None:
        super().__init__()
        self.static: Any = static

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return what the static module returns."""
        samples = [self._sample(one) for one in image]
        return tuple(torch.stack(part) for part in zip(*samples, strict=True))

    def _sample(self, image: Tensor) -> tuple[Tensor, ...]:
        static, step = self.static, self.static.params.reduction
        squares = image.unfold(1, step, step).unfold(2, step, step)  # (3, s, s, step, step)
        x = squares.mean(dim=(3, 4))[None]
        for index, down in enumerate(static.light_down):
            x = F.conv2d(x, down.weight, down.bias, stride=down.weight.shape[-1])
            if index < len(static.light_stages):
                for block in static.light_stages[index]:
                    x = x + self._light(block, x)
        rows = x[0].flatten(1).T + static.light_positions
        for block in static.light_blocks:
            rows = self._block(block, rows)
        rows = F.linear(rows, static.light_proj.weight, static.light_proj.bias)
        if not static.sees_details:
            return (norm_rows(static.norm, self._block(static.fusion, rows)),)
        size = static.params.patch_size
        fine = F.conv2d(image[None], static.patch_embed.weight, static.patch_embed.bias, stride=size)[0].flatten(1).T
        fine = fine + static.positions
        for block in static.blocks:
            fine = self._block(block, fine)
        fine = F.linear(norm_rows(static.detail_norm, fine), static.detail_proj.weight, static.detail_proj.bias)
        novelty = torch.stack([1 - max(cosine(token, row) for row in rows) for token in fine])
        novelty = torch.where(novelty.isnan(), -torch.inf, novelty)
        chosen = torch.argsort(novelty, descending=True, stable=True)[: static.params.detail_tokens]
        fused = norm_rows(static.norm, self._block(static.fusion, torch.cat([rows, fine[chosen]])))
        return fused, torch.cat([torch.full((len(rows),), -1), chosen]).to(torch.int32)

    def _light(self, block: Any, x: Tensor) -> Tensor:
        hidden = norm_rows(block.norm, x.movedim(1, -1)).movedim(-1, 1)
        for layer, padding in ((block.widen, 0), (block.mix, 1)):
            groups = hidden.shape[1] // layer.weight.shape[1]
            hidden = F.gelu(F.conv2d(hidden, layer.weight, layer.bias, padding=padding, groups=groups))
        return F.conv2d(hidden, block.narrow.weight, block.narrow.bias)

    def _block(self, block: Any, x: Tensor) -> Tensor:
        q, k, v = block.qkv(norm_rows(block.norm1, x)).unflatten(-1, (3, block.heads, -1)).permute(1, 2, 0, 3).unbind(0)
        read = F.scaled_dot_product_attention(q, k, v)  # (H, N, d)
        x = x + F.linear(read.movedim(0, 1).flatten(1), block.proj.weight, block.proj.bias)
        hidden = F.gelu(F.linear(norm_rows(block.norm2, x), block.fc1.weight, block.fc1.bias))
        return x + F.linear(hidden, block.fc2.weight, block.fc2.bias)
