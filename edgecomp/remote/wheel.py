"""The running edgecomp as a wheel, made of its own files: no build tool and no network are asked for.

A package that was installed from a wheel holds its data as `edgecomp/_data/...`; a checkout, or an editable install of
one, holds it in the folders beside the package. Both give the same files at the same places, and the same files give
the same bytes, so that another machine can tell by the hash whether it has this very edgecomp.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import io
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
from packaging.markers import Marker
from packaging.requirements import Requirement

import edgecomp
from edgecomp.errors import EdgecompError
from edgecomp.resources import data_path

__all__ = ["Wheel", "make_wheel"]

_DATA = (("export",), ("engines",), ("profiles", "published"), ("profiles", "targets"))
_STAMP = (1980, 1, 1, 0, 0, 0)  # a zip's first moment: the bytes must not tell when they were made
_LARGEST = 64 << 20  # bytes; a wheel is some MiB, and more means that the folders hold what is not edgecomp's


class Wheel(msgspec.Struct, frozen=True):
    """A wheel in memory.

    Attributes:
        name: its file name.
        requires: what it needs beside itself, without extras.
    """

    name: str
    content: bytes
    sha256: str
    requires: tuple[str, ...]


class _Project(msgspec.Struct, frozen=True, rename="kebab"):
    dependencies: tuple[str, ...]
    optional_dependencies: dict[str, tuple[str, ...]]


class _Pyproject(msgspec.Struct, frozen=True):
    project: _Project


def make_wheel() -> Wheel:
    """Return the edgecomp that is running, as a wheel.

    Raises:
        EdgecompError: its own files, or what it requires, cannot be read.
    """
    version = edgecomp.__version__
    requires, extras = _requires()
    info = f"edgecomp-{version}.dist-info"
    lines = ["Metadata-Version: 2.1", "Name: edgecomp", f"Version: {version}", "Requires-Python: >=3.10"]
    members = dict(_members())
    lines += [f"Requires-Dist: {one}" for one in requires]
    for extra, needed in sorted(extras.items()):
        lines += [f"Provides-Extra: {extra}", *(f"Requires-Dist: {one}" for one in needed)]
    members[f"{info}/METADATA"] = "\n".join([*lines, ""]).encode()
    members[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: edgecomp\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    members[f"{info}/entry_points.txt"] = b"[console_scripts]\nedgecomp = edgecomp.cli:main\n"
    members[f"{info}/RECORD"] = _record(members, f"{info}/RECORD")
    total = sum(map(len, members.values()))
    if total > _LARGEST:
        raise EdgecompError(
            f"edgecomp's own files have {total >> 20} MiB, and at most {_LARGEST >> 20} are copied to another machine; "
            f"take what is not edgecomp's out of {Path(edgecomp.__file__).parent} and the data folders beside it"
        )
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for name in sorted(members):
            entry = zipfile.ZipInfo(name, _STAMP)
            entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            archive.writestr(entry, members[name])
    written = content.getvalue()
    return Wheel(f"edgecomp-{version}-py3-none-any.whl", written, hashlib.sha256(written).hexdigest(), requires)


def _members() -> Iterator[tuple[str, bytes]]:
    """Yield the files of the package and of its data, by their place in a wheel."""
    package = Path(edgecomp.__file__).resolve().parent
    roots = [(package, "edgecomp"), *((data_path(*parts), "/".join(("edgecomp/_data", *parts))) for parts in _DATA)]
    for root, place in roots:
        for file in sorted(root.rglob("*")):
            parts = file.relative_to(root).parts
            if file.is_file() and _belongs(parts) and not (root == package and parts[0] == "_data"):
                yield "/".join((place, *parts)), file.read_bytes()


def _belongs(parts: tuple[str, ...]) -> bool:
    """Say whether a file is edgecomp's: not hidden, not compiled, nothing that Python or an editor left."""
    hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
    return not hidden and not parts[-1].endswith((".pyc", ".pyo", ".so", "~"))


def _requires() -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Return what edgecomp requires and its extras, from the checkout that it runs from or from what pip noted."""
    pyproject = Path(edgecomp.__file__).resolve().parents[1] / "pyproject.toml"
    try:
        if pyproject.is_file():
            project = msgspec.toml.decode(pyproject.read_bytes(), type=_Pyproject).project
            own = _in_order(project.dependencies)
            extras = project.optional_dependencies
            return own, {name: _in_order(_spelled_out(extras, name), name) for name in extras}
        noted = importlib.metadata.requires("edgecomp") or []
        names = importlib.metadata.metadata("edgecomp").get_all("Provides-Extra") or []
    except (OSError, ValueError, msgspec.DecodeError, importlib.metadata.PackageNotFoundError) as error:
        raise EdgecompError(
            f"what edgecomp requires cannot be read ({error}), so it cannot be taken to another machine; "
            "install it again with pip"
        ) from None
    own = _in_order(line for line in noted if not _marker_of(line))
    return own, {name: _in_order(line for line in noted if _marker_of(line).endswith(f'"{name}"')) for name in names}


def _spelled_out(extras: Mapping[str, Sequence[str]], name: str) -> Iterator[str]:
    """Yield what an extra brings; of one that names others of edgecomp's, what those bring, as build tools note it."""
    for line in extras[name]:
        needed = Requirement(line)
        if needed.name != "edgecomp":
            yield line
        for other in sorted(needed.extras) if needed.name == "edgecomp" else ():
            yield from _spelled_out(extras, other)


def _in_order(lines: Iterable[str], extra: str = "") -> tuple[str, ...]:
    """Return requirements in the one form and order that pyproject and pip's notes both give; of an extra, said so."""
    found = []
    for line in lines:
        needed = Requirement(line)
        if extra:
            also = f"({needed.marker}) and " if needed.marker else ""
            needed.marker = Marker(f'{also}extra == "{extra}"')
        found.append(str(needed))
    return tuple(sorted(found))


def _marker_of(line: str) -> str:
    """Return the marker of a requirement that only an extra brings; "" of any other."""
    marker = str(Requirement(line).marker or "")
    return marker if "extra ==" in marker else ""


def _record(members: dict[str, bytes], own: str) -> bytes:
    """Return the list of hashes that pip checks."""
    lines = []
    for name in sorted(members):
        digest = base64.urlsafe_b64encode(hashlib.sha256(members[name]).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(members[name])}")
    return "\n".join([*lines, f"{own},,", ""]).encode()
