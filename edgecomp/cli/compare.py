"""`edgecomp compare`."""

from __future__ import annotations

from typing import Annotated

import typer

from edgecomp import api
from edgecomp.cli.talk import JSON, emit, finish, progress

__all__ = ["command"]


def command(
    models: Annotated[
        list[str] | None, typer.Argument(help="Two or more: bundles, .onnx files, result files of `edgecomp profile`.")
    ] = None,
    base: Annotated[str, typer.Option(help="The model that ratios are to; default: the first.")] = "",
    runner: Annotated[
        str, typer.Option(help="`onnxruntime`, `onnxruntime-cuda`, `tensorrt` or `rtx`.")
    ] = "onnxruntime",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: the runtime's choice.")] = 0,
    budget: Annotated[str | None, typer.Option(help="Only buckets that keep so many tokens.")] = None,
    batch: Annotated[int | None, typer.Option(help="Only this batch size.")] = None,
    rounds: Annotated[int, typer.Option(help="Turns of each model, at least.")] = 20,
    duration: Annotated[float, typer.Option(help="Seconds to go on taking turns for; 0: --rounds decide.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the orders in which models take turns.")] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Compare results of different models or machines too, and say so.")
    ] = False,
    out: Annotated[str, typer.Option(help="Write the comparison: a .json file.")] = "",
    json: JSON = False,
) -> None:
    """Compare models side by side, in turns in one run."""
    with progress("compare") as say:
        report = api.compare(
            models or [],
            base=base,
            runner=runner,
            threads=threads,
            budget=budget,
            batch=batch,
            rounds=rounds,
            duration_s=duration,
            seed=seed,
            force=force,
            out=out,
            progress=say,
        )

    def text() -> str:
        from edgecomp.report.compare import describe_comparison

        return describe_comparison(report)

    emit(report, as_json=json, text=text)
    finish(report)
