"""ONNX file -> TensorRT network, and the checks that the network is the one that was asked for."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

from edgecomp.engines.adapter import Flavour
from edgecomp.engines.record import EngineTensor
from edgecomp.errors import BuildError

__all__ = [
    "collecting_logger",
    "count_layer_types",
    "dtype_name",
    "dtype_of",
    "network_inputs",
    "network_outputs",
    "parse_onnx",
    "require_static",
]

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "FP8": "float8_e4m3fn",
    "INT4": "int4",
    "FP4": "float4_e2m1fn",
}
# Warnings that tell nothing about the engine. TensorRT keeps the first logger of a process and says so whenever a later
# one is handed over, and still sends the messages of a builder to that builder's own logger. A function body that
# serves several nodes is inlined for each, under the same names.
_OF_NO_USE = ("The logger passed into", "already exists, the output tensors of this new instance will not be queryable")


def collecting_logger(flavour: Flavour) -> Any:
    """Return a logger that prints nothing and collects `warnings` and `errors`, each message once."""
    trt = flavour.module
    severity = trt.ILogger.Severity

    class CollectingLogger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.warnings: list[str] = []
            self.errors: list[str] = []

        def log(self, level: Any, message: str) -> None:
            if level == severity.WARNING and not any(words in message for words in _OF_NO_USE):
                kept = self.warnings
            elif level in (severity.ERROR, severity.INTERNAL_ERROR):
                kept = self.errors
            else:
                return
            if message not in kept:
                kept.append(message)

    return CollectingLogger()


def parse_onnx(
    flavour: Flavour,
    network: Any,
    logger: Any,
    onnx: Path,
    *,
    weights: Path | None = None,
    content: bytes | None = None,
) -> Any:
    """Parse a file into an empty network and return the parser.

    Keep the parser until the engine is built, because it owns the memory of the weights. It serves only once.

    Args:
        flavour: the TensorRT that builds.
        network: an empty network.
        logger: collects what the parser says.
        onnx: the file.
        weights: folder of the external data; none: it lies beside the file.
        content: what to parse in the file's place.
    """
    parser = flavour.module.OnnxParser(network, logger)
    if content is None and weights in (None, onnx.parent):
        parsed = parser.parse_from_file(str(onnx))
    else:  # external data is looked for beside the name that is given
        named = (weights or onnx.parent) / onnx.name
        parsed = parser.parse(onnx.read_bytes() if content is None else content, str(named))
    if parsed and not parser.num_errors:
        return parser
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    at_nodes = [_node_error(error) for error in errors if error.node_operator()]
    # An error without a node is about the file or its weights, and then only the log names the file.
    words = at_nodes or logger.errors or [error.desc() for error in errors] or ["the parser gives no reason"]
    remedy = "without that op, or build with a TensorRT that has it" if at_nodes else "again, with its data beside it"
    raise BuildError(
        f"{onnx.name} is refused by the ONNX parser of {flavour.name} {flavour.version}: "
        f"{'; '.join(' '.join(text.split()).rstrip('.') for text in words)}. Export the model {remedy}"
    )


def require_static(network: Any, onnx: Path) -> None:
    """Raise unless every input and output has a fixed shape."""
    for kind, tensors in (("input", network_inputs(network)), ("output", network_outputs(network))):
        for tensor in tensors:
            if any(size < 0 for size in tensor.shape):
                raise BuildError(
                    f"{onnx.name}: {kind} {tensor.name!r} has the shape {list(tensor.shape)}, where -1 is a dimension "
                    f"that is not fixed; export the model with fixed shapes"
                )


def count_layer_types(network: Any) -> dict[str, int]:
    """Return how many layers of each type a parsed network has, by TensorRT's names, the most frequent first."""
    names = (str(network.get_layer(index).type).rpartition(".")[2] for index in range(network.num_layers))
    return dict(collections.Counter(names).most_common())


def network_inputs(network: Any) -> tuple[EngineTensor, ...]:
    """Return the inputs of a network in its order."""
    return tuple(_tensor(network.get_input(index)) for index in range(network.num_inputs))


def network_outputs(network: Any) -> tuple[EngineTensor, ...]:
    """Return the outputs of a network in its order."""
    return tuple(_tensor(network.get_output(index)) for index in range(network.num_outputs))


def _tensor(tensor: Any) -> EngineTensor:
    return EngineTensor(tensor.name, tuple(int(size) for size in tensor.shape), dtype_of(tensor))


def dtype_of(tensor: Any) -> str:
    """Return the type of a network's tensor, by the names that numpy and safetensors use."""
    return dtype_name(tensor.dtype)


def dtype_name(dtype: Any) -> str:
    """Return a type of TensorRT by the name that numpy and safetensors use."""
    name = str(dtype.name)
    return _DTYPES.get(name, name.lower())


def _node_error(error: Any) -> str:
    name = error.node_name() or f"number {error.node()}"
    stack = " in ".join(error.local_function_stack())
    inside = f", in the function {stack}" if stack else ""
    return f"node {name!r} ({error.node_operator()}){inside}: {error.desc()}"
