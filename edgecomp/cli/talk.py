"""What verbs share when they speak: values to stdout (text or JSON), talk and progress to stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from edgecomp.errors import InvalidSpec
from edgecomp.resources import says_each_step

__all__ = ["JSON", "emit", "finish", "progress", "read_lines"]

_NOTE = "note: "

JSON = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


@contextmanager
def progress(label: str) -> Iterator[Callable[[str], None]]:
    """Give a function that shows what is being done, on a terminal's stderr alone, or a line a step where asked to.

    Notes stay, and go to any stderr.
    """
    if says_each_step():
        yield lambda line: typer.echo(line, err=True)
        return
    if not sys.stderr.isatty():
        yield lambda line: typer.echo(line, err=True) if line.startswith(_NOTE) else None
        return
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True)
    with console.status(escape(label)) as status:
        yield (
            lambda line: (
                console.print(escape(line), soft_wrap=True)
                if line.startswith(_NOTE)
                else status.update(escape(f"{label}: {line}"))
            )
        )


def emit(report: Any, *, as_json: bool, text: Callable[[], str]) -> None:
    """Print a report."""
    if as_json:
        document = msgspec.to_builtins(report, enc_hook=_plain, builtin_types=())
        typer.echo(msgspec.json.encode(document).decode())
    else:
        typer.echo(text())


def finish(report: Any) -> None:
    """Exit with 1 where a report's verdict is no."""
    if not report:
        raise typer.Exit(1)


def _plain(value: Any) -> Any:
    if hasattr(value, "__fspath__"):
        return str(value)
    if hasattr(value, "tolist"):
        return {"shape": list(value.shape), "dtype": str(value.dtype)}
    raise NotImplementedError(f"{type(value).__name__} has no JSON form")


def read_lines(file: str) -> list[str]:
    """Return the questions of the file that --texts names, one a line; none where none is named."""
    if not file:
        return []
    try:
        lines = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSpec(
            f"--texts {file} cannot be read ({error}); give a UTF-8 file with one question a line"
        ) from None
    if not lines:
        raise InvalidSpec(f"--texts {file} holds no question; write one a line, or drop it")
    return lines
