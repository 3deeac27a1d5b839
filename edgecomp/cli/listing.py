"""`edgecomp list`."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from edgecomp import api
from edgecomp.cli.talk import JSON, emit

__all__ = ["answer", "app"]

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command("methods")
def methods(json: JSON = False) -> None:
    """List the compressors: where they stand, parity level, budgets, source."""
    from edgecomp.report.listing import describe_methods

    rows = api.list_methods()
    emit(rows, as_json=json, text=lambda: describe_methods(rows))


@app.command("targets")
def targets(json: JSON = False) -> None:
    """List the hardware that engines are built for."""
    from edgecomp.report.listing import describe_targets

    rows = api.list_targets()
    emit(rows, as_json=json, text=lambda: describe_targets(rows))


@app.command("backbones")
def backbones(json: JSON = False) -> None:
    """List the host encoders that were tried; other timm vision transformers work by name too."""
    from edgecomp.report.listing import describe_backbones

    rows = api.list_backbones()
    emit(rows, as_json=json, text=lambda: describe_backbones(rows))


@app.command("routers")
def routers(json: JSON = False) -> None:
    """List what picks a bucket for a request."""
    from edgecomp.report.listing import describe_routers

    rows = api.list_routers()
    emit(rows, as_json=json, text=lambda: describe_routers(rows))


def answer(words: Sequence[str]) -> bool:
    """Answer `list WHAT [--json]` when the words are exactly that, and say whether they were.

    typer imports pydantic to parse an option, which would cost a third of the 0.3 s that `list` may take.
    """
    lists = {"methods": methods, "targets": targets, "backbones": backbones, "routers": routers}
    if len(words) < 2 or words[0] != "list" or words[1] not in lists or list(words[2:]) not in ([], ["--json"]):
        return False
    lists[words[1]](json=len(words) == 3)
    return True
