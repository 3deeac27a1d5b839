"""A verb on another machine, from the first call to the results: copy what changed, start, follow, collect."""

from __future__ import annotations

import getpass
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from packaging.requirements import Requirement

from edgecomp.errors import BundleError, RunError
from edgecomp.remote.answers import Done, Hello, Listing, Put, Started, fault, read_answer
from edgecomp.remote.job import Attached, Cargo, Job, make_job, missing_packages
from edgecomp.remote.place import Place, read_place
from edgecomp.remote.results import local_results, require_apart, staging, store, take, write_record
from edgecomp.remote.ssh import Connection, ConnectionLost, clean
from edgecomp.specs.origin import file_sha256

__all__ = ["RemoteRun", "run_there"]

_PAUSES_S = (2.0, 5.0, 15.0)
_FOLDERS = {"build": ("engines",), "parity": ("parity",), "profile": ("profiles",)}
_ALL_FOLDERS = ("engines", "parity", "profiles")  # of verbs that do all of it
_MOST_TALK = 16 << 20  # bytes of a job's log that are shown

Say = Callable[[str], None]
Found = TypeVar("Found")


class RemoteRun(msgspec.Struct, frozen=True):
    """What a verb did on another machine.

    Attributes:
        host: the machine.
        code: the exit code of edgecomp there.
        document: the JSON that it printed, with paths of the bundle there turned into paths here; None where it
            printed none, because it failed.
        files: results that came into the bundle here, by their names in it.
    """

    host: str
    code: int
    document: Any
    files: tuple[str, ...]


def run_there(
    bundle: Path,
    verb: str,
    words: Sequence[str | Attached],
    *,
    on: str,
    say: Say,
    pauses_s: Sequence[float] = _PAUSES_S,
) -> RemoteRun:
    """Run `edgecomp VERB WORDS --json BUNDLE` on another machine.

    The job there does not depend on the connection. When that is lost and does not come back, an error says how to go
    on: the same call again attaches to the job, or collects what it left.

    Args:
        bundle: the folder here; results come into its folders `engines/`, `parity/` and `profiles/`.
        verb: of the command line.
        words: its options.
        on: `ssh://user@host[:port]/folder`.
        say: takes one line for each step, and each line that edgecomp says there, with the host in front.
        pauses_s: seconds to wait before each further attempt at a lost connection.

    Raises:
        InvalidSpec: `on` is no such address. BundleError: the bundle is not whole.
        RunError: the machine cannot be reached, has no fitting Python or no room, or is busy; the text says which.
    """
    session = _Session(read_place(on), make_job(bundle, verb, words), say, tuple(pauses_s))
    session.copy()
    session.follow()
    return session.collect()


class _Session:
    """One run of a job on one place."""

    def __init__(self, place: Place, job: Job, say: Say, pauses_s: tuple[float, ...]) -> None:
        self._connection, self._place, self._job, self._pauses_s = Connection(place), place, job, pauses_s
        self._say: Say = lambda line: say(f"{place.host}: {line}")
        self._install: tuple[str, ...] = ()
        self._log_bytes = 0
        self._came_in = self._is_started = False
        self._how_to_end = ""

    # -- copying --------------------------------------------------------------------------------------------

    def copy(self) -> None:
        """Bring what is missing there, going on where the last attempt ended."""
        self._patiently(self._copy_once)

    def _copy_once(self) -> None:
        answer = self._ask_what_is_there()
        wanted = self._job.cargo
        begun = {one.sha256: min(answer.there.get(one.sha256, 0), one.size) for one in wanted}
        missing = [one for one in wanted if begun[one.sha256] < one.size or one.sha256 not in answer.there]
        left = sum(one.size - begun[one.sha256] for one in missing)
        if left > answer.free:
            raise RunError(
                f"{self._place.host}: {left >> 10} KiB are to be copied and {clean(answer.root)} has "
                f"{answer.free >> 10} KiB free; free space there, or name a folder on another disk"
            )
        if not missing:
            self._say("the bundle and this edgecomp are there already")
            return
        again = any(begun[one.sha256] for one in missing)
        self._say(
            f"copying {len(missing)} of {len(wanted)} files, {left / 2**20:.1f} MiB"
            + (", going on within the one that was begun" if again else "")
        )
        request = [{"sha256": one.sha256, "size": one.size, "offset": begun[one.sha256]} for one in missing]
        data = (chunk for one in missing for chunk in one.read(begun[one.sha256]))
        with self._connection.call("put", {"files": request}, data) as reply:
            why = reply.fields.get("error")
            if why in ("altered", "short"):
                self._require_unchanged(reply.fields.get("sha256"), missing)
                what = "what arrived of a file is not its content" if why == "altered" else "a file arrived in part"
                raise ConnectionLost(f"{self._place.host}: {what}")
            read_answer(self._place, reply.fields, Put)

    def _ask_what_is_there(self) -> Hello:
        request = {
            "files": [{"sha256": one.sha256, "size": one.size} for one in self._job.cargo],
            "packages": [Requirement(line).name for line in self._job.requires],
        }
        with self._connection.call("hello", request) as reply:
            answer = read_answer(self._place, reply.fields, Hello)
        if not self._came_in:
            self._say(f"Python {answer.python}, {answer.free >> 20} MiB free in {clean(answer.root)}")
        self._came_in = True
        self._install = missing_packages(self._job.requires, answer.python, answer.packages)
        return answer

    def _require_unchanged(self, sha256: object, files: Sequence[Cargo]) -> None:
        """Refuse to go on where a file of the bundle here is no longer what its manifest says."""
        for one in files:
            if one.sha256 == sha256 and isinstance(one.source, Path) and file_sha256(one.source) != sha256:
                raise BundleError(f"bundle {self._job.bundle}: {one.name} changed while it was copied; run it again")

    # -- the job --------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Start the job, or attach to it, and pass on what it says until it ends."""
        try:
            self._patiently(self._follow_once)
        except KeyboardInterrupt:
            if self._is_started:
                self._say(f"the job goes on there, and the same command attaches to it. {self._how_to_end}")
            raise

    def _follow_once(self) -> None:
        request = {
            **self._job.start_request(self._install),
            "by": _whoami(),
            "resume": self._is_started,
            "offset": self._log_bytes,
        }
        with self._connection.call("start", request) as reply:
            answer = read_answer(self._place, reply.fields, Started)
            self._how_to_end = f"To end it: ssh {self._place.login} kill -- -{answer.group}"
            if not self._is_started:
                self._say(self._tell(answer))
            self._is_started = True
            for line in reply.lines():
                if self._log_bytes < _MOST_TALK:
                    self._say(clean(line.decode(errors="replace")))
                self._log_bytes += len(line)

    def _tell(self, answer: Started) -> str:
        since = clean(answer.since)
        if answer.state == "started":
            return f"running edgecomp {self._job.verb}; its log is {clean(answer.job)}/log"
        if answer.state == "running":
            return f"the same command runs there since {since}; attaching to it"
        return f"the same command, begun {since}, has ended there; collecting what it left"

    # -- results --------------------------------------------------------------------------------------------

    def collect(self) -> RemoteRun:
        """Bring the results into the bundle here, and the exit code."""
        listing, out, files = self._patiently(self._collect_once)
        try:
            run = self._read_run(listing, out, files)
        except RunError:  # an end without a result: there is nothing to come back for
            self._patiently(lambda: self._note_collected(listing.end.run))
            raise
        self._patiently(lambda: self._note_collected(listing.end.run))
        return run

    def _read_run(self, listing: Listing, out: bytes, files: tuple[str, ...]) -> RemoteRun:
        """Return what the job did, and note it in the bundle where its verb writes no file of its own."""
        code = self._read_code(listing)
        if code not in (0, 1):
            return RemoteRun(self._place.host, code, None, files)
        document = self._read_document(out, listing.bundle)
        folder = {"parity": "parity", "profile": "profiles"}.get(self._job.verb)
        if folder:
            name = f"{folder}/{self._place.host.replace(':', '_')}.{self._job.id}.json"
            if self._job.verb == "profile":  # a result as it is, so that `results` and `compare` read it
                document = _named_here(document, self._job.key, self._job.bundle.resolve().name)
                write_record(self._job.bundle, name, document)
            else:
                fields = {"on": self._place.host, "verb": self._job.verb, "words": self._job.words, "code": code}
                write_record(self._job.bundle, name, {**fields, "report": document})
            self._say(f"written here: {name}")
            files = (*files, name)
        return RemoteRun(self._place.host, code, document, files)

    def _collect_once(self) -> tuple[Listing, bytes, tuple[str, ...]]:
        job = self._job
        folders = _FOLDERS.get(job.verb, _ALL_FOLDERS)
        request = {"job": job.id, "bundle": job.key, "folders": folders, "have": local_results(job.bundle, folders)}
        with staging(job.bundle) as folder:
            with self._connection.call("collect", request) as reply:
                listing = read_answer(self._place, reply.fields, Listing)
                require_apart(self._place.host, listing, folders)
                out = take(self._place.host, reply, listing, folder)
            new, replaced = store(listing, folder, job.bundle)
        for what, names in (("new here", new), ("replaced here", replaced)):
            for name in names:
                self._say(f"{what}: {name}")
        return listing, out, (*new, *replaced)

    def _note_collected(self, run: str) -> None:
        with self._connection.call("done", {"job": self._job.id, "run": run}) as reply:
            read_answer(self._place, reply.fields, Done)

    def _read_code(self, listing: Listing) -> int:
        end = listing.end
        if end.error:
            raise fault(self._place, msgspec.to_builtins(end))
        if end.code is None or end.code < 0:
            why = ", which often means that the memory ran out" if end.code == -9 else ""
            raise RunError(
                f"{self._place.host}: signal {-(end.code or 0)} ended edgecomp there{why}; run the same command again "
                "to start it anew"
            )
        return end.code

    def _read_document(self, out: bytes, there: str) -> Any:
        try:
            return _localised(msgspec.json.decode(out), there, str(self._job.bundle))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RunError(
                f"{self._place.host}: what edgecomp printed there is no JSON ({error}); run it again"
            ) from None

    # -- patience -------------------------------------------------------------------------------------------

    def _patiently(self, step: Callable[[], Found]) -> Found:
        """Do a step again when the connection is lost, but not where there never was one."""
        for pause in self._pauses_s:
            try:
                return step()
            except ConnectionLost as error:
                if not self._came_in:
                    raise
                self._say(f"{str(error).removeprefix(f'{self._place.host}: ')}; trying again in {pause:g} s")
                time.sleep(pause)
        try:
            return step()
        except ConnectionLost as error:
            if not self._came_in:
                raise
            state = "the job does not need the connection" if self._is_started else "what was copied is kept there"
            raise RunError(
                f"{error}; {state}. Run the same command again: it goes on from where this one ended"
            ) from None


def _whoami() -> str:
    """Return who starts a job, for others who find the folder in use."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container may have no name for its user
        user = "someone"
    return f"{user}@{platform.node()}"


def _localised(value: Any, there: str, here: str) -> Any:
    """Return a JSON value in which paths of the bundle there are paths of the bundle here."""
    if isinstance(value, str) and (value == there or value.startswith(f"{there}/")):
        return here + value[len(there) :]
    if isinstance(value, list):
        return [_localised(one, there, here) for one in value]
    if isinstance(value, dict):
        return {key: _localised(one, there, here) for key, one in value.items()}
    return value


def _named_here(document: Any, key: str, name: str) -> Any:
    """Return a result in which the bundle has its name of here, which is its key on the other machine."""
    if not isinstance(document, dict) or not isinstance(document.get("subject"), dict):
        return document
    subject = {**document["subject"], "name": name}
    command = [name if word == key else word for word in document.get("command", [])]
    notes = [*document.get("notes", []), "measured on another machine, by --on"]
    return {**document, "subject": subject, "command": command, "notes": notes}
