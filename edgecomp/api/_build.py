"""`edgecomp build`: a bundle's graphs become TensorRT engines for a target."""

from __future__ import annotations

import re
from pathlib import Path

from edgecomp.api._progress import Progress, silent
from edgecomp.bundle import WEIGHTS, open_bundle
from edgecomp.engines import build_engine, find_plugin_nodes, local_gpu_sm
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
    plugin: str = "auto",
    force: bool = False,
    progress: Progress = silent,
) -> BuildReport:
    """Build an engine for each bucket and its stem, strongly typed, unless one is there that was built from the same.

    Args:
        bundle: the folder; engines go to `engines/<target>/` in it.
        target: a target's name, `auto` for the GPU of this machine, or the path of a target's TOML file.
        runtime: `tensorrt`, `rtx` (TensorRT for RTX), or `auto`: full TensorRT where it is installed and fits.
        budget, batch: only these buckets and their stem; None: all, the router and the plain model.
        workspace_mib: the most scratch memory of a layer; 0: the builder's own limit.
        plugin: `auto` takes a compiled library that fits the target, and else the function bodies of the graph;
            `require` compiles one where nvcc and headers are there, and fails otherwise; `off` takes none; a path
            that ends in `.so` takes that library.
        force: build even when nothing changed.
        progress: takes one line for each step.

    Raises:
        BundleError: the bundle is not whole. UnknownName: no such target.
        TargetMismatch: what is installed cannot build for this target; the text says which machine can.
        BuildError: the parser or the builder refuses a graph, naming the node.
        PluginMissing: a plugin was asked for, and there is none that fits; the text says what is missing.
    """
    if not 0 <= workspace_mib <= 1 << 20:
        raise InvalidSpec(f"workspace {workspace_mib} MiB is not between 0 (the builder's own limit) and {1 << 20}")
    chosen = local_target() if target == "auto" else load_target(target)
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
    built = []
    for model in models:
        # Where one bucket merges, `require` is about that one: the plain model never does.
        wanted = plugin if model in merging or not merging else "off"
        engine = build_engine(
            opened.path / model,
            folder,
            target=chosen,
            runtime=runtime,
            precision=opened.manifest.precision,
            onnx_sha256=opened.file(model).sha256,
            weights_sha256=opened.file(WEIGHTS).sha256,
            workspace_mib=workspace_mib,
            plugin=wanted,
            force=force,
            progress=progress,
        )
        built.append(EngineFile(engine.path, engine.record, engine.reused, engine.plugins))
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
