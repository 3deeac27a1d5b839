"""`edgecomp build`: a bundle's graphs become TensorRT engines for a target."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from edgecomp.api._plugin_word import require_plugin_word
from edgecomp.api._progress import Progress, silent
from edgecomp.bundle import WEIGHTS, open_bundle
from edgecomp.engines import (
    OWN,
    build_engine,
    find_plugin_nodes,
    local_gpu_sm,
    require_target_runs,
    settings_of,
)
from edgecomp.errors import BundleError, EdgecompError, InvalidSpec, TargetMismatch
from edgecomp.report.build import BuildReport, EngineFile
from edgecomp.specs import Target, load_target, target_names

__all__ = ["build", "local_target"]

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def build(
    bundle: str | Path,
    *,
    target: str,
    runtime: str = "auto",
    budget: str | int | None = None,
    batch: int | None = None,
    workspace_mib: int = 0,
    opt_level: int = OWN,
    low_memory: bool = False,
    timing_cache: str = "auto",
    plugin: str = "auto",
    allow_plugin: Sequence[str] = (),
    force: bool = False,
    force_memory: bool = False,
    check_stable: bool = False,
    progress: Progress = silent,
) -> BuildReport:
    """Build an engine for each bucket and its stem, strongly typed, unless one is there that was built from the same.

    Args:
        bundle: the folder; engines go to `engines/<target>/` in it.
        target: a target's name, `auto` for the GPU of this machine, or the path of a target's TOML file.
        runtime: `tensorrt`, `rtx` (TensorRT for RTX), or `auto`: full TensorRT where it is installed and fits.
        budget, batch: only these buckets and their stem; None: all, the router and the plain model.
        workspace_mib: the most scratch memory of a layer; 0: the builder's own limit.
        opt_level: 0 (builds quickly) to 5 (tries most); -1: the builder's own.
        low_memory: take the preset `low-memory`; workspace and level that are given stand above it.
        timing_cache: `auto` keeps one for each target and TensorRT in the user's cache folder; `off`; or a file.
        plugin: `auto` takes a compiled library that fits the target, and else the function bodies of the graph;
            `require` compiles one where nvcc and headers are there, and fails otherwise; `off` takes none; a path
            that ends in `.so` takes that library.
        allow_plugin: sha256 of libraries inside the bundle that may be loaded, at least 12 digits.
        force: build even when nothing changed.
        force_memory: build on a board whose CPU and GPU share memory, though it is likely not to suffice.
        check_stable: build each engine once more, in memory, and compare the bytes; the report tells.
        progress: takes one line for each step.

    Raises:
        BundleError: the bundle is not whole. UnknownName: no such target.
        TargetMismatch: what is installed cannot build for this target; the text says which machine can.
        BuildError: the parser or the builder refuses a graph, naming the node.
        PluginMissing: a plugin was asked for, and there is none that fits; the text says what is missing.
    """
    settings = settings_of(preset="low-memory" if low_memory else "", workspace_mib=workspace_mib, opt_level=opt_level)
    require_plugin_word(Path(bundle), plugin, allow_plugin)
    chosen = local_target() if target == "auto" else load_target(target)
    # The precision, before any file is hashed: what the hardware lacks does not get better by waiting.
    require_target_runs(open_bundle(Path(bundle), verify=False).manifest.precision, chosen)
    opened = open_bundle(Path(bundle))
    buckets = opened.select(budget=budget, batch=batch)
    models = [*dict.fromkeys(bucket.stem for bucket in buckets if bucket.stem), *(bucket.model for bucket in buckets)]
    if budget is None:
        others = (*opened.manifest.routers, *opened.manifest.plain)
        models += [graph.model for graph in others if batch in (None, graph.batch)]
    if not _PLAIN_NAME.fullmatch(chosen.name):
        raise InvalidSpec(f"target name {chosen.name!r} in {target} is no plain name; engines/<name>/ must stay below")
    folder = opened.path / "engines" / chosen.name
    if opened.path.resolve() not in folder.resolve().parents:
        raise BundleError(f"bundle {opened.path}: {folder} is a link that leaves the bundle; remove it")
    merging = [model for model in models if find_plugin_nodes(opened.path / model)]
    graphs = {graph.model: graph for graph in opened.manifest.graphs}
    built = []
    for model in models:
        # Where one bucket merges, `require` is about that one: the plain model never does.
        wanted = plugin if model in merging or not merging else "off"
        engine = build_engine(
            opened.path / model,
            folder,
            target=chosen,
            runtime=runtime,
            precision=graphs[model].precision,
            onnx_sha256=opened.file(model).sha256,
            weights_sha256=opened.file(WEIGHTS).sha256,
            weight_bytes=opened.file(WEIGHTS).size,
            fp32_nodes=tuple(graphs[model].islands),
            settings=settings,
            timing_cache=timing_cache,
            plugin=wanted,
            force=force,
            force_memory=force_memory,
            check_stable=check_stable,
            progress=progress,
        )
        built.append(
            EngineFile(engine.path, engine.record, engine.reused, engine.plugins, engine.notes, engine.differing_bytes)
        )
    record = built[0].record
    return BuildReport(str(bundle), chosen.name, chosen.sm, record.runtime, record.runtime_version, tuple(built))


def local_target() -> Target:
    """Return the target whose compute capability the local GPU has."""
    sm = local_gpu_sm()
    if sm is None:
        raise EdgecompError(
            f"--target auto: there is no NVIDIA GPU on this machine; name a target: {', '.join(target_names())}"
        )
    fitting = [target for name in target_names() if (target := load_target(name)).sm == sm]
    if not fitting:
        raise TargetMismatch(f"--target auto: no target has compute capability SM{sm}; write one (README, a target)")
    if len(fitting) > 1:
        raise TargetMismatch(
            f"--target auto: this GPU is SM{sm}, and so are {', '.join(target.name for target in fitting)}; name one"
        )
    return fitting[0]
