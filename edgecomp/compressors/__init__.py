"""Compressors: one file, one method; the file name (with `-` for `_`) is the name of the method."""

from __future__ import annotations

import importlib
from typing import Any

from edgecomp.errors import InvalidSpec, UnknownName
from edgecomp.resources import data_path
from edgecomp.specs.recipe import method_entry_points, method_names

__all__ = ["compressor_class"]


def compressor_class(method: str) -> type[Any]:
    """Return the class of a method: the one `Compressor` that its module lists in `__all__`."""
    from edgecomp.compressors._base import Compressor

    points = method_entry_points()
    if data_path("export", "recipes", f"{method}.toml").is_file():
        module = importlib.import_module(f"edgecomp.compressors.{method.replace('-', '_')}")
    elif method in points:
        module = importlib.import_module(points[method].module)
    else:
        raise UnknownName("method", method, method_names())
    found = [getattr(module, name) for name in module.__all__]
    classes = [item for item in found if isinstance(item, type) and issubclass(item, Compressor)]
    if len(classes) != 1:
        raise InvalidSpec(
            f"{module.__name__}.__all__ lists {len(classes)} compressors; a method's module lists exactly one"
        )
    return classes[0]
