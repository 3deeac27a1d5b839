"""FLOPs of a static graph, counted from its shapes: 2 for each multiply-add of a matrix product or convolution."""

from __future__ import annotations

import math
from collections import Counter

import onnx_ir as ir
import torch
from torch.utils.flop_counter import FlopCounterMode

from edgecomp.backbones.placed import PlacedModel, PlainModel

__all__ = ["count_flops", "count_module_flops", "count_ops"]


def count_ops(model: ir.Model) -> dict[str, int]:
    """Return how often each op occurs, most frequent first."""
    counts = Counter(node.op_type for node in ir.traversal.RecursiveGraphIterator(model.graph))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def count_flops(model: ir.Model) -> int:
    """Return the FLOPs of MatMul, Gemm, Conv and ConvTranspose nodes; other ops are left out, as is usual."""
    return 2 * sum(_multiply_adds(node) for node in ir.traversal.RecursiveGraphIterator(model.graph))


def _multiply_adds(node: ir.Node) -> int:
    if node.op_type == "MatMul":
        return math.prod(_shape(node.outputs[0])) * _shape(node.inputs[0])[-1]
    if node.op_type == "Gemm":
        transposed = node.attributes.get("transA")
        rows = _shape(node.inputs[0])
        return math.prod(_shape(node.outputs[0])) * rows[0 if transposed is not None and transposed.value else 1]
    if node.op_type == "Conv":  # weight (out, in / groups, k...)
        return math.prod(_shape(node.outputs[0])) * math.prod(_shape(node.inputs[1])[1:])
    if node.op_type == "ConvTranspose":  # weight (in, out / groups, k...)
        return math.prod(_shape(node.inputs[0])) * math.prod(_shape(node.inputs[1])[1:])
    return 0


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
