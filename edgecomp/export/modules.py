"""How a node of a graph says from which torch module it came."""

from __future__ import annotations

import ast

__all__ = ["MODULE_KEY", "SCOPES_KEY", "deepest_module"]

MODULE_KEY = "edgecomp.module"  # in a graph of edgecomp
SCOPES_KEY = "pkg.torch.onnx.name_scopes"  # in a graph of torch's exporter


def deepest_module(scopes: str) -> str:
    """Return the last module in torch's list of scopes, whose final entry is the op's own name; "" where it is none."""
    try:
        names = ast.literal_eval(scopes)
    except (ValueError, SyntaxError):
        return ""
    return str(names[-2]) if isinstance(names, list) and len(names) >= 2 else ""
