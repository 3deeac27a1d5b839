"""Removes what torch noted for debugging (source paths, traces), keeping each node's module."""

from __future__ import annotations

import onnx_ir as ir

from edgecomp.export.modules import MODULE_KEY, SCOPES_KEY, deepest_module

__all__ = ["MODULE_KEY", "strip_metadata"]


def strip_metadata(model: ir.Model, *, producer_version: str) -> None:
    """Drop torch's metadata, which holds paths of the exporting machine; name the producer.

    Each node keeps one entry, `edgecomp.module`: the name of the torch module it came from, for example
    `compressor.blocks.3.gather.to_q`, so that a profile or an error can name it.
    """
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        module = deepest_module(node.metadata_props.get(SCOPES_KEY, ""))
        node.metadata_props.clear()
        node.doc_string = None
        if module:
            node.metadata_props[MODULE_KEY] = module
        for value in (*node.inputs, *node.outputs):
            if value is not None:
                value.metadata_props.clear()
                value.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
    for holder in (model.graph, model):
        holder.metadata_props.clear()
        holder.doc_string = None
    model.producer_name, model.producer_version = "edgecomp", producer_version
