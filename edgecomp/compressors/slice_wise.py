"""Slice-wise compression: a large image is cut, and each slice goes through the same encoder and compressor.

Paper: "LLaVA-UHD: an LMM Perceiving Any Aspect Ratio and High-Resolution Images" (arXiv:2403.11703), section 3.1. Where
to cut, and how the slices' tokens follow each other, is decided outside the graph: `edgecomp.slices`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
import torch
from msgspec import Meta
from torch import Tensor, nn

from edgecomp.compressors import compressor_class
from edgecomp.compressors._base import Compressor, HostFeature, Params, Positive
from edgecomp.errors import InvalidSpec
from edgecomp.specs import Output, Placement, Site, TensorSpec, TokenBudget, load_recipe

__all__ = ["SliceWise"]


class SliceWiseParams(Params, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of slice-wise compression.

    Attributes:
        tokens: tokens of a slice where no host says how many.
        context_dim: width of the incoming tokens; a host decides it.
        inner: any method that stands after an encoder, where wanted with one of its presets: `perceiver:idefics2`.
        inner_params: parameters of that method that replace the preset's, for example `{num_heads=16}`.
        images: images in one request, side by side; above 1 they become an axis behind the batch of slices.
        resolution, patch, sides, most, overview, fit: how images are cut, for who prepares them; see `edgecomp.slices`.
            No graph depends on them. A host decides the patch; resolution 0: the side of the square that its tokens
            are of.
    """

    tokens: Positive = 1024
    context_dim: Positive = 1152
    inner: str = "resampler-2d"
    inner_params: dict[str, Any] = msgspec.field(default_factory=dict)
    images: Positive = 1
    resolution: Annotated[int, Meta(ge=0, le=8192)] = 0
    patch: Annotated[int, Meta(ge=1, le=1024)] = 14
    sides: Literal["down", "nearest"] = "down"
    most: Annotated[int, Meta(ge=1, le=1024)] = 9
    overview: Literal["first", "last"] = "first"
    fit: Literal["stretch", "pad"] = "stretch"


class SliceWise(Compressor):
    """Compress each slice of an image, and its overview, by another method.

    Shapes: tokens (S, [I,] N, C), and what else the method takes, -> its outputs, (S, [I,] M, D). The batch is the
    slices of one request and its overview, filled up to the next bucket; I images are an axis where `images` is above
    1.

    Static rewrite: how many slices an image has depends on its sides, so that the batch is a bucket: 1, and 2, 3, 4, 6
    or 9 slices with an overview. What is behind the real rows is left out by the order that `edgecomp.slices` gives;
    separators and newlines are numbers in it, so that no graph depends on the grid. Level E4: the reference runs the
    inner method's original on one image at a time.

    Source: arXiv:2403.11703, section 3.1 (slices), 3.3 (separators).
    """

    Params = SliceWiseParams
    takes_inner_layouts = True
    width_param = "context_dim"
    params: SliceWiseParams

    def __init__(self, params: SliceWiseParams, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        super().__init__(params, site, budget, output)
        cls, own = _inner(params, site)
        inner = cls(own, site, budget, output)
        self.inner = inner
        self.keeps_prefix, self.hands_on_prefix = self.prefix_of(params)  # type: ignore[misc]
        self.reads_grid = inner.reads_grid  # type: ignore[misc]

    @property
    def host_features(self) -> tuple[HostFeature, ...]:
        """What the inner method reads of the encoder, which sees each slice as an image of its own."""
        return self.inner.host_features

    @property
    def media_shape(self) -> tuple[int, ...]:
        """The axis of images behind the batch, where there are several."""
        return (self.params.images,) if self.params.images > 1 else ()

    def input_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return the inputs of the inner method, for each image."""
        return tuple(self._spread(spec, batch) for spec in self.inner.input_specs(1))

    def output_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return the outputs of the inner method, for each image."""
        return tuple(self._spread(spec, batch) for spec in self.inner.output_specs(1))

    def _spread(self, spec: TensorSpec, batch: int) -> TensorSpec:
        return msgspec.structs.replace(spec, shape=(batch, *self.media_shape, *spec.shape[1:]))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return what the inner method makes of each slice."""
        if not self.media_shape:
            return self.inner(*inputs)  # type: ignore[no-any-return]
        batch = inputs[0].shape[0]
        outputs = self.inner(*(value.flatten(0, 1) for value in inputs))
        return tuple(value.reshape(batch, *self.media_shape, *value.shape[1:]) for value in outputs)

    def reference(self) -> nn.Module:
        """Return the inner method's original, one image at a time."""
        return SliceWiseOriginal(self)

    @property
    def remarks(self) -> tuple[str, ...]:
        """Say what is inside, and whether it would read padding."""
        told = [f"each slice through {self.params.inner}", *self.inner.remarks]
        if self.params.fit == "pad" and not any(spec.kind in ("mask", "sizes") for spec in self.inner.input_specs()):
            told.append(
                f"params.fit=pad: {self.params.inner} takes no mask here, and reads what fills a square up as image; "
                "--set params.fit=stretch, or an inner method that takes one, where it was not trained so"
            )
        return tuple(told)

    # -- what the inner method decides -----------------------------------------------------------------

    @classmethod
    def params_of_site(cls, site: Site) -> dict[str, Any]:
        """Return what the host decides; its patch too, of which the positions of a slice are counted."""
        across = math.isqrt(site.tokens_in)
        is_square = across * across == site.tokens_in and site.image_size and site.image_size % across == 0
        return {**super().params_of_site(site), **({"patch": site.image_size // across} if is_square else {})}

    @classmethod
    def levels_of(cls, params: SliceWiseParams) -> tuple[int, ...]:
        """Return the inner method's."""
        inner, own = _inner(params)
        return inner.levels_of(own)

    @classmethod
    def prefix_of(cls, params: SliceWiseParams) -> tuple[bool, bool]:
        """Return the inner method's."""
        inner, own = _inner(params)
        return inner.prefix_of(own)

    @classmethod
    def site_without_host(cls, params: SliceWiseParams, placement: Placement, image_size: int) -> Site:
        """Return the site that the inner method would have by itself."""
        inner, own = _inner(params)
        return inner.site_without_host(own, placement, image_size)

    @classmethod
    def for_budgets(cls, params: SliceWiseParams, counts: Sequence[int]) -> SliceWiseParams:
        """Let the inner method complete its own parameters, and the tokens the resolution."""
        inner, own = _inner(params)
        completed = msgspec.to_builtins(inner.for_budgets(own, counts))
        side = params.resolution or math.isqrt(params.tokens) * params.patch
        return msgspec.structs.replace(params, inner_params={**params.inner_params, **completed}, resolution=side)

    @classmethod
    def default_counts(cls, params: SliceWiseParams, site: Site) -> tuple[int, ...]:
        """Return the inner method's."""
        inner, own = _inner(params, site)
        return inner.default_counts(own, site)

    @classmethod
    def possible_counts(cls, params: SliceWiseParams, site: Site) -> tuple[int, ...]:
        """Return the inner method's."""
        inner, own = _inner(params, site)
        return inner.possible_counts(own, site)

    @classmethod
    def infer_params(cls, state: Mapping[str, Tensor], params: SliceWiseParams) -> dict[str, Any]:
        """Return what a checkpoint of the inner method decides."""
        inner, own = _inner(params)
        found = inner.infer_params(_own_part(state), own)
        context = {"context_dim": found[inner.width_param]} if inner.width_param in found else {}
        return {"inner_params": {**params.inner_params, **found}, **context}

    def load_original(self, state: Mapping[str, Tensor], *, unread: Sequence[str] = ()) -> str:
        """Load a checkpoint of the inner method, in any of its layouts."""
        return self.inner.load_original(_own_part(state), unread=unread)


def _inner(params: SliceWiseParams, site: Site | None = None) -> tuple[type[Compressor], Any]:
    """Return the inner method and its parameters."""
    cls, preset = _preset_of(params.inner)
    values = {**preset, **params.inner_params}
    values |= {"tokens": params.tokens, cls.width_param: params.context_dim}
    if "images" in cls.Params.__struct_fields__:
        if params.inner_params.get("images", 1) != 1:
            raise InvalidSpec(
                f"slice-wise: inner_params.images={params.inner_params['images']}: the images of a request are "
                "counted once, by params.images; drop it there"
            )
        values["images"] = 1
    if site is not None:
        values |= cls.params_of_site(site)
    return cls, cls.parse_params(values, method=f"{params.inner} (inside slice-wise)")


@functools.lru_cache(maxsize=64)
def _preset_of(named: str) -> tuple[type[Compressor], dict[str, Any]]:
    method, _, preset = named.partition(":")
    if method == "slice-wise":
        raise InvalidSpec("slice-wise: params.inner=slice-wise: slices are not sliced again; name another method")
    recipe = load_recipe(method)
    if "after" not in recipe.placements:
        raise InvalidSpec(
            f"slice-wise: params.inner={method} stands {' or '.join(recipe.placements)}; choose one that stands after "
            "an encoder, as `edgecomp list methods` shows them"
        )
    chosen = recipe.preset(preset or recipe.placements["after"])
    return compressor_class(method), dict(chosen.params)


def _own_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the inner method's tensors: all, but for edgecomp's own layout, where they stand under `inner`."""
    own = {key.removeprefix("inner."): value for key, value in state.items() if key.startswith("inner.")}
    return own or dict(state)


class SliceWiseOriginal(nn.Module):
    """The inner method's original, one image of a request after the other."""

    def __init__(self, static: SliceWise) -> None:
        super().__init__()
        self.static = static
        self.original = static.inner.reference()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return what the static module returns."""
        if not self.static.media_shape:
            return self.original(*inputs)  # type: ignore[no-any-return]
        images = [self.original(*(value[:, index] for value in inputs)) for index in range(inputs[0].shape[1])]
        return tuple(torch.stack(parts, dim=1) for parts in zip(*images, strict=True))
