"""`edgecomp calibrate`."""

from __future__ import annotations

from typing import Annotated

import typer

from edgecomp import api
from edgecomp.cli.talk import JSON, emit, progress, read_lines

__all__ = ["command"]


def command(
    bundle: Annotated[str, typer.Argument(help="The bundle's folder; exported with --router.")],
    data: Annotated[str, typer.Option(help="Images in any folders below DIR, or IDX files (MNIST's layout).")],
    mean_tokens: Annotated[float | None, typer.Option(help="Tokens kept on average, at most.")] = None,
    latency_target: Annotated[
        float | None, typer.Option(metavar="MS", help="Milliseconds of a request on average here, at most.")
    ] = None,
    keep_agreement: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Agreement with the largest bucket, at least; 0 to 1.")
    ] = None,
    texts: Annotated[str, typer.Option(help="A file of questions, one a line, for a router that reads words.")] = "",
    split: Annotated[str, typer.Option(help="Of IDX files: `test` or `train`; default: test.")] = "",
    limit: Annotated[int, typer.Option(help="So many images, at random.")] = 256,
    seed: Annotated[int, typer.Option(help="Of that choice.")] = 0,
    runner: Annotated[str, typer.Option(help="`onnxruntime` or `onnxruntime-cuda`.")] = "onnxruntime",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: the runtime's choice.")] = 0,
    json: JSON = False,
) -> None:
    """Set a router's thresholds from real images, so that a target holds."""
    with progress("calibrate") as say:
        report = api.calibrate(
            bundle,
            data,
            mean_tokens=mean_tokens,
            latency_target_ms=latency_target,
            keep_agreement=keep_agreement,
            texts=read_lines(texts),
            split=split,
            limit=limit,
            seed=seed,
            runner=runner,
            threads=threads,
            progress=say,
        )

    def text() -> str:
        from edgecomp.report.calibrate import describe_calibration

        return describe_calibration(report)

    emit(report, as_json=json, text=text)
