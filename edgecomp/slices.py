"""A large image as slices and an overview: which grid, which sizes, and how their tokens follow each other.

The policy is that of LLaVA-UHD (arXiv:2403.11703, section 3.1), which MiniCPM-V took over. Here are no models: what it
returns are the inputs of a bundle of `slice-wise`, and the order in which a language model reads its outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta
from PIL import Image

from edgecomp.errors import InvalidSpec, RunError
from edgecomp.images import to_pixels
from edgecomp.specs.preprocess import Preprocess

__all__ = [
    "BATCHES",
    "BUCKETS",
    "NEWLINE",
    "SEPARATOR",
    "Prepared",
    "SlicePolicy",
    "Sliced",
    "best_size",
    "choose_grid",
    "cut",
    "join_rows",
    "order_of_rows",
    "policy_of",
    "prepare_slices",
    "rows_of_bucket",
]

BUCKETS = (1, 2, 3, 4, 6, 9)
"""Slices that a bundle is exported for; with an overview each is a batch of one more. 1 is an image by itself."""

BATCHES = tuple(slices + 1 if slices > 1 else 1 for slices in BUCKETS)
"""The same with the overview: what a bundle is exported for."""

SEPARATOR, NEWLINE = -1, -2
"""What stands in `order_of_rows` behind a slice: a separator within a row of slices, a newline at its end."""

Array = npt.NDArray[np.generic]

_CUBIC = Image.Resampling.BICUBIC


class SlicePolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How an image is cut.

    Attributes:
        resolution: side of the square whose area a slice and the overview have, in pixels (448; UHD's paper: 336).
        patch: sides are multiples of it.
        most: slices (9; UHD's paper: 6).
        overview: where the overview stands among the rows of the batch.
        fit: how a part comes into the square that the encoder takes: `stretch`, to all of it; or `pad`, in its own
            aspect into the upper left corner, for methods that take a mask.
    """

    resolution: Annotated[int, Meta(ge=1, le=8192)] = 448
    patch: Annotated[int, Meta(ge=1, le=1024)] = 14
    most: Annotated[int, Meta(ge=1, le=1024)] = 9
    overview: Literal["first", "last"] = "first"
    fit: Literal["stretch", "pad"] = "stretch"


class Sliced(msgspec.Struct, frozen=True):
    """An image that was cut.

    Attributes:
        grid: columns and rows of slices; none where the image stands by itself.
        overview: the whole image, at about the area of a slice.
        slices: in raster order.
    """

    grid: tuple[int, int] | None
    overview: Image.Image
    slices: tuple[Image.Image, ...]


class Prepared(msgspec.Struct, frozen=True):
    """The inputs of a bundle, and how its outputs follow each other.

    Attributes:
        image: (b, 3, S, S) float32 or (b, S, S, 3) uint8; rows behind `count` are empty.
        mask: (b, N), true where a patch holds picture.
        sizes: (b, 2) int32, rows and columns of these patches.
        count: rows that are real: slices and overview.
        grid: columns and rows of slices; none where there is the overview alone.
    """

    image: Array
    mask: npt.NDArray[np.bool_]
    sizes: npt.NDArray[np.int32]
    count: int
    grid: tuple[int, int] | None


def policy_of(params: Mapping[str, Any]) -> SlicePolicy:
    """Return the policy that the parameters of `slice-wise` hold, as a manifest writes them."""
    return SlicePolicy(**{name: params[name] for name in SlicePolicy.__struct_fields__ if name in params})


def choose_grid(width: int, height: int, policy: SlicePolicy) -> tuple[int, int] | None:
    """Return columns and rows of slices for an image, none where it is small enough to stand by itself.

    The ideal number of slices is the image's area over that of a slice, rounded up, at most `policy.most`. Of all grids
    with one slice fewer, as many or one more, the one whose aspect is nearest to the image's (by logarithm) is taken,
    of equals the first, counts and columns ascending.
    """
    _require_image(width, height)
    ideal = min(math.ceil(width * height / policy.resolution**2), policy.most)
    if ideal <= 1:
        return None
    counts = [count for count in (ideal - 1, ideal, ideal + 1) if 1 < count <= policy.most]
    grids = [(columns, count // columns) for count in counts for columns in _divisors(count)]
    aspect = math.log(width / height)
    return min(grids, key=lambda grid: abs(aspect - math.log(grid[0] / grid[1])))


def best_size(width: float, height: float, policy: SlicePolicy, *, enlarge: bool = False) -> tuple[int, int]:
    """Return the width and height that an image is resized to: the area of a slice, its aspect, multiples of a patch.

    Args:
        enlarge: also where the image is smaller than a slice.
    """
    if enlarge or width * height > policy.resolution**2:
        aspect = width / height
        height = int(policy.resolution / math.sqrt(aspect))
        width = int(height * aspect)
    return _floor_to(width, policy.patch), _floor_to(height, policy.patch)


def cut(image: Image.Image, policy: SlicePolicy) -> Sliced:
    """Cut an image into slices, beside an overview of it; all are resized bicubically."""
    grid = choose_grid(*image.size, policy)
    overview = image.resize(best_size(*image.size, policy, enlarge=grid is None), _CUBIC)
    if grid is None:
        return Sliced(None, overview, ())
    columns, rows = grid
    cell = (_floor_to(image.width, columns) / columns, _floor_to(image.height, rows) / rows)
    width, height = best_size(*cell, policy, enlarge=True)
    whole = image.resize((width * columns, height * rows), _CUBIC)
    places = [(column * width, row * height) for row in range(rows) for column in range(columns)]
    return Sliced(grid, overview, tuple(whole.crop((x, y, x + width, y + height)) for x, y in places))


def rows_of_bucket(count: int, batches: Sequence[int]) -> int:
    """Return the smallest batch that holds so many rows.

    Args:
        count: slices and overview of a request, of all its images.
        batches: that a bundle has.

    Raises:
        InvalidSpec: none does.
    """
    fitting = [batch for batch in sorted(batches) if batch >= count]
    if not fitting:
        raise InvalidSpec(
            f"{count} rows (slices and overview) are above the largest batch of the bundle, {max(batches)}; lower "
            f"the policy's `most`, now for example to {max(1, max(batches) - 1)}, or export with --batch {count}"
        )
    return fitting[0]


def prepare_slices(
    image: Image.Image,
    policy: SlicePolicy,
    preprocess: Preprocess,
    *,
    batches: Sequence[int] = BATCHES,
    dtype: Literal["float32", "uint8"] = "float32",
) -> Prepared:
    """Cut an image and bring each part into a square of its own, as `policy.fit` says.

    A padded part that is longer than the square is shrunk to it, by whole patches.

    Args:
        preprocess: of the encoder: the square's side, mean and standard deviation; its crop plays no part.
        batches: that the bundle has.
        dtype: of the pixels, as in `to_pixels`.
    """
    side, patch = preprocess.size, policy.patch
    if side % patch:
        raise InvalidSpec(f"slices have patches of {patch} pixels, and the encoder takes {side}, which is no multiple")
    sliced = cut(image.convert("RGB"), policy)
    parts = [*sliced.slices]
    parts.insert(0 if policy.overview == "first" else len(parts), sliced.overview)
    batch = rows_of_bucket(len(parts), batches)
    exact = Preprocess(side, 1.0, preprocess.interpolation, preprocess.mean, preprocess.std)
    fill = tuple(round(255 * value) for value in preprocess.mean)
    pixels, sizes = [], np.zeros((batch, 2), np.int32)
    for index, part in enumerate(parts):
        part = part.resize((side, side), _CUBIC) if policy.fit == "stretch" else _shrink(part, side, patch)
        canvas = Image.new("RGB", (side, side), fill)
        canvas.paste(part, (0, 0))
        pixels.append(to_pixels(canvas, exact, dtype))
        sizes[index] = part.height // patch, part.width // patch
    empty = [np.zeros_like(pixels[0])] * (batch - len(parts))
    across = np.arange(side // patch)
    mask = (across[:, None] < sizes[:, :1, None]) & (across < sizes[:, 1:, None])
    return Prepared(np.concatenate([*pixels, *empty]), mask.reshape(batch, -1), sizes, len(parts), sliced.grid)


def order_of_rows(grid: tuple[int, int] | None, tokens: int, policy: SlicePolicy) -> npt.NDArray[np.int32]:
    """Return how the outputs of a batch follow each other for a language model.

    Args:
        grid: columns and rows of slices, or none.
        tokens: that each slice and the overview are compressed to, M.

    Returns:
        numbers of rows of the outputs laid end to end, (b * M, D), with `SEPARATOR` behind each slice but the last of
        a row of slices, which `NEWLINE` stands behind.
    """
    block = np.arange(tokens, dtype=np.int32)
    columns, rows = grid or (0, 0)
    first = 1 if policy.overview == "first" else 0
    found = []
    for index in range(columns * rows):
        mark = NEWLINE if index % columns == columns - 1 else SEPARATOR
        found += [block + (first + index) * tokens, np.array([mark], np.int32)]
    overview = block + (0 if first else columns * rows) * tokens
    return np.concatenate([overview, *found] if first else [*found, overview])


def join_rows(
    latents: npt.NDArray[np.float32],
    order: npt.NDArray[np.int32],
    *,
    separator: npt.NDArray[np.float32],
    newline: npt.NDArray[np.float32],
) -> npt.NDArray[np.float32]:
    """Return what a language model reads: (L, D).

    Args:
        latents: of a batch, (b, M, D).
        order: of `order_of_rows`.
        separator, newline: the language model's embeddings of `,` and of a line's end, (D,).
    """
    rows = latents.reshape(-1, latents.shape[-1])
    if order.max(initial=0) >= len(rows):
        raise RunError(f"the order names row {order.max()}, and {len(latents)} slices have {len(rows)} rows")
    # the last two rows are reached by -1 and -2
    table = np.concatenate([rows, newline[None], separator[None]]).astype(np.float32)
    return np.ascontiguousarray(table[order])


def _floor_to(length: float, unit: int) -> int:
    return max(math.floor(length / unit) * unit, unit)


def _divisors(count: int) -> list[int]:
    return [size for size in range(1, count + 1) if count % size == 0]


def _shrink(image: Image.Image, side: int, patch: int) -> Image.Image:
    scale = side / max(image.size)
    if scale >= 1:
        return image
    width, height = (min(side, _floor_to(length * scale, patch)) for length in image.size)
    return image.resize((width, height), _CUBIC)


def _require_image(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise RunError(f"an image of {width} x {height} pixels cannot be sliced; give one of at least 1 x 1")
