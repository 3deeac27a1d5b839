"""Pictures of what became of an image's patches: SVG, PNG, and a page of its own.

A kept patch is clear. Patches that were merged have the colour of their group, and a border around it; a dropped one is
dark and hatched. So nothing is told by colour alone. Text stands in elements, never in markup, so that a hostile name
stays text.
"""

from __future__ import annotations

import base64
import io
import itertools
import re
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple
from xml.etree import ElementTree as ET

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgecomp.patches import PatchLayer, PatchLayers, Picture
from edgecomp.report.colours import group_colours, heat_colours, heat_map, hex_of
from edgecomp.report.patch_raster import draw_overview
from edgecomp.report.patch_shapes import (
    borders,
    count_words,
    describe_layer,
    group_places,
    headline,
    legend_of,
    panel_columns,
    rims,
    score_words,
    short_name,
    token_words,
)

__all__ = ["PatchFigure", "patch_figures", "picture_html", "picture_png", "picture_svg"]

Array = npt.NDArray[Any]
_PANEL, _GAP, _MARGIN, _HEAD, _BAR = 224, 22, 20, 38, 30
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_FONT = "system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif"
_LINE = {"stroke": "currentColor", "stroke-opacity": "0.25", "fill": "none"}
_SCHEME = (
    ":root{color-scheme:light dark;color:#1b1b1f;background:#fff}"
    "@media (prefers-color-scheme:dark){:root{color:#ececf1;background:#17181c}}"
    "@media print{:root{color:#000;background:#fff}}"
)
_PAGE_CSS = (
    f"{_SCHEME}body{{font-family:{_FONT}}}"
    """
body{margin:0 auto;padding:1.5rem 1rem;max-width:64rem;font-size:16px;line-height:1.5;overflow-wrap:anywhere}
h1{font-size:1.45rem;line-height:1.25;margin:0 0 .25rem}h2{font-size:1.1rem;margin:2rem 0 .5rem}
p{margin:.25rem 0 .75rem;max-width:46rem}.less{opacity:.75}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(14rem,1fr));gap:1.25rem}
.definitions{position:absolute}
ul{display:flex;flex-wrap:wrap;gap:.25rem 1.5rem;list-style:none;margin:1rem 0;padding:0}
li{display:flex;align-items:center;gap:.5rem}li svg{flex:none}
figure{margin:0;break-inside:avoid}figure svg{width:100%;height:auto;display:block}
.scroll{overflow-x:auto;margin:.75rem 0}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .8rem .3rem 0;text-align:right;border-bottom:1px solid rgba(128,128,140,.4);white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{font-weight:600}
@media print{body{max-width:none}}
"""
)


class PatchFigure(NamedTuple):
    """A figure of a page.

    Attributes:
        name: of the layer, or `input`.
        caption: what it shows, in a sentence.
        svg: the element, which refers to the shared definitions.
    """

    name: str
    caption: str
    svg: str


def picture_png(picture: Picture) -> bytes:
    """Return all layers as one PNG, on white."""
    held = io.BytesIO()
    draw_overview(picture).save(held, "PNG", optimize=True)
    return held.getvalue()


def picture_svg(picture: Picture, *, ident: str = "ecp", in_page: bool = False) -> str:
    """Return all layers as one SVG, which needs nothing beside it.

    Args:
        ident: what its ids begin with; another for each picture of a page.
        in_page: it is put into a page, and has the page's text colour on the page's ground, no styles, and the class
            `plot`; else it is a file, light or dark as the reader's system is.
    """
    tiles = _tiles(picture, ident)
    columns = panel_columns(len(tiles))
    width = 2 * _MARGIN + columns * _PANEL + (columns - 1) * _GAP
    notes = [
        line
        for note in (*score_words(picture.patches), *picture.patches.notes)
        for line in textwrap.wrap(note, (width - 2 * _MARGIN) // 7)
    ]
    y: float = _MARGIN + 58
    root = _svg(width, 0, ident, _title(picture), _said(picture))
    if in_page:
        root.set("class", "plot")
    if not in_page:
        _add(root, "style").text = _SCHEME
    root.append(_definitions(picture, ident))
    _text(root, _MARGIN, _MARGIN + 16, _title(picture), size=17, bold=True, most=width - 2 * _MARGIN)
    _text(root, _MARGIN, _MARGIN + 36, headline(picture.patches), size=12.5, less=True)
    for line in itertools.zip_longest(*[iter(tiles)] * columns):
        row = [tile for tile in line if tile is not None]
        for place, (_, _, group) in enumerate(row):
            group.set("transform", f"translate({_MARGIN + place * (_PANEL + _GAP)} {y})")
            root.append(group)
        y += max(height for _, height, _ in row) + _GAP
    y = _add_legend(root, picture.patches, ident, y, width)
    for note in notes:
        _text(root, _MARGIN, y + 12, note, size=12, less=True)
        y += 18
    root.set("viewBox", f"0 0 {width} {y + _MARGIN:g}")
    root.set("height", f"{y + _MARGIN:g}")
    return ET.tostring(root, encoding="unicode") + "\n"


def patch_figures(picture: Picture, *, ident: str = "ecp") -> tuple[str, tuple[PatchFigure, ...]]:
    """Return what a page needs: a hidden element with shared definitions, and a figure for the input and each layer.

    Text has the page's colour. The hidden element has the class `definitions`, to be taken out of the flow.

    Args:
        ident: what ids begin with; another for each picture of a page.
    """
    holder = ET.Element("svg", {"xmlns": _XMLNS, "width": "0", "height": "0", "aria-hidden": "true"})
    holder.set("class", "definitions")
    holder.append(_definitions(picture, ident))
    figures = []
    sentences = [f"{picture.image} as the model sees it.", *_sentences(picture)]
    for number, ((name, height, group), caption) in enumerate(zip(_tiles(picture, ident), sentences, strict=True)):
        root = _svg(_PANEL, height, f"{ident}-{number}", name, caption)
        root.append(group)
        figures.append(PatchFigure(name, caption, ET.tostring(root, encoding="unicode")))
    return ET.tostring(holder, encoding="unicode"), tuple(figures)


def picture_html(picture: Picture) -> str:
    """Return a page of its own: the image, each layer, a legend, and the counts as a table."""
    patches = picture.patches
    page = ET.Element("html", {"lang": "en"})
    head, body = _add(page, "head"), _add(page, "body")
    _add(head, "meta", {"charset": "utf-8"})
    _add(head, "meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"})
    _add(head, "title").text = _clean(_title(picture))
    _add(head, "style").text = _PAGE_CSS
    _add(body, "h1").text = _clean(_title(picture))
    _add(body, "p", {"class": "less"}).text = _clean(f"{headline(patches)}. Graph {patches.model}.")
    for note in (*score_words(patches), *patches.notes):
        _add(body, "p").text = _clean(note[:1].upper() + note[1:] + ".")
    holder, figures = patch_figures(picture)
    body.append(ET.fromstring(holder))  # noqa: S314 - made above
    if legend := legend_of(patches):
        box = _add(body, "ul", {"aria-label": "Legend"})
        for kind, words in legend.items():
            entry = _add(box, "li")
            _add_swatch(_add(entry, "svg", {"width": "22", "height": "22", "aria-hidden": "true"}), kind, "ecp")
            _add(entry, "span").text = words
    grid = _add(body, "div", {"class": "grid"})
    for figure in figures:
        _add(grid, "figure").append(ET.fromstring(figure.svg))  # noqa: S314 - made above
    if patches.layers:
        _add(body, "h2").text = "Counts"
        _add_table(_add(body, "div", {"class": "scroll"}), patches)
    for element in page.iter():
        element.tag = element.tag.rpartition("}")[2]  # an HTML parser knows the elements of SVG by their names
    return "<!DOCTYPE html>\n" + ET.tostring(page, encoding="unicode", method="html") + "\n"


# -- the parts ----------------------------------------------------------------------------------------------------

_XMLNS = "http://www.w3.org/2000/svg"


def _title(picture: Picture) -> str:
    return f"{picture.patches.method} on {picture.image}: {picture.bundle}"


def _said(picture: Picture) -> str:
    notes = [f"{note[:1].upper()}{note[1:]}." for note in picture.patches.notes]
    return " ".join([f"{headline(picture.patches)}.", *_sentences(picture), *notes])


def _sentences(picture: Picture) -> list[str]:
    return [describe_layer(layer, picture.patches) for layer in picture.patches.layers]


def _svg(width: float, height: float, ident: str, title: str, text: str) -> ET.Element:
    """Return an image with what a screen reader says of it."""
    names = {"xmlns": _XMLNS, "role": "img", "font-family": _FONT, "aria-labelledby": f"{ident}-title {ident}-desc"}
    size = {"width": f"{width:g}", "height": f"{height:g}", "viewBox": f"0 0 {width:g} {height:g}"}
    root = ET.Element("svg", {**names, **size})
    _add(root, "title", {"id": f"{ident}-title"}).text = _clean(title)
    _add(root, "desc", {"id": f"{ident}-desc"}).text = _clean(text)
    return root


def _definitions(picture: Picture, ident: str) -> ET.Element:
    found = ET.Element("defs")
    size = {"width": str(_PANEL), "height": str(_PANEL), "preserveAspectRatio": "none"}
    _add(found, "image", {"id": f"{ident}-image", "href": _data_uri(picture.pixels), **size})
    grid = {"width": "7", "height": "7", "patternUnits": "userSpaceOnUse", "patternTransform": "rotate(45)"}
    for name, colour in (("hatch", "#f4f4f4"), ("empty", "#8d8f9a")):
        pattern = _add(found, "pattern", {"id": f"{ident}-{name}", **grid})
        _add(pattern, "rect", {"width": "1.6", "height": "7", "fill": colour, "fill-opacity": "0.55"})
    ramp = _add(found, "linearGradient", {"id": f"{ident}-ramp"})
    colours = heat_colours()
    for place in range(0, len(colours), 15):
        _add(ramp, "stop", {"offset": f"{place / (len(colours) - 1):.4f}", "stop-color": hex_of(colours[place])})
    return found


def _tiles(picture: Picture, ident: str) -> list[tuple[str, float, ET.Element]]:
    """Return the input and each layer: name, height, and the group that draws it."""
    patches = picture.patches
    first = ET.Element("g")
    _heading(first, "input", f"{patches.patches} patches, {patches.rows} x {patches.columns}")
    _add(first, "use", {"href": f"#{ident}-image", "y": str(_HEAD)})
    found: list[tuple[str, float, ET.Element]] = [("input", _HEAD + _PANEL, first)]
    for layer, places in zip(patches.layers, group_places(patches), strict=True):
        group = ET.Element("g")
        _heading(group, f"{short_name(layer.name)}: {token_words(layer.tokens)}", count_words(layer))
        panel = _add(group, "g", {"transform": f"translate(0 {_HEAD})"})
        _add(panel, "use", {"href": f"#{ident}-image"})
        _add_patches(panel, layer, places, patches, ident)
        height: float = _HEAD + _PANEL
        if layer.score_range is not None:
            _add_heat(group, layer, patches, ident, height + 8)
            height += 8 + _PANEL + _BAR
        found.append((layer.name, height, group))
    return found


def _heading(group: ET.Element, title: str, less: str) -> None:
    _text(group, 0, 13, title, size=13.5, bold=True, most=_PANEL)
    _text(group, 0, 29, less, size=11, less=True, most=_PANEL)


def _add_patches(panel: ET.Element, layer: PatchLayer, places: Array, patches: PatchLayers, ident: str) -> None:
    """Draw what became of the patches over the image."""
    across, down = _PANEL / patches.columns, _PANEL / patches.rows
    grid = layer.rows.reshape(patches.rows, patches.columns)
    for group in layer.groups:
        colour = group_colours()[places[layer.rows == group][0]]
        style = {"fill": hex_of(colour), "fill-opacity": "0.56"}
        cells = _add(panel, "path", {"d": _cells(grid == group, across, down), **style})
        _add(cells, "title").text = f"token {group}: {int((grid == group).sum())} patches"
    if layer.dropped.any():
        shape = _cells(grid < 0, across, down)
        cells = _add(panel, "path", {"d": shape, "fill": "#000000", "fill-opacity": "0.66"})
        _add(cells, "title").text = f"{int(layer.dropped.sum())} patches dropped"
        _add(panel, "path", {"d": shape, "fill": f"url(#{ident}-hatch)", "pointer-events": "none"})
    size = patches.rows, patches.columns
    for edges, colour, width in ((rims, "#e1e1e1", "0.8"), (borders, "#ffffff", "3"), (borders, "#101014", "1.4")):
        lines = "".join(
            f"M{edge.x * across:g} {edge.y * down:g}"
            f"{'v' if edge.is_vertical else 'h'}{edge.length * (down if edge.is_vertical else across):g}"
            for edge in edges(layer, *size)
        )
        if lines:
            style = {"stroke": colour, "stroke-width": width, "stroke-linecap": "square", "fill": "none"}
            _add(panel, "path", {"d": lines, **style, "pointer-events": "none"})


def _add_heat(group: ET.Element, layer: PatchLayer, patches: PatchLayers, ident: str, y: float) -> None:
    """Draw the scores, and the bar that says what the colours are."""
    low, high = layer.score_range or (0.0, 0.0)
    scores = layer.scores.reshape(patches.rows, patches.columns)
    real = np.isfinite(scores)
    across, down = _PANEL / patches.columns, _PANEL / patches.rows
    panel = _add(group, "g", {"transform": f"translate(0 {y:g})"})
    _add(panel, "title").text = _clean(layer.scored)
    colours = heat_map(np.where(real, (scores - low) / ((high - low) or 1.0), 0))
    pixels = np.dstack([colours, np.where(real, 255, 0).astype(np.uint8)])
    size = {"width": str(_PANEL), "height": str(_PANEL), "preserveAspectRatio": "none"}
    blown = np.repeat(np.repeat(pixels, 8, axis=0), 8, axis=1)  # else a viewer may blur what it enlarges
    if not real.all():
        _add(panel, "path", {"d": _cells(~real, across, down), "fill": f"url(#{ident}-empty)"})
    _add(panel, "image", {"href": _data_uri(blown), "image-rendering": "pixelated", **size})
    _add(panel, "rect", {"width": str(_PANEL), "height": str(_PANEL), **_LINE})
    bar = {"y": str(_PANEL + 6), "width": str(_PANEL), "height": "8", "fill": f"url(#{ident}-ramp)"}
    _add(panel, "rect", bar)
    _text(panel, 0, _PANEL + 26, f"{low:.3g}", size=11, less=True)
    _text(panel, _PANEL, _PANEL + 26, f"{high:.3g}", size=11, less=True, anchor="end")
    _text(panel, _PANEL / 2, _PANEL + 26, "score", size=11, less=True, anchor="middle")


def _add_legend(root: ET.Element, patches: PatchLayers, ident: str, y: float, width: float) -> float:
    """Draw what the colours mean, in as many lines as it takes, and return where it ends."""
    x: float = _MARGIN
    legend = legend_of(patches)
    for kind, words in legend.items():
        entry = 48 + 6.6 * len(words)
        if x > _MARGIN and x + entry > width:
            x, y = _MARGIN, y + 28
        swatch = _add(root, "g", {"transform": f"translate({x:g} {y + 2:g})"})
        _add_swatch(swatch, kind, ident)
        _text(root, x + 29, y + 17, words, size=12)
        x += entry
    return y + 36 if legend else y


def _add_swatch(box: ET.Element, kind: str, ident: str) -> None:
    """Draw one colour of the legend, 22 wide."""
    fills = {"kept": "#cfd6dd", "merged": hex_of(group_colours()[0]), "dropped": "#3a3a40", "empty": "none"}
    size = {"width": "20", "height": "20", "x": "1", "y": "1"}
    _add(box, "rect", {**size, "fill": fills[kind]})
    if kind in ("dropped", "empty"):
        _add(box, "rect", {**size, "fill": f"url(#{ident}-{'hatch' if kind == 'dropped' else 'empty'})"})
    line = {"stroke": "#101014", "stroke-width": "1.6", "fill": "none"} if kind == "merged" else _LINE
    _add(box, "rect", {**size, **line})


def _add_table(box: ET.Element, patches: PatchLayers) -> None:
    table = _add(box, "table")
    header = _add(_add(table, "thead"), "tr")
    for word in ("layer", "tokens", "kept", "merged", "groups", "dropped", "least score", "largest score"):
        _add(header, "th", {"scope": "col"}).text = word
    lines = _add(table, "tbody")
    for layer in patches.layers:
        kept, merged, dropped = layer.counts
        span = [f"{end:.4g}" for end in layer.score_range or ()] or ["none", "none"]
        row = _add(lines, "tr")
        for cell in (layer.name, layer.tokens, kept, merged, len(layer.groups), dropped, *span):
            _add(row, "td").text = _clean(str(cell))


# -- the smallest parts -------------------------------------------------------------------------------------------


def _add(parent: ET.Element, tag: str, attributes: dict[str, str] | None = None) -> ET.Element:
    return ET.SubElement(parent, tag, attributes or {})


def _text(
    parent: ET.Element,
    x: float,
    y: float,
    words: str,
    *,
    size: float,
    less: bool = False,
    bold: bool = False,
    anchor: str = "start",
    most: float = 0,
) -> None:
    """Write a line of text; cut where it would be wider than `most`."""
    words = _clean(words)
    fits = int(most / (size * (0.58 if bold else 0.53))) if most else len(words)
    if len(words) > fits:
        words = words[: fits - 1] + "\u2026"
    attributes = {"x": f"{x:g}", "y": f"{y:g}", "font-size": f"{size:g}", "fill": "currentColor"}
    if less:
        attributes["fill-opacity"] = "0.75"
    if bold:
        attributes["font-weight"] = "600"
    if anchor != "start":
        attributes["text-anchor"] = anchor
    _add(parent, "text", attributes).text = words


def _clean(words: str) -> str:
    """Return text without what XML cannot hold: control characters, and the bytes of a name that are no UTF-8."""
    return _NOT_XML.sub("\ufffd", words)


def _cells(marked: Array, across: float, down: float) -> str:
    """Return the outline of marked patches, a box for each run of them in a row."""
    return "".join(
        f"M{begin * across:g} {row * down:g}h{length * across:g}v{down:g}h{-length * across:g}z"
        for row, begin, length in _spans(marked)
    )


def _spans(marked: Array) -> Iterator[tuple[int, int, int]]:
    for row, line in enumerate(marked.tolist()):
        place = 0
        for is_marked, run in itertools.groupby(line):
            length = sum(1 for _ in run)
            if is_marked:
                yield row, place, length
            place += length


def _data_uri(pixels: Array) -> str:
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()
