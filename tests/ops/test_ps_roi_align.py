"""ps_roi_align computes what docs/semantics.md says (c.4): against the reference, roi_align, and by single rules."""

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
from naive import roi_align
from roi_cases import (
    LARGE_PLANES,
    SEEDS,
    SIZES,
    SMOOTH,
    TINY,
    TINY_USUAL,
    USUAL,
    Case,
    grid_samples,
    laid_out,
    length,
    pair,
    table,
)
from roi_family import ALIGN, RoIFamily, cell

OPERATOR = family.Operator(
    "ps_roi_align",
    arrays=("x", "rois"),
    differentiable=("x",),
    linear=("x",),
    length=length(grid_samples),
    coordinates=("rois",),
)


def make(case, dtype=np.float64, seed=None):
    return roi_cases.make(OPERATOR, case, dtype, seed, planes=np.prod(pair(case.output)))


def usual(dtype):
    return make(USUAL._replace(params={"sampling_ratio": 2}), dtype)


PARAMS = [{}, {"sampling_ratio": 2}, {"sampling_ratio": 1}, {"sampling_ratio": 3}, {"sampling_ratio": 0}]


class TestFamily(family.Family, RoIFamily):
    operator, make, usual = OPERATOR, staticmethod(make), staticmethod(usual)
    cases = table(make, [case._replace(params=PARAMS[n % len(PARAMS)]) for n, case in enumerate(SIZES)])
    cases |= table(make, [case._replace(params=params) for case in SIZES[-10:] for params in PARAMS[:2]])
    smooth = table(make, [case._replace(params=params) for case in SMOOTH for params in PARAMS[:2]])
    wild = table(make, roi_cases.WILD)
    large = table(make, [LARGE_PLANES, LARGE_PLANES._replace(params={"sampling_ratio": 2})])


class TestHalfTypes(family_halves.HalfTypes):
    described = TestFamily


class TestErrors(family_errors.Errors):
    operator, usual = OPERATOR, staticmethod(usual)
    wrong = (
        *roi_cases.wrong(usual),
        *roi_cases.wrong_parameters(ints=("sampling_ratio",)),
        ("x", np.zeros((3, 29, 7, 6), np.float32), ValueError, "29|" + said(3, 29, 7, 6), "6"),
        ("x", np.zeros((3, 3, 7, 6), np.float32), ValueError, "3|" + said(3, 3, 7, 6), "6"),
    )


class TestGPU(family_gpu.RoIs, family_gpu.GPU):
    operator, errors = OPERATOR, TestErrors
    usual = staticmethod(lambda dtype: make(TINY_USUAL._replace(params={"sampling_ratio": 2}), dtype))
    full = TestFamily.cases | TestFamily.wild
    cases = table(make, [case._replace(params=PARAMS[n % len(PARAMS)]) for n, case in enumerate(TINY)])


@pytest.mark.parametrize("dtype", DTYPES)
@given(case=roi_cases.cases(sampling_ratio=[-1, 0, 1, 2, 3]), seed=SEEDS, layouts=roi_cases.LAYOUT_NAMES)
def test_boxes_of_all_kinds(backend, dtype, case, seed, layouts):
    check_against_naive(backend, laid_out(make(case, dtype, seed), layouts))


@pytest.mark.parametrize("ratio", [-1, 2])
def test_it_is_roi_align_of_the_channel_of_each_bin(subject, ratio):
    p = make(Case(2, 3, (7, 8), (2, 3), count=9, scale=0.5, params={"sampling_ratio": ratio}))
    whole = roi_align.forward(p["x"], p["rois"], (2, 3), 0.5, ratio, True).reshape(9, 3, 2, 3, 2, 3)
    near(main(p.forward(subject)), np.einsum("rcijij->rcij", whole))
    spread = np.einsum("rcij,ik,jl->rcijkl", p.grad_y, np.eye(2), np.eye(3)).reshape(9, 18, 2, 3)
    near(p.backward(subject).x, roi_align.backward(spread, p["x"], p["rois"], (2, 3), 0.5, ratio, True).x)


def test_every_bin_has_its_channel(subject):
    """Channel (c*P_h + i)*P_w + j: constant planes are returned unchanged."""
    p = make(Case(channels=4, output=(2, 3), count=1)).having(rois=[[0, 1, 1, 5, 6]])
    p["x"][...] = np.arange(24)[:, None, None]
    near(main(p.forward(subject))[0], np.arange(24).reshape(4, 2, 3))
    near(p.backward(subject).x.sum(axis=(2, 3)).ravel(), p.grad_y.ravel())


def test_empty_grids_are_zero(subject):
    """Boxes without extent and inverted ones: no samples, so 0, where torchvision gives NaN."""
    boxes = [[0, 2.0, 2.0, 2.0, 2.0], [0, 3.0, 1.0, 1.0, 4.0], [0, 4.0, 4.0, 1.0, 1.0]]
    p = make(Case(channels=2, count=3)).having(rois=boxes)
    assert not main(p.forward(subject)).any() and not p.backward(subject).x.any()


def one_sample(y, x):
    p = make(Case(channels=3, size=(4, 4), output=1, count=1, params={"sampling_ratio": 1}))
    return p.having(rois=[[0, x, y, x + 1, y + 1]])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("at", ALIGN)
def test_values_along_an_axis(subject, at, axis):
    p = one_sample(*((at, 1.0) if axis == 0 else (1.0, at)))
    lines = p["x"][0, :, :, 1] if axis == 0 else p["x"][0, :, 1, :]
    near(main(p.forward(subject)).ravel(), [ALIGN[at](line)[0] for line in lines])
    weights = [ALIGN[at](line)[0] for line in np.eye(4)]
    near(p.backward(subject).x[0].sum(axis=2 - axis), np.outer(p.grad_y, weights))


@pytest.mark.parametrize("y", [-1.0, -0.5, 0.0, 1.0, 1.5, 3.0, 3.5, 4.0])
@pytest.mark.parametrize("x", [-0.25, 2.0, 3.75])
def test_only_the_pixels_of_the_cell_count(subject, y, x):
    clean = one_sample(y, x)
    used = np.zeros((4, 4), bool)
    used[np.ix_(cell(y), cell(x))] = True
    others = clean.having(x=np.where(used, clean["x"], np.nan))
    near(main(others.forward(subject)), main(clean.forward(subject)))
    for row, col in np.argwhere(used):
        spoilt = clean["x"].copy()
        spoilt[:, :, row, col] = np.nan
        assert np.isnan(main(clean.having(x=spoilt).forward(subject))).all()


def test_outside_is_zero_whatever_the_image_holds(subject):
    for y, x in ((-1.5, 1.0), (1.0, 4.5), (1e9, -1e9)):
        p = one_sample(y, x)
        p["x"][...] = np.nan
        assert not main(p.forward(subject)).any()


def test_samples_outside_count_in_the_divisor(subject):
    p = make(Case(channels=2, size=(4, 4), output=1, count=1, params={"sampling_ratio": 4}))
    p["x"][...] = 1
    p = p.having(rois=[[0, -4, 0.5, 4, 4.5]])  # of four samples along x, at -3.5, -1.5, 0.5, 2.5, two are inside
    near(main(p.forward(subject)), np.full((1, 2, 1, 1), 0.5))
