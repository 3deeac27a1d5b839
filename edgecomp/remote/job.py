"""What a run takes to the other machine: the bundle's files, edgecomp as a wheel, and the words of the command."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from packaging.requirements import Requirement

from edgecomp.bundle import MANIFEST, open_bundle
from edgecomp.errors import InvalidSpec
from edgecomp.remote.wheel import make_wheel

__all__ = ["Attached", "Cargo", "Job", "make_job", "missing_packages"]

_LARGEST_ATTACHED = 1 << 24


class Attached(msgspec.Struct, frozen=True):
    """A file here that an option names, for example `--target my.toml`; it is copied, and the option names the copy."""

    option: str
    path: Path


class Cargo(msgspec.Struct, frozen=True):
    """Something to copy: a file, or bytes."""

    name: str
    size: int
    sha256: str
    source: Path | bytes

    def read(self, offset: int) -> Iterator[bytes]:
        """Yield the content from an offset on."""
        if isinstance(self.source, bytes):
            yield self.source[offset:]
            return
        left = self.size - offset
        with self.source.open("rb") as file:
            file.seek(offset)
            while left and (chunk := file.read(min(left, 1 << 18))):
                left -= len(chunk)
                yield chunk


class Job(msgspec.Struct, frozen=True):
    """All that a run needs.

    Attributes:
        id: the same for the same command on the same bundle with the same edgecomp, so that it finds itself again.
        key: of the bundle there; the same when the manifest alone changed, so that what was built stays valid.
        words: options as they stand, or as `{"option", "name", "sha256"}` for a copied file.
        bundle: the folder here.
        requires: what edgecomp requires.
    """

    id: str
    key: str
    verb: str
    words: tuple[Any, ...]
    bundle: Path
    files: tuple[Cargo, ...]
    wheel: Cargo
    attached: tuple[Cargo, ...]
    requires: tuple[str, ...]

    @property
    def cargo(self) -> tuple[Cargo, ...]:
        """All that has to be there, each content once, small before large."""
        found = {one.sha256: one for one in (self.wheel, *self.files, *self.attached)}
        return tuple(sorted(found.values(), key=lambda one: (one.size, one.sha256)))

    def start_request(self, install: Sequence[str]) -> dict[str, Any]:
        """Return what the other machine is told to run."""
        return {
            "job": self.id,
            "bundle": self.key,
            "verb": self.verb,
            "words": self.words,
            "wheel": self.wheel.sha256,
            "files": {one.name: one.sha256 for one in self.files},
            "install": install,
        }


def make_job(bundle: Path, verb: str, words: Sequence[str | Attached]) -> Job:
    """Open a bundle, which verifies it, and collect what goes with it.

    Raises:
        BundleError: it is not whole. InvalidSpec: an attached file cannot be taken.
    """
    opened = open_bundle(bundle)
    files = [Cargo(one.name, one.size, one.sha256, bundle / one.name) for one in opened.manifest.files]
    key = _digest([[one.name, one.sha256] for one in files])
    files.append(_of_bytes(MANIFEST, (bundle / MANIFEST).read_bytes()))
    made = make_wheel()
    attached: list[Cargo] = []
    given: list[Any] = []
    for word in words:
        if isinstance(word, Attached):
            attached.append(_attach(word))
            given.append({"option": word.option, "name": attached[-1].name, "sha256": attached[-1].sha256})
        else:
            given.append(word)
    return Job(
        id=_digest([made.sha256, key, files[-1].sha256, verb, given]),
        key=key,
        verb=verb,
        words=tuple(given),
        bundle=bundle,
        files=tuple(files),
        wheel=Cargo(made.name, len(made.content), made.sha256, made.content),
        attached=tuple(attached),
        requires=made.requires,
    )


def missing_packages(requires: Sequence[str], python: str, found: dict[str, str]) -> tuple[str, ...]:
    """Return the requirements that the packages of another Python do not meet, without their markers."""
    short = ".".join(python.split(".")[:2])
    missing = []
    for line in requires:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"python_version": short}):
            continue
        version = found.get(wanted.name, "")
        if not version or not wanted.specifier.contains(version, prereleases=True):
            missing.append(f"{wanted.name}{wanted.specifier}")
    return tuple(missing)


def _attach(word: Attached) -> Cargo:
    name = word.path.name
    if not name.isascii() or not name.isprintable() or name.startswith((".", "-")):
        raise InvalidSpec(f"{word.option} {word.path}: it goes to another machine; copy it to a plain file name first")
    try:
        if word.path.stat().st_size > _LARGEST_ATTACHED:
            raise InvalidSpec(
                f"{word.option} {word.path} is larger than {_LARGEST_ATTACHED} bytes; is it the right file?"
            )
        return _of_bytes(name, word.path.read_bytes())
    except OSError as error:
        raise InvalidSpec(f"{word.option} {word.path} cannot be read: {error.strerror}; check the path") from None


def _of_bytes(name: str, content: bytes) -> Cargo:
    return Cargo(name, len(content), hashlib.sha256(content).hexdigest(), content)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
