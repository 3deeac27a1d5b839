"""The graphs of a bundle: stem, router, buckets and plain model, lowered, passed, checked, and saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import onnx
import onnx_ir as ir
from msgspec.structs import replace

from edgecomp import __version__
from edgecomp.backbones.assemble import Assembly
from edgecomp.backbones.inside import InsideModel
from edgecomp.backbones.placed import PlacedModel, PlainModel
from edgecomp.backbones.seam import Rest, Stem
from edgecomp.bundle import WEIGHTS, bucket_file, side_file
from edgecomp.errors import ExportError
from edgecomp.export.flops import count_flops, count_ops
from edgecomp.export.lower import lower, quiet_tools
from edgecomp.export.opcheck import require_allowed
from edgecomp.export.passes import (
    WeightsFile,
    add_merge_body,
    inline_functions,
    name_weights,
    require_static,
    share_weights,
    strip_metadata,
)
from edgecomp.routers import Router
from edgecomp.specs import Recipe, load_oplists
from edgecomp.specs.manifest import Bucket, Graph, PlainGraph, RouterGraph

__all__ = ["Graphs", "write_graphs"]

Part = PlacedModel | PlainModel | Stem | Rest | Router
_NO_STEM = Graph("", 0, (), (), 0, {})


class Graphs(NamedTuple):
    """What was written."""

    buckets: tuple[Bucket, ...]
    plain: tuple[PlainGraph, ...]
    stem: tuple[Graph, ...]
    router: tuple[RouterGraph, ...]


def write_graphs(
    folder: Path,
    assembly: Assembly,
    recipe: Recipe,
    *,
    opset: int,
    batches: Sequence[int],
    with_plain: bool,
    progress: Callable[[str], None],
) -> Graphs:
    """Write one graph for each budget and batch, what stands beside them, and their one weights file, into `folder`.

    Where the models have a seam, the part in front of it is written once a batch, and each bucket is the rest.

    Raises:
        ExportError: torch, the static check, an op allow-list or the ONNX checker refuses a graph.
    """
    buckets, plain, stems, routers = [], [], [], []
    with WeightsFile(folder / WEIGHTS) as weights:

        def write(name: str, module: Part, batch: int, user: str = "") -> tuple[int, dict[str, int]]:
            progress(f"exporting {name}")
            return _write_graph(folder / name, module, recipe, opset, batch, weights, user or name)

        for batch in batches:
            stem = _NO_STEM
            if (seam := assembly.seam) is not None:
                front = Stem(assembly.models[-1], seam)
                name = side_file("stem", batch, batches)
                flops, ops = write(name, front, batch)
                stem = Graph(name, batch, front.input_specs(batch), front.output_specs(batch), flops, ops)
                stems.append(stem)
            if assembly.router is not None:
                name, router = side_file("router", batch, batches), assembly.router
                flops, ops = write(name, router, batch)
                if router.reads == "stem":
                    inputs = (*stem.inputs, *router.input_specs(batch)[len(router.stem_inputs) :])
                    graph = RouterGraph(
                        name, batch, inputs, router.output_specs(batch), stem.flops + flops, ops, stem.model
                    )
                else:
                    graph = RouterGraph(name, batch, router.input_specs(batch), router.output_specs(batch), flops, ops)
                routers.append(graph)
            for model in assembly.models:
                budget = model.compressor.budget
                name = bucket_file(budget, batch)
                flops, ops = write(name, model if seam is None else Rest(model, seam), batch, f"m{budget.tokens_out}")
                specs = model.input_specs(batch), model.output_specs(batch)
                buckets.append(Bucket(name, batch, *specs, stem.flops + flops, ops, stem.model, budget=budget))
            if with_plain and assembly.plain is not None:
                name = side_file("plain", batch, batches)
                flops, ops = write(name, assembly.plain, batch)
                specs = assembly.plain.input_specs(batch), assembly.plain.output_specs(batch)
                plain.append(PlainGraph(name, batch, *specs, flops, ops))
    for path in sorted(folder.glob("*.onnx")):
        try:
            onnx.checker.check_model(str(path), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(f"{path.name} does not pass the ONNX checker: {str(error).splitlines()[0]}") from error
    buckets = [replace(bucket, own_bytes=weights.own_bytes(bucket.golden_part)) for bucket in buckets]
    buckets.sort(key=lambda bucket: bucket.budget.tokens_out)
    return Graphs(tuple(buckets), tuple(plain), tuple(stems), tuple(routers))


def _write_graph(
    path: Path, module: Part, recipe: Recipe, opset: int, batch: int, weights: WeightsFile, user: str
) -> tuple[int, dict[str, int]]:
    model = module.model if isinstance(module, (Stem, Rest)) else module
    with model.as_exported() if isinstance(model, InsideModel) else nullcontext():
        graph = lower(module, inputs=module.input_specs(batch), outputs=module.output_specs(batch), opset=opset)
    strip_metadata(graph, producer_version=__version__)
    require_static(graph)
    add_merge_body(graph)
    with quiet_tools():
        flat = inline_functions(graph)
    require_static(flat)
    require_allowed(flat, load_oplists(), extra=recipe.extra_ops)
    name_weights(graph)
    counts = count_flops(flat), count_ops(graph)
    share_weights(graph, weights, user=user)
    path.write_bytes(ir.to_proto(graph).SerializeToString(deterministic=True))
    return counts
