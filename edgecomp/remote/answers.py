"""What the other machine may answer, and the error for each fault that it can name.

Answers are foreign input: they are read into these structs before anything is done with them, and what is shown of them
holds no character that steers a terminal.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from edgecomp.errors import RunError
from edgecomp.remote.far import RESULT
from edgecomp.remote.place import Place
from edgecomp.remote.ssh import clean

__all__ = ["Done", "End", "Entry", "Hello", "Listing", "Put", "Started", "fault", "read_answer"]

Count = Annotated[int, Meta(ge=0)]
_Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
_LARGEST_FILE = 16 << 30
_LARGEST_OUT = 64 << 20
Answer = TypeVar("Answer", bound=msgspec.Struct)


class Hello(msgspec.Struct, frozen=True):
    """What is there.

    Attributes:
        root: the folder, resolved.
        python: the version that calls run with.
        packages: versions of those that were asked for, of the Python that jobs run with.
        free: bytes.
        there: bytes of each file that was asked for.
    """

    root: str
    python: Annotated[str, Meta(pattern=r"^[0-9]+(\.[0-9]+){2}\Z")]
    packages: dict[str, str]
    free: Count
    there: dict[str, Count]


class Put(msgspec.Struct, frozen=True):
    """Files were taken in."""

    ok: bool


class Done(msgspec.Struct, frozen=True):
    """It was noted that results were brought back."""

    ok: bool


class Started(msgspec.Struct, frozen=True):
    """A job was started, or found; its log follows.

    Attributes:
        group: of its processes.
        since: when it was started, by the clock there.
        job: its folder.
    """

    state: Literal["started", "running", "finished"]
    group: Count
    since: str
    job: str


class End(msgspec.Struct, frozen=True):
    """How a job ended: with an exit code (negative: a signal), or with a fault before there was one."""

    run: str
    code: int | None = None
    error: str = ""
    text: str = ""
    path: str = ""
    python: str = ""
    wheels: str = ""
    missing: tuple[str, ...] = ()
    free: Count = 0


class Entry(msgspec.Struct, frozen=True):
    """A result that follows."""

    name: Annotated[str, Meta(pattern=rf"^(?:{RESULT.pattern})\Z", max_length=400)]
    size: Annotated[int, Meta(ge=0, le=_LARGEST_FILE)]
    sha256: _Sha256


class Listing(msgspec.Struct, frozen=True):
    """What follows: so many bytes that the job printed, and its results."""

    end: End
    out: Annotated[int, Meta(ge=0, le=_LARGEST_OUT)]
    bundle: str
    results: Annotated[tuple[Entry, ...], Meta(max_length=4096)]


def read_answer(place: Place, fields: dict[str, Any], kind: type[Answer]) -> Answer:
    """Return an answer as a value.

    Raises:
        RunError: it names a fault, or is not what far.py answers.
    """
    if "error" in fields:
        raise fault(place, fields)
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise RunError(
            f"{place.host} answered what edgecomp never answers ({clean(str(error))}); nothing was taken from it"
        ) from None


def fault(place: Place, fields: dict[str, Any]) -> RunError:
    """Return the error for a fault that the other machine named."""

    def told(name: str, of: object = fields) -> str:
        return clean(str(of.get(name, "?"))[:500]) if isinstance(of, dict) else "?"

    owner, missing = fields.get("owner"), fields.get("missing")
    names = ", ".join(clean(str(one)) for one in missing) if isinstance(missing, list | tuple) else "?"
    venv = f"{place.folder}/venv"
    texts = {
        "no-python": "there is no python3 on PATH for a login without a terminal; install Python 3.10 or newer there, "
        f"or make {venv} with one that PATH does not name",
        "old-python": f"{told('path')} is Python {told('text') or 'of no known version'}, and edgecomp needs 3.10 or "
        f"newer; install one and make a venv with it there: python3.10 -m venv --system-site-packages {venv}",
        "python": f"{told('path')} does not run ({told('text')}); repair it, or remove {venv} there",
        "os": f"{told('path')}: {told('text')}; name a folder that this user can write to there",
        "full": f"the disk of {told('path')} is full, or a quota is spent ({told('text')}; {told('free')} bytes "
        "free); free space there, or name a folder on another disk, and run the same command again",
        "busy": f"{place.folder} is in use: `{told('command', owner)}` runs there since {told('since', owner)}, "
        f"started by {told('by', owner)} (process {told('pid', owner)}); wait for it, or name another folder",
        "lost": f"the job there ended without an exit code: power went, or it was killed. Its log is {told('log')}; "
        "run the same command again to start it anew",
        "packages": f"edgecomp needs {names} there, and pip could not install them (what it said stands above). Give "
        f"that machine the network and run the same command again; or put the wheels into {told('wheels')} there; or "
        f"install them by hand: {told('python')} -m pip install ...",
    }
    text = texts.get(str(fields.get("error")), f"it named a fault that this edgecomp does not know: {told('error')}")
    return RunError(f"{place.host}: {text}")
