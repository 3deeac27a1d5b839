"""`edgecomp profile`."""

from __future__ import annotations

from typing import Annotated

import typer

from edgecomp import api
from edgecomp.cli.on import ON, run_on
from edgecomp.cli.talk import JSON, emit, progress

__all__ = ["command"]


def command(
    context: typer.Context,
    bundle: Annotated[str, typer.Argument(help="The bundle's folder.")],
    runner: Annotated[
        str, typer.Option(help="`onnxruntime`, `onnxruntime-cuda`, `tensorrt` or `rtx`.")
    ] = "onnxruntime",
    duration: Annotated[float, typer.Option(help="Least seconds to measure each graph for.")] = 3.0,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: the runtime's choice.")] = 0,
    budget: Annotated[str | None, typer.Option(help="Only the bucket that keeps so many tokens.")] = None,
    batch: Annotated[int | None, typer.Option(help="Only this batch size.")] = None,
    out: Annotated[str, typer.Option(help="Write the result: a .json file, or a folder of results.")] = "",
    on: ON = "",
    json: JSON = False,
) -> None:
    """Measure the latency of a bundle's graphs on this machine."""
    if on:
        run_on(context)
    with progress("profile") as say:
        report = api.profile(
            bundle,
            runner=runner,
            duration_s=duration,
            threads=threads,
            budget=budget,
            batch=batch,
            out=out,
            progress=say,
        )

    def text() -> str:
        from edgecomp.report.profile import describe_profile

        return describe_profile(report)

    emit(report, as_json=json, text=text)
