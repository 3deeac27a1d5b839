"""The graphs of a bundle: each bucket and the plain model, lowered, passed, checked, and saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import onnx
import onnx_ir as ir

from edgecomp import __version__
from edgecomp.backbones.assemble import Assembly
from edgecomp.backbones.inside import InsideModel
from edgecomp.backbones.placed import PlacedModel, PlainModel
from edgecomp.bundle import WEIGHTS, Bucket, PlainGraph, bucket_file, plain_file
from edgecomp.errors import ExportError
from edgecomp.export.flops import count_flops, count_ops
from edgecomp.export.lower import lower
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
from edgecomp.specs import Recipe, load_oplists

__all__ = ["write_graphs"]


def write_graphs(
    folder: Path,
    assembly: Assembly,
    recipe: Recipe,
    *,
    opset: int,
    batches: Sequence[int],
    with_plain: bool,
    progress: Callable[[str], None],
) -> tuple[tuple[Bucket, ...], tuple[PlainGraph, ...]]:
    """Write one graph for each budget and batch, and their one weights file, into `folder`.

    Raises:
        ExportError: torch, the static check, an op allow-list or the ONNX checker refuses a graph.
    """
    buckets, plain = [], []
    with WeightsFile(folder / WEIGHTS) as weights:
        for model in assembly.models:
            budget = model.compressor.budget
            for batch in batches:
                name = bucket_file(budget, batch)
                progress(f"exporting {name}")
                flops, ops = _write_graph(folder / name, model, recipe, opset, batch, weights)
                specs = model.input_specs(batch), model.output_specs(batch)
                buckets.append(Bucket(name, budget, batch, *specs, flops, ops))
        if with_plain and assembly.plain is not None:
            for batch in batches:
                name = plain_file(batch, batches)
                progress(f"exporting {name}")
                flops, ops = _write_graph(folder / name, assembly.plain, recipe, opset, batch, weights)
                specs = assembly.plain.input_specs(batch), assembly.plain.output_specs(batch)
                plain.append(PlainGraph(name, batch, *specs, flops, ops))
    for path in sorted(folder.glob("*.onnx")):
        try:
            onnx.checker.check_model(str(path), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(f"{path.name} does not pass the ONNX checker: {str(error).splitlines()[0]}") from error
    return tuple(buckets), tuple(plain)


def _write_graph(
    path: Path, model: PlacedModel | PlainModel, recipe: Recipe, opset: int, batch: int, weights: WeightsFile
) -> tuple[int, dict[str, int]]:
    with model.as_exported() if isinstance(model, InsideModel) else nullcontext():
        graph = lower(model, inputs=model.input_specs(batch), outputs=model.output_specs(batch), opset=opset)
    strip_metadata(graph, producer_version=__version__)
    require_static(graph)
    add_merge_body(graph)
    flat = inline_functions(graph)
    require_static(flat)
    require_allowed(flat, load_oplists(), extra=recipe.extra_ops)
    name_weights(graph)
    counts = count_flops(flat), count_ops(graph)
    share_weights(graph, weights)
    path.write_bytes(ir.to_proto(graph).SerializeToString(deterministic=True))
    return counts
