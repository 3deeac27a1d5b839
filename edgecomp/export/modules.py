"""How a node of a graph says from which torch module it came."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["MODULE_KEY", "SCOPES_KEY", "deepest_module", "module_of"]

MODULE_KEY = "edgecomp.module"  # in a graph of edgecomp
SCOPES_KEY = "pkg.torch.onnx.name_scopes"  # in a graph of torch's exporter


def deepest_module(scopes: str) -> str:
    """Return the last module in torch's list of scopes, whose final entry is the op's own name; "" where it is none."""
    try:
        names = ast.literal_eval(scopes)
    except (ValueError, SyntaxError):
        return ""
    return str(names[-2]) if isinstance(names, list) and len(names) >= 2 else ""


def module_of(node: ir.Node) -> str:
    """Return the torch module a node came from, or ""."""
    return node.metadata_props.get(MODULE_KEY, "")
