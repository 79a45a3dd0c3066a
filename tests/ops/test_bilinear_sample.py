"""bilinear_sample computes what the formulas say: against the naive reference, over sizes, layouts and coordinates.

Rules for edges and non-finite numbers, and other samplers expressed through this one: test_bilinear_sample_special.
"""

import math
from typing import NamedTuple

import family
import family_errors
import family_gpu
import family_halves
import numpy as np
import pytest
from checks import LAYOUTS, said, special_coordinates
from family import DTYPES, Problem, assert_images_are_independent, check_against_naive, table
from hypothesis import given
from hypothesis import strategies as st


def terms(problem):
    points = math.prod(problem["points"].shape[1:-1])
    return {"y": 4, "x": max(4, points), "points": 4 * problem["x"].shape[1]}


OPERATOR = family.Operator(
    "bilinear_sample", arrays=("x", "points"), differentiable=("x", "points"), linear=("x",), length=terms,
    any_rank=("points",), coordinates=("points",),
)  # fmt: skip


class Case(NamedTuple):
    """The sizes of a problem, without its data."""

    batch: int = 1
    channels: int = 1
    size: tuple = (5, 6)
    points: tuple = (9,)  # the axes of points between the first and the last
    spread: float = 2.0  # points may be this many pixels outside the image

    def __str__(self):
        size, points = ("x".join(map(str, axes)) for axes in (self.size, self.points))
        return f"n{self.batch}-c{self.channels}-{size}-at{points or 'one'}-spread{self.spread}"


def make(case, dtype=np.float64, seed=None, draw=None):
    """Random arrays; points uniform over the image and `spread` pixels around it, or by `draw(rng, shape)`."""
    rng = np.random.default_rng(len(str(case)) if seed is None else seed)
    shape, size = (case.batch, *case.points, 2), np.array(case.size)
    points = rng.uniform(-1 - case.spread, size + case.spread, size=shape) if draw is None else draw(rng, shape)
    return Problem(
        OPERATOR,
        {"x": rng.normal(size=(case.batch, case.channels, *case.size)).astype(dtype), "points": points.astype(dtype)},
        rng.normal(size=(case.batch, case.channels, *case.points)).astype(dtype),
        {},
    )


def between_pixels(case):
    """Points away from the kinks, some of them outside."""

    def draw(rng, shape):
        return rng.integers(-3, np.array(case.size) + 2, size=shape) + rng.uniform(0.1, 0.9, size=shape)

    return draw


def odd_points(case, dtype, odd, nan):
    """Points with a share `odd` of special coordinates and a share `nan` of NaN."""

    def draw(rng, shape):
        points = (rng.normal(size=shape) * 3).astype(dtype)
        for axis in (0, 1):
            finite, infinite = special_coordinates(case.size[axis], dtype)
            values = rng.choice(finite, size=shape[:-1])
            values = np.where(rng.random(shape[:-1]) < 0.05, rng.choice(infinite, size=shape[:-1]), values)
            points[..., axis] = np.where(rng.random(shape[:-1]) < odd, values, points[..., axis])
        return np.where(rng.random(shape) < nan, np.nan, points)

    return draw


CASES = [
    Case(size=(1, 1)),
    Case(size=(1, 1), points=(), batch=3),
    Case(size=(1, 9), channels=7, points=(2, 3)),
    Case(size=(9, 1), channels=8, points=(1, 2, 3), batch=2),
    Case(size=(2, 2), channels=2, points=(33,)),
    *(Case(channels=c, points=(5, 4), batch=1 + c % 2) for c in (1, 3, 7, 8, 15, 16, 17, 31, 33, 64, 70, 300)),
    *(Case(channels=5, points=(p,), spread=0.5) for p in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65)),
    Case(batch=2, channels=3, size=(40, 41), points=(37, 43)),
    Case(batch=2, channels=20, size=(7, 6), points=(999,)),
    Case(channels=70, size=(3, 4), points=(301,)),
    Case(channels=3, size=(64, 3), points=(2, 3, 2, 4, 2)),
    Case(channels=5, points=(100,), spread=40.0),
    Case(channels=5, points=(100,), spread=-1.0),
    Case(batch=33, channels=2, size=(2, 3), points=(4,)),
    Case(batch=2, channels=3, points=(0,)),
    Case(batch=2, channels=3, points=(4, 0, 2)),
    Case(batch=0, channels=3, points=(4,)),
    Case(batch=0, channels=3, points=()),
]
SMOOTH = [
    Case(batch=2, channels=3, points=(4, 5)),
    Case(channels=17, size=(1, 4), points=(9,)),
    Case(channels=1, size=(1, 1), points=(20,)),
    Case(batch=2, channels=9, size=(7, 2), points=()),
]
LARGE = [
    Case(batch=2, channels=40, size=(50, 51), points=(150, 151)),
    Case(batch=1, channels=3, size=(120, 121), points=(300011,)),
    Case(batch=1, channels=300, size=(20, 21), points=(5000,)),
    Case(batch=17, channels=16, size=(20, 21), points=(50, 81)),
    Case(batch=1, channels=64, size=(2, 2), points=(40000,)),  # many points per pixel
]
WILD = [Case(2, c, size, (157,)) for c in (1, 3, 17, 40) for size in ((1, 1), (1, 7), (7, 1), (6, 5))]


def usual(dtype):
    return make(Case(batch=3, channels=5, size=(6, 7), points=(4, 2), spread=0.5), dtype)


def zeros(*shape):
    return np.zeros(shape, np.float32)


class TestFamily(family.Family):
    operator, usual = OPERATOR, staticmethod(usual)
    cases, large = table(make, CASES), table(make, LARGE)
    smooth = table(lambda case, dtype: make(case, dtype, draw=between_pixels(case)), SMOOTH)
    wild = table(lambda case, dtype: make(case, dtype, draw=odd_points(case, dtype, 0.7, 0.1)), WILD)


class TestHalfTypes(family_halves.HalfTypes):
    described = TestFamily


class TestErrors(family_errors.Errors):
    operator, usual = OPERATOR, staticmethod(usual)
    wrong = (
        ("x", zeros(3, 0, 6, 7), ValueError, said(3, 0, 6, 7), "1|positive|empty"),
        ("x", zeros(3, 5, 0, 7), ValueError, said(3, 5, 0, 7), "1|positive|empty"),
        ("x", zeros(3, 5, 6, 0), ValueError, said(3, 5, 6, 0), "1|positive|empty"),
        ("points", zeros(2, 4, 2), ValueError, said(2, 4, 2), "3"),
        ("points", zeros(0, 4, 2), ValueError, said(0, 4, 2), "3"),
        ("points", zeros(1, 4, 2), ValueError, said(1, 4, 2), "3"),
        ("points", zeros(3, 4, 3), ValueError, said(3, 4, 3), "2"),
        ("points", zeros(3, 4, 1), ValueError, said(3, 4, 1), "2"),
        ("points", zeros(3, 4, 0), ValueError, said(3, 4, 0), "2"),
        ("points", zeros(3, 2, 4), ValueError, said(3, 2, 4), "2"),
        ("points", zeros(3), ValueError, r"\(3,?\)", "2"),
        ("points", zeros(2), ValueError, r"\(2,?\)", "N"),
        ("points", zeros(), ValueError, r"\(\)", "2"),
    )


TINY = [
    Case(size=(1, 1), points=(), batch=2),
    Case(channels=9, size=(3, 4), points=(2, 3), spread=0.5),
    Case(batch=2, channels=2, size=(4, 1), points=(7,)),
    Case(batch=2, channels=3, points=(0,)),
    Case(batch=0, channels=3, points=(4,)),
]
ODD = Case(batch=2, channels=5, size=(4, 5), points=(24,))  # points on borders and pixels, huge, infinite and NaN


def border_points(case, dtype):
    """Points at and next to the borders, along one axis."""

    def draw(rng, shape):
        points = rng.uniform(0.1, 0.9, shape)
        for n, axis in enumerate((0, 1)):
            edges = np.array([-1, 0, case.size[axis] - 1, case.size[axis]], dtype)
            around = [edges, *(np.nextafter(edges, dtype(side)) for side in (-np.inf, np.inf))]
            points[:, 12 * n : 12 * n + 12, axis] = np.concatenate(around)
        return points

    return draw


class TestGPU(family_gpu.GPU):
    operator = OPERATOR
    usual = staticmethod(lambda dtype: make(Case(batch=2, channels=5, size=(3, 4), points=(3, 2), spread=0.5), dtype))
    full = TestFamily.cases | TestFamily.wild
    cases = table(make, TINY)
    cases |= table(lambda case, dtype: make(case, dtype, draw=odd_points(case, dtype, 0.8, 0.05)), [ODD])
    cases["borders"] = lambda dtype: make(ODD, dtype, draw=border_points(ODD, dtype))
    errors = TestErrors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [2, 3, 7, 33])
@pytest.mark.parametrize("channels", [1, 3, 17, 40, 64, 128, 300])
def test_an_image_does_not_depend_on_the_batch(backend, channels, batch, dtype):
    assert_images_are_independent(backend, make(Case(batch, channels, points=(23,)), dtype), ("points",))


# Hypothesis: points where errors would show.


@st.composite
def cases(draw):
    return Case(
        batch=draw(st.integers(0, 3)),
        channels=draw(st.sampled_from([1, 1, 2, 3, 4, 7, 8, 9, 16, 17, 40])),
        size=draw(st.tuples(st.integers(1, 9), st.integers(1, 9))),
        points=tuple(draw(st.lists(st.sampled_from([1, 1, 2, 3, 7, 20, 0]), max_size=3))),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    case=cases(),
    odd=st.sampled_from([0.1, 0.7, 1.0]),
    nan=st.sampled_from([0.0, 0.0, 0.01, 0.2]),
    layouts=st.tuples(*(st.sampled_from(sorted(LAYOUTS)),) * 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_special_coordinates(backend, dtype, case, odd, nan, layouts, seed):
    kinds = dict(zip(("x", "points", "grad_y"), layouts, strict=True))
    problem = make(case, dtype, seed, odd_points(case, dtype, odd, nan))
    check_against_naive(backend, problem.map(lambda name, array: LAYOUTS[kinds[name]](array)))


@pytest.mark.parametrize("dtype", DTYPES)
@given(case=cases(), share=st.sampled_from([0.01, 0.1, 0.5]), seed=st.integers(0, 2**32 - 1))
def test_nan_pixels(backend, dtype, case, share, seed):
    """NaN pixels affect exactly the results that the formulas say."""
    problem = make(case, dtype, seed, odd_points(case, dtype, 0.6, 0.0))
    problem["x"][np.random.default_rng(seed).random(problem["x"].shape) < share] = np.nan
    check_against_naive(backend, problem)


@pytest.mark.parametrize("dtype", DTYPES)
@given(case=cases(), seed=st.integers(0, 2**32 - 1), exponent=st.integers(-8, 8))
def test_scaling_by_powers_of_two_is_exact(backend, dtype, case, seed, exponent):
    """y is linear in x, so powers of two pass through without rounding. The same holds for the gradients in grad_y."""
    problem, factor = make(case, dtype, seed), dtype(math.ldexp(1.0, exponent))
    y, g = problem.forward(backend), problem.backward(backend)
    assert np.array_equal(problem.having(x=problem["x"] * factor).forward(backend), y * factor)
    scaled = problem.having(grad_y=problem.grad_y * factor).backward(backend)
    assert np.array_equal(scaled.x, g.x * factor) and np.array_equal(scaled.points, g.points * factor)


@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_points_are_independent(backend, case, seed):
    """Permuted points give permuted results, bit for bit."""
    problem = make(case._replace(points=(23,)), np.float32, seed)
    y, g = problem.forward(backend), problem.backward(backend)
    order = np.random.default_rng(seed).permutation(23)
    mixed = problem.having(points=problem["points"][:, order], grad_y=problem.grad_y[:, :, order])
    assert np.array_equal(mixed.forward(backend), y[:, :, order])
    assert np.array_equal(mixed.backward(backend).points, g.points[:, order])
