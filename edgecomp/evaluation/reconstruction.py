"""How much of the uncompressed tokens is left in the compressed ones: one number, the same for all kinds of methods.

X (N, D) are the tokens of the plain model, Y (M, D) those of the compressed one at the same place. Y is written back to
N tokens by whatever the method says of where tokens went, and the error is ||X - X_hat||^2 / ||X||^2, in fp64:

* `unmerge`: a source map names the row of Y that each token went into; X_hat copies it back. Dropped tokens (-1) are
  zero.
* `zero fill` and `nearest fill`: an index names the place in X that each row of Y came from; the places in between are
  zero, or the kept token that lies nearest on the image's grid. Rows made of several tokens (-1) have no place and are
  left out.
* `read-back`: nothing names a place (learned queries). X_hat = X Y^T (Y Y^T + c I)^-1 Y is the best that any linear
  map can read back out of Y, with c = 1e-6 tr(Y Y^T) / M. This is a lower bound: it knows X. It is not defined from
  M >= D on, where M rows span everything and the error is 0 whatever they hold.

The numbers of different ways are not one scale: a read-back is kinder than an unmerge, and a nearest fill kinder than
zeros. Inside an encoder the error also holds what fewer tokens did to the blocks behind the cut.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from edgecomp.errors import InvalidSpec

__all__ = ["Reconstruction", "Way", "fill_error", "read_back_error", "unmerge_error"]

Way = Literal["unmerge", "zero fill", "nearest fill", "read-back"]
Array = npt.NDArray[np.generic]
Doubles = npt.NDArray[np.float64]

_RIDGE = 1e-6


class Reconstruction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The error of one way back.

    Attributes:
        way: how Y was written back.
        error: ||X - X_hat||^2 / ||X||^2: 0 all is there, 1 as bad as zeros; above 1 worse than zeros.
        cosine: of each token with its reconstruction, the mean; 0 for a token that was filled with zeros.
        unplaced: tokens of X (`unmerge`, the fills) that nothing of Y stands for, before any filling.
    """

    way: Way
    error: float
    cosine: float
    unplaced: int = 0


def unmerge_error(tokens: Array, merged: Array, source_map: Array) -> Reconstruction:
    """Return the error of copying each row of Y back to all tokens that went into it.

    Shapes: tokens X (N, D), merged Y (M, D), source_map (N,) with rows of Y, -1 for a token that was dropped.
    """
    x, y = _doubles("tokens", tokens), _doubles("merged", merged)
    rows = _places("source_map", source_map, length=len(x), below=len(y))
    _require_width(x, y)
    back = np.where((rows >= 0)[:, None], y[np.maximum(rows, 0)], 0.0)
    return _judge("unmerge", x, back, unplaced=int((rows < 0).sum()))


def fill_error(tokens: Array, kept: Array, index: Array, *, fill: Literal["zero", "nearest"]) -> Reconstruction:
    """Return the error of putting kept tokens back into their places.

    `nearest` is by Euclidean distance between patches where N is a square number, and along the sequence where it is
    not; of two at the same distance the one that comes first in the sequence.

    Shapes: tokens X (N, D), kept Y (M, D), index (M,) with places in X, -1 for a row made of several tokens.
    """
    x, y = _doubles("tokens", tokens), _doubles("kept", kept)
    places = _places("index", index, length=len(y), below=len(x))
    _require_width(x, y)
    rows = np.flatnonzero(places >= 0)
    if not len(rows):
        raise InvalidSpec(f"index of {len(y)} rows names no place of the {len(x)} tokens, so nothing can be put back")
    back = np.zeros_like(x)
    back[places[rows]] = y[rows]
    empty = np.setdiff1d(np.arange(len(x)), places[rows])
    if fill == "nearest":
        taken = np.sort(places[rows])
        back[empty] = back[taken[_distances(len(x), empty, taken).argmin(axis=1)]]
    return _judge("nearest fill" if fill == "nearest" else "zero fill", x, back, unplaced=len(empty))


def read_back_error(tokens: Array, compressed: Array) -> Reconstruction:
    """Return the error of the best linear map from Y back to X.

    Shapes: tokens X (N, D), compressed Y (M, D) with M < D.
    """
    x, y = _doubles("tokens", tokens), _doubles("compressed", compressed)
    _require_width(x, y)
    count, width = y.shape
    if count >= width:
        raise InvalidSpec(
            f"{count} compressed tokens of width {width} span all {width} dimensions, so that a linear map reads "
            f"anything back out of them; the error says something below {width} tokens alone"
        )
    gram = y @ y.T
    scale = float(np.trace(gram))
    if scale == 0:
        return _judge("read-back", x, np.zeros_like(x))
    gram[np.diag_indices(count)] += _RIDGE * scale / count
    return _judge("read-back", x, np.linalg.solve(gram, y @ x.T).T @ y)


def _judge(way: Way, x: Doubles, back: Doubles, *, unplaced: int = 0) -> Reconstruction:
    norms, others = np.sqrt((x * x).sum(1)), np.sqrt((back * back).sum(1))
    product = norms * others
    cosine = np.where(
        product == 0, (norms == 0) & (others == 0), (x * back).sum(1) / np.where(product == 0, 1, product)
    )
    error = float(((x - back) ** 2).sum() / (x * x).sum())
    return Reconstruction(way, error, float(np.clip(cosine, -1, 1).mean()), unplaced)


def _distances(count: int, some: npt.NDArray[np.int64], others: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return squared distances between places of a square grid, or of a line: (S,), (T,) -> (S, T)."""
    side = math.isqrt(count)
    if side * side != count:
        side = count  # a line: all in one row
    rows = some[:, None] // side - others // side
    columns = some[:, None] % side - others % side
    return np.asarray(rows * rows + columns * columns, np.int64)


def _doubles(name: str, array: Array) -> Doubles:
    if array.ndim != 2 or 0 in array.shape:
        raise InvalidSpec(f"{name} has shape {list(array.shape)}; give one (tokens, width) matrix, of one image")
    values = array.astype(np.float64)
    if unreal := int((~np.isfinite(values)).sum()):
        raise InvalidSpec(f"{name} holds {unreal} NaN or Inf of {values.size} values, so no error is defined")
    if name == "tokens" and not values.any():
        raise InvalidSpec("all tokens are zero, and the error is relative to their norm: it is not defined")
    return values


def _places(name: str, array: Array, *, length: int, below: int) -> npt.NDArray[np.int64]:
    if array.shape != (length,) or array.dtype.kind not in "iu":
        raise InvalidSpec(f"{name} is {array.dtype}{list(array.shape)}; it must hold {length} whole numbers")
    places = array.astype(np.int64)
    if int(places.min()) < -1 or int(places.max()) >= below:
        raise InvalidSpec(
            f"{name} runs from {places.min()} to {places.max()}; its places lie between -1 and {below - 1}"
        )
    return places


def _require_width(x: Doubles, y: Doubles) -> None:
    if x.shape[1] != y.shape[1]:
        raise InvalidSpec(f"tokens have width {x.shape[1]} and the compressed ones {y.shape[1]}: no error is defined")
