"""Image files to the pixels that a model takes: read, flatten to RGB, resize, crop, normalise.

The arithmetic is torchvision's `Resize`, `CenterCrop`, `ToTensor` and `Normalize` on a Pillow image, so that pixels
made here equal those that the original was trained with; torch is not needed.
"""

from __future__ import annotations

import math
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from edgecomp.errors import InvalidSpec, RunError
from edgecomp.specs.preprocess import Preprocess

__all__ = ["PixelType", "Preprocess", "read_image", "resize_and_crop", "to_pixels"]

PixelType: TypeAlias = Literal["float32", "uint8"]

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
"""A closed list: Pillow would else hand an EPS to Ghostscript, and guess at forty more formats."""

_SIGNATURES = {"JPEG": b"\xff\xd8\xff", "PNG": b"\x89PNG\r\n\x1a\n", "WebP": b"RIFF", "BMP": b"BM"}
_MOST_PIXELS = 100_000_000
_ORIENTATION_TAG = 0x0112  # EXIF
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

# What Pillow's decoders raise on damaged data; SyntaxError is its own for a broken PNG chunk.
_DAMAGE = (OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError, struct.error)


def read_image(path: str | Path) -> Image.Image:
    """Read a JPEG, PNG, WebP or BMP file of any colour mode as an upright RGB image of 8 bits a channel.

    EXIF orientation is applied. Transparent pixels (RGBA, grey with alpha, a palette or colour marked transparent)
    are composited over white. Grey of 16 bits is scaled by 1/257, so that 65535 becomes 255. CMYK is converted
    without a colour profile, and an embedded profile is ignored, as training pipelines do. Of an animation the
    first frame is taken.

    Raises:
        RunError: the file is missing, empty, not an image, damaged, of zero size, or above 100 megapixels; the last
            is read in the header, before anything is decoded.
    """
    path = Path(path)
    head = _read_head(path)
    with _quiet_pillow():
        try:
            with path.open("rb") as file, Image.open(file, formats=_FORMATS) as image:
                _require_size(path, *image.size)
                image.load()
                rgb = _to_rgb(_upright(image))
                return rgb.copy() if rgb is image else rgb  # free of the file, which closes here
        except UnidentifiedImageError:
            raise _unidentified(path, head) from None
        except Image.DecompressionBombError as error:
            raise _enormous(path, _pixels_named_in(str(error))) from None
        except _DAMAGE as error:
            raise RunError(
                f"image {path} is truncated or damaged: {error} (of {path.stat().st_size} bytes); "
                "copy it again from its source, or re-save it in an image editor"
            ) from None


def resize_and_crop(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    """Resize the shorter side (or both: `stretch`) to floor(size / crop), then cut the centre square out; returns RGB.

    The longer side is rounded down, and half a pixel of the offset as `centre` says. Where the resized image
    would exceed 100 megapixels (a strip of 1 x 100000), only the square is resampled: the same picture, which may
    differ from the long way by the rounding between the two passes of the filter.
    """
    _require_preprocess(preprocess)
    width, height = image.size
    if not width or not height:
        raise RunError(f"an image of {width} x {height} pixels has nothing to resize; give one of at least 1 x 1")
    image, size = _to_rgb(image), preprocess.size
    short = math.floor(size / preprocess.crop)
    resized = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    if preprocess.stretch:
        resized = (short, short)
    spare = [side - size for side in resized]
    left, top = (one // 2 if preprocess.centre == "down" else round(one / 2.0) for one in spare)
    resample = _RESAMPLING[preprocess.interpolation]
    if resized[0] * resized[1] <= _MOST_PIXELS:
        whole = image if resized == image.size else image.resize(resized, resample)
        return whole.crop((left, top, left + size, top + size))
    across, down = width / resized[0], height / resized[1]
    box = (left * across, top * down, min(width, (left + size) * across), min(height, (top + size) * down))
    return image.resize((size, size), resample, box=box)


def to_pixels(image: Image.Image, preprocess: Preprocess, dtype: PixelType) -> npt.NDArray[np.float32 | np.uint8]:
    """Return the pixels that a graph takes as its input, with a batch of one.

    Args:
        image: of any mode and size.
        preprocess: what the model was trained with.
        dtype: `float32` gives (1, 3, S, S), scaled to [0, 1], minus the mean, over the standard deviation;
            `uint8` gives (1, S, S, 3), raw RGB, for a graph that normalises by itself.
    """
    if dtype not in ("float32", "uint8"):
        raise InvalidSpec(f"pixels of type {dtype!r} cannot be made; choose float32 or uint8")
    pixels = np.asarray(resize_and_crop(image, preprocess))  # (S, S, 3)
    if dtype == "uint8":
        return np.array(pixels[None], dtype=np.uint8)
    scaled = pixels.astype(np.float32) / np.float32(255)
    normal = (scaled - np.asarray(preprocess.mean, np.float32)) / np.asarray(preprocess.std, np.float32)
    return np.ascontiguousarray(normal.transpose(2, 0, 1)[None])  # (1, 3, S, S)


def _require_preprocess(preprocess: Preprocess) -> None:
    """Check the ranges again: a struct made in code, unlike one that was read, is not validated."""
    if preprocess.size < 1 or not 0 < preprocess.crop <= 1:
        raise InvalidSpec(
            f"preprocess: size {preprocess.size} must be at least 1, and crop {preprocess.crop} above 0 and at most 1"
        )
    if preprocess.interpolation not in _RESAMPLING:
        raise InvalidSpec(f"preprocess: interpolation {preprocess.interpolation!r} is not one of bicubic, bilinear")
    if not all(value > 0 for value in preprocess.std):
        raise InvalidSpec(f"preprocess: std {list(preprocess.std)} must be above 0 for each of red, green and blue")


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Keep Pillow's warnings from the user: what matters among them is checked here and raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _read_head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            head = file.read(32)
    except FileNotFoundError:
        raise RunError(f"image {path} does not exist; check the path") from None
    except OSError as error:
        raise RunError(f"image {path} cannot be read: {error.strerror}; give a file that you may read") from None
    if not head:
        raise RunError(f"image {path} is empty (0 bytes); copy it again from its source")
    return head


def _require_size(path: Path, width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise _zero_sized(path, width, height)
    if width * height > _MOST_PIXELS:
        raise _enormous(path, f"{width} x {height} = {width * height / 1e6:.1f} megapixels")


def _zero_sized(path: Path, width: int, height: int) -> RunError:
    return RunError(f"image {path} is {width} x {height} pixels by its header; give an image of at least 1 x 1")


def _enormous(path: Path, extent: str) -> RunError:
    return RunError(
        f"image {path} has {extent} by its header, above the {_MOST_PIXELS // 1_000_000} megapixels "
        "that edgecomp decodes; shrink it first"
    )


def _pixels_named_in(message: str) -> str:
    """Return the extent from Pillow's text; it refuses the largest images before their size can be asked for."""
    found = re.search(r"\((\d+) pixels\)", message)
    return f"{int(found[1]) / 1e6:.1f} megapixels" if found else "too many pixels"


def _unidentified(path: Path, head: bytes) -> RunError:
    """Explain a file that Pillow cannot open, from its first 32 bytes."""
    kind = next((kind for kind, signature in _SIGNATURES.items() if head.startswith(signature)), "")
    if not kind or (kind == "WebP" and head[8:12] != b"WEBP"):
        return RunError(
            f"image {path} is not a JPEG, PNG, WebP or BMP image: it begins with {head[:8]!r}; convert it to PNG"
        )
    if kind == "PNG" and len(head) >= 24:
        width, height = struct.unpack(">II", head[16:24])
    elif kind == "BMP" and len(head) >= 26:
        width, height = struct.unpack("<ii", head[18:26])
    else:
        width = height = 1
    if not width or not height:
        return _zero_sized(path, width, height)
    return RunError(
        f"image {path} is truncated or damaged: its {path.stat().st_size} bytes begin as a {kind} but hold no "
        "readable header; copy it again from its source"
    )


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation. Pillow's own `exif_transpose` rewrites all tags, and fails on odd ones."""
    turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION_TAG, 1))
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_grey16(image)
    if image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _from_grey16(image: Image.Image) -> Image.Image:
    wide = np.asarray(image).astype(np.int64).clip(0, 65535)
    grey = ((wide + 128) // 257).astype(np.uint8)  # to the nearest, for 257 is odd
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[wide == transparent] = 255
    return Image.fromarray(grey).convert("RGB")
