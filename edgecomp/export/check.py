"""Holds an ONNX file to the rules, without building: every node against the op lists, and the traps around it.

Torch-free, and free of onnx_ir: the whole verb starts in half a second. Weights are not read (`light`).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from onnx import inliner, shape_inference

from edgecomp.errors import RunError
from edgecomp.export.light import LightModel, read_light
from edgecomp.export.rules import RULES, Hit, Rule, Scope, in_versions
from edgecomp.export.view import GraphView, NodeView
from edgecomp.specs import OpList
from edgecomp.specs.verdict import VERDICTS, Finding, GraphCheck, Verdict, worst

__all__ = ["check_graph", "infer_shapes", "inline_calls"]

_MOST_NODES = 1_000_000  # of an inlined function
_MOST_FOLLOWED = 1 << 20  # elements whose values shape inference follows, at some 150 bytes each

_FLOATS = frozenset({"float16", "bfloat16", "float32", "float64", "float8e4m3fn", "float8e5m2", "float4e2m1"})


def check_graph(path: Path, scope: Scope) -> GraphCheck:
    """Check one ONNX file.

    Model-local functions are inlined first, but those that a plugin takes; shapes are inferred. Weights stay on disk.

    Raises:
        RunError: the file is absent, truncated or no ONNX model; or its functions cannot be inlined.
    """
    light = read_light(path)
    model, inlined = inline_calls(light, scope.plugin_ops)
    graph = GraphView(light, infer_shapes(model))
    findings: list[Finding] = []
    for rule in RULES:
        if rule.graph is not None:
            findings += [_finding(rule, hit) for hit in rule.graph(graph, scope)]
    verdicts: list[tuple[NodeView, Verdict]] = []
    for node in graph.nodes:
        found = list(_findings_of(node, scope))
        findings += found
        verdicts.append((node, worst([*(item.verdict for item in found), *_standing(node, scope)])))
    counted = {verdict: Counter(node.op for node, mine in verdicts if mine == verdict) for verdict in VERDICTS}
    return GraphCheck(
        file=path.name,
        opset=graph.opset,
        inlined=inlined,
        verdict=worst([*(item.verdict for item in findings), *(verdict for _, verdict in verdicts)]),
        nodes={verdict: sum(ops.values()) for verdict, ops in counted.items()},
        ops={
            verdict: dict(sorted(ops.items(), key=lambda item: (-item[1], item[0]))) for verdict, ops in counted.items()
        },
        findings=tuple(findings),
    )


def inline_calls(light: LightModel, kept_ops: Collection[str] = ()) -> tuple[Any, int]:
    """Return the model without functions but those of `kept_ops`, and how many calls were replaced.

    Raises:
        RunError: functions that cannot be inlined.
    """
    model = light.proto
    names = {(f.domain, f.name) for f in model.functions}
    wanted = {name for name in names if "::".join(name) not in kept_ops}
    if not wanted:
        return model, 0
    calls = sum((node.domain, node.op_type) in wanted for node in model.graph.node)
    kept = [name for name in names if name not in wanted]
    _require_finite(light, wanted)
    try:
        return inliner.inline_selected_functions(model, kept, exclude=True), calls
    except Exception as error:  # noqa: BLE001 - the inliner's errors share no public base class
        first = (str(error).strip().splitlines() or ["no reason is given"])[0]
        raise RunError(
            f"{light.path}: its functions {', '.join('::'.join(name) for name in sorted(wanted))} cannot be inlined "
            f"({first[:200]}); run onnx.checker on it"
        ) from None


def _require_finite(light: LightModel, wanted: set[tuple[str, str]]) -> None:
    """Refuse functions that call themselves, or that grow beyond any use; the inliner would not come back."""
    calls: dict[tuple[str, str], Counter[tuple[str, str]]] = {}
    sizes: dict[tuple[str, str], int] = {}
    for function in light.proto.functions:
        called = Counter((node.domain, node.op_type) for node in function.node)
        calls[function.domain, function.name] = Counter({name: n for name, n in called.items() if name in wanted})
        sizes[function.domain, function.name] = len(function.node)
    waiting = dict(calls)
    while waiting:
        ready = [name for name, inner in waiting.items() if not inner.keys() & waiting.keys()]
        for name in ready:
            inner = waiting.pop(name)
            sizes[name] += sum(count * sizes[one] for one, count in inner.items())
        if not ready or max(sizes.values()) > _MOST_NODES:
            listed = ", ".join(sorted("::".join(name) for name in ready or waiting))
            raise RunError(
                f"{light.path}: the functions {listed} call each other in a circle, or grow to more than {_MOST_NODES} "
                "nodes when they are inlined; mend the tool that wrote them"
            )


def infer_shapes(model: Any) -> Any:
    """Return the model with inferred shapes; as it is where inference fails, and less is known then.

    Values are followed only where shapes depend on them: each element of a value of one dimension is then noted by
    itself, whatever its type, and one line of a file can declare more elements than there is memory.
    """
    try:
        found = shape_inference.infer_shapes(model)
        graphs = list(_graphs(found.graph))
        if all(map(_is_shaped, graphs)) or sum(map(_elements_to_follow, graphs)) > _MOST_FOLLOWED:
            return found
        return shape_inference.infer_shapes(found, data_prop=True)
    except (shape_inference.InferenceError, RuntimeError, ValueError):
        return model


def _is_shaped(graph: Any) -> bool:
    """Say whether the shape of every value is known, in whole numbers."""
    known = {value.name for value in _values(graph) if _shape_of(value) is not None}
    return all(name in known for node in graph.node for name in node.output if name)


def _graphs(graph: Any) -> Iterator[Any]:
    """Yield a graph and those inside its nodes."""
    yield graph
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        for inner in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
            yield from _graphs(inner)


def _elements_to_follow(graph: Any) -> int:
    """Return how many elements the values of one dimension have together."""
    lengths = {tensor.name: max(0, tensor.dims[0]) for tensor in graph.initializer if len(tensor.dims) == 1}
    lengths |= {value.name: found[0] for value in _values(graph) if len(found := _shape_of(value) or ()) == 1}
    return sum(lengths.values())


def _values(graph: Any) -> Iterator[Any]:
    yield from (*graph.input, *graph.value_info, *graph.output)


def _shape_of(value: Any) -> tuple[int, ...] | None:
    """Return the shape of a value, or none where it is not known in whole numbers."""
    kind = value.type.tensor_type
    if not kind.HasField("shape") or any(dim.dim_value < 0 or not dim.HasField("dim_value") for dim in kind.shape.dim):
        return None
    return tuple(dim.dim_value for dim in kind.shape.dim)


def _findings_of(node: NodeView, scope: Scope) -> Iterator[Finding]:
    """Yield what the rules of nodes find, and what the op lists refuse, each condition once."""
    for rule in RULES:
        if rule.node is not None:
            for hit in rule.node(node, scope):
                yield _finding(rule, hit)
    if not node.is_onnx:
        return
    seen = set()
    for oplist in scope.lists:
        for rule, hit in _listed(node, oplist):
            key = rule.id, hit.what, hit.verdict
            if key not in seen:
                seen.add(key)
                yield _finding(rule, hit, by=f"{oplist.name} ({oplist.versions})")


def _listed(node: NodeView, oplist: OpList) -> Iterator[tuple[Rule, Hit]]:
    """Yield what one list says against a node, under the rule that names it."""
    op = node.proto.op_type
    if op in oplist.refused:
        refused = oplist.refused[op]
        yield _rule_for("refused", op, "", "", False), Hit(f"{op} is refused: {refused.reason}", refused.remedy, node)
        return
    taken = oplist.ops.get(op)
    if taken is None:
        text = f"{op} is not on the list: nobody tried it, and no document that was read takes it"
        hit = Hit(text, "build it and see, or rewrite it with ops that are on the list", node)
        yield _rule_for("absent", op, "", "", False), hit
        return
    for broken in taken.broken(node):
        is_stricter = broken.condition in taken.stricter
        rule = _rule_for(broken.condition, op, broken.part, broken.value, is_stricter)
        reason = f": {taken.reason}" if taken.reason else ""
        hit = Hit(f"{broken.text}{reason}", taken.remedy, node, "unverified" if is_stricter else None)
        yield rule, hit


@functools.lru_cache(maxsize=1024)
def _rule_for(kind: str, op: str, part: str, value: str, stricter: bool) -> Rule:
    return next(
        rule for rule in RULES if rule.takes is not None and rule.takes.fits(kind, op, part, value, stricter=stricter)
    )


def _finding(rule: Rule, hit: Hit, *, by: str = "") -> Finding:
    node = hit.node
    return Finding(
        rule=rule.id,
        name=rule.name,
        verdict=hit.verdict or rule.verdict,
        what=hit.what,
        node=node.name if node else "",
        op=node.op if node else "",
        module=node.module if node else "",
        remedy=hit.remedy,
        by=by,
        source=rule.source,
    )


def _standing(node: NodeView, scope: Scope) -> Iterator[Verdict]:
    """Yield what each list says for a node that breaks none of its conditions."""
    if not node.is_onnx:
        return
    for oplist in scope.lists:
        tried = oplist.tried
        types = node.types() & _FLOATS
        if node.proto.op_type not in oplist.ops or "float64" in types or not in_versions(node, *oplist.opset):
            yield "unverified"
        elif (
            scope.target.sm in tried.sm
            and types <= set(tried.types)
            and any(in_versions(node, opset, opset) for opset in tried.opsets)
        ):
            yield "verified"
        else:
            yield "likely"
