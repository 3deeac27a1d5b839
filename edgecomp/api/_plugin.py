"""`edgecomp plugin`: TensorRT plugins are compiled into the cache, listed, and checked."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from edgecomp.api._progress import Progress, silent
from edgecomp.engines import (
    PluginLibrary,
    build_library,
    cached_libraries,
    installed_flavours,
    load_flavour,
    loaded_library,
    read_library,
    require_library,
)
from edgecomp.engines.network import collecting_logger
from edgecomp.errors import BuildError, MissingDependency, PluginMissing
from edgecomp.report.plugin import CreatorRow, PluginBuild, PluginCheck, PluginFile, PluginRow
from edgecomp.specs import load_plugin, plugin_names

__all__ = ["plugin_build", "plugin_check", "plugin_list"]


def plugin_build(
    name: str,
    *,
    sm: Sequence[int] = (),
    tensorrt_include: str | Path | None = None,
    nvcc: str | Path | None = None,
    out: str | Path | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> PluginBuild:
    """Compile a plugin into the user's cache, unless the library that is there was compiled from the same.

    Args:
        name: a plugin's name.
        sm: compute capabilities, for example `[86, 89]`; none: that of the GPU here.
        tensorrt_include: the folder of NvInfer.h; None: the system's, else that of the package kernel-lens.
        nvcc: the compiler; None: the one on PATH, else the usual place.
        out: a folder that gets a copy.
        force: compile even when nothing changed.
        progress: takes one line for each step.

    Raises:
        UnknownName: no such plugin. InvalidSpec: it is not compiled for that compute capability.
        PluginMissing: no compiler or no headers; the text says where they were looked for.
        BuildError: it does not compile; the text holds the compiler's first lines.
    """
    plugin = load_plugin(name)
    start = time.monotonic()
    library, reused = build_library(
        plugin,
        sm=sm,
        tensorrt_include=Path(tensorrt_include) if tensorrt_include is not None else None,
        nvcc=Path(nvcc) if nvcc is not None else None,
        force=force,
        progress=progress,
    )
    seconds = round(time.monotonic() - start, 3)
    copied = ""
    if out is not None:
        copied = str(_copy(library.path, Path(out) / plugin.library))
    return PluginBuild(name, library, library.path.stat().st_size, seconds, reused, copied)


def plugin_list() -> tuple[PluginRow, ...]:
    """Return every plugin that edgecomp ships, with its compiled libraries."""
    rows = []
    for name in plugin_names():
        plugin = load_plugin(name)
        digest = plugin.source_digest()
        files = tuple(
            PluginFile(library, library.path.stat().st_size, library.description.sources_sha256 == digest)
            for library in cached_libraries(plugin)
        )
        rows.append(
            PluginRow(name, plugin.title, plugin.version, plugin.types, plugin.limits, plugin.sm, plugin.summary, files)
        )
    return tuple(rows)


def plugin_check(file: str | Path, *, runtime: str = "auto") -> PluginCheck:
    """Load a library into this process's TensorRT, and return what it registers there.

    Args:
        file: the library.
        runtime: `tensorrt`, `rtx`, or `auto`: the first that is installed.

    Raises:
        PluginMissing: it is no library, does not load, or registers nothing.
        MissingDependency: there is no TensorRT here.
    """
    path = Path(file)
    require_library(path)
    if runtime == "auto":
        installed = installed_flavours()
        if not installed:
            raise MissingDependency("tensorrt", needed_for="checking a plugin", extra="rtx")
        runtime = installed[0]
    flavour = load_flavour(runtime)
    builder = flavour.module.Builder(collecting_logger(flavour))
    with loaded_library(builder.get_plugin_registry(), path) as found:
        creators = tuple(CreatorRow(namespace, name, version) for name, version, namespace in sorted(found))
    described: tuple[PluginLibrary, ...]
    try:
        described = (read_library(path),)
    except PluginMissing:
        described = ()
    return PluginCheck(path, flavour.name, flavour.version, creators, described)


def _copy(library: Path, place: Path) -> Path:
    fresh = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(library, fresh)
        os.replace(fresh, place)
    except OSError as error:
        raise BuildError(f"{place} cannot be written: {error.strerror}; choose another folder with --out") from error
    finally:
        with contextlib.suppress(OSError):  # above --out stands a file
            fresh.unlink(missing_ok=True)
    return place
