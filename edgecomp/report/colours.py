"""Colours of pictures: evenly spaced to the eye, in OKLab, and told apart by lightness where hue does not do it."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["HEAT_STEPS", "group_colours", "heat_colours", "heat_map", "hex_of"]

Array = npt.NDArray[Any]
HEAT_STEPS = 256
_HUES = 6
_LIGHTS = (0.60, 0.78)
_TO_LMS = ((1.0, 0.3963377774, 0.2158037573), (1.0, -0.1055613458, -0.0638541728), (1.0, -0.0894841775, -1.2914855480))
_TO_RGB = (
    (4.0767416621, -3.3077115913, 0.2309699292),
    (-1.2684380046, 2.6097574011, -0.3413193965),
    (-0.0041960863, -0.7034186147, 1.7076147010),
)  # both matrices: Björn Ottosson, "A perceptual color space for image processing", 2020


def heat_map(values: Array) -> Array:
    """Return the colours of values from 0 to 1, from dark violet over green to light yellow: (...,) -> (..., 3) uint8.

    Lightness and hue grow evenly in OKLab, so that equal steps look equal, on grey paper too.
    """
    places = (np.clip(values, 0, 1) * (HEAT_STEPS - 1)).round().astype(np.int64)
    found: Array = heat_colours()[places]
    return found


@functools.cache
def heat_colours() -> Array:
    """Return the colours of the heat map from the lowest to the highest value: (256, 3) uint8."""
    share = np.linspace(0, 1, HEAT_STEPS)
    hue = np.radians(300 - 195 * share)
    return _rgb(0.22 + 0.72 * share, 0.115 + 0.02 * np.sin(np.pi * share), hue)


@functools.cache
def group_colours() -> Array:
    """Return the colours that groups take in turn: six hues, each light and dark: (12, 3) uint8."""
    place = np.arange(2 * _HUES)
    hue = place * 5 % _HUES + place // _HUES * 0.5  # neighbours in the order are far apart, and the dark ones between
    return _rgb(np.where(place < _HUES, *_LIGHTS), np.full(len(place), 0.15), np.radians(hue * 360 / _HUES + 28))


def hex_of(colour: Array) -> str:
    """Return a colour as `#rrggbb`."""
    return "#" + "".join(f"{int(part):02x}" for part in colour)


def _rgb(light: Array, chroma: Array, hue: Array) -> Array:
    """Return OKLCH colours as sRGB; what lies outside of it is paled until it fits."""
    fits, over = np.zeros(len(light)), np.ones(len(light))  # shares of the chroma
    for _ in range(12):
        share = np.where(_is_in(_linear(light, chroma * over, hue)), over, (fits + over) / 2)
        inside = _is_in(_linear(light, chroma * share, hue))
        fits, over = np.where(inside, share, fits), np.where(inside, over, share)
    linear = _linear(light, chroma * fits, hue).clip(0, 1)
    coded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    found: Array = (coded * 255).round().astype(np.uint8)
    return found


def _linear(light: Array, chroma: Array, hue: Array) -> Array:
    """Return OKLCH colours as linear RGB: (n, 3)."""
    lab = np.stack([light, chroma * np.cos(hue), chroma * np.sin(hue)], -1)
    found: Array = (lab @ np.asarray(_TO_LMS).T) ** 3 @ np.asarray(_TO_RGB).T
    return found


def _is_in(linear: Array) -> Array:
    return np.asarray(((linear >= 0) & (linear <= 1)).all(-1))
