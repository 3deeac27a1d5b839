"""Image towers of transformers as hosts: their blocks run part by part, with positions at one image size."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from edgecomp.backbones.attention import SplitAttention
from edgecomp.backbones.host import Host, HostBlock, no_classifier, require_layers
from edgecomp.errors import InvalidSpec
from edgecomp.specs import Preprocess

__all__ = ["FAMILIES", "Family", "TransformersHost", "one_size", "split_classifier"]

_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Family(NamedTuple):
    """What differs between the towers.

    Attributes:
        title: as lists of hosts say it.
        tower: name of transformers' class.
        config: name of its configuration's class.
        statistics: mean and deviation of its images.
        class_tokens: 1 where there is one.
        stretches: images are resized to the square, whatever their ratio.
    """

    title: str
    tower: str
    config: str
    statistics: tuple[tuple[float, float, float], tuple[float, float, float]]
    class_tokens: int
    stretches: bool = False


FAMILIES = {
    "clip_vision_model": Family("CLIP", "CLIPVisionModel", "CLIPVisionConfig", _CLIP, 1),
    "siglip_vision_model": Family("SigLIP and SigLIP 2", "SiglipVisionModel", "SiglipVisionConfig", _HALF, 0, True),
    "dinov2": Family("DINOv2", "Dinov2Model", "Dinov2Config", _IMAGENET, 1),
    "dinov2_with_registers": Family(
        "DINOv2 with registers", "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", _IMAGENET, 1
    ),
    "dinov3_vit": Family("DINOv3", "DINOv3ViTModel", "DINOv3ViTConfig", _IMAGENET, 1, True),
}


class TransformersHost(Host):
    """An image tower of transformers; see `Host`.

    The blocks run part by part on the tower's own modules: norms, projections, scales and MLPs. Parts that no token
    passes (pooling head, mask token, blocks behind the last layer that is read) are removed. Position tables are
    brought to the image size once, by transformers' own rule, and rotary angles are constants.

    Layer -1 of CLIP is behind its final norm, as in timm, where transformers' `last_hidden_state` has none.

    Args:
        model: a CLIPVisionModel, SiglipVisionModel, Dinov2Model, Dinov2WithRegistersModel or DINOv3ViTModel.
        name: what to call it.
        feature_layer: counted from the end, -1 or lower.
        levels: further layers that are read.
        image_size: side in pixels; 0: the model's own.
        preprocess: how images are prepared; none: as the family does.
        linear: the layer that makes logits of pooled tokens; none: there is no classifier.
    """

    model: Any
    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        feature_layer: int,
        levels: Sequence[int] = (),
        image_size: int = 0,
        preprocess: Preprocess | None = None,
        linear: nn.Linear | None = None,
    ) -> None:
        super().__init__()
        config: Any = getattr(model, "config", None)
        family = FAMILIES.get(getattr(config, "model_type", ""))
        if family is None or type(model).__name__ != family.tower:
            towers = ", ".join(known.tower for known in FAMILIES.values())
            raise InvalidSpec(
                f"backbone {name!r} is a {type(model).__name__} of transformers; hosts of transformers are {towers}"
            )
        tower: Any = getattr(model, "vision_model", model)
        self.family = family
        self._size, self._heads = int(config.hidden_size), int(config.num_attention_heads)
        self._patch = one_size(config.patch_size, "patch_size", name)
        self.image_size = image_size or one_size(config.image_size, "image_size", name)
        if self.image_size < self._patch or (image_size and image_size % self._patch):
            nearest = max(1, round(self.image_size / self._patch)) * self._patch
            raise InvalidSpec(
                f"image size {self.image_size} is not a multiple of the patch of {name}, {self._patch}; the nearest "
                f"that is: {nearest}"
            )
        layers = _part(tower, "encoder.layers", "encoder.layer", "model.layer", "layer")
        self.total_depth = len(layers)
        runs = require_layers(name, self.total_depth, feature_layer, levels, keep_head=linear is not None)
        del layers[runs:]
        self._layers, self._norm = _path(tower, layers), ""
        if runs == self.total_depth and not (linear is not None and family.title == "CLIP"):  # pools without its norm
            self._norm = _path(tower, _part(tower, "post_layernorm", "layernorm", "norm"))
        self.model = tower
        self.name, self.feature_layer, self.levels = name, feature_layer, tuple(levels)
        self.num_prefix_tokens = family.class_tokens + int(getattr(config, "num_register_tokens", 0) or 0)
        self.num_classes = linear.out_features if linear is not None else 0
        self.linear = linear
        mean, std = family.statistics
        self.preprocess = preprocess or Preprocess(
            self.image_size, 1.0, "bicubic", mean, std, family.stretches, centre="down"
        )
        _strip(tower, keep_norm=bool(self._norm))
        rope = getattr(tower, "rope_embeddings", None)
        if rope is None:
            _fix_positions(tower.embeddings, self.image_size, self._patch)
        else:
            angles = rope(torch.zeros(1, 3, self.image_size, self.image_size))
            for part, value in zip(("rope_cos", "rope_sin"), angles, strict=True):
                self.register_buffer(part, value.detach(), persistent=False)
        self.is_rotary = rope is not None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        side = self.image_size // self._patch
        return side, side

    @property
    def embed_dim(self) -> int:
        """Width of its tokens."""
        return self._size

    @property
    def num_heads(self) -> int:
        """Heads of its attention."""
        return self._heads

    @property
    def depth(self) -> int:
        """How many blocks it runs."""
        return len(self.model.get_submodule(self._layers))

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self._patch

    @property
    def has_class_token(self) -> bool:
        """Whether the first prefix token is a class token."""
        return bool(self.family.class_tokens)

    def block(self, index: int) -> HostBlock:
        """Return a block by its number."""
        layer = self.model.get_submodule(self._layers)[index]
        attention = self._attention(_part(layer, "self_attn", "attention"))
        norm1, norm2 = _part(layer, "layer_norm1", "norm1"), _part(layer, "layer_norm2", "norm2")
        scale1, scale2 = (getattr(layer, name, _same) for name in ("layer_scale1", "layer_scale2"))

        def run(tokens: Tensor) -> Tensor:
            tokens = tokens + scale1(attention.run(norm1(tokens)))
            return tokens + scale2(layer.mlp(norm2(tokens)))

        return HostBlock(run, norm1, attention, scale1, norm2, layer.mlp, scale2)

    def _attention(self, module: nn.Module) -> SplitAttention:
        return SplitAttention(
            _part(module, "q_proj", "attention.query"),
            _part(module, "k_proj", "attention.key"),
            _part(module, "v_proj", "attention.value"),
            _part(module, "out_proj", "o_proj", "output.dense"),
            num_heads=self._heads,
            rotate=self._rotate if self.is_rotary else _same,
        )

    def _rotate(self, x: Tensor) -> Tensor:
        """Turn the patches of queries or keys (B, H, P + N, d) by their angles; prefix tokens have no position."""
        prefix, patches = x[:, :, : self.num_prefix_tokens], x[:, :, self.num_prefix_tokens :]
        half = patches.shape[-1] // 2
        turned = torch.cat([-patches[..., half:], patches[..., :half]], dim=-1)
        return torch.cat([prefix, patches * self.rope_cos + turned * self.rope_sin], dim=2)

    def embed(self, image: Tensor) -> Tensor:
        """Return what goes into the first block: (B, P + N, D)."""
        tokens = self.model.embeddings(image)
        norm = getattr(self.model, "pre_layrnorm", None)  # transformers' spelling
        return tokens if norm is None else norm(tokens)  # type: ignore[no-any-return]

    def norm(self, tokens: Tensor) -> Tensor:
        """Return tokens behind the final norm."""
        return self.model.get_submodule(self._norm)(tokens) if self._norm else tokens

    def head(self, tokens: Tensor) -> Tensor:
        """Return the logits of tokens: of their mean, and in DINOv2 of the class token beside it."""
        if self.linear is None:
            raise no_classifier(self.name)
        pooled = tokens[:, self.num_prefix_tokens :].mean(1)
        if self.linear.in_features == 2 * self.embed_dim:
            pooled = torch.cat([tokens[:, 0], pooled], dim=-1)
        logits: Tensor = self.linear(pooled)
        return logits

    @property
    def classifier(self) -> nn.Module:
        """The module that makes logits of an image."""
        return _Classifier(self)

    def require_open_blocks(self, *, tokens_move: bool) -> None:
        """Refuse rotary positions where tokens are merged or dropped."""
        if tokens_move and self.is_rotary:
            raise InvalidSpec(
                f"{self.name} is a {self.family.title} with rotary positions, which would have to move with the "
                "tokens; inside a host, CLIP, SigLIP and DINOv2 work, and behind a host this one does too"
            )


class _Classifier(nn.Module):
    def __init__(self, host: TransformersHost) -> None:
        super().__init__()
        self.host = host

    def forward(self, image: Tensor) -> Tensor:
        """Return the host's logits."""
        return self.host.head(self.host.look(image, (), None)[0])


def split_classifier(module: nn.Module) -> tuple[nn.Module, nn.Linear | None]:
    """Return the image tower of a model for classification and its last layer; of a tower itself, and none."""
    linear = getattr(module, "classifier", None)
    for name in ("vision_model", "dinov2", "dinov2_with_registers"):
        if isinstance(linear, nn.Linear) and isinstance(getattr(module, name, None), nn.Module):
            return getattr(module, name), linear
    return module, None


def _same(x: Tensor) -> Tensor:
    return x


def _part(module: nn.Module, *paths: str) -> Any:
    """Return the first of several parts that a module has: releases of transformers name them differently."""
    for path in paths:
        with contextlib.suppress(AttributeError):
            return module.get_submodule(path)
    raise InvalidSpec(
        f"{type(module).__name__} of this transformers has none of {', '.join(paths)}, so edgecomp cannot run it; "
        "releases from 4.51 to 5.23 are known"
    )


def _path(module: nn.Module, part: nn.Module) -> str:
    return str(next(name for name, found in module.named_modules() if found is part))


def one_size(value: Any, field: str, name: str) -> int:
    """Return the side of a square that a configuration states as one number or two."""
    sides = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    if len(sides) != 2 or sides[0] != sides[1] or not isinstance(sides[0], int) or sides[0] < 1:
        raise InvalidSpec(f"{field} of {name} is {value}; hosts take square images in square patches")
    return sides[0]


def _strip(tower: Any, *, keep_norm: bool) -> None:
    """Remove what no token passes."""
    for name in ("head", *(() if keep_norm else ("post_layernorm", "layernorm", "norm"))):
        if getattr(tower, name, None) is not None:
            delattr(tower, name)
    if getattr(tower.embeddings, "mask_token", None) is not None:
        tower.embeddings.mask_token = None


class _Positions(nn.Module):
    """A table of positions of which every row is read, where transformers looks each up by its number."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, ids: Tensor) -> Tensor:  # noqa: ARG002 - all of them, in their order
        """Return the table, (1, P + N, D)."""
        return self.weight.unsqueeze(0)


def _fix_positions(embeddings: Any, size: int, patch: int) -> None:
    """Bring the table of positions to the image size by transformers' own interpolation."""
    is_looked_up = isinstance(getattr(embeddings, "position_embedding", None), nn.Embedding)
    table = embeddings.position_embedding.weight[None] if is_looked_up else embeddings.position_embeddings
    patches, rows = (size // patch) ** 2, table.shape[1]
    prefix = rows - int(rows**0.5) ** 2 if is_looked_up else 1
    with torch.no_grad():
        if rows != prefix + patches:
            told = table.new_zeros(1, prefix + patches, table.shape[-1])
            table = embeddings.interpolate_pos_encoding(told, size, size)
    if is_looked_up:
        embeddings.position_embedding = _Positions(table[0].detach().clone())
        embeddings.image_size = size
    else:
        embeddings.position_embeddings = nn.Parameter(table.detach().clone())
