"""Methods, targets, backbones and routers: the rows, and the tables that `edgecomp list` prints."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from edgecomp.report.text import table
from edgecomp.specs.backbone import Backbone

__all__ = [
    "MethodRow",
    "RouterRow",
    "TargetRow",
    "describe_backbones",
    "describe_methods",
    "describe_routers",
    "describe_targets",
]


class MethodRow(msgspec.Struct, frozen=True):
    """One method."""

    name: str
    placements: tuple[str, ...]
    level: str
    budgets: str
    presets: tuple[str, ...]
    paper: str
    licence: str
    summary: str
    upstream: str


class TargetRow(msgspec.Struct, frozen=True):
    """One target."""

    name: str
    title: str
    sm: int
    runtimes: tuple[str, ...]
    precisions: tuple[str, ...]
    memory_gib: float
    bandwidth_gb_s: float


class RouterRow(msgspec.Struct, frozen=True):
    """One router: `reads` is what its graph looks at, `words` whether it looks at a request's text too."""

    name: str
    reads: str
    words: bool
    summary: str


def describe_routers(rows: Sequence[RouterRow]) -> str:
    """Return the table of routers."""
    cells = [[row.name, row.reads + (" and words" if row.words else ""), row.summary] for row in rows]
    return table(["router", "reads", "what it goes by"], cells)


def describe_methods(rows: Sequence[MethodRow]) -> str:
    """Return the table of methods."""
    cells = [
        [row.name, ", ".join(row.placements), row.level, row.budgets, ", ".join(row.presets), row.paper] for row in rows
    ]
    return table(["method", "stands", "parity", "tokens kept", "presets", "paper"], cells)


def describe_targets(rows: Sequence[TargetRow]) -> str:
    """Return the table of targets."""
    cells = [
        [
            row.name,
            row.title,
            f"SM{row.sm}",
            ", ".join(row.runtimes) or "estimate only",
            ", ".join(row.precisions),
            f"{row.memory_gib:g}",
            f"{row.bandwidth_gb_s:g}",
        ]
        for row in rows
    ]
    return table(["target", "device", "SM", "engines by", "precisions", "GiB", "GB/s"], cells)


def describe_backbones(rows: Sequence[Backbone]) -> str:
    """Return the table of hosts."""
    cells = [
        [
            row.name,
            row.library,
            row.family,
            row.image_size,
            row.patch_size,
            row.tokens,
            row.num_prefix_tokens,
            row.embed_dim,
            row.depth,
        ]
        for row in rows
    ]
    return (
        table(["backbone", "of", "family", "pixels", "patch", "tokens", "prefix", "width", "blocks"], cells)
        + "\nany other timm VisionTransformer works by its name, and any image tower of these families that "
        "transformers saved by its folder;\nnames of transformers stand for random weights; `none` takes tokens"
    )
