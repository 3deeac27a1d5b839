"""`edgecomp run`."""

from __future__ import annotations

from typing import Annotated

import typer

from edgecomp import api
from edgecomp.cli.talk import JSON, emit, progress

__all__ = ["command"]


def command(
    bundle: Annotated[str, typer.Argument(help="The bundle's folder.")],
    input_file: Annotated[
        str,
        typer.Argument(
            metavar="[INPUT]",
            help="An image, named inputs (.safetensors, .npz), or a .txt for strips; default: a photograph.",
        ),
    ] = "",
    question: Annotated[
        str | None,
        typer.Option(
            "--text", help="The question, for a router that reads words; or, without INPUT, a text for strips."
        ),
    ] = None,
    text_features: Annotated[
        str, typer.Option(help="The inputs beside the image, by name: .safetensors or .npz.")
    ] = "",
    out: Annotated[str, typer.Option(help="Write the outputs: .safetensors or .npz.")] = "",
    budget: Annotated[
        str | None,
        typer.Option(help="The bucket that keeps so many tokens; default: the router's choice, else the largest."),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="The batch size; default: the smallest.")] = None,
    runner: Annotated[
        str, typer.Option(help="`onnxruntime`, `onnxruntime-cuda`, `tensorrt` or `rtx`.")
    ] = "onnxruntime",
    draw: Annotated[
        str,
        typer.Option(
            help="Write a picture of the patches kept, merged and dropped, layer by layer: .png, .svg, .html."
        ),
    ] = "",
    font: Annotated[str, typer.Option(help="A TrueType font for a text; default: Pillow's own.")] = "",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: the runtime's choice.")] = 0,
    json: JSON = False,
) -> None:
    """Run an image, or named tensors, through a bundle once."""
    with progress("run") as say:
        report = api.run(
            bundle,
            input_file,
            text=question,
            text_features=text_features,
            out=out,
            budget=budget,
            batch=batch,
            runner=runner,
            threads=threads,
            draw=draw,
            font=font,
            progress=say,
        )

    def text() -> str:
        from edgecomp.report.run import describe_run

        return describe_run(report)

    emit(report, as_json=json, text=text)
