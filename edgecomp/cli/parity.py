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
    runner: Annotated[
        str,
        typer.Option(
            help="`onnxruntime` or `onnxruntime-cuda`, with threads: `onnxruntime:4`; `tensorrt`, `rtx`; `torch`."
        ),
    ] = "onnxruntime",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: the runtime's choice.")] = 0,
    against: Annotated[str, typer.Option(help="`original`, or another runner, such as `torch`.")] = "original",
    budget: Annotated[str | None, typer.Option(help="Only the bucket that keeps so many tokens.")] = None,
    batch: Annotated[int | None, typer.Option(help="Only this batch size.")] = None,
    selection: Annotated[
        bool, typer.Option("--selection", help="Judge choices of tokens, and the values under the original's, apart.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show where the first choice differs, with its scores; with --selection.")
    ] = False,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Hold the runner to itself: equal rows, repeated runs, threads.")
    ] = False,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="Compare each torch module with the graph's; needs torch.")
    ] = False,
    bisect: Annotated[
        bool, typer.Option("--bisect", help="Name the first module whose error its input does not explain; likewise.")
    ] = False,
    weights: Annotated[
        str, typer.Option(help="For these two and `torch`: the checkpoint that the export was given.")
    ] = "random",
    backbone_weights: Annotated[str, typer.Option(help="For these two: the host's.")] = "random",
    then_weights: Annotated[str, typer.Option(help="For these two: a second method's.")] = "random",
    atol: Annotated[list[str] | None, typer.Option(help="Largest absolute error: `1e-3`, or `NAME:1e-3`.")] = None,
    rtol: Annotated[list[str] | None, typer.Option(help="Largest relative error, likewise.")] = None,
    on: ON = "",
    json: JSON = False,
) -> None:
    """Compare a bundle's outputs with the goldens of the PyTorch original; exit 1 when a threshold is missed."""
    if on:
        run_on(context)
    with progress("parity") as say:
        report = api.parity(
            bundle,
            runner=runner,
            threads=threads,
            against=against,
            budget=budget,
            batch=batch,
            selection=selection or explain,
            self_test=self_test,
            per_layer=per_layer or bisect,
            weights=weights,
            backbone_weights=backbone_weights,
            then_weights=then_weights,
            atol=atol or (),
            rtol=rtol or (),
            progress=say,
        )

    def text() -> str:
        from edgecomp.report.parity import describe_parity

        return describe_parity(report, explain=explain, per_layer=per_layer, bisect=bisect)

    emit(report, as_json=json, text=text)
    finish(report)
