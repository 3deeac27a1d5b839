"""The app: one verb a file, exit codes 0 (pass), 1 (a gate failed), 2 (usage or bad input)."""

from __future__ import annotations

import signal
import sys
import traceback
from typing import Annotated, Any

import typer

from edgecomp import __version__
from edgecomp.cli import (
    build,
    bundle,
    calibrate,
    check,
    compare,
    doctor,
    estimate,
    evaluate,
    export,
    inspect,
    listing,
    parity,
    plugin,
    profile,
    report,
    results,
    run,
    search,
    target,
    verify,
)
from edgecomp.errors import EdgecompError, ParityError

__all__ = ["app", "main"]

_GATE_FAILED, _BAD_INPUT, _INTERRUPTED = 1, 2, 130

# rich_markup_mode=None: rich alone would cost half of the 0.3 s that --help may take.
app = typer.Typer(
    name="edgecomp", no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)
app.add_typer(listing.app, name="list", help="List methods, targets, backbones or routers.")
for _module in (
    export,
    parity,
    build,
    run,
    profile,
    compare,
    estimate,
    search,
    evaluate,
    calibrate,
    check,
    inspect,
    doctor,
    verify,
    report,
):
    app.command(name=_module.__name__.rpartition(".")[2])(_module.command)
app.add_typer(bundle.app, name="bundle", help="Pack a bundle into one file, or unpack one.")
app.add_typer(results.app, name="results", help="List, show, compare or check results of `profile`.")
app.add_typer(target.app, name="target", help="Fit what estimates of a target compute with.")
app.add_typer(plugin.app, name="plugin", help="Compile, list or check TensorRT plugins.")


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
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleaned up after like Ctrl-C
    try:
        # typer hands Ctrl-C back as 130, without a word
        code = 0 if listing.answer(sys.argv[1:]) else app(prog_name="edgecomp", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except Exception as error:  # noqa: BLE001 - a traceback would exit with 1, which means that a gate failed
        if debug:
            traceback.print_exc()
        typer.echo(_describe(error), err=True)
        sys.exit(_GATE_FAILED if isinstance(error, ParityError) else _BAD_INPUT)
    if code == _INTERRUPTED:
        typer.echo("interrupted; nothing half-written was left", err=True)
    sys.exit(code or 0)


def _describe(error: Exception) -> str:
    """Return what an error says, in one to three lines."""
    if isinstance(error, EdgecompError):
        return f"error: {error}"
    if hasattr(error, "format_message"):  # typer's own; where its base class stands differs between versions
        return _describe_usage(error)
    if isinstance(error, OSError):
        return f"error: {error.strerror or error} ({error.filename or 'no file named'}); --debug shows where"
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        return f"error: the package {package!r} is not installed here; install it with: pip install 'edgecomp[cpu]'"
    if isinstance(error, MemoryError):
        return "error: out of memory; choose a smaller model, batch or image, or a machine with more"
    first = (str(error).strip().splitlines() or ["no text"])[0]
    return (
        f"error: {type(error).__name__}: {first[:300]}\n"
        "edgecomp did not expect this; --debug shows the traceback, please report it with the command"
    )


def _describe_usage(error: Any) -> str:
    """Return what is wrong with the words of the command line; the values are added that typer leaves out."""
    text = error.format_message().rstrip()
    if "\n" in text:  # the help, where there were no words at all
        return str(text)
    options = getattr(getattr(error, "param", None), "opts", ())
    values = [
        word.partition("=")[2] if "=" in word else following
        for word, following in zip(sys.argv, [*sys.argv[1:], ""], strict=True)
        if word.partition("=")[0] in options
    ]
    given = ", ".join(repr(value) for value in values if value and repr(value) not in text)
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "edgecomp"
    return f"error: {text.rstrip('.')}{f' (given: {given})' if given else ''}; see `{command} --help`"
