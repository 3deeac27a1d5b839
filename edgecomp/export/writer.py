"""Writes one graph of a bundle: lowered, passed, checked, and saved in the types of its precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import onnx_ir as ir

from edgecomp import __version__
from edgecomp.backbones.inside import InsideModel
from edgecomp.backbones.placed import PlacedModel, PlainModel
from edgecomp.backbones.seam import Rest, Stem
from edgecomp.errors import InvalidSpec
from edgecomp.export.flops import count_flops, count_ops
from edgecomp.export.lower import lower, quiet_tools
from edgecomp.export.opcheck import require_allowed
from edgecomp.export.passes import (
    WeightsFile,
    add_merge_body,
    inline_functions,
    insert_qdq,
    is_named_in,
    name_weights,
    require_static,
    set_precision,
    share_weights,
    strip_metadata,
    tensors_to_calibrate,
)
from edgecomp.export.passes.strip_metadata import module_of
from edgecomp.export.ranges import OutOfRange, Range, collect_ranges, nodes_out_of_range, run_graph
from edgecomp.export.samples import Sample, in_rows
from edgecomp.routers import Router
from edgecomp.specs import Recipe, TensorSpec, load_oplists
from edgecomp.specs.precision import PrecisionPlan, pattern_of

__all__ = ["GraphWriter", "Part", "Written"]

Part = PlacedModel | PlainModel | Stem | Rest | Router
_NAMED = 5


class Written(NamedTuple):
    """What is known of a graph's file.

    Attributes:
        flops: of one run.
        ops: how often each occurs.
        islands: nodes in fp32 of a graph that is not, each with the reason.
        quantized: nodes that compute on quantised numbers.
    """

    flops: int
    ops: dict[str, int]
    islands: dict[str, str]
    quantized: tuple[str, ...]


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
        with model.as_exported() if isinstance(model, InsideModel) else nullcontext():
            graph = lower(module, inputs=inputs, outputs=outputs, opset=self.opset)
        strip_metadata(graph, producer_version=__version__)
        require_static(graph)
        islands: dict[str, str] = {}
        quantized: tuple[str, ...] = ()
        if not isinstance(module, Router):
            islands, quantized = self._set_types(graph, module, batch, outputs)
        add_merge_body(graph)
        with quiet_tools():
            flat = inline_functions(graph)
        require_static(flat)
        require_allowed(flat, load_oplists(), extra=self.recipe.extra_ops)
        name_weights(graph)
        written = Written(count_flops(flat), count_ops(graph), islands, quantized)
        share_weights(graph, self.weights, user=user or name)
        (self.folder / name).write_bytes(ir.to_proto(graph).SerializeToString(deterministic=True))
        return written

    def require_patterns_used(self) -> None:
        """Refuse a pattern that fitted nothing in any graph."""
        if self._unused:
            modules = list(dict.fromkeys(self._modules))
            raise InvalidSpec(
                f"--fp32 {next(iter(self._unused))!r} fits no module and no node; modules are for example "
                f"{', '.join(modules[:: max(1, len(modules) // _NAMED)][:_NAMED])}"
            )

    def _set_types(
        self, graph: ir.Model, module: Part, batch: int, outputs: Sequence[TensorSpec]
    ) -> tuple[dict[str, str], tuple[str, ...]]:
        """Write the precision into a graph; return its islands and its quantised nodes."""
        plan = self.precision
        asked = {pattern: is_named_in(graph, pattern) for pattern in plan.fp32}
        self._unused = {pattern: None for pattern in self._unused if not asked[pattern]}
        self._modules += [name for node in graph.graph if (name := module_of(node))]
        quantized: tuple[str, ...] = ()
        ranges = self._ranges(graph, module, batch) if plan.needs_samples else {}
        risky = nodes_out_of_range(graph, ranges) if plan.rest == "fp16" else ()
        if plan.quantized is not None:
            made = insert_qdq(graph, ranges, kind=plan.quantized, scale_type=plan.rest, keep=self._is_kept)
            quantized = tuple(one.node for one in made)
        if plan.rest == "fp32":
            return {}, quantized
        # what a stem hands over beside tokens is what another graph chooses by
        scores = [spec.name for spec in outputs if spec.kind != "tokens"] if isinstance(module, Stem) else ()
        islands = set_precision(graph, plan.rest, fp32=plan.fp32, scores=scores)
        values = {value.name: value.dtype for node in graph.graph for value in node.outputs}
        for one in risky:
            if ir.DataType.FLOAT16 in (values.get(one.tensor), values.get(f"{one.tensor}.fp16")):
                known = self.risky.get(one.node)
                self.risky[one.node] = one if known is None or known.absmax < one.absmax else known
        return islands, quantized

    def _is_kept(self, node: ir.Node) -> bool:
        return bool(pattern_of(self.precision.fp32, node=node.name or "", module=module_of(node)))

    def _ranges(self, graph: ir.Model, module: Part, batch: int) -> dict[str, Range]:
        """Run the graph in fp32 on the samples, and keep what a stem hands to the graphs behind it."""
        runnable = graph.clone()
        add_merge_body(runnable)
        samples = self._handed if isinstance(module, Rest) else in_rows(self.samples, batch)
        every = self.precision.rest == "fp16"  # its range is checked everywhere
        wanted = () if every else tensors_to_calibrate(graph, keep=self._is_kept)
        if isinstance(module, Stem):
            handed = run_graph(runnable, samples)
            self._handed = [{**given, **made} for given, made in zip(samples, handed, strict=True)]
        return collect_ranges(runnable, samples, tensors=wanted) if every or wanted else {}
