"""matplotlib's SVG made fit for a page: no style attribute, no foreign id, no fixed colour, a title and a description.

A page with a strict content policy takes no style attributes, and several drawings in one page may not share an id.
What is not known here is refused, so that nothing slips through that a newer matplotlib might write.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

from edgecomp.errors import EdgecompError
from edgecomp.report.page.colours import CLASSES, DARK, LIGHT, scheme_css

__all__ = ["clean_svg", "standalone_svg"]

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_KNOWN = {"svg", "g", "defs", "path", "use", "text", "tspan", "clipPath", "rect", "title", "desc", "style", "metadata"}
_KEPT = {
    "clip-path", "d", "fill", "fill-opacity", "height", "id", "opacity", "stroke", "stroke-dasharray",
    "stroke-dashoffset", "stroke-linecap", "stroke-linejoin", "stroke-opacity", "stroke-width", "text-anchor",
    "transform", "width", "x", "y", "viewBox", "href", "font-size", "stroke-miterlimit",
}  # fmt: skip
_FONT = re.compile(r"(?:^|\s)([\d.]+)px(?:\s|$)")
_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_LINK = re.compile(r"url\(#([^)]+)\)")


def clean_svg(drawn: str, *, name: str, title: str, alt: str) -> str:
    """Return the `<svg>` element for a page.

    Args:
        drawn: what matplotlib wrote, in the light colours.
        name: begins every id; no other drawing of the page may have it.
        title: its title, read out first.
        alt: what it shows, in words.

    Raises:
        EdgecompError: it holds an element that a drawing of ours has never held.
    """
    root = ET.fromstring(drawn)  # noqa: S314 - matplotlib's own output, never a file of the user's
    _, _, width, height = root.get("viewBox", "0 0 1 1").split()
    clean = ET.Element("svg", {"viewBox": f"0 0 {_rounded(width)} {_rounded(height)}", "role": "img"})
    clean.set("class", "plot")
    clean.set("aria-labelledby", f"{name}-t {name}-d")
    for tag, text in (("title", title), ("desc", alt)):
        child = ET.SubElement(clean, tag, {"id": f"{name}-{tag[0]}"})
        child.text = text
    for child in root:
        _copy(child, clean, name)
    return ET.tostring(clean, encoding="unicode", short_empty_elements=True)


def standalone_svg(clean: str) -> str:
    """Return a cleaned drawing as a file of its own, light or dark as its reader prefers."""
    light, dark = (";".join(f"--{name}:{colour}" for name, colour in of.items()) for of in (LIGHT, DARK))
    style = (
        f"svg{{{light};background:var(--paper);font-family:system-ui,sans-serif}}"
        f"@media (prefers-color-scheme:dark){{svg{{{dark}}}}}{scheme_css()}"
    )
    width, height = (float(number) for number in re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', clean)[0])
    head = f'<svg xmlns="{_SVG}" width="{width * 1.6:.0f}" height="{height * 1.6:.0f}"'
    return f"<!-- edgecomp report -->\n{head}{clean[4:].replace('>', f'><style>{style}</style>', 1)}\n"


def _copy(element: ET.Element, parent: ET.Element, name: str) -> None:
    tag = element.tag.rpartition("}")[2] if isinstance(element.tag, str) else "comment"
    if tag not in _KNOWN:
        raise EdgecompError(f"the drawing {name} holds <{tag}>, which no plot should; please report it")
    if tag in ("style", "metadata", "title", "desc"):
        return
    copy = ET.SubElement(parent, tag, _attributes(element, name))
    copy.text = element.text if tag in ("text", "tspan") else None
    for child in element:
        _copy(child, copy, name)
    if tag == "g" and not len(copy):
        parent.remove(copy)


def _attributes(element: ET.Element, name: str) -> dict[str, str]:
    given = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
    for rule in given.pop("style", "").split(";"):
        key, _, value = rule.partition(":")
        if key.strip() == "font":
            size = _FONT.search(value)
            given["font-size"] = size.group(1) if size else "8.5"
        elif key.strip():
            given[key.strip()] = value.strip()
    if "font-size" in given:
        given["font-size"] = given["font-size"].removesuffix("px")
    classes, kept = [], {}
    for key, value in given.items():
        if key == "id" and element.tag.endswith("}g"):
            continue  # nothing refers to a group
        if key not in _KEPT:
            continue
        if key in ("fill", "stroke") and value.lower() in CLASSES:
            classes.append(f"{key[0]}-{CLASSES[value.lower()]}")
        elif key == "id":
            kept[key] = f"{name}-{value}"
        elif key == "href":
            kept[key] = f"#{name}-{value.removeprefix('#')}"
        else:
            kept[key] = _NUMBER.sub(lambda found: _rounded(found[0]), _LINK.sub(rf"url(#{name}-\1)", value))
    if element.tag.endswith("}text") and not any(one.startswith("f-") for one in classes):
        classes.append("f-ink")
    return kept | ({"class": " ".join(classes)} if classes else {})


def _rounded(number: str) -> str:
    return f"{float(number):.2f}".rstrip("0").rstrip(".")
