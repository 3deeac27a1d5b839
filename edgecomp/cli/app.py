"""The app: one verb a file, exit codes 0 (pass), 1 (a gate failed), 2 (usage or bad input)."""

from __future__ import annotations

import importlib
import signal
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from edgecomp import __version__
from edgecomp.errors import EdgecompError, ParityError

__all__ = ["VERBS", "app", "load_verb", "main"]

_GATE_FAILED, _BAD_INPUT, _INTERRUPTED = 1, 2, 130

VERBS = {
    "export": "Rewrite a compressor for static shapes, export it to ONNX, prove it, and write a bundle.",
    "parity": "Compare a bundle's outputs with the goldens of the PyTorch original; exit 1 when a threshold is missed.",
    "build": "Build TensorRT engines, strongly typed, from a bundle.",
    "run": "Run an image, or named tensors, through a bundle once.",
    "profile": "Measure the latency of a bundle's graphs, or of an ONNX file, on this machine.",
    "compare": "Compare models side by side, in turns in one run; or, with --methods, many methods on one image.",
    "estimate": "Compute what a model would take on hardware that is not here: a band, its bound, and whether it fits.",
    "search": "Search the budget that agrees most with the uncompressed model, under limits of time and energy.",
    "evaluate": "Measure accuracy on labelled images, beside the plain model's, and the speed of both.",
    "calibrate": "Set a router's thresholds from real images, so that a target holds.",
    "check": "Hold every node of a graph to a target, without building; exit 1 at the verdict of --fail-on, or worse.",
    "inspect": "Show what a bundle, ONNX file, engine or checkpoint holds; exit 1: altered, or of no method.",
    "doctor": "Say what is installed here, what is missing, and what conflicts; exit 1 when something conflicts.",
    "verify": "Prove a bundle on this machine: hashes, engines, parity, latency; exit 1 when a stage fails.",
    "report": "Make tables, plots and a page of results; with no option the tables are printed.",
    "list": "List methods, targets, backbones or routers.",
    "bundle": "Pack a bundle into one file, or unpack one.",
    "results": "List, show, compare or check results of `profile`.",
    "target": "Fit what estimates of a target compute with.",
    "plugin": "Compile, list or check TensorRT plugins.",
}
"""Each verb is a file of its name and its line in `--help`; the file is imported when its verb is asked for."""

_FILES = {"list": "listing"}


def load_verb(name: str) -> Any:
    """Return the module of a verb: it holds `command`, or `app` with commands of its own."""
    return importlib.import_module(f"edgecomp.cli.{_FILES.get(name, name)}")


class _Verbs(TyperGroup):
    """Imports the verb that is asked for, and no other: all of them would take longer than `--help` may."""

    def __init__(self, **words: Any) -> None:
        super().__init__(**words)
        self.commands = dict.fromkeys(VERBS)  # type: ignore[assignment] # the names that typer lists and suggests

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        module = load_verb(cmd_name)
        alone = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        if hasattr(module, "app"):
            alone.add_typer(module.app, name=cmd_name)
        else:
            alone.command(cmd_name)(module.command)
        return typer.main.get_group(alone).get_command(ctx, cmd_name)

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 - likewise
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


# rich_markup_mode=None: rich alone would cost half of the 0.3 s that --help may take.
app = typer.Typer(
    name="edgecomp",
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


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
        code = 0 if _answer_list(sys.argv[1:]) else app(prog_name="edgecomp", standalone_mode=False)
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


def _answer_list(words: list[str]) -> bool:
    """Answer `list WHAT` without typer's parser, where that is all there is to answer."""
    return words[:1] == ["list"] and bool(load_verb("list").answer(words))


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
