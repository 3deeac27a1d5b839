"""`edgecomp list`: methods, targets, backbones, routers; from data files alone."""

from __future__ import annotations

from edgecomp.report.listing import MethodRow, RouterRow, TargetRow
from edgecomp.resources import data_path
from edgecomp.specs import load_recipe, load_target, method_names, target_names
from edgecomp.specs.backbone import Backbone, read_backbones
from edgecomp.specs.router import ROUTERS

__all__ = ["list_backbones", "list_methods", "list_routers", "list_targets"]


def list_methods() -> tuple[MethodRow, ...]:
    """Return every method, those of other packages included."""
    rows = []
    for name in method_names():
        recipe = load_recipe(name)
        rows.append(
            MethodRow(
                name,
                tuple(recipe.placements),
                recipe.level,
                (recipe.budgets.told or str(recipe.budgets))
                + (f"; router {recipe.defaults.router}" if recipe.defaults.router else ""),
                tuple(preset for preset in recipe.presets if not preset.startswith("smoke")),
                recipe.source.paper,
                recipe.source.licence,
                recipe.summary,
                recipe.source.upstream,
            )
        )
    return tuple(rows)


def list_targets() -> tuple[TargetRow, ...]:
    """Return every target."""
    rows = []
    for name in target_names():
        target = load_target(name)
        rows.append(
            TargetRow(
                name,
                target.title,
                target.sm,
                tuple(f"{runtime} {versions}" for runtime, versions in target.runtimes.items()),
                target.precisions,
                target.memory_gib,
                target.bandwidth_gb_s.value,
            )
        )
    return tuple(rows)


def list_backbones() -> tuple[Backbone, ...]:
    """Return the hosts that were tried; other timm vision transformers work by their name too."""
    return read_backbones(data_path("export", "backbones.toml"))


def list_routers() -> tuple[RouterRow, ...]:
    """Return every router."""
    return tuple(RouterRow(name, facts.reads, facts.words, facts.summary) for name, facts in ROUTERS.items())
