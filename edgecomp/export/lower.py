"""From a static torch module to an ONNX graph in memory."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import nn

from edgecomp.errors import ExportError
from edgecomp.export.quiet import quiet_tools
from edgecomp.specs import TensorSpec

__all__ = ["lower"]


def lower(module: nn.Module, *, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], opset: int) -> ir.Model:
    """Trace `module` with torch's dynamo exporter and return the graph, weights still in memory.

    Args:
        module: takes tensors as `inputs` says and returns a tuple as `outputs` says.
        opset: 18 to 20.

    Raises:
        ExportError: torch cannot trace it, or names or shapes come out other than declared.
    """
    examples = tuple(torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in inputs)
    try:
        with quiet_tools(), torch.no_grad():
            program = torch.onnx.export(
                module,
                examples,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=[spec.name for spec in inputs],
                output_names=[spec.name for spec in outputs],
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, TypeError, ValueError) as error:
        root: BaseException = error
        while root.__cause__ is not None:  # torch wraps the reason in pages of advice
            root = root.__cause__
        first = (str(root).strip().splitlines() or [type(root).__name__])[0]
        raise ExportError(
            f"torch could not export {type(module).__name__} at opset {opset}: {first}; "
            "--debug shows torch's own report"
        ) from error
    if program is None:
        raise ExportError(f"torch returned no program for {type(module).__name__} at opset {opset}")
    model = program.model
    if model.opset_imports.get("") != opset:
        raise ExportError(
            f"torch exported opset {model.opset_imports.get('')} where {opset} was asked for; "
            "another --opset between 18 and 20 may work"
        )
    _free_names(model.graph, {spec.name for spec in (*inputs, *outputs)})
    _require_declared("input", model.graph.inputs, inputs)
    _require_declared("output", model.graph.outputs, outputs)
    return model


def _free_names(graph: ir.Graph, taken: set[str]) -> None:
    """Rename inner values that bear the name of an input or output: torch names them after its ops, `index` say."""
    ends = {*graph.inputs, *graph.outputs}
    for node in graph:
        for value in node.outputs:
            if value.name in taken and value not in ends:
                value.name = f"inner.{value.name}"


def _require_declared(kind: str, values: Sequence[ir.Value], specs: Sequence[TensorSpec]) -> None:
    found = [f"{value.name} {list(value.shape or ())} {value.dtype}" for value in values]
    same = len(values) == len(specs) and all(
        value.name == spec.name
        and tuple(value.shape or ()) == spec.shape
        and value.dtype == ir.DataType[_ONNX_NAMES.get(spec.dtype, spec.dtype.upper())]
        for value, spec in zip(values, specs, strict=False)
    )
    if not same:
        raise ExportError(
            f"the graph's {kind}s are {', '.join(found)}, and the method declares {', '.join(map(str, specs))}; "
            f"correct the method's {kind}_specs"
        )


_ONNX_NAMES = {"float32": "FLOAT"}
