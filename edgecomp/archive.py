"""Bundles as one file: a zip whose members are stored as they are.

Why zip: its table stands at the end, so that every name and size is known before a byte is read or written, and any
system can open it. Why stored: weights do not shrink, the same bundle gives the same bytes whatever zlib is installed,
and no member can be larger than the file that holds it, so that no bomb can be made.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import msgspec

from edgecomp.bundle import MANIFEST, new_bundle
from edgecomp.errors import BundleError, EdgecompError
from edgecomp.specs.origin import file_sha256

__all__ = ["BUNDLE", "README", "Member", "Table", "read_table", "unpack", "write_archive"]

BUNDLE = "bundle"  # the folder of the bundle itself in the archive
README = "README.md"
_PLAIN = r"[A-Za-z0-9][A-Za-z0-9._-]*"
#: What an archive may hold, and the largest size of each; the bundle's own files are bounded by the manifest.
_EXPECTED = (
    (re.compile(rf"{README}"), 1 << 20),
    (re.compile(rf"{BUNDLE}/{_PLAIN}"), 1 << 50),
    (re.compile(rf"{BUNDLE}/engines/{_PLAIN}/{_PLAIN}\.(engine|timing|so)"), 1 << 40),
    (re.compile(rf"{BUNDLE}/engines/{_PLAIN}/{_PLAIN}\.json"), 16 << 20),
    (re.compile(rf"{BUNDLE}/parity/{_PLAIN}\.(forced|first|second)\.(onnx|json)"), 256 << 20),
    (re.compile(rf"plugins/{_PLAIN}/{_PLAIN}"), 16 << 20),
    (re.compile(r"edgecomp-[0-9A-Za-z.+]+-py3-none-any\.whl"), 64 << 20),
)
_LONGEST_NAME = 200
_MOST_MEMBERS = 10_000
_LARGEST_TABLE = 4 << 20
_LARGEST_MANIFEST = 16 << 20
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can say
_MODE = (stat.S_IFREG | 0o644) << 16
_BLOCK = 1 << 20
_END, _END64, _LOCATOR64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")


class Member(msgspec.Struct, frozen=True):
    """One file of an archive, as its table says."""

    name: str
    size: int


class Table(msgspec.Struct, frozen=True):
    """What an archive holds; names, kinds and sizes are checked, contents are not yet."""

    path: Path
    members: tuple[Member, ...]

    @property
    def size(self) -> int:
        """Bytes of all members."""
        return sum(member.size for member in self.members)


# -- writing ------------------------------------------------------------------------------------------------


def write_archive(out: Path, members: Mapping[str, Path | bytes], *, sha256: Mapping[str, str], force: bool) -> bool:
    """Write an archive; return False where the same bytes were there already.

    Names are sorted, times and modes fixed: the same members give the same bytes. The file appears whole, or not.

    Args:
        out: the file.
        members: by name, a file or what it holds.
        sha256: of members that must hold what was promised.
        force: replace another file.

    Raises:
        EdgecompError: `out` is taken or cannot be written. BundleError: a file was changed meanwhile.
    """
    if out.is_symlink() or (out.exists() and not out.is_file()):
        raise EdgecompError(f"--out {out} is a folder, a link or a device; name a file")
    beside = out.parent / f".{out.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    made = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("xb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                for name in sorted(members):
                    _require_expected(out, name)
                    _add(archive, name, members[name], sha256.get(name, ""))
            file.flush()
            os.fsync(file.fileno())
        if out.exists():
            if out.stat().st_size == beside.stat().st_size and file_sha256(out) == file_sha256(beside):
                return False
            if not force:
                raise EdgecompError(f"--out {out} is another file; give --force to replace it, or another --out")
        os.replace(beside, out)
    except OSError as error:
        raise EdgecompError(
            f"{out} could not be written: {_why(error)} ({error.filename or beside}); nothing was changed. Free space "
            "or choose another --out"
        ) from error
    finally:
        _remove(beside, made)
    return True


def _add(archive: zipfile.ZipFile, name: str, content: Path | bytes, sha256: str) -> None:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.create_system, info.external_attr, info.compress_type = 3, _MODE, zipfile.ZIP_STORED
    info.file_size = len(content) if isinstance(content, bytes) else content.stat().st_size
    promised, digest, written = info.file_size, hashlib.sha256(), 0
    with archive.open(info, "w") as place:
        for block in [content] if isinstance(content, bytes) else _blocks(content):
            digest.update(block)
            written += len(block)
            place.write(block)
    if written != promised or (sha256 and digest.hexdigest() != sha256):
        raise BundleError(f"{content!s:.200} was changed while it was packed; pack again")


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block


def _remove(beside: Path, made: Sequence[Path]) -> None:
    try:
        beside.unlink(missing_ok=True)
        for folder in made:
            folder.rmdir()
    except OSError:  # not empty: the archive is in it
        return


# -- reading ------------------------------------------------------------------------------------------------


def read_table(path: Path) -> Table:
    """Read an archive's table and hold it to what an archive of edgecomp may hold; no member is read.

    Raises:
        BundleError: no archive; truncated, or with something before or behind it; a name that is not expected, leaves
            the folder or stands there twice; a link, folder or device; a member that is compressed or encrypted; sizes
            that cannot be.
    """
    with _opened(path) as (_, archive):
        return _table_of(path, archive)


def unpack(
    path: Path,
    out: Path,
    *,
    wanted: Callable[[str], bool],
    check: Callable[[Path], None],
) -> Table:
    """Write an archive's members into a new folder, which appears whole and checked, or not at all.

    Args:
        path: the archive.
        out: a folder that is absent or empty.
        wanted: whether a member is written.
        check: is given the bundle's folder before it gets its name, and raises where something is wrong.

    Returns:
        the table, of what was written.

    Raises:
        BundleError: as `read_table`; or a CRC, size or hash that is not the promised one.
        EdgecompError: `out` is taken, or there is no space.
    """
    if out.is_dir() and not out.is_symlink() and any(out.iterdir()):
        raise EdgecompError(f"--out {out} is not empty; edgecomp unpacks into a new folder, choose another --out")
    with _opened(path) as (_, archive):
        table = _table_of(path, archive)
        promised = _promised(path, archive)
        members = [one for one in table.members if wanted(one.name)]
        _require_promised(path, members, promised)
        kept = Table(path, tuple(members))
        _require_space(out, kept)
        with new_bundle(out, force=False) as work:
            for member in members:
                sha256 = promised.get(member.name, (0, ""))[1]
                _extract(path, archive, member, work / member.name, sha256)
            check(work / BUNDLE)
    return kept


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], zipfile.ZipFile]]:
    """Open an archive; whatever a broken one makes zipfile raise is said in words."""
    if not path.is_file():
        raise BundleError(f"{path} is not a file; `edgecomp bundle pack` makes one")
    try:
        with path.open("rb") as file:
            _require_end(path, file)
            file.seek(0)
            with zipfile.ZipFile(file) as archive:
                yield file, archive
    except (
        zipfile.BadZipFile,
        zipfile.LargeZipFile,
        EOFError,
        NotImplementedError,
        UnicodeError,
        struct.error,
    ) as error:
        raise BundleError(f"archive {path} is damaged: {error}; copy it again") from None


def _require_end(path: Path, file: IO[bytes]) -> None:
    """Hold the last bytes to a zip of one piece whose table is small: zipfile reads the whole table at once."""
    held = file.seek(0, os.SEEK_END)
    file.seek(max(0, held - _END.size))
    last = file.read(_END.size)
    if len(last) < _END.size or last[:4] != b"PK\5\6":
        raise BundleError(
            f"archive {path} ({held} bytes) does not end as a zip does: truncated, or none; copy it again"
        )
    _, disk, first, here, count, size, offset, comment = _END.unpack(last)
    ends, single = held - _END.size, (disk, first, comment) == (0, 0, 0) and here == count
    file.seek(max(0, ends - _LOCATOR64.size))
    if file.read(4) == b"PK\6\7":  # the form for more than 2 GiB; zipfile looks for it in this way, too
        ends -= _LOCATOR64.size + _END64.size
        file.seek(max(0, ends))
        found = file.read(_END64.size + _LOCATOR64.size)
        if ends < 0 or found[:4] != b"PK\6\6":
            raise BundleError(f"archive {path} has no table where it says; it is damaged, copy it again")
        _, _, _, _, disk, first, here, count, size, offset = _END64.unpack_from(found)
        locator = _LOCATOR64.unpack_from(found, _END64.size)
        single = single and (disk, first) == (0, 0) and here == count and locator == (b"PK\6\7", 0, ends, 1)
    if not single or offset + size != ends:
        raise BundleError(
            f"archive {path} is no zip of one piece with its table at the end; something was put before, behind or "
            "into it. Pack it again"
        )
    if size > _LARGEST_TABLE or count > _MOST_MEMBERS:
        raise BundleError(
            f"archive {path} has a table of {count} members and {size} bytes, above {_MOST_MEMBERS} or "
            f"{_LARGEST_TABLE}; it is not edgecomp's"
        )


def _table_of(path: Path, archive: zipfile.ZipFile) -> Table:
    held, seen, spans = path.stat().st_size, set(), []
    for info in archive.infolist():
        name = info.orig_filename  # `filename` is already cut at a zero byte
        _require_expected(path, name)
        if name.lower() in seen:
            raise BundleError(f"archive {path}: {name!r} stands there twice; take it from a source that you trust")
        seen.add(name.lower())
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG):
            what = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder"}.get(kind, "a device, pipe or socket")
            raise BundleError(f"archive {path}: {name!r} is {what}, not a file; take it from a source that you trust")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits or info.compress_size != info.file_size:
            raise BundleError(
                f"archive {path}: {name!r} is compressed or encrypted (method {info.compress_type}, "
                f"{info.compress_size} bytes that become {info.file_size}); edgecomp stores files as they are"
            )
        limit = next(limit for pattern, limit in _EXPECTED if pattern.fullmatch(name))
        if info.file_size > min(limit, held):
            raise BundleError(
                f"archive {path}: {name!r} has {info.file_size} bytes by the table, above {min(limit, held)}; nothing "
                "was written"
            )
        spans.append((info.header_offset, info.header_offset + 30 + len(name) + info.file_size))
    for (_, end), (start, _) in zip(sorted(spans), sorted(spans)[1:], strict=False):
        if end > start:
            raise BundleError(f"archive {path}: two members share bytes, as in a bomb; nothing was written")
    if f"{BUNDLE}/{MANIFEST}" not in archive.namelist():
        raise BundleError(f"archive {path} holds no {BUNDLE}/{MANIFEST}; `edgecomp bundle pack` makes archives")
    members = sorted((Member(info.filename, info.file_size) for info in archive.infolist()), key=lambda one: one.name)
    return Table(path, tuple(members))


def _require_expected(path: Path, name: str) -> None:
    """Refuse every name but those that an archive of edgecomp has: no `..`, drive, backslash or leading slash fits."""
    if len(name) > _LONGEST_NAME or not any(pattern.fullmatch(name) for pattern, _ in _EXPECTED):
        raise BundleError(
            f"archive {path}: {name[:_LONGEST_NAME]!r} is not expected there, or leaves the folder; take it from a "
            "source that you trust"
        )


class _Promise(msgspec.Struct, frozen=True):
    name: str
    size: int
    sha256: str


class _Promises(msgspec.Struct, frozen=True):
    files: tuple[_Promise, ...]


def _promised(path: Path, archive: zipfile.ZipFile) -> dict[str, tuple[int, str]]:
    """Return size and sha256 of the bundle's files by the manifest; the whole manifest is checked after unpacking."""
    name = f"{BUNDLE}/{MANIFEST}"
    info = archive.getinfo(name)
    if info.file_size > _LARGEST_MANIFEST:
        raise BundleError(f"archive {path}: {name} is larger than {_LARGEST_MANIFEST} bytes; it is not edgecomp's")
    try:
        found = msgspec.json.decode(archive.read(info), type=_Promises)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"archive {path}: {name} is not a bundle's ({error}); pack it again") from None
    return {f"{BUNDLE}/{file.name}": (file.size, file.sha256) for file in found.files}


def _require_promised(path: Path, members: Sequence[Member], promised: Mapping[str, tuple[int, str]]) -> None:
    """Hold the root files of the table to the manifest, before any of them is written."""
    root = {one.name: one.size for one in members if re.fullmatch(rf"{BUNDLE}/{_PLAIN}", one.name)}
    root.pop(f"{BUNDLE}/{MANIFEST}")
    for what, names in (("lacks", promised.keys() - root.keys()), ("should not have", root.keys() - promised.keys())):
        if names:
            raise BundleError(
                f"archive {path} {what} {', '.join(map(repr, sorted(names)))}, by its manifest; pack it again"
            )
    for name, size in root.items():
        if size != promised[name][0]:
            raise BundleError(
                f"archive {path}: {name} has {size} bytes and the manifest says {promised[name][0]}; it was altered, "
                "copy or pack it again"
            )


def _require_space(out: Path, table: Table) -> None:
    above = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(above).free
    if table.size > free:
        raise EdgecompError(
            f"{table.path.name} needs {table.size} bytes and {above} has {free} free; nothing was written. Free space"
            " or choose another --out"
        )


def _extract(path: Path, archive: zipfile.ZipFile, member: Member, place: Path, sha256: str) -> None:
    """Write one member and hold it to its CRC and hash."""
    place.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with archive.open(member.name) as source, place.open("xb") as file:
        while block := source.read(_BLOCK):
            digest.update(block)
            file.write(block)
    if sha256 and digest.hexdigest() != sha256:
        raise BundleError(
            f"archive {path}: {member.name} has sha256 {digest.hexdigest()[:12]} and the manifest says {sha256[:12]}; "
            "it was altered, copy or pack it again"
        )


def _why(error: OSError) -> str:
    known = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is spent"}
    return known.get(error.errno or 0, error.strerror or str(error))
