"""What a user asks `export` for, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from edgecomp.specs.recipe import Recipe
from edgecomp.specs.tensor import DType

__all__ = ["Order", "Prefix"]

Prefix = Literal["", "drop", "keep"]


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be built; empty strings, tuples and zeros mean the recipe's default.

    Attributes:
        backbone: a host's name, `none`, or a torch module.
        compressor: a `Compressor` that the user made, or None.
        weights, backbone_weights: `random`, `pretrained` (the host's alone), or a path; "" of a host that is a folder:
            the folder's own.
        prefix: `drop` or `keep` the host's class and register tokens in front of an `after` method; "": as it takes
            them.
        budgets: counts or percentages, as text.
        align: budgets are rounded up to a multiple of it; 1: they stay as they are.
        params: the method's parameters that the user set.
        stem: whether the part that several buckets share becomes a graph of its own.
        router: a router's name, or `none`; "": the recipe's, where there are several buckets.
        router_params, router_weights: its parameters that the user set, and its weights: `random`, or a path.
        pad_to: rows that every bucket gives, prefix tokens among them; 0: as many as it keeps.
        then_weights: of the recipe's second method: `random`, or a path.
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
    prefix: Prefix = ""
    output: str = ""
    input_dtype: DType = "float32"
    params: Mapping[str, Any] = {}
    stem: bool = True
    router: str = ""
    router_params: Mapping[str, Any] = {}
    router_weights: str = "random"
    pad_to: int = 0
    then_weights: str = "random"
    seed: int = 0
