"""`edgecomp report`."""

from __future__ import annotations

from typing import Annotated

import typer

from edgecomp import api
from edgecomp.cli.talk import JSON, emit, progress

__all__ = ["command"]


def command(
    results: Annotated[list[str], typer.Argument(metavar="RESULT...", help="Result files, or folders of them.")],
    html: Annotated[str, typer.Option(metavar="FILE", help="Write one page that needs no network.")] = "",
    markdown: Annotated[str, typer.Option(metavar="FILE", help="Write the tables as Markdown.")] = "",
    csv: Annotated[str, typer.Option(metavar="FILE", help="Write a row for each measured graph.")] = "",
    plot: Annotated[str, typer.Option(metavar="DIR", help="Write each plot as SVG and PNG.")] = "",
    bundle: Annotated[str, typer.Option(help="Draw an image's patches in this bundle, as `run --draw` does.")] = "",
    image: Annotated[str, typer.Option(help="The image for --bundle; default: our photograph.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that are no reports.")] = False,
    json: JSON = False,
) -> None:
    """Make tables, plots and a page of results; with no option the tables are printed."""
    with progress("report") as say:
        outcome = api.report(
            results,
            html=html,
            markdown=markdown,
            csv=csv,
            plot=plot,
            bundle=bundle,
            image=image,
            force=force,
            progress=say,
        )
        for name in outcome.left_out:
            say(f"note: {name} is no result and was left out")

    def text() -> str:
        from edgecomp.report.report import describe_report

        return describe_report(outcome)

    emit(outcome, as_json=json, text=text)
