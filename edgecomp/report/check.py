"""What `check` found: the value, and the text that `edgecomp check` prints."""

from __future__ import annotations

import msgspec

from edgecomp.report.text import table
from edgecomp.specs.verdict import VERDICTS, Finding, GraphCheck, Proof, Rewrite, Verdict, is_at_most

__all__ = ["CheckReport", "FixReport", "HeldTo", "describe_check"]

_NODES_SHOWN = 3
_OPS_SHOWN = 8
_RUNTIMES = {"rtx": "TensorRT for RTX", "tensorrt": "TensorRT"}


class HeldTo(msgspec.Struct, frozen=True):
    """An op list that the nodes were held to: its name, its versions, and the compute capabilities it was tried for."""

    name: str
    versions: str
    tried_sm: tuple[int, ...]


class FixReport(msgspec.Struct, frozen=True):
    """What `--fix` did: the file it wrote ("" where nothing could be rewritten), and what `check` says of that."""

    path: str
    rewrites: tuple[Rewrite, ...]
    proof: Proof | None
    graph: GraphCheck | None


class CheckReport(msgspec.Struct, frozen=True):
    """The graphs of a bundle or file, held to a target. True where the verdict is better than `fail_on`.

    Attributes:
        verdict: the worst of the graphs; with `--fix`, of the file that was written.
        fixed: with `--fix`, else None.
    """

    path: str
    target: str
    sm: int
    runtime: str
    lists: tuple[HeldTo, ...]
    fail_on: Verdict
    verdict: Verdict
    graphs: tuple[GraphCheck, ...]
    fixed: FixReport | None = None

    def __bool__(self) -> bool:
        return not is_at_most(self.verdict, self.fail_on)


def describe_check(report: CheckReport) -> str:
    """Return the text: the verdict of each graph, then each finding with what to do."""
    lines = [
        f"{report.path}: held to {report.target} (SM{report.sm}) with {_RUNTIMES[report.runtime]}; nothing was built"
    ]
    lines += [f"  {held.name:<12} {held.versions}: {_basis(held, report.sm)}" for held in report.lists]
    graphs = [*report.graphs, *([report.fixed.graph] if report.fixed and report.fixed.graph else [])]
    rows = [
        [
            graph.file,
            graph.opset,
            sum(graph.nodes.values()),
            *(graph.nodes.get(word, 0) for word in VERDICTS),
            graph.verdict,
        ]
        for graph in graphs
    ]
    lines += ["", table(["model", "opset", "nodes", *VERDICTS, "verdict"], rows)]
    for graph in report.graphs:
        lines += _describe_findings(graph, named=len(report.graphs) > 1)
    if report.fixed is not None:
        lines += _describe_fix(report.fixed)
    gate = "pass" if report else "FAIL"
    return "\n".join([*lines, "", f"verdict: {report.verdict}; {gate} (fails on {report.fail_on})"])


def _basis(held: HeldTo, sm: int) -> str:
    if not held.tried_sm:
        return "read from documents, nothing tried, so likely at best"
    tried = ", ".join(f"SM{one}" for one in held.tried_sm)
    return f"tried on {tried}" + ("" if sm in held.tried_sm else f", not on SM{sm}, so likely at best")


def _describe_findings(graph: GraphCheck, *, named: bool) -> list[str]:
    """Return the findings, those that differ by their node alone as one."""
    groups: dict[tuple[str, str, str, str], list[Finding]] = {}
    for finding in sorted(graph.findings, key=lambda finding: VERDICTS.index(finding.verdict)):
        groups.setdefault((finding.verdict, finding.rule, finding.what, finding.by), []).append(finding)
    lines = []
    for same in groups.values():
        first = same[0]
        file = f"{graph.file}: " if named else ""
        lines += ["", f"{first.verdict:<10} {first.rule} {first.name}: {file}{first.what}"]
        where = [_where(finding) for finding in same[:_NODES_SHOWN] if finding.op]
        more = f", and {len(same) - _NODES_SHOWN} more" if len(same) > _NODES_SHOWN else ""
        lines += [f"  where      {', '.join(where)}{more}"] if where else []
        lines += [f"  says       {first.by}"] if first.by else []
        lines += [f"  do         {first.remedy}"] if first.remedy else []
    named_ops = {finding.op for finding in graph.findings}
    silent = [f"{op} {count}" for op, count in graph.ops.get("unverified", {}).items() if op not in named_ops]
    if silent:
        more = f", and {len(silent) - _OPS_SHOWN} more" if len(silent) > _OPS_SHOWN else ""
        lines += ["", f"unverified in a version or type that no list has: {', '.join(silent[:_OPS_SHOWN])}{more}"]
    return lines


def _where(finding: Finding) -> str:
    return f"{finding.op} node {finding.node!r}" + (f" of {finding.module}" if finding.module else "")


def _describe_fix(fixed: FixReport) -> list[str]:
    if not fixed.path or fixed.proof is None:
        return ["", "fix        nothing here has a rewrite that is provably equal; nothing was written"]
    proof = fixed.proof
    equal = (
        "equal bit by bit" if proof.max_rel == 0 else f"equal within {proof.max_rel:.1e} (allowed {proof.tolerance:g})"
    )
    lines = [""]
    for rewrite in fixed.rewrites:
        node = f" of node {rewrite.node!r}" if rewrite.node else ""
        lines.append(f"fix        {rewrite.rule}{node}: {rewrite.what}; {rewrite.why}")
    lines.append(f"proof      {proof.runs} seeded inputs in {proof.runtime}: outputs {equal}")
    return [*lines, f"written    {fixed.path}"]
