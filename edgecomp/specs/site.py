"""Where a compressor stands, and what it is handed there."""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = ["Output", "Placement", "Site"]

Placement = Literal["encoder", "inside", "after", "llm"]
Output = Literal["tokens", "logits"]


class Site(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a compressor stands, and what it is handed there.

    Attributes:
        placement: `encoder` = it is the encoder and is handed an image; `after` = it is handed the patch
            tokens of an encoder, or given tokens; `inside` and `llm` = between the blocks of a host.
        image_size: side of the image in pixels; 0 where tokens are handed over.
        tokens_in: tokens handed over, prefix tokens not counted; 0 for `encoder`, which makes its own.
        embed_dim: width of these tokens; 0 for `encoder`.
        num_prefix_tokens: class, distillation and register tokens in front; `inside`, and `after` where the method
            asks for them.
        depth: blocks of the host; only `inside`.
        num_classes: of the host's classifier; 0 where it has none, or is not kept.
        num_heads: of the host's attention; 0 where there is none.
        has_class_token: whether the first prefix token is one; only `inside`.
    """

    placement: Placement
    image_size: int = 0
    tokens_in: int = 0
    embed_dim: int = 0
    num_prefix_tokens: int = 0
    depth: int = 0
    num_classes: int = 0
    num_heads: int = 0
    has_class_token: bool = False
