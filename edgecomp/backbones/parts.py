"""The parts of an assembly: host in front, compressors that share their parameters, router and plain model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from edgecomp.backbones.host import Host, HostRequest, no_classifier
from edgecomp.backbones.inside import InsideModel
from edgecomp.backbones.own import require_as_made
from edgecomp.backbones.placed import PlacedModel, PlainModel
from edgecomp.backbones.timm import TimmHost, load_host, plain_vit
from edgecomp.backbones.towers import is_tower, load_tower
from edgecomp.backbones.transformers import TransformersHost, split_classifier
from edgecomp.compressors._base import Compressor, initialise
from edgecomp.compressors._chain import Chain
from edgecomp.compressors._checkpoint import read_checkpoint, state_digest, weights_origin
from edgecomp.compressors._inside import InsideCompressor
from edgecomp.compressors._pruning import TokenPruner
from edgecomp.errors import InvalidSpec, WeightsError
from edgecomp.resources import data_path
from edgecomp.routers import Router, RouterSite, StemScore, router_class
from edgecomp.specs import Output, Placement, Preprocess, Preset, Site, TokenBudget
from edgecomp.specs.backbone import read_backbones
from edgecomp.specs.order import Order
from edgecomp.specs.origin import WeightsOrigin, file_origin

__all__ = ["make_compressors", "make_host", "make_plain", "make_router", "place", "settle_router"]


def make_host(
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
    request = HostRequest(
        name=backbone,
        weights=weights,
        state=state,
        image_size=image_size,
        feature_layer=layer,
        levels=levels,
        keep_head=keep_head,
        seed=order.seed,
    )
    load = load_tower if is_tower(backbone, listed) else load_host
    return load(request, listed=listed, say=notes.append)


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
            raise no_classifier(name)
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
        if tensor.is_meta:
            raise WeightsError(f"{key!r} of {name} is on the meta device and holds no values; load its weights first")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise WeightsError(f"{key!r} of {name} holds NaN or Inf; give a module whose weights are finite")


def _copy(model: nn.Module) -> nn.Module:
    """Copy a user's module, sharing its tensors: its head is cut off here and must stay on there."""
    import copy

    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo).eval()


def make_compressors(
    order: Order,
    cls: type[Compressor],
    params: Any,
    site: Site,
    budgets: Sequence[TokenBudget],
    output: Output,
    state: Mapping[str, Tensor] | None,
) -> tuple[list[Compressor], WeightsOrigin]:
    """Make a compressor for each budget, all with one set of parameters, and say where these come from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(order.seed)
        compressors = [cls(params, site, budget, output) for budget in budgets]
    first = compressors[0]
    if order.compressor is not None:
        _require_finite(order.compressor, cls.__name__)
        own = order.compressor.state_dict()
        try:
            first.load_state_dict(own, strict=True)
        except RuntimeError as error:
            told = " ".join(str(error).split())[:400]
            raise WeightsError(
                f"the parameters of the {cls.__name__} given are not those of a {cls.__name__} of its params ({told}); "
                "merge what was put into it (LoRA, weight norm), and give the module that edgecomp.compressor made"
            ) from None
        require_as_made(order.compressor)
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


def place(compressor: Compressor, host: Host | None, preprocess: Preprocess | None, order: Order) -> PlacedModel:
    """Put a compressor where it stands: inside its host, after it, or alone."""
    if isinstance(compressor, InsideCompressor) and compressor.site.placement == "inside" and host is not None:
        return InsideModel(compressor, host, preprocess=preprocess, input_dtype=order.input_dtype, pad_to=order.pad_to)
    return PlacedModel(compressor, host, preprocess=preprocess, input_dtype=order.input_dtype, pad_to=order.pad_to)


def settle_router(order: Order, models: Sequence[PlacedModel], notes: list[str]) -> Order:
    """Return the order with the router that there will be, "" for none: what was asked for, or the recipe's own."""
    own = order.recipe.defaults.router
    router = order.router or own
    if not order.router and own and len(models) == 1:
        notes.append(f"router {own} of the recipe is left out: there is one bucket, and nothing to choose")
        router = ""
    settled: Order = msgspec.structs.replace(order, router="" if router == "none" else router)
    return settled


def make_router(
    order: Order, models: Sequence[PlacedModel], host: Host | None, seam: int | None, notes: list[str]
) -> tuple[Router | None, WeightsOrigin | None]:
    """Make the router's graph, and say where its weights come from; none for `fixed`, which has no graph."""
    if order.router in ("", "fixed"):
        return None, None
    largest = models[-1]
    in_a_row = isinstance(largest.compressor, Chain)
    compressor, image = _routed(largest), largest.input_specs()[0]
    if in_a_row and image.kind != "image":
        raise InvalidSpec(
            f"router {order.router}: these two methods take {image}, and of two in a row an image is routed; name a "
            "--backbone, or drop --router"
        )
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
        tokens="handed" if in_a_row else "tokens",
        is_grid=not in_a_row,
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
    if getattr(compressor.params, "latents", 0):
        return counts[0], counts[-1]
    return 0, compressor.budget.tokens_in


def _stem_score(models: Sequence[PlacedModel], seam: int | None) -> StemScore | None:
    """Return the score by which tokens stay, where it is made of what the stem hands over."""
    compressor = _routed(models[-1])
    if seam is None or not isinstance(compressor, TokenPruner):
        return None
    handed = {spec.name: spec.name for spec in models[-1].seam_specs() if seam or spec.name != "score"}
    if isinstance(models[-1].compressor, Chain):
        handed = {"tokens": "handed"}
    if not compressor.scored_by or not set(compressor.scored_by) <= handed.keys():
        return None
    pruners = [one for model in models if isinstance(one := _routed(model), TokenPruner)]
    reads = tuple(handed[name] for name in compressor.scored_by)
    return StemScore(reads, compressor.score_of, tuple(pruner.kept_by_score for pruner in pruners))


def _routed(model: PlacedModel) -> Compressor:
    """Return the method whose buckets a router chooses among: of two in a row the second."""
    return model.compressor.second if isinstance(model.compressor, Chain) else model.compressor


def make_plain(
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
