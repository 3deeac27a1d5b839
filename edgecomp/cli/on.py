"""`--on`: the option that runs a verb on another machine.

A verb takes it with two parameters and one line:

def command(context: typer.Context, ..., on: ON = "", json: JSON = False) -> None:
    if on:
        run_on(context)
"""

from __future__ import annotations

import importlib
import math
import re
import typing
from pathlib import Path
from typing import Annotated, Any, NoReturn

import msgspec
import typer

from edgecomp import api

__all__ = ["ON", "run_on"]

ON = Annotated[
    str,
    typer.Option("--on", metavar="ssh://USER@HOST[:PORT]/DIR", help="Run on another machine, in this folder there."),
]
_OWN = ("bundle", "on", "json", "out")  # parameters that are not passed on as options


def run_on(context: typer.Context) -> NoReturn:
    """Run the verb of `context` on the machine that its `--on` names, print what it printed, and exit with its code.

    The text is made here, of the JSON from there, by `describe_<verb>` of `edgecomp.report.<verb>`, whose parameter
    `report` says what that JSON is.
    """
    given, verb = context.params, str(context.info_name)
    if given.get("out"):
        from edgecomp.profiles.result import require_out

        require_out(Path(given["out"]))
    run = api.remote(verb, given["bundle"], _options(context), on=given["on"], progress=_say)
    if run.document is not None:
        if given.get("out"):
            from edgecomp.profiles.result import Result, write_result

            write_result(_read(run.document, Result), Path(given["out"]))
        if given["json"]:
            typer.echo(msgspec.json.encode(run.document).decode())
        else:
            describe = getattr(importlib.import_module(f"edgecomp.report.{verb}"), f"describe_{verb}")
            hints = typing.get_type_hints(describe)
            shown = {name: given[name] for name in hints if name in given and name != "bundle"}  # such as `explain`
            typer.echo(describe(_read(run.document, hints["report"]), **shown))
    raise typer.Exit(run.code)


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _options(context: typer.Context) -> list[tuple[str, str]]:
    """Return the options of the verb that are not at their defaults, with their values; one may come several times."""
    found = []
    for parameter in context.command.params:
        name, value = str(parameter.name), context.params.get(str(parameter.name))
        if name in _OWN or value is None or value == parameter.default:
            continue
        values = value if isinstance(value, (list, tuple)) else [value]
        found += [(parameter.opts[0], "" if one is True else str(one)) for one in values]
    return found


def _read(document: Any, kind: type) -> Any:
    """Return a JSON document as the report that it was; JSON has no NaN and says null."""
    while True:
        try:
            return msgspec.convert(document, kind, dec_hook=_read_path)
        except msgspec.ValidationError as error:
            place = re.fullmatch(r"Expected `float`, got `null` - at `\$.*\.(\w+)`", str(error))
            if place is None:
                raise
            document = _with_nan(document, place[1])


def _read_path(kind: type, value: Any) -> Any:
    if kind is Path:
        return Path(value)
    raise NotImplementedError(f"{kind.__name__} has no JSON form")


def _with_nan(value: Any, name: str) -> Any:
    if isinstance(value, list):
        return [_with_nan(one, name) for one in value]
    if isinstance(value, dict):
        return {key: math.nan if key == name and one is None else _with_nan(one, name) for key, one in value.items()}
    return value
