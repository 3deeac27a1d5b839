"""What a user asks `export` for, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from edgecomp.specs.recipe import Recipe
from edgecomp.specs.tensor import DType

__all__ = ["Order"]


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be built; empty strings, tuples and zeros mean the recipe's default.

    Attributes:
        backbone: a host's name, `none`, or a torch module.
        compressor: a `Compressor` that the user made, or None.
        weights, backbone_weights: `random`, `pretrained` (the host's alone), or a path.
        budgets: counts or percentages, as text.
        align: budgets are rounded up to a multiple of it; 1: they stay as they are.
        params: the method's parameters that the user set.
    """

    recipe: Recipe
    preset: str = ""
    backbone: Any = ""
    compressor: Any = None
    weights: str = "random"
    backbone_weights: str = "random"
    budgets: tuple[str, ...] = ()
    align: int = 1
    image_size: int = 0
    feature_layer: int = 0
    output: str = ""
    input_dtype: DType = "float32"
    params: Mapping[str, Any] = {}
    seed: int = 0
