"""The timing cache: what TensorRT measured of tactics, kept for the next build of the same target and version."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from edgecomp.engines.adapter import Flavour, attach_timing_cache, has_timing_cache, serialize_timing_cache
from edgecomp.errors import BuildError
from edgecomp.resources import cache_dir

__all__ = ["TimingCache", "choose_timing_cache", "load_timing_cache", "store_timing_cache"]

_MARK = b"edgecomp timing cache "
_LARGEST = 1 << 30
_LONGEST_HEADER = 4096


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    runtime: str
    version: str
    sm: int
    size: int
    sha256: str


class TimingCache(NamedTuple):
    """A file that may not exist yet, and what it is for."""

    path: Path
    flavour: Flavour
    sm: int


def choose_timing_cache(word: str, flavour: Flavour, *, target: str, sm: int) -> TimingCache | None:
    """Return the timing cache of a build; none where it is off, or where this TensorRT has no use for one.

    Args:
        word: "auto" for the user's cache folder, one file a target and TensorRT version; "off"; or a file.
        flavour: the TensorRT that builds.
        target: the target's name.
        sm: its compute capability.
    """
    if word == "off":
        return None
    if not has_timing_cache(flavour):
        if word == "auto":
            return None
        raise BuildError(
            f"--timing-cache {word}: {flavour.title} times nothing when it builds, so that it has no timing cache; "
            f"leave the option out"
        )
    name = f"{target}.{flavour.name}-{flavour.version}.sm{sm}.cache"
    path = cache_dir() / "timing" / name if word == "auto" else Path(word)
    if word != "auto" and path.exists():
        _require_ours(path)
    return TimingCache(path, flavour, sm)


def load_timing_cache(cache: TimingCache | None, config: Any, logger: Any, note: Callable[[str], None]) -> str:
    """Give a build its timing cache, and return the hash of what it starts from: `empty`, or "" without a cache.

    A cache that is damaged, or of another TensorRT or GPU, is left out with a word; the build then replaces it.

    Args:
        cache: from `choose_timing_cache`.
        config: of the builder.
        logger: collects what TensorRT says; its words on a bad cache do not belong to the build.
        note: receives a line where a cache is left out.
    """
    if cache is None:
        return ""
    content, problem = _read(cache)
    before = len(logger.errors), len(logger.warnings)
    taken = attach_timing_cache(config, content)
    complaint = [*logger.errors[before[0] :], *logger.warnings[before[1] :]]
    del logger.errors[before[0] :], logger.warnings[before[1] :]
    if content and (not taken or complaint):
        said = f": {complaint[0]}" if complaint else ""
        problem = f"{cache.flavour.title} refuses it on this GPU{said}"
        content, taken = b"", attach_timing_cache(config, b"")
    if problem:
        note(f"timing cache {cache.path} is left out: {problem}; this build writes a new one")
    if not taken:
        note(f"timing cache {cache.path}: {cache.flavour.title} takes none; this build is timed from the start")
        return ""
    return hashlib.sha256(content).hexdigest() if content else "empty"


def store_timing_cache(cache: TimingCache | None, config: Any, note: Callable[[str], None]) -> None:
    """Write what a build measured: whole or not at all; of two processes the last one's stays.

    An engine does not depend on it, so that a full disk costs a line and not the build.
    """
    if cache is None:
        return
    content = serialize_timing_cache(config)
    if not content:
        return
    header = _Header(
        cache.flavour.name, cache.flavour.version, cache.sm, len(content), hashlib.sha256(content).hexdigest()
    )
    whole = _MARK + msgspec.json.encode(header) + b"\n" + content
    fresh = cache.path.with_name(f".{cache.path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        cache.path.parent.mkdir(parents=True, exist_ok=True)
        with fresh.open("xb") as file:
            file.write(whole)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, cache.path)
    except OSError as error:
        note(
            f"timing cache {cache.path} could not be written: {error.strerror}; the next build times its tactics again"
        )
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink()


def _require_ours(path: Path) -> None:
    """Refuse to replace a file that edgecomp did not write."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_MARK))
    except OSError as error:
        raise BuildError(f"--timing-cache {path} cannot be read: {error.strerror}; name another file") from None
    if start and start != _MARK:
        raise BuildError(
            f"--timing-cache {path} is no timing cache of edgecomp, and a build would replace it; name another file"
        )


def _read(cache: TimingCache) -> tuple[bytes, str]:
    """Return a cache's content, and what is wrong with the file; neither where there is none."""
    try:
        if cache.path.stat().st_size > _LARGEST:
            return b"", f"it is larger than {_LARGEST} bytes"
        whole = cache.path.read_bytes()
    except FileNotFoundError:
        return b"", ""
    except OSError as error:
        return b"", f"it cannot be read ({error.strerror})"
    line, _, content = whole[: _LONGEST_HEADER + len(_MARK)].partition(b"\n")
    try:
        if not line.startswith(_MARK):
            raise msgspec.DecodeError
        header = msgspec.json.decode(line[len(_MARK) :], type=_Header)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return b"", "it is damaged"
    content = whole[len(line) + 1 :]
    made = f"{header.runtime} {header.version} for SM{header.sm}"
    wanted = f"{cache.flavour.name} {cache.flavour.version} for SM{cache.sm}"
    if made != wanted:
        return b"", f"it was written by {made}, and this build is {wanted}"
    if len(content) != header.size or hashlib.sha256(content).hexdigest() != header.sha256:
        return b"", "it is damaged"
    return content, ""
