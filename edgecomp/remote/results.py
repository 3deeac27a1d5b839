"""What comes back from another machine is taken like a foreign archive: names, sizes and hashes are checked first."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from edgecomp.errors import BundleError, EdgecompError, RunError
from edgecomp.remote.answers import Listing
from edgecomp.remote.far import RESULT
from edgecomp.remote.ssh import Reply
from edgecomp.specs.origin import file_sha256

__all__ = ["local_results", "require_apart", "staging", "store", "take", "write_record"]


def require_apart(host: str, listing: Listing, folders: tuple[str, ...]) -> None:
    """Refuse results that leave the folders that were asked for, or collide.

    Raises:
        RunError: naming the first.
    """
    seen: set[str] = set()
    for entry in listing.results:
        # a disk that knows no upper case would write one over the other; a file cannot be another's folder
        folded = entry.name.casefold()
        above = {folded.rsplit("/", up)[0] for up in range(1, folded.count("/") + 1)}
        if entry.name.partition("/")[0] not in folders or folded in seen or above & seen:
            raise RunError(
                f"{host} sent a result named {entry.name!r}, which is not below {' or '.join(folders)}, or collides "
                "with another; nothing was taken"
            )
        seen.add(folded)


def local_results(bundle: Path, folders: tuple[str, ...]) -> dict[str, str]:
    """Return the hashes of the results that are here, by their names in the bundle."""
    found = {}
    for folder in folders:
        _require_inside(bundle, bundle / folder)
        for path in sorted((bundle / folder).rglob("*")):
            name = path.relative_to(bundle).as_posix()
            if RESULT.fullmatch(name) and path.is_file() and not path.is_symlink():
                found[name] = file_sha256(path)
    return found


@contextmanager
def staging(bundle: Path) -> Iterator[Path]:
    """Give a hidden folder beside the bundle, on the same disk; it is gone afterwards."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{bundle.name}.", suffix=".tmp", dir=bundle.resolve().parent))
    except OSError as error:
        raise EdgecompError(
            f"results cannot be written beside bundle {bundle}: {error.strerror}; they stay where they are, and the "
            "same command fetches them"
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def take(host: str, reply: Reply, listing: Listing, folder: Path) -> bytes:
    """Write what is sent into an empty folder and return what the job printed.

    Raises:
        RunError: a file is not the one that was announced. EdgecompError: there is no room for it here.
    """
    total = sum(entry.size for entry in listing.results)
    free = shutil.disk_usage(folder).free
    if total > free:
        raise EdgecompError(
            f"{host} has {total >> 20} MiB of results and there are {free >> 20} MiB free beside the bundle here; "
            "free space and run the same command again: it fetches them"
        )
    out = b"".join(reply.read(listing.out))
    for entry in listing.results:
        path = folder / entry.name
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with path.open("xb") as file:
            for chunk in reply.read(entry.size):
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != entry.sha256:
            raise RunError(
                f"{host}: {entry.name} changed while it was copied (sha256 {digest.hexdigest()[:12]}, announced "
                f"{entry.sha256[:12]}); run the same command again"
            )
    return out


def store(listing: Listing, folder: Path, bundle: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Move what was taken to its places in the bundle; return the names that are new, and those that were replaced.

    Plans come before the records that describe them, and an old record goes before its plan does: no interruption
    leaves a record beside a plan that it does not describe.
    """
    names = sorted((entry.name for entry in listing.results), key=lambda name: (name.endswith(".json"), name))
    for name in names:
        for parent in reversed((bundle / name).relative_to(bundle).parents[:-1]):
            _require_inside(bundle, bundle / parent)
            (bundle / parent).mkdir(exist_ok=True)
    replaced = tuple(name for name in names if (bundle / name).is_file())
    for name in replaced:
        if name.endswith(".json"):
            (bundle / name).unlink()
    for name in names:
        os.replace(folder / name, bundle / name)
    return tuple(name for name in names if name not in replaced), replaced


def write_record(bundle: Path, name: str, fields: dict[str, Any]) -> None:
    """Write a JSON file below the bundle, whole or not at all."""
    _require_inside(bundle, (bundle / name).parent)
    (bundle / name).parent.mkdir(exist_ok=True)
    with staging(bundle) as folder:
        (folder / "record").write_bytes(msgspec.json.format(msgspec.json.encode(fields), indent=1) + b"\n")
        os.replace(folder / "record", bundle / name)


def _require_inside(bundle: Path, folder: Path) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise BundleError(f"bundle {bundle}: {folder} is a link or a file where results are to go; remove it")
