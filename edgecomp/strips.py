"""Text as strips of pixels, folded into the square images that a vision encoder takes, and which patches hold ink."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from edgecomp.errors import InvalidSpec, RunError

__all__ = ["Strips", "render_strips"]

_WHITE = 255
_NO_CHARACTER = "\uffff"  # no font has it, so that it is drawn as the box for what is lacking
_MOST_CHARACTERS = 1 << 20  # of one request; 28 images hold some twenty thousand


class Strips(NamedTuple):
    """A rendered text.

    Attributes:
        images: (K, S, S, 3) uint8, black on white; those behind the text are blank.
        patch_mask: (K, N) true where a patch holds ink, patches in raster order.
        used: images that hold text.
        pixels: length of the text's line.
    """

    images: npt.NDArray[np.uint8]
    patch_mask: npt.NDArray[np.bool_]
    used: int
    pixels: int


def render_strips(
    text: str,
    *,
    images: Sequence[int],
    size: int = 224,
    patch: int = 14,
    font: str | Path = "",
    font_size: int = 10,
) -> Strips:
    """Render a text as one line as high as a patch, and fold it into as many images as a bucket has.

    Each row of patches goes on where the one above ended, and each image where the one before did. Runs of white space
    become one space.

    Args:
        images: the buckets; the smallest that holds the text is taken.
        size: side of an image in pixels.
        patch: side of a patch, and height of the line.
        font: a TrueType file, such as Noto Sans; "": the font that Pillow brings.
        font_size: in pixels.

    Raises:
        InvalidSpec: there is no text, it is longer than the largest bucket holds, the font lacks some of its
            characters or is higher than a patch, or a size is none.
        RunError: the font cannot be read.
    """
    if min(images, default=0) < 1 or font_size < 1 or patch < 1 or size < 1 or size % patch:
        raise InvalidSpec(
            f"images={tuple(images)}, size={size}, patch={patch}, font_size={font_size}: give at least one bucket of 1 "
            "image or more, a font of at least 1 pixel, and a size that is a multiple of the patch"
        )
    line = " ".join(text.split())
    if not line:
        raise InvalidSpec(f"a text of {len(text)} characters has nothing to render; give one with words")
    face = _read_font(font, font_size)
    rows, most = size // patch, max(images)
    if len(line) > _MOST_CHARACTERS:
        raise InvalidSpec(
            f"the text has {len(line)} characters, above the {_MOST_CHARACTERS} of one request; send it in parts"
        )
    length, held = math.ceil(face.getlength(line)), rows * size
    needed = math.ceil(length / held)
    if needed > most:
        fit = int(len(line) * most * held / length)
        raise InvalidSpec(
            f"the text has {len(line)} characters and is {length} pixels long at {font_size} pixels: {needed} images "
            f"of {held}. The largest bucket has {most} ({most * held} pixels), and about {fit} characters fit; shorten "
            "it, or send it in parts"
        )
    ascent, descent = face.getmetrics() if isinstance(face, ImageFont.FreeTypeFont) else (font_size, 0)
    if ascent + descent > patch:
        raise InvalidSpec(
            f"the font is {ascent + descent} pixels high at size {font_size}, and a strip {patch}; choose a smaller one"
        )
    _require_glyphs(line, face, font)
    bucket = min(count for count in images if count >= needed)
    canvas = Image.new("L", (bucket * held, patch), _WHITE)
    ImageDraw.Draw(canvas).text((0, (patch - ascent - descent) // 2), line, fill=0, font=face)
    strips = np.asarray(canvas).reshape(patch, bucket, rows, size)  # the line, cut into rows of each image
    pages = np.ascontiguousarray(strips.transpose(1, 2, 0, 3)).reshape(bucket, size, size)
    ink = (pages < _WHITE).reshape(bucket, rows, patch, rows, patch).any((2, 4)).reshape(bucket, -1)
    return Strips(np.repeat(pages[..., None], 3, axis=-1), ink, needed, length)


def _require_glyphs(line: str, face: ImageFont.FreeTypeFont | ImageFont.ImageFont, font: str | Path) -> None:
    """Refuse characters that would all become the font's one box for what it lacks."""
    if not isinstance(face, ImageFont.FreeTypeFont):
        return

    def ink(character: str) -> tuple[tuple[int, int], bytes]:
        mask = face.getmask(character)
        return mask.size, bytes(mask)

    box = ink(_NO_CHARACTER)
    lacking = [character for character in sorted(set(line) - {" "}) if ink(character) == box]
    if lacking:
        named = ", ".join(
            f"{character if character.isprintable() else ''} U+{ord(character):04X}".strip()
            for character in lacking[:8]
        )
        more = f" and {len(lacking) - 8} more" if len(lacking) > 8 else ""
        face_name = str(font) or "the font that Pillow brings"
        raise InvalidSpec(
            f"the text has {len(lacking)} characters that {face_name} lacks: {named}{more}; "
            "name a font that has them with --font FILE, or leave them out"
        )


def _read_font(font: str | Path, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    if not str(font):
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(str(font), size)
    except OSError as error:
        raise RunError(f"font {font} cannot be read ({error}); give a TrueType or OpenType file") from None
