"""`edgecomp check`."""

from __future__ import annotations

from typing import Annotated

import typer

from edgecomp import api
from edgecomp.cli.talk import JSON, emit, finish, progress

__all__ = ["command"]


def command(
    path: Annotated[str, typer.Argument(help="A bundle, or any .onnx file.")],
    target: Annotated[str, typer.Option(help="A target's name, a TOML file, or `auto`: the GPU of this machine.")],
    runtime: Annotated[str, typer.Option(help="`tensorrt`, `rtx`, or `auto`.")] = "auto",
    plugin: Annotated[
        list[str] | None, typer.Option(help="An op that a plugin of yours runs, as domain::Op; may be repeated.")
    ] = None,
    fail_on: Annotated[
        str, typer.Option(help="Exit 1 at `blocked`, `unverified` or `likely`, and at worse.")
    ] = "blocked",
    fix: Annotated[
        bool, typer.Option("--fix", help="Write a copy with rewrites that are proven equal in ONNX Runtime.")
    ] = False,
    out: Annotated[str | None, typer.Option(help="The file that --fix writes; default: <stem>.fixed.onnx.")] = None,
    batch: Annotated[int | None, typer.Option(help="With --fix: binds an open first dimension of the inputs.")] = None,
    json: JSON = False,
) -> None:
    """Hold every node of a graph to a target, without building; exit 1 at the verdict of --fail-on, or worse."""
    with progress("check") as say:
        report = api.check(
            path,
            target=target,
            runtime=runtime,
            plugin=plugin or (),
            fail_on=fail_on,
            fix=fix,
            out=out,
            batch=batch,
            progress=say,
        )

    def text() -> str:
        from edgecomp.report.check import describe_check

        return describe_check(report)

    emit(report, as_json=json, text=text)
    finish(report)
