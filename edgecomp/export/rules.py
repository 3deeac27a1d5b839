"""All rules of `edgecomp check`, in one table: `RULES`, at the end of this file.

EC1xx ops, EC2xx shapes, EC3xx types and precision, EC4xx files and opset. An id is never given to another rule, and one
that goes is not used again. What a TensorRT takes stands in the op lists (`export/ops/*.toml`), with its source; a rule
with `takes` gives a name to one of their conditions. A rule with `node` or `graph` is a function here, which yields
what it finds; its docstring states the source.

To add a rule: write the function, add one row to the table, and plant its fault in `tests/unit/test_check.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from edgecomp.export.light import LARGEST_PROTOBUF
from edgecomp.export.view import GraphView, NodeView
from edgecomp.specs import OpList, Target
from edgecomp.specs.verdict import Verdict

__all__ = ["RULES", "Condition", "Hit", "Rule", "Scope"]

_LARGEST_MASK = 16 << 20  # bytes; a larger constant is a weight, and no mask
_FLOAT16_MAX = 65504.0
# What lies between a mask and the Cast that narrows it: moves, and what adds, scales or chooses.
_MASK_OPS = frozenset(
    {"Add", "Sub", "Mul", "Where", "Max", "Min", "Reshape", "Expand", "Unsqueeze", "Squeeze", "Transpose", "Slice"}
    | {"Concat", "Identity", "Gather", "Tile", "Constant"}
)
_MASKED_BY = frozenset({"Add", "Sub", "Mul", "Where", "Expand", "Concat"})
_DEEPEST_MASK = 12  # nodes
# Types of a graph, by the word that a target's `precisions` has for them.
_PRECISIONS = {
    "float16": "fp16",
    "bfloat16": "bf16",
    "float8e4m3fn": "fp8",
    "float4e2m1": "fp4",
}


@dataclasses.dataclass(frozen=True)
class Scope:
    """What a graph is held to.

    Attributes:
        lists: the op lists of the TensorRTs that build for the target with this runtime.
        runtime: `tensorrt` or `rtx`.
        plugin_ops: ops, as `domain::Op`, that a plugin of the user runs.
    """

    target: Target
    runtime: str
    lists: tuple[OpList, ...]
    plugin_ops: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Hit:
    """What a rule found: with the value, what to do, the node where it is one, and another verdict than the rule's."""

    what: str
    remedy: str
    node: NodeView | None = None
    verdict: Verdict | None = None


@dataclasses.dataclass(frozen=True)
class Condition:
    """Which conditions of the op lists a rule gives its id to; empty fields match all.

    Attributes:
        kinds: a condition of `OpRule`, or `refused`, or `absent` (the op is on no side of the list).
        ops: the ops. part: the attribute or input. values: the values that break it. stricter: those alone that are
            edgecomp's own, which leave a node unverified.
    """

    kinds: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    part: str = ""
    values: tuple[str, ...] = ()
    stricter: bool = False

    def fits(self, kind: str, op: str, part: str, value: str, *, stricter: bool) -> bool:
        """Say whether this is such a condition."""
        return (
            (not self.kinds or kind in self.kinds)
            and (not self.ops or op in self.ops)
            and (not self.part or part == self.part)
            and (not self.values or value in self.values)
            and (stricter or not self.stricter)
        )


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule: its stable id and name, its verdict, its source, and how it finds.

    Attributes:
        takes: the conditions of the op lists that it names; the first row that fits has it.
        node, graph: a function of a node, or of the whole graph.
    """

    id: str
    name: str
    verdict: Verdict
    source: str
    takes: Condition | None = None
    node: Callable[[NodeView, Scope], Iterator[Hit]] | None = None
    graph: Callable[[GraphView, Scope], Iterator[Hit]] | None = None


# -- ops ------------------------------------------------------------------------------------------------------


def _foreign_domain(node: NodeView, scope: Scope) -> Iterator[Hit]:
    """Find ops that only a plugin could run. Source: TENSORRT.md section 3, PEERS.md row 27."""
    if not node.is_onnx and node.op not in scope.plugin_ops:
        yield Hit(
            f"domain {node.proto.domain!r} is not ONNX's own, and the model has no function body for the op",
            f"give it a function body of ONNX ops, or, where a plugin of yours runs it, --plugin {node.op}",
            node,
        )


def _plugin_op(node: NodeView, scope: Scope) -> Iterator[Hit]:
    """Find ops that the user says a plugin runs: nothing here knows what it takes. Source: TENSORRT.md section 2."""
    if node.op in scope.plugin_ops:
        yield Hit("a plugin of yours runs it, which is not looked at here", "build with the plugin, and compare", node)


def _topk_unread(node: NodeView, scope: Scope) -> Iterator[Hit]:
    """Find a TopK whose K is fixed and yet not computed here, in a row that is long enough to pass the limit.

    Source: as for `topk-k-limit`.
    """
    if node.proto.op_type != "TopK" or not node.is_onnx or not node.is_known(1) or node.largest(1) is not None:
        return
    limit = min((rule.largest_constant["1"] for one in scope.lists if (rule := one.ops.get("TopK"))), default=0)
    dims = node.graph.dims.get(node.input_name(0))
    axis = node.attribute("axis")
    row = dims[-1 if axis is None else axis] if dims else None
    if row is None or row > limit:
        yield Hit(
            f"K is computed from fixed sizes by ops that are not followed here, and may pass {limit}",
            "fold constants before the check (onnxslim, onnxsim), or make K a constant when exporting",
            node,
        )


# -- shapes ---------------------------------------------------------------------------------------------------


def _dynamic_input(graph: GraphView, scope: Scope) -> Iterator[Hit]:
    """Find inputs without a fixed shape. Source: PEERS.md rows 5, 9 and 29; DESIGN.md, decision 10."""
    for name, shape in graph.dynamic_inputs.items():
        yield Hit(
            f"input {name!r} has the shape {shape}: a builder wants an optimization profile for it, and edgecomp "
            "builds static shapes alone",
            "export with fixed sizes; where the first dimension alone is open, --fix --batch N binds it",
        )


def _dynamic_output(graph: GraphView, scope: Scope) -> Iterator[Hit]:
    """Find outputs whose shape is not known before a run. Source: PEERS.md row 9; `edgecomp build` refuses them."""
    for name in graph.outputs:
        if name not in graph.known_shapes:
            maker = graph.makers.get(name)
            yield Hit(
                f"the shape of output {name!r} depends on the data, or on an op that is not known here",
                "give it a fixed length, padded, with a count or mask",
                maker,
            )


# -- types and precision --------------------------------------------------------------------------------------


def _precision_of_target(node: NodeView, scope: Scope) -> Iterator[Hit]:
    """Find types that the target's hardware has not. Source: its TOML file; TENSORRT.md sections 4, 5 and 7."""
    for dtype in sorted(node.types()):
        precision = _PRECISIONS.get(dtype, "")
        if precision and precision not in scope.target.precisions:
            has = ", ".join(scope.target.precisions)
            yield Hit(
                f"{dtype} does not run on {scope.target.name} (SM{scope.target.sm}), which has {has}",
                "export with one of these",
                node,
            )


def _zero_point(node: NodeView, scope: Scope) -> Iterator[Hit]:
    """Find quantisation that is not symmetric. Source: the op lists (zero point 0); TENSORRT.md section 7."""
    if node.is_onnx and node.proto.op_type in ("QuantizeLinear", "DequantizeLinear"):
        zero = node.graph.constant(node.input_name(2)) if node.input_name(2) else None
        if zero is not None and np.any(zero.astype(np.float32) != 0):
            seen = zero.astype(np.float32).ravel()
            yield Hit(
                f"the zero point is {seen[np.argmax(np.abs(seen))]:g}, and must be 0",
                "quantise symmetrically: ActivationSymmetric and WeightSymmetric, QInt8",
                node,
            )


def _float16_overflow(node: NodeView, scope: Scope) -> Iterator[Hit]:
    """Find finite constants, masks above all, that a Cast to float16 makes infinite.

    Source: STYLE.md (masks add a finite negative that fp16 holds); PEERS.md row 11.
    """
    if node.proto.op_type != "Cast" or not node.is_onnx or node.attribute("to") != 10:  # FLOAT16
        return
    for name, values in _constants_behind(node):
        finite = values[np.isfinite(values)]
        if finite.size and (worst := float(finite[np.argmax(np.abs(finite))])) and abs(worst) > _FLOAT16_MAX:
            yield Hit(
                f"constant {name!r} holds {worst:.4g}, which becomes infinite in float16 (largest {_FLOAT16_MAX:g})",
                "mask with -1e4, or keep the mask and its softmax in float32",
                node,
            )


def _float16_infinity(node: NodeView, scope: Scope) -> Iterator[Hit]:
    """Find infinite masks in float16. Source: STYLE.md (a finite negative, never -inf, before an fp16 softmax)."""
    if not node.is_onnx or node.proto.op_type not in _MASKED_BY:
        return
    for name in node.proto.input:
        tensor = node.graph.tensors.get(name)
        if tensor is not None and node.graph.types.get(name) == "float16":
            values = node.graph.constant(name, largest=_LARGEST_MASK)
            if values is not None and np.isinf(values).any():
                yield Hit(
                    f"constant {name!r} of float16 holds infinity: a row that is masked whole becomes NaN in a softmax",
                    "mask with -1e4",
                    node,
                )


def _constants_behind(node: NodeView) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yield the floating constants that reach a node through mask ops alone."""
    seen: set[str] = set()
    ahead = [(name, 0) for name in node.proto.input]
    while ahead:
        name, depth = ahead.pop()
        if not name or name in seen:
            continue
        seen.add(name)
        if name in node.graph.tensors:
            if node.graph.types.get(name) in ("float32", "float64"):
                values = node.graph.constant(name, largest=_LARGEST_MASK)
                if values is not None:
                    yield name, values
            continue
        maker = node.graph.makers.get(name)
        if maker is not None and maker.is_onnx and maker.proto.op_type in _MASK_OPS and depth < _DEEPEST_MASK:
            ahead += [(source, depth + 1) for source in maker.proto.input]


def _fp32_product_on_turing(node: NodeView, scope: Scope) -> Iterator[Hit]:
    """Find float32 products for SM75 with TensorRT for RTX. Source: `export/ops/tensorrt-rtx.toml`, by trial."""
    products = ("MatMul", "Gemm", "Einsum")
    is_turing = scope.runtime == "rtx" and scope.target.sm == 75
    if is_turing and node.is_onnx and node.proto.op_type in products and node.first_type() == "float32":
        yield Hit(
            f"TensorRT for RTX builds no float32 {node.proto.op_type} for {scope.target.name} (SM75)",
            "export in fp16, or use full TensorRT: --runtime tensorrt",
            node,
        )


def _bf16_conv(node: NodeView, scope: Scope) -> Iterator[Hit]:
    """Find bfloat16 Conv below opset 22, where ONNX has none. Source: TENSORRT.md section 7."""
    if node.is_onnx and node.proto.op_type == "Conv" and node.first_type() == "bfloat16" and node.graph.opset < 22:
        yield Hit(
            f"Conv has no bfloat16 before opset 22, and this is opset {node.graph.opset}: the file is not valid ONNX",
            "export with --opset 22",
            node,
        )


# -- files and opset ------------------------------------------------------------------------------------------


def _opset(graph: GraphView, scope: Scope) -> Iterator[Hit]:
    """Find an opset that a list does not take. Ops that did not change since one that it takes are fine.

    Source: the op lists. A lower bound that a document states is enforced by the parser; an upper one is not.
    """
    newest = onnx.defs.onnx_opset_version()
    if graph.opset > newest:
        yield Hit(
            f"opset {graph.opset} is above {newest}, the last that the package onnx {onnx.__version__} knows here: "
            "what its ops are cannot be told",
            f"export at opset {min(newest, *(oplist.opset[1] for oplist in scope.lists))}, or check with a newer onnx",
        )
        return
    for oplist in scope.lists:
        low, high = oplist.opset
        if low <= graph.opset <= high:
            continue
        is_refused = graph.opset < low and not oplist.tried.opsets
        changed = sorted({node.op for node in graph.nodes if node.is_onnx and not in_versions(node, low, high)})
        if changed or is_refused:
            which = f"; other versions of {', '.join(changed[:6])} hold there" if changed else ""
            yield Hit(
                f"opset {graph.opset} is outside {low} to {high} of {oplist.name} ({oplist.versions}){which}",
                f"export at opset {min(max(graph.opset, low, 18), high)}",
                verdict="blocked" if is_refused else None,
            )


def in_versions(node: NodeView, low: int, high: int) -> bool:
    """Say whether an op has one definition in the graph's opset and in one of a range; an unknown opset has none."""
    if node.graph.opset > onnx.defs.onnx_opset_version():
        return False
    version = _since(node.proto.op_type, node.graph.opset)
    return bool(version) and any(_since(node.proto.op_type, opset) == version for opset in range(low, high + 1))


@functools.lru_cache(maxsize=4096)
def _since(op: str, opset: int) -> int:
    try:
        return int(onnx.defs.get_schema(op, max_inclusive_version=opset).since_version)
    except onnx.defs.SchemaError:
        return 0


def _external_outside(graph: GraphView, scope: Scope) -> Iterator[Hit]:
    """Find external data outside the model's folder. Source: TENSORRT.md section 3, "External data"."""
    for location, items in _problems(graph, leaves=True).items():
        yield Hit(
            f"external data {location!r} leaves the model's folder ({items[0]}{_more(items)}); "
            "TensorRT, ONNX Runtime and the checker refuse it",
            "save the model again with its data beside it; nothing outside was read",
        )


def _external_missing(graph: GraphView, scope: Scope) -> Iterator[Hit]:
    """Find external data that is absent or too short. Source: TENSORRT.md section 3; read from the file system."""
    for location, items in _problems(graph, leaves=False).items():
        problem = next(item.problem for item in graph.light.externals if item.location == location and item.problem)
        yield Hit(f"external data: {problem} (tensor {items[0]}{_more(items)})", "copy the model with all its files")


def _problems(graph: GraphView, *, leaves: bool) -> dict[str, list[str]]:
    """Return the tensors whose external data is not to be had, by location."""
    found: dict[str, list[str]] = {}
    for item in graph.light.externals:
        if item.problem and item.leaves == leaves:
            found.setdefault(item.location, []).append(repr(item.name))
    return found


def _more(items: list[str]) -> str:
    return f" and {len(items) - 1} more" if len(items) > 1 else ""


def _above_2_gib(graph: GraphView, scope: Scope) -> Iterator[Hit]:
    """Find files that protobuf cannot parse. Source: its limit of 2 GiB a message; PEERS.md row 26."""
    if graph.light.size > LARGEST_PROTOBUF:
        yield Hit(
            f"the file has {graph.light.size} bytes, and protobuf parses {LARGEST_PROTOBUF}: no ONNX parser reads it",
            "save the weights as external data beside the model",
        )


_LISTS = "export/ops/*.toml, each with its sources"
_SCATTERS = ("ScatterElements", "ScatterND")

RULES: tuple[Rule, ...] = (
    Rule(
        "EC101",
        "topk-k-limit",
        "blocked",
        "TENSORRT.md section 4; NVIDIA/TensorRT#4244, #4390 (PEERS.md row 1)",
        takes=Condition(("largest_constant",), ("TopK",)),
    ),
    Rule(
        "EC102",
        "topk-k-computed",
        "blocked",
        "NVIDIA/TensorRT#2721 (PEERS.md row 2); builds in TensorRT for RTX by trial",
        takes=Condition(("constant_inputs",), ("TopK",)),
    ),
    Rule(
        "EC103",
        "scatter-states-default",
        "blocked",
        "onnx/onnx-tensorrt#1013, microsoft/onnxruntime#23618 (PEERS.md row 7)",
        takes=Condition(("attributes",), _SCATTERS, "reduction", ("none",)),
    ),
    Rule(
        "EC104",
        "scatter-reduction",
        "blocked",
        "TENSORRT.md section 4; NVIDIA/TensorRT#3750 (PEERS.md rows 6 and 7)",
        takes=Condition(("attributes",), _SCATTERS, "reduction"),
    ),
    Rule(
        "EC105",
        "resize-antialias",
        "blocked",
        "TENSORRT.md section 4",
        takes=Condition(("attributes",), ("Resize",), "antialias"),
    ),
    Rule("EC106", "op-refused", "blocked", _LISTS, takes=Condition(("refused",))),
    Rule("EC107", "op-not-listed", "unverified", _LISTS, takes=Condition(("absent",))),
    Rule("EC109", "domain-unknown", "blocked", "TENSORRT.md section 3; PEERS.md row 27", node=_foreign_domain),
    Rule("EC110", "plugin-op", "unverified", "TENSORRT.md section 2", node=_plugin_op),
    Rule("EC111", "topk-k-not-read", "unverified", "TENSORRT.md section 4; PEERS.md rows 1 and 2", node=_topk_unread),
    Rule("EC201", "dynamic-input", "blocked", "PEERS.md rows 5, 9 and 29; DESIGN.md decision 10", graph=_dynamic_input),
    Rule(
        "EC202",
        "computed-shape",
        "unverified",
        "export/ops/README.md: a parser takes a computed shape, and the engine then has dynamic ones",
        takes=Condition(("constant_inputs",), stricter=True),
    ),
    Rule("EC203", "dynamic-output", "unverified", "PEERS.md row 9; DESIGN.md decision 10", graph=_dynamic_output),
    Rule(
        "EC301",
        "precision-not-on-target",
        "blocked",
        "profiles/targets/*.toml; TENSORRT.md sections 4, 5 and 7",
        node=_precision_of_target,
    ),
    Rule(
        "EC302",
        "dequantize-int32",
        "blocked",
        "TENSORRT.md section 7",
        takes=Condition(("types",), ("DequantizeLinear",), values=("int32",)),
    ),
    Rule(
        "EC303",
        "dequantize-uint8",
        "unverified",
        "export/ops/*.toml: not documented",
        takes=Condition(("types",), ("DequantizeLinear",), values=("uint8",)),
    ),
    Rule("EC304", "zero-point", "blocked", "export/ops/*.toml; TENSORRT.md section 7", node=_zero_point),
    Rule(
        "EC305", "float16-overflow", "blocked", "STYLE.md, static-shape rules; PEERS.md row 11", node=_float16_overflow
    ),
    Rule("EC306", "float16-infinity", "unverified", "STYLE.md, static-shape rules", node=_float16_infinity),
    Rule("EC307", "fp32-product-on-turing", "blocked", "export/ops/tensorrt-rtx.toml", node=_fp32_product_on_turing),
    Rule("EC308", "bf16-conv-opset", "unverified", "TENSORRT.md section 7", node=_bf16_conv),
    Rule("EC309", "op-type", "blocked", _LISTS, takes=Condition(("types",))),
    Rule("EC401", "opset", "unverified", _LISTS, graph=_opset),
    Rule("EC402", "external-data-outside", "blocked", "TENSORRT.md section 3", graph=_external_outside),
    Rule("EC403", "external-data-missing", "blocked", "TENSORRT.md section 3", graph=_external_missing),
    Rule("EC404", "file-above-2-gib", "blocked", "protobuf: 2 GiB a message; PEERS.md row 26", graph=_above_2_gib),
    # What no row above has named. Last, since the first row that fits a condition has it.
    Rule("EC108", "op-condition", "blocked", _LISTS, takes=Condition()),
)
