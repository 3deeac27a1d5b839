"""A host encoder with a compressor between attention and MLP of its blocks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgecomp.backbones.placed import PlacedModel
from edgecomp.backbones.timm import TimmHost
from edgecomp.compressors._merging import BlockState, TokenMerger, identity_map
from edgecomp.compressors._tokens import compose_maps
from edgecomp.errors import InvalidSpec
from edgecomp.specs import DType, Preprocess

__all__ = ["InsideModel", "require_plain_blocks"]

_FAMILIES = "vit, deit, deit3, CLIP, SigLIP, DINOv2 (pre-norm blocks with absolute positions)"


class InsideModel(PlacedModel):
    """A timm vision transformer in which a compressor works between attention and MLP of each block.

    Shapes: image (B, 3, S, S) -> the compressor's outputs. The host's blocks run as a static sequence, each on as many
    tokens as the one before left; its weights and modules are its own, and nothing of it is replaced. LayerScale, norms
    of queries and keys, gates and all poolings are the host's; drop paths and dropouts do nothing.
    """

    compressor: TokenMerger
    backbone: TimmHost

    def __init__(
        self, compressor: TokenMerger, backbone: TimmHost, *, preprocess: Preprocess | None, input_dtype: DType
    ) -> None:
        super().__init__(compressor, backbone, preprocess=preprocess, input_dtype=input_dtype)
        require_plain_blocks(backbone)

    @property
    def media_shape(self) -> tuple[int, ...]:
        """No axes between batch and image."""
        return ()

    def forward(self, first: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG002 - the signature of all models
        """Return tokens, sizes and source map, or the logits."""
        return self.walk(first, self.compressor, _attend)

    def walk(self, image: Tensor, reducer: Any, attend: Any) -> tuple[Tensor, ...]:
        """Run the host with a compressor's `reduce`, and an attention, between its blocks."""
        vit: Any = self.backbone.model
        pixels = self.normalise(image) if self.input_dtype == "uint8" else image
        tokens = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(pixels))))
        size, rows = tokens.new_ones(*tokens.shape[:2], 1), identity_map(tokens)
        has_merged = False
        for index, block in enumerate(vit.blocks):
            normed = block.norm1(tokens)
            bias = size if has_merged and self.compressor.params.prop_attn else None
            read, keys = attend(block.attn, normed, bias)
            tokens = tokens + block.ls1(read)
            if self.compressor.steps[index]:
                merged = reducer.reduce(index, BlockState(tokens, normed, keys, size))
                tokens, size = merged.tokens, merged.size
                drops = self.compressor.drops_tokens
                rows = compose_maps(rows, merged.rows, drops=drops) if has_merged else merged.rows
                has_merged = True
            tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
        tokens = vit.norm(tokens)
        if self.compressor.output == "logits":
            return (vit.forward_head(tokens),)
        return tokens, size, rows

    def reference(self) -> nn.Module:
        """Return the same host with the compressor's eager original and torch's own attention."""
        return _InsideReference(self)


class _InsideReference(nn.Module):
    def __init__(self, model: InsideModel) -> None:
        super().__init__()
        self.model = model
        self.original = model.compressor.reference()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the original's outputs."""
        return self.model.walk(image, self.original, _attend_fused)


def require_plain_blocks(host: TimmHost) -> None:
    """Refuse a host whose blocks this module would not run as they are meant.

    Raises:
        InvalidSpec: blocks in parallel, post-norm, differential or rotary attention.
    """
    from timm.layers import Attention
    from timm.models.vision_transformer import Block

    for index, block in enumerate(host.model.blocks):
        kinds = f"{type(block).__name__} with {type(getattr(block, 'attn', None)).__name__}"
        if type(block) is not Block or type(block.attn) is not Attention:
            raise InvalidSpec(
                f"block {index} of {host.name} is a {kinds}; compressors inside a host know pre-norm blocks with plain "
                f"attention (Block with Attention). Hosts that work: {_FAMILIES}"
            )


def _project(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values (B, H, N, d), after the norms of queries and keys."""
    batch, tokens, _ = x.shape
    qkv = attention.qkv(x).reshape(batch, tokens, 3, attention.num_heads, attention.head_dim)
    queries, keys, values = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return attention.q_norm(queries), attention.k_norm(keys), values


def _finish(attention: Any, x: Tensor, read: Tensor) -> Tensor:
    """Join the heads (B, H, N, d) and project them."""
    joined = attention.norm(read.transpose(1, 2).flatten(2))
    gate = getattr(attention, "gate", None)
    if gate is not None:
        joined = joined * gate(x).sigmoid()
    return attention.proj(joined)  # type: ignore[no-any-return]


def _attend(attention: Any, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the attention's output (B, N, D) and its keys; `size` makes it proportional (equation 1)."""
    queries, keys, values = _project(attention, x)
    scores = (queries * attention.scale) @ keys.transpose(-1, -2)
    if size is not None:
        scores = scores + size.log().transpose(1, 2).unsqueeze(1)  # (B, 1, 1, N)
    return _finish(attention, x, scores.softmax(-1) @ values), keys


def _attend_fused(attention: Any, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the same by torch's fused attention."""
    queries, keys, values = _project(attention, x)
    bias = None if size is None else torch.log(size.squeeze(-1))[:, None, None, :]
    read = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=attention.scale)
    return _finish(attention, x, read), keys
