"""The small vision transformer of this example, and its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

__all__ = ["WEIGHTS", "load_host", "make_host"]

WEIGHTS = Path(__file__).parent / "weights.safetensors"
#: How pixels are prepared; edgecomp reads it from here into the bundle. `crop_pct` 1: nothing is resized or cut off.
PREPROCESS: dict[str, Any] = {"crop_pct": 1.0, "interpolation": "bicubic", "mean": (0.286,) * 3, "std": (0.353,) * 3}


def make_host() -> VisionTransformer:
    """Make the model with fresh weights: 28 x 28 pixels, 49 patches and a class token, 0.46 M parameters."""
    model: Any = VisionTransformer(
        img_size=28, patch_size=4, num_classes=10, embed_dim=96, depth=6, num_heads=3, mlp_ratio=2.0
    )
    model.pretrained_cfg = PREPROCESS
    return model


def load_host(path: Path = WEIGHTS) -> VisionTransformer:
    """Make the model with the weights of a file, in fp32."""
    model = make_host()
    state = {name: tensor.to(torch.float32) for name, tensor in load_file(path).items()}
    model.load_state_dict(state, strict=True)
    return model.eval()
