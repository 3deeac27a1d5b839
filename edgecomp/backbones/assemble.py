"""From a request to the models of a bundle: one for each budget, all sharing one set of parameters."""

from __future__ import annotations

from typing import Any

import msgspec

from edgecomp.backbones.choices import (
    choose_budgets,
    choose_output,
    find_preprocess,
    find_site,
    learned_rows,
    read_weights,
    settle,
)
from edgecomp.backbones.parts import make_compressors, make_host, make_plain, make_router, place, settle_router
from edgecomp.backbones.placed import PlacedModel, PlainModel
from edgecomp.backbones.seam import find_seam
from edgecomp.backbones.then import asking_between, follow, without_the_second
from edgecomp.compressors import compressor_class
from edgecomp.errors import InvalidSpec
from edgecomp.routers import Router
from edgecomp.specs import Output, Placement, Preprocess
from edgecomp.specs.manifest import ThenRecord
from edgecomp.specs.order import Order
from edgecomp.specs.origin import WeightsOrigin

__all__ = ["Assembly", "assemble"]


class Assembly(msgspec.Struct, frozen=True, kw_only=True):
    """The models of a bundle and what is to be said of them."""

    models: tuple[PlacedModel, ...]
    preset: str
    placement: Placement
    params: dict[str, Any]
    output: Output
    backbone: str
    feature_layer: int
    num_prefix_tokens: int
    image_size: int
    preprocess: Preprocess | None
    weights: WeightsOrigin
    backbone_weights: WeightsOrigin | None
    plain: PlainModel | None
    plain_name: str
    seam: int | None
    router: Router | None
    router_name: str
    router_weights: WeightsOrigin | None
    notes: tuple[str, ...]
    then: ThenRecord | None = None


def assemble(order: Order) -> Assembly:
    """Build the compressor for each budget, where it stands, with its weights."""
    recipe = order.recipe
    if order.compressor is not None and (order.weights != "random" or order.params):
        raise InvalidSpec("a Compressor of your own brings its weights and parameters: give neither weights nor params")
    cls = type(order.compressor) if order.compressor is not None else compressor_class(recipe.method)
    notes: list[str] = []
    state, host_state, saved = read_weights(order, cls, notes)
    preset_name, params = settle(order, cls, state, saved, notes)
    preset = recipe.preset(preset_name)
    output = choose_output(order)
    image_size = order.image_size or saved.image_size or preset.image_size
    if saved.image_size and image_size != saved.image_size:
        notes.append(f"the weights were saved at an image size of {saved.image_size}, and {image_size} was asked for")
    keep_head = preset.placement == "inside" and output == "logits"
    host, host_origin = make_host(order, preset, image_size, keep_head, host_state, cls.levels_of(params), notes)
    if host is not None and saved.layer and (saved.layer != host.feature_layer or saved.layer == -1):
        notes.append(
            f"config.json beside the weights says: the model read hidden state {saved.layer} of its tower (-1 is "
            f"in front of the last norm), and layer {host.feature_layer} of {host.name} is read here (--feature-layer)"
        )
    site, params = find_site(order, cls, preset.placement, params, host, image_size or recipe.defaults.image_size)
    alone = without_the_second(order, preset.placement, output)
    preprocess = find_preprocess(recipe, host, site)
    with asking_between(order):
        budgets = choose_budgets(alone, cls, preset_name, params, site, saved, notes)
        params = cls.for_budgets(params, [budget.tokens_out for budget in budgets])
        compressors, origin = make_compressors(order, cls, params, site, budgets, output, state)
    then = None
    if recipe.then is not None:
        compressors, then = follow(order, recipe.then, compressors, notes)
    if order.pad_to and output == "logits":
        raise InvalidSpec(f"pad_to={order.pad_to}: logits have no rows to fill up; drop --pad-to, or --output logits")
    models = tuple(place(compressor, host, preprocess, order).eval() for compressor in compressors)
    plain, plain_name = make_plain(order, cls, params, host, models[0], output)
    notes += [
        f"budget {model.compressor.budget.tokens_out}: {note}" for model in models for note in model.compressor.remarks
    ]
    seam = find_seam(models) if order.stem else None
    order = settle_router(order, models, notes)
    router, router_origin = make_router(order, models, host, seam, notes)
    if host is not None and host.num_prefix_tokens and not site.num_prefix_tokens:
        kept = site.tokens_in > host.site.tokens_in
        fate = "go in like patches" if kept else "are dropped before the compressor"
        notes.append(f"{host.num_prefix_tokens} prefix token(s) of {host.name} {fate}")
    if plain is not None and host is None:
        notes.append(f"the uncompressed model is a {plain_name} with random weights: for latency and FLOPs alone")
    rows = learned_rows(params)
    if state is not None and rows and then is None and any(budget.tokens_out < rows for budget in budgets):
        notes.append(f"the weights hold {rows} learned entries; a smaller budget uses the first of them")
    return Assembly(
        models=models,
        preset=preset_name,
        placement=site.placement,
        params=msgspec.to_builtins(params),
        output=output,
        backbone=host.name if host is not None else "none",
        feature_layer=host.feature_layer if host is not None else 0,
        num_prefix_tokens=host.num_prefix_tokens if host is not None else 0,
        image_size=(host.image_size if host is not None else site.image_size),
        preprocess=preprocess,
        weights=origin,
        backbone_weights=host_origin,
        plain=plain,
        plain_name=plain_name,
        seam=seam,
        router=router,
        router_name=order.router,
        router_weights=router_origin,
        notes=tuple(notes),
        then=then,
    )
