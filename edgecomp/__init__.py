"""edgecomp takes vision-token compressors to the edge: static ONNX, TensorRT engines, parity, latency."""

__all__ = ["__version__"]

__version__ = "0.1.0"
