"""LookupViT: a few compressed tokens look up the many high-resolution ones, and do the heavy work.

Sections and equations: "LookupViT: Compressing visual information to a limited number of tokens"
(arXiv:2407.12753). The paper has no official code; the released code that its numbers are compared with is
lucidrains/vit-pytorch, `look_vit.py`, at the commit in `export/recipes/lookupvit.toml`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
import torch
import torch.nn.functional as F
from msgspec import Meta
from torch import Tensor, nn

from edgecomp.compressors._attention import merge_heads, split_heads
from edgecomp.compressors._base import Compressor, Params, Positive, constant, count_heads
from edgecomp.compressors._checkpoint import load_exactly, rename_key, rename_keys
from edgecomp.compressors._grid import bilinear_matrix, sincos_2d
from edgecomp.compressors._norms import GammaLayerNorm
from edgecomp.errors import InvalidSpec, WeightsError
from edgecomp.specs import Output, Site, TensorSpec, TokenBudget

__all__ = ["LookupViT"]


class LookupViTParams(Params, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of LookupViT.

    Attributes:
        depth: number of lookup blocks.
        num_heads, head_dim: of the self-attention among compressed tokens.
        lookup_heads, lookup_head_dim: of the lookup between compressed and high-resolution tokens.
        mlp_ratio: hidden width of the compressed tokens' MLP over `embed_dim`.
        lookup_mlp_ratio: the same for the high-resolution tokens; the paper's is small.
        patch_size: side of a high-resolution patch in pixels (placement `encoder`).
        patch_kernel: side of the patch convolution, in patches: 1, or the released code's 7.
        table: where compressed tokens start: `resize` = the grid resized to M (paper, released code),
            `learned` = a free table (the founding notes' form, and the only one without a grid).
        table_entries: rows of the learned table; a budget takes the first M. 0: the largest budget.
        num_classes: outputs of the classifier.
    """

    depth: Positive = 12
    num_heads: Positive = 6
    head_dim: Positive = 64
    lookup_heads: Positive = 6
    lookup_head_dim: Positive = 64
    mlp_ratio: Annotated[float, Meta(gt=0, le=64)] = 4.0
    lookup_mlp_ratio: Annotated[float, Meta(gt=0, le=64)] = 1.0
    patch_size: Positive = 16
    patch_kernel: Positive = 1
    table: Literal["resize", "learned"] = "resize"
    table_entries: Annotated[int, Meta(ge=0, le=4096)] = 0
    num_classes: Positive = 1000


class Mlp(nn.Module):
    """Pre-norm MLP: LN, Linear, GELU, Linear. (B, N, D) -> (B, N, D)."""

    def __init__(self, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.norm = GammaLayerNorm(embed_dim)
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the update of x."""
        return self.fc2(F.gelu(self.fc1(self.norm(x))))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Projections of one attention; `keys = False` where the similarity of another is used again."""

    def __init__(self, embed_dim: int, heads: int, head_dim: int, *, keys: bool = True, context: bool = False) -> None:
        super().__init__()
        self.heads, self.scale = heads, head_dim**-0.5
        if keys:
            self.norm = GammaLayerNorm(embed_dim)
            self.to_q = nn.Linear(embed_dim, heads * head_dim, bias=False)
            self.to_k = nn.Linear(embed_dim, heads * head_dim, bias=False)
        if context or not keys:
            self.norm_context = GammaLayerNorm(embed_dim)
        self.to_v = nn.Linear(embed_dim, heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, embed_dim, bias=False)

    def similarity(self, queries: Tensor, context: Tensor) -> Tensor:
        """Return scaled dot products: (B, M, D) and (B, N, D) -> (B, H, M, N)."""
        q = split_heads(self.to_q(queries) * self.scale, self.heads)
        k = split_heads(self.to_k(context), self.heads)
        return q @ k.transpose(-1, -2)

    def read(self, weights: Tensor, context: Tensor) -> Tensor:
        """Return the weighted values: (B, H, M, N) and (B, N, D) -> (B, M, D)."""
        return self.to_out(merge_heads(weights @ split_heads(self.to_v(context), self.heads)))  # type: ignore[no-any-return]


class LookupBlock(nn.Module):
    """One block (section 3.2): gather, refine, infuse, and a small MLP on the high-resolution tokens.

    Args:
        infuses: False for a last block whose high-resolution tokens nobody reads.
    """

    def __init__(self, params: LookupViTParams, *, infuses: bool) -> None:
        super().__init__()
        width = params.embed_dim
        self.gather = Attention(width, params.lookup_heads, params.lookup_head_dim, context=True)
        self.refine = Attention(width, params.num_heads, params.head_dim)
        self.refine_mlp = Mlp(width, max(1, int(width * params.mlp_ratio)))
        if infuses:
            self.infuse = Attention(width, params.lookup_heads, params.lookup_head_dim, keys=False)
            self.lookup_norm = GammaLayerNorm(width)
            self.lookup_mlp = Mlp(width, max(1, int(width * params.lookup_mlp_ratio)))

    def forward(self, tokens: Tensor, lookup: Tensor, *, infuse: bool) -> tuple[Tensor, Tensor]:
        """Update both streams: tokens (B, M, D) and lookup (B, N, D); the second only with `infuse`."""
        context = self.gather.norm_context(lookup)
        similarity = self.gather.similarity(self.gather.norm(tokens), context)  # (B, H, M, N)
        tokens = tokens + self.gather.read(similarity.softmax(-1), context)

        normed = self.refine.norm(tokens)
        tokens = tokens + self.refine.read(self.refine.similarity(normed, normed).softmax(-1), normed)
        tokens = tokens + self.refine_mlp(tokens)

        if infuse:  # the same similarity, the other way round; the residual stream itself is normalised
            weights = similarity.transpose(-1, -2).softmax(-1)  # (B, H, N, M)
            lookup = lookup + self.infuse.read(weights, self.infuse.norm_context(tokens))
            lookup = self.lookup_norm(lookup)
            lookup = lookup + self.lookup_mlp(lookup)
        return tokens, lookup


class LookupViT(Compressor):
    """Encode an image (or refine given tokens) with M compressed tokens that look up N high-resolution ones.

    Shapes: image (B, 3, S, S) with N = (S / patch_size)^2, or tokens (B, N, D) -> tokens (B, M, D), with N and
    M fixed by the budget; or logits (B, classes).

    Static rewrite: the bilinear resize of the token grid is a constant (M, N) matrix, the position table is
    baked, the patch projection is one convolution; everything else has fixed shapes in the original (level
    E0). The infusion transposes the raw similarity and applies softmax again, as the released code does. For
    `tokens`, the last block's infusion feeds nothing and is left out.

    Source: arXiv:2407.12753, section 3; lucidrains/vit-pytorch look_vit.py.
    """

    Params = LookupViTParams
    unstored_params = ("head_dim", "lookup_head_dim")
    positions: Tensor
    resize: Tensor

    def __init__(self, params: LookupViTParams, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        super().__init__(params, site, budget, output)
        width = params.embed_dim
        if output == "logits" and site.placement != "encoder":
            raise InvalidSpec(
                "lookupvit after an encoder has no classifier: its output is 'tokens'; drop --output logits"
            )
        if site.placement == "encoder":
            if width % 4 or width < 8:
                raise InvalidSpec(
                    f"lookupvit: embed_dim={width} must be a multiple of 4 and at least 8 for its position table"
                )
            if not params.patch_kernel % 2:
                raise InvalidSpec(
                    f"lookupvit: patch_kernel={params.patch_kernel} must be odd, so that a kernel has a centre"
                )
            channels, patch = 3, params.patch_size
            if params.patch_kernel == 1:
                self.patch_embed = nn.Conv2d(channels, width, patch, stride=patch)
            else:
                self.patch_embed = nn.Conv2d(
                    channels * patch * patch, width, params.patch_kernel, padding=params.patch_kernel // 2
                )
            side = site.image_size // patch
            self.register_buffer("positions", constant(sincos_2d(side, side, width)), persistent=False)  # (N, D)
        self.input_norm = GammaLayerNorm(width)
        if params.table == "learned":
            if budget.tokens_out > params.table_entries:
                raise InvalidSpec(
                    f"lookupvit: budget {budget.tokens_out} is above the {params.table_entries} entries of the "
                    "learned table; raise params.table_entries or lower the budget"
                )
            self.entries = nn.Parameter(torch.zeros(params.table_entries, width))
        else:
            source, target = math.isqrt(budget.tokens_in), math.isqrt(budget.tokens_out)
            if source**2 != budget.tokens_in or target**2 != budget.tokens_out:
                raise InvalidSpec(
                    f"lookupvit: table=resize resizes square grids, and {budget.tokens_in} -> {budget.tokens_out} "
                    "tokens are not two squares; choose a square budget or params.table=learned"
                )
            self.register_buffer("resize", constant(bilinear_matrix(source, target)), persistent=False)  # (M, N)
        last = params.depth - 1  # its infusion serves the classifier alone, and only the encoder has one
        self.blocks = nn.ModuleList(
            LookupBlock(params, infuses=site.placement == "encoder" or index < last) for index in range(params.depth)
        )
        self.norm = GammaLayerNorm(width)
        if site.placement == "encoder":
            self.lookup_norm = GammaLayerNorm(width)
            self.head = nn.Linear(width, params.num_classes, bias=False)

    def input_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `image`, or `tokens` where tokens are handed over."""
        if self.site.placement == "encoder":
            side = self.site.image_size
            return (TensorSpec("image", (batch, 3, side, side), "float32", "image"),)
        return (TensorSpec("tokens", (batch, self.budget.tokens_in, self.params.embed_dim), "float32", "tokens"),)

    def output_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `compressed` (B, M, D), or `logits` (B, classes)."""
        if self.output == "logits":
            return (TensorSpec("logits", (batch, self.params.num_classes), "float32", "features"),)
        shape = (batch, self.budget.tokens_out, self.params.embed_dim)
        return (TensorSpec("compressed", shape, "float32", "tokens"),)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the compressed tokens after the final norm, or the logits."""
        lookup = self.embed(x)  # (B, N, D)
        if self.params.table == "learned":
            tokens = self.entries[: self.budget.tokens_out].expand(x.shape[0], -1, -1)
        else:
            tokens = self.resize @ lookup  # (M, N) @ (B, N, D) -> (B, M, D)
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            tokens, lookup = block(tokens, lookup, infuse=index < last or self.output == "logits")
        if self.output == "logits":
            return (self.head(self.norm(tokens).mean(1) + self.lookup_norm(lookup).mean(1)),)
        return (self.norm(tokens),)

    def embed(self, x: Tensor) -> Tensor:
        """Return the high-resolution tokens (B, N, D) of an image, or of given tokens."""
        if self.site.placement != "encoder":
            return self.input_norm(x)  # type: ignore[no-any-return]
        if self.params.patch_kernel > 1:
            x = _space_to_depth(x, self.params.patch_size)
        patches: Tensor = self.patch_embed(x)  # (B, D, h, w)
        return self.input_norm(patches.flatten(2).transpose(1, 2)) + self.positions  # type: ignore[no-any-return]

    def reference(self) -> nn.Module:
        """Return the released code's forward pass on this module's parameters."""
        return LookViTOriginal(self)

    @classmethod
    def count_tokens(cls, params: LookupViTParams, site: Site) -> int:
        """Return the number of high-resolution tokens."""
        if site.placement != "encoder":
            return site.tokens_in
        if site.image_size % params.patch_size:
            raise InvalidSpec(
                f"lookupvit: image size {site.image_size} is not a multiple of the patch, {params.patch_size}; "
                f"the nearest that is: {max(1, round(site.image_size / params.patch_size)) * params.patch_size}"
            )
        return (site.image_size // params.patch_size) ** 2

    @classmethod
    def for_budgets(cls, params: LookupViTParams, counts: Sequence[int]) -> LookupViTParams:
        """Size the learned table by the largest budget where nothing else did."""
        if params.table_entries or params.table == "resize":
            return params
        return msgspec.structs.replace(params, table_entries=max(counts))

    @classmethod
    def plain_vit(cls, params: LookupViTParams) -> dict[str, Any]:
        """Return the ViT of the same patch, width, depth, heads (where they divide the width) and MLP factor."""
        return {
            "patch_size": params.patch_size,
            "embed_dim": params.embed_dim,
            "depth": params.depth,
            "num_heads": math.gcd(params.embed_dim, params.num_heads),
            "mlp_ratio": params.mlp_ratio,
        }

    @classmethod
    def layout_of(cls, state: Mapping[str, Tensor]) -> str:
        """Return `lookvit` for vit-pytorch's keys."""
        return "lookvit" if "to_patches.1.weight" in state else ""

    @classmethod
    def infer_params(cls, state: Mapping[str, Tensor], params: LookupViTParams) -> dict[str, Any]:
        """Return what the shapes of a checkpoint decide; head widths come from the parameters."""
        first = ", ".join(list(state)[:5])
        state = _from_lookvit_keys(state)
        blocks = [int(key.split(".")[1]) for key in state if key.startswith("blocks.") and key.split(".")[1].isdigit()]
        if not blocks:
            raise WeightsError(
                f"weights are in neither layout of lookupvit, lookvit or edgecomp; first keys: {first}. "
                "Convert them to one of these"
            )
        found: dict[str, Any] = {"depth": 1 + max(blocks)}
        sizes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if "norm.gamma" in sizes:
            (width,) = sizes["norm.gamma"]
            found["embed_dim"] = width
            for key, ratio in (("refine_mlp", "mlp_ratio"), ("lookup_mlp", "lookup_mlp_ratio")):
                if f"blocks.0.{key}.fc1.weight" in sizes:
                    found[ratio] = sizes[f"blocks.0.{key}.fc1.weight"][0] / width
        for key, heads, dim in (("refine", "num_heads", "head_dim"), ("gather", "lookup_heads", "lookup_head_dim")):
            if f"blocks.0.{key}.to_q.weight" in sizes:
                rows = sizes[f"blocks.0.{key}.to_q.weight"][0]
                found[heads] = count_heads(rows, getattr(params, dim), name=f"blocks.0.{key}.to_q", param=dim)
        if "head.weight" in sizes:
            found["num_classes"] = sizes["head.weight"][0]
        if "entries" in sizes:
            found.update(table="learned", table_entries=sizes["entries"][0])
        if len(sizes.get("patch_embed.weight", ())) == 4:
            _, channels, kernel, _ = sizes["patch_embed.weight"]
            if channels == 3:
                found.update(patch_size=kernel, patch_kernel=1)
            else:
                found.update(patch_size=math.isqrt(channels // 3), patch_kernel=kernel)
        return found

    def load_original(self, state: Mapping[str, Tensor], *, unread: Sequence[str] = ()) -> str:
        """Load a checkpoint in the LookViT layout of vit-pytorch, or in edgecomp's own."""
        layout = self.layout_of(state)
        file_keys = {rename_key(key, _LOOKVIT_KEYS): key for key in state} if layout else None
        layout = layout or "edgecomp"
        load_exactly(self, _from_lookvit_keys(state), layout=layout, unread=unread, file_keys=file_keys)
        return layout


_LOOKVIT_KEYS = (
    (r"^to_patches\.1\.", "patch_embed."),
    (r"^to_patches\.3\.", "input_norm."),
    (r"^layers\.(\d+)\.0\.", r"blocks.\1.refine."),
    (r"^layers\.(\d+)\.1\.", r"blocks.\1.refine_mlp."),
    (r"^layers\.(\d+)\.2\.", r"blocks.\1.gather."),
    (r"^layers\.(\d+)\.3\.", r"blocks.\1.infuse."),
    (r"^layers\.(\d+)\.4\.", r"blocks.\1.lookup_norm."),
    (r"^layers\.(\d+)\.5\.", r"blocks.\1.lookup_mlp."),
    (r"^(blocks\.\d+\.\w+_mlp)\.0\.", r"\1.norm."),
    (r"^(blocks\.\d+\.\w+_mlp)\.1\.", r"\1.fc1."),
    (r"^(blocks\.\d+\.\w+_mlp)\.4\.", r"\1.fc2."),
    (r"\.to_out\.1\.", ".to_out."),
    (r"^highres_norm\.", "lookup_norm."),
    (r"^to_logits\.", "head."),
)


def _from_lookvit_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename LookViT's keys to this module's; other keys stay as they are."""
    if "to_patches.1.weight" not in state:
        return dict(state)
    renamed = rename_keys(state, _LOOKVIT_KEYS)
    weight = renamed["patch_embed.weight"]
    if weight.ndim == 4 and weight.shape[-1] == 1:  # (D, p p 3, 1, 1) -> one convolution of stride p on the image
        patch = math.isqrt(weight.shape[1] // 3)
        if 3 * patch * patch == weight.shape[1]:
            weight = weight.reshape(-1, patch, patch, 3).permute(0, 3, 1, 2)
            renamed["patch_embed.weight"] = weight.contiguous()
    return renamed


def _space_to_depth(image: Tensor, patch: int) -> Tensor:
    """Fold each patch into channels, in the order (row, column, colour): (B, 3, S, S) -> (B, 3 p p, h, w)."""
    batch, colours, height, width = image.shape
    rows, columns = height // patch, width // patch
    folded = image.reshape(batch, colours, rows, patch, columns, patch).permute(0, 3, 5, 1, 2, 4)
    return folded.reshape(batch, patch * patch * colours, rows, columns)


class LookViTOriginal(nn.Module):
    """The eager original: the released forward pass, op by op, on the parameters of a `LookupViT`.

    Written apart from the static form: `interpolate` for the resize, `unfold`ed patches and a plain
    convolution for the projection, one head at a time, all blocks in full.
    """

    def __init__(self, static: LookupViT) -> None:
        super().__init__()
        self.static = static

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return what the static module returns."""
        static, params = self.static, self.static.params
        side = math.isqrt(static.budget.tokens_in)
        if static.site.placement == "encoder":
            grid = self._project_patches(x)  # (B, D, h, w)
            high = self._norm(static.input_norm, grid.movedim(1, -1))
            high = high + sincos_2d(side, side, params.embed_dim).to(high.dtype).reshape(side, side, -1)
            high = high.flatten(1, 2)
        else:
            high = self._norm(static.input_norm, x)
        if params.table == "learned":
            low = torch.stack([static.entries[: static.budget.tokens_out]] * x.shape[0])
        else:
            target = math.isqrt(static.budget.tokens_out)
            square = high.reshape(len(high), side, side, -1).movedim(-1, 1)
            square = F.interpolate(square, (target, target), mode="bilinear", align_corners=False)
            low = square.movedim(1, -1).flatten(1, 2)
        for block in static.blocks:
            low, high = self._block(block, low, high)
        low = self._norm(static.norm, low)
        if static.output == "tokens":
            return (low,)
        pooled = low.mean(dim=1) + self._norm(static.lookup_norm, high).mean(dim=1)
        return (pooled @ static.head.weight.T,)

    def _project_patches(self, image: Tensor) -> Tensor:
        params, projection = self.static.params, self.static.patch_embed
        patch, side = params.patch_size, image.shape[-1] // params.patch_size
        patches = F.unfold(image, patch, stride=patch)  # (B, 3 p p, h w), channels in the order (c, p1, p2)
        weight = projection.weight
        if params.patch_kernel == 1:
            weight = weight.reshape(params.embed_dim, -1, 1, 1)
        else:  # the parameter's channels are in the order (p1, p2, c)
            kernel = weight.shape[-2:]
            weight = weight.reshape(-1, patch * patch, 3, *kernel).transpose(1, 2).flatten(1, 2)
        folded = patches.reshape(*patches.shape[:2], side, side)
        return F.conv2d(folded, weight, projection.bias, padding=params.patch_kernel // 2)

    def _block(self, block: Any, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        context = self._norm(block.gather.norm_context, high)
        similarity = self._similarity(block.gather, self._norm(block.gather.norm, low), context)
        low = low + self._read(block.gather, [s.softmax(dim=-1) for s in similarity], context)
        normed = self._norm(block.refine.norm, low)
        own = self._similarity(block.refine, normed, normed)
        low = low + self._read(block.refine, [s.softmax(dim=-1) for s in own], normed)
        low = low + self._mlp(block.refine_mlp, low)
        if not hasattr(block, "infuse"):
            return low, high
        values = self._norm(block.infuse.norm_context, low)
        high = high + self._read(block.infuse, [s.transpose(1, 2).softmax(dim=-1) for s in similarity], values)
        high = self._norm(block.lookup_norm, high)
        return low, high + self._mlp(block.lookup_mlp, high)

    def _similarity(self, attention: Attention, queries: Tensor, context: Tensor) -> list[Tensor]:
        """Return (B, M, N) for each head."""
        heads = zip(
            (queries @ attention.to_q.weight.T).chunk(attention.heads, dim=-1),
            (context @ attention.to_k.weight.T).chunk(attention.heads, dim=-1),
            strict=True,
        )
        return [torch.einsum("bmd,bnd->bmn", q, k) * attention.scale for q, k in heads]

    def _read(self, attention: Attention, weights: list[Tensor], context: Tensor) -> Tensor:
        values = (context @ attention.to_v.weight.T).chunk(attention.heads, dim=-1)
        read = [torch.einsum("bmn,bnd->bmd", w, v) for w, v in zip(weights, values, strict=True)]
        return torch.cat(read, dim=-1) @ attention.to_out.weight.T

    def _mlp(self, mlp: Mlp, x: Tensor) -> Tensor:
        hidden = F.gelu(F.linear(self._norm(mlp.norm, x), mlp.fc1.weight, mlp.fc1.bias))
        return F.linear(hidden, mlp.fc2.weight, mlp.fc2.bias)

    def _norm(self, norm: GammaLayerNorm, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        variance = centred.square().mean(dim=-1, keepdim=True)
        return centred / torch.sqrt(variance + norm.eps) * (norm.gamma + 1)
