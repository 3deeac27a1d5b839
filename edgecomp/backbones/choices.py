"""What an order leaves open, chosen: preset, parameters, output, site and budgets, with what the weights decide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from edgecomp.backbones.host import Host, host_part
from edgecomp.compressors import compressor_class
from edgecomp.compressors._base import Compressor
from edgecomp.compressors._checkpoint import Checkpoint, Saved
from edgecomp.compressors._declared import read_declared, read_layer
from edgecomp.compressors._recognise import OWN, recognise, tell
from edgecomp.errors import InvalidSpec, UnknownName, WeightsError
from edgecomp.specs import BudgetRule, Output, Placement, Preprocess, Recipe, Site, TokenBudget, parse_budget
from edgecomp.specs.budget import read_count
from edgecomp.specs.layout import Match, best_match
from edgecomp.specs.order import Order

__all__ = [
    "choose_budgets",
    "choose_output",
    "decide",
    "find_preprocess",
    "find_site",
    "learned_rows",
    "read_saved",
    "read_weights",
    "require_declared",
    "settle",
    "usual_counts",
]

_SIZES = ("tokens", "latents")  # parameters that the site and the tensors decide
_SIZE_STEP, _LARGEST_SIZE = 32, 2048  # pixels: image sizes that a refusal looks through


def read_weights(
    order: Order, cls: type[Compressor], notes: list[str]
) -> tuple[dict[str, Tensor] | None, dict[str, Tensor] | None, Saved]:
    """Return the compressor's tensors, the host's, and what they say of the module that they were saved from.

    A file with both prefixes, or an original's, serves for compressor and host.
    """
    if order.weights == "random":
        return None, None, Saved()
    checkpoint = Checkpoint(Path(order.weights))
    if not _is_of_both(checkpoint, order.recipe):
        match = recognise(order.recipe, cls, checkpoint.stored)
        if match is not None:
            notes.append(tell(match, order.recipe.method))
        state = checkpoint.read(match.names if match is not None else None, say=notes.append)
        own, host = cls.split_checkpoint(state)
        return (own or state), (host or None), read_saved(checkpoint, match, order.recipe.method, notes)
    state = checkpoint.read(say=notes.append)
    own = {key.removeprefix("compressor."): value for key, value in state.items() if key.startswith("compressor.")}
    host = host_part(state)
    stray = [key for key in state if not key.startswith(("compressor.", "backbone."))]
    if own and stray:
        raise WeightsError(
            f"weights file {order.weights} holds keys of compressor and host, and {len(stray)} of neither: "
            f"{', '.join(stray[:5])}; remove them"
        )
    return (own or state), (host or None), Saved()


def _is_of_both(checkpoint: Checkpoint, recipe: Recipe) -> bool:
    """Say whether a file holds compressor and host under edgecomp's prefixes, which an original may use otherwise."""
    names = checkpoint.stored.names
    if all(key.startswith(("compressor.", "backbone.")) for key in names):
        return True
    match = best_match(names, recipe.layouts)
    return any(key.startswith("compressor.") for key in names) and not (match is not None and match.fits)


def read_saved(checkpoint: Checkpoint, match: Match | None, method: str, notes: list[str]) -> Saved:
    """Return what is said of the module beside its weights: in the file itself, or in the original's config.json."""
    saved = checkpoint.saved.renamed(compressor_class(method).renamed_params)
    if saved.params or match is None or match.layout.name == OWN:
        return saved
    declared = read_declared(checkpoint.stored.located.config, match, method=method)
    if declared:
        told = ", ".join(f"params.{name}={value} ({place})" for name, (value, place) in declared.items())
        notes.append(f"config.json beside the weights says {told}")
    values = {name: value for name, (value, _) in declared.items()} if declared is not None else None
    return msgspec.structs.replace(saved, declared=values, layer=read_layer(checkpoint.stored.located.config))


def settle(
    order: Order,
    cls: type[Compressor],
    state: Mapping[str, Tensor] | None,
    saved: Saved,
    notes: list[str],
) -> tuple[str, Any]:
    """Return preset and parameters: what was asked for, and what the weights decide.

    Args:
        saved: what the weights say of the module that they were saved from.
    """
    preset = _choose_preset(order, cls, state, saved, notes)
    asked = _without(order.params, *_SIZES)
    _require_agreed(asked, saved.params, "the weights were saved with")
    _require_agreed(asked, saved.declared or {}, "config.json beside the weights says")
    return preset, _choose_params(order, cls, order.recipe.preset(preset).params, state, saved, notes)


def _require_agreed(asked: Mapping[str, Any], told: Mapping[str, Any], who: str, within: str = "params") -> None:
    """Refuse parameters that were set to something else than was told, one by one where they are a table."""
    for name in sorted(asked.keys() & told.keys()):
        one, other = asked[name], told[name]
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            _require_agreed(one, other, who, f"{within}.{name}")
        elif _as_told(one) != _as_told(other):
            raise InvalidSpec(f"{within}.{name}={one} was set, and {who} {other}; drop the --set, or match them")


def _without(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return what was set but for some names, in tables of it too."""
    kept = {name: value for name, value in values.items() if name not in names}
    return {name: _without(value, *names) if isinstance(value, Mapping) else value for name, value in kept.items()}


def _as_told(value: Any) -> Any:
    """Return a value as JSON gives it back: tuples as lists."""
    return msgspec.json.decode(msgspec.json.encode(value, enc_hook=repr))


def _choose_preset(
    order: Order, cls: type[Compressor], state: Mapping[str, Tensor] | None, saved: Saved, notes: list[str]
) -> str:
    """Return the preset: the one named, the one of the checkpoint's layout, or the placement's own."""
    recipe, module = order.recipe, order.compressor
    own_preset = module.preset if module is not None and module.preset in recipe.presets else ""
    if order.preset and own_preset and order.preset != own_preset:
        raise InvalidSpec(
            f"preset {order.preset} of {recipe.method} was asked for, and the module given was made from {own_preset}; "
            "drop the preset"
        )
    if order.preset:
        if recipe.preset(order.preset).placement == "encoder" and order.backbone not in ("", "none"):
            raise InvalidSpec(
                f"preset {order.preset} of {recipe.method} is an encoder itself, so --backbone {order.backbone} "
                "has no place; drop one of the two"
            )
        layout, expected = cls.layout_of(state) if state is not None else "", recipe.preset(order.preset).layout
        if layout and expected and layout != expected:
            raise InvalidSpec(
                f"preset {order.preset} is for weights in the layout {expected}, and the keys of {order.weights} tell "
                f"{layout}; drop --preset"
            )
        return order.preset
    if module is not None:
        placement: Placement = module.site.placement
        if own_preset and recipe.preset(own_preset).placement == placement:
            return own_preset
    elif saved.preset in recipe.presets and _stands_with(order.backbone, recipe.preset(saved.preset).placement):
        notes.append(f"the weights were saved from the preset {saved.preset}")
        return saved.preset
    elif order.backbone:
        placement = _placement_with(recipe, order.backbone)
    else:
        placement = recipe.preset(recipe.defaults.preset).placement
    layout = cls.layout_of(state) if state is not None else ""
    for name, preset in recipe.presets.items():
        if layout and preset.layout == layout and preset.placement == placement:
            notes.append(f"the keys of the weights tell the layout {layout}: preset {name}")
            return name
    own = recipe.presets[recipe.defaults.preset]
    if own.placement == placement:
        return recipe.defaults.preset
    return recipe.placements[placement]


def _stands_with(backbone: object, placement: Placement) -> bool:
    """Say whether a place is possible with the host that was asked for, if one was."""
    if isinstance(backbone, str) and backbone in ("", "none"):
        return not backbone or placement != "inside"
    return placement in ("inside", "after")


def _placement_with(recipe: Recipe, backbone: object) -> Placement:
    """Return where a method stands with a host (its default place, if that takes one), or with none."""
    own = recipe.preset(recipe.defaults.preset).placement
    if isinstance(backbone, str) and backbone == "none":  # an encoder has none anyhow
        return "after" if "after" in recipe.placements and own != "encoder" else own
    placement = own if own in ("inside", "after") else "after"
    if placement not in recipe.placements:
        raise InvalidSpec(
            f"{recipe.method} stands {' or '.join(recipe.placements)}, not {placement} a host, "
            f"so --backbone {backbone} has no place; drop it"
        )
    return placement


def choose_output(order: Order) -> Output:
    """Return what the models give: what was asked for, or the default of module and recipe."""
    output = order.output or (order.compressor.output if order.compressor is not None else order.recipe.defaults.output)
    if output not in order.recipe.outputs:
        raise UnknownName(f"output of {order.recipe.method}", str(output), order.recipe.outputs)
    return output


def _choose_params(
    order: Order,
    cls: type[Compressor],
    preset: Mapping[str, Any],
    state: Mapping[str, Tensor] | None,
    saved: Saved,
    notes: list[str],
) -> Any:
    method = order.recipe.method
    if order.compressor is not None:
        values = {**msgspec.to_builtins(order.compressor.params), **order.params}
    else:
        cls.parse_params(preset, method=f"a preset of the recipe of {method}")
        values = {**preset, **saved.params, **(saved.declared or {}), **order.params}
        for name in saved.params.keys() & order.params.keys():
            if isinstance(saved.params[name], Mapping) and isinstance(order.params[name], Mapping):
                values[name] = {**saved.params[name], **order.params[name]}
    params = cls.parse_params(values, method=method)
    if state is None:
        return params
    try:
        found = cls.infer_params(state, params)
    except (ValueError, IndexError, KeyError) as error:  # a tensor of another rank than any layout has
        raise WeightsError(
            f"weights file {order.weights} is in no layout of {method} ({type(error).__name__}: {error}); "
            f"first keys: {', '.join(list(state)[:5])}"
        ) from error
    declared = saved.declared or {}
    for name in declared.keys() & found.keys():
        if declared[name] != found[name]:
            raise WeightsError(
                f"config.json beside {order.weights} says params.{name}={declared[name]}, and the weights "
                f"{found[name]}; the two are not of one model"
            )
    settled = decide(cls, params, found, order, "the weights")
    told = {*found, *saved.params, *declared, *order.params}
    assumed = [name for name in cls.unstored_params if name not in told]
    if assumed:
        taken = ", ".join(f"params.{name}={getattr(settled, name)}{_rule_of(cls, settled, name)}" for name in assumed)
        beside = ", and nothing was read of it in config.json" if saved.declared is not None else ""
        notes.append(
            f"assumed, since no checkpoint stores it: {taken}{beside}; --set it if the model was trained otherwise"
        )
    return settled


def _rule_of(cls: type[Compressor], params: Any, name: str) -> str:
    """Return in brackets what a parameter of 0 stands for; "" where it is what it says."""
    if getattr(params, name) != 0 or name not in cls.zero_means:
        return ""
    return f" ({cls.zero_means[name].format(params=params)})"


def decide(cls: type[Compressor], params: Any, found: Mapping[str, Any], order: Order, who: str) -> Any:
    """Let `found` decide parameters, unless the user set one to something else."""
    for name, value in found.items():
        if name not in order.params:
            continue
        asked, within = order.params[name], f"params.{name}"
        if isinstance(asked, Mapping) and isinstance(value, Mapping):
            _require_agreed(asked, value, f"{who} say", within)
        elif _as_told(getattr(params, name)) != _as_told(value):
            raise InvalidSpec(
                f"{within}={getattr(params, name)} was set, and {who} say {value}; drop the --set, or match them"
            )
    return cls.parse_params({**msgspec.to_builtins(params), **found}, method=order.recipe.method)


def find_site(
    order: Order, cls: type[Compressor], placement: Placement, params: Any, host: Host | None, image_size: int
) -> tuple[Site, Any]:
    """Return where the compressor stands, and its parameters as the tokens there decide them.

    Args:
        image_size: side in pixels, for a method without a host.
    """
    if order.compressor is not None and host is None:
        return order.compressor.site, params
    if host is None:
        site = cls.site_without_host(params, placement, image_size)
        if "tokens" in order.params and site.tokens_in != params.tokens:
            takes = f"{site.tokens_in} tokens" if site.tokens_in else f"an image of {site.image_size} pixels"
            raise InvalidSpec(
                f"params.tokens={params.tokens} was set, and {order.recipe.method} takes {takes} here, as its other "
                "parameters and the preset say; drop it, or set those that decide it"
            )
        return site, params
    site = host.site
    if placement == "inside" and order.prefix:
        raise InvalidSpec(
            f"--{order.prefix}-prefix: inside {host.name} its {host.num_prefix_tokens} prefix token(s) stay and are "
            "protected; drop the option"
        )
    if placement == "after" and cls.prefix_of(params)[0]:
        if order.prefix == "drop":
            raise InvalidSpec(
                f"--drop-prefix: {order.recipe.method} reads the {host.num_prefix_tokens} prefix token(s) of "
                f"{host.name}; drop the option"
            )
        site = msgspec.structs.replace(site, num_prefix_tokens=host.num_prefix_tokens)
    elif placement == "after" and order.prefix == "keep":
        site = msgspec.structs.replace(site, tokens_in=site.tokens_in + host.num_prefix_tokens)
    if placement == "inside":
        site = msgspec.structs.replace(
            site,
            placement="inside",
            num_prefix_tokens=host.num_prefix_tokens,
            depth=host.depth,
            has_class_token=host.has_class_token,
            num_classes=host.num_classes,
        )
    if placement == "after" and cls.keeps_prefix and not host.num_prefix_tokens and _needs_prefix(cls):
        raise InvalidSpec(
            f"{order.recipe.method} reads the class token, and {host.name} has no class token; choose a host with one "
            "(vit, deit, CLIP, DINOv2)"
        )
    decided = getattr(params, cls.width_param)
    if order.weights != "random" and decided != site.embed_dim:
        raise InvalidSpec(
            f"{host.name} hands over tokens of width {site.embed_dim}, and the weights of {order.recipe.method} "
            f"read width {decided}; choose a host or weights of equal width"
        )
    return site, decide(cls, params, cls.params_of_site(site), order, f"the tokens of {host.name}")


def _needs_prefix(cls: type[Compressor]) -> bool:
    """Say whether a method cannot do without prefix tokens."""
    try:
        msgspec.convert({"prefix_tokens": 0}, cls.Params)
    except msgspec.ValidationError as error:
        return "prefix_tokens" in str(error) and "unknown field" not in str(error)
    return False


def find_preprocess(recipe: Recipe, host: Host | None, site: Site) -> Preprocess | None:
    """Return how images are prepared; None where tokens go in."""
    if host is not None:
        return host.preprocess
    if site.placement != "encoder":
        return None
    given = recipe.preprocess
    return Preprocess(site.image_size, given.crop, given.interpolation, given.mean, given.std)


def choose_budgets(
    order: Order, cls: type[Compressor], preset: str, params: Any, site: Site, saved: Saved, notes: list[str]
) -> tuple[TokenBudget, ...]:
    """Return the budgets in ascending order: those asked for, or what weights, method and recipe keep by themselves."""
    recipe, possible = order.recipe, cls.possible_counts(params, site)
    if site.placement != recipe.preset(preset).placement:  # a part that stands elsewhere than the preset's whole
        preset = recipe.placements.get(site.placement, preset)
    rule = recipe.rule(preset).narrowed(possible)
    tokens_in = cls.count_tokens(params, site)
    asked = order.budgets
    if not asked and order.compressor is not None:
        if order.align != 1:
            raise InvalidSpec(
                f"align={order.align}: a Compressor of your own has the budget that it was made for, "
                f"{order.compressor.budget.tokens_out}; give budgets, or drop align"
            )
        made = order.compressor.budget
        if made.tokens_in != tokens_in:
            raise InvalidSpec(
                f"the {type(order.compressor).__name__} given was made for {made.tokens_in} tokens, and {tokens_in} go "
                "in here; make it for as many, choose another host, or give the budgets that it is to have"
            )
        return (made,)
    if not asked:
        decided = usual_counts(cls, params, site, rule, saved)
        if decided != (saved.tokens_out,):
            require_declared(order, preset, learned_rows(params))
        if saved.tokens_out and decided != (saved.tokens_out,):
            notes.append(
                f"the weights were saved with {saved.tokens_out} tokens kept of {saved.tokens_in}, and keep "
                f"{', '.join(map(str, decided))} of the {tokens_in} here"
            )
        if max(decided) > tokens_in:
            raise InvalidSpec(
                f"{order.recipe.method} keeps {max(decided)} tokens where nothing is said, and {tokens_in} go in; say "
                f"how many to keep, for example --budget {max(1, tokens_in // 2)}"
            )
        _require_made(order, cls, preset, params, site, decided, rule)
        usual = recipe.rule(preset).default
        if decided == rule.default and len(rule.choices) > 1 and not set(decided) & set(usual):
            notes.append(
                f"{decided[0]} of {tokens_in} tokens are kept, since the preset's {', '.join(map(str, usual))} is not "
                f"possible here; a budget is {rule}"
            )
        asked = tuple(map(str, decided))
    given, asked = asked, tuple(_aligned(text, order, tokens_in, notes) for text in asked)
    words: dict[str, Any] = {"tokens_in": tokens_in, "rule": rule, "method": recipe.method, "hint": cls.budget_hint}
    parsed = [parse_budget(text, **words) for text in asked]
    prefix = site.num_prefix_tokens if cls.prefix_of(params)[1] else 0
    parsed = [msgspec.structs.replace(budget, num_prefix_tokens=prefix) for budget in parsed]
    counts = [budget.tokens_out for budget in parsed]
    if counts != sorted(counts):
        notes.append(f"budgets {', '.join(asked)} are taken in ascending order")
    if len(set(counts)) != len(counts):
        aligned = f" with --align {order.align}" if order.align != 1 else ""
        raise InvalidSpec(
            f"budgets {', '.join(given)}{aligned} name {sorted(counts)}, one of them twice; give each once"
        )
    return tuple(sorted(parsed, key=lambda budget: budget.tokens_out))


def _require_made(
    order: Order,
    cls: type[Compressor],
    preset: str,
    params: Any,
    site: Site,
    decided: Sequence[int],
    rule: BudgetRule,
) -> None:
    """Refuse a count that nobody asked for and the preset does not declare; of an encoder name image sizes that fit."""
    wrong = [count for count in decided if not rule.allows(count)]
    if not wrong:
        return
    if site.placement != "encoder":
        known = [name for name in order.recipe.presets if name not in (*order.recipe.smoke_presets, preset)]
        others = [name for name in known if order.recipe.rule(name).allows(wrong[0])]
        raise InvalidSpec(
            f"{order.recipe.method} keeps {wrong[0]} of {cls.count_tokens(params, site)} tokens where nothing is said, "
            f"and preset {preset} declares {rule}{cls.budget_hint}; say how many to keep with --budget"
            + (f", or give --preset {' or '.join(others)}" if others else "")
        )
    fitting = []
    for size in range(_SIZE_STEP, _LARGEST_SIZE + 1, _SIZE_STEP):
        sized = msgspec.structs.replace(site, image_size=size)
        try:
            cls.count_tokens(params, sized)
        except InvalidSpec:
            continue
        if all(rule.allows(count) for count in cls.default_counts(params, sized)):
            fitting.append(str(size))
    raise InvalidSpec(
        f"{order.recipe.method} makes {wrong[0]} rows of an image of {site.image_size} pixels, and preset {preset} "
        f"declares {rule}" + (f": image sizes {', '.join(fitting)}" if fitting else "; choose another --preset")
    )


def learned_rows(params: Any) -> int:
    """Return how many rows a learned table of latents or entries has, of which a budget takes the first; 0 without."""
    return int(getattr(params, "latents", 0) or getattr(params, "table_entries", 0))


def usual_counts(cls: type[Compressor], params: Any, site: Site, rule: BudgetRule, saved: Saved) -> tuple[int, ...]:
    """Return the tokens kept where nothing is said: as saved, what the method decides, a table's rows, the recipe's."""
    decided, tokens_in = cls.default_counts(params, site), cls.count_tokens(params, site)
    possible = rule.narrowed(cls.possible_counts(params, site)).allows(saved.tokens_out)
    if possible and 0 < saved.tokens_out <= tokens_in and (not decided or tokens_in == saved.tokens_in):
        return (saved.tokens_out,)
    rows = learned_rows(params)
    return decided or ((rows,) if rows and rule.allows(rows) else rule.default)


def require_declared(order: Order, preset: str, rows: int) -> None:
    """Refuse weights whose learned table has a size that the recipe does not declare: no budget would be its own."""
    rule = order.recipe.rule(preset)
    if order.weights == "random" or not rows or rule.allows(rows):
        return
    known = [name for name in order.recipe.presets if name not in order.recipe.smoke_presets]
    others = [name for name in known if order.recipe.rule(name).allows(rows)]
    raise InvalidSpec(
        f"the weights in {order.weights} hold {rows} learned entries, a size that preset {preset} of "
        f"{order.recipe.method} does not declare ({rule}); "
        + (f"give --preset {' or '.join(others)}, or " if others else "give ")
        + "--budget for fewer of them, or a recipe of your own that declares it"
    )


def _aligned(text: str, order: Order, tokens_in: int, notes: list[str]) -> str:
    """Round a budget up to the multiple that was asked for, and say so."""
    count = read_count(text, tokens_in=tokens_in)
    if order.align == 1 or not 1 <= count <= tokens_in:  # what is out of range is refused as it was given
        return text
    rounded = -(-count // order.align) * order.align
    if rounded > tokens_in:
        most = tokens_in // order.align * order.align
        raise InvalidSpec(
            f"budget {text} cannot be reached with --align {order.align}: the next multiple is {rounded}, and "
            f"{tokens_in} tokens go in; "
            + (f"the largest budget is {most}, or drop --align" if most else "drop --align")
        )
    if rounded != count:
        notes.append(f"budget {text} is rounded up to {rounded}, a multiple of {order.align} (--align)")
    return str(rounded)
