"""How an image file becomes the pixels that a model takes."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

__all__ = ["Preprocess"]

Channel = tuple[float, float, float]


class Preprocess(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Resize, centre crop, scaling to [0, 1], mean and standard deviation.

    Attributes:
        size: side of the square that the model takes, in pixels.
        crop: the shorter side is resized to floor(size / crop), then the centre is cut out.
        centre: what becomes of half a pixel where the centre begins: to the nearest even, as torchvision cuts, or down,
            as transformers does.
        stretch: both sides are resized to that, whatever their ratio was.
        interpolation: of the resize.
        mean: subtracted for each of red, green, blue, on the [0, 1] scale.
        std: divided by, likewise.
    """

    size: Annotated[int, Meta(ge=1)]
    crop: Annotated[float, Meta(gt=0, le=1)]
    interpolation: Literal["bicubic", "bilinear"]
    mean: Channel
    std: Channel
    stretch: bool = False
    centre: Literal["nearest", "down"] = "nearest"
