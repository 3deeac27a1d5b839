"""Reconstruction error: closed forms, invariances, and inputs for which there is none."""

from __future__ import annotations

import numpy as np
import pytest

from edgecomp.errors import InvalidSpec
from edgecomp.evaluation.reconstruction import fill_error, read_back_error, unmerge_error

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((16, 8))


def test_identity_loses_nothing() -> None:
    places = np.arange(16, dtype=np.int32)
    for found in (unmerge_error(X, X, places), *(fill_error(X, X, places, fill=f) for f in ("zero", "nearest"))):
        assert found.error == 0
        assert found.cosine == pytest.approx(1)
        assert found.unplaced == 0


def test_unmerge_of_a_mean_is_the_variance_within_groups() -> None:
    """Copying group means back leaves 1 - sum_g n_g |mean_g|^2 / sum |x|^2."""
    rows = np.repeat(np.arange(4, dtype=np.int32), 4)
    means = X.reshape(4, 4, 8).mean(1)
    expected = 1 - 4 * (means**2).sum() / (X**2).sum()
    assert unmerge_error(X, means, rows).error == pytest.approx(expected, rel=1e-12)
    assert unmerge_error(X.astype(np.float32), means.astype(np.float32), rows).error == pytest.approx(
        expected, rel=1e-6
    )
    shuffled = RANDOM.permutation(4)
    assert unmerge_error(X, means[np.argsort(shuffled)], shuffled[rows]).error == pytest.approx(expected, rel=1e-12)


def test_unmerge_of_dropped_tokens_is_their_share_of_the_norm() -> None:
    rows = np.where(np.arange(16) % 2, -1, np.arange(16) // 2)
    found = unmerge_error(X, X[::2], rows)
    assert found.error == pytest.approx((X[1::2] ** 2).sum() / (X**2).sum(), rel=1e-12)
    assert (found.unplaced, found.cosine) == (8, pytest.approx(0.5))


def test_zero_fill_is_the_share_of_the_norm_that_was_dropped() -> None:
    index = np.array([2, 5, 11, -1])
    kept = np.vstack([X[index[:3]], np.full((1, 8), 7.0)])  # the last is a sum of others, and stands for no place
    found = fill_error(X, kept, index, fill="zero")
    assert found.error == pytest.approx(1 - (X[index[:3]] ** 2).sum() / (X**2).sum(), rel=1e-12)
    assert (found.unplaced, found.way) == (13, "zero fill")
    assert found.cosine == pytest.approx(3 / 16)


def test_nearest_fill_goes_by_the_grid() -> None:
    """Of a 4 x 4 grid the corners 0, 3 and 12 are kept: each cell takes the nearest, the first of two equals."""
    kept = np.array([[1.0], [2.0], [3.0]])
    # (2, 2) and (3, 3) are as far from 3 as from 12: the first of them
    image = np.array([1, 1, 2, 2, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3, 3, 2], float)[:, None]
    assert fill_error(image, kept, np.array([0, 3, 12]), fill="nearest").error == 0
    order = [2, 0, 1]
    assert fill_error(image, kept[order], np.array([0, 3, 12])[order], fill="nearest").error == 0
    line = np.array([1, 1, 2, 2, 2], float)[:, None]  # 5 is no square: a line; place 1 is as far from 0 as from 2
    assert fill_error(line, np.array([[1.0], [2.0]]), np.array([0, 2]), fill="nearest").error == 0


def test_read_back_is_what_lies_outside_of_the_span() -> None:
    basis = np.eye(8)[:3]
    found = read_back_error(X, 5 * basis)
    assert found.error == pytest.approx((X[:, 3:] ** 2).sum() / (X**2).sum(), rel=1e-5)
    mixed = RANDOM.standard_normal((3, 3)) @ basis  # any mixture of the rows holds the same
    assert read_back_error(X, mixed).error == pytest.approx(found.error, rel=1e-3)
    inside = RANDOM.standard_normal((16, 3)) @ basis
    assert read_back_error(inside, 5 * basis).error < 1e-10
    assert read_back_error(X, np.zeros((3, 8))).error == 1
    twice = np.vstack([basis, basis])  # rank 3 of 6: the ridge keeps the inverse finite
    assert read_back_error(X, twice).error == pytest.approx(found.error, rel=1e-5)


def test_read_back_is_the_best_of_all_linear_maps() -> None:
    y = X[:5] + 0.1 * RANDOM.standard_normal((5, 8))
    best = np.linalg.lstsq(y.T, X.T, rcond=None)[0]
    expected = ((X - best.T @ y) ** 2).sum() / (X**2).sum()
    assert read_back_error(X, y).error == pytest.approx(expected, abs=1e-5)


def test_scale_of_tokens_does_not_matter() -> None:
    rows = np.repeat(np.arange(4), 4)
    y = RANDOM.standard_normal((4, 8))
    assert unmerge_error(1e-6 * X, 1e-6 * y, rows).error == pytest.approx(unmerge_error(X, y, rows).error)
    assert read_back_error(1e6 * X, 3 * y).error == pytest.approx(read_back_error(X, y).error)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: read_back_error(X, RANDOM.standard_normal((8, 8))), "8 compressed tokens of width 8 span all 8"),
        (lambda: read_back_error(X, np.ones((2, 4))), "width 8 and the compressed ones 4"),
        (lambda: read_back_error(np.zeros((3, 8)), np.ones((2, 8))), "all tokens are zero"),
        (lambda: read_back_error(np.full((3, 8), np.nan), np.ones((2, 8))), "tokens holds 24 NaN or Inf of 24"),
        (lambda: unmerge_error(X, np.full((2, 8), np.inf), np.zeros(16, int)), "merged holds 16 NaN or Inf"),
        (
            lambda: unmerge_error(X, np.ones((2, 8)), np.full(16, 2)),
            "runs from 2 to 2; its places lie between -1 and 1",
        ),
        (lambda: unmerge_error(X, np.ones((2, 8)), np.zeros(15, int)), r"int64\[15\]; it must hold 16 whole numbers"),
        (lambda: unmerge_error(X, np.ones((2, 8)), np.zeros(16)), "is float64"),
        (lambda: unmerge_error(X[None], X, np.zeros(16, int)), r"tokens has shape \[1, 16, 8\]"),
        (lambda: fill_error(X, np.ones((2, 8)), np.array([-1, -1]), fill="zero"), "index of 2 rows names no place"),
        (lambda: fill_error(X, np.ones((2, 8)), np.array([0, 16]), fill="zero"), "runs from 0 to 16"),
    ],
)
def test_where_there_is_no_error(call: object, text: str) -> None:
    with pytest.raises(InvalidSpec, match=text):
        call()  # type: ignore[operator]
