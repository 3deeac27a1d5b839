"""Hosts that were tried, as `edgecomp list backbones` shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from edgecomp.specs._toml import read_toml

__all__ = ["Backbone", "is_model_folder", "read_backbones"]


class Backbone(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A host encoder at its native image size: patch tokens, prefix tokens, width, blocks.

    Attributes:
        library: whose module it is.
        config: the configuration of a model of transformers, in its own words.
    """

    name: str
    family: str
    image_size: int
    patch_size: int
    tokens: int
    num_prefix_tokens: int
    embed_dim: int
    depth: int
    library: Literal["timm", "transformers"] = "timm"
    config: dict[str, Any] = {}


class _Backbones(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    schema: Literal[1]
    backbones: tuple[Backbone, ...]


def read_backbones(path: Path) -> tuple[Backbone, ...]:
    """Read the list of hosts."""
    return read_toml(path, _Backbones, what="list of backbones").backbones


def is_model_folder(backbone: Any) -> bool:
    """Say whether a host is named by a folder of transformers: one with a config.json, or any folder's path."""
    if not isinstance(backbone, str) or backbone in ("", "none"):
        return False
    folder = Path(backbone)
    return (folder / "config.json").is_file() or (folder.is_dir() and len(folder.parts) != 1)
