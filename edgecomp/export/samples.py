"""Inputs that a precision is calibrated with: images of the user, or those that goldens are made of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from edgecomp.errors import InvalidSpec
from edgecomp.export.golden import golden_inputs
from edgecomp.images import PixelType, to_pixels
from edgecomp.specs import Preprocess, TensorSpec
from edgecomp.specs.manifest import Samples

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Sample", "Sampled", "golden_samples", "image_samples", "in_rows", "require_image"]

Array = npt.NDArray[np.generic]
Sample = Mapping[str, Array]

_SEEDED = 4
_APART = 1000  # from the seed of the goldens, so that nothing is calibrated on what it is compared with


class Sampled(NamedTuple):
    """Inputs of one row each, and what the manifest says of them."""

    samples: tuple[Sample, ...]
    record: Samples


def golden_samples(specs: Sequence[TensorSpec], *, seed: int, preprocess: Preprocess | None) -> Sampled:
    """Return four inputs of seeded numbers, which no golden has, and the shipped photograph.

    Args:
        specs: of the model's inputs at batch 1.
        seed: of the goldens.
        preprocess: of images; None where the model takes tokens.
    """
    made = [
        golden_inputs(specs, seed=seed + _APART + number, preprocess=preprocess)["seeded"] for number in range(_SEEDED)
    ]
    made.append(golden_inputs(specs, seed=seed, preprocess=preprocess)["photo"])
    return _sampled(made, f"{_SEEDED} inputs of seeded numbers and the shipped photograph")


def require_image(specs: Sequence[TensorSpec], *, source: str) -> None:
    """Refuse images for a model that takes none.

    Args:
        source: the folder as it was given.

    Raises:
        InvalidSpec: the model takes no image.
    """
    if specs[0].kind != "image":
        raise InvalidSpec(
            f"--calibration {source}: the model takes {', '.join(map(str, specs))} and no images; drop it, and seeded "
            "inputs are used, or give a --backbone"
        )


def image_samples(
    images: Iterable[Image.Image], specs: Sequence[TensorSpec], *, source: str, seed: int, preprocess: Preprocess
) -> Sampled:
    """Return one input for each image; what a model takes beside it has seeded numbers.

    Args:
        specs: of the model's inputs at batch 1, the image first.
        source: name of the folder, for the manifest.
    """
    first = specs[0]
    given = dict(golden_inputs(specs, seed=seed + _APART, preprocess=preprocess)["seeded"])
    pixels: PixelType = "uint8" if first.dtype == "uint8" else "float32"
    made = [{**given, first.name: to_pixels(image, preprocess, pixels).reshape(first.shape)} for image in images]
    return _sampled(made, f"images of {source}")


def in_rows(samples: Sequence[Sample], batch: int) -> list[Sample]:
    """Return the samples in runs of `batch` rows; the last run is filled with the first samples again."""
    runs: list[Sample] = []
    for start in range(0, len(samples), batch):
        run = [samples[place % len(samples)] for place in range(start, start + batch)]
        runs.append({name: np.concatenate([one[name] for one in run]) for name in run[0]})
    return runs


def _sampled(samples: Sequence[Sample], source: str) -> Sampled:
    digest = hashlib.sha256()
    for sample in samples:
        for name in sorted(sample):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(sample[name]).tobytes())
    return Sampled(tuple(samples), Samples(source, len(samples), digest.hexdigest()))
