"""A request that is laid out before it fits a graph: an image in slices or tiles, a text in strips."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from PIL import Image

from edgecomp.bundle import Bundle
from edgecomp.errors import InvalidSpec, RunError
from edgecomp.images import PixelType, read_image, to_pixels
from edgecomp.inputs import read_tensors, require_inputs
from edgecomp.runners import Array
from edgecomp.slices import (
    Layout,
    Prepared,
    SlicePolicy,
    TilePolicy,
    choose_tiles,
    fit_tiles,
    grid_of_rows,
    layout_of_page,
    layout_of_slices,
    policy_of,
    prepare_page,
    prepare_slices,
)
from edgecomp.specs.budget import read_count
from edgecomp.specs.manifest import Bucket
from edgecomp.strips import render_strips

__all__ = ["TEXT_FILE", "LaidOut", "image_pixels", "kind_of", "lay_out", "suffices", "to_image"]

TEXT_FILE = ".txt"
_TENSOR_FILES = (".safetensors", ".npz")
_IMAGE_RANK = 4


class LaidOut(msgspec.Struct, frozen=True):
    """The inputs of one bucket, and how what it gives is read.

    Attributes:
        rows: of the batch that are real; those behind them only fill it.
        reason: why this bucket.
    """

    bucket: Bucket
    inputs: dict[str, Array]
    rows: int
    layout: Layout
    reason: str

    def real(self, outputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs without the rows that only fill the batch."""
        return {name: array[: self.rows] for name, array in outputs.items()}


def kind_of(bundle: Bundle) -> Literal["slices", "page", "text", ""]:
    """Return what is laid out for a bundle: an image in slices, a page in tiles, a text in strips; "": nothing is."""
    manifest = bundle.manifest
    first, *others = manifest.buckets[0].inputs
    if first.kind != "image" or manifest.preprocess is None:
        return ""
    if manifest.method == "slice-wise":
        return "slices"
    if manifest.method == "deepseek-ocr" and manifest.placement == "encoder":
        return "page"
    return "text" if [spec.name for spec in others] == ["patch_mask"] else ""


def lay_out(
    bundle: Bundle,
    request: Any,
    *,
    text: str | None = None,
    budget: str | int | None = None,
    batch: int | None = None,
    font: str | Path = "",
) -> LaidOut | None:
    """Lay a request out for the bucket that holds it; none where it is of a kind that fits as it is.

    Args:
        request: an image (path, Pillow image, uint8 (H, W, 3)); a .txt file; inputs by name or a file of them, which
            tell how many tiles there are; or none, where `text` is the request.
        text: what strips are rendered of.
        budget: tokens wanted; the smallest bucket that keeps so many serves. None: the largest; of pages the one that
            holds the tiles.
        batch: one of the bundle's; None: the smallest that holds the parts.
        font: a TrueType file for strips; "": the font that Pillow brings.

    Raises:
        InvalidSpec: no bucket holds the parts; the largest is named. RunError: a file cannot be read.
    """
    kind = kind_of(bundle)
    is_path = isinstance(request, (str, Path))
    suffix = Path(request).suffix.lower() if is_path else ""
    if suffix == TEXT_FILE or (request is None and text is not None):
        return _lay_text(bundle, kind, request, text, budget, batch, font)
    if kind in ("", "text") or request is None:
        return None
    if isinstance(request, Mapping) or suffix in _TENSOR_FILES:
        return _lay_tensors(bundle, request, budget) if kind == "page" else None
    if isinstance(request, np.ndarray) and (request.dtype != np.uint8 or request.ndim != 3 or request.shape[2] != 3):
        return None  # pixels as the graph takes them
    if bundle.manifest.then is not None and bundle.manifest.router is not None and budget is None:
        return None  # the router chooses among the second method's buckets, which are all handed the same
    if text is not None:
        raise InvalidSpec(
            f"a text was given, and {bundle.path} takes an image in parts, which no router that reads words sees; drop "
            "it"
        )
    _require_one_image(bundle)
    image = to_image(request)
    laid = (_lay_slices if kind == "slices" else _lay_page)(bundle, image, budget, batch)
    if bundle.manifest.router is None or budget is not None:
        return laid
    return msgspec.structs.replace(laid, reason=f"{laid.reason}; the router is not asked")


def suffices(bundle: Bundle, budget: str | int) -> int:
    """Return the smallest count of the bundle that keeps as many tokens as are wanted."""
    buckets = sorted({bucket.budget.tokens_out for bucket in bundle.manifest.buckets})
    if isinstance(budget, bool) or not isinstance(budget, (int, str, np.integer)):
        raise InvalidSpec(
            f"budget {budget!r} is of type {type(budget).__name__}; give a count such as {buckets[0]}, or a percentage "
            "as text"
        )
    tokens_in = bundle.manifest.buckets[0].budget.tokens_in
    wanted = read_count(budget, tokens_in=tokens_in) if isinstance(budget, str) else int(budget)
    if wanted < 1 or wanted > buckets[-1]:
        raise InvalidSpec(
            f"budget {budget} is not between 1 and {buckets[-1]}, the largest bucket of {bundle.path}; it has "
            f"{', '.join(map(str, buckets))}"
        )
    return next(tokens for tokens in buckets if tokens >= wanted)


def image_pixels(bundle: Bundle, image: Image.Image, dtype: PixelType) -> Array:
    """Return an image that is handed over whole, as `to_pixels` does: a page padded or stretched, any other cropped."""
    preprocess = bundle.manifest.preprocess
    assert preprocess is not None, "a bundle that takes images says how they are prepared"
    if kind_of(bundle) == "page":
        return prepare_page(image, None, _tile_policy(bundle), preprocess, dtype=dtype)[0]
    return to_pixels(image, preprocess, dtype)


def to_image(request: Any) -> Image.Image:
    """Return an image from a path, a Pillow image, or an array uint8 (H, W, 3)."""
    if isinstance(request, (str, Path)):
        return read_image(request)
    if isinstance(request, np.ndarray):
        return Image.fromarray(request)
    if not isinstance(request, Image.Image):
        raise RunError(
            f"an image of type {type(request).__name__} was given; give a path, a Pillow image, a numpy array, or a "
            "mapping of named inputs"
        )
    return request


def _require_one_image(bundle: Bundle) -> None:
    first = bundle.manifest.buckets[0].inputs[0]
    if len(first.shape) != _IMAGE_RANK:
        raise InvalidSpec(
            f"{bundle.path} takes {first.shape[1]} images in a request, each in slices of its own, and images are cut "
            "one at a time: lay them out with edgecomp.slices, and give a file or a mapping of inputs"
        )


def _candidates(bundle: Bundle, budget: str | int | None, batch: int | None) -> tuple[Bucket, ...]:
    """Return the buckets of the count that suffices, or of the largest, in ascending batches."""
    count = max(b.budget.tokens_out for b in bundle.manifest.buckets) if budget is None else suffices(bundle, budget)
    found = bundle.select(batch=batch)
    return tuple(sorted((b for b in found if b.budget.tokens_out == count), key=lambda b: b.batch))


def _pixel_type(bucket: Bucket) -> PixelType:
    return "uint8" if bucket.inputs[0].dtype == "uint8" else "float32"


# -- slices -----------------------------------------------------------------------------------------


def _lay_slices(bundle: Bundle, image: Image.Image, budget: str | int | None, batch: int | None) -> LaidOut:
    manifest, candidates = bundle.manifest, _candidates(bundle, budget, batch)
    policy = policy_of(manifest.params)
    assert manifest.preprocess is not None
    batches = [bucket.batch for bucket in candidates]
    _require_patches(bundle, candidates[0], policy, manifest.preprocess.size)
    made = prepare_slices(image, policy, manifest.preprocess, batches=batches, dtype=_pixel_type(candidates[0]))
    bucket = next(bucket for bucket in candidates if bucket.batch == len(made.image))
    parts = " x ".join(map(str, made.grid)) + " slices and an overview" if made.grid else "one slice"
    return LaidOut(
        bucket,
        _named(bucket, made),
        made.count,
        layout_of_slices(made.grid, bucket.outputs[0].shape[1], policy),
        f"{parts} of a batch of {bucket.batch}",
    )


def _require_patches(bundle: Bundle, bucket: Bucket, policy: SlicePolicy, side: int) -> None:
    """Refuse positions on another grid than the encoder's, where a graph takes some."""
    across, tokens_in = side // policy.patch, bucket.budget.tokens_in
    if across**2 != tokens_in and any(spec.kind in ("mask", "sizes") for spec in bucket.inputs):
        raise InvalidSpec(
            f"{bundle.path}: {side} pixels in patches of {policy.patch} are {across} x {across} positions, and the "
            f"encoder hands over {tokens_in} tokens; export again with the encoder's own params.patch and without its "
            "prefix tokens, or give a file of all inputs"
        )


def _named(bucket: Bucket, made: Prepared) -> dict[str, Array]:
    """Name the inputs that the slices give; any other is refused."""
    inputs: dict[str, Array] = {}
    for spec in bucket.inputs:
        if spec.kind == "image":
            inputs[spec.name] = made.image
        elif spec.kind == "mask" and spec.shape == made.mask.shape:
            inputs[spec.name] = made.mask
        elif spec.kind == "sizes" and _are_packed(made):
            inputs[spec.name] = made.sizes
        else:
            raise InvalidSpec(f"{bucket.model} takes {spec} beside the slices; give a file of all inputs")
    return inputs


def _are_packed(made: Prepared) -> bool:
    """Whether the real tokens of each slice stand in front, one row behind the other: those of full width do."""
    side = math.isqrt(made.mask.shape[1])
    return bool((made.sizes[: made.count, 1] == side).all())


# -- pages ------------------------------------------------------------------------------------------


def _tiles_of(bucket: Bucket) -> int:
    """Return how many tiles a bucket takes."""
    return bucket.inputs[1].shape[1] if len(bucket.inputs) > 1 else 0


def _tile_policy(bundle: Bundle) -> TilePolicy:
    params = bundle.manifest.params
    return TilePolicy(
        tile=params["tile_size"],
        view=bundle.manifest.image_size,
        most=params["most"],
        pixels=4 * params["patch_size"],
    )


def _lay_page(bundle: Bundle, image: Image.Image, budget: str | int | None, batch: int | None) -> LaidOut:
    manifest, policy = bundle.manifest, _tile_policy(bundle)
    assert manifest.preprocess is not None
    if manifest.then is not None:
        return _lay_page_of_two(bundle, image, _candidates(bundle, budget, batch)[0], manifest.then.between)
    held = {bucket.budget.tokens_out: bucket for bucket in sorted(bundle.select(batch=batch), key=lambda b: -b.batch)}
    grids = {rows: grid_of_rows(rows, _tiles_of(bucket), policy) for rows, bucket in held.items()}
    if budget is not None:
        rows = suffices(bundle, budget)
        why = f"the smallest that keeps {budget}"
    else:
        wanted = choose_tiles(*image.size, policy)
        grid = fit_tiles(wanted, list(grids.values()), policy)
        rows = next(rows for rows in grids if grids[rows] == grid)
        columns, lines = wanted or (0, 0)
        asked = f"{columns} x {lines} tiles" if wanted else "a page without tiles"
        why = f"as {image.width} x {image.height} pixels ask for"
        if grid != wanted:
            why = f"the next larger, as {asked}, which {image.width} x {image.height} pixels ask for, is no bucket"
    grid, bucket = grids[rows], held[rows]
    layout = layout_of_page(grid, policy, ends=manifest.params["part"] == "whole")
    inputs = _page_inputs(bundle, bucket, image, grid)
    return LaidOut(bucket, inputs, 1, layout, f"{_name_page(grid)} in {rows} rows: {why}")


def _lay_page_of_two(bundle: Bundle, image: Image.Image, bucket: Bucket, between: int) -> LaidOut:
    """Lay a page out for its encoder where a second method reads the encoder's rows: what comes out has no lines."""
    policy = _tile_policy(bundle)
    grid = grid_of_rows(between, _tiles_of(bucket), policy)
    fit_tiles(choose_tiles(*image.size, policy), [grid], policy, option="--between")
    kept, none = bucket.budget.tokens_out, np.empty(0, np.int32)
    layout = Layout(grid, math.prod(grid or (0, 0)) + 1, np.arange(kept, dtype=np.int32), none, none)
    reason = f"{_name_page(grid)} in {between} rows, of which {kept} are kept"
    return LaidOut(bucket, _page_inputs(bundle, bucket, image, grid), 1, layout, reason)


def _page_inputs(bundle: Bundle, bucket: Bucket, image: Image.Image, grid: tuple[int, int] | None) -> dict[str, Array]:
    preprocess = bundle.manifest.preprocess
    assert preprocess is not None
    view, tiles = prepare_page(image, grid, _tile_policy(bundle), preprocess, dtype=_pixel_type(bucket))
    given = [view] if tiles is None else [view, tiles]
    return {
        spec.name: np.ascontiguousarray(np.broadcast_to(value, spec.shape))
        for spec, value in zip(bucket.inputs, given, strict=True)
    }


def _name_page(grid: tuple[int, int] | None) -> str:
    return f"{grid[0]} x {grid[1]} tiles and the page" if grid else "the page"


def _lay_tensors(bundle: Bundle, request: str | Path | Mapping[str, Array], budget: str | int | None) -> LaidOut | None:
    """Return the bucket that takes inputs of these names, where the buckets of a bundle take different ones."""
    buckets = sorted(bundle.manifest.buckets, key=lambda b: (b.batch, b.budget.tokens_out))
    if len({_tiles_of(bucket) for bucket in buckets}) == 1:
        return None
    where = "the request" if isinstance(request, Mapping) else str(request)
    tensors = request if isinstance(request, Mapping) else read_tensors(request)
    if budget is not None:
        count = suffices(bundle, budget)
        buckets = [bucket for bucket in buckets if bucket.budget.tokens_out == count]
    shapes = {name: np.shape(value) for name, value in tensors.items()}
    alike = [b for b in buckets if shapes.keys() == {spec.name for spec in b.inputs}]
    fitting = [b for b in alike if all(shapes[spec.name] == spec.shape for spec in b.inputs)]
    names = sorted({", ".join(spec.name for spec in b.inputs) for b in buckets})
    if not alike:
        raise RunError(f"{where}: inputs {', '.join(shapes)} are of no bucket; give {' or '.join(names)}")
    bucket = (fitting or alike)[0]
    require_inputs(tensors, bucket.inputs, where)
    if len(rows := sorted({str(b.budget.tokens_out) for b in fitting})) > 1:
        raise InvalidSpec(
            f"{where}: {_tiles_of(bucket)} tiles are those of the buckets {' and '.join(rows)}, which lay them out "
            "differently; say which by the budget"
        )
    policy = _tile_policy(bundle)
    grid = grid_of_rows(bucket.budget.tokens_out, _tiles_of(bucket), policy)
    return LaidOut(bucket, dict(tensors), bucket.batch, layout_of_page(grid, policy), "the bucket of these inputs")


# -- texts ------------------------------------------------------------------------------------------


def _lay_text(
    bundle: Bundle,
    kind: str,
    request: str | Path | None,
    text: str | None,
    budget: str | int | None,
    batch: int | None,
    font: str | Path,
) -> LaidOut:
    """Render a text for the smallest batch that holds it."""
    candidates = _candidates(bundle, budget, batch)
    specs = {spec.name: spec for spec in candidates[0].inputs}
    manifest = bundle.manifest
    if kind != "text" or manifest.preprocess is None:
        named = f"{request} is a text" if request is not None else "a text was given"
        raise InvalidSpec(
            f"{named}, and {bundle.path} takes {', '.join(map(str, specs.values()))}; a text is rendered for a model "
            "with image and patch_mask: `edgecomp export --method vist --backbone vit_large_patch14_clip_224`"
        )
    if request is not None:
        if text is not None:
            raise InvalidSpec(f"two texts were given, {request} and one in words; give one of them")
        try:
            text = Path(request).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"text {request} cannot be read ({error}); give a file in UTF-8") from None
    assert text is not None
    size, rows = manifest.preprocess.size, math.isqrt(specs["patch_mask"].shape[1])
    batches = [bucket.batch for bucket in candidates]
    rendered = render_strips(text, images=batches, size=size, patch=size // rows, font=font)
    bucket = next(bucket for bucket in candidates if bucket.batch == len(rendered.images))
    exact = msgspec.structs.replace(manifest.preprocess, crop=1.0)
    pixels = [to_pixels(Image.fromarray(page), exact, _pixel_type(bucket)) for page in rendered.images]
    pages = "image" if rendered.used == 1 else "images"
    order = np.arange(rendered.used * bucket.outputs[0].shape[1], dtype=np.int32)
    none = np.empty(0, np.int32)
    return LaidOut(
        bucket,
        {"image": np.concatenate(pixels), "patch_mask": rendered.patch_mask},
        rendered.used,
        Layout(None, rendered.used, order, none, none),
        f"{rendered.used} {pages} of text ({rendered.pixels} pixels of line), in the batch of {bucket.batch}",
    )
