"""What runs on the other machine beside the command line: it takes files in, starts a job, and hands out results.

The text of this file is sent with each call and run by the Python there (3.10 or newer, which a few lines of shell in
`ssh.py` have made sure of), so it imports the standard library alone and nothing of edgecomp. Each call reads one line
of JSON from stdin, behind which file contents may follow, and answers with a mark, one line of JSON, and what was asked
for. The folder there:

    files/<sha256>        what was copied, each verified; `.part` while it arrives
    app/<sha256>/         edgecomp, unpacked from its wheel
    venv/                 only where a package is missing, or where the user made one
    bundles/<key>/        a bundle: links to `files/`, and the results that verbs wrote below it
    jobs/<id>/            request.json, log, out, end.json; `collected` once the results were brought back
    busy                  locked while a job runs, by the job itself; says which
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
import zipfile
from pathlib import Path
from typing import IO, Any

MARK = b"edgecomp-far-1\n"
RESULT = re.compile(r"(engines|parity|profiles)(/[A-Za-z0-9][A-Za-z0-9._-]*){1,4}")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CHUNK = 1 << 18
VERSIONS = """
import importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


class Fault(Exception):
    """Something that the caller has to tell a person; `fields` become the answer."""

    def __init__(self, error: str, **fields: object) -> None:
        super().__init__(error)
        self.fields = {"error": error, **fields}


def main() -> None:
    """Answer one call: `far.py VERB FOLDER`, the request on stdin."""
    verb, folder = sys.argv[1:3]
    root = Path(folder)
    try:
        request = json.loads(sys.stdin.buffer.readline())
        {"hello": hello, "put": put, "start": start, "collect": collect, "done": done}[verb](root, request)
    except Fault as fault:
        answer(fault.fields)
    except BrokenPipeError:
        os._exit(1)  # the caller is gone
    except OSError as error:
        text = {"text": error.strerror or str(error), "path": str(error.filename or root)}
        answer({"error": "full" if error.errno in FULL else "os", "free": free_bytes(root), **text})


def answer(fields: dict[str, Any]) -> None:
    """Write the mark and the answer; the mark tells it from what a login shell may print."""
    sys.stdout.buffer.write(MARK + json.dumps(fields).encode() + b"\n")
    sys.stdout.buffer.flush()


# -- files --------------------------------------------------------------------------------------------------


def hello(root: Path, request: dict[str, Any]) -> None:
    """Say what is there: the Python, the room, the packages, and how much of each file that is asked for."""
    for name in ("files", "app", "bundles", "jobs"):
        (root / name).mkdir(parents=True, exist_ok=True)
    trial = root / f".trial-{os.getpid()}"
    trial.write_bytes(b"")
    trial.unlink()
    python = job_python(root)
    words = [python, "-c", VERSIONS, *request["packages"]]
    done = subprocess.run(words, cwd=root, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode:
        raise Fault("python", path=python, text=last_line(done.stderr))
    found = ((one["sha256"], bytes_there(root, one["sha256"], one["size"])) for one in request["files"])
    there = {sha256: count for sha256, count in found if count >= 0}
    answer(
        {
            "root": str(root.resolve()),
            "python": "{}.{}.{}".format(*sys.version_info),
            "packages": json.loads(done.stdout),
            "free": free_bytes(root),
            "there": there,
        }
    )


def bytes_there(root: Path, sha256: str, size: int) -> int:
    """Return how many bytes of a file are there, -1 for none; all of them only where its hash is right."""
    whole, part = root / "files" / sha256, root / "files" / f"{sha256}.part"
    if whole.is_file():
        if whole.stat().st_size == size and hash_of(whole) == sha256:
            return size
        whole.unlink()  # a broken disk, or power that went at the wrong moment
    return min(part.stat().st_size, size - 1) if part.is_file() else -1


def put(root: Path, request: dict[str, Any]) -> None:
    """Take files in, each from an offset on.

    Two callers may send the same file at once, for example a new one and one whose connection died unnoticed: both
    write the same bytes at the same places, nothing is cut off, and the hash decides.
    """
    source: Any = sys.stdin.buffer
    for entry in request["files"]:
        sha256, size, at = entry["sha256"], entry["size"], entry["offset"]
        whole, part = root / "files" / sha256, root / "files" / f"{sha256}.part"
        try:
            with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+b") as file:
                file.seek(at)
                while at < size:
                    chunk = source.read1(min(size - at, CHUNK))  # what there is, so that little is lost with it
                    if not chunk:
                        raise Fault("short", sha256=sha256)
                    file.write(chunk)
                    file.flush()
                    at += len(chunk)
                os.fsync(file.fileno())
        except OSError as error:
            if error.errno in FULL:
                part.unlink(missing_ok=True)  # the board needs the room more than we need the beginning
            raise
        if part.is_file() and hash_of(part) == sha256:
            os.replace(part, whole)
        elif not whole.is_file():
            part.unlink(missing_ok=True)
            raise Fault("altered", sha256=sha256)
    answer({"ok": True})


# -- jobs ---------------------------------------------------------------------------------------------------


def start(root: Path, request: dict[str, Any]) -> None:
    """Start a job, or find the one that is the same; answer what was found, and send its log until it ends."""
    job = root / "jobs" / request["job"]
    for pause in (*[0.05] * 30, 0):
        lock, owner = take_lock(root), read_json(root / "busy")
        if lock is not None or owner.get("job") == request["job"]:
            break
        time.sleep(pause)  # it may be about to say which it is, or to let go
    else:
        raise Fault("busy", owner=owner)
    if lock is None:
        state = "running"
    elif (job / "end.json").is_file() and (request["resume"] or not (job / "collected").exists()):
        state = "finished"
        os.close(lock)
    elif request["resume"]:
        raise Fault("lost", log=str(job / "log"))
    else:
        state = "started"
        shutil.rmtree(job, ignore_errors=True)
        job.mkdir()
        (job / "log").write_bytes(b"")
        supervise_detached(root, job, request, lock)
        os.close(lock)
    owner = read_json(job / "request.json")
    answer({"state": state, "group": owner.get("group", 0), "since": owner.get("since", ""), "job": str(job)})
    send_log(job, owner.get("pid", 0), request["offset"])


def take_lock(root: Path) -> int | None:
    """Return a descriptor that holds the lock of the folder, or None where a job holds it."""
    descriptor = os.open(root / "busy", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    os.ftruncate(descriptor, 0)  # nobody may take the owner before for this one
    return descriptor


def supervise_detached(root: Path, job: Path, request: dict[str, Any], lock: int) -> None:
    """Leave a process behind that runs the job in a session of its own, so that no lost connection ends it.

    It and the job hold the lock: the folder is busy as long as one of them lives, whatever happened to the other.
    """
    ready, ready_end = os.pipe()
    if child := os.fork():
        os.close(ready_end)
        os.read(ready, 1)  # until request.json is written, or the process died
        os.close(ready)
        os.waitpid(child, 0)
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    try:
        os.close(ready)
        log = os.open(job / "log", os.O_WRONLY | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, standard in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, standard)
        for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(one, lambda *_: None)  # the job is told; this process stays to write down how it ended
        owner = {
            "job": request["job"],
            "pid": os.getpid(),
            "group": os.getpgrp(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "command": " ".join(["edgecomp", request["verb"]]),
            "by": request["by"],
        }
        write_json(job / "request.json", owner)
        os.pwrite(lock, json.dumps(owner).encode(), 0)
        os.close(ready_end)
        write_json(job / "end.json", supervise(root, job, request, lock))
    except BaseException:  # noqa: BLE001 - the log is the only place left to say it
        traceback.print_exc()
    finally:
        os._exit(0)


def supervise(root: Path, job: Path, request: dict[str, Any], lock: int) -> dict[str, Any]:
    """Run the job and return how it ended."""
    begun = time.monotonic()
    end: dict[str, Any] = {"run": os.urandom(8).hex()}
    try:
        app, bundle = unpack_app(root, request["wheel"]), link_bundle(root, request)
        install(root, request["install"])
        words = [request["verb"], *take_attached(root, job, request["words"]), "--json", "--", str(bundle)]
        command = ["env", f"PYTHONPATH={app}", "EDGECOMP_PROGRESS=lines", job_python(root), "-m", "edgecomp", *words]
        with (job / "out").open("wb") as out:
            process = subprocess.Popen(command, cwd=job, stdin=subprocess.DEVNULL, stdout=out, pass_fds=(lock,))
            end["code"] = process.wait()
    except Fault as fault:
        end |= fault.fields
    except (OSError, zipfile.BadZipFile) as error:
        end |= {"error": "full" if getattr(error, "errno", 0) in FULL else "os", "text": str(error), "path": str(root)}
        end["free"] = free_bytes(root)
    end["seconds"] = round(time.monotonic() - begun, 3)
    return end


def send_log(job: Path, pid: int, offset: int) -> None:
    """Send the log from `offset` on, as it grows, until the job has ended."""
    with (job / "log").open("rb") as log:
        log.seek(offset)
        while True:
            ended = (job / "end.json").is_file() or not is_alive(pid)  # before the last look at the log
            while chunk := log.read(CHUNK):
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
            if ended:
                return
            time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Say whether a process is there."""
    if not pid:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


# -- what a job needs ---------------------------------------------------------------------------------------


def unpack_app(root: Path, wheel: str) -> Path:
    """Return the folder with this edgecomp, unpacked once."""
    app = root / "app" / wheel[:16]
    if not app.is_dir():
        beside = root / "app" / f".{wheel[:16]}-{os.getpid()}"
        try:
            with zipfile.ZipFile(root / "files" / wheel) as archive:
                archive.extractall(beside)  # our own wheel, whose hash was checked when it arrived
            os.replace(beside, app)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return app


def link_bundle(root: Path, request: dict[str, Any]) -> Path:
    """Return the bundle's folder, with each file at its place; what verbs wrote below it stays."""
    bundle = root / "bundles" / str(request["bundle"])
    bundle.mkdir(exist_ok=True)
    for name, sha256 in request["files"].items():
        whole, place = root / "files" / sha256, bundle / name
        if place.exists() and (whole.samefile(place) or hash_of(place) == sha256):
            continue
        beside = bundle.parent / f".{bundle.name}-{os.getpid()}"
        try:
            os.link(whole, beside)
        except OSError:
            shutil.copyfile(whole, beside)  # a file system without links
        os.replace(beside, place)
    return bundle


def take_attached(root: Path, job: Path, words: list[Any]) -> list[str]:
    """Return the words; one that stands for a copied file becomes `--option=path`, the file bearing its own name."""
    taken = []
    for word in words:
        if isinstance(word, dict):
            path = job / "in" / word["name"]
            path.parent.mkdir(exist_ok=True)
            shutil.copyfile(root / "files" / word["sha256"], path)
            word = f"{word['option']}={path}"
        taken.append(word)
    return taken


def job_python(root: Path) -> str:
    """Return the Python that runs jobs: the one of `venv` where there is one."""
    own = root / "venv" / "bin" / "python"
    return str(own) if os.access(own, os.X_OK) else sys.executable


def install(root: Path, missing: list[str]) -> None:
    """Install packages into `venv`, which sees those of the system; wheels in `wheels/` come before the network."""
    if not missing:
        return
    python = root / "venv" / "bin" / "python"
    say(f"installing into {root / 'venv'}: {', '.join(missing)}")
    if not os.access(python, os.X_OK):
        make = [sys.executable, "-m", "venv", "--system-site-packages", str(root / "venv")]
        if subprocess.run(make, stdout=2, check=False).returncode:
            subprocess.run([*make, "--without-pip"], stdout=2, check=False)  # Debian's without python3-venv
    pip = [str(python), "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--quiet"]
    found = ["--find-links", str(root / "wheels")] if (root / "wheels").is_dir() else []
    ways = [[*pip, "--no-index", *found], [*pip, "--retries", "1", "--timeout", "15", *found]]
    for way in ways[0 if found else 1 :]:
        try:
            if subprocess.run([*way, *missing], stdout=2, check=False).returncode == 0:
                return
        except FileNotFoundError:
            break
    raise Fault("packages", missing=missing, python=str(python), wheels=str(root / "wheels"))


def say(line: str) -> None:
    """Write a line to the job's log."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


# -- results ------------------------------------------------------------------------------------------------


def collect(root: Path, request: dict[str, Any]) -> None:
    """Send how a job ended, what it wrote to stdout, and the results that the caller does not have."""
    job = root / "jobs" / request["job"]
    if not (job / "end.json").is_file():
        raise Fault("lost", log=str(job / "log"))
    out = job / "out"
    size = out.stat().st_size if out.is_file() else 0
    bundle = root / "bundles" / str(request["bundle"])
    results: list[dict[str, Any]] = []
    for path in sorted(one for folder in request["folders"] for one in result_files(bundle / folder)):
        name = path.relative_to(bundle).as_posix()
        if RESULT.fullmatch(name):
            entry = {"name": name, "size": path.stat().st_size, "sha256": hash_of(path)}
            if request["have"].get(name) != entry["sha256"]:
                results.append(entry)
    answer({"end": read_json(job / "end.json"), "out": size, "bundle": str(bundle), "results": results})
    for path, length in ((out, size), *((bundle / entry["name"], entry["size"]) for entry in results)):
        if length:
            with path.open("rb") as file:
                send(file, length)
    sys.stdout.buffer.flush()


def result_files(folder: Path) -> list[Path]:
    """Return the plain files below a folder; no link is followed."""
    found = []
    for at, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(at) / name for name in names if not name.startswith("."))
        found += [path for path in paths if path.is_file() and not path.is_symlink()]
    return found


def send(file: IO[bytes], length: int) -> None:
    """Send so many bytes of a file."""
    while length:
        chunk = file.read(min(length, CHUNK))
        if not chunk:
            return  # it became shorter; the caller sees that bytes are missing
        sys.stdout.buffer.write(chunk)
        length -= len(chunk)


def done(root: Path, request: dict[str, Any]) -> None:
    """Note that the results of a run were brought back, so that the same command runs anew."""
    job = root / "jobs" / request["job"]
    if read_json(job / "end.json").get("run") == request["run"]:
        (job / "collected").write_bytes(b"")
    answer({"ok": True})


# -- small things -------------------------------------------------------------------------------------------


def hash_of(path: Path) -> str:
    """Return a file's sha256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def free_bytes(root: Path) -> int:
    """Return the room on the disk of a folder; 0 where it cannot be told."""
    try:
        found = os.statvfs(root)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file's fields; none where there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, fields: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    beside = path.with_name(f".{path.name}-{os.getpid()}")
    with beside.open("w", encoding="utf-8") as file:
        json.dump(fields, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def last_line(text: bytes) -> str:
    """Return what a program said last."""
    return (text.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]


if __name__ == "__main__":
    main()
