"""`--on`: a verb of the command line, run on another machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgecomp.api._progress import Progress, silent
from edgecomp.errors import InvalidSpec
from edgecomp.remote import Attached, RemoteRun, run_there

__all__ = ["remote"]

_CHECKPOINTS = ("--weights", "--backbone-weights", "--then-weights")


def remote(
    verb: str, bundle: str | Path, options: Sequence[tuple[str, str]], *, on: str, progress: Progress = silent
) -> RemoteRun:
    """Run a verb of the command line on another machine and bring its results into the bundle here.

    Args:
        verb: `build`, `parity`, `profile`, ...
        bundle: the folder here.
        options: of that verb, names (`--target`) with their values; "" for one that takes none. A name may come twice.
        on: `ssh://user@host[:port]/folder`; docs/remote.md says what happens there.
        progress: takes one line for each step, and each line that edgecomp says there.

    Returns:
        its exit code and its JSON document. A failed gate there is a result with code 1, and an error there is one with
        code 2 whose text came through `progress`.

    Raises:
        InvalidSpec: an address or option that cannot be taken there. BundleError: the bundle is not whole.
        RunError: the machine cannot be reached or used; the text says why and what to do.
    """
    words: list[str | Attached] = []
    for option, value in options:
        if option == "--target" and value.endswith(".toml"):
            words.append(Attached(option, Path(value)))
        elif value.endswith(".so"):
            raise InvalidSpec(
                f"{option} {value} is a library of this machine, and --on builds on another; give --plugin require, "
                "which compiles it there"
            )
        elif option in _CHECKPOINTS:
            raise InvalidSpec(
                f"{option} {value} is a file of this machine, and --on runs on another; run this without --on"
            )
        else:
            words.append(f"{option}={value}" if value else option)
    return run_there(Path(bundle), verb, words, on=on, say=progress)
