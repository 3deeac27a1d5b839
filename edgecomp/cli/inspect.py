"""`edgecomp inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from edgecomp import api
from edgecomp.cli.talk import JSON, emit, finish

__all__ = ["command"]


def command(
    path: Annotated[str, typer.Argument(help="A bundle, an .onnx file or an .engine file.")], json: JSON = False
) -> None:
    """Show what is in a bundle, an ONNX file or an engine; exit 1 when an engine is not as its record says."""
    report = api.inspect(path)

    def text() -> str:
        from edgecomp.report.contents import describe_contents

        return describe_contents(report)

    emit(report, as_json=json, text=text)
    finish(report)
