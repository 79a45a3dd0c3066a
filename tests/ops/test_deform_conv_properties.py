"""deform_conv against the naive reference for geometries, layouts and coordinates drawn by Hypothesis.

The coordinates are where an error would show: exactly at -1, 0, the last pixel and the size of the image, one
representable number to either side of those, halves, huge, infinite and NaN. NUMDCN_TEST_EXAMPLES sets the number of
examples per property; with CI set they are the same in every run.
"""

import math

import numpy as np
import pytest
from checks import LAYOUTS, special_coordinates
from conv_cases import cases, output_size
from family import DTYPES, check_against_naive
from hypothesis import given
from hypothesis import strategies as st
from test_deform_conv import OPERATOR, make  # noqa: F401 - OPERATOR tells the fixtures what `backend` is


def offsets_to(values, base):
    """Offsets for which base + offset is values, in the dtype of values; next to an integer, the nearest reachable
    number on the same side of it."""
    dtype = values.dtype.type
    base = np.broadcast_to(base, values.shape).astype(dtype)
    with np.errstate(invalid="ignore"):
        offsets = np.where(np.abs(values) > 1e6, values, values - base)
        missed = (base + offsets != values) & ~np.isnan(values)
        whole = np.round(values)
        beside = np.nextafter(whole - base, np.where(values > whole, dtype(np.inf), dtype(-np.inf)))
    return np.where(missed, beside, offsets)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_special_coordinates_are_reached(dtype):
    """The generator of the tests below produces what it claims to, so that they test what they claim to."""
    for size in range(1, 10):
        values = np.concatenate([*special_coordinates(size, dtype), [dtype(np.nan)]])
        for base in range(-9, 30):
            reached = dtype(base) + offsets_to(values, base)
            assert reached.dtype == dtype
            np.testing.assert_allclose(reached, values, rtol=1e-6, atol=40 * np.finfo(dtype).eps)
            small = np.abs(values) < 1e6
            reached, wanted = reached[small], values[small]
            np.testing.assert_array_equal(np.floor(reached), np.floor(wanted))
            np.testing.assert_array_equal(reached == np.round(reached), wanted == np.round(wanted))
            exact = wanted * 2 == np.round(wanted * 2)
            np.testing.assert_array_equal(reached[exact], wanted[exact])


def draw_offsets(case, dtype, odd, nan):
    """Offsets of which a share `odd` lead to special coordinates and a share `nan` to NaN."""

    def offsets(rng, shape):
        out, kernel, stride, dilation = output_size(case), case.kernel, case.stride, case.dilation
        moved = (rng.normal(size=shape) * 2).astype(dtype)
        split = moved.reshape(case.batch, case.offset_groups, *kernel, 2, *out)
        for a in (0, 1):
            finite, infinite = special_coordinates(case.size[a], dtype)
            values = rng.choice(finite, size=split[..., a, :, :].shape)
            values = np.where(rng.random(values.shape) < 0.1, rng.choice(infinite, size=values.shape), values)
            taps, pixels = np.arange(kernel[a]) * dilation[a], np.arange(out[a]) * stride[a] - case.padding[a][0]
            base = taps[:, None, None, None] + pixels[:, None] if a == 0 else taps[:, None, None] + pixels
            special = rng.random(values.shape) < odd
            split[..., a, :, :][special] = offsets_to(values, base)[special]
        moved[rng.random(shape) < nan] = np.nan
        return moved

    return offsets


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    case=cases(),
    odd=st.sampled_from([0.1, 0.7, 1.0]),
    nan=st.sampled_from([0.0, 0.0, 0.01, 0.2]),
    layouts=st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=6, max_size=6),
    seed=st.integers(0, 2**32 - 1),
)
def test_special_coordinates(backend, dtype, case, odd, nan, layouts, seed):
    problem = make(case, dtype, seed, draw_offsets(case, dtype, odd, nan))
    kinds = dict(zip(("x", "offsets", "w", "bias", "mask", "grad_y"), layouts, strict=True))
    check_against_naive(backend, problem.map(lambda name, array: LAYOUTS[kinds[name]](array)))


@pytest.mark.parametrize("dtype", DTYPES)
@given(case=cases(), share=st.sampled_from([0.01, 0.1, 0.5]), seed=st.integers(0, 2**32 - 1))
def test_nan_pixels(backend, dtype, case, share, seed):
    """NaN pixels affect exactly the results that the formulas say."""
    problem = make(case, dtype, seed, draw_offsets(case, dtype, 0.6, 0.0))
    problem["x"][np.random.default_rng(seed).random(problem["x"].shape) < share] = np.nan
    check_against_naive(backend, problem)


@pytest.mark.parametrize("dtype", DTYPES)
@given(case=cases(), seed=st.integers(0, 2**32 - 1), exponent=st.integers(-8, 8))
def test_scaling_by_powers_of_two_is_exact(backend, dtype, case, seed, exponent):
    """The result is linear in x and w, so powers of two pass through without rounding: nothing is added on the way."""
    problem = make(case._replace(bias=False), dtype, seed)
    factor = dtype(math.ldexp(1.0, exponent))
    y = problem.forward(backend)
    assert np.array_equal(problem.having(x=problem["x"] * factor).forward(backend), y * factor)
    assert np.array_equal(problem.having(w=problem["w"] * factor).forward(backend), y * factor)
