"""What `check` says of a graph: four verdicts, findings with stable rule ids, and the rewrites that were proven."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

__all__ = ["VERDICTS", "Finding", "GraphCheck", "Proof", "Rewrite", "Verdict", "is_at_most", "worst"]

Verdict = Literal["blocked", "unverified", "likely", "verified"]

#: From the worst to the best.
#: blocked: a rule says that the target refuses the node, or changes its numbers without a word.
#: unverified: nobody tried it on this flavour and no document takes it; or it is stricter practice that it breaks.
#: likely: a document takes it, or it was tried with another opset, type or compute capability.
#: verified: the op was tried on this flavour with this opset, type and compute capability, and built.
VERDICTS: tuple[Verdict, ...] = ("blocked", "unverified", "likely", "verified")


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the worst of some verdicts; `verified` where there are none."""
    return min(verdicts, key=VERDICTS.index, default="verified")


def is_at_most(verdict: Verdict, limit: Verdict) -> bool:
    """Say whether a verdict is as bad as `limit`, or worse."""
    return VERDICTS.index(verdict) <= VERDICTS.index(limit)


class Finding(msgspec.Struct, frozen=True):
    """One thing that a rule found.

    Attributes:
        rule, name: the stable id and name, `EC101` and `topk-k-limit`.
        what: what was found, with the value.
        node, op, module: where: the node's name, its op, the torch module it came from; "" where it is no node.
            A node without a name is called by its first output.
        remedy: what to do.
        by: the op list that says so, or "" where it is a rule of its own.
        source: where the rule was read or seen.
    """

    rule: str
    name: str
    verdict: Verdict
    what: str
    node: str
    op: str
    module: str
    remedy: str
    by: str
    source: str


class GraphCheck(msgspec.Struct, frozen=True):
    """One ONNX file.

    Attributes:
        opset: of the ONNX domain.
        inlined: calls of model-local functions that were replaced by the function's body before the check.
        nodes: nodes by verdict, each the worst over the op lists.
        ops: op names by verdict, with how often each occurs.
        findings: in the order of the graph, those about inputs and files first.
    """

    file: str
    opset: int
    inlined: int
    verdict: Verdict
    nodes: dict[Verdict, int]
    ops: dict[Verdict, dict[str, int]]
    findings: tuple[Finding, ...]


class Rewrite(msgspec.Struct, frozen=True):
    """A change of the graph that is provably equal: the rule that it cures, the node, what was done, and why equal."""

    rule: str
    node: str
    what: str
    why: str
    tolerance: float


class Proof(msgspec.Struct, frozen=True):
    """How the rewritten graph was compared with the given one, in ONNX Runtime without graph optimisation.

    Attributes:
        runs: seeded inputs that were run through both; seeds: theirs.
        max_rel: largest difference over the largest value of an output; 0 where all outputs are equal bit by bit.
        tolerance: the largest difference that the rewrites allow.
    """

    runtime: str
    runs: int
    seeds: tuple[int, ...]
    max_rel: float
    tolerance: float
