"""From a request to the models of a bundle: one for each budget, all sharing one set of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from edgecomp.backbones.host import Host
from edgecomp.backbones.inside import InsideModel
from edgecomp.backbones.placed import PlacedModel, PlainModel
from edgecomp.backbones.seam import find_seam
from edgecomp.backbones.timm import TimmHost, host_part, load_host, plain_vit, state_digest
from edgecomp.backbones.transformers import TransformersHost, is_tower, load_tower, split_classifier
from edgecomp.compressors import compressor_class
from edgecomp.compressors._base import Compressor, initialise
from edgecomp.compressors._chain import Chain
from edgecomp.compressors._checkpoint import Checkpoint, Saved, read_checkpoint, weights_origin
from edgecomp.compressors._inside import InsideCompressor
from edgecomp.compressors._pruning import TokenPruner
from edgecomp.compressors._recognise import recognise, tell
from edgecomp.errors import InvalidSpec, UnknownName, WeightsError
from edgecomp.resources import data_path
from edgecomp.routers import Router, RouterSite, StemScore, router_class
from edgecomp.specs import Output, Placement, Preprocess, Preset, Recipe, Site, TokenBudget, load_recipe, parse_budget
from edgecomp.specs.backbone import read_backbones
from edgecomp.specs.budget import read_count
from edgecomp.specs.manifest import ThenRecord
from edgecomp.specs.order import Order
from edgecomp.specs.origin import WeightsOrigin, file_origin
from edgecomp.specs.recipe import Then

__all__ = ["Assembly", "assemble", "require_declared", "settle"]

_TOKENS_RANK = 3


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
    state, host_state, saved = _read_weights(order, cls, notes)
    preset_name, params = settle(order, cls, state, saved, notes)
    preset = recipe.preset(preset_name)
    output = _choose_output(order)
    image_size = order.image_size or preset.image_size
    keep_head = preset.placement == "inside" and output == "logits"
    host, host_origin = _make_host(order, preset, image_size, keep_head, host_state, cls.levels_of(params), notes)
    site, params = _find_site(order, cls, preset.placement, params, host, image_size or recipe.defaults.image_size)
    alone = _without_the_second(order, preset.placement, output)
    budgets = _choose_budgets(alone, cls, preset_name, params, site, notes)
    params = cls.for_budgets(params, [budget.tokens_out for budget in budgets])
    preprocess = _find_preprocess(recipe, host, site)

    compressors, origin = _make_compressors(order, cls, params, site, budgets, output, state)
    then = None
    if recipe.then is not None:
        compressors, then = _follow(order, recipe.then, compressors, notes)
    if order.pad_to and output == "logits":
        raise InvalidSpec(f"pad_to={order.pad_to}: logits have no rows to fill up; drop --pad-to, or --output logits")
    models = tuple(_place(compressor, host, preprocess, order).eval() for compressor in compressors)
    plain, plain_name = _make_plain(order, cls, params, host, models[0], output)
    notes += [
        f"budget {model.compressor.budget.tokens_out}: {note}" for model in models for note in model.compressor.remarks
    ]
    seam = find_seam(models) if order.stem else None
    router, router_origin = _make_router(order, models, host, seam, notes)
    if host is not None and host.num_prefix_tokens and not site.num_prefix_tokens:
        kept = site.tokens_in > host.site.tokens_in
        fate = "go in like patches" if kept else "are dropped before the compressor"
        notes.append(f"{host.num_prefix_tokens} prefix token(s) of {host.name} {fate}")
    if plain is not None and host is None:
        notes.append(f"the uncompressed model is a {plain_name} with random weights: for latency and FLOPs alone")
    rows = getattr(params, "latents", 0) or getattr(params, "table_entries", 0)
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
        router_weights=router_origin,
        notes=tuple(notes),
        then=then,
    )


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
    for name in saved.params.keys() & order.params.keys():
        if name not in ("tokens", "latents") and saved.params[name] != order.params[name]:
            raise InvalidSpec(
                f"params.{name}={order.params[name]} was set, and the weights were saved with {saved.params[name]}; "
                "drop the --set, or match them"
            )
    return preset, _choose_params(order, cls, order.recipe.preset(preset).params, state, saved, notes)


def _read_weights(
    order: Order, cls: type[Compressor], notes: list[str]
) -> tuple[dict[str, Tensor] | None, dict[str, Tensor] | None, Saved]:
    """Return the compressor's tensors, the host's, and what they say of the module that they were saved from.

    A file with both prefixes, or an original's, serves for compressor and host.
    """
    if order.weights == "random":
        return None, None, Saved()
    checkpoint = Checkpoint(Path(order.weights))
    if not any(key.startswith(("compressor.", "backbone.")) for key in checkpoint.stored.names):
        match = recognise(order.recipe, cls, checkpoint.stored)
        if match is not None:
            notes.append(tell(match, order.recipe.method))
        state = checkpoint.read(match.names if match is not None else None, say=notes.append)
        own, host = cls.split_checkpoint(state)
        return (own or state), (host or None), checkpoint.saved
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


def _choose_preset(
    order: Order, cls: type[Compressor], state: Mapping[str, Tensor] | None, saved: Saved, notes: list[str]
) -> str:
    """Return the preset: the one named, the one of the checkpoint's layout, or the placement's own."""
    recipe = order.recipe
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
    if order.compressor is not None:
        placement: Placement = order.compressor.site.placement
    elif order.backbone:
        placement = _placement_with(recipe, order.backbone)
    else:
        placement = recipe.preset(recipe.defaults.preset).placement
    if saved.preset in recipe.presets and recipe.preset(saved.preset).placement == placement:
        notes.append(f"the weights were saved from the preset {saved.preset}")
        return saved.preset
    layout = cls.layout_of(state) if state is not None else ""
    for name, preset in recipe.presets.items():
        if layout and preset.layout == layout and preset.placement == placement:
            notes.append(f"the keys of the weights tell the layout {layout}: preset {name}")
            return name
    own = recipe.presets[recipe.defaults.preset]
    if own.placement == placement:
        return recipe.defaults.preset
    return recipe.placements[placement]


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


def _choose_output(order: Order) -> Output:
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
        values = {**preset, **saved.params, **order.params}
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
    assumed = [name for name in cls.unstored_params if name not in {*found, *saved.params, *order.params}]
    if assumed:
        taken = ", ".join(f"params.{name}={getattr(params, name)}" for name in assumed)
        notes.append(f"assumed, since no checkpoint stores it: {taken}; --set it if the model was trained otherwise")
    return _settle(cls, params, found, order, "the weights")


def _settle(cls: type[Compressor], params: Any, found: Mapping[str, Any], order: Order, who: str) -> Any:
    """Let `found` decide parameters, unless the user set one to something else."""
    for name, value in found.items():
        if name in order.params and getattr(params, name) != value:
            raise InvalidSpec(
                f"params.{name}={getattr(params, name)} was set, and {who} say {value}; drop the --set, or match them"
            )
    return cls.parse_params({**msgspec.to_builtins(params), **found}, method=order.recipe.method)


def _make_host(
    order: Order,
    preset: Preset,
    image_size: int,
    keep_head: bool,
    state: dict[str, Tensor] | None,
    levels: tuple[int, ...],
    notes: list[str],
) -> tuple[Host | None, WeightsOrigin | None]:
    """Make the host that stands in front, or refuse what only a host could use."""
    placement = preset.placement
    backbone = order.backbone or preset.backbone or order.recipe.defaults.backbone
    if order.compressor is not None and not order.backbone:
        backbone = "none"
    if placement == "inside" and isinstance(backbone, str) and backbone == "none":
        raise InvalidSpec(
            f"this preset of {order.recipe.method} stands inside a host, and the backbone is none; name a --backbone, "
            f"or a preset for given tokens: {order.recipe.placements.get('after', 'this method has none')}"
        )
    if placement == "encoder" or (isinstance(backbone, str) and backbone == "none"):
        _require_no_host_options(order, placement)
        return None, None
    layer = order.feature_layer or order.recipe.defaults.feature_layer
    if isinstance(backbone, nn.Module):
        return _own_host(order, backbone, layer, levels, keep_head)
    listed = read_backbones(data_path("export", "backbones.toml"))
    weights = order.backbone_weights
    if state is not None and weights in ("random", ""):
        weights = order.weights
    else:
        state = None
    load = partial(load_tower, listed=listed) if is_tower(backbone, listed) else partial(load_host, listed=listed)
    return load(
        backbone,
        weights=weights,
        state=state,
        image_size=image_size,
        feature_layer=layer,
        levels=levels,
        keep_head=keep_head,
        seed=order.seed,
        say=notes.append,
    )


def _own_host(
    order: Order, module: nn.Module, layer: int, levels: tuple[int, ...], keep_head: bool
) -> tuple[Host, WeightsOrigin]:
    """Make a host of the user's module, of timm or of transformers."""
    name = type(module).__name__
    _require_finite(module, name)
    origin = WeightsOrigin(kind="module", name=name, sha256=state_digest(module.state_dict()))
    if hasattr(getattr(module, "config", None), "model_type"):
        own, linear = split_classifier(_copy(module))
        if keep_head and linear is None:
            raise InvalidSpec(f"{name} has no classifier, so --output logits has nothing to give; use --output tokens")
        tower = TransformersHost(
            own,
            name=name,
            feature_layer=layer,
            levels=levels,
            image_size=order.image_size,
            linear=linear if keep_head else None,
        )
        return tower, origin
    host = TimmHost(_copy(module), name=name, feature_layer=layer, levels=levels, keep_head=keep_head)
    if order.image_size not in (0, host.image_size):
        raise InvalidSpec(f"image size {order.image_size} was asked for, and {host.name} takes {host.image_size}")
    return host, origin


def _require_no_host_options(order: Order, placement: Placement) -> None:
    method = order.recipe.method
    if order.backbone_weights not in ("random", ""):
        raise InvalidSpec(f"--backbone-weights {order.backbone_weights}: {method} stands without a host here; drop it")
    if order.feature_layer:
        raise InvalidSpec(f"--feature-layer {order.feature_layer}: {method} stands without a host here; drop it")
    if order.prefix:
        raise InvalidSpec(f"--{order.prefix}-prefix: {method} stands without a host here; drop it")
    if order.image_size and placement != "encoder":
        raise InvalidSpec(f"--image-size {order.image_size}: {method} takes tokens here, not an image; drop it")


def _require_finite(module: nn.Module, name: str) -> None:
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise WeightsError(f"{key!r} of {name} holds NaN or Inf; give a module whose weights are finite")


def _copy(model: nn.Module) -> nn.Module:
    """Copy a user's module, sharing its tensors: its head is cut off here and must stay on there."""
    import copy

    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo).eval()


def _find_site(
    order: Order, cls: type[Compressor], placement: Placement, params: Any, host: Host | None, image_size: int
) -> tuple[Site, Any]:
    if order.compressor is not None and host is None:
        return order.compressor.site, params
    if host is None:
        return cls.site_without_host(params, placement, image_size), params
    site = host.site
    if placement == "inside" and order.prefix:
        raise InvalidSpec(
            f"--{order.prefix}-prefix: inside {host.name} its {host.num_prefix_tokens} prefix token(s) stay and are "
            "protected; drop the option"
        )
    if placement == "after" and cls.keeps_prefix:
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
    decided = getattr(params, cls.width_param)
    if order.weights != "random" and decided != site.embed_dim:
        raise InvalidSpec(
            f"{host.name} hands over tokens of width {site.embed_dim}, and the weights of {order.recipe.method} "
            f"read width {decided}; choose a host or weights of equal width"
        )
    return site, _settle(cls, params, cls.params_of_site(site), order, f"the tokens of {host.name}")


def _choose_budgets(
    order: Order, cls: type[Compressor], preset: str, params: Any, site: Site, notes: list[str]
) -> tuple[TokenBudget, ...]:
    rule = order.recipe.rule(preset).narrowed(cls.possible_counts(params, site))
    tokens_in = cls.count_tokens(params, site)
    rows = getattr(params, "latents", 0) or getattr(params, "table_entries", 0)
    asked = order.budgets
    if not asked and order.compressor is not None:
        if order.align != 1:
            raise InvalidSpec(
                f"align={order.align}: a Compressor of your own has the budget that it was made for, "
                f"{order.compressor.budget.tokens_out}; give budgets, or drop align"
            )
        return (order.compressor.budget,)
    if not asked:
        require_declared(order, preset, rows)
        decided = cls.default_counts(params, site) or ((rows,) if rows and rule.allows(rows) else rule.default)
        if max(decided) > tokens_in:
            raise InvalidSpec(
                f"{order.recipe.method} keeps {max(decided)} tokens where nothing is said, and {tokens_in} go in; say "
                f"how many to keep, for example --budget {max(1, tokens_in // 2)}"
            )
        asked = tuple(map(str, decided))
    given, asked = asked, tuple(_aligned(text, order, tokens_in, notes) for text in asked)
    parsed = [parse_budget(text, tokens_in=tokens_in, rule=rule, method=order.recipe.method) for text in asked]
    prefix = site.num_prefix_tokens if cls.hands_on_prefix else 0
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


def _without_the_second(order: Order, placement: Placement, output: Output) -> Order:
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


def _follow(
    order: Order, then: Then, compressors: Sequence[Compressor], notes: list[str]
) -> tuple[list[Compressor], ThenRecord]:
    """Put the recipe's second method behind the first, once for each budget."""
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
    state, _, saved = _read_weights(asked, cls, notes)
    preset, params = settle(asked, cls, state, saved, notes)
    if recipe.preset(preset).placement != "after":
        raise InvalidSpec(
            f"{names}: preset {preset} of {then.method} stands {recipe.preset(preset).placement}, and behind {method} "
            f"it is handed tokens; {recipe.placements['after']} is a preset for these"
        )
    tokens = first.output_specs()[0]
    kept = first.budget.tokens_out
    if len(tokens.shape) != _TOKENS_RANK:
        raise InvalidSpec(
            f"{names}: {method} gives {tokens}, and {then.method} takes tokens [B, N, D]; choose another form"
        )
    site = Site(
        "after",
        tokens_in=kept,
        embed_dim=tokens.shape[-1],
        num_prefix_tokens=tokens.shape[1] - kept,
        num_heads=getattr(params, "attention_heads", 0),
    )
    params = _settle(cls, params, cls.params_of_site(site), asked, f"the tokens of {method}")
    budgets = _choose_budgets(asked, cls, preset, params, site, notes)
    params = cls.for_budgets(params, [budget.tokens_out for budget in budgets])
    seconds, origin = _make_compressors(asked, cls, params, site, budgets, "tokens", state)
    notes.append(f"{method} hands {kept} tokens to {then.method}")
    record = ThenRecord(then.method, preset, msgspec.to_builtins(params), kept, origin, recipe.source)
    return [Chain(first, second, methods=(method, then.method)) for second in seconds], record


def _find_preprocess(recipe: Recipe, host: Host | None, site: Site) -> Preprocess | None:
    if host is not None:
        return host.preprocess
    if site.placement != "encoder":
        return None
    given = recipe.preprocess
    return Preprocess(site.image_size, given.crop, given.interpolation, given.mean, given.std)


def _make_compressors(
    order: Order,
    cls: type[Compressor],
    params: Any,
    site: Site,
    budgets: Sequence[TokenBudget],
    output: Output,
    state: Mapping[str, Tensor] | None,
) -> tuple[list[Compressor], WeightsOrigin]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(order.seed)
        compressors = [cls(params, site, budget, output) for budget in budgets]
    first = compressors[0]
    if order.compressor is not None:
        _require_finite(order.compressor, cls.__name__)
        own = order.compressor.state_dict()
        first.load_state_dict(own, strict=True)
        origin = WeightsOrigin(kind="module", name=cls.__name__, sha256=state_digest(own))
    elif state is not None:
        layout = first.load_original(state, unread=tuple(order.recipe.unread))
        origin = weights_origin(Path(order.weights), state, layout=layout)
    else:
        initialise(first, torch.Generator().manual_seed(order.seed))
        origin = WeightsOrigin(kind="random", seed=order.seed)
    for other in compressors[1:]:
        other.load_state_dict(first.state_dict(keep_vars=True), strict=True, assign=True)
    return compressors, origin


def _place(compressor: Compressor, host: Host | None, preprocess: Preprocess | None, order: Order) -> PlacedModel:
    if isinstance(compressor, InsideCompressor) and compressor.site.placement == "inside" and host is not None:
        return InsideModel(compressor, host, preprocess=preprocess, input_dtype=order.input_dtype, pad_to=order.pad_to)
    return PlacedModel(compressor, host, preprocess=preprocess, input_dtype=order.input_dtype, pad_to=order.pad_to)


def _make_router(
    order: Order, models: Sequence[PlacedModel], host: Host | None, seam: int | None, notes: list[str]
) -> tuple[Router | None, WeightsOrigin | None]:
    """Make the router's graph, and say where its weights come from; none for `fixed`, which has no graph."""
    if order.router in ("", "fixed"):
        return None, None
    largest = models[-1]
    if isinstance(largest.compressor, Chain) and len(largest.stem_specs()) > 1:
        raise InvalidSpec(
            f"router {order.router}: the first of these methods takes {', '.join(map(str, largest.stem_specs()))}, and "
            "a router sees the first of it alone; drop --router"
        )
    compressor, image = largest.compressor, largest.input_specs()[0]
    cuts: tuple[int, ...] = ()
    if isinstance(compressor, InsideCompressor):
        cuts = tuple(block for block in range(compressor.site.depth) if compressor.acts_in(block))
    router_site = RouterSite(
        buckets=tuple(model.compressor.budget.tokens_out for model in models),
        tokens_in=compressor.budget.tokens_in,
        image=image if image.kind == "image" and len(image.shape) == 4 else None,
        preprocess=largest.preprocess,
        patch_size=host.patch_size if host is not None else 0,
        # With no block in front of the seam nothing has been summed up: there is no score to read.
        stem=tuple(spec for spec in largest.seam_specs() if seam or spec.name != "score") if seam is not None else (),
        span=_span(compressor, models),
        score=_stem_score(models, seam),
        num_prefix_tokens=compressor.site.num_prefix_tokens,
        cuts=cuts,
        depth=compressor.site.depth,
    )
    cls = router_class(order.router)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(order.seed)
        router = cls(cls.parse_params(order.router_params, name=order.router), router_site).eval()
    origin = None
    if order.router_weights != "random":
        router.load(read_checkpoint(Path(order.router_weights), say=notes.append))
        origin = file_origin(Path(order.router_weights), layout=f"router {order.router}")
    elif any(True for _ in router.parameters()):
        initialise(router, torch.Generator().manual_seed(order.seed))
        origin = WeightsOrigin(kind="random", seed=order.seed)
    notes += router.remarks
    return router, origin


def _span(compressor: Compressor, models: Sequence[PlacedModel]) -> tuple[int, int]:
    """Return the tokens that a router's need of 0 and of 1 stand for: of a table its smallest and largest bucket."""
    counts = [model.compressor.budget.tokens_out for model in models]
    if getattr(compressor.params, "latents", 0) and not isinstance(compressor, Chain):
        return counts[0], counts[-1]
    return 0, compressor.budget.tokens_in


def _stem_score(models: Sequence[PlacedModel], seam: int | None) -> StemScore | None:
    """Return the score by which tokens stay, where it is made of what the stem hands over."""
    compressor = models[-1].compressor
    if seam is None or not isinstance(compressor, TokenPruner):
        return None
    handed = {spec.name for spec in models[-1].seam_specs() if seam or spec.name != "score"}
    if not compressor.scored_by or not set(compressor.scored_by) <= handed:
        return None
    pruners = [model.compressor for model in models if isinstance(model.compressor, TokenPruner)]
    return StemScore(compressor.scored_by, compressor.score_of, tuple(pruner.kept_by_score for pruner in pruners))


def _make_plain(
    order: Order, cls: type[Compressor], params: Any, host: Host | None, placed: PlacedModel, output: Output
) -> tuple[PlainModel | None, str]:
    """Return the model without the compressor, and its name."""
    if host is not None and output == "logits":
        return PlainModel(host.classifier, placed, output="logits", shape=(host.num_classes,)).eval(), host.name
    if host is not None:
        shape = (host.site.tokens_in, host.site.embed_dim)
        return PlainModel(host, placed, output="tokens", shape=shape).eval(), host.name
    arguments = cls.plain_vit(params)
    if arguments is None or placed.compressor.site.placement != "encoder":
        return None, ""
    name = "plain ViT " + "x".join(str(arguments[key]) for key in ("embed_dim", "depth", "num_heads"))
    size = placed.compressor.site.image_size
    if output == "logits":
        vit = plain_vit(arguments, image_size=size, num_classes=params.num_classes, seed=order.seed)
        return PlainModel(vit, placed, output="logits", shape=(params.num_classes,)).eval(), name
    vit = plain_vit(arguments, image_size=size, num_classes=0, seed=order.seed)
    encoder = TimmHost(vit, name=name, feature_layer=-1)
    return PlainModel(encoder, placed, output="tokens", shape=(encoder.site.tokens_in, params.embed_dim)).eval(), name
