"""edgecomp takes vision-token compressors to the edge: static ONNX, TensorRT engines, parity, latency."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgecomp.api._compressor import compressor
    from edgecomp.serving import load

__all__ = ["__version__", "compressor", "load"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load":
        from edgecomp.serving import load  # numpy need not be there for the version

        return load
    if name == "compressor":
        from edgecomp.api._compressor import compressor

        return compressor
    raise AttributeError(f"module 'edgecomp' has no attribute {name!r}")
