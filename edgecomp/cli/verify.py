"""`edgecomp verify`."""

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
    target: Annotated[
        str, typer.Option(help="A target's name, a TOML file, `none`, or `auto`: the GPU of this machine.")
    ] = "auto",
    runtime: Annotated[str, typer.Option(help="Of engines: `tensorrt`, `rtx`, or `auto`.")] = "auto",
    runner: Annotated[
        str, typer.Option(help="As in `parity`; `auto`: the engines where they run here, else `onnxruntime`.")
    ] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: the runtime's choice.")] = 0,
    duration: Annotated[float, typer.Option(help="Least seconds to measure each graph for.")] = 3.0,
    plugin: Annotated[
        str, typer.Option(help="Merge nodes in the plugin: `auto`, `require` (compiles it), `off`, or a library.so.")
    ] = "auto",
    allow_plugin: Annotated[
        list[str] | None, typer.Option(help="sha256 of a plugin inside the bundle that may be loaded.")
    ] = None,
    no_build: Annotated[
        bool, typer.Option("--no-build", help="Take the engines that are there; fail where one is missing or foreign.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Repeat what has passed before.")] = False,
    on: ON = "",
    json: JSON = False,
) -> None:
    """Prove a bundle on this machine: hashes, engines, parity, latency; exit 1 when a stage fails."""
    if on:
        run_on(context)
    with progress("verify") as say:
        report = api.verify(
            bundle,
            target=target,
            runtime=runtime,
            runner=runner,
            threads=threads,
            duration_s=duration,
            plugin=plugin,
            allow_plugin=allow_plugin or (),
            build_engines=not no_build,
            fresh=fresh,
            progress=say,
        )

    def text() -> str:
        from edgecomp.report.verify import describe_verify

        return describe_verify(report)

    emit(report, as_json=json, text=text)
    finish(report)
