"""One build at a time in a folder: a lock that names its owner and ends with it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from edgecomp.errors import BuildError

__all__ = ["build_lock"]

_NAME = ".build.lock"
_LONGEST = 4096


class _Owner(msgspec.Struct, frozen=True):
    pid: int
    host: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


@contextlib.contextmanager
def build_lock(folder: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a folder; the folder is made, and removed again where nothing came into it.

    The system frees the lock when its owner ends, however that happens: a file that a dead process left is taken over.

    Args:
        folder: where engines go.
        note: receives a line where a lock of a dead process was found.

    Raises:
        BuildError: another build holds it; the text names that process.
    """
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    path = folder / _NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _open_locked(path)
    except OSError as error:
        raise BuildError(f"{path} cannot be written: {error.strerror}; free space, or choose another folder") from error
    try:
        left = _read_owner(descriptor)
        if left:
            note(f"the lock {path} was left by {left}, which is gone; this build takes over")
        owner = _Owner(os.getpid(), socket.gethostname(), time.strftime("%Y-%m-%dT%H:%M:%S%z"))
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, msgspec.json.encode(owner), 0)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held, so that nobody else's is removed
        os.close(descriptor)
        for one in made:
            with contextlib.suppress(OSError):  # not empty: engines are in it
                one.rmdir()


def _open_locked(path: Path) -> int:
    """Return an open and locked file that is the one at `path`."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass  # its owner ended and removed it between the two calls
        except BlockingIOError:
            owner = _read_owner(descriptor) or "another process"
            os.close(descriptor)
            raise BuildError(
                f"{path.parent} is being built in by {owner}; wait until it ends, or end it, and run this again"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _read_owner(descriptor: int) -> str:
    """Return whose name stands in a lock file, or ""."""
    try:
        return str(msgspec.json.decode(os.pread(descriptor, _LONGEST, 0), type=_Owner))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""
