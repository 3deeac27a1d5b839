"""Proof of precision: the types in which the matrix products of a network run, against what was asked for."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from edgecomp.engines.adapter import Flavour
from edgecomp.engines.graph import Product, read_products
from edgecomp.engines.network import dtype_of
from edgecomp.engines.record import EngineProof
from edgecomp.errors import BuildError

__all__ = ["LARGE", "NetworkProduct", "find_products", "prove", "require_precision"]

LARGE = 0.01  # share of all weights from which a product must run as asked

_REQUIRED = {
    "fp32": "float32",
    "tf32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "int8": "int8",
    "fp8": "float8_e4m3fn",
    "fp4": "float4_e2m1fn",
}
_REDUCED = frozenset({"float16", "bfloat16", "int8", "float8_e4m3fn", "int4", "float4_e2m1fn"})
_BITS = {
    "float64": 64, "float32": 32, "float16": 16, "bfloat16": 16, "float8_e4m3fn": 8, "int8": 8, "int4": 4,
    "float4_e2m1fn": 4,
}  # fmt: skip

_PRODUCTS = frozenset({"MATRIX_MULTIPLY", "CONVOLUTION", "DECONVOLUTION", "EINSUM"})
_PASSED = frozenset({"SHUFFLE", "IDENTITY", "QUANTIZE", "CAST", "SQUEEZE", "UNSQUEEZE"})
_METADATA = re.compile(r"\[ONNX Layer: ([^\]\x1e\x1f]+)\]")
_FUNCTION = re.compile(r"^(.*) \([^()]*\)$")  # `/f0 (F)`: a node, and the function that it calls
_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class NetworkProduct:
    """A matrix product of a parsed network; see `Product`, whose words these are."""

    path: tuple[str, ...]
    op: str
    dtype: str
    weights: int

    @property
    def name(self) -> str:
        """How a message names it."""
        return " in ".join(self.path)


def require_precision(flavour: Flavour, network: Any, onnx: Path, precision: str) -> None:
    """Raise unless the network is strongly typed and its layers hold the type that `precision` promises.

    A reduced precision needs at least one layer of its type, and `prove` looks at the rest. "fp32" and "tf32" allow no
    layer of a reduced type.
    """
    if precision not in _REQUIRED:
        raise BuildError(f"no precision {precision!r}; known: {', '.join(_REQUIRED)}")
    if not network.get_flag(flavour.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED):
        raise BuildError(f"{onnx.name}: {flavour.name} {flavour.version} made a network that is not strongly typed")
    found: dict[str, str] = {}  # type -> the first layer that has it
    for layer in _layers(network):
        for output in range(layer.num_outputs):
            tensor = layer.get_output(output)
            if tensor is not None:  # an optional output that nobody reads
                found.setdefault(dtype_of(tensor), layer.name)
    wanted = _REQUIRED[precision]
    if wanted not in found:
        raise BuildError(
            f"{onnx.name}: precision {precision} was asked for, and none of the {network.num_layers} layers gives "
            f"{wanted}; they give {', '.join(sorted(found))}. Export the model with that precision"
        )
    if wanted == "float32":
        for dtype in sorted(_REDUCED & found.keys()):
            raise BuildError(
                f"{onnx.name}: precision {precision} was asked for, and layer {found[dtype]!r} gives {dtype}; "
                f"export the model in fp32, or build with the precision it has"
            )


def prove(
    flavour: Flavour, network: Any, onnx: Path, precision: str, fp32_nodes: Collection[str]
) -> tuple[EngineProof, tuple[NetworkProduct, ...]]:
    """Return in which types the matrix products run, and the products; raise where that is not what was asked for.

    Each must have the type that the ONNX file gives it. One with more than `LARGE` of all weights must have the type
    of the precision, unless its node is an island; an island must be wide.

    Args:
        flavour: the TensorRT that parsed.
        network: the parsed network.
        onnx: the file.
        precision: the manifest's word.
        fp32_nodes: names of the nodes that the manifest keeps in fp32, of this graph or others of the bundle.
    """
    require_precision(flavour, network, onnx, precision)
    asked = {product.path: product for product in read_products(onnx)}
    products, matched = [], 0
    for found in find_products(network):
        product, same = found, asked.get(found.path)
        if same is not None:
            product = dataclasses.replace(found, op=same.op, weights=max(found.weights, same.weights))
            _require_same(onnx, product, same)
            matched += bool(same.dtype)
        products.append(product)
    islands, wider = _require_asked(onnx, products, precision, frozenset(fp32_nodes))
    weights: collections.Counter[str] = collections.Counter()
    for product in products:
        weights[product.dtype] += product.weights
    counted = collections.Counter(product.dtype for product in products)
    return EngineProof(
        by="network",
        products=dict(counted.most_common()),
        weights={dtype: weights[dtype] for dtype, _ in counted.most_common()},
        matched=matched,
        islands=islands,
        wider=wider,
    ), tuple(products)


def find_products(network: Any) -> tuple[NetworkProduct, ...]:
    """Return the matrix products of a parsed network in its order."""
    layers = list(_layers(network))
    made = {}
    for layer in layers:
        for output in range(layer.num_outputs):
            tensor = layer.get_output(output)
            if tensor is not None:
                made[tensor.name] = layer
    products = []
    for layer in layers:
        kind = _kind(layer)
        if kind not in _PRODUCTS:
            continue
        operands = [layer.get_input(index) for index in range(min(layer.num_inputs, 2))]
        seen = [_behind(tensor, made) for tensor in operands if tensor is not None]
        quantised = [behind for behind, _ in seen if behind]
        dtype = quantised[0] if len(quantised) == len(seen) > 1 else dtype_of(operands[0])
        products.append(NetworkProduct(_path_of(layer), kind, dtype, max((count for _, count in seen), default=0)))
    return tuple(products)


def _require_same(onnx: Path, product: NetworkProduct, asked: Product) -> None:
    if asked.dtype and asked.dtype != product.dtype:
        raise BuildError(
            f"{onnx.name}: {asked.op} {product.name!r} computes in {asked.dtype} in the file and in {product.dtype} in "
            f"the network that TensorRT made of it; nothing was built. Report the node, or export it in {product.dtype}"
        )


def _require_asked(
    onnx: Path, products: Sequence[NetworkProduct], precision: str, fp32_nodes: frozenset[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return islands and small wider products; raise for large ones, and for islands that are none."""
    wanted = _REQUIRED[precision]
    total = sum(product.weights for product in products)
    islands: list[str] = []
    wider: list[NetworkProduct] = []
    wrong: list[NetworkProduct] = []
    for product in products:
        is_wide = _BITS.get(product.dtype, 32) > _BITS[wanted]
        if not fp32_nodes.isdisjoint(product.path):
            if not is_wide and wanted != "float32":
                raise BuildError(
                    f"{onnx.name}: the manifest keeps {product.name!r} in fp32, and it runs in {product.dtype}; "
                    f"export the bundle again"
                )
            islands.append(product.name)
        elif product.dtype != wanted:
            (wrong if product.weights > LARGE * total or not is_wide else wider).append(product)
    if wrong:
        first = wrong[0]
        named = ", ".join(repr(product.name) for product in wrong[1 : _SHOWN + 1])
        others = f"; so do {len(wrong) - 1} more ({named}{', ...' if len(wrong) > _SHOWN + 1 else ''})" if named else ""
        share = 100 * first.weights / total if total else 0
        raise BuildError(
            f"{onnx.name}: precision {precision} was asked for, and {first.op} {first.name!r} ({first.weights} "
            f"weights, {share:.1f} % of all) runs in {first.dtype}{others}. Export it again with --precision "
            f"{precision}, or keep it wide on purpose: --fp32 {first.path[0]!r}"
        )
    return tuple(islands), tuple(product.name for product in wider)


def _layers(network: Any) -> Iterator[Any]:
    for index in range(network.num_layers):
        yield network.get_layer(index)


def _kind(layer: Any) -> str:
    return str(layer.type).rpartition(".")[2]


def _path_of(layer: Any) -> tuple[str, ...]:
    """Return the names of a layer's ONNX node and of the functions around it, as the parser noted them."""
    found = _METADATA.search(str(layer.metadata))
    if found is None:
        return (str(layer.name),)
    name, *around = found.group(1).split(" | ")
    return (name, *(_FUNCTION.sub(r"\1", outer) for outer in around))


def _behind(tensor: Any, made: dict[str, Any]) -> tuple[str, int]:
    """Return the quantised type that a DEQUANTIZE layer made this tensor of, or "", and its constant elements."""
    behind = ""
    for _ in range(len(made)):
        layer = made.get(tensor.name)
        if layer is None:
            break
        kind = _kind(layer)
        if kind == "CONSTANT":
            return behind, math.prod(int(size) for size in tensor.shape)
        if kind == "DEQUANTIZE":
            behind = behind or dtype_of(layer.get_input(0))
        elif kind not in _PASSED:
            break
        tensor = layer.get_input(0)
    return behind, 0
