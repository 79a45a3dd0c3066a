"""ms_deform_attn computes what the formulas say: against the naive reference, over levels, points, layouts and
locations.

Rules for edges and numbers that are not finite, and what it is in terms of other operators: test_ms_deform_attn_special.
"""

import math
from typing import NamedTuple

import family
import family_errors
import family_gpu
import family_halves
import numpy as np
import pytest
from checks import LAYOUTS, assert_message, said, special_coordinates
from family import DTYPES, Problem, assert_images_are_independent, assert_same, check_against_naive, table
from hypothesis import given
from hypothesis import strategies as st


def terms(problem):
    queries, depth = problem["sampling_locations"].shape[1], problem["value"].shape[3]
    points = math.prod(problem["attention_weights"].shape[3:])
    return {
        "y": 4 * points, "value": max(4, queries * points), "sampling_locations": 4 * depth, "attention_weights": 4 * depth,
    }  # fmt: skip


OPERATOR = family.Operator(
    "ms_deform_attn", arrays=("value", "sampling_locations", "attention_weights"),
    differentiable=("value", "sampling_locations", "attention_weights"), linear=("value", "attention_weights"), length=terms,
    any_rank=("sampling_locations",), coordinates=("sampling_locations",), keywords=("sampling_locations", "attention_weights"),
)  # fmt: skip
PYRAMID = ((8, 4), (4, 2), (2, 1))


class Case(NamedTuple):
    """The sizes of a problem, without its data."""

    batch: int = 1
    heads: int = 1
    depth: int = 1  # channels of a head
    levels: tuple = PYRAMID
    points: object = 2  # of a level; a tuple: of each
    queries: int = 9
    spread: float = 0.5  # locations may be this fraction of the level outside

    def __str__(self):
        levels = "+".join(f"{height}x{width}" for height, width in self.levels)
        return f"n{self.batch}-q{self.queries}-m{self.heads}x{self.depth}-{levels}-p{self.points}-spread{self.spread}"

    @property
    def counts(self):
        return self.points if isinstance(self.points, tuple) else (self.points,) * len(self.levels)

    @property
    def size_of_points(self):
        """(height, width) of the level of each point."""
        return np.repeat(np.array(self.levels), self.counts, axis=0)

    @property
    def point_axes(self):
        return (sum(self.points),) if isinstance(self.points, tuple) else (len(self.levels), self.points)


def make(case, dtype=np.float64, seed=None, draw=None):
    """Random arrays; locations are multiples of 2^-14, whose products with sizes are exact in float32 (see dcn_cases), or
    those of the positions in pixels, y first, that `draw(rng, shape)` gives."""
    rng = np.random.default_rng(len(str(case)) if seed is None else seed)
    shape = (case.batch, case.queries, case.heads, sum(case.counts), 2)
    if draw is None:
        locations = np.round(rng.uniform(-case.spread, 1 + case.spread, size=shape) * 2**14) / 2**14
    else:
        locations = ((draw(rng, shape) + 0.5) / case.size_of_points)[..., ::-1]
    rows = (*shape[:3], *case.point_axes)
    pixels = sum(height * width for height, width in case.levels)
    params = {"spatial_shapes": case.levels}
    if isinstance(case.points, tuple):
        params["points_per_level"] = case.points
    arrays = {
        "value": rng.normal(size=(case.batch, pixels, case.heads, case.depth)).astype(dtype),
        "sampling_locations": locations.reshape(*rows, 2).astype(dtype),
        "attention_weights": rng.normal(size=rows).astype(dtype),
    }
    return Problem(OPERATOR, arrays, rng.normal(size=(*shape[:2], case.heads * case.depth)).astype(dtype), params)


def between_pixels(case):
    """Positions away from the kinks by more than a finite difference in locations moves them, some of them outside."""

    def draw(rng, shape):
        return rng.integers(-3, case.size_of_points + 2, size=shape) + rng.uniform(0.2, 0.8, size=shape)

    return draw


def odd_positions(case, dtype, odd, nan):
    """Positions with a share `odd` of special coordinates and a share `nan` of NaN."""

    def draw(rng, shape):
        positions = np.round(rng.normal(size=shape) * 3 * 1024) / 1024
        for t, size in enumerate(case.size_of_points):
            for axis in (0, 1):
                finite, infinite = special_coordinates(size[axis], dtype)
                values = rng.choice(finite, size=shape[:3]).astype(np.float64)
                values = np.where(rng.random(shape[:3]) < 0.05, rng.choice(infinite, size=shape[:3]), values)
                chosen = rng.random(shape[:3]) < odd
                positions[..., t, axis] = np.where(chosen, values, positions[..., t, axis])
        return np.where(rng.random(shape) < nan, np.nan, positions)

    return draw


ONE = ((1, 1),)
CASES = [
    Case(levels=ONE, points=1, queries=1),
    Case(levels=ONE, points=1, queries=1, batch=3, depth=3),
    Case(levels=((1, 9), (9, 1)), points=1, heads=2, depth=4),
    Case(levels=((5, 7),), points=3, heads=2, depth=16),
    *(Case(depth=d, heads=1 + d % 3, batch=1 + d % 2) for d in (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 71)),
    *(Case(heads=m, depth=8, points=4) for m in (4, 8)),
    *(Case(points=p, queries=q, depth=5) for p, q in ((1, 2), (3, 5), (5, 3), (8, 33), (9, 1))),
    Case(levels=((8, 8), (4, 4), (2, 2)), points=(3, 6, 3), heads=2, depth=4),
    Case(levels=((7, 5), (4, 3), (2, 2), (1, 1)), points=(1, 4, 2, 1), heads=3, depth=2, batch=2),
    Case(levels=((13, 11), (3, 300)), heads=2, depth=8, queries=70, batch=2),
    Case(levels=((2, 2), (16, 16)), points=(5, 1), queries=40, spread=20.0, depth=3),
    Case(levels=((1, 1),) * 6, points=1, heads=2, depth=3),
    Case(levels=((40, 9), (3, 5)), points=(60, 3), queries=600, depth=5),  # many bands; a tile has several chunks
    Case(levels=((4, 4), (2, 2)), points=(600, 1), queries=3, depth=3),  # one query has more points than a chunk
    Case(queries=0, heads=2, depth=3),
    Case(batch=0, heads=2, depth=3),
    Case(batch=17, heads=1, depth=4, queries=3),
]
SMOOTH = [
    Case(batch=2, heads=2, depth=3, levels=((5, 4), (2, 3)), queries=4),
    Case(levels=ONE, depth=5, points=7),
    Case(levels=((1, 4), (4, 1), (3, 3)), points=(1, 3, 2), heads=3, depth=1),
]
LARGE = [
    Case(batch=2, heads=4, depth=16, levels=((30, 31), (15, 16)), points=4, queries=1200),
    Case(heads=1, depth=32, levels=((60, 61),), points=4, queries=3000),
    Case(heads=8, depth=32, levels=((40, 40), (20, 20), (10, 10)), points=4, queries=300),
    Case(batch=3, heads=2, depth=71, levels=((9, 9), (4, 5)), points=(3, 1), queries=500),
]
POWERS = ((1, 1), (1, 8), (8, 1), (4, 2))  # sizes by which positions are divided exactly
WILD = [
    Case(2, m, d, levels, p, 23)
    for m, d in ((1, 1), (2, 3), (2, 16))
    for levels, p in ((POWERS, 2), (POWERS[:1], 3), (POWERS[2:], (1, 4)))
]


def usual(dtype):
    return make(Case(batch=3, heads=2, depth=5, levels=((4, 6), (2, 3)), points=3, queries=4), dtype)


def zeros(*shape):
    return np.zeros(shape, np.float32)


class TestFamily(family.Family):
    operator, usual = OPERATOR, staticmethod(usual)
    cases, large = table(make, CASES), table(make, LARGE)
    smooth = table(lambda case, dtype: make(case, dtype, draw=between_pixels(case)), SMOOTH)
    wild = table(lambda case, dtype: make(case, dtype, draw=odd_positions(case, dtype, 0.7, 0.1)), WILD)


# value (3, 30, 2, 5), sampling_locations (3, 4, 2, 2, 3, 2), attention_weights (3, 4, 2, 2, 3), y (3, 4, 10)
class TestHalfTypes(family_halves.HalfTypes):
    described = TestFamily


class TestErrors(family_errors.Errors):
    operator, usual = OPERATOR, staticmethod(usual)
    wrong = (
        *(("value", zeros(*shape), ValueError, said(*shape), "empty") for shape in ((3, 30, 0, 5), (3, 30, 2, 0))),
        *(("value", zeros(3, s, 2, 5), ValueError, f"S = {s} pixels", "expected 30") for s in (29, 31, 24)),
        ("sampling_locations", zeros(3, 4, 2, 3, 3, 2), ValueError, "L = 3 levels", "L = 2"),
        ("sampling_locations", zeros(3, 4, 2, 2, 0, 2), ValueError, "P = 0 points", "P of at least 1"),
        ("sampling_locations", zeros(3, 4, 2, 2, 3, 3), ValueError, said(3, 4, 2, 2, 3, 3), "x and y last"),
        (
            "sampling_locations",
            zeros(3, 4, 2, 6, 2),
            ValueError,
            said(3, 4, 2, 6, 2),
            "6 axes.* points_per_level|6 axes",
        ),
        ("sampling_locations", zeros(3, 4, 1, 2, 3, 2), ValueError, said(3, 4, 1, 2, 3, 2), said(3, 4, 2, 2, 3, 2)),
        ("sampling_locations", zeros(2, 4, 2, 2, 3, 2), ValueError, said(2, 4, 2, 2, 3, 2), said(3, 4, 2, 2, 3, 2)),
        ("attention_weights", zeros(3, 4, 2, 2, 2), ValueError, said(3, 4, 2, 2, 2), said(3, 4, 2, 2, 3)),
        ("attention_weights", zeros(3, 5, 2, 2, 3), ValueError, said(3, 5, 2, 2, 3), said(3, 4, 2, 2, 3)),
        ("attention_weights", zeros(3, 4, 2, 6), ValueError, said(3, 4, 2, 6), said(3, 4, 2, 2, 3)),
        *(("spatial_shapes", value, ValueError, r"\(\)|\[\]", "at least one level") for value in ((), [])),
        *(
            ("spatial_shapes", value, ValueError, came, "pair")
            for value, came in ((((4, 6, 1), (2, 3)), said(4, 6, 1)), ([[4], [2]], r"\(4,\)"))
        ),
        ("spatial_shapes", np.zeros((2, 3), int), ValueError, said(0, 0, 0), "pair"),
        ("spatial_shapes", np.array([4, 6]), ValueError, r"\(2,\)", r"\(L, 2\)"),
        *(("spatial_shapes", ((4, 6), (size, 3)), ValueError, said(size), "at least 1") for size in (0, -1)),
        *(
            ("spatial_shapes", ((4, 6), (size, 3)), TypeError, "float|bool|str|None", "int")
            for size in (2.0, True, "2", None)
        ),
        ("spatial_shapes", np.array([[4.0, 6.0], [2.0, 3.0]]), TypeError, "float64", "integer array"),
        *(
            ("spatial_shapes", value, TypeError, "int|None|str|float|object", "pairs")
            for value in (30, None, "4x6", 1.5)
        ),
        ("spatial_shapes", ((4, 6), 3), TypeError, "3", "pair"),
        ("spatial_shapes", ((4, 6), (2, 3), (1, 1)), ValueError, r"\(\(4, 6\), \(2, 3\), \(1, 1\)\)", "expected 31"),
        ("points_per_level", (3, 3), ValueError, said(3, 4, 2, 2, 3, 2), "5 axes"),
        *(
            ("points_per_level", value, TypeError, "int|str|float", "one int for each level")
            for value in (3, "33", 1.5)
        ),
        *(("points_per_level", (3, count), TypeError, "float|None|bool", "int") for count in (3.0, None, True)),
        *(("points_per_level", (3, count), ValueError, said(count), "at least 1") for count in (0, -3)),
        ("points_per_level", np.array([3.0, 3.0]), TypeError, "float64", "int"),
    )

    def test_wrong_points_per_level(self, backend):
        """Of the form with one axis of points."""
        p = make(Case(levels=((4, 6), (2, 3)), points=(2, 3)), np.float32)
        for counts, came, wanted in (
            ((2, 2), "T = 5", "4"),
            ((2, 3, 1), said(2, 3, 1), "2 numbers"),
            ((5,), "5", "2 numbers"),
        ):
            for run in (p._replace(params={**p.params, "points_per_level": counts}),):
                for direction in (run.forward, run.backward):
                    with pytest.raises(ValueError, match="points_per_level") as raised:
                        direction(backend)
                    assert_message(raised, "points_per_level", came, wanted)


class TestGPU(family_gpu.GPU):
    operator = OPERATOR
    usual = staticmethod(lambda dtype: make(Case(2, 2, 3, ((2, 3), (1, 2)), 2, 3), dtype))
    full = TestFamily.cases | TestFamily.wild
    cases = table(make, [CASES[0], Case(levels=PYRAMID[1:], points=(1, 2), depth=9, queries=3), *CASES[-3:-1]])
    odd = Case(2, 1, 3, POWERS[1:], 1, 9)
    cases |= table(lambda case, dtype: make(case, dtype, draw=odd_positions(case, dtype, 0.8, 0.05)), [odd])
    errors = TestErrors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [2, 3, 7])
@pytest.mark.parametrize("heads, depth", [(1, 1), (2, 3), (4, 16), (3, 32), (1, 71)])
def test_an_image_does_not_depend_on_the_batch(backend, heads, depth, batch, dtype):
    problem = make(Case(batch, heads, depth), dtype)
    assert_images_are_independent(backend, problem, ("sampling_locations", "attention_weights"))


# Forms of the arguments.


@pytest.mark.parametrize("dtype", DTYPES)
@given(queries=st.integers(0, 20), points=st.integers(1, 5), heads=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_equal_points_in_both_forms(backend, dtype, queries, points, heads, seed):
    """`points_per_level=(P,)*L` with one axis of points is the form with two, bit for bit."""
    two = make(Case(2, heads, 5, PYRAMID, points, queries), dtype, seed)
    flat = (2, queries, heads, 3 * points)
    one = two.having(
        sampling_locations=two["sampling_locations"].reshape(*flat, 2),
        attention_weights=two["attention_weights"].reshape(flat),
    )
    one = one._replace(params={**two.params, "points_per_level": (points,) * 3})
    assert_same(one.forward(backend), two.forward(backend))
    for name, array in one.backward(backend)._asdict().items():
        assert np.array_equal(array.reshape(two[name].shape), getattr(two.backward(backend), name)), name


SHAPES = {
    "lists": lambda s: [list(size) for size in s],
    "int32": lambda s: np.array(s, np.int32),
    "uint8, strided": lambda s: np.array(s, np.uint8).repeat(2, axis=0)[::2],
    "rows": lambda s: list(np.array(s)),
    "numbers of NumPy": lambda s: [tuple(map(np.int64, size)) for size in s],
}


@pytest.mark.parametrize("form", SHAPES)
def test_forms_of_spatial_shapes(backend, form):
    p = make(Case(levels=((4, 6), (2, 3)), points=(2, 3), depth=3), np.float32)
    params = {
        "spatial_shapes": SHAPES[form](p.params["spatial_shapes"]),
        "points_per_level": SHAPES[form](((2, 3),))[0],
    }
    again = p._replace(params=params)
    assert_same(again.forward(backend), p.forward(backend))
    assert_same(again.backward(backend), p.backward(backend))


# Hypothesis: locations where errors would show.


@st.composite
def cases(draw):
    sizes = st.sampled_from([1, 1, 2, 4, 8])
    levels = tuple(draw(st.lists(st.tuples(sizes, sizes), min_size=1, max_size=4)))
    unequal = tuple(draw(st.integers(1, 4)) for _ in levels)
    return Case(
        batch=draw(st.integers(0, 3)),
        heads=draw(st.sampled_from([1, 1, 2, 3, 4])),
        depth=draw(st.sampled_from([1, 2, 3, 4, 8, 16, 17, 32])),
        levels=levels,
        points=draw(st.sampled_from([1, 2, 4, unequal])),
        queries=draw(st.sampled_from([0, 1, 2, 7, 20])),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    case=cases(),
    odd=st.sampled_from([0.1, 0.7, 1.0]),
    nan=st.sampled_from([0.0, 0.0, 0.01, 0.2]),
    layouts=st.tuples(*(st.sampled_from(sorted(LAYOUTS)),) * 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_special_locations(backend, dtype, case, odd, nan, layouts, seed):
    kinds = dict(zip((*OPERATOR.arrays, "grad_y"), layouts, strict=True))
    problem = make(case, dtype, seed, odd_positions(case, dtype, odd, nan))
    check_against_naive(backend, problem.map(lambda name, array: LAYOUTS[kinds[name]](array)))


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    case=cases(),
    name=st.sampled_from(["value", "attention_weights"]),
    share=st.sampled_from([0.01, 0.1, 0.5]),
    seed=st.integers(0, 2**32 - 1),
)
def test_nan_among_pixels_and_weights(backend, dtype, case, name, share, seed):
    """They affect exactly the results that the formulas say."""
    problem = make(case, dtype, seed, odd_positions(case, dtype, 0.6, 0.0))
    problem[name][np.random.default_rng(seed).random(problem[name].shape) < share] = np.nan
    check_against_naive(backend, problem)


@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_queries_are_independent(backend, case, seed):
    """Permuted queries give permuted results, bit for bit."""
    problem = make(case._replace(queries=23), np.float32, seed)
    y, g = problem.forward(backend), problem.backward(backend)
    order = np.random.default_rng(seed).permutation(23)
    mixed = problem.map(lambda name, array: array if name == "value" else array[:, order])
    assert np.array_equal(mixed.forward(backend), y[:, order])
    for name in ("sampling_locations", "attention_weights"):
        assert np.array_equal(getattr(mixed.backward(backend), name), getattr(g, name)[:, order])


@pytest.mark.parametrize("dtype", DTYPES)
@given(case=cases(), seed=st.integers(0, 2**32 - 1), exponent=st.integers(-8, 8))
def test_scaling_by_powers_of_two_is_exact(backend, dtype, case, seed, exponent):
    """y is linear in value and in the weights, the gradients are in grad_y: powers of two are not rounded."""
    problem, factor = make(case, dtype, seed), dtype(math.ldexp(1.0, exponent))
    y, g = problem.forward(backend), problem.backward(backend)
    for name in ("value", "attention_weights"):
        assert np.array_equal(problem.having(**{name: problem[name] * factor}).forward(backend), y * factor)
    scaled = problem.having(grad_y=problem.grad_y * factor).backward(backend)
    for name, array in scaled._asdict().items():
        assert np.array_equal(array, getattr(g, name) * factor), name
