"""Killed at any moment, two at once, no space, no right to write, and a clock that goes back: the old state or the new.

The random kills are reproducible: `KILLS` of them, seeded, spread over the verbs. A kill is before one of the file
operations of a verb (opened for writing, renamed, removed, made, flushed, exchanged), or within a file, at any byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from made_result import made_result
from PIL import Image

from edgecomp import api
from edgecomp import lock as module
from edgecomp.api import _verify
from edgecomp.bundle import MANIFEST, open_bundle
from edgecomp.engines import installed_flavours
from edgecomp.engines.record import read_record
from edgecomp.errors import BundleBusy, EdgecompError
from edgecomp.lock import Owner, bundle_lock, lock_path
from edgecomp.specs.origin import file_sha256

Cli = Callable[..., Any]
Edit = Callable[[Path, Callable[[dict[str, Any]], object]], None]

SHARES = {"export": 20, "bundle pack": 20, "bundle unpack": 20, "calibrate": 15, "verify": 15, "build": 10}
KILLS = sum(SHARES.values())  # 100


def contents(folder: Path) -> dict[str, str]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


# -- killed -----------------------------------------------------------------------------------------------------

HARNESS = """
    import os, resource, signal, sys

    kill_at, place, prelude = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    sys.argv = ["edgecomp", *sys.argv[4:]]
    count = 0

    def step():
        global count
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def is_ours(path):
        return isinstance(path, (str, bytes, os.PathLike)) and os.path.abspath(os.fsdecode(path)).startswith(place)

    def hook(event, words):
        if event == "open" and words[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and is_ours(words[0]):
            step()
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate") and is_ours(words[0]):
            step()
        elif event == "ctypes.dlsym" and words[1] == "renameat2":
            step()

    def sync(descriptor, real=os.fsync):
        step()
        real(descriptor)
        step()

    os.fsync = sync
    if kill_at < 0:  # at a byte, not at an operation: the kernel kills who writes beyond
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (-kill_at, -kill_at))
    exec(prelude)
    sys.addaudithook(hook)
    from edgecomp.cli import main
    try:
        main()
    finally:
        sys.stderr.write(f"\\n{count}")
"""
NO_PROFILE = (
    "from edgecomp.api import _verify; from types import SimpleNamespace; "
    "_verify.profile = lambda *words, **more: SimpleNamespace(profiles=())"
)


class Verb(NamedTuple):
    """A command that is killed, and what must hold after it, wherever it was killed: returns whether it was done."""

    words: list[str]
    check: Callable[[], bool]
    prelude: str = ""
    largest: int = 1 << 20  # bytes of its largest file


def run_verb(verb: Verb, place: Path, kill_at: int) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", textwrap.dedent(HARNESS), str(kill_at), str(place), verb.prelude, *verb.words]
    environment = {**os.environ, "EDGECOMP_CACHE_DIR": str(place / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, capture_output=True, text=True, env=environment, check=False, timeout=600)


def count_of(verb: Verb, place: Path) -> int:
    """How many operations the verb does when nothing happens to it."""
    done = run_verb(verb, place, 0)
    assert done.returncode == 0, done.stderr
    assert verb.check()
    return int(done.stderr.splitlines()[-1])


def kill(verb: Verb, place: Path, kill_at: int) -> bool:
    """Kill a verb; return whether the new state is there. It is the old or the new one, or `check` fails."""
    done = run_verb(verb, place, kill_at)
    killed = (-signal.SIGKILL, -signal.SIGXFSZ)
    assert done.returncode in killed or (kill_at < 0 and done.returncode == 0), done.stderr
    return verb.check()


def finish(verb: Verb, place: Path) -> None:
    """Run the verb once more: it succeeds, says whose lock it found, and leaves nothing of the dead one."""
    done = run_verb(verb, place, 0)
    assert done.returncode == 0, done.stderr
    assert verb.check()
    hidden = [path.name for path in place.iterdir() if path.name.startswith(".")]
    assert hidden == [], done.stderr


def pack_verb(bundle: Path, place: Path) -> Verb:
    out = place / "x.zip"
    out.write_bytes(b"the old one")
    new = api.pack(bundle, out=place / "new.zip").sha256
    old = file_sha256(out)

    def check() -> bool:
        seen = file_sha256(out)
        assert seen in (old, new)
        return seen == new

    words = ["bundle", "pack", str(bundle), "--out", str(out), "--force"]
    return Verb(words, check, largest=out.stat().st_size)


def unpack_verb(archive: Path, bundle: Path, place: Path) -> Verb:
    out, whole = place / "out", contents(bundle)

    def check() -> bool:
        if not out.exists():
            return False
        assert contents(out / "bundle") == whole
        assert (out / "README.md").is_file()
        shutil.rmtree(out)  # for the next
        return True

    return Verb(["bundle", "unpack", str(archive), "--out", str(out)], check)


def verify_verb(bundle: Path, prelude: str = NO_PROFILE) -> Verb:
    before = contents(bundle)

    def check() -> bool:
        assert contents(bundle) == before
        states = list((bundle.parent / "cache" / "verify").glob("[!.]*.json"))
        for state in states:
            assert json.loads(state.read_bytes())  # whole
        return bool(states)

    return Verb(["verify", str(bundle), "--threads", "1", "--fresh", "--duration", "0.02"], check, prelude)


@pytest.mark.parametrize("share", [0.3, 0.75, 1.0])
def test_killed_pack(bundle: Path, tmp_path: Path, share: float) -> None:
    verb = pack_verb(bundle, tmp_path)
    assert not kill(verb, tmp_path, max(1, int(share * 7)))
    if share == 1.0:
        (tmp_path / "x.zip").write_bytes(b"the old one")
        finish(verb, tmp_path)


@pytest.mark.parametrize("kill_at", [4, 12, -70_000])
def test_killed_unpack(bundle: Path, tmp_path: Path, kill_at: int) -> None:
    packed = api.pack(bundle, out=tmp_path / "packed.zip").path
    verb = unpack_verb(packed, bundle, tmp_path)
    assert not kill(verb, tmp_path, kill_at)
    if kill_at == 12:
        assert [path.name for path in tmp_path.glob(".out.*.tmp")]  # what it had half written
        finish(verb, tmp_path)


def test_killed_verify(bundle: Path, tmp_path: Path) -> None:
    verb = verify_verb(bundle)
    assert not kill(verb, tmp_path, 3)
    finish(verb, tmp_path)


def test_killed_while_the_manifest_is_replaced(bundle: Path, tmp_path: Path) -> None:
    """What `calibrate` does at its end."""
    old, new = (bundle / MANIFEST).read_bytes(), ("the new one",)
    prelude = (
        "from pathlib import Path; import msgspec; from edgecomp import cli, bundle; "
        f"found = bundle.open_bundle(Path({str(bundle)!r})); "
        f"cli.main = lambda: bundle.replace_manifest(found, msgspec.structs.replace(found.manifest, notes={new!r}))"
    )

    def check() -> bool:
        seen = open_bundle(bundle).manifest.notes
        is_old = (bundle / MANIFEST).read_bytes() == old
        assert is_old != (seen == new)
        return not is_old

    verb = Verb([], check, prelude)
    seen = [kill(verb, tmp_path, at) for at in (1, 3, 5)]
    assert seen == [False, False, True]  # before it is written, before it is renamed, before the folder is flushed


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a router that has thresholds; not to be written to."""
    pytest.importorskip("torch")
    out = tmp_path_factory.mktemp("routed") / "bundle"
    return api.export("lookupvit", preset="smoke", router="difficulty", out=out).bundle


@pytest.fixture
def pngs(tmp_path: Path) -> Path:
    folder, draw = tmp_path / "pngs", np.random.default_rng(0)
    folder.mkdir()
    for index in range(4):
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


def export_verb(bundle: Path) -> Verb:
    old = contents(bundle)

    def check() -> bool:
        seed = open_bundle(bundle).manifest.seed
        assert seed == 1 or contents(bundle) == old
        return seed == 1

    words = ["export", "--method", "lookupvit", "--preset", "smoke", "--seed", "1", "--out", str(bundle), "--force"]
    return Verb(words, check)


def calibrate_verb(bundle: Path, pngs: Path) -> Verb:
    old = (bundle / MANIFEST).read_bytes()
    rest = {name: digest for name, digest in contents(bundle).items() if name != MANIFEST}

    def check() -> bool:
        made = open_bundle(bundle).manifest
        assert made.router is not None
        assert {name: digest for name, digest in contents(bundle).items() if name != MANIFEST} == rest
        assert made.router.calibration is not None or (bundle / MANIFEST).read_bytes() == old
        return made.router.calibration is not None

    return Verb(["calibrate", str(bundle), "--data", str(pngs), "--mean-tokens", "6", "--threads", "1"], check)


def build_verb(bundle: Path) -> Verb:
    whole = {name: digest for name, digest in contents(bundle).items() if "/" not in name}

    def check() -> bool:
        assert {name: digest for name, digest in contents(bundle).items() if "/" not in name} == whole
        records = list((bundle / "engines").rglob("[!.]*.json"))
        for record in records:  # a plan without a record may be left, never a record of another plan
            plan = record.with_suffix(".engine")
            assert read_record(plan).sha256 == file_sha256(plan)
        return len(records) == 2

    return Verb(["build", str(bundle), "--target", "a10", "--runtime", "rtx", "--force"], check)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kills"), SHARES.items(), ids=SHARES)
def test_random_kills(
    name: str,
    kills: int,
    pngs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    """`KILLS` in all; the counts are printed."""
    if name == "build" and "rtx" not in installed_flavours():
        pytest.skip("TensorRT for RTX is not installed, so nothing can be built")
    source: Path = request.getfixturevalue("routed" if name == "calibrate" else "exported")
    draw, operations, after = random.Random(name), 0, {"old": 0, "new": 0}
    for turn in range(-1, kills):  # the first is not killed, but counted
        place = tmp_path / f"turn{turn}"
        place.mkdir()
        bundle = shutil.copytree(source, place / "bundle")
        if name == "export":
            verb = export_verb(bundle)
        elif name == "bundle pack":
            verb = pack_verb(bundle, place)
        elif name == "bundle unpack":
            verb = unpack_verb(api.pack(bundle, out=place / "packed.zip").path, bundle, place)
        elif name == "calibrate":
            verb = calibrate_verb(bundle, pngs)
        elif name == "verify":
            verb = verify_verb(bundle)
        else:
            verb = build_verb(bundle)
        if turn < 0:
            operations = count_of(verb, place)
        else:
            in_a_file = draw.random() < 0.3
            kill_at = -draw.randrange(1, 150_000) if in_a_file else draw.randint(1, operations)
            after["new" if kill(verb, place, kill_at) else "old"] += 1
            if turn % 5 == 0:
                finish(verb, place)
        shutil.rmtree(place)
    with capsys.disabled():
        said = f"{name}: {kills} kills among {operations} operations: {after['old']} old, {after['new']} new"
        sys.stdout.write(f"\n{said}\n")
    assert after["old"] > 0


# -- two at once ------------------------------------------------------------------------------------------------

HOLDER = """
    import sys
    from pathlib import Path
    from edgecomp.lock import bundle_lock
    with bundle_lock(Path(sys.argv[1]), "calibrate"):
        print("held", flush=True)
        sys.stdin.read()
"""


@contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of a folder."""
    words = [sys.executable, "-c", textwrap.dedent(HOLDER), str(folder)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        yield holder
        holder.kill()


def test_second_process_is_turned_away_by_name(bundle: Path, tmp_path: Path, cli: Cli) -> None:
    packed = api.pack(bundle, out=tmp_path / "packed.zip").path
    export = ["export", "--method", "lookupvit", "--preset", "smoke", "--seed", 3, "--out", bundle, "--force"]
    before = contents(bundle)
    with held(bundle) as holder:
        owner = json.loads(lock_path(bundle).read_bytes())
        assert (owner["pid"], owner["verb"], owner["host"]) == (holder.pid, "calibrate", socket.gethostname())
        for words in (
            ["bundle", "pack", bundle, "--out", tmp_path / "x.zip"],
            ["bundle", "unpack", packed, "--out", bundle],
            ["verify", bundle],
            ["calibrate", bundle, "--data", tmp_path, "--mean-tokens", "5"],
            export,
        ):
            said = cli(*words)
            assert (said.code, said.out) == (2, ""), words
            assert f"{bundle} is in use by `edgecomp calibrate`, process {holder.pid} on " in said.err
            assert "wait for its end, or choose another folder" in said.err
        assert api.inspect(bundle)  # who reads needs no lock
        assert contents(bundle) == before
    assert not (tmp_path / "x.zip").exists()


def test_lock_of_a_dead_process_is_taken_over(bundle: Path, tmp_path: Path, cli: Cli) -> None:
    with held(bundle) as holder:
        half = tmp_path / f".bundle.{holder.pid}-0a1b.tmp"
        half.mkdir()
        (half / "weights.data").write_bytes(b"half")
        other = tmp_path / ".bundle.1-0a1b.tmp"  # of another process
        other.mkdir()
        (tmp_path / f".bundle.{holder.pid}-0a1b.json").write_text("half")
    assert lock_path(bundle).exists()
    said = cli("bundle", "pack", bundle, "--out", tmp_path / "x.zip")
    assert said.code == 0
    assert f"note: took over the lock of `edgecomp calibrate`, process {holder.pid} on " in said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == [".bundle.1-0a1b.tmp", "bundle", "x.zip"]


def test_bundle_that_was_moved_aside_comes_back(bundle: Path, tmp_path: Path) -> None:
    """On file systems that cannot exchange two folders, a kill between two renames leaves nothing at the place."""
    before, said = contents(bundle), []
    with held(bundle) as holder:
        aside = tmp_path / f".bundle.{holder.pid}.old"
        bundle.rename(aside)
    with bundle_lock(bundle, "export", say=said.append):
        assert contents(bundle) == before
    assert f"note: {bundle} was put back from {aside.name}" in said
    assert not aside.exists()


def write_owner(folder: Path, **fields: Any) -> None:
    owner = {"pid": os.getpid(), "thread": 1, "host": socket.gethostname(), "verb": "build", "since": "x", **fields}
    lock_path(folder).write_text(json.dumps(owner))


def test_another_host_is_believed(bundle: Path) -> None:
    write_owner(bundle, host="board-7")
    with pytest.raises(BundleBusy) as caught, bundle_lock(bundle, "verify"):
        raise AssertionError
    assert "is in use by `edgecomp build`, process" in str(caught.value)
    assert "on board-7" in str(caught.value)
    assert f"remove {lock_path(bundle)}" in str(caught.value)


@pytest.mark.parametrize("since", ["1970-01-01T00:00:00+00:00", "2999-01-01T00:00:00+00:00"])
@pytest.mark.parametrize("moment", [0, 4_000_000_000])
def test_neither_clock_nor_process_number_decides(bundle: Path, since: str, moment: int) -> None:
    write_owner(bundle, pid=os.getppid(), since=since)  # a number that lives, of a process that holds nothing
    os.utime(lock_path(bundle), (moment, moment))
    said: list[str] = []
    with bundle_lock(bundle, "verify", say=said.append):
        assert json.loads(lock_path(bundle).read_bytes())["verb"] == "verify"
    assert f"process {os.getppid()} on" in said[0]
    assert not lock_path(bundle).exists()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_lock_file_that_says_nothing(bundle: Path, content: bytes) -> None:
    lock_path(bundle).write_bytes(content)
    with bundle_lock(bundle, "verify"):
        assert json.loads(lock_path(bundle).read_bytes())["pid"] == os.getpid()


def test_verb_within_a_verb_and_thread_beside_a_thread(bundle: Path) -> None:
    refused: list[BaseException] = []

    def other() -> None:
        try:
            with bundle_lock(bundle, "export"):
                raise AssertionError
        except BundleBusy as error:
            refused.append(error)

    with bundle_lock(bundle, "verify"):
        with bundle_lock(bundle, "build"):
            assert json.loads(lock_path(bundle).read_bytes())["verb"] == "verify"
        assert lock_path(bundle).exists()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "is in use by `edgecomp verify`" in str(refused[0])
    assert not lock_path(bundle).exists()


def test_never_two(bundle: Path) -> None:
    """Eight threads, of which some end without a word, as if they had been killed."""
    inside, most, turns = [0], [0], [0]

    def work(seed: int) -> None:
        draw, done = random.Random(seed), 0
        while done < 25:
            try:
                with bundle_lock(bundle, "export"):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    time.sleep(draw.random() / 5000)
                    turns[0] += 1
                    inside[0] -= 1
                done += 1
            except BundleBusy:
                time.sleep(draw.random() / 2000)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most[0], turns[0]) == (1, 200)


def test_link_in_the_place_of_a_lock(bundle: Path, tmp_path: Path) -> None:
    dear = tmp_path / "dear"
    dear.write_text("to somebody")
    lock_path(bundle).symlink_to(dear)
    said: list[str] = []
    with bundle_lock(bundle, "verify", say=said.append):
        pass
    assert dear.read_text() == "to somebody"
    assert "is used without a lock" in said[0]


@pytest.mark.parametrize("name", ["a*b", "a[0]", "a?b", "ü b"])
def test_names_that_are_patterns(tmp_path: Path, name: str) -> None:
    dead = Owner(4_000_000, 1, socket.gethostname(), "export", "x")
    write_owner(tmp_path / name, pid=dead.pid)
    for left in (f".{name}.{dead.pid}-1.tmp", f".axb.{dead.pid}-1.tmp", f".a0.{dead.pid}-1.tmp"):
        (tmp_path / left).mkdir()
    with bundle_lock(tmp_path / name, "export"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".a0.{dead.pid}-1.tmp", f".axb.{dead.pid}-1.tmp"]


def test_lock_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    with bundle_lock(tmp_path / "a" / "b" / "new", "export"):
        assert (tmp_path / "a" / "b" / ".new.lock").is_file()
    assert list(tmp_path.iterdir()) == []


# -- no space, no right to write -----------------------------------------------------------------------------------


def hold_to_reading(bundle: Path, packed: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    """What reads works in a folder that cannot be written to; what writes says so, and changes nothing."""
    monkeypatch.setattr(_verify, "profile", lambda *words, **more: made_result())
    monkeypatch.setattr(_verify, "local_gpu_sm", lambda: None)
    before, said = contents(folder), []
    report = api.verify(bundle, threads=1, progress=said.append)
    assert report, report.stages
    assert [line for line in said if line.startswith(f"note: {bundle} is used without a lock")]
    assert api.run(bundle, threads=1)
    with pytest.raises(EdgecompError, match=rf"x\.zip could not be written: {why}"):
        api.pack(bundle, out=folder / "x.zip")
    with pytest.raises(EdgecompError, match=f"(could not be written: {why}|cannot be written to)"):
        api.unpack(packed, out=folder / "out")
    found = open_bundle(bundle)
    from edgecomp.bundle import replace_manifest

    with pytest.raises(EdgecompError, match=f"{MANIFEST} could not be written: {why}; nothing was changed"):
        replace_manifest(found, found.manifest)
    assert contents(folder) == before


def test_read_only_file_system(
    exported: Path, tiny_disk: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGECOMP_CACHE_DIR", str(tmp_path / "cache"))
    disk = tiny_disk(4000)
    bundle = shutil.copytree(exported, disk / "bundle")
    packed = api.pack(bundle, out=disk / "packed.zip").path
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    hold_to_reading(bundle, packed, disk, monkeypatch, "Read-only file system")


@contextmanager
def without_rights() -> Iterator[None]:
    """Be nobody for a while: root may write everywhere, whatever a folder's mode says."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_folder_without_the_right_to_write(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path(api.__file__).resolve()
    if closed := [above for above in here.parents if not above.stat().st_mode & stat.S_IXOTH]:
        pytest.skip(f"{closed[0]} lets root alone in, and edgecomp lies in it: nobody could read its files")
    place = Path(tempfile.mkdtemp(prefix="edgecomp-rights-"))  # pytest's own folders let nobody in
    try:
        monkeypatch.setenv("EDGECOMP_CACHE_DIR", str(place / "cache"))
        folder = place / "folder"
        bundle = shutil.copytree(exported, folder / "bundle")
        packed = api.pack(bundle, out=folder / "packed.zip").path
        assert api.parity(bundle, threads=1)  # whatever is imported late, while there are rights to
        (place / "cache").mkdir()
        (place / "cache").chmod(0o777)
        for path in (place, folder, bundle):
            path.chmod(0o555)
        with without_rights():
            hold_to_reading(bundle, packed, folder, monkeypatch, "Permission denied")
    finally:
        for path in (place, place / "folder", place / "folder" / "bundle"):
            path.chmod(0o755)
        shutil.rmtree(place)


def test_lock_on_a_full_disk(tiny_disk: Callable[[int], Path]) -> None:
    disk = tiny_disk(16)
    (disk / "bundle").mkdir()
    with pytest.raises(OSError, match="No space left"):
        (disk / "filler").write_bytes(bytes(1 << 20))
    other = Owner(1, 1, "h", "v", "x")
    with bundle_lock(disk / "bundle", "export"), pytest.raises(BundleBusy, match="does not say who it is"):
        module._take(lock_path(disk / "bundle"), disk / "bundle", other, str)
    assert not lock_path(disk / "bundle").exists()
