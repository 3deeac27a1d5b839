"""Hosts that were tried, as `edgecomp list backbones` shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from edgecomp.specs._toml import read_toml

__all__ = ["Backbone", "read_backbones"]


class Backbone(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A host encoder at its native image size: patch tokens, prefix tokens, width, blocks."""

    name: str
    family: str
    image_size: int
    patch_size: int
    tokens: int
    num_prefix_tokens: int
    embed_dim: int
    depth: int


class _Backbones(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    schema: Literal[1]
    backbones: tuple[Backbone, ...]


def read_backbones(path: Path) -> tuple[Backbone, ...]:
    """Read the list of hosts."""
    return read_toml(path, _Backbones, what="list of backbones").backbones
