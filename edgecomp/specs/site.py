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
    """

    placement: Placement
    image_size: int = 0
    tokens_in: int = 0
    embed_dim: int = 0
