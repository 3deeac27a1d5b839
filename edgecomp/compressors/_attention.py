"""Attention in the static form: fixed heads, no fused op, the same ops on every backend."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["MASKED", "MultiHeadAttention", "attend", "attend_packed", "key_bias", "merge_heads", "split_heads"]

MASKED = -1e30  # finite, and below any score: of a row without any real key a softmax is still defined


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Give each head its own axis: (B, N, H * d) -> (B, H, N, d)."""
    batch, tokens, width = x.shape
    return x.reshape(batch, tokens, heads, width // heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Lay the heads side by side again: (B, H, N, d) -> (B, N, H * d)."""
    batch, heads, tokens, width = x.shape
    return x.transpose(1, 2).reshape(batch, tokens, heads * width)


def attend(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(d) + bias) v.

    Args:
        q: (B, H, M, d); a batch of 1 serves all.
        k, v: (B, H, N, d).
        bias: added to the scores, (B, 1, 1, N) or any shape that broadcasts.
        keep: multiplied into the weights: a row without any real key reads zero, not the mean of its padding.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    weights = scores.softmax(-1)
    if keep is not None:
        weights = weights * keep
    read: Tensor = weights @ v
    return read


def attend_packed(x: Tensor, qkv: nn.Module, proj: nn.Module, heads: int) -> Tensor:
    """Return what the tokens (B, N, D) read of each other, by one projection for queries, keys and values."""
    q, k, v = (split_heads(part, heads) for part in qkv(x).chunk(3, dim=-1))
    return proj(merge_heads(attend(q, k, v)))  # type: ignore[no-any-return]


def key_bias(mask: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return `bias` and `keep` of `attend` for keys (B, N) of which some are real, in the type of `like`."""
    keep = mask[:, None, None, :].to(like.dtype)
    return (1.0 - keep) * MASKED, keep


class MultiHeadAttention(nn.Module):
    """Multi-head attention with biases, and a projection of its own for queries, keys, values and output.

    Args:
        embed_dim: of queries and output.
        heads: they divide it.
        context_dim: of keys and values; 0: as wide as the queries.
    """

    def __init__(self, embed_dim: int, heads: int, *, context_dim: int = 0) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(embed_dim, embed_dim)
        self.to_k = nn.Linear(context_dim or embed_dim, embed_dim)
        self.to_v = nn.Linear(context_dim or embed_dim, embed_dim)
        self.to_out = nn.Linear(embed_dim, embed_dim)

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None, keep: Tensor | None = None
    ) -> Tensor:
        """Return what the queries read: (B, M, D) of keys and values (B, N, C)."""
        q = split_heads(self.to_q(queries), self.heads)
        k, v = split_heads(self.to_k(keys), self.heads), split_heads(self.to_v(values), self.heads)
        return self.to_out(merge_heads(attend(q, k, v, bias=bias, keep=keep)))  # type: ignore[no-any-return]
