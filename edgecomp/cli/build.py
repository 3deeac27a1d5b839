"""`edgecomp build`."""

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
    target: Annotated[str, typer.Option(help="A target's name, a TOML file, or `auto`: the GPU of this machine.")],
    runtime: Annotated[str, typer.Option(help="`tensorrt`, `rtx`, or `auto`.")] = "auto",
    budget: Annotated[str | None, typer.Option(help="Only the bucket that keeps so many tokens.")] = None,
    batch: Annotated[int | None, typer.Option(help="Only this batch size.")] = None,
    workspace: Annotated[int, typer.Option(help="Most scratch memory of a layer, in MiB; 0: the builder's limit.")] = 0,
    opt_level: Annotated[
        int, typer.Option(help="0 (builds quickly) to 5 (tries most tactics); -1: the builder's own, 3.")
    ] = -1,
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="Less memory, for some speed; --workspace and --opt-level add to it.")
    ] = False,
    timing_cache: Annotated[
        str, typer.Option(metavar="FILE|off", help="Timings of tactics for the next build; default: the user's cache.")
    ] = "auto",
    plugin: Annotated[
        str, typer.Option(help="Merge nodes in the plugin: `auto` (if compiled), `require`, `off`, or a library.so.")
    ] = "auto",
    allow_plugin: Annotated[
        list[str] | None, typer.Option(help="sha256 of a plugin inside the bundle that may be loaded.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Build even when nothing changed.")] = False,
    force_memory: Annotated[
        bool, typer.Option("--force-memory", help="Build though this board's memory is likely not to suffice.")
    ] = False,
    check_stable: Annotated[
        bool, typer.Option("--check-stable", help="Build twice and compare the bytes; exit 1 where they differ.")
    ] = False,
    on: ON = "",
    json: JSON = False,
) -> None:
    """Build TensorRT engines, strongly typed, from a bundle."""
    if on:
        run_on(context)
    with progress("build") as say:
        report = api.build(
            bundle,
            target=target,
            runtime=runtime,
            budget=budget,
            batch=batch,
            workspace_mib=workspace,
            opt_level=opt_level,
            low_memory=low_memory,
            timing_cache=timing_cache,
            plugin=plugin,
            allow_plugin=allow_plugin or (),
            force=force,
            force_memory=force_memory,
            check_stable=check_stable,
            progress=say,
        )

    def text() -> str:
        from edgecomp.report.build import describe_build

        return describe_build(report)

    emit(report, as_json=json, text=text)
    finish(report)
