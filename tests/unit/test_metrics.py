"""`compare` on values that can be worked out by hand, and on those that tend to break metrics."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from edgecomp.parity import compare

LARGEST = float(np.finfo(np.float64).max)
FINITE32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def array(*rows: object) -> npt.NDArray[np.float32]:
    return np.array(rows, dtype=np.float32)


def test_known_values() -> None:
    found = compare(array([1.0, 2.0], [3.0, 4.5]), array([1.0, 2.0], [3.0, 4.0]))
    assert (found.max_abs, found.max_rel, found.worst) == (0.5, 0.125, (1, 1))
    assert (found.got, found.expected, found.not_finite) == (4.5, 4.0, 0)
    cosine = (9 + 18) / math.sqrt((9 + 20.25) * 25)
    assert found.cosine_min == pytest.approx(cosine, abs=1e-12)
    assert found.cosine_mean == pytest.approx((1 + cosine) / 2, abs=1e-12)
    assert found.psnr == pytest.approx(10 * math.log10(16 / (0.25 / 4)), abs=1e-9)


def test_equal_arrays() -> None:
    values = np.random.default_rng(0).standard_normal((2, 3, 4))
    found = compare(values, values.copy())
    assert (found.max_abs, found.max_rel, found.psnr, found.not_finite) == (0.0, 0.0, 300.0, 0)
    assert found.cosine_min == pytest.approx(1.0, abs=1e-12)


def test_negated_array_has_cosine_minus_one() -> None:
    values = array([1.0, -2.0, 3.0])
    found = compare(-values, values)
    assert (found.max_abs, found.max_rel, found.worst) == (6.0, 2.0, (0, 2))
    assert found.cosine_min == pytest.approx(-1.0, abs=1e-12)


def test_worst_is_the_index_of_the_first_largest_error() -> None:
    expected = np.zeros((2, 3, 4))
    got = expected.copy()
    got[1, 0, 2] = got[1, 2, 3] = -0.25
    got[0, 1, 1] = 0.125
    found = compare(got, expected)
    assert (found.worst, found.got, found.expected) == ((1, 0, 2), -0.25, 0.0)


def test_cosine_is_taken_along_the_last_axis() -> None:
    found = compare(array([[1.0, 0.0], [0.0, 1.0]]), array([[1.0, 0.0], [1.0, 0.0]]))
    assert (found.cosine_min, found.cosine_mean) == (0.0, 0.5)


def test_it_computes_in_fp64() -> None:
    big = np.full((1, 4), 60000, dtype=np.float16)
    found = compare(big, np.full((1, 4), 59968, dtype=np.float16))
    assert (found.max_abs, found.not_finite) == (32.0, 0)
    assert found.cosine_min == pytest.approx(1.0, abs=1e-12)
    integers = np.array([[250, 1]], dtype=np.uint8)
    assert compare(integers, np.array([[255, 0]], dtype=np.uint8)).max_abs == 5.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "-inf"])
def test_values_that_are_not_finite_are_the_largest_error(bad: float) -> None:
    expected = array([1.0, 2.0], [3.0, 4.0])
    got = expected.copy()
    got[0, 1] = bad
    got[1, 0] = 1e30
    found = compare(got, expected)
    assert (found.not_finite, found.worst, found.max_abs) == (1, (0, 1), LARGEST)
    assert not math.isfinite(found.got)
    assert found.expected == 2.0
    assert (found.cosine_min, found.cosine_mean, found.psnr) == (-1.0, -1.0, 0.0)
    assert math.isfinite(found.max_rel)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "-inf"])
def test_expected_values_that_are_not_finite_agree_with_nothing(bad: float) -> None:
    """Not even with themselves: nothing can be held to them."""
    expected = array([1.0, 2.0], [3.0, 4.0])
    expected[0, 1] = bad
    for got in (expected.copy(), array([1.0, 2.0], [3.0, 4.0])):
        found = compare(got, expected)
        assert (found.not_finite, found.worst, found.max_abs) == (1, (0, 1), LARGEST)
        assert (found.cosine_min, found.psnr) == (-1.0, 0.0)
        assert math.isfinite(found.max_rel)


def test_all_nan_counts_all() -> None:
    found = compare(np.full((2, 3), math.nan), np.zeros((2, 3)))
    assert (found.not_finite, found.worst, found.max_abs) == (6, (0, 0), LARGEST)


def test_two_zero_vectors_agree() -> None:
    found = compare(np.zeros((2, 4)), np.zeros((2, 4)))
    assert (found.max_abs, found.max_rel, found.cosine_min, found.psnr) == (0.0, 0.0, 1.0, 300.0)


def test_one_zero_vector_agrees_with_nothing() -> None:
    found = compare(array([0.0, 0.0], [1.0, 0.0]), array([1.0, 0.0], [1.0, 0.0]))
    assert (found.cosine_min, found.cosine_mean) == (0.0, 0.5)
    back = compare(array([1.0, 0.0]), array([0.0, 0.0]))
    assert (back.cosine_min, back.max_rel, back.psnr) == (0.0, 1.0, 0.0)


def test_shapes_must_be_equal() -> None:
    with pytest.raises(ValueError, match=r"shapes differ: \(1, 3\) and \(3,\)"):
        compare(np.zeros((1, 3)), np.zeros(3))


@settings(deadline=None)  # a busy machine is no failure
@given(
    arrays(np.float32, array_shapes(min_dims=1, max_dims=3, max_side=4), elements=st.floats(width=32)),
    st.data(),
)
def test_every_result_can_be_written_as_json_and_names_the_worst(
    got: npt.NDArray[np.float32], data: st.DataObject
) -> None:
    expected = data.draw(arrays(np.float32, got.shape, elements=FINITE32))
    found = compare(got, expected)
    finite = np.isfinite(got)
    assert found.not_finite == int((~finite).sum())
    assert -1.0 <= found.cosine_min <= 1.0
    for name in ("max_abs", "max_rel", "cosine_mean", "cosine_min", "psnr", "expected"):
        assert math.isfinite(getattr(found, name)), name
    if finite.all():
        errors = np.abs(got.astype(np.float64) - expected.astype(np.float64))
        assert found.max_abs == errors.max() == errors[found.worst]
        assert msgspec.convert(msgspec.json.decode(msgspec.json.encode(found)), type(found)) == found
