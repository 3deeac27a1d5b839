"""Outputs of equal shape for all buckets: rows up to a fixed number, with their count and mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from edgecomp.errors import InvalidSpec
from edgecomp.specs import TensorSpec

__all__ = ["RowPadding"]

_NO_ROWS = ("source_map", "count")  # outputs that are not one thing for each kept token


class RowPadding:
    """Fills the rows of a bucket's outputs up.

    Tokens and what goes with each of them (sizes, masks) get zeros, indices -1. Where the method does not say which
    rows are real, `count` (B,) and `mask` (B, rows) are added.

    Args:
        specs: the outputs as the method gives them.
        kept: rows that the budget names; prefix tokens come on top.
        tokens_in: tokens that go in.
        pad_to: rows that there are to be in all.
    """

    def __init__(self, specs: Sequence[TensorSpec], *, kept: int, tokens_in: int, pad_to: int) -> None:
        first = specs[0]
        if first.kind != "tokens" or len(first.shape) != 3:
            raise InvalidSpec(
                f"pad_to={pad_to}: rows of tokens [B, M, D] are filled up, and here {first} comes first; drop --pad-to"
            )
        self.rows = first.shape[1]
        self.extra = pad_to - self.rows
        prefix = self.rows - kept
        besides = f", {prefix} of them beside the budget's {kept}" if prefix else ""
        if pad_to > tokens_in + prefix:
            raise InvalidSpec(
                f"pad_to={pad_to} is above {tokens_in + prefix}, the rows there would be if all {tokens_in} tokens "
                "that go in were kept; give at most as many"
            )
        if self.extra < 0:
            raise InvalidSpec(
                f"pad_to={pad_to} is below the {self.rows} rows of a bucket{besides}; give at least {self.rows}"
            )
        self.own = tuple(specs)
        self.is_padded = [spec.name not in _NO_ROWS and spec.shape[1:2] == (self.rows,) for spec in specs]
        self.counts = not any(spec.name == "mask" for spec in specs)

    def output_specs(self, batch: int) -> tuple[TensorSpec, ...]:
        """Return the outputs, filled up."""
        rows = self.rows + self.extra
        specs = [
            TensorSpec(spec.name, (batch, rows, *spec.shape[2:]), spec.dtype, spec.kind)
            if padded
            else spec.with_batch(batch)
            for spec, padded in zip(self.own, self.is_padded, strict=True)
        ]
        if self.counts:
            specs.append(TensorSpec("count", (batch,), "int64", "indices"))
            specs.append(TensorSpec("mask", (batch, rows), "bool", "mask"))
        return tuple(specs)

    def __call__(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Fill the rows up."""
        filled = [
            self._fill(output, -1 if spec.kind == "indices" else 0) if padded else output
            for output, spec, padded in zip(outputs, self.own, self.is_padded, strict=True)
        ]
        if self.counts:
            batch = outputs[0].shape[0]
            real = torch.arange(self.rows + self.extra) < self.rows
            filled += [torch.full((batch,), self.rows, dtype=torch.int64), real.expand(batch, -1)]
        return tuple(filled)

    def _fill(self, output: Tensor, value: int) -> Tensor:
        return F.pad(output, [0, 0] * (output.ndim - 2) + [0, self.extra], value=value)
