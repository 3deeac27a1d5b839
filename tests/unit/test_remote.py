"""`--on`: what goes to another machine and what comes back, and every fault on the way.

Here a stand-in for `ssh` (`fake_ssh.py`) runs the very command that would run there; `test_remote_sshd.py` has a real
server. Where a test is about the connection, the far Python hands `-m edgecomp` to a few lines of shell.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import edgecomp
from edgecomp import api
from edgecomp.api import remote
from edgecomp.bundle import open_bundle
from edgecomp.cli.on import _read
from edgecomp.errors import BundleError, EdgecompError, InvalidSpec, RunError
from edgecomp.parity.metrics import Difference
from edgecomp.profiles.result import read_result
from edgecomp.remote import Attached, RemoteRun, far, job, read_place, run_there
from edgecomp.remote.job import missing_packages
from edgecomp.remote.ssh import Connection, Reply
from edgecomp.remote.wheel import make_wheel

Cli = Callable[..., Any]
ROOT = Path(edgecomp.__file__).parents[1]
ON = "ssh://me@nano/~/ec"
SAY_ARGUMENTS = 'python3 - "$@" <<END\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\nEND\n'


made_wheel = functools.cache(make_wheel)  # by the first test; it takes a tenth of a second


class There:
    """The other machine: its home, what ssh does wrong, and what a job does in place of edgecomp."""

    def __init__(self, base: Path) -> None:
        self.bin, self.home, self.far_bin = base / "bin", base / "home", base / "far_bin"
        for folder in (self.bin, self.home, self.far_bin):
            folder.mkdir()
        (self.bin / "ssh").write_text(
            f'#!/bin/sh\nexec {sys.executable} -IS {self.bin}/fake_ssh.py "$@"\n', encoding="utf-8"
        )
        (self.bin / "ssh").chmod(0o755)
        shutil.copyfile(Path(__file__).with_name("fake_ssh.py"), self.bin / "fake_ssh.py")
        self.root = self.home / "ec"
        self.plan()
        self.program(self.far_bin / "python3", f'exec {sys.executable} "$@"')

    def plan(self, *, before: str = "", path: str = "", **faults: list[dict[str, Any]]) -> None:
        plan = {
            "faults": faults,
            "home": str(self.home),
            "path": path or f"{self.far_bin}:{os.environ['PATH']}",
            "before": before,
        }
        (self.bin / "plan.json").write_text(json.dumps(plan), encoding="utf-8")

    def program(self, path: Path, lines: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{lines}\n", encoding="utf-8")
        path.chmod(0o755)

    def job(self, lines: str) -> None:
        """Have these lines of shell run in place of edgecomp; `$bundle` is the folder there."""
        body = f'for bundle in "$@"; do :; done\n{lines}'
        (self.home / "job.sh").write_text(body, encoding="utf-8")
        python = f'case "$*" in *"-m edgecomp"*) exec sh {self.home}/job.sh "$@" ;; esac\nexec {sys.executable} "$@"'
        self.program(self.root / "venv" / "bin" / "python", python)

    def calls(self) -> list[str]:
        lines = (self.bin / "calls").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)[0] for line in lines]

    def sent(self) -> list[int]:
        return [int(line) for line in (self.bin / "sent").read_text(encoding="utf-8").split()]


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[There]:
    machine = There(tmp_path)
    monkeypatch.setattr(job, "make_wheel", made_wheel)
    monkeypatch.setenv("PATH", f"{machine.bin}:{os.environ['PATH']}")
    yield machine
    wait_for(lambda: not machine.root.is_dir() or far.take_lock(machine.root) is not None, seconds=20)


def wait_for(true: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.02)


def go(
    bundle: Path,
    verb: str = "parity",
    *,
    on: str = ON,
    pauses: tuple[float, ...] = (),
    touch: Path = Path(),
    on_line: str = "!",
) -> tuple[RemoteRun, list[str]]:
    """Run a verb there; make the file `touch` when a line with `on_line` is said."""
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if on_line in line:
            touch.touch()

    return run_there(bundle, verb, [], on=on, say=say, pauses_s=pauses), said


def refused(bundle: Path, verb: str = "parity", *words: str, on: str = ON, kind: type[EdgecompError] = RunError) -> str:
    with pytest.raises(kind) as caught:
        run_there(bundle, verb, words, on=on, say=lambda line: None, pauses_s=())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file() or file.is_symlink()}


# -- the address --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "user", "host", "port", "folder"),
    [
        ("ssh://me@nano/srv/edge", "me", "nano", 0, "/srv/edge"),
        ("ssh://nano:2222/srv/", "", "nano", 2222, "/srv"),
        ("ssh://me@nano.lan/~/ec", "me", "nano.lan", 0, "~/ec"),
        ("ssh://me@[fe80::1]:22/a", "me", "fe80::1", 22, "/a"),
        ("ssh://a_b.c@10.0.0.7/x/y+z@1,2=3", "a_b.c", "10.0.0.7", 0, "/x/y+z@1,2=3"),
    ],
)
def test_reads_an_address(url: str, user: str, host: str, port: int, folder: str) -> None:
    place = read_place(url)
    assert (place.user, place.host, place.port, place.folder) == (user, host, port, folder)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nano:/srv", "the only way"),
        ("http://nano/srv", "the only way"),
        ("ssh:///srv", "the only way"),
        ("ssh://-oProxyCommand=x/srv", "'-oProxyCommand=x'"),
        ("ssh://-l@nano/srv", "user '-l'"),
        ("ssh://me@-nano/srv", "host '-nano'"),
        ("ssh://@nano/srv", "user ''"),
        ("ssh://a;b@nano/srv", "user 'a;b'"),
        ("ssh://na$(id)no/srv", "'na$(id)no'"),
        ("ssh://me@nano", "folder of edgecomp's own is missing"),
        ("ssh://me@nano/", "folder of edgecomp's own is missing"),
        ("ssh://me@nano/~", "folder of edgecomp's own is missing"),
        ("ssh://me@nano/a/../b", "'..'"),
        ("ssh://me@nano/./b", "'.'"),
        ("ssh://me@nano/a//b", "''"),
        ("ssh://me@nano/-rf", "'-rf'"),
        ("ssh://me@nano/a'b", '"a\'b"'),
        ('ssh://me@nano/a"b', "'a\"b'"),
        ("ssh://me@nano/a`b", "'a`b'"),
        ("ssh://me@nano/a$b", "'a$b'"),
        ("ssh://me@nano/~x/b", "'~x'"),
        ("ssh://me@nano/a b", "holds a space"),
        ("ssh://me@nano/a\nb", "holds a space, a line break"),
        ("ssh://me@nano/a\x1bb", "beyond ASCII"),
        ("ssh://me@n\u00e4no/a", "beyond ASCII"),
        ("ssh://me@nano/a?b=c", "`?` and `#`"),
        ("ssh://me@nano/a#b", "`?` and `#`"),
        ("ssh://me@nano:0/a", "its port"),
        ("ssh://me@nano:99999/a", "ort out of range"),
        ("ssh://me@nano:x/a", "'x'"),
        ("ssh://me@[::1/a", "IPv6"),
        (f"ssh://me@nano/{'a' * 2000}", "aaaa"),
    ],
)
def test_refuses_an_address(url: str, says: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        read_place(url)
    assert says in str(caught.value)
    assert "write ssh://" in str(caught.value) or "letters, digits" in str(caught.value)


def test_takes_no_password_and_does_not_repeat_it() -> None:
    with pytest.raises(InvalidSpec, match=r"ssh://me:\.\.\.@nano/a: edgecomp takes no password") as caught:
        read_place("ssh://me:secret@nano/a")
    assert "secret" not in str(caught.value)


def test_command_line_of_ssh() -> None:
    words = Connection(read_place("ssh://me@nano:2222/~/ec"))._command("hello")
    assert words[:2] == ["ssh", "-T"]
    assert words[-7:-1] == ["-p", "2222", "-l", "me", "--", "nano"]
    options = [words[i + 1] for i, word in enumerate(words[:-2]) if word == "-o"]
    assert {"BatchMode=yes", "StrictHostKeyChecking=yes", "ServerAliveInterval=10", "ForwardAgent=no"} <= set(options)
    assert not [word for word in words if "StrictHostKeyChecking=no" in word or "UserKnownHostsFile" in word]
    there = shlex.split(words[-1])
    assert there[:3] == ["exec", "sh", "-c"]
    assert there[4:] == ["edgecomp", Path(far.__file__).read_text(encoding="utf-8"), "hello", "~/ec"]
    assert len(words[-1]) < 100_000, "one word of a command line holds 128 KiB at most"


# -- the wheel ----------------------------------------------------------------------------------------------


def test_wheel_holds_the_package_and_its_data() -> None:
    wheel = make_wheel()
    assert wheel == make_wheel()
    with zipfile.ZipFile(io.BytesIO(wheel.content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    assert members["edgecomp/remote/far.py"] == Path(far.__file__).read_bytes()
    places = {
        "edgecomp/_data/profiles/targets/t4.toml": "profiles/targets/t4.toml",
        "edgecomp/py.typed": "edgecomp/py.typed",
    }
    for place, file in {**places, "edgecomp/_data/export/recipes/tome.toml": "export/recipes/tome.toml"}.items():
        assert members[place] == (ROOT / file).read_bytes()
    assert not [name for name in members if "__pycache__" in name or "results/" in name]
    metadata = next(content.decode() for name, content in members.items() if name.endswith("METADATA")).splitlines()
    assert 'Requires-Dist: onnxruntime>=1.19; extra == "ort"' in metadata  # pip install WHEEL[ort]
    gpu = [line for line in metadata if line.endswith('and extra == "gpu"')]
    assert gpu == ['Requires-Dist: tensorrt<12,>=10.3; platform_machine == "x86_64" and extra == "gpu"']
    assert [line for line in metadata if line.startswith("Provides-Extra")]
    assert any(line.startswith("msgspec>=") for line in wheel.requires)
    assert not [line for line in wheel.requires if "torch" in line or "extra" in line]


def test_an_installed_edgecomp_makes_the_same_wheel(tmp_path: Path) -> None:
    """Unpacked as pip would, it gives the same bytes again: a machine can pass on what it was given."""
    wheel = make_wheel()
    with zipfile.ZipFile(io.BytesIO(wheel.content)) as archive:
        archive.extractall(tmp_path)
    code = "from edgecomp.remote.wheel import make_wheel; print(make_wheel().sha256)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == wheel.sha256


@pytest.mark.slow
def test_pip_takes_the_wheel(tmp_path: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        pytest.skip("this environment has no pip")
    wheel = make_wheel()
    (tmp_path / wheel.name).write_bytes(wheel.content)
    words = [
        "install",
        "--no-deps",
        "--no-index",
        "--no-compile",
        "--quiet",
        "--target",
        tmp_path / "site",
        tmp_path / wheel.name,
    ]
    done = subprocess.run([sys.executable, "-m", "pip", *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "edgecomp" / "_data" / "engines" / "README.md").is_file()


@pytest.mark.parametrize(
    ("python", "found", "missing"),
    [
        ("3.11.2", {"numpy": "1.23", "tomli": "1.0"}, ()),
        ("3.11.2", {"numpy": "1.22.9"}, ("numpy>=1.23",)),
        ("3.10.12", {"numpy": "2.0"}, ("tomli>=2",)),
        ("3.12.0", {}, ("numpy>=1.23",)),
        ("3.12.0", {"numpy": "2.0.0rc1"}, ()),
    ],
)
def test_missing_packages(python: str, found: dict[str, str], missing: tuple[str, ...]) -> None:
    assert missing_packages(("numpy>=1.23", "tomli>=2; python_version < '3.11'"), python, found) == missing


# -- there and back -----------------------------------------------------------------------------------------


def test_parity_there_says_what_parity_here_says(bundle: Path, there: There, cli: Cli) -> None:
    said = cli("parity", bundle, "--threads", "1", "--on", ON)
    assert said.code == 0, said.err
    assert said.out == cli("parity", bundle, "--threads", "1").out
    assert "nano: copying 6 of 6 files" in said.err
    assert "nano: model.m4.b1.onnx in onnxruntime" in said.err, "what edgecomp says there is streamed"
    (record,) = (bundle / "parity").glob("nano.*.json")
    document = json.loads(record.read_bytes())
    assert document["words"] == ["--threads=1"]
    assert (document["code"], document["report"]["bundle"]) == (0, str(bundle))
    assert open_bundle(bundle), "the bundle is whole with its results in it"
    again = cli("parity", bundle, "--threads", "1", "--on", ON, "--json")
    assert json.loads(again.out) == document["report"]
    assert "nano: the bundle and this edgecomp are there already" in again.err
    assert there.calls() == ["hello", "put", "start", "collect", "done", "hello", "start", "collect", "done"]


def test_profile_there_leaves_a_result_like_any_other(bundle: Path, there: There, cli: Cli, tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    words = ("--budget", 4, "--threads", 1, "--duration", 0.05, "--out", kept)
    said = cli("profile", bundle, *words, "--on", ON)
    assert said.code == 0, said.err
    assert f"{bundle.name}: onnxruntime" in said.out
    (file,) = (bundle / "profiles").iterdir()
    assert file.name.rsplit(".", 2)[0] == "nano"
    measured = read_result(file)
    assert measured == read_result(kept)
    assert measured.subject.name == measured.command[2] == bundle.name
    assert "measured on another machine, by --on" in measured.notes
    (listed,) = api.results_list(bundle / "profiles")
    assert (listed.kind, bundle.name in listed.what) == ("result", True)


def test_build_there_brings_engines(bundle: Path, there: There, cli: Cli) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed")
    words = ("build", bundle, "--target", "a10", "--runtime", "rtx", "--budget", "4")
    said = cli(*words, "--on", ON, "--json")
    assert said.code == 0, said.err
    (engine,) = json.loads(said.out)["engines"]
    assert engine["path"] == str(bundle / "engines" / "a10" / "model.m4.b1.rtx.engine")
    assert hashlib.sha256(Path(engine["path"]).read_bytes()).hexdigest() == engine["record"]["sha256"]
    assert "new here: engines/a10/model.m4.b1.rtx.json" in said.err
    assert json.loads(cli(*words, "--json").out)["engines"][0]["reused"], "what came is taken as built here"


def test_a_changed_manifest_alone_is_copied_alone(bundle: Path, there: There, edit_manifest: Any) -> None:
    there.job("echo {}")
    go(bundle)
    edit_manifest(bundle, lambda raw: raw["notes"].append("calibrated"))
    _, said = go(bundle)
    assert "nano: copying 1 of 6 files, 0.0 MiB" in said
    assert [folder.name for folder in (there.root / "bundles").iterdir()] == [
        next(iter((there.root / "bundles").iterdir())).name
    ], "engines of the same graphs stay valid"


def test_a_file_that_broke_there_is_copied_again(bundle: Path, there: There) -> None:
    there.job("echo {}")
    go(bundle)
    (weights,) = [one for one in open_bundle(bundle).manifest.files if one.role == "weights"]
    file = there.root / "files" / weights.sha256
    content = bytearray(file.read_bytes())
    content[7] ^= 1
    file.write_bytes(content)
    _, said = go(bundle)
    assert "nano: copying 1 of 6 files, 0.2 MiB" in said
    (folder,) = (there.root / "bundles").iterdir()
    assert (folder / "weights.data").read_bytes() == (bundle / "weights.data").read_bytes()


@pytest.mark.parametrize("code", [1, 2])
def test_exit_codes_are_carried_over(bundle: Path, there: There, cli: Cli, code: int) -> None:
    there.job(f"echo 'error: no such thing' >&2; echo '{{\"a\": null}}'; exit {code}")
    said = cli("parity", bundle, "--json", "--on", ON)
    assert said.code == code
    assert "nano: error: no such thing" in said.err
    assert said.out == ('{"a":null}\n' if code in (0, 1) else "")


def test_options_go_there_as_they_stand(bundle: Path, there: There, tmp_path: Path) -> None:
    there.job(SAY_ARGUMENTS)
    target = tmp_path / "mine.toml"
    target.write_text("schema = 1\n", encoding="utf-8")
    options = [("--target", str(target)), ("--runtime", "a b'c\"d$(id)\n-e"), ("--force", "")]
    run = remote("build", bundle, options, on=ON)
    assert run.document[:2] == ["-m", "edgecomp"]
    verb, given, runtime, *rest = run.document[2:]
    assert (verb, runtime, rest) == ("build", "--runtime=a b'c\"d$(id)\n-e", ["--force", "--json", "--", str(bundle)])
    option, _, path = given.partition("=")
    assert (option, Path(path).name, Path(path).read_bytes()) == ("--target", "mine.toml", target.read_bytes())


def test_an_option_that_names_a_file_of_here(bundle: Path, there: There, tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match=r"--plugin ./x\.so is a library of this machine"):
        remote("build", bundle, [("--plugin", "./x.so")], on=ON)
    with pytest.raises(InvalidSpec, match=r"--target nowhere\.toml cannot be read: No such file"):
        remote("build", bundle, [("--target", "nowhere.toml")], on=ON)
    hidden = tmp_path / ".x.toml"
    hidden.write_bytes(b"")
    with pytest.raises(InvalidSpec, match=r"\.x\.toml: it goes to another machine"):
        run_there(bundle, "build", [Attached("--target", hidden)], on=ON, say=print)
    with (tmp_path / "big.toml").open("wb") as file:
        file.truncate(1 << 25)
    with pytest.raises(InvalidSpec, match=r"big\.toml is larger than 16777216 bytes"):
        run_there(bundle, "build", [Attached("--target", tmp_path / "big.toml")], on=ON, say=print)


def test_a_bundle_that_is_not_whole_goes_nowhere(bundle: Path, there: There) -> None:
    (bundle / "weights.data").write_bytes(b"")
    assert "weights.data has 0 bytes" in refused(bundle, kind=BundleError)
    assert not (there.bin / "calls").exists()


def test_null_is_read_as_nan() -> None:
    fields = dict.fromkeys(("max_abs", "max_rel", "cosine_mean", "cosine_min", "psnr", "expected"), 1.0)
    found = _read([{**fields, "worst": [0], "got": None, "not_finite": 1}], tuple[Difference, ...])  # type: ignore[arg-type]
    assert found[0].got != found[0].got


# -- results ------------------------------------------------------------------------------------------------

WRITES = """
mkdir -p $bundle/engines/a10 $bundle/parity
echo plan > $bundle/engines/a10/m.engine; echo record > $bundle/engines/a10/m.json
echo no > "$bundle/engines/a10/a b"; echo no > $bundle/engines/.hidden; echo no > $bundle/parity/p.json
ln -s /etc/passwd $bundle/engines/a10/link; ln -s /etc $bundle/engines/folder
echo '{"path": "'$bundle'/engines/a10/m.engine"}'
"""


def test_plain_results_come_back_and_nothing_else(bundle: Path, there: There) -> None:
    before = names(bundle)
    (bundle / "engines" / "a10").mkdir(parents=True)
    (bundle / "engines" / "a10" / "m.engine").write_text("of before", encoding="utf-8")
    there.job(WRITES)
    run, said = go(bundle, "build")
    assert names(bundle) - before == {"engines/a10/m.engine", "engines/a10/m.json"}
    assert (bundle / "engines" / "a10" / "m.engine").read_text(encoding="utf-8") == "plan\n"
    assert run.document == {"path": str(bundle / "engines" / "a10" / "m.engine")}
    assert said[-2:] == ["nano: new here: engines/a10/m.json", "nano: replaced here: engines/a10/m.engine"]
    assert [name for name in os.listdir(bundle.parent) if name.startswith(".")] == []
    assert go(bundle, "build")[0].files == (), "what is here already is not sent"


def test_a_link_here_is_not_followed(bundle: Path, there: There, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (bundle / "engines").mkdir()
    (bundle / "engines" / "a10").symlink_to(tmp_path / "outside")
    there.job(WRITES)
    assert "engines/a10 is a link, pipe, socket or device" in refused(bundle, "build", kind=BundleError)
    assert list((tmp_path / "outside").iterdir()) == []


def forged(*results: dict[str, Any], out: str = "{}", data: str = "", **more: Any) -> tuple[dict[str, Any], str]:
    listing = {"end": {"run": "1", "code": 0}, "out": len(out), "bundle": "/b", "results": results, **more}
    return json.loads(json.dumps(listing)), out + data


def result(name: str, content: str = "x", **more: Any) -> dict[str, Any]:
    return {"name": name, "size": len(content), "sha256": hashlib.sha256(content.encode()).hexdigest(), **more}


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (forged(result("../x"), data="x"), "what edgecomp never answers"),
        (forged(result("engines/../../x"), data="x"), "what edgecomp never answers"),
        (forged(result("/etc/x"), data="x"), "what edgecomp never answers"),
        (forged(result("engines/x\n"), data="x"), "what edgecomp never answers"),
        (forged(result("engines/.x"), data="x"), "what edgecomp never answers"),
        (forged(result("manifest.json"), data="x"), "what edgecomp never answers"),
        (forged(result("engines/x", size=-1)), "what edgecomp never answers"),
        (forged(result("engines/x", size=1 << 40)), "what edgecomp never answers"),
        (forged(result("engines/x", sha256="00")), "what edgecomp never answers"),
        (forged(*[result(f"engines/{k}") for k in range(5000)]), "what edgecomp never answers"),
        (forged(end=3), "what edgecomp never answers"),
        (forged(result("parity/x"), data="x"), "'parity/x', which is not below engines"),
        (
            forged(result("engines/x"), result("engines/x"), data="xx"),
            "'engines/x', which is not below engines, or coll",
        ),
        (
            forged(result("engines/x"), result("engines/X"), data="xx"),
            "'engines/X', which is not below engines, or coll",
        ),
        (forged(result("engines/x"), result("engines/x/y"), data="xx"), "'engines/x/y', which is not"),
        (forged(result("engines/x", size=1 << 33)), "8192 MiB of results and there are"),
        (forged(result("engines/x"), data="y"), "engines/x changed while it was copied (sha256 a1fce4363854"),
        (forged(result("engines/x")), "the connection ended with 1 bytes still to come"),
        (forged(out="no json"), "what edgecomp printed there is no JSON"),
        (({"error": "a\x1bb"}, ""), "a fault that this edgecomp does not know: a?b"),
        (({"error": "lost", "log": "/l"}, ""), "Its log is /l; run the same command"),
        (({"error": "busy", "owner": 3}, ""), "is in use: `?` runs there since ?"),
    ],
)
def test_a_foreign_answer_changes_nothing_here(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, answer: tuple[dict[str, Any], str], says: str
) -> None:
    before = names(bundle.parent)
    real = shutil.disk_usage(bundle)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=1 << 30))
    answers = {
        "hello": ({"root": "/r", "python": "3.11.0", "packages": {}, "free": 1 << 40, "there": {}}, ""),
        "put": ({"ok": True}, ""),
        "start": ({"state": "started", "group": 3, "since": "now", "job": "/j"}, ""),
        "collect": answer,
        "done": ({"ok": True}, ""),
    }

    @contextmanager
    def call(self: Connection, verb: str, request: dict[str, Any], data: Any = ()) -> Iterator[Reply]:
        fields, behind = answers[verb]
        yield Reply(self.place.host, fields, io.BytesIO(behind.encode()))

    monkeypatch.setattr(Connection, "call", call)
    monkeypatch.setattr(job, "make_wheel", made_wheel)
    kind = EdgecompError if "MiB of results" in says else RunError
    assert says in refused(bundle, "build", kind=kind)
    assert names(bundle.parent) == before


@pytest.mark.parametrize(
    "answer",
    [
        b"welcome\n" * 3,
        far.MARK,
        far.MARK + b"[1]\n",
        far.MARK + b'{"a": 1}',
        far.MARK + b"[" * 100_000 + b"\n",
        b"x" * 100_000 + far.MARK + b"{}\n",
    ],
)
def test_what_is_no_answer(bundle: Path, there: There, answer: bytes) -> None:
    there.plan(hello=[{"answer": answer.decode()}])
    assert "nano let us in and ran no program (exit code 0: it said nothing); see what" in refused(bundle)


def test_what_is_said_there_cannot_steer_the_terminal(bundle: Path, there: There) -> None:
    there.job("printf '\\033]0;title\\007a\\tb\\r\\n\\377\\n' >&2; echo {}")
    _, said = go(bundle)
    assert "nano: ?]0;title?a\tb" in said
    assert not [line for line in said if "\x1b" in line]


# -- the connection -----------------------------------------------------------------------------------------


def test_a_copy_goes_on_where_it_was_cut(bundle: Path, there: There) -> None:
    there.job("echo {}")
    there.plan(put=[{"cut_in": 800_000}, {"cut_in": 50_000}])
    _, said = go(bundle, pauses=(0.0, 0.0))
    assert sum("the connection ended too early (ssh said: client_loop: send disc" in line for line in said) == 2
    assert any(re.fullmatch(r"nano: copying 6 of 6 files, \d\.\d MiB", line) for line in said)
    assert sum("going on within the one that was begun" in line for line in said) >= 1
    total = sum(one.size for one in open_bundle(bundle).manifest.files) + len(make_wheel().content)
    assert sum(there.sent()) < total + 300_000, "what had arrived is not sent again, but for some buffers"
    assert not list((there.root / "files").glob("*.part"))


@pytest.mark.slow
def test_a_copy_that_never_ends_says_how_to_go_on(bundle: Path, there: There) -> None:
    there.job("echo {}")
    there.plan(put=[{"cut_in": 700_000}])
    text = refused(bundle)
    assert "what was copied is kept there. Run the same command again" in text
    kept = sum(file.stat().st_size for file in (there.root / "files").iterdir())
    assert kept > 300_000
    _, said = go(bundle)
    assert any("going on within" in line or "copying 1 of 6" in line for line in said)


def test_a_part_that_is_not_the_beginning_is_thrown_away(bundle: Path, there: There) -> None:
    there.job("echo {}")
    (weights,) = [one for one in open_bundle(bundle).manifest.files if one.role == "weights"]
    (there.root / "files").mkdir(parents=True)
    (there.root / "files" / f"{weights.sha256}.part").write_bytes(b"x" * 1000)
    _, said = go(bundle, pauses=(0.0,))
    assert any("what arrived of a file is not its content; trying again" in line for line in said)
    assert (there.root / "files" / weights.sha256).stat().st_size == weights.size


def test_a_bundle_that_changes_while_it_is_copied(bundle: Path, there: There, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgecomp.remote import session

    make = session.make_job

    def then_change(*words: Any) -> Any:
        job = make(*words)
        content = bytearray((bundle / "weights.data").read_bytes())
        content[99] ^= 1
        (bundle / "weights.data").write_bytes(content)
        return job

    monkeypatch.setattr(session, "make_job", then_change)
    assert "weights.data changed while it was copied" in refused(bundle, kind=BundleError)


SLOW = "echo first >&2; while ! [ -e $HOME/go ]; do sleep 0.02; done; echo second >&2; echo '{\"n\": 3}'; exit 1"


def test_a_job_outlives_its_connection(bundle: Path, there: There) -> None:
    """The connection is cut right behind the first line; the next attempt attaches, and says no line twice."""
    there.job(SLOW)
    there.plan(start=[{"cut_after": "first"}])
    run, said = go(bundle, pauses=(0.0,), touch=there.home / "go", on_line="trying again")
    assert (run.code, run.document) == (1, {"n": 3})
    assert [line for line in said if line.endswith(("first", "second"))] == ["nano: first", "nano: second"]
    assert there.calls().count("start") == 2
    assert len(list((there.root / "jobs").iterdir())) == 1


@pytest.mark.parametrize(
    ("cut_after", "ends_first"), [('"state"', False), ("first", True)], ids=["in_the_answer", "in_the_log"]
)
def test_the_same_command_finds_its_job(bundle: Path, there: There, ends_first: bool, cut_after: str) -> None:
    there.job(SLOW)
    there.plan(start=[{"cut_after": cut_after}])
    text = refused(bundle)
    assert "the connection ended too early" in text
    assert "Run the same command again: it goes on" in text
    assert ("the job does not need the connection" in text) == (cut_after == "first")
    if ends_first:
        (there.home / "go").touch()
        wait_for(lambda: any((there.root / "jobs").glob("*/end.json")))
    run, said = go(bundle, touch=there.home / "go", on_line="attaching")
    assert (run.code, run.document) == (1, {"n": 3})
    word = "has ended there; collecting what it left" if ends_first else "attaching to it"
    assert any(word in line for line in said), said
    assert said.count("nano: first") == said.count("nano: second") == 1
    _, said = go(bundle)
    assert any("running edgecomp parity" in line for line in said), "collected once, it runs anew"


@pytest.mark.parametrize("verb", ["collect", "done"])
def test_results_are_fetched_again(bundle: Path, there: There, verb: str) -> None:
    there.job(WRITES)
    there.plan(**{verb: [{"cut_after": far.MARK.decode()}]})
    run, _ = go(bundle, "build", pauses=(0.0,))
    assert run.files == ("engines/a10/m.engine", "engines/a10/m.json")
    assert there.calls().count(verb) == 2
    assert (bundle / "engines" / "a10" / "m.json").read_text(encoding="utf-8") == "record\n"


def test_ctrl_c_leaves_the_job_and_says_so(bundle: Path, there: There) -> None:
    there.job(SLOW)
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if line.endswith("first"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_there(bundle, "parity", [], on=ON, say=say, pauses_s=())
    assert "the job goes on there, and the same command attaches to it. To end it: ssh me@nano kill -- -" in said[-1]
    subprocess.run(["sh", "-c", said[-1].partition("ssh me@nano ")[2]], check=True)
    wait_for(lambda: any((there.root / "jobs").glob("*/end.json")))
    assert "signal 15 ended edgecomp there; run the same command again" in refused(bundle)


def test_a_job_that_vanished(bundle: Path, there: There) -> None:
    """Power goes: neither the job nor what watches over it wrote how it ended."""
    there.job("echo first >&2; kill -9 $PPID; kill -9 $$")
    assert "the job there ended without an exit code: power went, or it was killed. Its log is " in refused(bundle)
    there.job("echo {}")
    _, said = go(bundle)
    assert any("running edgecomp parity" in line for line in said)


def test_a_killed_job(bundle: Path, there: There) -> None:
    there.job("kill -9 $$")
    assert "nano: signal 9 ended edgecomp there, which often means that the memory ran out" in refused(bundle)


def test_two_commands_on_one_folder(bundle: Path, there: There) -> None:
    there.job(SLOW)
    found: list[Any] = []
    first = threading.Thread(target=lambda: found.append(go(bundle)))
    first.start()
    wait_for(lambda: any((there.root / "jobs").glob("*/request.json")))
    text = refused(bundle, "profile")
    assert "nano: ~/ec is in use: `edgecomp parity` runs there since 20" in text
    assert f"(process {far.read_json(there.root / 'busy')['pid']}); wait for it, or name another folder" in text
    run, said = go(bundle, touch=there.home / "go", on_line="attaching")
    first.join()
    assert any("attaching to it" in line for line in said)
    assert run.document == found[0][0].document == {"n": 3}
    assert len(list((there.root / "jobs").iterdir())) == 1


@pytest.mark.slow
def test_two_copies_at_once(bundle: Path, there: There) -> None:
    there.job("echo {}")
    found: list[str] = []

    def one(verb: str) -> None:
        try:
            found.append(str(go(bundle, verb)[0].document))
        except RunError as error:
            found.append(str(error))

    threads = [threading.Thread(target=one, args=(verb,)) for verb in ("parity", "profile")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "{}" in found
    assert all(text == "{}" or "is in use: `edgecomp p" in text for text in found), found
    for file in (there.root / "files").iterdir():
        assert hashlib.sha256(file.read_bytes()).hexdigest() == file.name


# -- the other machine --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ssh_says", "we_say"),
    [
        ("ssh: Could not resolve hostname nano: Name or service not known", "there is no host of this name"),
        ("ssh: connect to host nano port 22: Connection refused", "it cannot be reached; is it on"),
        ("ssh: connect to host nano port 22: No route to host", "it cannot be reached; is it on"),
        ("ssh: connect to host nano port 22: Connection timed out", "`ssh me@nano true` shows more"),
        ("me@nano: Permission denied (publickey,password).", "put yours there with ssh-copy-id me@nano"),
        ("No ED25519 host key is known for nano and you have requested strict checking.\nHost key verification failed.",
         "its host key is not known here; run `ssh me@nano true` once"),
        ("@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.",
         "its host key is not the one that known_hosts has"),
        ("/etc/ssh/ssh_config: line 3: Bad configuration option: x", "ssh itself refuses"),
        ("Connection closed by 10.0.0.7 port 22", "the connection ended too early (ssh said: Connection closed by"),
    ],
)  # fmt: skip
def test_ssh_cannot_come_in(bundle: Path, there: There, cli: Cli, ssh_says: str, we_say: str) -> None:
    there.plan(hello=[{"say": ssh_says}])
    said = cli("parity", bundle, "--on", ON)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("error: nano: ")
    assert we_say in said.err
    assert ssh_says.splitlines()[-1] in said.err
    assert there.calls() == ["hello"], "what never worked is not tried again"


def test_there_is_no_ssh(bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "--on needs the program `ssh`" in refused(bundle)


def test_no_login_shell(bundle: Path, there: There) -> None:
    there.plan(hello=[{"say": "This account is currently not available.", "code": 1}])
    assert "ran no program (exit code 1: This account is currently not available.)" in refused(bundle)


def test_a_login_shell_that_talks(bundle: Path, there: There) -> None:
    there.job("echo {}")
    there.plan(before="echo welcome; printf 'no line break'; ")
    assert go(bundle)[0].document == {}


def test_no_python_there(bundle: Path, there: There, tmp_path: Path) -> None:
    only_sh = tmp_path / "only_sh"
    only_sh.mkdir()
    (only_sh / "sh").symlink_to(shutil.which("sh") or "")
    there.plan(path=str(only_sh))
    text = refused(bundle)
    assert "nano: there is no python3 on PATH" in text
    assert "or make ~/ec/venv" in text
    assert not there.root.exists()


@pytest.mark.parametrize("prints", ["3.9.2", "2.7.18", ""])
def test_python_is_too_old_there(bundle: Path, there: There, prints: str) -> None:
    there.program(there.far_bin / "python3", f"echo {prints}; exit 1")
    text = refused(bundle)
    assert (
        f"{there.far_bin}/python3 is Python {prints or 'of no known version'}, and edgecomp needs 3.10 or newer" in text
    )
    assert "python3.10 -m venv --system-site-packages ~/ec/venv" in text
    if prints:
        return
    there.job("echo {}")
    assert go(bundle)[0].document == {}, "a venv in the folder is taken before"


def test_the_folder_cannot_be_made(bundle: Path, there: There) -> None:
    there.program(there.home / "file", "")
    assert f"nano: {there.home}/file/ec/files: Not a directory; name a folder" in refused(
        bundle, on="ssh://nano/~/file/ec"
    )
    if os.geteuid():
        (there.home / "mine").mkdir(mode=0o500)
        assert "Permission denied; name a folder" in refused(bundle, on="ssh://nano/~/mine/ec")


def test_the_disk_there_is_full(bundle: Path, there: There) -> None:
    there.plan(before="ulimit -f 200; ")
    text = refused(bundle)
    assert f"nano: the disk of {there.root} is full, or a quota is spent (File too large; " in text
    assert "free space there" in text
    assert list((there.root / "files").glob("*.part")) == [], "what cannot be used takes no room"


@pytest.mark.parametrize("size_kib", [64, 800])
def test_a_small_disk_there(bundle: Path, there: There, tiny_disk: Callable[[int], Path], size_kib: int) -> None:
    """Too small for what is to be copied, which is said before; and too small for what the job then unpacks."""
    disk = tiny_disk(size_kib if size_kib == 64 else 2000)
    text = refused(bundle, on=f"ssh://nano{disk}/ec")
    if size_kib == 64:
        assert " KiB are to be copied and " in text
        assert list((disk / "ec" / "files").iterdir()) == []
    else:
        assert f"nano: the disk of {disk}/ec is full" in text
        assert list((disk / "ec" / "app").iterdir()) == []


def test_packages_are_missing_there(bundle: Path, there: There) -> None:
    """A Python of its own without any package, and without pip: what is missing is named, and what can be done."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", there.root / "venv"], check=True)
    said: list[str] = []
    with pytest.raises(RunError) as caught:
        run_there(bundle, "parity", [], on=ON, say=said.append, pauses_s=())
    text = str(caught.value)
    assert "nano: edgecomp needs msgspec>=0.19, numpy>=1.23, packaging>=23" in text
    assert (
        f"put the wheels into {there.root}/wheels there; or install them by hand: {there.root}/venv/bin/python" in text
    )
    assert any("nano: installing into" in line and "msgspec>=0.19" in line for line in said)
    assert any("No module named pip" in line for line in said)


def test_packages_are_installed_from_wheels_that_lie_there(bundle: Path, there: There, tmp_path: Path) -> None:
    """No network is asked: the folder `wheels` comes first. The packages of this Python stand in for those of there."""
    there.job("echo {}")
    python = there.root / "venv" / "bin" / "python"
    stand_in = (
        'case "$1$2" in -mpip) echo "$@" > $HOME/pip; exit 0 ;;\n-c*importlib.metadata*) echo "{}"; exit 0 ;; esac\n'
    )
    python.write_text(
        python.read_text(encoding="utf-8").replace("#!/bin/sh\n", f"#!/bin/sh\n{stand_in}"), encoding="utf-8"
    )
    (there.root / "wheels").mkdir()
    assert go(bundle)[0].document == {}
    words = (there.home / "pip").read_text(encoding="utf-8").split()
    assert words[:3] == ["-m", "pip", "install"]
    assert {"--no-index", "--find-links", str(there.root / "wheels"), "msgspec>=0.19", "typer>=0.12"} <= set(words)
