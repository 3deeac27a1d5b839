"""One writer at a time: a lock beside a folder, which names its owner.

The lock is the kernel's (flock), so it ends with its process, however that ends: no age, clock or process number
decides whether it is held. The file's content only tells people who holds it, and what a dead owner left behind.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

import msgspec

from edgecomp.errors import BundleBusy

__all__ = ["Owner", "bundle_lock", "lock_path"]

_LARGEST = 4096  # bytes of a lock file
_TURNS = 100


class Owner(msgspec.Struct, frozen=True):
    """Who holds a lock; `since` is for people alone, since clocks go backwards."""

    pid: int
    thread: int
    host: str
    verb: str
    since: str

    def __str__(self) -> str:
        return f"`edgecomp {self.verb}`, process {self.pid} on {self.host}, since {self.since}"


def lock_path(folder: Path) -> Path:
    """Return where the lock of a folder lies: beside it, since a bundle holds only what its manifest names."""
    whole = folder.resolve() if folder.exists() else folder.absolute()
    return whole.parent / f".{whole.name}.lock"


@contextmanager
def bundle_lock(folder: Path, verb: str, *, say: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Hold the lock of a folder, which need not exist yet, while a block runs.

    The same thread may take it again, so that a verb can call another. A lock whose process is dead is taken over; what
    that process had half written beside the folder is removed, and a bundle that it had moved aside is put back. Where
    the place cannot be written to, nobody can write the folder either, and the block runs without.

    Args:
        folder: what the block reads or writes.
        verb: what it does, for those that are turned away.
        say: takes a line where a lock was taken over, or none can be.

    Raises:
        BundleBusy: another process, or thread, holds it; the text names it.
    """
    path = lock_path(folder)
    made = [above for above in path.parents if not above.exists()]
    mine = Owner(
        os.getpid(), threading.get_native_id(), socket.gethostname(), verb,
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )  # fmt: skip
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _take(path, folder, mine, say)
        except OSError as error:
            if path.parent.is_dir():  # else the folder cannot be made either, and the block will say so
                say(f"note: {folder} is used without a lock: {path} cannot be written ({error.strerror})")
            descriptor = -1
        try:
            yield
        finally:
            if descriptor >= 0:
                with suppress(OSError):
                    path.unlink()  # before the lock goes: whoever waits sees that the file is another
                os.close(descriptor)
    finally:
        for above in made:
            with suppress(OSError):  # not empty: something was written
                above.rmdir()


def _take(path: Path, folder: Path, mine: Owner, say: Callable[[str], None]) -> int:
    """Return the descriptor that holds the lock; -1 where this thread holds it already."""
    for _ in range(_TURNS):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = _read(descriptor)
                if owner is not None and _is_same(owner, mine):
                    os.close(descriptor)
                    return -1
                raise _busy(folder, path, owner, mine) from None
            if not _is_still(path, descriptor):  # its owner has just removed it
                os.close(descriptor)
                continue
            dead = _read(descriptor)
            if dead is not None and dead.host != mine.host:
                raise _busy(folder, path, dead, mine)  # flock may not reach from one host to another
            if dead is not None:
                say(f"note: took over the lock of {dead}, which is gone")
                _clean_after(folder, dead, say)
            with suppress(OSError):  # the disk is full: held all the same, without a name
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, msgspec.json.encode(mine), 0)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor
    raise _busy(folder, path, None, mine)


def _busy(folder: Path, path: Path, owner: Owner | None, mine: Owner) -> BundleBusy:
    if owner is None:
        return BundleBusy(f"{folder} is in use by a process that does not say who it is ({path}); wait for its end")
    if owner.host != mine.host:
        return BundleBusy(
            f"{folder} is in use by {owner}, and this is {mine.host}; wait for its end. If that process is gone, "
            f"remove {path}"
        )
    return BundleBusy(f"{folder} is in use by {owner}; wait for its end, or choose another folder")


def _read(descriptor: int) -> Owner | None:
    try:
        return msgspec.json.decode(os.pread(descriptor, _LARGEST, 0), type=Owner)
    except (msgspec.DecodeError, UnicodeDecodeError, OSError):
        return None


def _is_same(owner: Owner, mine: Owner) -> bool:
    return (owner.pid, owner.thread, owner.host) == (mine.pid, mine.thread, mine.host)


def _is_still(path: Path, descriptor: int) -> bool:
    """Say whether the path still names the file that is open."""
    try:
        there = path.stat()
    except OSError:
        return False
    held = os.fstat(descriptor)
    return (there.st_dev, there.st_ino) == (held.st_dev, held.st_ino)


def _clean_after(folder: Path, dead: Owner, say: Callable[[str], None]) -> None:
    """Put back what a dead owner had moved aside, and remove what it had half written; nobody else is there."""
    place = lock_path(folder).parent
    name = lock_path(folder).name.removesuffix(".lock")  # `.<folder>`
    aside = place / f"{name}.{dead.pid}.old"
    if aside.is_dir() and not folder.exists():
        os.replace(aside, folder)
        say(f"note: {folder} was put back from {aside.name}")
    for left in (aside, *sorted(place.glob(f"{_escape(name)}.{dead.pid}-*"))):
        if left.suffix not in (".tmp", ".json", ".old") or left.is_symlink():
            continue
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        elif left.is_file():
            left.unlink(missing_ok=True)


def _escape(name: str) -> str:
    """Return a name of which no character is a pattern."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)
