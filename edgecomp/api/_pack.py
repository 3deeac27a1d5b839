"""`edgecomp bundle`: a bundle becomes one file, and a file a bundle."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from edgecomp import archive
from edgecomp.api._progress import Progress, silent
from edgecomp.bundle import MANIFEST, Bundle, open_bundle
from edgecomp.engines import EngineRecord, find_plugin_nodes, read_record, sidecar_path
from edgecomp.engines.external import require_contained
from edgecomp.errors import BuildError, BundleError, EdgecompError, InvalidSpec
from edgecomp.lock import bundle_lock
from edgecomp.remote import make_wheel
from edgecomp.report.pack import PackReport, UnpackReport, archive_readme
from edgecomp.specs import load_plugin
from edgecomp.specs.origin import file_sha256

__all__ = ["pack", "unpack"]

_HASH = re.compile(r"[0-9a-f]{12,64}")
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def pack(
    bundle: str | Path,
    *,
    out: str | Path = "",
    with_engines: bool = False,
    force: bool = False,
    progress: Progress = silent,
) -> PackReport:
    """Write a bundle as one file: the same bundle gives the same bytes.

    It holds the bundle's own files, the forced forms of its graphs and the timing caches of its engines where there are
    some, the sources of the plugins that its graphs could use, the wheel of this edgecomp, and a README for whoever
    unpacks it.

    Args:
        bundle: the folder.
        out: the file; "": the folder's name and `.edgecomp.zip`, in the current folder.
        with_engines: also plans that are of this very bundle, with their records and plugin libraries.
        force: replace another file.
        progress: takes one line for each step.

    Raises:
        BundleError: the bundle is not whole. BundleBusy: another process writes it.
        EdgecompError: `out` is taken or cannot be written.
    """
    folder = Path(bundle)
    place = Path(out) if str(out) else Path(f"{folder.resolve().name}.edgecomp.zip")
    if folder.resolve() in place.resolve().parents:
        raise EdgecompError(f"--out {place} lies in the bundle itself; name a file elsewhere")
    with bundle_lock(folder, "bundle pack", say=progress), bundle_lock(place, "bundle pack", say=progress):
        progress("hashing")
        opened = open_bundle(folder)
        require_contained(opened)
        own = {f"{archive.BUNDLE}/{entry.name}": entry for entry in opened.manifest.files}
        members: dict[str, Path | bytes] = {name: folder / entry.name for name, entry in own.items()}
        members[f"{archive.BUNDLE}/{MANIFEST}"] = folder / MANIFEST
        names = {
            nodes.plugin.name for graph in opened.manifest.graphs for nodes in find_plugin_nodes(folder / graph.model)
        }
        for name in sorted(names):
            sources = sorted(file for file in load_plugin(name).folder.iterdir() if file.is_file())
            members |= {f"plugins/{name}/{file.name}": file.read_bytes() for file in sources}
        wheel = make_wheel()
        members[wheel.name] = wheel.content
        members[archive.README] = archive_readme(opened.manifest, tuple(sorted(names)), wheel=wheel.name).encode()
        forms = (file for word in ("forced", "first", "second") for file in (folder / "parity").glob(f"[!.]*.{word}.*"))
        members |= {f"{archive.BUNDLE}/parity/{file.name}": file for file in sorted(forms)}  # a board cannot make them
        notes = _add_engines(opened, members, with_engines=with_engines)
        progress(f"writing {place}")
        hashes = {name: entry.sha256 for name, entry in own.items()}
        written = archive.write_archive(place, members, sha256=hashes, force=force)
    table = archive.read_table(place)
    return PackReport(
        bundle=str(bundle),
        digest=opened.manifest.digest,
        path=place,
        size_bytes=place.stat().st_size,
        sha256=file_sha256(place),
        members={member.name: member.size for member in table.members},
        written=written,
        notes=tuple(notes),
    )


def unpack(
    file: str | Path,
    *,
    out: str | Path = "",
    with_engines: bool = False,
    allow_plugin: Sequence[str] = (),
    progress: Progress = silent,
) -> UnpackReport:
    """Unpack an archive into a new folder, which appears whole and checked, or not at all.

    The archive is untrusted: names, kinds, sizes, CRCs and hashes are checked, and engines and compiled plugins, which
    are code, stay in it unless they are asked for, and so does the wheel of edgecomp, which is installed already.

    Args:
        file: the archive.
        out: a folder that is absent or empty; "": the file's name without its endings, in the current folder.
        with_engines: also plans, whose maker is trusted thereby.
        allow_plugin: sha256 of plugin libraries that may be unpacked, at least their first 12 digits.
        progress: takes one line for each step.

    Raises:
        BundleError: the archive is damaged or hostile; nothing was written. EdgecompError: `out` is taken or full.
    """
    path = Path(file)
    for word in allow_plugin:
        if not _HASH.fullmatch(word.lower()):
            raise InvalidSpec(f"--allow-plugin {word} is no sha256; give at least its first 12 hexadecimal digits")
    place = Path(out) if str(out) else Path(path.name.removesuffix(".zip").removesuffix(".edgecomp"))
    if not str(out) and (place.name == path.name or not _PLAIN.fullmatch(place.name)):
        raise InvalidSpec(f"{path.name} gives no name for the folder; name one with --out")
    left: list[str] = []

    def wanted(name: str) -> bool:
        if name.endswith(".whl"):
            return False
        if with_engines or name.endswith(".timing") or not name.startswith(f"{archive.BUNDLE}/engines/"):
            return True
        left.append(name)
        return False

    def check(folder: Path) -> None:
        progress("checking")
        opened = open_bundle(folder, verify=False)  # each file was hashed while it was written
        require_contained(opened)
        _require_records(opened, [word.lower() for word in allow_plugin])
        digests.append(opened.manifest.digest)

    digests: list[str] = []
    with bundle_lock(place, "bundle unpack", say=progress):
        progress(f"unpacking {path}")
        table = archive.unpack(path, place, wanted=wanted, check=check)
    notes = []
    if left:
        notes.append(
            f"{len(left)} files of engines stayed in the archive, since plans and plugins are code: `edgecomp verify` "
            "builds them again, or --with-engines takes them from a source that you trust"
        )
    members = {member.name: member.size for member in table.members}
    return UnpackReport(str(file), place, place / archive.BUNDLE, digests[0], members, tuple(notes))


def _add_engines(opened: Bundle, members: dict[str, Path | bytes], *, with_engines: bool) -> list[str]:
    """Add timing caches, and plans that are of this bundle; return what was left out and why."""
    notes, plans = [], 0
    hashes = {entry.name: entry.sha256 for entry in opened.manifest.files}
    engines = opened.path / "engines"
    for folder in sorted(engines.iterdir()) if engines.is_dir() else ():
        if not folder.is_dir() or not _PLAIN.fullmatch(folder.name):
            continue
        there = f"{archive.BUNDLE}/engines/{folder.name}"
        members |= {f"{there}/{file.name}": file for file in sorted(folder.glob("[A-Za-z0-9]*.timing"))}
        for plan in sorted(folder.glob("[A-Za-z0-9]*.engine")):
            plans += 1
            if not with_engines:
                continue
            try:
                record = read_record(plan)
            except BuildError as error:
                notes.append(f"{plan.name} was left out: {error}")
                continue
            if record.onnx_sha256 != hashes.get(record.model) or record.sha256 != file_sha256(plan):
                notes.append(f"{plan.name} was left out: it was not built from this bundle, or was altered since")
                continue
            members |= {f"{there}/{file.name}": file for file in (plan, sidecar_path(plan))}
            members |= {f"{there}/{one.library}": folder / one.library for one in record.plugins}
    if plans and not with_engines:
        notes.append(f"{plans} engines were left out, which hold for one GPU and TensorRT; --with-engines takes them")
    return notes


def _require_records(opened: Bundle, allowed: Sequence[str]) -> None:
    """Hold every plan and library that came along to the record beside it, and libraries to what the user allows."""
    engines = opened.path / "engines"
    for folder in sorted(engines.iterdir()) if engines.is_dir() else ():
        libraries: dict[str, str] = {}
        known: set[str] = set()
        for plan in sorted(folder.glob("*.engine")):
            record = _record_of(opened, plan)
            libraries |= {one.library: one.sha256 for one in record.plugins}
            known |= {plan.name, sidecar_path(plan).name}
        for file in sorted(folder.iterdir()):
            if file.suffix == ".so":
                sha256 = file_sha256(file)
                if libraries.get(file.name) != sha256:
                    raise BundleError(f"engines/{folder.name}/{file.name} belongs to no plan beside it; pack it again")
                if not any(sha256.startswith(word) for word in allowed):
                    raise BundleError(
                        f"engines/{folder.name}/{file.name} is a compiled plugin (sha256 {sha256}), which would run "
                        f"with your rights; where you trust it, give --allow-plugin {sha256[:12]}, else leave out "
                        "--with-engines"
                    )
            elif file.suffix != ".timing" and file.name not in known:
                raise BundleError(f"engines/{folder.name}/{file.name} belongs to no plan; pack it again")


def _record_of(opened: Bundle, plan: Path) -> EngineRecord:
    record = read_record(plan)
    if record.sha256 != file_sha256(plan) or record.onnx_sha256 != opened.file(record.model).sha256:
        raise BundleError(
            f"{plan.name} is not the plan that its record describes, or not of this bundle; pack it again"
        )
    return record
