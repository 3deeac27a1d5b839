"""A large image in parts and an overview: which grid, which sizes, and how their tokens follow each other.

Slices are those of LLaVA-UHD (arXiv:2403.11703, section 3.1), which MiniCPM-V took over; tiles those of DeepSeek-OCR
(arXiv:2510.18234, section 3.2). Here are no models: what it returns are the inputs of a bundle of `slice-wise` or
`deepseek-ocr`, and the order in which a language model reads its outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args, get_type_hints

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
    "Layout",
    "Prepared",
    "SlicePolicy",
    "Sliced",
    "TilePolicy",
    "best_size",
    "choose_grid",
    "choose_tiles",
    "cut",
    "fit_tiles",
    "grid_of_rows",
    "join_rows",
    "layout_of_page",
    "layout_of_slices",
    "order_of_rows",
    "policy_of",
    "prepare_page",
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
        sides: how they come to be: rounded `down` (LLaVA-UHD) or to the `nearest` (MiniCPM-V).
        most: slices (9; UHD's paper: 6).
        overview: where the overview stands among the rows of the batch.
        fit: how a part comes into the square that the encoder takes: `stretch`, to all of it; or `pad`, in its own
            aspect into the upper left corner, for methods that take a mask.
    """

    resolution: Annotated[int, Meta(ge=1, le=8192)] = 448
    patch: Annotated[int, Meta(ge=1, le=1024)] = 14
    sides: Literal["down", "nearest"] = "down"
    most: Annotated[int, Meta(ge=1, le=1024)] = 9
    overview: Literal["first", "last"] = "first"
    fit: Literal["stretch", "pad"] = "stretch"

    def __post_init__(self) -> None:
        """Refuse what a file would be refused for."""
        _require_valid(self)


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


class Layout(msgspec.Struct, frozen=True):
    """How the rows that came out follow each other for a language model.

    Attributes:
        grid: columns and rows of slices or tiles; none where the image stands by itself.
        parts: slices or tiles, and the overview; or images of text.
        order: (L,) int32, numbers of rows of the outputs laid end to end, or `SEPARATOR` and `NEWLINE` where the
            language model's own embedding goes, as `join_rows` puts it there.
        newlines, separators: int32, where in that order they stand, also where the graph itself gives their rows.
    """

    grid: tuple[int, int] | None
    parts: int
    order: npt.NDArray[np.int32]
    newlines: npt.NDArray[np.int32]
    separators: npt.NDArray[np.int32]

    @property
    def arrays(self) -> dict[str, npt.NDArray[np.int32]]:
        """What a file of outputs holds of it."""
        return {
            "layout.order": self.order,
            "layout.newlines": self.newlines,
            "layout.separators": self.separators,
        }


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
    return _to_multiple(width, policy.patch, policy), _to_multiple(height, policy.patch, policy)


def cut(image: Image.Image, policy: SlicePolicy) -> Sliced:
    """Cut an image into slices, beside an overview of it; all are resized bicubically."""
    grid = choose_grid(*image.size, policy)
    overview = image.resize(best_size(*image.size, policy, enlarge=grid is None), _CUBIC)
    if grid is None:
        return Sliced(None, overview, ())
    columns, rows = grid
    cell = (_to_multiple(image.width, columns, policy) / columns, _to_multiple(image.height, rows, policy) / rows)
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
        InvalidSpec: none does, or there is none.
    """
    if not batches:
        raise InvalidSpec(f"{count} rows (slices and overview) and batches=(): name the batches that a bundle has")
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


def layout_of_slices(grid: tuple[int, int] | None, tokens: int, policy: SlicePolicy) -> Layout:
    """Return `order_of_rows` with the places of newlines and separators in it."""
    order = order_of_rows(grid, tokens, policy)
    columns, rows = grid or (0, 0)
    newlines, separators = (np.flatnonzero(order == mark).astype(np.int32) for mark in (NEWLINE, SEPARATOR))
    return Layout(grid, columns * rows + 1, order, newlines, separators)


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


# -- tiles of a page --------------------------------------------------------------------------------


class TilePolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How DeepSeek-OCR cuts a page.

    Attributes:
        tile: side of a tile in pixels; 0: there are none.
        view: side of the square that the whole page is laid into.
        most: tiles (6; the original names 9 as the largest number).
        pixels: side of the square that one token stands for.
    """

    tile: Annotated[int, Meta(ge=0, le=8192)] = 640
    view: Annotated[int, Meta(ge=1, le=8192)] = 1024
    most: Annotated[int, Meta(ge=2, le=9)] = 6
    pixels: Annotated[int, Meta(ge=1, le=8192)] = 64

    def __post_init__(self) -> None:
        """Refuse what a file would be refused for."""
        _require_valid(self)


_STRETCHED = 640
"""Views of up to so many pixels are stretched where there are no tiles (modes tiny and small), larger ones padded."""


def choose_tiles(width: int, height: int, policy: TilePolicy) -> tuple[int, int] | None:
    """Return columns and rows of tiles for a page, none where it is within one tile, or there are none.

    Of all grids of 2 to `policy.most` tiles the one is taken whose columns / rows is nearest to width / height, by
    difference. Of equals, such as 1 x 1 and 2 x 2, the next larger is taken as long as the page has more than half of
    the pixels that its tiles hold.
    """
    _require_image(width, height)
    if not policy.tile or max(width, height) <= policy.tile:
        return None
    aspect, area = width / height, width * height
    best, least = (0, 0), math.inf
    for count in range(2, policy.most + 1):
        for columns in _divisors(count):
            error = abs(aspect - columns / (count // columns))
            if error < least or (error == least and area > 0.5 * policy.tile**2 * count):
                best, least = (columns, count // columns), error
    return best


def fit_tiles(
    wanted: tuple[int, int] | None,
    held: Sequence[tuple[int, int] | None],
    policy: TilePolicy,
    *,
    option: str = "--budget",
) -> tuple[int, int] | None:
    """Return the smallest grid of a bundle that has as many columns and rows as are wanted.

    Args:
        option: of `edgecomp export`, that an error names.

    Raises:
        InvalidSpec: none does.
    """
    columns, rows = wanted or (0, 0)
    fitting = [grid for grid in held if (grid or (0, 0))[0] >= columns and (grid or (0, 0))[1] >= rows]
    if not fitting:
        largest = max(held, key=lambda grid: math.prod(grid or (0, 0)))
        names = "no tiles" if largest is None else f"{largest[0]} x {largest[1]} tiles"
        raise InvalidSpec(
            f"the page is cut into {columns} x {rows} tiles (columns x rows), and no bucket of the bundle holds them: "
            f"the largest has {names}; export one that does, with {option} {_rows_of_grid((columns, rows), policy)}"
        )
    return min(fitting, key=lambda grid: math.prod(grid or (0, 0)))


def grid_of_rows(rows: int, tiles: int, policy: TilePolicy) -> tuple[int, int] | None:
    """Return columns and rows of the tiles of a bucket, by its rows and by how many tiles it takes."""
    if not tiles:
        return None
    side = policy.tile // policy.pixels
    lines = (rows - _rows_of_grid((0, 0), policy) - tiles * side * side) // side  # a newline behind each line of tokens
    return tiles // lines, lines


def _rows_of_grid(grid: tuple[int, int], policy: TilePolicy) -> int:
    view, side = policy.view // policy.pixels, policy.tile // policy.pixels
    columns, rows = grid
    return rows * side * (columns * side + 1) + view * (view + 1) + 1


def prepare_page(
    image: Image.Image,
    grid: tuple[int, int] | None,
    policy: TilePolicy,
    preprocess: Preprocess,
    *,
    dtype: Literal["float32", "uint8"] = "float32",
) -> tuple[Array, Array | None]:
    """Return the whole page, (1, 3, V, V) or as uint8 (1, V, V, 3), and its tiles, (1, T, 3, s, s), row by row.

    The page keeps its aspect in the middle of the view, on the colour that becomes 0; it is stretched where there is
    no grid in the bundle and the view is small. Tiles are those of the page stretched to the grid.

    Args:
        grid: columns and rows of tiles, or none.
        preprocess: mean and standard deviation; its size and crop play no part.
        dtype: of the view.
    """
    page = image.convert("RGB")
    if not policy.tile and policy.view <= _STRETCHED:
        view = page.resize((policy.view, policy.view), _CUBIC)
    else:
        fill = tuple(int(255 * value) for value in preprocess.mean)
        view = Image.new("RGB", (policy.view, policy.view), fill)
        scale = policy.view / max(page.size)
        width, height = (max(1, round(length * scale)) for length in page.size)
        place = (round((policy.view - width) / 2), round((policy.view - height) / 2))
        view.paste(page.resize((width, height), _CUBIC), place)
    exact = Preprocess(policy.view, 1.0, preprocess.interpolation, preprocess.mean, preprocess.std)
    pixels = to_pixels(view, exact, dtype)
    if grid is None:
        return pixels, None
    columns, rows = grid
    side, exact = policy.tile, msgspec.structs.replace(exact, size=policy.tile)
    whole = page.resize((side * columns, side * rows), _CUBIC)
    places = [(column * side, row * side) for row in range(rows) for column in range(columns)]
    tiles = [to_pixels(whole.crop((x, y, x + side, y + side)), exact, "float32") for x, y in places]
    return pixels, np.concatenate(tiles)[None]


def layout_of_page(grid: tuple[int, int] | None, policy: TilePolicy, *, ends: bool = True) -> Layout:
    """Return where newlines and the separator stand among a page's rows, tiles first; the graph gives them all.

    Args:
        ends: whether there are any: a graph of `part=features` has tokens alone.
    """
    view, side = policy.view // policy.pixels, policy.tile // policy.pixels
    columns, rows = grid or (0, 0)
    lines = [columns * side] * (rows * side) + [view] * view
    if not ends:
        return Layout(grid, 1, np.arange(sum(lines), dtype=np.int32), np.empty(0, np.int32), np.empty(0, np.int32))
    newlines = np.cumsum([tokens + 1 for tokens in lines]).astype(np.int32) - 1
    last = int(newlines[-1]) + 1
    return Layout(grid, columns * rows + 1, np.arange(last + 1, dtype=np.int32), newlines, np.array([last], np.int32))


def _to_multiple(length: float, unit: int, policy: SlicePolicy) -> int:
    units = math.floor(length / unit) if policy.sides == "down" else round(length / unit)
    return max(units * unit, unit)


def _divisors(count: int) -> list[int]:
    return [size for size in range(1, count + 1) if count % size == 0]


def _shrink(image: Image.Image, side: int, patch: int) -> Image.Image:
    scale = side / max(image.size)
    if scale >= 1:
        return image
    width, height = (min(side, max(math.floor(length * scale / patch), 1) * patch) for length in image.size)
    return image.resize((width, height), _CUBIC)


def _require_valid(policy: SlicePolicy | TilePolicy) -> None:
    """Hold a policy that was made in code to its own types, as msgspec holds one that was read."""
    for name, kind in get_type_hints(type(policy), include_extras=True).items():
        value = getattr(policy, name)
        try:
            msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            choices = f" (one of {', '.join(get_args(kind))})" if isinstance(value, str) else ""
            raise InvalidSpec(f"{type(policy).__name__}: {name}={value!r}: {error}{choices}; correct it") from None


def _require_image(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise RunError(f"an image of {width} x {height} pixels cannot be sliced; give one of at least 1 x 1")
