"""`edgecomp target`."""

from __future__ import annotations

from typing import Annotated

import typer

from edgecomp import api
from edgecomp.cli.talk import JSON, emit, progress

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _only() -> None:
    """Fit what estimates of a target compute with."""


@app.command("calibrate")
def calibrate(
    name: Annotated[str, typer.Argument(help="A target's name, or a TOML file.")],
    from_: Annotated[
        list[str] | None,
        typer.Option("--from", help="A result of `edgecomp profile`, measured there; may be repeated."),
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="A bundle or .onnx file that was measured; may be repeated.")
    ] = None,
    plugin: Annotated[
        bool, typer.Option("--plugin/--no-plugin", help="Whether merge nodes ran in edgecomp's plugin.")
    ] = True,
    force: Annotated[
        bool, typer.Option("--force", help="Take results of another device too, and of runners that use no GPU.")
    ] = False,
    clear: Annotated[bool, typer.Option("--clear", help="Remove the calibration.")] = False,
    json: JSON = False,
) -> None:
    """Fit the efficiency of a target to your own measurements; later estimates of it compute with that, and say so."""
    with progress("target calibrate") as say:
        report = api.target_calibrate(
            name, results=from_ or (), models=model or (), plugin=plugin, force=force, clear_it=clear, progress=say
        )

    def text() -> str:
        from edgecomp.report.target import describe_target

        return describe_target(report)

    emit(report, as_json=json, text=text)
