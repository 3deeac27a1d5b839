"""A named tensor of fixed shape."""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = ["DType", "TensorKind", "TensorSpec"]

DType = Literal["float32", "float16", "bfloat16", "uint8", "int32", "int64", "bool"]
TensorKind = Literal["image", "tokens", "mask", "features", "indices", "counts", "attention", "sizes", "ids"]


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A named tensor of fixed shape; the first dimension is the batch.

    Attributes:
        name: the name it has in the ONNX graph.
        shape: integers only; `(B, 3, H, W)` for an image, `(B, ..., N, D)` for tokens.
        dtype: the element type, by numpy's name.
        kind: what the numbers mean, so that inputs can be generated: `image` (pixels), `tokens`,
            `mask` (true where a token is real), `indices` (whole numbers, equal or wrong), `counts` (how many tokens
            each row stands for: whole numbers in a float type, equal or wrong in any precision),
            `attention` (rows of shares that sum to 1), `sizes` (rows and columns of the tokens that are real, the first
            in raster order; 0 and 0 of a row that only fills the batch), `ids` (entries of a table, as a tokenizer
            gives them), `features` (anything else).
        limit: of `sizes` the most rows or columns, of `ids` how many entries there are; 0: not said.
        tokens: of `sizes` how many tokens there are, which rows times columns cannot exceed; 0: not said.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    kind: TensorKind
    limit: int = 0
    tokens: int = 0

    def with_batch(self, batch: int) -> TensorSpec:
        """Return the same tensor with another batch size."""
        return msgspec.structs.replace(self, shape=(batch, *self.shape[1:]))

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{list(self.shape)}"
