"""The graphs of a bundle: stem, router, buckets and plain model, lowered, passed, checked, and saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import onnx
from msgspec.structs import replace

from edgecomp.backbones.assemble import Assembly
from edgecomp.backbones.seam import Rest, Stem
from edgecomp.bundle import WEIGHTS, bucket_file, side_file
from edgecomp.errors import ExportError, InvalidSpec
from edgecomp.export.passes import WeightsFile
from edgecomp.export.ranges import OutOfRange
from edgecomp.export.samples import Sample
from edgecomp.export.writer import GraphWriter, Types
from edgecomp.specs import Recipe
from edgecomp.specs.manifest import Bucket, Graph, PlainGraph, RouterGraph
from edgecomp.specs.precision import PrecisionPlan

__all__ = ["Graphs", "write_graphs"]

_NO_STEM = Graph("", 0, (), (), 0, {})
_Kind = TypeVar("_Kind", bound=Graph)


class Graphs(NamedTuple):
    """What was written.

    Attributes:
        risky: values that come too near to the largest number of fp16.
    """

    buckets: tuple[Bucket, ...]
    plain: tuple[PlainGraph, ...]
    stem: tuple[Graph, ...]
    router: tuple[RouterGraph, ...]
    risky: tuple[OutOfRange, ...]


def write_graphs(
    folder: Path,
    assembly: Assembly,
    recipe: Recipe,
    *,
    opset: int,
    precision: PrecisionPlan,
    samples: Sequence[Sample],
    batches: Sequence[int],
    with_plain: bool,
    progress: Callable[[str], None],
) -> Graphs:
    """Write one graph for each budget and batch, what stands beside them, and their one weights file, into `folder`.

    Where the models have a seam, the part in front of it is written once a batch, and each bucket is the rest.

    Args:
        precision: what the graphs compute in; a router's stay in fp32.
        samples: inputs to calibrate with, of one row each; none where the precision needs none.

    Raises:
        InvalidSpec: a pattern of the precision names nothing in any graph, or no layer can be quantised.
        ExportError: torch, the static check, an op allow-list or the ONNX checker refuses a graph.
    """
    buckets, plain, stems, routers = [], [], [], []
    with WeightsFile(folder / WEIGHTS) as weights:
        writer = GraphWriter(
            folder, recipe, opset=opset, precision=precision, samples=samples, weights=weights, progress=progress
        )
        for batch in batches:
            stem = _NO_STEM
            if (seam := assembly.seam) is not None:
                front = Stem(assembly.models[-1], seam)
                name = side_file("stem", batch, batches)
                one = writer.write(name, front, batch)
                specs = front.input_specs(batch), front.output_specs(batch)
                stem = _typed(Graph(name, batch, *specs, one.flops, one.ops), one.types)
                stems.append(stem)
            if assembly.router is not None:
                name, router = side_file("router", batch, batches), assembly.router
                one = writer.write(name, router, batch)
                inputs, flops = router.input_specs(batch), one.flops
                if router.reads == "stem":
                    inputs, flops = (*stem.inputs, *inputs[len(router.stem_inputs) :]), stem.flops + flops
                file = stem.model if router.reads == "stem" else ""
                routers.append(RouterGraph(name, batch, inputs, router.output_specs(batch), flops, one.ops, file))
            for model in assembly.models:
                budget = model.compressor.budget
                name = bucket_file(budget, batch)
                part = model if seam is None else Rest(model, seam)
                one = writer.write(name, part, batch, f"m{budget.tokens_out}")
                specs, flops = (model.input_specs(batch), model.output_specs(batch)), stem.flops + one.flops
                bucket = Bucket(name, batch, *specs, flops, one.ops, stem.model, budget=budget, joint=one.joint)
                buckets.append(_typed(bucket, one.types))
            if with_plain and assembly.plain is not None:
                name = side_file("plain", batch, batches)
                specs = assembly.plain.input_specs(batch), assembly.plain.output_specs(batch)
                one = writer.write(name, assembly.plain, batch)
                plain.append(_typed(PlainGraph(name, batch, *specs, one.flops, one.ops), one.types))
        writer.require_patterns_used()
        if precision.quantized is not None and not any(graph.quantized for graph in (*stems, *buckets)):
            raise InvalidSpec(
                f"--precision {precision.word}: there is nothing to quantise, for these graphs hold no linear layer of "
                "16 rows and columns or more; export with fp16"
            )
    for path in sorted(folder.glob("*.onnx")):
        try:
            onnx.checker.check_model(str(path), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(f"{path.name} does not pass the ONNX checker: {str(error).splitlines()[0]}") from error
    buckets = [replace(bucket, own_bytes=weights.own_bytes(bucket.golden_part)) for bucket in buckets]
    buckets.sort(key=lambda bucket: bucket.budget.tokens_out)
    return Graphs(tuple(buckets), tuple(plain), tuple(stems), tuple(routers), tuple(writer.risky.values()))


def _typed(graph: _Kind, types: Types) -> _Kind:
    """Return a graph's record with what it computes in."""
    return replace(graph, precision=types.precision, islands=types.islands, quantized=types.quantized)
