"""`edgecomp inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from edgecomp import api
from edgecomp.cli.export import parse_sets
from edgecomp.cli.talk import JSON, emit, finish

__all__ = ["command"]


def command(
    path: Annotated[str, typer.Argument(help="A bundle, an .onnx file or an .engine file.")] = "",
    weights: Annotated[
        str, typer.Option(help="A checkpoint instead, a file or a folder: which methods can be exported from it.")
    ] = "",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="params.NAME=VALUE, which a checkpoint does not store; repeatable."),
    ] = None,
    json: JSON = False,
) -> None:
    """Show what a bundle, ONNX file, engine or checkpoint holds; exit 1: altered, or of no method."""
    report = api.inspect(path, weights=weights, params=parse_sets(set_ or [], "params"))

    def text() -> str:
        from edgecomp.report.contents import describe_contents

        return describe_contents(report)

    emit(report, as_json=json, text=text)
    finish(report)
