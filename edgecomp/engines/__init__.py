"""ONNX graphs become TensorRT engines, on TensorRT 10, TensorRT 11 and TensorRT for RTX.

One route for all three: a strongly typed network, so that the graph alone decides the precision. `adapter` knows how
the versions differ and `flavour` which one builds; `network` parses, `proof` and `inspector` show in which types the
result runs, `build` builds and writes, `record` is the JSON beside an engine, `find` says which engine runs here and
`gpu` gives it memory; `settings`, `timing`, `memory` and `watching` are what a build works with; `plugins` compiles and
loads plugin libraries, and `plugin_use` decides which nodes they run.
Neither torch nor onnx is imported here, and TensorRT only when a function needs it.
"""

from __future__ import annotations

from edgecomp.engines.adapter import Flavour
from edgecomp.engines.build import BuiltEngine, build_engine, require_target_runs
from edgecomp.engines.find import build_form, find_engine, libraries_of
from edgecomp.engines.flavour import choose_flavour, installed_flavours, load_flavour, planned_flavour
from edgecomp.engines.gpu import Gpu, local_gpu_sm
from edgecomp.engines.plugin_use import find_plugin_nodes
from edgecomp.engines.plugins import (
    PluginLibrary,
    build_library,
    cached_libraries,
    loaded_library,
    read_library,
    require_library,
)
from edgecomp.engines.record import (
    EngineMerge,
    EnginePlugin,
    EngineProof,
    EngineRecord,
    EngineTensor,
    read_record,
    require_engine,
    sidecar_path,
)
from edgecomp.engines.settings import OWN, BuilderSettings, load_preset, preset_names, settings_of

__all__ = [
    "OWN",
    "BuilderSettings",
    "BuiltEngine",
    "EngineMerge",
    "EnginePlugin",
    "EngineProof",
    "EngineRecord",
    "EngineTensor",
    "Flavour",
    "Gpu",
    "PluginLibrary",
    "build_engine",
    "build_form",
    "build_library",
    "cached_libraries",
    "choose_flavour",
    "find_engine",
    "find_plugin_nodes",
    "installed_flavours",
    "libraries_of",
    "load_flavour",
    "load_preset",
    "loaded_library",
    "local_gpu_sm",
    "planned_flavour",
    "preset_names",
    "read_library",
    "read_record",
    "require_engine",
    "require_library",
    "require_target_runs",
    "settings_of",
    "sidecar_path",
]
