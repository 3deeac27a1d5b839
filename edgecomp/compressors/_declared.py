"""What a `config.json` beside a checkpoint says of parameters that no tensor stores."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from edgecomp.errors import WeightsError
from edgecomp.files import JSON_ERRORS, read_content
from edgecomp.specs.layout import Match

__all__ = ["read_declared", "read_layer"]

_LARGEST = 16 << 20
_LAYERS = ("vision_feature_layer", "mm_vision_select_layer")  # of transformers, of LLaVA's own release
_FORMS = re.compile(r"(?:(?P<key>[^/()]+)|1/(?P<part>[^/()]+)|\((?P<whole>[^/()]+)/(?P<side>[^/()]+)\)\^2)")


def read_declared(path: Path, match: Match, *, method: str) -> dict[str, tuple[Any, str]] | None:
    """Return parameter -> value and its place in the file; None where no file lies there.

    The layout says which keys answer to which parameters, and which values the method computes with in any case.

    Args:
        path: `config.json` in the checkpoint's folder.
        match: how the checkpoint answers to its layout.

    Raises:
        WeightsError: it is no JSON, holds no number where one belongs, or a value that the method does not compute.
    """
    if not path.is_file():
        return None
    told = _read(path)
    is_alone = not match.prefix and not match.foreign
    for key, fixed in match.layout.fixed.items():
        value = _look_up(told, key, is_alone=is_alone)
        if value is not None and not _is_equal(value, fixed):
            raise WeightsError(
                f"{path} says {key}={value!r}, and {method} computes with {fixed!r} in the layout "
                f"{match.layout.name}: its numbers would be others. Give another checkpoint, or remove {path.name} if "
                "it is not of these weights"
            )
    found = {}
    for name, forms in match.layout.config.items():
        values = ((_compute(told, form, path, is_alone=is_alone), form) for form in forms)
        given = next(((value, form) for value, form in values if value is not None), None)
        if given is not None:
            found[name] = given
    return found


def read_layer(path: Path) -> int:
    """Return which hidden state of its tower a whole model reads, as its config.json says; 0 where it does not."""
    told = _read(path) if path.is_file() else None
    layers = [told.get(key) for key in _LAYERS] if isinstance(told, dict) else []
    return next((layer for layer in layers if isinstance(layer, int)), 0)


def _read(path: Path) -> Any:
    try:
        return msgspec.json.decode(read_content(path, noun="configuration", largest=_LARGEST))
    except JSON_ERRORS as error:
        raise WeightsError(f"{path}, beside the weights, is no JSON ({error}); copy it again, or remove it") from None


def _look_up(told: Any, key: str, *, is_alone: bool) -> Any:
    """Return the value at a dotted key; of a part that was saved by itself the file is what `part_config` would be."""
    words = key.split(".")
    kind = str(told.get("model_type", "")) if isinstance(told, dict) else ""
    if is_alone and words[0].endswith("_config") and words[0].removesuffix("_config") in kind:
        words = words[1:]
    for word in words:
        if not isinstance(told, Mapping):
            return None
        told = told.get(word)
    return told


def _is_equal(given: Any, fixed: Any) -> bool:
    if isinstance(given, (int, float)) and isinstance(fixed, (int, float)):
        return math.isclose(given, fixed, rel_tol=1e-6)
    return bool(given == fixed)


def _compute(told: Any, form: str, path: Path, *, is_alone: bool) -> Any:
    """Return a value of the form `key`, `1/key` or `(key/key)^2`; None where a key is not there."""
    words = _FORMS.fullmatch(form)
    assert words is not None  # `Layout` takes no other
    given = {key: _look_up(told, key, is_alone=is_alone) for key in words.groups() if key is not None}
    given = {key: _one(value) for key, value in given.items()}
    if None in given.values():
        return None
    for key, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1 << 32:
            raise WeightsError(
                f"{path} says {key}={value!r}, where a number above 0 belongs; correct it, or remove {path.name} if it "
                "is not of these weights"
            )
    numbers = list(given.values())
    result = numbers[0] if words["key"] else 1 / numbers[0] if words["part"] else (numbers[0] // numbers[1]) ** 2
    return round(result) if abs(result - round(result)) < 1e-6 * result else result


def _one(value: Any) -> Any:
    """Return the one number of a list such as image_size = [448, 448]."""
    return value[0] if isinstance(value, list) and value and value.count(value[0]) == len(value) else value
