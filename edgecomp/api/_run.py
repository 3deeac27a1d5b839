"""`edgecomp run`: an image, or named tensors, through a bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgecomp.api._draw import picture_of, require_drawable, require_one_image, write_picture
from edgecomp.api._progress import Progress, silent
from edgecomp.bundle import Bundle, open_bundle
from edgecomp.errors import InvalidSpec, RunError
from edgecomp.images import read_image
from edgecomp.inputs import read_tensors, require_inputs, write_tensors
from edgecomp.patches import Picture
from edgecomp.report.run import LayoutSummary, OutputSummary, RunReport, drawn_layers
from edgecomp.resources import photograph_path
from edgecomp.runners import Array, require_threads
from edgecomp.runners.chain import open_graph
from edgecomp.serving import Model
from edgecomp.serving.parts import TEXT_FILE, image_pixels, kind_of, lay_out
from edgecomp.specs import TensorSpec
from edgecomp.specs.manifest import Bucket

__all__ = ["run"]

_TENSOR_FILES = (".safetensors", ".npz")


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
            text; "": the photograph that ships with edgecomp. What comes in parts (slices, tiles, strips) goes to the
            smallest batch or bucket that holds them.
        text: the question, for a router that reads words; or what strips are rendered of, without a file.
        text_features: a .safetensors or .npz file with the inputs beside the image, by name, of a model that has some.
        out: where to write the outputs, .safetensors or .npz, beside them how their rows follow each other where they
            are of parts; "": nowhere.
        budget: tokens wanted; the smallest bucket that keeps so many serves, for a file of inputs at a batch above 1
            the one of that count.
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
    is_text = text is not None and not str(input_file) and kind_of(opened) == "text"
    path = Path(input_file) if str(input_file) else photograph_path()
    _require_out(opened, out)
    if str(draw):
        require_drawable(opened, batch=batch, drawing=draw)
    if str(font) and not is_text and path.suffix.lower() != TEXT_FILE:
        raise InvalidSpec(f"--font {font}: {path} is no {TEXT_FILE} file, and nothing is rendered; drop it")
    laid = lay_out(opened, None if is_text else path, text=text, budget=budget, batch=batch, font=font)
    picture: Picture | None = None
    signals: dict[str, float] = {}
    features = read_tensors(text_features) if str(text_features) else None
    if laid is not None:
        bucket, reason = laid.bucket, laid.reason
        if features is not None:
            raise InvalidSpec(f"--text-features {text_features} beside an image or text in parts; drop it")
        if str(draw):
            require_one_image(bucket)
        progress(f"{bucket.model} in {runner}")
        with open_graph(runner, opened, bucket, threads=threads) as loaded:
            outputs, version = laid.real(loaded.infer(laid.inputs)), loaded.version
    else:
        smallest = min(bucket.batch for bucket in opened.select(batch=batch))
        exact = budget if smallest > 1 else None  # one image is served as `edgecomp.load` does
        bucket = max(opened.select(budget=exact, batch=batch), key=lambda b: (b.budget.tokens_out, -b.batch))
    if laid is None and bucket.batch == 1:
        progress(f"{bundle} in {runner}")
        request = _read_request(bucket, path, features, str(text_features))
        with Model(opened, runner=runner, threads=threads, resident=1) as model:
            answer = model(request, text, features=features, budget=budget)
            version = model.runner_version
        (bucket,) = opened.select(budget=answer.budget, batch=1)
        outputs, reason, signals = answer.outputs, answer.reason, answer.signals
    elif laid is None:
        if text is not None or features is not None:
            raise InvalidSpec(
                f"a text or its features go with one image, and batch {bucket.batch} takes a file of all inputs"
            )
        inputs = _read_inputs(opened, bucket, path)
        progress(f"{bucket.model} in {runner}")
        with open_graph(runner, opened, bucket, threads=threads) as loaded:
            outputs, version = loaded.infer(inputs), loaded.version
        reason = f"batch {bucket.batch}, which `run` does not route"
    if str(draw):
        picture = picture_of(
            opened, bucket, path, outputs, features=features, runner=runner, threads=threads, progress=progress
        )
    if str(out):
        write_tensors(Path(out), outputs if laid is None else {**outputs, **laid.layout.arrays})
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
        layout=LayoutSummary.of(laid.layout) if laid is not None else None,
    )


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


def _read_inputs(opened: Bundle, bucket: Bucket, path: Path) -> dict[str, Array]:
    if path.suffix.lower() in _TENSOR_FILES:
        tensors = read_tensors(path)
        require_inputs(tensors, bucket.inputs, str(path))
        return tensors
    spec = _require_image_alone(bucket, path)
    pixels = image_pixels(opened, read_image(path), "uint8" if spec.dtype == "uint8" else "float32")
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
