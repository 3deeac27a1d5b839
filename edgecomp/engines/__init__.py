"""ONNX graphs become TensorRT engines, on TensorRT 10, TensorRT 11 and TensorRT for RTX.

One route for all three: a strongly typed network, so that the graph alone decides the precision. `flavour` knows how
the versions differ, `network` parses and checks, `build` builds and writes, `record` is the JSON beside an engine;
`plugins` compiles and loads plugin libraries, and `plugin_use` decides which nodes they run.
Neither torch nor onnx is imported here, and TensorRT only when a function needs it.
"""

from __future__ import annotations

from edgecomp.engines.build import BuiltEngine, build_engine
from edgecomp.engines.flavour import Flavour, choose_flavour, installed_flavours, load_flavour, planned_flavour
from edgecomp.engines.gpu import local_gpu_sm
from edgecomp.engines.plugin_use import find_plugin_nodes
from edgecomp.engines.plugins import (
    PluginLibrary,
    build_library,
    cached_libraries,
    loaded_library,
    read_library,
    require_library,
)
from edgecomp.engines.record import EngineMerge, EnginePlugin, EngineRecord, EngineTensor, read_record, sidecar_path

__all__ = [
    "BuiltEngine",
    "EngineMerge",
    "EnginePlugin",
    "EngineRecord",
    "EngineTensor",
    "Flavour",
    "PluginLibrary",
    "build_engine",
    "build_library",
    "cached_libraries",
    "choose_flavour",
    "find_plugin_nodes",
    "installed_flavours",
    "load_flavour",
    "loaded_library",
    "local_gpu_sm",
    "planned_flavour",
    "read_library",
    "read_record",
    "require_library",
    "sidecar_path",
]
