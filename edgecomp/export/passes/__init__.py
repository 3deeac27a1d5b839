"""Graph passes: one a file; each takes an `onnx_ir` model and changes it in place, or refuses it."""

from edgecomp.export.passes.insert_qdq import insert_qdq, tensors_to_calibrate
from edgecomp.export.passes.merge_bodies import add_merge_body, inline_functions
from edgecomp.export.passes.name_weights import name_weights
from edgecomp.export.passes.require_static import require_static
from edgecomp.export.passes.set_precision import is_named_in, modules_named_in, set_precision
from edgecomp.export.passes.share_weights import WeightsFile, share_weights
from edgecomp.export.passes.strip_metadata import strip_metadata

__all__ = [
    "WeightsFile",
    "add_merge_body",
    "inline_functions",
    "insert_qdq",
    "is_named_in",
    "modules_named_in",
    "name_weights",
    "require_static",
    "set_precision",
    "share_weights",
    "strip_metadata",
    "tensors_to_calibrate",
]
