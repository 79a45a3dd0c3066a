"""roi_pool computes what docs/semantics.md says (c.1): against the reference, published numbers, and single rules."""

import math
import pathlib

import device
import family
import family_errors
import family_gpu
import family_halves
import numpy as np
import pytest
import roi_cases
from checks import assert_close, assert_message, assert_same_bits, dot, said
from family import DTYPES, check_against_naive, expected, main, near
from hypothesis import given
from naive import roi_pool as naive
from roi_cases import LARGE, SEEDS, SIZES, SMOOTH, TINY, TINY_USUAL, USUAL, Case, laid_out, table
from roi_family import RoIFamily

VECTORS = pathlib.Path(__file__).parents[1] / "vectors"


def length(problem):
    return {"y": 0, "x": problem.grad_y.size}


def magnitudes(problem):
    """y is a pixel and exact; the gradient is a sum of output gradients."""
    g = naive.backward(np.abs(problem.grad_y), *problem.positional(), **problem.params)
    return {"y": np.zeros(problem.grad_y.shape), "x": g.x}


OPERATOR = family.Operator(
    "roi_pool",
    arrays=("x", "rois"),
    differentiable=("x",),
    linear=(),
    length=length,
    magnitudes=magnitudes,
    coordinates=("rois",),
)


def make(case, dtype=np.float64, seed=None):
    return roi_cases.make(OPERATOR, case, dtype, seed)


def usual(dtype):
    return make(USUAL, dtype)


def spread_out(case, dtype=np.float64):
    """Pixels that differ by more than the steps of finite differences, so that the maximum stays put."""
    p = make(case, dtype)
    order = np.random.default_rng(5).permutation(p["x"].size)
    return p.having(x=(0.1 * order - 3).reshape(p["x"].shape))


class TestFamily(family.Family, RoIFamily):
    operator, make, usual = OPERATOR, staticmethod(make), staticmethod(usual)
    cases = table(make, SIZES)
    smooth = table(spread_out, SMOOTH)
    wild = table(make, roi_cases.WILD)
    large = table(make, [LARGE])


class TestHalfTypes(family_halves.HalfTypes):
    described = TestFamily


class TestErrors(family_errors.Errors):
    operator, usual = OPERATOR, staticmethod(usual)
    wrong = roi_cases.wrong(usual)


class TestGPU(family_gpu.RoIs, family_gpu.GPU):
    operator, errors = OPERATOR, TestErrors
    usual = staticmethod(lambda dtype: make(TINY_USUAL, dtype))
    full = TestFamily.cases | TestFamily.wild
    cases = table(make, TINY)

    def test_argmax(self, gpu, dtype):
        """Few values, many of them equal: zeros of both signs, infinities, NaN. The argmax is the first one; -1 for an
        invalid box. It determines the backward."""
        p = make(Case(batch=2, channels=3, size=(5, 4), output=(2, 2), count=6, boxes="mixed"), dtype)
        p["x"][...] = np.random.default_rng(0).choice([-np.inf, -1, -0.0, 0.0, 1, np.inf, np.nan], p["x"].shape)
        result, want = p.forward(gpu, return_argmax=True), p.forward(naive, return_argmax=True)
        np.testing.assert_array_equal(result.argmax, want.argmax)
        np.testing.assert_array_equal(result.y, want.y)
        assert result.argmax.dtype == np.int32
        for deterministic in (False, True):
            g = p.backward(gpu, argmax=result.argmax, deterministic=deterministic)
            assert_close(g.x, *expected(p)["x"], "x")
        rois = p["rois"].copy()
        rois[2, 0] = 7
        result = p.having(rois=rois).forward(gpu, return_argmax=True)
        assert (result.argmax[2] == -1).all() and np.isnan(result.y[2]).all()
        np.testing.assert_array_equal(result.argmax[3:], want.argmax[3:])
        for bad in (result.argmax[:3], result.argmax.astype(np.int64), device.Host(result.argmax)):
            with pytest.raises((TypeError, ValueError), match="`argmax`"):
                p.backward(gpu, argmax=bad)


@pytest.mark.parametrize("dtype", DTYPES)
@given(case=roi_cases.cases(), seed=SEEDS, layouts=roi_cases.LAYOUT_NAMES)
def test_boxes_of_all_kinds(backend, dtype, case, seed, layouts):
    check_against_naive(backend, laid_out(make(case, dtype, seed), layouts))


@pytest.mark.parametrize("dtype", DTYPES)
@given(case=roi_cases.cases(), seed=SEEDS)
def test_pixels_that_are_not_finite(backend, dtype, case, seed):
    """Few values, so that many are equal: zeros of both signs, infinities, NaN. The argmax is exactly the first."""
    p = make(case, dtype, seed)
    p["x"][...] = np.random.default_rng(seed).choice([-np.inf, -1, -0.0, 0.0, 1, np.inf, np.nan], p["x"].shape)
    check_against_naive(backend, p)
    result, want = p.forward(backend, return_argmax=True), p.forward(naive, return_argmax=True)
    np.testing.assert_array_equal(result.argmax, want.argmax)
    np.testing.assert_array_equal(result.y, want.y)


# Published numbers.


@pytest.mark.parametrize("scale, want", [(1.0, [[14, 16], [26, 28]]), (0.7, [[7, 9], [19, 21]])])
@pytest.mark.parametrize("dtype", DTYPES)
def test_published_example_of_mxnet(subject, dtype, scale, want):
    """From the docstring of MXNet's ROIPooling."""
    x, rois = np.arange(48, dtype=dtype).reshape(1, 1, 8, 6), np.array([[0, 0, 0, 4, 4]], dtype)
    assert np.array_equal(subject.forward(x, rois, (2, 2), scale)[0, 0], want)


def test_example_of_torchvision(subject):
    """Issue 1953 of pytorch/vision."""
    x, rois = np.linspace(1, 64, 64).reshape(1, 1, 8, 8), np.array([[0.0, 0, 0, 3, 3]])
    assert np.array_equal(subject.forward(x, rois, 2)[0, 0], [[10, 12], [26, 28]])


@pytest.mark.parametrize("case", range(3))
def test_published_numbers_of_mmcv(subject, case):
    """mmcv does not round the boxes; those of its tests have integer corners."""
    with np.load(VECTORS / f"mmcv_roi_pool_case{case}.npz", allow_pickle=False) as file:
        v = dict(file)
    assert np.array_equal(v["rois"], np.round(v["rois"]))
    more = tuple(v["output_size"].tolist()), float(v["spatial_scale"])
    near(subject.forward(v["x"], v["rois"], *more), v["out"])
    near(subject.backward(v["grad_out"], v["x"], v["rois"], *more).x, v["grad_x"])


# Rules.


def one_box(box, output=1, size=(6, 5), **more):
    return make(Case(channels=2, size=size, output=output, count=1, **more)).having(rois=[[0, *box]])


@pytest.mark.parametrize(
    "box, rows, cols",
    [
        ((0, 0, 0, 0), slice(0, 1), slice(0, 1)),  # corners are pixels, the last one included
        ((1, 2, 3, 4), slice(2, 5), slice(1, 4)),
        ((0.5, 1.5, 2.5, 3.49), slice(2, 4), slice(1, 4)),  # halves are rounded away from zero
        ((-0.5, -1.5, 1.5, 0.5), slice(0, 2), slice(0, 3)),  # to -1, -2, 2, 1
        ((-9, -9, 90, 90), slice(0, 6), slice(0, 5)),  # clipped to the image, its last row and column included
        ((3, 4, 1, 2), slice(4, 5), slice(3, 4)),  # inverted: one pixel
        ((4.4, 5.4, 4.4, 5.4), slice(5, 6), slice(4, 5)),
    ],
)
def test_the_pixels_of_a_box(subject, box, rows, cols):
    p = one_box(box)
    assert np.array_equal(main(p.forward(subject))[0, :, 0, 0], p["x"][0, :, rows, cols].max(axis=(1, 2)))


def test_bins_overlap_by_a_pixel_where_they_do_not_divide_the_box(subject):
    p = one_box((0, 0, 4, 0), output=(1, 2))
    p["x"][0, :, 0] = [[1, 2, 9, 3, 4], [5, 4, 3, 2, 1]]
    assert np.array_equal(main(p.forward(subject))[0, :, 0], [[9, 9], [5, 3]])
    g = p.having(grad_y=[[[[1.0, 2.0]], [[3.0, 4.0]]]]).backward(subject)
    assert np.array_equal(g.x[0, :, 0], [[0, 0, 3, 0, 0], [3, 0, 4, 0, 0]])


@pytest.mark.parametrize("box", [(20, 0, 30, 3), (0, -9, 3, -7), (5, 2, 5, 2), (0, 6, 9, 9)])
def test_outside_is_zero(subject, box):
    p = one_box(box, output=(2, 3))
    p["x"][...] = np.nan
    result = p.forward(subject, return_argmax=True)
    assert not result.y.any() and (result.argmax == -1).all()
    assert not p.backward(subject).x.any()


def test_nan_is_the_maximum(subject):
    p = one_box((0, 0, 4, 5))
    p["x"][0, 0].ravel()[[7, 13, 20]] = np.nan, np.inf, np.nan
    result = p.forward(subject, return_argmax=True)
    assert np.isnan(result.y[0, 0]) and np.isfinite(result.y[0, 1])
    assert result.argmax[0, 0] == 7
    assert p.backward(subject).x[0, 0].ravel()[7] == p.grad_y[0, 0, 0, 0]


def test_minus_infinity_is_a_value(subject):
    p = one_box((1, 1, 4, 5))
    p["x"][...] = -np.inf
    result = p.forward(subject, return_argmax=True)
    assert (result.y == -np.inf).all() and (result.argmax == 6).all()


def test_the_first_of_equal_pixels_counts(subject):
    p = one_box((1, 1, 3, 4))
    p["x"][...] = 2.0
    p["x"][0, 0] = np.where(np.arange(30).reshape(6, 5) % 2, 0.0, -0.0)
    result = p.forward(subject, return_argmax=True)
    assert (result.argmax == 6).all()
    near(p.backward(subject).x[0, :, 1, 1], p.grad_y[0, :, 0, 0])


def test_a_scale_that_rounds(subject):
    """x1*scale is rounded in the dtype of the boxes: 0.7*5 is 3.5 in float64 and in float32, and becomes 4."""
    for dtype in DTYPES:
        p = make(Case(size=(9, 9), output=1, count=1, scale=0.7), dtype).having(rois=[[0, 5, 5, 5, 5]])
        at = math.trunc(float(dtype(5) * dtype(0.7)) + 0.5)
        assert main(p.forward(subject)).item() == p["x"][0, 0, at, at]


def test_euler_identity(subject):
    """Not linear, but scaled with x: <g_x, x> = <grad_y, y>."""
    p = make(Case(batch=2, channels=5, size=(7, 8), output=3, count=6))
    near(dot(p.backward(subject).x, p["x"]), dot(p.grad_y, main(p.forward(subject))), 10)


# argmax.


@pytest.mark.parametrize("dtype", DTYPES)
def test_argmax_is_that_of_the_reference(backend, dtype):
    p = make(Case(batch=2, channels=9, size=(7, 8), output=(3, 2), count=8), dtype)
    result, want = p.forward(backend, return_argmax=True), p.forward(naive, return_argmax=True)
    assert result._fields == ("y", "argmax") and result.argmax.dtype == np.int32
    assert_same_bits(result.y, p.forward(backend))
    np.testing.assert_array_equal(result.argmax, want.argmax)
    assert_same_bits(p.backward(backend, argmax=result.argmax).x, p.backward(backend).x)
    out = np.full_like(result.y, np.nan)
    again = p.forward(backend, return_argmax=True, out=out)
    assert again.y is out and np.array_equal(again.argmax, result.argmax)
    assert_same_bits(out, result.y)
    strided = np.repeat(result.argmax, 2, axis=3)[..., ::2]
    assert_same_bits(p.backward(backend, argmax=strided).x, p.backward(backend).x)


def test_argmax_is_believed(subject):
    """The backward uses the positions it is given, and does not look at x."""
    p = make(Case(channels=2, size=(3, 4), output=1, count=1)).having(rois=[[0, 0, 0, 3, 2]])
    g = p.backward(subject, argmax=np.array([7, -1], np.int32).reshape(1, 2, 1, 1))
    want = np.zeros((1, 2, 3, 4))
    want[0, 0, 1, 3] = p.grad_y[0, 0, 0, 0]
    near(g.x, want)


@pytest.mark.parametrize(
    "change, error, came, wanted",
    [
        (lambda a: a.astype(np.int64), TypeError, "int64", "int32"),
        (lambda a: a.astype(np.float32), TypeError, "float32", "int32"),
        (lambda a: a.tolist(), TypeError, "list", "array"),
        (lambda a: a[:-1], ValueError, said(3, 5, 3, 2), said(4, 5, 3, 2)),
        (lambda a: a[0], ValueError, said(5, 3, 2), said(4, 5, 3, 2)),
        (lambda a: a * 0 + 42, ValueError, "42", "42|41|H|-1"),
        (lambda a: a * 0 - 2, ValueError, "-2", "-1"),
    ],
)
def test_wrong_argmax(backend, change, error, came, wanted):
    p = usual(np.float32)
    argmax = p.forward(backend, return_argmax=True).argmax
    with pytest.raises(error) as raised:
        p.backward(backend, argmax=change(argmax))
    assert_message(raised, "argmax", came, wanted)


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_wrong_return_argmax(backend, value):
    with pytest.raises(TypeError) as raised:
        usual(np.float32).forward(backend, return_argmax=value)
    assert_message(raised, "return_argmax", str(value), "True|bool")
