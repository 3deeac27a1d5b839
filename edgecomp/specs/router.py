"""The names of the routers; each is a file of `edgecomp/routers/`, but `fixed`, which needs no graph."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ROUTERS", "RouterFacts", "router_names"]


class RouterFacts(NamedTuple):
    """What a router looks at, whether at the words of a request too, and what it is."""

    reads: str
    words: bool
    summary: str


ROUTERS = {
    "fixed": RouterFacts("nothing", False, "always the same bucket; the baseline of all others"),
    "difficulty": RouterFacts("image", True, "edges, colours and objects of the image, and words of the question"),
    "detail": RouterFacts("image", True, "details that the words ask for, many edges, or text in the image"),
    "complexity": RouterFacts("stem", False, "variance of neighbouring tokens"),
    "coverage": RouterFacts("stem", False, "the smallest bucket whose kept scores hold a share of all of them"),
    "policy": RouterFacts("stem", False, "a small trained network on the mean token"),
}


def router_names() -> tuple[str, ...]:
    """Return the routers that there are."""
    return tuple(ROUTERS)
