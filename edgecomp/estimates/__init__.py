"""What a graph would take on hardware that is not here: computed, never measured. No torch, onnx or TensorRT here.

A graph arrives as `specs.costs.GraphCosts`.
"""

from edgecomp.estimates.applied import applied_for
from edgecomp.estimates.roofline import Estimate, estimate_graph

__all__ = ["Estimate", "applied_for", "estimate_graph"]
