"""Where the patches of an image are in a compressed model: kept, merged or dropped, layer by layer. No torch."""

from __future__ import annotations

from edgecomp.patches.compose import Composed, compose_layers
from edgecomp.patches.layers import PatchLayer, PatchLayers, Picture, grid_of, layer_title
from edgecomp.patches.read import join_layers, read_end, to_rgb

__all__ = [
    "Composed",
    "PatchLayer",
    "PatchLayers",
    "Picture",
    "compose_layers",
    "grid_of",
    "join_layers",
    "layer_title",
    "read_end",
    "to_rgb",
]
