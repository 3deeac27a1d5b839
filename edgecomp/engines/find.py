"""Which engine of a bundle runs here: of this graph and these weights, of this TensorRT, for this GPU."""

from __future__ import annotations

from pathlib import Path

from edgecomp.bundle import WEIGHTS, open_bundle
from edgecomp.engines.adapter import Flavour
from edgecomp.engines.build import build_engine
from edgecomp.engines.plugins import cached_libraries
from edgecomp.engines.record import EngineRecord, read_record, require_engine
from edgecomp.errors import BuildError, TargetMismatch
from edgecomp.specs import load_target
from edgecomp.specs.origin import file_sha256
from edgecomp.specs.plugin import load_plugin, plugin_names

__all__ = ["build_form", "find_engine", "libraries_of"]


def find_engine(model: Path, flavour: Flavour, *, sm: int) -> tuple[Path, EngineRecord]:
    """Return the engine of a bundle's graph that runs here, and its record.

    Of an engine with a plugin and one without, the one with a plugin is taken, where its library is in the user's
    cache.

    Args:
        model: the graph, in its bundle; engines lie in `engines/<target>/` beside it.
        flavour: the TensorRT that is to run it.
        sm: compute capability of the GPU.

    Raises:
        TargetMismatch: there is none; the text says what is wrong with those that are there.
    """
    bundle = open_bundle(model.parent, verify=False)
    wanted = (bundle.file(model.name).sha256, bundle.file(WEIGHTS).sha256)
    refused = []
    for plan in sorted((bundle.path / "engines").glob(f"*/{model.stem}.{flavour.name}*.engine"), key=_plugins_first):
        try:
            record = require_engine(plan, runtime=flavour.name, version=flavour.version, sm=sm)
            if (record.onnx_sha256, record.weights_sha256) != wanted:
                raise BuildError(f"{plan} was built from another graph or other weights than the bundle's; build again")
            libraries_of(plan, record)
        except (BuildError, TargetMismatch) as error:
            refused.append(str(error))
            continue
        return plan, record
    raise TargetMismatch(
        f"no engine of {model.name} in {bundle.path / 'engines'} runs here ({flavour.title}, SM{sm}): "
        f"{'; '.join(refused) or 'there is none'}. Build it: edgecomp build {bundle.path} --target auto"
    )


def build_form(model: Path, folder: Path, flavour: Flavour, *, sm: int) -> tuple[Path, EngineRecord]:
    """Build the engine of a graph that was made of one of a bundle's, for the GPU here, and return it with its record.

    It lies in `engines/<target>/` beside the graph, and is kept there.

    Args:
        model: the graph; its external data is the bundle's.
        folder: the bundle.
        flavour: the TensorRT that is to run it.
        sm: compute capability of the GPU.

    Raises:
        TargetMismatch: no engine of the bundle is for this GPU. BuildError: the graph does not build.
    """
    bundle = open_bundle(folder, verify=False)
    records = (read_record(plan) for plan in sorted((folder / "engines").glob(f"*/*.{flavour.name}*.engine")))
    name = next((record.target for record in records if sm in record.sm), "")
    if not name:
        raise TargetMismatch(
            f"no engine in {folder / 'engines'} is for SM{sm} and {flavour.title}; "
            f"build them: edgecomp build {folder} --target auto"
        )
    weights = bundle.file(WEIGHTS)
    built = build_engine(
        model,
        model.parent / "engines" / name,
        target=load_target(name),
        runtime=flavour.name,
        precision=bundle.manifest.precision,
        onnx_sha256=file_sha256(model),
        weights=folder,
        weights_sha256=weights.sha256,
        weight_bytes=weights.size,
        fp32_nodes=[island for graph in bundle.manifest.graphs for island in graph.islands],
        plugin="off",
        progress=lambda _: None,
    )
    return built.path, built.record


def libraries_of(plan: Path, record: EngineRecord) -> tuple[Path, ...]:
    """Return the plugin libraries of an engine: those that were compiled here, with the hashes of its record.

    The copies beside the engine may have come with the bundle, and would run with the user's rights.
    """
    found = []
    for plugin in record.plugins:
        known = plugin.name in plugin_names()
        cached = cached_libraries(load_plugin(plugin.name)) if known else ()
        path = next((library.path for library in cached if library.sha256 == plugin.sha256), None)
        if path is None:
            raise BuildError(
                f"{plan} needs the library {plugin.library} ({plugin.sha256[:12]}), which was not compiled on this "
                f"machine; build the engine here, with --plugin require or --plugin off"
            )
        found.append(path)
    return tuple(found)


def _plugins_first(plan: Path) -> tuple[bool, str]:
    return not plan.name.endswith(".plugin.engine"), str(plan)
