"""Plugin libraries: found, compiled into the user's cache, described, loaded into TensorRT.

A library says what it is in a line of JSON inside the file, which is read without running anything of it. It fits an
engine when op version, sources, compute capability and TensorRT's major version do; nothing else is ever taken.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import re
import secrets
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from edgecomp.engines.adapter import Flavour, other_headers
from edgecomp.engines.gpu import local_gpu_sm
from edgecomp.errors import BuildError, InvalidSpec, PluginMissing
from edgecomp.resources import cache_dir
from edgecomp.specs.origin import file_sha256
from edgecomp.specs.plugin import Plugin

__all__ = [
    "PluginLibrary",
    "build_library",
    "cached_libraries",
    "find_headers",
    "find_nvcc",
    "loaded_library",
    "read_library",
    "require_library",
    "why_unfit",
]

_MARK = b"edgecomp-plugin-info "
_LONGEST_LINE, _LARGEST_LIBRARY = 4096, 1 << 30
_HEADER, _VERSION_HEADER = "NvInferRuntimePlugin.h", "NvInferVersion.h"
_SYSTEM_HEADERS = (
    "/usr/include/x86_64-linux-gnu",
    "/usr/include/aarch64-linux-gnu",
    "/usr/include",
    "/usr/local/tensorrt/include",
    "/usr/local/TensorRT/include",
)
_PACKAGE_OF_HEADERS = ("kernel_lens", "include/tensorrt")  # a development dependency; TensorRT 10.14
_USUAL_NVCC = "/usr/local/cuda/bin/nvcc"
_LINES_SHOWN = 12
_ELF_HEADER = 64  # bytes, in a 64-bit file

Creator = tuple[str, str, str]  # name, version, namespace


class Description(msgspec.Struct, frozen=True):
    """The line of JSON inside a library.

    Attributes:
        plugin: name of the plugin's folder.
        version: of the op.
        sm: compute capabilities that it holds code for.
        tensorrt: version of the headers.
        cuda: release of the compiler.
        sources_sha256: what it was compiled from.
    """

    plugin: str
    version: str
    sm: tuple[int, ...]
    tensorrt: str
    cuda: str
    sources_sha256: str

    @property
    def tensorrt_major(self) -> int:
        """Major version of the headers."""
        return int(self.tensorrt.partition(".")[0])


class PluginLibrary(msgspec.Struct, frozen=True):
    """A library on disk, and what it says of itself."""

    path: Path
    sha256: str
    description: Description


class Headers(msgspec.Struct, frozen=True):
    """TensorRT's headers: the folder, and their version."""

    folder: Path
    version: str


def find_nvcc(named: Path | None = None) -> tuple[Path, str]:
    """Return the compiler, and its release."""
    here = named is not None and named.is_file()
    program = str(named.resolve()) if here and named else shutil.which(named or "nvcc") or str(named or _USUAL_NVCC)
    if not Path(program).is_file():
        is_folder = "is a folder" if Path(program).is_dir() else "is not there"
        where = f"{program} {is_folder}" if named is not None else f"there is no nvcc on PATH, nor {_USUAL_NVCC}"
        raise PluginMissing(
            f"a plugin is compiled with nvcc, and {where}; install the CUDA toolkit, or name it with --nvcc FILE"
        )
    release = re.search(r"release ([\d.]+)", _run([program, "--version"]).stdout)
    if release is None:
        raise PluginMissing(f"`{program} --version` names no release, so it is no nvcc; name another with --nvcc FILE")
    return Path(program), release[1]


def find_headers(named: Path | None = None) -> Headers:
    """Return TensorRT's headers: the folder named, else the system's, else those of the development package."""
    if named is not None:
        if not (named / _HEADER).is_file():
            raise PluginMissing(f"--tensorrt-include {named} holds no {_HEADER}; name the folder with NvInfer.h in it")
        return Headers(named.resolve(), _headers_version(named))
    folders = [Path(folder) for folder in _SYSTEM_HEADERS]
    package, inside = _PACKAGE_OF_HEADERS
    found = importlib.util.find_spec(package)
    if found is not None and found.submodule_search_locations:
        folders += [Path(place) / inside for place in found.submodule_search_locations]
    for folder in folders:
        if (folder / _HEADER).is_file():
            return Headers(folder, _headers_version(folder))
    raise PluginMissing(
        f"a plugin is compiled with TensorRT's headers, and {_HEADER} is in none of {', '.join(_SYSTEM_HEADERS)}; "
        f"install libnvinfer-dev (JetPack has it) or the package kernel-lens, or name a folder with "
        f"--tensorrt-include DIR"
    )


def build_library(
    plugin: Plugin,
    *,
    sm: Sequence[int] = (),
    tensorrt_include: Path | None = None,
    nvcc: Path | None = None,
    force: bool = False,
    progress: Callable[[str], None],
) -> tuple[PluginLibrary, bool]:
    """Compile a plugin into the cache, unless it is there; return the library, and whether it was there.

    Args:
        plugin: what to compile.
        sm: compute capabilities; none: that of the GPU here.
        tensorrt_include: folder of TensorRT's headers; None: found.
        nvcc: the compiler; None: found.
        force: compile even when nothing changed.
        progress: receives a line for each step.
    """
    wanted = _require_sm(plugin, sm)
    compiler, release = find_nvcc(nvcc)
    headers = find_headers(tensorrt_include)
    description = Description(plugin.name, plugin.version, wanted, headers.version, release, plugin.source_digest())
    folder = _cache_of(plugin) / _folder_name(description)
    path = folder / plugin.library
    if path.is_file() and not force:
        library = _read_whole(path)
        if library is not None and _is_same(library.description, description):
            progress(f"{plugin.name}: kept, nothing changed since it was compiled ({path})")
            return library, True
    _require_compiles(compiler, release, wanted)
    names = ", ".join(f"SM{number}" for number in wanted)
    progress(f"{plugin.name}: compiling for {names} with CUDA {release} and the headers of TensorRT {headers.version}")
    _compile(plugin, compiler, headers, description, path)
    return read_library(path), False


def cached_libraries(plugin: Plugin) -> tuple[PluginLibrary, ...]:
    """Return the whole libraries of the cache, whatever they were compiled from; the newest first."""
    paths = sorted(_cache_of(plugin).glob(f"*/{plugin.library}"), key=lambda path: -path.stat().st_mtime)
    return tuple(library for path in paths if (library := _read_whole(path)) is not None)


def read_library(path: Path) -> PluginLibrary:
    """Return what a library says of itself; nothing of it is run."""
    content = _content_of(path)
    at = content.find(_MARK)
    if at < 0:
        raise PluginMissing(
            f"{path} does not say for which op, compute capability and TensorRT it was compiled; "
            f"compile it with: edgecomp plugin build"
        )
    line = content[at + len(_MARK) : at + _LONGEST_LINE].partition(b"\0")[0]
    try:
        description = msgspec.json.decode(line, type=Description)
        _ = description.tensorrt_major
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
        raise PluginMissing(
            f"{path} describes itself in a way that is not understood ({error}); compile it again"
        ) from None
    return PluginLibrary(path, hashlib.sha256(content).hexdigest(), description)


def require_library(path: Path) -> None:
    """Raise unless a file is a shared library."""
    _content_of(path)


def why_unfit(library: PluginLibrary, plugin: Plugin, sm: int, flavour: Flavour) -> str:
    """Return why a library cannot serve an engine, with what to do, or ""."""
    found, again = library.description, f"edgecomp plugin build {plugin.name} --sm {sm}"
    if found.plugin != plugin.name:
        return f"it holds the plugin {found.plugin!r}, and {plugin.name!r} is needed; compile that with: {again}"
    if found.version != plugin.version:
        return f"it runs version {found.version} of {plugin.title}, and version {plugin.version} is needed: {again}"
    if sm not in found.sm:
        names = ", ".join(f"SM{number}" for number in found.sm)
        return f"it was compiled for {names}, and SM{sm} is needed: {again}"
    if wanted := other_headers(flavour, found.tensorrt_major):
        return (
            f"it was compiled with the headers of TensorRT {found.tensorrt}, and {flavour.title} is here: "
            f"{again} --tensorrt-include DIR, with the headers of TensorRT {wanted}"
        )
    if found.sources_sha256 != plugin.source_digest():
        return f"it was compiled from other sources than those of this edgecomp: {again}"
    return ""


@contextlib.contextmanager
def loaded_library(registry: Any, path: Path, creators: Sequence[Creator] = ()) -> Iterator[tuple[Creator, ...]]:
    """Load a library into a registry of TensorRT, yield the creators that came with it, and take it out again.

    Args:
        registry: the registry of a builder.
        path: the library.
        creators: those that it has to bring.
    """
    require_library(path)
    try:
        # This handle is never closed: a network that an exception keeps alive holds objects whose code is in there.
        ctypes.CDLL(str(path.resolve()))
    except OSError as error:
        raise PluginMissing(f"the library {path} does not load: {error}; compile it on this machine") from None
    before = _creators(registry)
    handle = registry.load_library(str(path.resolve()))
    try:
        found = tuple(creator for creator in _creators(registry) if creator not in before)
        if handle is None or not found:
            known = [creator for creator in creators if creator in before]
            because = f"; {known[0][0]} is registered already, by another library of this process" if known else ""
            raise PluginMissing(
                f"{path} loads and registers no plugin{because}; it has to export getCreators, compile it with: "
                f"edgecomp plugin build"
            )
        missing = [creator for creator in creators if creator not in found]
        if missing:
            raise PluginMissing(f"{path} registers {_names(found)}, and not {_names(missing)}; compile it again")
        yield found
    finally:
        if handle is not None:
            registry.deregister_library(handle)


def _names(creators: Sequence[Creator]) -> str:
    return ", ".join(f"{namespace}::{name} version {version}" for name, version, namespace in creators)


def _creators(registry: Any) -> set[Creator]:
    return {(c.name, c.plugin_version, c.plugin_namespace) for c in registry.all_creators}


def _content_of(path: Path) -> bytes:
    try:
        if path.stat().st_size > _LARGEST_LIBRARY:
            raise PluginMissing(
                f"{path} is larger than {_LARGEST_LIBRARY} bytes and no plugin library; name another file"
            )
        content = path.read_bytes()
    except OSError as error:
        raise PluginMissing(f"the plugin library {path} cannot be read: {error.strerror}; check the path") from None
    if not content.startswith(b"\x7fELF"):
        raise PluginMissing(f"{path} is no shared library; name the .so that `edgecomp plugin build` wrote")
    if len(content) < _end_of_elf(content):
        raise PluginMissing(
            f"{path} is truncated: it has {len(content)} bytes and its tables reach to {_end_of_elf(content)}; copy or "
            "compile it again"
        )
    return content


def _end_of_elf(content: bytes) -> int:
    """Return where the last segment or the table of sections of a 64-bit ELF file ends; loading a shorter one kills."""
    header = struct.Struct("<32xQQ6xHHHH")  # e_phoff, e_shoff, e_phentsize, e_phnum, e_shentsize, e_shnum
    if len(content) < _ELF_HEADER:
        return _ELF_HEADER
    segments, sections, segment_size, segment_count, section_size, section_count = header.unpack_from(content)
    ends = [segments + segment_size * segment_count, sections + section_size * section_count]
    if ends[0] <= len(content):
        for at in range(segments, ends[0], segment_size or 1):
            offset, size = struct.unpack_from("<8xQ16xQ", content, at)  # p_offset, p_filesz
            ends.append(offset + size)
    return int(max(ends))


def _read_whole(path: Path) -> PluginLibrary | None:
    """Return a library of the cache when its bytes are the ones that were written; None: it is compiled again."""
    try:
        library = read_library(path)
        recorded = _digest_file(path).read_text(encoding="ascii").strip()
    except (PluginMissing, OSError, UnicodeDecodeError):
        return None
    return library if recorded == library.sha256 else None


def _is_same(found: Description, wanted: Description) -> bool:
    return msgspec.structs.replace(found, tensorrt=wanted.tensorrt) == wanted


def _require_sm(plugin: Plugin, sm: Sequence[int]) -> tuple[int, ...]:
    wanted = tuple(sorted(set(sm)))
    if not wanted:
        local = local_gpu_sm()
        if local is None:
            raise InvalidSpec("there is no NVIDIA GPU on this machine; name what to compile for, for example --sm 87")
        wanted = (local,)
    unknown = [number for number in wanted if number not in plugin.sm]
    if unknown:
        raise InvalidSpec(
            f"plugin {plugin.name} is not compiled for SM{unknown[0]}; it is for {', '.join(map(str, plugin.sm))}"
        )
    return wanted


def _require_compiles(compiler: Path, release: str, wanted: Sequence[int]) -> None:
    known = set(re.findall(r"sm_(\d+)", _run([str(compiler), "--list-gpu-code"]).stdout))
    missing = [number for number in wanted if str(number) not in known]
    if missing:
        raise PluginMissing(
            f"nvcc {release} ({compiler}) does not compile for SM{missing[0]}; it does for "
            f"{', '.join(sorted(known, key=int)) or 'nothing'}. Name another with --nvcc FILE"
        )


def _compile(plugin: Plugin, compiler: Path, headers: Headers, description: Description, path: Path) -> None:
    """Compile into a folder beside the place of the library, and move the result there in one step."""
    line = msgspec.json.encode(description).decode().replace("\\", "\\\\").replace('"', '\\"')
    codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in description.sm]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".compiling-", dir=path.parent) as scratch:
            info, out = Path(scratch) / "info.h", Path(scratch) / plugin.library
            info.write_text(f'#define EDGECOMP_PLUGIN_INFO "{line}"\n', encoding="ascii")
            done = _run(
                [
                    *(str(compiler), "-shared", "-std=c++17", "-O3", "-cudart=static", "--threads=0"),
                    *("-Xcompiler=-fPIC,-fvisibility=hidden", f"-include={info}", f"-isystem={headers.folder}"),
                    *codes,
                    *(str(plugin.folder / name) for name in plugin.sources),
                    f"-o={out}",
                ]
            )
            if done.returncode != 0:
                words = [text for text in (done.stdout + done.stderr).splitlines() if text.strip()]
                raise BuildError(
                    f"{plugin.name} does not compile with {compiler} and the headers in {headers.folder} (exit "
                    f"{done.returncode}); another nvcc (--nvcc) or other headers (--tensorrt-include) may:\n"
                    + "\n".join(words[:_LINES_SHOWN])
                )
            if not out.is_file() or not out.read_bytes()[:4] == b"\x7fELF":
                raise BuildError(
                    f"{plugin.name}: {compiler} ended well and wrote no shared library; name another with --nvcc FILE"
                )
            digest = file_sha256(out)
            _digest_file(path).unlink(missing_ok=True)
            os.replace(out, path)
            fresh = path.with_name(f".{secrets.token_hex(4)}.tmp")
            fresh.write_text(f"{digest}\n", encoding="ascii")
            os.replace(fresh, _digest_file(path))
    except OSError as error:
        raise BuildError(
            f"{path} cannot be written: {error.strerror}; free space, or set EDGECOMP_CACHE_DIR to another folder"
        ) from error


def _headers_version(folder: Path) -> str:
    try:
        text = (folder / _VERSION_HEADER).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise PluginMissing(
            f"{folder / _VERSION_HEADER} cannot be read: {error.strerror}; name other headers"
        ) from None
    values: dict[str, str] = dict(re.findall(r"^#define\s+(\w+)\s+(\w+)", text, re.MULTILINE))
    parts = []
    for part in ("MAJOR", "MINOR", "PATCH"):
        value = values.get(f"NV_TENSORRT_{part}", "")
        value = values.get(value, value)  # newer headers go through a second name
        if not value.isdigit():
            raise PluginMissing(f"{folder / _VERSION_HEADER} does not state NV_TENSORRT_{part}; name other headers")
        parts.append(value)
    return ".".join(parts)


def _cache_of(plugin: Plugin) -> Path:
    return cache_dir() / "plugins" / plugin.name


def _folder_name(description: Description) -> str:
    names = ".".join(map(str, description.sm))
    return f"{description.sources_sha256[:12]}-sm{names}-trt{description.tensorrt_major}-cuda{description.cuda}"


def _digest_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _run(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=3600, check=False)
    except OSError as error:
        raise PluginMissing(f"{words[0]} cannot be run: {error.strerror}; name another with --nvcc FILE") from None
    except subprocess.TimeoutExpired:
        raise BuildError(f"{words[0]} did not end within an hour; compile for fewer compute capabilities") from None
