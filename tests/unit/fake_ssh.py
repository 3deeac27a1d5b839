"""A stand-in for `ssh`, for tests of what happens when a connection breaks or the other machine is odd.

It runs the command on this machine, in a shell of its own with its own PATH and HOME, and looks into `plan.json` beside
it for what is to go wrong with each call (`hello`, `put`, `start`, `collect`, `done`): one entry is used up by a call.

    {"say": TEXT, "code": 255}   ssh says so and ends, nothing runs
    {"cut_in": N}                after N bytes of what is sent there, the connection is gone
    {"cut_after": TEXT}          once TEXT came from there, the connection is gone
    {"answer": TEXT}             something else answers
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

HERE = Path(__file__).resolve().parent
LOST = "client_loop: send disconnect: Broken pipe"


def main() -> None:
    words = sys.argv[1:]
    command = words[words.index("--") + 2]
    verb = shlex.split(command)[6]
    plan = json.loads((HERE / "plan.json").read_text())
    fault = (plan["faults"].get(verb) or [{}]).pop(0)
    mine = HERE / f"plan.{os.getpid()}"  # two calls at once each read a whole plan
    mine.write_text(json.dumps(plan))
    mine.replace(HERE / "plan.json")
    with (HERE / "calls").open("a") as calls:
        calls.write(json.dumps([verb, words]) + "\n")
    if "say" in fault:
        sys.stderr.write(fault["say"] + "\n")
        sys.exit(fault.get("code", 255))
    if "answer" in fault:
        sys.stdin.buffer.read()
        sys.stdout.buffer.write(fault["answer"].encode("latin-1"))
        return
    environment = {"HOME": plan["home"], "PATH": plan["path"], "OMP_NUM_THREADS": "1"}
    shell = subprocess.Popen(
        ["sh", "-c", plan["before"] + command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )
    sender = threading.Thread(target=send, args=(shell, fault.get("cut_in")), daemon=True)
    sender.start()
    seen, last = b"", fault.get("cut_after", "").encode()
    while chunk := os.read(shell.stdout.fileno(), 1 << 16):
        seen += chunk
        if last and last in seen:
            sys.stdout.buffer.write(chunk[: seen.index(last) + len(last) - len(seen) or None])
            sys.stdout.buffer.flush()
            lose(shell)
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()
    sys.exit(shell.wait())


def send(shell: subprocess.Popen[bytes], left: int | None) -> None:
    sent = 0
    with contextlib.suppress(BrokenPipeError):
        while left != 0 and (chunk := os.read(0, 1 << 16 if left is None else min(left, 1 << 16))):
            sent += len(chunk)
            left = None if left is None else left - len(chunk)
            shell.stdin.write(chunk)
            shell.stdin.flush()
    with (HERE / "sent").open("a") as file:
        file.write(f"{sent}\n")
    if left == 0:
        lose(shell)
    with contextlib.suppress(BrokenPipeError):
        shell.stdin.close()


def lose(shell: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(shell.pid, signal.SIGKILL)
    sys.stderr.write(LOST + "\n")
    sys.stderr.flush()
    os._exit(255)


main()
