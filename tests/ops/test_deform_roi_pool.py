"""deform_roi_pool computes what docs/semantics.md says (d.3): reference, roi_align, mmcv's numbers, and single
rules."""

import functools
import pathlib

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
from naive import roi, roi_align
from roi_cases import (
    LARGE,
    SEEDS,
    SIZES,
    SMOOTH,
    TINY,
    TINY_ODD,
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

VECTORS = pathlib.Path(__file__).parents[1] / "vectors"
OPERATOR = family.Operator(
    "deform_roi_pool",
    arrays=("x", "rois", "offsets", "mask"),
    differentiable=("x", "offsets", "mask"),
    linear=("x", "mask"),
    optional=("offsets", "mask"),
    length=length(grid_samples),
    coordinates=("rois", "offsets"),
)


def make(case, dtype=np.float64, seed=None, offsets=True, mask=True, spread=3.0):
    shape = pair(case.output)

    def more(rng):
        return {
            "offsets": spread * rng.normal(size=(case.count, 2, *shape)) if offsets else None,
            "mask": rng.normal(size=(case.count, 1, *shape)) if mask else None,
        }

    return roi_cases.make(OPERATOR, case, dtype, seed, more=more)


def usual(dtype):
    return make(USUAL._replace(params={"sampling_ratio": 2, "gamma": 0.2}), dtype)


def between_kinks(case, dtype=np.float64):
    """Offsets that keep every sample away from integer coordinates."""
    p, rng = make(case, dtype), np.random.default_rng(6)
    ratio, gamma, pooled = case.params["sampling_ratio"], case.params.get("gamma", 0.1), pair(case.output)
    for (r, channel, i, j), _ in np.ndenumerate(p["offsets"]):
        _, start, size = roi.align_box(p["rois"][r], case.scale, True)
        a, index = 1 - channel, (i, j)[1 - channel]
        positions = np.zeros(1)
        while np.abs(positions - np.round(positions)).min() < 0.08:
            p["offsets"][r, channel, i, j] = rng.normal() * 4
            moved = start[a] + gamma * size[a] * p["offsets"][r, channel, i, j]
            positions, _ = roi.align_positions(moved, size[a], pooled[a], index, ratio, case.size[a])
    return p


PARAMS = [{"sampling_ratio": 2}, {}, {"sampling_ratio": 1, "gamma": 0.5}, {"sampling_ratio": 3, "gamma": -0.3}]
CASES = {
    **table(make, [case._replace(params=PARAMS[n % len(PARAMS)]) for n, case in enumerate(SIZES)]),
    **table(make, [case._replace(params=params) for case in SIZES[-10:] for params in PARAMS[:2]]),
    **table(make, SIZES[4:6], "no mask ", mask=False),
    **table(make, SIZES[5:7], "no offsets ", offsets=False),
    **table(make, SIZES[5:7], "neither ", offsets=False, mask=False),
    **table(make, SIZES[6:9], "far ", spread=40.0),
}


def special(case, dtype, seed, share):
    """A share of the offsets leads to pixels, halves and borders, or is infinite or NaN."""
    p, rng = make(case, dtype, seed), np.random.default_rng(seed)
    values = rng.choice(
        [-4, -2, -1, -0.5, -0.25, -0.0, 0.0, 0.25, 1, 2, 1e30, np.inf, -np.inf, np.nan], p["offsets"].shape
    )
    chosen = rng.random(values.shape) < share
    return p.having(offsets=np.where(chosen, values, p["offsets"]))


class TestFamily(family.Family, RoIFamily):
    operator, make, usual = OPERATOR, staticmethod(make), staticmethod(usual)
    cases = CASES
    smooth = table(between_kinks, [case._replace(params=PARAMS[n]) for case in SMOOTH for n in (0, 2, 3)])
    wild = table(functools.partial(special, seed=0, share=0.7), roi_cases.WILD)
    large = table(make, [LARGE, LARGE._replace(params={"sampling_ratio": 2})])


class TestHalfTypes(family_halves.HalfTypes):
    described = TestFamily


class TestErrors(family_errors.Errors):
    operator, usual = OPERATOR, staticmethod(usual)
    wrong = (
        *roi_cases.wrong(usual),
        *roi_cases.wrong_parameters(ints=("sampling_ratio",)),
        *roi_cases.wrong_parameters(numbers=("gamma",)),
        *(
            ("offsets", np.zeros(shape, np.float32), ValueError, said(*shape), said(4, 2, 3, 2))
            for shape in ((3, 2, 3, 2), (4, 1, 3, 2), (4, 2, 2, 2), (4, 2, 3, 3), (4, 4, 3, 2))
        ),
        *(
            ("mask", np.zeros(shape, np.float32), ValueError, said(*shape), said(4, 1, 3, 2))
            for shape in ((3, 1, 3, 2), (4, 2, 3, 2), (4, 1, 2, 2), (4, 1, 3, 3), (4, 5, 3, 2))
        ),
    )


class TestGPU(family_gpu.RoIs, family_gpu.GPU):
    operator, errors = OPERATOR, TestErrors
    usual = staticmethod(lambda dtype: make(TINY_USUAL._replace(params={"sampling_ratio": 2, "gamma": 0.2}), dtype))
    full = TestFamily.cases | TestFamily.wild
    cases = table(make, [case._replace(params=PARAMS[n % len(PARAMS)]) for n, case in enumerate(TINY)])
    cases |= table(make, TINY[1:2], "no offsets ", offsets=False)
    cases |= table(
        functools.partial(special, seed=0, share=0.7), [TINY_ODD._replace(params={"sampling_ratio": 2})], "odd "
    )


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    case=roi_cases.cases(sampling_ratio=[0, -1, 1, 2, 3], gamma=[0.0, 0.1, 0.25, 0.5, 1.0]),
    seed=SEEDS,
    share=st.sampled_from([0.0, 0.2, 0.7]),
    layouts=roi_cases.LAYOUT_NAMES,
)
def test_boxes_and_offsets_of_all_kinds(backend, dtype, case, seed, share, layouts):
    check_against_naive(backend, laid_out(special(case, dtype, seed, share), layouts))


def test_without_offsets_it_is_roi_align(subject):
    for ratio in (0, 2):
        p = make(Case(2, 3, (7, 8), (2, 3), count=9, scale=0.5, params={"sampling_ratio": ratio}), mask=False)
        shared = p["rois"], (2, 3), 0.5, ratio, True
        still = p.having(offsets=np.zeros(p["offsets"].shape))
        for same in (still, p.having(offsets=None)):
            near(main(same.forward(subject)), roi_align.forward(p["x"], *shared))
            near(same.backward(subject).x, roi_align.backward(p.grad_y, p["x"], *shared).x)


def test_offsets_move_bins_by_parts_of_the_box(subject):
    """gamma * (width, height) * offset; channel 0 along x, channel 1 along y."""
    p = make(Case(1, 2, (12, 13), (1, 2), count=1, params={"sampling_ratio": 2, "gamma": 0.25}), mask=False)
    p = p.having(rois=[[0, 2, 3, 6, 5]], offsets=[[[[1.5, -0.5]], [[0.75, 2.0]]]])
    for j, (right, down) in enumerate(((1.5, 0.75), (-0.5, 2.0))):
        box = np.array([[0, 2 + right, 3 + down / 2, 6 + right, 5 + down / 2]])
        near(main(p.forward(subject))[..., j], roi_align.forward(p["x"], box, (1, 2), 1.0, 2, True)[..., j])


def test_the_mask_multiplies(subject):
    p = make(Case(2, 3, (7, 8), (2, 3), count=5, params={"sampling_ratio": 2}))
    bare = main(p.having(mask=None).forward(subject))
    near(main(p.forward(subject)), bare * p["mask"])
    near(p.backward(subject).mask, (p.grad_y * bare).sum(axis=1, keepdims=True))


# One sample at (y, x) of a 4 x 4 image: the box is a pixel at (-0.5, -0.5), its offset with gamma 1 is the position.


def one_sample(y, x, channels=3, mask=1.5):
    params = {"sampling_ratio": 1, "gamma": 1.0}
    p = make(Case(channels=channels, size=(4, 4), output=1, count=1, params=params))
    offsets = np.array([x, y]).reshape(1, 2, 1, 1)
    return p.having(rois=[[0, 0, 0, 1, 1]], offsets=offsets, mask=np.full((1, 1, 1, 1), mask))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("at", ALIGN)
def test_values_and_right_slopes_along_an_axis(subject, at, axis):
    p = one_sample(*((at, 1.0) if axis == 0 else (1.0, at)))
    lines = p["x"][0, :, :, 1] if axis == 0 else p["x"][0, :, 1, :]
    values, slopes = (np.array([ALIGN[at](line)[k] for line in lines]) for k in (0, 1))
    near(main(p.forward(subject)).ravel(), 1.5 * values)
    g = p.backward(subject)
    near(g.offsets[0, 1 - axis], 1.5 * (p.grad_y.ravel() @ slopes))
    near(g.mask.item(), p.grad_y.ravel() @ values)
    weights = [ALIGN[at](line)[0] for line in np.eye(4)]
    near(g.x[0].sum(axis=2 - axis), 1.5 * np.outer(p.grad_y, weights))


@pytest.mark.parametrize("y", [-1.0, -0.5, 0.0, 1.0, 1.5, 3.0, 3.5, 4.0])
@pytest.mark.parametrize("x", [-0.25, 2.0, 3.75])
def test_only_the_pixels_of_the_cell_count(subject, y, x):
    clean = one_sample(y, x)
    used = np.zeros((4, 4), bool)
    used[np.ix_(cell(y), cell(x))] = True
    others = clean.having(x=np.where(used, clean["x"], np.nan))
    near(main(others.forward(subject)), main(clean.forward(subject)))
    for name in ("x", "offsets", "mask"):
        near(getattr(others.backward(subject), name), getattr(clean.backward(subject), name))
    for row, col in np.argwhere(used):
        spoilt = clean["x"].copy()
        spoilt[:, :, row, col] = np.nan
        g = clean.having(x=spoilt).backward(subject)
        assert np.isnan(main(clean.having(x=spoilt).forward(subject))).all() and np.isnan(g.mask).all()
        near(g.x, clean.backward(subject).x)


@pytest.mark.parametrize("value", [np.inf, -np.inf, 1e30, -1e30, 2.0**31, 1e300])
@pytest.mark.parametrize("axes", ["y", "x", "yx"])
def test_infinite_and_huge_offsets_are_outside(subject, value, axes):
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
    assert np.isnan(g.offsets).all() and np.isnan(g.mask).all() and not g.x.any()


@pytest.mark.parametrize("channel", [0, 1])
def test_a_nan_offset_reaches_its_bin_and_no_other(subject, channel):
    clean = make(Case(2, 5, (7, 8), (2, 3), count=4, boxes="inside", params={"sampling_ratio": 2}))
    at = (1, slice(None), 1, 2)
    broken, away = (clean.having(offsets=clean["offsets"].copy()) for _ in range(2))
    broken["offsets"][1, channel, 1, 2] = np.nan
    away["offsets"][1, channel, 1, 2] = np.inf  # the result without the bin
    got = {"y": main(broken.forward(subject)), **broken.backward(subject)._asdict()}
    want = {"y": main(away.forward(subject)), **away.backward(subject)._asdict()}
    for name in ("y", "offsets", "mask"):
        mark = np.zeros(got[name].shape, bool)
        mark[at] = True
        np.testing.assert_array_equal(np.isnan(got[name]), mark, err_msg=name)
        near(got[name][~mark], want[name][~mark])
    near(got["x"], want["x"])


def test_zero_mask_hides_nothing(subject):
    """0 * NaN is NaN."""
    p = one_sample(np.nan, 1.5, mask=0.0)
    assert np.isnan(main(p.forward(subject))).all()
    p = one_sample(1.5, 1.5, mask=0.0)
    g = p.backward(subject)
    assert not main(p.forward(subject)).any() and not g.x.any() and not g.offsets.any() and g.mask.all()
    p = one_sample(9.0, 1.5, mask=np.nan)  # and NaN * 0
    assert np.isnan(main(p.forward(subject))).all()


def test_empty_and_inverted_boxes_are_zero(subject):
    boxes = [[0, 2.0, 2.0, 2.0, 2.0], [0, 3.0, 1.0, 1.0, 4.0], [0, 4.0, 4.0, 1.0, 1.0]]
    p = make(Case(channels=2, count=3)).having(rois=boxes)
    assert not main(p.forward(subject)).any()
    for array in p.backward(subject):
        assert not array.any()


@pytest.mark.parametrize("case", range(3))
def test_published_numbers_of_mmcv(subject, case):
    """The source's layer starts with zero offsets."""
    with np.load(VECTORS / f"mmcv_deform_roi_pool_case{case}.npz", allow_pickle=False) as file:
        v = dict(file)
    output = tuple(v["output_size"].tolist())
    more = {"output_size": output, "sampling_ratio": int(v["sampling_ratio"]), "gamma": float(v["gamma"])}
    offsets = np.zeros((len(v["rois"]), 2, *output))
    near(subject.forward(v["x"], v["rois"], offsets, spatial_scale=float(v["spatial_scale"]), **more), v["out"])
    g = subject.backward(v["grad_out"], v["x"], v["rois"], offsets, spatial_scale=float(v["spatial_scale"]), **more)
    near(g.x, v["grad_x"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_infinite_mask_and_gradient_are_ordinary_arithmetic(backend, dtype):
    x, rois = np.ones((1, 21, 6, 7), dtype), np.array([[0, 1, 1, 5, 4]], dtype)
    mask, offsets = np.full((1, 1, 2, 2), np.inf, dtype), np.full((1, 2, 2, 2), 0.3, dtype)
    y = backend.forward(x, rois, offsets, mask, output_size=2)
    assert (y == np.inf).all()
    grad_y = np.zeros_like(y)
    grad_y[0, 3] = np.inf
    g = backend.backward(grad_y, x, rois, offsets, np.ones_like(mask), output_size=2, wrt="mask")
    assert (g.mask == np.inf).all()


def test_an_offset_of_0_shifts_nothing_however_far_1_would(backend):
    rng = np.random.default_rng(0)
    x, rois = rng.normal(size=(1, 3, 6, 7)).astype(np.float32), np.array([[0, -50, 1, 50, 4]], np.float32)
    offsets = np.zeros((1, 2, 2, 2), np.float32)
    y = backend.forward(x, rois, offsets, output_size=2, gamma=1e38)
    np.testing.assert_array_equal(y, backend.forward(x, rois, output_size=2))


@pytest.mark.parametrize("channels", [1, 5, 17])
def test_the_sums_of_a_whole_image_are_made_row_by_row(backend, channels):
    """Once a running float32 sum has reached 2**24, adding 1 changes nothing: only the first row's ones may be lost."""
    side = 300
    x, rois = np.ones((1, channels, side, side), np.float32), np.array([[0, 0, 0, side, side]], np.float32)
    x[:, :, 0, 0] = 2.0**24
    offsets, mask = np.zeros((1, 2, 1, 1), np.float32), np.ones((1, 1, 1, 1), np.float32)
    y = backend.forward(x, rois, offsets, mask, output_size=1)
    g = backend.backward(np.ones_like(y), x, rois, offsets, mask, output_size=1, wrt="mask")
    total = 2.0**24 + side**2 - 1
    assert abs(g.mask.item() * side**2 / channels - total) <= side + 8 * np.finfo(np.float32).eps * total
