"""Bundles: a folder of graphs, weights and goldens with a hashed manifest, opened only when it is whole.

`docs/bundle.md` documents the folder and the manifest's fields.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from edgecomp.errors import BundleError, EdgecompError, InvalidSpec
from edgecomp.specs import TokenBudget, read_count
from edgecomp.specs.manifest import Bucket, Manifest, StoredFile
from edgecomp.specs.origin import file_sha256
from edgecomp.specs.router import router_names

__all__ = [
    "GOLDEN",
    "MANIFEST",
    "WEIGHTS",
    "Bundle",
    "digest_of",
    "new_bundle",
    "open_bundle",
    "replace_manifest",
    "seal",
]

MANIFEST, WEIGHTS, GOLDEN = "manifest.json", "weights.data", "golden.safetensors"
SCHEMA = 4
_KIND = "edgecomp bundle"
_BELOW = ("engines", "parity", "profiles")  # folders that later verbs write
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LARGEST_MANIFEST = 16 << 20
_LARGEST_GOLDEN = 8 << 30  # bytes; the file is read as a whole
_MOST_ELEMENTS = (1 << 31) - 1  # of one tensor; what TensorRT takes
_LARGEST_IMAGE = 8192  # pixels a side; what `export` takes


class _Listing(msgspec.Struct, frozen=True):
    """The few fields that tell whose a folder is; everything else is left unread."""

    kind: str = ""
    files: list[dict[str, Any]] = []


class Bundle(msgspec.Struct, frozen=True):
    """An opened bundle: its folder, and its manifest, both checked."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> StoredFile:
        """Return what the manifest says of a root file."""
        for entry in self.manifest.files:
            if entry.name == name:
                return entry
        raise BundleError(f"bundle {self.path} has no file {name!r} in its manifest; export it again")

    def select(self, *, budget: str | int | None = None, batch: int | None = None) -> tuple[Bucket, ...]:
        """Return the buckets of a budget (a count or a percentage) and batch; all of them where left out."""
        buckets = self.manifest.buckets
        kept = sorted({bucket.budget.tokens_out for bucket in buckets})
        batches = sorted({bucket.batch for bucket in buckets})
        if budget is not None:
            count = read_count(str(budget), tokens_in=buckets[0].budget.tokens_in)
            if count not in kept:
                raise InvalidSpec(f"bundle {self.path} has no budget {budget}; it has {', '.join(map(str, kept))}")
            buckets = tuple(bucket for bucket in buckets if bucket.budget.tokens_out == count)
        if batch is not None:
            if batch not in batches:
                raise InvalidSpec(f"bundle {self.path} has no batch {batch}; it has {', '.join(map(str, batches))}")
            buckets = tuple(bucket for bucket in buckets if bucket.batch == batch)
        return buckets


# -- reading ------------------------------------------------------------------------------------------------


def open_bundle(path: Path, *, verify: bool = True) -> Bundle:
    """Open a bundle, checking the manifest's own digest and every root file's size and sha256.

    Args:
        verify: False reads the manifest and compares names and sizes, but hashes nothing.

    Raises:
        BundleError: no bundle; a newer schema (named by number); a file missing, added, truncated or altered;
            a name or link that leaves the folder.
    """
    if not path.is_dir():
        raise BundleError(f"bundle {path} is not a folder; `edgecomp export` makes one")
    manifest = _read_manifest(path)
    _require_named(path, manifest)
    _require_router(path, manifest)
    _require_sizes(path, manifest)
    _require_listing(path, manifest)
    for entry in manifest.files:
        size = (path / entry.name).stat().st_size
        if size != entry.size:
            raise BundleError(
                f"bundle {path}: {entry.name} has {size} bytes and the manifest says {entry.size}; "
                "it is truncated or altered, copy or export the bundle again"
            )
        if verify and (seen := file_sha256(path / entry.name)) != entry.sha256:
            raise BundleError(
                f"bundle {path}: {entry.name} has sha256 {seen[:12]} and the manifest says {entry.sha256[:12]}; "
                "it was altered, copy or export the bundle again"
            )
    return Bundle(path, manifest)


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    if file.is_symlink() or not file.is_file():
        raise BundleError(f"folder {path} holds no {MANIFEST}, so it is no bundle; `edgecomp export` makes one")
    if file.stat().st_size > _LARGEST_MANIFEST:
        raise BundleError(f"bundle {path}: {MANIFEST} is larger than {_LARGEST_MANIFEST} bytes; it is not edgecomp's")
    content = file.read_bytes()
    try:
        raw = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"bundle {path}: {MANIFEST} is not JSON ({error}); copy or export it again") from None
    if not isinstance(raw, dict) or raw.get("kind") != _KIND:
        raise BundleError(f"bundle {path}: {MANIFEST} is not of an edgecomp bundle; `edgecomp export` makes one")
    schema = raw.get("schema")
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        raise BundleError(
            f"bundle {path} has schema {schema!r} and this edgecomp reads up to {SCHEMA}; upgrade edgecomp"
        )
    if digest_of(raw) != raw.get("digest"):
        raise BundleError(f"bundle {path}: {MANIFEST} does not match its own digest; it was altered, export it again")
    if schema == 1:  # before there were stems and routers
        raw = {**raw, "stem": [], "router": None}
    try:
        return msgspec.convert(raw, Manifest)
    except msgspec.ValidationError as error:
        raise BundleError(f"bundle {path}: {MANIFEST} is not as schema {schema} says: {error}") from None


def _require_named(path: Path, manifest: Manifest) -> None:
    """Refuse file names that leave the folder, and graphs that are not among the hashed files."""
    names = [entry.name for entry in manifest.files]
    graphs = [graph.model for graph in manifest.graphs]
    stems = {graph.model for graph in manifest.stem}
    for name in (*names, *graphs):
        if not _NAME.fullmatch(name):
            raise BundleError(
                f"bundle {path}: the manifest names {name!r}, which leaves the folder or is no plain name; "
                "take the bundle from a source that you trust"
            )
    used = {WEIGHTS, GOLDEN, *graphs}
    if lost := {graph.stem for graph in manifest.graphs if graph.stem} - stems:
        raise BundleError(f"bundle {path}: the manifest has no stem {', '.join(sorted(lost))}; export the bundle again")
    for what, found in (("does not hash", used - set(names)), ("gives no use to", set(names) - used)):
        if found:
            raise BundleError(
                f"bundle {path}: the manifest {what} {', '.join(map(repr, sorted(found)))}; export the bundle again"
            )
    if len(names) != len(set(names)) or not manifest.buckets:
        raise BundleError(f"bundle {path}: the manifest names a file twice or has no bucket; export the bundle again")


def _require_router(path: Path, manifest: Manifest) -> None:
    """Refuse a router that does not fit the buckets."""
    router = manifest.router
    if router is None:
        return
    kept = {bucket.budget.tokens_out for bucket in manifest.buckets}
    fits = router.fixed in kept if router.name == "fixed" else len(router.thresholds) == len(kept) - 1
    fits = fits and router.name in router_names() and (router.name == "fixed") == (not router.graphs)
    for graph in router.graphs:
        outputs = {spec.name: spec.shape[-1] for spec in graph.outputs}
        fits = fits and outputs.get("need") == len(kept) - 1 and outputs.get("signals") == len(router.signals)
        fits = fits and router.reads_words == any(spec.name == "words" for spec in graph.inputs)
    if not fits or not all(math.isfinite(value) for value in router.thresholds):
        raise BundleError(
            f"bundle {path}: the manifest's router {router.name!r} does not fit its {len(kept)} buckets (thresholds "
            f"{list(router.thresholds)}, fixed {router.fixed}); export the bundle again"
        )


def _require_sizes(path: Path, manifest: Manifest) -> None:
    """Refuse sizes that nothing here could hold, before anything is allocated for them."""
    for graph in manifest.graphs:
        for spec in (*graph.inputs, *graph.outputs):
            if min(spec.shape, default=1) < 1 or math.prod(spec.shape) > _MOST_ELEMENTS:
                raise BundleError(
                    f"bundle {path}: {graph.model} has a tensor {str(spec)[:200]}, which is not between 1 and "
                    f"{_MOST_ELEMENTS} elements; export the bundle again"
                )
    sides = (manifest.image_size, manifest.preprocess.size if manifest.preprocess is not None else 0)
    # `crop` divides the size: an image is resized to it before the centre is cut out
    resized = manifest.preprocess.size / manifest.preprocess.crop if manifest.preprocess is not None else 0
    if max(sides) > _LARGEST_IMAGE or resized > 4 * _LARGEST_IMAGE:
        raise BundleError(
            f"bundle {path}: images of {max(sides)} pixels a side (resized to {resized:.0f}) are above "
            f"{_LARGEST_IMAGE}; export the bundle again"
        )
    golden = sum(entry.size for entry in manifest.files if entry.role == "golden")
    if golden > _LARGEST_GOLDEN:
        raise BundleError(
            f"bundle {path}: {GOLDEN} has {golden} bytes, above {_LARGEST_GOLDEN}; export smaller batches"
        )


def _require_listing(path: Path, manifest: Manifest) -> None:
    expected = {MANIFEST, *(entry.name for entry in manifest.files)}
    seen = set()
    with os.scandir(path) as scanned:
        entries = sorted(scanned, key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_symlink():
            raise BundleError(f"bundle {path}: {entry.name} is a link; a bundle holds plain files alone, remove it")
        if entry.is_dir():
            if entry.name not in _BELOW:
                raise BundleError(f"bundle {path}: folder {entry.name} does not belong there; remove it")
            _require_plain(path, path / entry.name)
            continue
        if not entry.is_file():
            raise BundleError(f"bundle {path}: {entry.name} is a pipe, socket or device, not a file; remove it")
        seen.add(entry.name)
    for what, names in (("missing", expected - seen), ("added", seen - expected)):
        if names:
            raise BundleError(
                f"bundle {path}: {', '.join(sorted(names))} {'was' if len(names) == 1 else 'were'} {what}; "
                + ("copy or export the bundle again" if what == "missing" else "remove what does not belong there")
            )


def _require_plain(path: Path, folder: Path) -> None:
    """Refuse links, pipes, sockets and devices below a folder: a link leads away, and reading a pipe never ends."""
    for above, folders, files in os.walk(folder):
        for name in (*folders, *files):
            found = Path(above, name)
            if found.is_symlink() or not (found.is_dir() or found.is_file()):
                raise BundleError(
                    f"bundle {path}: {found.relative_to(path)} is a link, pipe, socket or device; a bundle holds plain "
                    "files alone, remove it"
                )


def digest_of(manifest: Mapping[str, Any]) -> str:
    """Return the sha256 of a manifest's canonical JSON (keys sorted, no digest)."""
    return hashlib.sha256(msgspec.json.encode({**manifest, "digest": ""}, order="sorted")).hexdigest()


# -- writing ------------------------------------------------------------------------------------------------


def seal(folder: Path, manifest: Manifest, roles: Mapping[str, str]) -> Manifest:
    """Hash every file of `folder`, write the manifest beside them, and return it.

    Args:
        roles: what each file is, by name.
    """
    files = tuple(
        StoredFile(name, roles[name], (folder / name).stat().st_size, file_sha256(folder / name))  # type: ignore[arg-type]
        for name in sorted(roles)
    )
    content, sealed = _encode(msgspec.structs.replace(manifest, files=files))
    (folder / MANIFEST).write_bytes(content)
    return sealed


def replace_manifest(bundle: Bundle, manifest: Manifest) -> None:
    """Exchange a bundle's manifest for one that names the same files; the new one is there whole, or the old one."""
    target = bundle.path / MANIFEST
    beside = bundle.path.parent / f".{bundle.path.name}.{os.getpid()}-{secrets.token_hex(4)}.json"
    try:
        beside.write_bytes(_encode(manifest)[0])
        _sync(beside)
        os.replace(beside, target)
        _sync(bundle.path)
    except OSError as error:
        raise EdgecompError(
            f"bundle {bundle.path}: {MANIFEST} could not be written: {error.strerror}; nothing was changed"
        ) from error
    finally:
        with suppress(OSError):  # a file system that became read-only refuses even what is not there
            beside.unlink(missing_ok=True)


def _encode(manifest: Manifest) -> tuple[bytes, Manifest]:
    """Return a manifest's bytes, and the manifest with its digest."""
    raw = msgspec.to_builtins(msgspec.structs.replace(manifest, schema=SCHEMA, kind=_KIND, digest=""))
    raw["digest"] = digest_of(raw)
    content = msgspec.json.format(msgspec.json.encode(raw, order="sorted"), indent=1)
    return content + b"\n", msgspec.convert(raw, Manifest)


@contextmanager
def new_bundle(out: Path, *, force: bool) -> Iterator[Path]:
    """Give a temporary sibling of `out` to fill; rename it to `out` when the block ends without an error.

    With `force`, a bundle in the way is exchanged in one step and then removed. After an error or Ctrl-C the
    sibling is removed and `out` is what it was.

    Raises:
        EdgecompError: `out` is something that must not be replaced, or cannot be written.
    """
    require_free(out, force=force)
    temporary = out.parent / f".{out.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    made = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        for file in sorted(temporary.rglob("*")):
            _sync(file)
        _sync(temporary)
        require_free(out, force=force)  # again: something may have come in the meantime
        _move(temporary, out, force=force)
        _sync(out.parent)
    except OSError as error:
        what = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is spent"}.get(
            error.errno or 0, error.strerror
        )
        raise EdgecompError(
            f"bundle {out} could not be written: {what} ({error.filename or temporary}); "
            "nothing was changed. Free space or choose another --out"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # not empty: the bundle is in it
                folder.rmdir()


def require_free(out: Path, *, force: bool) -> None:
    """Refuse to write where something else is."""
    if out.absolute() in (Path.cwd(), *Path.cwd().parents):
        raise EdgecompError(f"--out {out} is the current folder, or holds it; name a new folder")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise EdgecompError(f"--out {out} is a file or a link, not a folder; choose another --out or move it away")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir():
        raise EdgecompError(f"--out {out} lies below {above}, which is a file; choose another --out")
    if not os.access(above, os.W_OK | os.X_OK):
        raise EdgecompError(f"--out {out}: the folder {above} cannot be written to; choose another --out")
    if not out.is_dir():
        return
    if not any(out.iterdir()):
        return
    foreign = _foreign_entries(out)
    if foreign:
        names = ", ".join(foreign[:3])
        raise EdgecompError(
            f"--out {out} is not empty ({names}) and no bundle of edgecomp alone; edgecomp never removes what it "
            "did not make, choose another --out"
        )
    if not force:
        raise EdgecompError(f"--out {out} holds another bundle; give --force to replace it, or another --out")


def _foreign_entries(folder: Path) -> list[str]:
    """Return the names in a folder that no manifest of edgecomp beside them accounts for."""
    names = sorted(entry.name for entry in folder.iterdir())
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=_Listing)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return names
    if manifest.kind != _KIND:
        return names
    own = {MANIFEST, *_BELOW, *(entry["name"] for entry in manifest.files if isinstance(entry.get("name"), str))}
    return [name for name in names if name not in own]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move(temporary: Path, out: Path, *, force: bool) -> None:
    """Put `temporary` in the place of `out`, which is absent, an empty folder, or with `force` an old bundle.

    Without `force` the rename itself refuses a folder that is not empty, whenever it came to be so.
    """
    if not force or not out.exists() or not any(out.iterdir()):
        os.replace(temporary, out)
        return
    if _exchange(temporary, out):
        return  # the old bundle now bears the temporary name, and is removed by the caller
    aside = out.parent / f".{out.name}.{os.getpid()}.old"
    os.replace(out, aside)
    try:
        os.replace(temporary, out)
    except BaseException:
        os.replace(aside, out)
        raise
    shutil.rmtree(aside)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step (Linux' renameat2); False where the system or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    at_cwd, exchange = -100, 2
    return bool(renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0)


def golden_key(role: str, case: str, name: str, *, part: str = "") -> str:
    """Return the name of a tensor in the golden file: `input.photo.image`, `output.photo.m25.compressed`.

    Args:
        part: of an output, whose it is: `m25` for the bucket that keeps 25 tokens, `plain` for the plain model.
    """
    return ".".join(word for word in (role, case, part, name) if word)


def choice_key(case: str, part: str, number: int, name: str) -> str:
    """Return the name of what the original chose, in the order of its choices: `choice.photo.m25.003.TopK.scores`."""
    return f"choice.{case}.{part}.{number:03}.{name}"


def bucket_file(budget: TokenBudget, batch: int) -> str:
    """Return the file name of a bucket's graph."""
    return f"model.m{budget.tokens_out}.b{batch}.onnx"


def side_file(name: str, batch: int, batches: Sequence[int]) -> str:
    """Return the file name of plain graph, stem or router: `plain.onnx`, with the batch where there are several."""
    return f"{name}.onnx" if len(batches) == 1 else f"{name}.b{batch}.onnx"
