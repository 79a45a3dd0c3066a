"""ps_roi_pool computes what docs/semantics.md says (c.3): against the reference, and by single rules."""

import family
import family_errors
import family_gpu
import family_halves
import numpy as np
import pytest
import roi_cases
from checks import said
from family import DTYPES, check_against_naive, main, near
from hypothesis import given
from roi_cases import LARGE_PLANES, SEEDS, SIZES, SMOOTH, TINY, TINY_USUAL, USUAL, Case, laid_out, pair, table
from roi_family import RoIFamily


def length(problem):
    return {"y": np.prod(problem["x"].shape[2:]), "x": len(problem["rois"])}


OPERATOR = family.Operator(
    "ps_roi_pool", arrays=("x", "rois"), differentiable=("x",), linear=("x",), length=length, coordinates=("rois",)
)


def make(case, dtype=np.float64, seed=None):
    return roi_cases.make(OPERATOR, case, dtype, seed, planes=np.prod(pair(case.output)))


def usual(dtype):
    return make(USUAL, dtype)


class TestFamily(family.Family, RoIFamily):
    operator, make, usual = OPERATOR, staticmethod(make), staticmethod(usual)
    cases = table(make, SIZES)
    smooth = table(make, SMOOTH)
    wild = table(make, roi_cases.WILD)
    large = table(make, [LARGE_PLANES])


class TestHalfTypes(family_halves.HalfTypes):
    described = TestFamily


class TestErrors(family_errors.Errors):
    operator, usual = OPERATOR, staticmethod(usual)
    wrong = (
        *roi_cases.wrong(usual),
        ("x", np.zeros((3, 29, 7, 6), np.float32), ValueError, "29|" + said(3, 29, 7, 6), "6"),
        ("x", np.zeros((3, 3, 7, 6), np.float32), ValueError, "3|" + said(3, 3, 7, 6), "6"),
    )


class TestGPU(family_gpu.RoIs, family_gpu.GPU):
    operator, errors = OPERATOR, TestErrors
    usual = staticmethod(lambda dtype: make(TINY_USUAL, dtype))
    full = TestFamily.cases | TestFamily.wild
    cases = table(make, TINY)


@pytest.mark.parametrize("dtype", DTYPES)
@given(case=roi_cases.cases(), seed=SEEDS, layouts=roi_cases.LAYOUT_NAMES)
def test_boxes_of_all_kinds(backend, dtype, case, seed, layouts):
    check_against_naive(backend, laid_out(make(case, dtype, seed), layouts))


def one_box(box, output=1, channels=2, size=(6, 5), **more):
    return make(Case(channels=channels, size=size, output=output, count=1, **more)).having(rois=[[0, *box]])


@pytest.mark.parametrize(
    "box, rows, cols",
    [
        ((1, 2, 3, 4), slice(2, 4), slice(1, 3)),  # from the first corner up to but excluding the last
        ((0, 0, 0, 0), slice(0, 1), slice(0, 1)),  # at least one pixel
        ((0.5, 1.5, 2.5, 3.49), slice(2, 3), slice(1, 3)),  # halves are rounded away from zero
        ((-0.5, -1.5, 1.5, 0.5), slice(0, 1), slice(0, 2)),  # to -1, -2, 2, 1
        ((-9, -9, 90, 90), slice(0, 6), slice(0, 5)),
        ((3, 4, 1, 2), slice(4, 5), slice(3, 4)),  # inverted: one pixel
        ((2, 3, 5, 6), slice(3, 6), slice(2, 5)),  # the last row and column count
        ((4, 5, 4, 5), slice(5, 6), slice(4, 5)),
    ],
)
def test_the_pixels_of_a_box(subject, box, rows, cols):
    p = one_box(box)
    near(main(p.forward(subject))[0, :, 0, 0], p["x"][0, :, rows, cols].mean(axis=(1, 2)))
    want = np.zeros(p["x"].shape)
    want[0, :, rows, cols] = p.grad_y[0] / want[0, 0, rows, cols].size
    near(p.backward(subject).x, want)


def test_the_last_row_and_column_are_pooled(subject):
    """torchvision 0.29 leaves them out in its forward, but not in its backward."""
    p = one_box((0, 0, 5, 6), output=(2, 5))
    p["x"][...] = 0
    p["x"][..., -1, :] = 1
    near(main(p.forward(subject))[0, :, 1], np.full((2, 5), 1 / 3))
    p["x"][...] = 0
    p["x"][..., -1] = 1
    y = main(p.forward(subject))[0]
    assert (y[:, :, -1] == 1).all() and not y[:, :, :-1].any()


def test_every_bin_has_its_channel(subject):
    """Channel (c*P_h + i)*P_w + j: constant planes are returned unchanged."""
    p = one_box((0, 0, 4, 5), output=(2, 3), channels=4)
    p["x"][...] = np.arange(24)[:, None, None]
    near(main(p.forward(subject))[0], np.arange(24).reshape(4, 2, 3))
    sums = p.backward(subject).x.sum(axis=(2, 3))
    near(sums.ravel(), p.grad_y.ravel())


def test_bins_overlap_by_a_pixel_where_they_do_not_divide_the_box(subject):
    p = one_box((0, 0, 5, 1), output=(1, 2), channels=1)
    p["x"][0, :, 0] = [1, 2, 9, 3, 4]
    near(main(p.forward(subject)).ravel(), [4, 16 / 3])
    near(p.backward(subject).x[0, :, 0], p.grad_y.reshape(2, 1) / 3 * [[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])


@pytest.mark.parametrize("box", [(20, 0, 30, 3), (0, -9, 3, -7), (5, 2, 5, 2), (0, 6, 9, 9)])
def test_outside_is_zero(subject, box):
    p = one_box(box, output=(2, 3))
    p["x"][...] = np.nan
    assert not main(p.forward(subject)).any() and not p.backward(subject).x.any()


def test_the_divisor_is_what_is_inside(subject):
    p = one_box((-3, -2, 2, 2), output=1)
    p["x"][...] = 1
    near(main(p.forward(subject)), np.ones((1, 2, 1, 1)))
    near(p.backward(subject).x[0, :, :2, :2], np.broadcast_to(p.grad_y[0] / 4, (2, 2, 2)))


def test_the_backward_spreads_evenly(subject):
    """The sum of the gradient of x over a plane is the output gradient of its bin, if the bin is not empty."""
    p = make(Case(channels=3, size=(7, 8), output=3, count=1, boxes="straddling"))
    filled = main(p.having(x=np.ones(p["x"].shape)).forward(subject))
    near(p.backward(subject).x.sum(axis=(2, 3)).reshape(filled.shape), p.grad_y * filled)
