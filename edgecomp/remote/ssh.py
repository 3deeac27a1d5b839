"""One call to another machine: the system's ssh, a fixed piece of shell, and `far.py` behind it.

No shell runs here, and the words that the shell there gets are quoted. ssh's own configuration and keys decide how to
come in; on top of them no prompt may open and a host key must be known, whatever the configuration says.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from edgecomp.errors import RunError
from edgecomp.remote import far
from edgecomp.remote.place import Place

__all__ = ["Connection", "ConnectionLost", "Reply"]

#: What the shell there runs: find a Python that is new enough, and hand over. It is the same text in every call.
_SCRIPT = """\
say() {
    printf "edgecomp-far-1\\n{\\"error\\": \\"%s\\", \\"text\\": \\"%s\\", \\"path\\": \\"%s\\"}\\n" "$1" "$2" "$3"
    exit 0
}
program=$1 verb=$2 folder=$3
case $folder in "~/"*) folder=$HOME/${folder#??} ;; esac
python=$folder/venv/bin/python
[ -x "$python" ] || python=$(command -v python3) || say no-python "" ""
version=$("$python" -c "import sys; print(sys.version.split()[0]); sys.exit(sys.version_info < (3, 10))" 2>/dev/null) ||
    say old-python "$version" "$python"
exec "$python" -I -c "$program" "$verb" "$folder"
"""
_OPTIONS = (
    "BatchMode=yes",  # no prompt that nobody answers
    "StrictHostKeyChecking=yes",  # never a host whose key is not known, also where the configuration is laxer
    "ConnectTimeout=20",
    "ServerAliveInterval=10",
    "ServerAliveCountMax=3",
    "ClearAllForwardings=yes",
    "ForwardAgent=no",
    "ForwardX11=no",
    "PermitLocalCommand=no",
    "RemoteCommand=none",  # a configuration may name one, and ssh then refuses ours
    "ControlMaster=no",  # one that is there is used; one that stays behind would hold our pipes open
    "LogLevel=ERROR",
)
_LARGEST_ANSWER = 16 << 20
_MOST_NOISE = 1 << 16  # bytes that a login shell may print in front of the answer


class ConnectionLost(RunError):
    """The connection ended before the answer did; a second attempt may do."""


class Reply:
    """The answer to a call: its fields, and the bytes behind them."""

    def __init__(self, host: str, fields: dict[str, Any], stream: IO[bytes]) -> None:
        self.fields = fields
        self._host, self._stream = host, stream

    def read(self, length: int) -> Iterator[bytes]:
        """Yield exactly so many bytes.

        Raises:
            ConnectionLost: there are fewer.
        """
        while length:
            chunk = self._stream.read(min(length, 1 << 20))
            if not chunk:
                raise ConnectionLost(f"{self._host}: the connection ended with {length} bytes still to come")
            length -= len(chunk)
            yield chunk

    def lines(self) -> Iterator[bytes]:
        """Yield the rest as it comes, a line or what there is of one at a time."""
        yield from iter(lambda: self._stream.readline(1 << 16), b"")


class Connection:
    """How a place is reached; holds nothing open between calls."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def _command(self, verb: str) -> list[str]:
        place = self.place
        program = Path(far.__file__).read_text(encoding="utf-8")
        words = ["exec", "sh", "-c", _SCRIPT, "edgecomp", program, verb, place.folder]
        options = [word for option in _OPTIONS for word in ("-o", option)]
        where = [*(("-p", str(place.port)) if place.port else ()), *(("-l", place.user) if place.user else ())]
        return ["ssh", "-T", *options, *where, "--", place.host, shlex.join(words)]

    @contextmanager
    def call(self, verb: str, request: dict[str, Any], data: Iterable[bytes] = ()) -> Iterator[Reply]:
        """Send a request, and the bytes behind it; give the reply.

        Raises:
            RunError: ssh cannot be run, cannot come in, or what answers is not far.py; the text says which and what to
                do. ConnectionLost: it came in, and the connection ended too early.
        """
        host = self.place.host
        with tempfile.TemporaryFile() as said:
            try:
                process = subprocess.Popen(
                    self._command(verb), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said
                )
            except FileNotFoundError:
                raise RunError("--on needs the program `ssh`, which is not on PATH; install OpenSSH's client") from None
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                with suppress(BrokenPipeError):  # it ended early; its answer, or ssh's exit status, says why
                    process.stdin.write(json.dumps(request).encode() + b"\n")
                    for chunk in data:
                        process.stdin.write(chunk)
                with suppress(BrokenPipeError):
                    process.stdin.close()
                fields = _read_answer(process.stdout)
                if fields is None:
                    raise _explain(self.place, process.wait(), said)
                yield Reply(host, fields, process.stdout)
                if process.wait() != 0:
                    raise _explain(self.place, process.returncode, said, came_in=True)
            finally:
                process.stdout.close()
                if process.poll() is None:
                    process.terminate()
                process.wait()


def _read_answer(stream: IO[bytes]) -> dict[str, Any] | None:
    """Return the answer behind the mark; None where there is none."""
    seen = 0
    while seen < _MOST_NOISE:
        line = stream.readline(_MOST_NOISE)
        if not line:
            return None
        seen += len(line)
        if line.endswith(far.MARK):  # what a login shell prints may lack a line break
            content = stream.readline(_LARGEST_ANSWER)
            try:
                found = json.loads(content)
            except (ValueError, RecursionError):
                return None
            return found if content.endswith(b"\n") and isinstance(found, dict) else None
    return None


def _explain(place: Place, status: int, said: IO[bytes], *, came_in: bool = False) -> RunError:
    """Return the error that fits what ssh said."""
    said.seek(0)
    lines = [clean(line) for line in said.read(1 << 16).decode(errors="replace").splitlines() if line.strip()]
    text, last = "\n".join(lines), (lines or ["it said nothing"])[-1]
    host, by_hand = place.host, f"`ssh {place.login} true`"
    if status != 255 and not came_in:
        return RunError(f"{host} let us in and ran no program (exit code {status}: {last}); see what {by_hand} does")
    for kind, pattern, advice in _REASONS:
        if not came_in and re.search(pattern, text):
            return kind(f"{host}: {advice.format(by_hand=by_hand, login=place.login)} (ssh said: {last})")
    return ConnectionLost(f"{host}: the connection ended too early (ssh said: {last})")


_REASONS: tuple[tuple[type[RunError], str, str], ...] = (
    (
        RunError,
        r"IDENTIFICATION HAS CHANGED|host key .* has changed",
        (
            "its host key is not the one that known_hosts has: the machine was set up anew, or another one answers in "
            "its place. Find out which, and only then remove the old key with ssh-keygen -R and run {by_hand}"
        ),
    ),
    (
        RunError,
        r"Host key verification failed|host key is known",
        "its host key is not known here; run {by_hand} once, compare the fingerprint with the machine's, and accept it",
    ),
    (
        RunError,
        r"Permission denied|Too many authentication failures|No more authentication methods",
        "it refuses every key that ssh offered; put yours there with ssh-copy-id {login}, or load it with ssh-add",
    ),
    (
        ConnectionLost,
        r"Could not resolve hostname|Name or service not known|Temporary failure in name resolution",
        "there is no host of this name; check the name, or add it to ssh's configuration",
    ),
    (
        ConnectionLost,
        r"Connection refused|No route to host|Network is unreachable|Connection timed out|Operation timed out",
        "it cannot be reached; is it on, in this network, and is its ssh server at that port? {by_hand} shows more",
    ),
    (
        RunError,
        r"command-line|[Bb]ad configuration option|Bad owner or permissions",
        "ssh itself refuses; see {by_hand}",
    ),
)


def clean(line: str) -> str:
    """Return a line of the other machine without characters that could steer a terminal."""
    return "".join(letter if letter.isprintable() or letter == "\t" else "?" for letter in line.rstrip("\r\n"))
