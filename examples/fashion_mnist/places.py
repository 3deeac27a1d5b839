"""Which single patch the host cannot lose: top-1 where one of the 49 is dropped in a block, and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from host import load_host
from torch import Tensor

__all__ = ["rank_in_draw", "top1_without_each"]


@torch.inference_mode()
def top1_without_each(images: Tensor, labels: Tensor, block: int) -> tuple[float, Tensor]:
    """Return top-1 of the plain host, and where each patch is dropped between attention and MLP of a block: (7, 7)."""
    host: Any = load_host()
    parts = list(zip(images.split(500), labels.split(500), strict=True))
    right = torch.zeros(50, dtype=torch.int64)  # place 0: nothing is dropped
    for pixels, expected in parts:
        tokens = host.norm_pre(host.patch_drop(host._pos_embed(host.patch_embed(pixels.expand(-1, 3, -1, -1)))))
        for before in host.blocks[:block]:
            tokens = before(tokens)
        acting = host.blocks[block]
        tokens = tokens + acting.ls1(acting.attn(acting.norm1(tokens)))
        for place in range(50):
            x = tokens if not place else torch.cat([tokens[:, :place], tokens[:, place + 1 :]], 1)
            x = x + acting.ls2(acting.mlp(acting.norm2(x)))
            for behind in host.blocks[block + 1 :]:
                x = behind(x)
            right[place] += (host.forward_head(host.norm(x)).argmax(-1) == expected).sum()
    shares = right / len(labels)
    return shares[0].item(), shares[1:].reshape(7, 7)


def rank_in_draw(place: int, seed: int) -> int:
    """Return how early attention pruning's `random` score keeps a patch inside the host: 1 is the last to go."""
    chance = torch.rand(50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)[1:]
    return int((chance >= chance[place]).sum())
