"""Image towers of transformers, loaded: from a folder with a config.json, or by a listed name with random weights."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from packaging.version import Version
from torch import Tensor, nn

from edgecomp.backbones.host import HostRequest, no_classifier
from edgecomp.backbones.transformers import FAMILIES, Family, TransformersHost, one_size
from edgecomp.checkpoint import PICKLES
from edgecomp.compressors._checkpoint import Checkpoint, load_exactly, weights_origin
from edgecomp.errors import InvalidSpec, MissingDependency, UnknownName, WeightsError
from edgecomp.specs import Preprocess
from edgecomp.specs.backbone import Backbone, is_model_folder
from edgecomp.specs.origin import WeightsOrigin

__all__ = ["is_tower", "load_tower"]

_ENDINGS = (".safetensors", ".index.json", *PICKLES)
_CLASSIFIER = "classifier."
_RESAMPLING: dict[Any, Literal["bicubic", "bilinear"]] = {2: "bilinear", 3: "bicubic"}
_NAMES_DTYPE = Version("4.56")  # before it the argument was torch_dtype
_OF_FEATURE_MAPS = ("out_features", "out_indices", "stage_names")
#: Parts of whole models that are no part of the image tower: text, what joins both, classifiers.
_FOREIGN = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias", _CLASSIFIER)
_TOGETHER = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}  # image and text in one model
_KNOWN = "CLIP, SigLIP, SigLIP 2 at a fixed resolution, DINOv2 (with or without registers), DINOv3"


def is_tower(name: str, listed: Sequence[Backbone]) -> bool:
    """Say whether a backbone's name is that of a folder, or of a listed model of transformers."""
    return is_model_folder(name) or any(known.name == name and known.library == "transformers" for known in listed)


def load_tower(
    request: HostRequest, *, listed: Sequence[Backbone], say: Callable[[str], None]
) -> tuple[TransformersHost, WeightsOrigin]:
    """Make an image tower of transformers.

    Args:
        request: of a folder with a config.json, with or without weights, or of a name in `listed`.
        listed: models with their configurations.
        say: is told what a user should know of the weights.

    Raises:
        InvalidSpec: it is no tower that is known, or the size does not fit; WeightsError: weights do not fit.
    """
    name, weights, state = request.name, request.weights, request.state
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
        state = _read_state(Path(source), title, say, keep_head=request.keep_head)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(request.seed)
        tower = {key: value for key, value in state.items() if not key.startswith(_CLASSIFIER)} if state else None
        model = _build(config, tower, title)
        linear = _make_linear(values, config, state, title) if request.keep_head else None
    layout = f"transformers {config.model_type}"
    if state is not None:
        origin = weights_origin(Path(source or weights), state, layout=layout)
    else:
        told = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        origin = WeightsOrigin(kind="random", sha256=told, layout=layout, seed=request.seed)
    size = request.image_size or one_size(config.image_size, "image_size", title)
    preprocess = _read_preprocess(folder, size, FAMILIES[config.model_type], say) if has_folder else None
    host = TransformersHost(
        model.to(torch.get_default_dtype()).eval(),
        name=title,
        feature_layer=request.feature_layer,
        levels=request.levels,
        image_size=request.image_size,
        preprocess=preprocess,
        linear=linear.to(torch.get_default_dtype()).eval() if linear is not None else None,
    )
    return host, origin


def _make_linear(values: Mapping[str, Any], config: Any, state: Mapping[str, Tensor] | None, title: str) -> nn.Linear:
    """Return the last layer of a model for image classification."""
    if state is None:
        kinds = values.get("architectures") or [""]
        if not str(kinds[0]).endswith("ForImageClassification"):
            raise no_classifier(title)
        joined = 2 if values["model_type"].startswith("dinov2") else 1
        return nn.Linear(joined * int(config.hidden_size), len(values.get("id2label", ())) or 2)
    if f"{_CLASSIFIER}weight" not in state:
        raise no_classifier(title)
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
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidSpec(f"{path} cannot be read as JSON ({error}); copy it again") from None


def _make_config(values: dict[str, Any], title: str) -> Any:
    """Return the configuration of the image tower."""
    try:
        import transformers
    except ImportError as error:
        raise MissingDependency("transformers", needed_for=f"the backbone {title}", extra="cpu") from error

    kind = values["model_type"]
    if kind in _TOGETHER:
        tower = values.get("vision_config", {})
        if not isinstance(tower, dict):
            raise InvalidSpec(f"vision_config of {title} is {str(tower)[:40]}, no configuration; copy it again")
        values = {**tower, "model_type": _TOGETHER[kind]}
        kind = values["model_type"]
    if kind in ("siglip2", "siglip2_vision_model"):
        raise InvalidSpec(
            f"{title} is a SigLIP 2 of variable resolution (model_type {kind}), which takes patches and masks instead "
            "of an image; those of a fixed resolution are saved as model_type siglip, and work"
        )
    if kind not in FAMILIES:
        raise UnknownName(f"model_type of {title}", kind, (*FAMILIES, *_TOGETHER), hint=f"These are {_KNOWN}.")
    if not hasattr(transformers, FAMILIES[kind].config):
        raise InvalidSpec(
            f"{title} is a {FAMILIES[kind].title}, which transformers {transformers.__version__} does not have; "
            "install a newer one"
        )
    try:
        own = {key: value for key, value in values.items() if key not in _OF_FEATURE_MAPS}
        config = getattr(transformers, FAMILIES[kind].config).from_dict(own)
        width, heads = int(config.hidden_size), int(config.num_attention_heads)
    except Exception as error:  # noqa: BLE001 - a wrong value can raise anything there
        raise InvalidSpec(f"the configuration of {title} is refused by transformers: {_first_line(error)}") from None
    for field in ("image_size", "patch_size"):
        one_size(getattr(config, field), field, title)
    if getattr(config, "num_channels", 3) != 3:
        raise InvalidSpec(f"num_channels={config.num_channels} of {title}: hosts take RGB images, of 3 channels")
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

    cls: Any = getattr(transformers, FAMILIES[config.model_type].tower)
    try:
        if state is None:
            made: nn.Module = cls(config)
            return made
        with _quiet_transformers():
            words: dict[str, Any] = {"config": copy.deepcopy(config), "output_loading_info": True}
            words["ignore_mismatched_sizes"] = True  # they are listed below
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


def _read_preprocess(folder: Path, size: int, family: Family, say: Callable[[str], None]) -> Preprocess | None:
    """Return how the folder's own processor prepares images, where it says so.

    Args:
        size: side of the square that the tower takes.
        say: is told where the processor makes another.

    Raises:
        InvalidSpec: it prepares them in a way that is not known here.
    """
    path = folder / "preprocessor_config.json"
    told = _read_json(path) if path.is_file() else None
    if told is None and (folder / "processor_config.json").is_file():
        path = folder / "processor_config.json"  # of newer releases: text and image in one
        whole = _read_json(path)
        told = whole.get("image_processor") if isinstance(whole, dict) else whole
    if told is None:
        return None
    if not isinstance(told, dict):
        raise InvalidSpec(f"{path} holds {str(told)[:40]!r}, not how images are prepared; copy it again, or remove it")
    mean, std = (_triple(told, key, default, path) for key, default in zip(
        ("image_mean", "image_std"), family.statistics, strict=True
    ))  # fmt: skip
    if not told.get("do_normalize", True):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if min(std) <= 0:
        raise _not_known(path, "image_std", list(std))
    factor = told.get("rescale_factor", 1 / 255)
    if not told.get("do_rescale", True) or not isinstance(factor, float) or not math.isclose(factor, 1 / 255):
        raise _not_known(path, "rescale_factor", factor if told.get("do_rescale", True) else 1)
    if not told.get("do_resize", True) or told.get("resample", 3) not in _RESAMPLING:
        raise _not_known(path, "resample", told.get("resample", 3) if told.get("do_resize", True) else None)
    given = told.get("size", told.get("crop_size"))
    resized, stretches = _side(given, path, "size")
    cropped = _side(told.get("crop_size"), path, "crop_size")[0] if told.get("do_center_crop") else 0
    if cropped > resized > 0:
        raise _not_known(path, "crop_size", cropped)
    stretches = family.stretches if given is None else stretches
    if not cropped and not stretches and told.get("do_center_crop") is False:
        raise _not_known(path, "do_center_crop", False)
    crop = cropped / resized if cropped and resized else 1.0
    while resized and math.floor((cropped or resized) / crop) < resized:
        crop = math.nextafter(crop, 0.0)
    made = cropped or resized
    if made not in (0, size):
        say(f"{path.name} of the backbone makes squares of {made} pixels, and {size} are taken here (--image-size)")
    return Preprocess(size, crop, _RESAMPLING[told.get("resample", 3)], mean, std, stretches, centre="down")


def _not_known(path: Path, key: str, value: Any) -> InvalidSpec:
    return InvalidSpec(
        f"{path} prepares images by {key}={str(value)[:60]}, which edgecomp does not: it resizes bicubic (3) or "
        "bilinear (2) to a square, divides by 255, and takes finite means and deviations above 0; correct the file, or "
        "remove it for the family's own way"
    )


def _triple(
    told: Mapping[str, Any], key: str, default: tuple[float, float, float], path: Path
) -> tuple[float, float, float]:
    value = told.get(key)
    if value is None:
        return default
    is_triple = isinstance(value, list) and len(value) == 3
    if not is_triple or not all(isinstance(one, (int, float)) and math.isfinite(one) for one in value):
        raise _not_known(path, key, value)
    return float(value[0]), float(value[1]), float(value[2])


def _side(value: Any, path: Path, key: str) -> tuple[int, bool]:
    """Return the side that images are resized or cropped to (0: not said), and whether both sides are named."""
    named = value if isinstance(value, dict) else {}
    one = named.get("shortest_edge", named.get("height")) if named else value
    both = "height" in named and not named.get("shortest_edge")
    if value is not None and (not isinstance(one, int) or one < 1 or (both and named.get("width") != one)):
        raise _not_known(path, key, value)
    return one or 0, both
