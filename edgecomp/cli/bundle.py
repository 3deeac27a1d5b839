"""`edgecomp bundle`."""

from __future__ import annotations

from typing import Annotated

import typer

from edgecomp import api
from edgecomp.cli.talk import JSON, emit, progress

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command("pack")
def pack(
    bundle: Annotated[str, typer.Argument(help="The bundle's folder.")],
    out: Annotated[str, typer.Option(help="The file; default: <folder>.edgecomp.zip in the current folder.")] = "",
    with_engines: Annotated[
        bool, typer.Option("--with-engines", help="Also engines, which hold for one GPU and one TensorRT.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace another file.")] = False,
    json: JSON = False,
) -> None:
    """Write a bundle as one file, with plugin sources, timing caches and a README for the board."""
    with progress("bundle pack") as say:
        report = api.pack(bundle, out=out, with_engines=with_engines, force=force, progress=say)

    def text() -> str:
        from edgecomp.report.pack import describe_pack

        return describe_pack(report)

    emit(report, as_json=json, text=text)


@app.command("unpack")
def unpack(
    file: Annotated[str, typer.Argument(help="An archive that `edgecomp bundle pack` wrote.")],
    out: Annotated[str, typer.Option(help="A new folder; default: the file's name without its endings.")] = "",
    with_engines: Annotated[
        bool, typer.Option("--with-engines", help="Also engines: plans are code, so trust their source.")
    ] = False,
    allow_plugin: Annotated[
        list[str] | None, typer.Option(help="sha256 of a compiled plugin that may be unpacked; may be repeated.")
    ] = None,
    json: JSON = False,
) -> None:
    """Unpack an archive into a new folder, checked: whole, or not at all."""
    with progress("bundle unpack") as say:
        report = api.unpack(file, out=out, with_engines=with_engines, allow_plugin=allow_plugin or (), progress=say)

    def text() -> str:
        from edgecomp.report.pack import describe_unpack

        return describe_unpack(report)

    emit(report, as_json=json, text=text)
