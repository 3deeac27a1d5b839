"""What a built engine says of itself: the JSON of TensorRT's EngineInspector, as 10.x and 11.x write it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from edgecomp.engines.proof import LARGE, NetworkProduct
from edgecomp.engines.record import EngineProof
from edgecomp.errors import BuildError

__all__ = ["confirm", "engine_layers", "engine_tensors"]

# Myelin says `Half`, other layers `Row major linear FP16 format`, `Thirty-two wide channel vectorized ... Int8 format`.
_WORDS = {
    "float": "float32", "fp32": "float32", "half": "float16", "fp16": "float16", "bfloat16": "bfloat16",
    "bf16": "bfloat16", "int8": "int8", "fp8": "float8_e4m3fn", "int4": "int4", "fp4": "float4_e2m1fn",
}  # fmt: skip
_BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "float8_e4m3fn": 8, "int4": 4, "float4_e2m1fn": 4}
_METADATA = re.compile(r"\[ONNX Layer: ([^\]\x1e\x1f]+)\]")


def engine_tensors(information: str) -> tuple[str, ...]:
    """Return the names of an engine's inputs and outputs: `Bindings` of 10.x, `I/O Tensors` of 11.x."""
    document = _read(information)
    listed = document.get("I/O Tensors", document.get("Bindings", []))
    if not isinstance(listed, list):
        return ()
    return tuple(str(one.get("Name", "")) if isinstance(one, dict) else str(one) for one in listed)


def confirm(
    proof: EngineProof, products: Sequence[NetworkProduct], information: str, onnx: Path, *, outputs: Sequence[str]
) -> EngineProof:
    """Return the proof with what the built engine says; raise where it runs a product wider than the network.

    An engine fuses layers, and names the ONNX nodes of each. A layer that reads and writes nothing but wider types
    than the network gave one of its products is a contradiction. Where the engine does not name every large product,
    the proof stays that of the network.

    Args:
        proof: what the network showed.
        products: of the network.
        information: the inspector's JSON.
        onnx: the file, for messages.
        outputs: names of the network's outputs; an engine that lacks one is another's.
    """
    named = engine_tensors(information)
    lost = [name for name in outputs if named and name not in named]
    if lost:
        raise BuildError(f"{onnx.name}: the built engine has no output {lost[0]!r}; it has {', '.join(named)}")
    layers = [(_names(layer), _types(layer)) for layer in _layers(information)]
    total = sum(product.weights for product in products)
    seen, missing = 0, 0
    for product in products:
        holding = [types for names, types in layers if product.path[0] in names and types]
        for types in holding:
            narrowest = min(_BITS[dtype] for dtype in types)
            if narrowest > _BITS.get(product.dtype, 64):
                raise BuildError(
                    f"{onnx.name}: {product.name!r} is {product.dtype} in the network, and the built engine runs it in "
                    f"{', '.join(sorted(types))}; do not use this engine, and report it with its layer information"
                )
        seen += bool(holding)
        missing += not holding and product.weights > LARGE * total
    return msgspec.structs.replace(proof, by="engine" if seen and not missing else "network", in_engine=seen)


def engine_layers(information: str) -> tuple[tuple[str, str, frozenset[str]], ...]:
    """Return name, kind and ONNX nodes of each layer that an engine describes, in its order."""
    return tuple(
        (str(layer.get("Name", "")), str(layer.get("LayerType", "")), _names(layer)) for layer in _layers(information)
    )


def _read(information: str) -> dict[str, Any]:
    try:
        document = msgspec.json.decode(information)
    except msgspec.DecodeError as error:
        raise BuildError(f"the engine's layer information is no JSON: {error}; report the TensorRT version") from None
    return document if isinstance(document, dict) else {}


def _layers(information: str) -> list[dict[str, Any]]:
    """Return the layers that are described; with little verbosity they are names alone."""
    listed = _read(information).get("Layers", [])
    return [layer for layer in listed if isinstance(layer, dict)] if isinstance(listed, list) else []


def _names(layer: dict[str, Any]) -> frozenset[str]:
    """Return the ONNX nodes of an engine's layer; its own name where it states none."""
    stated = _METADATA.findall(str(layer.get("Metadata", "")))
    if stated:
        return frozenset(text.split(" | ")[0] for text in stated)
    return frozenset(re.split(r" \+ ", str(layer.get("Name", ""))))


def _types(layer: dict[str, Any]) -> frozenset[str]:
    """Return the floating and quantised types that a layer reads and writes."""
    found = set()
    for tensor in [*layer.get("Inputs", []), *layer.get("Outputs", [])]:
        text = str(tensor.get("Format/Datatype") or tensor.get("Datatype") or "") if isinstance(tensor, dict) else ""
        found |= {_WORDS[word] for word in re.findall(r"[a-z]+\d*", text.lower()) if word in _WORDS}
    return frozenset(found)
