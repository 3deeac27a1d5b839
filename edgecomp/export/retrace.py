"""The torch model that a bundle was made of, made again, and what each of its modules reads and gives."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from edgecomp.backbones.assemble import Assembly, assemble
from edgecomp.backbones.placed import PlacedModel
from edgecomp.checkpoint import locate
from edgecomp.errors import BundleError, InvalidSpec
from edgecomp.export.golden import run_module
from edgecomp.specs.backbone import is_model_folder
from edgecomp.specs.manifest import Bucket, Manifest
from edgecomp.specs.order import Order
from edgecomp.specs.origin import WeightsOrigin, file_sha256

__all__ = ["Seen", "explain", "reassemble", "rebuild", "trace"]

Array = npt.NDArray[Any]


class Seen(NamedTuple):
    """What a module read and gave."""

    read: Array
    gave: Array


def rebuild(
    manifest: Manifest, bucket: Bucket, *, weights: str, backbone_weights: str, then_weights: str = "random"
) -> PlacedModel:
    """Make the static model of a bucket again, with the weights that the bundle was made with; see `reassemble`."""
    made = reassemble(manifest, bucket, weights=weights, backbone_weights=backbone_weights, then_weights=then_weights)
    return made.models[-1].eval()


def reassemble(
    manifest: Manifest, bucket: Bucket, *, weights: str, backbone_weights: str, then_weights: str = "random"
) -> Assembly:
    """Make the model of a bucket, and the plain one, again, with the weights that the bundle was made with.

    Args:
        weights, backbone_weights: files, where the bundle's came from files; else `random`. Of a host in a folder, the
            folder, with or without weights.
        then_weights: of the second of two methods, likewise.

    Raises:
        InvalidSpec: a file is needed, and another or none was given. BundleError: it was made of Python objects, or
            what comes of its manifest here is another model.
    """
    files = {
        "--weights": (weights, manifest.weights),
        "--backbone-weights": (backbone_weights, manifest.backbone_weights),
        "--then-weights": (then_weights, manifest.then.weights if manifest.then is not None else None),
    }
    if manifest.then is None and then_weights != "random":
        raise InvalidSpec(f"--then-weights {then_weights}: the bundle is of {manifest.method} alone; drop it")
    for option, (given, origin) in files.items():
        _require_same(option, given, origin)
    kept = sorted({one.budget.tokens_out for one in manifest.buckets})
    has_host = manifest.backbone != "none"
    order = Order(
        recipe=manifest.recipe,
        preset=manifest.preset,
        weights=weights,
        **_host_of(manifest, backbone_weights),
        budgets=tuple(map(str, kept)),  # all of them: tables are sized by the largest
        image_size=manifest.image_size if has_host or manifest.placement == "encoder" else 0,
        feature_layer=manifest.feature_layer if manifest.placement == "after" and has_host else 0,
        prefix=manifest.prefix,
        output=manifest.output,
        input_dtype=manifest.input_dtype,  # type: ignore[arg-type]
        router="none",
        then_weights=then_weights,
        seed=manifest.seed,
    )
    assembly = assemble(order)
    made = {
        "--weights": assembly.weights,
        "--backbone-weights": assembly.backbone_weights,
        "--then-weights": assembly.then.weights if assembly.then is not None else None,
    }
    for option, (given, origin) in files.items():
        seen = made[option]
        if origin is not None and seen is not None and seen.sha256 != origin.sha256:
            raise _other(option, given, origin)
    other = {name: value for name, value in manifest.params.items() if assembly.params.get(name) != value}
    if other:
        assembly = assemble(msgspec.structs.replace(order, params=other))
    _require_alike(manifest, assembly)
    return msgspec.structs.replace(assembly, models=(assembly.models[kept.index(bucket.budget.tokens_out)],))


def _require_alike(manifest: Manifest, made: Assembly) -> None:
    """Refuse a model other than the bundle's, whose times and values would be taken for the bundle's."""
    asked = {
        "backbone": (manifest.backbone, made.backbone),
        "image size": (manifest.image_size, made.image_size),
        "prefix tokens": (manifest.num_prefix_tokens, made.num_prefix_tokens),
        "feature layer": (manifest.feature_layer, made.feature_layer),
        "params": (_as_written(manifest.params), _as_written(made.params)),
        "params of the second": tuple(_as_written(one.params) if one else {} for one in (manifest.then, made.then)),
        "parameters": (manifest.parameters, sum(one.numel() for one in made.models[-1].parameters())),
    }
    other = [f"{name} {found}, not {wanted}" for name, (wanted, found) in asked.items() if wanted != found]
    if other:
        raise BundleError(
            f"the model of {manifest.method} that the manifest makes here is not the bundle's: {'; '.join(other)}; "
            "its torch, timm or recipe was another (`edgecomp inspect` shows the versions): export it again here"
        )


def _as_written(params: dict[str, Any]) -> Any:
    """Return parameters as a manifest has them that was read: lists for tuples."""
    return msgspec.json.decode(msgspec.json.encode(params))


def _is_tower(origin: WeightsOrigin | None) -> bool:
    return origin is not None and origin.layout.startswith("transformers")


def _host_of(manifest: Manifest, given: str) -> dict[str, Any]:
    """Return what names the host and its weights: of one that came from a folder, the folder that is given again."""
    origin = manifest.backbone_weights
    if manifest.placement == "encoder" or not _is_tower(origin) or given == "random":
        backbone = "" if manifest.placement == "encoder" else manifest.backbone
        return {"backbone": backbone, "backbone_weights": given}
    assert origin is not None
    path = Path(given)
    folder = path if path.is_dir() else path.parent
    return {"backbone": str(folder), "backbone_weights": "random" if origin.kind == "random" else given}


def _require_same(option: str, given: str, origin: WeightsOrigin | None) -> None:
    """Refuse weights other than the bundle's."""
    if origin is None:
        return
    if origin.kind == "module":
        raise BundleError(
            f"the bundle's weights were handed over in Python ({option}), and cannot be loaded again here; "
            "use --selection --explain, which need none"
        )
    if origin.kind == "file":
        path = Path(given)
        # shards are held to their digest when their tensors have been read
        is_same = path.exists() and (locate(path).is_sharded or file_sha256(locate(path).files[0]) == origin.sha256)
    else:  # a configuration in a folder is held to its digest when it has been read
        is_same = given == origin.kind or (_is_tower(origin) and is_model_folder(given))
    if not is_same:
        raise _other(option, given, origin)


def _other(option: str, given: str, origin: WeightsOrigin) -> InvalidSpec:
    wanted = "FILE" if origin.kind == "file" else origin.kind
    return InvalidSpec(f"the bundle was made with {origin}, and {option} {given} is not that; give {option} {wanted}")


def trace(model: nn.Module, inputs: Sequence[Array]) -> tuple[dict[str, Seen], tuple[Array, ...]]:
    """Run a model and return what each of its modules without parts of its own read and gave, and its outputs.

    Left out are modules that run several times, or take something else than one tensor.
    """
    seen: dict[str, list[Seen]] = {}
    handles = []
    for name, module in model.named_modules():
        if next(module.children(), None) is not None:
            continue

        def note(_: nn.Module, args: Any, result: Any, name: str = name) -> None:
            if len(args) == 1 and isinstance(args[0], torch.Tensor) and isinstance(result, torch.Tensor):
                seen.setdefault(name, []).append(Seen(args[0].numpy().copy(), result.numpy().copy()))

        handles.append(module.register_forward_hook(note))
    try:
        outputs = run_module(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: calls[0] for name, calls in seen.items() if len(calls) == 1}, outputs


def explain(model: nn.Module, module: str, read: Array) -> Array:
    """Return what a module makes of an input, in fp64."""
    part = copy.deepcopy(model.get_submodule(module)).double()
    with torch.inference_mode():
        result: Array = part(torch.from_numpy(read.astype(np.float64))).numpy()
    return result
