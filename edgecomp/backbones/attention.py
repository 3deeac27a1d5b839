"""The attention of a host's blocks, with what compressors read of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgecomp.compressors._attention import split_heads
from edgecomp.compressors._inside import Shift

__all__ = ["Attended", "Folded", "SplitAttention", "attend", "attend_fused", "fold"]


class Folded(NamedTuple):
    """An attention's matrices of queries and values, (D, D) each, with what was added to them."""

    query: Tensor
    value: Tensor


class Attended(NamedTuple):
    """What an attention gave.

    Attributes:
        read: (B, N, D) after its projection.
        queries, keys: (B, H, N, d), after their norms where they have any.
        weights: (B, H, N, N) what each token reads of each; none where nobody asked.
    """

    read: Tensor
    queries: Tensor
    keys: Tensor
    weights: Tensor | None


class SplitAttention:
    """An attention that has a matrix each for queries, keys and values, in the words of timm's.

    Args:
        query, key, value, proj: linear layers.
        num_heads: of all of them.
        rotate: gives queries and keys (B, H, N, d) their rotary positions.
    """

    gate = None

    def __init__(
        self,
        query: nn.Linear,
        key: nn.Linear,
        value: nn.Linear,
        proj: nn.Linear,
        *,
        num_heads: int,
        rotate: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        self.query, self.key, self.value, self.proj = query, key, value, proj
        self.num_heads, self.head_dim = num_heads, query.out_features // num_heads
        self.scale = self.head_dim**-0.5
        self.q_norm = self.k_norm = rotate

    def run(self, x: Tensor) -> Tensor:
        """Return what it reads of x (B, N, D), by torch's fused attention."""
        return attend_fused(self, x, weigh=False).read

    @staticmethod
    def norm(read: Tensor) -> Tensor:
        """Return what was read as it is: there is no norm in front of the projection."""
        return read


def fold(attention: Any, shift: Shift) -> Folded:
    """Return an attention's matrices of queries and values with what is added to them, (D, D) each."""
    if isinstance(attention, SplitAttention):
        query, value = attention.query.weight, attention.value.weight
    else:
        query, _, value = attention.qkv.weight.chunk(3)
    parts = ((matrix, low) for matrix, low in zip((query, value), shift, strict=True))
    return Folded(*(matrix + (low.up * low.weights) @ low.down for matrix, low in parts))


def _project(attention: Any, x: Tensor, shift: Shift | Folded | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values (B, H, N, d), after the norms of queries and keys."""
    project = _project_split if isinstance(attention, SplitAttention) else _project_joint
    queries, keys, values = project(attention, x, shift)
    return attention.q_norm(queries), attention.k_norm(keys), values


def _project_split(attention: SplitAttention, x: Tensor, shift: Shift | Folded | None) -> tuple[Tensor, ...]:
    if isinstance(shift, Folded):
        query = F.linear(x, shift.query, attention.query.bias)
        value = F.linear(x, shift.value, attention.value.bias)
    else:
        query, value = attention.query(x), attention.value(x)
    if isinstance(shift, Shift):
        added = [F.linear(F.linear(x, low.down) * low.weights, low.up) for low in shift]
        query, value = query + added[0], value + added[1]
    return tuple(split_heads(part, attention.num_heads) for part in (query, attention.key(x), value))


def _project_joint(attention: Any, x: Tensor, shift: Shift | Folded | None) -> tuple[Tensor, ...]:
    batch, tokens, _ = x.shape
    if isinstance(shift, Folded):
        weight = torch.cat([shift.query, attention.qkv.weight.chunk(3)[1], shift.value])
        projected = F.linear(x, weight, attention.qkv.bias)
    else:
        projected = attention.qkv(x)
    if isinstance(shift, Shift):
        query, value = (F.linear(F.linear(x, low.down) * low.weights, low.up) for low in shift)
        projected = projected + torch.cat([query, torch.zeros_like(query), value], -1)
    qkv = projected.reshape(batch, tokens, 3, attention.num_heads, attention.head_dim)
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def _finish(attention: Any, x: Tensor, read: Tensor) -> Tensor:
    """Join the heads (B, H, N, d) and project them."""
    joined = attention.norm(read.transpose(1, 2).flatten(2))
    gate = getattr(attention, "gate", None)
    if gate is not None:
        joined = joined * gate(x).sigmoid()
    return attention.proj(joined)  # type: ignore[no-any-return]


def attend(
    attention: Any,
    x: Tensor,
    size: Tensor | None = None,
    *,
    weigh: bool = True,
    shift: Shift | Folded | None = None,
) -> Attended:
    """Run an attention on x (B, N, D), op by op.

    Args:
        attention: timm's module, or a `SplitAttention`.
        x: (B, N, D).
        size: (B, N, 1) makes it proportional (arXiv:2210.09461, equation 1).
        weigh: return the weights too.
        shift: what is added to its queries and values, as it is or folded into their matrices.
    """
    queries, keys, values = _project(attention, x, shift)
    scores = (queries * attention.scale) @ keys.transpose(-1, -2)
    if size is not None:
        scores = scores + size.log().transpose(1, 2).unsqueeze(1)  # (B, 1, 1, N)
    weights = scores.softmax(-1)
    return Attended(_finish(attention, x, weights @ values), queries, keys, weights if weigh else None)


def attend_fused(
    attention: Any,
    x: Tensor,
    size: Tensor | None = None,
    *,
    weigh: bool = True,
    shift: Shift | Folded | None = None,
) -> Attended:
    """Return the same by torch's fused attention; the weights, where they are wanted, are computed beside it."""
    queries, keys, values = _project(attention, x, shift)
    bias = None if size is None else torch.log(size.squeeze(-1))[:, None, None, :]
    read = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=attention.scale)
    weights = None
    if weigh:
        scores = torch.einsum("bhqd,bhkd->bhqk", queries, keys) * attention.scale
        weights = (scores if bias is None else scores + bias).softmax(-1)
    return Attended(_finish(attention, x, read), queries, keys, weights)
