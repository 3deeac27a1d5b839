"""ONNX graphs become TensorRT engines, on TensorRT 10, TensorRT 11 and TensorRT for RTX.

One route for all three: a strongly typed network, so that the graph alone decides the precision. `flavour` knows how
the versions differ, `network` parses and checks, `build` builds and writes, `record` is the JSON beside an engine.
Neither torch nor onnx is imported here, and TensorRT only when a function needs it.
"""

from __future__ import annotations

from edgecomp.engines.build import BuiltEngine, build_engine
from edgecomp.engines.flavour import Flavour, choose_flavour, installed_flavours, load_flavour
from edgecomp.engines.gpu import local_gpu_sm
from edgecomp.engines.record import EngineRecord, EngineTensor, read_record, sidecar_path

__all__ = [
    "BuiltEngine",
    "EngineRecord",
    "EngineTensor",
    "Flavour",
    "build_engine",
    "choose_flavour",
    "installed_flavours",
    "load_flavour",
    "local_gpu_sm",
    "read_record",
    "sidecar_path",
]
