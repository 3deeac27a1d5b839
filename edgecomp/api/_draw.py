"""`edgecomp run --draw`: what became of an image's patches, layer by layer, as a picture."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edgecomp.api._forced import forced_graph
from edgecomp.api._progress import Progress, silent
from edgecomp.bundle import Bundle, open_bundle
from edgecomp.errors import InvalidSpec, MissingDependency
from edgecomp.files import write_whole
from edgecomp.images import read_image, to_pixels
from edgecomp.inputs import read_tensors, require_inputs
from edgecomp.parity.forced import Recorded, own_choices
from edgecomp.patches import Picture, join_layers, to_rgb
from edgecomp.resources import photograph_path
from edgecomp.runners import Array
from edgecomp.runners.chain import open_graph
from edgecomp.serving import Model
from edgecomp.serving.parts import kind_of, lay_out
from edgecomp.specs import TensorSpec
from edgecomp.specs.choice import ChoiceNode
from edgecomp.specs.manifest import Bucket

__all__ = ["draw", "picture_of", "require_drawable", "require_one_image", "write_picture"]

_SUFFIXES = (".png", ".svg", ".html")
_IMAGE_RANK = 4
_ENGINES = ("tensorrt", "rtx")
_TENSOR_FILES = (".safetensors", ".npz")


def draw(
    bundle: str | Path,
    image: str | Path = "",
    *,
    text: str | None = None,
    text_features: str | Path = "",
    budget: str | int | None = None,
    runner: str = "onnxruntime",
    threads: int = 0,
    progress: Progress = silent,
) -> Picture:
    """Return what became of the patches of an image in a bundle; `edgecomp.report.pictures` draws it.

    Args:
        bundle, image, text, text_features, budget, runner, threads, progress: as in `run`.

    Raises:
        InvalidSpec: the bundle takes no single image.
    """
    opened = open_bundle(Path(bundle))
    require_drawable(opened, batch=None)
    path = Path(image) if str(image) else photograph_path()
    features = read_tensors(text_features) if str(text_features) else None
    with Model(opened, runner=runner, threads=threads, resident=1) as model:
        inputs = _inputs(opened, opened.select(batch=1)[0], path, features)
        answer = model(inputs, text, budget=budget)
    (bucket,) = opened.select(budget=answer.budget, batch=1)
    return picture_of(
        opened, bucket, path, answer.outputs, features=features, runner=runner, threads=threads, progress=progress
    )


def require_drawable(opened: Bundle, *, batch: int | None, drawing: str | Path = "") -> None:
    """Refuse what has no picture before anything is run.

    Args:
        batch: that was asked for; none: the smallest.
        drawing: the file that is to be written; "": none.
    """
    first = opened.manifest.buckets[0].inputs[0]
    if str(drawing) and Path(drawing).suffix.lower() not in _SUFFIXES:
        raise InvalidSpec(f"--draw {drawing} must end in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}")
    if str(drawing) and opened.path.resolve() in Path(drawing).resolve().parents:
        raise InvalidSpec(f"--draw {drawing} lies in the bundle, which would no longer be whole; choose another place")
    if first.kind != "image":
        raise InvalidSpec(
            f"--draw: {opened.path} takes {first}, and there is no image to draw on; export it with a --backbone"
        )
    if kind_of(opened) == "slices":
        raise InvalidSpec(f"--draw shows one image as its encoder sees it, and {opened.path} takes slices; drop --draw")
    if len(first.shape) != _IMAGE_RANK:
        raise InvalidSpec(f"--draw shows one image, and {opened.path} takes several at once, {first}; drop --draw")
    smallest = min(bucket.batch for bucket in opened.manifest.buckets)
    if (batch or smallest) > 1:
        advice = "leave --batch out" if smallest == 1 else "export the bundle with --batch 1 as well"
        raise InvalidSpec(f"--draw shows one image, and batch {batch or smallest} takes more; {advice}")


def require_one_image(bucket: Bucket) -> None:
    """Refuse a bucket that reads more than one image: tiles beside the page, or strips of a text."""
    first, *others = bucket.inputs
    if first.kind == "image" and others and others[0].kind == "image":
        raise InvalidSpec(f"--draw shows one image, and {bucket.model} takes tiles beside it, {others[0]}; drop --draw")
    if [spec.name for spec in others] == ["patch_mask"]:
        raise InvalidSpec("--draw shows what became of an image, and this one is rendered of a text; drop --draw")


def picture_of(
    opened: Bundle,
    bucket: Bucket,
    path: Path,
    outputs: Mapping[str, Array],
    *,
    features: Mapping[str, Array] | None = None,
    runner: str = "onnxruntime",
    threads: int = 0,
    progress: Progress = silent,
) -> Picture:
    """Return the picture of one request that a bucket has served.

    The layers are the choices of the graph's forced form under its own choices (`own_choices`), which parity has too;
    nothing is written into the bundle, but for the engine of that form.

    Args:
        path: of the image, or of a file of all inputs.
        outputs: what the bucket gave.
    """
    inputs = _inputs(opened, bucket, path, features)
    notes: list[str] = []
    nodes: tuple[ChoiceNode, ...] = ()
    chosen: Recorded | None = None
    reads: tuple[tuple[str, Array], ...] = ()
    seen = outputs
    with tempfile.TemporaryDirectory(prefix="edgecomp-draw-") as folder:
        spare = None if runner in _ENGINES else Path(folder)  # an engine of it takes minutes to build, and is kept
        try:
            form, forced = forced_graph(
                opened, bucket, spare=spare, needed_for="the layers of `edgecomp run --draw`", drop="--draw"
            )
        except MissingDependency as error:
            notes.append(f"the end alone is shown: {error}")
        else:
            nodes, chosen = forced.choices, {}
            if not nodes and runner not in _ENGINES:
                progress(f"{bucket.model}: what its tokens read of the patches, in {runner}")
                reads = _readings(opened, bucket, inputs, Path(folder), runner=runner, threads=threads)
            if nodes:
                progress(f"{bucket.model}: its choices in {runner}")
                with open_graph(runner, opened, bucket, threads=threads, model=form) as loaded:
                    seen, chosen = own_choices(loaded, nodes, inputs)
                notes += _differing(outputs, seen)
    notes += _untrained(opened)
    image = _image_spec(bucket)
    return Picture(
        image=path.name,
        bundle=opened.path.resolve().name,
        pixels=to_rgb(inputs[image.name], opened.manifest.preprocess),
        patches=join_layers(opened.manifest, bucket, seen, nodes=nodes, chosen=chosen, reads=reads, notes=notes),
    )


def _readings(
    opened: Bundle, bucket: Bucket, inputs: dict[str, Array], folder: Path, *, runner: str, threads: int
) -> tuple[tuple[str, Array], ...]:
    """Return how much output tokens read of each patch, attention by attention, with its module."""
    from edgecomp.export.readers import write_readers

    budget, form = bucket.budget, folder / bucket.model
    found = write_readers(
        opened.path / bucket.model,
        form,
        batch=bucket.batch,
        patches=budget.tokens_in,
        tokens=budget.tokens_out,
        prefix="model." if bucket.stem else "",
    )
    if not found:
        return ()
    with open_graph(runner, opened, bucket, threads=threads, model=form) as loaded:
        outputs = loaded.infer(inputs)
    return tuple((one.where, outputs[one.output]) for one in found)


def write_picture(path: Path, picture: Picture) -> None:
    """Write a picture by the suffix of its file, which appears whole or not at all.

    Raises:
        EdgecompError: it cannot be written there.
    """
    from edgecomp.report.pictures import picture_html, picture_png, picture_svg

    suffix = path.suffix.lower()
    if suffix == ".png":
        content = picture_png(picture)
    else:
        content = (picture_svg if suffix == ".svg" else picture_html)(picture).encode()
    write_whole(path, content, noun="picture")


def _differing(outputs: Mapping[str, Array], seen: Mapping[str, Array]) -> list[str]:
    """Say where the graph and its form with choices shown go different ways."""
    maps = [name for name in ("source_map", "index") if name in outputs and name in seen]
    if all(np.array_equal(outputs[name], seen[name]) for name in maps):
        return []
    names = " and ".join(maps)
    said = f"rounding decided otherwise in the form of the graph that shows its choices: its {names} is not the one of"
    return [f"{said} the outputs, and the picture is of that form"]


def _untrained(opened: Bundle) -> list[str]:
    """Say that a picture is one of chance, where it is."""
    weights, host = opened.manifest.weights, opened.manifest.backbone_weights
    if (host or weights).kind != "random":
        return []
    return [f"the {'backbone' if host else 'model'}'s weights are random, untrained: so is what is chosen"]


def _image_spec(bucket: Bucket) -> TensorSpec:
    return next(spec for spec in bucket.inputs if spec.kind == "image")


def _inputs(opened: Bundle, bucket: Bucket, path: Path, features: Mapping[str, Array] | None) -> dict[str, Array]:
    """Return all inputs of one request."""
    if path.suffix.lower() in _TENSOR_FILES:
        inputs = {**read_tensors(path), **(features or {})}
    elif (laid := lay_out(opened, path, budget=bucket.budget.tokens_out, batch=bucket.batch)) is not None:
        require_one_image(laid.bucket)
        inputs = laid.inputs
    else:
        spec, preprocess = _image_spec(bucket), opened.manifest.preprocess
        assert preprocess is not None, "a bundle that takes images says how they are prepared"
        pixels = to_pixels(read_image(path), preprocess, "uint8" if spec.dtype == "uint8" else "float32")
        inputs = {spec.name: pixels, **(features or {})}
    require_inputs(inputs, bucket.inputs, str(path))
    return inputs
