"""dcnv3 computes what the formulas say: against the naive reference, over sizes, layouts and offsets.

Rules for edges and numbers that are not finite, and what it is in terms of other operators: test_dcnv3_special.
"""

import math

import dcn_cases
import family
import family_errors
import family_gpu
import family_halves
import numpy as np
import pytest
from checks import LAYOUTS, said
from dcn_cases import CASES, LARGE, SMOOTH, WILD, Case, cases, odd_positions
from family import DTYPES, Problem, assert_images_are_independent, check_against_naive, table
from hypothesis import given
from hypothesis import strategies as st


def terms(problem):
    points, depth = problem["mask"].shape[3], problem["x"].shape[3]
    pixels = math.prod(problem["mask"].shape[1:3])
    return {"y": 4 * points, "x": max(4, points * pixels), "offsets": 4 * depth, "mask": 4 * depth}


OPERATOR = family.Operator(
    "dcnv3", arrays=("x", "offsets", "mask"), differentiable=("x", "offsets", "mask"), linear=("x", "mask"),
    length=terms, coordinates=("offsets",),
)  # fmt: skip


def make(case, dtype=np.float64, seed=None, draw=None):
    x, offsets, mask, grad_y = dcn_cases.arrays(case, dtype, seed, draw)
    return Problem(OPERATOR, {"x": x, "offsets": offsets, "mask": mask}, grad_y, case.options)


def usual(dtype):
    return make(dcn_cases.USUAL, dtype)


def zeros(*shape):
    return np.zeros(shape, np.float32)


class TestFamily(family.Family):
    operator, usual = OPERATOR, staticmethod(usual)
    cases, large = table(make, CASES), table(make, LARGE)
    smooth = table(lambda case, dtype: make(case, dtype, draw=dcn_cases.between_pixels(case)), SMOOTH)
    wild = table(lambda case, dtype: make(case, dtype, draw=odd_positions(case, dtype, 0.7, 0.1)), WILD)


# x (3, 4, 5, 8), kernel (2, 3), padding (1, 0): y (3, 5, 3, 8), offsets (3, 5, 3, 24), mask (3, 5, 3, 12)
class TestHalfTypes(family_halves.HalfTypes):
    described = TestFamily


class TestErrors(family_errors.Errors):
    operator, usual = OPERATOR, staticmethod(usual)
    wrong = (
        *dcn_cases.WRONG_PARAMETERS,
        *(("x", zeros(*shape), ValueError, said(*shape), "empty") for shape in ((3, 0, 5, 8), (3, 4, 5, 0))),
        ("x", zeros(3, 4, 5, 7), ValueError, said(3, 4, 5, 7), "divisor"),
        ("x", zeros(3, 4, 2, 8), ValueError, "2 pixels", "at least 3"),
        ("offsets", zeros(3, 5, 3, 22), ValueError, said(3, 5, 3, 22), "24"),
        ("offsets", zeros(3, 5, 4, 24), ValueError, said(3, 5, 4, 24), said(3, 5, 3, 24)),
        ("offsets", zeros(2, 5, 3, 24), ValueError, said(2, 5, 3, 24), said(3, 5, 3, 24)),
        ("mask", zeros(3, 5, 3, 11), ValueError, said(3, 5, 3, 11), "multiple of the 6 points"),
        ("mask", zeros(3, 5, 3, 0), ValueError, said(3, 5, 3, 0), "multiple of the 6 points"),
        ("mask", zeros(3, 4, 3, 12), ValueError, said(3, 4, 3, 12), said(3, 5, 3, 12)),
        ("mask", zeros(1, 5, 3, 12), ValueError, said(1, 5, 3, 12), said(3, 5, 3, 12)),
    )


class TestGPU(family_gpu.GPU):
    operator = OPERATOR
    usual = staticmethod(lambda dtype: make(dcn_cases.TINY, dtype))
    full = TestFamily.cases | TestFamily.wild
    cases = table(make, [Case(size=(1, 1), kernel=2), Case(size=(3, 2), remove_center=True, depth=9), CASES[-1]])
    odd = Case(2, 2, 3, (2, 3), kernel=2, padding=1)
    cases |= table(lambda case, dtype: make(case, dtype, draw=odd_positions(case, dtype, 0.8, 0.05)), [odd])
    errors = TestErrors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [2, 3, 7])
@pytest.mark.parametrize("groups, depth", [(1, 1), (2, 3), (4, 16), (3, 32), (1, 71)])
def test_an_image_does_not_depend_on_the_batch(backend, groups, depth, batch, dtype):
    assert_images_are_independent(backend, make(Case(batch, groups, depth), dtype), ("offsets", "mask"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_group_does_not_depend_on_the_others(backend, dtype):
    """The bits of a group's results are those of a call with the group alone."""
    whole = make(Case(2, 4, 5), dtype)
    y, g = whole.forward(backend), whole.backward(backend)
    for group in range(4):
        one = {
            name: np.split(array, 4, axis=3)[group] for name, array in (*whole.arrays.items(), ("grad_y", whole.grad_y))
        }
        alone = whole.having(**one)
        assert np.array_equal(alone.forward(backend), np.split(y, 4, axis=3)[group])
        for name, array in alone.backward(backend)._asdict().items():
            assert np.array_equal(array, np.split(getattr(g, name), 4, axis=3)[group]), name


def test_forms_of_parameters(backend):
    dcn_cases.assert_forms_of_parameters(backend, make(Case(2, 2, 3, kernel=(3, 2), padding=(1, 0)), np.float32))


# Hypothesis: offsets where errors would show.


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    case=cases(),
    odd=st.sampled_from([0.1, 0.7, 1.0]),
    nan=st.sampled_from([0.0, 0.0, 0.01, 0.2]),
    layouts=st.tuples(*(st.sampled_from(sorted(LAYOUTS)),) * 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_special_offsets(backend, dtype, case, odd, nan, layouts, seed):
    kinds = dict(zip(("x", "offsets", "mask", "grad_y"), layouts, strict=True))
    problem = make(case, dtype, seed, odd_positions(case, dtype, odd, nan))
    check_against_naive(backend, problem.map(lambda name, array: LAYOUTS[kinds[name]](array)))


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    case=cases(),
    name=st.sampled_from(["x", "mask"]),
    share=st.sampled_from([0.01, 0.1, 0.5]),
    seed=st.integers(0, 2**32 - 1),
)
def test_nan_among_pixels_and_weights(backend, dtype, case, name, share, seed):
    """They affect exactly the results that the formulas say."""
    problem = make(case, dtype, seed, odd_positions(case, dtype, 0.6, 0.0))
    problem[name][np.random.default_rng(seed).random(problem[name].shape) < share] = np.nan
    check_against_naive(backend, problem)


@pytest.mark.parametrize("dtype", DTYPES)
@given(case=cases(), seed=st.integers(0, 2**32 - 1), exponent=st.integers(-8, 8))
def test_scaling_by_powers_of_two_is_exact(backend, dtype, case, seed, exponent):
    """y is linear in x and in the mask, the gradients are in grad_y: powers of two pass through without rounding."""
    problem, factor = make(case, dtype, seed), dtype(math.ldexp(1.0, exponent))
    y, g = problem.forward(backend), problem.backward(backend)
    for name in ("x", "mask"):
        assert np.array_equal(problem.having(**{name: problem[name] * factor}).forward(backend), y * factor)
    scaled = problem.having(grad_y=problem.grad_y * factor).backward(backend)
    for name, array in scaled._asdict().items():
        assert np.array_equal(array, getattr(g, name) * factor), name
