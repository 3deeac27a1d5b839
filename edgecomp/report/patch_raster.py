"""The same pictures in pixels, with Pillow alone, so that a board can draw them."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from edgecomp.patches import PatchLayer, PatchLayers, Picture
from edgecomp.report.colours import group_colours, heat_colours, heat_map
from edgecomp.report.patch_shapes import (
    borders,
    count_words,
    group_places,
    headline,
    legend_of,
    panel_columns,
    rims,
    score_words,
    short_name,
    token_words,
)

__all__ = ["draw_heat", "draw_overview", "draw_patches"]

Array = npt.NDArray[Any]
_PANEL = 280  # pixels of a panel, about
_GAP, _MARGIN, _HEAD, _BAR, _SWATCH = 26, 24, 46, 40, 24
_TINT, _DARKER, _HATCH, _PERIOD = 0.56, 0.34, 0.5, 9
_TEXT, _LESS, _NONE, _STRIPE = (27, 27, 31), (90, 91, 100), (242, 242, 245), (208, 209, 217)


def draw_patches(picture: Picture, number: int, *, cell: int) -> Array:
    """Return the image with what became of its patches: (rows x cell, columns x cell, 3) uint8.

    Args:
        number: of the layer.
        cell: pixels of a patch.
    """
    patches, layer = picture.patches, picture.patches.layers[number]
    rows, columns = patches.rows, patches.columns
    size = columns * cell, rows * cell
    canvas = np.asarray(Image.fromarray(picture.pixels).resize(size, Image.Resampling.BICUBIC)).astype(np.float64)
    owner = _enlarge(layer.rows.reshape(rows, columns), cell)
    places = _enlarge(group_places(patches)[number].reshape(rows, columns), cell)
    inside = places >= 0
    canvas[inside] = (1 - _TINT) * canvas[inside] + _TINT * group_colours()[places[inside]]
    gone = owner < 0
    canvas[gone] *= _DARKER
    hatched = gone & _stripes(owner.shape)
    canvas[hatched] = (1 - _HATCH) * canvas[hatched] + _HATCH * 244
    for edges, half, colour in ((rims, 0.5, 225), (borders, 2, 255), (borders, 1, 16)):
        before, behind = int(half), int(half + 0.5)  # half a pixel: one that stands inside
        for edge in edges(layer, rows, columns):
            x, y, length = edge.x * cell, edge.y * cell, edge.length * cell
            across, down = (0, length) if edge.is_vertical else (length, 0)
            canvas[max(0, y - before) : y + down + behind, max(0, x - before) : x + across + behind] = colour
    found: Array = canvas.round().clip(0, 255).astype(np.uint8)
    return found


def draw_heat(layer: PatchLayer, rows: int, columns: int, *, cell: int) -> Array:
    """Return the heat map of a layer's scores, hatched where there is none: (rows x cell, columns x cell, 3) uint8."""
    low, high = layer.score_range or (0.0, 0.0)
    scores = _enlarge(layer.scores.reshape(rows, columns), cell)
    real = np.isfinite(scores)
    canvas: Array = heat_map(np.where(real, (scores - low) / ((high - low) or 1.0), 0))
    canvas[~real] = _NONE
    canvas[~real & _stripes(real.shape)] = _STRIPE
    return canvas


def draw_overview(picture: Picture) -> Image.Image:
    """Return the input and all layers, with headings, legend and notes, on white."""
    patches = picture.patches
    cell = max(4, round(_PANEL / max(patches.columns, 1)))
    panel = cell * patches.columns
    tiles = 1 + len(patches.layers)
    columns = panel_columns(tiles)
    heats = panel + _BAR + 8 if any(layer.score_range is not None for layer in patches.layers) else 0
    width = 2 * _MARGIN + columns * panel + (columns - 1) * _GAP
    notes = [line for note in (*score_words(patches), *patches.notes) for line in textwrap.wrap(note, width // 7)]
    step = _HEAD + panel + heats + _GAP
    lines = -(-tiles // columns)
    legend = max((42 + down for _, down, *_ in _legend_of(patches, width)), default=0)
    short = heats if lines == 1 and not patches.layers else 0
    height = _MARGIN + 64 + lines * step - short + legend + 20 * len(notes) + _MARGIN
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    _write(
        draw, (_MARGIN, _MARGIN), f"{patches.method} on {picture.image}: {picture.bundle}", 21, most=width - 2 * _MARGIN
    )
    _write(draw, (_MARGIN, _MARGIN + 30), headline(patches), 15, _LESS)
    for place in range(tiles):
        x = _MARGIN + place % columns * (panel + _GAP)
        y = _MARGIN + 64 + place // columns * step
        if not place:
            _heading(draw, (x, y), "input", f"{patches.patches} patches, {patches.rows} x {patches.columns}", panel)
            whole = Image.fromarray(picture.pixels).resize((panel, cell * patches.rows), Image.Resampling.BICUBIC)
            page.paste(whole, (x, y + _HEAD))
            continue
        layer = patches.layers[place - 1]
        _heading(draw, (x, y), f"{short_name(layer.name)}: {token_words(layer.tokens)}", count_words(layer), panel)
        shown = draw_patches(picture, place - 1, cell=cell)
        page.paste(Image.fromarray(shown), (x, y + _HEAD))
        if layer.score_range is not None:
            _paste_heat(page, draw, (x, y + _HEAD + panel + 8), layer, patches, cell)
    y = _MARGIN + 64 + lines * step - short
    if patches.layers:
        _paste_legend(page, draw, patches, y)
    for number, note in enumerate(notes):
        _write(draw, (_MARGIN, y + legend + 20 * number), note, 14, _LESS)
    return page


def _paste_heat(
    page: Image.Image,
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    layer: PatchLayer,
    patches: PatchLayers,
    cell: int,
) -> None:
    (x, y), panel = at, cell * patches.columns
    page.paste(Image.fromarray(draw_heat(layer, patches.rows, patches.columns, cell=cell)), at)
    ramp = heat_colours()[np.linspace(0, len(heat_colours()) - 1, panel).round().astype(int)]
    page.paste(Image.fromarray(np.repeat(ramp[None], 9, axis=0)), (x, y + panel + 7))
    low, high = layer.score_range or (0.0, 0.0)
    for words, place, anchor in (
        (f"{low:.3g}", x, "la"),
        ("score", x + panel // 2, "ma"),
        (f"{high:.3g}", x + panel, "ra"),
    ):
        draw.text((place, y + panel + 20), words, fill=_LESS, font=ImageFont.load_default(13), anchor=anchor)


def _legend_of(patches: PatchLayers, width: int) -> list[tuple[int, int, str, str]]:
    """Return the entries of the legend, in as many lines as it takes: x, y, kind, words."""
    found: list[tuple[int, int, str, str]] = []
    x = y = 0
    for kind, words in legend_of(patches).items():
        entry = _SWATCH + 36 + int(ImageFont.load_default(15).getlength(words))
        if x and x + entry > width - 2 * _MARGIN:
            x, y = 0, y + 34
        found.append((x, y, kind, words))
        x += entry
    return found


def _paste_legend(page: Image.Image, draw: ImageDraw.ImageDraw, patches: PatchLayers, top: int) -> None:
    fills = {"kept": (207, 214, 221), "merged": group_colours()[0], "dropped": (58, 58, 64), "empty": _NONE}
    for right, down, kind, words in _legend_of(patches, page.width):
        x, y = _MARGIN + right, top + down
        box = np.full((_SWATCH, _SWATCH, 3), fills[kind], np.uint8)
        if kind in ("dropped", "empty"):
            box[_stripes((_SWATCH, _SWATCH))] = _STRIPE if kind == "empty" else (160, 161, 170)
        page.paste(Image.fromarray(box), (x, y))
        line = (16, 16, 20) if kind == "merged" else (160, 161, 170)
        draw.rectangle((x, y, x + _SWATCH - 1, y + _SWATCH - 1), outline=line)
        _write(draw, (x + _SWATCH + 8, y + 3), words, 15)


def _heading(draw: ImageDraw.ImageDraw, at: tuple[int, int], title: str, less: str, most: int) -> None:
    _write(draw, at, title, 17, most=most)
    _write(draw, (at[0], at[1] + 23), less, 13, _LESS, most=most)


def _write(
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    words: str,
    size: int,
    colour: tuple[int, int, int] = _TEXT,
    *,
    most: int = 0,
) -> None:
    """Write a line of text; cut where it would be wider than `most`."""
    font = ImageFont.load_default(size)
    words = "".join(one if one.isprintable() else "\ufffd" for one in words)
    while most and len(words) > 1 and draw.textlength(words, font=font) > most:
        words = words[:-2] + "\u2026"
    draw.text(at, words, fill=colour, font=font)


def _enlarge(grid: Array, cell: int) -> Array:
    found: Array = np.repeat(np.repeat(grid, cell, axis=0), cell, axis=1)
    return found


def _stripes(shape: tuple[int, ...]) -> Array:
    """Return diagonal stripes: (height, width) bool."""
    down, across = np.indices(shape[:2])
    found: Array = (down + across) % _PERIOD < 2
    return found
