"""`edgecomp plugin`."""

from __future__ import annotations

from typing import Annotated

import typer

from edgecomp import api
from edgecomp.cli.talk import JSON, emit, progress

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command("build")
def build(
    name: Annotated[str, typer.Argument(help="The plugin's name; `edgecomp plugin list` knows them.")],
    sm: Annotated[
        list[int] | None,
        typer.Option(help="Compute capability, for example 87; may be repeated. Default: the GPU here."),
    ] = None,
    tensorrt_include: Annotated[
        str | None, typer.Option(help="Folder of NvInfer.h; default: the system's, else that of kernel-lens.")
    ] = None,
    nvcc: Annotated[str | None, typer.Option(help="The compiler; default: the one on PATH.")] = None,
    out: Annotated[str | None, typer.Option(help="A folder that gets a copy of the library.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Compile even when nothing changed.")] = False,
    json: JSON = False,
) -> None:
    """Compile a plugin into the user's cache, where `edgecomp build` finds it."""
    with progress("plugin build") as say:
        report = api.plugin_build(
            name, sm=sm or (), tensorrt_include=tensorrt_include, nvcc=nvcc, out=out, force=force, progress=say
        )

    def text() -> str:
        from edgecomp.report.plugin import describe_plugin_build

        return describe_plugin_build(report)

    emit(report, as_json=json, text=text)


@app.command("list")
def list_(json: JSON = False) -> None:
    """List the plugins, and the libraries that are compiled."""
    rows = api.plugin_list()

    def text() -> str:
        from edgecomp.report.plugin import describe_plugins

        return describe_plugins(rows)

    emit(rows, as_json=json, text=text)


@app.command("check")
def check(
    file: Annotated[str, typer.Argument(help="A plugin library.")],
    runtime: Annotated[str, typer.Option(help="`tensorrt`, `rtx`, or `auto`: the first that is installed.")] = "auto",
    json: JSON = False,
) -> None:
    """Load a library into TensorRT and print what it registers; exit 2 when it registers nothing."""
    report = api.plugin_check(file, runtime=runtime)

    def text() -> str:
        from edgecomp.report.plugin import describe_plugin_check

        return describe_plugin_check(report)

    emit(report, as_json=json, text=text)
