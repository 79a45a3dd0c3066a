"""One rule for all operators: a sample outside is 0, and so are its slopes, whatever x contains; then ordinary
arithmetic.

So a NaN or infinite gradient of y, times that 0, is NaN in the gradients of coordinates and masks; nothing is added to
that of x. A shift of 0 times infinity is a NaN coordinate.
"""

from typing import NamedTuple

import device
import numpy as np
import pytest
from checks import cpu, reference

BAD = [np.nan, np.inf, -np.inf]
OUTSIDE = [(-7.0, 0.0), (0.0, 1e30), (np.inf, 0.0), (9.0, -np.inf)]  # y, x
KINDS = ("cpu", "naive", *device.KINDS)


@pytest.fixture(params=KINDS)
def backend_of(request):
    """operator -> checks.Backend"""
    if request.param in ("cpu", "naive"):
        return {"cpu": cpu, "naive": reference}[request.param]
    reason = device.missing(request.param)
    if reason:
        pytest.skip(reason)
    return lambda operator: device.on(request.param, operator)


class Sample(NamedTuple):
    """An operator called so that y, (1, 3, ...), is one sample of each channel, at given coordinates."""

    operator: str
    more: tuple  # array arguments, by position: x, "at" for the coordinates, others
    params: dict
    x_first: bool  # order of the coordinates

    def both(self, backend_of, at, grad=1.0, **params):
        """(y, {name: gradient}), for a gradient of y that is `grad` in one channel and 1 in the others."""
        backend, (y, x) = backend_of(self.operator), at
        pair = np.array([x, y] if self.x_first else [y, x]).reshape((1, 2, 1, 1) if len(self.more) != 2 else (1, 1, 2))
        arrays = [pair if array is AT else array for array in self.more]
        params = {**self.params, **params}
        y = np.asarray(backend.forward(*arrays, **params))
        grad_y = np.ones(y.shape)
        grad_y[0, 1] = grad
        g = backend.backward(grad_y, *arrays, **params)
        return y, {name: np.asarray(array) for name, array in g._asdict().items() if array is not None}


AT = object()
X = np.full((1, 3, 1, 1), np.nan)  # no sample outside may touch it
ONE, PIXEL = np.ones((1, 1, 1, 1)), np.array([[0, 0.5, 0.5, 1.5, 1.5]])
ROI, PS = {"output_size": 1, "gamma": 1.0}, {"output_size": 1, "group_size": 1, "trans_std": 1.0}
SAMPLES = {
    "bilinear_sample": Sample("bilinear_sample", (X, AT), {}, False),
    "deform_conv": Sample("deform_conv", (X, AT, np.ones((3, 3, 1, 1))), {"mask": ONE}, False),
    "deform_roi_pool": Sample("deform_roi_pool", (X, PIXEL, AT, ONE), {**ROI, "sampling_ratio": 1}, True),
    "deform_roi_pool, adaptive": Sample("deform_roi_pool", (X, PIXEL, AT, ONE), ROI, True),
    "deform_ps_roi_pool": Sample("deform_ps_roi_pool", (X, PIXEL, AT), PS, True),
}
MOVED = {"deform_roi_pool": "gamma", "deform_roi_pool, adaptive": "gamma", "deform_ps_roi_pool": "trans_std"}


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("at", OUTSIDE, ids=str)
def test_outside_all_is_0(backend_of, name, at):
    y, g = SAMPLES[name].both(backend_of, at)
    assert not y.any()
    assert not any(array.any() for array in g.values())


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("at", OUTSIDE, ids=str)
@pytest.mark.parametrize("grad", BAD)
def test_a_gradient_that_is_not_finite_times_0_is_nan(backend_of, name, at, grad):
    _, g = SAMPLES[name].both(backend_of, at, grad)
    assert not g.pop("x").any()
    for gradient, array in g.items():
        if gradient != "w":
            assert np.isnan(array).all(), gradient
        else:  # that of the affected output; the others are 0
            assert np.isnan(array[1]).all() and not array[::2].any()


@pytest.mark.parametrize("name", ["deform_conv", "deform_roi_pool", "deform_roi_pool, adaptive"])
def test_a_nan_mask_times_0_is_nan(backend_of, name):
    sample, nan = SAMPLES[name], np.full_like(ONE, np.nan)
    if "mask" in sample.params:
        y, g = sample.both(backend_of, OUTSIDE[0], mask=nan)
    else:
        y, g = sample._replace(more=(*sample.more[:-1], nan)).both(backend_of, OUTSIDE[0])
    assert np.isnan(y).all() and np.isnan(g["offsets"]).all()
    assert not g["mask"].any() and not g["x"].any()


@pytest.mark.parametrize("grad", BAD)
def test_the_mean_of_no_samples_is_0_like_one_outside(backend_of, grad):
    """An empty box, sampled once per pixel, so not at all: 0, even with a NaN offset."""
    empty = np.array([[0, 2.0, 2.0, 2.0, 2.0]])
    sample = SAMPLES["deform_roi_pool, adaptive"]._replace(more=(X, empty, AT, ONE))
    for at in ((0.0, 0.0), (np.nan, 1.0)):
        y, g = sample.both(backend_of, at)
        assert not y.any() and not any(array.any() for array in g.values())
        y, g = sample.both(backend_of, at, grad)
        assert not y.any() and not g["x"].any()
        assert np.isnan(g["offsets"]).all() and np.isnan(g["mask"]).all()


@pytest.mark.parametrize("name", MOVED)
@pytest.mark.parametrize("factor", [0.0, -0.0])
@pytest.mark.parametrize("at", [(np.inf, 0.0), (0.0, -np.inf)], ids=str)
def test_0_times_an_infinite_offset_is_a_nan_coordinate(backend_of, name, factor, at):
    y, g = SAMPLES[name].both(backend_of, at, **{MOVED[name]: factor})
    assert np.isnan(y).all() and not g.pop("x").any()
    assert all(np.isnan(array).all() for array in g.values())


def test_a_box_of_no_size_times_an_infinite_offset_is_a_nan_coordinate(backend_of):
    flat = np.array([[0, 0.5, 0.5, 1.5, 0.5]])  # of height 0
    sample = SAMPLES["deform_roi_pool"]._replace(more=(X, flat, AT, ONE))
    y, g = sample.both(backend_of, (np.inf, 0.0))
    assert np.isnan(y).all() and np.isnan(g["offsets"]).all() and np.isnan(g["mask"]).all() and not g["x"].any()


@pytest.mark.parametrize("name", MOVED)
@pytest.mark.parametrize("factor", [1e308, -1e308])
def test_an_offset_of_0_shifts_nothing_however_far_1_would(backend_of, name, factor):
    sample = SAMPLES[name]
    wide = np.array([[0, -20.0, -20.0, 21.0, 21.0]])  # its size times the factor overflows
    seen = sample._replace(more=(np.ones((1, 3, 1, 1)), wide, *sample.more[2:]))
    want, _ = seen.both(backend_of, (0.0, 0.0))
    y, _ = seen.both(backend_of, (0.0, 0.0), **{MOVED[name]: factor})
    np.testing.assert_array_equal(y, want)
