"""`edgecomp run`: an image, or named tensors, through a bundle."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from PIL import Image

from edgecomp.api._draw import picture_of, require_drawable, write_picture
from edgecomp.api._progress import Progress, silent
from edgecomp.bundle import Bundle, open_bundle
from edgecomp.errors import InvalidSpec, RunError
from edgecomp.images import PixelType, read_image, to_pixels
from edgecomp.inputs import read_tensors, require_inputs, write_tensors
from edgecomp.patches import Picture
from edgecomp.report.run import OutputSummary, RunReport, drawn_layers
from edgecomp.resources import photograph_path
from edgecomp.runners import Array, require_threads
from edgecomp.runners.chain import open_graph
from edgecomp.serving import Model
from edgecomp.slices import Prepared, policy_of, prepare_slices
from edgecomp.specs import TensorSpec
from edgecomp.specs.manifest import Bucket
from edgecomp.strips import render_strips

__all__ = ["run"]

_TENSOR_FILES = (".safetensors", ".npz")
_TEXT_FILE = ".txt"


def run(
    bundle: str | Path,
    input_file: str | Path = "",
    *,
    text: str | None = None,
    text_features: str | Path = "",
    out: str | Path = "",
    budget: str | int | None = None,
    batch: int | None = None,
    runner: str = "onnxruntime",
    threads: int = 0,
    draw: str | Path = "",
    font: str | Path = "",
    progress: Progress = silent,
) -> RunReport:
    """Run one bucket once: the one of `budget`, the one that the bundle's router picks, or the largest.

    Args:
        bundle: the folder.
        input_file: an image (JPEG, PNG, WebP, BMP), prepared as the manifest says and repeated over the batch; or a
            .safetensors or .npz file with the model's named inputs; or a .txt file for a model that reads strips of
            text, whose batch is then the smallest that holds it; "": the photograph that ships with edgecomp.
        text: the question, for a router that reads words.
        text_features: a .safetensors or .npz file with the inputs beside the image, by name, of a model that has some.
        out: where to write the outputs, .safetensors or .npz; "": nowhere.
        budget: tokens wanted; the smallest bucket that keeps so many serves, at a batch above 1 the one of that count.
        batch: which of the bundle's batches; None: the smallest. A batch above 1 is not routed.
        runner, threads: as in `parity`.
        font: a TrueType file to render a text with; "": the font that Pillow brings.
        draw: where to write a picture of what became of the image's patches, .png, .svg or .html; "": nowhere.
        progress: takes one line for each step.

    Raises:
        BundleError: the bundle is not whole. RunError: the input cannot be read or does not fit, by name.
    """
    require_threads(threads)
    opened = open_bundle(Path(bundle))
    sliced = _slice(opened, input_file, batch)
    if sliced is not None:
        batch = len(sliced.image)
    smallest = min(bucket.batch for bucket in opened.select(batch=batch))
    exact = budget if smallest > 1 else None  # one image is served as `edgecomp.load` does: by the bucket that suffices
    bucket = max(opened.select(budget=exact, batch=batch), key=lambda b: (b.budget.tokens_out, -b.batch))
    path = Path(input_file) if str(input_file) else photograph_path()
    _require_out(opened, out)
    if str(draw):
        require_drawable(opened, batch=batch, drawing=draw)
    strips = _read_strips(opened, path, font, budget=budget, batch=batch)
    bucket = strips.bucket if strips is not None else bucket
    picture: Picture | None = None
    features = read_tensors(text_features) if str(text_features) else None
    if bucket.batch == 1 and sliced is None and strips is None:
        progress(f"{bundle} in {runner}")
        request = _read_request(bucket, path, features, str(text_features))
        with Model(opened, runner=runner, threads=threads, resident=1) as model:
            answer = model(request, text, features=features, budget=budget)
            version = model.runner_version
        (bucket,) = opened.select(budget=answer.budget, batch=1)
        outputs, reason, signals = answer.outputs, answer.reason, answer.signals
        if str(draw):
            picture = picture_of(
                opened, bucket, path, outputs, features=features, runner=runner, threads=threads, progress=progress
            )
    else:
        if text is not None or features is not None:
            raise InvalidSpec(
                f"a text or its features go with one image, and batch {bucket.batch} takes a file of all inputs"
            )
        inputs = _sliced_inputs(bucket, sliced) if sliced is not None else _read_inputs(opened, bucket, path, strips)
        progress(f"{bucket.model} in {runner}")
        with open_graph(runner, opened, bucket, threads=threads) as loaded:
            outputs, version = loaded.infer(inputs), loaded.version
        reason, signals = f"batch {bucket.batch}, which `run` does not route", {}
        if sliced is not None:
            grid = " x ".join(map(str, sliced.grid)) + " slices and an overview" if sliced.grid else "one slice"
            reason = f"{grid} of a batch of {bucket.batch}"
            outputs = {name: array[: sliced.count] for name, array in outputs.items()}
        if strips is not None:
            reason, outputs = strips.said, {name: array[: strips.used] for name, array in outputs.items()}
    if str(out):
        write_tensors(Path(out), outputs)
    if picture is not None:
        write_picture(Path(draw), picture)
    return RunReport(
        bundle=str(bundle),
        model=bucket.model,
        runner=version,
        tokens_in=bucket.budget.tokens_in,
        tokens_out=bucket.budget.tokens_out,
        reason=reason,
        signals=signals,
        summaries=tuple(_summary(name, array) for name, array in outputs.items()),
        out=str(out),
        outputs=outputs,
        drawn=str(draw) if picture is not None else "",
        layers=drawn_layers(picture.patches) if picture is not None else (),
        notes=picture.patches.notes if picture is not None else (),
    )


def _slice(opened: Bundle, input_file: str | Path, batch: int | None) -> Prepared | None:
    """Cut the image of a request to a slice-wise bundle whose encoder takes images; none for any other."""
    manifest = opened.manifest
    path = Path(input_file) if str(input_file) else photograph_path()
    first = manifest.buckets[0].inputs[0]
    if manifest.method != "slice-wise" or first.kind != "image" or path.suffix.lower() in _TENSOR_FILES:
        return None
    if len(first.shape) != 4:
        raise InvalidSpec(
            f"{path} is one image, and this bundle takes {first.shape[1]} in a request; give a file of inputs"
        )
    assert manifest.preprocess is not None
    dtype: PixelType = "uint8" if first.dtype == "uint8" else "float32"
    batches = sorted({bucket.batch for bucket in opened.select(batch=batch)})
    policy = policy_of(manifest.params)
    return prepare_slices(read_image(path), policy, manifest.preprocess, batches=batches, dtype=dtype)


def _sliced_inputs(bucket: Bucket, sliced: Prepared) -> dict[str, Array]:
    """Name the inputs that the slices give; any other is refused."""
    inputs: dict[str, Array] = {}
    for spec in bucket.inputs:
        if spec.kind == "image":
            inputs[spec.name] = sliced.image
        elif spec.kind == "mask" and spec.shape == sliced.mask.shape:
            inputs[spec.name] = sliced.mask
        elif spec.kind == "sizes" and _are_packed(sliced):
            inputs[spec.name] = sliced.sizes
        else:
            raise InvalidSpec(f"{bucket.model} takes {spec} beside the slices; give a file of all inputs")
    return inputs


def _are_packed(sliced: Prepared) -> bool:
    """Whether the real tokens of each slice stand in front, one row behind the other: those of full width do."""
    side = round(sliced.mask.shape[1] ** 0.5)
    return bool((sliced.sizes[: sliced.count, 1] == side).all())


def _read_request(
    bucket: Bucket, path: Path, features: dict[str, Array] | None, features_file: str
) -> Path | dict[str, Array]:
    """Return an image's path, or named tensors; what does not fit is said of the file that it stands in."""
    if path.suffix.lower() in _TENSOR_FILES:
        tensors = read_tensors(path)
        require_inputs({**tensors, **(features or {})}, bucket.inputs, str(path))
        return tensors
    if features is None:
        _require_image_alone(bucket, path)
    else:
        others = [spec for spec in bucket.inputs if spec.kind != "image"]
        if not others:
            raise InvalidSpec(f"--text-features {features_file}: {bucket.model} takes the image alone; drop it")
        require_inputs(features, others, features_file)
    return path


def _require_out(opened: Bundle, out: str | Path) -> None:
    if str(out) and Path(out).suffix.lower() not in _TENSOR_FILES:
        raise InvalidSpec(f"--out {out} must end in {' or '.join(_TENSOR_FILES)}")
    if str(out) and opened.path.resolve() in Path(out).resolve().parents:
        raise InvalidSpec(f"--out {out} lies in the bundle, which would no longer be whole; choose another place")


class _Strips(NamedTuple):
    """A rendered text as inputs of a bucket, how many images of its batch hold it, and that in words."""

    bucket: Bucket
    inputs: dict[str, Array]
    used: int
    said: str


def _read_strips(
    opened: Bundle, path: Path, font: str | Path, *, budget: str | int | None, batch: int | None
) -> _Strips | None:
    """Render a text for the smallest batch that holds it; none of a file that is no text."""
    if path.suffix.lower() != _TEXT_FILE:
        if str(font):
            raise InvalidSpec(f"--font {font}: {path} is no {_TEXT_FILE} file, and nothing is rendered; drop it")
        return None
    candidates = opened.select(budget=budget, batch=batch)
    specs = {spec.name: spec for spec in candidates[0].inputs}
    preprocess = opened.manifest.preprocess
    if set(specs) != {"image", "patch_mask"} or preprocess is None:
        raise InvalidSpec(
            f"{path} is a text, and {opened.path} takes {', '.join(map(str, specs.values()))}; a text is rendered "
            "for a model with image and patch_mask: `edgecomp export --method vist --backbone "
            "vit_large_patch14_clip_224`"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"text {path} cannot be read ({error}); give a file in UTF-8") from None
    size, rows = preprocess.size, math.isqrt(specs["patch_mask"].shape[1])
    batches = sorted({bucket.batch for bucket in candidates})
    rendered = render_strips(text, images=batches, size=size, patch=size // rows, font=font)
    bucket = max((b for b in candidates if b.batch == len(rendered.images)), key=lambda b: b.budget.tokens_out)
    exact = msgspec.structs.replace(preprocess, crop=1.0)
    dtype: PixelType = "uint8" if specs["image"].dtype == "uint8" else "float32"
    pixels = [to_pixels(Image.fromarray(page), exact, dtype) for page in rendered.images]
    pages = "image" if rendered.used == 1 else "images"
    said = f"{rendered.used} {pages} of text ({rendered.pixels} pixels of line), in the batch of {bucket.batch}"
    inputs: dict[str, Array] = {"image": np.concatenate(pixels), "patch_mask": rendered.patch_mask}
    return _Strips(bucket, inputs, rendered.used, said)


def _read_inputs(opened: Bundle, bucket: Bucket, path: Path, strips: _Strips | None) -> dict[str, Array]:
    if strips is not None:
        return strips.inputs
    if path.suffix.lower() in _TENSOR_FILES:
        tensors = read_tensors(path)
        require_inputs(tensors, bucket.inputs, str(path))
        return tensors
    preprocess = opened.manifest.preprocess
    spec = _require_image_alone(bucket, path)
    assert preprocess is not None, "a bundle that takes images says how they are prepared"
    pixels = to_pixels(read_image(path), preprocess, "uint8" if spec.dtype == "uint8" else "float32")
    return {spec.name: np.ascontiguousarray(np.broadcast_to(pixels, spec.shape))}


def _require_image_alone(bucket: Bucket, path: Path) -> TensorSpec:
    """Return the image that is all a bucket takes."""
    images = [spec for spec in bucket.inputs if spec.kind == "image"]
    if len(images) != 1 or len(bucket.inputs) != 1:
        raise RunError(
            f"{bucket.model} takes {', '.join(map(str, bucket.inputs))}, and {path.name} is no file of named tensors; "
            f"give a {' or '.join(_TENSOR_FILES)} file, or --text-features for what goes with an image"
        )
    return images[0]


def _summary(name: str, array: Array) -> OutputSummary:
    values = array.astype(np.float64)
    finite = values[np.isfinite(values)]
    not_finite = int(values.size - finite.size)
    if not finite.size:
        finite = np.zeros(1)
    return OutputSummary(
        name,
        array.shape,
        str(array.dtype),
        float(finite.mean()),
        float(finite.std()),
        float(finite.min()),
        float(finite.max()),
        not_finite,
    )
