"""Fewer bits: what is stored, what is read again, and that the error is what is told."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as drawn

from flowps.errors import BundleError
from flowps.serving.quantize import Error, dequantize, quantize

ELEMENTS = st.floats(-59_392, 59_392, width=32)
WEIGHTS = drawn.arrays(np.float32, st.tuples(st.integers(0, 6), st.integers(1, 20)), elements=ELEMENTS)
PAIRS = drawn.arrays(np.float32, st.tuples(st.integers(0, 6), st.just(2)), elements=ELEMENTS)


@settings(deadline=None)
@given(WEIGHTS)
def test_float32_is_as_it_was(weights):
    stored, scales = quantize(weights, "float32")
    assert scales is None
    np.testing.assert_array_equal(dequantize(stored, scales), weights)


@settings(deadline=None)
@given(WEIGHTS)
def test_float16_is_rounded_to_nearest(weights):
    stored, scales = quantize(weights, "float16")
    assert (stored.dtype, scales) == (np.float16, None)
    np.testing.assert_allclose(dequantize(stored, scales), weights, rtol=2**-11, atol=2**-25)


@settings(deadline=None)
@given(WEIGHTS)
def test_int8_is_off_by_half_a_scale_at_most(weights):
    stored, scales = quantize(weights, "int8")
    assert (stored.dtype, stored.shape, scales.dtype, scales.shape) == (np.int8, weights.shape, np.float32, (len(weights),))
    assert stored.min(initial=0) >= -127
    found = dequantize(stored, scales)
    assert found.dtype == np.float32
    most = np.abs(weights).max(axis=1, initial=0)
    # A scale so small that it is rounded itself is off by the least float32 for each of 127 steps.
    assert (np.abs(found - weights) <= (most / 254 * 1.001 + 127 * 2.0**-149)[:, None]).all()
    naive = [[round(float(w) / float(s)) if s else 0 for w in row] for row, s in zip(weights, scales, strict=True)]
    if (most > 1e-30).all():
        assert np.abs(np.array(naive, float).reshape(stored.shape) - stored).max(initial=0) <= 1  # halves may go either way


def test_a_row_of_zeros_stays_one():
    stored, scales = quantize(np.zeros((2, 3), np.float32), "int8")
    np.testing.assert_array_equal(dequantize(stored, scales), np.zeros((2, 3)))
    assert not scales.any()


@settings(deadline=None)
@given(st.lists(PAIRS, max_size=3))
def test_the_error_is_that_of_all_that_was_added(blocks):
    for dtype in ("float32", "float16", "int8"):
        error = Error()
        for weights in blocks:
            error.add(weights, *quantize(weights, dtype))
        whole = np.concatenate([np.empty((0, 2), np.float32), *blocks])
        found = np.concatenate([np.empty((0, 2), np.float32), *(dequantize(*quantize(weights, dtype)) for weights in blocks)])
        difference = found.astype(float) - whole
        assert error.most == pytest.approx(np.abs(difference).max(initial=0), rel=1e-6)
        norm = np.sqrt((whole.astype(float) ** 2).sum())
        assert error.relative == pytest.approx(np.sqrt((difference**2).sum()) / norm if norm else 0.0, rel=1e-4, abs=1e-12)
        assert error.most == 0 or dtype != "float32"


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused(dtype, bad):
    with pytest.raises(BundleError, match="a weight is NaN or infinite"):
        quantize(np.array([[1, bad]], np.float32), dtype)


def test_what_float16_cannot_hold_is_refused():
    with pytest.raises(BundleError, match=r"a weight is 70000, more than float16 holds \(65504\); use --dtype int8 or float32"):
        quantize(np.array([[-7e4, 1]], np.float32), "float16")
    assert np.isfinite(dequantize(*quantize(np.array([[-3e38, 1]], np.float32), "int8"))).all()
