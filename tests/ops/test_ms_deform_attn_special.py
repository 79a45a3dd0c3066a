"""ms_deform_attn at edges, with numbers that are not finite, and in terms of other operators.

One rule per test, which is named after it. Tests that take `subject` also run on the naive reference.
"""

import dcn_cases
import numpy as np
import pytest
from dcn_cases import Case as Window
from naive import bilinear_sample, dcnv3
from test_ms_deform_attn import OPERATOR, POWERS, Case, make  # noqa: F401 - OPERATOR tells the fixtures what `subject` is

DTYPES = [np.float32, np.float64]
OUTSIDE = [np.inf, -np.inf, 3e38, -3e38, 1e30, 2.0**63, 2.0**31, -(2.0**31), 1e9]


def near(got, want, scale=1.0):
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-12 * scale)


def one_point(subject, value, x_y, weight=1.0, grad=1.0, size=(4, 4)):
    """(y, g) of one query of one head with one point at (x, y), as fractions of the only level."""
    locations, weights = (
        np.array(x_y, value.dtype).reshape(1, 1, 1, 1, 1, 2),
        np.full((1, 1, 1, 1, 1), weight, value.dtype),
    )
    y = subject.forward(value, (size,), locations, weights)
    return y, subject.backward(np.full(y.shape, grad, value.dtype), value, (size,), locations, weights)


# What it is in terms of the rest.


@pytest.mark.parametrize("points", [3, (2, 1, 4)])
def test_it_is_a_weighted_sum_of_bilinear_samples(subject, points):
    case = Case(2, 3, 4, ((5, 7), (3, 2), (1, 1)), points, 6)
    p, start, done = make(case, np.float64), 0, 0
    locations = p["sampling_locations"].reshape(2, 6, 3, -1, 2)
    weights, y = p["attention_weights"].reshape(2, 6, 3, -1), np.zeros((2, 6, 3, 4))
    for (height, width), count in zip(case.levels, case.counts, strict=True):
        pixels, here = slice(start, start + height * width), slice(done, done + count)
        start, done = start + height * width, done + count
        positions = locations[:, :, :, here, ::-1] * (height, width) - 0.5
        for m in range(3):
            x = p["value"][:, pixels, m].reshape(2, height, width, 4).transpose(0, 3, 1, 2)
            samples = bilinear_sample.forward(x, positions[:, :, m])  # (n, d, q, p)
            y[:, :, m] += np.einsum("ndqp,nqp->nqd", samples, weights[:, :, m, here])
    near(p.forward(subject), y.reshape(2, 6, 12), 10)


def test_dcnv3_is_the_case_of_one_level(subject):
    """Queries are output pixels, heads are groups; positions become fractions."""
    case = Window(2, 3, 4, (8, 4), (2, 3), padding=(1, 2), scale=0.5)
    x, offsets, mask, grad_y = dcn_cases.arrays(case, np.float64)
    base, taps = dcn_cases.regular(case)
    rows = 2, len(base), 3, case.points
    moved = offsets.reshape(*rows, 2)[..., ::-1]
    positions = base[:, None, None] + case.scale * (taps + moved)
    locations = ((positions + 0.5) / case.size)[..., ::-1].reshape(*rows[:3], 1, case.points, 2)
    arguments = x.reshape(2, 32, 3, 4), (case.size,), locations, mask.reshape(*rows[:3], 1, case.points)
    near(subject.forward(*arguments), dcnv3.forward(x, offsets, mask, **case.options).reshape(2, -1, 12), 10)
    g = subject.backward(grad_y.reshape(2, -1, 12), *arguments)
    want = dcnv3.backward(grad_y, x, offsets, mask, **case.options)
    near(g.value.ravel(), want.x.ravel(), 10)
    near(g.attention_weights.ravel(), want.mask.ravel(), 10)
    moved = g.sampling_locations * case.scale / np.array(case.size)[::-1]
    near(moved.ravel(), want.offsets.ravel(), 10)


# Edges. Along one axis of size 4, the other coordinate on pixel 1: location -> (value, slope in pixels).

AXIS = {
    -0.25: lambda v: (0, 0),  # p = -1.5
    -0.125: lambda v: (0, v[0]),  # -1
    0.0: lambda v: (v[0] / 2, v[0]),  # -0.5: the outer edge of the first pixel
    0.125: lambda v: (v[0], v[1] - v[0]),  # 0: its centre
    0.5: lambda v: ((v[1] + v[2]) / 2, v[2] - v[1]),
    0.875: lambda v: (v[3], -v[3]),  # 3
    1.0: lambda v: (v[3] / 2, -v[3]),  # 3.5
    1.125: lambda v: (0, 0),  # 4
}


@pytest.mark.parametrize("depth", [1, 3, 16, 40])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("at", AXIS)
def test_values_and_right_slopes_along_an_axis(subject, at, axis, depth):
    value = np.random.default_rng(1).uniform(1, 2, (1, 16, 1, depth))
    image = value.reshape(4, 4, depth)
    y, g = one_point(subject, value, (0.375, at) if axis == 0 else (at, 0.375), weight=2.0)
    pairs = [AXIS[at](line) for line in (image[:, 1] if axis == 0 else image[1]).T]
    near(y.ravel(), [2 * v for v, _ in pairs])
    near(g.sampling_locations.ravel()[1 - axis], 4 * 2 * sum(slope for _, slope in pairs))
    near(g.attention_weights.ravel(), sum(v for v, _ in pairs))


def test_levels_do_not_touch(subject):
    """Points at the edges of a level read no pixel of the level before or after it."""
    case = Case(1, 2, 3, POWERS, 1, 5)
    p = make(case, np.float64, draw=lambda rng, shape: rng.choice([-1.0, -0.5, 0.0], shape))
    pixels = np.cumsum([0, *(height * width for height, width in POWERS)])
    for level in range(len(POWERS)):
        weights = np.zeros_like(p["attention_weights"])
        weights[..., level, :] = 1.0
        value = np.full_like(p["value"], 7.0)
        value[:, pixels[level] : pixels[level + 1]] = 1.0
        q = p.having(value=value, attention_weights=weights, grad_y=np.ones_like(p.grad_y))
        assert q.forward(subject).max() <= 1 and q.forward(subject).any()
        g = q.backward(subject)
        assert g.value[:, pixels[level] : pixels[level + 1]].any()
        g.value[:, pixels[level] : pixels[level + 1]] = 0
        assert not g.value.any()


# Numbers that are not finite.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("far", OUTSIDE)
@pytest.mark.parametrize("axes", ["y", "x", "xy"])
def test_infinite_and_huge_locations_are_outside(subject, dtype, far, axes):
    """Everything is zero there, whatever the level contains, also where a product overflows."""
    for pixel in (1.0, np.nan):
        value = np.full((1, 16, 1, 9), pixel, dtype)
        y, g = one_point(subject, value, [far if a in axes else 0.5 for a in "xy"])
        for part in (y, *g):
            assert not part.any()  # also fails on NaN


@pytest.mark.parametrize("other", [0.5, np.nan, np.inf, 1e30, -7.0])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_nan_location_reaches_its_own_query_and_head_only(subject, axis, other):
    p = make(Case(2, 2, 3, ((4, 5), (2, 3)), 2, 6), np.float64)
    spoilt, without = p["sampling_locations"].copy(), p["sampling_locations"].copy()
    at = 1, 3, 1, 0, 1
    spoilt[at][axis], spoilt[at][1 - axis] = np.nan, other
    without[at] = np.inf  # outside: contributes nothing
    bad, good = p.having(sampling_locations=spoilt), p.having(sampling_locations=without)
    y, g, want, h = bad.forward(subject), bad.backward(subject), good.forward(subject), good.backward(subject)
    assert np.isnan(y[1, 3, 3:]).all() and np.isnan(g.sampling_locations[at]).all()
    assert np.isnan(g.attention_weights[at])
    y[1, 3, 3:] = want[1, 3, 3:]
    g.sampling_locations[at] = g.attention_weights[at] = 0
    near(y, want)
    for got, right in zip(g, h, strict=True):
        near(got, right, 10)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_outside_is_zero_and_then_ordinary_arithmetic(subject, bad):
    """A weight or gradient of y that is not finite, times the zeros of a point outside."""
    value = np.ones((1, 16, 1, 2))
    y, g = one_point(subject, value, (7.0, 0.5), weight=bad)
    assert np.isnan(y).all() and np.isnan(g.sampling_locations).all()
    assert not g.attention_weights.any() and not g.value.any()
    _, g = one_point(subject, value, (7.0, 0.5), grad=bad)
    assert np.isnan(g.sampling_locations).all() and np.isnan(g.attention_weights).all() and not g.value.any()


def test_a_nan_pixel_counts_in_its_cell_only(subject):
    """Even with weight zero."""
    for at in ((0.5, 0.5), (0.375, 0.375), (0.0, 1.0), (-0.125, 0.625)):
        column, row = (np.floor(4 * a - 0.5) for a in at)
        for pixel in range(16):
            value = np.ones((1, 16, 1, 3))
            value[0, pixel, 0, 1] = np.nan
            y, g = one_point(subject, value, at)
            inside = pixel // 4 - row in (0, 1) and pixel % 4 - column in (0, 1)
            assert np.isnan(y).ravel().tolist() == [False, inside, False]
            assert np.isnan(g.attention_weights).all() == inside
