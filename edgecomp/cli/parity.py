"""`edgecomp parity`."""

from __future__ import annotations

from typing import Annotated

import typer

from edgecomp import api
from edgecomp.cli.on import ON, run_on
from edgecomp.cli.talk import JSON, emit, finish, progress

__all__ = ["command"]


def command(
    context: typer.Context,
    bundle: Annotated[str, typer.Argument(help="The bundle's folder.")],
    runner: Annotated[str, typer.Option(help="`onnxruntime` or `onnxruntime-cuda`.")] = "onnxruntime",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: the runtime's choice.")] = 0,
    budget: Annotated[str | None, typer.Option(help="Only the bucket that keeps so many tokens.")] = None,
    batch: Annotated[int | None, typer.Option(help="Only this batch size.")] = None,
    on: ON = "",
    json: JSON = False,
) -> None:
    """Compare a bundle's outputs with the goldens of the PyTorch original; exit 1 when a threshold is missed."""
    if on:
        run_on(context)
    with progress("parity") as say:
        report = api.parity(bundle, runner=runner, threads=threads, budget=budget, batch=batch, progress=say)

    def text() -> str:
        from edgecomp.report.parity import describe_parity

        return describe_parity(report)

    emit(report, as_json=json, text=text)
    finish(report)
