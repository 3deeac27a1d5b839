"""`edgecomp estimate`."""

from __future__ import annotations

from typing import Annotated

import typer

from edgecomp import api
from edgecomp.cli.talk import JSON, emit, progress

__all__ = ["command"]


def command(
    target: Annotated[str, typer.Option(help="A target's name, or a TOML file.")],
    path: Annotated[str, typer.Argument(help="A bundle, or any .onnx file; may be left out with --llm.")] = "",
    precision: Annotated[
        str, typer.Option(help="As if it were exported so: fp32, tf32, fp16, bf16, int8, fp8, fp4. Default: as it is.")
    ] = "",
    batch: Annotated[int | None, typer.Option(help="As if it were exported so. Default: the file's.")] = None,
    budget: Annotated[str | None, typer.Option(help="Of a bundle, only the bucket that keeps so many tokens.")] = None,
    plugin: Annotated[
        bool, typer.Option("--plugin/--no-plugin", help="Whether merge nodes run in edgecomp's plugin.")
    ] = True,
    power_mode: Annotated[
        str, typer.Option(help="A power mode; scales the peaks where the target's file has its clock.")
    ] = "",
    per_op: Annotated[bool, typer.Option("--per-op", help="Every kernel, in order.")] = False,
    per_block: Annotated[
        bool, typer.Option("--per-block", help="Blocks and the longest kernels: the default.")
    ] = False,
    go_no_go: Annotated[
        bool, typer.Option("--go-no-go", help="Say whether fewer tokens would help here, before anybody trains.")
    ] = False,
    llm: Annotated[
        str, typer.Option(help="A language model behind the encoder: a known name, or its config.json.")
    ] = "",
    visual_tokens: Annotated[int, typer.Option(help="With --llm: visual tokens without a compressor.")] = 0,
    kept: Annotated[
        int, typer.Option(help="With --llm: visual tokens that are kept. Default: those of the buckets.")
    ] = 0,
    text_tokens: Annotated[int, typer.Option(help="With --llm: text tokens.")] = 0,
    schedule: Annotated[
        str, typer.Option(help="With --llm: fastv, pyramiddrop, aim, or LAYER:SHARE,... of the visual tokens.")
    ] = "",
    json: JSON = False,
) -> None:
    """Compute what a model would take on hardware that is not here: a band, its bound, and whether it fits."""
    with progress("estimate") as say:
        report = api.estimate(
            path,
            target=target,
            precision=precision,
            batch=batch,
            budget=budget,
            plugin=plugin,
            power_mode=power_mode,
            per_op=per_op and not per_block,
            go_no_go=go_no_go,
            llm=llm,
            visual_tokens=visual_tokens,
            kept=kept,
            text_tokens=text_tokens,
            schedule=schedule,
            progress=say,
        )

    def text() -> str:
        from edgecomp.report.estimate import describe_estimate

        return describe_estimate(report, per_op=per_op and not per_block)

    emit(report, as_json=json, text=text)
