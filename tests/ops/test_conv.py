"""conv computes what the formula says: against the naive reference, over sizes, geometries and layouts.

Expressed through other operations, and with non-finite numbers: test_conv_special.
"""

import math

import family
import family_errors
import family_gpu
import family_halves
import numpy as np
import pytest
from checks import LAYOUTS
from conv_cases import (
    WRONG_GEOMETRY,
    WRONG_IMAGES,
    WRONG_WEIGHTS,
    Case,
    assert_forms_of_parameters,
    cases,
    output_size,
    zeros,
)
from family import DTYPES, Problem, assert_images_are_independent, check_against_naive, table
from hypothesis import given
from hypothesis import strategies as st


def terms(problem):
    c_out, per_group, *kernel = problem["w"].shape
    images, channels, *_ = problem["x"].shape
    taps, pixels = math.prod(kernel), math.prod(problem.grad_y.shape[2:])
    sums = max(1, images * pixels)
    return {"y": per_group * taps, "x": c_out // (channels // per_group) * taps, "w": sums, "bias": sums}


OPERATOR = family.Operator(
    "conv", arrays=("x", "w", "bias"), differentiable=("x", "w", "bias"), linear=("x", "w"), length=terms,
    added=("bias",), optional=("bias",),
)  # fmt: skip


def make(case, dtype=np.float64, seed=None):
    """Random arrays for a case, whose offsets and masks are ignored."""
    rng = np.random.default_rng(len(str(case)) if seed is None else seed)
    shapes = {
        "x": (case.batch, case.channels, *case.size),
        "w": (case.c_out, case.channels // case.groups, *case.kernel),
        **({"bias": (case.c_out,)} if case.bias else {}),
    }
    return Problem(
        OPERATOR,
        {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()},
        rng.normal(size=(case.batch, case.c_out, *output_size(case))).astype(dtype),
        case.geometry,
    )


CASES = [
    # one pixel, one channel, images of one row or one column
    Case(size=(1, 1), kernel=(1, 1)),
    Case(size=(1, 1), padding=1, bias=True),
    Case(size=(1, 7), kernel=(1, 3), channels=2, c_out=3, bias=True),
    Case(size=(7, 1), kernel=(3, 2), padding=(1, 1), channels=3, c_out=2),
    Case(size=(7, 5), channels=2, c_out=1, batch=3),
    Case(size=(2, 3), kernel=(5, 5), padding=((3, 1), (2, 4)), channels=4, c_out=5),
    # numbers of channels around vector and tile widths
    Case(channels=1, c_out=3, size=(7, 5), padding=1),
    Case(channels=3, c_out=7, size=(7, 5), kernel=(3, 2), stride=(2, 1), padding=((2, 0), (0, 3)), bias=True),
    Case(channels=7, c_out=8, size=(6, 6), dilation=(2, 1), padding=(1, 0)),
    Case(channels=8, c_out=15, size=(7, 5), padding=1, bias=True),
    Case(channels=15, c_out=16, size=(7, 5), padding=1),
    Case(channels=16, c_out=17, size=(9, 8), kernel=(1, 3)),
    Case(channels=17, c_out=31, size=(7, 5), padding=1, bias=True),
    Case(channels=31, c_out=33, size=(7, 9), kernel=(3, 2), stride=(1, 2), padding=1, bias=True),
    Case(channels=33, c_out=64, size=(6, 7), padding=1),
    Case(channels=64, c_out=70, size=(5, 7), padding=1, bias=True),
    Case(channels=70, c_out=33, size=(7, 5), kernel=(1, 1), bias=True),
    Case(channels=300, c_out=9, size=(6, 7), padding=1),
    Case(channels=260, c_out=140, size=(3, 5), kernel=(1, 3)),
    Case(channels=200, c_out=32, size=(7, 6), kernel=(1, 2)),  # chunks of different lengths, a single panel
    Case(channels=9, c_out=300, size=(5, 4), kernel=(3, 2)),
    # groups, depthwise, and several outputs per channel
    Case(channels=12, c_out=6, size=(7, 5), padding=1, groups=3, bias=True, batch=2),
    Case(33, 6, 4, (5, 4), (3, 2), (2, 1), (1, 0), (2, 1), groups=2),
    Case(channels=64, c_out=64, size=(6, 7), padding=1, groups=32, bias=True),
    Case(channels=48, c_out=36, size=(5, 6), padding=1, groups=12),
    Case(channels=70, c_out=66, size=(5, 6), padding=1, groups=2, bias=True),
    Case(channels=256, c_out=64, size=(6, 5), kernel=(2, 2), groups=2),
    Case(channels=5, c_out=5, size=(7, 5), padding=1, groups=5, bias=True),
    Case(channels=17, c_out=34, size=(7, 5), padding=1, groups=17, bias=True),
    Case(channels=64, c_out=64, size=(9, 8), padding=1, groups=64, batch=2),
    Case(channels=33, c_out=33, size=(7, 5), kernel=(5, 5), padding=2, groups=33),
    Case(channels=280, c_out=280, size=(4, 5), padding=1, groups=280),
    Case(channels=16, c_out=48, size=(7, 5), stride=2, padding=(1, 2), groups=16, bias=True),
    # more output pixels than one tile, batches, and no images at all
    Case(channels=3, c_out=4, size=(40, 41), padding=1, bias=True),
    Case(channels=20, c_out=17, size=(42, 43)),
    Case(channels=8, c_out=16, size=(80, 41), stride=(2, 1), padding=1, batch=3),
    Case(channels=18, c_out=18, size=(40, 41), padding=1, groups=18),
    Case(channels=16, c_out=3, size=(3, 301), kernel=(3, 1), dilation=(1, 3), bias=True),
    Case(channels=3, c_out=2, size=(2, 2), padding=1, batch=33, bias=True),
    Case(channels=3, c_out=4, size=(7, 5), padding=1, batch=0, bias=True),
    Case(channels=4, c_out=4, size=(7, 5), padding=1, batch=0, groups=4),
    # strides and dilations larger than the kernel, pixels that no tap sees, taps and outputs only in the padding
    Case(channels=2, c_out=3, size=(13, 11), stride=(5, 4), padding=1, dilation=(3, 2), bias=True),
    Case(channels=2, c_out=2, size=(4, 4), kernel=(2, 2), padding=((9, 9), (0, 7)), stride=3),
    Case(channels=2, c_out=3, size=(2, 2), padding=7, dilation=7, bias=True),
    Case(channels=20, c_out=18, size=(3, 2), kernel=(1, 1), padding=2, stride=2),
    Case(channels=1, c_out=33, size=(9, 1), kernel=(1, 1), padding=((0, 4), (2, 1))),  # vectors as long as the padding
    Case(channels=4, c_out=4, size=(5, 6), kernel=(7, 1), padding=(3, 0), groups=4),
]
SMOOTH = [
    Case(2, 6, 4, (5, 4), (3, 2), (2, 1), (1, 0), (2, 1), groups=2, bias=True),
    Case(batch=1, channels=18, c_out=17, size=(7, 6), padding=((0, 2), (1, 1)), bias=True),
    Case(batch=2, channels=9, c_out=18, size=(6, 7), padding=1, groups=9, bias=True),
    Case(batch=2, channels=5, c_out=4, size=(6, 7), kernel=(1, 1)),
]
LARGE = [
    Case(2, 33, 40, (33, 31), padding=1, bias=True),
    Case(1, 300, 70, (17, 18), padding=1),
    Case(1, 16, 300, (25, 26), padding=1, bias=True),
    Case(2, 72, 48, (41, 40), padding=1, groups=3),
    Case(2, 37, 74, (120, 121), padding=1, groups=37, bias=True),
    Case(33, 16, 20, (15, 16), padding=1, bias=True),
]


def usual(dtype):
    return make(Case(2, 4, 6, (6, 5), padding=1, groups=2, bias=True), dtype)


class TestFamily(family.Family):
    operator, usual = OPERATOR, staticmethod(usual)
    cases, smooth, large = table(make, CASES), table(make, SMOOTH), table(make, LARGE)


class TestHalfTypes(family_halves.HalfTypes):
    described = TestFamily


class TestErrors(family_errors.Errors):
    operator, usual = OPERATOR, staticmethod(usual)
    wrong = (*WRONG_GEOMETRY, *WRONG_WEIGHTS, *WRONG_IMAGES)


TINY = [
    Case(size=(1, 1), kernel=(1, 1)),
    Case(2, 6, 4, (5, 4), (3, 2), (2, 1), ((1, 0), (0, 2)), (2, 1), groups=2, bias=True),
    Case(channels=9, c_out=5, size=(4, 3), padding=1, bias=True),
    Case(channels=18, c_out=20, size=(3, 3), kernel=(2, 1), groups=2, stride=(1, 2), padding=(0, 1), bias=True),
    Case(channels=3, c_out=6, size=(4, 3), padding=1, groups=3),
    Case(channels=2, c_out=3, size=(2, 2), padding=3, dilation=3),
    Case(channels=2, c_out=3, size=(4, 3), padding=1, batch=0, bias=True),
]


class TestGPU(family_gpu.GPU):
    operator, errors, tf32 = OPERATOR, TestErrors, True
    usual = staticmethod(lambda dtype: make(Case(2, 18, 6, (3, 3), (2, 1), padding=(0, 1), groups=2, bias=True), dtype))
    others = table(make, [Case(2, 4, 6, (3, 3), (2, 3), padding=(0, 1), groups=2, bias=True)])
    full = TestFamily.cases
    cases = table(make, TINY)


def test_a_kernel_larger_than_the_image(backend):
    """The padded image must hold the kernel."""
    x, w = zeros(1, 1, 2, 5), zeros(1, 1, 3, 3)
    with pytest.raises(ValueError, match="padding.*`x`.*2.*3"):
        backend.forward(x, w)
    assert backend.forward(x, w, padding=((1, 0), (0, 0))).shape == (1, 1, 1, 3)


def test_forms_of_parameters(backend):
    assert_forms_of_parameters(backend, usual(np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [case for case in (*LARGE, *CASES) if case.batch > 1], ids=str)
def test_an_image_does_not_depend_on_the_batch(backend, case, dtype):
    assert_images_are_independent(backend, make(case, dtype), ())


# Hypothesis.


@pytest.mark.parametrize("dtype", DTYPES)
@given(case=cases(), seed=st.integers(0, 2**32 - 1), layouts=st.tuples(*(st.sampled_from(sorted(LAYOUTS)),) * 4))
def test_any_geometry(backend, dtype, case, seed, layouts):
    kinds = dict(zip(("x", "w", "bias", "grad_y"), layouts, strict=True))
    check_against_naive(backend, make(case, dtype, seed).map(lambda name, array: LAYOUTS[kinds[name]](array)))


@pytest.mark.parametrize("dtype", DTYPES)
@given(case=cases(), share=st.sampled_from([0.01, 0.1]), seed=st.integers(0, 2**32 - 1))
def test_nan_anywhere(backend, dtype, case, share, seed):
    """NaN in any array affects exactly the results that the formulas say; padded zeros are multiplied as well."""
    rng = np.random.default_rng(seed)
    plain = make(case, dtype, seed)
    for spoilt in ("x", "w", "bias", "grad_y"):
        p = plain.map(
            lambda name, a, spoilt=spoilt: np.where(rng.random(a.shape) < share * (name == spoilt), np.nan, a)
        )
        check_against_naive(backend, p.map(lambda _, array, dtype=dtype: array.astype(dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@given(case=cases(), seed=st.integers(0, 2**32 - 1), exponent=st.integers(-8, 8))
def test_scaling_by_powers_of_two_is_exact(backend, dtype, case, seed, exponent):
    """The result is linear in x and w, so powers of two pass through without rounding: nothing is added on the way."""
    p, factor = make(case._replace(bias=False), dtype, seed), dtype(math.ldexp(1.0, exponent))
    y = p.forward(backend)
    for name in ("x", "w"):
        assert np.array_equal(p.having(**{name: p[name] * factor}).forward(backend), y * factor)
