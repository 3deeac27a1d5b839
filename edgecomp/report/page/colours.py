"""The colours of page and plots, in both schemes; each text colour has a contrast of at least 4.5 to 1.

A plot is drawn in the light scheme. In an SVG each of its colours becomes a class, so that one drawing serves both
schemes: the page's style sheet says what the class looks like.
"""

from __future__ import annotations

from typing import Final

__all__ = ["CLASSES", "DARK", "LIGHT", "SERIES", "contrast", "scheme_css"]

SERIES: Final = ("blue", "orange", "green", "purple", "teal", "pink")

LIGHT: Final = {
    "paper": "#ffffff",
    "panel": "#f5f7fa",
    "ink": "#1b2028",
    "quiet": "#57606c",
    "line": "#cbd2da",
    "grid": "#e4e8ed",
    "link": "#0b57b8",
    "warn": "#9a3412",
    "plain": "#6a7380",
    "blue": "#1f66c1",
    "orange": "#b8500c",
    "green": "#1a7a43",
    "purple": "#7b43b0",
    "teal": "#0d7078",
    "pink": "#b02a6b",
}

DARK: Final = {
    "paper": "#12161c",
    "panel": "#1a2028",
    "ink": "#e6eaf0",
    "quiet": "#a3adba",
    "line": "#3a4350",
    "grid": "#272f39",
    "link": "#8ab8ff",
    "warn": "#ffa680",
    "plain": "#98a3b0",
    "blue": "#6ea8f7",
    "orange": "#f0975a",
    "green": "#62c58a",
    "purple": "#c39af0",
    "teal": "#52c0c9",
    "pink": "#f286b8",
}

CLASSES: Final = {colour: name for name, colour in LIGHT.items()}


def scheme_css() -> str:
    """Return the style rules that plots need, within any style sheet that defines the colours as variables."""
    rules = [f".f-{name}{{fill:var(--{name})}}.s-{name}{{stroke:var(--{name})}}" for name in LIGHT]
    return "".join(rules)


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours, 1 to 21.

    Source: WCAG 2.2, "contrast ratio" and "relative luminance".
    """
    lighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in channels]
    return sum(weight * one for weight, one in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
