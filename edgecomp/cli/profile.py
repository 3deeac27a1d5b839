"""`edgecomp profile`."""

from __future__ import annotations

from typing import Annotated

import typer

from edgecomp import api
from edgecomp.cli.on import ON, run_on
from edgecomp.cli.talk import JSON, emit, progress
from edgecomp.errors import InvalidSpec

__all__ = ["command"]


def command(
    context: typer.Context,
    bundle: Annotated[str, typer.Argument(help="The bundle's folder, or an ONNX file with static shapes.")],
    runner: Annotated[
        str, typer.Option(help="`onnxruntime`, `onnxruntime-cuda`, `tensorrt`, `rtx` or `torch`.")
    ] = "onnxruntime",
    duration: Annotated[float, typer.Option(help="Least seconds to measure each graph for.")] = 3.0,
    runs: Annotated[int, typer.Option(help="Least samples of each graph.")] = 20,
    warmup: Annotated[float, typer.Option(help="Most seconds of warm-up; 0: none.")] = 2.0,
    percentile: Annotated[float, typer.Option(help="Say so unless the samples carry it, e.g. 99.")] = 0.0,
    mode: Annotated[str, typer.Option(help="MLPerf's `single-stream`, `multi-stream` or `offline`.")] = "single-stream",
    streams: Annotated[int, typer.Option(help="Runs at a time, in the other two modes.")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: the runtime's choice.")] = 0,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph/--no-cuda-graph", help="Launch an engine as one CUDA graph.")
    ] = False,
    stages: Annotated[
        bool, typer.Option("--stages/--no-stages", help="Time preparing an image, and copies to a GPU, as well.")
    ] = True,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="What each layer takes, by the runtime's profiler.")
    ] = False,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="What each block takes, by graphs that end after it.")
    ] = False,
    original: Annotated[bool, typer.Option("--original", help="The PyTorch original, too (needs torch).")] = False,
    weights: Annotated[str, typer.Option(help="For torch: the file that the bundle was made of.")] = "random",
    backbone_weights: Annotated[str, typer.Option(help="For torch: likewise of the backbone.")] = "random",
    then_weights: Annotated[str, typer.Option(help="For torch: likewise of a second method.")] = "random",
    budget: Annotated[str | None, typer.Option(help="Only the bucket that keeps so many tokens.")] = None,
    batch: Annotated[int | None, typer.Option(help="Only this batch size.")] = None,
    out: Annotated[str, typer.Option(help="Write the result: a .json file, or a folder of results.")] = "",
    on: ON = "",
    json: JSON = False,
) -> None:
    """Measure the latency of a bundle's graphs, or of an ONNX file, on this machine."""
    if on and bundle.endswith(".onnx"):
        raise InvalidSpec(
            f"--on with {bundle}: bundles alone are copied to another machine; copy the file there, and run this there"
        )
    if on:
        run_on(context)
    with progress("profile") as say:
        report = api.profile(
            bundle,
            runner=runner,
            duration_s=duration,
            runs=runs,
            warmup_s=warmup,
            percentile=percentile,
            mode=mode,
            streams=streams,
            threads=threads,
            cuda_graph=cuda_graph,
            stages=stages,
            per_layer=per_layer,
            ablate=ablate,
            original=original,
            weights=weights,
            backbone_weights=backbone_weights,
            then_weights=then_weights,
            budget=budget,
            batch=batch,
            out=out,
            progress=say,
        )

    def text() -> str:
        from edgecomp.report.profile import describe_profile

        return describe_profile(report)

    emit(report, as_json=json, text=text)
