"""dcnv3 at edges, with numbers that are not finite, and in terms of other operators.

One rule per test, which is named after it. Tests that take `subject` also run on the naive reference.
"""

import dcn_cases
import numpy as np
import pytest
from dcn_cases import Case
from naive import bilinear_sample, conv, deform_conv
from test_dcnv3 import OPERATOR, make  # noqa: F401 - OPERATOR tells the fixtures what `subject` is

DTYPES = [np.float32, np.float64]
OUTSIDE = [np.inf, -np.inf, 3e38, -3e38, 1e30, 2.0**63, 2.0**31, -(2.0**31), 1e9]


def near(got, want, scale=1.0):
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-12 * scale)


def one_point(subject, x, y_x, mask=1.0, grad=1.0):
    """(y, g) of a kernel of one point in the only output of a stride over all of x, at (y, x)."""
    x = np.asarray(x)
    offsets, weights = np.array(y_x[::-1], x.dtype).reshape(1, 1, 1, 2), np.full((1, 1, 1, 1), mask, x.dtype)
    options = {"kernel_size": 1, "stride": max(x.shape[1:3])}
    y = subject.forward(x, offsets, weights, **options)
    return y, subject.backward(np.full(y.shape, grad, x.dtype), x, offsets, weights, **options)


# What it is in terms of the rest.

OTHERS = [
    Case(2, 2, 3, (5, 6), (2, 3), padding=(1, 2)),
    Case(1, 3, 1, (7, 4), 3, (2, 1), ((0, 1), (2, 1)), (1, 2), scale=0.7),
    Case(2, 1, 4, (4, 4), (3, 5), padding=2, scale=-2.0, remove_center=True),
]


@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_it_is_a_depthwise_deform_conv(subject, case):
    """Of x with its channels first, whose offsets also move points where the scale puts them; weights are ones."""
    p = make(case, np.float64)
    kh, kw = np.broadcast_to(case.kernel, 2).tolist()
    dy, dx = np.broadcast_to(case.dilation, 2)
    middle_y, middle_x = dy * (kh - 1) // 2, dx * (kw - 1) // 2
    out, channels = dcn_cases.output_size(case), case.groups * case.depth
    given = p["offsets"].reshape(case.batch, *out, case.groups, case.points, 2)
    mask_given = p["mask"].reshape(case.batch, *out, case.groups, case.points)
    offsets, mask = (
        np.zeros((case.batch, case.groups, kh * kw, 2, *out)),
        np.zeros((case.batch, case.groups, kh * kw, *out)),
    )
    k = 0
    for i in range(kw):
        for j in range(kh):
            if case.remove_center and (i, j) == (kw // 2, kh // 2):
                continue
            moved_y = case.scale * (j * dy - middle_y + given[..., k, 1]) + middle_y - j * dy
            moved_x = case.scale * (i * dx - middle_x + given[..., k, 0]) + middle_x - i * dx
            tap = j * kw + i
            offsets[:, :, tap, 0], offsets[:, :, tap, 1] = np.moveaxis(moved_y, 3, 1), np.moveaxis(moved_x, 3, 1)
            mask[:, :, tap] = np.moveaxis(mask_given[..., k], 3, 1)
            k += 1
    y = deform_conv.forward(
        np.moveaxis(p["x"], 3, 1),
        offsets.reshape(case.batch, -1, *out),
        np.ones((channels, 1, kh, kw)),
        mask=mask.reshape(case.batch, -1, *out),
        stride=case.stride,
        padding=case.padding,
        dilation=case.dilation,
    )
    near(p.forward(subject), np.moveaxis(y, 1, 3), case.points)


@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_it_is_a_weighted_sum_of_bilinear_samples(subject, case):
    positions = {}

    def draw(rng, shape):
        positions["all"] = rng.uniform(-2, 7, shape)
        return positions["all"]

    p, out = make(case, np.float64, draw=draw), dcn_cases.output_size(case)
    mask = p["mask"].reshape(case.batch, -1, case.groups, case.points)
    y = np.zeros((case.batch, out[0] * out[1], case.groups, case.depth))
    for group in range(case.groups):
        x = np.moveaxis(np.split(p["x"], case.groups, axis=3)[group], 3, 1)
        samples = bilinear_sample.forward(x, positions["all"][:, :, group])  # (n, d, q, p)
        y[:, :, group] = np.einsum("ndqp,nqp->nqd", samples, mask[:, :, group])
    near(p.forward(subject), y.reshape(p.grad_y.shape), 10 * case.points)


@pytest.mark.parametrize("kernel, padding", [((3, 3), (1, 1)), ((2, 3), (0, 1)), ((1, 4), (2, 0))])
def test_without_offsets_it_is_a_depthwise_convolution(subject, kernel, padding):
    """If the mask is the same everywhere: it is the kernel, whose columns come one after the other."""
    case = Case(2, 1, 3, (6, 7), kernel, padding=padding, dilation=(2, 1))
    p, w = make(case, np.float64), np.random.default_rng(0).normal(size=kernel)
    p = p.having(offsets=np.zeros_like(p["offsets"]), mask=np.broadcast_to(w.T.ravel(), p["mask"].shape))
    x = np.moveaxis(p["x"], 3, 1)
    y = conv.forward(x, np.broadcast_to(w, (3, 1, *kernel)), padding=padding, dilation=(2, 1))
    near(p.forward(subject), np.moveaxis(y, 1, 3), case.points)


def test_the_order_of_points_and_of_offsets(subject):
    """Points column by column; x before y; the middle of an even kernel is the pixel above and to the left."""
    x = np.arange(35.0).reshape(1, 5, 7, 1)
    for k, (row, column) in enumerate([(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]):
        mask, offsets = np.zeros((1, 3, 6, 6)), np.zeros((1, 3, 6, 12))
        mask[..., k], offsets[..., 2 * k] = 1, -1  # one pixel to the left
        y = subject.forward(x, offsets, mask, kernel_size=(3, 2))
        assert y[0, 1, 2, 0] == x[0, 1 + row, 2 + column - 1, 0]


def test_the_scale_stretches_the_kernel_about_its_middle(subject):
    p = make(Case(size=(9, 9), padding=0), np.float64)
    p = p.having(offsets=np.zeros_like(p["offsets"]), x=np.arange(81.0).reshape(1, 9, 9, 1))
    for scale, reach in ((0.0, 0), (2.0, 2), (-1.0, -1)):
        mask = np.zeros_like(p["mask"])
        mask[..., 3] = 1  # row 0 of column 1: straight above the middle
        y = p._replace(params={**p.params, "offset_scale": scale}).having(mask=mask).forward(subject)
        near(y[0, 3, 3, 0], p["x"][0, 4 - reach, 4, 0])


def test_pads_belong_to_their_axes(subject):
    x = np.arange(1.0, 21).reshape(1, 4, 5, 1)
    weights = np.ones((1, 8, 3, 3))
    y = subject.forward(x, np.zeros((1, 8, 3, 6)), weights, kernel_size=(1, 3), padding=((3, 1), (0, 0)))
    assert not y[:, :3].any() and not y[:, 7:].any()
    near(y[0, 3, :, 0], [6, 9, 12])


# Edges. Along one axis of size 4, the other coordinate being 1: p -> (value, slope), by rule zeros.

AXIS = {
    -1.25: lambda v: (0, 0),
    -1.0: lambda v: (0, v[0]),
    -0.75: lambda v: (v[0] / 4, v[0]),
    1.0: lambda v: (v[1], v[2] - v[1]),
    3.0: lambda v: (v[3], -v[3]),
    3.75: lambda v: (v[3] / 4, -v[3]),
    4.0: lambda v: (0, 0),
}


@pytest.mark.parametrize("depth", [1, 3, 16, 40])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("at", AXIS)
def test_values_and_right_slopes_along_an_axis(subject, at, axis, depth):
    x = np.random.default_rng(1).uniform(1, 2, (1, 4, 4, depth))
    y, g = one_point(subject, x, (at, 1.0) if axis == 0 else (1.0, at), mask=2.0)
    pairs = [AXIS[at](line) for line in (x[0, :, 1] if axis == 0 else x[0, 1]).T]
    near(y.ravel(), [2 * value for value, _ in pairs])
    near(g.offsets.ravel()[1 - axis], 2 * sum(slope for _, slope in pairs))
    near(g.mask.ravel(), sum(value for value, _ in pairs))


def test_padding_puts_points_on_the_kink_at_the_start_of_training(subject):
    """Zero offsets and padding 1: the points beside the image have the slope to their right."""
    p = make(Case(size=(2, 2), depth=1), np.float64)
    p = p.having(offsets=np.zeros_like(p["offsets"]), mask=np.ones_like(p["mask"]), x=np.ones_like(p["x"]))
    g = p.having(grad_y=np.ones_like(p.grad_y)).backward(subject).offsets.reshape(2, 2, 9, 2)
    near(g[0, 0, 3], [0, 1])  # straight above the image: y = -1, x = 0; along x the weight is 0
    near(g[0, 0, 1], [1, 0])  # to the left of it: y = 0, x = -1
    near(g[0, 0, 0], [0, 0])  # in the corner


@pytest.mark.parametrize("dtype", DTYPES)
def test_just_inside_and_just_outside(subject, dtype):
    """The last number below -1 is outside, -1 and the last number below the size are inside."""
    x = np.random.default_rng(1).uniform(1, 2, (1, 4, 4, 3)).astype(dtype)
    below, last = np.nextafter(dtype(-1), dtype(-2)), np.nextafter(dtype(4), dtype(0))
    for at in ((below, 1), (1, below), (4, 1), (1, 4)):
        y, g = one_point(subject, x, at)
        assert not y.any() and not g.x.any() and not g.offsets.any() and not g.mask.any()
    y, g = one_point(subject, x, (1, last))
    assert (y > 0).all() and g.offsets[..., 0] < 0


# Numbers that are not finite.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", OUTSIDE)
@pytest.mark.parametrize("axes", ["y", "x", "yx"])
def test_infinite_and_huge_offsets_are_outside(subject, dtype, value, axes):
    """Everything is zero there, whatever the image contains."""
    for pixel in (1.0, np.nan):
        y, g = one_point(subject, np.full((1, 4, 4, 9), pixel, dtype), [value if a in axes else 1.5 for a in "yx"])
        for part in (y, *g):
            assert not part.any()  # also fails on NaN


@pytest.mark.parametrize("at", [(np.inf, 0.0), (0.0, -np.inf)], ids=str)
def test_a_scale_of_0_times_an_infinite_offset_is_a_nan_coordinate(subject, at):
    x, offsets, mask = np.ones((1, 1, 1, 3)), np.array(at).reshape(1, 1, 1, 2), np.ones((1, 1, 1, 1))
    options = {"kernel_size": 1, "offset_scale": 0.0}
    assert np.isnan(subject.forward(x, offsets, mask, **options)).all()
    g = subject.backward(np.ones((1, 1, 1, 3)), x, offsets, mask, **options)
    assert np.isnan(g.offsets).all() and np.isnan(g.mask).all() and not g.x.any()


@pytest.mark.parametrize("other", [1.5, np.nan, np.inf, 1e30, -7.0])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_nan_offset_reaches_its_own_pixel_and_group_only(subject, axis, other):
    p = make(Case(2, 2, 3, (4, 5), padding=0), np.float64)
    spoilt, without = p["offsets"].copy(), p["offsets"].copy()
    at = 1, 1, 2, 18 + 2 * 4  # of the second group, point 4
    spoilt[at[:3]][at[3] + axis], spoilt[at[:3]][at[3] + 1 - axis] = np.nan, other
    without[at[:3]][at[3] : at[3] + 2] = np.inf  # outside: contributes nothing
    y, g = p.having(offsets=spoilt).forward(subject), p.having(offsets=spoilt).backward(subject)
    want, h = p.having(offsets=without).forward(subject), p.having(offsets=without).backward(subject)
    assert (
        np.isnan(y[1, 1, 2, 3:]).all() and np.isnan(g.offsets[1, 1, 2, 26:28]).all() and np.isnan(g.mask[1, 1, 2, 13])
    )
    y[1, 1, 2, 3:] = want[1, 1, 2, 3:]
    g.offsets[1, 1, 2, 26:28] = g.mask[1, 1, 2, 13] = 0
    near(y, want)
    for got, right in zip(g, h, strict=True):
        near(got, right, 10)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_outside_is_zero_and_then_ordinary_arithmetic(subject, bad):
    """A weight or gradient of y that is not finite, times the zeros of a point outside."""
    x = np.ones((1, 3, 3, 2))
    y, g = one_point(subject, x, (7.0, 1.0), mask=bad)
    assert np.isnan(y).all() and np.isnan(g.offsets).all() and not g.mask.any() and not g.x.any()
    _, g = one_point(subject, x, (7.0, 1.0), grad=bad)
    assert np.isnan(g.offsets).all() and np.isnan(g.mask).all() and not g.x.any()


@pytest.mark.parametrize("at", [(0.5, 1.0), (-1.0, 0.5), (1.0, 2.0), (-0.5, -0.5)])
def test_only_the_pixels_of_the_cell_count(subject, at):
    """A NaN in it does, even with weight zero."""
    for row, column in np.ndindex(3, 3):
        x = np.ones((1, 3, 3, 3))
        x[0, row, column, 1] = np.nan
        y, g = one_point(subject, x, at)
        inside = row - np.floor(at[0]) in (0, 1) and column - np.floor(at[1]) in (0, 1)
        assert np.isnan(y).ravel().tolist() == [False, inside, False]
        assert np.isnan(g.mask).all() == np.isnan(g.offsets).any() == inside
