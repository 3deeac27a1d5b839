"""In which types ONNX Runtime runs the matrix products of a graph: those of the graph that it made of it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from edgecomp.engines.graph import Product, read_products
from edgecomp.errors import MissingDependency, RunError

__all__ = ["runtime_products"]

_EXTERNAL_FROM = "1024"  # bytes; larger weights go into a file beside the graph, which protobuf could not hold


def runtime_products(model: Path, *, provider: str = "CPUExecutionProvider") -> tuple[Product, ...]:
    """Return the matrix products of the graph after ONNX Runtime's own rewrites, with the types that they run in.

    The CPU has no fp16 kernels for products, so that ONNX Runtime casts them up in silence; here it shows. The
    rewritten graph and its weights are written to a temporary folder, and removed.

    Args:
        model: the ONNX file; its external data lies beside it.
        provider: the execution provider that would run it.

    Raises:
        RunError: ONNX Runtime cannot load the model.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependency(
            "onnxruntime", needed_for="looking at the types that ONNX Runtime runs", extra="ort"
        ) from error
    with tempfile.TemporaryDirectory(prefix="edgecomp-") as folder:
        written = Path(folder) / "optimised.onnx"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(written)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimised.data")
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_min_size_in_bytes", _EXTERNAL_FROM
        )
        options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            onnxruntime.InferenceSession(str(model), options, providers=[provider])
        except Exception as error:  # noqa: BLE001 - ONNX Runtime's errors share no public base class
            first = str(error).strip().splitlines()[0]
            raise RunError(
                f"ONNX Runtime cannot load {model}: {first}; `edgecomp inspect` shows what it holds"
            ) from None
        return read_products(written)
