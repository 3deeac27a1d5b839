"""FLOPs of a static graph, counted from its shapes: 2 for each multiply-add of a matrix product or convolution."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir
import torch
from torch.utils.flop_counter import FlopCounterMode

from edgecomp.backbones.placed import PlacedModel, PlainModel
from edgecomp.specs.costs import multiply_adds

__all__ = ["count_flops", "count_module_flops", "count_ops"]


def count_ops(model: ir.Model) -> dict[str, int]:
    """Return how often each op occurs, most frequent first."""
    counts = Counter(node.op_type for node in ir.traversal.RecursiveGraphIterator(model.graph))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def count_flops(model: ir.Model) -> int:
    """Return the FLOPs of MatMul, Gemm, Conv and ConvTranspose nodes; other ops are left out, as is usual."""
    return 2 * sum(_multiply_adds(node) for node in ir.traversal.RecursiveGraphIterator(model.graph))


def _multiply_adds(node: ir.Node) -> int:
    if node.op_type not in ("MatMul", "Gemm", "Conv", "ConvTranspose"):
        return 0
    transposed = node.attributes.get("transA")
    return multiply_adds(
        node.op_type,
        [_shape(value) for value in node.inputs[:2]],
        [_shape(value) for value in node.outputs],
        transposed=transposed is not None and bool(transposed.value),
    )


def _shape(value: ir.Value | None) -> list[int]:
    if value is None or value.shape is None:
        raise ValueError("shapes are checked before FLOPs are counted")
    return [int(size) for size in value.shape]  # type: ignore[arg-type]


def count_module_flops(model: PlacedModel | PlainModel) -> int:
    """Return the FLOPs of a model on one sample, by torch's own counter, without running it or copying weights."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    weights = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    inputs = tuple(
        torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta") for spec in model.input_specs(1)
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        torch.func.functional_call(model, weights, inputs)
    return int(counter.get_total_flops())
