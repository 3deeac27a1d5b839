"""Two methods in a row: the recipe's second one reads the tokens that the first gives."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec

from edgecomp.backbones.choices import choose_budgets, decide, learned_rows, read_weights, settle
from edgecomp.backbones.parts import make_compressors
from edgecomp.compressors import compressor_class
from edgecomp.compressors._base import Compressor
from edgecomp.compressors._chain import Chain
from edgecomp.compressors._resampler import GridResampler
from edgecomp.errors import InvalidSpec
from edgecomp.specs import Output, Placement, Site, load_recipe
from edgecomp.specs.manifest import ThenRecord
from edgecomp.specs.order import Order
from edgecomp.specs.recipe import Then

__all__ = ["asking_between", "follow", "without_the_second"]

_TOKENS_RANK = 3
_PARAMS = re.compile(r"\bparams\.")


def without_the_second(order: Order, placement: Placement, output: Output) -> Order:
    """Return the order of the first of two methods in a row, whose budget is what it hands over."""
    then = order.recipe.then
    if then is None:
        return order
    names = f"{order.recipe.method} then {then.method}"
    if placement not in ("after", "encoder"):
        raise InvalidSpec(
            f"{names}: {order.recipe.method} stands {placement} its host here, and in a row stands what is behind an "
            "encoder or is one; choose another --preset, or another order"
        )
    if output != "tokens":
        raise InvalidSpec(f"{names}: {then.method} reads tokens, and the output is {output}; drop --output {output}")
    return msgspec.structs.replace(order, budgets=(str(then.between),) if then.between else (), align=1)


@contextmanager
def asking_between(order: Order) -> Iterator[None]:
    """Say of the first of two methods in a row what it refuses: its budget is what --between asks for."""
    then = order.recipe.then
    try:
        yield
    except InvalidSpec as error:
        if then is None:
            raise
        asked = f" --between {then.between}:" if then.between else ""
        text = str(error).replace("--budget", "--between")
        raise InvalidSpec(f"{order.recipe.method} then {then.method}:{asked} {text}") from error


def follow(
    order: Order, then: Then, compressors: Sequence[Compressor], notes: list[str]
) -> tuple[list[Compressor], ThenRecord]:
    """Put the recipe's second method behind the first, once for each budget; what it refuses names both."""
    names = f"{order.recipe.method} then {then.method}"
    _require_tokens(compressors[0], then, names)
    try:
        return _follow(order, then, compressors, notes)
    except InvalidSpec as error:
        text = _PARAMS.sub("then.", str(error))
        raise InvalidSpec(text if text.startswith(names) else f"{names}: {text}") from error


def _follow(
    order: Order, then: Then, compressors: Sequence[Compressor], notes: list[str]
) -> tuple[list[Compressor], ThenRecord]:
    first, method, recipe = compressors[0], order.recipe.method, load_recipe(then.method)
    names = f"{method} then {then.method}"
    if len(compressors) > 1:
        counts = ", ".join(str(one.budget.tokens_out) for one in compressors)
        raise InvalidSpec(
            f"{names}: {method} has the budgets {counts} where nothing is said, and hands one count over; say which, "
            f"for example --between {first.budget.tokens_out}"
        )
    if "after" not in recipe.placements:
        raise InvalidSpec(
            f"{names}: {then.method} stands {' or '.join(recipe.placements)}, and behind {method} it is handed tokens; "
            "choose a method that stands after an encoder"
        )
    cls = compressor_class(then.method)
    asked = msgspec.structs.replace(
        order, recipe=recipe, preset=then.preset, backbone="none", compressor=None, weights=order.then_weights,
        backbone_weights="random", params=then.params, image_size=0, output="tokens", pad_to=0, seed=order.seed + 1,
    )  # fmt: skip
    state, _, saved = read_weights(asked, cls, notes)
    preset, params = settle(asked, cls, state, saved, notes)
    if recipe.preset(preset).placement != "after":
        raise InvalidSpec(
            f"{names}: preset {preset} of {then.method} stands {recipe.preset(preset).placement}, and behind {method} "
            f"it is handed tokens; {recipe.placements['after']} is a preset for these"
        )
    tokens = first.output_specs()[0]
    kept = first.budget.tokens_out
    site = Site(
        "after",
        tokens_in=kept,
        embed_dim=tokens.shape[-1],
        num_prefix_tokens=tokens.shape[1] - kept,
        num_heads=getattr(params, "attention_heads", 0),
    )
    params = decide(cls, params, cls.params_of_site(site), asked, f"the tokens of {method}")
    budgets = choose_budgets(asked, cls, preset, params, site, saved, notes)
    params = cls.for_budgets(params, [budget.tokens_out for budget in budgets])
    seconds, origin = make_compressors(asked, cls, params, site, budgets, "tokens", state)
    notes.append(f"{method} hands {kept} tokens to {then.method}")
    moved = {"index", "source_map"} & {spec.name for spec in first.output_specs()}
    if seconds[0].reads_grid and not moved and _is_unplaced(first):
        notes.append(
            f"{then.method} reads the {kept} tokens as a grid in raster order, and those of {method} are learned "
            "queries, which stand for no places in the image"
        )
    if seconds[0].reads_grid and moved:
        notes.append(
            f"{then.method} reads the {kept} tokens as a grid in raster order, and {method} chooses or merges tokens: "
            "beside each other in it stand tokens that were not beside each other in the image"
        )
    record = ThenRecord(then.method, preset, msgspec.to_builtins(params), kept, origin, recipe.source)
    return [Chain(first, second, methods=(method, then.method)) for second in seconds], record


def _require_tokens(first: Compressor, then: Then, names: str) -> None:
    """Refuse a first method that gives several images, or no rows of tokens, in a request."""
    tokens, method = first.output_specs()[0], first.method_name
    if len(tokens.shape) == _TOKENS_RANK:
        return
    media = [name for name in ("images", "frames") if getattr(first.params, name, 1) > 1]
    single = " ".join(f"--set params.{name}=1" for name in media)
    raise InvalidSpec(
        f"{names}: {method} gives {tokens}, and {then.method} takes tokens [B, N, D]; "
        + (f"give {method} one image in a request with {single}" if single else f"choose another form of {method}")
    )


def _is_unplaced(first: Compressor) -> bool:
    """Say whether what comes out are learned queries; those of a grid resampler have a region each."""
    part = getattr(first, "inner", first)
    is_named = first.output_specs()[0].name == "latents"
    return bool(learned_rows(part.params)) or (is_named and not isinstance(part, GridResampler))
