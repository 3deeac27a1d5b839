"""Image towers of transformers as hosts: from a folder with a config.json, or by a listed name with random weights."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from packaging.version import Version
from torch import Tensor, nn

from edgecomp.backbones.attention import SplitAttention
from edgecomp.backbones.host import Host, HostBlock, require_layers
from edgecomp.checkpoint import PICKLES
from edgecomp.compressors._checkpoint import Checkpoint, load_exactly, weights_origin
from edgecomp.errors import InvalidSpec, MissingDependency, UnknownName, WeightsError
from edgecomp.specs import Preprocess
from edgecomp.specs.backbone import Backbone, is_model_folder
from edgecomp.specs.origin import WeightsOrigin

__all__ = ["TransformersHost", "is_tower", "load_tower", "split_classifier"]

_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_ENDINGS = (".safetensors", ".index.json", *PICKLES)
_CLASSIFIER = "classifier."
_NAMES_DTYPE = Version("4.56")  # before it the argument was torch_dtype
_OF_FEATURE_MAPS = ("out_features", "out_indices", "stage_names")
#: Parts of whole models that are no part of the image tower: text, what joins both, classifiers.
_FOREIGN = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias", _CLASSIFIER)


class _Family(NamedTuple):
    """What differs between the towers.

    Attributes:
        title: as lists of hosts say it.
        tower: name of transformers' class.
        config: name of its configuration's class.
        statistics: mean and deviation of its images.
        class_tokens: 1 where there is one.
    """

    title: str
    tower: str
    config: str
    statistics: tuple[tuple[float, float, float], tuple[float, float, float]]
    class_tokens: int


_FAMILIES = {
    "clip_vision_model": _Family("CLIP", "CLIPVisionModel", "CLIPVisionConfig", _CLIP, 1),
    "siglip_vision_model": _Family("SigLIP and SigLIP 2", "SiglipVisionModel", "SiglipVisionConfig", _HALF, 0),
    "dinov2": _Family("DINOv2", "Dinov2Model", "Dinov2Config", _IMAGENET, 1),
    "dinov2_with_registers": _Family(
        "DINOv2 with registers", "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", _IMAGENET, 1
    ),
    "dinov3_vit": _Family("DINOv3", "DINOv3ViTModel", "DINOv3ViTConfig", _IMAGENET, 1),
}
_TOGETHER = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}  # image and text in one model
_KNOWN = "CLIP, SigLIP, SigLIP 2 at a fixed resolution, DINOv2 (with or without registers), DINOv3"


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
        family = _FAMILIES.get(getattr(config, "model_type", ""))
        if family is None or type(model).__name__ != family.tower:
            towers = ", ".join(known.tower for known in _FAMILIES.values())
            raise InvalidSpec(
                f"backbone {name!r} is a {type(model).__name__} of transformers; hosts of transformers are {towers}"
            )
        tower: Any = getattr(model, "vision_model", model)
        self.family = family
        self._size, self._heads = int(config.hidden_size), int(config.num_attention_heads)
        self._patch = _one_size(config.patch_size, "patch_size", name)
        self.image_size = image_size or _one_size(config.image_size, "image_size", name)
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
        self.preprocess = preprocess or Preprocess(self.image_size, 1.0, "bicubic", mean, std)
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
            raise _no_classifier(self.name)
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


def _no_classifier(name: str) -> InvalidSpec:
    return InvalidSpec(f"{name} has no classifier, so --output logits has nothing to give; use --output tokens")


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


def _one_size(value: Any, field: str, name: str) -> int:
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


# -- finding and loading ----------------------------------------------------------------------------------------


def is_tower(name: str, listed: Sequence[Backbone]) -> bool:
    """Say whether a backbone's name is that of a folder, or of a listed model of transformers."""
    return is_model_folder(name) or any(known.name == name and known.library == "transformers" for known in listed)


def load_tower(
    name: str,
    *,
    listed: Sequence[Backbone],
    weights: str,
    state: Mapping[str, Tensor] | None,
    image_size: int,
    feature_layer: int,
    levels: Sequence[int] = (),
    keep_head: bool = False,
    seed: int,
    say: Callable[[str], None],
) -> tuple[TransformersHost, WeightsOrigin]:
    """Make an image tower of transformers.

    Args:
        name: a folder with a config.json, with or without weights, or a name in `listed`.
        listed: models with their configurations.
        weights: `random`, a file or a folder in transformers' layout of that model; "": the folder's own, random
            where it has none.
        state: tensors to load instead.
        image_size, feature_layer, levels: see `TransformersHost`.
        keep_head: whether logits are asked: of a model for image classification.
        seed: of random weights.
        say: is told what a user should know of the weights.

    Raises:
        InvalidSpec: it is no tower that is known, or the size does not fit; WeightsError: weights do not fit.
    """
    folder, has_folder = Path(name), is_model_folder(name)
    title = folder.resolve().name if has_folder else name
    if weights == "pretrained":
        raise InvalidSpec(
            f"--backbone-weights pretrained: models of transformers have no download here; bring the folder of {title} "
            "(config.json and its weights) to this machine and give --backbone FOLDER"
        )
    values = _read_config(folder) if has_folder else _listed_config(name, listed)
    config = _make_config(values, title)
    source = "" if weights == "random" else weights or (name if has_folder and _holds_weights(folder) else "")
    if not weights and not source:
        say(f"folder {title} holds a configuration and no weights: they are random")
    if state is None and source:
        state = _read_state(Path(source), title, say, keep_head=keep_head)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = {key: value for key, value in state.items() if not key.startswith(_CLASSIFIER)} if state else None
        model = _build(config, tower, title)
        linear = _make_linear(values, state, title) if keep_head else None
    layout = f"transformers {config.model_type}"
    if state is not None:
        origin = weights_origin(Path(source or weights), state, layout=layout)
    else:
        told = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        origin = WeightsOrigin(kind="random", sha256=told, layout=layout, seed=seed)
    size = image_size or _one_size(config.image_size, "image_size", title)
    preprocess = _read_preprocess(folder, size, _FAMILIES[config.model_type]) if has_folder else None
    host = TransformersHost(
        model.to(torch.get_default_dtype()).eval(),
        name=title,
        feature_layer=feature_layer,
        levels=levels,
        image_size=image_size,
        preprocess=preprocess,
        linear=linear.to(torch.get_default_dtype()).eval() if linear is not None else None,
    )
    return host, origin


def _make_linear(values: Mapping[str, Any], state: Mapping[str, Tensor] | None, title: str) -> nn.Linear:
    """Return the last layer of a model for image classification."""
    if state is None:
        kinds = values.get("architectures") or [""]
        if not str(kinds[0]).endswith("ForImageClassification"):
            raise _no_classifier(title)
        joined = 2 if values["model_type"].startswith("dinov2") else 1
        width = values.get("vision_config", values)["hidden_size"]
        return nn.Linear(joined * width, len(values.get("id2label", ())) or 2)
    if f"{_CLASSIFIER}weight" not in state:
        raise _no_classifier(title)
    weight = state[f"{_CLASSIFIER}weight"]
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    own = {key.removeprefix(_CLASSIFIER): value for key, value in state.items() if key.startswith(_CLASSIFIER)}
    load_exactly(linear, own, layout=f"classifier of {title}")
    return linear


def _listed_config(name: str, listed: Sequence[Backbone]) -> dict[str, Any]:
    return dict(next(known.config for known in listed if known.name == name))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise InvalidSpec(
            f"backbone folder {folder} has no config.json; give a folder that transformers saved (save_pretrained)"
        )
    values = _read_json(path)
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise InvalidSpec(f"{path} names no model_type, so it is no configuration of transformers; check the folder")
    return values


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidSpec(f"{path} cannot be read as JSON ({error}); copy it again") from None


def _make_config(values: dict[str, Any], title: str) -> Any:
    """Return the configuration of the image tower."""
    try:
        import transformers
    except ImportError as error:
        raise MissingDependency("transformers", needed_for=f"the backbone {title}", extra="cpu") from error

    kind = values["model_type"]
    if kind in _TOGETHER:
        values = {**values.get("vision_config", {}), "model_type": _TOGETHER[kind]}
        kind = values["model_type"]
    if kind in ("siglip2", "siglip2_vision_model"):
        raise InvalidSpec(
            f"{title} is a SigLIP 2 of variable resolution (model_type {kind}), which takes patches and masks instead "
            "of an image; those of a fixed resolution are saved as model_type siglip, and work"
        )
    if kind not in _FAMILIES:
        raise UnknownName(f"model_type of {title}", kind, (*_FAMILIES, *_TOGETHER), hint=f"These are {_KNOWN}.")
    if not hasattr(transformers, _FAMILIES[kind].config):
        raise InvalidSpec(
            f"{title} is a {_FAMILIES[kind].title}, which transformers {transformers.__version__} does not have; "
            "install a newer one"
        )
    try:
        own = {key: value for key, value in values.items() if key not in _OF_FEATURE_MAPS}
        config = getattr(transformers, _FAMILIES[kind].config).from_dict(own)
        width, heads = int(config.hidden_size), int(config.num_attention_heads)
    except Exception as error:  # noqa: BLE001 - a wrong value can raise anything there
        raise InvalidSpec(f"the configuration of {title} is refused by transformers: {_first_line(error)}") from None
    for field in ("image_size", "patch_size"):
        _one_size(getattr(config, field), field, title)
    if heads < 1 or width % heads:
        raise InvalidSpec(f"hidden_size={width} of {title} is no multiple of num_attention_heads={heads}")
    return config


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__


def _holds_weights(folder: Path) -> bool:
    return any(file.name.endswith(_ENDINGS) for file in folder.iterdir())


def _read_state(path: Path, title: str, say: Callable[[str], None], *, keep_head: bool) -> dict[str, Tensor]:
    """Read what may be of an image tower; other parts of a whole model are counted, and not read."""
    checkpoint = Checkpoint(path)
    foreign_parts = tuple(part for part in _FOREIGN if not (keep_head and part == _CLASSIFIER))
    own = {name: name for name in checkpoint.stored.names if not name.startswith(foreign_parts)}
    foreign = len(checkpoint.stored.names) - len(own)
    if foreign:
        say(f"left unread in the weights of {title}: {foreign} tensors that are no part of the image tower")
    return checkpoint.read(own, say=say)


def _build(config: Any, state: Mapping[str, Tensor] | None, title: str) -> nn.Module:
    """Make the tower; with tensors, by transformers' own reading of older and newer names."""
    import transformers

    cls: Any = getattr(transformers, _FAMILIES[config.model_type].tower)
    try:
        if state is None:
            made: nn.Module = cls(config)
            return made
        with _quiet_transformers():
            words: dict[str, Any] = {"config": copy.deepcopy(config), "output_loading_info": True}
            words["torch_dtype" if Version(transformers.__version__) < _NAMES_DTYPE else "dtype"] = torch.float32
            model, told = cls.from_pretrained(None, state_dict=dict(state), **words)
    except Exception as error:  # noqa: BLE001 - likewise, of a wrong tensor too
        if state is None:
            raise InvalidSpec(f"{title} cannot be built by transformers: {_first_line(error)}") from None
        raise WeightsError(f"weights do not fit {title}: {_first_line(error)}") from None
    problems = {
        what: sorted(map(str, told.get(key, ())))
        for what, key in (
            ("missing", "missing_keys"),
            ("of another shape", "mismatched_keys"),
            ("not known", "unexpected_keys"),
        )
    }
    stated = [f"{len(keys)} {what}: {', '.join(keys[:8])}" for what, keys in problems.items() if keys]
    if stated:
        raise WeightsError(
            f"weights do not fit {title} ({config.model_type}). {'; '.join(stated)}. First keys of the weights: "
            f"{', '.join(list(state)[:5])}"
        )
    fitted: nn.Module = model
    return fitted


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers from writing to the terminal: what there is to say of weights is said here."""
    from transformers.utils import logging as talk

    logging: Any = talk
    level, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bar:
            logging.enable_progress_bar()


def _read_preprocess(folder: Path, size: int, family: _Family) -> Preprocess | None:
    """Return how the folder's own processor prepares images, where it says so."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return None
    told = _read_json(path)
    mean, std = (_triple(told.get(key), default) for key, default in zip(
        ("image_mean", "image_std"), family.statistics, strict=True
    ))  # fmt: skip
    interpolation: Literal["bicubic", "bilinear"] = "bilinear" if told.get("resample", 3) == 2 else "bicubic"
    resized, cropped = _side(told.get("size")), _side(told.get("crop_size"))
    crops = told.get("do_center_crop", False) and resized and cropped and cropped <= resized
    return Preprocess(size, cropped / resized if crops else 1.0, interpolation, mean, std)


def _triple(value: Any, default: tuple[float, float, float]) -> tuple[float, float, float]:
    if isinstance(value, list) and len(value) == 3 and all(isinstance(one, (int, float)) for one in value):
        return float(value[0]), float(value[1]), float(value[2])
    return default


def _side(value: Any) -> int:
    if isinstance(value, dict):
        value = value.get("shortest_edge") or value.get("height") or 0
    return value if isinstance(value, int) else 0
