"""deform_ps_roi_pool computes what docs/semantics.md says (d.2): against the reference, and by single rules."""

import functools

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
from hypothesis import strategies as st
from roi_cases import (
    LARGE,
    LARGE_PLANES,
    SEEDS,
    SIZES,
    SMOOTH,
    TINY,
    TINY_ODD,
    TINY_USUAL,
    USUAL,
    Case,
    laid_out,
    length,
    pair,
    table,
)
from roi_family import PSROI, RoIFamily, cell

OPERATOR = family.Operator(
    "deform_ps_roi_pool",
    arrays=("x", "rois", "trans"),
    differentiable=("x", "trans"),
    linear=("x",),
    optional=("trans",),
    length=length(lambda problem: problem.params.get("sample_per_part", 4) ** 2),
    coordinates=("rois", "trans"),
)


def make(case, dtype=np.float64, seed=None, classes=1, parts=None, trans=True, spread=2.0):
    params = {"group_size": pair(case.output)[0], **case.params}
    parts = pair(case.output) if parts is None else parts

    def more(rng):
        return {"trans": spread * rng.normal(size=(case.count, 2 * classes, *parts)) if trans else None}

    return roi_cases.make(OPERATOR, case._replace(params=params), dtype, seed, params["group_size"] ** 2, more)


def usual(dtype):
    case = USUAL._replace(channels=4, params={"group_size": 2, "sample_per_part": 2})
    return make(case, dtype, classes=2, parts=(2, 3))


def between_kinks(case, dtype=np.float64):
    """Two classes, with trans that keeps every sample of its bins away from integers and halves."""
    p, rng, pooled = make(case, dtype, classes=2, parts=(2, 1)), np.random.default_rng(6), pair(case.output)
    samples, std = case.params["sample_per_part"], case.params.get("trans_std", 0.1)
    p["rois"][:, 1:] = np.floor(p["rois"][:, 1:]) + 0.25
    for (r, channel, i, j), _ in np.ndenumerate(p["trans"]):
        a, part = 1 - channel % 2, (i, j)[1 - channel % 2]
        low, high = p["rois"][r, 2 - a], p["rois"][r, 4 - a]  # floor rounds correctly, as both end in a quarter
        start, size = np.floor(low) * case.scale - 0.5, max((np.floor(high) + 1 - np.floor(low)) * case.scale, 0.1)
        bins = [index for index in range(pooled[a]) if index * p["trans"].shape[2 + a] // pooled[a] == part]
        still = start + (np.array(bins)[:, None] + np.arange(samples) / samples) * size / pooled[a]
        positions = np.zeros(1)
        while np.abs(2 * positions - np.round(2 * positions)).min() < 0.1:
            p["trans"][r, channel, i, j] = rng.normal() * 3
            positions = still + p["trans"][r, channel, i, j] * std * size
    return p


PARAMS = [
    {},
    {"group_size": 1, "sample_per_part": 2},
    {"group_size": 3, "sample_per_part": 1, "trans_std": 0.5},
    {"group_size": 2, "sample_per_part": 3, "trans_std": -0.2},
]
SMOOTH = [case._replace(channels=2 * case.channels, output=(2, case.size[0] // 4)) for case in SMOOTH]
CASES = {
    **table(make, [case._replace(params=PARAMS[n % len(PARAMS)]) for n, case in enumerate(SIZES)]),
    **table(make, [case._replace(params=PARAMS[1 + n % 3]) for n, case in enumerate(SIZES[:-10])]),
    **table(make, [case._replace(params=params) for case in SIZES[-10:] for params in PARAMS[:2]]),
    **table(make, SIZES[4:7], "no trans ", trans=False),
    **table(make, SIZES[5:8], "parts ", parts=(3, 1)),
    **table(make, SIZES[6:8], "every class ", classes=3, parts=(1, 2)),
    **table(make, SIZES[9:12], "far ", spread=30.0),
}


def special(case, dtype, seed, share, **more):
    """A share of trans leads to pixels, halves and borders, or is infinite or NaN."""
    p, rng = make(case, dtype, seed, **more), np.random.default_rng(seed)
    values = rng.choice(
        [-4, -2, -1, -0.5, -0.25, -0.0, 0.0, 0.25, 1, 2, 1e30, np.inf, -np.inf, np.nan], p["trans"].shape
    )
    chosen = rng.random(values.shape) < share
    return p.having(trans=np.where(chosen, values, p["trans"]))


class TestFamily(family.Family, RoIFamily):
    operator, make, usual = OPERATOR, staticmethod(make), staticmethod(usual)
    cases = CASES
    smooth = table(between_kinks, [c._replace(params=PARAMS[n]) for c in SMOOTH for n in (1, 2, 3)])
    wild = table(functools.partial(special, seed=0, share=0.7, classes=2), roi_cases.WILD)
    large = table(make, [LARGE_PLANES, LARGE._replace(params=PARAMS[1])])


class TestHalfTypes(family_halves.HalfTypes):
    described = TestFamily


class TestErrors(family_errors.Errors):
    operator, usual = OPERATOR, staticmethod(usual)
    wrong = (
        *roi_cases.wrong(usual),
        *roi_cases.wrong_parameters(ints=("group_size", "sample_per_part"), least=1),
        *roi_cases.wrong_parameters(numbers=("trans_std",)),
        ("x", np.zeros((3, 15, 7, 6), np.float32), ValueError, "15|" + said(3, 15, 7, 6), "4"),
        ("x", np.zeros((3, 3, 7, 6), np.float32), ValueError, "3|" + said(3, 3, 7, 6), "4"),
        *(
            ("trans", np.zeros(shape, np.float32), ValueError, came, wanted)
            for shape, came, wanted in (
                ((3, 4, 2, 3), said(3, 4, 2, 3), r"\b4\b"),
                ((4, 3, 2, 3), r"\b3\b", "2|even"),
                ((4, 6, 2, 3), r"\b[36]\b", r"\b4\b"),
                ((4, 0, 2, 3), said(4, 0, 2, 3), "1|2|positive"),
                ((4, 4, 0, 3), said(4, 4, 0, 3), "1|one|positive|empty"),
            )
        ),
    )


class TestGPU(family_gpu.RoIs, family_gpu.GPU):
    operator, errors = OPERATOR, TestErrors
    usual = staticmethod(
        lambda dtype: make(
            TINY_USUAL._replace(channels=4, params={"group_size": 2, "sample_per_part": 2}),
            dtype,
            classes=2,
            parts=(2, 3),
        )
    )
    full = TestFamily.cases | TestFamily.wild
    cases = table(make, [case._replace(params=PARAMS[1 + n % 3]) for n, case in enumerate(TINY)])
    cases |= table(make, TINY[1:2], "no trans ", trans=False)
    cases |= table(functools.partial(special, seed=0, share=0.7), [TINY_ODD], "odd ")


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    case=roi_cases.cases(group_size=[1, 2, 3], sample_per_part=[1, 2, 3], trans_std=[0.1, 0.25, 0.5, 1.0]),
    seed=SEEDS,
    share=st.sampled_from([0.0, 0.2, 0.7]),
    classes=st.integers(1, 3),
    parts=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    layouts=roi_cases.LAYOUT_NAMES,
)
def test_boxes_and_trans_of_all_kinds(backend, dtype, case, seed, share, classes, parts, layouts):
    case = case._replace(channels=case.channels * classes)
    check_against_naive(backend, laid_out(special(case, dtype, seed, share, classes=classes, parts=parts), layouts))


# One sample at (y, x) of a 4 x 4 image: the box is the pixel (0, 0), from -0.5 to 0.5.


def one_sample(y, x, channels=3, classes=1):
    params = {"group_size": 1, "sample_per_part": 1, "trans_std": 1.0}
    p = make(Case(channels=channels, size=(4, 4), output=1, count=1, params=params), classes=classes)
    return p.having(rois=[[0, 0, 0, 0, 0]], trans=np.array([x + 0.5, y + 0.5] * classes).reshape(1, -1, 1, 1))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("at", PSROI)
def test_values_and_right_slopes_along_an_axis(subject, at, axis):
    p = one_sample(*((at, 1.0) if axis == 0 else (1.0, at)))
    lines = p["x"][0, :, :, 1] if axis == 0 else p["x"][0, :, 1, :]
    values, slopes = (np.array([PSROI[at](line)[k] for line in lines]) for k in (0, 1))
    near(main(p.forward(subject)).ravel(), values)
    g = p.backward(subject)
    near(g.trans[0, 1 - axis], p.grad_y.ravel() @ slopes)
    weights = [PSROI[at](line)[0] for line in np.eye(4)]
    near(g.x[0].sum(axis=2 - axis), np.outer(p.grad_y, weights))


@pytest.mark.parametrize("y", [-0.5, -0.25, 0.0, 1.0, 1.5, 3.0, 3.5])
@pytest.mark.parametrize("x", [-0.25, 2.0, 3.25])
def test_only_the_pixels_of_the_cell_count(subject, y, x):
    clean = one_sample(y, x)
    used = np.zeros((4, 4), bool)
    used[np.ix_(cell(y), cell(x))] = True
    others = clean.having(x=np.where(used, clean["x"], np.nan))
    near(main(others.forward(subject)), main(clean.forward(subject)))
    for name in ("x", "trans"):
        near(getattr(others.backward(subject), name), getattr(clean.backward(subject), name))
    for row, col in np.argwhere(used):
        spoilt = clean["x"].copy()
        spoilt[:, :, row, col] = np.nan
        assert np.isnan(main(clean.having(x=spoilt).forward(subject))).all()
        near(clean.having(x=spoilt).backward(subject).x, clean.backward(subject).x)


FAR_BOXES = {  # (scale, corners): far-away or extremely scaled boxes keep their position and size
    "corners far outside once scaled": (2.0**33, [5, 5, 9, 9]),
    "corners near the largest number": (1e-37, [1e38, 2e38, 3e38, 3.3e38]),
}


@pytest.mark.parametrize("name", FAR_BOXES)
def test_corners_and_scales_of_any_size(name, backend):
    check_far_boxes(name, backend)


@pytest.mark.parametrize("name", FAR_BOXES)
def test_corners_and_scales_of_any_size_on_a_gpu(name, gpu):
    check_far_boxes(name, gpu)


def check_far_boxes(name, backend):
    scale, corners = FAR_BOXES[name]
    case = Case(1, 4, (9, 60), (2, 2), "inside", 1, params={"sample_per_part": 2, "spatial_scale": scale})
    p = make(case, np.float32, spread=0.0)
    check_against_naive(backend, p.having(rois=np.array([[0, *corners]], np.float32)))


@pytest.mark.parametrize("value", [np.inf, -np.inf, 1e30, -1e30, 2.0**31, 1e300])
@pytest.mark.parametrize("axes", ["y", "x", "yx"])
def test_infinite_and_huge_trans_is_outside(subject, value, axes):
    p = one_sample(*(value if axis in axes else 1.5 for axis in "yx"))
    p["x"][...] = np.nan
    assert not main(p.forward(subject)).any()
    for array in p.backward(subject):
        assert not array.any()


@pytest.mark.parametrize("other", [1.5, np.nan, np.inf, -np.inf, 1e30, -7.0])
@pytest.mark.parametrize("axis", [0, 1])
def test_nan_wins_over_outside(subject, axis, other):
    p = one_sample(*((np.nan, other) if axis == 0 else (other, np.nan)))
    assert np.isnan(main(p.forward(subject))).all()
    g = p.backward(subject)
    assert np.isnan(g.trans).all() and not g.x.any()


@pytest.mark.parametrize("axis", [0, 1])
def test_nan_reaches_the_bins_of_its_part_and_class(subject, axis):
    """Two classes, 4 x 3 bins in 2 x 3 parts: a part of one class has two bins of half the channels."""
    case = Case(2, 6, (7, 8), (4, 3), "inside", 4, params={"group_size": 2, "sample_per_part": 2})
    clean = make(case, classes=2, parts=(2, 3))
    broken, away = (clean.having(trans=clean["trans"].copy()) for _ in range(2))
    broken["trans"][1, 2 + axis, 1, 2] = np.nan
    away["trans"][1, 2 + axis, 1, 2] = np.inf  # the result without these bins
    got = {"y": main(broken.forward(subject)), **broken.backward(subject)._asdict()}
    want = {"y": main(away.forward(subject)), **away.backward(subject)._asdict()}
    for name, at in (("y", (1, slice(3, 6), slice(2, 4), 2)), ("trans", (1, slice(2, 4), 1, 2))):
        mark = np.zeros(got[name].shape, bool)
        mark[at] = True
        np.testing.assert_array_equal(np.isnan(got[name]), mark, err_msg=name)
        near(got[name][~mark], want[name][~mark])
    near(got["x"], want["x"])


# Geometry.


def still(case, box):
    return make(case._replace(count=1), trans=False).having(rois=[[0, *box]])


def test_samples_sit_on_the_top_left_of_the_sub_bins(subject):
    """Box (1, 2, 4, 5): rounded corners, the last one included, minus half a pixel: 4 pixels from (0.5, 1.5)."""
    p = still(Case(size=(9, 8), output=(2, 1), params={"group_size": 1, "sample_per_part": 2}), (1.4, 1.5, 4.4, 5.4))
    p["x"][0, 0] = np.add.outer(3 * np.arange(9), 5 * np.arange(8)) + 2.0
    rows, cols = np.array([1.5 + 0.5, 3.5 + 0.5]), 0.5 + 1.0  # centres of the two samples of a bin
    near(main(p.forward(subject)).ravel(), 3 * rows + 5 * cols + 2, 10)


def test_rounding_comes_before_scaling(subject):
    params = {"group_size": 1, "sample_per_part": 2}
    p = still(Case(size=(9, 8), output=2, scale=0.5, params=params), (2.5, 3.49, 9.5, 11.0))
    q = still(Case(size=(9, 8), output=2, scale=0.5, params=params), (3.0, 3.0, 10.0, 11.0))
    near(main(p.forward(subject)), main(q.forward(subject)))


def test_a_box_has_a_tenth_of_a_pixel_at_least(subject):
    """An inverted box: samples within a tenth of a pixel to the right of and below its corner."""
    p = still(Case(size=(9, 8), output=1, params={"group_size": 1, "sample_per_part": 4}), (5, 6, 1, 2))
    p["x"][0, 0] = np.add.outer(3 * np.arange(9), 5 * np.arange(8)) + 2.0
    middle = 0.1 * 3 / 8
    near(main(p.forward(subject)).item(), 3 * (5.5 + middle) + 5 * (4.5 + middle) + 2, 10)


def test_samples_outside_are_not_counted(subject):
    p = still(Case(channels=2, size=(4, 4), output=1, params={"group_size": 1, "sample_per_part": 4}), (-4, 0, 3, 3))
    p["x"][...] = 1
    near(main(p.forward(subject)), np.ones((1, 2, 1, 1)))  # along x at -4.5, -2.5, -0.5, 1.5
    near(p.backward(subject).x.sum(axis=(2, 3)), p.grad_y[:, :, 0, 0])
    gone = still(Case(channels=2, size=(4, 4), output=1, params={"group_size": 1}), (-9, 0, -4, 3))
    gone["x"][...] = np.nan
    assert not main(gone.forward(subject)).any() and not gone.backward(subject).x.any()


def test_groups_of_bins_have_their_channels(subject):
    """Channel (c*gs + gy)*gs + gx, with gy = i*gs // P_h: constant planes are returned unchanged."""
    p = still(Case(channels=2, size=(9, 8), output=(4, 3), params={"group_size": 2}), (1, 1, 6, 7))
    p["x"][...] = np.arange(8)[:, None, None]
    want = np.arange(8).reshape(2, 2, 2)[:, [0, 0, 1, 1]][:, :, [0, 0, 1]]
    near(main(p.forward(subject))[0], want)


def test_trans_moves_by_parts_of_the_box(subject):
    """(2k, 2k+1) moves class k by trans_std * (width, height) * trans along (x, y)."""
    params = {"group_size": 1, "sample_per_part": 2, "trans_std": 0.25}
    p = make(Case(1, 4, (12, 13), 1, count=1, params=params), classes=2)
    p = p.having(rois=[[0, 2, 3, 5, 4]], trans=np.array([1.0, 2.0, -1.0, 4.0]).reshape(1, 4, 1, 1))
    y = main(p.forward(subject))
    for k, (right, down) in enumerate(((1, 1), (-1, 2))):
        moved = p.having(rois=[[0, 2 + right, 3 + down, 5 + right, 4 + down]], trans=None)
        near(y[:, 2 * k : 2 * k + 2], main(moved.forward(subject))[:, 2 * k : 2 * k + 2])


def test_parts_are_shared_by_bins(subject):
    """part = i*parts // P: as many parts as bins is the same as one part repeated."""
    case = Case(2, 4, (7, 8), (4, 6), "inside", 3, params={"group_size": 2, "sample_per_part": 2})
    few = make(case, parts=(2, 3))
    many = few.having(trans=few["trans"].repeat(2, axis=2).repeat(2, axis=3))
    near(main(few.forward(subject)), main(many.forward(subject)))
    g, wide = few.backward(subject), many.backward(subject)
    near(g.x, wide.x)
    near(g.trans, wide.trans.reshape(3, 2, 2, 2, 3, 2).sum(axis=(3, 5)))
