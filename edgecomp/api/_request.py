"""What `edgecomp export` is asked for: the arguments as an order, held to their ranges, and its digest."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgecomp import __version__
from edgecomp.checkpoint import locate, path_digest
from edgecomp.errors import InvalidSpec, UnknownName, WeightsError
from edgecomp.resources import source_digest
from edgecomp.specs import Recipe, load_recipe, method_names
from edgecomp.specs.backbone import is_model_folder
from edgecomp.specs.order import Order
from edgecomp.specs.precision import PrecisionPlan
from edgecomp.specs.recipe import Then, followed_by
from edgecomp.specs.router import router_names

if TYPE_CHECKING:
    from edgecomp.compressors._base import Compressor

__all__ = [
    "CALIBRATION_IMAGES",
    "asked_then",
    "default_folder",
    "read_order",
    "request_digest",
    "require_calibration",
    "require_in_range",
    "tools",
]

_TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript", "timm", "numpy")
_ALIGNMENTS = (1, 8, 16, 32)
CALIBRATION_IMAGES = 64  # at most, where no number is given


def read_order(
    method: Any, recipe: str | Path, preset: str, backbone: Any, weights: str | Path, backbone_weights: str | Path,
    budget: str | int | Sequence[str | int], align: int, image_size: int, feature_layer: int, output: str,
    input_dtype: str, params: Mapping[str, Any] | None, stem: bool, router: str,
    router_params: Mapping[str, Any] | None, router_weights: str | Path, pad_to: int, seed: int, prefix: str = "",
    *, then: Then | None = None, then_weights: str | Path = "random",
) -> Order:  # fmt: skip
    """Turn the arguments into an order, loading the recipe; torch is not needed yet for names."""
    if isinstance(method, str) and bool(method) == bool(str(recipe)):
        raise InvalidSpec("give either a method or a recipe file: --method NAME or --recipe FILE")
    if input_dtype not in ("", "float32", "uint8"):
        raise UnknownName("input dtype", input_dtype, ("float32", "uint8"))
    if prefix not in ("", "drop", "keep"):
        raise UnknownName("fate of prefix tokens", prefix, ("drop", "keep"))
    if str(recipe) and Path(recipe).suffix != ".toml":
        raise InvalidSpec(f"--recipe {recipe} does not end in .toml; a method's name is given with --method")
    compressor = None if isinstance(method, str) else method
    named = str(recipe) or (method if isinstance(method, str) else _method_of(method))
    loaded = load_recipe(named)
    if then is not None and loaded.then is not None:
        raise InvalidSpec(
            f"{loaded.method} then {loaded.then.method}, as its recipe says, then {then.method}: two methods stand in "
            "a row, not three; drop --then, or the recipe's table [then]"
        )
    then = then or loaded.then
    if then is not None:
        loaded = followed_by(loaded, then)
    elif str(then_weights) != "random":
        raise InvalidSpec(f"--then-weights {then_weights}: there is one method; name the second with --then")
    host = _host_of(loaded, preset, compressor, backbone)
    weights, backbone_weights = _weights_of(loaded, compressor, host, weights, backbone_weights)
    if isinstance(backbone, str) and preset:
        loaded.preset(preset)
    if router and router not in (*router_names(), "none"):
        raise UnknownName("router", router, (*router_names(), "none"))
    if (router or loaded.defaults.router or "none") == "none" and (router_params or str(router_weights) != "random"):
        raise InvalidSpec(
            "parameters or weights of a router were given, and no router; give --router NAME, or drop them"
        )
    files = {"--weights": weights, "--backbone-weights": backbone_weights, "--router-weights": router_weights}
    files["--then-weights"] = then_weights
    for option, path in files.items():
        if option == "--backbone-weights" and is_model_folder(host) and str(path) == "":
            continue
        if str(path) not in ("random", "pretrained"):
            if not Path(path).exists():
                raise WeightsError(f"weights file {path} is not there; check the path, or use {option} random")
            locate(Path(path))
    if str(weights) == "pretrained":
        raise InvalidSpec(
            "--weights pretrained: compressors have no download; give a file, "
            "or --backbone-weights pretrained for the host"
        )
    return Order(
        recipe=loaded,
        preset=preset,
        backbone=backbone,
        compressor=compressor,
        weights=str(weights),
        backbone_weights=str(backbone_weights),
        align=align,
        budgets=(str(budget),) if isinstance(budget, (str, int)) else tuple(map(str, budget)),
        image_size=image_size,
        feature_layer=feature_layer,
        prefix=prefix,  # type: ignore[arg-type]
        output=output,
        input_dtype=input_dtype or loaded.defaults.input_dtype,  # type: ignore[arg-type]
        params=dict(params or {}),
        stem=stem,
        router=router,
        router_params=dict(router_params or {}),
        router_weights=str(router_weights),
        pad_to=pad_to,
        then_weights=str(then_weights),
        seed=seed,
    )


def asked_then(method: str, preset: str, params: Mapping[str, Any] | None, between: int) -> Then | None:
    """Return the second method that was asked for, or none."""
    if method:
        if between < 0:
            raise InvalidSpec(f"--between {between} is below 0; give the tokens that the first method hands over")
        if method not in method_names():
            raise UnknownName("method", method, method_names())
        return Then(method, preset, dict(params or {}), between)
    given = {"--then-preset": preset, "--set then.NAME=VALUE": params, "--between": between}
    if words := [option for option, value in given.items() if value]:
        raise InvalidSpec(f"{', '.join(words)}: there is one method; name the second with --then METHOD")
    return None


def _host_of(recipe: Recipe, preset: str, compressor: Any, backbone: Any) -> Any:
    """Return the host that was asked for, or the recipe's; a module stands alone unless a host is named."""
    if backbone or compressor is not None:
        return backbone
    return recipe.preset(preset or recipe.defaults.preset).backbone or recipe.defaults.backbone


def _weights_of(
    recipe: Recipe, compressor: Any, host: Any, weights: str | Path, backbone_weights: str | Path
) -> tuple[str | Path, str | Path]:
    """Return the weights that were asked for, or the recipe's; a module or a folder of the user's brings its own."""
    own = recipe.defaults.weights if compressor is None else "random"
    of_host = recipe.defaults.backbone_weights if isinstance(host, str) and host != "none" else "random"
    if not is_model_folder(host):
        of_host = of_host or "random"
    return weights if str(weights) else own, backbone_weights if str(backbone_weights) else of_host


def _method_of(compressor: Compressor) -> str:
    """Return the name of the method whose class made a compressor."""
    from edgecomp.compressors import compressor_class

    for name in method_names():
        if compressor_class(name) is type(compressor):
            return name
    raise InvalidSpec(
        f"{type(compressor).__name__} is no known method's class; give its recipe with recipe=FILE. "
        f"Known methods: {', '.join(method_names())}"
    )


def require_in_range(order: Order, batches: Sequence[int]) -> None:
    if order.align not in _ALIGNMENTS:
        raise InvalidSpec(f"--align {order.align} is none of {', '.join(map(str, _ALIGNMENTS))}")
    for size in batches:
        if not 1 <= size <= 4096:
            raise InvalidSpec(f"batch {size} is not between 1 and 4096")
    if len(set(batches)) != len(batches):
        raise InvalidSpec(f"batches {', '.join(map(str, batches))}: one of them stands there twice; give each once")
    if order.pad_to < 0:
        raise InvalidSpec(f"pad_to={order.pad_to} is below 0; give the rows that every bucket is to have")
    if order.image_size and not 1 <= order.image_size <= 8192:
        raise InvalidSpec(f"image size {order.image_size} is not between 1 and 8192 pixels")
    if not 0 <= order.seed < 1 << 63:
        raise InvalidSpec(f"seed {order.seed} is not between 0 and 2^63 - 1")


def require_calibration(plan: PrecisionPlan, calibration: str | Path, images: int) -> None:
    """Refuse images that nothing would read, and a number of none, before torch is loaded."""
    if images < 0:
        raise InvalidSpec(f"--calibration-images {images} is below 1; {CALIBRATION_IMAGES} is the default")
    given = f"--calibration {calibration}" if str(calibration) else f"--calibration-images {images}" if images else ""
    if given and not plan.needs_samples:
        raise InvalidSpec(f"{given}: {plan.word} takes nothing from images; drop it, or ask for fp16, int8 or fp8")
    if images and not str(calibration):
        raise InvalidSpec(
            f"{given}: there is no folder to read so many of; give it with --calibration DIR, or drop it, and seeded "
            "inputs and the shipped photograph serve"
        )
    if str(calibration) and not Path(calibration).is_dir():
        raise InvalidSpec(f"--calibration {calibration} is not a folder; give one with images")


def default_folder(order: Order) -> Path:
    """Return `<method>-<preset or backbone>` in the current folder, with the image size where it was chosen."""
    recipe = order.recipe
    backbone = order.backbone if isinstance(order.backbone, str) else type(order.backbone).__name__
    backbone = Path(backbone).resolve().name if is_model_folder(backbone) else backbone.rpartition("/")[2]
    part = order.preset or {"none": "tokens"}.get(backbone, backbone) or recipe.defaults.preset
    preset = recipe.preset(order.preset or recipe.defaults.preset)
    is_encoder = not backbone and preset.placement == "encoder"
    size = order.image_size or (preset.image_size or recipe.defaults.image_size if is_encoder else 0)
    method = f"{recipe.method}-then-{recipe.then.method}" if recipe.then is not None else recipe.method
    return Path(f"{method}-{part}" + (f"-{size}" if size else ""))


def request_digest(
    order: Order,
    plan: PrecisionPlan,
    opset: int,
    batches: Sequence[int],
    with_plain: bool,
    calibration: str | Path,
    calibration_images: int,
) -> str:
    """Return the sha256 of everything that decides what is exported: the request, files, versions, edgecomp's code."""
    files = {
        path: path_digest(Path(path))
        for path in (order.weights, order.backbone_weights, order.router_weights, order.then_weights)
        if path not in ("", "random", "pretrained")
    }
    host = _host_of(order.recipe, order.preset, order.compressor, order.backbone)
    folders = [_folder_digest(host)] if is_model_folder(host) else []
    modules = [_module_digest(item) for item in (order.backbone, order.compressor) if not isinstance(item, str)]
    asked = {
        "recipe": msgspec.to_builtins(order.recipe),
        "preset": order.preset,
        "backbone": order.backbone if isinstance(order.backbone, str) else "",
        "modules": modules,
        "folders": folders,
        "weights": files.get(order.weights, order.weights),
        "backbone_weights": files.get(order.backbone_weights, order.backbone_weights),
        "budgets": order.budgets,
        "align": order.align,
        "image_size": order.image_size,
        "feature_layer": order.feature_layer,
        "prefix": order.prefix,
        "output": order.output,
        "input_dtype": order.input_dtype,
        "params": order.params,
        "stem": order.stem,
        "router": [order.router, order.router_params, files.get(order.router_weights, order.router_weights)],
        "pad_to": order.pad_to,
        "then_weights": files.get(order.then_weights, order.then_weights),
        "seed": order.seed,
        "precision": msgspec.to_builtins(plan),
        "opset": opset,
        "calibration": [_folder_digest(calibration), calibration_images],
        "batches": batches,
        "with_plain": with_plain,
        "tools": tools("transformers"),
        "edgecomp": source_digest(),
    }
    return hashlib.sha256(msgspec.json.encode(asked, order="sorted")).hexdigest()


def _folder_digest(folder: str | Path) -> str:
    """Return what names, sizes and times of a folder's files say; nothing of an empty name."""
    if not str(folder):
        return ""
    files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
    told = [f"{file.relative_to(folder)} {(seen := file.stat()).st_size} {seen.st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def _module_digest(module: Any) -> str:
    if module is None:
        return ""
    from edgecomp.compressors._base import Compressor
    from edgecomp.compressors._checkpoint import state_digest

    form = ""  # of a compressor: what neither its weights nor its parts tell
    if isinstance(module, Compressor):
        form = f"{module.preset} {module.params} {module.site} {module.budget} {module.output}"
    return f"{type(module).__qualname__} {module!r} {form} {state_digest(module.state_dict())}"


def tools(*others: str) -> dict[str, str]:
    found = {"edgecomp": __version__}
    for name in (*_TOOLS, *others):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
