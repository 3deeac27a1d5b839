"""`edgecomp run`: an image, or named tensors, through a bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgecomp.api._parity import require_threads
from edgecomp.api._progress import Progress, silent
from edgecomp.bundle import Bucket, Bundle, open_bundle
from edgecomp.errors import InvalidSpec, RunError
from edgecomp.images import read_image, to_pixels
from edgecomp.inputs import read_tensors, require_inputs, write_tensors
from edgecomp.report.run import OutputSummary, RunReport
from edgecomp.resources import photograph_path
from edgecomp.runners import Array, open_runner

__all__ = ["run"]

_TENSOR_FILES = (".safetensors", ".npz")


def run(
    bundle: str | Path,
    input_file: str | Path = "",
    *,
    out: str | Path = "",
    budget: str | int | None = None,
    batch: int | None = None,
    runner: str = "onnxruntime",
    threads: int = 0,
    progress: Progress = silent,
) -> RunReport:
    """Run one bucket once.

    Args:
        bundle: the folder.
        input_file: an image (JPEG, PNG, WebP, BMP), prepared as the manifest says and repeated over the batch; or a
            .safetensors or .npz file with the model's named inputs; "": the photograph that ships with edgecomp.
        out: where to write the outputs, .safetensors or .npz; "": nowhere.
        budget, batch: which bucket; None: the largest budget, and the smallest batch.
        runner, threads: as in `parity`.
        progress: takes one line for each step.

    Raises:
        BundleError: the bundle is not whole. RunError: the input cannot be read or does not fit, by name.
    """
    require_threads(threads)
    opened = open_bundle(Path(bundle))
    bucket = max(opened.select(budget=budget, batch=batch), key=lambda b: (b.budget.tokens_out, -b.batch))
    inputs = _read_inputs(opened, bucket, Path(input_file) if str(input_file) else photograph_path())
    if str(out) and Path(out).suffix.lower() not in _TENSOR_FILES:
        raise InvalidSpec(f"--out {out} must end in {' or '.join(_TENSOR_FILES)}")
    if str(out) and opened.path.resolve() in Path(out).resolve().parents:
        raise InvalidSpec(f"--out {out} lies in the bundle, which would no longer be whole; choose another place")
    progress(f"{bucket.model} in {runner}")
    with open_runner(runner, opened.path / bucket.model, threads=threads) as loaded:
        outputs = loaded.infer(inputs)
        version = loaded.version
    if str(out):
        write_tensors(Path(out), outputs)
    summaries = tuple(_summary(name, array) for name, array in outputs.items())
    budget_of = bucket.budget
    return RunReport(
        str(bundle), bucket.model, version, budget_of.tokens_in, budget_of.tokens_out, summaries, str(out), outputs
    )


def _read_inputs(opened: Bundle, bucket: Bucket, path: Path) -> dict[str, Array]:
    if path.suffix.lower() in _TENSOR_FILES:
        tensors = read_tensors(path)
        require_inputs(tensors, bucket.inputs, str(path))
        return tensors
    images = [spec for spec in bucket.inputs if spec.kind == "image"]
    preprocess = opened.manifest.preprocess
    if len(images) != len(bucket.inputs) or preprocess is None:
        raise RunError(
            f"{bucket.model} takes {', '.join(map(str, bucket.inputs))}, and {path.name} is no file of named tensors; "
            f"give a {' or '.join(_TENSOR_FILES)} file"
        )
    (spec,) = images
    pixels = to_pixels(read_image(path), preprocess, "uint8" if spec.dtype == "uint8" else "float32")
    return {spec.name: np.ascontiguousarray(np.broadcast_to(pixels, spec.shape))}


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
