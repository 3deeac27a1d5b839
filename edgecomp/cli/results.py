"""`edgecomp results`."""

from __future__ import annotations

from typing import Annotated

import typer

from edgecomp import api
from edgecomp.cli.talk import JSON, emit, finish

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def list_(
    folder: Annotated[str, typer.Argument(help="Where results lie.")] = "profiles/results", json: JSON = False
) -> None:
    """List the JSON files below a folder: results, comparisons, tables of benchmarks, and what is damaged."""
    rows = api.results_list(folder)

    def text() -> str:
        from edgecomp.report.results import describe_list

        return describe_list(rows, folder)

    emit(rows, as_json=json, text=text)


@app.command("show")
def show(file: Annotated[str, typer.Argument(help="A result.")], json: JSON = False) -> None:
    """Show a result as `edgecomp profile` printed it."""
    result = api.results_show(file)

    def text() -> str:
        from edgecomp.report.profile import describe_profile

        return describe_profile(result)

    emit(result, as_json=json, text=text)


@app.command("diff")
def diff(
    old: Annotated[str, typer.Argument(help="A result.")],
    new: Annotated[str, typer.Argument(help="Another result.")],
    json: JSON = False,
) -> None:
    """Show what two results differ in: model, machine, versions, clocks, and numbers with their intervals."""
    report = api.results_diff(old, new)

    def text() -> str:
        from edgecomp.report.results import describe_diff

        return describe_diff(report)

    emit(report, as_json=json, text=text)


@app.command("check")
def check(
    result: Annotated[
        str, typer.Argument(help="The result; default: the newest of the baseline's model and machine in --folder.")
    ] = "",
    baseline: Annotated[str, typer.Option(help="The result that it is held to.")] = ...,  # type: ignore[assignment]
    max_regression: Annotated[str, typer.Option(help="The share that may be lost.")] = "5%",
    metric: Annotated[str, typer.Option(help="`p50`, `p90`, `p99`, `throughput` or `memory`.")] = "p50",
    folder: Annotated[str, typer.Option(help="Where results lie.")] = "profiles/results",
    force: Annotated[bool, typer.Option("--force", help="Check other models and machines too, and say so.")] = False,
    json: JSON = False,
) -> None:
    """Exit with 1 where a result is worse than a baseline, by more than is allowed and beyond noise."""
    report = api.results_check(
        result, baseline=baseline, max_regression=max_regression, metric=metric, folder=folder, force=force
    )

    def text() -> str:
        from edgecomp.report.results import describe_check

        return describe_check(report)

    emit(report, as_json=json, text=text)
    finish(report)
