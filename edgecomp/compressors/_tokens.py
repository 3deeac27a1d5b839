"""Token maths: which tokens merge, and what becomes of them.

The op `edgecomp::TopKMerge` in PyTorch, static: no in-place write, no scatter with a reduction. Its definition, step by
step, is `engines/plugins/topk_merge/README.md`. Merging by bipartite matching: "Token Merging: Your ViT But Faster"
(arXiv:2210.09461), section 3.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "MergeMode",
    "Order",
    "Pairing",
    "Partition",
    "compose_maps",
    "group_matrix",
    "kth_pairing",
    "largest_r",
    "merge_pairs",
    "pair_tokens",
    "source_map",
    "take",
    "top_k",
    "top_k_merge",
    "unit_rows",
    "unmerge",
]

MergeMode = Literal["wavg", "mean", "sum", "prune", "tofu"]
Partition = Literal["alternate", "by_score"]
Order = Literal["ascending", "rank"]

_TINY = 1e-30  # below it a norm counts as zero


class Pairing(NamedTuple):
    """Which tokens merge into which; indices are those of the input tokens, int64.

    Attributes:
        kept: (B, K) tokens that are neither merged nor merged into, in output order, prefix tokens first.
        sources: (B, r) tokens that disappear.
        targets: (B, Q) tokens that may receive, in output order, behind those kept.
        match: (B, r) the place in `targets` that each source goes to.
    """

    kept: Tensor
    sources: Tensor
    targets: Tensor
    match: Tensor


def largest_r(tokens: int, num_prefix_tokens: int) -> int:
    """Return how many of `tokens` one merge can remove at most: half of those that are not protected."""
    return max(0, tokens - num_prefix_tokens) // 2


def unit_rows(x: Tensor) -> Tensor:
    """Scale each row to norm 1, in float32 at least; a row of norm zero stays zero. (..., d) -> (..., d)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x / x.norm(dim=-1, keepdim=True).clamp_min(_TINY)  # type: ignore[no-any-return]


def top_k(values: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest along the last axis, descending; ties: the lower index first.

    ONNX's TopK has this order, torch.topk has none, so that only a trace may hold it.
    """
    if torch.onnx.is_in_onnx_export():
        return torch.topk(values, k).indices
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def pair_tokens(
    metric: Tensor,
    scores: Tensor | None = None,
    *,
    r: int,
    num_prefix_tokens: int = 0,
    partition: Partition = "alternate",
    order: Order = "ascending",
) -> Pairing:
    """Choose r sources and the most similar target of each; ties go to the higher score, then to the lower index.

    Equal tokens tie as far as a product of matrices gives equal rows equal bits; torch's may differ in the last one.

    Args:
        metric: (B, N, Dm), what cosine similarity is measured on.
        scores: (B, N), for `by_score`: the higher, the sooner a token merges.
        r: tokens to remove, 1 to `largest_r`.
        num_prefix_tokens: the first P tokens take no part.
        partition: `alternate`: even tokens are sources, odd ones targets, and the r best-matched sources merge;
            `by_score`: the 2r tokens of highest score are in turn source and target, and all sources merge.
        order: of the tokens kept: `ascending` in index, or in the `rank` that chose the sources.
    """
    batch, tokens = metric.shape[:2]
    candidates = torch.arange(num_prefix_tokens, tokens, device=metric.device)
    prefix = torch.arange(num_prefix_tokens, device=metric.device).expand(batch, -1)
    unit = unit_rows(metric)
    if partition == "by_score":
        if scores is None:
            raise ValueError("partition by_score needs scores")
        ranked = candidates[top_k(scores[:, num_prefix_tokens:], tokens - num_prefix_tokens)]
        sources, targets, rest = ranked[:, 0 : 2 * r : 2], ranked[:, 1 : 2 * r : 2], ranked[:, 2 * r :]
        similarity = take(unit, sources) @ take(unit, targets).transpose(1, 2)  # (B, r, r)
        match = similarity.argmax(-1)
    else:
        is_odd = num_prefix_tokens % 2
        even, odd = candidates[is_odd::2], candidates[1 - is_odd :: 2]
        similarity = unit[:, even] @ unit[:, odd].transpose(1, 2)  # (B, ceil, floor)
        best, nearest = similarity.max(-1).values, similarity.argmax(-1)
        ranked = top_k(best, len(even))
        sources, rest = even[ranked[:, :r]], even[ranked[:, r:]]
        match = nearest.gather(1, ranked[:, :r])
        targets = odd.expand(batch, -1)
    if order == "ascending":
        rest = rest.sort(-1).values
    return Pairing(torch.cat([prefix, rest], dim=1), sources, targets, match)


def kth_pairing(metric: Tensor, *, k: int, num_prefix_tokens: int = 0) -> Pairing:
    """Pair the first k - 1 of every k tokens with their most similar among the k-th ones.

    The tail that fills no group of k is dropped, as in the original; the prefix takes no part.
    """
    batch, tokens = metric.shape[:2]
    count = (tokens - num_prefix_tokens) // k * k
    grouped = torch.arange(count, device=metric.device).reshape(-1, k) + num_prefix_tokens
    sources, targets = grouped[:, :-1].reshape(-1), grouped[:, -1]
    unit = unit_rows(metric)
    similarity = unit[:, sources] @ unit[:, targets].transpose(1, 2)
    prefix = torch.arange(num_prefix_tokens, device=metric.device)
    return Pairing(
        prefix.expand(batch, -1), sources.expand(batch, -1), targets.expand(batch, -1), similarity.argmax(-1)
    )


def take(x: Tensor, index: Tensor) -> Tensor:
    """Take rows of each sample: x (B, N, D), index (B, K) -> (B, K, D)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def merge_pairs(pairing: Pairing, x: Tensor, size: Tensor, *, mode: MergeMode = "wavg") -> tuple[Tensor, Tensor]:
    """Merge tokens x (B, N, D) of sizes (B, N, 1) -> (B, M, D) and (B, M, 1), where M = N - r.

    Args:
        mode: what becomes of a target and its sources: `wavg`, their mean weighted by size; `mean`; `sum`;
            `prune`, the target alone; `tofu`, the mean with the largest of their norms over the target's.
    """
    targets, sources = take(x, pairing.targets), take(x, pairing.sources)
    target_sizes, source_sizes = take(size, pairing.targets), take(size, pairing.sources)
    places = torch.arange(pairing.targets.shape[1], device=x.device).unsqueeze(-1)
    received = pairing.match.unsqueeze(1) == places  # (B, Q, r)
    weights = received.to(size.dtype)
    sizes = target_sizes + weights @ source_sizes
    wide = torch.promote_types(x.dtype, torch.float32)
    targets, sources = targets.to(wide), sources.to(wide)
    if mode == "wavg":
        merged = (targets * target_sizes + weights @ (sources * source_sizes)) / sizes
    elif mode == "prune":
        merged = targets
    else:
        merged = targets + weights @ sources
        if mode != "sum":
            merged = merged / (1 + weights.sum(-1, keepdim=True))
        if mode == "tofu":
            merged = merged * _norm_ratio(received, sources, targets)
    merged = torch.where(received.any(-1, keepdim=True), merged, targets).to(x.dtype)
    return torch.cat([take(x, pairing.kept), merged], 1), torch.cat([take(size, pairing.kept), sizes], 1)


def _norm_ratio(received: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
    """Return the largest norm of each group over its target's, 1 where that is zero: (B, Q, 1)."""
    own = targets.norm(dim=-1, keepdim=True)
    others = torch.where(received, sources.norm(dim=-1).unsqueeze(1), torch.zeros_like(own))  # (B, Q, r)
    largest = torch.maximum(own, others.amax(-1, keepdim=True))
    return torch.where(own > 0, largest / own.clamp_min(_TINY), torch.ones_like(own))


def source_map(pairing: Pairing, tokens: int) -> Tensor:
    """Return the output row of each of `tokens` inputs, (B, N) int32; -1 for a token that was dropped."""
    stay = torch.cat([pairing.kept, pairing.targets], dim=1)
    rows = torch.arange(stay.shape[1], device=stay.device).expand_as(stay)
    everyone = torch.full((stay.shape[0], tokens), -1, device=stay.device)
    everyone = everyone.scatter(1, stay, rows).scatter(1, pairing.sources, pairing.match + pairing.kept.shape[1])
    return everyone.to(torch.int32)


def compose_maps(first: Tensor, second: Tensor, *, drops: bool = False) -> Tensor:
    """Return the map of two merges in a row: first (B, N), then second (B, M) -> (B, N).

    Args:
        drops: `first` may hold -1, for tokens that were dropped; they stay -1.
    """
    index = first.to(torch.int64)
    if not drops:
        return second.gather(1, index)
    return torch.where(index < 0, first, second.gather(1, index.clamp_min(0)))


def unmerge(y: Tensor, rows: Tensor) -> Tensor:
    """Copy each output row back to all of its inputs: y (B, M, D), rows (B, N) from `source_map` -> (B, N, D)."""
    return take(y, rows.to(torch.int64))


def group_matrix(rows: Tensor, tokens_out: int) -> Tensor:
    """Return which inputs each output holds: rows (B, N) from `source_map` -> (B, M, N) bool."""
    places = torch.arange(tokens_out, device=rows.device, dtype=rows.dtype).unsqueeze(-1)
    return rows.unsqueeze(1) == places


def top_k_merge(
    metric: Tensor,
    x: Tensor,
    size: Tensor,
    scores: Tensor | None = None,
    *,
    r: int,
    num_prefix_tokens: int = 0,
    mode: MergeMode = "wavg",
    partition: Partition = "alternate",
    order: Order = "ascending",
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply the op `edgecomp::TopKMerge`; while ONNX is exported it is left in one piece.

    Shapes: metric (B, N, Dm), x (B, N, D), size (B, N, 1), scores (B, N) -> tokens (B, N - r, D), their sizes
    (B, N - r, 1), and the output row of each input (B, N) int32.
    """
    if not torch.onnx.is_in_onnx_export():
        pairing = pair_tokens(
            metric, scores, r=r, num_prefix_tokens=num_prefix_tokens, partition=partition, order=order
        )
        merged, sizes = merge_pairs(pairing, x, size, mode=mode)
        return merged, sizes, source_map(pairing, x.shape[1])
    batch, tokens, width = x.shape
    outputs = torch.onnx.ops.symbolic_multi_out(
        "edgecomp::TopKMerge",
        (metric, x, size) if scores is None else (metric, x, size, scores),
        attrs={
            "r": r,
            "num_prefix_tokens": num_prefix_tokens,
            "mode": mode,
            "partition": partition,
            "order": order,
            "with_map": 1,
            "plugin_version": "1",
            "plugin_namespace": "edgecomp",
        },
        dtypes=(x.dtype, torch.float32, torch.int32),
        shapes=((batch, tokens - r, width), (batch, tokens - r, 1), (batch, tokens)),
        version=1,
    )
    return outputs[0], outputs[1], outputs[2]
