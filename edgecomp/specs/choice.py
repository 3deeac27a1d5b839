"""What a graph chooses: the nodes that a forced graph takes out of its hands."""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = ["ChoiceNode", "ForcedGraph"]


class ChoiceNode(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A node of a graph that chooses among tokens by a score.

    Attributes:
        number: of the choice, in the order of the graph, which is that of the original's.
        op: `TopK`, or `ArgMax` for the best alone (of the smallest values: likewise, `largest` false).
        where: the torch module whose values it is made of, for example `backbone.model.blocks.3`.
        indices: shape of what is chosen.
        axis: of the scores, counted from the end.
        k: how many are chosen of each row.
        largest: whether the highest scores are chosen.
        ordered: whether the order of what is chosen matters; not where it is sorted by place afterwards.
        merge: the number of the merge that it is a part of; -1: none.
        partition: of that merge; "" where there is none.
        r: tokens that the merge removes.
        prefix: tokens in front that the merge leaves alone.
    """

    number: int
    op: Literal["TopK", "ArgMax"]
    where: str
    indices: tuple[int, ...]
    axis: int
    k: int
    largest: bool
    ordered: bool
    merge: int = -1
    partition: str = ""
    r: int = 0
    prefix: int = 0

    @property
    def name(self) -> str:
        """What its inputs and outputs in the forced graph begin with."""
        return f"choice.{self.number:03}.{self.where or self.op}"


class ForcedGraph(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A graph that takes what to choose as inputs, and says what it would have chosen, and by which scores.

    Attributes:
        model: file name of the graph that it was made of.
        source_sha256: of that graph.
        sha256: of the forced one.
        edgecomp: the version that made it.
        choices: its choices.
    """

    model: str
    source_sha256: str
    sha256: str
    edgecomp: str
    choices: tuple[ChoiceNode, ...]
