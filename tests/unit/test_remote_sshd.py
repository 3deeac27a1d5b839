"""`--on` through a real ssh server on the loopback interface, which these tests start and stop.

The server is `sshd` of OpenSSH: the program that EDGECOMP_TEST_SSHD names, on PATH, or in /usr/sbin; without one these
tests are skipped. It runs as the user of the tests, with keys and configuration of its own.
"""

from __future__ import annotations

import getpass
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgecomp import api
from edgecomp.bundle import open_bundle
from edgecomp.errors import RunError
from edgecomp.profiles.result import read_result
from edgecomp.remote import run_there
from edgecomp.remote.job import Cargo

Cli = Callable[..., Any]
SLOW = "echo first >&2; while ! [ -e $0.go ]; do sleep 0.02; done; echo second >&2; echo '{\"n\": 3}'; exit 1"
#: As root, sshd wants a user and a folder of its own for what is not yet logged in; both are made for it alone.
FOR_ROOT = """
set -e
mount --bind "$1" /etc/passwd
mount -t tmpfs tmpfs /run
mkdir -m 755 /run/sshd
shift
exec "$@"
"""


class Server:
    """A running sshd, and what a client needs to reach it under the name `nano`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        for name in ("host", "user", "other"):
            words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(folder / name)]
            subprocess.run(words, check=True, stdin=subprocess.DEVNULL)
        shutil.copyfile(folder / "user.pub", folder / "authorized")
        options = {
            "Port": self.port,
            "ListenAddress": "127.0.0.1",
            "HostKey": folder / "host",
            "AuthorizedKeysFile": folder / "authorized",
            "PidFile": "none",
            "StrictModes": "no",  # the folder of the tests may belong to a group
            "PasswordAuthentication": "no",
            "KbdInteractiveAuthentication": "no",
        }
        (folder / "sshd_config").write_text("".join(f"{k} {v}\n" for k, v in options.items()), encoding="utf-8")
        words = [*self._before(), find_sshd(), "-D", "-e", "-f", str(folder / "sshd_config")]
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._wait()

    def _before(self) -> list[str]:
        if os.geteuid() or (Path("/run/sshd").is_dir() and any(user.pw_name == "sshd" for user in pwd.getpwall())):
            return []
        users = Path("/etc/passwd").read_text(encoding="utf-8")
        (self.folder / "passwd").write_text(f"{users}sshd:x:65533:65534::/:/bin/false\n", encoding="utf-8")
        return ["unshare", "-m", "sh", "-c", FOR_ROOT, "sh", str(self.folder / "passwd")]

    def _wait(self) -> None:
        for _ in range(200):
            if self.process.poll() is not None:
                pytest.skip(f"sshd does not start here: {self.log.read_text(encoding='utf-8').strip()[-200:]}")
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        pytest.fail(f"sshd does not answer: {self.log.read_text(encoding='utf-8')}")

    def drop(self) -> None:
        """End every connection, as a cable that is pulled out, and only noticed by the other side."""
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text(encoding="utf-8")
        for child in listed.split():
            os.kill(int(child), signal.SIGKILL)

    def client(self, folder: Path, *, key: str = "user", known: str = "host", port: int = 0) -> None:
        """Write an `ssh` that is the system's with a configuration of its own."""
        public = "" if known == "none" else " ".join((self.folder / f"{known}.pub").read_text().split()[:2])
        (folder / "known").write_text(f"nano {public}\n" if public else "", encoding="utf-8")
        lines = [
            "Host nano",
            "HostName 127.0.0.1",
            "HostKeyAlias nano",
            f"Port {port or self.port}",
            "Host *",
            f"IdentityFile {self.folder / key}",
            "IdentitiesOnly yes",
            "StrictHostKeyChecking no",  # what edgecomp asks for has to win
            f"UserKnownHostsFile {folder / 'known'}",
            "GlobalKnownHostsFile /dev/null",
            "RemoteCommand top",
            "RequestTTY yes",
        ]
        (folder / "config").write_text("\n".join([*lines, ""]), encoding="utf-8")
        program = folder / "ssh"
        program.write_text(f'#!/bin/sh\nexec {shutil.which("ssh", path=os.defpath)} -F {folder}/config "$@"\n')
        program.chmod(0o755)


def find_sshd() -> str:
    named = os.environ.get("EDGECOMP_TEST_SSHD", "")
    found = named or shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
    if not found:
        pytest.skip("there is no sshd on PATH or in /usr/sbin, and EDGECOMP_TEST_SSHD names none")
    return str(Path(found).absolute())  # sshd runs itself again and wants to be named by its whole path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    find_sshd()
    for program in ("ssh", "ssh-keygen"):
        if not shutil.which(program, path=os.defpath):
            pytest.skip(f"there is no {program}; install OpenSSH's client")
    running = Server(tmp_path_factory.mktemp("sshd"))
    yield running
    running.drop()
    running.process.terminate()
    running.process.wait(timeout=10)


@pytest.fixture
def there(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder on the other machine, whose Python is this one; `ssh` reaches it."""
    (tmp_path / "bin").mkdir()
    server.client(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    folder = tmp_path / "there"
    set_job(folder, "")
    return folder


def set_job(folder: Path, lines: str) -> None:
    """Make the far Python, which runs these lines of shell in place of edgecomp where there are some."""
    python = folder / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    (folder / "job").write_text(lines, encoding="utf-8")
    job = f'case "$1$2" in -medgecomp) exec sh {folder}/job ;; esac\n' if lines else ""
    python.write_text(f'#!/bin/sh\n{job}OMP_NUM_THREADS=1 exec {sys.executable} "$@"\n', encoding="utf-8")
    python.chmod(0o755)


def test_round_trip(bundle: Path, there: Path, server: Server, cli: Cli) -> None:
    """By the name in ssh's configuration, and by user, address and port: the same verdict and numbers as here."""
    said = cli("parity", bundle, "--budget", "4", "--threads", "1", "--on", f"ssh://nano{there}", "--json")
    assert said.code == 0, said.err
    here = cli("parity", bundle, "--budget", "4", "--threads", "1", "--json")
    assert json.loads(said.out) == json.loads(here.out)
    assert "nano: copying 6 of 6 files" in said.err
    assert "nano: model.m4.b1.onnx in onnxruntime" in said.err
    assert [file.name.split(".")[0] for file in (bundle / "parity").iterdir()] == ["nano"]
    (there.parent / "bin" / "known").write_text(
        f"[127.0.0.1]:{server.port} {(server.folder / 'host.pub').read_text(encoding='utf-8')}", encoding="utf-8"
    )
    on = f"ssh://{getpass.getuser()}@127.0.0.1:{server.port}{there}"
    kept = bundle.parent / "kept.json"
    words = ("--budget", "4", "--threads", "1", "--duration", "0.1", "--out", str(kept))
    said = cli("profile", bundle, *words, "--on", on)
    assert said.code == 0, said.err
    assert f"{bundle.name}: onnxruntime" in said.out
    assert "127.0.0.1: the bundle and this edgecomp are there already" in said.err
    (file,) = (bundle / "profiles").iterdir()
    assert file.name.rsplit(".", 2)[0] == "127.0.0.1"
    assert read_result(file) == read_result(kept)  # what came back is a result like any other
    assert read_result(file).subject.name == read_result(file).command[2] == bundle.name
    (listed,) = api.results_list(bundle / "profiles")
    assert (listed.kind, listed.what.split()[0].rstrip(",")) == ("result", bundle.name)
    assert open_bundle(bundle)


@pytest.mark.parametrize(
    ("client", "says"),
    [
        ({"known": "none"}, "its host key is not known here; run `ssh nano true` once, compare the fingerprint"),
        ({"known": "other"}, "its host key is not the one that known_hosts has"),
        ({"key": "other"}, "it refuses every key that ssh offered; put yours there with ssh-copy-id nano"),
        ({"port": 1}, "it cannot be reached; is it on"),
    ],
    ids=["unknown_host_key", "changed_host_key", "key_refused", "nobody_listens"],
)
def test_cannot_come_in(bundle: Path, there: Path, server: Server, cli: Cli, client: dict[str, Any], says: str) -> None:
    server.client(there.parent / "bin", **client)
    said = cli("parity", bundle, "--on", f"ssh://nano{there}")
    assert (said.code, said.out) == (2, "")
    assert f"error: nano: {says}" in said.err
    assert not (there / "files").exists()


def test_a_dropped_connection_while_the_job_runs(bundle: Path, there: Path, server: Server) -> None:
    set_job(there, SLOW)
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if line == "nano: first":
            server.drop()
        if "attaching" in line or "trying again" in line:
            (there / "job.go").touch()

    run = run_there(bundle, "parity", [], on=f"ssh://nano{there}", say=say, pauses_s=(0.1,))
    assert (run.code, run.document) == (1, {"n": 3})
    assert sum("trying again in 0.1 s" in line for line in said) == 1
    assert [line for line in said if line.endswith(("first", "second"))] == ["nano: first", "nano: second"]


def test_the_same_command_goes_on_after_the_connection_never_came_back(
    bundle: Path, there: Path, server: Server
) -> None:
    set_job(there, SLOW)

    def drop(line: str) -> None:
        if line == "nano: first":
            server.drop()

    with pytest.raises(RunError, match=r"nano: .*; the job does not need the connection\. Run the same command again"):
        run_there(bundle, "parity", [], on=f"ssh://nano{there}", say=drop, pauses_s=())
    said: list[str] = []

    def let_go(line: str) -> None:
        said.append(line)
        if "attaching to it" in line:
            (there / "job.go").touch()

    assert run_there(bundle, "parity", [], on=f"ssh://nano{there}", say=let_go, pauses_s=()).document == {"n": 3}
    assert any("the same command runs there since" in line for line in said)


def test_a_dropped_connection_while_a_file_is_copied(
    bundle: Path, there: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_job(there, "echo {}")
    (weights,) = [one for one in open_bundle(bundle).manifest.files if one.role == "weights"]
    part, offsets = there / "files" / f"{weights.sha256}.part", []
    read = Cargo.read

    def read_slowly(cargo: Cargo, offset: int) -> Iterator[bytes]:
        content = b"".join(read(cargo, offset))
        if cargo.sha256 == weights.sha256:
            offsets.append(offset)
            if offset == 0:
                yield content[:-1]  # all but the last byte: the far side has it, and waits
                end = time.monotonic() + 30
                while not part.is_file() or part.stat().st_size < 200_000:
                    assert time.monotonic() < end, "nothing arrives"
                    time.sleep(0.02)
                server.drop()
                time.sleep(0.2)
                content = content[-1:]
        yield content

    monkeypatch.setattr(Cargo, "read", read_slowly)
    said: list[str] = []
    run = run_there(bundle, "parity", [], on=f"ssh://nano{there}", say=said.append, pauses_s=(0.1,))
    assert run.document == {}
    assert len(offsets) == 2
    assert offsets[1] >= 200_000, "what had arrived is not sent again"
    assert any("going on within the one that was begun" in line for line in said)
    assert (there / "files" / weights.sha256).read_bytes() == (bundle / "weights.data").read_bytes()
