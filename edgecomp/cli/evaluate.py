"""`edgecomp evaluate`."""

from __future__ import annotations

from typing import Annotated

import typer

from edgecomp import api
from edgecomp.cli.talk import JSON, emit, finish, progress, read_lines

__all__ = ["command"]


def command(
    bundle: Annotated[str, typer.Argument(help="The bundle's folder; exported with --output logits --with-plain.")],
    data: Annotated[str, typer.Option(help="Labelled images: DIR/<class>/*.png, or IDX files (MNIST's layout).")],
    split: Annotated[str, typer.Option(help="Of IDX files: `test` or `train`; default: test.")] = "",
    limit: Annotated[
        int | None, typer.Option(help="So many images, at random, classes in balance; default: all.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of that choice.")] = 0,
    runner: Annotated[str, typer.Option(help="`onnxruntime` or `onnxruntime-cuda`.")] = "onnxruntime",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: the runtime's choice.")] = 0,
    budget: Annotated[str | None, typer.Option(help="Only the bucket that keeps so many tokens.")] = None,
    batch: Annotated[int | None, typer.Option(help="One of the bundle's batch sizes; default: its largest.")] = None,
    texts: Annotated[str, typer.Option(help="A file of questions, one a line, for a router that reads words.")] = "",
    max_drop: Annotated[
        float | None,
        typer.Option(metavar="POINTS", help="Exit 1 when a bucket loses more top-1, in percentage points."),
    ] = None,
    json: JSON = False,
) -> None:
    """Measure accuracy on labelled images, beside the plain model's, and the speed of both."""
    with progress("evaluate") as say:
        report = api.evaluate(
            bundle,
            data,
            split=split,
            limit=limit,
            seed=seed,
            runner=runner,
            threads=threads,
            budget=budget,
            batch=batch,
            texts=read_lines(texts),
            max_drop=max_drop,
            progress=say,
        )

    def text() -> str:
        from edgecomp.report.evaluate import describe_evaluation

        return describe_evaluation(report)

    emit(report, as_json=json, text=text)
    finish(report)
