"""Graph passes: one a file; each takes an `onnx_ir` model and changes it in place, or refuses it."""

from edgecomp.export.passes.merge_bodies import add_merge_body, inline_functions
from edgecomp.export.passes.name_weights import name_weights
from edgecomp.export.passes.require_static import require_static
from edgecomp.export.passes.share_weights import WeightsFile, share_weights
from edgecomp.export.passes.strip_metadata import strip_metadata

__all__ = [
    "WeightsFile",
    "add_merge_body",
    "inline_functions",
    "name_weights",
    "require_static",
    "share_weights",
    "strip_metadata",
]
