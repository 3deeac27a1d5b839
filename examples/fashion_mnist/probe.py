"""Readouts of patch tokens: small classifiers, fitted once on all tokens of the plain host, that then read fewer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Readout", "fit"]

_BATCH, _PEAK_LR, _WEIGHT_DECAY = 256, 1e-2, 1e-4


class Readout(nn.Module):
    """A linear classifier of the mean of tokens, or of what learned queries attend to among them.

    Shapes: tokens (B, M, D) with any M -> logits (B, 10).

    Args:
        tokens: (n, N, D), whose mean and deviation in each channel scale what is read.
        queries: so many learned queries, which a softmax over the tokens answers; 0: the mean of the tokens.
    """

    centre: Tensor
    scale: Tensor

    def __init__(self, tokens: Tensor, *, queries: int) -> None:
        super().__init__()
        width = tokens.shape[-1]
        flat = tokens.flatten(0, 1).to(torch.float32)
        self.register_buffer("centre", flat.mean(0))
        self.register_buffer("scale", flat.std(0))
        self.queries = nn.Parameter(torch.randn(queries, width) / width**0.5) if queries else None
        self.head = nn.Linear(max(1, queries) * width, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits."""
        x = (tokens.to(torch.float32) - self.centre) / self.scale
        if self.queries is None:
            weights = x.new_full((1, 1, x.shape[1]), 1 / x.shape[1])
        else:
            weights = (self.queries @ x.transpose(1, 2)).softmax(-1)  # (B, queries, M)
        logits: Tensor = self.head((weights @ x).flatten(1))
        return logits


def fit(tokens: Tensor, labels: Tensor, *, queries: int, epochs: int, seed: int = 0) -> Readout:
    """Fit a readout by AdamW on the cross-entropy, with one cycle of the learning rate; seeded throughout."""
    torch.manual_seed(seed)
    readout = Readout(tokens, queries=queries)
    optimizer = torch.optim.AdamW(readout.parameters(), lr=_PEAK_LR, weight_decay=_WEIGHT_DECAY)
    steps = epochs * -(-len(tokens) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=_PEAK_LR, total_steps=steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(tokens)).split(_BATCH):
            loss = F.cross_entropy(readout(tokens[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return readout.eval()
