"""Op allow-lists: which ONNX ops a TensorRT takes, with constraints. One TOML file a version, in `export/ops/`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple, Protocol

import msgspec
from msgspec import Meta

from edgecomp.resources import data_path
from edgecomp.specs._toml import read_toml

__all__ = ["Broken", "NodeFacts", "OpList", "OpRule", "Refusal", "Trials", "load_oplists"]

Condition = Literal["attributes", "constant_inputs", "largest_constant", "max_rank", "types"]


class NodeFacts(Protocol):
    """What the conditions of an op ask of a node, however the graph is held."""

    def attribute_text(self, name: str) -> str | None:
        """Return an attribute as text, or None where it is absent."""

    def input_name(self, position: int) -> str:
        """Return the name of an input, or "" where it is absent."""

    def is_known(self, position: int) -> bool:
        """Say whether an input is known when the engine is built."""

    def largest(self, position: int) -> int | None:
        """Return the largest value of an input, or None where its values are not known."""

    def first_rank(self) -> int | None:
        """Return the rank of the first input, or None where it is not known."""

    def first_type(self) -> str:
        """Return the element type of the first input, or "" where it is not known."""


class Broken(NamedTuple):
    """A condition that a node breaks: its field in `OpRule`, the attribute or position, the value, and a text."""

    condition: Condition
    part: str
    value: str
    text: str


class OpRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Under which conditions an op is taken.

    Attributes:
        attributes: values that an attribute may have, as text (`"0"`, `"linear"`); an absent attribute is fine.
        constant_inputs: positions of inputs that must be constants.
        largest_constant: largest value a constant input may hold, by its position as text.
        max_rank: largest rank of the first input; 0 for no limit.
        types: element types (`float32`, `int64`, ...) the first input may have; empty for any.
        stricter: conditions that are edgecomp's own: the parser takes more, or is not known to refuse it. Its exports
            are held to them; in a graph of a user they make a node unverified, not blocked.
        reason: what happens otherwise, told to the user.
        remedy: the way out, told to the user.
    """

    attributes: dict[str, tuple[str, ...]] = {}
    constant_inputs: tuple[Annotated[int, Meta(ge=0)], ...] = ()
    largest_constant: dict[str, int] = {}
    max_rank: Annotated[int, Meta(ge=0)] = 0
    types: tuple[str, ...] = ()
    stricter: tuple[Condition, ...] = ()
    reason: str = ""
    remedy: str = ""

    def broken(self, node: NodeFacts) -> Iterator[Broken]:
        """Yield the conditions that a node of this op breaks."""
        for name, values in self.attributes.items():
            text = node.attribute_text(name)
            if text is not None and text not in values:
                wanted = f"is not among {', '.join(values)}" if values else "must be absent"
                yield Broken("attributes", name, text, f"attribute {name}={text!r} {wanted}")
        for position in self.constant_inputs:
            if (source := node.input_name(position)) and not node.is_known(position):
                yield Broken("constant_inputs", str(position), "", f"input {position} ({source!r}) is not a constant")
        for place, largest in self.largest_constant.items():
            top = node.largest(int(place))
            if top is not None and top > largest:
                yield Broken("largest_constant", place, str(top), f"input {place} is {top}, above {largest}")
        rank, dtype = node.first_rank(), node.first_type()
        if self.max_rank and rank is not None and rank > self.max_rank:
            yield Broken("max_rank", "0", str(rank), f"rank {rank} is above {self.max_rank}")
        if self.types and dtype and dtype not in self.types:
            yield Broken("types", "0", dtype, f"type {dtype} is not among {', '.join(self.types)}")


class Refusal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An op known to be refused: why, and the way out."""

    reason: Annotated[str, Meta(min_length=5)]
    remedy: Annotated[str, Meta(min_length=5)]


class Trials(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was tried of every op under `ops`: opsets, element types (`float32`, ...) and compute capabilities.

    Empty: nothing was tried, and the list is read from documents. What else was tried stands in `source`.
    """

    opsets: tuple[int, ...] = ()
    types: tuple[str, ...] = ()
    sm: tuple[int, ...] = ()


class OpList(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one TensorRT's ONNX parser takes.

    Attributes:
        name: equal to the file's stem.
        versions: the versions it was read from or tried on.
        source: documents or trials behind it.
        opset: lowest and highest opset.
        ops: ops of the ONNX domain that are taken, by name; `{}` when without condition.
        refused: ops that are known not to be taken, with the way out.
        tried: how far all ops of the list were tried.
    """

    schema: Literal[1]
    name: str
    versions: str
    source: tuple[str, ...]
    opset: tuple[int, int]
    ops: dict[str, OpRule]
    refused: dict[str, Refusal]
    tried: Trials = Trials()

    def __post_init__(self) -> None:
        both = sorted(set(self.ops) & set(self.refused))
        if both:
            raise ValueError(f"{both} stand under ops and under refused")


def load_oplists() -> tuple[OpList, ...]:
    """Read every shipped allow-list."""
    return tuple(
        read_toml(path, OpList, what="op allow-list") for path in sorted(data_path("export", "ops").glob("*.toml"))
    )
