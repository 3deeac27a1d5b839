"""The model that is exported: preprocessing where asked, a host where there is one, and the compressor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from edgecomp.backbones.attention import Attended, attend, attend_fused
from edgecomp.backbones.host import Host
from edgecomp.backbones.padding import RowPadding
from edgecomp.compressors._base import Compressor
from edgecomp.compressors._chain import Chain
from edgecomp.compressors._saliency import text_likelihood
from edgecomp.errors import InvalidSpec
from edgecomp.specs import DType, Output, Preprocess, TensorSpec
from edgecomp.specs.tensor import TensorKind

__all__ = ["PlacedModel", "PlainModel"]


class Normalise(nn.Module):
    """Camera frames to what an encoder takes: uint8 (B, ..., S, S, 3) -> float (B, ..., 3, S, S)."""

    scale: Tensor
    shift: Tensor

    def __init__(self, preprocess: Preprocess) -> None:
        super().__init__()
        std = torch.tensor(preprocess.std, dtype=torch.float64)
        mean = torch.tensor(preprocess.mean, dtype=torch.float64)
        default = torch.get_default_dtype()
        self.register_buffer("scale", (1 / (255 * std)).to(default), persistent=False)
        self.register_buffer("shift", (-mean / std).to(default), persistent=False)

    def forward(self, frames: Tensor) -> Tensor:
        """Scale to [0, 1], subtract the mean, divide by the standard deviation, move colours forward."""
        pixels = frames.to(self.scale.dtype) * self.scale + self.shift
        return pixels.movedim(-1, -3)


def _image_spec(batch: int, media: tuple[int, ...], size: int, dtype: DType) -> TensorSpec:
    shape = (size, size, 3) if dtype == "uint8" else (3, size, size)
    return TensorSpec("image", (batch, *media, *shape), dtype, "image")


class PlacedModel(nn.Module):
    """A compressor where it stands.

    Shapes: what `input_specs` says -> what the compressor's `output_specs` says. With a host, `image` takes
    the place of `tokens`; where the compressor takes several images, the image has the same leading axes.

    Args:
        compressor: for one budget.
        backbone: the host in front, or None.
        preprocess: with `uint8` input: what the graph does to raw pixels.
        input_dtype: of `image`: `float32` (normalised, (B, 3, S, S)) or `uint8` (raw, (B, S, S, 3)).
        pad_to: rows that come out, prefix tokens among them, with `count` and `mask`; 0: as the budget says.
    """

    mean: Tensor
    std: Tensor
    _shows_handed = False

    def __init__(
        self,
        compressor: Compressor,
        backbone: Host | None,
        *,
        preprocess: Preprocess | None,
        input_dtype: DType = "float32",
        pad_to: int = 0,
    ) -> None:
        super().__init__()
        self.padding: RowPadding | None = None
        if pad_to:
            kept, tokens_in = compressor.budget.tokens_out, compressor.budget.tokens_in
            specs = compressor.output_specs()
            self.padding = RowPadding(specs, kept=kept, tokens_in=tokens_in, pad_to=pad_to)
        self.backbone = backbone
        self.compressor = compressor
        self.input_dtype: DType = input_dtype
        self.preprocess = preprocess
        if backbone is not None:
            _require_features(compressor, backbone)
        takes_image = backbone is not None or compressor.input_specs()[0].kind == "image"
        if input_dtype == "uint8":
            if not takes_image or preprocess is None:
                raise InvalidSpec("input dtype uint8 is for images, and this model takes tokens; drop --input-dtype")
            self.normalise = Normalise(preprocess)
        if preprocess is not None:
            for name in ("mean", "std"):
                value = torch.tensor(getattr(preprocess, name), dtype=torch.get_default_dtype())[:, None, None]
                self.register_buffer(name, value, persistent=False)

    @property
    def media_shape(self) -> tuple[int, ...]:
        """Axes between batch and tokens (images, frames) that the compressor takes."""
        return self.compressor.input_specs()[0].shape[1:-2] if self.backbone is not None else ()

    def input_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return what `forward` takes."""
        first, *rest = self.compressor.input_specs(batch)
        if self.backbone is not None:
            rest = [spec for spec in rest if spec.name not in self.compressor.host_features]
            first = _image_spec(batch, self.media_shape, self.backbone.image_size, self.input_dtype)
        elif first.kind == "image":
            first = _image_spec(batch, (), self.compressor.site.image_size, self.input_dtype)
        return (first, *rest)

    def output_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return what `forward` returns."""
        return self.padding.output_specs(batch) if self.padding is not None else self.compressor.output_specs(batch)

    def forward(self, first: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """Return the compressor's outputs."""
        if self._shows_handed:
            count = len(self.stem_specs()) - 1
            handed = self.before(first, *rest[:count], seam=0)
            return (*self.behind(*handed, *rest[count:], seam=0), *handed)
        return self.give(self.compressor(*self.embed(first), *rest))

    @contextmanager
    def showing_handed(self) -> Iterator[tuple[TensorSpec, ...]]:
        """Return behind the outputs what the first of two methods in a row hands to the second; say what that is."""
        self._shows_handed = isinstance(self.compressor, Chain)
        try:
            yield self.seam_specs() if self._shows_handed else ()
        finally:
            self._shows_handed = False

    def give(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return outputs with as many rows as were asked for."""
        return self.padding(outputs) if self.padding is not None else outputs

    def embed(self, first: Tensor, attend: Callable[..., Attended] = attend) -> tuple[Tensor, ...]:
        """Return what the compressor takes first: pixels, or the host's tokens and features."""
        given = first
        if self.input_dtype == "uint8":
            first = self.normalise(first)
        host, names = self.backbone, self.compressor.host_features
        if host is None:
            return (first,)
        batch, media, size = first.shape[0], self.media_shape, host.image_size
        image = first.reshape(-1, 3, size, size) if media else first
        site, prefix = self.compressor.site, host.num_prefix_tokens
        hands_prefix = site.tokens_in + site.num_prefix_tokens > host.site.tokens_in
        if names or hands_prefix:
            tokens, features = host.look(image, names, attend)
            if "text_likelihood" in names:
                features["text_likelihood"] = text_likelihood(
                    self.raw_pixels(given).reshape(image.shape), host.patch_size
                )
            if not hands_prefix:
                tokens = tokens[:, prefix:]
                if "keys" in features:
                    features["keys"] = features["keys"][:, prefix:]
            handed = (tokens, *(features[name] for name in names))
        else:
            handed = (host(image),)
        return tuple(one.reshape(batch, *media, *one.shape[1:]) for one in handed) if media else handed

    # -- the point from which buckets differ ----------------------------------------------------------

    @property
    def seam(self) -> int | None:
        """Blocks of the host in front of the first thing that depends on the budget; none without a host.

        Of two methods in a row the first stands in front too, so that they are cut also where there is no host.
        """
        if self.backbone is not None:
            return self.backbone.depth
        return 0 if isinstance(self.compressor, Chain) else None

    def stem_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return the inputs that are read in front of the seam."""
        specs, compressor = self.input_specs(batch), self.compressor
        if not isinstance(compressor, Chain):
            return specs[:1]
        return specs[: len(compressor.first.input_specs()) - self._features]

    @property
    def _features(self) -> int:
        """How many of the compressor's inputs the host hands over beside tokens."""
        return len(self.compressor.host_features) if self.backbone is not None else 0

    def seam_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return what is handed over at the seam."""
        if isinstance(self.compressor, Chain):
            return self.compressor.handed_specs(batch)
        return self.compressor.input_specs(batch)[: 1 + len(self.compressor.host_features)]

    def before(self, *inputs: Tensor, seam: int) -> tuple[Tensor, ...]:  # noqa: ARG002 - the whole host is in front
        """Return what is handed over at the seam."""
        given = self.embed(inputs[0])
        return self.compressor.hand_over(*given, *inputs[1:]) if isinstance(self.compressor, Chain) else given

    def behind(self, *inputs: Tensor, seam: int) -> tuple[Tensor, ...]:  # noqa: ARG002 - as above
        """Return the outputs of what was handed over, and of the inputs that the stem does not take."""
        if isinstance(self.compressor, Chain):
            return self.give(self.compressor.finish(*inputs))
        return self.give(self.compressor(*inputs))

    def raw_pixels(self, given: Tensor) -> Tensor:
        """Return the input as pixels in [0, 1], (B, 3, S, S)."""
        if self.input_dtype == "uint8":
            return given.to(torch.get_default_dtype()).movedim(-1, -3) / 255
        return given * self.std + self.mean

    def reference(self) -> nn.Module:
        """Return the same model with the compressor's eager original, sharing all parameters."""
        return _Reference(self)


def _require_features(compressor: Compressor, host: Host) -> None:
    """Refuse a host that cannot hand over what a compressor after it reads."""
    if compressor.site.placement == "inside":
        return
    by_class = [name for name in compressor.host_features if name.startswith("class_")]
    if by_class and not host.has_class_token:
        raise InvalidSpec(
            f"{type(compressor).__name__} reads {by_class[0]}, and {host.name} has no class token; choose a host with "
            "one (vit, deit, CLIP, DINOv2), or a score that needs none"
        )
    site = compressor.site
    if compressor.host_features and site.tokens_in > host.site.tokens_in:
        raise InvalidSpec(
            f"--keep-prefix: {type(compressor).__name__} reads {compressor.host_features[0]} of each patch, which the "
            f"{host.num_prefix_tokens} prefix token(s) of {host.name} have none of; drop the option"
        )
    if any(name not in ("levels", "text_likelihood") for name in compressor.host_features):
        host.require_open_blocks(tokens_move=False)


class _Reference(nn.Module):
    def __init__(self, placed: PlacedModel) -> None:
        super().__init__()
        self.placed = placed
        self.original = placed.compressor.reference()

    def forward(self, first: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """Return the original's outputs."""
        return self.placed.give(self.original(*self.placed.embed(first, attend_fused), *rest))

    def hand_over(self, first: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """Return what the first of two originals in a row hands to the second."""
        return self.original.hand_over(*self.placed.embed(first, attend_fused), *rest)  # type: ignore[operator, no-any-return]


class PlainModel(nn.Module):
    """The model without its compressor: an encoder's patch tokens, or the plain ViT's logits.

    Args:
        encoder: a `Host`, or for logits a plain ViT.
        placed: the model that it is compared with; it takes the same image.
        output: name of what comes out, `tokens` or `logits`.
        shape: of what comes out for one image, without the batch.
    """

    def __init__(self, encoder: nn.Module, placed: PlacedModel, *, output: Output, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.encoder = encoder
        self.output, self.shape = output, shape
        self.media_shape = placed.media_shape
        self.image = placed.input_specs()[0]
        self.normalise = placed.normalise if placed.input_dtype == "uint8" else nn.Identity()

    def input_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `image`."""
        return (self.image.with_batch(batch),)

    def output_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `tokens` or `logits`."""
        kind: TensorKind = "tokens" if self.output == "tokens" else "features"
        return (TensorSpec(self.output, (batch, *self.media_shape, *self.shape), "float32", kind),)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the uncompressed tokens, or the logits."""
        pixels = self.normalise(image)
        if not self.media_shape:
            return (self.encoder(pixels),)
        out = self.encoder(pixels.reshape(-1, *pixels.shape[-3:]))
        return (out.reshape(image.shape[0], *self.media_shape, *self.shape),)

    def reference(self) -> nn.Module:
        """Return itself: nothing in it was rewritten."""
        return self
