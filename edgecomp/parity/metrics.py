"""Metrics between an output and what it should be, computed in fp64."""

from __future__ import annotations

import math
from collections.abc import Set
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

__all__ = ["Difference", "compare", "jaccard"]

Array = npt.NDArray[np.generic]
_PSNR_CAP = 300.0  # dB, where the two are equal: JSON has no infinity


class Difference(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far an output is from what it should be.

    Attributes:
        max_abs: largest absolute error; infinite in value, and given as the largest float, where one is not finite.
        max_rel: that error over the largest magnitude expected.
        cosine_mean, cosine_min: cosine of each token (last axis): mean and least.
        psnr: peak signal to noise in dB, the peak being the largest magnitude expected; at most 300.
        worst: index of the element with the largest error.
        got, expected: both values there.
        not_finite: at how many places a NaN or Inf stands in the output, or in what it should be.
    """

    max_abs: float
    max_rel: float
    cosine_mean: float
    cosine_min: float
    psnr: float
    worst: tuple[int, ...]
    got: float
    expected: float
    not_finite: int


def compare(got: Array, expected: Array) -> Difference:
    """Compare two arrays of one shape; NaN and Inf in either count as the largest error there is."""
    if got.shape != expected.shape:
        raise ValueError(f"shapes differ: {got.shape} and {expected.shape}")
    given, wanted = got.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(given) & np.isfinite(wanted)
    x, y = np.where(finite, given, 0.0), np.where(finite, wanted, 0.0)
    error = np.where(finite, np.abs(x - y), np.finfo(np.float64).max)
    worst = np.unravel_index(int(error.argmax()), error.shape)
    peak = float(np.abs(y).max())
    mean_square = float(np.mean((x - y) ** 2))
    cosine = _cosine(x, y)
    not_finite = int((~finite).sum())
    if not_finite or (mean_square and not peak):
        psnr = 0.0
    else:
        psnr = min(_PSNR_CAP, 10 * math.log10(peak**2 / mean_square)) if mean_square else _PSNR_CAP
    max_abs = float(error[worst])
    return Difference(
        max_abs=max_abs,
        max_rel=min(max_abs / peak, np.finfo(np.float64).max) if peak else max_abs,
        cosine_mean=float(cosine.mean()) if not not_finite else -1.0,
        cosine_min=float(cosine.min()) if not not_finite else -1.0,
        psnr=psnr,
        worst=tuple(int(i) for i in worst),
        got=float(given[worst]),
        expected=float(wanted[worst]),
        not_finite=not_finite,
    )


def jaccard(one: Set[Any], other: Set[Any]) -> float:
    """Return the share of two sets that is common to both; 1 of two empty ones."""
    return len(one & other) / len(one | other) if one or other else 1.0


def _cosine(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the cosine along the last axis; 1 where both are zero, 0 where one is."""
    dot = (x * y).sum(-1)
    norms = np.sqrt((x * x).sum(-1)), np.sqrt((y * y).sum(-1))
    product = norms[0] * norms[1]
    both_zero = (norms[0] == 0) & (norms[1] == 0)
    safe = np.where(product == 0, 1.0, product)
    cosine: npt.NDArray[np.float64] = np.where(product == 0, both_zero, np.clip(dot / safe, -1.0, 1.0))
    return cosine
