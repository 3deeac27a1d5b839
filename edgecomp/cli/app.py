"""The app: one verb a file, exit codes 0 (pass), 1 (a gate failed), 2 (usage or bad input)."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated

import typer

from edgecomp import __version__
from edgecomp.cli import build, doctor, export, inspect, listing, parity, profile, run
from edgecomp.errors import EdgecompError

__all__ = ["app", "main"]

_GATE_FAILED, _BAD_INPUT, _INTERRUPTED = 1, 2, 130

# rich_markup_mode=None: rich alone would cost half of the 0.3 s that --help may take.
app = typer.Typer(name="edgecomp", no_args_is_help=True, add_completion=False, rich_markup_mode=None)
app.add_typer(listing.app, name="list", help="List methods, targets or backbones.")
for _module in (export, parity, build, run, profile, inspect, doctor):
    app.command(name=_module.__name__.rpartition(".")[2])(_module.command)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"edgecomp {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Take vision-token compressors to the edge: static ONNX, TensorRT engines, proven parity, measured latency."""


def main() -> None:
    """Run the command line and exit."""
    debug = "--debug" in sys.argv
    if debug:  # it may stand before or behind the verb
        sys.argv = [sys.argv[0], *(word for word in sys.argv[1:] if word != "--debug")]
    try:
        app(prog_name="edgecomp")
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        typer.echo("interrupted; nothing half-written was left", err=True)
        sys.exit(_INTERRUPTED)
    except EdgecompError as error:
        if debug:
            traceback.print_exc()
        typer.echo(f"error: {error}", err=True)
        sys.exit(_BAD_INPUT)
    except OSError as error:
        if debug:
            traceback.print_exc()
        typer.echo(
            f"error: {error.strerror or error} ({error.filename or 'no file named'}); --debug shows where", err=True
        )
        sys.exit(_BAD_INPUT)
