"""Op allow-lists: which ONNX ops a TensorRT takes, with constraints. One TOML file a version, in `export/ops/`."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edgecomp.resources import data_path
from edgecomp.specs._toml import read_toml

__all__ = ["OpList", "OpRule", "Refusal", "load_oplists"]


class OpRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Under which conditions an op is taken.

    Attributes:
        attributes: values that an attribute may have, as text (`"0"`, `"linear"`); an absent attribute is fine.
        constant_inputs: positions of inputs that must be constants.
        largest_constant: largest value a constant input may hold, by its position as text.
        max_rank: largest rank of the first input; 0 for no limit.
        types: element types (`float32`, `int64`, ...) the first input may have; empty for any.
        reason: what happens otherwise, told to the user.
        remedy: the way out, told to the user.
    """

    attributes: dict[str, tuple[str, ...]] = {}
    constant_inputs: tuple[Annotated[int, Meta(ge=0)], ...] = ()
    largest_constant: dict[str, int] = {}
    max_rank: Annotated[int, Meta(ge=0)] = 0
    types: tuple[str, ...] = ()
    reason: str = ""
    remedy: str = ""


class Refusal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An op known to be refused: why, and the way out."""

    reason: Annotated[str, Meta(min_length=5)]
    remedy: Annotated[str, Meta(min_length=5)]


class OpList(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one TensorRT's ONNX parser takes.

    Attributes:
        name: equal to the file's stem.
        versions: the versions it was read from or tried on.
        source: documents or trials behind it.
        opset: lowest and highest opset.
        ops: ops of the ONNX domain that are taken, by name; `{}` when without condition.
        refused: ops that are known not to be taken, with the way out.
    """

    schema: Literal[1]
    name: str
    versions: str
    source: tuple[str, ...]
    opset: tuple[int, int]
    ops: dict[str, OpRule]
    refused: dict[str, Refusal]

    def __post_init__(self) -> None:
        both = sorted(set(self.ops) & set(self.refused))
        if both:
            raise ValueError(f"{both} stand under ops and under refused")


def load_oplists() -> tuple[OpList, ...]:
    """Read every shipped allow-list."""
    return tuple(
        read_toml(path, OpList, what="op allow-list") for path in sorted(data_path("export", "ops").glob("*.toml"))
    )
