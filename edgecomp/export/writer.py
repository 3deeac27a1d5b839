"""Writes one graph of a bundle: lowered, passed, checked, and saved in the types of its precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import onnx_ir as ir

from edgecomp import __version__
from edgecomp.backbones.inside import InsideModel
from edgecomp.backbones.placed import PlacedModel, PlainModel
from edgecomp.backbones.seam import Rest, Stem
from edgecomp.errors import InvalidSpec
from edgecomp.export.cut import hide_outputs
from edgecomp.export.flops import count_flops, count_ops
from edgecomp.export.lower import lower
from edgecomp.export.modules import module_of
from edgecomp.export.opcheck import require_allowed
from edgecomp.export.passes import (
    WeightsFile,
    add_merge_body,
    inline_functions,
    insert_qdq,
    is_named_in,
    modules_named_in,
    name_weights,
    require_static,
    set_precision,
    share_weights,
    strip_metadata,
    tensors_to_calibrate,
)
from edgecomp.export.quiet import quiet_tools
from edgecomp.export.ranges import OutOfRange, Range, collect_largest, collect_ranges, nodes_out_of_range, run_graph
from edgecomp.export.samples import Sample, in_rows
from edgecomp.routers import Router
from edgecomp.specs import Recipe, TensorSpec, load_oplists
from edgecomp.specs.manifest import Handed, Joint
from edgecomp.specs.precision import PrecisionPlan, WrittenPrecision, pattern_of

__all__ = ["GraphWriter", "Part", "Types", "Written"]

Part = PlacedModel | PlainModel | Stem | Rest | Router
_NAMED = 5
_TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


class Types(NamedTuple):
    """What a graph computes in.

    Attributes:
        precision: of the graph.
        islands: nodes that are kept out of it, each with the reason.
        quantized: nodes that compute on quantised numbers.
    """

    precision: WrittenPrecision = "fp32"
    islands: dict[str, str] = {}  # noqa: RUF012 - never changed
    quantized: tuple[str, ...] = ()


class Written(NamedTuple):
    """What is known of a graph's file: FLOPs of one run, how often each op occurs, and what it computes in.

    Attributes:
        joint: of two methods in it, where they meet.
    """

    flops: int
    ops: dict[str, int]
    types: Types
    joint: Joint | None = None


class GraphWriter:
    """Writes the parts of a bundle into a folder, with all weights in one file beside them.

    Args:
        folder: where the graphs go.
        recipe: of the method; it may allow ops that the lists do not hold.
        opset: of the graphs.
        precision: of all graphs but a router's, which stay in fp32.
        samples: inputs to calibrate with, of one row each; read where the precision is not fp32 or bf16.
        weights: the open file.
        progress: takes a line for each graph.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        *,
        opset: int,
        precision: PrecisionPlan,
        samples: Sequence[Sample],
        weights: WeightsFile,
        progress: Callable[[str], None],
    ) -> None:
        self.folder, self.recipe, self.opset = folder, recipe, opset
        self.precision, self.samples, self.weights, self.progress = precision, samples, weights, progress
        self.risky: dict[str, OutOfRange] = {}  # by node, the largest of all graphs
        self._unused = dict.fromkeys(precision.fp32)
        self._modules: list[str] = []
        self._handed: list[Sample] = []

    def write(self, name: str, module: Part, batch: int, user: str = "") -> Written:
        """Write the graph of a part; `user` is counted as the reader of its weights, or its name.

        Raises:
            ExportError: torch, the static check or an op allow-list refuses the graph, or a type cannot hold it.
        """
        self.progress(f"exporting {name}")
        model = module.model if isinstance(module, (Stem, Rest)) else module
        inputs, outputs = module.input_specs(batch), module.output_specs(batch)
        with model.as_exported() if isinstance(model, InsideModel) else nullcontext(), _shown(module) as shown:
            handed = tuple(spec.with_batch(batch) for spec in shown)
            graph = lower(module, inputs=inputs, outputs=(*outputs, *handed), opset=self.opset)
        values = hide_outputs(graph, len(handed))
        strip_metadata(graph, producer_version=__version__)
        require_static(graph)
        types = Types() if isinstance(module, Router) else self._set_types(graph, module, batch, outputs)
        add_merge_body(graph)
        flat = graph.clone()
        with quiet_tools():
            inline_functions(flat)
        require_static(flat)
        require_allowed(flat, load_oplists(), extra=self.recipe.extra_ops)
        name_weights(graph)
        written = Written(count_flops(flat), count_ops(graph), types, _joint(module, handed, values))
        share_weights(graph, self.weights, user=user or name)
        (self.folder / name).write_bytes(ir.to_proto(graph).SerializeToString(deterministic=True))
        return written

    def require_patterns_used(self) -> None:
        """Refuse a pattern that fitted nothing in any graph."""
        if self._unused:
            modules = list(dict.fromkeys(self._modules))
            raise InvalidSpec(
                f"--fp32 {next(iter(self._unused))!r} fits no module and no node; modules are for example "
                f"{', '.join(modules[:: max(1, len(modules) // _NAMED)][:_NAMED])}; a pattern may begin at any dot, "
                "and * stands for anything"
            )

    def _set_types(self, graph: ir.Model, module: Part, batch: int, outputs: Sequence[TensorSpec]) -> Types:
        """Write the precision into a graph."""
        plan = self.precision
        asked = {pattern: is_named_in(graph, pattern) for pattern in plan.fp32}
        self._unused = {pattern: None for pattern in self._unused if not asked[pattern]}
        self._modules += modules_named_in(graph)
        quantized: tuple[str, ...] = ()
        ranges, largest = self._ranges(graph, module, batch) if plan.needs_samples else ({}, {})
        risky = nodes_out_of_range(graph, largest)
        if plan.quantized is not None:
            made = insert_qdq(graph, ranges, kind=plan.quantized, scale_type=plan.rest, keep=self._is_kept)
            quantized = tuple(one.node for one in made)
        left = {name: f"left in {plan.rest}" for name in _products(graph) if name not in quantized} if quantized else {}
        word = plan.quantized if quantized and plan.quantized is not None else plan.rest
        if plan.rest == "fp32":
            return Types(word, left, quantized)
        # what a stem hands over beside tokens is what another graph chooses by
        scores = [spec.name for spec in outputs if spec.kind != "tokens"] if isinstance(module, Stem) else ()
        counts = [spec.name for spec in outputs if spec.kind == "counts"]
        islands = set_precision(graph, plan.rest, fp32=plan.fp32, scores=scores, counts=counts)
        values = {value.name: value.dtype for node in graph.graph for value in node.outputs}
        for one in risky:
            if _TYPES[plan.rest] in (values.get(one.tensor), values.get(f"{one.tensor}.fp16")):
                known = self.risky.get(one.node)
                self.risky[one.node] = one if known is None or known.absmax < one.absmax else known
        if word == plan.rest and _TYPES[plan.rest] not in values.values():
            return Types()  # it moves numbers, and computes with none
        return Types(word, {**left, **islands}, quantized)

    def _is_kept(self, node: ir.Node) -> bool:
        return bool(pattern_of(self.precision.fp32, node=node.name or "", module=module_of(node)))

    def _ranges(self, graph: ir.Model, module: Part, batch: int) -> tuple[dict[str, Range], dict[str, float]]:
        """Run the graph in fp32 on the samples: what scales are made of, and what fp16 has to hold.

        What a stem hands to the graphs behind it is kept for them.
        """
        runnable = graph.clone()
        add_merge_body(runnable)
        samples = self._handed if isinstance(module, Rest) else in_rows(self.samples, batch)
        if isinstance(module, Stem):
            handed = run_graph(runnable, samples)
            self._handed = [{**given, **made} for given, made in zip(samples, handed, strict=True)]
        wanted = tensors_to_calibrate(graph, keep=self._is_kept) if self.precision.quantized is not None else ()
        ranges = collect_ranges(runnable, samples, tensors=wanted) if wanted else {}
        return ranges, collect_largest(runnable, samples) if self.precision.rest == "fp16" else {}


def _shown(module: Part) -> AbstractContextManager[tuple[TensorSpec, ...]]:
    """Let a model of two methods in a row show what goes from one to the other, as further outputs; yield them."""
    return module.showing_handed() if isinstance(module, PlacedModel) else nullcontext(())


def _joint(module: Part, handed: Sequence[TensorSpec], values: Sequence[ir.Value]) -> Joint | None:
    """Return where two methods meet in a graph; what nothing in it reads went with what made it."""
    if not handed or not isinstance(module, PlacedModel):
        return None
    found = zip(handed, values, strict=True)
    hands = tuple(Handed(spec, value.name or "") for spec, value in found if value.uses() or value.is_graph_output())
    return Joint(tuple(spec.name for spec in module.stem_specs()), hands)


def _products(graph: ir.Model) -> list[str]:
    return [node.name or "" for node in graph.graph if node.op_type in ("MatMul", "Gemm", "Conv", "ConvTranspose")]
