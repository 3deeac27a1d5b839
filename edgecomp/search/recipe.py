"""The winner as a recipe, with all that it took filled in, which `edgecomp export --recipe` takes by itself."""

from __future__ import annotations

import msgspec

from edgecomp.specs import BudgetRule, Recipe
from edgecomp.specs._toml import to_toml
from edgecomp.specs.manifest import Bucket, Manifest
from edgecomp.specs.recipe import Defaults, Preset

__all__ = ["PRESET", "recipe_text", "winner_recipe"]

PRESET = "searched"


def winner_recipe(
    manifest: Manifest,
    bucket: Bucket,
    *,
    asked: Defaults,
) -> Recipe:
    """Return the recipe that exports one bucket of a bundle again.

    It is the method's own with one preset more, `searched`, which is the default: its parameters are those that the
    export ended with, so that no default of a later edgecomp changes them.

    Args:
        asked: what the search was given that a manifest does not hold: files of weights and of calibration, a host's
            folder.
    """
    recipe = manifest.recipe
    host = manifest.backbone if manifest.placement != "encoder" else ""
    host = asked.backbone if host and asked.backbone != "none" else host
    preset = Preset(
        summary=f"found by `edgecomp search`: {bucket.budget.tokens_out} of {bucket.budget.tokens_in} tokens in "
        f"{manifest.precision}",
        placement=manifest.placement,
        params=manifest.params,
        budgets=_only(recipe.rule(manifest.preset), bucket.budget.tokens_out),
        image_size=manifest.image_size,
        backbone=host,
    )
    defaults = Defaults(
        preset=PRESET,
        image_size=manifest.image_size or recipe.defaults.image_size,
        batch=(bucket.batch,),
        output=manifest.output,
        opset=min(manifest.opset, 20),  # bf16 takes a later one by itself
        precision=manifest.precision,
        backbone=host or recipe.defaults.backbone,
        feature_layer=manifest.feature_layer or -1,
        rest=manifest.rest if manifest.precision in ("int8", "fp8") else "",
        fp32=manifest.fp32,
        input_dtype=manifest.input_dtype,  # type: ignore[arg-type]
        weights=asked.weights,
        backbone_weights=asked.backbone_weights,
        calibration=asked.calibration,
        calibration_images=asked.calibration_images,
    )
    presets = {**recipe.presets, PRESET: preset}
    return msgspec.structs.replace(recipe, defaults=defaults, presets=presets)


def recipe_text(recipe: Recipe, *, said: str) -> str:
    """Return the TOML, with a line of comment in front."""
    return f"# {' '.join(said.split())}\n{to_toml(recipe)}"


def _only(rule: BudgetRule, count: int) -> BudgetRule:
    """Return the rule with a default of one count."""
    return msgspec.structs.replace(rule, default=(count,))
